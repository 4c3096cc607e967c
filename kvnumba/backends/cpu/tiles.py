"""What the micro-kernels of attention share: `scores`, `softmax` and `values` of a run of cached tokens.

Rows are a few query tokens times the query heads of one KV head. There are two shapes. With up to FEW rows
(decoding) scores are dot products along head_dim, storage is read in place, and codes are multiplied as the
integers they are: by queries and weights of 16 bits, their scales left out of the inner loop. With more
(prompts) a vector holds rows, keys and values are float32, and their elements are broadcast: a matrix product
in registers. The scores of either lie as [token][column], a column a row of queries, and the online softmax
between them is one.

Each phase (all scores, one softmax, all values) covers a run of many tokens, which the memory system streams.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.simd import LANES, Emitter, index

FEW = 8
MANY = (16, 64) if LANES == 16 else (16,)
"""Numbers of rows that kernels with more than FEW are compiled for."""

STRETCH = 32  # elements of head_dim that are summed on their own: long sums would round their tail away

LEAST = float(np.finfo(np.float32).min)  # finite, so that no maximum is infinity less infinity

# What is kept of each column, as rows of a table.
(
    QUERY_STEP, QUERY_SUM, SLOPE, ROW_MAX, ROW_SUM, ZERO_SUM, PHASE_MAX, RESCALE, WEIGHT_TOP, WEIGHT_SUM
) = range(10)  # fmt: skip
COLUMN_FACTS = 10

LARGEST_WORD = (1 << 15) - 1  # of 16 bits: what the largest query element or weight becomes


class Shape(NamedTuple):
    """How scores lie for a number of rows."""

    columns: int  # rows, and as many more as make whole vectors
    tokens: int  # of a tile: those whose scores are accumulated together
    vectors: int  # that hold the scores of one line
    line: int  # tokens of a line
    phase: int  # tokens whose scores are computed before their values are read


def shape_of(rows: int) -> Shape:
    """The shape for 1 to FEW rows, or one of MANY."""
    if rows <= FEW:
        columns = 1 << (rows - 1).bit_length()
        return Shape(columns, LANES // columns, 1, LANES // columns, 128)
    vectors = rows // LANES
    return Shape(rows, {1: 8, 2: 4, 4: 4}[vectors], vectors, 1, 64)


def _constant_of(name: str, value: Any) -> Any:
    """A function for kernels that gives a number of their shape, known when they compile."""

    def typer(typing, static):
        def generate(context, builder, signature, args):
            return context.get_constant(types.intp, value(static.values[0]))

        return types.intp(static), generate

    typer.__name__ = name
    return intrinsic(typer)


columns_of = _constant_of("columns_of", lambda rows: shape_of(rows).columns)
tile_tokens = _constant_of("tile_tokens", lambda rows: shape_of(rows).tokens)
phase_tokens = _constant_of("phase_tokens", lambda rows: shape_of(rows).phase)
is_few = _constant_of("is_few", lambda rows: int(rows <= FEW))


def fact_at(e: Emitter, facts: ir.Value, fact: int, shape: Shape, part: int = 0) -> ir.Value:
    """Where a vector of a fact about the columns lies."""
    columns = shape.vectors * LANES
    return e.at(facts, 4 * (fact * columns + part * LANES))


def row_ahead(
    e: Emitter, token: Any, ahead: Any, count: Any, start: Any, following: Any, row_bytes: Any
) -> Any:
    """The address of the row `ahead` tokens on: in this run, or in the one that follows."""
    b = e.builder
    target = b.add(token, ahead)
    inside = b.icmp_signed("<", target, count)
    base = b.select(inside, start, following)
    return e.at(base, b.mul(b.select(inside, target, b.sub(target, count)), row_bytes))


@intrinsic
def prefetch_rows(typing, array, first, count):
    """Ask for `count` rows of an array, from `first` on."""

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        item_bytes = context.get_abi_sizeof(context.get_data_type(array.dtype))
        row_bytes = b.mul(e.extent(array, args[0], 1), index(item_bytes))
        start = e.at(e.pointer(array, args[0]), b.mul(args[1], row_bytes))
        lines = b.sdiv(b.add(b.mul(args[2], row_bytes), index(63)), index(64))

        def line(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            e.prefetch(e.at(start, b.mul(i, index(64))))
            return []

        e.loop(lines, [], line)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate
