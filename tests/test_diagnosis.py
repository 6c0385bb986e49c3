"""`diagnose`: measured qualities of estimates against the theory, and nothing left behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from .rules import CASES, OF_RULE, Case, batch, cnn, make, mlp, ordinary, per_sample, published, same, steps, weights


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_diagnosis_before_the_first_step_leaves_no_state(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)

    def state() -> str:
        found = optimizer.state_dict()["state"]
        found.get("rule", {}).pop("owned", None)  # lazy modules have values from now on, which the seed decides
        return str(found)

    before = state()
    bioopt.diagnose(optimizer, per_sample(optimizer, model, *batch()), samples=2)
    assert state() == before


def test_a_taught_readout_keeps_its_target() -> None:
    model, (x, y) = cnn(), batch()
    optimizer = published.Hebbian(model, 0.1, readout="teacher")
    optimizer.target = y
    bioopt.diagnose(optimizer, per_sample(optimizer, model, x, y), samples=2)
    assert optimizer.target is y


@pytest.mark.parametrize("form", [per_sample, pytest.param(ordinary, marks=pytest.mark.long)])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*needs no backward pass")
def test_a_diagnosis_changes_nothing(case: Case, form) -> None:
    model, twin = case.cnn(), case.cnn()
    optimizer, other = case.make(model), case.make(twin)
    for o, m in ((optimizer, model), (other, twin)):
        torch.manual_seed(0)
        steps(o, m, 1)
    before = [weights(model), [b.clone() for b in model.buffers()], copy.deepcopy(optimizer.state_dict()["state"])]
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    random = torch.get_rng_state()
    found = bioopt.diagnose(optimizer, form(optimizer, model, *batch()), samples=2)
    assert same(before[0], weights(model))
    assert same(before[1], list(model.buffers()))
    assert str(optimizer.state_dict()["state"]) == str(before[2])
    assert all(
        p.grad is g for p, g in zip((p for g in optimizer.param_groups for p in g["params"]), grads, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert {"all"} < found.keys() <= {"all", *dict(model.named_parameters())}
    assert found["all"]["forward_passes"] >= 1
    assert all(-1 - 1e-9 <= value["cosine"] <= 1 + 1e-9 for value in found.values())
    steps(optimizer, model, 1, first=1)
    torch.set_rng_state(random)
    steps(other, twin, 1, first=1)
    assert same(weights(model), weights(twin))


def problem(hidden: int) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    model = mlp(sizes=(4, hidden, 3))
    x = torch.randn(12, 4, dtype=torch.float64, generator=generator)
    return model, x, torch.randint(3, (12,), generator=generator)


def diagnosed(rule: type, hidden: int, count: int, **options) -> dict[str, float]:
    model, x, y = problem(hidden)
    optimizer = make(rule, model, **OF_RULE[rule].taking(sigma=1e-4), **options)
    return bioopt.diagnose(optimizer, lambda: F.cross_entropy(model(x), y, reduction="none"), count)["all"]


@pytest.mark.parametrize("rule", [bioopt.WeightPerturbation, bioopt.ForwardGradient])
def test_the_variance_of_directions_grows_with_the_number_of_weights(rule: type) -> None:
    """E|g - ĝ|² = (n + 1) |g|² for one direction in n dimensions."""
    for hidden in (4, 32):
        n = 4 * hidden + hidden + 3 * hidden + 3
        options = OF_RULE[rule].taking(population=1, samples=1, space="weights")
        found = diagnosed(rule, hidden, 300, relative=False, **options)
        assert 0.6 < found["signal_to_noise"] * (n + 1) < 1.6
        assert 0.6 < found["cosine"] * math.sqrt(n * math.pi / 2) < 1.6


@pytest.mark.parametrize("rule", [bioopt.NodePerturbation, bioopt.ForwardGradient])
@pytest.mark.long
def test_the_variance_of_noisy_activity_grows_with_the_number_of_neurons_alone(rule: type) -> None:
    """One sample has as many dimensions as there are neurons, whatever the number of their inputs."""
    for inputs, neurons in ((4, 8), (4, 64), (300, 8)):
        torch.manual_seed(0)
        model, direction = nn.Linear(inputs, neurons).double(), torch.randn(neurons, dtype=torch.float64)
        x = torch.randn(1, inputs, dtype=torch.float64)
        optimizer = make(rule, model, **OF_RULE[rule].taking(sigma=1e-5, space="activities", samples=1))
        found = bioopt.diagnose(
            optimizer, lambda model=model, x=x, direction=direction: (model(x) * direction).sum(1), 300
        )
        assert 0.6 < found["all"]["signal_to_noise"] * (neurons + 1) < 1.6


def test_a_rule_without_noise_has_none() -> None:
    found = diagnosed(bioopt.SerialPerturbation, 4, 2, coordinates=35)
    assert found["cosine"] == pytest.approx(1)
    assert found["signal_to_noise"] > 1e9
    assert found["forward_passes"] == 70


def test_what_cannot_be_diagnosed_is_explained() -> None:
    model, x, y = problem(4)
    optimizer = bioopt.WeightPerturbation(model, 0.1, sigma=0.1)
    with pytest.raises(TypeError, match="diagnose takes a single rule, not Mixed; diagnose its members"):
        bioopt.diagnose(bioopt.Mixed(optimizer), lambda: F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="samples=1 must be an integer >= 2"):
        bioopt.diagnose(optimizer, lambda: F.cross_entropy(model(x), y), samples=1)
    with pytest.raises(RuntimeError, match="returns the loss as a tensor with its graph"):
        bioopt.diagnose(optimizer, lambda: F.cross_entropy(model(x), y).item())


class Transposed(bioopt.FeedbackRule):
    """Backpropagation, with its weights shown."""

    def feedback(self, synapse: bioopt.Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        return synapse.transpose(synapse.weight, g, x_shape)

    def feedback_weights(self) -> dict[str, Tensor]:
        return {name: s.weight.detach() for name, s in self.layers().items()}


def test_angles_and_ranks_of_feedback() -> None:
    model = cnn(dropout=0.0)
    found = bioopt.diagnose(rule := Transposed(model, 0.1), ordinary(rule, model, *batch()), samples=2)
    rule.close()
    for name in ("0.weight", "4.weight", "8.weight"):
        assert found[name]["error_angle"] == pytest.approx(0, abs=1e-2)
        assert found[name]["update_angle"] == pytest.approx(0, abs=1e-2)
        assert ("feedback_angle" in found[name]) == (name != "0.weight")  # below which nothing learns
    assert found["8.weight"]["feedback_angle"] == pytest.approx(0, abs=1e-2)
    model(batch()[0])
    x, y = batch()
    model.zero_grad()
    logits = model(x)
    logits.retain_grad()
    F.cross_entropy(logits, y).backward()
    values = torch.linalg.svdvals(logits.grad.double()).square()
    assert found["8.weight"]["error_rank"] == pytest.approx(
        (values.sum() ** 2 / values.square().sum()).item(), rel=1e-4
    )

    aligned = bioopt.FeedbackAlignment(model)
    found = bioopt.diagnose(aligned, per_sample(aligned, model, x, y), samples=2)
    feedback = aligned.feedback_weights()["4"].flatten()
    angle = torch.rad2deg(torch.acos(F.cosine_similarity(feedback, model[4].weight.flatten(), 0)))
    assert found["4.weight"]["feedback_angle"] == pytest.approx(angle.item(), abs=0.01)
    assert found["8.weight"]["error_angle"] == pytest.approx(0, abs=1e-2)
    assert 20 < found["0.weight"]["error_angle"] < 160
    aligned.close()
    direct = bioopt.DirectFeedbackAlignment(model)
    found = bioopt.diagnose(direct, per_sample(direct, model, x, y), samples=2)
    assert "feedback_angle" in found["8.weight"]  # of the readout, whose feedback has the shape of its weights
    assert "feedback_angle" not in found["4.weight"]
