"""The block manager: operations a second by size of the pool, prefix look-ups, waste, and what a common prefix saves.

``pytest benchmarks/bench_blocks.py -s`` prints block operations a second and the ratios besides the times.
"""

import time

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba.attention import cascade
from kvnumba.backends.registry import available_backends
from kvnumba.blocks.pool import BlockPool
from kvnumba.commands.shapes import SHAPES
from kvnumba.commands.timing import SETTLE
from kvnumba.formats import FORMATS

BLOCK_SIZE = 16
SEQUENCES = 64


def chat_lengths(count):
    """Prompt and answer of a chat request: log-normal, median 250 tokens, mean 412, up to 8,192."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(250), 1.0, count), 4, 8192).astype(np.int64)


def serve(pool, lengths, told):
    """Admit, extend by 64 tokens, fork and finish sequences; returns how many blocks were taken, shared, given back."""
    tokens = [np.arange(n) + 100_000 * i for i, n in enumerate(lengths)]
    ids = [pool.add(t) if told else pool.add() for t in tokens]
    free = pool.num_free_blocks
    for seq_id, new in zip(ids, tokens, strict=True):
        pool.commit([seq_id], pool.book([seq_id], [len(new)]), [new] if told else None)
    one = np.ones(len(ids), np.int64)
    for _ in range(64):
        pool.commit(ids, pool.book(ids, one), [one[:1]] * len(ids) if told else None)
    taken = free - pool.num_free_blocks
    children = [pool.fork(seq_id) for seq_id in ids]
    for seq_id in ids + children:
        pool.finish(seq_id)
    return 4 * taken  # taken once, shared once, given back twice


@pytest.mark.parametrize("told", [False, True], ids=["", "findable"])
@pytest.mark.parametrize("num_blocks", [10_000, 100_000, 1_000_000])
def bench_operations(benchmark, num_blocks, told):
    pool = BlockPool(num_blocks, BLOCK_SIZE, 4 * SEQUENCES)
    lengths = chat_lengths(SEQUENCES)
    operations = serve(pool, lengths, told)
    assert pool.num_free_blocks == num_blocks

    def fresh():
        return (BlockPool(num_blocks, BLOCK_SIZE, 4 * SEQUENCES), lengths, told), {}

    benchmark.group = "admit, extend, fork, finish 64 sequences" + (", findable" if told else "")
    benchmark.extra_info.update(
        implementation="kvnumba", format=f"{num_blocks:,} blocks", operations=operations
    )
    benchmark.pedantic(serve, setup=fresh, rounds=7, warmup_rounds=1)
    rate = operations / benchmark.stats.stats.median if benchmark.stats else 0
    print(f"\n{num_blocks:,} blocks{', findable' * told}: {rate:,.0f} block operations a second")


def bench_look_up(benchmark):
    cache = kvnumba.PagedKVCache(1_000_000, BLOCK_SIZE, 1, 2, 4, "int8", backend="numpy")
    tokens = np.random.default_rng(0).integers(0, 128_000, 32_768 + 1)
    first = cache.add_sequence()
    x = np.zeros((1, len(tokens), 2), np.float32)
    cache.update(first, x, x, token_ids=tokens)
    cache.finish_sequence(first)
    benchmark.group = "find 32,768 cached tokens"
    benchmark.extra_info.update(implementation="kvnumba", format="1,000,000 blocks")

    def finish():
        for seq_id in cache.seq_lens:
            cache.finish_sequence(seq_id)

    seq_id = benchmark.pedantic(cache.add_sequence, (tokens,), setup=finish, rounds=15, warmup_rounds=2)
    assert cache.seq_len(seq_id) == 32_768


def bench_waste(benchmark):
    lengths = chat_lengths(1000)
    cache = kvnumba.PagedKVCache(100_000, BLOCK_SIZE, 1, 2, 1000, "int8", backend="numpy")
    ids = [cache.add_sequence() for _ in lengths]
    step = cache.step(ids, lengths)
    x = np.zeros((step.num_tokens, 1, 2), np.float32)
    step.write(x, x)
    benchmark.group = "stats of 1,000 sequences"
    benchmark.extra_info.update(implementation="kvnumba", format="100,000 blocks")
    stats = benchmark.pedantic(cache.stats, rounds=3)
    assert stats.waste < 0.04
    print(f"\nwaste of {lengths.sum():,} tokens in blocks of {BLOCK_SIZE}: {stats.waste:.2%}")


@pytest.mark.long
@pytest.mark.skipif("cpu" not in available_backends(), reason="the reference is not for speed")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("cascaded", [False, True], ids=["each", "cascade"])
def bench_common_prefix(benchmark, fmt, cascaded, monkeypatch):
    """16 continuations of one prefix of 8,192 tokens, one new token each."""
    _, Hq, H, D = SHAPES["llama-3-8b"]
    own = 64
    normal = np.random.default_rng(0).standard_normal
    cache = kvnumba.PagedKVCache(8192 // BLOCK_SIZE + 16 * 6, BLOCK_SIZE, H, D, 16, fmt, backend="cpu")
    x = normal((H, 8192, D), np.float32)
    ids = [cache.add_sequence()]
    cache.update(ids[0], x, -x)
    ids += [cache.fork(ids[0]) for _ in range(15)]
    for new in (own, 1):
        step = cache.step(ids, [new] * 16)
        x = normal((step.num_tokens, H, D), np.float32)
        step.write(x, x)
    blocks = 8192 // BLOCK_SIZE + 16 * -(-(own + 1) // BLOCK_SIZE)
    assert cache.stats().used_bytes == blocks * BLOCK_SIZE * cache.bytes_per_token()
    assert cache.stats().used_bytes <= 1.1 * (8192 + 16 * (own + 1)) * cache.bytes_per_token()
    q = normal((16, Hq, D), np.float32)
    monkeypatch.setattr(cascade, "worthwhile", lambda *args: cascaded)
    out = step.attend(q)
    for n in (0, 15):
        k, v = cache.get_kv(ids[n])
        want, _ = oracle.attention(q[n : n + 1], k, v)
        rounded = oracle.rounding_of(cache)  # queries and weights, to 16 bits
        assert np.abs(out[n] - want[0]).max() <= (2e-6 if rounded is None else 5e-5)
    time.sleep(SETTLE)  # the oracle's matrix products
    benchmark.group = "decode 16 continuations of 8,192 common tokens"
    benchmark.extra_info.update(implementation="cascade" if cascaded else "each for itself", format=fmt)
    benchmark.pedantic(step.attend, (q,), rounds=15, warmup_rounds=2)
