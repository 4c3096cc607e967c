"""Attention of a batch whose sequences begin with the same blocks: these are read once for all of them.

After cascade inference (Ye et al., FlashInfer, 2024): the queries of all sequences attend to the common prefix
as if they were the heads of one token after it, each sequence's own to the rest, and `merge_states` combines
the two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kvnumba.attention.merging import merge_states
from kvnumba.backends.protocol import Backend
from kvnumba.storage import Batch, Buffers, Layout, Scoring

TILE = 64  # rows of queries that backends attend to at once: more of them read the keys again
MIN_ROWS = 8  # rows with which a common prefix is worth a call of its own
MIN_BYTES = 1 << 25  # of a layer's prefix: what is smaller stays in the processor's cache between the reads


class Prefix(NamedTuple):
    """Sequences of a batch whose first blocks are the same."""

    sequences: np.ndarray
    num_blocks: int


def common_prefixes(batch: Batch, block_size: int) -> list[Prefix]:
    """Disjoint sets of sequences with the blocks that all new tokens of each set see, such that most is shared."""
    new = np.diff(batch.query_start_loc)
    limits = np.where(new > 0, (batch.seq_lens - new) // block_size, 0)
    return _best(batch.block_table, limits, np.flatnonzero(limits > 0), 0)[1]


def _best(
    table: np.ndarray, limits: np.ndarray, sequences: np.ndarray, column: int
) -> tuple[int, list[Prefix]]:
    """The blocks that need not be read again, and how, for sequences that agree in the columns before."""
    saved, prefixes = 0, []
    for block in np.unique(table[sequences, column]):
        members = sequences[table[sequences, column] == block]
        if len(members) > 1:
            width = int(limits[members].min())
            same = (table[members, column:width] == table[members[0], column:width]).all(axis=0)
            end = width if same.all() else column + int(same.argmin())
            best = ((len(members) - 1) * end, [Prefix(members, end)])
            deeper = members[limits[members] > end]
            if len(deeper) > 1:
                best = max(best, _best(table, limits, deeper, end), key=lambda choice: choice[0])
            saved += best[0]
            prefixes += best[1]
    return saved, prefixes


class Cascade:
    """How a batch attends to its common prefixes, for queries of one number of heads.

    Parameters
    ----------
    batch : Batch
    prefixes : list of Prefix
        Not empty.
    """

    def __init__(
        self, backend: Backend, layout: Layout, batch: Batch, num_qo_heads: int, prefixes: list[Prefix]
    ) -> None:
        self._backend = backend
        self._shared: list[tuple[np.ndarray, Any]] = []  # packed tokens and the plan of what they attend to
        skipped = np.zeros(len(batch.seq_lens), np.int32)
        new = np.diff(batch.query_start_loc)
        for sequences, num_blocks in prefixes:
            tokens = np.concatenate([np.arange(new[s]) + batch.query_start_loc[s] for s in sequences])
            prefix = Batch.of(
                np.ascontiguousarray(batch.block_table[sequences[:1], :num_blocks]),
                np.array([num_blocks * layout.block_size], np.int32),
                np.array([1]),
                layout.block_size,
            )
            plan = backend.plan(layout, backend.place(prefix), len(tokens) * num_qo_heads, -1)
            self._shared.append((tokens, plan))
            skipped[sequences] = num_blocks
        rest = Batch(
            _shift(batch.block_table, skipped),
            batch.seq_lens - skipped * layout.block_size,
            batch.query_start_loc,
            layout.block_size,
        )
        self._rest = backend.plan(layout, backend.place(rest), num_qo_heads, -1)

    def attend(
        self, buffers: Buffers, layer: int, q: np.ndarray, scoring: Scoring, out: np.ndarray, lse: np.ndarray
    ) -> None:
        """As `Backend.attend`, for views (1, T, Hq, D)."""
        self._backend.attend(buffers, layer, q, self._rest, scoring, out, lse)
        _, _, num_qo_heads, head_dim = q.shape
        num_kv_heads = buffers.layout.num_kv_heads
        without_sinks = replace(scoring, sinks=None)  # the rest counts them
        for tokens, plan in self._shared:
            by_head = (len(tokens), num_kv_heads, num_qo_heads // num_kv_heads)
            stacked = q[0, tokens].reshape(*by_head, head_dim).swapaxes(0, 1)
            query = np.ascontiguousarray(stacked).reshape(1, 1, -1, head_dim)
            shared_out = np.empty(query.shape, np.float32)
            shared_lse = np.empty(query.shape[:3], np.float32)
            self._backend.attend(buffers, layer, query, plan, without_sinks, shared_out, shared_lse)
            shared_out = shared_out.reshape(stacked.shape).swapaxes(0, 1).reshape(-1, num_qo_heads, head_dim)
            shared_lse = shared_lse.reshape(stacked.shape[:3]).swapaxes(0, 1).reshape(-1, num_qo_heads)
            out[0, tokens], lse[0, tokens] = merge_states(
                (shared_out, out[0, tokens]), (shared_lse, lse[0, tokens])
            )


def worthwhile(prefix: Prefix, batch: Batch, layout: Layout, num_qo_heads: int) -> bool:
    """Whether reading a prefix once saves more than the second call and the merge cost."""
    rows = np.diff(batch.query_start_loc)[prefix.sequences] * (num_qo_heads // layout.num_kv_heads)
    reads = (-(-rows // TILE)).sum() - -(-rows.sum() // TILE)
    tokens = prefix.num_blocks * layout.block_size
    size = tokens * layout.bytes_per_token() // layout.num_layers
    return bool(rows.sum() >= MIN_ROWS and reads > 0 and size >= MIN_BYTES)


def _shift(table: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Each row of a table without its first columns, as many as are given for it."""
    width = table.shape[1]
    return np.take_along_axis(table, np.minimum(np.arange(width) + columns[:, None], width - 1), axis=1)
