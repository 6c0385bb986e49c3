"""Neurons with a time: their equations, surrogate derivatives, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bioopt.nn import ALIF, LIF, ALIFState, LeakyRate


def unrolled(neurons: Any, us: Tensor) -> tuple[Tensor, Any]:
    state, zs = None, []
    for u in us:
        z, state = neurons(u, state)
        zs.append(z)
    return torch.stack(zs), state


def test_lif_is_its_equation() -> None:
    us = torch.rand(30, 4, dtype=torch.float64)
    found, v = unrolled(LIF(5.0, threshold=1.2), us)
    assert 0 < found.mean() < 1
    for n in range(4):
        potential, spike = 0.0, 0.0
        for t in range(30):
            potential = math.exp(-1 / 5) * potential + us[t, n].item() - 1.2 * spike
            spike = float(potential > 1.2)
            assert found[t, n] == spike
        assert v[n].item() == pytest.approx(potential, abs=1e-12)


def test_alif_is_its_equation_and_adapts() -> None:
    us = torch.full((200, 2), 0.4, dtype=torch.float64)
    found, (v, a) = unrolled(ALIF(5.0, tau_adaptation=50.0, beta=torch.tensor([0.3, 0.0])), us)
    for n, beta in enumerate((float(torch.tensor(0.3)), 0.0)):
        potential, adaptation, spike = 0.0, 0.0, 0.0
        for t in range(200):
            adaptation = math.exp(-1 / 50) * adaptation + spike
            potential = math.exp(-1 / 5) * potential + 0.4 - spike
            spike = float(potential > 1 + beta * adaptation)
            assert found[t, n] == spike
        assert (v[n].item(), a[n].item()) == pytest.approx((potential, adaptation), abs=1e-9)
    assert found[100:, 0].sum() < 0.7 * found[100:, 1].sum()  # without adaptation it is a LIF neuron
    assert torch.equal(found[:, 1], unrolled(LIF(5.0), us)[0][:, 1])


def test_the_rate_unit_is_its_equation() -> None:
    us = torch.randn(6, 3, dtype=torch.float64)
    for activation in (torch.tanh, None):
        found, h = unrolled(LeakyRate(4.0, activation), us)
        alpha = math.exp(-1 / 4)
        wanted = sum(alpha ** (5 - t) * (1 - alpha) * us[t] for t in range(6))
        torch.testing.assert_close(h, wanted)
        torch.testing.assert_close(found[-1], wanted if activation is None else wanted.tanh())


def test_the_surrogate_derivative_is_a_triangle() -> None:
    u = torch.tensor([-1.0, 0.5, 1.5, 2.0, 2.5, 4.5], requires_grad=True)
    LIF(threshold=2.0, dampening=0.6)(u)[0].sum().backward()
    assert u.grad is not None
    torch.testing.assert_close(u.grad, 0.3 * torch.tensor([0.0, 0.25, 0.75, 1.0, 0.75, 0.0]))


@pytest.mark.parametrize("neurons", [LIF(5.0), ALIF(5.0, tau_adaptation=20.0, beta=0.5)])
def test_no_gradient_passes_the_reset(neurons: Any) -> None:
    """The derivatives of a state by the former one are those of e-prop."""
    v = torch.tensor([0.9, 1.3, 3.5], requires_grad=True)
    a = torch.tensor([0.2, 0.4, 1.0], requires_grad=True)
    is_alif = type(neurons) is ALIF
    _, state = neurons(torch.zeros(3), ALIFState(v, a) if is_alif else v)
    new_v = state.v if is_alif else state
    (slope,) = torch.autograd.grad(new_v.sum(), v, retain_graph=True)
    torch.testing.assert_close(slope, torch.full((3,), math.exp(-1 / 5)))
    if is_alif:
        psi = 0.3 * (1 - (v - 1 - 0.5 * a).abs()).clamp(min=0)
        by_v, by_a = torch.autograd.grad(state.a.sum(), (v, a))
        torch.testing.assert_close(by_v, psi)
        torch.testing.assert_close(by_a, math.exp(-1 / 20) - 0.5 * psi)


def test_bad_input_is_named() -> None:
    for kind in (LIF, ALIF, LeakyRate):
        for tau in (0, -1.0, "slow"):
            with pytest.raises(ValueError, match=f"{kind.__name__}: tau=.* must be a number > 0"):
                kind(tau)
        _, state = kind()(torch.zeros(3, 4))
        with pytest.raises(ValueError, match=rf"{kind.__name__}: the state has the shape \(3, 4\), .* state=None"):
            kind()(torch.zeros(2, 4), state)
    with pytest.raises(ValueError, match="LIF: threshold=0 must be a finite number > 0"):
        LIF(threshold=0)
    with pytest.raises(ValueError, match=r"ALIF: beta=-1\.0 must be finite numbers >= 0"):
        ALIF(beta=-1.0)
    with pytest.raises(ValueError, match="ALIF: tau_adaptation=0 must be"):
        ALIF(tau_adaptation=0)
    assert repr(LeakyRate(3, None)) == "LeakyRate(tau=3, activation=None)"
    assert "tanh" in repr(LeakyRate())
    assert "beta" in ALIF().state_dict()
