"""Between torch's tensors and NumPy's arrays, on the CPU, without a copy."""

from __future__ import annotations

import numpy as np
import torch


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """The tensor's own memory; bfloat16, which NumPy does not have, as its bits (uint16)."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.numpy()


def to_torch(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The array's own memory; where it is neither of the dtype nor its bits, a copy in the dtype."""
    if x.dtype == np.uint16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(x).to(dtype)
