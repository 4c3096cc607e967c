"""Bulk writes and reads against a copy of the same bytes, one-token calls, and the machine's ceilings."""

import numpy as np
import pytest

import kvnumba
from kvnumba.backends.registry import available_backends
from kvnumba.commands.shapes import SHAPES
from kvnumba.formats import FORMATS

_, HQ, H, D = SHAPES["llama-3-8b"]
BACKENDS = available_backends()


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fmt", FORMATS)
def bench_write(benchmark, fmt, backend):
    cache = kvnumba.KVCache(1, 8192, H, D, fmt, backend=backend)
    x = normal(1, H, 8192, D)
    benchmark.group = "write 8192 tokens of float32"
    benchmark.extra_info.update(implementation=f"kvnumba {backend}", format=fmt, bytes=2 * x.nbytes)

    def write():
        cache.seq_lens = [0]
        cache.update(x, x)

    benchmark.pedantic(write, rounds=7, warmup_rounds=1)
    assert np.abs(cache.get_kv(0)[0] - x[0]).max() < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fmt", FORMATS)
def bench_read(benchmark, fmt, backend):
    cache = kvnumba.KVCache(1, 8192, H, D, fmt, backend=backend)
    x = normal(1, H, 8192, D)
    cache.update(x, x)
    benchmark.group = "read 8192 tokens to float32"
    benchmark.extra_info.update(implementation=f"kvnumba {backend}", format=fmt, bytes=2 * x.nbytes)
    k, _ = benchmark.pedantic(cache.get_kv, (0,), rounds=7, warmup_rounds=1)
    assert np.abs(k - x[0]).max() < 1


@pytest.mark.parametrize("group", ["write 8192 tokens of float32", "read 8192 tokens to float32"])
def bench_copy(benchmark, group):
    x = [normal(1, H, 8192, D) for _ in range(2)]
    benchmark.group = group
    benchmark.extra_info.update(implementation="NumPy", format="copy", bytes=2 * x[0].nbytes)
    out = [np.empty_like(part) for part in x]

    def copy():
        for target, part in zip(out, x, strict=True):
            np.copyto(target, part)

    benchmark.pedantic(copy, rounds=7, warmup_rounds=1)
    np.testing.assert_array_equal(out[1], x[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fmt", FORMATS)
def bench_one_token(benchmark, fmt, backend):
    cache = kvnumba.KVCache(1, 4096, H, D, fmt, backend=backend)
    x, q = normal(1, H, 63, D), normal(1, HQ, 1, D)
    cache.update(x, x)
    token = x[:, :, :1].copy()
    benchmark.group = "update and attend at 64 tokens, llama-3-8b, whole calls"
    benchmark.extra_info.update(implementation=f"kvnumba {backend}", format=fmt)

    def call():
        cache.seq_lens = [63]
        cache.update(token, token)
        return cache.attend(q)

    assert np.isfinite(benchmark(call)).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the ceilings are measured with the cpu backend's vectors")
@pytest.mark.parametrize("ceiling", ["read", "multiply-add"])
def bench_ceiling(benchmark, ceiling):
    from kvnumba.backends.cpu import ceilings

    benchmark.group = "ceilings"
    call, amount = ceilings.reading() if ceiling == "read" else ceilings.computing()
    benchmark.extra_info.update(implementation="the machine", format=ceiling, amount=amount)
    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
    assert amount > 0
