"""Imports go one way, so that a part can be changed without knowing the whole tree."""

from __future__ import annotations

import ast
import functools
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .commands import ROOT

LEAVES = ("checks", "config", "files", "interrupts", "pictures", "statistics")


def modules(package: str) -> dict[str, Path]:
    """All modules of a package by their dotted names; a folder's is that of its ``__init__``."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


class Imports(ast.NodeVisitor):
    """The names that a module imports, also inside functions, but not those for type annotations only."""

    def __init__(self, module: str, path: Path) -> None:
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package.rsplit(".", node.level - 1)[0] if node.level else ""
        base = ".".join(part for part in (base, node.module) if part)
        self.names |= {f"{base}.{alias.name}" for alias in node.names}
        if node.module:  # `from . import x` needs the module x, not what its package defines
            self.names.add(base)


@functools.cache
def graph(package: str) -> dict[str, set[str]]:
    """For each module of a package, those of the package that it imports."""
    known = modules(package)
    found = {}
    for module, path in known.items():
        imports = Imports(module, path)
        imports.visit(ast.parse(path.read_text()))
        found[module] = {name for name in imports.names if name in known and name not in (module, package)}
    return found


def test_no_import_circle_in_the_experiments() -> None:
    try:
        order = list(TopologicalSorter(graph("experiments")).static_order())
    except CycleError as circle:
        pytest.fail(f"an import circle: {' -> '.join(circle.args[1])}")
    order = [name.removeprefix("experiments.") for name in order]
    assert order.index("files") < order.index("report") < order.index("sweeps")
    assert order.index("learner") < order.index("phases") < order.index("classification") < order.index("run")


def test_leaves_import_nothing_of_ours() -> None:
    for leaf in (*LEAVES, "learner"):  # the learner needs the library
        assert not graph("experiments")[f"experiments.{leaf}"], leaf


def test_tasks_leave_training_to_learners_and_runs_to_the_engine() -> None:
    imports = graph("experiments")
    engine = {f"experiments.{name}" for name in ("run", "classification", "logs", "runs", "ranks", "sweeps")}
    tasks = [name for name in imports if name.startswith("experiments.tasks")]
    assert len(tasks) > 10
    for name in tasks:
        assert not imports[name] & engine, name
        source = modules("experiments")[name].read_text()
        assert ".backward(" not in source, name
        assert "zero_grad" not in source, name
        if name.endswith("_plots"):
            assert not imports[name] & {"experiments.learner", "experiments.building", "experiments.phases"}, name


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
                assert node.module == "checks", path
