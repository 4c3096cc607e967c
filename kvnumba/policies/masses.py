"""Policies that go by attention mass, and what they remember of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.per_head import PerHeadKVCache, PerHeadStep
from kvnumba.caches.step import Step
from kvnumba.options import AttentionOptions
from kvnumba.policies.base import Policy

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Seen(NamedTuple):
    """The masses of a sequence's tokens in a layer, as of the latest step."""

    end: int  # the position after the newest token
    num_queries: int  # of the latest step
    held: list[np.ndarray]  # H arrays (tokens,) int64, in which positions the masses are
    masses: list[np.ndarray]  # H arrays (tokens,) float32


class MassPolicy(Policy):
    """A policy that goes by the attention which tokens get, by way of `attend` with ``return_mass``.

    Masses go by positions: those of tokens that a head has dropped are forgotten at the next `attend`, as are those of
    tokens that `truncate` took back and others replaced; what tokens got from queries that were taken back stays.
    Four bytes of mass and eight of position are held for each token of each head.
    """

    window: int | None = None
    """Queries whose masses count, which the latest step of a sequence has to be. None: all queries so far."""

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
        asked: AttentionOptions = {**options, "return_mass": True}
        *found, masses = step.attend(q, layer=layer, **asked)
        begin = 0
        for seq_id, count, of_heads in zip(step.seq_ids, step.num_new_tokens, masses, strict=True):
            if count:
                self._remember(seq_id, layer, step.positions[begin : begin + count], of_heads)
            begin += count
        return tuple(found) if len(found) > 1 else found[0]

    def _remember(self, seq_id: int, layer: int, new: np.ndarray, masses: list[np.ndarray]) -> None:
        """Masses in the order of the positions that each head holds, the new ones last."""
        earlier = [at[at < new[0]] for at in self.cache.positions(seq_id, layer=layer)]
        if seq_id not in self._seen:
            for gone in set(self._seen) - set(self.cache.seq_lens):
                self._seen.pop(gone, None)
            self._seen[seq_id] = {}
        of_layers = self._seen[seq_id]
        if self.window is None and layer in of_layers:
            so_far = _masses_at(of_layers[layer], earlier)
            masses = [
                np.concatenate((mass[: len(sums)] + sums, mass[len(sums) :]))
                for mass, sums in zip(masses, so_far, strict=True)
            ]
        of_layers[layer] = Seen(int(new[-1]) + 1, len(new), [np.append(at, new) for at in earlier], masses)

    def fork(self, seq_id: int) -> int:
        twin = super().fork(seq_id)
        self._seen[twin] = dict(self._seen.get(seq_id, {}))
        return twin

    def masses(self, seq_id: int, layer: int, held: list[np.ndarray]) -> list[np.ndarray]:
        """What the tokens at some positions of each head got; raises unless the newest queries have been seen."""
        seen = self._seen.get(seq_id, {}).get(layer)
        if seen is None or seen.end != self.cache.seq_len(seq_id):
            raise ValueError(
                f"seq_id: expected a sequence whose newest tokens have attended by way of {self._name}.attend; "
                f"those of sequence {seq_id} have not in layer {layer}"
            )
        if self.window not in (None, seen.num_queries):
            raise ValueError(
                f"seq_id: expected one whose latest step is of window={self.window} tokens; that of sequence {seq_id} "
                f"was of {seen.num_queries}: let the prompt's last {self.window} be a step of their own"
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
