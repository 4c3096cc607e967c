"""Rows of the storage, or of whole arrays, as float32."""

from __future__ import annotations

from numba import prange

from kvnumba.backends.cpu.jit import kernel, plain
from kvnumba.backends.cpu.rows import decode_rows


@plain
def decode_range(codes, scale, zero, format_id, first, count, out):
    """Read `count` rows from row `first` on; `codes`, `scale` and `zero` are all rows of the storage."""
    run = codes[first : first + count].reshape(-1)
    decode_rows(run, scale[first : first + count], zero[first : first + count], format_id, out)


@plain
def gather(codes, scale, zero, format_id, blocks, first_block, block_size, num_heads, head, begin, end, out):
    """Read positions `begin` to `end` of a sequence for one head into out (end - begin, D)."""
    position = begin
    while position < end:
        offset = position % block_size
        count = min(block_size - offset, end - position)
        block = first_block + blocks[position // block_size]
        row = (block * num_heads + head) * block_size + offset
        done = position - begin
        decode_range(codes, scale, zero, format_id, row, count, out[done : done + count])
        position += count


@kernel
def read(codes, scale, zero, format_id, blocks, first_block, block_size, out):
    """Gather a sequence: out (H, length, D), length at most what the blocks hold."""
    num_heads, length, _ = out.shape
    num_chunks = (length + block_size - 1) // block_size if block_size < 256 else (length + 255) // 256
    chunk = block_size if block_size < 256 else 256
    for i in prange(num_heads * num_chunks):
        head = i // num_chunks
        begin = i % num_chunks * chunk
        end = min(begin + chunk, length)
        gather(
            codes, scale, zero, format_id, blocks, first_block, block_size, num_heads, head, begin, end,
            out[head, begin:end],
        )  # fmt: skip


@kernel
def decode(codes, scale, zero, format_id, out):
    """Decode rows into out (N, D)."""
    for i in prange(out.shape[0]):
        decode_range(codes, scale, zero, format_id, i, 1, out[i : i + 1])
