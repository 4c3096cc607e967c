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
from kvnumba.backends.cuda.intrinsics import LEAST, barrier, index, quotient, remainder, vectors
from kvnumba.backends.cuda.jit import SIMULATED, THREADS, Kernel, cuda, int64
from kvnumba.backends.cuda.parameters import AttendAddresses, AttendShape
from kvnumba.backends.cuda.plan import MAX_SPLITS, Shape
from kvnumba.backends.cuda.rows import open_piece
from kvnumba.backends.cuda.scores import HIDDEN, of_sequence, query_loader, scorer
from kvnumba.backends.cuda.tables import find_slab
from kvnumba.backends.cuda.transforms import Transform, rotation_in_shared

FEW = Shape("attend", 4, 4, merges=True)
MANY = Shape("attend", 64 if SIMULATED else 16, 2, merges=True)
"""What the kernel is compiled for: decoding, and more rows than that; in the simulator blocks are dear."""

KEYS = 128 if SIMULATED else 64

STAGED = 2048
"""Elements of values that are decoded to shared memory at a time, in formats of the user's own."""


def shared_bytes(rows: int, head_dim: int, value_head_dim: int, staged: bool) -> int:
    """What `attend` cuts up: sums or queries, scores, rows of keys, four numbers a row, and values in float32."""
    used = shared_floats(rows, max(head_dim, value_head_dim), 1) + rows * KEYS + 2 * KEYS + 4 * rows
    return 4 * (used + max(STAGED, value_head_dim) * staged)


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
    finish = finisher(rows, value_width, kind, THREADS)
    load_queries, score_of = query_loader(rows, kind, query_width, transform), scorer(change)
    rotate_sums = rotation_in_shared(transform.values, barrier)
    modified = change is not None
    of_keys, of = vectors(rows, key_width), vectors(rows, value_width)
    single, of_values = vectors(rows, 1), vectors(1, value_width)
    staged = value_codec.fmt.codec is not None
    size, loaded_size = rows * value_width, TOGETHER * value_width
    most_merged = 2 * MAX_SPLITS
    zero, least = float32(0), float32(LEAST)

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
            origin, shift = of_sequence(work.offsets, piece), of_sequence(work.shifts, piece)

        at_scores = rows * max(max(head_dim, value_head_dim), most_merged)
        at_slabs = at_scores + rows * KEYS
        at_factors = at_slabs + 2 * KEYS
        at_tops, at_totals, at_offsets = at_factors + rows, at_factors + 2 * rows, at_factors + 3 * rows
        at_staged = at_offsets + rows
        key_chunks, chunks = quotient(head_dim, key_width), quotient(value_head_dim, value_width)
        shares = quotient(THREADS, chunks)
        share, chunk = quotient(thread, chunks), remainder(thread, chunks)

        for i in range(thread, rows * KEYS, THREADS):
            shared[index(at_scores + i)] = zero
        for r in range(thread, rows, THREADS):
            shared[index(at_tops + r)], shared[index(at_factors + r)] = least, zero
        of.clear_all(weighted)
        of.clear(totals)
        load_queries(call, work, piece, thread, 0, shared, at_offsets, query, channels, product)

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
                            score = score_of(call, work, piece, score, r, first_key + j, origin, shift)
                            shared[index(at_scores + r * KEYS + j)] = score
                else:
                    for r in range(used):
                        shared[index(at_scores + r * KEYS + j)] = HIDDEN
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
            at_once = max(int32(1), quotient(STAGED, value_head_dim)) if staged else int32(KEYS)
            for first in range(0, count, at_once):
                last = min(first + at_once, count)
                if staged:
                    groups = quotient(value_head_dim, work.value_group)
                    for i in range(thread, (last - first) * groups, THREADS):
                        j = first + quotient(i, groups)
                        number = int64(shared_int[index(at_slabs + j)])
                        if number >= 0:
                            slab, offset = (
                                number * work.slab_bytes,
                                int64(shared_int[index(at_slabs + KEYS + j)]),
                            )
                            at = at_staged + i * work.value_group
                            read_value(
                                call.values + slab, call.value_scales + slab, offset,
                                remainder(i, groups) * work.value_group, value_head_dim, work.value_group,
                                shared[at : at + work.value_group],
                            )  # fmt: skip
                    barrier()
                if share < shares:
                    for j in range(first + share, last, shares):
                        number = int64(shared_int[index(at_slabs + j)])
                        if number >= 0:
                            if staged:
                                at = at_staged + (j - first) * value_head_dim + chunk * value_width
                                of_values.take(shared, at, values)
                            else:
                                slab = number * work.slab_bytes
                                offset = int64(shared_int[index(at_slabs + KEYS + j)])
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
