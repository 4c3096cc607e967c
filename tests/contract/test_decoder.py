"""IncrementalDecoder: the bundled model, caches of every kind, one answer."""

import argparse
import inspect

import numpy as np
import pytest

import kvnumba
from kvnumba.models.decoder import LlamaConfig, sample, softmax

TEXT = inspect.getsource(argparse).encode()[:600]  # held out of the model's training


def reference_logits(decoder, tokens):
    """Logits (T, vocab) of a whole text without any cache, in float64, written out once more."""
    c = decoder.config
    heads, kv_heads, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    f64 = np.float64

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * weight

    def rope(x):
        half = np.arange(d // 2)
        # angles are float32 by definition: a model is trained with their rounding
        angle = np.arange(len(x), dtype=np.float32)[:, None] * np.float32(c.rope_theta ** (-2.0 * half / d))
        turned = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angle)[:, None]
        return np.concatenate((turned.real, turned.imag), axis=-1)

    x = decoder._embedding[tokens].astype(f64)
    n = len(tokens)
    for layer in decoder._layers:
        qkv = norm(x, layer.input_norm.astype(f64)) @ layer.qkv.astype(f64)
        q = rope(qkv[:, : heads * d].reshape(n, heads, d))
        k = rope(qkv[:, heads * d : (heads + kv_heads) * d].reshape(n, kv_heads, d))
        v = qkv[:, (heads + kv_heads) * d :].reshape(n, kv_heads, d)
        k, v = (np.repeat(y, heads // kv_heads, axis=1) for y in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        attended = np.einsum("hij,jhd->ihd", softmax(scores), v).reshape(n, -1)
        x = x + attended @ layer.output.astype(f64)
        gate, up = np.split(norm(x, layer.mlp_norm.astype(f64)) @ layer.gate_up.astype(f64), 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.down.astype(f64)
    return norm(x, decoder._norm.astype(f64)) @ decoder._head.astype(f64)


@pytest.fixture(scope="module")
def decoder():
    return kvnumba.IncrementalDecoder.from_pretrained()


@pytest.fixture(scope="module")
def tokens():
    return np.frombuffer(TEXT, np.uint8).astype(np.int64)


@pytest.fixture(scope="module")
def reference(decoder, tokens):
    return reference_logits(decoder, tokens)


def test_the_model_reads_text(reference, tokens):
    bits = -np.log2(softmax(reference)[np.arange(len(tokens) - 1), tokens[1:]]).mean()
    assert bits < 2  # chance is 8; on longer texts the model reaches 0.7


@pytest.mark.parametrize("chunk_size", [1, 100, 600])
def test_paged_prefill(decoder, tokens, reference, backend, chunk_size):
    tokens, reference = (tokens[:60], reference[:60]) if chunk_size == 1 else (tokens, reference)
    cache = decoder.make_cache(len(tokens), backend=backend)
    logits = np.concatenate(list(decoder.prefill(cache, cache.add_sequence(), tokens, chunk_size=chunk_size)))
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-4)


def test_a_ragged_batch(decoder, tokens, reference, backend):
    cache = decoder.make_cache(400, max_num_seqs=3, block_size=8, backend=backend)
    ids = [cache.add_sequence() for _ in range(3)]
    begin = [0, 0, 0]
    for new in ([40, 1, 100], [1, 30, 1], [1, 1, 1], [0, 5, 60]):
        pieces = [tokens[b : b + n] for b, n in zip(begin, new, strict=True)]
        logits = decoder.extend(cache, ids, pieces)
        want = np.concatenate([reference[b : b + n] for b, n in zip(begin, new, strict=True)])
        np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)
        begin = [b + n for b, n in zip(begin, new, strict=True)]


@pytest.mark.parametrize("one_cache", [True, False])
def test_forward_step_with_contiguous_caches(decoder, tokens, reference, backend, one_cache):
    c = decoder.config
    shape = (2, 64, c.num_key_value_heads, c.head_dim)
    if one_cache:
        caches = kvnumba.KVCache(*shape, num_layers=c.num_hidden_layers, backend=backend)
    else:
        caches = [kvnumba.KVCache(*shape, backend=backend) for _ in range(c.num_hidden_layers)]
    both = np.stack([tokens[:50], tokens[:50]])
    logits = decoder.forward_step(both[:, :40], caches, is_prefill=True)
    np.testing.assert_allclose(logits, np.stack([reference[39]] * 2), rtol=0, atol=1e-4)
    for t in range(40, 50):
        logits = decoder.forward_step(both[:, t], caches)
        np.testing.assert_allclose(logits, np.stack([reference[t]] * 2), rtol=0, atol=1e-4)


def test_formats_cost_little(decoder, tokens, reference, backend, fmt):
    """Quantised caches change the model's predictions by as much as their precision warrants."""
    cache = decoder.make_cache(len(tokens), dtype=fmt, backend=backend)
    logits = decoder.extend(cache, [cache.add_sequence()], [tokens])
    p, q = softmax(reference), softmax(logits)
    divergence = (p * (np.log(p) - np.log(q))).sum(-1).mean()
    allowed = {"float32": 1e-9, "float16": 1e-5, "bfloat16": 1e-3, "fp8_e4m3": 0.05, "int8": 1e-3, "int4": 0.5}
    assert divergence < allowed[fmt]


def test_generate(decoder, tokens, backend):
    new = decoder.generate(TEXT, 20, backend=backend)
    text = tokens.tolist()
    for _ in range(3):  # greedy, from the reference: enough to see that positions and cache go on rightly
        text.append(int(reference_logits(decoder, np.array(text))[-1].argmax()))
    assert new[:3].tolist() == text[-3:]
    assert len(new) == 20
    assert bytes(new.astype(np.uint8)).isascii()
    chunked = decoder.generate(TEXT, 20, chunk_size=7, block_size=5, backend=backend)
    np.testing.assert_array_equal(new, chunked)
    assert decoder.generate(TEXT, 0, backend=backend).tolist() == []


def test_temperature_and_seed(decoder, backend):
    draws = [
        decoder.generate(TEXT, 12, temperature=1.5, seed=s, backend=backend).tolist() for s in (1, 1, 2, 3)
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws[1:]}) > 1


def test_sampling_follows_the_softmax(rng):
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    counts = np.bincount([sample(logits, 1.0, rng) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.6, 0.3], atol=0.04)
    cold = [sample(logits, 0.05, rng) for _ in range(100)]
    assert set(cold) == {1}
    assert sample(logits, 0, rng) == 1


def test_generation_ends_with_the_text(backend):
    """The model closes a document with byte 0, which is not returned."""
    decoder = kvnumba.IncrementalDecoder(32, 4, 1, 64, 3, seed=1)
    free = decoder.generate([1, 2], 30, temperature=1.0, seed=5, backend=backend).tolist()
    decoder.config = LlamaConfig(**{**vars(decoder.config), "eos_token_ids": (free[4],)})
    stopped = decoder.generate([1, 2], 30, temperature=1.0, seed=5, backend=backend).tolist()
    assert stopped == free[: free.index(free[4])]


@pytest.mark.parametrize("num_kv_heads", [None, 1, 2])
def test_the_seeds_constructor(backend, num_kv_heads):
    decoder = kvnumba.IncrementalDecoder(32, 4, 2, 64, 50, num_kv_heads=num_kv_heads)
    caches = [kvnumba.KVCache(2, 64, num_kv_heads or 4, 8, backend=backend) for _ in range(2)]
    tokens = np.random.default_rng(0).integers(0, 50, (2, 12))
    logits = decoder.forward_step(tokens, caches, is_prefill=True)
    assert logits.shape == (2, 50)
    for b in range(2):
        np.testing.assert_allclose(logits[b], reference_logits(decoder, tokens[b])[-1], rtol=0, atol=1e-4)
    again = kvnumba.IncrementalDecoder(32, 4, 2, 64, 50, num_kv_heads=num_kv_heads)
    np.testing.assert_array_equal(again._head, decoder._head)


def test_a_full_cache_leaves_the_sequences(decoder, tokens, backend):
    cache = decoder.make_cache(32, max_num_seqs=1, backend=backend)
    seq_id = cache.add_sequence()
    decoder.extend(cache, [seq_id], [tokens[:30]])
    with pytest.raises(kvnumba.CacheFull):
        decoder.extend(cache, [seq_id], [tokens[30:40]])
    assert cache.seq_lens == {seq_id: 30}
    decoder.extend(cache, [seq_id], [tokens[30:32]])


def test_text_beyond_the_models_positions_books_nothing(backend):
    decoder = kvnumba.IncrementalDecoder(32, 4, 1, 10, 50)
    cache = decoder.make_cache(40, block_size=2, backend=backend)
    seq_id = cache.add_sequence()
    decoder.extend(cache, [seq_id], [[1] * 6])
    with pytest.raises(ValueError, match="the model takes 10 positions; got 11"):
        decoder.extend(cache, [seq_id], [[1] * 5])
    assert cache.num_free_blocks == 17


def test_one_cache_a_layer_is_all_or_nothing(backend):
    decoder = kvnumba.IncrementalDecoder(32, 4, 2, 64, 50)
    caches = [kvnumba.KVCache(1, length, 4, 8, backend=backend) for length in (8, 4)]
    decoder.forward_step([[1, 2, 3]], caches)
    with pytest.raises(kvnumba.CacheFull):
        decoder.forward_step([[1, 2]], caches)
    assert [cache.seq_lens for cache in caches] == [[3], [3]]
    caches[1].seq_lens = [2]
    with pytest.raises(ValueError, match=r"caches: expected equal lengths; got \[3\] and \[2\]"):
        decoder.forward_step([[1]], caches)


def test_caches_of_another_shape(decoder, backend):
    caches = {
        "the model has 4 layers; got a cache with 3": {"num_layers": 3, "num_kv_heads": 2, "head_dim": 64},
        "the model has 2 KV heads; got a cache with 4": {"num_layers": 4, "num_kv_heads": 4, "head_dim": 64},
        "the model has 64 head_dim; got a cache with 32": {
            "num_layers": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
        },
    }
    for message, shape in caches.items():
        paged = kvnumba.PagedKVCache(4, 4, max_num_seqs=1, backend=backend, **shape)
        with pytest.raises(ValueError, match=message):
            decoder.extend(paged, [paged.add_sequence()], [b"a"])
        with pytest.raises(ValueError, match=message):
            decoder.forward_step([[1]], kvnumba.KVCache(1, 4, backend=backend, **shape))


BAD_CALLS = {
    "no prompt": (lambda d: d.generate(b"", 5), ValueError, "prompt: expected at least one token"),
    "token": (lambda d: d.generate([1, 256], 5), ValueError, "token_ids: expected 0 to 255; got 256"),
    "text": (lambda d: d.generate("text", 5), ValueError, "token_ids: expected a list of integers"),
    "too long": (
        lambda d: d.generate(b"a" * 8000, 500),
        ValueError,
        "the model takes 8192 positions; got 8500",
    ),
    "temperature": (
        lambda d: d.generate(b"a", 5, temperature=-1),
        ValueError,
        "temperature: expected 0 or more",
    ),
    "format": (lambda d: d.generate(b"a", 5, dtype="int2"), ValueError, "dtype: expected one of"),
    "layers": (lambda d: d.forward_step([[1]], []), ValueError, "caches: expected 4 layers; got none"),
    "block_size": (
        lambda d: d.make_cache(8, block_size=0),
        ValueError,
        "block_size: expected at least 1; got 0",
    ),
    "chunk_size": (
        lambda d: d.generate(b"a", 5, chunk_size=0),
        ValueError,
        "chunk_size: expected at least 1; got 0",
    ),
    "d_model": (
        lambda d: kvnumba.IncrementalDecoder(30, 4, 1, 8, 8),
        ValueError,
        "d_model: expected an even multiple",
    ),
    "kv heads": (
        lambda d: kvnumba.IncrementalDecoder(32, 4, 1, 8, 8, num_kv_heads=3),
        ValueError,
        "num_kv_heads: expected a divisor of num_heads=4; got 3",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(decoder, call, error, message):
    with pytest.raises(error, match=message):
        call(decoder)
