"""The block pool: which blocks are free, which sequence holds which, how long each is. Integers only."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np

from kvnumba import arguments
from kvnumba.errors import CacheFull
from kvnumba.storage import Batch


class BlockPool:
    """Books blocks for sequences, all or nothing, without a Python loop over sequences or tokens.

    A live sequence has a row in the tables. Its id is the row plus a multiple of ``max_num_seqs`` that grows
    each time the row is given away, so an id is never used twice and a stale one is always noticed.
    """

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self._free_blocks = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # a stack
        self.num_free_blocks = num_blocks
        self._free_rows = deque(range(max_num_seqs))  # first in, first out: ids of short-lived sequences age
        self._next_id = np.arange(max_num_seqs)
        self._id = np.full(max_num_seqs, -1)
        self._table = np.zeros((max_num_seqs, 1), np.int32)
        self._held = np.zeros(max_num_seqs, np.int32)
        self._length = np.zeros(max_num_seqs, np.int32)
        self._bookings = np.zeros(max_num_seqs, np.int64)
        self._lock = threading.Lock()
        self.version = 0
        """Another number after every booking and every end of a sequence."""

    def add(self) -> int:
        """Give a new sequence a row; returns its id."""
        with self._lock:
            if not self._free_rows:
                raise CacheFull(f"max_num_seqs={self.max_num_seqs} sequences are live already")
            row = self._free_rows.popleft()
            self._id[row] = self._next_id[row]
            self._next_id[row] += self.max_num_seqs
            return int(self._id[row])

    def finish(self, seq_id: int) -> None:
        """Take back a sequence's blocks and its row."""
        with self._lock:
            row = self.rows([seq_id])[0]
            held = self._held[row]
            # pushed in reverse: the next sequence is given them in the same order
            self._free_blocks[self.num_free_blocks : self.num_free_blocks + held] = self._table[row, :held][
                ::-1
            ]
            self.num_free_blocks += int(held)
            self.version += 1
            self._id[row] = -1
            self._held[row] = 0
            self._length[row] = 0
            self._free_rows.append(int(row))

    def rows(self, seq_ids: Any) -> np.ndarray:
        """The rows of live sequences; raises ValueError for an id that is none."""
        ids = arguments.integers("seq_ids", seq_ids)
        rows = ids % self.max_num_seqs
        dead = (ids < 0) | (self._id[rows] != ids)
        if dead.any():
            seq_id = int(ids[dead][0])
            finished = 0 <= seq_id < self._next_id[seq_id % self.max_num_seqs]
            raise ValueError(f"seq_id: sequence {seq_id} is {'finished' if finished else 'unknown'}")
        return rows

    def lengths(self, seq_ids: Any) -> np.ndarray:
        """Tokens that sequences hold, (B,) int32."""
        return self._length[self.rows(seq_ids)]

    def bookings(self, seq_ids: Any) -> np.ndarray:
        """How often each sequence's row was booked, (B,): a number that a later `book` makes stale."""
        return self._bookings[self.rows(seq_ids)]

    def blocks(self, seq_id: int) -> np.ndarray:
        """The block ids of a sequence, in order."""
        row = self.rows([seq_id])[0]
        return self._table[row, : self._held[row]].copy()

    def live(self) -> dict[int, int]:
        """Id -> length of every live sequence, in the order of the ids."""
        with self._lock:
            rows = np.flatnonzero(self._id >= 0)
            rows = rows[np.argsort(self._id[rows])]
            return dict(zip(self._id[rows].tolist(), self._length[rows].tolist(), strict=True))

    def view(self, seq_ids: Any, seq_lens: Any, num_queries: Any) -> Batch:
        """The batch of the last `num_queries` of the first `seq_lens` tokens that sequences have blocks for."""
        return self._batch(self.rows(seq_ids), np.asarray(seq_lens, np.int32), np.asarray(num_queries))

    def book(self, seq_ids: Any, num_new_tokens: Any) -> Batch:
        """Give sequences the blocks that their new tokens need; their lengths stay until `commit`."""
        with self._lock:
            rows = self.rows(seq_ids)
            new = arguments.integers("num_new_tokens", num_new_tokens, length=len(rows))
            if len(set(rows.tolist())) != len(rows):
                raise ValueError(f"seq_ids: expected each sequence once; got {list(seq_ids)}")
            if (new < 0).any():
                raise ValueError(f"num_new_tokens: expected 0 or more; got {new[new < 0][0]}")
            total = self._length[rows] + new
            missing = np.maximum(-(-total // self.block_size) - self._held[rows], 0)
            needed = int(missing.sum())
            if needed > self.num_free_blocks:
                raise CacheFull(
                    f"{needed} more blocks of {self.block_size} tokens are needed, "
                    f"{self.num_free_blocks} of {self.num_blocks} are free"
                )
            if needed:
                self._take(rows, missing, needed)
            self._bookings[rows] += 1
            self.version += 1
            return self._batch(rows, total.astype(np.int32), new)

    def commit(self, seq_ids: Any, batch: Batch) -> None:
        """Make the new tokens of a booked batch part of their sequences."""
        self._length[self.rows(seq_ids)] = batch.seq_lens

    def _take(self, rows: np.ndarray, missing: np.ndarray, needed: int) -> None:
        width = int((self._held[rows] + missing).max())
        if width > self._table.shape[1]:
            wider = np.zeros(
                (self.max_num_seqs, min(max(width, 2 * self._table.shape[1]), self.num_blocks)), np.int32
            )
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
        owner = np.repeat(rows, missing)
        first = np.cumsum(missing) - missing
        column = np.arange(needed) - np.repeat(first - self._held[rows], missing)
        self._table[owner, column] = self._free_blocks[self.num_free_blocks - needed : self.num_free_blocks][
            ::-1
        ]
        self.num_free_blocks -= needed
        self._held[rows] += missing.astype(np.int32)

    def _batch(self, rows: np.ndarray, seq_lens: np.ndarray, num_new_tokens: np.ndarray) -> Batch:
        width = -(-int(seq_lens.max(initial=0)) // self.block_size)
        return Batch.of(self._table[rows, :width], seq_lens, num_new_tokens, self.block_size)
