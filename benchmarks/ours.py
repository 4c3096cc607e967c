"""kvnumba's side of a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from shapes import Problem

import kvnumba
from kvnumba.backends import cpu
from kvnumba.caches.step import Step
from kvnumba.commands.bench import shuffle
from kvnumba.formats import FORMATS


class Paged(NamedTuple):
    """A paged cache that holds a problem, its sequences, and their attention as a call without arguments."""

    cache: kvnumba.PagedKVCache
    seq_ids: list[int]
    attend: Callable[[], np.ndarray]
    step: Step


def paged(problem: Problem, fmt: str, backend: str) -> Paged:
    """The problem in blocks of a format."""
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
    return Paged(
        cache, ids, lambda: step.attend(q, arithmetic=arithmetic(fmt)).reshape(problem.q.shape), step
    )


def arithmetic(fmt: str) -> str | None:
    """bfloat16 where peers multiply in it: what is stored so, and on tiles also codes. Else the backend chooses."""
    on_tiles = cpu.tiles.instructions() is not None
    return "bfloat16" if fmt == "bfloat16" or (on_tiles and FORMATS[fmt].bits <= 8) else None


def kernels(problem: Problem, fmt: str, step: Step) -> str:
    """Which kernels the cpu backend takes for a problem."""
    num_qo_heads, head_dim = problem.q.shape[2:]
    scoring = kvnumba.Scoring.of(num_qo_heads, head_dim, arithmetic=arithmetic(fmt))
    return cpu.describe_plan(step._pass._plan(num_qo_heads, scoring), scoring)
