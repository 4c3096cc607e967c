"""KV caches for transformers, with attention straight out of the storage, on NumPy, CPUs and GPUs.

Importing this module loads NumPy only; a backend is loaded when the first cache that uses it is made.
"""

import logging

from kvnumba.attention.merging import merge_states
from kvnumba.backends.quantization import dequantize, quantize
from kvnumba.backends.registry import available_backends, use_backend
from kvnumba.blocks.stats import CacheStats
from kvnumba.caches.contiguous import KVCache, QuantizedKVCache
from kvnumba.caches.paged import PagedKVCache
from kvnumba.caches.per_head import PerHeadKVCache
from kvnumba.caches.per_head_step import PerHeadStep
from kvnumba.caches.prefill import ChunkedPrefillCache, multi_head_attention_with_cache
from kvnumba.caches.step import Step
from kvnumba.caches.warmup import warmup
from kvnumba.calibration import Calibration
from kvnumba.codecs import register_format
from kvnumba.commands.memory import memory_analysis, memory_growth_table
from kvnumba.errors import BackendUnavailable, CacheFull, WorkerLost
from kvnumba.formats import pack_int4, unpack_int4
from kvnumba.models.batching import ContinuousBatcher, Request
from kvnumba.models.calibrating import calibrate
from kvnumba.models.llama import IncrementalDecoder
from kvnumba.models.sampling import sample
from kvnumba.options import AttentionOptions, Scoring, ScoringOptions
from kvnumba.storage import Layout, LayoutOptions, MemoryUse

logging.getLogger("kvnumba").addHandler(logging.NullHandler())  # quiet unless the application listens

__version__ = "0.1.0"

__all__ = [
    "AttentionOptions",
    "BackendUnavailable",
    "CacheFull",
    "CacheStats",
    "Calibration",
    "ChunkedPrefillCache",
    "ContinuousBatcher",
    "IncrementalDecoder",
    "KVCache",
    "Layout",
    "LayoutOptions",
    "MemoryUse",
    "PagedKVCache",
    "PerHeadKVCache",
    "PerHeadStep",
    "QuantizedKVCache",
    "Request",
    "Scoring",
    "ScoringOptions",
    "Step",
    "WorkerLost",
    "available_backends",
    "calibrate",
    "dequantize",
    "memory_analysis",
    "memory_growth_table",
    "merge_states",
    "multi_head_attention_with_cache",
    "pack_int4",
    "quantize",
    "register_format",
    "sample",
    "unpack_int4",
    "use_backend",
    "warmup",
]
