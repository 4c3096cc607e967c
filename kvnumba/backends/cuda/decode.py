"""Attention of a few new tokens with matrix instructions, for queries in float16 or bfloat16.

The warps of a block share the pages of a piece, and take all its rows, eight at most. While a page is computed, the
next ones are on their way from memory, straight into registers; in the end the warps' results are merged.
Scores and sums are float32; weights are rounded to the values' type.
"""

from __future__ import annotations

import functools
import math

from numba import float32, int32, int64, uint32

from kvnumba.backends.cuda import hardware as hw
from kvnumba.backends.cuda.attend import PARAMETERS
from kvnumba.backends.cuda.finish import TOGETHER, finisher, shared_floats
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
from kvnumba.backends.cuda.intrinsics import LEAST, barrier, index, load_float, load_int
from kvnumba.backends.cuda.jit import Kernel, cuda
from kvnumba.backends.cuda.plan import (
    END_KEY,
    FIRST_KEY,
    FIRST_PARTIAL,
    FIRST_TOKEN,
    ITEM,
    NUM_PARTS,
    NUM_TOKENS,
    PART,
    PIECE_COLUMNS,
    POSITION,
    SEQUENCE,
    TILE,
    Family,
)
from kvnumba.backends.cuda.tables import blocks_of
from kvnumba.formats import FORMATS
from kvnumba.storage import Layout

ROWS = 8
WARPS = 8
PAGES = {(16, 64): 2, (16, 128): 1, (8, 64): 2, (8, 128): 2, (4, 64): 4, (4, 128): 3}
"""Bits of the wider of both formats and head_dim -> pages of a step: as many as the registers hold."""


def serves(layout: Layout, max_blocks: int, kind: str, alignment: int) -> bool:
    """Whether the kernel can take queries out of such a storage."""
    formats = (layout.key_format, layout.value_format)
    quantized = any(fmt.quantized for fmt in formats)
    return (
        _shape_key(layout.key_format.name, layout.value_format.name, layout.head_dim) in PAGES
        and (layout.key_format.name == kind or (layout.key_format.quantized and kind != "float32"))
        and (layout.block_size % TILE == 0 or max_blocks == 1)
        and (not quantized or (layout.group_size == layout.head_dim and layout.block_size % 2 == 0))
        and alignment == 8
    )


def _shape_key(key_format: str, value_format: str, head_dim: int) -> tuple[int, int]:
    """Of the table of pages."""
    return max(FORMATS[key_format].bits, FORMATS[value_format].bits), head_dim


FAMILY = Family("decode", ROWS, 1)
"""The kernel as a plan sees it."""


def shared_bytes(head_dim: int) -> int:
    """Sums, the warps' maxima and totals, three numbers a row."""
    return 4 * (shared_floats(ROWS, head_dim, WARPS) + 2 * WARPS * ROWS + 3 * ROWS)


@functools.cache
def decode_kernel(kind: str, key_format: str, value_format: str, head_dim: int, extras: bool) -> Kernel:
    """Queries and results of a precision `kind`; `extras`: with a soft cap or ALiBi."""
    pages = PAGES[_shape_key(key_format, value_format, head_dim)]
    keys, values = key_functions(key_format, head_dim, 1), value_functions(value_format, head_dim, 1)
    load_query, finish = query_loader(kind, key_format, head_dim), finisher(ROWS, 4, kind, 32 * WARPS)
    key_words, value_words = (
        pages * head_dim * FORMATS[key_format].bits // 64,
        pages * head_dim * FORMATS[value_format].bits // 64,
    )
    page_keys, page_values = key_words // pages, value_words // pages
    quantized_keys, quantized = FORMATS[key_format].quantized, FORMATS[value_format].quantized
    key_scales = 8 * pages if quantized_keys else 1
    value_scales = 8 * pages if quantized else 1
    int4_values = FORMATS[value_format].bits == 4
    num_scores, num_sums, query_words, tiles = 4 * pages, head_dim // 4, head_dim // 8, head_dim // 16
    element, pack = values.element, values.pack
    zero, one, least, hidden = float32(0), float32(1), float32(LEAST), float32("-inf")
    per_code, sixteenth = float32(2.0**24), float32(1 / 16)
    log2_e, ln_2 = float32(LOG2_E), float32(math.log(2))
    far = int32(1 << 30)
    loaded_size, sums_size = 4 * TOGETHER, shared_floats(ROWS, head_dim, WARPS)

    def decode(
        tables, pieces, q, out, lse, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, sinks, slopes, partials,
        counters, q_batch, q_token, q_head, out_batch, out_token, out_head,
        slab_bytes, tokens_per_row, num_seqs, max_blocks, block_size, num_heads, group, heads, head_dim_, group_size,
        window_left, sm_scale, soft_cap,
    ):  # fmt: skip
        kw, vw = cuda.local.array(key_words, uint32), cuda.local.array(value_words, uint32)
        ks, vs = cuda.local.array(key_scales, uint32), cuda.local.array(value_scales, uint32)
        query, facts = cuda.local.array(query_words, uint32), cuda.local.array(2, float32)
        scores, sums = cuda.local.array(num_scores, float32), cuda.local.array(num_sums, float32)
        packed = cuda.local.array(2, uint32)
        slabs, offsets = cuda.local.array(pages, int64), cuda.local.array(pages, int32)
        four, loaded = cuda.local.array(4, float32), cuda.local.array(loaded_size, float32)
        shared = cuda.shared.array(0, float32)

        thread = int32(cuda.threadIdx.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        g, c = lane >> int32(2), lane & int32(3)
        piece = pieces + 4 * PIECE_COLUMNS * int64(cuda.blockIdx.x)
        sequence, first_token = load_int(piece + 4 * SEQUENCE), load_int(piece + 4 * FIRST_TOKEN)
        position, tokens = load_int(piece + 4 * POSITION), load_int(piece + 4 * NUM_TOKENS)
        begin, end = load_int(piece + 4 * FIRST_KEY), load_int(piece + 4 * END_KEY)
        tile_count = hw.quotient(group + heads - 1, heads)
        kv_head = hw.quotient(int32(cuda.blockIdx.y), tile_count)
        tile = int32(cuda.blockIdx.y) - kv_head * tile_count
        heads_here = min(heads, group - tile * heads)
        first_head = kv_head * group + tile * heads
        used = int32(tokens * heads_here)
        blocks = blocks_of(tables, num_seqs, max_blocks, sequence)

        page = (begin >> 4) + warp * pages
        end_page = (end + TILE - 1) >> 4
        if page < end_page:
            for u in range(pages):
                slabs[u], offsets[u] = find_page(
                    blocks, min(page + u, end_page - 1), block_size, num_heads, kv_head, slab_bytes
                )
            for u in range(pages):
                keys.fetch(
                    k_codes + slabs[u], k_scale + slabs[u], offsets[u], g, c, kw, u * page_keys, ks, 8 * u
                )
            for u in range(pages):
                values.fetch(
                    v_codes + slabs[u], v_scale + slabs[u], offsets[u], g, c, vw, u * page_values, vs, 8 * u
                )

        # a lane's own row; rows that are not used see what row 0 sees, with a query of 0
        row_token = hw.quotient(g, int32(heads_here)) if g < used else int32(0)
        head = first_head + g - row_token * heads_here
        last = position + row_token
        lowest = last - window_left if window_left >= 0 else -far
        surely_from = position + tokens - 1 - window_left if window_left >= 0 else -far
        never_before = position - window_left if window_left >= 0 else -far
        for i in range(query_words):
            query[i] = uint32(0)
        batch = hw.quotient(first_token, tokens_per_row)  # all tokens of a piece lie in one row of the batch
        place = batch * q_batch + (first_token - batch * tokens_per_row + row_token) * q_token + head * q_head
        if g >= used:
            place = int64(0)
        load_query(q + 2 * place, c, query, facts)
        if g >= used:
            for i in range(query_words):
                query[i] = uint32(0)
            facts[1] = zero
        factor = sm_scale * facts[0]
        slope = zero
        if extras:
            if slopes != 0 and g < used:
                slope = load_float(slopes + 4 * int64(head))
        else:
            factor *= log2_e

        for i in range(num_sums):
            sums[i] = zero
        top, total, zeros = least, zero, zero
        largest, unit, per_unit = zero, one, one

        while page < end_page:
            following = page + WARPS * pages
            for u in range(pages):
                keys.score(query, facts, kw, u * page_keys, ks, 8 * u, scores, 4 * u)
            for u in range(pages):
                slabs[u], offsets[u] = find_page(
                    blocks, min(following + u, end_page - 1), block_size, num_heads, kv_head, slab_bytes
                )
            for u in range(pages):
                keys.fetch(
                    k_codes + slabs[u], k_scale + slabs[u], offsets[u], g, c, kw, u * page_keys, ks, 8 * u
                )
            first_key = page * TILE
            edge = first_key + pages * TILE > min(end, position + 1) or first_key < surely_from
            for i in range(num_scores):
                scores[i] *= factor
            if extras:
                for i in range(num_scores):
                    key = first_key + i // 4 * TILE + i // 2 % 2 * 8 + i % 2 + 2 * c
                    score = scores[i]
                    if soft_cap > zero:
                        score = soft_cap - soft_cap * (one + one) / (
                            one + hw.exp2(score * (log2_e + log2_e) / soft_cap)
                        )
                    scores[i] = (score + slope * float32(key - last)) * log2_e
            if edge:
                for i in range(num_scores):
                    key = first_key + i // 4 * TILE + i // 2 % 2 * 8 + i % 2 + 2 * c
                    if key > last or key < lowest or key >= end:
                        scores[i] = hidden
                    if key >= end or key < never_before:
                        values.forget(vw, i // 4 * page_values, vs, i // 4 * 8, i % 4)

            highest = scores[0]
            for i in range(1, num_scores):
                highest = max(highest, scores[i])
            highest = max_of_quad(highest)
            if cuda.any_sync(ALL, highest > top):
                now = max(top, highest)
                rescale = hw.exp2(top - now)
                top = now
                total *= rescale
                zeros *= rescale
                r0, r1 = cuda.shfl_sync(ALL, rescale, c * 8), cuda.shfl_sync(ALL, rescale, c * 8 + 4)
                for j in range(tiles):
                    sums[4 * j] *= r0
                    sums[4 * j + 1] *= r1
                    sums[4 * j + 2] *= r0
                    sums[4 * j + 3] *= r1
            if quantized:
                largest_here = zero
                for i in range(num_scores):
                    largest_here = max(largest_here, hw.as_float(vs[2 * i]))
                largest_here = max_of_quad(largest_here)
                if largest_here > largest:  # weights times scales are kept within float16's range
                    largest = largest_here
                    power = power_of_two(largest)
                    change = unit * inverse(power)
                    unit, per_unit = power, inverse(power)
                    for j in range(num_sums):
                        sums[j] *= change
            for u in range(pages):
                for i in range(4):
                    weight = hw.exp2(scores[4 * u + i] - top)
                    total += weight
                    if quantized:
                        zeros += weight * hw.as_float(vs[8 * u + 2 * i + 1])
                        weight *= hw.as_float(vs[8 * u + 2 * i]) * per_unit
                    scores[4 * u + i] = weight
                packed[0] = pack(scores[4 * u], scores[4 * u + 1])
                packed[1] = pack(scores[4 * u + 2], scores[4 * u + 3])
                values.weigh(vw, u * page_values, packed, sums)
            for u in range(pages):
                values.fetch(
                    v_codes + slabs[u], v_scale + slabs[u], offsets[u], g, c, vw, u * page_values, vs, 8 * u
                )
            page = following

        at_warps = sums_size
        at_factors = at_warps + 2 * WARPS * ROWS
        at_tops, at_totals = at_factors + ROWS, at_factors + 2 * ROWS
        total = sum_of_quad(total)
        zeros = sum_of_quad(zeros)
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
            more_zeros = cuda.shfl_sync(ALL, zeros, c * 8 + 4 * n)
            if r < used:
                for j in range(tiles):
                    for second in range(2):
                        value = sums[4 * j + 2 * second + n]
                        if quantized:
                            value *= unit * per_code
                            if int4_values and second == 1:
                                value *= sixteenth
                            value += more_zeros
                        shared[index((warp * ROWS + r) * head_dim + element(j, g, second))] = value * share
        barrier()
        parts = load_int(piece + 4 * NUM_PARTS)
        finish(
            thread, shared, WARPS, at_tops, at_totals, four, loaded, used, heads_here, first_token, first_head,
            load_int(piece + 4 * PART), parts,
            int64(load_int(piece + 4 * FIRST_PARTIAL)) * cuda.gridDim.y + cuda.blockIdx.y * parts,
            counters + 4 * (int64(load_int(piece + 4 * ITEM)) * cuda.gridDim.y + cuda.blockIdx.y),
            out, lse, out_batch, out_token, out_head, tokens_per_row, head_dim, sinks, partials,
        )  # fmt: skip

    return Kernel(decode, PARAMETERS, 32 * WARPS)
