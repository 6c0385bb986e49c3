"""The base of feedback rules, by throw-away rules whose feedback is known."""

from __future__ import annotations

import typing

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioopt
from bioopt import FeedbackRule, Synapse

from ..rules import batch, cnn, ordinary, per_sample, same, weights


@typing.final
class Backpropagation(FeedbackRule):
    """The error returns by the weights by which activity went up."""

    def feedback(self, synapse: Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        return synapse.transpose(synapse.weight, g, x_shape)


@typing.final
class Severed(FeedbackRule):
    """No error returns."""

    def feedback(self, synapse: Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        return g.new_zeros(x_shape)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = x + checkpoint(self.block, x, use_reentrant=False)
        return self.head(torch.tanh(self.block(x)).mean((2, 3)))  # a layer that fires twice


def test_with_the_layers_own_weights_it_is_backpropagation() -> None:
    for build in (lambda: cnn(dropout=0.0), Residual):
        torch.manual_seed(0)
        model = build()
        torch.manual_seed(0)
        twin = build()
        optimizer = Backpropagation(model, 0.1, momentum=0.9, centre_inputs=False)
        plain = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
        for i in range(3):
            optimizer.step(ordinary(optimizer, model, *batch(i)))
            plain.step(ordinary(plain, twin, *batch(i)))
            assert same(weights(model), weights(twin))


def test_without_feedback_the_last_layer_alone_learns() -> None:
    model, twin = cnn(dropout=0.0), cnn(dropout=0.0)
    optimizer, before = Severed(model, 0.1), weights(model)
    optimizer.step(per_sample(optimizer, model, *batch()))
    F.cross_entropy(twin(batch()[0]), batch()[1]).backward()
    assert same(before[:-2], weights(model)[:-2])
    assert torch.equal(model[-1].weight.grad, twin[-1].weight.grad)


def test_the_classic_loop_and_the_closure_agree() -> None:
    results = []
    for form in ("classic", "ordinary", "per sample"):
        model = cnn(dropout=0.0)
        optimizer = Backpropagation(model, 0.1)
        for i in range(2):
            if form == "classic":
                optimizer.zero_grad()
                F.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
                optimizer.step()
            else:
                make = ordinary if form == "ordinary" else per_sample
                optimizer.step(make(optimizer, model, *batch(i)))
        results.append(weights(model))
    assert same(results[0], results[1])
    for a, b in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_named() -> None:
    model = cnn()
    optimizer, before = Severed(model, 0.1), weights(model)
    with pytest.raises(RuntimeError, match="Severed: no synapse has fired since the last step"):
        optimizer.step()
    model(batch()[0])
    with pytest.raises(RuntimeError, match=r"Severed learns from the loss, .*call loss\.backward\(\) before step"):
        optimizer.step()
    with pytest.raises(bioopt.Diverged, match="Severed: the loss is nan"):
        optimizer.step(lambda: F.cross_entropy(model(batch()[0]), batch()[1]) * float("nan"))
    assert same(before, weights(model))
    with pytest.raises(TypeError, match="needs the model"):
        Severed(model.parameters(), 0.1)


def test_it_shares_the_pass_of_mixed() -> None:
    model, twin = cnn(dropout=0.0), cnn(dropout=0.0)
    mixed = bioopt.Mixed(
        Backpropagation(model[4:], 0.1, centre_inputs=False), torch.optim.SGD(model[:4].parameters(), 0.1)
    )
    plain = torch.optim.SGD(twin.parameters(), 0.1)
    mixed.step(ordinary(mixed, model, *batch()))
    plain.step(ordinary(plain, twin, *batch()))
    assert mixed.forward_passes == 1
    assert same(weights(model), weights(twin))


def test_a_readout_apart_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Backpropagation: readout='delta' is not possible.* param group of its own"):
        Backpropagation(cnn(), 0.1, readout="delta")  # type: ignore[call-arg]
