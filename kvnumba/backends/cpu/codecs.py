"""Rows of storage as float vectors, and back: what the formats are to the kernels.

Codes are bytes, whatever their type, and the format is a number that kernels switch on outside their loops:
one compiled kernel serves every pair of formats. Codes equal NumPy's bit for bit.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import plain
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
    Emitter,
    constant,
    index,
    size_of,
    vector,
)
from kvnumba.formats import FORMATS

FORMAT_ID = {name: number for number, name in enumerate(FORMATS)}
FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 = ALL_FORMATS = list(FORMAT_ID.values())

PAIRS = [lane + half * LANES for lane in range(LANES) for half in range(2)]

QUANTIZED = (INT8, INT4)

ARITHMETICS = [FLOAT32, BFLOAT16] if HAS_BFLOAT16_DOT else [FLOAT32]
"""Formats that keys and values are brought to for many rows of queries."""

STORED = {FLOAT32: F32, FLOAT16: I16, BFLOAT16: I16, INT8: I8, INT4: I8}
"""What a chunk has LANES of: values, in int4 pairs of them."""

CHUNK_BYTES = {fmt: size_of(kind) * LANES for fmt, kind in STORED.items()}


def chunk_values(fmt: int) -> int:
    """Values of a chunk."""
    return 2 * LANES if fmt == INT4 else LANES


LARGEST_CODE = {INT8: 255, INT4: 15}
MIDDLE_CODE = {INT8: 128, INT4: 8}
"""What is taken off the codes where their size matters: sums of products with them stay small."""

CODE_BYTES = 2 * LANES  # that `load_codes` reads


def code_vectors(fmt: int) -> int:
    """Vectors that `load_codes` makes."""
    return 2 if fmt == INT4 else 1


def load_floats(e: Emitter, fmt: int, pointer: ir.Value) -> ir.Value:
    """A chunk of a format of floats."""
    return _floats(e, fmt, e.load(pointer, vector(STORED[fmt])))[0]


def load_codes(e: Emitter, fmt: int, pointer: ir.Value) -> list[ir.Value]:
    """CODE_BYTES bytes of codes as 16-bit integers: a vector, or in int4 two, the even elements and the odd."""
    b = e.builder
    words = b.zext(e.load(pointer, vector(I8, CODE_BYTES)), vector(I16, CODE_BYTES))
    if fmt == INT8:
        return [words]
    four, low = (constant(number, I16, CODE_BYTES) for number in (4, 15))
    return [b.lshr(words, four), b.and_(words, low)]


def _floats(e: Emitter, fmt: int, stored: ir.Value) -> list[ir.Value]:
    b = e.builder
    if fmt == FLOAT32:
        return [stored]
    if fmt == FLOAT16:
        return [_half_to_float(e, stored)]
    if fmt == BFLOAT16:
        return [b.bitcast(b.shl(b.zext(stored, vector(I32)), constant(16, I32)), vector(F32))]
    codes = b.zext(stored, vector(I32))
    if fmt == INT8:
        return [b.sitofp(codes, vector(F32))]
    high, low = b.lshr(codes, constant(4, I32)), b.and_(codes, constant(15, I32))
    return [b.sitofp(high, vector(F32)), b.sitofp(low, vector(F32))]


def _half_to_float(e: Emitter, half: ir.Value) -> ir.Value:
    b = e.builder
    if HAS_HALF:
        return b.fpext(b.bitcast(half, vector(F16)), vector(F32))
    bits = b.zext(half, vector(I32))
    magnitude = b.shl(b.and_(bits, constant(0x7FFF, I32)), constant(13, I32))
    # the exponent is mended by an exact product; infinity and NaN keep theirs
    finite = b.bitcast(b.fmul(b.bitcast(magnitude, vector(F32)), constant(2.0**112)), vector(I32))
    special = b.icmp_unsigned(">=", magnitude, constant(0x7C00 << 13, I32))
    value = b.select(special, b.or_(magnitude, constant(0x7F800000, I32)), finite)
    sign = b.shl(b.and_(bits, constant(0x8000, I32)), constant(16, I32))
    return b.bitcast(b.or_(value, sign), vector(F32))


def _float_to_half(e: Emitter, x: ir.Value) -> ir.Value:
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


def _quantize(e: Emitter, x: ir.Value, zero: ir.Value, divisor: ir.Value, largest: int) -> ir.Value:
    """Codes (32 bits wide): the same operations as the reference's, none of them fused or reordered."""
    b = e.builder
    position = b.fdiv(b.fsub(x, zero), divisor)
    rounded = b.fadd(position, constant(12582912.0))  # 1.5 * 2**23: the integer is left in the last bits
    code = b.and_(b.bitcast(rounded, vector(I32)), constant(0x1FF, I32))
    return b.select(b.icmp_unsigned("<", code, constant(largest, I32)), code, constant(largest, I32))


def _load_some(e: Emitter, pointer: ir.Value, count: ir.Value, rest: ir.Value) -> ir.Value:
    """`count` elements, then lanes of `rest`: nothing beyond them is touched."""
    kind = rest.type.element

    def body(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        value = e.load(e.at(pointer, e.builder.mul(i, index(size_of(kind)))), kind)
        return [e.builder.insert_element(carried[0], value, i)]

    return e.loop(count, [rest], body)[0]


def _store_some(e: Emitter, x: ir.Value, pointer: ir.Value, count: ir.Value) -> None:
    """The first `count` lanes of x."""
    size = size_of(x.type.element)

    def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        e.store(e.builder.extract_element(x, i), e.at(pointer, e.builder.mul(i, index(size))))
        return []

    e.loop(count, [], body)


@intrinsic
def decode_values(typing, codes, start, count, fmt, scale, zero, group, out, to):
    """Read `count` values that share a scale: from byte `start` of codes into out[to:], in their own order.

    `out` is of float32; or of uint16 for bfloat16 that is going to be multiplied.
    """
    signature = types.void(
        codes, types.intp, types.intp, types.intp, scale, zero, types.intp, out, types.intp
    )

    def generate(context, builder, _, args):
        e, b = Emitter(context, builder), builder
        _, start, count, number, _, _, group, _, to = args
        source = e.at(e.pointer(codes, args[0]), start)
        short = out.dtype == types.uint16
        item = 2 if short else 4
        target = e.at(e.pointer(out, args[7]), b.mul(to, index(item)))

        def case(fmt: int) -> None:
            size = chunk_values(fmt)
            if fmt in QUANTIZED:
                offset = b.mul(group, index(4))
                step = e.broadcast(e.at(e.pointer(scale, args[4]), offset))
                low = e.broadcast(e.at(e.pointer(zero, args[5]), offset))

            def values(stored: ir.Value) -> list[ir.Value]:
                chunk = in_order(stored)
                return [nearest_bfloat16(e, x) for x in chunk] if short else chunk

            def in_order(stored: ir.Value) -> list[ir.Value]:
                chunk = _floats(e, fmt, stored)
                if fmt in QUANTIZED:
                    chunk = [b.fadd(b.fmul(x, step), low) for x in chunk]
                if fmt == INT4:
                    return [
                        e.shuffle(chunk[0], chunk[1], PAIRS[:LANES]),
                        e.shuffle(chunk[0], chunk[1], PAIRS[LANES:]),
                    ]
                return chunk

            def whole(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                stored = e.load(e.at(source, b.mul(i, index(CHUNK_BYTES[fmt]))), vector(STORED[fmt]))
                for part, x in enumerate(values(stored)):
                    e.store(x, e.at(target, b.add(b.mul(i, index(item * size)), index(item * part * LANES))))
                return []

            full = b.sdiv(count, index(size))
            e.loop(full, [], whole)
            left = b.srem(count, index(size))
            with b.if_then(b.icmp_signed(">", left, index(0)), likely=False):
                rest_of_codes = b.sdiv(left, index(2)) if fmt == INT4 else left
                empty = ir.Constant(vector(STORED[fmt]), None)
                at = e.at(source, b.mul(full, index(CHUNK_BYTES[fmt])))
                for part, x in enumerate(values(_load_some(e, at, rest_of_codes, empty))):
                    rest = b.sub(left, index(part * LANES))
                    rest = b.select(b.icmp_signed("<", rest, index(LANES)), rest, index(LANES))
                    place = b.add(b.mul(full, index(item * size)), index(item * part * LANES))
                    _store_some(e, x, e.at(target, place), rest)

        e.switch(number, ALL_FORMATS, case)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def encode_values(typing, x, start, count, fmt, codes, to, scale, zero, group):
    """Store x[start : start + count] from byte `to` of codes on, with one scale and zero point."""
    signature = types.void(x, types.intp, types.intp, types.intp, codes, types.intp, scale, zero, types.intp)

    def generate(context, builder, _, args):
        e, b = Emitter(context, builder), builder
        _, start, count, number, _, to, _, _, group = args
        source = e.at(e.pointer(x, args[0]), b.mul(start, index(4)))
        target = e.at(e.pointer(codes, args[4]), to)
        full, left = b.sdiv(count, index(LANES)), b.srem(count, index(LANES))

        def chunk(i: ir.Value) -> ir.Value:
            return e.load(e.at(source, b.mul(i, index(4 * LANES))), vector(F32))

        def last(rest: ir.Value) -> ir.Value:
            return _load_some(e, e.at(source, b.mul(full, index(4 * LANES))), left, rest)

        def floats(fmt: int) -> None:
            convert = {FLOAT32: lambda e, v: v, FLOAT16: _float_to_half, BFLOAT16: float_to_bfloat16}[fmt]

            def whole(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                e.store(convert(e, chunk(i)), e.at(target, b.mul(i, index(CHUNK_BYTES[fmt]))))
                return []

            e.loop(full, [], whole)
            with b.if_then(b.icmp_signed(">", left, index(0)), likely=False):
                codes = convert(e, last(constant(0.0)))
                _store_some(e, codes, e.at(target, b.mul(full, index(CHUNK_BYTES[fmt]))), left)

        def limits() -> tuple[ir.Value, ir.Value]:
            def wider(values: list[ir.Value], v: ir.Value) -> list[ir.Value]:
                return [e.min(v, values[0]), e.max(v, values[1])]

            first = e.broadcast(source)
            found = e.loop(full, [first, first], lambda i, carried: wider(carried, chunk(i)))
            some = b.icmp_signed(">", left, index(0))
            found = e.when(some, found, lambda: wider(found, last(first)))
            return e.reduce(found[0], e.min, 1), e.reduce(found[1], e.max, 1)

        def quantized(fmt: int) -> None:
            largest = LARGEST_CODE[fmt]
            low, high = limits()
            step = b.fdiv(b.fsub(high, low), constant(float(largest)))
            positive = b.fcmp_ordered(">", step, constant(0.0))
            divisor = b.select(positive, step, constant(1.0))
            offset = b.mul(group, index(4))
            e.store(b.extract_element(step, I32(0)), e.at(e.pointer(scale, args[6]), offset))
            e.store(b.extract_element(low, I32(0)), e.at(e.pointer(zero, args[7]), offset))

            def bytes_of(x: ir.Value) -> ir.Value:
                return b.trunc(_quantize(e, x, low, divisor, largest), vector(I8))

            if fmt == INT8:

                def whole(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                    e.store(bytes_of(chunk(i)), e.at(target, b.mul(i, index(LANES))))
                    return []

                e.loop(full, [], whole)
                with b.if_then(b.icmp_signed(">", left, index(0)), likely=False):
                    _store_some(e, bytes_of(last(low)), e.at(target, b.mul(full, index(LANES))), left)
                return

            def packed(first: ir.Value, second: ir.Value) -> ir.Value:
                even, odd = bytes_of(e.shuffle(first, second, EVEN)), bytes_of(e.shuffle(first, second, ODD))
                return b.or_(b.shl(even, constant(4, I8)), odd)

            def pair(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                first = b.mul(i, index(2))
                e.store(
                    packed(chunk(first), chunk(b.add(first, index(1)))), e.at(target, b.mul(i, index(LANES)))
                )
                return []

            e.loop(b.sdiv(full, index(2)), [], pair)
            # what is left: perhaps a vector, perhaps some values
            place = e.at(target, b.mul(b.sdiv(full, index(2)), index(LANES)))
            single = b.icmp_signed("==", b.srem(full, index(2)), index(1))
            more = b.icmp_signed(">", left, index(0))
            with b.if_then(b.or_(single, more), likely=False):
                rest = last(low)
                before = e.when(single, [rest], lambda: [chunk(b.sub(full, index(1)))])[0]
                after = b.select(single, rest, low)
                pairs = b.sdiv(b.add(b.select(single, index(LANES), index(0)), left), index(2))
                _store_some(e, packed(before, after), place, pairs)

        e.switch(number, ALL_FORMATS, lambda fmt: quantized(fmt) if fmt in QUANTIZED else floats(fmt))
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

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        source, target = e.pointer(codes, args[0]), e.at(e.pointer(out, args[4]), args[5])
        rows = [e.at(source, first) for first in args[1:3]]
        full, left = b.sdiv(args[3], index(LANES)), b.srem(args[3], index(LANES))

        def whole(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            pair = (e.load(e.at(row, b.mul(i, index(2 * LANES))), vector(I16)) for row in rows)
            e.store(side_by_side(e, *pair), e.at(target, b.mul(i, index(4 * LANES))))
            return []

        e.loop(full, [], whole)
        with b.if_then(b.icmp_signed(">", left, index(0)), likely=False):
            empty = ir.Constant(vector(I16), None)
            pair = (_load_some(e, e.at(row, b.mul(full, index(2 * LANES))), left, empty) for row in rows)
            _store_some(e, side_by_side(e, *pair), e.at(target, b.mul(full, index(4 * LANES))), left)
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.intp, types.intp, out, types.intp), generate


@plain
def decode_row(codes, row, fmt, scale, zero, out, to, head_dim):
    """Read a row of the storage into out[to : to + head_dim]; out is flat, as for `decode_values`."""
    if scale.shape[1] <= 1:  # a row of codes is decoded in the time of two divisions
        decode_values(codes, row * codes.shape[1], head_dim, fmt, scale, zero, row, out, to)
        return
    groups = scale.shape[1]
    size, step = head_dim // groups, codes.shape[1] // groups
    for group in range(groups):
        start = row * codes.shape[1] + group * step
        decode_values(codes, start, size, fmt, scale, zero, row * groups + group, out, to + group * size)


@plain
def encode_row(x, start, head_dim, fmt, codes, row, scale, zero):
    """Store x[start : start + head_dim], of a flat x, as a row of the storage."""
    groups = max(1, scale.shape[1])
    size, step = head_dim // groups, codes.shape[1] // groups
    for group in range(groups):
        to = row * codes.shape[1] + group * step
        encode_values(x, start + group * size, size, fmt, codes, to, scale, zero, row * groups + group)


@plain
def place(token, head, strides):
    """Where a token's head lies in the memory of a view (B, n, heads, ...); strides (n, batch, token, head)."""
    per_batch = strides[0]
    return token // per_batch * strides[1] + token % per_batch * strides[2] + head * strides[3]
