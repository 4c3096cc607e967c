"""The end of a piece: its rows become results, or parts of results that the last block to finish merges.

Parts are merged by their maxima and sums, as in Flash-Decoding (Dao et al., 2023), in the launch that makes them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import float32, int32

from kvnumba.backends.cuda.intrinsics import (
    LEAST,
    barrier,
    count_up,
    fresh_loader,
    index,
    load_float,
    load_fresh,
    quotient,
    store_float,
    store_int,
    storer,
    vectors,
    warp_max,
    warp_sum,
)
from kvnumba.backends.cuda.jit import WARP, device
from kvnumba.backends.cuda.plan import MAX_PARTS
from kvnumba.formats import FORMATS

TOGETHER = 16  # partial results that a thread has on their way at a time


def shared_floats(rows: int, head_dim: int, copies: int) -> int:
    """Of the region that begins with the sums (copies, rows, D): what a merge needs of it."""
    return rows * max(copies * head_dim, 2 * MAX_PARTS)


@functools.cache
def finisher(rows: int, width: int, kind: str, threads: int) -> Any:
    """``finish(...)`` for up to so many rows, by so many threads, into results of a precision.

    Row r is token ``first_token + r // heads``, query head ``first_head + r % heads``. In shared memory lie, from
    0 on, weighted sums of values (copies, rows, D), to be added up, at `tops` the rows' maxima, at `totals` their
    sums of weights, and before `tops` there is room for a number a row. `sums` is an array of `width`, `loaded` of
    `TOGETHER` times that.
    """
    store, load, of = storer(kind, width), fresh_loader(width), vectors(1, width)
    store_part = storer("float32", width)
    itemsize = FORMATS[kind].bits // 8
    zero, one, least = float32(0), float32(1), float32(LEAST)

    @device
    def add_up(shared, at, copies, stride, sums):
        of.clear_all(sums)
        for n in range(copies):
            of.add_scaled(sums, shared, at + n * stride, one)

    @device
    def finish(
        thread, shared, copies, tops, totals, sums, loaded, used, heads, first_token, first_head, part, parts, partial,
        counter, out, lse, out_batch, out_token, out_head, tokens_per_row, head_dim, sinks, partials,
    ):  # fmt: skip
        chunks = head_dim // width
        # a partial result: sums (rows, D), maxima (rows,), sums of weights (rows,)
        size = 4 * rows * (head_dim + 2)
        maxima = 4 * rows * head_dim
        mine = partials + (partial + part) * size
        first = partials + partial * size
        merging = int32(0)
        if parts > 1:
            for i in range(thread, used * chunks, threads):
                add_up(shared, i * width, copies, rows * head_dim, sums)
                store_part(mine + 4 * i * width, sums)
            for r in range(thread, used, threads):
                store_float(mine + maxima + 4 * r, shared[index(tops + r)])
                store_float(mine + maxima + 4 * (rows + r), shared[index(totals + r)])
            barrier()
            if thread == 0:
                last = count_up(counter) == parts - 1
                shared[index(tops)] = one if last else zero
                if last:
                    store_int(counter, 0)  # for the next launch
            barrier()
            merging = int32(shared[index(tops)])
            barrier()
            if merging == 1:
                # these loads take as long as those of the maxima: let both be on their way
                if thread < used * chunks:
                    for n in range(TOGETHER):
                        load(first + min(n, parts - 1) * size + 4 * thread * width, loaded, n * width)
                lane = thread % WARP
                for r in range(thread // WARP, used, threads // WARP):
                    top, total = least, zero
                    for p in range(lane, parts, WARP):
                        at = first + p * size + maxima + 4 * r
                        found = load_fresh(at)
                        shared[index(rows * MAX_PARTS + p * used + r)] = load_fresh(at + 4 * rows)
                        shared[index(p * used + r)] = found
                        top = found if found > top else top
                    top = warp_max(top)
                    for p in range(lane, parts, WARP):
                        weight = math.exp(shared[index(p * used + r)] - top)
                        shared[index(p * used + r)] = weight
                        total += weight * shared[index(rows * MAX_PARTS + p * used + r)]
                    shared[index(tops + r)], shared[index(totals + r)] = top, warp_sum(total)
                barrier()
        if parts == 1 or merging == 1:
            # all tokens of a piece lie in one row of the batch
            row = quotient(first_token, tokens_per_row)
            place = row * out_batch + (first_token - row * tokens_per_row) * out_token + first_head * out_head
            for r in range(thread, used, threads):
                token = quotient(r, heads)
                head = r - token * heads
                if sinks != 0:  # one more key, whose value is 0
                    sink = load_float(sinks + 4 * (first_head + head))
                    top = shared[index(tops + r)]
                    both = sink if sink > top else top
                    factor = math.exp(top - both)
                    shared[index(totals + r)] = shared[index(totals + r)] * factor + math.exp(sink - both)
                    shared[index(tops + r)] = both
                    shared[index(tops - rows + r)] = factor / shared[index(totals + r)]
                else:
                    shared[index(tops - rows + r)] = one / shared[index(totals + r)]
                if lse != 0:
                    at = (place + token * out_token + head * out_head) // head_dim
                    store_float(lse + 4 * at, shared[index(tops + r)] + math.log(shared[index(totals + r)]))
            barrier()
            for i in range(thread, used * chunks, threads):
                r = quotient(i, chunks)
                c = i - r * chunks
                if parts == 1:
                    add_up(shared, i * width, copies, rows * head_dim, sums)
                else:
                    of.clear_all(sums)
                    for p in range(0, parts, TOGETHER):
                        if p > 0 or i > thread:
                            for n in range(TOGETHER):
                                load(first + min(p + n, parts - 1) * size + 4 * i * width, loaded, n * width)
                        for n in range(TOGETHER):
                            if p + n < parts:
                                of.add_scaled(sums, loaded, n * width, shared[index((p + n) * used + r)])
                of.scale(sums, shared[index(tops - rows + r)])
                token = quotient(r, heads)
                store(
                    out + (place + token * out_token + (r - token * heads) * out_head + c * width) * itemsize,
                    sums,
                )

    return finish
