"""One forward pass over some sequences: booked once, then written and attended layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments
from kvnumba.arguments import AttentionOptions
from kvnumba.backends.protocol import Backend
from kvnumba.blocks import BlockPool
from kvnumba.storage import Buffers

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BatchAttention:
    """Attention of one batch over all layers: what does not depend on the layer is planned once.

    Internal: queries come as views (B, n, Hq, D) and are checked already.
    """

    def __init__(self, backend: Backend, buffers: Buffers, placed: Any) -> None:
        self._backend = backend
        self._buffers = buffers
        self._placed = placed
        self._plans: dict[tuple[int, int], Any] = {}

    def attend(self, layer: int, q: Any, out: Any, lse: Any, options: AttentionOptions) -> None:
        """Write the attention of q into views `out`, shaped like q, and `lse` (B, n, Hq)."""
        layout = self._buffers.layout
        num_qo_heads = q.shape[2]
        scoring = arguments.scoring(options, num_qo_heads, layout.head_dim)
        if q.size:
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


class Step:
    """The new tokens of a ragged batch of sequences, packed one sequence after the other.

    Made by `PagedKVCache.step`. Write every layer once, in order, and attend after each write::

        step = cache.step(ids, num_new_tokens)
        for layer in range(num_layers):
            step.write(k, v, layer=layer)
            out = step.attend(q, layer=layer)

    The sequences' lengths move when the last layer is written; a step that is dropped before that leaves
    them as they were, and the next step begins where it began. Blocks that it booked stay with the
    sequences, which fill them later or give them back when they finish.

    Attributes
    ----------
    seq_ids : list of int
    batch : Batch
        ``block_table``, ``seq_lens`` (with the new tokens) and ``query_start_loc``.
    """

    def __init__(
        self, backend: Backend, buffers: Buffers, pool: BlockPool, seq_ids: Any, num_new_tokens: Any
    ) -> None:
        self.batch = pool.book(seq_ids, num_new_tokens)
        self.seq_ids = np.asarray(seq_ids).tolist()
        self._booking = pool.bookings(self.seq_ids)
        self._version = pool.version  # of the pool, when this step was last found to be the latest
        self._backend = backend
        self._buffers = buffers
        self._pool = pool
        self._placed = backend.place(self.batch)
        self._attention = BatchAttention(backend, buffers, self._placed)
        self._next_layer = 0

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences together (T)."""
        return self.batch.num_tokens

    def covers(self, layer: int) -> bool:
        """Whether the new tokens of a layer have been written."""
        return layer < self._next_layer

    def is_latest(self) -> bool:
        """Whether none of the sequences has been booked by another step since; raises if one is finished."""
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
        if not self.is_latest():
            raise ValueError("step: its sequences have moved on since it was made; make a new one")
        if k.size:
            self._backend.write(self._buffers, layer, k, v, self._placed)
        self._next_layer += 1
        if self._next_layer == num_layers:
            self._pool.commit(self.seq_ids, self.batch)

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

        New token i of a sequence with n new ones sees positions up to ``seq_len - n + i``. Extra memory is
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
        if self._pool.version != self._version:
            self._pool.rows(self.seq_ids)  # raises if one is finished: its blocks may be another's by now
        out, lse = arguments.results(query, options)
        self._attention.attend(layer, query[None], out[None], lse[None], options)
        return arguments.returned(q, out, lse, options)

    def __repr__(self) -> str:
        return (
            f"Step(sequences={len(self.seq_ids)}, new_tokens={self.num_tokens}, "
            f"layers_written={self._next_layer}/{self._buffers.layout.num_layers})"
        )
