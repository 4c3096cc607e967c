"""Fused attention straight out of the storage: FlashAttention's online softmax (Dao et al., 2022)."""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import FLOAT32, INT4, INT8, LARGEST_CODE, MIDDLE_CODE, decode_row, place
from kvnumba.backends.cpu.jit import kernel, plain
from kvnumba.backends.cpu.plan import (
    END_KEY,
    FIRST_HEAD,
    FIRST_KEY,
    FIRST_PARTIAL,
    FIRST_TOKEN,
    KV_HEAD,
    MERGE_HEAD,
    MERGE_HEADS,
    MERGE_TOKEN,
    MERGE_TOKENS,
    NUM_HEADS,
    NUM_PARTIALS,
    NUM_TOKENS,
    PART,
    PARTIAL,
    SEQUENCE,
)
from kvnumba.backends.cpu.scores import score_run
from kvnumba.backends.cpu.simd import LANES
from kvnumba.backends.cpu.softmax import exponentiate_run, round_run, settle
from kvnumba.backends.cpu.tiles import (
    COLUMN_FACTS,
    LARGEST_WORD,
    LEAST,
    PHASE_MAX,
    QUERY_STEP,
    QUERY_SUM,
    RESCALE,
    ROW_MAX,
    ROW_SUM,
    SLOPE,
    WEIGHT_SUM,
    WEIGHT_TOP,
    ZERO_SUM,
    columns_of,
    is_few,
    phase_tokens,
    prefetch_floats,
    shape_of,
    tile_tokens,
)
from kvnumba.backends.cpu.values import weigh_run

LARGEST_INT8, LARGEST_INT4 = LARGEST_CODE[INT8], LARGEST_CODE[INT4]
MIDDLE_INT8, MIDDLE_INT4 = MIDDLE_CODE[INT8], MIDDLE_CODE[INT4]
MOST_SUM = (1 << 31) - 1  # of products with codes: they are summed in 32 bits
TINY = np.float32(1e-30)  # queries whose greatest element is this small of LARGEST_WORD make scores of 0
AHEAD = 64  # tokens between what is read and what is prefetched
FARTHEST = (1 << 31) - 1  # more tokens than a window can be wide
NEVER = -(1 << 30)  # the position of a row that pads a vector: it sees nothing

# Columns of the table of runs: first row, tokens, where their scores begin, position of the first.
RUN_ROW, RUN_COUNT, RUN_SCORES, RUN_KEY = range(4)


def padded(head_dim):
    """Floats of a row in scratch: whole chunks of every format."""
    return -(-head_dim // (4 * LANES)) * 4 * LANES


@functools.cache
def scratch_sizes(rows, head_dim):
    """Floats and runs that a worker of a kernel for so many rows needs: what `attend_piece` cuts up."""
    shape = shape_of(rows)
    width = shape.vectors * LANES
    floats = (
        COLUMN_FACTS * width
        + 3 * shape.columns * padded(head_dim)
        + (shape.phase + max(shape.tokens, 2)) * (shape.columns + head_dim)
        + 2 * LANES
    )
    return -(-floats // LANES) * LANES, shape.phase + AHEAD + 1


@intrinsic
def take(typing, counter):
    """The next number of a shared counter, each given to one thread."""

    def generate(context, builder, signature, args):
        pointer = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(counter), generate


@plain
def find_row(blocks, key, first_block, block_size, num_heads, head):
    """The row of the storage where a key of a sequence lies."""
    block = first_block + blocks[key // block_size]
    return (block * num_heads + head) * block_size + key % block_size


@plain
def list_runs(static, blocks, key, end, phase, first_block, block_size, num_heads, head, runs):
    """List runs from `key` on, up to a phase of them; returns how many, and the key after them.

    Entries after the last hold the rows of as many following runs as are prefetched.
    """
    tokens, columns = max(tile_tokens(static), 2), columns_of(static)  # weights may be taken in pairs
    n, used = 0, 0
    while key < end and used < phase:
        count = min(block_size - key % block_size, end - key, phase - used)
        runs[n, RUN_ROW] = find_row(blocks, key, first_block, block_size, num_heads, head)
        runs[n, RUN_COUNT] = count
        runs[n, RUN_SCORES] = used * columns
        runs[n, RUN_KEY] = key
        used += (count + tokens - 1) // tokens * tokens
        key += count
        n += 1
    following = key
    for further in range(runs_ahead(block_size)):
        runs[n + further, RUN_ROW] = find_row(
            blocks, min(following, end - 1), first_block, block_size, num_heads, head
        )
        following += block_size - following % block_size
    return n, key


@plain
def runs_ahead(block_size):
    """Runs from one that is read to the one that is prefetched."""
    return max(1, AHEAD // block_size)


@plain
def place_in_chunks(d, paired):
    """Where element d of a row stands among vectors; `paired`: even elements before odd, as int4 is read."""
    if not paired:
        return d
    within = d % (4 * LANES)
    return d - within + within % 2 * (2 * LANES) + within // 2


@plain
def load_queries(
    static, piece, token, position, q, strides, head_dim, sm_scale, k_format, sinks, slopes, query, facts, positions
):  # fmt: skip
    """Lay out a piece's queries, scaled, and what is known of each column of its scores.

    For a few rows of codes they are rounded to 16 bits, of which the greatest of a row uses all that the sum of
    its products with codes leaves room for.
    """
    rows, heads = piece[NUM_TOKENS] * piece[NUM_HEADS], piece[NUM_HEADS]
    columns, width = columns_of(static), facts.shape[1]
    # a sink is a key that every query sees, whose value is 0; the first part of a range counts it
    counts_sink = sinks.shape[0] > 0 and piece[PART] == 0
    facts[:] = 0
    facts[PHASE_MAX] = LEAST
    facts[ROW_MAX] = LEAST
    positions[:] = NEVER
    for column in range(width):
        r = column % columns
        if r < rows:
            qo_head = piece[FIRST_HEAD] + r % heads
            positions[column] = position + r // heads
            if slopes.shape[0] > 0:
                facts[SLOPE, column] = slopes[qo_head]
            if counts_sink:
                facts[ROW_MAX, column] = sinks[qo_head]
                facts[ROW_SUM, column] = 1 if column < columns else 0
    query[:] = 0
    for r in range(rows):
        start = place(token + r // heads, piece[FIRST_HEAD] + r % heads, strides)
        query_step, query_sum = np.float32(0), np.float32(0)
        if is_few(static) and (k_format == INT8 or k_format == INT4):
            finite = np.float32(0)
            for d in range(head_dim):
                value = q[start + d] * sm_scale
                finite += value * 0
                query_step = max(query_step, abs(value))
            largest = LARGEST_INT8 if k_format == INT8 else LARGEST_INT4
            query_step /= np.float32(min(LARGEST_WORD, MOST_SUM // (largest * head_dim)))
            if finite != 0:
                query_step = np.float32(np.nan)
            elif query_step > TINY:
                words = query[r].view(np.int16)
                total = 0
                for d in range(head_dim):
                    word = np.int16(np.rint(q[start + d] * sm_scale / query_step))
                    words[place_in_chunks(d, k_format == INT4)] = word
                    total += word
                query_sum = query_step * np.float32(total)
        else:
            for d in range(head_dim):
                value = q[start + d] * sm_scale
                query_sum += value
                if is_few(static):
                    query[r, d] = value
                else:
                    query[d, r] = value
        for column in range(r, width, columns):
            facts[QUERY_STEP, column] = query_step
            facts[QUERY_SUM, column] = query_sum


@plain
def add_phase(part, rows, middle, facts, total):
    """Add a phase's values to the sums of all; those of codes (`middle` at least 0) are sums of products."""
    row_floats = part.shape[1]
    if middle < 0:
        for r in range(rows):
            for d in range(row_floats):
                total[r, d] += part[r, d]
        return
    for r in range(rows):
        top, weight_sum = np.float32(0), np.float32(0)
        for column in range(r, facts.shape[1], part.shape[0]):
            top = max(top, facts[WEIGHT_TOP, column])
            weight_sum += facts[WEIGHT_SUM, column]
        step, centre = top / np.float32(LARGEST_WORD), np.int32(weight_sum) * np.int32(middle)
        products = part[r].view(np.int32)
        for d in range(row_floats):
            total[r, d] += np.float32(products[d] - centre) * step
    facts[WEIGHT_TOP] = 0
    facts[WEIGHT_SUM] = 0


@plain
def store_result(
    piece, token, columns, facts, total, paired, head_dim, out, out_strides, lse, lse_strides, partials
):  # fmt: skip
    """Divide a piece's sums by their weights, into the output or a partial result with its lse."""
    heads, partial = piece[NUM_HEADS], piece[PARTIAL]
    for r in range(piece[NUM_TOKENS] * heads):
        row_sum, zero_sum = np.float32(0), np.float32(0)
        for column in range(r, facts.shape[1], columns):
            row_sum += facts[ROW_SUM, column]
            zero_sum += facts[ZERO_SUM, column]
        seen = row_sum != 0  # true of NaN too
        inverse = 1 / row_sum if seen else np.float32(0)
        row_lse = facts[ROW_MAX, r] + np.float32(math.log(row_sum)) if seen else np.float32(-np.inf)
        if partial < 0:
            row_token, qo_head = token + r // heads, piece[FIRST_HEAD] + r % heads
            start = place(row_token, qo_head, out_strides)
            for d in range(head_dim):
                out[start + d] = (total[r, place_in_chunks(d, paired)] + zero_sum) * inverse
            lse[place(row_token, qo_head, lse_strides)] = row_lse
        else:
            for d in range(head_dim):
                partials[partial, r, d] = (total[r, place_in_chunks(d, paired)] + zero_sum) * inverse
            partials[partial, r, head_dim] = row_lse


@plain
def attend_piece(
    static, piece, q, out, lse, strides, partials, floats, positions, runs, block_table, seq_lens,
    query_start_loc, first_block, block_size, num_heads, head_dim, row_floats,
    k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
    sm_scale, window_left, soft_cap, sinks, slopes,
):  # fmt: skip
    """One piece of work, from its queries to its result or partial result."""
    s, kv_head, heads, tokens = piece[SEQUENCE], piece[KV_HEAD], piece[NUM_HEADS], piece[NUM_TOKENS]
    token = query_start_loc[s] + piece[FIRST_TOKEN]
    position = seq_lens[s] - query_start_loc[s + 1] + token
    blocks = block_table[s]
    rows = tokens * heads
    columns, few = columns_of(static), is_few(static)
    width = max(columns, LANES)
    phase = phase_tokens(static)

    # A few rows read codes as they lie, unless a row has several scales; many rows want float32.
    k_direct = k_scale.shape[1] <= 1 if few else k_format == FLOAT32
    v_direct = v_scale.shape[1] <= 1 if few else v_format == FLOAT32
    k_read = k_format if k_direct else FLOAT32
    v_paired = v_direct and v_format == INT4
    v_codes_read = v_direct and v_scale.shape[1] == 1
    middle = np.float32(-1)
    if v_codes_read:
        middle = np.float32(MIDDLE_INT8 if v_format == INT8 else MIDDLE_INT4)

    facts = floats[: COLUMN_FACTS * width].reshape(COLUMN_FACTS, width)
    used = COLUMN_FACTS * width
    query_rows, query_width = (columns, row_floats) if few else (row_floats, columns)
    query = floats[used : used + columns * row_floats].reshape(query_rows, query_width)
    used += columns * row_floats
    # values are summed phase by phase: one running sum over a long sequence would round its tail away
    sums = floats[used : used + 2 * columns * row_floats].reshape(2, columns, row_floats)
    total, part = sums[0], sums[1]
    used += 2 * columns * row_floats
    score_floats = (phase + max(tile_tokens(static), 2)) * columns
    scores = floats[used : used + score_floats]
    used += score_floats
    tile = floats[used : used + (phase + tile_tokens(static)) * head_dim]
    tile_codes = tile.view(np.uint8).reshape(-1, 4 * head_dim)

    total[:] = 0
    load_queries(
        static, piece, token, position, q, strides[0], head_dim, sm_scale, k_read, sinks, slopes,
        query, facts, positions,
    )  # fmt: skip

    reach = np.int32(min(window_left, FARTHEST) if window_left >= 0 else FARTHEST)
    plain_scores = window_left < 0 and soft_cap == 0 and slopes.shape[0] == 0
    seen_by_all = position if plain_scores else -1
    key, end, later = piece[FIRST_KEY], piece[END_KEY], runs_ahead(block_size)
    while key < end:
        num_runs, key = list_runs(
            static, blocks, key, end, phase, first_block, block_size, num_heads, kv_head, runs
        )
        for n in range(num_runs):
            row, count, to, first = (
                runs[n, RUN_ROW],
                runs[n, RUN_COUNT],
                runs[n, RUN_SCORES],
                runs[n, RUN_KEY],
            )
            ahead = min(AHEAD, count)
            if k_scale.shape[1] == 1:
                prefetch_floats(k_scale, runs[n + later, RUN_ROW], count)
                prefetch_floats(k_zero, runs[n + later, RUN_ROW], count)
            if v_scale.shape[1] == 1:
                prefetch_floats(v_scale, row, count)
                prefetch_floats(v_zero, row, count)
            if k_direct:
                score_run(
                    static, k_format, k_codes, k_scale, k_zero, row, count, runs[n + later, RUN_ROW], ahead,
                    query, head_dim, facts, positions, first, reach, seen_by_all, soft_cap, scores, to,
                )  # fmt: skip
            else:
                for t in range(count):
                    decode_row(k_codes, row + t, k_format, k_scale, k_zero, tile, t * head_dim, head_dim)
                score_run(
                    static, FLOAT32, tile_codes, k_scale, k_zero, 0, count, 0, ahead,
                    query, head_dim, facts, positions, first, reach, seen_by_all, soft_cap, scores, to,
                )  # fmt: skip
        if settle(static, facts):
            for r in range(rows):
                rescale = facts[RESCALE, r]
                for d in range(row_floats):
                    total[r, d] *= rescale
        part[:] = 0
        for n in range(num_runs):
            row, count, to = runs[n, RUN_ROW], runs[n, RUN_COUNT], runs[n, RUN_SCORES]
            exponentiate_run(static, count, scores, to, facts, middle, v_scale, v_zero, row)
        for n in range(num_runs):
            row, count, to = runs[n, RUN_ROW], runs[n, RUN_COUNT], runs[n, RUN_SCORES]
            ahead = min(AHEAD, count)
            if v_direct:
                if v_codes_read:
                    round_run(static, count, scores, to, facts)
                weigh_run(
                    static, v_format, v_codes, row, count, runs[n + later, RUN_ROW], ahead, scores, to,
                    part, rows, head_dim,
                )  # fmt: skip
            else:
                for t in range(count):
                    decode_row(v_codes, row + t, v_format, v_scale, v_zero, tile, t * head_dim, head_dim)
                weigh_run(static, FLOAT32, tile_codes, 0, count, 0, ahead, scores, to, part, rows, head_dim)
        add_phase(part, rows, middle, facts, total)

    store_result(
        piece, token, columns, facts, total, v_paired, head_dim, out, strides[1], lse, strides[2], partials
    )


@kernel
def attend(static, worker, workers, job):
    """Take pieces of one size until none is left, each worker in its own scratch."""
    (
        counter, q, out, lse, strides, block_table, seq_lens, query_start_loc, pieces,
        partials, floats, positions, runs, first_block, block_size, num_heads, head_dim, row_floats,
        k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
        sm_scale, window_left, soft_cap, sinks, slopes,
    ) = job  # fmt: skip
    n = take(counter)
    while n < pieces.shape[0]:
        attend_piece(
            static, pieces[n], q, out, lse, strides, partials,
            floats[worker], positions[worker], runs[worker], block_table, seq_lens, query_start_loc,
            first_block, block_size, num_heads, head_dim, row_floats,
            k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
            sm_scale, window_left, soft_cap, sinks, slopes,
        )  # fmt: skip
        n = take(counter)


@kernel
def merge(static, worker, workers, job):
    """Combine the partial results of ranges that were split, weighted by their lse."""
    out, lse, strides, merges, partials, head_dim = job
    for m in range(worker, merges.shape[0], workers):
        heads = merges[m, MERGE_HEADS]
        first = merges[m, FIRST_PARTIAL]
        end = first + merges[m, NUM_PARTIALS]
        for r in range(merges[m, MERGE_TOKENS] * heads):
            token, qo_head = merges[m, MERGE_TOKEN] + r // heads, merges[m, MERGE_HEAD] + r % heads
            top, unseen = np.float32(-np.inf), True
            for p in range(first, end):
                top = max(top, partials[p, r, head_dim])  # NaN is passed over here, and weighs NaN below
                unseen = unseen and partials[p, r, head_dim] == -np.inf
            start = place(token, qo_head, strides[1])
            out[start : start + head_dim] = 0
            lse[place(token, qo_head, strides[2])] = top
            if unseen:
                continue
            weight_sum = np.float32(0)
            for p in range(first, end):
                weight = np.float32(math.exp(partials[p, r, head_dim] - top))
                weight_sum += weight
                for d in range(head_dim):
                    out[start + d] += weight * partials[p, r, d]
            for d in range(head_dim):
                out[start + d] /= weight_sum
            lse[place(token, qo_head, strides[2])] = top + np.float32(math.log(weight_sum))
