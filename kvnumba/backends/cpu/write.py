"""New tokens into their slots, and whole arrays into a format."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kvnumba.backends.cpu.codecs import encode_row
from kvnumba.backends.cpu.jit import borrowed, kernel, plain
from kvnumba.backends.cpu.storage import ALIGNMENT, Rows, Storage, memory_of, offset_of
from kvnumba.backends.cpu.transforms import KEYS, VALUES, is_transformed, prefetch_row, transform_each

CHUNK = 32  # tokens of a head that are written together: runs that the memory system streams
AHEAD = 4  # rows from one that is transformed to the one that is fetched: the processor does not look that far itself


class WriteJob(NamedTuple):
    """Of `write`: k (B, n, H, D), v (B, n, H, Dv), and the slot of each token, (T,) int64, negative for none."""

    k: Any
    v: Any
    slot_mapping: Any
    storage: Storage


class EncodeJob(NamedTuple):
    """Of `encode`: all elements, row after row, and where they go."""

    x: Any
    rows: Rows


@plain
def write_chunk(x, begin, end, slot_mapping, storage, rows, kind, scratch):
    """Encode the tokens from `begin` to `end` as keys, or as values; those with a negative slot belong nowhere."""
    memory, block_size, num_heads = memory_of(x), storage.block_size, storage.num_heads
    transformed = is_transformed(storage.transform)
    for head in range(num_heads):
        for token in range(begin, end):
            slot = slot_mapping[token]
            if slot < 0:
                continue
            block = storage.first_block + slot // block_size
            row = (block * num_heads + head) * block_size + slot % block_size
            start = offset_of(x, token, head)
            if not transformed:
                encode_row(memory, start, rows, row)
                continue
            later, of = token + AHEAD, head
            if later >= end:
                later, of = min(later - end + begin, end - 1), min(head + 1, num_heads - 1)
            prefetch_row(memory, offset_of(x, later, of), rows.head_dim)
            transform_each(memory, start, storage.transform, kind, head, rows.head_dim, scratch, 0)
            encode_row(scratch, 0, rows, row)


@kernel
def write(static, worker, workers, job):
    """Encode the keys and values of new tokens where the slot mapping says."""
    k, v, slot_mapping, storage = borrowed(job)
    count, transform = slot_mapping.shape[0], storage.transform
    # a row on its way, from a cache line on: vectors that straddle two take longer
    scratch = np.empty(transform.rows.shape[1] + ALIGNMENT // 4, np.float32)
    scratch = scratch[-(scratch.ctypes.data // 4) % (ALIGNMENT // 4) :]
    end_of_share = (worker + 1) * count // workers
    for x, rows, kind in ((k, storage.keys, KEYS), (v, storage.values, VALUES)):
        for begin in range(worker * count // workers, end_of_share, CHUNK):
            end = min(begin + CHUNK, end_of_share)
            write_chunk(x, begin, end, slot_mapping, storage, rows, kind, scratch)


@kernel
def encode(static, worker, workers, job):
    """Encode rows, one after the other in a flat x."""
    x, rows = borrowed(job)
    count = rows.codes.shape[0]
    for row in range(worker * count // workers, (worker + 1) * count // workers):
        encode_row(x, row * rows.head_dim, rows, row)
