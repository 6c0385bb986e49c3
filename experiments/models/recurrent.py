"""A recurrent layer of neurons with a time, for sequences, and for images a row per time step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioopt.nn import ALIF, LIF, LeakyRate

from ..checks import require_counts
from .shapes import Shape

NEURONS = ("lif", "alif", "rate")


class RecurrentLayer(nn.Module):
    """Neurons that receive a sequence and each other's former activity.

    Args:
        inputs: elements of the input in a time step.
        hidden: number of neurons.
        neurons: ``"lif"``, ``"alif"`` or ``"rate"``.
        tau: of the neurons, in time steps.
        tau_adaptation: of the thresholds of ``"alif"``, in time steps.
        beta: by which a spike raises the threshold in one half of the neurons of ``"alif"``; the others do not adapt.
        gain: of the input's weights, in units of 1/√inputs; those of the recurrence have half of it, without a
            synapse from a neuron to itself.
    """

    def __init__(
        self, inputs: int, hidden: int, neurons: str, tau: float, tau_adaptation: float, beta: float, gain: float
    ) -> None:
        super().__init__()
        if neurons not in NEURONS:
            raise ValueError(f"model.neurons={neurons} must be one of {', '.join(NEURONS)}")
        self.enter = nn.Linear(inputs, hidden)
        self.recurrent = nn.Linear(hidden, hidden, bias=False)
        with torch.no_grad():
            self.enter.weight.normal_(0, gain * inputs**-0.5)
            self.recurrent.weight.normal_(0, 0.5 * gain * hidden**-0.5).fill_diagonal_(0)
        if neurons == "alif":
            adapting = torch.arange(hidden) >= hidden // 2
            self.neurons: nn.Module = ALIF(tau, tau_adaptation=tau_adaptation, beta=beta * adapting)
        else:
            self.neurons = LIF(tau) if neurons == "lif" else LeakyRate(tau)

    def forward(self, xs: Tensor) -> Tensor:
        """From steps × batch × inputs to the neurons' activity, steps × batch × hidden."""
        currents, state, activity = self.enter(xs), None, []
        z = currents.new_zeros(currents.shape[1:])
        for current in currents:
            z, state = self.neurons(current + self.recurrent(z), state)
            activity.append(z)
        return torch.stack(activity)


class Rows(nn.Module):
    """Images N×C×H×W as sequences of their rows, each for ``repeats`` time steps: steps × N × CW."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.repeats = repeats

    def forward(self, x: Tensor) -> Tensor:
        """The sequence."""
        return x.permute(2, 0, 1, 3).flatten(2).repeat_interleave(self.repeats, 0)


class LaterMean(nn.Module):
    """The mean of a sequence over the later half of its time steps, when most of the image has been seen."""

    def forward(self, ys: Tensor) -> Tensor:
        """From steps × batch × outputs to batch × outputs."""
        return ys[len(ys) // 2 :].mean(0)


def recurrent(
    shape: Shape,
    classes: int,
    *,
    hidden: int,
    neurons: str,
    repeats: int,
    tau: float,
    tau_adaptation: float,
    beta: float,
    gain: float,
) -> nn.Module:
    """A recurrent layer that receives an image row by row, and a linear readout averaged over the later half of time.

    Args:
        shape: channels, height and width of an image.
        classes: outputs of the readout.
        hidden: number of neurons.
        neurons: as of `RecurrentLayer`.
        repeats: time steps for which a row is shown.
        tau: as of `RecurrentLayer`.
        tau_adaptation: as of `RecurrentLayer`.
        beta: as of `RecurrentLayer`.
        gain: as of `RecurrentLayer`.
    """
    require_counts(of="model.", hidden=hidden, repeats=repeats)
    channels, _, width = shape
    layer = RecurrentLayer(channels * width, hidden, neurons, tau, tau_adaptation, beta, gain)
    return nn.Sequential(Rows(repeats), layer, nn.Linear(hidden, classes), LaterMean())
