"""The rows of a block pool: which sequence holds which blocks, and how long it is. Integers only."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kvnumba import arguments
from kvnumba.blocks.kept import Kept, positions_at, slots_from
from kvnumba.blocks.prefix import NO_BLOCK, Chain
from kvnumba.errors import CacheFull, WorkerLost
from kvnumba.storage import Batch


class State(NamedTuple):
    """One sequence: its blocks are those from column `begin` on that hold tokens."""

    length: int
    window_left: int
    begin: int
    blocks: np.ndarray
    chain: Chain
    kept: Kept = None


class Keeping(NamedTuple):
    """What a sequence needs to drop all tokens but some.

    `stay` of its tokens come before the first that is dropped. Blocks filled from slots `sources` (N, block_size) take
    the places of `like` (N,), and those `dropped` from the first of these on are given back.
    """

    row: int
    stay: int
    like: np.ndarray
    sources: np.ndarray
    dropped: np.ndarray
    kept: np.ndarray


class SequenceTables:
    """Rows of sequences: what each holds, and where it stands in the blocks.

    A live sequence has a row. Its id is the row plus a multiple of ``max_num_seqs`` that grows each time the row is
    given away, so no id is used twice, and that of a finished sequence is always recognised.

    With `rows_each` the rows from ``n * rows_each`` on are one sequence of the cache above, which has them come and go
    together: errors speak of that.

    Internal: only `BlockPool` changes them; `snapshot.py` and `integrity.py` read them.
    """

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, rows_each: int) -> None:
        self.rows_each = rows_each
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.lock = threading.RLock()
        self._free_rows = deque(range(max_num_seqs))  # first in, first out, so that a row's ids grow slowly
        self._next_id = np.arange(max_num_seqs)
        # by row
        self.ids = np.full(max_num_seqs, -1)
        self.table = np.zeros((max_num_seqs, 1), np.int32)
        self.begin = np.zeros(max_num_seqs, np.int32)  # columns before it are NO_BLOCK
        self.end = np.zeros(max_num_seqs, np.int32)  # columns before it are in use
        self.lens = np.zeros(max_num_seqs, np.int32)
        self.windows = np.full(max_num_seqs, -1)
        self.num_windowed = 0  # rows that have one
        self.away = np.zeros(max_num_seqs, bool)  # swapped out, or lost
        self.lost: dict[int, WorkerLost] = {}  # rows of lost sequences, and why
        self.chains: dict[int, Chain] = {}
        self.kept: dict[int, np.ndarray] = {}  # of rows that have dropped tokens, see `kept.py`
        self._generations = np.zeros(max_num_seqs, np.int64)
        self.version = 0
        """Another number after every change that makes steps and plans stale."""

    # Questions

    def rows(self, seq_ids: Any) -> np.ndarray:
        """The rows of live sequences; ValueError for an id that is none or swapped out, WorkerLost for a lost one."""
        ids = arguments.integers("seq_ids", seq_ids)
        rows = ids % self.max_num_seqs
        unfit = (self.ids[rows] != ids) | self.away[rows] | (ids < 0)
        if unfit.any():
            self._refuse(int(ids[unfit][0]))
        return rows

    def row(self, seq_id: int, *, away: bool = False) -> int:
        """The row of one sequence, which may be swapped out or lost if `away` says so."""
        row = seq_id % self.max_num_seqs
        if seq_id < 0 or self.ids[row] != seq_id or (self.away[row] and not away):
            self._refuse(seq_id)
        return row

    def _refuse(self, seq_id: int) -> NoReturn:
        row, name = seq_id % self.max_num_seqs, seq_id // self.rows_each
        if row in self.lost and self.ids[row] == seq_id:
            before = self.lost[row]
            raise WorkerLost(f"seq_id: sequence {name} is lost: {before}", before.workers, (name,))
        if self.ids[row] == seq_id >= 0:
            raise ValueError(f"seq_id: sequence {name} is swapped out; swap it in first")
        finished = 0 <= seq_id < self._next_id[row]
        raise ValueError(f"seq_id: sequence {name} is {'finished' if finished else 'unknown'}")

    def is_away(self, seq_id: int) -> bool:
        """Whether a sequence is swapped out or lost."""
        return bool(self.away[self.row(seq_id, away=True)])

    def generation(self, seq_id: int) -> int:
        """A number that grows with every change of a sequence: what was planned before it is stale."""
        return int(self._generations[self.row(seq_id)])

    def length(self, seq_id: int, *, away: bool = False) -> int:
        """Tokens that a sequence holds."""
        return int(self.lens[self.row(seq_id, away=away)])

    def generations(self, seq_ids: list[int]) -> list[int]:
        """`generation` of each of some sequences."""
        if len(seq_ids) == 1:
            return [self.generation(seq_ids[0])]
        return self._generations[self.rows(seq_ids)].tolist()

    def blocks(self, seq_id: int) -> np.ndarray:
        """The block ids of a sequence, in order, NO_BLOCK for those given back."""
        row = self.row(seq_id)
        return self.table[row, : self.end[row]].copy()

    def filled_blocks(self, seq_id: int) -> np.ndarray:
        """The blocks in which a sequence holds tokens, in order; those given back are left out."""
        return self.state(self.row(seq_id)).blocks

    def first_position(self, seq_id: int) -> int:
        """The first slot of a sequence whose block it still holds: a position, if it has dropped no tokens."""
        return int(self.begin[self.row(seq_id)]) * self.block_size

    def positions(self, seq_id: int) -> np.ndarray:
        """The positions of the tokens that a sequence still holds, in order."""
        row = self.row(seq_id)
        slots = np.arange(int(self.begin[row]) * self.block_size, int(self.lens[row]))
        return positions_at(self.kept.get(row), slots)

    def next_position(self, seq_id: int) -> int:
        """Where the next token of a sequence will stand."""
        row = self.row(seq_id, away=True)
        return int(positions_at(self.kept.get(row), int(self.lens[row])))

    def tokens_before(self, seq_id: int, position: int) -> int:
        """How many tokens of a sequence stand before a position, those given back included."""
        row = self.row(seq_id)
        return min(int(slots_from(self.kept.get(row), position)), int(self.lens[row]))

    def kept_of(self, seq_ids: Any) -> list[Kept] | None:
        """`kept` of each of some sequences; None if none of them has dropped tokens."""
        if not self.kept:
            return None
        found = [self.kept.get(row) for row in self.rows(seq_ids).tolist()]
        return None if all(each is None for each in found) else found

    def widest_window(self, seq_ids: Any, batch: Batch) -> int | None:
        """The widest window that stays within blocks the sequences still hold; None if they hold all."""
        if not self.num_windowed:
            return None
        rows = self.rows(seq_ids)
        windows = self.windows[rows]
        if (windows < 0).all():
            return None
        seen = batch.positions - self.begin[rows].astype(np.int64) * self.block_size
        for n in [n for n, row in enumerate(rows.tolist()) if row in self.kept and self.begin[row]]:
            kept = self.kept[int(rows[n])]
            given_back = positions_at(kept, int(self.begin[rows[n]]) * self.block_size - 1)
            seen[n] = positions_at(kept, int(batch.positions[n])) - given_back - 1
        return int(np.minimum(windows, np.where(self.begin[rows] > 0, seen, windows))[windows >= 0].min())

    def live(self) -> dict[int, int]:
        """Id -> length of every live sequence, in the order of the ids."""
        with self.lock:
            rows = np.flatnonzero(self.ids >= 0)
            rows = rows[np.argsort(self.ids[rows])]
            return dict(zip(self.ids[rows].tolist(), self.lens[rows].tolist(), strict=True))

    def state(self, row: int) -> State:
        """What makes a sequence what it is, without blocks that hold no token yet."""
        begin, length = int(self.begin[row]), int(self.lens[row])
        blocks = self.table[row, begin : -(-length // self.block_size)].copy()
        return State(
            length, int(self.windows[row]), begin, blocks, self.chains[row].copy(), self.kept.get(row)
        )

    def view(self, seq_id: int, seq_len: int, num_queries: int) -> Batch:
        """The batch of the last `num_queries` of the first `seq_len` tokens that a sequence has blocks for."""
        return self._batch_of_one(self.row(seq_id), seq_len, num_queries)

    def views(self, seq_ids: Any, num_queries: int) -> Batch:
        """`view` of the last tokens of some sequences, as many of each."""
        rows = self.rows(seq_ids)
        return self._batch(rows, self.lens[rows], np.full(len(rows), num_queries))

    def _batch(self, rows: np.ndarray, seq_lens: np.ndarray, num_new_tokens: np.ndarray) -> Batch:
        width = -(-int(seq_lens.max(initial=0)) // self.block_size)
        return Batch.of(self.table[rows, :width], seq_lens, num_new_tokens, self.block_size)

    def _batch_of_one(self, row: int, seq_len: int, num_new_tokens: int) -> Batch:
        blocks = self.table[row : row + 1, : -(-seq_len // self.block_size)].copy()
        return Batch.of_one(blocks, seq_len, num_new_tokens, self.block_size)

    def _slice(self, row: int) -> np.ndarray:
        """A copy of the blocks that a row holds."""
        return self.table[row, self.begin[row] : self.end[row]].copy()

    def _last_blocks(self, rows: np.ndarray) -> np.ndarray:
        """The last block that each row holds, or NO_BLOCK."""
        end = self.end[rows]
        return np.where(end > self.begin[rows], self.table[rows, end - 1], NO_BLOCK)

    def _outside_windows(self, rows: np.ndarray, lens: np.ndarray, new: np.ndarray) -> list[tuple[int, int]]:
        """Rows whose next token no longer sees their first blocks, and the column where it begins to see."""
        if not self.num_windowed:
            return []
        windows = self.windows[rows]
        first = np.maximum(lens - windows, 0) // self.block_size
        for n in [n for n, row in enumerate(rows.tolist()) if row in self.kept]:
            kept = self.kept[int(rows[n])]
            first[n] = slots_from(kept, positions_at(kept, int(lens[n])) - windows[n]) // self.block_size
        moved = np.flatnonzero((windows >= 0) & (new > 0) & (first > self.begin[rows]))
        return [(int(rows[n]), int(first[n])) for n in moved]

    def _slots_of(self, row: int, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at some positions lie; ValueError unless they are sorted, and of tokens that are held."""
        falls = np.flatnonzero(np.diff(positions) <= 0)
        if len(falls):
            one, two = positions[falls[0] : falls[0] + 2].tolist()
            raise ValueError(
                f"positions: expected each once, in order, as np.unique returns them; got {two} after {one}"
            )
        kept, first = self.kept.get(row), int(self.begin[row]) * self.block_size
        slots = slots_from(kept, positions)
        unknown = (slots < first) | (slots >= self.lens[row]) | (positions_at(kept, slots) != positions)
        if unknown.any():
            raise ValueError(
                f"positions: expected some of those that sequence {self.ids[row] // self.rows_each} holds, of which "
                f"`positions` is the list; got {positions[unknown][0]}"
            )
        return slots

    def _plan_of(self, row: int, slots: np.ndarray, positions: np.ndarray) -> Keeping:
        """What it takes to keep the tokens of a row that are in some slots."""
        moved = np.flatnonzero(slots != np.arange(len(slots)))
        stay = int(moved[0]) if len(moved) else len(slots)
        num_columns = -(-len(slots) // self.block_size)
        first = stay // self.block_size if len(moved) else num_columns
        # where the tokens come from; places after the last get that one again
        places = np.arange(first * self.block_size, num_columns * self.block_size)
        wanted = slots[np.minimum(places, len(slots) - 1)] if len(places) else places
        sources = self.table[row, wanted // self.block_size].astype(np.int64) * self.block_size
        return Keeping(
            row,
            stay,
            self.table[row, first:num_columns].copy(),
            (sources + wanted % self.block_size).reshape(-1, self.block_size),
            self.table[row, max(first, int(self.begin[row])) : self.end[row]].copy(),
            np.append(positions, positions_at(self.kept.get(row), int(self.lens[row]))),
        )

    # Changes of a row alone

    def _new_row(self, width: int = 0) -> int:
        """A row for a new sequence, in tables of at least so many columns."""
        if not self._free_rows:
            most = self.max_num_seqs // self.rows_each
            raise CacheFull(f"max_num_seqs={most} sequences are live already")
        self._widen(width)
        row = self._free_rows.popleft()
        self.ids[row] = self._next_id[row]
        self._next_id[row] += self.max_num_seqs
        return row

    def _clear(self, row: int) -> None:
        """Empty a row whose blocks are released."""
        self.begin[row] = self.end[row] = self.lens[row] = 0
        self.num_windowed -= bool(self.windows[row] >= 0)
        self.windows[row] = -1
        self.away[row] = False
        self.lost.pop(row, None)
        self.chains.pop(row, None)
        self.kept.pop(row, None)
        self._generations[row] += 1
        self.version += 1

    def _install(self, row: int, begin: int, blocks: np.ndarray) -> None:
        end = begin + len(blocks)
        self._widen(end)
        self.table[row, :begin] = NO_BLOCK
        self.table[row, begin:end] = blocks
        self.begin[row], self.end[row] = begin, end
        self._generations[row] += 1
        self.version += 1

    def _remember(self, row: int, kept: Kept) -> None:
        if kept is None:
            self.kept.pop(row, None)
        else:
            self.kept[row] = kept

    def _append(self, rows: np.ndarray, counts: np.ndarray, blocks: np.ndarray) -> None:
        """Append `counts` new blocks to each row, whose table is wide enough."""
        first = np.cumsum(counts) - counts
        columns = np.arange(len(blocks)) - np.repeat(first - self.end[rows], counts)
        self.table[np.repeat(rows, counts), columns] = blocks
        self.end[rows] += counts.astype(np.int32)

    def _widen(self, width: int) -> None:
        have = self.table.shape[1]
        if width > have:
            wider = np.zeros(
                (self.max_num_seqs, min(max(width, 2 * have), max(width, self.num_blocks))), np.int32
            )
            wider[:, :have] = self.table
            self.table = wider
