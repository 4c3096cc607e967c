"""The NumPy definitions of what NumPy has no dtype for."""

import numpy as np
import oracle
import pytest

from kvnumba.formats import FORMATS, float_to_fp8_e4m3, fp8_e4m3_to_float


def test_every_code_of_fp8_comes_back():
    codes = np.arange(256, dtype=np.uint8)
    values = fp8_e4m3_to_float(codes)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(float_to_fp8_e4m3(values), codes)
    np.testing.assert_array_equal(values[:127], oracle.E4M3)
    np.testing.assert_array_equal(values[128:255], -oracle.E4M3)
    assert np.isnan(values[[127, 255]]).all()


def test_fp8_is_the_nearest_number(rng):
    between = (oracle.E4M3[1:] + oracle.E4M3[:-1]) / 2  # ties, and their neighbours
    close = [np.nextafter(between.astype(np.float32), np.float32(end)) for end in (0, 1e9)]
    scaled = rng.standard_normal(20_000) * 2.0 ** rng.integers(-20, 12, 20_000)
    edges = [0.0, 448, 464, 464.1, 1e38, np.inf, np.nan, 1e-45, 2.0**-10, 2.0**-9, 2.0**-6]
    x = np.concatenate([between, *close, scaled, edges]).astype(np.float32)
    for values in (x, -x):
        np.testing.assert_array_equal(fp8_e4m3_to_float(float_to_fp8_e4m3(values)), oracle.fp8_e4m3(values))
        np.testing.assert_array_equal(float_to_fp8_e4m3(values) >> 7, np.signbit(values))


@pytest.mark.parametrize(
    "value_and_bits", [(0.0, 0x00), (-0.0, 0x80), (1.0, 0x38), (-448.0, 0xFE), (1e9, 0x7E)]
)
def test_fp8_as_the_paper_has_it(value_and_bits):
    value, bits = value_and_bits
    assert float_to_fp8_e4m3(np.array([value], np.float32))[0] == bits


def test_what_follows_from_a_row():
    assert [fmt.number for fmt in FORMATS.values()] == list(range(len(FORMATS)))
    for fmt in FORMATS.values():
        assert fmt.row_length(64) * fmt.code_dtype.itemsize * 8 == 64 * fmt.bits
        assert fmt.head_dim(fmt.row_length(64)) == 64
        assert fmt.multiple == (2 if fmt.bits == 4 else 1)
    assert (FORMATS["int8"].max_code, FORMATS["int4"].max_code) == (255, 15)
