"""One forward pass over some sequences: booked once, then written and attended layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments
from kvnumba.arguments import AttentionOptions
from kvnumba.attention.cascade import Cascade, common_prefixes, worthwhile
from kvnumba.backends.protocol import Backend
from kvnumba.blocks.pool import BlockPool
from kvnumba.storage import Batch, Buffers, Scoring

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BatchAttention:
    """Attention of one batch over all layers: what does not depend on the layer is planned once.

    Internal: queries come as views (B, n, Hq, D) and are checked already.
    """

    def __init__(
        self,
        backend: Backend,
        buffers: Buffers,
        batch: Batch,
        placed: Any,
        widest_window: int | None = None,
    ) -> None:
        self._backend = backend
        self._buffers = buffers
        self._batch = batch
        self._placed = placed
        self._widest_window = widest_window  # None: any, and none
        self._cascades: dict[int, Cascade | None] = {}
        self._plans: dict[tuple[int, int], Any] = {}

    def attend(self, layer: int, q: Any, out: Any, lse: Any, options: AttentionOptions, given: Any) -> None:
        """Write the attention of q into views `out`, shaped like q, and `lse` (B, n, Hq).

        `given` are the queries as the caller gave them, whose dtype decides about the arithmetic.
        """
        layout = self._buffers.layout
        num_qo_heads = q.shape[2]
        scoring = arguments.scoring(options, num_qo_heads, layout.head_dim, given)
        if q.size == 0:
            return
        widest = self._widest_window
        if widest is not None and not 0 <= scoring.window_left <= widest:
            raise ValueError(
                f"window_left: expected 0 to {widest}, earlier tokens may be given back; got {scoring.window_left}"
            )
        cascade = self._cascade(num_qo_heads, scoring) if isinstance(q, np.ndarray) else None
        if cascade is not None:
            cascade.attend(self._buffers, layer, q, scoring, out, lse)
            return
        plan = self._plan(num_qo_heads, scoring.window_left)
        self._backend.attend(self._buffers, layer, q, plan, scoring, out, lse)

    def prepare(self, q: Any, options: AttentionOptions) -> None:
        """Do what `attend` does once for all layers, and once for all batches."""
        num_qo_heads = q.shape[2]
        scoring = arguments.scoring(options, num_qo_heads, self._buffers.layout.head_dim)
        if q.size:
            plan = self._plan(num_qo_heads, scoring.window_left)
            self._backend.prepare(self._buffers, q, plan, scoring)

    def _plan(self, num_qo_heads: int, window_left: int) -> Any:
        key = (num_qo_heads, window_left)
        if key not in self._plans:
            self._plans[key] = self._backend.plan(self._buffers.layout, self._placed, *key)
        return self._plans[key]

    def _cascade(self, num_qo_heads: int, scoring: Scoring) -> Cascade | None:
        """How to attend to common prefixes apart; None where there are none, it does not pay or is not exact."""
        if len(self._batch.seq_lens) < 2 or scoring.window_left >= 0 or scoring.alibi_slopes is not None:
            return None
        if num_qo_heads not in self._cascades:
            layout, batch = self._buffers.layout, self._batch
            prefixes = [
                prefix
                for prefix in common_prefixes(batch, layout.block_size)
                if worthwhile(prefix, batch, layout, num_qo_heads)
            ]
            cascade = Cascade(self._backend, layout, batch, num_qo_heads, prefixes) if prefixes else None
            self._cascades[num_qo_heads] = cascade
        return self._cascades[num_qo_heads]


class Step:
    """The new tokens of a ragged batch of sequences, packed one sequence after the other.

    Made by `PagedKVCache.step`. Write every layer once, in order, and attend after each write::

        step = cache.step(ids, num_new_tokens)
        for layer in range(num_layers):
            step.write(k, v, layer=layer)
            out = step.attend(q, layer=layer)

    The sequences' lengths move when the last layer is written; a step that is dropped before that leaves
    them as they were, and the next step begins where it began. Blocks that it booked stay with the
    sequences, which fill them later or give them back with `truncate` or when they finish.

    Attributes
    ----------
    seq_ids : list of int
    batch : Batch
        ``block_table``, ``seq_lens`` (with the new tokens) and ``query_start_loc``.
    """

    def __init__(
        self,
        backend: Backend,
        buffers: Buffers,
        pool: BlockPool,
        seq_ids: Any,
        num_new_tokens: Any,
        token_ids: Any = None,
    ) -> None:
        self._token_ids = None if token_ids is None else _checked_tokens(token_ids, num_new_tokens)
        self.batch = pool.book(seq_ids, num_new_tokens, lambda pairs: backend.copy_blocks(buffers, pairs))
        self.seq_ids = np.asarray(seq_ids).tolist()
        self._booking = pool.bookings(self.seq_ids)
        self._version = pool.version  # of the pool, when this step was last found to be the latest
        self._backend = backend
        self._buffers = buffers
        self._pool = pool
        self._placed = backend.place(self.batch)
        widest_window = pool.widest_window(self.seq_ids, self.batch)
        self._attention = BatchAttention(backend, buffers, self.batch, self._placed, widest_window)
        self._next_layer = 0

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences together (T)."""
        return self.batch.num_tokens

    def covers(self, layer: int) -> bool:
        """Whether the new tokens of a layer have been written."""
        return layer < self._next_layer

    def is_latest(self) -> bool:
        """Whether none of the sequences was changed by anything else since; raises if one is finished."""
        version = self._pool.version
        if version != self._version:
            if (self._pool.bookings(self.seq_ids) != self._booking).any():
                return False
            self._version = version
        return True

    def write(self, k: Any, v: Any, *, layer: int = 0) -> None:
        """Store the keys and values of a layer.

        Parameters
        ----------
        k, v : (T, H, D) float32, float16, float64 or bfloat16
            Packed: sequence by sequence, in the order of the ids.
        layer : int
            Layers are written in order.

        Raises
        ------
        ValueError
            A shape is not as above, a quantised format is given a value that is not finite, the layer is
            not the next one, or the sequences have changed since the step was made.
        """
        layout = self._buffers.layout
        shape = (self.num_tokens, layout.num_kv_heads, layout.head_dim)
        k, v = arguments.new_tokens(("k", "v"), k, v, shape, "T H D", layout, self._backend)
        self._write_views(k[None], v[None], layer)

    def _write_views(self, k: Any, v: Any, layer: int) -> None:
        """`write` for checked views (B, n, H, D)."""
        num_layers = self._buffers.layout.num_layers
        layer = arguments.layer_index(layer, num_layers)
        if layer != self._next_layer:
            due = (
                f"layer {self._next_layer}" if self._next_layer < num_layers else "none, the step is complete"
            )
            raise ValueError(f"layer: layers are written in order, next is {due}; got {layer}")
        self._require_latest()
        if k.size:
            self._backend.write(self._buffers, layer, k, v, self._placed)
        self._next_layer += 1
        if self._next_layer == num_layers:
            self._pool.commit(self.seq_ids, self.batch, self._token_ids)

    def _require_latest(self) -> None:
        if not self.is_latest():
            raise ValueError("step: its sequences have moved on since it was made; make a new one")

    def prepare(self, q: Any, **options: Unpack[AttentionOptions]) -> None:
        """Compile, plan and upload now what the calls of this step would when they first need it.

        After it, `write` and `attend` on a GPU do nothing but start kernels, which a CUDA graph can capture.

        Parameters
        ----------
        q : (T, Hq, D)
            Like the queries to come, and on the same device; keys and values are to come in its precision.
        **options
            Those that `attend` will be given.
        """
        layout = self._buffers.layout
        query = arguments.queries(
            "q", q, (self.num_tokens, None, layout.head_dim), "T Hq D", 1, layout.num_kv_heads, self._backend
        )
        self._attention.prepare(query[None], options)

    def attend(self, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]) -> Any:
        """Causal attention of the new tokens over their sequences, straight out of the storage.

        New token i of a sequence with n new ones sees positions up to ``seq_len - n + i``. Blocks with which
        several sequences begin are read once for all of them, where that is faster. Extra memory is
        O(T * Hq * D + threads * tile), whatever the cached length.

        Parameters
        ----------
        q : (T, Hq, D) float32, float16, float64 or bfloat16
            Packed as the keys are; Hq is a multiple of H.
        layer : int
            One that has been written.
        **options
            See `AttentionOptions`.

        Returns
        -------
        out : (T, Hq, D), in the precision of q (float64: float32)
        lse : (T, Hq) float32
            With ``return_lse``.
        """
        layout = self._buffers.layout
        layer = arguments.layer_index(layer, layout.num_layers)
        query = arguments.queries(
            "q", q, (self.num_tokens, None, layout.head_dim), "T Hq D", 1, layout.num_kv_heads, self._backend
        )
        if not self.covers(layer):
            raise ValueError(f"layer: layer {layer} of this step has not been written yet")
        self._require_latest()  # otherwise blocks of its sequences may be others' by now
        out, lse = arguments.results(query, options)
        self._attention.attend(layer, query[None], out[None], lse[None], options, q)
        return arguments.returned(q, out, lse, options)

    def get_kv(self, *, layer: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Copies of a layer's keys and values, the new tokens included: (H, T, D) float32 twice a sequence.

        As `PagedKVCache.get_kv`, also before the later layers are written.
        """
        layer = arguments.layer_index(layer, self._buffers.layout.num_layers)
        if not self.covers(layer):
            raise ValueError(f"layer: layer {layer} of this step has not been written yet")
        pairs = []
        for row, seq_id in enumerate(self.seq_ids):
            first = self._pool.first_position(seq_id)
            table = self.batch.block_table[row : row + 1, first // self._pool.block_size :]
            length = int(self.batch.seq_lens[row]) - first
            k, v = self._backend.read(self._buffers, layer, np.ascontiguousarray(table), length)
            pairs.append((k[0], v[0]))
        return pairs

    def __repr__(self) -> str:
        return (
            f"Step(sequences={len(self.seq_ids)}, new_tokens={self.num_tokens}, "
            f"layers_written={self._next_layer}/{self._buffers.layout.num_layers})"
        )


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
