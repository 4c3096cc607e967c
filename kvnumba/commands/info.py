"""``python -m kvnumba info``: what runs here, and why what does not run does not."""

from __future__ import annotations

import importlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kvnumba
from kvnumba.backends.registry import BACKENDS, get_backend, unavailable_reason
from kvnumba.errors import BackendUnavailable

PACKAGES = ("numpy", "numba", "llvmlite", "numba-cuda")


def run() -> None:
    """Print versions, backends, and what the backends that run here say of themselves."""
    rows = [("kvnumba", f"{kvnumba.__version__}, {Path(kvnumba.__file__).parent}")]
    rows.append(("python", f"{platform.python_version()} on {platform.platform()}"))
    for package in PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    for name in BACKENDS:
        reason = unavailable_reason(name)
        rows.append((f"backend {name}", f"no: {reason}" if reason else "yes"))
    try:
        rows.append(("chosen backend", get_backend().name))
    except (ValueError, BackendUnavailable) as error:
        rows.append(("chosen backend", f"none: {error}"))
    for name in ("cuda", "cpu"):
        if unavailable_reason(name) is None:
            rows += importlib.import_module(f"kvnumba.backends.{name}").describe()
    for name, value in rows:
        print(f"{name:<18} {value}")
