"""TOVA: the tokens to which the newest token attends."""

from __future__ import annotations

import numpy as np

from kvnumba.policies.masses import MassPolicy


class TOVA(MassPolicy):
    """Keeps the tokens that got most attention from the newest query, in the mean of all heads of a layer.

    So the heads of a layer keep the same tokens. After Oren et al., 2024 (arXiv 2401.06104); the newest token has no
    privilege. A prompt's last token has to be a step of its own before `evict`.

    Parameters
    ----------
    cache : PerHeadKVCache
    """

    window = 1

    def scores(self, seq_id: int, layer: int, held: list[np.ndarray], budget: int) -> list[np.ndarray]:
        mean = np.zeros(self.cache.seq_len(seq_id))
        for at, mass in zip(held, self.masses(seq_id, layer, held), strict=True):
            mean[at] += mass
        return [mean[at] for at in held]
