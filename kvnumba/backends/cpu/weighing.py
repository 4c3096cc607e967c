"""Weighted sums of values: what the shapes have in common of the third phase."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kvnumba.backends.cpu.shapes import row_ahead
from kvnumba.backends.cpu.simd import I16, LANES, Emitter, Int, Pointer, vector


def weigh_rows(
    e: Emitter,
    stride: int,
    codec: Any,
    rows: int,
    strip: Int | int,
    *,
    start: Pointer,
    following: Pointer,
    row_bytes: Int,
    count: Int,
    ahead: Int,
    weights: Pointer,
    sums: Any,
    rows_used: Int,
    width: Int,
    line_bytes: Int | None = None,
) -> None:
    """Write the loops that add the weighted values of `count` rows of storage to `sums`, (columns, padded width).

    Sums of `rows` rows of queries are held in registers at once, over as many chunks of a value as there is room for.
    Strips of `strip` tokens are read whole before the next, though their sums fill the registers several times: memory
    is read in its own order. For each 64 bytes that are read, the 64 or `line_bytes` next ones of the rows ahead are
    prefetched. Weights of tokens lie `stride` columns apart; those of codes are 16-bit integers, of two tokens side by
    side.
    """
    b = e.builder
    vectors = codec.vectors * codec.tokens  # of sums, for a chunk
    chunk = vectors * LANES  # elements that they stand for
    chunk_bytes = codec.chunk_bytes
    sums_bytes = sums.extent(1) * 4
    chunks = (width + (chunk - 1)) // chunk
    together = _chunks_together(rows, vectors)
    passes = chunks // together

    def load_weight(pointer: Pointer) -> ir.Value:
        weight = e.broadcast(pointer)
        return b.bitcast(weight, vector(I16, 2 * LANES)) if codec.as_codes else weight

    def columns(begin: Int, tokens: Int, first_row: Int, first_chunk: Int, several: int, step: Int) -> None:
        """Some chunks of some tokens, for a block of rows."""
        values = start + (begin * row_bytes + first_chunk * chunk_bytes)
        later = row_ahead(e, begin, ahead, count, start, following, row_bytes)
        first = sums.start + (first_row * sums_bytes + first_chunk * (4 * chunk))
        held = [
            first + (r * sums_bytes + 4 * n * LANES) for r in range(rows) for n in range(several * vectors)
        ]
        first_weight = begin // codec.tokens * stride + first_row

        def some(i: Int, totals: list[ir.Value]) -> list[ir.Value]:
            row = values + i * (row_bytes * codec.tokens)
            loaded = [x for c in range(several) for x in codec.load(e, row + c * chunk_bytes, row_bytes)]
            weight = first_weight + i * stride
            results = []
            for r in range(rows):
                w = load_weight(weights + (weight + r) * 4)
                results += [
                    codec.multiply(e, w, x, totals[r * len(loaded) + n]) for n, x in enumerate(loaded)
                ]
            # the bytes ahead in their own order, a share of them with each turn
            share = codec.tokens * several * chunk_bytes
            lines = -(-share // 64)
            line = later + (step * turns + i) * (share if line_bytes is None else line_bytes * lines)
            for _ in range(lines):
                e.prefetch(line)
                line = line + (64 if line_bytes is None else line_bytes)
            return results

        turns = (tokens + (codec.tokens - 1)) // codec.tokens
        totals = e.loop(turns, [e.load(pointer, vector(codec.sums)) for pointer in held], some)
        for pointer, x in zip(held, totals, strict=True):
            e.store(x, pointer)

    def each_strip(n: Int, _: list[ir.Value]) -> list[ir.Value]:
        begin = n * strip
        tokens = (count - begin).at_most(strip)

        def block(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            first_row = i * rows

            def several(c: Int, _: list[ir.Value]) -> list[ir.Value]:
                columns(begin, tokens, first_row, c * together, together, c)
                return []

            def single(c: Int, _: list[ir.Value]) -> list[ir.Value]:
                done = passes * together
                columns(begin, tokens, first_row, done + c, 1, done + c)
                return []

            e.loop(passes, [], several)
            if together > 1:
                e.loop(chunks % together, [], single)
            return []

        e.loop((rows_used + (rows - 1)) // rows, [], block)
        return []

    e.loop((count + strip - 1) // strip, [], each_strip)


def _chunks_together(rows: int, vectors: int) -> int:
    """Chunks whose sums fit the registers, a power of two."""
    together = 4
    while together > 1 and together * rows * vectors > LANES:
        together //= 2
    return together
