"""Rules that change weights, against slow twins and against autograd."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.noise import NoiseSource, fill_rademacher_

from ..rules import mlp, ordinary, per_sample, same, weights
from .common import X, Y, estimate, flat, gradient, losses_of, sizes


def shaped_twin(shaping: str, losses: list[float]) -> list[float]:
    if shaping == "ranks":
        order = sorted(losses)
        return [order.index(value) / (len(losses) - 1) - 0.5 for value in losses]
    if shaping == "winsorised":
        order = sorted(losses)

        def percentile(q: float) -> float:
            place = q * (len(order) - 1)
            low = math.floor(place)
            return order[low] + (place - low) * (order[min(low + 1, len(order) - 1)] - order[low])

        losses = [min(max(value, percentile(0.05)), percentile(0.95)) for value in losses]
    mean = sum(losses) / len(losses)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in losses) / len(losses))
    return [(value - mean) / deviation for value in losses]


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("shaping", ["zscore", "winsorised", "ranks"])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_shaped_weight_perturbation_equals_its_twin(
    distribution: str, shaping: str, antithetic: bool, relative: bool
) -> None:
    model, sigma, population = mlp(), 0.1, 6
    optimizer = bioopt.WeightPerturbation(
        model, 0.1, sigma=sigma, population=population, antithetic=antithetic, distribution=distribution,
        shaping=shaping, relative=relative, seed=3,
    )  # fmt: skip
    scales = sizes([model[0], model[2]], relative)
    names, params = zip(*model.named_parameters(), strict=True)
    directions, losses = [], []
    for member in range(population):
        stream = NoiseSource().stream(torch.device("cpu"), 3, 0, member)
        if distribution == "normal":
            z = [torch.randn(p.shape, generator=stream, dtype=p.dtype) for p in params]
        else:
            z = [fill_rademacher_(torch.empty_like(p.detach()), stream) for p in params]
        directions.append([d / s for d, s in zip(z, scales, strict=True)])
        for sign in (1, -1) if antithetic else (1,):
            shifted = {n: p + sign * sigma * s * d for n, p, d, s in zip(names, params, z, scales, strict=True)}
            losses.append(F.cross_entropy(torch.func.functional_call(model, shifted, (X,)), Y).item())
    worth = shaped_twin(shaping, losses)
    wanted = [torch.zeros_like(p) for p in params]
    for member, z in enumerate(directions):
        slope = worth[2 * member] - worth[2 * member + 1] if antithetic else worth[member]
        for total, d in zip(wanted, z, strict=True):
            total += slope / ((2 if antithetic else 1) * population * sigma) * d
    for a, b in zip(wanted, estimate(optimizer, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_losses_that_are_all_the_same_move_nothing() -> None:
    for shaping in ("none", "zscore", "winsorised", "ranks"):
        model = mlp()
        optimizer = bioopt.WeightPerturbation(model, 0.1, sigma=0.1, population=3, shaping=shaping)
        before = weights(model)
        optimizer.step(lambda model=model: 0 * losses_of(model))
        assert same(before, weights(model)), shaping
    with pytest.raises(ValueError, match="shaping='ranks' compares losses: raise population=1"):
        bioopt.WeightPerturbation(mlp(), 0.1, population=1, shaping="ranks")
    for option in ("distribution", "shaping"):
        with pytest.raises(ValueError, match=f"WeightPerturbation: {option}='odd' must be one of "):
            bioopt.WeightPerturbation(mlp(), 0.1, sigma=0.1, population=2, **{option: "odd"})
    frozen = mlp().requires_grad_(False)
    with pytest.raises(RuntimeError, match="WeightPerturbation: every parameter is frozen"):
        bioopt.WeightPerturbation(frozen, 0.1, sigma=0.1).step(lambda: losses_of(frozen))


@pytest.mark.parametrize("population", [1, 3])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_weight_perturbation_equals_its_twin(population: int, antithetic: bool, relative: bool) -> None:
    model, sigma = mlp(), 0.1
    options = {"sigma": sigma, "population": population, "antithetic": antithetic, "relative": relative}
    optimizer = bioopt.WeightPerturbation(model.parameters(), 0.1, seed=3, **options)
    for step in range(2):
        scales = sizes([model[0], model[2]], relative)
        params = list(model.parameters())
        wanted = [torch.zeros_like(p) for p in params]
        base = losses_of(model).mean().item()
        for member in range(population):
            stream = NoiseSource().stream(torch.device("cpu"), 3, step, member)
            z = [torch.randn(p.shape, generator=stream, dtype=p.dtype) for p in params]

            def loss_at(scale: float, z=z, scales=scales) -> float:
                parts = zip(model.named_parameters(), z, scales, strict=True)
                shifted = {n: p + scale * s * d for (n, p), d, s in parts}
                out = torch.func.functional_call(model, shifted, (X,))
                return F.cross_entropy(out, Y).item()

            other, width = (loss_at(-sigma), 2 * sigma) if antithetic else (base, sigma)
            slope = (loss_at(sigma) - other) / width
            for total, d, s in zip(wanted, z, scales, strict=True):
                total += slope * d / s / population
        got = estimate(optimizer, model)
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tries", [1, 5])
@pytest.mark.parametrize("relative", [True, False])
def test_hill_climbing_equals_its_twin(tries: int, relative: bool) -> None:
    """The best change of several, if it is one for the better."""
    model, kept = mlp(), []
    optimizer = bioopt.HillClimbing(model, 0.3, relative=relative, tries=tries, seed=6)
    for step in range(12):
        before, scales = weights(model), sizes([model[0], model[2]], relative)
        candidates = []
        for i in range(tries):
            stream = NoiseSource().stream(torch.device("cpu"), 6, step, i)
            changed = [
                w + 0.3 * s * torch.randn(w.shape, generator=stream, dtype=w.dtype)
                for w, s in zip(before, scales, strict=True)
            ]
            names = [name for name, _ in model.named_parameters()]
            outputs = torch.func.functional_call(model, dict(zip(names, changed, strict=True)), (X,))
            candidates.append((F.cross_entropy(outputs, Y).item(), i, changed))
        loss, _, changed = min(candidates)
        kept.append(loss < losses_of(model).mean().item())
        optimizer.step(lambda: losses_of(model))
        for a, b in zip(changed if kept[-1] else before, weights(model), strict=True):
            assert torch.equal(a, b) if not kept[-1] else torch.allclose(a, b, rtol=0, atol=1e-15)
    assert 0 < sum(kept) < 12


def test_serial_perturbation_over_all_coordinates_is_the_gradient() -> None:
    model = mlp()
    count = sum(p.numel() for p in model.parameters())
    optimizer = bioopt.SerialPerturbation(model.parameters(), 0.1, sigma=1e-5, coordinates=count)
    for a, b in zip(gradient(model), estimate(optimizer, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("relative", [True, False])
def test_one_sided_serial_perturbation_measures_each_change_from_the_clean_loss(relative: bool) -> None:
    model, sigma = mlp(), 0.1
    clean, wanted = losses_of(model).mean().item(), []
    with torch.no_grad():
        for p, s in zip(model.parameters(), sizes([model[0], model[2]], relative), strict=True):
            for i in range(p.numel()):
                value = p.view(-1)[i].clone()
                p.view(-1)[i] += sigma * s
                wanted.append((losses_of(model).mean().item() - clean) / (sigma * s))
                p.view(-1)[i] = value
    options = {"sigma": sigma, "relative": relative, "coordinates": 59, "central": False}
    optimizer = bioopt.SerialPerturbation(model, 0.1, **options)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return losses_of(model)

    got = flat(estimate(optimizer, model, closure))
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert calls == 60 + 2  # at the first step it is seen whether the closure is repeatable


def test_serial_perturbation_visits_each_weight_once_a_sweep() -> None:
    model = mlp()
    true = flat(gradient(model))
    optimizer = bioopt.SerialPerturbation(model.parameters(), lr=0.0, sigma=1e-5, coordinates=4, seed=1)
    orders = []
    for _ in range(2):  # 59 weights: fifteen steps, the last of three
        seen: list[int] = []
        total = torch.zeros_like(true)
        for _ in range(15):
            got = flat(estimate(optimizer, model))
            seen += got.nonzero().flatten().tolist()
            total += got
        assert sorted(seen) == list(range(59))
        torch.testing.assert_close(total, true, rtol=1e-7, atol=1e-9)
        orders.append(seen)
    assert orders[0] != orders[1]
    assert optimizer.state_dict()["state"]["rule"] == {"seed": 1, "step": 30, "sweep": 2, "position": 0}


class Twice(nn.Module):
    """A layer that fires twice, inputs with a dimension more, dropout, a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.out, self.dropout = nn.Linear(3, 3), nn.Linear(3, 4, bias=False), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.again(torch.tanh(self.again(x.view(-1, 2, 3)))))).sum(1)


@pytest.mark.parametrize("central", [True, False])
@pytest.mark.parametrize("build", [mlp, Twice])
def test_changes_at_once_equal_those_one_by_one(build, central: bool) -> None:
    results = []
    for batched in (False, True):
        torch.manual_seed(0)
        model, calls = build().double(), 0
        optimizer = bioopt.SerialPerturbation(
            model, 1.0, sigma=0.1, coordinates=7, central=central, batched=batched, seed=1
        )

        def closure(model=model) -> Tensor:
            nonlocal calls
            calls += 1
            return losses_of(model)

        for _ in range(9):  # more than a sweep of 59 or 24 weights, the last step of which is short
            losses = optimizer.step(closure)
            if optimizer.state_dict()["state"]["rule"]["step"] == 2:
                assert optimizer.forward_passes == (14 if central else 8)
        assert optimizer.batched == batched
        assert calls <= 2 + 9 * 2 if batched else calls > 9 * 6
        results.append([losses, *weights(model)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_serial_changes_that_cannot_be_made_at_once() -> None:
    conv = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Flatten(), nn.Linear(8, 4)).double()
    with pytest.raises(ValueError, match=r"weights and biases of Linear layers, not '1.weight': use batched=False"):
        bioopt.SerialPerturbation(conv, 0.1, sigma=0.1, batched=True)
    with pytest.raises(TypeError, match=r"SerialPerturbation\(batched=True\) watches the activity of layers"):
        bioopt.SerialPerturbation(conv.parameters(), 0.1, sigma=0.1, batched=True)
    model = mlp()
    optimizer = bioopt.SerialPerturbation(model, 0.1, sigma=0.1, batched=True)
    model.eval()
    with pytest.raises(RuntimeError, match=r"no synapse has fired since the last step; run the model in training mode"):
        optimizer.step(lambda: losses_of(model))
    for form in (per_sample, ordinary):
        found = []
        for batched in (False, True):
            model = mlp()
            optimizer = bioopt.SerialPerturbation(model, 0.1, sigma=0.1, coordinates=5, batched=batched)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step(form(optimizer, model, X, Y))
                optimizer.step(lambda model=model: losses_of(model).mean().item())
            found.append(weights(model))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_sigma_below_the_precision_of_a_weight_is_explained() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = bioopt.SerialPerturbation(model, 0.1, sigma=1e-5)
    with pytest.raises(RuntimeError, match=r"a change by 1e-05 changes nothing at a weight of 1\.0: raise sigma"):
        optimizer.step(lambda: model(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum())
    assert model.weight.item() == 1.0
    optimizer.close()
    everywhere = bioopt.WeightPerturbation(model, 0.1, sigma=1e-5)
    with pytest.raises(
        RuntimeError, match=r"sigma=1e-05 moves no weight, in the precision of .*bfloat16; try sigma=0\.02"
    ):
        everywhere.step(lambda: model(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum())
    assert model.weight.item() == 1.0


def test_the_seed_is_part_of_the_state() -> None:
    model = mlp()
    optimizer = bioopt.WeightPerturbation(model, 0.1, sigma=0.1, seed=1)
    other = bioopt.WeightPerturbation(model, 0.1, sigma=0.1, seed=2)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(estimate(optimizer, model), estimate(other, model), strict=True):
        assert torch.equal(a, b)


# -- weights with gaps, tangents, precision, sequences ----------------------------------------------------------


def sliced(kind: str) -> Tensor:
    """A 5×20 weight in some other place in memory."""
    weight = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    if kind == "slice":
        return torch.cat([weight, weight], 1)[:, :20]
    if kind == "every other":
        return weight.repeat_interleave(2, 1)[:, ::2]
    if kind == "transposed slice":
        return torch.cat([weight, weight], 0).T.contiguous().T[:5]
    return weight.T.contiguous().T


@pytest.mark.parametrize("kind", ["slice", "every other", "transposed slice", "transposed"])
@pytest.mark.parametrize("rule", [bioopt.WeightPerturbation, bioopt.HillClimbing, bioopt.ForwardGradient])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.long
def test_a_weight_with_gaps_in_memory_is_credited_as_it_was_perturbed(kind: str, rule: type, distribution: str) -> None:
    x, y = torch.randn(64, 20, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 5
    model = nn.Linear(20, 5)
    model.weight = nn.Parameter(sliced(kind))
    assert not (kind != "transposed" and torch.empty_like(model.weight).stride() == model.weight.stride())
    loss = F.cross_entropy(model(x), y)
    if rule is bioopt.HillClimbing:
        optimizer = rule(model.parameters(), 0.01, tries=20)
        for _ in range(5):
            optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
        assert F.cross_entropy(model(x), y) < loss - 0.02  # each step keeps what it has tried
        return
    options = {"sigma": 1e-3, "population": 600} if rule is bioopt.WeightPerturbation else {"samples": 600}
    (true,) = torch.autograd.grad(loss, model.weight)
    optimizer = rule(model.parameters(), 0.0, distribution=distribution, **options)
    optimizer.estimate(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert F.cosine_similarity(true.flatten(), model.weight.grad.flatten(), 0) > 0.85


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_credit_goes_to_the_change_that_a_weight_could_hold(antithetic: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = mlp(dtype=dtype)
    x, y = torch.randn(8, 6).to(dtype), torch.randint(4, (8,))
    sigma, seen = 0.004, []

    def closure() -> Tensor:
        seen.append(weights(model))
        return F.cross_entropy(model(x).float(), y, reduction="none")

    options = {"sigma": sigma, "relative": False, "population": 3, "antithetic": antithetic}
    optimizer = bioopt.WeightPerturbation(model, 0.1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.estimate(closure)
    seen = seen[2:]  # after the look whether it is repeatable
    losses = []
    with torch.no_grad():
        clean = weights(model)
        for values in seen:
            for p, value in zip(model.parameters(), values, strict=True):
                p.copy_(value)
            losses.append(F.cross_entropy(model(x).float(), y).double())
        for p, value in zip(model.parameters(), clean, strict=True):
            p.copy_(value)
    for i, p in enumerate(model.parameters()):
        wanted = torch.zeros(p.shape, dtype=torch.float64)
        for m in range(3):
            one, two = (2 * m, 2 * m + 1) if antithetic else (m + 1, 0)
            width = 2 * sigma if antithetic else sigma
            moved = seen[one][i].double() - seen[two][i].double()
            wanted += (losses[one] - losses[two]) / width * moved / width / 3
        coarse = torch.finfo(dtype).eps if dtype is not torch.float32 else 2e-3
        torch.testing.assert_close(p.grad.double(), wanted, rtol=4 * coarse, atol=1e-4)


def test_layers_that_are_frozen_in_a_sweep_begin_a_new_one() -> None:
    model = mlp()
    optimizer = bioopt.SerialPerturbation(model, 0.0, sigma=1e-5, coordinates=50)
    optimizer.step(lambda: losses_of(model))
    model[0].requires_grad_(False)  # 24 weights are left
    true = torch.autograd.grad(losses_of(model).mean(), list(model[2].parameters()))
    optimizer.estimate(lambda: losses_of(model))
    for p, g in zip(model[2].parameters(), true, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-9)
    assert optimizer.state_dict()["state"]["rule"]["sweep"] == 2
    assert optimizer.state_dict()["state"]["rule"]["position"] == 0
