"""The vector layer and the plan: each on its own."""

import numpy as np
import pytest
from conftest import TESTED

if "cpu" not in TESTED:
    pytest.skip("another backend is chosen", allow_module_level=True)

from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic
from oracle import bfloat16

from kvnumba.backends.cpu import codecs, plan, shapes
from kvnumba.backends.cpu.codecs import CODECS, interleave_rows
from kvnumba.backends.cpu.simd import (
    F32,
    HAS_BFLOAT16_DOT,
    I16,
    I32,
    LANES,
    Emitter,
    constant,
    converts_half,
    vector,
)
from kvnumba.caches import warmup as compilation
from kvnumba.formats import FORMATS
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Buffers, Layout, Part


def compiled(body):
    """A function of a float32 array and a result array, whose vectors `body(e, x)` turns into others."""

    @intrinsic
    def apply(typing, x, out):
        def generate(context, builder, signature, args):
            e = Emitter(context, builder)
            source, target = (array.start for array in e.arguments(signature, args))
            for i, result in enumerate(body(e, source)):
                e.store(result, target + 4 * i * LANES)
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
        lambda e, source: [e.sums([e.load(source + 4 * i * LANES, vector(F32)) for i in range(LANES)])]
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
        doubled = e.loop(3, [first], lambda i, v: [e.add(v[0], v[0])])[0]
        never = e.when(ir.Constant(ir.IntType(1), 0), [doubled], lambda: [constant(0.0)])[0]
        once = e.when(ir.Constant(ir.IntType(1), 1), [never], lambda: [e.add(never, constant(1.0))])[0]
        return [once]

    x, out = np.arange(LANES, dtype=np.float32), np.empty(LANES, np.float32)
    compiled(body)(x, out)
    np.testing.assert_array_equal(out, 8 * x + 1)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_codes(fmt, rng):
    """Codes come as 16-bit integers, of int4 the even elements before the odd."""
    codec = CODECS[FORMATS[fmt].number]
    codes = rng.integers(0, 256, codec.chunk_bytes).astype(np.uint8)
    out = np.empty(4 * LANES, np.int16)
    compiled(lambda e, source: codec.load(e, source))(codes, out)
    want = codes if fmt == "int8" else np.concatenate([codes >> 4, codes & 15])
    np.testing.assert_array_equal(out[: len(want)], want)


def test_dot(rng):
    x = rng.integers(-(2**15) + 1, 2**15, 4 * LANES).astype(np.int16)
    words, out = vector(I16, 2 * LANES), np.empty(LANES, np.int32)
    compiled(
        lambda e, source: [e.dot(e.load(source, words), e.load(source + 4 * LANES, words), constant(-7, I32))]
    )(x, out)
    products = x[: 2 * LANES].astype(np.int64) * x[2 * LANES :]
    np.testing.assert_array_equal(out, products.reshape(-1, 2).sum(axis=1) - 7)


@pytest.mark.skipif(not HAS_BFLOAT16_DOT, reason="this processor does not multiply bfloat16")
def test_dot_bfloat16(rng):
    x = bfloat16(rng.standard_normal(4 * LANES, dtype=np.float32))
    bits, out = (x.view(np.uint32) >> 16).astype(np.uint16), np.empty(LANES, np.float32)
    compiled(
        lambda e, source: [
            e.dot_bfloat16(*(e.load(source + n, vector(F32)) for n in (0, 4 * LANES)), constant(1.0))
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


@pytest.mark.parametrize(
    ("convert", "given", "result", "instruction"),
    [
        (codecs.half_to_float, I16, F32, "fcvtl"),
        (codecs.float_to_half, F32, I16, "fcvtn"),
    ],
)
def test_arm_converts_float16_by_instructions(convert, given, result, instruction, monkeypatch):
    """The oldest 64-bit Arm, of which LLVM says that it has no float16."""
    triple = "aarch64-unknown-linux-gnu"
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(f"this llvmlite does not compile for Arm: {error}")
    monkeypatch.setattr(codecs, "HAS_HALF", converts_half(triple, {"neon": True, "fullfp16": False}))
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(vector(result), [vector(given)]), "convert")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(convert(Emitter(None, builder), function.args[0]))
    machine = target.create_target_machine(cpu="cortex-a53", features="-fullfp16")
    lines = machine.emit_assembly(binding.parse_assembly(str(module))).splitlines()
    operations = [line.split()[0] for line in lines if line.startswith("\t") and line[1] != "."]
    assert {operation.removesuffix("2") for operation in operations} - {"mov", "ret"} == {instruction}


def test_powers_of_two():
    """Split into a fraction and a whole number, the fraction put back as if its power were 1 + fraction."""
    x = np.concatenate(
        [np.linspace(-125.9, 100, 6 * LANES), [0.0, -3.0, 5.0, -0.0], np.full(LANES - 4, -1e30)]
    )
    x = x.astype(np.float32)

    def linear(e, v):
        fraction, whole = e.split(v)
        return e.scale(e.add(fraction, constant(1.0)), whole)

    have, exact = mapped(linear, x), x.astype(np.float64)
    floor = np.floor(exact)
    want = (1 + exact - floor) * 2.0**floor
    np.testing.assert_allclose(have[: 6 * LANES + 4], want[: 6 * LANES + 4], rtol=1e-6)
    assert (have[6 * LANES + 4 :] == 0).all()


def test_broadcast_lanes():
    x = np.arange(LANES, dtype=np.float32)
    assert (mapped(lambda e, v: e.splat(e.builder.extract_element(v, I32(3))), x) == 3).all()


def planned(batches, num_kv_heads, group, head_dim, window_left, num_threads):
    """The plan of several parts, each a batch and the tokens that it is for."""
    layout = Layout.of(1, batches[0][0].block_size, num_kv_heads, head_dim)
    parts = [Part(Buffers(layout, None, None), batch, tokens) for batch, tokens in batches]
    scoring = Scoring.of(num_kv_heads * group, head_dim, window_left=window_left)
    return plan.plan_parts(parts, num_kv_heads * group, scoring, num_threads)


@pytest.mark.parametrize("group", [*range(1, 17), 24, 65, 70])
def test_warmup_meets_every_size(group):
    """The kernels that `warmup` runs are all that prompts of any length and single tokens need."""

    def sizes(counts):
        lengths = np.full(1, 600, np.int32)
        batches = [Batch.of(np.zeros((1, 1), np.int32), lengths, np.array([count]), 600) for count in counts]
        return {
            shape
            for batch in batches
            for part in planned([(batch, None)], 1, group, 8, -1, 2).parts
            for shape, _ in part.pieces
        }

    assert sizes(range(1, 300)) == sizes(compilation.tile_counts(group))


@pytest.mark.parametrize("window_left", [-1, 100])
@pytest.mark.parametrize("group", [1, 4, 7, 12, 70])
@pytest.mark.parametrize("num_threads", [1, 2, 16])
@pytest.mark.parametrize("several", [False, True])
def test_a_plan_covers_everything_once(window_left, group, num_threads, several):
    """Every new token, query head and key that it may see is in one piece; merges name every partial result.

    With several parts the second is a prefix of 700 keys more, before all others, for some of the tokens.
    """
    seq_lens, new, num_kv_heads = np.array([5000, 3, 900, 40]), np.array([1, 3, 130, 0]), 2
    batch = Batch.of(np.zeros((4, 1), np.int32), seq_lens.astype(np.int32), new, 5000)
    start, batches = batch.query_start_loc, [(batch, None)]
    prefix = np.array([700], np.int32)
    tokens = np.array([0, *range(4, 134)], np.int32)
    if several:
        shared = Batch(batch.block_table[:1], prefix, np.array([0, len(tokens)], np.int32), 5000, prefix)
        batches.append((shared, tokens))
    made = planned(batches, num_kv_heads, group, 128, window_left, num_threads)
    seen = np.zeros((2, new.sum(), num_kv_heads * group, 5000), np.int8)
    rows_of_partials = {}
    for number, (part, (keys, order)) in enumerate(zip(made.parts, batches, strict=True)):
        order = np.arange(new.sum()) if order is None else order
        for shape, pieces in part.pieces:
            for values in pieces.tolist():
                piece = shapes.Piece(*values)
                assert piece.num_tokens * piece.num_heads <= piece.rows <= shape.rows
                assert piece.first_head // group == piece.kv_head
                first = piece.token - keys.query_start_loc[piece.sequence]
                assert piece.position == keys.positions[piece.sequence] + first
                heads = range(piece.first_head, piece.first_head + piece.num_heads)
                for i, token in enumerate(order[piece.token : piece.token + piece.num_tokens]):
                    seen[number, token, heads, piece.first_key : piece.end_key] += 1
                    for h, head in enumerate(heads):
                        if piece.partial >= 0:
                            row = piece.partial * made.partial_rows + i * piece.num_heads + h
                            rows_of_partials[row] = (token, head)
    for s in range(4):
        for i in range(new[s]):
            token, position = start[s] + i, seq_lens[s] - new[s] + i
            first = 0 if window_left < 0 else max(0, position - window_left)
            assert (seen[0, token, :, first : position + 1] == 1).all()
            if several and token in tokens:
                first = 0 if window_left < 0 else 700 - window_left + list(tokens).index(token)
                assert (seen[1, token, :, first:700] == 1).all()
    assert (seen <= 1).all()
    assert several or not made.counts_sinks
    merged = {}
    for token, head, heads, begin, end in made.merges.tolist():
        for row in made.sources[begin:end].tolist():
            for h in range(heads):
                assert row + h not in merged
                merged[row + h] = (token, head + h)
    assert merged == rows_of_partials
