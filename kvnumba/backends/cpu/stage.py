"""Keys and values on their way to kernels for many rows, which want them in one kind of number."""

from __future__ import annotations

from kvnumba.backends.cpu.codecs import BFLOAT16, decode_row, encode_values, interleave_rows
from kvnumba.backends.cpu.jit import plain


@plain
def stage_keys(codes, row, count, fmt, scale, zero, pairs, head_dim, tile, tile_bytes):
    """Rows of the storage into a tile of float32, or of bfloat16 if `pairs`."""
    if not pairs:
        for t in range(count):
            decode_row(codes, row + t, fmt, scale, zero, tile, t * head_dim, head_dim)
        return
    spare = tile.shape[0] - head_dim
    for t in range(count):
        to = t * 2 * head_dim
        decode_row(codes, row + t, fmt, scale, zero, tile, spare, head_dim)
        encode_values(tile, spare, head_dim, BFLOAT16, tile_bytes, to, scale, zero, 0)


@plain
def stage_values(codes, row, count, fmt, scale, zero, pairs, head_dim, tile, tile_bytes):
    """Rows of the storage into a tile of float32, or if `pairs` of bfloat16, two tokens side by side.

    The partner of an odd last token is the row after it, or itself: its weight is 0.
    """
    if not pairs:
        for t in range(count):
            decode_row(codes, row + t, fmt, scale, zero, tile, t * head_dim, head_dim)
        return
    spare = tile.shape[0] - head_dim
    two = 4 * (spare - head_dim)
    for t in range(0, count, 2):
        to, partner = t * 2 * head_dim, min(t + 1, count - 1)
        if fmt == BFLOAT16:
            first, second = (row + t) * 2 * head_dim, (row + partner) * 2 * head_dim
            interleave_rows(codes, first, second, head_dim, tile_bytes, to)
        else:
            for n, source in enumerate((t, partner)):
                decode_row(codes, row + source, fmt, scale, zero, tile, spare, head_dim)
                encode_values(
                    tile, spare, head_dim, BFLOAT16, tile_bytes, two + n * 2 * head_dim, scale, zero, 0
                )
            interleave_rows(tile_bytes, two, two + 2 * head_dim, head_dim, tile_bytes, to)
