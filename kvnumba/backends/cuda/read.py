"""Stored rows back as float32, and whole arrays out of a format."""

from __future__ import annotations

import functools

from numba import float32

from kvnumba.backends.cuda.intrinsics import reader, remainder, storer
from kvnumba.backends.cuda.jit import THREADS, WARP, Kernel, cuda
from kvnumba.backends.cuda.tables import find_slab


@functools.cache
def read_kernel(fmt: str, width: int) -> Kernel:
    """A warp for each row of out (B, H, length, D), the next when it is done; block ids are (B, max_blocks)."""
    read_values = reader(fmt, width)
    store = storer("float32", width)

    def read(
        blocks, codes, scale, zero, out, slab_bytes, num_rows, length, max_blocks, block_size, num_heads, head_dim,
        group_size,
    ):  # fmt: skip
        thread = cuda.threadIdx.x
        lane = thread % WARP
        values = cuda.local.array(width, float32)
        first = (cuda.blockIdx.x * THREADS + thread) // WARP
        for item in range(first, num_rows, cuda.gridDim.x * (THREADS // WARP)):
            position, head = item % length, item // length % num_heads
            sequence = item // length // num_heads
            slab = (
                find_slab(blocks + 4 * sequence * max_blocks, position, block_size, num_heads, head)
                * slab_bytes
            )
            offset = remainder(position, block_size)
            for at in range(lane * width, head_dim, WARP * width):
                read_values(codes + slab, scale + slab, zero + slab, offset, at, head_dim, group_size, values)
                store(out + 4 * (item * head_dim + at), values)

    return Kernel(read, "q" * 7 + "i" * 6)
