"""`experiment=context_routing`: sizes of the networks, computation, routes, and the conflict between tasks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bioopt.nn import Gate
from experiments import data
from experiments.data import problems
from experiments.run import run
from experiments.tasks.context_routing import ContextRouting, counted, guessed, information, weights

from ..commands import config, made_task
from .test_tasks import interrupted, resumed

RULES = ["node_perturbation", "hebbian", "random_trunk"]
SMALL = ["experiment=context_routing", "data=digits", "logger.mode=disabled", "task.contexts=2", "task.pathways=3"]
SMALL += ["task.active=[1]", "task.hidden=4", "task.train=64", "task.epochs=1", "task.repetitions=2"]
SMALL += ["task.batch_size=32", "task.test=90"]
SMALL += [f"~task.lr.{rule}" for rule in ("sgd", "node_perturbation", "hebbian")]
TINY = [*SMALL, *(f"~rules.{rule}" for rule in RULES)]


def task(*overrides: str, plain: list[str] = TINY) -> ContextRouting:
    made: ContextRouting = made_task(config(*plain, *overrides))
    return made


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if "time" not in key}


def test_networks_have_one_size_and_pathways_the_same_start() -> None:
    made = task("task.pathways=5", "task.hidden=8", "task.active=[1,2]")
    assert made.networks == ["fixed", "routed_1", "routed_2", "all_run", "connected", "no_context"]
    built = {}
    for name in made.networks:
        torch.manual_seed(0)
        built[name] = made.network(name)
    sizes = [weights(network) for network in built.values()]
    assert max(sizes) <= 1.05 * min(sizes)
    assert sizes[3] == 5 * (784 * 8 + 8) + (2 * 5 + 5) + (8 * 10 + 10)
    start = built["fixed"].state_dict()
    assert len(start) == 2 * 5 + 2
    for name in ("routed_1", "routed_2", "all_run"):
        assert all(torch.equal(built[name].state_dict()[key], value) for key, value in start.items())


def test_multiply_adds_match_the_layers_that_ran() -> None:
    made = task("task.active=[1,2]")
    found = {}
    for number, name in enumerate(made.networks, 1):
        line = made.round(number)
        assert line["network"] == name
        found[name] = line["multiply_adds"]
        assert line["computation"] == pytest.approx(line["multiply_adds"] / (3 * 784 * 4 + 2 * 3 + 4 * 10))
    assert found["fixed"] == 784 * 4 + 4 * 10
    assert found["routed_1"] == 784 * 4 + 2 * 3 + 4 * 10
    assert found["routed_2"] == 2 * 784 * 4 + 2 * 3 + 4 * 10
    assert found["all_run"] == 3 * 784 * 4 + 2 * 3 + 4 * 10
    assert found["connected"] == found["no_context"] == (784 + 2) * 12 + 12 * 10


def test_counting_follows_each_sample_through_pathways_of_different_length() -> None:
    torch.manual_seed(0)
    long = nn.Sequential(nn.Linear(6, 20), nn.ReLU(inplace=True), nn.Linear(20, 5))
    model = nn.Sequential(Gate(nn.Linear(6, 2), [long, nn.Linear(6, 5)], active=1), nn.Conv1d(5, 3, 1))
    x = torch.randn(17, 6)
    with counted(model) as made:
        model[1](model[0](x).unsqueeze(2))
    by_hand = 0
    for row in x:
        by_hand += 6 * 2 + 5 * 3
        by_hand += 6 * 20 + 20 * 5 if model[0].controller(row).argmax() == 0 else 6 * 5
    assert made[0] == by_hand
    model[0](x)
    assert made[0] == by_hand  # it has ended


def test_information_between_pathway_and_context() -> None:
    apart = torch.eye(4, 6)
    assert information(apart) == information(0.25 * apart) == 2.0
    assert information(torch.full((4, 6), 0.1)) == pytest.approx(0, abs=1e-12)
    assert information(apart[[0, 0, 1, 2]]) == 1.5
    gates = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    joint = [[float(g) / float(row.sum()) / 3 for g in row] for row in gates]
    bits = 0.0
    for k, i in itertools.product(range(3), range(4)):
        bits += joint[k][i] * math.log2(joint[k][i] / (sum(joint[k]) * sum(row[i] for row in joint)))
    assert information(gates) == pytest.approx(bits, abs=1e-6)


def test_without_the_context_accuracy_is_limited() -> None:
    images = problems.contexts(task().images, torch.Generator().manual_seed(0), 3)
    names = images.test_labels.view(3, -1)
    most = [max(column.count(name) for name in column) for column in map(list, zip(*names.tolist(), strict=True))]
    assert guessed(images, 3) == pytest.approx(sum(most) / len(most) / 3)


def test_the_tasks_conflict_without_a_context_and_fixed_routing_solves_them() -> None:
    made = task("task.train=1000", "task.test=360", "task.hidden=16", "task.epochs=10", "rules.sgd.lr=0.02")
    fixed, no_context = made.round(1), made.round(5)
    assert no_context["network"] == "no_context"
    assert no_context["accuracy"] <= no_context["guess"] + 1e-6
    assert no_context["guess"] < 0.65
    assert fixed["accuracy"] > 0.8
    assert fixed["worst_context"] > 0.75
    assert (fixed["information"], fixed["in_use"]) == (1.0, 2)
    assert fixed["gates"] == fixed["gates_at_start"] == [[1, 0, 0], [0, 1, 0]]


def test_rounds_are_independent_and_repetitions_differ() -> None:
    made = task()
    lines = [made.round(number) for number in range(1, made.rounds + 1)]
    assert [line["network"] for line in lines] == made.networks * 2
    assert [line["repetition"] for line in lines] == [0] * 5 + [1] * 5
    assert lines[1]["gates_at_start"] != lines[6]["gates_at_start"]
    assert lines[1]["gates_at_start"] != lines[1]["gates"]
    torch.manual_seed(5)
    assert timeless(task().round(7)) == timeless(lines[6])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_experiment_trains(rule: str) -> None:
    others = [f"~rules.{other}" for other in ("sgd", *RULES) if other != rule]
    made = task(*others, plain=SMALL)
    for number, name in enumerate(made.networks, 1):
        line = made.round(number)
        assert (line["rule"], line["network"]) == (rule, name)
        if rule == "random_trunk" and name == "routed_1":
            assert line["gates"] == line["gates_at_start"]
            assert line["multiply_adds"] == 784 * 4 + 2 * 3 + 4 * 10  # frozen layers compute as well
        elif name == "routed_1":
            assert line["gates"] != line["gates_at_start"]


@pytest.mark.long
def test_a_run_draws_its_pictures_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(config(*TINY, f"run_dir={tmp_path / 'whole'}"))
    for picture in ("accuracy.png", "routes.png"):
        assert (tmp_path / "whole" / picture).read_bytes().startswith(b"\x89PNG")
    assert {"sgd_routed_1_accuracy", "sgd_routed_1_minus_fixed_ci95", "all_run_computation"} < set(whole["measured"])
    interrupted(monkeypatch, ContextRouting, 4, *TINY, f"run_dir={tmp_path / 'part'}")
    assert timeless(resumed(monkeypatch, tmp_path / "part")["measured"]) == timeless(whole["measured"])


@pytest.mark.parametrize("rule", ["sgd", "node_perturbation"])
def test_a_network_with_a_non_finite_loss_is_reset(rule: str) -> None:
    others = [f"~rules.{other}" for other in ("sgd", *RULES) if other != rule]
    made = task(*others, f"rules.{rule}.lr=1e30", "task.repetitions=1", plain=SMALL)
    line = made.round(2)
    assert line["diverged"] == 1
    assert line["gates"] == line["gates_at_start"]
    assert line["accuracy"] < 0.4
    assert task().round(2)["diverged"] == 0


def test_networks_that_cannot_have_one_size_raise_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    images = task().images
    few = replace(
        images, train_images=images.train_images[..., ::7, ::7], test_images=images.test_images[..., ::7, ::7]
    )
    monkeypatch.setattr(data.loading, "load", lambda *_: few)
    with pytest.raises(ValueError, match=r"task\.hidden=1 is too few for networks of one size, .*: take more"):
        task("task.hidden=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.contexts=1", r"task\.contexts=1 must be an integer >= 2"),
        ("task.pathways=1", r"task\.pathways=1 must be an integer >= task\.contexts=2"),
        ("task.active=[4]", r"task\.active=\[4\] must be different integers from 1 to 2"),
        ("task.active=[1,1]", r"task\.active=\[1, 1\] must be different"),
        ("task.active=[]", r"task\.active=\[\] must be"),
        ("task.test=0", r"task\.test=0 must be an integer >= 1"),
        ("task.train=0", r"task\.train=0 must be an integer >= 1"),
        ("task.train=2000", r"train=2000 .* at most the 1437 training images of digits"),
        ("task.validation=1400", r"validation=1400 images"),
        ("task.epochs=0.5", r"task\.epochs=0\.5 must be an integer"),
        ("+task.lr.sgd.cnn=0.1", r"task\.lr\.sgd=\{'cnn': 0\.1\} must be rates of fixed, routed_1"),
        ("+task.lr.oja.fixed=0.1", r"by one of the rules sgd"),
    ],
)
def test_mistakes_raise_clear_errors(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(config(*TINY, override, f"run_dir={tmp_path / 'run'}"))
