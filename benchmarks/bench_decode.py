"""One decode step: a new token attends to what is cached, out of shuffled blocks.

Run with ``pytest benchmarks``; each result is checked against the float64 oracle before it is timed.
"""

import numpy as np
import oracle
import pytest
from shapes import SHAPES

import kvnumba
from kvnumba.formats import FORMATS
from kvnumba.registry import available_backends

BLOCK_SIZE = 16
CONTEXTS = (1024, 16384)


def fill(cache, num_kv_heads, length, head_dim):
    """A sequence of random tokens whose blocks lie scattered over the pool."""
    rng = np.random.default_rng(0)
    ids = [cache.add_sequence() for _ in range(length // BLOCK_SIZE)]
    for seq_id in ids:  # takes every block, and gives them back in another order
        cache.step([seq_id], [BLOCK_SIZE])
    for i in rng.permutation(len(ids)):
        cache.finish_sequence(ids[i])
    seq_id = cache.add_sequence()
    for start in range(0, length, 1024):
        shape = (num_kv_heads, min(1024, length - start), head_dim)
        cache.update(seq_id, rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32))
    return seq_id


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("length", CONTEXTS)
@pytest.mark.parametrize("model", SHAPES)
def bench_attend(benchmark, model, length, fmt, backend):
    num_qo_heads, num_kv_heads, head_dim = SHAPES[model]
    num_blocks = length // BLOCK_SIZE
    cache = kvnumba.PagedKVCache(
        num_blocks, BLOCK_SIZE, num_kv_heads, head_dim, num_blocks, fmt, backend=backend
    )
    seq_id = fill(cache, num_kv_heads, length, head_dim)
    q = np.random.default_rng(1).standard_normal((num_qo_heads, 1, head_dim), np.float32)
    out, lse = cache.attend(seq_id, q, return_lse=True)
    oracle.assert_as_exact((out.swapaxes(0, 1), lse.swapaxes(0, 1)), q.swapaxes(0, 1), *cache.get_kv(seq_id))

    benchmark.group = f"decode {model}, {length} tokens"
    benchmark.extra_info["bytes"] = length * cache.bytes_per_token()
    benchmark(cache.attend, seq_id, q)
    if benchmark.stats:
        rate = benchmark.extra_info["bytes"] / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["GB/s"] = round(rate, 1)
