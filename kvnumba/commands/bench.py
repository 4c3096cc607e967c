"""``python -m kvnumba bench``: how fast this machine attends, in a minute."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvnumba.backends.registry import get_backend
from kvnumba.caches.paged import PagedKVCache
from kvnumba.commands.extras import require_extra
from kvnumba.commands.shapes import SHAPES
from kvnumba.commands.timing import BUSY, Timing, repeated
from kvnumba.formats import FORMATS, REGISTERED

CONTEXTS = (1024, 8192, 32768)
MODEL, BLOCK_SIZE = "llama-3-8b", 128
SHAPE = SHAPES[MODEL]
OURS_COLOR, PEER_COLOR, LIMIT_COLOR = "#4878a8", "#b0b0b0", "#c03028"


def run(backend: str | None, plot: Path | None) -> None:
    """Print the time of one layer's decode step by format and context, and perhaps draw it."""
    if plot is not None:
        require_extra("bench", "bench", "matplotlib")
    name = get_backend(backend).name
    processor = processor_name(name)
    print(
        f"{processor}, backend {name}: attention of one new token in one layer of {MODEL} "
        f"({SHAPE.num_qo_heads} query heads, {SHAPE.num_kv_heads} KV heads of {SHAPE.head_dim}), shuffled blocks of "
        f"{BLOCK_SIZE}; milliseconds (GB/s of what is stored)"
    )
    header = f"{'':<18}" + "".join(f"{f'{length:,} tokens':>20}" for length in CONTEXTS)
    print(f"\n{header}\n{'-' * len(header)}")
    times: dict[str, list[Timing]] = {}
    sizes: dict[str, float] = {}  # bytes that a cached token takes
    for fmt in (*FORMATS, *REGISTERED):
        times[fmt] = []
        for length in CONTEXTS:
            cache, call = decode_step(length, fmt, name)
            times[fmt].append(repeated(call))
            sizes[fmt] = cache.bytes_per_token()
        print_row(fmt, times[fmt], sizes[fmt])
    peers = torch_peers()
    for peer, (make, size) in peers.items():
        times[peer], sizes[peer] = [repeated(make(length)) for length in CONTEXTS], size
        print_row(peer, times[peer], size)
    if not peers:
        print("torch SDPA: torch is not installed")
    print_disturbed(times)
    read_rate = None
    if name == "cpu":
        read_rate = print_ceilings()
    if plot is not None:
        draw(times, sizes, read_rate, processor, plot)
        print(f"drawn in {plot}")


def print_row(name: str, timings: list[Timing], size: float) -> None:
    """One line of the table."""
    cells = [
        f"{1e3 * timing.median:.2f} ({length * size / timing.median / 1e9:.1f}){'*' if timing.disturbed else ' '}"
        for length, timing in zip(CONTEXTS, timings, strict=True)
    ]
    print(f"{name:<18}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def print_disturbed(times: dict[str, list[Timing]]) -> None:
    """Say so if repeats of one figure differ too much, with the worst of them."""
    found = [
        (timing.spread, name, length, timing)
        for name, timings in times.items()
        for length, timing in zip(CONTEXTS, timings, strict=True)
        if timing.disturbed
    ]
    if found:
        spread, name, length, timing = max(found)
        print(
            f"\n* busy machine: repeats differ by more than {BUSY} times in {len(found)} of "
            f"{len(times) * len(CONTEXTS)} figures, at most by {spread:.1f} times:\n"
            f"  the worst, {name} at {length:,} tokens, took {timing}"
        )


def decode_step(length: int, fmt: str, backend: str) -> tuple[PagedKVCache, Callable[[], Any]]:
    """A cache with a sequence in shuffled blocks, and attention of its newest token."""
    rng = np.random.default_rng(0)
    blocks = length // BLOCK_SIZE
    cache = PagedKVCache(blocks, BLOCK_SIZE, SHAPE.num_kv_heads, SHAPE.head_dim, blocks, fmt, backend=backend)
    shuffle(cache)
    seq_id = cache.add_sequence()
    x = rng.standard_normal((SHAPE.num_kv_heads, 1024, SHAPE.head_dim), dtype=np.float32)
    for start in range(0, length - 1, 1024):
        part = x[:, : min(1024, length - 1 - start)]
        cache.update(seq_id, part, part)
    step = cache.step([seq_id], [1])
    step.write(x[None, :, 0], x[None, :, 0])
    q = rng.standard_normal((1, SHAPE.num_qo_heads, SHAPE.head_dim), dtype=np.float32)
    return cache, lambda: step.attend(q)


def shuffle(cache: PagedKVCache) -> None:
    """Put the free blocks of a cache in a random order."""
    np.random.default_rng(1).shuffle(cache._pool.allocator.free_blocks)


def torch_peers() -> dict[str, tuple[Callable[[int], Callable[[], Any]], float]]:
    """torch's attention over contiguous float32 and bfloat16, and its bytes of a token, where torch is installed."""
    try:
        import torch
    except ImportError:
        return {}

    def make(length: int, dtype: Any) -> Callable[[], Any]:
        k, v = (torch.randn(1, SHAPE.num_kv_heads, length, SHAPE.head_dim).to(dtype) for _ in range(2))
        q = torch.randn(1, SHAPE.num_qo_heads, 1, SHAPE.head_dim).to(dtype)
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return {
        f"torch {name}": (
            lambda length, dtype=dtype: make(length, dtype),  # type: ignore[misc]
            2 * SHAPE.num_kv_heads * SHAPE.head_dim * dtype.itemsize,
        )
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }


def print_ceilings() -> float:
    """Print what the processor reads and computes at most; returns the bytes that it reads in a second."""
    from kvnumba.backends.cpu import ceilings

    (read, num_bytes), (compute, operations) = ceilings.reading(), ceilings.computing()
    read_rate = num_bytes / repeated(read).median
    print(
        f"\nthis machine reads {read_rate / 1e9:.1f} GB/s from memory and computes "
        f"{operations / repeated(compute).median / 1e9:.0f} GFLOP/s in float32"
    )
    return read_rate


def processor_name(backend: str) -> str:
    """The name of the GPU or processor that a backend computes on."""
    if backend == "cuda":
        return str(dict(importlib.import_module("kvnumba.backends.cuda").describe())["device"])
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), "") or platform.processor() or platform.machine()


def draw(
    times: dict[str, list[Timing]],
    sizes: dict[str, float],
    read_rate: float | None,
    processor: str,
    path: Path,
) -> None:
    """The table as bars, a panel for each context; a line across each bar is the time that its bytes take to read."""
    from matplotlib.figure import Figure

    names = list(times)
    figure = Figure(figsize=(12, 1.9 + 0.36 * len(names)), layout="constrained")
    figure.suptitle(
        f"Attention of one new token in one layer of {MODEL}, on {processor}\n"
        f"{SHAPE.num_qo_heads} query heads, {SHAPE.num_kv_heads} KV heads of {SHAPE.head_dim}, blocks of {BLOCK_SIZE}",
        fontsize=12,
    )
    panels = figure.subplots(1, len(CONTEXTS), sharey=True)
    cut = False
    for column, (axes, length) in enumerate(zip(panels, CONTEXTS, strict=True)):
        milliseconds = [1e3 * times[name][column].median for name in names]
        # a peer that is many times slower would leave no room for the rest: its bar is cut
        longest = 1.3 * max(
            ms for name, ms in zip(names, milliseconds, strict=True) if name in FORMATS | REGISTERED
        )
        cut = cut or max(milliseconds) > longest
        colors = [OURS_COLOR if name in FORMATS | REGISTERED else PEER_COLOR for name in names]
        bars = axes.barh(names, [min(ms, longest) for ms in milliseconds], color=colors, height=0.62)
        labels = [
            f"{'// ' if ms > longest else ''}{ms:.3g} ms{' *' if times[name][column].disturbed else ''}"
            for name, ms in zip(names, milliseconds, strict=True)
        ]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.set_title(f"{length:,} cached tokens", fontsize=11)
        axes.set_xlim(0, 1.35 * longest)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.tick_params(left=False)
        if read_rate is not None:
            for row, name in enumerate(names):
                limit = 1e3 * length * sizes[name] / read_rate
                axes.plot([limit, limit], [row - 0.42, row + 0.42], color=LIMIT_COLOR, linewidth=2)
    panels[0].invert_yaxis()
    notes = []
    if read_rate is not None:
        notes.append(
            f"red line: this machine's limit, the bytes of the cached tokens at the {read_rate / 1e9:.0f} GB/s that "
            "it reads from memory; what fits its caches can be faster"
        )
    if cut:
        notes.append("// the bar is cut: it would be longer")
    if any(timing.disturbed for timings in times.values() for timing in timings):
        notes.append(f"* busy machine: repeats differ by more than {BUSY} times")
    figure.supxlabel("\n".join(notes), fontsize=9, color=LIMIT_COLOR)
    figure.savefig(path, dpi=130)
