"""Policies that go by attention mass, and what they remember of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.per_head import PerHeadKVCache
from kvnumba.caches.per_head_step import PerHeadStep
from kvnumba.caches.step import Step
from kvnumba.options import AttentionOptions
from kvnumba.policies.base import Policy

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Seen(NamedTuple):
    """The masses of a sequence's tokens in a layer, as of the latest step whose masses count."""

    end: int  # the position after the newest token
    held: list[np.ndarray]  # H arrays (tokens,) int64, in which positions the masses are
    masses: list[np.ndarray]  # H arrays (tokens,) float32


class MassPolicy(Policy):
    """A policy that goes by the attention which tokens get, by way of `attend` with ``return_mass``.

    All steps, forks and reorders of a sequence have to go by way of the policy, which knows of no others. Masses go by
    positions: those of tokens that a head has dropped are forgotten at the next `attend`, as are those of tokens that
    `truncate` took back and others replaced; what tokens got from queries that were taken back stays. Four bytes of
    mass and eight of position are held for each token of each head. With `window_left` there is no second eviction:
    where tokens were dropped, windows find no masses.
    """

    window: int | None = None
    """Tokens of a step whose masses count, those of one step alone: the latest has to be such. None: those of all."""

    def __init__(self, cache: PagedKVCache | PerHeadKVCache) -> None:
        super().__init__(cache)
        self._seen: dict[int, dict[int, Seen]] = {}  # by sequence and layer

    def attend(
        self, step: Step | PerHeadStep, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]
    ) -> Any:
        if "return_mass" in options:
            raise ValueError("return_mass: expected none, the policy asks for masses itself")
        if not isinstance(step, PerHeadStep):
            raise TypeError(f"step: expected one of a PerHeadKVCache; got a {type(step).__name__}")
        if step._pool is not self.cache._pool:
            raise ValueError("step: expected one of the policy's cache; got one of another")
        counts = step.num_new_tokens
        if self.window is None or self.window in counts:
            asked: AttentionOptions = {**options, "return_mass": True}
            *found, masses = step.attend(q, layer=layer, **asked)
            out = tuple(found) if len(found) > 1 else found[0]
        else:  # prompts take longer with masses
            out, masses = step.attend(q, layer=layer, **options), [[]] * len(counts)
        for seq_id, count, end, of_heads in zip(step.seq_ids, counts, np.cumsum(counts), masses, strict=True):
            if count and self.window in (None, count):
                self._remember(seq_id, layer, step.positions[end - count : end], of_heads)
            elif count:
                self._seen.get(seq_id, {}).pop(layer, None)
        return out

    def _remember(self, seq_id: int, layer: int, new: np.ndarray, masses: list[np.ndarray]) -> None:
        """Masses in the order of the positions that each head holds, the new ones last."""
        earlier = [at[at < new[0]] for at in self.cache.positions(seq_id, layer=layer)]
        if seq_id not in self._seen:
            self._learn({seq_id: {}})
        of_layers = self._seen[seq_id]
        if self.window is None and layer in of_layers:
            so_far = _masses_at(of_layers[layer], earlier)
            masses = [
                np.concatenate((mass[: len(sums)] + sums, mass[len(sums) :]))
                for mass, sums in zip(masses, so_far, strict=True)
            ]
        else:
            masses = [mass.copy() for mass in masses]  # they are parts of those of all sequences
        of_layers[layer] = Seen(int(new[-1]) + 1, [np.append(at, new) for at in earlier], masses)

    def _learn(self, seen: dict[int, dict[int, Seen]]) -> None:
        """Know this of some sequences, and nothing of finished ones."""
        self._seen.update(seen)
        for gone in set(self._seen) - set(self.cache.seq_lens):
            self._seen.pop(gone, None)

    def fork(self, seq_id: int) -> int:
        twin = super().fork(seq_id)
        self._learn({twin: dict(self._seen.get(seq_id, {}))})
        return twin

    def reorder(self, seq_ids: Sequence[int], parents: Sequence[int]) -> None:
        super().reorder(seq_ids, parents)
        known = [dict(self._seen.get(parent, {})) for parent in parents]
        self._learn(dict(zip(seq_ids, known, strict=True)))

    def masses(self, seq_id: int, layer: int, held: list[np.ndarray]) -> list[np.ndarray]:
        """What the tokens at some positions of each head got; raises unless the latest step has been seen."""
        seen = self._seen.get(seq_id, {}).get(layer)
        if seen is None or seen.end != self.cache.seq_len(seq_id):
            size = "" if self.window is None else f" is of {self.window} tokens and"
            raise ValueError(
                f"seq_id: expected a sequence whose latest step{size} has attended by way of {self._name}.attend; "
                f"that of sequence {seq_id} has not in layer {layer}"
            )
        return _masses_at(seen, held)


def _masses_at(seen: Seen, wanted: list[np.ndarray]) -> list[np.ndarray]:
    """The masses at some positions of each head, before `seen.end`; 0 where none is known."""
    found = []
    for at, mass, positions in zip(seen.held, seen.masses, wanted, strict=True):
        everywhere = np.zeros(max(seen.end, positions.max(initial=-1) + 1), np.float32)
        everywhere[at] = mass
        found.append(everywhere[positions])
    return found
