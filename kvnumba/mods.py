"""Users' own functions: checked once, and watched, for a kernel keeps what they read when it was compiled.

A function of numbers is called with numbers here, to see whether it can be; with arrays, or compiled, in backends.
"""

from __future__ import annotations

import builtins
import dis
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from kvnumba.arrays import device_view

SIGNATURES = {
    "score_mod": ("score", "q_head", "q_pos", "kv_pos"),
    "mask_mod": ("q_head", "q_pos", "kv_pos"),
    "block_mask": ("q_low", "q_high", "kv_low", "kv_high"),
}
"""What each function of scores is given; the first two are given `aux` besides."""

SKIP, FULL, PARTIAL = range(3)
"""What a block_mask says of a block: no key in it is seen, all are, or `mask_mod` says which."""

Number = (bool, int, float, np.bool_, np.integer, np.floating)
CONSTANTS = (*Number, str, type(None))
AS_THEY_ARE = (ModuleType, BuiltinFunctionType, np.ufunc, type)
"""What a function may read besides numbers and other functions: ``math``, ``np.tanh``, ``np.float32``, ``abs``."""


class UserFunction:
    """A function that a user gave, as it was when it was first seen.

    Attributes
    ----------
    argument : str
        The name of the option.
    function : FunctionType
    reads : dict
        Names of globals and of variables around the function, and their values: numbers, modules, functions;
        those of the user as `UserFunction` themselves. Nothing of a block_mask, which is never compiled.
    """

    def __init__(self, argument: str, function: FunctionType) -> None:
        self.argument = argument
        self.function = function
        self.reads: dict[str, Any] = _first_read.get(function, {})
        if argument != "block_mask" and function not in _first_read:
            _refuse_raise(self, function.__code__)
            self.reads = {name: self._kept(name, value) for name, value in _outside(self)}
            _first_read[function] = self.reads

    def __str__(self) -> str:
        code = self.function.__code__
        return f"{self.argument}: {code.co_name} ({Path(code.co_filename).name}, line {code.co_firstlineno})"

    @property
    def _takes_aux(self) -> bool:
        return self.argument in SIGNATURES

    def _kept(self, name: str, value: Any) -> Any:
        if _is_constant(value) or isinstance(value, AS_THEY_ARE):
            return value
        if (plain := plain_function(value)) is self.function:
            raise ValueError(f"{self} calls itself, which kernels cannot do")
        if plain is not None:
            return UserFunction(self.argument, plain)
        raise ValueError(
            f"{self} reads {name}, a {type(value).__name__}, whose changes nobody would notice; "
            + ("give arrays and numbers in aux" if self._takes_aux else "keep numbers in a tuple")
        )

    def watch(self) -> None:
        """Raise if what the function reads is not what it was."""
        for name, value in _outside(self) if self.reads else ():
            before = self.reads[name]
            if isinstance(before, UserFunction):
                same = plain_function(value) is before.function
                before.watch()
            else:
                same = value is before or (type(value) is type(before) and value == before)
            if not same:
                remedy = "give what changes in aux, or define the function anew"
                raise ValueError(
                    f"{self} reads {name}, which was {shown(before)} when the function was first used and is "
                    f"{shown(value)} now; {remedy if self._takes_aux else 'register it by another name'}"
                )

    @functools.cached_property
    def digest(self) -> str:
        """Of all that compiled code depends on: the function's own code, and what it reads."""
        found = hashlib.sha256(sys.version.encode())
        for part in _code_parts(self.function.__code__):
            found.update(part)
        found.update(repr(self.function.__defaults__).encode())
        for name, value in sorted(self.reads.items()):
            value = value.digest if isinstance(value, UserFunction) else value
            found.update(f"{name}={value!r};".encode())
        return found.hexdigest()[:16]

    def try_at(self, *numbers: Any) -> Any:
        """What the function returns for some numbers.

        Raises
        ------
        ValueError
            It raises anything, or returns no number.
        """
        names = SIGNATURES[self.argument]
        at = ", ".join(f"{name} {x}" for name, x in zip(names, numbers, strict=False))
        try:
            with np.errstate(all="ignore"):
                found = self.function(*numbers)
        except Exception as error:
            raise ValueError(f"{self} raised {type(error).__name__} for {at}: {error}") from error
        if isinstance(found, np.ndarray) and found.ndim == 0:  # as of np.where
            found = found[()]
        if not isinstance(found, Number):
            raise ValueError(f"{self}: expected it to return a number for {at}; got {shown(found)}")
        return found

    def on_arrays(self, arrays: tuple[Any, ...], aux: tuple[Any, ...], dtype: type) -> np.ndarray:
        """The function of each element of arrays that broadcast together.

        It is called once, with the arrays, where it can be: a function with an ``if`` is called for each element.
        """
        try:
            with np.errstate(all="ignore"):
                try:
                    found = self.function(*arrays, *aux)
                except (TypeError, ValueError):
                    found = np.frompyfunc(lambda *x: self.function(*x, *aux), len(arrays), 1)(*arrays)
                return np.asarray(found, dtype)
        except Exception as error:
            raise ValueError(f"{self} raised {type(error).__name__}: {error}") from error

    def blocks(self, q_low: int, q_high: int, kv_low: int, kv_high: int) -> int:
        """What a block_mask says."""
        found = self.try_at(q_low, q_high, kv_low, kv_high)
        if found not in (SKIP, FULL, PARTIAL):
            raise ValueError(
                f"{self}: expected 0 (skip), 1 (full) or 2 (partial) for queries {q_low} to {q_high} and keys {kv_low} "
                f"to {kv_high}; got {found!r}"
            )
        return int(found)


_first_read: WeakKeyDictionary[FunctionType, dict[str, Any]] = WeakKeyDictionary()
"""What functions read when they were first seen."""


def user_function(argument: str, value: Any, aux: tuple[Any, ...] = ()) -> UserFunction | None:
    """An option that is a function, checked; one that was seen before is as it was then.

    Raises
    ------
    TypeError
        It is no function, or takes other arguments.
    ValueError
        It reads what a kernel cannot keep, raises, or returns no number.
    """
    if value is None:
        return None
    names = SIGNATURES[argument]
    wanted = ", ".join((*names, "*aux") if aux else names)
    function = plain_function(value)
    if function is None:
        raise TypeError(f"{argument}: expected a Python function of ({wanted}); got a {type(value).__name__}")
    found = UserFunction(argument, function)
    try:
        found.try_at(*first_numbers(argument), *aux)
    except ValueError:
        signature = inspect.signature(function)
        try:
            signature.bind(*names, *aux)
        except TypeError:
            count = len(names) + len(aux)
            raise TypeError(
                f"{found}: expected it to take ({wanted}), {count} arguments; it takes {signature}"
            ) from None
        raise
    return found


def first_numbers(argument: str) -> tuple[Any, ...]:
    """What a function is called with to see whether it can be."""
    if argument == "block_mask":
        return 0, 0, 0, 0
    score = (np.float32(0),) if argument == "score_mod" else ()
    return (*score, np.int64(0), np.int64(0), np.int64(0))


def checked_aux(values: Any) -> tuple[Any, ...]:
    """Copies of the arrays and numbers that functions are given besides; floats in float32."""
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"aux: expected a tuple of arrays and numbers; got a {type(values).__name__}")
    return tuple(_checked(f"aux[{n}]", value) for n, value in enumerate(values))


def _checked(argument: str, value: Any) -> Any:
    if device_view(value) is not None:
        raise TypeError(f"{argument}: expected an array in host memory; got one on a GPU")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{argument}: expected numbers; got {shown(value)}")
    wanted = {"f": np.float32, "b": np.bool_}.get(array.dtype.kind, array.dtype if array.ndim else np.int64)
    array = array.astype(wanted, order="C")
    array.flags.writeable = False
    return array if array.ndim else array[()]


def plain_function(value: Any) -> FunctionType | None:
    """The Python function that a value is, or that Numba has compiled."""
    value = getattr(value, "py_func", value)
    return value if isinstance(value, FunctionType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _code_parts(code: CodeType) -> Iterator[bytes]:
    for each in _codes(code):
        constants = [constant for constant in each.co_consts if not isinstance(constant, CodeType)]
        yield each.co_code
        yield repr((constants, each.co_names, each.co_varnames, each.co_freevars, each.co_flags)).encode()


def _outside(found: UserFunction) -> Iterator[tuple[str, Any]]:
    """What a function reads from around it: names and values."""
    function = found.function
    for name in _globals_of(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
        elif not hasattr(builtins, name):
            raise ValueError(f"{found} reads {name}, which is not defined")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            raise ValueError(f"{found} reads {name}, which is not defined") from None


@functools.lru_cache(256)
def _globals_of(code: CodeType) -> tuple[str, ...]:
    names = {
        instruction.argval
        for each in _codes(code)
        for instruction in dis.get_instructions(each)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return tuple(sorted(names))


def _refuse_raise(found: UserFunction, code: CodeType) -> None:
    for each in _codes(code):
        for instruction in dis.get_instructions(each):
            if instruction.opname == "RAISE_VARARGS":
                remedy = "; return -inf, or False" if found.argument in SIGNATURES else ""
                raise ValueError(f"{found} has a raise or an assert, which kernels cannot do{remedy}")


def _is_constant(value: Any) -> bool:
    return isinstance(value, CONSTANTS) or (isinstance(value, tuple) and all(map(_is_constant, value)))


def shown(value: Any) -> str:
    """A value in a message: itself where it is short."""
    if _is_constant(value):
        return repr(value)
    if isinstance(value, UserFunction):
        return "another function"
    return f"a {type(value).__name__}"
