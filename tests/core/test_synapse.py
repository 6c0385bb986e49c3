"""Layers of a user's own as synapses: registered, and checked as they first fire."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from ..rules import make, published, same, weights


def test_a_user_registers_a_layer_of_their_own() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight, self.bias)

    model = nn.Sequential(Scaled(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="layer '0' of type Scaled"):
        published.Hebbian(model, 0.1)
    with pytest.raises(ValueError, match="channel_dim=1 must be negative"):
        bioopt.register_synapse(Scaled, channel_dim=1)
    bioopt.register_synapse(Scaled, channel_dim=-1)
    before = weights(model)
    optimizer = published.Hebbian(model, 0.1, readout=None)
    optimizer.step(lambda: model(torch.randn(5, 4)).sum())
    assert not torch.equal(before[0], model[0].weight)


class Transposed(nn.Module):
    """``Conv1D`` of transformers: inputs first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Squashed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input))


class Normalised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight, dim=1), self.bias)


class Masked(nn.Linear):
    """Half of the connections, other ones each time, and a counter."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.count += 1
        return F.linear(input, self.weight * (torch.rand_like(self.weight) < 0.5), self.bias)


class Shared(nn.Conv2d):
    """A convolution by another name."""


class Standardised(nn.Linear):
    """Weight standardisation."""

    def forward(self, input: Tensor) -> Tensor:
        mean, std = self.weight.mean(1, keepdim=True), self.weight.std(1, keepdim=True)
        return F.linear(input, (self.weight - mean) / std, self.bias)


@pytest.mark.parametrize("kind", [Transposed, Squashed, Normalised, Standardised])
@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.NodePerturbation])
def test_a_registered_layer_that_is_not_affine_is_refused_as_it_first_fires(kind: type, rule: type) -> None:
    torch.manual_seed(0)
    bioopt.register_synapse(kind, channel_dim=-1)
    model = nn.Sequential(kind(*(6,) if kind is Transposed else (6, 6)), nn.ReLU(), nn.Linear(6, 3))
    optimizer = make(rule, model)
    before = weights(model)
    with pytest.raises(RuntimeError, match=rf"layer '0' of type {kind.__name__} was registered as u = W x \+ b"):
        optimizer.step(lambda: F.cross_entropy(model(torch.randn(4, 6)), torch.arange(4) % 3, reduction="none"))
    assert same(before, weights(model))


def test_registered_layers_that_are_affine_are_taken_and_left_as_they_are() -> None:
    bioopt.register_synapse(Masked, channel_dim=-1)
    bioopt.register_synapse(Shared, channel_dim=-3)
    torch.manual_seed(0)
    model = nn.Sequential(Shared(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), Masked(48, 6), nn.Linear(6, 3))
    optimizer = published.Hebbian(model, 0.1)
    x, y = torch.randn(4, 2, 4, 4), torch.arange(4) % 3
    for i in (1, 2):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert model[3].count == i
    assert optimizer._recorder._verified == {model[0], model[3]}


def test_a_wrong_dimension_of_neurons_is_found() -> None:
    class Wide(nn.Conv2d):
        pass

    bioopt.register_synapse(Wide, channel_dim=-1)
    model = nn.Sequential(Wide(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    optimizer = published.Oja(model, 0.1)
    with pytest.raises(RuntimeError, match=r"neurons along dimension -1 .* but it computes something else"):
        optimizer.step(lambda: F.cross_entropy(model(torch.randn(4, 2, 4, 4)), torch.arange(4) % 3))
