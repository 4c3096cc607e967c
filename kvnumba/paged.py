"""The paged cache: sequences that take blocks from a pool, share them and give them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments
from kvnumba.arguments import AttentionOptions
from kvnumba.blocks import BlockPool
from kvnumba.cache import Cache
from kvnumba.step import BatchAttention, Step

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PagedKVCache(Cache):
    """A pool of blocks that sequences take as they grow and give back when they finish.

    After PagedAttention (Kwon et al., 2023). Calls for different sequences of one cache may come from
    different threads at once; calls for the same sequence may not.

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
    dtype, key_format, value_format, group_size, num_layers, backend
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
        key_format: Any = None,
        value_format: Any = None,
        group_size: int | None = None,
        num_layers: int = 1,
        backend: str | None = None,
    ) -> None:
        num_blocks = arguments.integer("num_blocks", num_blocks, minimum=1)
        block_size = arguments.integer("block_size", block_size, minimum=1)
        max_num_seqs = arguments.integer("max_num_seqs", max_num_seqs, minimum=1)
        super().__init__(
            num_blocks,
            block_size,
            num_kv_heads,
            head_dim,
            dtype,
            key_format,
            value_format,
            group_size,
            num_layers,
            backend,
        )
        self._pool = BlockPool(num_blocks, block_size, max_num_seqs)
        self._steps: dict[int, Step] = {}  # forward passes through `update` that have layers to go
        self._attention: tuple[tuple[int, ...], BatchAttention] | None = None

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
        """Blocks that no sequence holds."""
        return self._pool.num_free_blocks

    @property
    def seq_lens(self) -> dict[int, int]:
        """Id -> tokens held, of the live sequences; a copy."""
        return self._pool.live()

    def block_table(self, seq_id: int) -> np.ndarray:
        """The block ids of a sequence, in order: (blocks,) int32, a copy."""
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        return self._pool.blocks(seq_id)

    def utilization(self) -> float:
        """Fraction of the blocks that sequences hold."""
        return 1 - self.num_free_blocks / self.num_blocks

    def add_sequence(self) -> int:
        """Begin an empty sequence; returns its id, which no other sequence of this cache ever gets.

        Raises
        ------
        CacheFull
            `max_num_seqs` sequences are live.
        """
        return self._pool.add()

    def finish_sequence(self, seq_id: int) -> None:
        """Give back a sequence's blocks.

        Raises
        ------
        ValueError
            The id is unknown or finished already.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        self._pool.finish(seq_id)
        self._steps.pop(seq_id, None)

    def update(self, seq_id: int, new_k: Any, new_v: Any, *, layer: int = 0) -> None:
        """Append tokens to a sequence.

        Parameters
        ----------
        seq_id : int
        new_k, new_v : (H, T, D) float32, float16, float64 or bfloat16
        layer : int
            Layers are written in order; the length moves with the last.

        Raises
        ------
        CacheFull
            There are too few free blocks; nothing has changed.
        ValueError, TypeError
            The id is unknown or finished, a shape or dtype is not as above, a quantised format is given a
            value that is not finite, or the layer is not the next one. The cache is as it was.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        layout = self._layout
        shape = (self.num_kv_heads, None, self.head_dim)
        k = arguments.new_tokens("new_k", new_k, shape, "H T D", layout.key_format)
        v = arguments.new_tokens("new_v", new_v, k.shape, "H T D", layout.value_format)
        layer = arguments.layer_index(layer, self.num_layers)
        count = k.shape[1]
        if layer == 0:
            step = self.step([seq_id], [count])
        else:
            self._pool.rows([seq_id])
            if seq_id not in self._steps:
                raise ValueError(f"layer: layers are written in order, next is layer 0; got {layer}")
            step = self._steps[seq_id]
            if count != step.num_tokens:
                raise ValueError(
                    f"new_k: expected {step.num_tokens} new tokens, as in layer 0; got {count} in layer {layer}"
                )
        step._write_views(k[None].swapaxes(1, 2), v[None].swapaxes(1, 2), layer)
        if layer < self.num_layers - 1:
            self._steps[seq_id] = step
        else:
            self._steps.pop(seq_id, None)

    def get_kv(self, seq_id: int, *, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the keys and values of a sequence: (H, T, D) float32 twice."""
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        layer = arguments.layer_index(layer, self.num_layers)
        length = self._length(seq_id, layer)
        k, v = self._backend.read(self._buffers, layer, self._pool.blocks(seq_id)[None], length)
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
        out : (Hq, T, D), in the precision of q (float64: float32)
        lse : (Hq, T) float32
            With ``return_lse``.
        """
        seq_id = arguments.integer("seq_id", seq_id, minimum=0)
        layer = arguments.layer_index(layer, self.num_layers)
        query = arguments.queries("q", q, (None, None, self.head_dim), "Hq T D", 0, self.num_kv_heads)
        count = query.shape[1]
        length = self._length(seq_id, layer)
        if count > length:
            raise ValueError(
                f"q: expected at most as many tokens as the sequence holds, {length}; got shape {query.shape}"
            )
        key = (seq_id, int(self._pool.bookings([seq_id])[0]), length, count)
        planned = self._attention  # read once: another thread may replace it
        if planned is None or planned[0] != key:
            batch = self._pool.view([seq_id], [length], [count])
            planned = (key, BatchAttention(self._backend, self._buffers, batch))
            self._attention = planned
        out = np.empty(query.shape, np.float32)
        lse = np.empty(query.shape[:2], np.float32)
        views = (query[None].swapaxes(1, 2), out[None].swapaxes(1, 2), lse[None].swapaxes(1, 2))
        planned[1].attend(layer, *views, options)
        out = arguments.like(q, out)
        return (out, lse) if options.get("return_lse") else out

    def step(self, seq_ids: Sequence[int], num_new_tokens: Sequence[int]) -> Step:
        """Book the blocks of a ragged batch, all or nothing, for a pass through all layers.

        Parameters
        ----------
        seq_ids : sequence of int
            Live sequences, each once.
        num_new_tokens : sequence of int
            What each of them adds: 1 for decoding, more for a prompt or a part of it, 0 for nothing.

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
        return Step(self._backend, self._buffers, self._pool, seq_ids, num_new_tokens)

    def __repr__(self) -> str:
        used = self.num_blocks - self.num_free_blocks
        return (
            f"PagedKVCache(blocks={used}/{self.num_blocks}, block_size={self.block_size}, "
            f"sequences={len(self.seq_lens)}/{self.max_num_seqs}, {self._describe()})"
        )

    def _length(self, seq_id: int, layer: int) -> int:
        """Tokens of a sequence that a layer holds, those of a running forward pass included."""
        length = int(self._pool.lengths([seq_id])[0])
        step = self._steps.get(seq_id)
        if step is not None and step.covers(layer) and step.is_latest():
            return int(step.batch.seq_lens[0])
        return length
