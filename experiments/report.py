"""Compares finished runs: a table, pictures, and a page that holds them all. Runs are never changed."""

from __future__ import annotations

import csv
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

from .benchmark import Mismatch
from .benchmark_report import write_benchmark
from .config import run_group
from .pictures import written
from .report_html import details, drawn, page
from .report_page import aligned, bars, curves, document, number, panels, printable, spreadsheet
from .statistics import mean, percent, plain

CONTROLS = ("sgd", "random_trunk")
# Columns that fit into a terminal; the page has all.
ON_TERMINAL = ("optimizer", "test accuracy %", "seconds")
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


def report(paths: Iterable[Path], out: Path, accuracy: float | None = None) -> str:
    """Compare all finished runs in these folders: writes ``report.html``, ``.md`` and ``.csv``, and pictures.

    Args:
        paths: folders of runs, or folders that hold such folders.
        out: the folder to write to.
        accuracy: of the column "time to"; by default the random trunk's final one, or else the lowest.

    Returns:
        The table for a terminal, and what was left out.

    Raises:
        NothingToReport: no finished run, runs on different data, or a folder that cannot be written.
    """
    runs, skipped = find(paths)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if all("cell" in run.summary for run in runs):
            shown, main = write_benchmark(runs, skipped, out)
        else:
            write = report_tasks if any("task" in run.summary for run in runs) else report_training
            shown, main = write(runs, skipped, out, accuracy)
    except Mismatch as error:
        raise NothingToReport(str(error)) from None
    except OSError as error:
        raise NothingToReport(f"the report cannot be written to {out}: {error.strerror or error}") from None
    left_out = "".join(f"\nleft out: {line}" for line in skipped)
    return f"\n{shown}{left_out}\nreport: {out / main}"


def report_training(runs: list[Run], skipped: list[str], out: Path, accuracy: float | None) -> tuple[str, str]:
    """The comparison of training runs: the table for a terminal, and the name of the page.

    Raises:
        NothingToReport: runs on different data.
    """
    groups = grouped(runs)
    target = accuracy if accuracy is not None else _first_target(groups)
    header, rows = table(groups, target)
    validation = " (held-out training images)" if groups[0].options.get("data.validation") else ""
    seeds = sorted({len(group.runs) for group in groups})
    each = f", {seeds[0]} seed{'s' * (seeds[0] > 1)} each" if len(seeds) == 1 else ""
    title = f"{groups[0].options['data.name']}{validation}: {len(runs)} runs in {len(groups)} groups{each}"
    figures = {"curves": curves(groups), "accuracy": bars(groups)}
    parts = panels(groups)
    notes = _notes(groups, target)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # of scripts that the font lacks
            for name, figure in figures.items():
                written(figure, out / f"{name}.png")
            shown = drawn(groups, parts, figures["accuracy"])
    finally:
        for figure in (*figures.values(), *parts):
            plt.close(figure)
    whole = page(title, header, rows, notes, shown, details(groups, out), skipped)
    (out / "report.html").write_text(whole, encoding="utf-8")
    (out / "report.md").write_text(document(title, header, rows, notes, skipped), encoding="utf-8")
    with (out / "report.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([spreadsheet(value) for value in row] for row in numbers(groups, target))
    asked = [] if accuracy is None else [header.index(f"s to {100 * target:.1f} %")]
    chosen = ON_TERMINAL if each else (*ON_TERMINAL, "seeds")
    few = [i for i, name in enumerate(header) if name in chosen or name.startswith("− ") or i in asked]
    return f"{title}\n{aligned([header[i] for i in few], [[row[i] for i in few] for row in rows])}", "report.html"


def find(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All finished runs at or beneath these folders, and why others were skipped."""
    paths = list(paths)
    for path in paths:
        if not path.is_dir():
            raise NothingToReport(f"{path} is not a folder")
    folders = dict.fromkeys(
        folder for path in paths for folder in sorted({file.parent for name in FILES for file in path.rglob(name)})
    )
    runs, skipped = [], []
    for folder in folders:
        try:
            runs.append(Run.read(folder))
        except ValueError as error:
            skipped.append(printable(f"{folder}: {error}"))
    if not runs:
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise NothingToReport(f"no finished run in {', '.join(map(str, paths))}{why}")
    return runs, skipped


def grouped(runs: list[Run]) -> list[RunGroup]:
    """Groups of runs, the most accurate first, each labelled by the options in which it differs from the others."""
    data = sorted({f"{run.options['data.name']}, {run.summary['evaluated_on']}" for run in runs})
    if len(data) > 1:
        raise NothingToReport(
            f"these runs were tested on different images ({'; '.join(data)}): report on one at a time"
        )
    groups = _groups(runs)
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


def _groups(runs: list[Run]) -> list[RunGroup]:
    by_options: dict[str, dict[int, Run]] = {}
    for run in runs:  # of two runs with the same options and seed, the last
        by_options.setdefault(json.dumps(run.options, sort_keys=True), {})[run.summary["seed"]] = run
    return [RunGroup([found[seed] for seed in sorted(found)]) for found in by_options.values()]


def report_tasks(runs: list[Run], skipped: list[str], out: Path, accuracy: float | None = None) -> tuple[str, str]:
    """The numbers of an experiment of rounds, a column for each choice of options, and the name of the page.

    Raises:
        NothingToReport: different experiments.
    """
    names = sorted({str(run.summary.get("task", "training runs")) for run in runs})
    if len(names) > 1:
        raise NothingToReport(f"these runs measure different things ({', '.join(names)}): report on one at a time")
    groups = _groups(runs)
    header = [names[0], *map(str, range(1, len(groups) + 1))]
    differing = [k for k in groups[0].options if any(c.options.get(k) != groups[0].options[k] for c in groups)]
    for place, group in enumerate(groups, 1):
        group.label = ", ".join([str(place), *[f"{option}={group.options.get(option)}" for option in differing]])
    rows = [[option, *[str(group.options.get(option)) for group in groups]] for option in differing]
    rows.append(["seeds", *[str(len(group.runs)) for group in groups]])
    for name in dict.fromkeys(name for run in runs for name in run.summary["measured"]):
        found = [[run.summary["measured"].get(name) for run in group.runs] for group in groups]
        rows.append([name.replace("_", " "), *["" if None in each else plain(each) for each in found]])
    rows.append(["seconds", *[mean(group.each("seconds"), ".1f") for group in groups]])
    notes = "Means ± 95 % confidence intervals over seeds (Student's t); of two seeds, both numbers."
    (out / "report.md").write_text(document(names[0], header, rows, notes, skipped), encoding="utf-8")
    whole = page(names[0], header, rows, notes, "", details(groups, out), skipped)
    (out / "report.html").write_text(whole, encoding="utf-8")
    return aligned(header, rows), "report.html"


def control(group: RunGroup, groups: list[RunGroup], name: str) -> RunGroup | None:
    """The control on the same network; of several, one with the same cost and of the same epochs."""
    model = {k: v for k, v in group.options.items() if k.startswith("model.")}
    found = [
        other
        for other in groups
        if other.options["optimizer.name"] == name != group.options["optimizer.name"]
        and model.items() <= other.options.items()
    ]

    def far(other: RunGroup) -> tuple[bool, bool]:
        same = [other.options.get(key) == group.options.get(key) for key in ("cost.name", "epochs")]
        return not same[0], not same[1]

    return min(found, key=far, default=None)


def _first_target(groups: list[RunGroup]) -> float:
    """The final accuracy of the random trunk, or of the worst group: a mark that any rule that learns will pass."""
    random = [group for group in groups if group.options["optimizer.name"] == "random_trunk"]
    return statistics.fmean((random or groups)[-1].each("test_accuracy"))


def table(groups: list[RunGroup], target: float) -> tuple[list[str], list[list[str]]]:
    """A row for each group; the columns of controls only where they are among the groups."""
    present = [n for n in CONTROLS if any(group.options["optimizer.name"] == n for group in groups)]
    header = ["optimizer", "test accuracy %", "seeds", *[f"− {name}" for name in present], "epochs", "seconds"]
    header += ["images/s", "forward passes", f"s to {100 * target:.1f} %", "peak MiB", "trained weights"]
    rows = []
    for group in groups:
        controls = [control(group, groups, name) for name in present]
        reached = group.seconds_to(target)
        to = f"{statistics.fmean(reached):.1f}" if len(reached) == len(group.runs) else "never"
        if 0 < len(reached) < len(group.runs):
            to = f"{len(reached)} of {len(group.runs)}"
        rows.append(
            [group.label, percent(group.each("test_accuracy")), str(len(group.runs))]
            + ["" if other is None else percent(group.gap(other), "+") for other in controls]
            + [str(group.options.get("epochs", "")), mean(group.each("seconds"), ".1f")]
            + [mean(group.each("images_per_second"), ",.0f"), mean(group.each("forward_passes"), ",.0f"), to]
            + [mean([v / 2**20 for v in group.each("peak_memory_bytes")], ",.0f")]
            + [mean(group.each("trained_parameters"), ",.0f")]
        )
    return header, rows


def numbers(groups: list[RunGroup], target: float) -> list[list[Any]]:
    """The table for machines: fractions, seconds and bytes, a row for each run."""
    keys = ["test_accuracy", "best_test_accuracy", "epochs", "seconds", "images_per_second", "forward_passes"]
    keys += ["peak_memory_bytes", "trained_parameters", "device", "commit"]
    header = ["label", "optimizer", "model", "data", "seed", *keys, f"seconds_to_{target:.4f}", "folder"]
    rows: list[list[Any]] = [list(header)]
    for group in groups:
        for run in group.runs:
            to = RunGroup([run]).seconds_to(target)
            named = [run.summary.get(key) for key in ("optimizer", "model", "data", "seed")]
            values = [run.summary.get(key) for key in keys]
            rows.append([group.label, *named, *values, to[0] if to else None, printable(str(run.folder))])
    return rows


def _notes(groups: list[RunGroup], target: float) -> str:
    devices = sorted({str(run.summary.get("device")) for group in groups for run in group.runs})
    commits = sorted({str(run.summary.get("commit")) for group in groups for run in group.runs})
    return (
        "Test accuracy after the last epoch: mean ± 95 % confidence interval over seeds (Student's t); of two seeds, "
        "both numbers. Differences are paired by seed, in points; the random trunk is the same network with everything "
        f"but its readout frozen at the start. Seconds are of training alone. Time to {100 * target:.1f} % is seen "
        f"once an epoch. Bands span the seeds. On {'; '.join(devices)}, commit {', '.join(commits)}."
    )
