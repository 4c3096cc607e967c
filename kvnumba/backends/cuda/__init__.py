"""NVIDIA GPUs through numba-CUDA: this file prepares addresses and numbers, the kernels beside it do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvnumba.arrays import DeviceView, contiguous_strides
from kvnumba.backends.cuda import attend, memory
from kvnumba.backends.cuda.copy import copy_kernel
from kvnumba.backends.cuda.intrinsics import width_of
from kvnumba.backends.cuda.jit import (
    SIMULATED,
    THREADS,
    WARP,
    Kernel,
    device_name,
    device_number,
    num_multiprocessors,
    why_unavailable,
)
from kvnumba.backends.cuda.memory import Pool
from kvnumba.backends.cuda.plan import AttentionPlan, Family, Launch
from kvnumba.backends.cuda.read import read_kernel
from kvnumba.backends.cuda.storage import CudaBuffers, allocate
from kvnumba.backends.cuda.tables import Tables
from kvnumba.backends.cuda.write import write_kernel
from kvnumba.errors import BackendUnavailable
from kvnumba.formats import FORMATS, SCALE_DTYPE, Format
from kvnumba.storage import Batch, Encoded, Layout, Scoring, empty_rows

if not SIMULATED:
    from kvnumba.backends.cuda import decode, prefill

WIDEST = 2**31 - 1  # window that an int32 holds, and no sequence fills
BLOCKS_PER_SM = 1 if SIMULATED else 16


class _Call:
    """What one call takes from the pool of memory comes back when this is gone."""


class Prepared(NamedTuple):
    """A kernel of attention, its grid, its blocks' bytes of shared memory, and what they work on."""

    kernel: Kernel
    grid: tuple[int, int]
    shared_bytes: int
    launch: Launch


class CudaBackend:
    """Kernels compiled when first used, for the device that is Numba's current one when the backend is made."""

    name = "cuda"
    simulated = SIMULATED

    def __init__(self) -> None:
        reason = why_unavailable()
        if reason:
            raise BackendUnavailable(reason)
        self.device = device_number()
        self._pool = Pool()

    def allocate(self, layout: Layout) -> CudaBuffers:
        return allocate(layout)

    def memory_bytes(self) -> int:
        return memory.free_bytes()

    def encode(self, x: np.ndarray, fmt: Format, group_size: int) -> Encoded:
        count, head_dim = x.shape
        rows = empty_rows(count, head_dim, fmt, group_size)
        if x.size:
            memory.enter()
            call = _Call()
            given = self._on_device(call, x[None, :, None], 0)
            codes = self._pool.take(call, rows.codes.nbytes, 0)
            pairs = self._pool.take(call, 2 * rows.scale.nbytes, 0)
            parts = (codes, pairs, pairs + 4)
            # the rows are the tokens of a sequence in one block; with their own addresses twice, as keys and as values
            layout = Layout(1, 1, count, 1, head_dim, fmt, fmt, group_size)
            batch = Batch.of(np.zeros((1, 1), np.int32), np.array([count], np.int32), [count], count)
            self._write(layout, (*parts, *parts), 0, given, given, Tables(batch), 0)
            memory.download(rows.codes, codes, 0)
            scales = np.empty((*rows.scale.shape, 2), SCALE_DTYPE)
            memory.download(scales, pairs, 0)
            rows.scale[...], rows.zero[...] = scales[..., 0], scales[..., 1]
        return rows

    def decode(self, rows: Encoded, fmt: Format) -> np.ndarray:
        count = len(rows.codes)
        head_dim = rows.codes.shape[1] * rows.codes.itemsize * 8 // fmt.bits
        group_size = head_dim // rows.scale.shape[1] if fmt.quantized else head_dim
        out = np.empty((1, 1, count, head_dim), np.float32)
        if out.size:
            memory.enter()
            call = _Call()
            codes = self._pool.put(call, rows.codes, 0)
            pairs = self._pool.put(call, np.stack((rows.scale, rows.zero), axis=-1), 0)
            parts = (codes, pairs, pairs + 4)
            layout = Layout(1, 1, count, 1, head_dim, fmt, fmt, group_size)
            self._read(layout, fmt, parts, 0, self._pool.put(call, np.zeros(1, np.int32), 0), 1, out)
        return out[0, 0]

    def place(self, batch: Batch) -> Tables:
        return Tables(batch)

    def write(self, buffers: CudaBuffers, layer: int, k: Any, v: Any, placed: Tables) -> None:
        memory.enter()
        call = _Call()
        stream = k.stream if isinstance(k, DeviceView) else 0
        keys, values = self._on_device(call, k, stream), self._on_device(call, v, stream)
        self._write(
            buffers.layout, buffers.addresses[layer], buffers.slab_bytes, keys, values, placed, stream
        )

    def _write(
        self,
        layout: Layout,
        addresses: tuple[int, ...],
        slab_bytes: int,
        keys: DeviceView,
        values: DeviceView,
        tables: Tables,
        stream: int,
    ) -> None:
        kernel = _write_kernel(layout, keys, values)
        num_tokens = tables.num_tokens
        kernel.launch(
            (_blocks(num_tokens * layout.num_kv_heads), 2),
            0,
            stream,
            tables.address(self._pool, stream),
            keys.address,
            values.address,
            *addresses,
            *_row_strides(keys),
            *_row_strides(values),
            slab_bytes,
            keys.shape[1],
            num_tokens,
            tables.num_seqs,
            tables.max_blocks,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
            layout.group_size,
        )

    def read(
        self, buffers: CudaBuffers, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        layout, addresses = buffers.layout, buffers.addresses[layer]
        shape = (len(block_table), layout.num_kv_heads, length, layout.head_dim)
        k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
        if k.size:
            memory.enter()
            memory.synchronize()  # the last write may have been on any stream
            call = _Call()
            blocks, width = self._pool.put(call, block_table, 0), block_table.shape[1]
            self._read(layout, layout.key_format, addresses[:3], buffers.slab_bytes, blocks, width, k)
            self._read(layout, layout.value_format, addresses[3:], buffers.slab_bytes, blocks, width, v)
        return k, v

    def _read(
        self,
        layout: Layout,
        fmt: Format,
        parts: Sequence[int],
        slab_bytes: int,
        blocks: int,
        max_blocks: int,
        out: np.ndarray,
    ) -> None:
        call = _Call()
        result = self._pool.take(call, out.nbytes, 0)
        num_rows = out.size // layout.head_dim
        width = width_of(layout.group_size if fmt.quantized else layout.head_dim)
        read_kernel(fmt.name, width).launch(
            (_blocks(num_rows), 1),
            0,
            0,
            blocks,
            *parts,
            result,
            slab_bytes,
            num_rows,
            out.shape[2],
            max_blocks,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
            layout.group_size,
        )
        memory.download(out, result, 0)

    def copy_blocks(self, buffers: CudaBuffers, pairs: np.ndarray) -> None:
        if not len(pairs):
            return
        memory.enter()
        memory.synchronize()  # what is copied may have been written on any stream, and will be read on any
        call = _Call()
        copy_kernel().launch(
            (len(pairs) * buffers.layout.num_layers, 1),
            0,
            0,
            self._pool.put(call, pairs.astype(np.int32), 0),
            buffers.address(0, 0),
            buffers.layer_bytes,
            buffers.block_bytes,
            len(pairs),
        )
        memory.synchronize()

    def read_blocks(self, buffers: CudaBuffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        memory.enter()
        memory.synchronize()
        raw, parts = buffers.on_host(blocks)
        for layer in range(len(raw)):
            for n, block in enumerate(blocks.tolist()):
                memory.download(raw[layer, n], buffers.address(layer, block), 0)
        return parts

    def write_blocks(self, buffers: CudaBuffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        memory.enter()
        raw, parts = buffers.on_host(blocks)
        for kept, new in zip((*parts[0], *parts[1]), (*keys, *values), strict=True):
            kept[...] = new
        for layer in range(len(raw)):
            for n, block in enumerate(blocks.tolist()):
                memory.upload(buffers.address(layer, block), raw[layer, n], 0)
        memory.synchronize()

    def plan(self, layout: Layout, placed: Tables, num_qo_heads: int, window_left: int) -> AttentionPlan:
        group = num_qo_heads // layout.num_kv_heads
        return AttentionPlan(placed, layout.num_kv_heads, group, layout.head_dim, window_left)

    def prepare(self, buffers: CudaBuffers, q: Any, plan: AttentionPlan, scoring: Scoring) -> None:
        memory.enter()
        layout = buffers.layout
        query = self._on_device(plan, q, 0)
        for x in (scoring.sinks, scoring.alibi_slopes):
            plan.per_head(x, self._pool, query.stream)
        plan.tables.address(self._pool, query.stream)
        _write_kernel(layout, query, query).compile()
        for kernel, *_ in self._prepared(layout, query, plan, scoring):
            kernel.compile()
        memory.synchronize()  # the calls may be on another stream

    def attend(
        self,
        buffers: CudaBuffers,
        layer: int,
        q: Any,
        plan: AttentionPlan,
        scoring: Scoring,
        out: Any,
        lse: Any,
    ) -> None:
        memory.enter()
        call = _Call()
        stream = q.stream if isinstance(q, DeviceView) else 0
        query, result, result_lse = q, out, lse
        if not isinstance(q, DeviceView):
            query = self._on_device(call, q, 0)
            result, result_lse = self._room(call, out), self._room(call, lse)
        layout, tables = buffers.layout, plan.tables
        sinks = plan.per_head(scoring.sinks, self._pool, stream)
        slopes = plan.per_head(scoring.alibi_slopes, self._pool, stream)
        for kernel, grid, shared_bytes, launch in self._prepared(layout, query, plan, scoring):
            kernel.launch(
                grid,
                shared_bytes,
                stream,
                tables.address(self._pool, stream),
                launch.pieces,
                query.address,
                result.address,
                result_lse.address,
                *buffers.addresses[layer],
                sinks,
                slopes,
                launch.partials,
                launch.counters,
                *_row_strides(query),
                *_row_strides(result),
                buffers.slab_bytes,
                query.shape[1],
                tables.num_seqs,
                tables.max_blocks,
                layout.block_size,
                layout.num_kv_heads,
                plan.group,
                launch.heads,
                layout.head_dim,
                layout.group_size,
                min(scoring.window_left, WIDEST),
                float(scoring.sm_scale),
                float(scoring.logits_soft_cap),
            )
        if query is not q:
            self._fetch(out, result)
            self._fetch(lse, result_lse)

    def _prepared(
        self, layout: Layout, query: DeviceView, plan: AttentionPlan, scoring: Scoring
    ) -> list[Prepared]:
        """The kernels that serve a batch, each for some of its sequences."""
        extras = scoring.logits_soft_cap > 0 or scoring.alibi_slopes is not None
        alignment = width_of(layout.head_dim, *_alignment(query), most=8)
        key = (query.dtype, alignment, extras)
        if key not in plan.prepared:
            plan.prepared[key] = self._choose(layout, plan, *key, query.stream)
        return plan.prepared[key]

    def _choose(
        self, layout: Layout, plan: AttentionPlan, kind: str, alignment: int, extras: bool, stream: int
    ) -> list[Prepared]:
        key_format, value_format = layout.key_format, layout.value_format
        prepared = []
        for family, sequences in _shares(layout, plan, kind, alignment):
            launch = plan.launch(family, sequences, self._pool, stream)
            if family.name == "attend":
                sizes = [layout.group_size for fmt in (key_format, value_format) if fmt.quantized]
                width = width_of(alignment, *sizes)
                kernel = attend.attend_kernel(family.rows, width, kind, key_format.name, value_format.name)
                shared_bytes = attend.shared_bytes(family.rows, layout.head_dim)
            else:
                decoding = family.name == "decode"
                make = decode.decode_kernel if decoding else prefill.prefill_kernel
                kernel = make(kind, key_format.name, value_format.name, layout.head_dim, extras)
                shared_bytes = decode.shared_bytes(layout.head_dim) if decoding else 0
            grid = (launch.num_pieces, layout.num_kv_heads * -(-plan.group // launch.heads))
            prepared.append(Prepared(kernel, grid, shared_bytes, launch))
        return prepared

    def _on_device(self, call: object, x: Any, stream: int) -> DeviceView:
        """A view (B, n, heads, D) as it lies on the device, or a copy of one that lies on the host."""
        if isinstance(x, DeviceView):
            return x
        x = np.ascontiguousarray(x, np.float32)
        address = self._pool.put(call, x, stream)
        return DeviceView(address, x.shape, contiguous_strides(x.shape), "float32", None, stream, self.device)

    def _room(self, call: _Call, x: np.ndarray) -> DeviceView:
        """Memory for the contents of a host array, in C order."""
        address = self._pool.take(call, x.nbytes, 0)
        return DeviceView(address, x.shape, contiguous_strides(x.shape), "float32", None, 0, self.device)

    def _fetch(self, x: np.ndarray, view: DeviceView) -> None:
        """Copy what `_room` made room for into the host array."""
        host = x if x.flags.c_contiguous else np.empty(x.shape, x.dtype)
        memory.download(host, view.address, 0)
        if host is not x:
            x[...] = host


def describe() -> list[tuple[str, str]]:
    """What `python -m kvnumba info` says of this backend: rows of a name and a value."""
    return [("device", device_name())]


def _shares(
    layout: Layout, plan: AttentionPlan, kind: str, alignment: int
) -> list[tuple[Family, np.ndarray]]:
    """Which kernels serve a batch, and the sequences of each."""
    new = plan.new_tokens
    everything = np.flatnonzero(new)
    if SIMULATED or not decode.serves(layout, plan.tables.max_blocks, kind, alignment):
        few = int(new.max()) * plan.group <= attend.FEW.rows
        return [(attend.FEW if few else attend.MANY, everything)]
    rows = new * plan.group
    long = rows > decode.FAMILY.rows
    blocks = int((-(-rows[long] // prefill.FAMILY.rows)).sum()) * layout.num_kv_heads
    if 2 * blocks < num_multiprocessors():  # short prompts: what splits ranges of keys has more to do at once
        return [(decode.FAMILY, everything)]
    shares = [(prefill.FAMILY, np.flatnonzero(long)), (decode.FAMILY, np.flatnonzero((new > 0) & ~long))]
    return [share for share in shares if len(share[1])]


def _write_kernel(layout: Layout, keys: DeviceView, values: DeviceView) -> Kernel:
    """The kernel that takes keys and values such as these."""
    formats = (layout.key_format, layout.value_format)
    sizes = [layout.group_size if fmt.quantized else layout.head_dim for fmt in formats]
    width = width_of(*sizes, *_alignment(keys), *_alignment(values))
    return write_kernel(keys.dtype, values.dtype, formats[0].name, formats[1].name, width)


def _blocks(num_rows: int) -> int:
    """Blocks for so many rows, each the work of a warp; no more than keep the device busy."""
    return min(-(-num_rows * WARP // THREADS), num_multiprocessors() * BLOCKS_PER_SM)


def _row_strides(x: DeviceView) -> tuple[int, int, int]:
    """Of the batch, the tokens and the heads of a view (B, n, heads, ...), in elements."""
    return x.strides[0], x.strides[1], x.strides[2]


def _alignment(x: DeviceView) -> tuple[int, ...]:
    """Numbers of elements whose greatest common divisor may be read together from where each row begins."""
    if SIMULATED:  # which reads any number from anywhere
        return ()
    itemsize = FORMATS[x.dtype].bits // 8
    return x.address // itemsize, x.strides[0], x.strides[1], x.strides[2]
