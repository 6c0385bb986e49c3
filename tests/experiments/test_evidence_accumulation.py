"""`experiment=evidence_accumulation`: trials match their description, and all networks learn from the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.run import run
from experiments.tasks.credit import cosine_per_step, states_of
from experiments.tasks.evidence_accumulation import EvidenceAccumulation, potentials

from ..commands import config, made_task
from .test_tasks import interrupted, resumed

LEARNERS = EvidenceAccumulation.known

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


@pytest.mark.long
def test_it_runs_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(config(*TINY, f"run_dir={tmp_path / 'whole'}"))
    assert [*summary["measured"]][: len(LEARNERS)] == [*LEARNERS]
    assert {path.name for path in (tmp_path / "whole").glob("*.png")} == {"accuracy.png", "credit.png", "trial.png"}
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


def test_credit_is_compared_with_backpropagation() -> None:
    """With symmetric feedback and silent recurrent weights, e-prop is the gradient; with random feedback it is not."""
    made = task("task.learners=[eprop,random]")
    xs, sides = made.drawn(4)
    found = {}
    for name, learner in made.made.items():
        network, rule = learner.network, learner.last.optimizer
        with torch.no_grad():
            network.layer.enter.weight.mul_(4)
            network.layer.recurrent.weight.zero_()
        found[name] = cosine_per_step(network, rule, network.layer.enter, xs, sides)
        assert found[name].shape == (len(xs),)
        rule.zero_grad()
        with pytest.raises(RuntimeError, match="no synapse has fired"):
            rule.step()  # nothing is left of the comparison
    torch.testing.assert_close(found["eprop"].nan_to_num(1.0), torch.ones(len(xs)))
    assert found["random"].nan_to_num(1.0).min() < 0.9
    made.close()


@pytest.mark.parametrize("name", ["eprop", "lif"])
def test_a_neuron_fires_when_its_membrane_is_above_its_threshold(name: str) -> None:
    made = task(f"task.learners=[{name}]", "task.rate=1")
    network = made.made[name].network
    with torch.no_grad():
        network.layer.enter.weight.mul_(4)
    with states_of(network.layer.neurons) as states:
        network(made.drawn(4)[0])
    membranes, thresholds = potentials(network.layer.neurons, states)
    assert network.activity.any()
    assert torch.equal((membranes > thresholds).float(), network.activity)
    made.close()
