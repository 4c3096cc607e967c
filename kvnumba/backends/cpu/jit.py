"""The only place that decorates: Numba's options, each said once."""

from __future__ import annotations

from numba import njit

# IEEE except that sums may be reordered and fused; NaN and infinity keep their meaning.
REORDERED = {"reassoc", "contract", "nsz", "arcp", "afn"}


def _cached(options):
    """A decorator with `options` that keeps compiled code on disk, where the disk allows."""

    def decorate(function):
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # Numba finds no folder that it may write to
            return njit(**options)(function)

    return decorate


kernel = _cached({"parallel": True, "nogil": True, "error_model": "numpy"})
"""Over `prange`, arithmetic in the order in which it is written."""

fast_kernel = _cached({"parallel": True, "nogil": True, "error_model": "numpy", "fastmath": REORDERED})
"""Attention over `prange`: sums are vectorised."""

plain = _cached({"nogil": True, "error_model": "numpy"})
"""A serial piece of a `kernel`, or a serial one."""

orderless = _cached({"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "nsz"}})
"""A serial search among finite values, in any order: a minimum vectorises only if NaN is out of the question."""

fast = _cached({"nogil": True, "error_model": "numpy", "fastmath": REORDERED})
"""A serial piece of a `fast_kernel`."""
