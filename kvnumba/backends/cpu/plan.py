"""Which thread attends to what: a batch cut into pieces, listed once for all its layers.

A piece is some new tokens of one sequence, some query heads of one KV head, and a range of keys. Long ranges
are split and merged by their lse (Flash-Decoding), so that a single sequence keeps every thread busy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvnumba.backends.cpu.jit import COMMON, entry, kernel, plain
from kvnumba.backends.cpu.tiles import FEW, MANY

MIN_SPLIT = 512  # keys that are worth a piece of their own
SERIAL = 16_384  # scores of a head_dim of 128 that one thread computes before another has woken up

MOST = MANY[-1]

# Columns of the table of pieces.
(
    SEQUENCE, KV_HEAD, FIRST_HEAD, NUM_HEADS, FIRST_TOKEN, NUM_TOKENS, ROWS, FIRST_KEY, END_KEY, PART, PARTIAL
) = range(11)  # fmt: skip
PIECE_COLUMNS = 11
# Columns of the table of merges.
MERGE_TOKEN, MERGE_HEAD, MERGE_HEADS, FIRST_PARTIAL, NUM_PARTIALS, MERGE_TOKENS = range(6)
MERGE_COLUMNS = 6


class Plan(NamedTuple):
    """What `attend` needs to know of a batch.

    Attributes
    ----------
    block_table, seq_lens, query_start_loc
        Of the batch.
    pieces : list of (int, (N, 11) int64)
        For each number of rows that kernels are compiled for, the pieces of that size. PART counts the pieces
        of one range of keys, and PARTIAL is the number of a partial result, or -1 for a piece that is the
        whole range.
    merges : (M, 6) int64
        Which partial results make which tokens and heads.
    num_partials, partial_rows : int
        How many partial results there are, and the most rows of one.
    workers : int
        Threads that the work is worth.
    """

    block_table: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    pieces: list[tuple[int, np.ndarray]]
    merges: np.ndarray
    num_partials: int
    partial_rows: int
    workers: int


def plan_batch(batch, num_kv_heads, group, head_dim, window_left, num_threads):
    """Cut a batch into pieces that keep `num_threads` threads equally busy."""
    arguments = (
        batch.seq_lens, batch.query_start_loc, num_kv_heads, group, head_dim, window_left, num_threads
    )  # fmt: skip
    _, call = entry(cut, COMMON, *arguments)
    pieces, merges, num_partials, workers, least, most = call(COMMON, *arguments)
    sizes = [(least, pieces)] if least == most else sort_by_size(pieces)
    split = pieces[pieces[:, PARTIAL] >= 0] if num_partials else pieces[:0]
    return Plan(
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        sizes,
        merges,
        num_partials,
        int(split[:, ROWS].max(initial=0)),
        workers,
    )


def sort_by_size(pieces):
    """Pieces of each number of rows."""
    return [(int(size), pieces[pieces[:, ROWS] == size]) for size in np.unique(pieces[:, ROWS])]


@kernel
def cut(static, seq_lens, query_start_loc, num_kv_heads, group, head_dim, window_left, num_threads):
    """The tables of a plan, the threads that it is worth, and its least and greatest number of rows."""
    keys, scores = count_keys(seq_lens, query_start_loc, num_kv_heads, group, window_left)
    workers = 1 if scores * head_dim <= SERIAL * 128 else num_threads
    split = max(MIN_SPLIT, (keys + 4 * workers - 1) // (4 * workers)) if workers > 1 else max(keys, 1)
    pieces, merges = np.empty((0, PIECE_COLUMNS), np.int64), np.empty((0, MERGE_COLUMNS), np.int64)
    num_pieces, num_merges, num_partials, least, most = list_pieces(
        seq_lens, query_start_loc, num_kv_heads, group, window_left, split, pieces, merges
    )
    pieces = np.empty((num_pieces, PIECE_COLUMNS), np.int64)
    merges = np.empty((num_merges, MERGE_COLUMNS), np.int64)
    list_pieces(seq_lens, query_start_loc, num_kv_heads, group, window_left, split, pieces, merges)
    return pieces, merges, num_partials, workers, least, most


@plain
def rows_of(rows, count):
    """The number of rows, of those that kernels are compiled for, that serves so many of `count` new tokens.

    A single token has a kernel of its own size; other sizes are few, to compile few kernels.
    """
    if rows <= FEW:
        return rows if count == 1 else FEW
    return MANY[0] if rows <= MANY[0] else MOST


@plain
def tile_of(count, group):
    """Tokens and query heads of a piece, of a sequence with `count` new tokens."""
    return (max(1, min(count, MOST // group)), min(group, MOST))


@plain
def key_range(seq_len, count, first, tokens, window_left):
    """The keys that `tokens` new tokens from `first` on see, of a sequence with `count` new ones."""
    position = seq_len - count + first
    begin = max(0, position - window_left) if window_left >= 0 else 0
    return begin, position + tokens


@plain
def count_keys(seq_lens, query_start_loc, num_kv_heads, group, window_left):
    """Keys that all pieces see together, if none is split, and the scores that they make."""
    keys, scores = 0, 0
    for s in range(seq_lens.shape[0]):
        count = query_start_loc[s + 1] - query_start_loc[s]
        tile, _ = tile_of(count, group)
        for first in range(0, count, tile):
            tokens = min(tile, count - first)
            begin, end = key_range(seq_lens[s], count, first, tokens, window_left)
            keys += (end - begin) * num_kv_heads
            scores += (end - begin) * num_kv_heads * tokens * group
    return keys, scores


@plain
def list_pieces(seq_lens, query_start_loc, num_kv_heads, group, window_left, split, pieces, merges):
    """List pieces and merges with ranges of `split` keys at most, where their tables have room.

    Of a sequence the last tokens, which see most, come first. Returns how many pieces, merges and partial
    results there are, and the least and the greatest number of rows.
    """
    least, most = MOST, 0
    n, m, p = 0, 0, 0
    for s in range(seq_lens.shape[0]):
        count = query_start_loc[s + 1] - query_start_loc[s]
        tile, heads = tile_of(count, group)
        tiles = (count + tile - 1) // tile
        for t in range(tiles - 1, -1, -1):
            first = t * tile
            tokens = min(tile, count - first)
            begin, end = key_range(seq_lens[s], count, first, tokens, window_left)
            parts = (end - begin + split - 1) // split
            length = (end - begin + parts - 1) // parts
            for kv_head in range(num_kv_heads):
                for head in range(0, group, heads):
                    num_heads = min(heads, group - head)
                    rows = rows_of(tokens * num_heads, count)
                    least, most = min(least, rows), max(most, rows)
                    if parts > 1:
                        if m < merges.shape[0]:
                            merges[m, MERGE_TOKEN] = query_start_loc[s] + first
                            merges[m, MERGE_HEAD] = kv_head * group + head
                            merges[m, MERGE_HEADS] = num_heads
                            merges[m, FIRST_PARTIAL] = p
                            merges[m, NUM_PARTIALS] = parts
                            merges[m, MERGE_TOKENS] = tokens
                        m += 1
                    for part in range(parts):
                        if n < pieces.shape[0]:
                            pieces[n, SEQUENCE] = s
                            pieces[n, KV_HEAD] = kv_head
                            pieces[n, FIRST_HEAD] = kv_head * group + head
                            pieces[n, NUM_HEADS] = num_heads
                            pieces[n, FIRST_TOKEN] = first
                            pieces[n, NUM_TOKENS] = tokens
                            pieces[n, ROWS] = rows
                            pieces[n, FIRST_KEY] = min(begin + part * length, end)
                            pieces[n, END_KEY] = min(begin + (part + 1) * length, end)
                            pieces[n, PART] = part
                            pieces[n, PARTIAL] = p if parts > 1 else -1
                        p += 1 if parts > 1 else 0
                        n += 1
    return n, m, p, least, most
