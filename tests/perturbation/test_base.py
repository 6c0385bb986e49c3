"""The perturbation family against slow twins, against autograd, and against its own promises."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from ..rules import OF_RULE, SEVERAL_PASSES, Case, make, mlp, per_sample, same, weights
from .common import X, Y, estimate, few_losses, flat


@pytest.mark.parametrize(
    ("build", "closure"),
    [
        (lambda m: bioopt.WeightPerturbation(m, 0.1, population=15, sigma=1e-4), few_losses),
        (lambda m: bioopt.WeightPerturbation(m, 0.1, population=15, sigma=1e-4, antithetic=False), few_losses),
        (lambda m: bioopt.NodePerturbation(m, 0.1, samples=15, sigma=1e-4), few_losses),
        (lambda m: bioopt.NodePerturbation(m, 0.1, samples=40, sigma=1e-4, credit="global", batched=True), few_losses),
        (
            lambda m: bioopt.NodePerturbation(m, 0.1, samples=40, sigma=1e-4, batched=True),
            lambda m: few_losses(m).mean(),
        ),
        (lambda m: bioopt.RankOnePerturbation(m, 0.1, samples=25, sigma=1e-4), few_losses),
        pytest.param(
            lambda m: bioopt.RankOnePerturbation(m, 0.1, samples=25, sigma=1e-4, distribution="rademacher"),
            few_losses,
            marks=pytest.mark.long,
        ),
        (lambda m: bioopt.ForwardGradient(m.parameters(), 0.1, samples=15), few_losses),
        (lambda m: bioopt.ForwardGradient(m.parameters(), 0.1, samples=15, distribution="rademacher"), few_losses),
        (lambda m: bioopt.ForwardGradient(m, 0.1, samples=15, space="activities"), few_losses),
    ],
    ids=[
        "weight",
        "weight, one-sided",
        "node",
        "node, global",
        "node, scalar loss",
        "rank one",
        "rank one, rademacher",
        "forward",
        "forward, rademacher",
        "forward, activities",
    ],
)
def test_the_mean_of_the_estimates_is_the_gradient(build, closure) -> None:
    """In direction and size, and with an error that falls as one over the root of their number."""
    model = mlp(sizes=(3, 2, 3))
    true = flat(list(torch.autograd.grad(few_losses(model).mean(), list(model.parameters()))))
    optimizer = build(model)
    chunks = torch.stack([  # of 45 directions each; noisier estimates have more
        sum(flat(estimate(optimizer, model, lambda: closure(model))) for _ in range(3)) / 3 for _ in range(25)
    ])  # fmt: skip
    mean = chunks.mean(0)
    assert F.cosine_similarity(mean, true, dim=0) > 0.975
    assert abs((mean @ true) / (true @ true) - 1) < 0.1
    error_of_chunks = (chunks - true).norm(dim=1).mean()
    ratio = error_of_chunks / (mean - true).norm()
    assert 3 < ratio < 9  # √25 = 5


@pytest.mark.parametrize(
    "rule",
    [
        bioopt.WeightPerturbation,
        bioopt.SerialPerturbation,
        bioopt.HillClimbing,
        bioopt.NodePerturbation,
        bioopt.RankOnePerturbation,
    ],
)
def test_a_closure_that_is_not_repeatable_is_found_at_the_first_step(rule: type) -> None:
    model, batches = mlp(), iter(range(1000))

    def closure() -> Tensor:
        return F.cross_entropy(model(X + next(batches)), Y, reduction="none")

    optimizer, before = make(rule, model), weights(model)
    with pytest.raises(
        RuntimeError, match=rf"{rule.__name__} compares losses, .* not repeatable.*Draw the batch before"
    ):
        optimizer.step(closure)
    assert same(before, weights(model))
    dropout = nn.Sequential(nn.Dropout(0.5), model)  # random, but from the same state each time
    optimizer.step(lambda: F.cross_entropy(dropout(X), Y, reduction="none"))
    optimizer.step(closure)  # looked for at the first step alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [bioopt.WeightPerturbation, bioopt.SerialPerturbation, bioopt.ForwardGradient])
def test_probes_leave_no_trace(rule: type, dtype: torch.dtype) -> None:
    """A hundred estimates, and not a bit of a weight has moved."""
    model = mlp(dtype=dtype)
    optimizer = make(rule, model, **OF_RULE[rule].taking(sigma=1e-3 if dtype == torch.float32 else 0.05))
    with torch.no_grad():
        model[0].bias[0] = -0.0  # a sign that an addition of zero would lose
    before = weights(model)
    x = X.to(dtype)
    for _ in range(100):
        optimizer.estimate(lambda: F.cross_entropy(model(x).float(), Y, reduction="none"))
    assert same(before, weights(model))


NOISY = [case for case in SEVERAL_PASSES if case.takes("seed")]


@pytest.mark.parametrize("case", NOISY, ids=str)
def test_noise_is_a_function_of_seed_step_and_member(case: Case) -> None:
    def run(seed: int, before: int = 0) -> list[Tensor]:
        torch.manual_seed(before)  # the global state does not matter
        model = case.mlp()
        optimizer = case.make(model, seed=seed, **case.taking(coordinates=20))
        for _ in range(2):
            optimizer.step(per_sample(optimizer, model, X, Y))
        return weights(model)

    assert same(run(1), run(1, before=9))
    assert not same(run(1), run(2))


@pytest.mark.parametrize("option", ["sigma", "population", "samples", "coordinates", "seed"])
def test_options_out_of_range(option: str) -> None:
    for case in SEVERAL_PASSES:
        for value in (-1, "x", 0.5 if option != "sigma" else float("nan")):
            try:
                case.make(mlp(), **{option: value})
            except ValueError as error:
                assert f"{case}: {option}={value!r} must be" in str(error)  # noqa: PT017
            except TypeError as error:
                assert f"unexpected keyword argument '{option}'" in str(error)  # noqa: PT017
            else:
                pytest.fail(f"{case}({option}={value!r}) was taken")


WIDTHS = [  # the width that is too small in bfloat16, and what it changes
    (bioopt.WeightPerturbation, {"sigma": 2e-3}, r"moves \d+% of the weights"),
    (bioopt.HillClimbing, {"lr": 2e-3}, r"moves \d+% of the weights"),
    (bioopt.NodePerturbation, {"sigma": 2e-3}, "changes the activity of layer '2' by 0.001 of its size"),
    (bioopt.NodePerturbation, {"sigma": 2e-3, "batched": True}, "changes the activity of layer '2' by 0.001"),
    (bioopt.NodePerturbation, {"sigma": 1e-4, "relative": False, "lr": 0.1}, "changes the activity of layer '[02]'"),
    (bioopt.RewardHebbian, {"sigma": 2e-3}, "changes the activity of layer '2' by 0.001 of its size"),
    (bioopt.RankOnePerturbation, {"sigma": 5e-4}, "changes the activity of layer '[02]' by"),
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("rule", "options", "what"), WIDTHS, ids=lambda v: getattr(v, "__name__", None))
def test_a_width_that_bfloat16_cannot_carry_is_warned_of(
    rule: type, options: dict[str, Any], what: str, autocast: bool
) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    model, x, y = mlp(sizes=(6, 40, 4), dtype=dtype), torch.randn(8, 6, dtype=dtype), torch.randint(4, (8,))
    option = "lr" if "lr" in options and "sigma" not in options else "sigma"

    def steps(value: float) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = rule(model, **{**options, option: value})
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    optimizer.step(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))
            optimizer.close()
        return [str(warning.message) for warning in caught]

    (message,) = steps(options[option])  # once
    assert re.search(rf"{option}={options[option]:g} {what}.*torch.bfloat16", message)
    assert steps(float(re.search(rf"try {option}=([\d.e-]+)$", message)[1])) == []


@pytest.mark.parametrize(
    ("space", "what"),
    [("weights", "'0.weight' by 0.001"), ("activities", "the activity of layer '2' by 0.0007")],
)
def test_a_difference_that_bfloat16_cannot_carry_is_warned_of(space: str, what: str) -> None:
    torch.manual_seed(0)

    class Doubled(torch.autograd.Function):  # without a forward derivative
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

    model, x, y = mlp(sizes=(6, 40, 4), dtype=torch.bfloat16), torch.randn(8, 6).bfloat16(), torch.randint(4, (8,))

    def closure() -> Tensor:
        return F.cross_entropy(Doubled.apply(model(x).float()), y, reduction="none")

    optimizer = bioopt.ForwardGradient(model, space=space)
    with pytest.warns(UserWarning, match="difference=0.001") as caught:
        optimizer.step(closure)
    slow, coarse = (str(warning.message) for warning in caught)
    assert "no forward derivative" in slow
    assert re.search(f"difference=0.001 changes {what} of its size.*bfloat16.*; try difference=0.02$", coarse)
    optimizer.step(closure)


def test_a_change_that_autocast_rounds_away_gives_no_gradient() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[100.0, 0.01]]))
    optimizer = bioopt.SerialPerturbation(model, 0.1, sigma=0.02, relative=False, coordinates=2)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(torch.tensor([[0.0, 1.0]])).float().sum()

    with pytest.warns(UserWarning, match="sigma=0.02 changes 'weight' by 0.0003 of its size.*bfloat16.*; try sigma=1$"):
        optimizer.estimate(closure)
    assert model.weight.grad[0, 0] == 0
    assert model.weight.grad[0, 1] == pytest.approx(1.0, rel=0.01)
    optimizer.estimate(closure)


def test_noise_in_half_precision_is_credited_as_it_was_added() -> None:
    """Activities of some 100 swallow most of the noise in bfloat16; what is left is what the loss has seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).to(torch.bfloat16)
    with torch.no_grad():
        model[2].bias.fill_(40.0)
    x, y = torch.randn(64, 6, dtype=torch.bfloat16), torch.randint(4, (64,))
    (true,) = torch.autograd.grad(F.cross_entropy(model(x).float(), y), model[2].weight)
    optimizer = bioopt.NodePerturbation(model, 0.0, sigma=0.3, relative=False, samples=200)
    optimizer.estimate(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))
    assert F.cosine_similarity(true.float().flatten(), model[2].weight.grad.float().flatten(), 0) > 0.9


class Sequences(nn.Module):
    """Scores of whole sequences, with time or samples first."""

    def __init__(self, first: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = 0 if first == "time" else 1
        self.mix, self.head = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x)).mean(self.time))


@pytest.mark.parametrize(
    ("rule", "options"),
    [(bioopt.NodePerturbation, {"sigma": 1e-3, "samples": 60}), (bioopt.RewardHebbian, {"sigma": 1.0}),
     (bioopt.ForwardGradient, {"space": "activities", "samples": 60}), (bioopt.RankOnePerturbation, {"sigma": 1e-3})],
)  # fmt: skip
def test_a_sequence_as_long_as_the_batch_is_distinguished_from_it(rule: type, options: dict[str, Any]) -> None:
    x, y = torch.randn(8, 8, 6), torch.randint(5, (8,))
    model = Sequences("time")
    optimizer = rule(model, 0.0, **options)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"layer 'mix' gave .*\(8, 8, 16\).*the first dimension is not the sample"):
        optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert same(before, weights(model))
    model = Sequences("batch")
    model.head.requires_grad_(False)  # its noise would hide that of the other layer
    optimizer = rule(model, 0.0, **options)
    (true,) = torch.autograd.grad(F.cross_entropy(model.eval()(x), y), model.mix.weight)
    model.train()
    state = torch.get_rng_state()
    for _ in range(2):
        passes = optimizer.forward_passes
        optimizer.estimate(lambda: F.cross_entropy(model(x), y, reduction="none"))
        optimizer.descend()
    assert torch.equal(state, torch.get_rng_state())
    assert passes - optimizer.forward_passes >= 2  # it was looked at once
    if "samples" in options:
        assert F.cosine_similarity(true.flatten(), model.mix.weight.grad.flatten(), 0) > 0.4
