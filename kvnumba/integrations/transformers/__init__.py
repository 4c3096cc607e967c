"""Hugging Face models on kvnumba: a `transformers.Cache`, and attention straight out of its storage.

    from kvnumba.integrations.transformers import KVNumbaCache

    model.set_attn_implementation("kvnumba")
    model.generate(**inputs, past_key_values=KVNumbaCache(model.config, key_format="int8", value_format="int8"))

Importing this module registers the attention function and the mask function under the name "kvnumba". It needs
the extra ``kvnumba[transformers]``.
"""

from kvnumba.integrations.transformers.versions import check_versions

check_versions()

# ruff: noqa: E402 (what follows imports what has just been checked)
from kvnumba.integrations.transformers.attention import attention_forward, register
from kvnumba.integrations.transformers.batching import PackedDecoder
from kvnumba.integrations.transformers.cache import KVNumbaCache
from kvnumba.integrations.transformers.calibrating import calibrate
from kvnumba.integrations.transformers.captured import captured
from kvnumba.integrations.transformers.layers import KVNumbaLayer
from kvnumba.integrations.transformers.masks import attention_mask

register()

__all__ = [
    "KVNumbaCache",
    "KVNumbaLayer",
    "PackedDecoder",
    "attention_forward",
    "attention_mask",
    "calibrate",
    "captured",
]
