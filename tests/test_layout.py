"""The house rules: who may import whom, and that the README shows the tree that is there.

`python tests/test_layout.py` prints the tree as the README should have it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "intarsia"

# A package (or a module of the top) imports only itself and those before it. `__main__` and `__init__` of the top are
# entrances: they stand outside and may reach for anything.
ORDER = (
    "errors progress disk heap data_file anatomy recipe checkpoint building calibration evaluation healing planning "
    "tailoring reporting runtimes stages cli"
).split()
WITHOUT_TORCH = ("errors", "progress", "data_file", "anatomy", "recipe")
ENTRANCES = ("__init__", "__main__")
FORBIDDEN_NAMES = ("utils", "util", "helpers", "helper", "common", "misc")

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
# All are parsed before there is a test: the Makefile says why, at PYTEST.
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def home(path: Path) -> str:
    """The package (or the module of the top) that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_package_has_a_place_in_the_order() -> None:
    homes = {home(path) for path in MODULES} - set(ENTRANCES)
    assert homes <= set(ORDER), f"give it a place in the order: {sorted(homes - set(ORDER))}"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_imports_point_upwards(path: Path) -> None:
    if home(path) in ENTRANCES:
        return
    allowed = set(ORDER[: ORDER.index(home(path)) + 1])
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "intarsia":
            continue
        # `from intarsia import anatomy` names a package, `from intarsia import plan` the public index.
        assert len(parts) > 1 and parts[1] in allowed, f"{path}:{line}: {home(path)} must not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_some_imports_have_one_home(path: Path) -> None:
    for line, name in imports(path):
        root = name.split(".")[0]
        if home(path) in WITHOUT_TORCH:
            assert root not in ("torch", "transformers"), f"{path}:{line}: {home(path)} is data and imports no {root}"
        if root == "lm_eval":
            assert path == PACKAGE / "evaluation" / "tasks.py", f"{path}:{line}: only evaluation/tasks.py imports it"


def test_data_packages_load_without_torch() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if home(path) in WITHOUT_TORCH
    ]
    code = f"""if True:
        import sys
        for name in {modules!r}:
            __import__(name)
        print("torch" in sys.modules, "transformers" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("folder", ["intarsia", "tests", "benchmarks"])
def test_no_file_is_named_after_nothing(folder: str) -> None:
    nameless = [path for path in (ROOT / folder).rglob("*.py") if path.stem in FORBIDDEN_NAMES]
    assert not nameless, f"say what is inside: {nameless}"


# The README's tree: two spaces a level, `name/` or `name.py` first on its line (several modules may share one), then
# anything. `__init__.py` and data files need not be shown.
NAME = re.compile(r"[\w*.-]+(?:/|\.\w+)")


def tree_on_disk() -> set[str]:
    shown = {str(path.relative_to(ROOT)) for path in MODULES if path.name != "__init__.py"}
    folders = {str(path.parent.relative_to(ROOT)) + "/" for path in MODULES}
    return shown | folders


def tree_in_text(text: str) -> set[str]:
    found = set()
    folders: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if not words or not NAME.fullmatch(words[0]):
            continue
        level = (len(line) - len(line.lstrip())) // 2
        folders = folders[:level]
        for word in words:
            if not NAME.fullmatch(word):
                break
            if word.endswith("/"):
                folders.append(word)
                found.add("".join(folders))
                break
            if word.endswith(".py") and word != "__init__.py":
                found.add("".join(folders) + word)
    return found


def test_tree_in_readme_is_the_tree_on_disk() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.search(r"<!-- tree -->(.*?)<!-- /tree -->", text, flags=re.DOTALL)
    assert marked, "README.md shows the tree between <!-- tree --> and <!-- /tree -->"
    shown, there = tree_in_text(marked[1]), tree_on_disk()
    # Folders of data may be shown, where they exist.
    shown = {name for name in shown if not ((ROOT / name).is_dir() and not list((ROOT / name).glob("*.py")))}
    assert not there - shown, f"not in the README: {sorted(there - shown)}"
    assert not shown - there, f"in the README, but not there: {sorted(shown - there)}"


def test_tree_reader() -> None:
    text = """
    ```
    """
    assert tree_in_text(text) == set()
    text = """
intarsia/
  __init__.py   the public index
  a.py b.py     both
  c/            WORDS in capitals
    d.py e.py, f.py of another kind
  g/
    h.toml
"""
    names = "intarsia/ intarsia/a.py intarsia/b.py intarsia/c/ intarsia/c/d.py intarsia/g/"
    assert tree_in_text(text) == set(names.split())


def print_tree() -> None:
    """The tree with the first sentence of each module."""

    def purpose(path: Path) -> str:
        text = ast.get_docstring(TREES[path]) or ""
        return " ".join(text.split("\n\n")[0].split())

    def visit(folder: Path, level: int) -> None:
        name = "  " * level + folder.name + "/"
        print(f"{name:<28}{purpose(folder / '__init__.py') if (folder / '__init__.py').exists() else ''}".rstrip())
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                name = "  " * (level + 1) + path.name
                print(f"{name:<28}{purpose(path)}".rstrip())
        inner = [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
        for path in sorted(inner, key=lambda path: ORDER.index(path.name) if path.name in ORDER else 99):
            visit(path, level + 1)

    visit(PACKAGE, 0)


if __name__ == "__main__":
    print_tree()
