"""The process of one checkout, started by `checkouts`: times calls of the kvnumba in the folder that it is given.

It imports nothing of its own checkout, and uses what older ones have too: public names, ``ours.py`` and ``shapes.py``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("KVCache", "PagedKVCache", "Step")
"""Kinds of calls that take microseconds: they are timed 50 at a time."""


def call_of(kind: str, fmt: str, spec: list) -> Callable[[], Any]:
    """What is timed; in the process of a checkout, with its public interface and its ``benchmarks/ours.py``."""
    import numpy as np
    import ours
    from shapes import problem

    import kvnumba

    if kind == "attend":
        return ours.paged(problem(*spec), fmt, "cpu")[2]
    x = np.random.default_rng(0).standard_normal((1, 8, 8192, 128), dtype=np.float32)
    k, q = x[:, :, :1].copy(), np.repeat(x[:, :, :1], 4, axis=1)
    if kind == "PagedKVCache":
        paged = kvnumba.PagedKVCache(1024, 16, 8, 128, 1, fmt, backend="cpu")
        seq_id = paged.add_sequence()
        paged.update(seq_id, x[0, :, :63], x[0, :, :63])

        def one_token() -> Any:
            paged.truncate(seq_id, 63)
            paged.update(seq_id, k[0], k[0])
            return paged.attend(seq_id, q[0])

        return one_token
    if kind == "Step":
        paged = kvnumba.PagedKVCache(1024, 16, 8, 128, 1, fmt, backend="cpu")
        step = paged.step([paged.add_sequence()], [64])
        step.write(x[0, :, :64].swapaxes(0, 1), x[0, :, :64].swapaxes(0, 1))
        step = paged.step([0], [1])
        step.write(k[0].swapaxes(0, 1), k[0].swapaxes(0, 1))
        packed = q[0].swapaxes(0, 1)
        return lambda: step.attend(packed)
    cache = kvnumba.KVCache(1, 8192, 8, 128, fmt, backend="cpu")
    if kind == "read":
        cache.update(x, x)
        return lambda: cache.get_kv(0)
    new, length = (x, 0) if kind == "write" else (k, 63)
    if length:
        cache.update(x[:, :, :length], x[:, :, :length])

    def update() -> None:
        cache.seq_lens = [length]
        cache.update(new, new)
        if kind == "KVCache":
            cache.attend(q)

    return update


def serve(root: Path) -> None:
    """Be the process of a checkout."""
    sys.path[:1] = [str(root), str(root / "benchmarks"), str(root / "tests")]
    import kvnumba
    from kvnumba.formats import FORMATS

    assert Path(kvnumba.__file__).is_relative_to(root), f"{kvnumba.__file__} is not in {root}"
    print(json.dumps(list(FORMATS)), flush=True)
    call: Any = None
    repeats = 1
    for line in sys.stdin:
        question = json.loads(line)
        if question is not None:
            call = None  # frees the cache before
            call = call_of(*question)
            repeats = 50 if question[0] in CALLS else 1
            print("null", flush=True)
            continue
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        print(json.dumps((time.perf_counter() - start) / repeats), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve())
