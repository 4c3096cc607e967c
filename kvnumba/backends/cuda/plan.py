"""Which block attends to what: a batch cut into pieces, listed once for all its layers.

A piece is some new tokens of one sequence and a range of keys; a block takes a piece and some query heads of one
KV head. Long ranges are split, and the last block to finish merges what the others have left (Flash-Decoding).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kvnumba.backends.cuda.jit import num_multiprocessors
from kvnumba.backends.cuda.memory import Pool
from kvnumba.backends.cuda.tables import Tables
from kvnumba.storage import Batch

TILE = 16  # keys: ranges begin at multiples, where kernels read so many at once
MIN_SPLIT = 128  # keys that are worth a piece of their own
MAX_PARTS = 128  # pieces that one block merges

# Columns of the table of pieces.
SEQUENCE, FIRST_TOKEN, NUM_TOKENS, POSITION, FIRST_KEY, END_KEY, PART, NUM_PARTS, FIRST_PARTIAL, ITEM = range(
    10
)
PIECE_COLUMNS = 10


class Family(NamedTuple):
    """A kernel of attention as the plan sees it: rows that a block takes, and blocks that fit a multiprocessor.

    0 of these: the kernel does not split ranges of keys.
    """

    name: str
    rows: int
    blocks_per_sm: int


class Launch(NamedTuple):
    """The pieces of a batch, with so many query heads each, and the memory where blocks leave partial results."""

    heads: int
    pieces: int
    num_pieces: int
    partials: int
    counters: int


class AttentionPlan:
    """What is the same for all layers of a batch; a kernel's share of it is made and uploaded when first asked for."""

    def __init__(
        self, tables: Tables, num_kv_heads: int, group: int, head_dim: int, window_left: int
    ) -> None:
        self.tables = tables
        self.group = group
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._window_left = window_left
        self.prepared: dict[Any, Any] = {}  # kernels and launches, by what they are chosen by
        self._per_head: dict[bytes, int] = {}

    def per_head(self, x: np.ndarray | None, pool: Pool, stream: int) -> int:
        """The address of a number for each query head, uploaded once; 0 for none."""
        if x is None:
            return 0
        key = x.tobytes()
        if key not in self._per_head:
            self._per_head[key] = pool.put(self, x, stream)
        return self._per_head[key]

    @property
    def new_tokens(self) -> np.ndarray:
        """Of each sequence."""
        return np.diff(self.tables.batch.query_start_loc)

    def launch(self, family: Family, sequences: np.ndarray, pool: Pool, stream: int) -> Launch:
        """Some sequences as the kernel of a family takes them, in memory that comes back with this plan."""
        heads = min(self.group, family.rows)
        blocks_per_piece = self._num_kv_heads * -(-self.group // heads)
        blocks = max(1, num_multiprocessors() * family.blocks_per_sm)
        pieces = cut(
            self.tables.batch, sequences, family.rows // heads, blocks, blocks_per_piece, self._window_left
        )
        partial_bytes = 4 * pieces.num_partials * blocks_per_piece * family.rows * (self._head_dim + 2)
        return Launch(
            heads,
            pool.put(self, pieces.table, stream),
            len(pieces.table),
            pool.take(self, partial_bytes, stream) if partial_bytes else 0,
            pool.take(self, 4 * pieces.num_items * blocks_per_piece, stream, zeros=True)
            if partial_bytes
            else 0,
        )


class Pieces(NamedTuple):
    """A table of pieces (N, 10) int32, and how many partial results and counters its blocks need."""

    table: np.ndarray
    num_partials: int
    num_items: int


def cut(
    batch: Batch, sequences: np.ndarray, tokens: int, blocks: int, blocks_per_piece: int, window_left: int
) -> Pieces:
    """Cut some sequences of a batch into pieces of `tokens` new tokens, for about so many `blocks` at a time."""
    query_start_loc, seq_lens = batch.query_start_loc.astype(np.int64), batch.seq_lens.astype(np.int64)
    new = np.diff(query_start_loc)[sequences]
    tiles = -(-new // tokens)
    sequence = np.repeat(sequences, tiles)
    first = (_count(tiles)) * tokens
    count = np.minimum(tokens, np.repeat(new, tiles) - first)
    position = seq_lens[sequence] - np.repeat(new, tiles) + first
    end = position + count
    begin = np.zeros_like(end)
    if window_left >= 0:
        # a tile is in one block where kernels read whole ones; elsewhere blocks before the window may be gone
        whole = batch.block_size % TILE == 0 or batch.block_table.shape[1] == 1
        step = TILE if whole else 1
        begin = np.maximum(position - window_left, 0) // step * step

    keys = end - begin
    share = int(keys.sum()) * blocks_per_piece // blocks + 1
    least = max(share, MIN_SPLIT, int(keys.max(initial=0)) // MAX_PARTS + 1)
    # up to twice as long, to end with so many blocks that all run at once
    splits = -(-(least * np.arange(8, 17) // 8) // TILE) * TILE
    totals = (-(-keys[:, None] // splits)).sum(axis=0) * blocks_per_piece
    split = splits[np.argmax(totals <= blocks)] if (totals <= blocks).any() else splits[-1]
    parts = np.maximum(-(-keys // split), 1)
    each = -(-keys // parts)
    each = -(-each // TILE) * TILE  # as equal as tiles allow
    parts = np.maximum(-(-keys // each), 1)
    part = _count(parts)
    partials = np.where(parts > 1, parts, 0)

    table = np.empty((len(part), PIECE_COLUMNS), np.int32)
    table[:, SEQUENCE] = np.repeat(sequence, parts)
    table[:, FIRST_TOKEN] = np.repeat(query_start_loc[sequence] + first, parts)
    table[:, NUM_TOKENS] = np.repeat(count, parts)
    table[:, POSITION] = np.repeat(position, parts)
    table[:, FIRST_KEY] = np.repeat(begin, parts) + part * np.repeat(each, parts)
    table[:, END_KEY] = np.minimum(table[:, FIRST_KEY] + np.repeat(each, parts), np.repeat(end, parts))
    table[:, PART] = part
    table[:, NUM_PARTS] = np.repeat(parts, parts)
    table[:, FIRST_PARTIAL] = np.repeat(np.cumsum(partials) - partials, parts)
    table[:, ITEM] = np.repeat(np.arange(len(sequence)), parts)
    return Pieces(table, int(partials.sum()), len(sequence))


def _count(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of some lengths, one after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
