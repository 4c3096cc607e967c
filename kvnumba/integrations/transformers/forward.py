"""The forward pass of a group of layers that is on its way, and what decode steps keep for the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kvnumba.backends.protocol import Decoding
from kvnumba.caches.per_head_step import PerHeadStep
from kvnumba.caches.step import Step
from kvnumba.integrations.transformers.masks import CausalMask
from kvnumba.integrations.transformers.tensors import to_array
from kvnumba.options import Scoring


@dataclass(eq=False)
class ForwardPass:
    """The new tokens of a group's sequences on their way through its layers.

    Attributes
    ----------
    step : Step or PerHeadStep
        Knows which layers have the tokens.
    first, count : int
        Tokens of every sequence before the pass, and new ones. Both with padding, so they are the same for all.
    visible : int
        Tokens, the newest ones, that the layers see.
    real : (B, count) bool, optional
        Which of the new tokens are stored. None: all, for none of them is known to be padding.
    judged : CausalMask, bool; optional
        The latest mask, and whether attention out of the storage shows what it shows.
    follows : bool
        Whether the group's decoding is that of this pass.
    new : index, keys and values; optional
        Those of the latest layer.
    unwritten : bool
        Whether they are not stored yet: attention is going to store them.
    captured : bool
        Whether the pass is recorded as a CUDA graph, so that nothing is computed now.
    """

    step: Step | PerHeadStep
    first: int
    count: int
    visible: int
    real: np.ndarray | None = None
    judged: tuple[CausalMask, bool] | None = None
    follows: bool = False
    new: tuple[int, torch.Tensor, torch.Tensor] | None = None
    unwritten: bool = False
    captured: bool = False

    @property
    def whole_step(self) -> Step:
        """The step, of blocks of all heads: what decodes on a GPU is that."""
        assert isinstance(self.step, Step)
        return self.step

    def length(self, index: int) -> int:
        """Tokens of every sequence in a layer, padding included."""
        has_new = self.step.covers(index) or (
            self.unwritten and self.new is not None and self.new[0] == index
        )
        return self.first + self.count if has_new else self.first

    def flush(self) -> None:
        """Store what is not stored yet."""
        if self.unwritten and self.new is not None:
            self.require_eager()
            self.unwritten = False
            index, k, v = self.new
            self.step.write(by_token(k, self.real), by_token(v, self.real), layer=index)

    def require_eager(self) -> None:
        """Raise if the pass is recorded: what comes now could not be."""
        if self.captured:
            raise NotImplementedError(
                "the model looks into keys or values, or attends to them in another way"
            )


class KeptDecoding(NamedTuple):
    """`write` and `attend` in one call, for decode steps that follow each other, and what it was made for.

    Attributes
    ----------
    decoding : Decoding
    scoring : Scoring
    new, query : tuple
        How keys and values, and queries, lie in memory.
    stream : int
    """

    decoding: Decoding
    scoring: Scoring
    new: tuple[Any, ...]
    query: tuple[Any, ...]
    stream: int


def by_token(x: torch.Tensor, real: np.ndarray | None) -> Any:
    """The tokens of (B, heads, q, D) that are real, sequence by sequence: (tokens, heads, D)."""
    if x.shape[2] == 1 and real is None:
        return to_array(x)[:, :, 0]  # of one token a sequence a view
    tokens = to_array(x).swapaxes(1, 2)
    return tokens.reshape(-1, *tokens.shape[2:]) if real is None else tokens[real]


def lie(*tensors: torch.Tensor) -> tuple[Any, ...]:
    """How tensors lie in memory: what a decoding is made for."""
    found: tuple[Any, ...] = ()
    for x in tensors:
        found += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
    return found


def current_stream(x: torch.Tensor) -> int:
    """The stream that torch works on now, on the device of a tensor."""
    return int(torch._C._cuda_getCurrentRawStream(x.get_device()))
