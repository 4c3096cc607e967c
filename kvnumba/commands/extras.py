"""What commands need besides the package itself."""

from __future__ import annotations

import importlib.util
import sys


def require_extra(extra: str, *modules: str) -> None:
    """Leave with one line that says what to install, unless the modules can be imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.exit(f"kvnumba {extra} needs {module}: pip install 'kvnumba[{extra}]'")
