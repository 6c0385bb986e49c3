"""Noise on a block is credited with the slope of the block's own loss, and with nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt import LocalPerturbation
from bioopt.core.noise import NoiseSource, fill_rademacher_
from bioopt.local import perturbation
from bioopt.local.units import Units, in_positions, unpooled

from ..rules import batch, cnn, same, weights
from .test_base import Attention, Residual

SGD: dict[str, Any] = {"descent": torch.optim.SGD}


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 3, padding=1, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 5),
        ).double()


def data(n: int = 4) -> tuple[Tensor, Tensor]:
    x, y = batch(n=n)
    return x.double(), y


def estimate(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    optimizer = LocalPerturbation(model, 0.1, **SGD, **options)
    optimizer.target = y
    optimizer.estimate(lambda: F.cross_entropy(model(x), y))
    return optimizer


def slow_estimate(model: nn.Sequential, heads: list[nn.Linear], x: Tensor, y: Tensor, groups: int, patches: int) -> Any:
    """Each sample and unit by itself: its noise alone moves the activity, and the loss of the block with it."""
    generator = NoiseSource().stream(x.device, 0, 0, 0)
    grads: dict[Tensor, Tensor] = {}
    for layer, head, rest in ((0, heads[0], model[1:3]), (3, heads[1], model[4:5])):
        synapse: Any = model[layer]
        u = synapse(x.detach())
        noise = fill_rademacher_(torch.empty_like(u), generator)

        def loss(u: Tensor, label: Tensor, rest: nn.Sequential = rest, head: nn.Linear = head) -> Tensor:
            h = rest(u.clone().unsqueeze(0))
            return F.cross_entropy(head(F.adaptive_avg_pool2d(h, 2).flatten(1)), label.unsqueeze(0))

        signal = torch.zeros_like(u)
        size, across = u.shape[1] // groups, u.shape[2] // patches
        for n, g, i, j in itertools.product(range(len(x)), range(groups), range(patches), range(patches)):
            unit = (slice(g * size, (g + 1) * size),)
            unit += tuple(slice(k * across, (k + 1) * across) for k in (i, j))  # type: ignore[assignment]
            own = torch.zeros_like(u[n])
            own[unit] = noise[n][unit]
            at = u[n].detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(at, y[n]), at)  # of the whole block, along the noise of one unit
            signal[n] += (slope * own).sum() * own
        params = list(synapse.parameters())
        grads |= dict(zip(params, torch.autograd.grad(u, params, signal / len(x)), strict=True))
        h = rest(u.detach().clone())
        own = torch.stack([F.cross_entropy(head(F.adaptive_avg_pool2d(h, 2).flatten(1)), y)])
        grads |= dict(zip(head.parameters(), torch.autograd.grad(own, [*head.parameters()]), strict=True))
        x = h
    readout = [*model[6].parameters()]
    grads |= dict(zip(readout, torch.autograd.grad(F.cross_entropy(model[6](x.flatten(1)), y), readout), strict=True))
    return grads


@pytest.mark.parametrize(("groups", "patches"), [(1, 1), (2, 2), (2, 4)])
def test_the_slow_twin_agrees(groups: int, patches: int) -> None:
    x, y = data()
    model, twin = network(), network()
    optimizer = estimate(model, x, y, neuron_groups=groups, patches=patches, pool=2, example=x)
    heads: Any = [*optimizer._owned.modules.values()]
    grads = slow_estimate(twin, heads, x, y, groups, patches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, grads[q], rtol=1e-9, atol=1e-11)
    for p in optimizer._owned.modules.parameters():
        torch.testing.assert_close(p.grad, grads[p], rtol=1e-9, atol=1e-11)


def gradients_of_own_losses(model: nn.Sequential, heads: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """By autograd, of an MLP: layer, activation, layer, activation, readout."""
    found = []
    for i, head in zip((0, 2), heads, strict=True):
        h = model[i : i + 2](x.detach())
        found += torch.autograd.grad(F.cross_entropy(head(h), y), [*model[i].parameters()])
        x = h
    return found


def two_layers() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 4)).double()


@pytest.mark.parametrize(("groups", "distribution", "draws"), [(8, "rademacher", 1), (1, "normal", 60)])
def test_the_mean_is_the_gradient_of_the_blocks_own_loss(groups: int, distribution: str, draws: int) -> None:
    """With one neuron in a unit each draw is, since the square of -1 and 1 is 1."""
    torch.manual_seed(0)
    model, x = two_layers(), torch.randn(400, 6).double()
    y = x[:, :4].argmax(1)
    optimizer = LocalPerturbation(model, 0.0, neuron_groups=groups, distribution=distribution, example=x, **SGD)
    true = gradients_of_own_losses(two_layers(), optimizer._owned.modules.values(), x, y)
    found = []
    for _ in range(draws):
        optimizer.target = y
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        found.append([p.grad.clone() for p in model[:4].parameters()])
    for mean, expected, *each in zip([sum(g) / draws for g in zip(*found, strict=True)], true, *found, strict=True):
        error = (mean - expected).norm()
        noise = torch.stack([one - mean for one in each]).square().sum().sqrt() / draws if draws > 1 else 1e-12
        assert error < 2 * noise
        assert draws == 1 or noise < 0.5 * expected.norm()


def test_without_noise_only_heads_and_readout_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(perturbation.FILL, "rademacher", lambda tensor, generator: tensor.zero_())
    model = cnn()
    optimizer = estimate(model, *batch())
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert p.grad.any() == name.startswith("8"), name
    assert all(p.grad.any() for p in optimizer._owned.modules.parameters())


class OneWay(torch.autograd.Function):
    """An activation with a forward derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_forward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise AssertionError("a backward pass")

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * (1 - x.tanh().square())


class Activation(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_no_backward_pass_beneath_a_head() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(10, 6).double(), torch.randint(4, (10,))
    one, other = two_layers(), two_layers()
    one[1] = Activation(OneWay.apply)
    for model in (one, other):
        estimate(model, x, y)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_skip_carries_no_noise_past_the_end_of_a_block() -> None:
    """As in a network whose skips are detached by hand."""
    one, two = Residual(), Residual(detached=True)
    for model in (one, two):
        estimate(model, *batch())
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == name.startswith(("first", "second", "act")), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_where_noise_spreads_further_a_sample_is_one_unit() -> None:
    """Queries, keys and values act on all positions, or on all neurons."""

    class Mixing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            mixed = (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
            return self.head(self.out(mixed).mean(1))

    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 6), torch.randint(4, (8,))
    with pytest.raises(RuntimeError, match=r"an operation has no forward derivative .*use NodePerturbation"):
        estimate(Attention(), x, y)
    optimizer = estimate(Mixing(), x, y)
    names = {s.index: s.name for s in optimizer._recorder.synapses.values()}
    found = {names[i]: spread for i, spread in optimizer._own_state["spread"].items()}
    assert found == {"q": (False, None), "k": (False, None), "v": (False, None), "out": (True, None)}


class FlatNorm(nn.Module):
    """Over neurons, at each position."""

    def forward(self, h: Tensor) -> Tensor:
        return F.layer_norm(h.movedim(1, -1), h.shape[1:2]).movedim(-1, 1)


@pytest.mark.parametrize(
    ("norm", "scope"),
    [
        (nn.BatchNorm2d(4), (True, 4, True)),
        (nn.GroupNorm(2, 4), (False, 2, True)),
        (nn.GroupNorm(1, 4), (False, 1, True)),
        (nn.InstanceNorm2d(4), (False, 4, True)),
        (FlatNorm(), None),
    ],
    ids=["batch", "group", "layer", "instance", "position"],
)
def test_what_normalisation_takes_away_is_not_learned(norm: nn.Module, scope: Any) -> None:
    """With one neuron at one position in a unit, each draw is the gradient, but for an activity's share in the scope.

    The four activities of the last are too few for that: a sample is one unit.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm, nn.Tanh(), nn.Flatten(), nn.Linear(400, 5)).double()
    x = torch.randn(16, 2, 10, 10).double()
    y = x.flatten(1)[:, :5].argmax(1)
    optimizer = estimate(model, x, y, neuron_groups=4, example=x)
    assert optimizer._own_state["spread"] == {0: (scope is not None, scope)}
    if scope is None:
        return
    (head,) = optimizer._owned.modules.values()
    optimizer.close()
    h = F.adaptive_avg_pool2d(model[:3](x), 4).flatten(1)
    (true,) = torch.autograd.grad(F.cross_entropy(head(h), y), model[0].weight)
    error = (model[0].weight.grad - true).norm() / true.norm()
    assert error < 0.15


def test_noise_of_all_layers_of_a_block_is_credited() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    model, x = nn.Sequential(body, nn.Linear(8, 4)).double(), torch.randn(400, 6).double()
    y = x[:, :4].argmax(1)
    optimizer = LocalPerturbation(model, 0.0, blocks=["0"], example=x, **SGD)
    (head,) = optimizer._owned.modules.values()
    true = torch.autograd.grad(F.cross_entropy(head(body(x)), y), [body[0].weight, body[2].weight])
    mean = [torch.zeros_like(g) for g in true]
    for _ in range(60):
        optimizer.target = y
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        for m, layer in zip(mean, (body[0], body[2]), strict=True):
            m += layer.weight.grad / 60
    assert optimizer._own_state["spread"] == {0: (False, None), 1: (True, None)}
    for m, g in zip(mean, true, strict=True):
        assert F.cosine_similarity(m.flatten(), g.flatten(), dim=0) > 0.9
        assert 0.8 < m.norm() / g.norm() < 1.3


def test_a_pathway_without_samples_learns_nothing() -> None:
    torch.manual_seed(0)
    paths = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()) for _ in range(2)]
    gate, head = bioopt.nn.Gate(nn.Identity(), paths, active=1), nn.Linear(8, 5)
    optimizer = LocalPerturbation(model := nn.ModuleList([gate, head]), 0.1, **SGD)
    x, y = torch.randn(10, 6), batch()[1]
    context = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    optimizer.target = y
    optimizer.estimate(lambda: F.cross_entropy(head(gate(x, context)), y))
    assert all(p.grad.any() for p in paths[0].parameters())
    assert not any(p.grad.any() for p in paths[1].parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_noise_that_reaches_no_head_is_named() -> None:
    x, y = torch.randn(10, 6).double(), torch.randint(4, (10,))
    model = two_layers()
    model[1] = Activation(lambda x: x.detach().tanh())
    with pytest.warns(UserWarning, match="layers ran and learn nothing: '0'"):
        estimate(model, x, y)
    model = two_layers()
    model[1] = Activation(lambda x: forward_ad.unpack_dual(x).primal.tanh())
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"noise on layer '0' does not reach the next layer"):
        estimate(model, x, y)
    assert same(before, weights(model))


def test_options_that_make_no_sense_are_named() -> None:
    for options, message in (
        ({"neuron_groups": 0}, "neuron_groups=0 must be an integer >= 1"),
        ({"patches": 0}, "patches=0 must be an integer >= 1, or None"),
        ({"distribution": "uniform"}, "distribution='uniform' must be one of normal, rademacher"),
    ):
        with pytest.raises(ValueError, match=f"LocalPerturbation: {message}"):
            LocalPerturbation(cnn(), **options)
    with pytest.raises(ValueError, match="LocalPerturbation: the model has no plastic layer"):
        LocalPerturbation(nn.Sequential(nn.Tanh()))


def test_windows_of_pooling_that_overlap() -> None:
    torch.manual_seed(0)
    h, weight = torch.randn(3, 4, 7, 5).double(), torch.randn(2, 4, 3, 3).double()
    expected = F.adaptive_avg_pool2d(h, 3).flatten(1) @ weight.flatten(1).T
    torch.testing.assert_close(h.flatten(1) @ unpooled(weight, (7, 5)).flatten(1).T, expected)


def test_units_of_positions_that_do_not_divide() -> None:
    h = torch.arange(2 * 3 * 5.0).view(1, 6, 5)
    units = Units.of(h, 4, 2)
    assert (units.groups, units.patches) == (3, (2,))
    sums = units.sums(h)
    assert sums.tolist() == [[[float(h[0, 2 * g : 2 * g + 2, a].sum()) for a in (slice(0, 3), slice(3, 5))]
                              for g in range(3)]]  # fmt: skip
    assert units.at_positions(sums, (10,))[0, 0].tolist() == [sums[0, 0, 0]] * 6 + [sums[0, 0, 1]] * 4
    assert in_positions(torch.zeros(2, 24), -1, 6, (4, 4)).shape == (2, 6, 2, 2)
    assert in_positions(torch.zeros(2, 25), -1, 6, (4, 4)).shape == (2, 25)
