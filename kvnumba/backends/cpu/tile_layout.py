"""Numbers in the order in which tiles are multiplied: queries, keys and values on their way in, sums on their way out.

Each number is a sum of `shape.parts` bfloat16 numbers, which lie in arrays one after the other, see `many_tiles.py`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.codecs import decode_rows, nearest_bfloat16
from kvnumba.backends.cpu.jit import inlined, plain
from kvnumba.backends.cpu.runs import RUN_ROW, run_of
from kvnumba.backends.cpu.shapes import prefetch_rows
from kvnumba.backends.cpu.simd import F32, I16, I32, LANES, Emitter, Int, constant, vector
from kvnumba.backends.cpu.tiles import TILE, TILE_BYTES, TILE_ROWS

ELEMENTS = 32  # bfloat16 numbers of a row of a tile, and keys of a section
PAIRS = ELEMENTS // 2
PHASE = 256  # keys that are staged together
SECTIONS = PHASE // ELEMENTS


@plain
def padded_key(head_dim):
    """Elements of a key in scratch: whole rows of tiles."""
    return (head_dim + ELEMENTS - 1) // ELEMENTS * ELEMENTS


@inlined
def stage(shape, keys, values, runs, num_runs, later, scratch):
    """Bring the keys and values of some runs to bfloat16, in parts, and transpose the values. Returns how many.

    The keys' positions are kept in `scratch.key_positions`: between runs there may be blocks that are not there.
    The rows of the run that is `later` runs on are prefetched meanwhile.
    """
    key_dim, value_dim = padded_key(keys.head_dim), values.head_dim
    n = 0
    for i in range(num_runs):
        run, following = run_of(runs, i), runs[i + later, RUN_ROW]
        done = 0
        while done < run.num_tokens:
            row, count = run.row + done, min(run.num_tokens - done, ELEMENTS - n % ELEMENTS)
            prefetch_rows(keys.codes, following + done, count)
            prefetch_rows(values.codes, following + done, count)
            lay_rows(shape, keys, row, count, scratch.tile, scratch.keys, n * key_dim, key_dim, PHASE)
            at = n % ELEMENTS * value_dim
            lay_rows(shape, values, row, count, scratch.tile, scratch.halves, at, value_dim, ELEMENTS)
            for token in range(count):
                scratch.key_positions[n + token] = run.key + done + token
            done += count
            n += count
            if n % ELEMENTS == 0:
                lay_values(shape, scratch.halves, n // ELEMENTS - 1, value_dim, scratch.values)
    if n % ELEMENTS != 0:  # weights of 0 follow, and 0 times NaN would be NaN
        for part in range(shape.parts):
            first = (part * ELEMENTS + n % ELEMENTS) * value_dim
            scratch.halves[first : (part + 1) * ELEMENTS * value_dim] = 0
        lay_values(shape, scratch.halves, n // ELEMENTS, value_dim, scratch.values)
    return n


@plain
def lay_rows(shape, rows, first, count, decoded, out, to, width, most):
    """Rows of the storage as bfloat16 into out[to:], each in `width` elements; parts are `most` rows apart."""
    head_dim, parts = rows.head_dim, shape.parts
    if parts > 1:
        decode_rows(rows, first, count, decoded, 0)
    if width == head_dim:
        if parts == 1:
            decode_rows(rows, first, count, out, to)
        else:
            lay_parts(shape, decoded, 0, count * head_dim, out, to, most * width)
        return
    for n in range(count):
        at = to + n * width
        if parts == 1:
            decode_rows(rows, first + n, 1, out, at)
        else:
            lay_parts(shape, decoded, n * head_dim, head_dim, out, at, most * width)
        for part in range(parts):
            out[at + part * most * width + head_dim : at + part * most * width + width] = 0


def _parts_of(e: Emitter, x: ir.Value, parts: int) -> list[ir.Value]:
    """x as bfloat16 bits: the nearest, then the nearest of what is left. Nothing is left of infinity."""
    b, found = e.builder, []
    for part in range(parts):
        bits = nearest_bfloat16(e, x)
        found.append(bits)
        if part < parts - 1:
            rest = b.fsub(x, b.bitcast(b.shl(b.zext(bits, vector(I32)), constant(16, I32)), vector(F32)))
            x = b.select(b.fcmp_ordered("ord", rest, rest), rest, constant(0.0))
    return found


@intrinsic
def lay_query(typing, shape, q, start, r, head_dim, query):
    """A row of queries, as parts, into its column: each pair of elements has a row of a tile."""
    signature = types.void(shape, q, types.intp, types.intp, types.intp, query)
    static = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, q, start, r, head_dim, query = e.arguments(signature, args)
        source = q.start + start * 4
        steps = (head_dim + (ELEMENTS - 1)) // ELEMENTS
        column = query.start + (r // TILE_ROWS * steps * TILE + r % TILE_ROWS * 4)
        plane = steps * (static.columns // TILE_ROWS * TILE)

        def chunk(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            x = e.load(source + i * (4 * LANES), vector(F32))
            for part, bits in enumerate(_parts_of(e, x, static.parts)):
                pairs = b.bitcast(bits, vector(I32, LANES // 2))
                target = column + (plane * part + i * (LANES // 2 * TILE_BYTES))
                for n in range(LANES // 2):
                    e.store(b.extract_element(pairs, I32(n)), target + n * TILE_BYTES)
            return []

        e.loop(head_dim // LANES, [], chunk)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def lay_parts(typing, shape, x, start, count, out, to, plane):
    """x[start : start + count] as parts into out[to:], `plane` elements apart."""
    signature = types.void(shape, x, types.intp, types.intp, out, types.intp, types.intp)
    static = shape.static

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        _, x, start, count, out, to, plane = e.arguments(signature, args)
        source, target = x.start + start * 4, out.start + to * 2

        def chunk(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            loaded = e.load(source + i * (4 * LANES), vector(F32))
            for part, bits in enumerate(_parts_of(e, loaded, static.parts)):
                e.store(bits, target + (plane * (2 * part) + i * (2 * LANES)))
            return []

        e.loop(count // LANES, [], chunk)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def lay_values(typing, shape, halves, section, value_dim, values):
    """32 rows of bfloat16, of each part, transposed as a section of the phase's values."""
    signature = types.void(shape, halves, types.intp, types.intp, values)
    static = shape.static

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        _, halves, section, value_dim, values = e.arguments(signature, args)
        row_bytes = value_dim * 2
        plane = value_dim * (PHASE * 2)
        neighbours = [element + token * TILE_ROWS for element in range(TILE_ROWS) for token in range(2)]

        def elements(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            for part in range(static.parts):
                source = halves.start + (row_bytes * (part * ELEMENTS) + i * (2 * TILE_ROWS))
                pairs = []
                for pair in range(PAIRS):
                    row = source + row_bytes * (2 * pair)
                    first, second = (e.load(at, vector(I16, TILE_ROWS)) for at in (row, row + row_bytes))
                    pairs.append(b.bitcast(e.shuffle(first, second, neighbours), vector(I32, TILE_ROWS)))
                target = values.start + (plane * part + (i * SECTIONS + section) * TILE)
                for d, row in enumerate(transposed(e, pairs)):
                    e.store(row, target + d * TILE_BYTES)
            return []

        e.loop(value_dim // TILE_ROWS, [], elements)
        return context.get_dummy_value()

    return signature, generate


def transposed(e: Emitter, rows: list[ir.Value]) -> list[ir.Value]:
    """Lane i of vector j becomes lane j of vector i, of as many vectors as they have lanes."""
    count = len(rows)
    distance = count // 2
    while distance:
        turned = list(rows)
        for i in range(count):
            if not i & distance:
                x, y = rows[i], rows[i | distance]
                low = [lane if not lane & distance else count + (lane ^ distance) for lane in range(count)]
                high = [lane | distance if not lane & distance else count + lane for lane in range(count)]
                turned[i], turned[i | distance] = e.shuffle(x, y, low), e.shuffle(x, y, high)
        rows = turned
        distance //= 2
    return rows


@intrinsic
def turn_tiles(typing, x, count):
    """Transpose each of the first `count` tiles of x, in place."""
    signature = types.void(x, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        x, count = e.arguments(signature, args)

        def tile(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            where = x.start + i * TILE
            rows = [e.load(where + r * TILE_BYTES, vector(F32, TILE_ROWS)) for r in range(TILE_ROWS)]
            for r, row in enumerate(transposed(e, rows)):
                e.store(row, where + r * TILE_BYTES)
            return []

        e.loop(count, [], tile)
        return context.get_dummy_value()

    return signature, generate
