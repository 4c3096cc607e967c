"""Attention mass: what each key gets from new tokens. Weights are kept while they attend, and scaled when lse is known.

Kept are few rows for each key, (keys, columns), and behind them a RECORD of each phase: its weights count from the
greatest score that there was until then. Where pieces know their lse, each worker keeps the weights of one piece at a
time; otherwise those of all pieces lie one after the other until results are merged.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import plain
from kvnumba.backends.cpu.shapes import MOST_KEPT, OFFSET, ROW_MAX, Shape, state_at
from kvnumba.backends.cpu.simd import EVEN, F32, HIDDEN, LANES, ODD, Emitter, Int, constant, vector
from kvnumba.backends.cpu.storage import memory_of, offset_of

SPARE = MOST_KEPT * LANES  # floats behind a piece's weights, which are read and written in whole vectors
RECORD = LANES + 1  # floats: from which score each column counts, and the key after the phase
TILE = 512  # keys whose masses one worker adds


def kept_floats(shape, keys):
    """Floats that pieces of so many keys need: a run takes whole tiles of a phase, so a phase may have few keys."""
    phases = keys * max(shape.tokens, 2) // shape.phase + 1
    return keys * shape.columns + SPARE + phases * RECORD


@plain
def first_record(columns, piece):
    """Where the records of a piece begin."""
    return piece.kept + (piece.end_key - piece.first_key) * columns + SPARE


@intrinsic
def record_phase(typing, shape, kept, start, end, lacking, scratch):
    """Write a RECORD at `start`, of a phase before the key `end`; `lacking`: its scores lack their OFFSET."""
    signature = types.void(shape, kept, types.intp, types.intp, types.boolean, scratch)
    static: Shape = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, kept, start, end, lacking, scratch = e.arguments(signature, args)
        top, offset = (
            e.load(state_at(scratch.state, name, static), vector(F32)) for name in (ROW_MAX, OFFSET)
        )
        record = kept.start + start * 4
        e.store(e.add(top, b.select(lacking, offset, constant(0.0))), record)
        e.store(end.narrow(), record + 4 * LANES)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_keys(typing, kept, start, count, columns, record, shifts, mass, first):
    """Add the weights of `count` keys of a phase, counted from `shifts`, one for each lane, and summed over columns."""
    signature = types.void(kept, *[types.intp] * 4, shifts, mass, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        kept, start, count, columns, record, shifts, mass, first = e.arguments(signature, args)
        target = mass.start + first * 4

        def case(columns: int) -> None:
            tops = e.load(kept.start + record * 4, vector(F32))
            factor = e.exp(e.sub(tops, e.load(shifts.start, vector(F32))))

            def sums(i: Int) -> ir.Value:
                memory = kept.start + (start + i * (LANES * columns)) * 4
                found = [e.mul(e.load(memory + 4 * LANES * n, vector(F32)), factor) for n in range(columns)]
                while len(found) > 1:  # neighbours are of one key, until each lane is a key
                    pairs = zip(found[::2], found[1::2], strict=True)
                    found = [e.add(e.shuffle(x, y, EVEN), e.shuffle(x, y, ODD)) for x, y in pairs]
                return found[0]

            def some(i: Int, _: list[ir.Value]) -> list[ir.Value]:
                masses = target + i * (4 * LANES)
                e.store(e.add(e.load(masses, vector(F32)), sums(i)), masses)
                return []

            full, left = count // LANES, count % LANES
            e.loop(full, [], some)
            with e.builder.if_then(left > 0):
                masses = target + full * (4 * LANES)
                before = e.load_some(masses, left, constant(0.0))
                e.store_some(e.add(before, sums(full)), masses, left)

        e.switch(columns, [1, 2, 4, MOST_KEPT], case)
        return context.get_dummy_value()

    return signature, generate


@plain
def add_weights(columns, piece, offset, lse, kept, mass, part, parts):
    """Add the masses of a piece's keys, whose weights are in `kept`, to a row of `mass`, the key's at ``offset + key``.

    Its lse (B, n, Hq) is that of all keys. Of `parts` that the row is dealt to in tiles, one is added here.
    """
    of_rows, heads = memory_of(lse), piece.num_heads
    shifts = np.empty(LANES, np.float32)
    for lane in range(LANES):
        r = lane % columns
        # the weights of a column that is not used, or sees nothing, are 0
        shifts[lane] = np.float32(-HIDDEN)
        if r < piece.num_tokens * heads:
            row_lse = of_rows[offset_of(lse, piece.token + r // heads, piece.first_head + r % heads)]
            if row_lse != -np.inf:
                shifts[lane] = row_lse
    key, record = piece.first_key, first_record(columns, piece)
    ends = kept.view(np.int32)
    while key < piece.end_key:
        end = ends[record + LANES]
        while key < end:
            tile = (key + offset) // TILE
            stop = min(end, (tile + 1) * TILE - offset)
            if tile % parts == part:
                start = piece.kept + (key - piece.first_key) * columns
                add_keys(kept, start, stop - key, columns, record, shifts, mass, offset + key)
            key = stop
        record += RECORD
