"""A Hugging Face model on a GPU, on kvnumba's cache and transformers' own: ``python benchmarks/gpu_transformers.py``.

Whole forward passes of 8 layers of Llama 3 8B (Hq 32, H 8, D 128, hidden 4,096) in bfloat16, random weights; the
caches take turns in one run, medians. "captured": within `kvnumba.integrations.transformers.captured`. DynamicCache's
attention is torch's flash attention, which torch does not take by itself where there is a cache; where it has a mask,
which flash attention does not take, the memory-efficient one.
Prints the tables of README.md here. Some settings only: ``... 1x1024 8x16384``.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvnumba.integrations.transformers import KVNumbaCache, captured, settings

LAYERS, CHUNK, ROUNDS, FILLED_AT_ONCE = 8, 512, 3, 4096
SETTINGS = {"1x1024": (1, 1024), "1x16384": (1, 16384), "1x131072": (1, 131072), "8x16384": (8, 16384)}
CACHES = {
    "DynamicCache":       (None, False),
    "bfloat16":           ("bfloat16", False),
    "int8":               ("int8", False),
    "int4":               ("int4", False),
    "bfloat16, captured": ("bfloat16", True),
    "int8, captured":     ("int8", True),
    "int4, captured":     ("int4", True),
}  # fmt: skip
"""Name -> format, and whether decode steps are a CUDA graph. Ratios are to the first."""
PEER = next(iter(CACHES))


def make_model() -> Any:
    """The model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=200_000, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda"):
        return LlamaForCausalLM(config).eval().to(torch.bfloat16)


def filled_cache(model: Any, name: str, batch: int, length: int) -> Any:
    """A cache of so many sequences with so many random tokens."""
    fmt = CACHES[name][0]
    model.set_attn_implementation(implementation(name))
    cache: Any = (
        KVNumbaCache(model.config, key_format=fmt, value_format=fmt)
        if fmt
        else DynamicCache(config=model.config)
    )
    for first in range(0, length, FILLED_AT_ONCE):
        for layer in range(LAYERS):
            shape = (batch, 8, min(FILLED_AT_ONCE, length - first), 128)
            k = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            cache.update(k, torch.randn_like(k), layer)
    return cache


def implementation(name: str) -> str:
    """The attention implementation that goes with a cache."""
    return "kvnumba" if CACHES[name][0] else "sdpa"


@contextlib.contextmanager
def running(model: Any, name: str) -> Any:
    """The model set up for a cache."""
    model.set_attn_implementation(implementation(name))
    flash = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(flash), captured(model) if CACHES[name][1] else contextlib.nullcontext():
        yield


def milliseconds(model: Any, cache: Any, ids: Any) -> float:
    """Of a pass."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


@torch.no_grad()
def measure(model: Any, batch: int, length: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of a token for each sequence, and of a chunk of a prompt, by cache."""
    tokens: dict[str, list[float]] = {name: [] for name in CACHES}
    chunks: dict[str, list[float]] = {name: [] for name in CACHES}
    one = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    chunk = torch.randint(0, 32000, (batch, CHUNK), device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    filled: dict[str | None, Any] = {}
    for name, (fmt, _) in CACHES.items():
        if fmt not in filled:
            filled[fmt] = filled_cache(model, name, batch, length)
    caches = {name: filled[fmt] for name, (fmt, _) in CACHES.items()}
    for _ in range(ROUNDS):
        for name, cache in caches.items():
            with running(model, name):
                tokens[name] += [milliseconds(model, cache, one) for _ in range(30)][8:]
    for _ in range(ROUNDS):
        for name, cache in caches.items():
            with running(model, name):
                chunks[name].append(milliseconds(model, cache, chunk))
    return {name: (statistics.median(tokens[name]), statistics.median(chunks[name])) for name in CACHES}


def table(title: str, columns: dict[str, dict[str, float]]) -> None:
    """Print figures by setting and cache, each with its ratio to DynamicCache's."""
    print(f"\n| {title} | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name in CACHES:
        cells = [
            f"{found[name]:.2f}" + ("" if name == PEER else f" ({found[name] / found[PEER]:.2f}x)")
            for found in columns.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main(names: list[str]) -> None:
    """Print both tables."""
    print(torch.cuda.get_device_name())
    settings.SHARE_OF_GPU = 0.2  # for several caches
    model = make_model()
    found = {f"{name.replace('x', ' x ')}": measure(model, *SETTINGS[name]) for name in names}
    table(
        "a token, ms",
        {key: {name: pair[0] for name, pair in each.items()} for key, each in found.items()},
    )
    table(
        f"{CHUNK} tokens, ms",
        {key: {name: pair[1] for name, pair in each.items()} for key, each in found.items()},
    )


if __name__ == "__main__":
    main(sys.argv[1:] or list(SETTINGS))
