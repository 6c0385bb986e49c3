"""Predictive coding against a twin of loops, against backpropagation, and what a layer's update depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from experiments import models

from ..rules import cnn
from . import twins
from .common import gradients, of_backpropagation, residual


def compared(model: nn.Sequential, grads: dict[str, Tensor], expected: twins.Layers) -> None:
    flat = [value for pair in expected for value in pair]
    for a, b in zip(grads.values(), flat, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("mode", ["state", "incremental", "error"])
def test_equals_its_twin_of_loops(mode: str, relative: bool) -> None:
    model, (x, y) = twins.network(), twins.data()
    rule = bioopt.PredictiveCoding(
        model, 0.05, steps=4, inference_lr=0.2, mode=mode, relative=relative, descent=torch.optim.SGD
    )
    layers = twins.layers_of(model)
    if mode == "error":
        expected = twins.with_errors(layers, x, y, 4, 0.2, relative)
    else:
        expected = twins.predictive_coding(layers, x, y, 4, 0.2, relative, 0.05 if mode == "incremental" else None)
    compared(model, gradients(rule, model, x, y), expected)


@pytest.mark.filterwarnings("ignore:.*too few for an error to reach")
def test_incremental_with_sgd_is_a_step_of_all_its_updates() -> None:
    model, (x, y) = twins.network(), twins.data()
    options: Any = {"descent": torch.optim.SGD, "centre_inputs": False}
    rule = bioopt.PredictiveCoding(model, 0.05, steps=3, mode="incremental", **options)
    expected = twins.predictive_coding(twins.layers_of(model), x, y, 3, 0.1, True, 0.05)
    before = twins.layers_of(model)
    rule.step(lambda: F.cross_entropy(model(x), y))
    for (w, b), (v, c), (g, d) in zip(twins.layers_of(model), before, expected, strict=True):
        torch.testing.assert_close(w, v - 0.05 * g)
        torch.testing.assert_close(b, c - 0.05 * d)


@pytest.mark.parametrize("make", [cnn, residual])
def test_fixed_predictions_give_backpropagation(make: Any) -> None:
    """So they show that gradients are right, and nothing about predictive coding."""
    model = make(dropout=0.2).double()
    x, y = torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    expected = of_backpropagation(model, x, y)
    rule = bioopt.PredictiveCoding(model, fixed_prediction=True, steps=6)
    found = gradients(rule, model, x, y)
    assert rule.forward_passes == 1
    assert rule.relaxations[0].residual[-1] < 1e-12  # as many steps as layers, at a rate of 1
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-8, atol=1e-12)


def test_small_errors_approach_backpropagation() -> None:
    """With its loss scaled down, relaxed predictive coding is backpropagation."""
    model, (x, y) = twins.network(), twins.data()
    expected = of_backpropagation(model, x, y)
    for mode in ("state", "error"):
        rule = bioopt.PredictiveCoding(model, steps=100, inference_lr=0.3, mode=mode)
        rule.estimate(lambda: 1e-6 * F.cross_entropy(model(x), y))
        for name, p in model.named_parameters():
            assert F.cosine_similarity(p.grad.flatten(), expected[name].flatten(), 0) > 0.999999
            assert p.grad.norm() / expected[name].norm() == pytest.approx(1e-6, rel=1e-3)
        rule.close()


@pytest.mark.filterwarnings("ignore:.*too few for an error to reach")
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_error_goes_one_layer_down_in_each_step(steps: int) -> None:
    """Three layers have states: the update of one does not depend on the labels until the error has arrived there."""
    model, (x, y) = twins.network(), twins.data()
    rule = bioopt.PredictiveCoding(model, steps=steps)
    one, other = gradients(rule, model, x, y), gradients(rule, model, x, (y + 1) % 3)
    changed = [not torch.equal(one[f"{i}.weight"], other[f"{i}.weight"]) for i in (0, 2, 4, 6)]
    assert changed == [steps >= 3, steps >= 2, True, True]


def test_passes_are_those_of_the_mode() -> None:
    model, (x, y) = twins.network(), twins.data()
    for options, passes in (
        ({}, 6),
        ({"mode": "error"}, 6),
        ({"mode": "incremental"}, 5),
        ({"fixed_prediction": True}, 1),
    ):
        rule: Any = bioopt.PredictiveCoding(model, steps=5, **options)
        gradients(rule, model, x, y)
        assert rule.forward_passes == passes
        assert [len(one.energy) for one in rule.relaxations] == [5]
        rule.close()


# -- depth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descent", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("mode", ["state", "error"])
def test_mu_pc_is_learning_of_weights_with_premultipliers(mode: str, descent: Any) -> None:
    """The twin has layers ``a (W h + B)``, and its optimizer steps along W and B."""
    model, (x, y) = twins.network(), twins.data()
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
    rule = bioopt.PredictiveCoding(model, steps=3, mode=mode, mu_pc=True, descent=descent, **options)
    effective = twins.layers_of(model)
    fan_in = [w.shape[1] for w, _ in effective]
    a = [fan_in[0] ** -0.5, *((n * 4) ** -0.5 for n in fan_in[1:-1]), 1 / fan_in[-1]]
    own = [(w / s, b / s) for (w, b), s in zip(effective, a, strict=True)]
    optimizer = descent([value for pair in own for value in pair], **options)
    for _ in range(3):
        rule.step(lambda: F.cross_entropy(model(x), y))
        layers = [(w * s, b * s) for (w, b), s in zip(own, a, strict=True)]
        find = twins.with_errors if mode == "error" else twins.predictive_coding
        grads = find(layers, x, y, 3, 0.3 / 4, True)
        for pair, gradients_of_pair, s in zip(own, grads, a, strict=True):
            for value, gradient in zip(pair, gradients_of_pair, strict=True):
                value.grad = s * gradient
        optimizer.step()
    for (w, b), (v, c), s in zip(twins.layers_of(model), own, a, strict=True):
        torch.testing.assert_close(w, s * v, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(b, s * c, rtol=1e-8, atol=1e-12)


def change_by_a_step(depth: int, **options: Any) -> float:
    """Of the outputs of a residual network whose activity does not grow with depth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.deep((1, 2, 3), 3, width=16, depth=depth, weights="mu_p").double()
    x, y = twins.data()
    before = model(x).detach()
    rule = bioopt.PredictiveCoding(model, steps=4, centre_inputs=False, **options)
    rule.step(lambda: F.cross_entropy(model(x), y))
    return float((model(x).detach() - before).norm())


@pytest.mark.parametrize(("descent", "mode"), [(torch.optim.SGD, "error"), (torch.optim.Adam, "state")])
def test_with_mu_pc_a_step_changes_the_output_by_as_much_in_a_deep_network(descent: Any, mode: str) -> None:
    plain, scaled = (
        change_by_a_step(48, mode=mode, mu_pc=mu_pc, descent=descent)
        / change_by_a_step(4, mode=mode, mu_pc=mu_pc, descent=descent)
        for mu_pc in (False, True)
    )
    assert plain > 2.5
    assert 0.7 < scaled < 1.5


def test_mu_pc_leaves_alone_what_does_not_move() -> None:
    """Parameters at a rate of 0 are the same bit for bit; those of no layer learn too."""
    model = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))
    x, y = twins.data()
    before = [p.detach().clone() for p in model.parameters()]
    rule = bioopt.PredictiveCoding(model, 0.0, mu_pc=True)
    rule.step(lambda: F.cross_entropy(model(x.float()), y))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    rule.param_groups[0]["lr"] = 0.1
    rule.step(lambda: F.cross_entropy(model(x.float()), y))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_options_out_of_range() -> None:
    model = twins.network()
    with pytest.raises(ValueError, match="mu_pc=2 must be True or False"):
        bioopt.PredictiveCoding(model, mu_pc=2)
    for other in ({"mode": "incremental"}, {"fixed_prediction": True}):
        with pytest.raises(ValueError, match=r"mu_pc=True needs mode='state' or mode='error'.*not (mode|fixed)"):
            bioopt.PredictiveCoding(model, mu_pc=True, **other)
    for wrong in ({"steps": 0}, {"inference_lr": 0.0}, {"mode": "states"}):
        with pytest.raises(ValueError, match=rf"PredictiveCoding: {next(iter(wrong))}=.* must be"):
            bioopt.PredictiveCoding(model, **wrong)
    with pytest.raises(ValueError, match="fixed_prediction=1 must be True or False"):
        bioopt.PredictiveCoding(model, fixed_prediction=1)
    with pytest.raises(ValueError, match="fixed_prediction=True needs mode='state', not mode='error'"):
        bioopt.PredictiveCoding(model, fixed_prediction=True, mode="error")
