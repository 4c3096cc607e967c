"""Rows of the storage, or of whole arrays, as float32."""

from __future__ import annotations

from kvnumba.backends.cpu.codecs import decode_row
from kvnumba.backends.cpu.jit import kernel


@kernel
def read(static, worker, workers, job):
    """Gather the first `length` tokens of sequences into a flat out, (B, H, length, D)."""
    block_table, first_block, block_size, length, num_heads, head_dim, codes, scale, zero, fmt, out = job
    count = block_table.shape[0] * num_heads * length
    item, end = worker * count // workers, (worker + 1) * count // workers
    while item < end:
        position = item % length
        head = item // length % num_heads
        offset = position % block_size
        block = first_block + block_table[item // length // num_heads, position // block_size]
        row = (block * num_heads + head) * block_size + offset
        run = min(end - item, length - position, block_size - offset)
        for t in range(run):
            decode_row(codes, row + t, fmt, scale, zero, out, (item + t) * head_dim, head_dim)
        item += run


@kernel
def decode(static, worker, workers, job):
    """Decode rows, one after the other in a flat out."""
    head_dim, codes, scale, zero, fmt, out = job
    count = codes.shape[0]
    for row in range(worker * count // workers, (worker + 1) * count // workers):
        decode_row(codes, row, fmt, scale, zero, out, row * head_dim, head_dim)
