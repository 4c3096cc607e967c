"""The storage of a cache in device memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvnumba.backends.cuda.intrinsics import width_of
from kvnumba.backends.cuda.jit import THREADS
from kvnumba.backends.cuda.memory import DeviceArray, Memory, enter
from kvnumba.formats import SCALE_DTYPE, Format
from kvnumba.storage import Buffers, Encoded, Layout

ALIGNMENT = 16  # bytes that a thread reads at once
OVERREAD = 16  # rows past the last that kernels may read (and never use)


@dataclass(frozen=True)
class CudaBuffers(Buffers):
    """Arrays on the device, and the same memory as the kernels see it.

    A KV head's part of a block is a slab: the keys' codes, then scale and zero point of each of their rows in turn,
    then the same of the values. What is read together lies together.

    Attributes
    ----------
    addresses : tuple of tuple of int
        Where in a layer's first slab its six parts begin.
    slab_bytes : int
        From one slab to the next.
    """

    addresses: tuple[tuple[int, ...], ...]
    slab_bytes: int

    @property
    def block_bytes(self) -> int:
        """Of a block of a layer, whose slabs lie together."""
        return self.layout.num_kv_heads * self.slab_bytes

    @property
    def layer_bytes(self) -> int:
        """From one layer to the next."""
        return self.layout.num_blocks * self.block_bytes

    def address(self, layer: int, block: int) -> int:
        """Where a block of a layer begins."""
        return self.addresses[layer][0] + block * self.block_bytes

    def on_host(self, blocks: np.ndarray) -> tuple[np.ndarray, tuple[Encoded, Encoded]]:
        """Room for the bytes (num_layers, N, block_bytes) of blocks, and their parts as views of it."""
        layout = self.layout
        raw = np.empty((layout.num_layers, max(len(blocks), 1), self.block_bytes), np.uint8)
        strides = (raw.strides[0], self.block_bytes, self.slab_bytes)
        offsets = iter(at - self.addresses[0][0] for at in self.addresses[0])

        def part(like: DeviceArray) -> np.ndarray:
            shape = (*raw.shape[:2], *like.shape[2:])
            whole = np.ndarray(shape, like.dtype, raw, next(offsets), (*strides, *like.strides[3:]))
            return whole[:, : len(blocks)]

        keys, values = (Encoded(*(part(like) for like in kept)) for kept in (self.keys, self.values))
        return raw, (keys, values)


def allocate(layout: Layout) -> CudaBuffers:
    """Zeroed storage; MemoryError where there is no room for it."""
    most = THREADS * width_of(layout.head_dim, layout.group_size)
    if layout.head_dim > most:
        raise ValueError(f"head_dim: expected at most {most} on the cuda backend; got {layout.head_dim}")
    enter()

    formats = (layout.key_format, layout.value_format)
    row = [fmt.row_length(layout.head_dim) * fmt.code_dtype.itemsize for fmt in formats]
    scale = [fmt.scales_per_row(layout.head_dim, layout.group_size) * SCALE_DTYPE.itemsize for fmt in formats]
    # of a slab: the keys' codes, their scales and zero points in turn, the same of the values
    sizes = [layout.block_size * n for n in (row[0], 2 * scale[0], row[1], 2 * scale[1])]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    slab_bytes = starts.pop()
    offsets = [starts[0], starts[1], starts[1] + 4, starts[2], starts[3], starts[3] + 4]
    block_bytes = layout.num_kv_heads * slab_bytes
    layer_bytes = layout.num_blocks * block_bytes
    storage = Memory(layout.num_layers * layer_bytes + OVERREAD * max(row), zeros=True)

    def part(n: int, shape: tuple[int, ...], dtype: np.dtype[Any], element_bytes: int) -> DeviceArray:
        strides = (layer_bytes, block_bytes, slab_bytes, shape[-1] * element_bytes, element_bytes)
        return DeviceArray(storage, offsets[n], shape, strides, dtype)

    def encoded(n: int, fmt: Format) -> Encoded:
        shape = layout.scales_shape(fmt)
        return Encoded(
            part(n, layout.codes_shape(fmt), fmt.code_dtype, fmt.code_dtype.itemsize),
            part(n + 1, shape, SCALE_DTYPE, 2 * SCALE_DTYPE.itemsize),
            part(n + 2, shape, SCALE_DTYPE, 2 * SCALE_DTYPE.itemsize),
        )

    addresses = tuple(
        tuple(storage.address + layer * layer_bytes + offset for offset in offsets)
        for layer in range(layout.num_layers)
    )
    return CudaBuffers(layout, encoded(0, formats[0]), encoded(3, formats[1]), addresses, slab_bytes)
