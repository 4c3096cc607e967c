"""What only the CPU backend promises: no allocations, any threading layer, any processor, any installation."""

import os
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from conftest import TESTED

import kvnumba
from kvnumba import formats
from kvnumba.options import Scoring
from kvnumba.recipes import INT4_RECIPE
from kvnumba.storage import Batch, Encoded, Layout, Part

if "cpu" not in TESTED:
    pytest.skip("another backend is chosen", allow_module_level=True)

import numba
from numba.core.runtime import _nrt_python, rtsys

from kvnumba.backends import cpu
from kvnumba.backends.cpu import CpuBackend, ceilings, describe_plan
from kvnumba.backends.cpu.simd import HAS_BFLOAT16_DOT

SMALL = textwrap.dedent("""
    import sys, threading
    import numpy as np
    import kvnumba
    sys.path.insert(0, {tests!r})
    import oracle

    def attend_once(fmt, seed, length=700, **options):
        normal = lambda *shape: np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        cache = kvnumba.KVCache(1, 2000, 2, 16, fmt, backend="cpu")
        k, v = normal(1, 2, length, 16), 2 * normal(1, 2, length, 16)
        cache.update(k, v)
        oracle.assert_stored(cache.get_kv(0)[0], k[0], fmt)
        for new_tokens in (1, 9):  # a few rows of scores, and many
            q = normal(1, 4, new_tokens, 16)
            out, lse = cache.attend(q, return_lse=True, **options)
            actual = out[0].swapaxes(0, 1), lse[0].swapaxes(0, 1)
            rounded = oracle.rounding_of(cache)
            oracle.assert_as_exact(actual, q[0].swapaxes(0, 1), *cache.get_kv(0), rounded=rounded, **options)
""").format(tests=os.path.dirname(oracle.__file__))


def run(script, **environment):
    """Run a script after the definitions above, in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL + textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("new_tokens", [1, 40])
def test_allocations_do_not_grow_with_the_length(fmt, new_tokens, normal):
    """Numba's heap is used for the headers of arguments only: as often for 20,000 cached tokens as for 60,000.

    NumPy's arrays are counted by the contract suite.
    """
    _nrt_python.memsys_enable_stats()
    counts = []
    for length in (20_000, 60_000):
        cache = kvnumba.PagedKVCache(length // 16 + 4, 16, 2, 32, 1, fmt, backend="cpu")
        seq_id = cache.add_sequence()
        k, q = normal(2, length, 32), normal(4, new_tokens, 32)
        cache.update(seq_id, k, k)
        cache.attend(seq_id, q)
        before = rtsys.get_allocation_stats().alloc
        cache.update(seq_id, k[:, :1], k[:, :1])
        cache.attend(seq_id, q)
        cache.get_kv(seq_id)
        counts.append(rtsys.get_allocation_stats().alloc - before)
    assert counts[0] == counts[1] < 100


@pytest.mark.parametrize("num_threads", [1, 2])
def test_thread_counts(num_threads, normal):
    if num_threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"this process has {numba.config.NUMBA_NUM_THREADS} thread")
    before = numba.get_num_threads()
    numba.set_num_threads(num_threads)
    try:
        cache = kvnumba.KVCache(1, 3000, 2, 16, "int8", backend="cpu")
        k, q = normal(1, 2, 3000, 16), normal(1, 6, 30, 16)
        cache.update(k, k)
        out, lse = cache.attend(q, return_lse=True)
        actual = out[0].swapaxes(0, 1), lse[0].swapaxes(0, 1)
        oracle.assert_as_exact(
            actual, q[0].swapaxes(0, 1), *cache.get_kv(0), rounded=oracle.rounding_of(cache)
        )
        numba.set_num_threads(1)  # the plan of the same batch is for more threads than there are now
        np.testing.assert_array_equal(cache.attend(q), out)
    finally:
        numba.set_num_threads(before)


def test_results_repeat(normal):
    cache = kvnumba.KVCache(1, 5000, 2, 16, backend="cpu")
    k, q = normal(1, 2, 5000, 16), normal(1, 4, 3, 16)
    cache.update(k, k)
    first = cache.attend(q)
    for _ in range(5):
        np.testing.assert_array_equal(cache.attend(q), first)


@pytest.mark.parametrize("layer", ["default", "workqueue"])
def test_two_threads_at_once(layer):
    """Workqueue aborts the process when two threads enter kernels; one at a time does."""
    script = """
        threads = [threading.Thread(target=lambda i=i: [attend_once("int8", i) for _ in range(30)]) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        import numba
        print(numba.threading_layer())
    """
    printed = run(script, NUMBA_THREADING_LAYER=layer)
    assert printed in ("omp", "tbb", "workqueue")
    assert layer == "default" or printed == layer


def test_one_cache_from_two_threads(normal):
    """Different sequences of one paged cache, grown and read side by side."""
    cache = kvnumba.PagedKVCache(600, 4, 1, 8, 8, backend="cpu")
    failures = []

    def work(number):
        local = np.random.default_rng(number)
        try:
            for _ in range(6):
                seq_id = cache.add_sequence()
                k = local.standard_normal((1, 60, 8), dtype=np.float32)
                for t in range(0, 60, 3):
                    cache.update(seq_id, k[:, t : t + 3], k[:, t : t + 3])
                np.testing.assert_array_equal(cache.get_kv(seq_id)[0], k)
                assert np.isfinite(cache.attend(seq_id, k[:, -2:])).all()
                cache.finish_sequence(seq_id)
        except BaseException as error:  # carried to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cache.num_free_blocks == 600


def test_one_contiguous_cache_from_two_threads():
    """Answers are not promised, only that the process lives; batches of different widths meet in one cache."""
    script = """
        cache = kvnumba.KVCache(2, 4000, 2, 16, backend="cpu")
        x = np.ones((2, 2, 3000, 16), np.float32)
        cache.update(x, x)

        def work(count):
            for i in range(300):
                try:
                    if i % 3 == 0:
                        cache.update(x[:, :, :count], x[:, :, :count], [1000 * count] * 2)
                    cache.attend(x[:, :, :count])
                    cache.get_full_kv()
                except (ValueError, RuntimeError):
                    pass

        threads = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print("alive")
    """
    assert run(script) == "alive"


PROCESSORS = {
    "plain": ({"x86_64": "x86-64", "AMD64": "x86-64"}.get(os.uname().machine, "generic"), ""),
    "avx2": ("haswell", "+avx2,+fma,+f16c,+avx,+sse4.2"),
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors(processor, tmp_path):
    """The same kernels with narrower vectors and without this processor's instructions, compiled afresh."""
    name, features = PROCESSORS[processor]
    if processor != "plain" and "avx2" not in describe_processor():
        pytest.skip("this processor has no AVX2")
    script = """
        for fmt in kvnumba.formats.FORMATS:
            attend_once(fmt, 1)
        masks = dict(window_left=300, logits_soft_cap=5.0, alibi_slopes=[0.1, 0.2, 0.3, 0.4], sinks=[0.0] * 4)
        attend_once("int8", 2, **masks)
        from kvnumba.backends.cpu import simd
        print(simd.LANES, simd.HAS_HALF)
    """
    printed = run(script, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == ("8 False" if name == "x86-64" else "8 True")


def describe_processor():
    from kvnumba.backends.cpu import describe

    return dict(describe())["processor"]


def test_an_installation_that_cannot_be_written():
    """Where Numba finds no folder for compiled code, kernels are compiled in each process."""
    script = """
        import kvnumba.backends.cpu.jit as jit
        calls = []

        def njit(**options):
            calls.append(options)
            if options.get("cache"):
                raise RuntimeError("cannot cache function: no locator available for file")
            return lambda function: function

        jit.njit = njit
        assert jit._cached({"nogil": True})(len) is len
        print([options.get("cache") for options in calls])
    """
    assert run(script) == "[True, None]"


def test_kernels_stay_on_disk_until_a_source_changes(tmp_path):
    """A second process compiles nothing; one with another source does."""
    script = """
        import kvnumba.backends.cpu.jit as jit
        {change}
        attend_once("int8", 1)
        from kvnumba.backends.cpu import attend
        print(sum(attend.attend.stats.cache_misses.values()))
    """
    change = "jit._sources = lambda: 'another'"
    runs = ("pass", "pass", change)
    misses = [run(script.format(change=text), NUMBA_CACHE_DIR=str(tmp_path)) for text in runs]
    assert int(misses[0]) > 0
    assert int(misses[1]) == 0
    assert int(misses[2]) > 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({**INT4_RECIPE, "sink_tokens": 2}, id="of models"),
    ],
)
def test_warmup_compiles_all(tmp_path, options):
    scale_dtype = options.get("scale_dtype", "float32")
    script = f"""
        from kvnumba.backends.cpu import jit
        kvnumba.warmup(8, 2, key_format="int4", scale_dtype="{scale_dtype}", backend="cpu")
        before = set(jit._compiled)
        x = np.ones((2, 700, 64), np.float32)
        cache = kvnumba.PagedKVCache(80, 16, 2, 64, 2, "int4", backend="cpu", **{options})
        seq_id = cache.add_sequence()
        for tokens in (690, 4, 3, 1):
            cache.update(seq_id, x[:, :tokens], x[:, :tokens])
            cache.attend(seq_id, np.ones((8, tokens, 64), np.float32))
        cache.update(cache.fork(seq_id), x[:, :1], x[:, :1])
        cache.get_kv(seq_id)
        print(set(jit._compiled) == before)
    """
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == "True"


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_views_of_any_order(axes, normal):
    """Tokens are read, and results written, where they lie: with any strides, but for the last axis."""
    backend = kvnumba.backends.registry.get_backend("cpu")
    layout = Layout.of(3, 8, 2, 6, value_head_dim=4)
    batch = Batch.of(np.arange(3, dtype=np.int32)[:, None], np.full(3, 8, np.int32), np.full(3, 5), 8)

    def lie(x):
        return np.ascontiguousarray(x.transpose(*axes, *range(3, x.ndim))).transpose(
            *np.argsort(axes), *range(3, x.ndim)
        )

    k, v, q = normal(3, 5, 2, 6), normal(3, 5, 2, 4), normal(3, 5, 4, 6)
    results = []
    for order in (np.array, lie):
        buffers = backend.allocate(layout)
        backend.write(buffers, 0, order(k), order(v), batch)
        plan = backend.plan([Part(buffers, batch)], 4, Scoring.of(4, 6))
        out, lse = order(np.full((3, 5, 4, 4), np.nan, np.float32)), order(np.zeros((3, 5, 4), np.float32))
        backend.attend(0, order(q), plan, Scoring.of(4, 6), out, lse)
        results.append((out, lse))
    np.testing.assert_array_equal(*(out for out, _ in results))
    np.testing.assert_array_equal(*(lse for _, lse in results))
    with pytest.raises(ValueError, match="out, lse"):
        backend.attend(0, q, plan, Scoring.of(4, 6), out[..., ::-1], lse)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_parts(scale_dtype, normal):
    """Keys in three parts of several formats, one for some tokens only, are attended to as if they lay together."""
    backend = kvnumba.backends.registry.get_backend("cpu")
    shared, own, recent = normal(1, 2, 40, 16), normal(2, 2, 30, 16), normal(2, 2, 6, 16)
    q, sinks = (
        normal(1, 4, 4, 16),
        normal(4),
    )  # two tokens of each sequence, and a third sequence's in no part
    q = np.concatenate([q, normal(1, 2, 4, 16)], axis=1)

    def stored(x, fmt, block_size):
        """Buffers with the same keys and values, (B, H, n, D), and what they hold."""
        count, heads, length, head_dim = x.shape
        num_blocks = -(-length // block_size)
        layout = Layout.of(count * num_blocks, block_size, heads, head_dim, fmt, scale_dtype=scale_dtype)
        buffers = backend.allocate(layout)
        table = np.arange(count * num_blocks, dtype=np.int32).reshape(count, num_blocks)
        lengths = np.full(count, length, np.int32)
        view = x.swapaxes(1, 2)
        backend.write(buffers, 0, view, view, Batch.of(table, lengths, lengths, block_size))
        return buffers, table, lengths, backend.read(buffers, 0, table, length)

    counts = np.array([0, 2, 4], np.int32)
    prefix, table, lengths, (prefix_k, prefix_v) = stored(shared, "int8", 40)
    first = Batch(table, lengths, np.array([0, 4], np.int32), 40, lengths)
    middle, table, lengths, (middle_k, middle_v) = stored(own, "int4", 4)
    second = Batch(table, lengths, counts, 4, lengths)
    last, table, lengths, (last_k, last_v) = stored(recent, "float32", 16)
    third = Batch(table, lengths, counts, 16, lengths - 2)
    tokens = np.array([0, 1, 2, 3], np.int32)
    parts = [Part(prefix, first, tokens), Part(middle, second, tokens), Part(last, third, tokens)]
    out, lse = np.full((1, 6, 4, 16), np.nan, np.float32), np.empty((1, 6, 4), np.float32)
    scoring = Scoring.of(4, 16, sinks=sinks, arithmetic="float32")
    backend.attend(0, q, backend.plan(parts, 4, scoring), scoring, out, lse)
    for s in range(2):
        k = np.concatenate([prefix_k[0], middle_k[s], last_k[s]], axis=1)
        v = np.concatenate([prefix_v[0], middle_v[s], last_v[s]], axis=1)
        rows = slice(2 * s, 2 * s + 2)
        oracle.assert_as_exact((out[0, rows], lse[0, rows]), q[0, rows], k, v, sinks=sinks)
    assert (out[0, 4:] == 0).all()
    np.testing.assert_array_equal(lse[0, 4:], np.tile(sinks, (2, 1)))


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_float16_scales(fmt, normal):
    """Codes and scales are the reference's, bit for bit, also of rows far from 0, and attention reads them."""
    rows = Layout.of(1, 1, 1, 48, fmt, scale_dtype="float16", group_size=16).keys
    x = normal(50, 48) * np.geomspace(1e-3, 1e3, 50, dtype=np.float32)[:, None] + np.float32(100)
    cpu, reference = (kvnumba.backends.registry.get_backend(name) for name in ("cpu", "numpy"))
    encoded = cpu.encode(x, rows)
    for have, want in zip(encoded, reference.encode(x, rows), strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_array_equal(have, want)
    np.testing.assert_array_equal(cpu.decode(encoded, rows), reference.decode(encoded, rows))


def test_fp8_is_the_nearest_number_bit_for_bit(rng):
    """Of all float16 numbers, of ties, and of bits of any kind: 0, subnormal, infinite, NaN."""
    rows = Layout.of(1, 1, 1, 32, "fp8_e4m3").keys
    backend = kvnumba.backends.registry.get_backend("cpu")
    x = np.concatenate(
        [
            np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32),
            rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32),
            formats.fp8_e4m3_to_float(np.arange(256, dtype=np.uint8)).repeat(2) * np.float32(1.0625),
        ]
    ).reshape(-1, 32)
    codes = backend.encode(x, rows).codes
    size = np.minimum(np.abs(np.nan_to_num(x, posinf=np.inf, neginf=-np.inf)), 448).astype(np.float64)
    above = np.searchsorted(oracle.E4M3, size)
    below = np.maximum(above - 1, 0)
    to_above, to_below = oracle.E4M3[above] - size, size - oracle.E4M3[below]
    nearest = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    want = np.where(np.isnan(x), 0x7F, nearest) | np.signbit(x) << 7
    np.testing.assert_array_equal(codes, want)
    every = np.arange(256, dtype=np.uint8).reshape(-1, 32)
    have = backend.decode(Encoded(every, np.empty((8, 0)), np.empty((8, 0))), rows)
    np.testing.assert_array_equal(have, formats.fp8_e4m3_to_float(every))


@pytest.mark.parametrize(
    ("arithmetic", "expected"),
    [(None, "few 4: int8, float16"), ("float32", "few 4: int8 staged to float32, float16")],
)
def test_a_plan_says_which_kernels_it_takes(arithmetic, expected):
    backend = CpuBackend()
    layout = Layout.of(2, 16, 2, 64, key_format="int8", value_format="float16")
    batch = Batch.of(np.arange(2, dtype=np.int32)[None], np.array([20], np.int32), np.array([1]), 16)
    scoring = Scoring.of(8, 64, arithmetic=arithmetic)
    plan = backend.plan([Part(backend.allocate(layout), batch)], 8, scoring)
    assert describe_plan(plan, scoring) == expected


@pytest.mark.parametrize("faster", [True, False])
def test_bfloat16_is_multiplied_where_that_is_faster(faster, monkeypatch, normal):
    if faster and not HAS_BFLOAT16_DOT:
        pytest.skip("this processor does not multiply bfloat16")
    monkeypatch.setattr(ceilings, "bfloat16_is_faster", lambda: faster)
    cpu._scores.cache_clear()
    cache = kvnumba.KVCache(1, 300, 2, 64, "float32", backend="cpu")
    k, v, q = normal(1, 2, 300, 64), normal(1, 2, 300, 64), normal(1, 4, 60, 64)
    cache.update(k, v)
    try:
        asked, exact = (cache.attend(q, arithmetic=name) for name in ("bfloat16", "float32"))
    finally:
        cpu._scores.cache_clear()
    assert np.array_equal(asked, exact) != faster
    np.testing.assert_allclose(asked, exact, atol=0.02)


@pytest.mark.parametrize(("cycles", "expected"), [(1.0, True), (2.0, False), (4.0, False)])
def test_one_quiet_repeat_decides_what_is_faster(cycles, expected, monkeypatch):
    """An instruction takes as long as a float32 multiply-add, or longer; other repeats are disturbed at random."""
    clock, rng = [0.0], np.random.default_rng(1)
    calls = {ceilings._compute: 0, ceilings._compute_pairs: 0}

    def launch(function, *_):
        calls[function] += 1
        delay = 0 if calls[function] == 5 else rng.uniform(1, 20)
        clock[0] += delay + (cycles if function is ceilings._compute_pairs else 1.0)

    monkeypatch.setattr(ceilings, "HAS_BFLOAT16_DOT", True)
    monkeypatch.setattr(ceilings, "launch", launch)
    monkeypatch.setattr(ceilings, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert ceilings.bfloat16_is_faster.__wrapped__() is expected


def test_bfloat16_is_not_faster_without_an_instruction(monkeypatch):
    monkeypatch.setattr(ceilings, "HAS_BFLOAT16_DOT", False)
    assert ceilings.bfloat16_is_faster.__wrapped__() is False


@pytest.mark.parametrize("options", [{}, {"window_left": 8000}], ids=str)
def test_masses_of_a_range_that_is_split(options, rng):
    """A single KV head, whose keys are dealt to all threads: partial results are merged before masses are known."""
    cache = kvnumba.KVCache(1, 9000, 1, 64, backend="cpu")
    k, v = rng.standard_normal((2, 1, 1, 9000, 64), dtype=np.float32)
    cache.update(k, v)
    q = rng.standard_normal((1, 4, 1, 64), dtype=np.float32)
    _, mass = cache.attend(q, return_mass=True, **options)
    first = 9000 - 1 - options.get("window_left", 8999)
    scores = q[0, :, 0].astype(np.float64) @ k[0, 0, first:].T.astype(np.float64) / 8
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    want = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
    np.testing.assert_allclose(mass[0, 0, first:], want, rtol=1e-4)
    assert not mass[0, 0, :first].any()
