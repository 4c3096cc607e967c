"""Micro-kernels for many rows of queries on tile instructions, as of prompts.

Everything is transposed, with a column for each row of queries:

    scores   S^T = K Q^T          16 keys by 32 elements of head_dim, times 32 elements by 16 columns
    weights  P^T = exp(S^T)       a vector is columns of one key: maxima, sums and rescaling shuffle no lanes, and the
                                  weights of two keys side by side are what the next product wants
    values   O^T += V^T P^T       16 elements of values by 32 keys, times 32 keys by 16 columns

The keys and values of a phase are staged once for all columns: brought to bfloat16, values transposed. Then some columns
at a time (a group) take the whole phase. Their softmax is optimistic: weights are computed against the maximum known
before, which only has to come within HEADROOM of the truth; it is compared after the phase, and where it was too
low, mostly the first time, what was summed is rescaled and the phase repeated. So no score is read twice, and the
exponentials of some keys are computed between the tile instructions of the next.

Tiles multiply bfloat16. More precise numbers are taken as sums of `parts` bfloat16 numbers, each what the ones before
leave, and multiplied part by part: products smaller than the last part are left out. Two parts are three products
and 16 bits ("bfloat16x3", after Henry, Tang and Heinecke, 2019), three parts are six products and the 24 of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import (
    FLOAT32,
    decode_rows,
    nearest_bfloat16,
)
from kvnumba.backends.cpu.jit import inlined, plain
from kvnumba.backends.cpu.runs import RUN_KEY, RUN_ROW, run_of, runs_ahead
from kvnumba.backends.cpu.shapes import (
    LEAST,
    PHASE_MAX,
    QUERY_STEP,
    RESCALE,
    ROW_MAX,
    ROW_SUM,
    STATE_ROWS,
    Reading,
    Run,
    Shape,
    finish_scores,
    prefetch_rows,
    state_at,
)
from kvnumba.backends.cpu.simd import F32, I16, I32, I64, LANES, Emitter, Int, Pointer, constant, vector
from kvnumba.backends.cpu.tiles import TILE, TILE_BYTES, TILE_ROWS, Tiles
from kvnumba.formats import FORMATS

ROWS = (64, 1024)
"""Numbers of rows that kernels are compiled for."""

PHASE = 256  # keys that are staged together
WIDEST = 256  # elements of head_dim

ELEMENTS = 32  # bfloat16 numbers of a row of a tile, and keys of a section
SECTIONS = PHASE // ELEMENTS
PAIRS = ELEMENTS // 2
SCORES = 2 * ELEMENTS  # of a column: those of a section of 32 keys, and of the one before

HEADROOM = 5.5  # the logarithm of the greatest weight before a phase is repeated
MOST_TURNS = 4  # of a phase: maxima beyond 1e7 are rounded by more than HEADROOM

PARTS = np.array([{"bfloat16": 1, "fp8_e4m3": 1, "float16": 2}.get(name, 3) for name in FORMATS])
"""bfloat16 numbers that hold a number of each format exactly."""

LEFT, RIGHT = (4, 5), (6, 7)
"""Tiles for the factors of four sums, 2 by 2, which are in tiles 0 to 3."""

GROUP = 2 * TILE_ROWS
"""Columns of two tiles."""

# Of 2**r for 0 <= r < 1, relative error at most 1e-4. Weights are cut to bfloat16, not rounded: in the mean it takes
# 0.28 % off, which these coefficients have on top.
EXP2 = (1.00275335, 0.69774317, 0.22687247, 0.07812731)
HIDDEN = -1e30  # a masked score: -inf less -inf would be NaN
SEEN = -1e29  # what scores are greater than
LOG2_E = 1.4426950408889634
UPPER = -65536  # the bits that a bfloat16 has of a float32


@functools.cache
def shape(rows: int, scale_dtype: str, parts: int, instructions: str) -> Shape:
    """The shape for a number of ROWS, of `parts` bfloat16 numbers for one."""
    group = min(rows, 64)
    return Shape(
        scale_dtype, __name__, rows, rows, 1, 1, 1, PHASE, group=group, parts=parts, instructions=instructions
    )


def fits(head_dim: int) -> bool:
    """Whether rows of so many elements can be multiplied here."""
    return head_dim % TILE_ROWS == 0 and head_dim <= WIDEST


class TileScratch(NamedTuple):
    """A worker's memory for one piece. Parts of the same numbers lie one after the other.

    Attributes
    ----------
    state : (STATE_ROWS, rows) float32
    positions : (rows,) int32
    query : (n,) uint16
        (parts, 16 columns, 32 elements, pairs, columns, 2).
    keys : (n,) uint16
        (parts, PHASE, padded head_dim).
    values : (n,) uint16
        (parts, 16 elements, 32 keys, elements, keys).
    weights : (n,) uint16
        Of a group: (parts, 32 keys, 16 columns, pairs of keys, columns, 2).
    scores : (n,) float32
        Of 32 keys and of those before: (2, 16 keys, 16 columns, keys, columns).
    total : (n,) float32
        (groups, 16 elements, 16 columns, elements, columns).
    tile : (n,) float32
        Rows that are decoded; a row of queries that is transformed.
    halves : (n,) uint16
        32 values before they are transposed: (parts, keys, elements).
    """

    state: Any
    positions: Any
    query: Any
    keys: Any
    values: Any
    weights: Any
    scores: Any
    total: Any
    tile: Any
    halves: Any


@plain
def padded_key(head_dim):
    """Elements of a key in scratch: whole rows of tiles."""
    return (head_dim + ELEMENTS - 1) // ELEMENTS * ELEMENTS


@plain
def padded_value(value_dim):
    """Elements of a value in scratch: those of two tiles together."""
    return (value_dim + GROUP - 1) // GROUP * GROUP


def scratch_floats(shape, head_dim, value_dim):
    """Floats that `cut_scratch` cuts up."""
    key, value = padded_key.py_func(head_dim), padded_value.py_func(value_dim)
    halves = shape.parts * (shape.columns * key + PHASE * (key + value + shape.group))
    return (
        STATE_ROWS * shape.width
        + halves // 2
        + SCORES * shape.group
        + shape.columns * value
        + ELEMENTS * max(key, value)
        + shape.parts * ELEMENTS // 2 * value
    )


@inlined
def cut_scratch(shape, head_dim, value_dim, floats, positions):
    """A worker's memory as the arrays that its phases use."""
    key, value, parts = padded_key(head_dim), padded_value(value_dim), shape.parts
    state = floats[: STATE_ROWS * shape.width].reshape(STATE_ROWS, shape.width)
    used = STATE_ROWS * shape.width
    size = parts * shape.columns * key // 2
    query = floats[used : used + size].view(np.uint16)
    used += size
    size = parts * PHASE * key // 2
    keys = floats[used : used + size].view(np.uint16)
    used += size
    size = parts * PHASE * value // 2
    values = floats[used : used + size].view(np.uint16)
    used += size
    size = parts * PHASE * shape.group // 2
    weights = floats[used : used + size].view(np.uint16)
    used += size
    scores = floats[used : used + SCORES * shape.group]
    used += SCORES * shape.group
    size = shape.columns * value
    total = floats[used : used + size]
    used += size
    tile = floats[used : used + ELEMENTS * max(key, value)]
    used += ELEMENTS * max(key, value)
    halves = floats[used : used + parts * ELEMENTS // 2 * value].view(np.uint16)
    return TileScratch(
        state, positions[: shape.width], query, keys, values, weights, scores, total, tile, halves
    )


@intrinsic
def begin(typing, shape):
    """Before a thread's first tile."""
    static = shape.static

    def generate(context, builder, signature, args):
        Tiles(Emitter(context, builder), static.instructions).configure()
        return context.get_dummy_value()

    return types.void(shape), generate


@intrinsic
def end(typing, shape):
    """After its last."""
    static = shape.static

    def generate(context, builder, signature, args):
        Tiles(Emitter(context, builder), static.instructions).release()
        return context.get_dummy_value()

    return types.void(shape), generate


@plain
def choose(keys, values, scoring):
    """All rows are staged."""
    return Reading(False, False, FLOAT32, FLOAT32, np.float32(-1))


@plain
def load_query(shape, reading, q, start, r, head_dim, scoring, scratch):
    """A row of queries, not scaled: those that came in bfloat16 are exact as they are. QUERY_STEP scales the scores."""
    lay_query(shape, q, start, r, head_dim, scratch.query)
    return scoring.sm_scale, np.float32(0)


@inlined
def attend_phase(shape, reading, storage, runs, num_runs, rows, masks, scratch):
    """Attend to the keys of some runs, a group of columns after the other."""
    keys, values = storage.keys, storage.values
    first = runs[0, RUN_KEY]
    count = stage(shape, keys, values, runs, num_runs, runs_ahead(storage.block_size), scratch)
    k_parts, v_parts = min(shape.parts, PARTS[keys.fmt]), min(shape.parts, PARTS[values.fmt])
    value_dim = padded_value(values.head_dim)
    state, positions, group = scratch.state, scratch.positions, shape.group
    phase = Run(0, count, 0, first)
    for column in range(0, rows, group):
        oldest, newest = positions[column], positions[min(column + group, rows) - 1]
        if newest < first or oldest - masks.reach >= first + count:
            continue
        known = np.int64(oldest) if masks.seen_by_all >= 0 else np.int64(-1)
        sections = (min(count, newest - first + 1) + ELEMENTS - 1) // ELEMENTS
        # the first keys tell about where the maximum is
        late = state[ROW_MAX, column] == np.float32(LEAST)
        if late:
            weigh(shape, k_parts, column, 1, known, phase, keys.head_dim, masks, scratch)
        for _ in range(MOST_TURNS):
            if late:
                raise_maxima(shape, column, value_dim, scratch)
            late = weigh(shape, k_parts, column, sections, known, phase, keys.head_dim, masks, scratch)
            if not late:
                break
        for c in range(column, column + group):
            state[ROW_SUM, c] += state[RESCALE, c]
        add_values(shape, v_parts, column, sections, value_dim, scratch)


@inlined
def stage(shape, keys, values, runs, num_runs, later, scratch):
    """Bring the keys and values of some runs to bfloat16, in parts, and transpose the values. Returns how many.

    The rows of the run that is `later` runs on are prefetched meanwhile.
    """
    key_dim, value_dim = padded_key(keys.head_dim), values.head_dim
    n = 0
    for i in range(num_runs):
        run, following = run_of(runs, i), runs[i + later, RUN_ROW]
        done = 0
        while done < run.num_tokens:
            row, count = run.row + done, min(run.num_tokens - done, ELEMENTS - n % ELEMENTS)
            prefetch_rows(keys.codes, following + done, count)
            prefetch_rows(values.codes, following + done, count)
            lay_rows(shape, keys, row, count, scratch.tile, scratch.keys, n * key_dim, key_dim, PHASE)
            at = n % ELEMENTS * value_dim
            lay_rows(shape, values, row, count, scratch.tile, scratch.halves, at, value_dim, ELEMENTS)
            done += count
            n += count
            if n % ELEMENTS == 0:
                lay_values(shape, scratch.halves, n // ELEMENTS - 1, value_dim, scratch.values)
    if n % ELEMENTS != 0:  # weights of 0 follow, and 0 times NaN would be NaN
        for part in range(shape.parts):
            first = (part * ELEMENTS + n % ELEMENTS) * value_dim
            scratch.halves[first : (part + 1) * ELEMENTS * value_dim] = 0
        lay_values(shape, scratch.halves, n // ELEMENTS, value_dim, scratch.values)
    return n


@plain
def lay_rows(shape, rows, first, count, decoded, out, to, width, most):
    """Rows of the storage as bfloat16 into out[to:], each in `width` elements; parts are `most` rows apart."""
    head_dim, parts = rows.head_dim, shape.parts
    if parts > 1:
        decode_rows(rows, first, count, decoded, 0)
    if width == head_dim:
        if parts == 1:
            decode_rows(rows, first, count, out, to)
        else:
            lay_parts(shape, decoded, 0, count * head_dim, out, to, most * width)
        return
    for n in range(count):
        at = to + n * width
        if parts == 1:
            decode_rows(rows, first + n, 1, out, at)
        else:
            lay_parts(shape, decoded, n * head_dim, head_dim, out, at, most * width)
        for part in range(parts):
            out[at + part * most * width + head_dim : at + part * most * width + width] = 0


@plain
def finish_phases(shape, rows, value_dim, scratch):
    """Turn the totals, so that the elements of a row lie side by side."""
    groups = (rows + shape.group - 1) // shape.group
    turn_tiles(scratch.total, groups * shape.group * padded_value(value_dim) // (TILE // 4))


@plain
def store_row(shape, reading, r, offset, factor, scratch, target, value_dim):
    """The total of row r, plus `offset`, times `factor`."""
    total, group = scratch.total, shape.group
    at = r // group * group * padded_value(value_dim) + r % group // TILE_ROWS * (TILE // 4)
    at += r % TILE_ROWS * TILE_ROWS
    for first in range(0, value_dim, TILE_ROWS):
        for d in range(TILE_ROWS):
            target[first + d] = (total[at + d] + offset) * factor
        at += group * TILE_ROWS


def _parts_of(e: Emitter, x: ir.Value, parts: int) -> list[ir.Value]:
    """x as bfloat16 bits: the nearest, then the nearest of what is left. Nothing is left of infinity."""
    b, found = e.builder, []
    for part in range(parts):
        bits = nearest_bfloat16(e, x)
        found.append(bits)
        if part < parts - 1:
            rest = b.fsub(x, b.bitcast(b.shl(b.zext(bits, vector(I32)), constant(16, I32)), vector(F32)))
            x = b.select(b.fcmp_ordered("ord", rest, rest), rest, constant(0.0))
    return found


@intrinsic
def lay_query(typing, shape, q, start, r, head_dim, query):
    """A row of queries, as parts, into its column: each pair of elements has a row of a tile."""
    signature = types.void(shape, q, types.intp, types.intp, types.intp, query)
    static = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, q, start, r, head_dim, query = e.arguments(signature, args)
        source = q.start + start * 4
        steps = (head_dim + (ELEMENTS - 1)) // ELEMENTS
        column = query.start + (r // TILE_ROWS * steps * TILE + r % TILE_ROWS * 4)
        plane = steps * (static.columns // TILE_ROWS * TILE)

        def chunk(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            x = e.load(source + i * (4 * LANES), vector(F32))
            for part, bits in enumerate(_parts_of(e, x, static.parts)):
                pairs = b.bitcast(bits, vector(I32, LANES // 2))
                target = column + (plane * part + i * (LANES // 2 * TILE_BYTES))
                for n in range(LANES // 2):
                    e.store(b.extract_element(pairs, I32(n)), target + n * TILE_BYTES)
            return []

        e.loop(head_dim // LANES, [], chunk)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def lay_parts(typing, shape, x, start, count, out, to, plane):
    """x[start : start + count] as parts into out[to:], `plane` elements apart."""
    signature = types.void(shape, x, types.intp, types.intp, out, types.intp, types.intp)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, x, start, count, out, to, plane = e.arguments(signature, args)
        source, target = x.start + start * 4, out.start + to * 2

        def chunk(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            loaded = e.load(source + i * (4 * LANES), vector(F32))
            for part, bits in enumerate(_parts_of(e, loaded, static.parts)):
                e.store(bits, target + (plane * (2 * part) + i * (2 * LANES)))
            return []

        e.loop(count // LANES, [], chunk)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def lay_values(typing, shape, halves, section, value_dim, values):
    """32 rows of bfloat16, of each part, transposed as a section of the phase's values."""
    signature = types.void(shape, halves, types.intp, types.intp, values)
    static = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, halves, section, value_dim, values = e.arguments(signature, args)
        row_bytes = value_dim * 2
        plane = (value_dim + (GROUP - 1)) // GROUP * (GROUP * PHASE * 2)
        neighbours = [element + token * TILE_ROWS for element in range(TILE_ROWS) for token in range(2)]

        def elements(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            for part in range(static.parts):
                source = halves.start + (row_bytes * (part * ELEMENTS) + i * (2 * TILE_ROWS))
                pairs = []
                for pair in range(PAIRS):
                    rows = (source + row_bytes * (2 * pair + token) for token in range(2))
                    two = (e.load(row, vector(I16, TILE_ROWS)) for row in rows)
                    pairs.append(b.bitcast(e.shuffle(*two, neighbours), vector(I32, TILE_ROWS)))
                target = values.start + (plane * part + (i * SECTIONS + section) * TILE)
                for d, row in enumerate(transposed(e, pairs)):
                    e.store(row, target + d * TILE_BYTES)
            return []

        e.loop(value_dim // TILE_ROWS, [], elements)
        return context.get_dummy_value()

    return signature, generate


def transposed(e: Emitter, rows: list[ir.Value]) -> list[ir.Value]:
    """Lane i of vector j becomes lane j of vector i, of as many vectors as they have lanes."""
    count = len(rows)
    distance = count // 2
    while distance:
        turned = list(rows)
        for i in range(count):
            if not i & distance:
                x, y = rows[i], rows[i | distance]
                low = [lane if not lane & distance else count + (lane ^ distance) for lane in range(count)]
                high = [lane | distance if not lane & distance else count + lane for lane in range(count)]
                turned[i], turned[i | distance] = e.shuffle(x, y, low), e.shuffle(x, y, high)
        rows = turned
        distance //= 2
    return rows


@intrinsic
def turn_tiles(typing, x, count):
    """Transpose each of the first `count` tiles of x, in place."""
    signature = types.void(x, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        x, count = e.arguments(signature, args)

        def tile(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            where = x.start + i * TILE
            rows = [e.load(where + r * TILE_BYTES, vector(F32, TILE_ROWS)) for r in range(TILE_ROWS)]
            for r, row in enumerate(transposed(e, rows)):
                e.store(row, where + r * TILE_BYTES)
            return []

        e.loop(count, [], tile)
        return context.get_dummy_value()

    return signature, generate


class _Group:
    """The columns of a group as vectors: their state, and where a vector of them lies in rows of tiles."""

    def __init__(self, e: Emitter, shape: Shape, column: Int, scratch: Any) -> None:
        self._e, self._shape, self._scratch = e, shape, scratch
        self._first = column // LANES
        self.vectors = range(shape.group // LANES)

    def part(self, v: int) -> Int:
        """The number of a vector among those of the state."""
        return self._first + v

    def at(self, name: int, v: int) -> Pointer:
        """Where a vector of a row of the state lies."""
        return state_at(self._scratch.state, name, self._shape, self.part(v))

    def load(self, name: int) -> list[ir.Value]:
        """A row of the state."""
        return [self._e.load(self.at(name, v), vector(F32)) for v in self.vectors]

    def store(self, name: int, values: list[ir.Value]) -> None:
        """Write a row of the state."""
        for v, value in zip(self.vectors, values, strict=True):
            self._e.store(value, self.at(name, v))

    @staticmethod
    def offset(v: int) -> int:
        """Bytes from the tile of the first columns to a vector, in a row of tiles."""
        return v * LANES // TILE_ROWS * TILE + v * LANES % TILE_ROWS * 4


def _is_settled(e: Emitter, top: ir.Value) -> ir.Value:
    """Of which columns the maximum has been found."""
    return e.builder.fcmp_ordered(">", top, constant(LEAST))


def _rate(parts: int) -> float:
    """What scores are counted in: powers of 2 where weights are rounded anyway, else those of e."""
    return LOG2_E if parts == 1 else 1.0


@intrinsic
def weigh(typing, shape, k_parts, column, sections, known, phase, head_dim, masks, scratch):
    """Weights of some sections of 32 keys in `scratch.weights`; their sums in RESCALE, their maxima in PHASE_MAX.

    Maxima are relative to those before. Of keys up to `known` nothing is masked, capped or biased. Returns whether a
    maximum was too low: then the weights are of no use before `raise_maxima`.
    """
    signature = types.boolean(shape, *[types.intp] * 4, phase, types.intp, masks, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        return _weigh(e, static, *e.arguments(signature, args)[1:])

    return signature, generate


def _weigh(
    e: Emitter,
    shape: Shape,
    k_parts: Int,
    column: Int,
    sections: Int,
    known: Int,
    phase: Any,
    head_dim: Int,
    masks: Any,
    scratch: Any,
) -> ir.Value:
    b, parts, tiles = e.builder, shape.parts, Tiles(e, shape.instructions)
    wide = shape.group // TILE_ROWS  # tiles of columns
    steps = (head_dim + (ELEMENTS - 1)) // ELEMENTS
    key_bytes = steps * TILE_BYTES
    key_plane, query_plane = key_bytes * PHASE, steps * (shape.columns // TILE_ROWS * TILE)
    query = scratch.query.start + column // TILE_ROWS * steps * TILE
    products = steps * parts * (wide // 2)
    if parts > 1:  # of key part i with parts - i parts of the query
        products = steps * ((2 * parts + 1 - k_parts) * k_parts // 2 * (wide // 2))
    share = (products + (PAIRS - 1)) // products

    group = _Group(e, shape, column, scratch)
    rate = _rate(parts)
    tops = group.load(ROW_MAX)
    settled = [_is_settled(e, top) for top in tops]
    nothing = constant(0.0)
    references = [
        b.select(known_top, b.fmul(top, constant(-rate)), nothing)
        for known_top, top in zip(settled, tops, strict=True)
    ]
    steps_of_scores = group.load(QUERY_STEP)

    def half(i: Int) -> Pointer:
        """Where the scores of a section lie."""
        return scratch.scores.start + i % 2 * (2 * wide * TILE)

    def multiply(section: Int | int, two: Int, i: Int | int, j: Int | int, k: Int) -> Iterator[None]:
        """Four tiles of scores, of two tiles of columns: 32 elements of part i of the keys and part j of the query."""
        keys = scratch.keys.start + (key_plane * i + key_bytes * section * ELEMENTS + k * TILE_BYTES)
        queries = query + (query_plane * j + (steps * two * 2 + k) * TILE)
        return _outer(
            tiles,
            lambda y: tiles.load(LEFT[y], keys + key_bytes * (y * TILE_ROWS), key_bytes),
            lambda x: tiles.load(RIGHT[x], queries + steps * (x * TILE), TILE_BYTES),
        )

    def exponentiate(section: Int, pair: Int, v: int, found: list[ir.Value]) -> list[ir.Value]:
        """The weights of two keys in a vector of columns; `found` are the vector's sum and its maximum."""
        total, top = found
        offset = group.offset(v)
        source = half(section) + (pair // 8 * (wide * TILE) + pair % 8 * (2 * TILE_BYTES))
        target = scratch.weights.start + (section * (wide * TILE) + pair * TILE_BYTES)
        two = []
        for t in range(2):
            x = e.load(source + (offset + t * TILE_BYTES), vector(F32))
            x = e.fma(x, factors[v], references[v])
            top = e.max(x, top)
            two.append(x)
        words, more = _weights_of(e, two, parts)
        for part, bits in enumerate(words):
            e.store(bits, target + (offset + part * (PHASE * 2 * shape.group)))
        return [e.add(total, more), top]

    def several(section: Int, done: Int, count: Int, v: int, carried: list[ir.Value]) -> list[ir.Value]:
        """The same for `count` pairs of keys; `carried` are all vectors' sums and maxima."""
        mine = slice(2 * v, 2 * v + 2)
        found = e.loop(count, carried[mine], lambda n, c: exponentiate(section, done + n, v, c))
        return [*carried[: 2 * v], *found, *carried[2 * v + 2 :]]

    def scores(section: Int | int, carried: list[ir.Value], between: Callable[..., Any]) -> list[ir.Value]:
        """Scores of a section; ``carried = between(n, carried)`` after each tile instruction, of the n-th sum."""

        def columns(two: Int, carried: list[ir.Value]) -> list[ir.Value]:
            """Of two tiles of columns."""
            for tile in range(4):
                tiles.zero(tile)

            def product(i: Int | int, j: Int | int, k: Int, carried: list[ir.Value]) -> list[ir.Value]:
                for n, _ in enumerate(multiply(section, two, i, j, k)):
                    carried = between(n, carried)
                return carried

            carried = _each_product(e, parts, k_parts, steps, carried, product)
            for tile in range(4):
                where = half(section) + (two * (2 * TILE) + (tile // 2 * wide + tile % 2) * TILE)
                tiles.store(tile, where, TILE_BYTES)
            return carried

        return e.loop(wide // 2, carried, columns)

    def finish(section: Int) -> None:
        """Before a section's weights: see to what is masked, capped or biased; then scores are scaled already."""
        nonlocal factors
        key = section * ELEMENTS
        last = key + (ELEMENTS - 1)
        unknown = b.not_(b.and_(last < phase.num_tokens, phase.key + last <= known))
        with b.if_then(unknown):
            _finish(e, shape, group, half(section), key, phase, masks, scratch, steps_of_scores)
        unmasked = e.splat(b.not_(unknown))
        factors = [
            b.select(unmasked, b.fmul(step, constant(rate)), constant(rate)) for step in steps_of_scores
        ]

    def both(n: Int, carried: list[ir.Value]) -> list[ir.Value]:
        """The weights of a section, between the products of the next."""
        finish(n)

        def between(dot: int, carried: list[ir.Value]) -> list[ir.Value]:
            done = Int(b, carried[0])
            count, carried = (PAIRS - done).at_most(share), carried[1:]
            for v in group.vectors[dot::4]:
                carried = several(n, done, count, v, carried)
            following = done + count if dot == 3 else done
            return [following.value, *carried]

        return scores(n + 1, [I64(0), *carried], between)[1:]

    factors: list[ir.Value] = []
    carried = [nothing, constant(float("-inf"))] * len(group.vectors)
    scores(0, [], lambda dot, carried: carried)
    carried = e.loop(sections - 1, carried, both)
    finish(sections - 1)
    for v in group.vectors:
        carried = several(sections - 1, Int(b, I64(0)), Int(b, I64(PAIRS)), v, carried)
    sums, found = carried[::2], carried[1::2]
    group.store(RESCALE, sums)
    group.store(PHASE_MAX, found)
    late = ir.Constant(ir.IntType(1), 0)
    for top, known_top in zip(found, settled, strict=True):
        most = b.select(known_top, constant(HEADROOM * rate), constant(SEEN))
        late = b.or_(late, e.any(b.fcmp_ordered(">", top, most)))
    return late


def _each_product(
    e: Emitter, parts: int, left_parts: Int, count: Int, carried: list[ir.Value], body: Callable[..., Any]
) -> list[ir.Value]:
    """``carried = body(i, j, k, carried)`` for `count` k of part i of the left factor and part j of the right.

    Products of the smaller parts, which are less than the last bit, are left out.
    """

    def each(i: Int | int, j: Int | int, carried: list[ir.Value]) -> list[ir.Value]:
        return e.loop(count, carried, lambda k, c: body(i, j, k, c))

    if parts == 1:
        return each(0, 0, carried)
    return e.loop(left_parts, carried, lambda i, c: e.loop(parts - i, c, lambda j, c: each(i, j, c)))


def _outer(tiles: Tiles, left: Callable[[int], None], right: Callable[[int], None]) -> Iterator[None]:
    """The four sums += the products of two tiles with two, each loaded just before it is used; one at each turn."""
    for y in range(2):
        left(y)
        for x in range(2):
            if y == 0:
                right(x)
            tiles.dot_bfloat16(2 * y + x, LEFT[y], RIGHT[x])
            yield


def _weights_of(e: Emitter, two: list[ir.Value], parts: int) -> tuple[list[ir.Value], ir.Value]:
    """The weights of two scores: a vector for each part, side by side as bfloat16; and their sum."""
    b = e.builder
    upper = constant(UPPER, I32)
    if parts == 1:
        bits = [b.and_(b.bitcast(_exp2(e, x), vector(I32)), upper) for x in two]
        # what is multiplied is what is summed: the rounding of weights cancels
        total = e.add(*(b.bitcast(x, vector(F32)) for x in bits))
        return [b.or_(b.lshr(bits[0], constant(16, I32)), bits[1])], total
    rest = [e.exp(x) for x in two]
    total = e.add(*rest)
    words = []
    for _ in range(parts):
        bits = [b.and_(b.bitcast(x, vector(I32)), upper) for x in rest]
        words.append(b.or_(b.lshr(bits[0], constant(16, I32)), bits[1]))
        rest = [b.fsub(x, b.bitcast(y, vector(F32))) for x, y in zip(rest, bits, strict=True)]
    return words, total


def _exp2(e: Emitter, x: ir.Value) -> ir.Value:
    """2**x, a little more, see EXP2; where x is HIDDEN bfloat16 has no bits of it."""
    fraction, whole = e.split(x)
    p = constant(EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        p = e.fma(p, fraction, constant(coefficient))
    return e.scale(p, whole)


def _finish(
    e: Emitter,
    shape: Shape,
    group: _Group,
    scores: Pointer,
    key: Int,
    phase: Any,
    masks: Any,
    scratch: Any,
    steps: list[ir.Value],
) -> None:
    """Scale, cap, bias and mask the scores of a section, in place."""
    wide = shape.group // TILE_ROWS

    def one(t: Int, _: list[ir.Value]) -> list[ir.Value]:
        row = scores + (t // TILE_ROWS * (wide * TILE) + t % TILE_ROWS * TILE_BYTES)
        for v in group.vectors:
            where = row + group.offset(v)
            score = e.mul(e.load(where, vector(F32)), steps[v])
            score = finish_scores(e, shape, group.part(v), score, key + t, phase, masks, scratch)
            masked = e.builder.fcmp_ordered("<", score, constant(HIDDEN))  # NaN is not
            e.store(e.builder.select(masked, constant(HIDDEN), score), where)
        return []

    e.loop(ELEMENTS, [], one)


@intrinsic
def raise_maxima(typing, shape, column, value_dim, scratch):
    """Take the maxima found into those of the rows, and rescale the sums of a group to them."""
    signature = types.void(shape, types.intp, types.intp, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, column, value_dim, scratch = e.arguments(signature, args)
        group = _Group(e, static, column, scratch)
        maxima, rescale = [], []
        for before, top in zip(group.load(ROW_MAX), group.load(PHASE_MAX), strict=True):
            settled = _is_settled(e, before)
            found = b.fmul(top, constant(1 / _rate(static.parts)))
            seen = b.fcmp_ordered(">", top, b.select(settled, constant(0.0), constant(SEEN)))
            now = b.select(seen, b.select(settled, b.fadd(before, found), found), before)
            maxima.append(now)
            rescale.append(b.select(settled, e.exp(b.fsub(before, now)), constant(1.0)))
        group.store(ROW_MAX, maxima)
        group.store(ROW_SUM, [e.mul(x, r) for x, r in zip(group.load(ROW_SUM), rescale, strict=True)])
        total = scratch.total.start + column * value_dim * 4
        width = static.group // TILE_ROWS * TILE

        def rows(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            row = total + (i // TILE_ROWS * width + i % TILE_ROWS * TILE_BYTES)
            for v, factor in zip(group.vectors, rescale, strict=True):
                where = row + group.offset(v)
                e.store(e.mul(e.load(where, vector(F32)), factor), where)
            return []

        e.loop(value_dim, [], rows)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_values(typing, shape, v_parts, column, sections, value_dim, scratch):
    """Add the weighted values of some sections of the phase to the totals of a group."""
    signature = types.void(shape, *[types.intp] * 4, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _add_values(e, static, *e.arguments(signature, args)[1:])
        return context.get_dummy_value()

    return signature, generate


def _add_values(
    e: Emitter, shape: Shape, v_parts: Int, column: Int, sections: Int, value_dim: Int, scratch: Any
) -> None:
    parts, tiles = shape.parts, Tiles(e, shape.instructions)
    wide = shape.group // TILE_ROWS
    value_plane, weight_plane = value_dim * (PHASE * 2), PHASE * 2 * shape.group
    total = scratch.total.start + column * value_dim * 4

    def columns(n: Int, _: list[ir.Value]) -> list[ir.Value]:
        """Two tiles of elements by two of columns."""
        d, two = n // (wide // 2) * 2, n % (wide // 2) * 2
        sums = [total + ((d + tile // 2) * wide + two + tile % 2) * TILE for tile in range(4)]
        for tile in range(4):
            if parts == 1:
                tiles.load(tile, sums[tile], TILE_BYTES)
            else:  # one running sum over a long sequence would round its tail away
                tiles.zero(tile)

        def product(i: Int | int, j: Int | int, section: Int, _: list[ir.Value]) -> list[ir.Value]:
            values = scratch.values.start + (value_plane * i + (d * SECTIONS + section) * TILE)
            weights = scratch.weights.start + ((section * wide + two) * TILE + j * weight_plane)
            products = _outer(
                tiles,
                lambda y: tiles.load(LEFT[y], values + y * (SECTIONS * TILE), TILE_BYTES),
                lambda x: tiles.load(RIGHT[x], weights + x * TILE, TILE_BYTES),
            )
            for _ in products:
                pass
            return []

        _each_product(e, parts, v_parts, sections, [], product)
        for tile in range(4):
            if parts == 1:
                tiles.store(tile, sums[tile], TILE_BYTES)
            else:
                found = scratch.scores.start + tile * TILE
                tiles.store(tile, found, TILE_BYTES)
                for offset in range(0, TILE, 4 * LANES):
                    where = sums[tile] + offset
                    e.store(e.add(e.load(where, vector(F32)), e.load(found + offset, vector(F32))), where)
        return []

    e.loop(value_dim // GROUP * (wide // 2), [], columns)
