"""Sequences that drop tokens: what stays, what it sees and is seen by, and the blocks that come back."""

from unittest import mock

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba.caches import snapshot

H, D = 2, 8


class Kept:
    """A sequence in a cache, and all tokens that it ever had where they stand."""

    def __init__(self, cache, normal):
        self.cache, self.normal = cache, normal
        self.seq_id = cache.add_sequence()
        self.length = 0

    def write(self, count):
        k, v = self.normal(count, H, D), self.normal(count, H, D)
        step = self.cache.step([self.seq_id], [count])
        np.testing.assert_array_equal(step.positions, np.arange(self.length, self.length + count))
        step.write(k, v)
        self.length += count
        return step

    def keep(self, positions):
        """Drop the others; what stays is bit for bit what it was."""
        held = self.cache.positions(self.seq_id)
        before = self.cache.get_kv(self.seq_id)
        self.cache.keep(self.seq_id, positions)
        self.cache.check_integrity()
        for new, old in zip(self.cache.get_kv(self.seq_id), before, strict=True):
            np.testing.assert_array_equal(new, old[:, np.isin(held, positions)])
        np.testing.assert_array_equal(self.cache.positions(self.seq_id), positions)
        assert self.cache.seq_len(self.seq_id) == len(positions)
        assert self.cache.next_position(self.seq_id) == self.length

    def attend(self, step, **options):
        """What the tokens of a step see, against keys at the places where they stand."""
        q = self.normal(step.num_tokens, 2 * H, D)
        held = self.cache.positions(self.seq_id)
        placed = [np.full((H, self.length, D), np.nan, np.float32) for _ in range(2)]
        for all_rows, rows in zip(placed, self.cache.get_kv(self.seq_id), strict=True):
            all_rows[:, held] = rows
        oracle.assert_as_exact(
            step.attend(q, return_lse=True, **options),
            q,
            *placed,
            present=np.isin(np.arange(self.length), held),
            rounded=oracle.rounding_of(self.cache),
            **options,
        )


@pytest.mark.parametrize("fmt", ["float32", "int8", "int4"])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_tokens_see_what_stays_where_it_stood(backend, fmt, block_size, normal, rng):
    cache = kvnumba.PagedKVCache(-(-70 // block_size), block_size, H, D, 2, fmt, backend=backend)
    kept = Kept(cache, normal)
    kept.write(40)
    kept.keep(np.sort(rng.choice(40, 18, replace=False)))
    assert cache.num_blocks - cache.num_free_blocks == -(-18 // block_size)
    for count in (1, 7):
        step = kept.write(count)
        for options in ({}, {"window_left": 0}, {"window_left": 11}, {"sinks": normal(2 * H)}):
            kept.attend(step, **options)
    held = cache.positions(kept.seq_id)
    kept.keep(held[[0, 1, 5, 6, 20]])  # again, some of before and some of after
    kept.attend(kept.write(1), window_left=30)
    kept.keep([])
    assert cache.num_free_blocks == cache.num_blocks
    kept.attend(kept.write(3))


def test_what_is_all_kept_is_not_touched(backend, normal):
    cache = kvnumba.PagedKVCache(8, 4, H, D, 2, backend=backend)
    kept = Kept(cache, normal)
    kept.write(9)
    cache.fork(kept.seq_id)
    table, stats = cache.block_table(kept.seq_id), cache.stats()
    kept.keep(np.arange(9))
    np.testing.assert_array_equal(cache.block_table(kept.seq_id), table)
    assert cache.stats() == stats


def test_sequences_that_have_dropped_tokens_beside_others(backend, normal):
    cache = kvnumba.PagedKVCache(30, 4, H, D, 3, backend=backend)
    ids = [cache.add_sequence() for _ in range(3)]
    rows = normal(3, 2, H, 14, D)
    for n, seq_id in enumerate(ids):
        cache.update(seq_id, *rows[n, :, :, :10])
    places = [np.arange(14), np.array([0, 1, 8, 10, 11, 12, 13]), np.array([3, 4, 10, 11, 12, 13])]
    for seq_id, held in zip(ids[1:], places[1:], strict=True):
        cache.keep(seq_id, held[held < 10])
    step = cache.step(ids, [1, 4, 3])
    assert step.positions.tolist() == [10, 10, 11, 12, 13, 10, 11, 12]
    new = [slice(10, 11), slice(10, 14), slice(10, 13)]
    step.write(*(np.concatenate([rows[n, i, :, new[n]].swapaxes(0, 1) for n in range(3)]) for i in range(2)))
    q = normal(8, 4, D)
    for window in (-1, 2, 5):
        out, lse = step.attend(q, window_left=window, return_lse=True)
        for n, mine in enumerate((slice(0, 1), slice(1, 5), slice(5, 8))):
            end = new[n].stop
            present = np.isin(np.arange(end), places[n])
            oracle.assert_as_exact(
                (out[mine], lse[mine]), q[mine], *rows[n, :, :, :end], present=present, window_left=window
            )


class TestBlocks:
    def test_those_of_others_stay_as_they_are(self, backend, fmt, normal):
        cache = kvnumba.PagedKVCache(10, 4, H, D, 3, fmt, backend=backend)
        kept = Kept(cache, normal)
        kept.write(12)
        twin = cache.fork(kept.seq_id)
        before = cache.get_kv(twin)
        kept.keep([0, 1, 2, 3, 5, 8, 9])  # of the first block nothing is dropped: it stays shared
        assert cache.block_table(kept.seq_id)[0] == cache.block_table(twin)[0]
        assert cache.stats().shared_blocks == 1
        assert cache.num_free_blocks == 10 - 3 - 1
        heir = cache.fork(kept.seq_id)
        np.testing.assert_array_equal(cache.positions(heir), [0, 1, 2, 3, 5, 8, 9])
        kept.attend(kept.write(2), window_left=5)
        for now, then in zip(cache.get_kv(twin), before, strict=True):
            np.testing.assert_array_equal(now, then)
        cache.reorder([twin], [heir])
        assert cache.next_position(twin) == 12

    def test_a_full_cache_moves_within_blocks_of_the_sequence(self, backend, fmt, normal):
        cache = kvnumba.PagedKVCache(5, 4, H, D, 3, fmt, backend=backend)
        kept = Kept(cache, normal)
        kept.write(20)
        kept.keep(np.arange(1, 20, 2))
        assert cache.num_free_blocks == 2

    def test_a_full_cache_moves_over_blocks_that_are_still_to_be_read(self, backend, normal):
        cache = kvnumba.PagedKVCache(12, 32, H, D, 2, backend=backend)
        kept = Kept(cache, normal)
        kept.write(6 * 32)
        cache.fork(kept.seq_id)
        kept.write(6 * 32)
        kept.keep(np.arange(0, 12 * 32, 2))  # six blocks, for which there are its own last six
        assert cache.num_free_blocks == 0

    def test_a_full_cache_whose_blocks_are_shared(self, backend, normal):
        cache = kvnumba.PagedKVCache(5, 4, H, D, 3, backend=backend)
        kept = Kept(cache, normal)
        kept.write(16)
        twin = cache.fork(kept.seq_id)
        kept.write(4)
        before, table = cache.get_kv(kept.seq_id), cache.block_table(kept.seq_id)
        with pytest.raises(kvnumba.CacheFull, match="2 more blocks of 4 tokens are needed, 0 of 5 are free"):
            cache.keep(kept.seq_id, np.arange(1, 20, 2))  # three blocks, of which the last is its own
        for now, then in zip(cache.get_kv(kept.seq_id), before, strict=True):
            np.testing.assert_array_equal(now, then)
        np.testing.assert_array_equal(cache.block_table(kept.seq_id), table)
        cache.finish_sequence(twin)
        kept.keep(np.arange(1, 20, 2))

    def test_a_move_that_fails_changes_nothing(self, backend, normal):
        cache = kvnumba.PagedKVCache(20, 2, H, D, 1, backend=backend)
        kept = Kept(cache, normal)
        kept.write(40)  # all blocks: it moves within them
        before = cache.get_kv(kept.seq_id)
        write, calls = cache._backend.write_blocks, iter([False])

        def fails_once(*args):
            write(*args)
            if next(calls, None) is not None:
                raise OSError("gone")

        with (
            mock.patch.object(cache._backend, "write_blocks", fails_once),
            pytest.raises(OSError, match="gone"),
        ):
            cache.keep(kept.seq_id, np.arange(0, 40, 3))
        cache.check_integrity()
        for now, then in zip(cache.get_kv(kept.seq_id), before, strict=True):
            np.testing.assert_array_equal(now, then)
        kept.keep(np.arange(0, 40, 3))

    def test_prefixes_end_at_the_first_token_that_is_dropped(self, backend, normal):
        cache = kvnumba.PagedKVCache(20, 4, H, D, 4, backend=backend)
        tokens = np.arange(16)
        seq_id = cache.add_sequence()
        k = normal(H, 16, D)
        cache.update(seq_id, k, -k, token_ids=tokens)
        cache.keep(seq_id, np.arange(9))  # a prefix, after which tokens stand elsewhere
        cache.update(seq_id, k[:, :7], k[:, :7], token_ids=tokens[9:])
        cache.check_integrity()
        again = cache.add_sequence(np.arange(17))  # the third block has been written to
        np.testing.assert_array_equal(cache.get_kv(again)[0], k[:, :8])
        cache.finish_sequence(again)
        cache.keep(seq_id, [0, 1, 2, 3, 8, 16])
        cache.check_integrity()
        cache.finish_sequence(seq_id)
        np.testing.assert_array_equal(cache.get_kv(cache.add_sequence(np.arange(17)))[0], k[:, :8])

    def test_findable_blocks_that_are_written_to_are_not_found(self, backend, normal):
        cache = kvnumba.PagedKVCache(4, 4, H, D, 4, backend=backend)
        seq_id = cache.add_sequence()
        k = normal(H, 16, D)
        cache.update(seq_id, k, -k, token_ids=np.arange(16))
        cache.keep(seq_id, np.arange(5, 16))  # the cache is full: within its blocks
        np.testing.assert_array_equal(cache.get_kv(seq_id)[0], k[:, 5:])
        assert cache.seq_len(cache.add_sequence(np.arange(17))) == 0
        cache.check_integrity()

    def test_stats_count_what_is_held(self, backend, normal):
        cache = kvnumba.PagedKVCache(10, 4, H, D, 3, backend=backend)
        kept = Kept(cache, normal)
        kept.write(30)
        kept.keep([0, 1, 29])
        stats = cache.stats()
        assert (stats.num_tokens, stats.used_blocks) == (3, 1)
        assert stats.wasted_bytes * 4 == stats.used_bytes


class TestAfterwards:
    def test_truncate_counts_tokens_that_are_held(self, backend, normal):
        cache = kvnumba.PagedKVCache(20, 4, H, D, 1, backend=backend)
        kept = Kept(cache, normal)
        kept.write(20)
        kept.keep([0, 1, 2, 7, 9, 15])
        kept.write(3)
        cache.truncate(kept.seq_id, 7)  # the draft of 21 and 22
        assert cache.next_position(kept.seq_id) == 21
        cache.truncate(kept.seq_id, 4)
        assert cache.next_position(kept.seq_id) == 9  # as if 9 and what came later had never been written
        np.testing.assert_array_equal(cache.positions(kept.seq_id), [0, 1, 2, 7])
        kept.length = 9
        kept.attend(kept.write(2), window_left=3)
        cache.truncate(kept.seq_id, 3)
        assert cache.next_position(kept.seq_id) == 7
        cache.truncate(kept.seq_id, 2)  # nothing has been dropped before or between these
        kept.length = 2
        step = kept.write(1)
        kept.attend(step, window_left=2)
        step.attend(normal(1, 4, D), alibi_slopes=np.ones(4))

    def test_swap_and_save(self, backend, normal, tmp_path):
        cache = kvnumba.PagedKVCache(20, 4, H, D, 1, "int8", backend=backend)
        kept = Kept(cache, normal)
        kept.write(20)
        kept.keep([2, 3, 11, 12, 19])
        before = cache.get_kv(kept.seq_id)
        cache.save(tmp_path / "file")
        cache.swap_out(kept.seq_id)
        assert cache.next_position(kept.seq_id) == 20
        cache.swap_in(kept.seq_id)
        kept.attend(kept.write(1), window_left=9)
        other = kvnumba.PagedKVCache(4, 4, H, D, 2, "int8", backend=backend)
        (seq_id,) = other.load(tmp_path / "file").values()
        np.testing.assert_array_equal(other.positions(seq_id), [2, 3, 11, 12, 19])
        assert other.next_position(seq_id) == 20
        for now, then in zip(other.get_kv(seq_id), before, strict=True):
            np.testing.assert_array_equal(now, then)

    def test_files_that_do_not_know_of_heads_are_read(self, backend, normal, tmp_path):
        cache = kvnumba.PagedKVCache(20, 4, H, D, 1, backend=backend)
        kept = Kept(cache, normal)
        kept.write(6)
        identity = snapshot.identity(cache.layout, "")
        del identity["per_head"]  # as it was before caches could have blocks of one head
        with mock.patch.object(snapshot, "identity", return_value=identity):
            cache.save(tmp_path / "file")
        other = kvnumba.PagedKVCache(20, 4, H, D, 1, backend=backend)
        (seq_id,) = other.load(tmp_path / "file").values()
        np.testing.assert_array_equal(other.positions(seq_id), np.arange(6))

    def test_a_sequence_with_a_window(self, backend, normal):
        cache = kvnumba.PagedKVCache(20, 2, H, D, 2, backend=backend)
        kept = Kept(cache, normal)
        kept.seq_id = cache.add_sequence(window_left=6)
        for count in (10, 10, 1):
            kept.write(count)
        assert cache.positions(kept.seq_id)[0] == 14
        with pytest.raises(ValueError, match="positions: expected some of those that sequence .* got 3"):
            cache.keep(kept.seq_id, [3, 20])
        kept.keep([14, 15, 16, 19])  # dropped in the middle of the window, and its newest
        kept.attend(kept.write(1), window_left=6)
        kept.attend(kept.write(2), window_left=6)
        assert cache.positions(kept.seq_id)[0] == 16  # the first that position 22 sees
        for _ in range(6):  # what was kept falls out of the window by positions
            kept.attend(kept.write(1), window_left=6)
        assert cache.positions(kept.seq_id)[0] >= 21
        cache.check_integrity()

    def test_tokens_in_float_are_seen_in_the_format_of_the_cache(self, backend, normal):
        cache = kvnumba.PagedKVCache(20, 4, H, D, 1, "int4", recent_tokens=8, sink_tokens=2, backend=backend)
        kept = Kept(cache, normal)
        kept.write(20)
        held = np.array([0, 3, 12, 18, 19])
        stored = cache._backend.read(cache._buffers, 0, cache.block_table(kept.seq_id)[None], 20)
        cache.keep(kept.seq_id, held)
        for now, then in zip(cache.get_kv(kept.seq_id), stored, strict=True):
            np.testing.assert_array_equal(now, then[0][:, held])
        for count in (1, 3):
            step = kept.write(count)
            for window in (-1, 2, 9):
                kept.attend(step, window_left=window)

    def test_a_pass_of_update_is_dropped(self, backend, normal):
        cache = kvnumba.PagedKVCache(20, 4, H, D, 1, num_layers=2, backend=backend)
        seq_id = cache.add_sequence()
        k = normal(H, 5, D)
        for layer in range(2):
            cache.update(seq_id, k, k, layer=layer)
        step = cache.step([seq_id], [1])
        cache.update(seq_id, k, k, layer=0)
        cache.keep(seq_id, [4])
        with pytest.raises(ValueError, match="next is layer 0"):
            cache.update(seq_id, k, k, layer=1)
        with pytest.raises(ValueError, match="its sequences have moved on"):
            step.write(*normal(2, 1, H, D))
        np.testing.assert_array_equal(cache.get_kv(seq_id, layer=1)[0], k[:, 4:])
        out = cache.attend(seq_id, normal(4, 1, D))
        assert np.isfinite(out).all()


BAD_POSITIONS = {
    "repeated": ([1, 2, 2], ValueError, "positions: expected each once, in order, .* got 2 after 2"),
    "unsorted": ([4, 1], ValueError, "positions: expected each once, in order, .* got 1 after 4"),
    "after the end": (
        [0, 10],
        ValueError,
        "positions: expected some of those that sequence 0 holds, .* got 10",
    ),
    "negative": ([-1, 0], ValueError, "positions: expected some of those that sequence 0 holds, .* got -1"),
    "dropped before": (
        [0, 5],
        ValueError,
        "positions: expected some of those that sequence 0 holds, .* got 5",
    ),
    "floats": ([0.0, 1.0], ValueError, "positions: expected a list of integers; got float64"),
    "a mask": (np.ones(10, bool), ValueError, "positions: expected a list of integers; got bool"),
    "one of each head": (
        [[0], [1]],
        ValueError,
        r"positions: expected a list of integers; got int64 of shape",
    ),
    "a number": (3, ValueError, r"positions: expected a list of integers; got int64 of shape \(\)"),
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD_POSITIONS.values(), ids=BAD_POSITIONS)
def test_bad_positions(backend, bad, error, message, normal):
    cache = kvnumba.PagedKVCache(8, 4, H, D, 2, backend=backend)
    kept = Kept(cache, normal)
    kept.write(10)
    kept.keep([0, 1, 2, 3, 4, 6, 7, 8, 9])
    before, stats = cache.get_kv(kept.seq_id), cache.stats()
    with pytest.raises(error, match=message):
        cache.keep(kept.seq_id, bad)
    assert cache.stats() == stats
    for now, then in zip(cache.get_kv(kept.seq_id), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_sequences_that_cannot_drop_tokens(backend, normal):
    cache = kvnumba.PagedKVCache(8, 4, H, D, 2, backend=backend)
    kept = Kept(cache, normal)
    kept.write(10)
    cache.swap_out(kept.seq_id)
    for call in (cache.positions, lambda seq_id: cache.keep(seq_id, [0])):
        with pytest.raises(ValueError, match="sequence 0 is swapped out"):
            call(kept.seq_id)
        with pytest.raises(ValueError, match="sequence 1 is unknown"):
            call(1)
    cache.swap_in(kept.seq_id)
    kept.keep([0, 9])
    step = kept.write(1)
    options = {"alibi_slopes": np.ones(4), "mask_mod": lambda q_head, q_pos, kv_pos: kv_pos < 3}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"{name}: expected None, keep has dropped tokens of a sequence"):
            step.attend(normal(1, 4, D), **{name: value})
    cache.finish_sequence(kept.seq_id)
    with pytest.raises(ValueError, match="sequence 0 is finished"):
        cache.keep(kept.seq_id, [0])
