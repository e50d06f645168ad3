"""The package's structure: imports run one way, rooms are small, and the page that describes them is true."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_periln"
PAGE = ROOT / "docs" / "architecture.md"
MOST_FILES = 16  # "about fifteen" beside __init__.py

LOWER = {
    "norms": {"patches"},
    "patches": set(),
    "cpu": {"patches"},
    "data": {"patches"},
    "monitor": {"norms", "patches"},
    "checkpoints": {"endings", "norms", "patches"},
    "endings": set(),
    "models": {"checkpoints", "norms", "patches"},
    "report": {"monitor"},
    "evaluation": set(),
    "convert": {"checkpoints", "data", "evaluation", "models", "norms"},
    "training": {"checkpoints", "cpu", "data", "models", "monitor", "norms", "patches"},
    "doctor": {"cpu", "data", "training"},
    "studies": {"cpu", "data", "monitor", "training"},
    "plan": {"cpu", "data", "models", "norms", "patches", "report", "training"},
    "tools": {"convert", "cpu", "data", "evaluation", "report"},
}
"""What each folder may import; files of the top level that are no folder's are free to all."""


def modules(package: Path) -> dict[str, Path]:
    """Return the package's modules by their dotted names."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a file imports, wherever in it, but for type checkers alone."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def find_circle(package: Path) -> list[str]:
    """Return the modules of one circle of imports, [] if there is none.

    A package's own ``__init__`` that hands on names is not what its modules import when they import each
    other.
    """
    known = modules(package)
    arrows = {name: sorted(set(imports(name, path, known)) - {name}) for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for below in arrows[name]:
            if circle := visit(below, [*above, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in arrows if (circle := visit(name, []))), [])


def test_no_circle_of_imports() -> None:
    """Those inside functions included."""
    assert find_circle(PACKAGE) == []


@pytest.mark.parametrize("late", ["from p.a import f", "def g():\n    import p.a"])
def test_a_circle_is_found(tmp_path: Path, late: str) -> None:
    """The negative control."""
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("from p import b\n")
    (package / "b.py").write_text("from p.c import x\n")
    (package / "c.py").write_text("x = 1\n")
    assert find_circle(package) == []
    (package / "c.py").write_text(f"{late}\nx = 1\n")
    assert find_circle(package) == ["p.a", "p.b", "p.c", "p.a"]


def test_folders_know_only_those_below() -> None:
    """Tests and tools excepted, which are at the top."""
    known = modules(PACKAGE)
    wrong = []
    for name, path in known.items():
        folder = name.split(".")[1] if name.count(".") else ""
        if folder in LOWER:
            for other in set(imports(name, path, known)):
                below = other.split(".")[1] if other.count(".") else ""
                if below in LOWER and below != folder and below not in LOWER[folder]:
                    wrong.append(f"{name} -> {other}")
    assert wrong == []
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == LOWER.keys()


def unexplained(source: str) -> list[int]:
    """Return the lines of imports inside functions with no comment on them, nor above a run of them."""
    lines, wrong = source.splitlines(), []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    first = node.lineno - 1
                    while first and re.match(r"\s*(import |from |$)", lines[first - 1]):
                        first -= 1
                    block = lines[max(first - 1, 0) : node.end_lineno]
                    if not any("#" in line for line in block):
                        wrong.append(node.lineno)
    return sorted(set(wrong))


def test_imports_inside_functions_say_why() -> None:
    """Which start-up time they save, or what must come first."""
    found = {str(path.relative_to(ROOT)): unexplained(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_an_import_without_a_reason_is_found() -> None:
    assert unexplained("def f():\n    import json\n") == [2]
    assert unexplained("def f():\n    import json  # 10 ms\n    import re\n") == []
    assert unexplained("def f():\n    # Two seconds.\n    import torch\n\n    import numpy\n") == []


def test_folders_are_small() -> None:
    sizes = {
        folder: len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        for folder in PACKAGE.rglob("*")
        if folder.is_dir()
    }
    assert {str(folder): size for folder, size in sizes.items() if size > MOST_FILES} == {}


def test_the_page_has_a_line_for_each_folder() -> None:
    """And each path that it names is there."""
    text = PAGE.read_text()
    tree = {
        str(folder.relative_to(PACKAGE)) + "/"
        for folder in PACKAGE.rglob("*")
        if (folder / "__init__.py").exists()
    }
    assert tree - set(re.findall(r"^\s*`?([a-z_/]+/)`?\s", text, re.MULTILINE)) == set()
    for link in re.findall(r"\]\((\.\./[^)#]+)", text):
        assert (PAGE.parent / link).exists(), link
