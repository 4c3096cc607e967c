"""New tokens into their slots, and whole arrays into a format."""

from __future__ import annotations

from kvnumba.backends.cpu.codecs import encode_row, place
from kvnumba.backends.cpu.jit import kernel, plain

CHUNK = 32  # tokens of a head that are written together: runs that the memory system streams


@plain
def write_chunk(
    x, strides, begin, end, slot_mapping, first_block, block_size, num_heads, head_dim, codes, scale, zero, fmt
):  # fmt: skip
    """Encode some tokens; rows of the storage are numbered (block * H + head) * block_size + offset."""
    for head in range(num_heads):
        for token in range(begin, end):
            slot = slot_mapping[token]
            row = ((first_block + slot // block_size) * num_heads + head) * block_size + slot % block_size
            encode_row(x, place(token, head, strides), head_dim, fmt, codes, row, scale, zero)


@kernel
def write(static, worker, workers, job):
    """Encode the keys and values of new tokens where the slot mapping says.

    k and v are the memory of views (B, n, H, D), with strides as `place` takes them.
    """
    (
        k, v, strides, slot_mapping, first_block, block_size, num_heads, head_dim,
        k_codes, k_scale, k_zero, k_format, v_codes, v_scale, v_zero, v_format,
    ) = job  # fmt: skip
    count = slot_mapping.shape[0]
    end_of_share = (worker + 1) * count // workers
    for begin in range(worker * count // workers, end_of_share, CHUNK):
        end = min(begin + CHUNK, end_of_share)
        write_chunk(
            k, strides[0], begin, end, slot_mapping, first_block, block_size, num_heads, head_dim,
            k_codes, k_scale, k_zero, k_format,
        )  # fmt: skip
        write_chunk(
            v, strides[1], begin, end, slot_mapping, first_block, block_size, num_heads, head_dim,
            v_codes, v_scale, v_zero, v_format,
        )  # fmt: skip


@kernel
def encode(static, worker, workers, job):
    """Encode rows, one after the other in a flat x."""
    x, head_dim, codes, scale, zero, fmt = job
    count = codes.shape[0]
    for row in range(worker * count // workers, (worker + 1) * count // workers):
        encode_row(x, row * head_dim, head_dim, fmt, codes, row, scale, zero)
