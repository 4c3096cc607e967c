"""Micro-kernels for many rows of queries on tile instructions, as of prompts.

Everything is transposed, with a column for each row of queries:

    scores   S^T = K Q^T          16 keys by 32 elements of head_dim, times 32 elements by 16 columns
    weights  P^T = exp(S^T)       a vector is columns of one key: maxima, sums and rescaling shuffle no lanes, and the
                                  weights of two keys side by side are what the next product wants
    values   O^T += V^T P^T       16 elements of values by 32 keys, times 32 keys by 16 columns

The keys and values of a phase are staged once for all columns: brought to bfloat16, values transposed. Then some
columns at a time (a group) take the whole phase. Their softmax is optimistic: weights are computed against the maximum
known before, which only has to come within HEADROOM of the truth; it is compared after the phase, and where it was too
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

from kvnumba.backends.cpu.codecs import FLOAT32
from kvnumba.backends.cpu.jit import inlined, plain
from kvnumba.backends.cpu.mods import call_modify
from kvnumba.backends.cpu.runs import runs_ahead
from kvnumba.backends.cpu.shapes import (
    LEAST,
    PHASE_MAX,
    QUERY_STEP,
    RESCALE,
    ROW_MAX,
    ROW_SUM,
    STATE_ROWS,
    Reading,
    Shape,
    finish_scores,
    state_at,
)
from kvnumba.backends.cpu.simd import (
    F32,
    HIDDEN,
    I1,
    I32,
    I64,
    LANES,
    LOG2_E,
    Emitter,
    Int,
    Pointer,
    constant,
    vector,
)
from kvnumba.backends.cpu.tile_layout import (
    ELEMENTS,
    PAIRS,
    PHASE,
    SECTIONS,
    lay_query,
    padded_key,
    stage,
    turn_tiles,
)
from kvnumba.backends.cpu.tiles import TILE, TILE_BYTES, TILE_ROWS, WIDEST, Tiles
from kvnumba.formats import FORMATS

ROWS = (64, 1024)
"""Numbers of rows that kernels are compiled for."""

GROUP = 64  # columns: four tiles, whose sums with a tile of values are held at once

SCORES = 2 * ELEMENTS  # of a column: those of a section of 32 keys, and of the one before

HEADROOM = 5.5  # the logarithm of the greatest weight before a phase is repeated
MOST_TURNS = 4  # of a phase: maxima beyond 1e7 are rounded by more than HEADROOM
FAR = 1e6  # a maximum that rises by more, as from a sink that stands for none, is found anew: the sum would be rounded

PARTS = np.array(
    [{"bfloat16": 1, "fp8_e4m3": 1, "float16": 2}.get(name, 3) for name in (*FORMATS, "registered")]
)
"""bfloat16 numbers that hold a number of each format exactly."""

FACTORS = {2: ((4, 5), (6, 7)), 4: ((4,), (5, 6, 7, 5))}
"""Tiles for the left and the right factors of four sums, which are in tiles 0 to 3: 2 by 2, or 1 by 4."""

SEEN = -1e29  # what scores are greater than
UPPER = -65536  # the bits that a bfloat16 has of a float32
HALF_BIT = 1 << 15  # of the last of them: added, it rounds


@functools.cache
def shape(rows: int, scale_dtype: str, parts: int, instructions: str) -> Shape:
    """The shape for a number of ROWS, of `parts` bfloat16 numbers for one."""
    return Shape(
        scale_dtype, __name__, rows, rows, 1, 1, 1, PHASE, group=GROUP, parts=parts, instructions=instructions
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
        Of the columns' tokens.
    key_positions : (PHASE,) int32
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
    lanes : (n,) int32
        As in `Scratch`.
    """

    state: Any
    positions: Any
    key_positions: Any
    query: Any
    keys: Any
    values: Any
    weights: Any
    scores: Any
    total: Any
    tile: Any
    halves: Any
    lanes: Any


def scratch_floats(shape, head_dim, value_dim):
    """Floats that `cut_scratch` cuts up."""
    key = padded_key.py_func(head_dim)
    halves = shape.parts * (shape.columns * key + PHASE * (key + value_dim + shape.group))
    return (
        STATE_ROWS * shape.width
        + PHASE
        + halves // 2
        + SCORES * shape.group
        + shape.columns * value_dim
        + ELEMENTS * max(key, value_dim)
        + shape.parts * ELEMENTS // 2 * value_dim
    )


@inlined
def cut_scratch(shape, head_dim, value_dim, floats, positions):
    """A worker's memory as the arrays that its phases use."""
    key, parts = padded_key(head_dim), shape.parts
    state = floats[: STATE_ROWS * shape.width].reshape(STATE_ROWS, shape.width)
    used = STATE_ROWS * shape.width
    key_positions = floats[used : used + PHASE].view(np.int32)
    used += PHASE
    size = parts * shape.columns * key // 2
    query = floats[used : used + size].view(np.uint16)
    used += size
    size = parts * PHASE * key // 2
    keys = floats[used : used + size].view(np.uint16)
    used += size
    size = parts * PHASE * value_dim // 2
    values = floats[used : used + size].view(np.uint16)
    used += size
    size = parts * PHASE * shape.group // 2
    weights = floats[used : used + size].view(np.uint16)
    used += size
    scores = floats[used : used + SCORES * shape.group]
    used += SCORES * shape.group
    size = shape.columns * value_dim
    total = floats[used : used + size]
    used += size
    tile = floats[used : used + ELEMENTS * max(key, value_dim)]
    used += ELEMENTS * max(key, value_dim)
    halves = floats[used : used + parts * ELEMENTS // 2 * value_dim].view(np.uint16)
    return TileScratch(
        state,
        positions[: shape.width],
        key_positions,
        query,
        keys,
        values,
        weights,
        scores,
        total,
        tile,
        halves,
        positions[shape.width :],
    )


@plain
def choose(keys, values, scoring):
    """All rows are staged."""
    return Reading(False, False, FLOAT32, FLOAT32, np.float32(-1))


@plain
def load_query(shape, reading, q, start, r, head_dim, sm_scale, query):
    """A row of queries, not scaled: those that came in bfloat16 are exact as they are. QUERY_STEP scales the scores."""
    lay_query(shape, q, start, r, head_dim, query)
    return sm_scale, np.float32(0)


@inlined
def attend_phase(shape, reading, storage, runs, num_runs, rows, masks, scratch):
    """Attend to the keys of some runs, a group of columns after the other."""
    keys, values = storage.keys, storage.values
    count = stage(shape, keys, values, runs, num_runs, runs_ahead(storage.block_size), scratch)
    k_parts, v_parts = min(shape.parts, PARTS[keys.fmt]), min(shape.parts, PARTS[values.fmt])
    value_dim = values.head_dim
    state, positions, key_positions, group = (
        scratch.state, scratch.positions, scratch.key_positions, shape.group,
    )  # fmt: skip
    for column in range(0, rows, group):
        oldest, newest = positions[column], positions[min(column + group, rows) - 1]
        if newest < key_positions[0] or oldest - masks.reach > key_positions[count - 1]:
            continue
        seen = count
        while key_positions[seen - 1] > newest:
            seen -= 1
        known = np.int64(oldest) if masks.seen_by_all >= 0 and masks.modify == 0 else np.int64(-1)
        sections = (seen + ELEMENTS - 1) // ELEMENTS
        # the first keys tell about where the maximum is
        late = state[ROW_MAX, column] == np.float32(LEAST)
        if late:
            weigh(shape, k_parts, column, 1, known, count, keys.head_dim, masks, scratch)
        for _ in range(MOST_TURNS):
            if late:
                raise_maxima(shape, column, value_dim, scratch)
            late = weigh(shape, k_parts, column, sections, known, count, keys.head_dim, masks, scratch)
            if not late:
                break
        for c in range(column, column + group):
            state[ROW_SUM, c] += state[RESCALE, c]
        add_values(shape, v_parts, column, sections, value_dim, scratch)


@plain
def finish_phases(shape, rows, value_dim, total):
    """Turn the totals, so that the elements of a row lie side by side."""
    groups = (rows + shape.group - 1) // shape.group
    turn_tiles(total, groups * shape.group * value_dim // (TILE // 4))


@plain
def store_row(shape, reading, r, offset, factor, total, target, value_dim):
    """The total of row r, plus `offset`, times `factor`."""
    group = shape.group
    at = r // group * group * value_dim + r % group // TILE_ROWS * (TILE // 4)
    at += r % TILE_ROWS * TILE_ROWS
    for first in range(0, value_dim, TILE_ROWS):
        for d in range(TILE_ROWS):
            target[first + d] = (total[at + d] + offset) * factor
        at += group * TILE_ROWS


class _Group:
    """The columns of a group as vectors: their state, and where a vector of them lies in rows of tiles."""

    def __init__(self, e: Emitter, shape: Shape, column: Int, scratch: Any) -> None:
        self._e, self._shape, self._scratch = e, shape, scratch
        self.column, self._first = column, column // LANES
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
def weigh(typing, shape, k_parts, column, sections, known, count, head_dim, masks, scratch):
    """Weights of some sections of 32 keys in `scratch.weights`; their sums in RESCALE, their maxima in PHASE_MAX.

    Maxima are relative to those before. The phase has `count` keys; of those up to position `known` nothing is masked,
    capped or biased. Returns whether a maximum was too low: then the weights are of no use before `raise_maxima`.
    """
    signature = types.boolean(shape, *[types.intp] * 6, masks, scratch)
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
    count: Int,
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
    # of key part i with parts - i parts of the query
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
    factors: list[ir.Value] = []

    def half(i: Int | int) -> Pointer:
        """Where the scores of a section lie."""
        return scratch.scores.start + i % 2 * (2 * wide * TILE)

    def multiply(section: Int | int, two: Int, i: Int | int, j: Int | int, k: Int) -> Iterator[None]:
        """Four tiles of scores, of two tiles of columns: 32 elements of part i of the keys and part j of the query."""
        keys = scratch.keys.start + (key_plane * i + key_bytes * section * ELEMENTS + k * TILE_BYTES)
        queries = query + (query_plane * j + (steps * two * 2 + k) * TILE)
        return _outer(
            tiles,
            2,
            lambda tile, y: tiles.load(tile, keys + key_bytes * (y * TILE_ROWS), key_bytes),
            lambda tile, x: tiles.load(tile, queries + steps * (x * TILE), TILE_BYTES),
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
        key = section * ELEMENTS
        last = key + (ELEMENTS - 1)
        unknown = b.not_(b.and_(last < count, _position(e, scratch, last) <= known))
        with b.if_then(unknown):
            _finish(e, shape, group, half(section), key, count, masks, scratch, steps_of_scores)
        unmasked = e.splat(b.not_(unknown))
        factors[:] = [
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

    carried = [nothing, constant(float("-inf"))] * len(group.vectors)
    scores(0, [], lambda dot, carried: carried)
    carried = e.loop(sections - 1, carried, both)
    finish(sections - 1)
    for v in group.vectors:
        carried = several(sections - 1, Int(b, I64(0)), Int(b, I64(PAIRS)), v, carried)
    sums, found = carried[::2], carried[1::2]
    group.store(RESCALE, sums)
    group.store(PHASE_MAX, found)
    late = ir.Constant(I1, 0)
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


def _outer(
    tiles: Tiles, wide: int, load_left: Callable[[int, int], None], load_right: Callable[[int, int], None]
) -> Iterator[None]:
    """The four sums += the products of 4 / `wide` tiles with `wide` tiles; one at each turn.

    ``load_left(tile, y)`` and ``load_right(tile, x)`` load the factors just before they are used.
    """
    left, right = FACTORS[wide]
    for y, tile in enumerate(left):
        load_left(tile, y)
        for x in range(wide):
            if y == 0:
                load_right(right[x], x)
            tiles.dot_bfloat16(wide * y + x, tile, right[x])
            yield


def _weights_of(e: Emitter, two: list[ir.Value], parts: int) -> tuple[list[ir.Value], ir.Value]:
    """The weights of two scores: a vector for each part, side by side as bfloat16; and their sum."""
    b = e.builder
    upper = constant(UPPER, I32)
    if parts == 1:
        rest = [e.exp2(x) for x in two]
        bits = [b.add(b.bitcast(x, vector(I32)), constant(HALF_BIT, I32)) for x in rest]
        return [b.or_(b.lshr(bits[0], constant(16, I32)), b.and_(bits[1], upper))], e.add(*rest)
    rest = [e.exp(x) for x in two]
    total = e.add(*rest)
    words = []
    for _ in range(parts):
        bits = [b.and_(b.bitcast(x, vector(I32)), upper) for x in rest]
        words.append(b.or_(b.lshr(bits[0], constant(16, I32)), bits[1]))
        rest = [b.fsub(x, b.bitcast(y, vector(F32))) for x, y in zip(rest, bits, strict=True)]
    return words, total


def _position(e: Emitter, scratch: Any, key: Int) -> Int:
    """Where a key of the phase stands in the sequence."""
    return Int(e.builder, e.builder.sext(e.load(scratch.key_positions.start + key * 4, I32), I64))


def _finish(
    e: Emitter,
    shape: Shape,
    group: _Group,
    scores: Pointer,
    key: Int,
    count: Int,
    masks: Any,
    scratch: Any,
    steps: list[ir.Value],
) -> None:
    """Scale, cap, bias and mask the scores of a section, in place."""
    wide = shape.group // TILE_ROWS

    def each(change: Callable[[Int, int, ir.Value], ir.Value]) -> None:
        """``score = change(t, v, score)`` for key t of the section and vector v of columns."""

        def one(t: Int, _: list[ir.Value]) -> list[ir.Value]:
            row = scores + (t // TILE_ROWS * (wide * TILE) + t % TILE_ROWS * TILE_BYTES)
            for v in group.vectors:
                where = row + group.offset(v)
                e.store(change(t, v, e.load(where, vector(F32))), where)
            return []

        e.loop(ELEMENTS, [], one)

    def finished(t: Int, v: int, score: ir.Value) -> ir.Value:
        position, left = _position(e, scratch, key + t), count - (key + t)
        return finish_scores(e, shape, group.part(v), e.mul(score, steps[v]), position, left, masks, scratch)

    def visible(t: Int, v: int, score: ir.Value) -> ir.Value:
        masked = e.builder.fcmp_ordered("<", score, constant(HIDDEN))  # NaN is not
        return e.builder.select(masked, constant(HIDDEN), score)

    def modify_tile(tile: int) -> None:
        """Of 16 keys and columns: at once, or one key after the other where some between them are not there."""
        first = key + tile // wide * TILE_ROWS
        last = (count - 1).at_most(first + (TILE_ROWS - 1))
        gaps = _position(e, scratch, last) - _position(e, scratch, first) > last - first
        rows, turns = (
            Int(e.builder, e.builder.select(gaps, I64(few), I64(all_)))
            for few, all_ in ((1, TILE_ROWS), (TILE_ROWS, 1))
        )
        lanes = scratch.lanes.start + (group.column * 4 + tile % wide * TILE_BYTES)

        def some(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            at, position = (
                scores + (i * rows * TILE_BYTES + tile * TILE),
                _position(e, scratch, first + i * rows),
            )
            call_modify(e, masks, at, rows * TILE_ROWS, position, 1, lanes, TILE_ROWS, shape)
            return []

        e.loop(turns, [], some)

    modified = e.builder.icmp_signed("!=", masks.modify.value, I64(0))
    with e.builder.if_else(modified) as (by_user, otherwise):
        with by_user:
            each(finished)
            for tile in range(ELEMENTS // TILE_ROWS * wide):
                modify_tile(tile)
            each(visible)
        with otherwise:
            each(lambda t, v, score: visible(t, v, finished(t, v, score)))


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
            far = b.and_(settled, b.fcmp_ordered(">", found, constant(FAR)))
            maxima.append(b.select(far, constant(LEAST), now))
            rescale.append(e.exp(b.fsub(before, now)))
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

    def elements(d: Int, _: list[ir.Value]) -> list[ir.Value]:
        """Four tiles of sums, of all columns."""
        sums = [total + (d * 4 + tile) * TILE for tile in range(4)]
        for tile in range(4):
            if parts == 1:
                tiles.load(tile, sums[tile], TILE_BYTES)
            else:  # one running sum over a long sequence would round its tail away
                tiles.zero(tile)

        def product(i: Int | int, j: Int | int, section: Int, none: list[ir.Value]) -> list[ir.Value]:
            values = scratch.values.start + (value_plane * i + (d * SECTIONS + section) * TILE)
            weights = scratch.weights.start + (section * (wide * TILE) + j * weight_plane)
            products = _outer(
                tiles,
                wide,
                lambda tile, _: tiles.load(tile, values, TILE_BYTES),
                lambda tile, x: tiles.load(tile, weights + x * TILE, TILE_BYTES),
            )
            for _ in products:
                pass
            return none

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

    e.loop(value_dim // TILE_ROWS, [], elements)
