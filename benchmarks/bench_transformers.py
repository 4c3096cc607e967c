"""A Hugging Face model on kvnumba's cache, and on transformers' own: ``python benchmarks/bench_transformers.py``.

Whole forward passes of a model of two Llama layers with the attention of Llama 3 8B (Hq 32, H 8, D 128) and little
else, in float32; all caches take turns in one run, medians. Peak memory is what the operating system says of a
process that does nothing else. Prints the table of README.md here. Parts of it:
``... decode memory``.
"""

from __future__ import annotations

import functools
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from kvnumba.commands.timing import Timing, in_turns

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


def run(model: Any, cache: Any, tokens: int) -> None:
    """A forward pass."""
    import torch

    model(input_ids=torch.arange(tokens)[None] % 256, past_key_values=cache)


def times(length: int, tokens: int, rounds: int, names: Iterable[str] = CACHES) -> dict[str, Timing]:
    """A pass of new tokens on `length` cached ones, by cache."""
    import torch

    model = make_model()
    caches = {}
    with torch.no_grad():
        for name in names:
            caches[name] = make_cache(model, name)
            for layer in range(2):
                k, v = torch.randn(2, 1, length, 8, 128).transpose(2, 3)
                caches[name].update(k, v, layer)

        def pass_of(name: str) -> None:
            run(model, caches[name], tokens)

        def before(name: str) -> None:
            """Take back earlier passes of many tokens; then two that are not timed, as in a generation's middle."""
            set_attention(model, name)
            for _ in range(2):
                restore(name)
                pass_of(name)
            restore(name)

        def restore(name: str) -> None:
            extra = caches[name].get_seq_length() - length
            if tokens > 1 and extra > 0:
                caches[name].crop(-extra)

        return in_turns({name: functools.partial(pass_of, name) for name in names}, rounds, before)


def peak_memory(name: str) -> None:
    """Print bytes that a generation of 32,768 tokens adds to the peak of this process."""
    import torch

    model = make_model(8)  # as many query heads as it takes to be done in a minute; keys are the same
    with torch.no_grad():
        run(model, make_cache(model, name), CHUNK)  # what is loaded and compiled on the way
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ids = torch.arange(PROMPT)[None] % 255 + 1
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=make_cache(model, name), do_sample=False,
            max_new_tokens=NEW, min_new_tokens=NEW, prefill_chunk_size=CHUNK, pad_token_id=0,
        )  # fmt: skip
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def memory() -> dict[str, int]:
    """Bytes, each cache in a process of its own."""
    found = {}
    for name in WEIGHED:
        result = subprocess.run(
            [sys.executable, __file__, "peak", name], stdout=subprocess.PIPE, text=True, check=True
        )
        found[name] = int(result.stdout)
    return found


COLUMNS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
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


def cell(name: str, column: dict[str, Any]) -> str:
    """A figure, and how many times less it is than DynamicCache's."""
    if name not in column:
        return "-"
    found, peer = column[name], column[PEER]
    if isinstance(found, Timing):
        text, ratio = found.cell(), peer.median / found.median
    else:
        text, ratio = f"{found / 1e6:,.0f}", peer / found
    return text if name == PEER else f"{text} ({ratio:.2f}x)"


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak_memory(sys.argv[2])
    else:
        main(sys.argv[1:] or list(COLUMNS))
