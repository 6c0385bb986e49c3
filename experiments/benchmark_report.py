"""The report of a benchmark: its tables and pictures, beside those cells of the record that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .benchmark import Benchmark, beside_the_record, collected, dependences, refusals, table
from .report_page import aligned
from .tasks import benchmark_plots

if TYPE_CHECKING:
    from .finished import Run

NOTES = """Test accuracy in %: mean ± 95 % confidence interval over the seeds (Student's t); of two seeds, the mean and
both. "epochs": at equal epochs; "passes": at as many forward-pass equivalents as backpropagation takes for these (a
backward pass counts as two); one run counts for both where they are equally long. ▽: not above the random, frozen trunk
on that network and budget. "passes a step": forward + backward. "search": of the rate on held-out images, in units of a
run of backpropagation at equal epochs (mean over networks), and in seconds on one core (sum)."""


def write_benchmark(runs: list[Run], skipped: list[str], out: Path) -> tuple[str, str]:
    """Write ``report.md`` and pictures; returns the tables for a terminal, and the name of the page.

    Raises:
        Mismatch: the runs are cells of different benchmarks.
        OSError: the folder cannot be written.
    """
    benchmark, note = beside_the_record(collected(runs))
    pictures = draw(benchmark, out)
    text = ["# Benchmark\n", *([f"{note}\n"] if note else []), tables(benchmark), "", NOTES, ""]
    text += [f"- cannot be trained: {line}" for line in refusals(benchmark)]
    text += [f"- left out: {line}" for line in skipped]
    text += ["", *(f"![{picture.stem}]({picture.name})" for picture in pictures)]
    (out / "report.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    shown = [*([note] if note else [])]
    for data in benchmark.data:
        header, rows = table(benchmark, data)
        few = [i for i, head in enumerate(header) if not head.endswith((", passes", ", runs", ", s"))]
        shown += [
            "",
            f"{data}, at equal epochs",
            aligned([header[i] for i in few], [[r[i] for i in few] for r in rows]),
        ]
    return "\n".join(shown), "report.md"


def tables(benchmark: Benchmark, linked: Callable[[str], str] = lambda rule: f"`{rule}`") -> str:
    """The tables of all data sets in Markdown.

    Args:
        benchmark: all cells.
        linked: how a rule is written.
    """
    text = []
    for data in benchmark.data:
        header, rows = table(benchmark, data, linked)
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        text += [f"### {benchmark_plots.name(data)}", "", *("| " + " | ".join(line) + " |" for line in lines), ""]
    return "\n".join(text).rstrip()


def draw(benchmark: Benchmark, folder: Path) -> list[Path]:
    """The pictures of a benchmark, in this folder."""
    return [
        benchmark_plots.compute(benchmark, folder / "compute.png"),
        benchmark_plots.plausibility(benchmark, dependences(), folder / "plausibility.png"),
        benchmark_plots.rules(benchmark, folder / "rules.png"),
    ]
