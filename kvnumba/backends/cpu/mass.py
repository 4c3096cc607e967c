"""Attention mass: what each key gets from new tokens. Scores are kept while they attend, and weighed when their lse is
known.

Kept are few rows for each key, as raw scores (keys, columns): weights of each phase would count from another maximum.
Where pieces know their lse, each worker keeps the scores of one piece at a time, which then are in its cache still;
otherwise those of all pieces lie one after the other until results are merged.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import plain
from kvnumba.backends.cpu.shapes import OFFSET, Shape, state_at
from kvnumba.backends.cpu.simd import (
    EVEN,
    F32,
    HIDDEN,
    I8,
    LANES,
    LOG2_E,
    ODD,
    Emitter,
    Int,
    Pointer,
    constant,
    vector,
)
from kvnumba.backends.cpu.storage import memory_of, offset_of

MOST_COLUMNS = 8
SPARE = MOST_COLUMNS * LANES  # floats behind a piece's scores, which are read and written in whole vectors
TILE = 512  # keys whose masses are summed before they are added


@intrinsic
def keep_run(typing, shape, run, masks, scratch):
    """Keep the scores of a run, which are about to become weights; those that lack their OFFSET with it."""
    signature = types.void(shape, run, masks, scratch)
    static: Shape = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, run, masks, scratch = e.arguments(signature, args)
        source = scratch.scores.start + run.scores * 4
        target = Pointer(b, b.inttoptr(masks.kept.value, I8.as_pointer())) + run.key * (4 * static.columns)
        lacking = b.and_(
            b.fcmp_ordered("==", masks.soft_cap, ir.Constant(F32, 0.0)), masks.modify == 0
        )  # `attend.lacks_offset`
        offsets = [
            b.select(
                lacking, e.load(state_at(scratch.state, OFFSET, static, part), vector(F32)), constant(0.0)
            )
            for part in range(static.vectors)
        ]

        ahead = (
            static.phase * static.columns * 4
        )  # where the next phase writes: a store waits for its line too

        def line(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            for part, offset in enumerate(offsets):
                at = (i * static.vectors + part) * (4 * LANES)
                e.store(e.add(e.load(source + at, vector(F32)), offset), target + at)
                e.prefetch(target + at + ahead)
            return []

        e.loop((run.num_tokens + (static.line - 1)) // static.line, [], line)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def sum_weights(typing, kept, start, count, columns, shifts, sums):
    """The weights of `count` keys, summed over columns: ``exp(score - shift)``, with a shift for each lane."""
    signature = types.void(kept, types.intp, types.intp, types.intp, shifts, sums)

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        kept, start, count, columns, shifts, sums = e.arguments(signature, args)

        def case(columns: int) -> None:
            hidden, factor = constant(HIDDEN), constant(LOG2_E)
            shift = e.mul(e.load(shifts.start, vector(F32)), constant(-LOG2_E))

            def some(i: Int, _: list[ir.Value]) -> list[ir.Value]:
                first = kept.start + (start + i * (LANES * columns)) * 4
                scores = [e.load(first + 4 * LANES * n, vector(F32)) for n in range(columns)]
                powers = [e.fma(x, factor, shift) for x in scores]
                powers = [b.select(b.fcmp_ordered("<", x, hidden), hidden, x) for x in powers]  # NaN stays
                found = [e.exp2(x) for x in powers]
                while len(found) > 1:  # neighbours are of one key, until each lane is a key
                    pairs = zip(found[::2], found[1::2], strict=True)
                    found = [e.add(e.shuffle(x, y, EVEN), e.shuffle(x, y, ODD)) for x, y in pairs]
                e.store(found[0], sums.start + i * (4 * LANES))
                return []

            e.loop((count + (LANES - 1)) // LANES, [], some)

        e.switch(columns, [1, 2, 4, MOST_COLUMNS], case)
        return context.get_dummy_value()

    return signature, generate


@plain
def add_weights(columns, piece, offset, lse, kept, mass, part, parts):
    """Add the masses of a piece's keys, whose scores are in `kept`, to a row of `mass`, the key's at ``offset + key``.

    Its lse (B, n, Hq) is that of all keys. Of `parts` that the row is dealt to in tiles, one is added here.
    """
    of_rows, heads = memory_of(lse), piece.num_heads
    shifts, sums = np.empty(LANES, np.float32), np.empty(TILE + LANES, np.float32)
    for lane in range(LANES):
        r = lane % columns
        # the weights of a column that is not used, or sees nothing, are 0
        shifts[lane] = np.float32(-HIDDEN)
        if r < piece.num_tokens * heads:
            row_lse = of_rows[offset_of(lse, piece.token + r // heads, piece.first_head + r % heads)]
            if row_lse != -np.inf:
                shifts[lane] = row_lse
    key = piece.first_key
    while key < piece.end_key:
        tile = (key + offset) // TILE
        end = min(piece.end_key, (tile + 1) * TILE - offset)
        if tile % parts == part:
            start = piece.kept + (key - piece.first_key) * columns
            sum_weights(kept, start, end - key, columns, shifts, sums)
            found = mass[offset + key : offset + end]  # whose numbers from 0 on LLVM knows not to be negative
            for i in range(found.shape[0]):
                found[i] += sums[i]
        key = end
