"""Users' functions of scores, compiled: a small kernel for each, which the kernels of attention call by its address.

They call it once for each run of keys, when its scores are computed; so the large kernels are compiled once for all
functions, and a function takes part of a second. Written into a loop over contiguous scores, it becomes vector
instructions where LLVM finds that it can.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, typeof, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import (
    COMMON,
    Static,
    call_at,
    each_run,
    entry,
    kernel,
    plain,
)
from kvnumba.backends.cpu.shapes import PHASE_MAX, Shape, state_at
from kvnumba.backends.cpu.simd import F32, I64, LANES, SHIFT, Emitter, Int, Pointer, vector
from kvnumba.backends.mods import argument_kinds, compiled, does_not_compile, kinds_of, unpacking, words_of
from kvnumba.mods import UserFunction
from kvnumba.options import Scoring

MOST_LANES = 512  # scores that the user's function is called for in one loop

HIDDEN = np.float32(-np.inf)


@dataclass(frozen=True, eq=False)
class Mods(Static):
    """What `modify` is compiled for: two functions of the user's, and what they are given besides.

    Attributes
    ----------
    digest : str
        Of all that the compiled code depends on; `_found` has the rest by it.
    """

    digest: str = ""

    @property
    def score_mod(self) -> Any:
        """Compiled, as `mask_mod` is; a function that changes nothing where there is none."""
        return _found[self.digest].score_mod

    @property
    def mask_mod(self) -> Any:
        return _found[self.digest].mask_mod


class _Compiled(NamedTuple):
    """The functions of a `Mods`, and the types of `Scoring.aux`."""

    score_mod: Any
    mask_mod: Any
    aux: tuple[types.Type, ...]


_found: dict[str, _Compiled] = {}
_statics: dict[str, Mods] = {}


class Modification(NamedTuple):
    """What kernels need to change scores.

    Attributes
    ----------
    masked, unmasked : int
        Addresses of `modify` with and without the mask; 0: it has nothing to do.
    aux : int
        The address of what functions are given besides.
    kept : tuple
        What lies there.
    """

    masked: int
    unmasked: int
    aux: int
    kept: Any


NOTHING = Modification(0, 0, 0, None)


def modification(scoring: Scoring) -> Modification:
    """The functions of a scoring, compiled.

    Raises
    ------
    ValueError
        One of them cannot be compiled.
    """
    if not scoring.has_mods:
        return NOTHING
    kinds = kinds_of(scoring.aux)
    try:
        masked = _address(_static(scoring.score_mod, scoring.mask_mod, kinds))
        unmasked = 0 if scoring.score_mod is None else _address(_static(scoring.score_mod, None, kinds))
    except NumbaError as error:
        raise _reason(scoring, kinds) from error
    words = words_of(scoring.aux, lambda array: array.ctypes.data)
    return Modification(masked, unmasked, words.ctypes.data, (words, scoring.aux))


def _address(static: Mods) -> int:
    return entry(modify, static, *[0] * 9)[0]


def _static(
    score_mod: UserFunction | None, mask_mod: UserFunction | None, aux: tuple[types.Type, ...]
) -> Mods:
    parts = [str(aux), *("" if each is None else each.digest for each in (score_mod, mask_mod))]
    digest = hashlib.sha256(";".join(parts).encode()).hexdigest()[:16]
    if digest not in _statics:
        _found[digest] = _Compiled(
            unchanged if score_mod is None else compiled(score_mod, each_run, VECTORIZED),
            all_seen if mask_mod is None else compiled(mask_mod, each_run, VECTORIZED),
            aux,
        )
        _statics[digest] = Mods(digest=digest)
    return _statics[digest]


def _reason(scoring: Scoring, aux: tuple[types.Type, ...]) -> ValueError:
    """Which function cannot be compiled, and why."""
    for user in (scoring.score_mod, scoring.mask_mod):
        if user is None:
            continue
        kinds = argument_kinds(user, aux)
        function = compiled(user, each_run, VECTORIZED)
        try:
            function.compile(kinds)
        except NumbaError as error:
            return does_not_compile(user, error)
        returned = function.overloads[kinds].signature.return_type
        if not isinstance(returned, (types.Number, types.Boolean)):
            return ValueError(
                f"{user} cannot be compiled: expected it to return a number; its type is {returned}"
            )
    return ValueError("score_mod, mask_mod: cannot be compiled")


@intrinsic
def fused(typing, x, y, z):
    """x * y + z of float32, fused where the processor can."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f32")
        return builder.call(function, arguments)

    return types.float32(*[types.float32] * 3), generate


@each_run
def exp(x):
    """e**x of float32 as `Emitter.exp` has it, for any x: a loop of it becomes vectors, one of libm's does not."""
    x = np.float32(x)
    inside = np.float32(-88.02969193111305) if x < np.float32(-88.02969193111305) else x
    inside = np.float32(88.3) if x > np.float32(88.3) else inside
    shifted = inside * np.float32(1.4426950408889634) + np.float32(SHIFT + 127)
    whole = shifted - np.float32(SHIFT + 127)
    r = fused(whole, np.float32(-0.693359375), inside)
    r = fused(whole, np.float32(2.12194440e-4), r)
    p = fused(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = fused(p, r, np.float32(8.3334519073e-3))
    p = fused(p, r, np.float32(4.1665795894e-2))
    p = fused(p, r, np.float32(1.6666665459e-1))
    p = fused(p, r, np.float32(5.0000001201e-1))
    p = fused(p, r * r, r) + np.float32(1)
    power = np.int32(np.float32(shifted).view(np.int32) << np.int32(23)).view(np.float32)
    return np.float32(np.inf) if x > np.float32(88.3) else p * power


@each_run
def tanh(x):
    """The same, as `Emitter.tanh` has it."""
    x = np.float32(x)
    size = abs(x)
    square = x * x
    p = fused(np.float32(-5.70498872745e-3), square, np.float32(2.06390887954e-2))
    p = fused(p, square, np.float32(-5.37397155531e-2))
    p = fused(p, square, np.float32(1.33314422036e-1))
    p = fused(p, square, np.float32(-3.33332819422e-1))
    near = fused(p * square, x, x)
    decay = exp(size * np.float32(-2))
    far = (np.float32(1) - decay) / (np.float32(1) + decay)
    return near if size < np.float32(0.625) else (far if x > 0 else -far)


VECTORIZED: dict[Callable[..., Any], Any] = {math.exp: exp, np.exp: exp, math.tanh: tanh, np.tanh: tanh}
"""Functions that users call -> ours."""


# The kernel


@plain
def unchanged(score, *rest):
    """The score_mod of who has none."""
    return score


@plain
def all_seen(*numbers):
    """The mask_mod of who has none."""
    return True


@kernel
def modify(static, scores, count, key, shift, line, lanes, size, stride, aux_address):
    """Change `count` scores in place.

    Parameters
    ----------
    scores, lanes, aux_address : address
        Of float32 scores; of four rows, see `attend.fill_lanes`; of `words_of`.
    key, shift : int
        The position of the first token; how much earlier the new tokens stand than their lanes say.
    line, size, stride : int
        Every `size` scores stand for `line` further tokens, and are those of the first `size` lanes; a row of lanes
        begins `stride` after the one before.
    """
    aux = unpack(static, aux_address)
    heads, positions, tokens = (
        carray(pointer_to_int(lanes), size),
        carray(pointer_to_int(lanes + 4 * stride), size),
        carray(pointer_to_int(lanes + 8 * stride), size),
    )
    offsets = carray(pointer_to_float(lanes + 12 * stride), size)
    # results lie apart for a while: what is stored in memory of one's own changes nothing that the function reads
    found = carray(own_floats(), MOST_LANES)
    for first in range(0, count, size):
        used = min(size, count - first)
        part = carray(pointer_to_float(scores + 4 * first), used)
        for i in range(used):
            score = part[i] + offsets[i]
            q_head, q_pos = np.int64(heads[i]), np.int64(positions[i]) - shift
            kv_pos = min(key + tokens[i], np.int64(positions[i]))
            value = np.float32(static.score_mod(score, q_head, q_pos, kv_pos, *aux))
            seen = bool(static.mask_mod(q_head, q_pos, kv_pos, *aux))
            found[i] = value if seen & (score != HIDDEN) else HIDDEN
        for i in range(used):
            part[i] = found[i]
        key += line


_KINDS = (typeof(COMMON), *[types.intp] * 9)  # of `modify`; all statics are the same to LLVM


def call_modify(
    e: Emitter,
    masks: Any,
    scores: Pointer,
    count: Int | int,
    key: Int,
    line: int,
    lanes: Pointer,
    size: int,
    shape: Shape,
) -> None:
    """Write the call of `modify` for scores whose first token has the position `key` in its part."""
    b = e.builder

    def word(x: Any) -> ir.Value:
        if isinstance(x, Pointer):
            return b.ptrtoint(x.value, I64)
        return x.value if isinstance(x, Int) else I64(x)

    given = (scores, count, key + masks.offset, masks.shift, line, lanes, size, shape.all_lanes, masks.aux)
    call_at(e.context, b, masks.modify.value, _KINDS, [e.context.get_dummy_value(), *map(word, given)])


@intrinsic
def modify_run(typing, shape, run, masks, scratch):
    """Let `modify` change the scores of a run, and take the greatest of them into PHASE_MAX."""
    signature = types.void(shape, run, masks, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, run, masks, scratch = e.arguments(signature, args)
        scores = scratch.scores.start + run.scores * 4
        count = run.num_tokens * (static.group or static.columns)
        line = static.lanes // (static.group or static.columns)
        call_modify(e, masks, scores, count, run.key, line, scratch.lanes.start, static.lanes, static)
        greatest = [state_at(scratch.state, PHASE_MAX, static, part) for part in range(static.vectors)]

        def one(i: Int, tops: list[ir.Value]) -> list[ir.Value]:
            at = scores + i * (4 * static.vectors * LANES)
            return [e.max(e.load(at + 4 * n * LANES, vector(F32)), top) for n, top in enumerate(tops)]

        lines = (run.num_tokens + (static.line - 1)) // static.line
        tops = e.loop(lines, [e.load(where, vector(F32)) for where in greatest], one)
        for where, top in zip(greatest, tops, strict=True):
            e.store(top, where)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def unpack(typing, static, address):
    """What functions are given besides, from the words at an address."""
    result, make = unpacking(_found[static.static.digest].aux)

    def generate(context, builder, signature, arguments):
        return make(context, builder, arguments[1])

    return result(static, types.intp), generate


def _pointer_to(kind):
    @intrinsic
    def pointer(typing, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.intp), generate

    return pointer


pointer_to_float, pointer_to_int = _pointer_to(types.float32), _pointer_to(types.int32)
pointer_to_byte, pointer_to_half = _pointer_to(types.uint8), _pointer_to(types.uint16)


@intrinsic
def own_floats(typing):
    """Memory for MOST_LANES floats on the stack."""

    def generate(context, builder, signature, arguments):
        return cgutils.alloca_once(builder, ir.FloatType(), size=MOST_LANES)

    return types.CPointer(types.float32)(), generate
