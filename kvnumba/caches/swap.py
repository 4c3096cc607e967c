"""Blocks in host memory or in a memory-mapped file, while their sequence has none in the cache."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvnumba.backends.protocol import Backend
from kvnumba.storage import Buffers, Encoded, array_specs

CHUNK = 64  # blocks that are moved at once: bounds the extra memory
ALIGNMENT = 64  # bytes at whose multiples the parts of a file begin


class SwappedBlocks(NamedTuple):
    """Blocks of one sequence as they were stored, and which ones they were."""

    blocks: np.ndarray
    keys: Encoded
    values: Encoded
    path: Path | None

    def discard(self) -> None:
        """Remove the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def save_blocks(backend: Backend, buffers: Buffers, blocks: np.ndarray, path: Path | None) -> SwappedBlocks:
    """Copy blocks out of a cache. OSError, with no file left behind, where there is no room for them."""
    shapes = array_specs(buffers.layout, len(blocks))
    parts = _create(path, shapes) if path else [np.empty(shape, dtype) for shape, dtype in shapes]
    swapped = SwappedBlocks(blocks, Encoded(*parts[:3]), Encoded(*parts[3:]), path)
    try:
        for start in range(0, len(blocks), CHUNK):
            chunk = slice(start, start + CHUNK)
            keys, values = backend.read_blocks(buffers, blocks[chunk])
            for part, new in zip(parts, (*keys, *values), strict=True):
                part[:, chunk] = new
    except BaseException:
        swapped.discard()
        raise
    return swapped


def fill_blocks(backend: Backend, buffers: Buffers, swapped: SwappedBlocks, into: np.ndarray) -> None:
    """Copy back each block for which `into` names one; those with a negative number are left out."""
    wanted = np.flatnonzero(into >= 0)
    for start in range(0, len(wanted), CHUNK):
        chunk = wanted[start : start + CHUNK]
        keys, values = (
            Encoded(*(part[:, chunk] for part in kept)) for kept in (swapped.keys, swapped.values)
        )
        backend.write_blocks(buffers, into[chunk], keys, values)


def _create(path: Path, shapes: list[tuple[tuple[int, ...], np.dtype[Any]]]) -> list[np.ndarray]:
    """Arrays in a new file, whose room on the disk is set aside: a full disk is an error here, not a crash later."""
    starts, size = [], 0
    for shape, dtype in shapes:
        starts.append(size)
        size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    with path.open("xb") as file:
        try:
            _reserve(file.fileno(), size)
        except BaseException:
            path.unlink()
            raise
    if not size:
        return [np.empty(shape, dtype) for shape, dtype in shapes]
    memory = np.asarray(np.memmap(path, np.uint8, "r+"))
    return [
        memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        for start, (shape, dtype) in zip(starts, shapes, strict=True)
    ]


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        if size:
            os.posix_fallocate(descriptor, 0, size)
    else:  # written in full: a sparse file would notice a full disk only when it is used
        zeros = bytes(1 << 20)
        for start in range(0, size, len(zeros)):
            os.write(descriptor, zeros[: size - start])
