"""What commands need besides the package itself."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


def require_extra(command: str, extra: str, *modules: str) -> None:
    """Leave with one line that says what to install, unless the modules can be imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.exit(f"kvnumba {command} needs {module}: pip install 'kvnumba[{extra}]'")


def progress(num_tokens: int, label: str) -> Any:
    """A bar that tqdm draws, of the extra "demo"."""
    from tqdm import tqdm

    return tqdm(total=num_tokens, desc=label, unit="tok")
