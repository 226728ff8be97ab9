"""The house rules: who may import whom, and what loads without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "intarsia"

# A package (or a module of the top) imports only itself and those before it. `__main__` and `__init__` of the top are
# entrances: they stand outside and may reach for anything.
ORDER = (
    "errors flags options registry progress disk run_dir heap anatomy recipe checkpoint building calibration "
    "evaluation healing planning tailoring reporting runtimes stages cli"
).split()
WITHOUT_TORCH = ("errors", "flags", "options", "registry", "progress", "anatomy", "recipe")
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


def test_every_package_has_a_place_in_the_order() -> None:
    homes = {home(path) for path in MODULES} - set(ENTRANCES)
    assert homes <= set(ORDER), f"give it a place in the order: {sorted(homes - set(ORDER))}"


def test_imports_point_upwards() -> None:
    wrong = []
    for path in MODULES:
        if home(path) in ENTRANCES:
            continue
        allowed = set(ORDER[: ORDER.index(home(path)) + 1])
        for line, name in imports(path):
            parts = name.split(".")
            # `from intarsia import registry` names a module, `from intarsia import plan` the public index.
            if parts[0] == "intarsia" and not (len(parts) > 1 and parts[1] in allowed):
                wrong.append(f"{path}:{line}: {home(path)} must not import {name}")
    assert not wrong, "\n".join(wrong)


def test_some_imports_have_one_home() -> None:
    wrong = []
    for path in MODULES:
        for line, name in imports(path):
            root = name.split(".")[0]
            if home(path) in WITHOUT_TORCH and root in ("torch", "transformers"):
                wrong.append(f"{path}:{line}: {home(path)} is data and imports no {root}")
            if root == "lm_eval" and path != PACKAGE / "evaluation" / "tasks.py":
                wrong.append(f"{path}:{line}: only evaluation/tasks.py imports it")
    assert not wrong, "\n".join(wrong)


def test_data_packages_load_without_torch() -> None:
    """What `--help` imports, too: the parser, the verbs, and what registers itself."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if home(path) in (*WITHOUT_TORCH, "commands")
    ]
    code = f"""if True:
        import sys
        for name in {modules!r}:
            __import__(name)
        from intarsia import registry
        from intarsia.cli import main
        for kind in registry.KINDS:
            kind.names
        print("torch" in sys.modules, "transformers" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_no_file_is_named_after_nothing() -> None:
    folders = ("intarsia", "tests", "benchmarks")
    nameless = [path for each in folders for path in (ROOT / each).rglob("*.py") if path.stem in FORBIDDEN_NAMES]
    assert not nameless, f"say what is inside: {nameless}"
