"""StreamingLLM: the first tokens and the newest."""

from __future__ import annotations

import numpy as np

from kvnumba import arguments
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.per_head import PerHeadKVCache
from kvnumba.policies.base import Policy


class StreamingLLM(Policy):
    """Keeps the first `sinks` tokens of a sequence, on which attention rests that has no better place, and the newest.

    After Xiao et al., 2023 (arXiv 2309.17453). Tokens stay at the positions at which they were written, whereas the
    paper counts those that are left.

    Parameters
    ----------
    cache : PagedKVCache or PerHeadKVCache
    sinks : int
    """

    serves = (PagedKVCache, PerHeadKVCache)

    def __init__(self, cache: PagedKVCache | PerHeadKVCache, sinks: int = 4) -> None:
        super().__init__(cache)
        self.sinks = arguments.integer("sinks", sinks, minimum=0)
        self.smallest_budget = self.sinks + 1

    def scores(self, seq_id: int, layer: int, held: list[np.ndarray], budget: int) -> list[np.ndarray]:
        return [np.where(at < self.sinks, np.inf, at) for at in held]
