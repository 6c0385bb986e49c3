"""What a rule in time sends to synapses beside what backpropagation would, and the states of neurons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt


def cosines(rule: bioopt.LearningRule, closure: Callable[[], Tensor], names: Iterable[str]) -> dict[str, float]:
    """The cosine of the angle between a rule's estimate and the gradient, of these parameters."""
    found = bioopt.diagnose(rule, closure, 2)
    return {name: found[name]["cosine"] for name in names}


def cosine_per_step(
    network: nn.Module, rule: bioopt.LearningRule, layer: nn.Module, inputs: Tensor, labels: Tensor
) -> Tensor:
    """The cosine of what reaches the neurons' input currents by the rule, and by backpropagation, in each time step.

    Both are the derivative of the cross-entropy by the output of ``layer``, steps × samples × neurons, in one pass
    through the same network. NaN where either is zero.

    Args:
        network: that the rule watches.
        rule: which has learned from all passes before.
        layer: of the network, whose output is the current of all time steps.
        inputs: of the network.
        labels: of the samples.
    """
    network.eval()
    with torch.no_grad():
        network(inputs)  # so that what a network keeps of its last pass has no graph, and can be copied
    free = copy.deepcopy(network)  # a copy has no hooks
    network.train()  # rules watch no evaluation
    place = next(name for name, module in network.named_modules() if module is layer)
    own = _at(layer, network, inputs, labels)
    rule.discard()
    true = _at(free.get_submodule(place), free, inputs, labels)
    lengths = own.norm(dim=(1, 2)) * true.norm(dim=(1, 2))
    return (own * true).sum((1, 2)) / torch.where(lengths > 0, lengths, torch.nan)


def _at(layer: nn.Module, network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The derivative of the mean cross-entropy by the output of a layer."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.enable_grad():
            (found,) = torch.autograd.grad(F.cross_entropy(network(inputs), labels), outputs)
    finally:
        handle.remove()
    return found


@contextmanager
def states_of(neurons: nn.Module) -> Iterator[list[Any]]:
    """The states of neurons after each time step of the passes in a ``with`` block."""
    states: list[Any] = []
    handle = neurons.register_forward_hook(lambda module, args, output: states.append(output[1]))
    try:
        yield states
    finally:
        handle.remove()
