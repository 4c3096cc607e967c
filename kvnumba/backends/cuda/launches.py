"""Which kernels serve a plan's queries, and what each of them is given: decided once for all layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvnumba.arrays import DeviceView
from kvnumba.backends.cuda import attend
from kvnumba.backends.cuda.codecs import Matrix, codec_of
from kvnumba.backends.cuda.intrinsics import width_of
from kvnumba.backends.cuda.jit import (
    SIMULATED,
    THREADS,
    WARP,
    Kernel,
    Launch,
    capability,
    num_multiprocessors,
)
from kvnumba.backends.cuda.memory import Loan, Pool, alignment_of, row_strides
from kvnumba.backends.cuda.merge import merge_kernel
from kvnumba.backends.cuda.parameters import AttendShape, MergeShape
from kvnumba.backends.cuda.plan import TILE, AttentionPlan, Pieces, Shape, ranges_of, rows_to_merge, split
from kvnumba.backends.cuda.storage import CudaBuffers
from kvnumba.backends.cuda.tables import Upload, tables_of
from kvnumba.backends.cuda.transforms import transform_of
from kvnumba.options import Scoring
from kvnumba.storage import Layout, Part

if not SIMULATED:
    from kvnumba.backends.cuda import decode, prefill

WIDEST = 2**31 - 1  # window that an int32 holds, and no sequence fills


class Launches(NamedTuple):
    """What one attention starts.

    Attributes
    ----------
    of_parts : list of (Launch, addresses)
        A kernel for some sequences of a part, and the addresses of the part's layers.
    merge : Launch, optional
        Where these leave partial results.
    memory : tuple
        What keeps the tables and the partial results where they are.
    """

    of_parts: list[tuple[Launch, tuple[tuple[int, ...], ...]]]
    merge: Launch | None
    memory: tuple[Upload, Loan, Loan]

    def prepare(self) -> None:
        """Compile the kernels."""
        for launch, _ in self.of_parts:
            launch.prepare()
        if self.merge is not None:
            self.merge.prepare()


class _Share(NamedTuple):
    """Some sequences of a part, and the kernel that takes them."""

    part: Part
    shape: Shape
    sequences: np.ndarray
    heads: int  # of those that share a KV head, how many a block takes
    blocks_per_piece: int


def launches_of(plan: AttentionPlan, q: DeviceView, scoring: Scoring, pool: Pool, stream: int) -> Launches:
    """What serves queries such as q; the memory that it takes is the stream's."""
    num_tokens = q.shape[0] * q.shape[1]
    num_qo_heads, value_head_dim = q.shape[2], plan.parts[0].buffers.layout.value_head_dim
    upload = _upload_of(plan)
    tables = [tables_of(part.batch, upload) for part in plan.parts]
    tokens = [None if part.tokens is None else upload.add(part.tokens) for part in plan.parts]
    shares = _shares(plan, q, scoring)
    together = _merge_together(plan, shares)
    merged_after = not plan.direct and not together
    groups = [shares] if together else [[share] for share in shares]
    cuts: list[Pieces] = []
    for group in groups:
        shape, heads = group[0].shape, group[0].heads
        splits = shape.merges or merged_after
        cuts.append(
            split(
                [
                    ranges_of(each.part.batch, each.sequences, shape.rows // heads, plan.window_left)
                    for each in group
                ],
                max(1, num_multiprocessors() * shape.blocks_per_sm) if splits else 1,
                group[0].blocks_per_piece,
                num_qo_heads,
                sum(pieces.num_partials for pieces in cuts) if merged_after else None,
            )
        )
    places = [[upload.add(table.reshape(-1)) for table in pieces.tables] for pieces in cuts]
    starts = rows = 0
    if merged_after:
        found = rows_to_merge(
            [pieces.tables[0] for pieces in cuts], [share.part for share in shares], num_tokens, num_qo_heads
        )
        starts, rows = (upload.add(vector) for vector in found)

    base = upload.address(pool, stream)
    partials = pool.take(4 * sum(pieces.num_partials for pieces in cuts) * (value_head_dim + 4), stream)
    num_items = [
        pieces.num_items * group[0].blocks_per_piece for pieces, group in zip(cuts, groups, strict=True)
    ]
    counters = pool.take(4 * sum(num_items), stream, zeros=True)
    of_parts, item, partial = [], 0, 0
    for group, pieces, at, items in zip(groups, cuts, places, num_items, strict=True):
        for share, table, place in zip(group, pieces.tables, at, strict=True):
            if not len(table):
                continue
            buffers, batch = share.part.buffers, share.part.batch
            assert isinstance(buffers, CudaBuffers)
            layout, number = buffers.layout, plan.parts.index(share.part)
            token_numbers = tokens[number]
            work = AttendShape(
                tables[number].address(pool, stream),
                base + place,
                0 if token_numbers is None else base + token_numbers,
                partials.address + (0 if merged_after else 4 * partial * (value_head_dim + 4)),
                counters.address + 4 * item,
                *row_strides(q),
                buffers.slab_bytes,
                tokens_per_row=q.shape[1],
                num_seqs=batch.block_table.shape[0],
                max_blocks=batch.block_table.shape[1],
                block_size=layout.block_size,
                num_kv_heads=layout.num_kv_heads,
                num_qo_heads=num_qo_heads,
                group=num_qo_heads // layout.num_kv_heads,
                heads=share.heads,
                head_dim=layout.head_dim,
                value_head_dim=value_head_dim,
                key_group=layout.keys.group_size,
                value_group=layout.values.group_size,
                window_left=min(scoring.window_left, WIDEST),
                sm_scale=float(scoring.sm_scale),
                soft_cap=float(scoring.logits_soft_cap),
            )
            kernel, shared_bytes = _kernel(layout, share.shape, q, scoring)
            grid = (len(table), share.blocks_per_piece)
            of_parts.append((Launch(kernel, grid, shared_bytes, work), buffers.addresses))
        item += items
        partial += pieces.num_partials

    merge = None
    if merged_after:
        work_of_merge = MergeShape(
            base + starts,
            base + rows,
            partials.address,
            num_tokens=num_tokens,
            tokens_per_row=q.shape[1],
            num_qo_heads=num_qo_heads,
            value_head_dim=value_head_dim,
        )
        blocks = -(-num_tokens * num_qo_heads * WARP // THREADS)
        width = width_of(value_head_dim)
        merge = Launch(merge_kernel(q.dtype, width), (blocks, 1), 0, work_of_merge)
    return Launches(of_parts, merge, (upload, partials, counters))


def _merge_together(plan: AttentionPlan, shares: list[_Share]) -> bool:
    """Whether the blocks of one shape of kernel serve all parts, whose pieces the last of them can merge."""
    return (
        plan.aligned
        and len(shares) == len(plan.parts)
        and shares[0].shape.merges
        and all(share.shape == shares[0].shape for share in shares)
    )


def _upload_of(plan: AttentionPlan) -> Upload:
    """What the plan's tables can join: the upload of its only batch, if that waits for them."""
    if plan.direct:
        upload = tables_of(plan.parts[0].batch).upload
        if not upload.sent:
            return upload
    return Upload()


def _kernel(layout: Layout, shape: Shape, q: DeviceView, scoring: Scoring) -> tuple[Kernel, int]:
    """The kernel of a shape, and the bytes of shared memory of its blocks."""
    keys, values, transform = codec_of(layout.keys), codec_of(layout.values), transform_of(layout)
    if shape.name == "attend":
        kernel = attend.attend_kernel(
            shape.rows,
            q.dtype,
            width_of(layout.head_dim, *alignment_of(q)),
            keys,
            width_of(layout.head_dim, layout.keys.group_size),
            values,
            width_of(layout.value_head_dim, layout.values.group_size),
            transform,
        )
        return kernel, attend.shared_bytes(shape.rows, layout.head_dim, layout.value_head_dim)
    extras = scoring.logits_soft_cap > 0 or scoring.alibi_slopes is not None
    decoding = shape.name == "decode"
    make = decode.decode_kernel if decoding else prefill.prefill_kernel
    kernel = make(q.dtype, keys, values, layout.head_dim, layout.value_head_dim, extras, transform)
    return kernel, decode.shared_bytes(layout.value_head_dim) if decoding else 0


def _shares(plan: AttentionPlan, q: DeviceView, scoring: Scoring) -> list[_Share]:
    """Which kernels serve a plan's parts, and the sequences of each."""
    shares = []
    for part in plan.parts:
        num_kv_heads = part.buffers.layout.num_kv_heads
        group = q.shape[2] // num_kv_heads
        for shape, sequences in _shapes_of(part, plan, q, scoring, group):
            heads = min(group, shape.rows)
            shares.append(_Share(part, shape, sequences, heads, num_kv_heads * -(-group // heads)))
    return shares


def _shapes_of(
    part: Part, plan: AttentionPlan, q: DeviceView, scoring: Scoring, group: int
) -> list[tuple[Shape, np.ndarray]]:
    """Which kernels serve a part, and the sequences of each."""
    layout = part.buffers.layout
    new = np.diff(part.batch.query_start_loc)
    everything = np.flatnonzero(new)
    if not len(everything):
        return []
    if SIMULATED or not _matrices_serve(part, q, scoring):
        few = int(new.max()) * group <= attend.FEW.rows
        return [(attend.FEW if few else attend.MANY, everything)]
    rows = new * group
    long = rows > decode.SHAPE.rows
    blocks = int((-(-rows[long] // prefill.SHAPE.rows)).sum()) * layout.num_kv_heads
    if plan.aligned and 2 * blocks < num_multiprocessors():
        # short prompts: a kernel that splits ranges of keys has more to do at once
        return [(decode.SHAPE, everything)]
    shapes = [(prefill.SHAPE, np.flatnonzero(long)), (decode.SHAPE, np.flatnonzero((new > 0) & ~long))]
    return [share for share in shapes if len(share[1])]


def _matrices_serve(part: Part, q: DeviceView, scoring: Scoring) -> bool:
    """Whether the kernels with matrix instructions can take queries out of such a storage."""
    layout, batch = part.buffers.layout, part.batch
    if scoring.arithmetic == "float32" or q.dtype == "float32":
        return False
    both = (layout.keys, layout.values)
    matrices: list[Matrix | None] = [codec_of(rows).matrix for rows in both]
    keys = matrices[0]
    return (
        keys is not None
        and all(matrix is not None and matrix.capability <= capability() for matrix in matrices)
        # queries in bfloat16 fit into float16 once they are scaled, the reverse would lose bits
        and (keys.element == q.dtype or keys.element == "float16")
        and all(rows.head_dim in (64, 128) for rows in both)
        and (layout.block_size % TILE == 0 or batch.block_table.shape[1] == 1)
        and all(
            not rows.fmt.has_scale or (rows.num_groups == 1 and layout.block_size % 2 == 0) for rows in both
        )
        and width_of(layout.head_dim, *alignment_of(q), most=8) == 8
    )
