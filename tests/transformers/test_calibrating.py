"""The calibration of Hugging Face models: what attention sees, of every layer that is stored."""

import numpy as np
import pytest
from small_models import DEVICE

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

import kvnumba  # noqa: E402
from kvnumba.integrations.transformers import calibrate  # noqa: E402
from kvnumba.models.checkpoint import BUNDLED_MODEL  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the peers' warnings are theirs

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODELS = {
    "Llama": {},
    "Qwen3": {},
    "Gemma3": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "GptOss": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2,
               "num_local_experts": 2, "num_experts_per_tok": 2},
}  # fmt: skip
"""What differs from SMALL."""


def make(name, **options):
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**SMALL, **MODELS[name], **options))
    return model.eval().to(DEVICE)


def random_ids(*shape):
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def seen(model, input_ids):
    """Keys and queries of each layer (T, heads, D) of one text, noted by an attention function of the test's own."""
    keys, queries = [], []

    def attention(module, query, key, value, mask, scaling=None, **options):
        queries.append(query[0].swapaxes(0, 1).float().cpu().numpy())
        keys.append(key[0].swapaxes(0, 1).float().cpu().numpy())
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        sinks = options.get("s_aux")
        scores = query @ key.mT * scaling + mask
        if sinks is not None:
            scores = torch.cat((scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
        weights = scores.float().softmax(-1).to(value.dtype)[..., : key.shape[2]]
        return (weights @ value).transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("noting", attention)
    AttentionMaskInterface.register("noting", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("noting")
    with torch.no_grad():
        model(input_ids, use_cache=False)
    model.set_attn_implementation(before)
    return keys, queries


@pytest.mark.parametrize("name", MODELS)
def test_what_attention_sees(name, monkeypatch):
    monkeypatch.setattr("kvnumba.integrations.transformers.calibrating.CHUNK", 30)
    model, ids = make(name), random_ids(1, 100)
    want = kvnumba.calibrate(*seen(model, ids))
    found = calibrate(model, ids, source="a test")
    assert [array.shape for array in found.shifts] == [(2, 16)] * 4
    assert (found.num_tokens, found.source) == (100, "a test")
    for i in range(4):
        np.testing.assert_allclose(found.scales[i], want.scales[i], rtol=1e-4)
        np.testing.assert_allclose(found.shifts[i], want.shifts[i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side):
    model, ids = make("Llama"), random_ids(2, 80)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 30) if side == "left" else slice(50, 80)] = 0
    found = calibrate(model, torch.where(mask.bool(), ids, 0), attention_mask=mask)
    again = calibrate(model, torch.where(mask.bool(), ids, 7), attention_mask=mask)
    assert found.num_tokens == 130
    for i in range(4):
        np.testing.assert_allclose(found.scales[i], again.scales[i], rtol=1e-5)
        np.testing.assert_allclose(found.shifts[i], again.shifts[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    ids = random_ids(2, 50)
    want = calibrate(make("Llama"), ids)
    found = calibrate(make("Llama").to(getattr(torch, dtype)), ids)
    for i in range(4):
        np.testing.assert_allclose(found.scales[i], want.scales[i], rtol=5e-2)


def test_the_bundled_model_is_as_in_the_decoder():
    model = transformers.LlamaForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).to(DEVICE)
    text = (b"def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 20)[:700]
    found = calibrate(model, torch.tensor([list(text)], device=DEVICE))
    with kvnumba.use_backend("numpy"):
        want = kvnumba.IncrementalDecoder.from_pretrained().calibrate(text)
    for i in range(4):
        np.testing.assert_allclose(found.scales[i], want.scales[i], rtol=1e-3)
        np.testing.assert_allclose(found.shifts[i], want.shifts[i], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "kvnumba"])
def test_the_model_is_as_it_was(implementation):
    model = make("Llama")
    model.set_attn_implementation(implementation)
    calibrate(model, random_ids(1, 64))
    assert model.config._attn_implementation == implementation

    def fails(*_):
        raise RuntimeError("in the middle")

    hook = model.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        calibrate(model, random_ids(1, 64))
    hook.remove()
    assert model.config._attn_implementation == implementation
    assert torch.is_grad_enabled()


def test_parts_of_a_model_keep_their_own():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**SMALL, **MODELS["Gemma3"]}, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval().to(DEVICE)
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    found = calibrate(model, random_ids(1, 64))
    assert len(found.shifts) == 4
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


REFUSED = {
    "shape": (lambda ids: (ids[0], None), r"input_ids: expected shape \(B, T\); got \(70,\)"),
    "mask": (lambda ids: (ids, ids[:, :9]), r"attention_mask: expected shape \(1, 70\), as input_ids; got \(1, 9\)"),
    "few": (lambda ids: (ids[:, :9], None), r"keys\[0\]: expected at least 64 tokens"),
    "padding": (lambda ids: (ids, 0 * ids), r"keys\[0\]: expected at least 64 tokens, .*; got 0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(change, message):
    ids, mask = change(random_ids(1, 70))
    with pytest.raises(ValueError, match=message):
        calibrate(make("Llama"), ids, attention_mask=mask)
