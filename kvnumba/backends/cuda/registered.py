"""Formats of the user's own, compiled into the kernels of rows: a group is encoded or decoded by one thread."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba import float32, types

from kvnumba.backends.cuda.intrinsics import bytes_at
from kvnumba.backends.cuda.jit import SIMULATED, WARP, device
from kvnumba.backends.cuda.mods import compiled_for
from kvnumba.backends.mods import check_number, given_both, kinds_of_format
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
    functions = {
        name: user.function if SIMULATED else _checked(user, kinds)  # the simulator runs Python
        for (name, user), kinds in zip(codec.functions.items(), kinds_of_format(codec).values(), strict=True)
    }
    return Functions(
        *(_number(functions[name]) if name in functions else nothing for name in ("scale", "zero")),
        *(given_both(functions[name], codec, device) for name in ("encode", "decode")),
    )


def _checked(user: UserFunction, kinds: tuple[types.Type, ...]) -> Any:
    function, returned = compiled_for(user, kinds)
    if user.argument in ("scale", "zero"):
        check_number(user, returned)
    return function


@device
def nothing(x):
    """The scale, or the zero, of a format that has none."""
    return float32(0)


def _number(function: Any) -> Any:
    @device
    def call(x):
        return float32(function(x))

    return call


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
