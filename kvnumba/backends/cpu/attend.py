"""Attention straight out of the storage: the loop over a piece's phases, and the merge of partial results."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import borrowed, inlined, kernel, plain
from kvnumba.backends.cpu.mass import RECORD, add_weights, first_record, record_phase
from kvnumba.backends.cpu.runs import RUN_TOKENS, list_runs
from kvnumba.backends.cpu.shapes import (
    AHEAD,
    LEAST,
    NEVER,
    OFFSET,
    PHASE_MAX,
    QUERY_STEP,
    QUERY_SUM,
    ROW_MAX,
    ROW_SUM,
    SLOPE,
    ZERO_SUM,
    Masks,
    Piece,
)
from kvnumba.backends.cpu.storage import memory_of, offset_of
from kvnumba.backends.cpu.transforms import (
    QUERIES,
    VALUES,
    is_transformed,
    product_with_shift,
    transform_row,
)

FARTHEST = (1 << 31) - 1  # more tokens than a window can be wide

# Columns of the table of merges.
MERGE_TOKEN, MERGE_HEAD, MERGE_HEADS, MERGE_BEGIN, MERGE_END = range(5)
MERGE_COLUMNS = 5


class Views(NamedTuple):
    """What attention reads and writes for its caller: q (B, n, Hq, D), out (B, n, Hq, Dv), lse (B, n, Hq)."""

    q: Any
    out: Any
    lse: Any


class Work(NamedTuple):
    """What the workers of a launch share.

    Attributes
    ----------
    counter : (1,) int64
        How many pieces have been taken.
    pieces : (N, len(Piece)) int64
    tokens : (T',) int32
        `Part.tokens`; empty where it is None.
    block_table : (B, max_blocks) int32
    offsets, shifts : (B,) int32
        Those of the batch; empty where they are None.
    partials : (partial results * partial_rows, Dv + 1) float32
        Rows of outputs, each followed by its lse.
    partial_rows : int
    kept : (workers, n) or (1, n) float32
        Weights, of pieces whose weights are kept, see `mass.py`.
    mass : (sequences * H, longest sequence) float32
        What pieces add their masses to; empty where they are added later, or not at all.
    """

    counter: Any
    pieces: Any
    tokens: Any
    block_table: Any
    offsets: Any
    shifts: Any
    partials: Any
    partial_rows: int
    kept: Any
    mass: Any


class Memory(NamedTuple):
    """Scratch of all workers: a row for each."""

    floats: Any
    positions: Any
    runs: Any


class Job(NamedTuple):
    """Of `attend`."""

    views: Views
    work: Work
    storage: Any
    scoring: Any
    memory: Memory


class MergeJob(NamedTuple):
    """Of `merge`.

    Attributes
    ----------
    merges : (M, MERGE_COLUMNS) int64
        A token and some query heads each, and which of the `sources` make their result.
    sources : (N,) int64
        Rows of `partials`: those of the first head, the others follow it.
    sinks : (Hq,) float32, or empty
        Where the partial results have not counted them.
    """

    views: Views
    merges: Any
    sources: Any
    partials: Any
    sinks: Any


class MassJob(NamedTuple):
    """Of `add_mass`: of a launch of `attend` the lse, and more of what its `Work` has.

    Attributes
    ----------
    num_kv_heads : int
    columns : int
        Of the pieces' shape.
    """

    lse: Any
    pieces: Any
    offsets: Any
    kept: Any
    mass: Any
    num_kv_heads: int
    columns: int


@functools.cache
def scratch_sizes(shape, head_dim, value_dim):
    """Floats and runs that a worker needs: what `cut_scratch` cuts up, and `list_runs` fills."""
    floats = shape.scratch_floats(shape, head_dim, value_dim)
    return -(-floats // 16) * 16 + 32, shape.phase + AHEAD + 1


@intrinsic
def take(typing, counter):
    """The next number of a shared counter, each given to one thread."""

    def generate(context, builder, signature, args):
        pointer = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), generate


@plain
def piece_of(pieces, n):
    """A row of the table of pieces."""
    p = pieces[n]
    return Piece(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12])


@inlined
def load_queries(shape, reading, piece, work, q, head_dim, transform, scoring, scratch):
    """Lay out a piece's queries, and what is known of each column of its scores.

    Where keys are stored shifted, scores lack an OFFSET. Each is given it before a soft cap, or before a user's
    function; where there are none, ROW_MAX lacks it too, until the result is stored.
    """
    rows, heads = piece.num_tokens * piece.num_heads, piece.num_heads
    columns, width = shape.columns, shape.width
    state, positions, slopes = scratch.state, scratch.positions, scoring.slopes
    query, sm_scale = scratch.query, scoring.sm_scale  # passing whole tuples on would count all their arrays
    # a sink is a key that every query sees, whose value is 0; one piece of each token counts it
    counts_sink = scoring.sinks.shape[0] > 0 and piece.counts_sink != 0
    state[:] = 0
    state[PHASE_MAX] = LEAST
    state[ROW_MAX] = LEAST
    positions[:] = NEVER
    scratch.query[:] = 0
    memory = memory_of(q)
    transformed = is_transformed(transform)
    for r in range(rows):
        token, qo_head = piece.token + r // heads, piece.first_head + r % heads
        if work.tokens.shape[0] > 0:
            token = work.tokens[token]
        source, start = memory, offset_of(q, token, qo_head)
        offset = np.float32(0)
        if transformed:
            offset = scoring.sm_scale * product_with_shift(memory, start, transform, piece.kv_head, head_dim)
            transform_row(memory, start, transform, QUERIES, piece.kv_head, head_dim, scratch.tile, 0)
            source, start = scratch.tile, 0
        step, total = shape.load_query(shape, reading, source, start, r, head_dim, sm_scale, query)
        for column in range(r, width, columns):
            positions[column] = piece.position + r // heads
            state[QUERY_STEP, column] = step
            state[QUERY_SUM, column] = total
            state[OFFSET, column] = offset
            if slopes.shape[0] > 0:
                state[SLOPE, column] = slopes[qo_head]
            if counts_sink:
                state[ROW_MAX, column] = scoring.sinks[qo_head] - (
                    offset if lacks_offset(scoring) else np.float32(0)
                )
                state[ROW_SUM, column] = 1 if column < columns else 0
    if scoring.modify != 0:
        fill_lanes(shape, piece, of_sequence(work.offsets, piece), scoring, scratch)


@plain
def lacks_offset(scoring):
    """Whether scores lack their OFFSET until the result is stored."""
    return scoring.soft_cap == 0 and scoring.modify == 0


@plain
def of_sequence(numbers, piece):
    """The number of the piece's sequence; 0 where there are none."""
    return np.int64(numbers[piece.sequence]) if numbers.shape[0] > 0 else 0


@inlined
def fill_lanes(shape, piece, offset, scoring, scratch):
    """`Scratch.lanes` of a piece. Columns that are not used are like the first."""
    stride, size, heads = shape.all_lanes, shape.lanes, piece.num_heads
    columns = shape.group if shape.group > 0 else shape.columns
    rows = piece.num_tokens * heads
    lanes, offsets = scratch.lanes, scratch.lanes.view(np.float32)
    for i in range(stride):
        r = i // size * columns + i % size % columns
        r = r if r < rows else 0
        lanes[i] = piece.first_head + r % heads
        lanes[stride + i] = piece.position + r // heads + offset
        lanes[2 * stride + i] = i % size // columns
        offsets[3 * stride + i] = scratch.state[OFFSET, r] if scoring.soft_cap == 0 else np.float32(0)


@inlined
def store_result(shape, reading, piece, work, value_dim, transform, scoring, scratch, views):
    """Divide a piece's sums by their weights, into the output or a partial result with its lse."""
    heads, partial = piece.num_heads, piece.partial
    state, total, partials = scratch.state, scratch.total, work.partials
    out, lse = memory_of(views.out), memory_of(views.lse)
    for r in range(piece.num_tokens * heads):
        row_sum, zero_sum = np.float32(0), np.float32(0)
        for column in range(r, state.shape[1], shape.columns):
            row_sum += state[ROW_SUM, column]
            zero_sum += state[ZERO_SUM, column]
        seen = row_sum != 0  # true of NaN too
        inverse = 1 / row_sum if seen else np.float32(0)
        row_max = state[ROW_MAX, r] + (state[OFFSET, r] if lacks_offset(scoring) else np.float32(0))
        row_lse = row_max + np.float32(math.log(row_sum)) if seen else np.float32(-np.inf)
        if partial < 0:
            token, qo_head = piece.token + r // heads, piece.first_head + r % heads
            start = offset_of(views.out, token, qo_head)
            target = out[start : start + value_dim]
            lse[offset_of(views.lse, token, qo_head)] = row_lse
        else:
            row = partial * work.partial_rows + r
            target = partials[row, :value_dim]
            partials[row, value_dim] = row_lse
        shape.store_row(shape, reading, r, zero_sum, inverse, total, target, value_dim)
        if is_transformed(transform):
            transform_row(target, 0, transform, VALUES, piece.kv_head, value_dim, target, 0)


@inlined
def attend_piece(shape, piece, views, work, kept_weights, storage, scoring, scratch, runs):
    """One piece of work, from its queries to its result or partial result."""
    keys, values, kv_head = storage.keys, storage.values, piece.kv_head
    rows = piece.num_tokens * piece.num_heads
    blocks = work.block_table[piece.sequence]

    reading = shape.choose(keys, values, scoring)
    transform = storage.transform
    load_queries(shape, reading, piece, work, views.q, keys.head_dim, transform, scoring, scratch)
    scratch.total[:] = 0

    window, cap = scoring.window_left, scoring.soft_cap
    unmasked = window < 0 and cap == 0 and scoring.slopes.shape[0] == 0
    reach = np.int32(min(window, FARTHEST) if window >= 0 else FARTHEST)
    offset, shift = of_sequence(work.offsets, piece), of_sequence(work.shifts, piece)
    known = piece.position if unmasked else -1
    kept, record = address_of_kept(shape, piece, kept_weights), first_record(shape.columns, piece)
    masks = Masks(reach, known, cap, scoring.modify, scoring.aux, offset, shift, kept)
    key, end = piece.first_key, piece.end_key
    while key < end:
        first = key
        num_runs, key = list_runs(shape, blocks, key, end, storage, kv_head, runs)
        if kept != 0:
            fill_gaps(shape, piece, kept_weights, first, key, runs, num_runs)
        if num_runs > 0:
            shape.attend_phase(shape, reading, storage, runs, num_runs, rows, masks, scratch)
        if kept != 0:
            record_phase(shape, kept_weights, record, key, lacks_offset(scoring), scratch)
            record += RECORD
    shape.finish_phases(shape, rows, values.head_dim, scratch.total)
    store_result(shape, reading, piece, work, values.head_dim, transform, scoring, scratch, views)
    if work.mass.shape[0] > 0:
        mass = work.mass[piece.sequence * storage.num_heads + kv_head]
        add_weights(shape.columns, piece, offset, views.lse, kept_weights, mass, 0, 1)


@plain
def address_of_kept(shape, piece, kept):
    """`Masks.kept` of a piece."""
    if piece.kept < 0:
        return 0
    return kept.ctypes.data + 4 * (piece.kept - piece.first_key * shape.columns)


@plain
def fill_gaps(shape, piece, kept, first, end, runs, num_runs):
    """Weights of 0 for the keys from `first` to `end`, if some of them are in no run."""
    there = 0
    for n in range(num_runs):
        there += runs[n, RUN_TOKENS]
    if there < end - first:
        start = piece.kept + (first - piece.first_key) * shape.columns
        kept[start : start + (end - first) * shape.columns] = 0


@kernel
def attend(shape, worker, workers, job):
    """Take pieces of one size until none is left, each worker in its own scratch."""
    views, work, storage, scoring, memory = borrowed(job)
    head_dim, value_dim = storage.keys.head_dim, storage.values.head_dim
    floats, positions = memory.floats[worker], memory.positions[worker]
    scratch = shape.cut_scratch(shape, head_dim, value_dim, floats, positions)
    kept = work.kept[worker % work.kept.shape[0]]
    shape.begin(shape)
    n = take(work.counter)
    while n < work.pieces.shape[0]:
        piece = piece_of(work.pieces, n)
        attend_piece(shape, piece, views, work, kept, storage, scoring, scratch, memory.runs[worker])
        n = take(work.counter)
    shape.end(shape)


@kernel
def add_mass(static, worker, workers, job):
    """Add the masses of pieces; all that is added to one key's, by one worker."""
    lse, pieces, offsets, kept, mass, num_kv_heads, columns = borrowed(job)
    for n in range(pieces.shape[0]):
        piece = piece_of(pieces, n)
        row = mass[piece.sequence * num_kv_heads + piece.kv_head]
        add_weights(columns, piece, of_sequence(offsets, piece), lse, kept[0], row, worker, workers)


@kernel
def merge(static, worker, workers, job):
    """Combine partial results over disjoint keys, weighted by their lse."""
    views, merges, sources, partials, sinks = borrowed(job)
    out, lse = memory_of(views.out), memory_of(views.lse)
    width = partials.shape[1] - 1
    for m in range(worker, merges.shape[0], workers):
        token, begin, end = merges[m, MERGE_TOKEN], merges[m, MERGE_BEGIN], merges[m, MERGE_END]
        for head in range(merges[m, MERGE_HEADS]):
            qo_head = merges[m, MERGE_HEAD] + head
            top, weight_sum = np.float32(-np.inf), np.float32(0)
            if sinks.shape[0] > 0:
                top = sinks[qo_head]
            unseen = top == -np.inf
            for n in range(begin, end):
                row_lse = partials[sources[n] + head, width]
                top = max(top, row_lse)  # NaN is passed over here, and weighs NaN below
                unseen = unseen and row_lse == -np.inf
            start = offset_of(views.out, token, qo_head)
            out[start : start + width] = 0
            lse[offset_of(views.lse, token, qo_head)] = top
            if unseen:
                continue
            if sinks.shape[0] > 0:
                weight_sum = np.float32(math.exp(sinks[qo_head] - top))
            for n in range(begin, end):
                row = sources[n] + head
                weight = np.float32(math.exp(partials[row, width] - top))
                weight_sum += weight
                for d in range(width):
                    out[start + d] += weight * partials[row, d]
            for d in range(width):
                out[start + d] /= weight_sum
            lse[offset_of(views.lse, token, qo_head)] = top + np.float32(math.log(weight_sum))
