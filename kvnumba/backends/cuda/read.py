"""Stored rows back as float32, and whole arrays out of a format."""

from __future__ import annotations

import functools

from numba import float32

from kvnumba.backends.cuda.intrinsics import reader, storer
from kvnumba.backends.cuda.jit import THREADS, WARP, Kernel, cuda
from kvnumba.backends.cuda.tables import find_row


@functools.cache
def read_kernel(fmt: str, width: int) -> Kernel:
    """A warp for each row of out (B, H, length, D); sequences have their block ids at ``blocks`` (B, max_blocks)."""
    read_values = reader(fmt, width)
    store = storer("float32", width)

    def read(
        blocks, codes, scale, zero, out, num_rows, length, max_blocks, block_size, num_heads, head_dim, group_size
    ):  # fmt: skip
        thread = cuda.threadIdx.x
        lane = thread % WARP
        item = (cuda.blockIdx.x * THREADS + thread) // WARP
        if item < num_rows:
            values = cuda.local.array(width, float32)
            position, head = item % length, item // length % num_heads
            sequence = item // length // num_heads
            row = find_row(blocks + 4 * sequence * max_blocks, position, block_size, num_heads, head)
            for at in range(lane * width, head_dim, WARP * width):
                read_values(codes, scale, zero, row, at, head_dim, group_size, values)
                store(out + 4 * (item * head_dim + at), values)

    return Kernel(read, "q" * 6 + "i" * 6)
