"""The storage, and views of new tokens, as the kernels see them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from kvnumba.backends.cpu.jit import Static, plain, static
from kvnumba.backends.cpu.registered import address_of
from kvnumba.backends.cpu.transforms import Transform, transform_of
from kvnumba.storage import Buffers, Encoded, Layout, RowLayout, allocate_on_host

ALIGNMENT = 64  # bytes of a cache line: a vector that straddles two is read twice
OVERREAD = 16  # rows past the last that kernels may read (and never use)


class Rows(NamedTuple):
    """Stored rows: each the elements of one token and head, of the keys or of the values.

    Attributes
    ----------
    codes : (N, bytes of a row) uint8
    scale, zero : (N, groups) float32, or the bits of float16 as uint16
        No groups where the format has none.
    fmt : int
        `Format.number`.
    head_dim : int
        Elements of a row.
    functions : int
        What `registered.address_of` returns.
    """

    codes: Any
    scale: Any
    zero: Any
    fmt: int
    head_dim: int
    functions: int = 0


class Storage(NamedTuple):
    """A layer's keys and values: row (block * H + head) * block_size + offset, in blocks from `first_block` on."""

    keys: Rows
    values: Rows
    transform: Transform
    first_block: int
    block_size: int
    num_heads: int


def as_rows(encoded: Encoded, rows: RowLayout, scale_dtype: str) -> Rows:
    """The same memory as the kernels see it; `scale_dtype` is that of their `Static`."""
    codes = encoded.codes
    count = math.prod(codes.shape[:-1])
    bits = np.uint16 if scale_dtype == "float16" else np.float32  # Numba has no float16 arrays

    def scales(x: np.ndarray) -> np.ndarray:
        return x.view(bits).reshape(count, x.shape[-1]) if x.shape[-1] else np.empty((count, 0), bits)

    flat = codes.view(np.uint8).reshape(count, codes.shape[-1] * codes.itemsize)
    numbers = rows.fmt.number, rows.head_dim, address_of(rows.fmt)
    return Rows(flat, scales(encoded.scale), scales(encoded.zero), *numbers)


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any], spare_bytes: int = 0) -> np.ndarray:
    """Zeros that begin at a cache line."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + spare_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def aligned_rows(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeroed rows, with memory behind them for kernels that read whole tiles."""
    return aligned_zeros(shape, dtype, OVERREAD * shape[-1] * dtype.itemsize + 2 * ALIGNMENT)


@dataclass(frozen=True)
class CpuBuffers(Buffers):
    """Host buffers, and the same memory as the kernels see it.

    Attributes
    ----------
    static : Static
        Of the kernels that meet these buffers.
    layers : list of Storage
    """

    static: Static
    layers: list[Storage]


def allocate(layout: Layout) -> CpuBuffers:
    """Zeroed storage."""
    host = allocate_on_host(layout, aligned_rows)
    scale_dtype = layout.keys.scale_dtype.name  # the values' too, whether or not they have scales
    keys, values = (
        as_rows(encoded, rows, scale_dtype)
        for encoded, rows in ((host.keys, layout.keys), (host.values, layout.values))
    )
    layers = [
        Storage(
            keys,
            values,
            transform_of(layout, layer),
            layer * layout.num_blocks,
            layout.block_size,
            layout.num_kv_heads,
        )
        for layer in range(layout.num_layers)
    ]
    return CpuBuffers(layout, host.keys, host.values, static(scale_dtype), layers)


@plain
def find_row(blocks, key, first_block, block_size, num_heads, head):
    """The row of the storage where a key of a sequence lies."""
    block = first_block + blocks[key // block_size]
    return (block * num_heads + head) * block_size + key % block_size


@plain
def offset_of(x, token, head):
    """Where a token's head lies in the memory of a float32 view (B, n, heads, ...), in elements from the first."""
    per_batch = x.shape[1]
    strides = x.strides
    offset = token // per_batch * strides[0] + token % per_batch * strides[1] + head * strides[2]
    return offset >> 2  # bytes to elements; a division by `itemsize`, which is read from memory, takes 5 ns


@intrinsic
def memory_of(typing, x):
    """The memory of a view from its first element on, as a vector; its length is not known."""
    flat = types.Array(x.dtype, 1, "C")

    def generate(context, builder, signature, args):
        view = context.make_array(x)(context, builder, args[0])
        vector = context.make_array(flat)(context, builder)
        item = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(x.dtype)))
        context.populate_array(
            vector, data=view.data, shape=[view.nitems], strides=[item], itemsize=item, meminfo=None
        )
        return vector._getvalue()

    return flat(x), generate
