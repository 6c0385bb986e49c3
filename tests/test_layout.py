"""Imports go one way: nobody needs to know the whole tree to change a part of it."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .commands import ROOT


def imports(file: Path, package: str) -> set[str]:
    """The modules of its own package that a file imports, inside functions as well."""
    modules = {path.stem for path in file.parent.glob("*.py")}
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith(package)):
            names = [node.module.rpartition(".")[2]] if node.module else [alias.name for alias in node.names]
            found |= {name for name in names if name in modules}
    return found


def test_no_import_circle_in_the_experiments() -> None:
    graph = {path.stem: imports(path, "experiments") for path in (ROOT / "experiments").glob("*.py")}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as circle:
        pytest.fail(f"an import circle: {' -> '.join(circle.args[1])}")
    assert order.index("files") < order.index("report") < order.index("sweeps")
    assert not any(graph[leaf] for leaf in ("config", "files", "interrupts", "pictures", "statistics"))


def test_the_library_imports_torch_alone() -> None:
    allowed = {"torch", "bioopt", "__future__"}
    for path in (ROOT / "bioopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, (path.name, name)


def test_data_and_models_do_not_depend_on_what_uses_them() -> None:
    for path in (file for package in ("data", "models") for file in (ROOT / "experiments" / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level > 1 or (node.module or "").startswith("experiments")):
                assert node.module == "options", path
