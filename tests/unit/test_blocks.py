"""The block pool under random use, against a model of dictionaries and lists."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvnumba import CacheFull
from kvnumba.blocks.pool import BlockPool
from kvnumba.storage import Batch

NUM_BLOCKS, MAX_SEQS = 12, 4


class PoolMachine(RuleBasedStateMachine):
    """Adds, grows and finishes sequences; a dictionary says what must come out."""

    live = Bundle("live")
    gone = Bundle("gone")

    @initialize(block_size=st.integers(1, 5))
    def start(self, block_size):
        self.pool = BlockPool(NUM_BLOCKS, block_size, MAX_SEQS)
        self.lengths = {}
        self.booked = {}
        self.ever = set()

    def blocks_of(self, length):
        return -(-length // self.pool.block_size)

    @rule(target=live)
    def add(self):
        if len(self.lengths) == MAX_SEQS:
            with pytest.raises(CacheFull):
                self.pool.add()
            return -1
        seq_id = self.pool.add()
        assert seq_id not in self.ever
        self.ever.add(seq_id)
        self.lengths[seq_id] = self.booked[seq_id] = 0
        return seq_id

    @rule(target=gone, seq_id=consumes(live))
    def finish(self, seq_id):
        if seq_id >= 0:
            self.pool.finish(seq_id)
            del self.lengths[seq_id], self.booked[seq_id]
        return seq_id

    @rule(seq_id=gone)
    def use_of_a_finished_one(self, seq_id):
        for call in (self.pool.finish, self.pool.blocks, lambda i: self.pool.book([i], [1])):
            with pytest.raises(ValueError, match="unknown" if seq_id < 0 else "finished"):
                call(seq_id)

    @rule(data=st.data(), commit=st.booleans())
    def grow(self, data, commit):
        ids = data.draw(st.permutations(sorted(self.lengths)).map(lambda p: p[: max(1, len(p) // 2 + 1)]))
        new = data.draw(st.lists(st.integers(0, 14), min_size=len(ids), max_size=len(ids)))
        before = {i: self.pool.blocks(i).tolist() for i in self.lengths}
        need = {
            i: max(self.blocks_of(self.lengths[i] + n), self.booked[i]) for i, n in zip(ids, new, strict=True)
        }
        if sum(need.values()) - sum(self.booked[i] for i in ids) > self.pool.num_free_blocks:
            with pytest.raises(CacheFull):
                self.pool.book(ids, new)
            assert {i: self.pool.blocks(i).tolist() for i in self.lengths} == before
            return
        batch = self.pool.book(ids, new)
        self.booked.update(need)
        assert batch.query_start_loc.tolist() == [0, *np.cumsum(new).tolist()]
        assert batch.seq_lens.tolist() == [self.lengths[i] + n for i, n in zip(ids, new, strict=True)]
        for i, row in zip(ids, batch.block_table, strict=True):
            held = self.pool.blocks(i).tolist()
            assert held[: len(before[i])] == before[i]
            assert row.tolist()[: self.blocks_of(self.lengths[i])] == held[: self.blocks_of(self.lengths[i])]
        slots = batch.slot_mapping.tolist()
        expected = [
            self.pool.blocks(i)[p // self.pool.block_size] * self.pool.block_size + p % self.pool.block_size
            for i, n in zip(ids, new, strict=True)
            for p in range(self.lengths[i], self.lengths[i] + n)
        ]
        assert slots == expected
        if commit:
            self.pool.commit(ids, batch)
            for i, n in zip(ids, new, strict=True):
                self.lengths[i] += n

    @invariant()
    def every_block_is_free_or_held_once(self):
        if not hasattr(self, "lengths"):
            return
        held = [b for i in self.lengths for b in self.pool.blocks(i).tolist()]
        free = self.pool.allocator.free_blocks.tolist()
        assert sorted(held + free) == list(range(NUM_BLOCKS))
        assert self.pool.live() == dict(sorted(self.lengths.items()))
        assert all(len(self.pool.blocks(i)) == self.booked[i] for i in self.lengths)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_ids_begin_at_zero_and_blocks_in_order():
    pool = BlockPool(6, 2, 3)
    assert [pool.add(), pool.add()] == [0, 1]
    pool.book([0, 1], [3, 4])
    assert pool.blocks(0).tolist() == [0, 1]
    assert pool.blocks(1).tolist() == [2, 3]


def test_slots_of_a_contiguous_batch():
    batch = Batch.of(np.array([[0], [1]], np.int32), np.array([5, 3], np.int32), np.array([2, 2]), 8)
    assert batch.slot_mapping.tolist() == [3, 4, 9, 10]
    assert batch.query_start_loc.tolist() == [0, 2, 4]
