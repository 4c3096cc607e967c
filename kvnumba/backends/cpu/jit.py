"""The only place that decorates: Numba's options, each said once, and what is fixed when kernels compile."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.extending import NativeValue, models, register_model, typeof_impl, unbox


def _cached(options):
    """A decorator with `options` that keeps compiled code on disk, where the disk allows."""

    def decorate(function):
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # Numba finds no folder that it may write to
            return njit(**options)(function)

    return decorate


# Never with `fastmath`: Numba would relax every operation of a function, also those that `simd` means exactly.
OPTIONS = {"nogil": True, "error_model": "numpy"}

kernel = _cached({"parallel": True, **OPTIONS})
"""What Python calls, over `prange`."""

serial_kernel = _cached(OPTIONS)
"""What Python calls, in one thread."""

plain = njit(**OPTIONS)
"""A serial piece of a kernel. Only kernels are kept on disk: they take a `Static`, and so notice changes."""


class Static:
    """Numbers that kernels are compiled for: an argument whose value is its type.

    Every kernel takes one, with a digest of this folder's sources in its name: Numba's disk cache looks at
    the file of a kernel alone, and would not notice that a generator in another file has changed.
    """

    def __init__(self, *values: int) -> None:
        self.values = values


class StaticType(types.Type):
    """The type of a `Static`, one for each tuple of values."""

    def __init__(self, values):
        self.values = values
        super().__init__(name=f"Static{values}@{_sources()}")


@functools.cache
def static(*values: int) -> Static:
    """The one `Static` of some numbers."""
    return Static(*values)


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@typeof_impl.register(Static)
def _typeof_static(value: Static, context: Any) -> StaticType:
    return StaticType(value.values)


register_model(StaticType)(models.OpaqueModel)


@unbox(StaticType)
def _unbox_static(kind: StaticType, value: Any, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())
