"""New tokens into their slots, and whole arrays into a format."""

from __future__ import annotations

import functools
from typing import Any

from numba import float32

from kvnumba.backends.cuda.intrinsics import (
    loader,
    quotient,
    remainder,
    store_float,
    storer,
    vectors,
    warp_max,
    warp_min,
)
from kvnumba.backends.cuda.jit import THREADS, WARP, Kernel, cuda, device
from kvnumba.backends.cuda.tables import blocks_of, find_sequence, find_slab, position_of
from kvnumba.formats import FORMATS


@functools.cache
def row_writer(given: str, name: str, width: int) -> Any:
    """Encode one row; the threads of a warp share it, `width` neighbours at a time."""
    fmt = FORMATS[name]
    bits, quantized = fmt.bits, fmt.quantized
    itemsize = FORMATS[given].bits // 8
    load, store, of = loader(given, width), storer(name, width), vectors(1, width)
    most = float32(fmt.max_code) if quantized else float32(0)
    infinity, nothing, one = float32("inf"), float32(0), float32(1)

    @device
    def write_row(lane, values, x, offset, head_dim, group_size, codes, scale, zero):
        place = offset * head_dim
        if quantized:
            for group in range(head_dim // group_size):
                begin, end = group * group_size, (group + 1) * group_size
                low, high = infinity, -infinity
                for at in range(begin + lane * width, end, WARP * width):
                    load(x + at * itemsize, values)
                    low, high = min(low, of.smallest(values)), max(high, of.largest(values))
                low, high = warp_min(low), warp_max(high)
                step = (high - low) / most
                # a constant group has step 0: all its codes are 0, and code * step + low is exact
                divisor = step if step > nothing else one
                for at in range(begin + lane * width, end, WARP * width):
                    load(x + at * itemsize, values)
                    of.quantize(values, low, divisor, most)
                    store(codes + (place + at) * bits // 8, values)
                if lane == 0:
                    at = 8 * (offset * (head_dim // group_size) + group)
                    store_float(scale + at, step)
                    store_float(zero + at, low)
        else:
            for at in range(lane * width, head_dim, WARP * width):
                load(x + at * itemsize, values)
                store(codes + (place + at) * bits // 8, values)

    return write_row


@functools.cache
def write_kernel(
    given_keys: str, given_values: str, key_format: str, value_format: str, width: int
) -> Kernel:
    """A warp for each new row, the next when it is done; blocks with y = 0 write keys, those with y = 1 values.

    Row (token t, head h) of new keys begins at element ``t // n * batch + t % n * token + h * head``.
    """
    write_key = row_writer(given_keys, key_format, width)
    write_value = row_writer(given_values, value_format, width)
    key_bytes, value_bytes = FORMATS[given_keys].bits // 8, FORMATS[given_values].bits // 8

    def write(
        tables, k, v, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, k_batch, k_token, k_head, v_batch,
        v_token, v_head, slab_bytes, tokens_per_row, num_tokens, num_seqs, max_blocks, block_size, num_heads, head_dim,
        group_size,
    ):  # fmt: skip
        thread = cuda.threadIdx.x
        lane = thread % WARP
        values = cuda.local.array(width, float32)
        first = (cuda.blockIdx.x * THREADS + thread) // WARP
        for item in range(first, num_tokens * num_heads, cuda.gridDim.x * (THREADS // WARP)):
            token = quotient(item, num_heads)
            head = item - token * num_heads
            sequence = find_sequence(tables, num_seqs, token)
            position = position_of(tables, num_seqs, sequence, token)
            blocks = blocks_of(tables, num_seqs, max_blocks, sequence)
            slab = find_slab(blocks, position, block_size, num_heads, head) * slab_bytes
            offset = remainder(position, block_size)
            batch = quotient(token, tokens_per_row)
            token -= batch * tokens_per_row
            if cuda.blockIdx.y == 0:
                x = k + (batch * k_batch + token * k_token + head * k_head) * key_bytes
                write_key(
                    lane,
                    values,
                    x,
                    offset,
                    head_dim,
                    group_size,
                    k_codes + slab,
                    k_scale + slab,
                    k_zero + slab,
                )
            else:
                x = v + (batch * v_batch + token * v_token + head * v_head) * value_bytes
                write_value(
                    lane,
                    values,
                    x,
                    offset,
                    head_dim,
                    group_size,
                    v_codes + slab,
                    v_scale + slab,
                    v_zero + slab,
                )

    return Kernel(write, "q" * 16 + "i" * 8)
