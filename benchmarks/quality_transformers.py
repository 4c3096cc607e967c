"""What 4 bits cost a Hugging Face model, on kvnumba's cache and on transformers' own.

``python benchmarks/quality_transformers.py FOLDER TEXT [CALIBRATE_ON]``: a byte-level model reads a text in chunks of
`CHUNK` bytes, teacher forced, on every cache in turn. Prints the KL divergence of its predictions from those on
`DynamicCache`, and the time that the text took. Needs the packages that `bench_transformers.py` needs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

from kvnumba.integrations.transformers import KVNumbaCache, calibrate

CHUNK, RESIDUAL, LENGTH = 32, 128, 2048
KVNUMBA = "kvnumba int4"


def make_cache(model: Any, name: str, calibration: Any) -> Any:
    """An empty cache, and the attention implementation that goes with it set."""
    model.set_attn_implementation("kvnumba" if name.startswith(KVNUMBA) else "sdpa")
    if name.startswith(KVNUMBA):
        options = {"calibration": calibration} if "calibrated" in name else {}
        return KVNumbaCache(model.config, key_format="int4", value_format="int4", **options)
    if name == "DynamicCache":
        return DynamicCache(config=model.config)
    axis = 0 if name == "quanto int4" else 1  # the only one that each takes in transformers
    return QuantizedCache(
        name.split()[0], model.config, nbits=4, axis_key=axis, axis_value=axis, residual_length=RESIDUAL
    )


def read(model: Any, cache: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logarithms of the probabilities after every token, and the seconds that they took."""
    begin = time.perf_counter()
    logits = [
        model(input_ids=tokens[None, start : start + CHUNK], past_key_values=cache).logits[0]
        for start in range(0, len(tokens), CHUNK)
    ]
    seconds = time.perf_counter() - begin
    return torch.log_softmax(torch.cat(logits).double(), dim=-1), seconds


def main(folder: str, text: str, calibrate_on: str | None = None) -> None:
    """Print the table."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor(list(Path(text).read_bytes()[:LENGTH]))
    names = ["DynamicCache", "quanto int4", "hqq int4", KVNUMBA]
    calibration = None
    if calibrate_on is not None:
        ids = torch.tensor(list(Path(calibrate_on).read_bytes()[:4000]))[None]
        calibration = calibrate(model, ids, source=Path(calibrate_on).name)
        names.append(f"{KVNUMBA}, calibrated")
    print("| cache | KL from DynamicCache | seconds |\n|---|---|---|")
    exact: torch.Tensor | None = None
    with torch.no_grad():
        for name in names:
            read(model, make_cache(model, name, calibration), tokens[: 2 * RESIDUAL])  # compiles
            found, seconds = read(model, make_cache(model, name, calibration), tokens)
            exact = found if exact is None else exact
            divergence = (exact.exp() * (exact - found)).sum(dim=-1)[512:].mean()
            print(f"| {name} | {divergence:.1e} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
