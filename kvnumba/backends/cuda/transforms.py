"""Row transforms in kernels: `kvnumba.transforms` says what they are.

A rotation is sums and differences of pairs whose numbers differ in one bit, for each bit in turn. It does not matter
which bit comes first, nor where a row's elements lie: in shared memory, or in the registers of several lanes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba import float32, int32

from kvnumba.backends.cuda.intrinsics import index
from kvnumba.backends.cuda.jit import SIMULATED, cuda, device
from kvnumba.storage import Layout
from kvnumba.transforms import rotate as rotate_rows
from kvnumba.transforms import rotation_size


class Transform(NamedTuple):
    """What is done to rows, as far as kernels are compiled for it.

    Attributes
    ----------
    keys, values : int
        Elements of a key, and of a value, that are rotated together. 1: none are.
    calibrated : bool
        Whether keys are shifted and scaled.
    """

    keys: int
    values: int
    calibrated: bool

    @property
    def of_queries(self) -> bool:
        """Whether queries are not multiplied with stored keys as they are."""
        return self.keys > 1 or self.calibrated


NONE = Transform(1, 1, calibrated=False)


def transform_of(layout: Layout) -> Transform:
    """What a layout asks for."""
    transform = layout.transform
    if transform is None:
        return NONE
    sizes = (
        rotation_size(rows.head_dim) if transform.rotation else 1 for rows in (layout.keys, layout.values)
    )
    return Transform(*sizes, calibrated=transform.calibration is not None)


@functools.cache
def rotation_in_shared(size: int, wait: Any) -> Any:
    """``rotate(shared, at, count, thread, threads)``: rows of `count` elements together, which threads have put there.

    The threads, all that `wait` waits for, have waited for each other before, and have again when it returns.
    """
    make = _simulated_rotation if SIMULATED else _rotation_in_shared
    return make(size, wait)


def _rotation_in_shared(size: int, wait: Any) -> Any:
    one, norm = float32(1), float32(size**-0.5)

    @device
    def rotate(shared, at, count, thread, threads):
        half, factor = int32(1), norm
        while half < size:
            for i in range(thread, count >> 1, threads):
                first = at + i + (i & -half)
                second = first + half
                x, y = shared[index(first)], shared[index(second)]
                shared[index(first)], shared[index(second)] = (x + y) * factor, (x - y) * factor
            wait()
            half, factor = half * int32(2), one

    return rotate


def _simulated_rotation(size: int, wait: Any) -> Any:
    def rotate(shared, at, count, thread, threads):
        if thread == 0:
            shared[at : at + count] = rotate_rows(shared[at : at + count].reshape(-1, size)).reshape(-1)
        wait()

    return rotate


@functools.cache
def rotation_in_lanes(count: int, distance: int, lanes: int) -> Any:
    """``rotate(values)``: elements of which each lane has `count`, together with other lanes of its warp.

    So many `lanes` share them, whose numbers differ in the bits from `distance` on. All lanes of the warp call it.
    """
    norm, half = float32((count * lanes) ** -0.5), count // 2
    distances = [distance << n for n in range(lanes.bit_length() - 1)]

    def of_lane(bit: int) -> Any:
        @device
        def stage(values):
            for i in range(half):
                first = i + (i & -bit)
                x, y = values[first], values[first + bit]
                values[first], values[first + bit] = x + y, x - y

        return stage

    def of_lanes(bit: int) -> Any:
        one = float32(1)

        @device
        def stage(values):
            sign = -one if int32(cuda.threadIdx.x) & int32(bit) else one
            for i in range(count):
                values[i] = cuda.shfl_xor_sync(0xFFFFFFFF, values[i], bit) + sign * values[i]

        return stage

    @device
    def scale(values):
        for i in range(count):
            values[i] *= norm

    def both(first: Any, second: Any) -> Any:
        @device
        def stages(values):
            first(values)
            second(values)

        return stages

    stages = [of_lane(1 << n) for n in range(count.bit_length() - 1)] + [of_lanes(bit) for bit in distances]
    return functools.reduce(both, stages, scale)
