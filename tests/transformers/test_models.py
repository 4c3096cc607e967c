"""Every causal language model of the installed transformers, built small: it generates with a KVNumbaCache as with a
DynamicCache, or a table says why not.

The whole walk takes half a minute on NumPy's backend, which is the default here. On another one:
``KVNUMBA_BACKEND=cpu python -m pytest tests/transformers/test_models.py``
"""

import traceback
from pathlib import Path

import numpy as np
import pytest
from conftest import CHOSEN
from small_models import DEVICE

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import kvnumba  # noqa: E402
from kvnumba.integrations.transformers import KVNumbaCache, versions  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the peers' warnings are theirs
    pytest.mark.usefixtures("models_and_tensors_are_on_the_device"),
]

BACKEND = "numpy" if CHOSEN == "auto" else CHOSEN
CAUSAL = list(dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
BOTH = [
    name
    for name in dict.fromkeys(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
    if getattr(transformers, name).config_class().is_encoder_decoder
]

SMALL = {
    "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1,
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "initializer_range": 0.3, "init_std": 0.3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "encoder_n_layers": 2,
    "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "ffn_dim": 48, "n_inner": 48,
    "num_encoder_layers": 2, "num_decoder_layers": 3, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "embedding_size": 64, "word_embed_proj_dim": 64,
    "is_decoder": True, "d_ff": 48, "d_kv": 16,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16, "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 24, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    # windows, chunks and what is looked up
    "sliding_window": 7, "attention_chunk_size": 5, "local_attention": 7, "keep_window_size": 6, "index_topk": 4,
    "index_head_dim": 16, "index_n_heads": 2,
    # recurrent layers
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_chunk_size": 8, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_head_dim": 8,
    "linear_num_heads": 4, "use_mamba_kernels": False, "mamba_dt_rank": 4,
}  # fmt: skip
"""What a config gets of these, wherever it is named so."""

SMALL_PICTURES_AND_SOUNDS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "image_size": 32, "patch_size": 8, "max_position_embeddings": 64, "num_blocks": 1,
}  # fmt: skip
"""The same, of the parts beside the text."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4}
LATENT_WITH_NARROW_HEADS = {**LATENT, "head_dim": 8}  # there it is the width that rotates
GEMMA_4 = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2,
    "global_head_dim": 32, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8,
}  # fmt: skip
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 16, "rel_extent": 16, "d_rel": 8, "logits_mup_width_multiplier": 1.0, "unpadded_vocab_size": 60,
}  # fmt: skip
OWN = {
    "axk1": LATENT_WITH_NARROW_HEADS,
    "axk2": LATENT,
    "bailing_hybrid": {**LATENT_WITH_NARROW_HEADS, "layer_group_size": 2, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {**SLIDING_AND_FULL, "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cpmant": {"dim_head": 16, "dim_ff": 48, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "ctrl": {"dff": 48},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT_WITH_NARROW_HEADS,
    "deepseek_v32": LATENT,
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    },
    "dory": {**SLIDING_AND_FULL, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {**SLIDING_AND_FULL, "n_shared_experts": 1},
    "dots3_note_text": {
        **LATENT, "layer_types": ["indexed_attention", "sliding_attention"] * 2, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 24, "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3_text": SLIDING_AND_FULL,
    "gemma3n_text": {
        **GEMMA_4, "intermediate_size": [48] * 6, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4,
    },
    "gemma4_text": GEMMA_4,
    "gemma4_unified_text": GEMMA_4,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 7},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": LINEAR_AND_FULL,
    "hrm_text": {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 1},
    "inkling2_loop_text": {
        **INKLING, "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3,
        "loop_num_passes": 2, "loop_gate_rank": 8,
    },
    "inkling2_text": INKLING,
    "inkling_text": INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT_WITH_NARROW_HEADS, **LINEAR_AND_FULL},
    "kolibri1": SLIDING_AND_FULL,
    "laguna": SLIDING_AND_FULL,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]},
    "longcat_flash": {**LATENT_WITH_NARROW_HEADS, "num_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "mellum": SLIDING_AND_FULL,
    "minicpm3": LATENT,
    "minimax": {**LINEAR_AND_FULL, "block_size": 4},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 4, "index_topk_blocks": 2,
    },
    "ministral": SLIDING_AND_FULL,
    "mllama_text_model": {"cross_attention_layers": [1]},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
    },
    "phi4_multimodal_vision": {"crop_size": 32},
    "prophetnet": {"num_encoder_layers": 3},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3_moe": {"use_sliding_window": True},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {
        "pronunciation_vocab_size": 60, "shape_vocab_size": 60, "pronunciation_embed_dim": 32, "shape_embed_dim": 32,
    },
    "smollm3": {**SLIDING_AND_FULL, "use_sliding_window": True},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT_WITH_NARROW_HEADS,
    "zamba": {
        "num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3, "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4, "n_mamba_heads": 4,
        "adapter_rank": 8, "chunk_size": 8,
    },
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"] * 2, "num_experts_per_tok": 1, "router_hidden_size": 16,
        "rope_parameters": {"hybrid": ROPE, "hybrid_sliding": ROPE},
    },
}  # fmt: skip
"""What configs get besides, by their model_type."""

SEEDS = {"ZambaForCausalLM": 2}
"""Of weights, where those of 0 make numbers so large that two ways of transformers' own differ by 3e-5 of them."""

PEERS = {"MiniMaxM3VLForCausalLM": "sdpa", "RecurrentGemmaForCausalLM": "sdpa"}
"""The implementation to compare with, if it is not eager. Recurrences and indexers of these models see what attention
gives for padding: with eager attention it is the mean of all values, with sdpa and with ours 0."""

NO_KEYS = "has no layers whose keys and values could be kept"
OTHER_ORDER = "was updated without the layers before it"
REFUSED = {
    "DoryForCausalLM": OTHER_ORDER,
    "FalconMambaForCausalLM": NO_KEYS,
    "Inkling2LoopForCausalLM": OTHER_ORDER,
    "Mamba2ForCausalLM": NO_KEYS,
    "MambaForCausalLM": NO_KEYS,
    "MllamaForCausalLM": "has layers that attend to pictures",
    "Qwen4ExpForCausalLM": "keeps positions of its indexers' keys",
}
"""Models that a KVNumbaCache refuses, in one line that says what to use instead, and what of the line says why."""
NOT_COMPARED = {
    "EncoderDecoderModel": "it is made of two models, of any kind",
    "BltForCausalLM": "DynamicCache cannot be made of its config, which has four decoders",
    "Gemma3nForConditionalGeneration": "its pictures need timm; its text is Gemma3nForCausalLM",
    "Gemma4AssistantForCausalLM": "it reads the keys of another model and has none",
    "Gemma4UnifiedAssistantForCausalLM": "it reads the keys of another model and has none",
    "MiniMaxForCausalLM": "it takes no cache but its own, not DynamicCache either",
    "MusicgenForCausalLM": "it generates sounds; its inputs are codes of four kinds",
    "MusicgenMelodyForCausalLM": "it generates sounds; its inputs are codes of four kinds",
    "OpenAIGPTLMHeadModel": "it has no cache",
    "ReformerModelWithLMHead": "it has a cache of its own",
    "RwkvForCausalLM": "it has no keys and values",
    "XLMWithLMHeadModel": "it has no cache",
    "XLNetLMHeadModel": "it keeps hidden states, not keys and values",
    "xLSTMForCausalLM": "it has no keys and values, and a cache of its own",
}
"""Models that cannot be built small or that do not generate with a DynamicCache, and why."""

if versions.installed() < (5, 23):
    REFUSED["RecurrentGemmaForCausalLM"] = OTHER_ORDER  # its config does not say which layers attend
if versions.installed() < (5, 21):
    REFUSED["InklingForCausalLM"] = (
        "did not reach the last layer"  # it takes states where that cannot be seen
    )
    REFUSED.pop("Qwen4ExpForCausalLM")
    NOT_COMPARED["CohereCompassForCausalLM"] = "its config cannot be made small"


def small_config(config_class, besides=None):
    """A config that makes a model of less than 3 million parameters."""
    default = config_class()
    parts = {name: getattr(default, name, None) for name in default.sub_configs}
    parts = {name: part for name, part in parts.items() if part is not None}
    text = default.get_text_config(decoder=True)
    own = OWN.get(default.model_type, {})
    settings = dict(own)
    if not any(part is text for part in parts.values()):
        kind = type(default)
        properties = {name for name in dir(kind) if isinstance(getattr(kind, name, None), property)}
        names = {*dir(default), *default.attribute_map} - properties
        tables = {**SMALL, **(besides or {})}
        settings = {**{name: value for name, value in tables.items() if name in names}, **own}
    for name, part in parts.items():
        if name not in own:
            settings[name] = small_config(type(part), {} if part is text else SMALL_PICTURES_AND_SOUNDS)
    return config_class(**settings)


def build(name):
    model_class = getattr(transformers, name)
    config = small_config(model_class.config_class)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if parameters > 3_000_000:
        raise ValueError(f"{name} is large: {parameters:,} parameters")
    torch.manual_seed(SEEDS.get(name, 0))
    model = model_class(config).eval()
    model.generation_config.update(
        pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1
    )
    return model


def generate(model, implementation, cache, **options):
    """Tokens (B, T), and the logits of each of them that is new (T', B, V), with padding on the left."""
    ids = torch.randint(2, 60, (2, 19), generator=torch.Generator(DEVICE).manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :6] = mask[0, :6] = 0
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False,
            forced_eos_token_id=None, output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    return out.sequences.tolist(), torch.stack(out.logits).numpy(force=True)


def built_and_generated(name, make_cache, **options):
    """A model, with the tokens and logits that it generates on a DynamicCache; skips if it is in the table."""
    try:
        model = build(name)
        return model, *generate(model, PEERS.get(name, "eager"), make_cache(model.config), **options)
    except Exception as error:
        if name in NOT_COMPARED:
            pytest.skip(NOT_COMPARED[name])
        if versions.newer_than_known():
            pytest.skip(f"new, and not walked yet: {error!r}")
        raise


def assert_same(got, want):
    (got_tokens, got_logits), (want_tokens, want_logits) = got, want
    assert got_tokens == want_tokens
    np.testing.assert_allclose(got_logits, want_logits, rtol=0, atol=1e-4 * max(1.0, abs(want_logits).max()))


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in REFUSED])
def test_a_causal_model_generates_as_on_dynamic_cache(name):
    model, *want = built_and_generated(name, lambda config: transformers.DynamicCache(config=config))
    cache = KVNumbaCache(model.config, backend=BACKEND)
    got = generate(model, "kvnumba", cache)
    if name in NOT_COMPARED and not cache.get_seq_length():
        pytest.skip(NOT_COMPARED[name])
    assert_same(got, want)
    assert cache.get_seq_length() >= 30


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_in_one_line(name):
    if not hasattr(transformers, name):
        pytest.skip("this version of transformers does not have it")
    model = build(name)
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        generate(model, "kvnumba", KVNumbaCache(model.config, backend=BACKEND))
    assert_refused_by_us(caught.value, REFUSED[name])


def assert_refused_by_us(error, reason):
    """It is meant: raised by a check of ours, in one line that says what to use instead."""
    assert Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(
        Path(kvnumba.__file__).parent
    )
    assert reason in str(error)
    assert "\n" not in str(error)
    assert "use transformers.DynamicCache" in str(error) or "set_attn_implementation" in str(error)


def test_the_tables_name_models():
    assert REFUSED.keys().isdisjoint(NOT_COMPARED)
    assert len(set(CAUSAL) - REFUSED.keys() - NOT_COMPARED.keys()) >= 150


def make_pair(make, config):
    """A cache for a decoder that also attends to an encoder: this part is transformers' own."""
    return transformers.EncoderDecoderCache(make(config), transformers.DynamicCache(config=config))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", BOTH)
def test_an_encoder_and_a_decoder_generate_as_on_dynamic_cache(name, num_beams):
    model, *want = built_and_generated(
        name,
        lambda config: make_pair(lambda c: transformers.DynamicCache(config=c), config),
        num_beams=num_beams,
    )
    cache = make_pair(lambda config: KVNumbaCache(config, backend=BACKEND), model.config)
    assert_same(generate(model, "kvnumba", cache, num_beams=num_beams), want)
    assert cache.get_seq_length() >= 11


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["beams", "chunks"])
@pytest.mark.parametrize("name", ["DeepseekV32ForCausalLM", "Llama4ForCausalLM", "Gemma3nForCausalLM"])
def test_kinds_of_layers_in_other_modes(name, options):
    model, *want = built_and_generated(
        name, lambda config: transformers.DynamicCache(config=config), **options
    )
    cache = KVNumbaCache(model.config, backend=BACKEND)
    assert_same(generate(model, "kvnumba", cache, **options), want)


def test_keys_of_an_indexer_are_saved_and_cropped_with_the_others(tmp_path):
    model = build("DeepseekV32ForCausalLM")
    model.set_attn_implementation("kvnumba")
    ids = torch.randint(2, 60, (2, 12), generator=torch.Generator(DEVICE).manual_seed(1))
    cache, loaded = KVNumbaCache(model.config, backend=BACKEND), KVNumbaCache(model.config, backend=BACKEND)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits[:, 8:].numpy(force=True)
        model(input_ids=ids[:, :10], past_key_values=cache)
        cache.save(tmp_path)
        loaded.load(tmp_path)
        for one in (cache, loaded):
            one.crop(-2)
            got = model(input_ids=ids[:, 8:], past_key_values=one).logits.numpy(force=True)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * abs(want).max())
