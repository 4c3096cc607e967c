"""python -m kvnumba."""

import re

import pytest

from kvnumba import __main__ as command_line
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


def test_memory_refuses(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["memory", "--head-dim", "7"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "kvnumba memory: head_dim: expected an even number, int4 packs pairs; got 7\n"
    )


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setattr(command_line.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command_line.main(["demo"])
    assert stop.value.code == "kvnumba demo needs tqdm: pip install 'kvnumba[demo]'"


class TestDemo:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        pytest.importorskip("tqdm", reason="the demo extra is not installed")
        monkeypatch.setattr("kvnumba.commands.demo.NUM_NAMES", 8)

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
        assert [rows[fmt][0] for fmt in rows] == ["245,760", "122,880", "69,120", "38,400"]
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


def test_bench(capsys, monkeypatch):
    monkeypatch.setattr("kvnumba.commands.bench.CONTEXTS", (128, 256))
    monkeypatch.setattr("kvnumba.commands.bench.torch_peers", dict)
    command_line.main(["bench", "--backend", "numpy"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if re.match(r"(float|bfloat|int)\d+ ", line)] == list(FORMATS)
