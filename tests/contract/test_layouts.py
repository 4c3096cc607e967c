"""Layouts: widths of their own for values, dtypes of scales, and sizes without allocating."""

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba.storage import Layout

FORMATS_OF_BOTH = [("float32", "float32"), ("float16", "int4"), ("int8", "bfloat16"), ("fp8_e4m3", "int8")]


def check(cache, seq_id, q, **options):
    """Attention of q (Hq, T, D) is that of an exact program over what the cache holds."""
    out, lse = cache.attend(seq_id, q, return_lse=True, **options)
    k, v = cache.get_kv(seq_id)
    actual = out.swapaxes(0, 1), lse.swapaxes(0, 1)
    rounded = oracle.rounding_of(cache)
    oracle.assert_as_exact(actual, q.swapaxes(0, 1), k, v, rounded=rounded, **options)


@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(16, 8), (8, 24), (80, 128), (192, 128), (6, 2)])
@pytest.mark.parametrize(("key_format", "value_format"), FORMATS_OF_BOTH)
def test_values_have_a_width_of_their_own(
    backend, key_format, value_format, head_dim, value_head_dim, normal
):
    cache = kvnumba.PagedKVCache(
        20,
        16,
        2,
        head_dim,
        2,
        key_format=key_format,
        value_format=value_format,
        value_head_dim=value_head_dim,
        backend=backend,
    )
    cache.add_sequence()
    seq_id = cache.add_sequence()
    k, v = normal(2, 100, head_dim), normal(2, 100, value_head_dim)
    cache.update(seq_id, k, v)
    stored = cache.get_kv(seq_id)
    oracle.assert_stored(stored[0], k, key_format)
    oracle.assert_stored(stored[1], v, value_format)
    check(cache, seq_id, normal(6, 1, head_dim))
    check(cache, seq_id, normal(6, 20, head_dim), window_left=30, logits_soft_cap=5.0, sinks=normal(6))
    assert f"Dv={value_head_dim}" in repr(cache)


def test_values_of_another_width_in_every_call(backend, normal):
    cache = kvnumba.KVCache(2, 20, 2, 8, value_head_dim=4, num_layers=2, backend=backend)
    k, v, q = normal(2, 2, 5, 8), normal(2, 2, 5, 4), normal(2, 4, 5, 8)
    for layer in range(2):
        cache.update(k, v, layer=layer)
        assert cache.attend(q, layer=layer).shape == (2, 4, 5, 4)
    np.testing.assert_array_equal(cache.get_full_kv(layer=1)[1], v)
    with pytest.raises(ValueError, match=r"new_v: expected shape \(B=2, H=2, T=5, D=4\); got \(2, 2, 5, 8\)"):
        cache.update(k, k)
    paged = kvnumba.PagedKVCache(8, 4, 2, 8, 2, value_head_dim=4, backend=backend)
    prompt = kvnumba.ChunkedPrefillCache(paged, 3, seq_ids=[paged.add_sequence(), paged.add_sequence()])
    out = prompt.attend(q, k, v)
    assert out.shape == (2, 4, 5, 4)
    for b in range(2):
        want, _ = oracle.attention(q[b].swapaxes(0, 1), k[b], v[b])
        np.testing.assert_allclose(out[b].swapaxes(0, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_scales_in_float16(backend, fmt, group_size, normal):
    cache = kvnumba.PagedKVCache(
        20, 16, 2, 32, 2, fmt, group_size=group_size, scale_dtype="float16", backend=backend
    )
    cache.add_sequence()
    seq_id = cache.add_sequence()
    k, v = normal(2, 100, 32), 3 + normal(2, 100, 32)
    cache.update(seq_id, k, v)
    groups = 1 if group_size is None else 4
    assert cache.k_scale.dtype == np.float16
    assert cache.bytes_per_token() == 2 * 2 * (32 * {"int8": 8, "int4": 4}[fmt] // 8 + 4 * groups)
    for stored, x in zip(cache.get_kv(seq_id), (k, v), strict=True):
        parts = x.reshape(2, 100, groups, -1).astype(np.float64)
        step = np.ptp(parts, axis=-1, keepdims=True) / {"int8": 255, "int4": 15}[fmt]
        # half a step, and the rounding of the zero and of the largest code's scale
        allowed = step / 2 + 2.0**-11 * (
            np.abs(parts).max(-1, keepdims=True) + 2 * np.ptp(parts, -1, keepdims=True)
        )
        assert (np.abs(stored.reshape(parts.shape) - parts) <= allowed).all()
    check(cache, seq_id, normal(6, 1, 32))
    check(cache, seq_id, normal(6, 30, 32))


def test_float16_scales_are_bit_for_bit_the_same_on_all_backends(backend, normal):
    x = 5 * normal(50, 64) + 2
    for bits in (8, 4):
        found = kvnumba.quantize(x, bits, group_size=16, scale_dtype="float16", backend=backend)
        want = kvnumba.quantize(x, bits, group_size=16, scale_dtype="float16", backend="numpy")
        for have, expected in zip(found, want, strict=True):
            np.testing.assert_array_equal(have, expected)
        back = kvnumba.dequantize(*found, bits, backend=backend)
        np.testing.assert_array_equal(back, kvnumba.dequantize(*want, bits, backend="numpy"))


def test_what_float16_scales_cannot_reach(backend, normal):
    cache = kvnumba.KVCache(1, 4, 1, 8, "int8", scale_dtype="float16", backend=backend)
    x = normal(1, 1, 1, 8)
    x[..., 3] = 1e5
    with pytest.raises(ValueError, match=r"new_k: expected finite values up to .* with float16 scales"):
        cache.update(x, x)
    assert cache.seq_lens == [0]


def test_sizes_without_allocating():
    layout = Layout.of(10**9, 16, 8, 128, key_format="int8", value_format="int4", num_layers=32)
    assert layout.bytes_per_token() == 32 * 8 * (128 + 8 + 64 + 8)
    assert layout.memory_bytes() == 10**9 * 16 * layout.bytes_per_token()
    half = Layout.of(1, 1, 8, 128, "int4", scale_dtype="float16", group_size=32)
    assert half.bytes_per_token() == 8 * 2 * (64 + 2 * 2 * 4)
    small = Layout.of(3, 5, 2, 8, "fp8_e4m3", value_head_dim=4)
    for cache in (
        kvnumba.KVCache.from_layout(small, backend="numpy"),
        kvnumba.PagedKVCache.from_layout(small, 2, backend="numpy"),
        kvnumba.KVCache(3, 5, 2, 8, "fp8_e4m3", value_head_dim=4, backend="numpy"),
    ):
        assert cache.layout == small
        assert cache.memory_bytes() == small.memory_bytes() == 3 * 5 * 2 * 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks: expected at least 1; got 0"),
        ({"head_dim": 7, "dtype": "int4"}, "head_dim: expected an even number, int4 packs pairs; got 7"),
        ({"value_head_dim": 7, "dtype": "int4"}, "value_head_dim: expected an even number"),
        ({"value_head_dim": 0}, "value_head_dim: expected at least 1; got 0"),
        ({"dtype": "int8", "group_size": 3}, "group_size: expected a divisor of head_dim 8; got 3"),
        (
            {"dtype": "int8", "value_head_dim": 4, "group_size": 8},
            "group_size: expected a divisor of value_head_dim 4; got 8",
        ),
        ({"dtype": "int4", "group_size": 1}, "group_size: expected an even number"),
        ({"group_size": 4}, "group_size: expected None, the formats have no scales"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype: expected one of float32, float16; got 'bfloat16'"),
        ({"dtype": "fp8"}, "dtype: expected one of float32, .*fp8_e4m3.*; got 'fp8'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout.of(**{"num_blocks": 2, "block_size": 4, "num_kv_heads": 1, "head_dim": 8, **arguments})


def test_fp8_is_encoded_bit_for_bit_the_same_on_all_backends(backend, normal):
    x = normal(1, 2, 60, 64) * np.exp2(np.linspace(-16, 10, 64, dtype=np.float32))
    x[..., ::7] = 0
    x[0, 0, :, 1:4] = -0.0, np.inf, np.nan
    bits = []
    for name in (backend, "numpy"):
        cache = kvnumba.KVCache(1, 60, 2, 64, "fp8_e4m3", backend=name)
        cache.update(x, x)
        bits.append(np.array(cache.k_cache))
    np.testing.assert_array_equal(bits[0], bits[1])
