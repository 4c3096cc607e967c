"""Parts of a batch whose sequences begin with the same blocks: these are read once for all of them.

After cascade inference (Ye et al., FlashInfer, 2024): the new tokens of all sequences with a common prefix attend to it
as one part, and each to the rest of its own sequence as another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvnumba.backends.protocol import CascadeLimits
from kvnumba.storage import Batch, Buffers, Layout, Part


class Prefix(NamedTuple):
    """Sequences of a batch whose first blocks are the same."""

    sequences: np.ndarray
    num_blocks: int


def split_prefixes(buffers: Buffers, batch: Batch, num_qo_heads: int, limits: CascadeLimits) -> list[Part]:
    """Split a batch into common prefixes and the rest of each sequence, where that is faster."""
    layout = buffers.layout
    prefixes = [
        prefix
        for prefix in common_prefixes(batch)
        if worthwhile(prefix, batch, layout, num_qo_heads // layout.num_kv_heads, limits)
    ]
    if not prefixes:
        return [Part(buffers, batch)]
    skipped = np.zeros(len(batch.seq_lens), np.int32)
    shared = []
    for prefix in prefixes:
        shared.append(_prefix_part(buffers, batch, prefix))
        skipped[prefix.sequences] = prefix.num_blocks
    tokens = skipped * np.int32(layout.block_size)
    rest = Batch(
        _shift(batch.block_table, skipped),
        batch.seq_lens - tokens,
        batch.query_start_loc,
        batch.block_size,
        batch.positions - tokens,
    )
    return [Part(buffers, rest), *shared]


def common_prefixes(batch: Batch) -> list[Prefix]:
    """Groups of sequences that begin with the same blocks, chosen so that the fewest blocks are read twice."""
    first = batch.block_table[:, :1].ravel().tolist()
    if len(set(first)) == len(first):  # mostly, and a tenth of the time of what follows
        return []
    new = np.diff(batch.query_start_loc)
    limits = np.where(new > 0, np.minimum(batch.positions, batch.seq_lens) // batch.block_size, 0)
    return _best(batch.block_table, limits, np.flatnonzero(limits > 0), 0)[1]


def worthwhile(prefix: Prefix, batch: Batch, layout: Layout, group: int, limits: CascadeLimits) -> bool:
    """Whether reading a prefix once saves more than a part of its own costs; `group` query heads share a KV head."""
    rows = np.diff(batch.query_start_loc)[prefix.sequences] * group
    reads = (-(-rows // limits.tile_rows)).sum() - -(-rows.sum() // limits.tile_rows)
    num_bytes = prefix.num_blocks * layout.block_size * layout.bytes_per_token() // layout.num_layers
    return bool(rows.sum() >= limits.min_rows and reads > 0 and num_bytes >= limits.min_bytes)


def _prefix_part(buffers: Buffers, batch: Batch, prefix: Prefix) -> Part:
    """The new tokens of the prefix's sequences, as those of one sequence that come after all of the prefix."""
    start = batch.query_start_loc
    tokens = np.concatenate([np.arange(start[s], start[s + 1], dtype=np.int32) for s in prefix.sequences])
    length = np.array([prefix.num_blocks * batch.block_size], np.int32)
    blocks = np.ascontiguousarray(batch.block_table[prefix.sequences[:1], : prefix.num_blocks])
    query_start_loc = np.array([0, len(tokens)], np.int32)
    return Part(buffers, Batch(blocks, length, query_start_loc, batch.block_size, length), tokens)


def _best(
    table: np.ndarray, limits: np.ndarray, sequences: np.ndarray, column: int
) -> tuple[int, list[Prefix]]:
    """The best grouping of sequences that agree in the columns before `column`, and how many reads it saves."""
    saved, prefixes = 0, []
    blocks, counts = np.unique(table[sequences, column], return_counts=True)
    for block in blocks[counts > 1]:
        members = sequences[table[sequences, column] == block]
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


def _shift(table: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Each row of a table without its first columns, as many as are given for it."""
    width = table.shape[1]
    return np.take_along_axis(table, np.minimum(np.arange(width) + columns[:, None], width - 1), axis=1)
