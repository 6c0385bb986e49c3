"""The control measured after a run: what it is, when a run is reported to be below it, and that no run changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bioopt
from experiments import classification
from experiments.run import run

from ..commands import SPIKING, config, ended, spread, train

SHORT = ["epochs=2", "logger.mode=disabled"]
MLP = ["model=mlp", "model.hidden=[16]", *SHORT]
CNN = ["model=cnn", "model.width=2", "model.kernel=3", *SHORT]
BAD = ["optimizer=sgd", "optimizer.lr=1e-6", *MLP]

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize(
    "options",
    [
        [*MLP, "optimizer.readout_lr=0.05", "optimizer.readout_options.momentum=0.5"],
        [*MLP, "cost=squared_error", "data.validation=100", "batch_size=200"],
        [*CNN, "amp=true", "schedule=halving"],
    ],
)
@pytest.mark.long
def test_the_whole_control_is_the_run_of_the_random_trunk(options: list[str], tmp_path: Path) -> None:
    measured = run(config("optimizer=hebbian", *options, "control=true", f"run_dir={tmp_path / 'run'}"))
    own = [option.replace("readout_lr", "lr").replace("readout_options.", "") for option in options]
    whole = run(config("optimizer=random_trunk", *own, f"run_dir={tmp_path / 'whole'}"))
    assert measured["control_steps"] == whole["forward_passes"]
    assert measured["control_test_accuracy"] == whole["test_accuracy"]
    assert whole["control_test_accuracy"] is whole["control_steps"] is None  # it is the control itself


@pytest.mark.parametrize("options", [MLP, [*CNN, "plastic_epochs=1"], ["model=gated", "model.hidden=4", *SHORT]])
def test_a_run_is_the_same_with_its_control_and_without(options: list[str], tmp_path: Path) -> None:
    after: list[tuple[Any, ...]] = []
    for share in ("false", "0.5"):
        folder = tmp_path / share
        summary = run(config("optimizer=node_perturbation", "optimizer.samples=1", *options, f"control={share}",
                             f"run_dir={folder}"))  # fmt: skip
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]
        own = {k: summary[k] for k in ("test_accuracy", "forward_passes", "trained_parameters", "epochs")}
        after.append((checkpoint["model"], checkpoint["random"]["cpu"], torch.get_rng_state(), kept, own))
        assert (summary["control_steps"] is None) == (share == "false")
        assert json.loads((folder / "summary.json").read_text()) == summary
    (model, *tensors, lines, summary), (other, *others, other_lines, other_summary) = after
    assert all(torch.equal(model[name], other[name]) for name in model)
    assert all(map(torch.equal, tensors, others))
    assert (lines, summary) == (other_lines, other_summary)


def test_a_run_below_its_control_says_so_in_one_line(tmp_path: Path) -> None:
    done = train(*BAD, "control=0.5", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] < summary["control_test_accuracy"]
    (line,) = [line for line in done.stdout.splitlines() if "control" in line]
    assert line == (
        f"warning: below its control: the same network with a random, frozen trunk reaches "
        f"{summary['control_test_accuracy']:.2%}, its readout trained for 11 of the run's 22 steps; "
        "see docs/rules/controls.md"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["optimizer=hebbian", "optimizer.lr=0.01", "model=mlp", "logger.mode=disabled", "epochs=10"],  # above
        [*BAD, "control=false"],
        [*BAD, "control=0.01"],  # less than a step
        [*BAD, "frozen=[1]"],  # no trunk learns
        ["optimizer=reward_stdp", *SPIKING, "model.readout=groups", *SHORT, "epochs=1"],  # there is no trunk
    ],
)
@pytest.mark.long
def test_other_runs_do_not(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(config(*options, f"run_dir={tmp_path / 'run'}"))
    said = capsys.readouterr().out
    assert "warning" not in said
    found = summary["control_test_accuracy"]
    accuracy = f"{summary['test_accuracy']:.2%}"
    few = "in only 27 of 110 steps: too few to compare"
    line = f"verdict: test accuracy {accuracy}, against {found or 0:.2%} of its control, {few}"
    assert said.replace(" %", "%").count(line) == said.count("control") == (found is not None)
    assert (summary["control_test_accuracy"] is None) == ("optimizer=hebbian" not in options)


def test_a_control_that_fails_leaves_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> float:
        raise bioopt.Diverged("the loss is nan")

    monkeypatch.setattr(classification, "control_accuracy", fails)
    summary = run(config(*BAD, f"run_dir={tmp_path / 'run'}"))
    assert summary["control_test_accuracy"] is None
    assert summary["test_accuracy"] is not None
    assert "its control was not measured (the loss is nan); control=false leaves it out" in capsys.readouterr().out


@pytest.mark.long
def test_the_first_rank_alone_measures_the_control(tmp_path: Path) -> None:
    first, second = map(ended, spread("optimizer=hebbian", *MLP, "device=cpu", "run_dir=two", cwd=tmp_path))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert second.stdout == ""
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    one = run(config("optimizer=hebbian", *MLP, f"run_dir={tmp_path / 'one'}"))
    assert two["control_test_accuracy"] == one["control_test_accuracy"] is not None


@pytest.mark.parametrize("share", ["-0.1", "1.5", "null", "some"])
def test_a_share_that_is_none_is_refused(share: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"control={share.replace('null', 'None')} must be a share of the run"):
        run(config(*BAD, f"control={share}", f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
