"""Attention over parts of the keys, combined."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvnumba.arrays import float_array


def merge_states(outs: Any, lses: Any) -> tuple[np.ndarray, np.ndarray]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    The same operation as FlashInfer's ``merge_states``, with the states along the first axis.

    Parameters
    ----------
    outs : (N, ..., D) float
        Partial results, or a sequence of N arrays (..., D).
    lses : (N, ...) float
        Their ``lse``, natural logarithm; -inf for a state that saw no key.

    Returns
    -------
    out : (..., D) float32
    lse : (...) float32
        Where no state saw a key, 0 and -inf.
    """
    states, lse = _arrays("outs", outs), np.stack(_arrays("lses", lses))
    if states[0].ndim < 1 or (len(states), *states[0].shape[:-1]) != lse.shape:
        shape = (len(states), *states[0].shape)
        raise ValueError(f"lses: expected the shape of outs {shape} without D; got {lse.shape}")
    top = lse.max(axis=0)
    shift = np.where(np.isneginf(top), np.float32(0), top)
    weights = np.exp(lse - shift)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):
        merged_lse = shift + np.log(total)
    weights /= np.where(total > 0, total, np.float32(1))
    merged = weights[0, ..., None] * states[0]
    for weight, state in zip(weights[1:], states[1:], strict=True):
        merged += weight[..., None] * state
    return merged, merged_lse


def _arrays(argument: str, states: Any) -> list[np.ndarray]:
    arrays = [float_array(argument, state) for state in states]
    if not arrays or any(array.shape != arrays[0].shape for array in arrays):
        shapes = [array.shape for array in arrays]
        raise ValueError(f"{argument}: expected one state or more, all of one shape; got shapes {shapes}")
    return arrays
