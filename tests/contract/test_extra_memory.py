"""Extra memory of a call does not depend on what the cache holds (NumPy's arrays are seen by tracemalloc)."""

import tracemalloc

import numpy as np
import pytest

import kvnumba
from kvnumba.backends.registry import get_backend

H, HQ, D = 2, 4, 32


@pytest.fixture(autouse=True)
def on_the_host(backend):
    if get_backend(backend).device is not None:
        pytest.skip("what a device holds is not seen by tracemalloc")


def peak(call):
    """Bytes that a call holds at its peak beyond what was there before."""
    call()  # compiles, imports, fills plans
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("new_tokens", [1, 64])
def test_attend(backend, fmt, new_tokens, normal):
    peaks = []
    for length in (2048, 16384):
        cache = kvnumba.PagedKVCache(length // 16, 16, H, D, 1, fmt, backend=backend)
        seq_id = cache.add_sequence()
        k = normal(H, length, D)
        cache.update(seq_id, k, k)
        q = normal(HQ, new_tokens, D)
        peaks.append(peak(lambda: cache.attend(seq_id, q)))  # noqa: B023 (called at once)
    keys_in_float32 = 16384 * H * D * 4
    assert peaks[1] < keys_in_float32 / 2
    # the block table, 4 bytes a block, is all that grows
    assert peaks[1] - peaks[0] <= 4 * (16384 - 2048) // 16 + 4096


def test_a_long_prompt(backend):
    """Prefill of 32,768 tokens: beyond its result, as much extra memory as for 4,096."""
    peaks = []
    for length in (4096, 32768):
        x = np.zeros((1, 1, length, 8), np.float32)
        x[..., 0] = np.linspace(-1, 1, length)
        cache = kvnumba.KVCache(1, length, 1, 8, "int8", backend=backend)
        prefill = kvnumba.ChunkedPrefillCache(cache, 1024)

        def call(cache=cache, prefill=prefill, x=x):
            cache.reset()
            prefill.attend(x, x, x)

        out_and_lse = x.nbytes + x.nbytes // 8
        peaks.append(peak(call) - out_and_lse)
        assert cache.seq_lens == [length]
    assert peaks[1] <= 1.2 * peaks[0] + 65536
