"""Heads that keep a quarter of their tokens: ``python benchmarks/eviction.py`` prints what memory and time they take.

Layers of Llama 3 8B, many tokens of one sequence, of which each KV head keeps between 5 and 60 % at random, a quarter
on the average. Timed is a token, booked, written and attended to in all layers, beside the same of a cache that keeps
all: in turns, so that other work disturbs both. "fast": the time that a tenth of the calls stay below.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import kvnumba
from kvnumba.commands.shapes import SHAPES

_, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = SHAPES["llama-3-8b"]
CHUNK = 4096
BUDGETS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.60)
FORMATS = ("float32", "int8", "int4")


def filled(cache: Any, length: int) -> int:
    """A sequence with random tokens, a multiple of CHUNK."""
    rng = np.random.default_rng(0)
    seq_id: int = cache.add_sequence()
    for _ in range(0, length, CHUNK):
        step = cache.step([seq_id], [CHUNK])
        x = rng.standard_normal((CHUNK, NUM_KV_HEADS, HEAD_DIM), dtype=np.float32)
        for layer in range(cache.num_layers):
            step.write(x, x, layer=layer)
    return seq_id


def token(cache: Any, seq_id: int) -> float:
    """Seconds that one more token takes, which is taken back."""
    q, k = (np.ones((1, heads, HEAD_DIM), np.float32) for heads in (NUM_QO_HEADS, NUM_KV_HEADS))
    length = cache.seq_len(seq_id)
    begin = time.perf_counter()
    step = cache.step([seq_id], [1])
    for layer in range(cache.num_layers):
        step.write(k, k, layer=layer)
        step.attend(q, layer=layer)
    seconds = time.perf_counter() - begin
    cache.truncate(seq_id, length)
    return seconds


def main() -> None:
    """Print a row for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072], help="multiples of 4,096")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    print("| tokens | format | bytes, of all tokens' | ms a layer | of all tokens | fast | of all tokens |")
    print("|---|---|---|---|---|---|---|")
    for length in args.tokens:
        for fmt in FORMATS:
            measure(length, fmt, args)


def measure(length: int, fmt: str, args: argparse.Namespace) -> None:
    """A row of the table."""
    rng = np.random.default_rng(1)
    kept = [np.sort(rng.choice(length, int(share * length), replace=False)) for share in BUDGETS]
    num_blocks, shape = length // args.block_size + 1, (args.block_size, NUM_KV_HEADS, HEAD_DIM, 1, fmt)
    caches = (
        kvnumba.PagedKVCache(num_blocks, *shape, num_layers=args.layers),
        kvnumba.PerHeadKVCache(num_blocks * NUM_KV_HEADS * args.layers, *shape, num_layers=args.layers),
    )
    ids = [filled(cache, length) for cache in caches]
    caches[1].keep(ids[1], kept)
    used = [cache.stats().used_bytes for cache in caches]

    def both() -> list[float]:
        return [token(cache, seq_id) for cache, seq_id in zip(caches, ids, strict=True)]

    for _ in range(5):
        both()
    seconds = np.array([both() for _ in range(args.rounds)])
    (everything, mine), (fast_everything, fast) = (
        np.quantile(seconds, q, axis=0) / args.layers * 1e3 for q in (0.5, 0.1)
    )
    print(
        f"| {length:,} | {fmt} | {used[1] / used[0]:.3f} | {mine:.2f} | {everything:.2f}, {mine / everything:.3f}x | "
        f"{fast:.2f} | {fast_everything:.2f}, {fast / fast_everything:.3f}x |",
        flush=True,
    )


if __name__ == "__main__":
    main()
