"""Keys and values on their way to kernels for many rows, which want them in one kind of number."""

from __future__ import annotations

from kvnumba.backends.cpu.codecs import BFLOAT16, decode_row, encode_values, interleave_rows
from kvnumba.backends.cpu.jit import plain


@plain
def stage_floats(codes, row, count, fmt, scale, zero, head_dim, tile):
    """Rows of the storage into a tile of float32."""
    for t in range(count):
        decode_row(codes, row + t, fmt, scale, zero, tile, t * head_dim, head_dim)


@plain
def stage_bfloat16(codes, row, fmt, scale, zero, head_dim, tile, tile_bytes, to):
    """A row of the storage as bfloat16, from byte `to` of the tile on; its last row is overwritten."""
    spare = tile.shape[0] - head_dim
    decode_row(codes, row, fmt, scale, zero, tile, spare, head_dim)
    encode_values(tile, spare, head_dim, BFLOAT16, tile_bytes, to, scale, zero, 0)


@plain
def stage_keys(codes, row, count, fmt, scale, zero, pairs, head_dim, tile, tile_bytes):
    """Rows of the storage into a tile of float32, or of bfloat16 if `pairs`."""
    if pairs:
        for t in range(count):
            stage_bfloat16(codes, row + t, fmt, scale, zero, head_dim, tile, tile_bytes, t * 2 * head_dim)
    else:
        stage_floats(codes, row, count, fmt, scale, zero, head_dim, tile)


@plain
def stage_values(codes, row, count, fmt, scale, zero, pairs, head_dim, tile, tile_bytes):
    """Rows of the storage into a tile of float32, or if `pairs` of bfloat16, two tokens side by side.

    The partner of an odd last token is itself: its weight is 0.
    """
    if not pairs:
        stage_floats(codes, row, count, fmt, scale, zero, head_dim, tile)
        return
    row_bytes = 2 * head_dim
    two = 4 * (tile.shape[0] - 2 * head_dim)  # where the last row but one begins, in bytes
    for t in range(0, count, 2):
        partner = min(t + 1, count - 1)
        if fmt == BFLOAT16:
            first, second = (row + t) * row_bytes, (row + partner) * row_bytes
            interleave_rows(codes, first, second, head_dim, tile_bytes, t * row_bytes)
        else:
            stage_bfloat16(codes, row + t, fmt, scale, zero, head_dim, tile, tile_bytes, two)
            stage_bfloat16(
                codes, row + partner, fmt, scale, zero, head_dim, tile, tile_bytes, two + row_bytes
            )
            interleave_rows(tile_bytes, two, two + row_bytes, head_dim, tile_bytes, t * row_bytes)
