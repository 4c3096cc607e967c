"""Layers of kinds that kvnumba does not keep: transformers' own, beside ours in one cache.

Nothing here knows what such a layer has: states of a recurrence, of a convolution, keys of an indexer. Its attributes
are walked, so kinds that come later need no code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING


def make_layer(kind: str, options: dict[str, Any]) -> Any:
    """An empty layer of transformers, of a kind that a config names."""
    if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
        raise ValueError(
            f"config: layers of type {kind!r} are not known to transformers, or only once the model is loaded"
        )
    return DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)


def copied(layer: Any) -> Any:
    """The same layer with tensors of its own."""
    twin = copy.copy(layer)
    vars(twin).update(map_tensors(torch.Tensor.clone, vars(layer)))
    return twin


def become(layer: Any, other: Any) -> None:
    """Let a layer hold what another of its kind holds, in tensors of its own."""
    vars(layer).clear()
    vars(layer).update(vars(copied(other)))


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A value with its tensors changed, in dicts, lists and tuples too; these are made anew, all else is shared."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {key: map_tensors(change, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value
