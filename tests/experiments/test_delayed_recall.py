"""`experiment=delayed_recall`: sequences match their description, and each model fails where theory predicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments.run import run
from experiments.tasks.delayed_recall import MODELS, DelayedRecall, MeanCrossEntropy

from ..commands import config, made_task
from .test_tasks import interrupted, resumed

TINY = ["experiment=delayed_recall", "logger.mode=disabled", "task.rounds=2", "task.steps=2", "task.sequences=20"]
TINY += ["task.gru.hidden=8", "task.gru.batch_size=8", "task.delays=[0,7]", "task.loads=[1,3]"]


def task(*overrides: str) -> DelayedRecall:
    torch.manual_seed(0)
    made: DelayedRecall = made_task(config(*TINY, *overrides))
    return made


def test_a_sequence_has_one_answer() -> None:
    recall = task()
    episodes = recall.episodes(load=5, delay=4, count=50)
    assert episodes.keys.shape == (9, 50, 16)
    assert episodes.matters.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    for n in range(50):
        keys = [int((recall.keys == key).all(1).nonzero()) for key in episodes.keys[:, n]]
        assert len(set(keys[:5])) == 5
        assert not set(keys[:5]) & set(keys[5:])
        (asked,) = [i for i in range(5) if torch.equal(episodes.keys[i, n], episodes.cue[n])]
        assert int(episodes.values[asked, n].argmax()) == int(episodes.answer[n])


@pytest.mark.parametrize(("load", "delay"), [(3, 0), (3, 5), (3, 6), (3, 12), (10, 0), (10, 2)])
def test_a_buffer_recalls_what_it_holds(load: int, delay: int) -> None:
    """With distinct keys it recalls the pairs that later items have not displaced, and guesses the rest."""
    recall = task("task.sequences=4000", "task.buffer.inverse_temperature=60")
    recall.keys = torch.eye(16)
    found = recall.accuracies(load, delay)
    for name, held in (("buffer", min(load, max(0, 7 - delay))), ("gated_buffer", min(load, 7))):
        known = held / load
        assert found[name] == pytest.approx(known + (1 - known) / recall.values, abs=0.03)
    assert found["gated_fast_weights"] == 1  # nothing blurs keys at right angles
    assert 0.15 < found["gru"] < 0.35  # it has learned nothing yet


def test_fast_weights_confuse_similar_keys() -> None:
    few, many = task("task.sequences=2000"), task("task.sequences=2000", "task.size=64")
    assert few.accuracies(12, 0)["fast_weights"] < many.accuracies(12, 0)["fast_weights"]
    assert few.accuracies(3, 30)["fast_weights"] < few.accuracies(3, 5)["fast_weights"] - 0.2


def test_the_gru_learns_from_torch_s_own_mean_of_the_loss() -> None:
    scores, labels = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    assert torch.equal(MeanCrossEntropy()(scores, labels), F.cross_entropy(scores, labels))


def test_the_gru_learns_what_it_is_trained_on() -> None:
    recall = task("task.steps=250", "task.gru.hidden=32", "task.gru.batch_size=64", "task.gru.load=1")
    before, line = recall.accuracies(1, 2)["gru"], recall.round(1)
    assert before < 0.6
    assert line["against_load"]["gru"][0] > 0.9


def test_a_run_leaves_its_picture_and_its_numbers(tmp_path: Path) -> None:
    summary = run(config(*TINY, f"run_dir={tmp_path / 'run'}"))
    assert (tmp_path / "run" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert {f"{name}_at_longer_delays" for name in MODELS} < set(summary["measured"])
    assert all(0 <= value <= 1 for value in summary["measured"].values())


def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(config(*TINY, f"run_dir={tmp_path / 'whole'}"))
    interrupted(monkeypatch, DelayedRecall, 2, *TINY, f"run_dir={tmp_path / 'part'}")
    assert resumed(monkeypatch, tmp_path / "part")["measured"] == whole["measured"]
    weights = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["gru"] for name in ("whole", "part")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.symbols=3", r"task\.symbols=3 must be more than 4, the largest load"),
        ("task.steps=0", r"task\.steps=0 must be an integer >= 1"),
        ("task.loads=[0,1]", "each load must be >= 1"),
        ("task.delays=[-1]", "each delay >= 0"),
        ("task.buffer.capacity=0", r"experiment=delayed_recall: ShortTermMemory: capacity=0 must be an integer >= 1"),
    ],
)
def test_bad_options_raise_clear_errors(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(config(*TINY, override, f"run_dir={tmp_path / 'run'}"))
