"""KnormPress: the tokens whose keys are shortest."""

from __future__ import annotations

import numpy as np

from kvnumba.policies.base import Policy


class KnormPress(Policy):
    """Keeps the tokens whose keys have the smallest L2 norm, which is where much attention goes.

    After Devoto et al., 2024 (arXiv 2406.11430), by the name that it has in kvpress. Nothing of queries is asked, so
    `attend` need not be called.

    Parameters
    ----------
    cache : PerHeadKVCache
    """

    def scores(self, seq_id: int, layer: int, held: list[np.ndarray], budget: int) -> list[np.ndarray]:
        return [-np.linalg.norm(keys, axis=1) for keys, _ in self.cache.get_kv(seq_id, layer=layer)]
