"""Tensors on a GPU; in numba's simulator, tensors that say that they are on one.

``KVNUMBA_TEST_GPU=1`` runs these, and all of test_cache.py, on hardware.
"""

import contextlib
import copy
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SIMULATED, TESTED

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from kvnumba.caches.step import Step  # noqa: E402
from kvnumba.integrations.transformers import KVNumbaCache, attention_forward, attention_mask, captured  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # the peers' warnings are theirs

if "cuda" not in TESTED:
    pytest.skip("the cuda backend is not among the tested ones", allow_module_level=True)

H, HQ, D = 2, 4, 16
SETTINGS = {"num_hidden_layers": 2, "num_attention_heads": HQ, "num_key_value_heads": H, "head_dim": D}


class Simulated(torch.Tensor):
    """A tensor of the host's that says it is on a GPU, where the simulator finds it by its address."""

    number = 0
    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda", self.number))

    def get_device(self):
        return self.number


class SimulatedElsewhere(Simulated):
    number = 1


Simulated.__module__ = SimulatedElsewhere.__module__ = "torch"  # who makes new tensors like it


@pytest.fixture
def on_gpu(monkeypatch):
    """Moves a tensor to the GPU."""
    if not SIMULATED:
        return lambda x: x.to("cuda")
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    return lambda x: x.as_subclass(Simulated)


def make_cache(window=None, implementation="kvnumba", **options):
    config = transformers.MistralConfig(sliding_window=window, **SETTINGS)
    config._attn_implementation = implementation
    return KVNumbaCache(config, **options)


def feed(cache, move, dtype, window, sinks):
    """Attention of three chunks, padding in two sequences of three, in every layer."""
    generator = torch.Generator().manual_seed(3)
    padding = torch.arange(12) >= torch.tensor([[0], [4], [7]])
    outs = []
    for first, last in ((0, 6), (6, 11), (11, 12)):
        overlay = (
            transformers.masking_utils.causal_mask_function
            if window is None
            else transformers.masking_utils.sliding_window_causal_mask_function(window)
        )
        visible, offset = cache.get_mask_sizes(last - first, 0)
        mask = attention_mask(3, last - first, visible, first, offset, overlay, move(padding[:, :last]))
        for layer in range(2):
            q, k, v = (
                torch.randn(3, last - first, heads, D, generator=generator).to(dtype).transpose(1, 2)
                for heads in (HQ, H, H)
            )
            key, value = cache.update(move(k), move(v), layer)
            out, _ = attention_forward(torch.nn.Module(), move(q), key, value, mask, s_aux=sinks)
            outs.append(out[padding[:, first:last].numpy()])
    return outs


@pytest.mark.parametrize("fmt", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_stays_on_the_gpu(on_gpu, dtype, fmt, window):
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0])
    formats = {"key_format": fmt, "value_format": fmt}
    want = feed(make_cache(window, backend="numpy", **formats), lambda x: x, dtype, window, sinks)
    cache = make_cache(window, **formats)
    got = feed(cache, on_gpu, dtype, window, on_gpu(sinks))
    unit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, reference in zip(got, want, strict=True):
        assert ours.is_cuda
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours.float().numpy(force=True), reference.float().numpy(), rtol=0, atol=2 * unit
        )
    assert {group.pool.backend for group in cache._groups.values()} == {"cuda"}
    assert cache.get_seq_length() == 12


def decode(cache, move, dtype, steps, batch, window, events=None):
    """Attention of a prompt of 3 tokens, then of single ones; `events` maps a step to what happens before it."""
    generator = torch.Generator().manual_seed(4)
    overlay = (
        transformers.masking_utils.causal_mask_function
        if window is None
        else transformers.masking_utils.sliding_window_causal_mask_function(window)
    )
    outs = []
    for step in range(steps):
        if events and step in events:
            events[step](cache, move)
        count, first = (1 if step else 3), cache.get_seq_length()
        visible, offset = cache.get_mask_sizes(count, 0)
        mask = attention_mask(batch, count, visible, first, offset, overlay, None)
        for layer in range(2):
            q, k, v = (
                torch.randn(batch, count, heads, D, generator=generator).to(dtype).transpose(1, 2)
                for heads in (HQ, H, H)
            )
            key, value = cache.update(move(k), move(v), layer)
            assert key.shape[2] == cache.get_mask_sizes(0, layer)[0] or window is not None
            out, _ = attention_forward(torch.nn.Module(), move(q), key, value, mask, s_aux=move(SINKS[layer]))
            outs.append(out.float().numpy(force=True))
    return outs


SINKS = torch.tensor([[0.5, -1.0, 0.0, 2.0], [1.0, 0.0, -2.0, 0.0]])
EVENTS = {
    5: lambda cache, move: cache.crop(-3),
    9: lambda cache, move: cache.reorder_cache(torch.tensor([1, 0])),
    12: lambda cache, move: copy.deepcopy(cache),
}
"""What may come between steps, by the number of the step."""


INT4 = {"key_format": "int4", "value_format": "int4", "recent_tokens": 16}


@pytest.mark.parametrize(
    ("batch", "window", "options"),
    [(2, None, {}), (1, 5, {"key_format": "int8", "value_format": "int8"}), (2, None, INT4), (1, 20, INT4)],
)
def test_decode_steps_follow_each_other(on_gpu, monkeypatch, options, window, batch):
    """Long enough for several blocks and, on hardware, for pieces that are cut anew."""
    monkeypatch.setattr("kvnumba.integrations.transformers.settings.BLOCK_SIZE", 8 if SIMULATED else 16)
    dtype, steps = (torch.float32, 24) if SIMULATED else (torch.bfloat16, 600)
    events = EVENTS if batch == 2 and window is None else None
    want = decode(
        make_cache(window, backend="numpy", **options), lambda x: x, dtype, steps, batch, window, events
    )
    cache = make_cache(window, **options)
    followed, follow = [], Step.follow

    def counting(self, *args):
        followed.append(follow(self, *args))
        return followed[-1]

    monkeypatch.setattr(Step, "follow", counting)
    got = decode(cache, on_gpu, dtype, steps, batch, window, events)
    for ours, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=4e-6 if SIMULATED else 4e-2)
    assert np.mean(followed) > 0.7
    (group,) = cache._groups.values()
    group.pool.check_integrity()


def test_what_is_not_stored_yet_counts(on_gpu):
    """In decode steps attention stores what `update` was given, or whatever needs it before."""
    cache, reference = make_cache(), make_cache(backend="numpy")
    generator = torch.Generator().manual_seed(5)
    caches = ((cache, on_gpu), (reference, lambda x: x))
    q = torch.ones(1, HQ, 1, D)

    def new():
        return torch.randn(1, 2, H, D, generator=generator).transpose(1, 2)[:, :, :1]

    for step in range(4):  # the first three make the decoding
        for layer in range(2):
            k, v = new(), new()
            for each, move in caches:
                pair = each.update(move(k), move(v), layer)
                if step < 3:
                    attention_forward(torch.nn.Module(), move(q), *pair, None)
                if each is cache and step == 3:
                    (group,) = each._groups.values()
                    assert group.forward.unwritten
                    assert each.get_seq_length(layer) == 4
                if step == 3 and layer == 1:
                    dense = pair[0] + 0, pair[1] + 0
                    if each is cache:
                        kept = dense
    for ours, theirs in zip(kept, dense, strict=True):
        np.testing.assert_allclose(ours.numpy(force=True), theirs.numpy(), rtol=0, atol=1e-6)
    cache.crop(0)
    assert cache.get_seq_length() == 4


def test_dense_keys_are_on_the_gpu(on_gpu):
    cache = make_cache(implementation="eager", key_format="float32", value_format="float16")
    k, v = torch.randn(2, 3, H, 5, D).to(torch.float16)
    for first, last in ((0, 3), (3, 5)):
        for layer in range(2):
            keys, values = cache.update(on_gpu(k[:, :, first:last]), on_gpu(v[:, :, first:last]), layer)
    assert keys.dtype == values.dtype == torch.float16
    assert isinstance(keys, type(on_gpu(k)))
    assert keys.tolist() == k.tolist()
    assert values.tolist() == v.tolist()


def test_tensors_elsewhere_are_refused(on_gpu):
    k = torch.ones(1, H, 3, D)
    cache = make_cache(backend="cpu")
    with pytest.raises(
        ValueError, match=r"key_states: expected tensors on the CPU for the cpu backend; got cuda:0\. Use"
    ):
        cache.update(on_gpu(k), on_gpu(k), 0)
    with pytest.raises(ValueError, match=r"expected tensors on the CPU for the cpu backend; got meta\."):
        cache.update(k.to("meta"), k.to("meta"), 0)
    assert not cache.is_initialized
    cache = make_cache(backend="cuda")
    cache.update(k, k, 0)  # the host's are copied
    cache.crop(0)
    assert cache.get_seq_length() == 0
    if SIMULATED:
        other = k.as_subclass(SimulatedElsewhere)
        with pytest.raises(ValueError, match=r"expected tensors on the CPU or cuda:0 .*; got cuda:1\."):
            cache.update(other, other, 0)


LLAMA = {
    "vocab_size": 100, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
CAPTURED = {
    "Llama": {},
    "Mistral": {"sliding_window": 20},
    "Gemma2": {"sliding_window": 20, "num_hidden_layers": 4},
    "GptOss": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
               "num_local_experts": 2, "num_experts_per_tok": 2},
}  # fmt: skip


def small_model(name):
    torch.manual_seed(0)
    with torch.device("cuda"):
        config = getattr(transformers, f"{name}Config")(**{**LLAMA, **CAPTURED[name]})
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_attn_implementation("kvnumba")
    return model


def graphs_made(monkeypatch):
    made, graph = [], torch.cuda.graph

    def counting(*args, **options):
        made.append(args)
        return graph(*args, **options)

    monkeypatch.setattr(torch.cuda, "graph", counting)
    return made


@pytest.mark.skipif(SIMULATED, reason="needs a GPU")
@pytest.mark.parametrize("fmt", ["float32", "int8", "int4"])
@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_give_the_same_tokens(monkeypatch, name, fmt):
    """Padding on the left, two chats in one context, more tokens than a block and than the tables had room for."""
    model, made = small_model(name), graphs_made(monkeypatch)
    ids = torch.randint(1, 100, (2, 30), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    results = []
    for context in (contextlib.nullcontext(), captured(model)):
        with context:
            for _ in range(2):
                cache = KVNumbaCache(model.config, key_format=fmt, value_format=fmt)
                settings = {"attention_mask": mask, "past_key_values": cache, "do_sample": False}
                results.append(model.generate(ids, **settings, max_new_tokens=300).tolist())
    assert results[0] == results[1] == results[2] == results[3]
    assert 2 <= len(made) < 20
    assert "forward" not in model.__dict__


@pytest.mark.skipif(SIMULATED, reason="needs a GPU")
@pytest.mark.parametrize(
    ("what", "problem", "steps"),
    [("waits", "cannot be a CUDA graph", 1), ("counts", "lengths on the host", 2)],
    ids=["waits", "counts"],
)
def test_what_cannot_be_captured_is_refused(what, problem, steps):
    """A step that waits for the GPU when it is recorded, one that counts on the host when it is replayed."""
    model = small_model("Llama")
    cache = KVNumbaCache(model.config)
    ids = torch.randint(1, 100, (1, 20), device="cuda")
    attention = model.model.layers[1].self_attn.forward

    def forward(hidden_states, **options):
        out, *more = attention(hidden_states=hidden_states, **options)
        if what == "waits":
            float(out.sum())
        else:
            out = out * (1 + cache.get_seq_length() % 5)
        return out, *more

    def step(length):
        """The logits of a token after so many."""
        cache.crop(length - cache.get_seq_length())
        return model(ids[:, length : length + 1], past_key_values=cache).logits

    with torch.no_grad():
        for n in range(20):
            want = step(n)
        model.model.layers[1].self_attn.forward = forward
        with captured(model):
            for n in range(10, 9 + steps):
                step(n)
            with pytest.raises(ValueError, match=problem):
                step(9 + steps)
            assert cache.get_seq_length() == 9 + steps
        del model.model.layers[1].self_attn.forward
        for n in range(10 + steps - 1, 20):
            got = step(n)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.skipif(not SIMULATED, reason="of the host's part alone")
def test_a_step_that_is_not_captured_leaves_the_cache_as_it_was(on_gpu, monkeypatch):
    """All tensors say they are on a GPU; a graph computes while it is recorded, and nothing when it is replayed."""
    graphs = []

    @contextlib.contextmanager
    def recording(graph, **options):
        graphs.append(graph)
        yield

    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
    for name, value in {
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": recording,
        "stream": contextlib.nullcontext,
        "current_stream": lambda: None,
        "current_device": lambda: 0,
        "default_generators": [generator],
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 2})
    ).eval()
    model.set_attn_implementation("kvnumba")
    ids = torch.randint(1, 100, (1, 8))
    for name, value in {"is_cuda": True, "is_cpu": False}.items():
        monkeypatch.setattr(torch.Tensor, name, property(lambda self, value=value: value))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    cache = KVNumbaCache(model.config)

    def step(length):
        cache.crop(length - cache.get_seq_length())
        return model(ids[:, length : length + 1], past_key_values=cache).logits

    def stops(module, args, output):
        if next(iter(cache._groups.values())).forward.captured:
            raise RuntimeError("it waits")

    with torch.no_grad():
        for n in range(8):
            want = step(n)
        hook = model.model.layers[1].self_attn.register_forward_hook(stops)
        with captured(model), pytest.raises(ValueError, match=r"cannot be a CUDA graph \(it waits\)"):
            step(5)
        hook.remove()
        assert cache.get_seq_length() == 5
        with captured(model):
            step(5)
            with pytest.raises(ValueError, match="computes with the sequences' lengths on the host"):
                step(6)  # the replayed one has the logits of the one before
        assert cache.get_seq_length() == 6
        assert len(graphs) == 2
        got = [step(n) for n in (6, 7)]
    np.testing.assert_array_equal(got[1].numpy(), want.numpy())
