"""The block pool: which sequence holds which blocks, and how long it is. Integers only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kvnumba import arguments
from kvnumba.blocks.allocator import BlockAllocator, Fill
from kvnumba.blocks.kept import Kept, positions_at, shortened, slots_from
from kvnumba.blocks.prefix import NO_BLOCK, Chain, PrefixIndex
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


Move = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Called with slots (N, block_size), blocks (N,) to fill with their tokens, and those of them that are in use."""


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


class BlockPool:
    """Books blocks for sequences, all or nothing; every operation costs O(blocks touched).

    A live sequence has a row in the tables. Its id is the row plus a multiple of ``max_num_seqs`` that grows
    each time the row is given away, so no id is used twice, and that of a finished sequence is always recognised.

    With `rows_each` the rows from ``n * rows_each`` on are one sequence of the cache above, which has them come and go
    together: errors speak of that.

    Internal: `snapshot.py` and `integrity.py` read the tables, nothing else writes them.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        allocator: Callable[[int, int, PrefixIndex], BlockAllocator] = BlockAllocator,
        rows_each: int = 1,
    ) -> None:
        self.rows_each = rows_each
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.lock = threading.RLock()
        self.prefixes = PrefixIndex(num_blocks, block_size)
        self.allocator = allocator(num_blocks, block_size, self.prefixes)
        self.num_copies = 0
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

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, those that can still be found among them."""
        return self.allocator.num_free_blocks

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

    def view(self, seq_id: int, seq_len: int, num_queries: int) -> Batch:
        """The batch of the last `num_queries` of the first `seq_len` tokens that a sequence has blocks for."""
        return self._batch_of_one(self.row(seq_id), seq_len, num_queries)

    def views(self, seq_ids: Any, num_queries: int) -> Batch:
        """`view` of the last tokens of some sequences, as many of each."""
        rows = self.rows(seq_ids)
        return self._batch(rows, self.lens[rows], np.full(len(rows), num_queries))

    # Sequences come and go

    def add(self, token_ids: np.ndarray | None = None, salt: str = "", window_left: int = -1) -> int:
        """Give a new sequence a row, and the blocks that are found under its tokens; returns its id."""
        with self.lock:
            chain = Chain(salt, []) if token_ids is None else self.prefixes.find(token_ids, salt)
            blocks = np.array([entry.block for entry in chain.entries], np.int32)
            row = self._new_row(len(blocks))
            self._become(row, State(chain.length, window_left, 0, blocks, chain))
            return int(self.ids[row])

    def fork(self, seq_id: int) -> int:
        """A new sequence with the same tokens in the same blocks; returns its id."""
        with self.lock:
            state = self.state(self.row(seq_id))
            row = self._new_row()
            self._become(row, state)
            return int(self.ids[row])

    def check_reorder(self, seq_ids: Any, parents: Any) -> tuple[np.ndarray, np.ndarray]:
        """The rows of both, after the checks of `reorder`."""
        rows, sources = self.rows(seq_ids), self.rows(parents)
        if len(sources) != len(rows):
            raise ValueError(f"parents: expected {len(rows)}, one for each of seq_ids; got {len(sources)}")
        if len(set(rows.tolist())) != len(rows):
            raise ValueError(f"seq_ids: expected each sequence once; got {list(seq_ids)}")
        return rows, sources

    def reorder(self, seq_ids: Any, parents: Any) -> None:
        """Let each sequence become what one of the parents was before the call."""
        with self.lock:
            rows, sources = self.check_reorder(seq_ids, parents)
            changed = [(int(r), int(s)) for r, s in zip(rows, sources, strict=True) if r != s]
            before = [self._slice(row) for row, _ in changed]
            states = [self.state(source) for _, source in changed]
            for (row, _), state in zip(changed, states, strict=True):
                self._clear(row)
                self._become(row, state)
            for blocks in before:  # last, so that no block is free in between
                self.allocator.release(blocks[::-1])

    def truncate(self, seq_id: int, length: int, following: int | None = None) -> None:
        """Forget a sequence's tokens from `length` on, and give back the blocks that are empty then.

        The next token stands at `following`; by default where the first of those forgotten stood.
        """
        with self.lock:
            row = self.row(seq_id)
            if length > self.lens[row]:
                raise ValueError(
                    f"length: expected at most the sequence's {self.lens[row]} tokens; got {length}"
                )
            first, kept = int(self.begin[row]) * self.block_size, self.kept.get(row)
            window = int(self.windows[row])
            if first:
                least = int(slots_from(kept, positions_at(kept, first - 1) + 1 + window))
                if length < least:
                    raise ValueError(
                        f"length: expected {least} or more, tokens before {first} fell out of "
                        f"the window and were given back; got {length}"
                    )
            keep = -(-length // self.block_size)
            released = self.table[row, keep : self.end[row]].copy()
            self.end[row] = min(keep, self.end[row])
            self.lens[row] = length
            self._remember(row, shortened(kept, length, following))
            self._generations[row] += 1
            self.version += 1
            self.chains[row].truncate(length, self.block_size)
            self.allocator.release(released[::-1])

    def keep(self, seq_ids: list[int], positions: list[np.ndarray], move: Move) -> bool:
        """Drop all tokens of sequences but those at some positions of each, all or none; False if they hold no others.

        What stays moves together. Blocks before the first dropped token stay as they are; what comes after it is moved
        to new blocks, or, where these are too few, within blocks that only one of these sequences holds.
        """
        with self.lock:
            rows = [self.row(seq_id) for seq_id in seq_ids]
            slots = [self._slots_of(row, wanted) for row, wanted in zip(rows, positions, strict=True)]
            plans = [
                self._plan_of(row, some, wanted)
                for row, some, wanted in zip(rows, slots, positions, strict=True)
                if len(some) < self.lens[row] - self.begin[row] * self.block_size
            ]
            if not plans:
                return False
            like, sources, dropped = (
                np.concatenate(each)
                for each in zip(*((plan.like, plan.sources, plan.dropped) for plan in plans), strict=True)
            )
            reused = dropped[self.allocator.references[dropped] == 1]
            reused = reused[: max(len(like) - self.num_free_blocks, 0)]
            num_new = len(like) - len(reused)
            self.allocator.require(num_new, self.num_free_blocks)
            taken = self.allocator.take_like(
                like[:num_new], lambda taken: move(sources, np.concatenate((taken, reused)), reused)
            )
            for block in reused[self.prefixes.findable[reused]].tolist():
                self.prefixes.forget(block)
            ends = np.cumsum([len(plan.like) for plan in plans])
            blocks = np.split(np.concatenate((taken, reused)), ends[:-1])
            for plan, filled in zip(plans, blocks, strict=True):
                row, length = plan.row, len(plan.kept) - 1
                self.begin[row], self.end[row] = 0, -(-length // self.block_size)
                self.table[row, self.end[row] - len(filled) : self.end[row]] = filled
                self.lens[row] = length
                self.kept[row] = plan.kept
                self.chains[row].truncate(plan.stay, self.block_size)
                self._generations[row] += 1
                self.allocator.release(plan.dropped[~np.isin(plan.dropped, reused)][::-1])
            self.version += 1
            return True

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

    def _remember(self, row: int, kept: Kept) -> None:
        if kept is None:
            self.kept.pop(row, None)
        else:
            self.kept[row] = kept

    def finish(self, seq_id: int) -> None:
        """Take back a sequence's blocks and its row. Findable blocks become idle, its last one first to be evicted."""
        with self.lock:
            row = self.row(seq_id, away=True)
            # reversed, so that the next sequence is given free blocks in the same order
            self.allocator.release(self._slice(row)[::-1])
            self._clear(row)
            self.ids[row] = -1
            self._free_rows.append(row)

    def swap_out(self, seq_id: int) -> None:
        """Give back a sequence's blocks, though not its row."""
        with self.lock:
            row = self.row(seq_id)
            self.allocator.release(self._slice(row)[::-1])
            self.end[row] = self.begin[row]
            self.away[row] = True
            self._generations[row] += 1
            self.version += 1

    def swap_in(self, seq_id: int, before: np.ndarray, fill: Fill) -> None:
        """Give a sequence that was swapped out blocks again.

        Of those that it had `before`, the ones that have stayed findable are taken as they are. `fill` gets a
        block for each of `before`, and NO_BLOCK where there is nothing to fill.
        """
        with self.lock:
            row = self.row(seq_id, away=True)
            begin = int(self.begin[row])
            blocks = np.full(len(before), NO_BLOCK, np.int32)
            entries = self.chains[row].entries[begin:]
            kept = [n for n, entry in enumerate(entries) if entry.block == before[n]]
            blocks[kept] = before[kept]
            found = blocks[blocks != NO_BLOCK]
            missing = np.flatnonzero(blocks == NO_BLOCK)
            idle = int((self.allocator.references[found] == 0).sum())
            self.allocator.require(len(missing), self.num_free_blocks - idle)
            self.allocator.hold(found)
            try:
                taken = self.allocator.take_like(
                    before[missing], lambda new: fill(_placed(len(before), missing, new))
                )
            except BaseException:
                self.allocator.release(found[::-1])
                raise
            blocks[missing] = taken
            self.away[row] = False
            self._install(row, begin, blocks)

    def restore(
        self,
        runs: list[list[int]],
        num_sequences: int,
        fill: Fill,
        states: Callable[[np.ndarray], list[State]],
        into: list[int] | None = None,
    ) -> list[int]:
        """Add sequences and findable blocks of a snapshot, all or none; returns the sequences' ids.

        `fill` gets a new block for each place that the runs name, each once; the blocks of a run follow each other in a
        sequence. `states` then registers the findable ones and returns the sequences; blocks that it does not use
        are freed. The sequences are new, or those with the ids `into`, which are lost.
        """
        with self.lock:
            rows = None if into is None else [self.row(seq_id, away=True) for seq_id in into]
            for row in rows or ():  # a lost sequence has no use for its blocks
                self.allocator.release(self._slice(row)[::-1])
                self.end[row] = self.begin[row]
            if rows is None and num_sequences > len(self._free_rows):
                wanted, free, most = (
                    n // self.rows_each for n in (num_sequences, len(self._free_rows), self.max_num_seqs)
                )
                raise CacheFull(f"{wanted} sequences are to be added, {free} of max_num_seqs={most} are free")
            counts = np.array([len(run) for run in runs], np.int64)
            order = np.array([place for run in runs for place in run], np.int64)
            taken = np.empty(len(order), np.int32)

            def place(new: np.ndarray) -> None:
                taken[order] = new
                fill(taken)

            self.allocator.require(len(order), self.num_free_blocks)
            self.allocator.take_after(np.full(len(runs), NO_BLOCK), counts, place)
            found = states(taken)
            if rows is None:
                rows = [self._new_row() for _ in found]
            else:
                for row in rows:
                    self._clear(row)
            for row, state in zip(rows, found, strict=True):
                self._become(row, state)
            self.allocator.release(taken)
            return self.ids[rows].tolist()

    def lose(self, gone: np.ndarray, reason: WorkerLost) -> list[int]:
        """Count the sequences as lost that have tokens in blocks that are gone, (num_blocks,) bool; returns their ids.

        They can be finished, or restored. Others give back what is gone of the blocks that were booked for them.
        """
        with self.lock:
            lost = []
            for row in np.flatnonzero((self.ids >= 0) & ~self.away).tolist():
                begin, end = int(self.begin[row]), int(self.end[row])
                filled = -(-int(self.lens[row]) // self.block_size)
                columns = begin + np.flatnonzero(gone[self.table[row, begin:end]])
                if not len(columns):
                    continue
                if columns[0] < filled:
                    self.away[row] = True
                    self.lost[row] = reason
                    lost.append(int(self.ids[row]))
                else:
                    released = self.table[row, columns[0] : end].copy()
                    self.end[row] = columns[0]
                    self.allocator.release(released[::-1])
                self._generations[row] += 1
                self.version += 1
            return lost

    def expire(self) -> None:
        """Make all steps and plans stale."""
        with self.lock:
            self._generations += 1
            self.version += 1

    # Forward passes

    def book(
        self, seq_ids: Any, num_new_tokens: Any, copy: Callable[[np.ndarray], None] | None = None
    ) -> Batch:
        """Give sequences the blocks that their new tokens need; their lengths stay until `commit`.

        A block that is not full is written to next. Where others hold it too, the sequence gets a copy first:
        `copy` is called with (source, destination) pairs (N, 2) int64.
        """
        with self.lock:
            rows = self.rows(seq_ids)
            new = arguments.integers("num_new_tokens", num_new_tokens, length=len(rows))
            if len(set(rows.tolist())) != len(rows):
                raise ValueError(f"seq_ids: expected each sequence once; got {list(seq_ids)}")
            if (new < 0).any():
                raise ValueError(f"num_new_tokens: expected 0 or more; got {new[new < 0][0]}")
            return self._book_rows(rows, new, copy)

    def _book_rows(
        self, rows: np.ndarray, new: np.ndarray, copy: Callable[[np.ndarray], None] | None
    ) -> Batch:
        lens = self.lens[rows]
        total = lens + new
        missing = np.maximum(-(-total // self.block_size) - self.end[rows], 0)
        writers, sources, copied = self._written_to(rows, lens, new)
        outside = self._outside_windows(rows, lens, new)
        num_copies, num_missing = int(copied.sum()), int(missing.sum())
        if num_copies or num_missing:
            self.allocator.require(num_copies, self.num_free_blocks)
            self.allocator.require(num_copies + num_missing, self.num_free_blocks + self._freed_by(outside))
            self._widen(int((self.end[rows] + missing).max()))
        if num_copies:  # before a window gives back anything: a copy that fails has changed nothing

            def fill(taken: np.ndarray) -> None:
                if copy is not None:
                    copy(np.stack((sources[copied], taken), axis=1).astype(np.int64))

            columns = lens[writers[copied]] // self.block_size
            self._replace(rows[writers[copied]], columns, self.allocator.take_like(sources[copied], fill))
        for row, first in outside:
            self._give_back(row, first)
        if num_missing:
            self._append(rows, missing, self.allocator.take_after(self._last_blocks(rows), missing))
        if len(self.prefixes):
            for block in sources[~copied & self.prefixes.findable[sources]].tolist():
                self.prefixes.forget(block)
        self._generations[rows] += 1
        self.version += 1
        return self._batch(rows, total.astype(np.int32), new)

    def book_one(
        self, seq_id: int, num_new_tokens: int, copy: Callable[[np.ndarray], None] | None = None
    ) -> Batch:
        """`book` of one sequence: numbers looked up one by one are several times as fast as arrays of one."""
        with self.lock:
            row = self.row(seq_id)
            length, end = int(self.lens[row]), int(self.end[row])
            if self.windows[row] >= 0 or (
                num_new_tokens and length % self.block_size and self._is_shared(row)
            ):
                return self._book_rows(np.array([row]), np.array([num_new_tokens]), copy)
            missing = -(-(length + num_new_tokens) // self.block_size) - end
            if missing > 0:
                self.allocator.require(missing, self.num_free_blocks)
                self._widen(end + missing)
                last = self._last_blocks(np.array([row]))
                self.table[row, end : end + missing] = self.allocator.take_after(last, np.array([missing]))
                self.end[row] = end + missing
            self._generations[row] += 1
            self.version += 1
            return self._batch_of_one(row, length + num_new_tokens, num_new_tokens)

    def _is_shared(self, row: int) -> bool:
        """Whether a row's last block is held by others or may be found: it must not be written to as it is."""
        block = self.table[row, self.lens[row] // self.block_size]
        return bool(self.allocator.references[block] > 1 or self.prefixes.findable[block])

    def commit(self, seq_ids: Any, batch: Batch, token_ids: list[np.ndarray | None] | None = None) -> None:
        """Count a batch's new tokens as held, and let blocks that are full of known tokens be found."""
        with self.lock:
            rows = [self.row(seq_ids[0])] if len(seq_ids) == 1 else self.rows(seq_ids).tolist()
            if token_ids is not None:
                for row, tokens in zip(rows, token_ids, strict=True):
                    chain = self.chains[row]
                    if tokens is not None and chain.length == self.lens[row] and row not in self.kept:
                        self.prefixes.extend(chain, tokens, self.table[row])
            self.lens[rows] = batch.seq_lens

    # The parts of these

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

    def _last_blocks(self, rows: np.ndarray) -> np.ndarray:
        """The last block that each row holds, or NO_BLOCK."""
        end = self.end[rows]
        return np.where(end > self.begin[rows], self.table[rows, end - 1], NO_BLOCK)

    def _slice(self, row: int) -> np.ndarray:
        """A copy of the blocks that a row holds."""
        return self.table[row, self.begin[row] : self.end[row]].copy()

    def state(self, row: int) -> State:
        """What makes a sequence what it is, without blocks that hold no token yet."""
        begin, length = int(self.begin[row]), int(self.lens[row])
        blocks = self.table[row, begin : -(-length // self.block_size)].copy()
        return State(
            length, int(self.windows[row]), begin, blocks, self.chains[row].copy(), self.kept.get(row)
        )

    def _become(self, row: int, state: State) -> None:
        """Fill an empty row from a state."""
        self.lens[row] = state.length
        self.windows[row] = state.window_left
        self.num_windowed += state.window_left >= 0
        self.chains[row] = state.chain
        self._remember(row, state.kept)
        self._install(row, state.begin, state.blocks)
        self.allocator.hold(state.blocks)

    def _install(self, row: int, begin: int, blocks: np.ndarray) -> None:
        end = begin + len(blocks)
        self._widen(end)
        self.table[row, :begin] = NO_BLOCK
        self.table[row, begin:end] = blocks
        self.begin[row], self.end[row] = begin, end
        self._generations[row] += 1
        self.version += 1

    def _written_to(
        self, rows: np.ndarray, lens: np.ndarray, new: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which sequences write into a block that has tokens, that block, and whether they need a copy of it."""
        writers = np.flatnonzero((new > 0) & (lens % self.block_size > 0))
        sources = self.table[rows[writers], lens[writers] // self.block_size]
        references = self.allocator.references[sources]
        copied = references > 1
        if copied.any():
            _, first, counts = np.unique(sources, return_index=True, return_counts=True)
            copied[first[counts == references[first]]] = False  # where all its holders write, one keeps it
        return writers, sources, copied

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

    def _freed_by(self, outside: list[tuple[int, int]]) -> int:
        """Blocks that nobody holds once these rows have given back what they no longer see."""
        if not outside:
            return 0
        given = np.concatenate([self.table[row, self.begin[row] : first] for row, first in outside])
        blocks, counts = np.unique(given, return_counts=True)
        return int((self.allocator.references[blocks] == counts).sum())

    def _give_back(self, row: int, first: int) -> None:
        """Release the blocks of the columns before `first`."""
        blocks = self.table[row, self.begin[row] : first].copy()
        self.table[row, self.begin[row] : first] = NO_BLOCK
        self.begin[row] = first
        self.allocator.release(blocks[::-1])

    def _replace(self, rows: np.ndarray, columns: np.ndarray, blocks: np.ndarray) -> None:
        """Put copies into the places of the blocks that were copied."""
        old = self.table[rows, columns]
        self.table[rows, columns] = blocks
        self.allocator.release_each(old)
        self.num_copies += len(blocks)

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

    def _batch(self, rows: np.ndarray, seq_lens: np.ndarray, num_new_tokens: np.ndarray) -> Batch:
        width = -(-int(seq_lens.max(initial=0)) // self.block_size)
        return Batch.of(self.table[rows, :width], seq_lens, num_new_tokens, self.block_size)

    def _batch_of_one(self, row: int, seq_len: int, num_new_tokens: int) -> Batch:
        blocks = self.table[row : row + 1, : -(-seq_len // self.block_size)].copy()
        return Batch.of_one(blocks, seq_len, num_new_tokens, self.block_size)


def _placed(count: int, where: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """An array of `count` entries: the given blocks at `where`, NO_BLOCK elsewhere."""
    placed = np.full(count, NO_BLOCK, np.int32)
    placed[where] = blocks
    return placed
