"""How scores are made from queries and keys: the options of every attention, checked once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from kvnumba.arguments import check_shape, integer, known_options, real
from kvnumba.arrays import DeviceView, device_view, float_array
from kvnumba.mods import UserFunction, checked_aux, first_numbers, user_function

if TYPE_CHECKING:
    from typing_extensions import Unpack

ARITHMETICS = ("float32", "bfloat16", "bfloat16x3")


class ScoringOptions(TypedDict, total=False):
    """How scores are made from ``q . k``, in the words of FlashInfer, vLLM and FlexAttention.

    None is the default of each. In this order: `sm_scale`, `logits_soft_cap`, `alibi_slopes`, `score_mod`, then what
    masks: causality, `window_left` and `mask_mod`.

    Attributes
    ----------
    sm_scale : float
        Factor of ``q . k``. Default: 1 / sqrt(D).
    window_left : int
        A query at position i sees keys j with ``i - window_left <= j <= i``; -1, the default, sees all.
    logits_soft_cap : float
        cap: scores become ``cap * tanh(score / cap)`` before they are masked; 0, the default, is off.
    sinks : (Hq,) float32
        One more logit a query head, in the denominator (and in lse) only. On the backend's GPU or the host.
    alibi_slopes : (Hq,) float32
        ``slope * (j - i)`` is added to the score of key j. On the backend's GPU or the host.
    arithmetic : {"float32", "bfloat16", "bfloat16x3"}
        In which queries, keys, weights and values are multiplied; sums are float32 in any case. "float32": exactly
        that. "bfloat16": several new tokens may be multiplied in it, where the processor does that faster.
        "bfloat16x3": the same with two bfloat16 numbers for each float32, so that products keep 16 bits, on
        processors with tile instructions. Default: what is fastest within the rounding of the storage format.
        For codes these are products of 16-bit integers, for queries in bfloat16 as "bfloat16", for queries in
        float16 or bfloat16 on a GPU its matrix instructions, and for floats on tiles three bfloat16 numbers each.
    causal : bool
        False: a token sees the later keys too that the cache holds of its sequence, where `mask_mod` lets it, as in a
        prompt that is read in both directions. Not with `window_left` or `alibi_slopes`. Default: True.
    score_mod : function
        ``score_mod(score, q_head, q_pos, kv_pos, *aux)``, the new score: a Python function of numbers, compiled where
        the backend compiles. Positions are those of the tokens in their sequence; ``kv_pos <= q_pos`` if `causal`. A
        score of -inf, which is what masks leave, stays.
    mask_mod : function
        ``mask_mod(q_head, q_pos, kv_pos, *aux)``: whether the token sees the key.
    block_mask : function
        ``block_mask(q_low, q_high, kv_low, kv_high)``, first and last positions: 0 if `mask_mod` is False for all of
        these pairs, 1 if it is True for all, else 2. Ranges of any length are asked about, in Python; keys of a 0 are
        not read. Whether keys come after tokens does not matter. With `mask_mod` only.
    aux : tuple of arrays and numbers
        What `score_mod` and `mask_mod` are given besides, the same for both: one that needs less of it ends its
        parameters in ``*_``. Copied; floats become float32.
    """

    sm_scale: float | None
    window_left: int | None
    logits_soft_cap: float | None
    sinks: Any
    alibi_slopes: Any
    arithmetic: str | None
    causal: bool | None
    score_mod: Callable[..., Any] | None
    mask_mod: Callable[..., Any] | None
    block_mask: Callable[[int, int, int, int], int] | None
    aux: Sequence[Any] | None


class AttentionOptions(ScoringOptions, total=False):
    """The keyword arguments of every ``attend``: those of `ScoringOptions`, and three more.

    Attributes
    ----------
    scoring : Scoring
        The other options, checked beforehand: for those who give the same in many calls.
    return_lse : bool
        Return ``(out, lse)``: the natural logarithm of the sum of exponentials of the scores.
    return_mass : bool or "block"
        Return ``(out, mass)``, or ``(out, lse, mass)``: the attention that each cached token gets from the new ones,
        summed over these and over the query heads of a KV head, (H, S) float32 a sequence. With sinks the masses of
        a query sum to less than 1; what is masked has 0. Prompts take longer with it. It lies where `out` does. Of a
        `PerHeadKVCache` H arrays a sequence, of the tokens that each head holds. "block": the sums over each block of a
        paged cache instead, (H, blocks), of arrays in host memory.
    """

    scoring: Scoring | None
    return_lse: bool | None
    return_mass: bool | Literal["block"] | None


@dataclass(frozen=True, eq=False)
class Scoring:
    """Checked options, every default filled in but that of `arithmetic`, which depends on the queries.

    Made by `Scoring.of`, and kept as long as one likes. Attributes are those of `ScoringOptions`.
    """

    sm_scale: float
    window_left: int
    logits_soft_cap: float
    sinks: Any  # (Hq,) float32, NumPy array or DeviceView, or None
    alibi_slopes: Any
    arithmetic: str | None
    causal: bool = True
    score_mod: UserFunction | None = None
    mask_mod: UserFunction | None = None
    block_mask: UserFunction | None = None
    aux: tuple[Any, ...] = ()

    @classmethod
    def of(cls, num_qo_heads: int, head_dim: int, **options: Unpack[ScoringOptions]) -> Scoring:
        """Check options for queries of so many heads and elements.

        Parameters
        ----------
        num_qo_heads, head_dim : int
            Hq and D.
        **options
            See `ScoringOptions`.

        Raises
        ------
        ValueError, TypeError
            An option is unknown or not as described there; the message names it.
        """
        if not options:
            return _default(head_dim)
        known_options(options, ScoringOptions)
        sm_scale, window_left, soft_cap = (
            options.get(name) for name in ("sm_scale", "window_left", "logits_soft_cap")
        )
        cap = 0.0 if soft_cap is None else float(np.float32(real("logits_soft_cap", soft_cap)))
        if cap < 0:
            raise ValueError(f"logits_soft_cap: expected 0 (off) or more; got {cap}")
        aux = () if options.get("aux") is None else checked_aux(options["aux"])
        score_mod = user_function("score_mod", options.get("score_mod"), aux)
        mask_mod = user_function("mask_mod", options.get("mask_mod"), aux)
        block_mask = user_function("block_mask", options.get("block_mask"))
        if block_mask is not None and mask_mod is None:
            raise ValueError(
                "block_mask: expected a mask_mod with it, which says what a block seen in part shows"
            )
        if aux and score_mod is None and mask_mod is None:
            raise ValueError("aux: expected a score_mod or a mask_mod with it")
        window = -1 if window_left is None else integer("window_left", window_left, minimum=-1)
        causal = True if options.get("causal") is None else options["causal"]
        if not isinstance(causal, (bool, np.bool_)):
            raise TypeError(f"causal: expected True or False; got {causal!r}")
        if not causal and (window >= 0 or options.get("alibi_slopes") is not None):
            raise ValueError("causal: expected True with window_left or alibi_slopes; got False")
        return cls(
            sm_scale=head_dim**-0.5 if sm_scale is None else real("sm_scale", sm_scale),
            window_left=window,
            logits_soft_cap=cap,
            sinks=_per_head("sinks", options.get("sinks"), num_qo_heads),
            alibi_slopes=_per_head("alibi_slopes", options.get("alibi_slopes"), num_qo_heads),
            arithmetic=arithmetic_name(options.get("arithmetic")),
            causal=bool(causal),
            score_mod=score_mod,
            mask_mod=mask_mod,
            block_mask=block_mask,
            aux=aux,
        )

    @property
    def has_mods(self) -> bool:
        """Whether functions of the user's make scores, or mask them."""
        return self.score_mod is not None or self.mask_mod is not None

    @property
    def of_positions(self) -> str | None:
        """The name of an option that makes scores from positions, if there is one."""
        names = ("alibi_slopes", "score_mod", "mask_mod")
        return next((name for name in names if getattr(self, name) is not None), None)

    def watch(self) -> None:
        """Raise unless the user's functions are as they were."""
        for function in (self.score_mod, self.mask_mod):
            if function is not None:
                function.watch()

    def try_at(self, num_qo_heads: int, first: int, last: int, last_key: int) -> None:
        """Raise unless the user's functions can be called for tokens at positions from `first` to `last`."""
        for function in (self.score_mod, self.mask_mod):
            if function is not None:
                numbers = first_numbers(function.argument)[:-3]
                for q_head in (0, num_qo_heads - 1):
                    for q_pos in (first, last):
                        for kv_pos in (0, q_pos if self.causal else last_key):
                            function.try_at(*numbers, *map(np.int64, (q_head, q_pos, kv_pos)), *self.aux)

    @functools.cached_property
    def in_bfloat16(self) -> Scoring:
        """The same for queries in bfloat16."""
        return replace(self, arithmetic="bfloat16") if self.arithmetic is None else self


def scoring_of(options: AttentionOptions, num_qo_heads: int, head_dim: int) -> Scoring:
    """The options of an ``attend`` without what it is to return, checked."""
    if not options:
        return _default(head_dim)
    given: dict[str, Any] = {
        name: value for name, value in options.items() if name not in ("scoring", "return_lse", "return_mass")
    }
    mass = options.get("return_mass")
    if not (
        mass is None or isinstance(mass, (bool, np.bool_)) or (isinstance(mass, str) and mass == "block")
    ):
        raise ValueError(f"return_mass: expected True, False or 'block'; got {mass!r}")
    scoring = options.get("scoring")
    if scoring is None:
        return Scoring.of(num_qo_heads, head_dim, **given)
    if given:
        raise TypeError(f"{next(iter(given))}: expected no further options with scoring, which has them all")
    if not isinstance(scoring, Scoring):
        raise TypeError(f"scoring: expected a Scoring; got a {type(scoring).__name__}")
    for name in ("sinks", "alibi_slopes"):
        if getattr(scoring, name) is not None:
            check_shape(name, getattr(scoring, name), (num_qo_heads,), "Hq")
    return scoring


def arithmetic_name(value: Any) -> str | None:
    """`value` as one of ARITHMETICS, or None for the default."""
    if value not in (None, *ARITHMETICS):
        raise ValueError(f"arithmetic: expected one of {', '.join(ARITHMETICS)}; got {value!r}")
    return value


@functools.lru_cache(64)
def _default(head_dim: int) -> Scoring:
    return Scoring(head_dim**-0.5, -1, 0.0, None, None, None)


def _per_head(argument: str, value: Any, num_qo_heads: int) -> np.ndarray | DeviceView | None:
    if value is None:
        return None
    view = device_view(value)
    if view is not None:
        check_shape(argument, view, (num_qo_heads,), "Hq")
        if view.dtype != "float32" or view.strides != (1,):
            raise TypeError(
                f"{argument}: expected adjacent float32 on a GPU; got {view.dtype} with strides {view.strides}"
            )
        return view
    array = float_array(argument, value)
    check_shape(argument, array, (num_qo_heads,), "Hq")
    if not np.isfinite(array).all():
        raise ValueError(f"{argument}: expected finite values; got {array[~np.isfinite(array)][0]}")
    # a copy: what is kept must not change when the caller's array does
    return array.astype(np.float32, order="C")
