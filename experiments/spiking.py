"""Reading out a spiking layer that learned without labels by votes (Diehl & Cook, 2015), and the window of STDP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bioopt

from . import pictures
from .data import EVALUATION_BATCH, Augment, Images
from .models import spiking as spiking  # the configurations of older runs name it here


@torch.no_grad()
def vote(
    *, model: nn.Sequential, images: Images, title: str, folder: Path, rule: Mapping[str, Any] | None = None
) -> tuple[dict[str, float], list[Path]]:
    """The test accuracy of the neurons' votes, and the measured STDP window. The readout is not used.

    As in the paper, each neuron is assigned to the class whose training images make it fire most on average, and an
    image to the class whose neurons fire most on average. By weighted votes, each spike counts for every class in
    proportion to how often its neuron fires for it (Hazan et al., 2018, *BindsNET*).

    Args:
        model: a network of `experiments.models.spiking`.
        images: the data set.
        title: title of the pictures.
        folder: where they are written.
        rule: options of the optimizer; if it is STDP, its window is measured and drawn.
    """
    model.eval()
    train_counts = torch.cat([model[0](images.prepare(part)) for part in images.train_images.split(EVALUATION_BATCH)])
    test_counts = torch.cat([model[0](inputs) for inputs, _ in images.test_batches(Augment())])
    assigned = assign(train_counts, images.train_labels, images.classes)
    by_neurons = voted(test_counts, assigned, images.classes)
    by_spikes = (test_counts @ shares(train_counts, images.train_labels, images.classes)).argmax(1)
    results = {
        "vote_accuracy": (by_neurons == images.test_labels).float().mean().item(),
        "weighted_vote_accuracy": (by_spikes == images.test_labels).float().mean().item(),
        "spikes_per_image": test_counts.sum(1).mean().item(),
        "silent_neurons": int((train_counts.sum(0) == 0).sum()),
    }
    written = []
    if rule is not None and rule["_target_"] == "bioopt.STDP":
        written.append(pictures.window(*window(rule), f"STDP window: {title}", folder / "window.png"))
    return results, written


def assign(counts: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The class for whose images each neuron fires most on average: samples×neurons to neurons.

    -1 for a neuron that never fires, which has no vote.
    """
    return responses(counts, labels, classes).argmax(1).masked_fill(~counts.any(0), -1)


def shares(counts: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The share of each class in how often each neuron fires: samples×neurons to neurons×classes."""
    means = responses(counts, labels, classes)
    return means / means.sum(1, keepdim=True).clamp(min=1e-12)


def responses(counts: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How often each neuron fires on average for images of each class: samples×neurons to neurons×classes."""
    silent = counts.new_zeros(counts.shape[1])
    return torch.stack([counts[labels == c].mean(0) if (labels == c).any() else silent for c in range(classes)], dim=1)


def voted(counts: Tensor, assigned: Tensor, classes: int) -> Tensor:
    """The class whose neurons fire most on average: samples×neurons to samples."""
    votes = [counts[:, assigned == c].mean(1) if (assigned == c).any() else counts.new_zeros(len(counts)) - 1
             for c in range(classes)]  # fmt: skip
    return torch.stack(votes, 1).argmax(1)


def window(rule: Mapping[str, Any], reach: int = 100) -> tuple[list[float], list[float]]:
    """The weight change by one pair of spikes against their delay (ms, post minus pre), measured from `bioopt.STDP`.

    Each synapse of a neuron gets one presynaptic spike, one time step after the previous synapse, and the neuron fires
    once. The weight is halfway between its bounds. Changes are per unit of the learning rate.
    """
    names = ("tau_plus", "tau_minus", "dt", "a_plus", "a_minus", "x_target", "bounds", "w_min", "w_max")
    options = {name: rule[name] for name in names if name in rule}
    steps = 2 * reach + 1

    class FireOnce(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return torch.full_like(u, float(moment == reach))

    layer = nn.Linear(steps, 1, bias=False).double()
    model = nn.Sequential(layer, FireOnce())
    optimizer = bioopt.STDP(model, 1.0, readout=None, **options)
    nn.init.constant_(layer.weight, (options.get("w_min", 0.0) + options.get("w_max", 1.0)) / 2)
    before = layer.weight.detach().clone()
    for moment in range(steps):
        model(nn.functional.one_hot(torch.tensor([moment]), steps).double())
    optimizer.step()
    dt = options.get("dt", 1.0)
    optimizer.close()
    return [dt * (reach - i) for i in range(steps)], (layer.weight.detach() - before)[0].tolist()
