"""SnapKV: the tokens to which the end of the prompt attends, with their neighbours."""

from __future__ import annotations

import numpy as np

from kvnumba import arguments
from kvnumba.caches.per_head import PerHeadKVCache
from kvnumba.policies.masses import MassPolicy


class SnapKV(MassPolicy):
    """Keeps the prompt's last `window` tokens, and those before that get most attention from these.

    After Li et al., 2024 (arXiv 2404.14469). What the tokens get is smoothed, so that neighbours of the best stay too:
    by the mean over `kernel` tokens that a head holds, zeros beyond the ends, as in the authors' code and in kvpress;
    the paper speaks of the maximum. The last `window` tokens have to be a step of their own before `evict`.

    Parameters
    ----------
    cache : PerHeadKVCache
    window, kernel : int
        In tokens; the kernel is odd.
    """

    def __init__(self, cache: PerHeadKVCache, window: int = 32, kernel: int = 7) -> None:
        super().__init__(cache)
        self.window = self.smallest_budget = arguments.integer("window", window, minimum=1)
        self.kernel = arguments.integer("kernel", kernel, minimum=1)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number; got {kernel}")

    def scores(self, seq_id: int, layer: int, held: list[np.ndarray], budget: int) -> list[np.ndarray]:
        scores = self.masses(seq_id, layer, held)
        window_begins = self.cache.seq_len(seq_id) - self.window
        for at, of_head in zip(held, scores, strict=True):
            before = np.searchsorted(at, window_begins)
            sums = np.cumsum(np.pad(of_head[:before], (self.kernel // 2 + 1, self.kernel // 2)), dtype=float)
            of_head[:before] = sums[self.kernel :] - sums[: -self.kernel]
            of_head[before:] = np.inf
        return scores
