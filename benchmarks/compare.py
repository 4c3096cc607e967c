"""kvnumba and its peers side by side: ``PYTHONPATH=tests python benchmarks/compare.py`` prints the tables of README.md.

The implementations of a problem take turns, round by round, so that a busy neighbour slows them all alike. Times are
medians; a star marks those whose repeats differ by more than 1.5 times. ``pytest benchmarks`` measures the same calls
one after the other. With a folder, another checkout of kvnumba takes the place of the peers: see `checkouts`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import bench_attention
import checkouts
import ours
import peers
from shapes import DECODE, PREFILL, problem

from kvnumba.backends.cpu import ceilings
from kvnumba.commands.timing import in_turns
from kvnumba.formats import FORMATS

ROUNDS = 15
COUNTERPART = {
    "float32": ("vLLM CPU op", "float32"),
    "float16": ("vLLM CPU op", "float16"),
    "bfloat16": ("vLLM CPU op", "bfloat16"),
    "fp8_e4m3": ("vLLM CPU op", "fp8_e4m3"),
    "int8": ("vLLM CPU op", "fp8_e4m3"),
    "int4": ("vLLM CPU op", "fp8_e4m3"),
}
"""Whom a format is compared with; fp8 is the smallest that this peer has."""


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


def table(problems: dict[str, tuple], rounds: int) -> str:
    """Markdown: a row for each problem, milliseconds, and how many times as fast as its counterpart."""
    lines = []
    for name, spec in problems.items():
        times = in_turns(calls_of(spec), rounds)
        cells = []
        for fmt in FORMATS:
            ours = times["kvnumba", fmt]
            cell = ours.cell()
            if COUNTERPART[fmt] in times:
                cell += f" ({times[COUNTERPART[fmt]].median / ours.median:.2f}x)"
            cells.append(cell)
        for peer in (("torch SDPA", "float32"), ("transformers QuantizedCache", "4 bits")):
            cells.append(times[peer].cell() if peer in times else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    head = "| | " + " | ".join([*FORMATS, "torch SDPA float32", "transformers QuantizedCache, 4 bits"]) + " |"
    return "\n".join([head, "|---" * (len(FORMATS) + 3) + "|", *lines])


def ceilings_of_the_machine() -> str:
    """What it reads from memory and computes at most."""
    (read, num_bytes), (compute, operations) = ceilings.reading(), ceilings.computing()
    best = in_turns({"read": read, "compute": compute}, 5)
    return (
        f"read {num_bytes / best['read'].median / 1e9:.1f} GB/s, "
        f"{operations / best['compute'].median / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        checkouts.main(Path(sys.argv[1]))
    else:
        print(f"{ceilings_of_the_machine()}\n")
        print(table(DECODE, ROUNDS), "\n")
        print(table(PREFILL, 3))
