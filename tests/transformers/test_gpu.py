"""Tensors on a GPU; in numba's simulator, tensors that say that they are on one.

``KVNUMBA_TEST_GPU=1`` runs these, and all of test_cache.py, on hardware.
"""

import numpy as np
import pytest
from conftest import SIMULATED, TESTED

torch = pytest.importorskip("torch", reason="the transformers extra is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

from kvnumba.integrations.transformers import KVNumbaCache, attention_forward, attention_mask  # noqa: E402

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
