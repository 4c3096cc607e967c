"""Attention in float32, for every format and shape: FlashAttention's online softmax (Dao et al., 2022).

A block takes up to 16 rows of scores (new tokens times query heads of a KV head) over a range of keys, `KEYS`
at a time, in four phases: scores, a key to a thread; the rows' maxima; weights; values, a part of the head and of
the keys to a thread.
"""

from __future__ import annotations

import functools
import math

from numba import float32, int32, int64

from kvnumba.backends.cuda.finish import TOGETHER, finisher, shared_floats
from kvnumba.backends.cuda.intrinsics import (
    LEAST,
    barrier,
    index,
    load_float,
    load_int,
    loader,
    quotient,
    reader,
    remainder,
    vectors,
)
from kvnumba.backends.cuda.jit import SIMULATED, THREADS, Kernel, cuda
from kvnumba.backends.cuda.plan import (
    END_KEY,
    FIRST_KEY,
    FIRST_PARTIAL,
    FIRST_TOKEN,
    ITEM,
    NUM_PARTS,
    NUM_TOKENS,
    PART,
    PIECE_COLUMNS,
    POSITION,
    SEQUENCE,
    Family,
)
from kvnumba.backends.cuda.tables import blocks_of, find_slab
from kvnumba.formats import FORMATS

FEW, MANY = Family("attend", 4, 4), Family("attend", 64 if SIMULATED else 16, 2)
"""What the kernel is compiled for: decoding, and more rows than that; in the simulator blocks are dear."""

KEYS = 128 if SIMULATED else 64

PARAMETERS = "q" * 22 + "i" * 10 + "f" * 2
"""Of every kernel of attention; see `attend`."""


def shared_bytes(rows: int, head_dim: int) -> int:
    """What `attend` cuts up: sums or queries, scores, rows of keys, three numbers a row."""
    return 4 * (shared_floats(rows, head_dim, 1) + rows * KEYS + 2 * KEYS + 3 * rows)


@functools.cache
def attend_kernel(rows: int, width: int, kind: str, key_format: str, value_format: str) -> Kernel:
    """Queries and results of a precision `kind`, `width` neighbours of a head at a time."""
    read_key, read_value = reader(key_format, width), reader(value_format, width)
    load_query, finish = loader(kind, width), finisher(rows, width, kind, THREADS)
    of, single, one_row = vectors(rows, width), vectors(rows, 1), vectors(1, width)
    itemsize = FORMATS[kind].bits // 8
    size, loaded_size = rows * width, TOGETHER * width
    zero, least, hidden = float32(0), float32(LEAST), float32("-inf")

    def attend(
        tables, pieces, q, out, lse, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, sinks, slopes, partials,
        counters, q_batch, q_token, q_head, out_batch, out_token, out_head,
        slab_bytes, tokens_per_row, num_seqs, max_blocks, block_size, num_heads, group, heads, head_dim, group_size,
        window_left, sm_scale, soft_cap,
    ):  # fmt: skip
        thread = cuda.threadIdx.x
        shared, shared_int = cuda.shared.array(0, float32), cuda.shared.array(0, int32)
        values, sums = cuda.local.array(width, float32), cuda.local.array(width, float32)
        loaded = cuda.local.array(loaded_size, float32)
        scores, totals = cuda.local.array(rows, float32), cuda.local.array(rows, float32)
        weighted = cuda.local.array(size, float32)

        piece = pieces + 4 * PIECE_COLUMNS * cuda.blockIdx.x
        sequence, first_token = load_int(piece + 4 * SEQUENCE), load_int(piece + 4 * FIRST_TOKEN)
        position = load_int(piece + 4 * POSITION)
        begin, end = load_int(piece + 4 * FIRST_KEY), load_int(piece + 4 * END_KEY)
        tiles = quotient(group + heads - 1, heads)
        kv_head = quotient(cuda.blockIdx.y, tiles)
        tile = cuda.blockIdx.y - kv_head * tiles
        heads_here = min(heads, group - tile * heads)
        first_head = kv_head * group + tile * heads
        used = load_int(piece + 4 * NUM_TOKENS) * heads_here
        blocks = blocks_of(tables, num_seqs, max_blocks, sequence)

        at_scores = rows * max(head_dim, 256)
        at_slabs = at_scores + rows * KEYS
        at_factors = at_slabs + 2 * KEYS
        at_tops, at_totals = at_factors + rows, at_factors + 2 * rows
        chunks = quotient(head_dim, width)
        shares = quotient(THREADS, chunks)
        share, chunk = quotient(thread, chunks), remainder(thread, chunks)

        # all tokens of a piece lie in one row of the batch
        batch = quotient(first_token, tokens_per_row)
        begin_of_q = batch * q_batch + (first_token - batch * tokens_per_row) * q_token + first_head * q_head
        for i in range(thread, rows * chunks, THREADS):
            r = quotient(i, chunks)
            c = i - r * chunks
            one_row.clear_all(values)
            if r < used:
                token = quotient(r, heads_here)
                place = begin_of_q + token * q_token + (r - token * heads_here) * q_head
                load_query(q + (place + c * width) * itemsize, values)
                of.scale(values, sm_scale)
            of.put(shared, i * width, values)
        for i in range(thread, rows * KEYS, THREADS):
            shared[index(at_scores + i)] = zero
        for r in range(thread, rows, THREADS):
            shared[index(at_tops + r)], shared[index(at_factors + r)] = least, zero
        of.clear_all(weighted)
        of.clear(totals)
        barrier()

        for first_key in range(begin, end, KEYS):
            count = min(KEYS, end - first_key)
            for j in range(thread, KEYS, THREADS):
                if j < count:
                    number = find_slab(blocks, first_key + j, block_size, num_heads, kv_head)
                    slab, offset = number * slab_bytes, remainder(first_key + j, block_size)
                    shared_int[index(at_slabs + j)], shared_int[index(at_slabs + KEYS + j)] = number, offset
                    of.clear(scores)
                    for c in range(chunks):
                        read_key(
                            k_codes + slab, k_scale + slab, k_zero + slab, offset, c * width, head_dim, group_size,
                            values,
                        )  # fmt: skip
                        of.dot_rows(scores, shared, c * width, head_dim, values)
                    for r in range(rows):
                        if r < used:
                            score = scores[r]
                            token = quotient(r, heads_here)
                            distance = position + token - first_key - j
                            if soft_cap > zero:
                                score = soft_cap * math.tanh(score / soft_cap)
                            if slopes != 0:
                                score -= load_float(
                                    slopes + 4 * (first_head + r - token * heads_here)
                                ) * float32(distance)
                            if distance < 0 or (window_left >= 0 and distance > window_left):
                                score = hidden
                            shared[index(at_scores + r * KEYS + j)] = score
                else:
                    for r in range(used):
                        shared[index(at_scores + r * KEYS + j)] = hidden
            barrier()
            for r in range(thread, used, THREADS):
                top = of.maximum(shared, at_scores + r * KEYS, KEYS, shared[index(at_tops + r)])
                shared[index(at_factors + r)] = math.exp(shared[index(at_tops + r)] - top)
                shared[index(at_tops + r)] = top
            barrier()
            for r in range(used):
                run = at_scores + r * KEYS
                of.exponentiate(shared, run + thread, run + KEYS, THREADS, shared[index(at_tops + r)])
            barrier()
            if share < shares:
                of.scale_rows(weighted, shared, at_factors)
                single.scale_rows(totals, shared, at_factors)
                for j in range(share, count, shares):
                    slab, offset = (
                        int64(shared_int[index(at_slabs + j)]) * slab_bytes,
                        int64(shared_int[index(at_slabs + KEYS + j)]),
                    )
                    read_value(
                        v_codes + slab, v_scale + slab, v_zero + slab, offset, chunk * width, head_dim, group_size,
                        values,
                    )  # fmt: skip
                    of.outer_rows(weighted, shared, at_scores + j, KEYS, values)
                    if chunk == 0:
                        of.add_rows(totals, shared, at_scores + j, KEYS)
            barrier()

        for s in range(shares):
            if share == s:
                for r in range(rows):
                    if r < used:
                        for e in range(width):
                            at = r * head_dim + chunk * width + e
                            before = shared[index(at)] if s > 0 else zero
                            shared[index(at)] = before + weighted[r * width + e]
                        if chunk == 0:
                            before = shared[index(at_totals + r)] if s > 0 else zero
                            shared[index(at_totals + r)] = before + totals[r]
            barrier()
        finish(
            thread, shared, 1, at_tops, at_totals, sums, loaded, used, heads_here, first_token, first_head,
            load_int(piece + 4 * PART), load_int(piece + 4 * NUM_PARTS),
            load_int(piece + 4 * FIRST_PARTIAL) * cuda.gridDim.y + cuda.blockIdx.y * load_int(piece + 4 * NUM_PARTS),
            counters + 4 * (load_int(piece + 4 * ITEM) * cuda.gridDim.y + cuda.blockIdx.y),
            out, lse, out_batch, out_token, out_head, tokens_per_row, head_dim, sinks, partials,
        )  # fmt: skip

    return Kernel(attend, PARAMETERS)
