"""The online softmax between scores and values: the second phase of attention."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import nearest_bfloat16, side_by_side
from kvnumba.backends.cpu.simd import F32, I1, I16, I32, LANES, Emitter, constant, index, vector
from kvnumba.backends.cpu.tiles import (
    FEW,
    LARGEST_WORD,
    LEAST,
    PHASE_MAX,
    RESCALE,
    ROW_MAX,
    ROW_SUM,
    WEIGHT_SUM,
    WEIGHT_TOP,
    ZERO_SUM,
    fact_at,
    shape_of,
)

TINY = 1e-30  # below it the reciprocal of a float32 may be infinite


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
                return fact_at(e, memory, fact, shape, part)

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
def exponentiate_run(typing, static, count, scores, to, facts, middle, scale, zero, row):
    """Turn the scores of a run into weights, and add them to the rows' sums.

    Where values are codes that have a scale a row, `middle` is the one that counts as 0, otherwise -1. Then
    scales are folded into the weights, whose greatest are kept, and zero points into a sum of their own.
    """
    signature = types.void(
        static, types.intp, scores, types.intp, facts, types.float32, scale, zero, types.intp
    )
    shape = shape_of(static.values[0])

    def generate(context, builder, _, args):
        e, b = Emitter(context, builder), builder
        _, count, _, to, _, middle, _, _, row = args
        memory = e.at(e.pointer(scores, args[2]), b.mul(to, index(4)))
        facts_memory = e.pointer(facts, args[4])
        lines = b.sdiv(b.add(count, index(shape.line - 1)), index(shape.line))
        parts = range(shape.vectors)

        def load(fact: int) -> list[ir.Value]:
            return [e.load(fact_at(e, facts_memory, fact, shape, part), vector(F32)) for part in parts]

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
                e.store(e.add(before, more), fact_at(e, facts_memory, fact, shape, part))

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
                weight = e.mul(found[0], step)
                e.store(weight, places[0])
                offset = e.fma(step, e.splat(middle), low)
                return [totals[0], e.fma(found[0], offset, sums[1]), e.max(weight, sums[2])]

            sums = e.loop(lines, [constant(0.0)] * 2 + load(WEIGHT_TOP), line)
            keep(ROW_SUM, sums[:1])
            keep(ZERO_SUM, sums[1:2])
            e.store(sums[2], fact_at(e, facts_memory, WEIGHT_TOP, shape))

        if shape.vectors == 1 and shape.columns <= FEW:
            with b.if_else(b.fcmp_ordered(">=", middle, ir.Constant(F32, 0.0))) as (folded, otherwise):
                with folded:
                    fold()
                with otherwise:
                    plain()
        else:
            plain()
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def round_run(typing, static, count, scores, to, facts):
    """Round the weights of a run to 16 bits, neighbouring tokens side by side: memory of (pair, column, 2).

    For a few rows they become integers, for codes: the greatest of a column's phase LARGEST_WORD, and their
    sums are kept. For many they become bfloat16.
    """
    signature = types.void(static, types.intp, scores, types.intp, facts)
    generate = _round_few if static.values[0] <= FEW else _round_many
    return signature, functools.partial(generate, static.values[0])


def _round_few(rows, context, builder, signature, args):
    e, b = Emitter(context, builder), builder
    shape = shape_of(rows)
    columns = shape.columns
    together = max(1, 2 // shape.line)  # vectors that hold a pair of tokens or more
    order = [  # their lanes are [token][column]
        (2 * pair + token) * columns + column
        for pair in range(together * shape.line // 2)
        for column in range(columns)
        for token in range(2)
    ]
    _, count, _, to, _ = args
    memory = e.at(e.pointer(signature.args[2], args[2]), b.mul(to, index(4)))
    facts_memory = e.pointer(signature.args[4], args[4])
    size = together * shape.line
    top = e.load(fact_at(e, facts_memory, WEIGHT_TOP, shape), vector(F32))
    top = e.reduce(top, e.max, columns)
    nothing = constant(0.0)
    large = b.fcmp_ordered(">", top, constant(TINY))
    rate = b.select(large, b.fdiv(constant(float(LARGEST_WORD)), top), nothing)

    def some(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        token = b.mul(i, index(size))
        rounded = []
        for n in range(together):
            weight = e.load(e.at(memory, b.mul(token, index(4 * columns))), vector(F32))
            scaled = b.fmul(weight, rate)
            used = b.fcmp_ordered("ord", scaled, scaled)
            if n:  # a line past the run has not been computed
                used = b.and_(used, e.splat(b.icmp_signed("<", token, count)))
            scaled = b.select(used, scaled, nothing)
            rounded.append(b.fptosi(b.fadd(scaled, constant(0.5)), vector(I32)))
            token = b.add(token, index(shape.line))
        words = [b.trunc(x, vector(I16)) for x in rounded]
        # half as much is written as is read, and behind it
        e.store(e.shuffle(words[0], words[-1], order), e.at(memory, b.mul(i, index(2 * together * LANES))))
        return [functools.reduce(b.add, rounded, sums[0])]

    steps = b.sdiv(b.add(count, index(size - 1)), index(size))
    total = e.loop(steps, [constant(0, I32)], some)[0]
    place = fact_at(e, facts_memory, WEIGHT_SUM, shape)
    e.store(e.add(e.load(place, vector(F32)), b.sitofp(total, vector(F32))), place)
    return context.get_dummy_value()


def _round_many(rows, context, builder, signature, args):
    e, b = Emitter(context, builder), builder
    shape = shape_of(rows)
    _, count, _, to, _ = args
    memory = e.at(e.pointer(signature.args[2], args[2]), b.mul(to, index(4)))
    row_bytes = 4 * shape.columns

    def two_tokens(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        source, target = (e.at(memory, b.mul(i, index(size))) for size in (2 * row_bytes, row_bytes))
        both = e.splat(b.icmp_signed("<", b.add(b.mul(i, index(2)), index(1)), count))
        for part in range(shape.vectors):
            offset = 4 * part * LANES
            first, second = (e.load(e.at(source, offset + n), vector(F32)) for n in (0, row_bytes))
            second = b.select(both, second, constant(0.0))
            pair = (nearest_bfloat16(e, x) for x in (first, second))
            e.store(side_by_side(e, *pair), e.at(target, offset))
        return []

    e.loop(b.sdiv(b.add(count, index(1)), index(2)), [], two_tokens)
    return context.get_dummy_value()
