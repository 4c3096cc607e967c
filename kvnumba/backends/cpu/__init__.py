"""The CPU through Numba: this file prepares arrays and scalars, the kernels beside it do the work."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import numba
import numpy as np

from kvnumba.backends.cpu import attend, read, write
from kvnumba.backends.cpu.rows import FORMAT_ID
from kvnumba.formats import FORMATS, SCALE_DTYPE, Format
from kvnumba.storage import Batch, Buffers, Encoded, Layout, Scoring, allocate_on_host

# Numba's workqueue threading layer aborts the process when two threads enter kernels at once. Every kernel
# uses all cores, so one at a time loses nothing.
_ONE_AT_A_TIME = threading.Lock()

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

    def allocate(self, layout: Layout) -> CpuBuffers:
        host = allocate_on_host(layout)
        return CpuBuffers(layout, host.keys, host.values, _rows(host.keys), _rows(host.values))

    def encode(self, x: np.ndarray, fmt: Format, group_size: int) -> Encoded:
        count, head_dim = x.shape
        groups = fmt.scales_per_row(head_dim, group_size)
        rows = Encoded(
            np.empty((count, fmt.row_length(head_dim)), fmt.code_dtype),
            np.empty((count, groups), SCALE_DTYPE),
            np.empty((count, groups), SCALE_DTYPE),
        )
        if x.size:
            with _ONE_AT_A_TIME:
                write.encode(_writable(np.ascontiguousarray(x)), FORMAT_ID[fmt.name], *_rows(rows))
        return rows

    def decode(self, rows: Encoded, fmt: Format) -> np.ndarray:
        codes, scale, zero = (_writable(np.ascontiguousarray(part)) for part in rows)
        out = np.empty((len(codes), codes.shape[1] * codes.itemsize * 8 // fmt.bits), np.float32)
        if out.size:
            with _ONE_AT_A_TIME:
                read.decode(*_rows(Encoded(codes, scale, zero)), FORMAT_ID[fmt.name], out)
        return out

    def write(
        self, buffers: CpuBuffers, layer: int, k: np.ndarray, v: np.ndarray, slot_mapping: np.ndarray
    ) -> None:
        layout = buffers.layout
        for x, fmt, rows in (
            (k, layout.key_format, buffers.key_rows),
            (v, layout.value_format, buffers.value_rows),
        ):
            memory, strides = _flat(x)
            with _ONE_AT_A_TIME:
                write.write(
                    memory,
                    strides,
                    slot_mapping,
                    layer * layout.num_blocks,
                    layout.block_size,
                    layout.num_kv_heads,
                    layout.head_dim,
                    FORMAT_ID[fmt.name],
                    *rows,
                )

    def read(
        self, buffers: CpuBuffers, layer: int, block_ids: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        layout = buffers.layout
        k, v = (np.empty((layout.num_kv_heads, length, layout.head_dim), np.float32) for _ in range(2))
        for out, fmt, rows in (
            (k, layout.key_format, buffers.key_rows),
            (v, layout.value_format, buffers.value_rows),
        ):
            first_block = layer * layout.num_blocks
            with _ONE_AT_A_TIME:
                read.read(*rows, FORMAT_ID[fmt.name], block_ids, first_block, layout.block_size, out)
        return k, v

    def plan(self, layout: Layout, batch: Batch, num_qo_heads: int, window_left: int) -> attend.Plan:
        group = num_qo_heads // layout.num_kv_heads
        return attend.plan(
            batch, layout.num_kv_heads, group, layout.head_dim, window_left, numba.get_num_threads()
        )

    def attend(
        self,
        buffers: CpuBuffers,
        layer: int,
        q: np.ndarray,
        plan: attend.Plan,
        scoring: Scoring,
        out: np.ndarray,
        lse: np.ndarray,
    ) -> None:
        layout = buffers.layout
        group = q.shape[2] // layout.num_kv_heads
        out_memory, out_strides = _flat(out)
        lse_memory, lse_strides = _flat(lse)
        with _ONE_AT_A_TIME:
            attend.attend(
                *_flat(q),
                out_memory,
                out_strides,
                lse_memory,
                lse_strides,
                plan.block_table,
                plan.seq_lens,
                plan.query_start_loc,
                plan.work,
                plan.worker_start,
                plan.scratch,
                plan.partials,
                layer * layout.num_blocks,
                layout.block_size,
                layout.num_kv_heads,
                group,
                layout.head_dim,
                *buffers.key_rows,
                FORMAT_ID[layout.key_format.name],
                *buffers.value_rows,
                FORMAT_ID[layout.value_format.name],
                np.float32(scoring.sm_scale),
                (scoring.window_left, np.float32(scoring.logits_soft_cap)),
                _NONE if scoring.sinks is None else _writable(scoring.sinks),
                _NONE if scoring.alibi_slopes is None else _writable(scoring.alibi_slopes),
            )
            if len(plan.merges):
                attend.merge(
                    out_memory, out_strides, lse_memory, lse_strides, plan.merges, plan.partials, group
                )


def describe() -> list[tuple[str, str]]:
    """What `python -m kvnumba info` says of this backend: rows of a name and a value."""
    x = np.zeros((1, 2), np.float32)
    CpuBackend().encode(x, FORMATS["float32"], 2)  # the threading layer is known once a kernel has run
    features = llvmlite.binding.get_host_cpu_features()
    vectors = [name for name in VECTOR_FEATURES if features.get(name)]
    return [
        ("threads", f"{numba.get_num_threads()} of {os.cpu_count()} processors"),
        ("threading layer", numba.threading_layer()),
        (
            "processor",
            f"{llvmlite.binding.get_host_cpu_name()}: {' '.join(vectors) or 'no vector extensions known'}",
        ),
    ]


def _rows(encoded: Encoded) -> Encoded:
    """The same memory as two-dimensional rows, codes as bytes."""
    codes, scale, zero = encoded
    rows = codes.size // codes.shape[-1]
    return Encoded(
        codes.view(np.uint8).reshape(rows, -1),
        scale.reshape(rows, scale.shape[-1]),
        zero.reshape(rows, zero.shape[-1]),
    )


def _flat(x: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The memory of a view (B, n, heads, ...) as a vector, and (n, batch, token, head stride) in elements.

    Memory in the order of the axes, or with n and heads swapped, is taken as it lies; any other is copied.
    """
    _, count, heads = x.shape[:3]
    row = x.shape[3] if x.ndim == 4 else 1
    if x.flags.c_contiguous:
        memory, strides = x, (count * heads * row, heads * row, row)
    else:
        memory, strides = np.ascontiguousarray(x.swapaxes(1, 2)), (heads * count * row, row, count * row)
    return _writable(memory).reshape(-1), (count, *strides)


def _writable(x: Any) -> Any:
    """x, or a copy of one that is read-only: to Numba that would be another type, and another compilation."""
    return x if x.flags.writeable else x.copy()
