r"""Eligibility traces, by which a backward pass of one time step reaches the past.

A neuron's state after a time step, :math:`h(t)`, depends on its own former state and its input alone. So its derivative
by the weights of the neuron follows from that of the step before,

.. math::
    \epsilon(t) = \frac{\partial h(t)}{\partial h(t - 1)}\, \epsilon(t - 1)
    + \frac{\partial h(t)}{\partial u(t)}\, x(t)^\top,

and the gradient at :math:`h(t - 1)`, where the graph of a time step ends, gives the change of the weights by the past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..core.synapse import Synapse


class Drive(NamedTuple):
    """A layer's firing in this time step."""

    synapse: Synapse
    edge: Any  #: of the layer's output, in the graph
    x: Tensor  #: presynaptic activity, samples × inputs, with a column of ones where there is a bias


class Slopes(NamedTuple):
    """The derivatives of some activity, samples × neurons; ``None`` where it does not depend on them."""

    drives: list[Tensor | None]  #: by the input that each layer gives
    formers: list[Tensor | None]  #: by each former state


class Neurons(NamedTuple):
    """Some neurons in this time step."""

    drives: list[Drive]  #: the layers that give their input
    formers: list[Any]  #: their former states in the graph, which ends there
    before: dict[Synapse, list[Tensor]]  #: traces of the former states for each layer, samples × neurons × inputs each
    slopes: list[Slopes]  #: of each new state

    def advanced(self, slopes: Slopes) -> dict[Synapse, Tensor]:
        """The trace of something with these slopes, for each layer; of one neuron where all are alike."""
        found = {}
        for drive, slope in zip(self.drives, slopes.drives, strict=True):
            terms = [
                _common(of_former).unsqueeze(-1) * trace
                for of_former, trace in zip(slopes.formers, self.before.get(drive.synapse, []), strict=False)
                if of_former is not None
            ]
            if slope is not None:
                terms.append(_common(slope).unsqueeze(-1) * drive.x.unsqueeze(1))
            found[drive.synapse] = sum(terms[1:], terms[0]) if terms else torch.zeros_like(drive.x).unsqueeze(1)
        return found


#: for each layer with feedback: its input, and the traces of that for the layers behind it
Held: TypeAlias = dict[Synapse, tuple[Tensor, dict[Synapse, Tensor]]]


class Memory:
    """What a leaky readout remembers: the inputs of layers with feedback, and their traces, filtered by its leak.

    Attributes:
        readout: the layer whose output the readout's neurons receive, known from the second time step on.
        leaky: whether the readout has a state; ``None``: not known yet.
        inputs: of this time step, as in `held`; with ``None`` for traces that are not known.
    """

    def __init__(self) -> None:
        self.readout: Synapse | None = None
        self.leaky: bool | None = None
        self.inputs: dict[Synapse, tuple[Tensor, dict[Synapse, Tensor] | None]] = {}
        self._held: Held = {}

    def held_by(self, synapses: tuple[Synapse, ...]) -> Held:
        """The sums over the past before this time step, if the neurons behind these layers are the readout's."""
        return self._held if self.readout in synapses else {}

    def advance(self, rule: str, readout: Synapse, neurons: Neurons | None) -> None:
        """End a time step, with the neurons that follow the readout."""
        self.readout, self.leaky = readout, neurons is not None
        inputs, self.inputs = self.inputs, {}
        if neurons is None:
            return
        leak, gain = self._rates(rule, neurons)
        held: Held = {}
        for receiver, (x, traces) in inputs.items():
            if traces is None:
                raise RuntimeError(
                    f"{rule}: the readout '{readout.name}' has a state, so layer '{receiver.name}' must receive the "
                    "output of neurons itself: call backward() once for the whole sequence (online=False)"
                )
            former, sums = self._held.get(receiver, (torch.zeros_like(x), {}))
            held[receiver] = (
                leak * former + gain * x,
                {
                    synapse: gain * trace + (leak * sums[synapse] if synapse in sums else 0.0)
                    for synapse, trace in traces.items()
                },
            )
        self._held = held

    def _rates(self, rule: str, neurons: Neurons) -> tuple[float, float]:
        """The leak of the readout, and the factor of its input."""
        slopes = neurons.slopes[0]
        given = [slopes.drives[0], *slopes.formers]
        rates = [float(slope.flatten()[0]) for slope in given if slope is not None]
        alike = all(bool((slope == slope.flatten()[0]).all()) for slope in given if slope is not None)
        if len(neurons.slopes) > 1 or len(neurons.drives) > 1 or not alike or slopes.drives[0] is None:
            raise RuntimeError(
                f"{rule}: the readout '{neurons.drives[0].synapse.name}' must have one state, linear and with the same "
                "leak for all of its units, such as bioopt.nn.LeakyRate(activation=None)"
            )
        return (rates[1] if len(rates) > 1 else 0.0), rates[0]


def _common(slope: Tensor) -> Tensor:
    """The slope of one neuron, if it is that of all."""
    first = slope[:, :1]
    return first if bool((slope == first).all()) else slope


class _Past(torch.autograd.Function):
    """Passes a former state on; its gradient goes to the weights that acted on it, by their traces."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, gradients: Callable[[Tensor], list[Tensor | None]], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return state.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients(grads[0])


def ending_in_the_past(
    state: Tensor, products: Callable[[Tensor], Iterable[tuple[Synapse, Tensor, Tensor]]], synapses: Iterable[Synapse]
) -> Tensor:
    """A former state, from which a backward pass ends in the weights of layers.

    Args:
        state: without a graph.
        products: from the gradient at the state to the layers that acted on it, each with a signal of its neurons and
            the trace that this meets.
        synapses: these layers.
    """
    params = list(dict.fromkeys(p for synapse in synapses for p in synapse.parameters()))

    def gradients(gradient: Tensor) -> list[Tensor | None]:
        total: dict[Tensor, Tensor] = {}
        for synapse, signal, trace in products(gradient):
            signal = signal.reshape(-1, signal.shape[-1]).to(trace.dtype)
            alike = trace.shape[1] == 1
            product = signal.T @ trace[:, 0] if alike else torch.einsum("nj,nji->ji", signal, trace)
            parts = [(synapse.weight, product[:, : synapse.weight.shape[1]])]
            if synapse.bias is not None:
                parts.append((synapse.bias, product[:, -1]))
            for p, part in parts:
                total[p] = total[p] + part if p in total else part
        return [total[p].to(p.dtype) if p in total else None for p in params]

    passed: Tensor = _Past.apply(state, gradients, *params)
    return passed
