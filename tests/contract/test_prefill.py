"""multi_head_attention_with_cache and ChunkedPrefillCache."""

import numpy as np
import oracle
import pytest

import kvnumba

B, HQ, H, D, S, MODEL = 2, 4, 2, 8, 45, 12


def make_cache(kind, backend, fmt="float32"):
    if kind == "contiguous":
        return kvnumba.KVCache(B, S + 3, H, D, fmt, backend=backend), {}
    cache = kvnumba.PagedKVCache(32, 4, H, D, B, fmt, backend=backend)
    return cache, {"seq_ids": [cache.add_sequence() for _ in range(B)]}


@pytest.fixture
def layer(normal):
    """A layer's hidden states and projections, and the oracle's output for the whole prompt."""
    hidden = normal(B, S, MODEL)
    w_q, w_k, w_v, w_o = (
        normal(MODEL, HQ * D),
        normal(MODEL, H * D),
        normal(MODEL, H * D),
        normal(HQ * D, MODEL),
    )
    k, v = ((hidden @ w).reshape(B, S, H, D).swapaxes(1, 2) for w in (w_k, w_v))
    want = []
    for b in range(B):
        q = (hidden[b].astype(np.float64) @ w_q).reshape(S, HQ, D)
        out, _ = oracle.attention(q, k[b], v[b])
        want.append(out.reshape(S, -1) @ w_o.astype(np.float64))
    return hidden, k, v, (w_q, w_k, w_v, w_o), np.stack(want)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 44, 45, 46, 1000])
def test_every_position_for_every_chunk_size(backend, kind, chunk_size, layer):
    hidden, k, v, weights, want = layer
    cache, ids = make_cache(kind, backend)
    out = kvnumba.ChunkedPrefillCache(cache, chunk_size, **ids).prefill(k, v, *weights, hidden)
    assert out.shape == (B, S, MODEL)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-5 * np.abs(want).max())
    lens = cache.seq_lens if kind == "contiguous" else list(cache.seq_lens.values())
    assert lens == [S, S]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("chunk_size", [1, 8, 44])
def test_chunked_equals_one_shot_in_every_format(backend, kind, fmt, chunk_size, normal):
    q, k, v = normal(B, HQ, S, D), normal(B, H, S, D), normal(B, H, S, D)
    results = []
    for size in (chunk_size, S):
        cache, ids = make_cache(kind, backend, fmt)
        results.append(
            kvnumba.ChunkedPrefillCache(cache, size, **ids).attend(q, k, v, return_lse=True, window_left=20)
        )
    # few rows of queries may be rounded to 16 bits where many are not
    atol = 2e-6 if oracle.rounding_of(cache) is None else 2e-4
    for chunked, one_shot in zip(*results, strict=True):
        np.testing.assert_allclose(chunked, one_shot, rtol=0, atol=atol)


def test_prefill_after_earlier_tokens(backend, normal):
    cache, _ = make_cache("contiguous", backend)
    k, v, q = normal(B, H, 20, D), normal(B, H, 20, D), normal(B, HQ, 15, D)
    cache.update(k[:, :, :5], v[:, :, :5])
    out = kvnumba.ChunkedPrefillCache(cache, 4).attend(q, k[:, :, 5:], v[:, :, 5:])
    for b in range(B):
        want, _ = oracle.attention(q[b].swapaxes(0, 1), k[b], v[b])
        np.testing.assert_allclose(out[b].swapaxes(0, 1), want, atol=1e-5)


def test_attention_with_cache_is_causal(backend, layer):
    hidden, k, v, weights, want = layer
    cache, _ = make_cache("contiguous", backend)
    cache.update(k, v)
    for newest in (1, 10, S):
        out = kvnumba.multi_head_attention_with_cache(hidden[:, S - newest :], cache, *weights)
        assert out.shape == (B, newest, MODEL)
        np.testing.assert_allclose(out, want[:, S - newest :], rtol=0, atol=2e-5 * np.abs(want).max())
    assert cache.seq_lens == [S, S]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_prompt_that_fails_changes_nothing(backend, kind, normal):
    cache, ids = make_cache(kind, backend, "int8")
    prefill = kvnumba.ChunkedPrefillCache(cache, 8, **ids)
    q, k, v = normal(B, HQ, S, D), normal(B, H, S, D), normal(B, H, S, D)
    bad = v.copy()
    bad[1, 1, 40, 3] = np.inf
    long = normal(B, H, 4 * S, D)
    with pytest.raises(ValueError, match="v: expected finite values"):
        prefill.attend(q, k, bad)
    with pytest.raises(kvnumba.CacheFull):
        prefill.attend(normal(B, HQ, 4 * S, D), long, long)
    with pytest.raises(ValueError, match=r"v: expected shape \(B=2, H=2, S=45, D=8\)"):
        prefill.attend(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match=r"q: expected shape \(B=2, Hq, S=45, D=8\)"):
        prefill.attend(q[:, :, 1:], k, v)
    with pytest.raises(ValueError, match="q: expected a multiple of num_kv_heads=2"):
        prefill.attend(q[:, :3], k, v)
    with pytest.raises(TypeError, match="unknown option"):
        prefill.attend(q, k, v, scale=2)
    lens = cache.seq_lens if kind == "contiguous" else list(cache.seq_lens.values())
    assert lens == [0, 0]
    if kind == "paged":
        assert cache.num_free_blocks == cache.num_blocks
    prefill.attend(q, k, v)


def test_bad_calls(backend, layer, normal):
    hidden, k, v, weights, _ = layer
    cache, _ = make_cache("contiguous", backend)
    prefill = kvnumba.ChunkedPrefillCache(cache, 8)
    with pytest.raises(ValueError, match=r"hidden_states: expected \(B, S, d_model\)"):
        prefill.prefill(k, v, *weights)
    with pytest.raises(ValueError, match=r"hidden_states: expected shape \(B=2, S=45, d_model=12\)"):
        prefill.prefill(k, v, *weights, hidden[:, 1:])
    with pytest.raises(
        ValueError, match=r"w_q: expected .* multiple of num_kv_heads=2 and head_dim D=8; got \(12, 33\)"
    ):
        prefill.prefill(k, v, normal(MODEL, 33), None, None, weights[3], hidden)
    with pytest.raises(ValueError, match=r"w_q: expected .* num_kv_heads=2 .*; got \(12, 24\)"):
        prefill.prefill(k, v, normal(MODEL, 24), None, None, weights[3][:24], hidden)
    with pytest.raises(ValueError, match=r"w_o: expected shape \(Hq\*D=32, d_model\); got \(31, 12\)"):
        prefill.prefill(k, v, weights[0], None, None, weights[3][1:], hidden)
    with pytest.raises(TypeError, match="return_lse: this call returns a projected output"):
        kvnumba.multi_head_attention_with_cache(hidden, cache, *weights, return_lse=True)
    assert cache.seq_lens == [0, 0]
    with pytest.raises(ValueError, match="chunk_size: expected at least 1; got 0"):
        kvnumba.ChunkedPrefillCache(cache, 0)
    with pytest.raises(ValueError, match=r"seq_ids: expected .* got \[0\] with a KVCache"):
        kvnumba.ChunkedPrefillCache(cache, 8, seq_ids=[0])
    paged = kvnumba.PagedKVCache(4, 4, 2, 8, 1, backend=backend)
    with pytest.raises(TypeError, match="cache: expected a KVCache; got a PagedKVCache"):
        kvnumba.multi_head_attention_with_cache(hidden, paged, *weights)
    with pytest.raises(ValueError, match="base_cache: expected one layer; got 2"):
        kvnumba.ChunkedPrefillCache(kvnumba.KVCache(1, 4, 1, 8, num_layers=2, backend=backend))
