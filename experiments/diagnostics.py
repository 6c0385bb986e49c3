"""What a rule does inside a network while it learns, measured at intervals without changing the run."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bioopt
from bioopt.core.probe import keeping_modes

from . import pictures, receptive_fields
from .checks import require_counts
from .data import Augment, Images
from .files import write_lines
from .models import Triangle


class Diagnostics:
    """Measures at intervals what a rule does in each layer, or to each parameter.

    - ``cosine``, ``signal_to_noise``: of the rule's updates against the gradient (`bioopt.diagnose`);
    - ``feedback_angle``, ``error_angle``, ``update_angle``, ``error_rank``: of rules with other feedback, as there;
    - ``free_energy``, ``residual``: of rules whose states relax (`bioopt.EnergyRule`), at the start and the end of each
      relaxation; of the last step that was measured, `relaxation_course` is drawn at the end of the run;
    - ``update_ratio``: length of the step's change over length of the weights;
    - ``sparsity``: of activity, 0 where all neurons are active alike, 1 where a single one is, mean over events
      (Vinje & Gallant, 2000);
    - ``dead_units``: the share of neurons that are silent for all images;
    - ``dimensionality``: participation ratio of the activities' covariance, ``(Σ λ)² / Σ λ²``: in how many directions
      activity varies.

    Activities are those after the nonlinearity that follows a layer, in evaluation mode, for the first test images.

    Args:
        options: ``every``: steps between two measurements (``None``: never), ``samples``: updates compared with the
            gradient; ``images``: whose activities are recorded.
        model: the network.
        layers: whose activity is recorded.
        optimizer: what trains it.
        images: the data.
    """

    def __init__(
        self,
        options: dict[str, Any],
        model: nn.Module,
        layers: list[bioopt.Synapse],
        optimizer: torch.optim.Optimizer,
        images: Images,
    ) -> None:
        every, samples, of = options["every"], options["samples"], options["images"]
        require_counts(of="diagnostics.", null=True, every=every)
        require_counts(2, of="diagnostics.", samples=samples)
        require_counts(of="diagnostics.", images=of)
        self.every: int | None = every
        self.samples, self.model, self.optimizer, self.images = samples, model, optimizer, images
        self.layers = {synapse.layer: synapse for synapse in layers}
        self.lines: list[dict[str, Any]] = []  # measured so far
        self.fields: list[Tensor] = []  # the first layer's weights at the start and after each epoch
        self.seconds = 0.0  # spent on measurements
        self._closure: Callable[[], Tensor] | None = None  # of the last step that was measured
        if every is not None:
            self._inputs = images.prepare(images.test_images[:of])
            self._keep_fields()

    @contextlib.contextmanager
    def around(self, step: int, closure: Callable[[], Tensor]) -> Iterator[None]:
        """Measure before and after the step inside, if this is one of the steps to measure."""
        if self.every is None or step % self.every:
            yield
            return
        begin = time.perf_counter()
        self._closure = closure
        found: dict[str, dict[str, float]] = {}
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        if isinstance(self.optimizer, bioopt.LearningRule):
            for name, values in bioopt.diagnose(self.optimizer, closure, self.samples).items():
                for what, value in values.items():
                    if what != "forward_passes":
                        found.setdefault(what, {})[name] = value
        for buffer, kept in buffers:  # modules such as `models.WhitenedPatches` learn from every input
            buffer.copy_(kept)
        found |= self._activity()
        before = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.seconds += time.perf_counter() - begin
        yield
        begin = time.perf_counter()
        found["update_ratio"] = {
            name: ((p.detach() - before[name]).norm() / before[name].norm().clamp(min=1e-12)).item()
            for name, p in self.model.named_parameters()
            if name in before
        }
        found |= relaxation(self.optimizer)
        line: dict[str, Any] = {"step": step}
        for what, values in found.items():
            line |= {f"{what}/{name}": value for name, value in values.items() if math.isfinite(value)}
        self.lines.append(line)
        self.seconds += time.perf_counter() - begin

    def epoch(self, folder: Path) -> None:
        """Write ``diagnostics.jsonl``, and keep a copy of the first layer's weights."""
        if self.every is None:
            return
        write_lines(folder / "diagnostics.jsonl", self.lines)
        self._keep_fields()

    def _keep_fields(self) -> None:
        weights = receptive_fields.first_weights(self.model, 10)
        if weights is not None:
            self.fields.append(weights)

    @torch.no_grad()
    def _activity(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        last: list[bioopt.Synapse] = []  # the layer whose nonlinearity has not run yet

        def look(module: nn.Module, args: Any, output: Tensor) -> None:
            if module in self.layers:
                last[:] = [self.layers[module]]
            elif last and (isinstance(module, Triangle) or type(module).__module__ == "torch.nn.modules.activation"):
                synapse = last.pop()
                events = output.detach().movedim(synapse.channel_dim, -1).flatten(0, -2).float()
                for what, value in activity(events).items():
                    found.setdefault(what, {})[synapse.name] = value

        handles = [module.register_forward_hook(look) for module in self.model.modules() if not [*module.children()]]
        try:
            with keeping_modes(self.model):
                self.model.eval()
                self.model(self._inputs)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def pictures(self, predicted: Callable[[], Tensor], title: str, folder: Path) -> list[Path]:
        """Pictures of a finished run: the measurements, its errors, and how its receptive fields developed.

        Args:
            predicted: computes the class of each test image, as the run was tested.
            title: of the pictures.
            folder: where they go.
        """
        if self.every is None:
            return []
        course: dict[str, dict[int, float]] = {}
        if self._closure is not None:
            self.model.train()
            course = relaxation_course(self.optimizer, self._closure)
        drawn = self._drawn(predicted().cpu(), title, folder)
        of_course = pictures.relaxation_course(course, title, folder / "relaxation_cosine.png")
        return drawn if of_course is None else [*drawn, of_course]

    def _drawn(self, predicted: Tensor, title: str, folder: Path) -> list[Path]:
        labels = self.images.test_labels.cpu()
        confusion = torch.zeros(self.images.classes, self.images.classes, dtype=torch.int64)
        confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
        wrong = (labels != predicted).nonzero().flatten()[:40]
        made = [
            pictures.confusion(confusion, title, folder / "confusion.png"),
            pictures.misclassified(
                self.images.test_images[wrong.to(self.images.test_images.device)].cpu(),
                labels[wrong], predicted[wrong], title, folder / "misclassified.png",
            ),
            pictures.course(self.lines, title, folder / "diagnostics.png"),
            pictures.relaxations(getattr(self.optimizer, "relaxations", []), title, folder / "relaxation.png"),
            receptive_fields.over_time(
                self.fields, self.images.shape, title, folder / "receptive_fields_over_time.png"
            ),
        ]  # fmt: skip
        return [picture for picture in made if picture is not None]


def relaxation(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    """The free energy and its residual at the start and the end of the relaxations of the last step."""
    found: dict[str, dict[str, float]] = {}
    for one in getattr(optimizer, "relaxations", []):
        for what, values in (("free_energy", one.energy), ("residual", one.residual)):
            if values:
                ends = {f"nudge {one.nudge:g}, start": values[0], f"nudge {one.nudge:g}, end": values[-1]}
                found.setdefault(what, {}).update(ends)
    return found


def relaxation_course(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> dict[str, dict[int, float]]:
    """What relaxation buys: the cosine of each layer's update with the gradient, by the number of steps.

    Nothing is changed.

    Args:
        optimizer: of the energy family; others have no relaxation, and so no course.
        closure: as of its steps.

    Returns:
        By the name of the layer, for 1, 2, 4, ... steps up to as many as the rule takes, without those in which no step
        lowers the energy.
    """
    found: dict[str, dict[int, float]] = {}
    option = "nudged_steps" if isinstance(optimizer, bioopt.EquilibriumPropagation) else "steps"
    if not isinstance(optimizer, bioopt.EnergyRule) or not hasattr(optimizer, option):
        return found
    most = getattr(optimizer, option)
    try:
        for count in sorted({*(2**i for i in range(most.bit_length())), most}):
            setattr(optimizer, option, count)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of relaxations that are cut short
                    cosines = bioopt.diagnose(optimizer, closure, 2)
            except bioopt.Diverged:
                continue  # in so few steps; the run itself has gone well
            for name in optimizer.layers():
                if (of_layer := cosines.get(f"{name}.weight")) is not None:
                    found.setdefault(name, {})[count] = of_layer["cosine"]
    finally:
        setattr(optimizer, option, most)
    return found


def activity(events: Tensor) -> dict[str, float]:
    """Sparsity, dead units and dimensionality of activities, events × neurons."""
    neurons = events.shape[1]
    if neurons < 2:
        return {}
    power = events.square().mean(1)
    dense = events.abs().mean(1).square() / power
    sparsity = ((1 - dense) / (1 - 1 / neurons))[power > 0]
    centred = events - events.mean(0)
    covariance = centred.T @ centred
    squares = covariance.square().sum()
    return {
        "sparsity": sparsity.mean().item() if len(sparsity) else math.nan,
        "dead_units": (events == 0).all(0).float().mean().item(),
        "dimensionality": (covariance.trace().square() / squares).item() if squares else 0.0,
    }


@torch.no_grad()
def wins(model: nn.Module, layers: list[bioopt.Synapse], images: Images, batch: int = 500) -> dict[str, Tensor]:
    """The share of events (samples and positions of one test batch) in which each neuron is its layer's most active."""
    found: dict[str, Tensor] = {}
    handles = []
    for synapse in layers:

        def count(layer: nn.Module, args: Any, u: Tensor, synapse: Any = synapse) -> None:
            winners = u.argmax(u.ndim + synapse.channel_dim).flatten()
            found[synapse.name] = torch.bincount(winners, minlength=len(synapse.weight)) / len(winners)

        handles.append(synapse.layer.register_forward_hook(count))
    model.eval()
    inputs, _ = next(images.test_batches(Augment(), batch))
    model(inputs)
    for handle in handles:
        handle.remove()
    return found
