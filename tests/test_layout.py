"""The layout of the package: order of packages, no import circle, no torch on import, documented public names."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import intarsia

ROOT = Path(intarsia.__file__).resolve().parent
# A package (or module of the top) imports only itself and those before it. `__init__` and `__main__` are entrances.
ORDER = (
    "errors disk data_file progress flags model_name options registry run_dir architecture recipe inspection "
    "checkpoint building data activations evaluation healing pruning tailoring reporting exporting commands cli"
).split()
WITHOUT_TORCH = (
    "errors",
    "disk",
    "data_file",
    "progress",
    "flags",
    "model_name",
    "options",
    "registry",
    "run_dir",
    "architecture",
    "recipe",
)
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): tree for path, tree in SOURCES.items()}


def imported(tree: ast.Module, *, at_start: bool) -> Iterator[str]:
    """Modules that a module imports; `at_start` leaves out imports inside functions and for type checkers."""
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES)


def test_a_package_imports_itself_and_those_above() -> None:
    faults = []
    for module, tree in MODULES.items():
        place = module.removeprefix("intarsia").lstrip(".").partition(".")[0]
        if place in ("", "__main__"):
            continue
        for name in imported(tree, at_start=False):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top == "intarsia" and other in ORDER and ORDER.index(other) > ORDER.index(place):
                faults.append(f"{module} imports {name}")
            if name == "torch" and place in WITHOUT_TORCH:
                faults.append(f"{module} imports torch")
    assert faults == []


def test_no_import_circle() -> None:
    graph = {
        module: {name for name in imported(tree, at_start=True) if name in MODULES} for module, tree in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module] - {module}):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        if module != "intarsia":  # what it exports is loaded when it is first asked for
            visit(module, ())


def test_importing_the_package_or_asking_for_help_imports_no_torch() -> None:
    code = """if True:
        import sys
        import intarsia
        from intarsia import registry
        from intarsia.cli import main
        main.run(["--help"])
        for kind in registry.KINDS:
            kind.names  # imports what is built in
        for name in main.VERBS:
            main.function(name)
        sys.exit("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout and "anatomy check" in done.stdout


def test_what_only_some_commands_need_is_imported_by_them() -> None:
    late = {"matplotlib", "lm_eval", "datasets", "pyarrow", "peft", "accelerate", "smac", "dask", "distributed", "gguf"}
    faults = [
        f"{module} imports {name}"
        for module, tree in MODULES.items()
        for name in imported(tree, at_start=True)
        if name.partition(".")[0] in late
    ]
    assert faults == []


def test_public_names_are_documented_and_functions_take_at_most_eight_parameters() -> None:
    faults = [name for name in intarsia.__all__ if not inspect.getdoc(getattr(intarsia, name))]
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([a for a in arguments if a.arg not in ("self", "cls")]) > 8:
                    faults.append(f"{path.relative_to(ROOT)}: {node.name} takes more than eight parameters")
        if path.stem in ("utils", "util", "helpers", "helper", "common", "misc"):
            faults.append(f"{path.relative_to(ROOT)}: a module is named after what it holds")
    assert faults == []
