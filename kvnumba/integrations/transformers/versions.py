"""Which versions of transformers are known to work, and what of transformers must be there in any version."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from importlib import metadata
from typing import Any

OLDEST, NEWEST = (5, 20), (5, 24)
"""Known to work, with all between them; OLDEST as in the extra ``transformers`` of pyproject.toml."""

PARAMETERS = {
    "cache_utils.Cache": "layers",
    "cache_utils.Cache.update": "key_states value_states layer_idx",
    "cache_utils.get_layer_types_and_kwargs": "config",
    "configuration_utils.PreTrainedConfig.get_text_config": "decoder",
    "masking_utils.AttentionMaskInterface.register": "key value",
    "masking_utils.causal_mask_function": "",
    "masking_utils.eager_mask": "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask dtype "
    "allow_is_bidirectional_skip",
    "masking_utils.sliding_window_causal_mask_function": "sliding_window",
    "masking_utils.sliding_window_overlay": "sliding_window",
    "modeling_utils.AttentionInterface.register": "key value",
}
"""What the integration calls or is called as, and the names of the parameters that it counts on."""

LAYER_METHODS = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
"""What transformers demands of a layer of a cache."""


def check_versions() -> None:
    """Raise ImportError, in one line, unless torch and a transformers are here that the integration can work with.

    A transformers that is newer than those that are known warns, if all that the integration counts on is there.
    """
    for name in ("torch", "transformers"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ImportError(f"{name} is not installed: pip install 'kvnumba[transformers]'") from None
    known = f"{_dotted(OLDEST)} to {_dotted(NEWEST)} are known to work with this version of kvnumba"
    version = metadata.version("transformers")
    if installed() < OLDEST:
        raise ImportError(f"transformers {version} is too old; {known}: pip install 'kvnumba[transformers]'")
    missing = what_is_missing()
    if missing:
        raise ImportError(
            f"transformers {version}: {missing}; {known}: pip install 'transformers=={_dotted(NEWEST)}.*'"
        )
    if newer_than_known():
        warnings.warn(f"transformers {version} is newer than those that were tried; {known}", stacklevel=2)


def newer_than_known() -> bool:
    """Whether the transformers that is installed is newer than those that are known to work."""
    return installed() > NEWEST


def what_is_missing() -> str:
    """What of transformers is not as the integration counts on, in a few words; nothing if all is."""
    for name, parameters in PARAMETERS.items():
        module, *attributes = name.split(".")
        found: Any = importlib.import_module(f"transformers.{module}")
        for attribute in attributes:
            found = getattr(found, attribute, None)
        if found is None:
            return f"it has no {name}"
        taken = inspect.signature(found).parameters
        absent = [parameter for parameter in parameters.split() if parameter not in taken]
        if absent:
            return f"{name} has no parameter {absent[0]}"
    cache_utils, masking_utils = (
        importlib.import_module(f"transformers.{name}") for name in ("cache_utils", "masking_utils")
    )
    more = sorted(cache_utils.CacheLayerMixin.__abstractmethods__ - LAYER_METHODS)
    if more:
        return f"a layer of a cache must have {more[0]}"
    from kvnumba.integrations.transformers.masks import window_left  # it imports what has just been found

    if window_left(masking_utils.sliding_window_causal_mask_function(3)) != 2:
        return "masks of sliding windows are made in another way"
    return ""


def installed() -> tuple[int, ...]:
    """The version of transformers, as far as it is known to matter: (major, minor)."""
    return tuple(int(part) for part in re.findall(r"\d+", metadata.version("transformers"))[:2])


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
