"""Layers of kinds that kvnumba does not keep: transformers' own, beside ours in one cache.

Nothing here knows what such a layer has: states of a recurrence, of a convolution, keys of an indexer. Its attributes
are walked, so kinds that come later need no code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

try:
    from transformers.cache_utils import DummyLayer as DummyLayer
except ImportError:  # before transformers 5.23

    class DummyLayer(LinearAttentionLayer):  # type: ignore[no-redef]
        """A layer that keeps nothing."""


ATOMS = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""What attributes are, besides tensors, dicts, lists and tuples."""


def make_layer(kind: str, options: dict[str, Any]) -> Any:
    """An empty layer of transformers, of a kind that a config names."""
    if kind in ("moe", "mlp"):  # these names too are of versions before 5.23
        return DummyLayer()
    if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
        raise ValueError(
            f"config: layers of type {kind!r} are unknown to this version of transformers, or until the model is made"
        )
    return DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)


def copied(layer: Any, change: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone) -> Any:
    """A layer that holds the same in tensors of its own, or in tensors that are changed otherwise."""
    twin = copy.copy(layer)
    vars(twin).update(map_tensors(change, vars(layer)))
    return twin


def shared(layer: Any) -> Any:
    """A layer that holds the same tensors, and can let go of them by itself."""
    return copied(layer, lambda tensor: tensor)


def become(layer: Any, other: Any) -> None:
    """Let a layer, which a model may know, hold what another one holds, which is not used any more."""
    vars(layer).clear()
    vars(layer).update(vars(other))


def activate_past_recording(layer: Any) -> None:
    """Let a layer that can do so keep what a crop might want back."""
    if hasattr(layer, "activate_past_recording"):
        layer.activate_past_recording()


def is_croppable(layer: Any) -> bool:
    """Whether a layer's `crop` can put all of it back, if past recording is active where there is such a thing.

    A class that adds to what `reset` empties, but not to what `crop` cuts, is not trusted to.
    """
    classes = type(layer).__mro__
    crop, reset = (
        next(n for n, one in enumerate(classes) if name in vars(one)) for name in ("crop", "reset")
    )
    return crop <= reset and layer.is_croppable


def crops_itself(layer: Any) -> bool:
    """Whether a layer's `crop` can put all of it back, as it is now."""
    return is_croppable(layer) and getattr(layer, "record_past", True)


def cropped(
    layers: list[Any],
    remembered: Mapping[int, Any],
    length: int,
    tokens_to_remove: int,
    complete: bool,
) -> list[Any]:
    """What layers hold when their last tokens are forgotten; the layers themselves are not changed.

    Parameters
    ----------
    layers : list
    remembered : mapping
        What layers held when there were `length` tokens, by their place in the list.
    length, tokens_to_remove : int
        Tokens to stay, and to go.
    complete : bool
        Whether the latest forward pass reached the last layer.
    """
    results = []
    for n, layer in enumerate(layers):
        counted = isinstance(layer, CacheLayerMixin)
        if crops_itself(layer) and (counted or complete):
            result = shared(layer)
            result.crop(min(length - layer.get_seq_length(), 0) if counted else -tokens_to_remove)
        elif complete and tokens_to_remove == 0:
            result = shared(layer)
        elif n in remembered:
            result = copied(remembered[n])
        else:
            raise ValueError(
                f"crop: a {type(layer).__name__} cannot go back to {length} tokens, its state is that of all tokens"
                f"{'' if complete else ' and of a forward pass that stopped on its way'}: call checkpoint() where you "
                f"may want to return to, or go on with a copy.deepcopy(cache); reset() empties the cache"
            )
        results.append(result)
    return results


def are_untouched(layers: list[Any]) -> bool:
    """Whether there are layers of states that no forward pass has written to: some models keep theirs in themselves."""
    states = [layer for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    return bool(states) and not any(any(layer.has_previous_state.values()) for layer in states)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A value with its tensors changed, in dicts, lists and tuples too, which are made anew."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {key: map_tensors(change, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value if isinstance(value, ATOMS) else copy.deepcopy(value)


def tensors_of(layer: Any) -> Iterator[torch.Tensor]:
    """All tensors that a layer holds."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, vars(layer))
    yield from found
