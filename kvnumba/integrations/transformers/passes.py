"""How far a forward pass has come through the layers of a cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvnumba.integrations.transformers import foreign


class PassCache(Cache):
    """A cache that can say whether the latest forward pass went through all of its layers.

    A pass that stops on its way, by an error or an interrupt, has changed the states of some layers and not of others.
    Keys and values tell by their number; states of a recurrence do not, so the calls for them are watched. A model
    makes each call once a layer and pass: a layer before the latest one, or the same call again, begins a new pass. A
    layer counts as done when all its states have been asked for.

    Parameters
    ----------
    layers : list
    watched : bool
        Whether any layer has such states.
    """

    def __init__(self, layers: list[Any], watched: bool) -> None:
        super().__init__(layers=layers)
        self._watched = watched
        self._last = max(n for n, layer in enumerate(layers) if not isinstance(layer, foreign.DummyLayer))
        self._forget_pass()

    def _forget_pass(self) -> None:
        """What comes next begins a pass, and none before it is incomplete."""
        self._reached = -1
        self._calls: set[str] = set()  # for the layer that the pass has reached
        self._length_before = 0  # tokens when it began

    def _pass_is_complete(self) -> bool:
        if self._reached in (-1, self._last):
            return _is_complete(self.layers[self._last], self._calls)
        passed, to_come = self.layers[: self._reached], self.layers[self._reached + 1 :]
        # a model that keeps states in itself does not ask for those of the last layers either
        return foreign.are_untouched(passed) and not any(isinstance(one, CacheLayerMixin) for one in to_come)

    def _reach(self, layer_idx: int, call: str) -> None:
        """A model computes a layer: it writes, or gets what it may write to in place."""
        if layer_idx != self._reached or call in self._calls:
            if layer_idx <= self._reached or self._reached < 0:
                if not self._pass_is_complete():
                    raise ValueError(
                        "past_key_values: the forward pass before this one did not reach the last layer; "
                        "crop(0) forgets it where that is possible, and reset() everything; "
                        "use transformers.DynamicCache to skip layers"
                    )
                self._length_before = self.get_seq_length()
            self._reached = layer_idx
            self._calls.clear()
        self._calls.add(call)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._watched:
            self._reach(layer_idx, "keys")
        pair: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].update(
            key_states, value_states, *args, **kwargs
        )
        return pair

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        self._reach(layer_idx, "indexer")
        return super().update_indexer(indexer_key_states, layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        has: bool = super().has_previous_state(layer_idx, state_idx)
        if has and layer_idx is not None:  # until transformers 5.21 models take the states themselves then
            self._reach(layer_idx, "take")
        return has

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        self._reach(layer_idx, f"get conv {state_idx}")
        return super().get_conv_state(layer_idx, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self._reach(layer_idx, f"conv {state_idx}")
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        self._reach(layer_idx, f"get recurrent {state_idx}")
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self._reach(layer_idx, f"recurrent {state_idx}")
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)


def _is_complete(layer: Any, calls: set[str]) -> bool:
    """Whether a pass, if there is one, has made all calls for a layer."""
    if not calls:
        return True
    if isinstance(layer, CacheLayerMixin) and "keys" not in calls:
        return False
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return True
    return "take" in calls or all(
        # a single token's state may be written in place, where it was got
        {f"{name} {n}", f"get {name} {n}"} & calls
        for name, has in (
            ("conv", layer.is_conv_states_initialized),
            ("recurrent", layer.is_recurrent_states_initialized),
        )
        for n in has
        if has[n]
    )
