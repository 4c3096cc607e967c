"""Where the tokens stand of a sequence that has dropped some. Integers only.

What stays of such a sequence is moved together: it lies in slots 0, 1, ... of its blocks, and ``kept`` (n + 1,) int64
are the positions of these n tokens, and of the one after them. Later tokens follow that one, in slots and in positions
alike. Of a sequence that has dropped none, slots and positions are the same, and ``kept`` is None.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Kept = np.ndarray | None


def positions_at(kept: Kept, slots: Any) -> Any:
    """The positions of the tokens in some slots."""
    if kept is None:
        return slots
    last = len(kept) - 1
    return kept[np.minimum(slots, last)] + np.maximum(slots - last, 0)


def slots_from(kept: Kept, positions: Any) -> Any:
    """The first slots whose tokens stand at some positions or after them."""
    if kept is None:
        return np.maximum(positions, 0)
    within = np.searchsorted(kept, np.minimum(positions, kept[-1]))
    return within + np.maximum(positions - kept[-1], 0)


def shortened(kept: Kept, length: int, following: int | None = None) -> Kept:
    """The same of the first `length` tokens alone, and a next one at `following`, or where there was one before."""
    if kept is None or length >= len(kept):
        return kept
    following = int(kept[length]) if following is None else following
    return None if following == length else np.append(kept[:length], following)
