"""The only place that decorates and starts threads: Numba's options, each said once."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, prange, typeof, types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import (
    NativeValue,
    intrinsic,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)

from kvnumba import formats
from kvnumba.backends import mods


def _cached(options):
    """A decorator with `options` that keeps compiled code on disk, where the disk allows."""

    def decorate(function):
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # Numba finds no folder that it may write to
            return njit(**options)(function)

    return decorate


# Never with `fastmath`: Numba would relax every operation of a function, also those that `simd` means exactly.
# What is called inherits options that it does not give itself, and so says that it need not be written into its caller.
OPTIONS = {"nogil": True, "error_model": "numpy", "forceinline": False}

kernel = _cached(OPTIONS)
"""What Python calls, or `launch` in each thread; kept on disk, and so taking a `Static` first. Kernels raise
nothing: in a thread of its own an exception would be lost."""

plain = njit(**OPTIONS)
"""A piece of a kernel. Numba compiles it by itself, and again as part of whatever calls it."""

inlined = njit(inline="always", **OPTIONS)
"""A piece that is written into its one caller: large pieces, for those take long to compile."""

each_run = njit(**{**OPTIONS, "forceinline": True})
"""A function of a kernel shape that is called for every run: its many arguments cost more than a jump does."""


@dataclass(frozen=True, eq=False)
class Static:
    """What a kernel is compiled for: an argument whose value is its type.

    In a kernel its attributes are read as usual: integers are constants there, and functions are called. Every kernel
    takes one, with a digest of this folder's sources and of the formats in the name of its type: Numba's disk cache
    looks at the file of a kernel alone, and would not notice that a generator in another has changed.

    Attributes
    ----------
    scale_dtype : str
        Of the scales that the kernel is given, "float32" or "float16".
    """

    scale_dtype: str = "float32"


class StaticType(types.Type):
    """The type of a `Static`, one for each value."""

    def __init__(self, static):
        self.static = static
        super().__init__(name=f"{static}@{_sources()}")


@functools.cache
def static(scale_dtype: str) -> Static:
    """The one `Static` of kernels that differ in the dtype of scales only."""
    return Static(scale_dtype)


COMMON = static("float32")
"""Of kernels that meet no scales."""


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in [Path(formats.__file__), Path(mods.__file__), *sorted(Path(__file__).parent.glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@typeof_impl.register(Static)
def _typeof_static(value: Static, context: Any) -> StaticType:
    return StaticType(value)


register_model(StaticType)(models.OpaqueModel)


@unbox(StaticType)
def _unbox_static(kind: StaticType, value: Any, context: Any) -> NativeValue:
    return NativeValue(context.context.get_dummy_value())


@infer_getattr
class _StaticAttributes(AttributeTemplate):
    key = StaticType

    def generic_resolve(self, kind, name):
        value = getattr(kind.static, name)
        return types.intp if isinstance(value, int) else self.context.resolve_value_type(value)


@lower_getattr_generic(StaticType)
def _static_attribute(context, builder, kind, value, name):
    found = getattr(kind.static, name)
    return context.get_constant(types.intp, found) if isinstance(found, int) else context.get_dummy_value()


@intrinsic
def borrowed(typing, job):
    """The same arrays, whose references are not counted: they are the caller's for as long as a kernel runs.

    Numba counts whenever an array is passed on. Counting all arrays of a named tuple, for each run of 16 tokens, took
    longer than attending to them.
    """

    def generate(context, builder, signature, arguments):
        return _without_owner(context, builder, job, arguments[0])

    return job(job), generate


def _without_owner(context, builder, kind, value):
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = array.meminfo.type(None)
        array.parent = array.parent.type(None)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        for i, part in enumerate(kind.types):
            item = _without_owner(context, builder, part, builder.extract_value(value, i))
            value = builder.insert_value(value, item, i)
    return value


def call_at(context, builder, address, kinds, values):
    """Write a call of a kernel that is compiled for arguments of such types, by its address."""
    kind = context.call_conv.get_function_type(types.none, kinds)
    pointer = builder.inttoptr(address, kind.as_pointer())
    context.call_conv.call_function(builder, pointer, types.none, kinds, values)


_WORD = ir.IntType(64)


@intrinsic
def _share(typing, share, worker, workers, job):
    """Call what `_spread` made, by its address."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [_WORD] * 3)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@_cached({"parallel": True, **OPTIONS})
def _loop(static, share, workers, job):
    for worker in prange(workers):
        _share(share, worker, workers, job)


@intrinsic
def _spread(typing, loop, address, static, workers, job):
    """Call a kernel by its address in each of some threads, which `_loop`, at the address `loop`, starts.

    The job lies on this thread's stack meanwhile, and the threads are given its address.
    """
    kinds = (static, types.intp, types.intp, job)

    def generate(context, builder, signature, arguments):
        loop, address, _, workers, job = arguments
        kept = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [address, job]))
        name = builder.module.get_unique_name("share")
        share = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_WORD] * 3), name)
        share.linkage = "internal"
        b = ir.IRBuilder(share.append_basic_block())
        worker, of, pointer = share.args
        address, job = cgutils.unpack_tuple(b, b.load(b.inttoptr(pointer, kept.type)), 2)
        call_at(context, b, address, kinds, [context.get_dummy_value(), worker, of, job])
        b.ret_void()
        pointers = builder.ptrtoint(share, _WORD), workers, builder.ptrtoint(kept, _WORD)
        call_at(context, builder, loop, _LOOP_KINDS, [context.get_dummy_value(), *pointers])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, static, types.intp, job), generate


_LOOP_KINDS = (typeof(COMMON), *[types.intp] * 3)


@kernel
def _start(static, loop, address, workers, job):
    _spread(loop, address, static, workers, job)


_compiled: dict[tuple[Any, Static], tuple[int, Any]] = {}


def entry(function: Any, static: Static, *rest: Any) -> tuple[int, Any]:
    """The address of a kernel compiled for a `Static`, and what calls it from Python.

    Numba's own dispatch would look at the type of every argument in every call; here they are looked at
    once, and every later call must have arguments of the same types.
    """
    key = (function, static)
    if key not in _compiled:
        _compiled[key] = _compile(function, static, *rest)
    return _compiled[key]


def _kind(kind: types.Type) -> types.Type:
    """The type that serves all values of an argument's kind.

    A read-only array is of another type to Numba, and would be another compilation. Arrays of three axes and more are
    views of new tokens, whose strides differ from call to call.
    """
    if isinstance(kind, types.BaseNamedTuple):
        return types.NamedTuple([_kind(part) for part in kind.types], kind.instance_class)
    if isinstance(kind, types.BaseTuple):
        return types.Tuple([_kind(part) for part in kind.types])
    if isinstance(kind, types.Array):
        return types.Array(kind.dtype, kind.ndim, "A" if kind.ndim > 2 else "C")
    return kind


def _compile(function: Any, *arguments: Any) -> tuple[int, Any]:
    signature = tuple(_kind(typeof(argument)) for argument in arguments)
    function.compile(signature)
    compiled = function.overloads[signature]
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name), compiled.entry_point


_starters: dict[tuple[Any, Static], tuple[Any, int, int]] = {}


def launch(function: Any, static: Static, workers: int, job: tuple[Any, ...]) -> None:
    """Run ``function(static, worker, workers, job)`` in each of some threads; in this one, where it is one.

    One parallel loop serves all kernels, which it calls by their address. Compiling a kernel into a loop of its own
    would compile it at each of the four levels of Numba's `prange`: 19 seconds instead of 5 for `attend`.

    Parameters
    ----------
    function : kernel
    static : Static
    workers : int
        At most Numba's thread count is used at the same time.
    job : tuple
        Arrays, scalars and named tuples of such; each has the same type in every call of a function and a `Static`.
    """
    address, call = entry(function, static, 0, 1, job)
    if workers == 1:  # a parallel region costs more than small work
        call(static, 0, 1, job)
        return
    key = (function, static)
    if key not in _starters:
        loop, _ = entry(_loop, COMMON, 0, 1, 0)
        _, start = _compile(_start, static, loop, address, workers, job)
        _starters[key] = start, loop, address
    start, loop, address = _starters[key]
    start(static, loop, address, workers, job)
