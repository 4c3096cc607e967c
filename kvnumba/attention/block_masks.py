"""Parts without the keys that a block mask skips: these are not read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvnumba.mods import PARTIAL, SKIP, UserFunction
from kvnumba.storage import Batch, Part

LEAST_KEYS = 128  # that are worth a question of their own


class _Range(NamedTuple):
    """Some new tokens of a sequence, and a range of keys that they see."""

    sequence: int
    first: int
    num_tokens: int
    begin: int
    end: int


def without_skipped(part: Part, block_mask: UserFunction, window_left: int, tokens: int) -> list[Part]:
    """The keys of a part that a block mask does not skip, asked for so many tokens at a time.

    Those of which it says that all are seen are a part for themselves, without the mask.
    """
    found: dict[bool, list[_Range]] = {False: [], True: []}
    for (sequence, first, count, begin, end), masked in _ranges(part.batch, block_mask, window_left, tokens):
        found[masked].append(_Range(sequence, first, count, begin, end))
    return [_part_of(part, ranges, masked) for masked, ranges in found.items() if ranges]


def _part_of(part: Part, ranges: list[_Range], masked: bool) -> Part:
    """A part whose sequences are ranges: tokens may be in several of them."""
    batch = part.batch
    sequence, first, count, begin, end = np.ascontiguousarray(np.array(ranges, np.int32).T)
    start = np.zeros(len(ranges) + 1, np.int32)
    np.cumsum(count, out=start[1:])
    tokens = np.concatenate(
        [
            np.arange(n, dtype=np.int32) + t
            for t, n in zip(batch.query_start_loc[sequence] + first, count, strict=True)
        ]
    )
    in_order = np.array_equal(tokens, np.arange(batch.num_tokens))
    of_ranges = Batch(
        batch.block_table[sequence],
        end,
        start,
        batch.block_size,
        batch.positions[sequence] + first,
        begin,
        None if batch.offsets is None else batch.offsets[sequence],
        None if batch.shifts is None else batch.shifts[sequence],
    )
    return Part(part.buffers, of_ranges, None if in_order else tokens, masked)


def _ranges(
    batch: Batch, block_mask: UserFunction, window_left: int, tokens: int
) -> Iterator[tuple[_Range, bool]]:
    """What new tokens see of a batch, the tokens that see most first; and whether they see all of it."""
    for sequence, new in enumerate(np.diff(batch.query_start_loc).tolist()):
        offset = 0 if batch.offsets is None else int(batch.offsets[sequence])
        shift = 0 if batch.shifts is None else int(batch.shifts[sequence])
        for first in range((new - 1) // tokens * tokens, -1, -tokens):
            count = min(tokens, new - first)
            position = int(batch.positions[sequence]) + first
            begin = 0 if batch.begins is None else int(batch.begins[sequence])
            if window_left >= 0:
                begin = max(begin, position - window_left)
            end = min(position + count, int(batch.seq_lens[sequence]))
            queries = position + offset - shift, position + count - 1 + offset - shift
            for low, high, masked in _seen(block_mask, queries, begin + offset, end + offset):
                yield _Range(sequence, first, count, low - offset, high - offset), masked


def _seen(
    block_mask: UserFunction, queries: tuple[int, int], begin: int, end: int
) -> Iterator[tuple[int, int, bool]]:
    """Ranges of keys that some queries see, and whether they see all of each; neighbours that are alike are one."""
    last: tuple[int, int, bool] | None = None
    for low, high, masked in _halves(block_mask, queries, begin, end):
        if last is not None and last[1:] == (low, masked):
            last = last[0], high, masked
            continue
        if last is not None:
            yield last
        last = low, high, masked
    if last is not None:
        yield last


def _halves(
    block_mask: UserFunction, queries: tuple[int, int], begin: int, end: int
) -> Iterator[tuple[int, int, bool]]:
    """The same, before neighbours are joined. What is seen in part is asked about again in halves."""
    if begin >= end:
        return
    found = block_mask.blocks(*queries, begin, end - 1)
    middle = -(-(begin + end) // (2 * LEAST_KEYS)) * LEAST_KEYS
    if found == PARTIAL and begin < middle < end:
        yield from _halves(block_mask, queries, begin, middle)
        yield from _halves(block_mask, queries, middle, end)
    elif found != SKIP:
        yield begin, end, found == PARTIAL
