"""Tables of integers in device memory, uploaded once for all layers.

Those of a batch lie in one vector of int32: ``query_start_loc`` (B + 1,), ``positions`` (B,), then ``block_table``
(B, max_blocks).
"""

from __future__ import annotations

import numpy as np

from kvnumba.backends.cuda import memory
from kvnumba.backends.cuda.intrinsics import load_int, quotient
from kvnumba.backends.cuda.jit import device
from kvnumba.backends.cuda.memory import Loan, Pool
from kvnumba.storage import Batch


class Upload:
    """Vectors of int32 that go to the device in one copy, when the address of one of them is first asked for."""

    def __init__(self) -> None:
        self._vectors: list[np.ndarray] = []
        self._length = 0
        self._loan: Loan | None = None
        self._host = np.empty(0, np.int32)

    @property
    def sent(self) -> bool:
        """Whether nothing can be added any more."""
        return self._loan is not None

    def add(self, vector: np.ndarray) -> int:
        """Let a vector come along; returns where it begins, in bytes."""
        self._vectors.append(vector)
        self._length += vector.size
        return 4 * (self._length - vector.size)

    def address(self, pool: Pool, stream: int) -> int:
        """Of the first vector; the stream that asks first uploads them."""
        if self._loan is None:
            self._host = np.concatenate(self._vectors, dtype=np.int32)
            self._loan = pool.put(self._host, stream)
        return self._loan.address

    def sent_vector(self, begin: int, size: int) -> np.ndarray:
        """What was sent of a vector that begins at so many bytes: to be changed, and sent with `again`."""
        return self._host[begin // 4 : begin // 4 + size]

    def again(self, stream: int) -> None:
        """Send all vectors as they are now to where they were, after all that the stream has to do."""
        assert self._loan is not None
        memory.upload(self._loan.address, self._host, stream)


class Tables:
    """The tables of a batch, first in an upload that others may join."""

    def __init__(self, batch: Batch, upload: Upload) -> None:
        self.upload = upload
        self.begin = upload.add(_vector_of(batch))

    def update(self, batch: Batch) -> None:
        """Let the upload, which is sent again, have the tables of a batch of the same shape."""
        vector = _vector_of(batch)
        self.upload.sent_vector(self.begin, vector.size)[:] = vector

    def address(self, pool: Pool, stream: int) -> int:
        """Of the tables on the device."""
        return self.upload.address(pool, stream) + self.begin


def _vector_of(batch: Batch) -> np.ndarray:
    return np.concatenate((batch.query_start_loc, batch.positions, batch.block_table.reshape(-1)))


def tables_of(batch: Batch, upload: Upload | None = None) -> Tables:
    """The batch's tables, made once; with an upload of their own unless one is given."""
    kept: Tables | None = batch.kept.get(Tables)
    if kept is None:
        kept = batch.kept[Tables] = Tables(batch, Upload() if upload is None else upload)
    return kept


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
    first_token = load_int(tables + 4 * sequence)
    return load_int(tables + 4 * (num_seqs + 1 + sequence)) + token - first_token


@device
def find_slab(blocks, position, block_size, num_heads, head):
    """The number of the slab where a token of a sequence lies, whose block ids are at `blocks`.

    Negative where the block is not there.
    """
    return load_int(blocks + 4 * quotient(position, block_size)) * num_heads + head


@device
def blocks_of(tables, num_seqs, max_blocks, sequence):
    """The address of a sequence's block ids."""
    return tables + 4 * (2 * num_seqs + 1 + sequence * max_blocks)
