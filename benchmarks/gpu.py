"""The CUDA backend on one GPU, beside the read bandwidth of its memory and what peers reach.

``PYTHONPATH=tests python benchmarks/gpu.py`` prints the README's tables. Needs torch. Times are medians over replays
of CUDA graphs between events; data sets are larger than the L2 and rotated; results are checked before they are timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from numba import float32, uint32
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

import kvnumba
from kvnumba.backends.cuda import hardware
from kvnumba.backends.cuda.jit import Kernel, Launch, Long, cuda, device_name, num_multiprocessors
from kvnumba.commands.bench import shuffle

HQ, H, D, BLOCK = 32, 8, 128, 16
DECODE = ((1, 32_768), (16, 4_096), (1, 131_072))
FORMATS = ("float16", "fp8_e4m3", "int8", "int4")
SMALL = {"dtype": "int4", "scale_dtype": "float16"}
OPTIONS: dict[str, dict[str, Any]] = {fmt: {"dtype": fmt} for fmt in FORMATS} | {
    "int4, scales in float16": SMALL,
    "the same, rotated": {**SMALL, "rotation": True},
    "the same, calibrated": {**SMALL, "rotation": True, "calibration": True},
    "the same, 128 recent tokens": {**SMALL, "rotation": True, "calibration": True, "recent_tokens": 128},
}
"""Rows of the tables -> how the cache stores; a calibration is random."""
ROTATED = 600_000_000  # bytes: several times the L2
NEW, CACHED = 2_048, 8_192
REPLAYS, MILLISECONDS = 9, 2.0


def graph_time(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one call, of several that are replayed one after the other as a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls * 2:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay(count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            begin.record()
            for _ in range(count):
                graph.replay()
            end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3 / count / len(calls)

    count = max(1, round(MILLISECONDS * 1e3 / (replay(2) * len(calls))))
    return float(np.median([replay(count) for _ in range(REPLAYS)]))


class ReadAddresses(NamedTuple):
    """What `read_time` reads, and where it would write if the compiler could not tell that it does not."""

    source: Long
    out: Long


class ReadShape(NamedTuple):
    """How many times 16 bytes."""

    chunks: Long


def read_time(nbytes: int) -> float:
    """Microseconds that reading so many bytes takes, 16 at a time, from places that were not read just before."""
    threads, unrolled = 256, 8
    blocks = num_multiprocessors() * 8
    fetch = hardware.fetcher(4)
    zero, size = uint32(0), 4 * unrolled

    def read(call, work):
        words = cuda.local.array(size, uint32)
        total = zero
        step = threads * blocks
        at = cuda.blockIdx.x * threads + cuda.threadIdx.x
        while at < work.chunks:
            for n in range(unrolled):
                fetch(call.source + 16 * min(at + n * step, work.chunks - 1), words, 4 * n)
            for n in range(size):
                total ^= words[n]
            at += unrolled * step
        if total == uint32(0x12345678):
            hardware.store_float(call.out, float32(1))

    kernel = Kernel(read, (ReadAddresses, ReadShape), threads)
    launch = Launch(kernel, (blocks, 1), 0, ReadShape(nbytes // 16))
    sets = max(2, ROTATED // nbytes + 1)
    memory = torch.randint(0, 255, (sets, nbytes), dtype=torch.uint8, device="cuda")
    out = torch.zeros(1, device="cuda")

    def call(n: int) -> Callable[[], None]:
        return lambda: launch(torch.cuda.current_stream().cuda_stream, (memory[n].data_ptr(), out.data_ptr()))

    return graph_time([call(n) for n in range(sets)])


def make_cache(
    num_blocks: int, num_seqs: int, num_layers: int, options: dict[str, Any]
) -> kvnumba.PagedKVCache:
    """A cache in shuffled blocks."""
    if options.get("calibration"):
        rng = np.random.default_rng(1)
        shifts = rng.standard_normal((num_layers, H, D)).astype(np.float32) / 4
        scales = np.exp(rng.standard_normal((num_layers, H, D)) / 4).astype(np.float32)
        options = {**options, "calibration": kvnumba.Calibration(tuple(shifts), tuple(scales), 1)}
    cache = kvnumba.PagedKVCache(
        num_blocks, BLOCK, H, D, num_seqs, num_layers=num_layers, backend="cuda", **options
    )
    shuffle(cache)
    return cache


def filled(
    batch: int, length: int, new: int, options: dict[str, Any], sets: int
) -> tuple[kvnumba.PagedKVCache, list[list[int]]]:
    """A cache with some sets of sequences of random tokens, and room for new ones."""
    blocks = batch * -(-(length + new) // BLOCK) * sets
    cache = make_cache(blocks, batch * sets, 1, options)
    groups = []
    for _ in range(sets):
        ids = [cache.add_sequence() for _ in range(batch)]
        for start in range(0, length, 4096):
            append(cache, ids, min(4096, length - start))
        groups.append(ids)
    return cache, groups


def append(cache: kvnumba.PagedKVCache, ids: list[int], new: int) -> kvnumba.Step:
    """Some random tokens more for each sequence, in all layers."""
    step = cache.step(ids, [new] * len(ids))
    k = torch.randn(len(ids) * new, H, D, device="cuda", dtype=torch.float16)
    for layer in range(cache.num_layers):
        step.write(k, torch.randn_like(k), layer=layer)
    return step


def check(kv: tuple[np.ndarray, np.ndarray], q: torch.Tensor, out: torch.Tensor) -> None:
    """The newest tokens of a sequence against float64."""
    last = slice(-2, None)
    want, _ = oracle.attention(q[last].float().cpu().numpy(), *kv)
    # a rotation gathers in one element what all of a row err alike, so the mean is judged and not the largest
    error = np.sqrt(np.square(out[last].float().cpu().numpy() - want).mean())
    largest = np.abs(want).max()
    assert error <= 5e-4 * largest + 5e-5, f"error {error:.1e}, largest result {largest:.1e}"


def bytes_per_token(options: dict[str, Any]) -> int:
    """Bytes that a token's keys and values take in a layer."""
    dtype, scale_dtype = options["dtype"], options.get("scale_dtype")
    return kvnumba.Layout.of(1, 1, H, D, dtype, scale_dtype=scale_dtype).bytes_per_token()


def decode_time(batch: int, length: int, options: dict[str, Any]) -> tuple[float, int]:
    """Microseconds of the attention of one new token for each sequence, and the bytes stored for them."""
    nbytes = batch * length * bytes_per_token(options)
    cache, groups = filled(batch, length - 1, 1, options, max(2, ROTATED // nbytes + 1))
    steps = [append(cache, ids, 1) for ids in groups]
    q = torch.randn(batch, HQ, D, device="cuda", dtype=torch.float16)
    check(steps[0].get_kv()[-1], q[-1:], steps[0].attend(q)[-1:])
    return graph_time([lambda step=step: step.attend(q) for step in steps]), nbytes


def layer_time(batch: int, length: int, options: dict[str, Any]) -> float:
    """Microseconds of `write` and `attend` of one new token for each sequence: a layer of a step of several."""
    layers = max(2, ROTATED // (batch * length * bytes_per_token(options)) + 1)
    cache = make_cache(batch * -(-length // BLOCK), batch, layers, options)
    ids = [cache.add_sequence() for _ in range(batch)]
    for start in range(0, length - 1, 4096):
        append(cache, ids, min(4096, length - 1 - start))
    k, q = (torch.randn(batch, heads, D, device="cuda", dtype=torch.float16) for heads in (H, HQ))
    step = cache.step(ids, [1] * batch)
    step.prepare(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            step.write(k, k, layer=layer)
            step.attend(q, layer=layer)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(REPLAYS + 1):
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 10 / layers)
    return float(np.median(times[1:]))


def sdpa_decode_time(batch: int, length: int) -> float:
    """The same of torch's attention over contiguous float16."""
    nbytes = batch * length * H * D * 4
    q = torch.randn(batch, HQ, 1, D, device="cuda", dtype=torch.float16)
    pairs = [
        torch.randn(2, batch, H, length, D, device="cuda", dtype=torch.float16)
        for _ in range(max(2, ROTATED // nbytes + 1))
    ]
    return graph_time(
        [
            lambda kv=kv: functional.scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=True)
            for kv in pairs
        ]
    )


def flashinfer_decode_time(batch: int, length: int, dtype: torch.dtype) -> float | None:
    """The same of FlashInfer over blocks of 16; None where it is not installed."""
    try:
        import flashinfer
    except ImportError:
        return None
    blocks = batch * length // BLOCK
    kv = torch.randn(blocks, 2, H, BLOCK, D, device="cuda", dtype=torch.float16).to(dtype)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_cuda_graph=False)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32) * (length // BLOCK),
        torch.randperm(blocks).to(torch.int32).cuda(),
        torch.full((batch,), BLOCK, dtype=torch.int32),
        HQ, H, D, BLOCK, q_data_type=torch.float16, kv_data_type=dtype,
    )  # fmt: skip
    q = torch.randn(batch, HQ, D, device="cuda", dtype=torch.float16)
    return graph_time([lambda: wrapper.run(q, kv)])


def prefill_time(options: dict[str, Any]) -> float:
    """Microseconds of the attention of a prompt's last tokens."""
    cache, groups = filled(1, CACHED - NEW, NEW, options, 1)
    step = append(cache, groups[0], NEW)
    q = torch.randn(NEW, HQ, D, device="cuda", dtype=torch.float16)
    check(step.get_kv()[0], q, step.attend(q))
    return graph_time([lambda: step.attend(q)])


def sdpa_prefill_time() -> float:
    """The same of torch's attention over contiguous float16, its keys repeated for every query head."""
    q = torch.randn(1, HQ, NEW, D, device="cuda", dtype=torch.float16)
    k, v = torch.randn(2, 1, HQ, CACHED, D, device="cuda", dtype=torch.float16)
    mask = causal_lower_right(NEW, CACHED)
    return graph_time([lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)])


def step_times(layers: int = 32, batch: int = 8, length: int = 1_000) -> tuple[float, float, float]:
    """Microseconds of `step`, of `write` and `attend` of a layer as Python calls, and of a layer in a graph."""
    cache = kvnumba.PagedKVCache(4_000, BLOCK, H, D, batch, "float16", num_layers=layers, backend="cuda")
    ids = [cache.add_sequence() for _ in range(batch)]
    k = torch.randn(batch * length, H, D, device="cuda", dtype=torch.float16)
    step = cache.step(ids, [length] * batch)
    for layer in range(layers):
        step.write(k, k, layer=layer)
    new, q = k[:batch].contiguous(), torch.randn(batch, HQ, D, device="cuda", dtype=torch.float16)

    def layer_calls(step: kvnumba.Step) -> list[float]:
        times = []
        for layer in range(layers):
            begin = time.perf_counter()
            step.write(new, new, layer=layer)
            step.attend(q, layer=layer)
            times.append(time.perf_counter() - begin)
        return times

    made, calls = [], []
    for _ in range(20):
        begin = time.perf_counter()
        step = cache.step(ids, [1] * batch)
        made.append(time.perf_counter() - begin)
        calls += layer_calls(step)
        torch.cuda.synchronize()
    step = cache.step(ids, [1] * batch)
    step.prepare(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer_calls(step)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    for _ in range(50):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    in_graph = begin.elapsed_time(end) * 1e3 / 50 / layers
    return float(np.median(made)) * 1e6, float(np.median(calls)) * 1e6, in_graph


def main() -> None:
    """Measure everything and print the tables."""
    print(f"{device_name()}, torch {torch.__version__}, Hq {HQ}, H {H}, D {D}, blocks of {BLOCK}, shuffled\n")
    print("| decode | " + " | ".join(f"{batch} x {length:,}" for batch, length in DECODE) + " |")
    print("|---" * (len(DECODE) + 1) + "|")
    for name, options in OPTIONS.items():
        cells = []
        for batch, length in DECODE:
            taken, nbytes = decode_time(batch, length, options)
            gc.collect()
            torch.cuda.empty_cache()
            ceiling = read_time(nbytes)
            torch.cuda.empty_cache()
            cells.append(f"{taken:.1f} us, {nbytes / taken / 1e3:,.0f} GB/s, {ceiling / taken:.0%}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for name, options in OPTIONS.items():
        cells = []
        for batch, length in DECODE:
            cells.append(f"{layer_time(batch, length, options):.1f} us")
            gc.collect()
            torch.cuda.empty_cache()
        print(f"| {name}: write and attend | " + " | ".join(cells) + " |", flush=True)
    peers = {
        "torch SDPA, float16, contiguous": sdpa_decode_time,
        "FlashInfer float16": lambda *shape: flashinfer_decode_time(*shape, torch.float16),
        "FlashInfer fp8": lambda *shape: flashinfer_decode_time(*shape, torch.float8_e4m3fn),
    }
    for name, measure in peers.items():
        times = [measure(*shape) for shape in DECODE]
        torch.cuda.empty_cache()
        if None not in times:
            print(f"| {name} | " + " | ".join(f"{taken:.1f} us" for taken in times) + " |", flush=True)
    print(
        f"\nprompt, {NEW:,} new on {CACHED:,}: torch SDPA {sdpa_prefill_time():,.0f} us, ", end="", flush=True
    )
    print(
        ", ".join(f"{name} {prefill_time(options):,.0f} us" for name, options in OPTIONS.items()), flush=True
    )
    made, called, in_graph = step_times()
    print(f"\nstep {made:.0f} us; write + attend of a layer {called:.0f} us, in a graph {in_graph:.1f} us")


if __name__ == "__main__":
    main()
