"""Formats of the user's own, compiled: small kernels for each, which the kernels of rows call by their address.

So these are compiled once for all formats. A group is encoded or decoded in a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, typeof, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import COMMON, Static, call_at, each_run, entry, kernel, plain
from kvnumba.backends.cpu.mods import VECTORIZED, pointer_to_byte, pointer_to_float, pointer_to_half
from kvnumba.backends.cpu.simd import F32, I64, Emitter, Pointer
from kvnumba.backends.mods import check_number, compiled, does_not_compile, given_both, kinds_of_format
from kvnumba.codecs import Codec
from kvnumba.formats import Format

MEASURE, ENCODE, DECODE, DECODE_HALVES = range(4)
"""Where the addresses of a format's kernels stand in its table."""


@dataclass(frozen=True, eq=False)
class Functions(Static):
    """What these kernels are compiled for: the functions of a format.

    Attributes
    ----------
    digest : str
        Of all that the compiled code depends on; `_found` has the functions by it.
    """

    digest: str = ""

    @property
    def scale(self) -> Any:
        """Compiled, as the others are; given all arguments, also those that a format lacks."""
        return _found[self.digest]["scale"]

    @property
    def zero(self) -> Any:
        return _found[self.digest]["zero"]

    @property
    def encode(self) -> Any:
        return _found[self.digest]["encode"]

    @property
    def decode(self) -> Any:
        return _found[self.digest]["decode"]


_found: dict[str, dict[str, Any]] = {}
_tables: dict[str, np.ndarray] = {}


def address_of(fmt: Format) -> int:
    """The address of the table of a format's kernels; 0 where it has none of its own.

    Raises
    ------
    ValueError
        A function cannot be compiled.
    """
    codec: Codec | None = fmt.codec
    if codec is None:
        return 0
    if codec.digest not in _tables:
        functions = {name: compiled(user, each_run, VECTORIZED) for name, user in codec.functions.items()}
        _check(codec, functions)
        _found[codec.digest] = {
            "scale": functions.get("scale", nothing),
            "zero": functions.get("zero", nothing),
            **{name: given_both(functions[name], codec, each_run) for name in ("encode", "decode")},
        }
        static = Functions(digest=codec.digest)
        _tables[codec.digest] = np.array(
            [
                entry(measure, static, *[0] * 3)[0],
                *(
                    entry(each, static, *[0] * 4, np.float32(0), np.float32(0))[0]
                    for each in (encode, decode, decode_halves)
                ),
            ],
            np.int64,
        )
    return _tables[codec.digest].ctypes.data


def _check(codec: Codec, functions: dict[str, Any]) -> None:
    """Raise if a function cannot be compiled by itself, or returns what it should not."""
    for name, kinds in kinds_of_format(codec).items():
        user = codec.functions[name]
        try:
            functions[name].compile(kinds)
        except NumbaError as error:
            raise does_not_compile(user, error) from error
        if name in ("scale", "zero"):
            check_number(user, functions[name].overloads[kinds].signature.return_type)


@plain
def nothing(x):
    """The scale, or the zero, of a format that has none."""
    return np.float32(0)


# The kernels: x, codes and out are addresses of a group's, size and num_bytes their lengths.


@kernel
def measure(static, x, size, found):
    """The scale and the zero of a group, two floats at `found`."""
    group, numbers = carray(pointer_to_float(x), size), carray(pointer_to_float(found), 2)
    numbers[0] = static.scale(group)
    numbers[1] = static.zero(group)


@kernel
def encode(static, x, size, codes, num_bytes, scale, zero):
    static.encode(carray(pointer_to_float(x), size), carray(pointer_to_byte(codes), num_bytes), scale, zero)


@kernel
def decode(static, codes, num_bytes, out, size, scale, zero):
    static.decode(carray(pointer_to_byte(codes), num_bytes), carray(pointer_to_float(out), size), scale, zero)


@kernel
def decode_halves(static, codes, num_bytes, out, size, scale, zero):
    """The same as bfloat16."""
    x, halves = np.empty(size, np.float32), carray(pointer_to_half(out), size)
    static.decode(carray(pointer_to_byte(codes), num_bytes), x, scale, zero)
    for i in range(size):
        bits = np.float32(x[i]).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        halves[i] = np.uint16(rounded if x[i] == x[i] else np.uint32(0x7FC0))


# What calls them

_FOUR = (typeof(COMMON), *[types.intp] * 4, types.float32, types.float32)
_THREE = (typeof(COMMON), *[types.intp] * 3)  # all statics are the same to LLVM


def _call(e: Emitter, table: Any, which: int, kinds: tuple[types.Type, ...], *given: Any) -> None:
    def word(x: Any) -> ir.Value:
        return e.builder.ptrtoint(x.value, I64) if isinstance(x, Pointer) else getattr(x, "value", x)

    b = e.builder
    address = b.load(b.gep(b.inttoptr(table.value, I64.as_pointer()), [I64(which)]))
    call_at(e.context, b, address, kinds, [e.context.get_dummy_value(), *map(word, given)])


@intrinsic
def measure_group(typing, table, x, start, size):
    """The scale and the zero of x[start : start + size]."""
    signature = types.UniTuple(types.float32, 2)(types.intp, x, types.intp, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        table, x, start, size = e.arguments(signature, args)
        found = cgutils.alloca_once(builder, F32, size=2)
        _call(e, table, MEASURE, _THREE, x.start + start * 4, size, Pointer(builder, found))
        numbers = [builder.load(builder.gep(found, [I64(n)])) for n in range(2)]
        return context.make_tuple(builder, signature.return_type, numbers)

    return signature, generate


@intrinsic
def encode_group(typing, table, x, start, size, codes, to, num_bytes, scale, zero):
    """Store x[start : start + size] in codes[to : to + num_bytes]."""
    signature = types.void(
        types.intp, x, types.intp, types.intp, codes, types.intp, types.intp, types.float32, types.float32
    )

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        table, x, start, size, codes, to, num_bytes, scale, zero = e.arguments(signature, args)
        group, target = x.start + start * 4, codes.start + to
        _call(e, table, ENCODE, _FOUR, group, size, target, num_bytes, scale, zero)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def decode_group(typing, table, codes, start, num_bytes, scale, zero, out, to, size):
    """Read codes[start : start + num_bytes] into out[to : to + size], float32, or bfloat16 as uint16."""
    signature = types.void(
        types.intp, codes, types.intp, types.intp, types.float32, types.float32, out, types.intp, types.intp
    )

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        table, codes, start, num_bytes, scale, zero, out, to, size = e.arguments(signature, args)
        which = DECODE_HALVES if out.dtype == types.uint16 else DECODE
        group, target = codes.start + start, out.start + to * out.item_bytes
        _call(e, table, which, _FOUR, group, num_bytes, target, size, scale, zero)
        return context.get_dummy_value()

    return signature, generate
