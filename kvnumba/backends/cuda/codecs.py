"""What this backend does with a storage format: encode and decode rows, and hand their elements to matrix instructions.

A row of the table at the end is all that the kernels know of a format. Where it has scales, they lie in pairs:
scale and zero of each group of elements, group after group and row after row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import float32, uint32

from kvnumba.backends.cuda.intrinsics import (
    load_float,
    load_half,
    loader,
    round_to_half,
    store_float,
    store_half,
    storer,
    vectors,
    warp_max,
    warp_min,
    width_of,
)
from kvnumba.backends.cuda.jit import SIMULATED, WARP, device
from kvnumba.backends.cuda.registered import group_reader, group_writer
from kvnumba.formats import Format
from kvnumba.storage import RowLayout

if not SIMULATED:
    from kvnumba.backends.cuda import hardware as hw

# How `permute` combines two words of 32 bits: a digit for each byte of the result, the lowest last; bytes 0 to 3 are
# those of the first word, 4 to 7 of the second.
LOW_HALVES, HIGH_HALVES = uint32(0x5410), uint32(0x7632)
LOW_BYTES, HIGH_BYTES = uint32(0x5140), uint32(0x7362)  # 0 and 1, or 2 and 3, of both in turn
FIRST_TWO, LAST_TWO = (
    uint32(0x4140),
    uint32(0x4342),
)  # bytes of the first word, each below byte 0 of the second
LOW_NIBBLES, HIGH_NIBBLES, EIGHT = uint32(0x000F000F), uint32(0x00F000F0), uint32(8)
SIXTEENTH = uint32(0x2C002C00)  # 1 / 16 twice, in float16
ZERO_BITS = uint32(0)


class Codec(NamedTuple):
    """How rows of a format, with scales of a type, are read, written and multiplied; kernels are compiled for it."""

    fmt: Format
    scale: str  # "float32" or "float16"

    @property
    def pair_bytes(self) -> int:
        """Bytes of a scale and a zero, or of a scale alone."""
        return (1 + self.fmt.has_zero) * self.scale_bytes

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return 4 if self.scale == "float32" else 2

    @property
    def matrix(self) -> Matrix | None:
        """How matrix instructions take elements; None: they do not."""
        return MATRIX.get(self.fmt.name)


@functools.cache
def codec_of(rows: RowLayout) -> Codec:
    """The codec of rows that are laid out so; without scales their type does not matter."""
    return Codec(rows.fmt, rows.scale_dtype.name if rows.fmt.has_scale else "float32")


def width_of_rows(rows: RowLayout) -> int:
    """How many neighbours of a stored row are read together: of formats of the user's own, a group."""
    if rows.fmt.codec is not None:
        return rows.group_size
    return width_of(rows.head_dim, rows.group_size)


@functools.cache
def reader(codec: Codec, width: int) -> Any:
    """``read(codes, scales, offset, at, head_dim, group_size, values)``: elements of a stored row as float32.

    The addresses are those of a slab, the row that of its token `offset`.
    """
    fmt, pair_bytes, scale_bytes = codec.fmt, codec.pair_bytes, codec.scale_bytes
    bits, has_scale = fmt.bits, fmt.has_scale
    load_scale = load_float if codec.scale == "float32" else load_half
    if fmt.codec is not None:
        return group_reader(fmt, load_scale, pair_bytes, scale_bytes)
    load, dequantize = loader(fmt.name, width), vectors(1, width).dequantize

    @device
    def read(codes, scales, offset, at, head_dim, group_size, values):
        load(codes + (offset * head_dim + at) * bits // 8, values)
        if has_scale:
            pair = scales + pair_bytes * (offset * (head_dim // group_size) + at // group_size)
            dequantize(values, load_scale(pair), load_scale(pair + scale_bytes))

    return read


@functools.cache
def row_writer(codec: Codec, width: int) -> Any:
    """``write(lane, values, shared, x, offset, head_dim, group_size, codes, scales)``: encode one row.

    The threads of a warp share it, `width` neighbours at a time. It lies in shared memory from `x` on.
    """
    fmt, pair_bytes, scale_bytes = codec.fmt, codec.pair_bytes, codec.scale_bytes
    bits, has_scale = fmt.bits, fmt.has_scale
    store_scale = store_float if codec.scale == "float32" else store_half
    if fmt.codec is not None:
        return group_writer(fmt, store_scale, _rounder(codec.scale), pair_bytes, scale_bytes)
    store, of = storer(fmt.name, width), vectors(1, width)
    most = float32(fmt.max_code) if has_scale else float32(0)
    infinity, nothing, one = float32("inf"), float32(0), float32(1)
    rounded = _rounder(codec.scale)

    @device
    def write(lane, values, shared, x, offset, head_dim, group_size, codes, scales):
        row = offset * head_dim
        if has_scale:
            for group in range(head_dim // group_size):
                begin, end = group * group_size, (group + 1) * group_size
                low, high = infinity, -infinity
                for at in range(begin + lane * width, end, WARP * width):
                    of.take(shared, x + at, values)
                    low, high = min(low, of.smallest(values)), max(high, of.largest(values))
                low, high = warp_min(low), warp_max(high)
                step, zero = rounded((high - low) / most), rounded(low)
                # a constant group has step 0: all its codes are 0, and code * step + zero is exact
                divisor = step if step > nothing else one
                for at in range(begin + lane * width, end, WARP * width):
                    of.take(shared, x + at, values)
                    of.quantize(values, zero, divisor, most)
                    store(codes + (row + at) * bits // 8, values)
                if lane == 0:
                    pair = scales + pair_bytes * (offset * (head_dim // group_size) + group)
                    store_scale(pair, step)
                    store_scale(pair + scale_bytes, zero)
        else:
            for at in range(lane * width, head_dim, WARP * width):
                of.take(shared, x + at, values)
                store(codes + (row + at) * bits // 8, values)

    return write


def _rounder(scale: str) -> Any:
    """float32 -> the nearest that a scale can be."""
    if scale == "float16":
        return round_to_half

    @device
    def same(x):
        return x

    return same


class Matrix(NamedTuple):
    """How matrix instructions take the elements of a format.

    Attributes
    ----------
    element : str
        "float16" or "bfloat16": what they multiply.
    factor : float
        What products with elements are to be multiplied by. Codes are float16 as they are: subnormal numbers, 2^-24
        times the code, which matrix instructions multiply exactly.
    second : float
        The same once more for every second value: int4's high nibbles stay where they are, 16 times their code.
    capability : (int, int)
        Compute capability of the first devices that have the instructions.
    keys : callable
        ``keys(words, at, i) -> a, b``: elements of step i, of a key whose words begin at `at`, as a B fragment.
    values : callable
        ``values(words, at, row_words, j) -> a0, a1, a2, a3``: tile j of the four values of a lane, as an A fragment.
    order : callable
        ``order(head_dim)`` makes two functions. ``element(j, g, second)``: which element of a value the sums of tile j
        are in lanes 4 g to 4 g + 3, those of rows 8 and on of the tile where `second`. ``find(e) -> j, second``: where
        the e-th of a lane's elements is, of which each four from a multiple of four on are neighbours.
    arrange : callable
        ``arrange(words, count)``: a lane's words of a query in the order in which `keys` has the elements.
    """

    element: str
    factor: float
    second: float
    capability: tuple[int, int]
    keys: Callable[..., Any]
    values: Callable[..., Any]
    order: Callable[[int], tuple[Any, Any]]
    arrange: Callable[..., Any]


def pieces_of_row(bits: int, head_dim: int, lanes: int) -> tuple[int, int]:
    """Of a lane's share of a row that so many lanes have: words that are read together, and how many times."""
    words = head_dim * bits // 32 // lanes
    together = min(4, words)
    return together, words // together


@device
def _as_it_is(words, count):
    """A query for keys whose elements come in their order."""


def _halves(element: str) -> Matrix:
    """Formats of 16 bits: two elements a word."""

    @device
    def keys(words, at, i):
        return words[at + 2 * i], words[at + 2 * i + 1]

    @device
    def values(words, at, row_words, j):
        digits = HIGH_HALVES if j % 2 else LOW_HALVES
        n, m = at + j // 2, at + j // 2 + row_words // 2
        return (
            hw.permute(words[n], words[n + row_words], digits),
            hw.permute(words[m], words[m + row_words], digits),
            hw.permute(words[n + 2 * row_words], words[n + 3 * row_words], digits),
            hw.permute(words[m + 2 * row_words], words[m + 3 * row_words], digits),
        )

    def order(head_dim: int) -> tuple[Any, Any]:
        tiles, together = head_dim // 16, 2 * pieces_of_row(16, head_dim, 8)[0]

        @device
        def element(j, g, second):
            e = j + second * tiles
            return e // together * (8 * together) + g * together + e % together

        @device
        def find(e):
            return e % tiles, e // tiles

        return element, find

    return Matrix(element, 1.0, 1.0, (8, 0), keys, values, order, _as_it_is)


def _bytes(factor: float, capability: tuple[int, int], first_two: Any, last_two: Any) -> Matrix:
    """Formats of 8 bits: of the four elements of a word, the first two and the last two become float16."""

    @device
    def keys(words, at, i):
        word = words[at + i]
        return first_two(word), last_two(word)

    @device
    def values(words, at, row_words, j):
        digits = HIGH_BYTES if j % 2 else LOW_BYTES
        n = at + j // 2
        x = hw.permute(words[n], words[n + row_words], digits)
        y = hw.permute(words[n + 2 * row_words], words[n + 3 * row_words], digits)
        return first_two(x), last_two(x), first_two(y), last_two(y)

    return Matrix("float16", factor, 1.0, capability, keys, values, _neighbours(False), _as_it_is)


def _nibbles() -> Matrix:
    """int4: the words of a lane hold neighbours, the first of each pair in the high nibble of its byte."""

    @device
    def keys(words, at, i):
        word = words[at + i // 2]
        nibbles = HIGH_NIBBLES if i % 2 else LOW_NIBBLES
        return word & nibbles, word >> EIGHT & nibbles

    @device
    def values(words, at, row_words, j):
        digits = HIGH_HALVES if j // 2 % 2 else LOW_HALVES
        n = at + j // 4
        x = hw.permute(words[n], words[n + row_words], digits)
        y = hw.permute(words[n + 2 * row_words], words[n + 3 * row_words], digits)
        if j % 2:
            x, y = x >> EIGHT, y >> EIGHT
        return x & LOW_NIBBLES, x & HIGH_NIBBLES, y & LOW_NIBBLES, y & HIGH_NIBBLES

    @device
    def arrange(words, count):
        for i in range(count // 4):
            a, b, x, y = words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]
            words[4 * i] = hw.permute(a, x, HIGH_HALVES)
            words[4 * i + 1] = hw.permute(b, y, HIGH_HALVES)
            words[4 * i + 2] = hw.multiply_halves(hw.permute(a, x, LOW_HALVES), SIXTEENTH)
            words[4 * i + 3] = hw.multiply_halves(hw.permute(b, y, LOW_HALVES), SIXTEENTH)

    return Matrix("float16", 2.0**24, 1 / 16, (8, 0), keys, values, _neighbours(True), arrange)


def _neighbours(exchanged: bool) -> Callable[[int], tuple[Any, Any]]:
    """`Matrix.order` where the elements of a lane are neighbours; `exchanged`: those of a pair change places."""

    def order(head_dim: int) -> tuple[Any, Any]:
        part = head_dim // 8

        @device
        def element(j, g, second):
            return g * part + 2 * j + (1 - second if exchanged else second)

        @device
        def find(e):
            return e // 2, 1 - e % 2 if exchanged else e % 2

        return element, find

    return order


@device
def _first_two_codes(word):
    return hw.permute(word, ZERO_BITS, FIRST_TWO)


@device
def _last_two_codes(word):
    return hw.permute(word, ZERO_BITS, LAST_TWO)


MATRIX: dict[str, Matrix] = {} if SIMULATED else {
    "float16":  _halves("float16"),
    "bfloat16": _halves("bfloat16"),
    "fp8_e4m3": _bytes(1.0, (8, 9), hw.first_two_e4m3, hw.last_two_e4m3),
    "int8":     _bytes(2.0**24, (8, 0), _first_two_codes, _last_two_codes),
    "int4":     _nibbles(),
}  # fmt: skip
"""Formats with which matrix instructions can multiply; the simulator has none."""
