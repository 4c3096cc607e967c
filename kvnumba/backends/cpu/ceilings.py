"""What this machine can do at most: bytes read from memory and multiply-adds, in a second.

For the benchmarks, and to choose the arithmetic of prompts: not every instruction that there is, is faster.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu import many_tiles, tiles
from kvnumba.backends.cpu.jit import COMMON, kernel, launch
from kvnumba.backends.cpu.simd import F32, HAS_BFLOAT16_DOT, I32, LANES, Emitter, Int, constant, vector
from kvnumba.backends.cpu.tiles import Tiles

BYTES = 1 << 29
AHEAD = 4096  # bytes between what is read and what is prefetched


def _total(e: Emitter, sums: list[ir.Value]) -> ir.Value:
    """The sum of all lanes of some vectors."""
    return e.builder.extract_element(e.reduce(functools.reduce(e.add, sums), e.add, 1), I32(0))


@intrinsic
def _sum(typing, x, begin, end):
    """The sum of whole vectors of x[begin:end], 8 at a time."""

    signature = types.float32(x, types.intp, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        x, begin, end = e.arguments(signature, args)

        def body(i: Int, sums: list[ir.Value]) -> list[ir.Value]:
            line = x.start + (begin * 4 + i * (32 * LANES))
            for offset in range(0, 32 * LANES, 64):
                e.prefetch(line + (offset + AHEAD))
            return [e.add(s, e.load(line + 4 * LANES * n, vector(F32))) for n, s in enumerate(sums)]

        return _total(e, e.loop((end - begin) // (8 * LANES), [constant(0.0)] * 8, body))

    return signature, generate


def _multiply_add(multiply: Callable[[Emitter, ir.Value, ir.Value], ir.Value]) -> Any:
    """A function of `count` rounds of 16 independent multiply-adds, each ``multiply(e, factor, sum)``."""

    @intrinsic
    def multiply_add(typing, count, x):
        signature = types.float32(types.intp, types.float32)

        def generate(context, builder, signature, args):
            e = Emitter(context, builder)
            count, x = e.arguments(signature, args)
            factor = e.splat(x)
            sums = [constant(float(n)) for n in range(16)]
            return _total(e, e.loop(count, sums, lambda i, sums: [multiply(e, factor, s) for s in sums]))

        return signature, generate

    return multiply_add


_floats = _multiply_add(lambda e, factor, total: e.fma(factor, total, factor))
_pairs = _multiply_add(lambda e, factor, total: e.dot_bfloat16(factor, factor, total))


@kernel
def _read(static, worker, workers, job):
    x, out = job
    share = x.shape[0] // workers
    out[worker] = _sum(x, worker * share, (worker + 1) * share)


@kernel
def _compute(static, worker, workers, job):
    count, x, out = job
    out[worker] = _floats(count, x)


@kernel
def _compute_pairs(static, worker, workers, job):
    count, x, out = job
    out[worker] = _pairs(count, x)


@intrinsic
def _multiply_tiles(typing, shape, count):
    """Six sums of products of the same two tiles, over and over."""
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        tile, (_, count) = Tiles(e, static.instructions), e.arguments(signature, args)
        for n in range(8):
            tile.zero(n)

        def products(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            for total in range(6):
                tile.dot_bfloat16(total, 6, 7)
            return []

        e.loop(count, [], products)
        return context.get_dummy_value()

    return types.void(shape, types.intp), generate


@kernel
def _compute_tiles(shape, worker, workers, job):
    shape.begin(shape)
    _multiply_tiles(shape, job[0])
    shape.end(shape)


def reading() -> tuple[Callable[[], None], int]:
    """A call that reads an array much larger than the caches in all threads, and the bytes that it reads."""
    x = np.ones(BYTES // 4, np.float32)
    job = (x, np.zeros(numba.get_num_threads(), np.float32))
    return lambda: launch(_read, COMMON, numba.get_num_threads(), job), x.nbytes


def computing() -> tuple[Callable[[], None], int]:
    """A call that multiplies and adds in all threads, and its floating-point operations, two for each."""
    count, threads = 2_000_000, numba.get_num_threads()
    job = (count, np.float32(0.5), np.zeros(threads, np.float32))
    return lambda: launch(_compute, COMMON, threads, job), 2 * 16 * LANES * count * threads


def computing_on_tiles() -> tuple[Callable[[], None], int] | None:
    """The same of tile instructions, on bfloat16; None where there are none."""
    instructions = tiles.instructions()
    if instructions is None:
        return None
    count, threads = 100_000, numba.get_num_threads()
    shape = many_tiles.shape(many_tiles.ROWS[0], "float32", 1, instructions)
    operations = 2 * 6 * tiles.TILE_ROWS**2 * (tiles.TILE_BYTES // 2) * count * threads
    return lambda: launch(_compute_tiles, shape, threads, (count,)), operations


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether products of bfloat16, of which an instruction makes twice as many, are faster than those of float32.

    On AMD's Zen 4 and 5 such an instruction takes the time of a float32 multiply-add; on Intel's processors it takes
    more than twice as long, and float32 is both faster and more exact. Tried out once, in a millisecond; the fastest
    of several repeats counts.
    """
    if not HAS_BFLOAT16_DOT:
        return False
    job = 5_000, np.float32(0.5), np.zeros(1, np.float32)
    fastest = {_compute: math.inf, _compute_pairs: math.inf}
    for _ in range(10):
        for function in fastest:
            start = time.perf_counter()
            launch(function, COMMON, 1, job)
            fastest[function] = min(fastest[function], time.perf_counter() - start)
    return fastest[_compute_pairs] < 1.4 * fastest[_compute]
