"""A cache on several workers in a folder, and back: a file for each worker, and a manifest that appears last.

Every file is as `kvnumba.caches.snapshot` describes them. That of a worker holds the blocks that are read there. The
manifest has no blocks; its header is that of a cache in one file, and says besides which file has each block. When they
are read, there may be more or fewer workers: each reads, from any file, the blocks that it is to hold.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvnumba.blocks.pool import BlockPool
from kvnumba.blocks.prefix import NO_BLOCK
from kvnumba.blocks.tables import State
from kvnumba.caches import snapshot
from kvnumba.integrations.ray.backend import ShardedBackend

MANIFEST = "manifest"
BLOCKS = re.compile(r"worker-\d+-[0-9a-f]{8}\.blocks")


class Into(NamedTuple):
    """Lost sequences that are to be read back, and the name of their cache."""

    cache: str
    seq_ids: list[int]


def save(
    path: Path, backend: ShardedBackend, buffers: Any, pool: BlockPool, fingerprint: str, cache: str
) -> None:
    """Write all sequences and findable blocks of a pool; what a folder had before stays until all is written."""
    identity = snapshot.identity(buffers.layout, fingerprint)
    size = snapshot.block_bytes(buffers.layout)
    token = secrets.token_hex(4)
    with pool.lock:
        header, blocks = snapshot.describe(pool)
        places = dict(backend.by_reader(blocks))
        names = {worker: f"worker-{worker}-{token}.blocks" for worker in places}
        before = path.exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            _attempt(
                backend,
                {
                    worker: (
                        "save",
                        buffers.shipped.number,
                        path / names[worker],
                        identity,
                        backend.local(buffers, blocks[which]),
                    )
                    for worker, which in places.items()
                },
            )
            files = [
                {"name": names[worker], "blocks": which.tolist(), "bytes": len(which) * size}
                for worker, which in places.items()
            ]
            header.update(identity, block_bytes=size, files=files, cache=cache)
            snapshot.write_file(path / MANIFEST, header, iter(()))
        except BaseException:
            _remove(path, keep=lambda name: token not in name)
            if not before:
                path.rmdir()
            raise
    _remove(path, keep=lambda name: token in name)


def load(
    path: Path,
    backend: ShardedBackend,
    buffers: Any,
    pool: BlockPool,
    fingerprint: str,
    into: Into | None = None,
) -> dict[int, int]:
    """Add what a folder holds to a pool; returns the new id of each sequence by the one it was saved under.

    Given lost sequences to read `into`, only those of them that were saved are read, and they keep their ids.
    """
    header = read_manifest(path, buffers.layout, fingerprint)
    identity = snapshot.identity(buffers.layout, fingerprint)
    if into is not None:
        if header.get("cache") != into.cache:
            raise ValueError(
                f"{path}: another cache was saved there, in which other sequences have these ids"
            )
        header = of_sequences(header, into.seq_ids)
    alive = backend.alive()
    if not alive:
        backend.workers.require(backend.workers.lost)
    files = [(path / file["name"], file["bytes"]) for file in header["files"]]
    shared_out = {worker: files[n :: len(alive)] for n, worker in enumerate(alive) if files[n :: len(alive)]}
    _attempt(backend, {worker: ("check", identity, those) for worker, those in shared_out.items()})

    def fill(blocks: np.ndarray) -> None:
        parts: dict[int, list[tuple[Path, np.ndarray, np.ndarray]]] = {}
        for file in header["files"]:
            numbers = np.array(file["blocks"], np.int64)
            places = np.flatnonzero(numbers != NO_BLOCK)
            for worker, which, local in backend.by_holder(buffers, blocks[numbers[places]]):
                parts.setdefault(worker, []).append((path / file["name"], places[which], local))
        _attempt(
            backend,
            {worker: ("load", buffers.shipped.number, identity, those) for worker, those in parts.items()},
        )

    def states(blocks: np.ndarray) -> list[State]:
        return snapshot.recall(header, pool, blocks)

    sequences = header["sequences"]
    before = [sequence["id"] for sequence in sequences]
    ids = pool.restore(
        snapshot.runs_of(header), len(sequences), fill, states, None if into is None else before
    )
    return dict(zip(before, ids, strict=True))


def read_manifest(path: Path, layout: Any, fingerprint: str) -> dict[str, Any]:
    """The header of a folder's manifest, after a check that it is of a cache like this one."""
    manifest = path / MANIFEST
    if path.exists() and not manifest.exists():
        raise ValueError(
            f"{path}: no manifest: not a folder that a cache was saved to, or not all of it was written"
        )
    with manifest.open("rb") as file:
        header = snapshot.read_header(file, manifest, snapshot.identity(layout, fingerprint))
        snapshot.check_payload(file, manifest, 0)
    if "files" not in header:
        raise ValueError(f"{manifest}: not the manifest of a cache on several workers")
    return header


def of_sequences(header: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """A header with some of its sequences and their blocks alone."""
    sequences = [sequence for sequence in header["sequences"] if sequence["id"] in ids]
    blocks = dict.fromkeys(block for sequence in sequences for block in sequence["blocks"])
    number = {block: n for n, block in enumerate(blocks)}
    return {
        **header,
        "num_blocks": len(blocks),
        "entries": [
            [parent, tokens, number.get(block, NO_BLOCK)] for parent, tokens, block in header["entries"]
        ],
        "sequences": [
            {**sequence, "blocks": [number[block] for block in sequence["blocks"]]} for sequence in sequences
        ],
        "files": [
            {**file, "blocks": [number.get(block, NO_BLOCK) for block in file["blocks"]]}
            for file in header["files"]
        ],
    }


def _attempt(backend: ShardedBackend, commands: dict[int, tuple[Any, ...]]) -> None:
    """Let workers do a command each that may fail without harm; raises the first error."""
    attempts = {worker: [("attempt", *command)] for worker, command in commands.items()}
    answers = backend.call(attempts, patient=True)
    for worker, answer in answers.items():
        if isinstance(answer, Exception):
            text = f"{backend.workers.describe(worker)}: {answer}"
            if isinstance(answer, OSError):
                raise OSError(answer.errno, text) from answer  # FileNotFoundError and so on, by its number
            raise (ValueError if isinstance(answer, ValueError) else MemoryError)(text) from answer


def _remove(path: Path, keep: Any) -> None:
    """Remove the files of workers that no manifest names."""
    for file in path.iterdir():
        if BLOCKS.fullmatch(file.name) and not keep(file.name):
            with contextlib.suppress(OSError):
                file.unlink()
