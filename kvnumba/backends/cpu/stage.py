"""Keys and values on their way to kernels for many rows, which want them in one kind of number."""

from __future__ import annotations

from kvnumba.backends.cpu.codecs import BFLOAT16, decode_row, interleave_rows
from kvnumba.backends.cpu.jit import plain


@plain
def stage_rows(codes, row, count, fmt, scale, zero, head_dim, tile):
    """Rows of the storage into a tile, of float32 or of bfloat16."""
    for t in range(count):
        decode_row(codes, row + t, fmt, scale, zero, tile, t * head_dim, head_dim)


@plain
def stage_keys(codes, row, count, fmt, scale, zero, pairs, head_dim, tile, tile_words):
    """Rows of the storage into a tile of float32, or of bfloat16 if `pairs`."""
    if pairs:
        stage_rows(codes, row, count, fmt, scale, zero, head_dim, tile_words)
    else:
        stage_rows(codes, row, count, fmt, scale, zero, head_dim, tile)


@plain
def stage_values(codes, row, count, fmt, scale, zero, pairs, head_dim, tile, tile_words):
    """Rows of the storage into a tile of float32, or if `pairs` of bfloat16, two tokens side by side.

    The partner of an odd last token is itself: its weight is 0.
    """
    if not pairs:
        stage_rows(codes, row, count, fmt, scale, zero, head_dim, tile)
        return
    row_bytes = 2 * head_dim
    spare = tile_words.shape[0] - 2 * head_dim  # the last row of the tile holds two
    for t in range(0, count, 2):
        partner = min(t + 1, count - 1)
        if fmt == BFLOAT16:
            first, second = (row + t) * row_bytes, (row + partner) * row_bytes
            interleave_rows(codes, first, second, head_dim, tile_words, t * row_bytes)
        else:
            decode_row(codes, row + t, fmt, scale, zero, tile_words, spare, head_dim)
            decode_row(codes, row + partner, fmt, scale, zero, tile_words, spare + head_dim, head_dim)
            interleave_rows(tile_words, 2 * spare, 2 * spare + row_bytes, head_dim, tile_words, t * row_bytes)
