"""The vector layer and the plan: each on its own."""

import numpy as np
import pytest
from conftest import TESTED

if "cpu" not in TESTED:
    pytest.skip("another backend is chosen", allow_module_level=True)

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from oracle import bfloat16

from kvnumba.backends.cpu import plan
from kvnumba.backends.cpu.codecs import CODE_BYTES, FORMAT_ID, interleave_rows, load_codes
from kvnumba.backends.cpu.simd import F32, HAS_BFLOAT16_DOT, I16, I32, LANES, Emitter, constant, vector
from kvnumba.caches import warmup as compilation
from kvnumba.storage import Batch


def compiled(body):
    """A function of a float32 array and a result array, whose vectors `body(e, x)` turns into others."""

    @intrinsic
    def apply(typing, x, out):
        def generate(context, builder, signature, args):
            e = Emitter(context, builder)
            source, target = e.pointer(x, args[0]), e.pointer(out, args[1])
            for i, result in enumerate(body(e, source)):
                e.store(result, e.at(target, 4 * i * LANES))
            return context.get_dummy_value()

        return types.void(x, out), generate

    @njit
    def run(x, out):
        apply(x, out)

    return run


def mapped(body, x):
    """`body(e, vector)` of every LANES elements of x."""
    run = compiled(lambda e, source: [body(e, e.load(source, vector(F32)))])
    out = np.empty_like(x)
    for i in range(0, len(x), LANES):
        run(x[i : i + LANES], out[i : i + LANES])
    return out


def test_exp():
    x = np.concatenate([-np.geomspace(1e-7, 87.3, 4 * LANES), -np.geomspace(88.1, 3e38, 2 * LANES)])
    x = x.astype(np.float32)
    want = np.exp(x.astype(np.float64))
    have = mapped(Emitter.exp, x)
    np.testing.assert_allclose(have[: 4 * LANES], want[: 4 * LANES], rtol=2.5e-7)
    assert (have[4 * LANES :] == 0).all()
    special = np.array([0.0, -np.inf, np.nan, *[-1.0] * (LANES - 3)], np.float32)
    np.testing.assert_array_equal(mapped(Emitter.exp, special)[:3], [1.0, 0.0, np.nan])


def test_tanh():
    x = np.concatenate([np.geomspace(1e-7, 40, 4 * LANES), -np.geomspace(1e-7, 40, 4 * LANES)])
    x = x.astype(np.float32)
    np.testing.assert_allclose(mapped(Emitter.tanh, x), np.tanh(x.astype(np.float64)), rtol=5e-7)


def test_sums(rng):
    x = rng.standard_normal((LANES, LANES), dtype=np.float32)
    out = np.empty(LANES, np.float32)
    vectors = compiled(
        lambda e, source: [e.sums([e.load(e.at(source, 4 * i * LANES), vector(F32)) for i in range(LANES)])]
    )
    vectors(x.reshape(-1), out)
    np.testing.assert_allclose(out, x.sum(axis=1), atol=1e-5)


@pytest.mark.parametrize("step", [1, 2, 4, LANES])
def test_reduce(rng, step):
    x = rng.standard_normal(LANES, dtype=np.float32)
    have = mapped(lambda e, v: e.reduce(v, e.max, step), x)
    want = np.tile(x.reshape(-1, step).max(axis=0), LANES // step)
    np.testing.assert_array_equal(have, want)


def test_loops_and_conditions():
    def body(e, source):
        first = e.load(source, vector(F32))
        doubled = e.loop(ir.Constant(ir.IntType(64), 3), [first], lambda i, v: [e.add(v[0], v[0])])[0]
        never = e.when(ir.Constant(ir.IntType(1), 0), [doubled], lambda: [constant(0.0)])[0]
        once = e.when(ir.Constant(ir.IntType(1), 1), [never], lambda: [e.add(never, constant(1.0))])[0]
        return [once]

    x, out = np.arange(LANES, dtype=np.float32), np.empty(LANES, np.float32)
    compiled(body)(x, out)
    np.testing.assert_array_equal(out, 8 * x + 1)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_codes(fmt, rng):
    """Codes come as 16-bit integers, of int4 the even elements before the odd."""
    codes = rng.integers(0, 256, CODE_BYTES).astype(np.uint8)
    out = np.empty(4 * LANES, np.int16)
    compiled(lambda e, source: load_codes(e, FORMAT_ID[fmt], source))(codes, out)
    want = codes if fmt == "int8" else np.concatenate([codes >> 4, codes & 15])
    np.testing.assert_array_equal(out[: len(want)], want)


def test_dot(rng):
    x = rng.integers(-(2**15) + 1, 2**15, 4 * LANES).astype(np.int16)
    words, out = vector(I16, 2 * LANES), np.empty(LANES, np.int32)
    compiled(
        lambda e, source: [
            e.dot(e.load(source, words), e.load(e.at(source, 4 * LANES), words), constant(-7, I32))
        ]
    )(x, out)
    products = x[: 2 * LANES].astype(np.int64) * x[2 * LANES :]
    np.testing.assert_array_equal(out, products.reshape(-1, 2).sum(axis=1) - 7)


@pytest.mark.skipif(not HAS_BFLOAT16_DOT, reason="this processor does not multiply bfloat16")
def test_dot_bfloat16(rng):
    x = bfloat16(rng.standard_normal(4 * LANES, dtype=np.float32))
    bits, out = (x.view(np.uint32) >> 16).astype(np.uint16), np.empty(LANES, np.float32)
    compiled(
        lambda e, source: [
            e.dot_bfloat16(*(e.load(e.at(source, n), vector(F32)) for n in (0, 4 * LANES)), constant(1.0))
        ]
    )(bits, out)
    products = x[: 2 * LANES].astype(np.float64) * x[2 * LANES :]
    np.testing.assert_allclose(out, products.reshape(-1, 2).sum(axis=1) + 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_interleave_rows(count, rng):
    x, out = rng.integers(0, 2**16, 2 * count).astype(np.uint16), np.zeros(2 * count + 1, np.uint16)

    @njit
    def run(x, out):
        interleave_rows(x, 0, 2 * count, count, out, 2)

    run(x, out)
    np.testing.assert_array_equal(out[1:].reshape(count, 2).T.reshape(-1), x)
    assert out[0] == 0


def test_broadcast_lanes():
    x = np.arange(LANES, dtype=np.float32)
    assert (mapped(lambda e, v: e.splat(e.builder.extract_element(v, I32(3))), x) == 3).all()


@pytest.mark.parametrize("group", [*range(1, 17), 24, 65, 70])
def test_warmup_meets_every_size(group):
    """The kernels that `warmup` runs are all that prompts of any length and single tokens need."""

    def sizes(counts):
        lengths = np.full(1, 600, np.int32)
        batches = [Batch.of(np.zeros((1, 1), np.int32), lengths, np.array([count]), 600) for count in counts]
        return {rows for b in batches for rows, _ in plan.plan_batch(b, 1, group, 8, -1, 2).pieces}

    assert sizes(range(1, 300)) == sizes(compilation.tile_counts(group))


@pytest.mark.parametrize("window_left", [-1, 100])
@pytest.mark.parametrize("group", [1, 4, 7, 12, 70])
@pytest.mark.parametrize("num_threads", [1, 2, 16])
def test_a_plan_covers_everything_once(window_left, group, num_threads):
    """Every new token, query head and key that it may see is in one piece; merges name every partial result."""
    seq_lens, new, num_kv_heads = np.array([5000, 3, 900, 40]), np.array([1, 3, 130, 0]), 2
    batch = Batch.of(np.zeros((4, 1), np.int32), seq_lens.astype(np.int32), new, 5000)
    made = plan.plan_batch(batch, num_kv_heads, group, 128, window_left, num_threads)
    seen = np.zeros((new.sum(), num_kv_heads * group, 5000), np.int8)
    partials = []
    for rows, pieces in made.pieces:
        for piece in pieces:
            tokens, heads = piece[plan.NUM_TOKENS], piece[plan.NUM_HEADS]
            assert tokens * heads <= rows
            assert piece[plan.FIRST_HEAD] // group == piece[plan.KV_HEAD]
            first = batch.query_start_loc[piece[plan.SEQUENCE]] + piece[plan.FIRST_TOKEN]
            last_head = piece[plan.FIRST_HEAD] + heads
            keys = slice(piece[plan.FIRST_KEY], piece[plan.END_KEY])
            seen[first : first + tokens, piece[plan.FIRST_HEAD] : last_head, keys] += 1
            partials += [piece[plan.PARTIAL]] * int(piece[plan.PARTIAL] >= 0)
    for s in range(4):
        for i in range(new[s]):
            token, position = batch.query_start_loc[s] + i, seq_lens[s] - new[s] + i
            first = 0 if window_left < 0 else max(0, position - window_left)
            assert (seen[token, :, first : position + 1] == 1).all()
            assert (seen[token] <= 1).all()
    merged = [
        p
        for m in made.merges
        for p in range(m[plan.FIRST_PARTIAL], m[plan.FIRST_PARTIAL] + m[plan.NUM_PARTIALS])
    ]
    assert sorted(partials) == sorted(merged) == list(range(made.num_partials))
