"""Scores in float32 as `attend.py` and `mass.py` make them: queries in shared memory, and what follows a product."""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import float32

from kvnumba.backends.cuda.intrinsics import (
    barrier,
    index,
    load_float,
    load_int,
    loader,
    quotient,
    vectors,
    warp_sum,
)
from kvnumba.backends.cuda.jit import THREADS, WARP, device, int32
from kvnumba.backends.cuda.plan import SEQUENCE
from kvnumba.backends.cuda.rows import head_of, query_of, token_of
from kvnumba.backends.cuda.transforms import Transform, rotation_in_shared
from kvnumba.formats import FORMATS

HIDDEN = float32("-inf")
"""The score of a key that a token does not see."""


@functools.cache
def query_loader(rows: int, kind: str, width: int, transform: Transform) -> Any:
    """``load(call, work, piece, thread, first, shared, offsets, query, channels, product)``: `rows` queries of a piece.

    Those of its rows from `first` on, in a precision `kind`, are scaled and transformed into shared memory from 0 on,
    zeros where there are none; at `offsets` goes what is to be added to the products of each. The block's threads call
    it together, and have waited for each other when it returns. The last three are arrays of `width`, `width` and 1.
    """
    load_query, load_channels = loader(kind, width), loader("float32", width)
    rotate = rotation_in_shared(transform.keys, barrier)
    of, calibrated, itemsize = vectors(1, width), transform.calibrated, FORMATS[kind].bits // 8
    zero = float32(0)

    @device
    def load(call, work, piece, thread, first, shared, offsets, query, channels, product):
        head_dim = work.head_dim
        chunks = quotient(head_dim, width)
        of_channels = 4 * piece.kv_head * head_dim
        for r in range(thread // WARP, rows, THREADS // WARP):
            product[0] = zero
            for c in range(thread % WARP, chunks, WARP):
                of.clear_all(query)
                if first + r < piece.used:
                    row = query_of(work, piece, token_of(piece, first + r), first + r)
                    load_query(call.q + (row + c * width) * itemsize, query)
                    of.scale(query, work.sm_scale)
                if calibrated:
                    load_channels(call.channel_shifts + of_channels + 4 * c * width, channels)
                    of.dot_rows(product, channels, 0, 0, query)
                    load_channels(call.channel_scales + of_channels + 4 * c * width, channels)
                    of.scale_each(query, channels)
                of.put(shared, r * head_dim + c * width, query)
            shared[index(offsets + r)] = warp_sum(product[0])
        barrier()
        rotate(shared, 0, rows * head_dim, thread, THREADS)

    return load


@device
def of_sequence(numbers, piece):
    """The number of a piece's sequence in a vector of int32; 0 where there is none."""
    if numbers == 0:
        return int32(0)
    return load_int(numbers + 4 * load_int(piece.address + 4 * SEQUENCE))


@functools.cache
def scorer(change: Any) -> Any:
    """``score(call, work, piece, product, row, key, origin, shift)``: from the product of a query and a key, its score.

    `change` is what `mods.change_of` returns. `origin` and `shift` are the numbers of the piece's sequence in
    `work.offsets` and `work.shifts`; where nothing changes scores they are not looked at.
    """
    modified = change is not None
    zero = float32(0)

    @device
    def score_of(call, work, piece, product, row, key, origin, shift):
        score = product
        token = token_of(piece, row)
        distance = piece.position + token - key
        if work.soft_cap > zero:
            score = work.soft_cap * math.tanh(score / work.soft_cap)
        if call.slopes != 0:
            slope = load_float(call.slopes + 4 * head_of(piece, token, row))
            score -= slope * float32(distance)
        if modified:
            q_pos = piece.position + token + origin
            kv_pos = min(q_pos, key + origin)
            score = change(score, head_of(piece, token, row), q_pos - shift, kv_pos, work.aux)
        if distance < 0 or (work.window_left >= 0 and distance > work.window_left):
            score = HIDDEN
        return score

    return score_of
