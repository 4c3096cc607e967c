"""What kernels need of real hardware beyond plain Numba; `simulator` has the same names.

Memory is addressed by integers. Vector accesses, conversions and matrix products are single PTX instructions
(https://docs.nvidia.com/cuda/parallel-thread-execution/).
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import float32, int32, int64, types, uint32
from numba.cuda.extending import intrinsic

from kvnumba.backends.cuda.jit import cuda, device

_TYPES = {
    "r": (uint32, ir.IntType(32)),
    "s": (int32, ir.IntType(32)),
    "l": (int64, ir.IntType(64)),
    "f": (float32, ir.FloatType()),
}
F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


PURE, READS, WRITES = range(3)
"""What an instruction has to do with memory: what reads must stay where its address is known to be valid, and
what writes keeps its place among all others."""


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


_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
_LOADS = {
    (cache, n): f"ld.global.{cache}{'' if n == 1 else f'.v{n}'}.u32 "
    + ("$0, [$1];" if n == 1 else "{" + ", ".join(f"${i}" for i in range(n)) + f"}}, [${n}];")
    for cache in ("nc", "cg", "nc.L1::no_allocate.L2::128B")
    for n in (1, 2, 4)
}
"""Of 1, 2 or 4 words; how they pass the caches is part of the instruction."""


load_int = _instruction("ld.global.nc.s32 $0, [$1];", "s", "l", READS)
load_float = _instruction("ld.global.nc.f32 $0, [$1];", "f", "l", READS)
load_fresh = _instruction("ld.global.cg.f32 $0, [$1];", "f", "l", WRITES)
store_float = _instruction("st.global.f32 [$0], $1;", "", "lf", WRITES)
store_int = _instruction("st.global.s32 [$0], $1;", "", "ls", WRITES)
count_up = _instruction("atom.add.acq_rel.gpu.global.u32 $0, [$1], 1;", "s", "l", WRITES)
"""Add 1 to an int32 in memory; returns what it was. What was stored before is seen by whom counts later."""

as_float = _instruction("mov.b32 $0, $1;", "f", "r")
as_bits = _instruction("mov.b32 $0, $1;", "r", "f")
permute = _instruction("prmt.b32 $0, $1, $2, $3;", "r", "rrr")
"""Four of the eight bytes of two words, as the digits of the third operand say, the lowest first."""
multiply_halves = _instruction("mul.rn.f16x2 $0, $1, $2;", "r", "rr")
low_half = {
    "float16": _instruction("{.reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, a;}", "f", "r"),
    "bfloat16": _instruction("shl.b32 $0, $1, 16;", "f", "r"),
}
high_half = {
    "float16": _instruction("{.reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, b;}", "f", "r"),
    "bfloat16": _instruction("and.b32 $0, $1, 0xffff0000;", "f", "r"),
}
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
    """``fetch(address, words, at)``: 1, 2 or 4 words go into an array from `at` on.

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


def _element(builder: Any, fmt: str, word: Any, at: int) -> Any:
    """The float in the bits of a word from `at` on."""
    if fmt == "float32":
        return builder.bitcast(word, F32)
    if fmt == "float16":
        half = builder.trunc(builder.lshr(word, I32(at)), I16)
        return builder.fpext(builder.bitcast(half, ir.HalfType()), F32)
    if fmt == "bfloat16":
        upper = builder.shl(word, I32(16)) if at == 0 else builder.and_(word, I32(0xFFFF0000))
        return builder.bitcast(upper, F32)
    bits = _BITS[fmt]
    if bits == 4:
        at ^= 4  # the first of a pair is the high nibble
    return builder.uitofp(builder.and_(builder.lshr(word, I32(at)), I32((1 << bits) - 1)), F32)


@functools.cache
def loader(fmt: str, width: int) -> Any:
    """``load(address, values)``: `width` neighbours in a format become float32; codes stay codes."""
    bits = width * _BITS[fmt]

    @intrinsic
    def load(typing, address, values):
        def generate(context, builder, signature, args):
            if bits >= 32:
                count = bits // 32
                words = _call(builder, _LOADS["nc", count], "r" * count, "l", [args[0]], READS)
            else:
                words = _call(builder, f"ld.global.nc.u{bits} $0, [$1];", "r", "l", [args[0]], READS)
            memory = context.make_array(values)(context, builder, args[1]).data
            for i in range(width):
                at = i * _BITS[fmt]
                value = _element(builder, fmt, words[at // 32], at % 32)
                builder.store(value, builder.gep(memory, [I64(i)]))
            return context.get_dummy_value()

        return types.void(types.int64, values), generate

    return load


_PAIRS = {"float16": "cvt.rn.f16x2.f32 $0, $2, $1;", "bfloat16": "cvt.rn.bf16x2.f32 $0, $2, $1;"}


@functools.cache
def storer(fmt: str, width: int) -> Any:
    """``store(address, values)``: `width` float32 are rounded to a format; codes are whole numbers already."""
    bits = width * _BITS[fmt]

    @intrinsic
    def store(typing, address, values):
        def generate(context, builder, signature, args):
            memory = context.make_array(values)(context, builder, args[1]).data
            given = [builder.load(builder.gep(memory, [I64(i)])) for i in range(width)]
            if fmt == "float32":
                words = [builder.bitcast(x, I32) for x in given]
            elif fmt in _PAIRS:
                given += given[:1] if width == 1 else []
                words = [
                    _call(builder, _PAIRS[fmt], "r", "ff", given[i : i + 2])[0]
                    for i in range(0, len(given), 2)
                ]
            else:
                word = I32(0)
                for i, x in enumerate(given):
                    at = i * _BITS[fmt] ^ (4 if fmt == "int4" else 0)
                    word = builder.or_(word, builder.shl(builder.fptoui(x, I32), I32(at)))
                words = [word]
            if bits < 32:
                text = f"st.global.u{bits} [$0], $1;"
            else:
                places = ", ".join(f"${i + 1}" for i in range(len(words)))
                text = (
                    f"st.global.v{len(words)}.u32 [$0], {{{places}}};"
                    if len(words) > 1
                    else "st.global.u32 [$0], $1;"
                )
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
