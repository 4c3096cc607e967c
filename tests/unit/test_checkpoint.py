"""Checkpoint folders: shards, dtypes, untied heads, and what is wrong with them."""

import json
import shutil

import numpy as np
import pytest

import kvnumba
from kvnumba.models.checkpoint import BUNDLED_MODEL, Tensors
from kvnumba.models.config import LlamaConfig

CONFIG = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "eos_token_id": [3, 4],
}


def save(path, tensors):
    """Write a safetensors file: {name: (dtype name, array)}."""
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (dtype, array) in tensors.items():
        blob = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def weights(rng, config=CONFIG):
    """Random tensors of a config's model, by name."""
    hidden, inner, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes = {
        "model.embed_tokens.weight": (11, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (11, hidden),
    }
    for i in range(2):
        at = f"model.layers.{i}."
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            shapes[at + name + ".weight"] = shape
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path, rng):
    """A small untied model in two shards with an index."""
    tensors = weights(rng)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save(tmp_path / file, {name: ("F32", tensors[name]) for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_shards_and_one_file_give_the_same_model(folder, tmp_path_factory, rng):
    sharded = kvnumba.IncrementalDecoder.from_pretrained(folder)
    one = tmp_path_factory.mktemp("one")
    shutil.copy(folder / "config.json", one)
    save(
        one / "model.safetensors",
        {name: ("F32", np.ascontiguousarray(x)) for name, x in Tensors(folder).items()},
    )
    single = kvnumba.IncrementalDecoder.from_pretrained(str(one))
    tokens = [1, 5, 10, 0, 7]
    logits = [
        np.concatenate(
            list(d.prefill(cache := d.make_cache(8, backend="numpy"), cache.add_sequence(), tokens))
        )
        for d in (sharded, single)
    ]
    np.testing.assert_array_equal(*logits)
    assert logits[0].shape == (5, 11)
    assert sharded.config.eos_token_ids == (3, 4)
    assert sharded.config.rope_theta == 5000.0


def test_dtypes(tmp_path, rng):
    x = rng.standard_normal((3, 4), dtype=np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    save(
        tmp_path / "model.safetensors",
        {
            "a": ("F32", x),
            "b": ("F16", x.astype(np.float16)),
            "c": ("BF16", bits),
            "d": ("F64", x.astype(np.float64)),
        },
    )
    tensors = Tensors(tmp_path)
    assert list(tensors) == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(tensors["a"], x)
    np.testing.assert_array_equal(tensors["b"], x.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(tensors["c"], (x.view(np.uint32) & 0xFFFF0000).view(np.float32))
    np.testing.assert_array_equal(tensors["d"], x)
    assert {tensors[name].dtype for name in tensors} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; expected 'llama' or 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope_type 'yarn' is not supported; expected 'default' or 'llama3'",
        ),
        ({"rope_parameters": {"type": "linear"}}, "rope_type 'linear' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "8"}, "hidden_size: expected a positive integer; got '8'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide 4 heads"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
    ],
)
def test_configs_that_are_not_supported(folder, change, message):
    config = {**CONFIG, **change}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)


def test_defaults_of_a_config():
    config = LlamaConfig.from_dict(
        {
            name: CONFIG[name]
            for name in CONFIG
            if name not in ("num_key_value_heads", "head_dim", "rope_theta", "eos_token_id")
        }
    )
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta, config.eos_token_ids) == (
        4,
        2,
        1e4,
        (),
    )


def test_a_sliding_window_is_obeyed(folder):
    """A Mistral with a window of 3 forgets: what lies far back cannot change its logits."""
    config = {**CONFIG, "model_type": "mistral", "sliding_window": 3, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    decoder = kvnumba.IncrementalDecoder.from_pretrained(folder)
    last = []
    for text in ([1, 2, 3, 4, 5], [9, 2, 3, 4, 5], [9, 2, 9, 4, 5]):
        cache = decoder.make_cache(8, backend="numpy")
        last.append(decoder.extend(cache, [cache.add_sequence()], [text])[-1])
    np.testing.assert_array_equal(last[0], last[1])
    assert np.abs(last[2] - last[1]).max() > 1e-3


def test_what_is_missing(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder with a config.json"):
        kvnumba.IncrementalDecoder.from_pretrained(tmp_path / "nowhere")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected model-00002-of-00002.safetensors in it"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors in it"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)


def test_llama_has_no_sliding_window():
    assert LlamaConfig.from_dict({**CONFIG, "sliding_window": 3}).sliding_window is None
    assert LlamaConfig.from_dict({**CONFIG, "model_type": "mistral", "sliding_window": 3}).sliding_window == 3
    assert (
        LlamaConfig.from_dict({**CONFIG, "model_type": "mistral", "sliding_window": None}).sliding_window
        is None
    )


def test_what_is_broken(folder, rng):
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON object with a weight_map"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    path = folder / "model.safetensors"
    tensors = {name: ("F32", x) for name, x in weights(rng).items()}

    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a safetensors file"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)

    save(path, tensors)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is cut short or its header is wrong"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)

    name = "model.layers.1.mlp.up_proj.weight"
    save(path, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=f"{name}: not in the checkpoint"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)
    save(path, {**tensors, name: ("F32", tensors[name][1].T)})
    with pytest.raises(ValueError, match=rf"{name}: expected shape \(12, 8\); got \(8, 12\)"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)
    save(path, {**tensors, name: ("I32", tensors[name][1])})
    with pytest.raises(ValueError, match=f"{name} is I32; expected one of F64, F32, F16, BF16"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)

    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object; got a list"):
        kvnumba.IncrementalDecoder.from_pretrained(folder)


def test_the_bundled_model_is_whole():
    assert {path.name for path in BUNDLED_MODEL.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert sum(x.size for x in Tensors(BUNDLED_MODEL).values()) == pytest.approx(3.0e6, rel=0.02)
