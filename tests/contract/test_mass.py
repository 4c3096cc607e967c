"""Attention mass against the float64 oracle: what each cached token gets from the new ones."""

import os

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba.backends.protocol import CascadeLimits
from kvnumba.backends.registry import get_backend

if "KVNUMBA_TEST_WORKERS" in os.environ:
    pytest.skip("caches on workers return no masses", allow_module_level=True)

H, HQ, D = 2, 8, 16
LEAST = float(np.finfo(np.float32).min)


def check(mass, q, k, **options):
    """`mass` (H, S) is that of q (n, Hq, D) on keys (H, S, D)."""
    assert mass.dtype == np.float32
    np.testing.assert_allclose(mass, oracle.mass(q, k, **options), rtol=1e-4, atol=1e-4)


def check_blocks(found, mass, block_size):
    """`found` (H, blocks) are the sums over the blocks of `mass` (H, S)."""
    blocks = -(-mass.shape[1] // block_size)
    assert found.shape == (len(mass), blocks)
    for n in range(blocks):
        np.testing.assert_allclose(
            found[:, n], mass[:, n * block_size : (n + 1) * block_size].sum(axis=1), rtol=1e-5
        )


def filled(backend, normal, lengths, fmt="float32", block_size=16, heads=H, **options):
    """A paged cache with sequences of some lengths, in blocks that take turns."""
    blocks = sum(-(-n // block_size) for n in lengths) + 2
    cache = kvnumba.PagedKVCache(
        blocks, block_size, heads, D, len(lengths) + 1, fmt, backend=backend, **options
    )
    ids = [cache.add_sequence() for _ in lengths]
    for first in range(0, max(lengths), 40):
        for seq_id, length in zip(ids, lengths, strict=True):
            count = min(40, length - first)
            if count > 0:
                cache.update(seq_id, normal(heads, count, D), normal(heads, count, D))
    return cache, ids


@pytest.mark.parametrize("fmt", ["float32", "int8", "int4"])
@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_mass(backend, fmt, block_size, new_tokens, normal):
    cache, (seq_id,) = filled(backend, normal, [150], fmt, block_size)
    q = normal(HQ, new_tokens, D)
    out, lse, mass = cache.attend(seq_id, q, return_lse=True, return_mass=True)
    check(mass, q.swapaxes(0, 1), cache.get_kv(seq_id)[0])
    np.testing.assert_allclose(mass.sum(axis=1), new_tokens * HQ // H, rtol=1e-5)
    for have, want in zip((out, lse), cache.attend(seq_id, q, return_lse=True), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(cache.attend(seq_id, q, return_mass=True)[1], mass)
    check_blocks(cache.attend(seq_id, q, return_mass="block")[1], mass, block_size)


@pytest.mark.parametrize("group", [1, 3, 12])
def test_query_heads_of_a_kv_head(backend, group, normal):
    cache, (seq_id,) = filled(backend, normal, [70])
    for new_tokens in (1, 7):
        q = normal(H * group, new_tokens, D)
        _, mass = cache.attend(seq_id, q, return_mass=True)
        check(mass, q.swapaxes(0, 1), cache.get_kv(seq_id)[0])


def bias(score, q_head, q_pos, kv_pos):
    return score + 0.1 * (kv_pos % 5)


def even(q_head, q_pos, kv_pos):
    return kv_pos % 2 == 0


def blocks_seen(q_low, q_high, kv_low, kv_high):
    return 2


@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 20},
        {"window_left": 20, "alibi_slopes": np.linspace(0.1, 0.5, HQ)},
        {"logits_soft_cap": 2.0, "sinks": np.linspace(-1, 3, HQ)},
        {"causal": False},
        {"score_mod": bias, "mask_mod": even, "block_mask": blocks_seen},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_options(backend, options, new_tokens, normal):
    cache, (seq_id,) = filled(backend, normal, [70], rotation=True)
    q = normal(HQ, new_tokens, D)
    _, mass = cache.attend(seq_id, q, return_mass=True, **options)
    options = {name: value for name, value in options.items() if name != "block_mask"}
    check(mass, q.swapaxes(0, 1), cache.get_kv(seq_id)[0], **options)


@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 20.0}], ids=["plain", "cap"])
@pytest.mark.parametrize("order", [1, -1], ids=["growing", "falling"])
def test_scores_that_grow_or_fall(backend, order, options, normal):
    """Weights of earlier keys count from smaller maxima, and the shifts of keys count in all of them."""
    calibration = kvnumba.Calibration((normal(H, D),), (np.ones((H, D)),), 100)
    cache = kvnumba.PagedKVCache(20, 16, H, D, 1, backend=backend, calibration=calibration)
    seq_id = cache.add_sequence()
    size = np.linspace(0.1, 8, 300)[::order, None]
    cache.update(seq_id, normal(H, 300, D) * size, normal(H, 300, D))
    q = normal(HQ, 2, D)
    _, mass = cache.attend(seq_id, q, return_mass=True, **options)
    check(mass, q.swapaxes(0, 1), cache.get_kv(seq_id)[0], **options)


def test_what_sees_nothing_gives_nothing(backend, normal):
    cache, (seq_id,) = filled(backend, normal, [70])
    _, mass = cache.attend(seq_id, normal(HQ, 2, D), return_mass=True, mask_mod=lambda *positions: False)
    assert mass.shape == (H, 70)
    assert not mass.any()


def test_scores_so_small_that_all_weights_may_be_nothing(backend, normal):
    """Masks are written so too; a row that sees nothing takes nothing from the others."""

    def odd_positions_alone(score, q_head, q_pos, kv_pos):
        return score if q_pos % 2 == 1 else LEAST

    cache, (seq_id,) = filled(backend, normal, [70])
    q = normal(HQ, 2, D)
    _, lse, mass = cache.attend(seq_id, q, return_lse=True, return_mass=True, score_mod=odd_positions_alone)
    assert (lse[:, 0] < -1e38).all()  # position 68
    _, want = cache.attend(seq_id, q[:, 1:], return_mass=True)
    assert np.isfinite(mass).all()
    assert (mass >= want - 1e-4).all()


@pytest.mark.parametrize("recent_tokens", [0, 16])
def test_several_sequences_and_forks(backend, recent_tokens, normal):
    formats = {"recent_tokens": recent_tokens, "sink_tokens": 3} if recent_tokens else {}
    cache, ids = filled(backend, normal, [70, 9, 130], "int8", 8, **formats)
    ids.append(cache.fork(ids[2]))
    new = [1, 4, 0, 3]
    step = cache.step(ids, new)
    step.write(normal(sum(new), H, D), normal(sum(new), H, D))
    q = normal(sum(new), HQ, D)
    out, masses = step.attend(q, return_mass=True)
    assert [mass.shape for mass in masses] == [(H, 71), (H, 13), (H, 130), (H, 133)]
    assert not masses[2].any()
    for found, mass in zip(step.attend(q, return_mass="block")[1], masses, strict=True):
        check_blocks(found, mass, 8)
    np.testing.assert_allclose(out, step.attend(q), rtol=1e-3, atol=1e-3)
    start = step.batch.query_start_loc
    for n in (0, 1, 3):
        k = step.get_kv()[n][0]
        if new[n] == 1 or not recent_tokens:  # several new tokens see different keys in float
            check(masses[n], q[start[n] : start[n + 1]], k)
        np.testing.assert_allclose(masses[n].sum(axis=1), new[n] * HQ // H, rtol=1e-5)


def test_recent_tokens(backend, normal):
    cache, (seq_id,) = filled(backend, normal, [150], "int4", recent_tokens=16, sink_tokens=3, rotation=True)
    q = normal(HQ, 1, D)
    _, mass = cache.attend(seq_id, q, return_mass=True)
    check(mass, q.swapaxes(0, 1), cache.get_kv(seq_id)[0])


def test_blocks_outside_the_window(backend, normal):
    cache = kvnumba.PagedKVCache(8, 8, H, D, 1, backend=backend)
    seq_id = cache.add_sequence(window_left=10)
    for _ in range(9):
        cache.update(seq_id, normal(H, 8, D), normal(H, 8, D))
    q = normal(HQ, 1, D)
    _, mass = cache.attend(seq_id, q, window_left=10, return_mass=True)
    k, _ = cache.get_kv(seq_id)
    assert mass.shape == (H, 72)
    assert len(k[0]) < 72
    check(mass[:, -k.shape[1] :], q.swapaxes(0, 1), k, window_left=10)
    assert not mass[:, : -k.shape[1]].any()
    check_blocks(cache.attend(seq_id, q, window_left=10, return_mass="block")[1], mass, 8)


def test_prefixes_are_not_shared(backend, normal, monkeypatch):
    """Otherwise their keys would be read once for all sequences, and each has masses of its own."""
    limits = CascadeLimits(tile_rows=1, min_rows=1, min_bytes=1)
    monkeypatch.setattr(type(get_backend(backend)), "cascade", limits)
    cache, ids = filled(backend, normal, [70])
    ids.append(cache.fork(ids[0]))
    step = cache.step(ids, [1, 1])
    step.write(normal(2, H, D), normal(2, H, D))
    q = normal(2, HQ, D)
    out, masses = step.attend(q, return_mass=True)
    np.testing.assert_allclose(out, step.attend(q), rtol=1e-4, atol=1e-4)
    for n in range(2):
        check(masses[n], q[n : n + 1], step.get_kv()[n][0])


def test_after_tokens_were_dropped(backend, normal):
    cache, (seq_id,) = filled(backend, normal, [70])
    q = normal(HQ, 1, D)
    _, mass = cache.attend(seq_id, q, return_mass=True)
    heavy = np.sort(np.argsort(-mass.sum(axis=0))[:30])
    cache.keep(seq_id, heavy)
    k, _ = cache.get_kv(seq_id)
    _, mass = cache.attend(seq_id, q, return_mass=True)
    assert mass.shape == (H, 30)
    check(mass, q.swapaxes(0, 1), k)
    with pytest.raises(ValueError, match="return_mass: expected no window_left, keep has dropped tokens"):
        cache.attend(seq_id, q, return_mass=True, window_left=5)


@pytest.mark.parametrize(
    "options", [{}, {"sinks": np.linspace(-1, 3, HQ), "logits_soft_cap": 2.0}], ids=["plain", "sinks"]
)
def test_heads_that_hold_different_tokens(backend, options, normal):
    """`test_per_head.py` has several sequences, and several new tokens."""
    cache = kvnumba.PerHeadKVCache(40, 4, H, D, 2, "int8", backend=backend)
    seq_id = cache.add_sequence()
    cache.update(seq_id, normal(H, 30, D), normal(H, 30, D))
    q = normal(HQ, 1, D)

    def masses():
        """Of each head, compared with the oracle's."""
        out, lse, found = cache.attend(seq_id, q, return_lse=True, return_mass=True, **options)
        for n, (k, _) in enumerate(cache.get_kv(seq_id)):
            heads = slice(n * HQ // H, (n + 1) * HQ // H)
            of_head = {name: x[heads] if name == "sinks" else x for name, x in options.items()}
            check(found[n][None], q[heads].swapaxes(0, 1), k[None], **of_head)
        blocks = cache.attend(seq_id, q, return_mass="block", **options)[1]
        for have, mass in zip(blocks, found, strict=True):
            check_blocks(have[None], mass[None], 4)
        want = cache.attend(seq_id, q, return_lse=True, **options)
        for have, each in zip((out, lse), want, strict=True):
            np.testing.assert_allclose(have, each, rtol=1e-3, atol=1e-3)
        return found

    heavy = [np.sort(np.argsort(-mass)[:count]) for mass, count in zip(masses(), (11, 24), strict=True)]
    cache.keep(seq_id, heavy)
    cache.update(seq_id, normal(H, 1, D), normal(H, 1, D))
    assert [len(mass) for mass in masses()] == [12, 25]
    with pytest.raises(ValueError, match="return_mass: expected no window_left, keep has dropped tokens"):
        cache.attend(seq_id, q, return_mass=True, window_left=5, **options)


def test_contiguous(backend, normal):
    cache = kvnumba.KVCache(2, 60, H, D, backend=backend)
    cache.update(normal(2, H, 50, D), normal(2, H, 50, D))
    cache.truncate(1, 30)
    q = normal(2, HQ, 3, D)
    out, lse, mass = cache.attend(q, return_lse=True, return_mass=True)
    assert [x.shape for x in (out, lse, mass)] == [(2, HQ, 3, D), (2, HQ, 3), (2, H, 50)]
    for n, length in enumerate((50, 30)):
        check(mass[n, :, :length], q[n].swapaxes(0, 1), cache.get_kv(n)[0])
    assert not mass[1, :, 30:].any()
    with pytest.raises(ValueError, match="return_mass: expected True or False of a cache without blocks"):
        cache.attend(q, return_mass="block")


def test_sums_of_no_blocks(backend, normal):
    caches = [
        kvnumba.PerHeadKVCache(8, 4, H, D, 2, backend=backend),
        kvnumba.PagedKVCache(8, 4, H, D, 2, backend=backend),
    ]
    for cache in caches:
        step = cache.step([cache.add_sequence()], [0])
        step.write(normal(0, H, D), normal(0, H, D))
        (mass,) = step.attend(normal(0, HQ, D), return_mass="block")[1]
        assert np.shape(mass) == (H, 0)


def test_what_it_takes(backend, normal):
    cache, (seq_id,) = filled(backend, normal, [9])
    for wrong in ("blocks", 1, [True]):
        with pytest.raises(ValueError, match="return_mass: expected True, False or 'block'; got "):
            cache.attend(seq_id, normal(HQ, 1, D), return_mass=wrong)


def test_where_there_is_none(normal):
    cache = kvnumba.KVCache(1, 60, H, D, backend="numpy")
    chunked = kvnumba.ChunkedPrefillCache(cache, 8)
    k, q = normal(1, H, 20, D), normal(1, HQ, 20, D)
    with pytest.raises(TypeError, match="return_mass: expected none for a prompt in chunks"):
        chunked.attend(q, k, k, return_mass=True)
    assert cache.seq_lens == [0]
