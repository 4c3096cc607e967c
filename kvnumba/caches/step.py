"""One forward pass over some sequences: booked once, then written and attended layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments, arrays
from kvnumba.attention import passes
from kvnumba.attention.passes import Pass, as_returned, room_for_results
from kvnumba.backends.protocol import Backend, Decoding
from kvnumba.blocks.kept import positions_at
from kvnumba.blocks.pool import BlockPool
from kvnumba.caches.recent import RecentTokens
from kvnumba.options import AttentionOptions, Scoring
from kvnumba.storage import Batch, Buffers

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    """

    def __init__(
        self,
        backend: Backend,
        buffers: Buffers,
        pool: BlockPool,
        recent: RecentTokens | None,
        seq_ids: list[int],
        batch: Batch,
        token_ids: list[np.ndarray | None] | None,
    ) -> None:
        self.seq_ids = seq_ids
        self._backend = backend
        self._buffers = buffers
        self._pool = pool
        self._recent = recent
        self._token_ids = token_ids
        self._generations = pool.generations(seq_ids)
        self._version = pool.version  # of the pool, when this step was last found to be the latest
        floats = None if recent is None else recent.book(pool.rows(seq_ids), batch)
        self._kept = pool.kept_of(seq_ids)
        widest = pool.widest_window(seq_ids, batch)
        self._pass = Pass(backend, buffers, batch, widest, floats=floats, kept=self._kept)

    @property
    def batch(self) -> Batch:
        """``block_table``, ``seq_lens`` (with the new tokens) and ``query_start_loc``."""
        return self._pass.batch

    @property
    def positions(self) -> np.ndarray:
        """Where each new token stands in its sequence, (T,) int32: what rotary embeddings need.

        Tokens that `PagedKVCache.keep` has dropped count here, though not in ``batch.positions``.
        """
        batch = self.batch
        first = batch.positions
        if self._kept is not None:
            pairs = zip(self._kept, first.tolist(), strict=True)
            first = np.array([positions_at(kept, slot) for kept, slot in pairs], np.int32)
        first = first - batch.query_start_loc[:-1]
        return np.arange(self.num_tokens, dtype=np.int32) + np.repeat(first, np.diff(batch.query_start_loc))

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences together (T)."""
        return self.batch.num_tokens

    def covers(self, layer: int) -> bool:
        """Whether the new tokens of a layer have been written."""
        return self._pass.covers(layer)

    def is_latest(self) -> bool:
        """Whether none of the sequences was changed by anything else since; raises if one is finished."""
        version = self._pool.version
        if version != self._version:
            if self._pool.generations(self.seq_ids) != self._generations:
                return False
            self._version = version
        return True

    def write(self, k: Any, v: Any, *, layer: int = 0) -> None:
        """Store the keys and values of a layer.

        Parameters
        ----------
        k : (T, H, D) float32, float16, float64 or bfloat16
        v : (T, H, Dv)
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
        shape = (self.num_tokens, layout.num_kv_heads)
        k, v = arrays.new_tokens(("k", "v"), k, v, shape, "T H D", layout, self._backend)
        self.write_views(k[None], v[None], arguments.layer_index(layer, layout.num_layers))

    def write_views(self, k: Any, v: Any, layer: int) -> None:
        """`write` for checked views (B, n, H, D) and a checked layer."""
        self.require_next(layer)
        self._pass.write(layer, k, v)
        self._commit()

    def _commit(self) -> None:
        """Let the sequences hold the new tokens, if all layers do."""
        if self._pass.complete:
            with self._pool.lock:
                self._require_latest()  # while it was written, blocks may have been lost
                if self._recent is not None and self._pass.floats is not None:
                    self._recent.commit(self._pass.floats)  # first: only this can fail
                self._pool.commit(self.seq_ids, self.batch, self._token_ids)

    def decoding(self, q: Any, k: Any, v: Any, scoring: Scoring) -> Decoding | None:
        """`write` and `attend` in one call, see `Backend.decoding`, for packed arrays on a GPU that lie as these do."""
        layout = self._buffers.layout
        shape = (self.num_tokens, layout.num_kv_heads)
        k, v = arrays.new_tokens(("k", "v"), k, v, shape, "T H D", layout, self._backend)
        return self._pass.decoding(self._queries(q)[None], k[None], v[None], scoring)

    def follow(self, decoding: Decoding, num_qo_heads: int, scoring: Scoring, stream: int) -> bool:
        """Let a decoding of an earlier step of these sequences be this one's; False if it is of no use any more."""
        return self._pass.follow(decoding, num_qo_heads, scoring, stream)

    def require_next(self, layer: int) -> None:
        """Raise unless a layer is the next to be written."""
        self._pass.require_next(layer)
        self._require_latest()

    def written(self, layer: int) -> None:
        """Know that a decoding has written the next layer."""
        self._pass.next_layer = layer + 1
        self._commit()

    def _require_latest(self) -> None:
        if not self.is_latest():
            raise ValueError("step: its sequences have moved on since it was made; make a new one")

    def prepare(self, q: Any, **options: Unpack[AttentionOptions]) -> None:
        """Compile, plan and upload now, instead of at this step's first `write` and `attend`.

        After it, `write` and `attend` on a GPU do nothing but start kernels, which a CUDA graph can capture.

        Parameters
        ----------
        q : (T, Hq, D)
            Like the queries to come, and on the same device; keys and values are to come in its precision.
        **options
            Those that `attend` will be given.
        """
        self._pass.prepare(self._queries(q)[None], options)

    def attend(self, q: Any, *, layer: int = 0, **options: Unpack[AttentionOptions]) -> Any:
        """Causal attention of the new tokens over their sequences, straight out of the storage.

        New token i of a sequence with n new ones sees positions up to ``seq_len - n + i``. Blocks with which
        several sequences begin are read once for all of them, where that is faster. Extra memory is
        O(T * Hq * D + threads * tile), whatever the cached length; O(S) more with `return_mass`.

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
        out : (T, Hq, Dv), in the precision of q (float64: float32)
        lse : (T, Hq) float32
            With ``return_lse``.
        mass : list of (H, S) float32, or (H, blocks)
            With ``return_mass``: of each sequence, new tokens included.
        """
        layout = self._buffers.layout
        layer = arguments.layer_index(layer, layout.num_layers)
        query = self._queries(q)
        self._pass.require_written(layer)
        self._require_latest()  # otherwise blocks of its sequences may be others' by now
        out, lse = room_for_results(self._backend, query, layout.value_head_dim, options)
        views = (query[None], out[None], lse[None])
        mass = self._pass.attend(layer, *views, options, getattr(q, "dtype", None))
        return as_returned(q, out, lse, self._pass.masses(mass, options), options)

    def _queries(self, q: Any) -> Any:
        layout = self._buffers.layout
        shape = (self.num_tokens, None, layout.head_dim)
        return arrays.queries("q", q, shape, "T Hq D", 1, layout.num_kv_heads, self._backend)

    def get_kv(self, *, layer: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Copies of a layer's keys (H, T, D) and values (H, T, Dv) of each sequence, float32, new tokens included.

        As `PagedKVCache.get_kv`, also before the later layers are written.
        """
        layer = arguments.layer_index(layer, self._buffers.layout.num_layers)
        self._pass.require_written(layer)
        pairs = []
        for row, seq_id in enumerate(self.seq_ids):
            first = self._pool.first_position(seq_id)
            table = self.batch.block_table[row : row + 1, first // self._pool.block_size :]
            length = int(self.batch.seq_lens[row]) - first
            k, v = passes.read(
                self._backend,
                self._buffers,
                layer,
                np.ascontiguousarray(table),
                length,
                self._pass.floats,
                row,
                first,
            )
            pairs.append((k[0], v[0]))
        return pairs

    def __repr__(self) -> str:
        return (
            f"Step(sequences={len(self.seq_ids)}, new_tokens={self.num_tokens}, "
            f"layers_written={self._pass.next_layer}/{self._buffers.layout.num_layers})"
        )
