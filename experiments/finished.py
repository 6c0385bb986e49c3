"""Finished runs, as they are read from their folders and grouped for a comparison."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .config import run_group
from .report_page import number, printable

FILES = ("config.yaml", "summary.json", "metrics.jsonl", "error.txt")  # a folder with one of them is a run's
# Of a training run's summary, what the report averages; older runs lack some.
AVERAGED = ("epochs", "seconds", "images_per_second", "forward_passes", "peak_memory_bytes", "trained_parameters")


class NothingToReport(ValueError):
    """No finished runs, or runs that cannot be compared."""


@dataclass
class Run:
    """A finished run, as read from its folder."""

    folder: Path
    options: dict[str, Any]  # all but the seed
    summary: dict[str, Any]
    history: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """A finished run.

        Raises:
            ValueError: the run has not finished, or its files are damaged.
        """
        if (folder / "error.txt").exists():
            lines = _text(folder / "error.txt", errors="replace").strip().splitlines()
            raise ValueError(
                f"it failed: {lines[-1] if lines else 'its error.txt, which should have a reason, is empty'}"
            )
        options = run_group(_mapping("config.yaml", _text(folder / "config.yaml"), yaml.safe_load))
        summary = _mapping("summary.json", _text(folder / "summary.json"), json.loads)
        lines = _text(folder / "metrics.jsonl").split("\n")
        if lines.pop():
            raise ValueError("it is damaged: metrics.jsonl is cut off in a line")
        history = [_mapping(f"line {i} of metrics.jsonl", line, json.loads) for i, line in enumerate(lines, 1)]
        run = cls(folder, options, summary, history)
        run._check()
        return run

    @property
    def group(self) -> str:
        """The same for runs that differ only in their seed."""
        return json.dumps(self.options, sort_keys=True)

    def _check(self) -> None:
        """Refuse a run in which a value that a report needs is missing, or is of another type."""
        _require("summary.json", self.summary, "an integer", lambda v: isinstance(v, int) and number(v), "seed")
        _require("summary.json", self.summary, "a number", lambda v: v is None or number(v), *AVERAGED)
        if "task" in self.summary:
            _require("summary.json", self.summary, "text", _is_text, "task")
            _require("summary.json", self.summary, "numbers by their name", _measured, "measured")
            return
        if not self.history or self.summary.get("test_accuracy") is None:
            raise ValueError("it trained for no epoch")
        _require("config.yaml", self.options, "text", _is_text, "optimizer.name", "data.name")
        _require("config.yaml", self.options, "text", lambda v: v is None or _is_text(v), "model.name", "cost.name")
        _require("summary.json", self.summary, "text", _is_text, "evaluated_on")
        _require("summary.json", self.summary, "a number from 0 to 1", _fraction, "test_accuracy")
        for i, line in enumerate(self.history, 1):
            where = f"line {i} of metrics.jsonl"
            _require(where, line, "a number", number, "epoch", "seconds", "forward_passes")
            _require(where, line, "a number from 0 to 1", _fraction, "test_accuracy")


def _text(path: Path, errors: str = "strict") -> str:
    try:
        return path.read_text(encoding="utf-8", errors=errors)
    except FileNotFoundError:
        raise ValueError(f"it has no {path.name} (yet)") from None
    except OSError as error:
        raise ValueError(f"its {path.name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"it is damaged: {path.name} is not UTF-8 text") from None


def _mapping(name: str, text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The values of a file by their names, with printable strings."""
    try:
        found = printable(parse(text))
        json.dumps(found, sort_keys=True)  # plain values only, by which runs are grouped
    except Exception as error:  # YAML's parser passes on what a value raises: IndexError, RecursionError
        raise ValueError(f"it is damaged: {name}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is damaged: {name} holds {json.dumps(found)[:60]}, not values by name")
    return found


def _require(name: str, values: dict[str, Any], kind: str, fits: Callable[[Any], bool], *keys: str) -> None:
    for key in keys:
        if not fits(value := values.get(key)):
            wrong = f"{value!r:.60}, not {kind}" if key in values else "missing"
            raise ValueError(f"it is damaged: {key} in {name} is {wrong}")


def _fraction(value: Any) -> bool:
    return number(value) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _measured(value: Any) -> bool:
    """Whether these are measurements of a task: numbers, of which some may be infinite or NaN."""
    return isinstance(value, dict) and all(
        v is None or number(v) or (isinstance(v, float) and not math.isfinite(v)) for v in value.values()
    )


@dataclass
class RunGroup:
    """Runs that differ only in their seed."""

    runs: list[Run]
    label: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """The options that its runs have in common."""
        return self.runs[0].options

    def each(self, key: str) -> list[float]:
        """A number of the summaries, one a seed; empty where a run lacks it."""
        found = [run.summary.get(key) for run in self.runs]
        return [] if None in found else [float(value) for value in found]  # type: ignore[arg-type]

    def seconds_to(self, accuracy: float) -> list[float]:
        """The seconds to this accuracy, of each run that reached it."""
        found = (
            next((line["seconds"] for line in run.history if line["test_accuracy"] >= accuracy), None)
            for run in self.runs
        )
        return [seconds for seconds in found if seconds is not None]

    def gap(self, other: RunGroup) -> list[float]:
        """By how much its accuracy exceeds another's, for each seed that both have."""
        theirs = {run.summary["seed"]: run.summary["test_accuracy"] for run in other.runs}
        return [
            run.summary["test_accuracy"] - theirs[run.summary["seed"]]
            for run in self.runs
            if run.summary["seed"] in theirs
        ]


def find(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All finished runs at or beneath these folders, and why others were skipped."""
    paths = list(paths)
    for path in paths:
        if not path.is_dir():
            raise NothingToReport(f"{path} is not a folder")
    folders = dict.fromkeys(
        folder for path in paths for folder in sorted({file.parent for name in FILES for file in path.rglob(name)})
    )
    found: dict[tuple[str, int], Run] = {}
    skipped = []
    for folder in sorted(folders, key=_finished_at):
        try:
            run = Run.read(folder)
        except ValueError as error:
            skipped.append(printable(f"{folder}: {error}"))
            continue
        same = run.group, run.summary["seed"]
        if same in found:
            skipped.append(printable(f"{found.pop(same).folder}: {folder} has the same options and seed, and is newer"))
        found[same] = run
    kept = {run.folder: run for run in found.values()}
    runs = [kept[folder] for folder in folders if folder in kept]
    if not runs:
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise NothingToReport(f"no finished run in {', '.join(map(str, paths))}{why}")
    return runs, skipped


def _finished_at(folder: Path) -> float:
    summary = folder / "summary.json"
    return summary.stat().st_mtime if summary.exists() else 0.0


def grouped(runs: list[Run]) -> list[RunGroup]:
    """Groups of runs, the most accurate first, each labelled by the options in which it differs from the others."""
    data = sorted({f"{run.options['data.name']}, {run.summary['evaluated_on']}" for run in runs})
    if len(data) > 1:
        raise NothingToReport(
            f"these runs were tested on different images ({'; '.join(data)}): report on one at a time"
        )
    groups = by_options(runs)
    groups.sort(key=lambda group: -statistics.fmean(group.each("test_accuracy")))
    names = ("optimizer.name", "model.name", "cost.name")
    several = [name for name in names[1:] if len({group.options.get(name) for group in groups}) > 1]
    for each in groups:
        namesakes = [c.options for c in groups if all(c.options.get(name) == each.options.get(name) for name in names)]
        differing = [k for k, v in each.options.items() if any(o.get(k) != v for o in namesakes)]
        differing = [k for k in differing if k not in names and not k.startswith("optimizer.per_")]
        chosen = [str(each.options.get(name)) for name in several]
        options = [f"{k.removeprefix('optimizer.')}={each.options[k]}" for k in differing]
        each.label = ", ".join([each.options["optimizer.name"], *chosen, *options])
    return groups


def by_options(runs: list[Run]) -> list[RunGroup]:
    """Groups of runs with the same options, in the order of their first runs."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(run.group, {})[run.summary["seed"]] = run
    return [RunGroup([seeds[seed] for seed in sorted(seeds)]) for seeds in found.values()]
