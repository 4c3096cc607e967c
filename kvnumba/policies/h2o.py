"""H2O: the tokens that have had most attention, and the newest."""

from __future__ import annotations

import numpy as np

from kvnumba.policies.masses import MassPolicy


class H2O(MassPolicy):
    """Half of the budget is for the newest tokens, half for the "heavy hitters" before them.

    These are the tokens that got most attention from all queries so far. After Zhang et al., 2023 (arXiv 2306.14048),
    who evict after each token; here that is after whatever steps `evict` is called.

    Parameters
    ----------
    cache : PerHeadKVCache
    """

    def scores(self, seq_id: int, layer: int, held: list[np.ndarray], budget: int) -> list[np.ndarray]:
        scores = self.masses(seq_id, layer, held)
        newest = budget - budget // 2
        for of_head in scores:
            of_head[-newest:] = np.inf
        return scores
