"""The Hebbian family against slow twins: one synapse, one event at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.hebbian.arithmetic import softmax_

from ..rules import mlp, published
from .twins import (
    LAYERS,
    anti_hebbian_twin,
    bcm_twin,
    hebbian_twin,
    krotov_hopfield_twin,
    oja_twin,
    sanger_twin,
    softhebb_twin,
)

#: names of layers, each also in channels-last memory where it has images
IN_EITHER_MEMORY = [
    pytest.param(name, last, id=f"{name}{', channels last' * last}")
    for name, (_, shape) in LAYERS.items()
    for last in (False, True)[: 1 + (len(shape) == 4)]
]


def built(name: str, seed: int, channels_last: bool = False, samples: int | None = None) -> tuple[nn.Module, Tensor]:
    """A layer of `LAYERS` and its input, in double precision."""
    build, shape = LAYERS[name]
    torch.manual_seed(seed)
    layer, x = build().double(), torch.randn(shape if samples is None else (samples, *shape[1:]), dtype=torch.float64)
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return layer, x


@pytest.mark.parametrize(("name", "channels_last"), IN_EITHER_MEMORY)
@pytest.mark.parametrize("lr", [0.01, 5.0])
@pytest.mark.parametrize("t", [0.7, 3.0])
def test_hebbian_equals_its_twin(name: str, lr: float, t: float, channels_last: bool) -> None:
    layer, x = built(name, 1, channels_last)
    optimizer = published.Hebbian(layer, lr, inverse_temperature=t, readout=None)
    before = layer.weight.detach().clone()
    change = hebbian_twin(layer, x, t, lr)
    optimizer.step(lambda: layer(x).sum())
    torch.testing.assert_close(layer.weight.detach(), before + lr * change, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_oja_equals_its_twin(name: str) -> None:
    layer, x = built(name, 2)
    optimizer = published.Oja(layer, 0.3, readout=None)
    before = layer.weight.detach().clone()
    change = oja_twin(layer, x, 0.3)
    optimizer.step(lambda: layer(x).sum())
    torch.testing.assert_close(layer.weight.detach(), before + 0.3 * change, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "channels_last"), IN_EITHER_MEMORY)
@pytest.mark.parametrize("rule", ["softhebb", "softhebb, k", "krotov_hopfield", "sanger", "anti_hebbian", "bcm"])
def test_each_rule_equals_its_twin(rule: str, name: str, channels_last: bool) -> None:
    layer, x = built(name, 3, channels_last)
    lr = 0.2
    optimizer, twin = {
        "softhebb": lambda: (
            published.SoftHebb(layer, lr, inverse_temperature=0.7, readout=None), lambda: softhebb_twin(layer, x, 0.7)),
        "softhebb, k": lambda: (
            published.SoftHebb(layer, lr, inverse_temperature=0.7, k=2, readout=None),
            lambda: softhebb_twin(layer, x, 0.7, 2)),
        "krotov_hopfield": lambda: (
            published.KrotovHopfield(layer, lr, rank=3, anti_hebbian=0.3, readout=None),
            lambda: krotov_hopfield_twin(layer, x, 3, 0.3)),
        "sanger": lambda: (published.Sanger(layer, lr, readout=None), lambda: sanger_twin(layer, x, lr)),
        "anti_hebbian": lambda: (
            published.AntiHebbian(layer, lr, readout=None), lambda: anti_hebbian_twin(layer, x, lr)),
        "bcm": lambda: (published.BCM(layer, lr, threshold_rate=0.3, readout=None), None),
    }[rule]()  # fmt: skip
    threshold = [1.0] * len(layer.weight)
    for step in range(3):
        before = layer.weight.detach().clone()
        if twin is not None:
            change = twin()
        else:
            change, power = bcm_twin(layer, x, lr, threshold)
            threshold = power if step == 0 else [o + 0.3 * (p - o) for o, p in zip(threshold, power, strict=True)]
        optimizer.step(lambda: layer(x).sum())
        torch.testing.assert_close(layer.weight.detach(), before + lr * change, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "conv2d, groups", "conv2d, reflect"])
@pytest.mark.parametrize(
    "options",
    [
        {"competition": "hard"},
        {"competition": "hard", "loser_strength": 0.5},
        {"competition": "k", "k": 2},
        {"competition": "k", "k": 3, "loser_strength": 0.2, "decay": "own"},
        {"competition": "none"},
        {"competition": "none", "decay": "own"},
        {"decay": "own"},
        {"decay": "none"},
        {"loser_strength": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("modulator", [None, [0.5, 2.0], [-1.0, 0.3]])
def test_hebbian_options_equal_their_twin(options: dict, name: str, modulator: list[float] | None) -> None:
    layer, x = built(name, 4, samples=2)
    optimizer = published.Hebbian(layer, 0.4, inverse_temperature=1.5, readout=None, **options)
    if modulator is not None:
        optimizer.modulator = torch.tensor(modulator, dtype=torch.float64)
    before = layer.weight.detach().clone()
    change = hebbian_twin(layer, x, 1.5, 0.4, modulator=modulator, **options)
    optimizer.step(lambda: layer(x).sum())
    torch.testing.assert_close(layer.weight.detach(), before + 0.4 * change, rtol=0, atol=1e-12)


def test_a_global_modulator_gates_learning() -> None:
    layer, x = nn.Linear(4, 5), torch.randn(3, 4)
    before = layer.weight.detach().clone()
    optimizer = published.Hebbian(layer, 0.1, readout=None)
    optimizer.modulator = 0.0
    optimizer.step(lambda: layer(x).sum())
    assert torch.equal(layer.weight, before)
    optimizer.modulator = torch.tensor(2.0)
    optimizer.step(lambda: layer(x).sum())
    assert not torch.equal(layer.weight, before)
    optimizer.modulator = torch.ones(7)
    with pytest.raises(ValueError, match=r"modulator has 7 values, one a sample, but layer 'Linear'.*\(3, 5\)"):
        optimizer.step(lambda: layer(x).sum())


def test_the_sign_of_the_modulator_counts_where_the_pass_was_made() -> None:
    layer, x = nn.Linear(6, 8), 3 * torch.randn(50, 6)
    optimizer = published.Hebbian(layer, 0.5, readout=None)
    grads = []
    for at_step in (-1.0, 1.0):
        optimizer.modulator = -1.0
        layer(x)
        optimizer.modulator = at_step
        optimizer.estimate()
        assert layer.weight.grad is not None
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)
    layer(x)  # of a positive one; the negative one is forgotten
    optimizer.estimate()
    assert layer.weight.grad is not None
    torch.testing.assert_close(
        -layer.weight.grad, hebbian_twin(layer.double(), x.double(), 1.0, 0.5).float(), rtol=1e-3, atol=1e-4
    )


def test_competitions_that_cannot_be_are_refused() -> None:
    lonely = nn.Linear(4, 1)
    for rule in (bioopt.Hebbian, bioopt.SoftHebb, bioopt.KrotovHopfield, bioopt.AntiHebbian):
        with pytest.raises(ValueError, match=r"layer 'Linear' .*takes at least 2 neurons, but it has 1"):
            rule(lonely, 0.1, readout=None)
    with pytest.raises(ValueError, match="SoftHebb: k=1 must be an integer >= 2, or None"):
        published.SoftHebb(nn.Linear(4, 5), 0.1, k=1, readout=None)
    with pytest.raises(ValueError, match=r"SoftHebb .*layer 'Linear' .*k=6 takes at least 6 neurons, but it has 5"):
        published.SoftHebb(nn.Linear(4, 5), 0.1, k=6, readout=None)
    assert published.Hebbian(lonely, 0.1, competition="none", readout=None)
    with pytest.raises(ValueError, match=r"layer 'Linear' .*k=6 takes at least 6 neurons, but it has 5"):
        published.Hebbian(nn.Linear(4, 5), 0.1, competition="k", k=6, readout=None)
    with pytest.raises(ValueError, match="k=6 takes at least 6 neurons"):  # in a group, too
        published.Hebbian([{"params": nn.Linear(4, 5), "competition": "k", "k": 6}], 0.1, readout=None)
    with pytest.raises(ValueError, match=r"layer 'Conv2d' .*rank=4 takes at least 4 neurons, but it has 3 in each"):
        published.KrotovHopfield(nn.Conv2d(2, 6, 3, groups=2), 0.1, rank=4, readout=None)
    for option in (
        {"competition": "fierce"},
        {"decay": "slow"},
        {"loser_strength": -1},
        {"k": 0},
        {"inverse_temperature": 0},
    ):
        with pytest.raises(ValueError, match=f"Hebbian: {next(iter(option))}="):
            published.Hebbian(nn.Linear(4, 5), 0.1, readout=None, **option)


def test_sanger_finds_the_principal_components_of_patches_in_order() -> None:
    torch.manual_seed(0)
    images = torch.randn(30, 2, 6, 6, dtype=torch.float64).cumsum(3)
    images -= images.mean()
    layer = nn.Conv2d(2, 3, 2, bias=False).double()
    patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 8)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    optimizer = published.Sanger(layer, 1.0 / values[-1].item(), readout=None)
    for _ in range(600):
        layer(images)
        optimizer.step()
    for k, w in enumerate(layer.weight.detach().flatten(1)):
        assert abs(w.norm() - 1) < 1e-3
        assert abs(w @ vectors[:, -1 - k]) > 0.999, k


def test_anti_hebbian_decorrelates() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0)
    layer = nn.Linear(5, 5, bias=False).double()
    nn.init.eye_(layer.weight)
    optimizer = published.AntiHebbian(layer, 0.2, readout=None)
    for _ in range(600):
        layer(x)
        optimizer.step()
    correlation = torch.corrcoef(layer(x).detach().T)
    assert (correlation - torch.eye(5)).abs().max() < 1e-3


def test_bcm_neurons_become_selective() -> None:
    """Each neuron ends up answering one of two patterns alone, as the theory has it for independent patterns."""
    torch.manual_seed(0)
    patterns = torch.tensor([[1.0, 0.2, 0.1], [0.1, 0.3, 1.0]])
    layer = nn.Linear(3, 6, bias=False)
    nn.init.uniform_(layer.weight, 0.1, 0.5)
    optimizer = published.BCM(layer, 0.02, threshold_rate=0.5, readout=None)
    for _ in range(1500):
        layer(patterns)
        optimizer.step()
    answers = layer(patterns).detach()
    assert answers.max(0).values.sub(2).abs().max() < 0.2  # the fixed point: 1 / (how often the pattern comes)
    assert answers.min(0).values.abs().max() < 0.2


def test_softhebb_brings_every_neuron_to_unit_length() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 4, bias=False)
    with torch.no_grad():
        layer.weight.mul_(5 / layer.weight.norm(dim=1, keepdim=True))
    optimizer = published.SoftHebb(layer, 0.05, readout=None)
    start = (layer.weight.norm(dim=1) - 1).abs().max().item()
    for _ in range(500):
        layer(torch.randn(32, 10))
        optimizer.step()
    assert (layer.weight.norm(dim=1) - 1).abs().max() < 0.1 * start


@pytest.mark.parametrize("options", [{"competition": "hard"}, {"competition": "k"}])
def test_the_strongest_of_an_event_without_a_batch(options: dict) -> None:
    x = torch.randn(6)
    results = []
    for event in (x, x.unsqueeze(0)):
        torch.manual_seed(0)
        layer = nn.Linear(6, 5)
        published.Hebbian(layer, 0.1, readout=None, **options).step(lambda layer=layer, event=event: layer(event).sum())
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)


def test_bcm_measures_its_threshold_in_single_precision() -> None:
    """Squares of half precision are 0 below 2e-4 and infinite above 256."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(64, 6)
    optimizer = published.BCM(layer, 0.0, readout=None)
    for scale in (1e-3, 1e-3):  # one step makes the threshold, the next divides by it
        with torch.autocast("cpu", torch.float16):
            layer(scale * x)
        optimizer.step()
    threshold = optimizer._own_state["running"][0]
    torch.testing.assert_close(threshold, (layer(1e-3 * x) ** 2).mean(0).detach(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_of_equal_neurons_one_wins(dim: int) -> None:
    torch.manual_seed(0)
    strength = torch.randint(3, (4, 5, 6)).movedim(1, dim).float()
    shares = softmax_(strength.clone(), dim, loser_strength=0.5)
    soft = torch.softmax(strength, dim)
    assert (strength.amax(dim, keepdim=True) == strength).sum(dim).max() > 1
    assert ((shares > 0).sum(dim) == 1).all()
    won = shares > 0
    torch.testing.assert_close(shares[won], soft[won])
    assert (strength == strength.amax(dim, keepdim=True))[won].all()
    torch.testing.assert_close(shares[~won], -0.5 * soft[~won])


@pytest.mark.parametrize("competition", ["soft", "k"])
def test_a_large_inverse_temperature_is_one_in_half_precision(competition: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(64, 6)
    optimizer = published.Hebbian(layer, 0.1, inverse_temperature=1e6, competition=competition, readout=None)
    with torch.autocast("cpu", torch.float16):
        layer(x)
    optimizer.estimate()
    half = layer.weight.grad
    optimizer.close()
    sharp = published.Hebbian(layer, 0.1, competition="hard", readout=None)
    layer(x)
    sharp.estimate()
    torch.testing.assert_close(half, layer.weight.grad, rtol=0, atol=2e-3)


def test_oja_finds_the_principal_component() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    x -= x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    layer = nn.Linear(6, 3, bias=False).double()
    optimizer = published.Oja(layer, 0.5 / values[-1].item(), readout=None)
    for _ in range(300):
        layer(x)
        optimizer.step()
    for w in layer.weight.detach():
        assert abs(w.norm() - 1) < 1e-6
        assert abs(abs(w @ vectors[:, -1]) - 1) < 1e-6


@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.Oja])
def test_weights_stay_bounded_at_any_learning_rate(rule: type) -> None:
    """Under inputs of length 50, where a plain Hebbian rule grows without end; 12 was the most over 40 seeds."""
    torch.manual_seed(0)
    for lr in (0.1, 10.0):
        layer = nn.Linear(20, 8, bias=False)
        optimizer = rule(layer, lr, readout=None)
        for _ in range(200):
            layer(10 * torch.randn(32, 20) + 5)
            optimizer.step()
            assert layer.weight.norm(dim=1).max() < 25, lr


def test_winners_become_the_clusters() -> None:
    """Competition: each neuron ends up as the centre of one cluster, of unit length."""
    torch.manual_seed(1)
    centres = torch.eye(4) * 3
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4) * 0.5 + 0.05 * torch.randn(4, 4))
    optimizer = published.Hebbian(layer, 0.1, inverse_temperature=5.0, readout=None)
    for _ in range(300):
        layer(centres[torch.randint(4, (32,))] + 0.1 * torch.randn(32, 4))
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.eye(4), atol=0.1, rtol=0)


def test_temperature_may_differ_between_groups() -> None:
    model = mlp(sizes=(6, 5, 5))
    twin = mlp(sizes=(6, 5, 5))
    optimizer = published.Hebbian(
        [{"params": model[0], "inverse_temperature": 2.0}, {"params": model[2]}],
        0.1,
        inverse_temperature=0.5,
        readout=None,
    )
    x = torch.randn(8, 6, dtype=torch.float64)
    change = [hebbian_twin(twin[0], x, 2.0, 0.1), hebbian_twin(twin[2], twin[:2](x), 0.5, 0.1)]
    model(x)
    optimizer.step()
    for layer, before, delta in zip((model[0], model[2]), (twin[0], twin[2]), change, strict=True):
        torch.testing.assert_close(layer.weight.detach(), before.weight + 0.1 * delta, rtol=0, atol=1e-12)
