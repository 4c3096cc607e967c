"""kvpress alone, as what the bridge to it is compared with."""

import contextlib

import torch


@contextlib.contextmanager
def by_kvpress(press, model, cache):
    """kvpress's own context, whose hook is given what models of today's transformers do not pass."""
    own = press.forward_hook

    def hook(module, args, kwargs, output):
        count, length = kwargs["hidden_states"].shape[1], cache.layers[module.layer_idx].keys.shape[2]
        given = {"past_key_values": cache, "cache_position": torch.arange(length - count, length)}
        return own(module, args, {**kwargs, **given}, output)

    press.forward_hook = hook
    try:
        with press(model):
            yield
    finally:
        del press.forward_hook
