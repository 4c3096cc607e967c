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

    What the user gave stays as it is. `calibration` is what is at hand, taken if the user gave none and rows are
    rotated.
    """
    formats = [options.get(name) or dtype for name in ("key_format", "value_format")]
    if "int4" not in [resolve_format("dtype", fmt).name for fmt in formats if fmt is not None]:
        return options
    filled: LayoutOptions = {**INT4_RECIPE, "calibration": calibration, **options}
    if filled["rotation"] is False and "calibration" not in options:
        del filled["calibration"]
    return filled
