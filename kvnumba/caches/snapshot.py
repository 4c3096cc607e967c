"""Sequences and cached prefixes in a file, and back.

The file: 8 bytes of magic; the length of the header and its CRC-32, little-endian uint64 and uint32; the
header, JSON; the blocks as they are stored, each whole, in the header's order; the CRC-32 of these, uint32.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kvnumba.backends.protocol import Backend
from kvnumba.blocks.pool import BlockPool
from kvnumba.blocks.prefix import NO_BLOCK, TOKEN_DTYPE, Chain, Entry, Key
from kvnumba.blocks.tables import State
from kvnumba.errors import CacheFull
from kvnumba.formats import FORMATS, REGISTERED
from kvnumba.storage import Buffers, Encoded, Layout, array_specs

if sys.platform != "win32":
    import fcntl

MAGIC = b"kvnumba\x00"
VERSION = 1
PREAMBLE = struct.Struct("<8sQI")
CHECKSUM = struct.Struct("<I")
HAS_UNNAMED_FILES = hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd")  # by which they get a name
UNFINISHED = ".tmp"  # how the name of a file ends that is not whole yet
CHUNK = 64  # blocks that are read from or written to a cache at once


def save(path: Path, backend: Backend, buffers: Buffers, pool: BlockPool, identity: dict[str, Any]) -> None:
    """Write all sequences and findable blocks of a pool to a file, which appears whole or not at all."""
    with pool.lock:
        header, blocks = describe(pool)
        header.update(identity, block_bytes=block_bytes(buffers.layout))
        write_file(path, header, block_chunks(backend, buffers, blocks))


def load(
    path: Path, backend: Backend, buffers: Buffers, pool: BlockPool, identity: dict[str, Any]
) -> dict[int, int]:
    """Add what a file holds to a pool; returns the new id of each sequence by the one it was saved under."""
    with path.open("rb") as file:
        header = read_header(file, path, identity)
        begin = file.tell()
        check_payload(file, path, header["num_blocks"] * block_bytes(buffers.layout))

        def fill(blocks: np.ndarray) -> None:
            file.seek(begin)
            fill_blocks(file, backend, buffers, blocks)

        def states(blocks: np.ndarray) -> list[State]:
            return recall(header, pool, blocks)

        ids = pool.restore(runs_of(header), len(header["sequences"]), fill, states)
    return dict(zip((sequence["id"] for sequence in header["sequences"]), ids, strict=True))


def block_chunks(backend: Backend, buffers: Buffers, blocks: np.ndarray) -> Iterator[bytes]:
    """Blocks as they are stored, each whole."""
    for start in range(0, len(blocks), CHUNK):
        keys, values = backend.read_blocks(buffers, blocks[start : start + CHUNK])
        yield np.concatenate([_by_block(array) for array in (*keys, *values)], axis=1).tobytes()


def fill_blocks(file: BinaryIO, backend: Backend, buffers: Buffers, blocks: np.ndarray) -> None:
    """Fill blocks with what comes next in a file."""
    size = block_bytes(buffers.layout)
    for start in range(0, len(blocks), CHUNK):
        chunk = blocks[start : start + CHUNK]
        data = np.frombuffer(file.read(len(chunk) * size), np.uint8)
        arrays = _from_blocks(data.reshape(len(chunk), size), buffers.layout)
        backend.write_blocks(buffers, chunk, Encoded(*arrays[:3]), Encoded(*arrays[3:]))


def save_elements(
    path: Path, backend: Backend, buffers: Buffers, seq_lens: list[int], fingerprint: str
) -> None:
    """Write the first tokens of each block of a contiguous cache, as many as `seq_lens` says."""
    layout = buffers.layout
    header = {**_element_identity(layout, fingerprint), "seq_lens": seq_lens}

    def chunks() -> Iterator[bytes]:
        for block, length in enumerate(seq_lens):
            keys, values = backend.read_blocks(buffers, np.array([block]))
            for array in (*keys, *values):
                yield np.ascontiguousarray(array[:, :, :, :length]).tobytes()

    write_file(path, header, chunks())


def load_elements(path: Path, backend: Backend, buffers: Buffers, fingerprint: str) -> list[int]:
    """Read what `save_elements` wrote into the blocks of a contiguous cache; returns how many tokens each has."""
    layout = buffers.layout
    with path.open("rb") as file:
        header = read_header(file, path, _element_identity(layout, fingerprint))
        seq_lens: list[int] = header["seq_lens"]
        if max(seq_lens) > layout.block_size:
            raise CacheFull(
                f"{path}: has an element of {max(seq_lens)} tokens, more than max_seq_len={layout.block_size}"
            )
        begin = file.tell()
        check_payload(file, path, sum(seq_lens) * layout.bytes_per_token())
        file.seek(begin)
        for block, length in enumerate(seq_lens):
            keys, values = backend.read_blocks(buffers, np.array([block]))
            for array in (*keys, *values):
                part = array[:, :, :, :length]
                data = file.read(part.size * part.itemsize)
                part[...] = np.frombuffer(data, part.dtype).reshape(part.shape)
            backend.write_blocks(buffers, np.array([block]), keys, values)
    return seq_lens


def write_file(path: Path, header: dict[str, Any], chunks: Iterator[bytes]) -> None:
    text = json.dumps(header).encode()
    with replacing(path) as file:
        file.write(PREAMBLE.pack(MAGIC, len(text), zlib.crc32(text)))
        file.write(text)
        checksum = 0
        for data in chunks:
            checksum = zlib.crc32(data, checksum)
            file.write(data)
        file.write(CHECKSUM.pack(checksum))


def identity(layout: Layout, fingerprint: str, *, per_head: bool = False) -> dict[str, Any]:
    """Header fields that must equal those of the cache that loads the file.

    `per_head`: blocks are of one head of one layer of this layout.
    """
    return {
        "version": VERSION,
        "byteorder": sys.byteorder,
        "num_layers": layout.num_layers,
        "block_size": layout.block_size,
        "num_kv_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "value_head_dim": layout.value_head_dim,
        "key_format": layout.keys.fmt.name,
        "value_format": layout.values.fmt.name,
        "group_size": _group_size(layout),
        "scale_dtype": layout.keys.scale_dtype.name,
        "transform": None if layout.transform is None else layout.transform.name,
        "fingerprint": fingerprint,
        "per_head": per_head,
    }


def _element_identity(layout: Layout, fingerprint: str) -> dict[str, Any]:
    """The same of a contiguous cache, whose blocks may be of another length."""
    fields = identity(layout, fingerprint)
    del fields["block_size"]
    return {**fields, "batch_size": layout.num_blocks}


def _group_size(layout: Layout) -> int:
    """Of the keys where they have scales, otherwise of the values."""
    return (layout.keys if layout.keys.fmt.has_scale else layout.values).group_size


def describe(pool: BlockPool) -> tuple[dict[str, Any], np.ndarray]:
    """The header's description of a pool, and the blocks to save, those that no sequence holds first."""
    rows = np.flatnonzero(pool.ids >= 0)
    away = pool.ids[rows][pool.away[rows]]
    if len(away):
        kind, remedy = (
            ("lost", "restore it")
            if away[0] % pool.max_num_seqs in pool.lost
            else ("swapped out", "swap it in")
        )
        raise ValueError(f"seq_id: sequence {away[0]} is {kind}; {remedy} or finish it before you save")
    states = [pool.state(row) for row in rows[np.argsort(pool.ids[rows])]]
    # a forgotten entry still names a sequence's tokens; one without a parent and without a sequence cannot be
    # found again
    known = {entry.number: entry for entry in pool.prefixes.entries()}
    for state in states:
        known.update((entry.number, entry) for entry in state.chain.entries)
    entries: dict[int, Entry] = {}
    for number, entry in sorted(known.items()):
        if isinstance(entry.key.parent, str) or entry.key.parent in entries:
            entries[number] = entry
    order = {number: n for n, number in enumerate(entries)}
    # a block is written once, however many sequences hold it; those that none holds come first, in their turn
    findable = {entry.block for entry in entries.values()} - {NO_BLOCK}
    blocks = dict.fromkeys(block for block in pool.prefixes.idle if block in findable)
    blocks.update(dict.fromkeys(findable))
    for state in states:
        blocks.update(dict.fromkeys(state.blocks.tolist()))
    place = {block: n for n, block in enumerate(blocks)}
    header = {
        "num_blocks": len(blocks),
        "entries": [
            [
                entry.key.parent if isinstance(entry.key.parent, str) else order[entry.key.parent],
                entry.key.tokens.hex(),
                place.get(entry.block, NO_BLOCK),
            ]
            for entry in entries.values()
        ],
        "sequences": [
            {
                "id": int(pool.ids[row]),
                "length": state.length,
                "window_left": state.window_left,
                "begin": state.begin,
                "blocks": [place[block] for block in state.blocks.tolist()],
                "salt": state.chain.salt,
                "entries": [order[entry.number] for entry in state.chain.entries],
                "tail": state.chain.tail.hex(),
                **({} if state.kept is None else {"kept": state.kept.tolist()}),
            }
            for row, state in zip(rows[np.argsort(pool.ids[rows])], states, strict=True)
        ],
    }
    return header, np.fromiter(blocks, np.int32, len(blocks))


def runs_of(header: dict[str, Any]) -> list[list[int]]:
    """The places of all blocks of a file, those that follow each other in a sequence together."""
    left = dict.fromkeys(range(header["num_blocks"]))
    runs = []
    for places in [sequence["blocks"] for sequence in header["sequences"]]:
        runs.append([place for place in places if place in left])
        for place in runs[-1]:
            del left[place]
    return [run for run in (*runs, list(left)) if run]


def recall(header: dict[str, Any], pool: BlockPool, blocks: np.ndarray) -> list[State]:
    """The inverse of `describe`: what is findable in these blocks, and the sequences."""
    entries: list[Entry] = []
    for parent, tokens, place in header["entries"]:
        above = parent if isinstance(parent, str) else entries[parent].number
        block = NO_BLOCK if place == NO_BLOCK else int(blocks[place])
        entries.append(pool.prefixes.insert(Key(above, bytes.fromhex(tokens)), block))
    states = []
    for sequence in header["sequences"]:
        full, tail = [entries[n] for n in sequence["entries"]], bytes.fromhex(sequence["tail"])
        length = len(full) * pool.block_size + len(tail) // TOKEN_DTYPE.itemsize
        chain = Chain(sequence["salt"], full, tail, length)
        states.append(
            State(
                sequence["length"],
                sequence["window_left"],
                sequence["begin"],
                blocks[np.array(sequence["blocks"], np.int64)],
                chain,
                np.array(sequence["kept"], np.int64) if "kept" in sequence else None,
            )
        )
    return states


def read_header(file: BinaryIO, path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The header of a file, after a check that it is of a cache like this one."""
    preamble = file.read(PREAMBLE.size)
    if len(preamble) < PREAMBLE.size or not preamble.startswith(MAGIC):
        raise ValueError(f"{path}: not a file that a cache was saved to")
    _, length, checksum = PREAMBLE.unpack(preamble)
    text = file.read(min(length, os.fstat(file.fileno()).st_size))
    if len(text) < length or zlib.crc32(text) != checksum:
        raise ValueError(f"{path}: its header is cut short or damaged")
    header = json.loads(text)
    if header.get("version") != VERSION:
        raise ValueError(f"{path}: version: expected {VERSION}; the file has {header.get('version')!r}")
    # files from before there was a choice do not name it
    defaults = {"scale_dtype": "float32", "transform": None, "per_head": False}
    known = {"value_head_dim": header.get("head_dim"), **defaults, **header}
    for name, want in identity.items():
        have = known.get(name)
        if name in ("key_format", "value_format") and have not in (want, *FORMATS, *REGISTERED):
            raise ValueError(
                f"{path}: {name}: the file has {have!r}, which is not registered here; "
                f"register_format it, and load the file into a cache of it"
            )
        if have != want:
            raise ValueError(f"{path}: {name}: expected {want!r}; the file has {have!r}")
    return header


def check_payload(file: BinaryIO, path: Path, size: int) -> None:
    """Raise ValueError unless the rest of the file is so many bytes and their checksum."""
    rest = os.fstat(file.fileno()).st_size - file.tell()
    if rest != size + CHECKSUM.size:
        raise ValueError(f"{path}: expected {size + CHECKSUM.size} bytes of blocks; the file has {rest}")
    checksum = 0
    while size:
        data = file.read(min(size, 1 << 22))
        checksum = zlib.crc32(data, checksum)
        size -= len(data)
    if CHECKSUM.unpack(file.read(CHECKSUM.size)) != (checksum,):
        raise ValueError(f"{path}: its blocks are damaged, their checksum differs")


def block_bytes(layout: Layout) -> int:
    return layout.block_size * layout.bytes_per_token()


def _by_block(part: np.ndarray) -> np.ndarray:
    """(num_layers, N, ...) -> (N, bytes)."""
    return np.ascontiguousarray(part.swapaxes(0, 1)).reshape(part.shape[1], -1).view(np.uint8)


def _from_blocks(data: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """(N, bytes) -> the six parts (num_layers, N, ...), as `Backend.read_blocks` gives them."""
    parts, start = [], 0
    for shape, dtype in array_specs(layout, 1):
        stop = start + int(np.prod(shape)) * dtype.itemsize
        part = np.ascontiguousarray(data[:, start:stop]).view(dtype)
        parts.append(part.reshape(len(data), shape[0], *shape[2:]).swapaxes(0, 1))
        start = stop
    return parts


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is whole and on the disk.

    If writing fails, or the process is killed, `path` is what it was. On Linux the file has no name while it is being
    written, so the system removes it with the process. Elsewhere it has a temporary name, and what a killed process
    has left under such a name is removed by the next call for the same path.
    """
    clear_unfinished(path.parent, re.escape(path.name))
    file, name = _open_unfinished(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if name is None:
                # only a rename can take the place of a file that exists, so this one gets a name for a moment
                name = str(path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}"))
                # CPython follows the link in /proc, as it must here, only where a folder is given too
                os.link(f"/proc/self/fd/{file.fileno()}", name, src_dir_fd=0, follow_symlinks=True)
            if sys.platform == "win32":
                file.close()  # Windows renames closed files only; elsewhere the lock holds until it is renamed
            os.replace(name, path)
    except BaseException:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name is on the disk once its folder is
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def clear_unfinished(folder: Path, name: str) -> None:
    """Remove what killed processes have left of files that they were writing with `replacing`.

    Parameters
    ----------
    folder : path
    name : str
        A regular expression for the names of the files that were to be replaced. A file that a living process
        writes stays: it is locked, or, on Windows, cannot be removed while it is open.
    """
    pattern = re.compile(rf"\.(?:{name})\.[0-9a-z_]{{8}}{re.escape(UNFINISHED)}")  # as mkstemp makes names
    for path in folder.iterdir():
        if pattern.fullmatch(path.name):
            with contextlib.suppress(OSError):
                with path.open("rb") as file:
                    if sys.platform != "win32":
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()
                if sys.platform == "win32":
                    path.unlink()


def _open_unfinished(path: Path) -> tuple[BinaryIO, str | None]:
    """A new file in the folder of a path, locked, and its name; None where it has none."""
    if HAS_UNNAMED_FILES:
        try:
            descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:  # what kernels and file systems that do not have it answer
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        else:
            file = os.fdopen(descriptor, "wb")
            _lock(file)
            return file, None
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
        file = os.fdopen(descriptor, "wb")
        _lock(file)
        if os.fstat(descriptor).st_nlink:
            return file, name
        file.close()  # another process removed it before it was locked


def _lock(file: BinaryIO) -> None:
    """Let `clear_unfinished` see that a process writes this file, until it is closed."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is cleared either
            fcntl.flock(file, fcntl.LOCK_EX)
