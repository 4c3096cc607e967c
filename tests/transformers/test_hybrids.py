"""Hybrid models, whose recurrent and convolutional layers are transformers' own, beside ours in one `KVNumbaCache`."""

import copy

import numpy as np
import pytest
from conftest import ON_GPU
from small_models import DEVICE, SMALL

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from kvnumba.integrations.transformers import KVNumbaCache, calibrate, foreign, saving  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the peers' warnings are theirs
    pytest.mark.usefixtures("models_and_tensors_are_on_the_device"),
]

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR, FULL = "linear_attention", "full_attention"
MODELS = {
    "Qwen3Next": {
        **DELTA, **EXPERTS, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16,
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
    },
    "Qwen3_5": {**DELTA, "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "Jamba": {
        "num_hidden_layers": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_d_state": 8, "use_mamba_kernels": False, "hidden_size": 64,
    },
    "Bamba": {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3], "hidden_size": 64,
              "mamba_n_heads": 8},
    "GraniteMoeHybrid": {
        **MAMBA, "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL], "num_local_experts": 2,
        "shared_intermediate_size": 16, "hidden_size": 64, "mamba_n_heads": 8,
    },
    "Lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", FULL, "conv", FULL], "hidden_size": 64},
    "OlmoHybrid": {**DELTA, "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL], "hidden_size": 64},
    "FalconH1": {**MAMBA, "num_hidden_layers": 2, "mamba_d_ssm": 64, "hidden_size": 64},
    "RecurrentGemma": {
        "num_hidden_layers": 3, "attention_window_size": 7, "hidden_size": 64, "w_init_variance_scale": 1.0,
    },
    "NemotronH": {
        "layer_types": [LINEAR, FULL, "mlp", LINEAR], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4,
    },
    "Zamba2": {
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"], "num_hidden_layers": 4, "n_mamba_heads": 4,
        "mamba_d_state": 8, "chunk_size": 4, "use_mamba_kernels": False, "num_key_value_heads": 4,
    },
    "KimiLinear": {
        "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL], "linear_head_dim": 8,
        "linear_num_heads": 2, "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
    },
}  # fmt: skip
"""What differs from SMALL."""

STATES_IN_THE_CACHE = [name for name in MODELS if name != "RecurrentGemma"]
"""RecurrentGemma keeps states in its modules: only what its DynamicCache can do too is possible."""

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
}


@pytest.fixture(scope="module")
def make_model():
    made = {}

    def make(name):
        if name not in made:
            config_name = {"Qwen3_5": "Qwen3_5TextConfig"}.get(name, f"{name}Config")
            torch.manual_seed(0)
            config = getattr(transformers, config_name)(**{**SMALL, **MODELS[name]})
            if name == "RecurrentGemma" and not getattr(config, "layer_types", None):
                pytest.skip("before transformers 5.23 its config does not say which layers attend")
            made[name] = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        return made[name]

    return make


def dynamic(model):
    return transformers.DynamicCache(config=model.config)


def new_cache(model, **options):
    return KVNumbaCache(model.config, backend="auto" if ON_GPU else "numpy", **options)


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
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        return model.generate(**inputs, past_key_values=cache, **settings)


def feed(model, cache, ids, mask, implementation="kvnumba"):
    """Logits of the last `ids.shape[1]` tokens of a mask, of those that are real."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    return out.logits[mask[:, -ids.shape[1] :].bool()].numpy(force=True)


def expected(model, ids, mask, *ends):
    """Logits of the last of several passes over DynamicCache, which end after so many tokens.

    The passes matter: Jamba and Bamba, for instance, compute something else when a prompt comes in two.
    """
    cache = dynamic(model)
    for first, last in zip((0, *ends[:-1]), ends, strict=True):
        logits = feed(model, cache, ids[:, first:last], mask[:, :last], "eager")
    return logits


def grown(ids, mask, new):
    """Token ids and a mask with new tokens (B, n) behind."""
    return torch.cat((ids, new), dim=1), torch.cat((mask, torch.ones_like(new)), dim=1)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_dynamic_cache(make_model, name, mode):
    if (name, mode) == ("RecurrentGemma", "chunks"):
        pytest.skip("transformers cannot do it either")
    model = make_model(name)
    want = generate(model, "eager", dynamic(model), prompts(), **MODES[mode])
    got = generate(model, "kvnumba", new_cache(model), prompts(), **MODES[mode])
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_speculation_where_there_are_convolutions_only(make_model, how):
    """With other hybrid models transformers refuses it."""
    model = make_model("Lfm2")
    options = {"prompt_lookup_num_tokens": 4} if how == "prompt lookup" else {"assistant_model": model}
    if how == "assistant":  # one that often is wrong
        torch.manual_seed(5)
        options["assistant_model"] = type(model)(model.config).eval()
    want = generate(model, "eager", dynamic(model), prompts(1), **options)
    got = generate(model, "kvnumba", new_cache(model), prompts(1), **options)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("name", STATES_IN_THE_CACHE)
def test_logits_are_those_of_dynamic_cache(make_model, name):
    model = make_model(name)
    ids, mask = prompts().values()

    def logits(implementation, cache):
        return [
            feed(model, cache, ids[:, first:last], mask[:, :last], implementation)
            for first, last in ((0, 4), (4, 15), (15, 16), (16, 19))  # padding reaches into the second
        ]

    want = logits("eager", dynamic(model))
    for implementation in ("kvnumba", "eager"):  # out of the storage, and dense
        for got, part in zip(logits(implementation, new_cache(model)), want, strict=True):
            assert_close(got, part)


@pytest.mark.parametrize("name", STATES_IN_THE_CACHE)
def test_a_chat_over_several_calls(make_model, name, tmp_path):
    """The same as with DynamicCache, also where it is saved and loaded in between."""
    model = make_model(name)
    turns = [torch.tensor([[5, 9, 12, 33]]), torch.tensor([[7, 7, 21]]), torch.tensor([[40]])]
    results = []
    for implementation, restored in (("eager", False), ("kvnumba", False), ("kvnumba", True)):
        cache = dynamic(model) if implementation == "eager" else new_cache(model)
        ids = torch.zeros((1, 0), dtype=torch.long)
        for turn in turns:
            ids = torch.cat((ids, turn), dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = generate(model, implementation, cache, inputs, max_new_tokens=5)
            if restored:
                cache.save(tmp_path, fingerprint=name)
                cache = new_cache(model)
                cache.load(tmp_path, fingerprint=name)
                assert cache.get_seq_length() == ids.shape[1] - 1
        results.append(ids.tolist())
    assert results[1] == results[2] == results[0]
    assert len(list(tmp_path.iterdir())) == 1 + 2  # of each save only the files that the manifest names


@pytest.mark.parametrize("how", ["save", "deepcopy"])
@pytest.mark.parametrize("name", STATES_IN_THE_CACHE)
def test_a_copy_goes_on_by_itself(make_model, name, how, tmp_path):
    model = make_model(name)
    ids, mask = prompts().values()
    cache = new_cache(model)
    feed(model, cache, ids, mask)
    if how == "deepcopy":
        other = copy.deepcopy(cache)
    else:
        cache.save(tmp_path)
        other = new_cache(model)
        other.load(tmp_path)
    assert other.get_seq_length() == 19
    for one, tokens in ((other, [[30], [31]]), (cache, [[3], [4]]), (other, [[3], [4]])):
        new = torch.tensor(tokens)
        if one is other and tokens == [[3], [4]]:
            other.reset()
            feed(model, other, ids, mask)
        longer = grown(ids, mask, new)
        assert_close(feed(model, one, new, longer[1]), expected(model, *longer, 19, 20))


@pytest.mark.parametrize("name", STATES_IN_THE_CACHE)
def test_operations_on_the_batch(make_model, name):
    model = make_model(name)
    ids, mask = prompts().values()
    cache = new_cache(model)
    feed(model, cache, ids, mask)
    cache.checkpoint()
    ends = [19]
    for operation, argument, rows in (
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ("reorder_cache", torch.tensor([2, 2, 0, 3]), [2, 2, 0, 3]),
        ("batch_select_indices", torch.tensor([-1, 1, 2]), [3, 1, 2]),
    ):
        getattr(cache, operation)(argument)
        ids, mask = ids[rows], mask[rows]
        new = torch.arange(3, 3 + 2 * len(rows)).reshape(len(rows), 2)
        ids, mask = grown(ids, mask, new)
        ends.append(ids.shape[1])
        assert_close(feed(model, cache, new, mask), expected(model, ids, mask, *ends))
    cache.crop(19 - cache.get_seq_length())  # the checkpoint has been rearranged too
    ids, mask = grown(ids[:, :19], mask[:, :19], torch.tensor([[8], [7], [6]]))
    assert_close(feed(model, cache, ids[:, -1:], mask), expected(model, ids, mask, 19, 20))
    cache.reset()
    assert cache.get_seq_length() == cache.used_bytes() == 0
    ids = torch.tensor([[3, 4, 5]])
    assert_close(feed(model, cache, ids, torch.ones_like(ids)), expected(model, ids, torch.ones_like(ids), 3))


@pytest.mark.parametrize("name", STATES_IN_THE_CACHE)
def test_checkpoints(make_model, name):
    model = make_model(name)
    ids, mask = prompts().values()
    cache = new_cache(model)

    def go_on(length, tokens):
        """Feed tokens behind the first `length`, and compare."""
        new = torch.tensor([tokens, tokens[::-1]])
        ids_now, mask_now = grown(ids[:, :length], mask[:, :length], new)
        ends = [end for end in (11, 15, 19) if end <= length]
        want = expected(model, ids_now, mask_now, *ends, length + len(tokens))
        assert_close(feed(model, cache, new, mask_now), want)

    for first, last in ((0, 11), (11, 15), (15, 19)):
        feed(model, cache, ids[:, first:last], mask[:, :last])
        cache.checkpoint()
    go_on(19, [7, 8])
    with pytest.raises(
        ValueError, match=r"crop: a \w+ cannot go back to 20 tokens.*call checkpoint\(\)"
    ) as caught:
        cache.crop(-1)
    assert "\n" not in str(caught.value)
    assert cache.get_seq_length() == 21
    for tokens in ([3, 4, 5], [9, 9]):  # a checkpoint can be returned to again
        cache.crop(15 - cache.get_seq_length())
        go_on(15, tokens)
    with pytest.raises(ValueError, match="cannot go back to 16 tokens"):
        cache.crop(-1)
    twin = copy.deepcopy(cache)
    cache.crop(11 - cache.get_seq_length())
    go_on(11, [2, 3, 4, 5])
    with pytest.raises(ValueError, match="cannot go back to 13 tokens"):  # there never was one
        cache.crop(-2)
    cache = twin  # has checkpoints of its own
    cache.crop(15 - cache.get_seq_length())
    go_on(15, [1, 2, 3])
    cache.crop(-cache.get_seq_length())
    go_on(0, [1, 2, 3])
    with pytest.raises(ValueError, match="cannot go back to 2 tokens"):
        cache.crop(-1)


def stop(*args, **kwargs):
    raise RuntimeError("stopped")


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("name", ["Qwen3Next", "Bamba", "Zamba2", "Lfm2"])
def test_a_pass_that_stopped_on_its_way(make_model, name, layer, monkeypatch, tmp_path):
    model = make_model(name)
    ids, mask = prompts().values()
    new = torch.tensor([[3], [4]])
    longer_ids, longer = grown(ids, mask, new)
    for remembered in (True, False):
        cache = new_cache(model)
        feed(model, cache, ids, mask)
        if remembered:
            cache.checkpoint()
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[layer], "forward", stop)
            with pytest.raises(RuntimeError, match="stopped"):
                feed(model, cache, new, longer)
        if layer == 0:  # nothing has changed
            assert_close(feed(model, cache, new, longer), expected(model, longer_ids, longer, 19, 20))
            continue
        for refused in (
            lambda cache=cache: feed(model, cache, new, longer),
            lambda cache=cache: cache.save(tmp_path),
            lambda cache=cache: copy.deepcopy(cache),
            cache.checkpoint,
        ):
            with pytest.raises(ValueError, match="did not reach the last layer; crop\\(0\\) forgets it"):
                refused()
        if remembered:
            cache.crop(0)
            assert_close(feed(model, cache, new, longer), expected(model, longer_ids, longer, 19, 20))
        else:
            with pytest.raises(ValueError, match="cannot go back to 19 tokens.* that stopped on its way"):
                cache.crop(0)
            cache.reset()
            assert_close(feed(model, cache, ids, mask), expected(model, ids, mask, 19))


def test_convolutions_that_record_the_past_are_cropped(make_model, tmp_path):
    model = make_model("Lfm2")
    ids, mask = prompts().values()
    cache = new_cache(model)
    cache.activate_past_recording()
    assert cache.is_croppable is False  # nobody knows yet that there is no recurrence
    feed(model, cache, ids, mask)
    assert cache.is_croppable
    cache.crop(-3)
    ids, mask = ids[:, :16], mask[:, :16]
    ends = [16]
    for tokens in ([[3, 4], [5, 6]], [[7], [8]]):
        ids, mask = grown(ids, mask, torch.tensor(tokens))
        ends.append(ids.shape[1])
        assert_close(feed(model, cache, torch.tensor(tokens), mask), expected(model, ids, mask, *ends))
        cache.crop(0)
    assert cache.layers[0].conv_states[0].shape[-1] == model.config.conv_L_cache
    cache.save(tmp_path)
    loaded = new_cache(model)
    loaded.load(tmp_path)
    feed(model, loaded, ids[:, :3], torch.cat((mask, mask[:, -3:]), dim=1))
    loaded.crop(-3)
    ids, mask = grown(ids, mask, torch.tensor([[9], [2]]))
    assert_close(feed(model, loaded, ids[:, -1:], mask), expected(model, ids, mask, *ends, ids.shape[1]))
    cache.reset()
    assert cache.layers[0].record_past


def test_windows_reach_back_to_a_checkpoint(make_model, monkeypatch):
    monkeypatch.setattr("kvnumba.integrations.transformers.settings.BLOCK_SIZE", 4)
    config = transformers.MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=7)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    ids = torch.arange(1, 61).reshape(1, 60) * 7 % 60
    mask = torch.ones_like(ids)
    cache = new_cache(model)
    feed(model, cache, ids[:, :20], mask[:, :20])
    cache.checkpoint()
    for n in range(20, 60, 10):
        feed(model, cache, ids[:, n : n + 10], mask[:, : n + 10])
    with pytest.raises(ValueError, match="fell out of the window"):
        cache.crop(-30)
    assert cache.get_seq_length() == 60
    for _ in range(2):
        cache.crop(20 - cache.get_seq_length())
        assert_close(
            feed(model, cache, ids[:, 20:22], mask[:, :22]),
            expected(model, ids[:, :22], mask[:, :22], 20, 22),
        )
    group = next(iter(cache._groups.values()))
    group.pool.check_integrity()
    cache.reset()
    assert cache.used_bytes() == 0


def test_a_damaged_or_foreign_folder_leaves_the_cache_as_it_was(make_model, tmp_path):
    model = make_model("Qwen3Next")
    ids, mask = prompts().values()
    saved = new_cache(model)
    feed(model, saved, ids, mask)
    saved.save(tmp_path / "chat")
    (states,) = (tmp_path / "chat").glob("states.*.kv")
    whole, manifest = states.read_bytes(), (tmp_path / "chat" / "cache.json").read_text()
    cache = new_cache(model)
    feed(model, cache, ids[:, :5], mask[:, :5])
    before = copy.deepcopy(cache)
    damaged = bytearray(whole)
    damaged[-100] ^= 1
    cases = {
        "its blocks are damaged": bytes(damaged),
        "its header is cut short": whole[:100],
        "bytes of blocks; the file has": whole[:-8],
        "not a file that a cache was saved to": b"x" * 200,
    }
    for message, content in cases.items():
        states.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            cache.load(tmp_path / "chat")
        assert "\n" not in str(caught.value)
    states.unlink()
    with pytest.raises(FileNotFoundError):
        cache.load(tmp_path / "chat")
    states.write_bytes(whole)
    with pytest.raises(ValueError, match="fingerprint: expected 'other'"):
        cache.load(tmp_path / "chat", fingerprint="other")
    others = new_cache(make_model("Lfm2"))
    others.save(tmp_path / "other")
    (tmp_path / "chat" / "cache.json").write_text((tmp_path / "other" / "cache.json").read_text())
    with pytest.raises(FileNotFoundError):
        cache.load(tmp_path / "chat")
    for broken in (manifest[:50], "[1]", "\xff", manifest.replace('"length"', '"lengte"')):
        (tmp_path / "chat" / "cache.json").write_text(broken, encoding="latin-1")
        with pytest.raises(ValueError, match="cache.json: damaged, or not written by KVNumbaCache.save"):
            cache.load(tmp_path / "chat")
    (tmp_path / "chat" / "cache.json").write_text(manifest)
    with pytest.raises(ValueError, match="model: expected 'falcon_h1'; the file has 'qwen3_next'"):
        new_cache(make_model("FalconH1")).load(tmp_path / "chat")
    plain = transformers.LlamaConfig(**SMALL, num_hidden_layers=2)
    with pytest.raises(ValueError, match="expected no states of layers that transformers keeps; it has some"):
        KVNumbaCache(plain, backend="numpy").load(tmp_path / "chat")
    KVNumbaCache(plain, backend="numpy").save(tmp_path / "plain")
    with pytest.raises(ValueError, match="expected states of layers that transformers keeps; it has none"):
        cache.load(tmp_path / "plain")
    assert_close(feed(model, cache, ids[:, 5:8], mask[:, :8]), feed(model, before, ids[:, 5:8], mask[:, :8]))
    cache.load(tmp_path / "chat")
    assert cache.get_seq_length() == 19


def test_attributes_of_every_kind_are_saved(make_model, tmp_path):
    model = make_model("Lfm2")
    cache, other = new_cache(model), new_cache(model)
    kept = {
        "a": [torch.arange(3), (1, "x", None, 2.5, True)],
        4: torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros((2, 0), dtype=torch.float16),
        "flags": torch.tensor([True, False]),
        "dtype": torch.float8_e4m3fn,
        "device": torch.device(DEVICE, 0) if ON_GPU else torch.device("cpu"),
    }
    cache.layers[0].kept = kept
    cache.save(tmp_path)
    other.load(tmp_path)
    loaded = other.layers[0].kept
    assert loaded.keys() == kept.keys()
    assert torch.equal(loaded["a"][0], kept["a"][0])
    assert loaded["a"][1] == kept["a"][1]
    for key in (4, "empty", "flags"):
        assert loaded[key].dtype == kept[key].dtype
        assert torch.equal(loaded[key], kept[key])
    assert (loaded["dtype"], loaded["device"]) == (kept["dtype"], kept["device"])
    cache.layers[0].kept = {"inner": object()}
    with pytest.raises(
        ValueError, match=r"save: LinearAttentionLayer\.kept is a object, which cannot be written"
    ):
        cache.save(tmp_path)
    other.load(tmp_path)  # what was saved before


def test_tensors_of_a_device_that_is_not_there_come_to_another():
    assert saving._device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert saving._device("cuda:3") == torch.device("cpu")


def test_layers_that_do_not_crop_all_they_have_are_not_asked_to():
    class Compressed(transformers.cache_utils.DynamicLayer):
        def reset(self):
            super().reset()

    class Sparse(Compressed):
        def crop(self, tokens_to_remove):
            super().crop(tokens_to_remove)

    assert foreign.is_croppable(transformers.cache_utils.DynamicLayer())
    assert not foreign.is_croppable(Compressed())
    assert foreign.is_croppable(Sparse())


def test_states_that_a_model_keeps_in_itself_are_missed(make_model, tmp_path):
    model = make_model("RecurrentGemma")
    cache = new_cache(model)
    feed(model, cache, *prompts().values())
    for call in (lambda: cache.save(tmp_path), lambda: copy.deepcopy(cache), cache.checkpoint):
        with pytest.raises(
            ValueError, match="the model keeps the states of its layers in itself, not in its cache"
        ):
            call()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="a MambaConfig has no layers whose keys and values could be kept"):
        KVNumbaCache(transformers.MambaConfig(num_hidden_layers=2))
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=2)
    config.layer_types = ["full_attention", "of_tomorrow"]
    with pytest.raises(
        ValueError, match="layers of type 'of_tomorrow' are unknown to this version of transformers"
    ):
        KVNumbaCache(config)


def test_repr_says_whose_layers_are_whose(make_model):
    for name, whose in (
        ("Qwen3Next", "4 (2 kvnumba, 2 transformers)"),
        ("FalconH1", "2 (2 kvnumba, 2 transformers)"),
        ("NemotronH", "4 (1 kvnumba, 2 transformers)"),
    ):
        cache = new_cache(make_model(name))
        assert repr(cache).startswith(f"KVNumbaCache(layers={whose}, tokens=0, ")
        assert not cache.all_ours  # also where there is no layer without keys


@pytest.mark.parametrize("name", ["Qwen3Next", "FalconH1", "Zamba2"])
def test_calibration_is_of_the_layers_that_are_ours(make_model, name):
    model = make_model(name)
    calibration = calibrate(model, torch.arange(400).reshape(4, 100) * 7 % 50)
    assert len(calibration.shifts) == 2
    cache = new_cache(model, key_format="int8", value_format="int8", calibration=calibration)
    ids, mask = prompts().values()
    want = feed(model, new_cache(model), ids, mask)
    got = feed(model, cache, ids, mask)
    assert 0 < np.abs(got - want).mean() < 0.1 * want.std()
