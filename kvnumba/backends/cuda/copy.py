"""Whole blocks from place to place."""

from __future__ import annotations

import functools

from kvnumba.backends.cuda.intrinsics import load_int, store_int
from kvnumba.backends.cuda.jit import THREADS, Kernel, cuda


@functools.cache
def copy_kernel() -> Kernel:
    """A block of threads for each pair (source, destination) int32 and layer; blocks are multiples of 4 bytes."""

    def copy(pairs, storage, layer_bytes, block_bytes, num_pairs):
        item = cuda.blockIdx.x
        pair, layer = pairs + 8 * (item % num_pairs), storage + item // num_pairs * layer_bytes
        source = layer + load_int(pair) * block_bytes
        destination = layer + load_int(pair + 4) * block_bytes
        for at in range(4 * cuda.threadIdx.x, block_bytes, 4 * THREADS):
            store_int(destination + at, load_int(source + at))

    return Kernel(copy, "q" * 4 + "i")
