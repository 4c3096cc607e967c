"""Attention of many new tokens with matrix instructions, for queries in float16 or bfloat16.

As `decode`, but each warp takes 16 rows of its own and all tiles that they see: the halves of a matrix instruction
that decoding leaves empty are rows g + 8, and the warps of a block, which read the same tiles at about the same
time, find them in the L1.
"""

from __future__ import annotations

import functools
import math

from numba import float32, int32, int64, uint32

from kvnumba.backends.cuda import hardware as hw
from kvnumba.backends.cuda.codecs import Codec
from kvnumba.backends.cuda.fragments import (
    ALL,
    LOG2_E,
    key_functions,
    next_tile,
    sum_of_quad,
    value_functions,
    words_of_tile,
)
from kvnumba.backends.cuda.intrinsics import LEAST, load_float, load_int, store_float, storer
from kvnumba.backends.cuda.jit import Kernel, cuda
from kvnumba.backends.cuda.parameters import AttendAddresses, AttendShape
from kvnumba.backends.cuda.plan import FIRST_PARTIAL, NUM_SPLITS, SPLIT, TILE, Shape
from kvnumba.backends.cuda.rows import head_of, open_piece, partial_of, result_of, token_of
from kvnumba.backends.cuda.softmax import Sight, online_softmax, row_opener
from kvnumba.backends.cuda.transforms import Transform, bits_of, rotation_in_lanes

WARPS = 4
SHAPE = Shape("prefill", 16 * WARPS, 2, merges=False)


@functools.cache
def prefill_kernel(
    kind: str,
    key_codec: Codec,
    value_codec: Codec,
    head_dim: int,
    value_head_dim: int,
    extras: bool,
    transform: Transform,
) -> Kernel:
    """Queries and results of a precision `kind`; `extras`: with a soft cap or ALiBi."""
    keys, values = key_functions(key_codec, head_dim, 2), value_functions(value_codec, value_head_dim, 2)
    open_rows = row_opener(kind, key_codec, head_dim, 2, extras, transform)
    step = online_softmax(value_codec, value_head_dim, 1, 2, extras)
    store, store_partial = storer(kind, 4), storer("float32", 4)
    (key_words, key_scales), (value_words, value_scales) = (
        words_of_tile(key_codec, head_dim),
        words_of_tile(value_codec, value_head_dim),
    )
    query_words, columns, part = head_dim // 8, value_head_dim // 16, value_head_dim // 8
    both_words, num_sums = 2 * query_words, 8 * columns
    rotated = transform.values > 1
    rotate = rotation_in_lanes(num_sums, bits_of(num_sums // 2, 2), (4, 8, 16))
    find, element, result = values.find, values.element, values.result
    zero, one, least, nothing = float32(0), float32(1), float32(LEAST), float32("-inf")
    log2_e, ln_2 = float32(LOG2_E), float32(math.log(2))

    def prefill(call, work):
        kw, vw = cuda.local.array(key_words, uint32), cuda.local.array(value_words, uint32)
        ks, vs = cuda.local.array(key_scales, uint32), cuda.local.array(value_scales, uint32)
        query, read = cuda.local.array(both_words, uint32), cuda.local.array(query_words, uint32)
        query_totals, packed = cuda.local.array(2, float32), cuda.local.array(4, uint32)
        scores, sums = cuda.local.array(8, float32), cuda.local.array(num_sums, float32)
        tops, totals = cuda.local.array(2, float32), cuda.local.array(2, float32)
        zeros, units = cuda.local.array(2, float32), cuda.local.array(3, float32)
        factors, offsets = cuda.local.array(2, float32), cuda.local.array(2, float32)
        slopes, last = cuda.local.array(2, float32), cuda.local.array(2, int32)
        four = cuda.local.array(4, float32)

        thread = int32(cuda.threadIdx.x)
        lane, first_row = thread & int32(31), (thread >> int32(5)) * 16
        g, c = lane >> int32(2), lane & int32(3)
        # the pieces that see most begin first
        piece = open_piece(work, cuda.gridDim.x - 1 - cuda.blockIdx.x, cuda.blockIdx.y)
        if first_row < piece.used:
            open_rows(
                call, work, piece, first_row, g, c, query, read, query_totals, last, factors, offsets, slopes
            )
            low = piece.position + token_of(piece, first_row)  # the warp's first token, and its last
            high = piece.position + token_of(piece, min(first_row + 15, piece.used - 1))
            end, begin = min(piece.end, high + 1), piece.begin
            if work.window_left >= 0:
                begin = max(begin, low - work.window_left) & -TILE
            sight = Sight(piece.begin, end, low, high, work.window_left)
            for half in range(2):
                tops[half], totals[half], zeros[half] = least, zero, zero
            for i in range(num_sums):
                sums[i] = zero
            units[0], units[1], units[2] = zero, one, one

            tile, end_tile = begin >> 4, (end + TILE - 1) >> 4
            if tile < end_tile:
                tile, slab, offset = next_tile(
                    piece.blocks, tile, end_tile, work.block_size, work.num_kv_heads, piece.kv_head,
                    work.slab_bytes,
                )  # fmt: skip
                keys.fetch(call.keys + slab, call.key_scales + slab, offset, g, c, kw, 0, ks, 0)
                while tile < end_tile:
                    values.fetch(call.values + slab, call.value_scales + slab, offset, g, c, vw, 0, vs, 0)
                    keys.score(query, query_totals, kw, 0, ks, 0, scores, 0)
                    following, slab, offset = next_tile(
                        piece.blocks, tile + 1, end_tile, work.block_size, work.num_kv_heads, piece.kv_head,
                        work.slab_bytes,
                    )  # fmt: skip
                    keys.fetch(call.keys + slab, call.key_scales + slab, offset, g, c, kw, 0, ks, 0)
                    step(
                        scores, packed, vw, vs, tile * TILE, int32(0), c, sight, work.soft_cap, last, factors,
                        offsets, slopes, tops, totals, zeros, units, sums,
                    )  # fmt: skip
                    tile = following

            results = load_int(piece.address + 4 * NUM_SPLITS) != 0  # else partial results, which are merged
            first = load_int(piece.address + 4 * FIRST_PARTIAL)
            first += load_int(piece.address + 4 * SPLIT) * piece.num_tokens * work.num_qo_heads
            # the sums become values, of two of them the one with the lower element first, as rotations take them
            _, low_second = find(0)
            for half in range(2):
                added = sum_of_quad(zeros[half])
                for n in range(2):
                    added_here = cuda.shfl_sync(ALL, added, c * 8 + 4 * n)
                    for j in range(columns):
                        s = 4 * (half * columns + j)
                        low_value = result(sums, s, low_second, n, units[1], added_here)
                        high_value = result(sums, s, 1 - low_second, n, units[1], added_here)
                        sums[s + n], sums[s + 2 + n] = low_value, high_value
            if rotated:
                rotate(sums)
            for half in range(2):
                total, top = sum_of_quad(totals[half]), tops[half]
                row = int32(min(first_row + 8 * half + g, piece.used - 1))
                token = token_of(piece, row)
                head = head_of(piece, token, row)
                mine = c == 0 and first_row + 8 * half + g < piece.used
                factor = one
                if results:
                    begin_of_row = int64(result_of(call, work, piece, token, row))
                    if call.sinks != 0:  # one more key, whose value is 0
                        sink = load_float(call.sinks + 4 * int64(head)) * log2_e
                        both = max(top, sink)
                        factor = hw.exp2(top - both)
                        total = total * factor + hw.exp2(sink - both)
                        top = both
                    if call.lse != 0 and mine:
                        lse = top * ln_2 + math.log(total) if total != zero else nothing
                        store_float(call.lse + 4 * (begin_of_row // value_head_dim), lse)
                    factor = factor / total if total != zero else zero
                else:
                    begin_of_row = partial_of(work, first + token * work.num_qo_heads + head)
                    if mine:
                        store_float(begin_of_row + 4 * value_head_dim, top * ln_2)
                        store_float(begin_of_row + 4 * value_head_dim + 4, total)
                for n in range(2):
                    source = c * 8 + 4 * n
                    factor_here = cuda.shfl_sync(ALL, factor, source)
                    begin_here = cuda.shfl_sync(ALL, begin_of_row, source)
                    if first_row + 8 * half + 2 * c + n < piece.used:
                        for e in range(0, part, 4):
                            for i in range(4):
                                j, second = find(e + i)
                                four[i] = (
                                    sums[4 * (half * columns + j) + 2 * (second ^ low_second) + n]
                                    * factor_here
                                )
                            j, second = find(e)
                            at = element(j, g, second)
                            if results:
                                store(call.out + 2 * (begin_here + at), four)
                            else:
                                store_partial(begin_here + 4 * at, four)

    return Kernel(prefill, (AttendAddresses, AttendShape), 32 * WARPS)
