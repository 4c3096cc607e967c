"""PagedKVCache and Step."""

import numpy as np
import oracle
import pytest

import kvnumba


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 4, 15, 16, 17])
def test_keeps_what_is_appended(backend, fmt, block_size, length, normal):
    cache = kvnumba.PagedKVCache(40, block_size, 3, 8, 2, fmt, backend=backend)
    other, seq_id = cache.add_sequence(), cache.add_sequence()
    k, v = normal(3, length, 8), normal(3, length, 8)
    for t in range(length):  # in turns, so that the blocks of the two lie scattered
        cache.update(other, normal(3, 1, 8), normal(3, 1, 8))
        cache.update(seq_id, k[:, t : t + 1], v[:, t : t + 1])
    assert cache.seq_lens == {other: length, seq_id: length}
    kept_k, kept_v = cache.get_kv(seq_id)
    oracle.assert_stored(kept_k, k, fmt)
    oracle.assert_stored(kept_v, v, fmt)


def test_the_pool_holds_the_tokens_where_the_table_says(backend, normal):
    cache = kvnumba.PagedKVCache(6, 2, 3, 8, 2, backend=backend)
    assert cache.k_pool.shape == cache.v_pool.shape == (6, 3, 2, 8)
    cache.k_pool[:] = np.nan
    seq_id = cache.add_sequence()
    k = normal(3, 5, 8)
    cache.update(seq_id, k, k)
    table = cache.block_table(seq_id)
    assert len(set(table.tolist())) == 3
    for t in range(5):
        np.testing.assert_array_equal(cache.k_pool[table[t // 2], :, t % 2], k[:, t])
    assert np.isnan(cache.k_pool[table[2], :, 1]).all()


def test_blocks_come_back_and_ids_do_not(backend, normal):
    cache = kvnumba.PagedKVCache(4, 4, 1, 8, 2, backend=backend)
    seen = set()
    for _ in range(5):
        a, b = cache.add_sequence(), cache.add_sequence()
        assert not seen & {a, b}
        seen |= {a, b}
        cache.update(a, normal(1, 8, 8), normal(1, 8, 8))
        cache.update(b, normal(1, 5, 8), normal(1, 5, 8))
        assert cache.utilization() == 1.0
        cache.finish_sequence(b)
        assert cache.num_free_blocks == 2
        cache.finish_sequence(a)
        assert cache.utilization() == 0.0
        assert cache.seq_lens == {}


def test_more_live_sequences_than_allowed(backend):
    cache = kvnumba.PagedKVCache(4, 4, 1, 8, 2, backend=backend)
    first = cache.add_sequence()
    cache.add_sequence()
    with pytest.raises(kvnumba.CacheFull, match="max_num_seqs=2 sequences are live"):
        cache.add_sequence()
    cache.finish_sequence(first)
    cache.add_sequence()


def test_finished_and_unknown_ids_are_refused(backend, normal):
    cache = kvnumba.PagedKVCache(4, 4, 1, 8, 2, backend=backend)
    seq_id = cache.add_sequence()
    k = normal(1, 1, 8)
    cache.update(seq_id, k, k)
    cache.finish_sequence(seq_id)
    calls = (
        lambda i: cache.finish_sequence(i),
        lambda i: cache.update(i, k, k),
        lambda i: cache.get_kv(i),
        lambda i: cache.attend(i, k),
        lambda i: cache.step([i], [1]),
        lambda i: cache.block_table(i),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"seq_id: sequence {seq_id} is finished"):
            call(seq_id)
        with pytest.raises(ValueError, match="seq_id: expected at least 0; got -1|sequence -1 is unknown"):
            call(-1)
        for unknown in (1, 99):
            with pytest.raises(ValueError, match=f"seq_id: sequence {unknown} is unknown"):
                call(unknown)
    assert cache.num_free_blocks == 4


def test_a_full_pool_changes_nothing(backend, normal):
    cache = kvnumba.PagedKVCache(3, 4, 1, 8, 2, backend=backend)
    a, b = cache.add_sequence(), cache.add_sequence()
    k = normal(1, 6, 8)
    cache.update(a, k, k)
    before = cache.k_pool.copy(), cache.block_table(a).tolist()
    with pytest.raises(kvnumba.CacheFull, match="2 more blocks of 4 tokens are needed, 1 of 3 are free"):
        cache.update(b, normal(1, 5, 8), normal(1, 5, 8))
    with pytest.raises(kvnumba.CacheFull, match="3 more blocks of 4 tokens are needed, 1 of 3 are free"):
        cache.step([a, b], [3, 5])
    assert cache.seq_lens == {a: 6, b: 0}
    assert cache.num_free_blocks == 1
    assert cache.block_table(b).tolist() == []
    np.testing.assert_array_equal(cache.k_pool, before[0])
    assert cache.block_table(a).tolist() == before[1]
    np.testing.assert_array_equal(cache.get_kv(a)[0], k)
    cache.update(b, normal(1, 4, 8), normal(1, 4, 8))


def test_cache_full_is_a_runtime_error():
    assert issubclass(kvnumba.CacheFull, RuntimeError)


def test_a_dropped_step_keeps_its_blocks_for_its_sequence(backend, normal):
    cache = kvnumba.PagedKVCache(4, 4, 1, 8, 2, backend=backend)
    seq_id = cache.add_sequence()
    cache.step([seq_id], [16])
    assert cache.num_free_blocks == 0
    assert cache.seq_lens == {seq_id: 0}
    k = normal(1, 16, 8)
    cache.update(seq_id, k, k)
    np.testing.assert_array_equal(cache.get_kv(seq_id)[0], k)
    cache.finish_sequence(seq_id)
    assert cache.num_free_blocks == 4


def test_a_step_is_stale_once_another_is_booked(backend, normal):
    cache = kvnumba.PagedKVCache(8, 4, 2, 8, 2, num_layers=2, backend=backend)
    seq_id = cache.add_sequence()
    k = normal(2, 2, 3, 8)
    cache.update(seq_id, k[0], k[0], layer=0)  # a pass that is overtaken by another of the same length
    step = cache.step([seq_id], [3])
    for layer in range(2):
        step.write(k[1].swapaxes(0, 1), k[1].swapaxes(0, 1), layer=layer)
    with pytest.raises(ValueError, match="its sequences have moved on"):
        cache.update(seq_id, k[0], k[0], layer=1)
    assert cache.seq_lens == {seq_id: 3}
    for layer in range(2):
        np.testing.assert_array_equal(cache.get_kv(seq_id, layer=layer)[0], k[1])
    q = normal(2, 1, 8)
    cache.update(seq_id, k[0, :, :1], k[0, :, :1], layer=0)
    cache.step([seq_id], [1])  # dropped, but booked: the pass before it no longer counts
    want, _ = oracle.attention(q.swapaxes(0, 1), k[1], k[1])
    np.testing.assert_allclose(cache.attend(seq_id, q).swapaxes(0, 1), want, atol=1e-6)


def test_utilization_and_repr(backend, normal):
    cache = kvnumba.PagedKVCache(8, 4, 2, 8, 3, "int8", backend=backend)
    seq_id = cache.add_sequence()
    cache.update(seq_id, normal(2, 5, 8), normal(2, 5, 8))
    assert cache.utilization() == 0.25
    assert repr(cache).startswith("PagedKVCache(blocks=2/8, block_size=4, sequences=1/3, H=2, D=8, int8, ")
    assert cache.bytes_per_token() == 2 * 2 * (8 + 8)
    assert cache.memory_bytes() == 32 * cache.bytes_per_token()


def test_layers_through_update(backend, normal):
    cache = kvnumba.PagedKVCache(8, 4, 2, 8, 2, num_layers=2, backend=backend)
    seq_id = cache.add_sequence()
    k, v, q = normal(2, 2, 6, 8), normal(2, 2, 6, 8), normal(4, 6, 8)
    with pytest.raises(ValueError, match="next is layer 0; got 1"):
        cache.update(seq_id, k[1], v[1], layer=1)
    cache.update(seq_id, k[0], v[0], layer=0)
    assert cache.seq_lens[seq_id] == 0
    want, _ = oracle.attention(q.swapaxes(0, 1), k[0], v[0])
    np.testing.assert_allclose(cache.attend(seq_id, q, layer=0).swapaxes(0, 1), want, atol=1e-5)
    with pytest.raises(ValueError, match="expected 6 new tokens, as in layer 0; got 5 in layer 1"):
        cache.update(seq_id, k[1, :, :5], v[1, :, :5], layer=1)
    cache.update(seq_id, k[1], v[1], layer=1)
    assert cache.seq_lens[seq_id] == 6
    for layer in range(2):
        np.testing.assert_array_equal(cache.get_kv(seq_id, layer=layer)[1], v[layer])


class TestStep:
    def test_a_ragged_batch(self, backend, fmt, normal):
        cache = kvnumba.PagedKVCache(32, 4, 2, 8, 4, fmt, backend=backend)
        ids = [cache.add_sequence() for _ in range(3)]
        kept = {i: (np.empty((2, 0, 8), np.float32),) * 2 for i in ids}
        for order, new in (([0, 1, 2], [5, 0, 9]), ([2, 0], [1, 1]), ([1, 2, 0], [17, 3, 1])):
            batch = [ids[i] for i in order]
            step = cache.step(batch, new)
            total = sum(new)
            k, v, q = normal(total, 2, 8), normal(total, 2, 8), normal(total, 6, 8)
            step.write(k, v)
            out, lse = step.attend(q, return_lse=True)
            assert out.shape == (total, 6, 8)
            assert lse.shape == (total, 6)
            start = 0
            for i, n in zip(batch, new, strict=True):
                rows = slice(start, start + n)
                kept[i] = tuple(
                    np.concatenate((old, x[rows].swapaxes(0, 1)), axis=1)
                    for old, x in zip(kept[i], (k, v), strict=True)
                )
                oracle.assert_stored(cache.get_kv(i)[0], kept[i][0], fmt)
                oracle.assert_stored(cache.get_kv(i)[1], kept[i][1], fmt)
                rounded = oracle.rounding_of(cache)
                oracle.assert_as_exact((out[rows], lse[rows]), q[rows], *cache.get_kv(i), rounded=rounded)
                start += n
        assert cache.seq_lens == {ids[0]: 7, ids[1]: 17, ids[2]: 13}

    def test_describes_its_batch(self, backend):
        cache = kvnumba.PagedKVCache(32, 4, 2, 8, 4, backend=backend)
        a, b = cache.add_sequence(), cache.add_sequence()
        step = cache.step([b, a], [5, 2])
        assert step.seq_ids == [b, a]
        assert step.batch.seq_lens.tolist() == [5, 2]
        assert step.batch.query_start_loc.tolist() == [0, 5, 7]
        assert step.batch.block_table[0].tolist() == cache.block_table(b).tolist()
        assert (
            step.batch.block_table.dtype
            == step.batch.seq_lens.dtype
            == step.batch.query_start_loc.dtype
            == np.int32
        )
        assert repr(step) == "Step(sequences=2, new_tokens=7, layers_written=0/1)"

    def test_lengths_move_with_the_last_layer(self, backend, normal):
        cache = kvnumba.PagedKVCache(8, 4, 2, 8, 2, num_layers=2, backend=backend)
        seq_id = cache.add_sequence()
        step = cache.step([seq_id], [5])
        k, q = normal(5, 2, 8), normal(5, 2, 8)
        with pytest.raises(ValueError, match="layer: the new tokens of layer 0 have not been written yet"):
            step.attend(q)
        step.write(k, k, layer=0)
        step.attend(q, layer=0)
        assert cache.seq_lens[seq_id] == 0
        with pytest.raises(ValueError, match="next is layer 1; got 0"):
            step.write(k, k, layer=0)
        step.write(k, k, layer=1)
        assert cache.seq_lens[seq_id] == 5
        with pytest.raises(ValueError, match="next is none, the pass is complete; got 1"):
            step.write(k, k, layer=1)
        assert np.isfinite(step.attend(q, layer=1)).all()

    def test_gives_the_keys_of_a_pass_that_runs(self, backend, normal):
        cache = kvnumba.PagedKVCache(12, 4, 2, 8, 3, num_layers=2, backend=backend)
        ids = [cache.add_sequence(), cache.add_sequence(window_left=5)]
        k, v = normal(2, 20, 2, 8), normal(2, 20, 2, 8)  # of either sequence
        for first, last in ((0, 13), (13, 15)):
            step = cache.step(ids, [last - first] * 2)
            with pytest.raises(ValueError, match="layer: the new tokens of layer 0 have not been written yet"):
                step.get_kv()
            new_k, new_v = (x[:, first:last].reshape(-1, 2, 8) for x in (k, v))
            for layer in range(2):
                step.write(new_k + layer, new_v - layer, layer=layer)
                held = step.get_kv(layer=layer)
                for row, begin in (
                    (0, 0),
                    (1, 0 if first == 0 else 8),
                ):  # what fell out of the window is gone
                    np.testing.assert_array_equal(held[row][0].swapaxes(0, 1), k[row, begin:last] + layer)
                    np.testing.assert_array_equal(held[row][1].swapaxes(0, 1), v[row, begin:last] - layer)

    def test_a_dropped_step_leaves_no_trace(self, backend, normal):
        cache = kvnumba.PagedKVCache(4, 4, 1, 8, 2, backend=backend)
        seq_id = cache.add_sequence()
        cache.step([seq_id], [9])
        assert cache.seq_lens[seq_id] == 0
        k = normal(1, 16, 8)
        cache.update(seq_id, k, k)
        np.testing.assert_array_equal(cache.get_kv(seq_id)[0], k)
        cache.finish_sequence(seq_id)
        assert cache.num_free_blocks == 4

    def test_a_stale_step_is_refused(self, backend, normal):
        cache = kvnumba.PagedKVCache(4, 4, 1, 8, 2, backend=backend)
        seq_id = cache.add_sequence()
        stale = cache.step([seq_id], [2])
        k = normal(1, 3, 8)
        cache.update(seq_id, k, k)
        with pytest.raises(ValueError, match="its sequences have moved on"):
            stale.write(normal(2, 1, 8), normal(2, 1, 8))
        np.testing.assert_array_equal(cache.get_kv(seq_id)[0], k)
        done = cache.step([seq_id], [1])
        done.write(normal(1, 1, 8), normal(1, 1, 8))
        cache.finish_sequence(seq_id)
        with pytest.raises(ValueError, match="is finished"):
            done.attend(normal(1, 1, 8))

    def test_bad_batches_are_refused(self, backend):
        cache = kvnumba.PagedKVCache(4, 4, 1, 8, 2, backend=backend)
        a, b = cache.add_sequence(), cache.add_sequence()
        with pytest.raises(ValueError, match="seq_ids: expected each sequence once"):
            cache.step([a, a], [1, 1])
        with pytest.raises(ValueError, match="num_new_tokens: expected 0 or more; got -1"):
            cache.step([a, b], [1, -1])
        with pytest.raises(ValueError, match="num_new_tokens: expected a list of 2 integers"):
            cache.step([a, b], [1])
        with pytest.raises(ValueError, match="num_new_tokens: expected a list of 2 integers"):
            cache.step([a, b], [1, 1.5])
        assert cache.num_free_blocks == 4

    def test_an_empty_batch(self, backend, normal):
        cache = kvnumba.PagedKVCache(4, 4, 1, 8, 2, backend=backend)
        step = cache.step([], [])
        step.write(normal(0, 1, 8), normal(0, 1, 8))
        assert step.attend(normal(0, 2, 8)).shape == (0, 2, 8)
