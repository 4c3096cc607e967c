"""Windows over sequences that have dropped tokens: they go by positions, kernels by slots.

Each new token begins to see at another slot, so each becomes a sequence of its own. The kernels' own window, by slots,
leaves out nothing more: tokens are at least as far from each other in positions as in slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvnumba.blocks.kept import Kept, positions_at, slots_from
from kvnumba.storage import Batch


def apart(batch: Batch, kept: Sequence[Kept]) -> tuple[Batch, list[Kept]]:
    """A batch in which each new token of sequences that have dropped tokens is a sequence; and `kept` of these."""
    new = np.diff(batch.query_start_loc)
    whole = np.array([each is None for each in kept])
    counts = np.where(whole, 1, new)
    rows = np.repeat(np.arange(len(counts)), counts)
    turn = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    query_start_loc = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.where(whole, new, 1)[rows], out=query_start_loc[1:])
    split = replace(
        batch,
        block_table=batch.block_table[rows],
        seq_lens=batch.seq_lens[rows],
        query_start_loc=query_start_loc,
        positions=(batch.positions[rows] + turn).astype(np.int32),
        begins=_of(batch.begins, rows),
        offsets=_of(batch.offsets, rows),
        shifts=_of(batch.shifts, rows),
        kept={},
    )
    return split, [kept[row] for row in rows.tolist()]


def begin_in_window(batch: Batch, kept: Sequence[Kept], window_left: int) -> Batch:
    """A batch as `apart` returns it, whose new tokens begin to see at the first key in their window."""
    begins = np.zeros(len(kept), np.int32) if batch.begins is None else batch.begins.copy()
    for n, (own, slot) in enumerate(zip(kept, batch.positions.tolist(), strict=True)):
        if own is not None:
            begins[n] = max(begins[n], slots_from(own, positions_at(own, slot) - window_left))
    return replace(batch, begins=begins, kept={})


def _of(vector: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if vector is None else vector[rows]
