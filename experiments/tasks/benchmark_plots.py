"""Pictures of the benchmark: accuracy against compute and against plausibility, and a small picture for each rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import offset_copy

from ..benchmark import BACKPROPAGATION, BUDGETS, CONTROL, Benchmark, half_interval
from ..pictures import BLUE, GREEN, ORANGE, PINK, SKY, VERMILION, saved, uncluttered

GREY = "#7F7F7F"
#: colour and marker of a family; more families than colours, so that two share one
STYLES = {
    "gradient": ("black", "*"),
    "control": (GREY, "X"),
    "feedback": (BLUE, "o"),
    "target": (GREEN, "P"),
    "energy": (PINK, "D"),
    "temporal": (GREEN, "v"),
    "local": (SKY, "s"),
    "perturbation": (ORANGE, "^"),
    "hebbian": (VERMILION, "h"),
    "your own": ("#F0E442", "d"),  # Okabe and Ito's yellow, which nothing else has
}
OTHERS = (GREY, ".")  # of families that are not in the list
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NAMES |= {"mlp": "MLP", "cnn": "CNN", "lenet5": "LeNet-5", "resnet": "ResNet"}


def style(family: str) -> tuple[str, str]:
    """Colour and marker of a family."""
    return STYLES.get(family, OTHERS)


def name(key: str) -> str:
    """A name as it is shown."""
    return NAMES.get(key, key.replace("_", " "))


def compute(benchmark: Benchmark, path: Path) -> Path:
    """Accuracy at equal epochs against the passes that they took, with a line to the accuracy at equal passes."""
    rows, columns = len(benchmark.data), len(benchmark.networks)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(8.0, 0.6 + 3.4 * columns), 1.2 + 3.0 * rows), layout="constrained", squeeze=False
    )
    for row, data in zip(grid, benchmark.data, strict=True):
        for axes, network in zip(row, benchmark.networks, strict=True):
            _compute(benchmark, axes, data, network)
        row[0].set_ylabel("test accuracy (%)")
    legend(figure, benchmark)
    figure.supxlabel("compute of a run, in units of backpropagation (forward-pass equivalents)", fontsize=10)
    return saved(figure, path)


def _compute(benchmark: Benchmark, axes: Axes, data: str, network: str) -> None:
    costs = []
    best: dict[str, tuple[float, float, str]] = {}  # of a family
    for rule in benchmark.rules:
        x = benchmark.cost(data, network, rule, "epochs")
        means = {budget: benchmark.mean(data, network, rule, budget) for budget in BUDGETS}
        colour, marker = style(benchmark.families[rule])
        if x is None or (y := means["epochs"]) is None:
            continue
        costs.append(x)
        low, high = half_interval(benchmark.accuracies(data, network, rule, "epochs"))
        axes.errorbar(x, y, [[low], [high]], color=colour, elinewidth=0.8, alpha=0.6, zorder=2)
        axes.plot(x, y, marker, color=colour, markersize=7 if marker != "*" else 11, markeredgecolor="white",
                  markeredgewidth=0.5, zorder=3)  # fmt: skip
        equal, at = means["passes"], benchmark.cost(data, network, rule, "passes")
        if equal is not None and at is not None:
            axes.plot([x, at], [y, equal], color=colour, linewidth=0.7, alpha=0.6, zorder=1)
            axes.plot(at, equal, ".", color=colour, markersize=4, zorder=2)
        family = benchmark.families[rule]
        if family not in best or y > best[family][1]:
            best[family] = (x, y, rule)
    control = benchmark.mean(data, network, CONTROL, "epochs")
    if control is not None:
        axes.axhline(control, color=GREY, linestyle="--", linewidth=0.9, zorder=0)
    columns: dict[int, list[tuple[float, float, str]]] = {}
    for point in best.values():
        columns.setdefault(round(2 * math.log(point[0])), []).append(point)
    label_apart(axes, columns.values())
    axes.set_xscale("log")
    low, high = min([*costs, 1.0]), max([*costs, 1.0])
    axes.set_xlim(low / 1.5, high * 2.2)
    ticks = [t for t in (0.1, 1 / 3, 1, 3, 10, 30, 100) if low / 1.5 <= t <= high * 2.2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "⅓" if abs(value - 1 / 3) < 0.01 else f"{value:g}"))
    axes.set_title(f"{name(data)}, {name(network)}", fontsize=10)
    uncluttered(axes)


def plausibility(benchmark: Benchmark, dependent: Mapping[str, float], path: Path) -> Path:
    """Mean accuracy over the networks against the number of quantities that an update depends on.

    Args:
        benchmark: all cells.
        dependent: for each rule, that number; rules that are missing were not measured, and are left out.
        path: where to write it.
    """
    columns = len(benchmark.data)
    figure, grid = plt.subplots(
        1, columns, figsize=(max(9.0, 0.8 + 5.2 * columns), 5.2), layout="constrained", squeeze=False
    )
    for axes, data in zip(grid[0], benchmark.data, strict=True):
        points = []
        places: dict[float, list[tuple[float, str]]] = {}
        for rule in benchmark.rules:
            y = _over_networks(benchmark, data, rule)
            if rule in dependent and y is not None:
                places.setdefault(dependent[rule], []).append((y, rule))
        for x, found in places.items():
            for number, (y, rule) in enumerate(sorted(found)):
                shifted = x + 0.08 * ((number % 3) - 1)  # equal counts stand beside one another
                colour, marker = style(benchmark.families[rule])
                axes.plot(shifted, y, marker, color=colour, markersize=8 if marker != "*" else 12,
                          markeredgecolor="white", markeredgewidth=0.5, zorder=3)  # fmt: skip
                points.append((shifted, y, rule))
        for rule, line in ((BACKPROPAGATION, "-"), (CONTROL, "--")):
            level = _over_networks(benchmark, data, rule)
            if level is not None:
                colour = style(benchmark.families[rule])[0]
                axes.axhline(level, color=colour, linestyle=line, linewidth=0.9, zorder=0, label=name(rule))
        counts = [*places] or [0.0]
        axes.set_xlim(min(counts) - 0.5, max(counts) + 1.4)
        axes.xaxis.set_major_locator(FixedLocator(list(range(int(min(counts)), int(max(counts)) + 1))))
        label_apart(axes, [[point for point in points if round(point[0]) == column] for column in sorted(counts)])
        networks = ", ".join(map(name, benchmark.networks))
        axes.set_title(f"{name(data)}, {'mean over ' * (len(benchmark.networks) > 1)}{networks}", fontsize=10)
        uncluttered(axes)
    grid[0][0].set_ylabel("test accuracy at equal epochs (%)")
    legend(figure, benchmark)
    figure.supxlabel("quantities that a hidden layer's update depends on, of eight that were measured", fontsize=10)
    return saved(figure, path)


def _over_networks(benchmark: Benchmark, data: str, rule: str) -> float | None:
    found = [benchmark.mean(data, network, rule, "epochs") for network in benchmark.networks]
    there = [network for network in benchmark.networks if benchmark.cell(data, network, BACKPROPAGATION)]
    values = [value for value in found if value is not None]
    return statistics.fmean(values) if values and len(values) >= len(there) else None


def rules(benchmark: Benchmark, path: Path) -> Path:
    """A small picture for each rule: its accuracy on each network, between backpropagation and the random trunk."""
    ordered = sorted(
        (rule for rule in benchmark.rules if rule not in (BACKPROPAGATION, CONTROL)),
        key=lambda rule: (list(STYLES).index(f) if (f := benchmark.families[rule]) in STYLES else 99, rule),
    )
    ordered = ordered or benchmark.rules  # the controls alone
    columns = min(6, len(ordered))
    rows = math.ceil(len(ordered) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(0.6 + 1.75 * columns, 1.1 + 1.5 * rows), layout="constrained", squeeze=False,
        sharex=True, sharey=True,
    )  # fmt: skip
    wide = len(benchmark.networks) + 0.6  # of a data set
    for axes, rule in zip(grid.flat, ordered, strict=False):
        colour, marker = style(benchmark.families[rule])
        for i, data in enumerate(benchmark.data):
            for other, line in ((BACKPROPAGATION, "-"), (CONTROL, ":")):
                for j, network in enumerate(benchmark.networks):
                    level = benchmark.mean(data, network, other, "epochs")
                    if level is not None:
                        x = i * wide + j
                        axes.hlines(level, x - 0.4, x + 0.4, color=GREY, linestyle=line, linewidth=1.2)
            _course(benchmark, axes, data, rule, i * wide, color=colour, marker=marker, markersize=5, linewidth=1.2)
            for j, network in enumerate(benchmark.networks):
                values = benchmark.accuracies(data, network, rule, "passes")
                if values:
                    axes.plot(i * wide + j, statistics.fmean(values), marker, markersize=5, markerfacecolor="none",
                              markeredgecolor=colour, markeredgewidth=0.9)  # fmt: skip
        axes.set_title(name(rule), fontsize=8)
        axes.set(ylim=(0, 102), yticks=[0, 50, 100])
        ticks = [i * wide + j for i in range(len(benchmark.data)) for j in range(len(benchmark.networks))]
        axes.set_xticks(ticks, [name(n) for _ in benchmark.data for n in benchmark.networks], fontsize=6, rotation=90)
        axes.tick_params(axis="y", labelsize=7)
        uncluttered(axes)
    for axes in grid.flat[len(ordered) :]:
        axes.axis("off")
    figure.suptitle(
        f"Test accuracy (%); in each picture {', then '.join(map(name, benchmark.data))}. Filled: equal epochs; open: "
        "equal passes.\nGrey: backpropagation (solid) and the random, frozen trunk (dotted)",
        fontsize=9,
    )
    return saved(figure, path)


def _course(benchmark: Benchmark, axes: Axes, data: str, rule: str, shift: float, **look: object) -> None:
    """The accuracies at equal epochs of one rule, from network to network."""
    found = [(shift + j, benchmark.mean(data, n, rule, "epochs")) for j, n in enumerate(benchmark.networks)]
    points = [(x, y) for x, y in found if y is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **look)  # type: ignore[arg-type]


def label_apart(axes: Axes, columns: Iterable[list[tuple[float, float, str]]]) -> None:
    """Names to the right of points, moved up or down as far as those of one column would cover one another."""
    low, high = axes.get_ylim()
    high = min(high, max(100.5, low + 1))  # no accuracy is above 100
    axes.set_ylim(low, high)
    line = (high - low) * 7.5 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    for points in columns:
        points = sorted(points, key=lambda point: point[1])
        right = max((x for x, *_ in points), default=0.0)
        for (x, y, text), place in zip(points, _apart([y for _, y, _ in points], line, low, high), strict=True):
            away = abs(place - y) > line or x < right
            axes.annotate(
                name(text), (x, y), (right, place), fontsize=6, va="center", annotation_clip=False,
                textcoords=offset_copy(axes.transData, axes.get_figure(root=True), x=14 if away else 6, units="points"),
                arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "0.6"} if away else None,
            )  # fmt: skip


def _apart(heights: list[float], line: float, low: float, high: float) -> list[float]:
    """Heights in ascending order, a line apart at least: groups of those that are nearer stand about their mean."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-1], line) < _bottom(groups[-2], line) + line * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    places: list[float] = []
    for group in groups:
        bottom = min(max(_bottom(group, line), low + line / 2), high - line * (len(group) - 0.5))
        places += [bottom + line * number for number in range(len(group))]
    return places


def _bottom(group: list[float], line: float) -> float:
    return statistics.fmean(group) - line * (len(group) - 1) / 2


def legend(figure: Figure, benchmark: Benchmark) -> None:
    """The families that are there, above all panels."""
    there = dict.fromkeys(benchmark.families.values())
    handles = [
        Line2D([], [], linestyle="", color=style(family)[0], marker=style(family)[1], markersize=7, label=family)
        for family in [*(f for f in STYLES if f in there), *(f for f in there if f not in STYLES)]
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), frameon=False, fontsize=9)
