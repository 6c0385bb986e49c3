"""A spiking layer that learns digits without labels, after Diehl & Cook (2015), and how it is read out by votes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bioopt
from bioopt.nn import PoissonEncoding, RateEncoding

from . import pictures
from .data import EVALUATED, Augment, Images
from .models import Shape

ENCODINGS = {"poisson": PoissonEncoding, "rate": RateEncoding}


class Competition(nn.Module):
    """Leaky integrate-and-fire neurons that compete: one fires a step, which silences all, and each finds its share.

    The neurons are `snntorch.Leaky`'s. What it lacks is here: of those above their threshold the most excited fires
    alone, its spike resets the others as well (lateral inhibition), and thresholds adapt. After each sequence in
    training mode a threshold moves by ``adaptation`` times how much more often than the others its neuron has fired
    (the ratio to their mean, less 1), so that all come to fire alike.

    Args:
        neurons: how many.
        beta: what is left of a membrane potential a step later.
        threshold: that all start from, in units of what comes in.
        adaptation: in the same units.
    """

    def __init__(self, neurons: int, beta: float, threshold: float, adaptation: float) -> None:
        super().__init__()
        try:
            import snntorch
        except ImportError:
            raise ValueError("model=spiking takes its neurons from snntorch: pip install -e '.[spiking]'") from None
        self.adaptation = adaptation
        self.lif = snntorch.Leaky(beta, threshold=torch.full((neurons,), float(threshold)), reset_mechanism="none")

    def forward(self, u: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
        """One step: what comes in and the potentials before it to spikes and the potentials after it, all N×neurons."""
        spikes, potential = self.lif(u, potential)
        first = (potential.detach() - self.lif.threshold).argmax(1, keepdim=True)
        spikes = spikes * torch.zeros_like(spikes).scatter_(1, first, 1.0)
        return spikes, potential * (1 - spikes.detach().sum(1, keepdim=True))

    @torch.no_grad()
    def adapt(self, counts: Tensor) -> None:
        """Move thresholds by the spikes of a sequence, N×neurons."""
        fired = counts.sum(0)
        if dist.is_initialized():
            dist.all_reduce(fired)
        if fired.any():
            self.lif.threshold += self.adaptation * (fired / fired.mean() - 1)


class SpikingLayer(nn.Module):
    """Images as trains of spikes, one layer of neurons that compete for them, and how often each of them fires.

    An image is stretched to [0, 1] and shone so brightly that it makes ``spikes`` spikes a step.
    """

    def __init__(
        self, inputs: int, neurons: int, steps: int, spikes: float, encoding: str, competition: Mapping[str, float]
    ) -> None:
        super().__init__()
        if encoding not in ENCODINGS:
            raise ValueError(f"model.encoding={encoding} must be one of {', '.join(ENCODINGS)}")
        if not spikes > 0:
            raise ValueError(f"model.spikes={spikes} must be > 0")
        self.spikes = spikes
        self.encode = ENCODINGS[encoding](steps)
        self.fc = nn.Linear(inputs, neurons, bias=False)
        self.neurons = Competition(neurons, **competition)
        with torch.no_grad():  # all neurons start with as much weight, which scaling keeps
            self.fc.weight.uniform_(0, 1)
            self.fc.weight.mul_(inputs / 8 / self.fc.weight.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Images N×C×H×W to counts of spikes N×neurons."""
        x = x.flatten(1)
        x = x - x.amin(1, keepdim=True)
        chance = (x * (self.spikes / x.sum(1, keepdim=True).clamp(min=1e-6))).clamp(max=1)
        counts = potential = x.new_zeros(len(x), len(self.fc.weight))
        for spikes in self.encode(chance):
            fired, potential = self.neurons(self.fc(spikes), potential)
            counts = counts + fired
        if self.training:
            self.neurons.adapt(counts)
        return counts

    def extra_repr(self) -> str:
        """Its options."""
        return f"spikes={self.spikes:g}"


class Groups(nn.Module):
    """The readout of neurons that stand for classes from the start: how much of all spikes fall to each class's.

    Args:
        classes: of neuron ``k`` it is ``k`` modulo their number.
        gain: the share that makes a logit of 1, inverted.
    """

    def __init__(self, classes: int, gain: float = 4.0) -> None:
        super().__init__()
        self.classes, self.gain = classes, gain

    def forward(self, counts: Tensor) -> Tensor:
        """Counts N×neurons to logits N×classes."""
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.gain * shares.unflatten(1, (-1, self.classes)).sum(1)
        return logits


def spiking(
    shape: Shape,
    classes: int,
    *,
    neurons: int,
    steps: int,
    spikes: float,
    encoding: str,
    beta: float,
    threshold: float,
    adaptation: float,
    readout: str = "linear",
) -> nn.Module:
    """A layer of spiking neurons, and a readout of how often each has fired.

    Args:
        shape: channels, height and width of an image.
        classes: outputs of the readout.
        neurons: of the spiking layer.
        steps: time steps an image is shown.
        spikes: that an image makes a step.
        encoding: ``"poisson"``, or ``"rate"``, evenly spaced.
        beta: as of `Competition`.
        threshold: as of `Competition`.
        adaptation: as of `Competition`.
        readout: ``"linear"``, or ``"groups"``: each neuron stands for a class, and nothing but the layer learns.
    """
    if readout not in ("linear", "groups"):
        raise ValueError(f"model.readout={readout} must be linear or groups")
    if readout == "groups" and isinstance(neurons, int) and neurons % classes:
        raise ValueError(f"model.neurons={neurons} must be a multiple of the {classes} classes with readout=groups")
    if isinstance(neurons, bool) or not isinstance(neurons, int) or neurons < 1:
        raise ValueError(f"model.neurons={neurons} must be an integer >= 1")
    competition = {"beta": beta, "threshold": threshold, "adaptation": adaptation}
    said = nn.Linear(neurons, classes) if readout == "linear" else Groups(classes)
    layer = SpikingLayer(math.prod(shape), neurons, steps, spikes, encoding, competition)
    return nn.Sequential(OrderedDict(layer=layer, readout=said))


@torch.no_grad()
def vote(
    *, model: nn.Sequential, images: Images, title: str, folder: Path, rule: Mapping[str, Any] | None = None
) -> tuple[dict[str, float], list[Path]]:
    """How many test images the neurons' votes get right, as in the paper, and what each neuron stands for.

    Each neuron is assigned the class whose training images make it fire most, in the mean; an image is taken for the
    class whose neurons fire most at it, in the mean. The readout has no part in this.

    Args:
        model: of `spiking`.
        images: the data.
        title: above the pictures.
        folder: where to write them.
        rule: options of the optimizer; of STDP, its window is measured and drawn.
    """
    model.eval()
    of_training = torch.cat([model[0](images.prepare(part)) for part in images.train_images.split(EVALUATED)])
    of_test = torch.cat([model[0](inputs) for inputs, _ in images.test_batches(Augment())])
    assigned = assign(of_training, images.train_labels, images.classes)
    right = (voted(of_test, assigned, images.classes) == images.test_labels).float().mean().item()
    found = {
        "vote_accuracy": right,
        "spikes_per_image": of_test.sum(1).mean().item(),
        "silent_neurons": int((of_training.sum(0) == 0).sum()),
    }
    made = []
    if rule is not None and rule["_target_"] == "bioopt.STDP":
        made.append(pictures.window(*window(rule), f"STDP window: {title}", folder / "window.png"))
    return found, made


def assign(counts: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The class at whose images each neuron fires most, in the mean: samples×neurons to neurons."""
    means = [counts[labels == c].mean(0) if (labels == c).any() else counts.new_zeros(counts.shape[1]) - 1
             for c in range(classes)]  # fmt: skip
    return torch.stack(means).argmax(0)


def voted(counts: Tensor, assigned: Tensor, classes: int) -> Tensor:
    """The class whose neurons fire most, in the mean: samples×neurons to samples."""
    votes = [counts[:, assigned == c].mean(1) if (assigned == c).any() else counts.new_zeros(len(counts)) - 1
             for c in range(classes)]  # fmt: skip
    return torch.stack(votes, 1).argmax(1)


def window(rule: Mapping[str, Any], reach: int = 100) -> tuple[list[float], list[float]]:
    """What one pair of spikes changes, by delay (ms, postsynaptic less presynaptic), measured from `bioopt.STDP`.

    Every synapse of a layer gets one presynaptic spike, a time step after the last; its neuron fires once. The weight
    stands halfway between the bounds. Changes are per unit of the learning rate.
    """
    names = ("tau_plus", "tau_minus", "dt", "a_plus", "a_minus", "x_target", "bounds", "w_min", "w_max")
    options = {name: rule[name] for name in names if name in rule}
    steps = 2 * reach + 1

    class Once(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return torch.full_like(u, float(moment == reach))

    layer = nn.Linear(steps, 1, bias=False).double()
    model = nn.Sequential(layer, Once())
    optimizer = bioopt.STDP(model, 1.0, readout=None, **options)
    nn.init.constant_(layer.weight, (options.get("w_min", 0.0) + options.get("w_max", 1.0)) / 2)
    before = layer.weight.detach().clone()
    for moment in range(steps):
        model(nn.functional.one_hot(torch.tensor([moment]), steps).double())
    optimizer.step()
    dt = options.get("dt", 1.0)
    optimizer.close()
    return [dt * (reach - i) for i in range(steps)], (layer.weight.detach() - before)[0].tolist()
