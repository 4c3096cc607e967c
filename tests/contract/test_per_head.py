"""PerHeadKVCache: heads that hold different tokens."""

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba.backends.registry import get_backend

H, HQ, D, LAYERS = 2, 4, 8, 2


def make(backend, fmt="float32", num_blocks=120, block_size=4, max_num_seqs=3, **options):
    return kvnumba.PerHeadKVCache(
        num_blocks, block_size, H, D, max_num_seqs, fmt, num_layers=LAYERS, backend=backend, **options
    )


def write(cache, ids, counts, normal):
    """A forward pass; returns it, and its keys and values (LAYERS, T, H, D)."""
    step = cache.step(ids, counts)
    k, v = normal(2, LAYERS, sum(counts), H, D)
    for layer in range(LAYERS):
        step.write(k[layer], v[layer], layer=layer)
    return step, k, v


def assert_attends(cache, step, counts, normal, **options):
    """What each new token sees is what each head holds, at the places where it stands."""
    for layer in range(LAYERS):
        q = normal(step.num_tokens, HQ, D)
        out, lse, *masses = step.attend(q, layer=layer, return_lse=True, **options)
        ends = np.cumsum(counts)
        for n, (seq_id, end, count) in enumerate(zip(step.seq_ids, ends.tolist(), counts, strict=True)):
            pairs = zip(cache.get_kv(seq_id, layer=layer), cache.positions(seq_id, layer=layer), strict=True)
            for head, (rows, held) in enumerate(pairs):
                placed = [np.full((1, cache.seq_len(seq_id), D), np.nan, np.float32) for _ in rows]
                for everywhere, x in zip(placed, rows, strict=True):
                    everywhere[0, held] = x
                tokens, heads = slice(end - count, end), slice(head * HQ // H, (head + 1) * HQ // H)
                of_head = {name: x[heads] if name == "sinks" else x for name, x in options.items()}
                of_head.pop("return_mass", None)
                of_head["present"] = np.isin(np.arange(cache.seq_len(seq_id)), held)
                oracle.assert_as_exact(
                    (out[tokens, heads], lse[tokens, heads]),
                    q[tokens, heads],
                    *placed,
                    rounded=oracle.rounding_of(cache),
                    **of_head,
                )
                for of_all in masses:
                    want = oracle.mass(q[tokens, heads], placed[0], **of_head)[0, held]
                    np.testing.assert_allclose(of_all[n][head], want, rtol=1e-4, atol=1e-4)
                    assert of_all[n][head].dtype == np.float32


def assert_same(one, other):
    for pair, other_pair in zip(one, other, strict=True):
        for x, y in zip(pair, other_pair, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("fmt", ["float32", "int8", "int4"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_heads_see_what_they_hold(backend, fmt, block_size, normal):
    cache = make(backend, fmt, 600, block_size)
    a, b = cache.add_sequence(), cache.add_sequence()
    write(cache, [a, b], [20, 7], normal)
    before = [cache.get_kv(a, layer=layer) for layer in range(LAYERS)]
    held = [[[0, 3, 4, 19], [*range(5, 18)]], [[], [*range(20)]]]
    for layer in range(LAYERS):
        cache.keep(a, held[layer], layer=layer)
        cache.check_integrity()
        assert_same(
            cache.get_kv(a, layer=layer),
            [(k[n], v[n]) for n, (k, v) in zip(held[layer], before[layer], strict=True)],
        )
    assert cache.head_lens(a).tolist() == [[4, 13], [0, 20]]
    assert cache.seq_lens == {a: 20, b: 7}
    for counts in ([1, 1], [3, 5]):
        step, _, _ = write(cache, [b, a], counts, normal)
        assert step.positions[-1] == cache.seq_len(a) - 1
        for options in ({}, {"window_left": 0}, {"window_left": 9}, {"sinks": normal(HQ)}):
            assert_attends(cache, step, counts, normal, **options)
        if get_backend(backend).finds_mass:
            for options in ({}, {"sinks": normal(HQ)}):
                assert_attends(cache, step, counts, normal, return_mass=True, **options)
    cache.keep(a, [[22, 25], [20]])  # again, in all layers
    assert cache.head_lens(a).tolist() == [[2, 1], [2, 1]]
    cache.keep(a, {1: [[22], []], 0: [[25], [20]]})  # others in each layer
    assert [[at.tolist() for at in cache.positions(a, layer=n)] for n in range(2)] == [
        [[25], [20]],
        [[22], []],
    ]
    cache.keep(a, {0: [[], [20]]})
    assert cache.head_lens(a).tolist() == [[0, 1], [1, 0]]
    cache.check_integrity()


def test_memory_is_that_of_the_tokens_that_heads_hold(backend, normal):
    cache = make(backend, block_size=4)
    seq_id = cache.add_sequence()
    write(cache, [seq_id], [32], normal)
    before = cache.stats()
    assert before.used_bytes == 32 * cache.bytes_per_token()
    assert before.num_sequences == 1
    cache.keep(seq_id, [np.arange(0, 32, 8), np.arange(12)])
    after = cache.stats()
    assert after.used_bytes * 4 == before.used_bytes
    assert after.num_tokens == LAYERS * 16
    cache.finish_sequence(seq_id)
    assert cache.num_free_blocks == cache.num_blocks


def test_it_is_a_paged_cache_until_heads_drop_tokens(backend, normal):
    cache = make(backend)
    paged = kvnumba.PagedKVCache(40, 4, H, D, 3, num_layers=LAYERS, backend=backend)
    ids = [[each.add_sequence() for _ in range(2)] for each in (cache, paged)]
    k, v, q = normal(LAYERS, 9, H, D), normal(LAYERS, 9, H, D), normal(LAYERS, 9, HQ, D)
    steps = [each.step(of, [4, 5]) for each, of in zip((cache, paged), ids, strict=True)]
    for layer in range(LAYERS):
        for step in steps:
            step.write(k[layer], v[layer], layer=layer)
        found = [step.attend(q[layer], layer=layer) for step in steps]
        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    for layer in range(LAYERS):
        for each, of in zip((cache, paged), ids, strict=True):
            each.update(of[0], k[layer].swapaxes(0, 1), v[layer].swapaxes(0, 1), layer=layer)
        found = [
            each.attend(of[0], q[layer].swapaxes(0, 1), layer=layer)
            for each, of in zip((cache, paged), ids, strict=True)
        ]
        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    found = [
        each.attend(of[1], q[0, :2].swapaxes(0, 1)) for each, of in zip((cache, paged), ids, strict=True)
    ]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    assert cache.seq_lens == paged.seq_lens
    assert cache.bytes_per_token() == paged.bytes_per_token()


def test_fork_truncate_and_save(backend, normal, tmp_path):
    cache = make(backend, "int8")
    a = cache.add_sequence()
    write(cache, [a], [12], normal)
    b = cache.fork(a)
    before = [cache.get_kv(a, layer=layer) for layer in range(LAYERS)]
    cache.keep(b, [[1, 2, 10], [0, 11]])
    for layer in range(LAYERS):
        assert_same(cache.get_kv(a, layer=layer), before[layer])
    step, _, _ = write(cache, [b], [3], normal)
    assert_attends(cache, step, [3], normal, window_left=4)
    cache.truncate(b, 13)  # a draft's last two
    assert cache.head_lens(b).tolist() == [[4, 3]] * 2
    cache.truncate(b, 11)  # one head has dropped the token before: it goes on from there too
    cache.check_integrity()
    assert [held.tolist() for held in cache.positions(b)] == [[1, 2, 10], [0]]
    step, _, _ = write(cache, [b], [2], normal)
    assert step.positions.tolist() == [11, 12]
    assert_attends(cache, step, [2], normal, window_left=4)

    cache.finish_sequence(cache.fork(a))  # so that ids differ
    cache.save(tmp_path / "file", fingerprint="test")
    other = make(backend, "int8", num_blocks=80, max_num_seqs=2)
    ids = other.load(tmp_path / "file", fingerprint="test")
    other.check_integrity()
    for old, new in ids.items():
        assert other.seq_len(new) == cache.seq_len(old)
        for layer in range(LAYERS):
            assert_same(other.get_kv(new, layer=layer), cache.get_kv(old, layer=layer))
            for one, two in zip(
                other.positions(new, layer=layer), cache.positions(old, layer=layer), strict=True
            ):
                np.testing.assert_array_equal(one, two)
    with pytest.raises(kvnumba.CacheFull, match="2 sequences are to be added, 0 of max_num_seqs=2 are free"):
        other.load(tmp_path / "file", fingerprint="test")
    paged = kvnumba.PagedKVCache(80, 4, H, D, 20, "int8", num_layers=LAYERS, backend=backend)
    with pytest.raises(ValueError, match="per_head: expected False; the file has True"):
        paged.load(tmp_path / "file", fingerprint="test")


def test_reorder(backend, normal):
    """Beams: each sequence becomes what one of them was, each head with its own tokens."""
    cache = make(backend)
    a, b, c = (cache.add_sequence() for _ in range(3))
    write(cache, [a, b, c], [9, 9, 9], normal)
    cache.keep(a, [[0, 1, 8], [2, 8]])
    cache.keep(b, [[5, 6, 7, 8], [0]])
    held = {seq_id: (cache.get_kv(seq_id), cache.positions(seq_id)) for seq_id in (a, b, c)}
    cache.reorder([a, b, c], [b, a, a])
    cache.check_integrity()
    for seq_id, parent in ((a, b), (b, a), (c, a)):
        pairs, positions = held[parent]
        assert_same(cache.get_kv(seq_id), pairs)
        assert [x.tolist() for x in cache.positions(seq_id)] == [x.tolist() for x in positions]
    step, _, _ = write(cache, [a, c], [2, 2], normal)
    assert_attends(cache, step, [2, 2], normal)
    assert_same(cache.get_kv(b), held[a][0])


def test_layers_that_hold_different_numbers_of_tokens(backend, normal):
    """Queries of one layer ask nothing of the others."""
    cache = make(backend)
    seq_id = cache.add_sequence()
    write(cache, [seq_id], [10], normal)
    q = normal(HQ, 4, D)
    want = cache.attend(seq_id, q, window_left=3)
    cache.keep(seq_id, {1: [[0], [0, 9]]})
    np.testing.assert_array_equal(cache.attend(seq_id, q, window_left=3), want)


def test_while_update_has_layers_to_go(backend, normal):
    cache = make(backend)
    seq_id = cache.add_sequence()
    write(cache, [seq_id], [5], normal)
    k, v, q = normal(H, 3, D), normal(H, 3, D), normal(HQ, 3, D)
    cache.update(seq_id, k, v, layer=0)
    out = cache.attend(seq_id, q)
    with pytest.raises(ValueError, match="q: expected queries of the 3 tokens that `update` writes; got 1"):
        cache.attend(seq_id, q[:, -1:])
    cache.update(seq_id, k, v, layer=1)
    np.testing.assert_allclose(cache.attend(seq_id, q[:, -1:]), out[:, -1:], rtol=1e-5, atol=1e-6)


def test_a_sequence_that_changes_while_it_is_written(backend, normal, monkeypatch):
    """As another thread might change it: the pass is no longer the latest, and counts nothing."""
    cache = make(backend)
    seq_id = cache.add_sequence()
    write(cache, [seq_id], [10], normal)
    step = cache.step([seq_id], [2])
    k, v = normal(2, 2, H, D)
    step.write(k, v, layer=0)
    real = cache._backend.write

    def interrupted(*args):
        real(*args)
        cache.keep(seq_id, [[0, 1], [0, 1]])

    monkeypatch.setattr(cache._backend, "write", interrupted)
    with pytest.raises(ValueError, match="its sequences have moved on"):
        step.write(k, v, layer=1)
    cache.check_integrity()
    assert cache.seq_len(seq_id) == 10
    assert cache.head_lens(seq_id).tolist() == [[2] * H] * LAYERS


class TestAllHeadsOrNone:
    def test_booking(self, backend, normal):
        cache = make(backend, num_blocks=10)
        a = cache.add_sequence()
        write(cache, [a], [8], normal)  # two blocks of each of four heads
        with pytest.raises(kvnumba.CacheFull, match="4 more blocks of 4 tokens are needed, 2 of 10 are free"):
            cache.step([a], [1])
        assert cache.num_free_blocks == 2
        cache.check_integrity()

    def test_keep_in_a_full_cache(self, backend, normal):
        cache = make(backend, num_blocks=16)
        a = cache.add_sequence()
        write(cache, [a], [8], normal)
        b = cache.fork(a)
        write(cache, [b], [5], normal)
        before = cache.get_kv(b), cache.stats()
        with pytest.raises(kvnumba.CacheFull, match="2 more blocks of 4 tokens are needed, 0 of 16 are free"):
            cache.keep(b, [[1, 2, 3, 4, 9, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
        assert cache.stats() == before[1]
        assert_same(cache.get_kv(b), before[0])
        cache.keep(b, [[1, 2, 9], [1, 12]])  # within its own blocks
        cache.check_integrity()
        assert_same(
            cache.get_kv(b), [(k[n], v[n]) for n, (k, v) in zip(([1, 2, 9], [1, 12]), before[0], strict=True)]
        )

    def test_sequences(self, backend, normal):
        cache = make(backend, max_num_seqs=2)
        a, b = cache.add_sequence(), cache.add_sequence()
        for call in (cache.add_sequence, lambda: cache.fork(a)):
            with pytest.raises(kvnumba.CacheFull, match="max_num_seqs=2 sequences are live already"):
                call()
        cache.finish_sequence(a)
        c = cache.fork(b)
        cache.check_integrity()
        assert len({a, b, c}) == 3
        assert cache.seq_lens == {b: 0, c: 0}


BAD_CALLS = {
    "one list": (lambda c, i: c.keep(i, [0, 1]), ValueError, r"positions\[0\]: expected a list of integers"),
    "too few heads": (lambda c, i: c.keep(i, [[0]]), ValueError, "positions: expected 2 lists, .*; got 1"),
    "no list": (lambda c, i: c.keep(i, 3), ValueError, "positions: expected 2 lists, .* got int"),
    "repeated": (lambda c, i: c.keep(i, [[0], [1, 1]]), ValueError, "positions: expected each once, .* got 1 after 1"),
    "not held": (lambda c, i: c.keep(i, [[0], [9]]), ValueError, "positions: .* sequence 0 holds, .* got 9"),
    "layer not held": (lambda c, i: c.keep(i, {0: [[0], [0]], 1: [[0], [9]]}), ValueError, "positions: .* got 9"),
    "heads of a layer": (lambda c, i: c.keep(i, {1: [[0]]}), ValueError, r"positions\[1\]: expected 2 lists"),
    "layers and a layer": (lambda c, i: c.keep(i, {0: [[0], [0]]}, layer=0), ValueError, "layer: expected None with"),
    "no such layers": (lambda c, i: c.keep(i, {2: [[0], [0]]}), ValueError, "layer: expected 0 to 1; got 2"),
    "no such layer": (lambda c, i: c.keep(i, [[0], [1]], layer=2), ValueError, "layer: expected 0 to 1; got 2"),
    "unknown": (lambda c, i: c.keep(i + 1, [[0], [1]]), ValueError, "seq_id: sequence 1 is unknown"),
    "twice": (lambda c, i: c.step([i, i], [1, 1]), ValueError, r"seq_ids: expected each sequence once; got \[0, 0\]"),
    "reorder, twice": (lambda c, i: c.reorder([i, i], [i, i]), ValueError, r"seq_ids: expected each .*; got \[0, 0\]"),
    "reorder, fewer": (lambda c, i: c.reorder([i], []), ValueError, "parents: expected"),
    "reorder, unknown": (lambda c, i: c.reorder([i], [i + 1]), ValueError, "seq_id: sequence 1 is unknown"),
    "too long": (lambda c, i: c.truncate(i, 10), ValueError, "length: expected at most the sequence's 9 tokens"),
    "layer": (lambda c, i: c.step([i], [0]).attend(np.ones((0, 4, 8)), layer=1), ValueError, "layer 1 have not been"),
    "heads": (lambda c, i: c.step([i], [1]).write(*np.ones((2, 1, 3, 8))), ValueError, "k: expected shape .*H=2"),
    "queries": (lambda c, i: c.attend(i, np.ones((3, 1, 8))), ValueError, "q: expected a multiple of num_kv_heads=2"),
    "dropped queries": (lambda c, i: c.attend(i, np.ones((4, 1, 8))), ValueError, "q: expected queries of newest"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(backend, call, error, message, normal):
    cache = make(backend)
    seq_id = cache.add_sequence()
    write(cache, [seq_id], [9], normal)
    cache.keep(seq_id, [[0, 1, 2], [0, 1, 8]])
    before, stats = cache.get_kv(seq_id), cache.stats().used_bytes
    with pytest.raises(error, match=message):
        call(cache, seq_id)
    cache.check_integrity()
    cache.truncate(seq_id, 9)  # blocks that a dropped step has booked
    assert_same(cache.get_kv(seq_id), before)
    assert cache.stats().used_bytes == stats
    assert cache.seq_lens == {seq_id: 9}


def test_slopes_and_options_that_it_does_not_have(backend, normal):
    cache = make(backend)
    seq_id = cache.add_sequence()
    step, _, _ = write(cache, [seq_id], [2], normal)
    with pytest.raises(ValueError, match="alibi_slopes: expected None"):
        step.attend(normal(2, HQ, D), alibi_slopes=np.ones(HQ))
    with pytest.raises(ValueError, match="score_mod: expected None"):
        step.attend(normal(2, HQ, D), score_mod=lambda score, q_head, q_pos, kv_pos: score)
    with pytest.raises(ValueError, match="recent_tokens: expected 0 with blocks of one head; got 4"):
        make(backend, "int4", recent_tokens=4)
    cache.finish_sequence(seq_id)
    with pytest.raises(ValueError, match="seq_id: sequence 0 is finished"):
        cache.head_lens(seq_id)
