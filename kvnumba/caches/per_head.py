"""A paged cache in which every KV head of every layer has its own tokens, and its own blocks.

Its pool has blocks of one head, and each head of each layer of a sequence is a sequence of that pool: sequence s has
number ``s * layers * heads`` and those that follow, layer by layer. So T new tokens of H heads are T * H tokens of one
head, and what serves every cache, kernels included, serves here too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments, arrays
from kvnumba.attention import passes
from kvnumba.attention.passes import as_returned
from kvnumba.backends.protocol import Backend
from kvnumba.backends.registry import get_backend
from kvnumba.blocks.integrity import check_pool
from kvnumba.blocks.pool import BlockPool
from kvnumba.blocks.stats import CacheStats, collect
from kvnumba.caches import snapshot
from kvnumba.caches.base import Cache
from kvnumba.caches.moving import move_tokens
from kvnumba.caches.per_head_step import PerHeadStep
from kvnumba.options import AttentionOptions
from kvnumba.storage import Layout, LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PerHeadKVCache(Cache):
    """A `PagedKVCache` in which each KV head of each layer may drop other tokens than the others.

    A head that keeps a quarter of its tokens takes a quarter of the memory, and little more of the time. New tokens
    come to all heads. Arrays are in host memory; there are no prefixes to be found, no windows that give blocks back,
    and nothing is kept in float besides.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool, each of one head of one layer: as many for a token as layers times heads.
    block_size, num_kv_heads, head_dim, max_num_seqs, dtype, backend, **options
        As in `PagedKVCache`.
    """

    @arguments.also_called(num_heads="num_kv_heads")
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        max_num_seqs: int,
        dtype: Any = np.float32,
        *,
        backend: str | None = None,
        **options: Unpack[LayoutOptions],
    ) -> None:
        layout = Layout.of(num_blocks, block_size, num_kv_heads, head_dim, dtype, **options)
        self._start(layout, max_num_seqs, get_backend(backend))

    @classmethod
    def from_layout(cls, layout: Layout, max_num_seqs: int, *, backend: str | Backend | None = None) -> Self:
        """A cache of this layout, whose `num_blocks` are of one head, on a backend with this name or on this one."""
        cache = cls.__new__(cls)
        cache._start(layout, max_num_seqs, get_backend(backend))
        return cache

    def _start(self, whole: Layout, max_num_seqs: int, backend: Backend) -> None:
        check_options(whole.recent_tokens, None if whole.transform is None else whole.transform.calibration)
        max_num_seqs = arguments.integer("max_num_seqs", max_num_seqs, minimum=1)
        self._whole = whole
        self._each = whole.num_layers * whole.num_kv_heads  # heads of all layers
        layout = replace(whole, num_layers=1, num_kv_heads=1)
        super().__init__(layout, max_num_seqs * self._each, backend)
        self._pool = BlockPool(layout.num_blocks, layout.block_size, self._max_num_seqs, rows_each=self._each)
        self._steps: dict[int, PerHeadStep] = {}  # the latest pass of `update` of each sequence

    @property
    def num_layers(self) -> int:
        """Layers that the cache holds."""
        return self._whole.num_layers

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads (H)."""
        return self._whole.num_kv_heads

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, each of one head of one layer."""
        return self._pool.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._pool.block_size

    @property
    def max_num_seqs(self) -> int:
        """Sequences that may be live at the same time."""
        return self._max_num_seqs // self._each

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no head holds."""
        return self._pool.num_free_blocks

    def bytes_per_token(self) -> int:
        """Bytes of one token that all heads of all layers hold, scales and zeros included."""
        return self._whole.bytes_per_token()

    @property
    def seq_lens(self) -> Mapping[int, int]:
        """Id -> tokens that the sequence has had, of the live sequences."""
        ids = [seq_id // self._each for seq_id in self._pool.live() if seq_id % self._each == 0]
        return MappingProxyType({seq_id: self.seq_len(seq_id) for seq_id in ids})

    def seq_len(self, seq_id: int) -> int:
        """Tokens that a sequence has had, those that heads have dropped included: where its next one will stand."""
        return self._pool.next_position(int(self._heads(seq_id)[0, 0]))

    def head_lens(self, seq_id: int) -> np.ndarray:
        """Tokens that each head of a sequence holds: (num_layers, H) int32."""
        return self._pool.lens[self._pool.rows(self._heads(seq_id).ravel())].reshape(
            self.num_layers, self.num_kv_heads
        )

    def positions(self, seq_id: int, *, layer: int = 0) -> list[np.ndarray]:
        """Where the tokens stand that each head of a layer holds: H arrays (tokens,) int64."""
        layer = arguments.layer_index(layer, self.num_layers)
        return [self._pool.positions(head) for head in self._heads(seq_id)[layer].tolist()]

    def _heads(self, seq_id: int) -> np.ndarray:
        """The pool's sequences that are the heads of one of ours: (num_layers, H); raises if it is not live."""
        first = arguments.integer("seq_id", seq_id, minimum=0) * self._each
        self._pool.row(first)
        return np.arange(first, first + self._each).reshape(self.num_layers, self.num_kv_heads)

    def add_sequence(self) -> int:
        """Begin a sequence; returns its id, which no other sequence of this cache ever gets.

        Raises
        ------
        CacheFull
            `max_num_seqs` sequences are live.
        """
        with self._pool.lock:
            first, *_ = [self._pool.add() for _ in range(self._each)]
        return first // self._each

    def fork(self, seq_id: int) -> int:
        """Begin a sequence with the same tokens, in the same blocks; as `PagedKVCache.fork`."""
        with self._pool.lock:
            first, *_ = [self._pool.fork(head) for head in self._heads(seq_id).ravel().tolist()]
        return first // self._each

    def reorder(self, seq_ids: Sequence[int], parents: Sequence[int]) -> None:
        """Let each sequence become a fork of one of the parents; as `PagedKVCache.reorder`."""
        ids = arguments.integers("seq_ids", seq_ids).tolist()
        sources = arguments.integers("parents", parents, length=len(ids)).tolist()
        if len(set(ids)) != len(ids):
            raise ValueError(f"seq_ids: expected each sequence once; got {list(seq_ids)}")
        with self._pool.lock:
            self._pool.reorder(self._of_layers(ids).ravel(), self._of_layers(sources).ravel())
        for seq_id, parent in zip(ids, sources, strict=True):
            if seq_id != parent:
                self._steps.pop(seq_id, None)

    def truncate(self, seq_id: int, length: int) -> None:
        """Forget the tokens of a sequence that stand at `length` or later, in all heads.

        Raises
        ------
        ValueError
            The id is unknown or finished, or `length` is more than `seq_len`.
        """
        length = arguments.integer("length", length, minimum=0)
        with self._pool.lock:
            heads, had = self._heads(seq_id).ravel().tolist(), self.seq_len(seq_id)
            if length > had:
                raise ValueError(f"length: expected at most the sequence's {had} tokens; got {length}")
            for head in heads:
                self._pool.truncate(head, self._pool.tokens_before(head, length), length)
        self._steps.pop(seq_id, None)

    def keep(self, seq_id: int, positions: Any, *, layer: int | None = None) -> None:
        """Drop all tokens of each head but those at some positions, and give back the blocks that become free.

        As `PagedKVCache.keep`, all heads or none.

        Parameters
        ----------
        seq_id : int
        positions : sequence of H sequences of int, or a mapping of layers to such
            Those of each head: in order, each once, and all of tokens that the head holds. Layers that a mapping does
            not name keep all.
        layer : int, optional
            Where `positions` is no mapping. Default: the same in all layers.

        Raises
        ------
        CacheFull
            There are too few free blocks for what has to be copied; nothing has changed.
        ValueError
            Positions are not as above, or the id is unknown or finished. The cache is as it was.
        """
        if not isinstance(positions, Mapping):
            layers = range(self.num_layers) if layer is None else [layer]
            wanted = dict.fromkeys(layers, self._of_heads("positions", positions))
        elif layer is None:
            wanted = {n: self._of_heads(f"positions[{n}]", some) for n, some in positions.items()}
        else:
            raise ValueError(f"layer: expected None with positions of layers; got {layer}")
        layers = [arguments.layer_index(n, self.num_layers) for n in wanted]
        with self._pool.lock:
            heads = self._heads(seq_id)[layers].ravel().tolist()
            move = functools.partial(move_tokens, self._backend, self._buffers)
            if not self._pool.keep(heads, [at for of_heads in wanted.values() for at in of_heads], move):
                return
        self._steps.pop(seq_id, None)

    def _of_heads(self, argument: str, positions: Any) -> list[np.ndarray]:
        """Checked positions of each head of a layer."""
        count = len(positions) if hasattr(positions, "__len__") else None
        if count != self.num_kv_heads:
            raise ValueError(
                f"{argument}: expected {self.num_kv_heads} lists, one for each KV head; "
                f"got {type(positions).__name__ if count is None else count}"
            )
        return [arguments.integers(f"{argument}[{n}]", some) for n, some in enumerate(positions)]

    def finish_sequence(self, seq_id: int) -> None:
        """Give back a sequence's blocks.

        Raises
        ------
        ValueError
            The id is unknown or finished already.
        """
        with self._pool.lock:
            for head in self._heads(seq_id).ravel().tolist():
                self._pool.finish(head)
        self._steps.pop(seq_id, None)

    def step(self, seq_ids: Sequence[int], num_new_tokens: Sequence[int]) -> PerHeadStep:
        """Book the blocks of a ragged batch for all heads and layers, all or nothing; as `PagedKVCache.step`."""
        ids = arguments.integers("seq_ids", seq_ids)
        new = arguments.integers("num_new_tokens", num_new_tokens, length=len(ids))
        if len(set(ids.tolist())) != len(ids):
            raise ValueError(f"seq_ids: expected each sequence once; got {list(seq_ids)}")
        with self._pool.lock:
            heads = self._of_layers(ids.tolist())
            batch = self._pool.book(
                heads.ravel(), np.tile(np.repeat(new, self.num_kv_heads), self.num_layers), self._copy_blocks
            )
            return self._step(ids.tolist(), heads, batch, new)

    def _of_layers(self, seq_ids: list[int]) -> np.ndarray:
        """The pool's sequences that are the heads of some of ours: (num_layers, B * H), sequence by sequence."""
        heads = [self._heads(seq_id) for seq_id in seq_ids]
        return np.concatenate([np.empty((self.num_layers, 0), np.int64), *heads], axis=1)

    def _copy_blocks(self, pairs: np.ndarray) -> None:
        self._backend.copy_blocks(self._buffers, pairs)

    def update(self, seq_id: int, new_k: Any, new_v: Any, *, layer: int = 0) -> None:
        """Append tokens (H, T, D) and (H, T, Dv) to all heads of a sequence; as `PagedKVCache.update`."""
        shape = (self.num_kv_heads, None)
        k, v = arrays.new_tokens(("new_k", "new_v"), new_k, new_v, shape, "H T D", self._whole, self._backend)
        arrays.require_host("new_k", k)
        layer = arguments.layer_index(layer, self.num_layers)
        count = k.shape[1]
        if layer == 0:
            step = self.step([seq_id], [count])
        else:
            self._heads(seq_id)
            running = self._steps.get(seq_id)
            if running is None:
                raise ValueError(f"layer: layers are written in order, next is layer 0; got {layer}")
            if count != running.num_tokens:
                raise ValueError(
                    f"new_k: expected {running.num_tokens} new tokens, as in layer 0; got {count} in layer {layer}"
                )
            step = running
        step.write(k.swapaxes(0, 1), v.swapaxes(0, 1), layer=layer)
        self._steps[seq_id] = step

    def attend(self, seq_id: int, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]) -> Any:
        """Causal attention of a sequence's newest T tokens, q (Hq, T, D), which all heads of the layer must hold.

        As `PagedKVCache.attend`; `step` serves many sequences at once. While `update` has layers to go, q are those of
        all its tokens. The mass is a list of H arrays, as a sequence's is in `PerHeadStep.attend`.
        """
        layer = arguments.layer_index(layer, self.num_layers)
        heads = self._heads(seq_id)
        query = arrays.queries(
            "q", q, (None, None, self.head_dim), "Hq T D", 0, self.num_kv_heads, self._backend
        )
        count = query.shape[1]
        step = self._steps.get(seq_id)
        if step is None or not step.is_latest() or not step.covers(layer):
            step = self._view(seq_id, heads, layer, count)
        elif step.num_tokens != count:
            if not step.complete:
                raise ValueError(
                    f"q: expected queries of the {step.num_tokens} tokens that `update` writes; got {count} of them"
                )
            step = self._view(seq_id, heads, layer, count)
        out, lse, masses = step._attend(query.swapaxes(0, 1), layer, options)
        mass = None if masses is None else masses[0]
        return as_returned(q, out.swapaxes(0, 1), lse.swapaxes(0, 1), mass, options)

    def _view(self, seq_id: int, heads: np.ndarray, layer: int, count: int) -> PerHeadStep:
        """A pass of tokens that all layers hold."""
        with self._pool.lock:
            length = self.seq_len(seq_id)
            held = [len(self._pool.positions(head)) for head in heads[layer].tolist()]
            newest = [self._pool.tokens_before(head, length - count) for head in heads[layer].tolist()]
            if count > length or any(n - first != count for n, first in zip(held, newest, strict=True)):
                raise ValueError(
                    f"q: expected queries of newest tokens that all heads hold; got {count} of them"
                )
            batch = self._pool.views(heads.ravel(), count)
            return self._step([seq_id], heads, batch, np.array([count]), written=True)

    def _step(self, *booked: Any, written: bool = False) -> PerHeadStep:
        return PerHeadStep(self._backend, self._buffers, self._pool, self._whole, *booked, written=written)

    def get_kv(self, seq_id: int, *, layer: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Copies of the keys (tokens, D) and values (tokens, Dv) that each of the H heads holds, float32.

        Tokens count from when their last layer is written.
        """
        layer = arguments.layer_index(layer, self.num_layers)
        found = []
        for head in self._heads(seq_id)[layer].tolist():
            table, length = self._pool.blocks(head)[None], self._pool.length(head)
            k, v = passes.read(self._backend, self._buffers, 0, table, length)
            found.append((k[0, 0], v[0, 0]))
        return found

    def save(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        """Write all sequences to a file; as `PagedKVCache.save`."""
        snapshot.save(Path(path), self._backend, self._buffers, self._pool, self._identity(fingerprint))

    def load(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> dict[int, int]:
        """Add the sequences of a file that `save` wrote, all or nothing; as `PagedKVCache.load`."""
        identity = self._identity(fingerprint)
        with self._pool.lock:
            ids = snapshot.load(Path(path), self._backend, self._buffers, self._pool, identity)
        each = self._each
        return {old // each: new // each for old, new in ids.items() if old % each == 0}

    def _identity(self, fingerprint: str) -> dict[str, Any]:
        return snapshot.identity(self._whole, fingerprint, per_head=True)

    def stats(self) -> CacheStats:
        """As `PagedKVCache.stats`; `num_tokens` counts a token once for each head of each layer that holds it."""
        stats = collect(self._pool, self._layout.bytes_per_token())
        return replace(stats, num_sequences=stats.num_sequences // self._each)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the parts of the pool agree, and the heads of each sequence; for tests."""
        check_pool(self._pool)
        ids = list(self._pool.live())
        if ids != [head for seq_id in self.seq_lens for head in self._heads(seq_id).ravel().tolist()]:
            raise RuntimeError("a sequence is without some of its heads")
        for seq_id, length in self.seq_lens.items():
            if any(self._pool.next_position(head) != length for head in self._heads(seq_id).ravel().tolist()):
                raise RuntimeError(f"sequence {seq_id}: its heads are not as far as each other")

    def __repr__(self) -> str:
        used = self.num_blocks - self.num_free_blocks
        return (
            f"PerHeadKVCache(blocks={used}/{self.num_blocks}, block_size={self.block_size}, "
            f"sequences={len(self.seq_lens)}/{self.max_num_seqs}, layers={self.num_layers}, H={self.num_kv_heads}, "
            f"of one head: {self._describe()})"
        )


def check_options(recent_tokens: int, calibration: Any) -> None:
    """Raise for options of a layout that concern all heads together."""
    if recent_tokens:
        raise ValueError(f"recent_tokens: expected 0 with blocks of one head; got {recent_tokens}")
    if calibration is not None:
        raise ValueError("calibration: expected None with blocks of one head, it is one of all heads")
