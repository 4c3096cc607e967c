"""Users' functions on the CPU: what does not compile, how numbers are rounded, and what is compiled again."""

import math

import numpy as np
import pytest

import kvnumba
from kvnumba.backends.cpu import mods

SPREAD = np.concatenate((-np.logspace(-6, 3, 200), [0.0], np.logspace(-6, 3, 200), [np.nan])).astype(
    np.float32
)


def scoring(**options):
    return kvnumba.Scoring.of(4, 8, **options)


def textual(score, q_head, q_pos, kv_pos):
    name = f"{kv_pos}"
    return score + float(name)


def textual_mask(q_head, q_pos, kv_pos):
    return float(str(kv_pos)) > 3


FILE = r"\(test_mods.py, line \d+\)"


@pytest.mark.parametrize(
    "options", [{"score_mod": textual}, {"mask_mod": textual_mask}], ids=["score", "mask"]
)
def test_what_does_not_compile(options):
    (argument, function), line = *options.items(), r"line \d+"
    rng = np.random.default_rng(0)
    cache = kvnumba.KVCache(1, 16, 2, 8, backend="cpu")
    cache.update(*rng.standard_normal((2, 1, 2, 9, 8), dtype=np.float32))
    q = rng.standard_normal((1, 4, 1, 8), dtype=np.float32)
    before = cache.attend(q)
    message = rf"{argument}: {function.__name__} {FILE} cannot be compiled, {line}: \w+"
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as error:
            cache.attend(q, **options)
        assert "\n" not in str(error.value)
    np.testing.assert_array_equal(cache.attend(q), before)


@pytest.mark.parametrize("function", [math.exp, math.tanh, np.exp, np.tanh], ids=str)
def test_functions_of_our_own(function):
    """Those that become vectors are as exact as float32 allows, from one end of it to the other."""
    ours = mods.VECTORIZED[function]
    found = np.array([ours(x) for x in SPREAD])
    with np.errstate(over="ignore"):
        want = getattr(np, function.__name__)(SPREAD.astype(np.float64)).astype(np.float32)
    inside = np.abs(SPREAD) < 88
    np.testing.assert_allclose(found[inside], want[inside], rtol=4e-7, atol=1e-38)
    np.testing.assert_array_equal(found[~inside & (SPREAD < 0)] <= 1e-38, True)
    np.testing.assert_array_equal(found[SPREAD > 89], want[SPREAD > 89])
    assert np.isnan(found[-1])


def test_one_compilation_serves_all_alike():
    """Functions made anew in each call, with the same code and values, are compiled once; other numbers are others."""

    def made(factor):
        return lambda score, q_head, q_pos, kv_pos: score * factor

    one, same, other = (mods.modification(scoring(score_mod=made(x))) for x in (2.0, 2.0, 3.0))
    assert one.masked == same.masked != other.masked
    assert one.masked == one.unmasked
    window = mods.modification(scoring(mask_mod=lambda q_head, q_pos, kv_pos: q_pos - kv_pos < 5))
    assert window.unmasked == 0 != window.masked


def test_what_functions_are_given():
    """Numbers of each kind, and arrays of each number of axes."""

    def tables(score, q_head, q_pos, kv_pos, flag, shift, rate, small, large, cube):
        return (
            rate
            if flag
            else score * small[kv_pos] + large[q_head, q_pos] + cube[q_head, q_pos, kv_pos - shift]
        )

    rng = np.random.default_rng(1)
    aux = (
        False,
        2,
        0.5,
        rng.integers(0, 9, 12, np.uint8),
        rng.standard_normal((4, 12)),
        rng.standard_normal((4, 12, 12)).astype(np.float16),
    )
    k, v = rng.standard_normal((2, 1, 2, 12, 8), dtype=np.float32)
    q = rng.standard_normal((1, 4, 3, 8), dtype=np.float32)
    found = []
    for backend in ("numpy", "cpu"):
        cache = kvnumba.KVCache(1, 16, 2, 8, backend=backend)
        cache.update(k, v)
        found.append(cache.attend(q, score_mod=tables, aux=aux))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
