"""Fused attention straight out of the storage: FlashAttention's online softmax (Dao et al., 2022)."""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import BFLOAT16, FLOAT32, INT4, INT8, MIDDLE_CODE, place
from kvnumba.backends.cpu.jit import kernel, plain
from kvnumba.backends.cpu.plan import (
    END_KEY,
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
    SEQUENCE,
)
from kvnumba.backends.cpu.queries import add_phase, load_queries, padded, store_result
from kvnumba.backends.cpu.scores import score_run
from kvnumba.backends.cpu.simd import LANES
from kvnumba.backends.cpu.softmax import exponentiate_run, round_run, settle
from kvnumba.backends.cpu.stage import stage_keys, stage_values
from kvnumba.backends.cpu.tiles import (
    COLUMN_FACTS,
    RESCALE,
    columns_of,
    is_few,
    phase_tokens,
    prefetch_rows,
    shape_of,
    tile_tokens,
)
from kvnumba.backends.cpu.values import weigh_run

MIDDLE_INT8, MIDDLE_INT4 = MIDDLE_CODE[INT8], MIDDLE_CODE[INT4]
AHEAD = 64  # tokens between what is read and what is prefetched
FARTHEST = (1 << 31) - 1  # more tokens than a window can be wide

# Columns of the table of runs: first row, tokens, where their scores begin, position of the first.
RUN_ROW, RUN_COUNT, RUN_SCORES, RUN_KEY = range(4)


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
def attend_piece(
    static, piece, q, out, lse, strides, partials, floats, positions, runs, block_table, seq_lens,
    query_start_loc, first_block, block_size, num_heads, head_dim, row_floats,
    k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
    sm_scale, window_left, soft_cap, sinks, slopes, bfloat16,
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

    # A few rows read storage as it lies, unless a row has several scales; many rows want one kind of number.
    wanted = BFLOAT16 if bfloat16 and not few and head_dim % 2 == 0 else FLOAT32
    k_direct = k_scale.shape[1] <= 1 if few else k_format == wanted
    v_direct = v_scale.shape[1] <= 1 if few else v_format == FLOAT32 and wanted == FLOAT32
    k_read, v_read = k_format if k_direct else wanted, v_format if v_direct else wanted
    v_codes_read = few and (v_read == INT8 or v_read == INT4)
    pairs = not few and wanted == BFLOAT16  # values and weights come in pairs of tokens
    middle = np.float32(-1)
    if v_codes_read:
        middle = np.float32(MIDDLE_INT8 if v_read == INT8 else MIDDLE_INT4)

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
    tile_words, tile_bytes = tile.view(np.uint16), tile.view(np.uint8)
    k_tile = tile_bytes.reshape(-1, 2 * head_dim if pairs else 4 * head_dim)
    v_tile = tile_bytes.reshape(-1, 4 * head_dim)

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
                prefetch_rows(k_scale, runs[n + later, RUN_ROW], count)
                prefetch_rows(k_zero, runs[n + later, RUN_ROW], count)
            if v_scale.shape[1] == 1:
                prefetch_rows(v_scale, row, count)
                prefetch_rows(v_zero, row, count)
            codes, following = k_codes, runs[n + later, RUN_ROW]
            if not k_direct:
                prefetch_rows(k_codes, following, count)
                stage_keys(k_codes, row, count, k_format, k_scale, k_zero, pairs, head_dim, tile, tile_words)
                codes, row, following = k_tile, 0, 0
            score_run(
                static, k_read, codes, k_scale, k_zero, row, count, following, ahead,
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
            if v_codes_read or pairs:
                round_run(static, count, scores, to, facts)
            codes, following = v_codes, runs[n + later, RUN_ROW]
            if not v_direct:
                prefetch_rows(v_codes, following, count)
                stage_values(
                    v_codes, row, count, v_format, v_scale, v_zero, pairs, head_dim, tile, tile_words
                )
                codes, row, following = v_tile, 0, 0
            if pairs:
                count = (count + 1) // 2
            weigh_run(
                static, v_read, codes, row, count, following, min(AHEAD, count), scores, to,
                part, rows, head_dim,
            )  # fmt: skip
        add_phase(part, rows, middle, facts, total)

    store_result(
        piece,
        token,
        columns,
        facts,
        total,
        v_codes_read and v_read == INT4,
        head_dim,
        out,
        strides[1],
        lse,
        strides[2],
        partials,
    )


@kernel
def attend(static, worker, workers, job):
    """Take pieces of one size until none is left, each worker in its own scratch."""
    (
        counter, q, out, lse, strides, block_table, seq_lens, query_start_loc, pieces,
        partials, floats, positions, runs, first_block, block_size, num_heads, head_dim, row_floats,
        k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
        sm_scale, window_left, soft_cap, sinks, slopes, bfloat16,
    ) = job  # fmt: skip
    n = take(counter)
    while n < pieces.shape[0]:
        attend_piece(
            static, pieces[n], q, out, lse, strides, partials,
            floats[worker], positions[worker], runs[worker], block_table, seq_lens, query_start_loc,
            first_block, block_size, num_heads, head_dim, row_floats,
            k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
            sm_scale, window_left, soft_cap, sinks, slopes, bfloat16,
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
