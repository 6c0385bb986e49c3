"""Learn A, then B, then A again: how much faster is the second time, for each rule? Savings, as Ebbinghaus has it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from .. import building, data
from ..learner import Learner
from ..statistics import interval
from ..verdict import Expected
from . import Task, savings_plots


@dataclass(eq=False)
class Savings(Task):
    """For each rule, a network learns A, then B, then A again; and from the same point, as a control, an unseen C.

    Each is the same data set under a permutation of its own, so that none is harder than another, and each is learned
    by a fresh optimizer until the test accuracy first reaches the criterion. Savings are
    ``1 - steps again / steps first`` (Ebbinghaus, 1885, *Über das Gedächtnis*): what is left of A, whether or not it
    shows when A is tested. The control, ``1 - steps for C / steps first``, is the effect of having learned anything at
    all: features help, old answers interfere. Both start at the same weights, so that their difference,
    ``1 - steps again / steps for C``, is memory of A and nothing else. A round is one rule and one repetition, for
    which initial weights, permutations and batches are the same for all rules.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    permute: str  # ``"pixels"``, in a random order, or ``"labels"``, exchanged at random
    criterion: float  # the test accuracy at which something is learned
    most: int  # steps, after which learning ends in any case
    batch_size: int  # of a step
    repetitions: int  # how often, each with its own weights, permutations and batches

    def __post_init__(self) -> None:
        if self.permute not in ("pixels", "labels"):
            raise ValueError(f"task.permute={self.permute} must be pixels or labels")
        if not 0 < self.criterion <= 1:
            raise ValueError(f"task.criterion={self.criterion} must be in (0, 1], a share of right answers")
        self.require_counts("most", "batch_size", "repetitions")
        self.rules = list(self.config.rules)
        self.turns = len(self.rules)
        self.rounds = self.turns * self.repetitions
        self.images = data.from_config(self.config.data, self.device)

    def round(self, number: int) -> dict[str, Any]:
        """One rule, one repetition: of each learning, the steps to the criterion and the accuracy after each step."""
        repetition, rule = divmod(number - 1, len(self.rules))
        torch.manual_seed(self.config.seed * 1_000_003 + repetition)  # a round needs nothing of the rounds before
        model = building.build_model(self.config, self.images).to(self.device)
        a, b, c = (Permutation(self.images, self.permute) for _ in range(3))
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

    def learn(self, model: nn.Module, rule: str, permutation: Permutation, seed: int) -> list[float]:
        """Train until the criterion is reached; test accuracy before the first step, and after each."""
        learner = building.build_learner(building.with_rule(self.config, rule, seed=seed), model, rule, f"rules.{rule}")
        course: list[float] = []

        def learned() -> bool:
            course.append(permutation.accuracy(learner))
            return course[-1] >= self.criterion

        if not learned():
            generator = torch.Generator().manual_seed(seed)
            learner.fit(islice(permutation.batches(self.batch_size, generator), self.most), until=learned)
        learner.close()
        return course

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """The savings of learning anything else."""
        found = summary["measured"]
        controls = {rule: found.get(f"{rule}_control") for rule in self.rules}
        return {
            f"{rule}_savings": [Expected([value], "for an unseen task, the control")]
            for rule, value in controls.items()
            if value is not None
        }

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """For each rule the means of savings, memory of A alone, the control, and A's accuracy after B."""
        found: dict[str, float] = {}
        for key in ("savings", "implicit", "control", "retained"):
            for rule in self.rules:
                if values := each(history, rule, key):
                    found[f"{rule}_{key}"] = statistics.fmean(values)
                    half = interval(values)
                    if half is not None and key in ("savings", "implicit"):
                        found[f"{rule}_{key}_ci95"] = half
        return found, [
            savings_plots.bars(self.rules, history, self.most, title, folder / "savings.png"),
            savings_plots.curves(self.rules, history, self.criterion, title, folder / "courses.png"),
        ]


def each(history: list[dict[str, Any]], rule: str, key: str) -> list[float]:
    """A number of each repetition of a rule, but for those in which it did not learn A."""
    return [line[key] for line in history if line["rule"] == rule and "savings" in line]


class Permutation:
    """A data set whose pixels are in an order of its own, or whose labels are exchanged, drawn at random."""

    def __init__(self, images: data.Images, of: str) -> None:
        self.images = images
        device = images.train_labels.device
        pixels, classes = images.train_images[0].numel(), images.classes
        self.order = (torch.randperm(pixels) if of == "pixels" else torch.arange(pixels)).to(device)
        self.names = (torch.randperm(classes) if of == "labels" else torch.arange(classes)).to(device)
        self.tested = self.of(images.test_images, images.test_labels)

    def of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Permuted images, as a network gets them, and labels."""
        shown = self.images.prepare(images)
        return shown.flatten(1)[:, self.order].view(shown.shape), self.names[labels]

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images drawn at random, without end."""
        while True:
            index = torch.randint(len(self.images.train_labels), (size,), generator=generator)
            index = index.to(self.images.train_labels.device)
            yield self.of(self.images.train_images[index], self.images.train_labels[index])

    def accuracy(self, learner: Learner) -> float:
        """On the test images, a fraction."""
        outputs, labels = learner.predict([self.tested])
        return float((outputs.argmax(1) == labels).double().mean())
