"""Weighted values of a run of cached tokens: the third phase of attention."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import (
    ALL_FORMATS,
    ARITHMETICS,
    BFLOAT16,
    CHUNK_BYTES,
    CODE_BYTES,
    FLOAT32,
    QUANTIZED,
    code_vectors,
    load_codes,
    load_floats,
)
from kvnumba.backends.cpu.simd import F32, I16, I32, LANES, Emitter, index, vector
from kvnumba.backends.cpu.tiles import FEW, row_ahead, shape_of

STRIP = 16  # tokens whose values are read, for all of head_dim, before the next

# Words of two tokens, neighbours side by side.
NEIGHBOURS = [token * 2 * LANES + word for word in range(2 * LANES) for token in range(2)]


@intrinsic
def weigh_run(
    typing, static, fmt, codes, row, count, following, ahead, scores, to, part, rows_used, head_dim
):  # fmt: skip
    """Add the weighted values of `count` tokens to part (rows, padded head_dim).

    For many rows the format is one of ARITHMETICS; in bfloat16 a row of codes, and of the weights, is a pair of
    tokens, and `count` counts pairs. Codes meet weights that `round_run` has rounded, and their sums are 32-bit
    integers; of int4 the even elements of each chunk lie before the odd. Strips of tokens are read whole before
    the next, though their sums fill the registers several times: memory is read in its own order.
    """
    signature = types.void(
        static, types.intp, codes, types.intp, types.intp, types.intp, types.intp, scores, types.intp,
        part, types.intp, types.intp,
    )  # fmt: skip
    shape = shape_of(static.values[0])
    few = static.values[0] <= FEW

    def generate(context, builder, _, args):
        e, b = Emitter(context, builder), builder
        _, number, _, row, count, following, ahead, _, to, _, rows_used, head_dim = args
        row_bytes = e.extent(codes, args[2], 1)
        memory = e.pointer(codes, args[2])
        start, following = (e.at(memory, b.mul(r, row_bytes)) for r in (row, following))
        weights = e.at(e.pointer(scores, args[7]), b.mul(to, index(4)))
        part_memory = e.pointer(part, args[9])
        part_bytes = b.mul(e.extent(part, args[9], 1), index(4))

        def case(fmt: int) -> None:
            quantized = fmt in QUANTIZED
            paired = not few and fmt == BFLOAT16  # a unit of 32 bits is an element of two tokens
            multiply = e.dot if quantized else e.dot_bfloat16 if paired else e.fma
            pair = 2 if quantized else 1  # tokens that are multiplied at once
            chunk_bytes = CODE_BYTES if quantized else CHUNK_BYTES[FLOAT32 if paired else fmt]
            vectors = 2 * code_vectors(fmt) if quantized else 1
            rows = min(static.values[0], LANES // vectors) if few else 4  # that are summed at once
            kind = vector(I32 if quantized else F32)
            size = index(vectors * LANES)
            chunks = b.sdiv(b.add(head_dim, b.sub(size, index(1))), size)
            together = _chunks_together(rows, vectors)
            passes = b.sdiv(chunks, index(together))

            def load(row: ir.Value) -> list[ir.Value]:
                if not quantized:
                    return [load_floats(e, FLOAT32 if paired else fmt, row)]
                halves = NEIGHBOURS[: 2 * LANES], NEIGHBOURS[2 * LANES :]
                two = zip(load_codes(e, fmt, row), load_codes(e, fmt, e.at(row, row_bytes)), strict=True)
                return [e.shuffle(x, y, half) for x, y in two for half in halves]

            def load_weight(place: ir.Value) -> ir.Value:
                weight = e.broadcast(place)
                return b.bitcast(weight, vector(I16, 2 * LANES)) if quantized else weight

            def columns(
                begin: Any, tokens: Any, first_row: Any, first_chunk: Any, width: int, step: Any
            ) -> None:
                """Some chunks of some tokens, for a block of rows."""
                offset = b.mul(first_chunk, index(chunk_bytes))
                values = start_of(begin, offset)
                later = row_ahead(e, begin, ahead, count, start, following, row_bytes)
                sums_at = b.add(b.mul(first_row, part_bytes), b.mul(first_chunk, index(4 * vectors * LANES)))
                places = [
                    e.at(
                        part_memory, b.add(sums_at, b.add(b.mul(index(r), part_bytes), index(4 * n * LANES)))
                    )
                    for r in range(rows)
                    for n in range(width * vectors)
                ]
                first_weight = b.add(b.mul(b.sdiv(begin, index(pair)), index(shape.columns)), first_row)

                def some(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                    row = e.at(values, b.mul(i, b.mul(row_bytes, index(pair))))
                    loaded = [x for c in range(width) for x in load(e.at(row, c * chunk_bytes))]
                    weight = b.add(first_weight, b.mul(i, index(shape.columns)))
                    results = []
                    for r in range(rows):
                        w = load_weight(e.at(weights, b.mul(b.add(weight, index(r)), index(4))))
                        results += [multiply(w, x, sums[r * len(loaded) + n]) for n, x in enumerate(loaded)]
                    # the bytes ahead in their own order, a share of them with each turn
                    share = pair * width * chunk_bytes
                    behind = b.mul(b.add(b.mul(step, turns), i), index(share))
                    for line in range(0, share, 64):
                        e.prefetch(e.at(later, b.add(behind, index(line))))
                    return results

                turns = b.sdiv(b.add(tokens, index(pair - 1)), index(pair))
                sums = e.loop(turns, [e.load(place, kind) for place in places], some)
                for place, x in zip(places, sums, strict=True):
                    e.store(x, place)

            def start_of(token: Any, offset: Any) -> ir.Value:
                return e.at(start, b.add(b.mul(token, row_bytes), offset))

            def strip(n: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                begin = b.mul(n, length)
                tokens = b.sub(count, begin)
                tokens = b.select(b.icmp_signed("<", tokens, length), tokens, length)

                def block(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                    first_row = b.mul(i, index(rows))

                    def several(c: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                        columns(begin, tokens, first_row, b.mul(c, index(together)), together, c)
                        return []

                    def single(c: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                        done = b.mul(passes, index(together))
                        columns(begin, tokens, first_row, b.add(done, c), 1, b.add(done, c))
                        return []

                    e.loop(passes, [], several)
                    if together > 1:
                        e.loop(b.srem(chunks, index(together)), [], single)
                    return []

                e.loop(b.sdiv(b.add(rows_used, index(rows - 1)), index(rows)), [], block)
                return []

            length = index(STRIP) if few else b.add(count, index(1))  # float32 tiles come from the cache
            e.loop(b.sdiv(b.add(count, b.sub(length, index(1))), length), [], strip)

        e.switch(number, ALL_FORMATS if few else ARITHMETICS, case)
        return context.get_dummy_value()

    return signature, generate


def _chunks_together(rows: int, vectors: int) -> int:
    """Chunks whose sums fit the registers, a power of two."""
    together = 4
    while together > 1 and together * rows * vectors > LANES:
        together //= 2
    return together
