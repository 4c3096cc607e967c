"""The online softmax between scores and values: the second phase of attention, the same for all shapes.

It is that of FlashAttention (Dao et al., 2022).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import load_scales
from kvnumba.backends.cpu.shapes import (
    LEAST,
    PHASE_MAX,
    RESCALE,
    ROW_MAX,
    ROW_SUM,
    WEIGHT_MAX,
    ZERO_SUM,
    Shape,
    state_at,
    tokens_of,
)
from kvnumba.backends.cpu.simd import F32, I1, I8, LANES, Emitter, Int, Pointer, constant, vector


def column_tops(e: Emitter, shape: Shape, scratch: Any, name: int) -> list[ir.Value]:
    """A row of the state, each lane the greatest of those of its column."""
    tops = [e.load(state_at(scratch.state, name, shape, part), vector(F32)) for part in range(shape.vectors)]
    together, results = e.join(tops), []
    for part, top in enumerate(tops):
        for token in range(1, shape.line):
            first = part * LANES + token * shape.columns
            lanes = [(first + lane) % shape.width for lane in range(LANES)]
            top = e.max(e.pick(together, lanes), top)
        results.append(top)
    return results


@intrinsic
def settle(typing, shape, scratch):
    """Take the phase's greatest scores into those of the rows, and rescale the rows' sums to them.

    Returns whether the maximum of any row has grown; RESCALE then holds what each row's weighted values are to be
    multiplied by. A score of NaN is no maximum (`Emitter.max` returns its second operand): it makes the row's sums NaN
    through its own weight.
    """
    signature = types.boolean(shape, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, scratch = e.arguments(signature, args)
        moved = ir.Constant(I1, 0)
        for part, top in enumerate(column_tops(e, static, scratch, PHASE_MAX)):

            def at(name: int, part: int = part) -> Pointer:
                return state_at(scratch.state, name, static, part)

            before = e.load(at(ROW_MAX), vector(F32))
            now = e.max(top, before)
            rescale = e.exp(b.fsub(before, now))
            for name in (ROW_SUM, ZERO_SUM):
                e.store(e.mul(e.load(at(name), vector(F32)), rescale), at(name))
            e.store(now, at(ROW_MAX))
            e.store(rescale, at(RESCALE))
            e.store(constant(LEAST), at(PHASE_MAX))
            moved = b.or_(moved, e.any(b.fcmp_ordered(">", now, before)))
        return moved

    return signature, generate


@intrinsic
def exponentiate_run(typing, shape, run, reading, values, masks, scratch):
    """Turn the scores of a run into weights, in place, and add them to ROW_SUM; and keep them, where they are kept.

    Where values are multiplied as codes, each token's scale goes into its weights, of which the greatest is kept in
    WEIGHT_MAX. What the values count from (the zero, and the scale times `code_bias`) is weighed here and added
    up in ZERO_SUM: it is the same for all elements of a value.
    """
    signature = types.void(shape, run, reading, values, masks, scratch)
    static = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, run, reading, values, masks, scratch = e.arguments(signature, args)
        memory = scratch.scores.start + run.scores * 4
        lines = (run.num_tokens + (static.line - 1)) // static.line
        parts = range(static.vectors)

        def load(name: int) -> list[ir.Value]:
            return [e.load(state_at(scratch.state, name, static, part), vector(F32)) for part in parts]

        tops = load(ROW_MAX)
        kept = Pointer(b, b.inttoptr(masks.kept.value, I8.as_pointer())) + run.key * (4 * static.columns)
        ahead = 4 * static.phase * static.columns  # the next phase's: a store waits for its line too

        def weights(
            i: Int, sums: list[ir.Value], keeps: bool
        ) -> tuple[list[Any], list[ir.Value], list[ir.Value]]:
            pointers, found, totals = [], [], []
            for part in parts:
                pointer = memory + (i * static.vectors + part) * (4 * LANES)
                weight = e.exp(b.fsub(e.load(pointer, vector(F32)), tops[part]))
                pointers.append(pointer)
                found.append(weight)
                totals.append(e.add(sums[part], weight))
            if keeps:
                for part, weight in enumerate(found):
                    target = kept + (i * static.vectors + part) * (4 * LANES)
                    e.store(weight, target)
                    e.prefetch(target + ahead)
            return pointers, found, totals

        def keep(name: int, sums: list[ir.Value]) -> None:
            for part, (before, more) in enumerate(zip(load(name), sums, strict=True)):
                e.store(e.add(before, more), state_at(scratch.state, name, static, part))

        def plain(keeps: bool) -> None:
            def line(i: Int, sums: list[ir.Value]) -> list[ir.Value]:
                pointers, found, totals = weights(i, sums, keeps)
                for pointer, weight in zip(pointers, found, strict=True):
                    e.store(weight, pointer)
                return totals

            keep(ROW_SUM, e.loop(lines, [constant(0.0)] * static.vectors, line))

        def fold(keeps: bool) -> None:
            patterns = [tokens_of(static, part) for part in parts]
            count = static.vectors

            def line(i: Int, sums: list[ir.Value]) -> list[ir.Value]:
                pointers, found, totals = weights(i, sums[:count], keeps)
                offsets, tops = sums[count : 2 * count], sums[2 * count :]
                at = run.row + i * static.line
                scales = [load_scales(e, array, at, static.line) for array in (values.scale, values.zero)]
                for part in parts:
                    # a token past the run has weight 0, but its stale scale may be NaN
                    none = b.fcmp_ordered("==", found[part], constant(0.0))
                    step, low = (b.select(none, constant(0.0), e.pick(x, patterns[part])) for x in scales)
                    weight = e.mul(found[part], step)
                    e.store(weight, pointers[part])
                    offset = e.fma(step, e.splat(reading.code_bias), low)
                    offsets[part] = e.fma(found[part], offset, offsets[part])
                    tops[part] = e.max(weight, tops[part])
                return totals + offsets + tops

            sums = e.loop(lines, [constant(0.0)] * (2 * count) + load(WEIGHT_MAX), line)
            keep(ROW_SUM, sums[:count])
            keep(ZERO_SUM, sums[count : 2 * count])
            for part, top in enumerate(sums[2 * count :]):
                e.store(top, state_at(scratch.state, WEIGHT_MAX, static, part))

        def exponentiate(keeps: bool) -> None:
            if not static.takes_codes:
                plain(keeps)
                return
            with b.if_else(b.fcmp_ordered(">=", reading.code_bias, ir.Constant(F32, 0.0))) as (
                folded,
                otherwise,
            ):
                with folded:
                    fold(keeps)
                with otherwise:
                    plain(keeps)

        if static.keeps:  # loops of their own: a branch in them slows decoding by 2 % where nothing is kept
            with b.if_else(masks.kept > 0) as (kept_too, not_kept):
                with kept_too:
                    exponentiate(keeps=True)
                with not_kept:
                    exponentiate(keeps=False)
        else:
            exponentiate(keeps=False)
        return context.get_dummy_value()

    return signature, generate
