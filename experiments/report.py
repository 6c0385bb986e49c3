"""Compares finished runs: a table, pictures, and a page that holds them all. Runs are never changed."""

from __future__ import annotations

import csv
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .benchmark import Mismatch
from .benchmark_report import write_benchmark
from .finished import NothingToReport, Run, RunGroup, by_options, find, grouped
from .pictures import written
from .report_html import details, drawn, page
from .report_page import aligned, bars, curves, document, panels, printable, spreadsheet
from .statistics import mean, percent, plain

CONTROLS = ("sgd", "random_trunk")
# Columns that fit into a terminal; the page has all.
ON_TERMINAL = ("optimizer", "test accuracy %", "seconds")


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
    counts = f"{len(runs)} run{'s' * (len(runs) > 1)} in {len(groups)} group{'s' * (len(groups) > 1)}"
    title = f"{groups[0].options['data.name']}{validation}: {counts}{each}"
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


def report_tasks(runs: list[Run], skipped: list[str], out: Path, accuracy: float | None = None) -> tuple[str, str]:
    """The numbers of an experiment of rounds, a column for each choice of options, and the name of the page.

    Raises:
        NothingToReport: different experiments.
    """
    names = sorted({str(run.summary.get("task", "training runs")) for run in runs})
    if len(names) > 1:
        raise NothingToReport(f"these runs measure different things ({', '.join(names)}): report on one at a time")
    groups = by_options(runs)
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
