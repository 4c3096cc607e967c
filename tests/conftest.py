"""Every contract test runs on every backend; KVNUMBA_BACKEND narrows that to one."""

import os

import numpy as np
import pytest
from hypothesis import settings

from kvnumba.formats import FORMATS
from kvnumba.registry import BACKENDS, ENVIRONMENT_VARIABLE, unavailable_reason

settings.register_profile("long", max_examples=4000)  # pytest --hypothesis-profile=long

CHOSEN = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
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


TESTED = [name for name in BACKENDS if name not in MISSING] if CHOSEN == "auto" else [CHOSEN]


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
