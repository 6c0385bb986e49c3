"""Rank-one perturbation, against a slow twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.noise import NoiseSource

from ..rules import mlp
from .common import X, Y, estimate, flat, sizes


def rank_one_direction(model: nn.Module, stream: torch.Generator, n: int) -> list[list[Tensor]]:
    """Of each sample, a direction for every parameter in turn."""
    parts = []
    for layer in (m for m in model if hasattr(m, "weight")):
        pools, shape = getattr(layer, "groups", 1), layer.weight.shape
        a = torch.randn(n, shape[0], generator=stream, dtype=torch.float64)
        b = torch.randn(n, pools, layer.weight[0].numel(), generator=stream, dtype=torch.float64)
        c = torch.randn(n, shape[0], generator=stream, dtype=torch.float64)
        parts.append((shape, pools, a, b, c))
    found = []
    for i in range(n):
        found.append([])
        for shape, pools, a, b, c in parts:
            rows = [a[i, k] * b[i, k // (shape[0] // pools)] for k in range(shape[0])]
            found[-1] += [torch.stack(rows).view(shape), c[i]]
    return found


@pytest.mark.parametrize("credit", ["sample", "global"])
@pytest.mark.parametrize("case", ["mlp", "same", "strided and grouped", "1d", "3d"])
@pytest.mark.parametrize("relative", [True, False])
def test_rank_one_perturbation_equals_its_twin(case: str, credit: str, relative: bool) -> None:
    """Each sample in a network of its own, whose weights are moved along a whole matrix."""
    torch.manual_seed(0)
    if case == "mlp":
        model, x = mlp(), X
    else:
        conv, shape = {
            "same": (nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), (2, 4, 4)),
            "strided and grouped": (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 7, 7)),
            "1d": (nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), (2, 6)),
            "3d": (nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
        }[case]
        x = torch.randn(8, *shape, dtype=torch.float64)
        size = conv(x[:1].float()).numel()
        model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(size, 4)).double()
    sigma, samples = 0.1, 2
    options = {"sigma": sigma, "samples": samples, "credit": credit, "relative": relative}
    optimizer = bioopt.RankOnePerturbation(model, 0.1, seed=2, **options)
    names = [name for name, _ in model.named_parameters()]
    for step in range(2):
        wanted = [torch.zeros_like(p) for p in model.parameters()]
        scales = sizes([m for m in model if hasattr(m, "weight")], relative)
        for sample in range(samples):
            z = rank_one_direction(model, NoiseSource().stream(torch.device("cpu"), 2, step, sample), 8)

            def loss_at(i: int, scale: float, z=z, scales=scales) -> Tensor:
                parts = zip(names, model.parameters(), z[i], scales, strict=True)
                moved = {n: p + scale * s * d for n, p, d, s in parts}
                return F.cross_entropy(torch.func.functional_call(model, moved, (x[i : i + 1],)), Y[i : i + 1])

            with torch.no_grad():
                slopes = [(loss_at(i, sigma) - loss_at(i, -sigma)) / (2 * sigma) for i in range(8)]
                for i in range(8):
                    slope = slopes[i] / 8 if credit == "sample" else sum(slopes) / 8
                    for total, d, s in zip(wanted, z[i], scales, strict=True):
                        total += slope * d / s / samples
        got = estimate(optimizer, model, lambda: F.cross_entropy(model(x), Y, reduction="none"))
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_a_layer_that_fires_twice_has_one_direction() -> None:
    torch.manual_seed(5)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]).double()
    optimizer = bioopt.RankOnePerturbation(model, 0.1, sigma=1e-4, samples=1000, seed=1)

    def closure() -> Tensor:
        twice = torch.tanh(model[0](torch.tanh(model[0](X[:, :3]))))
        return F.cross_entropy(model[1](twice), Y % 2, reduction="none")

    true = flat(list(torch.autograd.grad(closure().mean(), list(model.parameters()))))
    optimizer.estimate(closure)
    got = flat([p.grad for p in model.parameters()])
    assert F.cosine_similarity(got, true, dim=0) > 0.95
    assert abs((got @ true) / (true @ true) - 1) < 0.1


def test_what_rank_one_perturbation_cannot_do_is_explained() -> None:
    class Scale(nn.Linear):
        pass

    bioopt.register_synapse(Scale, channel_dim=-1)
    with pytest.raises(ValueError, match=r"not the Scale '1': train it by another rule through bioopt\.Mixed"):
        bioopt.RankOnePerturbation(nn.Sequential(nn.Linear(2, 2), Scale(2, 2)), 0.1, sigma=0.1)
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(TypeError, match=r"needs the model, not its parameters"):
        bioopt.RankOnePerturbation(model.parameters(), 0.1, sigma=0.1)
    with pytest.raises(RuntimeError, match=r"layer '0'.*shape \(4,\), without a dimension of samples"):
        bioopt.RankOnePerturbation(model, 0.1, sigma=0.1).step(lambda: model(torch.ones(6)).square().mean())
    with pytest.raises(ValueError, match="distribution='cauchy' must be one of normal, rademacher"):
        bioopt.RankOnePerturbation(model, 0.1, sigma=0.1, distribution="cauchy")


def test_a_bias_that_does_not_learn_is_not_perturbed() -> None:
    """However it is kept from learning, the estimates for all others are the same, bit for bit."""
    model, other = mlp().double(), mlp().double()
    other[0].bias.requires_grad_(False)
    for network, options in ((model, {"exclude": ["0.bias"]}), (other, {})):
        optimizer = bioopt.RankOnePerturbation(network, 0.1, sigma=0.1, seed=1, **options)
        optimizer.estimate(lambda network=network: F.cross_entropy(network(X), Y, reduction="none"))
    learned = {name: p.grad for name, p in model.named_parameters() if name != "0.bias"}
    assert model[0].bias.grad is None
    for name, p in other.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, learned[name])


def test_no_samples_teach_nothing() -> None:
    model = mlp()
    optimizer = bioopt.RankOnePerturbation(model, 0.1, samples=2)
    found = estimate(optimizer, model, lambda: F.cross_entropy(model(X[:0]), Y[:0], reduction="none"))
    assert not flat(found).any()
