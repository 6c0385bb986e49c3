"""Learn A, then B, then A again: how much faster is the second time, for each rule? Savings, as Ebbinghaus has it."""

from __future__ import annotations

import copy
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from bioopt.costs import CrossEntropy

from . import building, data, training
from .areas import Area
from .options import require_counts
from .pictures import saved, uncluttered
from .statistics import interval, percent
from .tasks import Task

#: what is compared, as pictures call it, and its colour; B comes between, and the last two start where it ends
PHASES = {
    "first": ("A, the first time", "black"),
    "other": ("C instead, never seen before", "tab:blue"),
    "again": ("A again, after B", "tab:red"),
}


class Savings(Task):
    """For each rule, a network learns A, then B, then A again; and from the same point, as a control, an unseen C.

    Each is the same data set in a disguise of its own, so that none is harder than another, and each is learned by a
    fresh optimizer until the test accuracy first reaches the criterion. Savings are ``1 - steps again / steps first``
    (Ebbinghaus, 1885, *Über das Gedächtnis*): what is left of A, whether or not it shows when A is tested. The control,
    ``1 - steps for C / steps first``, is what comes of having learned anything at all: features help, old answers are
    in the way. Both start at the same weights, so that what tells them apart, ``1 - steps again / steps for C``, is
    memory of A and nothing else. A round is one rule and one repetition, for which initial weights, disguises and
    batches are the same for all rules.

    Args:
        config: of the run: ``model``, ``data``, and the rules, ``config.rules``, each as in ``conf/optimizer``.
        device: where to compute.
        disguise: ``"pixels"``, in a random order, or ``"labels"``, exchanged at random.
        criterion: the test accuracy at which something is learned.
        most: steps, after which a phase ends in any case.
        batch_size: of a step.
        repetitions: how often, each with its own weights, disguises and batches.
    """

    def __init__(
        self,
        config: DictConfig,
        device: torch.device,
        *,
        disguise: str,
        criterion: float,
        most: int,
        batch_size: int,
        repetitions: int,
    ) -> None:
        if disguise not in ("pixels", "labels"):
            raise ValueError(f"task.disguise={disguise} must be pixels or labels")
        if not 0 < criterion <= 1:
            raise ValueError(f"task.criterion={criterion} must be in (0, 1], a share of right answers")
        require_counts(most=most, batch_size=batch_size, repetitions=repetitions)
        self.config, self.device, self.seed = config, device, int(config.seed)
        self.rules = list(config.rules)
        self.disguise, self.criterion, self.most, self.batch_size = disguise, criterion, most, batch_size
        self.rounds = len(self.rules) * repetitions
        self.images = data.from_config(config.data, device)

    def round(self, number: int) -> dict[str, Any]:
        """One rule, one repetition: its steps to the criterion, and its accuracy after each step, of each phase."""
        repetition, rule = divmod(number - 1, len(self.rules))
        torch.manual_seed(self.seed * 1_000_003 + repetition)  # a round needs nothing of the rounds before
        model = building.build_model(self.config, self.images).to(self.device)
        a, b, c = (Disguise(self.images, self.disguise) for _ in range(3))
        seeds = torch.randint(2**31, (4,)).tolist()
        name = self.rules[rule]
        courses = {"first": self.learn(model, name, a, seeds[0])}
        if courses["first"][-1] >= self.criterion:
            courses["between"] = self.learn(model, name, b, seeds[1])
            unseen = copy.deepcopy(model)
            courses["again"] = self.learn(model, name, a, seeds[2])
            courses["other"] = self.learn(unseen, name, c, seeds[3])
        steps = {phase: len(course) - 1 for phase, course in courses.items()}
        found: dict[str, Any] = {"rule": name, "repetition": repetition, **{f"steps_{p}": n for p, n in steps.items()}}
        if len(courses) > 1:  # what a rule has not learned it cannot learn again
            found["retained"] = courses["again"][0]
            found["savings"] = 1 - steps["again"] / max(steps["first"], 1)
            found["control"] = 1 - steps["other"] / max(steps["first"], 1)
            found["implicit"] = 1 - steps["again"] / max(steps["other"], 1)
        return found | {"courses": {phase: [round(a, 4) for a in course] for phase, course in courses.items()}}

    def learn(self, model: nn.Module, rule: str, task: Disguise, seed: int) -> list[float]:
        """Train until the criterion is reached; test accuracy before the first step, and after each."""
        run = building.with_rule(self.config, rule, seed=seed)
        optimizer = building.build_optimizer(run, model)
        learner = Area("", model, CrossEntropy(), optimizer)
        course = [task.accuracy(model)]
        generator = torch.Generator().manual_seed(seed)
        while course[-1] < self.criterion and len(course) <= self.most:
            closure = learner.closure(*task.batch(self.batch_size, generator))
            learner.train()
            try:
                losses: Tensor = optimizer.step(closure)  # type: ignore[arg-type, assignment]
            except RuntimeError as error:
                raise RuntimeError(f"{error} (rules.{rule}.lr={run.optimizer.lr})") from error
            if not bool(losses.isfinite().all()):
                raise RuntimeError(f"{rule}: the loss is no number with rules.{rule}.lr={run.optimizer.lr}; lower it")
            course.append(task.accuracy(model))
        training.close([learner])
        return course

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """For each rule the means of savings, memory of A alone, the control, and A's accuracy after B."""
        found: dict[str, float] = {}
        for key in ("savings", "implicit", "control", "retained"):
            for rule in self.rules:
                if values := self.each(history, rule, key):
                    found[f"{rule}_{key}"] = statistics.fmean(values)
                    half = interval(values)
                    if half is not None and key in ("savings", "implicit"):
                        found[f"{rule}_{key}_ci95"] = half
        return found, [
            self.bars(history, title, folder / "savings.png"),
            self.curves(history, title, folder / "courses.png"),
        ]

    def each(self, history: list[dict[str, Any]], rule: str, key: str) -> list[float]:
        """A number of each repetition of a rule, but for those in which it did not learn A."""
        return [line[key] for line in history if line["rule"] == rule and "savings" in line]

    def bars(self, history: list[dict[str, Any]], title: str, path: Path) -> Path:
        """Savings and the control for each rule: mean, 95 % confidence interval, and each repetition as a point."""
        figure, axes = plt.subplots(figsize=(8, 1.6 + 0.62 * len(self.rules)), layout="constrained")
        figure.suptitle(title)
        shown = (("savings", "again", -0.18), ("control", "other", 0.18))
        for row, rule in enumerate(self.rules):
            for key, phase, shift in shown:
                label, colour = PHASES[phase]
                if values := self.each(history, rule, key):
                    mean, half = 100 * statistics.fmean(values), interval(values)
                    whisker = None if half is None else 100 * half
                    axes.barh(
                        row + shift, mean, 0.32, color=colour, alpha=0.5, label=label,
                        xerr=whisker, error_kw={"capsize": 3, "elinewidth": 1},
                    )  # fmt: skip
                    points = [100 * value for value in values]
                    axes.plot(points, [row + shift] * len(points), "o", color=colour, markersize=3, alpha=0.6)
            alone = self.each(history, rule, "implicit")
            told = f"{percent(alone)} %" if alone else f"A not learned in {self.most} steps"
            axes.annotate(told, (1.02, row), xycoords=("axes fraction", "data"), fontsize=9, va="center")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(self.rules)), [rule.replace("_", " ") for rule in self.rules])
        axes.invert_yaxis()
        axes.annotate("fewer steps for A\nthan for C", (1.02, 1.01), xycoords="axes fraction", fontsize=9)
        axes.set_xlabel("steps saved, of those that A took the first time (%)")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False)
        return saved(figure, path)

    def curves(self, history: list[dict[str, Any]], title: str, path: Path) -> Path:
        """Test accuracy against steps, a panel for each rule: means, and bands over the repetitions."""
        columns = min(3, len(self.rules))
        rows = math.ceil(len(self.rules) / columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(3.6 * columns, 2.7 * rows + 0.8), layout="constrained", squeeze=False, sharey=True
        )
        figure.suptitle(title)
        for axes, rule in zip(grid.flat, self.rules, strict=False):
            for phase, (label, colour) in PHASES.items():
                courses = [
                    line["courses"][phase] for line in history if line["rule"] == rule and phase in line["courses"]
                ]
                longest = max(map(len, courses), default=0)
                held = [course + course[-1:] * (longest - len(course)) for course in courses]  # it ends when learned
                at_step = [[100 * a for a in accuracies] for accuracies in zip(*held, strict=True)]
                least, most = list(map(min, at_step)), list(map(max, at_step))
                axes.fill_between(range(longest), least, most, color=colour, alpha=0.15, linewidth=0)
                axes.plot(list(map(statistics.fmean, at_step)), color=colour, linewidth=1.8, label=label)
            axes.axhline(100 * self.criterion, color="grey", linewidth=0.8, linestyle=":")
            axes.set_title(rule.replace("_", " "), fontsize=10)
            uncluttered(axes)
        for axes in grid.flat[len(self.rules) :]:
            axes.axis("off")
        for axes in grid[-1]:
            axes.set_xlabel("step")
        for axes in grid[:, 0]:
            axes.set_ylabel("test accuracy (%)")
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
        )  # fmt: skip
        return saved(figure, path)


class Disguise:
    """A data set whose pixels are in an order of its own, or whose labels are exchanged, drawn at random."""

    def __init__(self, images: data.Images, of: str) -> None:
        self.images = images
        device = images.train_labels.device
        pixels, classes = images.train_images[0].numel(), images.classes
        self.order = (torch.randperm(pixels) if of == "pixels" else torch.arange(pixels)).to(device)
        self.names = (torch.randperm(classes) if of == "labels" else torch.arange(classes)).to(device)
        self.tested = self.of(images.test_images, images.test_labels)

    def of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images as a network sees them, and labels, in this disguise."""
        shown = self.images.prepare(images)
        return shown.flatten(1)[:, self.order].view(shown.shape), self.names[labels]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images drawn at random."""
        index = torch.randint(len(self.images.train_labels), (size,), generator=generator)
        index = index.to(self.images.train_labels.device)
        return self.of(self.images.train_images[index], self.images.train_labels[index])

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """On the test images, a fraction."""
        model.eval()
        inputs, labels = self.tested
        return float((model(inputs).argmax(1) == labels).double().mean())
