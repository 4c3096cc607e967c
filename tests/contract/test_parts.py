"""Attention over several parts of the keys, which backends merge themselves: one softmax over all of them."""

import numpy as np
import oracle
import pytest

from kvnumba.backends.registry import get_backend
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Layout, Part

H, D = 2, 16


def filled(backend, fmt, k, v, block_size, first_block=0):
    """Buffers that hold keys and values (T, H, D) of one sequence, and its block table."""
    blocks = -(-len(k) // block_size)
    layout = Layout.of(first_block + blocks, block_size, H, D, fmt)
    buffers = backend.allocate(layout)
    table = first_block + np.arange(blocks, dtype=np.int32)[::-1][None]
    table = np.ascontiguousarray(table)
    length = np.array([len(k)], np.int32)
    backend.write(buffers, 0, k[None], v[None], Batch.of(table, length, [len(k)], block_size))
    return buffers, table


def stored(backend, buffers, table, length):
    k, v = backend.read(buffers, 0, table, length)
    return k[0], v[0]


def attend(backend, parts, q, **options):
    scoring = Scoring.of(q.shape[1], D, **options)
    out, lse = np.full(q[None].shape, np.nan, np.float32), np.full((1, *q.shape[:2]), np.nan, np.float32)
    plan = backend.plan(parts, q.shape[1], scoring.window_left)
    backend.attend(0, q[None], plan, scoring, out, lse)
    return out[0], lse[0]


def older(table, length, new, block_size):
    """A batch of tokens that come after all its keys."""
    count = np.array([length], np.int32)
    return Batch(table, count, np.array([0, new], np.int32), block_size, count)


@pytest.mark.parametrize("new", [1, 3, 20])
@pytest.mark.parametrize(
    ("fmt", "recent"),
    [("int4", "float16"), ("int8", "float32"), ("float32", "float32"), ("fp8_e4m3", "int8")],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_older_tokens_in_one_format_and_recent_ones_in_another(backend, fmt, recent, new, sinks, normal):
    backend = get_backend(backend)
    k, v = normal(700, H, D), normal(700, H, D)
    one, table = filled(backend, fmt, k[:640], v[:640], 16)
    two, second = filled(backend, recent, k[640:], v[640:], 4, first_block=3)
    recent_batch = Batch.of(second, np.array([60], np.int32), [new], 4)
    parts = [Part(one, older(table, 640, new, 16)), Part(two, recent_batch)]
    q = normal(new, 6, D)
    options = {"sinks": normal(6)} if sinks else {}
    keys, values = (
        np.concatenate(both, axis=1)
        for both in zip(stored(backend, one, table, 640), stored(backend, two, second, 60), strict=True)
    )
    rounded = oracle.sixteen_bits if backend.name == "cpu" else None
    for order in (parts, parts[::-1]):
        found = attend(backend, order, q, **options)
        oracle.assert_as_exact(found, q, keys, values, rounded=rounded, **options)


def test_a_part_for_some_of_the_tokens(backend, normal):
    """Tokens 0, 2 and 3 of five see a common prefix; token 4 sees nothing at all."""
    backend = get_backend(backend)
    k, v = normal(90, H, D), normal(90, H, D)
    prefix, table = filled(backend, "float32", k[:40], v[:40], 8)
    own, own_table = filled(backend, "float32", k[40:], v[40:], 8)
    some = np.array([0, 2, 3], np.int32)
    shared = Part(prefix, older(table, 40, 3, 8), some)
    # tokens 0 and 1 are those of one sequence of 50 keys, 2 of one of 9, 3 and 4 of none
    tables = np.concatenate([own_table] * 3)
    lens = np.array([50, 9, 0], np.int32)
    rest = Batch(tables, lens, np.array([0, 2, 3, 5], np.int32), 8, np.array([48, 8, 0], np.int32))
    q = normal(5, 4, D)
    out, lse = attend(backend, [Part(own, rest), shared], q)
    k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
    seen = {
        0: [*range(40), *range(40, 89)],
        1: list(range(40, 90)),
        2: [*range(40), *range(40, 49)],
        3: list(range(40)),
    }
    for token, keys in seen.items():
        part = slice(token, token + 1)
        oracle.assert_as_exact((out[part], lse[part]), q[part], k[:, keys], v[:, keys])
    np.testing.assert_array_equal(out[4], 0)
    np.testing.assert_array_equal(lse[4], -np.inf)


def test_a_window_reaches_over_parts(backend, normal):
    """Positions count in each part's own numbering, so that distances are right."""
    backend = get_backend(backend)
    k, v = normal(100, H, D), normal(100, H, D)
    one, table = filled(backend, "float32", k[:80], v[:80], 16)
    two, second = filled(backend, "float32", k[80:], v[80:], 16)
    new = 5
    first = Batch(table, np.array([80], np.int32), np.array([0, new], np.int32), 16, np.array([95], np.int32))
    parts = [Part(one, first), Part(two, Batch.of(second, np.array([20], np.int32), [new], 16))]
    q, slopes = normal(new, 4, D), np.abs(normal(4))
    for options in (
        {"window_left": 30},
        {"window_left": 7},
        {"alibi_slopes": slopes},
        {"logits_soft_cap": 2.0},
    ):
        found = attend(backend, parts, q, **options)
        oracle.assert_as_exact(found, q, k.swapaxes(0, 1), v.swapaxes(0, 1), **options)
