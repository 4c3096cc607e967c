"""Which thread attends to what: the parts of a batch cut into pieces, listed once for all its layers.

A piece is some new tokens of one sequence, some query heads of one KV head, and a range of keys. Long ranges are split
and merged by their lse (Flash-Decoding), so that a single sequence keeps every thread busy; so are several parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvnumba.backends.cpu import few, few_tiles, many, many_tiles, tiles
from kvnumba.backends.cpu.attend import (
    MERGE_BEGIN,
    MERGE_COLUMNS,
    MERGE_END,
    MERGE_HEAD,
    MERGE_HEADS,
    MERGE_TOKEN,
)
from kvnumba.backends.cpu.jit import COMMON, entry, kernel, plain
from kvnumba.backends.cpu.mass import kept_floats
from kvnumba.backends.cpu.shapes import Piece, Shape
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Layout, Part

MIN_SPLIT = 512  # keys that are worth a piece of their own
SERIAL = 16_384  # scores of a head_dim of 128 that one thread computes before another has woken up

FEW_ROWS = few.MOST_ROWS
SIZES, TILE_SIZES, EXACT_SIZES, CODE_SIZES = (
    np.array(sizes, np.int64)
    for sizes in (
        many.ROWS,
        many_tiles.ROWS,
        (*(rows for rows in many.ROWS if rows < many_tiles.ROWS[0]), *many_tiles.ROWS),
        (*(rows for rows in few_tiles.ROWS if rows > FEW_ROWS), *many_tiles.ROWS),
    )
)
"""Numbers of rows of pieces with more than FEW_ROWS: of float32 arithmetic, and what tiles take."""
FEW_SIZES = np.array([FEW_ROWS], np.int64)
"""Those of pieces whose weights are kept."""
EXACT_PARTS = 3  # bfloat16 numbers that hold a float32: to stage so many pays for prompts only

PIECE_COLUMNS = len(Piece._fields)
(
    SEQUENCE, KV_HEAD, FIRST_HEAD, NUM_HEADS, TOKEN, NUM_TOKENS, POSITION, ROWS, FIRST_KEY, END_KEY, COUNTS_SINK,
    PARTIAL, KEPT,
) = range(PIECE_COLUMNS)  # fmt: skip

_ALL = np.empty(
    0, np.int32
)  # tokens of a part that has all of them, in order; begins of sequences seen from 0 on


class Sequences(NamedTuple):
    """A batch as the kernels here see it: `begins`, empty where all keys are seen, and what `Batch` calls the same."""

    begins: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    positions: np.ndarray


class Heads(NamedTuple):
    """How many KV heads there are and query heads for each, the window, and rows of a piece.

    Pieces of more than FEW_ROWS have kernels for `sizes` rows, (n,) int64 in order: at most the last of them.
    """

    num_kv_heads: int
    group: int
    window_left: int
    sizes: np.ndarray


def tile_parts(layout: Layout, scoring: Scoring) -> int:
    """bfloat16 numbers for one, where many rows are multiplied on tile instructions; 0 where they are not."""
    if tiles.instructions() is None or scoring.arithmetic == "float32":
        return 0
    if not all(many_tiles.fits(rows.head_dim) for rows in (layout.keys, layout.values)):
        return 0
    if scoring.arithmetic is not None:
        return {"bfloat16": 1, "bfloat16x3": 2}[scoring.arithmetic]
    codes = all(rows.fmt.kind == "code" for rows in (layout.keys, layout.values))
    return 2 if codes else EXACT_PARTS


def codes_on_tiles(layout: Layout, parts: int) -> bool:
    """Whether few rows are multiplied with codes on tile instructions; `parts` as `tile_parts` returns it."""
    return parts > 0 and few_tiles.fits(layout.keys, layout.values)


def sizes_of(layout: Layout, parts: int) -> np.ndarray:
    """`Heads.sizes`."""
    if codes_on_tiles(layout, parts):
        return CODE_SIZES
    return EXACT_SIZES if parts == EXACT_PARTS else TILE_SIZES if parts else SIZES


def shape_of(rows: int, layout: Layout, parts: int) -> Shape:
    """The shape of kernel for a number of rows, one that `rows_of` returns, and `tile_parts`."""
    scale_dtype, instructions = layout.keys.scale_dtype.name, tiles.instructions()
    if rows <= few_tiles.ROWS[-1] and instructions and codes_on_tiles(layout, parts):
        size = next(size for size in few_tiles.ROWS if rows <= size)
        return few_tiles.shape(size, scale_dtype, instructions)
    if rows <= FEW_ROWS:
        return few.shape(rows, scale_dtype)
    if instructions and parts and (parts < EXACT_PARTS or rows > many_tiles.ROWS[0]):
        return many_tiles.shape(rows, scale_dtype, parts, instructions)
    return many.shape(next(size for size in many.ROWS if rows <= size), scale_dtype)


class PlannedPart(NamedTuple):
    """A part cut up.

    Attributes
    ----------
    part : Part
    tokens : (T',) int32
        `Part.tokens`; empty where it is None.
    pieces : list of (Shape, (N, len(Piece)) int64)
        For each kernel the pieces that it takes.
    """

    part: Part
    tokens: np.ndarray
    pieces: list[tuple[Shape, np.ndarray]]


class Plan(NamedTuple):
    """What `attend` needs to know of the parts of a batch.

    Attributes
    ----------
    parts : list of PlannedPart
    num_partials, partial_rows : int
        How many partial results there are, and the most rows of one.
    merges, sources : (M, 5) int64, (N,) int64
        Which partial results make which tokens and heads: see `attend.MergeJob`.
    counts_sinks : bool
        Whether the merge counts sinks. Otherwise the pieces do: of a range that is split, the first.
    complete : bool
        Whether every token is in a part, and so gets a result.
    workers : int
        Threads that the work is worth.
    """

    parts: list[PlannedPart]
    num_partials: int
    partial_rows: int
    merges: np.ndarray
    sources: np.ndarray
    counts_sinks: bool
    complete: bool
    workers: int


class Round(NamedTuple):
    """Some of a plan, whose weights are kept at the same time: at most FEW_ROWS rows for each key.

    Attributes
    ----------
    plan : Plan
    num_kept : int
        Floats that hold the weights.
    at_once : bool
        Whether each piece adds its own masses: no other has the same keys, and its lse is known. Weights of one piece
        for each worker are kept then.
    """

    plan: Plan
    num_kept: int
    at_once: bool


_NOTHING = np.empty((0, MERGE_COLUMNS), np.int64), np.empty(0, np.int64)


def plan_parts(
    parts: Sequence[Part], num_qo_heads: int, scoring: Scoring, num_threads: int, few_rows: bool = False
) -> Plan:
    """Cut parts into pieces that keep `num_threads` threads equally busy; `few_rows`: of FEW_ROWS at most."""
    layouts = [part.buffers.layout for part in parts]
    sequences = [_sequences(part.batch) for part in parts]
    on_tiles = [tile_parts(layout, scoring) for layout in layouts]
    num_kv_heads, head_dim = layouts[0].num_kv_heads, layouts[0].head_dim
    heads = [
        Heads(
            num_kv_heads,
            num_qo_heads // num_kv_heads,
            scoring.window_left,
            FEW_SIZES if few_rows else sizes_of(layout, n),
        )
        for layout, n in zip(layouts, on_tiles, strict=True)
    ]
    if len(parts) == 1 and parts[0].tokens is None:
        part, batch = parts[0], parts[0].batch
        pieces, num_partials, workers, least, most = _call(
            cut, sequences[0], heads[0], head_dim, num_threads, 0, 0, -1
        )
        planned = [PlannedPart(part, _ALL, by_shape(pieces, least, most, layouts[0], on_tiles[0]))]
        if not num_partials:
            return Plan(planned, 0, 0, *_NOTHING, False, True, workers)
        return _merged(planned, [pieces], _ALL, num_partials, num_qo_heads, batch.num_tokens, workers)
    keys = scores = 0
    for of, how in zip(sequences, heads, strict=True):
        more = _call(measure, of, how)
        keys, scores = keys + more[0], scores + more[1]
    planned, tables, num_partials, workers, first_token = [], [], 0, 1, 0
    for part, of, how, n in zip(parts, sequences, heads, on_tiles, strict=True):
        pieces, num_partials, workers, least, most = _call(
            cut, of, how, head_dim, num_threads, num_partials, keys, scores
        )
        tokens = _ALL if part.tokens is None else part.tokens
        planned.append(PlannedPart(part, tokens, by_shape(pieces, least, most, part.buffers.layout, n)))
        table = pieces.copy()
        table[:, TOKEN] += first_token
        first_token += part.batch.num_tokens
        tables.append(table)
    tokens = np.concatenate(
        [np.arange(p.batch.num_tokens, dtype=np.int32) if p.tokens is None else p.tokens for p in parts]
    )
    num_tokens = int(tokens.max(initial=-1)) + 1
    plan = _merged(planned, tables, tokens, num_partials, num_qo_heads, num_tokens, workers)
    return plan._replace(counts_sinks=True, complete=any(part.tokens is None for part in parts))


def rounds_of(plan: Plan, group: int) -> list[Round]:
    """A plan of few rows, the tokens of a piece at a time: together their weights would not be O(keys).

    Every part has all new tokens, in order; `group` query heads share a KV head.
    """
    start = plan.parts[0].part.batch.query_start_loc
    new = np.diff(start)
    number = (np.arange(start[-1]) - np.repeat(start[:-1], new)) // max(1, FEW_ROWS // group)
    rounds, at_once = [], plan.num_partials == 0 and group <= FEW_ROWS
    for n in range(int(number.max(initial=-1)) + 1):
        num_kept, parts = 0, []
        for planned in plan.parts:
            chosen = []
            for shape, pieces in planned.pieces:
                pieces = pieces[number[pieces[:, TOKEN]] == n]
                needed = kept_floats(shape, pieces[:, END_KEY] - pieces[:, FIRST_KEY])
                if at_once:
                    pieces[:, KEPT] = 0
                    num_kept = max(num_kept, int(needed.max(initial=0)))
                else:
                    pieces[:, KEPT] = num_kept + np.cumsum(needed) - needed
                    num_kept += int(needed.sum())
                chosen.append((shape, pieces))
            parts.append(planned._replace(pieces=chosen))
        merges = plan.merges[number[plan.merges[:, MERGE_TOKEN]] == n]
        rounds.append(Round(plan._replace(parts=parts, merges=merges), num_kept, at_once))
    return rounds


def _merged(
    parts: list[PlannedPart],
    tables: list[np.ndarray],
    tokens: np.ndarray,
    num_partials: int,
    num_qo_heads: int,
    num_tokens: int,
    workers: int,
) -> Plan:
    """A plan whose pieces are partial results."""
    pieces = tables[0] if len(tables) == 1 else np.concatenate(tables)
    pieces = pieces[pieces[:, PARTIAL] >= 0]
    partial_rows = int((pieces[:, NUM_TOKENS] * pieces[:, NUM_HEADS]).max(initial=1))
    merges, sources = _call(list_merges, pieces, tokens, num_tokens, num_qo_heads, partial_rows)
    return Plan(parts, num_partials, partial_rows, merges, sources, False, True, workers)


def _sequences(batch: Batch) -> Sequences:
    begins = _ALL if batch.begins is None else batch.begins
    return Sequences(begins, batch.seq_lens, batch.query_start_loc, batch.positions)


def _call(function: Any, *arguments: Any) -> Any:
    _, call = entry(function, COMMON, *arguments)
    return call(COMMON, *arguments)


def by_shape(
    pieces: np.ndarray, least: int, most: int, layout: Layout, parts: int
) -> list[tuple[Shape, np.ndarray]]:
    """Pieces, of `least` to `most` rows, by the kernel that takes them; `parts` as `tile_parts` returns it."""
    if least == most:
        return [(shape_of(least, layout, parts), pieces)]
    return [
        (shape_of(int(rows), layout, parts), pieces[pieces[:, ROWS] == rows])
        for rows in np.unique(pieces[:, ROWS])
    ]


@kernel
def measure(static, sequences, heads):
    """Keys that all pieces see together, if none is split, and the scores that they make."""
    return count_keys(sequences, heads)


@kernel
def cut(static, sequences, heads, head_dim, num_threads, partials, keys, scores):
    """The pieces of a part, and the threads that the work is worth.

    With `scores` of -1 the part is the only one. Otherwise `keys` and `scores` are those of all parts, every piece is a
    partial result, and their numbers go on from `partials`.

    Returns the table of pieces, the number of partial results so far, the threads, and the least and the greatest
    number of rows.
    """
    alone = scores < 0
    if alone:
        keys, scores = count_keys(sequences, heads)
    workers = 1 if scores * head_dim <= SERIAL * 128 else num_threads
    split = max(MIN_SPLIT, (keys + 4 * workers - 1) // (4 * workers)) if workers > 1 else max(keys, 1)
    pieces = np.empty((0, PIECE_COLUMNS), np.int64)
    num_pieces, _, _, _ = list_pieces(sequences, heads, split, alone, partials, pieces)
    pieces = np.empty((num_pieces, PIECE_COLUMNS), np.int64)
    _, partials, least, most = list_pieces(sequences, heads, split, alone, partials, pieces)
    return pieces, partials, workers, least, most


@plain
def rows_of(rows, count, heads):
    """The number of rows, of those that kernels are compiled for, that serves so many of `count` new tokens.

    A single token has a kernel of its own size; other sizes are few, to compile few kernels.
    """
    if rows <= FEW_ROWS:
        return rows if count == 1 else FEW_ROWS
    for size in heads.sizes:
        if rows <= size:
            return size
    return heads.sizes[-1]


@plain
def tile_of(count, heads):
    """Tokens and query heads of a piece, of a sequence with `count` new tokens."""
    most = heads.sizes[-1]
    return max(1, min(count, most // heads.group)), min(heads.group, most)


@plain
def key_range(sequences, s, position, tokens, window_left):
    """The keys of sequence s that `tokens` new tokens from `position` on see."""
    end = min(position + tokens, sequences.seq_lens[s])
    begin = sequences.begins[s] if sequences.begins.shape[0] > 0 else 0
    if window_left >= 0:
        begin = max(begin, position - window_left)
    return min(begin, end), end


@plain
def count_keys(sequences, heads):
    """Keys that all pieces see together, if none is split, and the scores that they make."""
    keys, scores = 0, 0
    for s in range(sequences.seq_lens.shape[0]):
        count = sequences.query_start_loc[s + 1] - sequences.query_start_loc[s]
        tile, _ = tile_of(count, heads)
        for first in range(0, count, tile):
            tokens = min(tile, count - first)
            position = sequences.positions[s] + first
            begin, end = key_range(sequences, s, position, tokens, heads.window_left)
            keys += (end - begin) * heads.num_kv_heads
            scores += (end - begin) * heads.num_kv_heads * tokens * heads.group
    return keys, scores


@plain
def list_pieces(sequences, heads, split, alone, p, pieces):
    """List pieces with ranges of `split` keys at most, where their table has room.

    Of a sequence the last tokens, which see most, come first. Returns how many pieces there are, the number of partial
    results, of which there were `p` before, and the least and the greatest number of rows.
    """
    group = heads.group
    least, most = heads.sizes[-1], 0
    n = 0
    for s in range(sequences.seq_lens.shape[0]):
        start = sequences.query_start_loc[s]
        count = sequences.query_start_loc[s + 1] - start
        tile, heads_together = tile_of(count, heads)
        for t in range((count + tile - 1) // tile - 1, -1, -1):
            first = t * tile
            tokens = min(tile, count - first)
            position = sequences.positions[s] + first
            begin, end = key_range(sequences, s, position, tokens, heads.window_left)
            ranges = max(1, (end - begin + split - 1) // split)
            length = (end - begin + ranges - 1) // ranges
            partial = ranges > 1 or not alone
            for kv_head in range(heads.num_kv_heads):
                for head in range(0, group, heads_together):
                    num_heads = min(heads_together, group - head)
                    rows = rows_of(tokens * num_heads, count, heads)
                    least, most = min(least, rows), max(most, rows)
                    for i in range(ranges):
                        if n < pieces.shape[0]:
                            pieces[n, SEQUENCE] = s
                            pieces[n, KV_HEAD] = kv_head
                            pieces[n, FIRST_HEAD] = kv_head * group + head
                            pieces[n, NUM_HEADS] = num_heads
                            pieces[n, TOKEN] = start + first
                            pieces[n, NUM_TOKENS] = tokens
                            pieces[n, POSITION] = position
                            pieces[n, ROWS] = rows
                            pieces[n, FIRST_KEY] = min(begin + i * length, end)
                            pieces[n, END_KEY] = min(begin + (i + 1) * length, end)
                            pieces[n, COUNTS_SINK] = alone and i == 0
                            pieces[n, PARTIAL] = p if partial else -1
                            pieces[n, KEPT] = -1
                        p += partial
                        n += 1
    return n, p, least, most


@kernel
def list_merges(static, pieces, tokens, num_tokens, num_qo_heads, partial_rows):
    """The tables of a `MergeJob` for pieces that are partial results.

    `tokens` says which packed token each of a piece's tokens is; empty: the same. Of one token and head the sources are
    in the order of the pieces.
    """
    starts = np.zeros(num_tokens * num_qo_heads + 1, np.int64)
    heads = np.zeros(num_tokens * num_qo_heads, np.int64)
    for n in range(pieces.shape[0]):
        for i in range(pieces[n, NUM_TOKENS]):
            token = pieces[n, TOKEN] + i
            token = tokens[token] if tokens.shape[0] > 0 else token
            block = token * num_qo_heads + pieces[n, FIRST_HEAD]
            heads[block] = pieces[n, NUM_HEADS]
            starts[block + 1] += 1
    num_merges = 0
    for block in range(num_tokens * num_qo_heads):
        num_merges += heads[block] > 0
        starts[block + 1] += starts[block]
    merges = np.empty((num_merges, MERGE_COLUMNS), np.int64)
    m = 0
    for block in range(num_tokens * num_qo_heads):
        if heads[block] > 0:
            merges[m, MERGE_TOKEN] = block // num_qo_heads
            merges[m, MERGE_HEAD] = block % num_qo_heads
            merges[m, MERGE_HEADS] = heads[block]
            merges[m, MERGE_BEGIN] = starts[block]
            merges[m, MERGE_END] = starts[block + 1]
            m += 1
    sources = np.empty(starts[-1], np.int64)
    for n in range(pieces.shape[0]):
        for i in range(pieces[n, NUM_TOKENS]):
            token = pieces[n, TOKEN] + i
            token = tokens[token] if tokens.shape[0] > 0 else token
            block = token * num_qo_heads + pieces[n, FIRST_HEAD]
            sources[starts[block]] = pieces[n, PARTIAL] * partial_rows + i * pieces[n, NUM_HEADS]
            starts[block] += 1
    return merges, sources
