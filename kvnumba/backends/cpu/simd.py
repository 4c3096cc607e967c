"""Explicit vectors for Numba: a thin layer over LLVM's generic vector operations.

Numba's own vectoriser reaches a seventh of the memory bus. Here code generators, called by `intrinsic`s,
write unrolled vector code with ordinary Python loops. LLVM's vectors are generic: one source serves AVX-512,
AVX2, SSE and NEON; only the number of lanes and the float16 conversions are chosen by the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

# IEEE but for the order of sums: NaN and infinity keep their meaning.
REORDERED = ("reassoc", "contract", "nsz", "arcp", "afn")

PREFETCH = "llvm.prefetch.p0" if llvmlite.binding.llvm_version_info[0] >= 17 else "llvm.prefetch.p0i8"


def target_features() -> dict[str, bool]:
    """Features of the processor that Numba compiles for, which ``NUMBA_CPU_FEATURES`` may narrow."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return {name[1:]: name[0] == "+" for name in features.split(",") if name}


_FEATURES = target_features()
LANES = 16 if _FEATURES.get("avx512f") else 8
"""float32 elements of a vector: one AVX-512 register, one AVX2 register, or two of SSE or NEON."""

HAS_HALF = bool(_FEATURES.get("f16c") or _FEATURES.get("avx512f") or _FEATURES.get("fullfp16"))
"""Whether float16 conversions are instructions: where not, LLVM calls library routines that Numba lacks."""

EVEN, ODD = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))

PAIRED_PRODUCTS = (
    "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 and _FEATURES.get("avx512bw")
    else "llvm.x86.avx2.pmadd.wd" if LANES == 8 and _FEATURES.get("avx2")
    else ""
)  # fmt: skip
"""The instruction that multiplies 16-bit integers and sums neighbours, where there is one."""

HAS_BFLOAT16_DOT = LANES == 16 and bool(_FEATURES.get("avx512bf16"))
"""Whether products of bfloat16 are an instruction: where not, float32 is as fast and more exact."""


class _BFloat16(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    """The vector type."""
    return ir.VectorType(element, lanes)


def constant(value: float, element: ir.Type = F32, lanes: int = LANES) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def index(value: int) -> ir.Constant:
    """A 64-bit integer."""
    return ir.Constant(I64, value)


class Emitter:
    """Writes instructions through a builder. Pointers are to bytes, offsets count bytes."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.context = context
        self.builder = builder

    # memory

    def pointer(self, array_type: Any, array: ir.Value) -> ir.Value:
        """To the first byte of an array argument."""
        data = self.context.make_array(array_type)(self.context, self.builder, array).data
        return self.builder.bitcast(data, I8.as_pointer())

    def extent(self, array_type: Any, array: ir.Value, axis: int) -> ir.Value:
        """The length of an axis of an array argument."""
        struct = self.context.make_array(array_type)(self.context, self.builder, array)
        return self.builder.extract_value(struct.shape, axis)

    def at(self, pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
        """`offset` bytes further on."""
        if isinstance(offset, int):
            offset = index(offset)
        return self.builder.gep(pointer, [offset])

    def load(self, pointer: ir.Value, kind: ir.Type) -> ir.Value:
        """A scalar or vector that need not be aligned beyond its elements."""
        value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        value.align = size_of(kind.element if isinstance(kind, ir.VectorType) else kind)
        return value

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        """The same for a store."""
        kind = value.type
        stored = self.builder.store(value, self.builder.bitcast(pointer, kind.as_pointer()))
        stored.align = size_of(kind.element if isinstance(kind, ir.VectorType) else kind)

    def prefetch(self, pointer: ir.Value) -> None:
        """Ask for the cache line of an address, which may be anywhere, to come into the second-level cache.

        The first level has few buffers for lines on their way, and loads need them: asking for that took 1.3
        times as long as asking for this, four times as far ahead.
        """
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, PREFETCH)
        self.builder.call(function, [pointer, I32(0), I32(2), I32(1)])

    # control

    def loop(
        self,
        count: ir.Value,
        carried: Sequence[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """``for i in range(count): carried = body(i, carried)``; returns what was carried last."""
        b = self.builder
        before, head = b.block, b.append_basic_block("loop")
        inside, after = b.append_basic_block("body"), b.append_basic_block("done")
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        values = [b.phi(value.type) for value in carried]
        b.cbranch(b.icmp_signed("<", i, count), inside, after)
        b.position_at_end(inside)
        results = body(i, values)
        following = b.add(i, index(1))
        i.add_incoming(index(0), before)
        i.add_incoming(following, b.block)
        for phi, first, result in zip(values, carried, results, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(result, b.block)
        b.branch(head)
        b.position_at_end(after)
        return values

    def when(
        self,
        condition: ir.Value,
        values: Sequence[ir.Value],
        body: Callable[[], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """``values = body() if condition else values``."""
        b = self.builder
        before = b.block
        with b.if_then(condition):
            results = body()
            inside = b.block
        merged = []
        for value, result in zip(values, results, strict=True):
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            phi.add_incoming(result, inside)
            merged.append(phi)
        return merged

    def switch(self, number: ir.Value, values: Sequence[int], case: Callable[[int], None]) -> None:
        """``case(number)``, written once for each of some values; the last where the number is none of them."""
        b = self.builder
        blocks = {value: b.append_basic_block("case") for value in values}
        after = b.append_basic_block("end")
        choice = b.switch(number, blocks[values[-1]])
        for value in values[:-1]:
            choice.add_case(index(value), blocks[value])
        for value, block in blocks.items():
            b.position_at_end(block)
            case(value)
            b.branch(after)
        b.position_at_end(after)

    # arithmetic

    def call(self, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        """An LLVM intrinsic; llvmlite's own `declare_intrinsic` takes no vectors."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments, fastmath=REORDERED if _is_float(result) else ())

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z, fused where the processor can."""
        return self.call(f"llvm.fmuladd.v{LANES}f32", vector(F32), [x, y, z])

    def add(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """x + y, of floats or of integers."""
        return self.builder.fadd(x, y, flags=REORDERED) if _is_float(x.type) else self.builder.add(x, y)

    def sub(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """x - y."""
        return self.builder.fsub(x, y, flags=REORDERED)

    def mul(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """x * y."""
        return self.builder.fmul(x, y, flags=REORDERED)

    def max(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The greater; y where x is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def min(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The smaller; y where x is NaN."""
        return self.builder.select(self.builder.fcmp_ordered("<", x, y), x, y)

    def any(self, mask: ir.Value) -> ir.Value:
        """Whether a bit of a mask is set."""
        return self.call(f"llvm.vector.reduce.or.v{LANES}i1", I1, [mask])

    def dot(self, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
        """total + x * y, of twice as many 16-bit integers as lanes: neighbours' products are summed in 32 bits.

        With AVX-512 VNNI product and sum become one instruction.
        """
        b = self.builder
        if PAIRED_PRODUCTS:
            return b.add(total, self.call(PAIRED_PRODUCTS, vector(I32), [x, y]))
        for lanes in (EVEN, ODD):
            product = b.mul(*(b.sext(self.pick(v, lanes), vector(I32)) for v in (x, y)))
            total = b.add(total, product)
        return total

    def dot_bfloat16(self, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
        """total + x * y, of pairs of bfloat16 in 32 bits: a pair's products are summed in float32."""
        modern = llvmlite.binding.llvm_version_info[0] >= 16
        kind = ir.VectorType(_BFloat16(), 2 * LANES) if modern else vector(I32)
        x, y = (self.builder.bitcast(v, kind) for v in (x, y))
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", vector(F32), [total, x, y])

    # lanes

    def shuffle(self, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Lanes of x, then of y, by number."""
        return self.builder.shuffle_vector(x, y, ir.Constant(vector(I32, len(lanes)), list(lanes)))

    def pick(self, x: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Lanes of x by number."""
        return self.shuffle(x, ir.Constant(x.type, ir.Undefined), lanes)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """A scalar in every lane."""
        empty = ir.Constant(vector(scalar.type), ir.Undefined)
        return self.pick(self.builder.insert_element(empty, scalar, I32(0)), [0] * LANES)

    def broadcast(self, pointer: ir.Value) -> ir.Value:
        """A float32 in memory in every lane."""
        return self.splat(self.load(pointer, F32))

    def reduce(self, x: ir.Value, operation: Callable[[ir.Value, ir.Value], ir.Value], step: int) -> ir.Value:
        """Combine lanes whose numbers differ by multiples of `step`, and leave the result in each."""
        distance = LANES // 2
        while distance >= step:
            x = operation(x, self.pick(x, [i ^ distance for i in range(LANES)]))
            distance //= 2
        return x

    def sums(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """The sum of each of LANES vectors, of floats or of integers: lane i of the result is that of vectors[i].

        Each round folds two vectors into one: what was spread over a segment of lanes ends in half of it.
        """
        current = [vectors[i] for i in _FOLD_ORDER]
        segment = LANES
        while len(current) > 1:
            half, fold = len(current) // 2, segment // 2
            low, high = [], []
            for start in range(0, LANES, segment):
                for part in range(2):
                    low += [part * LANES + start + j for j in range(fold)]
                    high += [part * LANES + start + fold + j for j in range(fold)]
            current = [
                self.add(
                    self.shuffle(current[i], current[i + half], low),
                    self.shuffle(current[i], current[i + half], high),
                )
                for i in range(half)
            ]
            segment = fold
        return current[0]

    # functions

    def exp(self, x: ir.Value) -> ir.Value:
        """e**x for x <= 0, exactly 0 below -88; Cephes' expf, two units in the last place."""
        b = self.builder
        lowest = constant(-88.02969193111305)  # -127 * ln 2: its power of two has no bits
        x = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)  # NaN stays
        # adding 1.5 * 2**23 rounds to an integer and leaves it in the last bits, biased as an exponent is
        shift = 12582912.0 + 127
        shifted = b.fadd(b.fmul(x, constant(1.4426950408889634)), constant(shift))
        whole = b.fsub(shifted, constant(shift))
        r = self.fma(whole, constant(-0.693359375), x)
        r = self.fma(whole, constant(2.12194440e-4), r)
        p = constant(1.9875691500e-4)
        for coefficient in (
            1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1
        ):  # fmt: skip
            p = self.fma(p, r, constant(coefficient))
        p = self.add(self.fma(p, self.mul(r, r), r), constant(1.0))
        power = b.shl(b.bitcast(shifted, vector(I32)), constant(23, I32))
        return self.mul(p, b.bitcast(power, vector(F32)))

    def tanh(self, x: ir.Value) -> ir.Value:
        """Cephes' tanhf: a polynomial near 0, beyond it through exp."""
        b = self.builder
        sign = b.and_(b.bitcast(x, vector(I32)), constant(-0x80000000, I32))
        size = b.bitcast(b.and_(b.bitcast(x, vector(I32)), constant(0x7FFFFFFF, I32)), vector(F32))
        square = self.mul(x, x)
        p = constant(-5.70498872745e-3)
        for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
            p = self.fma(p, square, constant(coefficient))
        near = self.fma(self.mul(p, square), x, x)
        decay = self.exp(self.mul(size, constant(-2.0)))
        far = b.fdiv(self.sub(constant(1.0), decay), self.add(constant(1.0), decay))
        far = b.bitcast(b.or_(b.bitcast(far, vector(I32)), sign), vector(F32))
        return b.select(b.fcmp_ordered("<", size, constant(0.625)), near, far)


def _fold_order() -> list[int]:
    """The order in which `Emitter.sums` must be given vectors for their sums to come out in lanes 0, 1, 2..."""
    lanes = [[i] * LANES for i in range(LANES)]
    segment = LANES
    while len(lanes) > 1:
        half, fold = len(lanes) // 2, segment // 2
        folded = []
        for x, y in zip(lanes[:half], lanes[half:], strict=True):
            merged: list[int] = []
            for start in range(0, LANES, segment):
                merged += x[start : start + fold] + y[start : start + fold]
            folded.append(merged)
        lanes, segment = folded, fold
    order = [0] * LANES
    for lane, source in enumerate(lanes[0]):
        order[source] = lane
    return order


_FOLD_ORDER = _fold_order()


def size_of(kind: ir.Type) -> int:
    """Bytes of an element."""
    return {F16: 2, F32: 4, I8: 1, I16: 2, I32: 4, I64: 8}[kind]


def _is_float(kind: ir.Type) -> bool:
    return kind == F32 or (isinstance(kind, ir.VectorType) and kind.element == F32)
