"""Homeostasis, the rules under it, and the readout on standardised activity, against slow twins."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.homeostasis import EVENTS, RATE, WARM_UP, inhibit_, together

from ..rules import cnn, mlp, per_sample

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "linear, no bias": lambda: nn.Linear(7, 5, bias=False),
    "linear, wide": lambda: nn.Linear(3, 5),
    "conv": lambda: nn.Conv2d(2, 6, 3),
    "conv, groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv, no bias": lambda: nn.Conv2d(2, 6, 3, bias=False),
}


def layer_and_input(name: str, seed: int = 0, shift: float = 1.0) -> tuple[Any, Tensor]:
    torch.manual_seed(seed)
    layer = LAYERS[name]().double()
    channels = layer.in_features if name.startswith("linear") else layer.in_channels
    shape = (40, channels) if name.startswith("linear") else (12, channels, 5, 5)
    return layer, 2 * torch.randn(shape, dtype=torch.float64) + shift


def batches(x: Tensor, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [x[torch.randperm(len(x), generator=generator)] + 0.01 * i for i in range(count)]


def events(u: Tensor) -> Tensor:
    """Events × neurons."""
    return u.movedim(1, -1).reshape(-1, u.shape[1])


def patches(layer: Any, x: Tensor) -> Tensor:
    """Pools × events × inputs of a neuron."""
    if isinstance(layer, nn.Linear):
        return x.unsqueeze(0)
    rows = F.unfold(x, layer.kernel_size).movedim(1, -1).reshape(-1, layer.groups, layer.weight[0].numel())
    return rows.movedim(1, 0)


class Twin:
    """Homeostasis of one layer, written out neuron by neuron; with a rule, its rotation too."""

    def __init__(
        self, layer: Any, rule: Any = None, lr: float = 0.0, settle: float = 20.0, whitening: float = 0.0
    ) -> None:
        self.layer, self.rule, self.lr, self.settle, self.steps = copy.deepcopy(layer), rule, lr, settle, 0
        self.whitening, self.covariance, self.inverse = whitening, None, None
        self.seen = 0
        self.mean = self.variance = self.input = None

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """Returns what the layers above receive."""
        layer, weight = self.layer, self.layer.weight
        bias = torch.zeros(len(weight), dtype=weight.dtype) if layer.bias is None else layer.bias
        u = layer(x)
        rows, pre = events(u), patches(layer, x)
        n = len(rows)
        acts = self.rule is not None and self.steps >= WARM_UP
        if self.mean is None:
            self.mean, self.variance = rows.mean(0), rows.var(0, unbiased=False)
        m, s = self.mean.clone(), self.variance.sqrt()
        z = (rows - m) / s
        shape = (-1, *[1] * (u.ndim - 2))
        kept = 0.5 if isinstance(layer, nn.Linear) and layer.bias is not None else 0.0
        handed_on = u if self.steps else kept + (u - m.view(shape)) / s.view(shape) / 2
        r = max(RATE, n / (self.seen + n))
        self.seen += n
        for k in range(len(weight)):
            shift = (rows[:, k] - m[k]).mean()
            square = (rows[:, k] - m[k]).square().mean()
            self.mean[k] = m[k] + r * shift
            self.variance[k] = (1 - r) * s[k] ** 2 + r * (square - shift**2) + r * (1 - r) * shift**2
        if not isinstance(layer, nn.Conv2d):  # of which each neuron has several events a sample
            self.whitening = 0.0
        if acts and self.whitening:
            self.whiten(pre, r)
        if acts:
            if isinstance(layer, nn.Linear):
                of_batch = x.mean(0, keepdim=True)
            else:
                by_channel = x.mean((0, 2, 3)).view(layer.groups, -1)
                of_batch = by_channel.repeat_interleave(layer.kernel_size[0] * layer.kernel_size[1], 1)
            self.input = of_batch if self.input is None else torch.lerp(self.input, of_batch, r)
        before = self.expected()
        length = weight.flatten(1).norm(dim=1)
        if acts:
            self.turn(z, pre, length)
        share = 1.0 if not self.steps else max(RATE, 1 / (1 + self.steps))
        for k in range(len(weight)):
            gain = (2 * self.variance[k].sqrt()) ** -share
            gain = gain.clamp(0.1, 10) if self.steps else gain
            weight[k] *= gain * length[k] / weight[k].norm()
            self.variance[k] *= gain**2
            self.mean[k] = gain * (self.mean[k] - bias[k] - before[k])
        self.mean += self.expected()
        if layer.bias is not None:
            layer.bias.copy_(kept - self.mean)
            self.mean = torch.full_like(self.mean, kept)
        self.steps += 1
        return handed_on

    def expected(self) -> Tensor:
        rows = self.layer.weight.flatten(1)
        if self.input is None:
            return rows.new_zeros(len(rows))
        pools = len(self.input)
        return (rows.view(pools, -1, rows.shape[1]) * self.input.unsqueeze(1)).sum(-1).flatten()

    def whiten(self, pre: Tensor, r: float) -> None:
        """The running covariance about the mean of the last step, and at steps 1, 2, 4, … the inhibition by it."""
        now = []
        for p, rows in enumerate(pre):
            off = rows - (rows.mean(0) if self.input is None else self.input[p])
            now.append(sum(torch.outer(event, event) for event in off) / len(off))
        old, step = self.covariance, self.steps - WARM_UP + 1
        self.covariance = now if old is None else [(1 - r) * a + r * b for a, b in zip(old, now, strict=True)]
        if step in (1, 2, 4, 8):
            inputs = pre.shape[2]
            strength = [self.whitening * inputs / c.trace() for c in self.covariance]
            lateral = [k * c for k, c in zip(strength, self.covariance, strict=True)]
            self.inverse = [torch.linalg.inv(torch.eye(inputs, dtype=c.dtype) + c) for c in lateral]

    def turn(self, z: Tensor, pre: Tensor, length: Tensor) -> None:
        """The rule's rotation of every weight vector."""
        weight = self.layer.weight
        pools, neurons = len(pre), len(weight) // len(pre)
        signal = self.rule["signal"](z.view(len(z), pools, neurons))
        unit = weight.flatten(1) / length.unsqueeze(1)
        unit, drive = unit.view(pools, neurons, -1), torch.zeros(pools, neurons, weight[0].numel(), dtype=weight.dtype)
        size = torch.zeros(pools, neurons, dtype=weight.dtype)
        products = torch.zeros_like(drive)
        for p in range(pools):
            for k in range(neurons):
                for e in range(len(z)):
                    seen = pre[p, e] - self.input[p]
                    if self.whitening:
                        seen = self.inverse[p] @ seen
                    products[p, k] += signal[e, p, k] * seen / len(z)
                size[p, k] = products[p, k].norm()
        for p in range(pools):
            drive[p] = self.rule["drive"](products[p], unit[p])
        turned = torch.zeros_like(drive)
        for p in range(pools):
            for k in range(neurons):
                turned[p, k] = drive[p, k] - (drive[p, k] @ unit[p, k]) * unit[p, k]
        largest = max(size.max(), turned.norm(dim=-1).max())
        events = self.seen / (self.steps + 1)  # of a step
        rate = self.lr / (1 + (self.steps - WARM_UP) * math.sqrt(math.sqrt(events / 64)) / self.settle)
        new = unit + rate * turned / largest
        weight.copy_((new.view(len(weight), -1) * length.unsqueeze(1)).view_as(weight))


@pytest.mark.parametrize("name", LAYERS)
def test_homeostasis_equals_its_twin(name: str) -> None:
    layer, x = layer_and_input(name)
    twin, optimizer = Twin(layer), bioopt.Homeostasis(layer, readout=None)
    for batch in batches(x, 25):
        received: list[Tensor] = []

        def closure(batch: Tensor = batch, received: list[Tensor] = received) -> Tensor:
            received.append(layer(batch))
            return received[-1].sum()

        optimizer.step(closure)
        torch.testing.assert_close(received[0].detach(), twin.step(batch), rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.weight.detach(), twin.layer.weight.detach(), rtol=0, atol=1e-10)
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias.detach(), twin.layer.bias.detach(), rtol=0, atol=1e-10)
    u = events(layer(x + 0.24).detach())
    assert (u.var(0, unbiased=False).sqrt() - 0.5).abs().max() < 0.05
    if layer.bias is not None:
        assert (u.mean(0) - (0.5 if isinstance(layer, nn.Linear) else 0)).abs().max() < 0.1


def hebbian_drive(p: Tensor, v: Tensor) -> Tensor:
    """More neurons than inputs represent the input once together."""
    return p - min(1, v.shape[1] / len(v)) * p @ v.T @ v


RULES = {
    "oja": (bioopt.Oja, {}, {"signal": lambda z: z, "drive": lambda p, v: p}),
    "sanger": (bioopt.Sanger, {}, {"signal": lambda z: z, "drive": lambda p, v: p - (p @ v.T).tril() @ v}),
    "softhebb": (
        bioopt.SoftHebb,
        {"inverse_temperature": 2.0},
        {
            "signal": lambda z: torch.where(
                z == z.amax(-1, keepdim=True), torch.softmax(2 * z, -1), -torch.softmax(2 * z, -1)
            ),
            "drive": lambda p, v: p,
        },
    ),
    "hebbian": (
        bioopt.Hebbian,
        {"inverse_temperature": 3.0},
        {"signal": lambda z: torch.softmax(3 * z, -1) * z, "drive": hebbian_drive},
    ),
    "krotov_hopfield": (
        bioopt.KrotovHopfield,
        {},
        {
            "signal": lambda z: (
                (z == z.amax(-1, keepdim=True)).double() - 0.4 * (z == z.sort(-1).values[..., -2:-1]).double()
            ),
            "drive": lambda p, v: p,
        },
    ),
    "bcm": (bioopt.BCM, {}, {"signal": lambda z: z.clamp(min=0) * (z.clamp(min=0) - 1), "drive": lambda p, v: p}),
}


@pytest.mark.parametrize("name", ["linear", "linear, wide", "conv, groups", "conv, no bias"])
@pytest.mark.parametrize("whitening", [0.0, 2.0])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_turns_weight_vectors_as_its_twin(
    rule: str, whitening: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bioopt.core.whitening.LEAST_EVENTS", 1000)  # all that there are
    build, options, written_out = RULES[rule]
    layer, x = layer_and_input(name, seed=1)
    twin = Twin(layer, written_out, lr=0.2, whitening=whitening)
    optimizer = build(layer, 0.2, whitening=whitening, inhibition=0.0, settle=20.0, readout=None, **options)
    for batch in batches(x, WARM_UP + 5):
        optimizer.step(lambda batch=batch: layer(batch).sum())
        twin.step(batch)
        torch.testing.assert_close(layer.weight.detach(), twin.layer.weight.detach(), rtol=0, atol=1e-9)


def test_hebbian_neurons_that_represent_their_input_once_stay_as_they_are() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 6).double()
    angles = torch.arange(6) * torch.pi / 6
    with torch.no_grad():
        layer.weight.copy_(torch.stack([angles.cos(), angles.sin()], 1))  # VᵀV is 3 times the identity
    before = layer.weight.detach().clone()
    optimizer = bioopt.Hebbian(layer, readout=None)
    for _ in range(20):
        layer(torch.randn(50, 2, dtype=torch.float64) * torch.tensor([1.0, 3.0]))
        optimizer.step()
    assert F.cosine_similarity(layer.weight.detach(), before).min() > 1 - 1e-9


def test_a_rule_turns_weights_from_the_second_step_on() -> None:
    layer, x = layer_and_input("linear")
    optimizer = bioopt.Hebbian(layer, readout=None)
    for turns in (False, True):
        before = layer.weight.detach().clone()
        layer(x)
        optimizer.step()
        assert (F.cosine_similarity(layer.weight.detach(), before).min() < 1 - 1e-6) == turns


def test_correlated_neurons_inhibit_each_other() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    with torch.no_grad():
        layer.weight[1] = layer.weight[0] + 0.05 * torch.randn(6)
    x = torch.randn(400, 6, dtype=torch.float64)

    def correlation() -> float:
        return torch.corrcoef(layer(x).detach().T)[0, 1].item()

    before = correlation()
    optimizer = bioopt.AntiHebbian(layer, 0.05, tolerance=0.5, settle=0.0, readout=None)
    for _ in range(100):
        optimizer.step(lambda: layer(x).sum())
    assert before > 0.8
    assert abs(correlation()) < 0.6


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 4, 1, 1), (4, 3, 5), (7, 4)], ids=str)
@pytest.mark.parametrize("pools", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_activity_of_pairs_of_neurons(shape: tuple[int, ...], pools: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    z, channel = torch.randn(shape, dtype=torch.float64), 0 if len(shape) == 3 else 1
    if channels_last and len(shape) == 4:
        z = z.to(memory_format=torch.channels_last)
    rows = z.movedim(channel, -1).reshape(-1, 4)
    every, size = rows.T @ rows, 4 // pools
    expected = torch.stack([every[start : start + size, start : start + size] for start in range(0, 4, size)])
    torch.testing.assert_close(together(z, channel, pools), expected)


@pytest.mark.parametrize("pools", [1, 3])
@pytest.mark.parametrize("tolerance", [0.0, 0.2, 0.95, 0.999], ids=lambda t: f"tolerance {t}")
def test_inhibition_equals_its_formula(pools: int, tolerance: float) -> None:
    """Densely, sparsely (many neurons, few of them correlated), and of none."""
    torch.manual_seed(0)
    z = torch.randn(pools, 70, 12, dtype=torch.float64)
    drive, direction = torch.randn(2, pools, 70, 5, dtype=torch.float64)
    unit, strength = torch.rand(pools * 70, dtype=torch.float64) + 0.5, torch.tensor(0.7, dtype=torch.float64)
    expected = drive.clone()
    for p in range(pools):
        size = z[p].norm(dim=1)
        for k in range(70):
            for j in range(70):
                c = (z[p, k] @ z[p, j] / (size[k] * size[j])).item() if j != k else 0.0
                beyond = max(abs(c) - tolerance, 0.0) * (1 if c > 0 else -1)
                expected[p, k] -= 0.7 * beyond * unit[70 * p + k] / unit[70 * p + j] * direction[p, j]
    found = inhibit_(drive, z @ z.mT, direction, unit, tolerance, strength)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.SoftHebb, bioopt.BCM, bioopt.Homeostasis])
def test_the_scale_and_shift_of_the_input_make_no_difference(rule: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(64, 8, dtype=torch.float64), torch.randint(3, (64,))
    outputs = []
    for scale, shift in ((1.0, 0.0), (255.0, 0.0), (1e-3, 0.0), (3.0, 7.0)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        optimizer = rule(model)
        for _ in range(25):
            optimizer.zero_grad()
            F.cross_entropy(model(scale * x + shift), y).backward()
            optimizer.step()
        outputs.append(model(scale * x + shift).detach())
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=0, atol=1e-6)


def test_nothing_changes_in_evaluation_or_before_the_step() -> None:
    model = cnn()
    x = torch.randn(20, 2, 8, 8)
    optimizer = bioopt.Hebbian(model)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    model(x)
    model.train()
    loss = F.cross_entropy(model(x), torch.randint(5, (20,)))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in before.items() if name in parameters)
    loss.backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_loss_that_is_thrown_away_teaches_no_level() -> None:
    models = [cnn(dropout=0.0), cnn(dropout=0.0)]
    rules = [bioopt.Homeostasis(model) for model in models]
    y = torch.randint(5, (20,))
    for step in range(3):
        x = torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(step))
        for i, (model, rule) in enumerate(zip(models, rules, strict=True)):
            if i and step:
                model[1].eval()  # so that the batch leaves no trace in batch norm
                F.cross_entropy(model(x + 50), y)
                model[1].train()
            rule.zero_grad()
            F.cross_entropy(model(x), y).backward()
            rule.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.Homeostasis])
def test_goes_on_bit_for_bit(rule: Any) -> None:
    def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(20, 2, 8, 8, generator=generator), torch.randint(5, (20,), generator=generator)
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    model = cnn()
    optimizer = rule(model)
    train(model, optimizer, 0, 15)
    other = copy.deepcopy(model)
    resumed = rule(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 15, 20)
    train(other, resumed, 15, 20)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rule", [bioopt.SoftHebb, bioopt.BCM, bioopt.Oja])
def test_learns_the_same_in_half_precision(rule: Any) -> None:
    found = []
    for amp in (False, True):
        model = cnn(dropout=0.0)
        optimizer = rule(model, settle=0.0)
        for step in range(WARM_UP + 5):
            x = torch.randn(20, 2, 8, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(model(x), torch.arange(20) % 5)
            loss.backward()
            optimizer.step()
        found.append(torch.cat([model[0].weight.detach().flatten(), model[4].weight.detach().flatten()]))
        assert model[0].weight.dtype == torch.float32
    assert F.cosine_similarity(found[0], found[1], 0) > 0.995


def test_micro_batches_of_one_step_count_together() -> None:
    layer, x = layer_and_input("linear")
    other = copy.deepcopy(layer)
    rules = bioopt.Homeostasis(layer, readout=None), bioopt.Homeostasis(other, readout=None)
    for batch in batches(x, 3):
        layer(batch)
        rules[0].step()
        if rules[0]._own_state["homeostasis"][0]["steps"] == 1:  # the first firing sets the start
            other(batch)
        else:
            other(batch[:10]), other(batch[10:])
        rules[1].step()
    torch.testing.assert_close(layer.weight, other.weight, rtol=0, atol=1e-10)


def test_too_few_events_wait() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = bioopt.Homeostasis(layer, readout=None)
    generator = torch.Generator().manual_seed(0)
    for step in range(2 * EVENTS):
        optimizer.step(lambda: layer(torch.randn(1, 3, generator=generator)).sum())
        assert torch.equal(layer.weight, before) == (step < EVENTS - 1)
    assert layer.weight.isfinite().all()


def test_a_constant_input_is_named_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    optimizer = bioopt.Hebbian(model)
    y = torch.randint(2, (20,))
    with pytest.warns(UserWarning, match=r"activity of layer '0' is the same for all 20 events"):
        loss = F.cross_entropy(model(torch.ones(20, 3)), y)
    loss.backward()
    optimizer.step()
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.ones(20, 3)), y).backward()
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_frozen_or_excluded_bias_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone(), model[2].bias.detach().clone()
    optimizer = bioopt.Homeostasis(model, exclude=["2.bias"])
    for step in range(3):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(step)) + 1
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(2, (20,))).backward()
        optimizer.step()
    assert torch.equal(model[0].bias, before[0])
    assert torch.equal(model[2].bias, before[1])
    assert optimizer.coverage()["0.weight"] == "Homeostasis"
    assert optimizer.coverage()["2.bias"] == "excluded"


def test_homeostasis_is_on_or_off() -> None:
    with pytest.raises(ValueError, match=r"SoftHebb: homeostasis='yes' must be True or False"):
        bioopt.SoftHebb(cnn(), homeostasis="yes")


# -- the readout on standardised activity ---------------------------------------------------------------------------


class StandardisedReadout:
    """Gradient descent of ``v, c`` in ``u = v (x - μ) / σ + c``, each principal component at a rate of its own."""

    def __init__(self, layer: nn.Linear, momentum: float) -> None:
        self.w, self.b = (p.detach().clone() for p in layer.parameters())
        self.momentum, self.velocity = momentum, [torch.zeros_like(self.w), torch.zeros_like(self.b)]
        self.steps = 0

    def follow(self, h: Tensor) -> None:
        mean, variance = h.mean(0), h.var(0, unbiased=False)
        if not self.steps:
            generator = torch.Generator().manual_seed(0)
            columns = torch.randn(h.shape[1], min(16, h.shape[1]), generator=generator, dtype=torch.float64)
            self.q, self.eigenvalues = torch.linalg.qr(columns)[0], torch.zeros(columns.shape[1]).double()
            self.mean, self.variance = mean, variance
        else:
            z = (h - self.mean) / self.deviation
            r, first = max(0.05, 1 / (1 + self.steps)), max(0.05, 1 / self.steps)
            covariance = first * z.T @ z / len(h) + (1 - first) * self.q @ torch.diag(self.eigenvalues) @ self.q.T
            self.q, triangle = torch.linalg.qr(covariance @ self.q)
            self.eigenvalues = triangle.diag().abs()
            shift = mean - self.mean
            self.mean = self.mean + r * shift
            self.variance = (1 - r) * self.variance + r * (variance + (1 - r) * shift**2)
        self.steps += 1
        offset = 1e-6 * self.mean.square().mean() + 1e-9
        self.deviation = (self.variance + 0.1 * self.variance.mean() + offset).sqrt()

    def step(self, h: Tensor, y: Tensor, lr: float) -> None:
        self.follow(h)
        v = (self.w * self.deviation).requires_grad_()
        c = (self.b + self.w @ self.mean).requires_grad_()
        F.cross_entropy((h - self.mean) / self.deviation @ v.T + c, y).backward()
        assert v.grad is not None
        assert c.grad is not None
        share = self.variance / self.deviation**2
        if self.steps <= 10:
            rates, noise = torch.eye(len(share)).double() / (1 + share.sum()), 1.0
        else:
            bound = max(float(self.eigenvalues[-1]), 0.1)
            outside = torch.eye(len(share)).double() - self.q @ self.q.T
            rates = outside / bound + self.q @ torch.diag(1 / (self.eigenvalues + bound)) @ self.q.T
            known = self.eigenvalues / (self.eigenvalues + bound)
            trace = known.sum() + (share.sum() - self.eigenvalues.sum()).clamp(min=0) / bound
            noise = 1 + 6 * float(trace) / len(h)
        change = v.grad @ rates / noise / self.deviation, c.grad / noise
        change = change[0], change[1] - change[0] @ self.mean
        self.velocity = [self.momentum * old + new for old, new in zip(self.velocity, change, strict=True)]
        self.w, self.b = self.w - lr * self.velocity[0], self.b - lr * self.velocity[1]


def test_the_readout_learns_as_by_gradients_of_standardised_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    optimizer = bioopt.Homeostasis(model, lr=0.0)
    twin = StandardisedReadout(model[2], momentum=0.9)
    for _ in range(15):
        x, y = torch.randn(50, 5, dtype=torch.float64), torch.randint(3, (50,))
        twin.step(model[1](model[0](x)).detach(), y, optimizer.param_groups[-1]["lr"])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(model[2].weight.detach(), twin.w, rtol=0, atol=1e-11)
    torch.testing.assert_close(model[2].bias.detach(), twin.b, rtol=0, atol=1e-11)


def test_the_readout_finds_the_principal_components_of_its_input() -> None:
    torch.manual_seed(0)
    sizes = 0.8 ** torch.arange(20, dtype=torch.float64)
    x = torch.randn(400, 20, dtype=torch.float64) @ (sizes.unsqueeze(1) * torch.randn(20, 40).double()) + 4
    model = nn.Sequential(nn.Identity(), nn.Linear(40, 40), nn.Linear(40, 3)).double()
    optimizer = bioopt.Homeostasis(model, lr=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(400) % 3).backward()
        optimizer.step()
    h = model[1](x).detach()
    variance = h.var(0, unbiased=False)
    z = (h - h.mean(0)) / (variance + 0.1 * variance.mean() + 1e-6 * h.mean(0).square().mean()).sqrt()
    wanted = torch.linalg.eigvalsh(z.T @ z / 400).flip(0)[:16]
    level = next(iter(optimizer.state_dict()["state"]["rule"]["readout"].values()))
    torch.testing.assert_close(level["eigenvalues"], wanted, rtol=0.05, atol=0)
    q = level["components"]
    torch.testing.assert_close((q.T @ z.T @ z @ q / 400).diag(), wanted, rtol=0.05, atol=0)


def test_a_convolution_and_a_layer_without_bias_can_be_readouts_on_standardised_activity() -> None:
    torch.manual_seed(0)
    x, y = 100 * torch.rand(64, 3, 8, 8) + 300, torch.randint(4, (64,))
    for readout in (
        nn.Sequential(nn.Conv2d(20, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Conv2d(20, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(720, 4, bias=False)),
    ):
        model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), *readout)
        optimizer = bioopt.Homeostasis(model, lr=0.0)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]
        assert max(losses) < 4 * losses[0]


def test_a_given_rate_is_that_of_the_plain_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(50, 5), torch.randint(3, (50,))
    optimizer = bioopt.Homeostasis(model, lr=0.0, readout_lr=0.1)
    wanted = torch.autograd.grad(F.cross_entropy(model(x), y), model[2].weight)[0]
    before = model[2].weight.detach().clone()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(model[2].weight.detach(), before - 0.1 * wanted)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 255.0])
@pytest.mark.long
def test_the_readout_is_stable_on_any_scale(loss: str, scale: float) -> None:
    torch.manual_seed(0)
    x, y = scale * (torch.rand(64, 40) + 3), torch.randint(4, (64,))
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    optimizer = bioopt.Homeostasis(model, lr=0.0)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        u = model(x)
        value = F.cross_entropy(u, y) if loss == "cross_entropy" else (u - F.one_hot(y, 4)).square().sum(1).mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    assert max(losses) < 4 * losses[0]


def test_a_step_that_diverges_is_refused_long_before_the_weights_are_lost() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3))
    optimizer = bioopt.Hebbian(model, 50.0, homeostasis=False, decay="none", readout_lr=0.1)
    x, y = 10 * torch.randn(64, 20), torch.randint(3, (64,))

    def train() -> None:
        for _ in range(1000):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    with pytest.raises(bioopt.Diverged, match=r"Hebbian: this step would change each weight of '.*' by .* on average"):
        train()
    assert max(p.detach().abs().max().item() for p in model.parameters()) < 1e6


@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.SoftHebb, bioopt.KrotovHopfield, bioopt.AntiHebbian])
def test_depthwise_convolutions_have_homeostasis_alone(rule: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.Flatten()),
        nn.Linear(128, 3),
    )
    with pytest.warns(UserWarning, match="layer '2' learns by homeostasis alone, because .* 1 in each group") as caught:
        optimizer = rule(model)
    assert len(caught) == 1
    covered = optimizer.coverage()
    assert covered["0.weight"] == covered["4.bias"] == rule.__name__
    assert covered["2.weight"] == covered["2.bias"] == f"{rule.__name__} (homeostasis)"
    before = [model[i].weight.detach().flatten(1).clone() for i in (0, 2)]
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.rand(32, 1, 8, 8)), torch.arange(32) % 3).backward()
        optimizer.step()
    turned = [1 - F.cosine_similarity(model[i].weight.flatten(1), w).min() for i, w in zip((0, 2), before, strict=True)]
    assert turned[0] > 1e-4 or rule is bioopt.AntiHebbian  # whose neurons are not correlated here
    assert turned[1] < 1e-6
    model(x := torch.rand(200, 1, 8, 8))
    assert torch.allclose(model[:3](x).std((0, 2, 3)), torch.full((6,), 0.5), atol=0.1)


def test_a_network_of_lone_neurons_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(ValueError, match="1 in each group"):
        bioopt.Hebbian(model)


@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.AntiHebbian, bioopt.LocalContrastive])
@pytest.mark.parametrize(("first", "batch"), [("zeros", 32), ("ones", 28), ("one sample", 28), ("one sample", 32)])
@pytest.mark.long
def test_batches_whose_inputs_are_all_alike_do_no_harm(rule: Any, first: str, batch: int) -> None:
    """Rows of 28 are rounded differently."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(1000, 20) + 4 * torch.eye(20)[torch.arange(1000) % 3]
    y = torch.arange(1000) % 3
    alike = {"zeros": torch.zeros(batch, 20), "ones": torch.ones(batch, 20), "one sample": x[:1].expand(batch, -1)}
    told = pytest.warns(UserWarning, match="is the same for all")
    with contextlib.nullcontext() if rule is bioopt.LocalContrastive else told:
        optimizer = rule(model)
        for _ in range(6):
            optimizer.step(per_sample(optimizer, model, alike[first], y[:batch]))
    assert max(float(model[i].weight.detach().norm()) for i in (0, 2)) < 20
    for i in range(0, 960, 16):
        optimizer.step(per_sample(optimizer, model, x[i : i + batch], y[i : i + batch]))
    assert float(F.cross_entropy(model(x), y).detach()) < 1.0


@pytest.mark.parametrize("rule", [bioopt.Homeostasis, bioopt.Hebbian])
def test_a_first_batch_with_nan_that_is_skipped_leaves_no_trace(rule: Any) -> None:
    plain, disturbed = mlp(), mlp()
    torch.manual_seed(0)
    x, y = torch.randn(32, 6).double(), torch.arange(32) % 4
    for model in (plain, disturbed):
        optimizer = rule(model)
        if model is disturbed:
            assert not F.cross_entropy(model(x.masked_fill(x == x.max(), float("nan"))), y).isfinite()
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for p, q in zip(plain.parameters(), disturbed.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_state_in_single_precision_serves_a_model_in_double() -> None:
    x, y = torch.randn(32, 6), torch.arange(32) % 4
    for make in (bioopt.Hebbian, bioopt.FeedbackAlignment, bioopt.NodePerturbation):
        single, double = mlp(dtype=torch.float32), mlp()
        one, other = make(single), make(double)
        one.step(lambda single=single: F.cross_entropy(single(x), y, reduction="none"))
        other.load_state_dict(one.state_dict())
        other.step(lambda double=double: F.cross_entropy(double(x.double()), y, reduction="none"))
        assert all(p.isfinite().all() for p in double.parameters())


def test_of_tied_weights_each_layer_keeps_its_mean_by_its_own_bias() -> None:
    torch.manual_seed(0)
    sizes = [(6, 8), (8, 8), (8, 8), (8, 4)]
    model = nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.ReLU())))[:-1]
    model[4].weight = model[2].weight
    optimizer = bioopt.Homeostasis(model)
    x, y = torch.randn(64, 6), torch.arange(64) % 4
    for _ in range(20):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    for end in (1, 3, 5):
        torch.testing.assert_close(model[:end](x).mean(0), torch.full((8,), 0.5), rtol=0, atol=0.05)
