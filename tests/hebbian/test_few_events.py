"""Updates from the events themselves equal those from their product, and are taken where they need less work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bioopt
from bioopt.core.homeostasis import WARM_UP

LAYERS = {
    "linear": (lambda: nn.Linear(30, 24), (10, 30)),
    "linear, no bias": (lambda: nn.Linear(30, 24, bias=False), (10, 30)),
    "sequence": (lambda: nn.Linear(30, 24), (5, 2, 30)),
    "linear, wide": (lambda: nn.Linear(12, 24), (10, 12)),
    "conv": (lambda: nn.Conv2d(3, 24, 3, padding=1, padding_mode="reflect", stride=2), (3, 3, 4, 4)),
}
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "hebbian": (bioopt.Hebbian, {}),
    "hebbian, k": (bioopt.Hebbian, {"competition": "k", "k": 4}),
    "hebbian, losers": (bioopt.Hebbian, {"loser_strength": 0.5}),
    "sanger": (bioopt.Sanger, {}),
    "anti_hebbian": (bioopt.AntiHebbian, {}),
}


def learned(rule: str, name: str, most: int, channels_last: bool, **options: Any) -> tuple[Tensor, set[bool]]:
    """The weights after some steps of two firings each, and whether events were kept."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    layer = layer.to(memory_format=torch.channels_last) if channels_last else layer
    kind, own = RULES[rule]
    optimizer = kind(layer, 0.3, readout=None, **own, **options)
    optimizer.most_events = lambda synapse, group: most
    kept = set()
    measure = optimizer.measure

    def measured(firing: Any, u: Tensor) -> Any:
        sums = measure(firing, u)
        kept.add(sums.few is not None)
        return sums

    optimizer.measure = measured
    for _ in range(WARM_UP + 2 if options["homeostasis"] else 2):
        for _ in range(2):
            x = torch.randn(shape, dtype=torch.float64) + 0.5
            layer(x).relu_()  # in place, after the layer has fired
            x.zero_()
        optimizer.step()
    return layer.weight.detach(), kept


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("homeostasis", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_events_teach_what_their_product_teaches(
    rule: str, homeostasis: bool, name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bioopt.hebbian.arithmetic.BLOCK", 7)
    if channels_last and name != "conv":
        return
    expected, none = learned(rule, name, 0, channels_last, homeostasis=homeostasis)
    assert none == {False}
    for most in (12, 24):  # the events of one firing, or of both
        found, kept = learned(rule, name, most, channels_last, homeostasis=homeostasis)
        assert kept == {True}
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.Sanger, bioopt.AntiHebbian])
@pytest.mark.parametrize("homeostasis", [False, True])
def test_events_are_kept_while_they_are_few(rule: Any, homeostasis: bool) -> None:
    layer = nn.Linear(700, 500)
    optimizer = rule(layer, homeostasis=homeostasis, readout=None)
    most = optimizer._most_events(next(iter(optimizer._recorder.synapses.values())))
    assert (most == 0) if homeostasis and rule is bioopt.AntiHebbian else (150 < most < 500)
    layer = nn.Linear(700, 4)
    optimizer = rule(layer, homeostasis=homeostasis, readout=None)
    assert optimizer._most_events(next(iter(optimizer._recorder.synapses.values()))) < 4


def test_events_of_a_thrown_away_loss_teach_nothing() -> None:
    models = [nn.Sequential(nn.Linear(20, 30), nn.ReLU(inplace=True), nn.Linear(30, 3)) for _ in range(2)]
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    rules = [bioopt.Hebbian(model, 0.1, homeostasis=False, readout_lr=0.1) for model in models]
    x = torch.randn(8, 20)
    models[1](x + 1).sum()
    for model, rule in zip(models, rules, strict=True):
        model(x).square().sum().backward()
        rule.step()
    assert torch.equal(models[0][0].weight, models[1][0].weight)
