"""Options of attention: checked once, kept by the caller, None is the default of each."""

import numpy as np
import oracle
import pytest

import kvnumba


def filled(backend, normal, fmt="float32"):
    cache = kvnumba.PagedKVCache(12, 4, 2, 8, 2, fmt, backend=backend)
    seq_id = cache.add_sequence()
    cache.update(seq_id, normal(2, 30, 8), normal(2, 30, 8))
    return cache, seq_id


def test_none_is_the_default_of_every_option(backend, normal):
    cache, seq_id = filled(backend, normal)
    q = normal(4, 3, 8)
    names = {*kvnumba.AttentionOptions.__annotations__} | {*kvnumba.ScoringOptions.__annotations__}
    assert {"sm_scale", "window_left", "logits_soft_cap", "sinks", "alibi_slopes", "arithmetic"} < names
    np.testing.assert_array_equal(cache.attend(seq_id, q, **dict.fromkeys(names)), cache.attend(seq_id, q))
    cache.add_sequence(window_left=None)


def test_built_once_and_used_again(backend, normal):
    cache, seq_id = filled(backend, normal)
    sinks = normal(4)
    scoring = kvnumba.Scoring.of(4, 8, window_left=9, logits_soft_cap=3.0, sinks=sinks)
    q = normal(4, 3, 8)
    want, want_lse = cache.attend(seq_id, q, window_left=9, logits_soft_cap=3.0, sinks=sinks, return_lse=True)
    sinks[:] = np.nan  # it has a copy
    for _ in range(2):
        out, lse = cache.attend(seq_id, q, scoring=scoring, return_lse=True)
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(lse, want_lse)
    with pytest.raises(AttributeError):
        scoring.window_left = 3
    with pytest.raises(TypeError, match="window_left: expected no further options with scoring"):
        cache.attend(seq_id, q, scoring=scoring, window_left=9)
    with pytest.raises(ValueError, match=r"sinks: expected shape \(Hq=8\); got \(4,\)"):
        cache.attend(seq_id, normal(8, 3, 8), scoring=scoring)
    with pytest.raises(TypeError, match="scoring: expected a Scoring; got a dict"):
        cache.attend(seq_id, q, scoring={"window_left": 9})
    with pytest.raises(TypeError, match="unknown option 'return_lse'"):
        kvnumba.Scoring.of(4, 8, return_lse=True)


@pytest.mark.parametrize("fmt", ["int8", "int4", "float16", "fp8_e4m3"])
@pytest.mark.parametrize("new_tokens", [1, 2, 12])
def test_float32_arithmetic_is_honoured(backend, fmt, new_tokens, normal):
    """With it nothing is rounded but float32: also where codes are multiplied as integers otherwise."""
    cache, seq_id = filled(backend, normal, fmt)
    q = normal(4, new_tokens, 8)
    out, lse = cache.attend(seq_id, q, arithmetic="float32", return_lse=True)
    actual = out.swapaxes(0, 1), lse.swapaxes(0, 1)
    oracle.assert_as_exact(actual, q.swapaxes(0, 1), *cache.get_kv(seq_id))
