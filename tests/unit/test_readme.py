"""The README's example runs as it stands, and its tables say what the code does."""

import re
from pathlib import Path

import pytest

from kvnumba.backends.registry import BACKENDS
from kvnumba.formats import FORMATS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def table(heading):
    """The rows of the first table under a heading, as lists of cells."""
    section = README.split(f"## {heading}\n", 1)[1]
    lines = re.search(r"(^\|.*\n)+", section, re.MULTILINE).group().splitlines()
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_examples_run(number, capsys, backend, monkeypatch):
    monkeypatch.setenv("KVNUMBA_BACKEND", backend)
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*\)  # (.+)", code):
        assert expected in printed


def test_the_table_of_formats():
    rows = {row[0]: row for row in table("Formats")}
    assert list(rows) == list(FORMATS)
    for name, fmt in FORMATS.items():
        assert int(rows[name][2]) == 2 * fmt.row_bytes(128, 128)
        assert float(rows[name][3]) == pytest.approx(fmt.row_bytes(128, 128) / 512, abs=5e-4)


def test_the_table_of_backends():
    assert {row[0] for row in table("Backends")} == set(BACKENDS)


def test_there_is_one_line_for_the_demo_and_one_for_the_tests():
    lines = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert [("kvnumba demo" in line, "pytest" in line) for line in lines] == [(True, False), (False, True)]
