"""What layers of one kind share: a pool of blocks, the sequences in it, and the forward pass that is running."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvnumba.backends.protocol import Backend
from kvnumba.backends.registry import get_backend
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.per_head import PerHeadKVCache
from kvnumba.caches.step import Step
from kvnumba.integrations.transformers.forward import ForwardPass, KeptDecoding, by_token, current_stream, lie
from kvnumba.integrations.transformers.masks import CausalMask
from kvnumba.integrations.transformers.settings import Settings
from kvnumba.integrations.transformers.tensors import format_name, to_array, to_torch
from kvnumba.options import Scoring


class LayerGroup:
    """Layers of the same kind and window, which share their sequences.

    Padding on the left is not stored. It becomes known only when the first layer's attention sees the mask, after
    the layer's keys have been stored: they are then stored again without it.

    Parameters
    ----------
    settings : Settings
    layers : sequence of int
        Their numbers, among the layers that the cache stores.
    share : float
        How much of the machine's memory the group may fill.
    sliding_window : int, optional
        Tokens that a token sees, itself included. Blocks before them are given back.
    """

    def __init__(
        self, settings: Settings, layers: Sequence[int], share: float, sliding_window: int | None = None
    ) -> None:
        self.settings = settings
        self.layers = layers
        self.share = share
        self.sliding_window = sliding_window
        self.record_past = False
        self.deferring = False  # whether the model's attention reads the storage
        self._pool: PagedKVCache | PerHeadKVCache | None = None
        self._scorings: dict[int, tuple[Any, ...]] = {}  # layer -> key, sinks, Scoring
        self.clear()

    @property
    def started(self) -> bool:
        """Whether there is a pool."""
        return self._pool is not None

    @property
    def pool(self) -> PagedKVCache | PerHeadKVCache:
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
        self.padding: np.ndarray | None = (
            None  # tokens on the left of each that were left out; None: no padding
        )
        self.forward: ForwardPass | None = None  # the latest, if nothing else has changed the sequences since
        self._kept: KeptDecoding | None = None
        self._next: ForwardPass | None = None  # begun before its first layer is here
        self._length = 0  # tokens of every sequence, padding included, where there is no such pass

    def start(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Make a pool and sequences for tensors of these shapes (B, H, any, D or Dv), dtype and device."""
        if v.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"value_states: expected batch and heads as the keys', {tuple(k.shape)}; got {tuple(v.shape)}. "
                f"Use transformers.DynamicCache for this model"
            )
        if self.settings.per_head and not k.is_cpu:
            raise ValueError(f"per_head: expected a model on the CPU; got keys on {k.device}")
        backend = get_backend(self.settings.backend, on_host=k.is_cpu)
        _require_device(k, backend.device, backend.name)
        head_dims, defaults = (k.shape[3], v.shape[3]), (format_name(k.dtype), format_name(v.dtype))
        pool = self.allocate(k.shape[1], head_dims, defaults, backend)
        _require_rows(len(k), pool)
        self.adopt(pool)
        if isinstance(pool, PerHeadKVCache):
            self.ids.extend(pool.add_sequence() for _ in range(len(k)))
            return
        window_left = -1 if self.sliding_window is None or self.record_past else self.sliding_window - 1
        self.ids.extend(pool.add_sequence(window_left=window_left) for _ in range(len(k)))

    def allocate(
        self, num_kv_heads: int, head_dims: tuple[int, int], defaults: tuple[str, str], backend: Backend
    ) -> PagedKVCache | PerHeadKVCache:
        """A pool for the group, see `Settings.allocate`."""
        return self.settings.allocate(
            num_kv_heads, head_dims, defaults, self.layers, self.share, self.sliding_window, backend
        )

    @property
    def num_layers(self) -> int:
        """Layers of the group."""
        return len(self.layers)

    def adopt(self, pool: PagedKVCache | PerHeadKVCache) -> None:
        """Use this pool, and finish the group's sequences in it when the group is no longer used."""
        self._pool = pool
        self.ids = []
        weakref.finalize(self, _finish, pool, self.ids).atexit = False

    def restore(self, ids: list[int], length: int, padding: np.ndarray | None) -> None:
        """Hold sequences that are in the pool already, of so many tokens, padding included."""
        self.ids.extend(ids)
        self._length, self.padding = length, padding

    def take(self, other: LayerGroup) -> None:
        """Hold what another group of this kind holds, which is empty afterwards."""
        self.clear()
        if other.started:
            self.adopt(other.pool)
            self.restore(other.ids, other.complete_length, other.padding)
            other.ids.clear()  # this group finishes them
            other.clear()

    @property
    def running(self) -> bool:
        """Whether the latest forward pass has layers to go."""
        self.flush()
        return self.forward is not None and not self.forward.step.covers(self.num_layers - 1)

    def length(self, index: int) -> int:
        """Tokens of every sequence in a layer, padding and those of the running forward pass included."""
        return self._length if self.forward is None else self.forward.length(index)

    @property
    def complete_length(self) -> int:
        """Tokens of every sequence that all layers have, padding included."""
        return self.length(self.num_layers - 1)

    def append(self, index: int, k: torch.Tensor, v: torch.Tensor) -> ForwardPass:
        """Take new tokens, keys (B, H, q, D) and values (B, H, q, Dv), into a layer.

        In decode steps on a GPU `attend` stores them, or whatever else needs them first.
        """
        self.flush()
        known = self._kept is not None and self._kept.new == lie(k, v)
        if not known:
            self._require_fit(k, v)
        if index == 0:
            self._require_complete()
            self.forward = self._next or self._begin(k.shape[2], current_stream(k) if known else None)
            self._next = None
        forward = self.forward
        if forward is None or k.shape[2] != forward.count:
            raise ValueError(
                f"key_states: layer {index} of its kind was updated without the layers before it; "
                f"use transformers.DynamicCache for a model that takes its layers in another order"
            )
        forward.new = index, k, v
        if known and forward.follows:
            forward.whole_step.require_next(index)
            forward.unwritten = True
        else:
            forward.require_eager()
            forward.step.write(by_token(k, forward.real), by_token(v, forward.real), layer=index)
        return forward

    def _require_complete(self) -> None:
        if self.running:
            raise ValueError(
                "key_states: the forward pass before this one did not reach the last layer; "
                "crop(0) forgets it, or use transformers.DynamicCache to skip layers"
            )

    def flush(self) -> None:
        """Store what the latest layer has taken, if it is not stored yet."""
        if self.forward is not None:
            self.forward.flush()

    def _require_fit(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raise unless tensors are where the pool takes them, and as many sequences; make a pool if there is none."""
        if not self.started:
            self.start(k, v)
        elif not k.is_cpu:
            _require_device(k, self.pool.device, self.pool.backend)
        if k.shape[0] != len(self.ids):
            raise ValueError(
                f"key_states: expected the {len(self.ids)} sequences that the cache holds; got {len(k)}. "
                f"Call reset() first, or batch_repeat_interleave(n) to continue each n times"
            )

    def _begin(self, count: int, stream: int | None) -> ForwardPass:
        """A pass of so many new tokens; `stream`: the one that torch works on, if the decoding may serve them."""
        first = self.complete_length
        earlier = first if self.sliding_window is None else min(first, self.sliding_window - 1)
        step = self.pool.step(self.ids, [count] * len(self.ids))
        forward = ForwardPass(step, first, count, earlier + count)
        kept = self._kept
        if kept is not None and stream is not None:
            forward.follows = kept.stream == stream and forward.whole_step.follow(
                kept.decoding, kept.query[0][1], kept.scoring, stream
            )
            if not forward.follows:
                self._kept = None
        return forward

    def fits(self, index: int, mask: CausalMask) -> bool:
        """Whether attention out of the storage, less padding among the new tokens, shows what the mask shows."""
        forward = self.forward
        assert forward is not None
        if forward.judged is None or forward.judged[0] is not mask:  # the layers of a pass have one mask
            forward.judged = mask, self._judge(forward, index, mask)
        return forward.judged[1]

    def _judge(self, forward: ForwardPass, index: int, mask: CausalMask) -> bool:
        length = forward.first + forward.count
        if mask.length is not None and mask.length != length:
            raise ValueError(
                f"attention_mask: expected {length} tokens, all that are cached; got {mask.length}"
            )
        # a mask without the window shows all tokens that `update` returned, however far apart they are
        window_fits = self.sliding_window is None or 0 <= mask.window_left < self.sliding_window
        if forward.captured:  # padding was compared before
            return window_fits
        if mask.padding is None and self.padding is None:
            return window_fits
        shown, left_out = self.padding_or_zeros(mask.padding), self.padding_or_zeros(self.padding)
        if (shown < left_out).any():
            raise ValueError(
                f"attention_mask: expected the padding that earlier calls had, {left_out.tolist()} tokens on "
                f"the left, which is not in the cache; got {shown.tolist()}"
            )
        # the first layer leaves padding out among the new tokens; if it did not, they are stored for good
        stored = forward.first if index == 0 else length
        return window_fits and bool((np.minimum(shown, stored) <= left_out).all())

    def padding_or_zeros(self, padding: np.ndarray | None) -> np.ndarray:
        """Tokens of padding of each sequence, None standing for none."""
        return np.zeros(len(self.ids), np.int64) if padding is None else padding

    def leave_out(self, padding: np.ndarray, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the new tokens of the first layer again, without those that turn out to be padding."""
        forward = self.forward
        assert forward is not None
        first, count = forward.first, forward.count
        padding, before = np.minimum(padding, first + count), self.padding_or_zeros(self.padding)
        if (padding <= before).all():
            return
        for seq_id, left_out in zip(self.ids, before.tolist(), strict=True):
            self.pool.truncate(seq_id, first - left_out)
        real = np.arange(first, first + count) >= padding[:, None]
        forward.step, forward.real = self.pool.step(self.ids, real.sum(axis=1)), real
        forward.step.write(by_token(k, real), by_token(v, real), layer=0)
        self.padding = padding

    def attend(
        self,
        index: int,
        query: torch.Tensor,
        window_left: int,
        sm_scale: float | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the new tokens' queries (B, Hq, q, D): (B, q, Hq, Dv), 0 where the query is padding."""
        forward = self.forward
        assert forward is not None
        scoring = self._scoring(index, query, window_left, sm_scale, soft_cap, sinks)
        if forward.unwritten:
            done = self._decode(forward, index, query, scoring)
            if done is not None:
                return done
            forward.flush()
        forward.require_eager()
        packed = by_token(query, forward.real)
        out = to_torch(forward.step.attend(packed, layer=index, scoring=scoring), query)
        if forward.real is None:
            if forward.count == 1 and self._kept is None and query.is_cuda:
                self._keep(forward, query, scoring)
            return out.view(len(self.ids), forward.count, *out.shape[1:])
        unpacked = out.new_zeros(*forward.real.shape, *out.shape[1:])
        unpacked[torch.from_numpy(forward.real)] = out
        return unpacked

    def _decode(
        self, forward: ForwardPass, index: int, query: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor | None:
        """`attend` in the same call that stores the layer's new tokens; None, and nothing is done, if it cannot be."""
        kept, new = self._kept, forward.new
        assert kept is not None
        assert new is not None
        if new[0] != index or kept.query != lie(query):
            return None
        layer = kept.decoding.layer(index, scoring)
        if layer is None:
            return None
        out = query.new_empty((query.shape[0], 1, query.shape[1], new[2].shape[3]))
        layer.run(
            new[1].data_ptr(), new[2].data_ptr(), query.data_ptr(), out.data_ptr(), current_stream(query)
        )
        forward.unwritten = False
        forward.whole_step.written(index)
        return out

    def _keep(self, forward: ForwardPass, query: torch.Tensor, scoring: Scoring) -> None:
        """Prepare to store and attend in one call, in the layers and the decode steps that follow."""
        assert forward.new is not None
        _, k, v = forward.new
        q, k_new, v_new = (by_token(x, None) for x in (query, k, v))
        decoding = forward.whole_step.decoding(q, k_new, v_new, scoring)
        if decoding is not None:
            self._kept = KeptDecoding(decoding, scoring, lie(k, v), lie(query), current_stream(k))
            forward.follows = True

    def begin_decoding(self, stream: int) -> ForwardPass | None:
        """A pass of one new token a sequence, all of whose layers can store and attend in one call; None: no such."""
        self._require_complete()
        kept = self._kept
        if kept is None or len(self._scorings) < self.num_layers:
            return None
        if any(kept.decoding.layer(n, self._scorings[n][2]) is None for n in range(self.num_layers)):
            return None
        forward = self._begin(1, stream)
        return forward if forward.follows else None

    def record(self, forward: ForwardPass) -> None:
        """Let the next pass be this one, which is recorded as a CUDA graph."""
        forward.captured = True
        self._next = forward

    def replay(self, forward: ForwardPass) -> None:
        """Know that a graph stores a pass's tokens in all layers, and attends to them."""
        self.forward = forward
        forward.whole_step.written(self.num_layers - 1)

    def undo(self, forward: ForwardPass) -> None:
        """Forget a pass, the latest one, wherever it is on its way."""
        self.forward = self._next = None
        self._length = forward.first
        padding = self.padding_or_zeros(self.padding)
        for seq_id, kept in zip(self.ids, (forward.first - padding).tolist(), strict=True):
            self.pool.truncate(seq_id, kept)

    @property
    def kept(self) -> KeptDecoding | None:
        """What a graph of decode steps launches; another one, and the graph is of no use any more."""
        return self._kept

    def _scoring(
        self,
        index: int,
        query: torch.Tensor,
        window_left: int,
        sm_scale: float | None,
        soft_cap: float | None,
        sinks: torch.Tensor | None,
    ) -> Scoring:
        """A layer's options, checked: once, since they are the same for every token."""
        key = (query.shape[1], window_left, sm_scale, soft_cap, None if sinks is None else _state_of(sinks))
        kept = self._scorings.get(index)
        if kept is None or kept[0] != key:
            scoring = Scoring.of(
                query.shape[1],
                query.shape[3],
                sm_scale=sm_scale,
                window_left=window_left,
                logits_soft_cap=soft_cap,
                sinks=None if sinks is None else to_array(sinks.float().contiguous()),
                arithmetic=self.settings.arithmetic,
            )
            if query.dtype == torch.bfloat16:
                scoring = scoring.in_bfloat16
            kept = self._scorings[index] = (key, sinks, scoring)  # while sinks are kept no other has their id
        return kept[2]

    def dense(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that the new tokens see, (B, H, visible, D or Dv) like a tensor; 0 where padding was."""
        self.flush()
        forward, pool = self.forward, self.pool
        assert forward is not None
        forward.require_eager()
        if not isinstance(forward.step, Step):
            raise ValueError(
                "per_head: expected a model that attends out of the storage, with "
                'set_attn_implementation("kvnumba") and a causal mask; this one asks for keys and values as one '
                "tensor. Use a KVNumbaCache without it"
            )
        shape = (len(self.ids), pool.num_kv_heads, forward.visible)
        keys = np.zeros((*shape, pool.head_dim), np.float32)
        values = np.zeros((*shape, pool.value_head_dim), np.float32)
        for row, pair in enumerate(forward.step.get_kv(layer=index)):
            for out, stored in zip((keys, values), pair, strict=True):
                count = min(forward.visible, stored.shape[1])
                out[row, :, forward.visible - count :] = stored[:, stored.shape[1] - count :]
        return to_torch(keys, like), to_torch(values, like)

    def held(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer with blocks of one head, (B, H, tokens, D or Dv) like a tensor.

        All of its heads must hold as many tokens.
        """
        pool = self.pool
        assert isinstance(pool, PerHeadKVCache)
        heads = [pool.get_kv(seq_id) for seq_id in self.ids]
        keys, values = (np.array([[head[n] for head in each] for each in heads]) for n in (0, 1))
        return to_torch(keys, like), to_torch(values, like)

    def keep(self, positions: Sequence[Sequence[np.ndarray]]) -> None:
        """Drop all tokens of a layer with blocks of one head but those at the positions of each sequence and head."""
        pool = self.pool
        assert isinstance(pool, PerHeadKVCache)
        self._require_complete()
        self._length, self.forward = self.complete_length, None
        for seq_id, each in zip(self.ids, positions, strict=True):
            pool.keep(seq_id, each)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence, and a forward pass that did not reach the last layer."""
        self.flush()
        if not self.started:
            return
        length = max(self.complete_length - tokens_to_remove, 0)
        padding = np.minimum(self.padding_or_zeros(self.padding), length)
        for seq_id, kept in zip(self.ids, (length - padding).tolist(), strict=True):
            self.pool.truncate(seq_id, kept)
        self._length, self.forward = length, None
        self.padding = padding if padding.any() else None

    def select(self, parents: torch.Tensor) -> None:
        """Replace each sequence n by sequence ``parents[n]``; blocks are shared."""
        self.flush()
        if not self.started:
            return
        self._require_complete()
        rows = np.arange(len(self.ids))[to_array(parents.cpu())].tolist()
        _require_rows(len(rows) - len(self.ids), self.pool)
        self._length, self.forward = self.complete_length, None
        before = self.ids.copy()
        if len(rows) == len(before):
            self.pool.reorder(before, [before[row] for row in rows])
        else:
            for row, seq_id in enumerate(before):
                if row not in rows:
                    self.pool.finish_sequence(seq_id)
            kept: set[int] = set()
            self.ids[:] = []
            for row in rows:
                self.ids.append(self.pool.fork(before[row]) if row in kept else before[row])
                kept.add(row)
        if self.padding is not None:
            self.padding = self.padding[rows]

    def fork(self) -> LayerGroup:
        """A copy that changes independently; blocks are shared until one of the two writes to them."""
        self.flush()
        twin = LayerGroup(self.settings, self.layers, self.share, self.sliding_window)
        twin.record_past = self.record_past
        if self.started:
            _require_rows(len(self.ids), self.pool)
            twin.adopt(self.pool)
            ids = [self.pool.fork(seq_id) for seq_id in self.ids]
            twin.restore(ids, self.complete_length, self.padding)
        return twin

    def used_bytes(self) -> int:
        """Bytes of the blocks that hold tokens, and of the tokens that are kept in float besides."""
        if not self.started:
            return 0
        pool = self.pool
        tokens = (pool.num_blocks - pool.num_free_blocks) * pool.block_size
        return sum(pool.layout.memory(len(pool.seq_lens), tokens=tokens))


def _state_of(x: torch.Tensor) -> tuple[int, ...]:
    """Numbers that are the same as long as a tensor is the same and has the same elements."""
    version = -1 if x.is_inference() else x._version  # a tensor of inference mode does not count its changes
    return id(x), x.data_ptr(), version


def _finish(pool: PagedKVCache | PerHeadKVCache, ids: list[int]) -> None:
    while ids:
        pool.finish_sequence(ids.pop())


def _require_device(k: torch.Tensor, device: int | None, backend: str) -> None:
    """Raise unless a tensor is where the backend of this name, whose storage is on a device, takes it."""
    if not (k.is_cpu or (k.is_cuda and k.get_device() == device)):
        place = "the CPU" if device is None else f"the CPU or cuda:{device}"
        raise ValueError(
            f"key_states: expected tensors on {place} for the {backend} backend; got {k.device}. "
            f"Use transformers.DynamicCache there, or move the model"
        )


def _require_rows(more: int, pool: PagedKVCache | PerHeadKVCache) -> None:
    """Raise unless a pool can hold so many sequences more."""
    count = len(pool.seq_lens) + more
    if count > pool.max_num_seqs:
        besides = f", of which each has recent_tokens={pool.layout.recent_tokens} in float"
        raise ValueError(
            f"batch: expected at most {pool.max_num_seqs} sequences in the cache and its copies together"
            f"{besides if pool.layout.recent_tokens else ''}; got {count}"
        )
