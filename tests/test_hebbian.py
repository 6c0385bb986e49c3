"""The Hebbian family against slow twins: one synapse, one event at a time."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bioopt
from bioopt import Firing, find_synapses
from bioopt.core.products import SparseSignal, local_product
from scripts import bench_hebbian
from scripts.bench_step import allocated

from .rules import ONE_PASS, ORDINARY, mlp

LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (4, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 6, bias=False), (4, 5)),
    "linear over a sequence": (lambda: nn.Linear(5, 6), (3, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d, stride": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (3, 2, 7, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect", bias=False), (2, 2, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv2d, dilation": (lambda: nn.Conv2d(2, 4, (3, 2), dilation=(2, 1), padding=(2, 0)), (2, 2, 6, 6)),
    "conv2d, one image": (lambda: nn.Conv2d(2, 4, 3), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 3)),
}


def events(layer: nn.Module, x: Tensor) -> list[list[tuple[int, Tensor, float]]]:
    """For each event, (neuron, its presynaptic patch, its postsynaptic activity), by plain indexing."""
    weight, bias = layer.weight.detach(), layer.bias
    u = layer(x).detach()
    if isinstance(layer, nn.Linear):
        rows, us = x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])
        return [[(k, rows[n], us[n, k].item()) for k in range(len(weight))] for n in range(len(rows))]
    space = weight.ndim - 2
    if x.ndim == space + 1:
        x, u = x[None], u[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    pad = [p for size in reversed(layer.padding) for p in (size, size)]
    padded = F.pad(x, pad, mode=mode)
    found = []
    ins, outs = weight.shape[1], len(weight) // layer.groups
    for sample in range(len(x)):
        for place in itertools.product(*(range(size) for size in u.shape[2:])):
            patches = []  # one a group of neurons
            for first in range(0, x.shape[1], ins):
                patch = torch.zeros_like(weight[0])
                for offset in itertools.product(*(range(size) for size in weight.shape[2:])):
                    at = tuple(
                        p * s + o * d for p, s, o, d in zip(place, layer.stride, offset, layer.dilation, strict=True)
                    )
                    patch[(slice(None), *offset)] = padded[(sample, slice(first, first + ins), *at)]
                patches.append(patch)
            event = []
            for k in range(len(weight)):
                patch, activity = patches[k // outs], u[(sample, k, *place)].item()
                assert math.isclose(
                    activity, (patch * weight[k]).sum().item() + (0 if bias is None else bias[k].item()), abs_tol=1e-9
                )
                event.append((k, patch, activity))
            found.append(event)
    return found


def hebbian_twin(
    layer: nn.Module,
    x: Tensor,
    t: float,
    lr: float,
    competition: str = "soft",
    k: int = 2,
    loser_strength: float = 0.0,
    decay: str = "subspace",
    modulator: list[float] | None = None,
) -> Tensor:
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    product, together = torch.zeros_like(weight), torch.zeros(len(weight), len(weight), dtype=weight.dtype)
    all_events, norms = events(layer, x), [w.norm().item() for w in weight]
    for e, event in enumerate(all_events):
        m = 1.0 if modulator is None else modulator[e * len(modulator) // len(all_events)]
        for neuron, patch, u in event:
            rivals = [(j, v) for j, _, v in event if j // pool == neuron // pool]
            ranking = sorted(rivals, key=lambda rival: -rival[1] / norms[rival[0]])
            wins = ranking[0][0] == neuron
            sharing = ranking[:k] if competition == "k" else ranking
            if competition == "none":
                share = 1.0
            elif competition == "hard":
                share = 1.0 if wins else -loser_strength / (pool - 1)
            elif neuron in [j for j, _ in sharing]:
                share = 1 / sum(math.exp(t * (v / norms[j] - u / norms[neuron])) for j, v in sharing)
                share *= 1 if wins or not loser_strength else -loser_strength
            else:
                share = 0.0
            product[neuron] += m * share * u * patch / len(all_events)
            for j, v in rivals:
                together[neuron, j] += m * share * u * v / len(all_events)
    flat = weight.flatten(1)
    if decay != "subspace":
        together = together.diag().diag() * (decay == "own")
    if decay == "none":
        return product
    change = product.flatten(1) - together @ flat
    if not loser_strength and min(modulator or [1]) >= 0:
        change = torch.linalg.inv(torch.eye(len(flat), dtype=flat.dtype) + lr * together) @ change
    for rows in (slice(first, first + pool) for first in range(0, len(weight), pool)):
        change[rows] *= min(1, flat[rows].norm() / (lr * change[rows].norm()))
    return change.view_as(weight)


def oja_twin(layer: nn.Module, x: Tensor, lr: float) -> Tensor:
    weight = layer.weight.detach()
    change, power = torch.zeros_like(weight), torch.zeros(len(weight), dtype=weight.dtype)
    all_events = events(layer, x)
    for event in all_events:
        for k, patch, u in event:
            change[k] += u * (patch - u * weight[k]) / len(all_events)
            power[k] += u * u / len(all_events)
    for k in range(len(weight)):
        change[k] /= 1 + lr * power[k]
    return change


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lr", [0.01, 5.0])
@pytest.mark.parametrize("t", [0.7, 3.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_hebbian_equals_its_twin(name: str, lr: float, t: float, channels_last: bool) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(1)
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    if channels_last:
        if x.ndim != 4:
            return
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = bioopt.Hebbian(layer, lr, inverse_temperature=t, readout=None)
    before = layer.weight.detach().clone()
    change = hebbian_twin(layer, x, t, lr)
    optimizer.step(lambda: layer(x).sum())
    torch.testing.assert_close(layer.weight.detach(), before + lr * change, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_oja_equals_its_twin(name: str) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(2)
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    optimizer = bioopt.Oja(layer, 0.3, readout=None)
    before = layer.weight.detach().clone()
    change = oja_twin(layer, x, 0.3)
    optimizer.step(lambda: layer(x).sum())
    torch.testing.assert_close(layer.weight.detach(), before + 0.3 * change, rtol=0, atol=1e-12)


def softhebb_twin(layer: nn.Module, x: Tensor, t: float, strongest: int | None = None) -> Tensor:
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    change = torch.zeros_like(weight)
    for event in events(layer, x):
        for k, patch, u in event:
            rivals = sorted((v for j, _, v in event if j // pool == k // pool), reverse=True)[:strongest]
            if u not in rivals:
                continue
            y = 1 / sum(math.exp(t * (v - u)) for v in rivals)
            y = y if u == max(rivals) else -y
            change[k] += y * (patch - u * weight[k])
    change /= change.abs().max()
    for k, w in enumerate(weight):
        change[k] *= abs(w.norm() - 1) ** 0.5
    return change


def krotov_hopfield_twin(layer: nn.Module, x: Tensor, rank: int, strength: float) -> Tensor:
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    change = torch.zeros_like(weight)
    for event in events(layer, x):
        for k, patch, u in event:
            place = sum(v > u for j, _, v in event if j // pool == k // pool)
            g = {0: 1.0, rank - 1: -strength}.get(place, 0.0)
            change[k] += g * (patch - u * weight[k])
    return change / change.abs().max()


def sanger_twin(layer: nn.Module, x: Tensor, lr: float) -> Tensor:
    """The decay at the new weights: neuron by neuron, since each needs those before it alone."""
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    all_events, new = events(layer, x), weight.clone()
    for k in range(len(weight)):
        before = range(k // pool * pool, k + 1)
        hebb, c = torch.zeros_like(weight[k]), dict.fromkeys(before, 0.0)
        for event in all_events:
            hebb += event[k][2] * event[k][1] / len(all_events)
            for j in before:
                c[j] += event[k][2] * event[j][2] / len(all_events)
        others = sum((c[j] * new[j] for j in before if j != k), torch.zeros_like(hebb))
        new[k] = (weight[k] + lr * (hebb - others)) / (1 + lr * c[k])
    return (new - weight) / lr


def anti_hebbian_twin(layer: nn.Module, x: Tensor, lr: float) -> Tensor:
    weight = layer.weight.detach()
    pool = len(weight) // getattr(layer, "groups", 1)
    all_events, change = events(layer, x), torch.zeros_like(weight)
    for event in all_events:
        for k, _, u in event:
            for j, _, v in event:
                if j != k and j // pool == k // pool:
                    change[k] -= u * v * weight[j] / len(all_events)
    for first in range(0, len(weight), pool):
        rows = slice(first, first + pool)
        change[rows] *= min(1, weight[rows].norm() / (lr * change[rows].norm()))
    return change


def bcm_twin(layer: nn.Module, x: Tensor, lr: float, threshold: list[float]) -> tuple[Tensor, list[float]]:
    weight = layer.weight.detach()
    all_events, change, power = events(layer, x), torch.zeros_like(weight), [0.0] * len(weight)
    for event in all_events:
        for k, patch, u in event:
            change[k] += u * (u - threshold[k]) / threshold[k] * patch / len(all_events)
            power[k] += u * u / len(all_events)
    for k, w in enumerate(weight):
        change[k] *= min(1, w.norm() / (lr * change[k].norm()))
    return change, power


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", ["softhebb", "softhebb, k", "krotov_hopfield", "sanger", "anti_hebbian", "bcm"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_each_rule_equals_its_twin(rule: str, name: str, channels_last: bool) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(3)
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    if channels_last:
        if x.ndim != 4:
            return
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    lr = 0.2
    optimizer, twin = {
        "softhebb": lambda: (
            bioopt.SoftHebb(layer, lr, inverse_temperature=0.7, readout=None), lambda: softhebb_twin(layer, x, 0.7)),
        "softhebb, k": lambda: (
            bioopt.SoftHebb(layer, lr, inverse_temperature=0.7, k=2, readout=None),
            lambda: softhebb_twin(layer, x, 0.7, 2)),
        "krotov_hopfield": lambda: (
            bioopt.KrotovHopfield(layer, lr, rank=3, anti_hebbian=0.3, readout=None),
            lambda: krotov_hopfield_twin(layer, x, 3, 0.3)),
        "sanger": lambda: (bioopt.Sanger(layer, lr, readout=None), lambda: sanger_twin(layer, x, lr)),
        "anti_hebbian": lambda: (bioopt.AntiHebbian(layer, lr, readout=None), lambda: anti_hebbian_twin(layer, x, lr)),
        "bcm": lambda: (bioopt.BCM(layer, lr, threshold_rate=0.3, readout=None), None),
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
    build, shape = LAYERS[name]
    torch.manual_seed(4)
    layer, x = build().double(), torch.randn((2, *shape[1:]), dtype=torch.float64)
    optimizer = bioopt.Hebbian(layer, 0.4, inverse_temperature=1.5, readout=None, **options)
    if modulator is not None:
        optimizer.modulator = torch.tensor(modulator, dtype=torch.float64)
    before = layer.weight.detach().clone()
    change = hebbian_twin(layer, x, 1.5, 0.4, modulator=modulator, **options)
    optimizer.step(lambda: layer(x).sum())
    torch.testing.assert_close(layer.weight.detach(), before + 0.4 * change, rtol=0, atol=1e-12)


def test_a_global_modulator_gates_learning() -> None:
    layer, x = nn.Linear(4, 5), torch.randn(3, 4)
    before = layer.weight.detach().clone()
    optimizer = bioopt.Hebbian(layer, 0.1, readout=None)
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
    optimizer = bioopt.Hebbian(layer, 0.5, readout=None)
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
        bioopt.SoftHebb(nn.Linear(4, 5), 0.1, k=1, readout=None)
    with pytest.raises(ValueError, match=r"SoftHebb .*layer 'Linear' .*k=6 takes at least 6 neurons, but it has 5"):
        bioopt.SoftHebb(nn.Linear(4, 5), 0.1, k=6, readout=None)
    assert bioopt.Hebbian(lonely, 0.1, competition="none", readout=None)
    with pytest.raises(ValueError, match=r"layer 'Linear' .*k=6 takes at least 6 neurons, but it has 5"):
        bioopt.Hebbian(nn.Linear(4, 5), 0.1, competition="k", k=6, readout=None)
    with pytest.raises(ValueError, match="k=6 takes at least 6 neurons"):  # in a group, too
        bioopt.Hebbian([{"params": nn.Linear(4, 5), "competition": "k", "k": 6}], 0.1, readout=None)
    with pytest.raises(ValueError, match=r"layer 'Conv2d' .*rank=4 takes at least 4 neurons, but it has 3 in each"):
        bioopt.KrotovHopfield(nn.Conv2d(2, 6, 3, groups=2), 0.1, rank=4, readout=None)
    for option in (
        {"competition": "fierce"},
        {"decay": "slow"},
        {"loser_strength": -1},
        {"k": 0},
        {"inverse_temperature": 0},
    ):
        with pytest.raises(ValueError, match=f"Hebbian: {next(iter(option))}="):
            bioopt.Hebbian(nn.Linear(4, 5), 0.1, readout=None, **option)


@pytest.mark.parametrize("form", ["labels", "activity"])
def test_a_readout_with_a_teacher_learns_the_target_for_its_own_activity(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, labels = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 2])
    told = [[1.0 if k == label else -0.5 for k in range(3)] for label in labels]
    if form == "activity":
        told = torch.randn(5, 3, dtype=torch.float64).tolist()
    seen, before = model[:2](x).detach(), [p.detach().clone() for p in model[2].parameters()]
    change = torch.zeros(3, 8, dtype=torch.float64)
    for t, h in zip(told, seen, strict=True):
        for k in range(3):
            change[k] += t[k] * (h - t[k] * before[0][k]) / 5
    optimizer = bioopt.Hebbian(model, 0.0, readout="teacher", readout_lr=0.3)
    optimizer.target = labels if form == "labels" else torch.tensor(told, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    optimizer.step()
    torch.testing.assert_close(model[2].weight.detach(), before[0] + 0.3 * change, rtol=0, atol=1e-12)
    assert torch.equal(model[2].bias, before[1])
    with pytest.raises(RuntimeError, match="given no target for this forward pass"):
        model(x)  # the target is used up


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(4, dtype=torch.long), r"target of shape \(4,\).*or have the shape \(5, 3\) of the readout '1'"),
        (torch.zeros(5), "target of shape .* type torch.float32 must be class labels"),
        (torch.tensor([0, 1, 2, 3, 0]), "labels outside 0 to 2, the neurons of '1'"),
    ],
    ids=["another batch", "no labels", "a class too many"],
)
def test_targets_that_do_not_fit_the_readout_are_refused(target: Tensor, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimizer = bioopt.Hebbian(model, 0.1, readout="teacher")
    optimizer.target = target
    with pytest.raises(ValueError, match=message):
        model(torch.randn(5, 6))


def test_a_taught_readout_tells_classes_apart() -> None:
    torch.manual_seed(0)
    means = 2 * torch.randn(4, 20)
    labels = torch.arange(200) % 4
    x = means[labels] + torch.randn(200, 20)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    optimizer = bioopt.Hebbian(model, 0.01, readout="teacher", readout_lr=1.0)
    for _ in range(60):
        optimizer.target = labels
        with torch.no_grad():
            model(x)
        optimizer.step()
    assert (model.eval()(x).argmax(1) == labels).float().mean() > 0.95


def test_sanger_finds_the_principal_components_of_patches_in_order() -> None:
    torch.manual_seed(0)
    images = torch.randn(30, 2, 6, 6, dtype=torch.float64).cumsum(3)
    images -= images.mean()
    layer = nn.Conv2d(2, 3, 2, bias=False).double()
    patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 8)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    optimizer = bioopt.Sanger(layer, 1.0 / values[-1].item(), readout=None)
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
    optimizer = bioopt.AntiHebbian(layer, 0.2, readout=None)
    for _ in range(600):
        layer(x)
        optimizer.step()
    correlation = torch.corrcoef(layer(x).detach().T)
    assert (correlation - torch.eye(5)).abs().max() < 1e-3


def test_bcm_neurons_become_selective() -> None:
    """Each comes to answer one of two patterns alone, as the theory has it for independent patterns."""
    torch.manual_seed(0)
    patterns = torch.tensor([[1.0, 0.2, 0.1], [0.1, 0.3, 1.0]])
    layer = nn.Linear(3, 6, bias=False)
    nn.init.uniform_(layer.weight, 0.1, 0.5)
    optimizer = bioopt.BCM(layer, 0.02, threshold_rate=0.5, readout=None)
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
    optimizer = bioopt.SoftHebb(layer, 0.05, readout=None)
    start = (layer.weight.norm(dim=1) - 1).abs().max().item()
    for _ in range(500):
        layer(torch.randn(32, 10))
        optimizer.step()
    assert (layer.weight.norm(dim=1) - 1).abs().max() < 0.1 * start


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"stride": 2, "padding": 2},
        {"dilation": 2, "bias": False},
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("learn", ["all neurons", "few neurons"])
def test_the_product_over_patches_is_autograd_s(
    options: dict, memory_format: torch.memory_format, learn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide convolutions on the CPU do not take autograd's own product; several chunks of the batch."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 256, 3, **options).double().to(memory_format=memory_format)
    x = torch.randn(40, 64, 9, 10, dtype=torch.float64).to(memory_format=memory_format)
    (synapse,) = find_synapses(layer)
    u = layer(x)
    s: Tensor | SparseSignal = torch.randn_like(u)
    if learn == "few neurons":  # then the product is sparse; some neurons learn nothing at all
        order = torch.rand(u.numel() // 256, 253, dtype=torch.float64).argsort(1)[:, :3] + 1
        s = SparseSignal(order + (order >= 100).long(), torch.randn(len(order), 3, dtype=torch.float64))
        assert not {0, 100, 255} & set(s.neurons.unique().tolist())
    dense = s.dense(u, 1) if isinstance(s, SparseSignal) else s
    (expected,) = torch.autograd.grad(u, layer.weight, dense, retain_graph=True)
    monkeypatch.setattr(torch.autograd, "grad", None)  # is not taken
    torch.testing.assert_close(local_product(Firing(synapse, x, None, False), u, s), expected, rtol=0, atol=1e-11)


def test_passes_add_up_to_one_batch() -> None:
    """All passes since the last step count, each event alike; a shared layer is two passes."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 6).double(), torch.randn(12, 5, dtype=torch.float64)
    change = oja_twin(layer, x, 0.1)
    before = layer.weight.detach().clone()
    optimizer = bioopt.Oja(layer, 0.1, readout=None)
    layer(x[:3])
    optimizer.zero_grad()
    with torch.no_grad():
        layer(x[3:])
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before + 0.1 * change, rtol=0, atol=1e-12)


def test_one_weight_in_two_layers_gathers_from_both() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 5, bias=False).double()
    two.weight = one.weight
    model = nn.Sequential(one, two)
    x = torch.randn(7, 5, dtype=torch.float64)
    change = oja_twin(one, x, 0.1) + oja_twin(two, one(x).detach(), 0.1)
    before = one.weight.detach().clone()
    optimizer = bioopt.Oja(model, 0.1, readout=None)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 1
    model(x)
    optimizer.step()
    torch.testing.assert_close(one.weight.detach(), before + 0.1 * change, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [rule for rule in ONE_PASS if rule in ORDINARY])
def test_locality(rule: type) -> None:
    """A trunk update does not change when weights downstream, the labels or the loss change."""
    changes = []
    for variant in range(3):
        model = mlp(sizes=(6, 5, 5, 4))
        if variant:
            with torch.no_grad():
                model[2].weight.mul_(3)
                model[4].weight.normal_()
        optimizer = rule(model, 0.1)
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y = torch.full((8,), variant)
        optimizer.step(lambda model=model, x=x, y=y, variant=variant: (1 + variant) * F.cross_entropy(model(x), y))
        changes.append(model[0].weight.detach().clone())
    assert torch.equal(changes[0], changes[1])
    assert torch.equal(changes[0], changes[2])


@pytest.mark.parametrize("rule", [rule for rule in ONE_PASS if rule in ORDINARY])
def test_the_delta_readout_is_what_backward_leaves_there(rule: type) -> None:
    model, twin = mlp(), mlp()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,))
    optimizer = rule(model, lr=0.0, readout_lr=0.1)
    plain = torch.optim.SGD(twin[2:].parameters(), 0.1)
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        plain.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", [rule for rule in ONE_PASS if rule in ORDINARY])
def test_an_event_without_a_batch_is_a_batch_of_one(rule: type) -> None:
    """With a bias, whose signal is summed over events, and a running value, where the rule has one."""
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for batched in (False, True):
        model = mlp()
        optimizer = rule(model, 0.1, readout="teacher")
        for event in x:
            optimizer.target = torch.tensor([1.0, 0, 0, 0]).view((1, 4) if batched else (4,))
            model(event.unsqueeze(0) if batched else event)
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"competition": "hard"}, {"competition": "k"}])
def test_the_strongest_of_an_event_without_a_batch(options: dict) -> None:
    x = torch.randn(6)
    results = []
    for event in (x, x.unsqueeze(0)):
        torch.manual_seed(0)
        layer = nn.Linear(6, 5)
        bioopt.Hebbian(layer, 0.1, readout=None, **options).step(lambda layer=layer, event=event: layer(event).sum())
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)


def test_a_teacher_of_an_empty_batch_teaches_nothing() -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = bioopt.Hebbian(model, 0.1, readout="teacher")
    optimizer.target = torch.zeros(0, dtype=torch.long)
    model(torch.zeros(0, 6, dtype=torch.float64))
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_readout_frozen_later_rests_while_the_others_learn() -> None:
    model, x = mlp(), torch.randn(5, 6, dtype=torch.float64)
    optimizer = bioopt.Hebbian(model, 0.1)
    model[-1].requires_grad_(False)
    before = [p.detach().clone() for p in (model[0].weight, model[-1].weight)]
    optimizer.step(lambda: model(x).square().mean())
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[-1].weight, before[1])


def test_bcm_measures_its_threshold_in_single_precision() -> None:
    """Squares of half precision are 0 below 2e-4 and infinite above 256."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(64, 6)
    optimizer = bioopt.BCM(layer, 0.0, readout=None)
    for scale in (1e-3, 1e-3):  # one step makes the threshold, the next divides by it
        with torch.autocast("cpu", torch.float16):
            layer(scale * x)
        optimizer.step()
    threshold = optimizer._own_state["running"][0]
    torch.testing.assert_close(threshold, (layer(1e-3 * x) ** 2).mean(0).detach(), rtol=0.02, atol=0)


@pytest.mark.parametrize("rule", [rule for rule in ONE_PASS if rule in ORDINARY])
def test_a_step_that_is_captured_reads_nothing_off_the_device(rule: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph needs it. Tensors without values stand for the device: to read one raises."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 4))
        x, y = torch.empty(5, 3, 8, 8), torch.empty(5, dtype=torch.long)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    optimizer = rule(model, lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step()  # a plain step reads a number: whether all are finite
    for module in (bioopt.core.rule, bioopt.core.errors):
        monkeypatch.setattr(module, "is_captured", lambda tensors: True)
    if rule is bioopt.BCM:  # which keeps thresholds
        with pytest.raises(RuntimeError, match="keeps running state"):
            step()
    else:
        devices = _Devices()
        with devices:
            step()
        assert not devices.crossed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_is_a_plain_one() -> None:
    device = torch.device("cuda")
    x = torch.randn(4, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    one, two = (bench_hebbian.trunk(0.1, device) for _ in range(2))
    replay, step = bench_hebbian.captured(one, x), bench_hebbian.plastic(two, x)
    replay()
    for _ in range(4):  # three before the capture
        step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class _Devices(TorchDispatchMode):
    """Watches for operations that bring something from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if len({t.device for t in tensors}) > 1:
            self.crossed.append(str(func))
        return result


@pytest.mark.parametrize("competition", ["soft", "k"])
def test_a_large_inverse_temperature_is_one_in_half_precision(competition: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5, bias=False), torch.randn(64, 6)
    optimizer = bioopt.Hebbian(layer, 0.1, inverse_temperature=1e6, competition=competition, readout=None)
    with torch.autocast("cpu", torch.float16):
        layer(x)
    optimizer.estimate()
    half = layer.weight.grad
    optimizer.close()
    sharp = bioopt.Hebbian(layer, 0.1, competition="hard", readout=None)
    layer(x)
    sharp.estimate()
    torch.testing.assert_close(half, layer.weight.grad, rtol=0, atol=2e-3)


def test_oja_finds_the_principal_component() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    x -= x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    layer = nn.Linear(6, 3, bias=False).double()
    optimizer = bioopt.Oja(layer, 0.5 / values[-1].item(), readout=None)
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
    """Competition: each neuron comes to stand for one cluster, of unit length."""
    torch.manual_seed(1)
    centres = torch.eye(4) * 3
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4) * 0.5 + 0.05 * torch.randn(4, 4))
    optimizer = bioopt.Hebbian(layer, 0.1, inverse_temperature=5.0, readout=None)
    for _ in range(300):
        layer(centres[torch.randint(4, (32,))] + 0.1 * torch.randn(32, 4))
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.eye(4), atol=0.1, rtol=0)


def test_temperature_may_differ_between_groups() -> None:
    model = mlp(sizes=(6, 5, 5))
    twin = mlp(sizes=(6, 5, 5))
    optimizer = bioopt.Hebbian(
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


def test_readout_by_name_module_and_group() -> None:
    model = mlp(sizes=(6, 5, 5, 4))
    for wanted in ("4", model[4], None):
        optimizer = bioopt.Hebbian(model, 0.1, readout_layer=wanted, readout_lr=0.3)
        assert optimizer.coverage() == {
            "0.weight": "Hebbian", "0.bias": "frozen", "2.weight": "Hebbian", "2.bias": "frozen",
            "4.weight": "Hebbian readout (delta)", "4.bias": "Hebbian readout (delta)",
        }  # fmt: skip
        assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.3]
        optimizer.close()
    optimizer = bioopt.Hebbian([{"params": model[:4]}, {"params": model[4], "lr": 0.7}], 0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.7]  # the group that holds it gives its rate
    optimizer = bioopt.Hebbian(model, 0.1, readout_options={"momentum": 0.9})
    assert [g["momentum"] for g in optimizer.param_groups] == [0, 0.9]


def test_readout_mistakes_are_explained() -> None:
    model = mlp(sizes=(6, 5, 5, 4))
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="readout='oops' must be 'delta', 'teacher' or None"):
        bioopt.Hebbian(model, 0.1, readout="oops")
    with pytest.raises(ValueError, match="readout_lr=-1"):
        bioopt.Hebbian(model, 0.1, readout_lr=-1)
    with pytest.raises(ValueError, match=r"readout_layer='head' is not one of the synapses: 0, 2, 4"):
        bioopt.Hebbian(model, 0.1, readout_layer="head")
    with pytest.raises(ValueError, match="need a readout, not readout=None"):
        bioopt.Hebbian(model, 0.1, readout=None, readout_lr=0.1)
    optimizer = bioopt.Hebbian(model, 0.1, readout_layer="2")
    with pytest.raises(RuntimeError, match=r"'4' fires after the readout '2'.*readout_layer='4'"):
        optimizer.step(lambda: model(x).sum())
    optimizer.close()
    optimizer = bioopt.Hebbian(model, 0.1)
    model(x)
    with pytest.raises(RuntimeError, match=r"no gradient has reached it: call loss\.backward\(\)"):
        optimizer.step()


def test_models_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Hebbian\(model, ...\).*not Hebbian\(model\.parameters\(\)"):
        bioopt.Hebbian(mlp().parameters(), 0.1)
    with pytest.raises(TypeError, match="needs the model"):
        bioopt.Hebbian(list(mlp().named_parameters()), 0.1)
    with pytest.raises(ValueError, match=r"no plastic layer.* Lazy layers become one in the first"):
        bioopt.Hebbian(nn.Sequential(nn.Flatten(), nn.ReLU()), 0.1)
    with pytest.raises(ValueError, match="no plastic layer"):
        bioopt.Hebbian(mlp().requires_grad_(False), 0.1)
    attention = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.raises(
        ValueError, match=r"layer '1' of type MultiheadAttention.*register_synapse.*Mixed.*requires_grad_"
    ):
        bioopt.Hebbian(attention, 0.1)
    for made_anew in (
        l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
    ):
        with pytest.raises(
            ValueError, match=r"layer '1' of type Linear .*is computed from other parameters.*undo.*Mixed.*freeze"
        ):
            bioopt.Hebbian(nn.Sequential(nn.Linear(4, 4), made_anew), 0.1)
        frozen = nn.Sequential(nn.Linear(4, 4), made_anew.requires_grad_(False))
        assert len(bioopt.Hebbian(frozen, 0.1, readout=None).param_groups[0]["params"]) == 1
    attention[1].requires_grad_(False)
    assert len(bioopt.Hebbian(attention, 0.1, readout=None).param_groups[0]["params"]) > 0
    with pytest.raises(ValueError, match=r"only plastic layer, '0', is the readout.*readout=None"):
        bioopt.Hebbian(attention, 0.1)


def test_a_layer_that_never_fires_is_named() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = bioopt.Hebbian(model, 0.1, readout=None)
    with pytest.warns(UserWarning, match="did not fire and learn nothing: '1'"):
        optimizer.step(lambda: model[0](torch.randn(3, 4)).sum())


def test_a_plastic_step_needs_little_more_memory_than_inference() -> None:
    """At most one layer's activities and one copy of the weights: each product is formed as its layer fires."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(256, 256, 3, padding=1, bias=False) for _ in range(3)])
    model, x = model.to(memory_format=torch.channels_last), torch.randn(32, 256, 8, 8)
    x = x.to(memory_format=torch.channels_last)

    def peak(step: Callable[[], object]) -> int:
        step()
        for p in model.parameters():
            p.grad = None
        return allocated(step)

    def inference() -> None:
        with torch.no_grad():
            model(x)

    least = peak(inference)
    activities, weights = x.numel() * 4, sum(p.numel() for p in model.parameters()) * 4
    for rule, solver in ((bioopt.SoftHebb, 0), (bioopt.Oja, 0), (bioopt.KrotovHopfield, 0), (bioopt.Hebbian, 1)):
        optimizer = rule(model, 0.01, readout=None)

        def step(optimizer: bioopt.LearningRule = optimizer) -> None:
            inference()
            optimizer.step()

        extra = peak(step) - least
        optimizer.close()
        assert extra <= activities + weights + solver * weights / 2, (
            rule.__name__,
            extra / activities,
            weights / activities,
        )
