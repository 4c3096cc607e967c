"""``python -m kvnumba demo``: a real model reads a real file from caches of every precision."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvnumba.backends.registry import get_backend
from kvnumba.caches.paged import PagedKVCache
from kvnumba.commands.extras import progress, require_extra
from kvnumba.commands.texts import HELD_OUT, lookups_right, registry_task
from kvnumba.formats import REGISTERED
from kvnumba.models.checkpoint import BUNDLED_MODEL
from kvnumba.models.llama import IncrementalDecoder
from kvnumba.models.sampling import log_softmax, sample

FORMATS = ("float32", "float16", "int8", "int4")
CHUNK = 512


@dataclass(frozen=True)
class Result:
    """What one format did with the prompt."""

    fmt: str
    kv_bytes: int
    float_bytes: int
    prefill_rate: float
    decode_rate: float
    bits_per_byte: float
    agreement: float
    divergence: float
    lookups: float
    text: bytes


def run(
    model: Path, prompt: Path | None, num_bytes: int, num_new: int, backend: str | None, plot: Path | None
) -> None:
    """Read the prompt with a cache in each format, and print the table, the text, and perhaps a picture."""
    require_extra("demo", "demo", "tqdm", *(["matplotlib"] if plot else []))
    decoder = IncrementalDecoder.from_pretrained(model)
    if decoder.config.vocab_size != 256:
        raise ValueError(
            f"--model: expected a byte-level model (vocab_size 256); got {decoder.config.vocab_size}"
        )
    limit = decoder.config.max_position_embeddings
    if num_bytes < 1 or num_new < 0 or num_bytes + num_new > limit:
        raise ValueError(
            f"--bytes, --new: expected at least 1 and 0, together at most the model's {limit} positions; "
            f"got {num_bytes} and {num_new}"
        )
    path = prompt or HELD_OUT
    document = path.read_bytes()[:num_bytes]
    if not document:
        raise ValueError(f"--prompt: {path} is empty")
    backend = get_backend(backend).name
    name = "the bundled model" if model == BUNDLED_MODEL else str(model)
    print(f"{name} reads {len(document):,} bytes of {path} and writes {num_new} on backend {backend}")
    _warm_up(decoder, backend)

    results: list[Result] = []
    exact: np.ndarray | None = None
    for fmt in (*FORMATS, *REGISTERED):
        result, logits = _measure(decoder, document, num_new, fmt, backend, exact)
        exact = logits if exact is None else exact
        results.append(result)
    print(f"\n{table(results)}\n")
    for result in results:
        print(f"--- {result.fmt} writes on ---\n{result.text.decode(errors='replace')}\n")
    if plot is not None:
        draw(results, plot)
        print(f"drawn in {plot}")


def table(results: list[Result]) -> str:
    """The results as text, a format a line."""
    lines = [
        "            KV bytes  / float32   in float   prefill    decode   bits per   top-1 as   KL from  look-ups",
        "format                            besides     tok/s     tok/s       byte    float32   float32     right",
    ]
    lines.append("-" * len(lines[0]))
    for r in results:
        lines.append(
            f"{r.fmt:<8} {r.kv_bytes:>11,} {r.kv_bytes / results[0].kv_bytes:>10.3f} {r.float_bytes:>10,} "
            f"{r.prefill_rate:>9,.0f} {r.decode_rate:>9,.0f} {r.bits_per_byte:>10.4f} {r.agreement:>10.2%} "
            f"{r.divergence:>9.1e} {r.lookups:>9.0%}"
        )
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    """The table as bars."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[float]]] = [
        ("KV bytes, of float32", [r.kv_bytes / results[0].kv_bytes for r in results]),
        ("bits per byte", [r.bits_per_byte for r in results]),
        ("top-1 as float32, %", [100 * r.agreement for r in results]),
        ("look-ups right, %", [100 * r.lookups for r in results]),
        ("prefill, tokens/s", [r.prefill_rate for r in results]),
        ("decode, tokens/s", [r.decode_rate for r in results]),
    ]
    figure = Figure(figsize=(11, 6), layout="constrained")
    names = [r.fmt for r in results]
    for axes, (title, values) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        bars = axes.bar(names, values, color="#4c72b0")
        axes.bar_label(bars, fmt=lambda x: f"{x:,.0f}" if x >= 10 else f"{x:.3f}", padding=2)
        axes.set_title(title)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _measure(
    decoder: IncrementalDecoder,
    document: bytes,
    num_new: int,
    fmt: str,
    backend: str,
    exact: np.ndarray | None,
) -> tuple[Result, np.ndarray]:
    """One format's result, and its logits at every byte of the document; `exact` are those of float32."""
    cache, seq_id = _new_sequence(decoder, len(document) + num_new, fmt, backend)
    logits, prefill_seconds = _read(decoder, cache, seq_id, document, f"{fmt:<8} reads")
    kv_bytes = cache.seq_lens[seq_id] * cache.bytes_per_token()

    text = bytearray()
    last = logits[-1]
    start = time.perf_counter()
    with progress(num_new, f"{fmt:<8} writes") as bar:
        for _ in range(num_new):
            text.append(sample(last))
            last = decoder.extend(cache, [seq_id], [text[-1:]])[-1]
            bar.update()
    decode_seconds = time.perf_counter() - start

    task, answers = registry_task(np.random.default_rng(0))
    task_logits, _ = _read(
        decoder, *_new_sequence(decoder, len(task), fmt, backend), task, f"{fmt:<8} looks up"
    )

    exact = logits if exact is None else exact
    log_p, log_q = log_softmax(exact), log_softmax(logits)
    following = np.frombuffer(document, np.uint8)[1:]
    surprise = -log_q[np.arange(len(following)), following]
    result = Result(
        fmt=fmt,
        kv_bytes=kv_bytes,
        float_bytes=cache.memory().floats,
        prefill_rate=len(document) / prefill_seconds,
        decode_rate=num_new / decode_seconds if num_new else 0.0,
        bits_per_byte=float(surprise.mean() / np.log(2)) if len(following) else float("nan"),
        agreement=float((logits.argmax(axis=-1) == exact.argmax(axis=-1)).mean()),
        divergence=float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()),
        lookups=lookups_right(task_logits.argmax(axis=-1), task, answers),
        text=bytes(text),
    )
    return result, logits


def _warm_up(decoder: IncrementalDecoder, backend: str) -> None:
    """Compile every kernel before the clock runs, with a prompt and a token whose attention is split over threads."""
    length = min(2 * CHUNK, decoder.config.max_position_embeddings - 1)
    for fmt in (*FORMATS, *REGISTERED):
        cache, seq_id = _new_sequence(decoder, length + 1, fmt, backend)
        list(decoder.prefill(cache, seq_id, bytes(length), chunk_size=CHUNK))
        decoder.extend(cache, [seq_id], [b"\n"])


def _new_sequence(
    decoder: IncrementalDecoder, num_tokens: int, fmt: str, backend: str
) -> tuple[PagedKVCache, int]:
    cache = decoder.make_cache(num_tokens, dtype=fmt, backend=backend)
    return cache, cache.add_sequence()


def _read(
    decoder: IncrementalDecoder, cache: PagedKVCache, seq_id: int, text: bytes, label: str
) -> tuple[np.ndarray, float]:
    """Logits (len(text), 256) of a text read in chunks behind a progress bar, and the seconds that took."""
    logits: list[Any] = []
    start = time.perf_counter()
    with progress(len(text), label) as bar:
        for chunk in decoder.prefill(cache, seq_id, text, chunk_size=CHUNK):
            logits.append(chunk)
            bar.update(len(chunk))
    return np.concatenate(logits), time.perf_counter() - start
