"""Tensors that models hand on to the attention function, computed only where a model looks into them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map


class Deferred(torch.Tensor):
    """A tensor without elements: it has a shape, a dtype and a device, and can compute what it stands for.

    Most models hand the keys, the values and the mask that they got on to the attention function, which knows what
    such a tensor stands for and never asks for its elements. Some models compute with them first: they slice values,
    repeat keys, add to a mask. Every operation of torch on such a tensor runs on the dense tensor in its place, so
    these models get the right answer too, only slower. From then on the attention function uses the dense tensor.

    Parameters
    ----------
    shape, dtype, device
        Of the dense tensor.
    source : object
        What the tensor stands for.
    """

    source: Any
    _dense: torch.Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # attributes such as shape without a detour

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, source: Any) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.source, made._dense = source, None
        return made

    def compute(self) -> torch.Tensor:
        """The dense tensor."""
        raise NotImplementedError

    @property
    def looked_into(self) -> bool:
        """Whether something has computed with the dense tensor, and may have changed views of it."""
        return self._dense is not None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            for argument in func._schema.arguments:
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(given.get(argument.name, kwargs.get(argument.name)), Deferred):
                    _refuse_change()
        args, kwargs = tree_map(dense, (args, kwargs))
        return func(*args, **kwargs)

    def __setitem__(self, *args: Any) -> None:
        _refuse_change()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def dense(x: Any) -> Any:
    """The dense tensor that a deferred one stands for, the same one at each call; anything else as it is."""
    if not isinstance(x, Deferred):
        return x
    if x._dense is None:
        x._dense = x.compute()
    return x._dense


def _refuse_change() -> None:
    raise ValueError(
        "the keys, values and masks that a KVNumbaCache hands out cannot be changed in place: the cache would "
        "not see it; use transformers.DynamicCache for this model"
    )
