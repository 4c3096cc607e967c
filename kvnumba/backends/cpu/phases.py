"""A phase run by run, as `few` and `many` take it: all scores, one softmax, all values; and the scratch for it."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import SPLIT, split_position
from kvnumba.backends.cpu.jit import inlined, plain
from kvnumba.backends.cpu.mods import modify_run
from kvnumba.backends.cpu.runs import RUN_ROW, run_of, runs_ahead
from kvnumba.backends.cpu.shapes import LEAST, PHASE_MAX, RESCALE, STATE_ROWS, Scratch, padded, prefetch_rows
from kvnumba.backends.cpu.simd import Emitter
from kvnumba.backends.cpu.softmax import exponentiate_run, settle
from kvnumba.backends.cpu.tiles import Tiles


def scratch_floats(shape, head_dim, value_dim):
    """Floats that `cut_scratch` cuts up."""
    query, value = padded.py_func(head_dim), padded.py_func(value_dim)
    return (
        STATE_ROWS * shape.width
        + shape.columns * (query + 2 * value)
        + (shape.phase + max(shape.tokens, 2)) * shape.columns
        + shape.tile_floats.py_func(shape, head_dim, value_dim)
    )


@plain
def tile_floats(shape, head_dim, value_dim):
    """Floats of scratch for the rows that are staged: keys, and then values."""
    return (shape.phase + shape.tokens) * max(head_dim, value_dim)


@inlined
def cut_scratch(shape, head_dim, value_dim, floats, positions):
    """A worker's memory as the arrays that its phases use."""
    columns, width = shape.columns, shape.width
    state = floats[: STATE_ROWS * width].reshape(STATE_ROWS, width)
    used = STATE_ROWS * width
    size = columns * padded(head_dim)
    query = floats[used : used + size]
    used += size
    size = columns * padded(value_dim)
    total = floats[used : used + size].reshape(columns, -1)
    used += size
    sums = floats[used : used + size].reshape(columns, -1)
    used += size
    size = (shape.phase + max(shape.tokens, 2)) * columns
    scores = floats[used : used + size]
    used += size
    size = shape.tile_floats(shape, head_dim, value_dim)
    tile = floats[used : used + size]
    tile_bytes = tile.view(np.uint8).reshape(1, -1)
    halves, lanes = tile.view(np.uint16), positions[width:]
    return Scratch(state, positions[:width], query, total, sums, scores, tile, halves, tile_bytes, lanes)


@intrinsic
def begin(typing, shape):
    """Before a thread's first piece: make tiles usable, where the shape has instructions for them."""
    static = shape.static

    def generate(context, builder, signature, args):
        if static.instructions:
            Tiles(Emitter(context, builder), static.instructions).configure()
        return context.get_dummy_value()

    return types.void(shape), generate


@intrinsic
def end(typing, shape):
    """After its last: leave them."""
    static = shape.static

    def generate(context, builder, signature, args):
        if static.instructions:
            Tiles(Emitter(context, builder), static.instructions).release()
        return context.get_dummy_value()

    return types.void(shape), generate


@inlined
def attend_phase(shape, reading, storage, runs, num_runs, rows, masks, scratch):
    """Attend to the keys of some runs."""
    keys, values, later = storage.keys, storage.values, runs_ahead(storage.block_size)
    total, state = scratch.total, scratch.state
    for n in range(num_runs):
        run, following = run_of(runs, n), runs[n + later, RUN_ROW]
        if keys.scale.shape[1] == 1:
            prefetch_rows(keys.scale, following, run.num_tokens)
            prefetch_rows(keys.zero, following, run.num_tokens)
        if values.scale.shape[1] == 1:
            prefetch_rows(values.scale, run.row, run.num_tokens)
            prefetch_rows(values.zero, run.row, run.num_tokens)
        shape.score_run(shape, reading, keys, run, following, masks, scratch)
    if masks.modify != 0:
        state[PHASE_MAX] = LEAST
        for n in range(num_runs):
            modify_run(shape, run_of(runs, n), masks, scratch)
    if settle(shape, scratch):
        for r in range(rows):
            rescale = state[RESCALE, r]
            for d in range(total.shape[1]):
                total[r, d] *= rescale
    scratch.sums[:] = 0
    for n in range(num_runs):
        exponentiate_run(shape, run_of(runs, n), reading, values, masks, scratch)
    for n in range(num_runs):
        shape.weigh_run(shape, reading, values, run_of(runs, n), runs[n + later, RUN_ROW], rows, scratch)
    shape.add_phase(shape, reading, run_of(runs, num_runs - 1), rows, scratch)


@plain
def finish_phases(shape, rows, value_dim, total):
    """Nothing: the totals are rows already."""


@plain
def store_row(shape, reading, r, offset, factor, total, target, value_dim):
    """The total of row r, plus `offset`, times `factor`, in the elements' own order."""
    if SPLIT[reading.v_format]:
        for d in range(value_dim):
            target[d] = (total[r, split_position(d)] + offset) * factor
    else:
        for d in range(value_dim):
            target[d] = (total[r, d] + offset) * factor
