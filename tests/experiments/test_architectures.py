"""`experiment=architectures`: which rule trains which structure on which task, and that all rules get the same data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bioopt.costs import UNLABELLED
from experiments import data
from experiments.learner import Block
from experiments.run import run
from experiments.tasks import architectures
from experiments.tasks.architectures import Architectures

from ..commands import config
from .test_tasks import interrupted, resumed

COMMON = ["experiment=architectures", "logger.mode=disabled", "data=digits", "task.train=200", "task.test=40"]
COMMON += ["task.steps=3", "task.batch_size=8", "task.repetitions=2", "structures.cnn.width=2"]
ONE = ["~task.tasks.wrong_labels", "~task.tasks.imbalanced", "~task.tasks.few_labels"]
TINY = [*COMMON, *ONE, "~rules.node_perturbation", "~rules.hebbian", "~structures.cnn", "~structures.attention"]
composed = cache(lambda *overrides: config(*overrides))
load = cache(data.load)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.loading, "load", load)


def task(overrides: list[str], **changed: Any) -> Architectures:
    chosen = composed(*overrides).copy()
    OmegaConf.set_struct(chosen, False)
    for key, value in changed.items():
        OmegaConf.update(chosen, key.replace("__", "."), value, merge=False)
    options = {key: value for key, value in chosen.task.items() if key != "name"}
    made: Architectures = instantiate(OmegaConf.create(options), _partial_=True, _convert_="all")(
        chosen, torch.device("cpu")
    )
    return made


def kept(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "milliseconds"}


def test_tasks_match_their_description() -> None:
    made = task(COMMON, task__tasks__few_labels__count=20)
    posed = {name: made.pose(name, 0) for name in made.tasks}
    clean = posed["clean"]
    assert list(posed) == list(architectures.PROBLEMS)
    assert (len(clean.train_labels), len(clean.test_labels)) == (200, 40)
    assert int((posed["wrong_labels"].train_labels != clean.train_labels).sum()) == 80
    counts = posed["imbalanced"].train_labels.bincount()
    assert counts[0] > 3 * counts[9] > 0
    labels = posed["few_labels"].train_labels
    assert int((labels != UNLABELLED).sum()) == 20
    assert posed["contexts"].shape[0] == 5
    assert len(posed["contexts"].test_labels) == 4 * 40
    for name in ("wrong_labels", "imbalanced", "few_labels"):
        assert torch.equal(posed[name].test_images, clean.test_images)
        assert torch.equal(posed[name].test_labels, clean.test_labels)
    assert not torch.equal(made.pose("clean", 1).train_images, clean.train_images)


def test_structures_are_of_about_the_same_number_of_weights() -> None:
    common = [word for word in COMMON if not word.startswith("structures.")]
    counts = task(common, task__tasks={"clean": {}}).weights.values()
    assert max(counts) < 1.5 * min(counts)


@pytest.mark.parametrize("rule", ["sgd", "node_perturbation", "hebbian", "random_trunk"])
def test_every_rule_trains_every_structure(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the control change more than the readout."""
    made = task([*COMMON, *ONE])
    models: list[torch.nn.Module] = []
    begun: list[list[torch.Tensor]] = []
    build = Architectures.build

    def watched(*arguments: Any) -> torch.nn.Module:
        models.append(build(*arguments))
        begun.append([p.detach().clone() for p in models[-1].parameters()])
        return models[-1]

    monkeypatch.setattr(Architectures, "build", watched)
    for structure in made.structures:
        line = made.learn(rule, structure, "contexts", 0)
        assert 0 <= line["accuracy"] <= 1
        assert line["forward_passes"] == (3 if rule == "node_perturbation" else 1)
        now = dict(models[-1].named_parameters())
        changed = [name for (name, p), old in zip(now.items(), begun[-1], strict=True) if not torch.equal(p, old)]
        assert set(list(now)[-2:]) <= set(changed), structure
        assert (len(changed) == 2) == (rule == "random_trunk"), structure


def test_unlabelled_samples_do_not_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(COMMON, task__tasks__few_labels__count=20)
    seen: list[torch.Tensor] = []
    closure = Block.closure

    def watched(self: Block, inputs: torch.Tensor, labels: torch.Tensor, **options: Any) -> Any:
        seen.append(labels)
        return closure(self, inputs, labels, **options)

    monkeypatch.setattr(Block, "closure", watched)
    made.learn("sgd", "mlp", "few_labels", 0)
    assert len(seen) == 3
    assert int(torch.cat(seen).min()) >= 0


def test_only_the_controller_of_the_gated_network_gets_contexts() -> None:
    made = task(TINY)
    assert made.build("gated", made.pose("contexts", 0)).get_submodule("0").contexts == 4  # type: ignore[union-attr]
    assert isinstance(made.build("gated", made.pose("clean", 0)).get_submodule("0"), torch.nn.Flatten)


def test_options_of_a_structure_are_those_of_its_name() -> None:
    made = task(TINY, rules__sgd__per_model__gated__lr=0.5, rules__sgd__per_model__mlp__lr=0.25)
    rates = [made.configured(structure, made.images, "sgd").optimizer.lr for structure in made.structures]
    assert (made.structures, rates) == (["mlp", "gated"], [0.25, 0.5])


def test_rounds_are_independent_and_rules_get_the_same_data(monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(TINY)
    assert made.rounds == 2 * 2 * 2 * 2
    lines = [made.round(number) for number in range(1, 17)]
    assert len({(e["task"], e["structure"], e["rule"], e["repetition"]) for e in lines}) == 16
    torch.manual_seed(5)
    assert kept(task(TINY).round(16)) == kept(lines[15])
    begun: list[tuple[str, list[torch.Tensor]]] = []
    build = Architectures.build

    def watched(self: Architectures, structure: str, images: Any) -> torch.nn.Module:
        model = build(self, structure, images)
        begun.append((structure, [p.detach().clone() for p in model.parameters()]))
        return model

    monkeypatch.setattr(Architectures, "build", watched)
    for number in (1, 2, 9):
        made.round(number)
    (_, one), (_, same), (_, other) = begun
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


def test_the_lead_is_paired_and_of_the_two_best(tmp_path: Path) -> None:
    made = task([*TINY, "~task.tasks.contexts", "~rules.random_trunk", "+model@structures.wide=mlp"])
    seen = {"mlp": [0.5, 0.7], "gated": [0.75, 0.9], "wide": [0.1, 0.1]}
    history = [
        {"task": "clean", "rule": "sgd", "structure": name, "accuracy": a, "forward_passes": 1, "milliseconds": 2.0}
        for name, both in seen.items()
        for a in both
    ]
    found, (picture,) = made.finish(history, "title", tmp_path)
    assert list(found)[:2] == ["clean_sgd_gated_ahead_of_mlp", "clean_sgd_gated_ahead_of_mlp_ci95"]
    assert found["clean_sgd_gated_ahead_of_mlp"] == pytest.approx((0.25 + 0.2) / 2)
    assert found["clean_sgd_gated_ahead_of_mlp_ci95"] == pytest.approx(12.706 * 0.025, rel=1e-3)  # t of 1, s / sqrt(2)
    assert found["clean_sgd_mlp"] == pytest.approx(0.6)
    assert found["sgd_wide_milliseconds"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_an_interrupted_run_resumes_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [*TINY, "task.repetitions=1", "~task.tasks.contexts"]
    whole = run(config(*tiny, f"run_dir={tmp_path / 'whole'}"))
    assert (tmp_path / "whole" / "architectures.png").exists()
    interrupted(monkeypatch, Architectures, 3, *tiny, f"run_dir={tmp_path / 'part'}")
    again = resumed(monkeypatch, tmp_path / "part")
    found, same = (
        {key: value for key, value in summary["measured"].items() if not key.endswith("_milliseconds")}
        for summary in (whole, again)
    )
    assert found == same
    assert {"clean_sgd_mlp", "clean_random_trunk_gated", "mlp_weights", "sgd_forward_passes"} < set(found)


def test_a_rate_that_is_too_large_is_named() -> None:
    made = task(TINY, rules__sgd__per_model__mlp__lr=1e30)
    with pytest.raises(RuntimeError, match=r"sgd on mlp at clean: .*rules\.sgd\.per_model\.mlp\.lr=1e\+30; lower it"):
        made.round(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"task__tasks": {"riddles": {}}},
            r"task\.tasks has riddles, which is not a task; there are clean",
        ),
        ({"task__tasks": {}}, r"task\.tasks are none: name one at least"),
        ({"task__tasks": {"wrong_labels": {"share": 2}}}, r"task\.tasks\.wrong_labels: share=2 must be a number in"),
        ({"task__tasks": {"wrong_labels": {"chare": 2}}}, r"task\.tasks\.wrong_labels: .*chare"),
        ({"task__steps": 0}, r"task\.steps=0 must be an integer >= 1"),
        ({"task__train": 2000}, r"train=2000 and validation=None images must be"),
        ({"task__test": 361}, r"task\.test=361 must be at most the 360 test images"),
        ({"structures__attention__patch": 5}, r"structures\.attention: .*patch=5 must divide"),
    ],
)
def test_mistakes_raise_clear_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(COMMON, **changed)
