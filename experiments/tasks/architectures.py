"""Which structure suits which task, under which rule? The same rules on several networks, at several tasks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from bioopt.costs import UNLABELLED

from .. import building, data
from ..data import Images, problems
from ..data.problems import PROBLEMS
from ..statistics import with_interval
from . import Task, architectures_plots


@dataclass(eq=False)
class Architectures(Task):
    """Each rule trains each structure at each task, all by the same number of steps and samples.

    Of the data set, a repetition draws the images to train on and to test on, and makes the tasks out of them
    (`problems`); these, the initial weights of a structure and the batches are the same for all rules, so that
    differences are paired by repetition. All learn from labels: samples without one are left out. Where images have
    channels of a context, every structure gets them, and an option ``contexts`` of a structure is set to their number.
    A round is one rule, structure, task and repetition, and needs nothing of the rounds before.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    tasks: dict[str, dict[str, Any]]  # of `PROBLEMS`, each with its options
    train: int  # images of a repetition to train on
    test: int  # images of a repetition to test on, once for each context
    steps: int  # of training
    batch_size: int  # of a step
    repetitions: int  # how often, each with its own images, tasks, weights and batches

    def __post_init__(self) -> None:
        self.require_counts("train", "test", "steps", "batch_size", "repetitions")
        self.rules, self.structures = list(self.config.rules), list(self.config.structures)
        for name, found in (("rules", self.rules), ("structures", self.structures), ("task.tasks", self.tasks)):
            if not found:
                raise ValueError(f"{name} are none: name one at least")
        for name in self.tasks:
            if name not in PROBLEMS:
                raise ValueError(f"task.tasks has {name}, which is not a task; there are {', '.join(PROBLEMS)}")
        self.turns = len(self.structures) * len(self.rules)
        self.rounds = self.turns * self.repetitions * len(self.tasks)
        self.images = data.from_config(self.config.data, self.device)
        if self.config.data.validation:
            self.images = self.images.hold_out(self.config.data.validation)
        if self.test > len(self.images.test_labels):
            raise ValueError(f"task.test={self.test} must be at most the {len(self.images.test_labels)} test images")
        self.posed: tuple[tuple[str, int], Images] | None = None  # the last one, which several rounds have in common
        self.weights: dict[str, int] = {}
        for task in reversed(self.tasks):  # reports mistakes now, not in an hour
            images = self.pose(task, 0)
            for structure in self.structures:
                count = sum(p.numel() for p in self.build(structure, images).parameters())
                self.weights[structure] = count  # in the end, of the first task

    def pose(self, task: str, repetition: int) -> Images:
        """A task of a repetition: images to train on, of which some may lack a label, and to test on."""
        if self.posed is None or self.posed[0] != (task, repetition):
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + repetition)
            tested = torch.randperm(len(self.images.test_labels), generator=generator)[: self.test].to(self.device)
            images = replace(
                problems.subset(self.images, generator, self.train),
                test_images=self.images.test_images[tested],
                test_labels=self.images.test_labels[tested],
            )
            try:
                posed = PROBLEMS[task](images, generator, **self.tasks[task])
            except (TypeError, ValueError) as error:
                raise ValueError(f"task.tasks.{task}: {error}") from error
            self.posed = (task, repetition), posed
        return self.posed[1]

    def build(self, structure: str, images: Images) -> nn.Module:
        """A structure for these images."""
        try:
            return building.build_model(self.configured(structure, images, self.rules[0]), images).to(self.device)
        except ValueError as error:
            raise ValueError(f"structures.{structure}: {error}") from error

    def configured(self, structure: str, images: Images, rule: str) -> DictConfig:
        """The run as if this structure were its model, and this rule its optimizer."""
        run = building.with_rule(self.config, rule)
        run.model = {**self.config.structures[structure], "name": structure}
        contexts = images.shape[0] - self.images.shape[0]
        if contexts and "contexts" in run.model:
            run.model.contexts = contexts
        own = run.optimizer.get("per_model", {}).get(structure, {})
        run.optimizer.update({key: value for key, value in own.items() if not OmegaConf.is_dict(value)})
        return run

    def round(self, number: int) -> dict[str, Any]:
        """One rule, one structure, one task, one repetition: its test accuracy, and what a step takes."""
        rest, rule = divmod(number - 1, len(self.rules))
        rest, structure = divmod(rest, len(self.structures))
        repetition, task = divmod(rest, len(self.tasks))
        found = self.learn(self.rules[rule], self.structures[structure], list(self.tasks)[task], repetition)
        return {"repetition": repetition, **found}

    def learn(self, rule: str, structure: str, task: str, repetition: int) -> dict[str, Any]:
        """Train and test."""
        images = self.pose(task, repetition)
        torch.manual_seed(self.config.seed * 1_000_003 + repetition)  # a round needs nothing of the rounds before
        model = self.build(structure, images)
        run = self.configured(structure, images, rule)
        seed = int(torch.randint(2**31, ()))
        if "seed" in run.optimizer:
            run.optimizer.seed = seed
        option = f"rules.{rule}.per_model.{structure}"
        learner = building.build_learner(run, model, f"{rule} on {structure} at {task}", option)
        begin = time.perf_counter()
        learner.fit(self.batches(images, repetition))
        seconds = time.perf_counter() - begin
        learner.close()
        outputs, labels = learner.predict(images.test_batches(data.Augment()))
        return {
            "task": task,
            "structure": structure,
            "rule": rule,
            "accuracy": float((outputs.argmax(1) == labels).sum() / len(labels)),
            "forward_passes": learner.forward_passes,
            "milliseconds": 1000 * seconds / self.steps,
        }

    def batches(self, images: Images, repetition: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Labelled training images, drawn at random for each step."""
        known = (images.train_labels != UNLABELLED).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + repetition)
        for _ in range(self.steps):
            chosen = known[torch.randint(len(known), (self.batch_size,), generator=generator).to(self.device)]
            yield images.prepare(images.train_images[chosen]), images.train_labels[chosen]

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The lead of the best structure, then all accuracies, and what they cost."""
        found: dict[str, float] = {}
        for task in self.tasks:
            for rule in self.rules:
                ranked = self.ranked(history, task, rule)
                if len(ranked) > 1:
                    key = f"{task}_{rule}_{ranked[0]}_ahead_of_{ranked[1]}"
                    found |= with_interval(key, self.lead(history, task, rule))
        for task in self.tasks:
            for rule in self.rules:
                for structure in self.structures:
                    found |= with_interval(f"{task}_{rule}_{structure}", self.each(history, task, rule, structure))
        found |= {f"{structure}_weights": count for structure, count in self.weights.items()}
        for rule in self.rules:
            lines = [line for line in history if line["rule"] == rule]
            found[f"{rule}_forward_passes"] = lines[-1]["forward_passes"]
            for structure in self.structures:
                times = [line["milliseconds"] for line in lines if line["structure"] == structure]
                found[f"{rule}_{structure}_milliseconds"] = statistics.fmean(times)
        return found, [architectures_plots.maps(self, history, title, folder / "architectures.png")]

    def each(
        self, history: list[dict[str, Any]], task: str, rule: str, structure: str, key: str = "accuracy"
    ) -> list[float]:
        """The accuracy of each repetition."""
        chosen = (task, rule, structure)
        return [line[key] for line in history if (line["task"], line["rule"], line["structure"]) == chosen]

    def ranked(self, history: list[dict[str, Any]], task: str, rule: str) -> list[str]:
        """The structures, the best first."""
        return sorted(self.structures, key=lambda s: -statistics.fmean(self.each(history, task, rule, s)))

    def lead(self, history: list[dict[str, Any]], task: str, rule: str) -> list[float]:
        """The best structure's accuracy less that of the next, in each repetition."""
        best, second = (self.each(history, task, rule, s) for s in self.ranked(history, task, rule)[:2])
        return [a - b for a, b in zip(best, second, strict=True)]
