"""Storage formats of the user's own: what a few numbers of a key or a value become, said by Python functions.

The functions are called here as they are, group by group, which is what they mean; compiled in backends.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kvnumba.arguments import integer
from kvnumba.formats import FORMATS, REGISTERED, Format
from kvnumba.mods import Number, UserFunction, plain_function, shown

MOST_BITS = 15
TRIED_SIZE = 128  # elements of the group that functions are tried with when they are registered

PARAMETERS = {
    "scale": ("x",),
    "zero": ("x",),
    "encode": ("x", "codes", "scale", "zero"),
    "decode": ("codes", "x", "scale", "zero"),
}
"""What each function is given; no scale or zero where the format has none."""


class Codec:
    """The functions of a registered format, checked.

    Attributes
    ----------
    name : str
        Of the format.
    functions : dict of str to UserFunction
        By the name of the argument: "encode", "decode", and "scale" and "zero" where the format has them.
    """

    def __init__(self, name: str, bits: int, functions: dict[str, UserFunction]) -> None:
        self.name = name
        self.functions = functions
        self._bits = bits
        self._tried: set[int] = set()

    # formats of the same code are the same, and kernels of them are compiled once
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @functools.cached_property
    def digest(self) -> str:
        """Of all that codes depend on."""
        parts = [str(self._bits), *(f"{name}={each.digest}" for name, each in self.functions.items())]
        return hashlib.sha256(";".join(parts).encode()).hexdigest()[:16]

    def watch(self) -> None:
        """Raise if what the functions read is not what it was."""
        for function in self.functions.values():
            function.watch()

    def encode(
        self, groups: np.ndarray, scale_dtype: np.dtype[Any]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Codes (N, bytes of a group), scales (N,) and zeros (N,) of groups (N, elements) float32."""
        found = {
            name: np.array([self._number(name, x) for x in groups], np.float32).astype(scale_dtype)
            for name in ("scale", "zero")
            if name in self.functions
        }
        codes = np.zeros((len(groups), groups.shape[1] * self._bits // 8), np.uint8)
        read = [numbers.astype(np.float32) for numbers in found.values()]
        for n, x in enumerate(groups):
            self._fill("encode", x, codes[n], *(numbers[n] for numbers in read))
        return codes, found.get("scale"), found.get("zero")

    def decode(self, codes: np.ndarray, *numbers: np.ndarray) -> np.ndarray:
        """The inverse of `encode`: (N, elements) float32. `numbers` are the scales and zeros that there are."""
        out = np.empty((len(codes), codes.shape[1] * 8 // self._bits), np.float32)
        read = [each.astype(np.float32) for each in numbers]
        for n in range(len(codes)):
            self._fill("decode", codes[n], out[n], *(each[n] for each in read))
        return out

    def try_at(self, size: int) -> None:
        """Raise unless the functions can be called for groups of so many elements, and do what they are for."""
        if size in self._tried:
            return
        for x in (np.random.default_rng(0).standard_normal(size), np.zeros(size)):
            x = x.astype(np.float32)
            numbers = [
                np.float32(self._number(name, x)) for name in ("scale", "zero") if name in self.functions
            ]
            over = [np.full(size * self._bits // 8, fill, np.uint8) for fill in (0, 255)]
            x.flags.writeable = False
            for codes in over:
                self._fill("encode", x, codes, *numbers)
            if (over[0] != over[1]).any():
                at = int(np.flatnonzero(over[0] != over[1])[0])
                raise ValueError(
                    f"{self.functions['encode']}: expected it to set all {len(over[0])} bytes of codes, whatever they "
                    f"were, for {size} elements; it left some of codes[{at}]"
                )
            over[0].flags.writeable = False
            out = np.full(size, np.nan, np.float32)
            self._fill("decode", over[0], out, *numbers)
            if np.isnan(out).any():
                raise ValueError(
                    f"{self.functions['decode']}: expected it to set all {size} elements of x to numbers; "
                    f"x[{int(np.flatnonzero(np.isnan(out))[0])}] is none"
                )
        self._tried.add(size)

    def _number(self, name: str, x: np.ndarray) -> Any:
        found = self._call(name, x)
        if isinstance(found, np.ndarray) and found.ndim == 0:
            found = found[()]
        if not isinstance(found, Number):
            raise ValueError(f"{self.functions[name]}: expected it to return a number; got {shown(found)}")
        return found

    def _fill(self, name: str, *arguments: Any) -> None:
        found = self._call(name, *arguments)
        if found is not None:
            raise ValueError(
                f"{self.functions[name]}: expected it to write into its second argument, and to return nothing; "
                f"got {shown(found)}"
            )

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            with np.errstate(all="ignore"):
                return self.functions[name].function(*arguments)
        except Exception as error:
            size = len(arguments[1] if name == "decode" else arguments[0])
            raise ValueError(
                f"{self.functions[name]} raised {type(error).__name__} for a group of {size} elements: {error}"
            ) from error


def register_format(
    name: str,
    *,
    bits: int,
    encode: Callable[..., None],
    decode: Callable[..., None],
    scale: Callable[[np.ndarray], float] | None = None,
    zero: Callable[[np.ndarray], float] | None = None,
) -> None:
    """Add a storage format of one's own, which caches then take by its name as they take "int4".

    A format stores a group of elements of a row: `group_size` of them where it has a scale, otherwise the row. Its
    functions are Python functions of one group, in loops or in what Numba compiles of NumPy; on GPUs in loops, for
    no array can be made there. Numbers that they read from around them, also in tuples, are those of now.

    Parameters
    ----------
    name : str
    bits : int
        Of one stored element, 1 to 15. A group takes whole bytes: of 3 bits its elements are a multiple of 8.
    encode : function
        ``encode(x, codes[, scale[, zero]])`` sets all of codes (bytes of a group,) uint8 for x (elements,) float32.
        Scale and zero are as they are stored, rounded to `scale_dtype`.
    decode : function
        ``decode(codes, x[, scale[, zero]])`` sets all of x.
    scale, zero : function, optional
        ``scale(x)`` and ``zero(x)``, a number that is stored for each group. A format with a zero has a scale.

    Raises
    ------
    TypeError
        An argument is no function, or takes others than these.
    ValueError
        The name is taken, the bits are out of range, or a function raises, reads what may change unnoticed, or does
        not do what is said above when it is tried with 128 elements.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name, re.ASCII):
        raise ValueError(f"name: expected letters, digits and underscores; got {name!r}")
    if name in FORMATS:
        raise ValueError(f"name: expected one that is not taken, {', '.join(FORMATS)} are; got {name!r}")
    bits = integer("bits", bits, minimum=1)
    if bits > MOST_BITS:
        raise ValueError(f"bits: expected 1 to {MOST_BITS}, float16 takes 16; got {bits}")
    given = {"scale": scale, "zero": zero, "encode": encode, "decode": decode}
    if zero is not None and scale is None:
        raise ValueError("zero: expected a scale with it")
    has = {argument for argument, value in given.items() if value is not None}
    codec = Codec(
        name,
        bits,
        {
            argument: _checked(argument, value, has)
            for argument, value in given.items()
            if value is not None or argument in ("encode", "decode")
        },
    )
    if name in REGISTERED:
        if REGISTERED[name].codec.digest != codec.digest:
            raise ValueError(
                f"name: {name} is registered already, with other functions or bits; choose another"
            )
        return  # a cell of a notebook that is run again
    codec.try_at(TRIED_SIZE)
    REGISTERED[name] = Format(
        name, bits, "registered", np.dtype(np.uint8), "scale" in has, "zero" in has, codec
    )


def _checked(argument: str, value: Any, has: set[str]) -> UserFunction:
    wanted = [each for each in PARAMETERS[argument] if each in ("x", "codes") or each in has]
    function = plain_function(value)
    if function is None:
        raise TypeError(
            f"{argument}: expected a Python function of ({', '.join(wanted)}); got a {type(value).__name__}"
        )
    found = UserFunction(argument, function)
    signature = inspect.signature(function)
    try:
        signature.bind(*wanted)
    except TypeError:
        raise TypeError(
            f"{found}: expected it to take ({', '.join(wanted)}), {len(wanted)} arguments; it takes {signature}"
        ) from None
    return found
