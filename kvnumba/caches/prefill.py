"""Attention on top of the caches, the same for every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments, arrays
from kvnumba.caches.contiguous import KVCache
from kvnumba.caches.paged import PagedKVCache
from kvnumba.options import AttentionOptions, scoring_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def multi_head_attention_with_cache(
    q_new: Any,
    cache: KVCache,
    w_q: Any,
    w_k: Any,
    w_v: Any,
    w_o: Any,
    *,
    layer: int = 0,
    **options: Unpack[AttentionOptions],
) -> np.ndarray:
    """One attention layer for tokens whose keys and values are in the cache already.

    Parameters
    ----------
    q_new : (B, T, d_model)
        Hidden states of each element's newest T tokens.
    cache : KVCache
        It is read, not written.
    w_q : (d_model, Hq * D)
    w_k, w_v : object
        Not used: keys and values come from the cache.
    w_o : (Hq * Dv, d_model)
    layer : int
        Of the cache.
    **options
        See `AttentionOptions`; there is no `return_lse` here.

    Returns
    -------
    (B, T, d_model) float32
        Causal: token i of T sees positions up to ``seq_len - T + i``.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache; got a {type(cache).__name__}")
    hidden = arrays.float_array("q_new", q_new)
    w_q, w_o = _projections(w_q, w_o, cache)
    arguments.check_shape("q_new", hidden, (cache.batch_size, None, len(w_q)), "B T d_model")
    _refuse_more(options)
    q = _split_heads(hidden @ w_q, cache.head_dim)
    return _join_heads(cache.attend(q, layer=layer, **options)) @ w_o


class ChunkedPrefillCache:
    """Prefills long prompts in chunks, so that extra memory depends on the chunk and not on the prompt.

    Each chunk is appended and attends, causally, to everything before it and to itself: the result equals
    that of one pass over the whole prompt, to rounding.

    Parameters
    ----------
    base_cache : KVCache or PagedKVCache
        Of one layer, in any format; it is written.
    chunk_size : int
        Tokens of a chunk.
    seq_ids : sequence of B ints, optional
        With a paged cache: the sequences that are the batch.
    """

    def __init__(
        self,
        base_cache: KVCache | PagedKVCache,
        chunk_size: int = 512,
        *,
        seq_ids: Sequence[int] | None = None,
    ) -> None:
        if isinstance(base_cache, PagedKVCache) != (seq_ids is not None):
            raise ValueError(
                f"seq_ids: expected the sequences of a paged cache, None otherwise; "
                f"got {seq_ids!r} with a {type(base_cache).__name__}"
            )
        if base_cache.num_layers != 1:
            raise ValueError(f"base_cache: expected one layer; got {base_cache.num_layers}")
        self.cache = base_cache
        self.chunk_size = arguments.integer("chunk_size", chunk_size, minimum=1)
        self.seq_ids = None if seq_ids is None else arguments.integers("seq_ids", seq_ids).tolist()

    def prefill(
        self,
        all_k: Any,
        all_v: Any,
        w_q: Any,
        w_k: Any,
        w_v: Any,
        w_o: Any,
        hidden_states: Any = None,
        **options: Unpack[AttentionOptions],
    ) -> np.ndarray:
        """Append a prompt and return the attention layer's output at every position.

        Parameters
        ----------
        all_k : (B, H, S, D)
        all_v : (B, H, S, Dv)
            Keys and values of the whole prompt.
        w_q : (d_model, Hq * D)
        w_k, w_v : object
            Not used: `all_k` and `all_v` are projected already.
        w_o : (Hq * Dv, d_model)
        hidden_states : (B, S, d_model)
            What the queries are projected from, a chunk at a time. Required.
        **options
            See `AttentionOptions`; there is no `return_lse` here.

        Returns
        -------
        (B, S, d_model) float32

        Raises
        ------
        CacheFull
            There is no room for the whole prompt.
        ValueError, TypeError
            An argument is not as above. In each case the cache is as it was.
        """
        if hidden_states is None:
            raise ValueError(
                "hidden_states: expected (B, S, d_model), from which the queries are made; got None"
            )
        head_dim = self.cache.head_dim
        w_q, w_o = _projections(w_q, w_o, self.cache)
        _refuse_more(options)
        hidden_states, all_k, all_v = np.asarray(hidden_states), np.asarray(all_k), np.asarray(all_v)
        batch, length = self._checked_prompt(all_k, all_v)
        arguments.check_shape("hidden_states", hidden_states, (batch, length, len(w_q)), "B S d_model")
        arrays.float_array("hidden_states", hidden_states[:, :0])
        scoring = scoring_of(options, w_q.shape[1] // head_dim, head_dim)
        self._book(length)
        out = np.empty((batch, length, w_o.shape[1]), np.float32)
        for chunk in self._chunks(length):
            hidden = arrays.float_array("hidden_states", hidden_states[:, chunk])
            q = _split_heads(hidden @ w_q, head_dim)
            attended = self._append(q, all_k[:, :, chunk], all_v[:, :, chunk], {"scoring": scoring})
            out[:, chunk] = _join_heads(attended) @ w_o
        return out

    def attend(self, q: Any, k: Any, v: Any, **options: Unpack[AttentionOptions]) -> Any:
        """Append a prompt's keys and values and return the attention of all its queries.

        For models that make their own queries (with rotary positions, say); otherwise as `prefill`.

        Parameters
        ----------
        q : (B, Hq, S, D)
        k : (B, H, S, D)
        v : (B, H, S, Dv)
        **options
            See `AttentionOptions`.

        Returns
        -------
        out : (B, Hq, S, Dv), in the precision of q (float64: float32)
        lse : (B, Hq, S) float32
            With ``return_lse``.
        """
        if options.get("return_mass"):
            raise TypeError("return_mass: expected none for a prompt in chunks; use attend of the cache")
        q, k, v = np.asarray(q), np.asarray(k), np.asarray(v)
        batch, length = self._checked_prompt(k, v)
        head_dim = self.cache.head_dim
        arguments.check_shape("q", q, (batch, None, length, head_dim), "B Hq S D")
        none = q[:, :, :0]
        arrays.queries("q", none, none.shape, "B Hq S D", 1, self.cache.num_kv_heads, self.cache._backend)
        scoring = scoring_of(options, q.shape[1], head_dim)
        self._book(length)
        dtype = np.float32 if q.dtype == np.float64 else q.dtype
        out = np.empty((*q.shape[:3], self.cache.value_head_dim), dtype)
        lse = np.empty(q.shape[:3], np.float32)
        for chunk in self._chunks(length):
            out[:, :, chunk], lse[:, :, chunk] = self._append(
                q[:, :, chunk], k[:, :, chunk], v[:, :, chunk], {"scoring": scoring, "return_lse": True}
            )
        return (out, lse) if options.get("return_lse") else out

    def _checked_prompt(self, k: np.ndarray, v: np.ndarray) -> tuple[int, int]:
        """B and S of a prompt that the cache can hold."""
        cache = self.cache
        batch = cache.batch_size if isinstance(cache, KVCache) else len(self.seq_ids or ())
        shape = (batch, cache.num_kv_heads, None)
        arguments.check_shape("k", k, (*shape, cache.head_dim), "B H S D")
        arguments.check_shape("v", v, (*k.shape[:3], cache.value_head_dim), "B H S D")
        length = k.shape[2]
        for chunk in self._chunks(length):
            part = k[:, :, chunk], v[:, :, chunk]
            arrays.new_tokens(("k", "v"), *part, shape, "B H S D", cache.layout, cache._backend)
        return batch, length

    def _book(self, length: int) -> None:
        """Find room for a whole checked prompt: nothing can fail once its first chunk is written."""
        if isinstance(self.cache, KVCache):
            self.cache.require_room(length)
        else:
            seq_ids = self.seq_ids or []
            self.cache._book(seq_ids, [length] * len(seq_ids))  # the blocks that the chunks will fill

    def _chunks(self, length: int) -> Iterator[slice]:
        return (
            slice(start, min(start + self.chunk_size, length)) for start in range(0, length, self.chunk_size)
        )

    def _append(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, options: AttentionOptions) -> Any:
        """Write a chunk (B, heads, T, D) and attend over it and all before it."""
        if isinstance(self.cache, KVCache):
            self.cache.update(k, v)
            return self.cache.attend(q, **options)
        batch, _, count, _ = k.shape
        step = self.cache.step(self.seq_ids or (), [count] * batch)
        step.write(_pack(k), _pack(v))
        result = step.attend(_pack(q), **options)
        if options.get("return_lse"):
            return _unpack(result[0], batch), _unpack(result[1], batch)
        return _unpack(result, batch)


def _pack(x: np.ndarray) -> np.ndarray:
    """(B, heads, T, D) -> (B * T, heads, D)."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _unpack(x: np.ndarray, batch: int) -> np.ndarray:
    """(B * T, heads, ...) -> (B, heads, T, ...)."""
    return x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2)


def _split_heads(x: np.ndarray, head_dim: int) -> np.ndarray:
    """(B, T, heads * D) -> (B, heads, T, D)."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def _join_heads(x: np.ndarray) -> np.ndarray:
    """(B, heads, T, D) -> (B, T, heads * D)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def _projections(w_q: Any, w_o: Any, cache: KVCache | PagedKVCache) -> tuple[np.ndarray, np.ndarray]:
    num_kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    w_q, w_o = arrays.float_array("w_q", w_q), arrays.float_array("w_o", w_o)
    arguments.check_shape("w_q", w_q, (None, None), "d_model Hq*D")
    if w_q.shape[1] == 0 or w_q.shape[1] % (num_kv_heads * head_dim):
        raise ValueError(
            f"w_q: expected (d_model, Hq * D) with Hq a multiple of num_kv_heads={num_kv_heads} "
            f"and head_dim D={head_dim}; got {w_q.shape}"
        )
    rows = w_q.shape[1] // head_dim * cache.value_head_dim
    arguments.check_shape("w_o", w_o, (rows, None), "Hq*D d_model")
    return w_q, w_o


def _refuse_more(options: AttentionOptions) -> None:
    for name in ("return_lse", "return_mass"):
        if options.get(name):
            raise TypeError(f"{name}: this call returns a projected output alone; use attend of the cache")
