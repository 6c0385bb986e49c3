"""`diagnostics.every`: what is measured inside a network is right, and measuring changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bioopt
from experiments import pictures
from experiments.classification import Classification
from experiments.diagnostics import Diagnostics, activity, relaxation, relaxation_course
from experiments.ranks import Ranks
from experiments.run import run

from ..commands import SOFTHEBB, config, tiny, unrender
from ..test_contract import equal_state
from .test_runs import stopped


@pytest.mark.parametrize(
    "optimizer",
    [
        "node_perturbation",
        *(pytest.param(o, marks=pytest.mark.long) for o in ("hebbian", "softhebb", "reward_hebbian", "random_trunk")),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_run_is_the_same_bit_for_bit_with_and_without(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer != "hebbian":
        unrender(monkeypatch.setattr)
    common = [*tiny(optimizer), f"epochs={2 if optimizer == 'hebbian' else 1}"]
    if optimizer == "hebbian":
        common += ["optimizer.homeostasis=false", "optimizer.lr=3", "optimizer.readout_lr=0.02"]
    if optimizer == "softhebb":  # with a filter that learns from what it sees, and a second phase
        common = ["optimizer=softhebb", *SOFTHEBB, "model.whitened=8", "plastic_epochs=1", "epochs=2"]
    for name, more in (("without", []), ("with", ["diagnostics.every=2"])):
        run(config(*common, f"run_dir={tmp_path / name}", *more))
    without, measured = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("without", "with"))
    for key in ("model", "blocks", "random", "forward_passes", "steps"):
        assert equal_state(without[key], measured[key]), key
    for picture in ("diagnostics", "confusion", "misclassified", "receptive_fields_over_time"):
        assert (tmp_path / "with" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert not (tmp_path / "without" / f"{picture}.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "with" / "diagnostics.jsonl").read_text().splitlines()]
    assert lines == measured["diagnostics"]
    assert [line["step"] for line in lines] == list(range(0, 10, 2))[: len(lines)]
    assert len(lines) >= 3
    quantities = {name.split("/")[0] for name in lines[0]} - {"step", "signal_to_noise"}
    assert quantities == {"sparsity", "dead_units", "dimensionality", "update_ratio", "cosine"}
    for line in lines:
        for name, value in line.items():
            if name.startswith(("sparsity", "dead_units")):
                assert 0 <= value <= 1 + 1e-6
            if name.startswith("cosine"):
                assert abs(value) <= 1 + 1e-6
    if optimizer == "hebbian":  # whose readout, with a rate given, follows the gradient exactly
        assert all(line["cosine/9.weight"] == pytest.approx(1) for line in lines)
        assert all(abs(line["cosine/0.weight"]) < 0.9 for line in lines)


def test_activity_against_its_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    events = torch.rand(200, 5, generator=generator)
    events[:, 4] = 0
    found = activity(events)
    assert found["dead_units"] == pytest.approx(0.2)
    values = torch.linalg.eigvalsh(torch.cov(events.T))
    assert found["dimensionality"] == pytest.approx((values.sum() ** 2 / values.square().sum()).item(), rel=1e-4)
    one_active = torch.eye(5).repeat(3, 1)
    assert activity(one_active)["sparsity"] == pytest.approx(1)
    assert activity(torch.ones(4, 5))["sparsity"] == pytest.approx(0)
    assert activity(torch.ones(4, 5))["dimensionality"] == 0
    assert activity(torch.ones(4, 1)) == {}


def test_what_relaxation_did_is_measured_and_drawn(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = bioopt.EquilibriumPropagation(model, nudged_steps=3)
    assert pictures.relaxations(optimizer.relaxations, "", tmp_path / "none.png") is None
    optimizer.step(lambda: model(torch.randn(6, 4)).square().mean(1))
    found = relaxation(optimizer)
    assert set(found) == {"free_energy", "residual"}
    assert list(found["residual"]) == [f"nudge {sign}0.1, {end}" for sign in ("", "-") for end in ("start", "end")]
    assert found["free_energy"]["nudge 0.1, end"] < found["free_energy"]["nudge 0.1, start"]
    drawn = pictures.relaxations(optimizer.relaxations, "a title", tmp_path / "relaxation.png")
    assert drawn is not None
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert relaxation(torch.optim.SGD(model.parameters(), 0.1)) == {}


def test_what_relaxation_buys_is_measured_and_drawn(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(m for _ in range(4) for m in (torch.nn.Linear(5, 5), torch.nn.Tanh())))
        x = torch.randn(6, 5)
    optimizer = bioopt.PredictiveCoding(model, steps=6)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> torch.Tensor:
        return (model(x) - 1).square().mean(1)

    course = relaxation_course(optimizer, closure)
    assert list(course) == ["0", "2", "4", "6"]
    assert all(list(cosines) == [1, 2, 4, 6] for cosines in course.values())
    assert course["0"][1] == course["0"][2] == 0  # errors have not arrived there
    assert course["0"][4] > 0.5
    assert course["6"][1] > 0.99
    assert optimizer.steps == 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    drawn = pictures.relaxation_course(course, "a title", tmp_path / "relaxation_cosine.png")
    assert drawn is not None
    assert drawn.read_bytes().startswith(b"\x89PNG")
    plain = torch.optim.SGD(model.parameters(), 0.1)
    assert relaxation_course(plain, closure) == {}
    assert pictures.relaxation_course({}, "", tmp_path / "none.png") is None
    del optimizer.steps  # as of a rule of one's own that counts in another way
    assert relaxation_course(optimizer, closure) == {}


def test_relaxations_too_short_to_lower_the_energy_are_left_out() -> None:
    """A rate that is halved until it suits is no failure of the run, whose relaxation is long enough."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))
        x = torch.randn(6, 5)
    optimizer = bioopt.PredictiveCoding(model, steps=8, inference_lr=12.0)

    def closure() -> torch.Tensor:
        return (model(x) - 1).square().mean(1)

    optimizer.steps = 2
    with pytest.raises(bioopt.Diverged):
        optimizer.step(closure)
    optimizer.steps = 8
    course = relaxation_course(optimizer, closure)
    assert 2 not in course["0"]
    assert {1, 8} <= course["0"].keys()
    assert optimizer.steps == 8


@pytest.mark.parametrize("phases", [[], ["plastic_epochs=1"]])
def test_pictures_show_the_predictions_that_were_tested(
    phases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(Diagnostics, "_drawn", lambda self, predicted, *_: drawn.append(predicted) or [])
    labels = Classification(config(*tiny("forward_forward")), torch.device("cpu"), Ranks()).images.test_labels
    own = [] if phases else ["optimizer.prediction=goodness"]
    common = [*tiny("forward_forward"), *own, "diagnostics.every=4", "epochs=2", "data.augment.crop=1", *phases]
    summary = run(config(*common, "data.augment.views=2", f"run_dir={tmp_path / 'run'}"))
    assert (drawn[0] == labels).float().mean().item() == pytest.approx(summary["test_accuracy"])
    (tmp_path / "run" / "summary.json").unlink()  # interrupted as it was drawn
    again = run(config(f"resume={tmp_path / 'run'}"))
    assert again["test_accuracy"] == summary["test_accuracy"]
    assert again["trained_parameters"] == summary["trained_parameters"]
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.long
def test_measurements_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Diagnostics, "pictures", lambda *of: [])
    common = [*tiny("hebbian"), "epochs=3", "diagnostics.every=3"]
    run(config(*common, f"run_dir={tmp_path / 'whole'}"))
    whole = (tmp_path / "whole" / "diagnostics.jsonl").read_text()
    stopped(monkeypatch, 2, *common, f"run_dir={tmp_path / 'stopped'}")
    run(config(f"resume={tmp_path / 'stopped'}"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "diagnostics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in whole.splitlines()]
    assert len(torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["fields"]) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("diagnostics.every=0", "diagnostics.every=0 must be an integer >= 1, or null"),
        ("diagnostics.samples=1", "diagnostics.samples=1 must be an integer >= 2"),
        ("diagnostics.images=many", "diagnostics.images=many must be an integer >= 1"),
    ],
)
def test_mistakes(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(config(*tiny("hebbian"), override, f"run_dir={tmp_path / 'run'}"))
