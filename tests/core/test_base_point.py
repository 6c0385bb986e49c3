"""The readout of rules that evaluate the loss several times a step: it learns where the step starts from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.local.base import BlockRule

from ..rules import SEVERAL_PASSES, hooks, keywords, same, spiking_mlp, weights

X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


def full() -> nn.Sequential:
    """Batch norm, dropout above it and below the readout, and an activation in place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.3),
        nn.Linear(5, 4),
    ).double()  # fmt: skip


def plain() -> nn.Sequential:
    """What `torch.func.vmap` can run."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def spiking() -> nn.Sequential:
    return spiking_mlp(sizes=(6, 5, 5, 4))


@dataclass
class Variant:
    """A rule with options, and how many evaluations a readout adds."""

    rule: type
    options: dict[str, Any] = field(default_factory=dict)
    more: int = 1
    network: Callable[[], nn.Sequential] = full

    def __str__(self) -> str:
        return ", ".join([self.rule.__name__, *(f"{k}={v}" for k, v in self.options.items() if k != "sigma")])

    def make(self, model: nn.Module, readout: str | None = "delta", **options: Any) -> bioopt.LearningRule:
        if readout == "delta":
            options.setdefault("readout_lr", 0.1)  # the gradient itself, not that on standardised activity
        return self.rule(model, 0.1, **self.options, readout=readout, **options)


SIGMA = {"sigma": 0.1}
VARIANTS = [
    Variant(bioopt.NodePerturbation, {**SIGMA, "samples": 2}, more=0),
    Variant(bioopt.NodePerturbation, {**SIGMA, "decorrelation": 0.01}, more=0),
    Variant(bioopt.NodePerturbation, {**SIGMA, "samples": 2, "batched": True}, more=0, network=plain),
    Variant(bioopt.WeightPerturbation, {**SIGMA, "population": 2}),
    Variant(bioopt.WeightPerturbation, {**SIGMA, "population": 2, "antithetic": False}, more=0),
    Variant(bioopt.SerialPerturbation, {**SIGMA, "coordinates": 40}),
    Variant(bioopt.SerialPerturbation, {**SIGMA, "coordinates": 40, "central": False}, more=0),
    Variant(bioopt.SerialPerturbation, {**SIGMA, "coordinates": 40, "batched": True}, network=plain),
    Variant(bioopt.RankOnePerturbation, {**SIGMA, "samples": 2}),
    Variant(bioopt.ForwardGradient, {"samples": 2, "space": "weights"}),
    Variant(bioopt.ForwardGradient, {"samples": 2}, more=0),
    Variant(bioopt.ForwardGradient, {"samples": 2, "space": "activities", "relative": False}),
    Variant(bioopt.HillClimbing, {"tries": 5}, more=0),
    Variant(bioopt.RewardHebbian, SIGMA),
    Variant(bioopt.RewardSTDP, more=0, network=spiking),
]
FULL = [variant for variant in VARIANTS if variant.network is full]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def readout_of(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def per_sample(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X), Y, reduction="none")


def gradient(model: nn.Module) -> list[Tensor]:
    """Of the mean loss with respect to the readout, by autograd."""
    return list(torch.autograd.grad(per_sample(model)().mean(), [*readout_of(model).parameters()]))


def estimate(optimizer: bioopt.LearningRule, closure: Callable[[], Any], seed: int = 5) -> list[Tensor | None]:
    """What is left in ``.grad``, from one random state."""
    torch.manual_seed(seed)
    optimizer.estimate(closure)
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def test_all_rules_are_here() -> None:
    """Block rules have a readout of their own, which has tests of its own."""
    rules = {case.rule for case in SEVERAL_PASSES if case.takes("readout")}
    assert {variant.rule for variant in VARIANTS} == {rule for rule in rules if not issubclass(rule, BlockRule)}


@every_variant
def test_none_is_the_default(variant: Variant) -> None:
    """Without the option, all layers follow the rule."""
    assert keywords(variant.rule.__init__) >= {"readout", "readout_lr", "readout_layer"}
    one, two = variant.network(), variant.network()
    results = []
    for model, optimizer in ((one, variant.rule(one, 0.1, **variant.options)), (two, variant.make(two, None))):
        assert not any(group["readout"] for group in optimizer.param_groups)
        for i in range(2):
            torch.manual_seed(i)
            optimizer.step(per_sample(model))
        results.append(weights(model))
    assert same(*results)


@every_variant
def test_the_readout_gets_its_own_exact_gradient(variant: Variant) -> None:
    model, twin = variant.network(), variant.network()
    optimizer = variant.make(model, readout_lr=0.5)
    assert [group["readout"] for group in optimizer.param_groups] == [None, "delta"]
    assert optimizer.param_groups[1]["lr"] == 0.5
    for i in range(3):  # at later steps, too
        twin.load_state_dict(model.state_dict())
        torch.manual_seed(i)
        wanted = gradient(twin)
        estimate(optimizer, per_sample(model), seed=i)
        for p, g in zip(readout_of(model).parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)
        optimizer.descend()


@every_variant
def test_the_others_learn_as_beside_a_frozen_readout(variant: Variant) -> None:
    """From the same noise, bit for bit: the rule neither disturbs the readout nor gives it credit."""
    model, frozen = variant.network(), variant.network()
    readout_of(frozen).requires_grad_(False)
    optimizer, other = variant.make(model, readout_lr=0.0), variant.make(frozen, None)
    for i in range(3):
        estimate(optimizer, per_sample(model), seed=i)
        estimate(other, per_sample(frozen), seed=i)
        trunk = [p for p in model.parameters() if not any(p is q for q in readout_of(model).parameters())]
        twins = [p for p in frozen.parameters() if not any(p is q for q in readout_of(frozen).parameters())]
        assert any(p.grad is not None and p.grad.any() for p in trunk)
        for p, q in zip(trunk, twins, strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        optimizer.descend()
        other.descend()


@every_variant
def test_a_readout_costs_one_evaluation_where_none_was_made_there(variant: Variant) -> None:
    model, frozen = variant.network(), variant.network()
    readout_of(frozen).requires_grad_(False)
    optimizer, other = variant.make(model), variant.make(frozen, None)
    for _ in range(2):  # the first step looks whether the closure is repeatable
        optimizer.step(per_sample(model))
        other.step(per_sample(frozen))
        assert optimizer.forward_passes == other.forward_passes + variant.more


@pytest.mark.parametrize("variant", FULL, ids=str)
def test_random_state_statistics_and_masks_are_those_of_one_evaluation(variant: Variant) -> None:
    model, twin = full(), full()
    optimizer = variant.make(model)
    masks: list[Tensor] = []
    model[5].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    torch.manual_seed(3)
    twin(X)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    optimizer.step(per_sample(model))
    assert torch.equal(torch.get_rng_state(), after)
    assert model[1].num_batches_tracked == 1
    assert len(masks) == optimizer.forward_passes >= 2
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@every_variant
@pytest.mark.filterwarnings("ignore:.*backward")
def test_all_forms_of_a_closure_teach_the_same(variant: Variant) -> None:
    """One that sends the loss backward where it can, one that always does, and one that leaves it to the rule."""
    results = []
    for form in ("bare", "conditional", "always"):
        model = variant.network()
        optimizer = variant.make(model)

        def closure(model=model, optimizer=optimizer, form=form) -> Tensor:
            optimizer.zero_grad()
            losses = per_sample(model)()
            if form == "always" or (form == "conditional" and losses.requires_grad):
                losses.mean().backward()
            return losses

        for i in range(2):
            torch.manual_seed(i)
            optimizer.step(closure)
        results.append(weights(model))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@every_variant
def test_a_scalar_loss(variant: Variant) -> None:
    model, twin = variant.network(), variant.network()
    optimizer = variant.make(model)
    torch.manual_seed(5)
    wanted = gradient(twin)
    estimate(optimizer, lambda: per_sample(model)().mean())
    for p, g in zip(readout_of(model).parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)


@every_variant
def test_coverage_names_the_readout(variant: Variant) -> None:
    model = variant.network()
    optimizer = variant.make(model)
    optimizer.step(per_sample(model))
    covered = optimizer.coverage(model)
    name = next(name for name, module in model.named_modules() if module is readout_of(model))
    label = f"{variant.rule.__name__} readout (delta)"
    assert [n for n, what in covered.items() if what == label] == [f"{name}.weight", f"{name}.bias"]
    assert covered["0.weight"] == variant.rule.__name__


@every_variant
def test_it_goes_on_bit_for_bit_from_a_checkpoint(variant: Variant) -> None:
    whole, part, rest = (variant.network() for _ in range(3))
    accepted = keywords(variant.rule.__init__)
    options = {"momentum": 0.9} if "momentum" in accepted and "relative" not in accepted else {}  # the others have Adam

    def train(optimizer: bioopt.LearningRule, model: nn.Module, steps: range) -> None:
        for i in steps:
            torch.manual_seed(i)
            optimizer.step(per_sample(model))

    train(variant.make(whole, **options), whole, range(4))
    first = variant.make(part, **options)
    train(first, part, range(2))
    second = variant.make(rest, **options)
    rest.load_state_dict(part.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, rest, range(2, 4))
    assert same(weights(whole), weights(rest))


@every_variant
def test_a_teacher_sets_the_target_in_the_place_of_the_readouts_activity(variant: Variant) -> None:
    model = variant.network()
    optimizer = variant.make(model, "teacher")
    seen: list[Tensor] = []
    readout_of(model).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with pytest.raises(RuntimeError, match=r"readout='teacher' was given no target.*set optimizer\.target"):
        optimizer.step(per_sample(model))
    seen.clear()
    optimizer.target = Y
    estimate(optimizer, per_sample(model))
    assert optimizer.target is None
    targets = F.one_hot(Y, 4).double() * (1 + 1 / 3) - 1 / 3
    weight = readout_of(model).weight
    with torch.no_grad():
        if variant.network is spiking:  # it fires at each of three moments
            events = [(x, targets) for x in seen]
        else:  # the clean input, whichever evaluation it was of
            torch.manual_seed(5)
            seen.clear()
            hooks_before = hooks(model)
            with optimizer._recorder.paused():
                model(X)
            assert hooks(model) == hooks_before
            events = [(seen[0], targets)]
        wanted = sum(t.T @ x - (t * t).sum(0).unsqueeze(1) * weight for x, t in events) / (len(events) * len(X))
    torch.testing.assert_close(weight.grad, -wanted, rtol=0, atol=1e-12)
    assert readout_of(model).bias.grad is None


@every_variant
def test_a_readout_frozen_later_rests(variant: Variant) -> None:
    model = variant.network()
    optimizer = variant.make(model)
    readout_of(model).requires_grad_(False)
    before = weights(model)
    for i in range(3):
        torch.manual_seed(i)
        optimizer.step(per_sample(model))
    after = weights(model)
    assert same(before[-2:], after[-2:])
    assert not same(before[:-2], after[:-2])


@every_variant
def test_a_loss_that_is_not_finite_changes_nothing(variant: Variant) -> None:
    model = variant.network()
    optimizer = variant.make(model)
    optimizer.step(per_sample(model))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(bioopt.Diverged, match=f"{variant.rule.__name__}: the loss is nan"):
        optimizer.step(lambda: per_sample(model)() * float("nan"))
    assert same(before, weights(model))
    assert str(state) == str(optimizer.state_dict())


@every_variant
def test_a_diagnosis_changes_nothing(variant: Variant) -> None:
    models = [variant.network(), variant.network()]
    optimizers = [variant.make(model) for model in models]
    for i in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(i)
            optimizer.step(per_sample(model))
        torch.manual_seed(9)
        found = bioopt.diagnose(optimizers[0], per_sample(models[0]), samples=2)
        name = next(name for name, module in models[0].named_modules() if module is readout_of(models[0]))
        layer = found.get(name) or found[f"{name}.weight"]
        assert layer["cosine"] == pytest.approx(1)  # it is the gradient
    assert same(*map(weights, models))


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant.network is not spiking], ids=str)
def test_beside_another_member_of_mixed(variant: Variant) -> None:
    """Each member's update is that which it makes alone."""
    model, upper, lower = (variant.network() for _ in range(3))
    mixed = bioopt.Mixed(
        bioopt.WeightPerturbation(model[:2], 0.1, sigma=0.1, seed=4), variant.make(model[2:], readout_lr=0.3)
    )
    alone, below = variant.make(upper[2:], readout_lr=0.3), bioopt.WeightPerturbation(lower[:2], 0.1, sigma=0.1, seed=4)
    estimate(mixed, per_sample(model))
    estimate(alone, per_sample(upper))
    estimate(below, per_sample(lower))
    for p, q, r in zip(model.parameters(), upper.parameters(), lower.parameters(), strict=True):
        wanted = q.grad if q.grad is not None else r.grad
        assert wanted is not None
        torch.testing.assert_close(p.grad, wanted, rtol=0, atol=1e-12)
    assert mixed.forward_passes == alone.forward_passes + below.forward_passes
    covered = mixed.coverage(model)
    assert [*covered.values()][-2:] == [f"{variant.rule.__name__} readout (delta)"] * 2


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head, self.other = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 4)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.head(h), self.other(h)


@pytest.mark.parametrize("variant", FULL, ids=str)
def test_each_of_several_readouts_gets_its_own_gradient(variant: Variant) -> None:
    model = TwoHeads()

    def losses() -> Tensor:
        one, two = model(X)
        return F.cross_entropy(one, Y, reduction="none") + 0.3 * two.square().mean(1)

    heads = [*model.head.parameters(), *model.other.parameters()]
    wanted = torch.autograd.grad(losses().mean(), heads)
    optimizer = variant.make(model, readout_layer=["head", "other"])
    estimate(optimizer, losses)
    for p, g in zip(heads, wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)
    assert model.trunk.weight.grad.any()


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("rule", [bioopt.NodePerturbation, bioopt.WeightPerturbation, bioopt.RankOnePerturbation])
def test_the_gradient_under_autocast(rule: type, around: bool) -> None:
    model, twin = plain().float(), plain().float()
    optimizer = rule(model, 0.1, sigma=0.1, readout="delta", readout_lr=0.1)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(twin(x).float(), Y)
    wanted = torch.autograd.grad(loss, [*twin[-1].parameters()])

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), Y, reduction="none")

    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        optimizer.estimate(closure)
    for p, g in zip(model[-1].parameters(), wanted, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, g, rtol=1e-2, atol=1e-4)


def test_mistakes_are_explained() -> None:
    model = plain()
    with pytest.raises(TypeError, match="needs the model, not its parameters"):
        bioopt.WeightPerturbation(model.parameters(), 0.1, sigma=0.1, readout="delta")
    with pytest.raises(ValueError, match="the only plastic layer, 'Linear', is the readout"):
        bioopt.WeightPerturbation(nn.Linear(3, 2), 0.1, sigma=0.1, readout="delta")
    with pytest.raises(ValueError, match="readout='other' must be 'delta', 'teacher' or None"):
        bioopt.HillClimbing(model, 0.1, readout="other")
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, readout="delta")
    with pytest.raises(RuntimeError, match=r"the readout '4' learns from the loss, but no gradient has reached it"):
        optimizer.step(lambda: per_sample(model)().mean().item())
    for variant in VARIANTS:
        if variant.network is spiking:
            continue
        model = variant.network()
        optimizer = variant.make(model, readout_layer="0")
        before, watched = weights(model), hooks(model)
        with pytest.raises(RuntimeError, match=r"fires after the readout '0', which must be last. Write readout_layer"):
            optimizer.step(per_sample(model))
        assert same(before, weights(model))
        assert hooks(model) == watched


def test_a_closure_that_always_calls_backward_is_advised() -> None:
    model = plain()
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1, readout="delta")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = per_sample(model)().mean()
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step(closure)
    (warning,) = caught
    assert "NodePerturbation needs a backward pass in one evaluation of a step alone" in str(warning.message)
    assert "if loss.requires_grad: loss.backward()" in str(warning.message)
