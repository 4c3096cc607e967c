"""From a model's logits to its next token."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvnumba import arguments
from kvnumba.arrays import float_array


def sample(logits: Any, temperature: float = 0.0, rng: np.random.Generator | None = None) -> int:
    """Choose the next token.

    Parameters
    ----------
    logits : (vocab_size,) float32, float16, float64 or bfloat16
        Of the newest token. A token whose logit is -inf is never chosen.
    temperature : float
        0, the default, takes the likeliest token. Otherwise the token is drawn from
        softmax(logits / temperature): below 1 the likelier ones are preferred, above 1 all become more equal.
    rng : numpy.random.Generator, optional
        Where the random numbers come from. Default: a new generator with a fresh seed.

    Returns
    -------
    int
        The token's id.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above, a logit is NaN or +inf, or all are -inf.
    """
    logits = float_array("logits", logits)
    arguments.check_shape("logits", logits, (None,), "vocab_size")
    temperature = checked_temperature(temperature)
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng: expected a numpy.random.Generator; got {type(rng).__name__}")
    largest = logits.max(initial=-np.inf)
    if not np.isfinite(largest):
        raise ValueError(f"logits: expected finite numbers, or -inf for some; the largest is {largest}")
    if temperature == 0:
        return int(logits.argmax())
    rng = np.random.default_rng() if rng is None else rng
    with np.errstate(over="ignore"):  # close to temperature 0 all but the likeliest become -inf
        weights = softmax((logits.astype(np.float64) - largest) / temperature)
    below = weights.cumsum()  # rounding may leave its last element a little below 1
    return int(below.searchsorted(rng.random()).clip(max=len(logits) - 1))


def softmax(x: np.ndarray) -> np.ndarray:
    """``exp(x) / sum(exp(x))`` along the last axis of x (..., n), which is not empty: (..., n) float64."""
    weights = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """The natural logarithm of `softmax`, finite wherever x is: (..., n) float64."""
    below = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


def checked_temperature(temperature: Any) -> float:
    """The temperature as a float, 0 or more."""
    number = arguments.real("temperature", temperature)
    if number < 0:
        raise ValueError(f"temperature: expected 0 or more; got {number}")
    return number
