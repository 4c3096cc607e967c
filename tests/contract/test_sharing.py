"""Blocks that several sequences hold, find, roll back and give back."""

import itertools
import logging
import threading

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba.blocks.prefix import Key

H, D = 2, 8


def make(backend, num_blocks=16, block_size=4, max_num_seqs=6, **options):
    return kvnumba.PagedKVCache(num_blocks, block_size, H, D, max_num_seqs, backend=backend, **options)


def write(cache, seq_id, tokens, normal=None):
    """Append tokens whose keys and values are a function of each token."""
    rows = np.sin(np.outer(np.frombuffer(tokens, np.uint8) + 1.0, np.arange(1, H * D + 1)))
    x = rows.reshape(len(tokens), H, D).swapaxes(0, 1).astype(np.float32)
    cache.update(seq_id, x, -x, token_ids=tokens)


class TestFork:
    def test_shares_every_block_until_one_writes(self, backend, fmt, normal):
        cache = make(backend, dtype=fmt)
        a = cache.add_sequence()
        k = normal(H, 6, D)
        cache.update(a, k, k)
        b, c = cache.fork(a), cache.fork(a)
        assert cache.num_free_blocks == 14
        assert cache.stats().shared_blocks == 2
        cache.update(b, k[:, :1], k[:, :1])  # into the second block, which three hold
        assert cache.num_free_blocks == 13
        assert cache.block_table(b)[0] == cache.block_table(a)[0]
        assert cache.block_table(b)[1] != cache.block_table(a)[1]
        cache.update(a, k[:, 1:2], k[:, 1:2])
        cache.update(c, k[:, 2:3], k[:, 2:3])  # the last holder writes in place
        assert cache.num_free_blocks == 12
        assert cache.stats().copies == 2
        for seq_id, last in ((b, 0), (a, 1), (c, 2)):
            oracle.assert_stored(
                cache.get_kv(seq_id)[0], np.concatenate([k, k[:, last : last + 1]], axis=1), fmt
            )

    def test_one_step_of_all_holders_copies_for_all_but_one(self, backend, normal):
        cache = make(backend, num_layers=3)
        a = cache.add_sequence()
        for layer in range(3):
            cache.update(a, normal(H, 5, D), normal(H, 5, D), layer=layer)
        before = [cache.get_kv(a, layer=layer) for layer in range(3)]
        ids = [a, cache.fork(a), cache.fork(a)]
        step = cache.step(ids, [1, 1, 1])
        assert cache.stats().copies == 2
        new = normal(3, 3, H, D)
        for layer in range(3):
            step.write(new[layer], -new[layer], layer=layer)
        for n, seq_id in enumerate(ids):
            for layer in range(3):
                k, v = cache.get_kv(seq_id, layer=layer)
                np.testing.assert_array_equal(k[:, :5], before[layer][0])
                np.testing.assert_array_equal(v[:, :5], before[layer][1])
                np.testing.assert_array_equal(k[:, 5], new[layer][n])

    def test_of_a_pass_that_is_not_complete(self, backend, normal):
        cache = make(backend, num_layers=2)
        a = cache.add_sequence()
        k = normal(H, 3, D)
        for layer in range(2):
            cache.update(a, k, k, layer=layer)
        cache.update(a, k[:, :1], k[:, :1], layer=0)
        b = cache.fork(a)
        assert cache.seq_lens == {a: 3, b: 3}
        np.testing.assert_array_equal(cache.get_kv(b, layer=0)[0], k)
        cache.update(b, -k, -k, layer=0)
        cache.update(a, k[:, 1:2], k[:, 1:2], layer=1)
        np.testing.assert_array_equal(cache.get_kv(a, layer=0)[0], np.concatenate([k, k[:, :1]], axis=1))

    def test_needs_a_free_sequence_but_no_block(self, backend, normal):
        cache = make(backend, num_blocks=1, max_num_seqs=2)
        a = cache.add_sequence()
        cache.update(a, normal(H, 3, D), normal(H, 3, D))
        b = cache.fork(a)
        with pytest.raises(kvnumba.CacheFull, match="max_num_seqs=2"):
            cache.fork(a)
        with pytest.raises(kvnumba.CacheFull, match="1 more blocks of 4 tokens are needed, 0 of 1 are free"):
            cache.update(b, normal(H, 1, D), normal(H, 1, D))
        cache.finish_sequence(a)
        cache.update(b, normal(H, 1, D), normal(H, 1, D))


class TestReorder:
    def test_beams_continue_their_parents(self, backend, normal):
        cache = make(backend)
        ids = [cache.add_sequence() for _ in range(3)]
        rows = {i: normal(H, 5, D) for i in ids}
        for i in ids:
            cache.update(i, rows[i], rows[i])
        cache.reorder(ids, [ids[1], ids[1], ids[0]])
        cache.check_integrity()
        for i, parent in zip(ids, [ids[1], ids[1], ids[0]], strict=True):
            np.testing.assert_array_equal(cache.get_kv(i)[0], rows[parent])
        assert cache.num_free_blocks == 12  # the third beam's two blocks are back

    def test_bad_orders_are_refused(self, backend):
        cache = make(backend)
        a, b = cache.add_sequence(), cache.add_sequence()
        with pytest.raises(ValueError, match="parents: expected 2, one for each of seq_ids; got 1"):
            cache.reorder([a, b], [a])
        with pytest.raises(ValueError, match="seq_ids: expected each sequence once"):
            cache.reorder([a, a], [a, b])
        with pytest.raises(ValueError, match="sequence 9 is unknown"):
            cache.reorder([a, b], [b, 9])


class TestTruncate:
    def test_exact_within_a_shared_block(self, backend, fmt, normal):
        cache = make(backend, dtype=fmt)
        a = cache.add_sequence()
        k = normal(H, 11, D)
        cache.update(a, k, k)
        b = cache.fork(a)
        cache.truncate(b, 6)
        assert len(cache.block_table(b)) == 2
        new = normal(H, 3, D)
        cache.update(b, new, new)
        oracle.assert_stored(cache.get_kv(b)[0], np.concatenate([k[:, :6], new], axis=1), fmt)
        oracle.assert_stored(cache.get_kv(a)[0], k, fmt)

    def test_gives_back_what_a_dropped_step_booked(self, backend):
        cache = make(backend)
        a = cache.add_sequence()
        step = cache.step([a], [9])
        cache.truncate(a, 0)
        assert cache.num_free_blocks == 16
        with pytest.raises(ValueError, match="its sequences have moved on"):
            step.write(np.zeros((9, H, D), np.float32), np.zeros((9, H, D), np.float32))

    def test_a_step_of_before_attends_no_more(self, backend, normal):
        cache = make(backend)
        a = cache.add_sequence()
        x = normal(6, H, D)
        step = cache.step([a], [6])
        step.write(x, x)
        step.attend(x)
        cache.truncate(a, 2)
        b = cache.add_sequence()
        cache.update(b, normal(H, 8, D), normal(H, 8, D))  # in what a gave back
        with pytest.raises(ValueError, match="its sequences have moved on"):
            step.attend(x)

    def test_lengths_out_of_range(self, backend, normal):
        cache = make(backend)
        a = cache.add_sequence()
        cache.update(a, normal(H, 3, D), normal(H, 3, D))
        with pytest.raises(ValueError, match="length: expected at most the sequence's 3 tokens; got 4"):
            cache.truncate(a, 4)
        with pytest.raises(ValueError, match="length: expected at least 0; got -1"):
            cache.truncate(a, -1)

    def test_what_was_rolled_back_is_not_found_under_the_old_tokens(self, backend):
        cache = make(backend)
        a = cache.add_sequence()
        write(cache, a, b"abcdefgh")
        cache.truncate(a, 6)
        write(cache, a, b"xy")
        b = cache.add_sequence(b"abcdefgh!")
        cached = cache.seq_len(b)
        assert cached == 4
        c = cache.add_sequence(b"abcdefxy!")
        cached = cache.seq_len(c)
        assert cached == 8
        np.testing.assert_array_equal(cache.get_kv(c)[0], cache.get_kv(a)[0])
        assert cache.seq_lens == {a: 8, b: 4, c: 8}


class TestWindow:
    def test_gives_back_blocks_and_attends_as_before(self, backend, fmt, normal):
        cache = make(backend, num_blocks=4, dtype=fmt)
        a = cache.add_sequence(window_left=6)
        k = np.zeros((H, 0, D), np.float32)
        for _ in range(30):
            new = normal(H, 1, D)
            k = np.concatenate([k, new], axis=1)
            cache.update(a, new, new)
            kept = cache.get_kv(a)[0]
            oracle.assert_stored(kept, k[:, k.shape[1] - kept.shape[1] :], fmt)
            q = normal(4, 1, D)
            out, lse = cache.attend(a, q, window_left=6, return_lse=True)
            oracle.assert_as_exact(
                (out.swapaxes(0, 1), lse.swapaxes(0, 1)),
                q.swapaxes(0, 1),
                kept,
                cache.get_kv(a)[1],
                window_left=6,
                rounded=oracle.rounding_of(cache),
            )
        assert cache.num_free_blocks >= 1
        assert cache.block_table(a).tolist().count(-1) == 5

    def test_wider_windows_are_refused(self, backend, normal):
        cache = make(backend)
        a, b = cache.add_sequence(window_left=3), cache.add_sequence()
        k = normal(3, H, D)
        step = cache.step([a, b], [2, 1])
        step.write(k, k)
        for window in (-1, 4):
            with pytest.raises(ValueError, match=f"window_left: expected 0 to 3, .*; got {window}"):
                step.attend(normal(3, 4, D), window_left=window)
        assert step.attend(normal(3, 4, D), window_left=3).shape == (3, 4, D)

    def test_returns_to_where_the_latest_step_began_but_not_further(self, backend, normal):
        cache = make(backend)
        a = cache.add_sequence(window_left=4)
        k = normal(H, 20, D)
        cache.update(a, k, k)
        cache.update(a, k[:, :3], k[:, :3])
        assert cache.block_table(a).tolist()[:4] == [-1] * 4
        cache.truncate(a, 20)
        with pytest.raises(
            ValueError, match="length: expected 20 or more, tokens before 16 fell out of the window"
        ):
            cache.truncate(a, 19)
        np.testing.assert_array_equal(cache.get_kv(a)[0], k[:, 16:])

    def test_gives_nothing_back_when_a_copy_fails(self, backend, normal, monkeypatch):
        cache = make(backend)
        a = cache.add_sequence(window_left=4)
        k = normal(H, 18, D)
        cache.update(a, k, k)
        cache.fork(a)

        def failing(*args):
            raise RuntimeError("no copy today")

        monkeypatch.setattr(cache._backend, "copy_blocks", failing)
        with pytest.raises(RuntimeError, match="no copy today"):
            cache.update(a, k[:, :1], k[:, :1])  # into a block that two hold, as the window leaves three
        cache.check_integrity()
        np.testing.assert_array_equal(cache.get_kv(a)[0], k)
        cache.truncate(a, 0)


class TestPrefixes:
    def test_a_finished_sequence_is_found(self, backend):
        cache = make(backend)
        a = cache.add_sequence(b"abcdefghij")
        cached = cache.seq_len(a)
        assert cached == 0
        write(cache, a, b"abcdefghij")
        want = cache.get_kv(a)
        cache.finish_sequence(a)
        assert cache.num_free_blocks == 16
        assert cache.stats().cached_blocks == 2
        b = cache.add_sequence(b"abcdefghij")
        cached = cache.seq_len(b)
        assert cached == cache.seq_lens[b] == 8
        write(cache, b, b"ij")
        np.testing.assert_array_equal(cache.get_kv(b)[0], want[0])
        np.testing.assert_array_equal(cache.get_kv(b)[1], want[1])
        stats = cache.stats()
        assert (stats.queries, stats.hits, stats.hit_rate) == (20, 8, 0.4)

    def test_the_last_token_is_always_computed(self, backend):
        cache = make(backend)
        a = cache.add_sequence()
        write(cache, a, b"abcdefgh")
        assert [cache.seq_len(cache.add_sequence(b"abcdefgh"[:n])) for n in (0, 1, 4, 5)] == [0, 0, 0, 4]
        assert cache.seq_len(cache.add_sequence(b"abcdefgh")) == 4

    def test_by_all_tokens_before_and_by_salt(self, backend):
        cache = make(backend, max_num_seqs=9)
        a = cache.add_sequence(cache_salt="one")
        write(cache, a, b"abcdefgh")
        for tokens, salt, want in (
            (b"abcdefgh!", "one", 8),
            (b"xbcdefgh!", "one", 0),
            (b"abcdxfgh!", "one", 4),
            (b"efghefgh!", "one", 0),
            (b"abcdefgh!", "two", 0),
            (b"abcdefgh!", "", 0),
        ):
            seq_id = cache.add_sequence(tokens, cache_salt=salt)
            cached = cache.seq_len(seq_id)
            assert cached == want
            cache.finish_sequence(seq_id)

    def test_tokens_that_were_not_told_are_not_found(self, backend, normal):
        cache = make(backend)
        a = cache.add_sequence()
        write(cache, a, b"abcd")
        cache.update(a, normal(H, 2, D), normal(H, 2, D))
        write(cache, a, b"ghijkl")  # what comes after an unknown token is unknown
        assert cache.seq_len(cache.add_sequence(b"abcdefghijkl")) == 4

    def test_the_oldest_tail_is_evicted_first(self, backend):
        cache = make(backend, num_blocks=6)
        for tokens in (b"aaaabbbbcccc", b"xxxxyyyy"):
            seq_id = cache.add_sequence()
            write(cache, seq_id, tokens)
            cache.finish_sequence(seq_id)
        assert cache.stats().free_blocks - cache.stats().cached_blocks == 1
        a = cache.add_sequence(b"aaaa!")  # used again, and then the newest
        cached = cache.seq_len(a)
        assert cached == 4
        cache.finish_sequence(a)
        filler = cache.add_sequence()
        found = []
        for _ in range(6):
            cache.step([filler], [1 + 4 * len(found)])  # one block more than before
            one = cache.add_sequence(b"aaaabbbbcccc!")
            cached = cache.seq_len(one)
            two = cache.add_sequence(b"xxxxyyyy!")
            other = cache.seq_len(two)
            found.append((cached, other))
            cache.finish_sequence(two)
            cache.finish_sequence(one)
        assert cache.stats().evictions == 5
        assert found[0] == (12, 8)
        assert found[-1] == (0, 0)
        assert all(new <= old for old, new in itertools.pairwise(found))

    def test_equal_tokens_of_two_sequences_at_once(self, backend):
        cache = make(backend)
        a, b = cache.add_sequence(), cache.add_sequence()
        write(cache, a, b"abcdef")
        write(cache, b, b"abcdefgh")
        cache.finish_sequence(a)
        c = cache.add_sequence(b"abcdefgh!")
        cached = cache.seq_len(c)
        assert cached == 8
        np.testing.assert_array_equal(cache.get_kv(c)[0], cache.get_kv(b)[0])
        cache.check_integrity()

    def test_collisions_of_the_hash_share_nothing(self, backend, monkeypatch):
        monkeypatch.setattr(Key, "__hash__", lambda self: 7)
        cache = make(backend, num_blocks=64, max_num_seqs=20)
        texts = [bytes([97 + n, 98, 99, 100, 101, 102 + n % 3, 103, 104, 105]) for n in range(9)]
        kept = {}
        for text in texts:
            seq_id = cache.add_sequence()
            write(cache, seq_id, text)
            kept[text] = cache.get_kv(seq_id)[0]
            cache.finish_sequence(seq_id)
        for text in texts:
            seq_id = cache.add_sequence(text)
            cached = cache.seq_len(seq_id)
            assert cached == 8
            np.testing.assert_array_equal(cache.get_kv(seq_id)[0], kept[text][:, :8])
        assert cache.seq_len(cache.add_sequence(b"zbcdefghi")) == 0

    def test_bad_tokens_are_refused(self, backend, normal):
        cache = make(backend, num_layers=2)
        with pytest.raises(ValueError, match="token_ids: expected a list of integers"):
            cache.add_sequence([1.5])
        with pytest.raises(TypeError, match="cache_salt: expected a str; got int"):
            cache.add_sequence([1], cache_salt=1)
        with pytest.raises(ValueError, match="window_left: expected at least -1; got -2"):
            cache.add_sequence([1], window_left=-2)
        a = cache.add_sequence()
        k = normal(H, 2, D)
        with pytest.raises(ValueError, match="token_ids: expected a list of 2 integers"):
            cache.update(a, k, k, token_ids=[1])
        with pytest.raises(ValueError, match="token_ids: expected 1 sequences of tokens, or None; got 2"):
            cache.step([a], [2], token_ids=[[1], [2]])
        cache.update(a, k, k, token_ids=[1, 2])
        with pytest.raises(ValueError, match="token_ids: expected with layer 0"):
            cache.update(a, k, k, layer=1, token_ids=[1, 2])
        assert cache.seq_lens == {a: 0}


def test_stats_count_bytes_and_waste(backend, normal):
    cache = make(backend, dtype="int8")
    a = cache.add_sequence()
    cache.update(a, normal(H, 6, D), normal(H, 6, D))
    cache.fork(a)
    stats = cache.stats()
    assert (stats.used_blocks, stats.shared_blocks, stats.free_blocks, stats.num_tokens) == (2, 2, 14, 12)
    assert stats.used_bytes == 8 * cache.bytes_per_token()
    assert stats.wasted_bytes == 2 * cache.bytes_per_token()
    assert stats.waste == 0.25
    assert stats.utilization == cache.utilization() == 0.125


def test_quiet_unless_the_application_listens(backend, caplog, capfd):
    cache = make(backend)
    a = cache.add_sequence()
    cache.swap_out(a)
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.DEBUG, logger="kvnumba"):
        cache.swap_in(a)
    assert caplog.messages == [f"sequence {a}: 0 blocks swapped in"]


def test_threads_with_sequences_of_their_own(backend):
    cache = make(backend, num_blocks=200, max_num_seqs=40)
    root = cache.add_sequence()
    write(cache, root, b"abcdef")
    failures = []

    def work(number):
        try:
            for n in range(25):
                tokens = bytes([number, n, 7, 9, 11])
                seq_id = cache.fork(root)
                write(cache, seq_id, tokens)
                other = cache.add_sequence(b"abcdef" + tokens)
                cached = cache.seq_len(other)
                assert cached == 8
                np.testing.assert_array_equal(cache.get_kv(other)[0], cache.get_kv(seq_id)[0][:, :8])
                cache.truncate(seq_id, 5)
                cache.swap_out(other)
                cache.swap_in(other)
                cache.finish_sequence(other)
                cache.finish_sequence(seq_id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    cache.check_integrity()
    assert cache.seq_lens == {root: 6}
