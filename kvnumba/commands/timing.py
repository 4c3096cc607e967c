"""How long calls take: one helper for the bench command and for all benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

BUSY = 1.5
"""Repeats of one figure that differ by more than this factor say that something else used the machine."""

SETTLE = 0.3
"""Seconds to wait between work of different libraries: threads of a matrix product go on spinning for a while."""

Key = TypeVar("Key")


class Timing(NamedTuple):
    """Seconds that the repeats of one call took."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The summary of some repeats."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))

    @property
    def spread(self) -> float:
        """How many times as long as the fastest repeat the slowest one took."""
        return self.slowest / self.fastest

    @property
    def disturbed(self) -> bool:
        """Whether the repeats differ too much for the median to be trusted."""
        return self.spread > BUSY

    def cell(self) -> str:
        """The median in milliseconds for a table, with a star where it is disturbed."""
        milliseconds = 1e3 * self.median
        digits = ".3g" if milliseconds < 1000 else ",.0f"
        return f"{milliseconds:{digits}}{'*' if self.disturbed else ''}"

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3g} ms (between {1e3 * self.fastest:.3g} and {1e3 * self.slowest:.3g})"


def in_turns(
    calls: Mapping[Key, Callable[[], Any]], rounds: int, before: Callable[[Key], Any] | None = None
) -> dict[Key, Timing]:
    """Time several calls side by side: round by round, so that a busy neighbour slows them all alike.

    Parameters
    ----------
    calls : mapping of name -> call without arguments
    rounds : int
        Repeats of each call, after one more that compiles and warms up.
    before : callable, optional
        ``before(name)`` prepares each repeat; it is not timed.

    Returns
    -------
    dict of name -> Timing
    """
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            if before is not None:
                before(name)
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(repeats) for name, repeats in seconds.items()}


def repeated(call: Callable[[], Any], rounds: int = 9) -> Timing:
    """Time one call, after one repeat that compiles and warms up."""
    return in_turns({"": call}, rounds)[""]
