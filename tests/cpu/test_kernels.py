"""Every micro-kernel of attention on its own, against formulas in NumPy: few rows of queries and many.

The expected values are written out here, from the definition of the storage formats on; of the library only the
numbers that say how a kernel's arrays lie are used.
"""

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

from kvnumba.backends.cpu import attend, codecs, few, few_tiles, many, phases, shapes, softmax, transforms
from kvnumba.backends.cpu.codecs import ARITHMETICS, BFLOAT16, FLOAT32
from kvnumba.backends.cpu.simd import LANES
from kvnumba.backends.cpu.storage import Rows, aligned_zeros
from kvnumba.backends.cpu.tiles import STAND_IN
from kvnumba.formats import FORMATS

FP8, INT8, INT4 = (FORMATS[name].number for name in ("fp8_e4m3", "int8", "int4"))
ALL = range(len(FORMATS))

GROUPS = tuple(sorted({min(rows, many.GROUP) for rows in many.ROWS}))
ROWS = (1, 3, few.MOST_ROWS, *GROUPS)  # kernels for many rows take a group at a time
TILE_ROWS = (1, 3, 8, 20)
TOKENS = (1, 7, 16, 17)
HEAD_DIMS = (2, 80, 128)
BEHIND = 16  # rows of NaN behind a run, and before it
FIRST = 3  # the run's first row
NO_TRANSFORM = transforms.Transform(np.empty((0, 1), np.float32), 1, 1)
SM_SCALE = np.float32(0.3)

LEVELS = {INT8: 255, INT4: 15}
MIDDLE = {INT8: 128, INT4: 8}
LARGEST = 2**15 - 1  # of the 16-bit integers that queries and weights become where they meet codes

sizes = pytest.mark.parametrize(
    ("count", "head_dim"), [(count, head_dim) for count in TOKENS for head_dim in HEAD_DIMS]
)


# One function to call from Python for each kernel; the format is a number.


@njit
def load_queries(shape, piece, work, q, head_dim, keys, transform, scoring, scratch):
    reading = shape.choose(keys, keys, scoring)
    attend.load_queries(shape, reading, piece, work, q, head_dim, transform, scoring, scratch)


@njit
def score_few(shape, rows, run, masks, scratch):
    codes, scale, zero, fmt, head_dim, _ = rows
    few.score(shape, fmt, codes, codes.shape[1], scale, zero, run, 0, 8, head_dim, masks, scratch)


@njit
def score_many(shape, rows, run, masks, scratch):
    codes, _, _, fmt, head_dim, _ = rows
    many.score(shape, fmt, codes, codes.shape[1], run.row, run, codes, 0, head_dim, masks, scratch)


@njit
def settle(shape, scratch):
    return softmax.settle(shape, scratch)


@njit
def exponentiate(shape, run, reading, values, masks, scratch):
    softmax.exponentiate_run(shape, run, reading, values, masks, scratch)


@njit
def round_weights(shape, run, scratch):
    shape.round_weights(shape, run, scratch)


@njit
def weigh_few(shape, fmt, codes, row, count, rows, head_dim, scratch):
    few.weigh(shape, fmt, codes, codes.shape[1], row, count, 0, 8, 0, rows, head_dim, scratch)


@njit
def weigh_many(shape, fmt, codes, row, count, rows, head_dim, scratch):
    many.weigh(shape, fmt, codes, codes.shape[1], row, count, codes, 0, 0, rows, head_dim, scratch)


@njit
def add_phase(shape, reading, last, rows, scratch):
    shape.add_phase(shape, reading, last, rows, scratch)


@njit
def tile_query(shape, reading, q, r, scoring, scratch):
    return few_tiles.load_query(shape, reading, q[r], 0, r, q.shape[1], scoring.sm_scale, scratch.query)


@njit
def tile_scores(shape, reading, keys, run, masks, scratch):
    few_tiles.score_run(shape, reading, keys, run, 0, masks, scratch)


@njit
def tile_sums(shape, reading, values, runs, rows, scratch, out):
    """The weighted values of runs, in the elements' own order."""
    for run in runs:
        few_tiles.weigh_run(shape, reading, values, run, 0, rows, scratch)
    few_tiles.add_phase(shape, reading, runs[-1], rows, scratch)
    for r in range(rows):
        few_tiles.store_row(
            shape, reading, r, np.float32(0), np.float32(1), scratch.total, out[r], out.shape[1]
        )


@njit
def stage(rows, run, tile):
    codecs.decode_rows(rows, run.row, run.num_tokens, tile, 0)


@njit
def stage_pairs(rows, run, tile):
    many.stage_pairs(rows, run, tile, 0)


@njit
def cut_scratch(shape, head_dim, value_dim, floats, positions):
    return phases.cut_scratch(shape, head_dim, value_dim, floats, positions)


@njit
def transform_row(x, start, transform, kind, head, count, out, to):
    transforms.transform_row(x, start, transform, kind, head, count, out, to)


@njit
def product_with_shift(x, start, transform, head, count):
    return transforms.product_with_shift(x, start, transform, head, count)


# What storage holds, by the formats' definitions.


def bits_of_bfloat16(x):
    return (bfloat16(x).view(np.uint32) >> 16).astype(np.uint16)


def e4m3(bits):
    """The numbers of fp8_e4m3 but for NaN: a sign, four bits of exponent and three of mantissa."""
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(bits >> 7, -size, size)


def stored_rows(fmt, count, head_dim, rng, groups=1):
    """Rows of storage, all but `count` of them NaN; their codes, and the floats that they stand for."""
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
        rows = Rows(with_room(codes.astype(np.uint8)), scale, zero, fmt, head_dim)
        return rows, integers[run], floats[run].astype(np.float32)
    if fmt == FP8:
        held = rng.integers(0, 256, (total, head_dim))
        held[held % 128 == 127] = 0
        held[:FIRST], held[FIRST + count :] = 0x7F, 0xFF
        rows = Rows(with_room(held.astype(np.uint8)), no_scales, no_scales, fmt, head_dim)
        return rows, None, e4m3(held[run]).astype(np.float32)
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
    rows = Rows(with_room(held.view(np.uint8).reshape(total, -1)), no_scales, no_scales, fmt, head_dim)
    return rows, None, x[run]


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
    """The memory that kernels of a shape share."""

    def __init__(self, rows, head_dim=2, tokens=1, tiles=False):
        self.rows = rows
        if tiles:
            columns = next(size for size in few_tiles.ROWS if rows <= size)
            self.shape = few_tiles.shape(columns, "float32", STAND_IN)
        else:
            self.shape = (few if rows <= few.MOST_ROWS else many).shape(rows, "float32")
        self.count, self.width = self.shape.columns, self.shape.width
        self.table = np.zeros((shapes.STATE_ROWS, self.width), np.float32)
        self.positions = np.zeros(self.width, np.int32)
        self.table[shapes.PHASE_MAX] = shapes.LEAST
        self.table[shapes.ROW_MAX] = shapes.LEAST
        floats = shapes.padded.py_func(head_dim)
        self.query = np.full(self.count * floats, np.nan, np.float32)
        self.total, self.sums = (np.zeros((self.count, floats), np.float32) for _ in range(2))
        lines = tokens + max(self.shape.tokens, 2) + 2 * LANES  # kernels write behind the run
        self.scores = np.full((lines, self.count), np.nan, np.float32)
        self.run = shapes.Run(FIRST, tokens, 0, 0)
        self.tile = np.zeros(1, np.float32)
        if tiles:
            size = (self.shape.phase + self.shape.tokens) * head_dim
            self.tile = np.full(size, np.nan, np.float32)

    @property
    def scratch(self):
        tile = self.tile
        return shapes.Scratch(
            self.table, self.positions, self.query.reshape(-1), self.total, self.sums, self.scores.reshape(-1),
            tile, tile.view(np.uint16), tile.view(np.uint8).reshape(1, -1), np.zeros(1, np.int32),
        )  # fmt: skip

    def spread(self, per_row):
        """What each row has, for the lanes of all columns."""
        padded = np.zeros(self.count, np.float32)
        padded[: self.rows] = per_row
        return np.tile(padded, self.width // self.count)

    def sum_of(self, name):
        return self.table[name].reshape(-1, self.count).sum(axis=0)[: self.rows]


def scoring_of(sinks, slopes, bfloat16=False):
    """Options with neither a window nor a cap, nor functions of users."""
    return shapes.Score(SM_SCALE, -1, np.float32(0), sinks, slopes, False, bfloat16, 0, 0)


def masks_of(reach, seen_by_all, cap=0, kept=0):
    """No function of users, and positions that are those of the keys."""
    return shapes.Masks(np.int32(reach), seen_by_all, np.float32(cap), 0, 0, 0, 0, kept)


def reading_of(fmt, bias=-1):
    return shapes.Reading(True, True, fmt, fmt, np.float32(bias))


def laid_out(columns, fmt, q):
    """Queries (rows, D) as kernels take them for a format, with their steps and sums."""
    rows, head_dim = q.shape
    floats = shapes.padded.py_func(head_dim)
    scaled = q * SM_SCALE
    if rows > few.MOST_ROWS:
        group = columns.shape.group
        query = np.zeros((columns.count // group, floats, group), np.float32)
        if fmt == BFLOAT16:
            pairs = bits_of_bfloat16(q).view(np.float32).reshape(-1, group, head_dim // 2)
            query[:, : head_dim // 2] = pairs.swapaxes(1, 2)
            return query, np.full(rows, SM_SCALE), np.zeros(rows)
        query[:, :head_dim] = scaled.reshape(-1, group, head_dim).swapaxes(1, 2)
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
@pytest.mark.parametrize("rows", sorted({*ROWS, *many.ROWS}))
def test_load_queries(rows, head_dim, rng):
    columns = Columns(rows, head_dim)
    heads = 2 if rows % 2 == 0 else 1
    tokens = rows // heads
    q = rng.normal(size=(1, tokens, heads, head_dim)).astype(np.float32)
    # of the packed tokens, in the other direction in memory
    packed = np.ascontiguousarray(q[:, ::-1].swapaxes(1, 2)).swapaxes(1, 2)
    order = np.arange(tokens, dtype=np.int32)[::-1].copy()
    table = np.zeros((1, 1), np.int64)
    none = np.empty(0, np.int32)
    scores = columns.total[:0]  # none are kept
    tables = table, order, table.astype(np.int32), none, none
    work = attend.Work(np.zeros(1, np.int64), *tables, columns.total, 0, scores, scores)
    sinks, slopes = (rng.normal(size=heads).astype(np.float32) for _ in range(2))

    def load(fmt, q):
        piece = shapes.Piece(0, 0, 0, heads, 0, tokens, 40, rows, 0, 1, 1, -1, -1)
        scoring = scoring_of(sinks, slopes, fmt == BFLOAT16)
        columns.query[:] = np.nan
        load_queries(
            columns.shape,
            piece,
            work,
            q,
            head_dim,
            stored_rows(fmt, 1, head_dim, rng)[0],
            NO_TRANSFORM,
            scoring,
            columns.scratch,
        )

    for fmt in ALL if rows <= few.MOST_ROWS else ARITHMETICS:
        want, step, total = laid_out(columns, fmt, q.reshape(rows, head_dim))
        load(fmt, packed)
        query = columns.query.reshape(want.shape)
        if fmt in LEVELS and rows <= few.MOST_ROWS:  # ties may fall to either side
            integers = np.abs(query.view(np.int16).astype(int) - want.view(np.int16))
            assert integers.max() <= 1
            slack = step * head_dim
        else:
            np.testing.assert_array_equal(query.view(np.int32), want.view(np.int32))
            slack = np.full(rows, 1e-6)
        np.testing.assert_allclose(columns.table[shapes.QUERY_STEP, :rows], step, rtol=1e-6)
        assert (np.abs(columns.table[shapes.QUERY_SUM, :rows] - total) <= slack).all()
        np.testing.assert_array_equal(columns.positions[:rows], 40 + np.arange(rows) // heads)
        assert (columns.positions[rows : columns.count] < 0).all()
        np.testing.assert_array_equal(columns.table[shapes.SLOPE, :rows], np.tile(slopes, tokens))
        np.testing.assert_array_equal(columns.table[shapes.ROW_MAX, :rows], np.tile(sinks, tokens))
        np.testing.assert_array_equal(columns.sum_of(shapes.ROW_SUM), 1)
    if rows <= few.MOST_ROWS:  # a query that is not finite shows in all its scores
        packed[0, -1, 0, 0] = np.inf
        load(INT8, packed)
        assert np.isnan(columns.table[shapes.QUERY_STEP, 0])


@sizes
@pytest.mark.parametrize("rows", ROWS)
def test_scores(rows, count, head_dim, rng):
    columns = Columns(rows, head_dim, count)
    q = rng.normal(size=(rows, head_dim)).astype(np.float32)
    slopes = rng.uniform(0, 0.1, rows).astype(np.float32)
    position, own = 100, 95 + np.arange(rows) % 20  # of the first key, of the queries
    columns.positions[:] = -(1 << 30)
    for column in range(columns.width):
        if column % columns.count < rows:
            columns.positions[column] = own[column % columns.count]
    for fmt in ALL if rows <= few.MOST_ROWS else ARITHMETICS:
        stored, integers, keys = stored_rows(fmt, count, head_dim, rng)
        columns.query, step, total = laid_out(columns, fmt, q)
        columns.table[shapes.QUERY_STEP] = columns.spread(step)
        columns.table[shapes.QUERY_SUM] = columns.spread(total)
        run = slice(FIRST, FIRST + count)
        if fmt in LEVELS and rows <= few.MOST_ROWS:
            rounded = np.rint(q * SM_SCALE / step[:, None].astype(np.float32)).astype(np.int64)
            want = (integers @ rounded.T) * step * stored.scale[run] + total * stored.zero[run]
        elif fmt == BFLOAT16 and rows > few.MOST_ROWS:
            want = keys.astype(np.float64) @ bfloat16(q).T * SM_SCALE
        else:
            want = keys.astype(np.float64) @ q.T * SM_SCALE
        for masked in (False, True):
            columns.table[shapes.PHASE_MAX] = shapes.LEAST
            columns.table[shapes.SLOPE] = columns.spread(slopes) if masked else 0
            columns.scores[:] = np.nan
            cap, reach = (np.float32(2.0), 9) if masked else (np.float32(0), 1 << 30)
            first_key = position if masked else 0
            score = score_few if rows <= few.MOST_ROWS else score_many
            score(
                columns.shape, stored, shapes.Run(FIRST, count, 0, first_key),
                masks_of(reach, -1 if masked else 90, cap), columns.scratch,
            )  # fmt: skip
            expected, out = want, columns.scores
            if masked:
                distance = own - (first_key + np.arange(count))[:, None]
                expected = 2 * np.tanh(want / 2) - slopes * distance
                expected = np.where((distance >= 0) & (distance <= 9), expected, -np.inf)
            largest = max(1, np.abs(want).max())
            np.testing.assert_allclose(out[:count, :rows], expected, rtol=2e-5, atol=4e-5 * largest)
            last = -(-count // columns.shape.tokens) * columns.shape.tokens
            assert (out[count:last, :rows] == -np.inf).all()
            top = columns.table[shapes.PHASE_MAX].reshape(-1, columns.count).max(axis=0)[:rows]
            greatest = np.maximum(out[:count, :rows].max(axis=0), np.float32(shapes.LEAST))
            np.testing.assert_array_equal(top, greatest)


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize(
    ("rows", "tiles"), [*((rows, False) for rows in ROWS), (8, True), (20, True), (32, True)]
)
def test_softmax(rows, tiles, count, rng):
    """A phase after another: the maximum moves for some rows; a row that sees nothing stays as it was."""
    columns = Columns(rows, 64, tokens=count, tiles=tiles)
    lines = -(-count // columns.shape.line) * columns.shape.line
    out, table = columns.scores, columns.table
    out[:count] = 5 * rng.normal(size=(count, columns.count))
    out[count:lines] = -np.inf
    if rows > 1:
        out[:count, 1] = -np.inf
    before = rng.normal(size=rows).astype(np.float32)
    sums = rng.uniform(1, 2, rows).astype(np.float32)
    for lane in range(columns.width):
        if lane % columns.count < rows:
            table[shapes.ROW_MAX, lane] = before[lane % columns.count]
    table[shapes.ROW_SUM, :rows] = sums
    table[shapes.ZERO_SUM, :rows] = sums
    # the maximum of a row may stand in any of its lanes
    greatest = np.maximum(out[:count, :rows].max(axis=0), np.float32(shapes.LEAST))
    table[shapes.PHASE_MAX, columns.width - columns.count :][:rows] = greatest

    moved = settle(columns.shape, columns.scratch)
    top = np.maximum(before, out[:count, :rows].max(axis=0))
    assert moved == (top > before).any()
    np.testing.assert_array_equal(table[shapes.ROW_MAX, :rows], top)
    rescale = np.exp(before.astype(np.float64) - top)
    np.testing.assert_allclose(table[shapes.RESCALE, :rows], rescale, rtol=1e-6)
    np.testing.assert_allclose(columns.sum_of(shapes.ROW_SUM), sums * rescale, rtol=1e-6)
    assert (table[shapes.PHASE_MAX] == np.float32(shapes.LEAST)).all()

    weights = np.exp(out[:count, :rows].astype(np.float64) - top)
    start, scores = table.copy(), out.copy()

    def exponentiated(fmt, bias, values):
        """The weights, which may also be kept, as they are before scales go into them."""
        kept, found = np.full_like(out, np.nan), []
        for address in (kept.ctypes.data, 0):
            table[:], out[:] = start, scores
            masks = masks_of(0, 0, kept=address)
            exponentiate(columns.shape, columns.run, reading_of(fmt, bias), values, masks, columns.scratch)
            found.append((table.copy(), out.copy()))
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
        if columns.shape.keeps:
            np.testing.assert_allclose(kept[:count, :rows], weights, rtol=5e-6, atol=1e-30)
            assert (kept[count:lines, :rows] == 0).all()

    exponentiated(FLOAT32, -1, stored_rows(FLOAT32, count, 2, rng)[0])
    np.testing.assert_allclose(out[:count, :rows], weights, rtol=5e-6, atol=1e-30)
    total = sums * rescale + weights.sum(axis=0)
    np.testing.assert_allclose(columns.sum_of(shapes.ROW_SUM), total, rtol=5e-6)
    if not columns.shape.takes_codes:
        return

    for fmt, bias in MIDDLE.items():  # scales and zeros go into the weights
        values, _, _ = stored_rows(fmt, count, 2, rng)
        scale, zero = (x[FIRST : FIRST + count] for x in (values.scale, values.zero))
        exponentiated(fmt, bias, values)
        np.testing.assert_allclose(out[:count, :rows], weights * scale, rtol=5e-6, atol=1e-30)
        offset = (weights * (scale * bias + zero)).sum(axis=0)
        np.testing.assert_allclose(columns.sum_of(shapes.ZERO_SUM), sums * rescale + offset, rtol=1e-5)
        greatest = table[shapes.WEIGHT_MAX].reshape(-1, columns.count).max(axis=0)[:rows]
        np.testing.assert_array_equal(greatest, out[:count, :rows].max(axis=0))


@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("rows", ROWS)
def test_rounding(rows, count, rng):
    """Weights become 16 bits wide, two tokens side by side; what stands behind the run does not count."""
    columns = Columns(rows, tokens=count)
    lines = -(-count // columns.shape.line) * columns.shape.line
    out = columns.scores
    weights = rng.uniform(0, 1, (count, rows)).astype(np.float32)
    weights[:, -1] *= 1e-33 if rows > 1 else 1  # nothing that can be told from 0
    out[:lines] = 0
    out[:count, :rows] = weights
    for lane in range(columns.width):
        if lane % columns.count < rows:
            columns.table[shapes.WEIGHT_MAX, lane] = weights[:, lane % columns.count].max()
    round_weights(columns.shape, columns.run, columns.scratch)
    pairs = -(-count // 2)
    halves = out.view(np.int16).reshape(-1)[: pairs * columns.count * 2].reshape(pairs, columns.count, 2)
    have = halves.swapaxes(1, 2).reshape(2 * pairs, columns.count)[:, :rows]
    assert count == 2 * pairs or (have[count] == 0).all()
    if rows > few.MOST_ROWS:
        exact = ARITHMETICS[-1] != BFLOAT16 or weights > 1e-37  # processors take subnormals for 0
        np.testing.assert_array_equal(have[:count].view(np.uint16) * exact, bits_of_bfloat16(weights) * exact)
        return
    top = weights.max(axis=0)
    want = np.where(top > 1e-30, np.floor(weights.astype(np.float64) * LARGEST / top + 0.5), 0)
    assert np.abs(have[:count] - want).max() <= 1  # ties may fall to either side
    np.testing.assert_array_equal(columns.sum_of(shapes.WEIGHT_SUM), have[:count].sum(axis=0))


def put_pairs(columns, weights):
    """Weights of 16 bits (tokens, rows) where kernels expect them, two tokens side by side."""
    count = len(weights)
    pairs = np.zeros((count + count % 2, columns.count), weights.dtype)
    pairs[:count, : columns.rows] = weights
    memory = columns.scores.view(weights.dtype).reshape(-1)
    memory[: pairs.size] = pairs.reshape(-1, 2, columns.count).swapaxes(1, 2).reshape(-1)


@sizes
@pytest.mark.parametrize("rows", ROWS)
def test_weighing(rows, count, head_dim, rng):
    columns = Columns(rows, head_dim, count)
    sums, weigh = columns.sums, weigh_few if rows <= few.MOST_ROWS else weigh_many
    weights = rng.uniform(0, 1, (count, rows)).astype(np.float32)
    for fmt in ALL if rows <= few.MOST_ROWS else ARITHMETICS:
        columns.scores[:] = np.nan
        columns.scores[:count, :rows] = weights
        sums[:] = 0
        if rows > few.MOST_ROWS and fmt == BFLOAT16:
            x = rng.normal(size=(count + count % 2, head_dim)).astype(np.float32)
            side_by_side = bits_of_bfloat16(x).reshape(-1, 2, head_dim).swapaxes(1, 2)
            codes = with_room(np.ascontiguousarray(side_by_side).view(np.uint8).reshape(len(x) // 2, -1))
            put_pairs(columns, bits_of_bfloat16(weights))
            weigh(columns.shape, fmt, codes, 0, len(x) // 2, rows, head_dim, columns.scratch)
            want = bfloat16(weights).T.astype(np.float64) @ bfloat16(x[:count])
            np.testing.assert_allclose(sums[:rows, :head_dim], want, rtol=1e-5, atol=1e-4)
            continue
        stored, integers, x = stored_rows(fmt, count, head_dim, rng)
        if fmt not in LEVELS:
            sums[:] = 1  # is added to
            weigh(columns.shape, fmt, stored.codes, FIRST, count, rows, head_dim, columns.scratch)
            want = 1 + weights.T.astype(np.float64) @ x
            slack = 1e-5 * max(1, np.abs(x).max())
            np.testing.assert_allclose(sums[:rows, :head_dim], want, rtol=1e-5, atol=10 * slack)
            continue
        rounded = rng.integers(0, LARGEST + 1, (count, rows))
        put_pairs(columns, rounded.astype(np.int16))
        weigh(columns.shape, fmt, stored.codes, FIRST, count, rows, head_dim, columns.scratch)
        want = rounded.T @ integers
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
        columns.table[shapes.WEIGHT_MAX] = columns.spread(top)
        columns.table[shapes.WEIGHT_SUM] = 0
        columns.table[shapes.WEIGHT_SUM, :rows] = rounded.sum(axis=0)
        total = columns.total
        total[:] = 1
        add_phase(columns.shape, reading_of(fmt, MIDDLE[fmt]), columns.run, rows, columns.scratch)
        want = 1 + (rounded * top / LARGEST).T @ (integers - MIDDLE[fmt])
        if fmt == INT4:
            want = even_before_odd(want)
        used = want != 0
        np.testing.assert_allclose(total[:rows, : want.shape[1]][used], want[used], rtol=1e-5, atol=1e-3)
        assert (columns.table[shapes.WEIGHT_SUM] == 0).all()


# On tiles: a query's and a weight's 16 bits are two bytes.

tile_formats = pytest.mark.parametrize(
    ("fmt", "head_dim"), [(INT8, 64), (INT8, 192), (INT8, 256), (INT4, 128), (INT4, 256)]
)
UNITS = {INT8: 1, INT4: 16}  # what a code of 1 is as a byte


def keys_order(fmt, head_dim):
    """Elements in the order of a key's bytes: of 64 bytes of int4 the even before the odd."""
    order = np.arange(head_dim)
    return order if fmt == INT8 else order.reshape(-1, 64, 2).swapaxes(1, 2).reshape(-1)


def high_and_low(columns, fmt, head_dim):
    """The memory of a query as its high and its low bytes, (2, rows, D), a view whose elements are in order."""
    half = max(8, columns.count)
    tiles = -(-2 * half // 16)
    memory = columns.query.view(np.int8)[: head_dim * 16 * tiles]
    parts = memory.reshape(head_dim // 64, tiles, 16, 16, 4).transpose(1, 3, 0, 2, 4)
    parts = parts.reshape(16 * tiles, head_dim)
    found = np.empty((2, columns.rows, head_dim), np.int64)
    for part in range(2):
        found[part][:, keys_order(fmt, head_dim)] = parts[part * half : part * half + columns.rows]
    return found


@tile_formats
@pytest.mark.parametrize("rows", TILE_ROWS)
def test_queries_of_tiles(rows, fmt, head_dim, rng):
    columns = Columns(rows, head_dim, tiles=True)
    q = rng.normal(size=(rows, head_dim)).astype(np.float32)
    q[0, 0], q[0, 1] = 7, -7  # the largest and the smallest integer
    scoring = scoring_of(q[0], q[0])
    columns.query[:] = 0
    found = [tile_query(columns.shape, reading_of(fmt), q, r, scoring, columns.scratch) for r in range(rows)]
    high, low = high_and_low(columns, fmt, head_dim)
    step = np.abs(q * SM_SCALE).max(axis=1) / (127 * 256 + 127)
    assert np.abs(256 * high + low - q * SM_SCALE / step[:, None]).max() < 0.51
    steps, totals = np.array(found).T
    np.testing.assert_allclose(steps, step / UNITS[fmt], rtol=1e-6)
    np.testing.assert_allclose(totals, step * (256 * high + low).sum(axis=1), rtol=1e-4, atol=1e-5)
    q[-1, 3] = np.inf
    assert np.isnan(tile_query(columns.shape, reading_of(fmt), q, rows - 1, scoring, columns.scratch)[0])


@tile_formats
@pytest.mark.parametrize("count", [*TOKENS, 128])
@pytest.mark.parametrize("rows", TILE_ROWS)
def test_scores_of_tiles(rows, count, fmt, head_dim, rng):
    columns = Columns(rows, head_dim, count, tiles=True)
    q = rng.normal(size=(rows, head_dim)).astype(np.float32)
    scoring = scoring_of(q[0], q[0])
    columns.query[:] = 0
    for r in range(rows):
        tile_query(columns.shape, reading_of(fmt), q, r, scoring, columns.scratch)
    high, low = high_and_low(columns, fmt, head_dim)
    integers = 256 * high + low
    step = np.abs(q * SM_SCALE).max(axis=1) / (127 * 256 + 127)
    columns.table[shapes.QUERY_STEP] = columns.spread(step / UNITS[fmt])
    columns.table[shapes.QUERY_SUM] = columns.spread(step * integers.sum(axis=1))
    slopes = rng.uniform(0, 0.1, rows).astype(np.float32)
    own = 100 + count - 5 + np.arange(rows) % 20
    columns.positions[:] = columns.spread(own)
    stored, codes, _ = stored_rows(fmt, count, head_dim, rng)
    run = slice(FIRST, FIRST + count)
    want = (codes @ integers.T) * step * stored.scale[run] + step * integers.sum(axis=1) * stored.zero[run]
    for masked in (False, True):
        columns.table[shapes.PHASE_MAX] = shapes.LEAST
        columns.table[shapes.SLOPE] = columns.spread(slopes) if masked else 0
        columns.scores[:] = np.nan
        cap, reach = (np.float32(2.0), 9) if masked else (np.float32(0), 1 << 30)
        first_key = 100 if masked else 0
        tile_scores(
            columns.shape, reading_of(fmt), stored, shapes.Run(FIRST, count, 0, first_key),
            masks_of(reach, -1 if masked else 90, cap), columns.scratch,
        )  # fmt: skip
        expected, out = want, columns.scores
        distance = own - (first_key + np.arange(count))[:, None]
        if masked:
            expected = np.where(distance <= 9, 2 * np.tanh(want / 2) - slopes * distance, -np.inf)
        expected = np.where(distance >= 0, expected, -np.inf)
        largest = max(1, np.abs(want).max())
        np.testing.assert_allclose(out[:count, :rows], expected, rtol=2e-5, atol=4e-5 * largest)
        last = -(-count // columns.shape.tokens) * columns.shape.tokens
        assert (out[count:last, :rows] == -np.inf).all()
        assert np.isnan(out[last:]).all()
        top = columns.table[shapes.PHASE_MAX].reshape(-1, columns.count).max(axis=0)[:rows]
        greatest = np.maximum(out[:count, :rows].max(axis=0), np.float32(shapes.LEAST))
        np.testing.assert_array_equal(top, greatest)


@tile_formats
@pytest.mark.parametrize("counts", [(1,), (7,), (16,), (17,), (40, 1, 16, 20), (128,)])
@pytest.mark.parametrize("rows", TILE_ROWS)
def test_weighing_on_tiles(rows, counts, fmt, head_dim, rng):
    """Runs of a phase: weights of 16 bits, codes counted from the middle one; neither NaN nor infinity counts."""
    columns = Columns(rows, head_dim, 128, tiles=True)
    tokens = columns.shape.tokens
    stored, codes, _ = stored_rows(fmt, sum(counts), head_dim, rng)
    weights = rng.uniform(0, 1, (sum(counts), rows)).astype(np.float32)
    weights[:, -1] *= 1e-33 if rows > 1 else 1  # nothing that can be told from 0
    columns.scores[:] = -np.inf
    runs, done, used = [], 0, 0
    for count in counts:
        runs.append(shapes.Run(FIRST + done, count, used * columns.count, 0))
        columns.scores[used : used + count, :rows] = weights[done : done + count]
        done, used = done + count, used + -(-count // tokens) * tokens
    if rows > 1:
        weights[0, 0] = 0
        columns.scores[0, 0] = np.nan
    columns.scores[used:] = 1  # of an earlier phase
    top = weights.max(axis=0)
    columns.table[shapes.WEIGHT_MAX] = 0
    lanes = columns.table[shapes.WEIGHT_MAX].reshape(-1, columns.count)
    lanes[-1, :rows] = top  # in any lane of a column
    total = columns.total
    total[:] = 1
    out = np.empty((rows, head_dim), np.float32)
    tile_sums(columns.shape, reading_of(fmt, MIDDLE[fmt]), stored, tuple(runs), rows, columns.scratch, out)
    scaled = weights.astype(np.float64) * 65535 / np.maximum(top, 1e-30)
    integers = np.where(top > 1e-30, np.floor(scaled + 0.5), 0)
    want = 1 + (integers * top / 65535).T @ (codes - MIDDLE[fmt])
    # of a float32 near 65,535 one in 256 is so near a tie that it may fall to either side
    ties = 1 + sum(counts) / 32
    slack = 1e-6 * np.abs(want).max() + ties * (top / 65535 * MIDDLE[fmt])[:, None]
    assert (np.abs(out - want) <= slack).all()
    assert (columns.table[shapes.WEIGHT_MAX] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fmt", LEVELS)
def test_largest_sums_of_tiles(fmt, sign, rng):
    """The widest rows of the largest codes, and a phase of the largest weights, fit 32 bits."""
    columns = Columns(4, 256, 128, tiles=True)
    stored, _, _ = stored_rows(fmt, 128, 256, rng)
    stored.codes[:], stored.scale[:], stored.zero[:] = 255, 1, 0
    q = np.full((4, 256), sign, np.float32)
    scoring = scoring_of(q[0], q[0])
    columns.query[:] = 0
    for r in range(4):
        step, _ = tile_query(columns.shape, reading_of(fmt), q, r, scoring, columns.scratch)
        columns.table[shapes.QUERY_STEP, r :: columns.count] = step
    columns.positions[:] = 200
    masks = masks_of(1 << 30, 200)
    tile_scores(columns.shape, reading_of(fmt), stored, columns.run, masks, columns.scratch)
    np.testing.assert_allclose(columns.scores[:128], sign * SM_SCALE * 256 * LEVELS[fmt], rtol=1e-6)

    stored.codes[:] = 255 if sign > 0 else 0
    columns.scores[:128] = columns.table[shapes.WEIGHT_MAX] = 0.5
    out, code = np.empty((4, 256), np.float32), LEVELS[fmt] if sign > 0 else 0
    tile_sums(columns.shape, reading_of(fmt), stored, (columns.run,), 4, columns.scratch, out)
    np.testing.assert_allclose(out, 128 * 0.5 * (code - MIDDLE[fmt]), rtol=1e-6)


@pytest.mark.parametrize("dims", [(64, 64), (256, 64), (64, 256), (128, 128)])
@pytest.mark.parametrize("rows", few_tiles.ROWS)
def test_scratch_of_tiles(rows, dims):
    """What tiles read and write begins at a cache line, and lies within its memory."""
    shape = few_tiles.shape(rows, "float32", STAND_IN)
    floats, _ = attend.scratch_sizes(shape, *dims)
    memory = aligned_zeros((2, floats), np.dtype(np.float32))[1]
    scratch = cut_scratch(shape, *dims, memory, np.zeros(shape.width, np.int32))
    assert LANES == 8 or all(x.ctypes.data % 64 == 0 for x in (scratch.query, scratch.tile, scratch.total))
    tiles = few_tiles._tiles_of(shape)
    assert scratch.query.nbytes >= dims[0] // 64 * tiles * 1024
    assert scratch.tile.nbytes >= 4096 * (tiles + 1) + max(64 * dims[0], 128 * dims[1])
    assert scratch.scores.size >= shape.phase * shape.columns


@pytest.mark.parametrize("groups", [1, 2])
@sizes
def test_staging(count, head_dim, groups, rng):
    """Rows of any format become a tile of float32, or of bfloat16, of values two tokens side by side."""
    run = shapes.Run(FIRST, count, 0, 0)
    for fmt in ALL:
        if (fmt not in LEVELS and groups > 1) or (fmt == INT4 and head_dim // groups % 2):
            continue
        stored, _, x = stored_rows(fmt, count, head_dim, rng, groups)
        tile = np.full((count + 8) * head_dim, np.nan, np.float32)
        halves = tile.view(np.uint16)
        stage(stored, run, tile)
        exact = tile[: x.size].reshape(x.shape).copy()
        np.testing.assert_allclose(exact, x, rtol=1e-6, atol=1e-6)
        stage(stored, run, halves)
        np.testing.assert_array_equal(halves[: x.size].reshape(x.shape), bits_of_bfloat16(exact))
        stage_pairs(stored, run, halves)
        pairs = -(-count // 2)
        have = halves[: 2 * pairs * head_dim].reshape(pairs, head_dim, 2)
        have = have.swapaxes(1, 2).reshape(2 * pairs, head_dim)[:count]
        np.testing.assert_array_equal(have, bits_of_bfloat16(exact))


def hadamard(size):
    """The matrix of 1 and -1, by its definition: the sign of an element is the parity of the bits in common."""
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("size", [1 << n for n in range(10)])
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_row_transforms(size, blocks, rng):
    """Keys, queries and values of each head, from anywhere to anywhere and in place; nothing beside them is touched."""
    count, heads = blocks * size, 2
    rows = rng.normal(size=(transforms.KINDS, 2, heads, count + 1)).astype(np.float32)
    x = rng.normal(size=count + 5).astype(np.float32)
    for kind in range(transforms.KINDS):
        sizes = (1, size) if kind == transforms.VALUES else (size, 1)
        transform = transforms.Transform(rows.reshape(-1, count + 1), *sizes)
        for head in range(heads):
            shift, rate = rows[kind, :, head, :count].astype(np.float64)
            want = ((x[3:-2] - shift) * rate).reshape(blocks, size) @ hadamard(size)
            out, inside = np.full(count + 7, np.nan, np.float32), x.copy()
            transform_row(x, 3, transform, kind, head, count, out, 4)
            np.testing.assert_allclose(out[4:-3], want.reshape(-1), rtol=1e-5, atol=1e-6 * size)
            assert np.isnan(out[[0, 1, 2, 3, -3, -2, -1]]).all()
            transform_row(inside, 3, transform, kind, head, count, inside, 3)
            np.testing.assert_array_equal(inside, np.concatenate((x[:3], out[4:-3], x[-2:])))
            product = product_with_shift(x, 3, transform, head, count)
            shift = rows[transforms.KEYS, 0, head, :count].astype(np.float64)
            np.testing.assert_allclose(product, x[3:-2] @ shift, rtol=1e-5, atol=1e-6 * count)


@pytest.mark.skipif(LANES == 8 and "KVNUMBA_NARROW" in os.environ, reason="these are the narrow vectors")
def test_narrow_vectors(tmp_path):
    """The tests above for one shape of each kind, with vectors of eight lanes, in a process of their own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            __file__,
            "-k",
            "(3 and not 16) or 16 or staging or transforms",
        ],
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
