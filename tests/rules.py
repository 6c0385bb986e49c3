"""The table that enrols every rule of `bioopt.__all__` in every contract test, and the small things tests share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

RULES = [
    rule
    for rule in (getattr(bioopt, name) for name in bioopt.__all__)
    if inspect.isclass(rule) and issubclass(rule, bioopt.LearningRule) and not inspect.isabstract(rule)
]
ONE_PASS = [rule for rule in RULES if issubclass(rule, bioopt.OnePass)]
SEVERAL_PASSES = [rule for rule in RULES if rule not in ONE_PASS]
ONE_EVALUATION = [
    *ONE_PASS,
    bioopt.RewardHebbian,
    bioopt.RewardSTDP,
    bioopt.ForwardGradient,
]  # three of them with a closure
SPIKING = [bioopt.STDP, bioopt.RewardSTDP]  # their networks spike: `spiking_cnn` and `spiking_mlp`
PLAIN = [bioopt.HillClimbing]  # no optimizer makes its step
# What a signature requires besides params and lr; a rule without a baseline of its own explores further.
REQUIRED = {"sigma": 1e-2}
FURTHER = {bioopt.RewardHebbian: {"sigma": 1.0}}
USUAL = {bioopt.HillClimbing: {"tries": 20}}  # one of so many is nearly always kept


def make(rule: type, params: Any, lr: float = 0.01, **options: Any) -> bioopt.LearningRule:
    """Build a rule with whatever its signature requires, and without what it has no use for."""
    options = USUAL.get(rule, {}) | options
    if rule in PLAIN:
        options = {name: value for name, value in options.items() if name not in ("descent", "momentum")}
    for name, parameter in inspect.signature(rule).parameters.items():
        if parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            options.setdefault(name, (REQUIRED | FURTHER.get(rule, {}))[name])
    return rule(params, lr, **options)


def options_of(rule: type, **options: Any) -> dict[str, Any]:
    """Those of the options that the rule has."""
    return {name: value for name, value in options.items() if name in inspect.signature(rule).parameters}


def cnn(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    """All that may trouble a rule: in-place activation, batch norm with affine, dropout, bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, bias=False),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, 5),
        )


class Machine(bioopt.nn.RBM):
    """An RBM that takes whatever comes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1).sigmoid())


def machines(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    """`cnn` in RBMs: layers, batch norm and dropout stand at the same places."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            Machine(128, 6),
            nn.BatchNorm1d(6),
            nn.Dropout(dropout),
            nn.Sigmoid(),
            bioopt.nn.RBM(6, 8),
            bioopt.nn.RBM(8, 32),
            nn.Linear(32, 5),
        )


def machine(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """`mlp` with an RBM."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Machine(6, 5), nn.Linear(5, 4)).to(dtype)


def mlp(seed: int = 0, sizes: tuple[int, ...] = (6, 5, 4), dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).to(dtype)


class Neurons(nn.Module):
    """Leaky integrate-and-fire: what came in before counts half, and a spike takes 0.3 away; a slope for gradients."""

    def forward(self, u: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = u if v is None else 0.5 * v + u
        slope = torch.sigmoid(v)
        s = (v > 0.3).to(u.dtype) + (slope - slope.detach())
        return s, v - 0.3 * s.detach()


class SpikingNet(nn.Sequential):
    """Unrolls three time steps; what is no part of time (normalisation, dropout) works on the image before them."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                x = module(x)
        said = torch.zeros(())
        voltage: dict[nn.Module, Tensor | None] = {}
        for step in range(3):
            h = (x > 0.5 * step).to(x.dtype)  # the stronger, the more spikes
            for module in self:
                if isinstance(module, Neurons):
                    h, voltage[module] = module(h, voltage.get(module))
                elif not isinstance(module, nn.BatchNorm2d | nn.Dropout):
                    h = module(h)
                if type(module) is nn.Linear:
                    u = h
            said = said + u
        return said


def spiking_cnn(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    """`cnn` for rules of spikes: convolutions, batch norm, readout and bias stand in the same places."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SpikingNet(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(2),
            Neurons(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, bias=False),
            Neurons(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, 5),
            Neurons(),
        )


def spiking_mlp(seed: int = 0, sizes: tuple[int, ...] = (6, 5, 4), dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """`mlp` for rules of spikes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SpikingNet(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), Neurons()))).to(dtype)


# Rules for layers, or for signals, of their own: what stands in the place of `cnn` and `mlp` in their tests.
NETWORKS: dict[type, dict[str, Callable[..., nn.Sequential]]] = {
    bioopt.ContrastiveDivergence: {"cnn": machines, "mlp": machine},
    bioopt.STDP: {"cnn": spiking_cnn, "mlp": spiking_mlp},
    bioopt.RewardSTDP: {"cnn": spiking_cnn, "mlp": spiking_mlp},
}
ORDINARY = [rule for rule in RULES if rule not in NETWORKS]  # train whatever synapse there is


def batch(seed: int = 0, n: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def per_sample(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """The better form of a closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        if losses.requires_grad:
            losses.mean().backward()
        return losses

    return closure


def ordinary(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """torch's ordinary closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def steps(optimizer: Any, model: nn.Module, count: int, first: int = 0) -> Any:
    loss = None
    for i in range(first, first + count):
        loss = optimizer.step(per_sample(optimizer, model, *batch(i)))
    return loss


def name_of(model: nn.Module, wanted: Tensor) -> str:
    return next(name for name, p in model.named_parameters() if p is wanted)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
