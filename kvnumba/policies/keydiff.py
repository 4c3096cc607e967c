"""KeyDiff: the tokens whose keys are least like the others."""

from __future__ import annotations

import numpy as np

from kvnumba.policies.base import Policy


class KeyDiff(Policy):
    """Keeps the tokens whose keys have the smallest cosine with the mean direction of the keys of their head.

    After Park et al., 2025 (arXiv 2504.15364): it is the order of the sums of a key's cosines with all keys. Nothing of
    queries is asked, so `attend` need not be called.

    Parameters
    ----------
    cache : PerHeadKVCache
    """

    def scores(self, seq_id: int, layer: int, held: list[np.ndarray], budget: int) -> list[np.ndarray]:
        scores = []
        for keys, _ in self.cache.get_kv(seq_id, layer=layer):
            length = np.linalg.norm(keys, axis=1, keepdims=True)
            directions = np.divide(keys, length, out=np.zeros_like(keys), where=length > 0)
            scores.append(-(directions @ directions.mean(axis=0)))
        return scores
