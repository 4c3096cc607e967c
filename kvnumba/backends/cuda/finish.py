"""The end of a piece: its rows become results, or partial results that the last block to finish merges.

They are merged by their maxima and sums, as in Flash-Decoding (Dao et al., 2023), in the launch that makes them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import float32

from kvnumba.backends.cuda.intrinsics import (
    LEAST,
    barrier,
    count_up,
    fresh_loader,
    index,
    load_float,
    load_fresh,
    load_int,
    quotient,
    store_float,
    store_int,
    storer,
    vectors,
    warp_max,
    warp_sum,
)
from kvnumba.backends.cuda.jit import WARP, device, int32
from kvnumba.backends.cuda.plan import FIRST_PARTIAL, ITEM, MAX_SPLITS, NUM_SPLITS, SPLIT
from kvnumba.backends.cuda.rows import head_of, partial_of, result_of, token_of
from kvnumba.backends.cuda.transforms import bits_of, rotation_in_lanes
from kvnumba.formats import FORMATS

TOGETHER = 16  # partial results that a thread has on their way at a time


def shared_floats(rows: int, head_dim: int, copies: int) -> int:
    """How many floats of shared memory, from 0 on, hold the sums (copies, rows, D) and then what a merge needs."""
    return rows * max(copies * head_dim, 2 * MAX_SPLITS)


@functools.cache
def finisher(rows: int, width: int, kind: str, threads: int, rotation: int = 1) -> Any:
    """``finish(...)`` for up to so many rows, by so many threads, into results of a precision.

    `rotation` elements of a row's sums, no more than the lanes of a warp have, are rotated together before they go
    anywhere; 1: they are not.

    In shared memory lie, from 0 on, weighted sums of values (copies, rows, D), to be added up, at `tops` the rows'
    maxima, at `totals` their sums of weights, and before `tops` there is room for a number a row. `sums` is an array
    of `width`, `loaded` of `TOGETHER` times that.
    """
    store, load, of = storer(kind, width), fresh_loader(width), vectors(1, width)
    store_partial = storer("float32", width)
    itemsize = FORMATS[kind].bits // 8
    zero, one, least, nothing = float32(0), float32(1), float32(LEAST), float32("-inf")

    rotated = rotation > 1
    rotate = rotation_in_lanes(width, bits_of(width), bits_of(rotation // width))

    @device
    def add_up(shared, at, copies, stride, sums):
        of.clear_all(sums)
        for n in range(copies):
            of.add_scaled(sums, shared, at + n * stride, one)
        if rotated:
            rotate(sums)

    @device
    def finish(call, work, piece, thread, shared, copies, tops, totals, sums, loaded):
        head_dim, used = work.value_head_dim, piece.used
        chunks = quotient(head_dim, width)
        splits = load_int(piece.address + 4 * NUM_SPLITS)
        first = load_int(piece.address + 4 * FIRST_PARTIAL)
        between = piece.num_tokens * work.num_qo_heads  # partial results, from one split to the next
        step = between * (4 * (head_dim + 4))
        maximum = 4 * head_dim
        merging = int32(0)
        if splits != 1:
            mine = first + load_int(piece.address + 4 * SPLIT) * between
            # threads without a chunk of their own take part in rotations
            for first_chunk in range(0, used * chunks, threads):
                i = min(first_chunk + thread, used * chunks - 1)
                r = quotient(i, chunks)
                token = token_of(piece, r)
                add_up(shared, i * width, copies, rows * head_dim, sums)
                if first_chunk + thread < used * chunks:
                    partial = partial_of(work, mine + token * work.num_qo_heads + head_of(piece, token, r))
                    store_partial(partial + 4 * (i - r * chunks) * width, sums)
            for r in range(thread, used, threads):
                token = token_of(piece, r)
                partial = partial_of(work, mine + token * work.num_qo_heads + head_of(piece, token, r))
                store_float(partial + maximum, shared[index(tops + r)])
                store_float(partial + maximum + 4, shared[index(totals + r)])
        if splits > 1:
            barrier()
            if thread == 0:
                item = load_int(piece.address + 4 * ITEM)
                columns = work.num_kv_heads * quotient(work.group + work.heads - 1, work.heads)
                counter = work.counters + 4 * (item * columns + piece.column)
                last = count_up(counter) == splits - 1
                shared[index(tops)] = one if last else zero
                if last:
                    store_int(counter, 0)  # for the next launch
            barrier()
            merging = int32(shared[index(tops)])
            barrier()
            if merging == 1:
                # these loads take as long as those of the maxima: let both be on their way
                if thread < used * chunks:
                    r = quotient(thread, chunks)
                    token = token_of(piece, r)
                    partial = partial_of(work, first + token * work.num_qo_heads + head_of(piece, token, r))
                    partial += 4 * (thread - r * chunks) * width
                    for n in range(TOGETHER):
                        load(partial + min(n, splits - 1) * step, loaded, n * width)
                lane = thread % WARP
                for r in range(thread // WARP, used, threads // WARP):
                    token = token_of(piece, r)
                    partial = partial_of(work, first + token * work.num_qo_heads + head_of(piece, token, r))
                    top, total = least, zero
                    for p in range(lane, splits, WARP):
                        at = partial + p * step + maximum
                        found = load_fresh(at)
                        shared[index(rows * MAX_SPLITS + p * used + r)] = load_fresh(at + 4)
                        shared[index(p * used + r)] = found
                        top = found if found > top else top
                    top = warp_max(top)
                    for p in range(lane, splits, WARP):
                        weight = math.exp(shared[index(p * used + r)] - top)
                        shared[index(p * used + r)] = weight
                        total += weight * shared[index(rows * MAX_SPLITS + p * used + r)]
                    shared[index(tops + r)], shared[index(totals + r)] = top, warp_sum(total)
                barrier()
        if splits == 1 or merging == 1:
            for r in range(thread, used, threads):
                token = token_of(piece, r)
                top, total = shared[index(tops + r)], shared[index(totals + r)]
                factor = one
                if call.sinks != 0:  # one more key, whose value is 0
                    sink = load_float(call.sinks + 4 * head_of(piece, token, r))
                    both = sink if sink > top else top
                    factor = math.exp(top - both)
                    total = total * factor + math.exp(sink - both)
                    top = both
                shared[index(tops - rows + r)] = factor / total if total != zero else zero
                if call.lse != 0:
                    at = result_of(call, work, piece, token, r) // head_dim
                    store_float(call.lse + 4 * at, top + math.log(total) if total != zero else nothing)
            barrier()
            for first_chunk in range(0, used * chunks, threads):
                i = min(first_chunk + thread, used * chunks - 1)
                r = quotient(i, chunks)
                c = i - r * chunks
                token = token_of(piece, r)
                if splits == 1:
                    add_up(shared, i * width, copies, rows * head_dim, sums)
                else:
                    of.clear_all(sums)
                    partial = partial_of(work, first + token * work.num_qo_heads + head_of(piece, token, r))
                    partial += 4 * c * width
                    for p in range(0, splits, TOGETHER):
                        if p > 0 or first_chunk > 0:
                            for n in range(TOGETHER):
                                load(partial + min(p + n, splits - 1) * step, loaded, n * width)
                        for n in range(TOGETHER):
                            if p + n < splits:
                                of.add_scaled(sums, loaded, n * width, shared[index((p + n) * used + r)])
                of.scale(sums, shared[index(tops - rows + r)])
                if first_chunk + thread < used * chunks:
                    store(call.out + (result_of(call, work, piece, token, r) + c * width) * itemsize, sums)

    return finish
