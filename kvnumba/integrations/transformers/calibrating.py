"""Measures the calibration of a Hugging Face model, whose keys and queries are seen where it computes attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from kvnumba.calibration import Calibration
from kvnumba.integrations.transformers import masks
from kvnumba.integrations.transformers.attention import attention_forward
from kvnumba.integrations.transformers.cache import KVNumbaCache
from kvnumba.integrations.transformers.layers import NAME, KVNumbaLayer
from kvnumba.integrations.transformers.tensors import to_array
from kvnumba.models.calibrating import ChannelStatistics, calibration_of

OBSERVED = f"{NAME}-observed"
"""Name of the attention implementation that shows queries and keys to an observer first."""
CHUNK = 512
"""Tokens of each text that run through the model at once."""

Observer = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with new queries (B, Hq, q, D) of a layer, and all keys (B, H, k, D) that they see."""

_observer: ContextVar[Observer] = ContextVar("observer")


def calibrate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    source: str = "",
) -> Calibration:
    """Measure the calibration of a model's keys on texts.

    Parameters
    ----------
    model : PreTrainedModel
        Its attention implementation is another one during the call, and its own again afterwards.
    input_ids : (B, T) int
        On the model's device. 1,000 tokens in all are good, 4,000 better.
    attention_mask : (B, T), optional
        0 where a token is padding, which is left out.
    source : str
        What the texts are, for those who read the calibration later.

    Returns
    -------
    Calibration
        Of the layers that a `KVNumbaCache` stores, in the model's order.

    Raises
    ------
    ValueError
        An argument is not as above, the model has layers that a `KVNumbaCache` cannot store or that do not compute
        attention by transformers' interface, or `kvnumba.calibrate` would refuse the keys and queries.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected shape (B, T); got {tuple(input_ids.shape)}")
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if real.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected shape {tuple(input_ids.shape)}, as input_ids; got {tuple(real.shape)}"
        )
    stored = [
        i for i, layer in enumerate(KVNumbaCache(model.config).layers) if isinstance(layer, KVNumbaLayer)
    ]
    statistics = {i: ChannelStatistics(n) for n, i in enumerate(stored)}
    new = real

    def observe(query: torch.Tensor, key: torch.Tensor) -> None:
        layer, cache.updated = statistics.get(cache.updated), -1
        if layer is not None:
            layer.add(_tokens(key[:, :, -query.shape[2] :], new), _tokens(query, new))

    cache = _UpdatedCache(config=model.config)
    with torch.no_grad(), _observed(model, observe):
        for start in range(0, input_ids.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            new = real[:, chunk]
            # the base model, for nobody needs logits
            model.base_model(input_ids[:, chunk], attention_mask=real[:, : chunk.stop], past_key_values=cache)
    for i, layer in statistics.items():
        if real.any() and not layer.num_tokens:
            raise ValueError(f"model: its layer {i} does not compute attention by transformers' interface")
    return calibration_of(list(statistics.values()), source)


class _UpdatedCache(DynamicCache):
    """It knows which layer was updated last: attention follows, often in a module that several layers share."""

    updated = -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        self.updated = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextlib.contextmanager
def _observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """The model's attention shows queries and keys to an observer."""
    AttentionInterface.register(OBSERVED, _observed_attention)
    AttentionMaskInterface.register(OBSERVED, masks.attention_mask)
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    own[""] = config._attn_implementation
    token = _observer.set(observer)
    try:
        model.set_attn_implementation(OBSERVED)
        yield
    finally:
        _observer.reset(token)
        model.set_attn_implementation(own)


def _observed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    _observer.get()(query, key)
    return attention_forward(module, query, key, *args, **options)


def _tokens(x: torch.Tensor, real: torch.Tensor) -> np.ndarray:
    """Those of (B, heads, n, D) that are real, (tokens, heads, D) in host memory."""
    return to_array(x.swapaxes(1, 2)[real.bool()].cpu())
