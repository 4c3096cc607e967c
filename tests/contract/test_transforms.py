"""Row transforms: whatever is done to rows before they are stored, attention is that of what was written."""

import math

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba.calibration import Calibration
from kvnumba.transforms import RowTransform, rotate

CASES = [  # rotation, calibration, head_dim, value_head_dim
    (True, False, 128, 128),
    (False, True, 64, 64),
    (True, True, 64, 64),
    (True, True, 96, 80),  # blocks of 32, and of 16
    (True, True, 6, 2),
    (True, True, 24, 256),
]
TOLERANCES = {
    "float32": 2e-5,
    "float16": 2e-5,
    "bfloat16": 2e-5,
    "fp8_e4m3": 2e-5,
    "int8": 2e-3,
    "int4": 2e-3,
}
"""Of outputs, of which kernels that multiply codes round queries and weights to 16 bits."""


def hadamard(size):
    """The normalised matrix, by its definition: the sign of an element is the parity of the bits in common."""
    index = np.arange(size)
    parity = [[bin(i & j).count("1") % 2 for j in index] for i in index]
    return (1 - 2 * np.array(parity)) / math.sqrt(size)


def a_calibration(rng, num_layers, num_kv_heads, head_dim):
    shape = (num_layers, num_kv_heads, head_dim)
    shifts = rng.standard_normal(shape).astype(np.float32)
    scales = np.exp(rng.standard_normal(shape)).astype(np.float32)
    return Calibration(tuple(shifts), tuple(scales), 100, "a test")


def outliers(normal, calibration, *shape):
    """Keys of two layers (2, H, n, D) that the calibration fits."""
    k = normal(2, *shape)
    if calibration is None:
        return k
    shifts, scales = np.array(calibration.shifts), np.array(calibration.scales)
    return k * scales[:, :, None] + shifts[:, :, None]


def make(backend, rng, rotation, calibrated, head_dim, value_head_dim, fmt):
    calibration = a_calibration(rng, 2, 2, head_dim) if calibrated else None
    cache = kvnumba.PagedKVCache(
        10,
        16,
        2,
        head_dim,
        2,
        fmt,
        value_head_dim=value_head_dim,
        rotation=rotation,
        calibration=calibration,
        num_layers=2,
        backend=backend,
    )
    return cache, calibration


@pytest.mark.parametrize("size", [2, 8, 64])
def test_rotation_is_the_hadamard_matrix(size, normal):
    x = normal(5, 3 * size)
    want = (x.reshape(-1, size).astype(np.float64) @ hadamard(size)).reshape(x.shape)
    np.testing.assert_allclose(rotate(x), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rotate(rotate(x)), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rotation", "calibrated", "head_dim", "value_head_dim"), CASES)
def test_attention_does_not_see_a_transform(
    backend, fmt, rotation, calibrated, head_dim, value_head_dim, normal, rng
):
    cache, calibration = make(backend, rng, rotation, calibrated, head_dim, value_head_dim, fmt)
    seq_id = cache.add_sequence()
    k, v = outliers(normal, calibration, 2, 70, head_dim), normal(2, 2, 70, value_head_dim)
    sinks, slopes = 3 * normal(8), np.abs(normal(8))
    for layer in range(2):
        cache.update(seq_id, k[layer], v[layer], layer=layer)
    for layer in range(2):
        stored = cache.get_kv(seq_id, layer=layer)
        for count in (1, 2, 20):
            q = normal(8, count, head_dim) / 4
            for options in (
                {},
                {"sinks": sinks, "logits_soft_cap": 2.0},
                {"sinks": sinks, "window_left": 25, "alibi_slopes": slopes},
            ):
                out, lse = cache.attend(seq_id, q, layer=layer, return_lse=True, **options)
                want, want_lse = oracle.attention(q.swapaxes(0, 1), *stored, **options)
                tolerance = TOLERANCES[fmt]
                np.testing.assert_allclose(out.swapaxes(0, 1), want, rtol=tolerance, atol=2 * tolerance)
                np.testing.assert_allclose(lse.swapaxes(0, 1), want_lse, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(("rotation", "calibrated", "head_dim", "value_head_dim"), CASES)
def test_what_is_stored_is_what_was_written_transformed(
    backend, rotation, calibrated, head_dim, value_head_dim, normal, rng
):
    cache, calibration = make(backend, rng, rotation, calibrated, head_dim, value_head_dim, "float32")
    seq_id = cache.add_sequence()
    k, v = outliers(normal, calibration, 2, 5, head_dim), normal(2, 2, 5, value_head_dim)
    for layer in range(2):
        cache.update(seq_id, k[layer], v[layer], layer=layer)
    block = cache.block_table(seq_id)[0]
    want_k, want_v = k.astype(np.float64), v.astype(np.float64)
    if calibration is not None:
        want_k = (want_k - np.array(calibration.shifts)[:, :, None]) / np.array(calibration.scales)[
            :, :, None
        ]
    if rotation:
        want_k, want_v = (
            (x.reshape(-1, size) @ hadamard(size)).reshape(x.shape)
            for x, size in ((want_k, head_dim & -head_dim), (want_v, value_head_dim & -value_head_dim))
        )
    np.testing.assert_allclose(cache.k_pool[:, block, :, :5], want_k, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.v_pool[:, block, :, :5], want_v, rtol=1e-4, atol=1e-5)
    for layer in range(2):
        found = cache.get_kv(seq_id, layer=layer)
        np.testing.assert_allclose(found[0], k[layer], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], v[layer], rtol=1e-4, atol=1e-5)


def test_many_tokens_many_heads_and_long_sequences(backend, fmt, normal, rng):
    calibration = a_calibration(rng, 1, 2, 64)
    cache = kvnumba.KVCache(2, 1100, 2, 64, fmt, rotation=True, calibration=calibration, backend=backend)
    k = normal(2, 2, 1100, 64) * calibration.scales[0][:, None] + calibration.shifts[0][:, None]
    v = normal(2, 2, 1100, 64)
    cache.update(k, v)
    for heads, count in ((2, 1), (8, 1), (32, 3), (4, 40)):
        q = normal(2, heads, count, 64) / 4
        sinks = 5 * normal(heads)  # which long ranges, in pieces, count once
        out, lse = cache.attend(q, return_lse=True, sinks=sinks)
        for b in range(2):
            want, want_lse = oracle.attention(q[b].swapaxes(0, 1), *cache.get_kv(b), sinks=sinks)
            tolerance = TOLERANCES[fmt]
            np.testing.assert_allclose(out[b].swapaxes(0, 1), want, rtol=tolerance, atol=2 * tolerance)
            np.testing.assert_allclose(lse[b].swapaxes(0, 1), want_lse, rtol=tolerance, atol=4 * tolerance)


def test_outliers_cost_nothing_any_more(backend, normal, rng):
    k, v, q = normal(1, 2, 200, 64), normal(1, 2, 200, 64), normal(1, 4, 1, 64)
    k[..., [3, 35]] *= 30
    q[..., [3, 35]] /= 30
    want = oracle.attention(q[0].swapaxes(0, 1), k[0], v[0])[0]
    scales = np.sqrt(k[0].std(axis=1) / np.sqrt((q[0].reshape(2, 2, 64) ** 2).mean(axis=1)))
    calibration = Calibration((k[0].mean(axis=1),), (scales,), 200)
    errors = []
    for options in ({}, {"rotation": True}, {"rotation": True, "calibration": calibration}):
        cache = kvnumba.KVCache(1, 200, 2, 64, "int4", **options, backend=backend)
        cache.update(k, v)
        errors.append(np.abs(cache.attend(q)[0].swapaxes(0, 1) - want).max())
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < errors[0] / 4


def test_a_transform_belongs_to_what_is_saved(backend, normal, rng, tmp_path):
    first, second = a_calibration(rng, 1, 2, 8), a_calibration(rng, 1, 2, 8)
    assert first.fingerprint != second.fingerprint

    def cache(**options):
        return kvnumba.PagedKVCache(8, 4, 2, 8, 2, "int4", **options, backend=backend)

    saved = cache(rotation=True, calibration=first)
    seq_id = saved.add_sequence()
    saved.update(seq_id, normal(2, 3, 8), normal(2, 3, 8))
    saved.save(tmp_path / "a.kv")
    for options, have in (
        ({}, "None"),
        ({"rotation": True}, "'rotation'"),
        ({"rotation": True, "calibration": second}, f"'rotation, calibration {second.fingerprint}'"),
    ):
        want = f"transform: expected {have}; the file has 'rotation, calibration {first.fingerprint}'"
        with pytest.raises(ValueError, match=want):
            cache(**options).load(tmp_path / "a.kv")
    again = cache(rotation=True, calibration=first)
    new_id = again.load(tmp_path / "a.kv")[seq_id]
    for have, want in zip(again.get_kv(new_id), saved.get_kv(seq_id), strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_dim": 7, "rotation": True}, ValueError, "rotation: expected an even head_dim, .*; got 7"),
        (
            {"head_dim": 8, "value_head_dim": 5, "rotation": True},
            ValueError,
            "rotation: expected an even value_head_dim, .*; got 5",
        ),
        ({"head_dim": 8, "rotation": 1}, TypeError, "rotation: expected True or False; got 1"),
        ({"head_dim": 8, "calibration": "x"}, TypeError, "calibration: expected a Calibration; got a str"),
        (
            {"head_dim": 8, "num_layers": 2, "calibration": (1, 2, 8)},
            ValueError,
            r"calibration: expected one of 2 layers of shape \(H, D\) = \(2, 8\).*; got Calibration\(",
        ),
        (
            {"head_dim": 8, "calibration": (1, 2, 16)},
            ValueError,
            r"calibration: expected one of 1 layers of shape \(H, D\) = \(2, 8\).*; got Calibration\(",
        ),
    ],
)
def test_what_cannot_be_transformed(options, error, message, rng):
    if isinstance(options.get("calibration"), tuple):
        options = {**options, "calibration": a_calibration(rng, *options["calibration"])}
    with pytest.raises(error, match=message):
        kvnumba.KVCache(1, 4, 2, options.pop("head_dim"), "int8", **options, backend="numpy")


def test_the_name_says_what_is_done(rng):
    calibration = a_calibration(rng, 1, 1, 4)
    assert RowTransform(True, None).name == "rotation"
    assert RowTransform(False, calibration).name == f"calibration {calibration.fingerprint}"
