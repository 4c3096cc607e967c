"""Partial results of several parts into results: a softmax over all keys of all of them."""

from __future__ import annotations

import functools
import math

from numba import float32

from kvnumba.backends.cuda.intrinsics import (
    LEAST,
    load_float,
    load_int,
    loader,
    quotient,
    store_float,
    storer,
    vectors,
    warp_max,
    warp_sum,
)
from kvnumba.backends.cuda.jit import THREADS, WARP, Kernel, cuda
from kvnumba.backends.cuda.parameters import MergeAddresses, MergeShape
from kvnumba.backends.cuda.rows import element_of, partial_of
from kvnumba.formats import FORMATS


@functools.cache
def merge_kernel(kind: str, width: int) -> Kernel:
    """A warp for each token and query head, the next when it is done; results of a precision `kind`."""
    load, store, of = loader("float32", width), storer(kind, width), vectors(1, width)
    itemsize = FORMATS[kind].bits // 8
    zero, one, least, nothing = float32(0), float32(1), float32(LEAST), float32("-inf")

    def merge(call, work):
        thread = cuda.threadIdx.x
        lane = thread % WARP
        values, sums = cuda.local.array(width, float32), cuda.local.array(width, float32)
        head_dim = work.value_head_dim
        first = (cuda.blockIdx.x * THREADS + thread) // WARP
        for item in range(first, work.num_tokens * work.num_qo_heads, cuda.gridDim.x * (THREADS // WARP)):
            token = quotient(item, work.num_qo_heads)
            head = item - token * work.num_qo_heads
            begin, end = load_int(work.starts + 4 * token), load_int(work.starts + 4 * (token + 1))
            top, total = least, zero
            for n in range(begin + lane, end, WARP):
                found = load_float(partial_of(work, load_int(work.rows + 4 * n) + head) + 4 * head_dim)
                top = found if found > top else top
            top = warp_max(top)
            sink = least
            if call.sinks != 0:  # one more key, whose value is 0; once, not once a part
                sink = load_float(call.sinks + 4 * head)
                top = sink if sink > top else top
            for n in range(begin + lane, end, WARP):
                at = partial_of(work, load_int(work.rows + 4 * n) + head) + 4 * head_dim
                total += math.exp(load_float(at) - top) * load_float(at + 4)
            total = warp_sum(total)
            if call.sinks != 0:
                total += math.exp(sink - top)
            factor = one / total if total != zero else zero
            begin_of_row = element_of(
                work.tokens_per_row, call.out_batch, call.out_token, call.out_head, token, head
            )
            if call.lse != 0 and lane == 0:
                store_float(
                    call.lse + 4 * (begin_of_row // head_dim),
                    top + math.log(total) if total != zero else nothing,
                )
            for at in range(lane * width, head_dim, WARP * width):
                of.clear_all(sums)
                for n in range(begin, end):
                    partial = partial_of(work, load_int(work.rows + 4 * n) + head)
                    load(partial + 4 * at, values)
                    of.add_scaled(sums, values, 0, math.exp(load_float(partial + 4 * head_dim) - top))
                of.scale(sums, factor)
                store(call.out + (begin_of_row + at) * itemsize, sums)

    return Kernel(merge, (MergeAddresses, MergeShape))
