"""The order of the rooms: nothing imports from a later one, and there is no circle."""

import ast
from pathlib import Path

import kvnumba

ROOT = Path(kvnumba.__file__).parent
ORDER = [
    "ground",
    "blocks",
    "backends",
    "attention",
    "caches",
    "policies",
    "models",
    "commands",
    "integrations",
]
"""`ground` are the files beside the folders; `__init__.py` and `__main__.py` stand above all."""


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imported(path):
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found = name if name in MODULES else name.rpartition(".")[0]
            if found in MODULES and found != "kvnumba":
                yield found


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[1]).is_dir() else "ground"


def test_every_folder_has_its_place_in_the_order():
    assert {room(module) for module in MODULES} == set(ORDER)


def test_nothing_is_imported_from_a_later_room():
    late = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if module not in ("kvnumba", "kvnumba.__main__")
        for other in imported(path)
        if ORDER.index(room(other)) > ORDER.index(room(module))
    ]
    assert late == []


def test_backends_do_not_know_each_other():
    for module, path in MODULES.items():
        if module.startswith(("kvnumba.backends.cpu", "kvnumba.backends.cuda")):
            mine = module.split(".")[2]
            others = [name for name in imported(path) if name.startswith("kvnumba.backends.")]
            assert [name for name in others if name.split(".")[2] not in (mine, "protocol", "mods")] == [], (
                module
            )


def test_block_management_is_integers_only():
    """The folder of blocks imports nothing that touches floats, and names no dtype of them."""
    for module, path in MODULES.items():
        if room(module) == "blocks":
            assert not {"kvnumba.formats", "kvnumba.arrays", "kvnumba.options"} & set(imported(path)), module
            assert "np.float" not in path.read_text(), module


def test_there_is_no_circle():
    graph = {module: set(imported(path)) for module, path in MODULES.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            path.append(module)
            for other in graph[module]:
                visit(other)
            done.add(path.pop())

    for module in graph:
        visit(module)
