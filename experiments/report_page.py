"""How a report looks: cells of tables, Markdown, pictures, and the page that holds them all."""

from __future__ import annotations

import html
import io
import math
import re
import statistics
import textwrap
import unicodedata
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .pictures import uncluttered
from .statistics import interval

if TYPE_CHECKING:
    from .report import RunGroup


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


def curves(groups: list[RunGroup]) -> Figure:
    """Test accuracy against epochs, seconds and forward passes: means over the seeds, and bands from least to most."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    axes_of: list[tuple[str, str]] = [("epoch", "epoch"), ("seconds", "seconds of training")]
    axes_of += [("forward_passes", "forward passes")]
    for axes, (key, label) in zip(grid, axes_of, strict=True):
        for colour, group in zip(_colours(groups), groups, strict=True):
            epochs = list(zip(*(run.history for run in group.runs), strict=False))  # as many as all have
            along = [statistics.fmean(line[key] for line in lines) for lines in epochs]
            seen = [[100 * line["test_accuracy"] for line in lines] for lines in epochs]
            mean = [statistics.fmean(values) for values in seen]
            axes.plot(along, mean, color=colour, marker="." if len(along) < 30 else None)
            axes.fill_between(along, list(map(min, seen)), list(map(max, seen)), color=colour, alpha=0.2, linewidth=0)
        shown = [line[key] for group in groups for run in group.runs for line in run.history]
        wide = min(shown) > 0 and max(shown) > 10 * min(shown)
        axes.set(xlabel=label)
        if wide and key != "epoch":
            axes.set_xscale("log")
            steps = (1, 2, 5) if max(shown) < 100 * min(shown) else (1,)
            axes.xaxis.set_major_locator(LogLocator(subs=steps))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        uncluttered(axes)
    grid[0].set_ylabel("test accuracy (%)")
    grid[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
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


def _caption(group: RunGroup) -> str:
    """A label for pictures, wrapped into short lines."""
    return "\n".join(textwrap.wrap(group.label, 48, max_lines=3, placeholder=" …")) or "…"


def bars(groups: list[RunGroup]) -> Figure:
    """Final test accuracy: mean, 95 % confidence interval from three seeds on, and each seed as a point."""
    labels = [_caption(group) for group in groups]
    each = max(0.42, 0.18 * max(label.count("\n") + 1 for label in labels))
    figure, axes = plt.subplots(figsize=(8, 0.9 + each * len(groups)), layout="constrained")
    lowest = 100.0
    for row, (colour, group) in enumerate(zip(_colours(groups), groups, strict=True)):
        points = [100 * value for value in group.each("test_accuracy")]
        mean, half = statistics.fmean(points), interval(points) if len(points) > 2 else None
        lowest = min(lowest, mean - (half or 0), *points)
        axes.barh(row, mean, color=colour, alpha=0.5, xerr=half, error_kw={"capsize": 3, "elinewidth": 1})
        axes.plot(points, [row] * len(points), "o", color=colour, markersize=4, markeredgecolor="black")
        axes.annotate(f"{mean:.2f}", (100, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(groups)), labels, parse_math=False)
    axes.invert_yaxis()
    start = max(0, math.floor(lowest - 0.15 * (100 - lowest) - 1))
    axes.set(xlabel="test accuracy (%)" + (f"; the axis starts at {start}" if start else ""), xlim=(start, 100))
    uncluttered(axes, grid="x")
    return figure


def _colours(groups: list[RunGroup]) -> list[Any]:
    """Controls in greys, rules in colours."""
    greys = {"sgd": "black", "random_trunk": "grey", "adam": "dimgrey"}
    bright = cycle(plt.get_cmap("tab10")(i) for i in (0, 1, 2, 3, 4, 5, 6, 8, 9))
    return [greys[name] if (name := group.options["optimizer.name"]) in greys else next(bright) for group in groups]


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
    """One page of HTML that needs no other file."""
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
