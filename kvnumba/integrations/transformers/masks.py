"""The mask function: plain causal and sliding masks are described, not computed; all others are computed.

Computed masks are additive, 0 and the least number of a dtype, as those of eager attention: some models have layers of
their own beside those that call the attention function, and these layers add the mask to their scores.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_overlay,
    eager_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from kvnumba.integrations.transformers.deferred import Deferred


@dataclass(frozen=True)
class CausalMask:
    """A query at position i sees the keys j with ``max(i - window_left, padding) <= j <= i``.

    Attributes
    ----------
    length : int or None
        Keys in all, from position 0 on; None where no mask says it.
    window_left : int
        -1: no window.
    padding : (B,) int64, or None
        Padding tokens on the left of each sequence. None: there is no padding.
    """

    length: int | None
    window_left: int
    padding: np.ndarray | None

    def dense(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """The same for the last queries and keys, True where they see: (B or 1, 1, num_queries, num_keys) bool."""
        length = num_keys if self.length is None else self.length
        query = np.arange(length - num_queries, length)[:, None]
        key = np.arange(length - num_keys, length)
        seen = key <= query
        if self.window_left >= 0:
            seen &= key >= query - self.window_left
        seen = seen[None, None]
        if self.padding is not None:
            seen = seen & (key >= self.padding[:, None])[:, None, None]
        return torch.from_numpy(seen)


class DeferredMask(Deferred):
    """A `CausalMask` of the last queries and keys, (B, 1, queries, keys), additive."""

    source: CausalMask

    def compute(self) -> torch.Tensor:
        """The mask, element by element."""
        seen = self.source.dense(self.shape[2], self.shape[3]).expand(self.shape).to(self.device)
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device).masked_fill_(
            ~seen, torch.finfo(self.dtype).min
        )


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> torch.Tensor:
    """The mask of a forward pass, as transformers asks for it.

    Returns
    -------
    mask : (B, 1, q_length, kv_length), additive
        A `DeferredMask` if it is causal, perhaps with a sliding window, and hides nothing else but padding on the left.
    """
    length = kv_offset + kv_length
    window = window_left(mask_function, q_offset, q_offset + q_length - 1)
    if window is not None and not options.get("use_vmap") and q_offset + q_length == length:
        padding, known = left_padding(attention_mask, length)
        if known:
            shape = (batch_size, 1, q_length, kv_length)
            causal = CausalMask(length, window, padding)
            return DeferredMask(shape, dtype, options.get("device", "cpu"), causal)
    # never None, which the attention function would take for causal
    options["allow_is_bidirectional_skip"] = False
    return eager_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, dtype, **options
    )


def window_left(mask_function: Any, first: int = 0, last: int = 0) -> int | None:
    """The window of a transformers mask function, for queries at these positions.

    Returns
    -------
    window : int or None
        -1 for causal masks. Chunked ones, in which a query sees the chunk that it is in, have a window while all
        sequences are in their first chunk, and for a single query that is as far into its chunk in all sequences.
        None: there is none, or the function is unknown.
    """
    if mask_function is causal_mask_function:
        return -1
    # The others are made by and_masks(overlay(...), causal_mask_function): they are recognised by their code, and the
    # overlay's arguments are found in its closure.
    if getattr(mask_function, "__code__", None) is not sliding_window_causal_mask_function(1).__code__:
        return None
    parts = mask_function.__closure__[0].cell_contents
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    arguments = inspect.getclosurevars(parts[0]).nonlocals
    if parts[0].__code__ is sliding_window_overlay(1).__code__:
        return int(arguments["sliding_window"]) - 1
    if parts[0].__code__ is not chunked_overlay(1, torch.zeros(1)).__code__:
        return None
    size, lengths = (
        int(arguments["chunk_size"]),
        {last + 1 - left for left in arguments["left_padding"].tolist()},
    )
    if max(lengths) <= size:
        return size - 1
    windows = {(length - 1) % size for length in lengths}
    return windows.pop() if first == last and len(windows) == 1 else None


def left_padding(mask: torch.Tensor | None, length: int) -> tuple[np.ndarray | None, bool]:
    """Padding on the left of each sequence, and whether the mask says nothing else."""
    if mask is None:
        return None, True
    if mask.ndim != 2 or mask.shape[1] < length:
        return None, False
    real = mask[:, :length].to(torch.bool)
    if real.all():
        return None, True
    contiguous = bool((real[:, 1:] >= real[:, :-1]).all())
    return (~real).sum(dim=1).cpu().numpy(), contiguous
