"""Which kernels serve a plan's queries, and what each of them is given: decided once for all layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kvnumba.arrays import DeviceView
from kvnumba.backends.cuda import attend, mass
from kvnumba.backends.cuda.codecs import Matrix, codec_of, width_of_rows
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
from kvnumba.backends.cuda.mods import Change, change_of
from kvnumba.backends.cuda.parameters import AttendShape, MergeShape
from kvnumba.backends.cuda.plan import (
    TILE,
    AttentionPlan,
    Pieces,
    Ranges,
    Shape,
    pieces_of_keys,
    ranges_of,
    rows_to_merge,
    split,
    with_spare,
)
from kvnumba.backends.cuda.storage import CudaBuffers
from kvnumba.backends.cuda.tables import Tables, Upload, tables_of
from kvnumba.backends.cuda.transforms import transform_of
from kvnumba.backends.mods import words_of
from kvnumba.options import Scoring
from kvnumba.storage import Layout, Part

if not SIMULATED:
    from kvnumba.backends.cuda import decode, prefill

WIDEST = 2**31 - 1  # window that an int32 holds, and no sequence fills


class Launches(NamedTuple):
    """What one attention starts.

    Attributes
    ----------
    of_parts : list of (Launch, storages)
        A kernel for some sequences of one or two parts, and for each of these the addresses of its layers.
    merge : Launch, optional
        Where these leave partial results.
    memory : tuple
        What keeps the tables and the partial results where they are.
    cuts : list of Cut
        What the launches work on.
    """

    of_parts: list[tuple[Launch, list[tuple[tuple[int, ...], ...]]]]
    merge: Launch | None
    memory: tuple[Any, ...]
    cuts: list[Cut]

    def prepare(self) -> None:
        """Compile the kernels."""
        for launch, _ in self.of_parts:
            launch.prepare()
        if self.merge is not None:
            self.merge.prepare()


class _Share(NamedTuple):
    """Some sequences of a part, and the kernel that takes them."""

    part: Part
    tables: Tables
    tokens: int | None  # where in the upload the part's tokens are
    offsets: int | None  # and its offsets and shifts
    shifts: int | None
    shape: Shape
    sequences: np.ndarray
    heads: int  # of those that share a KV head, how many a block takes
    blocks_per_piece: int


class Cut(NamedTuple):
    """Shares whose pieces are merged together.

    Attributes
    ----------
    shares : list of _Share
    pieces : Pieces
    places : list of int
        Where in the upload the table of each share begins, in bytes.
    """

    shares: list[_Share]
    pieces: Pieces
    places: list[int]


def seen_by(shares: list[_Share], window_left: int) -> list[Ranges]:
    """The keys that the tokens of some shares, which blocks of one shape take, see in each."""
    tokens = shares[0].shape.rows // shares[0].heads
    return [ranges_of(share.part.batch, share.sequences, tokens, window_left) for share in shares]


def pieces_of(
    shares: list[_Share],
    ranges: list[Ranges],
    num_qo_heads: int,
    first_partial: int | None = None,
) -> Pieces:
    """These keys in pieces, as many as the device takes at once if somebody merges them."""
    shape = shares[0].shape
    merged = shape.merges or first_partial is not None
    blocks = blocks_at_once(shape) if merged else 1
    return split(ranges, blocks, shares[0].blocks_per_piece, num_qo_heads, first_partial)


def blocks_at_once(shape: Shape) -> int:
    """Blocks of a kernel that the device runs at a time."""
    return max(1, num_multiprocessors() * shape.blocks_per_sm)


def launches_of(
    plan: AttentionPlan,
    q: DeviceView,
    scoring: Scoring,
    pool: Pool,
    stream: int,
    *,
    kept: Upload | None = None,
) -> Launches:
    """What serves queries such as q; the memory that it takes is the stream's.

    `kept`: an upload for the tables, in which there is room for as many pieces as there may be when the sequences,
    with a new token each, have grown.
    """
    num_tokens = q.shape[0] * q.shape[1]
    num_qo_heads, value_head_dim = q.shape[2], plan.parts[0].buffers.layout.value_head_dim
    partial_bytes = 4 * (value_head_dim + 4)
    upload = kept or _upload_of(plan)
    shares = _shares(plan, q, scoring, upload)
    together = _merge_together(plan, shares)
    merged_after = not plan.direct and not together
    groups = [shares] if together else [[share] for share in shares]
    cuts: list[Cut] = []
    num_partials = 0
    for group in groups:
        first_partial = num_partials if merged_after else None
        pieces = pieces_of(group, seen_by(group, plan.window_left), num_qo_heads, first_partial)
        if kept is not None:
            most = blocks_at_once(group[0].shape) // group[0].blocks_per_piece
            pieces = with_spare(pieces, most, num_qo_heads)
        cuts.append(Cut(group, pieces, [upload.add(table.reshape(-1)) for table in pieces.tables]))
        num_partials += pieces.num_partials
    starts = rows = 0
    if merged_after:
        starts, rows = (
            upload.add(vector)
            for vector in rows_to_merge(
                [each.pieces.tables[0] for each in cuts],
                [share.part for share in shares],
                num_tokens,
                num_qo_heads,
            )
        )

    base = upload.address(pool, stream)
    aux = _aux(scoring, pool, stream)
    partials = pool.take(num_partials * partial_bytes, stream)
    num_items = [each.pieces.num_items * each.shares[0].blocks_per_piece for each in cuts]
    counters = pool.take(4 * sum(num_items), stream, zeros=True)
    of_parts, item, partial = [], 0, 0
    for (group, pieces, begins), items in zip(cuts, num_items, strict=True):
        used = [
            (
                share,
                _work(
                    share,
                    len(table),
                    q,
                    scoring,
                    tables=share.tables.address(pool, stream),
                    pieces=base + begin,
                    tokens=0 if share.tokens is None else base + share.tokens,
                    offsets=0 if share.offsets is None else base + share.offsets,
                    shifts=0 if share.shifts is None else base + share.shifts,
                    aux=0 if aux is None else aux.address,
                    partials=partials.address + (0 if merged_after else partial * partial_bytes),
                    counters=counters.address + 4 * item,
                ),
            )
            for share, table, begin in zip(group, pieces.tables, begins, strict=True)
            if len(table)
        ]
        at_once = decode.PARTS if group[0].shape.name == "decode" else 1
        for n in range(0, len(used), at_once):
            some, works = zip(*used[n : n + at_once], strict=True)
            buffers = [share.part.buffers for share in some]
            change = change_of(scoring, some[0].part.masked)
            kernel, shared_bytes = _kernel(
                [each.layout for each in buffers], group[0].shape, q, scoring, change
            )
            grid = (sum(work.num_pieces for work in works), group[0].blocks_per_piece)
            if (
                group[0].shape.name == "decode"
            ):  # all pieces of the first part begin before those of the second
                grid = grid[::-1]
            launch = Launch(kernel, grid, shared_bytes, *works)
            of_parts.append((launch, [each.addresses for each in buffers if isinstance(each, CudaBuffers)]))
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
    return Launches(of_parts, merge, (upload, partials, counters, aux), cuts)


class MassLaunches(NamedTuple):
    """What one attention starts for masses, when it has left its lse.

    Attributes
    ----------
    of_parts : list of (Launch, storages)
        A kernel for each part, and the addresses of its layers.
    lse : Loan
        Room for the lse, where nobody wants it.
    memory : tuple
        What keeps the tables where they are.
    """

    of_parts: list[tuple[Launch, tuple[tuple[int, ...], ...]]]
    lse: Loan
    memory: tuple[Any, ...]

    def prepare(self) -> None:
        """Compile the kernels."""
        for launch, _ in self.of_parts:
            launch.prepare()


def mass_launches_of(
    plan: AttentionPlan, q: DeviceView, scoring: Scoring, pool: Pool, stream: int
) -> MassLaunches:
    """What finds the masses of queries such as q; the memory that it takes is the stream's."""
    upload = Upload()
    shares, places = [], []
    for part in plan.parts:
        batch, num_kv_heads = part.batch, part.buffers.layout.num_kv_heads
        group, new = q.shape[2] // num_kv_heads, np.diff(batch.query_start_loc)
        table = pieces_of_keys(batch, plan.window_left, mass.KEYS)
        if not len(table):
            continue
        offsets, shifts = (None if x is None else upload.add(x) for x in (batch.offsets, batch.shifts))
        shares.append(
            _Share(
                part,
                tables_of(batch, upload),
                None,
                offsets,
                shifts,
                _float32_shape(int(new.max()) * group),
                np.flatnonzero(new),
                group,
                num_kv_heads,
            )
        )
        places.append((upload.add(table.reshape(-1)), len(table)))
    aux = _aux(scoring, pool, stream)
    of_parts = []
    for share, (begin, num_pieces) in zip(shares, places, strict=True):
        layout = share.part.buffers.layout
        base = upload.address(pool, stream)
        work = _work(
            share,
            num_pieces,
            q,
            scoring,
            tables=share.tables.address(pool, stream),
            pieces=base + begin,
            tokens=0,
            offsets=0 if share.offsets is None else base + share.offsets,
            shifts=0 if share.shifts is None else base + share.shifts,
            aux=0 if aux is None else aux.address,
            partials=0,
            counters=0,
        )
        kernel = mass.mass_kernel(
            share.shape.rows,
            q.dtype,
            width_of(layout.head_dim, *alignment_of(q)),
            codec_of(layout.keys),
            width_of_rows(layout.keys),
            transform_of(layout),
            change_of(scoring, share.part.masked),
        )
        grid = (num_pieces, layout.num_kv_heads)
        launch = Launch(kernel, grid, mass.shared_bytes(share.shape.rows, layout.head_dim), work)
        buffers = share.part.buffers
        assert isinstance(buffers, CudaBuffers)
        of_parts.append((launch, buffers.addresses))
    lse = pool.take(4 * q.shape[0] * q.shape[1] * q.shape[2], stream)
    return MassLaunches(of_parts, lse, (upload, aux))


class _Aux(NamedTuple):
    """The address of `words_of` on the device, and the memory of all that it refers to."""

    address: int
    loans: list[Loan]


def _aux(scoring: Scoring, pool: Pool, stream: int) -> _Aux | None:
    """What users' functions are given besides, uploaded."""
    if not scoring.aux:
        return None
    loans: list[Loan] = []

    def address_of(array: np.ndarray) -> int:
        loans.append(pool.put(array, stream))
        return loans[-1].address

    words = words_of(scoring.aux, address_of)
    return _Aux(address_of(words), loans)


def _work(share: _Share, num_pieces: int, q: DeviceView, scoring: Scoring, **addresses: int) -> AttendShape:
    """What a kernel is given for a part of all layers."""
    buffers, batch = share.part.buffers, share.part.batch
    assert isinstance(buffers, CudaBuffers)
    layout, num_qo_heads = buffers.layout, q.shape[2]
    q_batch, q_token, q_head = row_strides(q)
    return AttendShape(
        **addresses,
        q_batch=q_batch,
        q_token=q_token,
        q_head=q_head,
        slab_bytes=buffers.slab_bytes,
        num_pieces=num_pieces,
        tokens_per_row=q.shape[1],
        num_seqs=batch.block_table.shape[0],
        max_blocks=batch.block_table.shape[1],
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        num_qo_heads=num_qo_heads,
        group=num_qo_heads // layout.num_kv_heads,
        heads=share.heads,
        head_dim=layout.head_dim,
        value_head_dim=layout.value_head_dim,
        key_group=layout.keys.group_size,
        value_group=layout.values.group_size,
        window_left=min(scoring.window_left, WIDEST),
        sm_scale=float(scoring.sm_scale),
        soft_cap=float(scoring.logits_soft_cap),
    )


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


def _kernel(
    layouts: list[Layout], shape: Shape, q: DeviceView, scoring: Scoring, change: Change | None
) -> tuple[Kernel, int]:
    """The kernel of a shape for parts that are stored so, and the bytes of shared memory of its blocks."""
    layout = layouts[0]
    head_dim, value_head_dim, transform = layout.head_dim, layout.value_head_dim, transform_of(layout)
    codecs = tuple((codec_of(each.keys), codec_of(each.values)) for each in layouts)
    keys, values = codecs[0]
    if shape.name == "attend":
        kernel = attend.attend_kernel(
            shape.rows,
            q.dtype,
            width_of(head_dim, *alignment_of(q)),
            keys,
            width_of_rows(layout.keys),
            values,
            width_of(value_head_dim, layout.values.group_size),
            transform,
            change,
        )
        staged = values.fmt.codec is not None
        return kernel, attend.shared_bytes(shape.rows, head_dim, value_head_dim, staged)
    extras = scoring.logits_soft_cap > 0 or scoring.alibi_slopes is not None
    if shape.name == "decode":
        kernel = decode.decode_kernel(q.dtype, codecs, head_dim, value_head_dim, extras, transform)
        return kernel, decode.shared_bytes(value_head_dim)
    return prefill.prefill_kernel(q.dtype, keys, values, head_dim, value_head_dim, extras, transform), 0


def _shares(plan: AttentionPlan, q: DeviceView, scoring: Scoring, upload: Upload) -> list[_Share]:
    """Which kernels serve a plan's parts, and the sequences of each."""
    shares = []
    for part in plan.parts:
        tables = tables_of(part.batch, upload)
        users = (part.batch.offsets, part.batch.shifts) if scoring.has_mods else (None, None)
        tokens, offsets, shifts = (None if x is None else upload.add(x) for x in (part.tokens, *users))
        num_kv_heads = part.buffers.layout.num_kv_heads
        group = q.shape[2] // num_kv_heads
        for shape, sequences in _shapes_of(part, plan, q, scoring, group):
            heads = min(group, shape.rows)
            blocks_per_piece = num_kv_heads * -(-group // heads)
            shares.append(
                _Share(part, tables, tokens, offsets, shifts, shape, sequences, heads, blocks_per_piece)
            )
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
        return [(_float32_shape(int(new.max()) * group), everything)]
    rows = new * group
    long = rows > decode.SHAPE.rows
    blocks = int((-(-rows[long] // prefill.SHAPE.rows)).sum()) * layout.num_kv_heads
    if plan.aligned and 2 * blocks < num_multiprocessors():
        # short prompts: a kernel that splits ranges of keys has more to do at once
        return [(decode.SHAPE, everything)]
    shapes = [(prefill.SHAPE, np.flatnonzero(long)), (decode.SHAPE, np.flatnonzero((new > 0) & ~long))]
    return [share for share in shapes if len(share[1])]


def _float32_shape(rows: int) -> Shape:
    """Which of the float32 kernels serves so many rows."""
    return attend.FEW if rows <= attend.FEW.rows else attend.MANY


def _matrices_serve(part: Part, q: DeviceView, scoring: Scoring) -> bool:
    """Whether the kernels with matrix instructions can take queries out of such a storage."""
    layout, batch = part.buffers.layout, part.batch
    if scoring.arithmetic == "float32" or q.dtype == "float32" or scoring.has_mods:
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
