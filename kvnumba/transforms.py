"""Row transforms: what is done to keys and values before they are stored, so that few bits cost less.

Two steps, each of which leaves attention as it is:

- Calibration. Each channel of the keys of a KV head is shifted and scaled, and the queries' the other way:
  ``q . k = (q * s) . ((k - m) / s) + q . m``. Channels that are much larger than others, as real models have them, then
  take no bits from the others. After SmoothQuant (Xiao et al., 2023), whose middle way between keys and queries it is.
- Rotation. Keys and queries, and values, are multiplied by a Hadamard matrix, which spreads what is left of outliers
  over all elements of a row; the output is multiplied by it again. After QuaRot (Ashkboos et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvnumba.calibration import Calibration


def rotation_size(head_dim: int) -> int:
    """Elements that are rotated together: the largest power of two that divides a row. 1: nothing is."""
    return head_dim & -head_dim


def rotate(x: np.ndarray) -> np.ndarray:
    """Rows (..., D) times the normalised Hadamard matrix of `rotation_size`, block by block; its own inverse."""
    size = rotation_size(x.shape[-1])
    rows = np.asarray(x, np.float32).reshape(-1, size)
    half = 1
    while half < size:  # the fast Walsh-Hadamard transform
        pairs = rows.reshape(-1, 2, half)
        rows = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1)
        half *= 2
    return rows.reshape(x.shape) * np.float32(size**-0.5)


@dataclass(frozen=True)
class RowTransform:
    """What is done to the rows of a cache; its methods define it, and are the reference for every backend.

    Arrays are (..., heads, D) float32 of one layer; query heads that share a KV head are neighbours.

    Attributes
    ----------
    rotation : bool
        Whether keys, queries and values are rotated.
    calibration : Calibration, optional
        Shifts and scales of the keys. None: they stay as they are.
    """

    rotation: bool
    calibration: Calibration | None

    @property
    def name(self) -> str:
        """Says which transform it is; saved with a cache's contents and compared when they are loaded."""
        parts = ["rotation"] if self.rotation else []
        if self.calibration is not None:
            parts.append(f"calibration {self.calibration.fingerprint}")
        return ", ".join(parts)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """(a, b): no element of a stored key of any layer is larger than a times the key's norm, plus b."""
        if self.calibration is None:
            return 1.0, 0.0
        least = min(float(scales.min()) for scales in self.calibration.scales)
        shift = max(float(np.linalg.norm(shifts, axis=-1).max()) for shifts in self.calibration.shifts)
        return 1 / least, shift / least

    def store_keys(self, k: np.ndarray, layer: int) -> np.ndarray:
        """Keys as they are stored: ``rotate((k - m) / s)``."""
        if self.calibration is not None:
            k = (k - self.calibration.shifts[layer]) / self.calibration.scales[layer]
        return rotate(k) if self.rotation else k

    def load_keys(self, k: np.ndarray, layer: int) -> np.ndarray:
        """The inverse of `store_keys`."""
        if self.rotation:
            k = rotate(k)
        if self.calibration is not None:
            k = k * self.calibration.scales[layer] + self.calibration.shifts[layer]
        return k

    def queries(self, q: np.ndarray, layer: int) -> np.ndarray:
        """Queries as they meet stored keys: ``rotate(q * s)``."""
        if self.calibration is not None:
            q = q * _of_query_heads(self.calibration.scales[layer], q.shape[-2])
        return rotate(q) if self.rotation else q

    def offsets(self, q: np.ndarray, layer: int) -> np.ndarray:
        """What a query's products with stored keys lack, (..., heads): ``q . m``.

        It is the same for all keys, so it does not change the softmax over them; a soft cap, sinks and lse see it.
        """
        if self.calibration is None:
            return np.zeros(q.shape[:-1], np.float32)
        shifts = _of_query_heads(self.calibration.shifts[layer], q.shape[-2])
        return np.einsum("...d,...d->...", q, shifts)

    def store_values(self, v: np.ndarray) -> np.ndarray:
        """Values as they are stored."""
        return rotate(v) if self.rotation else v

    def load_values(self, v: np.ndarray) -> np.ndarray:
        """The inverse of `store_values`, of stored values and of attention's output alike."""
        return rotate(v) if self.rotation else v


def _of_query_heads(x: np.ndarray, num_qo_heads: int) -> np.ndarray:
    """Rows of KV heads (H, D), each repeated for its query heads: (Hq, D)."""
    return np.repeat(x, num_qo_heads // len(x), axis=0)
