"""Attention of a few new tokens with matrix instructions, for queries in float16 or bfloat16.

A warp takes all the rows (new tokens times query heads of a KV head, eight at most) and pages of 16 keys, which go
from memory straight into the registers that ``mma.sync`` multiplies: in lane 4 g + c, its part of the keys of
tokens g and g + 8, and of the values of tokens 2c, 2c + 1, 2c + 8 and 2c + 9. What order this gives the elements of
a head does not matter, as long as the query has the same. The scores that a lane is left with are those that it
needs as weights: row g, tokens 2c, 2c + 1, 2c + 8 and 2c + 9. While a step is computed, the next one is on its way.

Codes are float16 as they are: subnormal numbers, 2^-24 times the code (in int4's high nibbles 2^-20 times), which
matrix instructions multiply exactly. Scores and sums are float32; weights are rounded to the values' type.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

from numba import float32, int32, int64, uint32

from kvnumba.backends.cuda import hardware as hw
from kvnumba.backends.cuda.attend import PARAMETERS
from kvnumba.backends.cuda.finish import TOGETHER, finisher, shared_floats
from kvnumba.backends.cuda.intrinsics import LEAST, barrier, index, load_float, load_int
from kvnumba.backends.cuda.jit import Kernel, cuda, device
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
ALL = 0xFFFFFFFF
LOG2_E = math.log2(math.e)

# Digits of `permute`: bytes 0 to 3 of the first word, 4 to 7 of the second.
LOW_HALVES, HIGH_HALVES = uint32(0x5410), uint32(0x7632)
LOW_BYTES, HIGH_BYTES = uint32(0x5140), uint32(0x7362)  # 0 and 1, or 2 and 3, of both in turn
FIRST_TWO, LAST_TWO = uint32(0x4140), uint32(0x4342)  # bytes of the first, each below byte 0 of the second
SIXTEENTH = uint32(0x2C002C00)
LOW_NIBBLES, HIGH_NIBBLES, EIGHT = uint32(0x000F000F), uint32(0x00F000F0), uint32(8)
EXPONENT, LARGEST_EXPONENT, ONE_BITS = uint32(0x7F800000), uint32(0x7E800000), uint32(0x3F800000)
INVERSE = uint32(0x7F000000)  # minus the bits of a power of two: those of its inverse


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


@device
def sum_of_quad(x):
    """The sum over the four lanes of a row, in each of them."""
    x += cuda.shfl_xor_sync(ALL, x, 1)
    return x + cuda.shfl_xor_sync(ALL, x, 2)


@device
def max_of_quad(x):
    """The maximum over the four lanes of a row, in each of them."""
    x = max(x, cuda.shfl_xor_sync(ALL, x, 1))
    return max(x, cuda.shfl_xor_sync(ALL, x, 2))


@device
def power_of_two(x):
    """The largest power of two that is not more than x >= 0, within what has an inverse; 1 for less."""
    bits = hw.as_bits(x) & EXPONENT
    bits = min(bits, LARGEST_EXPONENT)
    return hw.as_float(bits if bits > uint32(0) else ONE_BITS)


@device
def inverse(power):
    """Of a power of two."""
    return hw.as_float(INVERSE - hw.as_bits(power))


@functools.cache
def query_loader(kind: str, key_format: str, head_dim: int) -> Any:
    """``load(address, c, words, facts)``: a lane's part of a query, as A fragments in the order of the keys' codes.

    Next to float codes the words are used as they are. Next to others the row is scaled by a power of two into
    float16's range; facts become that power and the sum of the elements.
    """
    fmt = FORMATS[key_format]
    piece, pieces = _row_words(fmt.bits, head_dim, 4)
    per_word = 32 // fmt.bits
    count = head_dim // 8
    loads = piece * per_word // 8  # of four words, for a piece of a key's words
    fetch, low, high = hw.fetcher(4), hw.low_half[kind], hw.high_half[kind]
    pack, low16, high16 = hw.pack_halves["float16"], hw.low_half["float16"], hw.high_half["float16"]
    scaled = fmt.quantized
    int4 = fmt.bits == 4
    zero = float32(0)

    @device
    def load(address, c, words, facts):
        for i in range(pieces):
            begin = (i * 4 + c) * piece * per_word
            for n in range(loads):
                fetch(address + int64(2 * begin + 16 * n), words, int64((i * loads + n) * 4))
        facts[0], facts[1] = float32(1), zero
        if scaled:
            top = zero
            for i in range(count):
                top = max(top, max(abs(low(words[i])), abs(high(words[i]))))
            power = power_of_two(max_of_quad(top))
            factor = inverse(power)
            total = zero
            for i in range(count):
                words[i] = pack(low(words[i]) * factor, high(words[i]) * factor)
                total += low16(words[i]) + high16(words[i])
            if int4:
                for i in range(count // 4):
                    a, b, x, y = words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]
                    words[4 * i] = hw.permute(a, x, HIGH_HALVES)
                    words[4 * i + 1] = hw.permute(b, y, HIGH_HALVES)
                    words[4 * i + 2] = hw.multiply_halves(hw.permute(a, x, LOW_HALVES), SIXTEENTH)
                    words[4 * i + 3] = hw.multiply_halves(hw.permute(b, y, LOW_HALVES), SIXTEENTH)
            facts[0], facts[1] = power, sum_of_quad(total)

    return load


def _row_words(bits: int, head_dim: int, lanes: int) -> tuple[int, int]:
    """Of a lane's part of a row that so many lanes share: words that are read together, and how many times."""
    words = head_dim * bits // 32 // lanes
    piece = min(4, words)
    return piece, words // piece


@functools.cache
def key_functions(key_format: str, head_dim: int, halves: int) -> ModuleType:
    """``fetch`` a page of keys and its scales, and ``score`` it for rows g, and g + 8 where there are two halves."""
    fmt = FORMATS[key_format]
    bits, quantized = fmt.bits, fmt.quantized
    row_bytes = head_dim * bits // 8
    piece, pieces = _row_words(bits, head_dim, 4)
    row_words = piece * pieces
    fetch_words, fetch_pairs = hw.fetcher(piece, halves == 2), hw.fetcher(4, halves == 2)
    steps = head_dim // 16
    multiply = hw.multiply_matrices["bfloat16" if key_format == "bfloat16" else "float16"]
    zero, none, per_code = float32(0), uint32(0), float32(2.0**24)

    @device
    def fetch(codes, scale, offset, g, c, words, at, scales, at_scales):
        begin = codes + int64(offset + g) * row_bytes + int64(4 * piece * c)
        for t in range(2):
            for i in range(pieces):
                fetch_words(
                    begin + int64(8 * row_bytes * t + 16 * piece * i),
                    words,
                    int64(at + t * row_words + i * piece),
                )
        if quantized:
            first = scale + int64(8 * (offset + 2 * c))
            for t in range(2):
                fetch_pairs(first + int64(64 * t), scales, int64(at_scales + 4 * t))

    @device
    def score(query, facts, words, at, scales, at_scales, scores, at_scores):
        for t in range(2):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for i in range(steps):
                if bits == 16:
                    a, b = words[at + t * row_words + 2 * i], words[at + t * row_words + 2 * i + 1]
                elif bits == 8:
                    word = words[at + t * row_words + i]
                    a, b = hw.permute(word, none, FIRST_TWO), hw.permute(word, none, LAST_TWO)
                else:
                    word = words[at + t * row_words + i // 2]
                    nibbles = HIGH_NIBBLES if i % 2 else LOW_NIBBLES
                    a, b = word & nibbles, word >> EIGHT & nibbles
                if halves == 2:
                    q0, q1, q2, q3 = query[4 * i], query[4 * i + 1], query[4 * i + 2], query[4 * i + 3]
                else:
                    q0, q1, q2, q3 = query[2 * i], none, query[2 * i + 1], none
                s0, s1, s2, s3 = multiply(q0, q1, q2, q3, a, b, s0, s1, s2, s3)
            if quantized:
                n = at_scales + 4 * t  # scale and zero point of token 2c, then of 2c + 1
                s0, s1 = s0 * per_code, s1 * per_code
                s0 = s0 * hw.as_float(scales[n]) + facts[1] * hw.as_float(scales[n + 1])
                s1 = s1 * hw.as_float(scales[n + 2]) + facts[1] * hw.as_float(scales[n + 3])
                if halves == 2:
                    s2, s3 = s2 * per_code, s3 * per_code
                    s2 = s2 * hw.as_float(scales[n]) + facts[3] * hw.as_float(scales[n + 1])
                    s3 = s3 * hw.as_float(scales[n + 2]) + facts[3] * hw.as_float(scales[n + 3])
            scores[at_scores + 2 * t], scores[at_scores + 2 * t + 1] = s0, s1
            if halves == 2:
                scores[at_scores + 4 + 2 * t], scores[at_scores + 5 + 2 * t] = s2, s3

    return _module(fetch=fetch, score=score)


@functools.cache
def value_functions(value_format: str, head_dim: int, halves: int) -> ModuleType:
    """``fetch`` a page of values and its scales, ``forget`` its tokens that nobody sees, ``weigh`` it."""
    fmt = FORMATS[value_format]
    bits, quantized = fmt.bits, fmt.quantized
    row_bytes = head_dim * bits // 8
    piece, pieces = _row_words(bits, head_dim, 8)
    row_words = piece * pieces
    fetch_words, fetch_pairs = hw.fetcher(piece, halves == 2), hw.fetcher(4, halves == 2)
    tiles = head_dim // 16
    kind = "bfloat16" if value_format == "bfloat16" else "float16"
    multiply, pack = hw.multiply_matrices[kind], hw.pack_halves[kind]
    none = uint32(0)

    @device
    def fetch(codes, scale, offset, g, c, words, at, scales, at_scales):
        begin = codes + int64(offset + 2 * c) * row_bytes + int64(4 * piece * g)
        for t in range(4):
            for i in range(pieces):
                fetch_words(
                    begin + int64(((t & 1) + 8 * (t >> 1)) * row_bytes + 32 * piece * i),
                    words,
                    int64(at + t * row_words + i * piece),
                )
        if quantized:
            first = scale + int64(8 * (offset + 2 * c))
            for t in range(2):
                fetch_pairs(first + int64(64 * t), scales, int64(at_scales + 4 * t))

    @device
    def forget(words, at, scales, at_scales, t):
        if quantized:
            scales[at_scales + 2 * t], scales[at_scales + 2 * t + 1] = none, none
        else:
            for i in range(row_words):
                words[at + t * row_words + i] = none

    @device
    def weigh(words, at, weights, sums):
        for j in range(tiles):
            if bits == 16:
                digits = HIGH_HALVES if j % 2 else LOW_HALVES
                n, m = at + j // 2, at + j // 2 + row_words // 2
                a0 = hw.permute(words[n], words[n + row_words], digits)
                a1 = hw.permute(words[m], words[m + row_words], digits)
                a2 = hw.permute(words[n + 2 * row_words], words[n + 3 * row_words], digits)
                a3 = hw.permute(words[m + 2 * row_words], words[m + 3 * row_words], digits)
            elif bits == 8:
                digits = HIGH_BYTES if j % 2 else LOW_BYTES
                n = at + j // 2
                x = hw.permute(words[n], words[n + row_words], digits)
                y = hw.permute(words[n + 2 * row_words], words[n + 3 * row_words], digits)
                a0, a1 = hw.permute(x, none, FIRST_TWO), hw.permute(x, none, LAST_TWO)
                a2, a3 = hw.permute(y, none, FIRST_TWO), hw.permute(y, none, LAST_TWO)
            else:
                digits = HIGH_HALVES if j // 2 % 2 else LOW_HALVES
                n = at + j // 4
                x = hw.permute(words[n], words[n + row_words], digits)
                y = hw.permute(words[n + 2 * row_words], words[n + 3 * row_words], digits)
                if j % 2:
                    x, y = x >> EIGHT, y >> EIGHT
                a0, a1 = x & LOW_NIBBLES, x & HIGH_NIBBLES
                a2, a3 = y & LOW_NIBBLES, y & HIGH_NIBBLES
            for half in range(halves):
                s = 4 * (half * tiles + j)
                p0, p1 = weights[2 * half], weights[2 * half + 1]
                c0, c1, c2, c3 = multiply(
                    a0, a1, a2, a3, p0, p1, sums[s], sums[s + 1], sums[s + 2], sums[s + 3]
                )
                sums[s], sums[s + 1], sums[s + 2], sums[s + 3] = c0, c1, c2, c3

    @device
    def element(j, g, second):
        """Which element of the head the sums of tile j are, those of rows g + 8 where `second`."""
        if bits == 16:
            e = j + second * tiles
            per_piece = 2 * piece
            return e // per_piece * (8 * per_piece) + g * per_piece + e % per_piece
        # the words of a lane hold neighbours; of a byte of int4 the low nibble is the second
        return g * (head_dim // 8) + 2 * j + (1 - second if bits == 4 else second)

    return _module(fetch=fetch, forget=forget, weigh=weigh, element=element, pack=pack)


def _module(**functions: Any) -> ModuleType:
    made = ModuleType("functions")  # the one namespace that Numba looks into
    made.__dict__.update(functions)
    return made


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


@device
def find_page(blocks, page, block_size, num_heads, head, slab_bytes):
    """Where its slab begins, in bytes, and the token of the slab with which a page begins."""
    key = page * TILE
    block, offset = page, int32(0)
    if block_size != TILE:
        block = hw.quotient(key, block_size)
        offset = int32(key - block * block_size)
    return (int64(load_int(blocks + 4 * int64(block))) * num_heads + head) * slab_bytes, offset
