"""Widths relative to the size of activity and weights: the default options of perturbation and reward rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.readout import LR
from bioopt.perturbation.base import weight_sizes

from ..rules import OF_RULE, mlp, same, weights
from .common import X, Y, estimate, losses_of

RULES = [
    bioopt.ForwardGradient,
    bioopt.HillClimbing,
    bioopt.NodePerturbation,
    bioopt.RankOnePerturbation,
    bioopt.RewardHebbian,
    bioopt.SerialPerturbation,
    bioopt.WeightPerturbation,
]
OF_WEIGHTS = [bioopt.HillClimbing, bioopt.SerialPerturbation, bioopt.WeightPerturbation]


@pytest.mark.parametrize("rule", [*RULES, bioopt.RewardSTDP, bioopt.STDP, bioopt.ContrastiveDivergence])
def test_a_rule_needs_nothing_but_the_model(rule: type) -> None:
    case = OF_RULE[rule]
    assert rule(case.cnn()).param_groups[0]["lr"] > 0


@pytest.mark.parametrize("rule", [*OF_WEIGHTS, bioopt.ForwardGradient])
def test_bare_parameters_are_as_good_as_the_model(rule: type) -> None:
    """Without a module to ask, a bias is recognised by the weight before it."""
    model, twin = mlp(), mlp()
    options = {"space": "weights"} if rule is bioopt.ForwardGradient else {}
    for optimizer, network in ((rule(model, **options), model), (rule(twin.parameters()), twin)):
        for _ in range(3):
            optimizer.step(lambda network=network: losses_of(network))
    assert same(weights(model), weights(twin))
    assert not same(weights(model), weights(mlp()))


def test_the_step_is_that_of_adam_or_as_published() -> None:
    for rule in RULES:
        default, published = rule(mlp()), rule(mlp(), 0.1, relative=False)
        own = {bioopt.HillClimbing: torch.optim.SGD, bioopt.SerialPerturbation: torch.optim.Adagrad}
        assert type(default._descent) is own.get(rule, torch.optim.Adam)
        assert type(published._descent) is torch.optim.SGD
        assert type(rule(mlp(), **OF_RULE[rule].taking(descent=torch.optim.RMSprop))._descent) in (
            torch.optim.SGD if rule is bioopt.HillClimbing else torch.optim.RMSprop,
        )
        with pytest.raises(ValueError, match=f"{rule.__name__}: relative='yes' must be True or False"):
            rule(mlp(), relative="yes")
    with pytest.raises(
        TypeError, match=r"NodePerturbation\(momentum=0.9\): .* Adam.* descent=torch.optim.SGD .*relative"
    ):
        bioopt.NodePerturbation(mlp(), momentum=0.9)
    bioopt.NodePerturbation(mlp(), momentum=0.9, descent=torch.optim.SGD)
    bioopt.NodePerturbation(mlp(), 0.1, momentum=0.9, relative=False)
    for of_activity in (bioopt.NodePerturbation, bioopt.RewardHebbian):
        with pytest.raises(TypeError, match=rf"{of_activity.__name__}\(relative=False\) needs lr=: "):
            of_activity(mlp(), relative=False)
        assert of_activity(mlp()).param_groups[0]["lr"] == 2e-3
        groups = of_activity(mlp(), readout="delta").param_groups
        assert [group["lr"] for group in groups] == [1e-4, LR]
    groups = bioopt.NodePerturbation(mlp(), 0.1, readout="delta", readout_lr=0.2).param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.2]


def homogeneous() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 4, bias=False)).double()


@pytest.mark.parametrize("what", ["weights", "input"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        *((rule, {"coordinates": 50} if rule is bioopt.SerialPerturbation else {}) for rule in RULES),
        (bioopt.HillClimbing, {"tries": 20}),
        (bioopt.ForwardGradient, {"space": "weights"}),
        (bioopt.RewardHebbian, {"trials": 3}),
    ],
)
def test_scale_changes_nothing(rule: type, options: dict, what: str) -> None:
    """A layer with 100 times the weights, or input, and a next layer, or weights, of a hundredth: the same network."""
    found = []
    for scale in (1.0, 100.0):
        model, x = homogeneous(), X
        with torch.no_grad():
            if what == "weights":
                model[0].weight.mul_(scale)
                model[2].weight.div_(scale)
            else:
                x = scale * x
                model[0].weight.div_(scale)
        optimizer = rule(model, **options)
        grads = []
        for _ in range(2):  # estimated from a running size the second time
            grads = estimate(optimizer, model, lambda model=model, x=x: F.cross_entropy(model(x), Y, reduction="none"))
        found.append([g * p.detach().square().mean() ** (-0.5 if rule is bioopt.HillClimbing else 0.5)
                      for g, p in zip(grads, model.parameters(), strict=True)])  # fmt: skip
    assert any(g.any() for g in found[0]) or rule is bioopt.HillClimbing
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_of_zeros_divides_nothing_by_zero_and_begins_to_learn(rule: type) -> None:
    model = mlp()
    with torch.no_grad():
        for p in model[2].parameters():
            p.zero_()
    optimizer = rule(model, **OF_RULE[rule].taking(tries=20, coordinates=100))
    for _ in range(3):
        optimizer.step(lambda: losses_of(model))
    assert all(p.isfinite().all() for p in model.parameters())
    assert model[2].weight.any()
    assert model[2].bias.any()


def test_the_size_of_a_weight() -> None:
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    zeros = torch.zeros(2)

    def sizes(*params: Tensor) -> list[float]:
        return [round(size, 6) for size in weight_sizes(list(params))]

    assert sizes(matrix) == [2.5]
    assert sizes(matrix, zeros) == [2.5, 2.5]  # its bias
    assert sizes(matrix, torch.tensor([30.0, 40.0])) == [2.5, round(1250**0.5, 6)]  # a larger one
    assert sizes(matrix, torch.ones(2), zeros) == [2.5, 2.5, 2.5]  # batch norm has its gain and bias
    assert sizes(torch.ones(2), zeros) == [1.0, 1.0]
    assert sizes(matrix, torch.zeros(3)) == [2.5, 1.0]  # of another layer
    assert sizes(zeros) == [1.0]
    assert sizes(torch.zeros(3, 4, 2, 2)) == [0.25]
    assert sizes(torch.zeros(0, 4), torch.zeros(0)) == [1.0, 1.0]
    assert sizes(torch.full((8, 8), 300.0, dtype=torch.float16)) == [300.0]  # whose squares float16 cannot hold
    assert sizes() == []


def blobs(n: int = 200) -> tuple[Tensor, Tensor]:
    """Five classes of points in 20 dimensions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(5, 20, generator=generator)
    y = torch.arange(n) % 5
    return centres[y] + 0.2 * torch.randn(n, 20, generator=generator), y


@pytest.mark.parametrize("scale", [1.0, 255.0])
@pytest.mark.parametrize(
    "build",
    [bioopt.NodePerturbation, bioopt.ForwardGradient, bioopt.WeightPerturbation, bioopt.RankOnePerturbation,
     lambda model: bioopt.RewardHebbian(model, trials=4),
     lambda model: bioopt.NodePerturbation(model, readout="delta")],
    ids=["node", "forward", "weight", "rank one", "reward", "node, delta"],
)  # fmt: skip
@pytest.mark.long
def test_defaults_learn(build: Callable[[nn.Module], bioopt.LearningRule], scale: float) -> None:
    torch.manual_seed(0)
    x, y = blobs()
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = build(model)

    def closure() -> Tensor:
        return F.cross_entropy(model(scale * x), y, reduction="none")

    first = optimizer.step(closure).mean().item()
    for _ in range(120):
        last = optimizer.step(closure).mean().item()
    assert last < 0.8 * first
