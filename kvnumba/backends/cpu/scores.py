"""Scores of a run of cached tokens: the first phase of attention."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import (
    ALL_FORMATS,
    ARITHMETICS,
    BFLOAT16,
    CHUNK_BYTES,
    CODE_BYTES,
    QUANTIZED,
    code_vectors,
    load_codes,
    load_floats,
)
from kvnumba.backends.cpu.simd import F32, I16, I32, LANES, Emitter, constant, index, vector
from kvnumba.backends.cpu.tiles import (
    FEW,
    PHASE_MAX,
    QUERY_STEP,
    QUERY_SUM,
    SLOPE,
    STRETCH,
    Shape,
    fact_at,
    row_ahead,
    shape_of,
)


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
    slope = e.load(fact_at(e, run["facts"], SLOPE, shape, part), vector(F32))
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

    For a few rows, `query` is (rows, padded head_dim), for quantised formats the memory of 16-bit integers, in
    int4 the even elements of each chunk before the odd; for many it is (head_dim, columns), or in bfloat16
    (head_dim / 2, columns, 2), and the format one of ARITHMETICS. Scores of whole tiles are written: those
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
            e.load(fact_at(e, facts_memory, PHASE_MAX, shape, part), vector(F32))
            for part in range(shape.vectors)
        ]

        def is_known(token: ir.Value) -> ir.Value:
            """Whether nothing of a tile is masked, capped or biased."""
            last = b.add(token, index(shape.tokens - 1))
            known = b.icmp_signed("<", last, count)
            return b.and_(known, b.icmp_signed("<=", b.add(position, last), seen_by_all))

        def few(fmt: int) -> None:
            quantized = fmt in QUANTIZED
            chunk_bytes = CODE_BYTES if quantized else CHUNK_BYTES[fmt]
            parts = code_vectors(fmt) if quantized else 1
            # elements of head_dim in a chunk, and how a vector of the query is stored
            width, kind = (2 * LANES * parts, vector(I16, 2 * LANES)) if quantized else (LANES, vector(F32))
            stride = b.mul(e.extent(query, args[9], 1), index(4))
            zero_sum = ir.Constant(vector(I32 if quantized else F32), None)
            pattern = [lane // shape.columns for lane in range(LANES)]

            def tile(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                token = b.mul(i, index(shape.tokens))
                base = e.at(start, b.mul(token, row_bytes))
                tokens = [e.at(base, b.mul(index(t), row_bytes)) for t in range(shape.tokens)]
                later = row_ahead(e, token, ahead, count, start, following, row_bytes)

                def load(pointer: ir.Value, inside: ir.Value | None) -> list[ir.Value]:
                    if quantized:  # what is read beyond the row meets queries of 0
                        return load_codes(e, fmt, pointer)
                    key = load_floats(e, fmt, pointer)
                    # beyond the row lies another, perhaps NaN
                    return [key if inside is None else b.select(inside, key, constant(0.0))]

                def chunk(
                    c: ir.Value, sums: list[ir.Value], inside: ir.Value | None = None
                ) -> list[ir.Value]:
                    offset = b.mul(c, index(chunk_bytes))
                    keys = [load(e.at(pointer, offset), inside) for pointer in tokens]
                    sums = list(sums)
                    for part in range(parts):
                        place = b.add(b.mul(c, index(parts * 4 * LANES)), index(part * 4 * LANES))
                        for r in range(rows):
                            q = e.load(e.at(query_memory, b.add(b.mul(index(r), stride), place)), kind)
                            for t in range(shape.tokens):
                                multiply = e.dot if quantized else e.fma
                                sums[t * rows + r] = multiply(keys[t][part], q, sums[t * rows + r])
                    # of the tile ahead a line for each token, in the order of memory, with each line begun here
                    per_line = max(1, 64 // chunk_bytes)
                    begins = b.icmp_signed("==", b.and_(c, index(per_line - 1)), index(0))
                    with b.if_then(begins):
                        for t in range(shape.tokens):
                            e.prefetch(e.at(later, b.add(b.mul(offset, index(shape.tokens)), index(64 * t))))
                    return sums

                sums = [zero_sum] * (shape.tokens * rows)
                if quantized:
                    sums = e.loop(b.sdiv(b.add(head_dim, index(width - 1)), index(width)), sums, chunk)
                else:
                    full, left = b.sdiv(head_dim, index(width)), b.srem(head_dim, index(width))
                    sums = e.loop(full, sums, chunk)

                    def last() -> list[ir.Value]:
                        lanes = ir.Constant(vector(I32), list(range(LANES)))
                        inside = b.icmp_signed("<", lanes, e.splat(b.trunc(left, I32)))
                        return chunk(full, sums, inside)

                    sums = e.when(b.icmp_signed(">", left, index(0)), sums, last)
                score = e.sums(
                    [
                        sums[t * rows + r] if r < rows else zero_sum
                        for t in range(shape.tokens)
                        for r in range(shape.columns)
                    ]
                )
                if quantized:
                    offset = b.mul(b.add(row, token), index(4))
                    step = e.load(e.at(e.pointer(scale, args[3]), offset), vector(F32, shape.tokens))
                    low = e.load(e.at(e.pointer(zero, args[4]), offset), vector(F32, shape.tokens))
                    step, low = e.pick(step, pattern), e.pick(low, pattern)
                    query_step, query_sum = (
                        e.load(fact_at(e, facts_memory, fact, shape), vector(F32))
                        for fact in (QUERY_STEP, QUERY_SUM)
                    )
                    dots = e.mul(b.sitofp(score, vector(F32)), query_step)
                    score = e.fma(low, query_sum, e.mul(step, dots))
                known = is_known(token)
                score = e.when(b.not_(known), [score], lambda: [_finish(e, shape, 0, score, token, run)])[0]
                e.store(score, e.at(target, b.mul(i, index(4 * LANES))))
                return [e.max(score, carried[0])]

            found = e.loop(tiles, tops, tile)
            e.store(found[0], fact_at(e, facts_memory, PHASE_MAX, shape))

        def many(fmt: int) -> None:
            # a unit of 32 bits is an element, or two in bfloat16
            paired = fmt == BFLOAT16
            units = b.sdiv(head_dim, index(2)) if paired else head_dim
            multiply = e.dot_bfloat16 if paired else e.fma

            def tile(i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
                token = b.mul(i, index(shape.tokens))
                base = e.at(start, b.mul(token, row_bytes))
                tokens = [e.at(base, b.mul(index(t), row_bytes)) for t in range(shape.tokens)]

                def unit(d: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    offset = b.mul(d, index(4 * shape.columns))
                    queries = [
                        e.load(e.at(query_memory, b.add(offset, index(4 * part * LANES))), vector(F32))
                        for part in range(shape.vectors)
                    ]
                    results = []
                    for t in range(shape.tokens):
                        key = e.broadcast(e.at(tokens[t], b.mul(d, index(4))))
                        for part in range(shape.vectors):
                            results.append(multiply(key, queries[part], sums[t * shape.vectors + part]))
                    return results

                zeros = [constant(0.0)] * (shape.tokens * shape.vectors)
                later = row_ahead(e, token, ahead, count, start, following, row_bytes)

                def stretch(n: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                    first = b.mul(n, index(STRETCH))
                    size = b.sub(units, first)
                    size = b.select(b.icmp_signed("<", size, index(STRETCH)), size, index(STRETCH))
                    for line in range(0, 4 * STRETCH * shape.tokens, 64):
                        e.prefetch(e.at(later, b.add(b.mul(first, index(4 * shape.tokens)), index(line))))
                    sums = e.loop(size, zeros, lambda d, sums: unit(b.add(first, d), sums))
                    return [e.add(x, y) for x, y in zip(totals, sums, strict=True)]

                stretches = b.sdiv(b.add(units, index(STRETCH - 1)), index(STRETCH))
                sums = e.loop(stretches, zeros, stretch)
                if paired:  # its queries are not scaled: that would round them
                    steps = [
                        e.load(fact_at(e, facts_memory, QUERY_STEP, shape, part), vector(F32))
                        for part in range(shape.vectors)
                    ]
                    sums = [e.mul(x, steps[at % shape.vectors]) for at, x in enumerate(sums)]
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
                e.store(found[part], fact_at(e, facts_memory, PHASE_MAX, shape, part))

        if rows <= FEW:
            e.switch(number, ALL_FORMATS, few)
        else:
            e.switch(number, ARITHMETICS, many)
        return context.get_dummy_value()

    return signature, generate
