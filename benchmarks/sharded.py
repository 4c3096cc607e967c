"""A cache on several workers: what it costs on this machine, and what it would do on many.

``python benchmarks/sharded.py`` prints the tables; with ``--write`` it puts them into README.md, between the marks
there, and draws ``sharded.svg``. Measured are one layer of Llama 3 8B, in one process with two threads and on two
workers with a thread each; the time in which Ray answers 1 to 4 workers; and how fast the process reads. From these
the time of a token on more machines is computed, each of which is taken to be like this one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import kvnumba
from kvnumba.backends import cpu
from kvnumba.commands.shapes import SHAPES
from kvnumba.commands.timing import SETTLE, Timing
from kvnumba.integrations.ray import ShardedKVCache, Workers
from kvnumba.storage import Layout

LAYERS, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = SHAPES["llama-3-8b"]
BLOCK_SIZE, CHUNK = 16, 4096
LENGTHS = {4096: (7, 40), 131_072: (4, 5)}
"""Tokens -> rounds, and calls of each cache in a round."""
MADE = 4
FORMATS = ("float32", "float16", "int8", "int4")
WORKERS = (1, 2, 3, 4)
SIMULATED_BLOCK = 128  # tokens
SIMULATED = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = {"128 k": 1 << 17, "1 M": 1 << 20, "10 M": 10 << 20}
MEASURED = 2  # layers, so that what is done once for all layers counts as in a model of many
LATENCY, BANDWIDTH = 50e-6, 1.25e9  # of a network: seconds for a message there and back, bytes a second
MARKS = ("<!-- sharded.py -->", "<!-- end of sharded.py -->")
HERE = Path(__file__).parent


def filled(cache: kvnumba.PagedKVCache, length: int) -> int:
    """A sequence with so many random tokens."""
    rng = np.random.default_rng(0)
    seq_id = cache.add_sequence()
    for first in range(0, length, CHUNK):
        step = cache.step([seq_id], [min(CHUNK, length - first)])
        x = rng.standard_normal((step.num_tokens, NUM_KV_HEADS, HEAD_DIM), dtype=np.float32)
        for layer in range(MEASURED):
            step.write(x, x, layer=layer)
    return seq_id


def token(cache: kvnumba.PagedKVCache, length: int) -> Callable[[], None]:
    """A call that appends a token to a sequence of this length and attends, in all layers, and takes it back."""
    seq_id = filled(cache, length)
    q, k = (np.ones((1, heads, HEAD_DIM), np.float32) for heads in (NUM_QO_HEADS, NUM_KV_HEADS))

    def call() -> None:
        step = cache.step([seq_id], [1])
        for layer in range(MEASURED):
            step.write(k, k, layer=layer)
            step.attend(q, layer=layer)
        cache.truncate(seq_id, length)

    return call


def compared(length: int, layout: Layout, workers: Workers) -> dict[str, Timing]:
    """Seconds a layer, in one process and on workers.

    Each is called some times in every round, after a pause in which the other's threads fall asleep. Caches are made
    several times: where the system puts their pages decides about a third of the time.
    """
    rounds, repeats = LENGTHS[length]
    seconds: dict[str, list[float]] = {"one": [], "sharded": []}
    for _ in range(MADE):
        caches = (
            kvnumba.PagedKVCache.from_layout(layout, 1, backend="cpu"),
            ShardedKVCache.from_layout(layout, 1, workers=workers),
        )
        calls = [token(cache, length) for cache in caches]
        for call in calls:
            for _ in range(60 if length < CHUNK + 1 else 2):  # until kernels are compiled, and channels made
                call()
        for _ in range(rounds):
            for call, found in zip(calls, seconds.values(), strict=True):
                time.sleep(SETTLE)
                call()
                for _ in range(repeats):
                    begin = time.perf_counter()
                    call()
                    found.append((time.perf_counter() - begin) / MEASURED)
    return {name: Timing.of(found) for name, found in seconds.items()}


def overhead(workers: Workers) -> tuple[list[list[str]], dict[str, float]]:
    """Rows of the table of costs, and the bytes a second that one process reads in each format."""
    rows, rates = [], {}
    for length in LENGTHS:
        for fmt in FORMATS:
            layout = Layout.of(
                length // BLOCK_SIZE + 1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, fmt, num_layers=MEASURED
            )
            times = compared(length, layout, workers)
            one, sharded = times["one"].median, times["sharded"].median
            rates[fmt] = length * layout.bytes_per_token() / MEASURED / one  # the longest counts
            rows.append(
                [
                    f"{length:,}", fmt, times["one"].cell(), times["sharded"].cell(), f"{sharded / one:.2f}x",
                    f"{1e3 * (sharded - one):+.2f}",
                ]
            )  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    return rows, rates


def round_trips() -> dict[tuple[str, int], float]:
    """Seconds in which so many workers answer a query with an output of its size, by calls and by channels."""
    found = {}
    q = np.ones((1, NUM_QO_HEADS, HEAD_DIM), np.float32)
    for count in WORKERS:
        with Workers(count, backend="numpy") as workers:
            everyone = {n: [("echo", q)] for n in range(count)}

            def ask(workers: Workers = workers, everyone: dict[int, Any] = everyone) -> float:
                begin = time.perf_counter()
                workers.call(everyone)
                return time.perf_counter() - begin

            ask()
            begin = time.process_time()
            found["calls", count] = float(np.median([ask() for _ in range(80)]))
            found["work", count] = (time.process_time() - begin) / 80 / count
            for _ in range(40):
                ask()
            found["channels", count] = float(np.median([ask() for _ in range(400)]))
            print(
                count, {way: f"{1e3 * found[way, count]:.2f} ms" for way in ("calls", "channels")}, flush=True
            )
    return found


def seconds_a_token(tokens: int, workers: int, fmt: str, rate: float, trip: float, work: float) -> float:
    """All layers of Llama 3 8B; a round trip takes so long, and each message so much of the driver's time."""
    num_bytes = tokens * Layout.of(1, 1, NUM_KV_HEADS, HEAD_DIM, fmt).bytes_per_token()
    reading = num_bytes / (workers * rate)
    if workers == 1:
        return LAYERS * reading
    travels = 4 * NUM_QO_HEADS * HEAD_DIM * 2 * workers  # a query there, an output back
    table = 4 * tokens / SIMULATED_BLOCK * workers  # to every worker, once a token
    network = LATENCY + travels / BANDWIDTH
    return LAYERS * (reading + trip + workers * work + network) + table / BANDWIDTH


def simulation(rates: dict[str, float], trip: float, work: float) -> tuple[list[list[str]], Figure]:
    """Rows of the table, and the plot: milliseconds a token."""
    rows = []
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, fmt in zip(figure.subplots(1, 2, sharey=True), ("float16", "int4"), strict=True):
        for name, tokens in TOKENS.items():
            found = [1e3 * seconds_a_token(tokens, n, fmt, rates[fmt], trip, work) for n in SIMULATED]
            best = int(np.argmin(found))
            cells = [f"{ms:,.0f}" for ms in found]
            cells[best] = f"**{cells[best]}**"
            rows.append([name, fmt, *cells])
            axes.plot(SIMULATED, found, "o-", label=f"{name} tokens")
        axes.set(xscale="log", yscale="log", xlabel="machines", title=fmt, xticks=SIMULATED)
        axes.set_xticks(SIMULATED, [str(n) for n in SIMULATED])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms a token")
    figure.axes[0].legend()
    return rows, figure


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Measure, print, and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md and sharded.svg")
    write = parser.parse_args().write
    with Workers(2, backend="cpu") as workers:
        costs, rates = overhead(workers)
    trips = round_trips()
    rows, figure = simulation(rates, trips["calls", 1], trips["work", 2])
    machine = ", ".join(f"{name}: {value}" for name, value in cpu.describe()[:3])
    text = f"""
({machine}.)

{table(["tokens", "format", "one process, ms a layer", "two workers", "ratio", "difference, ms"], costs)}

{
        table(
            ["workers", *map(str, WORKERS)],
            [
                [f"a round trip by {way}, ms", *(f"{1e3 * trips[way, n]:.2f}" for n in WORKERS)]
                for way in ("calls", "channels")
            ],
        )
    }

Between machines there are no channels: the simulation counts {
        1e3 * trips["calls", 1]:.2f} ms for a round trip, and
{1e3 * trips["work", 2]:.2f} ms of the driver's time for each machine's message. One machine reads {
        ", ".join(f"{rates[fmt] / 1e9:.1f} GB/s in {fmt}" for fmt in FORMATS)
    }.

Simulated, ms a token of all {LAYERS} layers of Llama 3 8B; the best number of machines is bold:

{table(["tokens", "format", *(f"{n} machines" if n > 1 else "1 machine" for n in SIMULATED)], rows)}
"""
    print(text)
    if write:
        figure.savefig(HERE / "sharded.svg")
        readme = HERE / "README.md"
        before, rest = readme.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
