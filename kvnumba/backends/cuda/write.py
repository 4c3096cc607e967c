"""New tokens into their slots, and whole arrays into a format."""

from __future__ import annotations

import functools
from typing import Any

from numba import float32

from kvnumba.backends.cuda.codecs import Codec, row_writer
from kvnumba.backends.cuda.intrinsics import loader, quotient, remainder, vectors, warp_barrier
from kvnumba.backends.cuda.jit import THREADS, WARP, Kernel, cuda, device
from kvnumba.backends.cuda.parameters import WriteAddresses, WriteShape
from kvnumba.backends.cuda.rows import element_of
from kvnumba.backends.cuda.tables import blocks_of, find_sequence, find_slab, position_of
from kvnumba.backends.cuda.transforms import Transform, rotation_in_shared
from kvnumba.formats import FORMATS


def shared_bytes(head_dim: int, value_head_dim: int) -> int:
    """A row for each warp."""
    return 4 * THREADS // WARP * max(head_dim, value_head_dim)


@functools.cache
def write_kernel(
    given_keys: str,
    given_values: str,
    key_codec: Codec,
    value_codec: Codec,
    width: int,
    transform: Transform,
) -> Kernel:
    """A warp for each new row, the next when it is done; blocks with y = 0 write keys, those with y = 1 values."""
    bring_key = _row_bringer(given_keys, width, transform.keys, transform.calibrated)
    bring_value = _row_bringer(given_values, width, transform.values, calibrated=False)
    write_key, write_value = row_writer(key_codec, width), row_writer(value_codec, width)
    key_bytes, value_bytes = FORMATS[given_keys].bits // 8, FORMATS[given_values].bits // 8

    def write(call, work):
        thread = cuda.threadIdx.x
        lane = thread % WARP
        shared, values = cuda.shared.array(0, float32), cuda.local.array(width, float32)
        shifts, scales = cuda.local.array(width, float32), cuda.local.array(width, float32)
        row = thread // WARP * max(work.head_dim, work.value_head_dim)
        first = (cuda.blockIdx.x * THREADS + thread) // WARP
        for item in range(first, work.num_tokens * work.num_kv_heads, cuda.gridDim.x * (THREADS // WARP)):
            token = quotient(item, work.num_kv_heads)
            head = item - token * work.num_kv_heads
            sequence = find_sequence(work.tables, work.num_seqs, token)
            position = position_of(work.tables, work.num_seqs, sequence, token)
            blocks = blocks_of(work.tables, work.num_seqs, work.max_blocks, sequence)
            number = find_slab(blocks, position, work.block_size, work.num_kv_heads, head)
            slab = number * work.slab_bytes
            offset = remainder(position, work.block_size)
            if number >= 0:  # else the token belongs to no block
                if cuda.blockIdx.y == 0:
                    x = element_of(work.tokens_per_row, work.k_batch, work.k_token, work.k_head, token, head)
                    channels = 4 * head * work.head_dim
                    bring_key(
                        lane, values, shifts, scales, call.k + x * key_bytes, work.head_dim,
                        call.channel_shifts + channels, call.channel_scales + channels, shared, row,
                    )  # fmt: skip
                    write_key(
                        lane, values, shared, row, offset, work.head_dim, work.key_group, call.keys + slab,
                        call.key_scales + slab,
                    )  # fmt: skip
                else:
                    x = element_of(work.tokens_per_row, work.v_batch, work.v_token, work.v_head, token, head)
                    bring_value(
                        lane, values, shifts, scales, call.v + x * value_bytes, work.value_head_dim, 0, 0, shared,
                        row,
                    )  # fmt: skip
                    write_value(
                        lane, values, shared, row, offset, work.value_head_dim, work.value_group,
                        call.values + slab, call.value_scales + slab,
                    )  # fmt: skip
            warp_barrier()

    return Kernel(write, (WriteAddresses, WriteShape))


@functools.cache
def _row_bringer(given: str, width: int, rotated: int, calibrated: bool) -> Any:
    """``bring(...)``: a row at an address `x`, in a precision `given`, is transformed into shared memory at `row`."""
    load, load_channels, of = loader(given, width), loader("float32", width), vectors(1, width)
    rotate = rotation_in_shared(rotated, warp_barrier)
    itemsize = FORMATS[given].bits // 8

    @device
    def bring(lane, values, shifts, scales, x, head_dim, channel_shifts, channel_scales, shared, row):
        for at in range(lane * width, head_dim, WARP * width):
            load(x + at * itemsize, values)
            if calibrated:
                load_channels(channel_shifts + 4 * at, shifts)
                load_channels(channel_scales + 4 * at, scales)
                of.calibrate(values, shifts, scales)
            of.put(shared, row + at, values)
        warp_barrier()
        rotate(shared, row, head_dim, lane, WARP)

    return bring
