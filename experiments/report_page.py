"""How a report looks: cells of tables, Markdown, and pictures."""

from __future__ import annotations

import html
import itertools
import math
import re
import statistics
import textwrap
import unicodedata
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .pictures import style, uncluttered
from .statistics import interval

if TYPE_CHECKING:
    from .finished import RunGroup


def number(value: Any) -> bool:
    """Whether it is a number that can be averaged and drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def printable(value: Any) -> Any:
    """The same with line breaks, control characters and the like as escapes, in all its strings."""
    if isinstance(value, str):
        if value.isprintable():
            return value
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    if isinstance(value, dict):
        return {printable(key): printable(each) for key, each in value.items()}
    return [printable(each) for each in value] if isinstance(value, list) else value


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """The table for a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(f"{c:<{w}}" if not i else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The table in Markdown."""
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


AXES = {"epoch": "epoch", "seconds": "seconds of training", "forward_passes": "forward passes"}


def curves(groups: list[RunGroup]) -> Figure:
    """Test accuracy against epochs, seconds and forward passes: means over the seeds, and bands from least to most."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    for axes, key in zip(grid, AXES, strict=True):
        _course(axes, groups, key)
    grid[0].set_ylabel("test accuracy (%)")
    labels = [_caption(group) for group in groups]
    longest = max(len(line) for label in labels for line in label.splitlines())
    legend = figure.legend(
        grid[0].lines,
        [str(number) for number in range(len(groups))],
        loc="outside lower center",
        ncols=max(1, min(6, 150 // (longest + 8))),
        frameon=False,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):  # only now: "_" would hide an entry
        text.set(text=label, parse_math=False)
    return figure


def panels(groups: list[RunGroup]) -> list[Figure]:
    """The same as `curves` in three figures, which a page can put beside or below each other, without a legend."""
    figures = []
    for key in AXES:
        figure, axes = plt.subplots(figsize=(4.2, 3.4), layout="constrained")
        _course(axes, groups, key)
        axes.set_ylabel("test accuracy (%)")
        figures.append(figure)
    return figures


def _course(axes: Axes, groups: list[RunGroup], key: str) -> None:
    """Test accuracy of all groups against one of `AXES`."""
    for drawn_as, group in zip(styles(groups), groups, strict=True):
        epochs = list(zip(*(run.history for run in group.runs), strict=False))  # as many as all have
        along = [statistics.fmean(line[key] for line in lines) for lines in epochs]
        seen = [[100 * line["test_accuracy"] for line in lines] for lines in epochs]
        axes.plot(along, [statistics.fmean(values) for values in seen], **drawn_as)
        least, most, colour = list(map(min, seen)), list(map(max, seen)), drawn_as["color"]
        if len(along) == 1:  # a band of one epoch has no width
            axes.vlines(along, least, most, color=colour, alpha=0.5)
        else:
            axes.fill_between(along, least, most, color=colour, alpha=0.2, linewidth=0)
    shown = [line[key] for group in groups for run in group.runs for line in run.history]
    axes.set_xlabel(AXES[key])
    if key == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if min(shown) == max(shown):  # of single epochs
            axes.set_xlim(min(shown) - 1, max(shown) + 1)
    elif min(shown) == max(shown):
        axes.set_xlim(0, 2 * max(shown) or 1)
    elif min(shown) > 0 and max(shown) > 10 * min(shown):
        axes.set_xscale("log")
        steps = (1, 2, 5) if max(shown) < 100 * min(shown) else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    uncluttered(axes)


def _caption(group: RunGroup) -> str:
    """A label for pictures, wrapped into short lines."""
    return "\n".join(textwrap.wrap(group.label, 48, max_lines=3, placeholder=" …")) or "…"


def bars(groups: list[RunGroup]) -> Figure:
    """Final test accuracy: mean, 95 % confidence interval from three seeds on, and each seed as a point."""
    labels = [_caption(group) for group in groups]
    each = max(0.42, 0.18 * max(label.count("\n") + 1 for label in labels))
    figure, axes = plt.subplots(figsize=(8, 0.9 + each * len(groups)), layout="constrained")
    lowest = 100.0
    for row, (drawn_as, group) in enumerate(zip(styles(groups), groups, strict=True)):
        colour = drawn_as["color"]
        points = [100 * value for value in group.each("test_accuracy")]
        mean, half = statistics.fmean(points), interval(points) if len(points) > 2 else None
        lowest = min(lowest, mean - (half or 0), *points)
        axes.barh(row, mean, color=colour, alpha=0.5, xerr=half, error_kw={"capsize": 3, "elinewidth": 1})
        axes.plot(points, [row] * len(points), drawn_as["marker"], color=colour, markersize=5, markeredgecolor="black")
        axes.annotate(f"{mean:.2f}", (100, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(groups)), labels, parse_math=False)
    axes.invert_yaxis()
    start = max(0, math.floor(lowest - 0.15 * (100 - lowest) - 1))
    axes.set(xlabel="test accuracy (%)" + (f"; the axis starts at {start}" if start else ""), xlim=(start, 100))
    uncluttered(axes, grid="x")
    return figure


def styles(groups: list[RunGroup]) -> list[dict[str, Any]]:
    """Controls in black and greys, rules in colours."""
    greys = {"sgd": "black", "random_trunk": "grey", "adam": "dimgrey"}
    names = [group.options["optimizer.name"] for group in groups]
    places = itertools.count()
    return [style(greys[name]) if name in greys else style(next(places)) for name in names]
