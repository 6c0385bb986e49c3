"""A layer of spiking neurons that compete for images, after Diehl & Cook (2015)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bioopt.nn import PoissonEncoding, RateEncoding

from ..checks import require_counts
from .shapes import Shape

ENCODINGS = {"poisson": PoissonEncoding, "rate": RateEncoding}


class Competition(nn.Module):
    """Leaky integrate-and-fire neurons that compete: at most one fires per step, and adaptive thresholds balance them.

    The neurons are `snntorch.Leaky`, and this adds: of the neurons above threshold only the one furthest above it
    fires, its spike also resets the others (lateral inhibition), and thresholds adapt (homeostasis). After each
    sequence in training mode, a threshold moves by ``adaptation`` times the ratio of its neuron's spike count to the
    mean count, less 1, so that all neurons fire equally often in the long run.

    Args:
        neurons: number of neurons.
        beta: factor by which a membrane potential decays per step.
        threshold: initial threshold, in units of the input.
        adaptation: rate of the thresholds, in the same units.
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
        """One step, from input and potentials to spikes and new potentials, all N×neurons."""
        spikes, potential = self.lif(u, potential)
        first = (potential.detach() - self.lif.threshold).argmax(1, keepdim=True)
        spikes = spikes * torch.zeros_like(spikes).scatter_(1, first, 1.0)
        return spikes, potential * (1 - spikes.detach().sum(1, keepdim=True))

    @torch.no_grad()
    def adapt(self, counts: Tensor) -> None:
        """Adapt the thresholds to the spike counts of a sequence, N×neurons."""
        fired = counts.sum(0)
        if dist.is_initialized():
            dist.all_reduce(fired)
        if fired.any():
            self.lif.threshold += self.adaptation * (fired / fired.mean() - 1)


class SpikingLayer(nn.Module):
    """Images as spike trains, a layer of competing neurons, and the spike counts of these.

    The intensity of an image is scaled so that it makes ``spikes`` input spikes per step on average.
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
        with torch.no_grad():  # all neurons start with the same sum of weights, which scaling keeps
            self.fc.weight.uniform_(0, 1)
            self.fc.weight.mul_(inputs / 8 / self.fc.weight.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """Images N×C×H×W to spike counts N×neurons."""
        x = x.flatten(1)
        x = x - x.amin(1, keepdim=True)
        probability = (x * (self.spikes / x.sum(1, keepdim=True).clamp(min=1e-6))).clamp(max=1)
        counts = potential = x.new_zeros(len(x), len(self.fc.weight))
        for spikes in self.encode(probability):
            fired, potential = self.neurons(self.fc(spikes), potential)
            counts = counts + fired
        if self.training:
            self.neurons.adapt(counts)
        return counts

    def extra_repr(self) -> str:
        """Its options."""
        return f"spikes={self.spikes:g}"


class ClassGroups(nn.Module):
    """The readout of neurons that are assigned to classes from the start: the share of spikes of each class.

    Args:
        classes: number of classes; neuron ``k`` belongs to class ``k`` modulo this number.
        gain: logit of a class that has all spikes.
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
    """A layer of spiking neurons, and a readout of their spike counts.

    Args:
        shape: channels, height and width of an image.
        classes: outputs of the readout.
        neurons: number of neurons of the spiking layer.
        steps: number of time steps for which an image is shown.
        spikes: mean number of input spikes per step.
        encoding: ``"poisson"``, or ``"rate"``, which spaces spikes evenly.
        beta: as of `Competition`.
        threshold: as of `Competition`.
        adaptation: as of `Competition`.
        readout: ``"linear"``, or ``"groups"``: each neuron is assigned to a class, and only the layer learns.
    """
    if readout not in ("linear", "groups"):
        raise ValueError(f"model.readout={readout} must be linear or groups")
    require_counts(of="model.", neurons=neurons)
    if readout == "groups" and neurons % classes:
        raise ValueError(f"model.neurons={neurons} must be a multiple of the {classes} classes with readout=groups")
    competition = {"beta": beta, "threshold": threshold, "adaptation": adaptation}
    head = nn.Linear(neurons, classes) if readout == "linear" else ClassGroups(classes)
    layer = SpikingLayer(math.prod(shape), neurons, steps, spikes, encoding, competition)
    return nn.Sequential(OrderedDict(layer=layer, readout=head))
