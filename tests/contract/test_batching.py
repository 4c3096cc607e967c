"""Requests that run together get what they would get alone."""

import numpy as np
import pytest

import kvnumba
from kvnumba import ContinuousBatcher

SOURCE = kvnumba.models.batching.__file__


@pytest.fixture(scope="module")
def decoder():
    return kvnumba.IncrementalDecoder.from_pretrained()


@pytest.fixture(scope="module")
def text():
    with open(SOURCE, "rb") as file:
        return file.read()


@pytest.fixture
def prompts(text):
    return [text[:90], text[:90] + text[500:510], text[1000:1040], text[2000:2003], text[:80]]


def cache_of(decoder, num_blocks, backend, max_num_seqs=5):
    config = decoder.config
    return kvnumba.PagedKVCache(
        num_blocks, 16, config.num_key_value_heads, config.head_dim, max_num_seqs,
        num_layers=config.num_hidden_layers, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize(("num_blocks", "max_num_seqs"), [(60, 5), (60, 2), (9, 5)])
@pytest.mark.parametrize("budget", [7, 64])
def test_the_tokens_of_each_are_those_it_gets_alone(
    decoder, prompts, backend, preemption, num_blocks, max_num_seqs, budget
):
    new = 16
    alone = [decoder.generate(p, new, backend=backend).tolist() for p in prompts]
    cache = cache_of(decoder, num_blocks, backend, max_num_seqs)
    batcher = ContinuousBatcher(decoder, cache, max_tokens_per_step=budget, preemption=preemption)
    requests = [batcher.submit(p, new) for p in prompts]
    finished = []
    while batcher.waiting or batcher.running:
        finished += batcher.step()
        cache.check_integrity()
    assert [request.generated for request in requests] == alone
    assert sorted(r.request_id for r in finished) == [0, 1, 2, 3, 4]
    assert cache.seq_lens == {}
    assert cache.num_free_blocks == num_blocks
    if num_blocks == 9 and budget == 64:
        assert sum(request.preemptions for request in requests) > 0


def test_drawn_tokens_too(decoder, prompts, backend):
    alone = [decoder.generate(p, 8, temperature=0.8, seed=n, backend=backend) for n, p in enumerate(prompts)]
    batcher = ContinuousBatcher(decoder, cache_of(decoder, 60, backend))
    requests = [batcher.submit(p, 8, temperature=0.8, seed=n) for n, p in enumerate(prompts)]
    batcher.run()
    assert [request.generated for request in requests] == [tokens.tolist() for tokens in alone]


def test_a_later_request_finds_what_an_earlier_one_computed(decoder, text, backend):
    cache = cache_of(decoder, 60, backend)
    batcher = ContinuousBatcher(decoder, cache)
    first = batcher.submit(text[:100], 4)
    batcher.run()
    second, other = batcher.submit(text[:100], 4), batcher.submit(text[:100], 4, cache_salt="other")
    batcher.run()
    assert (first.num_cached_tokens, second.num_cached_tokens, other.num_cached_tokens) == (0, 96, 0)
    assert first.generated == second.generated == other.generated


def test_no_more_tokens_in_a_step_than_the_budget(decoder, prompts, backend, monkeypatch):
    counts = []
    next_logits = decoder.next_logits
    monkeypatch.setattr(
        decoder,
        "next_logits",
        lambda c, ids, tokens: (counts.append(sum(map(len, tokens))), next_logits(c, ids, tokens))[1],
    )
    batcher = ContinuousBatcher(decoder, cache_of(decoder, 60, backend), max_tokens_per_step=20)
    for prompt in prompts:
        batcher.submit(prompt, 5)
    batcher.run()
    assert max(counts) == 20
    assert batcher.step() == []


def test_requests_that_can_never_run_are_refused(decoder, backend):
    cache = cache_of(decoder, 4, backend)
    batcher = ContinuousBatcher(decoder, cache)
    with pytest.raises(kvnumba.CacheFull, match="the request needs 5 blocks, the cache has 4"):
        batcher.submit(bytes(60), 6)
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        batcher.submit(b"", 1)
    with pytest.raises(ValueError, match="preemption: expected one of recompute, swap; got 'drop'"):
        ContinuousBatcher(decoder, cache, preemption="drop")
    assert batcher.submit(b"x", 0).finished
    stranger = cache.add_sequence()
    cache.step([stranger], [64])
    batcher.submit(b"abc", 3)
    with pytest.raises(kvnumba.CacheFull):
        batcher.run()
    cache.finish_sequence(stranger)
    batcher.run()
    assert np.array_equal(cache.stats().used_blocks, 0)
