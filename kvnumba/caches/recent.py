"""Tokens that are kept in float16 beside the cache's blocks: the newest of each sequence, and perhaps its first.

All tokens are in the blocks, in the cache's format. A sequence has besides a ring of small blocks for its newest ones,
after some for its first ones, which are written once. A pass attends to the keys [0, f) in the cache's format and to
[f, n) in float16, where f is `recent_tokens` before the pass. Where the ring does not reach so far back (after a prefix
was found, or a file loaded) f is nearer to n.

A pass that adds many tokens to a sequence has float blocks of its own, with what the ring has before them, and leaves
its last tokens in the ring when it is complete. So a prompt of any length can attend to itself in float. Its blocks go
when the next pass comes, and what stays is the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvnumba.attention.passes import FloatTokens
from kvnumba.backends.protocol import Backend
from kvnumba.storage import RECENT_BLOCK, RECENT_SHORT, Batch, Buffers, Layout, Part


class RecentTokens:
    """The float tokens of all sequences of a cache; a sequence is named by its row.

    Internal: arguments are checked already, and calls for one row come one at a time. Calls for different rows may come
    from different threads: they change nothing that they share.

    Parameters
    ----------
    backend : Backend
    layout : Layout
        Of the cache.
    num_rows : int
        Sequences that may be live at the same time.
    """

    def __init__(self, backend: Backend, layout: Layout, num_rows: int) -> None:
        self._backend = backend
        self._recent, self._sinks = layout.recent_tokens, layout.sink_tokens
        self._pinned, self._ring = layout.recent_blocks
        self._layout = layout.of_recent(num_rows * (self._pinned + self._ring))
        self._buffers = backend.allocate(self._layout)
        self._round = np.tile(np.arange(self._ring, dtype=np.int32), 2)  # from every block on, once round
        self._slots = np.arange(num_rows, dtype=np.int32)  # row -> whose blocks it has
        # the ring of a row holds the tokens from `begins` to `ends`; the first `num_sinks` tokens stand before it
        self._begins = np.zeros(num_rows, np.int64)
        self._ends = np.zeros(num_rows, np.int64)
        self._num_sinks = np.zeros(num_rows, np.int64)

    # Sequences come and go

    def start(self, row: int, length: int) -> None:
        """A sequence begins whose first `length` tokens are in the cache's blocks only."""
        self._begins[row] = self._ends[row] = length
        self._num_sinks[row] = 0

    def truncate(self, row: int, length: int) -> None:
        """A sequence forgets its tokens from `length` on."""
        for held in (self._begins, self._ends, self._num_sinks):
            held[row] = min(held[row], length)

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Let each row hold what a parent held before the call; only what is held twice is copied.

        If a copy fails, rows that were to be written hold nothing in float any more.
        """
        heirs = {row: parent for row, parent in zip(rows, parents, strict=True) if row != parent}
        slots = self._slots.copy()
        held = np.stack((self._begins, self._ends, self._num_sinks))
        kept = {
            parent for parent in heirs.values() if parent not in heirs
        }  # their own blocks are in use still
        unused = [slots[row] for row in heirs if row not in heirs.values()]
        copies = []
        for row, parent in heirs.items():
            if parent in kept:
                copies.append((slots[parent], unused.pop()))
                self._slots[row] = copies[-1][1]
            else:
                self._slots[row] = slots[parent]
                kept.add(parent)  # the next of its heirs gets a copy
        if copies:
            each = self._pinned + self._ring
            blocks = np.array(copies, np.int64)[:, None, :] * each + np.arange(each)[None, :, None]
            try:
                self._backend.copy_blocks(self._buffers, blocks.reshape(-1, 2))
            except BaseException:
                self._slots = slots
                for row in heirs:
                    if row not in heirs.values():
                        self.start(row, int(self._ends[row]))
                raise
        for row, parent in heirs.items():
            self._begins[row], self._ends[row], self._num_sinks[row] = held[:, parent]

    # Passes

    def book(self, rows: np.ndarray, batch: Batch) -> FloatTokens:
        """Where a batch's new tokens are written in float, and what they attend to in float.

        What the ring held in the places of new tokens is lost, even if the pass is dropped.
        """
        if len(rows) == 1 and not self._sinks:
            floats = self._book_one(int(rows[0]), batch)
            if floats is not None:
                return floats
        first, end = batch.positions.astype(np.int64), batch.seq_lens.astype(np.int64)
        held, self._num_sinks[rows] = self._held(rows, first)
        self._ends[rows] = first
        long = end - first > RECENT_SHORT
        short = ~long
        held = np.where(short, np.maximum(held, self._oldest(end)), held)
        self._begins[rows] = np.minimum(held, first)
        begin = self._first_float(self._begins[rows], first, end)
        parts = []
        if short.any():
            column = begin // RECENT_BLOCK
            table = self._table(rows, column, _width(column, end))
            parts.append(self._part(self._buffers, table, batch, column, begin, end, short))
        if long.any():
            parts.append(self._own_blocks(rows, batch, begin, end, long))
        return FloatTokens(
            batch, begin, parts, self._sink_parts(rows, self._num_sinks[rows], batch, begin), rows
        )

    def _book_one(self, row: int, batch: Batch) -> FloatTokens | None:
        """`book` of the commonest batch, a few tokens of one sequence; None if it is another one."""
        first, end = int(batch.positions[0]), int(batch.seq_lens[0])
        if not first < end <= first + RECENT_SHORT or self._ends[row] < first:
            return None
        last = (end - 1) // RECENT_BLOCK
        held = max(min(int(self._begins[row]), first), self._oldest(end))
        self._begins[row], self._ends[row] = held, first
        begin = max(held, first + 1 - self._recent)
        column = begin // RECENT_BLOCK
        before, turn = column * RECENT_BLOCK, column % self._ring
        table = self._slots[row] * self._ring + self._round[turn : turn + last - column + 1]
        newest = Batch(
            table[None],
            np.array((end - before,), np.int32),
            batch.query_start_loc,
            RECENT_BLOCK,
            np.array((first - before,), np.int32),
            np.array((begin - before,), np.int32),
            np.array((before,), np.int32),
        )
        return FloatTokens(batch, np.array((begin,)), [Part(self._buffers, newest)], [], np.array((row,)))

    def commit(self, floats: FloatTokens) -> None:
        """A pass is complete: its sequences hold its tokens, the last of a long one in the ring too."""
        rows, first, end = floats.rows, floats.batch.positions, floats.batch.seq_lens
        if len(rows) == 1 and not self._sinks and end[0] - first[0] <= RECENT_SHORT:
            self._ends[rows[0]] = end[0]
            return
        long = end - first > RECENT_SHORT
        if long.any():
            begin = np.where(long, np.maximum(floats.begin, self._oldest(end)), self._begins[rows])
            # older tokens are overwritten, even if that fails
            self._begins[rows] = np.minimum(begin, first)
            self._keep(floats, long)
            self._begins[rows] = begin
        more = self._num_sinks[rows] == np.minimum(first, self._sinks)
        self._num_sinks[rows] = np.where(more, np.minimum(end, self._sinks), self._num_sinks[rows])
        self._ends[rows] = end

    def view(self, rows: np.ndarray, batch: Batch) -> FloatTokens:
        """What tokens that all layers hold attend to in float."""
        end = batch.seq_lens.astype(np.int64)
        held, num_sinks = self._held(rows, end)
        begin = self._first_float(held, batch.positions.astype(np.int64), end)
        column = begin // RECENT_BLOCK
        table = self._table(rows, column, _width(column, end))
        part = self._part(self._buffers, table, batch, column, begin, end, begin < end)
        return FloatTokens(batch, begin, [part], self._sink_parts(rows, num_sinks, batch, begin), rows)

    # The parts of these

    def _held(self, rows: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of sequences of such lengths, the first token in the ring, and how many first ones are held besides."""
        begins = np.minimum(self._begins[rows], length)
        gap = length > self._ends[rows]  # what lies between is not here
        return np.where(gap, length, begins), np.minimum(self._num_sinks[rows], length)

    def _oldest(self, end: Any) -> Any:
        """The first position for which a ring has room, if the last one before `end` is written."""
        return ((end - 1) // RECENT_BLOCK + 1 - self._ring) * RECENT_BLOCK

    def _first_float(self, held: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The first key that new tokens from `first` on see in float, of rings that hold those from `held` on."""
        return np.minimum(np.maximum(held, first + (first < end) - self._recent), end)

    def _table(self, rows: np.ndarray, column: np.ndarray, width: int) -> np.ndarray:
        """Blocks of rows from a column on: (B, width) int32."""
        columns = column[:, None] + np.arange(width)
        within = np.where(
            columns < self._pinned, columns, self._pinned + (columns - self._pinned) % self._ring
        )
        return (self._slots[rows, None] * (self._pinned + self._ring) + within).astype(np.int32)

    def _part(
        self,
        buffers: Buffers,
        table: np.ndarray,
        batch: Batch,
        column: np.ndarray,
        begin: np.ndarray,
        end: np.ndarray,
        members: np.ndarray,
    ) -> Part:
        """The keys [begin, end) of those sequences that are members, whose blocks are listed from a column on."""
        table[~members] = -1
        before = column * RECENT_BLOCK
        return Part(
            buffers,
            Batch(
                table,
                np.where(members, end - before, 0).astype(np.int32),
                batch.query_start_loc,
                RECENT_BLOCK,
                (batch.positions - before).astype(np.int32),
                np.where(members, begin - before, 0).astype(np.int32),
                before.astype(np.int32),
            ),
        )

    def _sink_parts(
        self, rows: np.ndarray, num_sinks: np.ndarray, batch: Batch, begin: np.ndarray
    ) -> list[Part]:
        """The first tokens of sequences, where they are not among the newest."""
        end = np.minimum(num_sinks, begin)
        if not end.any():
            return []
        column = np.zeros(len(rows), np.int64)
        table = self._table(rows, column, self._pinned)
        return [self._part(self._buffers, table, batch, column, column, end, end > 0)]

    def _own_blocks(
        self, rows: np.ndarray, batch: Batch, begin: np.ndarray, end: np.ndarray, long: np.ndarray
    ) -> Part:
        """Float blocks for long passes, with what the ring has before their tokens."""
        column = begin // RECENT_BLOCK
        each = np.where(long, (end - 1) // RECENT_BLOCK - column + 1, 0)
        buffers = self._backend.allocate(replace(self._layout, num_blocks=int(each.sum())))
        width = _width(column, end)
        starts = np.cumsum(each) - each
        table = (starts[:, None] + np.arange(width)).astype(np.int32)
        ring = self._table(rows, column, width)
        earlier = np.where(long, -(-(batch.positions - column * RECENT_BLOCK) // RECENT_BLOCK), 0)
        before = np.arange(width) < earlier[:, None]
        if before.any():
            self._move(self._buffers, ring[before], buffers, table[before])
        return self._part(buffers, table, batch, column, begin, end, long)

    def _keep(self, floats: FloatTokens, long: np.ndarray) -> None:
        """Copy the last blocks of long passes, and those of first tokens, to their rings."""
        part = floats.newest[-1]  # that of the long passes
        table = part.batch.block_table
        column = floats.begin // RECENT_BLOCK
        last = (floats.batch.seq_lens - 1) // RECENT_BLOCK
        columns = column[:, None] + np.arange(table.shape[1])
        wanted = (columns > last[:, None] - self._ring) | (columns < self._pinned)
        wanted &= (columns <= last[:, None]) & long[:, None]
        ring = self._table(floats.rows, column, table.shape[1])
        self._move(part.buffers, table[wanted], self._buffers, ring[wanted])

    def _move(self, source: Buffers, blocks: np.ndarray, target: Buffers, into: np.ndarray) -> None:
        self._backend.write_blocks(target, into, *self._backend.read_blocks(source, blocks))


def _width(column: np.ndarray, end: np.ndarray) -> int:
    """Blocks of the longest run from a column to the last token."""
    return int(((end - 1) // RECENT_BLOCK - column + 1).max(initial=0))
