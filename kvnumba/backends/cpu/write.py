"""New tokens into their slots, and whole arrays into a format."""

from __future__ import annotations

from kvnumba.backends.cpu.codecs import encode_row, place
from kvnumba.backends.cpu.jit import kernel, plain


@plain
def write_token(
    x, strides, token, slot, first_block, block_size, num_heads, head_dim, fmt, codes, scale, zero
):
    """Encode all heads of a token; rows of the storage are numbered (block * H + head) * block_size + offset."""
    block = first_block + slot // block_size
    for head in range(num_heads):
        row = (block * num_heads + head) * block_size + slot % block_size
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
    for token in range(worker * count // workers, (worker + 1) * count // workers):
        slot = slot_mapping[token]
        write_token(
            k, strides[0], token, slot, first_block, block_size, num_heads, head_dim,
            k_format, k_codes, k_scale, k_zero,
        )  # fmt: skip
        write_token(
            v, strides[1], token, slot, first_block, block_size, num_heads, head_dim,
            v_format, v_codes, v_scale, v_zero,
        )  # fmt: skip


@kernel
def encode(static, worker, workers, job):
    """Encode rows, one after the other in a flat x."""
    x, head_dim, codes, scale, zero, fmt = job
    count = codes.shape[0]
    for row in range(worker * count // workers, (worker + 1) * count // workers):
        encode_row(x, row * head_dim, head_dim, fmt, codes, row, scale, zero)
