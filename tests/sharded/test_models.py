"""A model writes the same on a cache that lies on workers; and Ray is stopped by whom it was started."""

import subprocess
import sys

import pytest

import kvnumba

pytest.importorskip("ray", reason="the ray extra is not installed")

from workers import workers

from kvnumba.integrations.ray import ShardedKVCache

with open(kvnumba.models.batching.__file__, "rb") as file:
    TEXT = file.read()


@pytest.fixture(scope="module")
def decoder():
    return kvnumba.IncrementalDecoder.from_pretrained()


@pytest.fixture(params=["turn", "sequence"])
def both(request, decoder):
    """A cache on workers and one in this process: ``both(num_tokens, ...)``."""

    def both(num_tokens, max_num_seqs=1, **options):
        layout = decoder.layout(num_tokens, max_num_seqs=max_num_seqs, **options)
        group = workers(2, "numpy")
        group.replace()
        return (
            ShardedKVCache.from_layout(layout, max_num_seqs, workers=group, placement=request.param),
            kvnumba.PagedKVCache.from_layout(layout, max_num_seqs, backend="numpy"),
        )

    return both


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_the_same_tokens(decoder, both, dtype):
    """int4 with its recipe: rotated, calibrated, the newest tokens in float."""
    texts = []
    for cache in both(170, dtype=dtype):
        seq_id = cache.add_sequence()
        last = [rows[-1] for rows in decoder.prefill(cache, seq_id, TEXT[:150])][-1]
        text = bytearray()
        for _ in range(15):
            text.append(kvnumba.sample(last))
            last = decoder.extend(cache, [seq_id], [text[-1:]])[-1]
        texts.append(bytes(text))
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 3


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_the_same_requests(decoder, both, preemption, dtype):
    prompts = [TEXT[:90], TEXT[:90] + TEXT[500:510], TEXT[1000:1040], TEXT[2000:2003]]
    found = []
    for cache in both(100, max_num_seqs=4, dtype=dtype):
        batcher = kvnumba.ContinuousBatcher(decoder, cache, preemption=preemption)
        requests = [batcher.submit(prompt, 12) for prompt in prompts]
        batcher.run()
        found.append(
            [(request.generated, request.preemptions, request.num_cached_tokens) for request in requests]
        )
        cache.check_integrity()
        assert cache.num_free_blocks == cache.num_blocks
    assert found[0] == found[1]
    assert sum(preemptions for _, preemptions, _ in found[0]) > 0


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


START = """
import os, ray
from kvnumba.integrations.ray import ShardedKVCache, Workers
os.environ.pop("RAY_ADDRESS", None)
"""


def test_a_ray_that_was_started_here_ends_with_the_last_workers():
    code = (
        START
        + """
first = Workers(1, backend="numpy")
cache = ShardedKVCache(4, 2, 1, 4, 1, workers=1, backend="numpy")
first.close()
assert ray.is_initialized()
cache.check_integrity()
processes = [each.process for each in cache.worker_stats()]
del cache
assert not ray.is_initialized()
with Workers(1, backend="numpy"):  # and can be started again
    assert ray.is_initialized()
assert not ray.is_initialized()
print("done", processes)
"""
    )
    assert python(code).startswith("done [")


def test_a_ray_of_the_user_is_left_running():
    code = (
        START
        + """
ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=1)
with ShardedKVCache(4, 2, 1, 4, 1, workers=2, backend="numpy") as cache:
    cache.check_integrity()
assert ray.is_initialized()
assert ray.get(ray.put(3)) == 3
print("done")
"""
    )
    assert python(code) == "done\n"
