"""What the answers should be, in float64 and in the plainest way; shares no code with the library."""

import math

import numpy as np


def attention(
    q,
    k,
    v,
    *,
    sm_scale=None,
    window_left=-1,
    logits_soft_cap=0.0,
    sinks=None,
    alibi_slopes=None,
    present=None,
    causal=True,
    score_mod=None,
    mask_mod=None,
    aux=(),
    dtype=np.float64,
    rounded=None,
):
    """Attention of the newest n tokens q (n, Hq, D) over keys (H, S, D) and values (H, S, Dv).

    `present` (S,) bool says which keys there are; None: all. Returns out (n, Hq, Dv) and lse (n, Hq).

    With dtype float32 it is the plain single-precision program whose error the kernels are measured by; with
    `rounded` one that rounds what is multiplied with keys and values, by that function of a vector.
    """
    q, k, v = (np.asarray(x).astype(dtype) for x in (q, k, v))
    if rounded is not None:
        q = np.array([[rounded(head) for head in token] for token in q]).reshape(q.shape)
    n, num_qo_heads, head_dim = q.shape
    num_kv_heads, length, _ = k.shape
    scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
    places = np.arange(length) if present is None else np.flatnonzero(present)
    k, v = k[:, places], v[:, places]
    out, lse = np.empty((n, num_qo_heads, v.shape[-1]), dtype), np.empty((n, num_qo_heads), dtype)
    for i in range(n):
        position = length - n + i
        first = 0 if window_left < 0 else max(0, position - window_left)
        last = position if causal else length - 1
        seen = slice(*np.searchsorted(places, (first, last + 1)))
        for h in range(num_qo_heads):
            kv_head = h * num_kv_heads // num_qo_heads
            scores = (k[kv_head, seen] @ q[i, h]) * dtype(scale)
            if logits_soft_cap:
                scores = dtype(logits_soft_cap) * np.tanh(scores / dtype(logits_soft_cap))
            if alibi_slopes is not None:
                scores = scores + dtype(alibi_slopes[h]) * (places[seen] - position).astype(dtype)
            if score_mod is not None:
                pairs = zip(scores, places[seen], strict=True)
                scores = np.array([score_mod(s, h, position, j, *aux) for s, j in pairs]).astype(dtype)
            if mask_mod is not None:
                scores[[not mask_mod(h, position, j, *aux) for j in places[seen]]] = -np.inf
            if not len(scores) and sinks is None:
                out[i, h], lse[i, h] = 0, -np.inf
                continue
            top = scores.max(initial=-np.inf if sinks is None else dtype(sinks[h]))
            weights = np.exp(scores - top)
            total = weights.sum() + (0 if sinks is None else np.exp(dtype(sinks[h]) - top))
            if rounded is not None:
                weights = rounded(weights)
            out[i, h] = weights @ v[kv_head, seen] / total
            lse[i, h] = top + np.log(total)
    return out, lse


def mass(q, k, **options):
    """The attention (H, S) that each key gets from q, as `attention` takes them, in all."""
    num_kv_heads, length, _ = k.shape
    # the output is the weights themselves where the value of key j is a one in place j
    weights, _ = attention(q, k, np.broadcast_to(np.eye(length), (num_kv_heads, length, length)), **options)
    return weights.sum(axis=0).reshape(num_kv_heads, -1, length).sum(axis=1)


def sixteen_bits(x):
    """A vector rounded to the 16-bit integers whose greatest is its greatest element."""
    step = np.abs(x).max(initial=0) / (2**15 - 1)
    return np.rint(x / step) * step if step else x


def rounding_of(cache):
    """How the kernels of a cache round queries and weights: to 16 bits where they multiply codes, or not at all."""
    quantized = {"int8", "int4"} & {cache.key_format, cache.value_format}
    return sixteen_bits if quantized and cache.backend == "cpu" else None


def assert_as_exact(actual, q, k, v, *, rounded=None, **options):
    """`actual`, (out, lse) as `attention` returns them, errs at most twice as much as plain NumPy in float32.

    Both against float64, in the largest error. An error of a few units in the last place is always granted, more of
    them to long heads: the rounding errors of a sum of D products grow as the square root of D; and to large scores,
    for what a score is rounded by is the relative error of its weight. Kernels that round queries and weights are
    granted a step of their rounding, or four times the error of a plain program that rounds them alike. What sees
    nothing is exactly 0, with an lse of -inf.
    """
    exact = attention(q, k, v, **options)
    plain = attention(q, k, v, dtype=np.float32, **options)
    alike = exact if rounded is None else attention(q, k, v, rounded=rounded, **options)
    seen = np.isfinite(exact[1])
    for have, want in zip(actual, exact, strict=True):
        assert have.shape == want.shape
        np.testing.assert_array_equal(have[~seen], want[~seen])
    found = ([x[seen] for x in results] for results in (actual, exact, plain, alike))
    for have, want, by, too in zip(*found, strict=True):
        size = max(1.0, np.abs(want).max(initial=0), np.abs(exact[1]).max(initial=0) / 8)
        unit = np.finfo(np.float32).eps * size
        step = 0 if rounded is None else 2.0**-15 * max(1.0, np.abs(want).max(initial=0))
        granted = max(step, 4 * np.abs(too - want).max(initial=0))
        allowed = max(2 * np.abs(by - want).max(initial=0), max(8, q.shape[-1] ** 0.5) * unit, granted)
        worst = np.abs(have - want).max(initial=0)
        assert worst <= allowed, f"largest error {worst:.2e}, allowed {allowed:.2e}"


def bfloat16(x):
    """The nearest bfloat16 of each float32, ties to even, chosen between the two neighbours in float64."""
    x = np.asarray(x, np.float32)
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # towards zero
    above = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).astype(np.uint32).view(np.float32)
    to_below = np.abs(x.astype(np.float64) - below)
    to_above = np.abs(above.astype(np.float64) - x)
    even_below = (below.view(np.uint32) >> 16) % 2 == 0
    return np.where((to_below < to_above) | ((to_below == to_above) & even_below), below, above)


E4M3 = np.array([n / 8 * 2.0**-6 if n < 8 else (1 + n % 8 / 8) * 2.0 ** (n // 8 - 7) for n in range(127)])
"""The numbers of the format E4M3 that are not negative, in order."""


def fp8_e4m3(x):
    """The nearest E4M3 number of each float32, ties to the even one, at most 448; NaN for NaN."""
    size = np.minimum(np.abs(np.asarray(x, np.float64)), E4M3[-1])
    above = np.searchsorted(E4M3, np.nan_to_num(size))
    below = np.maximum(above - 1, 0)
    to_below, to_above = size - E4M3[below], E4M3[above] - size
    nearest = np.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    return np.copysign(np.where(np.isnan(x), np.nan, E4M3[nearest]), x).astype(np.float32)


def assert_stored(actual, x, fmt, group_size=None):
    """`actual` is what a format makes of the float32 rows x (..., D): the nearest value that it can hold."""
    assert actual.dtype == np.float32
    if fmt == "float32":
        np.testing.assert_array_equal(actual, x)
    elif fmt == "float16":
        np.testing.assert_array_equal(actual, x.astype(np.float16).astype(np.float32))
    elif fmt == "bfloat16":
        np.testing.assert_array_equal(actual, bfloat16(x))
    elif fmt == "fp8_e4m3":
        np.testing.assert_array_equal(actual, fp8_e4m3(x))
    else:
        levels = {"int8": 255, "int4": 15}[fmt]
        size = group_size or x.shape[-1]
        groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size).astype(np.float64)
        step = (groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)) / levels
        rounding = 4 * np.finfo(np.float32).eps * np.abs(groups).max(-1, keepdims=True)
        error = np.abs(actual.reshape(groups.shape) - groups)
        assert (error <= step / 2 + rounding).all()
