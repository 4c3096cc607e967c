"""Presses of kvpress, NVIDIA's collection of ways to drop tokens, over a `KVNumbaCache`: with memory given back.

    from kvpress import SnapKVPress
    from kvnumba.integrations.kvpress import compressing

    model.set_attn_implementation("kvnumba")
    cache = KVNumbaCache(model.config, per_head=True)
    with compressing(SnapKVPress(0.5), model, cache):
        model.generate(**inputs, past_key_values=cache)

kvpress registers a hook on every attention layer, which takes the layer's keys and values out of the cache when the
prompt has been read, and puts shorter ones in their place. Here it is given copies, and what it leaves of these tells
which tokens of which head the cache keeps. It needs the extra ``kvnumba[kvpress]``.
"""

from __future__ import annotations

from importlib import metadata

try:
    metadata.version("kvpress")
except metadata.PackageNotFoundError:
    raise ImportError("kvpress is not installed: pip install 'kvnumba[kvpress]'") from None

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import kvpress
import numpy as np
import torch
from transformers import PreTrainedModel

from kvnumba.integrations.transformers import KVNumbaCache
from kvnumba.integrations.transformers.layers import NAME

HOOKS = {
    press.forward_hook
    for press in (kvpress.BasePress, kvpress.ComposedPress, kvpress.PerLayerCompressionPress)
}
"""Of presses that drop tokens of a prompt once it has been read, and do nothing else."""
SERVED = (
    "presses that choose tokens of a prompt once it has been read serve, as SnapKVPress and AdaKVPress do"
)


def compressing(
    press: kvpress.BasePress, model: PreTrainedModel, cache: KVNumbaCache
) -> AbstractContextManager[None]:
    """A context in which a press drops tokens of the prompt that a model reads into a cache.

    The prompt is what the model reads first, in one pass. When a layer has read it, the layer's dropped tokens give
    their blocks back, before the next layer begins. What comes afterwards, questions and answers, stands where it would
    stand after the whole prompt, as in kvpress's own pipeline, and stays.

    Parameters
    ----------
    press : kvpress.BasePress
        One that keeps some tokens of each head as they are, `ComposedPress` and `PerLayerCompressionPress` of such ones
        included. Heads may keep different numbers of tokens (`AdaKVPress`); those that kvpress masks are dropped.
    model : PreTrainedModel
        With ``model.set_attn_implementation("kvnumba")``; of a kind that kvpress knows.
    cache : KVNumbaCache
        With `per_head`, and empty.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above. That a press changes keys, and that a batch has padding, is found out when the
        model reads the prompt; then, and when a press fails, the cache is empty afterwards.
    """
    for part in _parts(press):
        _require_served(part)
    config = model.config.get_text_config()
    if config._attn_implementation != NAME:
        raise ValueError(
            f'model: expected the attention implementation "{NAME}"; got "{config._attn_implementation}". '
            f'Call model.set_attn_implementation("{NAME}") first'
        )
    decoder = getattr(model, "model", None)
    layers = getattr(getattr(decoder, "language_model", decoder), "layers", [None])
    if not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"model: expected one whose attention is model.model.layers[n].self_attn, where kvpress looks for it, as "
            f"Llama's is; got a {type(model).__name__}"
        )
    if not isinstance(cache, KVNumbaCache) or not cache.per_head:
        raise ValueError(f"cache: expected KVNumbaCache(model.config, per_head=True); got {cache!r}")
    if cache.get_seq_length():
        raise ValueError(
            f"cache: expected an empty one, for a prompt that is yet to be read; got one of "
            f"{cache.get_seq_length()} tokens. Call reset() first"
        )
    return _Bridge(press, cache)(model)


def _parts(press: Any) -> Iterator[Any]:
    """A press and those that it is made of."""
    yield press
    for part in getattr(press, "presses", [getattr(press, "press", None)]):
        if part is not None:
            yield from _parts(part)


def _require_served(press: Any) -> None:
    """Raise unless a press does its work in one hook, after the prompt, without attention weights."""
    name = type(press).__name__
    if not isinstance(press, kvpress.BasePress):
        raise TypeError(f"press: expected a press of kvpress; got a {name}")
    if type(press).__call__ is not kvpress.BasePress.__call__ or type(press).forward_hook not in HOOKS:
        raise ValueError(
            f"press: {name} reads the prompt in its own way, or drops tokens as they are generated; {SERVED}"
        )
    if isinstance(press, kvpress.ObservedAttentionPress):
        raise ValueError(
            f"press: {name} needs attention weights as a whole, which nothing computes; {SERVED}"
        )


class _Bridge(kvpress.BasePress):
    """A press that lets another one choose, and has a cache keep what it chose.

    kvpress's own context manager registers this one's hook in the place of the other's.
    """

    def __init__(self, press: kvpress.BasePress, cache: KVNumbaCache) -> None:
        self.press = press
        self.cache = cache

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        self.press.post_init_from_model(model)

    def forward_hook(
        self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        if self.cache not in (kwargs.get("past_key_values"), kwargs.get("cache")):
            raise ValueError("past_key_values: expected the cache that the press works on; got another one")
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if self.cache.get_seq_length(module.layer_idx) > hidden_states.shape[1]:
            return output  # not the prompt any more
        try:
            self._compress(module, hidden_states, kwargs, output)
        except BaseException:
            self.cache.reset()
            raise
        return output

    def _compress(
        self, module: torch.nn.Module, hidden_states: torch.Tensor, kwargs: dict[str, Any], output: list[Any]
    ) -> None:
        group = self.cache.layers[module.layer_idx].group
        if group.padding is not None:
            raise ValueError(
                "attention_mask: expected no padding, which a press would count as tokens; "
                "read prompts of different lengths one by one"
            )
        whole = group.held(hidden_states)
        left = SimpleNamespace(keys=whole[0].clone(), values=whole[1].clone())  # some presses write to these
        given = {  # by the names that kvpress looks for; newer versions of transformers have others
            "hidden_states": hidden_states,
            "past_key_values": SimpleNamespace(layers={module.layer_idx: left}),
            "cache_position": torch.arange(hidden_states.shape[1]),
        }
        module.masked_key_indices = None
        self.press.forward_hook(module, (), {**kwargs, **given}, output)
        stays = np.ones(left.keys.shape[:3], bool)
        if module.masked_key_indices is not None:
            if stays.shape[2] != whole[0].shape[2]:
                raise ValueError(
                    f"press: {type(self.press).__name__} drops tokens and hides others, by numbers that are of no use "
                    f"then; use the two presses one by one"
                )
            stays[tuple(index.numpy() for index in module.masked_key_indices)] = False
            module.masked_key_indices = None  # they are not there to be masked
        name = type(self.press).__name__
        group.keep(
            [
                [np.sort(_places(rows, kept, name)[stay]) for rows, kept, stay in zip(*each, strict=True)]
                for each in zip(_rows(*whole), _rows(left.keys, left.values), stays, strict=True)
            ]
        )


def _rows(keys: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    """The bytes of each token's key and value, (B, H, tokens, any) uint8."""
    return torch.cat([x.contiguous().view(torch.uint8) for x in (keys, values)], dim=-1).numpy()


def _places(whole: np.ndarray, kept: np.ndarray, press: str) -> np.ndarray:
    """Where the tokens of a head (n, any) that a press has left stand among all of them (tokens, any).

    Of tokens with the same key and value the first is taken first: which of them it is makes no difference.
    """
    places: dict[bytes, list[int]] = {}
    for place in range(len(whole) - 1, -1, -1):
        places.setdefault(whole[place].tobytes(), []).append(place)
    found = [places.get(row.tobytes(), []) for row in kept]
    try:
        return np.array([same.pop() for same in found], np.int64)
    except IndexError:
        raise ValueError(
            f"press: expected one that leaves keys and values as they are, each once; {press} does not; {SERVED}"
        ) from None
