"""Rows of the storage, or of whole arrays, as float32."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvnumba.backends.cpu.codecs import decode_rows
from kvnumba.backends.cpu.jit import borrowed, kernel, plain
from kvnumba.backends.cpu.storage import Rows, Storage, find_row


class ReadJob(NamedTuple):
    """Of `read`: the first `length` tokens of sequences, into k (B, H, length, D) and v (B, H, length, Dv), flat."""

    block_table: Any
    length: int
    storage: Storage
    k: Any
    v: Any


class DecodeJob(NamedTuple):
    """Of `decode`: rows, and where their elements go, row after row."""

    rows: Rows
    out: Any


@plain
def read_rows(block_table, length, storage, rows, out, item, end):
    """Gather the tokens from number `item` to number `end` of all tokens of all heads of all sequences."""
    num_heads, block_size = storage.num_heads, storage.block_size
    while item < end:
        position = item % length
        blocks = block_table[item // length // num_heads]
        row = find_row(
            blocks, position, storage.first_block, block_size, num_heads, item // length % num_heads
        )
        run = min(end - item, length - position, block_size - position % block_size)
        decode_rows(rows, row, run, out, item * rows.head_dim)
        item += run


@kernel
def read(static, worker, workers, job):
    """Gather keys and values."""
    block_table, length, storage, k, v = borrowed(job)
    count = block_table.shape[0] * storage.num_heads * length
    item, end = worker * count // workers, (worker + 1) * count // workers
    for rows, out in ((storage.keys, k), (storage.values, v)):
        read_rows(block_table, length, storage, rows, out, item, end)


@kernel
def decode(static, worker, workers, job):
    """Decode rows."""
    rows, out = borrowed(job)
    count = rows.codes.shape[0]
    begin, end = worker * count // workers, (worker + 1) * count // workers
    decode_rows(rows, begin, end - begin, out, begin * rows.head_dim)
