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
    fence,
    fresh_loader,
    load_float,
    load_fresh,
    store_float,
    store_int,
    storer,
    vectors,
)
from kvnumba.backends.cuda.jit import THREADS, device
from kvnumba.backends.cuda.plan import MAX_PARTS
from kvnumba.formats import FORMATS

TOGETHER = 8  # partial results that a thread has on their way at a time


def shared_floats(rows: int, head_dim: int) -> int:
    """Of the region that begins with (rows, D) sums: what a merge needs of it."""
    return rows * max(head_dim, 2 * MAX_PARTS)


@functools.cache
def finisher(rows: int, width: int, kind: str) -> Any:
    """``finish(...)`` for up to so many rows, into results of a precision.

    Row r is token ``first_token + r // heads``, query head ``first_head + r % heads``. In shared memory lie, from
    0 on, weighted sums of values (rows, D), at `tops` the rows' maxima, at `totals` their sums. `values` and `sums`
    are arrays of `width`, `loaded` of `TOGETHER` times that.
    """
    store, load, of = storer(kind, width), fresh_loader(width), vectors(1, width)
    store_part = storer("float32", width)
    itemsize = FORMATS[kind].bits // 8
    zero, least = float32(0), float32(LEAST)

    @device
    def finish(
        thread, shared, tops, totals, values, sums, loaded, used, heads, first_token, first_head, part, parts, partial, counter,
        out, lse, out_batch, out_token, out_head, tokens_per_row, head_dim, sinks, partials,
    ):  # fmt: skip
        chunks = head_dim // width
        # a partial result: sums (rows, D), maxima (rows,), sums of weights (rows,)
        size = 4 * rows * (head_dim + 2)
        maxima = 4 * rows * head_dim
        mine = partials + (partial + part) * size
        first = partials + partial * size
        merging = int32(0)
        if parts > 1:
            for i in range(thread, used * chunks, THREADS):
                for e in range(width):
                    values[e] = shared[i * width + e]
                store_part(mine + 4 * i * width, values)
            for r in range(thread, used, THREADS):
                store_float(mine + maxima + 4 * r, shared[tops + r])
                store_float(mine + maxima + 4 * (rows + r), shared[totals + r])
            fence()
            barrier()
            if thread == 0:
                finished = count_up(counter)
                shared[tops] = float32(1) if finished == parts - 1 else zero
            barrier()
            merging = int32(shared[tops])
            barrier()
            if merging == 1:
                fence()
                for i in range(thread, used * parts, THREADS):
                    at = first + i // used * size + maxima + 4 * (i % used)
                    shared[i] = load_fresh(at)
                    shared[rows * MAX_PARTS + i] = load_fresh(at + 4 * rows)
                barrier()
                for r in range(thread, used, THREADS):
                    top = least
                    for p in range(parts):
                        if shared[p * used + r] > top:
                            top = shared[p * used + r]
                    shared[tops + r] = top
                barrier()
                for i in range(thread, used * parts, THREADS):
                    weight = math.exp(shared[i] - shared[tops + i % used])
                    shared[i] = weight
                    shared[rows * MAX_PARTS + i] *= weight
                barrier()
                for r in range(thread, used, THREADS):
                    total = zero
                    for p in range(parts):
                        total += shared[rows * MAX_PARTS + p * used + r]
                    shared[totals + r] = total
                if thread == 0:
                    store_int(counter, 0)  # for the next launch
                barrier()
        if parts == 1 or merging == 1:
            for r in range(thread, used, THREADS):
                token, head = first_token + r // heads, first_head + r % heads
                if sinks != 0:  # one more key, whose value is 0
                    sink = load_float(sinks + 4 * head)
                    top = shared[tops + r]
                    both = sink if sink > top else top
                    factor = math.exp(top - both)
                    shared[totals + r] = shared[totals + r] * factor + math.exp(sink - both)
                    shared[tops + r] = both
                    shared[tops - rows + r] = factor / shared[totals + r]
                else:
                    shared[tops - rows + r] = float32(1) / shared[totals + r]
                if lse != 0:
                    place = token // tokens_per_row * out_batch + token % tokens_per_row * out_token + head * out_head
                    store_float(lse + 4 * (place // head_dim), shared[tops + r] + math.log(shared[totals + r]))
            barrier()
            for i in range(thread, used * chunks, THREADS):
                r, c = i // chunks, i % chunks
                if parts == 1:
                    for e in range(width):
                        sums[e] = shared[i * width + e]
                else:
                    of.clear_all(sums)
                    for p in range(0, parts, TOGETHER):
                        for n in range(TOGETHER):
                            load(first + min(p + n, parts - 1) * size + 4 * i * width, loaded, n * width)
                        for n in range(TOGETHER):
                            if p + n < parts:
                                of.add_scaled(sums, loaded, n * width, shared[(p + n) * used + r])
                of.scale(sums, shared[tops - rows + r])
                token, head = first_token + r // heads, first_head + r % heads
                place = token // tokens_per_row * out_batch + token % tokens_per_row * out_token + head * out_head
                store(out + (place + c * width) * itemsize, sums)

    return finish
