"""Micro-kernels for many rows of queries, as of prompts: outer products, a matrix product in registers.

A vector holds a lane for each row of queries, and elements of keys and values are broadcast. They are multiplied in
float32, or in bfloat16 where that is asked for and the processor has it: what is stored otherwise is staged, brought to
that format in scratch. In bfloat16 a unit of 32 bits is a pair: of keys and queries two elements of head_dim, of values
and weights two tokens.

The columns are multiplied a group at a time, as many as have their sums in registers. What is staged serves all of
them, and the more there are, the less it costs.

Queries are (groups, padded head_dim, columns of a group), or in bfloat16 (groups, padded head_dim, columns, 2), of
which the first half is used.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu import phases
from kvnumba.backends.cpu.codecs import (
    ARITHMETICS,
    BFLOAT16,
    CODECS,
    FLOAT32,
    FloatCodec,
    decode_row,
    decode_rows,
    interleave_rows,
    nearest_bfloat16,
    side_by_side,
)
from kvnumba.backends.cpu.jit import each_run, inlined, plain
from kvnumba.backends.cpu.runs import RUN_KEY, RUN_TOKENS, run_of
from kvnumba.backends.cpu.shapes import (
    PHASE_MAX,
    QUERY_STEP,
    Masks,
    Reading,
    Scratch,
    Shape,
    finish_scores,
    is_known,
    padded,
    state_at,
)
from kvnumba.backends.cpu.simd import F32, LANES, Emitter, Int, constant, vector
from kvnumba.backends.cpu.weighing import weigh_rows

ROWS = (16, 256) if LANES == 16 else (256,)
"""Numbers of rows that kernels are compiled for."""

GROUP = 64 if LANES == 16 else 16  # columns whose sums, for four tokens, fit the registers

PHASE = 64  # tokens
LINES = 8  # of memory that are prefetched with each STRETCH; fewer, several times, where rows are shorter
STRETCH = 32  # elements of head_dim that are summed on their own: long sums would round their tail away
ROWS_TOGETHER = 4  # rows of queries whose values are summed at once


class _Pairs(FloatCodec):
    """bfloat16 of two tokens in each unit of 32 bits."""

    def multiply(self, e: Emitter, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
        return e.dot_bfloat16(x, y, total)


_FLOATS = CODECS[FLOAT32]
_PAIRS = _Pairs(_FLOATS.fmt, F32, lambda e, x: x, lambda e, x: x)


@functools.cache
def shape(rows: int, scale_dtype: str) -> Shape:
    """The shape for a number of ROWS."""
    group = min(rows, GROUP)
    vectors = group // LANES
    tokens = {1: 8, 2: 4, 4: 4}[vectors]
    return Shape(scale_dtype, __name__, rows, rows, tokens, vectors, 1, PHASE, group=group)


@plain
def choose(keys, values, scoring):
    """Rows are read in place if they are stored in the format of the products; pairs of values never are."""
    wanted = BFLOAT16 if scoring.bfloat16 and keys.head_dim % 2 == 0 else FLOAT32
    v_direct = values.fmt == FLOAT32 and wanted == FLOAT32
    return Reading(keys.fmt == wanted, v_direct, wanted, wanted, np.float32(-1))


@plain
def top_half(x):
    """The bits of a finite x as bfloat16, rounded to nearest even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@plain
def load_query(shape, reading, q, start, r, head_dim, sm_scale, query):
    """A row of queries, scaled.

    For products in bfloat16 it is not: queries that came in bfloat16 are exact as they are, and scaling would round
    them. There the scores are scaled, by QUERY_STEP.
    """
    first, column = r // shape.group * padded(head_dim), r % shape.group
    if reading.k_format == BFLOAT16:
        pairs = query.view(np.uint16).reshape(-1, 2 * shape.group)
        for d in range(head_dim):
            pairs[first + d // 2, 2 * column + d % 2] = top_half(q[start + d])
        return sm_scale, np.float32(0)
    query = query.reshape(-1, shape.group)
    for d in range(head_dim):
        query[first + d, column] = q[start + d] * sm_scale
    return np.float32(0), np.float32(0)


@plain
def tile_floats(shape, head_dim, value_dim):
    """Floats of scratch for the rows of a phase that are staged: keys in the first half, values in the second."""
    return 2 * (shape.phase + shape.tokens + 1) * max(head_dim, value_dim)


@plain
def first_value(tile, value_dim):
    """The number of the first row of values in its half."""
    return -(-tile.shape[0] // (2 * value_dim))


@inlined
def attend_phase(shape, reading, storage, runs, num_runs, rows, masks, scratch):
    """Stage the keys of some runs, and attend to them with a group of columns after the other."""
    keys, values = storage.keys, storage.values
    state, positions, query, group = scratch.state, scratch.positions, scratch.query, shape.group
    first, end = runs[0, RUN_KEY], runs[num_runs - 1, RUN_KEY] + runs[num_runs - 1, RUN_TOKENS]
    for n in range(num_runs):
        stage(shape, reading, keys, values, run_of(runs, n), scratch)
    size = group * padded(keys.head_dim)
    for column in range(0, rows, group):
        used = min(group, rows - column)
        oldest, newest = positions[column], positions[column + used - 1]
        if newest < first or oldest - masks.reach >= end:
            continue
        seen = num_runs
        while runs[seen - 1, RUN_KEY] > newest:
            seen -= 1
        last = runs[seen - 1, RUN_TOKENS]
        runs[seen - 1, RUN_TOKENS] = min(last, newest + 1 - runs[seen - 1, RUN_KEY])
        known = np.int64(oldest) if masks.seen_by_all >= 0 else np.int64(-1)
        start = column // group * size
        part = Scratch(
            state[:, column : column + group],
            positions[column : column + group],
            query[start : start + size],
            scratch.total[column : column + group],
            scratch.sums[:group],
            scratch.scores,
            scratch.tile,
            scratch.tile_halves,
            scratch.tile_bytes,
            scratch.lanes[column // group * shape.lanes :],
        )
        of_part = Masks(
            masks.reach, known, masks.soft_cap, masks.modify, masks.aux, masks.offset, masks.shift, masks.kept
        )
        phases.attend_phase(shape, reading, storage, runs, seen, used, of_part, part)
        runs[seen - 1, RUN_TOKENS] = last


@plain
def stage(shape, reading, keys, values, run, scratch):
    """Bring the rows of a run that are not read in place to the formats of the products."""
    token, value = run.scores // shape.columns, first_value(scratch.tile, values.head_dim)
    if not reading.k_direct:
        if reading.k_format == BFLOAT16:
            decode_rows(keys, run.row, run.num_tokens, scratch.tile_halves, token * keys.head_dim)
        else:
            decode_rows(keys, run.row, run.num_tokens, scratch.tile, token * keys.head_dim)
    if reading.v_format == BFLOAT16:
        stage_pairs(values, run, scratch.tile_halves, (2 * value + token) * values.head_dim)
    elif not reading.v_direct:
        decode_rows(values, run.row, run.num_tokens, scratch.tile, (value + token) * values.head_dim)


@plain
def stage_pairs(rows, run, tile_halves, to):
    """The rows of a run as bfloat16 into tile_halves[to:], two tokens side by side.

    The partner of an odd last token is itself: its weight is 0.
    """
    head_dim = rows.head_dim
    row_bytes = 2 * head_dim
    spare = tile_halves.shape[0] - 2 * head_dim  # the last row of the tile holds two
    for t in range(0, run.num_tokens, 2):
        partner = min(t + 1, run.num_tokens - 1)
        if rows.fmt == BFLOAT16:
            first, second = (run.row + t) * row_bytes, (run.row + partner) * row_bytes
            interleave_rows(rows.codes, first, second, head_dim, tile_halves, 2 * to + t * row_bytes)
        else:
            decode_row(rows, run.row + t, tile_halves, spare)
            decode_row(rows, run.row + partner, tile_halves, spare + head_dim)
            target = 2 * to + t * row_bytes
            interleave_rows(tile_halves, 2 * spare, 2 * spare + row_bytes, head_dim, tile_halves, target)


@each_run
def score_run(shape, reading, keys, run, following, masks, scratch):
    codes, row_bytes, row = keys.codes, keys.codes.shape[1], run.row
    if not reading.k_direct:
        codes, row = scratch.tile_bytes, run.scores // shape.columns
        row_bytes = 2 * keys.head_dim if reading.k_format == BFLOAT16 else 4 * keys.head_dim
    score(
        shape, reading.k_format, codes, row_bytes, row, run, keys.codes, following, keys.head_dim, masks, scratch
    )  # fmt: skip


@intrinsic
def score(typing, shape, fmt, codes, row_bytes, row, run, stored, following, head_dim, masks, scratch):
    """Scores of the rows of a run, which are in one of ARITHMETICS from `row` of codes on."""
    signature = types.void(
        shape, types.intp, codes, types.intp, types.intp, run, stored, types.intp, types.intp, masks, scratch
    )
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, fmt, *rest = e.arguments(signature, args)
        e.switch(fmt, ARITHMETICS, lambda fmt: _score(e, static, fmt == BFLOAT16, *rest))
        return context.get_dummy_value()

    return signature, generate


def _score(
    e: Emitter,
    shape: Shape,
    pairs: bool,
    codes: Any,
    row_bytes: Int,
    row: Int,
    run: Any,
    stored: Any,
    following: Int,
    head_dim: Int,
    masks: Any,
    scratch: Any,
) -> None:
    b = e.builder
    start = codes.start + row * row_bytes
    target = scratch.scores.start + run.scores * 4
    units = head_dim // 2 if pairs else head_dim
    multiply = _PAIRS.multiply if pairs else _FLOATS.multiply
    parts = range(shape.vectors)
    # of the following rows, as they are stored, those of a tile are prefetched with each tile
    later = stored.start + following * stored.extent(1)
    tile_bytes = stored.extent(1) * shape.tokens
    step = tile_bytes * STRETCH // (units * LINES)

    def tile(i: Int, carried: list[ir.Value]) -> list[ir.Value]:
        token = i * shape.tokens
        base = start + token * row_bytes
        tokens = [base + t * row_bytes for t in range(shape.tokens)]

        def unit(d: Int, sums: list[ir.Value]) -> list[ir.Value]:
            line = scratch.query.start + d * (4 * shape.group)
            queries = [e.load(line + 4 * part * LANES, vector(F32)) for part in parts]
            results = []
            for t in range(shape.tokens):
                key = e.broadcast(tokens[t] + d * 4)
                for part in parts:
                    results.append(multiply(e, key, queries[part], sums[t * shape.vectors + part]))
            return results

        zeros = [constant(0.0)] * (shape.tokens * shape.vectors)

        def stretch(n: Int, totals: list[ir.Value]) -> list[ir.Value]:
            first = n * STRETCH
            size = (units - first).at_most(STRETCH)
            line = later + (i * tile_bytes + n * (LINES * step))
            for _ in range(LINES):
                e.prefetch(line)
                line = line + step
            sums = e.loop(size, zeros, lambda d, sums: unit(first + d, sums))
            return [e.add(x, y) for x, y in zip(totals, sums, strict=True)]

        sums = e.loop((units + (STRETCH - 1)) // STRETCH, zeros, stretch)
        if pairs:
            steps = [e.load(state_at(scratch.state, QUERY_STEP, shape, part), vector(F32)) for part in parts]
            sums = [e.mul(x, steps[at % shape.vectors]) for at, x in enumerate(sums)]
        unknown = b.not_(is_known(e, shape, token, run, masks))

        def finished() -> list[ir.Value]:
            results = []
            for at, x in enumerate(sums):
                t, part = divmod(at, shape.vectors)
                key, left = run.key + token + t, run.num_tokens - token - t
                results.append(finish_scores(e, shape, part, x, key, left, masks, scratch))
            return results

        sums = e.when(unknown, sums, finished)
        carried = list(carried)
        for at, score in enumerate(sums):
            e.store(score, target + (token * (4 * shape.group) + 4 * at * LANES))
            carried[at % shape.vectors] = e.max(score, carried[at % shape.vectors])
        return carried

    greatest = [state_at(scratch.state, PHASE_MAX, shape, part) for part in parts]
    tiles = (run.num_tokens + (shape.tokens - 1)) // shape.tokens
    found = e.loop(tiles, [e.load(where, vector(F32)) for where in greatest], tile)
    for where, value in zip(greatest, found, strict=True):
        e.store(value, where)


@each_run
def weigh_run(shape, reading, values, run, following, rows, scratch):
    codes, head_dim = values.codes, values.head_dim
    row, row_bytes, count = run.row, codes.shape[1], run.num_tokens
    pairs = reading.v_format == BFLOAT16
    if pairs:
        round_weights(shape, run, scratch)
    if not reading.v_direct:
        token = run.scores // shape.columns
        if pairs:
            count, token = (count + 1) // 2, token // 2
        row = first_value(scratch.tile, head_dim) + token
        codes, row_bytes = scratch.tile_bytes, 4 * head_dim
    weigh(
        shape, reading.v_format, codes, row_bytes, row, count, values.codes, following, run.scores, rows, head_dim,
        scratch,
    )  # fmt: skip


@intrinsic
def weigh(
    typing, shape, fmt, codes, row_bytes, row, count, stored, following, weights, rows, head_dim, scratch
):
    """Add weighted rows, or pairs of them, to the sums."""
    signature = types.void(
        shape, types.intp, codes, types.intp, types.intp, types.intp, stored, *[types.intp] * 4, scratch
    )
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, fmt, codes, row_bytes, row, count, stored, following, weights, rows, head_dim, scratch = (
            e.arguments(signature, args)
        )

        def case(fmt: int) -> None:
            weigh_rows(
                e,
                static.group,
                _PAIRS if fmt == BFLOAT16 else _FLOATS,
                ROWS_TOGETHER,
                count + 1,  # all of them in one strip: tiles come from the cache
                start=codes.start + row * row_bytes,
                following=stored.start + following * stored.extent(1),
                row_bytes=row_bytes,
                count=count,
                ahead=count,
                weights=scratch.scores.start + weights * 4,
                sums=scratch.sums,
                rows_used=rows,
                width=head_dim,
                line_bytes=stored.extent(1) * (128 if fmt == BFLOAT16 else 64) // row_bytes,
            )

        e.switch(fmt, ARITHMETICS, case)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def round_weights(typing, shape, run, scratch):
    """Round the weights of a run to bfloat16, those of two tokens side by side: (pair of tokens, column, 2)."""
    signature = types.void(shape, run, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, run, scratch = e.arguments(signature, args)
        memory = scratch.scores.start + run.scores * 4
        row_bytes = 4 * static.group

        def two_tokens(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            source, target = (memory + i * size for size in (2 * row_bytes, row_bytes))
            both = e.splat(i * 2 + 1 < run.num_tokens)
            for part in range(static.vectors):
                offset = 4 * part * LANES
                first, second = (e.load(source + (offset + n), vector(F32)) for n in (0, row_bytes))
                second = b.select(both, second, constant(0.0))
                e.store(side_by_side(e, *(nearest_bfloat16(e, x) for x in (first, second))), target + offset)
            return []

        e.loop((run.num_tokens + 1) // 2, [], two_tokens)
        return context.get_dummy_value()

    return signature, generate


@plain
def add_phase(shape, reading, last, rows, scratch):
    """Add a phase's sums to those of all."""
    total, sums = scratch.total, scratch.sums
    for r in range(rows):
        for d in range(sums.shape[1]):
            total[r, d] += sums[r, d]
