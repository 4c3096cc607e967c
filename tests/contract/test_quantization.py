"""quantize, dequantize, pack_int4 and unpack_int4."""

import numpy as np
import oracle
import pytest

import kvnumba


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32, 8, 2])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 4, 64)])
def test_round_trip_is_the_nearest_code(backend, bits, group_size, shape, normal):
    x = 3 * normal(*shape) + 1
    codes, scale, zero = kvnumba.quantize(x, bits, group_size=group_size, backend=backend)
    assert codes.dtype == np.uint8
    assert codes.shape == (*shape[:-1], 64 * bits // 8)
    assert scale.shape == zero.shape == (*shape[:-1], 64 // (group_size or 64))
    assert scale.dtype == zero.dtype == np.float32
    back = kvnumba.dequantize(codes, scale, zero, bits, backend=backend)
    oracle.assert_stored(back, x, f"int{bits}", group_size)


def test_by_hand(backend):
    x = np.array([-1.0, 0.0, 6.5, 14.0], np.float32)
    codes, scale, zero = kvnumba.quantize(x, 4, backend=backend)
    assert (scale.tolist(), zero.tolist()) == ([1.0], [-1.0])
    assert codes.tolist() == [0x01, 0x8F]  # 7.5 rounds to the even 8; the first of a pair is the high nibble
    assert kvnumba.dequantize(codes, scale, zero, 4, backend=backend).tolist() == [-1.0, 0.0, 7.0, 14.0]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1.7, -3e-5, 1e38, 1e-42])
def test_constant_rows_are_exact(backend, bits, value):
    x = np.full((3, 16), value, np.float32)
    x[1] = -x[1]
    codes, scale, zero = kvnumba.quantize(x, bits, backend=backend)
    assert not scale.any()
    np.testing.assert_array_equal(kvnumba.dequantize(codes, scale, zero, bits, backend=backend), x)
    cache = kvnumba.QuantizedKVCache(1, 3, 1, 16, bits, backend=backend)
    cache.update(x[None, None], x[None, None])
    np.testing.assert_array_equal(cache.get_kv(0)[0][0], x)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-7, 1e7, 1.6e38])
def test_the_extremes_are_kept(backend, bits, magnitude):
    """Smallest and largest of a row come back to rounding, however small or large the row is."""
    x = np.linspace(-magnitude, magnitude, 32, dtype=np.float32)
    back = kvnumba.dequantize(*kvnumba.quantize(x, bits, backend=backend), bits, backend=backend)
    assert back[0] == x[0]
    smallest = 2.0**-149  # a scale cannot be finer
    assert abs(float(back[-1]) - float(x[-1])) <= 4e-7 * magnitude + 2**bits * smallest


def test_caches_use_the_same_codes(backend, normal):
    x = normal(1, 2, 5, 32)
    for bits in (8, 4):
        cache = kvnumba.QuantizedKVCache(1, 5, 2, 32, bits, group_size=8, backend=backend)
        cache.update(x, x)
        codes, scale, zero = kvnumba.quantize(x, bits, group_size=8, backend=backend)
        np.testing.assert_array_equal(cache.k_cache, codes)
        expected = kvnumba.dequantize(codes, scale, zero, bits, backend=backend)[0]
        np.testing.assert_allclose(cache.get_kv(0)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.skipif("len(__import__('conftest').TESTED) < 2", reason="one backend is chosen")
def test_backends_agree_on_every_code(normal):
    x = normal(200, 64) * np.exp2(normal(200, 1) * 20)
    for bits in (8, 4):
        a, b = (kvnumba.quantize(x, bits, group_size=16, backend=name) for name in ("numpy", "cpu"))
        for part_a, part_b in zip(a, b, strict=True):
            np.testing.assert_array_equal(part_a, part_b)


@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_and_odd_memory(backend, bits, normal):
    codes, scale, zero = kvnumba.quantize(normal(0, 8), bits, backend=backend)
    assert kvnumba.dequantize(codes, scale, zero, bits, backend=backend).shape == (0, 8)
    x = normal(8, 6).T
    x.flags.writeable = False
    parts = kvnumba.quantize(x, bits, backend=backend)
    for part in parts:
        part.flags.writeable = False
    oracle.assert_stored(
        kvnumba.dequantize(*parts, bits, backend=backend), np.ascontiguousarray(x), f"int{bits}"
    )


def test_pack_int4_is_its_own_inverse(rng):
    codes = rng.integers(0, 16, (3, 5, 8), dtype=np.uint8)
    packed = kvnumba.pack_int4(codes)
    assert packed.shape == (3, 5, 4)
    assert packed[1, 2, 3] == 16 * codes[1, 2, 6] + codes[1, 2, 7]
    np.testing.assert_array_equal(kvnumba.unpack_int4(packed), codes)


BAD_CALLS = {
    "bits": (lambda x: kvnumba.quantize(x, 5), ValueError, "bits: expected 8 or 4; got 5"),
    "nan": (
        lambda x: kvnumba.quantize(x * np.nan),
        ValueError,
        "x: expected finite values .* for int8; got nan",
    ),
    "integers": (lambda x: kvnumba.quantize(x.astype(int)), TypeError, "x: expected float32"),
    "scalar": (
        lambda x: kvnumba.quantize(np.float32(1)),
        ValueError,
        "x: expected a last axis of at least one element; got shape",
    ),
    "group": (lambda x: kvnumba.quantize(x, group_size=5), ValueError, "group_size: expected a divisor"),
    "backend": (
        lambda x: kvnumba.quantize(x, backend="tpu"),
        ValueError,
        "backend: expected one of .*; got 'tpu'",
    ),
    "no elements": (
        lambda x: kvnumba.quantize(x[:, :0]),
        ValueError,
        "x: expected a last axis of at least one element",
    ),
    "odd groups": (
        lambda x: kvnumba.dequantize(np.zeros((2, 3), np.uint8), np.zeros((2, 2)), np.zeros((2, 2)), 4),
        ValueError,
        "group_size: expected an even number, int4 packs pairs; got 3",
    ),
    "codes": (lambda x: kvnumba.dequantize(x, x, x), TypeError, "codes: expected a uint8 array; got float32"),
    "scales": (
        lambda x: kvnumba.dequantize(np.zeros((2, 8), np.uint8), np.zeros(2), np.zeros(2)),
        ValueError,
        r"scale, zero: expected one shape \(2,\) \+ \(groups,\), groups a divisor of 8; got \(2,\) and \(2,\)",
    ),
    "odd": (
        lambda x: kvnumba.pack_int4(np.zeros(3, np.uint8)),
        ValueError,
        "codes: expected an even last axis",
    ),
    "16": (
        lambda x: kvnumba.pack_int4(np.full(4, 16, np.uint8)),
        ValueError,
        "codes: expected values 0 to 15; got 16",
    ),
    "floats": (lambda x: kvnumba.unpack_int4(x), TypeError, "packed: expected a uint8 array; got float32"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((2, 8), np.float32))


@pytest.mark.parametrize("bits", [8.0, 4.0, 5, "8", None])
def test_bits_are_8_or_4_and_an_integer(backend, bits, normal):
    for call in (
        lambda: kvnumba.quantize(normal(2, 8), bits, backend=backend),
        lambda: kvnumba.dequantize(*kvnumba.quantize(normal(2, 8), backend=backend), bits, backend=backend),
        lambda: kvnumba.QuantizedKVCache(1, 4, 1, 8, bits, backend=backend),
    ):
        with pytest.raises((TypeError, ValueError), match="^bits: expected"):
            call()
