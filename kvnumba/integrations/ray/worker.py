"""What runs in a worker: a process that owns a shard of the blocks of some caches, and a backend for them.

A message is a list of commands, done in order; the answer is what the last one returns. A worker in which one went
wrong refuses all further ones, for its blocks may lack something; commands that may fail without harm are attempted.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import kvnumba
from kvnumba.attention.cascade import split_prefixes
from kvnumba.attention.passes import may_share
from kvnumba.backends.registry import get_backend
from kvnumba.caches import snapshot
from kvnumba.options import Scoring
from kvnumba.storage import Batch, Encoded, Layout, Part, array_specs

REMEMBERED = 16  # answers that may be asked for again
NODES = Path("/sys/devices/system/node")


class LocalPart(NamedTuple):
    """A part of what new tokens attend to: the number of its buffers, and the batch without what is kept."""

    buffers: int
    batch: Batch


@dataclass(frozen=True)
class Identity:
    """Who a worker is, and what must be the same as in the process that uses it."""

    host: str
    process: int
    node: str
    cpus: tuple[int, ...]
    version: str
    byteorder: str

    @classmethod
    def of_this_process(cls, node: str = "") -> Identity:
        return cls(
            socket.gethostname(),
            os.getpid(),
            node,
            cpus_by_node(),
            kvnumba.__version__,
            sys.byteorder,
        )


def cpus_by_node() -> tuple[int, ...]:
    """The processors that this process may run on, those of a NUMA node side by side; none where that is not known."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = os.sched_getaffinity(0)
    node_of: dict[int, int] = {}
    for number, folder in enumerate(sorted(NODES.glob("node[0-9]*"))):
        for part in (folder / "cpulist").read_text().split(","):
            first, _, last = part.strip().partition("-")
            if first:
                node_of.update(dict.fromkeys(range(int(first), int(last or first) + 1), number))
    return tuple(sorted(allowed, key=lambda cpu: (node_of.get(cpu, 0), cpu)))


class Worker:
    """The actor."""

    def __init__(self) -> None:
        self._known: dict[
            int, Any
        ] = {}  # buffers, batches and plans, by the numbers that the driver gave them
        self._scorings: dict[Any, Scoring] = {}
        self._failed: BaseException | None = None
        self._turn = threading.Condition()  # messages come by two ways, each in a thread of its own
        self._done = 0
        self._answers: dict[int, Any] = {}  # to the latest messages

    def hello(self) -> Identity:
        import ray

        return Identity.of_this_process(ray.get_runtime_context().get_node_id())

    def begin(self, cpus: Sequence[int], backend: str | None) -> str:
        """Stay on some processors, with a thread for each, and load a backend; returns its name."""
        if cpus:
            os.sched_setaffinity(0, cpus)  # before Numba is loaded, which counts them
        self._backend = get_backend(backend)
        return self._backend.name

    def run(self, number: int, message: bytes, *buffers: Any) -> Any:
        """Do what a message says, once those with smaller numbers are done; its large arrays lie in `buffers`.

        One of the latest messages may come again, where its answer was lost: it is not done twice.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._done >= number - 1)
            if self._done < number:
                answer = None
                try:
                    for name, *arguments in (
                        pickle.loads(message, buffers=buffers) if self._failed is None else ()
                    ):
                        answer = getattr(self, name)(*arguments)
                except BaseException as error:
                    self._failed = error
                self._done = number
                self._answers[number] = answer
                self._answers.pop(number - REMEMBERED, None)
                self._turn.notify_all()
            if self._failed is not None:
                raise self._failed
            return self._answers[number]

    def answer(self, messages: Mapping[int, tuple[int, bytes]], worker: int) -> bytes | None:
        """Do what the message to this worker says, if there is one; returns its answer, pickled."""
        if worker not in messages:
            return None
        return pickle.dumps(self.run(*messages[worker]), protocol=5)

    # Commands

    def attempt(self, name: str, *arguments: Any) -> Any:
        """Do another command; returns the error where there is no memory for it, or its file is not as it should be."""
        try:
            return getattr(self, name)(*arguments)
        except (OSError, ValueError, MemoryError) as error:
            return error

    def echo(self, thing: Any = None) -> Any:
        """Show that one is alive."""
        return thing

    def know(self, number: int, thing: Any) -> None:
        self._known[number] = thing

    def forget(self, number: int) -> None:
        self._known.pop(number, None)

    def allocate(self, number: int, layout: Layout) -> list[tuple[tuple[int, ...], str]]:
        """Make buffers; returns their shapes and dtypes, as the driver expects them."""
        buffers = self._known[number] = self._backend.allocate(layout)
        arrays = self._backend.read_blocks(buffers, np.zeros(1, np.int64))
        return [(array.shape, array.dtype.str) for part in arrays for array in part]

    def available_bytes(self) -> int:
        return self._backend.available_bytes()

    def write(self, number: int, layer: int, k: np.ndarray, v: np.ndarray, batch: int) -> None:
        self._backend.write(self._known[number], layer, k[None], v[None], self._known[batch])

    def plan(
        self, number: int, parts: Sequence[LocalPart], num_qo_heads: int, scoring: tuple[Any, ...]
    ) -> None:
        options, limits = self._scoring(scoring), self._backend.cascade
        found = []
        for part in parts:
            buffers, batch = self._known[part.buffers], part.batch
            if (
                limits is None
                or batch.begins is not None
                or len(batch.seq_lens) == 1
                or not may_share(options)
            ):
                found.append(Part(buffers, batch))
            else:
                found += split_prefixes(buffers, batch, num_qo_heads, limits)
        self._known[number] = self._backend.plan(found, num_qo_heads, options)

    def attend(
        self, layer: int, q: np.ndarray, plan: int, value_head_dim: int, scoring: tuple[Any, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attention of q (T, Hq, D) over what is here: out (T, Hq, Dv) and lse (T, Hq), float32."""
        out = np.empty((1, *q.shape[:2], value_head_dim), np.float32)
        lse = np.empty(out.shape[:3], np.float32)
        self._backend.attend(layer, q[None], self._known[plan], self._scoring(scoring), out, lse)
        return out[0], lse[0]

    def _scoring(self, fields: tuple[Any, ...]) -> Scoring:
        """Options from their fields, the same object for the same fields: backends keep what they derive from it."""
        *plain, slopes = fields
        key = (*plain, None if slopes is None else slopes.tobytes())
        if key not in self._scorings:
            sm_scale, window_left, soft_cap, arithmetic = plain
            self._scorings[key] = Scoring(sm_scale, window_left, soft_cap, None, slopes, arithmetic)
        return self._scorings[key]

    def read(
        self, number: int, layer: int, block_table: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._backend.read(self._known[number], layer, block_table, length)

    def copy_blocks(self, number: int, pairs: np.ndarray) -> None:
        self._backend.copy_blocks(self._known[number], pairs)

    def read_blocks(self, number: int, blocks: np.ndarray) -> list[np.ndarray]:
        keys, values = self._backend.read_blocks(self._known[number], blocks)
        return [*keys, *values]

    def write_blocks(self, number: int, blocks: np.ndarray, arrays: list[np.ndarray]) -> None:
        self._backend.write_blocks(self._known[number], blocks, Encoded(*arrays[:3]), Encoded(*arrays[3:]))

    def save(self, number: int, path: Path, header: dict[str, Any], blocks: np.ndarray) -> None:
        """Write blocks to a file, in this order."""
        snapshot.write_file(path, header, snapshot.block_chunks(self._backend, self._known[number], blocks))

    def check(self, identity: dict[str, Any], files: Sequence[tuple[Path, int]]) -> None:
        """Raise unless files have so many bytes of blocks each, all of them whole."""
        for path, num_bytes in files:
            with path.open("rb") as file:
                snapshot.read_header(file, path, identity)
                snapshot.check_payload(file, path, num_bytes)

    def load(
        self, number: int, identity: dict[str, Any], files: Sequence[tuple[Path, np.ndarray, np.ndarray]]
    ) -> None:
        """Fill blocks from files: of each its path, places in it, in order, and the blocks for which they are."""
        buffers = self._known[number]
        size = snapshot.block_bytes(buffers.layout)
        for path, places, blocks in files:
            with path.open("rb") as file:
                snapshot.read_header(file, path, identity)
                begin = file.tell()
                breaks = np.flatnonzero(np.diff(places) != 1) + 1
                for run, into in zip(np.split(places, breaks), np.split(blocks, breaks), strict=True):
                    file.seek(begin + int(run[0]) * size)
                    snapshot.fill_blocks(file, self._backend, buffers, into)


def local_layout(layout: Layout, num_blocks: int) -> Layout:
    """The layout of a worker's buffers."""
    return replace(layout, num_blocks=max(num_blocks, 1))


def specs_of(layout: Layout) -> list[tuple[tuple[int, ...], str]]:
    """What `Worker.allocate` returns if both sides mean the same by a layout."""
    return [(shape, dtype.str) for shape, dtype in array_specs(layout, 1)]
