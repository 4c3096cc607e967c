"""What layers of one kind share: a pool of blocks, the sequences in it, and the forward pass that is running.

The cache grows as it fills. A pool's arrays are as long as if the whole machine were to be filled with the cache,
which costs address space only: the operating system gives memory to the pages that are written. So there is no
maximum to declare, nothing is ever moved, and attention finds all tokens of a sequence in one array. Segments
that are added one by one and merged by lse would need a kernel for queries that are not causal, and a position
in every segment for windows. A GPU's memory is taken when it is reserved: there the pools begin with half of what is
free, and the other half is left to the model.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvnumba.backends.protocol import Backend
from kvnumba.backends.registry import get_backend
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.step import Step
from kvnumba.integrations.transformers.masks import CausalMask
from kvnumba.integrations.transformers.tensors import to_array, to_torch

BLOCK_SIZE = 128
MAX_NUM_SEQS = 1024
"""Rows of a pool's tables: sequences of a batch, beams among them, and of copies of the cache."""
RESERVED_ON_GPU = 0.5
"""Of the memory that is free when the first token comes."""


@dataclass(frozen=True)
class Settings:
    """What the user chose; formats and arithmetic of None follow the model's dtype, the backend "auto" its device."""

    key_format: str | None
    value_format: str | None
    group_size: int | None
    arithmetic: str | None
    backend: str

    def allocate(
        self,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        num_layers: int,
        share: float,
        backend: Backend,
    ) -> PagedKVCache:
        """A pool of blocks of several layers: address space for a share of the memory there is."""
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
                num_layers=num_layers,
                backend=backend.name,
            )

        block_bytes = BLOCK_SIZE * pool(1, 1, 1).bytes_per_token()
        if backend.device is not None:
            share *= RESERVED_ON_GPU
        num_blocks = max(1, int(backend.memory_bytes() * share) // block_bytes)
        try:
            return pool(num_blocks, BLOCK_SIZE, MAX_NUM_SEQS)
        except MemoryError as error:
            if backend.device is not None:
                raise
            raise MemoryError(
                f"the system does not reserve {num_blocks * block_bytes:,} bytes of address space, which would take "
                f"up memory as they are written only: allow it (vm.overcommit_memory, ulimit -v)"
            ) from error


class LayerGroup:
    """Layers of one kind and window. Each forward pass is booked once and writes them in order.

    Padding on the left is not stored: it is left out as soon as the attention function shows the mask.

    Parameters
    ----------
    settings : Settings
    num_layers : int
    share : float
        Of the machine's memory that the group may fill.
    sliding_window : int, optional
        Tokens that the layers see, the newest one among them. Blocks before them are given back.
    """

    def __init__(
        self, settings: Settings, num_layers: int, share: float, sliding_window: int | None = None
    ) -> None:
        self.settings = settings
        self.num_layers = num_layers
        self.share = share
        self.sliding_window = sliding_window
        self.record_past = False
        self._pool: PagedKVCache | None = None
        self.clear()

    @property
    def started(self) -> bool:
        """Whether there is a pool."""
        return self._pool is not None

    @property
    def pool(self) -> PagedKVCache:
        """The pool of a group that has started."""
        if self._pool is None:
            raise ValueError("KVNumbaCache: it holds no tokens yet")
        return self._pool

    def clear(self) -> None:
        """Forget everything and give memory back."""
        if self._pool is not None:
            _finish(self._pool, self.ids)
        self._pool = None
        self.ids: list[int] = []  # the sequences' ids in the pool; this list is changed in place
        self.committed = 0  # tokens of every sequence in all layers, padding included
        self.padding = np.zeros(0, np.int64)  # tokens of each that were left out
        self._step: Step | None = None  # the latest forward pass
        self.count = 0  # its tokens
        self.real = np.zeros((0, 0), bool)  # and those that are not padding, (B, count)

    def start(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Make a pool and sequences for tensors of these shapes (B, H, any, D), dtype and device."""
        if v.shape[:2] != k.shape[:2] or v.shape[3] != k.shape[3]:
            raise ValueError(
                f"value_states: expected heads as the keys', {tuple(k.shape)}; got {tuple(v.shape)}. "
                f"Use transformers.DynamicCache for this model"
            )
        backend = get_backend(self.settings.backend, on_host=k.is_cpu)
        _require_device(k, backend)
        _require_rows(len(k))
        shape = (k.shape[1], k.shape[3])
        self.adopt(self.settings.allocate(*shape, k.dtype, self.num_layers, self.share, backend))
        window_left = -1 if self.sliding_window is None or self.record_past else self.sliding_window - 1
        self.ids.extend(self.pool.add_sequence(window_left=window_left) for _ in range(len(k)))
        self.padding = np.zeros(len(k), np.int64)

    def adopt(self, pool: PagedKVCache) -> None:
        """Use a pool, and give back what this group holds of it when nobody uses the group any more."""
        self._pool = pool
        self.ids = []
        weakref.finalize(self, _finish, pool, self.ids).atexit = False

    @property
    def running(self) -> bool:
        """Whether the latest forward pass has layers to go."""
        return self._step is not None and not self._step.covers(self.num_layers - 1)

    @property
    def step(self) -> Step:
        """The latest forward pass; after it the sequences have not changed."""
        if self._step is None:
            raise ValueError("key: these keys are not those of the latest update of their KVNumbaCache")
        return self._step

    def length(self, index: int) -> int:
        """Tokens of every sequence in a layer, padding and those of the running forward pass included."""
        return self.committed + (self.count if self.running and self.step.covers(index) else 0)

    def append(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write new tokens (B, H, q, D) to a layer."""
        if not self.started:
            self.start(k, v)
        elif not k.is_cpu:
            _require_device(k, get_backend(self.pool.backend))
        if len(k) != len(self.ids):
            raise ValueError(
                f"key_states: expected the {len(self.ids)} sequences that the cache holds; got {len(k)}. "
                f"Call reset() first, or batch_repeat_interleave(n) to continue each n times"
            )
        if index == 0:
            if self.running:
                raise ValueError(
                    "key_states: the forward pass before this one did not reach the last layer; "
                    "crop(0) forgets it, or use transformers.DynamicCache to skip layers"
                )
            self._book(k.shape[2], np.ones((len(k), k.shape[2]), bool))
        elif not self.running or k.shape[2] != self.count:
            raise ValueError(
                f"key_states: layer {index} of its kind was updated without the layers before it"
            )
        self._write(index, k, v)

    def _book(self, count: int, real: np.ndarray) -> None:
        self._step = self.pool.step(self.ids, real.sum(axis=1))
        self.count, self.real = count, real

    def _write(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.step.write(_pack(k, self.real), _pack(v, self.real), layer=index)
        if index == self.num_layers - 1:
            self.committed += self.count

    def fits(self, index: int, mask: CausalMask) -> bool:
        """Whether what is stored, less padding among the new tokens, is what the mask shows to a layer."""
        length = self.length(index)
        if mask.length is not None and mask.length != length:
            raise ValueError(
                f"attention_mask: expected {length} tokens, all that are cached; got {mask.length}"
            )
        padding = np.zeros_like(self.padding) if mask.padding is None else mask.padding
        if (padding < self.padding).any():
            raise ValueError(
                f"attention_mask: expected the padding that earlier calls had, {self.padding.tolist()} tokens on "
                f"the left, which is not in the cache; got {padding.tolist()}"
            )
        if self.sliding_window is not None and not 0 <= mask.window_left < self.sliding_window:
            return False  # the mask shows as many of the newest tokens as `update` returned, whatever their distance
        # the first layer leaves padding out among the new tokens; if it did not, they are stored for good
        stored = length - self.count if index == 0 else length
        return bool((np.minimum(padding, stored) <= self.padding).all())

    def leave_out(self, index: int, padding: np.ndarray, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the new tokens again, without those that turn out to be padding."""
        padding = np.minimum(padding, self.length(index))
        if (padding <= self.padding).all():
            return
        first = self.length(index) - self.count
        for seq_id, left_out in zip(self.ids, self.padding.tolist(), strict=True):
            self.pool.truncate(seq_id, first - left_out)
        self.committed = first
        self._book(self.count, np.arange(first, first + self.count) >= padding[:, None])
        self._write(index, k, v)
        self.padding = padding

    def attend(self, index: int, query: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attention of the new tokens' queries (B, Hq, q, D): (B, q, Hq, D), 0 where the query is padding."""
        options["arithmetic"] = self.settings.arithmetic
        out = to_torch(self.step.attend(_pack(query, self.real), layer=index, **options), query)
        if self.real.all():
            return out.view(*self.real.shape, *out.shape[1:])
        unpacked = out.new_zeros(*self.real.shape, *out.shape[1:])
        unpacked[torch.from_numpy(self.real)] = out
        return unpacked

    def dense(self, index: int, visible: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `visible` keys and values of a layer, (B, H, visible, D) like a tensor; 0 where padding was."""
        shape = (len(self.ids), self.pool.num_kv_heads, visible, self.pool.head_dim)
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for row, (k, v) in enumerate(self.step.get_kv(layer=index)):
            count = min(visible, k.shape[1])
            keys[row, :, visible - count :] = k[:, k.shape[1] - count :]
            values[row, :, visible - count :] = v[:, v.shape[1] - count :]
        return to_torch(keys, like), to_torch(values, like)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence, and a forward pass that did not reach the last layer."""
        if not self.started:
            return
        length = max(self.committed - tokens_to_remove, 0)
        padding = np.minimum(self.padding, length)
        for seq_id, kept in zip(self.ids, (length - padding).tolist(), strict=True):
            self.pool.truncate(seq_id, kept)
        self.committed, self.padding, self._step = length, padding, None

    def select(self, parents: torch.Tensor) -> None:
        """Let sequence n become what sequence ``parents[n]`` is; blocks are shared, nothing is copied."""
        if not self.started:
            return
        rows = np.arange(len(self.ids))[to_array(parents.cpu())].tolist()
        _require_rows(len(rows))
        before = self.ids.copy()
        for row, seq_id in enumerate(before):
            if row not in rows:
                self.pool.finish_sequence(seq_id)
        kept: set[int] = set()
        self.ids[:] = []
        for row in rows:
            self.ids.append(self.pool.fork(before[row]) if row in kept else before[row])
            kept.add(row)
        self.padding, self._step = self.padding[rows], None

    def fork(self) -> LayerGroup:
        """A group that goes its own way from here; blocks are shared until one of the two writes to them."""
        twin = LayerGroup(self.settings, self.num_layers, self.share, self.sliding_window)
        twin.record_past = self.record_past
        if self.started:
            twin.adopt(self.pool)
            twin.ids.extend(self.pool.fork(seq_id) for seq_id in self.ids)
            twin.committed, twin.padding = self.committed, self.padding.copy()
        return twin

    def memory_bytes(self) -> int:
        """Bytes of the blocks that are in use, scales and zero points included."""
        if not self.started:
            return 0
        blocks = self.pool.num_blocks - self.pool.num_free_blocks
        return blocks * self.pool.block_size * self.pool.bytes_per_token()


def _pack(x: torch.Tensor, real: np.ndarray) -> Any:
    """The real tokens of (B, heads, q, D), sequence by sequence: (tokens, heads, D)."""
    by_token = to_array(x).swapaxes(1, 2)
    return by_token.reshape(-1, *by_token.shape[2:]) if real.all() else by_token[real]


def _finish(pool: PagedKVCache, ids: list[int]) -> None:
    while ids:
        pool.finish_sequence(ids.pop())


def _require_device(k: torch.Tensor, backend: Backend) -> None:
    if not (k.is_cpu or (k.is_cuda and k.get_device() == backend.device)):
        place = "the CPU" if backend.device is None else f"the CPU or cuda:{backend.device}"
        raise ValueError(
            f"key_states: expected tensors on {place} for the {backend.name} backend; got {k.device}. "
            f"Use transformers.DynamicCache there, or move the model"
        )


def _require_rows(count: int) -> None:
    if count > MAX_NUM_SEQS:
        raise ValueError(f"batch: expected at most {MAX_NUM_SEQS} sequences; got {count}")
