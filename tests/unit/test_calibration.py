"""Calibration: what is measured, what is refused, and the files."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest

import kvnumba
from kvnumba.calibration import Calibration
from kvnumba.models.checkpoint import BUNDLED_MODEL
from kvnumba.models.sampling import softmax

TEXT = Path(argparse.__file__).read_bytes()  # held out of the model's training and of its calibration


@pytest.fixture
def layers(normal):
    """Keys and queries of two layers that differ in H and D, 100 tokens."""
    keys = [3 * normal(100, 2, 8) + 50, normal(100, 1, 4)]
    return keys, [normal(100, 6, 8) / 7, normal(100, 2, 4)]


@pytest.fixture
def calibration(layers):
    return kvnumba.calibrate(*layers, source="a test")


@pytest.fixture(scope="module")
def decoder():
    return kvnumba.IncrementalDecoder.from_pretrained()


def test_shifts_and_scales(layers, calibration):
    for i, (k, q) in enumerate(zip(*layers, strict=True)):
        k, q = k.astype(np.float64), q.astype(np.float64)
        groups = q.shape[1] // k.shape[1]
        for head in range(k.shape[1]):
            rms = np.sqrt((q[:, head * groups : (head + 1) * groups] ** 2).mean(axis=(0, 1)))
            want = np.sqrt(k[:, head].std(axis=0) / rms)
            np.testing.assert_allclose(calibration.scales[i][head], want, rtol=1e-6)
            np.testing.assert_allclose(
                calibration.shifts[i][head], k[:, head].mean(axis=0), rtol=1e-5, atol=1e-6
            )
    assert [array.dtype for array in calibration.shifts] == [np.float32] * 2
    assert calibration.num_tokens == 100


def test_any_float_dtype_and_generators(layers, calibration):
    halves = [[x.astype(np.float16) for x in part] for part in layers]
    found = kvnumba.calibrate(iter(halves[0]), (q for q in halves[1]))
    np.testing.assert_allclose(found.scales[0], calibration.scales[0], rtol=1e-2)
    assert found.fingerprint != calibration.fingerprint


def test_a_decoder_calibrates_in_chunks(decoder, monkeypatch):
    keys, queries = [], []
    tokens = np.frombuffer(TEXT[:300], np.uint8).astype(np.int64)
    cache = decoder.make_cache(300, backend="numpy")
    step = cache.step([cache.add_sequence()], [300])
    attend = decoder.attention_of(step)

    def attention(layer, q, k, v):
        keys.append(k)
        queries.append(q)
        return attend(layer, q, k, v)

    decoder.forward(tokens, step.positions, attention)
    want = kvnumba.calibrate(keys, queries)
    monkeypatch.setattr("kvnumba.models.llama.CALIBRATION_CHUNK", 70)
    with kvnumba.use_backend("numpy"):
        found = decoder.calibrate(TEXT[:300], source="argparse")
    for i in range(4):
        np.testing.assert_allclose(found.scales[i], want.scales[i], rtol=1e-4)
        np.testing.assert_allclose(found.shifts[i], want.shifts[i], rtol=1e-3, atol=1e-4)
    assert (found.num_tokens, found.source) == (300, "argparse")


def test_the_bundled_model_has_one_that_helps(decoder):
    assert repr(decoder.calibration) == (
        f"Calibration({decoder.calibration.fingerprint}: 4 layers of (H, D) = (2, 64), 4,000 tokens of "
        "4,000 bytes of tempfile.py)"
    )
    divergences = []
    logits = {}
    for name, options in {
        "exact": {},
        "plain": {"dtype": "int4", "rotation": False, "recent_tokens": 0},
        "calibrated": {"dtype": "int4", "recent_tokens": 0},
    }.items():
        cache = decoder.make_cache(500, backend="numpy", **options)
        calibrated = cache.layout.transform is not None and cache.layout.transform.calibration
        assert (calibrated is decoder.calibration) == (name == "calibrated")
        logits[name] = decoder.extend(cache, [cache.add_sequence()], [TEXT[:500]])
    p = softmax(logits["exact"])
    divergences = [(p * np.log(p / softmax(logits[name]))).sum(-1).mean() for name in ("plain", "calibrated")]
    assert divergences[1] < divergences[0] / 2


def test_a_checkpoint_without_one(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(BUNDLED_MODEL / name)
    assert kvnumba.IncrementalDecoder.from_pretrained(tmp_path).calibration is None
    assert kvnumba.IncrementalDecoder(32, 4, 1, 10, 50).calibration is None


def test_a_checkpoint_with_another_models(tmp_path, calibration):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(BUNDLED_MODEL / name)
    calibration.save(tmp_path / "calibration.npz")
    with pytest.raises(ValueError, match=f"{tmp_path}/calibration.npz: of another model than the checkpoint"):
        kvnumba.IncrementalDecoder.from_pretrained(tmp_path)


def test_save_and_load(tmp_path, calibration):
    path = tmp_path / "a calibration"  # the name is taken as it is
    calibration.save(path)
    found = Calibration.load(str(path))
    for i in range(2):
        np.testing.assert_array_equal(found.shifts[i], calibration.shifts[i])
        np.testing.assert_array_equal(found.scales[i], calibration.scales[i])
    assert repr(found) == repr(calibration)
    assert "2 layers of (H, D) = (1, 4), (2, 8), 100 tokens of a test" in repr(found)


def test_select(calibration):
    other = calibration.select([1, 0])
    assert [array.shape for array in other.shifts] == [(1, 4), (2, 8)]
    assert (other.num_tokens, other.source) == (100, "a test")
    np.testing.assert_array_equal(calibration.select([1]).scales[0], calibration.scales[1])
    with pytest.raises(ValueError, match="layer: expected 0 to 1; got 2"):
        calibration.select([2])


def with_entries(path, **changes):
    """Save a file again with some entries changed; None leaves one out."""
    with np.load(path) as file:
        entries = {**file, **changes}
    with path.open("wb") as out:
        np.savez(out, **{name: array for name, array in entries.items() if array is not None})


DAMAGES = {
    "text": (lambda path: path.write_bytes(b"shifts"), "not a file that a calibration was saved to"),
    "empty": (lambda path: path.write_bytes(b""), "not a file that a calibration was saved to"),
    "another npz": (lambda path: np.savez(path, x=1), "not a file that a calibration was saved to"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:300]), "damaged: "),
    "flipped": (lambda path: path.write_bytes(path.read_bytes().replace(b"a\0\0\0 ", b"b\0\0\0 ")), "damaged: "),
    "version": (lambda path: with_entries(path, version=2), "version: expected 1; the file has 2"),
    "a part": (lambda path: with_entries(path, **{"scales.1": None}), "damaged: .*scales.1"),
    "negative": (lambda path: with_entries(path, **{"scales.1": -np.ones((1, 4))}), "damaged: scales.1.: expected"),
    "pickles": (lambda path: with_entries(path, source=np.array([{}], object)), "damaged: Object arrays"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_other_files(tmp_path, calibration, damage, message):
    path = tmp_path / "calibration.npz"
    calibration.save(path)
    damage(path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/no"):
        Calibration.load(tmp_path / "no")


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


REFUSED = {
    "no layers": (lambda k, q: ([], []), ValueError, "keys: expected at least one layer; got none"),
    "fewer queries": (lambda k, q: (k, q[:1]), ValueError, "queries: expected as many layers as keys; got 1"),
    "fewer keys": (lambda k, q: (k[:1], q), ValueError, "keys: expected as many layers as queries; got 1"),
    "axes": (
        lambda k, q: ([k[0], k[1][0]], q),
        ValueError,
        r"keys\[1\]: expected shape \(T, H, D\); got \(1, 4\)",
    ),
    "head_dim": (
        lambda k, q: (k, [q[0][:, :, :4], q[1]]),
        ValueError,
        r"queries\[0\]: expected shape \(T=100, Hq, D=8\); got \(100, 6, 4\)",
    ),
    "heads": (
        lambda k, q: (k, [q[0][:, :5], q[1]]),
        ValueError,
        r"queries\[0\]: expected a multiple of the 2 heads of the keys; got 5 heads",
    ),
    "tokens of a layer": (
        lambda k, q: ([k[0], k[1][:90]], [q[0], q[1][:90]]),
        ValueError,
        r"keys\[1\]: expected 100 tokens, as of the layers before; got 90",
    ),
    "few tokens": (
        lambda k, q: ([x[:63] for x in k], [x[:63] for x in q]),
        ValueError,
        r"keys\[0\]: expected at least 64 tokens, 1,000 are good and 4,000 better; got 63",
    ),
    "NaN": (
        lambda k, q: ([k[0], changed(k[1], (3, 0, 1), np.nan)], q),
        ValueError,
        r"keys\[1\]: expected finite values; got nan",
    ),
    "infinity": (
        lambda k, q: (k, [changed(q[0], (3, 0, 1), np.inf), q[1]]),
        ValueError,
        r"queries\[0\]: expected finite values; got inf",
    ),
    "a constant channel": (
        lambda k, q: ([changed(k[0], np.s_[:, 1, 5], 0.1), k[1]], q),
        ValueError,
        "keys: expected a channel that varies from token to token; layer 0, KV head 1, channel 5 does not",
    ),
    "queries of 0": (
        lambda k, q: (k, [q[0], changed(q[1], np.s_[:, :, 2], 0)]),
        ValueError,
        "queries: expected a channel that is not 0 for all tokens; layer 1, KV head 0, channel 2 does not",
    ),
    "integers": (lambda k, q: ([np.ones((99, 1, 4), int)], q), TypeError, r"keys\[0\]: expected float32"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_calibrate_refuses(layers, change, error, message):
    with pytest.raises(error, match=message):
        kvnumba.calibrate(*change(*layers))


ONES = np.ones((2, 4), np.float32)
BY_HAND = {
    "no layers": (([], [], 1), ValueError, "shifts: expected at least one layer; got none"),
    "axes": (([ONES[0]], [ONES], 1), ValueError, r"shifts\[0\]: expected shape \(H, D\); got \(4,\)"),
    "shapes": (([ONES], [ONES[:1]], 1), ValueError, r"scales: expected the shapes of the shifts, \[\(2, 4\)\]"),
    "layers": (([ONES], [ONES] * 2, 1), ValueError, "scales: expected the shapes of the shifts"),
    "NaN": (([ONES * np.nan], [ONES], 1), ValueError, r"shifts\[0\]: expected finite numbers"),
    "zero": (([ONES], [0 * ONES], 1), ValueError, r"scales\[0\]: expected numbers above 0; got 0"),
    "tokens": (([ONES], [ONES], 0), ValueError, "num_tokens: expected at least 1; got 0"),
    "source": (([ONES], [ONES], 1, 5), TypeError, "source: expected a str; got a int"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BY_HAND.values(), ids=BY_HAND)
def test_made_by_hand(arguments, error, message):
    with pytest.raises(error, match=message):
        Calibration(*arguments)
