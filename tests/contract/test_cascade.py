"""Common prefixes of a batch are read once, with the same results."""

import numpy as np
import oracle
import pytest

import kvnumba
from kvnumba.attention import cascade
from kvnumba.backends.protocol import CascadeLimits
from kvnumba.backends.registry import get_backend
from kvnumba.storage import Batch, Layout


LIMITS = CascadeLimits(tile_rows=64, min_rows=8, min_bytes=1 << 25)


@pytest.fixture
def always(monkeypatch, backend):
    """Let every common prefix be worth a part of its own; lists how many parts each plan has."""
    planned = []
    found = get_backend(backend)
    plan = found.plan
    monkeypatch.setattr(cascade, "worthwhile", lambda *args: True)
    monkeypatch.setattr(found, "cascade", LIMITS, raising=False)
    monkeypatch.setattr(
        found, "plan", lambda parts, *args: (planned.append(len(parts)), plan(parts, *args))[1]
    )
    return planned


def grow(cache, normal, ids, new):
    step = cache.step(ids, new)
    total = sum(new)
    step.write(
        normal(total, cache.num_kv_heads, cache.head_dim), normal(total, cache.num_kv_heads, cache.head_dim)
    )
    return step


@pytest.mark.parametrize("new", [[1, 1, 1, 1], [3, 0, 1, 2], [7, 1, 5, 1]])
@pytest.mark.parametrize(
    "options", [{}, {"logits_soft_cap": 3.0}, {"sinks": True}], ids=["plain", "cap", "sinks"]
)
def test_as_exact_as_each_sequence_alone(backend, fmt, new, options, normal, always):
    cache = kvnumba.PagedKVCache(64, 4, 2, 8, 6, fmt, backend=backend)
    a = cache.add_sequence()
    grow(cache, normal, [a], [10])
    b = cache.fork(a)
    other = cache.add_sequence()
    grow(cache, normal, [other, b], [6, 5])
    c = cache.fork(b)  # shares three blocks with b, two with a, which it shares with both
    ids = [c, a, other, b]
    step = grow(cache, normal, ids, new)
    q = normal(sum(new), 6, 8)
    if "sinks" in options:
        options = {"sinks": normal(6)}
    out, lse = step.attend(q, return_lse=True, **options)
    begin = 0
    for seq_id, count in zip(ids, new, strict=True):
        if count:
            part = slice(begin, begin + count)
            rounded = oracle.rounding_of(cache)
            oracle.assert_as_exact(
                (out[part], lse[part]), q[part], *cache.get_kv(seq_id), rounded=rounded, **options
            )
            begin += count
    assert always == [2]


def test_only_where_it_is_exact(backend, normal, always):
    cache = kvnumba.PagedKVCache(16, 4, 2, 8, 2, backend=backend)
    a = cache.add_sequence()
    grow(cache, normal, [a], [9])
    ids = [a, cache.fork(a)]
    step = grow(cache, normal, ids, [1, 1])
    q = normal(2, 4, 8)
    for options in ({"window_left": 4}, {"alibi_slopes": normal(4)}):
        out, lse = step.attend(q, return_lse=True, **options)
        for n, seq_id in enumerate(ids):
            oracle.assert_as_exact(
                (out[n : n + 1], lse[n : n + 1]), q[n : n + 1], *cache.get_kv(seq_id), **options
            )
    assert always == [1, 1]


def batch(table, seq_lens, new, block_size=2):
    return Batch.of(np.array(table, np.int32), np.array(seq_lens, np.int32), np.array(new), block_size)


def found(*args):
    return sorted((p.sequences.tolist(), p.num_blocks) for p in cascade.common_prefixes(batch(*args)))


def test_the_split_that_shares_most():
    table = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 7, 8, 9, 0], [5, 2, 3, 4, 5]]
    assert found(table, [10, 10, 10, 10], [1, 1, 1, 1]) == [([0, 1], 4)]  # 4 blocks, not 1 twice
    table = [[1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2, 5]]
    assert found(table, [6, 6, 6, 6], [1, 1, 1, 1]) == [([0, 1, 2, 3], 2)]  # 6 blocks, not 2


def test_new_tokens_are_no_part_of_a_prefix():
    table = [[1, 2, 3], [1, 2, 3]]
    assert found(table, [6, 6], [1, 1]) == [([0, 1], 2)]
    assert found(table, [6, 6], [4, 1]) == [([0, 1], 1)]
    assert found(table, [6, 6], [6, 1]) == []
    assert found(table, [6, 6], [0, 1]) == []
    assert found([[1, 2], [3, 4]], [3, 3], [1, 1]) == []


def test_small_prefixes_stay_in_the_processors_cache():
    layout = Layout.of(2, 16, 2, 8)
    small = batch([[0] * 8, [0] * 8], [120, 120], [1, 1], 16)
    prefix = cascade.Prefix(np.array([0, 1]), 7)
    assert not cascade.worthwhile(prefix, small, layout, 16, LIMITS)
    large = cascade.Prefix(np.array([0, 1]), LIMITS.min_bytes)
    assert cascade.worthwhile(large, small, layout, 16, LIMITS)
    whole_tiles = batch([[0], [0]], [500, 500], [64, 64], 16)
    assert not cascade.worthwhile(large, whole_tiles, layout, 16, LIMITS)
