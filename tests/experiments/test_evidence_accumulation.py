"""`experiment=evidence_accumulation`: trials match their description, and all networks learn from the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.run import run
from experiments.tasks.evidence_accumulation import LEARNERS, EvidenceAccumulation

from ..commands import config, made_task
from .test_tasks import interrupted, resumed

TINY = ["experiment=evidence_accumulation", "logger.mode=disabled", "task.rounds=2", "task.steps=2", "task.trials=8"]
TINY += ["task.hidden=6", "task.batch_size=4", "task.cues=3", "task.cue=2", "task.pause=1", "task.delay=[2,4]"]
TINY += ["task.answer=2"]


def task(*overrides: str) -> EvidenceAccumulation:
    torch.manual_seed(0)
    made: EvidenceAccumulation = made_task(config(*TINY, *overrides))
    return made


def test_a_trial_has_one_answer() -> None:
    made = task("task.rate=1", "task.noise=0")
    lengths = set()
    for _ in range(20):
        spikes, labels = made.drawn(50)
        steps, trials, inputs = spikes.shape
        assert (trials, inputs) == (50, 40)
        lengths.add(steps)
        groups = spikes.unflatten(2, (4, 10)).mean(3)
        cues = groups[:9].unflatten(0, (3, 3))  # cue × step × trial × group
        assert torch.equal(cues[:, 0], cues[:, 1])
        assert torch.equal(cues[:, 0, :, :2].sum(2), torch.ones(3, 50))
        assert not cues[:, 2].any()
        assert not groups[9:-2].any()
        assert groups[-2:, :, 2].all()
        assert torch.equal((cues[:, 0, :, 1].sum(0) > 1.5).long(), labels)
    assert lengths == {9 + 2 + 2, 9 + 3 + 2, 9 + 4 + 2}
    made.close()


def test_all_networks_start_alike() -> None:
    made = task()
    first, *others = (learner.network.state_dict() for learner in made.made.values())
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first if "neurons" not in name)
    frozen = made.made["frozen"]
    before = frozen.network.layer.enter.weight.clone()  # type: ignore[union-attr]
    line = made.round(1)
    assert torch.equal(before, frozen.network.layer.enter.weight)  # type: ignore[union-attr]
    assert {*LEARNERS} <= line.keys()
    assert not torch.equal(before, made.made["random"].network.layer.enter.weight)  # type: ignore[union-attr]
    made.close()


def test_it_runs_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(config(*TINY, f"run_dir={tmp_path / 'whole'}"))
    assert [*summary["measured"]][: len(LEARNERS)] == [*LEARNERS]
    assert {path.name for path in (tmp_path / "whole").glob("*.png")} == {"accuracy.png", "trial.png"}
    interrupted(monkeypatch, EvidenceAccumulation, 2, *TINY, f"run_dir={tmp_path / 'stopped'}")
    assert resumed(monkeypatch, tmp_path / "stopped")["measured"] == summary["measured"]


def test_bad_options_are_named() -> None:
    for options, message in (
        (("task.cues=4",), "task.cues=4 must be odd"),
        (("task.delay=[5,2]",), r"task.delay=\[5, 2\] must be the least and the most"),
        (("task.learners=[eprop,sgd]",), "task.learners: sgd must be among eprop, random"),
    ):
        with pytest.raises(ValueError, match=message):
            task(*options)
