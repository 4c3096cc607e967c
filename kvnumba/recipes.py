"""What makes few bits good enough, where a whole model is at hand: the options that int4 stands for there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvnumba.formats import resolve_format

if TYPE_CHECKING:
    from kvnumba.calibration import Calibration
    from kvnumba.storage import LayoutOptions

INT4_RECIPE: LayoutOptions = {"scale_dtype": "float16", "rotation": True, "recent_tokens": 128}


def with_recipe(dtype: Any, options: LayoutOptions, calibration: Calibration | None = None) -> LayoutOptions:
    """Options of a cache of `dtype`, those of `INT4_RECIPE` filled in where keys or values are int4.

    What the user gave stays as it is. `calibration` is what is at hand: it is taken where rows are rotated and the user
    did not say otherwise, by None or another one.
    """
    default = None if dtype is None else resolve_format("dtype", dtype)
    formats = []
    for name in ("key_format", "value_format"):
        fmt = options.get(name)
        formats.append(default if fmt is None else resolve_format(name, fmt))
    if not any(fmt is not None and fmt.name == "int4" for fmt in formats):
        return options
    given: Any = {
        name: value for name, value in options.items() if value is not None or name == "calibration"
    }
    filled: LayoutOptions = {**INT4_RECIPE, **given}
    if filled["rotation"]:
        filled.setdefault("calibration", calibration)
    return filled
