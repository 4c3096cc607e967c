"""The CPU through Numba: this file prepares arrays and scalars, the kernels beside it do the work."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Sequence
from typing import Any, cast

import llvmlite.binding
import numba
import numpy as np

from kvnumba.backends.cpu import attend as attention
from kvnumba.backends.cpu import ceilings, copy, many, read, tiles, write
from kvnumba.backends.cpu.jit import COMMON, launch, static
from kvnumba.backends.cpu.mods import modification
from kvnumba.backends.cpu.plan import Plan, Round, plan_parts, rounds_of
from kvnumba.backends.cpu.shapes import Score, Shape
from kvnumba.backends.cpu.simd import HAS_BFLOAT16_DOT, target_features
from kvnumba.backends.cpu.storage import CpuBuffers, aligned_zeros, allocate, as_rows
from kvnumba.backends.protocol import CascadeLimits
from kvnumba.formats import FORMATS, Format
from kvnumba.options import Scoring
from kvnumba.storage import (
    Batch,
    Encoded,
    Layout,
    Part,
    RowLayout,
    host_memory_bytes,
    read_blocks_on_host,
    write_blocks_on_host,
)

# Numba's workqueue threading layer aborts the process when two threads enter kernels at once. Every kernel
# uses all cores, so one at a time loses nothing, and all share one scratch.
_ONE_AT_A_TIME = threading.Lock()

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
_NO_NUMBERS = np.empty(0, np.int32)
_NO_PARTIALS = np.empty((0, 1), np.float32)
_NO_WEIGHTS = np.empty((1, 0), np.float32)
_NO_MASS = np.empty((0, 0), np.float32)


class CpuBackend:
    """Kernels compiled when first used, and kept on disk for the next process."""

    name = "cpu"
    simulated = False
    device: int | None = None
    cascade = CascadeLimits(tile_rows=many.ROWS[-1], min_rows=8, min_bytes=1 << 25)
    finds_mass = True

    def __init__(self) -> None:
        self._scratch: dict[str, np.ndarray] = {}
        self._memories: dict[Any, attention.Memory] = {}
        self._counter = np.zeros(1, np.int64)

    def allocate(self, layout: Layout) -> CpuBuffers:
        return allocate(layout)

    def available_bytes(self) -> int:
        return host_memory_bytes()

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str, *, zeros: bool = False) -> Any:
        raise NotImplementedError("device arrays are not taken here")

    def encode(self, x: np.ndarray, rows: RowLayout) -> Encoded:
        encoded = rows.empty(len(x))
        if x.size:
            scale_dtype = rows.scale_dtype.name
            job = write.EncodeJob(np.ascontiguousarray(x).reshape(-1), as_rows(encoded, rows, scale_dtype))
            with _ONE_AT_A_TIME:
                launch(write.encode, static(scale_dtype), _workers(x.size), job)
        return encoded

    def decode(self, encoded: Encoded, rows: RowLayout) -> np.ndarray:
        out = np.empty((len(encoded.codes), rows.head_dim), np.float32)
        if out.size:
            scale_dtype = rows.scale_dtype.name
            contiguous = Encoded(*(np.ascontiguousarray(array) for array in encoded))
            job = read.DecodeJob(as_rows(contiguous, rows, scale_dtype), out.reshape(-1))
            with _ONE_AT_A_TIME:
                launch(read.decode, static(scale_dtype), _workers(out.size), job)
        return out

    def write(self, buffers: CpuBuffers, layer: int, k: np.ndarray, v: np.ndarray, batch: Batch) -> None:
        job = write.WriteJob(_view(k), _view(v), batch.slot_mapping, buffers.layers[layer])
        with _ONE_AT_A_TIME:
            launch(write.write, buffers.static, _workers(k.size), job)

    def read(
        self, buffers: CpuBuffers, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        layout = buffers.layout
        shape = (len(block_table), layout.num_kv_heads, length)
        k, v = (np.empty((*shape, rows.head_dim), np.float32) for rows in (layout.keys, layout.values))
        if k.size:
            job = read.ReadJob(block_table, length, buffers.layers[layer], k.reshape(-1), v.reshape(-1))
            with _ONE_AT_A_TIME:
                launch(read.read, buffers.static, _workers(k.size), job)
        return k, v

    def copy_blocks(self, buffers: CpuBuffers, pairs: np.ndarray) -> None:
        layout = buffers.layout
        blocks = layout.num_layers * layout.num_blocks
        arrays = tuple(
            array.reshape(-1).view(np.uint8).reshape(blocks, -1) for array in (*buffers.keys, *buffers.values)
        )
        job = copy.CopyJob(pairs, layout.num_layers, layout.num_blocks, arrays)
        num_bytes = len(pairs) * layout.num_layers * sum(array.shape[1] for array in arrays)
        with _ONE_AT_A_TIME:
            launch(copy.copy, COMMON, _workers(num_bytes), job)

    def read_blocks(self, buffers: CpuBuffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        return read_blocks_on_host(buffers, blocks)

    def write_blocks(self, buffers: CpuBuffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        write_blocks_on_host(buffers, blocks, keys, values)

    def plan(
        self, parts: Sequence[Part], num_qo_heads: int, scoring: Scoring, mass: bool = False
    ) -> Plan | list[Round]:
        plan = plan_parts(parts, num_qo_heads, scoring, numba.get_num_threads(), few_rows=mass)
        return rounds_of(plan, num_qo_heads // parts[0].buffers.layout.num_kv_heads) if mass else plan

    def prepare(self, q: np.ndarray, plan: Any, scoring: Scoring, written: Sequence[Part]) -> None:
        pass

    def decoding(
        self, q: Any, k: Any, v: Any, written: Sequence[Part], parts: Sequence[Part], scoring: Scoring
    ) -> None:
        return None

    def attend(
        self,
        layer: int,
        q: np.ndarray,
        plan: Plan | list[Round],
        scoring: Scoring,
        out: np.ndarray,
        lse: np.ndarray,
        mass: np.ndarray | None = None,
    ) -> None:
        if not (_is_view(out) and min(lse.strides) >= 0):
            raise ValueError(
                f"out, lse: expected adjacent last elements of out, and no axis that runs backwards; got strides "
                f"{out.strides} and {lse.strides}"
            )
        views = attention.Views(_view(q), out, lse)
        with _ONE_AT_A_TIME:
            if isinstance(plan, Plan):
                self._attend(layer, views, plan, scoring, _NO_WEIGHTS, _NO_MASS)
                return
            assert mass is not None
            rows = mass.reshape(-1, mass.shape[-1])
            for some, num_kept, at_once in plan:
                # a sequence grows with every call, and new memory for each would be cleared first
                shape = (some.workers if at_once else 1, 1 << num_kept.bit_length())
                kept = self._space("kept", shape, np.float32)
                self._attend(layer, views, some, scoring, kept, rows if at_once else _NO_MASS)
                if not at_once:
                    self._add_masses(lse, some, kept, rows, mass.shape[1])

    def _attend(
        self,
        layer: int,
        views: attention.Views,
        plan: Plan,
        scoring: Scoring,
        kept: np.ndarray,
        mass: np.ndarray,
    ) -> None:
        with_mask, without_mask, _words = _scores(scoring)
        q, out, lse = views
        if not plan.complete:  # some tokens are in no part: they see nothing but the sinks
            out[...] = 0
            lse[...] = -np.inf if scoring.sinks is None else scoring.sinks
        head_dim, value_dim = q.shape[-1], out.shape[-1]
        partials = _NO_PARTIALS
        if plan.num_partials:
            partials = self._space(
                "partials", (plan.num_partials * plan.partial_rows, value_dim + 1), np.float32
            )
        for planned in plan.parts:
            buffers: Any = planned.part.buffers
            batch = planned.part.batch
            score = with_mask if planned.part.masked else without_mask
            for shape, pieces in planned.pieces:
                self._counter[0] = 0
                work = attention.Work(
                    self._counter,
                    pieces,
                    planned.tokens,
                    batch.block_table,
                    _NO_NUMBERS if batch.offsets is None else batch.offsets,
                    _NO_NUMBERS if batch.shifts is None else batch.shifts,
                    partials,
                    plan.partial_rows,
                    kept,
                    mass,
                )
                memory = self._memory(shape, plan.workers, head_dim, value_dim)
                job = attention.Job(views, work, buffers.layers[layer], score, memory)
                launch(attention.attend, shape, plan.workers, job)
        if plan.num_partials:
            sinks = with_mask.sinks if plan.counts_sinks else _NONE
            merges = attention.MergeJob(views, plan.merges, plan.sources, partials, sinks)
            launch(attention.merge, COMMON, plan.workers, merges)

    def _add_masses(
        self, lse: np.ndarray, plan: Plan, kept: np.ndarray, mass: np.ndarray, num_kv_heads: int
    ) -> None:
        """What becomes of kept weights, now that the lse of their tokens is known."""
        for planned in plan.parts:
            offsets = planned.part.batch.offsets
            offsets = _NO_NUMBERS if offsets is None else offsets
            for shape, pieces in planned.pieces:
                job = attention.MassJob(lse, pieces, offsets, kept, mass, num_kv_heads, shape.columns)
                launch(attention.add_mass, COMMON, plan.workers, job)

    def _memory(self, shape: Shape, workers: int, head_dim: int, value_dim: int) -> attention.Memory:
        key = (shape, workers, head_dim, value_dim)
        memory = self._memories.get(key)
        if memory is None:
            floats, runs = attention.scratch_sizes(shape, head_dim, value_dim)
            memory = attention.Memory(
                self._space("floats", (workers, floats), np.float32),
                self._space("positions", (workers, shape.width + 4 * shape.all_lanes), np.int32),
                self._space("runs", (workers, runs, 4), np.int64),
            )
            self._memories[key] = memory
        return memory

    def _space(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Scratch that is kept between calls: fresh memory costs a page fault every 4 KiB."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = aligned_zeros((size,), np.dtype(dtype))
            self._memories.clear()  # views of what was there before
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
        ("tiles", tiles.unavailable_reason() or "yes: prompts, and decoding from int8 and int4"),
        ("bfloat16 products", _bfloat16_products()),
    ]


def _bfloat16_products() -> str:
    if tiles.instructions():
        return "of prompts, where asked for: on tiles"
    if ceilings.bfloat16_is_faster():
        return "of prompts, where asked for: faster than float32 here"
    return "none: slower than float32 here" if HAS_BFLOAT16_DOT else "none: no instruction"


def describe_plan(plan: Plan, scoring: Scoring) -> str:
    """Which kernels `attend` takes for a plan: the file, its rows, and the formats that keys and values have there."""
    score, _, _ = _scores(scoring)
    found = []
    for planned in plan.parts:
        buffers = cast(CpuBuffers, planned.part.buffers)
        layout, layer = buffers.layout, buffers.layers[0]
        for shape, _ in planned.pieces:
            reading = shape.choose.py_func(layer.keys, layer.values, score)
            keys = _as_multiplied(layout.keys.fmt, reading.k_format)
            values = _as_multiplied(layout.values.fmt, reading.v_format)
            read = keys if keys == values else f"{keys}, {values}"
            parts = f", in {shape.parts} x bfloat16" if shape.parts else ""
            found.append(f"{shape.kernels.rpartition('.')[2]} {shape.rows}: {read}{parts}")
    return "; ".join(found)


def _as_multiplied(stored: Format, multiplied: int) -> str:
    name = list(FORMATS)[multiplied]
    return name if stored.name == name else f"{stored.name} staged to {name}"


def _workers(num_values: int) -> int:
    """Threads that converting so many values is worth."""
    return 1 if num_values <= SERIAL_VALUES else numba.get_num_threads()


def _view(x: np.ndarray) -> np.ndarray:
    """Tokens as kernels read them, whose last elements are adjacent and no axis runs backwards; others are copied."""
    return x if _is_view(x) else np.ascontiguousarray(x)


def _is_view(x: np.ndarray) -> bool:
    return x.strides[-1] == x.itemsize and min(x.strides) >= 0


@functools.lru_cache(64)
def _scores(scoring: Scoring) -> tuple[Score, Score, Any]:
    """Options as the kernels see them, with and without the mask (`Part.masked`), and what lies at `Score.aux`."""
    mods = modification(scoring)
    with_mask = Score(
        np.float32(scoring.sm_scale),
        scoring.window_left,
        np.float32(scoring.logits_soft_cap),
        _NONE if scoring.sinks is None else scoring.sinks,
        _NONE if scoring.alibi_slopes is None else scoring.alibi_slopes,
        scoring.arithmetic == "float32",
        scoring.arithmetic == "bfloat16" and ceilings.bfloat16_is_faster(),
        mods.masked,
        mods.aux,
    )
    return with_mask, with_mask._replace(modify=mods.unmasked), mods.kept
