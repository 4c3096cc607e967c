"""Two checkouts of kvnumba side by side: ``PYTHONPATH=tests python benchmarks/compare.py OTHER_CHECKOUT``.

A process for each checkout holds the same caches; the two take turns, round by round. Prints how many times as fast
this checkout is as the other one, below 1.00 in bold: attention, writing, reading, whole calls of one token, and
compiling all kernels for an empty disk cache. Formats that the other one lacks are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import DECODE, PREFILL
from worker import CALLS

from kvnumba.commands.timing import SETTLE, Timing

HERE = Path(__file__).resolve().parents[1]
WORKER = HERE / "benchmarks" / "worker.py"
ROUNDS = 15
PAUSE = 0.01  # seconds before a turn, in which threads of the other process stop spinning


class Checkout:
    """A process that imports one checkout, and makes and times calls when it is told to."""

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.formats: list[str] = self._answer()

    def make(self, kind: str, fmt: str, spec: tuple) -> None:
        """Prepare a call, in place of the one before."""
        self._ask([kind, fmt, list(spec)])
        self._answer()

    def seconds(self) -> float:
        """How long the call takes; once more before, to warm up."""
        time.sleep(PAUSE)
        self._ask(None)
        return self._answer()

    def _ask(self, question: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a checkout's process has ended; its error is above")
        return json.loads(line)


def compile_seconds(root: Path) -> float:
    """How long all kernels of a model take to compile, in a new process with an empty disk cache."""
    code = "import time, kvnumba as k; t = time.perf_counter(); k.warmup(backend='cpu'); print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(root)}
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return float(result.stdout)


def cell(mine: list[float], other: list[float]) -> str:
    """This checkout's milliseconds, and how many times as fast as the other one that is; bold where it is slower."""
    timing = Timing.of(mine)
    ratio = Timing.of(other).median / timing.median
    text = f"{timing.cell()} ({ratio:.2f}x)"
    return text if ratio >= 1 else f"**{text}**"


def main(other: Path) -> None:
    """Print the tables."""
    checkouts = Checkout(HERE), Checkout(other.resolve())
    formats = [fmt for fmt in checkouts[0].formats if fmt in checkouts[1].formats]
    print(f"milliseconds of {HERE} (times as fast as {other})\n")
    print("| | " + " | ".join(formats) + " |\n" + "|---" * (len(formats) + 1) + "|")
    rows = [
        (name, "attend", spec, 5 if spec[3] > 1 else ROUNDS) for name, spec in {**DECODE, **PREFILL}.items()
    ]
    rows += [(f"{kind} 8192 tokens", kind, (), ROUNDS) for kind in ("write", "read")]
    rows += [(f"{kind}, one token at 64", kind, (), ROUNDS) for kind in CALLS]
    for name, kind, spec, rounds in rows:
        cells = []
        for fmt in formats:
            for checkout in checkouts:
                checkout.make(kind, fmt, spec)
            time.sleep(SETTLE)
            seconds = [[checkout.seconds() for checkout in checkouts] for _ in range(rounds)]
            cells.append(cell([pair[0] for pair in seconds], [pair[1] for pair in seconds]))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    compiled = [[compile_seconds(root) for root in (HERE, other)] for _ in range(3)]
    print("\ncompiling: " + cell([pair[0] for pair in compiled], [pair[1] for pair in compiled]))
