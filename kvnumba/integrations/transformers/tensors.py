"""Between torch's tensors and the arrays that caches take, without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_array(x: torch.Tensor) -> Any:
    """The tensor's own memory: a NumPy array, of bfloat16, which NumPy does not have, its bits (uint16).

    Of a tensor on a GPU the tensor, which a cache on that GPU takes as it is.
    """
    x = x.detach()
    if not x.is_cpu:
        return x
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.numpy()


def to_torch(x: Any, like: torch.Tensor) -> torch.Tensor:
    """The memory of what a cache returned; where it is not of another tensor's dtype and device, a copy that is."""
    if isinstance(x, torch.Tensor):
        return x.to(like)
    if x.dtype == np.uint16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(like)
    return torch.from_numpy(x).to(like)
