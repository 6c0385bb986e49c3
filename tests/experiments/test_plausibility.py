"""The audit of rules as an experiment: three rules, and the table in the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.run import run
from experiments.tasks.plausibility_plots import places, relative
from scripts import generate

from ..commands import ROOT, config

QUICK = ["experiment=plausibility", "logger.mode=disabled", "task.steps=2", "structures.mlp.hidden=[24,24]"]


def test_three_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = "task.rules=[sgd,feedback_alignment,stdp]"
    summary = run(config(*QUICK, rules, f"run_dir={tmp_path / 'run'}"))
    found = summary["measured"]
    assert found["sgd.transport"] > 0.5
    assert found["feedback_alignment.transport"] == 0
    assert found["stdp.labels"] == 0
    assert found["feedback_alignment.feedback_reads"] == 0
    assert "sgd.feedback_reads" not in found  # it has no feedback weights
    assert (tmp_path / "run" / "plausibility.png").stat().st_size > 10_000
    assert "Weights are transported by sgd. (3 rules" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["rule"] for line in lines] == ["sgd", "feedback_alignment", "stdp"]
    assert [len(line["layers"]) for line in lines] == [3, 3, 2]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("task.rules=[oia]", "task.rules has oia, which is not a rule"),
        ("task.structure.stdp=cnn", "task.structure.stdp=cnn must be one of mlp, spiking"),
        ("task.images=1", "task.images=1"),
    ],
)
def test_wrong_options_are_named(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(config(*QUICK, option, f"run_dir={tmp_path / 'run'}"))


def test_a_rule_on_a_network_that_it_cannot_train_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give it another by task\.structure\.contrastive_divergence"):
        run(
            config(
                *QUICK,
                "task.rules=[contrastive_divergence]",
                "task.structure.contrastive_divergence=mlp",
                f"run_dir={tmp_path / 'run'}",
            )
        )


def test_the_table_of_the_documentation_has_a_row_for_each_recorded_rule() -> None:
    page = ROOT / "docs" / "plausibility.md"
    rows = generate.plausibility_table(generate.all_rules(), page).splitlines()
    assert rows[2].startswith("| `sgd` | 277 % | 0 | 0 | 0 |")
    assert any(row.startswith("| [`FeedbackAlignment`](rules/feedback.md) | 0 | 0 | 0 | 0 |") for row in rows)
    assert len({row.count("|") for row in rows}) == 1


def test_places_and_numbers_of_the_picture() -> None:
    assert places({"a": 1, "b": 1, "c": 2}, 0.5) == ({"a": 0, "b": 1, "c": 2.5}, 3.5)
    assert [relative(value) for value in (0.004, 0.1, 2.774, 134.8)] == ["0.4 %", "10 %", "277 %", "135×"]
