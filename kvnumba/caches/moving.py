"""Tokens from slots of a cache to others, bit for bit: what stays of a sequence that drops tokens moves together."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvnumba.backends.protocol import Backend
from kvnumba.storage import Buffers, Encoded

CHUNK = 64  # blocks that are read at once, about: bounds the extra memory


def move_tokens(
    backend: Backend, buffers: Buffers, sources: np.ndarray, into: np.ndarray, overwritten: np.ndarray
) -> None:
    """Fill blocks with tokens of others; if that fails, what is overwritten is as it was.

    Parameters
    ----------
    sources : (N, block_size) int64
        For each slot to fill, the one that its token is in: ``block * block_size + offset``.
    into : (N,) int32
        The blocks to fill.
    overwritten : (M,) int32
        Those of them that are in use. If there are any, all tokens are read before the first is written.
    """
    before = backend.read_blocks(buffers, overwritten) if len(overwritten) else None
    each = max(1, CHUNK // sources.shape[1])
    chunks = [slice(start, start + each) for start in range(0, len(into), each)]
    filled: Iterable[tuple[Encoded, Encoded]] = (
        _filled(backend, buffers, sources[chunk]) for chunk in chunks
    )
    if before is not None:
        filled = list(filled)
    try:
        for chunk, (keys, values) in zip(chunks, filled, strict=True):
            backend.write_blocks(buffers, into[chunk], keys, values)
    except BaseException:
        if before is not None:
            backend.write_blocks(buffers, overwritten, *before)
        raise


def _filled(backend: Backend, buffers: Buffers, sources: np.ndarray) -> tuple[Encoded, Encoded]:
    """Blocks with the tokens that are in some slots (N, block_size) now, as `Backend.read_blocks` returns them."""
    block_size = sources.shape[1]
    blocks, which = np.unique(sources // block_size, return_inverse=True)
    keys, values = backend.read_blocks(buffers, blocks)
    which, offsets = which.reshape(sources.shape), sources % block_size
    return _picked(keys, which, offsets), _picked(values, which, offsets)


def _picked(encoded: Encoded, which: np.ndarray, offsets: np.ndarray) -> Encoded:
    """Blocks (num_layers, N, H, block_size, ...) made of tokens of others, which (N, block_size) says."""
    # NumPy puts the axes of the two indices first: (N, block_size, num_layers, H, ...)
    picked = (array[:, which, :, offsets] for array in encoded)
    return Encoded(*(np.ascontiguousarray(array.transpose(2, 0, 3, 1, 4)) for array in picked))
