"""The table of the benchmark: the cells of a sweep, and those of the record beside them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .statistics import interval, spread

if TYPE_CHECKING:
    from .finished import Run

RECORD = Path(__file__).parent / "records" / "benchmark" / "result.json"
PLAUSIBILITY = Path(__file__).parent / "records" / "plausibility" / "result.json"
BUDGETS = ("epochs", "passes")
CONTROL = "random_trunk"
BACKPROPAGATION = "sgd"
#: in the order of `docs/plausibility.md`: what an update may depend on
DEPENDENCES = (
    *("transport", "other_layers", "other_neurons", "other_samples", "labels", "error", "loss", "layers_above"),
)


class Mismatch(ValueError):
    """Cells of benchmarks with different options."""


@dataclass
class Benchmark:
    """All cells of one benchmark, as in its record.

    A cell has ``rule``, ``family``, ``network``, ``data``, ``parameters``, ``forward_passes`` and ``backward_passes``
    of a step, ``cannot`` (why the rule cannot train the network, or nothing), and for each of `BUDGETS` the ``rate``,
    the ``accuracy`` of each seed (``None`` where it diverged), ``equivalents``, ``steps`` and ``seconds`` of a run, and
    those of the search.
    """

    protocol: dict[str, Any]  # the options that all cells share
    cells: list[dict[str, Any]]
    added: frozenset[str] = frozenset()  # rules that are not of the record, where there is one

    def __post_init__(self) -> None:
        self.places = {(cell["data"], cell["network"], cell["rule"]): cell for cell in self.cells}
        self.data = list(dict.fromkeys(cell["data"] for cell in self.cells))
        self.networks = list(dict.fromkeys(cell["network"] for cell in self.cells))
        self.rules = list(dict.fromkeys(cell["rule"] for cell in self.cells))
        self.families = {cell["rule"]: cell["family"] for cell in self.cells}

    def cell(self, data: str, network: str, rule: str) -> dict[str, Any] | None:
        """One cell, if it is there and the rule can train the network."""
        found = self.places.get((data, network, rule))
        return None if found is None or found["cannot"] else found

    def accuracies(self, data: str, network: str, rule: str, budget: str) -> list[float]:
        """The accuracy of each seed, in %; empty where one diverged, or there is none."""
        cell = self.cell(data, network, rule)
        values = cell[budget]["accuracy"] if cell else []
        return [] if None in values else [100 * value for value in values]

    def mean(self, data: str, network: str, rule: str, budget: str) -> float | None:
        """Their mean."""
        values = self.accuracies(data, network, rule, budget)
        return statistics.fmean(values) if values else None

    def overall(self, data: str, rule: str) -> float:
        """The mean over networks at equal epochs, of those that there are, by which rows are sorted."""
        found = [self.mean(data, network, rule, "epochs") for network in self.networks]
        return statistics.fmean([value for value in found if value is not None] or [-1.0])

    def cost(self, data: str, network: str, rule: str, budget: str) -> float | None:
        """Forward-pass equivalents of a run, in units of one of backpropagation."""
        cell, reference = self.cell(data, network, rule), self.cell(data, network, BACKPROPAGATION)
        if cell is None or reference is None:
            return None
        return float(cell[budget]["equivalents"] / reference["epochs"]["equivalents"])


def collected(runs: Iterable[Run]) -> Benchmark:
    """The cells of finished runs, in the order of their data, network and rule.

    Raises:
        Mismatch: they have different options.
    """
    runs = list(runs)
    protocol = shared_options(runs[0].options)
    for run in runs:
        own = shared_options(run.options)
        if own != protocol:
            wrong = next(key for key in protocol.keys() | own.keys() if protocol.get(key) != own.get(key))
            raise Mismatch(
                f"{run.folder} has {wrong}={own.get(wrong)}, and {runs[0].folder} {protocol.get(wrong)}: report on one "
                "benchmark at a time, and name another sweep by sweep=NAME"
            )
    return Benchmark(protocol, sorted(map(as_cell, runs), key=_place))


def shared_options(options: dict[str, Any]) -> dict[str, Any]:
    """Of a run's options, those of the benchmark that must be the same in all cells: not those of single rules."""
    of_rules = ("task.name", "task._target_", "task.rates.", "task.options.")
    chosen = {key: value for key, value in options.items() if key.startswith("task.") and not key.startswith(of_rules)}
    return {key.removeprefix("task."): value for key, value in chosen.items()} | {"amp": options.get("amp", False)}


def _place(cell: dict[str, Any]) -> tuple[Any, ...]:
    known = ["mnist", "cifar10", "cifar100"], ["mlp", "cnn", "lenet5", "resnet"]
    numbers = (
        names.index(cell[k]) if cell[k] in names else len(names)
        for names, k in zip(known, ("data", "network"), strict=True)
    )
    return (*numbers, cell["data"], cell["network"], cell["rule"])


def as_cell(run: Run) -> dict[str, Any]:
    """A run in the form that the record has."""
    cell = dict(run.summary["cell"])
    if cell["cannot"]:
        return cell
    for budget in BUDGETS:
        lines = [line for line in run.history if budget in line["budgets"]]
        search = [line for line in lines if line["phase"] == "search"]
        results = [line for line in lines if line["phase"] == "result"]
        cell[budget] = {
            "rate": results[0]["rate"],
            "accuracy": [line["accuracy"] for line in results],
            "steps": results[0]["steps"],
            "equivalents": results[0]["equivalents"],
            "seconds": round(statistics.fmean(line["train_seconds"] for line in results), 2),
            "search": {str(line["rate"]): line["accuracy"] for line in search},
            "search_equivalents": sum(line["equivalents"] for line in search),
            "search_seconds": round(sum(line["train_seconds"] for line in search), 2),
        }
    return cell


def recorded() -> Benchmark | None:
    """The benchmark of the record, if there is one."""
    if not RECORD.exists():
        return None
    found = json.loads(RECORD.read_text("utf-8"))
    return Benchmark(found["protocol"], found["cells"])


def beside_the_record(own: Benchmark) -> tuple[Benchmark, str]:
    """A benchmark with those cells of the record that it lacks, and a note on it."""
    record = recorded()
    if record is None:
        return own, ""
    if record.protocol != own.protocol:
        wrong = [
            k for k in record.protocol.keys() | own.protocol.keys() if record.protocol.get(k) != own.protocol.get(k)
        ]
        return own, f"The published table has other options ({', '.join(sorted(wrong))}), so it is not beside these."
    there = {(cell["data"], cell["network"], cell["rule"]) for cell in own.cells}
    more = [c for c in record.cells if (c["data"], c["network"], c["rule"]) not in there]
    if not more:
        return own, ""
    added = frozenset(own.rules) - frozenset(record.rules)
    note = f"{len(own.cells)} cells of this sweep; the other {len(more)} are those of the record."
    return Benchmark(own.protocol, sorted([*own.cells, *more], key=_place), added), note


def search_cost(benchmark: Benchmark, data: str, rule: str) -> tuple[float, float]:
    """Of the search on all networks of a data set: equivalents in units of a run of backpropagation, and seconds."""
    shares, seconds = [], 0.0
    for network in benchmark.networks:
        cell, reference = (benchmark.cell(data, network, name) for name in (rule, BACKPROPAGATION))
        if cell is None:
            continue
        searches = [cell["epochs"]] if same_budgets(cell) else [cell[budget] for budget in BUDGETS]
        seconds += sum(search["search_seconds"] for search in searches)
        if reference is not None:
            found = sum(search["search_equivalents"] for search in searches)
            shares.append(found / reference["epochs"]["equivalents"])
    return (statistics.fmean(shares) if shares else 0.0), seconds


def same_budgets(cell: dict[str, Any]) -> bool:
    """Whether the two budgets are equally long, so that one run counts for both."""
    return bool(cell["epochs"]["steps"] == cell["passes"]["steps"])


def table(
    benchmark: Benchmark, data: str, linked: Callable[[str], str] = lambda rule: rule
) -> tuple[list[str], list[list[str]]]:
    """The table of one data set: a row for each rule, two columns for each network.

    Args:
        benchmark: all cells.
        data: the data set.
        linked: how a rule is written.
    """
    networks = [n for n in benchmark.networks if any((c["data"], c["network"]) == (data, n) for c in benchmark.cells)]
    header = ["rule", "passes a step", *(f"{n}, {budget}" for n in networks for budget in BUDGETS)]
    header += ["search, runs", "search, s"]
    rows = []
    present = [rule for rule in benchmark.rules if any((c["data"], c["rule"]) == (data, rule) for c in benchmark.cells)]
    for rule in sorted(present, key=lambda rule: -benchmark.overall(data, rule)):
        counts = [(c["forward_passes"], c["backward_passes"]) for n in networks if (c := benchmark.cell(data, n, rule))]
        several = sorted(dict.fromkeys(counts))
        cells = [result(benchmark, data, n, rule, budget) for n in networks for budget in BUDGETS]
        shares, seconds = search_cost(benchmark, data, rule)
        name = linked(rule) + (" (added)" if rule in benchmark.added else "")
        passes = " or ".join(f"{forward} + {backward}" for forward, backward in several)
        rows.append([name, passes or "–", *cells, f"{shares:.1f}", f"{seconds:.0f}"])
    return header, rows


def result(benchmark: Benchmark, data: str, network: str, rule: str, budget: str) -> str:
    """One cell at one budget: accuracy in %, its spread, and a mark where it is not above the control.

    A dash where the rule cannot train the network; empty where the cell is missing.
    """
    if benchmark.cell(data, network, rule) is None:
        return "–" if (data, network, rule) in benchmark.places else ""
    values = benchmark.accuracies(data, network, rule, budget)
    if not values:
        return "diverged"
    text = f"{statistics.fmean(values):.1f}{spread(values, '.1f', '.1f')}"
    control = benchmark.mean(data, network, CONTROL, budget)
    below = control is not None and rule != CONTROL and statistics.fmean(values) <= control
    return f"{text} ▽" if below else text


def refusals(benchmark: Benchmark) -> list[str]:
    """The rules that cannot train a network, each with its own message."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in benchmark.cells:
        if cell["cannot"]:
            networks = found.setdefault((cell["rule"], cell["cannot"]), [])
            networks += [cell["network"]] if cell["network"] not in networks else []
    return [f"{rule} on {', '.join(networks)}: {why}" for (rule, why), networks in found.items()]


def dependences() -> dict[str, float]:
    """For each rule of the record of ``experiment=plausibility``: on how many of `DEPENDENCES` its updates depend.

    Rules of which nothing could be measured, because their trunk has no update, are left out.
    """
    measured = json.loads(PLAUSIBILITY.read_text("utf-8"))["measured"]
    cards: dict[str, dict[str, float]] = {}
    for key, (value, *_) in measured.items():
        rule, _, measure = key.partition(".")
        if measure in DEPENDENCES:
            cards.setdefault(rule, {})[measure] = value
    return {rule: sum(value > 0 for value in card.values()) for rule, card in cards.items()}


def half_interval(values: list[float]) -> tuple[float, float]:
    """How far the spread of a mean reaches below and above it: its 95 % interval, or below three seeds the range."""
    half = interval(values) if len(values) > 2 else None
    middle = statistics.fmean(values)
    return (half, half) if half is not None else (middle - min(values), max(values) - middle)
