"""How a batch lies in device memory: one vector of int32, uploaded once for all layers.

``query_start_loc`` (B + 1,), ``seq_lens`` (B,), then ``block_table`` (B, max_blocks).
"""

from __future__ import annotations

import numpy as np

from kvnumba.backends.cuda.intrinsics import load_int, quotient
from kvnumba.backends.cuda.jit import device
from kvnumba.backends.cuda.memory import Pool
from kvnumba.storage import Batch


class Tables:
    """A batch, and its tables on the device once a call has needed them there."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.num_seqs, self.max_blocks = batch.block_table.shape
        self.num_tokens = batch.num_tokens
        self._address: int | None = None

    def address(self, pool: Pool, stream: int) -> int:
        """Of the tables; the stream that asks first uploads them."""
        if self._address is None:
            batch = self.batch
            self._address = pool.put(
                self,
                np.concatenate((batch.query_start_loc, batch.seq_lens, batch.block_table.reshape(-1))),
                stream,
            )
        return self._address


@device
def find_sequence(tables, num_seqs, token):
    """The sequence that a packed token belongs to: the last that begins at it or before."""
    low, high = 0, num_seqs - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if load_int(tables + 4 * middle) <= token:
            low = middle
        else:
            high = middle - 1
    return low


@device
def position_of(tables, num_seqs, sequence, token):
    """Where in its sequence a packed token stands."""
    following = load_int(tables + 4 * (sequence + 1))
    length = load_int(tables + 4 * (num_seqs + 1 + sequence))
    return length - following + token


@device
def find_slab(blocks, position, block_size, num_heads, head):
    """The number of the slab where a token of a sequence lies, whose block ids are at `blocks`."""
    return load_int(blocks + 4 * quotient(position, block_size)) * num_heads + head


@device
def blocks_of(tables, num_seqs, max_blocks, sequence):
    """The address of a sequence's block ids."""
    return tables + 4 * (2 * num_seqs + 1 + sequence * max_blocks)
