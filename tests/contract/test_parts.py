"""Attention over several parts of the keys, which backends merge themselves: one softmax over all of them."""

import numpy as np
import oracle
import pytest
from conftest import at_most

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
    plan = backend.plan(parts, q.shape[1], scoring)
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


@pytest.mark.parametrize("new", [1, 20])
def test_keys_before_the_first_are_not_seen(backend, fmt, new, normal):
    """Two sequences of one batch begin somewhere within a block; what lies before is never read as a number."""
    backend = get_backend(backend)
    k, v = normal(300, H, D), normal(300, H, D)
    buffers, table = filled(backend, fmt, k, v, 16)
    keys, values = stored(backend, buffers, table, 300)
    rounded = oracle.sixteen_bits if backend.name == "cpu" and fmt in ("int8", "int4") else None
    lens, begins = np.array([300, 90], np.int32), np.array([37, 68], np.int32)
    starts = np.array([0, new, 2 * new], np.int32)
    batch = Batch(np.concatenate((table, table)), lens, starts, 16, lens - np.int32(new), begins)
    q = normal(2 * new, 4, D)
    for options in ({}, {"window_left": 40}, {"logits_soft_cap": 2.0, "sinks": normal(4)}):
        out, lse = attend(backend, [Part(buffers, batch)], q, **options)
        for n, (begin, end) in enumerate(zip(begins, lens, strict=True)):
            mine = slice(n * new, (n + 1) * new)
            seen = keys[:, begin:end], values[:, begin:end]
            oracle.assert_as_exact((out[mine], lse[mine]), q[mine], *seen, rounded=rounded, **options)


def test_a_part_may_have_no_keys_for_a_sequence(backend, normal):
    backend = get_backend(backend)
    k, v = normal(40, H, D), normal(40, H, D)
    buffers, table = filled(backend, "float32", k, v, 16)
    tables, starts = np.concatenate((table, table)), np.array([0, 2, 4], np.int32)
    lens, begins = np.array([40, 17], np.int32), np.array([5, 17], np.int32)
    one = Part(buffers, Batch(tables, lens, starts, 16, np.array([38, 100], np.int32), begins))
    lens, begins = np.array([5, 30], np.int32), np.array([5, 3], np.int32)
    two = Part(buffers, Batch(tables, lens, starts, 16, np.array([50, 28], np.int32), begins))
    q = normal(4, 4, D)
    out, lse = attend(backend, [one, two], q)
    k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
    oracle.assert_as_exact((out[:2], lse[:2]), q[:2], k[:, 5:], v[:, 5:])
    oracle.assert_as_exact((out[2:], lse[2:]), q[2:], k[:, 3:30], v[:, 3:30])


def with_holes(table, there):
    """A block table without the blocks of the columns in which `there` is False."""
    return np.where(there, table, np.int32(-1))


def by_place(score, q_head, q_pos, kv_pos):
    """A score_mod to which it matters where keys are."""
    return score + (kv_pos % 7) * 0.25


THERE = {
    "every second": lambda column: column % 2 == 1,
    "two of five": lambda column: column % 5 > 2,
    "only the first": lambda column: column == 0,
    "only the last": lambda column: column == column[-1],
    "none": lambda column: column < 0,
}


@pytest.mark.parametrize("there", THERE)
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize("fmt", ["float32", "int8"])
def test_keys_of_blocks_that_are_not_there(backend, fmt, new, block_size, there, normal):
    """They are not read, and the others are where they were."""
    backend, length = get_backend(backend), at_most(603, 45)
    k, v = normal(length, H, D), normal(length, H, D)
    columns = THERE[there](np.arange(-(-length // block_size)))
    present = np.repeat(columns, block_size)[:length]
    if fmt == "float32":
        k[~present], v[~present] = np.nan, np.nan
    buffers, table = filled(backend, fmt, k, v, block_size)
    keys, values = stored(backend, buffers, table, length)
    rounded = oracle.sixteen_bits if backend.name == "cpu" and fmt == "int8" else None
    batch = Batch.of(with_holes(table, columns), np.array([length], np.int32), [new], block_size)
    q, slopes = normal(new, 4, D), np.abs(normal(4))
    for options in ({}, {"window_left": 37, "alibi_slopes": slopes}, {"score_mod": by_place}):
        found = attend(backend, [Part(buffers, batch)], q, **options)
        oracle.assert_as_exact(found, q, keys, values, rounded=rounded, present=present, **options)


@pytest.mark.parametrize("new", [1, 20])
def test_blocks_that_are_not_there_in_several_sequences(backend, new, normal):
    """Each sequence has blocks and a beginning of its own; one sees only the sinks."""
    backend, length = get_backend(backend), at_most(200, 60)
    k, v = normal(length, H, D), normal(length, H, D)
    buffers, table = filled(backend, "float32", k, v, 4)
    keys, values = stored(backend, buffers, table, length)
    column = np.arange(table.shape[1])
    there = [column % 3 == 1, column % 3 != 1, column < 0]
    lens, begins = np.array([length, length - 11, length], np.int32), np.array([9, 0, 30], np.int32)
    starts = np.arange(4, dtype=np.int32) * np.int32(new)
    tables = np.concatenate([with_holes(table, columns) for columns in there])
    batch = Batch(tables, lens, starts, 4, lens - np.int32(new), begins)
    q, sinks = normal(3 * new, 4, D), normal(4)
    for options in ({"logits_soft_cap": 2.0, "sinks": sinks}, {"window_left": 25}):
        out, lse = attend(backend, [Part(buffers, batch)], q, **options)
        for n, (begin, end, columns) in enumerate(zip(begins, lens, there, strict=True)):
            mine = slice(n * new, (n + 1) * new)
            seen = keys[:, begin:end], values[:, begin:end]
            present = np.repeat(columns, 4)[begin:end]
            oracle.assert_as_exact((out[mine], lse[mine]), q[mine], *seen, present=present, **options)


@pytest.mark.parametrize("new", [1, 20])
def test_parts_that_have_a_block_each_in_turn(backend, new, normal):
    """Together they have all blocks."""
    backend, length = get_backend(backend), at_most(300, 60)
    k, v = normal(length, H, D), normal(length, H, D)
    buffers, table = filled(backend, "float32", k, v, 4)
    column, lens = np.arange(table.shape[1]), np.array([length], np.int32)
    parts = [Part(buffers, Batch.of(with_holes(table, column % 3 == n), lens, [new], 4)) for n in range(3)]
    q, slopes = normal(new, 4, D), np.abs(normal(4))
    for options in ({}, {"window_left": 50, "alibi_slopes": slopes}):
        found = attend(backend, parts, q, **options)
        oracle.assert_as_exact(found, q, k.swapaxes(0, 1), v.swapaxes(0, 1), **options)


def test_tokens_that_belong_to_no_block_are_not_written(backend, fmt, normal):
    backend = get_backend(backend)
    buffers = backend.allocate(Layout.of(4, 4, H, D, fmt))
    table = np.array([[2, 0], [-1, -1], [1, -1]], np.int32)
    k, v = normal(18, H, D), normal(18, H, D)
    batch = Batch.of(table, np.array([6, 8, 6], np.int32), [6, 8, 4], 4)
    backend.write(buffers, 0, k[None], v[None], batch)
    both = zip(stored(backend, buffers, table[:1], 6), (k[:6], v[:6]), strict=True)
    for have, want in both:
        oracle.assert_stored(have, want.swapaxes(0, 1), fmt)
    have = stored(backend, buffers, table[2:, :1], 4)
    for x, want in zip(have, (k[14:16], v[14:16]), strict=True):
        oracle.assert_stored(x[:, 2:], want.swapaxes(0, 1), fmt)
    untouched = backend.read_blocks(buffers, np.array([3]))
    assert all(not array.any() for part in untouched for array in part)
