"""Presses of kvpress over a `KVNumbaCache`: what kvpress itself gives with a DynamicCache, in less memory."""

import contextlib
import copy
import importlib
import types

import numpy as np
import pytest
import small_models
from conftest import ON_GPU

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
kvpress = pytest.importorskip("kvpress", reason="the kvpress extra is not installed")

from pressing import by_kvpress  # noqa: E402

import kvnumba.integrations.kvpress  # noqa: E402
from kvnumba.integrations.kvpress import compressing  # noqa: E402
from kvnumba.integrations.transformers import KVNumbaCache  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the peers' warnings are theirs
    pytest.mark.skipif(ON_GPU, reason="of models on the host"),
]

PROMPT, BLOCK = 90, 16
LAYERS, H, D = 3, 2, 16


def snapkv(ratio):
    return kvpress.SnapKVPress(ratio, window_size=8)


PRESSES = {
    "Knorm": lambda: kvpress.KnormPress(0.5),
    "SnapKV": lambda: snapkv(0.6),
    "StreamingLLM": lambda: kvpress.StreamingLLMPress(0.5),
    "KeyDiff": lambda: kvpress.KeyDiffPress(0.4),
    "TOVA": lambda: kvpress.TOVAPress(0.5),
    "ExpectedAttention": lambda: kvpress.ExpectedAttentionPress(0.5),
    "PyramidKV": lambda: kvpress.PyramidKVPress(0.6, window_size=8, beta=3),
    "ChunkKV": lambda: kvpress.ChunkKVPress(snapkv(0.5), chunk_length=7),
    "composed": lambda: kvpress.ComposedPress([kvpress.KnormPress(0.3), kvpress.KeyDiffPress(0.3)]),
    "by layer": lambda: kvpress.PerLayerCompressionPress(kvpress.KnormPress(), [0.1, 0.5, 0.8]),
    "nothing": lambda: kvpress.KnormPress(0.0),
    "AdaKV": lambda: kvpress.AdaKVPress(snapkv(0.6)),
    "CriticalAdaKV": lambda: kvpress.CriticalAdaKVPress(snapkv(0.6)),
}
"""The last two leave each head a number of its own: kvpress keeps all keys there, and masks those that are dropped."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("kvnumba.integrations.transformers.settings.BLOCK_SIZE", BLOCK)


@pytest.fixture(scope="module")
def make_model():
    made = {}

    def make(name="Llama"):
        if name not in made:
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**small_models.SMALL, num_hidden_layers=LAYERS)
            made[name] = model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(
                    "k_norm.weight"
                ):  # of ones: keys would all be as long as each other
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return made[name]

    return make


def prompt(batch_size=1, length=PROMPT):
    return torch.randint(1, 60, (batch_size, length), generator=torch.Generator().manual_seed(1))


def per_head(model, **options):
    return KVNumbaCache(model.config, per_head=True, **{"backend": "numpy", **options})


def dynamic(model):
    return transformers.DynamicCache(config=model.config)


def generate(model, press, cache, ids, **options):
    """Tokens, and the logits of each."""
    ours = isinstance(cache, KVNumbaCache)
    model.set_attn_implementation("kvnumba" if ours else "sdpa")
    context = contextlib.nullcontext()
    if press is not None:
        context = (compressing if ours else by_kvpress)(press, model, cache)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad(), context:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    return out.sequences.tolist(), torch.stack(out.logits).numpy()


def read(model, press, cache, ids):
    model.set_attn_implementation("kvnumba")
    with torch.no_grad(), compressing(press, model, cache):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    return cache


def head_lens(cache):
    """Tokens that each head of each layer holds, (layers, B, H)."""
    return np.array([[group.pool.head_lens(n)[0] for n in group.ids] for group in cache.groups])


def assert_blocks_are_those_of(cache, bytes_of_a_token):
    """No more blocks are used than the tokens of each head need."""
    blocks = -(-head_lens(cache) // BLOCK)
    assert cache.used_bytes() == blocks.sum() * BLOCK * bytes_of_a_token
    used = sum(group.pool.stats().used_bytes for group in cache.groups)
    assert used == cache.used_bytes()
    for group in cache.groups:
        group.pool.check_integrity()


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("press", PRESSES)
def test_tokens_and_memory_are_those_that_a_press_leaves(make_model, press, name):
    model, make = make_model(name), PRESSES[press]
    theirs, ours, ids = dynamic(model), per_head(model), prompt()
    want, want_logits = generate(model, make(), theirs, ids)
    left = np.array([[[layer.keys.shape[2]] * H] for layer in theirs.layers])
    for n, layer in enumerate(model.model.layers):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            left[n, 0] -= np.bincount(masked[1], minlength=H)
    got, logits = generate(model, make(), ours, ids)
    assert got == want
    np.testing.assert_allclose(logits, want_logits, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(head_lens(ours), left)
    assert_blocks_are_those_of(ours, 2 * D * 4)
    _, whole_logits = generate(model, None, per_head(model), ids)
    assert np.allclose(logits, whole_logits, rtol=0, atol=1e-4) == (press == "nothing")


@pytest.mark.parametrize("press", ["SnapKV", "AdaKV"])
def test_questions_stand_after_the_whole_prompt(make_model, press):
    """As in kvpress's pipeline, which answers several questions with what is left of one context."""
    model, answers = make_model(), []
    pipeline = types.SimpleNamespace(
        model=model, tokenizer=types.SimpleNamespace(decode=lambda tokens, **_: str(tokens))
    )
    theirs = kvpress.KVPressTextGenerationPipeline
    for kind, cache, context in (
        ("sdpa", dynamic(model), by_kvpress),
        ("kvnumba", per_head(model), compressing),
    ):
        model.set_attn_implementation(kind)
        with torch.no_grad():
            with context(PRESSES[press](), model, cache):
                model.model(input_ids=prompt(), past_key_values=cache)
            lengths = [cache.get_seq_length(n) for n in range(LAYERS)]
            for question in ([[5, 9, 12]], [[7, 3, 3, 8]]):
                answers.append(theirs.generate_answer(pipeline, torch.tensor(question), cache, PROMPT, 9))
                if kind == "sdpa":
                    theirs._remove_answer_from_cache(None, cache, lengths)
                else:
                    cache.crop(PROMPT - cache.get_seq_length())
    assert answers[2:] == answers[:2]
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("fmt", "bytes_of_a_token"), [("bfloat16", 2 * D * 2), ("int8", 2 * (D + 8)), ("int4", 2 * (D // 2 + 4))]
)
def test_presses_see_what_the_cache_holds(make_model, fmt, bytes_of_a_token):
    model = make_model()
    whole = per_head(model, key_format=fmt, value_format=fmt)
    model.set_attn_implementation("kvnumba")
    with torch.no_grad():
        model(input_ids=prompt(), past_key_values=whole)
    cache = read(model, kvpress.KnormPress(0.7), per_head(model, key_format=fmt, value_format=fmt), prompt())
    for one, other in zip(whole.groups, cache.groups, strict=True):
        positions = other.pool.positions(other.ids[0])
        pairs = zip(one.pool.get_kv(one.ids[0]), other.pool.get_kv(other.ids[0]), strict=True)
        for (all_keys, all_values), (keys, values) in pairs:
            smallest = np.sort(np.argsort(np.linalg.norm(all_keys, axis=1))[: len(keys)])
            np.testing.assert_array_equal(positions.pop(0), smallest)
            np.testing.assert_array_equal(keys, all_keys[smallest])
            np.testing.assert_array_equal(values, all_values[smallest])
    assert (head_lens(cache) == int(PROMPT * 0.3)).all()
    assert_blocks_are_those_of(cache, bytes_of_a_token)


def test_layers_give_blocks_back_one_by_one(make_model):
    """No more than one layer holds the whole prompt at a time."""
    model, cache, held = make_model(), per_head(make_model()), []
    hooks = [
        layer.register_forward_hook(lambda *_: held.append(cache.used_bytes()))
        for layer in model.model.layers
    ]
    try:
        read(model, kvpress.KnormPress(0.5), cache, prompt())
    finally:
        for hook in hooks:
            hook.remove()
    assert held == [n * cache.used_bytes() // LAYERS for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 9}]
)
def test_batches(make_model, options):
    model = make_model()
    results = []
    for cache in (dynamic(model), per_head(model)):
        torch.manual_seed(3)
        results.append(generate(model, snapkv(0.5), cache, prompt(2), **options)[0])
    assert results[1] == results[0]


def test_copies_and_files_go_on_as_the_cache_does(make_model, tmp_path):
    model, ids = make_model(), prompt()
    cache = read(model, kvpress.AdaKVPress(snapkv(0.6)), per_head(model), ids)
    cache.save(tmp_path / "chat")
    loaded = per_head(model)
    loaded.load(tmp_path / "chat")
    results = []
    for each in (copy.deepcopy(cache), loaded, cache):
        np.testing.assert_array_equal(head_lens(each), head_lens(cache))
        more = torch.cat((ids, torch.tensor([[3, 4]])), dim=1)
        results.append(generate(model, None, each, more)[0])
    assert results[0] == results[1] == results[2]
    with pytest.raises(ValueError, match="expected 1 kinds of layers; it has 3"):
        KVNumbaCache(model.config, backend="numpy").load(tmp_path / "chat")


REFUSED = {
    "no press": ("snapkv", TypeError, "press: expected a press of kvpress; got a str"),
    "in its own way": (
        lambda: kvpress.KVzipPress(0.5), ValueError, "press: KVzipPress reads the prompt in its own way, .* SnapKVPress"
    ),
    "later": (lambda: kvpress.DecodingPress(snapkv(0)), ValueError, "press: DecodingPress .* as they are generated"),
    "with another hook": (lambda: kvpress.DMSPress(snapkv(0), 0.1), ValueError, "press: DMSPress reads"),
    "weights": (lambda: kvpress.ObservedAttentionPress(0.5), ValueError, "press: ObservedAttentionPress needs atten"),
    "a part": (
        lambda: kvpress.ComposedPress([snapkv(0.5), kvpress.ObservedAttentionPress(0.5)]), ValueError,
        "press: ObservedAttentionPress needs attention weights as a whole, which nothing computes; presses that choose",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("press", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_presses_that_are_refused(make_model, press, error, message):
    model = make_model()
    model.set_attn_implementation("kvnumba")
    with pytest.raises(error, match=message):
        compressing(press() if callable(press) else press, model, per_head(model))


FAILING = {
    "changed keys": (
        lambda: kvpress.ThinKPress(0.5), ValueError,
        "press: expected one that leaves keys and values as they are, .* ThinKPress"
    ),
    "keys at other places": (
        lambda: kvpress.KeyRerotationPress(kvpress.KnormPress(0.5)), ValueError, "leaves keys .*; KeyRerotation"
    ),
    "its own error": (lambda: kvpress.SnapKVPress(0.5, window_size=99), AssertionError, "greater than the window size"),
}  # fmt: skip


@pytest.mark.parametrize(("press", "error", "message"), FAILING.values(), ids=FAILING)
def test_a_press_that_fails_leaves_the_cache_empty(make_model, press, error, message):
    model, ids = make_model(), prompt()
    cache = per_head(model)
    with pytest.raises(error, match=message):
        read(model, press(), cache, ids)
    assert cache.get_seq_length() == cache.used_bytes() == 0
    want = generate(model, None, dynamic(model), ids)[0]
    assert generate(model, None, cache, ids)[0] == want


def test_what_else_is_refused(make_model):
    model, ids = make_model(), prompt(2)
    cache, press = per_head(model), kvpress.KnormPress(0.5)
    model.set_attn_implementation("eager")
    with pytest.raises(
        ValueError, match='model: expected the attention implementation "kvnumba"; got "eager"'
    ):
        compressing(press, model, cache)
    model.set_attn_implementation("kvnumba")
    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)
    )
    other.set_attn_implementation("kvnumba")
    with pytest.raises(ValueError, match="model: expected one whose .* as Llama's is; got a GPT2LMHeadModel"):
        compressing(press, other, KVNumbaCache(other.config, per_head=True))
    for other in (dynamic(model), KVNumbaCache(model.config)):
        with pytest.raises(ValueError, match=r"cache: expected KVNumbaCache\(model.config, per_head=True\)"):
            compressing(press, model, other)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with (
        pytest.raises(ValueError, match="attention_mask: expected no padding"),
        torch.no_grad(),
        compressing(press, model, cache),
    ):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 0
    with (
        pytest.raises(ValueError, match="past_key_values: expected the cache that the press works on"),
        torch.no_grad(),
        compressing(press, model, cache),
    ):
        model(input_ids=ids, past_key_values=per_head(model))
    read(model, press, cache, ids)
    with pytest.raises(ValueError, match="cache: expected an empty one, .* of 90 tokens. Call reset"):
        compressing(press, model, cache)


def test_without_kvpress(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(ImportError, match=r"kvpress is not installed: pip install 'kvnumba\[kvpress\]'"):
        importlib.reload(kvnumba.integrations.kvpress)
