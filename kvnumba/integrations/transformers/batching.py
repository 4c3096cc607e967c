"""Hugging Face models for `kvnumba.ContinuousBatcher`: many requests at once, out of one paged cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, cache_utils

from kvnumba import arguments
from kvnumba.backends.registry import get_backend
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.step import Step
from kvnumba.integrations.transformers.forward import by_token
from kvnumba.integrations.transformers.layers import NAME, DeferredKeys, DeferredValues
from kvnumba.integrations.transformers.masks import CausalMask
from kvnumba.integrations.transformers.tensors import format_name, to_array, to_torch
from kvnumba.models.sampling import checked_temperature
from kvnumba.recipes import with_recipe
from kvnumba.storage import LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

ALONE = "use its generate with a KVNumbaCache"
"""What a model that is refused here can do."""

SERVED = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
"""The layers of DynamicCache that a paged cache can stand for; not every version of transformers has the last."""


class PackedDecoder:
    """A model of transformers as `kvnumba.ContinuousBatcher` runs it.

    A forward pass takes the new tokens of several sequences as one row, one sequence after the other and without
    padding, each token with its position in its own sequence. Attention is computed out of the cache, where a token
    sees its own sequence alone. So nothing else may mix tokens: a model that looks into its keys or has a mask that
    is neither causal nor sliding is refused, by a pass of two tokens that the constructor runs.

    Parameters
    ----------
    model : PreTrainedModel
        After ``model.set_attn_implementation("kvnumba")``.

    Attributes
    ----------
    model : PreTrainedModel
    vocab_size : int
    max_positions : int or None
        The longest sequence; None where the model does not say.
    window_left : int
        The widest `window_left` with which the model attends, -1 if it sees everything.

    Raises
    ------
    ValueError
        The model has another attention implementation, or cannot be run like this.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation != NAME:
            raise ValueError(
                f'model: expected the attention implementation "{NAME}"; got "{config._attn_implementation}". '
                f'Call model.set_attn_implementation("{NAME}"); for a model on which that has no effect, {ALONE}'
            )
        if config.is_encoder_decoder or "position_ids" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"model: expected a decoder whose forward takes position_ids; {ALONE}")
        self.model = model
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.max_positions = _max_positions(config)
        layers = [_trial_layer(layer) for layer in DynamicCache(config=config).layers]
        self._forward(layers, np.zeros(2, np.int64), np.zeros(2, np.int64), [0, 1])
        stored = {i: layer for i, layer in enumerate(layers) if layer.shape is not None}
        shapes: set[Any] = {layer.shape for layer in stored.values()}
        if len(shapes) != 1:
            raise ValueError(
                f"model: expected layers of one shape (H, D, Dv); got {shapes or 'none'}; {ALONE}"
            )
        self._shape = (len(stored), *shapes.pop())
        self._num_model_layers = len(layers)
        self._places = {i: place for place, i in enumerate(stored)}  # layer -> its place in the cache
        windows = {layer.window_left for layer in stored.values()}
        self.window_left = -1 if -1 in windows else max(windows)

    def make_cache(
        self,
        num_tokens: int,
        *,
        block_size: int = 16,
        max_num_seqs: int = 1,
        dtype: Any = None,
        backend: str | None = None,
        **options: Unpack[LayoutOptions],
    ) -> PagedKVCache:
        """A paged cache of this model's shape with room for `num_tokens` tokens.

        Parameters
        ----------
        num_tokens, block_size, max_num_seqs : int
            The tokens are rounded up to whole blocks, and every sequence but the first adds a block.
        dtype : str or dtype, optional
            The format of keys and values. Default: the model's dtype. int4 means what it does in a `KVNumbaCache`.
        backend, **options
            As in `KVNumbaCache`.
        """
        num_tokens = arguments.integer("num_tokens", num_tokens, minimum=1)
        block_size = arguments.integer("block_size", block_size, minimum=1)
        max_num_seqs = arguments.integer("max_num_seqs", max_num_seqs, minimum=1)
        dtype = format_name(self.model.dtype) if dtype is None else dtype
        num_layers, num_kv_heads, head_dim, value_head_dim = self._shape
        options = with_recipe(dtype, options)
        options["num_layers"], options["value_head_dim"] = num_layers, value_head_dim
        recent_tokens = options.get("recent_tokens")
        if recent_tokens and self.window_left >= 0:
            options["recent_tokens"] = min(recent_tokens, self.window_left + 1)
        return PagedKVCache(
            -(-num_tokens // block_size) + max_num_seqs - 1,
            block_size,
            num_kv_heads,
            head_dim,
            max_num_seqs,
            dtype,
            backend=get_backend(backend, on_host=self.model.device.type == "cpu").name,
            **options,
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, of ``model.generation_config``."""
        ids = self.model.generation_config.eos_token_id
        return () if ids is None else tuple(np.atleast_1d(ids).tolist())

    def check_request(self, prompt: Any, max_new_tokens: int, temperature: float) -> tuple[np.ndarray, int]:
        """The prompt as (n,) int64 and the number of new tokens, checked."""
        tokens = arguments.tokens("prompt", prompt)
        if not len(tokens):
            raise ValueError("prompt: expected at least one token; got none")
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if outside.any():
            raise ValueError(f"prompt: expected 0 to {self.vocab_size - 1}; got {tokens[outside][0]}")
        max_new_tokens = arguments.integer("max_new_tokens", max_new_tokens, minimum=0)
        checked_temperature(temperature)
        length = len(tokens) + max_new_tokens
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(f"prompt: the model takes {self.max_positions} positions; got {length}. {ALONE}")
        return tokens, max_new_tokens

    def next_logits(
        self, cache: PagedKVCache, seq_ids: Sequence[int], token_ids: Sequence[Any]
    ) -> np.ndarray:
        """Append tokens to sequences of a paged cache: one ragged forward pass.

        The tokens are registered with the cache, so that `PagedKVCache.add_sequence` finds them later.

        Parameters
        ----------
        cache : PagedKVCache
            Of this model's shape, as `make_cache` makes it.
        seq_ids : sequence of B ints
        token_ids : sequence of B sequences of int
            Each sequence's new tokens, at least one.

        Returns
        -------
        (B, vocab_size) float32
            Logits at the last new token of each sequence.

        Raises
        ------
        CacheFull
            There are too few free blocks; nothing has changed.
        ValueError
            The cache is of another shape, or `PagedKVCache.step` refuses its arguments.
        """
        shape = cache.num_layers, cache.num_kv_heads, cache.head_dim, cache.value_head_dim
        if shape != self._shape:
            raise ValueError(f"cache: expected (layers, H, D, Dv) {self._shape}, the model's; got {shape}")
        step = cache.step(seq_ids, [len(tokens) for tokens in token_ids], token_ids=token_ids)
        layers = [
            _StepLayer(step, self._places[i]) if i in self._places else _RowLayer()
            for i in range(self._num_model_layers)
        ]
        last = step.batch.query_start_loc[1:] - 1
        return self._forward(layers, np.concatenate(token_ids), step.positions, last)

    def _forward(
        self, layers: Sequence[_RowLayer], tokens: np.ndarray, positions: np.ndarray, last: Any
    ) -> np.ndarray:
        """Logits (B, vocab_size) at the tokens `last` of a row of tokens."""
        model = self.model
        rows = torch.as_tensor(last, dtype=torch.long, device=model.device)
        keep = {"logits_to_keep": rows} if model._supports_logits_to_keep() else {}
        with torch.no_grad():
            logits = model(
                input_ids=torch.as_tensor(tokens, dtype=torch.long, device=model.device)[None],
                position_ids=torch.as_tensor(positions, dtype=torch.long, device=model.device)[None],
                past_key_values=Cache(layers=list(layers)),
                use_cache=True,
                **keep,
            ).logits[0]
        return (logits if keep else logits[rows]).float().cpu().numpy()


class _RowLayer(cache_utils.CacheLayerMixin):
    """A model's layer in a pass over one row; what the keys and values that it hands out stand for."""

    is_sliding = False  # to the model: windows come with the masks

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys (1, H, T, D) and values (1, H, T, Dv), and return what stands for all that they see."""
        self.write(key_states, value_states)
        return (
            DeferredKeys(key_states.shape, key_states.dtype, key_states.device, self),
            DeferredValues(value_states.shape, value_states.dtype, value_states.device, self),
        )

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise: the model gave this layer nothing in the trial."""
        raise ValueError(f"model: a layer has keys now that had none before; {ALONE}")

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Raise: there are no keys that all tokens of the row see."""
        raise ValueError(f"model: its attention cannot take several sequences in one row; {ALONE}")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of an empty cache: of a mask only the window counts."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0, as in `get_mask_sizes`."""
        return 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1


class _StepLayer(_RowLayer):
    """A layer whose tokens go into a step of a paged cache."""

    def __init__(self, step: Step, index: int) -> None:
        super().__init__()
        self._step, self._index = step, index

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the new tokens."""
        self._step.write(by_token(key, None), by_token(value, None), layer=self._index)

    def fits(self, mask: CausalMask) -> bool:
        """Whether `attend` shows what the mask means: the trial has shown that."""
        return True

    def attend(
        self,
        query: torch.Tensor,
        mask: CausalMask,
        sm_scale: float | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of queries (1, Hq, T, D), each in its own sequence: (1, T, Hq, Dv)."""
        out = self._step.attend(
            by_token(query, None),
            layer=self._index,
            sm_scale=sm_scale,
            window_left=mask.window_left,
            logits_soft_cap=soft_cap,
            sinks=None if sinks is None else to_array(sinks.float().contiguous()),
        )
        return to_torch(out, query)[None]


class _TrialLayer(_RowLayer):
    """A layer that keeps nothing but what it sees of the model, and gives back zeros.

    Attributes
    ----------
    shape : (H, D, Dv), or None
        None: the layer has no keys of its own.
    window_left : int
    """

    def __init__(self, sliding_window: int | None) -> None:
        super().__init__()
        self._sliding_window = sliding_window
        self.shape: tuple[int, int, int] | None = None
        self.window_left = -1

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the shape."""
        self.shape = key.shape[1], key.shape[3], value.shape[3]

    def fits(self, mask: CausalMask) -> bool:
        """Whether the mask has the window of the layer, which is cut off nowhere else."""
        return self._sliding_window is None or 0 <= mask.window_left < self._sliding_window

    def attend(self, query: torch.Tensor, mask: CausalMask, *options: Any) -> torch.Tensor:
        """Keep the window; 0, (1, T, Hq, Dv)."""
        assert self.shape is not None
        self.window_left = mask.window_left
        return query.new_zeros(1, query.shape[2], query.shape[1], self.shape[2])


def _trial_layer(layer: Any) -> _TrialLayer:
    """In place of a layer of DynamicCache."""
    kind = type(layer).__name__
    if kind not in SERVED:
        raise ValueError(f"model: a paged cache has no layers like {kind}; {ALONE}")
    return _TrialLayer(getattr(layer, "sliding_window", None))


def _max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the model takes; None if it does not say.

    Rotary frequencies that follow the longest sequence of a pass would change one sequence for the sake of another:
    there the length ends where they begin to.
    """
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = (
        [rotary] if "rope_type" in rotary else [kind for kind in rotary.values() if isinstance(kind, dict)]
    )
    limits = [getattr(config, "max_position_embeddings", None)]
    for kind in kinds:
        if kind["rope_type"] == "longrope" or "dynamic" in kind["rope_type"]:
            limits.append(kind.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None), default=None)
