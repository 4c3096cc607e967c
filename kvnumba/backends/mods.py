"""Users' functions for Numba, on a CPU or a GPU: how they are compiled, and how `aux` gets to those of scores.

Scores are float32, and so are a function's numbers: NumPy computes ``score * 0.5`` in float32, and so do kernels.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import typeof, types
from numba.core import cgutils

from kvnumba.codecs import Codec
from kvnumba.mods import UserFunction

_WORD = ir.IntType(64)


def compiled(user: UserFunction, jit: Callable[[Any], Any], replaced: Mapping[Any, Any]) -> Any:
    """A function, and those of the user that it calls, given to a decorator; it reads what it read at first.

    What it calls of Python and NumPy is replaced as a table says.
    """
    function = user.function
    code = _in_float32(function.__code__)

    def as_read(value: Any) -> Any:
        if isinstance(value, UserFunction):
            return compiled(value, jit, replaced)
        if isinstance(value, (float, np.floating, tuple)):
            return _number_in_float32(value)
        if value is math or value is np:
            module = ModuleType(value.__name__)
            for name in code.co_names:
                if hasattr(value, name):
                    setattr(module, name, as_read(getattr(value, name)))
            return module
        return replaced.get(value, value) if callable(value) else value

    reads = {name: as_read(value) for name, value in user.reads.items()}
    outside = {"__builtins__": builtins, "__name__": __name__, **reads}
    cells = tuple(CellType(reads[name]) for name in code.co_freevars)
    return jit(FunctionType(code, outside, function.__name__, function.__defaults__, cells))


def _in_float32(code: CodeType) -> CodeType:
    def converted(constant: Any) -> Any:
        return _in_float32(constant) if isinstance(constant, CodeType) else _number_in_float32(constant)

    return code.replace(co_consts=tuple(map(converted, code.co_consts)))


def _number_in_float32(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_number_in_float32, value))
    return np.float32(value) if isinstance(value, (float, np.floating)) else value


def argument_kinds(user: UserFunction, aux: tuple[types.Type, ...]) -> tuple[types.Type, ...]:
    """The types of a function's arguments."""
    score = (types.float32,) if user.argument == "score_mod" else ()
    return (*score, *[types.int64] * 3, *aux)


def kinds_of_format(codec: Codec) -> dict[str, tuple[types.Type, ...]]:
    """The types of the arguments of each function of a format."""
    floats, codes = types.Array(types.float32, 1, "C"), types.Array(types.uint8, 1, "C")
    numbers = [types.float32] * (len(codec.functions) - 2)
    given = {"encode": (floats, codes, *numbers), "decode": (codes, floats, *numbers)}
    return {name: given.get(name, (floats,)) for name in codec.functions}


def check_number(user: UserFunction, returned: types.Type) -> None:
    """Raise unless what a function returns, the scale or the zero of a format, is a number."""
    if not isinstance(returned, (types.Number, types.Boolean)):
        raise ValueError(f"{user} cannot be compiled: expected it to return a number; its type is {returned}")


def given_both(function: Any, codec: Codec, jit: Callable[[Any], Any]) -> Any:
    """A format's `encode` or `decode`, which is given a scale and a zero, and passes on those that the format has."""

    def alone(x, y, scale, zero):  # type: ignore[no-untyped-def]
        function(x, y)

    def with_scale(x, y, scale, zero):  # type: ignore[no-untyped-def]
        function(x, y, scale)

    def with_both(x, y, scale, zero):  # type: ignore[no-untyped-def]
        function(x, y, scale, zero)

    return jit((alone, with_scale, with_both)[len(codec.functions) - 2])


def does_not_compile(user: UserFunction, error: Exception) -> ValueError:
    """What Numba has to say of a function, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Failed in", "File", "During:"))]
    where = getattr(error, "loc", None)
    at = "" if where is None else f", line {where.line}"
    return ValueError(f"{user} cannot be compiled{at}: {' '.join(lines[:2]).removeprefix('- ')}")


def kinds_of(aux: tuple[Any, ...]) -> tuple[types.Type, ...]:
    """The types of `Scoring.aux`."""
    return tuple(
        types.Array(typeof(x).dtype, x.ndim, "C") if isinstance(x, np.ndarray) else typeof(x) for x in aux
    )


def words_of(aux: tuple[Any, ...], address_of: Callable[[np.ndarray], int]) -> np.ndarray:
    """`Scoring.aux` as integers for `unpacking`: numbers, and of arrays the address and the lengths of the axes."""
    words = [0]
    for x in aux:
        if isinstance(x, np.ndarray):
            words += [address_of(x), *x.shape]
        else:
            words.append(int(x.view(np.int32)) if isinstance(x, np.float32) else int(x))
    return np.array(words[1:] or words, np.int64)


def unpacking(kinds: tuple[types.Type, ...]) -> tuple[types.Type, Callable[..., Any]]:
    """The type of a tuple of `aux`, and what writes how it is made from the words at an address."""
    result = types.Tuple(kinds)

    def generate(context: Any, builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
        words = builder.inttoptr(address, _WORD.as_pointer())
        number = 0

        def word() -> ir.Value:
            nonlocal number
            number += 1
            return builder.load(builder.gep(words, [_WORD(number - 1)]))

        values = []
        for kind in kinds:
            if isinstance(kind, types.Array):
                values.append(array_at(context, builder, kind, word(), [word() for _ in range(kind.ndim)]))
            elif kind == types.float32:
                bits = builder.trunc(word(), ir.IntType(32))
                values.append(builder.bitcast(bits, ir.FloatType()))
            else:
                values.append(
                    word() if kind == types.int64 else builder.trunc(word(), context.get_value_type(kind))
                )
        return context.make_tuple(builder, result, values)

    return result, generate


def array_at(
    context: Any, builder: ir.IRBuilder, kind: Any, address: ir.Value, shape: list[ir.Value]
) -> ir.Value:
    """An array of such a type, of what lies at an address."""
    array = context.make_array(kind)(context, builder)
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides, count = [], _WORD(1)
    for length in reversed(shape):
        strides.append(builder.mul(count, _WORD(size)))
        count = builder.mul(count, length)
    array.data = builder.inttoptr(address, array.data.type)
    array.shape = cgutils.pack_array(builder, shape)
    array.strides = cgutils.pack_array(builder, strides[::-1])
    array.itemsize, array.nitems = _WORD(size), count
    array.meminfo, array.parent = array.meminfo.type(None), array.parent.type(None)
    return array._getvalue()
