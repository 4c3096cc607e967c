"""``python -m kvnumba.integrations.ray``: a model writes from a cache that lies in several processes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import kvnumba
from kvnumba.backends.registry import BACKENDS
from kvnumba.commands.extras import progress, require_extra
from kvnumba.commands.texts import HELD_OUT
from kvnumba.formats import FORMATS
from kvnumba.integrations.ray.cache import ShardedKVCache, WorkerStats
from kvnumba.models.checkpoint import BUNDLED_MODEL
from kvnumba.models.llama import IncrementalDecoder


def main(argv: Sequence[str] | None = None) -> None:
    """Read a file, write on, and say what each worker holds."""
    parser = argparse.ArgumentParser(prog="python -m kvnumba.integrations.ray", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=FORMATS, default="int4", help="of the cache (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", type=Path, metavar="FILE", default=HELD_OUT, help="default: a module of Python's"
    )
    parser.add_argument(
        "--bytes", type=int, default=2000, help="how much of it is read (default: %(default)s)"
    )
    parser.add_argument("--new", type=int, default=200, help="bytes to write (default: %(default)s)")
    parser.add_argument("--backend", choices=[*BACKENDS, "auto"], help="of the workers")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", default=BUNDLED_MODEL, help="a byte-level checkpoint"
    )
    args = parser.parse_args(argv)
    require_extra("integrations.ray", "demo", "tqdm")
    try:
        run(args)
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def run(args: argparse.Namespace) -> None:
    decoder = IncrementalDecoder.from_pretrained(args.model)
    prompt, new = decoder.check_request(args.prompt.read_bytes()[: args.bytes], args.new, 0.0)
    layout = decoder.layout(len(prompt) + new, dtype=args.dtype)
    print(f"starting {args.workers} workers")
    with ShardedKVCache.from_layout(layout, 1, workers=args.workers, backend=args.backend) as cache:
        seq_id = cache.add_sequence()
        with progress(len(prompt), "reads") as bar:
            for logits in decoder.prefill(cache, seq_id, prompt):
                bar.update(len(logits))
        text, last = bytearray(), logits[-1]
        seconds = []
        with progress(new, "writes") as bar:
            for _ in range(new):
                begin = time.perf_counter()
                text.append(kvnumba.sample(last))
                last = decoder.extend(cache, [seq_id], [text[-1:]])[-1]
                seconds.append(time.perf_counter() - begin)
                bar.update()
        print(f"\n{text.decode(errors='replace')}\n")
        print(cache)
        print(table(cache.worker_stats()))
        if new:
            each = 1000 * float(np.median(seconds))  # the first waits for kernels to be compiled
            print(f"{each:.2f} ms a token, {each / layout.num_layers:.2f} ms a layer")


def table(stats: Sequence[WorkerStats]) -> str:
    """The workers as text, a line each."""
    lines = ["worker  host              process  processors   state     blocks used        bytes"]
    for one in stats:
        cpus = ",".join(map(str, one.cpus)) or "any"
        lines.append(
            f"{one.worker:>6}  {one.host:<16} {one.process:>8}  {cpus:<11}  {one.state:<8} "
            f"{one.used_blocks:>6,} of {one.num_blocks:<6,} {one.used_bytes:>9,}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
