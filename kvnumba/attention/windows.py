"""Windows over sequences that have dropped tokens: they go by positions, kernels by slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvnumba.blocks.kept import Kept, positions_at, slots_from
from kvnumba.storage import Batch


def begin_in_window(batch: Batch, kept: Sequence[Kept], window_left: int) -> Batch:
    """The batch, in which new tokens of sequences that have dropped tokens begin at the first key in their window.

    Each new token begins elsewhere, so each is a sequence of its own. The kernels' own window, by slots, leaves out
    nothing more: tokens are at least as far from each other in positions as in slots.
    """
    new = np.diff(batch.query_start_loc)
    apart = np.array([each is not None for each in kept])
    counts = np.where(apart, new, 1)
    rows = np.repeat(np.arange(len(counts)), counts)
    turn = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    query_start_loc = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.where(apart, 1, new)[rows], out=query_start_loc[1:])
    positions = batch.positions[rows] + turn
    begins = np.zeros(len(rows), np.int64) if batch.begins is None else batch.begins[rows].astype(np.int64)
    for row in np.flatnonzero(apart).tolist():
        own = rows == row
        first = slots_from(kept[row], positions_at(kept[row], positions[own]) - window_left)
        begins[own] = np.maximum(begins[own], first)
    return replace(
        batch,
        block_table=batch.block_table[rows],
        seq_lens=batch.seq_lens[rows],
        query_start_loc=query_start_loc,
        positions=positions.astype(np.int32),
        begins=begins.astype(np.int32),
        kept={},
    )
