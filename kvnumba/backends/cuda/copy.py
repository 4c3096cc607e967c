"""Whole blocks into others."""

from __future__ import annotations

import functools

from kvnumba.backends.cuda.intrinsics import load_int, store_int
from kvnumba.backends.cuda.jit import THREADS, Kernel, cuda
from kvnumba.backends.cuda.parameters import CopyAddresses, CopyShape


@functools.cache
def copy_kernel() -> Kernel:
    """A block of threads for each pair of blocks and each layer."""

    def copy(call, work):
        item = cuda.blockIdx.x
        pair = call.pairs + 8 * (item % work.num_pairs)
        layer = call.storage + item // work.num_pairs * work.layer_bytes
        source = layer + load_int(pair) * work.block_bytes
        destination = layer + load_int(pair + 4) * work.block_bytes
        for at in range(4 * cuda.threadIdx.x, work.block_bytes, 4 * THREADS):
            store_int(destination + at, load_int(source + at))

    return Kernel(copy, (CopyAddresses, CopyShape))
