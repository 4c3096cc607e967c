"""Which versions of transformers are known to work."""

from __future__ import annotations

import re
from importlib import metadata

OLDEST, TOO_NEW = (5, 20), (5, 24)
"""As in the extra ``transformers`` of pyproject.toml: caches and masks change within minor versions."""


def check_versions() -> None:
    """Raise ImportError, in one line, unless torch and a version of transformers that is known to work are here."""
    for name in ("torch", "transformers"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ImportError(f"{name} is not installed: pip install 'kvnumba[transformers]'") from None
    installed = metadata.version("transformers")
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if not OLDEST <= numbers < TOO_NEW:
        problem = "too old" if numbers < OLDEST else "too new"
        raise ImportError(
            f"transformers {installed} is {problem} for this version of kvnumba, which works with "
            f"{_dotted(OLDEST)} up to, but not with, {_dotted(TOO_NEW)}: pip install 'kvnumba[transformers]'"
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
