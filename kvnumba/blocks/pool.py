"""The block pool: which sequences get and give back which blocks. Integers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvnumba import arguments
from kvnumba.blocks.allocator import BlockAllocator, Fill
from kvnumba.blocks.kept import positions_at, shortened, slots_from
from kvnumba.blocks.prefix import NO_BLOCK, Chain, PrefixIndex
from kvnumba.blocks.tables import SequenceTables, State
from kvnumba.errors import CacheFull, WorkerLost
from kvnumba.storage import Batch

Move = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Called with slots (N, block_size), blocks (N,) to fill with their tokens, and those of them that are in use."""


class BlockPool(SequenceTables):
    """Books blocks for sequences, all or nothing; every operation costs O(blocks touched)."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        allocator: Callable[[int, int, PrefixIndex], BlockAllocator] = BlockAllocator,
        rows_each: int = 1,
    ) -> None:
        super().__init__(num_blocks, block_size, max_num_seqs, rows_each)
        self.prefixes = PrefixIndex(num_blocks, block_size)
        self.allocator = allocator(num_blocks, block_size, self.prefixes)
        self.num_copies = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, those that can still be found among them."""
        return self.allocator.num_free_blocks

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

    def _become(self, row: int, state: State) -> None:
        """Fill an empty row from a state."""
        self.lens[row] = state.length
        self.windows[row] = state.window_left
        self.num_windowed += state.window_left >= 0
        self.chains[row] = state.chain
        self._remember(row, state.kept)
        self._install(row, state.begin, state.blocks)
        self.allocator.hold(state.blocks)

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


def _placed(count: int, where: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """An array of `count` entries: the given blocks at `where`, NO_BLOCK elsewhere."""
    placed = np.full(count, NO_BLOCK, np.int32)
    placed[where] = blocks
    return placed
