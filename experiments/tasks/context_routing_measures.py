"""What `context_routing` measures: multiply-adds, time, and the information that pathways carry about contexts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bioopt.nn import Gate

from .. import data


def gate_of(model: nn.Module) -> Gate:
    """The gate of a network that begins with one."""
    gate: Gate = model[0].gate  # type: ignore[index]
    return gate


def opened(model: nn.Module) -> Tensor:
    """How far a network opened its pathways for each of the last samples."""
    gates = gate_of(model).gates
    assert gates is not None
    return gates


def weights(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def synapses(model: nn.Module) -> list[nn.Module]:
    """The layers with a weight matrix, including frozen ones."""
    return [m for m in model.modules() if isinstance(w := getattr(m, "weight", None), nn.Parameter) and w.ndim > 1]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Count the multiply-adds of a model's layers meanwhile: for each output, one per input."""
    count = [0]

    def add(layer: nn.Module, _: Any, output: Tensor) -> None:
        count[0] += output.numel() * layer.weight[0].numel()  # type: ignore[index]

    handles = [layer.register_forward_hook(add) for layer in synapses(model)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def information(gates: Tensor) -> float:
    """Mutual information of context and pathway in bits, where gates, contexts × pathways, are how often it is taken.

    Contexts have equally many samples; a gate counts by its share of those open.
    """
    gates = gates.double()
    joint = gates / gates.sum(1, keepdim=True) / len(gates)
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    return float((joint * (joint / apart).log2()).nansum().clamp(min=0))


def guessed(images: data.Images, contexts: int) -> float:
    """The highest accuracy possible for who knows the class, but not the context."""
    names = images.test_labels.view(contexts, -1)
    return float((names.unsqueeze(0) == names.unsqueeze(1)).sum(1).amax(0).float().mean() / contexts)


@torch.no_grad()
def times(networks: list[nn.Module], inputs: Tensor, repeats: int = 25) -> list[float]:
    """The shortest time in seconds that each network takes for these inputs, of several in turn."""
    took = [[math.inf] for _ in networks]
    for _ in range(repeats):
        for network, each in zip(networks, took, strict=True):
            begin = time.perf_counter()
            network(inputs)
            if inputs.is_cuda:
                torch.cuda.synchronize()
            each.append(time.perf_counter() - begin)
    return [min(each) for each in took]
