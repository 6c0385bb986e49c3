"""How the library is built: rules are leaves of the class tree, signatures are explicit, imports go one way."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bioopt
from bioopt import LearningRule

from .rules import OF_RULE, RULES, required

ROOT = Path(bioopt.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
#: what the base class of a family may extend: how a user and `Mixed` go through one pass
PROTOCOL = {"begin", "collect", "discard", "gradient_parameters"}
#: options of a param group, which are those of each rule
FREE_OPTIONS = {"LearningRule.own", "create_optimizer"}
#: what a package or a module at the top may import besides itself; a family that is not listed: the core alone
IMPORTS = {
    "core": set(),
    "costs": {"core"},
    "hebbian": {"core", "perturbation.base"},  # noise on activity, of RewardHebbian
    "spiking": {"core", "perturbation.base"},  # what credit is, of RewardSTDP
    "nn": {"core", "hebbian"},  # memories that store by the Hebbian rule
    "contrastive": {"core", "nn.rbm"},
    "target": {"core", "feedback.weights"},  # random weights, from which inverses start
    "temporal": {"core", "feedback"},  # direct feedback, of EProp
}
TOP = {"auditing", "diagnosis", "mixed", "registry"}  # which import anything, and are imported by ``bioopt`` alone


def classes() -> list[type[LearningRule]]:
    """All bases and rules of the library, bases first."""
    for module in pkgutil.walk_packages(bioopt.__path__, "bioopt."):
        importlib.import_module(module.name)

    def beneath(base: type) -> Iterator[type]:
        for one in base.__subclasses__():
            yield one
            yield from beneath(one)

    found = [LearningRule, *beneath(LearningRule)]
    return [one for one in dict.fromkeys(found) if one.__module__.startswith("bioopt.")]


def concrete(rules: list[type[LearningRule]]) -> list[type[LearningRule]]:
    return [rule for rule in rules if not inspect.isabstract(rule)]


def methods(one: type) -> Iterator[str]:
    """The methods and properties that a class itself defines."""
    for name, value in vars(one).items():
        special = name.startswith("__") and name.endswith("__")
        if not special and (inspect.isroutine(value) or isinstance(value, property)):
            yield name


def overridden(one: type, name: str) -> type | None:
    """The nearest base of the library that defines a method otherwise; torch wraps each class's ``step`` in place."""
    bases = [base for base in one.__mro__[1:] if base.__module__.startswith("bioopt.") and name in vars(base)]
    own = inspect.unwrap(getattr(one, name)) if inspect.isfunction(vars(one)[name]) else vars(one)[name]
    return next((base for base in bases[:1] if own is not inspect.unwrap(getattr(base, name))), None)


def is_optional(base: type, name: str) -> bool:
    return getattr(vars(base)[name], "__optional__", False)


# -- classes ----------------------------------------------------------------------------------------------------------


def test_every_rule_has_a_row_in_the_contract_table() -> None:
    for rule in RULES:
        options = ", ".join(f'"{name}": ...' for name in required(rule))
        row = f"Case(bioopt.{rule.__name__}{f', {{{options}}}' if options else ''})"
        assert rule in OF_RULE, f"tests/rules.py: add {row} to CASES, so that every contract test runs the rule"
    assert {*OF_RULE} <= {*RULES}, "tests/rules.py has rows of rules that bioopt.__all__ does not name"
    public = {rule for rule in concrete(classes()) if not rule.__name__.startswith("_")}
    assert public == {*RULES}, "bioopt/__init__.py: name the rule in __all__"


def test_rules_are_final() -> None:
    for rule in concrete(classes()):
        assert getattr(rule, "__final__", False), f"{rule.__name__}: write @typing.final above the class"
        assert not rule.__subclasses__(), rule


def test_no_concrete_method_is_overridden() -> None:
    """A reader of a base class can rely on what it does; what may differ is abstract, or marked `optional`."""
    for one in classes():
        for name in methods(one):
            base = overridden(one, name)
            if base is None or is_optional(base, name) or getattr(vars(base)[name], "__isabstractmethod__", False):
                continue
            assert inspect.isabstract(one), f"{one.__name__}.{name} overrides a concrete method of {base.__name__}"
            assert name in PROTOCOL, f"{one.__name__}.{name} overrides a concrete method of {base.__name__}"


def test_optional_methods_are_for_several_rules() -> None:
    """What one rule alone needs is no hook of a base class."""
    everything = classes()
    marked = [(base, name) for base in everything for name in methods(base) if is_optional(base, name)]
    assert len(marked) >= 4
    for base, name in marked:
        own = [one for one in everything if issubclass(one, base) and name in vars(one) and one is not base]
        rules = [rule for rule in concrete(everything) if any(issubclass(rule, one) for one in own)]
        assert len(rules) >= 2, f"{base.__name__}.{name} is implemented for {[r.__name__ for r in rules]} alone"


# -- signatures -------------------------------------------------------------------------------------------------------


def signatures() -> Iterator[tuple[str, typing.Any]]:
    """All that a user calls: constructors, functions, methods of rules."""
    public = [*(getattr(bioopt, name) for name in bioopt.__all__), *vars(bioopt.nn).values()]
    for one in [*public, *classes()]:
        if inspect.isclass(one) and "__init__" in vars(one) and one.__module__.startswith("bioopt."):
            yield f"{one.__name__}()", vars(one)["__init__"]
            if issubclass(one, LearningRule):
                for name in methods(one):
                    call = vars(one)[name]
                    if inspect.isfunction(call) and not name.startswith("_"):
                        yield f"{one.__name__}.{name}", call
        elif inspect.isfunction(one) and one.__module__.startswith("bioopt."):
            yield one.__name__, one


def test_keyword_arguments_are_explicit() -> None:
    """An editor and mypy know every option: what is handed on is an unpacked TypedDict."""
    seen = dict(signatures())
    assert len(seen) > 40
    for name, call in seen.items():
        for parameter in inspect.signature(call).parameters.values():
            if parameter.kind != parameter.VAR_KEYWORD or name in FREE_OPTIONS:
                continue
            hint = typing.get_type_hints(call)[parameter.name]
            explicit = typing.get_origin(hint) is typing.Unpack and typing.is_typeddict(typing.get_args(hint)[0])
            assert explicit, f"{name}: **{parameter.name} must be Unpack of a TypedDict, not {hint}"


# -- imports ----------------------------------------------------------------------------------------------------------


def imported(module: str) -> set[str]:
    """The modules of the library that one imports, but not for types alone."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
            found.update(name if name in MODULES else base for name in names)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text()))
    return {name for name in found if name in MODULES and name != module}


GRAPH = {module: imported(module) for module in MODULES}


def part(module: str) -> str:
    """The package or module right below ``bioopt``."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", [module for module in MODULES if part(module) not in (*TOP, "")])
def test_imports_go_one_way(module: str) -> None:
    own = part(module)
    allowed = {own, *IMPORTS.get(own, {"core"})}
    for other in GRAPH[module]:
        name = other.removeprefix("bioopt.")
        assert part(other) in allowed or name in allowed, f"{module} imports {other}"


def test_the_top_is_imported_by_the_package_alone() -> None:
    for module, others in GRAPH.items():
        upward = {other for other in others if part(other) in TOP and other != module}
        assert module == "bioopt" or part(module) in TOP or not upward, f"{module} imports {upward}"


def test_no_import_circle() -> None:
    try:
        order = list(TopologicalSorter(GRAPH).static_order())
    except CycleError as circle:
        pytest.fail(f"an import circle: {' -> '.join(circle.args[1])}")
    assert order[-1] == "bioopt"


def test_private_torch_lives_in_one_file() -> None:
    """What torch may change without notice; `tests/core/test_torch_private.py` has a test for each use."""
    own = "bioopt.core._torch_private"
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())) if module != own else ():
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            for name in names:
                private = name.startswith("torch.") and any(part.startswith("_") for part in name.split("."))
                assert not private, f"{module}: {name}"
