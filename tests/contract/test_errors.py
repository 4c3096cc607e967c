"""Mistakes made on purpose: the error names the argument, and the cache stays as it was."""

import re

import numpy as np
import pytest

import kvnumba


def cache_with_tokens(kind, backend, normal, fmt="float32"):
    """A cache of H = 2, D = 8 with 5 tokens, and its update and attend for one element, (heads, T, D)."""
    k = normal(2, 5, 8)
    if kind == "contiguous":
        cache = kvnumba.KVCache(1, 9, 2, 8, fmt, backend=backend)
        cache.update(k[None], k[None])
        return cache, lambda k, v: cache.update(k[None], v[None]), lambda q, **o: cache.attend(q[None], **o)
    cache = kvnumba.PagedKVCache(3, 3, 2, 8, 1, fmt, backend=backend)
    seq_id = cache.add_sequence()
    cache.update(seq_id, k, k)
    return cache, lambda k, v: cache.update(seq_id, k, v), lambda q, **o: cache.attend(seq_id, q, **o)


@pytest.fixture(params=["contiguous", "paged"])
def kind(request):
    return request.param


def state(cache):
    arrays = (
        (cache.k_cache, cache.v_cache) if isinstance(cache, kvnumba.KVCache) else (cache.k_pool, cache.v_pool)
    )
    lens = list(cache.seq_lens) if isinstance(cache, kvnumba.KVCache) else cache.seq_lens
    return [a.tobytes() for a in arrays], lens


ones = np.ones

BAD_TOKENS = {
    "too few heads": (ones((1, 2, 8)), ValueError, r"new_k: expected shape \(.*H=2, T, D=8\); got"),
    "too wide heads": (ones((2, 2, 16)), ValueError, r"new_k: expected shape \(.*H=2, T, D=8\); got"),
    "integers": (ones((2, 2, 8), np.int64), TypeError, "new_k: expected float32, .* got int64"),
    "booleans": (ones((2, 2, 8), bool), TypeError, "new_k: expected float32, .* got bool"),
    "complex": (ones((2, 2, 8), complex), TypeError, "new_k: expected float32, .* got complex128"),
    "objects": (ones((2, 2, 8), object), TypeError, "new_k: expected float32, .* got object"),
    "too many tokens": (ones((2, 5, 8)), kvnumba.CacheFull, "free"),
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_bad_tokens(kind, backend, fmt, bad, error, message, normal):
    cache, update, attend = cache_with_tokens(kind, backend, normal, fmt)
    before = state(cache)
    with pytest.raises(error, match=message):
        update(bad, bad)
    with pytest.raises((ValueError, TypeError), match="new_v: expected"):
        update(normal(2, 2, 8), ones((2, 3, 8)))
    assert state(cache) == before
    update(normal(2, 4, 8), normal(2, 4, 8))
    assert np.isfinite(attend(normal(2, 4, 8))).all()


def test_wrong_number_of_axes(backend, normal):
    cache = kvnumba.KVCache(1, 9, 2, 8, backend=backend)
    with pytest.raises(ValueError, match=r"new_k: expected shape \(B=1, H=2, T, D=8\); got \(2, 3, 8\)"):
        cache.update(normal(2, 3, 8), normal(2, 3, 8))
    with pytest.raises(ValueError, match=r"q: expected shape \(B=1, Hq, T, D=8\); got \(8,\)"):
        cache.attend(normal(8))
    paged = kvnumba.PagedKVCache(3, 3, 2, 8, 1, backend=backend)
    seq_id = paged.add_sequence()
    with pytest.raises(ValueError, match=r"new_k: expected shape \(H=2, T, D=8\); got \(1, 2, 3, 8\)"):
        paged.update(seq_id, normal(1, 2, 3, 8), normal(1, 2, 3, 8))
    step = paged.step([seq_id], [3])
    with pytest.raises(ValueError, match=r"k: expected shape \(T=3, H=2, D=8\); got \(2, 3, 8\)"):
        step.write(normal(2, 3, 8), normal(2, 3, 8))
    step.write(normal(3, 2, 8), normal(3, 2, 8))
    with pytest.raises(ValueError, match=r"q: expected shape \(T=3, Hq, D=8\); got \(4, 2, 8\)"):
        step.attend(normal(4, 2, 8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_what_codes_cannot_hold(kind, backend, fmt, bad, normal):
    cache, update, _ = cache_with_tokens(kind, backend, normal, fmt)
    before = state(cache)
    k, v = normal(2, 2, 8), normal(2, 2, 8)
    v[1, 1, 7] = bad
    with pytest.raises(ValueError, match=f"new_v: expected finite values up to 1.7e.38 for {fmt}; got"):
        update(k, v)
    with pytest.raises(ValueError, match="new_k: expected finite values"):
        update(v, k)
    assert state(cache) == before


BAD_QUERIES = {
    "heads not a multiple": (
        ones((3, 1, 8)),
        {},
        ValueError,
        "q: expected a multiple of num_kv_heads=2 .* got 3",
    ),
    "no heads": (ones((0, 1, 8)), {}, ValueError, "q: expected a multiple of num_kv_heads=2 .* got 0"),
    "head_dim": (ones((2, 1, 4)), {}, ValueError, "q: expected shape"),
    "more than is held": (
        ones((2, 6, 8)),
        {},
        ValueError,
        "q: expected at most as many tokens as .* holds, 5; got",
    ),
    "dtype": (ones((2, 1, 8), int), {}, TypeError, "q: expected float32"),
    "unknown option": (
        ones((2, 1, 8)),
        {"scale": 1},
        TypeError,
        "unknown option 'scale'; expected some of sm_scale",
    ),
    "sm_scale": (ones((2, 1, 8)), {"sm_scale": "x"}, TypeError, "sm_scale: expected a number; got str 'x'"),
    "sm_scale nan": (ones((2, 1, 8)), {"sm_scale": np.nan}, ValueError, "sm_scale: expected a finite number"),
    "window_left": (
        ones((2, 1, 8)),
        {"window_left": -2},
        ValueError,
        "window_left: expected at least -1; got -2",
    ),
    "window_left float": (
        ones((2, 1, 8)),
        {"window_left": 1.5},
        TypeError,
        "window_left: expected an integer",
    ),
    "arithmetic": (
        ones((2, 1, 8)),
        {"arithmetic": "float16"},
        ValueError,
        "arithmetic: expected one of float32, bfloat16, bfloat16x3; got 'float16'",
    ),
    "soft cap": (ones((2, 1, 8)), {"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap: expected 0"),
    "sinks": (ones((2, 1, 8)), {"sinks": ones(3)}, ValueError, r"sinks: expected shape \(Hq=2\); got \(3,\)"),
    "sinks nan": (
        ones((2, 1, 8)),
        {"sinks": [np.nan, 0.0]},
        ValueError,
        "sinks: expected finite values; got nan",
    ),
    "slopes": (ones((2, 1, 8)), {"alibi_slopes": ones((2, 1))}, ValueError, "alibi_slopes: expected shape"),
    "layer": (ones((2, 1, 8)), {"layer": 1}, ValueError, "layer: expected 0 to 0; got 1"),
    "negative layer": (ones((2, 1, 8)), {"layer": -1}, ValueError, "layer: expected at least 0; got -1"),
}


@pytest.mark.parametrize(("q", "options", "error", "message"), BAD_QUERIES.values(), ids=BAD_QUERIES)
def test_bad_queries(kind, backend, q, options, error, message, normal):
    cache, _, attend = cache_with_tokens(kind, backend, normal)
    before = state(cache)
    with pytest.raises(error, match=message):
        attend(q, **options)
    assert state(cache) == before


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([-1, 0], ValueError, r"positions: expected 0 to 6 for 2 new tokens with max_seq_len=8; got [-1, 0]"),
        ([0, 7], ValueError, r"positions: expected 0 to 6 for 2 new tokens with max_seq_len=8; got [0, 7]"),
        ([0], ValueError, "positions: expected a list of 2 integers"),
        ([0.0, 1.0], ValueError, "positions: expected a list of 2 integers"),
        (3, ValueError, "positions: expected a list of 2 integers"),
        ([2**70, 0], ValueError, "positions: expected a list of 2 integers"),
    ],
)
def test_positions_out_of_range(backend, positions, error, message, normal):
    cache = kvnumba.KVCache(2, 8, 1, 8, backend=backend)
    cache.update(normal(2, 1, 3, 8), normal(2, 1, 3, 8))
    before = state(cache)
    with pytest.raises(error, match=re.escape(message)):
        cache.update(normal(2, 1, 2, 8), normal(2, 1, 2, 8), positions)
    assert state(cache) == before


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_is_not_written_past_its_end(backend, bits, normal):
    cache = kvnumba.QuantizedKVCache(2, 4, 1, 8, bits, backend=backend)
    cache.update(normal(2, 1, 3, 8), normal(2, 1, 3, 8))
    before = state(cache)
    with pytest.raises(
        kvnumba.CacheFull, match="2 new tokens need room, 1 of max_seq_len=4 are free in batch element 0"
    ):
        cache.update(normal(2, 1, 2, 8), normal(2, 1, 2, 8))
    assert state(cache) == before


def test_lengths_set_by_hand_are_checked(backend, normal):
    cache = kvnumba.KVCache(1, 4, 1, 8, backend=backend)
    for bad in ([5], [-1], [1, 2], ["x"]):
        cache.seq_lens = bad
        with pytest.raises(ValueError, match="seq_lens: expected"):
            cache.attend(normal(1, 1, 1, 8))


def test_batch_index(backend):
    cache = kvnumba.KVCache(2, 4, 1, 8, backend=backend)
    with pytest.raises(ValueError, match="batch_idx: expected 0 to 1; got 2"):
        cache.get_kv(2)
    with pytest.raises(ValueError, match="batch_idx: expected at least 0; got -1"):
        cache.get_kv(-1)


KV, PAGED, QUANTIZED = kvnumba.KVCache, kvnumba.PagedKVCache, kvnumba.QuantizedKVCache

BAD_CACHES = {
    "batch_size": (KV, (0, 4, 1, 8), {}, ValueError, "batch_size: expected at least 1; got 0"),
    "max_seq_len": (KV, (1, 0, 1, 8), {}, ValueError, "max_seq_len: expected at least 1; got 0"),
    "num_kv_heads": (KV, (1, 4, 0, 8), {}, ValueError, "num_kv_heads: expected at least 1; got 0"),
    "head_dim": (KV, (1, 4, 1, 0), {}, ValueError, "head_dim: expected at least 1; got 0"),
    "a float": (KV, (1, 4.0, 1, 8), {}, TypeError, "max_seq_len: expected an integer; got float 4.0"),
    "dtype": (
        KV,
        (1, 4, 1, 8, np.float64),
        {},
        ValueError,
        "dtype: expected one of float32, .*; got .*float64",
    ),
    "format": (
        KV,
        (1, 4, 1, 8),
        {"key_format": "int3"},
        ValueError,
        "key_format: expected one of .*; got 'int3'",
    ),
    "layers": (KV, (1, 4, 1, 8), {"num_layers": 0}, ValueError, "num_layers: expected at least 1; got 0"),
    "odd int4": (KV, (1, 4, 1, 7, "int4"), {}, ValueError, "head_dim: expected an even number"),
    "group": (
        KV,
        (1, 4, 1, 8, "int8"),
        {"group_size": 3},
        ValueError,
        "group_size: expected a divisor of head_dim 8",
    ),
    "odd group": (
        KV,
        (1, 4, 1, 6, "int4"),
        {"group_size": 3},
        ValueError,
        "group_size: expected an even number",
    ),
    "group of floats": (KV, (1, 4, 1, 8), {"group_size": 4}, ValueError, "group_size: expected None"),
    "bits": (QUANTIZED, (1, 4, 1, 8), {"bits": 3}, ValueError, "bits: expected 8 or 4; got 3"),
    "num_blocks": (PAGED, (0, 4, 1, 8, 1), {}, ValueError, "num_blocks: expected at least 1; got 0"),
    "block_size": (PAGED, (4, 0, 1, 8, 1), {}, ValueError, "block_size: expected at least 1; got 0"),
    "max_num_seqs": (PAGED, (4, 4, 1, 8, 0), {}, ValueError, "max_num_seqs: expected at least 1; got 0"),
}


@pytest.mark.parametrize(("make", "args", "options", "error", "message"), BAD_CACHES.values(), ids=BAD_CACHES)
def test_bad_caches(backend, make, args, options, error, message):
    with pytest.raises(error, match=message):
        make(*args, **options, backend=backend)
