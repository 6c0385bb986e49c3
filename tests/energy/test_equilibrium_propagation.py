"""Equilibrium propagation against a twin of loops, and its limits: backpropagation and recurrent backpropagation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from ..rules import cnn, same, weights
from . import twins
from .common import gradients, of_backpropagation

BETAS = {"centered": (1.0, -1.0), "positive": (1.0, 0.0), "negative": (0.0, -1.0)}


@pytest.mark.parametrize("nudging", list(BETAS))
@pytest.mark.parametrize("energy", ["feedforward", "hopfield"])
def test_equals_its_twin_of_loops(energy: str, nudging: str) -> None:
    model, (x, y) = twins.network(), twins.data()
    options = {"free_steps": 5, "nudged_steps": 3, "inference_lr": 0.2, "alternate": False}
    rule = bioopt.EquilibriumPropagation(model, nudging=nudging, beta=0.4, energy=energy, **options)
    found = gradients(rule, model, x, y)
    betas = 0.4 * BETAS[nudging][0], 0.4 * BETAS[nudging][1]
    hopfield = energy == "hopfield"
    expected = twins.equilibrium_propagation(
        twins.layers_of(model), x, y, betas, (5, 3), 0.2, relative=True, hopfield=hopfield
    )
    for a, b in zip(found.values(), [value for pair in expected for value in pair], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    phases = len([beta for beta in betas if beta])
    assert rule.forward_passes == 1 + 3 * phases + 6 * hopfield
    assert [one.nudge for one in rule.relaxations] == [0.0] * hopfield + [beta for beta in betas if beta]


def equilibrium_gradient(model: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Recurrent backpropagation: the gradient of the loss at the free equilibrium of the Hopfield energy.

    The states inside their range move with the weights as the second derivatives of the energy have it; those at a
    bound stay.
    """
    layers = [module for module in model if isinstance(module, nn.Linear)]

    def energy(z: list[Tensor]) -> tuple[Tensor, Tensor]:
        below = [x, *(state.tanh() for state in z)]
        u = [layer(h) for layer, h in zip(layers, below, strict=True)]
        total = sum((s.square().sum() / 2 - (s * v).sum() for s, v in zip(z, u[:-1], strict=True)), torch.zeros(()))
        return total, F.cross_entropy(u[-1], y)

    z = [torch.zeros(len(x), layer.out_features, dtype=x.dtype).requires_grad_() for layer in layers[:-1]]
    for _ in range(400):
        slopes = torch.autograd.grad(energy(z)[0], z)
        z = [(s - 0.3 * g).clamp(1e-6, 1).detach().requires_grad_() for s, g in zip(z, slopes, strict=True)]
    total, loss = energy(z)
    slopes = torch.autograd.grad(total, z, create_graph=True)
    inside = torch.cat([((s > 1e-6) & (s < 1)).flatten() for s in z])
    assert 0 < inside.sum() < len(inside)
    flat = torch.cat([g.flatten() for g in slopes])

    def by_states(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, z, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])[inside]

    rows, of_loss = [by_states(g) for g in flat[inside]], by_states(loss)
    costate = torch.linalg.solve(torch.stack(rows), of_loss)
    params = dict(model.named_parameters())
    found = torch.autograd.grad([loss, flat[inside]], list(params.values()), [torch.ones_like(loss), -costate])
    return dict(zip(params, found, strict=True))


@pytest.mark.parametrize("energy", ["feedforward", "hopfield"])
@pytest.mark.parametrize(("nudging", "order"), [("centered", 2), ("positive", 1), ("negative", 1)])
def test_its_error_falls_with_beta(energy: str, nudging: str, order: int) -> None:
    """The limit is backpropagation, or recurrent backpropagation where layers act on each other."""
    model, (x, y) = twins.network((6, 5, 4, 3)), twins.data(4)
    exact = of_backpropagation(model, x, y) if energy == "feedforward" else equilibrium_gradient(model, x, y)
    errors, betas = [], (0.04, 0.01)
    for beta in betas:
        rule = bioopt.EquilibriumPropagation(
            model, nudging=nudging, beta=beta, energy=energy, free_steps=120, nudged_steps=80, inference_lr=0.5
        )
        found = gradients(rule, model, x, y)
        errors.append(math.sqrt(sum(float((found[name] - exact[name]).square().sum()) for name in exact)))
        rule.close()
    assert errors[0] < 0.05 * math.sqrt(sum(float(g.square().sum()) for g in exact.values()))
    slope = math.log(errors[0] / errors[1]) / math.log(betas[0] / betas[1])
    assert slope == pytest.approx(order, abs=0.1)


def test_relaxed_predicts_from_the_free_equilibrium() -> None:
    model, (x, y) = twins.network(), twins.data()
    rule = bioopt.EquilibriumPropagation(model, energy="hopfield", free_steps=40)
    rule.estimate(lambda: F.cross_entropy(model(x), y, reduction="none"))
    found = rule.relaxed(x)
    assert not found.requires_grad
    assert not torch.allclose(found, model(x))
    losses = rule.estimate(lambda: F.cross_entropy(model(x), y, reduction="none"))
    torch.testing.assert_close(F.cross_entropy(found, y, reduction="none"), losses)  # those of the free phase
    assert model.training
    rule.close()
    plain = bioopt.EquilibriumPropagation(model)
    torch.testing.assert_close(plain.relaxed(x), model(x).detach())


def test_a_plain_prediction_of_a_hopfield_network_is_warned_of_once() -> None:
    model, (x, y) = twins.network(), twins.data()
    rule = bioopt.EquilibriumPropagation(model, energy="hopfield")
    rule.step(lambda: F.cross_entropy(model(x), y))
    rule.relaxed(x)
    model.eval()
    with pytest.warns(UserWarning, match=r"model\(inputs\) is another function: predict by optimizer\.relaxed"):
        model(x)
    model(x)  # silent, or it would be an error here
    rule.close()
    bioopt.EquilibriumPropagation(model).relaxed(x)
    model(x)


def test_relaxed_changes_nothing() -> None:
    model = cnn(dropout=0.5)
    model[3] = nn.AvgPool2d(2)
    rule = bioopt.EquilibriumPropagation(model, energy="hopfield", free_steps=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    rule.relaxed(torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_relaxed_may_stand_between_the_halves_of_a_step() -> None:
    model, (x, y) = twins.network(), twins.data()
    twin = twins.network()
    for one, between in ((model, True), (twin, False)):
        rule = bioopt.EquilibriumPropagation(one, energy="hopfield")
        rule.estimate(lambda m=one: F.cross_entropy(m(x), y))
        if between:
            rule.relaxed(x)
        rule.step()
    assert same(weights(model), weights(twin))


def test_relaxed_needs_the_whole_model() -> None:
    model = twins.network()
    rule = bioopt.EquilibriumPropagation([{"params": model[:3]}, {"params": model[3:]}], energy="hopfield")
    with pytest.raises(RuntimeError, match=r"relaxed\(\) needs a rule that was given the whole model"):
        rule.relaxed(twins.data()[0])


def test_max_pooling_warns_with_the_hopfield_energy() -> None:
    with pytest.warns(UserWarning, match="energy='hopfield' with max pooling.*use average pooling") as caught:
        bioopt.EquilibriumPropagation(cnn(), energy="hopfield")
    assert len(caught) == 1
    bioopt.EquilibriumPropagation(cnn())


def test_alternating_layers_reach_equilibrium_in_fewer_evaluations() -> None:
    model, (x, y) = twins.network((6, 8, 8, 8, 8, 3)), twins.data()
    left = {}
    for alternate, rate in ((True, 1.0), (False, 0.5)):
        rule = bioopt.EquilibriumPropagation(
            model, energy="hopfield", alternate=alternate, inference_lr=rate, free_steps=40
        )
        gradients(rule, model, x, y)
        left[alternate] = sum(rule.relaxations[0].residual[-2:])
        rule.close()
    assert left[True] < left[False]


def test_options_out_of_range() -> None:
    model = twins.network()
    wrongs: list[dict[str, Any]] = [
        {"beta": 0.0}, {"beta": -0.1}, {"free_steps": 0}, {"nudged_steps": 0}, {"nudging": "both"}, {"energy": "ising"}
    ]  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(ValueError, match=rf"EquilibriumPropagation: {next(iter(wrong))}=.* must be"):
            bioopt.EquilibriumPropagation(model, **wrong)
    with pytest.raises(ValueError, match="alternate='even' must be True or False"):
        bioopt.EquilibriumPropagation(model, alternate="even")
