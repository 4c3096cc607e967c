"""``python -m kvnumba bench``: how fast this machine attends, in a minute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvnumba.backends.registry import get_backend
from kvnumba.caches.paged import PagedKVCache
from kvnumba.commands.memory import PRESETS
from kvnumba.formats import FORMATS

CONTEXTS = (1024, 8192, 32768)
NUM_QO_HEADS, PRESET, BLOCK_SIZE = 32, "llama-3-8b", 128


def run(backend: str | None, plot: Path | None) -> None:
    """Print the time of one layer's decode step by format and context, and perhaps draw it."""
    name = get_backend(backend).name
    shape = PRESETS[PRESET]
    print(
        f"one layer of {PRESET} ({NUM_QO_HEADS} query heads, {shape.num_kv_heads} KV heads of {shape.head_dim}), "
        f"one new token, shuffled blocks of {BLOCK_SIZE}, backend {name}; milliseconds (GB/s of what is stored)"
    )
    peers = torch_peers()
    header = f"{'':<18}" + "".join(f"{f'{length:,} tokens':>20}" for length in CONTEXTS)
    print(f"\n{header}\n{'-' * len(header)}")
    times: dict[str, list[float]] = {}
    for fmt in FORMATS:
        cells = []
        for length in CONTEXTS:
            cache, call = decode_step(length, fmt, name)
            times.setdefault(fmt, []).append(median(call))
            rate = length * cache.bytes_per_token() / times[fmt][-1] / 1e9
            cells.append(f"{f'{1e3 * times[fmt][-1]:.2f} ({rate:.1f})':>20}")
        print(f"{fmt:<18}" + "".join(cells), flush=True)
    for peer, make in peers.items():
        times[peer] = [median(make(length)) for length in CONTEXTS]
        print(f"{peer:<18}" + "".join(f"{1e3 * seconds:>20.2f}" for seconds in times[peer]), flush=True)
    if not peers:
        print("torch SDPA: torch is not installed")
    if name == "cpu":
        print(f"\n{ceilings()}")
    if plot is not None:
        draw(times, plot)
        print(f"drawn in {plot}")


def decode_step(length: int, fmt: str, backend: str) -> tuple[PagedKVCache, Callable[[], Any]]:
    """A cache with a sequence in shuffled blocks, and attention of its newest token."""
    shape, rng = PRESETS[PRESET], np.random.default_rng(0)
    blocks = length // BLOCK_SIZE
    cache = PagedKVCache(blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim, blocks, fmt, backend=backend)
    shuffle(cache)
    seq_id = cache.add_sequence()
    x = rng.standard_normal((shape.num_kv_heads, 1024, shape.head_dim), dtype=np.float32)
    for start in range(0, length - 1, 1024):
        part = x[:, : min(1024, length - 1 - start)]
        cache.update(seq_id, part, part)
    step = cache.step([seq_id], [1])
    step.write(x[None, :, 0], x[None, :, 0])
    q = rng.standard_normal((1, NUM_QO_HEADS, shape.head_dim), dtype=np.float32)
    return cache, lambda: step.attend(q)


def shuffle(cache: PagedKVCache) -> None:
    """Leave the free blocks of an empty cache, whose sequences may be as many, in a random order."""
    ids = [cache.add_sequence() for _ in range(cache.num_blocks)]
    cache.step(ids, [cache.block_size] * len(ids))
    for i in np.random.default_rng(1).permutation(len(ids)):
        cache.finish_sequence(ids[i])


def torch_peers() -> dict[str, Callable[[int], Callable[[], Any]]]:
    """torch's attention over contiguous float32 and bfloat16, where torch is installed."""
    try:
        import torch
    except ImportError:
        return {}
    shape = PRESETS[PRESET]

    def make(length: int, dtype: Any) -> Callable[[], Any]:
        k, v = (torch.randn(1, shape.num_kv_heads, length, shape.head_dim).to(dtype) for _ in range(2))
        q = torch.randn(1, NUM_QO_HEADS, 1, shape.head_dim).to(dtype)
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return {
        f"torch {name}": lambda length, dtype=dtype: make(length, dtype)  # type: ignore[misc]
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }


def ceilings() -> str:
    """What the processor reads and computes at most."""
    from kvnumba.backends.cpu import ceilings

    (read, num_bytes), (compute, operations) = ceilings.reading(), ceilings.computing()
    return (
        f"this machine reads {num_bytes / median(read) / 1e9:.1f} GB/s from memory and computes "
        f"{operations / median(compute) / 1e9:.0f} GFLOP/s in float32"
    )


def median(call: Callable[[], Any], rounds: int = 9) -> float:
    """Seconds of a call, after one that compiles."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def draw(times: dict[str, list[float]], path: Path) -> None:
    """The table as lines, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, seconds in times.items():
        axes.loglog(CONTEXTS, [1e3 * s for s in seconds], "o-", label=name)
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("milliseconds a layer and token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
