"""Tile instructions (Intel AMX): eight registers of 16 rows of 64 bytes, and products of them.

A process must ask Linux for tiles; without permission a tile instruction ends it. So the backend asks when it starts
(`instructions`), and kernels are compiled for what the answer was. LLVM neither allocates nor saves these registers:
a kernel holds tiles within one intrinsic only, and calls nothing meanwhile.

A stand-in, the same semantics in plain code, runs on every processor; it is slow, and there for tests.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils

from kvnumba.backends.cpu.simd import F32, I8, I32, Emitter, Int, Pointer, index, target_features, vector

AMX, STAND_IN = "amx", "stand-in"

TILE_ROWS, TILE_BYTES = 16, 64  # rows of a tile, and bytes of a row
TILE = TILE_ROWS * TILE_BYTES

WIDEST = 256  # elements of a row that the kernels take

_ARCH_PRCTL, _GET_PERMISSION, _ASK_PERMISSION, _TILE_DATA = 158, 0x1022, 0x1023, 18

_FEATURES = ("amx-tile", "amx-bf16", "amx-int8")

_SIGNED = {"busd": (False, True), "buud": (False, False), "bssd": (True, True), "bsud": (True, False)}

_VOID = ir.VoidType()


@functools.cache
def instructions() -> str | None:
    """What tile kernels are compiled for: AMX, or None where there are no tiles or the process may not use them.

    The first call asks for permission, which then holds for all threads of the process, also those that run already.
    """
    return None if unavailable_reason() else AMX


@functools.cache
def unavailable_reason() -> str | None:
    """Why tiles cannot be used; None if they can. See `instructions`."""
    features = target_features()
    missing = [name for name in _FEATURES if not features.get(name)]
    if missing:
        return f"no: the processor has no {' '.join(missing)}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"no: not asked for on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    granted = ctypes.c_ulong()
    if libc.syscall(_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA) != 0:
        return f"no: the system refused them (errno {ctypes.get_errno()})"
    libc.syscall(_ARCH_PRCTL, _GET_PERMISSION, ctypes.byref(granted))
    return None if granted.value >> _TILE_DATA & 1 else "no: the system did not grant them"


class Tiles:
    """Writes tile instructions, or the stand-in's code. Tiles are numbers from 0 to 7, each of 16 rows of 64 bytes."""

    def __init__(self, e: Emitter, instructions: str) -> None:
        self._e = e
        self._real = instructions == AMX
        if not self._real:
            memory = cgutils.alloca_once(e.builder, ir.ArrayType(I8, 8 * TILE))
            self._memory = Pointer(e.builder, e.builder.bitcast(memory, I8.as_pointer()))

    def configure(self) -> None:
        """Before a thread's first tile: every tile has all rows and bytes."""
        if self._real:
            module = self._e.builder.module
            shape = [1, *[0] * 15, *[TILE_BYTES, 0] * 8, *[0] * 16, *[TILE_ROWS] * 8, *[0] * 8]
            bits = ir.Constant(ir.ArrayType(I8, 64), bytearray(shape))
            where = cgutils.global_constant(module, module.get_unique_name("tiles"), bits)
            self._call("ldtilecfg", self._e.builder.bitcast(where, I8.as_pointer()))

    def release(self) -> None:
        """After its last: without it, every switch of threads would save the tiles."""
        if self._real:
            self._call("tilerelease")

    def zero(self, tile: int) -> None:
        """All numbers of a tile become 0."""
        if self._real:
            self._call("tilezero", I8(tile))
            return
        for row in range(TILE_ROWS):
            self._e.store(ir.Constant(vector(I32, 16), None), self._row(tile, row))

    def load(self, tile: int, pointer: Pointer, stride: Int | int) -> None:
        """Rows of memory, `stride` bytes apart, into a tile."""
        if self._real:
            self._call("tileloadd64", I8(tile), pointer.value, _word(stride))
            return
        for row in range(TILE_ROWS):
            self._e.store(self._e.load(pointer + stride * row, vector(I32, 16)), self._row(tile, row))

    def store(self, tile: int, pointer: Pointer, stride: Int | int) -> None:
        """A tile into rows of memory, `stride` bytes apart."""
        if self._real:
            self._call("tilestored64", I8(tile), pointer.value, _word(stride))
            return
        for row in range(TILE_ROWS):
            self._e.store(self._e.load(self._row(tile, row), vector(I32, 16)), pointer + stride * row)

    def dot_bfloat16(self, total: int, x: int, y: int) -> None:
        """total += x * y: (16, 16) float32, (16, 16 pairs) bfloat16 and (16 pairs, 16, 2) bfloat16.

        The first and the second numbers of the pairs are summed apart, from 0 on, then together. Tiles take subnormal
        numbers for 0; the stand-in does not.
        """
        if self._real:
            self._call("tdpbf16ps", I8(total), I8(x), I8(y))
            return
        b = self._e.builder

        def both(pairs: ir.Value) -> list[ir.Value]:
            """The first and the second numbers of pairs."""
            count = pairs.type.count
            shift, mask = (ir.Constant(vector(I32, count), [bits] * count) for bits in (16, -65536))
            return [b.bitcast(x, vector(F32, count)) for x in (b.shl(pairs, shift), b.and_(pairs, mask))]

        def product(pair: ir.Value, row: Pointer, sums: list[ir.Value]) -> list[ir.Value]:
            factors = zip(both(pair), both(self._e.load(row, vector(I32, 16))), sums, strict=True)
            return [b.fadd(s, b.fmul(x, y)) for x, y, s in factors]

        self._each_row(total, x, y, [ir.Constant(vector(F32, 16), None)] * 2, product, b.fadd)

    def dot_bytes(self, kind: str, total: int, x: int, y: int) -> None:
        """total += x * y: (16, 16) int32, (16, 16 fours) bytes and (16 fours, 16, 4) bytes.

        The kind is "busd", "buud", "bssd" or "bsud": whether bytes of x, then of y, are signed or unsigned.
        """
        if self._real:
            self._call("tdp" + kind, I8(total), I8(x), I8(y))
            return
        b = self._e.builder

        def number(fours: ir.Value, n: int, signed: bool) -> ir.Value:
            count = fours.type.count
            shift, most = (ir.Constant(vector(I32, count), [bits] * count) for bits in (24 - 8 * n, 24))
            return (b.ashr if signed else b.lshr)(b.shl(fours, shift), most)

        def product(four: ir.Value, row: Pointer, sums: list[ir.Value]) -> list[ir.Value]:
            fours, found = self._e.load(row, vector(I32, 16)), sums[0]
            for n in range(4):
                x, y = (number(v, n, s) for v, s in zip((four, fours), _SIGNED[kind], strict=True))
                found = b.add(found, b.mul(x, y))
            return [found]

        self._each_row(total, x, y, [ir.Constant(vector(I32, 16), None)], product, b.add)

    def _each_row(
        self,
        total: int,
        x: int,
        y: int,
        zeros: list[ir.Value],
        product: Callable[[ir.Value, Pointer, list[ir.Value]], list[ir.Value]],
        add: Callable[[ir.Value, ir.Value], ir.Value],
    ) -> None:
        """The stand-in of a product: each 32 bits of a row of x with the row of y of the same number."""
        e, b = self._e, self._e.builder

        def row(r: Int, _: list[ir.Value]) -> list[ir.Value]:
            def step(k: Int, sums: list[ir.Value]) -> list[ir.Value]:
                word = e.load(self._memory + (r * TILE_BYTES + k * 4 + x * TILE), I32)
                words = ir.Constant(vector(I32, 16), ir.Undefined)
                words = b.insert_element(words, word, I32(0))
                words = b.shuffle_vector(words, words, ir.Constant(vector(I32, 16), [0] * 16))
                return product(words, self._memory + (k * TILE_BYTES + y * TILE), sums)

            sums = e.loop(TILE_ROWS, zeros, step)
            where = self._memory + (r * TILE_BYTES + total * TILE)
            before = e.load(where, vector(zeros[0].type.element, 16))
            e.store(add(before, functools.reduce(add, sums)), where)
            return []

        e.loop(TILE_ROWS, [], row)

    def _row(self, tile: int, row: int) -> Pointer:
        return self._memory + (tile * TILE + row * TILE_BYTES)

    def _call(self, name: str, *arguments: ir.Value) -> None:
        kind = ir.FunctionType(_VOID, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self._e.builder.module, kind, f"llvm.x86.{name}")
        self._e.builder.call(function, arguments)


def _word(x: Int | int) -> ir.Value:
    return x.value if isinstance(x, Int) else index(x)
