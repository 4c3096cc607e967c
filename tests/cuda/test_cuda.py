"""What only the CUDA backend promises: arrays on the device in and out, half-precision kernels, its plan."""

import itertools

import numpy as np
import oracle
import pytest
from conftest import SIMULATED, TESTED, at_most

import kvnumba
from kvnumba import arrays
from kvnumba.backends.registry import get_backend
from kvnumba.formats import REGISTERED

if "cuda" not in TESTED:
    pytest.skip("the cuda backend is not among the tested ones", allow_module_level=True)

from kvnumba.backends.cuda import intrinsics
from kvnumba.backends.cuda.memory import DeviceArray
from kvnumba.backends.cuda.plan import (
    END_KEY,
    FIRST_KEY,
    FIRST_PARTIAL,
    FIRST_TOKEN,
    ITEM,
    NUM_SPLITS,
    NUM_TOKENS,
    POSITION,
    SEQUENCE,
    SPLIT,
    Track,
    ranges_of,
    ranges_of_single,
    rows_to_merge,
    split,
    with_spare,
)
from kvnumba.storage import Batch, Part

UNIT = {"float32": 2.0**-21, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Of results as large as 1: what rounding queries, weights and results to a precision may cost."""


def on_device(x, kind):
    """A float32 array rounded to a precision, on the device; and as float32 again."""
    if kind == "bfloat16":
        bits = (oracle.bfloat16(x).view(np.uint32) >> 16).astype(np.uint16)
        return DeviceArray.of(bits), oracle.bfloat16(x)
    return DeviceArray.of(x.astype(kind)), x.astype(kind).astype(np.float32)


def on_host(x, kind):
    host = x.copy()
    return (host.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else host.astype(np.float32)


def check(kind, key_format, value_format, normal, *, group, head_dim, lengths, new, block_size=16, **options):
    """A ragged batch, written and attended as device arrays, against the oracle."""
    heads = 2
    blocks = sum(-(-length // block_size) for length in lengths) + 3
    cache = kvnumba.PagedKVCache(
        blocks, block_size, heads, head_dim, len(lengths),
        key_format=key_format, value_format=value_format, backend="cuda",
    )  # fmt: skip
    for part, fmt in ((cache.k_pool, key_format), (cache.v_pool, value_format)):
        part[...] = {"bfloat16": 0x7FC0, "fp8_e4m3": 255, "int8": 255, "int4": 255}.get(fmt, np.nan)
    for part in (cache.k_scale, cache.k_zp, cache.v_scale, cache.v_zp):
        part[...] = np.nan
    ids = [cache.add_sequence() for _ in lengths]
    for counts in (np.subtract(lengths, new), new):
        step = cache.step(ids, counts)
        total = int(np.sum(counts))
        k, v = (on_device(normal(total, heads, head_dim), kind)[0] for _ in range(2))
        step.write(k, v)
    q, q_host = on_device(normal(total, heads * group, head_dim), kind)
    out, lse = step.attend(q, return_lse=True, **options)
    assert isinstance(out, DeviceArray)
    assert out.dtype == q.dtype
    np.testing.assert_array_equal(step.attend(q, **options).copy(), out.copy())
    start = 0
    for seq_id, n in zip(ids, new, strict=True):
        rows = slice(start, start + n)
        want, want_lse = oracle.attention(q_host[rows], *cache.get_kv(seq_id), **options)
        unit = UNIT[kind]
        assert np.abs(on_host(out, kind)[rows] - want).max(initial=0) <= 2 * unit * max(
            1, np.abs(want).max(initial=0)
        )
        assert np.abs(lse.copy()[rows] - want_lse).max(initial=0) <= unit / 4 * max(
            1, np.abs(want_lse).max(initial=0)
        )
        start += n


KINDS = [
    ("float16", "float16"), ("float16", "bfloat16"), ("float16", "int8"), ("float16", "int4"),
    ("bfloat16", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "int8"), ("bfloat16", "int4"),
    ("float32", "float16"), ("float16", "fp8_e4m3"), ("bfloat16", "fp8_e4m3"), ("float32", "fp8_e4m3"),
]  # fmt: skip
"""Of queries and of the storage."""


@pytest.mark.parametrize(("kind", "fmt"), KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decoding_in_every_precision(kind, fmt, head_dim, normal):
    lengths = [1, 16, 17, at_most(700, 150), at_most(5003, 300)]
    check(kind, fmt, fmt, normal, group=4, head_dim=head_dim, lengths=lengths, new=[1] * 5)


@pytest.mark.parametrize(
    ("key_format", "value_format"), [("int8", "int4"), ("float16", "int4"), ("int4", "float16")]
)
def test_keys_and_values_in_different_formats(key_format, value_format, normal):
    check("float16", key_format, value_format, normal, group=2, head_dim=64, lengths=[300, 20], new=[1, 1])


@pytest.mark.parametrize("group", [1, 3, 8, 16, 20])
def test_group_sizes(group, normal):
    check(
        "float16",
        "int8",
        "int8",
        normal,
        group=group,
        head_dim=64,
        lengths=[at_most(900, 140), 33],
        new=[1, 1],
    )


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 5, 16])
@pytest.mark.parametrize("fmt", ["same", "int8", "int4"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prompts(kind, group, fmt, head_dim, normal):
    """Enough new tokens to fill a device."""
    if SIMULATED and head_dim == 128:
        pytest.skip("the simulator runs the kernel for all head_dims, and is slow")
    fmt = kind if fmt == "same" else fmt
    new = [at_most(1100, 22), at_most(700, 14), 1, at_most(640, 12)]
    lengths = [new[0], new[1] + at_most(300, 30), 77, new[3] + 5]
    options = {"window_left": 200, "sinks": np.linspace(-1, 2, 2 * group)} if group == 5 else {}
    check(kind, fmt, fmt, normal, group=group, head_dim=head_dim, lengths=lengths, new=new, **options)


@pytest.mark.parametrize("new", [[1, 3, 0, 40], [2, 1, 8, 1], [70, 17, 33, 16]])
@pytest.mark.parametrize("fmt", ["float16", "int4"])
def test_decoding_and_prompts_in_one_batch(fmt, new, normal):
    check("float16", fmt, fmt, normal, group=2, head_dim=64, lengths=[200, 90, 40, 75], new=new)


@pytest.mark.parametrize("new", [1, 3, 40])
@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 0},
        {"window_left": 37},
        {"logits_soft_cap": 3.0},
        {"sinks": np.array([0.5, 3.0, -1.0, 2.0], np.float32)},
        {"alibi_slopes": np.array([0.01, 0.1, 0.5, 1.0], np.float32)},
        {"sm_scale": 0.4, "window_left": 70, "logits_soft_cap": 5.0, "alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
    ],
    ids=str,
)
def test_options(new, options, normal):
    for fmt in ("float16", "int8"):
        check(
            "float16",
            fmt,
            fmt,
            normal,
            group=2,
            head_dim=64,
            lengths=[at_most(800, 200)],
            new=[new],
            **options,
        )


@pytest.mark.parametrize("block_size", [5, 16, 32, 48])
def test_block_sizes(block_size, normal):
    check(
        "float16", "int4", "int4", normal, group=4, head_dim=64, lengths=[333], new=[1], block_size=block_size
    )


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_values_far_from_one(fmt, magnitude, normal):
    """Weights times scales stay within what float16 can hold."""
    cache = kvnumba.KVCache(1, 200, 1, 64, fmt, backend="cuda")
    k, v = normal(1, 1, 200, 64), normal(1, 1, 200, 64) * np.float32(magnitude)
    cache.update(k, v)
    q, q_host = on_device(normal(1, 4, 1, 64), "float16")
    want, _ = oracle.attention(q_host[0].swapaxes(0, 1), *cache.get_kv(0))
    out = cache.attend(q).copy()[0].swapaxes(0, 1).astype(np.float32)
    assert np.abs(out - want).max() <= 2 * UNIT["float16"] * np.abs(want).max() + 2.0**-25


def test_contiguous_caches_take_transposed_views(normal):
    """(B, H, T, D) out of the memory of (B, T, H, D), which models make."""
    x = {name: normal(2, 20, heads, 64) for name, heads in (("k", 2), ("v", 2), ("q", 4))}
    caches = [kvnumba.KVCache(2, 33, 2, 64, "float16", backend="cuda") for _ in range(2)]
    outs = []
    for cache, transposed in zip(caches, (False, True), strict=True):
        views = {}
        for name, host in x.items():
            array = DeviceArray.of(host.astype(np.float16))
            if transposed:
                shape, strides = list(array.shape), list(array.strides)
                shape[1], shape[2], strides[1], strides[2] = shape[2], shape[1], strides[2], strides[1]
                array = DeviceArray(array._memory, 0, tuple(shape), tuple(strides), array.dtype)
            else:
                array = DeviceArray.of(host.swapaxes(1, 2).astype(np.float16))
            views[name] = array
        cache.update(views["k"], views["v"])
        outs.append(cache.attend(views["q"]).copy())
    for a, b in zip(caches[0].get_full_kv(), caches[1].get_full_kv(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(*outs)


class TestArguments:
    def cache(self, backend="cuda"):
        return kvnumba.KVCache(1, 8, 2, 8, backend=backend)

    def test_keys_and_values_in_one_place(self, normal):
        k = normal(1, 2, 3, 8)
        with pytest.raises(
            TypeError, match="new_v: expected an array on the same device as new_k; got a ndarray"
        ):
            self.cache().update(DeviceArray.of(k), k)

    def test_types_and_shapes(self, normal):
        cache, k = self.cache(), DeviceArray.of(normal(1, 2, 3, 8))
        with pytest.raises(TypeError, match=r"new_k: expected float32, float16, bfloat16 on a GPU; got <i4"):
            cache.update(DeviceArray.of(np.ones((1, 2, 3, 8), np.int32)), k)
        with pytest.raises(
            ValueError, match=r"new_v: expected shape \(B=1, H=2, T=3, D=8\); got \(1, 2, 4, 8\)"
        ):
            cache.update(k, DeviceArray.of(normal(1, 2, 4, 8)))
        wide = DeviceArray.of(normal(1, 2, 3, 16))
        strided = DeviceArray(wide._memory, 0, (1, 2, 3, 8), (384, 192, 64, 8), wide.dtype)
        with pytest.raises(ValueError, match="new_k: expected adjacent elements along the last axis"):
            cache.update(strided, k)
        assert cache.seq_lens == [0]

    def test_another_gpu(self, normal, monkeypatch):
        cache, k = self.cache(), DeviceArray.of(normal(1, 2, 3, 8))
        view = arrays.device_view(k)
        view.device = other = get_backend("cuda").device + 1
        monkeypatch.setattr(arrays, "device_view", lambda x: view)
        with pytest.raises(
            ValueError,
            match=f"new_k: expected an array on GPU {other - 1}, .*; got one on GPU {other}",
        ):
            cache.update(k, k)
        assert cache.seq_lens == [0]

    @pytest.mark.parametrize("backend", ["numpy", "cpu"])
    def test_other_backends_refuse_them(self, backend, normal):
        k = DeviceArray.of(normal(1, 2, 3, 8))
        with pytest.raises(
            TypeError, match=f"new_k: expected an array in host memory for the {backend} backend"
        ):
            self.cache(backend).update(k, k)

    def test_head_dims_that_no_block_holds(self):
        odd = 2**20 + 1
        if SIMULATED:
            pytest.skip("one thread of the simulator takes a head of any size")
        with pytest.raises(
            ValueError, match=f"head_dim: expected at most 128 on the cuda backend; got {odd}"
        ):
            kvnumba.KVCache(1, 1, 1, odd, backend="cuda")

    def test_more_memory_than_there_is(self):
        if SIMULATED:
            pytest.skip("the simulator's memory is the host's")
        with pytest.raises(MemoryError, match=r"bytes are needed on the device, [\d,]+ of [\d,]+ are free"):
            kvnumba.KVCache(2**14, 2**20, 8, 128, backend="cuda")


def test_storage_is_taken_without_a_copy(normal):
    cache = kvnumba.PagedKVCache(4, 16, 2, 8, 1, "int8", backend="cuda")
    interface = cache.k_pool.__cuda_array_interface__
    assert interface["shape"] == (4, 2, 16, 8)
    assert interface["data"][0] == cache.k_pool.address
    assert interface["strides"][-1] == 1
    cache.k_pool[2, 1, 3] = 7
    assert cache.k_pool[2].copy()[1, 3].tolist() == [7] * 8
    assert not cache.v_pool.copy().any()


@pytest.mark.parametrize(("kind", "fmt"), [("float32", "float32"), ("float16", "int8"), ("bfloat16", "int4")])
def test_masses_of_device_arrays(kind, fmt, normal):
    """They are on the device too, also where nobody wants the lse, and whichever kernel has attended."""
    lengths, new = [at_most(400, 150), 40, 0], [1, 5, 0]
    cache = kvnumba.PagedKVCache(40, 16, 2, 64, 3, fmt, backend="cuda")
    ids = [cache.add_sequence() for _ in lengths]
    for counts in (np.subtract(lengths, new), new):
        step = cache.step(ids, counts)
        step.write(*(on_device(normal(int(np.sum(counts)), 2, 64), kind)[0] for _ in range(2)))
    q, q_host = on_device(normal(6, 8, 64), kind)
    for options in ({}, {"window_left": 30, "sinks": np.linspace(-1, 2, 8)}):
        _, masses = step.attend(q, return_mass=True, **options)
        assert [mass.shape for mass in masses] == [(2, length) for length in lengths]
        for n, rows in enumerate((slice(0, 1), slice(1, 6))):
            want = oracle.mass(q_host[rows], cache.get_kv(ids[n])[0], **options)
            np.testing.assert_allclose(masses[n], want, rtol=UNIT[kind], atol=max(UNIT[kind] / 4, 1e-5))
    with pytest.raises(ValueError, match="return_mass: expected True with arrays on a GPU; got 'block'"):
        step.attend(q, return_mass="block")
    cache = kvnumba.KVCache(1, 40, 2, 64, fmt, backend="cuda")
    cache.update(*(on_device(normal(1, 2, 30, 64), kind)[0] for _ in range(2)))
    q, q_host = on_device(normal(1, 8, 3, 64), kind)
    out, lse, mass = cache.attend(q, return_lse=True, return_mass=True)
    assert all(isinstance(x, DeviceArray) for x in (out, lse, mass))
    want = oracle.mass(q_host[0].swapaxes(0, 1), cache.get_kv(0)[0])
    np.testing.assert_allclose(mass.copy()[0], want, rtol=UNIT[kind], atol=max(UNIT[kind] / 4, 1e-5))


def step_of(x):
    size = abs(x[0])
    for value in x:
        size = max(size, abs(value))
    return size / 31.0 if size > 0.0 else 1.0


def encode6(x, codes, scale):
    """Four elements of six bits in three bytes."""
    for n in range(len(codes) // 3):
        word = 0
        for i in range(4):
            word = word << 6 | 32 + int(np.rint(x[4 * n + i] / scale))
        codes[3 * n], codes[3 * n + 1], codes[3 * n + 2] = word >> 16, (word >> 8) & 255, word & 255


def decode6(codes, x, scale):
    for n in range(len(codes) // 3):
        word = np.int64(codes[3 * n]) << 16 | np.int64(codes[3 * n + 1]) << 8 | np.int64(codes[3 * n + 2])
        for i in range(4):
            x[4 * n + i] = np.float32(((word >> (18 - 6 * i)) & 63) - 32) * scale


@pytest.mark.parametrize(
    ("group_size", "new", "others"), [(32, [1, 1], {"key_format": "int8"}), (None, [1, 20], {})]
)
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_formats_of_users(kind, group_size, new, others, normal):
    """Beside another format, rotated, in more tokens than are decoded at a time; and their masses."""
    kvnumba.register_format("test_int6", bits=6, scale=step_of, encode=encode6, decode=decode6)
    options = {"group_size": group_size, "rotation": True, "scale_dtype": "float16", **others}
    try:
        cache = kvnumba.PagedKVCache(12, 16, 2, 128, 2, "test_int6", backend="cuda", **options)
    finally:
        del REGISTERED["test_int6"]
    lengths = [100, 40]
    ids = [cache.add_sequence() for _ in lengths]
    given = [np.zeros((2, 2, 0, 128), np.float32) for _ in ids]
    for counts in (np.subtract(lengths, new), new):
        step = cache.step(ids, counts)
        both = [on_device(normal(int(np.sum(counts)), 2, 128), kind) for _ in range(2)]
        step.write(*(array for array, _ in both))
        start = 0
        for n, count in enumerate(counts):
            rows = np.stack([host[start : start + count].swapaxes(0, 1) for _, host in both])
            given[n] = np.concatenate((given[n], rows), axis=2)
            start += count
    q, q_host = on_device(normal(sum(new), 4, 128), kind)
    out, masses = step.attend(q, return_mass=True)
    start = 0
    for n, seq_id in enumerate(ids):
        k, v = cache.get_kv(seq_id)
        for have, want in zip((k, v), given[n], strict=True):
            assert 0 < np.abs(have - want).max() < 0.25
        rows = slice(start, start + new[n])
        want, _ = oracle.attention(q_host[rows], k, v)
        assert np.abs(on_host(out, kind)[rows] - want).max() <= 4 * UNIT[kind] * max(1, np.abs(want).max())
        np.testing.assert_allclose(masses[n], oracle.mass(q_host[rows], k), rtol=1e-4, atol=1e-4)
        start += new[n]


def test_blocks_of_one_head_without_scales(normal):
    cache = kvnumba.PagedKVCache(4, 8, 1, 16, 2, backend="cuda")
    seq_id = cache.add_sequence()
    cache.update(seq_id, *normal(2, 1, 8, 16))
    before = cache.get_kv(seq_id)
    cache.swap_out(seq_id)
    cache.swap_in(seq_id)
    for have, want in zip(cache.get_kv(seq_id), before, strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.skipif(SIMULATED, reason="needs a GPU")
def test_torch_tensors(normal):
    torch = pytest.importorskip("torch")
    for kind in ("float32", "float16", "bfloat16"):
        dtype = getattr(torch, kind)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            cache = kvnumba.KVCache(2, 64, 2, 64, "int8", backend="cuda")
            k, v, q = (torch.randn(2, h, 40, 64, device="cuda").to(dtype) for h in (2, 2, 4))
            cache.update(k, v)
            out, lse = cache.attend(q, return_lse=True)
            assert (out.dtype, out.shape, out.device) == (dtype, q.shape, q.device)
            assert (lse.dtype, lse.shape) == (torch.float32, q.shape[:3])
            _, mass = cache.attend(q, return_mass=True)
            assert (mass.dtype, mass.shape, mass.device) == (torch.float32, (2, 2, 40), q.device)
            assert np.abs(mass.cpu().numpy().sum(axis=2) - 80).max() <= 80 * max(UNIT[kind], 1e-5)
        want, _ = oracle.attention(q[1].float().cpu().numpy().swapaxes(0, 1), *cache.get_kv(1))
        got = out[1].float().cpu().numpy().swapaxes(0, 1)
        assert np.abs(got - want).max() <= 2 * UNIT[kind] * max(1, np.abs(want).max())
        assert torch.as_tensor(cache.k_cache, device="cuda").data_ptr() == cache.k_cache.address


@pytest.mark.skipif(SIMULATED, reason="needs a GPU")
def test_cupy_arrays(normal):
    cupy = pytest.importorskip("cupy")
    cache = kvnumba.KVCache(1, 64, 2, 64, "float16", backend="cuda")
    with cupy.cuda.Stream(non_blocking=True):
        k, q = (
            cupy.asarray(normal(1, 2, 40, 64)).astype("float16"),
            cupy.asarray(normal(1, 4, 1, 64)).astype("float16"),
        )
        cache.update(k, k)
        out = cache.attend(q)
        assert isinstance(out, cupy.ndarray)
        _, mass = cache.attend(q, return_mass=True)
        assert isinstance(mass, cupy.ndarray)
        assert np.abs(cupy.asnumpy(mass).sum(axis=2) - 2).max() <= 2 * UNIT["float16"]
        host = cupy.asnumpy(out)
    want, _ = oracle.attention(cupy.asnumpy(q)[0].swapaxes(0, 1).astype(np.float32), *cache.get_kv(0))
    assert np.abs(host[0].swapaxes(0, 1) - want).max() <= 2 * UNIT["float16"] * max(1, np.abs(want).max())


@pytest.mark.skipif(SIMULATED, reason="needs a GPU")
def test_a_step_is_replayed_as_a_graph(normal):
    torch = pytest.importorskip("torch")
    cache = kvnumba.PagedKVCache(40, 16, 2, 64, 2, "int8", num_layers=2, backend="cuda")
    ids = [cache.add_sequence() for _ in range(2)]
    k = torch.randn(400, 2, 64, device="cuda", dtype=torch.float16)
    step = cache.step(ids, [200, 200])
    for layer in range(2):
        step.write(k, k, layer=layer)
    new, q = k[:2].clone(), torch.randn(2, 8, 64, device="cuda", dtype=torch.float16)
    step = cache.step(ids, [1, 1])
    step.prepare(q, return_mass=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs, masses = [], []
        for layer in range(2):
            step.write(new, new, layer=layer)
            out, mass = step.attend(q, layer=layer, return_mass=True)
            outs.append(out)
            masses.append(mass)
    for _ in range(2):
        new.copy_(torch.randn_like(new))
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
        for i in range(2):
            query, kv = q[i : i + 1].float().cpu().numpy(), cache.get_kv(ids[i], layer=1)
            want, _ = oracle.attention(query, *kv)
            got = outs[1][i : i + 1].float().cpu().numpy()
            assert np.abs(got - want).max() <= 2 * UNIT["float16"] * max(1, np.abs(want).max())
            assert np.abs(masses[1][i].cpu().numpy() - oracle.mass(query, kv[0])).max() <= UNIT["float16"]


@pytest.mark.parametrize("window_left", [-1, 40])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_pieces_cover_every_key_once(tokens, window_left, rng):
    for blocks in (1, 7, 264):
        new = rng.integers(0, 30, 12)
        lengths = new + rng.integers(0, 3000, 12)
        batch = Batch.of(np.zeros((12, 200), np.int32), lengths.astype(np.int32), new, 16)
        (table,) = split([ranges_of(batch, np.flatnonzero(new), tokens, window_left)], blocks, 2, 4).tables
        seen = {}
        for row in table.tolist():
            for token in range(row[FIRST_TOKEN], row[FIRST_TOKEN] + row[NUM_TOKENS]):
                seen.setdefault((row[SEQUENCE], token), []).append(row)
        assert len(seen) == new.sum()
        for (sequence, token), rows in seen.items():
            assert [row[SPLIT] for row in rows] == list(range(rows[0][NUM_SPLITS]))
            position = lengths[sequence] - batch.query_start_loc[sequence + 1] + token
            assert rows[0][FIRST_KEY] <= max(0, position - window_left if window_left >= 0 else 0)
            assert rows[-1][END_KEY] > position
            for a, b in itertools.pairwise(rows):
                assert a[FIRST_KEY] < a[END_KEY] == b[FIRST_KEY] < b[END_KEY]


@pytest.mark.parametrize("window_left", [-1, 0, 700])
def test_pieces_follow_sequences_that_grow(window_left, rng):
    """As long as they do, they cover what `ranges_of` says, each key once, in pieces of about the same length."""
    lengths = rng.integers(1, 3000, 9).astype(np.int32)
    sequences = np.arange(9)

    def ranges_at(step):
        batch = Batch.of(np.zeros((9, 500), np.int32), lengths + np.int32(step), np.ones(9, int), 16)
        return batch, ranges_of(batch, sequences, 4, window_left)

    before = ranges_at(0)[1]
    pieces = with_spare(split([before], 60, 2, 4), 30, 4)
    (table,) = pieces.tables
    longest = (table[:, END_KEY] - table[:, FIRST_KEY]).max()
    track = Track(table, pieces.num_items)
    for step in range(1, 2000):
        batch, wanted = ranges_at(step)
        single = ranges_of_single(batch, before, window_left)
        for ours, theirs in zip(single, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        old = table.copy()
        if not track.follow(single):
            np.testing.assert_array_equal(table, old)
            break
        for n in range(9):
            rows = table[(table[:, ITEM] == n) & (table[:, NUM_TOKENS] == 1)].tolist()
            assert rows[0][FIRST_KEY] == wanted.begin[n]
            assert rows[-1][END_KEY] == wanted.end[n]
            assert {row[POSITION] for row in rows} == {wanted.position[n]}
            for a, b in itertools.pairwise(rows):
                assert a[FIRST_KEY] < a[END_KEY] == b[FIRST_KEY] < b[END_KEY]
            assert max(row[END_KEY] - row[FIRST_KEY] for row in rows) <= longest * 17 // 16 + 16
        assert (table[table[:, NUM_TOKENS] == 0][:, [FIRST_KEY, END_KEY]] == 0).all()
    assert step > 8
    assert step < 1999 or window_left == 0


def test_partial_results_are_where_the_merge_looks_for_them(rng):
    """Each token's rows of all parts, none of them twice."""
    parts, tables, count = [], [], 0
    for tokens in (None, np.array([9, 2, 3, 30], np.int32)):
        new = rng.integers(0, 9, 5) if tokens is None else np.array([1, 3])
        lengths = (new + rng.integers(0, 900, len(new))).astype(np.int32)
        batch = Batch.of(np.zeros((len(new), 60), np.int32), lengths, new, 16)
        pieces = split([ranges_of(batch, np.flatnonzero(new), 4, -1)], 20, 2, 6, count)
        (table,) = pieces.tables
        assert (table[:, NUM_SPLITS] == 0).all()
        assert table[:, FIRST_PARTIAL].min() == count
        count += pieces.num_partials
        parts.append(Part(None, batch, tokens))
        tables.append(table)
    starts, rows = rows_to_merge(tables, parts, 40, 6)
    assert sorted(rows) == list(range(0, count, 6))
    assert starts[0] == 0
    assert starts[-1] == len(rows)
    for token in range(40):
        want = sum(
            int((row[FIRST_TOKEN] <= at) & (at < row[FIRST_TOKEN] + row[NUM_TOKENS]))
            for part, table in zip(parts, tables, strict=True)
            for row in table
            for at in ([token] if part.tokens is None else np.flatnonzero(part.tokens == token))
        )
        assert starts[token + 1] - starts[token] == want


@pytest.mark.skipif(not SIMULATED, reason="compares the simulator's arithmetic with the hardware's")
@pytest.mark.parametrize(("rows", "width"), [(1, 4), (4, 2), (16, 4)])
def test_the_simulator_computes_as_hardware_does(rows, width, normal):
    plain, short = (
        {function.__name__: function for function in make(rows, width)}
        for make in (intrinsics._plain_vectors, intrinsics._simulated_vectors)
    )
    assert plain.keys() == short.keys()
    shared, values, sums = normal(rows * 20), normal(width), normal(rows * width)
    calls = {
        "clear": (sums[:rows],),
        "clear_all": (sums,),
        "put": (shared, 3, values),
        "take": (shared, 3, values),
        "scale": (values, np.float32(1.5)),
        "scale_each": (values, shared[:width]),
        "calibrate": (values, shared[:width], np.abs(shared[5 : 5 + width]) + 1),
        "add_scaled": (values, shared, 5, np.float32(0.5)),
        "dequantize": (values, np.float32(0.1), np.float32(-1)),
        "quantize": (values, np.float32(-2), np.float32(0.3), np.float32(15)),
        "smallest": (values,),
        "largest": (values,),
        "dot_rows": (sums[:rows], shared, 2, 9, values),
        "scale_rows": (sums, shared, 1),
        "outer_rows": (sums, shared, 2, 7, values),
        "add_rows": (sums[:rows], shared, 2, 3),
        "maximum": (shared, 1, 12, np.float32(0.1)),
        "exponentiate": (shared, 2, 17, 3, np.float32(0.5)),
    }
    assert calls.keys() == plain.keys()
    for name, numbers in calls.items():
        results = []
        for functions in (plain, short):
            given = [x.copy() if isinstance(x, np.ndarray) else x for x in numbers]
            returned = functions[name](*given)
            results.append([*(x for x in given if isinstance(x, np.ndarray)), np.float32(returned or 0)])
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)
