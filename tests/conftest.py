"""Every contract test runs on every backend; KVNUMBA_BACKEND narrows that to one.

NUMBA_ENABLE_CUDASIM=1 with KVNUMBA_BACKEND=cuda runs them in numba's simulator; KVNUMBA_TEST_GPU=1 runs them on a
GPU, and fails where none answers. KVNUMBA_TEST_TILES=1 takes the CPU's kernels for tile instructions on any processor,
with the instructions' stand-in. KVNUMBA_TEST_WORKERS=3 puts a cache on so many workers, each on a node of its own, in
the place of every `PagedKVCache`; what looks into the storage itself is skipped.
"""

import os

import numpy as np
import pytest
from hypothesis import settings

from kvnumba.backends.registry import BACKENDS, ENVIRONMENT_VARIABLE, available_backends, unavailable_reason
from kvnumba.formats import FORMATS

settings.register_profile("long", max_examples=4000)  # pytest --hypothesis-profile=long

ON_GPU = os.environ.get("KVNUMBA_TEST_GPU") == "1"
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
if ON_GPU and SIMULATED:
    raise pytest.UsageError(
        "KVNUMBA_TEST_GPU=1: expected a GPU; NUMBA_ENABLE_CUDASIM=1 puts a simulator in its place"
    )

CHOSEN = "cuda" if ON_GPU else os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
if CHOSEN not in (*BACKENDS, "auto"):
    raise pytest.UsageError(f"{ENVIRONMENT_VARIABLE}={CHOSEN!r}: expected one of {', '.join(BACKENDS)}, auto")
MISSING = {name: reason for name in BACKENDS if (reason := unavailable_reason(name))}
if CHOSEN in MISSING:
    raise pytest.UsageError(f"{ENVIRONMENT_VARIABLE}={CHOSEN}: {MISSING[CHOSEN]}")


def pytest_report_header():
    """Which backends the contract tests run on, and why others are left out."""
    return [f"kvnumba backends: {', '.join(TESTED)}"] + [
        f"kvnumba backend {name} left out: {reason}" for name, reason in MISSING.items()
    ]


TESTED = list(available_backends()) if CHOSEN == "auto" else [CHOSEN]

if os.environ.get("KVNUMBA_TEST_TILES") == "1":
    from kvnumba.backends.cpu import tiles

    tiles.instructions = lambda: tiles.STAND_IN


ON_WORKERS = "KVNUMBA_TEST_WORKERS" in os.environ
one_file = pytest.mark.skipif(
    ON_WORKERS, reason="looks into the file, which is a folder here: see tests/sharded"
)
if ON_WORKERS:
    from workers import put_paged_caches_on_workers

    put_paged_caches_on_workers(int(os.environ["KVNUMBA_TEST_WORKERS"]), CHOSEN)


def at_most(count, simulated):
    """A size for a test: `count`, or what a simulator of one Python thread for each of the device's can do."""
    return simulated if SIMULATED and TESTED == ["cuda"] else count


@pytest.fixture(params=TESTED)
def backend(request):
    """The name of each backend that can run here."""
    return request.param


@pytest.fixture(params=FORMATS)
def fmt(request):
    """The name of each storage format."""
    return request.param


@pytest.fixture
def rng():
    """Random numbers that are the same in each run."""
    return np.random.default_rng(20)


@pytest.fixture
def normal(rng):
    """Standard normal float32 of a shape: ``normal(2, 3)``."""
    return lambda *shape: rng.standard_normal(shape, dtype=np.float32)
