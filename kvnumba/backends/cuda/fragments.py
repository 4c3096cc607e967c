"""A warp's share of a tile of 16 keys and values: how it gets into registers, is scored and is weighed.

Rows (new tokens times query heads of a KV head), keys and values are what ``mma.sync`` multiplies. In lane 4 g + c
lie a part of the keys of tokens g and g + 8, and a part of the values of tokens 2c, 2c + 1, 2c + 8 and 2c + 9, just
as they come from memory. What order this gives the elements of a head does not matter, as long as the query has the
same. The scores that a lane is left with are those that it needs as weights: row g, tokens 2c, 2c + 1, 2c + 8 and
2c + 9, and where there are two halves the same of row g + 8.

What the formats' elements are to matrix instructions is said in `codecs.py`. Scores and sums are float32; weights are
rounded to the type of the values' elements.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

from numba import float32, int32, int64, uint32

from kvnumba.backends.cuda import hardware as hw
from kvnumba.backends.cuda.codecs import Codec, pieces_of_row
from kvnumba.backends.cuda.intrinsics import load_int, loader
from kvnumba.backends.cuda.jit import cuda, device
from kvnumba.backends.cuda.plan import TILE
from kvnumba.backends.cuda.transforms import Transform, bits_of, rotation_in_lanes

ALL = 0xFFFFFFFF
LOG2_E = math.log2(math.e)
EXPONENT, LARGEST_EXPONENT, ONE_BITS = uint32(0x7F800000), uint32(0x7E800000), uint32(0x3F800000)
INVERSE = uint32(0x7F000000)  # minus the bits of a power of two: those of its inverse
NONE = uint32(0)


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
def query_loader(kind: str, keys: Codec, head_dim: int, transform: Transform) -> Any:
    """``load(address, shifts, scales, c, words) -> scale, total, offset``: a lane's part of a query, as A fragments.

    It is transformed, and in the order of the keys; `shifts` and `scales` are the addresses of those of the keys'
    channels, `offset` is the query's product with the shifts. Where the query has to become what the keys' elements
    are, or is multiplied with codes, it is scaled by a power of two into float16's range. `scale` is that power,
    `total` then the sum of its elements, which zeros multiply.
    """
    matrix, bits = keys.matrix, keys.fmt.bits
    assert matrix is not None
    together, pieces = pieces_of_row(bits, head_dim, 4)
    per_word = 32 // bits
    count = head_dim // 8
    loads = together * per_word // 8  # of four words of the query, for keys' words that are read together
    fetch, low, high = hw.fetcher(4), hw.low_half[kind], hw.high_half[kind]
    pack, low16, high16 = hw.pack_halves["float16"], hw.low_half["float16"], hw.high_half["float16"]
    transformed, calibrated, rotated = transform.of_queries, transform.calibrated, transform.keys > 1
    scaled = keys.fmt.has_scale or kind != matrix.element or (transformed and matrix.element == "float16")
    size = 2 * count if transformed else 2
    load_channels, rotate = loader("float32", 4), rotation_in_lanes(2 * count, bits_of(2 * count), (1, 2))
    pack_element = hw.pack_halves[matrix.element]
    arrange = matrix.arrange
    zero, one = float32(0), float32(1)

    @device
    def load(address, shifts, scales, c, words):
        values, channels = cuda.local.array(size, float32), cuda.local.array(4, float32)
        for i in range(pieces):
            begin = (i * 4 + c) * together * per_word
            for n in range(loads):
                fetch(address + int64(2 * begin + 16 * n), words, int64((i * loads + n) * 4))
        scale, total, offset = one, zero, zero
        if transformed:
            for i in range(count):
                values[2 * i], values[2 * i + 1] = low(words[i]), high(words[i])
            if calibrated:
                for i in range(pieces):
                    begin = (i * 4 + c) * together * per_word
                    for n in range(2 * loads):
                        at, place = 4 * (2 * loads * i + n), int64(4 * begin + 16 * n)
                        load_channels(shifts + place, channels)
                        for e in range(4):
                            offset += values[at + e] * channels[e]
                        load_channels(scales + place, channels)
                        for e in range(4):
                            values[at + e] *= channels[e]
                offset = sum_of_quad(offset)
            if rotated:
                rotate(values)
        if scaled:
            top = zero
            for i in range(count):
                if transformed:
                    top = max(top, max(abs(values[2 * i]), abs(values[2 * i + 1])))
                else:
                    top = max(top, max(abs(low(words[i])), abs(high(words[i]))))
            scale = power_of_two(max_of_quad(top))
            factor = inverse(scale)
            for i in range(count):
                if transformed:
                    words[i] = pack(values[2 * i] * factor, values[2 * i + 1] * factor)
                else:
                    words[i] = pack(low(words[i]) * factor, high(words[i]) * factor)
                total += low16(words[i]) + high16(words[i])
            arrange(words, count)
            total = sum_of_quad(total)
        elif transformed:
            for i in range(count):
                words[i] = pack_element(values[2 * i], values[2 * i + 1])
        return scale, total, offset

    return load


@functools.cache
def scale_functions(codec: Codec, shared: bool) -> ModuleType:
    """``fetch`` a lane's scales and zeros of a tile; ``scale``, ``zero``: those of the lane's token t of four.

    ``clear`` sets both of a token to 0.
    """
    wide = codec.scale == "float32"
    words = 2 if wide else 1  # for each token
    pair_bytes, step = codec.pair_bytes, 2 * words
    load = hw.fetcher(step, shared)
    low, high = hw.low_half["float16"], hw.high_half["float16"]

    @device
    def fetch(scales, offset, c, words, at):
        first = scales + int64(pair_bytes * (offset + 2 * c))
        for t in range(2):
            load(first + int64(8 * pair_bytes * t), words, int64(at + step * t))

    @device
    def scale(words, at, t):
        return hw.as_float(words[at + 2 * t]) if wide else low(words[at + t])

    @device
    def zero(words, at, t):
        return hw.as_float(words[at + 2 * t + 1]) if wide else high(words[at + t])

    @device
    def clear(words, at, t):
        if wide:
            words[at + 2 * t], words[at + 2 * t + 1] = NONE, NONE
        else:
            words[at + t] = NONE

    return _module(fetch=fetch, scale=scale, zero=zero, clear=clear)


def words_of_tile(codec: Codec, head_dim: int) -> tuple[int, int]:
    """Words of 32 bits that a lane has of a tile, and of its scales and zeros."""
    scales = 4 * codec.pair_bytes // 4 if codec.fmt.has_scale else 1
    return head_dim * codec.fmt.bits // 64, scales


@functools.cache
def key_functions(codec: Codec, head_dim: int, halves: int) -> ModuleType:
    """``fetch`` a tile of keys and its scales, and ``score`` it for rows g, and g + 8 where there are two halves."""
    bits, has_scale, matrix = codec.fmt.bits, codec.fmt.has_scale, codec.matrix
    assert matrix is not None
    row_bytes = head_dim * bits // 8
    together, pieces = pieces_of_row(bits, head_dim, 4)
    row_words = together * pieces
    fetch_words, of_scales = hw.fetcher(together, halves == 2), scale_functions(codec, halves == 2)
    fetch_scales, scale_of, zero_of = of_scales.fetch, of_scales.scale, of_scales.zero
    steps = head_dim // 16
    multiply, elements = hw.multiply_matrices[matrix.element], matrix.keys
    none, zero, factor = NONE, float32(0), float32(matrix.factor)

    @device
    def fetch(codes, scale, offset, g, c, words, at, scales, at_scales):
        begin = codes + int64(offset + g) * row_bytes + int64(4 * together * c)
        for t in range(2):
            for i in range(pieces):
                fetch_words(
                    begin + int64(8 * row_bytes * t + 16 * together * i),
                    words,
                    int64(at + t * row_words + i * together),
                )
        if has_scale:
            fetch_scales(scale, offset, c, scales, at_scales)

    @device
    def score(query, totals, words, at, scales, at_scales, scores, at_scores):
        for t in range(2):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for i in range(steps):
                a, b = elements(words, at + t * row_words, i)
                if halves == 2:
                    q0, q1, q2, q3 = query[4 * i], query[4 * i + 1], query[4 * i + 2], query[4 * i + 3]
                else:
                    q0, q1, q2, q3 = query[2 * i], none, query[2 * i + 1], none
                s0, s1, s2, s3 = multiply(q0, q1, q2, q3, a, b, s0, s1, s2, s3)
            if has_scale:
                scale0, zero0 = scale_of(scales, at_scales, 2 * t), zero_of(scales, at_scales, 2 * t)
                scale1, zero1 = scale_of(scales, at_scales, 2 * t + 1), zero_of(scales, at_scales, 2 * t + 1)
                s0 = s0 * factor * scale0 + totals[0] * zero0
                s1 = s1 * factor * scale1 + totals[0] * zero1
                if halves == 2:
                    s2 = s2 * factor * scale0 + totals[1] * zero0
                    s3 = s3 * factor * scale1 + totals[1] * zero1
            scores[at_scores + 2 * t], scores[at_scores + 2 * t + 1] = s0, s1
            if halves == 2:
                scores[at_scores + 4 + 2 * t], scores[at_scores + 5 + 2 * t] = s2, s3

    return _module(fetch=fetch, score=score)


@functools.cache
def value_functions(codec: Codec, head_dim: int, halves: int) -> ModuleType:
    """``fetch`` a tile of values and its scales, ``forget`` its tokens that nobody sees, ``weigh`` it.

    ``result`` is the sum of an element; `element` and `find` are those of `Matrix.order`.
    """
    bits, has_scale, matrix = codec.fmt.bits, codec.fmt.has_scale, codec.matrix
    assert matrix is not None
    row_bytes = head_dim * bits // 8
    together, pieces = pieces_of_row(bits, head_dim, 8)
    row_words = together * pieces
    fetch_words, of_scales = hw.fetcher(together, halves == 2), scale_functions(codec, halves == 2)
    fetch_scales, clear_scale = of_scales.fetch, of_scales.clear
    tiles = head_dim // 16
    multiply, elements = hw.multiply_matrices[matrix.element], matrix.values
    element, find = matrix.order(head_dim)
    none, factor, second_factor = NONE, float32(matrix.factor), float32(matrix.second)
    uneven = matrix.second != 1

    @device
    def fetch(codes, scale, offset, g, c, words, at, scales, at_scales):
        begin = codes + int64(offset + 2 * c) * row_bytes + int64(4 * together * g)
        for t in range(4):
            for i in range(pieces):
                fetch_words(
                    begin + int64(((t & 1) + 8 * (t >> 1)) * row_bytes + 32 * together * i),
                    words,
                    int64(at + t * row_words + i * together),
                )
        if has_scale:
            fetch_scales(scale, offset, c, scales, at_scales)

    @device
    def forget(words, at, scales, at_scales, t):
        if has_scale:
            clear_scale(scales, at_scales, t)
        else:
            for i in range(row_words):
                words[at + t * row_words + i] = none

    @device
    def weigh(words, at, weights, sums):
        for j in range(tiles):
            a0, a1, a2, a3 = elements(words, at, row_words, j)
            for half in range(halves):
                s = 4 * (half * tiles + j)
                p0, p1 = weights[2 * half], weights[2 * half + 1]
                c0, c1, c2, c3 = multiply(
                    a0, a1, a2, a3, p0, p1, sums[s], sums[s + 1], sums[s + 2], sums[s + 3]
                )
                sums[s], sums[s + 1], sums[s + 2], sums[s + 3] = c0, c1, c2, c3

    @device
    def result(sums, s, second, n, unit, zeros):
        value = sums[s + 2 * second + n]
        if has_scale:
            value *= unit * factor
            if uneven and second == 1:
                value *= second_factor
            value += zeros
        return value

    return _module(
        fetch=fetch,
        forget=forget,
        weigh=weigh,
        result=result,
        element=element,
        find=find,
        scale=of_scales.scale,
        zero=of_scales.zero,
        pack=hw.pack_halves[matrix.element],
    )


def _module(**functions: Any) -> ModuleType:
    made = ModuleType("functions")  # the one namespace that Numba looks into
    made.__dict__.update(functions)
    return made


@device
def find_tile(blocks, tile, block_size, num_heads, head, slab_bytes):
    """Where the slab of a tile of keys begins, in bytes from the first slab, and which of its tokens is the first.

    The first is negative where the tile's block is not there.
    """
    key = tile * TILE
    block, offset = tile, int32(0)
    if block_size != TILE:
        block = hw.quotient(key, block_size)
        offset = int32(key - block * block_size)
    return (int64(load_int(blocks + 4 * int64(block))) * num_heads + head) * slab_bytes, offset


@device
def next_tile(blocks, tile, end_tile, block_size, num_heads, head, slab_bytes):
    """The first tile from `tile` on whose block is there, and where `find_tile` finds it.

    From `end_tile` on nobody asks: what is then found can be read, and that is all.
    """
    slab, offset = find_tile(blocks, min(tile, end_tile - 1), block_size, num_heads, head, slab_bytes)
    while slab < 0 and tile < end_tile:
        tile += 1
        slab, offset = find_tile(blocks, min(tile, end_tile - 1), block_size, num_heads, head, slab_bytes)
    return tile, max(slab, int64(0)), offset
