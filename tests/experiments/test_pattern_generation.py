"""`experiment=pattern_generation`: the curves match their description, and all networks learn the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.run import run
from experiments.tasks.pattern_generation import PatternGeneration

from ..commands import config, made_task
from .test_tasks import interrupted, resumed

TINY = ["experiment=pattern_generation", "logger.mode=disabled", "task.rounds=2", "task.steps=2", "task.hidden=6"]
TINY += ["task.time=20", "task.outputs=2", "task.cycles=[1,3]"]


def task(*overrides: str) -> PatternGeneration:
    torch.manual_seed(0)
    made: PatternGeneration = made_task(config(*TINY, *overrides))
    return made


def test_curves_are_sums_of_these_sines_and_inputs_tell_the_time() -> None:
    made = task("task.time=40")
    curves = made.target.view(40, 2).double()
    torch.testing.assert_close(curves.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(curves.square().mean(0), torch.ones(2, dtype=torch.float64))
    power = torch.fft.rfft(curves, dim=0).abs()
    assert (power[[1, 3]] > 1).all()
    power[[1, 3]] = 0
    assert power.max() < 1e-4
    active = made.spikes[:, 0].unflatten(1, (5, 4)).unflatten(0, (5, 8)).sum((1, 3))  # part of the time × group
    assert torch.equal(active, 16 * torch.eye(5))
    made.close()


def test_all_networks_start_alike_and_the_frozen_layer_stays() -> None:
    made = task()
    first, *others = (learner.network.state_dict() for learner in made.made.values())
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    before = made.made["frozen"].network.layer.enter.weight.clone()
    line = made.round(1)
    assert {*PatternGeneration.known} <= line.keys()
    assert torch.equal(before, made.made["frozen"].network.layer.enter.weight)
    assert not torch.equal(before, made.made["random"].network.layer.enter.weight)
    error = (made.made["bptt"].network(made.spikes) - made.target).square().mean()
    assert line["bptt"] == pytest.approx(error.item())
    made.close()


@pytest.mark.parametrize("neurons", ["lif", "rate"])
def test_eprop_draws_better_than_the_mean(neurons: str) -> None:
    made = task("task.learners=[eprop]", f"task.neurons={neurons}", "task.steps=40", "task.hidden=20")
    assert made.round(1)["eprop"] < 0.8
    made.close()


@pytest.mark.long
def test_it_runs_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(config(*TINY, f"run_dir={tmp_path / 'whole'}"))
    assert [*summary["measured"]] == [*PatternGeneration.known]
    assert {path.name for path in (tmp_path / "whole").glob("*.png")} == {"error.png", "patterns.png"}
    interrupted(monkeypatch, PatternGeneration, 2, *TINY, f"run_dir={tmp_path / 'stopped'}")
    assert resumed(monkeypatch, tmp_path / "stopped")["measured"] == summary["measured"]


def test_bad_options_are_named() -> None:
    for options, message in (
        (("task.time=4",), "task.time=4 must be an integer >= 5"),
        (("task.cycles=[1,0]",), r"task.cycles=\[1, 0\] must be numbers > 0"),
        (("task.neurons=gru",), "neurons=gru must be one of lif, alif, rate"),
        (("task.learners=[]",), r"task.learners=\[\] must name at least one of eprop"),
    ):
        with pytest.raises(ValueError, match=message):
            task(*options)
