"""The benchmark: cells, their search and their budgets; the table of all; the record beside a rule of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import bioopt
from bioopt.auditing import backward_passes_of
from experiments import benchmark as tables
from experiments.finished import find
from experiments.options import rules_by_name
from experiments.run import run
from experiments.tasks import benchmark_plots
from experiments.tasks.benchmark import Cell
from scripts import generate, record

from ..commands import config, made_task, train
from ..rules import per_sample

DIGITS = [
    "experiment=benchmark",
    "data=digits",
    "logger.mode=disabled",
    "benchmark.images=320",
    "benchmark.held_out=64",
]
DIGITS += ["benchmark.test=60", "benchmark.epochs=1", "benchmark.seeds=2", "benchmark.models.mlp.hidden=[16,16]"]


def cell(rule: str, *options: str) -> Cell:
    made = made_task(config(*DIGITS, f"optimizer={rule}", *options))
    assert isinstance(made, Cell)
    made.log = SimpleNamespace(history=[])  # type: ignore[assignment]
    return made


def test_budgets_of_equal_length_are_one_and_those_of_fewer_passes_are_longer() -> None:
    backpropagation = cell("sgd")
    assert (backpropagation.forward_passes, backpropagation.backward_passes) == (1, 1)
    assert {job.budgets for job in backpropagation.jobs} == {("epochs", "passes")}
    assert [job.steps for job in backpropagation.jobs] == [4, 4, 4, 5, 5]  # of 256 and of 320 images, 64 at once
    hebbian = cell("hebbian")
    assert (hebbian.forward_passes, hebbian.backward_passes) == (1, 0)
    assert [(job.budgets[0], job.steps) for job in hebbian.jobs[3:]] == [
        *[("epochs", 5)] * 2, *[("passes", 12)] * 3, *[("passes", 15)] * 2,
    ]  # fmt: skip
    perturbation = cell("node_perturbation")
    assert perturbation.jobs[-1].steps == round(5 * 3 / perturbation.forward_passes)


def test_the_rate_is_the_best_on_held_out_images_and_never_that_of_the_test_set() -> None:
    made = cell("sgd")
    assert made.candidates == [0.01, 0.04, 0.16]
    assert len(made.searched.train_labels) == 256
    assert torch.equal(made.searched.test_labels, made.data.train_labels[256:])
    for number, accuracy in enumerate([0.3, None, 0.5], 1):
        line = made.round(number)
        assert (line["phase"], line["rate"], line["equivalents"]) == ("search", made.candidates[number - 1], 12)
        made.log.history.append({**line, "accuracy": accuracy})
    found = made.round(4)
    assert (found["phase"], found["seed"], found["rate"], found["equivalents"]) == ("result", 0, 0.16, 15)
    assert found == {**made.round(4), "train_seconds": found["train_seconds"]}  # a round needs none before it
    assert found["accuracy"] != made.round(5)["accuracy"] or made.round(5)["seed"] == 1


def test_a_rate_that_diverges_is_no_choice_and_a_rule_that_always_does_has_no_result() -> None:
    made = cell("sgd", "+benchmark.rates.sgd=[1e30,1e31]")
    for number in (1, 2):
        made.log.history.append(made.round(number))
        assert made.log.history[-1]["accuracy"] is None
        assert made.log.history[-1]["diverged"]
    assert made.round(3) == {
        "budgets": ["epochs", "passes"], "phase": "result", "steps": 5, "seed": 0, "rate": None, "accuracy": None,
        "equivalents": 0, "train_seconds": 0.0, "diverged": "with every rate of the search",
    }  # fmt: skip


@pytest.mark.long
def test_a_rule_that_cannot_train_a_network_is_a_result_and_a_mistake_is_not(tmp_path: Path) -> None:
    options = [*DIGITS, "optimizer=contrastive_divergence", "model=mlp"]
    summary = run(config(*options, f"run_dir={tmp_path / 'run'}"))
    assert "model=rbm" in summary["cell"]["cannot"]
    assert summary["measured"] == {}
    (found,) = tables.collected(find([tmp_path])[0]).cells
    assert found["rule"] == "contrastive_divergence"
    seen_in_a_step = cell("difference_target_propagation", "model=resnet", "+benchmark.models.resnet.width=2")
    assert "needs a chain of layers" in seen_in_a_step.cannot
    assert not seen_in_a_step.jobs
    for option, message in (
        ("benchmark.images=9999", r"task\.images=9999: digits has 1437"),
        ("benchmark.factors=[]", "makes no rates to search"),
        ("benchmark.batch_size=300", "larger than the 256 images of the search"),
        ("benchmark.seeds=0", "seeds=0 must be"),
        ("benchmark.held_out=320", r"task\.held_out=320 must be an integer >= 0 and below the 320"),
        ("benchmark.models.mlp.hidden=[0]", "model=mlp: .*hidden"),
        ("+benchmark.options.sgd.momentun=0.9", "optimizer=sgd: .*momentun"),
    ):
        with pytest.raises(ValueError, match=message):
            cell("sgd", option)


@pytest.mark.parametrize(
    ("rule", "count"),
    [("sgd", 1), ("feedback_alignment", 1), ("hebbian", 0), ("local_loss", 0), ("predictive_coding", 7)],
)
def test_backward_passes_are_those_of_the_audit(rule: str, count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(2, 30).double(), torch.arange(2)
    optimizer: Any = torch.optim.SGD(model.parameters()) if rule == "sgd" else bioopt.create_optimizer(rule, model)
    closure = per_sample(optimizer, model, x, y)
    optimizer.step(closure)
    assert bioopt.audit(optimizer, model, closure).backward_passes == count
    assert backward_passes_of(lambda: optimizer.step(closure), model) == count


def made_cell(rule: str, network: str, accuracy: list[Any], **more: Any) -> dict[str, Any]:
    of_budget = {"rate": 0.1, "accuracy": accuracy, "steps": 9, "equivalents": 27, "seconds": 1.0}
    of_budget |= {"search": {"0.1": 0.5}, "search_equivalents": 54, "search_seconds": 2.0}
    known = {"rule": rule, "family": "hebbian", "network": network, "data": "mnist", "parameters": 9, "cannot": ""}
    return {**known, "forward_passes": 1, "backward_passes": 1, "epochs": of_budget, "passes": of_budget, **more}


CELLS = [
    made_cell("sgd", "mlp", [0.9, 0.92, 0.94]),
    made_cell("sgd", "cnn", [0.95, 0.97]),
    made_cell("random_trunk", "mlp", [0.5, 0.5, 0.5]),
    made_cell("random_trunk", "cnn", [0.6, 0.6]),
    made_cell("hebbian", "mlp", [0.4, 0.4, 0.4]),
    made_cell("hebbian", "cnn", [0.7, None]),
    made_cell("rbm", "mlp", [0.4]),
    {**made_cell("rbm", "cnn", []), "cannot": "no convolutions"},
    made_cell("mine", "cnn", [0.99]),
]


def test_the_table_has_intervals_ranges_and_marks() -> None:
    found = tables.Benchmark({}, CELLS)
    header, rows = tables.table(found, "mnist")
    assert header[2:6] == ["mlp, epochs", "mlp, passes", "cnn, epochs", "cnn, passes"]
    assert [row[0] for row in rows] == ["mine", "sgd", "random_trunk", "hebbian", "rbm"]
    by_rule = {row[0]: (row[2], row[4]) for row in rows}
    assert by_rule["sgd"] == ("92.0 ± 5.0", "96.0 (95.0 to 97.0)")
    assert by_rule["hebbian"] == ("40.0 ± 0.0 ▽", "diverged")
    assert by_rule["rbm"] == ("40.0 ▽", "–")
    assert by_rule["mine"] == ("", "99.0")
    assert rows[1][-2:] == ["2.0", "4"]  # the search of one run of both budgets, on two networks
    assert tables.refusals(found) == ["rbm on cnn: no convolutions"]


def test_pictures_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    found = tables.Benchmark({}, CELLS)
    assert tables.dependences()["sgd"] == 4  # transport, labels, error, layers above
    assert "homeostasis" not in tables.dependences()
    drawn = [
        benchmark_plots.compute(found, tmp_path / "compute.png"),
        benchmark_plots.plausibility(found, tables.dependences(), tmp_path / "plausibility.png"),
        benchmark_plots.rules(found, tmp_path / "rules.png"),
    ]
    assert all(picture.stat().st_size > 5_000 for picture in drawn)


def test_a_rule_of_your_own_stands_beside_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RECORD", tmp_path / "result.json")
    own = tables.Benchmark({"epochs": 3}, [CELLS[-1]])
    assert tables.beside_the_record(own) == (own, "")
    (tmp_path / "result.json").write_text(json.dumps({"protocol": {"epochs": 3}, "cells": CELLS[:6]}))
    both, note = tables.beside_the_record(own)
    assert both.rules == ["hebbian", "random_trunk", "sgd", "mine"] or "mine" in both.rules
    assert both.added == {"mine"}
    assert "1 cells of this sweep; the other 6" in note
    assert any(row[0] == "mine (added)" for row in tables.table(both, "mnist")[1])
    other, note = tables.beside_the_record(tables.Benchmark({"epochs": 9}, [CELLS[-1]]))
    assert len(other.cells) == 1
    assert "other options (epochs)" in note


def test_which_rules() -> None:
    found = rules_by_name("all")
    assert found[:3] == ["sgd", "adam", "random_trunk"]
    assert {"hebbian", "node_perturbation", "feedback_alignment", "local_loss"} <= {*found}
    assert not {"stdp", "reward_stdp", "contrastive_divergence"} & {*found}
    assert rules_by_name(["mine"]) == ["mine"]
    for wrong in ("hebbian", []):
        with pytest.raises(ValueError, match=r"benchmark\.rules=.* must be all, or a list"):
            rules_by_name(wrong)


def test_every_rule_has_rates_to_search() -> None:
    conf = generate.ROOT / "conf"
    for size in ("small", "full"):
        options = OmegaConf.load(conf / "benchmark" / f"{size}.yaml")
        rules = rules_by_name(options.rules)
        for rule in rules:
            rates = options.rates.get(rule)
            assert rates is not None or OmegaConf.load(conf / "optimizer" / f"{rule}.yaml").lr > 0, rule
            assert rates is None or len(rates) == len(options.factors), rule
        assert {*options.rates, *options.options} <= {*rules}
        assert {*options.networks, *options.models} <= {path.stem for path in (conf / "model").glob("*.yaml")}


def test_the_large_benchmark_is_one_option() -> None:
    full = config("experiment=benchmark", "benchmark=full")
    assert full.sweep == "benchmark-full"
    assert (full.task.images, full.task.held_out, full.benchmark.networks[-1]) == (None, 10_000, "resnet")
    small = OmegaConf.load(generate.ROOT / "conf" / "benchmark" / "small.yaml")
    assert full.benchmark.keys() == small.keys()


def test_the_command_of_a_record_is_that_of_the_nearest_size() -> None:
    names = ["mnist", "cifar10", "cifar100"], ["mlp", "cnn", "lenet5", "resnet"], rules_by_name("all")
    for size in ("small", "full"):
        options = OmegaConf.to_container(OmegaConf.load(generate.ROOT / "conf" / "benchmark" / f"{size}.yaml"))
        shared = ("images", "held_out", "test", "epochs", "batch_size", "seeds", "factors")
        protocol = {**{key: options[key] for key in shared}, "models.mlp.hidden": [128, 128], "amp": False}
        if size == "full":
            found = record.benchmark_command(protocol, *names, 0)
            assert found == "python train.py experiment=benchmark benchmark=full"
        else:
            protocol |= {"models.cnn.width": 8, "seeds": 5}
            found = record.benchmark_command(protocol, names[0][:2], names[1][:3], names[2], 0)
            assert found == "python train.py experiment=benchmark benchmark.seeds=5"


@pytest.mark.long
def test_a_benchmark_is_one_command_which_resumes_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*DIGITS, "benchmark.data=[digits]", "benchmark.networks=[mlp]", "benchmark.rules=[sgd,random_trunk]"]
    command = [word for word in command if word != "data=digits"]
    done = train(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "benchmark-small"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "sgd-digits-mlp", "random_trunk-digits-mlp",
    }  # fmt: skip
    assert "digits, at equal epochs" in done.stdout
    assert (folder / "rules.png").exists()
    (folder / "sgd-digits-mlp" / "summary.json").unlink()  # as if interrupted
    again = train(*command, cwd=tmp_path)
    assert again.stdout.count("finished before") == 1
    assert "resumed after round 5" in again.stdout
    mixed = train(*command, "benchmark.epochs=2", cwd=tmp_path)
    assert "task.epochs=1, which is 2 now" in mixed.stdout
    for path in folder.glob("*-refused"):
        shutil.rmtree(path)
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    record.record_benchmark("benchmark", [folder])
    kept = json.loads((tmp_path / "records" / "benchmark" / "result.json").read_text())
    assert (kept["seeds"], len(kept["cells"])) == ([0, 1], 2)
    assert {path.suffix for path in (tmp_path / "records" / "benchmark").iterdir()} == {".json", ".png"}
    assert kept["command"].startswith("python train.py experiment=benchmark benchmark.images=320")
    assert "'benchmark.rules=[sgd,random_trunk]'" in kept["command"] or "random_trunk,sgd" in kept["command"]
    config(*[word.strip("'") for word in kept["command"].split()[2:]])
    monkeypatch.setattr(tables, "RECORD", tmp_path / "records" / "benchmark" / "result.json")
    monkeypatch.setattr(generate, "RECORD", tables.RECORD)
    page = generate.benchmark_tables(generate.all_rules(), generate.ROOT / "docs" / "benchmark.md")
    assert "320 training images, 64 of them held out in the search" in page
    assert "| `sgd` | 1 + 1 |" in page
