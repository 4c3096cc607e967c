"""A warp's share of a page of 16 keys and values: how it gets into registers, is scored and is weighed.

Rows (new tokens times query heads of a KV head), keys and values are what ``mma.sync`` multiplies. In lane 4 g + c
lie a part of the keys of tokens g and g + 8, and a part of the values of tokens 2c, 2c + 1, 2c + 8 and 2c + 9, just
as they come from memory. What order this gives the elements of a head does not matter, as long as the query has the
same. The scores that a lane is left with are those that it needs as weights: row g, tokens 2c, 2c + 1, 2c + 8 and
2c + 9, and where there are two halves the same of row g + 8.

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
from kvnumba.backends.cuda.intrinsics import load_int
from kvnumba.backends.cuda.jit import cuda, device
from kvnumba.backends.cuda.plan import TILE
from kvnumba.formats import FORMATS

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


@device
def find_page(blocks, page, block_size, num_heads, head, slab_bytes):
    """Where its slab begins, in bytes, and the token of the slab with which a page begins."""
    key = page * TILE
    block, offset = page, int32(0)
    if block_size != TILE:
        block = hw.quotient(key, block_size)
        offset = int32(key - block * block_size)
    return (int64(load_int(blocks + 4 * int64(block))) * num_heads + head) * slab_bytes, offset
