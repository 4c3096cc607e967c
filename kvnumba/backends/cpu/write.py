"""New tokens into their slots, and whole arrays into a format."""

from __future__ import annotations

from numba import prange

from kvnumba.backends.cpu.codecs import encode_row, place
from kvnumba.backends.cpu.jit import kernel, plain


@plain
def write_token(x, strides, token, slot, first_block, block_size, num_heads, head_dim, fmt, codes, scale, zero):
    """Encode all heads of a token; rows of the storage are numbered (block * H + head) * block_size + offset."""
    block = first_block + slot // block_size
    for head in range(num_heads):
        row = (block * num_heads + head) * block_size + slot % block_size
        encode_row(x, place(token, head, strides), head_dim, fmt, codes, row, scale, zero)


@plain
def write_tokens(
    begin, end, k, k_strides, v, v_strides, slot_mapping, first_block, block_size, num_heads, head_dim,
    k_format, k_codes, k_scale, k_zero, v_format, v_codes, v_scale, v_zero,
):  # fmt: skip
    """Encode the keys and values of some of the tokens."""
    for token in range(begin, end):
        slot = slot_mapping[token]
        write_token(
            k, k_strides, token, slot, first_block, block_size, num_heads, head_dim,
            k_format, k_codes, k_scale, k_zero,
        )  # fmt: skip
        write_token(
            v, v_strides, token, slot, first_block, block_size, num_heads, head_dim,
            v_format, v_codes, v_scale, v_zero,
        )  # fmt: skip


@kernel
def write(
    static, workers, k, k_strides, v, v_strides, slot_mapping, first_block, block_size, num_heads, head_dim,
    k_format, k_codes, k_scale, k_zero, v_format, v_codes, v_scale, v_zero,
):  # fmt: skip
    """Encode the keys and values of new tokens where the slot mapping says.

    k and v are the memory of views (B, n, H, D), with strides as `place` takes them.
    """
    count = slot_mapping.shape[0]
    if workers == 1:
        write_tokens(
            0, count, k, k_strides, v, v_strides, slot_mapping, first_block, block_size, num_heads, head_dim,
            k_format, k_codes, k_scale, k_zero, v_format, v_codes, v_scale, v_zero,
        )  # fmt: skip
        return
    for worker in prange(workers):
        write_tokens(
            worker * count // workers, (worker + 1) * count // workers,
            k, k_strides, v, v_strides, slot_mapping, first_block, block_size, num_heads, head_dim,
            k_format, k_codes, k_scale, k_zero, v_format, v_codes, v_scale, v_zero,
        )  # fmt: skip


@kernel
def encode(static, workers, x, head_dim, fmt, codes, scale, zero):
    """Encode rows, one after the other in a flat x."""
    count = codes.shape[0]
    for worker in prange(workers):
        for row in range(worker * count // workers, (worker + 1) * count // workers):
            encode_row(x, row * head_dim, head_dim, fmt, codes, row, scale, zero)
