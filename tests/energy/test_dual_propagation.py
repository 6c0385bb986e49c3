"""Dual propagation against a twin of loops, its limit, and the published rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bioopt

from . import twins
from .common import gradients, of_backpropagation


@pytest.mark.parametrize("relative", [True, False])
def test_equals_its_twin_of_loops(relative: bool) -> None:
    model, (x, y) = twins.network(), twins.data()
    rule = bioopt.DualPropagation(model, beta=0.7, steps=5, inference_lr=0.8, relative=relative)
    found = gradients(rule, model, x, y)
    expected = twins.dual_propagation(twins.layers_of(model), x, y, 0.7, 5, 0.8, relative)
    for a, b in zip(found.values(), [value for pair in expected for value in pair], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert rule.forward_passes == 1 + 2 * 5
    assert [one.nudge for one in rule.relaxations] == [0.7]


def test_its_error_falls_with_the_square_of_beta() -> None:
    model, (x, y) = twins.network(), twins.data()
    exact = of_backpropagation(model, x, y)
    errors, betas = [], (0.2, 0.05)
    for beta in betas:
        rule = bioopt.DualPropagation(model, beta=beta, steps=20)
        found = gradients(rule, model, x, y)
        errors.append(math.sqrt(sum(float((found[name] - exact[name]).square().sum()) for name in exact)))
        assert rule.relaxations[0].residual[-1] < 1e-9
        rule.close()
    assert math.log(errors[0] / errors[1]) / math.log(betas[0] / betas[1]) == pytest.approx(2, abs=0.1)


def test_equals_the_published_rule_of_relu_where_no_state_crosses_its_kink() -> None:
    """Whose states are ``relu(W h + b ± V.T d / 2)``, with the difference ``d`` of both states of the layer above."""
    model, (x, y) = twins.network((6, 5, 4, 3)), twins.data()
    relu = nn.Sequential(*(nn.ReLU() if isinstance(m, nn.Tanh) else m for m in model))
    beta = 1e-3
    found = gradients(bioopt.DualPropagation(relu, beta=beta, steps=12, relative=False), relu, x, y)
    (w1, b1), (w2, b2), (w3, b3) = twins.layers_of(relu)
    plus, minus = [x.new_zeros(len(x), 5), x.new_zeros(len(x), 4)], [x.new_zeros(len(x), 5), x.new_zeros(len(x), 4)]
    for _ in range(12):
        h = [(p + m) / 2 for p, m in zip(plus, minus, strict=True)]
        d = [p - m for p, m in zip(plus, minus, strict=True)]
        out = -beta * ((h[1] @ w3.T + b3).softmax(1) - F.one_hot(y, 3))
        pull = [d[1] @ w2 / 2, out @ w3 / 2]
        u = [x @ w1.T + b1, h[0] @ w2.T + b2]
        plus, minus = ([(a + sign * g).relu() for a, g in zip(u, pull, strict=True)] for sign in (1, -1))
    expected = [-(e.T @ below) / (len(x) * beta) for e, below in ((d[0], x), (d[1], h[0]), (out, h[1]))]
    for name, value in zip(("0.weight", "2.weight", "4.weight"), expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*too few for an error to reach")
def test_an_error_goes_one_layer_down_in_each_step() -> None:
    model, (x, y) = twins.network(), twins.data()
    for steps in (1, 2, 3):
        rule = bioopt.DualPropagation(model, steps=steps)
        found = gradients(rule, model, x, y)
        assert [bool(found[f"{i}.weight"].any()) for i in (0, 2, 4, 6)] == [steps >= 3, steps >= 2, True, True]
        rule.close()


def test_states_that_never_rest_are_named_once() -> None:
    model, (x, y) = twins.network(), twins.data()
    rule = bioopt.DualPropagation(model, 0.0, inference_lr=3.5)
    message = "inference_lr=3.5 and beta=0.1 the states move twice as far in step .* try inference_lr=1.8"
    with pytest.warns(UserWarning, match=message):
        rule.step(lambda: F.cross_entropy(model(x), y))
    rule.step(lambda: F.cross_entropy(model(x), y))  # no second warning, which would be an error here


def test_options_out_of_range() -> None:
    model = twins.network()
    wrongs: list[dict[str, Any]] = [{"beta": 0.0}, {"steps": 0}, {"inference_lr": -1.0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=rf"DualPropagation: {next(iter(wrong))}=.* must be"):
            bioopt.DualPropagation(model, **wrong)
