"""Tokens from slots of a cache to others, bit for bit: what stays of a sequence that drops tokens moves together."""

from __future__ import annotations

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
        The blocks to fill, none of which is read after it is filled.
    overwritten : (M,) int32
        Those of them that are in use.
    """
    before = backend.read_blocks(buffers, overwritten) if len(overwritten) else None
    each = max(1, CHUNK // sources.shape[1])
    try:
        for start in range(0, len(into), each):
            chunk = slice(start, start + each)
            blocks, which = np.unique(sources[chunk] // sources.shape[1], return_inverse=True)
            keys, values = backend.read_blocks(buffers, blocks)
            which, offsets = which.reshape(sources[chunk].shape), sources[chunk] % sources.shape[1]
            backend.write_blocks(
                buffers, into[chunk], _picked(keys, which, offsets), _picked(values, which, offsets)
            )
    except BaseException:
        if before is not None:
            backend.write_blocks(buffers, overwritten, *before)
        raise


def _picked(encoded: Encoded, which: np.ndarray, offsets: np.ndarray) -> Encoded:
    """Blocks (num_layers, N, H, block_size, ...) made of tokens of others, which (N, block_size) says."""
    # NumPy puts the axes of the two indices first: (N, block_size, num_layers, H, ...)
    picked = (array[:, which, :, offsets] for array in encoded)
    return Encoded(*(np.ascontiguousarray(array.transpose(2, 0, 3, 1, 4)) for array in picked))
