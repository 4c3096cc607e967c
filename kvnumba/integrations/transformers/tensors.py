"""Between torch's tensors and the arrays that caches take, without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_array(x: torch.Tensor) -> Any:
    """The tensor's own memory as a NumPy array; of bfloat16, which NumPy does not have, the bits (uint16).

    A tensor on a GPU is returned as it is: a cache on that GPU takes tensors.
    """
    if x.requires_grad:
        x = x.detach()
    if not x.is_cpu:
        return x
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.numpy()


def to_torch(x: Any, like: torch.Tensor) -> torch.Tensor:
    """The memory of what a cache returned; a copy where the dtype or the device of `like` is another."""
    if not isinstance(x, torch.Tensor):
        bits = x.dtype == np.uint16
        x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(x)
    return x if x.dtype == like.dtype and x.is_cpu == like.is_cpu else x.to(like)


def format_name(dtype: torch.dtype) -> str:
    """The format that keeps tensors of a dtype as they are; float32 for those that no format keeps."""
    name = str(dtype).removeprefix("torch.")
    return name if name in ("float16", "bfloat16") else "float32"
