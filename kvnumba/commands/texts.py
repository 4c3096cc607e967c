"""What commands give a byte-level model to read."""

from __future__ import annotations

import statistics
import string
from pathlib import Path

import numpy as np

HELD_OUT = Path(statistics.__file__)
"""A file that the bundled model was not trained on."""
NUM_NAMES = 100


def registry_task(rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """A text that the bundled model was trained to continue: names with numbers, then the same names again.

    Returns
    -------
    text : bytes
    answers : (NUM_NAMES, 4) int
        Where each repeated number's digits stand.
    """
    letters = np.array(list(string.ascii_lowercase + string.digits))
    names: list[str] = []
    while len(names) < NUM_NAMES:
        name = "".join(rng.choice(letters, 4))
        names += [name] if name not in names else []
    lines = [f"{name} = {rng.integers(10_000):04d}\n" for name in names]
    head = "# registry\n" + "".join(lines) + "# lookup\n"
    asked = rng.permutation(NUM_NAMES)
    text = "\0" + head + "".join(lines[i] for i in asked)
    first_digit = len(head) + 1 + len("name = ")
    answers = first_digit + len(lines[0]) * np.arange(NUM_NAMES)[:, None] + np.arange(4)
    return text.encode(), answers


def lookups_right(likeliest: np.ndarray, text: bytes, answers: np.ndarray) -> float:
    """The share of a `registry_task` whose four digits are right; `likeliest` (len(text),) follow each byte."""
    right = likeliest[answers - 1] == np.frombuffer(text, np.uint8)[answers]
    return float(right.all(axis=1).mean())
