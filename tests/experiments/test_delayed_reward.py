"""`experiment=delayed_reward`: episodes match their description, and traces alone bridge the delay of the reward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.run import run
from experiments.tasks.delayed_reward import DelayedReward, Reward

from ..commands import config, made_task
from .test_tasks import interrupted, resumed

TINY = ["experiment=delayed_reward", "logger.mode=disabled", "task.rounds=2", "task.steps=2", "task.trials=8"]
TINY += ["task.batch_size=4", "task.cue=2", "task.delay=1", "task.waits=[0,2]", "task.shown_wait=2"]


def task(*overrides: str) -> DelayedReward:
    torch.manual_seed(0)
    made: DelayedReward = made_task(config(*TINY, *overrides))
    return made


def test_an_episode_shows_one_cue_and_goes_on_until_the_reward() -> None:
    made = task("task.rate=1", "task.noise=0")
    spikes, cue = made.drawn(50, 2)
    assert spikes.shape == (2 + 1 + 2 + 1, 50, 40)
    groups = spikes.unflatten(2, (4, 10))
    for n in range(50):
        assert groups[:2, n, cue[n]].all()
        assert groups[:, n].sum() == 2 * 10
    made.close()


def test_the_action_is_taken_before_the_reward() -> None:
    """What comes after the action changes no choice."""
    made = task("task.current=0")
    agent = made.made["reward_hebbian@2"].network
    spikes, _ = made.drawn(5, 2)
    later = spikes.clone()
    later[4:] = 1
    assert torch.equal(agent(spikes), agent(later))
    later[3:] = 1
    assert not torch.equal(agent(spikes), agent(later))
    losses = Reward()(torch.eye(4), torch.tensor([0, 1, 1, 1]))
    assert losses.tolist() == [-1, -1, 0, 0]
    made.close()


def test_a_trace_bridges_the_delay_and_without_one_the_cue_teaches_nothing() -> None:
    """With spikes during cues alone, no coincidence is left at the time of the reward."""
    made = task("task.noise=0", "task.rate=1", "task.current=0.5", "task.threshold=6")
    start = {name: one.network.layer.weight.clone() for name, one in made.made.items()}
    made.round(1)
    for name, learner in made.made.items():
        moved = not torch.equal(start[name], learner.network.layer.weight)
        assert moved == ("no_trace" not in name), name
    made.close()


def test_it_runs_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(config(*TINY, f"run_dir={tmp_path / 'whole'}"))
    assert summary["measured"]["chance"] == 0.25
    assert (tmp_path / "whole" / "reward.png").exists()
    interrupted(monkeypatch, DelayedReward, 2, *TINY, f"run_dir={tmp_path / 'stopped'}")
    assert resumed(monkeypatch, tmp_path / "stopped")["measured"] == summary["measured"]


def test_bad_options_are_named() -> None:
    for options, message in (
        (("task.cues=1",), "task.cues=1 must be an integer >= 2"),
        (("task.waits=[5,2]",), r"task.waits=\[5, 2\] must be time steps >= 0, in order"),
        (("task.shown_wait=7",), r"task.shown_wait=7 must be one of task.waits=\[0, 2\]"),
        (("task.learners=[sgd]",), "task.learners: sgd must be among reward_hebbian"),
    ):
        with pytest.raises(ValueError, match=message):
            task(*options)
