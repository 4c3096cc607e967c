"""What a block of an attention kernel works on: a piece of the plan, and rows, a token and a query head each.

Row r of a piece is token ``first_token + r // heads``, query head ``first_head + r % heads``.
"""

from __future__ import annotations

from typing import NamedTuple

from kvnumba.backends.cuda.intrinsics import load_int, quotient
from kvnumba.backends.cuda.jit import Long, device, int32, int64
from kvnumba.backends.cuda.plan import (
    END_KEY,
    FIRST_KEY,
    FIRST_TOKEN,
    NUM_TOKENS,
    PIECE_COLUMNS,
    POSITION,
    SEQUENCE,
)
from kvnumba.backends.cuda.tables import blocks_of


class Piece(NamedTuple):
    """A piece and the block's heads of it.

    Attributes
    ----------
    address : Long
        Of its row in the table.
    blocks : Long
        Of its sequence's block ids.
    first_token, num_tokens, position : int
        Its tokens, and where the first of them stands in the sequence.
    begin, end : int
        Its keys.
    kv_head, first_head, heads : int
    used : int
        Rows.
    column : int
        Of the grid.
    """

    address: Long
    blocks: Long
    first_token: int
    num_tokens: int
    position: int
    begin: int
    end: int
    kv_head: int
    first_head: int
    heads: int
    used: int
    column: int


@device
def open_piece(work, number, column):
    """The piece with a number, and the heads of the blocks in a column of the grid, its index along y."""
    address = work.pieces + 4 * PIECE_COLUMNS * int64(number)
    sequence, first_token = load_int(address + 4 * SEQUENCE), load_int(address + 4 * FIRST_TOKEN)
    position, num_tokens = load_int(address + 4 * POSITION), load_int(address + 4 * NUM_TOKENS)
    begin, end = load_int(address + 4 * FIRST_KEY), load_int(address + 4 * END_KEY)
    tiles = quotient(work.group + work.heads - 1, work.heads)
    kv_head = quotient(int32(column), tiles)
    tile = int32(column) - kv_head * tiles
    heads = int32(min(work.heads, work.group - tile * work.heads))
    first_head = int32(kv_head * work.group + tile * work.heads)
    return Piece(
        address,
        blocks_of(work.tables, work.num_seqs, work.max_blocks, sequence),
        first_token,
        num_tokens,
        position,
        begin,
        end,
        kv_head,
        first_head,
        heads,
        int32(num_tokens * heads),
        int32(column),
    )


@device
def token_of(piece, row):
    """Which of the piece's tokens a row is of."""
    return quotient(int32(row), piece.heads)


@device
def query_of(work, piece, token, row):
    """Where in q the query of a row begins, in elements."""
    packed = piece.first_token + token
    if work.tokens != 0:
        packed = load_int(work.tokens + 4 * int64(packed))
    return element_of(
        work.tokens_per_row, work.q_batch, work.q_token, work.q_head, packed, head_of(piece, token, row)
    )


@device
def result_of(call, work, piece, token, row):
    """Where in out the result of a row begins, in elements."""
    packed = piece.first_token + token
    return element_of(
        work.tokens_per_row,
        call.out_batch,
        call.out_token,
        call.out_head,
        packed,
        head_of(piece, token, row),
    )


@device
def head_of(piece, token, row):
    """The query head of a row."""
    return piece.first_head + row - token * piece.heads


@device
def element_of(tokens_per_row, batch, token, head, packed, number):
    """Where the head `number` of a packed token begins in a view (B, n, Hq, ...) with such strides, in elements."""
    row = quotient(int32(packed), tokens_per_row)
    return row * batch + (packed - row * tokens_per_row) * token + number * head


@device
def partial_of(work, row):
    """The address of a partial result: a value's sums, the maximum of the scores, the sum of the weights, 8 bytes."""
    return work.partials + int64(row) * (4 * (work.value_head_dim + 4))
