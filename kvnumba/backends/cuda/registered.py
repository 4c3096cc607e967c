"""Formats of the user's own, compiled into the kernels of rows: a group is encoded or decoded by one thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import float32, types

from kvnumba.backends.cuda.intrinsics import bytes_at
from kvnumba.backends.cuda.jit import SIMULATED, WARP, device
from kvnumba.backends.cuda.mods import compiled_for
from kvnumba.codecs import Codec
from kvnumba.formats import Format
from kvnumba.mods import UserFunction


class Functions(NamedTuple):
    """Those of a format, for the device; all are given both numbers, also those that the format lacks."""

    scale: Any
    zero: Any
    encode: Any
    decode: Any


@functools.cache
def functions_of(codec: Codec) -> Functions:
    """The functions of a registered format.

    Raises
    ------
    ValueError
        One cannot be compiled.
    """
    made = _as_it_is if SIMULATED else _checked(codec)
    functions = {name: made(user) for name, user in codec.functions.items()}
    numbers = len(functions) - 2
    return Functions(
        *(_number(functions[name]) if name in functions else nothing for name in ("scale", "zero")),
        *(_BY_NUMBERS[numbers](functions[name]) for name in ("encode", "decode")),
    )


def _as_it_is(user: UserFunction) -> Any:
    """The function as it is: the simulator runs Python."""
    return user.function


def _checked(codec: Codec) -> Callable[[UserFunction], Any]:
    floats, codes = types.Array(types.float32, 1, "C"), types.Array(types.uint8, 1, "C")
    numbers = [types.float32] * (len(codec.functions) - 2)
    given = {"encode": (floats, codes, *numbers), "decode": (codes, floats, *numbers)}

    def make(user: UserFunction) -> Any:
        function, returned = compiled_for(user, given.get(user.argument, (floats,)))
        if user.argument not in given and not isinstance(returned, (types.Number, types.Boolean)):
            raise ValueError(
                f"{user} cannot be compiled: expected it to return a number; its type is {returned}"
            )
        return function

    return make


@device
def nothing(x):
    """The scale, or the zero, of a format that has none."""
    return float32(0)


def _number(function: Any) -> Any:
    @device
    def call(x):
        return float32(function(x))

    return call


def _alone(function: Any) -> Any:
    @device
    def call(x, y, scale, zero):
        function(x, y)

    return call


def _with_scale(function: Any) -> Any:
    @device
    def call(x, y, scale, zero):
        function(x, y, scale)

    return call


def _with_both(function: Any) -> Any:
    @device
    def call(x, y, scale, zero):
        function(x, y, scale, zero)

    return call


_BY_NUMBERS = [_alone, _with_scale, _with_both]
"""By how many numbers a group has: functions that are given both, and pass on those."""


def group_reader(fmt: Format, load_scale: Any, pair_bytes: int, scale_bytes: int) -> Any:
    """``read(codes, scales, offset, at, head_dim, group_size, values)``: as `codecs.reader`, a group into any array."""
    decode, bits, has_scale, has_zero = functions_of(fmt.codec).decode, fmt.bits, fmt.has_scale, fmt.has_zero

    @device
    def read(codes, scales, offset, at, head_dim, group_size, values):
        stored = bytes_at(codes + (offset * head_dim + at) * bits // 8, group_size * bits // 8)
        scale, zero = float32(0), float32(0)
        if has_scale:
            pair = scales + pair_bytes * (offset * (head_dim // group_size) + at // group_size)
            scale = load_scale(pair)
            if has_zero:
                zero = load_scale(pair + scale_bytes)
        decode(stored, values, scale, zero)

    return read


def group_writer(fmt: Format, store_scale: Any, rounded: Any, pair_bytes: int, scale_bytes: int) -> Any:
    """``write(...)``: as `codecs.row_writer`; the groups of a row are dealt to the lanes of a warp."""
    functions = functions_of(fmt.codec)
    scale_of, zero_of, encode = functions.scale, functions.zero, functions.encode
    bits, has_scale, has_zero = fmt.bits, fmt.has_scale, fmt.has_zero

    @device
    def write(lane, values, shared, x, offset, head_dim, group_size, codes, scales):
        for at in range(lane * group_size, head_dim, WARP * group_size):
            group = shared[x + at : x + at + group_size]
            scale, zero = float32(0), float32(0)
            if has_scale:
                pair = scales + pair_bytes * (offset * (head_dim // group_size) + at // group_size)
                scale = rounded(scale_of(group))
                store_scale(pair, scale)
                if has_zero:
                    zero = rounded(zero_of(group))
                    store_scale(pair + scale_bytes, zero)
            stored = bytes_at(codes + (offset * head_dim + at) * bits // 8, group_size * bits // 8)
            encode(group, stored, scale, zero)

    return write
