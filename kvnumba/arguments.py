"""Checks of plain arguments at the public edge. Every error names the argument, what was expected and what came."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np


def integer(argument: str, value: Any, *, minimum: int) -> int:
    """`value` as an int that is at least `minimum`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: expected an integer; got {type(value).__name__} {value!r}") from None
    if not minimum <= number < 2**63:
        expected = f"at least {minimum}" if number < minimum else "less than 2**63"
        raise ValueError(f"{argument}: expected {expected}; got {number}")
    return number


def known_options(given: Iterable[str], known: type) -> None:
    """Raise TypeError for a keyword argument that is none of a TypedDict's."""
    unknown = set(given) - known.__annotations__.keys()
    if unknown:
        expected = ", ".join(known.__annotations__)
        raise TypeError(f"unknown option {min(unknown)!r}; expected some of {expected}")


def integers(argument: str, values: Any, length: int | None = None) -> np.ndarray:
    """`values` as a vector of int64, of a length where one is given."""
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (length is not None and len(array) != length):
        wanted = "a list of" if length is None else f"a list of {length}"
        raise ValueError(
            f"{argument}: expected {wanted} integers; got {array.dtype} of shape {array.shape}"
            if array.dtype != object
            else f"{argument}: expected {wanted} integers; got {values!r}"
        )
    return array.astype(np.int64, copy=False)


def tokens(argument: str, values: Any, length: int | None = None) -> np.ndarray:
    """Token ids as a vector of int64, of a length where one is given; bytes are those of a byte-level model."""
    if isinstance(values, (bytes, bytearray)):
        values = np.frombuffer(values, np.uint8)
    return integers(argument, values, length)


def layer_index(layer: Any, num_layers: int) -> int:
    """`layer` as an int that names one of the layers."""
    layer = integer("layer", layer, minimum=0)
    if layer >= num_layers:
        raise ValueError(f"layer: expected 0 to {num_layers - 1}; got {layer}")
    return layer


def real(argument: str, value: Any) -> float:
    """`value` as a finite float."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: expected a number; got {type(value).__name__} {value!r}") from None
    if not np.isfinite(number):
        raise ValueError(f"{argument}: expected a finite number; got {number}")
    return number


def check_shape(argument: str, array: Any, shape: tuple[int | None, ...], axes: str) -> None:
    """Raise unless the shape is as expected, where None is any length."""
    if array.shape == shape:
        return
    if len(shape) == array.ndim:
        for want, have in zip(shape, array.shape, strict=True):
            if want is not None and want != have:
                break
        else:
            return
    expected = ", ".join(
        name if want is None else f"{name}={want}" for name, want in zip(axes.split(), shape, strict=True)
    )
    raise ValueError(f"{argument}: expected shape ({expected}); got {array.shape}")


F = TypeVar("F", bound=Callable[..., Any])


def also_called(**aliases: str) -> Callable[[F], F]:
    """Let a function be called with other names of its keyword arguments too: ``also_called(old="new")``."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for alias, name in aliases.items():
                if alias in kwargs:
                    if name in kwargs:
                        raise TypeError(f"{alias} is another name of {name}: give one of them")
                    kwargs[name] = kwargs.pop(alias)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
