"""kvnumba's side of a problem."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from shapes import Problem

import kvnumba
from kvnumba.commands.bench import shuffle


def paged(
    problem: Problem, fmt: str, backend: str
) -> tuple[kvnumba.PagedKVCache, list[int], Callable[[], np.ndarray]]:
    """A paged cache that holds the problem, its sequences, and their attention as a call without arguments.

    What is stored in bfloat16 is also multiplied in bfloat16, as peers do; otherwise the backend chooses.
    """
    batch, new, num_qo_heads, head_dim = problem.q.shape
    length, num_kv_heads = problem.k.shape[1:3]
    size, blocks = problem.block_size, problem.block_table.shape[1]
    cache = kvnumba.PagedKVCache(
        batch * blocks, size, num_kv_heads, head_dim, batch * blocks, fmt, backend=backend
    )
    shuffle(cache)
    ids = [cache.add_sequence() for _ in range(batch)]
    for seq_id, k, v in zip(ids, problem.k, problem.v, strict=True):
        for start in range(0, length - new, 4096):
            part = slice(start, min(start + 4096, length - new))
            cache.update(seq_id, k[part].swapaxes(0, 1), v[part].swapaxes(0, 1))
    step = cache.step(ids, [new] * batch)
    step.write(*(x[:, length - new :].reshape(-1, num_kv_heads, head_dim) for x in (problem.k, problem.v)))
    q = problem.q.reshape(-1, num_qo_heads, head_dim)
    arithmetic = "bfloat16" if fmt == "bfloat16" else None
    return cache, ids, lambda: step.attend(q, arithmetic=arithmetic).reshape(problem.q.shape)
