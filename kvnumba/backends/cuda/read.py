"""Stored rows back as float32, and whole arrays out of a format."""

from __future__ import annotations

import functools
from typing import Any

from numba import float32

from kvnumba.backends.cuda.codecs import Codec, reader
from kvnumba.backends.cuda.intrinsics import floats_at, remainder, storer
from kvnumba.backends.cuda.jit import THREADS, WARP, Kernel, cuda
from kvnumba.backends.cuda.parameters import ReadAddresses, ReadShape
from kvnumba.backends.cuda.tables import find_slab


@functools.cache
def read_kernel(codec: Codec, width: int) -> Kernel:
    """A warp for each row of out (B, H, length, D), the next when it is done; block ids are (B, max_blocks)."""
    read_values = reader(codec, width)
    whole = codec.fmt.codec is not None  # groups, which go straight to where they belong
    store: Any = None if whole else storer("float32", width)

    def read(call, work):
        thread = cuda.threadIdx.x
        lane = thread % WARP
        values = cuda.local.array(width, float32)
        first = (cuda.blockIdx.x * THREADS + thread) // WARP
        for item in range(first, work.num_rows, cuda.gridDim.x * (THREADS // WARP)):
            position, head = item % work.length, item // work.length % work.num_kv_heads
            sequence = item // work.length // work.num_kv_heads
            blocks = call.blocks + 4 * sequence * work.max_blocks
            slab = find_slab(blocks, position, work.block_size, work.num_kv_heads, head) * work.slab_bytes
            offset = remainder(position, work.block_size)
            for at in range(lane * width, work.head_dim, WARP * width):
                out = call.out + 4 * (item * work.head_dim + at)
                if whole:
                    read_values(
                        call.codes + slab, call.scales + slab, offset, at, work.head_dim, work.group_size,
                        floats_at(out, width),
                    )  # fmt: skip
                else:
                    read_values(
                        call.codes + slab, call.scales + slab, offset, at, work.head_dim, work.group_size, values
                    )  # fmt: skip
                    store(out, values)

    return Kernel(read, (ReadAddresses, ReadShape))
