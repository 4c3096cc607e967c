"""Which block attends to what: the tokens of a batch cut into pieces, listed once for all layers.

A piece is some new tokens of one sequence and a range of keys; a block takes a piece and some query heads of one
KV head. Long ranges are split (Flash-Decoding). Where the keys are one part, the last block to finish a split range
merges what the others have left. Where there are several, all blocks leave partial results, and a kernel of its own
merges them (`merge.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvnumba.storage import Batch, Part

TILE = 16  # keys: ranges begin at multiples, where kernels read so many at once
MIN_SPLIT = 128  # keys that are worth a piece of their own
MAX_SPLITS = 128  # pieces that one block merges

# Columns of the table of pieces. A piece's split number `SPLIT` of `NUM_SPLITS` leaves partial results from
# `FIRST_PARTIAL + SPLIT * tokens * num_qo_heads` on; 0 splits: it leaves them there, and does not merge. `ITEM` numbers
# the counters of what is split.
SEQUENCE, FIRST_TOKEN, NUM_TOKENS, POSITION, FIRST_KEY, END_KEY, SPLIT, NUM_SPLITS, FIRST_PARTIAL, ITEM = (
    range(10)
)
PIECE_COLUMNS = 10


class Shape(NamedTuple):
    """A kernel of attention as the plan sees it.

    Attributes
    ----------
    name : str
    rows : int
        Tokens times query heads of a KV head that a block takes.
    blocks_per_sm : int
        Blocks that run on a multiprocessor at a time.
    merges : bool
        Whether its blocks can merge a range that is split; otherwise it is split only where a kernel follows that does.
    """

    name: str
    rows: int
    blocks_per_sm: int
    merges: bool


class AttentionPlan:
    """What new tokens attend to, and what the layers share once the first has needed it.

    Attributes
    ----------
    parts : sequence of Part
    num_qo_heads, window_left : int
    direct : bool
        Whether blocks write results: one part has all keys of all tokens. Otherwise partial results are merged after.
    launches : dict
        What is started in a layer, by what it is chosen by. That of a direct plan is kept by its batch.
    per_head : dict
        Numbers for each query head that have been uploaded, by their bytes.
    """

    def __init__(self, parts: Sequence[Part], num_qo_heads: int, window_left: int) -> None:
        self.parts = parts
        self.num_qo_heads = num_qo_heads
        self.window_left = window_left
        self.direct = len(parts) == 1 and parts[0].tokens is None
        self.launches: dict[Any, Any] = parts[0].batch.kept if self.direct else {}
        self.per_head: dict[bytes, Any] = {}


class Pieces(NamedTuple):
    """A table of pieces (N, 10) int32, and how many partial results and counters its blocks need."""

    table: np.ndarray
    num_partials: int
    num_items: int


def cut(
    batch: Batch,
    sequences: np.ndarray,
    tokens: int,
    blocks: int,
    blocks_per_piece: int,
    num_qo_heads: int,
    window_left: int,
    first_partial: int | None = None,
) -> Pieces:
    """Cut some sequences of a batch into pieces.

    Parameters
    ----------
    batch : Batch
    sequences : (N,) int
    tokens : int
        New tokens that a piece has at most.
    blocks, blocks_per_piece : int
        Blocks that run at a time, for about as many the ranges of keys are split; and blocks that share a piece.
    num_qo_heads, window_left : int
    first_partial : int, optional
        From where on all pieces leave partial results. None: only those of split ranges do, from 0 on.
    """
    query_start_loc, seq_lens = batch.query_start_loc.astype(np.int64), batch.seq_lens.astype(np.int64)
    new = np.diff(query_start_loc)[sequences]
    tiles = -(-new // tokens)
    sequence = np.repeat(sequences, tiles)
    first = _count(tiles) * tokens
    count = np.minimum(tokens, np.repeat(new, tiles) - first)
    position = batch.positions[sequence] + first
    end = np.minimum(position + count, seq_lens[sequence])
    begin = np.zeros_like(end)
    if window_left >= 0:
        # a tile is in one block where kernels read whole ones; elsewhere blocks before the window may be gone
        whole = batch.block_size % TILE == 0 or batch.block_table.shape[1] == 1
        step = TILE if whole else 1
        begin = np.minimum(np.maximum(position - window_left, 0) // step * step, end)

    keys = end - begin
    share = int(keys.sum()) * blocks_per_piece // blocks + 1
    least = max(share, MIN_SPLIT, int(keys.max(initial=0)) // MAX_SPLITS + 1)
    # up to twice as long, to end with so many blocks that all run at once
    lengths = -(-(least * np.arange(8, 17) // 8) // TILE) * TILE
    totals = (-(-keys[:, None] // lengths)).sum(axis=0) * blocks_per_piece
    length = lengths[np.argmax(totals <= blocks)] if (totals <= blocks).any() else lengths[-1]
    splits = np.maximum(-(-keys // length), 1)
    each = -(-keys // splits)
    each = np.maximum(-(-each // TILE) * TILE, TILE)  # as equal as tiles allow
    splits = np.maximum(-(-keys // each), 1)
    split = _count(splits)
    rows = count * num_qo_heads
    if first_partial is None:
        partials = np.where(splits > 1, splits * rows, 0)
        starts = np.cumsum(partials) - partials
    else:
        partials = splits * rows
        starts = first_partial + np.cumsum(partials) - partials

    table = np.empty((len(split), PIECE_COLUMNS), np.int32)
    table[:, SEQUENCE] = np.repeat(sequence, splits)
    table[:, FIRST_TOKEN] = np.repeat(query_start_loc[sequence] + first, splits)
    table[:, NUM_TOKENS] = np.repeat(count, splits)
    table[:, POSITION] = np.repeat(position, splits)
    table[:, FIRST_KEY] = np.repeat(begin, splits) + split * np.repeat(each, splits)
    table[:, END_KEY] = np.minimum(table[:, FIRST_KEY] + np.repeat(each, splits), np.repeat(end, splits))
    table[:, SPLIT] = split
    table[:, NUM_SPLITS] = np.repeat(splits, splits) if first_partial is None else 0
    table[:, FIRST_PARTIAL] = np.repeat(starts, splits)
    table[:, ITEM] = np.repeat(np.arange(len(sequence)), splits)
    return Pieces(table, int(partials.sum()), len(sequence))


def rows_to_merge(
    tables: Sequence[np.ndarray], parts: Sequence[Part], num_tokens: int, num_qo_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which partial results belong to which token, of tables of pieces and the parts that they are pieces of.

    Returns
    -------
    starts : (num_tokens + 1,) int32
    rows : (N,) int32
        Those of token t, for its first query head, are ``rows[starts[t]:starts[t + 1]]``.
    """
    found_tokens, found_rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for table, part in zip(tables, parts, strict=True):
        count = table[:, NUM_TOKENS]
        within = _count(count)
        token = np.repeat(table[:, FIRST_TOKEN], count) + within
        found_tokens.append(token if part.tokens is None else part.tokens[token])
        first = table[:, FIRST_PARTIAL] + table[:, SPLIT] * count * num_qo_heads
        found_rows.append(np.repeat(first, count) + within * num_qo_heads)
    tokens, rows = np.concatenate(found_tokens), np.concatenate(found_rows)
    starts = np.zeros(num_tokens + 1, np.int32)
    np.cumsum(np.bincount(tokens, minlength=num_tokens), out=starts[1:])
    return starts, rows[np.argsort(tokens, kind="stable")].astype(np.int32)


def _count(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of some lengths, one after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
