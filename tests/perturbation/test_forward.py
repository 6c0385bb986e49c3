"""Forward gradients, against slow twins and against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioopt
from bioopt.core.noise import NoiseSource

from ..rules import mlp, same, weights
from .common import X, Y, deviation, estimate, gradient, losses_of, sizes


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("relative", [True, False])
def test_forward_gradient_of_weights_equals_its_twin(samples: int, relative: bool) -> None:
    """The gradient, times the direction, times the direction."""
    model = mlp()
    optimizer = bioopt.ForwardGradient(model.parameters(), 0.1, samples=samples, relative=relative, seed=4)
    for step in range(2):
        scales = sizes([model[0], model[2]], relative)
        true = gradient(model)
        wanted = [torch.zeros_like(p) for p in true]
        for sample in range(samples):
            stream = NoiseSource().stream(torch.device("cpu"), 4, step, sample)
            z = [torch.randn(p.shape, generator=stream, dtype=p.dtype) for p in true]
            slope = sum((g * d).sum().item() * s for g, d, s in zip(true, z, scales, strict=True))
            for total, d, s in zip(wanted, z, scales, strict=True):
                total += slope * d / s / samples
        for a, b in zip(wanted, estimate(optimizer, model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("credit", ["sample", "global"])
@pytest.mark.parametrize("relative", [True, False])
def test_forward_gradient_of_activities_equals_its_twin(samples: int, credit: str, relative: bool) -> None:
    """Each sample's gradient at each layer's activity, times the direction there; one synapse at a time."""
    model, options = mlp(), {"samples": samples, "space": "activities", "credit": credit, "relative": relative}
    optimizer = bioopt.ForwardGradient(model, 0.1, seed=2, **options)
    first, second = model[0], model[2]
    u = [first(X)]
    hidden = torch.tanh(u[0])
    u.append(second(hidden))
    scales = [deviation(v) if relative else 1.0 for v in u]
    slopes_at = torch.autograd.grad(F.cross_entropy(u[1], Y, reduction="sum"), u)
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for sample in range(samples):
        stream = NoiseSource().stream(torch.device("cpu"), 2, 0, sample)
        xi = [torch.randn(8, n, generator=stream, dtype=torch.float64) for n in (5, 4)]
        parts = list(zip(slopes_at, xi, scales, strict=True))
        slopes = [sum((g[b] * z[b]).sum().item() * s for g, z, s in parts) for b in range(8)]
        for b in range(8):
            credited = slopes[b] if credit == "sample" else sum(slopes)
            for i, (x, z) in enumerate(((X, xi[0]), (hidden.detach(), xi[1]))):
                for k in range(z.shape[1]):
                    wanted[2 * i][k] += credited * z[b, k] / scales[i] * x[b] / (8 * samples)
                    wanted[2 * i + 1][k] += credited * z[b, k] / scales[i] / (8 * samples)
    for a, b in zip(wanted, estimate(optimizer, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class NoForwardDerivative(torch.autograd.Function):
    """The hyperbolic tangent, without one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoForwardDerivative.apply(x)


@pytest.mark.parametrize("space", ["weights", "activities"])
def test_forward_gradient_measures_slopes_where_an_operator_has_none(space: str) -> None:
    plain = mlp(sizes=(6, 5, 4))
    norm = nn.BatchNorm1d(6, affine=False).double()
    model = nn.Sequential(norm, plain[0], Opaque(), plain[2])
    exact = nn.Sequential(nn.BatchNorm1d(6, affine=False).double(), plain[0], nn.Tanh(), plain[2])
    wanted = estimate(bioopt.ForwardGradient(exact, 0.1, samples=2, space=space), exact)
    optimizer = bioopt.ForwardGradient(model, 0.1, samples=2, space=space)
    with pytest.warns(UserWarning, match=r"no forward derivative here .*central differences of difference=0\.001"):
        got = estimate(optimizer, model)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert norm.num_batches_tracked == 1  # statistics advance once
    torch.testing.assert_close(norm.running_mean, 0.1 * X.mean(0))
    before = weights(model)
    estimate(optimizer, model)  # one warning
    assert same(before, weights(model))


def test_forward_gradient_needs_a_loss_with_a_slope() -> None:
    model = mlp()
    optimizer = bioopt.ForwardGradient(model, 0.1, space="weights")
    with pytest.warns(UserWarning, match="the closure returned a loss without one"):
        got = estimate(optimizer, model, lambda: losses_of(model).mean().item())
    for a, b in zip(estimate(bioopt.ForwardGradient(model, 0.1, space="weights"), model), got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="space='dual' must be one of weights, activities"):
        bioopt.ForwardGradient(model, 0.1, space="dual")
    with pytest.raises(TypeError, match="needs the model"):
        bioopt.ForwardGradient(model.parameters(), 0.1, space="activities")


@pytest.mark.parametrize("space", ["weights", "activities"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing_drops_no_tangent(space: str, reentrant: bool) -> None:
    model = mlp(sizes=(6, 5, 5, 4))
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 4
    results = []
    for checkpointed in (False, True):

        def closure(checkpointed: bool = checkpointed) -> Tensor:
            hidden = checkpoint(model[:4], x, use_reentrant=reentrant) if checkpointed else model[:4](x)
            return F.cross_entropy(model[4](hidden), y, reduction="none")

        optimizer = bioopt.ForwardGradient(model, 0.1, samples=2, space=space, difference=1e-5)
        if checkpointed and reentrant:
            with pytest.warns(
                UserWarning, match=r"forward AD is switched off.*use_reentrant=True.*central differences"
            ):
                optimizer.estimate(closure)
        else:
            optimizer.estimate(closure)
        results.append([p.grad.clone() for p in model.parameters()])
        optimizer.close()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_the_losses_of_different_directions_agree_on_the_clean_loss() -> None:
    model, calls = mlp(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return model(torch.full((2, 6), float(calls), dtype=torch.float64)).sum(1)

    optimizer = bioopt.ForwardGradient(model.parameters(), 0.1, samples=2)
    with pytest.raises(RuntimeError, match="ForwardGradient compares losses, but the closure is not repeatable"):
        optimizer.step(closure)


@pytest.mark.parametrize("rule", [bioopt.ForwardGradient, bioopt.LocalPerturbation])
@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.BatchNorm1d(8)])
def test_a_normalisation_below_a_layer_under_autocast(rule: type, norm: nn.Module) -> None:
    """torch gives it a tangent in single precision, which a layer in half precision does not take."""
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 8)), nn.Linear(8, 4))
    optimizer = rule(model, **({"blocks": ["0"]} if rule is bioopt.LocalPerturbation else {}))
    before = weights(model)

    def closure() -> Tensor:
        optimizer.target = Y
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(X.float()).float(), Y, reduction="none")

    optimizer.step(closure)
    assert not any(torch.equal(a.detach(), b) for a, b in zip(weights(model[0][::2]), before[:2], strict=False))
