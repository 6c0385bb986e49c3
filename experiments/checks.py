"""Checks of single options, each an error that names the option, its value and what it can be.

Imports nothing of ours and no torch: a mistake is reported before anything is built.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def require_counts(least: int = 1, of: str = "task.", null: bool = False, **options: Any) -> None:
    """Raise where one of these options is not an integer, or too small.

    Args:
        least: the smallest value allowed.
        of: the options' prefix.
        null: whether ``None`` is allowed too.
        **options: by name.

    Raises:
        ValueError: names the option and its value.
    """
    for name, value in options.items():
        if null and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{of}{name}={value} must be an integer >= {least}{', or null' if null else ''}")


def require_package(option: str, package: str) -> None:
    """Raise where a package that an option needs, which bioopt installs on request, is not there.

    Raises:
        ValueError: names the option, and the command that installs the package.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{option} needs the package {package}: pip install -e '.[{package}]'")


def check_inside_runs(option: str, name: Any) -> None:
    """Refuse a name of a sweep or a study whose folder would not be inside ``runs``."""
    path = Path(str(name))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{option}={name} must name a folder inside runs/, such as {option}={path.name or 'mine'}")


def unknown(key: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> ValueError:
    """An error for an option that does not exist, with the nearest one that does.

    That is one with a similar name beside it, or with the same name elsewhere.
    """
    parent, dot, leaf = key.rpartition(".")
    known = [*known]
    inside = {name.removeprefix(parent + dot).partition(".")[0] for name in known if name.startswith(parent + dot)}
    near = [f"{parent}{dot}{name}" for name in difflib.get_close_matches(leaf, sorted(inside), 1)]
    near += [name for name in [*elsewhere, *known] if name.rpartition(".")[2] == leaf]
    if near:
        hint = f"did you mean {near[0]}?"
    elif parent and inside:
        hint = f"{parent} has {', '.join(sorted(name for name in inside if not name.startswith('_')))}"
    else:
        hint = "python train.py --help lists them all"
    return ValueError(f"{key} is not an option; {hint}")
