"""Decoding with and without attention mass, in turns.

``PYTHONPATH=tests python benchmarks/bench_mass.py`` prints the table of README.md. What is returned is compared with
the masses that the oracle finds, and the other results with those of a call without mass, before it is timed.
"""

from __future__ import annotations

import numpy as np
import ours
from shapes import problem

from kvnumba.backends import cpu
from kvnumba.commands.timing import in_turns

PROBLEMS = {
    "decode, 32,768 tokens": ("llama-3-8b", 1, 32768, 1, 128),
    "decode, 16 x 4,096 tokens": ("llama-3-8b", 16, 4096, 1, 128),
}
FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")
ROUNDS = 101


def measure(name: str, fmt: str) -> None:
    """A row of the table: milliseconds, and how many times as long mass takes, of medians and of fastest calls."""
    p = problem(*PROBLEMS[name])
    step = ours.paged(p, fmt, "cpu").step
    q = p.q.reshape(-1, *p.q.shape[2:])
    out, masses = step.attend(q, return_mass=True)
    np.testing.assert_allclose(out, step.attend(q), rtol=1e-3, atol=1e-3)
    k, _ = step.get_kv()[0]
    _, lse = step.attend(q, return_lse=True)
    scores = np.einsum("hgd,htd->hgt", q[0].reshape(len(k), -1, q.shape[-1]), k, dtype=np.float64)
    want = np.exp(scores / q.shape[-1] ** 0.5 - lse[0].reshape(len(k), -1, 1)).sum(axis=1)
    np.testing.assert_allclose(masses[0], want, rtol=1e-4, atol=1e-4)
    times = in_turns(
        {"without": lambda: step.attend(q), "with": lambda: step.attend(q, return_mass=True)}, ROUNDS
    )
    ratios = [getattr(times["with"], of) / getattr(times["without"], of) for of in ("median", "fastest")]
    cells = [times[key].cell() for key in times] + [f"{ratio:.3f}" for ratio in ratios]
    print(f"| {name} | {fmt} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    for name, value in cpu.describe():
        print(f"{name}: {value}")
    for name in PROBLEMS:
        for fmt in FORMATS:
            measure(name, fmt)
