"""A piece's queries into the kernels' layout, and its sums out of it."""

from __future__ import annotations

import math

import numpy as np

from kvnumba.backends.cpu.codecs import (
    BFLOAT16,
    INT4,
    INT8,
    LARGEST_CODE,
    place,
)
from kvnumba.backends.cpu.jit import plain
from kvnumba.backends.cpu.plan import FIRST_HEAD, NUM_HEADS, NUM_TOKENS, PART, PARTIAL
from kvnumba.backends.cpu.simd import LANES
from kvnumba.backends.cpu.tiles import (
    LARGEST_WORD,
    LEAST,
    PHASE_MAX,
    QUERY_STEP,
    QUERY_SUM,
    ROW_MAX,
    ROW_SUM,
    SLOPE,
    WEIGHT_SUM,
    WEIGHT_TOP,
    ZERO_SUM,
    columns_of,
    is_few,
)

LARGEST_INT8, LARGEST_INT4 = LARGEST_CODE[INT8], LARGEST_CODE[INT4]
MOST_SUM = (1 << 31) - 1  # of products with codes: they are summed in 32 bits
TINY = np.float32(1e-30)  # a step of queries this small makes scores of 0
NEVER = -(1 << 30)  # the position of a row that pads a vector: it sees nothing


def padded(head_dim):
    """Floats of a row in scratch: whole chunks of every format."""
    return -(-head_dim // (4 * LANES)) * 4 * LANES


@plain
def top_half(x):
    """The bits of a finite x as bfloat16, rounded to nearest even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@plain
def place_in_chunks(d, paired):
    """Where element d of a row stands among vectors; `paired`: even elements before odd, as int4 is read."""
    if not paired:
        return d
    within = d % (4 * LANES)
    return d - within + within % 2 * (2 * LANES) + within // 2


@plain
def load_queries(
    static, piece, token, position, q, strides, head_dim, sm_scale, k_read, sinks, slopes, query, facts, positions
):  # fmt: skip
    """Lay out a piece's queries, scaled, and what is known of each column of its scores.

    `k_read` is the format that keys are read in. For a few rows and codes, queries are rounded to 16 bits, of
    which the greatest of a row uses all that the sum of its products with codes leaves room for. For many rows
    and bfloat16 they are rounded to it, which leaves those as they are that came in it.
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
        if is_few(static) and (k_read == INT8 or k_read == INT4):
            finite = np.float32(0)
            for d in range(head_dim):
                value = q[start + d] * sm_scale
                finite += value * 0
                query_step = max(query_step, abs(value))
            largest = LARGEST_INT8 if k_read == INT8 else LARGEST_INT4
            query_step /= np.float32(min(LARGEST_WORD, MOST_SUM // (largest * head_dim)))
            if finite != 0:
                query_step = np.float32(np.nan)
            elif query_step > TINY:
                words = query[r].view(np.int16)
                rate, total, paired = sm_scale / query_step, 0, k_read == INT4
                for d in range(head_dim):
                    word = np.int16(np.rint(q[start + d] * rate))
                    words[place_in_chunks(d, paired)] = word
                    total += word
                query_sum = query_step * np.float32(total)
        elif is_few(static):
            for d in range(head_dim):
                query[r, d] = q[start + d] * sm_scale
        elif k_read == BFLOAT16:
            words = query.view(np.uint16)
            for d in range(head_dim):
                words[d // 2, 2 * r + d % 2] = top_half(q[start + d])
            query_step = sm_scale
        else:
            for d in range(head_dim):
                query[d, r] = q[start + d] * sm_scale
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
        row_token, qo_head = token + r // heads, piece[FIRST_HEAD] + r % heads
        if partial < 0:
            start = place(row_token, qo_head, out_strides)
            target = out[start : start + head_dim]
            lse[place(row_token, qo_head, lse_strides)] = row_lse
        else:
            target = partials[partial, r, :head_dim]
            partials[partial, r, head_dim] = row_lse
        if paired:
            for d in range(head_dim):
                target[d] = (total[r, place_in_chunks(d, True)] + zero_sum) * inverse
        else:
            for d in range(head_dim):
                target[d] = (total[r, d] + zero_sum) * inverse
