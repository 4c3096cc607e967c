"""Attention of many new tokens with matrix instructions, for queries in float16 or bfloat16.

As `decode`, but each warp takes 16 rows of its own and all pages that they see: the halves of a matrix instruction
that decoding leaves empty are rows g + 8, and the warps of a block, which read the same pages at about the same
time, find them in the L1.
"""

from __future__ import annotations

import functools
import math

from numba import float32, int32, int64, uint32

from kvnumba.backends.cuda import hardware as hw
from kvnumba.backends.cuda.attend import PARAMETERS
from kvnumba.backends.cuda.fragments import (
    ALL,
    LOG2_E,
    find_page,
    inverse,
    key_functions,
    max_of_quad,
    power_of_two,
    query_loader,
    sum_of_quad,
    value_functions,
)
from kvnumba.backends.cuda.intrinsics import LEAST, load_float, load_int, store_float, storer
from kvnumba.backends.cuda.jit import Kernel, cuda
from kvnumba.backends.cuda.plan import (
    END_KEY,
    FIRST_KEY,
    FIRST_TOKEN,
    NUM_TOKENS,
    PIECE_COLUMNS,
    POSITION,
    SEQUENCE,
    TILE,
    Family,
)
from kvnumba.backends.cuda.tables import blocks_of
from kvnumba.formats import FORMATS

WARPS = 4
FAMILY = Family("prefill", 16 * WARPS, 0)
"""The kernel as a plan sees it; it splits no range of keys."""


@functools.cache
def prefill_kernel(kind: str, key_format: str, value_format: str, head_dim: int, extras: bool) -> Kernel:
    """Queries and results of a precision `kind`; `extras`: with a soft cap or ALiBi."""
    keys, values = key_functions(key_format, head_dim, 2), value_functions(value_format, head_dim, 2)
    load_query, store = query_loader(kind, key_format, head_dim), storer(kind, 4)
    value_bits = FORMATS[value_format].bits
    key_words, value_words = head_dim * FORMATS[key_format].bits // 64, head_dim * value_bits // 64
    quantized = FORMATS[value_format].quantized
    key_scales, value_scales = 8 if FORMATS[key_format].quantized else 1, 8 if quantized else 1
    query_words, tiles = head_dim // 8, head_dim // 16
    both_words, num_sums, part = 2 * query_words, 8 * tiles, head_dim // 8
    element, pack = values.element, values.pack
    zero, one, least, hidden = float32(0), float32(1), float32(LEAST), float32("-inf")
    per_code, sixteenth = float32(2.0**24), float32(1 / 16)
    log2_e, ln_2 = float32(LOG2_E), float32(math.log(2))
    far = int32(1 << 30)

    def prefill(
        tables, pieces, q, out, lse, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, sinks, slopes, partials,
        counters, q_batch, q_token, q_head, out_batch, out_token, out_head,
        slab_bytes, tokens_per_row, num_seqs, max_blocks, block_size, num_heads, group, heads, head_dim_, group_size,
        window_left, sm_scale, soft_cap,
    ):  # fmt: skip
        kw, vw = cuda.local.array(key_words, uint32), cuda.local.array(value_words, uint32)
        ks, vs = cuda.local.array(key_scales, uint32), cuda.local.array(value_scales, uint32)
        query, words = cuda.local.array(both_words, uint32), cuda.local.array(query_words, uint32)
        facts, packed = cuda.local.array(4, float32), cuda.local.array(4, uint32)
        scores, sums = cuda.local.array(8, float32), cuda.local.array(num_sums, float32)
        tops, totals, zeros = (
            cuda.local.array(2, float32),
            cuda.local.array(2, float32),
            cuda.local.array(2, float32),
        )
        factors, slope = cuda.local.array(2, float32), cuda.local.array(2, float32)
        last, four = cuda.local.array(2, int32), cuda.local.array(4, float32)

        thread = int32(cuda.threadIdx.x)
        lane, first_row = thread & int32(31), (thread >> int32(5)) * 16
        g, c = lane >> int32(2), lane & int32(3)
        # the pieces that see most begin first
        piece = pieces + 4 * PIECE_COLUMNS * int64(cuda.gridDim.x - 1 - cuda.blockIdx.x)
        sequence, first_token = load_int(piece + 4 * SEQUENCE), load_int(piece + 4 * FIRST_TOKEN)
        position, tokens = load_int(piece + 4 * POSITION), load_int(piece + 4 * NUM_TOKENS)
        begin, end = load_int(piece + 4 * FIRST_KEY), load_int(piece + 4 * END_KEY)
        tile_count = hw.quotient(group + heads - 1, heads)
        kv_head = hw.quotient(int32(cuda.blockIdx.y), tile_count)
        tile = int32(cuda.blockIdx.y) - kv_head * tile_count
        heads_here = int32(min(heads, group - tile * heads))
        first_head = kv_head * group + tile * heads
        used = int32(tokens * heads_here)
        if first_row < used:
            blocks = blocks_of(tables, num_seqs, max_blocks, sequence)
            batch = hw.quotient(
                first_token, tokens_per_row
            )  # all tokens of a piece lie in one row of the batch
            row_of_q = (
                batch * q_batch + (first_token - batch * tokens_per_row) * q_token + first_head * q_head
            )
            row_of_out = (
                batch * out_batch + (first_token - batch * tokens_per_row) * out_token + first_head * out_head
            )
            low = position + hw.quotient(int32(first_row), heads_here)  # the warp's first token, and its last
            high = position + hw.quotient(int32(min(first_row + 15, used - 1)), heads_here)
            end = min(end, high + 1)
            surely_from, never_before = -far, -far
            if window_left >= 0:
                surely_from, never_before = high - window_left, low - window_left
                begin = max(begin, never_before) & -TILE
            for half in range(2):
                row = int32(min(first_row + 8 * half + g, used - 1))  # a row too many repeats the last
                token = hw.quotient(row, heads_here)
                head = row - token * heads_here
                last[half] = position + token
                load_query(q + 2 * (row_of_q + token * q_token + head * q_head), c, words, four)
                for i in range(tiles):
                    query[4 * i + half], query[4 * i + 2 + half] = words[2 * i], words[2 * i + 1]
                facts[2 * half + 1] = four[1]
                factors[half] = sm_scale * four[0]
                slope[half] = zero
                if extras:
                    if slopes != 0:
                        slope[half] = load_float(slopes + 4 * int64(first_head + head))
                else:
                    factors[half] *= log2_e
                tops[half], totals[half], zeros[half] = least, zero, zero
            for i in range(num_sums):
                sums[i] = zero
            largest, unit, per_unit = zero, one, one

            page, end_page = begin >> 4, (end + TILE - 1) >> 4
            slab, offset = find_page(blocks, page, block_size, num_heads, kv_head, slab_bytes)
            keys.fetch(k_codes + slab, k_scale + slab, offset, g, c, kw, 0, ks, 0)
            while page < end_page:
                values.fetch(v_codes + slab, v_scale + slab, offset, g, c, vw, 0, vs, 0)
                keys.score(query, facts, kw, 0, ks, 0, scores, 0)
                slab, offset = find_page(
                    blocks, min(page + 1, end_page - 1), block_size, num_heads, kv_head, slab_bytes
                )
                keys.fetch(k_codes + slab, k_scale + slab, offset, g, c, kw, 0, ks, 0)
                first_key = page * TILE
                edge = first_key + TILE > min(end, low + 1) or first_key < surely_from
                for i in range(8):
                    scores[i] *= factors[i // 4]
                    if extras:
                        key = first_key + i // 2 % 2 * 8 + i % 2 + 2 * c
                        score = scores[i]
                        if soft_cap > zero:
                            score = soft_cap - soft_cap * (one + one) / (
                                one + hw.exp2(score * (log2_e + log2_e) / soft_cap)
                            )
                        scores[i] = (score + slope[i // 4] * float32(key - last[i // 4])) * log2_e
                if edge:
                    for i in range(8):
                        key = first_key + i // 2 % 2 * 8 + i % 2 + 2 * c
                        if key > last[i // 4] or (window_left >= 0 and key < last[i // 4] - window_left):
                            scores[i] = hidden
                    for t in range(4):
                        key = first_key + t // 2 * 8 + t % 2 + 2 * c
                        if key >= end or key < never_before:
                            values.forget(vw, 0, vs, 0, t)
                for half in range(2):
                    highest = max(
                        max(scores[4 * half], scores[4 * half + 1]),
                        max(scores[4 * half + 2], scores[4 * half + 3]),
                    )
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
                if quantized:
                    here = max(
                        max(hw.as_float(vs[0]), hw.as_float(vs[2])),
                        max(hw.as_float(vs[4]), hw.as_float(vs[6])),
                    )
                    here = max_of_quad(here)
                    if here > largest:  # weights times scales are kept within float16's range
                        largest = here
                        power = power_of_two(largest)
                        change = unit * inverse(power)
                        unit, per_unit = power, inverse(power)
                        for j in range(num_sums):
                            sums[j] *= change
                for i in range(8):
                    weight = hw.exp2(scores[i] - tops[i // 4])
                    totals[i // 4] += weight
                    if quantized:
                        zeros[i // 4] += weight * hw.as_float(vs[2 * (i % 4) + 1])
                        weight *= hw.as_float(vs[2 * (i % 4)]) * per_unit
                    scores[i] = weight
                for i in range(4):
                    packed[i] = pack(scores[2 * i], scores[2 * i + 1])
                values.weigh(vw, 0, packed, sums)
                page += 1

            for half in range(2):
                total, added, top = sum_of_quad(totals[half]), sum_of_quad(zeros[half]), tops[half]
                row = int32(min(first_row + 8 * half + g, used - 1))
                token = hw.quotient(row, heads_here)
                head = row - token * heads_here
                place = row_of_out + token * out_token + head * out_head
                share = one
                if sinks != 0:  # one more key, whose value is 0
                    sink = load_float(sinks + 4 * int64(first_head + head)) * log2_e
                    both = max(top, sink)
                    share = hw.exp2(top - both)
                    total = total * share + hw.exp2(sink - both)
                    top = both
                if lse != 0 and c == 0 and first_row + 8 * half + g < used:
                    store_float(lse + 4 * (place // head_dim), top * ln_2 + math.log(total))
                share /= total
                for n in range(2):
                    source = c * 8 + 4 * n
                    factor, more = cuda.shfl_sync(ALL, share, source), cuda.shfl_sync(ALL, added, source)
                    place_of_row = cuda.shfl_sync(ALL, place, source)
                    if first_row + 8 * half + 2 * c + n < used:
                        for e in range(0, part, 4):
                            for i in range(4):
                                # which tile, and which of its two elements, holds the lane's element e + i
                                if value_bits == 16:
                                    j, second = (e + i) % tiles, (e + i) // tiles
                                else:
                                    j, second = (e + i) // 2, (e + i) % 2 ^ (1 if value_bits == 4 else 0)
                                value = sums[4 * (half * tiles + j) + 2 * second + n]
                                if quantized:
                                    value *= unit * per_code
                                    if value_bits == 4 and second == 1:
                                        value *= sixteenth
                                    value += more
                                four[i] = value * factor
                            if value_bits == 16:
                                at = element(e % tiles, g, e // tiles)
                            else:
                                at = g * part + e
                            store(out + 2 * (place_of_row + at), four)

    return Kernel(prefill, PARAMETERS, 32 * WARPS)
