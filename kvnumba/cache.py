"""The caches that users hold: they check arguments, book room, and call a backend.

Every cache is a pool of blocks plus a block table. A contiguous cache is the case with one block of
``max_seq_len`` tokens per batch element; a quantised one is the case whose blocks hold codes and scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments
from kvnumba.arguments import AttentionOptions
from kvnumba.blocks import BlockPool
from kvnumba.errors import CacheFull
from kvnumba.formats import resolve_format
from kvnumba.registry import get_backend
from kvnumba.step import BatchAttention, Step
from kvnumba.storage import Batch, Layout

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Cache:
    """What the caches share: a backend, a layout and its buffers."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any,
        key_format: Any,
        value_format: Any,
        group_size: int | None,
        num_layers: int,
        backend: str | None,
    ) -> None:
        default = resolve_format("dtype", dtype)
        keys = default if key_format is None else resolve_format("key_format", key_format)
        values = default if value_format is None else resolve_format("value_format", value_format)
        head_dim = arguments.integer("head_dim", head_dim, minimum=1)
        self._layout = Layout(
            num_layers=arguments.integer("num_layers", num_layers, minimum=1),
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=arguments.integer("num_kv_heads", num_kv_heads, minimum=1),
            head_dim=head_dim,
            key_format=keys,
            value_format=values,
            group_size=arguments.group_size(group_size, head_dim, (keys, values)),
        )
        self._backend = get_backend(backend)
        self._buffers = self._backend.allocate(self._layout)

    @property
    def backend(self) -> str:
        """The name of the backend that holds the storage."""
        return self._backend.name

    @property
    def num_layers(self) -> int:
        """Layers that the cache holds."""
        return self._layout.num_layers

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads (H)."""
        return self._layout.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Elements of a head (D)."""
        return self._layout.head_dim

    @property
    def key_format(self) -> str:
        """The name of the keys' storage format."""
        return self._layout.key_format.name

    @property
    def value_format(self) -> str:
        """The name of the values' storage format."""
        return self._layout.value_format.name

    def memory_bytes(self) -> int:
        """Bytes of the storage, scales and zero points included."""
        return self._layout.memory_bytes()

    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers and heads, scales and zero points included."""
        return self._layout.bytes_per_token()

    @property
    def k_scale(self) -> Any:
        """The keys' scales, float32, writable, shaped as the stored keys with one element a group.

        A format that is not quantised has no groups.
        """
        return self._stored(self._buffers.keys.scale)

    @property
    def k_zp(self) -> Any:
        """The keys' zero points, as `k_scale`: value = code * scale + zero point."""
        return self._stored(self._buffers.keys.zero)

    @property
    def v_scale(self) -> Any:
        """The values' scales, as `k_scale`."""
        return self._stored(self._buffers.values.scale)

    @property
    def v_zp(self) -> Any:
        """The values' zero points, as `k_scale`."""
        return self._stored(self._buffers.values.zero)

    def _stored(self, part: Any) -> Any:
        """A part of the storage; without the layer axis where there is one layer."""
        return part[0] if self.num_layers == 1 else part

    def _describe(self) -> str:
        layout = self._layout
        layers = f"layers={layout.num_layers}, " if layout.num_layers > 1 else ""
        return (
            f"{layers}H={layout.num_kv_heads}, D={layout.head_dim}, {layout.describe_formats()}, "
            f"{self.backend}, {self.memory_bytes() / 1e6:.1f} MB"
        )


class KVCache(_Cache):
    """A contiguous cache: room for `max_seq_len` tokens of every batch element, set aside at once.

    Different caches may be used from different threads at once. One cache may not: calls would mix up its
    lengths, though never crash the process.

    Parameters
    ----------
    batch_size, max_seq_len, num_kv_heads, head_dim : int
        B, S_max, H (also accepted as `num_heads`) and D.
    dtype : str or dtype
        Format of keys and values: "float32", "float16", "bfloat16", "int8" or "int4".
    key_format, value_format : str, optional
        Format of one of them, where it differs from `dtype`.
    group_size : int, optional
        Elements along head_dim that share a scale in int8 and int4. Default: all D.
    num_layers : int
        Layers that move together: a sequence's length is one number, which `update` moves with the last.
    backend : {"numpy", "cpu", "cuda", "auto"}, optional
        Default: `use_backend`, then ``KVNUMBA_BACKEND``, then "auto".

    Attributes
    ----------
    seq_lens : list of int
        Tokens held by each batch element; may be set, to shorten one or after writing `k_cache` directly.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; the message names it.
    BackendUnavailable
        The named backend cannot run here.
    """

    @arguments.also_called(num_heads="num_kv_heads")
    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = np.float32,
        *,
        key_format: Any = None,
        value_format: Any = None,
        group_size: int | None = None,
        num_layers: int = 1,
        backend: str | None = None,
    ) -> None:
        self.batch_size = arguments.integer("batch_size", batch_size, minimum=1)
        self.max_seq_len = arguments.integer("max_seq_len", max_seq_len, minimum=1)
        super().__init__(
            self.batch_size,
            self.max_seq_len,
            num_kv_heads,
            head_dim,
            dtype,
            key_format,
            value_format,
            group_size,
            num_layers,
            backend,
        )
        self._block_table = np.arange(self.batch_size, dtype=np.int32)[:, None]
        self._attention: tuple[list[int], BatchAttention] | None = None
        self.reset()

    @property
    def k_cache(self) -> Any:
        """The stored keys, writable: (B, H, S_max, D), with a layer axis in front where there are several.

        float32 and float16 as such, bfloat16 as uint16 bits, int8 and int4 as codes.
        """
        return self._stored(self._buffers.keys.codes)

    @property
    def v_cache(self) -> Any:
        """The stored values, as `k_cache`."""
        return self._stored(self._buffers.values.codes)

    def reset(self) -> None:
        """Empty the cache."""
        self.seq_lens = [0] * self.batch_size
        self._forward: tuple[list[int], int, Any] | None = None  # begin of each element, tokens, these placed
        self._layers_written = 0

    def require_room(self, num_new_tokens: int) -> None:
        """Raise CacheFull unless every batch element can take so many more tokens."""
        self._require_room(self._checked_lengths(), num_new_tokens)

    def _require_room(self, lengths: list[int], num_new_tokens: int) -> None:
        free = self.max_seq_len - max(lengths)
        if num_new_tokens > free:
            raise CacheFull(
                f"{num_new_tokens} new tokens need room, {free} of max_seq_len={self.max_seq_len} are free "
                f"in batch element {lengths.index(max(lengths))}"
            )

    def update(
        self, new_k: Any, new_v: Any, positions: Sequence[int] | None = None, *, layer: int = 0
    ) -> None:
        """Append tokens to every batch element, or write them elsewhere.

        Parameters
        ----------
        new_k, new_v : (B, H, T, D) float32, float16, float64 or bfloat16
        positions : sequence of B ints, optional
            Where each element's first new token goes; its length is ``positions[b] + T`` afterwards. Between
            the old end and a later position stands what stood there before: zeros, in a new cache.
            Of several layers, the first decides.
        layer : int
            Layers are written in order; the lengths move with the last.

        Raises
        ------
        CacheFull
            An element would grow past `max_seq_len`.
        ValueError, TypeError
            A shape or dtype is not as above, a position is out of range, a quantised format is given a value
            that is not finite, or the layer is not the next one. The cache is as it was.
        """
        layout = self._layout
        shape = (self.batch_size, self.num_kv_heads, None, self.head_dim)
        k, v = arguments.new_tokens(("new_k", "new_v"), new_k, new_v, shape, "B H T D", layout, self._backend)
        layer = arguments.layer_index(layer, self.num_layers)
        count = k.shape[2]
        if layer == 0:
            begin = self._begin(positions, count)
            placed = self._place([first + count for first in begin], count)
        else:
            begin, _, placed = self._resume(positions, count, layer)
        if count:
            self._backend.write(self._buffers, layer, k.swapaxes(1, 2), v.swapaxes(1, 2), placed)
        self._forward = (begin, count, placed)
        self._layers_written = layer + 1
        if self._layers_written == self.num_layers:
            self.seq_lens = [first + count for first in begin]
            self._forward = None

    def get_kv(self, batch_idx: int, *, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the keys and values of a batch element: (H, S, D) float32 twice."""
        batch_idx = arguments.integer("batch_idx", batch_idx, minimum=0)
        if batch_idx >= self.batch_size:
            raise ValueError(f"batch_idx: expected 0 to {self.batch_size - 1}; got {batch_idx}")
        layer = arguments.layer_index(layer, self.num_layers)
        length = self._lengths(layer)[batch_idx]
        row = self._block_table[batch_idx : batch_idx + 1]
        k, v = self._backend.read(self._buffers, layer, row, length)
        return k[0], v[0]

    def get_full_kv(self, *, layer: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """`get_kv` of every batch element: a list of keys and a list of values."""
        layer = arguments.layer_index(layer, self.num_layers)
        lengths = self._lengths(layer)
        k, v = self._backend.read(self._buffers, layer, self._block_table, max(lengths))
        return [x[:, :n] for x, n in zip(k, lengths, strict=True)], [
            x[:, :n] for x, n in zip(v, lengths, strict=True)
        ]

    def attend(self, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]) -> Any:
        """Causal attention of each element's newest T tokens, straight out of the storage.

        Query i of T sees positions up to ``seq_len - T + i``. Extra memory is
        O(B * T * Hq * D + threads * tile), whatever the cached length: keys and values are never copied to
        float32 as a whole, and never more than a tile of scores exists.

        Parameters
        ----------
        q : (B, Hq, T, D) float32, float16, float64 or bfloat16
            Hq is a multiple of H. T is at most the shortest element's length.
        layer : int
            Tokens that `update` wrote to this layer count, whether or not the later layers have them yet.
        **options
            See `AttentionOptions`.

        Returns
        -------
        out : (B, Hq, T, D), in the precision of q (float64: float32)
        lse : (B, Hq, T) float32
            With ``return_lse``.
        """
        layer = arguments.layer_index(layer, self.num_layers)
        query = arguments.queries(
            "q",
            q,
            (self.batch_size, None, None, self.head_dim),
            "B Hq T D",
            1,
            self.num_kv_heads,
            self._backend,
        )
        count = query.shape[2]
        lengths = self._lengths(layer)
        if count > min(lengths):
            raise ValueError(
                f"q: expected at most as many tokens as an element holds, {min(lengths)}; got shape {query.shape}"
            )
        key = [count, *lengths]
        planned = self._attention  # read once: another thread may replace it
        if planned is None or planned[0] != key:
            planned = (key, BatchAttention(self._backend, self._buffers, self._place(lengths, count)))
            self._attention = planned
        out, lse = arguments.results(query, options)
        views = (query.swapaxes(1, 2), out.swapaxes(1, 2), lse.swapaxes(1, 2))
        planned[1].attend(layer, *views, options)
        return arguments.returned(q, out, lse, options)

    def __repr__(self) -> str:
        longest = max(self.seq_lens)
        return f"{type(self).__name__}(B={self.batch_size}, tokens={longest}/{self.max_seq_len}, {self._describe()})"

    def _place(self, lengths: list[int], count: int) -> Any:
        """The last `count` tokens of elements of such lengths, as the backend takes them."""
        new = np.full(self.batch_size, count, np.int32)
        batch = Batch.of(self._block_table, np.array(lengths, np.int32), new, self.max_seq_len)
        return self._backend.place(batch)

    def _begin(self, positions: Sequence[int] | None, count: int) -> list[int]:
        """Where a forward pass of `count` tokens begins in each element."""
        if positions is None:
            begin = self._checked_lengths()
            self._require_room(begin, count)
            return begin
        begin = arguments.integers("positions", positions, length=self.batch_size).tolist()
        if min(begin) < 0 or max(begin) + count > self.max_seq_len:
            raise ValueError(
                f"positions: expected 0 to {self.max_seq_len - count} for {count} new tokens with "
                f"max_seq_len={self.max_seq_len}; got {begin}"
            )
        return begin

    def _resume(self, positions: Sequence[int] | None, count: int, layer: int) -> tuple[list[int], int, Any]:
        """The running forward pass, for a later layer, which goes where the first one went."""
        if self._forward is None or layer != self._layers_written:
            due = 0 if self._forward is None else self._layers_written
            raise ValueError(f"layer: layers are written in order, next is layer {due}; got {layer}")
        begin, expected, _ = self._forward
        if count != expected:
            raise ValueError(
                f"new_k: expected {expected} new tokens, as in layer 0; got {count} in layer {layer}"
            )
        if positions is not None:
            given = arguments.integers("positions", positions, length=self.batch_size).tolist()
            if given != begin:
                raise ValueError(f"positions: expected {begin}, as in layer 0; got {given}")
        return self._forward

    def _lengths(self, layer: int) -> list[int]:
        """Tokens of each element that a layer holds, those of the running forward pass included."""
        forward = self._forward
        if forward is not None and layer < self._layers_written:
            begin, count, _ = forward
            return [first + count for first in begin]
        return self._checked_lengths()

    def _checked_lengths(self) -> list[int]:
        lengths = arguments.integers("seq_lens", self.seq_lens, length=self.batch_size).tolist()
        if min(lengths) < 0 or max(lengths) > self.max_seq_len:
            raise ValueError(f"seq_lens: expected 0 to max_seq_len={self.max_seq_len}; got {self.seq_lens}")
        return lengths


class QuantizedKVCache(KVCache):
    """A contiguous cache in INT8 or INT4: `KVCache` with one format for keys and values.

    Codes are unsigned and asymmetric, with a float32 scale and zero point per (batch, head, token), or per
    group of `group_size` elements.

    Parameters
    ----------
    batch_size, max_seq_len, num_kv_heads, head_dim : int
        As in `KVCache`.
    bits : {8, 4}
    group_size, num_layers, backend
        As in `KVCache`.
    """

    @arguments.also_called(num_heads="num_kv_heads")
    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        bits: int = 8,
        *,
        group_size: int | None = None,
        num_layers: int = 1,
        backend: str | None = None,
    ) -> None:
        if bits not in (4, 8):
            raise ValueError(f"bits: expected 8 or 4; got {bits!r}")
        self.bits = bits
        super().__init__(
            batch_size,
            max_seq_len,
            num_kv_heads,
            head_dim,
            f"int{bits}",
            group_size=group_size,
            num_layers=num_layers,
            backend=backend,
        )

    def savings_vs_fp32(self) -> float:
        """This cache's bytes, scales included, over those of a float32 cache of the same shape."""
        layout = self._layout
        values = (
            2 * layout.num_layers * layout.num_blocks * layout.block_size * self.num_kv_heads * self.head_dim
        )
        return self.memory_bytes() / (4 * values)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.savings_vs_fp32():.3f} of float32)"


class PagedKVCache(_Cache):
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
        k, v = arguments.new_tokens(("new_k", "new_v"), new_k, new_v, shape, "H T D", layout, self._backend)
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
        query = arguments.queries(
            "q", q, (None, None, self.head_dim), "Hq T D", 0, self.num_kv_heads, self._backend
        )
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
            planned = (key, BatchAttention(self._backend, self._buffers, self._backend.place(batch)))
            self._attention = planned
        out, lse = arguments.results(query, options)
        views = (query[None].swapaxes(1, 2), out[None].swapaxes(1, 2), lse[None].swapaxes(1, 2))
        planned[1].attend(layer, *views, options)
        return arguments.returned(q, out, lse, options)

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
