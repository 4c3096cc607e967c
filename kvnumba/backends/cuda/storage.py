"""The storage of a cache in device memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvnumba.backends.cuda.codecs import codec_of
from kvnumba.backends.cuda.intrinsics import width_of
from kvnumba.backends.cuda.jit import THREADS
from kvnumba.backends.cuda.memory import DeviceArray, Memory, enter
from kvnumba.backends.cuda.registered import functions_of
from kvnumba.storage import Buffers, Encoded, Layout, RowLayout
from kvnumba.transforms import RowTransform

ALIGNMENT = 16  # bytes that a thread reads at once
OVERREAD = 16  # rows past the last that kernels may read (and never use)


@dataclass(frozen=True, eq=False)
class CudaBuffers(Buffers):
    """Arrays on the device, and the same memory as the kernels see it.

    What a block holds of a KV head is a slab: the keys' codes, then scale and zero of each of their groups in
    turn, then the same of the values. What is read together lies together.

    Attributes
    ----------
    addresses : tuple of tuple of int
        Of each layer: where in its first slab the keys' codes, their scales, the values' codes and their scales begin;
        then where the shifts and the scales of the keys' channels (H, D) float32 are. 0: there are none.
    slab_bytes : int
        From one slab to the next.
    channels : DeviceArray, optional
        The shifts and scales of the keys' channels (num_layers, 2, H, D).
    """

    addresses: tuple[tuple[int, ...], ...]
    slab_bytes: int
    channels: DeviceArray | None

    # by identity: calls find what they have prepared by the buffers
    __eq__ = object.__eq__
    __hash__ = object.__hash__

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
        """Room for the bytes (num_layers, N, block_bytes) of blocks, and its arrays as views of it."""
        raw = np.empty((self.layout.num_layers, max(len(blocks), 1), self.block_bytes), np.uint8)
        strides = (raw.strides[0], self.block_bytes, self.slab_bytes)
        begin = self.addresses[0][0]

        def view(like: DeviceArray) -> np.ndarray:
            shape = (*raw.shape[:2], *like.shape[2:])
            if not like.size:  # scales that a format has not: they may begin where the bytes end
                return np.empty(shape, like.dtype)[:, : len(blocks)]
            whole = np.ndarray(shape, like.dtype, raw, like.address - begin, (*strides, *like.strides[3:]))
            return whole[:, : len(blocks)]

        keys, values = (Encoded(*(view(like) for like in kept)) for kept in (self.keys, self.values))
        return raw, (keys, values)


def allocate(layout: Layout) -> CudaBuffers:
    """Zeroed storage; MemoryError where there is no room for it."""
    for name, rows in (("head_dim", layout.keys), ("value_head_dim", layout.values)):
        most = THREADS * width_of(rows.head_dim, rows.group_size)
        if rows.head_dim > most:
            raise ValueError(f"{name}: expected at most {most} on the cuda backend; got {rows.head_dim}")
        if rows.fmt.codec is not None:
            functions_of(rows.fmt.codec)  # which fails if they do not compile
    enter()

    # of a slab: the keys' codes, their scales and zeros in turn, the same of the values
    starts = [0]
    for rows in (layout.keys, layout.values):
        for row_bytes in (
            rows.row_length * rows.fmt.code_dtype.itemsize,
            rows.num_groups * codec_of(rows).pair_bytes,
        ):
            starts.append(starts[-1] + -(-layout.block_size * row_bytes // ALIGNMENT) * ALIGNMENT)
    slab_bytes = starts.pop()
    block_bytes = layout.num_kv_heads * slab_bytes
    layer_bytes = layout.num_blocks * block_bytes
    longest = max(rows.row_length * rows.fmt.code_dtype.itemsize for rows in (layout.keys, layout.values))
    storage = Memory(layout.num_layers * layer_bytes + OVERREAD * longest, zeros=True)

    def encoded(rows: RowLayout, codes: int, scales: int) -> Encoded:
        scale_bytes, pair_bytes = codec_of(rows).scale_bytes, codec_of(rows).pair_bytes
        code_bytes = rows.fmt.code_dtype.itemsize
        places = iter(((codes, code_bytes), (scales, pair_bytes), (scales + scale_bytes, pair_bytes)))

        def array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
            offset, step = next(places)
            strides = (layer_bytes, block_bytes, slab_bytes, shape[-1] * step, step)
            return DeviceArray(storage, offset, shape, strides, dtype)

        return rows.parts(layout.blocks_shape, array)

    channels = None if layout.transform is None else _channels(layout.transform)
    addresses = tuple(
        (
            *(storage.address + layer * layer_bytes + start for start in starts),
            *((0, 0) if channels is None else (channels[layer][n].address for n in range(2))),
        )
        for layer in range(layout.num_layers)
    )
    keys, values = encoded(layout.keys, *starts[:2]), encoded(layout.values, *starts[2:])
    return CudaBuffers(layout, keys, values, addresses, slab_bytes, channels)


def _channels(transform: RowTransform) -> DeviceArray | None:
    """What `CudaBuffers.channels` is."""
    calibration = transform.calibration
    if calibration is None:
        return None
    return DeviceArray.of(np.stack((calibration.shifts, calibration.scales), axis=1).astype(np.float32))
