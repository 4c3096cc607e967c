"""The kernels for hardware, line by line, against the oracle on a machine without a GPU: see `emulator`."""

import dataclasses
import gc
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import emulator
import numba
import numpy as np
import oracle
import pytest
from conftest import SIMULATED

import kvnumba
from kvnumba.arrays import device_view
from kvnumba.backends import registry
from kvnumba.backends.numpy import NumpyBackend
from kvnumba.calibration import Calibration
from kvnumba.formats import FORMATS
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Layout, Part, RowLayout

if SIMULATED:
    pytest.skip("the suite without the simulator runs these", allow_module_level=True)

UNIT = {"float32": 2.0**-21, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Of results as large as 1: what rounding queries, weights and results to a precision may cost."""


@pytest.fixture(scope="module")
def gpu():
    """The backend, its device, and its class of arrays, in the place of what a real GPU or the simulator gives."""
    attempt = registry._attempt
    with emulator.cuda_backend() as (package, device), pytest.MonkeyPatch.context() as patch:
        backend = package.CudaBackend()
        patch.setattr(registry, "_attempt", lambda name: backend if name == "cuda" else attempt(name))
        yield SimpleNamespace(
            backend=backend,
            device=device,
            array=package.memory.DeviceArray,
            jit=package.jit,
            pool=package.memory.Pool,
        )


@pytest.fixture
def check(gpu, normal):
    """``check(kernels, kind, key_format, value_format, ...)``: a ragged batch, written and attended on the device."""

    def on_device(x, kind):
        if kind == "bfloat16":
            x = oracle.bfloat16(x)
            return gpu.array.of((x.view(np.uint32) >> 16).astype(np.uint16)), x
        return gpu.array.of(x.astype(kind)), x.astype(kind).astype(np.float32)

    def on_host(x, kind):
        host = x.copy()
        return (
            (host.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else host.astype(np.float32)
        )

    def run(
        kernels, kind, key_format, value_format, *, lengths, new, heads=2, group=4, head_dim=64, block_size=16,
        value_head_dim=None, scale_dtype="float32", rotation=False, calibrated=False, options=(),
    ):  # fmt: skip
        blocks = sum(-(-length // block_size) for length in lengths) + 3
        cache = kvnumba.PagedKVCache(
            blocks, block_size, heads, head_dim, len(lengths),
            key_format=key_format, value_format=value_format, value_head_dim=value_head_dim,
            scale_dtype=scale_dtype, rotation=rotation,
            calibration=a_calibration(normal, heads, head_dim) if calibrated else None, backend="cuda",
        )  # fmt: skip
        for part, fmt in ((cache.k_pool, key_format), (cache.v_pool, value_format)):
            part[...] = {"bfloat16": 0x7FC0, "fp8_e4m3": 255, "int8": 255, "int4": 255}.get(fmt, np.nan)
        for part in (cache.k_scale, cache.k_zp, cache.v_scale, cache.v_zp):
            part[...] = np.nan
        ids = [cache.add_sequence() for _ in lengths]
        for counts in (np.subtract(lengths, new), new):
            step = cache.step(ids, counts)
            widths = (head_dim, value_head_dim or head_dim)
            step.write(*(on_device(normal(sum(counts), heads, width), kind)[0] for width in widths))
        q, q_host = on_device(normal(sum(new), heads * group, head_dim), kind)
        gpu.device.launched.clear()
        out, lse = step.attend(q, return_lse=True, **dict(options))
        assert set(gpu.device.launched) == kernels
        got, got_lse, start = on_host(out, kind), lse.copy(), 0
        unit = UNIT[kind] * (2 if rotation or calibrated else 1)  # transformed queries are rounded once more
        for seq_id, n in zip(ids, new, strict=True):
            rows = slice(start, start + n)
            want, want_lse = oracle.attention(q_host[rows], *cache.get_kv(seq_id), **dict(options))
            largest, largest_lse = (max(1, np.abs(x).max(initial=0)) for x in (want, want_lse))
            assert np.abs(got[rows] - want).max(initial=0) <= 2 * unit * largest
            assert np.abs(got_lse[rows] - want_lse).max(initial=0) <= unit / 4 * largest_lse
            start += n
        return out, got_lse

    return run


def a_calibration(normal, heads, head_dim):
    shape = (heads, head_dim)
    return Calibration((normal(*shape) / 4,), (np.exp(normal(*shape) / 4),), 1)


MATRIX_KINDS = [
    ("float16", "float16"), ("float16", "fp8_e4m3"), ("float16", "int8"), ("float16", "int4"),
    ("bfloat16", "bfloat16"), ("bfloat16", "fp8_e4m3"), ("bfloat16", "int8"), ("bfloat16", "int4"),
    ("bfloat16", "float16"),
]  # fmt: skip
"""Of queries and of the storage, for which there are kernels with matrix instructions."""

OPTIONS = [
    {"window_left": 0},
    {"window_left": 37},
    {"logits_soft_cap": 3.0},
    {"sinks": np.array([0.5, 3.0, -1.0, 2.0], np.float32)},
    {"alibi_slopes": np.array([0.01, 0.1, 0.5, 1.0], np.float32)},
    {"sm_scale": 0.4, "window_left": 70, "logits_soft_cap": 5.0, "alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
]


@pytest.mark.parametrize(("kind", "fmt"), MATRIX_KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decoding(kind, fmt, head_dim, check):
    """Ranges within a step of the block's eight warps, ranges of several, and split ones."""
    check({"decode"}, kind, fmt, fmt, head_dim=head_dim, lengths=[1, 16, 17, 700], new=[1] * 4)


@pytest.mark.parametrize(("kind", "fmt"), MATRIX_KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prompts(kind, fmt, head_dim, check):
    """Warps with rows of several tokens, with few and without any."""
    check({"prefill"}, kind, fmt, fmt, group=3, head_dim=head_dim, lengths=[50, 77], new=[40, 23])


@pytest.mark.parametrize(
    ("key_format", "value_format"), [("int8", "int4"), ("float16", "int4"), ("int4", "float16")]
)
def test_keys_and_values_in_different_formats(key_format, value_format, check):
    formats = ("float16", key_format, value_format)
    check({"decode", "prefill"}, *formats, group=2, lengths=[200, 20, 30], new=[1, 2, 25])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("fmt", ["float16", "int8"])
def test_options(options, fmt, check):
    for kernel, new in (("decode", [1]), ("decode", [3]), ("prefill", [40])):
        check({kernel}, "float16", fmt, fmt, group=2, lengths=[200], new=new, options=options)


@pytest.mark.parametrize(("kind", "fmt"), MATRIX_KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_transforms(kind, fmt, head_dim, check):
    """In both kernels; pieces that are split, and rows that fill no warp."""
    transform = {"rotation": True, "calibrated": True, "head_dim": head_dim}
    check({"decode"}, kind, fmt, fmt, group=3, lengths=[300, 17], new=[1, 2], **transform)
    check({"prefill"}, kind, fmt, fmt, group=3, lengths=[60], new=[37], **transform)


@pytest.mark.parametrize(("rotation", "calibrated"), [(True, False), (False, True)])
@pytest.mark.parametrize("fmt", ["float16", "int4"])
def test_one_of_two_transforms(fmt, rotation, calibrated, check):
    for kernel, new in (("decode", 1), ("prefill", 40)):
        check(
            {kernel}, "float16", fmt, fmt, lengths=[100], new=[new], rotation=rotation, calibrated=calibrated
        )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_see_what_a_calibration_takes_away(options, check):
    transform = {"rotation": True, "calibrated": True, "group": 2}
    for kernel, new in (("decode", 3), ("prefill", 40)):
        check({kernel}, "float16", "int4", "int4", lengths=[200], new=[new], options=options, **transform)


@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(40, 256), (6, 128), (512, 20)])
def test_transforms_of_any_width(head_dim, value_head_dim, check):
    """In the float32 kernel, where a row's elements may be those of several warps."""
    shape = {"head_dim": head_dim, "value_head_dim": value_head_dim, "rotation": True, "calibrated": True}
    for new in ([1, 1], [2, 9]):
        check({"attend"}, "float32", "float16", "float32", lengths=[150, 30], new=new, group=2, **shape)


@pytest.mark.parametrize("group", [1, 5, 8, 20])
def test_group_sizes(group, check):
    check(
        {"decode" if group <= 8 else "prefill"},
        "float16",
        "int8",
        "int8",
        group=group,
        lengths=[300, 33],
        new=[1, 1],
    )
    check({"prefill"}, "float16", "int8", "int8", group=group, lengths=[50], new=[45])


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_scales_in_float16(fmt, check):
    for kernel, new in (("decode", 1), ("prefill", 40)):
        check({kernel}, "float16", fmt, fmt, lengths=[150], new=[new], scale_dtype="float16")


@pytest.mark.parametrize(("head_dim", "value_head_dim"), [(128, 64), (64, 128)])
def test_values_of_another_width(head_dim, value_head_dim, check):
    for kernel, new in (("decode", 1), ("prefill", 40)):
        shape = {"head_dim": head_dim, "value_head_dim": value_head_dim}
        check({kernel}, "float16", "float16", "int8", lengths=[150], new=[new], **shape)


@pytest.mark.parametrize("block_size", [32, 48])
def test_blocks_of_several_tiles(block_size, check):
    sizes = {"group": 2, "block_size": block_size}
    check({"decode", "prefill"}, "float16", "int4", "int4", lengths=[100, 40], new=[1, 35], **sizes)


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("new", [1, 40])
def test_values_far_from_one(fmt, magnitude, new, gpu, normal):
    """Weights times scales stay within what float16 can hold."""
    cache = kvnumba.KVCache(1, 100, 2, 64, fmt, backend="cuda")
    k, v = normal(1, 2, 100, 64), normal(1, 2, 100, 64) * np.float32(magnitude)
    cache.update(k, v)
    q = normal(1, 4, new, 64).astype(np.float16)
    want, _ = oracle.attention(q[0].swapaxes(0, 1).astype(np.float32), *cache.get_kv(0))
    out = cache.attend(gpu.array.of(q)).copy()[0].swapaxes(0, 1).astype(np.float32)
    assert np.abs(out - want).max() <= 2 * UNIT["float16"] * np.abs(want).max() + 2.0**-25


@pytest.mark.parametrize(
    ("kind", "fmt", "shape"),
    [
        ("float32", "float32", {"head_dim": 40}),
        ("float32", "float16", {"head_dim": 128, "group": 1}),
        ("float32", "int8", {"block_size": 5}),
        ("float16", "bfloat16", {"head_dim": 6, "block_size": 1}),
        ("bfloat16", "int4", {"head_dim": 128, "group": 9, "block_size": 5}),
        ("float32", "fp8_e4m3", {"head_dim": 20, "value_head_dim": 36}),
        ("float32", "int8", {"head_dim": 32, "value_head_dim": 8, "scale_dtype": "float16"}),
    ],
)
@pytest.mark.parametrize("new", [[1, 1], [3, 9]])
def test_the_float32_kernel(kind, fmt, shape, new, check):
    options = {"window_left": 90, "logits_soft_cap": 7.0} if kind == "float32" else {}
    check({"attend"}, kind, fmt, fmt, lengths=[150, 30], new=new, options=options, **{"group": 2, **shape})


@pytest.mark.parametrize(("bits", "head_dim", "group_size"), [(8, 24, 6), (4, 32, 2)])
def test_several_scales_a_row(bits, head_dim, group_size, gpu, normal):
    cache = kvnumba.QuantizedKVCache(1, 50, 2, head_dim, bits=bits, group_size=group_size, backend="cuda")
    cache.update(normal(1, 2, 40, head_dim), normal(1, 2, 40, head_dim))
    q = normal(1, 4, 3, head_dim)
    want, _ = oracle.attention(q[0].swapaxes(0, 1), *cache.get_kv(0))
    assert np.abs(cache.attend(q)[0].swapaxes(0, 1) - want).max() <= 2 * UNIT["float32"] * np.abs(want).max()


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("group_size", [None, 8, 2])
def test_rows_are_encoded_as_numpy_does(fmt, group_size, scale_dtype, gpu, normal):
    """And decoded: bit for bit."""
    x = normal(40, 48) * np.float32(1e2)
    x[3], x[4, 5:] = 7.25, -0.0
    rows = RowLayout.of("x", FORMATS[fmt], 48, group_size, scale_dtype)
    want = NumpyBackend().encode(x, rows)
    got = gpu.backend.encode(x, rows)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(gpu.backend.decode(got, rows), NumpyBackend().decode(want, rows))


@dataclasses.dataclass
class Sequences:
    """A cache of one sequence for each length, filled with random keys and values, and what is in it."""

    buffers: Any
    batch: Batch
    k: list[np.ndarray]
    v: list[np.ndarray]


class TestParts:
    """Attention over several parts, straight from a backend."""

    @pytest.fixture
    def filled(self, gpu, normal):
        def fill(lengths, new, fmt, *, after=False, block_size=16, head_dim=64, **transform):
            layout = Layout.of(
                sum(-(-n // block_size) for n in lengths) + 1, block_size, 2, head_dim, fmt, value_head_dim=64,
                **transform,
            )  # fmt: skip
            buffers = gpu.backend.allocate(layout)
            width = max(-(-n // block_size) for n in lengths)
            table, used = np.zeros((len(lengths), width), np.int32), 1
            for row, n in zip(table, lengths, strict=True):
                row[: -(-n // block_size)] = np.arange(used, used + -(-n // block_size))
                used += -(-n // block_size)
            seq_lens = np.array(lengths, np.int32)
            batch = Batch.of(table, seq_lens, lengths, block_size)
            k, v = (normal(1, sum(lengths), 2, width) for width in (head_dim, 64))
            gpu.backend.write(buffers, 0, k, v, batch)
            both = [
                gpu.backend.read(buffers, 0, np.ascontiguousarray(row[None, : -(-n // block_size)]), n)
                for row, n in zip(table, lengths, strict=True)
            ]
            begin = np.concatenate(([0], np.cumsum(new))).astype(np.int32)
            positions = seq_lens if after else seq_lens - np.array(new, np.int32)
            batch = Batch(table, seq_lens, begin, block_size, positions.astype(np.int32))
            return Sequences(buffers, batch, [k[0] for k, _ in both], [v[0] for _, v in both])

        return fill

    def attend(self, gpu, parts, q, kind, scoring):
        plan = gpu.backend.plan(parts, q.shape[2], scoring)
        if kind == "float32":
            out, lse = (
                np.full((*q.shape[:3], 64), np.nan, np.float32),
                np.full(q.shape[:3], np.nan, np.float32),
            )
            gpu.backend.attend(0, q, plan, scoring, out, lse)
            return out[0], lse[0]
        query = device_view(gpu.array.of(q.astype(np.float16)))
        out = gpu.backend.empty(query, (*q.shape[:3], 64), "float16")
        lse = gpu.backend.empty(query, q.shape[:3], "float32")
        gpu.backend.attend(0, query, plan, scoring, out, lse)
        return out.owner.copy()[0].astype(np.float32), lse.owner.copy()[0]

    @pytest.mark.parametrize("kind", ["float32", "float16"])
    @pytest.mark.parametrize(
        "options", [{}, {"sinks": np.array([0.5, 3.0, -1.0, 2.0])}, {"logits_soft_cap": 5.0}], ids=str
    )
    def test_a_prefix_and_the_rest(self, kind, options, gpu, filled, normal):
        """Different formats and block sizes; one token sees the prefix only, one the rest only, one nothing."""
        new = [1, 9, 2, 0]
        rest = filled([40, 200, 2, 5], new, "float16", block_size=16)
        prefix = filled([320], [7], "int8", after=True, block_size=32)
        tokens = np.array([3, 0, 1, 12, 5, 6, 7], np.int32)
        q = normal(1, 14, 4, 64)
        q = q.astype(np.float16).astype(np.float32)
        parts = [
            Part(rest.buffers, rest.batch, np.arange(12, dtype=np.int32)),
            Part(prefix.buffers, prefix.batch, tokens),
        ]
        gpu.device.launched.clear()
        scoring = Scoring.of(4, 64, **options)
        out, lse = self.attend(gpu, parts, q, kind, scoring)
        kernels = {"attend", "merge"} if kind == "float32" else {"decode", "prefill", "merge"}
        assert set(gpu.device.launched) - {"read", "write"} == kernels
        unit = UNIT[kind]
        for token in range(14):
            k, v = [], []
            if token < 12:
                sequence = np.searchsorted(rest.batch.query_start_loc, token, side="right") - 1
                seen = rest.batch.positions[sequence] + token - rest.batch.query_start_loc[sequence] + 1
                k.append(rest.k[sequence][:, :seen])
                v.append(rest.v[sequence][:, :seen])
            if token in tokens:
                k.append(prefix.k[0])
                v.append(prefix.v[0])
            if not k:
                want_lse = options["sinks"] if "sinks" in options else np.full(4, -np.inf)
                assert not out[token].any()
                np.testing.assert_array_equal(lse[token], want_lse.astype(np.float32))
                continue
            want, want_lse = oracle.attention(
                q[0, token : token + 1], np.concatenate(k, 1), np.concatenate(v, 1), **options
            )
            assert np.abs(out[token] - want[0]).max() <= 2 * unit * max(1, np.abs(want).max())
            assert np.abs(lse[token] - want_lse[0]).max() <= unit / 2 * max(1, np.abs(want_lse).max())

    @pytest.mark.parametrize("kind", ["float32", "float16"])
    @pytest.mark.parametrize("new", [[1, 1, 1], [2, 1, 2], [3, 40, 20]])
    def test_recent_tokens_in_float(self, kind, new, gpu, filled, normal):
        """Keys from some place on out of other blocks: of one sequence all, of one none, which no block holds."""
        lengths, begins = np.array([700, 60, 50], np.int32), np.array([533, 0, 50], np.int32)
        transform = {"rotation": True, "calibration": a_calibration(normal, 2, 64)}
        older = filled(lengths, new, "int4", scale_dtype="float16", **transform)
        recent = filled(lengths, new, "float16", **transform)
        table = np.where(
            np.arange(older.batch.block_table.shape[1]) < begins[:, None] // 16, -1, recent.batch.block_table
        )
        parts = [
            Part(older.buffers, dataclasses.replace(older.batch, seq_lens=begins, kept={})),
            Part(
                recent.buffers,
                dataclasses.replace(recent.batch, block_table=table.astype(np.int32), begins=begins, kept={}),
            ),
        ]
        q = normal(1, sum(new), 4, 64).astype(np.float16).astype(np.float32)
        options = {"sinks": np.array([0.5, 3.0, -1.0, 2.0])}
        both = {"decode_both"} if max(new) < 3 else {"decode", "prefill", "merge"}
        for order in (parts, parts[::-1]):
            gpu.device.launched.clear()
            out, lse = self.attend(gpu, order, q, kind, Scoring.of(4, 64, **options))
            assert set(gpu.device.launched) == (both if kind == "float16" else {"attend"})
            for n, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
                rows = slice(*recent.batch.query_start_loc[n : n + 2])
                keys, values = (
                    np.concatenate((a[n][:, :begin], b[n][:, begin:]), axis=1)
                    for a, b in ((older.k, recent.k), (older.v, recent.v))
                )
                shape = keys.shape[1]
                assert shape == length
                keys = older.buffers.layout.transform.load_keys(keys.swapaxes(0, 1), 0).swapaxes(0, 1)
                values = older.buffers.layout.transform.load_values(values)
                want, want_lse = oracle.attention(q[0, rows], keys, values, **options)
                assert np.abs(out[rows] - want).max() <= 2 * UNIT[kind] * max(1, np.abs(want).max())
                assert np.abs(lse[rows] - want_lse).max() <= UNIT[kind] / 2 * max(1, np.abs(want_lse).max())

    @pytest.mark.parametrize("kind", ["float32", "float16"])
    @pytest.mark.parametrize("new", [1, 40])
    @pytest.mark.parametrize("window_left", [-1, 50])
    def test_keys_before_the_first(self, kind, new, window_left, gpu, filled, normal):
        """They are NaN in memory, as what was never written may be."""
        cached = filled([150, 90], [new, new], "float16")
        begins = np.array([37, 30], np.int32)
        for n, begin in enumerate(begins):
            for key in range(begin % 16):
                block = cached.batch.block_table[n, begin // 16]
                cached.buffers.keys.codes[0, block, :, key] = cached.buffers.values.codes[
                    0, block, :, key
                ] = np.nan
        q = normal(1, 2 * new, 4, 64).astype(np.float16).astype(np.float32)
        scoring = Scoring.of(4, 64, window_left=window_left)
        batch = dataclasses.replace(cached.batch, begins=begins, kept={})
        out, lse = self.attend(gpu, [Part(cached.buffers, batch)], q, kind, scoring)
        for n, begin in enumerate(begins):
            rows = slice(n * new, (n + 1) * new)
            want, want_lse = oracle.attention(
                q[0, rows], cached.k[n][:, begin:], cached.v[n][:, begin:], window_left=window_left
            )
            assert np.abs(out[rows] - want).max() <= 2 * UNIT[kind] * max(1, np.abs(want).max())
            assert np.abs(lse[rows] - want_lse).max() <= UNIT[kind] / 2 * max(1, np.abs(want_lse).max())

    @pytest.mark.parametrize(("fmt", "block_size"), [("float16", 16), ("int8", 16), ("int8", 48)])
    @pytest.mark.parametrize("new", [1, 40])
    @pytest.mark.parametrize("options", [{}, {"window_left": 150, "alibi_slopes": np.ones(4) / 64}], ids=str)
    def test_blocks_that_are_not_there(self, fmt, block_size, new, options, gpu, filled, normal):
        """Steps of which some tiles are there, all or none; nothing at all; NaN in the memory that is not read."""
        lengths = [700, 250, 90]
        cached = filled(lengths, [new] * 3, fmt, block_size=block_size)
        column = np.arange(cached.batch.block_table.shape[1])
        there = np.stack((column % 2 == 1, (column < 2) | (column > 12), column < 0))
        for n in range(3):
            for block in cached.batch.block_table[n, ~there[n]]:
                for rows in (cached.buffers.keys, cached.buffers.values):
                    (rows.scale if fmt == "int8" else rows.codes)[0, block] = np.nan
        table = np.where(there, cached.batch.block_table, np.int32(-1))
        batch = dataclasses.replace(cached.batch, block_table=table, kept={})
        q = normal(1, 3 * new, 4, 64).astype(np.float16).astype(np.float32)
        scoring = Scoring.of(4, 64, **options)
        gpu.device.launched.clear()
        out, lse = self.attend(gpu, [Part(cached.buffers, batch)], q, "float16", scoring)
        assert gpu.device.launched == ["decode" if new == 1 else "prefill"]
        for n, length in enumerate(lengths):
            rows = slice(n * new, (n + 1) * new)
            present = np.repeat(there[n], block_size)[:length]
            want, want_lse = oracle.attention(
                q[0, rows], cached.k[n], cached.v[n], present=present, **options
            )
            seen = np.isfinite(want_lse)
            np.testing.assert_array_equal(lse[rows][~seen], -np.inf)
            assert np.abs(out[rows] - want).max() <= 2 * UNIT["float16"] * max(1, np.abs(want).max())
            got_lse, want_lse = lse[rows][seen], want_lse[seen]
            largest_lse = np.abs(want_lse).max(initial=1)
            assert np.abs(got_lse - want_lse).max(initial=0) <= UNIT["float16"] / 2 * largest_lse

    @pytest.mark.parametrize("kind", ["float32", "float16"])
    @pytest.mark.parametrize("new", [2, 40])
    def test_tokens_after_all_keys(self, kind, new, gpu, filled, normal):
        """In one part, with a window that the last of them have left behind."""
        cached = filled([150], [new], "float16", after=True)
        q = normal(1, new, 4, 64).astype(np.float16).astype(np.float32)
        window = new // 2
        scoring = Scoring.of(4, 64, window_left=window)
        out, lse = self.attend(gpu, [Part(cached.buffers, cached.batch)], q, kind, scoring)
        for i in range(new):
            first = 150 + i - window
            if first >= 150:
                assert not out[i].any()
                assert np.isneginf(lse[i]).all()
                continue
            want, want_lse = oracle.attention(q[0, i : i + 1], cached.k[0][:, first:], cached.v[0][:, first:])
            assert np.abs(out[i] - want[0]).max() <= 2 * UNIT[kind] * max(1, np.abs(want).max())
            assert np.abs(lse[i] - want_lse[0]).max() <= UNIT[kind] / 2 * max(1, np.abs(want_lse).max())

    def test_exact_products_on_request(self, gpu, filled, normal):
        cached = filled([150], [3], "float16")
        q = normal(1, 3, 4, 64).astype(np.float16).astype(np.float32)
        gpu.device.launched.clear()
        self.attend(
            gpu, [Part(cached.buffers, cached.batch)], q, "float16", Scoring.of(4, 64, arithmetic="float32")
        )
        assert gpu.device.launched == ["attend"]

    def test_numbers_for_each_head_may_lie_on_the_device(self, gpu, filled, normal):
        cached = filled([150], [3], "float16")
        q = normal(1, 3, 4, 64)
        numbers = {"sinks": normal(4), "alibi_slopes": np.abs(normal(4))}
        part = Part(cached.buffers, cached.batch)
        want = self.attend(gpu, [part], q, "float16", Scoring.of(4, 64, **numbers))
        there = {name: gpu.array.of(x) for name, x in numbers.items()}
        got = self.attend(gpu, [part], q, "float16", Scoring.of(4, 64, **there))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


class Out(NamedTuple):
    """The parameters of a test's kernel."""

    out: Annotated[int, 64]


class Nothing(NamedTuple):
    """No further ones."""

    unused: int


@pytest.mark.parametrize("fmt", ["float16", "fp8_e4m3"])
@pytest.mark.parametrize("new", [1, 40])
def test_nan_in_the_cache_reaches_the_results(fmt, new, gpu, normal):
    cache = kvnumba.KVCache(1, 100, 2, 64, fmt, backend="cuda")
    k, v = normal(1, 2, 100, 64), normal(1, 2, 100, 64)
    k[0, 1, 30, 5] = np.nan
    cache.update(k, v)
    q = gpu.array.of(normal(1, 4, new, 64).astype(np.float16))
    out, lse = (x.copy()[0] for x in cache.attend(q, return_lse=True))
    assert np.isfinite(out[:2]).all()
    assert np.isfinite(lse[:2]).all()
    assert np.isnan(out[2:]).all()
    assert np.isnan(lse[2:]).all()


def test_memory_in_a_cycle_of_garbage_stays_the_pools(gpu):
    pool = gpu.pool()
    for _ in range(3):
        holder = SimpleNamespace(loan=pool.take(1000, 0))
        holder.itself = holder
        del holder
        gc.collect()
        loan = pool.put(np.ones(250, np.int32), 0)  # raises where it is not allocated
        assert pool.take(1000, 0).address != loan.address


def test_a_token_needs_one_upload(gpu, normal, monkeypatch):
    """From the second on, which is planned like the first; and none once its first layer is written."""
    cache = kvnumba.PagedKVCache(40, 16, 2, 64, 2, "float16", num_layers=2, backend="cuda")
    ids = [cache.add_sequence() for _ in range(2)]
    uploads = []
    copy = gpu.device.cuMemcpyHtoDAsync
    driver = gpu.jit._driver()
    monkeypatch.setattr(driver, "cuMemcpyHtoDAsync", lambda *args: (uploads.append(args[2]), copy(*args))[1])
    for new, wanted in ((1, 2), (1, 1), (1, 1), (3, 2), (3, 1)):
        k, q = (gpu.array.of(normal(2 * new, heads, 64).astype(np.float16)) for heads in (2, 4))
        uploads.clear()
        step = cache.step(ids, [new] * 2)
        for layer in range(2):
            step.write(k, k, layer=layer)
            out = step.attend(q, layer=layer).copy().astype(np.float32)
        assert len(uploads) == wanted
        want, _ = oracle.attention(q.copy()[:new].astype(np.float32), *cache.get_kv(ids[0], layer=1))
        assert np.abs(out[:new] - want).max() <= 2 * UNIT["float16"] * max(1, np.abs(want).max())


@pytest.mark.parametrize(
    ("options", "new", "launched"),
    [
        ({}, [1, 5], ["write", "prefill", "decode"]),
        ({"recent_tokens": 20}, [1, 4], ["write", "write", "decode_both"]),
        ({"recent_tokens": 20, "sink_tokens": 3}, [1, 2], ["write", "write", "decode_both", "decode"]),
    ],
)
def test_a_prepared_step_only_starts_kernels(options, new, launched, gpu, normal, monkeypatch):
    """As a CUDA graph needs it: nothing is uploaded or compiled any more."""
    cache = kvnumba.PagedKVCache(
        40, 16, 2, 64, 2, "int8", num_layers=2, rotation=True, backend="cuda", **options
    )
    ids = [cache.add_sequence() for _ in range(2)]
    k = gpu.array.of(normal(65, 2, 64).astype(np.float16))
    step = cache.step(ids, [30, 35])
    for layer in range(2):
        step.write(k, k, layer=layer)
    k, q = (gpu.array.of(normal(sum(new), heads, 64).astype(np.float16)) for heads in (2, 4))
    step = cache.step(ids, new)
    step.prepare(q, sinks=np.ones(4))
    forbidden = pytest.fail
    with monkeypatch.context() as patch:
        patch.setattr(gpu.jit._driver(), "cuMemcpyHtoDAsync", lambda *args: forbidden("an upload"))
        patch.setattr(gpu.jit.cuda, "jit", lambda *args, **options: forbidden("a compilation"))
        gpu.device.launched.clear()
        for layer in range(2):
            step.write(k, k, layer=layer)
            out = step.attend(q, layer=layer, sinks=np.ones(4))
        assert gpu.device.launched == 2 * launched
    last = slice(-new[1], None)
    queries = q.copy()[last].astype(np.float32)
    want, _ = oracle.attention(queries, *step.get_kv(layer=1)[1], sinks=np.ones(4))
    assert np.abs(out.copy()[last] - want).max() <= 4 * UNIT["float16"] * max(1, np.abs(want).max())


@pytest.mark.parametrize(
    ("fmt", "options", "tokens"), [("float16", {}, 200), ("int4", {"recent_tokens": 20}, 60)]
)
def test_decode_steps_keep_their_launches(fmt, options, tokens, gpu, normal, monkeypatch):
    """Each step is one upload and what `write` and `attend` launch, into new blocks and until pieces are cut anew."""
    cache = kvnumba.PagedKVCache(
        80, 16, 2, 64, 2, key_format=fmt, value_format=fmt, num_layers=1, backend="cuda", **options
    )
    ids = [cache.add_sequence() for _ in range(2)]
    prompt = gpu.array.of(normal(tokens + 40, 2, 64).astype(np.float16))
    cache.step(ids, [tokens, 40]).write(prompt, prompt)
    scoring = kvnumba.Scoring.of(8, 64, sinks=np.ones(8, np.float32))
    uploads, driver = [], gpu.jit._driver()
    copy = gpu.device.cuMemcpyHtoDAsync
    monkeypatch.setattr(driver, "cuMemcpyHtoDAsync", lambda *args: (uploads.append(args[2]), copy(*args))[1])
    decoding = launched = None
    for _ in range(25):
        k, q = (gpu.array.of(normal(2, heads, 64).astype(np.float16)) for heads in (2, 8))
        out = gpu.array.of(np.full((2, 8, 64), np.nan, np.float16))
        step = cache.step(ids, [1, 1])
        if decoding is None:
            decoding = step.decoding(q, k, k, scoring)
            assert decoding is not None
        else:
            uploads.clear()
            assert step.follow(decoding, 8, scoring, 0)
            assert len(uploads) == 1
        gpu.device.launched.clear()
        step.require_next(0)
        decoding.layer(0, scoring).run(k.address, k.address, q.address, out.address, 0)
        step.written(0)
        if launched is not None:
            assert gpu.device.launched == launched
        launched = gpu.device.launched.copy()
        for n, seq_id in enumerate(ids):
            queries = q.copy()[n : n + 1].astype(np.float32)
            want, _ = oracle.attention(queries, *cache.get_kv(seq_id), sinks=np.ones(8))
            got = out.copy()[n].astype(np.float32)
            assert np.abs(got - want[0]).max() <= 4 * UNIT["float16"] * max(1, np.abs(want).max())
    assert decoding.layer(0, kvnumba.Scoring.of(8, 64, sm_scale=0.5)) is None
    step = cache.step(ids, [2, 1])
    assert not step.follow(decoding, 8, scoring, 0)


class TestEmulator:
    """What the tests above rely on."""

    def run(self, gpu, function, count=64):
        function.__module__ = emulator.PACKAGE
        jit = gpu.jit
        memory = gpu.array.of(np.zeros(count, np.float32))

        def run(call, work):
            function(call.out)

        kernel = jit.Kernel(run, (Out, Nothing), 64)
        jit.Launch(kernel, (1, 1), 256, Nothing(0))(0, (memory.address,))
        return memory.copy()

    def test_threads_that_part_ways(self, gpu):
        cuda, store = numba.cuda, emulator._hardware()["store_float"]

        def kernel(out):
            thread = cuda.threadIdx.x
            steps = numba.int32(0)
            x = thread
            while x > 1:
                x = x // 2 if x % 2 == 0 else 3 * x + 1
                steps += 1
            if thread % 3 == 1:
                for i in range(thread, 64, 7):
                    steps += i
            store(out + 4 * thread, numba.float32(steps))

        def plain(thread):
            x, steps = thread, 0
            while x > 1:
                x, steps = x // 2 if x % 2 == 0 else 3 * x + 1, steps + 1
            return steps + (sum(range(thread, 64, 7)) if thread % 3 == 1 else 0)

        assert self.run(gpu, kernel).tolist() == [plain(thread) for thread in range(64)]

    def test_mistakes_are_seen(self, gpu):
        cuda, hw = numba.cuda, emulator._hardware()
        barrier, store, shuffle = hw["barrier"], hw["store_float"], cuda.shfl_sync

        def some_at_a_barrier(out):
            if cuda.threadIdx.x < 40:
                barrier()

        def some_of_a_warp(out):
            if cuda.threadIdx.x < 40:
                shuffle(0xFFFFFFFF, 1, 0)

        def beside(out):
            store(out + 4 * 64, numba.float32(1))

        def wide(out):
            store(out, cuda.threadIdx.x * numba.float32(1))

        for kernel, error in (
            (some_at_a_barrier, RuntimeError),
            (some_of_a_warp, RuntimeError),
            (beside, IndexError),
            (wide, TypeError),
        ):
            with pytest.raises(error):
                self.run(gpu, kernel)
