"""A `transformers.Cache` of kvnumba's paged storage, one pool of blocks a layer.

The cache grows as it fills. A pool's arrays are as long as if the whole machine were to be filled with the cache,
which costs address space only: the operating system gives memory to the pages that are written. So there is no
maximum to declare, nothing is ever moved, and attention finds all tokens of a sequence in one array. Segments
that are added one by one and merged by lse would need a kernel for queries that are not causal, and a position
in every segment for windows.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DummyLayer, get_layer_types_and_kwargs

from kvnumba import arguments
from kvnumba.formats import resolve_format
from kvnumba.integrations.transformers.masks import CausalMask
from kvnumba.integrations.transformers.tensors import to_numpy, to_torch
from kvnumba.paged import PagedKVCache
from kvnumba.registry import get_backend
from kvnumba.step import Step

NAME = "kvnumba"
"""Of the attention implementation, and of the attribute by which keys carry the handle to their layer."""

BLOCK_SIZE = 128
MAX_NUM_SEQS = 1024
"""Rows of a layer's tables: sequences of a batch, beams among them, and of copies of the cache."""


@dataclass(frozen=True)
class Storage:
    """How layers store their tokens; formats of None follow the model's dtype."""

    config: PreTrainedConfig
    num_layers: int
    key_format: str | None
    value_format: str | None
    group_size: int | None
    backend: str | None

    def allocate(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagedKVCache:
        """A pool for one layer: address space for its part of the machine's memory."""
        default = str(dtype).removeprefix("torch.")

        def pool(num_blocks: int, block_size: int, max_num_seqs: int) -> PagedKVCache:
            return PagedKVCache(
                num_blocks,
                block_size,
                num_kv_heads,
                head_dim,
                max_num_seqs,
                default if default in ("float16", "bfloat16") else "float32",
                key_format=self.key_format,
                value_format=self.value_format,
                group_size=self.group_size,
                backend=self.backend,
            )

        block_bytes = BLOCK_SIZE * pool(1, 1, 1).bytes_per_token()
        num_blocks = max(1, _machine_memory() // self.num_layers // block_bytes)
        try:
            return pool(num_blocks, BLOCK_SIZE, MAX_NUM_SEQS)
        except MemoryError as error:
            raise MemoryError(
                f"the system does not reserve {num_blocks * block_bytes:,} bytes of address space for a layer that "
                f"would take up memory as they are written: allow it (vm.overcommit_memory, ulimit -v)"
            ) from error


class KVNumbaLayer(CacheLayerMixin):
    """The keys and values of one model layer.

    Padding on the left is not stored: the attention function leaves it out as soon as it sees the mask.

    Parameters
    ----------
    storage : Storage
    sliding_window : int, optional
        Tokens that the layer sees, the newest one among them. Blocks before them are given back.
    """

    is_croppable = True

    def __init__(self, storage: Storage, sliding_window: int | None = None) -> None:
        super().__init__()
        self._storage = storage
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self._pool: PagedKVCache | None = None
        self._ids: list[int] = []  # the sequences' ids in the pool; this list is changed in place
        self._length = 0  # of every sequence, padding included
        self._padding = np.zeros(0, np.int64)  # tokens of each that were left out
        self._latest: Appended | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the pool, for tensors of this shape (B, H, any, D), dtype and device."""
        if key_states.device.type != "cpu":
            raise ValueError(
                f"key_states: expected tensors on the CPU; got {key_states.device}. "
                f"Use transformers.DynamicCache there, or model.to('cpu')"
            )
        batch_size, num_kv_heads, _, head_dim = key_states.shape
        if value_states.shape[:2] != key_states.shape[:2] or value_states.shape[3] != head_dim:
            raise ValueError(
                f"value_states: expected heads as the keys', {tuple(key_states.shape)}; got "
                f"{tuple(value_states.shape)}. Use transformers.DynamicCache for this model"
            )
        _require_rows(batch_size)
        self._adopt(self._storage.allocate(num_kv_heads, head_dim, key_states.dtype))
        window_left = -1 if self.sliding_window is None or self.record_past else self.sliding_window - 1
        self._ids.extend(self._pool.add_sequence(window_left=window_left) for _ in range(batch_size))
        self._padding = np.zeros(batch_size, np.int64)

    def _adopt(self, pool: PagedKVCache) -> None:
        """Use a pool, and give back what this layer holds of it when nobody uses the layer any more."""
        self._pool = pool
        self._ids = []
        weakref.finalize(self, _finish, pool, self._ids).atexit = False
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens (B, H, q, D).

        Returns
        -------
        keys, values : (B, H, q, D), or (B, H, k, D)
            With the attention implementation "kvnumba" the tensors as they came, with a handle for the attention
            function. With any other all that the new tokens may see, dense, in the dtype of the new ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch_size, _, count, _ = key_states.shape
        if batch_size != len(self._ids):
            raise ValueError(
                f"key_states: expected the {len(self._ids)} sequences that the cache holds; got {batch_size}. "
                f"Call reset() first, or batch_repeat_interleave(n) to continue each n times"
            )
        visible, _ = self.get_mask_sizes(count)
        step = self._append(key_states, value_states, np.ones((batch_size, count), bool))
        self._length += count
        self._latest = Appended(self, step, count, visible)
        if self._storage.config._attn_implementation == NAME:
            setattr(key_states, NAME, self._latest)
            return key_states, value_states
        return self._latest.dense(key_states.dtype)

    def _append(self, k: torch.Tensor, v: torch.Tensor, real: np.ndarray) -> Step:
        """Write those tokens of (B, H, q, D) that are real, (B, q) bool."""
        step = self._pool.step(self._ids, real.sum(axis=1))
        step.write(_pack(k, real), _pack(v, real))
        return step

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `update` is going to return where it returns dense ones, and the position of the first."""
        earlier = self._length if self.sliding_window is None else min(self._length, self.sliding_window - 1)
        return earlier + query_length, self._length - earlier

    def get_seq_length(self) -> int:
        """Tokens of every sequence, padding included."""
        return self._length

    def get_max_length(self) -> int:
        """-1: there is no maximum; of a sliding layer, its window."""
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Keep what falls out of the window of sequences that begin from here on, so that `crop` finds it again.

        What the latest `update` appended can be cropped in any case.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence, given as a number of 0 or less."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or less; got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = max(self._length + tokens_to_remove, 0)
        padding = np.minimum(self._padding, length)
        for seq_id, kept in zip(self._ids, (length - padding).tolist(), strict=True):
            self._pool.truncate(seq_id, kept)
        self._length, self._padding = length, padding
        self._latest = None

    def reset(self) -> None:
        """Empty the layer; memory is given back."""
        if self._pool is not None:
            _finish(self._pool, self._ids)
        self._clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence b become what sequence ``beam_idx[b]`` is."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences only."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue each sequence `repeats` times."""
        self._select(torch.arange(len(self._ids)).repeat_interleave(repeats))

    def _select(self, parents: torch.Tensor) -> None:
        """Let sequence n become what sequence ``parents[n]`` is; blocks are shared, nothing is copied."""
        if not self.is_initialized:
            return
        rows = np.arange(len(self._ids))[to_numpy(parents.cpu())].tolist()
        _require_rows(len(rows))
        before = self._ids.copy()
        for row, seq_id in enumerate(before):
            if row not in rows:
                self._pool.finish_sequence(seq_id)
        kept: set[int] = set()
        self._ids[:] = []
        for row in rows:
            self._ids.append(self._pool.fork(before[row]) if row in kept else before[row])
            kept.add(row)
        self._padding = self._padding[rows]
        self._latest = None

    def memory_bytes(self) -> int:
        """Bytes of the blocks that are in use, scales and zero points included."""
        if self._pool is None:
            return 0
        blocks = self._pool.num_blocks - self._pool.num_free_blocks
        return blocks * self._pool.block_size * self._pool.bytes_per_token()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVNumbaLayer:
        """A layer that goes its own way from here; blocks are shared until one of the two writes to them."""
        twin = KVNumbaLayer(self._storage, self.sliding_window)
        twin.record_past = self.record_past
        if self._pool is not None:
            twin._adopt(self._pool)
            twin._ids.extend(self._pool.fork(seq_id) for seq_id in self._ids)
            twin._length, twin._padding = self._length, self._padding.copy()
        return twin

    def __repr__(self) -> str:
        window = "" if self.sliding_window is None else f", sliding_window={self.sliding_window}"
        return f"KVNumbaLayer(sequences={len(self._ids)}, tokens={self._length}{window})"


class Appended:
    """The tokens that one `update` appended: what their keys carry to the attention function."""

    def __init__(self, layer: KVNumbaLayer, step: Step, count: int, visible: int) -> None:
        self._layer = layer
        self._step = step
        self._count = count
        self._visible = visible

    def can_leave_out(self, mask: CausalMask) -> bool:
        """Whether what is stored, less padding among the new tokens, is what the mask shows."""
        layer = self._layer
        if layer._latest is not self:
            raise ValueError("key: these keys are not those of the latest update of their KVNumbaCache")
        if mask.length is not None and mask.length != layer._length:
            raise ValueError(f"attention_mask: expected {layer._length} tokens, all that are cached; got {mask.length}")
        padding = np.zeros_like(layer._padding) if mask.padding is None else mask.padding
        if (padding < layer._padding).any():
            raise ValueError(
                f"attention_mask: expected the padding that earlier calls had, {layer._padding.tolist()} tokens on "
                f"the left, which is not in the cache; got {padding.tolist()}"
            )
        left_out = np.minimum(padding, layer._length - self._count)
        return bool((left_out <= layer._padding).all())

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: np.ndarray | None,
        **options: Any,
    ) -> torch.Tensor:
        """Attention of queries (B, Hq, q, D), out of the storage: (B, q, Hq, D); 0 where the query is padding."""
        layer = self._layer
        real = np.ones((len(layer._ids), self._count), bool)
        if padding is not None:
            first = layer._length - self._count
            real = np.arange(first, layer._length) >= padding[:, None]
            if (layer._padding < np.minimum(padding, layer._length)).any():
                for seq_id, left_out in zip(layer._ids, layer._padding.tolist(), strict=True):
                    layer._pool.truncate(seq_id, first - left_out)
                self._step = layer._append(key, value, real)
                layer._padding = np.minimum(padding, layer._length)
        packed = to_torch(self._step.attend(_pack(query, real), **options), query.dtype)
        if real.all():
            return packed.view(*real.shape, *packed.shape[1:])
        out = packed.new_zeros(*real.shape, *packed.shape[1:])
        out[torch.from_numpy(real)] = packed
        return out

    def dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that the new tokens may see, (B, H, k, D); 0 where padding was left out."""
        pool = self._layer._pool
        shape = (len(self._layer._ids), pool.num_kv_heads, self._visible, pool.head_dim)
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for row, seq_id in enumerate(self._layer._ids):
            k, v = pool.get_kv(seq_id)
            count = min(self._visible, k.shape[1])
            keys[row, :, self._visible - count :] = k[:, k.shape[1] - count :]
            values[row, :, self._visible - count :] = v[:, v.shape[1] - count :]
        return to_torch(keys, dtype), to_torch(values, dtype)


class KVNumbaCache(Cache):
    """The cache of a Hugging Face model, in kvnumba's formats and on its backends.

    With ``model.set_attn_implementation("kvnumba")`` attention is computed straight out of the storage. With any
    other implementation the cache works too, and gives back dense keys and values at each step.

    Parameters
    ----------
    config : PreTrainedConfig
        ``model.config`` itself: the cache reads which attention implementation is set.
    key_format, value_format : {"float32", "float16", "bfloat16", "int8", "int4"}, optional
        Default: the model's dtype.
    group_size : int, optional
        Elements along head_dim that share a scale in int8 and int4. Default: all.
    backend : {"numpy", "cpu", "auto"}, optional
        Default: `kvnumba.use_backend`, then ``KVNUMBA_BACKEND``, then "auto".

    Raises
    ------
    ValueError, TypeError
        An argument is not as above, or the model has layers that cannot be cached here.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        key_format: str | None = None,
        value_format: str | None = None,
        group_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config: expected model.config; got a {type(config).__name__}")
        for argument, fmt in (("key_format", key_format), ("value_format", value_format)):
            if fmt is not None:
                resolve_format(argument, fmt)
        if group_size is not None:
            arguments.integer("group_size", group_size, minimum=1)
        decoder = config.get_text_config(decoder=True)
        types, options = get_layer_types_and_kwargs(decoder)
        num_layers = sum(kind != "dummy" for kind in types)
        storage = Storage(
            decoder, num_layers, key_format, value_format, group_size, get_backend(backend).name
        )
        super().__init__(
            layers=[_layer(storage, kind, **kwargs) for kind, kwargs in zip(types, options, strict=True)]
        )

    def memory_bytes(self) -> int:
        """Bytes of the blocks that are in use, scales and zero points included."""
        return sum(layer.memory_bytes() for layer in self._stored_layers())

    def _stored_layers(self) -> list[KVNumbaLayer]:
        return [layer for layer in self.layers if isinstance(layer, KVNumbaLayer)]

    def __repr__(self) -> str:
        storage = self._stored_layers()[0]._storage
        return (
            f"KVNumbaCache(layers={len(self)}, tokens={self.get_seq_length()}, keys {storage.key_format or 'as given'}, "
            f"values {storage.value_format or 'as given'}, {storage.backend}, {self.memory_bytes() / 1e6:.1f} MB)"
        )


def _layer(storage: Storage, kind: str, **kwargs: Any) -> CacheLayerMixin | DummyLayer:
    """A layer of one of transformers' types."""
    if kind == "dummy":
        return DummyLayer()
    if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
        raise ValueError(
            f"config: layers of type {kind!r} cannot be kept in a KVNumbaCache; use transformers.DynamicCache"
        )
    return KVNumbaLayer(storage, kwargs.get("sliding_window"))


def _pack(x: torch.Tensor, real: np.ndarray) -> np.ndarray:
    """The real tokens of (B, heads, q, D), sequence by sequence: (tokens, heads, D)."""
    by_token = to_numpy(x).swapaxes(1, 2)
    return by_token.reshape(-1, *by_token.shape[2:]) if real.all() else by_token[real]


def _finish(pool: PagedKVCache, ids: list[int]) -> None:
    while ids:
        pool.finish_sequence(ids.pop())


def _require_rows(count: int) -> None:
    if count > MAX_NUM_SEQS:
        raise ValueError(f"batch: expected at most {MAX_NUM_SEQS} sequences; got {count}")


def _machine_memory() -> int:
    """Bytes of the machine's memory; 16 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 34
