"""Attention in float32, for every format and shape: FlashAttention's online softmax (Dao et al., 2022).

A block takes up to 16 rows of scores (new tokens times query heads of a KV head) over a range of keys, `KEYS`
at a time, in four phases: scores, a key to a thread; the rows' maxima; weights; values, a part of the head and of
the keys to a thread.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import float32, int32

from kvnumba.backends.cuda.codecs import Codec, reader
from kvnumba.backends.cuda.finish import TOGETHER, finisher, shared_floats
from kvnumba.backends.cuda.intrinsics import (
    LEAST,
    barrier,
    index,
    load_float,
    load_int,
    loader,
    quotient,
    remainder,
    vectors,
    warp_sum,
)
from kvnumba.backends.cuda.jit import SIMULATED, THREADS, WARP, Kernel, cuda, int64
from kvnumba.backends.cuda.parameters import AttendAddresses, AttendShape
from kvnumba.backends.cuda.plan import MAX_SPLITS, SEQUENCE, Shape
from kvnumba.backends.cuda.rows import head_of, open_piece, query_of, token_of
from kvnumba.backends.cuda.tables import find_slab
from kvnumba.backends.cuda.transforms import Transform, rotation_in_shared
from kvnumba.formats import FORMATS

FEW = Shape("attend", 4, 4, merges=True)
MANY = Shape("attend", 64 if SIMULATED else 16, 2, merges=True)
"""What the kernel is compiled for: decoding, and more rows than that; in the simulator blocks are dear."""

KEYS = 128 if SIMULATED else 64


def shared_bytes(rows: int, head_dim: int, value_head_dim: int) -> int:
    """What `attend` cuts up: sums or queries, scores, rows of keys, four numbers a row."""
    return 4 * (shared_floats(rows, max(head_dim, value_head_dim), 1) + rows * KEYS + 2 * KEYS + 4 * rows)


@functools.cache
def attend_kernel(
    rows: int,
    kind: str,
    query_width: int,
    key_codec: Codec,
    key_width: int,
    value_codec: Codec,
    value_width: int,
    transform: Transform,
    change: Any,
) -> Kernel:
    """Queries and results of a precision `kind`; the widths say how many neighbours of a head are read together.

    `change` is what `mods.change_of` returns.
    """
    read_key, read_value = reader(key_codec, key_width), reader(value_codec, value_width)
    load_query, finish = loader(kind, query_width), finisher(rows, value_width, kind, THREADS)
    load_channels = loader("float32", query_width)
    rotate_queries, rotate_sums = (
        rotation_in_shared(size, barrier) for size in (transform.keys, transform.values)
    )
    calibrated, modified = transform.calibrated, change is not None
    of_queries, of_keys, of = vectors(1, query_width), vectors(rows, key_width), vectors(rows, value_width)
    single = vectors(rows, 1)
    itemsize = FORMATS[kind].bits // 8
    size, loaded_size = rows * value_width, TOGETHER * value_width
    most_merged = 2 * MAX_SPLITS
    zero, least, hidden = float32(0), float32(LEAST), float32("-inf")

    def attend(call, work):
        thread = cuda.threadIdx.x
        shared, shared_int = cuda.shared.array(0, float32), cuda.shared.array(0, int32)
        query, key = cuda.local.array(query_width, float32), cuda.local.array(key_width, float32)
        channels, product = cuda.local.array(query_width, float32), cuda.local.array(1, float32)
        values, sums = cuda.local.array(value_width, float32), cuda.local.array(value_width, float32)
        loaded = cuda.local.array(loaded_size, float32)
        scores, totals = cuda.local.array(rows, float32), cuda.local.array(rows, float32)
        weighted = cuda.local.array(size, float32)

        piece = open_piece(work, cuda.blockIdx.x, cuda.blockIdx.y)
        used, begin, end = piece.used, piece.begin, piece.end
        head_dim, value_head_dim = work.head_dim, work.value_head_dim

        origin, shift = int32(0), int32(0)
        if modified:
            sequence = load_int(piece.address + 4 * SEQUENCE)
            if work.offsets != 0:
                origin = load_int(work.offsets + 4 * sequence)
            if work.shifts != 0:
                shift = load_int(work.shifts + 4 * sequence)

        at_scores = rows * max(max(head_dim, value_head_dim), most_merged)
        at_slabs = at_scores + rows * KEYS
        at_factors = at_slabs + 2 * KEYS
        at_tops, at_totals, at_offsets = at_factors + rows, at_factors + 2 * rows, at_factors + 3 * rows
        query_chunks, key_chunks = quotient(head_dim, query_width), quotient(head_dim, key_width)
        chunks = quotient(value_head_dim, value_width)
        shares = quotient(THREADS, chunks)
        share, chunk = quotient(thread, chunks), remainder(thread, chunks)

        of_channels = 4 * piece.kv_head * head_dim
        for r in range(thread // WARP, rows, THREADS // WARP):
            product[0] = zero
            for c in range(thread % WARP, query_chunks, WARP):
                of_queries.clear_all(query)
                if r < used:
                    row = query_of(work, piece, token_of(piece, r), r)
                    load_query(call.q + (row + c * query_width) * itemsize, query)
                    of_queries.scale(query, work.sm_scale)
                if calibrated:
                    load_channels(call.channel_shifts + of_channels + 4 * c * query_width, channels)
                    of_queries.dot_rows(product, channels, 0, 0, query)
                    load_channels(call.channel_scales + of_channels + 4 * c * query_width, channels)
                    of_queries.scale_each(query, channels)
                of_queries.put(shared, r * head_dim + c * query_width, query)
            shared[index(at_offsets + r)] = warp_sum(product[0])
        for i in range(thread, rows * KEYS, THREADS):
            shared[index(at_scores + i)] = zero
        for r in range(thread, rows, THREADS):
            shared[index(at_tops + r)], shared[index(at_factors + r)] = least, zero
        of.clear_all(weighted)
        of.clear(totals)
        barrier()
        rotate_queries(shared, 0, rows * head_dim, thread, THREADS)

        for first_key in range(begin, end, KEYS):
            count = min(KEYS, end - first_key)
            for j in range(thread, KEYS, THREADS):
                number = int32(-1)
                if j < count:
                    number = find_slab(
                        piece.blocks, first_key + j, work.block_size, work.num_kv_heads, piece.kv_head
                    )
                    shared_int[index(at_slabs + j)] = number
                if number >= 0:
                    slab, offset = number * work.slab_bytes, remainder(first_key + j, work.block_size)
                    shared_int[index(at_slabs + KEYS + j)] = offset
                    of.clear(scores)
                    for c in range(key_chunks):
                        read_key(
                            call.keys + slab, call.key_scales + slab, offset, c * key_width, head_dim,
                            work.key_group, key,
                        )  # fmt: skip
                        of_keys.dot_rows(scores, shared, c * key_width, head_dim, key)
                    for r in range(rows):
                        if r < used:
                            score = scores[r] + shared[index(at_offsets + r)]
                            token = token_of(piece, r)
                            distance = piece.position + token - first_key - j
                            if work.soft_cap > zero:
                                score = work.soft_cap * math.tanh(score / work.soft_cap)
                            if call.slopes != 0:
                                slope = load_float(call.slopes + 4 * head_of(piece, token, r))
                                score -= slope * float32(distance)
                            if modified:
                                q_pos = piece.position + token + origin
                                kv_pos = min(q_pos, first_key + j + origin)
                                q_pos -= shift
                                score = change(score, head_of(piece, token, r), q_pos, kv_pos, work.aux)
                            if distance < 0 or (work.window_left >= 0 and distance > work.window_left):
                                score = hidden
                            shared[index(at_scores + r * KEYS + j)] = score
                else:
                    for r in range(used):
                        shared[index(at_scores + r * KEYS + j)] = hidden
            barrier()
            for r in range(thread, used, THREADS):
                top = of.maximum(shared, at_scores + r * KEYS, KEYS, shared[index(at_tops + r)])
                shared[index(at_factors + r)] = math.exp(shared[index(at_tops + r)] - top)
                shared[index(at_tops + r)] = top
            barrier()
            for r in range(used):
                run = at_scores + r * KEYS
                of.exponentiate(shared, run + thread, run + KEYS, THREADS, shared[index(at_tops + r)])
            barrier()
            if share < shares:
                of.scale_rows(weighted, shared, at_factors)
                single.scale_rows(totals, shared, at_factors)
                for j in range(share, count, shares):
                    number = int64(shared_int[index(at_slabs + j)])
                    if number >= 0:
                        slab, offset = number * work.slab_bytes, int64(shared_int[index(at_slabs + KEYS + j)])
                        read_value(
                            call.values + slab, call.value_scales + slab, offset, chunk * value_width,
                            value_head_dim, work.value_group, values,
                        )  # fmt: skip
                        of.outer_rows(weighted, shared, at_scores + j, KEYS, values)
                        if chunk == 0:
                            of.add_rows(totals, shared, at_scores + j, KEYS)
            barrier()

        for s in range(shares):
            if share == s:
                for r in range(rows):
                    if r < used:
                        for e in range(value_width):
                            at = r * value_head_dim + chunk * value_width + e
                            before = shared[index(at)] if s > 0 else zero
                            shared[index(at)] = before + weighted[r * value_width + e]
                        if chunk == 0:
                            before = shared[index(at_totals + r)] if s > 0 else zero
                            shared[index(at_totals + r)] = before + totals[r]
            barrier()
        rotate_sums(shared, 0, rows * value_head_dim, thread, THREADS)
        finish(call, work, piece, thread, shared, 1, at_tops, at_totals, sums, loaded)

    return Kernel(attend, (AttendAddresses, AttendShape))
