"""Attention of every cache against the float64 oracle."""

import numpy as np
import oracle
import pytest
from conftest import at_most

import kvnumba

HEADS = [(1, 1), (4, 1), (6, 2), (5, 5), (16, 1)]  # Hq, H

OPTIONS = {
    "default": {},
    "sm_scale": {"sm_scale": 0.3},
    "window_left 0": {"window_left": 0},
    "window_left 5": {"window_left": 5},
    "window_left 70": {"window_left": 70},
    "soft cap": {"logits_soft_cap": 2.0},
    "sinks": {"sinks": "heads"},
    "alibi": {"alibi_slopes": "heads"},
    "all": {
        "sm_scale": 0.7,
        "window_left": 33,
        "logits_soft_cap": 3.0,
        "sinks": "heads",
        "alibi_slopes": "heads",
    },
}


def per_head(options, num_heads, rng):
    """The options with "heads" replaced by a number for each head."""
    return {
        name: rng.uniform(0.01, 1.5, num_heads).astype(np.float32) if value == "heads" else value
        for name, value in options.items()
    }


def filled(backend, fmt, normal, heads, length, head_dim, block_size=16, scale=1.0):
    """A paged cache in scattered blocks, stale storage NaN, with one sequence of some length."""
    cache = kvnumba.PagedKVCache(
        3 + 2 * -(-length // block_size), block_size, heads, head_dim, 2, fmt, backend=backend
    )
    stale = {"bfloat16": 0x7FC0, "fp8_e4m3": 255, "int8": 255, "int4": 255}.get(fmt, np.nan)
    cache.k_pool[:] = cache.v_pool[:] = stale
    for part in (cache.k_scale, cache.k_zp, cache.v_scale, cache.v_zp):
        part[:] = np.nan
    other, seq_id = cache.add_sequence(), cache.add_sequence()
    for start in range(0, length, 37):
        n = min(37, length - start)
        cache.update(seq_id, scale * normal(heads, n, head_dim), normal(heads, n, head_dim))
        cache.update(other, normal(heads, 1, head_dim), normal(heads, 1, head_dim))
    return cache, seq_id


def check(cache, seq_id, q, **options):
    out, lse = cache.attend(seq_id, q, return_lse=True, **options)
    actual = out.swapaxes(0, 1), lse.swapaxes(0, 1)
    oracle.assert_as_exact(
        actual, q.swapaxes(0, 1), *cache.get_kv(seq_id), rounded=oracle.rounding_of(cache), **options
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(backend, fmt, options, normal, rng):
    cache, seq_id = filled(backend, fmt, normal, 2, 131, 16)
    options = per_head(options, 6, rng)
    check(cache, seq_id, normal(6, 1, 16), **options)
    check(cache, seq_id, normal(6, 40, 16), **options)
    check(cache, seq_id, normal(6, 131, 16), **options)


@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 128, 256])
def test_shapes_of_heads(backend, num_qo_heads, num_kv_heads, head_dim, normal):
    cache, seq_id = filled(backend, "int4", normal, num_kv_heads, 70, head_dim)
    check(cache, seq_id, normal(num_qo_heads, 1, head_dim))
    check(cache, seq_id, normal(num_qo_heads, 7, head_dim))


@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 1000])
def test_block_sizes(backend, fmt, block_size, normal):
    cache, seq_id = filled(backend, fmt, normal, 2, 150, 8, block_size)
    check(cache, seq_id, normal(4, 3, 8))
    check(cache, seq_id, normal(4, 140, 8))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 255, 256, 257])
def test_lengths_at_the_edges_of_blocks_and_tiles(backend, length, normal):
    cache, seq_id = filled(backend, "int8", normal, 1, length, 8)
    check(cache, seq_id, normal(2, 1, 8))
    check(cache, seq_id, normal(2, length, 8))


@pytest.mark.parametrize("window_left", [-1, at_most(1500, 300)])
def test_a_long_sequence(backend, fmt, window_left, normal, rng):
    cache, seq_id = filled(backend, fmt, normal, 2, at_most(5000, 700), 16, 32)
    sinks = rng.standard_normal(4).astype(np.float32)
    check(cache, seq_id, normal(4, 1, 16), sinks=sinks, window_left=window_left)
    check(cache, seq_id, normal(4, 70, 16), sinks=sinks, window_left=window_left)


@pytest.mark.parametrize("head_dim", [6, 7, 64, 80])
@pytest.mark.parametrize("new_tokens", [1, 17, 140])
def test_bfloat16_arithmetic(backend, fmt, head_dim, new_tokens, normal):
    """Queries, weights and values that are rounded to bfloat16, or not, where a backend does not gain by it."""
    if head_dim % 2 and fmt == "int4":
        pytest.skip("int4 packs pairs")
    cache = kvnumba.PagedKVCache(60, 16, 2, head_dim, 1, fmt, backend=backend)
    seq_id = cache.add_sequence()
    k, v = (oracle.bfloat16(normal(2, 301, head_dim)) for _ in range(2))
    cache.update(seq_id, k, v)
    q = oracle.bfloat16(normal(6, new_tokens, head_dim))
    bits = (np.ascontiguousarray(q).view(np.uint32) >> 16).astype(np.uint16)
    out, lse = cache.attend(seq_id, q, return_lse=True, arithmetic="bfloat16", window_left=250)
    also, also_lse = cache.attend(seq_id, bits, return_lse=True, window_left=250)
    np.testing.assert_array_equal(also, (oracle.bfloat16(out).view(np.uint32) >> 16).astype(np.uint16))
    np.testing.assert_array_equal(also_lse, lse)
    stored = [
        oracle.bfloat16(x) for x in cache.get_kv(seq_id)
    ]  # what an int8 cache holds is rounded once more
    tokens = q.swapaxes(0, 1)
    want, want_lse = oracle.attention(tokens, *stored, window_left=250)
    plain, plain_lse = oracle.attention(tokens, *cache.get_kv(seq_id), window_left=250)
    half = 2.0**-9  # the largest relative error of a number in bfloat16
    largest = np.abs(stored[1]).max()
    allowed = 2 * half * largest + 2 * np.abs(plain - want).max()
    assert np.abs(out.swapaxes(0, 1) - want).max() <= allowed
    assert np.abs(lse.swapaxes(0, 1) - want_lse).max() <= 1e-5 + 2 * np.abs(plain_lse - want_lse).max()


def test_float32_arithmetic_of_bfloat16_queries(backend, normal):
    """The dtype of the queries chooses only where the caller does not."""
    cache = kvnumba.KVCache(1, 200, 1, 64, backend=backend)
    cache.update(normal(1, 1, 200, 64), normal(1, 1, 200, 64))
    q = oracle.bfloat16(normal(1, 4, 60, 64))
    bits = (q.view(np.uint32) >> 16).astype(np.uint16)
    exact = cache.attend(q, arithmetic="float32")
    exact = (oracle.bfloat16(exact).view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(cache.attend(bits, arithmetic="float32"), exact)


def test_large_scores(backend, fmt, normal):
    cache, seq_id = filled(backend, fmt, normal, 2, 700, 16, scale=300)
    check(cache, seq_id, normal(4, 5, 16))


def test_scores_that_rise_and_fall(backend, normal):
    cache = kvnumba.KVCache(1, 400, 1, 4, backend=backend)
    for order in (1, -1):
        cache.reset()
        k = np.zeros((1, 1, 400, 4), np.float32)
        k[..., 0] = np.arange(400)[::order]
        v = normal(1, 1, 400, 4)
        cache.update(k, v)
        q = np.ones((1, 1, 2, 4), np.float32)
        out, lse = cache.attend(q, return_lse=True)
        actual = out[0].swapaxes(0, 1), lse[0].swapaxes(0, 1)
        oracle.assert_as_exact(actual, q[0].swapaxes(0, 1), k[0], v[0])


def test_sinks_that_outweigh_every_key(backend, normal):
    cache, seq_id = filled(backend, "float32", normal, 1, 600, 8)
    check(cache, seq_id, normal(2, 3, 8), sinks=np.array([200, -200], np.float32))


def test_contiguous_and_ragged(backend, fmt, normal):
    cache = kvnumba.KVCache(3, 90, 2, 8, fmt, backend=backend)
    cache.update(normal(3, 2, 80, 8), normal(3, 2, 80, 8), [0, 3, 8])
    cache.seq_lens[1] = 20
    q = normal(3, 4, 20, 8)
    out, lse = cache.attend(q, return_lse=True, window_left=30)
    assert out.shape == q.shape
    assert lse.shape == (3, 4, 20)
    for b in range(3):
        actual = out[b].swapaxes(0, 1), lse[b].swapaxes(0, 1)
        options = {"window_left": 30, "rounded": oracle.rounding_of(cache)}
        oracle.assert_as_exact(actual, q[b].swapaxes(0, 1), *cache.get_kv(b), **options)


def test_many_sequences_in_one_step(backend, fmt, normal, rng):
    n = at_most(40, 8)
    cache = kvnumba.PagedKVCache(400, 8, 2, 16, n, fmt, backend=backend)
    ids = [cache.add_sequence() for _ in range(n)]
    for new in (rng.integers(0, 60, n), np.ones(n, int), rng.integers(0, 5, n)):
        step = cache.step(ids, new)
        total = int(new.sum())
        step.write(normal(total, 2, 16), normal(total, 2, 16))
        q = normal(total, 4, 16)
        out, lse = step.attend(q, return_lse=True, logits_soft_cap=20.0)
        for i, (start, end) in enumerate(
            zip(step.batch.query_start_loc, step.batch.query_start_loc[1:], strict=False)
        ):
            actual = out[start:end], lse[start:end]
            options = {"logits_soft_cap": 20.0, "rounded": oracle.rounding_of(cache)}
            oracle.assert_as_exact(actual, q[start:end], *cache.get_kv(ids[i]), **options)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_queries_and_tokens_in_other_precisions(backend, dtype, normal):
    def cast(x):
        return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x.astype(dtype)

    def back(x):
        return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else x.astype(np.float32)

    k, v, q = cast(normal(1, 2, 30, 8)), cast(normal(1, 2, 30, 8)), cast(normal(1, 4, 5, 8))
    cache = kvnumba.KVCache(1, 30, 2, 8, backend=backend)
    cache.update(k, v)
    np.testing.assert_array_equal(cache.get_kv(0)[0], back(k)[0])
    out = cache.attend(q)
    assert out.dtype == (np.float32 if dtype == "float64" else q.dtype)
    want, _ = oracle.attention(back(q)[0].swapaxes(0, 1), back(k)[0], back(v)[0])
    tolerance = {"float16": 2**-10, "bfloat16": 2**-7, "float64": 1e-5}[dtype]
    np.testing.assert_allclose(back(out)[0].swapaxes(0, 1), want, atol=tolerance)


@pytest.mark.parametrize("kind", ["read-only", "strided", "reversed", "transposed"])
def test_inputs_of_any_memory_layout(backend, fmt, kind, normal):
    def make(*shape):
        x = normal(*shape)
        if kind == "read-only":
            x.flags.writeable = False
        elif kind == "strided":
            x = np.repeat(x, 2, axis=-1)[..., ::2]
        elif kind == "reversed":
            x = x[:, :, ::-1]
        else:
            x = np.ascontiguousarray(x.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
        return x

    k, v, q = make(2, 2, 20, 8), make(2, 2, 20, 8), make(2, 4, 6, 8)
    caches = [kvnumba.KVCache(2, 20, 2, 8, fmt, backend=backend) for _ in range(2)]
    caches[0].update(k, v)
    caches[1].update(np.array(k), np.array(v))
    for a, b in zip(caches[0].get_full_kv(), caches[1].get_full_kv(), strict=True):
        np.testing.assert_array_equal(a, b)
    # NumPy's own products round differently from one layout to another
    np.testing.assert_allclose(caches[0].attend(q), caches[1].attend(np.array(q)), rtol=0, atol=1e-6)
    slopes = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    slopes.flags.writeable = False
    assert np.isfinite(caches[0].attend(q, alibi_slopes=slopes, sinks=slopes[::-1])).all()


def test_no_new_tokens(backend, fmt, normal):
    cache = kvnumba.KVCache(2, 4, 1, 8, fmt, backend=backend)
    cache.update(normal(2, 1, 0, 8), normal(2, 1, 0, 8))
    assert cache.seq_lens == [0, 0]
    out, lse = cache.attend(normal(2, 2, 0, 8), return_lse=True)
    assert out.shape == (2, 2, 0, 8)
    assert lse.shape == (2, 2, 0)
    paged = kvnumba.PagedKVCache(4, 4, 1, 8, 1, fmt, backend=backend)
    seq_id = paged.add_sequence()
    paged.update(seq_id, normal(1, 0, 8), normal(1, 0, 8))
    assert paged.get_kv(seq_id)[1].shape == (1, 0, 8)
    assert paged.attend(seq_id, normal(1, 0, 8)).shape == (1, 0, 8)
    assert paged.num_free_blocks == 4


def test_float_formats_let_nan_and_infinity_pass(backend):
    cache = kvnumba.KVCache(1, 4, 1, 4, "float16", backend=backend)
    k = np.array([np.nan, np.inf, -np.inf, 1e6], np.float32).reshape(1, 1, 1, 4)
    cache.update(k, k)
    np.testing.assert_array_equal(cache.get_kv(0)[0][0, 0], np.array([np.nan, np.inf, -np.inf, np.inf]))


@pytest.mark.parametrize("length", [4, 1500])
def test_nan_in_the_cache_reaches_the_lse(backend, length, normal):
    """Also where several threads share the keys."""
    cache = kvnumba.KVCache(1, length, 1, 128, backend=backend)
    cache.update(np.full((1, 1, length, 128), np.nan, np.float32), normal(1, 1, length, 128))
    out, lse = cache.attend(normal(1, 32, 1, 128), return_lse=True)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("window_left", [2**31 - 1, 2**31, 2**32 + 5, 2**62])
def test_windows_wider_than_any_sequence(backend, window_left, normal):
    cache = kvnumba.KVCache(1, 70, 1, 8, backend=backend)
    cache.update(normal(1, 1, 70, 8), normal(1, 1, 70, 8))
    q = normal(1, 2, 3, 8)
    np.testing.assert_array_equal(cache.attend(q, window_left=window_left), cache.attend(q))


def test_keys_of_no_weight(backend, normal):
    """A score 200 below the largest adds nothing at all, not even to a value of 1e30."""
    cache = kvnumba.KVCache(1, 2, 1, 8, backend=backend)
    k, v = np.zeros((1, 1, 2, 8), np.float32), np.full((1, 1, 2, 8), 1e30, np.float32)
    k[0, 0, 0] = 25.0
    v[0, 0, 0] = 1.0
    cache.update(k, v)
    np.testing.assert_array_equal(cache.attend(np.ones((1, 1, 1, 8), np.float32), sm_scale=1.0), 1.0)


class TestMergeStates:
    def test_shards_of_a_cache(self, backend, fmt, normal):
        """Attention over two halves of the keys, merged, is attention over all of them."""
        k, v, q = normal(1, 2, 60, 8), normal(1, 2, 60, 8), normal(1, 4, 1, 8)
        shards = []
        for keys in (slice(0, 23), slice(23, 24), slice(24, 60)):
            cache = kvnumba.KVCache(1, 60, 2, 8, fmt, backend=backend)
            cache.update(k[:, :, keys], v[:, :, keys])
            shards.append(cache.attend(q, return_lse=True))
        whole = kvnumba.KVCache(1, 60, 2, 8, fmt, backend=backend)
        whole.update(k, v)
        out, lse = kvnumba.merge_states(*zip(*shards, strict=True))
        actual = out[0].swapaxes(0, 1), lse[0].swapaxes(0, 1)
        oracle.assert_as_exact(
            actual, q[0].swapaxes(0, 1), *whole.get_kv(0), rounded=oracle.rounding_of(whole)
        )

    def test_a_state_without_keys_counts_nothing(self):
        out = np.array([[1.0, 2.0], [5.0, 6.0]], np.float32)
        merged, lse = kvnumba.merge_states(out, np.array([3.0, -np.inf], np.float32))
        assert merged.tolist() == [1.0, 2.0]
        assert lse == 3.0
        merged, lse = kvnumba.merge_states(out, np.full(2, -np.inf, np.float32))
        assert merged.tolist() == [0.0, 0.0]
        assert lse == -np.inf

    def test_large_lse(self):
        out, lse = kvnumba.merge_states(
            np.array([[2.0], [4.0]], np.float32), np.array([1e4, 1e4], np.float32)
        )
        assert out == 3.0
        assert lse == pytest.approx(1e4 + np.log(2))

    def test_shapes_are_checked(self):
        with pytest.raises(
            ValueError, match=r"lses: expected the shape of outs \(2, 3, 4\) without D; got \(2, 4\)"
        ):
            kvnumba.merge_states(np.zeros((2, 3, 4), np.float32), np.zeros((2, 4), np.float32))
        with pytest.raises(
            ValueError, match=r"outs: expected one state or more, all of one shape; got shapes \[\]"
        ):
            kvnumba.merge_states([], [])
        with pytest.raises(
            ValueError, match=r"outs: expected .* one shape; got shapes \[\(3, 4\), \(4, 3\)\]"
        ):
            kvnumba.merge_states([np.zeros((3, 4)), np.zeros((4, 3))], np.zeros((2, 3)))
