"""`experiment=meta_cost`: the information of the outer loops, their choices, and the comparison."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bioopt.costs import UNLABELLED, CrossEntropy, Hinge, Mixture
from experiments import building
from experiments.phases import fit_cost, split
from experiments.run import run
from experiments.tasks.meta_cost import LEAST, Choice, MetaCost, Result, Tried

from ..commands import config, made_task
from .test_tasks import interrupted, resumed

TINY = ["experiment=meta_cost", "data=digits", "logger.mode=disabled", "model.hidden=[8]", "task.repetitions=1"]
TINY += ["task.train=200", "task.validation=100", "task.steps=2", "task.batch_size=8", "task.rates=[0.3,3]"]
TINY += ["task.learnings=5", "task.tested=1", "task.costs=[cross_entropy,contrastive]"]
TINY += [f"~task.problems.{name}" for name in ("wrong_labels", "imbalanced")]


def task(*overrides: str) -> MetaCost:
    made: MetaCost = made_task(config(*TINY, *overrides))
    return made


@pytest.mark.long
def test_a_run_draws_its_pictures_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [*TINY, "~rules.node_perturbation"]
    whole = run(config(*few, f"run_dir={tmp_path / 'whole'}"))
    for picture in ("costs.png", "path.png"):
        assert (tmp_path / "whole" / picture).read_bytes().startswith(b"\x89PNG")
    assert "| clean |" in (tmp_path / "whole" / "table.md").read_text()
    assert {"sgd_optuna_over_one_size", "sgd_few_labels_best_cost"} < set(whole["measured"])
    interrupted(monkeypatch, MetaCost, 2, *few, f"run_dir={tmp_path / 'part'}")
    torch.manual_seed(9)
    assert resumed(monkeypatch, tmp_path / "part")["measured"] == whole["measured"]
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / name).read_text().splitlines()
        ]
        for name in ("whole/metrics.jsonl", "part/metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    assert [(line["problem"], line["rule"]) for line in lines[0]] == [("clean", "sgd"), ("few_labels", "sgd")]


def rigged(choice: Choice) -> float:
    """The second cost is the better, and so is a large rate."""
    return 0.3 + 0.4 * choice.shares[1] + 0.1 * math.log10(choice.rate)


@pytest.mark.parametrize("loop", ["perturb", "optuna"])
def test_outer_loops_move_towards_what_is_better(loop: str) -> None:
    made = task("task.learnings=61", "task.costs=[hinge,focal,contrastive]")
    tried = Tried(rigged)
    path = getattr(made, loop)(tried, 5)
    start, *_, last = tried.found
    assert start.shares == pytest.approx([1 / 3] * 3)
    assert start.rate == pytest.approx(math.sqrt(0.3 * 3))
    assert tried.best.shares[1] > 0.8
    assert tried.best.rate > 2
    assert len(tried.found) <= 61
    assert max(choice.rate for choice in tried.found) <= 3 * (1 + 1e-9)
    if loop == "perturb":
        assert len(path) == 16
        assert path[-1][1] > 0.8 > path[0][1]
        assert last.shares[1] > 0.5
    again = Tried(rigged)
    getattr(made, loop)(again, 5)
    assert again.found == tried.found
    other = Tried(rigged)
    getattr(made, loop)(other, 6)
    assert other.found != tried.found


def test_a_point_is_tried_once_and_both_loops_try_the_same_number() -> None:
    made, calls = task("task.learnings=9"), []

    def counted(choice: Choice) -> float:
        calls.append(choice)
        return rigged(choice)

    for loop in (made.perturb, made.optuna):
        calls.clear()
        loop(Tried(counted), 0)
        assert len(calls) == len(set(calls)) == 9


def test_the_outer_loops_never_see_the_test_set() -> None:
    made = task()
    before = made.round(3)  # sgd, few labels
    made.images.test_labels = (made.images.test_labels + 1) % 10
    made.images.test_images = made.images.test_images.flip(2)
    after = made.round(3)
    for name, chosen in before["chosen"].items():
        assert {**chosen, "test": None} == {**after["chosen"][name], "test": None}
    assert before["tried"] == after["tried"]
    assert before["path"] == after["path"]
    assert [c["test"] for c in before["chosen"].values()] != [c["test"] for c in after["chosen"].values()]


def test_validation_labels_are_true_and_all_learners_get_the_same_data() -> None:
    made = task("+task.problems.wrong_labels.share=0.5")
    clean, wrong = (made.posed(name, 4, 100) for name in ("clean", "wrong_labels"))
    assert torch.equal(clean.train_images, wrong.train_images)
    assert int((clean.train_labels != wrong.train_labels).sum()) == 100
    assert torch.equal(clean.test_labels, wrong.test_labels)
    real = made.posed("wrong_labels", 4, None)
    assert torch.equal(real.train_labels, wrong.train_labels)
    assert torch.equal(real.test_labels, made.images.test_labels)
    assert not torch.equal(made.posed("clean", 5, 100).train_labels, clean.train_labels)


def test_each_cost_has_the_same_gradient_norm_at_the_start() -> None:
    made = task("task.costs=[squared_error,hinge,contrastive,denoising]")
    images = made.posed("clean", 0, 100)
    lengths = made.lengths(images, 3)
    assert lengths["contrastive"] > 5 * lengths["squared_error"]
    index = made.draw(images, 256, torch.Generator().manual_seed(3))
    inputs, labels = images.prepare(images.train_images[index]), images.train_labels[index]
    for i, name in enumerate(made.costs):
        torch.manual_seed(3)
        model = building.build_model(made.config, images)
        shares = tuple(float(i == j) for j in range(4))
        (trunk, *_) = made.learner("sgd", Choice(shares, 1.0), model, images, 3, lengths).blocks
        said = trunk.network(trunk.cost.corrupt(inputs)).detach().requires_grad_()
        (slope,) = torch.autograd.grad(trunk.cost(said, labels, inputs=inputs).sum(), said)
        assert float(slope.square().sum(1).mean().sqrt()) == pytest.approx(1, rel=0.35), name


def test_the_head_is_the_readout_of_scores_or_a_separate_block() -> None:
    made = task("task.costs=[hinge,focal,contrastive]")
    images = made.posed("clean", 0, 100)
    lengths = made.lengths(images, 0)
    model = building.build_model(made.config, images)
    trunk, head = split(model)

    (block,) = made.learner("sgd", Choice((0.2, 0.3, 0.5), 2.0), model, images, 0, lengths).blocks
    learned = {p for group in block.optimizer.param_groups for p in group["params"]}
    assert learned == set(model.parameters())
    assert block.optimizer.param_groups[0]["lr"] == pytest.approx(2 * made.config.rules.sgd.lr)
    inputs, labels = torch.randn(12, 1, 28, 28), torch.arange(12) % 4
    scores, activity = model(inputs), trunk(inputs)
    parts = {name: building.build_cost(name) for name in made.costs}
    expected = 0.2 / lengths["hinge"] * parts["hinge"](scores, labels)
    expected = expected + 0.3 / lengths["focal"] * parts["focal"](scores, labels)
    expected = expected + 0.5 / lengths["contrastive"] * parts["contrastive"](activity, labels)
    torch.testing.assert_close(block.closure(inputs, labels)(), expected)

    below, above = made.learner("sgd", Choice((0.0, 0.0, 1.0), 1.0), model, images, 0, lengths).blocks
    assert {p for g in below.optimizer.param_groups for p in g["params"]} == set(trunk.parameters())
    assert {p for g in above.optimizer.param_groups for p in g["params"]} == set(head.parameters())
    passed_on = below.forward_detached(inputs)
    torch.testing.assert_close(
        above.closure(passed_on, labels)(),
        F.cross_entropy(head(passed_on), labels, reduction="none") / lengths["cross_entropy"],
    )
    assert not passed_on.requires_grad


@pytest.mark.parametrize("rule", ["sgd", "node_perturbation"])
def test_a_learner_learns_and_one_that_diverges_is_at_chance(rule: str) -> None:
    made = task("task.steps=60", "task.batch_size=32", "task.train=1000", "model.hidden=[32]")
    images = made.posed("clean", 0, 100)
    lengths = made.lengths(images, 1)
    reached = [made.accuracy(rule, Choice(shares, 1.0), images, 1, lengths) for shares in ((1.0, 0.0), (0.6, 0.4))]
    assert min(reached) > 0.3
    assert made.accuracy(rule, Choice((1.0, 0.0), 1.0), images, 1, lengths) == reached[0]
    assert made.accuracy(rule, Choice((0.5, 0.5), 1e30), images, 1, lengths) < 0.2


def test_half_of_each_batch_has_labels_where_some_are_missing() -> None:
    made = task("task.problems.few_labels.count=20")
    images = made.posed("few_labels", 0, 100)
    for index in made.batches(images, torch.Generator().manual_seed(0)):
        assert int((images.train_labels[index] != UNLABELLED).sum()) == 4
    drawn = made.draw(made.posed("clean", 0, 100), 9, torch.Generator().manual_seed(0))
    assert len(drawn) == 9


def test_small_shares_become_zero() -> None:
    choice = Choice.of([0.0, 0.0, -9.0], 1.0)
    assert choice.shares == (0.5, 0.5, 0.0)
    assert all(s == 0 or s >= LEAST for s in Choice.of([2.0, -1.0, -2.5, 1.0], 1.0).shares)


def test_one_cost_for_all_is_compared_with_a_choice_for_each_task() -> None:
    """Cost a is better on average, cost b on the second task, by the gain that is reported."""

    def line(problem: str, repetition: int, a: float, b: float, loop: float) -> dict[str, Any]:
        accuracies = {"cross_entropy": a, "contrastive": b, "optuna": loop, "perturbation": loop}
        chosen = {name: {"validation": v, "test": v - 0.01 * repetition} for name, v in accuracies.items()}
        return {"problem": problem, "best_cost": "cross_entropy" if a > b else "contrastive", "chosen": chosen}

    lines = [line("clean", r, 0.9, 0.5, 0.91) for r in range(3)]
    lines += [line("few_labels", r, 0.6, 0.7, 0.72 + 0.01 * r) for r in range(3)]
    made = task()
    result = Result(lines, made.problems, made.costs)
    assert result.one_size == "cross_entropy"
    assert result.gains("best_cost") == pytest.approx([0.05] * 3)
    assert result.gains("best_cost", "clean") == pytest.approx([0.0] * 3)
    assert result.gains("optuna", "few_labels") == pytest.approx([0.12, 0.13, 0.14])
    assert result.mean("mean", "cross_entropy") == pytest.approx(0.74)
    assert (result.chosen("clean", "cross_entropy"), result.chosen("few_labels", "cross_entropy")) == (3, 0)
    assert result.verdict() == "cross entropy for all is not enough"
    worse = Result(
        [line(p, r, 0.9, 0.5, 0.8) for p in ("clean", "few_labels") for r in range(3)], made.problems, made.costs
    )
    assert worse.verdict() == "nothing is surely better than cross entropy for all"


@pytest.mark.filterwarnings("error")
def test_hinge_is_that_of_torch_and_runs_in_a_batch_of_evaluations() -> None:
    scores, labels = torch.randn(3, 6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3])
    for margin in (0.5, 1.0):
        cost = Hinge(margin)
        expected = torch.stack([F.multi_margin_loss(s, labels, margin=margin, reduction="none") for s in scores])
        torch.testing.assert_close(torch.stack([cost(s, labels) for s in scores]), expected)
        torch.testing.assert_close(torch.func.vmap(lambda s, c=cost: c(s, labels))(scores), expected)


def test_costs_of_a_mixture_may_share_a_readout() -> None:
    head, activity, labels = nn.Linear(6, 3), torch.randn(4, 6), torch.tensor([0, 2, 1, 1])
    parts = {"a": CrossEntropy(), "b": Hinge()}
    inner = Mixture(parts, {"a": 2.0, "b": 0.5}, readout=head)
    outer = Mixture({"inner": inner}, {"inner": 3.0})
    fit_cost(outer, "trunk", nn.Identity(), activity, 3, 1, last=False)
    assert inner.readout is head
    expected = 6 * parts["a"](head(activity), labels) + 1.5 * parts["b"](head(activity), labels)
    torch.testing.assert_close(outer(activity, labels), expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.costs=[cross_entropy]", r"task\.costs=\['cross_entropy'\] must be two costs or more"),
        ("task.costs=[cross_entropy,cross_entropy]", "must be two costs or more"),
        ("task.costs=[cross_entropy,sharpness]", r"task\.costs=sharpness is not a cost.*there are .*focal"),
        ("task.costs=[cross_entropy,slowness]", r"'slowness', which needs sequences"),
        ("task.rates=[]", r"task\.rates=\[\] must be"),
        ("task.rates=[0,1]", r"task\.rates=\[0, 1\] must be"),
        ("task.learnings=4", r"task\.learnings=4 must be >= 5"),
        ("task.population=1", r"task\.population=1 must be an integer >= 2"),
        ("task.steps=0", r"task\.steps=0 must be an integer >= 1"),
        ("task.train=5000", r"train=5000 and validation=100"),
        ("+task.problems.hard={}", r"task\.problems has 'hard'.*there are clean, wrong_labels"),
        ("task.problems.few_labels.count=3", r"count=3 must be an integer >= 10"),
        ("+optimizer@rules.hebbian=hebbian", r"rules\.hebbian learns from no cost"),
    ],
)
def test_mistakes_raise_clear_errors(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(config(*TINY, override, f"run_dir={tmp_path / 'run'}"))


def test_without_optuna_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"needs Optuna: pip install -e '\.\[tune\]'"):
        task()
