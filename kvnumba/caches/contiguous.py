"""Contiguous caches: room for every batch element, set aside at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments, arrays
from kvnumba.attention import passes
from kvnumba.attention.passes import FloatTokens, Pass, as_returned, room_for_results
from kvnumba.backends.protocol import Backend
from kvnumba.backends.quantization import code_format
from kvnumba.backends.registry import get_backend
from kvnumba.caches import snapshot
from kvnumba.caches.base import Cache
from kvnumba.errors import CacheFull
from kvnumba.options import AttentionOptions
from kvnumba.storage import Batch, Layout, LayoutOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class KVCache(Cache):
    """A contiguous cache: room for `max_seq_len` tokens of every batch element, set aside at once.

    Different caches may be used from different threads at once. One cache may not: calls would mix up its
    lengths, though never crash the process.

    Parameters
    ----------
    batch_size, max_seq_len, num_kv_heads, head_dim : int
        B, S_max, H (also accepted as `num_heads`) and D.
    dtype : str or dtype
        Format of keys and values: "float32", "float16", "bfloat16", "fp8_e4m3", "int8" or "int4".
    backend : {"numpy", "cpu", "cuda", "auto"}, optional
        Default: `use_backend`, then ``KVNUMBA_BACKEND``, then "auto".
    **options
        Other formats, scales, layers, rotation, calibration, tokens kept in float: see `kvnumba.LayoutOptions`.

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
        backend: str | None = None,
        **options: Unpack[LayoutOptions],
    ) -> None:
        layout = Layout.of(
            arguments.integer("batch_size", batch_size, minimum=1),
            arguments.integer("max_seq_len", max_seq_len, minimum=1),
            num_kv_heads,
            head_dim,
            dtype,
            **options,
        )
        self._start(layout, get_backend(backend))

    @classmethod
    def from_layout(cls, layout: Layout, *, backend: str | None = None) -> Self:
        """A cache of this layout, whose blocks are the batch elements."""
        cache = cls.__new__(cls)
        cache._start(layout, get_backend(backend))
        return cache

    def _start(self, layout: Layout, backend: Backend) -> None:
        super().__init__(layout, layout.num_blocks, backend)
        self._block_table = np.arange(layout.num_blocks, dtype=np.int32)[:, None]
        self._rows = np.arange(layout.num_blocks)
        self.reset()

    @property
    def batch_size(self) -> int:
        """Sequences that the cache holds (B)."""
        return self._layout.num_blocks

    @property
    def max_seq_len(self) -> int:
        """Tokens for which every batch element has room."""
        return self._layout.block_size

    @property
    def k_cache(self) -> Any:
        """The stored keys, writable: (B, H, S_max, D), with a layer axis in front where there are several.

        float32 and float16 as such, bfloat16 and fp8_e4m3 as their bits, int8 and int4 as codes; of a cache with
        `rotation` or `calibration` as these make them. Tokens that are kept in float besides are not here, and are
        attended to there whatever is written here.
        """
        return self._stored(self._buffers.keys.codes)

    @property
    def v_cache(self) -> Any:
        """The stored values, as `k_cache`."""
        return self._stored(self._buffers.values.codes)

    def reset(self) -> None:
        """Empty the cache."""
        self.seq_lens = [0] * self.batch_size
        self._latest = None
        self._pass: Pass | None = None  # the one that `update` is writing, until its last layer

    def truncate(self, batch_idx: int, length: int) -> None:
        """Forget a batch element's tokens from `length` on, and a pass that has layers to go.

        Raises
        ------
        ValueError
            There is no such element, or it holds fewer tokens.
        """
        batch_idx = self._element("batch_idx", batch_idx)
        length = arguments.integer("length", length, minimum=0)
        lengths = self._checked_lengths()
        if length > lengths[batch_idx]:
            raise ValueError(
                f"length: expected at most the element's {lengths[batch_idx]} tokens; got {length}"
            )
        self.seq_lens = [*lengths[:batch_idx], length, *lengths[batch_idx + 1 :]]
        self._pass = self._latest = None

    def fork(self, batch_idx: int, into: int) -> None:
        """Let batch element `into` hold what element `batch_idx` holds; what it held is forgotten.

        The tokens are copied: only a `PagedKVCache` shares them. A pass that has layers to go is forgotten.

        Raises
        ------
        ValueError
            There is no such element.
        """
        batch_idx, into = self._element("batch_idx", batch_idx), self._element("into", into)
        lengths = self._checked_lengths()
        if batch_idx != into:
            self._backend.copy_blocks(self._buffers, np.array([[batch_idx, into]], np.int64))
            if self._recent is not None:
                self._recent.reorder([into], [batch_idx])
        lengths[into] = lengths[batch_idx]
        self.seq_lens, self._pass, self._latest = lengths, None, None

    def save(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        """Write the tokens of all batch elements to a file, which takes the place of `path` when it is complete.

        Whatever happens before that leaves what was there. Tokens of a pass that has layers to go are left out, and so
        is what is kept in float besides: a cache that loads the file has it from the blocks.

        Parameters
        ----------
        path : path
        fingerprint : str
            Says what computed the keys and values: the model's name and revision, say. `load` compares it.

        Raises
        ------
        OSError
            The file cannot be written, or its disk is full.
        """
        snapshot.save_elements(Path(path), self._backend, self._buffers, self._checked_lengths(), fingerprint)

    def load(self, path: str | os.PathLike[str], *, fingerprint: str = "") -> None:
        """Hold what a file of `save` holds, in place of what the cache holds.

        The backend and `max_seq_len` may differ from those of the cache that was saved.

        Raises
        ------
        CacheFull
            An element of the file has more than `max_seq_len` tokens.
        ValueError
            The file is not one of `save`, is cut short or damaged, or was made with another batch size, shape, format
            or fingerprint. The cache is as it was.
        OSError
            The file cannot be read.
        """
        lengths = snapshot.load_elements(Path(path), self._backend, self._buffers, fingerprint)
        self.seq_lens, self._pass, self._latest = lengths, None, None
        if self._recent is not None:
            for batch_idx, length in enumerate(lengths):
                self._recent.start(batch_idx, length)

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
        new_k : (B, H, T, D) float32, float16, float64 or bfloat16
        new_v : (B, H, T, Dv)
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
        k, v = arrays.new_tokens(
            ("new_k", "new_v"),
            new_k,
            new_v,
            (self.batch_size, self.num_kv_heads, None),
            "B H T D",
            self._layout,
            self._backend,
        )
        layer = arguments.layer_index(layer, self.num_layers)
        count = k.shape[2]
        # a pass that does not get to its last layer is forgotten when the next one begins
        running = self._begin(positions, count) if layer == 0 else self._running(positions, count, layer)
        running.write(layer, k.swapaxes(1, 2), v.swapaxes(1, 2))
        lengths = running.batch.seq_lens.tolist()
        self._latest = ([count, *lengths], running)
        self._pass = running
        if running.complete:
            if self._recent is not None and running.floats is not None:
                self._recent.commit(running.floats)
            self.seq_lens, self._pass = lengths, None

    def get_kv(self, batch_idx: int, *, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the keys (H, S, D) and values (H, S, Dv) of a batch element, float32."""
        batch_idx = self._element("batch_idx", batch_idx)
        layer = arguments.layer_index(layer, self.num_layers)
        length = self._lengths(layer)[batch_idx]
        floats = self._floats(layer, self._lengths(layer), 1)
        row = self._block_table[batch_idx : batch_idx + 1]
        k, v = passes.read(self._backend, self._buffers, layer, row, length, floats, batch_idx)
        return k[0], v[0]

    def get_full_kv(self, *, layer: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """`get_kv` of every batch element: a list of keys and a list of values."""
        layer = arguments.layer_index(layer, self.num_layers)
        lengths = self._lengths(layer)
        floats = self._floats(layer, lengths, 1)
        k, v = passes.read(self._backend, self._buffers, layer, self._block_table, max(lengths), floats)
        return [x[:, :n] for x, n in zip(k, lengths, strict=True)], [
            x[:, :n] for x, n in zip(v, lengths, strict=True)
        ]

    def attend(self, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]) -> Any:
        """Causal attention of each element's newest T tokens, straight out of the storage.

        Query i of T sees positions up to ``seq_len - T + i``. Extra memory is
        O(B * T * Hq * D + threads * tile), whatever the cached length: keys and values are never copied to
        float32 as a whole, and never more than a tile of scores exists, or eight for each key with `return_mass`.

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
        out : (B, Hq, T, Dv), in the precision of q (float64: float32)
        lse : (B, Hq, T) float32
            With ``return_lse``.
        mass : (B, H, S) float32
            With ``return_mass``, S the length of the longest element: 0 past the end of others.
        """
        layer = arguments.layer_index(layer, self.num_layers)
        if options.get("return_mass") == "block":
            raise ValueError("return_mass: expected True or False of a cache without blocks; got 'block'")
        shape = (self.batch_size, None, None, self.head_dim)
        query = arrays.queries("q", q, shape, "B Hq T D", 1, self.num_kv_heads, self._backend)
        count = query.shape[2]
        lengths = self._lengths(layer)
        if count > min(lengths):
            raise ValueError(
                f"q: expected at most as many tokens as an element holds, {min(lengths)}; got shape {query.shape}"
            )
        key, latest = [count, *lengths], self._latest  # read once: another thread may replace it
        if latest is None or latest[0] != key:
            batch, floats = self._batch(lengths, count), self._floats(layer, lengths, count)
            latest = (key, Pass(self._backend, self._buffers, batch, floats=floats, written=True))
            self._latest = latest
        out, lse = room_for_results(self._backend, query, self.value_head_dim, options)
        views = (query.swapaxes(1, 2), out.swapaxes(1, 2), lse.swapaxes(1, 2))
        mass = latest[1].attend(layer, *views, options, getattr(q, "dtype", None))
        return as_returned(q, out, lse, mass, options)

    def __repr__(self) -> str:
        longest = max(self.seq_lens)
        return f"{type(self).__name__}(B={self.batch_size}, tokens={longest}/{self.max_seq_len}, {self._describe()})"

    def _batch(self, lengths: list[int], count: int) -> Batch:
        """The last `count` tokens of elements of such lengths."""
        if self.batch_size == 1:
            return Batch.of_one(self._block_table, lengths[0], count, self.max_seq_len)
        seq_lens = np.array(lengths, np.int32)
        query_start_loc = np.arange(self.batch_size + 1, dtype=np.int32) * np.int32(count)
        return Batch(
            self._block_table, seq_lens, query_start_loc, self.max_seq_len, seq_lens - np.int32(count)
        )

    def _begin(self, positions: Sequence[int] | None, count: int) -> Pass:
        """A new pass of `count` tokens of each element."""
        if positions is None:
            begin = self._checked_lengths()
            self._require_room(begin, count)
        else:
            begin = arguments.integers("positions", positions, length=self.batch_size).tolist()
            if min(begin) < 0 or max(begin) + count > self.max_seq_len:
                raise ValueError(
                    f"positions: expected 0 to {self.max_seq_len - count} for {count} new tokens with "
                    f"max_seq_len={self.max_seq_len}; got {begin}"
                )
        batch = self._batch([first + count for first in begin], count)
        floats = None if self._recent is None else self._recent.book(self._rows, batch)
        return Pass(self._backend, self._buffers, batch, floats=floats)

    def _floats(self, layer: int, lengths: list[int], count: int) -> FloatTokens | None:
        """What the last `count` tokens of each element, as a layer holds it, attend to in float."""
        if self._recent is None:
            return None
        batch = self._batch(lengths, count)
        if self._pass is not None and self._pass.covers(layer) and self._pass.floats is not None:
            return self._pass.floats.seen_by(batch)
        return self._recent.view(self._rows, batch)

    def _running(self, positions: Sequence[int] | None, count: int, layer: int) -> Pass:
        """The pass that is being written, for a later layer, which goes where the first one went."""
        running = self._pass
        if running is None:
            raise ValueError(f"layer: layers are written in order, next is layer 0; got {layer}")
        running.require_next(layer)
        expected = running.batch.num_tokens // self.batch_size
        if count != expected:
            raise ValueError(
                f"new_k: expected {expected} new tokens, as in layer 0; got {count} in layer {layer}"
            )
        if positions is not None:
            begin = running.batch.positions.tolist()
            given = arguments.integers("positions", positions, length=self.batch_size).tolist()
            if given != begin:
                raise ValueError(f"positions: expected {begin}, as in layer 0; got {given}")
        return running

    def _lengths(self, layer: int) -> list[int]:
        """Tokens of each element that a layer holds, those of a pass that has layers to go included."""
        if self._pass is not None and self._pass.covers(layer):
            return self._pass.batch.seq_lens.tolist()
        return self._checked_lengths()

    def _element(self, argument: str, value: int) -> int:
        index = arguments.integer(argument, value, minimum=0)
        if index >= self.batch_size:
            raise ValueError(f"{argument}: expected 0 to {self.batch_size - 1}; got {index}")
        return index

    def _checked_lengths(self) -> list[int]:
        lengths = self.seq_lens
        if {*map(type, lengths)} != {int} or len(lengths) != self.batch_size:
            lengths = arguments.integers("seq_lens", lengths, length=self.batch_size).tolist()
        if min(lengths) < 0 or max(lengths) > self.max_seq_len:
            raise ValueError(f"seq_lens: expected 0 to max_seq_len={self.max_seq_len}; got {self.seq_lens}")
        return lengths


class QuantizedKVCache(KVCache):
    """A contiguous cache in INT8 or INT4: `KVCache` with one format for keys and values.

    Codes are unsigned: value = code * scale + zero, with a scale and a zero for each (batch, head, token), or for
    each group of `group_size` elements.

    Parameters
    ----------
    batch_size, max_seq_len, num_kv_heads, head_dim : int
        As in `KVCache`.
    bits : {8, 4}
    backend, **options
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
        backend: str | None = None,
        **options: Unpack[LayoutOptions],
    ) -> None:
        super().__init__(
            batch_size,
            max_seq_len,
            num_kv_heads,
            head_dim,
            code_format(bits).name,
            backend=backend,
            **options,
        )

    @property
    def bits(self) -> int:
        """Of a code."""
        return self._layout.keys.fmt.bits

    def savings_vs_fp32(self) -> float:
        """The fraction of a float32 cache's bytes that this cache takes: 0.27 means 27 % of them, not 27 % less.

        Scales and zeros are counted. The name is that of the first sketch of this class.
        """
        layout = self._layout
        elements = layout.num_kv_heads * (layout.head_dim + layout.value_head_dim)
        return layout.bytes_per_token() / (4 * layout.num_layers * elements)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.savings_vs_fp32():.3f} of float32)"
