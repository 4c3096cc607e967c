"""What the shapes of the attention kernel share.

The rows of a kernel are some new tokens times the query heads of one KV head. A shape is a file of micro-kernels for
some numbers of rows: `few.py` (decoding) multiplies along head_dim, `many.py` (prompts) takes outer products. Between
them stands one online softmax (`softmax.py`), for the scores of every shape lie as [token][column], a column for each
row of queries.

Every phase (all scores, one softmax, all values) covers a run of many tokens, which the memory system streams.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import Static, plain
from kvnumba.backends.cpu.simd import F32, I32, LANES, Array, Emitter, Int, Pointer, constant, vector


@dataclass(frozen=True, eq=False)
class Shape(Static):
    """How scores lie for a number of rows, and the file with the micro-kernels for it.

    A phase is attended to run by run, see `phases.py`, by functions that the file has; each takes the shape first, and
    reads its attributes and functions:

    ``choose(keys, values, scoring)``
        A `Reading`: what is read as it is stored, and what is staged (brought to one format in scratch) before.
    ``load_query(shape, reading, q, start, r, head_dim, sm_scale, query)``
        Row r of the queries, q[start : start + head_dim], into `scratch.query`. Returns QUERY_STEP and QUERY_SUM.
    ``score_run(shape, reading, keys, run, following, masks, scratch)``
        Scores of a run into `scratch.scores`, their greatest into PHASE_MAX. Scores of whole tiles are written: those
        past the run, and those of keys that a row does not see, are -inf. Rows past the run are read.
    ``weigh_run(shape, reading, values, run, following, rows, scratch)``
        The weighted values of a run, added to `scratch.sums`.
    ``add_phase(shape, reading, last, rows, scratch)``
        The sums of a phase, of which `last` is the last run, added to `scratch.total`.

    `following` is the first row of the run that is read `AHEAD` tokens later, to be prefetched.

    A file may also have functions of its own in place of those in `phases.py`: it is then asked first.

    Attributes
    ----------
    kernels : str
        The module.
    rows : int
    columns : int
        Rows, and as many more as make whole vectors.
    tokens : int
        Of a tile: those whose scores are accumulated together.
    vectors : int
        That hold the scores of one line.
    line : int
        Tokens of a line.
    phase : int
        Tokens whose scores are computed before their values are read.
    takes_codes : bool
        Whether codes are multiplied as the integers they are, their scales folded into the weights.
    instructions : str
        Of tiles, see `tiles.py`; elsewhere "".
    group : int
        Columns that take a phase together, in prompts.
    parts : int
        bfloat16 numbers that tiles multiply in place of one.
    """

    kernels: str = ""
    rows: int = 0
    columns: int = 0
    tokens: int = 0
    vectors: int = 0
    line: int = 0
    phase: int = 0
    takes_codes: bool = False
    instructions: str = ""
    group: int = 0
    parts: int = 0

    @property
    def keeps(self) -> bool:
        """Whether weights may be kept, see `mass.py`: those of few rows, which are one vector."""
        return self.columns <= MOST_KEPT and self.vectors == 1

    @property
    def width(self) -> int:
        """Lanes of the state: those of whole vectors of columns."""
        return max(self.columns, self.vectors * LANES)

    @property
    def lanes(self) -> int:
        """Scores that a user's function is called for in one loop: a group's of several tokens; on tiles of one."""
        together = self.group or self.width
        return together if self.parts else -(-LOOP // together) * together

    @property
    def all_lanes(self) -> int:
        """Those of all groups."""
        return self.lanes * (self.columns // self.group if self.group else 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        kernels = importlib.import_module(self.kernels)
        return getattr(kernels, name, None) or getattr(importlib.import_module(PHASES), name)


MOST_KEPT = 8  # columns

PHASES = "kvnumba.backends.cpu.phases"

# What is kept of each column: the rows of the state.
(
    QUERY_STEP,  # what 1 stands for in queries of integers
    QUERY_SUM,  # of the query's elements
    SLOPE,
    ROW_MAX,  # the greatest score
    ROW_SUM,  # of the weights, in this lane
    ZERO_SUM,  # of weights times the values' zeros, in this lane
    PHASE_MAX,  # the greatest score of the phase, in this lane
    RESCALE,  # what sums of earlier phases are multiplied by
    WEIGHT_MAX,  # the greatest weight of the phase, in this lane
    WEIGHT_SUM,  # of the phase's weights as integers, in this lane
    OFFSET,  # what scores lack where keys are stored shifted, see `RowTransform.offsets`
) = range(11)
STATE_ROWS = 11

LOOP = 256  # scores that are worth a loop
AHEAD = 64  # tokens between what is read and what is prefetched

LEAST = float(np.finfo(np.float32).min)  # finite, so that no maximum is infinity less infinity
NEVER = -(1 << 30)  # the position of a column that is not used: it sees nothing


class Piece(NamedTuple):
    """A row of the plan's table of pieces: some tokens, some query heads of one KV head, and a range of keys."""

    sequence: int
    kv_head: int
    first_head: int
    num_heads: int
    token: int  # the first, in the part's order
    num_tokens: int
    position: int  # of the first token
    rows: int  # that the kernel is compiled for
    first_key: int
    end_key: int
    counts_sink: int
    partial: int  # the partial result's number, or -1: the result
    kept: int  # where its weights are kept, see `mass.py`, in floats; -1: nowhere


class Run(NamedTuple):
    """Tokens of a sequence whose rows lie side by side."""

    row: int
    num_tokens: int
    scores: int  # where theirs begin in `scratch.scores`
    key: int  # the first one's position


class Score(NamedTuple):
    """How scores are made: `kvnumba.options.Scoring` as the kernels see it. Off: no sinks, no slopes, a cap of 0."""

    sm_scale: float
    window_left: int
    soft_cap: float
    sinks: Any
    slopes: Any
    exact: bool  # products in float32, whatever the format
    bfloat16: bool  # many rows may be multiplied in bfloat16
    modify: int  # the address of what changes scores, see `mods.py`; 0: none
    aux: int  # the address of what that is given besides


class Masks(NamedTuple):
    """What becomes of the scores of a piece.

    Attributes
    ----------
    reach : int32
        How far back a token sees.
    seen_by_all : int
        Of keys up to this position nothing is masked, capped or biased.
    soft_cap : float32
    modify, aux : int
        As in `Score`.
    offset, shift : int
        `Batch.offsets` and `Batch.shifts` of the piece's sequence.
    kept : int
        The address where the weights of key 0 are kept, or would be; 0: none are.
    """

    reach: Any
    seen_by_all: int
    soft_cap: Any
    modify: int
    aux: int
    offset: int
    shift: int
    kept: int


class Reading(NamedTuple):
    """What a piece reads as it is stored, and what it stages before.

    Attributes
    ----------
    k_direct, v_direct : bool
        Whether rows are read in place.
    k_format, v_format : int
        The format that is then multiplied.
    code_bias : float32
        Where values are multiplied as codes: the code that counts as 0 in their sums. Elsewhere -1.
    """

    k_direct: bool
    v_direct: bool
    k_format: int
    v_format: int
    code_bias: Any


class Scratch(NamedTuple):
    """A worker's memory for one piece.

    Attributes
    ----------
    state : (STATE_ROWS, width) float32
    positions : (width,) int32
        Of each column's token.
    query : (n,) float32
        The queries, as the shape wants them.
    total, sums : (columns, padded value width) float32
        Weighted values, of all phases and of this one: one running sum over a long sequence would round its tail away.
    scores : (n,) float32
    tile, tile_halves, tile_bytes : (n,) float32, (2 * n,) uint16, (1, 4 * n) uint8
        The same memory: rows that are staged.
    lanes : (4 * all_lanes,) int32
        Of as many scores of each group as a loop takes: the query head, the position of the new token (less the shift),
        the number of the key among those of the loop, and (float32) the OFFSET, where it is lacking. Only where scores
        are modified.
    """

    state: Any
    positions: Any
    query: Any
    total: Any
    sums: Any
    scores: Any
    tile: Any
    tile_halves: Any
    tile_bytes: Any
    lanes: Any


@plain
def padded(head_dim):
    """Floats of a row in scratch: whole chunks of every format."""
    return -(-head_dim // (4 * LANES)) * 4 * LANES


def state_at(state: Array, name: int, shape: Shape, part: Int | int = 0) -> Pointer:
    """Where a vector of a row of the state lies."""
    return state.start + 4 * (name * shape.width + part * LANES)


def tokens_of(shape: Shape, part: Any) -> list[int]:
    """Which token of a line each lane of a vector is of. `part` may be an `Int` where a line is one token."""
    if shape.line == 1:
        return [0] * LANES
    return [lane // shape.columns for lane in range(part * LANES, (part + 1) * LANES)]


def finish_scores(
    e: Emitter, shape: Shape, part: Int | int, score: ir.Value, key: Int, left: Int, masks: Any, scratch: Any
) -> ir.Value:
    """Offset and soft cap, ALiBi and masks, in the order of the NumPy backend's `score`, on a vector of scores.

    Its first token has the position `key`, and `left` tokens are left from there on; its columns are those of the
    state's vector `part`.
    """
    b = e.builder
    offsets = tokens_of(shape, part)
    cap = e.splat(masks.soft_cap)
    capped = b.fcmp_ordered(">", masks.soft_cap, ir.Constant(F32, 0.0))

    def within_cap() -> list[ir.Value]:
        product = e.add(score, e.load(state_at(scratch.state, OFFSET, shape, part), vector(F32)))
        return [e.mul(cap, e.tanh(b.fdiv(product, cap)))]

    score = e.when(capped, [score], within_cap)[0]
    lane_token = ir.Constant(vector(I32), offsets)
    keys = b.add(e.splat(key.narrow()), lane_token)
    own = e.load(scratch.positions.start + 4 * part * LANES, vector(I32))
    distance = b.sub(own, keys)
    slope = e.load(state_at(scratch.state, SLOPE, shape, part), vector(F32))
    score = b.fsub(score, b.fmul(slope, b.sitofp(distance, vector(F32))))
    seen = b.icmp_signed(">=", distance, constant(0, I32))
    seen = b.and_(seen, b.icmp_signed("<=", distance, e.splat(masks.reach)))
    seen = b.and_(seen, b.icmp_signed("<", lane_token, e.splat(left.narrow())))
    return b.select(seen, score, constant(float("-inf")))


def is_known(e: Emitter, shape: Shape, token: Int, run: Any, masks: Any) -> ir.Value:
    """Whether nothing of the tile from `token` of the run on is masked, capped or biased."""
    last = token + (shape.tokens - 1)
    return e.builder.and_(last < run.num_tokens, run.key + last <= masks.seen_by_all)


def row_ahead(
    e: Emitter, token: Int, ahead: Int, count: Int, start: Pointer, following: Pointer, row_bytes: Int
) -> Pointer:
    """The row `ahead` tokens on: in this run, or in the one that follows."""
    b = e.builder
    target = token + ahead
    inside = target < count
    base = Pointer(b, b.select(inside, start.value, following.value))
    row = Int(b, b.select(inside, target.value, (target - count).value))
    return base + row * row_bytes


@intrinsic
def prefetch_rows(typing, array, first, count):
    """Ask for `count` rows of an array, from `first` on."""
    signature = types.void(array, types.intp, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        rows, first, count = e.arguments(signature, args)
        row_bytes = rows.extent(1) * rows.item_bytes
        start = rows.start + first * row_bytes

        def line(i: Int, _: list[Any]) -> list[Any]:
            e.prefetch(start + i * 64)
            return []

        e.loop((count * row_bytes + 63) // 64, [], line)
        return context.get_dummy_value()

    return signature, generate
