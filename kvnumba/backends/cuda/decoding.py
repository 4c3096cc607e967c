"""Decode steps of the same sequences: what one launches is kept for the next, and only integers on the device change.

So a step costs the host little, and its launches may be in a CUDA graph: all addresses and grids stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kvnumba.arrays import DeviceView
from kvnumba.backends.cuda.jit import BoundLaunch, Launch
from kvnumba.backends.cuda.launches import launches_of, pieces_of, seen_by
from kvnumba.backends.cuda.memory import Pool
from kvnumba.backends.cuda.plan import AttentionPlan, Track, padded, ranges_of_single
from kvnumba.backends.cuda.storage import CudaBuffers
from kvnumba.backends.cuda.tables import Upload, tables_of
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Part


class _Layer(NamedTuple):
    """What a layer launches; `scoring` is that of its attention."""

    scoring: Scoring
    writes: list[BoundLaunch]
    attends: list[BoundLaunch]

    def run(self, k: int, v: int, q: int, out: int, stream: int) -> None:
        """`LayerDecoding` as the protocol has it."""
        for launch in self.writes:
            launch(stream, k, v)
        for launch in self.attends:
            launch(stream, q, out)


class Decoding:
    """One new token for each of some sequences: what `write` and `attend` launch, in this step and those that follow.

    Its memory is that of the stream it was made for, and so are all its calls: one at a time, in order.

    Parameters
    ----------
    q : DeviceView
        Like the queries of all steps.
    written, parts : sequence of Part
        Where the new tokens are stored, and what they attend to.
    scoring : Scoring
        Layers may differ from it in `sinks`.
    write_launch : callable
        ``(part) -> Launch``: what stores new keys and values in a part.
    per_head : callable
        ``(plan, numbers) -> address`` on the device of a number for each query head.
    """

    def __init__(
        self,
        q: DeviceView,
        written: Sequence[Part],
        parts: Sequence[Part],
        scoring: Scoring,
        write_launch: Callable[[Part], Launch],
        per_head: Callable[[AttentionPlan, Any], int],
        pool: Pool,
    ) -> None:
        self._upload = Upload()
        self._own: dict[int, Batch] = {}  # by the identity of the batch that it is a copy of
        written, parts = ([self._adopt(part) for part in each] for each in (written, parts))
        self._given = [*written, *parts]
        self._scoring = scoring
        self._plan = AttentionPlan(parts, q.shape[2], scoring.window_left)
        self._launches = launches_of(self._plan, q, scoring, pool, q.stream, kept=self._upload)
        self._writes = [(write_launch(part), part.buffers) for part in written]
        self._per_head = per_head
        self._layers: dict[int, _Layer] = {}
        self._out_strides = (q.shape[1] * q.shape[2] * self.value_head_dim, q.shape[2] * self.value_head_dim)
        if self.useful:
            self._track()

    @property
    def value_head_dim(self) -> int:
        """Elements of a head's result."""
        return self._plan.parts[0].buffers.layout.value_head_dim

    @property
    def useful(self) -> bool:
        """Whether the launches can be kept: one kind of blocks serves all sequences and merges what it leaves."""
        return self._launches.merge is None and len(self._launches.cuts) == 1

    def _adopt(self, part: Part) -> Part:
        """A part with a batch of our own, in whose table there is room for more blocks."""
        batch = part.batch
        own = self._own.get(id(batch))
        if own is None:
            width = batch.block_table.shape[1]
            table = np.zeros((len(batch.seq_lens), 1 << width.bit_length()), np.int32)
            table[:, :width] = batch.block_table
            begins = None if batch.begins is None else batch.begins.copy()
            own = self._own[id(batch)] = replace(
                batch, block_table=table, seq_lens=batch.seq_lens.copy(), positions=batch.positions.copy(),
                begins=begins, kept={},
            )  # fmt: skip
            tables_of(own, self._upload)
        return part._replace(batch=own)

    def _track(self) -> None:
        """Find the pieces in what was uploaded."""
        (only,) = self._launches.cuts
        self._ranges = seen_by(only.shares, self._plan.window_left)
        self._tables = [
            self._upload.sent_vector(begin, table.size).reshape(table.shape)
            for table, begin in zip(only.pieces.tables, only.places, strict=True)
        ]
        self._tracks = [Track(table, only.pieces.num_items) for table in self._tables]

    def follow(self, written: Sequence[Part], parts: Sequence[Part], stream: int) -> bool:
        """Become another step's, of the same stream; False if that cannot be: then this one is of no use any more."""
        given = [*written, *parts]
        if len(given) != len(self._given):
            return False
        for own, new in zip(self._given, given, strict=True):
            if own.buffers is not new.buffers or new.tokens is not None or not _fits(own.batch, new.batch):
                return False
        for own, new in zip(self._given, given, strict=True):
            batch, other = own.batch, new.batch
            batch.seq_lens[:], batch.positions[:] = other.seq_lens, other.positions
            batch.block_table[:, : other.block_table.shape[1]] = other.block_table
            if batch.begins is not None:
                batch.begins[:] = other.begins
        for batch in self._own.values():
            tables_of(batch).update(batch)
        if not self._follow_pieces():
            return False
        self._upload.again(stream)
        return True

    def _follow_pieces(self) -> bool:
        (only,) = self._launches.cuts
        self._ranges = [
            ranges_of_single(share.part.batch, before, self._plan.window_left)
            for share, before in zip(only.shares, self._ranges, strict=True)
        ]
        ranges = self._ranges
        if all(track.follow(each) for track, each in zip(self._tracks, ranges, strict=True)):
            return True
        pieces = pieces_of(only.shares, ranges, self._plan.num_qo_heads)
        if pieces.num_partials > only.pieces.num_partials or any(
            len(new) > len(table) for new, table in zip(pieces.tables, self._tables, strict=True)
        ):
            return False
        for table, new in zip(self._tables, pieces.tables, strict=True):
            table[:] = padded(new, len(table))
        self._tracks = [Track(table, only.pieces.num_items) for table in self._tables]
        return True

    def layer(self, layer: int, scoring: Scoring) -> _Layer | None:
        """What stores a layer's new tokens and attends; None if its options are other ones than those of `scoring`."""
        found = self._layers.get(layer)
        if found is None or found.scoring is not scoring:
            if not self._serves(scoring):
                return None
            found = self._layers[layer] = self._bind(layer, scoring)
        return found

    def _serves(self, scoring: Scoring) -> bool:
        ours = self._scoring
        same = ("sm_scale", "window_left", "logits_soft_cap", "arithmetic", "causal", "has_mods")
        return scoring.alibi_slopes is ours.alibi_slopes and all(
            getattr(scoring, name) == getattr(ours, name) for name in same
        )

    def _bind(self, layer: int, scoring: Scoring) -> _Layer:
        writes = [
            launch.bind((0, 0, *buffers.addresses[layer]))
            for launch, buffers in self._writes
            if isinstance(buffers, CudaBuffers)
        ]
        sinks, slopes = (
            self._per_head(self._plan, numbers) for numbers in (scoring.sinks, scoring.alibi_slopes)
        )
        attends = []
        for launch, storages in self._launches.of_parts:
            addresses: tuple[int, ...] = (0, 0, *self._out_strides, self.value_head_dim, 0, sinks, slopes)
            for storage in storages:
                addresses += storage[layer]
            attends.append(launch.bind(addresses))
        return _Layer(scoring, writes, attends)


def _fits(own: Batch, new: Batch) -> bool:
    """Whether a batch of ours can become another one."""
    return (
        len(own.seq_lens) == len(new.seq_lens)
        and new.block_table.shape[1] <= own.block_table.shape[1]
        and (own.begins is None) == (new.begins is None)
        and own.block_size == new.block_size
        and np.array_equal(own.query_start_loc, new.query_start_loc)
    )
