"""NVIDIA GPUs through numba-CUDA: this file prepares addresses and numbers, the kernels beside it do the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from kvnumba.arrays import DeviceView, contiguous_strides
from kvnumba.backends.cuda import memory
from kvnumba.backends.cuda.codecs import codec_of, width_of_rows
from kvnumba.backends.cuda.copy import copy_kernel
from kvnumba.backends.cuda.decoding import Decoding
from kvnumba.backends.cuda.intrinsics import width_of
from kvnumba.backends.cuda.jit import (
    SIMULATED,
    THREADS,
    WARP,
    Launch,
    device_name,
    device_number,
    num_multiprocessors,
    why_unavailable,
)
from kvnumba.backends.cuda.launches import Launches, MassLaunches, launches_of, mass_launches_of
from kvnumba.backends.cuda.memory import Loan, Pool, alignment_of, row_strides
from kvnumba.backends.cuda.parameters import CopyAddresses, CopyShape, ReadShape, WriteShape
from kvnumba.backends.cuda.plan import AttentionPlan
from kvnumba.backends.cuda.read import read_kernel
from kvnumba.backends.cuda.storage import CudaBuffers, allocate
from kvnumba.backends.cuda.tables import Tables, tables_of
from kvnumba.backends.cuda.transforms import transform_of
from kvnumba.backends.cuda.write import shared_bytes, write_kernel
from kvnumba.backends.protocol import CascadeLimits
from kvnumba.errors import BackendUnavailable
from kvnumba.formats import FORMATS
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Buffers, Encoded, Layout, Part, RowLayout

BLOCKS_PER_SM = 1 if SIMULATED else 16


class _Attention(NamedTuple):
    """What an attention was like: queries without their memory, and how scores were made."""

    q: DeviceView
    scoring: Scoring


class CudaBackend:
    """Kernels compiled when first used, for the device that is Numba's current one when the backend is made."""

    name = "cuda"
    simulated = SIMULATED
    cascade = CascadeLimits(tile_rows=64, min_rows=16, min_bytes=1 << 25)
    finds_mass = True

    def __init__(self) -> None:
        reason = why_unavailable()
        if reason:
            raise BackendUnavailable(reason)
        self.device = device_number()
        self._pool = Pool()
        self._latest: WeakKeyDictionary[Buffers, _Attention] = WeakKeyDictionary()

    def allocate(self, layout: Layout) -> CudaBuffers:
        return allocate(layout)

    def available_bytes(self) -> int:
        return memory.free_bytes()

    def empty(
        self, like: DeviceView, shape: tuple[int, ...], dtype: str, *, zeros: bool = False
    ) -> DeviceView:
        made = memory.empty_like(like, shape, dtype)
        if zeros:
            memory.enter()
            memory.clear(made.address, made.size * FORMATS[dtype].bits // 8, made.stream)
        return made

    def encode(self, x: np.ndarray, rows: RowLayout) -> Encoded:
        encoded = rows.empty(len(x))
        if x.size:
            memory.enter()
            given, loan = self._on_device(x[None, :, None])
            codes = self._pool.take(encoded.codes.nbytes, 0)
            numbers = 1 + rows.fmt.has_zero  # of a group, beside each other
            pairs = self._pool.take(numbers * encoded.scale.nbytes, 0)
            # the rows are the tokens of a sequence in one block; with their own addresses twice, as keys and as values
            layout = Layout(1, 1, len(x), 1, rows, rows)
            batch = Batch.of(np.zeros((1, 1), np.int32), np.array([len(x)], np.int32), [len(x)], len(x))
            addresses = (codes.address, pairs.address)
            launch = self._write_launch(layout, 0, given, given, batch)
            launch(0, (given.address, given.address, *addresses, *addresses, 0, 0))
            memory.download(encoded.codes, codes.address, 0)
            scales = np.empty((*encoded.scale.shape, numbers), rows.scale_dtype)
            memory.download(scales, pairs.address, 0)
            encoded.scale[...] = scales[..., 0]
            if rows.fmt.has_zero:
                encoded.zero[...] = scales[..., 1]
            del loan
        return encoded

    def decode(self, encoded: Encoded, rows: RowLayout) -> np.ndarray:
        out = np.empty((1, 1, len(encoded.codes), rows.head_dim), np.float32)
        if out.size:
            memory.enter()
            codes = self._pool.put(encoded.codes, 0)
            numbers = [encoded.scale, *([encoded.zero] if rows.fmt.has_zero else [])]
            pairs = self._pool.put(np.stack(numbers, axis=-1), 0)
            layout = Layout(1, 1, len(encoded.codes), 1, rows, rows)
            self._read(layout, rows, (codes.address, pairs.address), 0, np.zeros((1, 1), np.int32), out)
        return out[0, 0]

    def write(self, buffers: CudaBuffers, layer: int, k: Any, v: Any, batch: Batch) -> None:
        memory.enter()
        loans = None
        if not isinstance(k, DeviceView):
            (k, *loans), (v, *more) = self._on_device(k), self._on_device(v)
            loans += more
        key = (buffers, k.dtype, v.dtype, k.shape, k.strides, v.strides, k.address & 15, v.address & 15)
        launch = batch.kept.get(key)
        if launch is None:
            self._expect(buffers, k, batch)
            launch = batch.kept[key] = self._write_launch(buffers.layout, buffers.slab_bytes, k, v, batch)
        launch(k.stream, (k.address, v.address, *buffers.addresses[layer]))

    def _write_launch(
        self, layout: Layout, slab_bytes: int, keys: DeviceView, values: DeviceView, batch: Batch
    ) -> Launch:
        """The kernel that writes keys and values such as these."""
        sizes = [
            rows.group_size if rows.fmt.has_scale else rows.head_dim for rows in (layout.keys, layout.values)
        ]
        width = width_of(*sizes, *alignment_of(keys), *alignment_of(values))
        kernel = write_kernel(
            keys.dtype,
            values.dtype,
            codec_of(layout.keys),
            codec_of(layout.values),
            width,
            transform_of(layout),
        )
        num_seqs, max_blocks = batch.block_table.shape
        shape = WriteShape(
            tables_of(batch).address(self._pool, keys.stream),
            *row_strides(keys),
            *row_strides(values),
            slab_bytes,
            tokens_per_row=keys.shape[1],
            num_tokens=batch.num_tokens,
            num_seqs=num_seqs,
            max_blocks=max_blocks,
            block_size=layout.block_size,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            value_head_dim=layout.value_head_dim,
            key_group=layout.keys.group_size,
            value_group=layout.values.group_size,
        )
        shared = shared_bytes(layout.head_dim, layout.value_head_dim)
        return Launch(kernel, (_blocks(batch.num_tokens * layout.num_kv_heads), 2), shared, shape)

    def read(
        self, buffers: CudaBuffers, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        layout, addresses = buffers.layout, buffers.addresses[layer]
        found = []
        for rows, where in ((layout.keys, addresses[:2]), (layout.values, addresses[2:4])):
            out = np.empty((len(block_table), layout.num_kv_heads, length, rows.head_dim), np.float32)
            if out.size:
                memory.enter()
                memory.synchronize()  # the last write may have been on any stream
                self._read(layout, rows, where, buffers.slab_bytes, block_table, out)
            found.append(out)
        return found[0], found[1]

    def _read(
        self,
        layout: Layout,
        rows: RowLayout,
        addresses: Sequence[int],
        slab_bytes: int,
        block_table: np.ndarray,
        out: np.ndarray,
    ) -> None:
        blocks, result = self._pool.put(block_table, 0), self._pool.take(out.nbytes, 0)
        kernel = read_kernel(codec_of(rows), width_of_rows(rows))
        num_rows = out.size // rows.head_dim
        shape = ReadShape(
            slab_bytes,
            num_rows=num_rows,
            length=out.shape[2],
            max_blocks=block_table.shape[1],
            block_size=layout.block_size,
            num_kv_heads=layout.num_kv_heads,
            head_dim=rows.head_dim,
            group_size=rows.group_size,
        )
        launch = Launch(kernel, (_blocks(num_rows), 1), 0, shape)
        launch(0, (blocks.address, *addresses, result.address))
        memory.download(out, result.address, 0)

    def copy_blocks(self, buffers: CudaBuffers, pairs: np.ndarray) -> None:
        if not len(pairs):
            return
        memory.enter()
        memory.synchronize()  # what is copied may have been written on any stream, and will be read on any
        listed = self._pool.put(pairs.astype(np.int32), 0)
        shape = CopyShape(buffers.layer_bytes, buffers.block_bytes, len(pairs))
        launch = Launch(copy_kernel(), (len(pairs) * buffers.layout.num_layers, 1), 0, shape)
        launch(0, CopyAddresses(listed.address, buffers.address(0, 0)))
        memory.synchronize()

    def read_blocks(self, buffers: CudaBuffers, blocks: np.ndarray) -> tuple[Encoded, Encoded]:
        memory.enter()
        memory.synchronize()
        raw, arrays = buffers.on_host(blocks)
        for layer in range(len(raw)):
            for n, block in enumerate(blocks.tolist()):
                memory.download(raw[layer, n], buffers.address(layer, block), 0)
        return arrays

    def write_blocks(self, buffers: CudaBuffers, blocks: np.ndarray, keys: Encoded, values: Encoded) -> None:
        memory.enter()
        raw, arrays = buffers.on_host(blocks)
        for kept, new in zip((*arrays[0], *arrays[1]), (*keys, *values), strict=True):
            kept[...] = new
        for layer in range(len(raw)):
            for n, block in enumerate(blocks.tolist()):
                memory.upload(buffers.address(layer, block), raw[layer, n], 0)
        memory.synchronize()

    def plan(
        self, parts: Sequence[Part], num_qo_heads: int, scoring: Scoring, mass: bool = False
    ) -> AttentionPlan:
        return AttentionPlan(parts, num_qo_heads, scoring.window_left, mass)

    def prepare(self, q: Any, plan: AttentionPlan, scoring: Scoring, written: Sequence[Part]) -> None:
        memory.enter()
        query, loan = (q, None) if isinstance(q, DeviceView) else self._on_device(q)
        for part in written:
            layout = part.buffers.layout
            self._write_launch(layout, 0, query, query, part.batch).prepare()
        launches = self._launches(query, plan, scoring, query.stream)
        launches.prepare()
        if plan.mass:
            self._mass_launches(query, plan, scoring, query.stream).prepare()
        for x in (scoring.sinks, scoring.alibi_slopes):
            self._per_head(plan, x, query.stream)
        memory.synchronize()  # the calls may be on another stream
        del loan

    def attend(
        self, layer: int, q: Any, plan: AttentionPlan, scoring: Scoring, out: Any, lse: Any, mass: Any = None
    ) -> None:
        memory.enter()
        if isinstance(q, DeviceView):
            self._attend(layer, q, plan, scoring, out, lse, mass)
            return
        query, loan = self._on_device(q)
        wanted = [x for x in (out, lse, mass) if x is not None]
        room = [self._pool.take(x.nbytes, 0) for x in wanted]
        results = [
            memory.view_of(each.address, x.shape, "float32", query)
            for each, x in zip(room, wanted, strict=True)
        ]
        if mass is not None:
            memory.upload(results[2].address, mass, 0)
        self._attend(layer, query, plan, scoring, *results)
        for x, view in zip(wanted, results, strict=True):
            host = x if x.flags.c_contiguous else np.empty(x.shape, x.dtype)
            memory.download(host, view.address, 0)
            if host is not x:
                x[...] = host
        del loan

    def decoding(
        self, q: Any, k: Any, v: Any, written: Sequence[Part], parts: Sequence[Part], scoring: Scoring
    ) -> Decoding | None:
        if scoring.has_mods or not scoring.causal or not all(isinstance(x, DeviceView) for x in (q, k, v)):
            return None
        if any(part.tokens is not None or (np.diff(part.batch.query_start_loc) != 1).any() for part in parts):
            return None
        memory.enter()

        def write_launch(part: Part) -> Launch:
            buffers = part.buffers
            assert isinstance(buffers, CudaBuffers)
            return self._write_launch(buffers.layout, buffers.slab_bytes, k, v, part.batch)

        def per_head(plan: AttentionPlan, numbers: Any) -> int:
            return self._per_head(plan, numbers, q.stream)

        made = Decoding(q, written, parts, scoring, write_launch, per_head, self._pool)
        return made if made.useful else None

    def _attend(
        self,
        layer: int,
        q: DeviceView,
        plan: AttentionPlan,
        scoring: Scoring,
        out: DeviceView,
        lse: DeviceView,
        mass: DeviceView | None = None,
    ) -> None:
        stream = q.stream
        of_masses = None if mass is None else self._mass_launches(q, plan, scoring, stream)
        lse_address = lse.address or (0 if of_masses is None else of_masses.lse.address)
        launches = self._launches(q, plan, scoring, stream)
        sinks = self._per_head(plan, scoring.sinks, stream)
        slopes = self._per_head(plan, scoring.alibi_slopes, stream)
        strides = row_strides(out)
        result = (out.address, *strides)
        for launch, storages in launches.of_parts:
            addresses: tuple[int, ...] = (q.address, *result, lse_address, sinks, slopes)
            for storage in storages:
                addresses += storage[layer]
            launch(stream, addresses)
        if launches.merge is not None:
            launches.merge(stream, (*result, lse_address, sinks))
        if of_masses is not None:
            assert mass is not None
            for launch, storage in of_masses.of_parts:
                given = (q.address, *strides, lse_address, slopes, mass.address, mass.shape[2])
                launch(stream, given + storage[layer])

    def _expect(self, buffers: CudaBuffers, k: DeviceView, batch: Batch) -> None:
        """Plan an attention like the latest one, so that its tables and those of the write are one upload."""
        latest = self._latest.get(buffers)
        if latest is not None and latest.q.shape[:2] == k.shape[:2] and Tables not in batch.kept:
            plan = self.plan([Part(buffers, batch)], latest.q.shape[2], latest.scoring)
            self._launches(latest.q, plan, latest.scoring, k.stream)

    def _launches(self, q: DeviceView, plan: AttentionPlan, scoring: Scoring, stream: int) -> Launches:
        """What serves queries such as these, made once for all layers."""
        buffers, key = plan.parts[0].buffers, _key_of(q, plan, scoring)
        found: Launches | None = plan.launches.get(key)
        if found is None:
            found = plan.launches[key] = launches_of(plan, q, scoring, self._pool, stream)
            if plan.direct:
                self._latest[buffers] = _Attention(_without_memory(q), scoring)
            else:
                self._latest.pop(buffers, None)
        return found

    def _mass_launches(
        self, q: DeviceView, plan: AttentionPlan, scoring: Scoring, stream: int
    ) -> MassLaunches:
        """What finds the masses of queries such as these, made once for all layers."""
        key = ("mass", stream, *_key_of(q, plan, scoring))  # their room for an lse is the stream's
        found: MassLaunches | None = plan.launches.get(key)
        if found is None:
            # the tables of the batch go up with those of the attention
            self._launches(q, plan, scoring, stream)
            found = plan.launches[key] = mass_launches_of(plan, q, scoring, self._pool, stream)
        return found

    def _per_head(self, plan: AttentionPlan, x: np.ndarray | DeviceView | None, stream: int) -> int:
        """The address of a number for each query head; those of a host array are uploaded once. 0: there are none."""
        if x is None:
            return 0
        if isinstance(x, DeviceView):
            return x.address
        key = x.tobytes()
        loan: Loan | None = plan.per_head.get(key)
        if loan is None:
            loan = plan.per_head[key] = self._pool.put(x, stream)
        return loan.address

    def _on_device(self, x: np.ndarray) -> tuple[DeviceView, Loan]:
        """A copy of a host array (B, n, heads, D), and the memory that it takes as long as it is referred to."""
        x = np.ascontiguousarray(x, np.float32)
        loan = self._pool.put(x, 0)
        view = DeviceView(loan.address, x.shape, contiguous_strides(x.shape), "float32", None, 0, self.device)
        return view, loan


def describe() -> list[tuple[str, str]]:
    """What `python -m kvnumba info` says of this backend: rows of a name and a value."""
    return [("device", device_name())]


def _key_of(q: DeviceView, plan: AttentionPlan, scoring: Scoring) -> tuple[Any, ...]:
    """By what the launches of a plan are chosen."""
    return (
        plan.parts[0].buffers, q.dtype, q.shape, q.strides, q.address & 15, scoring.sm_scale, scoring.window_left,
        scoring.logits_soft_cap, scoring.alibi_slopes is None, scoring.arithmetic,
        scoring.causal, scoring if scoring.has_mods else None,
    )  # fmt: skip


def _without_memory(x: DeviceView) -> DeviceView:
    """A view that looks the same, with an address that is aligned in the same way."""
    return DeviceView(x.address & 15, x.shape, x.strides, x.dtype, None, x.stream, x.device)


def _blocks(num_rows: int) -> int:
    """Blocks for so many rows, each the work of a warp; no more than keep the device busy."""
    return min(-(-num_rows * WARP // THREADS), num_multiprocessors() * BLOCKS_PER_SM)
