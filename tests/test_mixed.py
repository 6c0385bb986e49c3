"""One rule per part of a network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from .rules import batch, cnn, mlp, per_sample, published, same, steps, weights


def test_each_part_moves_as_it_would_alone() -> None:
    model, trunk, head = cnn(dropout=0.0), cnn(dropout=0.0), cnn(dropout=0.0)
    optimizer = bioopt.Mixed(
        published.Hebbian(model[:5], 0.05, readout=None), torch.optim.Adam(model[5:].parameters(), lr=0.01)
    )
    alone = published.Hebbian(trunk[:5], 0.05, readout=None)
    plain = torch.optim.Adam(head[5:].parameters(), lr=0.01)
    for i in range(3):
        x, y = batch(i)
        optimizer.step(per_sample(optimizer, model, x, y))
        trunk[:5](x)
        alone.step()
        # the head of the twin sees the same trunk as the model's did
        plain.zero_grad()
        F.cross_entropy(head(x), y).backward()
        plain.step()
        with torch.no_grad():
            for p, q in zip(head[:5].parameters(), model[:5].parameters(), strict=True):
                p.copy_(q)
    assert same(weights(model[:5]), weights(trunk[:5]))
    for p, q in zip(model[5:].parameters(), head[5:].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_every_member_sees_the_same_point() -> None:
    """All parts estimate first, then all descend: the order of the members does not matter."""
    results = []
    for order in (1, -1):
        model = cnn(dropout=0.0)
        members = [
            published.Hebbian(model[:1], 0.05, readout=None),
            bioopt.NodePerturbation(model[4:5], 0.05, sigma=0.01),
            bioopt.WeightPerturbation(model[5:], 0.05, sigma=0.01),
        ][::order]
        optimizer = bioopt.Mixed(*members)
        steps(optimizer, model, 3)
        results.append(weights(model))
        assert model[1].num_batches_tracked == 3
    assert same(*results)


def test_members_that_need_one_pass_share_it() -> None:
    model = cnn()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return per_sample(optimizer, model, *batch())()

    optimizer = bioopt.Mixed(
        published.Hebbian(model[:4], 0.05, readout=None),
        published.Oja(model[4:6], 0.05, readout=None),
        torch.optim.SGD(model[6:].parameters(), 0.05),
    )
    optimizer.step(closure)
    assert calls == 1


def test_a_part_beneath_a_cut_is_refused() -> None:
    model = cnn()
    optimizer = bioopt.Mixed(torch.optim.SGD(model[:2].parameters(), 0.1), published.Hebbian(model[4:], 0.1))
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"SGD trains parameters by gradients \(shapes .*beneath layers of Hebbian"):
        optimizer.step(per_sample(optimizer, model, *batch()))
    assert same(before, weights(model))


def test_a_part_beside_a_cut_is_not() -> None:
    """A residual path leads the gradient past the plastic layer."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.plastic, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.plastic(x))

    model = Net()
    optimizer = bioopt.Mixed(
        published.Oja(model.plastic, 0.1, readout=None),
        torch.optim.SGD([*model.stem.parameters(), *model.head.parameters()], 0.1),
    )
    before = weights(model)
    optimizer.step(lambda: F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 4, reduction="none"))
    assert not torch.equal(before[0], model.stem.weight)


def test_the_classic_loop() -> None:
    model = cnn()
    optimizer = bioopt.Mixed(
        published.Hebbian(model[:5], 0.05, readout=None), torch.optim.Adam(model[5:].parameters(), lr=0.01)
    )
    x, y = batch()
    before = weights(model)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(before[0], model[0].weight)
    assert not torch.equal(before[-1], model[-1].bias)
    optimizer = bioopt.Mixed(bioopt.WeightPerturbation(model[:5], 0.05, sigma=0.1))
    with pytest.raises(RuntimeError, match=r"WeightPerturbation.*step\(closure\)"):
        optimizer.step()


def test_mistakes_are_explained() -> None:
    model = cnn()
    with pytest.raises(ValueError, match="at least one"):
        bioopt.Mixed()
    with pytest.raises(TypeError, match="not a bioopt rule or a torch"):
        bioopt.Mixed(model)
    with pytest.raises(ValueError, match=r"Hebbian \(0\) and SGD \(1\) train the same parameter"):
        bioopt.Mixed(published.Hebbian(model, 0.1), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"LBFGS \(0\) evaluates the closure itself.*SGD or"):
        bioopt.Mixed(torch.optim.LBFGS(model.parameters()))
    one = bioopt.Mixed(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError):
        bioopt.Mixed(one)
    with pytest.raises(RuntimeError, match=r"mixed\.optimizers\[i\]\.add_param_group"):
        one.add_param_group({"params": [torch.zeros(1)]})
    two = bioopt.Mixed(torch.optim.SGD(model[:5].parameters(), 0.1), torch.optim.SGD(model[5:].parameters(), 0.1))
    before = two.state_dict()
    with pytest.raises(ValueError, match="parameters per group"):
        two.load_state_dict(one.state_dict())
    assert two.state_dict() == before
    two.optimizers[1].add_param_group({"params": [model[0].weight]})
    unchanged = weights(model)
    with pytest.raises(ValueError, match=r"SGD \(0\) and SGD \(1\) train the same parameter"):
        steps(two, model, 1)
    assert same(unchanged, weights(model))


def test_coverage_without_a_model() -> None:
    model = cnn()
    optimizer = bioopt.Mixed(
        published.Hebbian(model[:5], 0.1, readout=None), torch.optim.SGD(model[5:].named_parameters(), 0.1)
    )
    assert optimizer.coverage() == {
        "0.weight": "Hebbian", "0.bias": "frozen", "1.weight": "frozen", "1.bias": "frozen", "4.weight": "Hebbian",
        "8.weight": "SGD", "8.bias": "SGD",
    }  # fmt: skip


def test_a_head_of_another_member_beside_a_readout_is_no_mistake() -> None:
    """What passes by the readout is the other member's."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(6, 5), "readout": nn.Linear(5, 4), "head": nn.Linear(5, 1)})
    optimizer = bioopt.Mixed(
        published.Hebbian([model["trunk"], model["readout"]], 0.1), torch.optim.SGD(model["head"].parameters(), 0.1)
    )
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    before = weights(model)

    def closure() -> Tensor:
        hidden = torch.tanh(model["trunk"](x))
        return F.cross_entropy(model["readout"](hidden), y) + model["head"](hidden).square().mean()

    optimizer.step(closure)
    assert not any(torch.equal(p, q) for p, q in zip(before[::2], weights(model)[::2], strict=True))


RELAXING = (bioopt.PredictiveCoding, bioopt.EquilibriumPropagation, bioopt.DifferenceTargetPropagation)
PERTURBING = (bioopt.NodePerturbation, bioopt.WeightPerturbation)


@pytest.mark.parametrize("below", [*RELAXING, *PERTURBING])
@pytest.mark.parametrize("above", [*RELAXING, *PERTURBING])
def test_rules_of_several_passes_do_not_disturb_each_other(below: type, above: type) -> None:
    """In either order, both parts move as they would beside a frozen one."""
    results = []
    x, y = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    for members in ((0, 1), (1, 0), (0,), (1,)):
        model = mlp(sizes=(6, 8, 5, 4))
        parts = model[:4], model[4:]
        for part in (0, 1):
            parts[part].requires_grad_(part in members)
        rules = [(below, above)[part](parts[part]) for part in members]
        optimizer = bioopt.Mixed(*rules) if len(rules) > 1 else rules[0]
        optimizer.step(lambda m=model: F.cross_entropy(m(x), y, reduction="none"))
        results.append([weights(part) for part in parts])
    one, other, lower, upper = results
    assert same(one[0], other[0])
    assert same(one[1], other[1])
    assert same(one[0], lower[0])
    assert same(one[1], upper[1])


def test_a_scheduler_of_a_member_does_not_warn() -> None:
    model = cnn()
    optimizer = bioopt.Mixed(
        published.Hebbian(model[:5], 0.1, readout=None), torch.optim.Adam(model[5:].parameters(), 0.1)
    )
    schedulers = [torch.optim.lr_scheduler.StepLR(member, 1, 0.1) for member in optimizer.optimizers]
    steps(optimizer, model, 1)
    for scheduler in schedulers:
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("rule", [published.Hebbian, bioopt.NodePerturbation])
def test_a_head_may_be_frozen_for_a_while(rule: type) -> None:
    model = cnn(dropout=0.0)
    options = {"readout": None} if rule is published.Hebbian else {}
    optimizer = bioopt.Mixed(rule(model[:5], 0.1, **options), torch.optim.Adam(model[5:].parameters(), 0.1))
    model[5:].requires_grad_(False)
    trunk, head = weights(model[:5]), weights(model[5:])
    x, y = batch()
    optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert not same(trunk, weights(model[:5]))
    assert same(head, weights(model[5:]))
