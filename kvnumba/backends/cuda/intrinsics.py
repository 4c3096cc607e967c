"""What kernels are built from, with a body for hardware and one for the simulator; chosen once, here.

A kernel keeps a few neighbours of a row in an array of its own, `width` of them: four at most on hardware, where
the array is registers, and the whole row in the simulator, where it is a NumPy array. So the kernels' source is
the same, and the simulator does not take a minute for what takes hardware a microsecond.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

import numpy as np
from numba import float32

from kvnumba.backends.cuda.jit import SIMULATED, device

if SIMULATED:
    from kvnumba.backends.cuda import simulator as machine
else:
    from kvnumba.backends.cuda import hardware as machine  # type: ignore[no-redef]

barrier, warp_barrier, index = machine.barrier, machine.warp_barrier, machine.index
warp_min, warp_max, warp_sum = machine.warp_min, machine.warp_max, machine.warp_sum
load_int, load_float, load_fresh = machine.load_int, machine.load_float, machine.load_fresh
load_half, store_half, round_to_half = machine.load_half, machine.store_half, machine.round_to_half
store_float, store_int, count_up = machine.store_float, machine.store_int, machine.count_up
quotient, remainder = machine.quotient, machine.remainder
bytes_at, floats_at = machine.bytes_at, machine.floats_at
loader, fresh_loader, storer = machine.loader, machine.fresh_loader, machine.storer

LEAST = -1e38
"""Of a maximum over nothing: finite, so that the difference of two such is no NaN."""


def width_of(*lengths: int, most: int = 4) -> int:
    """How many neighbours are handled together, in rows whose parts have such lengths; at most so many on hardware."""
    common = math.gcd(*lengths)
    return common if SIMULATED else math.gcd(common, most)


@functools.cache
def vectors(rows: int, width: int) -> ModuleType:
    """Arithmetic on `values` (width,) and on sums of `rows` rows.

    `shared` is a vector; what is read of it for row r begins at ``at + r * stride``.
    """
    make = _simulated_vectors if SIMULATED else _plain_vectors
    functions = ModuleType(f"vectors_{rows}_{width}")  # the one namespace that Numba looks into
    for function in make(rows, width):
        setattr(functions, function.__name__, function)
    return functions


def _plain_vectors(rows: int, width: int) -> list[Any]:
    zero = float32(0)
    size = rows * width

    @device
    def clear(sums):
        for i in range(rows):
            sums[i] = zero

    @device
    def clear_all(sums):
        for i in range(size):
            sums[i] = zero

    @device
    def put(shared, at, values):
        first = index(at)
        for i in range(width):
            shared[first + index(i)] = values[i]

    @device
    def take(shared, at, values):
        first = index(at)
        for i in range(width):
            values[i] = shared[first + index(i)]

    @device
    def scale(values, factor):
        for i in range(width):
            values[i] *= factor

    @device
    def scale_each(values, factors):
        for i in range(width):
            values[i] *= factors[i]

    @device
    def calibrate(values, shifts, scales):
        for i in range(width):
            values[i] = (values[i] - shifts[i]) / scales[i]

    @device
    def add_scaled(sums, values, at, factor):
        for i in range(width):
            sums[i] += values[index(at + i)] * factor

    @device
    def dequantize(values, step, low):
        for i in range(width):
            values[i] = machine.multiply(values[i], step) + low

    @device
    def quantize(values, low, divisor, most):
        for i in range(width):
            code = float32(machine.round_to_int((values[i] - low) / divisor))
            values[i] = min(max(code, zero), most)

    @device
    def smallest(values):
        found = values[0]
        for i in range(1, width):
            found = min(found, values[i])
        return found

    @device
    def largest(values):
        found = values[0]
        for i in range(1, width):
            found = max(found, values[i])
        return found

    @device
    def dot_rows(sums, shared, at, stride, values):
        for r in range(rows):
            part = shared[index(at + r * stride)] * values[0]
            for i in range(1, width):
                part += shared[index(at + r * stride + i)] * values[i]
            sums[r] += part

    @device
    def scale_rows(sums, shared, at):
        for r in range(rows):
            for i in range(width):
                sums[r * width + i] *= shared[index(at + r)]

    @device
    def outer_rows(sums, shared, at, stride, values):
        for r in range(rows):
            weight = shared[index(at + r * stride)]
            for i in range(width):
                sums[r * width + i] += weight * values[i]

    @device
    def add_rows(sums, shared, at, stride):
        for r in range(rows):
            sums[r] += shared[index(at + r * stride)]

    @device
    def maximum(shared, begin, count, found):
        for i in range(count):
            if shared[index(begin + i)] > found:
                found = shared[index(begin + i)]
        return found

    @device
    def exponentiate(shared, begin, end, step, top):
        for i in range(begin, end, step):
            shared[index(i)] = math.exp(shared[index(i)] - top)

    return [
        clear, clear_all, put, take, scale, scale_each, calibrate, add_scaled, dequantize, quantize, smallest, largest,
        dot_rows, scale_rows, outer_rows, add_rows, maximum, exponentiate,
    ]  # fmt: skip


def _simulated_vectors(rows: int, width: int) -> list[Any]:
    def clear(sums):
        sums[:] = 0

    def clear_all(sums):
        sums[:] = 0

    def put(shared, at, values):
        shared[at : at + width] = values

    def take(shared, at, values):
        values[:] = shared[at : at + width]

    def scale(values, factor):
        values *= np.float32(factor)

    def scale_each(values, factors):
        values *= factors

    def calibrate(values, shifts, scales):
        values[:] = (values - shifts) / scales

    def add_scaled(sums, values, at, factor):
        sums += values[at : at + width] * factor

    def dequantize(values, step, low):
        values *= step
        values += low

    def quantize(values, low, divisor, most):
        values[:] = np.clip(np.rint((values - low) / divisor), 0, most)

    def smallest(values):
        return values.min()

    def largest(values):
        return values.max()

    def matrix(shared, at, stride, length):
        return np.lib.stride_tricks.as_strided(shared[at:], (rows, length), (4 * stride, 4), writeable=False)

    def dot_rows(sums, shared, at, stride, values):
        sums += matrix(shared, at, stride, width) @ values

    def scale_rows(sums, shared, at):
        sums.reshape(rows, width)[:] *= shared[at : at + rows, None]

    def outer_rows(sums, shared, at, stride, values):
        sums.reshape(rows, width)[:] += matrix(shared, at, stride, 1) * values

    def add_rows(sums, shared, at, stride):
        sums += matrix(shared, at, stride, 1)[:, 0]

    def maximum(shared, begin, count, found):
        run = shared[begin : begin + count]
        return max(found, np.max(run, where=~np.isnan(run), initial=found))

    def exponentiate(shared, begin, end, step, top):
        shared[begin:end:step] = np.exp(shared[begin:end:step] - top)

    return [
        clear, clear_all, put, take, scale, scale_each, calibrate, add_scaled, dequantize, quantize, smallest, largest,
        dot_rows, scale_rows, outer_rows, add_rows, maximum, exponentiate,
    ]  # fmt: skip
