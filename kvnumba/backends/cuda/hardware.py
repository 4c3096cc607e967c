"""What kernels need of real hardware beyond plain Numba; `simulator` has the same names.

Memory is addressed by integers. Vector accesses, conversions and matrix products are single PTX instructions
(https://docs.nvidia.com/cuda/parallel-thread-execution/).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import float32, int32, int64, types, uint32
from numba.cuda.extending import intrinsic

from kvnumba.backends.cuda.jit import cuda, device
from kvnumba.backends.mods import array_at, unpacking
from kvnumba.formats import FORMATS, Format

_TYPES = {
    "r": (uint32, ir.IntType(32)),
    "s": (int32, ir.IntType(32)),
    "l": (int64, ir.IntType(64)),
    "f": (float32, ir.FloatType()),
}
F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


PURE, READS, WRITES = range(3)
"""What an instruction does with memory. The compiler may move one that does nothing with it, but not one that reads:
an address may be valid only after a check. One that writes keeps its order with all others that read or write."""


def _call(builder: Any, text: str, results: str, operands: str, args: Any, effect: int = PURE) -> list[Any]:
    """Emit one instruction; returns its results."""
    kinds = [_TYPES[letter][1] for letter in results]
    result = kinds[0] if len(kinds) == 1 else ir.LiteralStructType(kinds) if kinds else ir.VoidType()
    constraints = [f"={letter}" for letter in results] + list(operands)
    if effect == WRITES:
        constraints.append("~{memory}")
    function = ir.FunctionType(result, [_TYPES[letter][1] for letter in operands])
    constraint = ",".join(constraints).replace("s", "r")
    assembly = ir.InlineAsm(function, text, constraint, side_effect=effect != PURE)
    value = builder.call(assembly, args)
    if len(kinds) < 2:
        return [value]
    return [builder.extract_value(value, i) for i in range(len(kinds))]


def _instruction(text: str, results: str, operands: str, effect: int = PURE) -> Any:
    """A function of Numba's that is one instruction."""
    kinds = [_TYPES[letter][0] for letter in results]
    result = (
        types.void if not kinds else kinds[0] if len(kinds) == 1 else types.UniTuple(kinds[0], len(kinds))
    )
    signature = result(*(_TYPES[letter][0] for letter in operands))

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        values = _call(builder, text, results, operands, args, effect)
        if not kinds:
            return context.get_dummy_value()
        return values[0] if len(values) == 1 else context.make_tuple(builder, result, values)

    made = signature, generate
    shapes = {
        1: lambda typing, a: made,
        2: lambda typing, a, b: made,
        3: lambda typing, a, b, c: made,
        10: lambda typing, a, b, c, d, e, f, g, h, i, j: made,
    }
    return intrinsic(shapes[len(operands)])


def unpacker(kinds: tuple[Any, ...]) -> Any:
    """A function that makes a tuple of numbers and arrays, of such types, from the words at an address."""
    result, make = unpacking(kinds)

    @intrinsic
    def unpack(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            return make(context, builder, args[0])

        return result(types.int64), generate

    return unpack


def _viewer(kind: types.Array) -> Any:
    """``at(address, count)``: a vector of what lies in memory."""

    @intrinsic
    def at(typing: Any, address: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            return array_at(context, builder, kind, args[0], [args[1]])

        return kind(types.int64, types.int64), generate

    return at


bytes_at = _viewer(types.Array(types.uint8, 1, "C"))
floats_at = _viewer(types.Array(types.float32, 1, "C"))


_LOADS = {
    (cache, n): f"ld.global.{cache}{'' if n == 1 else f'.v{n}'}.u32 "
    + ("$0, [$1];" if n == 1 else "{" + ", ".join(f"${i}" for i in range(n)) + f"}}, [${n}];")
    for cache in ("nc", "cg", "nc.L1::no_allocate.L2::128B")
    for n in (1, 2, 4)
}
"""Loads of 1, 2 or 4 words of 32 bits, by the caches that keep what they read."""


load_int = _instruction("ld.global.nc.s32 $0, [$1];", "s", "l", READS)
load_float = _instruction("ld.global.nc.f32 $0, [$1];", "f", "l", READS)
load_fresh = _instruction("ld.global.cg.f32 $0, [$1];", "f", "l", WRITES)
store_float = _instruction("st.global.f32 [$0], $1;", "", "lf", WRITES)
store_int = _instruction("st.global.s32 [$0], $1;", "", "ls", WRITES)
load_half = _instruction("{.reg .b16 a; ld.global.nc.b16 a, [$1]; cvt.f32.f16 $0, a;}", "f", "l", READS)
store_half = _instruction("{.reg .b16 a; cvt.rn.f16.f32 a, $1; st.global.b16 [$0], a;}", "", "lf", WRITES)
"""float32 from, and to, a float16 in memory."""
count_up = _instruction("atom.add.acq_rel.gpu.global.u32 $0, [$1], 1;", "s", "l", WRITES)
"""Add 1 to an int32 in memory; returns what it was. A block sees all that those stored which counted before it."""

multiply = _instruction("mul.rn.f32 $0, $1, $2;", "f", "ff")
"""Rounded, also where a sum follows: the compiler makes ``a * b + c`` one rounding, and NumPy two."""
round_to_half = _instruction("{.reg .b16 a; cvt.rn.f16.f32 a, $1; cvt.f32.f16 $0, a;}", "f", "f")
as_float = _instruction("mov.b32 $0, $1;", "f", "r")
as_bits = _instruction("mov.b32 $0, $1;", "r", "f")
permute = _instruction("prmt.b32 $0, $1, $2, $3;", "r", "rrr")
"""Four of the eight bytes of two words of 32 bits, as the digits of the third operand say, the lowest first."""
multiply_halves = _instruction("mul.rn.f16x2 $0, $1, $2;", "r", "rr")
low_half = {
    "float16": _instruction("{.reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, a;}", "f", "r"),
    "bfloat16": _instruction("shl.b32 $0, $1, 16;", "f", "r"),
}
high_half = {
    "float16": _instruction("{.reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, b;}", "f", "r"),
    "bfloat16": _instruction("and.b32 $0, $1, 0xffff0000;", "f", "r"),
}
first_two_e4m3 = _instruction("{.reg .b16 a, b; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 $0, a;}", "r", "r")
last_two_e4m3 = _instruction("{.reg .b16 a, b; mov.b32 {a, b}, $1; cvt.rn.f16x2.e4m3x2 $0, b;}", "r", "r")
"""Two of a word's four fp8_e4m3 as float16, on devices of compute capability 8.9 or more."""
pack_halves = {
    "float16": _instruction("cvt.rn.f16x2.f32 $0, $2, $1;", "r", "ff"),
    "bfloat16": _instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "r", "ff"),
}
multiply_matrices = {
    name: _instruction(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "ffff",
        "rrrrrrffff",
    )
    for name, kind in (("float16", "f16"), ("bfloat16", "bf16"))
}
"""A (16, 16) times B (16, 8) plus C; of lane 4 g + c: A's words are rows g and g + 8 of columns 2c and 2c + 1, then
of 2c + 8 and 2c + 9; B's the same rows of column g; C's rows g and g + 8 of columns 2c and 2c + 1."""


@functools.cache
def fetcher(count: int, shared: bool = False) -> Any:
    """``fetch(address, words, at)``: 1, 2 or 4 words of 32 bits go into an array from `at` on.

    `shared`: other warps of the block read them too, about now.
    """
    return _array_loader(_LOADS["nc" if shared else "nc.L1::no_allocate.L2::128B", count], count, READS)


@functools.cache
def fresh_loader(width: int) -> Any:
    """``load(address, values, at)``: float32 that other blocks of the same launch have written."""
    return _array_loader(_LOADS["cg", width], width, WRITES)


def _array_loader(text: str, count: int, effect: int) -> Any:
    @intrinsic
    def load(typing, address, array, at):
        def generate(context, builder, signature, args):
            found = _call(builder, text, "r" * count, "l", [args[0]], effect)
            memory = context.make_array(array)(context, builder, args[1]).data
            for i, word in enumerate(found):
                value = builder.bitcast(word, context.get_data_type(array.dtype))
                builder.store(value, builder.gep(memory, [builder.add(args[2], I64(i))]))
            return context.get_dummy_value()

        return types.void(types.int64, array, types.int64), generate

    return load


quotient = _instruction("div.s32 $0, $1, $2;", "s", "ss")
"""Of 32 bits: Numba's own is of 64, which the device does not have."""
remainder = _instruction("rem.s32 $0, $1, $2;", "s", "ss")

round_to_int = _instruction("cvt.rni.s32.f32 $0, $1;", "s", "f")
exp2 = _instruction("ex2.approx.ftz.f32 $0, $1;", "f", "f")


def _from_float16(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(builder.trunc(bits, I16), ir.HalfType()), F32)


def _from_bfloat16(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(bits, I32(16)), F32)


def _from_e4m3(builder: Any, bits: Any) -> Any:
    # exponent and mantissa where float32 has them; its exponents count from 2**-127, not from 2**-7
    size = builder.and_(bits, I32(0x7F))
    small = builder.bitcast(builder.shl(size, I32(20)), F32)
    value = builder.bitcast(builder.fmul(small, F32(2.0**120)), I32)
    value = builder.select(builder.icmp_unsigned("==", size, I32(0x7F)), I32(0x7FC00000), value)
    sign = builder.shl(builder.and_(bits, I32(0x80)), I32(24))
    return builder.bitcast(builder.or_(value, sign), F32)


def _from_code(builder: Any, bits: Any) -> Any:
    return builder.uitofp(bits, F32)


def _to_float16(builder: Any, x: Any) -> Any:
    return _call(builder, "{.reg .b16 a; cvt.rn.f16.f32 a, $1; cvt.u32.u16 $0, a;}", "r", "f", [x])[0]


def _to_bfloat16(builder: Any, x: Any) -> Any:
    return _call(builder, "{.reg .b16 a; cvt.rn.bf16.f32 a, $1; cvt.u32.u16 $0, a;}", "r", "f", [x])[0]


def _to_e4m3(builder: Any, x: Any) -> Any:
    # by integers, since devices have an instruction for it from compute capability 8.9 on only
    bits = builder.bitcast(x, I32)
    size = builder.and_(bits, I32(0x7FFFFFFF))
    largest = I32(0x43E00000)  # 448
    clipped = builder.select(builder.icmp_unsigned("<", size, largest), size, largest)
    # nearest even in the 20 bits that go; the exponent then counts from 2**-7
    odd = builder.and_(builder.lshr(clipped, I32(20)), I32(1))
    rounded = builder.add(builder.add(clipped, I32(0x7FFFF)), odd)
    normal = builder.sub(builder.lshr(rounded, I32(20)), I32(120 << 3))
    units = builder.fmul(builder.bitcast(clipped, F32), F32(512.0))
    subnormal = _call(builder, "cvt.rni.s32.f32 $0, $1;", "s", "f", [units])[0]
    code = builder.select(builder.icmp_unsigned("<", clipped, I32(0x3C800000)), subnormal, normal)  # 2**-6
    code = builder.select(builder.icmp_unsigned(">", size, I32(0x7F800000)), I32(0x7F), code)
    return builder.or_(code, builder.and_(builder.lshr(bits, I32(24)), I32(0x80)))


def _to_code(builder: Any, x: Any) -> Any:
    return builder.fptoui(x, I32)


class _Element(NamedTuple):
    """How an element of a format is told from its bits, the lowest of 32, and made; both in LLVM."""

    load: Callable[[Any, Any], Any]
    store: Callable[[Any, Any], Any]


_ELEMENTS = {
    "float32":  _Element(lambda builder, bits: builder.bitcast(bits, F32), lambda builder, x: builder.bitcast(x, I32)),
    "float16":  _Element(_from_float16, _to_float16),
    "bfloat16": _Element(_from_bfloat16, _to_bfloat16),
    "fp8_e4m3": _Element(_from_e4m3, _to_e4m3),
    "int8":     _Element(_from_code, _to_code),
    "int4":     _Element(_from_code, _to_code),
}  # fmt: skip


def _places(fmt: Format, width: int) -> list[tuple[int, int]]:
    """Which 32 bits of some neighbours hold each element, and from which bit on."""
    high_first = 4 if fmt.multiple == 2 else 0  # of two in a byte, the first is the high one
    return [divmod(i * fmt.bits ^ high_first, 32) for i in range(width)]


@functools.cache
def loader(name: str, width: int) -> Any:
    """``load(address, values)``: `width` neighbours in a format become float32; codes stay codes."""
    fmt = FORMATS[name]
    bits, places = width * fmt.bits, _places(fmt, width)
    mask = I32((1 << fmt.bits) - 1)

    @intrinsic
    def load(typing, address, values):
        def generate(context, builder, signature, args):
            if bits >= 32:
                count = bits // 32
                words = _call(builder, _LOADS["nc", count], "r" * count, "l", [args[0]], READS)
            else:
                words = _call(builder, f"ld.global.nc.u{bits} $0, [$1];", "r", "l", [args[0]], READS)
            memory = context.make_array(values)(context, builder, args[1]).data
            for i, (word, at) in enumerate(places):
                element = builder.and_(builder.lshr(words[word], I32(at)), mask)
                value = _ELEMENTS[name].load(builder, element)
                builder.store(value, builder.gep(memory, [I64(i)]))
            return context.get_dummy_value()

        return types.void(types.int64, values), generate

    return load


@functools.cache
def storer(name: str, width: int) -> Any:
    """``store(address, values)``: `width` float32 are rounded to a format; codes are whole numbers already."""
    fmt = FORMATS[name]
    bits, places = width * fmt.bits, _places(fmt, width)

    @intrinsic
    def store(typing, address, values):
        def generate(context, builder, signature, args):
            memory = context.make_array(values)(context, builder, args[1]).data
            words = [I32(0)] * max(1, bits // 32)
            for i, (word, at) in enumerate(places):
                value = builder.load(builder.gep(memory, [I64(i)]))
                element = builder.shl(_ELEMENTS[name].store(builder, value), I32(at))
                words[word] = builder.or_(words[word], element)
            if bits < 32:
                text = f"st.global.u{bits} [$0], $1;"
            elif len(words) == 1:
                text = "st.global.u32 [$0], $1;"
            else:
                registers = ", ".join(f"${i + 1}" for i in range(len(words)))
                text = f"st.global.v{len(words)}.u32 [$0], {{{registers}}};"
            _call(builder, text, "", "l" + "r" * len(words), [args[0], *words], WRITES)
            return context.get_dummy_value()

        return types.void(types.int64, values), generate

    return store


@device
def index(i):
    """An index that is not negative: Numba asks of every signed one whether it is."""
    return uint32(i)


@device
def barrier():
    """Wait for all threads of the block."""
    cuda.syncthreads()


@device
def warp_barrier():
    """Wait for all threads of the warp."""
    cuda.syncwarp()


@device
def warp_min(x):
    """The smallest of the warp's values, in every thread of it."""
    for distance in (16, 8, 4, 2, 1):
        x = min(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, distance))
    return x


@device
def warp_max(x):
    """The largest of the warp's values, in every thread of it."""
    for distance in (16, 8, 4, 2, 1):
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, distance))
    return x


@device
def warp_sum(x):
    """The sum of the warp's values, in every thread of it."""
    for distance in (16, 8, 4, 2, 1):
        x += cuda.shfl_xor_sync(0xFFFFFFFF, x, distance)
    return x
