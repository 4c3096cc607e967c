"""The micro-kernels of attention: scores, softmax and weighted values of a run of cached tokens.

Rows are a few query tokens times the query heads of one KV head. There are two shapes. With up to FEW rows
(decoding) scores are dot products along head_dim, codes are read in place, and the scales of quantised
formats stay out of the inner loop. With more (prompts) a vector holds rows, keys and values are float32, and
their elements are broadcast: a matrix product in registers. The scores of either lie as [token][column], a
column a row of queries, and the online softmax between them is one.

Each phase (all scores, one softmax, all values) covers a run of many tokens, which the memory system streams.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import (
    ALL_FORMATS,
    CENTER,
    CHUNK_BYTES,
    FLOAT32,
    INT4,
    INT8,
    chunk_values,
    load_chunk,
)
from kvnumba.backends.cpu.simd import F32, I1, I32, LANES, Emitter, constant, index, vector

FEW = 8
MANY = (16, 64) if LANES == 16 else (16,)
"""Numbers of rows that kernels with more than FEW are compiled for."""

STRETCH = 32  # elements of head_dim that are summed on their own: long sums would round their tail away
STRIP = 16  # tokens whose values are read, for all of head_dim, before the next

LEAST = float(np.finfo(np.float32).min)  # finite, so that no maximum is infinity less infinity

# What is kept of each column, as rows of a table.
QUERY_SUM, SLOPE, ROW_MAX, ROW_SUM, ZERO_SUM, PHASE_MAX, RESCALE = range(7)
COLUMN_FACTS = 7


class Shape(NamedTuple):
    """How scores lie for a number of rows."""

    columns: int  # rows, and as many more as make whole vectors
    tokens: int  # of a tile: those whose scores are accumulated together
    vectors: int  # that hold the scores of one line
    line: int  # tokens of a line
    phase: int  # tokens whose scores are computed before their values are read


def shape_of(rows: int) -> Shape:
    """The shape for 1 to FEW rows, or one of MANY."""
    if rows <= FEW:
        columns = 1 << (rows - 1).bit_length()
        return Shape(columns, LANES // columns, 1, LANES // columns, 128)
    vectors = rows // LANES
    return Shape(rows, {1: 8, 2: 4, 4: 4}[vectors], vectors, 1, 64)


def _constant_of(name: str, value: Any) -> Any:
    """A function for kernels that gives a number of their shape, known when they compile."""

    def typer(typing, static):
        def generate(context, builder, signature, args):
            return context.get_constant(types.intp, value(static.values[0]))

        return types.intp(static), generate

    typer.__name__ = name
    return intrinsic(typer)


columns_of = _constant_of("columns_of", lambda rows: shape_of(rows).columns)
tile_tokens = _constant_of("tile_tokens", lambda rows: shape_of(rows).tokens)
phase_tokens = _constant_of("phase_tokens", lambda rows: shape_of(rows).phase)
is_few = _constant_of("is_few", lambda rows: int(rows <= FEW))


def _fact(e: Emitter, facts: ir.Value, fact: int, shape: Shape, part: int = 0) -> ir.Value:
    """Where a vector of a fact about the columns lies."""
    columns = shape.vectors * LANES
    return e.at(facts, 4 * (fact * columns + part * LANES))


def _ahead(e: Emitter, token: Any, ahead: Any, count: Any, start: Any, following: Any, row_bytes: Any) -> Any:
    """The address of the row `ahead` tokens on: in this run, or in the one that follows."""
    b = e.builder
    target = b.add(token, ahead)
    inside = b.icmp_signed("<", target, count)
    base = b.select(inside, start, following)
    return e.at(base, b.mul(b.select(inside, target, b.sub(target, count)), row_bytes))


def _finish(e: Emitter, shape: Shape, part: int, score: Any, token: Any, run: dict[str, Any]) -> ir.Value:
    """Soft cap, ALiBi and masks on a vector of scores whose first token is `token` of the run."""
    b = e.builder
    offsets = [lane // shape.columns for lane in range(LANES)]
    cap = e.splat(run["soft_cap"])
    capped = b.fcmp_ordered(">", run["soft_cap"], ir.Constant(F32, 0.0))
    score = e.when(capped, [score], lambda: [e.mul(cap, e.tanh(b.fdiv(score, cap)))])[0]
    lane_token = ir.Constant(vector(I32), offsets)
    key = b.add(e.splat(b.trunc(b.add(run["position"], token), I32)), lane_token)
    own = e.load(e.at(run["positions"], 4 * part * LANES), vector(I32))
    distance = b.sub(own, key)
    slope = e.load(_fact(e, run["facts"], SLOPE, shape, part), vector(F32))
    score = b.fsub(score, b.fmul(slope, b.sitofp(distance, vector(F32))))
    seen = b.icmp_signed(">=", distance, constant(0, I32))
    seen = b.and_(seen, b.icmp_signed("<=", distance, e.splat(run["reach"])))
    left = e.splat(b.trunc(b.sub(run["count"], token), I32))
    seen = b.and_(seen, b.icmp_signed("<", lane_token, left))
    return b.select(seen, score, constant(float("-inf")))


@intrinsic
def score_run(
    typing, static, fmt, codes, scale, zero, row, count, following, ahead,
    query, head_dim, facts, positions, position, reach, seen_by_all, soft_cap, scores, to,
):  # fmt: skip
    """Scores of `count` tokens, rows of the storage from `row` on, into scores[to:]; keeps their maximum.

    For a few rows, `query` is (rows, padded head_dim), in int4 the even elements of each chunk before the
    odd; for many it is (head_dim, columns) and the format float32. Scores of whole tiles are written: those
    past `count`, and those of keys that a row does not see, are -inf. Rows past the run are read. Of keys up
    to the position `seen_by_all` nothing is masked, capped or biased.

    The row `ahead` tokens on is prefetched, after this run that of the one whose first row is `following`.
    """
    signature = types.void(
        static, types.intp, codes, scale, zero, types.intp, types.intp, types.intp, types.intp,
        query, types.intp, facts, positions, types.intp, types.int32, types.intp, types.float32, scores,
        types.intp,
    )  # fmt: skip
    rows = static.values[0]
    shape = shape_of(rows)

    def generate(context, builder, _, args):
        e, b = Emitter(context, builder), builder
        (_, number, _, _, _, row, count, following, ahead, _, head_dim, _, _, position, reach, seen_by_all,
         soft_cap, _, to) = args  # fmt: skip
        row_bytes = e.extent(codes, args[2], 1)
        memory = e.pointer(codes, args[2])
        start, following = (e.at(memory, b.mul(r, row_bytes)) for r in (row, following))
        query_memory = e.pointer(query, args[9])
        facts_memory = e.pointer(facts, args[11])
        target = e.at(e.pointer(scores, args[17]), b.mul(to, index(4)))
        run = {
            "facts": facts_memory, "positions": e.pointer(positions, args[12]), "position": position,
            "reach": reach, "soft_cap": soft_cap, "count": count,
        }  # fmt: skip
        tiles = b.sdiv(b.add(count, index(shape.tokens - 1)), index(shape.tokens))
        tops = [
            e.load(_fact(e, facts_memory, PHASE_MAX, shape, part), vector(F32))
            for part in range(shape.vectors)
        ]

        def is_known(token: ir.Value) -> ir.Value:
            """Whether nothing of a tile is masked, capped or biased."""
            last = b.add(token, index(shape.tokens - 1))
            known = b.icmp_signed("<", last, count)
            return b.and_(known, b.icmp_signed("<=", b.add(position, last), seen_by_all))

        def few(fmt: int) -> None:
            parts = chunk_values(fmt) // LANES
            stride = e.extent(query, args[9], 1)
            quantized = fmt in (INT8, INT4)
            pattern = [lane // shape.columns for lane in range(LANES)]

            def tile(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                token = b.mul(i, index(shape.tokens))
                base = e.at(start, b.mul(token, row_bytes))
                tokens = [e.at(base, b.mul(index(t), row_bytes)) for t in range(shape.tokens)]
                later = _ahead(e, token, ahead, count, start, following, row_bytes)

                def chunk(
                    c: ir.Value, sums: list[ir.Value], inside: ir.Value | None = None
                ) -> list[ir.Value]:
                    offset = b.mul(c, index(CHUNK_BYTES[fmt]))
                    keys = [load_chunk(e, fmt, e.at(pointer, offset)) for pointer in tokens]
                    if inside is not None and not quantized:  # beyond the row lies another, perhaps NaN
                        keys = [[b.select(inside, x, constant(0.0)) for x in key] for key in keys]
                    sums = list(sums)
                    for part in range(parts):
                        for r in range(rows):
                            element = b.add(b.mul(index(r), stride), b.mul(c, index(parts * LANES)))
                            element = b.add(element, index(part * LANES))
                            q = e.load(e.at(query_memory, b.mul(element, index(4))), vector(F32))
                            for t in range(shape.tokens):
                                place = t * rows + r
                                sums[place] = e.fma(keys[t][part], q, sums[place])
                    # of the tile ahead a line for each token, in the order of memory, with each line begun here
                    per_line = max(1, 64 // CHUNK_BYTES[fmt])
                    begins = b.icmp_signed("==", b.and_(c, index(per_line - 1)), index(0))
                    with b.if_then(begins):
                        for t in range(shape.tokens):
                            e.prefetch(e.at(later, b.add(b.mul(offset, index(shape.tokens)), index(64 * t))))
                    return sums

                size = index(chunk_values(fmt))
                full, left = b.sdiv(head_dim, size), b.srem(head_dim, size)
                sums = e.loop(full, [constant(0.0)] * (shape.tokens * rows), chunk)

                def last() -> list[ir.Value]:
                    lanes = ir.Constant(vector(I32), list(range(LANES)))
                    inside = b.icmp_signed("<", lanes, e.splat(b.trunc(left, I32)))
                    return chunk(full, sums, inside)

                sums = e.when(b.icmp_signed(">", left, index(0)), sums, last)
                nothing = constant(0.0)
                lanes = [
                    sums[t * rows + r] if r < rows else nothing
                    for t in range(shape.tokens)
                    for r in range(shape.columns)
                ]
                score = e.sums(lanes)
                if quantized:
                    offset = b.mul(b.add(row, token), index(4))
                    step = e.load(e.at(e.pointer(scale, args[3]), offset), vector(F32, shape.tokens))
                    low = e.load(e.at(e.pointer(zero, args[4]), offset), vector(F32, shape.tokens))
                    total = e.load(_fact(e, facts_memory, QUERY_SUM, shape), vector(F32))
                    step, low = e.pick(step, pattern), e.pick(low, pattern)
                    middle = e.fma(step, constant(CENTER[fmt]), low)
                    score = e.fma(middle, total, e.mul(step, score))
                known = is_known(token)
                score = e.when(b.not_(known), [score], lambda: [_finish(e, shape, 0, score, token, run)])[0]
                e.store(score, e.at(target, b.mul(i, index(4 * LANES))))
                return [e.max(score, carried[0])]

            found = e.loop(tiles, tops, tile)
            e.store(found[0], _fact(e, facts_memory, PHASE_MAX, shape))

        def many() -> None:
            def tile(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                token = b.mul(i, index(shape.tokens))
                base = e.at(start, b.mul(token, row_bytes))
                tokens = [e.at(base, b.mul(index(t), row_bytes)) for t in range(shape.tokens)]

                def element(d: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    offset = b.mul(d, index(4 * shape.columns))
                    queries = [
                        e.load(e.at(query_memory, b.add(offset, index(4 * part * LANES))), vector(F32))
                        for part in range(shape.vectors)
                    ]
                    results = []
                    for t in range(shape.tokens):
                        key = e.broadcast(e.at(tokens[t], b.mul(d, index(4))))
                        for part in range(shape.vectors):
                            results.append(e.fma(key, queries[part], sums[t * shape.vectors + part]))
                    return results

                zeros = [constant(0.0)] * (shape.tokens * shape.vectors)
                later = _ahead(e, token, ahead, count, start, following, row_bytes)

                def stretch(n: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                    first = b.mul(n, index(STRETCH))
                    size = b.sub(head_dim, first)
                    size = b.select(b.icmp_signed("<", size, index(STRETCH)), size, index(STRETCH))
                    for line in range(0, 4 * STRETCH * shape.tokens, 64):
                        e.prefetch(e.at(later, b.add(b.mul(first, index(4 * shape.tokens)), index(line))))
                    sums = e.loop(size, zeros, lambda d, sums: element(b.add(first, d), sums))
                    return [e.add(x, y) for x, y in zip(totals, sums, strict=True)]

                stretches = b.sdiv(b.add(head_dim, index(STRETCH - 1)), index(STRETCH))
                sums = e.loop(stretches, zeros, stretch)
                known = is_known(token)

                def finished() -> list[ir.Value]:
                    return [
                        _finish(
                            e, shape, at % shape.vectors, x, b.add(token, index(at // shape.vectors)), run
                        )
                        for at, x in enumerate(sums)
                    ]

                sums = e.when(b.not_(known), sums, finished)
                carried = list(carried)
                for at, score in enumerate(sums):
                    place = b.add(b.mul(token, index(4 * shape.columns)), index(4 * at * LANES))
                    e.store(score, e.at(target, place))
                    carried[at % shape.vectors] = e.max(score, carried[at % shape.vectors])
                return carried

            found = e.loop(tiles, tops, tile)
            for part in range(shape.vectors):
                e.store(found[part], _fact(e, facts_memory, PHASE_MAX, shape, part))

        if rows <= FEW:
            e.switch(number, ALL_FORMATS, few)
        else:
            many()
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def prefetch_floats(typing, array, first, count):
    """Ask for `count` elements of an array of float32, from `first` on."""

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        start = e.at(e.pointer(array, args[0]), b.mul(args[1], index(4)))
        lines = b.sdiv(b.add(args[2], index(15)), index(16))

        def line(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            e.prefetch(e.at(start, b.mul(i, index(64))))
            return []

        e.loop(lines, [], line)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


@intrinsic
def settle(typing, static, facts):
    """Take the phase's maximum into the rows'; returns whether one moved, then RESCALE says by how much.

    NaN is no maximum (`Emitter.max` returns its second operand): it reaches the sums through its own weight.
    """
    shape = shape_of(static.values[0])

    def generate(context, builder, _, args):
        e, b = Emitter(context, builder), builder
        memory = e.pointer(facts, args[1])
        moved = ir.Constant(I1, 0)
        for part in range(shape.vectors):

            def at(fact: int, part: int = part) -> ir.Value:
                return _fact(e, memory, fact, shape, part)

            top = e.load(at(PHASE_MAX), vector(F32))
            if shape.columns < LANES:
                top = e.reduce(top, e.max, shape.columns)
            before = e.load(at(ROW_MAX), vector(F32))
            now = e.max(top, before)
            rescale = e.exp(b.fsub(before, now))
            for fact in (ROW_SUM, ZERO_SUM):
                e.store(e.mul(e.load(at(fact), vector(F32)), rescale), at(fact))
            e.store(now, at(ROW_MAX))
            e.store(rescale, at(RESCALE))
            e.store(constant(LEAST), at(PHASE_MAX))
            moved = b.or_(moved, e.any(b.fcmp_ordered(">", now, before)))
        return moved

    return types.boolean(static, facts), generate


@intrinsic
def exponentiate_run(typing, static, count, scores, to, facts, center, scale, zero, row):
    """Turn the scores of a run into weights, and add them to the rows' sums.

    With `center`, that of the values' codes, their scales are folded into the weights, and their zero points
    into a sum of their own; 0 where they have none.
    """
    signature = types.void(
        static, types.intp, scores, types.intp, facts, types.float32, scale, zero, types.intp
    )
    shape = shape_of(static.values[0])

    def generate(context, builder, _, args):
        e, b = Emitter(context, builder), builder
        _, count, _, to, _, center, _, _, row = args
        memory = e.at(e.pointer(scores, args[2]), b.mul(to, index(4)))
        facts_memory = e.pointer(facts, args[4])
        lines = b.sdiv(b.add(count, index(shape.line - 1)), index(shape.line))
        parts = range(shape.vectors)

        def load(fact: int) -> list[ir.Value]:
            return [e.load(_fact(e, facts_memory, fact, shape, part), vector(F32)) for part in parts]

        tops = load(ROW_MAX)

        def weights(i: ir.Value, sums: list[ir.Value]) -> tuple[list[Any], list[ir.Value], list[ir.Value]]:
            places, found, totals = [], [], []
            for part in parts:
                place = e.at(
                    memory, b.mul(b.add(b.mul(i, index(shape.vectors)), index(part)), index(4 * LANES))
                )
                weight = e.exp(b.fsub(e.load(place, vector(F32)), tops[part]))
                places.append(place)
                found.append(weight)
                totals.append(e.add(sums[part], weight))
            return places, found, totals

        def keep(fact: int, sums: list[ir.Value]) -> None:
            for part, (before, more) in enumerate(zip(load(fact), sums, strict=True)):
                e.store(e.add(before, more), _fact(e, facts_memory, fact, shape, part))

        def plain() -> None:
            def line(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                places, found, totals = weights(i, sums)
                for place, weight in zip(places, found, strict=True):
                    e.store(weight, place)
                return totals

            keep(ROW_SUM, e.loop(lines, [constant(0.0)] * shape.vectors, line))

        def fold() -> None:
            pattern = [lane // shape.columns for lane in range(LANES)]

            def line(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                places, found, totals = weights(i, sums[:1])
                offset = b.mul(b.add(row, b.mul(i, index(shape.line))), index(4))
                step = e.load(e.at(e.pointer(scale, args[6]), offset), vector(F32, shape.line))
                low = e.load(e.at(e.pointer(zero, args[7]), offset), vector(F32, shape.line))
                # a token past the run has weight 0, but its stale scale may be NaN
                none = b.fcmp_ordered("==", found[0], constant(0.0))
                step = b.select(none, constant(0.0), e.pick(step, pattern))
                low = b.select(none, constant(0.0), e.pick(low, pattern))
                e.store(e.mul(found[0], step), places[0])
                middle = e.fma(step, e.splat(center), low)
                return [totals[0], e.fma(found[0], middle, sums[1])]

            sums = e.loop(lines, [constant(0.0)] * 2, line)
            keep(ROW_SUM, sums[:1])
            keep(ZERO_SUM, sums[1:])

        if shape.vectors == 1 and shape.columns <= FEW:
            with b.if_else(b.fcmp_ordered(">", center, ir.Constant(F32, 0.0))) as (folded, otherwise):
                with folded:
                    fold()
                with otherwise:
                    plain()
        else:
            plain()
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def weigh_run(
    typing, static, fmt, codes, row, count, following, ahead, scores, to, part, rows_used, head_dim
):  # fmt: skip
    """Add the weighted values of `count` tokens to part (rows, padded head_dim).

    Strips of tokens are read whole before the next, though their sums fill the registers several times:
    memory is read in its own order.
    """
    signature = types.void(
        static, types.intp, codes, types.intp, types.intp, types.intp, types.intp, scores, types.intp,
        part, types.intp, types.intp,
    )  # fmt: skip
    shape = shape_of(static.values[0])
    few = static.values[0] <= FEW
    rows = static.values[0] if few else 4

    def generate(context, builder, _, args):
        e, b = Emitter(context, builder), builder
        _, number, _, row, count, following, ahead, _, to, _, rows_used, head_dim = args
        row_bytes = e.extent(codes, args[2], 1)
        memory = e.pointer(codes, args[2])
        start, following = (e.at(memory, b.mul(r, row_bytes)) for r in (row, following))
        weights = e.at(e.pointer(scores, args[7]), b.mul(to, index(4)))
        part_memory = e.pointer(part, args[9])
        part_bytes = b.mul(e.extent(part, args[9], 1), index(4))

        def case(fmt: int) -> None:
            parts = chunk_values(fmt) // LANES
            size = index(chunk_values(fmt))
            chunks = b.sdiv(b.add(head_dim, b.sub(size, index(1))), size)
            together = _chunks_together(rows, parts)
            passes = b.sdiv(chunks, index(together))

            def columns(
                begin: Any, tokens: Any, first_row: Any, first_chunk: Any, width: int, step: Any
            ) -> None:
                """Some chunks of some tokens, for a block of rows."""
                offset = b.mul(first_chunk, index(CHUNK_BYTES[fmt]))
                values = start_of(begin, offset)
                later = _ahead(e, begin, ahead, count, start, following, row_bytes)
                sums_at = b.add(b.mul(first_row, part_bytes), b.mul(first_chunk, index(4 * parts * LANES)))
                places = [
                    e.at(
                        part_memory, b.add(sums_at, b.add(b.mul(index(r), part_bytes), index(4 * n * LANES)))
                    )
                    for r in range(rows)
                    for n in range(width * parts)
                ]

                def token(t: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    row = e.at(values, b.mul(t, row_bytes))
                    loaded = [
                        x for c in range(width) for x in load_chunk(e, fmt, e.at(row, c * CHUNK_BYTES[fmt]))
                    ]
                    weight = b.add(b.mul(b.add(begin, t), index(shape.columns)), first_row)
                    results = []
                    for r in range(rows):
                        w = e.broadcast(e.at(weights, b.mul(b.add(weight, index(r)), index(4))))
                        results += [e.fma(w, x, sums[r * len(loaded) + n]) for n, x in enumerate(loaded)]
                    # the bytes ahead in their own order, a share of them with each token
                    share = width * CHUNK_BYTES[fmt]
                    behind = b.mul(b.add(b.mul(step, tokens), t), index(share))
                    for line in range(0, share, 64):
                        e.prefetch(e.at(later, b.add(behind, index(line))))
                    return results

                sums = e.loop(tokens, [e.load(place, vector(F32)) for place in places], token)
                for place, x in zip(places, sums, strict=True):
                    e.store(x, place)

            def start_of(token: Any, offset: Any) -> ir.Value:
                return e.at(start, b.add(b.mul(token, row_bytes), offset))

            def strip(n: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                begin = b.mul(n, length)
                tokens = b.sub(count, begin)
                tokens = b.select(b.icmp_signed("<", tokens, length), tokens, length)

                def block(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                    first_row = b.mul(i, index(rows))

                    def several(c: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                        columns(begin, tokens, first_row, b.mul(c, index(together)), together, c)
                        return []

                    def single(c: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                        done = b.mul(passes, index(together))
                        columns(begin, tokens, first_row, b.add(done, c), 1, b.add(done, c))
                        return []

                    e.loop(passes, [], several)
                    if together > 1:
                        e.loop(b.srem(chunks, index(together)), [], single)
                    return []

                e.loop(b.sdiv(b.add(rows_used, index(rows - 1)), index(rows)), [], block)
                return []

            length = index(STRIP) if few else b.add(count, index(1))  # float32 tiles come from the cache
            e.loop(b.sdiv(b.add(count, b.sub(length, index(1))), length), [], strip)

        if few:
            e.switch(number, ALL_FORMATS, case)
        else:
            case(FLOAT32)
        return context.get_dummy_value()

    return signature, generate


def _chunks_together(rows: int, parts: int) -> int:
    """Chunks whose sums fit the registers, a power of two."""
    together = 4
    while together > 1 and together * rows * parts > LANES:
        together //= 2
    return together
