"""Requests of a Hugging Face model that run together get what `generate` gives to each alone."""

import numpy as np
import pytest
import small_models
from conftest import ON_GPU
from small_models import DEVICE

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from kvnumba import CacheFull, ContinuousBatcher  # noqa: E402
from kvnumba.integrations.transformers import KVNumbaCache, PackedDecoder  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the peers' warnings are theirs
    pytest.mark.usefixtures("models_and_tensors_are_on_the_device"),
]

SMALL = {**small_models.SMALL, "num_hidden_layers": 3, "max_position_embeddings": 128}
MODELS = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 7},
    "Gemma2": {"sliding_window": 7, "attn_logit_softcapping": 2.0},
    "GptOss": {"sliding_window": 7, "num_local_experts": 2, "num_experts_per_tok": 2},
    "GPT2": {},
    "ModernBertDecoder": {"hidden_size": 64, "local_attention": 8},
}
"""What differs from SMALL. GPT-OSS has sinks, GPT-2 learned positions, ModernBERT takes no `logits_to_keep`."""

REFUSED = {
    "DiffLlama": ({}, "its attention cannot take several sequences"),
    "Moshi": ({"sliding_window": 7}, "its attention cannot take several sequences"),
    "MiMoV2Flash": ({"v_head_dim": 12, "swa_v_head_dim": 12}, "layers of one shape"),
    "Qwen3Next": ({"num_experts": 2, "num_hidden_layers": 4}, "no layers like LinearAttentionLayer"),
    "Bloom": ({}, 'expected the attention implementation "kvnumba"; got "eager"'),
}
"""What differs from SMALL, and why. DiffLlama computes with its keys; Moshi's masks lack the window of its layers."""

NEW = 10
BACKEND = "cuda" if ON_GPU else "numpy"  # all backends answer `step` in the same way, says tests/contract


def model_of(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def llama():
    with torch.device(DEVICE):
        return model_of("Llama")


@pytest.fixture
def prompts(rng):
    return [rng.integers(2, 60, length).tolist() for length in (5, 24, 1, 13)]


def alone(model, implementation, prompts, make_cache):
    """What `generate` makes of each prompt by itself."""
    model.set_attn_implementation(implementation)
    texts = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            past_key_values=make_cache(),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def decoder_of(model):
    model.set_attn_implementation("kvnumba")
    return PackedDecoder(model)


def batcher_of(decoder, num_tokens=200, **options):
    cache = decoder.make_cache(num_tokens, block_size=4, max_num_seqs=4, backend=BACKEND, **options)
    return ContinuousBatcher(decoder, cache, max_tokens_per_step=9)


def run(batcher, prompts):
    requests = [batcher.submit(prompt, NEW) for prompt in prompts]
    batcher.run()
    batcher.cache.check_integrity()
    assert batcher.cache.num_free_blocks == batcher.cache.num_blocks
    return requests


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_of_each_are_those_it_gets_alone(name, prompts):
    model = model_of(name, **MODELS[name])
    want = alone(model, "eager", prompts, lambda: transformers.DynamicCache(config=model.config))
    requests = run(batcher_of(decoder_of(model)), prompts)
    assert [request.generated for request in requests] == want


def test_requests_that_make_room_for_others_too(llama, prompts):
    want = alone(llama, "eager", prompts, transformers.DynamicCache)
    requests = run(batcher_of(decoder_of(llama), 40), prompts)
    assert [request.generated for request in requests] == want
    assert sum(request.preemptions for request in requests) > 0


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_formats_are_those_of_a_kvnumba_cache(llama, prompts, fmt):
    formats = {"key_format": fmt, "value_format": fmt, "backend": BACKEND}
    want = alone(llama, "kvnumba", prompts, lambda: KVNumbaCache(llama.config, **formats))
    batcher = batcher_of(decoder_of(llama), dtype=fmt)
    assert [request.generated for request in run(batcher, prompts)] == want
    assert (batcher.cache.key_format, batcher.cache.value_format) == (fmt, fmt)


def test_prefixes_are_computed_once(llama, prompts):
    asked = [prompts[1] + prompt for prompt in prompts]
    want = alone(llama, "eager", asked, transformers.DynamicCache)
    batcher = batcher_of(decoder_of(llama))
    run(batcher, asked[:1])
    requests = run(batcher, asked)
    assert [request.generated for request in requests] == want
    assert [request.num_cached_tokens for request in requests] == [28, 24, 24, 24]


def test_a_layer_that_uses_another_ones_keys(prompts):
    model = model_of(
        "Gemma3nText",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=7,
        intermediate_size=[48] * 4,
        vocab_size_per_layer_input=60,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    want = alone(model, "eager", prompts, lambda: transformers.DynamicCache(config=model.config))
    batcher = batcher_of(decoder_of(model))
    assert [request.generated for request in run(batcher, prompts)] == want
    assert batcher.cache.num_layers == 2


def test_a_text_ends_where_the_model_ends_it(llama, prompts):
    want = alone(llama, "eager", prompts, transformers.DynamicCache)
    end = want[1][4]
    llama.generation_config.eos_token_id = [end, 59]
    try:
        requests = run(batcher_of(decoder_of(llama)), prompts)
    finally:
        llama.generation_config.eos_token_id = None
    cut = [[*text, end][: [*text, end].index(end)] for text in want]
    assert [request.generated for request in requests] == cut
    assert len(requests[1].generated) <= 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_in_the_models_dtype(prompts, dtype):
    model = model_of("Llama").to(getattr(torch, dtype))
    decoder = decoder_of(model)
    cache = decoder.make_cache(100, max_num_seqs=4, backend=BACKEND)
    assert cache.key_format == dtype
    got = decoder.next_logits(cache, [cache.add_sequence() for _ in prompts], prompts)
    model.set_attn_implementation("eager")
    exact = model.float()
    for row, prompt in zip(got, prompts, strict=True):
        with torch.no_grad():
            want = exact(torch.tensor([prompt])).logits[0, -1].cpu().numpy()
        assert row.dtype == np.float32
        error = np.linalg.norm(row - want) / np.linalg.norm(want)
        assert error < {"float16": 0.01, "bfloat16": 0.08}[dtype]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_is_refused(name):
    options, message = REFUSED[name]
    model = model_of(name, **options)
    with pytest.raises(ValueError, match=message):
        decoder_of(model)


def test_encoders_are_refused():
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    model.config._attn_implementation = "kvnumba"
    with pytest.raises(ValueError, match="expected a decoder whose forward takes position_ids"):
        PackedDecoder(model)


def test_requests_that_cannot_be_served_are_refused(llama):
    batcher = batcher_of(decoder_of(llama))
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        batcher.submit([], NEW)
    with pytest.raises(ValueError, match="prompt: expected 0 to 59; got 60"):
        batcher.submit([3, 60], NEW)
    with pytest.raises(ValueError, match="prompt: the model takes 128 positions; got 129"):
        batcher.submit([3] * 119, NEW)
    with pytest.raises(CacheFull, match="the request needs 20 blocks"):
        batcher_of(decoder_of(llama), 40).submit([3] * 71, NEW)


def test_a_cache_of_another_shape_is_refused(llama):
    cache = decoder_of(model_of("Llama", num_hidden_layers=4)).make_cache(40, backend=BACKEND)
    with pytest.raises(
        ValueError, match=r"expected \(layers, H, D, Dv\) \(3, 2, 16, 16\).* got \(4, 2, 16, 16\)"
    ):
        decoder_of(llama).next_logits(cache, [cache.add_sequence()], [[3]])


def test_rotary_frequencies_that_follow_the_longest_sequence_end_requests_before_they_change(prompts):
    model = model_of(
        "Llama",
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 3.2,
            "original_max_position_embeddings": 40,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    )
    want = alone(model, "eager", prompts, transformers.DynamicCache)
    batcher = batcher_of(decoder_of(model))
    with pytest.raises(ValueError, match="prompt: the model takes 40 positions; got 41"):
        batcher.submit([3] * 31, NEW)
    assert [request.generated for request in run(batcher, prompts)] == want
