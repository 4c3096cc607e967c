"""Users' functions of scores, compiled into the float32 kernel."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, types

from kvnumba.backends.cuda.jit import SIMULATED, device, int64
from kvnumba.backends.mods import argument_kinds, compiled, does_not_compile, kinds_of
from kvnumba.mods import UserFunction
from kvnumba.options import Scoring

Change = Callable[..., Any]
"""``change(score, q_head, q_pos, kv_pos, address)``: the new score; at the address is what `words_of` made."""

HIDDEN = float32("-inf")


def change_of(scoring: Scoring, masked: bool) -> Change | None:
    """What changes scores in a part with `Part.masked`; None where nothing does.

    Raises
    ------
    ValueError
        A function cannot be compiled.
    """
    score_mod, mask_mod = scoring.score_mod, scoring.mask_mod if masked else None
    if score_mod is None and mask_mod is None:
        return None
    if SIMULATED:
        return _simulated(scoring, masked)
    kinds = kinds_of(scoring.aux)
    key = (*("" if each is None else each.digest for each in (score_mod, mask_mod)), str(kinds))
    if key not in _made:
        _made[key] = _compiled(score_mod, mask_mod, kinds)
    return _made[key]


_made: dict[tuple[str, ...], Change] = {}  # functions of the same code are compiled once


@functools.lru_cache(64)
def _simulated(scoring: Scoring, masked: bool) -> Change:
    """The functions as they are: the simulator runs Python."""
    score_mod, mask_mod, aux = scoring.score_mod, scoring.mask_mod if masked else None, scoring.aux

    def change(score, q_head, q_pos, kv_pos, address):
        where = np.int64(q_head), np.int64(q_pos), np.int64(kv_pos)
        if score == HIDDEN or (mask_mod is not None and not mask_mod.function(*where, *aux)):
            return HIDDEN
        return score if score_mod is None else float32(score_mod.function(float32(score), *where, *aux))

    return change


def _compiled(
    score_mod: UserFunction | None, mask_mod: UserFunction | None, kinds: tuple[Any, ...]
) -> Change:
    from kvnumba.backends.cuda.hardware import unpacker

    unpack = unpacker(kinds)
    new_score = (
        unchanged if score_mod is None else compiled_for(score_mod, argument_kinds(score_mod, kinds))[0]
    )
    is_seen = all_seen if mask_mod is None else compiled_for(mask_mod, argument_kinds(mask_mod, kinds))[0]

    @device
    def change(score, q_head, q_pos, kv_pos, address):
        aux = unpack(address)
        value = float32(new_score(score, int64(q_head), int64(q_pos), int64(kv_pos), *aux))
        seen = is_seen(int64(q_head), int64(q_pos), int64(kv_pos), *aux)
        return value if seen and score != HIDDEN else HIDDEN

    return change


@device
def unchanged(score, *rest):
    """The score_mod of who has none."""
    return score


@device
def all_seen(*numbers):
    """The mask_mod of who has none."""
    return True


def compiled_for(user: UserFunction, kinds: tuple[Any, ...]) -> tuple[Any, Any]:
    """A function for the device, and the type of what it returns for arguments of such types.

    Alone it is compiled first, for Numba to say what is wrong with it.

    Raises
    ------
    ValueError
        It cannot be compiled.
    """
    function = compiled(user, device, _of_numpy())
    if user.function.__code__.co_flags & inspect.CO_VARARGS:
        named = user.function.__code__.co_argcount
        kinds = (*kinds[:named], types.StarArgTuple.from_types(kinds[named:]))
    try:
        return function, function.compile_device(kinds).signature.return_type
    except Exception as error:  # numba-cuda has errors of its own
        raise does_not_compile(user, error) from error


def _of_numpy() -> dict[Callable[..., Any], Any]:
    """What NumPy's functions are here, of those that numba-cuda lacks."""
    from numba.cuda import libdevice

    return {
        np.absolute: abs,
        np.ceil: libdevice.ceilf,
        np.exp: math.exp,
        np.exp2: libdevice.exp2f,
        np.expm1: math.expm1,
        np.fabs: math.fabs,
        np.floor: libdevice.floorf,
        np.log1p: math.log1p,
        np.power: math.pow,
        np.rint: libdevice.rintf,
        np.sqrt: math.sqrt,
        np.trunc: libdevice.truncf,
    }
