"""Every micro-kernel of attention on its own, against formulas in NumPy: few rows of queries and many.

The expected values are written out here, from the definition of the storage formats on; of the library only the
numbers that say how a kernel's arrays lie are used.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import TESTED
from oracle import bfloat16

if "cpu" not in TESTED:
    pytest.skip("another backend is chosen", allow_module_level=True)

from numba import njit

from kvnumba.backends.cpu import plan, queries, scores, softmax, stage, tiles, values
from kvnumba.backends.cpu.codecs import ARITHMETICS, BFLOAT16, FLOAT32, FORMAT_ID, INT4, INT8
from kvnumba.backends.cpu.jit import static
from kvnumba.backends.cpu.simd import LANES

ROWS = (1, 3, 8, *tiles.MANY)
FEW_ROWS = [rows for rows in ROWS if rows <= tiles.FEW]
MANY_ROWS = [rows for rows in ROWS if rows > tiles.FEW]
TOKENS = (1, 7, 16, 17)
HEAD_DIMS = (2, 80, 128)
BEHIND = 16  # rows of NaN behind a run, and before it
FIRST = 3  # the run's first row
SM_SCALE = np.float32(0.3)

LEVELS = {INT8: 255, INT4: 15}
MIDDLE = {INT8: 128, INT4: 8}
LARGEST = 2**15 - 1  # of the 16-bit integers that queries and weights become where they meet codes

sizes = pytest.mark.parametrize(
    ("count", "head_dim"), [(count, head_dim) for count in TOKENS for head_dim in HEAD_DIMS]
)


# One function to call from Python for each kernel; the format is a number.


@njit
def load_queries(shape, piece, position, q, strides, head_dim, fmt, sinks, slopes, query, columns, positions):
    queries.load_queries(
        shape, piece, 0, position, q, strides, head_dim, SM_SCALE, fmt, sinks, slopes, query, columns, positions
    )  # fmt: skip


@njit
def score(
    shape, fmt, stored, count, query, head_dim, columns, positions, position, reach, seen_by_all, cap, out
):
    codes, scale, zero = stored
    scores.score_run(
        shape, fmt, codes, scale, zero, FIRST, count, 0, 8, query, head_dim, columns, positions, position,
        reach, seen_by_all, cap, out, 0,
    )  # fmt: skip


@njit
def settle(shape, columns):
    return softmax.settle(shape, columns)


@njit
def exponentiate(shape, count, out, columns, middle, scale, zero):
    softmax.exponentiate_run(shape, count, out, 0, columns, middle, scale, zero, FIRST)


@njit
def round_weights(shape, count, out, columns):
    softmax.round_run(shape, count, out, 0, columns)


@njit
def weigh(shape, fmt, codes, row, count, weights, sums, rows, head_dim):
    values.weigh_run(shape, fmt, codes, row, count, 0, 8, weights, 0, sums, rows, head_dim)


@njit
def add(sums, rows, middle, columns, total):
    queries.add_phase(sums, rows, middle, columns, total)


@njit
def stage_keys(stored, fmt, count, pairs, head_dim, tile, tile_words):
    codes, scale, zero = stored
    stage.stage_keys(codes, FIRST, count, fmt, scale, zero, pairs, head_dim, tile, tile_words)


@njit
def stage_values(stored, fmt, count, pairs, head_dim, tile, tile_words):
    codes, scale, zero = stored
    stage.stage_values(codes, FIRST, count, fmt, scale, zero, pairs, head_dim, tile, tile_words)


# What storage holds, by the formats' definitions.


def bits_of_bfloat16(x):
    return (bfloat16(x).view(np.uint32) >> 16).astype(np.uint16)


def stored_rows(fmt, count, head_dim, rng, groups=1):
    """Rows of storage, all but `count` of them NaN: (codes, scale, zero), the integers and the floats they stand for."""
    total = FIRST + count + BEHIND
    run = slice(FIRST, FIRST + count)
    no_scales = np.zeros((total, 0), np.float32)
    if fmt in LEVELS:
        integers = rng.integers(0, LEVELS[fmt] + 1, (total, head_dim))
        codes = integers if fmt == INT8 else integers[:, ::2] << 4 | integers[:, 1::2]
        scale, zero = (np.full((total, groups), np.nan, np.float32) for _ in range(2))
        scale[run] = rng.uniform(0.001, 0.02, (count, groups))
        zero[run] = rng.normal(size=(count, groups))
        each = head_dim // groups
        floats = integers * np.repeat(scale, each, axis=1) + np.repeat(zero, each, axis=1)
        return (with_room(codes.astype(np.uint8)), scale, zero), integers[run], floats[run].astype(np.float32)
    x = np.full((total, head_dim), np.nan, np.float32)
    x[run] = rng.normal(size=(count, head_dim))
    if fmt == FLOAT32:
        held, x = x, x
    elif fmt == BFLOAT16:
        held, x = bits_of_bfloat16(np.nan_to_num(x)), bfloat16(np.nan_to_num(x))
        held[:FIRST], held[FIRST + count :] = 0x7FC0, 0x7FC0
    else:
        held = x.astype(np.float16)
        x = held.astype(np.float32)
    return (with_room(held.view(np.uint8).reshape(total, -1)), no_scales, no_scales), None, x[run]


def with_room(codes):
    """The same bytes with memory behind them, as storage has it."""
    memory = np.zeros(codes.size + 16 * codes.shape[1] + 128, np.uint8)
    memory[: codes.size] = codes.reshape(-1)
    return memory[: codes.size].reshape(codes.shape)


def even_before_odd(x):
    """Rows (N, D) as int4 is read: in each chunk of 4 vectors the even elements before the odd."""
    size = 4 * LANES
    padded = np.zeros((len(x), -(-x.shape[1] // size) * size), x.dtype)
    padded[:, : x.shape[1]] = x
    return padded.reshape(len(x), -1, size // 2, 2).swapaxes(2, 3).reshape(len(x), -1)


class Columns:
    """The tables that kernels of a shape share, and the rows in use: tokens by heads."""

    def __init__(self, rows):
        self.rows = rows
        self.static = static(rows)
        self.shape = tiles.shape_of(rows)
        self.count = self.shape.columns
        self.width = max(self.count, LANES)
        self.table = np.zeros((tiles.COLUMN_FACTS, self.width), np.float32)
        self.positions = np.zeros(self.width, np.int32)
        self.table[tiles.PHASE_MAX] = tiles.LEAST
        self.table[tiles.ROW_MAX] = tiles.LEAST

    def spread(self, per_row):
        """What each row has, for the lanes of all columns."""
        padded = np.zeros(self.count, np.float32)
        padded[: self.rows] = per_row
        return np.tile(padded, self.width // self.count)

    def scores(self, tokens):
        """Memory for so many tokens' scores and what kernels may write behind them: (tokens, columns)."""
        lines = tokens + max(self.shape.tokens, 2) + 2 * LANES
        return np.full((lines, self.count), np.nan, np.float32)

    def sum_of(self, fact):
        return self.table[fact].reshape(-1, self.count).sum(axis=0)[: self.rows]


def laid_out(columns, fmt, q):
    """Queries (rows, D) as kernels take them for a format, with their steps and sums."""
    rows, head_dim = q.shape
    floats = queries.padded(head_dim)
    scaled = q * SM_SCALE
    if rows > tiles.FEW:
        query = np.zeros((floats, columns.count), np.float32)
        if fmt == BFLOAT16:
            pairs = bits_of_bfloat16(q).reshape(rows, head_dim // 2, 2).swapaxes(0, 1)
            query[: head_dim // 2] = np.ascontiguousarray(pairs).view(np.float32)[..., 0]
            return query, np.full(rows, SM_SCALE), np.zeros(rows)
        query[:head_dim] = scaled.T
        return query, np.zeros(rows), np.zeros(rows)
    query = np.zeros((columns.count, floats), np.float32)
    if fmt not in LEVELS:
        query[:rows, :head_dim] = scaled
        return query, np.zeros(rows), np.zeros(rows)
    step = np.abs(scaled).max(axis=1) / min(LARGEST, (2**31 - 1) // (LEVELS[fmt] * head_dim))
    integers = np.rint(scaled / step[:, None])
    words = even_before_odd(integers) if fmt == INT4 else integers
    query[:rows].view(np.int16)[:, : words.shape[1]] = words
    return query, step, step * integers.sum(axis=1)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows", ROWS)
def test_load_queries(rows, head_dim, rng):
    columns = Columns(rows)
    heads = 2 if rows % 2 == 0 else 1
    tokens = rows // heads
    q = rng.normal(size=(tokens, heads, head_dim)).astype(np.float32)
    piece = np.zeros(plan.PIECE_COLUMNS, np.int64)
    piece[plan.NUM_HEADS], piece[plan.NUM_TOKENS] = heads, tokens
    strides = np.array([tokens, q.size, heads * head_dim, head_dim])
    sinks, slopes = (rng.normal(size=heads).astype(np.float32) for _ in range(2))
    for fmt in FORMAT_ID.values() if rows <= tiles.FEW else ARITHMETICS:
        want, step, total = laid_out(columns, fmt, q.reshape(rows, head_dim))
        query = np.full(want.shape, np.nan, np.float32)
        load_queries(
            columns.static, piece, 40, q.reshape(-1), strides, head_dim, fmt, sinks, slopes, query,
            columns.table, columns.positions,
        )  # fmt: skip
        if fmt in LEVELS and rows <= tiles.FEW:  # ties may fall to either side
            words = np.abs(query.view(np.int16).astype(int) - want.view(np.int16))
            assert words.max() <= 1
            slack = step * head_dim
        else:
            np.testing.assert_array_equal(query.view(np.int32), want.view(np.int32))
            slack = np.full(rows, 1e-6)
        np.testing.assert_allclose(columns.table[tiles.QUERY_STEP, :rows], step, rtol=1e-6)
        assert (np.abs(columns.table[tiles.QUERY_SUM, :rows] - total) <= slack).all()
        np.testing.assert_array_equal(columns.positions[:rows], 40 + np.arange(rows) // heads)
        assert (columns.positions[rows : columns.count] < 0).all()
        np.testing.assert_array_equal(columns.table[tiles.SLOPE, :rows], np.tile(slopes, tokens))
        np.testing.assert_array_equal(columns.table[tiles.ROW_MAX, :rows], np.tile(sinks, tokens))
        np.testing.assert_array_equal(columns.sum_of(tiles.ROW_SUM), 1)
    if rows <= tiles.FEW:  # a query that is not finite shows in all its scores
        q[0, 0, 0] = np.inf
        load_queries(
            columns.static, piece, 40, q.reshape(-1), strides, head_dim, INT8, sinks, slopes, query,
            columns.table, columns.positions,
        )  # fmt: skip
        assert np.isnan(columns.table[tiles.QUERY_STEP, 0])


@sizes
@pytest.mark.parametrize("rows", ROWS)
def test_scores(rows, count, head_dim, rng):
    columns = Columns(rows)
    q = rng.normal(size=(rows, head_dim)).astype(np.float32)
    slopes = rng.uniform(0, 0.1, rows).astype(np.float32)
    position, own = 100, 95 + np.arange(rows) % 20  # of the first key, of the queries
    columns.positions[:] = -(1 << 30)
    for column in range(columns.width):
        if column % columns.count < rows:
            columns.positions[column] = own[column % columns.count]
    for fmt in FORMAT_ID.values() if rows <= tiles.FEW else ARITHMETICS:
        if fmt == BFLOAT16 and rows > tiles.FEW and head_dim % 2:
            continue
        stored, integers, keys = stored_rows(fmt, count, head_dim, rng)
        query, step, total = laid_out(columns, fmt, q)
        columns.table[tiles.QUERY_STEP] = columns.spread(step)
        columns.table[tiles.QUERY_SUM] = columns.spread(total)
        if fmt in LEVELS and rows <= tiles.FEW:
            words = np.rint(q * SM_SCALE / step[:, None].astype(np.float32)).astype(np.int64)
            dots = (integers @ words.T) * step
            want = dots * stored[1][FIRST : FIRST + count] + total * stored[2][FIRST : FIRST + count]
        elif fmt == BFLOAT16 and rows > tiles.FEW:
            want = keys.astype(np.float64) @ bfloat16(q).T * SM_SCALE
        else:
            want = keys.astype(np.float64) @ q.T * SM_SCALE
        for masked in (False, True):
            columns.table[tiles.PHASE_MAX] = tiles.LEAST
            columns.table[tiles.SLOPE] = columns.spread(slopes) if masked else 0
            out = columns.scores(count)
            cap, reach = (np.float32(2.0), 9) if masked else (np.float32(0), 1 << 30)
            key = (position if masked else 0) + np.arange(count)
            score(
                columns.static, fmt, stored, count, query, head_dim, columns.table, columns.positions, key[0],
                np.int32(reach), -1 if masked else 90, cap, out.reshape(-1),
            )  # fmt: skip
            expected = want
            if masked:
                distance = own - key[:, None]
                expected = 2 * np.tanh(want / 2) - slopes * distance
                expected = np.where((distance >= 0) & (distance <= 9), expected, -np.inf)
            np.testing.assert_allclose(out[:count, :rows], expected, rtol=2e-5, atol=4e-5)
            last = -(-count // columns.shape.tokens) * columns.shape.tokens
            assert (out[count:last, :rows] == -np.inf).all()
            top = columns.table[tiles.PHASE_MAX].reshape(-1, columns.count).max(axis=0)[:rows]
            np.testing.assert_array_equal(
                top, np.maximum(out[:count, :rows].max(axis=0), np.float32(tiles.LEAST))
            )


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("rows", ROWS)
def test_softmax(rows, count, rng):
    """A phase after another: the maximum moves for some rows; a row that sees nothing stays as it was."""
    columns = Columns(rows)
    lines = -(-count // columns.shape.line) * columns.shape.line
    out = columns.scores(count)
    out[:count] = 5 * rng.normal(size=(count, columns.count))
    out[count:lines] = -np.inf
    if rows > 1:
        out[:count, 1] = -np.inf
    before = rng.normal(size=rows).astype(np.float32)
    sums = rng.uniform(1, 2, rows).astype(np.float32)
    table = columns.table
    for lane in range(columns.width):
        if lane % columns.count < rows:
            table[tiles.ROW_MAX, lane] = before[lane % columns.count]
    table[tiles.ROW_SUM, :rows] = sums
    table[tiles.ZERO_SUM, :rows] = sums
    table[tiles.PHASE_MAX, :rows] = np.maximum(out[:count, :rows].max(axis=0), np.float32(tiles.LEAST))
    # the maximum of a row may stand in any of its lanes
    table[tiles.PHASE_MAX, columns.width - columns.count :][:rows] = table[tiles.PHASE_MAX, :rows]

    moved = settle(columns.static, table)
    top = np.maximum(before, out[:count, :rows].max(axis=0))
    assert moved == (top > before).any()
    np.testing.assert_array_equal(table[tiles.ROW_MAX, :rows], top)
    rescale = np.exp(before.astype(np.float64) - top)
    np.testing.assert_allclose(table[tiles.RESCALE, :rows], rescale, rtol=1e-6)
    np.testing.assert_allclose(columns.sum_of(tiles.ROW_SUM), sums * rescale, rtol=1e-6)
    assert (table[tiles.PHASE_MAX] == np.float32(tiles.LEAST)).all()

    weights = np.exp(out[:count, :rows].astype(np.float64) - top)
    nothing = np.zeros((FIRST + count + BEHIND, 0), np.float32)
    start = table.copy()
    plain = out.copy()
    exponentiate(columns.static, count, plain.reshape(-1), table, np.float32(-1), nothing, nothing)
    np.testing.assert_allclose(plain[:count, :rows], weights, rtol=5e-6, atol=1e-30)
    np.testing.assert_allclose(columns.sum_of(tiles.ROW_SUM), sums * rescale + weights.sum(axis=0), rtol=5e-6)
    if rows > tiles.FEW:
        return

    for fmt, middle in MIDDLE.items():  # scales and zero points go into the weights
        table[:] = start
        (_, scale, zero), _, _ = stored_rows(fmt, count, 2, rng)
        folded = out.copy()
        exponentiate(columns.static, count, folded.reshape(-1), table, np.float32(middle), scale, zero)
        run = slice(FIRST, FIRST + count)
        np.testing.assert_allclose(folded[:count, :rows], weights * scale[run], rtol=5e-6, atol=1e-30)
        offset = (weights * (scale[run] * middle + zero[run])).sum(axis=0)
        np.testing.assert_allclose(columns.sum_of(tiles.ZERO_SUM), sums * rescale + offset, rtol=1e-5)
        greatest = table[tiles.WEIGHT_TOP].reshape(-1, columns.count).max(axis=0)[:rows]
        np.testing.assert_array_equal(greatest, folded[:count, :rows].max(axis=0))


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("rows", ROWS)
def test_rounding(rows, count, rng):
    """Weights become 16 bits wide, two tokens side by side; what stands behind the run does not count."""
    columns = Columns(rows)
    lines = -(-count // columns.shape.line) * columns.shape.line
    out = columns.scores(count)
    weights = rng.uniform(0, 1, (count, rows)).astype(np.float32)
    weights[:, -1] *= 1e-33 if rows > 1 else 1  # nothing that can be told from 0
    out[:lines] = 0
    out[:count, :rows] = weights
    for lane in range(columns.width):
        if lane % columns.count < rows:
            columns.table[tiles.WEIGHT_TOP, lane] = weights[:, lane % columns.count].max()
    round_weights(columns.static, count, out.reshape(-1), columns.table)
    pairs = -(-count // 2)
    halves = out.view(np.int16).reshape(-1)[: pairs * columns.count * 2].reshape(pairs, columns.count, 2)
    have = halves.swapaxes(1, 2).reshape(2 * pairs, columns.count)[:, :rows]
    assert count == 2 * pairs or (have[count] == 0).all()
    if rows > tiles.FEW:
        exact = ARITHMETICS[-1] != BFLOAT16 or weights > 1e-37  # processors take subnormals for 0
        np.testing.assert_array_equal(have[:count].view(np.uint16) * exact, bits_of_bfloat16(weights) * exact)
        return
    top = weights.max(axis=0)
    want = np.where(top > 1e-30, np.floor(weights.astype(np.float64) * LARGEST / top + 0.5), 0)
    assert np.abs(have[:count] - want).max() <= 1  # ties may fall to either side
    np.testing.assert_array_equal(columns.sum_of(tiles.WEIGHT_SUM), have[:count].sum(axis=0))


@sizes
@pytest.mark.parametrize("rows", ROWS)
def test_weighing(rows, count, head_dim, rng):
    columns = Columns(rows)
    floats = queries.padded(head_dim)
    weights = rng.uniform(0, 1, (count, rows)).astype(np.float32)
    for fmt in FORMAT_ID.values() if rows <= tiles.FEW else ARITHMETICS:
        out = columns.scores(count)
        out[:count, :rows] = weights
        sums = np.zeros((columns.count, floats), np.float32)
        if rows > tiles.FEW and fmt == BFLOAT16:
            x = rng.normal(size=(count + count % 2, head_dim)).astype(np.float32)
            side_by_side = bits_of_bfloat16(x).reshape(-1, 2, head_dim).swapaxes(1, 2)
            codes = with_room(np.ascontiguousarray(side_by_side).view(np.uint8).reshape(len(x) // 2, -1))
            pairs = np.zeros((len(x), columns.count), np.uint16)
            pairs[:count, :rows] = bits_of_bfloat16(weights)
            words = out.view(np.uint16).reshape(-1)
            words[: pairs.size] = pairs.reshape(-1, 2, columns.count).swapaxes(1, 2).reshape(-1)
            weigh(columns.static, fmt, codes, 0, len(x) // 2, out.reshape(-1), sums, rows, head_dim)
            want = bfloat16(weights).T.astype(np.float64) @ bfloat16(x[:count])
            np.testing.assert_allclose(sums[:rows, :head_dim], want, rtol=1e-5, atol=1e-4)
            continue
        stored, integers, x = stored_rows(fmt, count, head_dim, rng)
        if fmt not in LEVELS:
            sums[:] = 1  # is added to
            weigh(columns.static, fmt, stored[0], FIRST, count, out.reshape(-1), sums, rows, head_dim)
            want = 1 + weights.T.astype(np.float64) @ x
            np.testing.assert_allclose(sums[:rows, :head_dim], want, rtol=1e-5, atol=1e-4)
            continue
        words = rng.integers(0, LARGEST + 1, (count, rows))
        pairs = np.zeros((count + count % 2, columns.count), np.int16)
        pairs[:count, :rows] = words
        memory = out.view(np.int16).reshape(-1)
        memory[: pairs.size] = pairs.reshape(-1, 2, columns.count).swapaxes(1, 2).reshape(-1)
        weigh(columns.static, fmt, stored[0], FIRST, count, out.reshape(-1), sums, rows, head_dim)
        want = words.T @ integers
        have = sums[:rows].view(np.int32)
        if fmt == INT4:
            in_chunks = even_before_odd(np.arange(head_dim)[None])[0]
            used = even_before_odd(np.ones((1, head_dim), int))[0] == 1
            placed = np.zeros((rows, head_dim), np.int64)
            placed[:, in_chunks[used]] = have[:, : len(used)][:, used]
            have = placed
        np.testing.assert_array_equal(have[:, :head_dim], want)

        # the integers go into the phases' sum as floats: each code counts from the middle one
        top = rng.uniform(0.5, 1, rows).astype(np.float32)
        columns.table[tiles.WEIGHT_TOP] = columns.spread(top)
        columns.table[tiles.WEIGHT_SUM] = 0
        columns.table[tiles.WEIGHT_SUM, :rows] = words.sum(axis=0)
        total = np.ones((columns.count, floats), np.float32)
        add(sums, rows, np.float32(MIDDLE[fmt]), columns.table, total)
        want = 1 + (words * top / LARGEST).T @ (integers - MIDDLE[fmt])
        if fmt == INT4:
            want = even_before_odd(want)
        used = want != 0
        np.testing.assert_allclose(total[:rows, : want.shape[1]][used], want[used], rtol=1e-5, atol=1e-3)
        assert (columns.table[tiles.WEIGHT_SUM] == 0).all()


@pytest.mark.parametrize("groups", [1, 2])
@sizes
def test_staging(count, head_dim, groups, rng):
    """Rows of any format become a tile of float32, or of bfloat16, of values two tokens side by side."""
    for fmt in FORMAT_ID.values():
        if fmt not in LEVELS and groups > 1:
            continue
        if fmt == INT4 and head_dim // groups % 2:
            continue
        stored, _, x = stored_rows(fmt, count, head_dim, rng, groups)
        for of_keys in (True, False):
            tile = np.full((count + 8) * head_dim, np.nan, np.float32)
            halves = tile.view(np.uint16)
            run = stage_keys if of_keys else stage_values
            run(stored, fmt, count, False, head_dim, tile, halves)
            np.testing.assert_allclose(tile[: x.size].reshape(x.shape), x, rtol=1e-6, atol=1e-7)
            exact = tile[: x.size].reshape(x.shape).copy()
            run(stored, fmt, count, True, head_dim, tile, halves)
            if of_keys:
                have = halves[: x.size].reshape(x.shape)
            else:
                pairs = -(-count // 2)
                have = halves[: 2 * pairs * head_dim].reshape(pairs, head_dim, 2)
                have = have.swapaxes(1, 2).reshape(2 * pairs, head_dim)[:count]
            np.testing.assert_array_equal(have, bits_of_bfloat16(exact))


@pytest.mark.skipif(LANES == 8 and "KVNUMBA_NARROW" in os.environ, reason="these are the narrow vectors")
def test_narrow_vectors(tmp_path):
    """The tests above for one shape of each kind, with vectors of eight lanes, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "(3 and not 16) or 16 or staging"],
        env={
            **os.environ,
            "KVNUMBA_NARROW": "1",
            "NUMBA_CPU_NAME": "haswell",
            "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+avx,+sse4.2",
            "NUMBA_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rows_are_those_that_kernels_are_compiled_for():
    assert FEW_ROWS
    assert MANY_ROWS
    assert math.log2(LANES).is_integer()
