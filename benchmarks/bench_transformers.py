"""A Hugging Face model on kvnumba's cache, and on transformers' own: ``python benchmarks/bench_transformers.py``.

Whole forward passes of a model of two Llama layers with the attention of Llama 3 8B (Hq 32, H 8, D 128) and little
else, in float32; all caches take turns in one run, medians. Peak memory is what the operating system says of a
process that does nothing else. Prints the README's table. Parts of it: ``... decode memory``.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

CACHES = {
    "DynamicCache":                      ("DynamicCache", "", None),
    "QuantizedCache, quanto int4":       ("QuantizedCache", "quanto", None),
    "QuantizedCache, hqq int4":          ("QuantizedCache", "hqq", None),
    "kvnumba float32":                   ("KVNumbaCache", "float32", None),
    "kvnumba int8":                      ("KVNumbaCache", "int8", None),
    "kvnumba int4":                      ("KVNumbaCache", "int4", None),
    "kvnumba int8, prompts in bfloat16": ("KVNumbaCache", "int8", "bfloat16"),
}  # fmt: skip
"""Name -> class, its quantiser or format, arithmetic of prompts. Ratios are to the first."""

PEER = next(iter(CACHES))
PROMPTED = [name for name, (kind, _, _) in CACHES.items() if kind != "QuantizedCache"]
WEIGHED = [name for name, (_, what, arithmetic) in CACHES.items() if what != "hqq" and arithmetic is None]
"""Those whose memory is measured: hqq takes half an hour, arithmetic takes none."""

LONG, SHORT, CHUNK = 16384, 256, 512
PROMPT, NEW = 32768 - 16, 16


def make_model(num_attention_heads: int = 32) -> Any:
    """The model, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=num_attention_heads, num_key_value_heads=8, head_dim=128, max_position_embeddings=65536,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_cache(model: Any, name: str) -> Any:
    """An empty cache, and the attention implementation that goes with it set."""
    from transformers import DynamicCache, QuantizedCache

    from kvnumba.integrations.transformers import KVNumbaCache

    kind, what, arithmetic = CACHES[name]
    set_attention(model, name)
    if kind == "KVNumbaCache":
        return KVNumbaCache(model.config, key_format=what, value_format=what, arithmetic=arithmetic)
    if kind == "DynamicCache":
        return DynamicCache(config=model.config)
    axis = 0 if what == "quanto" else 1  # the only one that each takes in transformers
    return QuantizedCache(what, model.config, nbits=4, axis_key=axis, axis_value=axis)


def set_attention(model: Any, name: str) -> None:
    """The attention implementation that goes with a cache."""
    model.set_attn_implementation("kvnumba" if CACHES[name][0] == "KVNumbaCache" else "sdpa")


def run(model: Any, name: str, cache: Any, tokens: int) -> float:
    """Seconds of a forward pass."""
    import torch

    set_attention(model, name)
    ids = torch.arange(tokens)[None] % 256
    start = time.perf_counter()
    model(input_ids=ids, past_key_values=cache)
    return time.perf_counter() - start


def times(length: int, tokens: int, rounds: int, names: Iterable[str] = CACHES) -> dict[str, float]:
    """Milliseconds of a pass of new tokens on `length` cached ones, by cache."""
    import torch

    model = make_model()
    caches = {}
    measured: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for name in names:
            caches[name] = make_cache(model, name)
            for layer in range(2):
                k, v = torch.randn(2, 1, length, 8, 128).transpose(2, 3)
                caches[name].update(k, v, layer)
        for repeat in range(rounds + 1):
            for name in names:
                for _ in range(3):  # in a row, as generation does
                    seconds = run(model, name, caches[name], tokens)
                    if tokens > 1:
                        caches[name].crop(-tokens)
                if repeat:
                    measured[name].append(seconds)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in measured.items()}


def peak_memory(name: str) -> None:
    """Print bytes that a generation of 32,768 tokens adds to the peak of this process."""
    import torch

    model = make_model(8)  # as many query heads as it takes to be done in a minute; keys are the same
    with torch.no_grad():
        run(model, name, make_cache(model, name), CHUNK)  # what is loaded and compiled on the way
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ids = torch.arange(PROMPT)[None] % 255 + 1
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=make_cache(model, name), do_sample=False,
            max_new_tokens=NEW, min_new_tokens=NEW, prefill_chunk_size=CHUNK, pad_token_id=0,
        )  # fmt: skip
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def memory() -> dict[str, float]:
    """Megabytes, each cache in a process of its own."""
    found = {}
    for name in WEIGHED:
        result = subprocess.run(
            [sys.executable, __file__, "peak", name], stdout=subprocess.PIPE, text=True, check=True
        )
        found[name] = int(result.stdout) / 1e6
    return found


COLUMNS: dict[str, tuple[str, Callable[[], dict[str, float]]]] = {
    "decode":  (f"a token at {LONG:,}, ms", lambda: times(LONG, 1, 7)),
    "short":   (f"a token at {SHORT}, ms", lambda: times(SHORT, 1, 60)),
    "prefill": (f"{CHUNK} tokens at {LONG:,}, ms", lambda: times(LONG, CHUNK, 3, PROMPTED)),
    "memory":  ("peak memory of 32,768 tokens, MB", memory),
}  # fmt: skip


def main(parts: list[str]) -> None:
    """Print the table."""
    columns = {COLUMNS[part][0]: COLUMNS[part][1]() for part in parts}
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in CACHES:
        cells = [cell(name, column) for column in columns.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


def cell(name: str, column: dict[str, float]) -> str:
    """A figure, and how many times less it is than DynamicCache's."""
    if name not in column:
        return "-"
    ratio = "" if name == PEER else f" ({column[PEER] / column[name]:.2f}x)"
    return f"{column[name]:,.3g}{ratio}" if column[name] < 1000 else f"{column[name]:,.0f}{ratio}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak_memory(sys.argv[2])
    else:
        main(sys.argv[1:] or list(COLUMNS))
