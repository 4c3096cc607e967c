"""Fused attention straight out of the storage: FlashAttention's online softmax over tiles of keys.

A piece of work is some new tokens of one sequence, one KV head with all its query heads, and a range of
keys. Long ranges are split over threads and merged by their lse (Flash-Decoding), so that a single sequence
keeps every thread busy. `plan` lists the pieces once per batch; `attend` works them off, layer by layer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import prange

from kvnumba.backends.cpu.jit import fast, fast_kernel, plain
from kvnumba.backends.cpu.read import gather
from kvnumba.backends.cpu.rows import place

QUERY_ROWS = 64  # query tokens times query heads of a KV head in a piece, about
KEY_TILE = 64
MIN_SPLIT = 512  # keys that are worth a piece of their own

# Columns of the table of work.
SEQUENCE, KV_HEAD, FIRST_TOKEN, NUM_TOKENS, FIRST_KEY, END_KEY, PART, PARTIAL = range(8)
WORK_COLUMNS = 8
# Columns of the table of merges.
MERGE_TOKEN, MERGE_HEAD, FIRST_PARTIAL, NUM_PARTIALS, MERGE_TOKENS = range(5)
MERGE_COLUMNS = 5


class Plan(NamedTuple):
    """What `attend` needs to know of a batch.

    Attributes
    ----------
    block_table, seq_lens, query_start_loc
        Of the batch.
    work : (N, 8) int64
        Pieces; PART counts those of one range of keys, and PARTIAL is the number of a partial result, or -1
        for a piece that is the whole range.
    worker_start : (threads + 1,) int64
        Where each thread's pieces begin.
    merges : (M, 5) int64
        Which partial results make which tokens and heads.
    scratch : (threads, n) float32
        Tiles of one thread each.
    partials : (P, rows, D + 1) float32
        Partial results, lse last.
    """

    block_table: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    work: np.ndarray
    worker_start: np.ndarray
    merges: np.ndarray
    scratch: np.ndarray
    partials: np.ndarray


def plan(batch, num_kv_heads, group, head_dim, window_left, num_threads):
    """Cut a batch into pieces that keep `num_threads` threads equally busy."""
    tile_tokens = max(1, QUERY_ROWS // group)
    arguments = (batch.seq_lens, batch.query_start_loc, num_kv_heads, tile_tokens, window_left)
    total_keys = count_keys(*arguments)
    split = max(MIN_SPLIT, -(-total_keys // (4 * num_threads)))
    split = -(-split // KEY_TILE) * KEY_TILE
    num_work, num_merges, num_partials = count_work(*arguments, split)
    work = np.empty((num_work, WORK_COLUMNS), np.int64)
    merges = np.empty((num_merges, MERGE_COLUMNS), np.int64)
    fill_work(*arguments, split, work, merges)
    # dealt like cards, the dearest first
    cost = (work[:, END_KEY] - work[:, FIRST_KEY]) * work[:, NUM_TOKENS]
    order = np.argsort(-cost, kind="stable")
    hands = [order[thread::num_threads] for thread in range(num_threads)]
    worker_start = np.cumsum([0, *(len(hand) for hand in hands)])
    rows = tile_tokens * group
    scratch_size = rows * (2 * head_dim + KEY_TILE + 2) + (KEY_TILE + 1) * head_dim
    return Plan(
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        work[np.concatenate(hands)],
        worker_start,
        merges,
        np.empty((num_threads, scratch_size), np.float32),
        np.empty((num_partials, rows, head_dim + 1), np.float32),
    )


@plain
def key_range(seq_len, count, first, tokens, window_left):
    """The keys that `tokens` new tokens from `first` on see, of a sequence with `count` new ones."""
    position = seq_len - count + first
    begin = max(0, position - window_left) if window_left >= 0 else 0
    return begin, position + tokens


@plain
def count_keys(seq_lens, query_start_loc, num_kv_heads, tile_tokens, window_left):
    """Keys that all pieces see together, if none is split."""
    total = 0
    for s in range(seq_lens.shape[0]):
        count = query_start_loc[s + 1] - query_start_loc[s]
        for first in range(0, count, tile_tokens):
            begin, end = key_range(seq_lens[s], count, first, min(tile_tokens, count - first), window_left)
            total += (end - begin) * num_kv_heads
    return total


@plain
def count_work(seq_lens, query_start_loc, num_kv_heads, tile_tokens, window_left, split):
    """How many pieces, merges and partial results there are with ranges of `split` keys at most."""
    num_work, num_merges, num_partials = 0, 0, 0
    for s in range(seq_lens.shape[0]):
        count = query_start_loc[s + 1] - query_start_loc[s]
        for first in range(0, count, tile_tokens):
            begin, end = key_range(seq_lens[s], count, first, min(tile_tokens, count - first), window_left)
            parts = (end - begin + split - 1) // split
            num_work += parts * num_kv_heads
            if parts > 1:
                num_merges += num_kv_heads
                num_partials += parts * num_kv_heads
    return num_work, num_merges, num_partials


@plain
def fill_work(seq_lens, query_start_loc, num_kv_heads, tile_tokens, window_left, split, work, merges):
    """List the pieces that `count_work` counted."""
    w, m, p = 0, 0, 0
    for s in range(seq_lens.shape[0]):
        count = query_start_loc[s + 1] - query_start_loc[s]
        for first in range(0, count, tile_tokens):
            tokens = min(tile_tokens, count - first)
            begin, end = key_range(seq_lens[s], count, first, tokens, window_left)
            parts = (end - begin + split - 1) // split
            for head in range(num_kv_heads):
                if parts > 1:
                    merges[m, MERGE_TOKEN] = query_start_loc[s] + first
                    merges[m, MERGE_HEAD] = head
                    merges[m, FIRST_PARTIAL] = p
                    merges[m, NUM_PARTIALS] = parts
                    merges[m, MERGE_TOKENS] = tokens
                    m += 1
                for part in range(parts):
                    work[w, SEQUENCE] = s
                    work[w, KV_HEAD] = head
                    work[w, FIRST_TOKEN] = first
                    work[w, NUM_TOKENS] = tokens
                    work[w, FIRST_KEY] = begin + part * split
                    work[w, END_KEY] = min(begin + (part + 1) * split, end)
                    work[w, PART] = part
                    work[w, PARTIAL] = p if parts > 1 else -1
                    p += 1 if parts > 1 else 0
                    w += 1


@fast
def exp(x):
    """e**x for x <= 0 (Cephes' expf): plain arithmetic, so that loops over it vectorise."""
    below = x < np.float32(-87.0)
    x = max(x, np.float32(-87.0))
    n = np.rint(x * np.float32(1.4426950408889634))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return np.float32(0) if below else p * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@fast
def score_tile(q, k, scores, rows, count):
    """scores[r, t] = q[r] . k[t]; four by four, so that a loaded vector is used four times."""
    head_dim = q.shape[1]
    zero = np.float32(0)
    full_rows = rows - rows % 4
    full_keys = count - count % 4
    for t in range(0, full_keys, 4):
        for r in range(0, full_rows, 4):
            a00, a01, a02, a03 = zero, zero, zero, zero
            a10, a11, a12, a13 = zero, zero, zero, zero
            a20, a21, a22, a23 = zero, zero, zero, zero
            a30, a31, a32, a33 = zero, zero, zero, zero
            for d in range(head_dim):
                k0, k1, k2, k3 = k[t, d], k[t + 1, d], k[t + 2, d], k[t + 3, d]
                q0, q1, q2, q3 = q[r, d], q[r + 1, d], q[r + 2, d], q[r + 3, d]
                a00 += q0 * k0
                a01 += q0 * k1
                a02 += q0 * k2
                a03 += q0 * k3
                a10 += q1 * k0
                a11 += q1 * k1
                a12 += q1 * k2
                a13 += q1 * k3
                a20 += q2 * k0
                a21 += q2 * k1
                a22 += q2 * k2
                a23 += q2 * k3
                a30 += q3 * k0
                a31 += q3 * k1
                a32 += q3 * k2
                a33 += q3 * k3
            scores[r, t], scores[r, t + 1], scores[r, t + 2], scores[r, t + 3] = a00, a01, a02, a03
            scores[r + 1, t], scores[r + 1, t + 1], scores[r + 1, t + 2], scores[r + 1, t + 3] = (
                a10,
                a11,
                a12,
                a13,
            )
            scores[r + 2, t], scores[r + 2, t + 1], scores[r + 2, t + 2], scores[r + 2, t + 3] = (
                a20,
                a21,
                a22,
                a23,
            )
            scores[r + 3, t], scores[r + 3, t + 1], scores[r + 3, t + 2], scores[r + 3, t + 3] = (
                a30,
                a31,
                a32,
                a33,
            )
        for r in range(full_rows, rows):
            b0, b1, b2, b3 = zero, zero, zero, zero
            for d in range(head_dim):
                value = q[r, d]
                b0 += value * k[t, d]
                b1 += value * k[t + 1, d]
                b2 += value * k[t + 2, d]
                b3 += value * k[t + 3, d]
            scores[r, t], scores[r, t + 1], scores[r, t + 2], scores[r, t + 3] = b0, b1, b2, b3
    for t in range(full_keys, count):
        for r in range(rows):
            total = zero
            for d in range(head_dim):
                total += q[r, d] * k[t, d]
            scores[r, t] = total


@fast
def weigh_values(weights, v, total, part, rows, count):
    """total[r] += sum over t of weights[r, t] * v[t]; four tokens at a time.

    The tile is summed in `part` (D,) first: a running sum over a long sequence would round away its tail.
    """
    full = count - count % 4
    for r in range(rows):
        part[:] = 0
        for t in range(0, full, 4):
            w0, w1, w2, w3 = weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
            v0, v1, v2, v3 = v[t], v[t + 1], v[t + 2], v[t + 3]
            for d in range(part.shape[0]):
                part[d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d]
        for t in range(full, count):
            w0, v0 = weights[r, t], v[t]
            for d in range(part.shape[0]):
                part[d] += w0 * v0[d]
        row = total[r]
        for d in range(part.shape[0]):
            row[d] += part[d]


@fast
def softmax_tile(
    scores, total, row_max, row_sum, rows, count, first_key, first_position, group, head, scoring, slopes
):
    """Turn scores into weights in place; rescale what the rows have summed so far."""
    window_left, soft_cap = scoring
    for r in range(rows):
        position = first_position + r // group
        end = min(position + 1 - first_key, count)
        begin = max(position - window_left - first_key, 0) if window_left >= 0 else 0
        row = scores[r]
        if begin >= end:
            row[:count] = 0
            continue
        if soft_cap > 0:
            for t in range(begin, end):
                row[t] = soft_cap * np.float32(math.tanh(row[t] / soft_cap))
        if slopes.shape[0] > 0:
            slope = slopes[head * group + r % group]
            for t in range(begin, end):
                row[t] -= slope * np.float32(position - first_key - t)
        top = row_max[r]
        for t in range(begin, end):
            top = max(top, row[t])
        rescale = exp(row_max[r] - top) if row_max[r] != top else np.float32(1)
        row_max[r] = top
        row[:begin] = 0
        row[end:count] = 0
        added = np.float32(0)
        for t in range(begin, end):
            row[t] = exp(row[t] - top)
            added += row[t]
        row_sum[r] = row_sum[r] * rescale + added
        if rescale != 1:
            for d in range(total.shape[1]):
                total[r, d] *= rescale


@fast
def attend_piece(
    piece, q, q_strides, out, out_strides, lse, lse_strides, partials, scratch,
    block_table, seq_lens, query_start_loc, first_block, block_size, num_heads, group, head_dim,
    k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
    sm_scale, scoring, sinks, slopes,
):  # fmt: skip
    """One piece of work, from its queries to its result or partial result."""
    s, head, tokens, partial = piece[SEQUENCE], piece[KV_HEAD], piece[NUM_TOKENS], piece[PARTIAL]
    token = query_start_loc[s] + piece[FIRST_TOKEN]
    position = seq_lens[s] - query_start_loc[s + 1] + token
    blocks = block_table[s]

    rows = tokens * group
    tile_size, query_size, scores_size = KEY_TILE * head_dim, rows * head_dim, rows * KEY_TILE
    tile = scratch[:tile_size].reshape(KEY_TILE, head_dim)
    used = tile_size
    query = scratch[used : used + query_size].reshape(rows, head_dim)
    used += query_size
    total = scratch[used : used + query_size].reshape(rows, head_dim)
    used += query_size
    scores = scratch[used : used + scores_size].reshape(rows, KEY_TILE)
    used += scores_size
    row_max = scratch[used : used + rows]
    row_sum = scratch[used + rows : used + 2 * rows]
    used += 2 * rows
    part = scratch[used : used + head_dim]

    # a sink is a key that every query sees, whose value is 0; the first part of a range counts it
    counts_sink = sinks.shape[0] > 0 and piece[PART] == 0
    for r in range(rows):
        qo_head = head * group + r % group
        start = place(token + r // group, qo_head, q_strides)
        for d in range(head_dim):
            query[r, d] = q[start + d] * sm_scale
            total[r, d] = 0
        row_max[r] = sinks[qo_head] if counts_sink else np.float32(-np.inf)
        row_sum[r] = 1 if counts_sink else 0

    for key in range(piece[FIRST_KEY], piece[END_KEY], KEY_TILE):
        end = min(key + KEY_TILE, piece[END_KEY])
        keys = tile[: end - key]
        gather(
            k_codes,
            k_scale,
            k_zero,
            k_format,
            blocks,
            first_block,
            block_size,
            num_heads,
            head,
            key,
            end,
            keys,
        )
        score_tile(query, keys, scores, rows, end - key)
        softmax_tile(
            scores, total, row_max, row_sum, rows, end - key, key, position, group, head, scoring, slopes
        )
        gather(
            v_codes,
            v_scale,
            v_zero,
            v_format,
            blocks,
            first_block,
            block_size,
            num_heads,
            head,
            key,
            end,
            keys,
        )
        weigh_values(scores, keys, total, part, rows, end - key)

    for r in range(rows):
        seen = row_sum[r] != 0  # true of NaN too
        inverse = 1 / row_sum[r] if seen else np.float32(0)
        row_lse = row_max[r] + np.float32(math.log(row_sum[r])) if seen else np.float32(-np.inf)
        if partial < 0:
            qo_head = head * group + r % group
            start = place(token + r // group, qo_head, out_strides)
            for d in range(head_dim):
                out[start + d] = total[r, d] * inverse
            lse[place(token + r // group, qo_head, lse_strides)] = row_lse
        else:
            for d in range(head_dim):
                partials[partial, r, d] = total[r, d] * inverse
            partials[partial, r, head_dim] = row_lse


@fast_kernel
def attend(
    q, q_strides, out, out_strides, lse, lse_strides,
    block_table, seq_lens, query_start_loc, work, worker_start, scratch, partials,
    first_block, block_size, num_heads, group, head_dim,
    k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
    sm_scale, scoring, sinks, slopes,
):  # fmt: skip
    """Work off a plan: each thread its own pieces, in its own scratch."""
    for thread in prange(scratch.shape[0]):
        for w in range(worker_start[thread], worker_start[thread + 1]):
            attend_piece(
                work[w], q, q_strides, out, out_strides, lse, lse_strides, partials, scratch[thread],
                block_table, seq_lens, query_start_loc, first_block, block_size, num_heads, group, head_dim,
                k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
                sm_scale, scoring, sinks, slopes,
            )  # fmt: skip


@fast_kernel
def merge(out, out_strides, lse, lse_strides, merges, partials, group):
    """Combine the partial results of ranges that were split, weighted by their lse."""
    head_dim = partials.shape[2] - 1
    for m in prange(merges.shape[0]):
        first = merges[m, FIRST_PARTIAL]
        end = first + merges[m, NUM_PARTIALS]
        for r in range(merges[m, MERGE_TOKENS] * group):
            token = merges[m, MERGE_TOKEN] + r // group
            qo_head = merges[m, MERGE_HEAD] * group + r % group
            top = np.float32(-np.inf)
            for p in range(first, end):
                top = max(top, partials[p, r, head_dim])
            start = place(token, qo_head, out_strides)
            for d in range(head_dim):
                out[start + d] = 0
            weight_sum = np.float32(0)
            for p in range(first, end):
                weight = exp(partials[p, r, head_dim] - top)
                weight_sum += weight
                for d in range(head_dim):
                    out[start + d] += weight * partials[p, r, d]
            for d in range(head_dim):
                out[start + d] /= weight_sum
            lse[place(token, qo_head, lse_strides)] = top + np.float32(math.log(weight_sum))
