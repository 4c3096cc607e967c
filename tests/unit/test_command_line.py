"""python -m kvnumba."""

import re

import pytest

from kvnumba import __main__ as command_line
from kvnumba.commands.timing import Timing, in_turns
from kvnumba.formats import FORMATS

DEMO = ["demo", "--bytes", "60", "--new", "3", "--backend", "numpy"]


@pytest.mark.parametrize("name", ["cuda", "cud"])
def test_info_of_a_choice_that_cannot_run(name, capsys, monkeypatch):
    monkeypatch.setenv("KVNUMBA_BACKEND", name)
    command_line.main(["info"])
    chosen = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("chosen backend"))
    assert "none: " in chosen


def test_info_says_why(capsys):
    command_line.main(["info"])
    out = capsys.readouterr().out
    for pattern in (
        r"^numpy +\d",
        r"^backend cuda +(yes|no: .*(numba-cuda|CUDA))",
        r"^backend numpy +yes",
        r"^threads +\d+ of",
        r"^threading layer +\w",
    ):
        assert re.search(pattern, out, re.MULTILINE), pattern


def test_memory(capsys):
    command_line.main(["memory", "--preset", "llama-3-70b", "--layers", "2", "--batch", "3"])
    out = capsys.readouterr().out
    assert "KV cache: 2 layers, 8 KV heads of 128, batch 3" in out
    assert "int4" in out


def test_memory_of_another_shape(capsys):
    command_line.main(["memory", "--preset", "llama-3-8b", "--kv-heads", "4", "--head-dim", "64"])
    assert "KV cache: 32 layers, 4 KV heads of 64, batch 1" in capsys.readouterr().out


def test_memory_refuses(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["memory", "--head-dim", "7"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "kvnumba memory: head_dim: expected an even number, int4 packs pairs; got 7\n"
    )


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command_line.main(["demo"])
    assert stop.value.code == "kvnumba demo needs tqdm: pip install 'kvnumba[demo]'"


class TestDemo:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        pytest.importorskip("tqdm", reason="the demo extra is not installed")
        monkeypatch.setattr("kvnumba.commands.texts.NUM_NAMES", 8)

    def test_table_and_text(self, capsys):
        command_line.main(DEMO)
        out = capsys.readouterr().out
        rows = {
            line.split()[0]: line.split()[1:]
            for line in out.splitlines()
            if re.match(r"(float|int)\d+ +\d", line)
        }
        assert list(rows) == ["float32", "float16", "int8", "int4"]
        # 60 bytes of text in 4 layers of 2 heads of 64
        assert [rows[fmt][0] for fmt in rows] == ["245,760", "122,880", "69,120", "34,560"]
        assert rows["float32"][5:] == ["100.00%", "0.0e+00", "100%"]
        assert rows["float16"][7] == rows["int8"][7] == "100%"
        assert all(f"--- {fmt} writes on ---" in out for fmt in rows)

    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib", reason="the demo extra is not installed")
        command_line.main([*DEMO, "--plot", str(tmp_path / "table.png")])
        assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--prompt", "/no/such/file"], "No such file or directory"),
            (["--model", "/no/such/folder"], "expected a checkpoint folder with a config.json"),
            (["--bytes", "9000"], "together at most the model's 8192 positions; got 9000 and"),
            (["--bytes", "0"], "--bytes, --new: expected at least 1 and 0"),
            (["--new", "-1"], "--bytes, --new: expected at least 1 and 0"),
        ],
    )
    def test_mistakes_are_one_line(self, capsys, options, message):
        with pytest.raises(SystemExit) as stop:
            command_line.main([*DEMO, *options])
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("kvnumba demo: ")
        assert message in last

    def test_an_empty_prompt(self, tmp_path, capsys):
        (tmp_path / "empty").write_bytes(b"")
        with pytest.raises(SystemExit):
            command_line.main([*DEMO, "--prompt", str(tmp_path / "empty")])
        assert "is empty" in capsys.readouterr().err


class TestBench:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr("kvnumba.commands.bench.CONTEXTS", (128, 256))
        monkeypatch.setattr("kvnumba.commands.bench.torch_peers", dict)

    def test_a_row_for_each_format(self, capsys):
        command_line.main(["bench", "--backend", "numpy"])
        lines = capsys.readouterr().out.splitlines()
        assert [name for line in lines for name in line.split()[:1] if name in FORMATS] == list(FORMATS)

    @pytest.mark.parametrize(("slowest", "busy"), [(10e-3, True), (1.4e-3, False)])
    def test_repeats_that_differ(self, capsys, monkeypatch, slowest, busy):
        timing = Timing(median=1.2e-3, fastest=1e-3, slowest=slowest)
        monkeypatch.setattr("kvnumba.commands.bench.repeated", lambda call: timing)
        command_line.main(["bench", "--backend", "numpy"])
        out = capsys.readouterr().out
        assert ("busy machine" in out) == busy
        assert (", took 1.2 ms (between 1 and 10)" in out) == busy
        assert out.count(")*") == (12 if busy else 0)

    def test_plot(self, capsys, monkeypatch, tmp_path):
        pytest.importorskip("matplotlib", reason="the bench extra is not installed")
        command_line.main(["bench", "--backend", "numpy", "--plot", str(tmp_path / "table.png")])
        assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_calls_take_turns():
    order = []
    found = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3, before=order.append)
    assert order == list("aabb" * 4)
    assert list(found) == ["a", "b"]
    assert all(0 < t.fastest <= t.median <= t.slowest for t in found.values())


def test_a_disturbed_timing():
    assert Timing(1.0, 0.8, 1.3).disturbed
    assert not Timing(1.0, 0.9, 1.3).disturbed
