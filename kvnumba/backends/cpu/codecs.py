"""What each storage format is to the kernels: one class or instance a format, in the table `CODECS`.

A codec writes the code that loads elements for scores and for values, and that encodes and decodes rows. The format is
a number (`Format.number`) on which kernels switch outside their loops: one compiled kernel serves every pair of
formats. Codes equal those of the NumPy backend bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import plain
from kvnumba.backends.cpu.registered import decode_group, encode_group, measure_group
from kvnumba.backends.cpu.simd import (
    EVEN,
    F16,
    F32,
    HAS_BFLOAT16_DOT,
    HAS_HALF,
    I8,
    I16,
    I32,
    LANES,
    ODD,
    Array,
    Emitter,
    Int,
    Pointer,
    constant,
    index,
    size_of,
    vector,
)
from kvnumba.formats import FORMATS, Format

PAIRS = [lane + half * LANES for lane in range(LANES) for half in range(2)]

# Two tokens' 16-bit codes, those of one element side by side.
NEIGHBOURS = [token * 2 * LANES + element for element in range(2 * LANES) for token in range(2)]

Convert = Callable[[Emitter, ir.Value], ir.Value]


class Elements:
    """Float32 elements that are encoded together: vectors in memory, the last perhaps not whole."""

    def __init__(self, e: Emitter, start: Pointer, count: Int) -> None:
        self.full = count // LANES
        self.left = count % LANES
        self._e, self.start = e, start

    def vector(self, i: Int) -> ir.Value:
        """One of the whole vectors."""
        return self._e.load(self.start + i * (4 * LANES), vector(F32))

    def last(self, rest: ir.Value) -> ir.Value:
        """What is left after them, then lanes of `rest`."""
        return self._e.load_some(self.start + self.full * (4 * LANES), self.left, rest)


class FloatCodec:
    """A format whose bits are numbers themselves."""

    as_codes = False
    """Whether keys and values are multiplied as codes: integers, by integers of 16 bits."""
    split = False
    """Whether the even elements of a loaded chunk stand before the odd."""
    tokens = 1
    """Tokens whose values are loaded together."""
    lanes = vector(F32)
    """What a vector of loaded elements is."""
    sums = F32
    """What a sum of products is."""
    vectors = 1
    """Vectors of a loaded chunk."""
    chunk = LANES
    """Elements of a loaded chunk, and of one that is decoded."""

    def __init__(self, fmt: Format, stored: ir.Type, to_float: Convert, from_float: Convert) -> None:
        self.fmt = fmt
        self.stored = stored
        self.chunk_bytes = self.decoded_bytes = size_of(stored) * LANES
        self.decoded = LANES
        self._to_float, self._from_float = to_float, from_float

    def load(self, e: Emitter, pointer: Pointer, row_bytes: Int | None = None) -> list[ir.Value]:
        """A chunk of a key, or with `row_bytes` of a value."""
        return [self._to_float(e, e.load(pointer, vector(self.stored)))]

    def multiply(self, e: Emitter, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
        """total + x * y."""
        return e.fma(x, y, total)

    def decode(self, e: Emitter, stored: ir.Value, step: ir.Value, low: ir.Value) -> list[ir.Value]:
        """Vectors of a chunk in their own order."""
        return [self._to_float(e, stored)]

    def encode(self, e: Emitter, x: Elements, target: Pointer, scale: Array, zero: Array, group: Int) -> None:
        """Store elements, and nothing else: there is no scale."""

        def whole(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            e.store(self._from_float(e, x.vector(i)), target + i * self.chunk_bytes)
            return []

        e.loop(x.full, [], whole)
        with e.builder.if_then(x.left > 0, likely=False):
            codes = self._from_float(e, x.last(constant(0.0)))
            e.store_some(codes, target + x.full * self.chunk_bytes, x.left)


class CodeCodec:
    """A format of unsigned codes with scales and zeros: value = code * scale + zero."""

    as_codes = True
    tokens = 2
    lanes = vector(I16, 2 * LANES)
    sums = I32
    stored = I8
    chunk_bytes = 2 * LANES
    decoded_bytes = LANES

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        self.split = fmt.multiple == 2
        self.vectors = fmt.multiple
        self.chunk = 2 * LANES * fmt.multiple
        self.decoded = LANES * fmt.multiple

    def load(self, e: Emitter, pointer: Pointer, row_bytes: Int | None = None) -> list[ir.Value]:
        """A chunk of a key as 16-bit integers; of values those of two tokens, side by side for each element."""
        if row_bytes is None:
            return self._codes(e, e.load(pointer, vector(I8, 2 * LANES)), I16)
        halves = NEIGHBOURS[: 2 * LANES], NEIGHBOURS[2 * LANES :]
        both = zip(self.load(e, pointer), self.load(e, pointer + row_bytes), strict=True)
        return [e.shuffle(x, y, half) for x, y in both for half in halves]

    def _codes(self, e: Emitter, stored: ir.Value, kind: ir.Type) -> list[ir.Value]:
        """Bytes as integers of a kind: of two codes a byte the even elements, then the odd."""
        b, count = e.builder, stored.type.count
        codes = b.zext(stored, vector(kind, count))
        if not self.split:
            return [codes]
        return [b.lshr(codes, constant(4, kind, count)), b.and_(codes, constant(15, kind, count))]

    def multiply(self, e: Emitter, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
        """total + x * y, of neighbours together."""
        return e.dot(x, y, total)

    def decode(self, e: Emitter, stored: ir.Value, step: ir.Value, low: ir.Value) -> list[ir.Value]:
        """Vectors of a chunk in their own order."""
        b = e.builder
        floats = [b.sitofp(codes, vector(F32)) for codes in self._codes(e, stored, I32)]
        floats = [b.fadd(b.fmul(x, step), low) for x in floats]
        if not self.split:
            return floats
        return [e.shuffle(floats[0], floats[1], half) for half in (PAIRS[:LANES], PAIRS[LANES:])]

    def encode(self, e: Emitter, x: Elements, target: Pointer, scale: Array, zero: Array, group: Int) -> None:
        """Store a group of elements with its scale and zero."""
        b, largest = e.builder, self.fmt.max_code
        low, high = self._limits(e, x)
        step = b.fdiv(b.fsub(high, low), constant(float(largest)))
        step, low = (_store_scale(e, array, group, value) for array, value in ((scale, step), (zero, low)))
        rounded = scale.dtype == types.uint16
        positive = b.fcmp_ordered(">", step, constant(0.0))
        divisor = b.select(positive, step, constant(1.0))

        def bytes_of(x: ir.Value) -> ir.Value:
            return b.trunc(_quantize(e, x, low, divisor, largest, rounded), vector(I8))

        if not self.split:

            def whole(i: Int, _: list[ir.Value]) -> list[ir.Value]:
                e.store(bytes_of(x.vector(i)), target + i * LANES)
                return []

            e.loop(x.full, [], whole)
            with b.if_then(x.left > 0, likely=False):
                e.store_some(bytes_of(x.last(low)), target + x.full * LANES, x.left)
            return

        def packed(first: ir.Value, second: ir.Value) -> ir.Value:
            even, odd = bytes_of(e.shuffle(first, second, EVEN)), bytes_of(e.shuffle(first, second, ODD))
            return b.or_(b.shl(even, constant(4, I8)), odd)

        def pair(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            e.store(packed(x.vector(i * 2), x.vector(i * 2 + 1)), target + i * LANES)
            return []

        e.loop(x.full // 2, [], pair)
        # what is left: perhaps a vector, perhaps some elements
        single = x.full % 2 == 1
        with b.if_then(b.or_(single, x.left > 0), likely=False):
            rest = x.last(low)
            before = e.when(single, [rest], lambda: [x.vector(x.full - 1)])[0]
            after = b.select(single, rest, low)
            more = Int(b, b.select(single, index(LANES), index(0)))
            e.store_some(packed(before, after), target + x.full // 2 * LANES, (more + x.left) // 2)

    def _limits(self, e: Emitter, x: Elements) -> tuple[ir.Value, ir.Value]:
        """The least and the greatest element, in all lanes."""

        def wider(found: list[ir.Value], v: ir.Value) -> list[ir.Value]:
            return [e.min(v, found[0]), e.max(v, found[1])]

        first = e.broadcast(x.start)
        found = e.loop(x.full, [first, first], lambda i, found: wider(found, x.vector(i)))
        found = e.when(x.left > 0, found, lambda: wider(found, x.last(first)))
        return e.reduce(found[0], e.min, 1), e.reduce(found[1], e.max, 1)


def _same(e: Emitter, x: ir.Value) -> ir.Value:
    return x


def half_to_float(e: Emitter, half: ir.Value) -> ir.Value:
    """float16 bits as float32."""
    b, lanes = e.builder, half.type.count
    if HAS_HALF:
        return b.fpext(b.bitcast(half, vector(F16, lanes)), vector(F32, lanes))

    def number(value: float, kind: ir.Type = I32) -> ir.Value:
        return constant(value, kind, lanes)

    integers, floats = vector(I32, lanes), vector(F32, lanes)
    bits = b.zext(half, integers)
    magnitude = b.shl(b.and_(bits, number(0x7FFF)), number(13))
    # the exponent is mended by an exact product; infinity and NaN keep theirs
    finite = b.bitcast(b.fmul(b.bitcast(magnitude, floats), number(2.0**112, F32)), integers)
    special = b.icmp_unsigned(">=", magnitude, number(0x7C00 << 13))
    value = b.select(special, b.or_(magnitude, number(0x7F800000)), finite)
    sign = b.shl(b.and_(bits, number(0x8000)), number(16))
    return b.bitcast(b.or_(value, sign), floats)


def float_to_half(e: Emitter, x: ir.Value) -> ir.Value:
    """float16 bits, rounded to nearest even (the integer path after F. Giesen's float_to_half_fast3_rtne)."""
    b = e.builder
    if HAS_HALF:
        return b.bitcast(b.fptrunc(x, vector(F16)), vector(I16))
    bits = b.bitcast(x, vector(I32))
    sign = b.and_(b.lshr(bits, constant(16, I32)), constant(0x8000, I32))
    bits = b.and_(bits, constant(0x7FFFFFFF, I32))
    # adding 0.5 aligns a subnormal result to the last bits of the mantissa and rounds it
    aligned = b.bitcast(b.fadd(b.bitcast(bits, vector(F32)), constant(0.5)), vector(I32))
    tiny = b.sub(aligned, constant(0x3F000000, I32))
    odd = b.and_(b.lshr(bits, constant(13, I32)), constant(1, I32))
    rounded = b.add(b.add(b.sub(bits, constant(0x38000000, I32)), constant(0xFFF, I32)), odd)
    normal = b.lshr(rounded, constant(13, I32))
    is_nan = b.icmp_unsigned(">", bits, constant(0x7F800000, I32))
    large = b.select(is_nan, constant(0x7E00, I32), constant(0x7C00, I32))
    half = b.select(b.icmp_unsigned("<", bits, constant(0x38800000, I32)), tiny, normal)
    half = b.select(b.icmp_unsigned("<", bits, constant(0x47800000, I32)), half, large)
    return b.trunc(b.or_(half, sign), vector(I16))


def _bfloat16_to_float(e: Emitter, bits: ir.Value) -> ir.Value:
    b = e.builder
    return b.bitcast(b.shl(b.zext(bits, vector(I32)), constant(16, I32)), vector(F32))


def float_to_bfloat16(e: Emitter, x: ir.Value) -> ir.Value:
    """bfloat16 bits, rounded to nearest even."""
    b = e.builder
    bits = b.bitcast(x, vector(I32))
    top = b.lshr(bits, constant(16, I32))
    odd = b.and_(top, constant(1, I32))
    rounded = b.lshr(b.add(b.add(bits, constant(0x7FFF, I32)), odd), constant(16, I32))
    nan = b.or_(top, constant(0x40, I32))
    return b.trunc(b.select(b.fcmp_unordered("uno", x, x), nan, rounded), vector(I16))


def nearest_bfloat16(e: Emitter, x: ir.Value) -> ir.Value:
    """bfloat16 bits of what is going to be multiplied: the processor's own rounding takes subnormals for 0."""
    return e.round_bfloat16(x) if HAS_BFLOAT16_DOT else float_to_bfloat16(e, x)


def _fp8_to_float(e: Emitter, stored: ir.Value) -> ir.Value:
    """Of E4M3 bits: as the upper bits of float16, whose exponent is biased by 8 more; then NaN."""
    b = e.builder
    bits = b.zext(stored, vector(I16))
    size, sign = (b.and_(bits, constant(mask, I16)) for mask in (0x7F, 0x80))
    half = b.or_(b.shl(size, constant(7, I16)), b.shl(sign, constant(8, I16)))
    value = b.fmul(half_to_float(e, half), constant(256.0))
    return b.select(b.icmp_unsigned("==", size, constant(0x7F, I16)), constant(float("nan")), value)


def _float_to_fp8(e: Emitter, x: ir.Value) -> ir.Value:
    """E4M3 bits, rounded to nearest even; what is larger than 448 becomes 448."""
    b = e.builder
    bits = b.bitcast(x, vector(I32))
    sign = b.and_(b.lshr(bits, constant(24, I32)), constant(0x80, I32))
    bits = b.and_(bits, constant(0x7FFFFFFF, I32))
    is_nan = b.icmp_unsigned(">", bits, constant(0x7F800000, I32))
    largest = constant(0x43E00000, I32)  # 448.0
    bits = b.select(b.icmp_unsigned("<", bits, largest), bits, largest)
    odd = b.and_(b.lshr(bits, constant(20, I32)), constant(1, I32))
    rounded = b.add(b.add(bits, constant(0x7FFFF, I32)), odd)
    normal = b.sub(b.lshr(rounded, constant(20, I32)), constant((127 - 7) << 3, I32))
    # below 2**-6 codes count 2**-9: the last bits of a float32 between 2**14 and 2**15 do, and adding rounds to them
    counted = b.bitcast(b.fadd(b.bitcast(bits, vector(F32)), constant(16384.0)), vector(I32))
    subnormal = b.sub(counted, constant(0x46800000, I32))
    code = b.select(b.icmp_unsigned("<", bits, constant(0x3C800000, I32)), subnormal, normal)
    code = b.select(is_nan, constant(0x7F, I32), code)
    return b.trunc(b.or_(code, sign), vector(I8))


def _quantize(
    e: Emitter, x: ir.Value, zero: ir.Value, divisor: ir.Value, largest: int, rounded: bool
) -> ir.Value:
    """Codes (32 bits wide): the same operations as the reference's, none of them fused or reordered.

    Where zero and divisor were `rounded`, to float16, elements may lie outside of the codes.
    """
    b = e.builder
    position = b.fdiv(b.fsub(x, zero), divisor)
    if rounded:
        position = e.min(e.max(position, constant(0.0)), constant(float(largest)))
    shifted = b.fadd(position, constant(12582912.0))  # 1.5 * 2**23: the integer is left in the last bits
    code = b.and_(b.bitcast(shifted, vector(I32)), constant(0x1FF, I32))
    return b.select(b.icmp_unsigned("<", code, constant(largest, I32)), code, constant(largest, I32))


def load_scales(e: Emitter, array: Array, at: Int, lanes: int) -> ir.Value:
    """Scales or zeros from number `at` on, as float32."""
    pointer = array.start + at * array.item_bytes
    if array.dtype == types.uint16:
        return half_to_float(e, e.load(pointer, vector(I16, lanes)))
    return e.load(pointer, vector(F32, lanes))


def _store_scale(e: Emitter, array: Array, at: Int, value: ir.Value) -> ir.Value:
    """Store the number in all lanes of `value` as a scale or zero; returns it as it can be read again."""
    stored = float_to_half(e, value) if array.dtype == types.uint16 else value
    e.store(e.builder.extract_element(stored, I32(0)), array.start + at * array.item_bytes)
    return half_to_float(e, stored) if array.dtype == types.uint16 else value


_BY_NAME: dict[str, Callable[[Format], Any]] = {
    "float32": lambda fmt: FloatCodec(fmt, F32, _same, _same),
    "float16": lambda fmt: FloatCodec(fmt, I16, half_to_float, float_to_half),
    "bfloat16": lambda fmt: FloatCodec(fmt, I16, _bfloat16_to_float, float_to_bfloat16),
    "fp8_e4m3": lambda fmt: FloatCodec(fmt, I8, _fp8_to_float, _float_to_fp8),
    "int8": CodeCodec,
    "int4": CodeCodec,
}

CODECS = [_BY_NAME[name](fmt) for name, fmt in FORMATS.items()]
"""By `Format.number`."""

ALL_FORMATS = range(len(CODECS))

REGISTERED = len(CODECS)
"""`Format.number` of all formats of the user's own."""

FLOAT32, BFLOAT16 = FORMATS["float32"].number, FORMATS["bfloat16"].number

ARITHMETICS = [FLOAT32, BFLOAT16] if HAS_BFLOAT16_DOT else [FLOAT32]
"""Formats in which many rows of queries are multiplied."""

# The same for kernels, as tables by `Format.number`.
AS_CODES = np.array([codec.as_codes for codec in CODECS])
SPLIT = np.array([codec.split for codec in CODECS])
LARGEST_CODE = np.array([codec.fmt.max_code if codec.as_codes else 1 for codec in CODECS])
CODE_BIAS = np.array(
    [(codec.fmt.max_code + 1) // 2 if codec.as_codes else -1 for codec in CODECS], np.float32
)
"""What is taken off codes where their size matters: sums of products with them stay small. -1: not codes."""


@plain
def split_position(d):
    """Where element d of a row stands where the even elements of each chunk come before the odd."""
    within = d % (4 * LANES)
    return d - within + within % 2 * (2 * LANES) + within // 2


@intrinsic
def decode_values(typing, codes, start, count, fmt, scale, zero, group, out, to):
    """Read `count` elements that share a scale: from byte `start` of codes into out[to:], in their own order.

    `out` is of float32; or of uint16 for bfloat16 that is going to be multiplied.
    """
    signature = types.void(
        codes, types.intp, types.intp, types.intp, scale, zero, types.intp, out, types.intp
    )

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        codes, start, count, number, scale, zero, group, out, to = e.arguments(signature, args)
        source = codes.start + start
        item = out.item_bytes
        target = out.start + to * item

        def case(fmt: int) -> None:
            codec = CODECS[fmt]
            step = low = None
            if codec.fmt.has_scale:
                step, low = (
                    e.splat(b.extract_element(load_scales(e, array, group, 1), I32(0)))
                    for array in (scale, zero)
                )

            def values(stored: ir.Value) -> list[ir.Value]:
                chunk = codec.decode(e, stored, step, low)
                return [nearest_bfloat16(e, x) for x in chunk] if out.dtype == types.uint16 else chunk

            def whole(i: Int, _: list[ir.Value]) -> list[ir.Value]:
                stored = e.load(source + i * codec.decoded_bytes, vector(codec.stored))
                for part, x in enumerate(values(stored)):
                    e.store(x, target + (i * (item * codec.decoded) + item * part * LANES))
                return []

            full, left = count // codec.decoded, count % codec.decoded
            e.loop(full, [], whole)
            with b.if_then(left > 0, likely=False):
                empty = ir.Constant(vector(codec.stored), None)
                rest = e.load_some(source + full * codec.decoded_bytes, left // codec.fmt.multiple, empty)
                for part, x in enumerate(values(rest)):
                    some = (left - part * LANES).at_most(LANES)
                    e.store_some(x, target + (full * (item * codec.decoded) + item * part * LANES), some)

        e.switch(number, ALL_FORMATS, case)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def encode_values(typing, x, start, count, fmt, codes, to, scale, zero, group):
    """Store x[start : start + count] from byte `to` of codes on, with one scale and zero."""
    signature = types.void(x, types.intp, types.intp, types.intp, codes, types.intp, scale, zero, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        x, start, count, number, codes, to, scale, zero, group = e.arguments(signature, args)
        elements = Elements(e, x.start + start * 4, count)
        target = codes.start + to
        e.switch(
            number,
            ALL_FORMATS,
            lambda fmt: CODECS[fmt].encode(e, elements, target, scale, zero, group),
        )
        return context.get_dummy_value()

    return signature, generate


def side_by_side(e: Emitter, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two vectors of 16 bits as one of 32."""
    b = e.builder
    low, high = (b.zext(x, vector(I32)) for x in (low, high))
    return b.or_(low, b.shl(high, constant(16, I32)))


@intrinsic
def interleave_rows(typing, codes, first, second, count, out, to):
    """Two rows of 16 bits an element, from bytes `first` and `second` of codes, side by side from byte `to` of out."""
    signature = types.void(codes, types.intp, types.intp, types.intp, out, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        codes, first, second, count, out, to = e.arguments(signature, args)
        target = out.start + to
        rows = [codes.start + first, codes.start + second]
        full, left = count // LANES, count % LANES

        def whole(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            pair = (e.load(row + i * (2 * LANES), vector(I16)) for row in rows)
            e.store(side_by_side(e, *pair), target + i * (4 * LANES))
            return []

        e.loop(full, [], whole)
        with e.builder.if_then(left > 0, likely=False):
            empty = ir.Constant(vector(I16), None)
            pair = (e.load_some(row + full * (2 * LANES), left, empty) for row in rows)
            e.store_some(side_by_side(e, *pair), target + full * (4 * LANES), left)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def scale_at(typing, array, at):
    """A scale or a zero."""
    signature = types.float32(array, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        array, at = e.arguments(signature, args)
        return builder.extract_element(load_scales(e, array, at, 1), I32(0))

    return signature, generate


@intrinsic
def store_scale(typing, array, at, value):
    """Store a scale or a zero; returns it as it can be read again."""
    signature = types.float32(array, types.intp, types.float32)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        array, at, value = e.arguments(signature, args)
        return builder.extract_element(_store_scale(e, array, at, e.splat(value)), I32(0))

    return signature, generate


@plain
def decode_registered(rows, first, count, out, to):
    """`decode_rows` of a format of the user's own, group by group."""
    codes, scale, zero, _, head_dim, functions = rows
    groups = max(1, scale.shape[1])
    size, step = head_dim // groups, codes.shape[1] // groups
    nothing = np.float32(0)
    for group in range(first * groups, (first + count) * groups):
        factor = scale_at(scale, group) if scale.shape[1] > 0 else nothing
        offset = scale_at(zero, group) if zero.shape[1] > 0 else nothing
        decode_group(functions, codes, group * step, step, factor, offset, out, to, size)
        to += size


@plain
def decode_row(rows, row, out, to):
    """Read a row of the storage into out[to : to + head_dim]; out is flat, as for `decode_values`."""
    codes, scale, zero, fmt, head_dim, _ = rows
    if fmt == REGISTERED:
        decode_registered(rows, row, 1, out, to)
        return
    if scale.shape[1] <= 1:  # a row of codes is decoded in the time of two divisions
        decode_values(codes, row * codes.shape[1], head_dim, fmt, scale, zero, row, out, to)
        return
    groups = scale.shape[1]
    size, step = head_dim // groups, codes.shape[1] // groups
    for group in range(groups):
        start = row * codes.shape[1] + group * step
        decode_values(codes, start, size, fmt, scale, zero, row * groups + group, out, to + group * size)


@plain
def decode_rows(rows, first, count, out, to):
    """Read rows from number `first` on, one after the other into out[to:]."""
    codes, scale, zero, fmt, head_dim, _ = rows
    if fmt == REGISTERED:
        decode_registered(rows, first, count, out, to)
        return
    if scale.shape[1] == 0:
        decode_values(codes, first * codes.shape[1], count * head_dim, fmt, scale, zero, 0, out, to)
        return
    for n in range(count):
        decode_row(rows, first + n, out, to + n * rows.head_dim)


@plain
def encode_row(x, start, rows, row):
    """Store x[start : start + head_dim], of a flat x, as a row of the storage."""
    codes, scale, zero, fmt, head_dim, functions = rows
    groups, size, step = max(1, scale.shape[1]), head_dim, codes.shape[1]
    if groups > 1:  # a row may be encoded in the time of two divisions
        size, step = size // groups, step // groups
    for group in range(groups):
        to = row * codes.shape[1] + group * step
        if fmt == REGISTERED:
            number = row * groups + group
            factor, offset = measure_group(functions, x, start + group * size, size)
            if scale.shape[1] > 0:
                factor = store_scale(scale, number, factor)
            if zero.shape[1] > 0:
                offset = store_scale(zero, number, offset)
            encode_group(functions, x, start + group * size, size, codes, to, step, factor, offset)
            continue
        encode_values(x, start + group * size, size, fmt, codes, to, scale, zero, row * groups + group)
