"""Attention of a few new tokens with matrix instructions, for queries in float16 or bfloat16.

The warps of a block share the tiles of a piece, and take all its rows, eight at most. While some tiles are computed,
the next ones are on their way from memory, straight into registers; in the end the warps' results are merged.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import float32, int32, int64, uint32

from kvnumba.backends.cuda import hardware as hw
from kvnumba.backends.cuda.codecs import Codec
from kvnumba.backends.cuda.finish import TOGETHER, finisher, shared_floats
from kvnumba.backends.cuda.fragments import (
    ALL,
    find_tile,
    key_functions,
    sum_of_quad,
    value_functions,
    words_of_tile,
)
from kvnumba.backends.cuda.intrinsics import LEAST, barrier, index
from kvnumba.backends.cuda.jit import Kernel, cuda, device
from kvnumba.backends.cuda.parameters import AttendAddresses, AttendShape, StorageAddresses
from kvnumba.backends.cuda.plan import TILE, Shape
from kvnumba.backends.cuda.rows import open_piece
from kvnumba.backends.cuda.softmax import Sight, online_softmax, row_opener
from kvnumba.backends.cuda.transforms import Transform

ROWS = 8
WARPS = 8
TILES = {(16, 64): 2, (16, 128): 1, (8, 64): 2, (8, 128): 2, (4, 64): 4, (4, 128): 3}
"""Bits of the wider of both formats and the larger width -> tiles of a step: as many as the registers hold."""

SHAPE = Shape("decode", ROWS, 1, merges=True)
PARTS = 2  # that one launch serves at most


def shared_bytes(value_head_dim: int) -> int:
    """Sums, the warps' maxima and totals, three numbers a row."""
    return 4 * (shared_floats(ROWS, value_head_dim, WARPS) + 2 * WARPS * ROWS + 3 * ROWS)


@functools.cache
def decode_kernel(
    kind: str,
    codecs: tuple[tuple[Codec, Codec], ...],
    head_dim: int,
    value_head_dim: int,
    extras: bool,
    transform: Transform,
) -> Kernel:
    """Queries and results of a precision `kind`; `extras`: with a soft cap or ALiBi.

    `codecs` are those of the keys and the values of one or two parts. The second one's pieces are those of the blocks
    that come after the first one's, so that both run side by side.
    """
    attend = [
        _attention(kind, keys, values, head_dim, value_head_dim, extras, transform) for keys, values in codecs
    ]
    attend_first, attend_second = attend[0], attend[-1]

    if len(codecs) == 1:

        def decode(call, work):
            attend_first(call, work, int32(cuda.blockIdx.y))

        return Kernel(decode, (AttendAddresses, AttendShape), 32 * WARPS)

    def decode_both(call, storage, work, second_work):
        piece = int32(cuda.blockIdx.y)
        if piece < work.num_pieces:
            attend_first(call, work, piece)
        else:
            second_call = AttendAddresses(
                call.q, call.out, call.out_batch, call.out_token, call.out_head, call.lse, call.sinks, call.slopes,
                storage.keys, storage.key_scales, storage.values, storage.value_scales, storage.channel_shifts,
                storage.channel_scales,
            )  # fmt: skip
            attend_second(second_call, second_work, piece - work.num_pieces)

    parameters = (AttendAddresses, StorageAddresses, AttendShape, AttendShape)
    return Kernel(decode_both, parameters, 32 * WARPS)


def _attention(
    kind: str,
    key_codec: Codec,
    value_codec: Codec,
    head_dim: int,
    value_head_dim: int,
    extras: bool,
    transform: Transform,
) -> Any:
    """``attend(call, work, number)``: what a block does for a piece."""
    bits, width = max(key_codec.fmt.bits, value_codec.fmt.bits), max(head_dim, value_head_dim)
    count = TILES[bits, width]
    keys, values = key_functions(key_codec, head_dim, 1), value_functions(value_codec, value_head_dim, 1)
    open_rows = row_opener(kind, key_codec, head_dim, 1, extras, transform)
    step = online_softmax(value_codec, value_head_dim, count, 1, extras)
    finish = finisher(ROWS, 4, kind, 32 * WARPS, transform.values)
    (key_words, key_scales), (value_words, value_scales) = (
        words_of_tile(key_codec, head_dim),
        words_of_tile(value_codec, value_head_dim),
    )
    all_key_words, all_value_words = count * key_words, count * value_words
    all_key_scales, all_value_scales = count * key_scales, count * value_scales
    num_scores, num_sums, query_words, columns = (
        4 * count,
        value_head_dim // 4,
        head_dim // 8,
        value_head_dim // 16,
    )
    element, result = values.element, values.result
    every = (1 << count) - 1
    zero, one, least, ln_2 = float32(0), float32(1), float32(LEAST), float32(math.log(2))
    loaded_size, sums_size = 4 * TOGETHER, shared_floats(ROWS, value_head_dim, WARPS)

    @device
    def next_step(work, piece, turn, warp, end_tile, slabs, firsts):
        """A warp's next step with a block that is there: its turn, its first tile, and which of its tiles are missing.

        In each turn the warps take as many neighbouring steps, rotated, so that blocks in turn are shared by all
        warps. A tile that is missing leaves the place of the one before it, which is read again and not seen.
        """
        tile, missing = int32(0), int32(every)
        turn -= 1
        while missing == every and tile < end_tile:
            turn += 1
            tile = (piece.begin >> 4) + (turn * WARPS + ((warp + turn) & (WARPS - 1))) * count
            missing = int32(0)
            for u in range(count):
                slab, first = find_tile(
                    piece.blocks, min(tile + u, end_tile - 1), work.block_size, work.num_kv_heads, piece.kv_head,
                    work.slab_bytes,
                )  # fmt: skip
                if slab < 0:
                    missing |= 1 << u
                else:
                    slabs[u], firsts[u] = slab, first
        return turn, tile, missing

    @device
    def attend(call, work, number):
        kw, vw = cuda.local.array(all_key_words, uint32), cuda.local.array(all_value_words, uint32)
        ks, vs = cuda.local.array(all_key_scales, uint32), cuda.local.array(all_value_scales, uint32)
        query, read = cuda.local.array(query_words, uint32), cuda.local.array(query_words, uint32)
        scores, sums = cuda.local.array(num_scores, float32), cuda.local.array(num_sums, float32)
        packed, last = cuda.local.array(2, uint32), cuda.local.array(1, int32)
        factors, offsets = cuda.local.array(1, float32), cuda.local.array(1, float32)
        slopes = cuda.local.array(1, float32)
        query_totals, units = cuda.local.array(1, float32), cuda.local.array(3, float32)
        tops, totals = cuda.local.array(1, float32), cuda.local.array(1, float32)
        zeros = cuda.local.array(1, float32)
        slabs, firsts = cuda.local.array(count, int64), cuda.local.array(count, int32)
        four, loaded = cuda.local.array(4, float32), cuda.local.array(loaded_size, float32)
        shared = cuda.shared.array(0, float32)

        thread = int32(cuda.threadIdx.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        g, c = lane >> int32(2), lane & int32(3)
        piece = open_piece(work, number, cuda.blockIdx.x)
        tile, end_tile = (piece.begin >> 4) + warp * count, (piece.end + TILE - 1) >> 4
        turn, missing = int32(0), int32(0)
        for u in range(count):
            slabs[u], firsts[u] = int64(0), int32(0)
        if tile < end_tile:
            turn, tile, missing = next_step(work, piece, turn, warp, end_tile, slabs, firsts)
            for u in range(count):
                keys.fetch(
                    call.keys + slabs[u], call.key_scales + slabs[u], firsts[u], g, c, kw, u * key_words, ks,
                    u * key_scales,
                )  # fmt: skip
            for u in range(count):
                values.fetch(
                    call.values + slabs[u], call.value_scales + slabs[u], firsts[u], g, c, vw, u * value_words, vs,
                    u * value_scales,
                )  # fmt: skip

        open_rows(call, work, piece, 0, g, c, query, read, query_totals, last, factors, offsets, slopes)
        sight = Sight(
            piece.begin, piece.end, piece.position, piece.position + piece.num_tokens - 1, work.window_left
        )
        for i in range(num_sums):
            sums[i] = zero
        tops[0], totals[0], zeros[0] = least, zero, zero
        units[0], units[1], units[2] = zero, one, one

        while tile < end_tile:
            for u in range(count):
                keys.score(query, query_totals, kw, u * key_words, ks, u * key_scales, scores, 4 * u)
            turn, following, missing_there = next_step(work, piece, turn + 1, warp, end_tile, slabs, firsts)
            for u in range(count):
                keys.fetch(
                    call.keys + slabs[u], call.key_scales + slabs[u], firsts[u], g, c, kw, u * key_words, ks,
                    u * key_scales,
                )  # fmt: skip
            step(
                scores, packed, vw, vs, tile * TILE, missing, c, sight, work.soft_cap, last, factors, offsets, slopes,
                tops, totals, zeros, units, sums,
            )  # fmt: skip
            for u in range(count):
                values.fetch(
                    call.values + slabs[u], call.value_scales + slabs[u], firsts[u], g, c, vw, u * value_words, vs,
                    u * value_scales,
                )  # fmt: skip
            tile, missing = following, missing_there

        at_warps = sums_size
        at_factors = at_warps + 2 * WARPS * ROWS
        at_tops, at_totals = at_factors + ROWS, at_factors + 2 * ROWS
        total, top = sum_of_quad(totals[0]), tops[0]
        added = sum_of_quad(zeros[0])
        if c == 0:
            shared[index(at_warps + warp * ROWS + g)] = top
            shared[index(at_warps + (WARPS + warp) * ROWS + g)] = total
        barrier()
        if thread < ROWS:
            highest = least
            for w in range(WARPS):
                highest = max(highest, shared[index(at_warps + w * ROWS + thread)])
            total = zero
            for w in range(WARPS):
                share = hw.exp2(shared[index(at_warps + w * ROWS + thread)] - highest)
                total += share * shared[index(at_warps + (WARPS + w) * ROWS + thread)]
            shared[index(at_tops + thread)], shared[index(at_totals + thread)] = highest * ln_2, total
        for n in range(2):
            r = 2 * c + n
            highest = least
            for w in range(WARPS):
                highest = max(highest, shared[index(at_warps + w * ROWS + r)])
            share = hw.exp2(shared[index(at_warps + warp * ROWS + r)] - highest)
            added_here = cuda.shfl_sync(ALL, added, c * 8 + 4 * n)
            if r < piece.used:
                for j in range(columns):
                    for second in range(2):
                        value = result(sums, 4 * j, second, n, units[1], added_here)
                        at = (warp * ROWS + r) * value_head_dim + element(j, g, second)
                        shared[index(at)] = value * share
        barrier()
        finish(call, work, piece, thread, shared, WARPS, at_tops, at_totals, four, loaded)

    return attend
