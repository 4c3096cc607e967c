"""Micro-kernels for a few rows of queries, as when decoding: scores are dot products along head_dim.

Storage is read in place. Codes are multiplied as the integers that they are, by queries and weights that are rounded to
16-bit integers; scales and zeros stay out of the inner loops. Rows with several scales, those of formats of the user's
own, and codes where products are to be in float32, are staged: decoded to float32 in scratch.

Queries are (columns, padded head_dim), float32 or 16-bit integers in the first half of each row; where a format is
`SPLIT`, the even elements of each chunk stand before the odd, and in the sums of its values too.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import (
    ALL_FORMATS,
    AS_CODES,
    CODE_BIAS,
    CODECS,
    FLOAT32,
    LARGEST_CODE,
    REGISTERED,
    SPLIT,
    decode_rows,
    load_scales,
    split_position,
)
from kvnumba.backends.cpu.jit import each_run, plain
from kvnumba.backends.cpu.shapes import (
    AHEAD,
    PHASE_MAX,
    QUERY_STEP,
    QUERY_SUM,
    WEIGHT_MAX,
    WEIGHT_SUM,
    Reading,
    Run,
    Shape,
    finish_scores,
    is_known,
    prefetch_rows,
    row_ahead,
    state_at,
)
from kvnumba.backends.cpu.simd import F32, I16, I32, LANES, Emitter, Int, Pointer, constant, vector
from kvnumba.backends.cpu.weighing import weigh_rows

MOST_ROWS = 8
STRIP = 16  # tokens whose values are read, for all of head_dim, before the next

LARGEST_INTEGER = (1 << 15) - 1  # what the largest query element or weight becomes
MOST_SUM = (1 << 31) - 1  # of products with codes: they are summed in 32 bits
TINY = 1e-30  # a step of queries this small makes scores of 0; the reciprocal of less may be infinite


@functools.cache
def shape(rows: int, scale_dtype: str) -> Shape:
    """The shape for 1 to MOST_ROWS rows."""
    columns = 1 << (rows - 1).bit_length()
    tokens = LANES // columns
    return Shape(scale_dtype, __name__, rows, columns, tokens, 1, tokens, 128, takes_codes=True)


@plain
def is_direct(rows, scoring):
    """Whether rows are read in place."""
    groups = rows.scale.shape[1]
    return rows.fmt != REGISTERED and (groups == 0 or (groups == 1 and not scoring.exact))


@plain
def choose(keys, values, scoring):
    """Rows are read in place unless they must be decoded first."""
    k_direct, v_direct = is_direct(keys, scoring), is_direct(values, scoring)
    v_format = values.fmt if v_direct else FLOAT32
    return Reading(k_direct, v_direct, keys.fmt if k_direct else FLOAT32, v_format, CODE_BIAS[v_format])


@plain
def integer_step(q, start, head_dim, sm_scale, most):
    """What 1 stands for where the greatest element of a scaled query becomes `most`; NaN if one is not finite."""
    top, finite = np.float32(0), np.float32(0)
    for d in range(head_dim):
        value = q[start + d] * sm_scale
        finite += value * 0
        top = max(top, abs(value))
    return top / np.float32(most) if finite == 0 else np.float32(np.nan)


@plain
def load_query(shape, reading, q, start, r, head_dim, sm_scale, query):
    """A row of queries, scaled; for codes as integers, so large that the sum of products just fits 32 bits."""
    query = query.reshape(shape.columns, -1)
    if not AS_CODES[reading.k_format]:
        for d in range(head_dim):
            query[r, d] = q[start + d] * sm_scale
        return np.float32(0), np.float32(0)
    most = min(LARGEST_INTEGER, MOST_SUM // (LARGEST_CODE[reading.k_format] * head_dim))
    step = integer_step(q, start, head_dim, sm_scale, most)
    if not step > np.float32(TINY):
        return step, np.float32(0)
    integers = query[r].view(np.int16)
    rate, total, split = sm_scale / step, 0, SPLIT[reading.k_format]
    for d in range(head_dim):
        integer = np.int16(np.rint(q[start + d] * rate))
        integers[split_position(d) if split else d] = integer
        total += integer
    return step, step * np.float32(total)


@each_run
def score_run(shape, reading, keys, run, following, masks, scratch):
    codes, scale, zero, _, head_dim, _ = keys
    row_bytes = codes.shape[1]
    if not reading.k_direct:
        prefetch_rows(codes, following, run.num_tokens)
        decode_rows(keys, run.row, run.num_tokens, scratch.tile, 0)
        codes, following, row_bytes = scratch.tile_bytes, 0, 4 * head_dim
        run = Run(0, run.num_tokens, run.scores, run.key)
    ahead = min(AHEAD, run.num_tokens)
    score(
        shape, reading.k_format, codes, row_bytes, scale, zero, run, following, ahead, head_dim, masks, scratch
    )  # fmt: skip


@intrinsic
def score(typing, shape, fmt, codes, row_bytes, scale, zero, run, following, ahead, head_dim, masks, scratch):
    """Scores of rows that are read as they lie."""
    signature = types.void(
        shape, types.intp, codes, types.intp, scale, zero, run, types.intp, types.intp, types.intp, masks, scratch
    )  # fmt: skip
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, fmt, *rest = e.arguments(signature, args)
        e.switch(fmt, ALL_FORMATS, lambda fmt: _score(e, static, CODECS[fmt], *rest))
        return context.get_dummy_value()

    return signature, generate


def _score(
    e: Emitter,
    shape: Shape,
    codec: Any,
    codes: Any,
    row_bytes: Int,
    scale: Any,
    zero: Any,
    run: Any,
    following: Int,
    ahead: Int,
    head_dim: Int,
    masks: Any,
    scratch: Any,
) -> None:
    b, rows = e.builder, shape.rows
    start, later_start = (codes.start + row * row_bytes for row in (run.row, following))
    target = scratch.scores.start + run.scores * 4
    query_bytes = scratch.query.extent(0) // shape.columns * 4
    chunk_queries = 4 * LANES  # bytes of the query that meet a vector of a key
    nothing = ir.Constant(vector(codec.sums), None)
    pattern = [lane // shape.columns for lane in range(LANES)]

    def tile(i: Int, carried: list[ir.Value]) -> list[ir.Value]:
        token = i * shape.tokens
        base = start + token * row_bytes
        tokens = [base + t * row_bytes for t in range(shape.tokens)]
        later = row_ahead(e, token, ahead, run.num_tokens, start, later_start, row_bytes)

        def load(pointer: Pointer, inside: ir.Value | None) -> list[ir.Value]:
            key = codec.load(e, pointer)
            # beyond the row lies another, perhaps NaN; codes meet queries of 0 there
            return key if inside is None else [b.select(inside, x, constant(0.0)) for x in key]

        def chunk(c: Int, sums: list[ir.Value], inside: ir.Value | None = None) -> list[ir.Value]:
            offset = c * codec.chunk_bytes
            keys = [load(pointer + offset, inside) for pointer in tokens]
            sums = list(sums)
            for part in range(codec.vectors):
                where = c * (codec.vectors * chunk_queries) + part * chunk_queries
                for r in range(rows):
                    q = e.load(scratch.query.start + (r * query_bytes + where), codec.lanes)
                    for t in range(shape.tokens):
                        sums[t * rows + r] = codec.multiply(e, keys[t][part], q, sums[t * rows + r])
            # of the tile ahead a line for each token, in the order of memory, with each line begun here
            per_line = max(1, 64 // codec.chunk_bytes)
            with b.if_then(c % per_line == 0):
                for t in range(shape.tokens):
                    e.prefetch(later + (offset * shape.tokens + 64 * t))
            return sums

        sums = [nothing] * (shape.tokens * rows)
        if codec.as_codes:
            sums = e.loop((head_dim + (codec.chunk - 1)) // codec.chunk, sums, chunk)
        else:
            full, left = head_dim // codec.chunk, head_dim % codec.chunk
            sums = e.loop(full, sums, chunk)

            def last() -> list[ir.Value]:
                lanes = ir.Constant(vector(I32), list(range(LANES)))
                return chunk(full, sums, b.icmp_signed("<", lanes, e.splat(left.narrow())))

            sums = e.when(left > 0, sums, last)
        score = e.sums(
            [
                sums[t * rows + r] if r < rows else nothing
                for t in range(shape.tokens)
                for r in range(shape.columns)
            ]
        )
        if codec.as_codes:  # q . (code * scale + zero) = scale * (q . code) + zero * sum(q)
            step, low = (
                e.pick(load_scales(e, array, run.row + token, shape.tokens), pattern)
                for array in (scale, zero)
            )
            query_step, query_sum = (
                e.load(state_at(scratch.state, name, shape), vector(F32)) for name in (QUERY_STEP, QUERY_SUM)
            )
            dots = e.mul(b.sitofp(score, vector(F32)), query_step)
            score = e.fma(low, query_sum, e.mul(step, dots))
        unknown = b.not_(is_known(e, shape, token, run, masks))
        key, left = run.key + token, run.num_tokens - token
        score = e.when(
            unknown, [score], lambda: [finish_scores(e, shape, 0, score, key, left, masks, scratch)]
        )[0]
        e.store(score, target + i * (4 * LANES))
        return [e.max(score, carried[0])]

    greatest = state_at(scratch.state, PHASE_MAX, shape)
    tiles = (run.num_tokens + (shape.tokens - 1)) // shape.tokens
    e.store(e.loop(tiles, [e.load(greatest, vector(F32))], tile)[0], greatest)


@each_run
def weigh_run(shape, reading, values, run, following, rows, scratch):
    codes, head_dim = values.codes, values.head_dim
    row, row_bytes = run.row, codes.shape[1]
    if AS_CODES[reading.v_format]:
        round_weights(shape, run, scratch)
    if not reading.v_direct:
        prefetch_rows(codes, following, run.num_tokens)
        decode_rows(values, run.row, run.num_tokens, scratch.tile, 0)
        codes, row, following, row_bytes = scratch.tile_bytes, 0, 0, 4 * head_dim
    ahead = min(AHEAD, run.num_tokens)
    weigh(
        shape, reading.v_format, codes, row_bytes, row, run.num_tokens, following, ahead, run.scores, rows,
        head_dim, scratch,
    )  # fmt: skip


@intrinsic
def weigh(
    typing, shape, fmt, codes, row_bytes, row, count, following, ahead, weights, rows, head_dim, scratch
):
    """Add weighted rows that are read as they lie to the sums, 32-bit integers where they are codes."""
    signature = types.void(shape, types.intp, codes, *[types.intp] * 8, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, fmt, codes, row_bytes, row, count, following, ahead, weights, rows, head_dim, scratch = (
            e.arguments(signature, args)
        )

        def case(fmt: int) -> None:
            codec = CODECS[fmt]
            weigh_rows(
                e,
                static.columns,
                codec,
                min(static.rows, LANES // (codec.vectors * codec.tokens)),
                STRIP,
                start=codes.start + row * row_bytes,
                following=codes.start + following * row_bytes,
                row_bytes=row_bytes,
                count=count,
                ahead=ahead,
                weights=scratch.scores.start + weights * 4,
                sums=scratch.sums,
                rows_used=rows,
                width=head_dim,
            )

        e.switch(fmt, ALL_FORMATS, case)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def round_weights(typing, shape, run, scratch):
    """Round the weights of a run to 16-bit integers, and add them up in WEIGHT_SUM.

    A column's greatest weight of the phase becomes LARGEST_INTEGER. Those of neighbouring tokens are stored side by
    side, in the memory of the weights: (pair of tokens, column, 2).
    """
    signature = types.void(shape, run, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, run, scratch = e.arguments(signature, args)
        _round_weights(e, static, run, scratch)
        return context.get_dummy_value()

    return signature, generate


def _round_weights(e: Emitter, shape: Shape, run: Any, scratch: Any) -> None:
    b, columns = e.builder, shape.columns
    together = max(1, 2 // shape.line)  # vectors that hold a pair of tokens or more
    order = [  # their lanes are [token][column]
        (2 * pair + token) * columns + column
        for pair in range(together * shape.line // 2)
        for column in range(columns)
        for token in range(2)
    ]
    memory = scratch.scores.start + run.scores * 4
    size = together * shape.line
    top = e.reduce(e.load(state_at(scratch.state, WEIGHT_MAX, shape), vector(F32)), e.max, columns)
    nothing = constant(0.0)
    large = b.fcmp_ordered(">", top, constant(TINY))
    rate = b.select(large, b.fdiv(constant(float(LARGEST_INTEGER)), top), nothing)

    def some(i: Int, sums: list[ir.Value]) -> list[ir.Value]:
        token = i * size
        rounded = []
        for n in range(together):
            scaled = b.fmul(e.load(memory + token * (4 * columns), vector(F32)), rate)
            used = b.fcmp_ordered("ord", scaled, scaled)
            if n:  # a line past the run has not been computed
                used = b.and_(used, e.splat(token < run.num_tokens))
            scaled = b.select(used, scaled, nothing)
            rounded.append(b.fptosi(b.fadd(scaled, constant(0.5)), vector(I32)))
            token = token + shape.line
        integers = [b.trunc(x, vector(I16)) for x in rounded]
        # half as much is written as is read, and behind it
        e.store(e.shuffle(integers[0], integers[-1], order), memory + i * (2 * together * LANES))
        return [functools.reduce(b.add, rounded, sums[0])]

    total = e.loop((run.num_tokens + (size - 1)) // size, [constant(0, I32)], some)[0]
    where = state_at(scratch.state, WEIGHT_SUM, shape)
    e.store(e.add(e.load(where, vector(F32)), b.sitofp(total, vector(F32))), where)


@plain
def add_phase(shape, reading, last, rows, scratch):
    """Add a phase's sums to those of all; of codes they are 32-bit integers, counted from `code_bias`."""
    state, total, sums = scratch.state, scratch.total, scratch.sums
    width = sums.shape[1]
    if reading.code_bias < 0:
        for r in range(rows):
            for d in range(width):
                total[r, d] += sums[r, d]
        return
    for r in range(rows):
        top, weight_sum = np.float32(0), np.float32(0)
        for column in range(r, state.shape[1], sums.shape[0]):
            top = max(top, state[WEIGHT_MAX, column])
            weight_sum += state[WEIGHT_SUM, column]
        step, centre = top / np.float32(LARGEST_INTEGER), np.int32(weight_sum) * np.int32(reading.code_bias)
        products = sums[r].view(np.int32)
        for d in range(width):
            total[r, d] += np.float32(products[d] - centre) * step
    state[WEIGHT_MAX] = 0
    state[WEIGHT_SUM] = 0
