"""kvnumba and its peers side by side: ``PYTHONPATH=tests python benchmarks/compare.py`` prints the tables of README.md.

Decoding is measured in two states of the processor's caches, and prompts, which compute more than they read, in a
third way; see `TABLES`. Times are medians; a star marks those whose repeats differ by more than 1.5 times.
``pytest benchmarks`` measures the same calls one after the other. With a folder, another checkout of kvnumba takes the
place of the peers: see `checkouts`.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import bench_attention
import checkouts
import numpy as np
import ours
import peers
from shapes import DECODE, PREFILL, problem

from kvnumba.backends import cpu
from kvnumba.backends.cpu import ceilings
from kvnumba.commands.timing import SETTLE, Timing, in_turns, repeated
from kvnumba.formats import FORMATS

Calls = dict[tuple[str, str], Callable[[], object]]
Times = dict[tuple[str, str], Timing]

ROUNDS = 15
SWEPT_BYTES = 1 << 29

RIVALS = ("vLLM CPU op", "vLLM CPU op, AMX")
"""With whom kvnumba is compared: with the faster of those that can be run."""
RIVAL_FORMAT = {**{fmt: fmt for fmt in FORMATS}, "int8": "fp8_e4m3", "int4": "fp8_e4m3"}
"""Our format -> theirs; fp8 is the smallest that they have."""
OTHERS = (("torch SDPA", "float32"), ("transformers QuantizedCache", "4 bits"))


def looped(calls: Calls) -> Times:
    """Each implementation in a loop of its own: what the processor's caches have room for is there already."""
    times = {}
    for name, call in calls.items():
        time.sleep(SETTLE)
        times[name] = repeated(call, ROUNDS)
    return times


def swept(calls: Calls) -> Times:
    """In turns, and before each call something else is read that is larger than the caches.

    One thread of NumPy reads it: no implementation finds its own threads awake.
    """
    return in_turns(calls, ROUNDS, before=lambda _: _something_else().max())


def turns(calls: Calls) -> Times:
    """In turns, round by round, so that a busy neighbour slows all alike."""
    return in_turns(calls, 3)


TABLES: list[tuple[dict[str, tuple], dict[str, Callable[[Calls], Times]]]] = [
    (DECODE, {"decoding, each in its own loop": looped, "decoding, swept": swept}),
    (PREFILL, {"prompts, in turns": turns}),
]
"""Problems, and a title for each way in which their calls are timed."""


@functools.cache
def _something_else() -> np.ndarray:
    return np.ones(SWEPT_BYTES // 4, np.float32)


def calls_of(spec: tuple) -> tuple[Calls, list[str]]:
    """Every implementation of a problem that can be run here, and which kernels kvnumba takes for each format."""
    p = problem(*spec)
    calls: Calls = {}
    kernels = []
    for fmt in FORMATS:
        paged = ours.paged(p, fmt, "cpu")
        calls["kvnumba", fmt] = paged.attend
        kernels.append(ours.kernels(p, fmt, paged.step))
    for name, fmt in bench_attention.THEIRS:
        try:
            if peers.unavailable(name) is None:
                calls[name, fmt] = peers.PEERS[name][0](p, fmt)
        except (NotImplementedError, RuntimeError) as error:
            print(f"{name}, {fmt}: {error}", file=sys.stderr)
    return calls, kernels


def cells(times: Times) -> list[str]:
    """Milliseconds, and how many times as fast as the fastest rival."""
    found = []
    for fmt in FORMATS:
        mine = times["kvnumba", fmt]
        theirs = [
            times[name, RIVAL_FORMAT[fmt]].median for name in RIVALS if (name, RIVAL_FORMAT[fmt]) in times
        ]
        found.append(mine.cell() + (f" ({min(theirs) / mine.median:.2f}x)" if theirs else ""))
    return found + [times[other].cell() if other in times else "-" for other in OTHERS]


def table(title: str, columns: Sequence[str], rows: dict[str, list[str]]) -> str:
    """Markdown."""
    head = f"**{title}**\n\n| | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|"
    return "\n".join([head, *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items())]) + "\n"


def compare() -> None:
    """Print the tables."""
    for name, value in (*cpu.describe(), ("at most", ceilings_of_the_machine())):
        print(f"{name}: {value}")
    for name in peers.PEERS:
        reason = peers.unavailable(name)
        if reason:
            print(f"left out: {name}: {reason}")
    print()
    columns = [*FORMATS, "torch SDPA float32", "transformers QuantizedCache, 4 bits"]
    kernels: dict[str, list[str]] = {}
    for problems, ways in TABLES:
        rows: dict[str, dict[str, list[str]]] = {title: {} for title in ways}
        for name, spec in problems.items():
            calls, kernels[name] = calls_of(spec)
            for title, way in ways.items():
                rows[title][name] = cells(way(calls))
                print(f"{title}: {name}: {' | '.join(rows[title][name])}", file=sys.stderr, flush=True)
        for title in ways:
            print(table(title, columns, rows[title]), flush=True)
    print(table("kvnumba's kernels", list(FORMATS), kernels))


def ceilings_of_the_machine() -> str:
    """What it reads from memory and computes at most."""
    (read, num_bytes), (compute, operations) = ceilings.reading(), ceilings.computing()
    best = in_turns({"read": read, "compute": compute}, 5)
    found = (
        f"read {num_bytes / best['read'].median / 1e9:.1f} GB/s, "
        f"{operations / best['compute'].median / 1e9:.0f} GFLOP/s"
    )
    tiles = ceilings.computing_on_tiles()
    if tiles is None:
        return found
    multiply, operations = tiles
    seconds = in_turns({"tiles": multiply}, 5)["tiles"].median
    return f"{found}, on tiles {operations / seconds / 1e9:.0f} GFLOP/s"


if __name__ == "__main__":
    if sys.argv[1:]:
        checkouts.main(Path(sys.argv[1]))
    else:
        compare()
