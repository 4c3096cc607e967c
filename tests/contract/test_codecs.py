"""Formats of the user's own: fp4, and others that pack bits otherwise, against NumPy's own idea of what they store."""

import os

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba import __main__ as command_line
from kvnumba.backends.registry import get_backend
from kvnumba.formats import REGISTERED

if "KVNUMBA_TEST_WORKERS" in os.environ:
    pytest.skip("caches on workers take no functions of users", allow_module_level=True)

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
DIM, GROUP = 32, 16


def top(x):
    size = abs(x[0])
    for value in x:
        size = max(size, abs(value))
    return size / LEVELS[7]


def fp4_code(value, scale):
    """Four bits: the sign, and the number of the level that is nearest; of two that are, the lower."""
    nearest = 0
    for n in range(1, 8):
        if abs(value) > scale * (LEVELS[n - 1] + LEVELS[n]) * 0.5:
            nearest = n
    return nearest | 8 if value < 0 else nearest


def fp4_encode(x, codes, scale):
    for n in range(len(codes)):
        codes[n] = fp4_code(x[2 * n], scale) << 4 | fp4_code(x[2 * n + 1], scale)


def fp4_decode(codes, x, scale):
    for i in range(len(x)):
        code = codes[i // 2] >> (4 if i % 2 == 0 else 0)
        x[i] = LEVELS[code & 7] * (-scale if code & 8 else scale)


def low(x):
    found = x[0]
    for value in x:
        found = min(found, value)
    return found


def step3(x):
    high = x[0]
    for value in x:
        high = max(high, value)
    return (high - low(x)) / np.float32(7)


def encode3(x, codes, scale, zero):
    """Eight elements of three bits in three bytes."""
    for n in range(len(codes) // 3):
        word = 0
        for i in range(8):
            position = (x[8 * n + i] - zero) / scale if scale > 0 else np.float32(0)
            word = word << 3 | min(7, max(0, int(np.rint(position))))
        codes[3 * n], codes[3 * n + 1], codes[3 * n + 2] = word >> 16, (word >> 8) & 255, word & 255


def decode3(codes, x, scale, zero):
    for n in range(len(codes) // 3):
        word = np.int64(codes[3 * n]) << 16 | np.int64(codes[3 * n + 1]) << 8 | np.int64(codes[3 * n + 2])
        for i in range(8):
            x[8 * n + i] = ((word >> (21 - 3 * i)) & 7) * scale + zero


def fixed_encode(x, codes):
    """Signed fixed point without a scale: 16ths, from -8 to 7.9375."""
    for i in range(len(x)):
        codes[i] = int(np.rint(min(max(x[i] * 16.0, -128.0), 127.0))) & 255


def fixed_decode(codes, x):
    for i in range(len(x)):
        x[i] = ((np.int64(codes[i]) ^ 128) - 128) / 16.0


def fixed_encode_of_arrays(x, codes):
    codes[:] = np.rint(np.minimum(np.maximum(x * 16, -128), 127)).astype(np.int8).view(np.uint8)


def fixed_decode_of_arrays(codes, x):
    x[:] = codes.view(np.int8) / 16


FP4 = {"bits": 4, "scale": top, "encode": fp4_encode, "decode": fp4_decode}
FORMATS = {
    "test_fp4": FP4,
    "test_int3": {"bits": 3, "scale": step3, "zero": low, "encode": encode3, "decode": decode3},
    "test_fixed": {"bits": 8, "encode": fixed_encode, "decode": fixed_decode},
}


@pytest.fixture(autouse=True)
def registered():
    """The formats of this file, in each of its tests and nowhere else; returns what registers another."""
    for name, functions in FORMATS.items():
        kvnumba.register_format(name, **functions)
    yield kvnumba.register_format
    REGISTERED.clear()


def stored_fp4(x, group, scale_dtype):
    groups = x.reshape(-1, group)
    scale = (np.abs(groups).max(axis=1) / np.float32(6)).astype(scale_dtype).astype(np.float32)[:, None]
    positive = np.where(scale > 0, scale, 1)
    levels = np.concatenate([-np.array(LEVELS[::-1]), LEVELS])
    distance = np.abs((groups / positive)[..., None] - levels)
    return (levels[distance.argmin(axis=-1)] * scale).reshape(x.shape)


def stored_int3(x, group, scale_dtype):
    groups = x.reshape(-1, group)
    zero, scale = (
        part.astype(scale_dtype).astype(np.float32)[:, None]
        for part in (groups.min(axis=1), (groups.max(axis=1) - groups.min(axis=1)) / np.float32(7))
    )
    codes = np.clip(np.rint((groups - zero) / np.where(scale > 0, scale, 1)), 0, 7)
    return (codes * scale + zero).reshape(x.shape)


def stored_fixed(x, group, scale_dtype):
    return np.rint(np.clip(x * 16, -128, 127)) / 16


STORED = {"test_fp4": stored_fp4, "test_int3": stored_int3, "test_fixed": stored_fixed}


def options_of(fmt, scale_dtype="float32"):
    return {"scale_dtype": scale_dtype, "group_size": None if fmt == "test_fixed" else GROUP}


def paged(backend, fmt, **options):
    return kvnumba.PagedKVCache(8, 16, 2, DIM, 2, fmt, backend=backend, **{**options_of(fmt), **options})


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_are_stored_as_the_functions_say(backend, fmt, scale_dtype, normal):
    k, v = normal(2, 1, 2, 21, DIM)
    k[0, 0, 3] = 0
    cache = kvnumba.KVCache(1, 24, 2, DIM, fmt, backend=backend, **options_of(fmt, scale_dtype))
    cache.update(k, v)
    for x, have in zip((k, v), cache.get_kv(0), strict=True):
        np.testing.assert_allclose(have, STORED[fmt](x[0], GROUP, scale_dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("new", "fmt"), [(1, "test_fp4"), (1, "test_fixed"), (40, "test_int3")])
def test_attention_is_that_of_what_is_stored(backend, new, fmt, normal):
    cache = paged(backend, fmt, value_format="float32" if fmt == "test_fixed" else None)
    seq_id = cache.add_sequence()
    cache.update(seq_id, *normal(2, 2, 50, DIM))
    q = normal(4, new, DIM)
    out, lse = cache.attend(seq_id, q, return_lse=True)
    k, v = cache.get_kv(seq_id)
    oracle.assert_as_exact((out.swapaxes(0, 1), lse.swapaxes(0, 1)), q.swapaxes(0, 1), k, v)


def test_products_in_bfloat16(normal):
    """Whoever asks for them gets keys and values rounded to them."""
    cache = paged("cpu", "test_fp4")
    seq_id = cache.add_sequence()
    cache.update(seq_id, *normal(2, 2, 50, DIM))
    q = normal(4, 40, DIM)
    out = cache.attend(seq_id, q, arithmetic="bfloat16")
    np.testing.assert_allclose(out, cache.attend(seq_id, q), atol=0.05)


def test_the_same_codes_as_in_numpy(backend, normal):
    if backend == "numpy":
        pytest.skip("others are compared with it")
    k, v = normal(2, 2, 30, DIM)
    found = []
    for name in ("numpy", backend):
        cache = paged(name, "test_fp4", scale_dtype="float16")
        cache.update(cache.add_sequence(), k, v)
        found.append((cache.k_pool, cache.k_scale, cache.v_pool))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_on_their_own(backend, fmt, normal):
    """Codes of single rows, with a scale and a zero or without: those that NumPy finds."""
    chosen, numpy = get_backend(backend), get_backend("numpy")
    rows, x = paged(backend, fmt).layout.keys, normal(6, DIM)
    found, want = chosen.encode(x, rows), numpy.encode(x, rows)
    np.testing.assert_array_equal(found.codes, want.codes)
    np.testing.assert_allclose(chosen.decode(found, rows), numpy.decode(want, rows), rtol=1e-6)


def test_functions_of_whole_arrays(normal, registered):
    """In NumPy and what Numba compiles for CPUs."""
    registered("test_arrays", bits=8, encode=fixed_encode_of_arrays, decode=fixed_decode_of_arrays)
    k, v = normal(2, 2, 30, DIM)
    for backend in ("numpy", "cpu"):
        cache = kvnumba.PagedKVCache(8, 16, 2, DIM, 2, "test_arrays", backend=backend)
        seq_id = cache.add_sequence()
        cache.update(seq_id, k, v)
        for x, have in zip((k, v), cache.get_kv(seq_id), strict=True):
            np.testing.assert_array_equal(have, stored_fixed(x, None, None))


def test_options_of_a_cache(backend, normal):
    """Rotated, with recent tokens in float, in several layers, forked and rolled back."""
    options = {"rotation": True, "recent_tokens": 5, "sink_tokens": 2, "num_layers": 2, "backend": backend}
    cache = kvnumba.PagedKVCache(16, 16, 2, DIM, 2, "test_fp4", group_size=GROUP, **options)
    plain = kvnumba.PagedKVCache(16, 16, 2, DIM, 2, "float32", num_layers=2, backend=backend)
    k, v, q = normal(2, 2, 40, DIM), normal(2, 2, 40, DIM), normal(4, 1, DIM)
    results = []
    for each in (cache, plain):
        seq_id = each.add_sequence()
        for begin, end in ((0, 20), (20, 33), (33, 40)):
            for layer in range(2):
                each.update(seq_id, k[layer, :, begin:end], v[layer, :, begin:end], layer=layer)
        each.truncate(seq_id, 36)
        fork = each.fork(seq_id)
        each.check_integrity()
        results.append((*each.get_kv(fork, layer=1), each.attend(fork, q, layer=1)))
    exact = results[1]
    for have, want in zip(results[0][:2], exact[:2], strict=True):
        np.testing.assert_allclose(have[:, -1], want[:, -1], atol=0.01)  # in float16
        assert 0.005 < np.mean((have - want) ** 2) < 0.03
    assert 0 < np.abs(results[0][2] - exact[2]).mean() < 0.1


def test_a_file_names_the_format(backend, tmp_path, normal, monkeypatch):
    path = tmp_path / "cache"
    cache = paged(backend, "test_fp4")
    seq_id = cache.add_sequence()
    cache.update(seq_id, *normal(2, 2, 20, DIM))
    cache.save(path)
    other = paged(backend, "test_fp4")
    back = other.load(path)[seq_id]
    for have, want in zip(other.get_kv(back), cache.get_kv(seq_id), strict=True):
        np.testing.assert_array_equal(have, want)
    monkeypatch.delitem(REGISTERED, "test_fp4")
    with pytest.raises(ValueError, match="key_format: the file has 'test_fp4', which is not registered here"):
        kvnumba.PagedKVCache(8, 16, 2, DIM, 2, "int4", group_size=GROUP, backend=backend).load(path)
    with pytest.raises(ValueError, match="dtype: expected one of float32, .*test_int3.*; got 'test_fp4'"):
        paged(backend, "test_fp4")


def test_fp4_beside_int4(backend, normal):
    """Half a bit less, for a larger error where no element is large, and the same where some are."""
    x = normal(1, 1, 64, 128)
    outliers = x * np.where(np.arange(128) % 13, 1, 8).astype(np.float32)
    worse = {}
    for name, rows in (("normal", x), ("outliers", outliers)):
        errors = []
        for fmt, bits in (("test_fp4", 4.5), ("int4", 5)):
            options = {"group_size": 32, "scale_dtype": "float16", "backend": backend}
            cache = kvnumba.KVCache(1, 64, 1, 128, fmt, **options)
            assert cache.layout.bytes_per_token() * 8 == 2 * 128 * bits
            cache.update(rows, rows)
            errors.append(np.sqrt(np.mean((cache.get_kv(0)[0] - rows[0]) ** 2)))
        worse[name] = errors[0] / errors[1]
    assert 1.2 < worse["normal"] < 1.4
    assert 0.95 < worse["outliers"] < 1.1


# What is refused

LEVEL = 6.0


def given(**changed):
    return {"name": "test_new", **FP4, **changed}


def reads_level(x):
    return abs(x[0]) / LEVEL


def reads_array(x):
    return x[0] * ARRAY[0]


ARRAY = np.ones(3)


def of_none(x):
    pass


def raises(x):
    if len(x) > 0:
        raise ValueError("no")
    return 0.0


def too_far(codes, x, scale):
    for i in range(len(x) + 1):
        x[i] = scale


def leaves_one(codes, x, scale):
    x[1:] = scale


def leaves_bits(x, codes, scale):
    codes[0] |= 1
    codes[1:] = 0


def returns_codes(x, codes, scale):
    codes[:] = 0
    return codes


def spoils(x, codes, scale):
    x[0] = 0


REFUSED = [
    (given(name="int4"), ValueError, "name: expected one that is not taken, float32, .*; got 'int4'"),
    (given(name="a b"), ValueError, "name: expected letters, digits and underscores; got 'a b'"),
    (given(name=4), ValueError, "name: expected letters, digits and underscores; got 4"),
    (given(name="test_int3"), ValueError, "name: test_int3 is registered already, with other functions or bits"),
    (given(bits=0), ValueError, "bits: expected at least 1; got 0"),
    (given(bits=16), ValueError, "bits: expected 1 to 15, float16 takes 16; got 16"),
    (given(bits=4.5), TypeError, "bits: expected an integer; got float 4.5"),
    (given(encode=3), TypeError, r"encode: expected a Python function of \(x, codes, scale\); got a int"),
    (given(decode=None), TypeError, r"decode: expected a Python function of \(codes, x, scale\); got a NoneType"),
    (given(encode=fixed_encode), TypeError, r"encode: fixed_encode \(.*expected it to take \(x, codes, scale\), 3 "),
    (given(scale=None), TypeError, r"fp4_encode .*expected it to take \(x, codes\), 2 arguments; it takes"),
    (given(scale=None, zero=low), ValueError, "zero: expected a scale with it"),
    (given(scale=of_none), ValueError, "scale: of_none .*expected it to return a number; got None"),
    (given(scale=raises), ValueError, "scale: raises .*has a raise or an assert, which kernels cannot do"),
    (given(scale=reads_array), ValueError, "reads ARRAY, a ndarray, .*keep numbers in a tuple"),
    (given(decode=too_far), ValueError, "too_far .*raised IndexError for a group of 128 elements"),
    (given(decode=leaves_one), ValueError, r"leaves_one .*expected it to set all 128 elements.*x\[0\] is none"),
    (given(encode=leaves_bits), ValueError, r"leaves_bits .*expected it to set all 64 bytes.*codes\[0\]"),
    (given(encode=returns_codes), ValueError, "returns_codes .*and to return nothing; got a ndarray"),
    (given(encode=spoils), ValueError, "spoils .*raised ValueError .*read-only"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_what_is_refused(arguments, error, message):
    before = dict(REGISTERED)
    with pytest.raises(error, match=message):
        kvnumba.register_format(**arguments)
    assert before == REGISTERED


def test_the_same_may_be_registered_again():
    kvnumba.register_format("test_fp4", **FP4)
    with pytest.raises(ValueError, match="test_fp4 is registered already"):
        kvnumba.register_format("test_fp4", **{**FP4, "bits": 8})


def test_bits_that_do_not_pack(backend):
    with pytest.raises(
        ValueError, match="head_dim: expected a multiple of 8, test_int3 packs 8 elements of 3 bits; got 36"
    ):
        kvnumba.KVCache(1, 4, 1, 36, "test_int3", backend=backend)
    with pytest.raises(ValueError, match="group_size: expected a multiple of 8, test_int3 .*; got 4"):
        kvnumba.KVCache(1, 4, 1, 32, "test_int3", group_size=4, backend=backend)


def test_a_global_that_changes(backend, normal, registered, monkeypatch):
    registered(**given(scale=reads_level))
    cache = paged(backend, "test_new")
    seq_id = cache.add_sequence()
    k, v, q = normal(2, 3, DIM), normal(2, 3, DIM), normal(2, 1, DIM)
    cache.update(seq_id, k, v)
    before = cache.get_kv(seq_id)
    with monkeypatch.context() as patch:
        patch.setitem(reads_level.__globals__, "LEVEL", 7.0)
        message = "reads_level .*reads LEVEL, which was 6.0 .*and is 7.0 now; register it by another name"
        calls = (
            lambda: cache.update(seq_id, k, v),
            lambda: cache.get_kv(seq_id),
            lambda: cache.attend(seq_id, q),
        )
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()
    for have, want in zip(cache.get_kv(seq_id), before, strict=True):
        np.testing.assert_array_equal(have, want)


def needs_small(x, codes, scale):
    codes[:] = 0
    for value in x:
        codes[len(codes) if value > 10 else 0] = 0


def test_a_function_that_raises_for_what_is_written(normal, registered):
    registered(**given(encode=needs_small))
    cache = paged("numpy", "test_new")
    seq_id = cache.add_sequence()
    k, v = normal(2, 3, DIM), normal(2, 3, DIM)
    cache.update(seq_id, k, v)
    stored = cache.k_pool.copy(), cache.v_pool.copy()
    v[1, 2, 5] = 11
    with pytest.raises(ValueError, match="needs_small .*raised IndexError for a group of 16 elements"):
        cache.update(seq_id, k, v)
    for have, want in zip((cache.k_pool, cache.v_pool), stored, strict=True):
        np.testing.assert_array_equal(have, want)
    assert cache.seq_lens == {seq_id: 3}
    cache.check_integrity()


def of_text(x):
    return np.float32(float(format(x[0], ".3f")))


def perhaps_none(x):
    if x[0] < 100:
        return x.max()
    return None


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (of_text, r"scale: of_text \(test_codecs.py, line \d+\) cannot be compiled, line \d+: "),
        (perhaps_none, "perhaps_none .*cannot be compiled: expected it to return a number; its type is Opt"),
    ],
)
def test_what_does_not_compile(scale, message, registered):
    registered(**given(scale=scale))
    paged("numpy", "test_new")
    with pytest.raises(ValueError, match=message):
        paged("cpu", "test_new")


def test_tables_of_memory_have_them(capsys, tmp_path, registered):
    table = kvnumba.memory_growth_table(1, 2, 128, seq_lens=[1]).splitlines()
    assert table[1].split()[-2:] == ["model", *FORMATS][-2:]
    REGISTERED.clear()
    file = tmp_path / "mine.py"
    file.write_text(
        "import kvnumba\n\ndef encode(x, codes):\n    codes[:] = 0\n\ndef decode(codes, x):\n    x[:] = 0\n\n"
        "kvnumba.register_format('zeros', bits=1, encode=encode, decode=decode)\n"
    )
    command_line.main(["memory", "--formats", str(file), "--layers", "1", "--kv-heads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-1] == "zeros"
    assert lines[3].split()[-2:] == ["32", "B"]  # two rows of 128 bits
