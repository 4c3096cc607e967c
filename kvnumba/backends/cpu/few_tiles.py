"""Micro-kernels for a few rows of queries on codes, with tile instructions: decoding from int8 and int4.

A product of tiles sums over 64 bytes. Of keys these are 64 elements, as they lie in the storage; of values they are 64
tokens, four of them side by side, and so values are staged. The sums are exact integers:

    scores (16 tokens, 16 columns)   +=  keys (16 tokens, 64 elements) * queries (16, 16 columns, 4 elements)
    sums (16 columns, 16 elements)   +=  weights (16 columns, 64 tokens) * values (16, 16 elements, 4 tokens)

Queries and weights are integers of 16 bits: each row of them has a column for its high bytes and one for its low bytes.
Codes are bytes to both products; those of int4 count 16, because that is the fastest way to part two in a byte.

The four tokens that are side by side, a quad, are those whose weights stand in the same lane of four lines of scores:
weights need not move between lanes to become bytes of one word.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import CODE_BIAS, CODECS, LARGEST_CODE, PAIRS, SPLIT, load_scales
from kvnumba.backends.cpu.few import TINY, integer_step
from kvnumba.backends.cpu.jit import plain
from kvnumba.backends.cpu.shapes import (
    AHEAD,
    PHASE_MAX,
    QUERY_STEP,
    QUERY_SUM,
    WEIGHT_MAX,
    Reading,
    Shape,
    finish_scores,
    is_known,
    row_ahead,
    state_at,
    tokens_of,
)
from kvnumba.backends.cpu.simd import F32, I8, I32, LANES, Emitter, Int, Pointer, constant, vector
from kvnumba.backends.cpu.softmax import column_tops
from kvnumba.backends.cpu.tiles import TILE, TILE_BYTES, TILE_ROWS, WIDEST, Tiles
from kvnumba.formats import FORMATS
from kvnumba.storage import RowLayout

ROWS = (4, 8, 20, 32)
"""Numbers of rows that kernels are compiled for."""

CODE_FORMATS = [FORMATS[name].number for name in ("int8", "int4")]

UNIT = np.array([256 // (largest + 1) for largest in LARGEST_CODE])
"""What a code of 1 is as a byte, by `Format.number`."""

PHASE = 128
GROUP = 64  # tokens whose weights are a row of a tile; also those whose scores are left by tiles at once
QUAD = 4

LARGEST_QUERY = 127 * 256 + 127  # of two signed bytes, high and low
LARGEST_WEIGHT = 255 * 256 + 255  # of two unsigned ones
SIGN = 128  # of a byte: what is taken off codes of values, whose middle it is


def fits(keys: RowLayout, values: RowLayout) -> bool:
    """Whether keys and values are what these kernels take: codes with one scale a row, in whole rows of tiles."""
    return all(
        rows.fmt.number in CODE_FORMATS
        and rows.num_groups == 1
        and rows.element_bytes % TILE_BYTES == 0
        and rows.head_dim <= WIDEST
        for rows in (keys, values)
    )


@functools.cache
def shape(rows: int, scale_dtype: str, instructions: str) -> Shape:
    """The shape for a number of ROWS."""
    line = LANES // math.gcd(rows, LANES)
    vectors = line * rows // LANES
    return Shape(
        scale_dtype, __name__, rows, rows, QUAD * line, vectors, line, PHASE, True, instructions=instructions
    )


# Every column has a high and a low part: in products of keys, and in weights and sums, those from `half_of` on are the
# low parts of the first. `_tiles_of` tiles hold them all. What follows says where things lie in `scratch.tile`.


@plain
def half_of(columns):
    """Where the low parts begin."""
    return max(TILE_ROWS // 2, columns)


def _half(shape: Shape) -> int:
    return half_of.py_func(shape.columns)


def _tiles_of(shape: Shape) -> int:
    return -(-2 * _half(shape) // TILE_ROWS)


def _words(shape: Shape, scratch: Any) -> Pointer:
    """Weights, four in 32 bits, that become tiles at the beginning of the memory."""
    return scratch.tile.start + PHASE // GROUP * _tiles_of(shape) * TILE


def _sums(shape: Shape, scratch: Any) -> Pointer:
    """Four tiles of sums."""
    return scratch.tile.start + 3 * _tiles_of(shape) * TILE


def _staged(shape: Shape, scratch: Any) -> Pointer:
    """Bytes of keys, then of values; before it there is room for a group's products of keys, too."""
    return scratch.tile.start + QUAD * (_tiles_of(shape) + 1) * TILE


@plain
def choose(keys, values, scoring):
    """Codes are never decoded."""
    return Reading(True, True, keys.fmt, values.fmt, CODE_BIAS[values.fmt])


@plain
def load_query(shape, reading, q, start, r, head_dim, sm_scale, query):
    """A row of queries, scaled, as integers of two signed bytes: (64 bytes of a key, tile, 16, 16 columns, 4)."""
    half = half_of(shape.columns)
    step = integer_step(q, start, head_dim, sm_scale, LARGEST_QUERY)
    if not step > np.float32(TINY):
        return step, np.float32(0)
    query = query.view(np.int8)
    rate, total = sm_scale / step, 0
    high_column, low_column = query_column(r), query_column(half + r)
    strip_bytes = query_column(2 * half + TILE_ROWS - 1) // TILE * TILE
    for strip in range(head_dim // TILE_BYTES):
        first, stride = strip * TILE_BYTES, 1
        if SPLIT[reading.k_format]:  # the even elements of 128, then the odd
            first, stride = strip // 2 * (2 * TILE_BYTES) + strip % 2, 2
        for byte in range(TILE_BYTES):
            integer = np.int32(np.rint(q[start + first + stride * byte] * rate))
            high = (integer + 128) >> 8
            at = strip * strip_bytes + byte // 4 * TILE_BYTES + byte % 4
            query[at + high_column] = high
            query[at + low_column] = integer - (high << 8)
            total += integer
    return step / np.float32(UNIT[reading.k_format]), step * np.float32(total)


@plain
def query_column(column):
    """Bytes from the first of some tiles to a column."""
    return column // TILE_ROWS * TILE + column % TILE_ROWS * 4


def _bytes_of(e: Emitter, fmt: int, stored: ir.Value) -> list[ir.Value]:
    """Codes as bytes that count UNIT: as they are, or the even ones and the odd ones."""
    if not CODECS[fmt].split:
        return [stored]
    b, count = e.builder, stored.type.count
    high = constant(-16, I8, count)
    return [b.and_(stored, high), b.shl(stored, constant(4, I8, count))]


@intrinsic
def score_run(typing, shape, reading, keys, run, following, masks, scratch):
    """Scores of a run, and their greatest in PHASE_MAX."""
    signature = types.void(shape, reading, keys, run, types.intp, masks, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, _, keys, *rest = e.arguments(signature, args)
        e.switch(keys.fmt, CODE_FORMATS, lambda fmt: _score(e, static, fmt, keys, *rest))
        return context.get_dummy_value()

    return signature, generate


def _score(
    e: Emitter, shape: Shape, fmt: int, keys: Any, run: Any, following: Int, masks: Any, scratch: Any
) -> None:
    b, parts, split = e.builder, range(shape.vectors), CODECS[fmt].split
    tiles, number = Tiles(e, shape.instructions), _tiles_of(shape)
    row_bytes = keys.codes.extent(1)
    start, later_start = (keys.codes.start + row * row_bytes for row in (run.row, following))
    ahead = run.num_tokens.at_most(AHEAD)
    lines = row_bytes // TILE_BYTES  # of memory, of a row
    strips = lines * (2 if split else 1)
    dots, dots_bytes, low = scratch.tile.start, number * TILE_BYTES, 4 * _half(shape)
    query_steps, query_sums, greatest = (
        [state_at(scratch.state, name, shape, part) for part in parts]
        for name in (QUERY_STEP, QUERY_SUM, PHASE_MAX)
    )

    def group(n: Int, carried: list[ir.Value]) -> list[ir.Value]:
        first = n * GROUP
        left = (run.num_tokens - first).at_most(GROUP)
        source, stride = start + first * row_bytes, row_bytes
        if split:
            unpack(source, (left + (TILE_ROWS - 1)) // TILE_ROWS * TILE_ROWS * lines)
            source, stride = _staged(shape, scratch), strips * TILE_BYTES

        def tile(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            rows = source + i * TILE_ROWS * stride
            later = row_ahead(e, first + i * TILE_ROWS, ahead, run.num_tokens, start, later_start, row_bytes)
            for t in range(number):
                tiles.zero(t)

            def strip(k: Int, _: list[ir.Value]) -> list[ir.Value]:
                tiles.load(number, rows + k * TILE_BYTES, stride)
                for t in range(number):
                    where = number + 1 + t % 2
                    tiles.load(where, scratch.query.start + (k * (number * TILE) + t * TILE), TILE_BYTES)
                    tiles.dot_bytes("busd", t, number, where)
                share = TILE_ROWS // (2 if split else 1)  # lines of the tile ahead, in the order of memory
                for line in range(share):
                    e.prefetch(later + (k * (share * 64) + line * 64))
                return []

            e.loop(strips, [], strip)
            for t in range(number):
                tiles.store(t, dots + (i * (TILE_ROWS * dots_bytes) + t * TILE_BYTES), dots_bytes)
            return []

        e.loop((left + (TILE_ROWS - 1)) // TILE_ROWS, [], tile)

        def line(i: Int, carried: list[ir.Value]) -> list[ir.Value]:
            token = first + i * shape.line
            scales = [load_scales(e, array, run.row + token, shape.line) for array in (keys.scale, keys.zero)]
            scores = []
            for part in parts:
                step, lowest = (e.pick(x, tokens_of(shape, part)) for x in scales)
                high, rest = (products(dots + (i * (shape.line * dots_bytes) + at), part) for at in (0, low))
                dot = b.sitofp(b.add(b.shl(high, constant(8, I32)), rest), vector(F32))
                scaled = e.mul(step, e.mul(dot, steps[part]))
                scores.append(e.fma(lowest, totals[part], scaled))
            unknown = b.not_(is_known(e, shape, token, run, masks))

            def finished() -> list[ir.Value]:
                key, left = run.key + token, run.num_tokens - token
                return [
                    finish_scores(e, shape, part, x, key, left, masks, scratch)
                    for part, x in enumerate(scores)
                ]

            scores = e.when(unknown, scores, finished)
            target = scratch.scores.start + (run.scores + token * shape.columns) * 4
            for part, x in enumerate(scores):
                e.store(x, target + 4 * part * LANES)
            return [e.max(x, top) for x, top in zip(scores, carried, strict=True)]

        return e.loop((left + (shape.tokens - 1)) // shape.tokens * QUAD, carried, line)

    def unpack(source: Pointer, count: Int) -> None:
        def one(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            stored = e.load(source + i * TILE_BYTES, vector(I8, TILE_BYTES))
            for half, codes in enumerate(_bytes_of(e, fmt, stored)):
                e.store(codes, _staged(shape, scratch) + (i * 2 + half) * TILE_BYTES)
            return []

        e.loop(count, [], one)

    def products(pointer: Pointer, part: int) -> ir.Value:
        """High or low products of a line, those in one of its vectors."""
        together = math.gcd(shape.columns, LANES)  # lanes that are surely of one token
        found = []
        for lane in range(part * LANES, (part + 1) * LANES, together):
            token, column = divmod(lane, shape.columns)
            found.append(e.load(pointer + (token * dots_bytes + 4 * column), vector(I32, together)))
        return e.join(found)

    steps, totals, before = (
        [e.load(pointer, vector(F32)) for pointer in pointers]
        for pointers in (query_steps, query_sums, greatest)
    )
    tops = e.loop((run.num_tokens + (GROUP - 1)) // GROUP, before, group)
    for pointer, top in zip(greatest, tops, strict=True):
        e.store(top, pointer)


@intrinsic
def weigh_run(typing, shape, reading, values, run, following, rows, scratch):
    """Stage the values of a run, quads of tokens side by side: (group, tile of elements, 16 quads, 16 elements, 4)."""
    signature = types.void(shape, reading, values, run, types.intp, types.intp, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, _, values, run, following, _, scratch = e.arguments(signature, args)
        rest = values, run, following, scratch
        e.switch(values.fmt, CODE_FORMATS, lambda fmt: _stage(e, static, fmt, *rest))
        return context.get_dummy_value()

    return signature, generate


def _stage(e: Emitter, shape: Shape, fmt: int, values: Any, run: Any, following: Int, scratch: Any) -> None:
    b = e.builder
    row_bytes = values.codes.extent(1)
    start, later_start = (values.codes.start + row * row_bytes for row in (run.row, following))
    ahead = run.num_tokens.at_most(AHEAD)
    lines = row_bytes // TILE_BYTES
    parts = 2 if CODECS[fmt].split else 1
    group_bytes = lines * (QUAD * parts * TILE)
    first_quad = run.scores // (shape.columns * QUAD)  # of the phase
    sign = constant(-SIGN, I8, TILE_BYTES)

    def lines_of_tokens(i: Int, _: list[ir.Value]) -> list[ir.Value]:
        token, position = i * shape.tokens, first_quad + i * shape.line
        later = row_ahead(e, token, ahead, run.num_tokens, start, later_start, row_bytes)
        sources = [start + (token + n * shape.line) * row_bytes for n in range(QUAD)]
        target = _staged(shape, scratch) + position // TILE_ROWS * group_bytes
        target = target + position % TILE_ROWS * TILE_BYTES

        def line(k: Int, _: list[ir.Value]) -> list[ir.Value]:
            for s in range(shape.line):
                place = row_bytes * s + k * TILE_BYTES
                x = [e.load(source + place, vector(I8, TILE_BYTES)) for source in sources]
                pairs = [[_interleaved(e, x[n], x[n + 1], 1, half) for n in (0, 2)] for half in range(2)]
                quads = [_interleaved(e, first, last, 2, half) for first, last in pairs for half in range(2)]
                codes = [y for quad in quads for y in _bytes_of(e, fmt, quad)]
                for n, y in enumerate(codes):
                    e.store(b.xor(y, sign), target + (k * (len(codes) * TILE) + n * TILE + s * TILE_BYTES))
                for n in range(QUAD):
                    e.prefetch(later + (k * (shape.tokens * 64) + (s * QUAD + n) * 64))
            return []

        e.loop(lines, [], line)
        return []

    e.loop((run.num_tokens + (shape.tokens - 1)) // shape.tokens, [], lines_of_tokens)


def _interleaved(e: Emitter, x: ir.Value, y: ir.Value, size: int, half: int) -> ir.Value:
    """Units of `size` bytes of x and y in turns, of one half of each 16 bytes, as processors do it."""
    lanes = [
        source * TILE_BYTES + lane * 16 + half * 8 + unit * size + byte
        for lane in range(TILE_BYTES // 16)
        for unit in range(8 // size)
        for source in range(2)
        for byte in range(size)
    ]
    return e.shuffle(x, y, lanes)


@plain
def add_phase(shape, reading, last, rows, scratch):
    """Weigh all values of a phase; tokens that its last group lacks have weight 0."""
    end = last.scores + (last.num_tokens + shape.tokens - 1) // shape.tokens * shape.tokens * shape.columns
    groups = (end + GROUP * shape.columns - 1) // (GROUP * shape.columns)
    scratch.scores[end : groups * GROUP * shape.columns] = 0
    unit = np.float32(1 / (LARGEST_WEIGHT * UNIT[reading.v_format]))
    weigh_phase(shape, groups, rows, unit, scratch)
    scratch.state[WEIGHT_MAX] = 0


@intrinsic
def weigh_phase(typing, shape, groups, rows, unit, scratch):
    """Add the weighted values of whole groups to the totals; `unit` is what 1 stands for in sums, of WEIGHT_MAX."""
    signature = types.void(shape, types.intp, types.intp, types.float32, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, groups, rows, unit, scratch = e.arguments(signature, args)
        _round_weights(e, static, groups, scratch)
        _weigh(e, static, groups, rows, unit, scratch)
        return context.get_dummy_value()

    return signature, generate


def _round_weights(e: Emitter, shape: Shape, groups: Int, scratch: Any) -> None:
    """Weights as integers of two bytes: tiles (group, row of a tile, 64 tokens); WEIGHT_MAX is that of each column."""
    b, parts, nothing = e.builder, range(shape.vectors), constant(0.0)
    count = TILE_ROWS // shape.line  # of a group's words, in four lines each
    size = count * shape.vectors  # vectors of all of them
    words, group_bytes = _words(shape, scratch), _tiles_of(shape) * TILE
    rates = []
    for part, top in enumerate(column_tops(e, shape, scratch, WEIGHT_MAX)):
        e.store(top, state_at(scratch.state, WEIGHT_MAX, shape, part))
        large = b.fcmp_ordered(">", top, constant(TINY))
        rates.append(b.select(large, b.fdiv(constant(float(LARGEST_WEIGHT)), top), nothing))
    low_bytes = constant(0x00FF00FF, I32)

    def lines(g: Int, i: Int) -> None:
        """Four lines of weights as words of their high bytes, and of their low ones."""
        source = scratch.scores.start + (g * count + i) * (QUAD * shape.vectors * 4 * LANES)
        for part in parts:
            whole = []
            for n in range(QUAD):
                weight = e.load(source + (n * shape.vectors + part) * 4 * LANES, vector(F32))
                # NaN becomes 0, and so does what lies between runs: it is still -inf
                scaled = e.max(b.fmul(weight, rates[part]), nothing)
                whole.append(b.fptosi(b.fadd(scaled, constant(0.5)), vector(I32)))
            x, y = (b.or_(whole[n], b.shl(whole[n + 2], constant(16, I32))) for n in range(2))
            low = b.or_(b.and_(x, low_bytes), b.shl(b.and_(y, low_bytes), constant(8, I32)))
            high = b.or_(b.and_(b.lshr(x, constant(8, I32)), low_bytes), b.and_(y, b.not_(low_bytes)))
            for half, word in enumerate((high, low)):
                e.store(word, words + (i * (shape.vectors * 4 * LANES) + (half * size + part) * 4 * LANES))

    def group(g: Int, _: list[ir.Value]) -> list[ir.Value]:
        def some(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            lines(g, i)
            return []

        def transposed(half: Int, _: list[ir.Value]) -> list[ir.Value]:
            source = words + half * (size * 4 * LANES)
            x = [e.load(source + 4 * i * LANES, vector(I32)) for i in range(size)]
            for _level in range(TILE_ROWS.bit_length() - 1):  # (quad, column) becomes (column, quad)
                pairs = zip(x[: size // 2], x[size // 2 :], strict=True)
                x = [e.shuffle(*pair, lanes) for pair in pairs for lanes in (PAIRS[:LANES], PAIRS[LANES:])]
            target = scratch.tile.start + (g * group_bytes + half * (_half(shape) * TILE_BYTES))
            for i, word in enumerate(x):
                e.store(word, target + 4 * i * LANES)
            return []

        e.loop(count, [], some)
        e.loop(2, [], transposed)
        return []

    e.loop(groups, [], group)


def _weigh(e: Emitter, shape: Shape, groups: Int, rows: Int, unit: ir.Value, scratch: Any) -> None:
    b, number = e.builder, _tiles_of(shape)
    tiles, together = Tiles(e, shape.instructions), 4 // number  # tiles of elements, for four of sums
    elements = scratch.total.extent(1) // TILE_ROWS
    sums, total_bytes, low = _sums(shape, scratch), scratch.total.extent(1) * 4, _half(shape) * TILE_BYTES
    tops, values = state_at(scratch.state, WEIGHT_MAX, shape), _staged(shape, scratch)
    count = TILE_ROWS

    def some(n: Int, _: list[ir.Value]) -> list[ir.Value]:
        for t in range(number * together):
            tiles.zero(t)

        def group(g: Int, _: list[ir.Value]) -> list[ir.Value]:
            for k in range(together):
                value = 4 + k % 2
                tiles.load(value, values + (g * elements + n * together + k) * TILE, TILE_BYTES)
                for t in range(number):
                    weight = 6 + t % 2
                    if number > 1 or k == 0:
                        tiles.load(weight, scratch.tile.start + (g * number + t) * TILE, TILE_BYTES)
                    tiles.dot_bytes("busd", k * number + t, weight, value)
            return []

        e.loop(groups, [], group)
        for t in range(number * together):
            tiles.store(t, sums + t * TILE, TILE_BYTES)

        def row(r: Int, _: list[ir.Value]) -> list[ir.Value]:
            step = b.fmul(e.load(tops + r * 4, F32), unit)
            for k in range(together):
                source = sums + (r * TILE_BYTES + k * number * TILE)
                high, rest = (e.load(source + at, vector(I32, count)) for at in (0, low))
                found = b.sitofp(b.add(b.shl(high, constant(8, I32, count)), rest), vector(F32, count))
                target = scratch.total.start + (r * total_bytes + (n * together + k) * TILE_BYTES)
                for at in range(0, count, LANES):
                    x = e.pick(found, range(at, at + LANES)) if LANES < count else found
                    where = target + 4 * at
                    e.store(e.fma(x, e.splat(step), e.load(where, vector(F32))), where)
            return []

        e.loop(rows, [], row)
        return []

    e.loop(elements // together, [], some)


@plain
def store_row(shape, reading, r, offset, factor, total, target, value_dim):
    """The total of row r, plus `offset`, times `factor`, in the elements' own order."""
    parts = 2 if SPLIT[reading.v_format] else 1
    for tile in range(value_dim // TILE_ROWS):
        quad, part = tile // parts, tile % parts
        first = quad // QUAD * TILE_BYTES + quad % QUAD * 4
        for n in range(TILE_ROWS):  # four neighbours of each 16 bytes, see `_interleaved`
            byte = first + n // 4 * 16 + n % 4
            target[byte * parts + part] = (total[r, tile * TILE_ROWS + n] + offset) * factor
