"""Users' own functions of scores and masks against the float64 oracle, which calls them for each score."""

import functools
import math
import os

import numpy as np
import oracle
import pytest

import kvnumba

if "KVNUMBA_TEST_WORKERS" in os.environ:
    pytest.skip("caches on workers take no functions of users", allow_module_level=True)

HEADS, LENGTH = 4, 150
CAP = 2.0
PREFIX = 40


def alibi(score, q_head, q_pos, kv_pos, slopes):
    return score - slopes[q_head] * (q_pos - kv_pos)


def soft_cap(score, q_head, q_pos, kv_pos):
    return CAP * math.tanh(score / CAP)


def t5_bias(score, q_head, q_pos, kv_pos, bias):
    return score + bias[q_head, np.minimum(q_pos - kv_pos, bias.shape[1] - 1)]


def branching(score, q_head, q_pos, kv_pos, *_):
    if q_head % 2 == 0 and kv_pos >= 5:
        return score * np.exp(-0.01 * (q_pos - kv_pos))
    return score


def window(q_head, q_pos, kv_pos, width):
    return q_pos - kv_pos <= width


def prefix_and_window(q_head, q_pos, kv_pos, prefix, width):
    return (kv_pos < prefix) | (q_pos - kv_pos <= width)


def prefix_lm(q_head, q_pos, kv_pos, prefix):
    return (kv_pos < prefix) | (kv_pos <= q_pos)


def prefix_blocks(q_low, q_high, kv_low, kv_high):
    if kv_high < PREFIX or kv_high <= q_low:
        return 1
    return 0 if kv_low >= PREFIX and kv_low > q_high else 2


def both_directions(score, q_head, q_pos, kv_pos, *_):
    return score - 0.1 * abs(q_pos - kv_pos)


def document(q_head, q_pos, kv_pos, documents):
    return documents[q_pos] == documents[kv_pos]


STARTS = np.array([0, 30, 31, 75, 110])
DOCUMENTS = np.searchsorted(STARTS, np.arange(LENGTH), side="right")


def document_blocks(q_low, q_high, kv_low, kv_high):
    first, last = (DOCUMENTS[[low, high]] for low, high in ((q_low, q_high), (kv_low, kv_high)))
    if first[1] < last[0] or last[1] < first[0]:
        return 0
    return 1 if first[0] == first[1] == last[0] == last[1] else 2


EXAMPLES = {
    "ALiBi": lambda rng: {"score_mod": alibi, "aux": (rng.uniform(0, 1, HEADS),)},
    "soft cap": lambda rng: {"score_mod": soft_cap},
    "T5": lambda rng: {"score_mod": t5_bias, "aux": (rng.standard_normal((HEADS, 32)),)},
    "branching": lambda rng: {"score_mod": branching, "mask_mod": window, "aux": (70,)},
    "window": lambda rng: {"mask_mod": window, "aux": (9,)},
    "prefix": lambda rng: {"mask_mod": prefix_and_window, "aux": (20, np.int32(3))},
    "prefix-LM": lambda rng: {"mask_mod": prefix_lm, "aux": (PREFIX,), "causal": False},
    "prefix-LM blocks": lambda rng: {
        "score_mod": both_directions,
        "mask_mod": prefix_lm,
        "block_mask": prefix_blocks,
        "aux": (PREFIX,),
        "causal": False,
        "logits_soft_cap": 3.0,
    },
    "not causal": lambda rng: {"causal": False, "sinks": rng.standard_normal(HEADS)},
    "document": lambda rng: {"mask_mod": document, "aux": (DOCUMENTS,)},
    "document blocks": lambda rng: {"mask_mod": document, "block_mask": document_blocks, "aux": (DOCUMENTS,)},
    "all": lambda rng: {
        "score_mod": alibi,
        "aux": (rng.uniform(0, 1, HEADS),),
        "sm_scale": 0.7,
        "logits_soft_cap": 3.0,
        "sinks": rng.standard_normal(HEADS),
        "alibi_slopes": rng.uniform(0, 1, HEADS),
        "window_left": 40,
    },
}


def filled(backend, normal, fmt="float32", length=LENGTH, **options):
    cache = kvnumba.PagedKVCache(24, 16, 2, 16, 2, fmt, backend=backend, **options)
    seq_id = cache.add_sequence()
    cache.update(seq_id, normal(2, length, 16), normal(2, length, 16))
    return cache, seq_id


def check(cache, seq_id, q, keys_values=None, **options):
    out, lse = cache.attend(seq_id, q, return_lse=True, **options)
    options.pop("block_mask", None)
    k, v = cache.get_kv(seq_id) if keys_values is None else keys_values
    rounded = oracle.rounding_of(cache)
    actual = out.swapaxes(0, 1), lse.swapaxes(0, 1)
    oracle.assert_as_exact(actual, q.swapaxes(0, 1), k, v, rounded=rounded, **options)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("fmt", ["float32", "int4"])
def test_worked_examples(backend, fmt, example, normal, rng):
    cache, seq_id = filled(backend, normal, fmt)
    options = example(rng)
    check(cache, seq_id, normal(HEADS, 1, 16), **options)
    check(cache, seq_id, normal(HEADS, 3, 16), **options)
    check(cache, seq_id, normal(HEADS, LENGTH, 16), **options)


def test_positions_of_tokens_kept_in_float(backend, normal, rng):
    """Positions are those in the sequence for every part of the keys: the first, the newest and the others."""
    k, v = normal(2, LENGTH, 16), normal(2, LENGTH, 16)
    cache = kvnumba.PagedKVCache(24, 16, 2, 16, 1, "int8", backend=backend, recent_tokens=24, sink_tokens=4)
    seq_id = cache.add_sequence()
    for begin, end in ((0, 90), (90, LENGTH - 1), (LENGTH - 1, LENGTH)):
        cache.update(seq_id, k[:, begin:end], v[:, begin:end])
        n = end - begin
        q = normal(HEADS, n, 16)
        options = {"score_mod": branching, "mask_mod": document, "block_mask": document_blocks}
        out, lse = cache.attend(seq_id, q, return_lse=True, aux=(DOCUMENTS,), **options)
        del options["block_mask"]
        want, want_lse = oracle.attention(
            q.swapaxes(0, 1), k[:, :end], v[:, :end], aux=(DOCUMENTS,), **options
        )
        np.testing.assert_allclose(out.swapaxes(0, 1), want, atol=0.05)  # a step of int8
        np.testing.assert_allclose(lse.swapaxes(0, 1), want_lse, atol=0.05)


def test_later_keys_in_several_parts(backend, normal):
    """Tokens see later keys also where some are kept in float, and in sequences of different lengths."""
    cache = kvnumba.PagedKVCache(40, 16, 2, 16, 2, "int8", backend=backend, recent_tokens=24)
    ids, lengths, new = [cache.add_sequence(), cache.add_sequence()], (LENGTH, 60), (50, 4)
    k, v = normal(2, LENGTH, 16), normal(2, LENGTH, 16)
    for seq_id, length, count in zip(ids, lengths, new, strict=True):
        cache.update(seq_id, k[:, : length - count], v[:, : length - count])
    step = cache.step(ids, new)
    parts = [slice(length - count, length) for length, count in zip(lengths, new, strict=True)]
    step.write(*(np.concatenate([x[:, part] for part in parts], axis=1).swapaxes(0, 1) for x in (k, v)))
    q = normal(54, HEADS, 16)
    options = {"score_mod": both_directions, "mask_mod": prefix_lm, "aux": (PREFIX + 80,), "causal": False}
    out = step.attend(q, **options)
    for rows, length in ((slice(0, 50), LENGTH), (slice(50, 54), 60)):
        want = oracle.attention(q[rows], k[:, :length], v[:, :length], **options)[0]
        np.testing.assert_allclose(out[rows], want, rtol=0, atol=0.05)  # a step of int8


def test_a_step_of_sequences_with_a_common_prefix(backend, normal, rng):
    cache = kvnumba.PagedKVCache(24, 16, 2, 16, 3, backend=backend)
    ids = [cache.add_sequence()]
    cache.update(ids[0], normal(2, 64, 16), normal(2, 64, 16))
    ids += [cache.fork(ids[0]), cache.fork(ids[0])]
    step = cache.step(ids, [1, 5, 2])
    step.write(normal(8, 2, 16), normal(8, 2, 16))
    q, options = normal(8, HEADS, 16), EXAMPLES["T5"](rng)
    out, lse = step.attend(q, return_lse=True, **options)
    for seq_id, begin, end in zip(ids, (0, 1, 6), (1, 6, 8), strict=True):
        oracle.assert_as_exact(
            (out[begin:end], lse[begin:end]), q[begin:end], *cache.get_kv(seq_id), **options
        )


def test_a_contiguous_cache_and_a_scoring_that_is_kept(backend, normal, rng):
    cache = kvnumba.KVCache(2, 64, 2, 16, backend=backend, num_layers=2)
    k, v, q = normal(2, 2, 50, 16), normal(2, 2, 50, 16), normal(2, HEADS, 7, 16)
    options = EXAMPLES["ALiBi"](rng)
    scoring = kvnumba.Scoring.of(HEADS, 16, **options)
    want = [oracle.attention(q[b].swapaxes(0, 1), k[b], v[b], **options)[0] for b in range(2)]
    options["aux"][0][:] = np.nan  # it has a copy
    for layer in range(2):
        cache.update(k, v, layer=layer)
        out = cache.attend(q, layer=layer, scoring=scoring)
        np.testing.assert_allclose(out.swapaxes(1, 2), want, rtol=0, atol=1e-5)


def test_tokens_that_see_nothing(backend, normal):
    cache, seq_id = filled(backend, normal)
    q = normal(HEADS, 3, 16)

    def odd_heads(q_head, q_pos, kv_pos):
        return q_head % 2 == 1

    out, lse = cache.attend(seq_id, q, mask_mod=odd_heads, return_lse=True)
    want, want_lse = cache.attend(seq_id, q, return_lse=True)
    assert (out[::2] == 0).all()
    assert (lse[::2] == -np.inf).all()
    np.testing.assert_allclose(out[1::2], want[1::2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(lse[1::2], want_lse[1::2], rtol=0, atol=1e-6)
    out, lse = cache.attend(
        seq_id, q, mask_mod=odd_heads, block_mask=lambda *block: 0, sinks=np.ones(HEADS), return_lse=True
    )
    assert (out == 0).all()
    np.testing.assert_allclose(lse, 1, rtol=1e-6)


def test_keys_after_a_token_are_not_asked_about(backend, normal):
    """A table of distances needs no entry for negative ones."""
    cache, seq_id = filled(backend, normal)

    def by_distance(score, q_head, q_pos, kv_pos, table):
        return score + table[q_pos - kv_pos]

    table = np.zeros(LENGTH, np.float32)
    table[1:] = -np.inf
    out = cache.attend(seq_id, normal(HEADS, LENGTH, 16), score_mod=by_distance, aux=(table,))
    v = cache.get_kv(seq_id)[1]
    np.testing.assert_allclose(out, np.repeat(v, HEADS // 2, axis=0), rtol=0, atol=1e-6)


def too_few(score, q_head):
    return score


def nothing(score, q_head, q_pos, kv_pos):
    pass


def raising(score, q_head, q_pos, kv_pos):
    if kv_pos > 3:
        raise ValueError("no")
    return score


def indexing(score, q_head, q_pos, kv_pos, table):
    return score + table[kv_pos]


STATE = {"scale": 2.0}


def reading(score, q_head, q_pos, kv_pos):
    return score * STATE["scale"]


def undefined(score, q_head, q_pos, kv_pos):
    return score * missing  # noqa: F821


def odd_blocks(q_low, q_high, kv_low, kv_high):
    return 3


FILE = r"\(test_mods.py, line \d+\)"
BAD = {
    "no function": (
        {"score_mod": 3},
        TypeError,
        r"score_mod: expected a Python function of \(score, q_head, .*int",
    ),
    "a partial": (
        {"score_mod": functools.partial(alibi)},
        TypeError,
        "expected a Python function .*got a partial",
    ),
    "arguments": (
        {"score_mod": too_few},
        TypeError,
        rf"score_mod: too_few {FILE}: expected it to take .*4 arguments; it takes \(score, q_head\)",
    ),
    "arguments for aux": ({"score_mod": soft_cap, "aux": (1,)}, TypeError, "kv_pos, .aux.*5 arguments"),
    "None": (
        {"score_mod": nothing},
        ValueError,
        rf"nothing {FILE}: expected it to return a number .*got None",
    ),
    "raise": ({"score_mod": raising}, ValueError, rf"raising {FILE} has a raise or an assert"),
    "short aux": (
        {"score_mod": indexing, "aux": (np.zeros(40),)},
        ValueError,
        rf"indexing {FILE} raised IndexError for .*kv_pos 148",
    ),
    "reads an object": ({"score_mod": reading}, ValueError, rf"reading {FILE} reads STATE, a dict.*in aux"),
    "reads nothing": ({"score_mod": undefined}, ValueError, "reads missing, which is not defined"),
    "aux": ({"score_mod": alibi, "aux": np.zeros(4)}, TypeError, "aux: expected a tuple .*got a ndarray"),
    "aux of text": ({"score_mod": alibi, "aux": ("x",)}, TypeError, r"aux\[0\]: expected numbers; got 'x'"),
    "aux alone": ({"aux": (1,)}, ValueError, "aux: expected a score_mod or a mask_mod with it"),
    "causal": ({"causal": 1}, TypeError, "causal: expected True or False; got 1"),
    "causal with a window": (
        {"causal": False, "window_left": 3},
        ValueError,
        "causal: expected True with window_left or alibi_slopes; got False",
    ),
    "blocks alone": ({"block_mask": odd_blocks}, ValueError, "block_mask: expected a mask_mod with it"),
    "odd blocks": (
        {"mask_mod": window, "aux": (3,), "block_mask": odd_blocks},
        ValueError,
        rf"block_mask: odd_blocks {FILE}: expected 0 \(skip\), 1 \(full\) or 2 .*got 3",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_functions(backend, options, error, message, normal):
    cache, seq_id = filled(backend, normal)
    q = normal(HEADS, 2, 16)
    before = cache.attend(seq_id, q)
    with pytest.raises(error, match=message) as raised:
        cache.attend(seq_id, q, **options)
    assert "\n" not in str(raised.value)
    np.testing.assert_array_equal(cache.attend(seq_id, q), before)


def scaled_by(factor):
    def scaled(score, q_head, q_pos, kv_pos):
        return score * factor

    return scaled


def halved(score, q_head, q_pos, kv_pos):
    return of_another_function(score) * 0.5


def of_another_function(score):
    return np.maximum(score, CAP)


def test_functions_of_the_same_code(backend, normal):
    """What they read makes the difference, also what they read of each other."""
    cache, seq_id = filled(backend, normal)
    q = normal(HEADS, 2, 16)
    for factor in (0.5, 3.0):
        check(cache, seq_id, q, score_mod=scaled_by(factor))
    check(cache, seq_id, q, score_mod=halved)


def test_keys_stored_shifted(backend, normal, rng):
    """The shift, whose product scores lack in the storage, is theirs when a function sees them."""
    shifts, scales = 2 * normal(2, 16), np.exp(normal(2, 16))
    calibration = kvnumba.Calibration((shifts,), (scales,), 100, "a test")
    cache = kvnumba.PagedKVCache(10, 16, 2, 16, 1, calibration=calibration, rotation=True, backend=backend)
    seq_id = cache.add_sequence()
    k = normal(2, LENGTH, 16) * scales[:, None] + shifts[:, None]
    cache.update(seq_id, k, normal(2, LENGTH, 16))
    for new in (2, 40):
        for options in ({"score_mod": soft_cap}, {"mask_mod": window, "aux": (9,), "logits_soft_cap": 3.0}):
            q = normal(HEADS, new, 16)
            options["sinks"] = rng.standard_normal(HEADS)
            want, want_lse = oracle.attention(q.swapaxes(0, 1), *cache.get_kv(seq_id), **options)
            out, lse = cache.attend(seq_id, q, return_lse=True, **options)
            np.testing.assert_allclose(out.swapaxes(0, 1), want, rtol=0, atol=1e-4)
            np.testing.assert_allclose(lse.swapaxes(0, 1), want_lse, rtol=0, atol=1e-4)


def test_what_a_function_reads_may_not_change(backend, normal, monkeypatch):
    cache, seq_id = filled(backend, normal)
    q = normal(HEADS, 2, 16)
    scoring = kvnumba.Scoring.of(HEADS, 16, score_mod=soft_cap)
    want = cache.attend(seq_id, q, scoring=scoring)
    monkeypatch.setattr(f"{__name__}.CAP", 3.0)
    for options in ({"scoring": scoring}, {"score_mod": soft_cap}):
        with pytest.raises(ValueError, match=rf"{FILE} reads CAP, which was 2.0 .*and is 3.0 now; .*in aux"):
            cache.attend(seq_id, q, **options)
    monkeypatch.undo()
    np.testing.assert_array_equal(cache.attend(seq_id, q, score_mod=soft_cap), want)
    factor = 1.0

    def scaled(score, q_head, q_pos, kv_pos):
        return score * factor

    cache.attend(seq_id, q, score_mod=scaled)
    factor = 2.0
    with pytest.raises(ValueError, match="reads factor, which was 1.0"):
        cache.attend(seq_id, q, score_mod=scaled)
