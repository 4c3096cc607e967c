"""The only place that decorates and starts threads: Numba's options, each said once."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from numba import njit, prange, typeof, types
from numba.extending import NativeValue, intrinsic, models, register_model, typeof_impl, unbox

from kvnumba import formats


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

kernel = _cached(OPTIONS)
"""What Python calls, or `launch` in each thread; kept on disk, and so taking a `Static` first. Kernels raise
nothing: in a thread of its own an exception would be lost."""

plain = njit(**OPTIONS)
"""A piece of a kernel, compiled with it."""


class Static:
    """Numbers that kernels are compiled for: an argument whose value is its type.

    Every kernel takes one, with a digest of this folder's sources and of the formats in its name: Numba's disk
    cache looks at the file of a kernel alone, and would not notice that a generator in another has changed.
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


COMMON = static()
"""Of kernels that are the same for all shapes."""


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in [Path(formats.__file__), *sorted(Path(__file__).parent.glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@typeof_impl.register(Static)
def _typeof_static(value: Static, context: Any) -> StaticType:
    return StaticType(value.values)


register_model(StaticType)(models.OpaqueModel)


@unbox(StaticType)
def _unbox_static(kind: StaticType, value: Any, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


@intrinsic
def _call(typing, address, static, worker, workers, job):
    """Call a compiled kernel by its address."""
    kinds = (static, types.intp, types.intp, job)

    def generate(context, builder, signature, arguments):
        function = context.call_conv.get_function_type(types.none, kinds)
        pointer = builder.inttoptr(arguments[0], function.as_pointer())
        context.call_conv.call_function(builder, pointer, types.none, kinds, arguments[1:])
        return context.get_dummy_value()

    return types.void(types.intp, *kinds), generate


@_cached({"parallel": True, **OPTIONS})
def _run(static, address, workers, job):
    for worker in prange(workers):
        _call(address, static, worker, workers, job)


_compiled: dict[tuple[Any, Static], tuple[int, Any]] = {}


def entry(function: Any, static: Static, *rest: Any) -> tuple[int, Any]:
    """The address of a kernel compiled for a `Static`, and what calls it from Python.

    Numba's own dispatch would look at the type of every argument in every call; here they are looked at
    once, and every later call must have arguments of the same types.
    """
    key = (function, static)
    if key not in _compiled:
        signature = tuple(typeof(argument) for argument in (static, *rest))
        function.compile(signature)
        compiled = function.overloads[signature]
        address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        _compiled[key] = address, compiled.entry_point
    return _compiled[key]


def launch(function: Any, static: Static, workers: int, job: tuple[Any, ...]) -> None:
    """Run ``function(static, worker, workers, job)`` in each of some threads; in this one, where it is one.

    The parallel loop calls the kernel by its address. Calling it by name would compile it into the loop once
    more, at each of the four levels of Numba's `prange`: 19 seconds instead of 5 for `attend`.

    Parameters
    ----------
    function : kernel
    static : Static
    workers : int
        At most Numba's thread count is used at the same time.
    job : tuple
        Arrays and scalars; each has the same type in every call of a function.
    """
    address, call = entry(function, static, 0, 1, job)
    if workers == 1:  # a parallel region costs more than small work
        call(static, 0, 1, job)
    else:
        _run(COMMON, address, workers, job)
