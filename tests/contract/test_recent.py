"""Recent tokens in float: which keys are attended to in float16, in every mode of a cache, and what that takes."""

import numpy as np
import oracle
import pytest

import kvnumba

H, D = 2, 16
RECENT, SINKS = 20, 5
FORMATS = [("int4", "int4"), ("int8", "int4"), ("fp8_e4m3", "fp8_e4m3")]


def make(backend, formats=("int4", "int4"), **options):
    key_format, value_format = formats
    options = {"recent_tokens": RECENT, **options}
    return kvnumba.PagedKVCache(
        60, 8, H, D, 6, key_format=key_format, value_format=value_format, backend=backend, **options
    )


def in_blocks(x, fmt):
    """Keys or values (H, T, D) as a plain cache of a format has them."""
    cache = kvnumba.KVCache(1, x.shape[1], H, D, fmt, backend="numpy")
    cache.update(x[None], x[None])
    return cache.get_kv(0)[0]


def mixed(k, v, formats, begin, sinks=0):
    """What is attended to: float16 from `begin` on and before `sinks`, the formats between."""
    found = []
    for x, fmt in zip((k, v), formats, strict=True):
        kept = x.astype(np.float16).astype(np.float32)
        kept[:, sinks:begin] = in_blocks(x, fmt)[:, sinks:begin]
        found.append(kept)
    return found


def check(found, q, k, v, formats, begin, sinks=0, backend="numpy", **options):
    """`found`, out (Hq, T, D) and lse, is attention over keys and values (H, S, D) of which some are in float."""
    keys, values = mixed(k, v, formats, begin, min(sinks, begin))
    codes = backend == "cpu" and "fp8_e4m3" not in formats
    out, lse = (x.swapaxes(0, 1) for x in found)
    rounded = oracle.sixteen_bits if codes else None
    oracle.assert_as_exact((out, lse), q.swapaxes(0, 1), keys, values, rounded=rounded, **options)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_the_newest_tokens_and_those_of_a_pass_are_seen_in_float(backend, formats, sinks, normal):
    cache = make(backend, formats, sink_tokens=sinks)
    seq_id = cache.add_sequence()
    k, v = normal(H, 150, D), normal(H, 150, D)
    length = 0
    for count in (3, 1, 40, 1, 16, 17, 2, 60, 1, 1):
        end = length + count
        cache.update(seq_id, k[:, length:end], v[:, length:end])
        q = normal(4, count, D)
        held = min(sinks, length)
        found = cache.attend(seq_id, q, return_lse=True)
        begin = max(0, length + 1 - RECENT)
        check(found, q, k[:, :end], v[:, :end], formats, begin, held, backend)
        length = end
        stored = cache.get_kv(seq_id)
        begin = max(0, length - RECENT)
        want = mixed(k[:, :end], v[:, :end], formats, begin, min(sinks, begin))
        for have, expected in zip(stored, want, strict=True):
            np.testing.assert_allclose(have, expected, rtol=1e-6, atol=1e-6)


def test_every_option_reaches_over_the_border(backend, normal):
    cache = make(backend, rotation=True)
    seq_id = cache.add_sequence()
    k, v, q = normal(H, 100, D), normal(H, 100, D), normal(4, 1, D)
    cache.update(seq_id, k[:, :99], v[:, :99])
    cache.update(seq_id, k[:, 99:], v[:, 99:])
    stored = cache.get_kv(seq_id)
    for options in (
        {"window_left": 50},
        {"window_left": 7},
        {"alibi_slopes": np.abs(normal(4))},
        {"sinks": normal(4), "logits_soft_cap": 3.0},
    ):
        out, lse = cache.attend(seq_id, q, return_lse=True, **options)
        want, want_lse = oracle.attention(q.swapaxes(0, 1), *stored, **options)
        np.testing.assert_allclose(out.swapaxes(0, 1), want, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(lse.swapaxes(0, 1), want_lse, rtol=1e-3, atol=1e-3)


def test_a_step_of_prompts_and_single_tokens(backend, normal):
    """Some sequences have float blocks of their own in a pass, others write to their rings."""
    cache = make(backend, num_layers=2)
    lengths, new = [30, 0, 45, 7], [1, 50, 0, 9]
    ids = [cache.add_sequence() for _ in lengths]
    k = [normal(2, H, n + t, D) for n, t in zip(lengths, new, strict=True)]
    v = [normal(2, H, n + t, D) for n, t in zip(lengths, new, strict=True)]
    for seq_id, keys, values, n in zip(ids, k, v, lengths, strict=True):
        for layer in range(2):
            cache.update(seq_id, keys[layer, :, :n], values[layer, :, :n], layer=layer)
    for _ in range(2):  # the second time after one that was dropped
        step = cache.step(ids, new)
        for layer in range(2):
            packed = [
                np.concatenate([x[layer, :, n:] for x, n in zip(of, lengths, strict=True)], axis=1)
                for of in (k, v)
            ]
            step.write(*(x.swapaxes(0, 1) for x in packed), layer=layer)
            q = normal(sum(new), 4, D)
            out, lse = step.attend(q, layer=layer, return_lse=True)
            first = 0
            for keys, values, n, t in zip(k, v, lengths, new, strict=True):
                mine = slice(first, first + t)
                first += t
                if t:
                    found = out[mine].swapaxes(0, 1), lse[mine].swapaxes(0, 1)
                    begin = max(0, n + 1 - RECENT)
                    check(
                        found,
                        q[mine].swapaxes(0, 1),
                        keys[layer],
                        values[layer],
                        ("int4", "int4"),
                        begin,
                        backend=backend,
                    )
            kept = step.get_kv(layer=layer)
            np.testing.assert_array_equal(kept[1][0], k[1][layer].astype(np.float16))
            if layer == 0 and step.num_tokens and _ == 0:
                break
    assert cache.seq_lens == {i: n + t for i, n, t in zip(ids, lengths, new, strict=True)}


def test_where_nothing_is_kept_in_float_blocks_are_read(backend, normal, tmp_path):
    """After a hit of the prefix cache, and after a load; forks and sequences that were swapped keep what they had."""
    cache = make(backend)
    k, v, tokens = normal(H, 41, D), normal(H, 41, D), np.arange(41)
    first = cache.add_sequence(tokens)
    cache.update(first, k[:, :40], v[:, :40], token_ids=tokens[:40])
    cache.save(tmp_path / "a.kv")
    loaded = make(backend)
    loaded_id = loaded.load(tmp_path / "a.kv")[first]
    found = cache.add_sequence(tokens)
    assert cache.seq_len(found) == 40
    cache.swap_out(first)
    cache.swap_in(first)
    twin = cache.fork(first)
    q = normal(4, 1, D)
    for owner, seq_id, begin in (
        (loaded, loaded_id, 40),
        (cache, found, 40),
        (cache, twin, 21),
        (cache, first, 21),
    ):
        owner.update(seq_id, k[:, 40:], v[:, 40:])
        out = owner.attend(seq_id, q, return_lse=True)
        check(out, q, k, v, ("int4", "int4"), begin, backend=backend)


def test_reorder_moves_what_is_kept_in_float(backend, normal):
    cache = make(backend)
    k = normal(3, H, 33, D)
    ids = [cache.add_sequence() for _ in range(3)]
    for seq_id, x in zip(ids, k, strict=True):
        cache.update(seq_id, x, x)
    before = [cache.get_kv(i)[0] for i in ids]
    with_copies = [([0, 1, 2], [1, 2, 0]), ([0, 1], [2, 2]), ([2, 1, 0], [0, 0, 1]), ([1], [1])]
    for rows, parents in with_copies:
        cache.reorder([ids[n] for n in rows], [ids[n] for n in parents])
        now = before.copy()
        for row, parent in zip(rows, parents, strict=True):
            now[row] = before[parent]
        before = now
        for seq_id, want in zip(ids, before, strict=True):
            np.testing.assert_array_equal(cache.get_kv(seq_id)[0], want)


def test_contiguous_caches(backend, normal):
    cache = kvnumba.KVCache(2, 120, H, D, "int4", recent_tokens=RECENT, backend=backend)
    k = normal(2, H, 120, D)

    def append(count, positions=None):
        first = cache.seq_lens if positions is None else positions
        new = np.stack([x[:, n : n + count] for x, n in zip(k, first, strict=True)])
        cache.update(new, new, positions)

    def assert_kept(begins):
        for b, begin in enumerate(begins):
            x = k[b, :, : cache.seq_lens[b]]
            want = mixed(x, x, ("int4", "int4"), begin)[0]
            np.testing.assert_array_equal(cache.get_kv(b)[0], want)
            np.testing.assert_array_equal(cache.get_full_kv()[0][b], want)

    append(50)
    assert_kept([30, 30])
    q = normal(2, 4, 50, D)
    out, lse = cache.attend(q, return_lse=True)  # those of the update: in float among themselves
    for b in range(2):
        check((out[b], lse[b]), q[b], k[b, :, :50], k[b, :, :50], ("int4", "int4"), 0, backend=backend)
    append(1)
    assert_kept([31, 31])
    cache.truncate(0, 40)
    assert_kept([20, 31])
    append(2, [40, 60])  # tokens that nobody wrote lie between
    k[1, :, 51:60] = 0
    assert cache.seq_lens == [42, 62]
    np.testing.assert_array_equal(cache.get_kv(1)[0][:, 60:], k[1, :, 60:62].astype(np.float16))
    cache.fork(0, 1)
    np.testing.assert_array_equal(cache.get_kv(1)[0], cache.get_kv(0)[0])
    cache.reset()
    append(3)
    assert_kept([0, 0])


def test_what_it_takes(backend):
    for options, blocks in (({}, 10), ({"sink_tokens": 4}, 11), ({"recent_tokens": 1}, 2)):
        options = {"recent_tokens": 128, **options}
        cache = kvnumba.PagedKVCache(
            10, 16, 2, 64, 3, "int4", num_layers=2, scale_dtype="float16", backend=backend, **options
        )
        token = 2 * 2 * 2 * (32 + 4)
        assert cache.bytes_per_token() == token
        floats = 3 * blocks * 16 * 2 * 2 * 2 * 64 * 2
        assert cache.memory() == (10 * 16 * 2 * 2 * 64, 10 * 16 * 2 * 2 * 8, floats)
        assert cache.memory_bytes() == 10 * 16 * token + floats == cache.layout.memory_bytes(3)
        if backend != "cuda":  # whose arrays begin at multiples of some bytes
            held = (cache._buffers, cache._recent._buffers)
            arrays = [x for buffers in held for part in (buffers.keys, buffers.values) for x in part]
            assert cache.memory_bytes() == sum(x.nbytes for x in arrays)
    assert "int4, recent_tokens=1," in repr(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float16", "recent_tokens": 8},
            "recent_tokens: expected 0, float16 is float already; got 8",
        ),
        ({"dtype": "int4", "recent_tokens": -1}, "recent_tokens: expected at least 0; got -1"),
        ({"dtype": "int4", "sink_tokens": -1}, "sink_tokens: expected at least 0; got -1"),
        ({"dtype": "int4", "sink_tokens": 3}, "sink_tokens: expected 0 without recent_tokens; got 3"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        kvnumba.KVCache(1, 4, 2, 8, backend="numpy", **options)


def test_a_window_narrower_than_what_is_kept_in_float(backend):
    cache = make(backend)
    with pytest.raises(
        ValueError, match=r"window_left: expected -1, or at least recent_tokens - 1 = 19.*; got 18"
    ):
        cache.add_sequence(window_left=18)
    assert cache.seq_lens == {}
    cache.add_sequence(window_left=19)


def test_a_plan_of_earlier_content_is_not_used_again(backend, normal, tmp_path):
    """Float blocks hold tokens of their own: what replaces a cache's tokens forgets the plans that read them."""
    k = normal(3, 1, H, 60, D)
    q = normal(1, 4, 60, D)
    cache, other = (
        kvnumba.KVCache(1, 80, H, D, "int4", recent_tokens=RECENT, backend=backend) for _ in range(2)
    )
    cache.update(k[0], k[0])
    cache.save(tmp_path / "a.kv")
    other.update(k[1], k[1])
    other.attend(q)
    other.load(tmp_path / "a.kv")
    check(
        [x[0] for x in other.attend(q, return_lse=True)],
        q[0],
        k[0, 0],
        k[0, 0],
        ("int4", "int4"),
        60,
        0,
        backend,
    )
    both = kvnumba.KVCache(2, 80, H, D, "int4", recent_tokens=RECENT, backend=backend)
    new = np.concatenate((k[0], k[2]))
    both.update(new, new)
    both.attend(np.concatenate((q, q)))
    both.fork(0, 1)
    out, lse = both.attend(np.concatenate((q, q)), return_lse=True)
    np.testing.assert_allclose(out[1], out[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse[1], lse[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(both.get_kv(1)[0], both.get_kv(0)[0])


def test_questions_change_nothing(backend, normal):
    """`get_kv` of a layer that does not have a pass's tokens yet, which begin somewhere else than the old ones end."""
    k = normal(1, H, 64, D)

    def run(ask):
        cache = kvnumba.KVCache(
            1, 80, H, D, "int4", recent_tokens=RECENT, sink_tokens=4, num_layers=2, backend=backend
        )
        for layer in range(2):
            cache.update(k[:, :, :60], k[:, :, :60], layer=layer)
        for layer in range(2):
            cache.update(k[:, :, 60:], k[:, :, 60:], [50], layer=layer)
            if ask:
                cache.get_kv(0, layer=1)
                cache.attend(k[:, :, :1], layer=1)
        return cache.get_kv(0, layer=1)[0]

    np.testing.assert_array_equal(run(ask=True), run(ask=False))


def test_a_step_without_new_tokens_of_a_sequence_reads_as_the_cache(backend, normal):
    cache = make(backend, sink_tokens=SINKS)
    ids = [cache.add_sequence() for _ in range(2)]
    k = normal(H, 50, D)
    for seq_id in ids:
        cache.update(seq_id, k, k)
    step = cache.step(ids, [0, 1])
    step.write(k[:, :1].swapaxes(0, 1), k[:, :1].swapaxes(0, 1))
    for n, seq_id in enumerate(ids):
        np.testing.assert_array_equal(step.get_kv()[n][0], cache.get_kv(seq_id)[0])


def test_formats_that_are_float_already_stay_what_they_are(backend, normal):
    k = 1000 * normal(H, 30, D) + 0.1
    cache = make(backend, ("float32", "int8"))
    seq_id = cache.add_sequence()
    cache.update(seq_id, k, k)
    np.testing.assert_array_equal(cache.get_kv(seq_id)[0], k)


def test_what_float16_cannot_hold_is_refused(backend, normal):
    cache = make(backend, ("int8", "int8"))
    seq_id = cache.add_sequence()
    k = normal(H, 3, D)
    large = k.copy()
    large[1, 2, 3] = 7e4
    with pytest.raises(
        ValueError, match=r"new_v: expected at most 65504 in rows as they are stored.*; got 70000"
    ):
        cache.update(seq_id, k, large)
    assert cache.seq_lens == {seq_id: 0}
    turned = make(backend, ("int8", "int8"), rotation=True)
    seq_id = turned.add_sequence()
    turned.update(seq_id, large, k)  # a rotation spreads it
    large[1, 2] = 3e4
    with pytest.raises(ValueError, match=r"new_k: expected at most 65504 .*; got 120000"):
        turned.update(seq_id, large, k)


def test_a_prompt_in_chunks_takes_float_blocks_of_a_chunk(backend, normal):
    cache = make(backend)
    prompt = kvnumba.ChunkedPrefillCache(cache, 32, seq_ids=[cache.add_sequence()])
    allocated = []
    allocate = cache._backend.allocate
    cache._backend.allocate = lambda layout: allocated.append(layout.num_blocks) or allocate(layout)
    try:
        x = normal(1, H, 200, D)
        prompt.attend(normal(1, 4, 200, D), x, x)
    finally:
        del cache._backend.allocate
    assert 0 < max(allocated) <= (RECENT + 32 + 30) // 16


def test_a_prompt_beside_an_empty_sequence_without_new_tokens(backend, normal):
    """Of the blocks that a pass writes in float, those of the ring get no token at all."""
    cache = make(backend)
    ids = [cache.add_sequence() for _ in range(2)]
    k = normal(40, H, D)
    step = cache.step(ids, [0, 40])
    step.write(k, k)
    np.testing.assert_array_equal(step.get_kv()[1][0], k.swapaxes(0, 1).astype(np.float16))
    assert cache.seq_lens == {ids[0]: 0, ids[1]: 40}
    assert step.get_kv()[0][0].shape == (H, 0, D)
