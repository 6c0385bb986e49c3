"""The classic result of each Hebbian rule, with its published formula: components, selectivity, independent parts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

import bioopt
from bioopt.core.sums import Sums, product_sums

from .. import data
from ..building import build_schedule
from ..checks import require_counts
from ..verdict import Expected
from . import Task, classics_plots

Draw = Callable[[int], Tensor]  # this number of patches, patches × pixels
Rule = TypeVar("Rule", bound=bioopt.LocalRule)


def published(rule: type[Rule], network: nn.Module, **options: Any) -> Rule:
    """A rule of bioopt by its published formula, without a readout.

    This is the one place where the experiment builds rules of bioopt: an option that adds to a formula is off here.
    """
    return rule(network, readout=None, homeostasis=False, **options)


def learn(rule: bioopt.LocalRule, network: nn.Module, batches: Iterable[Tensor]) -> None:
    """One step for each batch: without a readout, a forward pass is all that a local rule needs."""
    for batch in batches:
        network(batch)
        rule.step()


class Part(ABC):
    """A result of one rule: what it measures, and what is drawn of it."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # each part is a dataclass
            value = getattr(self, field.name)
            if field.type == "int":
                require_counts(of="", **{field.name: value})
            elif not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{field.name}={value} must be a number > 0")

    @abstractmethod
    def run(self, draw: Draw, size: int, device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Learn and measure.

        Args:
            draw: draws patches.
            size: pixels of their side.
            device: where to compute.

        Returns:
            numbers, the most important first, and tensors to be drawn.
        """


@dataclass
class Components(Part):
    """Principal components of patches by `bioopt.Oja`, against the eigenvectors of the patches' covariance."""

    ordered: ClassVar[bool] = False  # neuron k learns component k; otherwise all neurons learn the first
    neurons: int
    lr: float
    patches: int
    epochs: int
    batch_size: int

    def run(self, draw: Draw, size: int, device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Absolute cosines between each neuron's weights and its eigenvector, before and after."""
        x = draw(self.patches)
        x = x - x.mean(1, keepdim=True)  # contrast, not brightness
        x = x - x.mean(0)
        values, vectors = torch.linalg.eigh(x.T.double() @ x.double() / len(x))
        values, vectors = values.flip(0).float(), vectors.flip(1).float()
        x = x / values[0].sqrt()  # so that the learning rate is in units of the first component's variance
        layer = nn.Linear(size**2, self.neurons, bias=False, device=device)
        wanted = torch.arange(self.neurons) if self.ordered else torch.zeros(self.neurons, dtype=torch.long)
        eigenvectors = vectors[:, wanted.to(device)].T

        def cosines() -> Tensor:
            return F.cosine_similarity(layer.weight.detach(), eigenvectors).abs()

        before = cosines()
        rule = published(bioopt.Sanger if self.ordered else bioopt.Oja, layer, lr=self.lr)
        batches = [b for _ in range(self.epochs) for b in torch.randperm(len(x), device=device).split(self.batch_size)]
        schedule = build_schedule("cosine", rule, len(batches))
        assert schedule is not None
        for index in batches:
            learn(rule, layer, [x[index]])
            schedule.step()
        after, weight = cosines(), layer.weight.detach()
        signs = (weight * eigenvectors).sum(1, keepdim=True).sign()  # an eigenvector has no sign of its own
        measured = {
            "least_cosine": after.min().item(),
            "least_cosine_before": before.min().item(),
            "largest_error_of_length": (weight.norm(dim=1) - 1).abs().max().item(),
        }
        share = values[wanted.to(device)] / values.sum()
        return measured, {
            "weight": weight * signs, "eigenvectors": eigenvectors, "cosines": after, "before": before, "share": share,
        }  # fmt: skip


class OrderedComponents(Components):
    """The same by `bioopt.Sanger`, whose neurons learn the components in order."""

    ordered = True


@dataclass
class Patterns(Part):
    """A single neuron becomes selective for one of several patterns by `BCM`.

    Its selectivity is ``1 - mean response / largest response`` (Bienenstock et al., 1982), of responses >= 0. Of K
    linearly independent patterns, a neuron that responds to one alone has ``1 - 1/K``, the most.
    """

    patterns: int
    inputs: int
    lr: float
    threshold_rate: float
    steps: int
    batch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.patterns <= self.inputs:
            raise ValueError(f"patterns={self.patterns} must be at least 2, and at most inputs={self.inputs}")

    def run(self, draw: Draw, size: int, device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Selectivity before and after, and the response to each pattern over the steps."""
        patterns = F.normalize(torch.rand(self.patterns, self.inputs)).to(device)
        layer = nn.Linear(self.inputs, 1, bias=False, device=device)
        nn.init.uniform_(layer.weight, 0, 2 / math.sqrt(self.inputs))
        rule = published(bioopt.BCM, layer, lr=self.lr, threshold_rate=self.threshold_rate)
        responses = []
        for step in range(self.steps + 1):
            if step % max(1, self.steps // 100) == 0:
                responses.append(F.linear(patterns, layer.weight.detach())[:, 0])
            if step < self.steps:
                learn(rule, layer, [patterns[torch.randint(self.patterns, (self.batch_size,), device=device)]])
        course = torch.stack(responses)
        measured = {
            "selectivity": selectivity(course[-1]),
            "selectivity_before": selectivity(course[0]),
            "selectivity_at_most": 1 - 1 / self.patterns,
        }
        return measured, {"course": course, "steps": torch.tensor(self.steps)}


def selectivity(responses: Tensor) -> float:
    """``1 - mean / largest`` of the responses, where one below 0 is none."""
    fired = responses.clamp(min=0)
    return (1 - fired.mean() / fired.max().clamp(min=1e-12)).item()


class Rectified(nn.Linear):
    """A layer whose output is the rate of its neurons, which is not below 0."""

    def forward(self, x: Tensor) -> Tensor:
        """``relu(W x)``."""
        u = super().forward(x)
        return with_activity(u, F.relu(u))


def with_activity(u: Tensor, activity: Tensor) -> Tensor:
    """Activity with the derivative of ``u = W x``, so that a rule's local product with its signal s is ``Σ s xᵀ``."""
    return u + (activity - u).detach()


bioopt.register_synapse(Rectified, channel_dim=-1)


@dataclass
class Orientations(Part):
    """Neurons become selective for the orientation of gratings by `BCM`, from whitened patches of photographs.

    Two controls: the random weights at the start, and the same neurons after learning from noise with the same
    covariance, which has no edges.
    """

    neurons: int
    components: int  # of the patches that are kept and whitened: without the finest, which are noise
    lr: float
    threshold_rate: float
    patches: int
    epochs: int
    batch_size: int

    def run(self, draw: Draw, size: int, device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The index of orientation selectivity of each neuron, after learning and of the controls."""
        x = draw(self.patches)
        x = x - x.mean(1, keepdim=True)
        x = x - x.mean(0)
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        values, vectors = values[-self.components :], vectors[:, -self.components :]
        white = x @ (vectors * values.rsqrt()) @ vectors.T
        noise = torch.randn(len(x), self.components, device=device) @ vectors.T
        start = torch.randn(self.neurons, size**2, device=device) / size @ vectors @ vectors.T
        gratings = all_gratings(size).to(device)
        # Gratings are whitened as patches are, and have their mean length.
        shown = (gratings - gratings.mean(-1, keepdim=True)) @ (vectors * values.rsqrt()) @ vectors.T
        shown = F.normalize(shown, dim=-1) * white.norm(dim=1).mean()
        weights = {"before": start, "noise": self._learned(start, noise), "learned": self._learned(start, white)}
        tuned = {name: tuning(shown, weight) for name, weight in weights.items()}
        index = {name: orientation_index(curves) for name, curves in tuned.items()}
        measured = {
            "index": index["learned"].median().item(),
            "index_of_noise": index["noise"].median().item(),
            "index_before": index["before"].median().item(),
        }
        return measured, {"fields": weights["learned"], "tuning": tuned["learned"]} | {
            f"index_{name}": values for name, values in index.items()
        }

    def _learned(self, start: Tensor, x: Tensor) -> Tensor:
        layer = Rectified(start.shape[1], len(start), bias=False, device=x.device)
        with torch.no_grad():
            layer.weight.copy_(start)
        rule = published(bioopt.BCM, layer, lr=self.lr, threshold_rate=self.threshold_rate)
        for _ in range(self.epochs):
            learn(rule, layer, (x[i] for i in torch.randperm(len(x), device=x.device).split(self.batch_size)))
        return layer.weight.detach()


def all_gratings(size: int, orientations: int = 24, phases: int = 8) -> Tensor:
    """Sinusoidal gratings, orientations × spatial frequencies × phases × pixels."""
    angle = (torch.arange(orientations) * math.pi / orientations).view(-1, 1, 1, 1, 1)
    cycles = torch.arange(2, 2 + size // 2).view(-1, 1, 1, 1) / 2  # in a patch: from 1 to half of what it can show
    phase = (torch.arange(phases) * 2 * math.pi / phases).view(-1, 1, 1)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.cos(2 * math.pi * cycles / size * (x * angle.cos() + y * angle.sin()) + phase).flatten(3)


def tuning(gratings: Tensor, weight: Tensor) -> Tensor:
    """The response of each neuron to each orientation, at its best frequency and phase: neurons × orientations."""
    rates = F.relu(gratings @ weight.T).amax(2)  # orientations × frequencies × neurons
    best = rates.amax(0).argmax(0)
    return rates.permute(2, 1, 0)[torch.arange(len(weight), device=weight.device), best]


def orientation_index(tuned: Tensor) -> Tensor:
    """``|Σ r(θ) exp(2iθ)| / Σ r(θ)`` of each neuron: 0 if it responds to all orientations alike, 1 to one alone."""
    angle = torch.arange(tuned.shape[1], device=tuned.device) * (2 * math.pi / tuned.shape[1])
    length = torch.hypot((tuned * angle.cos()).sum(1), (tuned * angle.sin()).sum(1))
    return length / tuned.sum(1).clamp(min=1e-12)


class Inhibited(nn.Linear):
    """Binary neurons that inhibit each other by lateral weights, with thresholds (Földiák, 1990).

    For each input the network settles by ``dy/dt = σ(10 (W x + lateral y - threshold)) - y``; the neurons that end
    above 0.5 fire.
    """

    def __init__(self, inputs: int, neurons: int) -> None:
        super().__init__(inputs, neurons, bias=False)
        self.lateral = nn.Parameter(torch.zeros(neurons, neurons))
        self.threshold = nn.Parameter(torch.zeros(neurons))
        with torch.no_grad():
            self.weight.copy_(F.normalize(torch.rand(neurons, inputs)))

    def forward(self, x: Tensor) -> Tensor:
        """The activity of the neurons, 0 or 1."""
        u = F.linear(x, self.weight)
        with torch.no_grad():
            drive, y = u - self.threshold, torch.zeros_like(u)
            for _ in range(60):
                y = torch.lerp(y, torch.sigmoid(10 * (drive + y @ self.lateral.T)), 0.2)
        return with_activity(u, (y > 0.5).to(u))


bioopt.register_synapse(Inhibited, channel_dim=-1)


class Foldiak(bioopt.LocalRule):
    r"""Hebbian forward weights, anti-Hebbian lateral ones and thresholds that keep activity sparse.

    .. math::
        \Delta w_{kj} = \beta\, \langle y_k (x_j - w_{kj}) \rangle, \qquad
        \Delta l_{ki} = -\alpha\, \langle y_k y_i - p^2 \rangle \ (k \ne i,\ l_{ki} \le 0), \qquad
        \Delta t_k = \gamma\, \langle y_k - p \rangle

    with the activity :math:`y` of `Inhibited` neurons after they have settled. It is a rule of this experiment, since
    no rule of bioopt trains lateral weights: `bioopt.AntiHebbian` is its form without them.

    Args:
        params: the model.
        lr: :math:`\beta`.
        lateral_lr: :math:`\alpha`.
        threshold_lr: :math:`\gamma`.
        active: :math:`p`, the share of inputs for which each neuron is to fire.

    Source: P. Földiák (1990), *Forming sparse representations by local anti-Hebbian learning*, Biol. Cybernetics 64.
    """

    def __init__(self, params: Any, lr: float, *, lateral_lr: float, threshold_lr: float, active: float) -> None:
        # Each parameter has a rate of its own, so that the descent takes whole steps.
        own = {"forward_lr": lr, "lateral_lr": lateral_lr, "threshold_lr": threshold_lr, "active": active}
        super().__init__(params, 1.0, own=own, readout=None)

    def trained(
        self, synapses: list[bioopt.Synapse], group: dict[str, Any]
    ) -> list[tuple[bioopt.Synapse, list[tuple[str, Tensor]]]]:
        """Forward weights, lateral weights and thresholds."""
        return [(s, [(f"{s.name}.{name}", p) for name, p in s.layer.named_parameters()]) for s in synapses]

    def measure(self, firing: bioopt.Firing, u: Tensor) -> Sums:
        """``Σ y xᵀ``, ``Σ y yᵀ`` and ``Σ y``."""
        y = u.detach()
        return product_sums(firing, u, y, together=y.T @ y, fired=y.sum(0))

    def changes(
        self, sums: Sums, synapse: bioopt.Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """As above; lateral weights stay inhibitory, and no neuron has one to itself."""
        layer, p = synapse.layer, group["active"]
        assert isinstance(layer, Inhibited)
        product, together, fired = (sums.values[name] / sums.events for name in ("product", "together", "fired"))
        lateral = layer.lateral.detach()
        inhibited = (lateral - group["lateral_lr"] * (together - p * p)).clamp(max=0).fill_diagonal_(0)
        return {
            layer.weight: group["forward_lr"] * (product - fired.unsqueeze(1) * layer.weight.detach()),
            layer.lateral: inhibited - lateral,
            layer.threshold: group["threshold_lr"] * (fired - p),
        }


@dataclass
class Bars(Part):
    """The bars problem: each image is a sum of bars, and no image shows which; a neuron for each bar is to be found.

    Földiák's network sees one image a step. Plain layers, in which neurons compete within a batch but have no lateral
    weights, get ten images in each of as many steps.
    """

    size: int  # pixels of an image's side, half the number of bars
    probability: float  # of each bar
    presentations: int
    settling: int  # presentations before these, in which only thresholds learn
    lr: float  # of forward weights
    lateral_lr: float
    threshold_lr: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probability >= 1:
            raise ValueError(f"probability={self.probability} must be below 1")

    def run(self, draw: Draw, size: int, device: torch.device) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The number of bars that are found, over the presentations, and by other rules."""
        count, pixels = 2 * self.size, self.size**2
        single = single_bars(self.size).to(device)
        network = Inhibited(pixels, count).to(device)
        quiet = Foldiak(network, 0.0, lateral_lr=0.0, threshold_lr=5 * self.threshold_lr, active=self.probability)
        learn(quiet, network, (self.images(1, device) for _ in range(self.settling)))
        quiet.close()
        rule = Foldiak(
            network, self.lr, lateral_lr=self.lateral_lr, threshold_lr=self.threshold_lr, active=self.probability
        )
        course, every = [], max(1, self.presentations // 60)
        for presented in range(self.presentations + 1):
            if presented % every == 0 or presented == self.presentations:
                course.append((presented, found(network(single).detach())))
                rule.discard()  # what was measured is not learned
            if presented < self.presentations:
                learn(rule, network, [self.images(1, device)])
        images = self.images(2000, device)
        measured: dict[str, float] = {"found": course[-1][1], "of": count}
        measured["mean_activity"] = network(images).mean().item()
        if complete := [presented for presented, number in course if number == count]:
            measured["presentations_until_all"] = complete[0]
        others = self._others(device)
        measured |= {f"found_by_{name}": found(single @ weight.T) for name, weight in others.items()}
        rule.close()
        return measured, {
            "images": images[:8], "fields": network.weight.detach(), "course": torch.tensor(course),
            "others": torch.tensor([measured[f"found_by_{name}"] for name in OTHERS]),
        }  # fmt: skip

    def images(self, count: int, device: torch.device) -> Tensor:
        """Images in which each bar is present with its probability; where two cross, the pixel is 1 as elsewhere."""
        present = torch.rand(2, count, self.size, device=device) < self.probability
        return (present[0].unsqueeze(2) | present[1].unsqueeze(1)).float().flatten(1)

    def _others(self, device: torch.device) -> dict[str, Tensor]:
        """The weights of plain layers by other rules, and of one that did not learn."""
        weights = {}
        for name, make in OTHERS.items():
            layer = nn.Linear(self.size**2, 2 * self.size, bias=False, device=device)
            nn.init.uniform_(layer.weight)
            with torch.no_grad():
                layer.weight.copy_(F.normalize(layer.weight))
            if make is not None:
                rule = make(layer)
                schedule = build_schedule("cosine", rule, self.presentations)
                assert schedule is not None
                for _ in range(self.presentations):
                    learn(rule, layer, [self.images(10, device)])
                    schedule.step()
            weights[name] = layer.weight.detach()
        return weights


#: other rules on the bars, with the best of the options that were tried
OTHERS: dict[str, Callable[[nn.Module], bioopt.LocalRule] | None] = {
    "hebbian": lambda layer: published(bioopt.Hebbian, layer, lr=0.1, inverse_temperature=16.0),
    "krotov_hopfield": lambda layer: published(bioopt.KrotovHopfield, layer, lr=0.02, anti_hebbian=0.0),
    "random_weights": None,
}


def single_bars(size: int) -> Tensor:
    """Each bar alone, first the horizontal ones: bars × pixels."""
    lines = torch.eye(size)
    across = lines.unsqueeze(2).expand(size, size, size).flatten(1)
    return torch.cat([across, lines.unsqueeze(1).expand(size, size, size).flatten(1)])


def found(responses: Tensor) -> int:
    """The number of bars that some neuron stands for, from the responses to single bars, bars × neurons.

    A neuron stands for a bar if it responds to that more than twice as strongly as to any other.
    """
    best = responses.topk(2, 0)
    stands = best.values[0] > 2 * best.values[1].clamp(min=0)
    return len(set(best.indices[0, stands].tolist()))


PARTS: dict[str, type[Part]] = {
    "oja": Components,
    "sanger": OrderedComponents,
    "bcm_patterns": Patterns,
    "bcm_orientations": Orientations,
    "bars": Bars,
}


class Classics(Task):
    """Classic results of single rules, a round each, and one page with all of them.

    Args:
        config: of the run.
        device: where to compute.
        parts: which results, of `PARTS`.
        source: of the patches: ``"photographs"``, the two that come with scikit-learn, or ``"data"``, the training
            images of ``data=``.
        patch_size: pixels of a patch's side.
        options: of each part, by its name.
    """

    def __init__(
        self, config: DictConfig, device: torch.device, *, parts: Sequence[str], source: str, patch_size: int,
        **options: dict[str, Any],
    ) -> None:  # fmt: skip
        if isinstance(parts, str) or not parts or not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
            raise ValueError(f"task.parts={parts} must be a list of some of {', '.join(PARTS)}, each once")
        if source not in ("photographs", "data"):
            raise ValueError(f"task.source={source} must be photographs or data")
        self.patch_size = patch_size
        self.require_counts("patch_size", least=4)
        self.config, self.device, self.source = config, device, source
        if unknown := sorted(set(options) - set(PARTS)):
            raise ValueError(f"task.{unknown[0]} is not an option; there are {', '.join(PARTS)}")
        self.parts = {name: _built(name, options.get(name, {})) for name in parts}
        self.rounds = len(self.parts)
        self.drawn: dict[str, dict[str, Tensor]] = {}
        for name, part in self.parts.items():
            if isinstance(part, Orientations) and part.components >= patch_size**2:
                raise ValueError(
                    f"task.{name}: components={part.components} must be below the {patch_size**2} pixels of a patch"
                )
        self.images = self._images()

    def _images(self) -> list[Tensor]:
        """Grey images, each with mean 0 and deviation 1, of at least the size of a patch."""
        if self.source == "data":
            images = data.from_config(self.config.data, self.device).train_images
            if min(images.shape[2:]) < self.patch_size:
                height, width = images.shape[2:]
                raise ValueError(
                    f"task.patch_size={self.patch_size} is larger than the images of data={self.config.data.name}, "
                    f"{height}×{width}"
                )
            kept = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:5000]]
            grey = list(kept.float().mean(1))
        else:
            from sklearn.datasets import load_sample_images

            photographs = [torch.tensor(image).float().mean(2) for image in load_sample_images().images]
            # At half the size: whitening would amplify what JPEG left at single pixels.
            grey = [F.avg_pool2d(image[None], 2)[0].to(self.device) for image in photographs]
            if min(min(image.shape) for image in grey) < self.patch_size:
                raise ValueError(f"task.patch_size={self.patch_size} is larger than a photograph")
        return [(image - image.mean()) / image.std().clamp(min=1e-6) for image in grey]

    def draw(self, count: int) -> Tensor:
        """Patches at random places of random images, patches × pixels."""
        size, patches = self.patch_size, []
        counts = torch.bincount(torch.randint(len(self.images), (count,)), minlength=len(self.images)).tolist()
        for image, n in zip(self.images, counts, strict=True):
            rows, columns = (torch.randint(side - size + 1, (n, 1), device=image.device) for side in image.shape)
            inside = torch.arange(size, device=image.device)
            patches.append(image[(rows + inside).unsqueeze(2), (columns + inside).unsqueeze(1)])
        return torch.cat(patches).flatten(1)

    def round(self, number: int) -> dict[str, Any]:
        """One part; it needs nothing of the parts before."""
        name = list(self.parts)[number - 1]
        torch.manual_seed(self.config.seed * 1_000_003 + list(PARTS).index(name))
        measured, drawn = self.parts[name].run(self.draw, self.patch_size, self.device)
        self.drawn[name] = {key: tensor.cpu() for key, tensor in drawn.items()}
        return {"part": name} | {f"{name}_{key}": value for key, value in measured.items()}

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """The published results; for orientations, of which there is no number, the control."""
        found = summary["measured"]
        wanted: dict[str, tuple[float | None, str]] = {
            "oja_least_cosine": (1.0, "by theory"),
            "sanger_least_cosine": (1.0, "by theory"),
            "bcm_patterns_selectivity": (found.get("bcm_patterns_selectivity_at_most"), "by theory"),
            "bcm_orientations_index": (found.get("bcm_orientations_index_of_noise"), "after learning from noise"),
            "bars_found": (found.get("bars_of"), "there are"),
        }
        return {name: [Expected([value], source)] for name, (value, source) in wanted.items() if value is not None}

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The numbers of all parts, and the page."""
        numbers = {key: value for line in history for key, value in line.items() if key.startswith(f"{line['part']}_")}
        return numbers, [classics_plots.page(self.drawn, numbers, list(OTHERS), title, folder / "classics.png")]

    def state_dict(self) -> dict[str, Any]:
        """What is drawn of the parts so far."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.drawn = state["drawn"]


def _built(name: str, options: dict[str, Any]) -> Part:
    try:
        return PARTS[name](**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"task.{name}: {error}") from None
