"""Row transforms in the kernels: what `kvnumba.transforms.RowTransform` defines, on rows that are at hand anyway."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import each_run, plain
from kvnumba.backends.cpu.simd import F32, I32, LANES, Array, Emitter, Int, Pointer, constant, vector
from kvnumba.storage import Layout
from kvnumba.transforms import rotation_size

KINDS = 3
KEYS, QUERIES, VALUES = range(KINDS)
"""What is transformed. Outputs are as values: their rotation is its own inverse."""

TOGETHER = (8, 4, 2, 1)  # vectors whose butterflies stay in registers
WIDEST = TOGETHER[0] * LANES


class Transform(NamedTuple):
    """What is done to rows x of one layer: ``rotate((x - shift) * rate)``.

    Attributes
    ----------
    rows : (KINDS * 2 * H, the greater head_dim) float32
        For each kind the shifts of all KV heads, then their rates, which have the factor that makes the Hadamard matrix
        a normalised one. No rows where nothing is transformed.
    key_size, value_size : int
        Elements of a row that are rotated together; 1: nothing is.
    """

    rows: Any
    key_size: int
    value_size: int


def transform_of(layout: Layout, layer: int) -> Transform:
    """The transform of a layer as the kernels see it."""
    transform, head_dim, value_dim = layout.transform, layout.head_dim, layout.value_head_dim
    if transform is None:
        return Transform(np.empty((0, 1), np.float32), 1, 1)
    key_size, value_size = (
        rotation_size(width) if transform.rotation else 1 for width in (head_dim, value_dim)
    )
    rows = np.zeros((KINDS, 2, layout.num_kv_heads, max(head_dim, value_dim)), np.float32)
    shifts, scales = np.float32(0), np.float32(1)
    if transform.calibration is not None:
        shifts, scales = (x[layer] for x in (transform.calibration.shifts, transform.calibration.scales))
    rows[KEYS, 0, :, :head_dim] = shifts
    rows[KEYS, 1, :, :head_dim] = key_size**-0.5 / scales
    rows[QUERIES, 1, :, :head_dim] = key_size**-0.5 * scales
    rows[VALUES, 1] = value_size**-0.5
    return Transform(rows.reshape(-1, rows.shape[-1]), key_size, value_size)


@plain
def is_transformed(transform):
    """Whether anything is done."""
    return transform.rows.shape[0] > 0


@plain
def transform_row(x, start, transform, kind, head, count, out, to):
    """Transform x[start : start + count] of a KV head into out[to:]; both are flat, and may be the same memory."""
    size = transform.value_size if kind == VALUES else transform.key_size
    heads = transform.rows.shape[0] // (2 * KINDS)
    shift = 2 * kind * heads + head
    transform_values(x, start, transform.rows, shift, shift + heads, count, size, out, to)
    distance = WIDEST
    while distance < size:
        for first in range(to, to + count, 2 * distance):
            for d in range(first, first + distance):
                low, high = out[d], out[d + distance]
                out[d] = low + high
                out[d + distance] = low - high
        distance *= 2


transform_each = each_run(transform_row.py_func)
"""The same, for loops over rows."""


@plain
def product_with_shift(x, start, transform, head, count):
    """The product of the query x[start : start + count] with the shift of a head's keys."""
    return dot_row(x, start, transform.rows, head, count)


@intrinsic
def transform_values(typing, x, start, rows, shift, rate, count, size, out, to):
    """Shift, scale and rotate elements, as far as the butterflies of WIDEST neighbours go."""
    signature = types.void(x, types.intp, rows, *[types.intp] * 4, out, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        x, start, rows, shift, rate, count, size, out, to = e.arguments(signature, args)
        at = x.start + start * 4, _row(rows, shift), _row(rows, rate), out.start + to * 4
        _within_vectors(e, size, count, *at)
        together = (size // LANES).at_most(TOGETHER[0])
        e.switch(together, TOGETHER, lambda together: _across_vectors(e, together, count, at[-1]))
        return context.get_dummy_value()

    return signature, generate


def _row(rows: Array, number: Int) -> Pointer:
    return rows.start + number * rows.extent(1) * 4


def _within_vectors(
    e: Emitter, size: Int, count: Int, x: Pointer, shift: Pointer, rate: Pointer, out: Pointer
) -> None:
    """Shift, scale and rotate as far as the lanes of a vector go: a loop that the processor fetches ahead of."""

    def transformed(x: ir.Value, shift: ir.Value, rate: ir.Value) -> ir.Value:
        x = e.mul(e.sub(x, shift), rate)
        distance = 1
        while distance < LANES:
            # a butterfly between each lane and its partner: of two the second changes its sign
            partners = e.pick(x, [lane ^ distance for lane in range(LANES)])
            signs = ir.Constant(vector(F32), [-1.0 if lane & distance else 1.0 for lane in range(LANES)])
            x = e.builder.select(size > distance, e.fma(x, signs, partners), x)
            distance *= 2
        return x

    def whole(i: Int, _: list[ir.Value]) -> list[ir.Value]:
        offset = i * (4 * LANES)
        e.store(transformed(*(e.load(row + offset, vector(F32)) for row in (x, shift, rate))), out + offset)
        return []

    full, left = count // LANES, count % LANES
    e.loop(full, [], whole)
    with e.builder.if_then(left > 0, likely=False):
        offset = full * (4 * LANES)
        some = (e.load_some(row + offset, left, constant(0.0)) for row in (x, shift, rate))
        e.store_some(transformed(*some), out + offset, left)


def _across_vectors(e: Emitter, together: int, count: Int, out: Pointer) -> None:
    """Butterflies between vectors, some of them together."""
    if together == 1:
        return

    def block(i: Int, _: list[ir.Value]) -> list[ir.Value]:
        pointers = [out + (i * (4 * LANES * together) + 4 * LANES * n) for n in range(together)]
        vectors = [e.load(pointer, vector(F32)) for pointer in pointers]
        step = 1
        while step < together:
            vectors = [
                e.sub(vectors[n - step], x) if n & step else e.add(x, vectors[n + step])
                for n, x in enumerate(vectors)
            ]
            step *= 2
        for pointer, x in zip(pointers, vectors, strict=True):
            e.store(x, pointer)
        return []

    e.loop(count // (LANES * together), [], block)


@intrinsic
def dot_row(typing, x, start, rows, row, count):
    """The product of x[start : start + count], of a flat x, with a row of a table."""
    signature = types.float32(x, types.intp, rows, types.intp, types.intp)

    def generate(context, builder, signature, args):
        e, b = Emitter(context, builder), builder
        x, start, rows, row, count = e.arguments(signature, args)
        at = x.start + start * 4, _row(rows, row)
        full, left = count // LANES, count % LANES

        def whole(i: Int, sums: list[ir.Value]) -> list[ir.Value]:
            first, second = (e.load(row + i * (4 * LANES), vector(F32)) for row in at)
            return [e.fma(first, second, sums[0])]

        def rest() -> list[ir.Value]:
            first, second = (e.load_some(row + full * (4 * LANES), left, constant(0.0)) for row in at)
            return [e.fma(first, second, sums[0])]

        sums = e.loop(full, [constant(0.0)], whole)
        total = e.reduce(e.when(left > 0, sums, rest)[0], e.add, 1)
        return b.extract_element(total, I32(0))

    return signature, generate


@intrinsic
def prefetch_row(typing, x, start, count):
    """Ask for x[start : start + count], of a flat x."""
    signature = types.void(x, types.intp, types.intp)

    def generate(context, builder, signature, args):
        e = Emitter(context, builder)
        x, start, count = e.arguments(signature, args)
        first = x.start + start * 4

        def line(i: Int, _: list[ir.Value]) -> list[ir.Value]:
            e.prefetch(first + i * 64)
            return []

        e.loop((count * 4 + 63) // 64, [], line)
        return context.get_dummy_value()

    return signature, generate
