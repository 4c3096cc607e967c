"""Presses of kvpress over a `KVNumbaCache`, beside kvpress alone over transformers' `DynamicCache`.

``PYTHONPATH=tests python benchmarks/presses.py``: a model of two layers with the attention of Llama 3 8B and little
else, float32, reads a prompt, of which a press leaves a quarter, and then a token at a time. Prints how long the prompt
took, how long a token takes, median, and what the cache holds. Needs `.[kvpress]`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import kvpress
import torch
from pressing import by_kvpress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvnumba.commands.shapes import SHAPES
from kvnumba.integrations.kvpress import compressing
from kvnumba.integrations.transformers import KVNumbaCache

_, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = SHAPES["llama-3-8b"]
PRESSES = {
    "KnormPress": lambda: kvpress.KnormPress(0.75),
    "AdaKVPress(KnormPress)": lambda: kvpress.AdaKVPress(kvpress.KnormPress(0.75)),
}


def measured(model: Any, press: Any, fmt: str | None, length: int, tokens: int) -> str:
    """Cells of a row; no format stands for kvpress alone."""
    if fmt is None:
        model.set_attn_implementation("sdpa")
        cache, context = DynamicCache(config=model.config), by_kvpress
    else:
        model.set_attn_implementation("kvnumba")
        cache, context = (
            KVNumbaCache(model.config, per_head=True, key_format=fmt, value_format=fmt),
            compressing,
        )
    prompt = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.no_grad(), context(press, model, cache):
        for n, ids in enumerate([prompt] + [prompt[:, :1]] * tokens):
            begin = time.perf_counter()
            model(
                input_ids=ids,
                past_key_values=cache,
                position_ids=torch.arange(ids.shape[1])[None] + (n and length + n - 1),
                logits_to_keep=1,
            )
            seconds.append(time.perf_counter() - begin)
    used = (
        sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        if fmt is None
        else cache.used_bytes()
    )
    return f"{seconds[0]:.2f} s | {statistics.median(seconds[1:]) * 1e3:.2f} ms | {used / 1e6:.1f} MB"


def main() -> None:
    """Print a row for each press and cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=NUM_QO_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=args.length + args.tokens,
    )
    model = LlamaForCausalLM(config).eval()
    print("| press | cache | prompt | a token | holds |")
    print("|---|---|---|---|---|")
    for name, make in PRESSES.items():
        for fmt in (None, "float32", "int8", "int4"):
            row = measured(model, make(), fmt, args.length, args.tokens)
            print(f"| {name} | {'DynamicCache' if fmt is None else f'kvnumba {fmt}'} | {row} |", flush=True)


if __name__ == "__main__":
    main()
