"""kvnumba and its peers side by side: ``PYTHONPATH=tests python benchmarks/compare.py`` prints the README's tables.

The implementations of a problem take turns, round by round, so that a busy neighbour slows them all alike;
times are medians. ``pytest benchmarks`` measures the same calls one after the other.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import bench_attention
import ours
import peers
from shapes import problem

from kvnumba.backends.cpu import ceilings
from kvnumba.formats import FORMATS

ROUNDS = 15
COUNTERPART = {
    "float32": ("vLLM CPU op", "float32"),
    "float16": ("vLLM CPU op", "float16"),
    "bfloat16": ("vLLM CPU op", "bfloat16"),
    "int8": ("vLLM CPU op", "fp8_e4m3"),
    "int4": ("vLLM CPU op", "fp8_e4m3"),
}
"""Whom a format is compared with; fp8 is the smallest that this peer has."""


def medians(calls: dict, rounds: int) -> dict:
    """Seconds of each call, taken in turns."""
    times: dict = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                times[key].append(time.perf_counter() - start)
    return {key: statistics.median(seconds) for key, seconds in times.items()}


def calls_of(spec: tuple) -> dict[tuple[str, str], Callable[[], object]]:
    """Every implementation of a problem that can be run here."""
    p = problem(*spec)
    calls: dict = {("kvnumba", fmt): ours.paged(p, fmt, "cpu")[2] for fmt in FORMATS}
    for name, fmt in bench_attention.THEIRS:
        try:
            if peers.unavailable(name) is None:
                calls[name, fmt] = peers.PEERS[name][0](p, fmt)
        except (NotImplementedError, RuntimeError) as error:
            print(f"{name}, {fmt}: {error}", file=sys.stderr)
    return calls


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def table(problems: dict[str, tuple], rounds: int) -> str:
    """Markdown: a row for each problem, milliseconds, and how many times as fast as its counterpart."""
    lines = []
    for name, spec in problems.items():
        times = medians(calls_of(spec), rounds)
        cells = []
        for fmt in FORMATS:
            cell = milliseconds(times["kvnumba", fmt])
            if COUNTERPART[fmt] in times:
                cell += f" ({times[COUNTERPART[fmt]] / times['kvnumba', fmt]:.2f}x)"
            cells.append(cell)
        for peer in (("torch SDPA", "float32"), ("transformers QuantizedCache", "4 bits")):
            cells.append(milliseconds(times[peer]) if peer in times else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    head = "| | " + " | ".join([*FORMATS, "torch SDPA float32", "transformers QuantizedCache, 4 bits"]) + " |"
    return "\n".join([head, "|---" * (len(FORMATS) + 3) + "|", *lines])


if __name__ == "__main__":
    (read, num_bytes), (compute, operations) = ceilings.reading(), ceilings.computing()
    best = medians({"read": read, "compute": compute}, 5)
    print(
        f"read {num_bytes / best['read'] / 1e9:.1f} GB/s, {operations / best['compute'] / 1e9:.0f} GFLOP/s\n"
    )
    print(table(bench_attention.DECODE, ROUNDS), "\n")
    print(table(bench_attention.PREFILL, 3))
