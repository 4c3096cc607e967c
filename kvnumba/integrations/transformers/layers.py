"""The layers of a cache as models see them: what `update` takes goes to a group, and leads attention back to it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from kvnumba.integrations.transformers.deferred import Deferred
from kvnumba.integrations.transformers.masks import CausalMask
from kvnumba.integrations.transformers.storage import LayerGroup

NAME = "kvnumba"
"""Of the attention implementation."""


class Appended:
    """What one `update` appended to a layer. The keys and values that it returns lead the attention function here.

    Parameters
    ----------
    group, index
        The layer.
    keys, values : (B, H, q, D) and (B, H, q, Dv)
        The new ones.
    """

    def __init__(self, group: LayerGroup, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._group = group
        self._index = index
        self._new = keys, values
        self._forward = group.append(index, keys, values)
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None

    def fits(self, mask: CausalMask) -> bool:
        """Whether `attend` shows what the mask shows; raises where nothing can."""
        self._require_latest()
        return self._group.fits(self._index, mask)

    def attend(
        self,
        query: torch.Tensor,
        mask: CausalMask,
        sm_scale: float | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of queries (B, Hq, q, D), out of the storage: (B, q, Hq, Dv); 0 where the query is padding."""
        if self._index == 0 and mask.padding is not None:
            self._group.leave_out(mask.padding, *self._new)
        return self._group.attend(self._index, query, mask.window_left, sm_scale, soft_cap, sinks)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that the new tokens see, in the dtype of the new keys; 0 where padding was."""
        if self._dense is None:
            self._require_latest()
            self._dense = self._group.dense(self._index, self._new[0])
        return self._dense

    def deferred(self) -> tuple[DeferredKeys, DeferredValues]:
        """`dense`, computed only if somebody needs it."""
        keys, values = self._new
        batch, heads, _, head_dim = keys.shape
        dtype, device, visible = keys.dtype, keys.device, self._forward.visible
        return (
            DeferredKeys((batch, heads, visible, head_dim), dtype, device, self),
            DeferredValues((batch, heads, visible, values.shape[3]), dtype, device, self),
        )

    def _require_latest(self) -> None:
        if self._group.forward is not self._forward or not self._forward.step.is_latest():
            raise ValueError("key: these keys are not those of the latest update of their KVNumbaCache")


class DeferredKeys(Deferred):
    """All keys that the new tokens of a layer see, (B, H, k, D)."""

    source: Appended

    def compute(self) -> torch.Tensor:
        """The keys, read from the storage."""
        return self.source.dense()[0]


class DeferredValues(Deferred):
    """All values that the new tokens of a layer see, (B, H, k, Dv)."""

    source: Appended

    def compute(self) -> torch.Tensor:
        """The values, read from the storage."""
        return self.source.dense()[1]


class KVNumbaLayer(CacheLayerMixin):
    """The keys and values of one model layer, in a group with those of its kind.

    What concerns whole sequences (crop, reorder, reset) is done for the group, by `KVNumbaCache`.
    """

    is_croppable = True

    def __init__(self, config: PreTrainedConfig, group: LayerGroup, index: int) -> None:
        super().__init__()
        self._config = config
        self.group = group
        self.index = index
        self.sliding_window = group.sliding_window
        self.is_sliding = group.sliding_window is not None

    @property
    def is_initialized(self) -> bool:
        """Whether there is a pool."""
        return self.group.started

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:  # the base class sets it
        pass

    @property
    def record_past(self) -> bool:
        """Whether sequences that begin from here on keep what falls out of their window."""
        return self.group.record_past

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the pool, for tensors of this shape (B, H, any, D), dtype and device."""
        if not self.is_initialized:
            self.group.start(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens, keys (B, H, q, D) and values (B, H, q, Dv).

        Returns
        -------
        keys, values : (B, H, k, D) and (B, H, k, Dv)
            All that the new tokens see, in the dtype of the new ones: `Deferred` with the attention
            implementation "kvnumba", dense with any other.
        """
        if self.index == 0:  # the same for all layers of a pass: a config takes its time to answer
            self.group.deferring = self._config._attn_implementation == NAME
        appended = Appended(self.group, self.index, key_states, value_states)
        return appended.deferred() if self.group.deferring else appended.dense()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys an `update` of so many tokens is going to return, and the position of the first."""
        length = self.get_seq_length()
        earlier = length if self.sliding_window is None else min(length, self.sliding_window - 1)
        return earlier + query_length, length - earlier

    def get_seq_length(self) -> int:
        """Tokens of every sequence, padding included."""
        return self.group.length(self.index)

    def get_max_length(self) -> int:
        """-1: there is no maximum; of a sliding layer, its window."""
        return -1 if self.sliding_window is None else self.sliding_window

    def _refuse(self, *args: Any) -> None:
        raise NotImplementedError("call this of the KVNumbaCache: layers of a kind share their sequences")

    crop = reset = reorder_cache = batch_select_indices = batch_repeat_interleave = offload = prefetch = (
        _refuse
    )

    def __repr__(self) -> str:
        window = "" if self.sliding_window is None else f", sliding_window={self.sliding_window}"
        return f"KVNumbaLayer(tokens={self.get_seq_length()}{window})"


@LinearAttentionCacheLayerMixin.register
class HybridLayer(KVNumbaLayer):
    """The keys and values of a layer that has states too, which are kept by a layer of transformers.

    Models find the states as attributes of this one.
    """

    def __init__(
        self, config: PreTrainedConfig, group: LayerGroup, index: int, states: LinearAttentionLayer
    ) -> None:
        super().__init__(config, group, index)
        self.states = states

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can put the states back."""
        return self.states.is_croppable

    def __getattr__(self, name: str) -> Any:
        if name == "states":  # not there yet
            raise AttributeError(name)
        return getattr(self.states, name)


class IndexedLayer(KVNumbaLayer):
    """The keys and values of a layer with an indexer, whose own keys are kept by a layer of transformers."""

    def __init__(self, config: PreTrainedConfig, group: LayerGroup, index: int) -> None:
        super().__init__(config, group, index)
        self.states = DynamicLayer()

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Append keys of the indexer, (B, q, Di): all that there are, (B, k, Di)."""
        keys = indexer_key_states[:, None]
        all_keys: torch.Tensor = self.states.update(keys, keys[..., :0])[0]
        return all_keys[:, 0]

    @property
    def indexer_position_ids(self) -> None:
        """Refused: positions of an indexer's keys."""
        raise ValueError(
            "config: the model keeps positions of its indexers' keys, which a KVNumbaCache does not; "
            "use transformers.DynamicCache"
        )
