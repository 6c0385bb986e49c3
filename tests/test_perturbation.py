"""The perturbation family against slow twins, against autograd, and against its own promises."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioopt
from bioopt.core.noise import NoiseSource, fill_normal_, fill_rademacher_

from .rules import SEVERAL_PASSES, make, mlp, options_of, ordinary, per_sample, same, weights

GENERATOR = torch.Generator().manual_seed(5)
X, Y = torch.randn(8, 6, dtype=torch.float64, generator=GENERATOR), torch.randint(4, (8,), generator=GENERATOR)


def losses_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y, reduction="none")


def gradient(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(losses_of(model).mean(), list(model.parameters())))


def estimate(optimizer: bioopt.LearningRule, model: nn.Module, closure=None) -> list[Tensor]:
    optimizer.estimate(closure or (lambda: losses_of(model)))
    return [p.grad.clone() for p in model.parameters()]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


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
def test_shaped_weight_perturbation_equals_its_twin(distribution: str, shaping: str, antithetic: bool) -> None:
    model, sigma, population = mlp(), 0.1, 6
    optimizer = bioopt.WeightPerturbation(
        model, 0.1, sigma=sigma, population=population, antithetic=antithetic, distribution=distribution,
        shaping=shaping, seed=3,
    )  # fmt: skip
    names, params = zip(*model.named_parameters(), strict=True)
    directions, losses = [], []
    for member in range(population):
        stream = NoiseSource().stream(torch.device("cpu"), 3, 0, member)
        if distribution == "normal":
            z = [torch.randn(p.shape, generator=stream, dtype=p.dtype) for p in params]
        else:
            z = [fill_rademacher_(torch.empty_like(p.detach()), stream) for p in params]
        directions.append(z)
        for sign in (1, -1) if antithetic else (1,):
            shifted = {n: p + sign * sigma * d for n, p, d in zip(names, params, z, strict=True)}
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
        bioopt.WeightPerturbation(mlp(), 0.1, sigma=0.1, shaping="ranks")
    for option in ("distribution", "shaping"):
        with pytest.raises(ValueError, match=f"WeightPerturbation: {option}='odd' must be one of "):
            bioopt.WeightPerturbation(mlp(), 0.1, sigma=0.1, population=2, **{option: "odd"})
    frozen = mlp().requires_grad_(False)
    with pytest.raises(RuntimeError, match="WeightPerturbation: every parameter is frozen"):
        bioopt.WeightPerturbation(frozen, 0.1, sigma=0.1).step(lambda: losses_of(frozen))


@pytest.mark.parametrize("population", [1, 3])
@pytest.mark.parametrize("antithetic", [True, False])
def test_weight_perturbation_equals_its_twin(population: int, antithetic: bool) -> None:
    model, sigma = mlp(), 0.1
    optimizer = bioopt.WeightPerturbation(
        model.parameters(), 0.1, sigma=sigma, population=population, antithetic=antithetic, seed=3
    )
    for step in range(2):
        params = list(model.parameters())
        wanted = [torch.zeros_like(p) for p in params]
        base = losses_of(model).mean().item()
        for member in range(population):
            stream = NoiseSource().stream(torch.device("cpu"), 3, step, member)
            z = [torch.randn(p.shape, generator=stream, dtype=p.dtype) for p in params]

            def loss_at(scale: float, z=z, params=params) -> float:
                shifted = {n: p + scale * d for (n, p), d in zip(model.named_parameters(), z, strict=True)}
                out = torch.func.functional_call(model, shifted, (X,))
                return F.cross_entropy(out, Y).item()

            other, width = (loss_at(-sigma), 2 * sigma) if antithetic else (base, sigma)
            slope = (loss_at(sigma) - other) / width
            for total, d in zip(wanted, z, strict=True):
                total += slope * d / population
        got = estimate(optimizer, model)
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("credit", ["sample", "global"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_node_perturbation_equals_its_twin(samples: int, credit: str, distribution: str) -> None:
    """One sample, one synapse, one noisy pass at a time."""
    model, sigma = mlp(), 0.1
    options = {"sigma": sigma, "samples": samples, "credit": credit, "distribution": distribution}
    optimizer = bioopt.NodePerturbation(model, 0.1, seed=2, **options)
    first, second = model[0], model[2]
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    with torch.no_grad():
        hidden = torch.tanh(first(X))
        clean = F.cross_entropy(second(hidden), Y, reduction="none")
        for sample in range(samples):
            stream = NoiseSource().stream(torch.device("cpu"), 2, 0, sample)
            fill = fill_normal_ if distribution == "normal" else fill_rademacher_
            xi = [fill(torch.empty(8, n, dtype=torch.float64), stream) for n in (5, 4)]
            noisy = F.cross_entropy(second(torch.tanh(first(X) + sigma * xi[0])) + sigma * xi[1], Y, reduction="none")
            for b in range(8):
                change = noisy[b] - clean[b] if credit == "sample" else (noisy - clean).mean() * 8
                for i, (x, noise) in enumerate(((X, xi[0]), (hidden, xi[1]))):
                    for k in range(noise.shape[1]):
                        told = change / sigma * noise[b, k] / (8 * samples)
                        wanted[2 * i][k] += told * x[b]
                        wanted[2 * i + 1][k] += told
    for a, b in zip(wanted, estimate(optimizer, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def decorrelating_twin(patches: Tensor, told: Tensor, matrix: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Of one pool: the change of W and the next R, event by event. ``patches`` E×D, ``told`` E×K, one a sample."""
    seen = torch.stack([matrix @ x for x in patches])
    # V sees R x; its step, carried over to W = V R.
    change = sum(torch.outer(s, x) for s, x in zip(told, seen, strict=True)) @ matrix
    moment = sum(torch.outer(x, x) for x in seen) / len(seen)
    return change, matrix - rate * (moment - moment.diag().diag()) @ matrix


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2, padding=1, padding_mode="circular"), nn.Tanh(),
            nn.Flatten(), nn.Linear(16, 4, bias=False)),
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, stride=(1, 2), padding=1), nn.Tanh(), nn.Flatten(),
            nn.Linear(18, 4)),
    ],
    ids=["linear", "grouped", "strided"],
)  # fmt: skip
def test_decorrelation_equals_its_twin(build) -> None:
    """Against the plain rule's own signals, over two steps, the second with matrices that are not the identity."""
    torch.manual_seed(0)
    model, rate = build().double(), 0.05
    optimizer = bioopt.NodePerturbation(model, 0.0, sigma=0.1, samples=2, decorrelation=rate)
    plain = bioopt.NodePerturbation(model, 0.0, sigma=0.1, samples=2)
    synapses = [m for m in model if hasattr(m, "weight")]
    matrices: dict[tuple[int, int], Tensor] = {}
    for _ in range(2):
        for rule in (plain, optimizer):  # lr is 0: both see the same model, and the same noise
            rule.step(lambda: losses_of(model))
            if rule is plain:
                told = [layer.weight.grad.clone() for layer in synapses]
        x = X
        for module in model:
            if module in synapses:
                i = synapses.index(module)
                pools, size = getattr(module, "groups", 1), module.weight[0].numel()
                identity = torch.eye(size, dtype=x.dtype).view(size, *module.weight.shape[1:])
                for pool in range(pools):
                    rows = slice(pool * len(module.weight) // pools, (pool + 1) * len(module.weight) // pools)
                    if isinstance(module, nn.Linear):
                        patches = x
                    else:
                        alone = type(module)(
                            module.weight.shape[1], size, module.kernel_size, module.stride, module.padding,
                            bias=False, padding_mode=module.padding_mode).double()  # fmt: skip
                        alone.weight.data = identity
                        part = x[:, pool * module.weight.shape[1] : (pool + 1) * module.weight.shape[1]]
                        patches = alone(part).detach().flatten(2).transpose(1, 2).reshape(-1, size)
                    matrix = matrices.get((i, pool), torch.eye(size, dtype=x.dtype))
                    # <s x> R' R, with the plain rule's <s x>
                    wanted = told[i].reshape(len(module.weight), size)[rows] @ matrix.T @ matrix
                    got = module.weight.grad.reshape(len(module.weight), size)[rows]
                    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
                    _, matrices[i, pool] = decorrelating_twin(
                        patches, torch.zeros(len(patches), 1).double(), matrix, rate
                    )
            x = module(x).detach()
    kept = optimizer.state_dict()["state"]["rule"]["decorrelation"]
    for (i, pool), matrix in matrices.items():
        torch.testing.assert_close(kept[i][pool], matrix, rtol=1e-9, atol=1e-12)
        assert not torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))


def test_decorrelated_plasticity_is_that_of_weights_behind_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    x, told = torch.randn(9, 4, generator=generator), torch.randn(9, 3, generator=generator)
    matrix = torch.randn(4, 4, generator=generator)
    change, _ = decorrelating_twin(x, told, matrix, 0.0)
    torch.testing.assert_close(change, (told.T @ x) @ matrix.T @ matrix)


def test_decorrelation_decorrelates() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    mixing = torch.eye(5) + 0.4
    optimizer = bioopt.NodePerturbation(model, 0.0, sigma=0.1, decorrelation=0.05)
    for _ in range(400):
        x = torch.randn(50, 5) @ mixing
        optimizer.step(lambda x=x: model(x).square().sum(1))
    matrix = optimizer.state_dict()["state"]["rule"]["decorrelation"][0][0]

    def correlation(data: Tensor) -> float:
        return (torch.corrcoef(data.T) - torch.eye(5)).abs().max().item()

    x = torch.randn(5000, 5) @ mixing
    assert correlation(x) > 0.5
    assert correlation(x @ matrix.T) < 0.1


def test_decorrelation_goes_on_from_a_checkpoint_and_differs_between_groups() -> None:
    def made() -> tuple[nn.Module, bioopt.LearningRule]:
        model = mlp()
        groups = [{"params": [model[0]]}, {"params": [model[2]], "decorrelation": 0.0}]
        return model, bioopt.NodePerturbation(groups, 0.1, sigma=0.1, decorrelation=0.05)

    model, optimizer = made()
    for _ in range(2):
        optimizer.step(lambda: losses_of(model))
    twin, other = made()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert list(other.state_dict()["state"]["rule"]["decorrelation"]) == [0]
    optimizer.step(lambda: losses_of(model))
    other.step(lambda: losses_of(twin))
    assert same(weights(model), weights(twin))


def test_decorrelation_that_diverges_or_has_no_layer_is_explained() -> None:
    model = mlp()
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, decorrelation=1e90)
    optimizer.step(lambda: losses_of(model))
    before, state = weights(model), str(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"decorrelation=1e\+90 has diverged at layer '0'; nothing was changed. Try"):
        optimizer.step(lambda: losses_of(model))
    assert same(before, weights(model))
    assert state == str(optimizer.state_dict())

    class Own(nn.Linear):
        pass

    bioopt.register_synapse(Own, channel_dim=-1)
    with pytest.raises(ValueError, match="not the Own '0': give it a group with decorrelation=0"):
        bioopt.NodePerturbation(nn.Sequential(Own(2, 3)), 0.1, sigma=0.1, decorrelation=0.1)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 4))
    return nn.Sequential(nn.Unflatten(1, (2, 5, 5)), *layers).double()


def frozen_beneath() -> nn.Sequential:
    """A frozen layer with batch norm in training mode, beneath all noise."""
    model = convolutions()
    model.insert(2, nn.BatchNorm2d(4, affine=False).double())
    model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("credit", ["sample", "global"])
@pytest.mark.parametrize("build", [lambda: mlp(sizes=(50, 5, 4)), convolutions, frozen_beneath])
def test_noisy_passes_at_once_equal_those_one_by_one(build, credit: str) -> None:
    x = torch.randn(8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for batched in (False, True):
        model, calls = build(), 0
        optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, samples=3, credit=credit, batched=batched)
        torch.manual_seed(0)

        def closure(model=model) -> Tensor:
            nonlocal calls
            calls += 1
            return F.cross_entropy(model(x), Y, reduction="none")

        optimizer.step(closure)  # after two evaluations that see that the closure is repeatable
        assert (calls, optimizer.forward_passes) == ((4 if batched else 6), 6)
        losses = optimizer.step(closure)
        assert (calls, optimizer.forward_passes) == ((6 if batched else 10), 4)
        assert optimizer.batched == batched
        found.append([losses, torch.get_rng_state().double(), *weights(model), *model.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "closure"),
    [
        (True, lambda optimizer, model: losses_of(model)),
        (False, lambda optimizer, model: losses_of(model).mean().item()),
        (False, lambda optimizer, model: per_sample(optimizer, model, X, Y)()),
        (False, lambda optimizer, model: ordinary(optimizer, model, X, Y)()),
    ],
    ids=["batch norm", "number", "backward where needed", "backward always"],
)
@pytest.mark.filterwarnings("ignore:NodePerturbation needs no backward pass")
def test_what_vmap_cannot_run_is_run_pass_by_pass(norm: bool, closure) -> None:
    found = []
    for batched in (False, True):
        model = mlp()
        if norm:
            model.insert(1, nn.BatchNorm1d(5).double())
        optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, samples=3, batched=batched)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step(lambda model=model, optimizer=optimizer: closure(optimizer, model))
        said = [str(w.message) for w in caught if "vmap cannot run" in str(w.message)]
        assert len(said) <= batched
        found.append([*weights(model), *model.buffers()])
        if batched and norm:
            assert "Batch norm" in said[0]
            assert caught[-1].filename == __file__
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("more", [False, True])
@pytest.mark.filterwarnings("ignore:.*vmap cannot run this closure")
def test_other_layers_in_the_noisy_pass_are_refused(batched: bool, more: bool) -> None:
    model, calls = mlp(), 0
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, samples=2, batched=batched)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        twice = calls > 3 if more else calls <= 3
        return losses_of(model) + (model[0](X).sum() if twice else 0)

    before = weights(model)
    with pytest.raises(RuntimeError, match="ran other layers in the noisy pass"):
        optimizer.step(closure)
    assert same(before, weights(model))


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
def test_rank_one_perturbation_equals_its_twin(case: str, credit: str) -> None:
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
    optimizer = bioopt.RankOnePerturbation(model, 0.1, sigma=sigma, samples=samples, credit=credit, seed=2)
    names = [name for name, _ in model.named_parameters()]
    for step in range(2):
        wanted = [torch.zeros_like(p) for p in model.parameters()]
        for sample in range(samples):
            z = rank_one_direction(model, NoiseSource().stream(torch.device("cpu"), 2, step, sample), 8)

            def loss_at(i: int, scale: float, z=z) -> Tensor:
                moved = {n: p + scale * d for n, p, d in zip(names, model.parameters(), z[i], strict=True)}
                return F.cross_entropy(torch.func.functional_call(model, moved, (x[i : i + 1],)), Y[i : i + 1])

            with torch.no_grad():
                slopes = [(loss_at(i, sigma) - loss_at(i, -sigma)) / (2 * sigma) for i in range(8)]
                for i in range(8):
                    slope = slopes[i] / 8 if credit == "sample" else sum(slopes) / 8
                    for total, d in zip(wanted, z[i], strict=True):
                        total += slope * d / samples
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


@pytest.mark.parametrize("samples", [1, 3])
def test_forward_gradient_of_weights_equals_its_twin(samples: int) -> None:
    """The gradient, times the direction, times the direction."""
    model = mlp()
    optimizer = bioopt.ForwardGradient(model.parameters(), 0.1, samples=samples, seed=4)
    for step in range(2):
        true = gradient(model)
        wanted = [torch.zeros_like(p) for p in true]
        for sample in range(samples):
            stream = NoiseSource().stream(torch.device("cpu"), 4, step, sample)
            z = [torch.randn(p.shape, generator=stream, dtype=p.dtype) for p in true]
            slope = sum((g * d).sum().item() for g, d in zip(true, z, strict=True))
            for total, d in zip(wanted, z, strict=True):
                total += slope * d / samples
        for a, b in zip(wanted, estimate(optimizer, model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("credit", ["sample", "global"])
def test_forward_gradient_of_activities_equals_its_twin(samples: int, credit: str) -> None:
    """Each sample's gradient at each layer's activity, times the direction there; one synapse at a time."""
    model = mlp()
    optimizer = bioopt.ForwardGradient(model, 0.1, samples=samples, space="activities", credit=credit, seed=2)
    first, second = model[0], model[2]
    u = [first(X)]
    hidden = torch.tanh(u[0])
    u.append(second(hidden))
    slopes_at = torch.autograd.grad(F.cross_entropy(u[1], Y, reduction="sum"), u)
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for sample in range(samples):
        stream = NoiseSource().stream(torch.device("cpu"), 2, 0, sample)
        xi = [torch.randn(8, n, generator=stream, dtype=torch.float64) for n in (5, 4)]
        slopes = [sum((g[b] * z[b]).sum().item() for g, z in zip(slopes_at, xi, strict=True)) for b in range(8)]
        for b in range(8):
            credited = slopes[b] if credit == "sample" else sum(slopes)
            for i, (x, z) in enumerate(((X, xi[0]), (hidden.detach(), xi[1]))):
                for k in range(z.shape[1]):
                    wanted[2 * i][k] += credited * z[b, k] * x[b] / (8 * samples)
                    wanted[2 * i + 1][k] += credited * z[b, k] / (8 * samples)
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
    estimate(optimizer, model)  # said once
    assert same(before, weights(model))


def test_forward_gradient_needs_a_loss_with_a_slope() -> None:
    model = mlp()
    optimizer = bioopt.ForwardGradient(model, 0.1)
    with pytest.warns(UserWarning, match="the closure returned a loss without one"):
        got = estimate(optimizer, model, lambda: losses_of(model).mean().item())
    for a, b in zip(estimate(bioopt.ForwardGradient(model, 0.1), model), got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="space='dual' must be one of weights, activities"):
        bioopt.ForwardGradient(model, 0.1, space="dual")
    with pytest.raises(TypeError, match="needs the model"):
        bioopt.ForwardGradient(model.parameters(), 0.1, space="activities")


@pytest.mark.parametrize("tries", [1, 5])
def test_hill_climbing_equals_its_twin(tries: int) -> None:
    """The best change of several, if it is one for the better."""
    model, kept = mlp(), []
    optimizer = bioopt.HillClimbing(model, 0.3, tries=tries, seed=6)
    for step in range(12):
        before = weights(model)
        candidates = []
        for i in range(tries):
            stream = NoiseSource().stream(torch.device("cpu"), 6, step, i)
            changed = [w + 0.3 * torch.randn(w.shape, generator=stream, dtype=w.dtype) for w in before]
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


def test_one_sided_serial_perturbation_measures_each_change_from_the_clean_loss() -> None:
    model, sigma = mlp(), 0.1
    clean, wanted = losses_of(model).mean().item(), []
    with torch.no_grad():
        for p in model.parameters():
            for i in range(p.numel()):
                value = p.view(-1)[i].clone()
                p.view(-1)[i] += sigma
                wanted.append((losses_of(model).mean().item() - clean) / sigma)
                p.view(-1)[i] = value
    optimizer = bioopt.SerialPerturbation(model, 0.1, sigma=sigma, coordinates=59, central=False)
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


@pytest.mark.parametrize("credit", ["sample", "global"])
def test_reward_hebbian_equals_its_twin(credit: str) -> None:
    """Two moments an episode, three steps: traces, reward, and what was expected of it, one synapse at a time."""
    model, sigma, decay, rate = mlp(), 0.1, 0.6, 0.3
    optimizer = bioopt.RewardHebbian(
        model, 0.1, sigma=sigma, trace_decay=decay, reward_rate=rate, credit=credit, seed=2
    )
    first, second = model[0], model[2]
    moments = (X, 0.5 * X + 1)
    expected = None
    for step in range(3):
        stream = NoiseSource().stream(torch.device("cpu"), 2, step, 0)
        traces = [torch.zeros(8, *p.shape, dtype=p.dtype) for p in model.parameters()]
        with torch.no_grad():
            for x in moments:
                xi = [torch.randn(8, n, generator=stream, dtype=torch.float64) for n in (5, 4)]
                hidden = torch.tanh(first(x) + sigma * xi[0])
                out = second(hidden) + sigma * xi[1]
                for i, (pre, noise) in enumerate(((x, xi[0]), (hidden, xi[1]))):
                    for b in range(8):
                        for k in range(noise.shape[1]):
                            traces[2 * i][b, k] = decay * traces[2 * i][b, k] + noise[b, k] * pre[b]
                            traces[2 * i + 1][b, k] = decay * traces[2 * i + 1][b, k] + noise[b, k]
            rewards = -F.cross_entropy(out, Y, reduction="none")
            expected = rewards.mean() if expected is None else expected
            wanted = []
            for trace in traces:
                change = torch.zeros_like(trace[0])
                for b in range(8):
                    surprise = (rewards[b] - expected) / 8 if credit == "sample" else rewards.mean() - expected
                    change += surprise * trace[b] / sigma
                wanted.append(-change)
            expected = expected + rate * (rewards.mean() - expected)

        def episode() -> Tensor:
            model(moments[0])
            return F.cross_entropy(model(moments[1]), Y, reduction="none")

        for a, b in zip(wanted, estimate(optimizer, model, episode), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        optimizer.descend()


def test_the_mean_change_of_reward_hebbian_is_the_gradient_of_reward() -> None:
    """Each sample many times in one batch: as many trials."""
    model = mlp(sizes=(3, 3, 3))
    x, y = X[:4, :3].repeat(2000, 1), (Y[:4] % 3).repeat(2000)
    true = flat(list(torch.autograd.grad(few_losses(model).mean(), list(model.parameters()))))
    optimizer = bioopt.RewardHebbian(model, 0.1, sigma=0.1)
    mean = sum(
        flat(estimate(optimizer, model, lambda: F.cross_entropy(model(x), y, reduction="none"))) for _ in range(100)
    ) / 100  # fmt: skip
    assert F.cosine_similarity(mean, true, dim=0) > 0.99
    assert abs((mean @ true) / (true @ true) - 1) < 0.1


def test_reward_hebbian_learns_from_a_scalar_reward_alone() -> None:
    """A reward for being near a target that the rule never sees."""
    torch.manual_seed(0)
    model, target = mlp(sizes=(3, 5, 2), dtype=torch.float32), torch.tensor([0.5, -0.3])
    optimizer = bioopt.RewardHebbian(model, 0.02, sigma=0.1)
    x = torch.ones(1, 3)
    with torch.no_grad():
        before = (model(x) - target).norm().item()
    for _ in range(500):
        optimizer.step(lambda: ((model(x) - target) ** 2).sum().item())
    model.eval()
    assert (model(x) - target).norm().item() < 0.2 * before


def few_losses(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X[:4, :3]), Y[:4] % 3, reduction="none")


@pytest.mark.parametrize(
    ("build", "closure"),
    [
        (lambda m: bioopt.WeightPerturbation(m, 0.1, population=15, sigma=1e-4), few_losses),
        (lambda m: bioopt.WeightPerturbation(m, 0.1, population=15, sigma=1e-4, antithetic=False), few_losses),
        (lambda m: bioopt.NodePerturbation(m, 0.1, samples=15, sigma=1e-4), few_losses),
        (lambda m: bioopt.NodePerturbation(m, 0.1, samples=40, sigma=1e-4, credit="global", batched=True), few_losses),
        (
            lambda m: bioopt.NodePerturbation(m, 0.1, samples=40, sigma=1e-4, batched=True),
            lambda m: few_losses(m).mean(),
        ),
        (lambda m: bioopt.RankOnePerturbation(m, 0.1, samples=25, sigma=1e-4), few_losses),
        (lambda m: bioopt.RankOnePerturbation(m, 0.1, samples=25, sigma=1e-4, distribution="rademacher"), few_losses),
        (lambda m: bioopt.ForwardGradient(m, 0.1, samples=15), few_losses),
        (lambda m: bioopt.ForwardGradient(m, 0.1, samples=15, distribution="rademacher"), few_losses),
        (lambda m: bioopt.ForwardGradient(m, 0.1, samples=15, space="activities"), few_losses),
    ],
    ids=[
        "weight",
        "weight, one-sided",
        "node",
        "node, global",
        "node, scalar loss",
        "rank one",
        "rank one, rademacher",
        "forward",
        "forward, rademacher",
        "forward, activities",
    ],
)
def test_the_mean_of_the_estimates_is_the_gradient(build, closure) -> None:
    """In direction and size, and with an error that falls as one over the root of their number."""
    model = mlp(sizes=(3, 3, 3))
    true = flat(list(torch.autograd.grad(few_losses(model).mean(), list(model.parameters()))))
    optimizer = build(model)
    chunks = torch.stack([  # of 60 directions each; noisier estimates have more
        sum(flat(estimate(optimizer, model, lambda: closure(model))) for _ in range(4)) / 4 for _ in range(25)
    ])  # fmt: skip
    mean = chunks.mean(0)
    assert F.cosine_similarity(mean, true, dim=0) > 0.99
    assert abs((mean @ true) / (true @ true) - 1) < 0.1
    error_of_chunks = (chunks - true).norm(dim=1).mean()
    ratio = error_of_chunks / (mean - true).norm()
    assert 3 < ratio < 9  # √25 = 5


@pytest.mark.parametrize(
    "build",
    [lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2)],
)
def test_node_perturbation_of_convolutions(build) -> None:
    torch.manual_seed(0)
    conv = build()
    size = conv(torch.zeros(1, 2, 5, 5)).numel()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3)).double()
    x, y = torch.randn(40, 2, 5, 5, dtype=torch.float64), torch.randint(3, (40,))
    true = flat(list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))))
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=1e-4, samples=100, batched=True)
    total = torch.zeros_like(true)
    for _ in range(30):
        total += flat(estimate(optimizer, model, lambda: F.cross_entropy(model(x), y, reduction="none")))
    assert F.cosine_similarity(total, true, dim=0) > 0.97
    assert abs((total / 30 @ true) / (true @ true) - 1) < 0.1


def test_credit_that_cannot_be_given_is_explained() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Flatten(0), nn.Unflatten(0, (-1, 5)), nn.Linear(5, 4))
    sequence = torch.randn(7, 2, 6)  # time first: two samples
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1)

    def closure() -> Tensor:
        return model(sequence).view(7, 2, 4).square().mean((0, 2))

    before = weights(model)
    with pytest.raises(RuntimeError, match=r"credit='sample'.*layer '0'.*\(7, 2, 5\).*2 losses.*credit='global'"):
        optimizer.step(closure)
    assert same(before, weights(model))
    bioopt.NodePerturbation(model, 0.1, sigma=0.1, credit="global").step(closure)
    optimizer.step(lambda: closure().mean())  # a scalar loss is global by itself
    with pytest.raises(ValueError, match="credit='other' must be 'sample' or 'global'"):
        bioopt.NodePerturbation(model, 0.1, sigma=0.1, credit="other")


@pytest.mark.parametrize(
    "rule",
    [
        bioopt.WeightPerturbation,
        bioopt.SerialPerturbation,
        bioopt.HillClimbing,
        bioopt.NodePerturbation,
        bioopt.RankOnePerturbation,
    ],
)
def test_a_closure_that_is_not_repeatable_is_found_at_the_first_step(rule: type) -> None:
    model, batches = mlp(), iter(range(100))

    def closure() -> Tensor:
        return F.cross_entropy(model(X + next(batches)), Y, reduction="none")

    optimizer, before = make(rule, model), weights(model)
    with pytest.raises(
        RuntimeError, match=rf"{rule.__name__} compares losses, .* not repeatable.*Draw the batch before"
    ):
        optimizer.step(closure)
    assert same(before, weights(model))
    dropout = nn.Sequential(nn.Dropout(0.5), model)  # random, but from the same state each time
    optimizer.step(lambda: F.cross_entropy(dropout(X), Y, reduction="none"))
    optimizer.step(closure)  # looked for at the first step alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [bioopt.WeightPerturbation, bioopt.SerialPerturbation, bioopt.ForwardGradient])
def test_probes_leave_no_trace(rule: type, dtype: torch.dtype) -> None:
    """A hundred estimates, and not a bit of a weight has moved."""
    model = mlp(dtype=dtype)
    optimizer = make(rule, model, **options_of(rule, sigma=1e-3 if dtype == torch.float32 else 0.05))
    with torch.no_grad():
        model[0].bias[0] = -0.0  # a sign that an addition of zero would lose
    before = weights(model)
    x = X.to(dtype)
    for _ in range(100):
        optimizer.estimate(lambda: F.cross_entropy(model(x).float(), Y, reduction="none"))
    assert same(before, weights(model))


def test_sigma_below_the_precision_of_a_weight_is_explained() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = bioopt.SerialPerturbation(model, 0.1, sigma=1e-5)
    with pytest.raises(RuntimeError, match=r"sigma=1e-05 changes nothing at a weight of 1\.0"):
        optimizer.step(lambda: model(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum())
    assert model.weight.item() == 1.0
    everywhere = bioopt.WeightPerturbation(model, 0.1, sigma=1e-5)
    with pytest.raises(
        RuntimeError, match=r"sigma=1e-05 moves no weight, in the precision of .*bfloat16; try sigma=0\.06"
    ):
        everywhere.step(lambda: model(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum())
    assert model.weight.item() == 1.0


NOISY = [rule for rule in SEVERAL_PASSES if rule is not bioopt.RewardSTDP]  # which draws nothing itself


@pytest.mark.parametrize("rule", NOISY, ids=lambda rule: rule.__name__)
def test_noise_is_a_function_of_seed_step_and_member(rule: type) -> None:
    def run(seed: int, before: int = 0) -> list[Tensor]:
        torch.manual_seed(before)  # the global state does not matter
        model = mlp()
        optimizer = make(rule, model, seed=seed, **options_of(rule, coordinates=20))
        for _ in range(2):
            optimizer.step(per_sample(optimizer, model, X, Y))
        return weights(model)

    assert same(run(1), run(1, before=9))
    assert not same(run(1), run(2))


def test_streams_are_normal_and_unrelated() -> None:
    source, cpu = NoiseSource(), torch.device("cpu")
    draws = torch.stack([torch.randn(4000, generator=source.stream(cpu, *key)) for key in
                         [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1), (0,)]])  # fmt: skip
    assert draws.mean(1).abs().max() < 4 / math.sqrt(4000)
    assert (draws.std(1) - 1).abs().max() < 0.05
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 0.07
    assert torch.equal(draws[0], torch.randn(4000, generator=NoiseSource().stream(cpu, 0, 0, 0)))


@pytest.mark.parametrize("option", ["sigma", "population", "samples", "coordinates", "seed"])
def test_options_out_of_range(option: str) -> None:
    for rule in SEVERAL_PASSES:
        for value in (-1, "x", 0.5 if option != "sigma" else float("nan")):
            try:
                make(rule, mlp(), **{option: value})
            except ValueError as error:
                assert f"{rule.__name__}: {option}={value!r} must be" in str(error)  # noqa: PT017
            except TypeError as error:
                assert f"unexpected keyword argument '{option}'" in str(error)  # noqa: PT017
            else:
                pytest.fail(f"{rule.__name__}({option}={value!r}) was taken")


def test_the_seed_is_part_of_the_state() -> None:
    model = mlp()
    optimizer = bioopt.WeightPerturbation(model, 0.1, sigma=0.1, seed=1)
    other = bioopt.WeightPerturbation(model, 0.1, sigma=0.1, seed=2)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(estimate(optimizer, model), estimate(other, model), strict=True):
        assert torch.equal(a, b)


def test_rademacher_noise_is_fair_and_unrelated() -> None:
    source, cpu = NoiseSource(), torch.device("cpu")
    signs = torch.stack([fill_rademacher_(torch.empty(8000), source.stream(cpu, 0, i)) for i in range(3)])
    assert signs.unique().tolist() == [-1, 1]
    assert signs.mean(1).abs().max() < 4 / math.sqrt(8000)
    assert (torch.corrcoef(signs) - torch.eye(3)).abs().max() < 0.05
    for lag in range(1, 17):  # eight come from one number
        assert abs((signs[0, lag:] * signs[0, :-lag]).mean()) < 4 / math.sqrt(8000 - lag)


@pytest.mark.parametrize("fill", [fill_normal_, fill_rademacher_])
def test_noise_fills_any_memory_format_alike(fill) -> None:
    source, cpu = NoiseSource(), torch.device("cpu")
    for tensor in (
        torch.empty(3, 5, 4, 6),
        torch.empty(3, 5, 4, 6).to(memory_format=torch.channels_last),
        torch.empty(7, 9).T,
        torch.empty(1, 1, 5, 5).to(memory_format=torch.channels_last),
        torch.empty(6, 8)[:, ::2],  # not dense
        torch.empty(()),
    ):
        tensor.fill_(math.nan)
        fill(tensor, source.stream(cpu, 1))
        assert tensor.isfinite().all()
    flat = fill(torch.empty(360), source.stream(cpu, 1))
    last = fill(torch.empty(3, 5, 4, 6).to(memory_format=torch.channels_last), source.stream(cpu, 1))
    assert torch.equal(last.permute(0, 2, 3, 1).flatten(), flat)


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

    optimizer = bioopt.WeightPerturbation(model, 0.1, sigma=sigma, population=3, antithetic=antithetic)
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


@pytest.mark.parametrize(("rule", "option"), [(bioopt.WeightPerturbation, "sigma"), (bioopt.HillClimbing, "lr")])
def test_a_perturbation_that_the_precision_swallows_is_warned_of(rule: type, option: str) -> None:
    torch.manual_seed(0)
    model = mlp(sizes=(6, 40, 4), dtype=torch.bfloat16)
    x, y = torch.randn(8, 6, dtype=torch.bfloat16), torch.randint(4, (8,))

    def step(value: float) -> None:
        options = {"lr": 0.1, "sigma": 0.1} if option == "sigma" else {}
        optimizer = rule(model, **{**options, option: value})
        optimizer.step(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))

    with pytest.warns(UserWarning, match=rf"{option}=0.001 moves \d+% of the weights.*bfloat16; try {option}=") as told:
        step(1e-3)
    advised = float(re.search(rf"try {option}=([\d.e-]+)", str(told[0].message))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(advised)


@pytest.mark.parametrize("rule", [bioopt.NodePerturbation, bioopt.RewardHebbian, bioopt.RankOnePerturbation])
def test_noise_that_half_precision_swallows_is_warned_of(rule: type) -> None:
    torch.manual_seed(0)
    model = mlp(sizes=(6, 40, 4), dtype=torch.bfloat16)
    x, y = torch.randn(8, 6, dtype=torch.bfloat16), torch.randint(4, (8,))
    optimizer = rule(model, 0.0, sigma=1e-4)
    with pytest.warns(UserWarning, match=r"sigma=0.0001 reaches \d+% of the activity of layer '[02]'.*try sigma="):
        optimizer.step(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))
    optimizer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(model, 0.0, sigma=0.3).step(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))


def test_noise_in_half_precision_is_credited_as_it_was_added() -> None:
    """Activities of some 100 swallow most of the noise in bfloat16; what is left is what the loss has seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).to(torch.bfloat16)
    with torch.no_grad():
        model[2].bias.fill_(40.0)
    x, y = torch.randn(64, 6, dtype=torch.bfloat16), torch.randint(4, (64,))
    (true,) = torch.autograd.grad(F.cross_entropy(model(x).float(), y), model[2].weight)
    optimizer = bioopt.NodePerturbation(model, 0.0, sigma=0.3, samples=200)
    optimizer.estimate(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))
    assert F.cosine_similarity(true.float().flatten(), model[2].weight.grad.float().flatten(), 0) > 0.9


class Sequences(nn.Module):
    """Scores of whole sequences, with time or samples first."""

    def __init__(self, first: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = 0 if first == "time" else 1
        self.mix, self.head = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x)).mean(self.time))


@pytest.mark.parametrize(
    ("rule", "options"),
    [(bioopt.NodePerturbation, {"sigma": 1e-3, "samples": 60}), (bioopt.RewardHebbian, {"sigma": 1.0}),
     (bioopt.ForwardGradient, {"space": "activities", "samples": 60}), (bioopt.RankOnePerturbation, {"sigma": 1e-3})],
)  # fmt: skip
def test_a_sequence_as_long_as_the_batch_is_told_from_it(rule: type, options: dict[str, Any]) -> None:
    x, y = torch.randn(8, 8, 6), torch.randint(5, (8,))
    model = Sequences("time")
    optimizer = rule(model, 0.0, **options)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"layer 'mix' gave .*\(8, 8, 16\).*the first dimension is not the sample"):
        optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert same(before, weights(model))
    model = Sequences("batch")
    model.head.requires_grad_(False)  # its noise would hide that of the other layer
    optimizer = rule(model, 0.0, **options)
    (true,) = torch.autograd.grad(F.cross_entropy(model.eval()(x), y), model.mix.weight)
    model.train()
    state = torch.get_rng_state()
    for _ in range(2):
        passes = optimizer.forward_passes
        optimizer.estimate(lambda: F.cross_entropy(model(x), y, reduction="none"))
        optimizer.descend()
    assert torch.equal(state, torch.get_rng_state())
    assert passes - optimizer.forward_passes >= 2  # it was looked at once
    if "samples" in options:
        assert F.cosine_similarity(true.flatten(), model.mix.weight.grad.flatten(), 0) > 0.4


def test_the_losses_of_different_directions_agree_on_the_clean_loss() -> None:
    model, calls = mlp(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return model(torch.full((2, 6), float(calls), dtype=torch.float64)).sum(1)

    optimizer = bioopt.ForwardGradient(model, 0.1, samples=2)
    with pytest.raises(RuntimeError, match="ForwardGradient compares losses, but the closure is not repeatable"):
        optimizer.step(closure)
