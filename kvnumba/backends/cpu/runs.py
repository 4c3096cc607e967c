"""The runs of a phase: tokens of a sequence whose rows lie side by side in the storage."""

from __future__ import annotations

import numpy as np

from kvnumba.backends.cpu.jit import inlined, plain
from kvnumba.backends.cpu.shapes import AHEAD, Run
from kvnumba.backends.cpu.storage import find_row

# Columns of the table of runs.
RUN_ROW, RUN_TOKENS, RUN_SCORES, RUN_KEY = range(4)


@inlined
def list_runs(shape, blocks, key, end, storage, head, runs):
    """List runs from `key` on, up to a phase of them; returns how many, and the key after them.

    Blocks that are not there are passed over: the last phase may be without runs. Entries after the last hold the rows
    of as many following runs as are prefetched.
    """
    first_block, block_size, num_heads = storage.first_block, storage.block_size, storage.num_heads
    tokens = max(shape.tokens, 2)  # weights may be taken in pairs
    n, used = 0, 0
    while key < end and used < shape.phase:
        count = min(block_size - key % block_size, end - key, shape.phase - used)
        if blocks[key // block_size] >= 0:
            runs[n, RUN_ROW] = find_row(blocks, key, first_block, block_size, num_heads, head)
            runs[n, RUN_TOKENS] = count
            runs[n, RUN_SCORES] = used * shape.columns
            runs[n, RUN_KEY] = key
            used += (count + tokens - 1) // tokens * tokens
            n += 1
        key += count
    following, row = key, np.int64(0)
    for further in range(runs_ahead(block_size)):
        while following < end and blocks[following // block_size] < 0:
            following += block_size - following % block_size
        if following < end:
            row = find_row(blocks, following, first_block, block_size, num_heads, head)
            following += block_size - following % block_size
        runs[n + further, RUN_ROW] = row
    return n, key


@plain
def runs_ahead(block_size):
    """Runs from one that is read to the one that is prefetched."""
    return max(1, AHEAD // block_size)


@plain
def run_of(runs, n):
    """A row of the table of runs."""
    return Run(runs[n, RUN_ROW], runs[n, RUN_TOKENS], runs[n, RUN_SCORES], runs[n, RUN_KEY])
