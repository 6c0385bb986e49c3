"""The first run: one small network, trained by backpropagation, by a local rule, and with a random trunk."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from bioopt import find_synapses

from .. import building, data
from ..diagnostics import wins
from ..receptive_fields import first_weights
from ..statistics import percent, with_interval
from ..verdict import Expected
from . import Task, first_run_plots


@dataclass(eq=False)
class FirstRun(Task):
    """Each rule trains the same network, from the same initial weights and on the same batches.

    The network is so small that random features are not enough: what separates a rule from the control is what its
    hidden layer has learned. A round is one repetition, with initial weights and an order of images of its own.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    control: str  # the rule that leaves the trunk at random
    epochs: int  # of each rule
    batch_size: int
    repetitions: int
    drawn: dict[str, dict[str, Tensor]] = field(init=False, default_factory=dict)  # of the first repetition

    def __post_init__(self) -> None:
        self.require_counts("epochs", "batch_size", "repetitions")
        self.rules = list(self.config.rules)
        if self.control not in self.rules:
            raise ValueError(f"task.control={self.control} must be one of the rules: {', '.join(self.rules)}")
        self.rounds = self.repetitions
        self.images = data.from_config(self.config.data, self.device)
        if self.config.data.validation:
            self.images = self.images.hold_out(self.config.data.validation)
        if not self.images.batches(self.batch_size):
            count = len(self.images.train_labels)
            raise ValueError(f"task.batch_size={self.batch_size} is larger than the {count} training images")

    def round(self, number: int) -> dict[str, Any]:
        """One repetition: the test accuracy of each rule after each epoch."""
        return {"courses": {rule: self.learn(rule, number) for rule in self.rules}}

    def learn(self, rule: str, repetition: int) -> list[float]:
        """Train the network by a rule; returns its test accuracy at the start and after each epoch."""
        seed = self.config.seed * 1_000_003 + repetition
        torch.manual_seed(seed)  # a round needs nothing of the rounds before
        model = building.build_model(self.config, self.images).to(self.device)
        layers = find_synapses(model)[:-1]
        start = first_weights(model)
        steps = self.epochs * self.images.batches(self.batch_size)
        run = building.with_rule(self.config, rule, seed=seed)
        learner = building.build_learner(run, model, rule, f"rules.{rule}", steps)

        def accuracy() -> float:
            return learner.evaluate(self.images.test_batches(data.Augment()))[1]

        course = [accuracy()]
        for epoch in range(1, self.epochs + 1):
            learner.fit(self.batches(seed, epoch))
            course.append(accuracy())
        learner.close()
        if repetition == 1 and layers:
            end = first_weights(model)
            assert start is not None
            assert end is not None
            share = wins(model, layers, self.images)[layers[0].name]
            self.drawn[rule] = {"start": start, "end": end, "share": share.cpu()}
        return course

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch, in the same order for all rules."""
        return self.images.training_batches(self.batch_size, seed, epoch, data.Augment())

    def state_dict(self) -> dict[str, Any]:
        """What the picture shows of the first repetition."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.drawn = state["drawn"]

    def shown(self, line: dict[str, Any]) -> str:
        """The test accuracy of each rule."""
        return "   ".join(f"{rule} {course[-1]:.1%}" for rule, course in line["courses"].items())

    def logged(self, line: dict[str, Any]) -> dict[str, Any]:
        """The test accuracy of each rule."""
        return {rule: course[-1] for rule, course in line["courses"].items()}

    def final(self, history: list[dict[str, Any]]) -> dict[str, list[float]]:
        """The final test accuracies of each rule."""
        return {rule: [line["courses"][rule][-1] for line in history] for rule in self.rules}

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """The accuracy of the control."""
        control = Expected([summary["measured"][self.control]], f"with the control {self.control}")
        return {rule: [control] for rule in self.rules if rule != self.control}

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """Mean test accuracies and leads over the control; the courses, and the filters of the first layer."""
        final = self.final(history)
        found = {key: value for rule in self.rules for key, value in with_interval(rule, final[rule]).items()}
        for rule, lead in self.leads(final).items():
            found |= with_interval(f"{rule}_ahead_of_{self.control}", lead)
        courses = {rule: [line["courses"][rule] for line in history] for rule in self.rules}
        picture = folder / "first_run.png"
        return found, [
            first_run_plots.page(courses, self.drawn, self.control, self.images.shape, self.heading_of(title), picture)
        ]

    def leads(self, final: dict[str, list[float]]) -> dict[str, list[float]]:
        """By how much each rule is better than the control, in each repetition."""
        return {
            rule: [a - b for a, b in zip(final[rule], final[self.control], strict=True)]
            for rule in self.rules
            if rule != self.control
        }

    def heading_of(self, title: str) -> str:
        """The title, with the network and the data."""
        return f"{title}: {self.config.model.name} on {self.config.data.name}"

    def summarize(
        self, config: DictConfig, history: list[dict[str, Any]], seconds: float, folder: Path
    ) -> tuple[dict[str, Any], list[Path], list[str]]:
        """As of every task, but the terminal shows a table."""
        summary, pictures, _ = super().summarize(config, history, seconds, folder)
        final, evaluated = self.final(history), "held-out" if config.data.validation else "test"
        leads = self.leads(final)
        widest = max(map(len, self.rules)) + len(" (control)")
        apart = (16, 14) if self.repetitions != 2 else (24, 24)  # of two repetitions, both are shown
        lines = ["", f"{'':<{widest}}  {evaluated + ' accuracy %':>{apart[0]}}  {'− control':>{apart[1]}}"]
        for rule in sorted(self.rules, key=lambda rule: -statistics.fmean(final[rule])):
            name = f"{rule} (control)" if rule == self.control else rule
            lead = percent(leads[rule], "+") if rule in leads else ""
            lines.append(f"{name:<{widest}}  {percent(final[rule]):>{apart[0]}}  {lead:>{apart[1]}}".rstrip())
        several = f"mean ± 95 % confidence interval of {self.repetitions} repetitions, " * (self.repetitions > 2)
        spread = several or "mean, least and most of 2 repetitions, " * (self.repetitions == 2)
        lines += [
            f"({spread}{self.epochs} epoch{'s' * (self.epochs > 1)} each, {seconds:.0f} s)",
            "",
            f"{self.control} leaves the hidden layer as it was drawn, and only its readout learns: what another rule",
            "reaches beyond it, its hidden layer has learned.",
            f"The filters before and after learning are in {pictures[0]}",
        ]
        return summary, pictures, lines
