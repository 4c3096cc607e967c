"""Hugging Face models on a `KVNumbaCache`: every way of generating gives the tokens that DynamicCache gives."""

import copy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import small_models
from conftest import ON_GPU
from small_models import DEVICE

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from kvnumba.caches.step import Step  # noqa: E402
from kvnumba.integrations.transformers import KVNumbaCache, attention_forward, calibrate, captured, versions  # noqa: E402
from kvnumba.integrations.transformers.attention import dense_attention  # noqa: E402
from kvnumba.integrations.transformers.deferred import Deferred  # noqa: E402
from kvnumba.integrations.transformers.masks import DeferredMask, attention_mask  # noqa: E402
from kvnumba.models.checkpoint import BUNDLED_MODEL  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the peers' warnings are theirs
    pytest.mark.usefixtures("models_and_tensors_are_on_the_device"),
]

SMALL = {**small_models.SMALL, "num_hidden_layers": 3}
MODELS = {
    "Llama": {},
    "Llama, MHA": {"num_key_value_heads": 4},
    "Qwen3": {},
    "Mistral": {"sliding_window": 7},
    "Gemma2": {"sliding_window": 7, "num_hidden_layers": 4, "attn_logit_softcapping": 2.0},
    "Gemma3": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "GptOss": {
        "sliding_window": 7,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,  # a choice of one could tip over at the least difference, and all would change
    },
    "Phi3": {"hidden_size": 64},
}  # fmt: skip
"""What differs from SMALL. Gemma 2 and GPT-OSS have no SDPA path: all are compared with eager attention."""

CHANGING = {
    "DiffLlama": {},
    "JetMoe": {"num_hidden_layers": 2, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Doge": {"keep_window_size": 6},
    "DeepseekV3": {
        "head_dim": 8, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16,
    },
}  # fmt: skip
"""Models that compute with what `update` returned: they slice and repeat values, repeat keys, make a mask of values,
keep latents. What differs from SMALL."""

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.fixture(scope="module")
def make_model():
    made = {}

    def make(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            family = name.split(",")[0]
            config_class = getattr(
                transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
            )
            model_class = getattr(transformers, f"{family}ForCausalLM")
            torch.manual_seed(0)
            settings = {**SMALL, **{**MODELS, **CHANGING}[name], **options}
            model = model_class(config_class(**settings)).eval()
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("sinks"):
                    torch.nn.init.normal_(parameter)
            made[key] = model
        return made[key]

    return make


def prompts(batch_size=2, length=19, padding=6):
    """Token ids, and a mask with padding on the left of the first."""
    ids = torch.randint(1, 60, (batch_size, length), generator=torch.Generator(DEVICE).manual_seed(1))
    ids[:, 10:] = ids[:, :9]  # something to look up
    mask = torch.ones_like(ids)
    if batch_size > 1:
        mask[0, :padding] = 0
        ids[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, implementation, cache, inputs, **options):
    model.set_attn_implementation(implementation)
    torch.manual_seed(2)
    settings = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        return model.generate(**inputs, past_key_values=cache, **settings)


def dynamic(model):
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_dynamic_cache(make_model, backend, name, mode):
    model = make_model(name)
    inputs = prompts(1 if mode == "prompt lookup" else 2)
    want = generate(model, "eager", dynamic(model), inputs, **MODES[mode])
    got = generate(model, "kvnumba", KVNumbaCache(model.config, backend=backend), inputs, **MODES[mode])
    assert got.tolist() == want.tolist()


@pytest.mark.skipif(ON_GPU, reason="of models on the host")
@pytest.mark.parametrize(("mode", "backend"), [*((mode, "numpy") for mode in MODES), ("greedy", "cpu")])
def test_tokens_with_blocks_of_one_head(make_model, backend, mode):
    model = make_model("Llama")
    inputs = prompts(1 if mode == "prompt lookup" else 2)
    want = generate(model, "eager", dynamic(model), inputs, **MODES[mode])
    cache = KVNumbaCache(model.config, per_head=True, backend=backend)
    assert generate(model, "kvnumba", cache, inputs, **MODES[mode]).tolist() == want.tolist()


@pytest.mark.skipif(ON_GPU, reason="of models on the host")
def test_what_blocks_of_one_head_do_not_have(make_model):
    model, ids = make_model("Llama"), prompts()["input_ids"]
    for options, message in (
        (
            {"recent_tokens": 4, "key_format": "int4"},
            "recent_tokens: expected 0 with blocks of one head; got 4",
        ),
        (
            {"calibration": calibrate(model, torch.arange(99)[None] % 50)},
            "calibration: expected None with blocks of one head",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            KVNumbaCache(model.config, per_head=True, **options)
    message = "per_head: expected a model whose layers are all of full_attention; .* one of sliding_attention"
    with pytest.raises(ValueError, match=message):
        KVNumbaCache(make_model("Gemma2").config, per_head=True)
    cache = KVNumbaCache(model.config, per_head=True, key_format="int4", backend="numpy")
    assert repr(cache) == (
        "KVNumbaCache(layers=3, tokens=0, keys int4, values as given, scale_dtype='float16', rotation=True, "
        "calibration=None, of one head each, numpy, 0.0 MB)"
    )
    for implementation, mask in (("eager", None), ("kvnumba", torch.zeros(2, 1, 19, 19))):
        model.set_attn_implementation(implementation)
        with (
            pytest.raises(ValueError, match="per_head: expected a model that attends out of the storage"),
            torch.no_grad(),
        ):
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        cache.crop(0)
        assert cache.get_seq_length() == 0
    latents = make_model("DeepseekV3")
    with pytest.raises(ValueError, match="per_head: expected a model that attends out of the storage"):
        generate(latents, "kvnumba", KVNumbaCache(latents.config, per_head=True, backend="numpy"), prompts())


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_tokens_of_a_model_that_changes_values(make_model, backend, mode):
    model = make_model("DiffLlama")
    want = generate(model, "eager", dynamic(model), prompts(), **MODES[mode])
    got = generate(model, "kvnumba", KVNumbaCache(model.config, backend=backend), prompts(), **MODES[mode])
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", [*MODELS, *CHANGING])
def test_logits_are_those_of_dynamic_cache(make_model, backend, name):
    model = make_model(name)
    inputs = prompts()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def logits(implementation, cache):
        model.set_attn_implementation(implementation)
        parts = []
        with torch.no_grad():
            for first, last in ((0, 4), (4, 15), (15, 16), (16, 19)):  # padding reaches into the second
                out = model(
                    input_ids=ids[:, first:last], attention_mask=mask[:, :last], past_key_values=cache
                )
                parts.append(out.logits)
        return torch.cat(parts, dim=1)[mask.bool()].numpy(force=True)

    want = logits("eager", dynamic(model))
    for implementation in ("kvnumba", "eager"):  # out of the storage, and dense
        got = logits(implementation, KVNumbaCache(model.config, backend=backend))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_plain_masks_are_not_made_dense(make_model, name, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("dense attention")

    monkeypatch.setattr("kvnumba.integrations.transformers.attention.dense_attention", fail)
    model = make_model(name)
    generate(model, "kvnumba", KVNumbaCache(model.config), prompts(), prefill_chunk_size=5)


@pytest.mark.parametrize(("chunk", "calls"), [(64, 0), (5, 6)])
def test_chunked_masks_are_made_dense_only_for_prompts_of_several_chunks(monkeypatch, chunk, calls):
    seen = []
    monkeypatch.setattr(
        "kvnumba.integrations.transformers.attention.dense_attention",
        lambda *args: seen.append(args[0].shape[2]) or dense_attention(*args),
    )
    config = transformers.Llama4TextConfig(
        **{**SMALL, "num_local_experts": 2, "intermediate_size_mlp": 48, "num_hidden_layers": 8},
        attention_chunk_size=chunk,
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    generate(model, "kvnumba", KVNumbaCache(config, backend=None if ON_GPU else "numpy"), prompts(1))
    assert seen == [19] * calls  # 6 of its layers have chunks; each token after the prompt sees a window


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_a_4d_mask_is_honoured(make_model, backend, name):
    model = make_model(name)
    ids = prompts()["input_ids"]
    seen = torch.ones(19, 19, dtype=torch.bool).tril()
    seen[12:, 3] = False
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 19, 19)
    results = []
    for implementation, cache in (
        ("eager", dynamic(model)),
        ("kvnumba", KVNumbaCache(model.config, backend=backend)),
    ):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(
                model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits.numpy(force=True)
            )
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4)


def test_holes_in_a_2d_mask_are_honoured(make_model, backend):
    model = make_model("Llama")
    inputs = prompts()
    inputs["attention_mask"][1, 9] = 0
    inputs["attention_mask"][1, 17:] = 0
    real = inputs["attention_mask"].bool()
    results = []
    for implementation, cache in (
        ("eager", dynamic(model)),
        ("kvnumba", KVNumbaCache(model.config, backend=backend)),
    ):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(**inputs, past_key_values=cache).logits[real].numpy(force=True))
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_without_a_cache(make_model, name):
    model = make_model(name)
    inputs = prompts()
    results = []
    for implementation in ("eager", "kvnumba"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(**inputs, use_cache=False).logits
        results.append(out[inputs["attention_mask"].bool()].numpy(force=True))
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_assisted_decoding(make_model, name):
    model, assistant = make_model(name), make_model("Llama", num_hidden_layers=1)
    assistant.set_attn_implementation("eager")
    want = generate(model, "eager", dynamic(model), prompts(1), assistant_model=assistant)
    got = generate(model, "kvnumba", KVNumbaCache(model.config), prompts(1), assistant_model=assistant)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_chat_over_several_calls(make_model, name):
    model = make_model(name)
    turns = [torch.tensor([[5, 9, 12, 33]]), torch.tensor([[7, 7, 21]]), torch.tensor([[40]])]
    results = []
    for implementation, cache in (("eager", dynamic(model)), ("kvnumba", KVNumbaCache(model.config))):
        ids = torch.zeros((1, 0), dtype=torch.long)
        for turn in turns:
            ids = torch.cat((ids, turn), dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = generate(model, implementation, cache, inputs, max_new_tokens=9)
        results.append(ids.tolist())
    assert results[0] == results[1]
    assert cache.get_seq_length() == len(results[1][0]) - 1


@pytest.mark.skipif(ON_GPU, reason="of models on the host")
def test_captured_changes_nothing_on_the_host(make_model):
    model = make_model("Llama")
    want = generate(model, "kvnumba", KVNumbaCache(model.config), prompts())
    with captured(model):
        with captured(model):
            got = generate(model, "kvnumba", KVNumbaCache(model.config), prompts())
        assert "forward" in vars(model)
    assert got.tolist() == want.tolist()
    with pytest.raises(KeyError), captured(model):
        raise KeyError
    assert "forward" not in vars(model)


def test_streaming(make_model):
    class Streamer:
        tokens = ()

        def put(self, value):
            self.tokens += tuple(value.reshape(-1).tolist())

        def end(self):
            pass

    model, streamer = make_model("Llama"), Streamer()
    out = generate(model, "kvnumba", KVNumbaCache(model.config), prompts(1), streamer=streamer)
    assert streamer.tokens == tuple(out[0].tolist())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["Llama", "GptOss"])
def test_models_in_16_bits(make_model, backend, name, dtype):
    """They err, against float32, at most three times as much as on DynamicCache; the cache is in their dtype."""
    inputs, real = prompts(), prompts()["attention_mask"].bool()
    exact = make_model(name)
    model = copy.deepcopy(exact).to(getattr(torch, dtype))
    cache = KVNumbaCache(model.config, backend=backend)
    logits = {}
    for key, m, implementation, c in (
        ("exact", exact, "eager", dynamic(exact)),
        ("peer", model, "eager", dynamic(model)),
        ("ours", model, "kvnumba", cache),
    ):
        m.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[key] = m(**inputs, past_key_values=c).logits[real].float()
    error, allowed = ((logits[key] - logits["exact"]).abs().mean() for key in ("ours", "peer"))
    assert error <= 3 * allowed
    assert cache._groups
    assert {group.pool.key_format for group in cache._groups.values()} == {dtype}


def divergence(want, got):
    """Mean KL divergence of next-token distributions, in nats."""
    want, got = torch.log_softmax(want.double(), dim=-1), torch.log_softmax(got.double(), dim=-1)
    return float((want.exp() * (want - got)).sum(dim=-1).mean())


@pytest.mark.parametrize(
    ("fmt", "arithmetic", "bound"),
    [("float16", None, 1e-5), ("int8", None, 1e-3), ("int8", "bfloat16", 1e-3), ("int4", None, 0.2)],
)
def test_quantised_formats_on_a_trained_model(backend, fmt, arithmetic, bound):
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    ids = torch.tensor(list(Path(copy.__file__).read_bytes()[:400]))[None]
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation("kvnumba")
        cache = KVNumbaCache(
            model.config, key_format=fmt, value_format=fmt, arithmetic=arithmetic, backend=backend
        )
        got = torch.cat(
            [model(input_ids=part, past_key_values=cache).logits for part in ids.split(100, dim=1)], dim=1
        )
    assert 0 < divergence(want, got) < bound


LATENTS = {
    "num_hidden_layers": 2, "initializer_range": 0.2, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 16,
}  # fmt: skip
"""Latent attention with the widths of DeepSeek V3: 512 and, of the keys' part that rotates, 64, one head."""


@pytest.mark.parametrize(
    ("fmt", "bound"),
    [("float16", 1e-5), ("bfloat16", 1e-4), ("int8", 1e-3), ("int4", 1e-2), ("fp8_e4m3", 5e-2)],
)
@pytest.mark.parametrize("family", ["DeepseekV3", "Glm4MoeLite"])
def test_formats_on_latents(backend, family, fmt, bound):
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **LATENTS, "head_dim": 64})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(1, 60, (1, 100), generator=torch.Generator(DEVICE).manual_seed(1))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation("kvnumba")
        cache = KVNumbaCache(model.config, key_format=fmt, value_format=fmt, backend=backend)
        parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(50, dim=1)]
    pool = next(iter(cache._groups.values())).pool
    assert (pool.num_kv_heads, pool.head_dim, pool.value_head_dim) == (1, 512, 64)
    assert 0 < divergence(want, torch.cat(parts, dim=1)) < bound


def test_sinks_that_change_are_seen(make_model):
    model = make_model("GptOss")
    caches = [KVNumbaCache(model.config), KVNumbaCache(model.config)]
    forward(model, caches[0])
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    before = [parameter.detach().clone() for parameter in sinks]
    new = {"input_ids": torch.ones((2, 1), dtype=torch.long)}
    new["attention_mask"] = torch.nn.functional.pad(prompts()["attention_mask"], (0, 1), value=1)
    try:
        with torch.no_grad():
            for parameter in sinks:
                parameter += 1.0
        forward(model, caches[1])
        caches[0].crop(-19)
        forward(model, caches[0])
        got, want = (forward(model, cache, **new).logits.numpy(force=True) for cache in caches)
        np.testing.assert_array_equal(got, want)
    finally:
        with torch.no_grad():
            for parameter, value in zip(sinks, before, strict=True):
                parameter.copy_(value)


def test_arithmetic_is_what_was_asked_for(make_model, monkeypatch):
    asked, attend = set(), Step.attend

    def recording(self, *args, **options):
        asked.add(options["scoring"].arithmetic)
        return attend(self, *args, **options)

    monkeypatch.setattr(Step, "attend", recording)
    for arithmetic in (None, "bfloat16"):
        asked.clear()
        forward(make_model("Llama"), KVNumbaCache(make_model("Llama").config, arithmetic=arithmetic))
        assert asked == {arithmetic}


def test_repr_says_what_is_used(make_model):
    model = make_model("Llama")
    cache = KVNumbaCache(model.config, key_format="int8", backend="auto")
    assert repr(cache) == "KVNumbaCache(layers=3, tokens=0, keys int8, values as given, auto, 0.0 MB)"
    forward(model, cache)
    assert repr(cache).startswith("KVNumbaCache(layers=3, tokens=19, keys int8, values as given, c")
    assert " auto," not in repr(cache)


@pytest.mark.parametrize("fmt", ["fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_quantised_formats_on_random_models(make_model, name, fmt):
    """Divergence is hardly more than that of plain float32 attention on the same stored keys and values.

    It grows with the square of the logits' error. An element of int8 is off by up to 1/2 of 255 steps, which is 2**-9
    of the row's range, in the other formats by more. Kernels that round queries and weights to 16 bits add at most
    2**-11 of these: 1/4, if all of it goes the same way, and (1 + 1/4)**2 < 2.
    """
    model = make_model(name)
    inputs = prompts(1)
    logits = {}
    for implementation, cached in (("exact", False), ("plain", True), ("ours", True)):
        model.set_attn_implementation("kvnumba" if implementation == "ours" else "eager")
        cache = KVNumbaCache(model.config, key_format=fmt, value_format=fmt) if cached else dynamic(model)
        with torch.no_grad():
            logits[implementation] = model(**inputs, past_key_values=cache).logits
    plain = divergence(logits["exact"], logits["plain"])
    assert 0 < divergence(logits["exact"], logits["ours"]) < 2 * plain


def test_operations_on_the_batch(make_model, backend):
    """After each operation the next logits are those of DynamicCache after the same."""
    model = make_model("Gemma2")
    inputs = prompts()
    caches = {"eager": dynamic(model), "kvnumba": KVNumbaCache(model.config, backend=backend)}
    mask = inputs["attention_mask"]

    def feed(ids, mask):
        logits = []
        for implementation, cache in caches.items():
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                out = model(input_ids=ids, attention_mask=mask, past_key_values=cache)
            logits.append(out.logits[mask[:, -ids.shape[1] :].bool()].numpy(force=True))
        np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4)

    def apply(operation, *args):
        for cache in caches.values():
            getattr(cache, operation)(*args)

    apply("activate_past_recording")
    feed(inputs["input_ids"], mask)
    apply("batch_repeat_interleave", 2)
    mask = torch.nn.functional.pad(mask.repeat_interleave(2, dim=0), (0, 1), value=1)
    feed(torch.tensor([[3], [4], [5], [6]]), mask)
    order = torch.tensor([2, 2, 0, 3])
    apply("reorder_cache", order)
    mask = torch.nn.functional.pad(mask[order], (0, 3), value=1)
    feed(torch.tensor([[3, 8, 1], [4, 4, 4], [5, 2, 9], [6, 1, 6]]), mask)
    apply("crop", -2)
    mask = mask[:, :-2]
    apply("batch_select_indices", torch.tensor([3, 1]))
    mask = torch.nn.functional.pad(mask[[3, 1]], (0, 1), value=1)
    feed(torch.tensor([[11], [12]]), mask)
    assert caches["kvnumba"].get_seq_length() == caches["eager"].get_seq_length()
    apply("reset")
    assert caches["kvnumba"].get_seq_length() == caches["kvnumba"].used_bytes() == 0
    feed(torch.tensor([[3, 4, 5]]), torch.ones((1, 3), dtype=torch.long))


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("how", ["save", "deepcopy"])
def test_a_copy_goes_on_by_itself(make_model, backend, tmp_path, name, how):
    model = make_model(name)
    inputs = prompts()
    model.set_attn_implementation("kvnumba")
    options = {"key_format": "int8", "value_format": "int4", "backend": backend}
    if how == "save":
        options["recent_tokens"] = 0  # a file has the blocks only
    cache = KVNumbaCache(model.config, **options)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    if how == "deepcopy":
        other = copy.deepcopy(cache)
        assert other.used_bytes() == cache.used_bytes()
    else:
        cache.save(tmp_path / "chat", fingerprint="this")
        cache.save(tmp_path / "chat", fingerprint="this")
        other = KVNumbaCache(model.config, **options)
        with pytest.raises(ValueError, match="fingerprint: expected 'that'"):
            other.load(tmp_path / "chat", fingerprint="that")
        other.load(tmp_path / "chat", fingerprint="this")
    assert other.get_seq_length() == 19
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)

    def following(cache, tokens):
        with torch.no_grad():
            out = model(input_ids=torch.tensor(tokens), attention_mask=mask, past_key_values=cache)
        return out.logits.numpy(force=True)

    different = following(other, [[30], [31]])
    first = following(cache, [[3], [4]])
    other.crop(-1)
    np.testing.assert_array_equal(following(other, [[3], [4]]), first)
    assert not np.array_equal(different, first)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_int4_is_rotated_calibrated_and_has_recent_tokens(make_model, backend, name):
    """Its logits are nearer to those of float32 than plain int4's, in layers with narrow windows too."""
    model = make_model(name)
    ids = torch.arange(3, 63).reshape(2, 30) % 50
    calibration = calibrate(model, torch.arange(400).reshape(4, 100) * 7 % 50)
    model.set_attn_implementation("kvnumba")
    logits = {}
    for kind, options in {
        "exact": {},
        "plain": {"rotation": False, "recent_tokens": 0, "scale_dtype": "float32"},
        "rotated": {"recent_tokens": 0},
        "good": {"calibration": calibration, "sink_tokens": 2},
    }.items():
        fmt = None if kind == "exact" else "int4"
        cache = KVNumbaCache(model.config, key_format=fmt, value_format=fmt, backend=backend, **options)
        with torch.no_grad():
            logits[kind] = torch.cat(
                [
                    model(input_ids=part, past_key_values=cache).logits
                    for part in ids.split((20, 1, 1, 8), dim=1)
                ],
                dim=1,
            )
        if kind == "good":
            pool = next(iter(cache._groups.values())).pool
            assert pool.layout.transform.rotation
            assert pool.layout.transform.calibration is not None
            window = next(iter(cache._groups.values())).sliding_window
            assert pool.layout.recent_tokens == min(128, window or 128)
    errors = {kind: (x - logits["exact"]).square().mean() for kind, x in logits.items()}
    assert errors["good"] < errors["rotated"] / 4
    assert errors["good"] < errors["plain"] / 4


def test_options_of_the_cache_are_checked_at_once(make_model):
    model = make_model("Llama")
    calibration = calibrate(make_model("Qwen3"), torch.arange(200)[None] % 50).select([0])
    for options, error, message in (
        ({"num_layers": 2}, TypeError, "num_layers: the model decides it"),
        ({"groupsize": 2}, TypeError, "unknown option 'groupsize'"),
        ({"key_format": "int5"}, ValueError, "key_format: expected one of"),
        ({"recent_tokens": 4}, ValueError, "recent_tokens: expected 0, float32 is float already; got 4"),
        ({"key_format": "int4", "recent_tokens": -4}, ValueError, "recent_tokens: expected at least 0"),
        (
            {"calibration": calibration},
            ValueError,
            r"calibration: expected one of \d+ layers; got Calibration",
        ),
    ):
        with pytest.raises(error, match=message):
            KVNumbaCache(model.config, **options)


def test_what_a_killed_save_left_is_cleared(make_model, tmp_path):
    model = make_model("Llama")
    cache = KVNumbaCache(model.config)
    forward(model, cache)
    token = "0123456789abcdef" * 2
    for name in (
        f"0.{token}.kv",
        f".0.{token}.kv.0a_9b8c7.tmp",
        ".cache.json.0a_9b8c7.tmp",
        "mine.kv",
        "notes.txt",
    ):
        (tmp_path / name).write_bytes(b"x")
    cache.save(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left >= {"cache.json", "mine.kv", "notes.txt"}
    assert len(left) == 4
    assert not any(token in name for name in left)
    other = KVNumbaCache(model.config)
    other.load(tmp_path)
    assert other.get_seq_length() == 19


def test_sliding_layers_give_memory_back(make_model, monkeypatch):
    monkeypatch.setattr("kvnumba.integrations.transformers.settings.BLOCK_SIZE", 4)
    model = make_model("Mistral")
    cache = KVNumbaCache(model.config)
    generate(model, "kvnumba", cache, prompts(1), max_new_tokens=200)
    full = KVNumbaCache(make_model("Llama").config)
    generate(make_model("Llama"), "kvnumba", full, prompts(1), max_new_tokens=200)
    assert cache.get_seq_length() == full.get_seq_length() == 218
    assert cache.used_bytes() < full.used_bytes() / 10


def test_many_small_blocks(make_model, backend, monkeypatch):
    monkeypatch.setattr("kvnumba.integrations.transformers.settings.BLOCK_SIZE", 2)
    for name in ("Gemma2", "Llama"):
        model = make_model(name)
        want = generate(model, "eager", dynamic(model), prompts(), num_beams=3, max_new_tokens=25)
        cache = KVNumbaCache(model.config, backend=backend)
        got = generate(model, "kvnumba", cache, prompts(), num_beams=3, max_new_tokens=25)
        assert got.tolist() == want.tolist()
        for group in cache._groups.values():
            group.pool.check_integrity()


def forward(model, cache, **options):
    model.set_attn_implementation("kvnumba")
    with torch.no_grad():
        return model(**{**prompts(), **options}, past_key_values=cache)


def test_what_cannot_be_honoured_is_refused(make_model):
    model = make_model("Llama")
    cache = KVNumbaCache(model.config)
    forward(model, cache)
    with pytest.raises(ValueError, match="expected the 2 sequences that the cache holds; got 1"):
        forward(model, cache, input_ids=torch.ones((1, 1), dtype=torch.long), attention_mask=None)
    with pytest.raises(ValueError, match=r"the padding that earlier calls had, \[6, 0\] tokens"):
        forward(model, cache, input_ids=torch.ones((2, 1), dtype=torch.long), attention_mask=None)
    cache.reset()
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        model(**prompts(), past_key_values=cache)
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0 or less; got 1"):
        cache.crop(1)
    with pytest.raises(TypeError, match=r"config: expected model\.config; got a dict"):
        KVNumbaCache({})
    with pytest.raises(ValueError, match="key_format: expected one of float32"):
        KVNumbaCache(model.config, key_format="int5")
    with pytest.raises(
        ValueError, match="arithmetic: expected one of float32, bfloat16, bfloat16x3; got .int8."
    ):
        KVNumbaCache(model.config, arithmetic="int8")


def halves_swapped(x):
    return torch.cat(x.chunk(2, dim=1)[::-1], dim=1)


def doubled(x):
    """The same tensor after a change in place, where that can be done without the cache."""
    if not isinstance(x, Deferred):
        return x * 2
    x.view(x.shape).mul_(2)
    return x


CHANGES = {
    "the same in new tensors": lambda k, v: (k + 0, v + 0),
    "keys": lambda k, v: (k * 1.5, v),
    "values": lambda k, v: (k, halves_swapped(v)),
    "keys through a view": lambda k, v: (doubled(k), v),
    "one for the other": lambda k, v: (v, k),
    "keys are values": lambda k, v: (k, k),
    "values of the layer before": None,
}
"""What a model might do between `update` and attention, given all keys and values."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_what_a_model_changes_counts(make_model, backend, name, change, monkeypatch):
    model, earlier, results = make_model(name), [], []

    def changing(update):
        def call(self, *args, **kwargs):
            pair = update(self, *args, **kwargs)
            earlier.append(pair)
            if CHANGES[change]:
                return CHANGES[change](*pair)
            return pair[0], earlier[-2 if args[2] else -1][1]

        return call

    mask = prompts()["attention_mask"]
    for implementation, cache in (
        ("eager", dynamic(model)),
        ("kvnumba", KVNumbaCache(model.config, backend=backend)),
    ):
        model.set_attn_implementation(implementation)
        kind = type(cache)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(kind, "update", changing(kind.update))
            logits = []
            for first, last in ((0, 15), (15, 16), (16, 19)):
                out = model(
                    input_ids=prompts()["input_ids"][:, first:last],
                    attention_mask=mask[:, :last],
                    past_key_values=cache,
                )
                logits.append(out.logits)
        results.append(torch.cat(logits, dim=1)[mask.bool()].numpy(force=True))
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4)


def test_changes_in_place_are_refused(make_model):
    model = make_model("Llama")
    model.set_attn_implementation("kvnumba")
    cache = KVNumbaCache(model.config)
    k, v = cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
    zeros = torch.zeros(1, 2, 3, 16)
    for change in (
        lambda: k.mul_(2),
        lambda: k.__setitem__((0, 0), 1.0),
        lambda: torch.add(zeros, 1, out=v),
        lambda: v.copy_(zeros),
    ):
        with pytest.raises(ValueError, match="cannot be changed in place: .* use transformers.DynamicCache"):
            change()
    zeros.copy_(v)
    assert (zeros == 1).all()
    assert repr(k) == f"DeferredKeys(shape=(1, 2, 3, 16), dtype=torch.float32, device={k.device})"


def test_keys_of_an_earlier_pass_are_refused(make_model):
    model = make_model("Llama", num_hidden_layers=1)
    model.set_attn_implementation("kvnumba")
    cache = KVNumbaCache(model.config)
    x = torch.ones(1, 2, 1, 16)
    old = cache.update(x, x, 0)
    cache.update(x, x, 0)
    for use in (
        lambda: attention_forward(torch.nn.Module(), torch.ones(1, 4, 1, 16), *old, None),
        lambda: old[0] + 0,
    ):
        with pytest.raises(ValueError, match="not those of the latest update"):
            use()


def test_a_mask_of_another_shape_is_refused(make_model):
    q, k = torch.ones(1, 4, 2, 16), torch.ones(1, 2, 5, 16)
    for shape in ((1, 1, 2, 7), (1, 1, 3, 5), (1, 5)):
        with pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, 1 or Hq, 2, 5\)"):
            attention_forward(torch.nn.Module(), q, k, k, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize(("name", "layer"), [("Llama", 2), ("Gemma2", 3)])
def test_a_pass_that_stopped_on_its_way(make_model, name, layer, monkeypatch):
    """Also where all layers of one kind, but not of the other, have the new token."""
    model = make_model(name)
    cache = KVNumbaCache(model.config)
    forward(model, cache)
    mask = torch.nn.functional.pad(prompts()["attention_mask"], (0, 1), value=1)
    new = {"input_ids": torch.ones((2, 1), dtype=torch.long), "attention_mask": mask}

    def stop(*args, **kwargs):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[layer], "forward", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            forward(model, cache, **new)
    first = 0 if name == "Llama" else 1  # of the kind that is not complete
    with pytest.raises(ValueError, match="did not reach the last layer"):
        cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), first)
    cache.crop(0)
    got = forward(model, cache, **new).logits
    undisturbed = KVNumbaCache(model.config)
    forward(model, undisturbed)
    want = forward(model, undisturbed, **new).logits
    np.testing.assert_array_equal(got.numpy(force=True), want.numpy(force=True))


def test_a_version_that_is_too_old_is_refused_in_one_clear_line(monkeypatch):
    monkeypatch.setattr(versions.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(
        ImportError, match="transformers 4.57.1 is too old; 5.20 to .* are known to work"
    ) as caught:
        versions.check_versions()
    assert "\n" not in str(caught.value)


def test_a_newer_version_warns(monkeypatch):
    monkeypatch.setattr(versions.metadata, "version", lambda name: "5.99.0")
    with pytest.warns(
        UserWarning, match="transformers 5.99.0 is newer than .*; 5.20 to .* are known to work"
    ):
        versions.check_versions()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda masking: masking.pop("eager_mask"), "it has no masking_utils.eager_mask"),
        (
            lambda masking: masking.update(eager_mask=lambda batch_size: None),
            "masking_utils.eager_mask has no parameter q_length",
        ),
        (
            lambda masking: masking.update(
                sliding_window_causal_mask_function=lambda sliding_window: masking["causal_mask_function"]
            ),
            "masks of sliding windows are made in another way",
        ),
    ],
)
def test_a_version_without_what_is_counted_on_is_refused(monkeypatch, change, problem):
    monkeypatch.setattr(versions.metadata, "version", lambda name: "5.99.0")
    masking = dict(vars(transformers.masking_utils))
    change(masking)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", types.SimpleNamespace(**masking))
    with pytest.raises(
        ImportError, match=f"transformers 5.99.0: {problem}; .* pip install 'transformers=="
    ) as caught:
        versions.check_versions()
    assert "\n" not in str(caught.value)


def test_masks_say_what_transformers_says():
    masking = transformers.masking_utils
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], device="cpu").bool()
    for function in (masking.causal_mask_function, masking.sliding_window_causal_mask_function(3)):
        plain = attention_mask(2, 4, 6, 2, 0, function, mask)
        assert type(plain) is DeferredMask
        assert plain.shape == (2, 1, 4, 6)
        want = masking.eager_mask(2, 4, 6, 2, 0, function, mask)
        np.testing.assert_array_equal(plain + 0, want)
    left = torch.tensor([2, 0], device="cpu")
    for size, first, described in ((6, 2, True), (4, 2, False), (4, 5, False), (2, 5, True)):
        function = masking.chunked_causal_mask_function(size, left)
        made = attention_mask(2, 6 - first, 6, first, 0, function, mask)
        assert type(made) is (DeferredMask if described else torch.Tensor)
        np.testing.assert_array_equal(made + 0, masking.eager_mask(2, 6 - first, 6, first, 0, function, mask))


@pytest.mark.parametrize("name", ["BigBirdPegasus", "NllbMoe"])
def test_layers_that_use_the_mask_themselves(name):
    """An encoder that adds the mask to its own scores, and one that keeps padding from its experts."""
    settings = {
        "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_experts": 4, "init_std": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    inputs, results = prompts(), []
    for implementation, make in (("eager", transformers.DynamicCache), ("kvnumba", KVNumbaCache)):
        model.set_attn_implementation(implementation)
        cache = transformers.EncoderDecoderCache(
            make(config=config), transformers.DynamicCache(config=config)
        )
        with torch.no_grad():
            out = model(**inputs, decoder_input_ids=inputs["input_ids"][:, :5] + 1, past_key_values=cache)
        results.append(out.logits.numpy(force=True))
    np.testing.assert_allclose(results[1], results[0], rtol=0, atol=1e-4)
