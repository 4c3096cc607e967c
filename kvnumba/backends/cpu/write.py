"""New tokens into their slots, and whole arrays into a format."""

from __future__ import annotations

from numba import prange

from kvnumba.backends.cpu.jit import kernel
from kvnumba.backends.cpu.rows import encode_row, place


@kernel
def write(
    x, strides, slot_mapping, first_block, block_size, num_heads, head_dim, format_id, codes, scale, zero
):
    """Encode the rows of new tokens where the slot mapping says.

    x is the memory of a view (B, n, H, D), `strides` as `place` takes them; rows of the storage are numbered
    ``(block * H + head) * block_size + offset``.
    """
    for i in prange(slot_mapping.shape[0] * num_heads):
        token = i // num_heads
        head = i % num_heads
        start = place(token, head, strides)
        block = first_block + slot_mapping[token] // block_size
        row = (block * num_heads + head) * block_size + slot_mapping[token] % block_size
        encode_row(x[start : start + head_dim], format_id, codes[row], scale[row], zero[row])


@kernel
def encode(x, format_id, codes, scale, zero):
    """Encode rows (N, D) into rows."""
    for i in prange(x.shape[0]):
        encode_row(x[i], format_id, codes[i], scale[i], zero[i])
