"""A forward pass over some sequences of a `PerHeadKVCache`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvnumba import arguments, arrays
from kvnumba.attention.passes import Pass, as_returned
from kvnumba.backends.protocol import Backend
from kvnumba.blocks.pool import BlockPool
from kvnumba.options import AttentionOptions, Scoring, scoring_of
from kvnumba.storage import Batch, Buffers, Layout

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        backend: Backend,
        buffers: Buffers,
        pool: BlockPool,
        layout: Layout,
        seq_ids: list[int],
        heads: np.ndarray,
        batch: Batch,
        new: np.ndarray,
        *,
        written: bool = False,
    ) -> None:
        self.seq_ids = seq_ids
        self.num_new_tokens: list[int] = new.tolist()
        self._backend, self._buffers, self._pool = backend, buffers, pool
        self._layout = layout  # of all heads and layers
        self._batch = batch
        self._booked = not written  # all layers will be attended to
        self._heads = heads  # (num_layers, B * H)
        first = np.array(
            [self._pool.next_position(head) for head in heads[0, :: layout.num_kv_heads].tolist()], np.int64
        )
        begin = np.cumsum(new) - new
        turn = np.arange(int(new.sum())) - np.repeat(begin, new)
        self.positions = (np.repeat(first - new * written, new) + turn).astype(np.int32)
        self._order = None if (new <= 1).all() else _order(new, begin, layout.num_kv_heads)
        self._generations = self._pool.generations(heads.ravel().tolist())
        self._version = self._pool.version
        each = heads.shape[1]
        self._kept = kept = self._pool.kept_of(heads.ravel())
        self._passes = []
        for layer in range(len(heads)):
            rows = slice(layer * each, (layer + 1) * each)
            self._passes.append(
                Pass(
                    backend,
                    buffers,
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

    @property
    def complete(self) -> bool:
        """Whether all layers have been written."""
        return self._passes[-1].complete

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
        layout = self._layout
        shape = (self.num_tokens, layout.num_kv_heads)
        k, v = arrays.new_tokens(("k", "v"), k, v, shape, "T H D", layout, self._backend)
        arrays.require_host("k", k)
        layer = arguments.layer_index(layer, layout.num_layers)
        due = next((n for n, each in enumerate(self._passes) if not each.complete), None)
        if layer != due:
            expected = "none, the pass is complete" if due is None else f"layer {due}"
            raise ValueError(f"layer: layers are written in order, next is {expected}; got {layer}")
        self._require_latest()
        self._passes[layer].write(0, self._by_head(k, 1), self._by_head(v, 1))
        if layer == layout.num_layers - 1:
            with self._pool.lock:  # another thread may have changed the sequences meanwhile
                self._require_latest()
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
        layout = self._layout
        layer = arguments.layer_index(layer, layout.num_layers)
        shape = (self.num_tokens, None, layout.head_dim)
        query = arrays.queries("q", q, shape, "T Hq D", 1, layout.num_kv_heads, self._backend)
        arrays.require_host("q", query)
        if not self.covers(layer):
            raise ValueError(f"layer: the new tokens of layer {layer} have not been written yet")
        self._require_latest()
        num_qo_heads = query.shape[1]
        group = num_qo_heads // layout.num_kv_heads
        scoring = scoring_of(options, num_qo_heads, layout.head_dim)
        if scoring.of_positions is not None:
            raise ValueError(f"{scoring.of_positions}: expected None, heads may hold different tokens")
        dtype = getattr(q, "dtype", None)
        if scoring.sinks is not None and options.get("return_mass"):
            return self._attend_head_by_head(layer, query, scoring, options, dtype)
        rows = self._by_head(query, group)
        out = np.empty((*rows.shape[:-1], layout.value_head_dim), np.float32)
        lse = np.empty(rows.shape[:-1], np.float32)
        # each query head has its own sink, and is the same head of a KV head of its own here: sinks come afterwards
        alone: AttentionOptions = {
            "scoring": scoring if scoring.sinks is None else replace(scoring, sinks=None),
            "return_mass": options.get("return_mass"),
        }
        if self._booked and layer == 0:
            # together, for between layers the keys sweep what planning needs out of the processor's caches
            for each in self._passes:
                each.plan_ahead(rows, alone, dtype)
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
        size = layout.num_kv_heads
        return out, lse, [of_heads[first : first + size] for first in range(0, len(of_heads), size)]

    def _attend_head_by_head(
        self, layer: int, query: np.ndarray, scoring: Scoring, options: AttentionOptions, dtype: Any
    ) -> tuple[np.ndarray, np.ndarray, list[list[np.ndarray]]]:
        """`_attend` for masses of queries (T, Hq, D) with sinks, which these cannot be given afterwards."""
        layout, batch = self._layout, self._passes[layer].batch
        num_tokens, num_qo_heads, _ = query.shape
        num_heads, each = layout.num_kv_heads, len(batch.seq_lens)
        group = num_qo_heads // num_heads
        out = np.empty((num_heads, 1, num_tokens, group, layout.value_head_dim), np.float32)
        lse = np.empty((num_heads, 1, num_tokens, group), np.float32)
        of_heads = []
        for head in range(num_heads):
            rows, heads = np.arange(head, each, num_heads), slice(head * group, (head + 1) * group)
            new = np.diff(batch.query_start_loc)[rows]
            of_head = Pass(
                self._backend,
                self._buffers,
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
