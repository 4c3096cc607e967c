"""New tokens into their slots, and whole arrays into a format."""

from __future__ import annotations

import functools

from numba import float32

from kvnumba.backends.cuda.codecs import Codec, row_writer
from kvnumba.backends.cuda.intrinsics import quotient, remainder
from kvnumba.backends.cuda.jit import THREADS, WARP, Kernel, cuda
from kvnumba.backends.cuda.parameters import WriteAddresses, WriteShape
from kvnumba.backends.cuda.rows import element_of
from kvnumba.backends.cuda.tables import blocks_of, find_sequence, find_slab, position_of
from kvnumba.formats import FORMATS


@functools.cache
def write_kernel(
    given_keys: str, given_values: str, key_codec: Codec, value_codec: Codec, width: int
) -> Kernel:
    """A warp for each new row, the next when it is done; blocks with y = 0 write keys, those with y = 1 values."""
    write_key = row_writer(given_keys, key_codec, width)
    write_value = row_writer(given_values, value_codec, width)
    key_bytes, value_bytes = FORMATS[given_keys].bits // 8, FORMATS[given_values].bits // 8

    def write(call, work):
        thread = cuda.threadIdx.x
        lane = thread % WARP
        values = cuda.local.array(width, float32)
        first = (cuda.blockIdx.x * THREADS + thread) // WARP
        for item in range(first, work.num_tokens * work.num_kv_heads, cuda.gridDim.x * (THREADS // WARP)):
            token = quotient(item, work.num_kv_heads)
            head = item - token * work.num_kv_heads
            sequence = find_sequence(work.tables, work.num_seqs, token)
            position = position_of(work.tables, work.num_seqs, sequence, token)
            blocks = blocks_of(work.tables, work.num_seqs, work.max_blocks, sequence)
            slab = find_slab(blocks, position, work.block_size, work.num_kv_heads, head) * work.slab_bytes
            offset = remainder(position, work.block_size)
            if cuda.blockIdx.y == 0:
                x = element_of(work.tokens_per_row, work.k_batch, work.k_token, work.k_head, token, head)
                write_key(
                    lane, values, call.k + x * key_bytes, offset, work.head_dim, work.key_group, call.keys + slab,
                    call.key_scales + slab,
                )  # fmt: skip
            else:
                x = element_of(work.tokens_per_row, work.v_batch, work.v_token, work.v_head, token, head)
                write_value(
                    lane, values, call.v + x * value_bytes, offset, work.value_head_dim, work.value_group,
                    call.values + slab, call.value_scales + slab,
                )  # fmt: skip

    return Kernel(write, (WriteAddresses, WriteShape))
