"""The readout: which layer it is, and that it learns by its own local rule beside any other."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from ..rules import LOCAL, Case, mlp, published, same, weights


@pytest.mark.parametrize("form", ["labels", "activity"])
def test_a_readout_with_a_teacher_learns_the_target_for_its_own_activity(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, labels = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 2])
    targets = [[1.0 if k == label else -0.5 for k in range(3)] for label in labels]
    if form == "activity":
        targets = torch.randn(5, 3, dtype=torch.float64).tolist()
    seen, before = model[:2](x).detach(), [p.detach().clone() for p in model[2].parameters()]
    change = torch.zeros(3, 8, dtype=torch.float64)
    for t, h in zip(targets, seen, strict=True):
        for k in range(3):
            change[k] += t[k] * (h - t[k] * before[0][k]) / 5
    optimizer = published.Hebbian(model, 0.0, readout="teacher", readout_lr=0.3)
    optimizer.target = labels if form == "labels" else torch.tensor(targets, dtype=torch.float64)
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
        (torch.tensor([0, 1, 2, 3, 0]), "outside 0 to 2, the neurons of '1'"),
    ],
    ids=["another batch", "no labels", "a class too many"],
)
def test_targets_that_do_not_fit_the_readout_are_refused(target: Tensor, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimizer = published.Hebbian(model, 0.1, readout="teacher")
    optimizer.target = target
    with pytest.raises(ValueError, match=message):
        model(torch.randn(5, 6))


def test_a_taught_readout_tells_classes_apart() -> None:
    torch.manual_seed(0)
    means = 2 * torch.randn(4, 20)
    labels = torch.arange(200) % 4
    x = means[labels] + torch.randn(200, 20)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    optimizer = published.Hebbian(model, 0.01, readout="teacher", readout_lr=1.0)
    for _ in range(60):
        optimizer.target = labels
        with torch.no_grad():
            model(x)
        optimizer.step()
    assert (model.eval()(x).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize("case", [case for case in LOCAL if case.ordinary])
def test_the_delta_readout_learns_as_by_backpropagation(case: Case) -> None:
    model, twin = case.mlp(), case.mlp()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,))
    optimizer = case.make(model, lr=0.0, readout_lr=0.1)
    plain = torch.optim.SGD(twin[2:].parameters(), 0.1)
    for _ in range(3):
        if case.regulates:  # the trunk changes also without a rate
            twin[0].load_state_dict(model[0].state_dict())
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        plain.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        plain.step()
    learned, wanted = (model[2:], twin[2:]) if case.regulates else (model, twin)
    for p, q in zip(learned.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_teacher_of_an_empty_batch_teaches_nothing() -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = published.Hebbian(model, 0.1, readout="teacher")
    optimizer.target = torch.zeros(0, dtype=torch.long)
    model(torch.zeros(0, 6, dtype=torch.float64))
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_readout_frozen_later_rests_while_the_others_learn() -> None:
    model, x = mlp(), torch.randn(5, 6, dtype=torch.float64)
    optimizer = published.Hebbian(model, 0.1)
    model[-1].requires_grad_(False)
    before = [p.detach().clone() for p in (model[0].weight, model[-1].weight)]
    optimizer.step(lambda: model(x).square().mean())
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[-1].weight, before[1])


def test_readout_by_name_module_and_group() -> None:
    model = mlp(sizes=(6, 5, 5, 4))
    for wanted in ("4", model[4], None):
        optimizer = published.Hebbian(model, 0.1, readout_layer=wanted, readout_lr=0.3)
        assert optimizer.coverage() == {
            "0.weight": "Hebbian", "0.bias": "frozen", "2.weight": "Hebbian", "2.bias": "frozen",
            "4.weight": "Hebbian readout (delta)", "4.bias": "Hebbian readout (delta)",
        }  # fmt: skip
        assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.3]
        optimizer.close()
    optimizer = published.Hebbian([{"params": model[:4]}, {"params": model[4], "lr": 0.7}], 0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.7]  # the group that holds it gives its rate
    optimizer = published.Hebbian(model, 0.1, readout_options={"momentum": 0.9})
    assert [g["momentum"] for g in optimizer.param_groups] == [0, 0.9]


def test_readout_mistakes_are_explained() -> None:
    model = mlp(sizes=(6, 5, 5, 4))
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="readout='oops' must be 'delta', 'teacher' or None"):
        published.Hebbian(model, 0.1, readout="oops")
    with pytest.raises(ValueError, match="readout_lr=-1"):
        published.Hebbian(model, 0.1, readout_lr=-1)
    with pytest.raises(ValueError, match=r"readout_layer='head' is not one of the synapses: 0, 2, 4"):
        published.Hebbian(model, 0.1, readout_layer="head")
    with pytest.raises(ValueError, match="need a readout, not readout=None"):
        published.Hebbian(model, 0.1, readout=None, readout_lr=0.1)
    optimizer = published.Hebbian(model, 0.1, readout_layer="2")
    with pytest.raises(RuntimeError, match=r"'4' fires after the readout '2'.*readout_layer='4'"):
        optimizer.step(lambda: model(x).sum())

    def backward() -> Tensor:
        loss = model(x).sum()
        loss.backward()  # fails before the rule can look
        return loss

    with pytest.raises(RuntimeError, match=r"'4' fires after the readout '2'.*readout_layer='4'"):
        optimizer.step(backward)
    optimizer.close()
    optimizer = published.Hebbian(model, 0.1)
    model(x)
    with pytest.raises(RuntimeError, match=r"no gradient has reached it: call loss\.backward\(\)"):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_a_readout_on_standardised_activity_learns_by_sgd_whatever_the_descent(options: dict[str, float]) -> None:
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 4

    def after(descent: type[torch.optim.Optimizer], lr: float, interrupted: bool = False) -> list[Tensor]:
        model = mlp()
        optimizer = bioopt.NodePerturbation(model, lr, readout="delta", descent=descent, **options)
        for step in range(4):
            if interrupted and step == 2:
                state, model = optimizer.state_dict(), copy.deepcopy(model)
                optimizer = bioopt.NodePerturbation(model, lr, readout="delta", descent=descent, **options)
                optimizer.load_state_dict(state)
            optimizer.step(lambda model=model: F.cross_entropy(model(x), y, reduction="none"))
        return weights(model)

    initial, resting = weights(mlp()), after(torch.optim.Adam, 0.0)
    assert same(resting[:2], initial[:2])  # the trunk
    assert same(resting, after(torch.optim.SGD, 0.0))
    learned = after(torch.optim.Adam, 1e-3)
    assert 1e-3 < (learned[0] - initial[0]).abs().mean() < 4.1e-3  # Adam's steps are about as long as its rate
    assert same(learned, after(torch.optim.Adam, 1e-3, interrupted=True))


def test_a_schedule_of_one_rate_for_all_is_told() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(32, 6), torch.arange(32) % 3

    def learn(optimizer: Any, schedule: Any) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()

    one = bioopt.Hebbian(model)
    with pytest.warns(UserWarning, match="now has that of the other layers.*give them a list") as caught:
        learn(one, torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.05, total_steps=12))
    assert len(caught) == 1
    one.close()
    each = bioopt.Hebbian(model)
    rates = [group["lr"] for group in each.param_groups]
    learn(each, torch.optim.lr_scheduler.OneCycleLR(each, max_lr=rates, total_steps=12))
    each.close()
    chosen = bioopt.Hebbian(model, readout_options={"lr": 0.2})  # as the trunk has
    learn(chosen, torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 0.9**step))


@pytest.mark.parametrize("rule", [bioopt.LocalLoss, bioopt.WeightPerturbation, bioopt.LocalContrastive])
def test_groups_of_normalisation_alone_learn_as_in_the_whole_model(rule: Any) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), head)

    x, y = torch.randn(16, 6), torch.arange(16) % 4
    for whole in (True, False):
        model = build()
        before = weights(model)
        groups = [{"params": layer} for layer in model if not isinstance(layer, nn.Tanh)]
        optimizer = rule(model if whole else groups, readout="delta")
        for _ in range(2):
            optimizer.target = y
            optimizer.step(lambda model=model: F.cross_entropy(model(x), y, reduction="none"))
        assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        assert all("frozen" not in how for how in optimizer.coverage(model).values())


def test_groups_in_which_nothing_learns_are_passed_over() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = bioopt.NodePerturbation([{"params": layer} for layer in (model[0], model[1], model[3])])
    assert optimizer.coverage(model)["1.weight"] == "frozen"
    assert len(optimizer.param_groups) == 2
    options = {name: {"lr": 1e-3} for name in ("0", "1", "3")}
    assert bioopt.create_optimizer("node_perturbation", model, groups=options).coverage()["3.weight"]
    optimizer.close()


def test_a_last_layer_whose_weight_is_excluded_is_no_readout() -> None:
    with pytest.raises(ValueError, match=r"exclude leaves out '2', the last layer.*readout_layer='0'"):
        bioopt.Hebbian(mlp(), exclude=["2.weight"])


def test_weight_decay_shrinks_a_readout_on_standardised_activity_as_it_does_the_other_layers() -> None:
    x, y = torch.randn(16, 6).double(), torch.arange(16) % 4
    for descent in (torch.optim.AdamW, torch.optim.SGD):
        model = mlp()
        before = model[2].weight.detach().clone()
        optimizer = bioopt.LocalLoss(model, 0.01, readout="delta", descent=descent, weight_decay=0.5)
        for _ in range(100):
            optimizer.target = y
            optimizer.step(lambda model=model: 0 * F.cross_entropy(model(x), y))
        torch.testing.assert_close(model[2].weight.detach(), before * math.exp(-0.01 * 0.5 * 91), rtol=0.03, atol=0)
    resting = bioopt.LocalLoss(mlp(), 0.01, readout="delta", weight_decay=0.5, readout_options={"lr": 0.0})
    assert [group["lr"] for group in resting.param_groups if group["standardised"]] == [0.0]
    own = bioopt.LocalLoss(mlp(), 0.01, readout="delta", weight_decay=0.5, readout_options={"weight_decay": 0.1})
    assert [group["weight_decay"] for group in own.param_groups if group["standardised"]] == [0.1]


def test_a_single_sample_without_a_dimension_teaches_the_readout() -> None:
    model = mlp()
    optimizer = bioopt.Hebbian(model, homeostasis=False)
    before = model[2].weight.clone()
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(torch.ones(6).double()), torch.tensor(1)))
    assert not torch.equal(model[2].weight, before)
