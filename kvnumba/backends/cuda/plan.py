"""Which block attends to what: the tokens of a batch cut into pieces, listed once for all layers.

A piece is some new tokens of one sequence and a range of keys; a block takes a piece and some query heads of one
KV head. Long ranges are split (Flash-Decoding), and the last block to finish one of the pieces of some tokens merges
what the others have left. Several parts of the keys are merged in the same way where the same shape of kernel serves
all of them. Elsewhere all blocks leave partial results, and a kernel of its own merges them (`merge.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvnumba.storage import Batch, Part

TILE = 16  # keys that kernels read at once: where a range is split, its pieces begin at multiples
MIN_SPLIT = 128  # keys that are worth a piece of their own
MAX_SPLITS = 128  # pieces that one block merges

# Columns of the table of pieces. A piece's split number `SPLIT` of `NUM_SPLITS` leaves partial results from
# `FIRST_PARTIAL + SPLIT * tokens * num_qo_heads` on; 0 splits: it leaves them there, and does not merge. `ITEM` numbers
# the counters of what is split. A piece's first key may be anywhere within a tile.
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
    mass : bool
        Whether attention is asked for masses.
    direct : bool
        Whether one part has all keys of all tokens.
    aligned : bool
        Whether each part is of all tokens, so that blocks can merge the pieces of several.
    launches : dict
        What is started in a layer, by what it is chosen by. That of a direct plan is kept by its batch.
    per_head : dict
        Numbers for each query head that have been uploaded, by their bytes.
    """

    def __init__(
        self, parts: Sequence[Part], num_qo_heads: int, window_left: int, mass: bool = False
    ) -> None:
        self.parts = parts
        self.num_qo_heads = num_qo_heads
        self.window_left = window_left
        self.mass = mass
        starts = parts[0].batch.query_start_loc
        self.aligned = all(
            part.tokens is None and np.array_equal(part.batch.query_start_loc, starts) for part in parts
        )
        self.direct = self.aligned and len(parts) == 1
        self.launches: dict[Any, Any] = parts[0].batch.kept if self.direct else {}
        self.per_head: dict[bytes, Any] = {}


class Ranges(NamedTuple):
    """Tokens of sequences and the keys that they see of a part, not split yet: vectors (N,) of integers.

    Attributes
    ----------
    sequence, first_token, num_tokens, position
        As in the table of pieces.
    begin, end
        The keys; both 0 where there are none.
    """

    sequence: np.ndarray
    first_token: np.ndarray
    num_tokens: np.ndarray
    position: np.ndarray
    begin: np.ndarray
    end: np.ndarray


class Pieces(NamedTuple):
    """A table of pieces (N, 10) int32 for each part, and how many partial results and counters their blocks need."""

    tables: list[np.ndarray]
    num_partials: int
    num_items: int


def ranges_of(batch: Batch, sequences: np.ndarray, tokens: int, window_left: int) -> Ranges:
    """The new tokens of some sequences (N,) of a batch, so many of them at most together, and the keys they see."""
    query_start_loc = batch.query_start_loc.astype(np.int64)
    new = np.diff(query_start_loc)[sequences]
    tiles = -(-new // tokens)
    sequence = np.repeat(sequences, tiles)
    first = _count(tiles) * tokens
    count = np.minimum(tokens, np.repeat(new, tiles) - first)
    position = batch.positions[sequence] + first
    end = np.minimum(position + count, batch.seq_lens[sequence])
    begin = np.zeros_like(end) if batch.begins is None else batch.begins[sequence].astype(np.int64)
    if window_left >= 0:
        begin = np.maximum(begin, position - window_left)
    some = begin < end
    return Ranges(
        sequence,
        query_start_loc[sequence] + first,
        count,
        position,
        np.where(some, begin, 0),
        np.where(some, end, 0),
    )


def ranges_of_single(batch: Batch, before: Ranges, window_left: int) -> Ranges:
    """`ranges_of` for one token each of the same sequences as before, in fewer operations."""
    position = batch.positions[before.sequence]
    end = np.minimum(position + 1, batch.seq_lens[before.sequence])
    begin = np.zeros_like(end) if batch.begins is None else batch.begins[before.sequence]
    if window_left >= 0:
        begin = np.maximum(begin, position - window_left)
    some = begin < end
    if not some.all():
        begin, end = np.where(some, begin, 0), np.where(some, end, 0)
    return before._replace(position=position, begin=begin, end=end)


def split(
    parts: Sequence[Ranges],
    blocks: int,
    blocks_per_piece: int,
    num_qo_heads: int,
    first_partial: int | None = None,
) -> Pieces:
    """Split ranges of keys into pieces.

    Parameters
    ----------
    parts : sequence of Ranges
        Of the same tokens: their pieces are merged together.
    blocks, blocks_per_piece : int
        Blocks that run at a time, for about as many the ranges are split; and blocks that share a piece.
    num_qo_heads : int
    first_partial : int, optional
        From where on all pieces leave partial results; tokens that see no key leave none. None: only those of split
        ranges leave some, from 0 on.
    """
    ends = np.array([ranges.end for ranges in parts])
    begins = np.array([ranges.begin for ranges in parts])
    firsts = begins // TILE * TILE
    keys = ends - firsts
    share = int(keys.sum()) * blocks_per_piece // blocks + 1
    least = max(share, MIN_SPLIT, int(keys.sum(axis=0).max(initial=0)) // (MAX_SPLITS + 1 - len(parts)) + 1)
    # up to twice as long, to end with so many blocks that all run at once
    lengths = -(-(least * np.arange(8, 17) // 8) // TILE) * TILE
    pieces = -(-keys[..., None] // lengths)
    # what is short makes room for others soon: it counts as the part of a piece that it is
    shares = np.where(4 * keys[..., None] < lengths, keys[..., None] / lengths, pieces)
    totals = shares.sum(axis=(0, 1)) * blocks_per_piece
    length = lengths[np.argmax(totals <= blocks)] if (totals <= blocks).any() else lengths[-1]
    splits = -(-keys // length)
    each = -(-keys // np.maximum(splits, 1))
    each = np.maximum(-(-each // TILE) * TILE, TILE)  # as equal as tiles allow
    splits = -(-keys // each)
    if first_partial is None:
        splits[0] += splits.sum(axis=0) == 0  # somebody writes that there is nothing
    all_splits = splits.sum(axis=0)
    rows = parts[0].num_tokens * num_qo_heads
    partials = all_splits * rows
    if first_partial is None:
        partials[all_splits == 1] = 0
    starts = np.cumsum(partials) - partials + (first_partial or 0)

    tables, before = [], np.zeros_like(all_splits)
    for ranges, number, first, length in zip(parts, splits, firsts, each, strict=True):
        part = _count(number)
        table = np.empty((len(part), PIECE_COLUMNS), np.int32)
        table[:, SEQUENCE] = np.repeat(ranges.sequence, number)
        table[:, FIRST_TOKEN] = np.repeat(ranges.first_token, number)
        table[:, NUM_TOKENS] = np.repeat(ranges.num_tokens, number)
        table[:, POSITION] = np.repeat(ranges.position, number)
        key = np.repeat(first, number) + part * np.repeat(length, number)
        table[:, FIRST_KEY] = np.maximum(key, np.repeat(ranges.begin, number))
        table[:, END_KEY] = np.minimum(key + np.repeat(length, number), np.repeat(ranges.end, number))
        table[:, SPLIT] = np.repeat(before, number) + part
        table[:, NUM_SPLITS] = np.repeat(all_splits, number) if first_partial is None else 0
        table[:, FIRST_PARTIAL] = np.repeat(starts, number)
        table[:, ITEM] = np.repeat(np.arange(len(number)), number)
        tables.append(table)
        before = before + number
    return Pieces(tables, int(partials.sum()), len(rows))


def with_spare(pieces: Pieces, most: int, num_qo_heads: int) -> Pieces:
    """The same pieces of single tokens, and empty ones: `most` in all, and one more for each token of a part."""
    longest = max(range(len(pieces.tables)), key=lambda n: len(pieces.tables[n]))
    more = max(0, most - sum(map(len, pieces.tables)))
    tables = [
        padded(table, len(table) + pieces.num_items + (more if n == longest else 0))
        for n, table in enumerate(pieces.tables)
    ]
    return Pieces(tables, sum(map(len, tables)) * num_qo_heads, pieces.num_items)


def padded(table: np.ndarray, count: int) -> np.ndarray:
    """A table of so many pieces: the last ones have no tokens and no keys."""
    more = np.zeros((count - len(table), PIECE_COLUMNS), np.int32)
    more[:, NUM_SPLITS] = 1  # nothing is left to be merged
    return np.concatenate((table, more))


def pieces_of_keys(batch: Batch, window_left: int, keys: int) -> np.ndarray:
    """A table of pieces (N, 10) int32 of so many keys at most, each with all new tokens that see some of its keys."""
    new = np.diff(batch.query_start_loc)
    ranges = ranges_of(batch, np.flatnonzero(new), max(1, int(new.max())), window_left)
    number = -(-(ranges.end - ranges.begin) // keys)
    all_of = Ranges(*(np.repeat(vector, number) for vector in ranges))
    begin = all_of.begin + _count(number) * keys
    end = np.minimum(begin + keys, all_of.end)
    first, last = np.maximum(begin - all_of.position, 0), all_of.num_tokens
    if window_left >= 0:
        last = np.minimum(last, window_left + end - all_of.position)
    table = np.zeros((len(begin), PIECE_COLUMNS), np.int32)
    table[:, SEQUENCE] = all_of.sequence
    table[:, FIRST_TOKEN] = all_of.first_token + first
    table[:, NUM_TOKENS] = last - first
    table[:, POSITION] = all_of.position + first
    table[:, FIRST_KEY], table[:, END_KEY] = begin, end
    return table


class Track:
    """The pieces of single tokens, a table that follows the sequences as these grow.

    The keys of each sequence are cut where they were cut before; only its first piece begins, and its last one ends,
    elsewhere, as long as no piece becomes much longer than the others.

    Parameters
    ----------
    table : (N, 10) int32
        Changed in place; the pieces at its end may be empty ones.
    num_items : int
        Tokens.
    """

    def __init__(self, table: np.ndarray, num_items: int) -> None:
        self._table = table
        table = table[: np.count_nonzero(table[:, NUM_TOKENS])]
        self._items = table[:, ITEM].copy()
        number = np.bincount(self._items, minlength=num_items)
        self._some = number > 0
        self._last = np.cumsum(number)[self._some] - 1
        self._first = self._last - number[self._some] + 1
        self._all = bool(self._some.all())
        self._alone = self._first == self._last
        self._first_end, self._last_begin = table[self._first, END_KEY], table[self._last, FIRST_KEY]
        longest = int((table[:, END_KEY] - table[:, FIRST_KEY]).max(initial=0))
        self._longest = longest + max(TILE, longest // 16)

    def follow(self, ranges: Ranges) -> bool:
        """Let the pieces be those of other ranges of the same tokens; False, and nothing has changed, if not."""
        table, some, first, last = self._table, self._some, self._first, self._last
        begin, end = ranges.begin, ranges.end
        if not np.array_equal(begin < end, some):
            return False
        if not self._all:
            begin, end = begin[some], end[some]
        # of one piece both ends move; of several the first one's end and the last one's begin stay
        first_end = np.where(self._alone, end, self._first_end)
        last_begin = np.where(self._alone, begin, self._last_begin)
        lengths = np.concatenate((first_end - begin, end - last_begin))
        if lengths.min(initial=1) < 1 or lengths.max(initial=0) > self._longest:
            return False
        table[first, FIRST_KEY] = begin
        table[last, END_KEY] = end
        table[: len(self._items), POSITION] = ranges.position[self._items]
        return True


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
