"""Views of one sample are made alike, and unlike those of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioopt import LocalContrastive
from bioopt.local.views import view_of

from ..rules import batch, cnn, mlp, same, weights

SGD: dict[str, Any] = {"descent": torch.optim.SGD}


def mirrored(x: Tensor) -> Tensor:
    return x.flip(-1)


def contrast(z: list[Tensor], other: list[Tensor], temperature: float) -> Tensor:
    z, other = ([one / one.square().sum().sqrt() for one in of] for of in (z, other))
    total = torch.zeros((), dtype=z[0].dtype)
    for i, one in enumerate(z):
        scores = torch.stack([(one @ remembered) / temperature for remembered in other])
        total = total - torch.log(scores[i].exp() / scores.exp().sum())
    return total / len(z)


def test_the_slow_twin_agrees() -> None:
    """Each block a network of its own, whose loss is written in loops."""
    x, y = batch(n=6)
    x = x.double()
    model, twin = cnn(dropout=0.0).double(), cnn(dropout=0.0).double()
    options: dict[str, Any] = {"temperature": 0.5, "features": 3, "pool": 2, "example": x, "readout": None}
    optimizer = LocalContrastive(model, 0.1, views=mirrored, momentum=0.9, centre_inputs=False, **SGD, **options)
    other = LocalContrastive(twin, **options)
    heads: Any = [*other._owned.modules.values()]
    other.close()
    parts = [twin[:4], twin[4:7], twin[8]]
    plain = [
        torch.optim.SGD([*part.parameters(), *head.parameters()], 0.1, momentum=0.9)
        for part, head in zip(parts, [*heads, nn.Identity()], strict=True)
    ]
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        h, view = x, mirrored(x)
        losses = []
        for part, head in zip(parts[:2], heads, strict=True):
            h, view = part(h.detach()), part(view.detach())
            z, remembered = (
                [*head(v if v.ndim == 2 else F.adaptive_avg_pool2d(v, 2).flatten(1))] for v in (view, h.detach())
            )
            losses.append(contrast(z, [one.detach() for one in remembered], 0.5))
        losses.append(F.cross_entropy(parts[2](h.detach()), y))
        for one, loss in zip(plain, losses, strict=True):
            one.zero_grad()
            loss.backward()
            one.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    for p, q in zip(optimizer._owned.modules.parameters(), (p for h in heads for p in h.parameters()), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_labels_change_nothing_but_the_readout() -> None:
    x, y = batch()
    one, two = cnn(dropout=0.0), cnn(dropout=0.0)
    for model, labels in ((one, y), (two, (y + 1) % 5)):
        LocalContrastive(model).estimate(lambda model=model, labels=labels: F.cross_entropy(model(x), labels))
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) != name.startswith("8"), name


def test_views_come_from_the_seed_and_the_step() -> None:
    seen: list[Tensor] = []
    x, y = batch()
    for seed in (0, 0, 1):
        model = cnn()
        model[0].register_forward_pre_hook(lambda layer, args: None)
        optimizer = LocalContrastive(model, 0.0, seed=seed)
        inner = optimizer._view
        optimizer._view = lambda x, synapse, inner=inner: seen.append(inner(x, synapse)) or seen[-1]  # type: ignore[method-assign]
        for _ in range(2):
            optimizer.step(lambda model=model: F.cross_entropy(model(x), y))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[4])


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((5, 3, 16, 12), -3), ((5, 3, 16), -2), ((5, 20), -1), ((5, 3, 4, 5, 6), -4)]
)
def test_a_view_changes_each_sample_by_itself(shape: tuple[int, ...], channel_dim: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    view = view_of(x, channel_dim, torch.Generator().manual_seed(1))
    assert view.shape == x.shape
    assert not torch.equal(view[0], view[1])
    assert all(not torch.equal(a, b) for a, b in zip(view, x, strict=True))
    hidden = (view == x.flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))).float().mean().item()
    assert 0.05 < hidden <= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number > 0"),
        ({"features": 0}, "features=0 must be an integer >= 1"),
        ({"views": "mirror"}, "views='mirror' must be a function of inputs, or None"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LocalContrastive: {message}"):
        LocalContrastive(cnn(), **options)


@pytest.mark.parametrize(
    ("views", "message"), [(lambda x: x, "the inputs themselves"), (lambda x: x[:, :3], r"inputs of shape \(8, 3\)")]
)
def test_views_that_do_not_fit_are_named(views: Any, message: str) -> None:
    model = mlp(dtype=torch.float32)
    optimizer, before = LocalContrastive(model, views=views), weights(model)
    with pytest.raises(ValueError, match=f"LocalContrastive: views= returned {message}"):
        optimizer.step(lambda: F.cross_entropy(model(torch.ones(8, 6)), torch.zeros(8, dtype=torch.long)))
    assert same(before, weights(model))
