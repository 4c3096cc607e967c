"""Logits equal those of transformers' own models on the same folder (extra: transformers)."""

import json
from pathlib import Path

import numpy as np
import pytest

import kvnumba
from kvnumba.models.checkpoint import BUNDLED_MODEL

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

pytestmark = pytest.mark.filterwarnings("default")  # the peers' warnings are theirs

# Sharded; beside the checkout where there is one.
MEDIUM_MODEL = Path(__file__).parents[3] / "shared" / "model-medium"

VARIANTS = {
    "mha, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa, untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "mqa, wide heads": {"num_key_value_heads": 1, "head_dim": 20},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def assert_same_logits(folder, tokens, backend, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(torch.tensor(tokens)[None]).logits[0].numpy()
    decoder = kvnumba.IncrementalDecoder.from_pretrained(folder)
    cache = decoder.make_cache(len(tokens), backend=backend)
    got = np.concatenate(list(decoder.prefill(cache, cache.add_sequence(), tokens, **options)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [512, 130])
def test_the_bundled_model(backend, chunk_size):
    text = np.frombuffer(Path(json.__file__).read_bytes()[:1500], np.uint8)
    assert_same_logits(BUNDLED_MODEL, text.astype(np.int64), backend, chunk_size=chunk_size)


@pytest.mark.skipif(not MEDIUM_MODEL.is_dir(), reason="the larger model is not beside this checkout")
def test_a_sharded_model(backend):
    text = np.frombuffer(Path(json.__file__).read_bytes()[:400], np.uint8)
    assert_same_logits(MEDIUM_MODEL, text.astype(np.int64), backend)


def random_model(folder, config_class, model_class, **options):
    settings = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        **options,
    }
    torch.manual_seed(0)
    model_class(config_class(**settings)).save_pretrained(folder, max_shard_size="20KB")


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_llama_variants_in_shards(tmp_path, backend, options):
    random_model(tmp_path, transformers.LlamaConfig, transformers.LlamaForCausalLM, **options)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_logits(tmp_path, np.arange(200) * 7 % 50, backend, chunk_size=64)


def test_mistral_with_a_sliding_window(tmp_path, backend):
    random_model(tmp_path, transformers.MistralConfig, transformers.MistralForCausalLM, sliding_window=17)
    assert_same_logits(tmp_path, np.arange(90) * 11 % 50, backend, chunk_size=32)


def test_greedy_generation(backend):
    prompt = b"def read_text(path):\n    "
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.tensor(list(prompt))[None]
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    got = kvnumba.IncrementalDecoder.from_pretrained().generate(prompt, 40, backend=backend)
    assert got.tolist() == want[0, len(prompt) :].tolist()
