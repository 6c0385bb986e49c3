"""Difference target propagation against a twin of loops, against backpropagation, and what an update depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioopt

from ..energy.common import gradients, of_backpropagation, residual
from ..energy.twins import data, layers_of, network
from ..rules import batch, cnn, same, weights
from . import twins

SIZES = (6, 5, 4, 4, 3)


def image_data(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 8, 8, generator=generator).double(), torch.arange(n) % 5


def wide() -> nn.Sequential:
    return network((6, 20, 16, 12, 3))


def strided(dropout: float = 0.0) -> nn.Sequential:
    """Stride, groups, padding, an output that no layer's shape determines, and a normalisation below all layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.BatchNorm2d(2), nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.ELU(), nn.AvgPool2d(2)]
        second = [nn.Conv2d(8, 12, 3, stride=2, groups=2, padding=1, padding_mode="circular"), nn.GroupNorm(2, 12)]
        return nn.Sequential(*first, *second, nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def with_inverses(rule: Any, inverses: Callable[[bioopt.Synapse], Tensor]) -> None:
    """Give each layer's inverse these weights."""
    feedback = {s.index: inverses(s).detach().clone() for s in rule.layers().values()}
    rule._own_state = {**rule._own_state, "feedback": feedback}


def cosines(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    return {name: F.cosine_similarity(a[name].flatten(), b[name].flatten(), 0).item() for name in b}


@pytest.mark.parametrize("beta", [0.1, 30.0])
def test_equals_its_twin_of_loops(beta: float) -> None:
    """With a large step, targets leave the range of activity."""
    model, (x, y), drawn = network(), data(), {}
    rule = bioopt.DifferenceTargetPropagation(model, target_step=beta, feedback_steps=2, feedback_lr=0.3, noise=0.2)
    draw = rule._drawn

    def noted(block: Any, like: Tensor, k: int, where: int) -> Tensor:
        drawn[block.link.synapse.index, k, where] = noise = draw(block, like, k, where)
        return noise

    rule._drawn = noted
    layers, inverses = layers_of(model), list(rule.feedback_weights().values())
    expected = [value for pair in twins.updates(layers, inverses, x, y, beta) for value in pair]
    found = gradients(rule, model, x, y)
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    learned = twins.learned(layers, inverses, x, drawn, sigma=0.2, rate=0.3, steps=2)
    for a, b in zip(rule.feedback_weights().values(), learned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert rule.forward_passes == 3


@pytest.mark.parametrize("make", [wide, cnn, strided])
def test_with_matched_jacobians_it_is_backpropagation(make: Any) -> None:
    model = make()
    x, y = data(50) if make is wide else image_data()
    model = model.double()
    expected = of_backpropagation(model, x, y)
    rule = bioopt.DifferenceTargetPropagation(model, target_step=1e-4, feedback_steps=1)
    with_inverses(rule, lambda s: s.weight)
    found = gradients(rule, model, x, y)
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("make", [wide, cnn])
def test_inverses_learn_to_match_jacobians(make: Any) -> None:
    """Their loss has its minimum where the update is that of backpropagation, though no weight is read."""
    model = make()
    x, y = data(50) if make is wide else image_data()
    model = model.double()
    rule = bioopt.DifferenceTargetPropagation(model, feedback_steps=60, feedback_lr=0.2, noise=0.05)
    expected, before = of_backpropagation(model, x, y), gradients(rule, model, x, y)
    after = gradients(rule, model, x, y)
    *hidden, _ = [name for name, p in expected.items() if p.ndim > 1]
    old, new = cosines(before, expected), cosines(after, expected)
    for name in hidden:
        assert new[name] > max(0.8, old[name]), (name, old, new)


def test_an_update_depends_on_the_inverses_above_it_alone() -> None:
    model, (x, y) = network(), data()
    rule = bioopt.DifferenceTargetPropagation(model, feedback_lr=0.0)
    before, changed = gradients(rule, model, x, y), "4"
    index = rule.layers()[changed].index
    with_inverses(rule, lambda s: rule._inverse(s) * (-1 if s.index == index else 1))
    after = gradients(rule, model, x, y)
    for name, layer in (("0", 0), ("2", 1), ("4", 2), ("6", 3)):
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) == (layer >= index)


def test_the_length_of_the_first_step_matters_where_targets_leave_the_range() -> None:
    model, (x, y) = network(), data()
    found = []
    for beta in (0.01, 0.02, 100.0):
        rule = bioopt.DifferenceTargetPropagation(model, target_step=beta)
        with_inverses(rule, lambda s: s.weight)
        found.append(gradients(rule, model, x, y))
        rule.close()
    torch.testing.assert_close(found[0]["4.weight"], found[1]["4.weight"])  # whose target is not yet projected
    assert cosines(found[0], found[1])["0.weight"] > 0.99
    assert cosines(found[0], found[2])["0.weight"] < 0.99
    assert found[2]["0.weight"].norm() < found[0]["0.weight"].norm()


def test_evaluations_and_the_rate_of_inverses() -> None:
    model, (x, y) = network(), data()
    still = bioopt.DifferenceTargetPropagation(model, feedback_lr=0.0)
    before = list(still.feedback_weights().values())
    gradients(still, model, x, y)
    assert still.forward_passes == 1
    assert same(before, list(still.feedback_weights().values()))
    still.close()
    alone = nn.Sequential(nn.Linear(6, 3)).double()  # whose gradient is exact, with nothing below it
    rule = bioopt.DifferenceTargetPropagation(alone)
    found, expected = gradients(rule, alone, x, y), of_backpropagation(alone, x, y)
    assert rule.forward_passes == 1
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p)


def test_excluded_layers_are_part_of_the_block_around_them() -> None:
    """The derivative of the block then has their weights."""
    model, (x, y) = network(), data()
    expected = of_backpropagation(model, x, y)
    rule = bioopt.DifferenceTargetPropagation(model, exclude=["2"], target_step=1e-3)
    with_inverses(rule, lambda s: s.weight)
    found = gradients(rule, model, x, y)
    assert "2.weight" not in found
    torch.testing.assert_close(found["0.weight"], expected["0.weight"], rtol=1e-7, atol=1e-10)
    assert rule.coverage()["2.weight"] == "excluded"


def test_checkpointed_blocks_learn_the_same() -> None:
    model, (x, y) = network(), data()

    def loss(reentrant: bool) -> Tensor:
        h = x
        for part in (model[:4], model[4:]):
            h = checkpoint(part, h, use_reentrant=reentrant)
        return F.cross_entropy(h, y)

    rule = bioopt.DifferenceTargetPropagation(model)
    expected, inverses = gradients(rule, model, x, y), rule.feedback_weights()
    rule.close()
    rule = bioopt.DifferenceTargetPropagation(model)
    rule.estimate(lambda: loss(reentrant=False))
    for name, weight in rule.feedback_weights().items():
        torch.testing.assert_close(weight, inverses[name])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"layer '0' ran under no_grad.*use_reentrant=False"):
        rule.estimate(lambda: loss(reentrant=True))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "range_"),
    [
        ("feedback_lr", 2.0, r"in \[0, 2\)"),
        ("feedback_lr", -0.1, r"in \[0, 2\)"),
        ("feedback_steps", 0, "an integer >= 1"),
        ("noise", 0.0, "> 0"),
        ("target_step", 0.0, "> 0"),
        ("target_step", math.inf, "> 0"),
        ("seed", -1, ">= 0"),
    ],
)
def test_options_out_of_range(option: str, value: Any, range_: str) -> None:
    with pytest.raises(ValueError, match=f"DifferenceTargetPropagation: {option}={value!r} must be .*{range_}"):
        bioopt.DifferenceTargetPropagation(network(), **{option: value})


def test_a_readout_of_its_own_is_refused() -> None:
    with pytest.raises(TypeError, match="readout='delta' is not possible"):
        bioopt.DifferenceTargetPropagation(network(), readout="delta")


class Wired(nn.Module):
    """Three layers, joined by a function."""

    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def skipping(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    return m.c(h + m.b(h).tanh())


def branching(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    return m.c(h) + m.b(h)[:, :3]


def aside(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    return m.c(m.b(h)) + h[:, :3]


def dead_end(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    m.b(h)
    return m.c(h)


def twice(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(m.b(m.a(x))))


@pytest.mark.parametrize(
    ("join", "message"),
    [
        (skipping, r"layer 'c' receives the activity of the layers 'a' and 'b'.*skip connections"),
        (branching, r"the loss depends on the activity of the layers '.' and '.'"),
        (aside, r"the loss depends on the activity of the layers 'a' and 'c'"),
        (dead_end, r"the activity of layer 'a' enters layer 'b' and layer 'c'"),
        (twice, r"layer 'b' ran twice in one evaluation"),
        (lambda m, x: m.c(m.b(m.a(x))).detach(), r"depends on no layer"),
    ],
)
def test_networks_that_are_no_chain_are_refused(join: Any, message: str) -> None:
    """Nothing is changed."""
    torch.manual_seed(0)
    model, (x, y) = Wired(join).double(), data()
    rule = bioopt.DifferenceTargetPropagation(model)
    before, state = weights(model), rule.state_dict()["state"]["rule"]
    with pytest.raises(RuntimeError, match=message):
        rule.step(lambda: F.cross_entropy(model(x), y))
    assert same(before, weights(model))
    assert str(rule.state_dict()["state"]["rule"]) == str(state)


def test_layers_without_a_graph_to_the_loss_learn_nothing_and_are_named() -> None:
    model, (x, y) = Wired(lambda m, x: m.c(m.b(m.a(x).detach()))).double(), data()
    rule = bioopt.DifferenceTargetPropagation(model)
    with pytest.warns(UserWarning, match="layers ran and learn nothing: 'a'.*exclude="):
        rule.step(lambda: F.cross_entropy(model(x), y))
    rule.step(lambda: F.cross_entropy(model(x), y))  # once
    assert model.a.weight.grad is None


def test_a_residual_network_is_refused() -> None:
    model = residual()
    rule = bioopt.DifferenceTargetPropagation(model)
    with pytest.raises(RuntimeError, match=r"needs a chain of layers.*PredictiveCoding"):
        rule.step(lambda: F.cross_entropy(model(batch()[0]), batch()[1]))


def test_a_closure_that_runs_other_layers_is_refused() -> None:
    model, (x, y), count = network(), data(), [0]
    rule = bioopt.DifferenceTargetPropagation(model)

    def closure() -> Tensor:
        count[0] += 1
        h = model[:4](x)
        return F.cross_entropy(model[4:](h) if count[0] == 1 else h[:, :3], y)

    with pytest.raises(RuntimeError, match="in an evaluation with noise, the closure did not run the layers 6, 4"):
        rule.step(closure)


def test_inverses_that_are_not_finite_change_nothing() -> None:
    model, (x, y) = network(), data()
    rule = bioopt.DifferenceTargetPropagation(model)
    with_inverses(rule, lambda s: s.weight * math.inf)
    before = weights(model)
    with pytest.raises(bioopt.Diverged):
        rule.step(lambda: F.cross_entropy(model(x), y))
    assert same(before, weights(model))


def test_inverses_of_a_checkpoint_go_where_the_model_is() -> None:
    model, (x, y) = network(SIZES), data()
    rule = bioopt.DifferenceTargetPropagation(model)
    rule.step(lambda: F.cross_entropy(model(x), y))
    moved = network(SIZES).to("meta")
    other = bioopt.DifferenceTargetPropagation(moved)
    other.load_state_dict(rule.state_dict())
    assert {inverse.device.type for inverse in other.feedback_weights().values()} == {"meta"}
