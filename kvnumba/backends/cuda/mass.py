"""Attention mass: what each key gets from new tokens, computed once their lse is known.

Scores are computed a second time, in float32, in whatever precision they were attended. A block takes `KEYS` keys of a
KV head and all rows that see them, some at a time; a key belongs to one thread, and nothing is added by two.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import float32

from kvnumba.backends.cuda.codecs import Codec, reader
from kvnumba.backends.cuda.intrinsics import (
    barrier,
    index,
    load_float,
    load_fresh,
    load_int,
    quotient,
    remainder,
    store_float,
    vectors,
)
from kvnumba.backends.cuda.jit import THREADS, Kernel, cuda, int64
from kvnumba.backends.cuda.parameters import AttendShape, MassAddresses
from kvnumba.backends.cuda.plan import SEQUENCE
from kvnumba.backends.cuda.rows import open_piece, result_of, token_of
from kvnumba.backends.cuda.scores import HIDDEN, of_sequence, query_loader, scorer
from kvnumba.backends.cuda.tables import find_slab
from kvnumba.backends.cuda.transforms import Transform

KEYS = 128


def shared_bytes(rows: int, head_dim: int) -> int:
    """Queries, two numbers a row, the sum of each key."""
    return 4 * (rows * (head_dim + 2) + KEYS)


@functools.cache
def mass_kernel(
    rows: int,
    kind: str,
    query_width: int,
    key_codec: Codec,
    key_width: int,
    transform: Transform,
    change: Any,
) -> Kernel:
    """Add masses of keys; parameters as those of `attend_kernel`. A block takes all heads of a piece of `KEYS` keys."""
    read_key, of = reader(key_codec, key_width), vectors(rows, key_width)
    load_queries, score_of = query_loader(rows, kind, query_width, transform), scorer(change)
    zero = float32(0)

    def mass(call, work):
        thread = cuda.threadIdx.x
        shared = cuda.shared.array(0, float32)
        query, key = cuda.local.array(query_width, float32), cuda.local.array(key_width, float32)
        channels, product = cuda.local.array(query_width, float32), cuda.local.array(1, float32)
        scores = cuda.local.array(rows, float32)

        piece = open_piece(work, cuda.blockIdx.x, cuda.blockIdx.y)
        origin, shift = of_sequence(work.offsets, piece), of_sequence(work.shifts, piece)
        count, head_dim = piece.end - piece.begin, work.head_dim
        key_chunks = quotient(head_dim, key_width)
        at_offsets = rows * head_dim
        at_lse, at_sums = at_offsets + rows, at_offsets + 2 * rows
        for j in range(thread, count, THREADS):
            shared[index(at_sums + j)] = zero
        for first in range(0, piece.used, rows):
            used = min(rows, piece.used - first)
            barrier()
            for r in range(thread, used, THREADS):
                at = (
                    result_of(call, work, piece, token_of(piece, first + r), first + r) // work.value_head_dim
                )
                shared[index(at_lse + r)] = load_float(call.lse + 4 * at)
            load_queries(call, work, piece, thread, first, shared, at_offsets, query, channels, product)
            for j in range(thread, count, THREADS):
                number = find_slab(
                    piece.blocks, piece.begin + j, work.block_size, work.num_kv_heads, piece.kv_head
                )
                if number >= 0:
                    slab, offset = number * work.slab_bytes, remainder(piece.begin + j, work.block_size)
                    of.clear(scores)
                    for c in range(key_chunks):
                        read_key(
                            call.keys + slab, call.key_scales + slab, offset, c * key_width, head_dim,
                            work.key_group, key,
                        )  # fmt: skip
                        of.dot_rows(scores, shared, c * key_width, head_dim, key)
                    total = zero
                    for r in range(rows):
                        if r < used:
                            score = scores[r] + shared[index(at_offsets + r)]
                            score = score_of(
                                call, work, piece, score, first + r, piece.begin + j, origin, shift
                            )
                            # a row that sees nothing has an lse of -inf, though its scores may be finite
                            if shared[index(at_lse + r)] != HIDDEN:
                                total += math.exp(score - shared[index(at_lse + r)])
                    shared[index(at_sums + j)] += total
        row = int64(load_int(piece.address + 4 * SEQUENCE)) * work.num_kv_heads + piece.kv_head
        for j in range(thread, count, THREADS):
            address = call.mass + 4 * (row * call.longest + origin + piece.begin + j)
            store_float(address, load_fresh(address) + shared[index(at_sums + j)])

    return Kernel(mass, (MassAddresses, AttendShape))
