"""Sequences in host memory, in swap files, in saved files, and back bit for bit; and what can go wrong."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import one_file

import kvnumba
from kvnumba.caches import snapshot, swap

H, D = 2, 8
FORMATS = [("float32", "float32"), ("float16", "bfloat16"), ("int8", "int4")]


@pytest.fixture(params=FORMATS, ids="-".join)
def make(request, backend):
    key_format, value_format = request.param

    def make(num_blocks=24, **options):
        options = {"key_format": key_format, "value_format": value_format, "backend": backend, **options}
        return kvnumba.PagedKVCache(num_blocks, 4, H, D, 5, num_layers=2, **options)

    return make


def write(cache, seq_id, tokens, normal):
    for layer in range(cache.num_layers):
        told = {"token_ids": tokens} if layer == 0 else {}
        cache.update(seq_id, normal(H, len(tokens), D), normal(H, len(tokens), D), layer=layer, **told)


def contents(cache, seq_id):
    return [part for layer in range(cache.num_layers) for part in cache.get_kv(seq_id, layer=layer)]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


class TestSwap:
    @pytest.mark.parametrize("in_file", [False, True])
    def test_there_and_back(self, make, in_file, tmp_path, normal):
        cache = make(num_blocks=6)
        path = tmp_path / "swap" if in_file else None
        a, b = cache.add_sequence(), cache.add_sequence()
        write(cache, a, b"abcdefghij", normal)
        want = contents(cache, a)
        cache.swap_out(a, path)
        assert cache.num_free_blocks == 6
        assert cache.seq_lens == {a: 10, b: 0}
        write(cache, b, bytes(24), normal)  # over all of it
        with pytest.raises(kvnumba.CacheFull, match="3 more blocks of 4 tokens are needed, 0 of 6 are free"):
            cache.swap_in(a)
        cache.truncate(b, 12)
        cache.swap_in(a)
        assert_same(contents(cache, a), want)
        assert path is None or not path.exists()
        cache.check_integrity()

    def test_blocks_that_are_still_cached_are_taken_as_they_are(self, make, normal, monkeypatch):
        cache = make()
        a = cache.add_sequence()
        write(cache, a, b"abcdefghij", normal)
        want, table = contents(cache, a), cache.block_table(a).tolist()
        cache.swap_out(a)
        assert cache.stats().cached_blocks == 2
        filled = []
        real = type(cache._backend).write_blocks
        monkeypatch.setattr(
            type(cache._backend),
            "write_blocks",
            lambda self, buffers, blocks, *parts: (
                filled.append(len(blocks)),
                real(self, buffers, blocks, *parts),
            )[1],
        )
        cache.swap_in(a)
        assert filled == [1]
        assert cache.block_table(a).tolist()[:2] == table[:2]
        assert_same(contents(cache, a), want)

    def test_shared_blocks_stay_with_the_others(self, make, normal):
        cache = make()
        a = cache.add_sequence()
        write(cache, a, b"abcdef", normal)
        want = contents(cache, a)
        b = cache.fork(a)
        cache.swap_out(b)
        write(cache, a, b"ghi", normal)
        cache.swap_in(b)
        assert_same(contents(cache, b), want)
        cache.check_integrity()

    def test_what_a_swapped_sequence_can_do(self, make, tmp_path, normal):
        cache = make()
        a, b = cache.add_sequence(), cache.add_sequence()
        write(cache, a, b"abcdef", normal)
        cache.swap_out(a, tmp_path / "swap")
        k = normal(H, 1, D)
        for call in (
            lambda: cache.update(a, k, k),
            lambda: cache.get_kv(a),
            lambda: cache.fork(a),
            lambda: cache.truncate(a, 1),
            lambda: cache.reorder([b], [a]),
            lambda: cache.swap_out(a),
            lambda: cache.save(tmp_path / "saved"),
        ):
            with pytest.raises(ValueError, match=f"seq_id: sequence {a} is swapped out"):
                call()
        with pytest.raises(ValueError, match=f"sequence {b} is not swapped out"):
            cache.swap_in(b)
        cache.finish_sequence(a)
        assert os.listdir(tmp_path) == []
        assert cache.stats().swapped_sequences == 0

    def test_a_full_disk_and_a_file_that_exists(self, make, tmp_path, normal, monkeypatch):
        cache = make()
        a = cache.add_sequence()
        write(cache, a, b"abcdef", normal)
        want = contents(cache, a)
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(FileExistsError):
            cache.swap_out(a, tmp_path / "taken")
        assert (tmp_path / "taken").read_text() == "mine"

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(swap, "_reserve", full)
        with pytest.raises(OSError, match="No space left"):
            cache.swap_out(a, tmp_path / "swap")
        assert os.listdir(tmp_path) == ["taken"]
        assert_same(contents(cache, a), want)


class TestSave:
    def fill(self, cache, normal):
        """A finished sequence, a live one with its prefix, a fork of that and one with a window."""
        a = cache.add_sequence(b"abcdefghij", cache_salt="tenant")
        write(cache, a, b"abcdefghij", normal)
        b = cache.add_sequence(b"abcdefghxy", cache_salt="tenant")
        cached = cache.seq_len(b)
        assert cached == 8
        write(cache, b, b"xy", normal)
        cache.finish_sequence(a)
        c = cache.fork(b)
        write(cache, c, b"zzzz", normal)
        d = cache.add_sequence(window_left=3)
        write(cache, d, b"0123456789", normal)
        write(cache, d, b"01", normal)
        return [b, c, d]

    def test_a_restart(self, make, tmp_path, normal):
        cache = make()
        live = self.fill(cache, normal)
        cache.save(tmp_path / "saved", fingerprint="model")
        other = make(num_blocks=40)
        other.add_sequence()
        ids = other.load(tmp_path / "saved", fingerprint="model")
        assert list(ids) == live
        other.check_integrity()
        for seq_id in live:
            assert_same(contents(other, ids[seq_id]), contents(cache, seq_id))
            assert other.seq_lens[ids[seq_id]] == cache.seq_lens[seq_id]
        was, now = cache.stats(), other.stats()
        for name in ("used_blocks", "shared_blocks", "cached_blocks", "num_tokens", "wasted_bytes"):
            assert getattr(now, name) == getattr(was, name)
        for tokens in (b"abcdefgh!", b"abcdefghxyzz!"):  # what could be found can be found
            pairs = [(n := c.add_sequence(tokens, cache_salt="tenant"), c.seq_len(n)) for c in (cache, other)]
            assert pairs[0][1] == pairs[1][1] > 0
            assert_same(*(contents(c, seq_id) for c, (seq_id, _) in zip((cache, other), pairs, strict=True)))
            cache.finish_sequence(pairs[0][0])
            other.finish_sequence(pairs[1][0])
        write(other, ids[live[0]], b"more", normal)
        other.check_integrity()

    def test_into_another_backend(self, make, backend, tmp_path, normal):
        cache = make()
        live = self.fill(cache, normal)
        cache.save(tmp_path / "saved")
        other = make(backend="numpy")
        ids = other.load(tmp_path / "saved")
        assert_same(contents(other, ids[live[0]]), contents(cache, live[0]))

    @one_file
    def test_files_that_do_not_fit_change_nothing(self, make, tmp_path, normal):
        cache = make()
        self.fill(cache, normal)
        path = tmp_path / "saved"
        cache.save(path, fingerprint="model")
        good = path.read_bytes()
        other = make()
        kept = other.add_sequence()
        write(other, kept, b"abcdefg", normal)
        want, stats = contents(other, kept), other.stats()

        def refused(error, match, cache=other, fingerprint="model"):
            with pytest.raises(error, match=match):
                cache.load(path, fingerprint=fingerprint)
            assert cache.stats() == (stats if cache is other else cache.stats())

        refused(ValueError, "fingerprint: expected 'other'; the file has 'model'", fingerprint="other")
        for cut in (0, 5, 15, 25, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:cut])
            refused(ValueError, "not a file|cut short|bytes of blocks")
        path.write_bytes(good + b"x")
        refused(ValueError, "bytes of blocks")
        for place in (0, 9, 30, len(good) // 2, len(good) - 10, len(good) - 1):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            refused(ValueError, "not a file|damaged|cut short|checksum")
        path.write_bytes(b"PK\x03\x04" + good)
        refused(ValueError, "not a file that a cache was saved to")
        path.write_bytes(good)
        wider = kvnumba.PagedKVCache(24, 8, H, D, 5, num_layers=2, backend="numpy")
        refused(ValueError, "block_size: expected 8; the file has 4", cache=wider)
        refused(kvnumba.CacheFull, "more blocks of 4 tokens are needed, 3 of 3", cache=make(num_blocks=3))
        path.unlink()
        refused(FileNotFoundError, "saved")
        assert_same(contents(other, kept), want)
        other.check_integrity()

    @one_file
    def test_another_version_is_named(self, make, tmp_path):
        cache = make()
        path = tmp_path / "saved"
        cache.save(path)
        data = path.read_bytes()
        _, length, _ = snapshot.PREAMBLE.unpack(data[: snapshot.PREAMBLE.size])
        header = json.loads(data[snapshot.PREAMBLE.size : snapshot.PREAMBLE.size + length])
        text = json.dumps({**header, "version": 99}).encode()
        rest = data[snapshot.PREAMBLE.size + length :]
        path.write_bytes(snapshot.PREAMBLE.pack(snapshot.MAGIC, len(text), zlib.crc32(text)) + text + rest)
        with pytest.raises(ValueError, match="version: expected 1; the file has 99"):
            cache.load(path)

    @one_file
    def test_a_full_disk_leaves_the_old_file(self, make, tmp_path, normal, monkeypatch):
        cache = make()
        self.fill(cache, normal)
        path = tmp_path / "saved"
        path.write_bytes(b"what was there")

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cache.save(path)
        assert path.read_bytes() == b"what was there"
        assert os.listdir(tmp_path) == ["saved"]
        cache.check_integrity()

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
    def test_a_disk_that_is_full_while_writing(self, make, tmp_path, normal, monkeypatch):
        cache = make()
        self.fill(cache, normal)

        def full(path):
            return Path("/dev/full").open("wb"), str(path.with_name("temporary"))

        monkeypatch.setattr(snapshot, "_open_unfinished", full)
        with pytest.raises(OSError, match="No space left"):
            cache.save(tmp_path / "saved")
        assert os.listdir(tmp_path) == []


UNFINISHED = ".saved.0a_9b8c7.tmp"


def test_what_a_killed_process_left_is_cleared(tmp_path):
    others = {
        ".saved.tmp",
        ".other.0a_9b8c7.tmp",
        "saved.0a_9b8c7.tmp",
        ".saved.0a_9b8c7.tmp.x",
        ".saved.A.tmp",
    }
    for name in (UNFINISHED, *others):
        (tmp_path / name).write_bytes(b"x")
    with snapshot.replacing(tmp_path / "saved") as file:
        file.write(b"new")
    assert (tmp_path / "saved").read_bytes() == b"new"
    assert set(os.listdir(tmp_path)) == {"saved", *others}


@pytest.fixture(params=["unnamed", "named"])
def temporary(request, monkeypatch):
    """How a file is written that is not whole yet: without a name, where the system can do that, or with one."""
    if request.param == "named":
        monkeypatch.setattr(snapshot, "HAS_UNNAMED_FILES", False)
    elif not snapshot.HAS_UNNAMED_FILES:
        pytest.skip("the system has no unnamed files")
    return request.param


class TestReplacing:
    def test_one_process_leaves_what_another_writes(self, temporary, tmp_path):
        path = tmp_path / "saved"
        with snapshot.replacing(path) as first:
            assert len(os.listdir(tmp_path)) == (temporary == "named")
            first.write(b"first")
            with snapshot.replacing(path) as second:
                second.write(b"second")
            assert path.read_bytes() == b"second"
        assert path.read_bytes() == b"first"
        assert os.listdir(tmp_path) == ["saved"]

    def test_a_failure_leaves_what_was_there(self, temporary, tmp_path):
        path = tmp_path / "saved"
        path.write_bytes(b"old")
        with contextlib.suppress(KeyboardInterrupt), snapshot.replacing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["saved"]

    def test_a_file_system_without_unnamed_files(self, tmp_path, monkeypatch):
        real = os.open

        def refuse(path, flags, *args):
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return real(path, flags, *args)

        if not snapshot.HAS_UNNAMED_FILES:
            pytest.skip("the system has no unnamed files")
        monkeypatch.setattr(os, "open", refuse)
        with snapshot.replacing(tmp_path / "saved") as file:
            file.write(b"new")
            assert len(os.listdir(tmp_path)) == 1
        assert os.listdir(tmp_path) == ["saved"]


@one_file
@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by a signal")
@pytest.mark.parametrize("unnamed", [True, False])
def test_a_process_killed_while_saving(backend, unnamed, tmp_path, rng):
    """The file is the old one or a new one, whole, whenever the end comes; nothing else stays after the next save."""
    path = tmp_path / "saved"
    code = f"""
import numpy as np, kvnumba
from kvnumba.caches import snapshot
snapshot.HAS_UNNAMED_FILES &= {unnamed}
cache = kvnumba.PagedKVCache(300, 16, 2, 32, 1, backend={backend!r})
seq_id = cache.add_sequence()
for n in range(1, 10_000):
    k = np.full((2, 1 if n > 1 else 4000, 32), n, np.float32)
    cache.update(seq_id, k, k)
    cache.save({str(path)!r})
    print(n, flush=True)
"""
    for wait in (0.0, *rng.uniform(0, 0.02, 3)):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(os.listdir(tmp_path)) <= 2  # the file, and what this process left
        cache = kvnumba.PagedKVCache(600, 16, 2, 32, 1, backend=backend)
        ((_, seq_id),) = cache.load(path).items()
        length = cache.seq_lens[seq_id]
        assert length >= 4000
        assert (cache.get_kv(seq_id)[0][:, -1] == length - 3999).all()
    cache.save(path)
    assert os.listdir(tmp_path) == ["saved"]
