"""A cell of the benchmark: one rule, network and data set, by the same search and at two budgets for all rules."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import bioopt
from bioopt.auditing import backward_passes_of
from bioopt.registry import family_of

from .. import building, data, interrupts
from ..data import Images
from ..learner import Learner
from . import Task

#: forward-pass equivalents of a backward pass: it multiplies by the weights, and forms their gradient
BACKWARD = 2
#: those of a step of backpropagation, which set the budget of equal passes
REFERENCE = 1 + BACKWARD
STILL = 1e-12  # a rate with which a network hardly changes
PROBED = 3  # steps before passes are counted: the first of some rules has more


class Job(NamedTuple):
    """A training run: of the search, on held-out images, or of the result, on test images."""

    budgets: tuple[str, ...]  # "epochs" and "passes"; both where they are equally long
    steps: int
    rate: float | None = None  # of the search
    seed: int | None = None  # of the result


@dataclass(eq=False)
class Cell(Task):
    """One rule on one network and data set: a search of its main rate, then runs with the best, at each of two budgets.

    The budget of equal epochs is the same number of steps for all rules; that of equal passes the same number of
    forward-pass equivalents (a backward pass counts as two). All rules see the same images, batches and initial
    weights. A round is one training run.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    images: int | None  # of the training set; null: all
    held_out: int  # of these, for the search
    test: int | None  # of the test set; null: all
    epochs: int
    batch_size: int
    seeds: int  # their number
    factors: list[float]  # of the rate of ``conf/optimizer``
    rates: dict[str, list[Any]]  # rule -> rates to search in place of factors
    models: dict[str, dict[str, Any]]  # network -> options
    options: dict[str, dict[str, Any]]  # rule -> options

    def __post_init__(self) -> None:
        self.require_counts("held_out", "epochs", "batch_size", "seeds")
        self.rule, self.network = str(self.config.optimizer.name), str(self.config.model.name)
        self.candidates = self.rates.get(self.rule) or self._around_the_preset()
        self.data = self._part()
        try:
            self.searched = self.data.hold_out(self.held_out)
        except ValueError as error:
            raise ValueError(str(error).replace("data.validation=", "task.held_out=")) from None
        if self.searched.batches(self.batch_size) < 1:
            left = len(self.searched.train_labels)
            raise ValueError(f"task.batch_size={self.batch_size} is larger than the {left} images of the search")
        self.augment = data.Augment(**self.config.data.augment)
        self.forward_passes = self.backward_passes = self.parameters = 0
        self.jobs: list[Job] = []
        self.cannot = ""
        try:
            self._count()
        except (ValueError, RuntimeError) as error:
            if not self._is_refusal(error):
                raise
            self.cannot = str(error)
        else:
            self.jobs = self._plan()
        self.rounds = len(self.jobs)

    def _is_refusal(self, error: Exception) -> bool:
        """Whether a rule has refused the network, which is a result, rather than an option being wrong.

        Some notice what they cannot train, such as skip connections, in their first step.
        """
        if isinstance(error, ValueError):
            return isinstance(error.__cause__, ValueError)  # of the rule's constructor
        published = str(self.config.optimizer.get("_target_")).startswith("bioopt.")
        return published and not isinstance(error, bioopt.Diverged | torch.OutOfMemoryError)

    def _around_the_preset(self) -> list[float]:
        rate = self.config.optimizer.get("lr")
        if not isinstance(rate, int | float) or not self.factors:
            raise ValueError(
                f"optimizer={self.rule} has lr={rate}, of which task.factors={self.factors} makes no rates to search: "
                f"name some by '+benchmark.rates.{self.rule}=[0.01,0.1]'"
            )
        return [float(f"{factor * rate:.4g}") for factor in self.factors]

    def _part(self) -> Images:
        """The images of the benchmark: the first of both sets, which are in random order."""
        whole = data.from_config(self.config.data, self.device)
        sizes = {"images": (self.images, whole.train_labels), "test": (self.test, whole.test_labels)}
        for name, (count, labels) in sizes.items():
            self.require_counts(*([name] if count is not None else []))
            if count is not None and count > len(labels):
                raise ValueError(f"task.{name}={count}: {self.config.data.name} has {len(labels)}")
        train, test = slice(self.images), slice(self.test)
        return replace(
            whole,
            train_images=whole.train_images[train],
            train_labels=whole.train_labels[train],
            test_images=whole.test_images[test],
            test_labels=whole.test_labels[test],
        )

    def _count(self) -> None:
        """The passes of a step, at a rate at which nothing diverges, and the parameters."""
        rate = None if self.candidates[0] is None else STILL
        learner = self.learner(rate, self.config.seed, PROBED)
        learner.rate = ""  # in messages: nobody has chosen it
        self.parameters = sum(p.numel() for p in learner.network.parameters())
        *before, last = self.batches(self.searched, self.config.seed, PROBED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a rate that nobody has chosen; runs warn by themselves
            learner.fit(before)
            learner.train()
            self.backward_passes = backward_passes_of(lambda: learner.step(*last), learner.network)
        self.forward_passes = learner.forward_passes
        learner.close()

    @property
    def equivalents(self) -> int:
        """Forward-pass equivalents of a step."""
        return self.forward_passes + BACKWARD * self.backward_passes

    def _plan(self) -> list[Job]:
        """The runs of each budget: first those of the search, then those of the result."""

        def steps(images: Images, budget: str) -> int:
            count = self.epochs * images.batches(self.batch_size)
            return count if budget == "epochs" else max(1, round(count * REFERENCE / self.equivalents))

        same = self.equivalents == REFERENCE
        found = []
        for budgets in [("epochs", "passes")] if same else [("epochs",), ("passes",)]:
            search, result = (steps(images, budgets[0]) for images in (self.searched, self.data))
            found += [Job(budgets, search, rate=rate) for rate in self.candidates]
            found += [Job(budgets, result, seed=self.config.seed + i) for i in range(self.seeds)]
        return found

    def learner(self, rate: float | None, seed: int, steps: int) -> Learner:
        """The rule's network, as it starts with this seed."""
        torch.manual_seed(seed)  # a round needs nothing of the rounds before
        run = self.config.copy()
        OmegaConf.set_struct(run, False)
        run.model.update(self.models.get(self.network, {}))
        run.optimizer.update({**self.options.get(self.rule, {}), "lr": rate})
        if "seed" in run.optimizer:
            run.optimizer.seed = seed
        model = building.build_model(run, self.data).to(self.device)
        learner = building.build_learner(run, model, f"{self.rule} on {self.network}", "optimizer", steps)
        learner.amp = bool(self.config.amp)
        return learner

    def batches(self, images: Images, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches, in the order of a seed."""
        epochs = (images.training_batches(self.batch_size, seed, n, self.augment) for n in itertools.count(1))
        return itertools.islice(itertools.chain.from_iterable(epochs), steps)

    def round(self, number: int) -> dict[str, Any]:
        """One training run; of the result, with the rate that was best on held-out images at the same budget."""
        job = self.jobs[number - 1]
        line = {"budgets": list(job.budgets), "phase": "search" if job.seed is None else "result", "steps": job.steps}
        if job.seed is None:
            return {**line, "rate": job.rate, **self._trained(self.searched, job.rate, self.config.seed, job.steps)}
        tried = [
            trial for trial in self.log.history if trial["phase"] == "search" and trial["budgets"] == line["budgets"]
        ]
        learned = [trial for trial in tried if trial["accuracy"] is not None]
        line["seed"] = job.seed
        if not learned:
            nothing = {"accuracy": None, "equivalents": 0, "train_seconds": 0.0}
            return {**line, "rate": None, **nothing, "diverged": "with every rate of the search"}
        rate = max(learned, key=lambda trial: trial["accuracy"])["rate"]
        return {**line, "rate": rate, **self._trained(self.data, rate, job.seed, job.steps)}

    def _trained(self, images: Images, rate: float | None, seed: int, steps: int) -> dict[str, Any]:
        """Train, and test on the test images of these."""
        learner = self.learner(rate, seed, steps)
        equivalents = taken = 0

        def count() -> bool:
            nonlocal equivalents, taken
            equivalents += learner.forward_passes + BACKWARD * self.backward_passes
            taken += 1
            interrupts.check()
            return False

        accuracy, diverged = None, None
        begin = time.perf_counter()
        try:
            learner.fit(self.batches(images, seed, steps), count)
            spent = time.perf_counter() - begin
            _, accuracy = learner.evaluate(images.test_batches(self.augment))
        except bioopt.Diverged as error:
            spent, diverged = time.perf_counter() - begin, str(error)
        finally:
            learner.close()
        found = {"accuracy": accuracy, "equivalents": equivalents, "train_seconds": spent}
        return found | ({"diverged": diverged, "taken": taken} if diverged is not None else {})

    def heading(self, config: DictConfig, device: torch.device) -> str:
        """The cell, and what a step takes."""
        begin = f"{self.rule} on {config.data.name} with {self.network} ({self.parameters:,} parameters), {device}"
        return begin + (
            f": cannot be trained ({self.cannot})" if self.cannot else
            f", {self.forward_passes} forward and {self.backward_passes} backward passes a step"
        )  # fmt: skip

    def shown(self, line: dict[str, Any]) -> str:
        """What was run, and its accuracy."""
        what = "search on held-out images" if line["phase"] == "search" else f"seed {line['seed']}"
        end = "diverged" if line["accuracy"] is None else f"accuracy {line['accuracy']:.2%}"
        equal = f"equal {' and '.join(line['budgets'])}, {line['steps']:,} steps"
        return f"{equal}   {what}, lr {line['rate']}   {end}   {line['train_seconds']:.1f} s"

    def logged(self, line: dict[str, Any]) -> dict[str, Any]:
        """The accuracy, by what it is of."""
        if line["accuracy"] is None:
            return {}
        return {f"{line['phase']}/accuracy at equal {budget}": line["accuracy"] for budget in line["budgets"]}

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The mean accuracy at each budget, over the seeds that did not diverge."""
        found = {}
        for budget in ("epochs", "passes"):
            lines = [line for line in history if line["phase"] == "result" and budget in line["budgets"]]
            values = [line["accuracy"] for line in lines if line["accuracy"] is not None]
            if values:
                found[f"accuracy_at_equal_{budget}"] = sum(values) / len(values)
        return found, []

    def summarize(
        self, config: DictConfig, history: list[dict[str, Any]], seconds: float, folder: Path
    ) -> tuple[dict[str, Any], list[Path], list[str]]:
        """As of every task, and what the table of the benchmark shows besides."""
        summary, pictures, lines = super().summarize(config, history, seconds, folder)
        summary["cell"] = {
            "rule": self.rule,
            "family": family(config.optimizer.get("_target_", "")),
            "network": self.network,
            "data": str(config.data.name),
            "parameters": self.parameters,
            "forward_passes": self.forward_passes,
            "backward_passes": self.backward_passes,
            "cannot": self.cannot,
        }
        return summary, pictures, lines


@functools.cache
def family(target: str) -> str:
    """The family of an optimizer's class; of torch's own, ``gradient``; of one from outside, ``your own``."""
    if target.startswith("torch."):
        return "gradient"
    if target in ("bioopt.Homeostasis", "experiments.models.random_trunk"):
        return "control"
    found = get_object(target)
    return family_of(found) if target.startswith("bioopt.") else "your own"
