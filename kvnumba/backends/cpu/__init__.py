"""The CPU through Numba: this file prepares arrays and scalars, the kernels beside it do the work."""

from __future__ import annotations

import functools
import math
import os
import threading
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numba
import numpy as np

from kvnumba.backends.cpu import attend, copy, read, write
from kvnumba.backends.cpu.codecs import FORMAT_ID
from kvnumba.backends.cpu.jit import COMMON, launch, static
from kvnumba.backends.cpu.plan import Plan, plan_batch
from kvnumba.backends.cpu.queries import padded
from kvnumba.backends.cpu.simd import HAS_BFLOAT16_DOT, LANES, target_features
from kvnumba.formats import Format
from kvnumba.storage import (
    Batch,
    Buffers,
    Encoded,
    Layout,
    Scoring,
    allocate_on_host,
    empty_rows,
    host_memory_bytes,
    read_blocks_on_host,
    write_blocks_on_host,
)

# Numba's workqueue threading layer aborts the process when two threads enter kernels at once. Every kernel
# uses all cores, so one at a time loses nothing, and all share one scratch.
_ONE_AT_A_TIME = threading.Lock()

ALIGNMENT = 64  # bytes of a cache line: a vector that straddles two is read twice
OVERREAD = 16  # rows past the last that kernels may read (and never use)
SERIAL_VALUES = 65_536  # values that one thread converts before another has woken up

VECTOR_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512vnni",
    "avx512bf16",
    "neon",
    "dotprod",
    "bf16",
    "sve",
)

_NONE = np.empty(0, np.float32)


@dataclass(frozen=True)
class CpuBuffers(Buffers):
    """Host buffers, and the same memory as the kernels see it: rows of bytes, rows of scales."""

    key_rows: Encoded
    value_rows: Encoded


class CpuBackend:
    """Kernels compiled when first used, and kept on disk for the next process."""

    name = "cpu"
    simulated = False
    device: int | None = None

    def __init__(self) -> None:
        self._scratch: dict[str, np.ndarray] = {}
        self._counter = np.zeros(1, np.int64)

    def allocate(self, layout: Layout) -> CpuBuffers:
        host = allocate_on_host(layout, _storage)
        return CpuBuffers(layout, host.keys, host.values, _rows(host.keys), _rows(host.values))

    def memory_bytes(self) -> int:
        return host_memory_bytes()

    def encode(self, x: np.ndarray, fmt: Format, group_size: int) -> Encoded:
        count, head_dim = x.shape
        rows = empty_rows(count, head_dim, fmt, group_size)
        if x.size:
            flat = _writable(np.ascontiguousarray(x)).reshape(-1)
            with _ONE_AT_A_TIME:
                launch(
                    write.encode,
                    COMMON,
                    _workers(x.size),
                    (flat, head_dim, *_rows(rows), FORMAT_ID[fmt.name]),
                )
        return rows

    def decode(self, rows: Encoded, fmt: Format) -> np.ndarray:
        codes, scale, zero = (_writable(np.ascontiguousarray(part)) for part in rows)
        out = np.empty((len(codes), codes.shape[1] * codes.itemsize * 8 // fmt.bits), np.float32)
        if out.size:
            encoded = _rows(Encoded(codes, scale, zero))
            job = (out.shape[1], *encoded, FORMAT_ID[fmt.name], out.reshape(-1))
            with _ONE_AT_A_TIME:
                launch(read.decode, COMMON, _workers(out.size), job)
        return out

    def place(self, batch: Batch) -> Batch:
        return batch

    def write(self, buffers: CpuBuffers, layer: int, k: np.ndarray, v: np.ndarray, placed: Batch) -> None:
        layout = buffers.layout
        memory, strides = _flat(k, v)
        job = (
            *memory,
            strides,
            placed.slot_mapping,
            layer * layout.num_blocks,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
            *buffers.key_rows,
            FORMAT_ID[layout.key_format.name],
            *buffers.value_rows,
            FORMAT_ID[layout.value_format.name],
        )
        with _ONE_AT_A_TIME:
            launch(write.write, COMMON, _workers(k.size), job)

    def read(
        self, buffers: CpuBuffers, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        layout = buffers.layout
        shape = (len(block_table), layout.num_kv_heads, length, layout.head_dim)
        k, v = np.empty(shape, np.float32), np.empty(shape, np.float32)
        if k.size:
            for out, fmt, rows in (
                (k, layout.key_format, buffers.key_rows),
                (v, layout.value_format, buffers.value_rows),
            ):
                job = (
                    block_table,
                    layer * layout.num_blocks,
                    layout.block_size,
                    length,
                    layout.num_kv_heads,
                    layout.head_dim,
                    *rows,
                    FORMAT_ID[fmt.name],
                    out.reshape(-1),
                )
                with _ONE_AT_A_TIME:
                    launch(read.read, COMMON, _workers(k.size), job)
        return k, v

    def copy_blocks(self, buffers: CpuBuffers, pairs: np.ndarray) -> None:
        layout = buffers.layout
        blocks = layout.num_layers * layout.num_blocks
        parts = tuple(
            part.reshape(-1).view(np.uint8).reshape(blocks, -1) for part in (*buffers.keys, *buffers.values)
        )
        job = (pairs, layout.num_layers, layout.num_blocks, *parts)
        num_values = len(pairs) * layout.num_layers * sum(part.shape[1] for part in parts)
        with _ONE_AT_A_TIME:
            launch(copy.copy, COMMON, _workers(num_values), job)

    def read_blocks(self, buffers: CpuBuffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        return read_blocks_on_host(buffers, blocks)

    def write_blocks(self, buffers: CpuBuffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        write_blocks_on_host(buffers, blocks, keys, values)

    def plan(self, layout: Layout, placed: Batch, num_qo_heads: int, window_left: int) -> Plan:
        group = num_qo_heads // layout.num_kv_heads
        return plan_batch(
            placed, layout.num_kv_heads, group, layout.head_dim, window_left, numba.get_num_threads()
        )

    def prepare(self, buffers: CpuBuffers, q: np.ndarray, plan: Plan, scoring: Scoring) -> None:
        pass

    def attend(
        self,
        buffers: CpuBuffers,
        layer: int,
        q: np.ndarray,
        plan: Plan,
        scoring: Scoring,
        out: np.ndarray,
        lse: np.ndarray,
    ) -> None:
        layout = buffers.layout
        head_dim = layout.head_dim
        (query, result, result_lse), strides = _flat(q, out, lse)
        storage = (
            layer * layout.num_blocks,
            layout.block_size,
            layout.num_kv_heads,
            head_dim,
            padded(head_dim),
            *buffers.key_rows,
            FORMAT_ID[layout.key_format.name],
            *buffers.value_rows,
            FORMAT_ID[layout.value_format.name],
        )
        options = (
            np.float32(scoring.sm_scale),
            scoring.window_left,
            np.float32(scoring.logits_soft_cap),
            _NONE if scoring.sinks is None else _writable(scoring.sinks),
            _NONE if scoring.alibi_slopes is None else _writable(scoring.alibi_slopes),
            scoring.arithmetic == "bfloat16" and HAS_BFLOAT16_DOT,
        )
        with _ONE_AT_A_TIME:
            partials = self._space(
                "partials", (plan.num_partials, plan.partial_rows, head_dim + 1), np.float32
            )
            for rows, pieces in plan.pieces:
                num_floats, num_runs = attend.scratch_sizes(rows, head_dim)
                self._counter[0] = 0
                job = (
                    self._counter,
                    query,
                    result,
                    result_lse,
                    strides,
                    plan.block_table,
                    plan.seq_lens,
                    plan.query_start_loc,
                    pieces,
                    partials,
                    self._space("floats", (plan.workers, num_floats), np.float32),
                    self._space("positions", (plan.workers, max(rows, LANES)), np.int32),
                    self._space("runs", (plan.workers, num_runs, 4), np.int64),
                    *storage,
                    *options,
                )
                launch(attend.attend, static(rows), plan.workers, job)
            if plan.num_partials:
                parts = (result, result_lse, strides, plan.merges, partials, head_dim)
                launch(attend.merge, COMMON, plan.workers, parts)

    def _space(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Scratch that is kept between calls: fresh memory costs a page fault every 4 KiB."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = _aligned_zeros((size,), np.dtype(dtype), spare_bytes=0)
        return self._scratch[name][:size].reshape(shape)


def describe() -> list[tuple[str, str]]:
    """What `python -m kvnumba info` says of this backend: rows of a name and a value."""
    num_threads = numba.get_num_threads()  # starts the threading layer, which is known from then on
    features = target_features()
    vectors = [name for name in VECTOR_FEATURES if features.get(name)]
    return [
        ("threads", f"{num_threads} of {os.cpu_count()} processors"),
        ("threading layer", numba.threading_layer()),
        (
            "processor",
            f"{llvmlite.binding.get_host_cpu_name()}: {' '.join(vectors) or 'no vector extensions known'}",
        ),
    ]


def _workers(num_values: int) -> int:
    """Threads that converting so many values is worth."""
    return 1 if num_values <= SERIAL_VALUES else numba.get_num_threads()


def _storage(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeroed rows, with memory behind them for kernels that read whole tiles."""
    return _aligned_zeros(shape, dtype, OVERREAD * shape[-1] * dtype.itemsize + 2 * ALIGNMENT)


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any], spare_bytes: int) -> np.ndarray:
    """Zeros that begin at a cache line."""
    count = math.prod(shape)
    memory = np.zeros(count * dtype.itemsize + spare_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def _rows(encoded: Encoded) -> Encoded:
    """The same memory as two-dimensional rows, codes as bytes."""
    codes, scale, zero = encoded
    rows = codes.size // codes.shape[-1]
    return Encoded(
        codes.view(np.uint8).reshape(rows, -1),
        scale.reshape(rows, scale.shape[-1]),
        zero.reshape(rows, zero.shape[-1]),
    )


def _flat(*views: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The memory of views (B, n, heads, ...) as vectors, and their (n, batch, token, head stride) in elements.

    Memory in the order of the axes, or with n and heads swapped, is taken as it lies; any other is copied.
    """
    memory, kinds = [], []
    for x in views:
        in_order = x.flags.c_contiguous
        memory.append(_writable(x if in_order else np.ascontiguousarray(x.swapaxes(1, 2))).reshape(-1))
        kinds.append((x.shape, in_order))
    return memory, _strides(*kinds)


@functools.lru_cache(1024)
def _strides(*kinds: tuple[tuple[int, ...], bool]) -> np.ndarray:
    """Of views by their shapes and whether their memory is in the order of their axes."""
    rows = []
    for (_, count, heads, *rest), in_order in kinds:
        row = math.prod(rest)
        token_and_head = (heads * row, row) if in_order else (row, count * row)
        rows.append((count, count * heads * row, *token_and_head))
    return np.array(rows, np.int64)


def _writable(x: Any) -> Any:
    """x, or a copy of one that is read-only: to Numba that would be another type, and another compilation."""
    return x if x.flags.writeable else x.copy()
