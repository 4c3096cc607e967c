"""The paged cache: sequences that take blocks from a pool, share them and give them back."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments, arrays
from kvnumba.attention import passes
from kvnumba.attention.passes import FloatTokens, Pass, as_returned, room_for_results
from kvnumba.backends.protocol import Backend
from kvnumba.backends.registry import get_backend
from kvnumba.blocks.allocator import BlockAllocator
from kvnumba.blocks.integrity import check_pool
from kvnumba.blocks.pool import BlockPool
from kvnumba.blocks.prefix import PrefixIndex
from kvnumba.blocks.stats import CacheStats, collect
from kvnumba.caches import snapshot
from kvnumba.caches.base import Cache
from kvnumba.caches.moving import move_tokens
from kvnumba.caches.step import Step
from kvnumba.caches.swap import SwappedBlocks, fill_blocks, save_blocks
from kvnumba.options import AttentionOptions
from kvnumba.storage import Batch, Layout, LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

logger = logging.getLogger("kvnumba")


class PagedKVCache(Cache):
    """A pool of blocks that sequences take as they grow, share, and give back when they finish.

    After PagedAttention (Kwon et al., 2023) and the block manager of vLLM. Sequences share blocks after `fork`,
    and when `add_sequence` finds their first tokens in blocks of earlier ones; a block that is shared, or that
    may be found, is copied before a sequence writes to it. A sequence may also drop tokens that it no longer needs,
    with `keep`. Calls for different sequences of one cache may come
    from different threads at once; calls for the same sequence may not.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool.
    block_size : int
        Tokens of a block; the cpu backend is at its best from 16 on.
    num_kv_heads, head_dim : int
        H (also accepted as `num_heads`) and D.
    max_num_seqs : int
        Sequences that may be live at the same time.
    dtype, backend, **options
        As in `KVCache`.
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
        """A cache of this layout, on a backend with this name or on this one."""
        cache = cls.__new__(cls)
        cache._start(layout, max_num_seqs, get_backend(backend))
        return cache

    def _start(
        self,
        layout: Layout,
        max_num_seqs: int,
        backend: Backend,
        allocator: Callable[[int, int, PrefixIndex], BlockAllocator] = BlockAllocator,
    ) -> None:
        max_num_seqs = arguments.integer("max_num_seqs", max_num_seqs, minimum=1)
        super().__init__(layout, max_num_seqs, backend)
        self._pool = BlockPool(layout.num_blocks, layout.block_size, max_num_seqs, allocator)
        self._swapped: dict[int, SwappedBlocks] = {}
        self._steps: dict[int, Step] = {}  # passes through `update` that have layers to go

    @property
    def k_pool(self) -> Any:
        """The stored keys, writable: (num_blocks, H, block_size, D), as `KVCache.k_cache`."""
        return self._stored(self._buffers.keys.codes)

    @property
    def v_pool(self) -> Any:
        """The stored values, as `k_pool`."""
        return self._stored(self._buffers.values.codes)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._pool.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._pool.block_size

    @property
    def max_num_seqs(self) -> int:
        """Sequences that may be live at the same time."""
        return self._pool.max_num_seqs

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds; those that a new sequence may still find among them."""
        return self._pool.num_free_blocks

    @property
    def seq_lens(self) -> Mapping[int, int]:
        """Id -> tokens held, of the live sequences: a copy that cannot be changed; `truncate` shortens a sequence."""
        return MappingProxyType(self._pool.live())

    def seq_len(self, seq_id: int) -> int:
        """Tokens that a sequence holds: right after `add_sequence`, what was found of its tokens."""
        return self._pool.length(arguments.integer("seq_id", seq_id, minimum=0), away=True)

    def positions(self, seq_id: int) -> np.ndarray:
        """Where the tokens stand that `get_kv` returns, (T,) int64: 0, 1, ... until `keep` drops some."""
        return self._pool.positions(arguments.integer("seq_id", seq_id, minimum=0))

    def next_position(self, seq_id: int) -> int:
        """Where a sequence's next token will stand: `seq_len` and the tokens that `keep` has dropped."""
        return self._pool.next_position(arguments.integer("seq_id", seq_id, minimum=0))

    def block_table(self, seq_id: int) -> np.ndarray:
        """The block ids of a sequence, in order: (blocks,) int32, a copy; -1 for blocks outside its window."""
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        return self._pool.blocks(seq_id)

    def utilization(self) -> float:
        """Fraction of the blocks that sequences hold, from 0 to 1."""
        return 1 - self.num_free_blocks / self.num_blocks

    def add_sequence(
        self, token_ids: Any = None, *, cache_salt: str = "", window_left: int | None = None
    ) -> int:
        """Begin a sequence, with what is cached of its first tokens.

        Parameters
        ----------
        token_ids : (n,) int, optional
            The sequence's first tokens. The longest run of full blocks that holds the same tokens from the
            first on becomes its beginning; the last token is never among them, so that its logits are computed.
            Blocks are found if the tokens in them were given to `step` or `update`. `seq_len` says how many
            tokens were found.
        cache_salt : str
            Sequences find blocks of the same salt only: one for each tenant keeps them apart.
        window_left : int
            The widest `window_left` with which the sequence will be attended. Blocks before it are given back
            as the sequence grows. -1, the default: it may see everything.

        Returns
        -------
        seq_id : int
            Which no other sequence of this cache ever gets.

        Raises
        ------
        CacheFull
            `max_num_seqs` sequences are live.
        ValueError, TypeError
            An argument is not as above.
        """
        if not isinstance(cache_salt, str):
            raise TypeError(f"cache_salt: expected a str; got {type(cache_salt).__name__}")
        window_left = -1 if window_left is None else arguments.integer("window_left", window_left, minimum=-1)
        if 0 <= window_left < self._layout.recent_tokens - 1:
            raise ValueError(
                f"window_left: expected -1, or at least recent_tokens - 1 = {self._layout.recent_tokens - 1}: a window "
                f"that is all kept in float needs a cache in float16; got {window_left}"
            )
        tokens = None if token_ids is None else arguments.tokens("token_ids", token_ids)
        with self._pool.lock:
            seq_id = self._pool.add(tokens, cache_salt, window_left)
            self._start_recent([seq_id])
        return seq_id

    def _start_recent(self, seq_ids: Iterable[int]) -> None:
        """Sequences begin with tokens that are in the blocks only."""
        if self._recent is not None:
            for seq_id in seq_ids:
                self._recent.start(self._pool.row(seq_id), self._pool.length(seq_id))

    def fork(self, seq_id: int) -> int:
        """Begin a sequence with the same tokens, in the same blocks; returns its id.

        No block is copied until one of the two writes to one that both hold; only tokens that are kept in float besides
        are copied at once. Tokens of a forward pass that is not complete are not part of the new sequence.

        Raises
        ------
        CacheFull
            `max_num_seqs` sequences are live.
        ValueError
            The id is unknown, finished or swapped out.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        with self._pool.lock:
            twin = self._pool.fork(seq_id)
            try:
                self._reorder_recent([twin], [seq_id])
            except BaseException:
                self._pool.finish(twin)
                raise
        return twin

    def reorder(self, seq_ids: Sequence[int], parents: Sequence[int]) -> None:
        """Let each sequence become a fork of one of the parents as these are before the call, for beam search.

        Parameters
        ----------
        seq_ids : sequence of B ints
            Live sequences, each once. What they held is given back.
        parents : sequence of B ints
            Live sequences, of `seq_ids` or others, also several times.

        Raises
        ------
        ValueError
            An id is unknown, finished or swapped out, an id of `seq_ids` comes twice, or the lengths differ.
        """
        with self._pool.lock:
            self._pool.check_reorder(seq_ids, parents)
            self._reorder_recent(seq_ids, parents)
            self._pool.reorder(seq_ids, parents)
        for seq_id, parent in zip(seq_ids, parents, strict=True):
            if seq_id != parent:
                self._steps.pop(int(seq_id), None)

    def _reorder_recent(self, seq_ids: Sequence[int], parents: Sequence[int]) -> None:
        if self._recent is not None:
            self._recent.reorder(self._pool.rows(seq_ids).tolist(), self._pool.rows(parents).tolist())

    def truncate(self, seq_id: int, length: int) -> None:
        """Forget a sequence's tokens from `length` on, as if they had never been written.

        Of what is kept in float besides, the tokens before the latest 16 or more stay: after a larger step back, older
        ones are attended to in the cache's format.

        Rolls back what speculative decoding proposed in vain. Blocks without tokens are given back, also those
        that a dropped step booked; other sequences keep what they share.

        Raises
        ------
        ValueError
            The id is unknown, finished or swapped out, `length` is more than the sequence has, or its window would
            then reach tokens whose blocks were given back: a sequence with a window can always
            return to where its latest step began.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        length = arguments.integer("length", length, minimum=0)
        with self._pool.lock:
            self._pool.truncate(seq_id, length)
            if self._recent is not None:
                self._recent.truncate(self._pool.row(seq_id), length)
        self._steps.pop(seq_id, None)

    def keep(self, seq_id: int, positions: Any) -> None:
        """Drop all tokens of a sequence but those at some positions, and give back the blocks that become free.

        What stays is moved together, bit for bit, in the blocks of this sequence alone: those that others hold or may
        find are copied. `seq_len` counts what stays, and `positions` says where it stood: the next tokens stand where
        they would have stood (`Step.positions`), and windows go by positions; `alibi_slopes`, `score_mod` and
        `mask_mod` are refused from then on. New tokens are not found by `add_sequence` any more, and what was kept in
        float besides is attended to in the cache's format. A later `truncate` counts tokens that are held; the next
        token then stands where the first of those forgotten stood.

        Parameters
        ----------
        seq_id : int
        positions : (n,) int
            In order, each once; all are of tokens that the sequence holds. An empty list drops all, and a list of all
            changes nothing. Tokens of a pass that has layers to go are dropped.

        Raises
        ------
        CacheFull
            There are too few free blocks for what has to be copied; nothing has changed. Blocks that only this sequence
            holds need none.
        ValueError
            Positions are not as above, or the id is unknown, finished or swapped out. The cache is as it was.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        wanted = arguments.integers("positions", positions)
        with self._pool.lock:
            move = functools.partial(move_tokens, self._backend, self._buffers)
            if not self._pool.keep([seq_id], [wanted], move):
                return
            self._start_recent([seq_id])
        self._steps.pop(seq_id, None)

    def finish_sequence(self, seq_id: int) -> None:
        """Give back a sequence's blocks. Full ones whose tokens are known stay to be found, until room is needed.

        Raises
        ------
        ValueError
            The id is unknown or finished already.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        self._pool.finish(seq_id)
        self._steps.pop(seq_id, None)
        self._latest = None
        swapped = self._swapped.pop(seq_id, None)
        if swapped is not None:
            swapped.discard()

    def swap_out(self, seq_id: int, path: str | os.PathLike[str] | None = None) -> None:
        """Move a sequence's blocks to host memory or a memory-mapped file, bit for bit, and give them back.

        What is kept in float besides stays where it is.

        Until `swap_in` the sequence keeps its id and its length, and can only be finished.

        Parameters
        ----------
        seq_id : int
        path : path, optional
            A file to make, which is removed when the sequence is swapped in or finished. Default: memory.

        Raises
        ------
        OSError
            The file exists or cannot be written, or its disk is full. Nothing has changed.
        ValueError
            The id is unknown, finished or swapped out already.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        with self._pool.lock:
            blocks = self._pool.filled_blocks(seq_id)
            where = None if path is None else Path(path)
            self._swapped[seq_id] = save_blocks(self._backend, self._buffers, blocks, where)
            self._pool.swap_out(seq_id)
        self._steps.pop(seq_id, None)
        logger.debug("sequence %d: %d blocks swapped out", seq_id, len(blocks))

    def swap_in(self, seq_id: int) -> None:
        """Bring back a sequence that was swapped out.

        Raises
        ------
        CacheFull
            There are too few free blocks; nothing has changed.
        ValueError
            The id is unknown, finished or not swapped out.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        with self._pool.lock:
            self._pool.row(seq_id, away=seq_id in self._swapped)
            if seq_id not in self._swapped:
                raise ValueError(f"seq_id: sequence {seq_id} is not swapped out")
            swapped = self._swapped[seq_id]
            self._pool.swap_in(
                seq_id, swapped.blocks, lambda into: fill_blocks(self._backend, self._buffers, swapped, into)
            )
            del self._swapped[seq_id]
        swapped.discard()
        logger.debug("sequence %d: %d blocks swapped in", seq_id, len(swapped.blocks))

    def save(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        """Write all sequences and all findable blocks to a file; a block that is shared is written once.

        The file is written beside `path` under another name and takes its place when it is complete and on
        the disk: whatever happens before leaves what was there. Tokens that are kept in float besides are not in the
        file: a cache that loads it has them from its blocks.

        Parameters
        ----------
        path : path
        fingerprint : str
            Says what computed the keys and values: the model's name and revision, say. `load` compares it.

        Raises
        ------
        OSError
            The file cannot be written, or its disk is full.
        ValueError
            A sequence is swapped out.
        """
        identity = snapshot.identity(self._layout, fingerprint)
        snapshot.save(Path(path), self._backend, self._buffers, self._pool, identity)

    def load(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> dict[int, int]:
        """Add the sequences and findable blocks of a file that `save` wrote, all or nothing.

        The number of blocks, of sequences and the backend may differ from those of the cache that was saved.

        Parameters
        ----------
        path : path
        fingerprint : str
            As it was given to `save`.

        Returns
        -------
        dict
            The id of each sequence here, by the id under which it was saved.

        Raises
        ------
        CacheFull
            There are too few free blocks, or too few of `max_num_seqs`.
        ValueError
            The file is not one of `save`, is cut short or damaged, or was made with another version, shape,
            format or fingerprint. The cache is as it was.
        OSError
            The file cannot be read.
        """
        identity = snapshot.identity(self._layout, fingerprint)
        with self._pool.lock:
            ids = snapshot.load(Path(path), self._backend, self._buffers, self._pool, identity)
            self._start_recent(ids.values())
        return ids

    def stats(self) -> CacheStats:
        """Blocks by state, bytes used and wasted, and what the prefix cache found and evicted."""
        return collect(self._pool, self.bytes_per_token())

    def check_integrity(self) -> None:
        """Raise RuntimeError unless reference counts, free blocks, tables and prefixes agree; for tests."""
        check_pool(self._pool)

    def update(self, seq_id: int, new_k: Any, new_v: Any, *, layer: int = 0, token_ids: Any = None) -> None:
        """Append tokens to a sequence.

        Parameters
        ----------
        seq_id : int
        new_k : (H, T, D) float32, float16, float64 or bfloat16
        new_v : (H, T, Dv)
        layer : int
            Layers are written in order; the length moves with the last.
        token_ids : (T,) int, optional
            What the new tokens are, given with layer 0. Once all layers are written, blocks that are full of
            known tokens can be found by `add_sequence`.

        Raises
        ------
        CacheFull
            There are too few free blocks; nothing has changed.
        ValueError, TypeError
            The id is unknown or finished, a shape or dtype is not as above, a quantised format is given a
            value that is not finite, or the layer is not the next one. The cache is as it was.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        k, v = arrays.new_tokens(
            ("new_k", "new_v"),
            new_k,
            new_v,
            (self.num_kv_heads, None),
            "H T D",
            self._layout,
            self._backend,
        )
        layer = arguments.layer_index(layer, self.num_layers)
        count = k.shape[1]
        if layer == 0:
            tokens: list[np.ndarray | None] | None = None
            if token_ids is not None:
                tokens = [arguments.tokens("token_ids", token_ids, count)]
            step = self._new_step([seq_id], self._pool.book_one(seq_id, count, self._copy_blocks), tokens)
        else:
            step = self._running(seq_id, count, layer, token_ids)
        step.write_views(k[None].swapaxes(1, 2), v[None].swapaxes(1, 2), layer)
        if layer < self.num_layers - 1:
            self._steps[seq_id] = step
        else:
            self._steps.pop(seq_id, None)
        self._latest = (self._key(seq_id, int(step.batch.seq_lens[0]), count), step._pass)

    def _running(self, seq_id: int, count: int, layer: int, token_ids: Any) -> Step:
        """The step that `update` is writing, for a later layer."""
        if token_ids is not None:
            raise ValueError(f"token_ids: expected with layer 0, for all layers; got them with layer {layer}")
        self._pool.row(seq_id)
        step = self._steps.get(seq_id)
        if step is None:
            raise ValueError(f"layer: layers are written in order, next is layer 0; got {layer}")
        if count != step.num_tokens:
            raise ValueError(
                f"new_k: expected {step.num_tokens} new tokens, as in layer 0; got {count} in layer {layer}"
            )
        return step

    def _key(self, seq_id: int, length: int, count: int) -> tuple[int, ...]:
        """What the pass of a sequence's last `count` tokens is found by; another one after any change."""
        return (seq_id, self._pool.generation(seq_id), length, count)

    def get_kv(self, seq_id: int, *, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the keys (H, T, D) and values (H, T, Dv) of a sequence, float32.

        Of a sequence with a window, those of the last tokens, whose blocks it still holds.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        layer = arguments.layer_index(layer, self.num_layers)
        first = self._pool.first_position(seq_id)
        length = self._length(seq_id, layer) - first
        table = np.ascontiguousarray(self._pool.blocks(seq_id)[None, first // self.block_size :])
        floats = self._floats(seq_id, layer, self._pool.view(seq_id, first + length, min(1, length)))
        k, v = passes.read(self._backend, self._buffers, layer, table, length, floats, 0, first)
        return k[0], v[0]

    def attend(self, seq_id: int, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]) -> Any:
        """Causal attention of a sequence's newest T tokens, straight out of the storage.

        As `KVCache.attend`, for one sequence; `step` serves many at once.

        Parameters
        ----------
        seq_id : int
        q : (Hq, T, D) float32, float16, float64 or bfloat16
            Hq is a multiple of H, T at most the sequence's length.
        layer : int
            Tokens that `update` wrote to this layer count, whether or not the later layers have them yet.
        **options
            See `AttentionOptions`.

        Returns
        -------
        out : (Hq, T, Dv), in the precision of q (float64: float32)
        lse : (Hq, T) float32
            With ``return_lse``.
        mass : (H, S) float32, or (H, blocks)
            With ``return_mass``.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        layer = arguments.layer_index(layer, self.num_layers)
        shape = (None, None, self.head_dim)
        query = arrays.queries("q", q, shape, "Hq T D", 0, self.num_kv_heads, self._backend)
        count = query.shape[1]
        length = self._length(seq_id, layer)
        if count > length:
            raise ValueError(
                f"q: expected at most as many tokens as the sequence holds, {length}; got shape {query.shape}"
            )
        key, latest = (
            self._key(seq_id, length, count),
            self._latest,
        )  # read once: another thread may replace it
        if latest is None or latest[0] != key:
            batch = self._pool.view(seq_id, length, count)
            widest = self._pool.widest_window([seq_id], batch)
            floats, kept = self._floats(seq_id, layer, batch), self._pool.kept_of([seq_id])
            latest = (
                key,
                Pass(self._backend, self._buffers, batch, widest, floats=floats, kept=kept, written=True),
            )
            self._latest = latest
        out, lse = room_for_results(self._backend, query, self.value_head_dim, options)
        views = (query[None].swapaxes(1, 2), out[None].swapaxes(1, 2), lse[None].swapaxes(1, 2))
        mass = latest[1].attend(layer, *views, options, getattr(q, "dtype", None))
        masses = latest[1].masses(mass, options)
        return as_returned(q, out, lse, None if masses is None else masses[0], options)

    def step(self, seq_ids: Sequence[int], num_new_tokens: Sequence[int], *, token_ids: Any = None) -> Step:
        """Book the blocks of a ragged batch, all or nothing, for a pass through all layers.

        Parameters
        ----------
        seq_ids : sequence of int
            Live sequences, each once.
        num_new_tokens : sequence of int
            What each of them adds: 1 for decoding, more for a prompt or a part of it, 0 for nothing.
        token_ids : sequence of B sequences of int, optional
            What the new tokens are, or None for a sequence of which it is not known. Once all layers are
            written, blocks that are full of known tokens can be found by `add_sequence`.

        Returns
        -------
        Step
            Whose `write` and `attend` take packed tokens.

        Raises
        ------
        CacheFull
            There are too few free blocks; nothing has changed.
        ValueError
            An id is unknown, finished or given twice, or a count is negative.
        """
        tokens = None if token_ids is None else _checked_tokens(token_ids, num_new_tokens)
        return self._new_step(*self._book(seq_ids, num_new_tokens), tokens)

    def _book(self, seq_ids: Sequence[int], num_new_tokens: Sequence[int]) -> tuple[list[int], Batch]:
        """Check and book a batch: the ids, and the batch."""
        try:
            one = len(seq_ids) == len(num_new_tokens) == 1
        except TypeError:
            one = False  # the pool says what is wrong with them
        if one:
            seq_id = arguments.integer("seq_id", seq_ids[0], minimum=0)
            count = arguments.integer("num_new_tokens", num_new_tokens[0], minimum=0)
            return [seq_id], self._pool.book_one(seq_id, count, self._copy_blocks)
        batch = self._pool.book(seq_ids, num_new_tokens, self._copy_blocks)
        return np.asarray(seq_ids).tolist(), batch

    def _new_step(self, seq_ids: list[int], batch: Batch, tokens: list[np.ndarray | None] | None) -> Step:
        return Step(self._backend, self._buffers, self._pool, self._recent, seq_ids, batch, tokens)

    def _copy_blocks(self, pairs: np.ndarray) -> None:
        self._backend.copy_blocks(self._buffers, pairs)

    def __repr__(self) -> str:
        used = self.num_blocks - self.num_free_blocks
        return (
            f"PagedKVCache(blocks={used}/{self.num_blocks}, block_size={self.block_size}, "
            f"sequences={len(self.seq_lens)}/{self.max_num_seqs}, {self._describe()})"
        )

    def _length(self, seq_id: int, layer: int) -> int:
        """Tokens of a sequence that a layer holds, those of a pass that has layers to go included."""
        step = self._current(seq_id, layer)
        return self._pool.length(seq_id) if step is None else int(step.batch.seq_lens[0])

    def _current(self, seq_id: int, layer: int) -> Step | None:
        """The step that `update` is writing, if a layer has its tokens."""
        self._pool.row(seq_id)
        step = self._steps.get(seq_id)
        return step if step is not None and step.covers(layer) and step.is_latest() else None

    def _floats(self, seq_id: int, layer: int, batch: Batch) -> FloatTokens | None:
        """What the last tokens of a sequence, as a layer holds it, attend to in float."""
        if self._recent is None:
            return None
        step = self._current(seq_id, layer)
        if step is not None and step._pass.floats is not None:
            return step._pass.floats.seen_by(batch)
        with self._pool.lock:
            return self._recent.view(self._pool.rows([seq_id]), batch)


def _checked_tokens(token_ids: Any, num_new_tokens: Any) -> list[np.ndarray | None]:
    """The tokens of each sequence, as many as it adds, or None."""
    counts = arguments.integers("num_new_tokens", num_new_tokens).tolist()
    given = list(token_ids)
    if len(given) != len(counts):
        raise ValueError(f"token_ids: expected {len(counts)} sequences of tokens, or None; got {len(given)}")
    return [
        None if tokens is None else arguments.tokens("token_ids", tokens, count)
        for tokens, count in zip(given, counts, strict=True)
    ]
