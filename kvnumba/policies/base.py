"""What all policies share: how they are used, and that the tokens with the highest scores stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from kvnumba import arguments
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.per_head import PerHeadKVCache
from kvnumba.caches.per_head_step import PerHeadStep
from kvnumba.caches.step import Step
from kvnumba.options import AttentionOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Policy(ABC):
    """Chooses the tokens that the KV heads of a cache keep; all policies are used alike::

        policy = H2O(cache)
        out = policy.attend(step, q, layer=layer)  # in the place of step.attend
        policy.evict(seq_id, 1024)  # whenever one likes: each KV head keeps 1,024 tokens

    A policy of one's own defines `scores`.

    Parameters
    ----------
    cache : PerHeadKVCache
        Each head of each layer keeps tokens of its own. `StreamingLLM`, which keeps the same everywhere, takes a
        `PagedKVCache` too.
    """

    serves: ClassVar[tuple[type, ...]] = (PerHeadKVCache,)
    smallest_budget: int = 1
    """Tokens that the policy keeps in any case."""

    def __init__(self, cache: PagedKVCache | PerHeadKVCache) -> None:
        if not isinstance(cache, self.serves):
            expected = " or a ".join(each.__name__ for each in self.serves)
            raise TypeError(f"cache: expected a {expected} for {self._name}; got a {type(cache).__name__}")
        self.cache: Any = cache

    @property
    def _name(self) -> str:
        return type(self).__name__

    def attend(
        self, step: Step | PerHeadStep, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]
    ) -> Any:
        """`step.attend`, of which the policy remembers what it needs. Called once a layer, for each step."""
        return step.attend(q, layer=layer, **options)

    def fork(self, seq_id: int) -> int:
        """`cache.fork`, for a sequence of which the policy is to know what it knows of the first."""
        twin: int = self.cache.fork(seq_id)
        return twin

    def reorder(self, seq_ids: Sequence[int], parents: Sequence[int]) -> None:
        """`cache.reorder`, after which the policy knows of each sequence what it knew of its parent."""
        self.cache.reorder(seq_ids, parents)

    def evict(self, seq_id: int, budget: int) -> None:
        """Let each KV head of a sequence keep `budget` tokens, and give back the blocks that become free.

        Heads that hold no more than that keep all. Of tokens with the same score the earlier stays.

        Parameters
        ----------
        seq_id : int
        budget : int
            Tokens that a head keeps, at least `smallest_budget`.

        Raises
        ------
        CacheFull
            As `cache.keep`; nothing has changed.
        ValueError
            The budget is too small, the id is unknown or finished, or the policy has not seen what it needs.
        """
        budget = arguments.integer("budget", budget, minimum=1)
        if budget < self.smallest_budget:
            raise ValueError(
                f"budget: expected at least {self.smallest_budget}, which {self._name} keeps in any case; got {budget}"
            )
        cache = self.cache
        if isinstance(cache, PagedKVCache):
            cache.keep(seq_id, self._chosen(seq_id, 0, [cache.positions(seq_id)], budget)[0])
        else:
            held = {layer: cache.positions(seq_id, layer=layer) for layer in range(cache.num_layers)}
            cache.keep(seq_id, {layer: self._chosen(seq_id, layer, at, budget) for layer, at in held.items()})

    def _chosen(self, seq_id: int, layer: int, held: list[np.ndarray], budget: int) -> list[np.ndarray]:
        """Of the positions that the heads of a layer hold, those that they keep."""
        if all(len(at) <= budget for at in held):
            return held
        scores = [np.asarray(of_head, float) for of_head in self.scores(seq_id, layer, held, budget)]
        found, expected = [x.shape for x in scores], [at.shape for at in held]
        if found != expected:
            raise ValueError(
                f"scores: expected one for each token that a head holds, {expected}; got {found}"
            )
        best = [np.argsort(-of_head, kind="stable")[:budget] for of_head in scores]
        return [at[np.sort(chosen)] for at, chosen in zip(held, best, strict=True)]

    @abstractmethod
    def scores(self, seq_id: int, layer: int, held: list[np.ndarray], budget: int) -> list[np.ndarray]:
        """How much each token is worth that the heads of a layer hold; inf for one that is kept in any case.

        Parameters
        ----------
        seq_id, layer : int
        held : list of H (tokens,) int64
            The positions of each head's tokens; of a `PagedKVCache`, one array for all heads and layers.
        budget : int
            Tokens that each head may keep. At least one head holds more.

        Returns
        -------
        list of H (tokens,) float
        """
