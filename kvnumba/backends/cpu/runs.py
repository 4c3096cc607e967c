"""The runs of a phase: tokens of a sequence whose rows lie side by side in the storage."""

from __future__ import annotations

from kvnumba.backends.cpu.jit import inlined, plain
from kvnumba.backends.cpu.shapes import AHEAD, Run
from kvnumba.backends.cpu.storage import find_row

# Columns of the table of runs.
RUN_ROW, RUN_TOKENS, RUN_SCORES, RUN_KEY = range(4)


@inlined
def list_runs(shape, blocks, key, end, storage, head, runs):
    """List runs from `key` on, up to a phase of them; returns how many, and where the next one begins, or `end`.

    The block of `key` is there, as `next_stored` finds it. Entries after the last hold the rows of as many following
    runs as are prefetched.
    """
    first_block, block_size, num_heads = storage.first_block, storage.block_size, storage.num_heads
    tokens = max(shape.tokens, 2)  # weights may be taken in pairs
    n, used = 0, 0
    while key < end and used < shape.phase:
        count = min(block_size - key % block_size, end - key, shape.phase - used)
        runs[n, RUN_ROW] = find_row(blocks, key, first_block, block_size, num_heads, head)
        runs[n, RUN_TOKENS] = count
        runs[n, RUN_SCORES] = used * shape.columns
        runs[n, RUN_KEY] = key
        used += (count + tokens - 1) // tokens * tokens
        key = next_stored(blocks, key + count, end, block_size)
        n += 1
    following, row = key, runs[n - 1, RUN_ROW]
    for further in range(runs_ahead(block_size)):
        if following < end:
            row = find_row(blocks, following, first_block, block_size, num_heads, head)
            following = next_stored(blocks, following + block_size - following % block_size, end, block_size)
        runs[n + further, RUN_ROW] = row
    return n, key


@plain
def next_stored(blocks, key, end, block_size):
    """The first key from `key` on, and before `end`, whose block is there; `end` where there is none."""
    while key < end and blocks[key // block_size] < 0:
        key += block_size - key % block_size
    return min(key, end)


@plain
def runs_ahead(block_size):
    """Runs from one that is read to the one that is prefetched."""
    return max(1, AHEAD // block_size)


@plain
def run_of(runs, n):
    """A row of the table of runs."""
    return Run(runs[n, RUN_ROW], runs[n, RUN_TOKENS], runs[n, RUN_SCORES], runs[n, RUN_KEY])
