"""Decode steps of a Hugging Face model as one CUDA graph: the host starts one thing a token instead of hundreds."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from kvnumba.integrations.transformers.cache import KVNumbaCache
from kvnumba.integrations.transformers.forward import ForwardPass, KeptDecoding, current_stream
from kvnumba.integrations.transformers.layers import NAME
from kvnumba.integrations.transformers.masks import left_padding
from kvnumba.integrations.transformers.storage import LayerGroup

TOLERANCE = 0.02
"""Of the largest logit: how far a graph's logits may be from those of an ordinary step."""


@contextlib.contextmanager
def captured(model: PreTrainedModel) -> Iterator[None]:
    """Run the decode steps of a model on a GPU as a CUDA graph, as long as the context lasts.

    A step with one new token for each sequence of a `KVNumbaCache` is recorded when the second of its kind comes, and
    replayed from then on. Everything else, such as prompts, runs as ever. When a sequence has doubled, or other
    sequences come, the step is recorded again; the cache needs no maximum length. The first step that is replayed is
    computed in the ordinary way too, and compared::

        with captured(model):
            model.generate(**inputs, past_key_values=KVNumbaCache(model.config))

    Parameters
    ----------
    model : PreTrainedModel
        With ``model.set_attn_implementation("kvnumba")``, and called without gradients. All its layers' keys and
        values are kvnumba's.

    Raises
    ------
    ValueError
        From the model's call: its decode step cannot be a graph, because it waits for the GPU or computes with the
        sequences' lengths on the host. The cache is as it was before the call.
    """
    decoder = _Decoder(model)
    own = model.__dict__.get("forward")
    model.forward = functools.wraps(model.forward)(decoder)
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


class _Call(NamedTuple):
    """A decode step: a call of the model as it is recorded.

    Attributes
    ----------
    cache : KVNumbaCache
    name : str
        The argument that it is given as.
    tensors : dict
        The arguments that differ from step to step.
    others : dict
        Those that do not.
    mask : (B, length) tensor, optional
        The attention mask. A graph needs none: padding is not in the cache.
    """

    cache: KVNumbaCache
    name: str
    tensors: dict[str, torch.Tensor]
    others: dict[str, Any]
    mask: torch.Tensor | None

    @property
    def groups(self) -> list[LayerGroup]:
        """The cache's groups of layers."""
        return self.cache.groups

    @property
    def same(self) -> dict[str, Any]:
        """The arguments that are the same in each step."""
        return {**self.others, self.name: self.cache}

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that one graph can serve."""
        shapes = tuple((name, x.shape, x.dtype) for name, x in self.tensors.items())
        return shapes, tuple(self.others.items())


class _Graph(NamedTuple):
    """A recorded step, its memory, and what it was recorded for."""

    graph: Any
    inputs: dict[str, torch.Tensor]
    output: ModelOutput
    cache: weakref.ref[KVNumbaCache]
    kept: list[KeptDecoding | None]
    key: tuple[Any, ...]

    def serves(self, call: _Call) -> bool:
        """Whether a call is a step of the same kind, with tables at the same addresses."""
        return (
            self.cache() is call.cache
            and len(self.kept) == len(call.groups)
            and all(kept is group.kept for kept, group in zip(self.kept, call.groups, strict=True))
            and self.key == call.key
        )

    def run(self, call: _Call) -> ModelOutput:
        """The output for other inputs: a copy, for the graph's own is overwritten by the next step."""
        for name, x in call.tensors.items():
            self.inputs[name].copy_(x)
        self.graph.replay()
        return _copied(self.output)


class _Decoder:
    """What stands for a model's `forward`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._forward: Callable[..., Any] = model.forward
        self._signature = inspect.signature(model.forward)
        self._config = model.config
        self._graph: _Graph | None = None
        self._compared = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._decode_step(args, kwargs)
        passes = None if call is None else _begin(call)
        if call is None or passes is None:
            return self._forward(*args, **kwargs)
        if self._graph is None or not self._graph.serves(call):
            self._graph = None  # first, to give its memory back
            return self._record(call, passes)
        output = self._graph.run(call)
        for group, forward in zip(call.groups, passes, strict=True):
            group.replay(forward)
        return output if self._compared else self._compare(call, passes, output)

    def _decode_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """A call as a decode step; None if it is none, or one that must be computed in the ordinary way."""
        given = {
            name: x
            for name, x in self._signature.bind_partial(*args, **kwargs).arguments.items()
            if x is not None
        }
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(parameter.name, {}))
        caches = {name: x for name, x in given.items() if isinstance(x, KVNumbaCache)}
        if len(caches) != 1 or torch.is_grad_enabled():
            return None
        ((name, cache),) = caches.items()  # "past_key_values" until 5.23, "cache" from 5.24 on
        del given[name]
        if not cache.all_ours or self._config.get_text_config()._attn_implementation != NAME:
            return None
        mask = given.pop("attention_mask", None)
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        others = {name: x for name, x in given.items() if name not in tensors}
        if not tensors or not all(x.is_cuda and x.ndim >= 2 and x.shape[1] == 1 for x in tensors.values()):
            return None
        if others.get("return_dict") is False or not all(
            isinstance(x, (bool, int, float, str)) for x in others.values()
        ):
            return None
        if not _shows_all(mask, cache):
            return None
        if "position_ids" in self._signature.parameters and "position_ids" not in tensors:
            (some, *_) = tensors.values()
            tensors["position_ids"] = torch.full(
                (1, 1), cache.get_seq_length(), dtype=torch.long, device=some.device
            )
        return _Call(cache, name, tensors, others, mask)

    def _record(self, call: _Call, passes: list[ForwardPass]) -> ModelOutput:
        """Record a step, and run what was recorded."""
        for group, forward in zip(call.groups, passes, strict=True):
            group.record(forward)
        inputs = {name: x.clone() for name, x in call.tensors.items()}
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        try:
            # the stream: one that fails to record leaves its own behind; relaxed: memory of what Python finds to be
            # garbage meanwhile may be given back
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, capture_error_mode="relaxed"),
                _no_waiting(),
            ):
                output = self._forward(**inputs, **call.same)
            if not isinstance(output, ModelOutput) or any(group.running for group in call.groups):
                raise NotImplementedError("it returned early")
        except Exception as error:
            generator.graphsafe_set_state(before)  # which would wait for the end of the recording for ever
            _undo(call, passes)
            raise ValueError(
                f"model: its decode step cannot be a CUDA graph ({' '.join(str(error).split())[:200]}); "
                f"call it outside of `captured`"
            ) from error
        for forward in passes:
            forward.captured = False
        self._compared = False
        self._graph = _Graph(
            graph, inputs, output, weakref.ref(call.cache), [group.kept for group in call.groups], call.key
        )
        return self._graph.run(call)

    def _compare(self, call: _Call, passes: list[ForwardPass], output: ModelOutput) -> ModelOutput:
        """The same step once more in the ordinary way; its output."""
        _undo(call, passes)
        wanted = self._forward(**call.tensors, **call.same, attention_mask=call.mask)
        name = next(name for name, x in wanted.items() if isinstance(x, torch.Tensor))
        error, largest = (wanted[name] - output[name]).abs().max(), wanted[name].abs().max()
        if not bool(error <= TOLERANCE * largest):  # true of NaN too
            call.cache.crop(-1)
            self._graph = None
            raise ValueError(
                "model: its decode step computes with the sequences' lengths on the host, which a CUDA graph would "
                "not do again; call it outside of `captured`"
            )
        self._compared = True
        return wanted


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """What would wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _begin(call: _Call) -> list[ForwardPass] | None:
    """A pass of each group, all of whose layers a graph can serve; None if there is none."""
    (some, *_) = call.tensors.values()
    passes = [group.begin_decoding(current_stream(some)) for group in call.groups]
    found = [forward for forward in passes if forward is not None]
    return found if len(found) == len(passes) else None


def _undo(call: _Call, passes: list[ForwardPass]) -> None:
    for group, forward in zip(call.groups, passes, strict=True):
        group.undo(forward)


def _shows_all(mask: Any, cache: KVNumbaCache) -> bool:
    """Whether a step's attention mask hides only the padding that the cache has left out."""
    length = cache.get_seq_length() + 1
    if mask is not None and not (
        isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] == length
    ):
        return False
    padding, known = left_padding(mask, length)
    if not known:
        return False
    return all(
        np.array_equal(group.padding_or_zeros(group.padding), group.padding_or_zeros(padding))
        for group in cache.groups
    )


def _copied(output: ModelOutput) -> ModelOutput:
    return type(output)(
        **{name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in output.items()}
    )
