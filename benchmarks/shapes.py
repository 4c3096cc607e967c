"""The problems that the benchmarks solve, in the shapes of well-known models (`kvnumba.commands.shapes`)."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvnumba import IncrementalDecoder
from kvnumba.commands.shapes import SHAPES

DECODE = {
    **{f"llama-3-8b 1 x {length}": ("llama-3-8b", 1, length, 1, 128) for length in (64, 1024, 8192, 32768, 131072)},
    "llama-3-8b 16 x 4096": ("llama-3-8b", 16, 4096, 1, 128),
    "llama-3-8b 1 x 32768, 5 new": ("llama-3-8b", 1, 32768, 5, 128),
    "llama-3-8b 1 x 32768, blocks of 16": ("llama-3-8b", 1, 32768, 1, 16),
    "llama-2-7b 1 x 8192": ("llama-2-7b", 1, 8192, 1, 128),
    "qwen3-32b 1 x 32768": ("qwen3-32b", 1, 32768, 1, 128),
    "gemma-2-9b 1 x 8192": ("gemma-2-9b", 1, 8192, 1, 128),
    "bundled 1 x 4096, real text": ("bundled", 1, 4096, 1, 128),
}  # fmt: skip
PREFILL = {
    "llama-3-8b 512 new on 8192": ("llama-3-8b", 1, 8192, 512, 128),
    "bundled 512 new on 4096, real text": ("bundled", 1, 4096, 512, 128),
}
"""Name -> arguments of `problem`: model, sequences, length, new tokens of each sequence, block size."""


class Problem(NamedTuple):
    """Attention of the newest n tokens of B sequences of one length, in shuffled blocks."""

    q: np.ndarray  # (B, n, Hq, D) float32
    k: np.ndarray  # (B, S, H, D) float32
    v: np.ndarray
    block_table: np.ndarray  # (B, blocks) int32
    block_size: int


@functools.lru_cache(1)
def problem(model: str, batch: int, length: int, new: int, block_size: int) -> Problem:
    """Random queries, keys and values; or, of the model "bundled", those of its third layer over real text."""
    rng = np.random.default_rng(0)
    blocks = -(-length // block_size)
    table = rng.permutation(batch * blocks).reshape(batch, blocks).astype(np.int32)
    if model == "bundled":
        q, k, v = _real(length)
        return Problem(q[None, -new:], k[None], v[None], table, block_size)
    _, num_qo_heads, num_kv_heads, head_dim = SHAPES[model]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((batch, *shape, head_dim), dtype=np.float32)

    return Problem(
        normal(new, num_qo_heads),
        normal(length, num_kv_heads),
        normal(length, num_kv_heads),
        table,
        block_size,
    )


def _real(length: int) -> tuple[np.ndarray, ...]:
    """Queries, keys and values (S, heads, D) of the bundled model's third layer, as it reads a text."""
    decoder = IncrementalDecoder.from_pretrained()
    text = Path(statistics.__file__).read_bytes()[:length]
    cache = decoder.make_cache(length, backend="numpy")
    step = cache.step([cache.add_sequence()], [length])
    seen = {}

    def attention(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        seen[layer] = q, k, v
        step.write(k, v, layer=layer)
        return step.attend(q, layer=layer)

    decoder.forward(np.frombuffer(text, np.uint8), np.arange(length), attention)
    return seen[2]
