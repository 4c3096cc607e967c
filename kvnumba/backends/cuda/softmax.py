"""The online softmax of a warp over tiles of keys, for kernels with matrix instructions.

A lane has the scores of rows g (and g + 8, where there are two halves) against four tokens of each tile: number
``4 * (u * halves + half) + i`` is tile u's token 2c, 2c + 1, 2c + 8 or 2c + 9 (`fragments.py`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba import float32, int32, int64

from kvnumba.backends.cuda import hardware as hw
from kvnumba.backends.cuda.codecs import Codec
from kvnumba.backends.cuda.fragments import (
    ALL,
    LOG2_E,
    inverse,
    max_of_quad,
    power_of_two,
    query_loader,
    value_functions,
    words_of_tile,
)
from kvnumba.backends.cuda.intrinsics import load_float
from kvnumba.backends.cuda.jit import cuda, device
from kvnumba.backends.cuda.plan import TILE
from kvnumba.backends.cuda.rows import head_of, query_of, token_of
from kvnumba.backends.cuda.transforms import Transform


class Sight(NamedTuple):
    """Which keys a warp's rows see: those from `begin` on and before `end`, as their positions and the window allow.

    Attributes
    ----------
    begin, end : int
    low, high : int
        Positions of its first and its last token.
    window_left : int
        -1: no window.
    """

    begin: int
    end: int
    low: int
    high: int
    window_left: int


@functools.cache
def row_opener(
    kind: str, codec: Codec, head_dim: int, halves: int, extras: bool, transform: Transform
) -> Any:
    """``open_rows(...)``: the queries of a lane's rows ``first_row + g`` (and + 8), and what scores of theirs need.

    `query` becomes A fragments; `totals`, `last`, `factors`, `offsets` and `slopes` as `online_softmax` says, one for
    each half.
    A row too many repeats the last; an empty piece has one to repeat, which nobody asks for.
    """
    load_query = query_loader(kind, codec, head_dim, transform)
    steps = head_dim // 16
    zero, log2_e = float32(0), float32(LOG2_E)

    def opener(half: int) -> Any:  # a function for each, so that arrays are indexed by constants
        @device
        def open_half(
            call, work, piece, first_row, g, c, query, words, totals, last, factors, offsets, slopes
        ):
            channels = int64(4 * piece.kv_head * head_dim)
            row = int32(max(min(first_row + 8 * half + g, piece.used - 1), 0))
            token = token_of(piece, row)
            last[half] = piece.position + token
            scale, totals[half], offset = load_query(
                call.q + 2 * query_of(work, piece, token, row), call.channel_shifts + channels,
                call.channel_scales + channels, c, words,
            )  # fmt: skip
            for i in range(steps):
                query[2 * halves * i + half] = words[2 * i]
                query[2 * halves * i + halves + half] = words[2 * i + 1]
            factors[half], offsets[half] = work.sm_scale * scale, work.sm_scale * offset
            slopes[half] = zero
            if extras:
                if call.slopes != 0:
                    slopes[half] = load_float(call.slopes + 4 * int64(head_of(piece, token, row)))
            else:
                factors[half] *= log2_e
                offsets[half] *= log2_e

        return open_half

    open_first, open_second = opener(0), opener(1)

    @device
    def open_rows(call, work, piece, first_row, g, c, query, words, totals, last, factors, offsets, slopes):
        open_first(call, work, piece, first_row, g, c, query, words, totals, last, factors, offsets, slopes)
        if halves == 2:
            open_second(
                call, work, piece, first_row, g, c, query, words, totals, last, factors, offsets, slopes
            )

    return open_rows


@functools.cache
def online_softmax(codec: Codec, head_dim: int, count: int, halves: int, extras: bool) -> Any:
    """``step(...)``: make weights of the scores of so many tiles of keys, and weigh the tiles' values with them.

    Arrays with one element for each of the lane's rows: `last`, the position of the row's token; `factors` of its
    scores, and `offsets`, which are added to them; `slopes`; and the state of its softmax: `tops`, the maximum score,
    `totals`, the sum of weights, `zeros`, the weighted sum of zeros. `units` are the largest scale so far, the power
    of two by which weights are divided to stay within float16's range once they are multiplied by scales, and the
    inverse of that power. `missing` has a bit for each tile, set where its block is not there.
    """
    has_scale = codec.fmt.has_scale
    values = value_functions(codec, head_dim, halves)
    forget, weigh, pack, scale_of, zero_of = (
        values.forget, values.weigh, values.pack, values.scale, values.zero,
    )  # fmt: skip
    tile_words, tile_scales = words_of_tile(codec, head_dim)
    tiles = head_dim // 16
    num_scores, num_sums = 4 * count * halves, 4 * tiles * halves
    per_tile = 4 * halves
    zero, one, hidden = float32(0), float32(1), float32("-inf")
    log2_e = float32(LOG2_E)

    @device
    def step(
        scores,
        packed,
        words,
        scales,
        first_key,
        missing,
        c,
        sight,
        soft_cap,
        last,
        factors,
        offsets,
        slopes,
        tops,
        totals,
        zeros,
        units,
        sums,
    ):
        surely_from, never_before = sight.begin, sight.begin
        if sight.window_left >= 0:
            surely_from = max(surely_from, sight.high - sight.window_left)
            never_before = max(never_before, sight.low - sight.window_left)
        edge = first_key + count * TILE > min(sight.end, sight.low + 1) or first_key < surely_from
        edge = edge or missing != 0
        for i in range(num_scores):
            half = i // 4 % halves
            scores[i] = scores[i] * factors[half] + offsets[half]
            if extras:
                key = first_key + i // per_tile * TILE + i // 2 % 2 * 8 + i % 2 + 2 * c
                score = scores[i]
                if soft_cap > zero:
                    score = soft_cap - soft_cap * (one + one) / (
                        one + hw.exp2(score * (log2_e + log2_e) / soft_cap)
                    )
                scores[i] = (score + slopes[half] * float32(key - last[half])) * log2_e
        if edge:
            for i in range(num_scores):
                half = i // 4 % halves
                key = first_key + i // per_tile * TILE + i // 2 % 2 * 8 + i % 2 + 2 * c
                lowest = sight.begin
                if sight.window_left >= 0:
                    lowest = max(lowest, last[half] - sight.window_left)
                out_of_sight = key > last[half] or key < lowest or key >= sight.end
                if out_of_sight or missing >> (i // per_tile) & 1:
                    scores[i] = hidden
            for t in range(4 * count):
                key = first_key + t // 4 * TILE + t // 2 % 2 * 8 + t % 2 + 2 * c
                if key >= sight.end or key < never_before or missing >> (t // 4) & 1:
                    forget(words, t // 4 * tile_words, scales, t // 4 * tile_scales, t % 4)

        for half in range(halves):
            highest = scores[4 * half]
            for i in range(1, 4 * count):
                highest = max(highest, scores[i // 4 * per_tile + 4 * half + i % 4])
            highest = max_of_quad(highest)
            if cuda.any_sync(ALL, highest > tops[half]):
                now = max(tops[half], highest)
                rescale = hw.exp2(tops[half] - now)
                tops[half] = now
                totals[half] *= rescale
                zeros[half] *= rescale
                r0, r1 = cuda.shfl_sync(ALL, rescale, c * 8), cuda.shfl_sync(ALL, rescale, c * 8 + 4)
                for j in range(tiles):
                    s = 4 * (half * tiles + j)
                    sums[s] *= r0
                    sums[s + 1] *= r1
                    sums[s + 2] *= r0
                    sums[s + 3] *= r1
        if has_scale:
            here = zero
            for t in range(4 * count):
                here = max(here, scale_of(scales, t // 4 * tile_scales, t % 4))
            here = max_of_quad(here)
            if here > units[0]:
                power = power_of_two(here)
                change = units[1] * inverse(power)
                units[0], units[1], units[2] = here, power, inverse(power)
                for j in range(num_sums):
                    sums[j] *= change
        for u in range(count):
            for i in range(per_tile):
                half = i // 4
                weight = hw.exp2(scores[u * per_tile + i] - tops[half])
                totals[half] += weight
                if has_scale:
                    zeros[half] += weight * zero_of(scales, u * tile_scales, i % 4)
                    weight *= scale_of(scales, u * tile_scales, i % 4) * units[2]
                scores[u * per_tile + i] = weight
            for i in range(2 * halves):
                packed[i] = pack(scores[u * per_tile + 2 * i], scores[u * per_tile + 2 * i + 1])
            weigh(words, u * tile_words, packed, sums)

    return step
