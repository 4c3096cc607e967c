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
from kvnumba.attention.passes import Pass, as_returned
from kvnumba.backends.protocol import Backend
from kvnumba.backends.registry import get_backend
from kvnumba.blocks.integrity import check_pool
from kvnumba.blocks.pool import BlockPool
from kvnumba.blocks.stats import CacheStats, collect
from kvnumba.caches import snapshot
from kvnumba.caches.base import Cache
from kvnumba.caches.moving import move_tokens
from kvnumba.options import AttentionOptions, Scoring, scoring_of
from kvnumba.storage import Batch, Layout, LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PerHeadKVCache(Cache):
    """A `PagedKVCache` in which each KV head of each layer may drop other tokens than the others.

    A head that keeps a quarter of its tokens takes a quarter of the memory, and of the time of attention. New tokens
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
            return PerHeadStep(self, ids.tolist(), heads, batch, new)

    def _of_layers(self, seq_ids: list[int]) -> np.ndarray:
        """The pool's sequences that are the heads of some of ours: (num_layers, B * H), sequence by sequence."""
        heads = [self._heads(seq_id) for seq_id in seq_ids]
        return np.concatenate([np.empty((self.num_layers, 0), np.int64), *heads], axis=1)

    def _copy_blocks(self, pairs: np.ndarray) -> None:
        self._backend.copy_blocks(self._buffers, pairs)

    def update(self, seq_id: int, new_k: Any, new_v: Any, *, layer: int = 0) -> None:
        """Append tokens (H, T, D) and (H, T, Dv) to all heads of a sequence; as `PagedKVCache.update`."""
        k, v = self._new_tokens(("new_k", "new_v"), new_k, new_v, (self.num_kv_heads, None), "H T D")
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

        As `PagedKVCache.attend`; `step` serves many sequences at once. The mass is a list of H arrays, as a sequence's
        is in `PerHeadStep.attend`.
        """
        layer = arguments.layer_index(layer, self.num_layers)
        heads = self._heads(seq_id)
        query = arrays.queries(
            "q", q, (None, None, self.head_dim), "Hq T D", 0, self.num_kv_heads, self._backend
        )
        count = query.shape[1]
        step = self._steps.get(seq_id)
        if step is None or not step.is_latest() or step.num_tokens != count or not step.covers(layer):
            step = self._view(seq_id, heads, layer, count)
        out, lse, masses = step._attend(query.swapaxes(0, 1), layer, options)
        mass = None if masses is None else masses[0]
        return as_returned(q, out.swapaxes(0, 1), lse.swapaxes(0, 1), mass, options)

    def _view(self, seq_id: int, heads: np.ndarray, layer: int, count: int) -> PerHeadStep:
        """A pass of tokens that all layers hold."""
        length = self.seq_len(seq_id)
        held = [len(self._pool.positions(head)) for head in heads[layer].tolist()]
        newest = [self._pool.tokens_before(head, length - count) for head in heads[layer].tolist()]
        if count > length or any(n - first != count for n, first in zip(held, newest, strict=True)):
            raise ValueError(f"q: expected queries of newest tokens that all heads hold; got {count} of them")
        batch = self._pool.views(heads.ravel(), count)
        return PerHeadStep(self, [seq_id], heads, batch, np.array([count]), written=True)

    def get_kv(self, seq_id: int, *, layer: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Copies of the keys (tokens, D) and values (tokens, Dv) that each of the H heads holds, float32."""
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

    def _new_tokens(
        self, names: tuple[str, str], k: Any, v: Any, shape: tuple[int | None, ...], axes: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Checked new tokens, in host memory."""
        k, v = arrays.new_tokens(names, k, v, shape, axes, self._whole, self._backend)
        _require_host(names[0], k)
        return k, v

    def __repr__(self) -> str:
        used = self.num_blocks - self.num_free_blocks
        return (
            f"PerHeadKVCache(blocks={used}/{self.num_blocks}, block_size={self.block_size}, "
            f"sequences={len(self.seq_lens)}/{self.max_num_seqs}, layers={self.num_layers}, H={self.num_kv_heads}, "
            f"of one head: {self._describe()})"
        )


class PerHeadStep:
    """The new tokens of a ragged batch of sequences of a `PerHeadKVCache`, packed; used as `Step`.

    Attributes
    ----------
    seq_ids : list of int
    num_new_tokens : list of int
        Of each sequence.
    positions : (T,) int32
        Where each new token stands in its sequence, what heads have dropped included.
    """

    def __init__(
        self,
        cache: PerHeadKVCache,
        seq_ids: list[int],
        heads: np.ndarray,
        batch: Batch,
        new: np.ndarray,
        *,
        written: bool = False,
    ) -> None:
        self.seq_ids = seq_ids
        self.num_new_tokens: list[int] = new.tolist()
        self._cache, self._pool, self._batch = cache, cache._pool, batch
        self._heads = heads  # (num_layers, B * H)
        first = np.array(
            [self._pool.next_position(head) for head in heads[0, :: cache.num_kv_heads].tolist()], np.int64
        )
        begin = np.cumsum(new) - new
        turn = np.arange(int(new.sum())) - np.repeat(begin, new)
        self.positions = (np.repeat(first - new * written, new) + turn).astype(np.int32)
        self._order = None if (new <= 1).all() else _order(new, begin, cache.num_kv_heads)
        self._generations = self._pool.generations(heads.ravel().tolist())
        self._version = self._pool.version
        each = heads.shape[1]
        self._kept = kept = self._pool.kept_of(heads.ravel())
        self._passes = []
        for layer in range(len(heads)):
            rows = slice(layer * each, (layer + 1) * each)
            self._passes.append(
                Pass(
                    cache._backend,
                    cache._buffers,
                    _rows(batch, rows),
                    kept=None if kept is None else kept[rows],
                    written=written,
                )
            )

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences together (T)."""
        return len(self.positions)

    def covers(self, layer: int) -> bool:
        """Whether the new tokens of a layer have been written."""
        return self._passes[layer].complete

    def is_latest(self) -> bool:
        """Whether none of the sequences was changed by anything else since; raises if one is finished."""
        version = self._pool.version
        if version != self._version:
            if self._pool.generations(self._heads.ravel().tolist()) != self._generations:
                return False
            self._version = version
        return True

    def _require_latest(self) -> None:
        if not self.is_latest():
            raise ValueError("step: its sequences have moved on since it was made; make a new one")

    def write(self, k: Any, v: Any, *, layer: int = 0) -> None:
        """Store the keys (T, H, D) and values (T, H, Dv) of a layer; as `Step.write`."""
        cache = self._cache
        k, v = cache._new_tokens(("k", "v"), k, v, (self.num_tokens, cache.num_kv_heads), "T H D")
        layer = arguments.layer_index(layer, cache.num_layers)
        due = next((n for n, each in enumerate(self._passes) if not each.complete), None)
        if layer != due:
            expected = "none, the pass is complete" if due is None else f"layer {due}"
            raise ValueError(f"layer: layers are written in order, next is {expected}; got {layer}")
        self._require_latest()
        self._passes[layer].write(0, self._by_head(k, 1), self._by_head(v, 1))
        if layer == cache.num_layers - 1:
            self._pool.commit(self._heads.ravel(), self._batch)

    def attend(self, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]) -> Any:
        """Causal attention of the new tokens, q (T, Hq, D), each head over its own tokens; as `Step.attend`.

        Windows go by positions; `alibi_slopes`, `score_mod` and `mask_mod` are refused. With `return_mass`, of each
        sequence a list of H arrays (tokens,) float32, or (blocks,): of the tokens that each head holds, new ones
        included, in the order of `PerHeadKVCache.positions`.
        """
        return as_returned(q, *self._attend(q, layer, options), options)

    def _attend(
        self, q: Any, layer: int, options: AttentionOptions
    ) -> tuple[np.ndarray, np.ndarray, list[list[np.ndarray]] | None]:
        """Outputs (T, Hq, Dv) and lse (T, Hq) float32, and masses where they are asked for."""
        cache = self._cache
        layer = arguments.layer_index(layer, cache.num_layers)
        shape = (self.num_tokens, None, cache.head_dim)
        query = arrays.queries("q", q, shape, "T Hq D", 1, cache.num_kv_heads, cache._backend)
        _require_host("q", query)
        if not self.covers(layer):
            raise ValueError(f"layer: the new tokens of layer {layer} have not been written yet")
        self._require_latest()
        num_qo_heads = query.shape[1]
        group = num_qo_heads // cache.num_kv_heads
        scoring = scoring_of(options, num_qo_heads, cache.head_dim)
        if scoring.of_positions is not None:
            raise ValueError(f"{scoring.of_positions}: expected None, heads have dropped different tokens")
        dtype = getattr(q, "dtype", None)
        if scoring.sinks is not None and options.get("return_mass"):
            return self._attend_head_by_head(layer, query, scoring, options, dtype)
        rows = self._by_head(query, group)
        out = np.empty((*rows.shape[:-1], cache.value_head_dim), np.float32)
        lse = np.empty(rows.shape[:-1], np.float32)
        # each query head has its own sink, and is the same head of a KV head of its own here: sinks come afterwards
        alone: AttentionOptions = {
            "scoring": scoring if scoring.sinks is None else replace(scoring, sinks=None),
            "return_mass": options.get("return_mass"),
        }
        running = self._passes[layer]
        masses = running.masses(running.attend(0, rows, out, lse, alone, dtype), alone)
        out, lse = self._by_token(out[0], num_qo_heads), self._by_token(lse[0], num_qo_heads)
        if scoring.sinks is not None:
            all_of_it = np.logaddexp(lse, scoring.sinks)
            out *= np.exp(lse - all_of_it)[..., None]
            lse = all_of_it
        if masses is None:
            return out, lse, None
        of_heads = [mass[0] for mass in masses]
        size = cache.num_kv_heads
        return out, lse, [of_heads[first : first + size] for first in range(0, len(of_heads), size)]

    def _attend_head_by_head(
        self, layer: int, query: np.ndarray, scoring: Scoring, options: AttentionOptions, dtype: Any
    ) -> tuple[np.ndarray, np.ndarray, list[list[np.ndarray]]]:
        """`_attend` for masses of queries (T, Hq, D) with sinks, which these cannot be given afterwards."""
        cache, batch = self._cache, self._passes[layer].batch
        num_tokens, num_qo_heads, _ = query.shape
        num_heads, each = cache.num_kv_heads, len(batch.seq_lens)
        group = num_qo_heads // num_heads
        out = np.empty((num_heads, 1, num_tokens, group, cache.value_head_dim), np.float32)
        lse = np.empty((num_heads, 1, num_tokens, group), np.float32)
        of_heads = []
        for head in range(num_heads):
            rows, heads = np.arange(head, each, num_heads), slice(head * group, (head + 1) * group)
            new = np.diff(batch.query_start_loc)[rows]
            of_head = Pass(
                cache._backend,
                cache._buffers,
                Batch.of(batch.block_table[rows], batch.seq_lens[rows], new, batch.block_size),
                kept=None if self._kept is None else [self._kept[layer * each + row] for row in rows],
                written=True,
            )
            alone: AttentionOptions = {
                "scoring": replace(scoring, sinks=scoring.sinks[heads]),
                "return_mass": options.get("return_mass"),
            }
            mass = of_head.attend(0, query[None, :, heads], out[head], lse[head], alone, dtype)
            of_heads.append([x[0] for x in of_head.masses(mass, alone) or []])
        results = (x[:, 0].swapaxes(0, 1).reshape(num_tokens, num_qo_heads, *x.shape[4:]) for x in (out, lse))
        return *results, [*map(list, zip(*of_heads, strict=True))]

    def _by_head(self, x: np.ndarray, group: int) -> np.ndarray:
        """Packed (T, H * group, D) as tokens of one KV head: a view (1, T * H, group, D)."""
        rows = np.ascontiguousarray(x).reshape(-1, group, x.shape[-1])
        return (rows if self._order is None else rows[self._order])[None]

    def _by_token(self, x: np.ndarray, num_qo_heads: int) -> np.ndarray:
        """The inverse of `_by_head`: (T * H, group, ...) as (T, Hq, ...)."""
        if self._order is not None:
            rows = np.empty_like(x)
            rows[self._order] = x
            x = rows
        return x.reshape(self.num_tokens, num_qo_heads, *x.shape[2:])

    def __repr__(self) -> str:
        written = sum(each.complete for each in self._passes)
        return (
            f"PerHeadStep(sequences={len(self.seq_ids)}, new_tokens={self.num_tokens}, "
            f"layers_written={written}/{len(self._passes)})"
        )


def check_options(recent_tokens: int, calibration: Any) -> None:
    """Raise for options of a layout that concern all heads together."""
    if recent_tokens:
        raise ValueError(f"recent_tokens: expected 0 with blocks of one head; got {recent_tokens}")
    if calibration is not None:
        raise ValueError("calibration: expected None with blocks of one head, it is one of all heads")


def _order(new: np.ndarray, begin: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """Which of the T * H rows, token by token, comes where if they are sorted by sequence, head and token."""
    heads = np.arange(num_kv_heads)[:, None]
    pairs = zip(begin.tolist(), new.tolist(), strict=True)
    return np.concatenate(
        [(np.arange(first, first + n) * num_kv_heads + heads).ravel() for first, n in pairs]
    )


def _rows(batch: Batch, rows: slice) -> Batch:
    """Some sequences of a batch, with their own new tokens."""
    start = batch.query_start_loc[rows.start : rows.stop + 1]
    return Batch(
        batch.block_table[rows],
        batch.seq_lens[rows],
        start - start[0],
        batch.block_size,
        batch.positions[rows],
        kept={"slot_mapping": batch.slot_mapping[start[0] : start[-1]]},
    )


def _require_host(argument: str, x: Any) -> None:
    if isinstance(x, arrays.DeviceView):
        raise TypeError(f"{argument}: expected an array in host memory; got one on a GPU")
