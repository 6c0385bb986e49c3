"""`experiment=savings`: how steps are counted, and that all rules get the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.run import run
from experiments.tasks import savings
from experiments.tasks.savings import Permutation, Savings

from ..commands import config, made_task
from .test_tasks import interrupted, resumed

RULES = ["forward_gradient", "node_perturbation", "weight_perturbation", "hebbian"]
TINY = ["experiment=savings", "logger.mode=disabled", "model.hidden=[16]", "task.repetitions=2", "task.criterion=0.3"]
TINY += [f"~rules.{rule}" for rule in RULES] + ["rules.sgd.lr=0.01"]


def task(*overrides: str) -> Savings:
    made: Savings = made_task(config(*TINY, *overrides))
    return made


def test_a_permutation_is_the_same_data() -> None:
    images = task().images
    torch.manual_seed(0)
    pixels, labels = Permutation(images, "pixels"), Permutation(images, "labels")
    shown, names = pixels.tested
    plain, same = labels.tested
    assert torch.equal(names, images.test_labels)
    assert not torch.equal(shown, plain)
    assert torch.equal(shown.flatten(1).sort().values, plain.flatten(1).sort().values)
    assert torch.equal(plain, images.prepare(images.test_images))
    assert not torch.equal(same, images.test_labels)
    exchanged = {(int(a), int(b)) for a, b in zip(images.test_labels, same, strict=True)}
    assert len(exchanged) == len({a for a, _ in exchanged}) == len({b for _, b in exchanged}) == 10


def test_learning_ends_at_the_criterion_or_after_the_most_steps() -> None:
    line = task().round(1)
    for course in line["courses"].values():
        assert all(accuracy < 0.3 for accuracy in course[:-1])
        assert course[-1] >= 0.3
    never = task("task.most=3", "task.criterion=1.0").round(1)
    assert never["steps_first"] == 3
    assert len(never["courses"]["first"]) == 4
    assert "savings" not in never


def test_savings_count_the_steps_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = iter([40, 7, 10, 50])  # A, B, A again, C
    monkeypatch.setattr(Savings, "learn", lambda *_: [0.1] * next(lengths) + [0.9])
    line = task().round(1)
    assert (line["savings"], line["control"], line["implicit"]) == (0.75, -0.25, 0.8)


def test_savings_are_complete_without_forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """B and C are A here."""

    def plain(images: Any, of: str) -> Permutation:
        torch.manual_seed(7)
        return Permutation(images, of)

    monkeypatch.setattr(savings, "Permutation", plain)
    line = task().round(1)
    assert line["steps_first"] > 0
    assert line["steps_again"] == line["steps_other"] == 0
    assert line["savings"] == line["control"] == 1


def test_all_rules_get_the_same_data_and_repetitions_differ() -> None:
    made = task("rules.random_trunk.lr=0.05")
    assert made.rules == ["sgd", "random_trunk"]
    lines = [made.round(number) for number in range(1, 5)]
    assert [(line["rule"], line["repetition"]) for line in lines] == [
        ("sgd", 0), ("random_trunk", 0), ("sgd", 1), ("random_trunk", 1)
    ]  # fmt: skip
    starts = [line["courses"]["first"][0] for line in lines]
    assert starts[0] == starts[1] != starts[2] == starts[3]
    torch.manual_seed(5)
    assert task("rules.random_trunk.lr=0.05").round(4) == lines[3]  # needs no round before it


def test_the_control_starts_like_the_second_a(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[list[torch.Tensor]] = []
    learn = Savings.learn

    def watched(self: Savings, model: torch.nn.Module, *arguments: Any) -> list[float]:
        began.append([p.detach().clone() for p in model.parameters()])
        return learn(self, model, *arguments)

    monkeypatch.setattr(Savings, "learn", watched)
    task().round(1)
    _, _, again, other = began
    assert all(torch.equal(a, b) for a, b in zip(again, other, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_experiment_trains(rule: str) -> None:
    chosen = [word for word in TINY if word != f"~rules.{rule}"]
    made = Savings(
        config(*chosen), torch.device("cpu"), permute="labels", criterion=0.99, most=2, batch_size=16, repetitions=1
    )
    line = made.round(made.rules.index(rule) + 1)
    assert (line["rule"], line["steps_first"]) == (rule, 2)


@pytest.mark.long
def test_a_run_draws_its_pictures_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(config(*TINY, f"run_dir={tmp_path / 'whole'}"))
    for picture in ("savings.png", "courses.png"):
        assert (tmp_path / "whole" / picture).read_bytes().startswith(b"\x89PNG")
    assert {"sgd_savings", "sgd_savings_ci95", "random_trunk_implicit"} < set(whole["measured"])
    interrupted(monkeypatch, Savings, 3, *TINY, f"run_dir={tmp_path / 'part'}")
    assert resumed(monkeypatch, tmp_path / "part")["measured"] == whole["measured"]


@pytest.mark.long
def test_a_rule_that_learns_nothing_is_named_in_the_picture(tmp_path: Path) -> None:
    summary = run(config(*TINY, "task.most=2", "task.criterion=1.0", f"run_dir={tmp_path / 'run'}"))
    assert summary["measured"] == {}
    assert (tmp_path / "run" / "savings.png").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.permute=colours", r"task\.permute=colours must be pixels or labels"),
        ("task.criterion=0", r"task\.criterion=0 must be in \(0, 1\]"),
        ("task.most=0", r"task\.most=0 must be an integer >= 1"),
        ("rules.sgd.lr=1e30", r"sgd: the loss is (nan|inf) with rules\.sgd\.lr=.*; lower it"),
    ],
)
def test_mistakes_raise_clear_errors(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(config(*TINY, override, f"run_dir={tmp_path / 'run'}"))
