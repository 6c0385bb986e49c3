"""Whitened inputs: which events are seen, and what the inhibition between inputs does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core import whitening
from bioopt.core.products import some_events
from bioopt.core.synapse import Synapse, convolve


def events_of(layer: Any, x: Tensor, most: int) -> Tensor:
    synapse = Synapse("layer", layer, channel_dim=-1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim)
    seen = some_events(synapse, x, lambda _: most)
    assert seen is not None
    return seen


LAYERS: dict[str, Any] = {
    "conv": lambda: nn.Conv2d(2, 6, 3, padding=1),
    "conv, groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv, strides": lambda: nn.Conv2d(2, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding="valid"),
    "conv, circular": lambda: nn.Conv2d(2, 6, 3, padding=2, padding_mode="circular"),
    "conv1d": lambda: nn.Conv1d(2, 6, 3, padding="same"),
    "conv3d": lambda: nn.Conv3d(2, 6, 2, stride=2),
}


@pytest.mark.parametrize("most", [10_000, 20])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_times_events_are_the_activity(name: str, most: int) -> None:
    """Of every event, or of few of them."""
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(5, layer.in_channels, *[8] * (layer.weight.ndim - 2), dtype=torch.float64)
    seen, u = events_of(layer, x, most), convolve(layer, x, layer.weight)
    every = u.movedim(1, -1).reshape(-1, layer.groups, len(layer.weight) // layer.groups).movedim(1, 0)
    found = seen @ layer.weight.view(layer.groups, -1, seen.shape[-1]).mT
    if most > every.shape[1]:
        torch.testing.assert_close(found, every)
        return
    assert 2 < found.shape[1] <= 2 * most
    apart = torch.cdist(found, every).amin(-1)  # each is one of the events
    assert apart.max() < 1e-6


def test_events_of_linear_layers_and_of_a_single_image() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 4), torch.randn(5, 7, 3)
    assert torch.equal(events_of(linear, x, 100)[0], x.flatten(0, 1))
    assert torch.equal(events_of(linear, x, 10)[0], x.flatten(0, 1)[::4])
    conv, image = nn.Conv2d(2, 3, 3), torch.randn(2, 6, 6)
    assert torch.equal(events_of(conv, image, 100), events_of(conv, image.unsqueeze(0), 100))


def test_the_inhibition_is_the_fixed_point_of_lateral_synapses() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    x = x - x.mean(0)
    covariance, strength = (x.T @ x / len(x)).unsqueeze(0), 2.0
    lateral = strength * covariance[0] / covariance[0].diagonal().mean()
    settled = x.clone()
    for _ in range(5000):
        settled += 0.02 * (x - settled @ lateral - settled)
    torch.testing.assert_close(x @ whitening.inhibition(covariance, strength)[0], settled)

    def spread(rows: Tensor) -> float:
        values = torch.linalg.eigvalsh(rows.T @ rows)
        return float(values.max() / values.sum())

    assert spread(settled) < 0.8 * spread(x)


def test_inputs_that_do_not_vary_stay_as_they_are() -> None:
    found = whitening.inhibition(torch.zeros(2, 3, 3), 1.0)
    assert torch.equal(found, torch.eye(3).expand(2, 3, 3))


def test_inputs_whose_squares_overflow_stay_as_they_are() -> None:
    covariance = torch.stack([torch.eye(3), torch.full((3, 3), float("inf"))])
    found = whitening.inhibition(covariance, 1.0)
    torch.testing.assert_close(found, torch.stack([torch.eye(3) / 2, torch.eye(3)]))


def build(**options: Any) -> tuple[Any, bioopt.KrotovHopfield]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, bioopt.KrotovHopfield(model, **options)


def train(model: nn.Module, optimizer: Any, first: int, last: int, form: Any = torch.contiguous_format) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(20, 2, 8, 8, generator=generator).contiguous(memory_format=form)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(20) % 3).backward()
        optimizer.step()


def test_goes_on_bit_for_bit() -> None:
    model, optimizer = build()
    train(model, optimizer, 0, 7)
    other = copy.deepcopy(model)
    resumed = bioopt.KrotovHopfield(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 7, 12)
    train(other, resumed, 7, 12)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_goes_on_where_no_covariance_was_saved() -> None:
    model, former = build(whitening=0.0)
    train(model, former, 0, 5)
    state = former.state_dict()
    former.close()
    for group in state["param_groups"]:
        group["whitening"] = 1.0
    optimizer = bioopt.KrotovHopfield(model)
    optimizer.load_state_dict(state)
    train(model, optimizer, 5, 7)
    assert set(optimizer._own_state["homeostasis"][0]) >= {"covariance", "whitening"}


def test_the_memory_format_makes_no_difference() -> None:
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        model, optimizer = build()
        train(model.to(memory_format=form), optimizer, 0, 6, form)
        found.append(model[0].weight.detach().flatten(1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_layers_with_one_event_a_sample_or_many_inputs_learn_from_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build()
    train(model, optimizer, 0, 4)
    levels = optimizer._own_state["homeostasis"]
    assert "covariance" in levels[0]
    assert "covariance" not in levels[1]  # Linear
    monkeypatch.setattr(whitening, "MOST_INPUTS", 17)
    model, optimizer = build()
    train(model, optimizer, 0, 4)
    assert "covariance" not in optimizer._own_state["homeostasis"][0]  # 18 inputs


def test_a_linear_layer_at_several_positions_learns_as_a_convolution_there() -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(5, 6).double(), nn.Conv1d(5, 6, 1).double()
    conv.load_state_dict({"weight": linear.weight.detach().unsqueeze(2), "bias": linear.bias.detach()})
    rules = [bioopt.SoftHebb(layer, readout=None) for layer in (linear, conv)]
    for _ in range(6):
        x = torch.randn(4, 8, 5, dtype=torch.float64) * torch.tensor([3.0, 1, 1, 1, 1])
        linear(x)
        conv(x.mT)
        for rule in rules:
            rule.step()
    assert "covariance" in rules[0]._own_state["homeostasis"][0]
    torch.testing.assert_close(conv.weight.squeeze(2), linear.weight)


def test_correlated_inputs_count_less() -> None:
    """Of two independent causes, one is seen by many inputs: without whitening it alone is learned."""
    torch.manual_seed(0)
    causes = torch.randn(400, 10, 2).sign()
    x = torch.cat([causes[..., :1].expand(-1, -1, 20), 1.5 * causes[..., 1:]], -1) + 0.1 * torch.randn(400, 10, 21)
    share = {}
    for strength in (0.0, 10.0):
        torch.manual_seed(1)
        layer = nn.Linear(21, 8)
        optimizer = bioopt.KrotovHopfield(layer, 0.1, whitening=strength, settle=0.0, readout=None)
        for batch in x.split(5):
            layer(batch)
            optimizer.step()
        weight = layer.weight.detach()
        share[strength] = float((weight[:, -1].abs() / weight.norm(dim=1)).mean())
    assert share[10.0] > 2 * share[0.0]
