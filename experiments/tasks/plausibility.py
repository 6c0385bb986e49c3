"""How plausible is each rule? What its updates depend on, measured by interventions (`bioopt.audit`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import bioopt
from bioopt.costs import CrossEntropy
from bioopt.registry import family_of, rules

from .. import building, data
from ..learner import Block, Learner
from . import Task, plausibility_plots

#: what the trunk's updates may depend on, of `bioopt.Audit`
MEASURES = (
    "transport", "other_layers", "other_neurons", "other_samples", "labels", "error", "loss", "layers_above",
    "feedback_reads",
)  # fmt: skip
#: families from those that read most to those that read least; others come last
FAMILIES = ("gradient", "energy", "target", "feedback", "temporal", "perturbation", "local", "hebbian", "spiking")
ORDER = {name: i for i, name in enumerate(FAMILIES)}
COUNTS = ("forward_passes", "backward_passes", "loss_numbers")


@dataclass(eq=False)
class Plausibility(Task):
    """Each rule of bioopt, and backpropagation, learns for some steps, and is then audited on a few images.

    Rules have the presets of ``conf/optimizer``. A round is one rule.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    rules: Any  # "all", or a list of names
    steps: int  # of learning before the audit
    batch_size: int  # of a step
    images: int  # of the audit
    structure: dict[str, str]  # rule -> one of ``structures``; all others have ``mlp``
    options: dict[str, dict[str, Any]]  # of rules, besides their presets

    def __post_init__(self) -> None:
        self.require_counts("batch_size")
        self.require_counts("steps", least=0)
        self.require_counts("images", least=2)
        self.families = {"sgd": "gradient"} | {name: family_of(rule) for name, rule in rules().items()}
        known = sorted(self.families, key=lambda name: ORDER.get(self.families[name], len(ORDER)))
        self.names = known if self.rules == "all" else list(self.rules)
        for name in (*self.names, *self.structure, *self.options):
            if name not in known:
                raise ValueError(f"task.rules has {name}, which is not a rule; there are {', '.join(known)}")
        for rule, structure in self.structure.items():
            if structure not in self.config.structures:
                raise ValueError(
                    f"task.structure.{rule}={structure} must be one of {', '.join(self.config.structures)}"
                )
        self.rounds = len(self.names)
        self.data = data.from_config(self.config.data, self.device)

    def round(self, number: int) -> dict[str, Any]:
        """The audit of one rule."""
        rule = self.names[number - 1]
        torch.manual_seed(self.config.seed)  # a round needs nothing of the rounds before
        learner = self.learner(rule)
        learner.fit(self.batches())
        learner.train()
        (block,) = learner.blocks
        inputs, labels = self.few()
        found = bioopt.audit(block.optimizer, block.network, block.closure(inputs, labels), labels=labels)
        learner.close()
        return {"rule": rule, "trunk": of_trunk(found), "summary": found.summary, "layers": as_json(found.as_dict())}

    def learner(self, rule: str) -> Learner:
        """The rule's network in double precision, with its optimizer."""
        run = self.config.copy()
        OmegaConf.set_struct(run, False)
        structure = self.structure.get(rule, "mlp")
        run.model = {**self.config.structures[structure], "name": structure}
        model = building.build_model(run, self.data).to(self.device).double()
        own = self.options.get(rule, {})
        optimizer: torch.optim.Optimizer
        try:
            if rule == "sgd":
                optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **own})
            else:
                optimizer = bioopt.create_optimizer(rule, model, preset="default", **own)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"task.rules: {rule} cannot train structures.{structure} ({error}); give it another by "
                f"task.structure.{rule}"
            ) from error
        return Learner(model, [Block(model, CrossEntropy(), optimizer)], name=rule, rate="its preset")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images, drawn at random for each step."""
        generator = torch.Generator().manual_seed(self.config.seed)
        count = len(self.data.train_labels)
        for _ in range(self.steps):
            chosen = torch.randint(count, (self.batch_size,), generator=generator).to(self.device)
            yield self.data.prepare(self.data.train_images[chosen]).double(), self.data.train_labels[chosen]

    def few(self) -> tuple[Tensor, Tensor]:
        """The first training image of each of the first classes."""
        labels = self.data.train_labels
        chosen = torch.stack([(labels == i % self.data.classes).nonzero()[i // self.data.classes, 0]
                              for i in range(self.images)])  # fmt: skip
        return self.data.prepare(self.data.train_images[chosen]).double(), labels[chosen]

    def shown(self, line: dict[str, Any]) -> str:
        """The rule and its summary."""
        return f"{line['rule']}: {line['summary']}"

    def logged(self, line: dict[str, Any]) -> dict[str, Any]:
        """What was measured of the trunk."""
        return {f"{line['rule']}.{measure}": value for measure, value in line["trunk"].items()}

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The largest value of each measure in each rule's trunk, and a table as a picture."""
        found = {f"{line['rule']}.{measure}": v for line in history for measure, v in line["trunk"].items()}
        cards = {line["rule"]: line["trunk"] for line in history}
        families = {rule: self.families[rule] for rule in cards}
        return found, [plausibility_plots.table(cards, families, title, folder / "plausibility.png")]

    def summarize(
        self, config: DictConfig, history: list[dict[str, Any]], seconds: float, folder: Path
    ) -> tuple[dict[str, Any], list[Path], list[str]]:
        """As of every task, but the terminal shows a line for each rule."""
        summary, pictures, _ = super().summarize(config, history, seconds, folder)
        transported = [line["rule"] for line in history if line["trunk"].get("transport", 0) > 0]
        lines = ["", *(line["summary"] for line in history), ""]
        lines += [
            f"Weights are transported by {', '.join(transported) or 'none'}. ({self.rounds} rules, {seconds:.0f} s)"
        ]
        return summary, pictures, [*lines, f"The table is in {pictures[0]}"]


def of_trunk(found: bioopt.Audit) -> dict[str, float]:
    """The largest value of each measure in the trunk, without those that were not measured; rounding is 0."""
    values = {measure: found.largest(measure) for measure in MEASURES}
    cards = {m: value if value > found.tolerance else 0.0 for m, value in values.items() if not math.isnan(value)}
    angles = [layer.feedback_angle for layer in found.layers if not math.isnan(layer.feedback_angle)]
    if found.feedback_changes is not None:
        cards["feedback_changes"] = float(found.feedback_changes)
    if angles:
        cards["feedback_angle"] = sum(angles) / len(angles)
    return cards | {count: float(getattr(found, count)) for count in COUNTS}


def as_json(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the layers, with ``None`` for what was not measured."""
    return [{key: None if value != value else value for key, value in layer.items()} for layer in found["layers"]]
