"""The attention function: it reads a `KVNumbaCache` directly where it can, and computes in torch where it cannot."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from kvnumba.integrations.transformers import masks
from kvnumba.integrations.transformers.deferred import dense
from kvnumba.integrations.transformers.layers import NAME, Appended, DeferredKeys, DeferredValues
from kvnumba.integrations.transformers.masks import CausalMask, DeferredMask


def register() -> None:
    """Make the name "kvnumba" known to `set_attn_implementation`, with its attention function and its mask function.

    Without a mask function of that name models would pass no mask, and padding would be attended to.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, masks.attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models ask for it.

    Parameters
    ----------
    module : Module
        The attention layer. Where there is no mask, its `is_causal` is the default of the argument `is_causal`.
    query : (B, Hq, q, D)
    key, value : (B, H, k, D)
        All keys and values. Where they are the two tensors that `KVNumbaCache.update` returned, they are not computed:
        attention reads the cache.
    attention_mask : (B, 1 or Hq, q, k), optional
        What `masks.attention_mask` returned, or any other one, bool or additive, which is applied in torch.
    dropout, scaling, is_causal
        As everywhere in transformers.
    sliding_window : int, optional
        Used where there is no mask; a mask contains the window.
    softcap : float, optional
    s_aux : (Hq,), optional
        Learned sinks: one more logit a head.
    sinks : (B, Hq, q, 1), optional
        Sinks that differ from token to token. Attention is computed in torch, as with all that follow.
    position_bias : optional
        Added to the scores.
    indices : (B, q, any) int, optional
        The only keys that each query may see.
    block_indices : (B, any, q, any) int, optional
        The same for blocks of keys; which keys they are the layer's own indexer says.
    output_attentions : bool, optional
        Refused: weights are never computed as a whole.

    Returns
    -------
    out : (B, q, Hq, D), in the dtype of the query
    weights : None

    Raises
    ------
    ValueError
        Something cannot be honoured; the message says what to do.
    """
    if output_attentions:
        raise ValueError(
            f'output_attentions: weights are never computed as a whole by "{NAME}"; '
            f'model.set_attn_implementation("eager") instead'
        )
    causal = _causal(module, attention_mask, is_causal, sliding_window)
    if isinstance(key, (DeferredKeys, DeferredValues)) or isinstance(value, (DeferredKeys, DeferredValues)):
        _refuse_training(query, dropout)
    appended = _appended(key, value)
    plain = all(x is None for x in (sinks, position_bias, indices, block_indices))
    if appended is not None and causal is not None and plain and appended.fits(causal):
        return appended.attend(query, causal, scaling, softcap, s_aux), None
    key, value, mask = dense(key), dense(value), attention_mask
    if causal is not None:
        shape = (query.shape[2], key.shape[2]) if mask is None else mask.shape[2:]
        mask = causal.dense(*shape).to(query.device)
    if indices is not None:
        chosen = indices.new_zeros((*indices.shape[:2], key.shape[2]), dtype=torch.bool)
        mask = _both(mask, chosen.scatter_(-1, indices.long(), True)[:, None])
    if block_indices is not None:
        mask = module.indexer.build_block_mask(  # as the model does for eager attention
            block_indices, mask, key.shape[2], query.dtype, query.device, options.get("position_ids")
        )
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1)
    dropout = dropout if module.training else 0.0
    return dense_attention(query, key, value, mask, scaling, softcap, sinks, position_bias, dropout), None


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention in torch over keys (B, H, k, D): (B, q, Hq, D).

    The mask is (B, 1 or Hq, q, k), bool or additive; sinks can be broadcast to (B, Hq, q, 1).
    """
    if mask is not None and not (
        mask.ndim == 4 and mask.shape[2] in (1, query.shape[2]) and mask.shape[3] == key.shape[2]
    ):
        raise ValueError(
            f"attention_mask: expected shape (B, 1 or Hq, {query.shape[2]}, {key.shape[2]}), with a row for each query "
            f"and a column for each key; got {tuple(mask.shape)}. Use another attention implementation for this model"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def _appended(key: torch.Tensor, value: torch.Tensor) -> Appended | None:
    """The `update` that returned these keys and values, if the model has not changed either; otherwise None."""
    if type(key) is not DeferredKeys or type(value) is not DeferredValues:
        return None
    if key.source is not value.source or key.looked_into or value.looked_into:
        return None
    return key.source


def _causal(
    module: torch.nn.Module, mask: torch.Tensor | None, is_causal: bool | None, sliding_window: int | None
) -> CausalMask | None:
    """The causal mask that is meant; None if the mask is another one, or if there is none and all keys are seen."""
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return CausalMask(None, (sliding_window or 0) - 1, None) if causal else None
    if type(mask) is DeferredMask and not mask.looked_into:
        return mask.source
    return None


def _both(mask: torch.Tensor | None, seen: torch.Tensor) -> torch.Tensor:
    """A mask, bool or additive, that hides what another one, bool, hides besides."""
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _refuse_training(query: torch.Tensor, dropout: float) -> None:
    if dropout:
        raise ValueError(f"dropout: expected 0 with a KVNumbaCache; got {dropout}. Call model.eval() first")
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("query: a KVNumbaCache keeps no gradients; call the model under torch.no_grad()")
