"""Finished runs as one comparison: a table, a few pictures, and a page that holds them all. Runs are never changed."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import statistics
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from .config import run_group
from .statistics import interval, mean, percent, plain

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

CONTROLS = ("sgd", "random_trunk")
FILES = ("config.yaml", "summary.json", "metrics.jsonl", "error.txt")  # a folder with one of them is a run's
# Of a training run's summary, what the report averages; older runs lack some.
AVERAGED = ("epochs", "seconds", "images_per_second", "forward_passes", "peak_memory_bytes", "trained_parameters")


class NothingToReport(ValueError):
    """No finished runs, or runs that cannot be compared."""


@dataclass
class Run:
    """What a run's folder says."""

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
            raise ValueError(f"it failed: {lines[-1] if lines else 'error.txt, which should say why, is empty'}")
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
        """Refuse a run that lacks what a report needs, or has something else in its place."""
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
    """What a file holds under names, with strings that can be shown."""
    try:
        found = printable(parse(text))
        json.dumps(found, sort_keys=True)  # nothing but plain values: runs are told apart by this
    except Exception as error:  # YAML's parser lets through whatever a value raises: IndexError, RecursionError
        raise ValueError(f"it is damaged: {name}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is damaged: {name} holds {json.dumps(found)[:60]}, not values by name")
    return found


def _require(name: str, values: dict[str, Any], kind: str, fits: Callable[[Any], bool], *keys: str) -> None:
    for key in keys:
        if not fits(value := values.get(key)):
            wrong = f"{value!r:.60}, not {kind}" if key in values else "missing"
            raise ValueError(f"it is damaged: {key} in {name} is {wrong}")


def number(value: Any) -> bool:
    """Whether it is a number that can be averaged and drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def _fraction(value: Any) -> bool:
    return number(value) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _measured(value: Any) -> bool:
    """Whether it is what a task measured: numbers, of which some may be infinite or NaN."""
    return isinstance(value, dict) and all(
        v is None or number(v) or (isinstance(v, float) and not math.isfinite(v)) for v in value.values()
    )


def printable(value: Any) -> Any:
    """The same with line breaks, control characters and the like as escapes, in all its strings."""
    if isinstance(value, str):
        if value.isprintable():
            return value
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    if isinstance(value, dict):
        return {printable(key): printable(each) for key, each in value.items()}
    return [printable(each) for each in value] if isinstance(value, list) else value


@dataclass
class Cell:
    """Runs that differ in nothing but their seed."""

    runs: list[Run]
    label: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What its runs have in common."""
        return self.runs[0].options

    def each(self, key: str) -> list[float]:
        """A number of the summaries, one a seed; empty where a run lacks it."""
        found = [run.summary.get(key) for run in self.runs]
        return [] if None in found else [float(value) for value in found]  # type: ignore[arg-type]

    def seconds_to(self, accuracy: float) -> list[float]:
        """The seconds that each run that reached this accuracy took to."""
        found = (
            next((line["seconds"] for line in run.history if line["test_accuracy"] >= accuracy), None)
            for run in self.runs
        )
        return [seconds for seconds in found if seconds is not None]

    def gap(self, other: Cell) -> list[float]:
        """By how much its accuracy exceeds another's, for each seed that both have."""
        theirs = {run.summary["seed"]: run.summary["test_accuracy"] for run in other.runs}
        return [
            run.summary["test_accuracy"] - theirs[run.summary["seed"]]
            for run in self.runs
            if run.summary["seed"] in theirs
        ]


def report(paths: Iterable[Path], out: Path, accuracy: float | None = None) -> str:
    """Compare all finished runs in these folders: writes ``report.html``, ``.md`` and ``.csv``, and PNG pictures.

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
        made = report_tasks if any("task" in run.summary for run in runs) else report_training
        shown, main = made(runs, skipped, out, accuracy)
    except OSError as error:
        raise NothingToReport(f"the report cannot be written to {out}: {error.strerror or error}") from None
    left_out = "".join(f"\nleft out: {line}" for line in skipped)
    return f"\n{shown}{left_out}\nreport: {out / main}"


def report_training(runs: list[Run], skipped: list[str], out: Path, accuracy: float | None) -> tuple[str, str]:
    """The comparison of training runs: the table for a terminal, and the name of the page.

    Raises:
        NothingToReport: runs on different data.
    """
    cells = group(runs)
    target = accuracy if accuracy is not None else _first_target(cells)
    header, rows = table(cells, target)
    validation = " (held-out training images)" if cells[0].options.get("data.validation") else ""
    title = f"{cells[0].options['data.name']}{validation}: {len(runs)} runs of {len(cells)} kinds"
    figures = {"curves": curves(cells), "accuracy": bars(cells)}
    notes = _notes(cells, target)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # of scripts that the font lacks
            for name, figure in figures.items():
                figure.savefig(out / f"{name}.png", dpi=120)
            whole = page(title, header, rows, notes, figures, skipped)
    finally:
        for figure in figures.values():
            plt.close(figure)
    (out / "report.html").write_text(whole, encoding="utf-8")
    (out / "report.md").write_text(document(title, header, rows, notes, skipped), encoding="utf-8")
    with (out / "report.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([spreadsheet(value) for value in row] for row in numbers(cells, target))
    return f"{title}\n{aligned(header, rows)}", "report.html"


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


def group(runs: list[Run]) -> list[Cell]:
    """Runs by all but their seed, the most accurate first, each labelled by what tells it from the others."""
    data = sorted({f"{run.options['data.name']}, {run.summary['evaluated_on']}" for run in runs})
    if len(data) > 1:
        raise NothingToReport(
            f"these runs were tested on different images ({'; '.join(data)}): report on one at a time"
        )
    cells = _cells(runs)
    cells.sort(key=lambda cell: -statistics.fmean(cell.each("test_accuracy")))
    names = ("optimizer.name", "model.name", "cost.name")
    several = [name for name in names[1:] if len({cell.options.get(name) for cell in cells}) > 1]
    for each in cells:
        namesakes = [c.options for c in cells if all(c.options.get(name) == each.options.get(name) for name in names)]
        told = [k for k, v in each.options.items() if any(o.get(k) != v for o in namesakes)]
        told = [k for k in told if k not in names and not k.startswith("optimizer.per_")]
        chosen = [str(each.options.get(name)) for name in several]
        options = [f"{k.removeprefix('optimizer.')}={each.options[k]}" for k in told]
        each.label = ", ".join([each.options["optimizer.name"], *chosen, *options])
    return cells


def _cells(runs: list[Run]) -> list[Cell]:
    by_options: dict[str, dict[int, Run]] = {}
    for run in runs:  # of a run that was made twice, the last
        by_options.setdefault(json.dumps(run.options, sort_keys=True), {})[run.summary["seed"]] = run
    return [Cell([found[seed] for seed in sorted(found)]) for found in by_options.values()]


def report_tasks(runs: list[Run], skipped: list[str], out: Path, accuracy: float | None = None) -> tuple[str, str]:
    """The numbers of an experiment of rounds, a column for each choice of options: for a terminal, and ``report.md``.

    Raises:
        NothingToReport: different experiments.
    """
    names = sorted({str(run.summary.get("task", "training runs")) for run in runs})
    if len(names) > 1:
        raise NothingToReport(f"these runs measure different things ({', '.join(names)}): report on one at a time")
    cells = _cells(runs)
    header = [names[0], *map(str, range(1, len(cells) + 1))]
    told = [k for k in cells[0].options if any(c.options.get(k) != cells[0].options[k] for c in cells)]
    rows = [[option, *[str(cell.options.get(option)) for cell in cells]] for option in told]
    rows.append(["seeds", *[str(len(cell.runs)) for cell in cells]])
    for name in dict.fromkeys(name for run in runs for name in run.summary["measured"]):
        found = [[run.summary["measured"].get(name) for run in cell.runs] for cell in cells]
        rows.append([name.replace("_", " "), *["" if None in each else plain(each) for each in found]])
    rows.append(["seconds", *[mean(cell.each("seconds"), ".1f") for cell in cells]])
    notes = "Means ± 95 % confidence intervals over seeds (Student's t)."
    (out / "report.md").write_text(document(names[0], header, rows, notes, skipped), encoding="utf-8")
    return aligned(header, rows), "report.md"


def control(cell: Cell, cells: list[Cell], name: str) -> Cell | None:
    """The control on the same network; of several, one with the same cost and of the same epochs."""
    model = {k: v for k, v in cell.options.items() if k.startswith("model.")}
    found = [
        other
        for other in cells
        if other.options["optimizer.name"] == name != cell.options["optimizer.name"]
        and model.items() <= other.options.items()
    ]

    def far(other: Cell) -> tuple[bool, bool]:
        alike = [other.options.get(key) == cell.options.get(key) for key in ("cost.name", "epochs")]
        return not alike[0], not alike[1]

    return min(found, key=far, default=None)


def _first_target(cells: list[Cell]) -> float:
    """What the random trunk reaches in the end, or the worst: a mark that any rule that learns will pass."""
    random = [cell for cell in cells if cell.options["optimizer.name"] == "random_trunk"]
    return statistics.fmean((random or cells)[-1].each("test_accuracy"))


def table(cells: list[Cell], target: float) -> tuple[list[str], list[list[str]]]:
    """A row for each cell; the columns of controls only where they are among the cells."""
    present = [n for n in CONTROLS if any(cell.options["optimizer.name"] == n for cell in cells)]
    header = ["optimizer", "test accuracy %", "seeds", *[f"− {name}" for name in present], "epochs", "seconds"]
    header += ["images/s", "forward passes", f"s to {100 * target:.1f} %", "peak MiB", "trained weights"]
    rows = []
    for cell in cells:
        controls = [control(cell, cells, name) for name in present]
        reached = cell.seconds_to(target)
        to = f"{statistics.fmean(reached):.1f}" if len(reached) == len(cell.runs) else "never"
        if 0 < len(reached) < len(cell.runs):
            to = f"{len(reached)} of {len(cell.runs)}"
        rows.append(
            [cell.label, percent(cell.each("test_accuracy")), str(len(cell.runs))]
            + ["" if other is None else percent(cell.gap(other), "+") for other in controls]
            + [str(cell.options.get("epochs", "")), mean(cell.each("seconds"), ".1f")]
            + [mean(cell.each("images_per_second"), ",.0f"), mean(cell.each("forward_passes"), ",.0f"), to]
            + [mean([v / 2**20 for v in cell.each("peak_memory_bytes")], ",.0f")]
            + [mean(cell.each("trained_parameters"), ",.0f")]
        )
    return header, rows


def numbers(cells: list[Cell], target: float) -> list[list[Any]]:
    """The table for machines: fractions, seconds and bytes, a row for each run."""
    keys = ["test_accuracy", "best_test_accuracy", "epochs", "seconds", "images_per_second", "forward_passes"]
    keys += ["peak_memory_bytes", "trained_parameters", "device", "commit"]
    header = ["label", "optimizer", "model", "data", "seed", *keys, f"seconds_to_{target:.4f}", "folder"]
    rows: list[list[Any]] = [list(header)]
    for cell in cells:
        for run in cell.runs:
            to = Cell([run]).seconds_to(target)
            named = [run.summary.get(key) for key in ("optimizer", "model", "data", "seed")]
            values = [run.summary.get(key) for key in keys]
            rows.append([cell.label, *named, *values, to[0] if to else None, printable(str(run.folder))])
    return rows


def _notes(cells: list[Cell], target: float) -> str:
    devices = sorted({str(run.summary.get("device")) for cell in cells for run in cell.runs})
    commits = sorted({str(run.summary.get("commit")) for cell in cells for run in cell.runs})
    return (
        "Test accuracy after the last epoch: mean ± 95 % confidence interval over seeds (Student's t). Differences are "
        "paired by seed, in points; the random trunk is the same network with everything but its readout frozen at the "
        f"start. Seconds are of training alone. Time to {100 * target:.1f} % is seen once an epoch. Bands span the "
        f"seeds. On {'; '.join(devices)}, commit {', '.join(commits)}."
    )


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(f"{c:<{w}}" if not i else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """For a README."""
    cells = [[markdown_text(cell) for cell in line] for line in (header, *rows)]
    lines = [cells[0], ["---", *["---:"] * (len(header) - 1)], *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in a table too: no HTML, links, emphasis or formulas."""
    text = re.sub(r"[\\`*|$~]|(?<!\w)_|_(?!\w)|(?<=\])\(", r"\\\g<0>", printable(text))
    return html.escape(text, quote=False)


def document(title: str, header: list[str], rows: list[list[str]], notes: str, skipped: list[str]) -> str:
    """The report for a README."""
    left_out = [f"- {markdown_text(line)}" for line in skipped]
    parts = [f"# {markdown_text(title)}", markdown(header, rows), markdown_text(notes)]
    return "\n\n".join([*parts, *(["## Left out", "\n".join(left_out)] if skipped else [])]) + "\n"


def spreadsheet(value: Any) -> Any:
    """A cell of the CSV file; text that a spreadsheet would take for a formula has an apostrophe before it."""
    if value is None or number(value):
        return value
    text = str(value)
    return f"'{text}" if unicodedata.normalize("NFKC", text).lstrip()[:1] in set("=+-@") else text


def curves(cells: list[Cell]) -> Figure:
    """Test accuracy against epochs, seconds and forward passes: means over the seeds, and bands from least to most."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    axes_of: list[tuple[str, str]] = [("epoch", "epoch"), ("seconds", "seconds of training")]
    axes_of += [("forward_passes", "forward passes")]
    for axes, (key, label) in zip(grid, axes_of, strict=True):
        for colour, cell in zip(_colours(cells), cells, strict=True):
            epochs = list(zip(*(run.history for run in cell.runs), strict=False))  # as many as all have
            along = [statistics.fmean(line[key] for line in lines) for lines in epochs]
            seen = [[100 * line["test_accuracy"] for line in lines] for lines in epochs]
            mean = [statistics.fmean(values) for values in seen]
            axes.plot(along, mean, color=colour, marker="." if len(along) < 30 else None)
            axes.fill_between(along, list(map(min, seen)), list(map(max, seen)), color=colour, alpha=0.2, linewidth=0)
        shown = [line[key] for cell in cells for run in cell.runs for line in run.history]
        wide = min(shown) > 0 and max(shown) > 10 * min(shown)
        axes.set(xlabel=label)
        if wide and key != "epoch":
            axes.set_xscale("log")
            steps = (1, 2, 5) if max(shown) < 100 * min(shown) else (1,)
            axes.xaxis.set_major_locator(LogLocator(subs=steps))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("test accuracy (%)")
    grid[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    labels = [_caption(cell) for cell in cells]
    longest = max(len(line) for label in labels for line in label.splitlines())
    legend = figure.legend(
        grid[0].lines,
        [str(number) for number in range(len(cells))],
        loc="outside lower center",
        ncols=max(1, min(6, 150 // (longest + 8))),
        frameon=False,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):  # only now: "_" would hide an entry
        text.set(text=label, parse_math=False)
    return figure


def _caption(cell: Cell) -> str:
    """A label for pictures, in lines that leave room for what they name."""
    return "\n".join(textwrap.wrap(cell.label, 48, max_lines=3, placeholder=" …")) or "…"


def bars(cells: list[Cell]) -> Figure:
    """Final test accuracy: mean, 95 % confidence interval, and each seed as a point."""
    labels = [_caption(cell) for cell in cells]
    each = max(0.42, 0.18 * max(label.count("\n") + 1 for label in labels))
    figure, axes = plt.subplots(figsize=(8, 0.9 + each * len(cells)), layout="constrained")
    lowest = 100.0
    for row, (colour, cell) in enumerate(zip(_colours(cells), cells, strict=True)):
        points = [100 * value for value in cell.each("test_accuracy")]
        mean, half = statistics.fmean(points), interval(points)
        lowest = min(lowest, mean - (half or 0), *points)
        axes.barh(row, mean, color=colour, alpha=0.5, xerr=half, error_kw={"capsize": 3, "elinewidth": 1})
        axes.plot(points, [row] * len(points), "o", color=colour, markersize=4, markeredgecolor="black")
        axes.annotate(f"{mean:.2f}", (100, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(cells)), labels, parse_math=False)
    axes.invert_yaxis()
    start = max(0, math.floor(lowest - 0.15 * (100 - lowest) - 1))
    axes.set(xlabel="test accuracy (%)" + (f"; the axis starts at {start}" if start else ""), xlim=(start, 100))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _colours(cells: list[Cell]) -> list[Any]:
    """Controls in greys, rules in colours."""
    greys = {"sgd": "black", "random_trunk": "grey", "adam": "dimgrey"}
    bright = cycle(plt.get_cmap("tab10")(i) for i in (0, 1, 2, 3, 4, 5, 6, 8, 9))
    return [greys[name] if (name := cell.options["optimizer.name"]) in greys else next(bright) for cell in cells]


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
th { border-bottom: 2px solid #222; }
svg { width: 100%; height: auto; } .wide svg { min-width: 44rem; } .small { max-width: 44rem; }
p.notes, ul { font-size: .875rem; color: #555; max-width: 60rem; }
@media print { body { margin: 0; font-size: 11px; } .wide { overflow: visible; } .wide svg { min-width: 0; }
  table { font-size: 8px; } th, td { padding: .15rem .3rem; } svg, tr { break-inside: avoid; } }
"""


def page(
    title: str,
    header: list[str],
    rows: list[list[str]],
    notes: str,
    figures: dict[str, Figure],
    skipped: list[str],
) -> str:
    """One page of HTML that needs nothing else."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    left_out = "".join(f"<li>{html.escape(line)}</li>" for line in skipped)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p class="notes">{html.escape(notes)}</p>
<h2>Accuracy against epochs, seconds and forward passes</h2><div class="wide">{_svg(figures["curves"])}</div>
<h2>Final accuracy</h2><div class="small">{_svg(figures["accuracy"])}</div>
{f"<h2>Left out</h2><ul>{left_out}</ul>" if skipped else ""}
</body></html>
"""


def _svg(figure: Figure) -> str:
    """The figure as an element of the page."""
    text = io.StringIO()
    # Fixed ids: the same runs give the same page.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "bioopt"}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]
