"""Measures a calibration: shifts and scales of key channels, from a model's keys and queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from kvnumba.arguments import check_shape
from kvnumba.arrays import float_array
from kvnumba.calibration import Calibration

MIN_TOKENS = 64


def calibrate(keys: Iterable[Any], queries: Iterable[Any], *, source: str = "") -> Calibration:
    """Measure how a model's key channels are to be shifted and scaled before they are quantised.

    The shift of a channel is its mean m, its scale ``sqrt(std of the keys / root mean square of the queries)``, over
    the query heads that read the KV head. This is the middle way of SmoothQuant (Xiao et al., 2023) between what
    quantised keys ask for and what the queries do with their errors.

    Parameters
    ----------
    keys : iterable of (T, H, D)
        Of each layer, as attention sees them: after rotary positions. float32, float16, float64 or bfloat16.
    queries : iterable of (T, Hq, D)
        Of each layer and the same tokens; Hq is a multiple of H. Both may be generators: one layer is looked at after
        the other.
    source : str
        What the tokens were, for those who read the calibration later.

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError, TypeError
        An argument is not as above, there are fewer than 64 tokens (1,000 are good, 4,000 better), or a channel has
        no spread or is not used by any query.
    """
    layers: list[ChannelStatistics] = []
    for i, (k, q) in enumerate(zip_longest(keys, queries)):
        if k is None or q is None:
            fewer, more = ("keys", "queries") if k is None else ("queries", "keys")
            raise ValueError(f"{fewer}: expected as many layers as {more}; got {i}")
        layer = ChannelStatistics(i)
        layer.add(k, q)
        if layers and layer.num_tokens != layers[0].num_tokens:
            raise ValueError(
                f"keys[{i}]: expected {layers[0].num_tokens} tokens, as of the layers before; got {layer.num_tokens}"
            )
        layers.append(layer)
    return calibration_of(layers, source)


class ChannelStatistics:
    """Sums over the keys and queries of one layer, to which tokens are added a chunk at a time.

    Attributes
    ----------
    layer : int
        For messages.
    num_tokens : int
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.num_tokens = 0
        self._origin: Any = (
            None  # (H, D), the first key: sums of what differs from it stay exact, however large it is
        )
        self._sums: Any = 0.0  # (H, D) each
        self._squares: Any = 0.0
        self._query_squares: Any = 0.0

    def add(self, k: Any, q: Any) -> None:
        """Count the keys (T, H, D) and queries (T, Hq, D) of more tokens, after checks."""
        names = f"keys[{self.layer}]", f"queries[{self.layer}]"
        k, q = float_array(names[0], k), float_array(names[1], q)
        heads = (None, None) if self._origin is None else self._origin.shape
        check_shape(names[0], k, (None, *heads), "T H D")
        count, num_kv_heads, head_dim = k.shape
        check_shape(names[1], q, (count, None, head_dim), "T Hq D")
        num_qo_heads = q.shape[1]
        if not num_kv_heads or not num_qo_heads or num_qo_heads % num_kv_heads:
            raise ValueError(
                f"{names[1]}: expected a multiple of the {num_kv_heads} heads of the keys; got {num_qo_heads} heads"
            )
        for name, x in zip(names, (k, q), strict=True):
            if not np.isfinite(x).all():
                raise ValueError(f"{name}: expected finite values; got {x[~np.isfinite(x)][0]}")
        if not count:
            return
        if self._origin is None:
            self._origin = k[0].astype(np.float64)
        differences = k - self._origin
        groups = q.astype(np.float64).reshape(count, num_kv_heads, -1, head_dim)
        self.num_tokens += count
        self._sums = self._sums + differences.sum(axis=0)
        self._squares = self._squares + (differences**2).sum(axis=0)
        self._query_squares = self._query_squares + (groups**2).mean(axis=2).sum(axis=0)

    def shift_and_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """m and s of each channel, (H, D) float32 each; raises if the tokens do not tell them."""
        if self.num_tokens < MIN_TOKENS:
            raise ValueError(
                f"keys[{self.layer}]: expected at least {MIN_TOKENS} tokens, 1,000 are good and 4,000 better; "
                f"got {self.num_tokens}"
            )
        mean = self._sums / self.num_tokens
        variance = self._squares / self.num_tokens - mean**2
        self._require(variance > 0, "keys", "that varies from token to token")
        self._require(self._query_squares > 0, "queries", "that is not 0 for all tokens")
        # sqrt(std / rms) is the fourth root of the quotient of their squares
        scale = (variance / (self._query_squares / self.num_tokens)) ** 0.25
        return (self._origin + mean).astype(np.float32), scale.astype(np.float32)

    def _require(self, good: np.ndarray, argument: str, what: str) -> None:
        if not good.all():
            head, channel = np.argwhere(~good)[0]
            raise ValueError(
                f"{argument}: expected a channel {what}; layer {self.layer}, KV head {head}, channel {channel} does not"
            )


def calibration_of(layers: Sequence[ChannelStatistics], source: str) -> Calibration:
    """The calibration that a model's layers ask for."""
    if not layers:
        raise ValueError("keys: expected at least one layer; got none")
    shifts, scales = zip(*(layer.shift_and_scale() for layer in layers), strict=True)
    return Calibration(shifts, scales, layers[0].num_tokens, source)
