"""Steps of a descent by one kernel: those of torch's loop, whatever the order of numbers in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bioopt
from bioopt.core.steps import by_one_kernel

from ..rules import batch, cnn, per_sample, weights

LAST = torch.channels_last


def parameters(last: bool, gradients_last: bool) -> list[nn.Parameter]:
    """A convolution and a matrix, whose gradients lie in memory as they do or not."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 2, 2), (5, 7))
    found = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        if p.ndim == 4:
            p.data = p.data.to(memory_format=LAST) if last else p.data
            grad = grad.to(memory_format=LAST) if gradients_last else grad
        elif gradients_last:
            grad = grad.T.contiguous().T
        p.grad = grad
        found.append(p)
    return found


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("gradients_last", [True, False])
@pytest.mark.parametrize("rule", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_it_steps_as_the_loop_does(rule: Any, last: bool, gradients_last: bool) -> None:
    results: list[list[Tensor]] = []
    for one_kernel in (True, False):
        params = parameters(last, gradients_last)
        optimizer = rule(params, lr=0.1, weight_decay=0.01)
        own = optimizer.param_groups
        for _ in range(3):
            if one_kernel:
                optimizer.param_groups = by_one_kernel(optimizer, own)
                assert optimizer.param_groups[0]["fused"]
            optimizer.step()
        assert not own[0].get("fused")
        results.append([p.detach().clone() for p in params])
    torch.testing.assert_close(*results)


def test_running_values_in_another_order_are_left_to_the_loop() -> None:
    """Those of a checkpoint of a model in the ordinary memory format."""
    optimizer = torch.optim.Adam(parameters(False, False), lr=0.1)
    optimizer.step()
    again = torch.optim.Adam(parameters(True, True), lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert by_one_kernel(again, again.param_groups)[0]["fused"] is False


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}, {"differentiable": True}])
def test_a_choice_is_kept(options: dict[str, bool]) -> None:
    optimizer = torch.optim.Adam(parameters(False, False), lr=0.1, **options)
    assert by_one_kernel(optimizer, optimizer.param_groups)[0] is optimizer.param_groups[0]
    other = torch.optim.SGD(parameters(False, False), lr=0.1)
    assert by_one_kernel(other, other.param_groups) is other.param_groups


@pytest.mark.parametrize("rule", [bioopt.FeedbackAlignment, bioopt.LocalLoss, bioopt.NodePerturbation])
def test_a_rule_in_channels_last_steps_as_in_a_loop(rule: Any) -> None:
    results = []
    for options in ({}, {"fused": False}, {"fused": True}):
        model = cnn(dropout=0.0).double().to(memory_format=LAST)
        optimizer = rule(model, **options)
        for i in range(3):
            x, y = batch(i)
            optimizer.step(per_sample(optimizer, model, x.double().to(memory_format=LAST), y))
        results.append(weights(model))
    assert not torch.equal(results[0][0], weights(cnn(dropout=0.0).double())[0])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-9, atol=1e-9)
