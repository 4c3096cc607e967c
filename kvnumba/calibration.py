"""Calibration: shifts and scales of a model's key channels, measured on a text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Calibration:
    """Shift m and scale s of every key channel of a model's layers: keys are stored as ``(k - m) / s``.

    Attributes
    ----------
    shifts, scales : tuple of (H, D) float32
        Of each layer. Scales are positive.
    num_tokens : int
        Tokens from which they were measured.
    source : str
        What these tokens were; may be empty.
    """

    shifts: tuple[np.ndarray, ...]
    scales: tuple[np.ndarray, ...]
    num_tokens: int
    source: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that tell calibrations apart."""
        digest = hashlib.sha256()
        for array in (*self.shifts, *self.scales):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:8]

    def __repr__(self) -> str:
        shapes = sorted({array.shape for array in self.shifts})
        source = f" of {self.source}" if self.source else ""
        return (
            f"Calibration({self.fingerprint}: {len(self.shifts)} layers of (H, D) = "
            f"{', '.join(map(str, shapes))}, {self.num_tokens:,} tokens{source})"
        )
