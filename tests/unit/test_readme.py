"""The examples in the papers run as they stand, and their tables and links say what is there."""

import re
import textwrap
from pathlib import Path

import pytest

from kvnumba.backends.registry import BACKENDS
from kvnumba.formats import FORMATS
from kvnumba.storage import Layout

ROOT = Path(__file__).parents[2]
PAPERS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in (ROOT, ROOT / "kvnumba", ROOT / "benchmarks")
    for path in sorted(folder.rglob("README.md") if folder != ROOT else folder.glob("*.md"))
}
"""Path -> text."""

EXAMPLES = [
    pytest.param(textwrap.dedent(code), id=f"{name}-{number}")
    for name, text in PAPERS.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE))
]


def table(name, heading):
    """The rows of the first table under a heading of a paper, as lists of cells."""
    section = re.split(rf"^#+ {heading}\n", PAPERS[name], maxsplit=1, flags=re.MULTILINE)[1]
    lines = re.search(r"(^\|.*\n)+", section, re.MULTILINE).group().splitlines()
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def anchors(text):
    """What links to the headings of a paper end in, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, capsys, backend, monkeypatch):
    if "integrations.transformers" in code:
        pytest.importorskip("torch", reason="the transformers extra is not installed")
    monkeypatch.setenv("KVNUMBA_BACKEND", backend)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*\)  # (.+)", code):
        assert expected in printed


@pytest.mark.parametrize("name", PAPERS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", PAPERS[name]):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            found = ((ROOT / name).parent / path).resolve() if path else ROOT / name
            assert found.exists(), target
            if anchor:
                assert anchor in anchors(PAPERS[str(found.relative_to(ROOT))]), target


def test_the_table_of_formats():
    rows = {row[0]: row for row in table("kvnumba/backends/README.md", "The formats")}
    assert list(rows) == list(FORMATS)
    for name in FORMATS:
        size = Layout.of(1, 1, 1, 128, name).bytes_per_token()
        assert int(rows[name][2]) == size
        assert float(rows[name][3]) == pytest.approx(size / 1024, abs=5e-4)


def test_the_table_of_backends():
    assert {row[0] for row in table("README.md", "Backends")} == set(BACKENDS)


def test_the_front_page_is_short():
    assert len(PAPERS["README.md"].splitlines()) <= 200


def test_there_is_one_line_for_the_demo_and_one_for_the_tests():
    lines = re.findall(r"^python3 -m venv .*$", PAPERS["README.md"], re.MULTILINE)
    assert [("kvnumba demo" in line, "pytest" in line) for line in lines] == [(True, False), (False, True)]
