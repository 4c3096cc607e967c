"""Contiguous caches: room for every batch element, set aside at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments
from kvnumba.arguments import AttentionOptions
from kvnumba.caches.base import Cache
from kvnumba.caches.step import BatchAttention
from kvnumba.errors import CacheFull
from kvnumba.storage import Batch

if TYPE_CHECKING:
    from typing_extensions import Unpack


class KVCache(Cache):
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
            _, placed = self._place([first + count for first in begin], count)
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
            planned = (key, BatchAttention(self._backend, self._buffers, *self._place(lengths, count)))
            self._attention = planned
        out, lse = arguments.results(query, options)
        views = (query.swapaxes(1, 2), out.swapaxes(1, 2), lse.swapaxes(1, 2))
        planned[1].attend(layer, *views, options, q)
        return arguments.returned(q, out, lse, options)

    def __repr__(self) -> str:
        longest = max(self.seq_lens)
        return f"{type(self).__name__}(B={self.batch_size}, tokens={longest}/{self.max_seq_len}, {self._describe()})"

    def _place(self, lengths: list[int], count: int) -> tuple[Batch, Any]:
        """The last `count` tokens of elements of such lengths, and these as the backend takes them."""
        new = np.full(self.batch_size, count, np.int32)
        batch = Batch.of(self._block_table, np.array(lengths, np.int32), new, self.max_seq_len)
        return batch, self._backend.place(batch)

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
