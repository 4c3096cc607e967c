"""Tile instructions: their stand-in, and real ones where there are some, against formulas in NumPy; what uses them."""

import os
import platform
import re
import subprocess
import sys

import numpy as np
import oracle
import pytest
from conftest import TESTED

import kvnumba

if "cpu" not in TESTED:
    pytest.skip("another backend is chosen", allow_module_level=True)

from numba import njit, types
from numba.extending import intrinsic
from oracle import bfloat16

from kvnumba.attention import cascade
from kvnumba.backends import cpu
from kvnumba.backends.cpu import few_tiles, many_tiles, tiles
from kvnumba.backends.cpu.simd import Emitter
from kvnumba.backends.cpu.tiles import AMX, STAND_IN, Tiles
from kvnumba.backends.registry import get_backend
from kvnumba.formats import FORMATS
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Layout, Part, RowLayout

INSTRUCTIONS = [
    STAND_IN,
    pytest.param(AMX, marks=pytest.mark.skipif(not tiles.instructions(), reason="no tiles")),
]
KINDS = {
    "busd": (np.uint8, np.int8),
    "buud": (np.uint8,) * 2,
    "bssd": (np.int8,) * 2,
    "bsud": (np.int8, np.uint8),
}


def product(instructions, kind):
    """A function of memory (3, 16, 64) uint8 that computes tile 0 += tile 1 * tile 2."""

    @intrinsic
    def multiply(typing, memory):
        def generate(context, builder, signature, args):
            e = Emitter(context, builder)
            (memory,) = e.arguments(signature, args)
            tile = Tiles(e, instructions)
            tile.configure()
            for n in range(3):
                tile.load(n, memory.start + n * tiles.TILE, 64)
            if kind == "bfloat16":
                tile.dot_bfloat16(0, 1, 2)
            else:
                tile.dot_bytes(kind, 0, 1, 2)
            tile.store(0, memory.start, 64)
            tile.release()
            return context.get_dummy_value()

        return types.void(memory), generate

    @njit
    def run(memory):
        multiply(memory)

    return run


def floats(memory):
    """bfloat16 bits as they lie, as float32."""
    return (memory.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_bytes(instructions, kind, rng):
    memory = rng.integers(0, 256, (3, 16, 64), np.uint8)
    start = memory[0].view(np.int32).astype(np.int64)
    x = memory[1].view(KINDS[kind][0]).reshape(16, 64).astype(np.int64)
    y = memory[2].view(KINDS[kind][1]).reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16).astype(np.int64)
    want = (start + x @ y).astype(np.int32)  # 32 bits, that wrap around
    product(instructions, kind)(memory)
    np.testing.assert_array_equal(memory[0].view(np.int32), want)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_products_of_bfloat16(instructions, rng):
    """Bit for bit: the first and second numbers of pairs are summed apart, in float32."""
    x, y = (bfloat16(rng.normal(size=(16, 32))) for _ in range(2))
    start = rng.normal(size=(16, 16)).astype(np.float32)
    memory = np.empty((3, 16, 64), np.uint8)
    memory[0].view(np.float32)[:] = start
    for n, bits in ((1, x), (2, y)):
        memory[n].view(np.uint16)[:] = bits.view(np.uint32) >> 16
    first, second = np.zeros((16, 16), np.float32), np.zeros((16, 16), np.float32)
    for k in range(16):
        pairs = y[k].reshape(16, 2)
        first += x[:, 2 * k, None] * pairs[:, 0]
        second += x[:, 2 * k + 1, None] * pairs[:, 1]
    product(instructions, "bfloat16")(memory)
    np.testing.assert_array_equal(memory[0].view(np.float32), start + (first + second))


CASES = [  # formats, widths, block size, query heads of a KV head, new tokens, options
    ("int8", "int8", 128, 128, 128, 4, 1, {}),
    ("int8", "int8", 64, 192, 1, 3, 1, {"window_left": 50}),
    ("int8", "int4", 192, 128, 16, 4, 5, {"logits_soft_cap": 4.0}),
    ("int4", "int8", 128, 64, 16, 1, 7, {"window_left": 20, "logits_soft_cap": 4.0}),
    ("int4", "int4", 256, 256, 128, 2, 9, {"alibi_slopes": True, "sinks": True}),
    ("int4", "int4", 128, 128, 48, 4, 1, {"sinks": True, "scale_dtype": "float16"}),
]


@pytest.fixture
def tiled(monkeypatch):
    """The stand-in is what there is; lists the files of the kernels that attend."""
    monkeypatch.setattr(tiles, "instructions", lambda: STAND_IN)
    used, launch = [], cpu.launch

    def launched(function, static, *rest):
        used.append(getattr(static, "kernels", ""))
        launch(function, static, *rest)

    monkeypatch.setattr(cpu, "launch", launched)
    return used


def stale_cache(lengths, new, block, head_dim, keys, values, value_dim, scale_dtype):
    """Room for `new` tokens after each of some lengths, of two heads; what is never written is NaN."""
    cache = kvnumba.PagedKVCache(
        sum(-(-(length + new) // block) for length in lengths), block, 2, head_dim, len(lengths), key_format=keys,
        value_format=values, value_head_dim=value_dim, scale_dtype=scale_dtype, backend="cpu",
    )  # fmt: skip
    for pool, fmt in ((cache.k_pool, keys), (cache.v_pool, values)):
        pool[:] = {"float32": np.nan, "float16": np.nan, "bfloat16": 0xFFFF}.get(fmt, 255)
    for part in (cache.k_scale, cache.k_zp, cache.v_scale, cache.v_zp):
        part[:] = np.nan
    return cache


def grow(cache, normal, ids, new):
    """A step of new tokens, written."""
    step = cache.step(ids, new)
    shape = sum(new), cache.num_kv_heads
    step.write(normal(*shape, cache.head_dim), normal(*shape, cache.value_head_dim))
    return step


def check(cache, step, ids, new, q, **options):
    out, lse = step.attend(q, return_lse=True, **options)
    ends = np.cumsum(new)
    for seq_id, begin, end in zip(ids, ends - new, ends, strict=True):
        actual = out[begin:end], lse[begin:end]
        kept = cache.get_kv(seq_id)
        oracle.assert_as_exact(actual, q[begin:end], *kept, rounded=oracle.sixteen_bits, **options)


@pytest.mark.parametrize(
    ("keys", "values", "head_dim", "value_dim", "block", "group", "new", "options"), CASES
)
def test_few_tiles(keys, values, head_dim, value_dim, block, group, new, options, tiled, normal):
    """Sequences of several lengths, in blocks out of order, whose rest is NaN."""
    options = {name: normal(2 * group) if value is True else value for name, value in options.items()}
    scale_dtype = options.pop("scale_dtype", "float32")
    lengths = [300, 64, 17]
    cache = stale_cache(lengths, new, block, head_dim, keys, values, value_dim, scale_dtype)
    ids = [cache.add_sequence() for _ in lengths]
    for part in range(4):
        counts = [length * (part + 1) // 4 - length * part // 4 for length in lengths]
        grow(cache, normal, ids, counts)
    step = grow(cache, normal, ids, [new] * len(ids))
    check(cache, step, ids, [new] * len(ids), normal(new * len(ids), 2 * group, head_dim), **options)
    assert few_tiles.__name__ in tiled


MANY = [  # formats, arithmetic, widths, block size, query heads of a KV head, new tokens, options
    ("float32", None, 64, 64, 16, 4, 100, {}),
    pytest.param("float32", "bfloat16x3", 80, 48, 1, 2, 30, {"window_left": 30}, marks=pytest.mark.slow),
    ("float16", None, 32, 128, 128, 7, 60, {"logits_soft_cap": 5.0, "alibi_slopes": True}),
    pytest.param("bfloat16", "bfloat16", 256, 16, 48, 3, 40, {"sinks": True}, marks=pytest.mark.slow),
    ("int8", None, 80, 80, 16, 4, 13, {"window_left": 100}),
    ("int4", "bfloat16", 128, 112, 7, 64, 5, {"sinks": True, "scale_dtype": "float16"}),
]


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("fmt", "arithmetic", "head_dim", "value_dim", "block", "group", "new", "options"), MANY
)
def test_many_tiles(
    fmt, arithmetic, head_dim, value_dim, block, group, new, options, instructions, tiled, monkeypatch, normal
):
    """Sequences of several lengths, more than a phase and less, in blocks out of order, whose rest is NaN."""
    monkeypatch.setattr(tiles, "instructions", lambda: instructions)
    options = {name: normal(2 * group) if value is True else value for name, value in options.items()}
    scale_dtype = options.pop("scale_dtype", "float32")
    lengths = [330, 64, 3]
    cache = stale_cache(lengths, new, block, head_dim, fmt, fmt, value_dim, scale_dtype)
    ids = [cache.add_sequence() for _ in lengths]
    for part in range(3):
        grow(cache, normal, ids, [length * (part + 1) // 3 - length * part // 3 for length in lengths])
    step = grow(cache, normal, ids, [new] * len(ids))
    q = normal(new * len(ids), 2 * group, head_dim)
    if arithmetic == "bfloat16":
        q = oracle.bfloat16(q)
    out, lse = step.attend(q, return_lse=True, arithmetic=arithmetic, **options)
    assert many_tiles.__name__ in tiled
    for n, seq_id in enumerate(ids):
        mine = slice(n * new, (n + 1) * new)
        k, v = cache.get_kv(seq_id)
        if arithmetic == "bfloat16":
            want, want_lse = oracle.attention(q[mine], oracle.bfloat16(k), oracle.bfloat16(v), **options)
            assert np.abs(out[mine] - want).max() <= 2 * 2.0**-9 * np.abs(v).max()
            assert np.abs(lse[mine] - want_lse).max() <= 2e-5
        else:
            rounded = None if arithmetic is None and fmt != "int8" else oracle.sixteen_bits
            oracle.assert_as_exact((out[mine], lse[mine]), q[mine], k, v, rounded=rounded, **options)


@pytest.mark.parametrize("arithmetic", [None, "bfloat16"])
def test_maxima_that_rise(arithmetic, tiled, normal):
    """Far beyond the room that weights have, in each phase and within it; and scores too large to tell apart."""
    cache = kvnumba.KVCache(1, 900, 1, 16, backend="cpu")
    k = np.zeros((1, 1, 900, 16), np.float32)
    k[..., 0] = np.arange(900) // 4 * 4  # exact in bfloat16
    v = oracle.bfloat16(normal(1, 1, 900, 16))
    cache.update(k, v)
    for size in (1.0, -1.0, 2.0**30):
        q = np.full((1, 1, 80, 16), size, np.float32)
        out, lse = cache.attend(q, return_lse=True, sm_scale=1.0, arithmetic=arithmetic)
        if abs(size) == 1:
            want, want_lse = oracle.attention(q[0].swapaxes(0, 1), k[0], v[0], sm_scale=1.0)
            np.testing.assert_allclose(out[0].swapaxes(0, 1), want, atol=0.02 if arithmetic else 1e-5)
            np.testing.assert_allclose(lse[0].swapaxes(0, 1), want_lse, rtol=1e-6, atol=1e-5)
    assert many_tiles.__name__ in tiled


@pytest.mark.parametrize("arithmetic", [None, "bfloat16"])
def test_sinks_that_stand_for_none(arithmetic, tiled, normal):
    """As in a model some of whose heads have no sink."""
    cache = kvnumba.KVCache(1, 100, 1, 64, backend="cpu")
    k, v, q = (oracle.bfloat16(normal(1, n, size, 64)) for n, size in ((1, 100), (1, 100), (64, 4)))
    cache.update(k, v)
    want = cache.attend(q, return_lse=True, arithmetic=arithmetic)
    for power in (9, 12, 30):
        sinks = -(10.0**power) * np.linspace(1, 2, 64, dtype=np.float32)
        sinks[::16] = np.finfo(np.float32).min
        have = cache.attend(q, return_lse=True, arithmetic=arithmetic, sinks=sinks)
        for x, y in zip(have, want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-2 if arithmetic else 1e-5)
    assert many_tiles.__name__ in tiled


def test_few_tiles_of_a_prefix(tiled, monkeypatch, normal):
    monkeypatch.setattr(cascade, "worthwhile", lambda *args: True)
    cache = kvnumba.PagedKVCache(40, 16, 2, 128, 3, "int8", backend="cpu")
    first = cache.add_sequence()
    grow(cache, normal, [first], [200])
    ids = [first, cache.fork(first), cache.fork(first)]
    grow(cache, normal, ids, [3, 0, 21])
    step = grow(cache, normal, ids, [1, 1, 1])
    check(cache, step, ids, [1, 1, 1], normal(3, 8, 128), sinks=normal(8))
    assert tiled.count(few_tiles.__name__) == 2  # 12 rows of the prefix, and 4 of each sequence


def test_a_query_that_is_not_finite(tiled, normal):
    """It shows in its own results only."""
    cache = kvnumba.PagedKVCache(8, 16, 2, 128, 1, "int4", backend="cpu")
    seq_id = cache.add_sequence()
    step = grow(cache, normal, [seq_id], [100])
    q = normal(100, 8, 128)[-1:]
    step = grow(cache, normal, [seq_id], [1])
    want = step.attend(q).copy()
    q[0, 2, 5] = np.inf
    have = step.attend(q)
    assert np.isnan(have[0, 2]).all()
    others = np.arange(8) != 2
    np.testing.assert_array_equal(have[0, others], want[0, others])


@pytest.mark.parametrize(("new", "kernels"), [(1, few_tiles), (13, many_tiles)])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("options", [{}, {"window_left": 400, "alibi_slopes": np.arange(8) / 64}], ids=str)
def test_blocks_that_are_not_there(new, kernels, block_size, options, tiled, normal):
    """Every second one; phases have tokens from all over the sequence."""
    backend, blocks = get_backend("cpu"), 800 // block_size
    buffers = backend.allocate(Layout.of(blocks, block_size, 2, 64, "int8"))
    table, length = np.arange(blocks, dtype=np.int32)[None], np.array([790], np.int32)
    backend.write(
        buffers, 0, normal(1, 790, 2, 64), normal(1, 790, 2, 64), Batch.of(table, length, [790], block_size)
    )
    k, v = (x[0] for x in backend.read(buffers, 0, table, 790))
    there = np.arange(blocks) % 2 == 1
    batch = Batch.of(np.where(there, table, np.int32(-1)), length, [new], block_size)
    q, scoring = normal(new, 8, 64), Scoring.of(8, 64, **options)
    out, lse = np.empty_like(q), np.empty((new, 8), np.float32)
    plan = backend.plan([Part(buffers, batch)], 8, scoring)
    backend.attend(0, q[None], plan, scoring, out[None], lse[None])
    assert kernels.__name__ in tiled
    present = np.repeat(there, block_size)[:790]
    oracle.assert_as_exact((out, lse), q, k, v, rounded=oracle.sixteen_bits, present=present, **options)


@pytest.mark.parametrize(
    ("keys", "values", "takes"),
    [
        (("int8", 64, None), ("int4", 256, None), True),
        (("int8", 80, None), ("int8", 64, None), False),
        (("int4", 64, None), ("int8", 64, None), False),
        (("int8", 64, None), ("int4", 192, None), False),
        (("int8", 320, None), ("int8", 64, None), False),
        (("int8", 128, 64), ("int8", 128, None), False),
        (("fp8_e4m3", 128, None), ("int8", 128, None), False),
    ],
)
def test_what_few_tiles_take(keys, values, takes):
    rows = (RowLayout.of("head_dim", FORMATS[fmt], *rest, "float32") for fmt, *rest in (keys, values))
    assert few_tiles.fits(*rows) == takes


COMPILE_MANY = """
import numpy as np
from numba import njit, typeof
from kvnumba.backends.cpu import many_tiles, shapes

floats, halves = np.zeros(1, np.float32), np.zeros(1, np.uint16)
table, positions = np.zeros((1, 1), np.float32), np.zeros(1, np.int32)
masks = shapes.Masks(np.int32(1), 0, np.float32(0), 0, 0, 0, 0, 0)
scratch = many_tiles.TileScratch(
    table, positions, positions, halves, halves, halves, halves, floats, floats, floats, halves, positions
)

@njit(error_model="numpy")
def weigh(shape, masks, scratch):
    return many_tiles.weigh(shape, 1, 0, 1, 0, 1, 64, masks, scratch)

@njit(error_model="numpy")
def add(shape, masks, scratch):
    many_tiles.add_values(shape, 1, 0, 1, 64, scratch)

shape = many_tiles.shape(64, "float32", {parts}, "amx")
for function in (weigh, add):
    kinds = tuple(typeof(x) for x in (shape, masks, scratch))
    function.compile(kinds)
    print(function.inspect_asm(kinds).split("_ZN7cpython")[0])
    print("END")
"""

COMPILE = """
import numpy as np
from numba import njit, typeof
from kvnumba.backends.cpu import few_tiles, shapes
from kvnumba.backends.cpu.storage import Rows

floats, halves = np.zeros(1, np.float32), np.zeros(1, np.uint16)
table, codes = np.zeros((1, 1), np.float32), np.zeros((1, 64), np.uint8)
reading = shapes.Reading(True, True, 4, 4, np.float32(128))
rows, run = Rows(codes, table, table, 4, 64), shapes.Run(0, 1, 0, 0)
masks = shapes.Masks(np.int32(1), 0, np.float32(0), 0, 0, 0, 0, 0)
scratch = shapes.Scratch(table, np.zeros(1, np.int32), floats, table, table, floats, floats, halves, codes,
    np.zeros(1, np.int32))

@njit(error_model="numpy")
def score(shape, reading, rows, run, masks, scratch):
    few_tiles.score_run(shape, reading, rows, run, 0, masks, scratch)

@njit(error_model="numpy")
def stage(shape, reading, rows, run, masks, scratch):
    few_tiles.weigh_run(shape, reading, rows, run, 0, 1, scratch)

@njit(error_model="numpy")
def weigh(shape, reading, rows, run, masks, scratch):
    few_tiles.weigh_phase(shape, 2, 1, np.float32(1), scratch)

shape = few_tiles.shape({rows}, "float32", "amx")
for function in (score, stage, weigh):
    kinds = tuple(typeof(x) for x in (shape, reading, rows, run, masks, scratch))
    function.compile(kinds)
    print(function.inspect_asm(kinds).split("_ZN7cpython")[0])
    print("END")
"""


def compiled(script, tmp_path):
    """The assembly that a script prints, functions apart, of a processor with tiles."""
    features = "amx-tile amx-int8 amx-bf16 avx512f avx512bw avx512vl avx512dq avx512vnni avx512bf16"
    features += " avx2 fma f16c avx sse4.2"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "NUMBA_CPU_NAME": "sapphirerapids",
            "NUMBA_CPU_FEATURES": ",".join("+" + name for name in features.split()),
            "NUMBA_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("END\n")[:-1]


x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="another kind of processor")


@x86
@pytest.mark.parametrize("rows", [4, 20])
def test_few_tiles_compile(rows, tmp_path):
    """To real instructions: no calls beside them, and what is inside of loops stays in registers."""
    score, stage, weigh = compiled(COMPILE.replace("{rows}", str(rows)), tmp_path)
    assert "vpunpcklbw" in stage
    for code in (score, weigh):
        assert "tileloadd" in code
        within = code[code.index("tilezero") : code.rindex("tilestored")]
        assert "tdpbusd" in within
        assert "call" not in within
    for block in re.split(r"^\.L\w+:", score + stage + weigh, flags=re.MULTILINE):
        if re.search("tdpbusd|vpunpcklbw|vcvttps2dq|vcvtdq2ps", block):
            assert not re.search(r"vmov\w+\s+%[xyz]mm\d+, \d*\(%rsp\)", block), block


@x86
@pytest.mark.parametrize("parts", [1, 3])
def test_many_tiles_compile(parts, tmp_path):
    """To real instructions, with no calls beside them."""
    for code in compiled(COMPILE_MANY.replace("{parts}", str(parts)), tmp_path):
        within = code[code.index("tileloadd") : code.rindex("tilestored")]
        assert "tdpbf16ps" in within
        assert "call" not in within


def test_why_there_are_no_tiles():
    assert (tiles.instructions() is None) == bool(tiles.unavailable_reason())
