"""Is one cost good enough for all tasks? Outer loops choose, for each, the mixture of costs that a learner is told."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from omegaconf import DictConfig
from torch import Tensor, nn

import bioopt
from bioopt import Diverged
from bioopt.costs import UNLABELLED, Cost, Mixture

from . import building, data, training
from .areas import Area, assemble, fit, split
from .data import problems
from .data.problems import PROBLEMS
from .files import write_whole
from .options import require_counts
from .pictures import saved, uncluttered
from .statistics import interval, percent, with_interval
from .tasks import Task

LEAST = 0.02  # a smaller share is none: it would take time and hardly be told
LOOPS = {"optuna": "Optuna", "perturbation": "perturbation"}  # the outer loops, as pictures call them
WAYS = ("one_size", "best_cost", *LOOPS)  # to choose the cost of a task, what the others are compared with first
SAID = {"best_cost": "best cost of each", **LOOPS}
COLOURS = plt.get_cmap("Set2").colors  # type: ignore[attr-defined]  # of costs


@dataclass(frozen=True)
class Choice:
    """What an outer loop decides.

    Attributes:
        shares: of each cost in what the trunk is told at the start; they sum to 1.
        rate: a factor of the learning rate.
    """

    shares: tuple[float, ...]
    rate: float

    @classmethod
    def of(cls, logits: Sequence[float], rate: float) -> Choice:
        """Shares in proportion to ``exp(logits)``, those below `LEAST` left out."""
        shares = torch.tensor(logits, dtype=torch.float64).softmax(0)
        shares = torch.where(shares < LEAST, 0, shares)
        return cls(tuple((shares / shares.sum()).tolist()), rate)


class Tried:
    """The points that an outer loop has tried, each once, with what the learner came to on the validation images."""

    def __init__(self, accuracy: Callable[[Choice], float]) -> None:
        self.accuracy = accuracy
        self.found: dict[Choice, float] = {}

    def __call__(self, choice: Choice) -> float:
        """The validation accuracy of this point, a fraction."""
        if choice not in self.found:
            self.found[choice] = self.accuracy(choice)
        return self.found[choice]

    @property
    def best(self) -> Choice:
        """The best of them, and of equals the first."""
        return max(self.found, key=lambda choice: self.found[choice])


class MetaCost(Task):
    """For each task and learner: every cost by itself, and mixtures that two outer loops choose by the true outcome.

    The trunk of a learner learns from a mixture of costs, through local readouts: the head for all costs of class
    scores, one of its own for each other cost that needs any. Where no cost is of class scores, the head is an area by
    itself, which learns from cross-entropy and passes no error to the trunk. Each cost is
    divided by the length of the gradient that it sends to the activity of the untrained trunk, so that a share is a
    share of what the trunk is told at the start, and one rate suits all costs about equally well.

    Each cost by itself learns at every rate of a grid, and the best is kept. `optuna` (J. Bergstra et al., 2011,
    *Algorithms for hyper-parameter optimization*: TPE) and `perturb`, `bioopt.WeightPerturbation`, search the logits of
    the shares and the logarithm of the rate, with as many inner learnings each. What they see of a learner is the share
    of right answers on validation images, whose labels are true. It is what is wanted in the end, and can be compared
    between costs, as a cross-entropy of scores cannot that were taught to be 0 and 1. All learnings of a search start
    from the same weights and see the same batches, so that they differ by what was chosen alone. What each search has
    found to be best learns again, from other weights and batches, and is tested. A round is one task, one learner and
    one repetition.

    Where labels are missing, half of each batch has some.

    Args:
        config: of the run: ``model``, ``data``, and the learners, ``config.rules``, each as in ``conf/optimizer``.
        device: where to compute.
        problems: the tasks, functions of `experiments.data.problems` by name, each with its options.
        costs: names in ``conf/cost``, two or more.
        rates: factors of a learner's rate, the grid for single costs; mixtures are searched between its ends.
        learnings: inner learnings of each outer loop.
        population: directions of a step of the perturbation, each tried both ways.
        sigma: of the perturbation, in nats of logits and of the rate.
        lr: of the perturbation, in these units; its losses are standardised (``shaping="zscore"``).
        train: training images, drawn anew for each repetition.
        validation: validation images, other ones of the training set.
        steps: of an inner learning.
        batch_size: of a step.
        tested: how many learnings, each from weights of its own, a test accuracy is the mean of.
        repetitions: how often, each with its own images, weights and batches.
    """

    def __init__(
        self,
        config: DictConfig,
        device: torch.device,
        *,
        problems: dict[str, dict[str, Any]],
        costs: list[str],
        rates: list[float],
        learnings: int,
        population: int,
        sigma: float,
        lr: float,
        train: int,
        validation: int,
        steps: int,
        batch_size: int,
        tested: int,
        repetitions: int,
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise ValueError("it needs Optuna: pip install -e '.[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        require_counts(
            learnings=learnings, train=train, validation=validation, steps=steps, batch_size=batch_size, tested=tested,
            repetitions=repetitions,
        )  # fmt: skip
        require_counts(2, population=population)  # whose losses are standardised
        if len(set(costs)) < 2:
            raise ValueError(f"task.costs={costs} must be two costs or more: there is nothing to choose")
        for name in costs:
            if building.build_cost(name, "task.costs").sequences:
                raise ValueError(f"task.costs has '{name}', which needs sequences, and these tasks are single images")
        if not rates or not all(rate > 0 for rate in rates):
            raise ValueError(f"task.rates={rates} must be one factor of the learning rate or more, each > 0")
        if learnings < 1 + 2 * population:
            raise ValueError(
                f"task.learnings={learnings} must be >= {1 + 2 * population}: the start, and each direction of "
                f"task.population={population} both ways"
            )
        for name in problems:
            if name not in PROBLEMS:
                raise ValueError(f"task.problems has '{name}', which is not one; there are {', '.join(PROBLEMS)}")
        self.config, self.device, self.seed = config, device, int(config.seed)
        self.rules, self.problems, self.costs, self.rates = list(config.rules), problems, list(costs), list(rates)
        self.learnings, self.population, self.sigma, self.lr = learnings, population, sigma, lr
        self.train, self.validation, self.steps, self.batch_size = train, validation, steps, batch_size
        self.tested = tested
        self.rounds = repetitions * len(problems) * len(self.rules)
        self.images = data.from_config(config.data, device)
        for name in problems:  # mistakes in their options are told now
            self.posed(name, 0, validation)

    def posed(self, problem: str, seed: int, validation: int | None) -> data.Images:
        """A task, to be tested on so many validation images, or (``None``) on the test set."""
        generator = torch.Generator().manual_seed(seed)
        images = problems.subset(self.images, generator, self.train, validation)
        return PROBLEMS[problem](images, generator, **self.problems[problem])

    def round(self, number: int) -> dict[str, Any]:
        """One task, one learner, one repetition: each cost alone, both searches, and the test of what was chosen."""
        repetition, rest = divmod(number - 1, len(self.problems) * len(self.rules))
        problem, rule = list(self.problems)[rest // len(self.rules)], self.rules[rest % len(self.rules)]
        seed = self.seed * 1_000_003 + repetition  # of all learners: a round needs nothing of the rounds before
        search, *fresh = torch.randint(
            2**31, (1 + self.tested,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        images = self.posed(problem, seed, self.validation)
        lengths = self.lengths(images, search)

        def accuracy(choice: Choice) -> float:
            return self.accuracy(rule, choice, images, search, lengths)

        alone = [Tried(accuracy) for _ in self.costs]
        for i, tried in enumerate(alone):
            for rate in self.rates:
                tried(Choice(tuple(float(i == j) for j in range(len(self.costs))), rate))
        searches = {loop: Tried(accuracy) for loop in LOOPS}
        path = self.perturb(searches["perturbation"], search)
        self.optuna(searches["optuna"], search)

        real = self.posed(problem, seed, None)  # only now the test set

        def told(tried: Tried) -> dict[str, Any]:
            best = tried.best
            right = statistics.fmean(self.accuracy(rule, best, real, s, lengths) for s in fresh)
            shares = [round(share, 4) for share in best.shares]
            return {"rate": best.rate, "validation": tried.found[best], "test": right, "shares": shares}

        chosen = {name: told(tried) for name, tried in zip(self.costs, alone, strict=True)}
        chosen |= {loop: told(tried) for loop, tried in searches.items()}
        fixed = max(self.costs, key=lambda name: chosen[name]["validation"])
        return {
            "problem": problem,
            "rule": rule,
            "repetition": repetition,
            "best_cost": fixed,
            "test_of_best_cost": chosen[fixed]["test"],
            **{f"test_of_{loop}": chosen[loop]["test"] for loop in LOOPS},
            "chosen": chosen,
            "tried": {loop: [round(a, 5) for a in tried.found.values()] for loop, tried in searches.items()},
            "path": [[round(share, 4) for share in shares] for shares in path],
        }

    def perturb(self, tried: Tried, seed: int) -> list[tuple[float, ...]]:
        """Search by perturbation of the logits and of the rate; the shares at which each of its steps stood."""
        place = nn.Parameter(torch.zeros(len(self.costs) + 1, dtype=torch.float64))
        rule = bioopt.WeightPerturbation(
            [place], lr=self.lr, sigma=self.sigma, population=self.population, shaping="zscore", seed=seed
        )
        low, high = math.log(min(self.rates)), math.log(max(self.rates))

        def here() -> Choice:
            *logits, rate = place.tolist()
            return Choice.of(logits, math.exp(min(max((low + high) / 2 + rate, low), high)))

        def closure() -> Tensor:
            with torch.enable_grad():  # the learner inside may want gradients, whatever the rule outside does
                return torch.tensor(1 - tried(here()), dtype=torch.float64)

        path = [here().shares]
        for _ in range((self.learnings - 1) // (2 * self.population)):
            rule.step(closure)
            path.append(here().shares)
        rule.close()
        return path

    def optuna(self, tried: Tried, seed: int) -> None:
        """Search by Optuna's TPE, from the same start."""
        import optuna

        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed % 2**31))
        start = dict.fromkeys(self.costs, 0.0) | {"rate": math.sqrt(min(self.rates) * max(self.rates))}
        study.enqueue_trial(start)
        for _ in range(self.learnings):
            trial = study.ask()
            logits = [trial.suggest_float(name, -3, 3) for name in self.costs]
            rate = trial.suggest_float("rate", min(self.rates), max(self.rates), log=True)
            study.tell(trial, tried(Choice.of(logits, rate)))

    def accuracy(self, rule: str, choice: Choice, images: data.Images, seed: int, lengths: dict[str, float]) -> float:
        """Of a learner, after its learning, on the images' test set; that of chance where it has diverged."""
        torch.manual_seed(seed)
        model = building.build_model(self.config, images).to(self.device)
        areas = self.areas(rule, choice, model, images, seed, lengths)
        generator = torch.Generator().manual_seed(seed)
        shown = images.prepare(images.train_images)
        try:
            for index in self.batches(images, generator):
                inputs, labels = shown[index], images.train_labels[index]
                for area in areas:
                    area.train()
                    try:
                        area.optimizer.step(area.closure(inputs, labels))  # type: ignore[arg-type]
                    except Diverged:
                        return 1 / images.classes
                    assert area.scheduler is not None
                    area.scheduler.step()
                    if area is not areas[-1]:
                        inputs = area.says(inputs)
        finally:
            training.close(areas)
        model.eval()
        right = []
        with torch.no_grad():
            for inputs, labels in images.test_batches(data.Augment(), 2000):
                scores = model(inputs)
                right.append((scores.argmax(1) == labels) & scores.isfinite().all(1))
        return float(torch.cat(right).double().mean())

    def areas(
        self, rule: str, choice: Choice, model: nn.Module, images: data.Images, seed: int, lengths: dict[str, float]
    ) -> list[Area]:
        """Trunk and head, each with its mixture of costs and its optimizer."""
        shares = {name: share for name, share in zip(self.costs, choice.shares, strict=True) if share}
        costs: dict[str, Cost] = {name: building.build_cost(name) for name in shares}
        weights = {name: share / lengths[name] for name, share in shares.items()}
        trunk, head = split(model)
        of_scores = [name for name in costs if costs[name].scores]
        if of_scores:  # the head is what they read the trunk by
            parts = {name: costs.pop(name) for name in of_scores}
            costs["scores"] = Mixture(parts, {name: weights.pop(name) for name in of_scores}, readout=head)
            weights["scores"] = 1.0
        stretches: dict[str, tuple[nn.Module, Cost]] = {"trunk": (trunk, Mixture(costs, weights))}
        if not of_scores:
            alone = {"cross_entropy": building.build_cost("cross_entropy")}
            stretches["head"] = (head, Mixture(alone, {"cross_entropy": 1 / lengths["cross_entropy"]}))
        run = building.with_rule(self.config, rule, seed=seed, lr=self.config.rules[rule].lr * choice.rate)
        made = assemble(run, model, stretches, images)
        for area in made:
            if isinstance(area.optimizer, bioopt.SynapticRule):
                raise ValueError(f"rules.{rule} learns from no cost, so none can be chosen: '~rules.{rule}'")
            area.scheduler = building.build_schedule("cosine", area.optimizer, self.steps)
        return made

    def lengths(self, images: data.Images, seed: int) -> dict[str, float]:
        """Of the gradient that each cost sends a sample's activity in an untrained trunk: root mean square."""
        torch.manual_seed(seed)
        trunk, _ = split(building.build_model(self.config, images).to(self.device))
        index = self.draw(images, 256, torch.Generator().manual_seed(seed))
        inputs, labels = images.prepare(images.train_images[index]), images.train_labels[index]
        found = {}
        for name in dict.fromkeys([*self.costs, "cross_entropy"]):
            cost = building.build_cost(name)
            fit(cost, "trunk", trunk, inputs[:2], images.classes, 1, last=False)
            said = trunk(cost.to(self.device).seen(inputs)).detach().requires_grad_()
            (slope,) = torch.autograd.grad(cost(said, labels, inputs=inputs).sum(), said)
            found[name] = float(slope.flatten(1).square().sum(1).mean().sqrt().clamp(min=1e-12))
        return found

    def batches(self, images: data.Images, generator: torch.Generator) -> list[Tensor]:
        """Which training images each step sees."""
        return [self.draw(images, self.batch_size, generator) for _ in range(self.steps)]

    def draw(self, images: data.Images, count: int, generator: torch.Generator) -> Tensor:
        """Training images at random, as many with a label as without where there are such."""
        known = (images.train_labels != UNLABELLED).cpu()
        pools = [pool for pool in (known.nonzero().squeeze(1), (~known).nonzero().squeeze(1)) if len(pool)]
        sizes = [count] if len(pools) == 1 else [count - count // 2, count // 2]
        drawn = [
            pool[torch.randint(len(pool), (size,), generator=generator)]
            for pool, size in zip(pools, sizes, strict=True)
        ]
        return torch.cat(drawn).to(images.train_labels.device)

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """For each learner, what a choice for each task gains over one size for all, and accuracies of each task."""
        found: dict[str, float] = {}
        results = {rule: Result([line for line in history if line["rule"] == rule], self) for rule in self.rules}
        for rule, result in results.items():
            for way in WAYS[1:]:
                gains = result.gains(way)
                found |= with_interval(f"{rule}_{way}_over_one_size", gains)
        for rule, result in results.items():
            for problem in self.problems:
                found |= {f"{rule}_{problem}_{way}": statistics.fmean(result.tests(problem, way)) for way in WAYS}
        text = "\n".join(part for rule, result in results.items() for part in result.table(rule))
        write_whole(folder / "table.md", text + "\n")
        print(f"\n{text}")
        return found, [
            self.heat(results, title, folder / "costs.png"),
            self.paths(results, title, folder / "path.png"),
        ]

    def heat(self, results: dict[str, Result], title: str, path: Path) -> Path:
        """Test accuracy of each task and cost, coloured by its difference to the one size, a panel for each learner."""
        columns, rows = [*self.costs, *LOOPS], [*self.problems, "mean"]
        figure, panels = plt.subplots(
            len(results), 1, figsize=(8.4, 1.3 + len(results) * (0.7 + 0.42 * len(rows))), layout="constrained",
            squeeze=False,
        )  # fmt: skip
        figure.suptitle(title)
        places = [*range(len(self.costs)), *(len(self.costs) + 0.25 + i for i in range(len(LOOPS)))]
        most = 5
        colours = plt.get_cmap("RdBu")
        for axes, (rule, result) in zip(panels[:, 0], results.items(), strict=True):
            means = {row: {c: result.mean(row, c) for c in columns} for row in rows}
            for y, row in enumerate(rows):
                for x, column in zip(places, columns, strict=True):
                    away = 100 * (means[row][column] - means[row][result.one_size])
                    shade = max(-1, min(away / most, 1))
                    axes.add_patch(
                        Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colours(0.5 + shade / 2), edgecolor="white")
                    )
                    times, ink = result.chosen(row, column), "white" if abs(shade) > 0.7 else "black"
                    axes.text(
                        x, y - 0.1 * bool(times), f"{100 * means[row][column]:.1f}", ha="center", va="center",
                        fontsize=9, weight="bold" if times else None, color=ink,
                    )  # fmt: skip
                    if times:
                        axes.text(x, y + 0.29, "●" * times, ha="center", va="center", fontsize=4, color=ink)
            x = self.costs.index(result.one_size)
            axes.add_patch(
                Rectangle((x - 0.5, -0.5), 1, len(rows), fill=False, edgecolor="black", linewidth=1.6, zorder=3)
            )
            axes.axhline(len(rows) - 1.5, color="white", linewidth=4)
            axes.set(xlim=(-0.55, places[-1] + 0.55), ylim=(len(rows) - 0.45, -0.55))
            axes.set_xticks(places, [LOOPS.get(c, c).replace("_", "\n") for c in columns], fontsize=8)
            axes.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows], fontsize=9)
            axes.xaxis.tick_top()
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set_title(
                f"{rule.replace('_', ' ')}: {result.verdict()},\nin points of test accuracy: {result.margins()}",
                fontsize=9, loc="left", pad=8,
            )  # fmt: skip
            scale = ScalarMappable(Normalize(-most, most), colours)
            bar = figure.colorbar(scale, ax=axes, aspect=25, extend="both", pad=0.01)
            bar.set_label("points above the one size", fontsize=8)
            bar.ax.tick_params(labelsize=8)
        figure.supxlabel(
            "test accuracy (%)   frame: the one size, best on average by validation\n"
            "●: the best by validation, in so many repetitions   right: what the outer loops chose", fontsize=8,
        )  # fmt: skip
        return saved(figure, path)

    def paths(self, results: dict[str, Result], title: str, path: Path) -> Path:
        """What the outer loops went through: shares after each step, and the best validation accuracy so far."""
        figure, grid = plt.subplots(
            2 * len(results), len(self.problems), figsize=(2.1 * len(self.problems) + 0.4, 3.6 * len(results) + 1.1),
            layout="constrained", squeeze=False,
        )  # fmt: skip
        figure.suptitle(title)
        for (rule, result), (shares, curves) in zip(
            results.items(), zip(grid[::2], grid[1::2], strict=True), strict=True
        ):
            for axes, problem in zip(shares, self.problems, strict=True):
                self.stack(axes, result.lines[problem])
                axes.set_title(problem.replace("_", " "), fontsize=10)
            for axes, problem in zip(curves, self.problems, strict=True):
                self.curve(axes, result.lines[problem])
            shares[0].set_ylabel(f"{rule.replace('_', ' ')}\nshare of each cost (%)", fontsize=8)
            curves[0].set_ylabel("best validation\naccuracy so far (%)", fontsize=8)
        for axes in grid.flat:
            axes.tick_params(labelsize=7)
            axes.xaxis.label.set_size(8)
        named = dict[str, Any]()
        for axes in (grid[0, 0], grid[1, 0]):
            handles, labels = axes.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
        return saved(figure, path)

    def stack(self, axes: Axes, lines: list[dict[str, Any]]) -> None:
        """Mean shares after each step of the perturbation, and of the best that either loop has seen."""
        path = [[100 * statistics.fmean(step) for step in zip(*at, strict=True)] for at in
                zip(*(line["path"] for line in lines), strict=True)]  # fmt: skip
        last = len(path) - 1
        labels = [name.replace("_", " ") for name in self.costs]
        axes.stackplot(range(len(path)), *zip(*path, strict=True), colors=COLOURS, labels=labels, linewidth=0)
        for i, loop in enumerate(reversed(LOOPS)):
            base = 0.0
            for j in range(len(self.costs)):
                share = 100 * statistics.fmean(line["chosen"][loop]["shares"][j] for line in lines)
                axes.bar(last + (1 + 1.1 * i) * last / 5, share, 0.9 * last / 5, base, color=COLOURS[j])
                base += share
        ends = [last + (1 + 1.1 * i) * last / 5 for i in range(len(LOOPS))]
        axes.set_xticks([0, last, *ends], ["0", str(last), *(LOOPS[loop][0].upper() for loop in reversed(LOOPS))])
        axes.set(xlabel="outer step, best seen", ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)

    def curve(self, axes: Axes, lines: list[dict[str, Any]]) -> None:
        """The best so far against inner learnings: mean, and range over repetitions."""
        for loop, colour in zip(LOOPS, ("black", "tab:red"), strict=True):
            courses = [[100 * max(line["tried"][loop][: n + 1]) for n in range(self.learnings)] for line in lines]
            at = list(zip(*courses, strict=True))
            learned = range(1, self.learnings + 1)
            axes.fill_between(learned, list(map(min, at)), list(map(max, at)), color=colour, alpha=0.12, linewidth=0)
            name = f"{LOOPS[loop]} ({LOOPS[loop][0].upper()})"
            axes.plot(learned, list(map(statistics.fmean, at)), color=colour, linewidth=1.6, label=name)
        grid = 100 * statistics.fmean(line["chosen"][line["best_cost"]]["validation"] for line in lines)
        count = len(self.costs) * len(self.rates)
        axes.axhline(
            grid, color="tab:blue", linewidth=1, linestyle="--", label=f"best single cost, of {count} learnings"
        )
        axes.set_xlabel("inner learnings")
        uncluttered(axes)


class Result:
    """What a learner came to, over all tasks and repetitions.

    Args:
        lines: of its rounds.
        task: that made them.
    """

    def __init__(self, lines: list[dict[str, Any]], task: MetaCost) -> None:
        self.lines = {problem: [line for line in lines if line["problem"] == problem] for problem in task.problems}
        self.costs = task.costs
        #: the cost that is best on average over all tasks, by validation
        self.one_size = max(
            task.costs, key=lambda cost: statistics.fmean(line["chosen"][cost]["validation"] for line in lines)
        )

    def tests(self, problem: str, way: str) -> list[float]:
        """Test accuracy of each repetition, of a cost, an outer loop, the best cost there, or the one size."""
        return [
            line["chosen"][{"one_size": self.one_size, "best_cost": line["best_cost"]}.get(way, way)]["test"]
            for line in self.lines[problem]
        ]

    def gains(self, way: str, *problems: str) -> list[float]:
        """What it has over the one size in each repetition, in the mean over these tasks, or over all."""
        each = [
            [a - b for a, b in zip(self.tests(problem, way), self.tests(problem, "one_size"), strict=True)]
            for problem in problems or self.lines
        ]
        return list(map(statistics.fmean, zip(*each, strict=True)))

    def mean(self, row: str, column: str) -> float:
        """Test accuracy over the repetitions of a task, or of all tasks."""
        return statistics.fmean(
            a for problem in self.lines if row in (problem, "mean") for a in self.tests(problem, column)
        )

    def chosen(self, row: str, column: str) -> int:
        """In how many repetitions of a task this cost was the best by validation."""
        return sum(line["best_cost"] == column for line in self.lines.get(row, []))

    def verdict(self) -> str:
        """Whether anything is surely better than one size for all, in a sentence."""
        better = []
        for way in WAYS[1:]:
            half = interval(gains := self.gains(way))
            if half is not None and statistics.fmean(gains) > half:
                better.append(SAID[way])
        size = self.one_size.replace("_", " ")
        return f"{size} for all is not enough" if better else f"nothing is surely better than {size} for all"

    def margins(self) -> str:
        """What each other way has over the one size, on average over the tasks, in points."""
        return ", ".join(f"{SAID[way]} {percent(self.gains(way), '+')}" for way in WAYS[1:])

    def table(self, rule: str) -> list[str]:
        """Rows of Markdown: accuracies of each task, and differences to the one size, paired."""
        head = [f"one size: {self.one_size.replace('_', ' ')}", *(SAID[way] for way in WAYS[1:])]
        lines = [
            f"| {rule.replace('_', ' ')}, test accuracy, % | " + " | ".join(head) + " |",
            "|---|---:|---:|---:|---:|",
        ]
        for problem in self.lines:
            cells = [percent(self.tests(problem, way)) for way in WAYS]
            cells[1:] = [
                f"{cell} ({percent(self.gains(way, problem), '+')})"
                for cell, way in zip(cells[1:], WAYS[1:], strict=True)
            ]
            lines.append(f"| {problem.replace('_', ' ')} | " + " | ".join(cells) + " |")
        mean = [f"{100 * self.mean('mean', 'one_size'):.2f}", *(percent(self.gains(way), "+") for way in WAYS[1:])]
        lines.append("| mean | " + " | ".join(mean) + " |")
        lines += ["", f"{rule.replace('_', ' ')}: {self.verdict()} (points: {self.margins()}).", ""]
        lines += [
            f"| {rule.replace('_', ' ')}, mean of tasks | test accuracy, % | over the one size |",
            "|---|---:|---:|",
        ]
        for cost in sorted(self.costs, key=lambda cost: -self.mean("mean", cost)):
            over = "" if cost == self.one_size else percent(self.gains(cost), "+")
            lines.append(f"| {cost.replace('_', ' ')} | {100 * self.mean('mean', cost):.2f} | {over} |")
        return [*lines, ""]
