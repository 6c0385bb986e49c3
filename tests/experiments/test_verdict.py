"""How long a run takes, told at its start; and its last line: what was measured, beside what was expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments import pace, verdict
from experiments.pace import Pace, Phase
from experiments.run import run
from experiments.statistics import duration
from experiments.verdict import Expected

from ..commands import ROOT, TINY, config, made_task

RUN = ["optimizer=hebbian", "model=mlp", "data=mnist"]


def record(folder: Path, name: str, **contents: object) -> None:
    """A record in this folder."""
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(contents))


def of_classification(folder: Path, name: str, rule: str, accuracy: list[float], *options: str, **more: object) -> None:
    command = f"python train.py optimizer={rule} model=mlp data=mnist {' '.join(options)} seed=0"
    given = {"data": "mnist", "model": "mlp", "optimizer": rule, "epochs": 3, "command": command} | more
    record(folder, name, test_accuracy=accuracy, **given)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records in place of the project's."""
    monkeypatch.setattr(verdict, "RECORDS", tmp_path / "records")
    return tmp_path / "records"


def test_a_run_is_compared_with_records_of_its_options_and_of_its_controls(records: Path) -> None:
    of_classification(records, "same", "hebbian", [0.98, 0.982, 0.984])
    of_classification(records, "control", "random_trunk", [0.97])
    of_classification(records, "other_rate", "hebbian", [0.5], "optimizer.lr=0.3")
    of_classification(records, "other_network", "random_trunk", [0.5], "'model.hidden=[7]'")
    of_classification(records, "other_length", "sgd", [0.5], "epochs=4", epochs=4)
    of_classification(records, "other_precision", "sgd", [0.5], "epochs=3", precision="bf16")
    of_classification(records, "of_old", "hebbian", [0.5], "optimizer.gone=1")
    summary = {"test_accuracy": 0.9833}
    chosen = config(*RUN, "seed=7", "control=false", "diagnostics.every=5", "data.root=elsewhere")
    assert verdict.verdict(chosen, summary, {}) == [
        "verdict: test accuracy 98.33 %, against 97.00 % of the recorded random trunk and 98.20 ± 0.50 % recorded"
    ]
    assert verdict.verdict(config(*RUN, "data.validation=100"), summary, {}) == []


def test_a_run_below_its_control_is_warned_of_and_above_it_compared(records: Path) -> None:
    expected = {"test_accuracy": [Expected([0.9], "of its control", "warning: below")]}
    assert verdict.verdict(config(*RUN), {"test_accuracy": 0.8}, expected) == ["warning: below"]
    above = verdict.verdict(config(*RUN), {"test_accuracy": 0.95}, expected)
    assert above == ["verdict: test accuracy 95.00 %, against 90.00 % of its control"]


def test_an_experiment_is_compared_with_theory_and_with_records(records: Path) -> None:
    measured = {"critical_load": [0.1355, 0.1389], "others": [3.0, 3.0]}
    command = "python train.py -m experiment=hopfield_recall seed=0,1"
    record(records, "hopfield_recall", task="hopfield_recall", measured=measured, command=command)
    chosen = config("experiment=hopfield_recall", "data=fashion_mnist")
    task = made_task(config("experiment=hopfield_recall", "data=digits", "task.digits=[5]"))
    summary = {"measured": {"critical_load": 0.13552, "others": 3.0}}
    lines = verdict.verdict(config("experiment=hopfield_recall"), summary, task.expected(summary))
    assert lines == ["verdict: critical load 0.1355, against 0.138 by theory and 0.1372 (0.1355 to 0.1389) recorded"]
    assert verdict.verdict(chosen, summary, {}) == []  # other data
    # Without an expectation, the most important number is compared with the record.
    assert verdict.verdict(config("experiment=hopfield_recall"), summary, {}) == [
        "verdict: critical load 0.1355, against 0.1372 (0.1355 to 0.1389) recorded"
    ]
    assert verdict.verdict(chosen, {"measured": {}}, task.expected(summary)) == []


@pytest.mark.usefixtures("undrawn")
def test_the_last_line_of_a_run_is_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config("experiment=classics", "task.parts=[bcm_patterns]", "task.bcm_patterns.steps=50", "logger.mode=disabled",
               f"run_dir={tmp_path / 'run'}"))  # fmt: skip
    *_, line, where = capsys.readouterr().out.splitlines()
    assert line.startswith("verdict: bcm patterns selectivity 0.")
    assert line.endswith(", against 0.9 by theory")
    assert where.startswith("results are in")


def test_records_are_found_within_hydras_main(records: Path) -> None:
    """Where train.py has composed the run, a second initialisation of Hydra would be an error."""
    of_classification(records, "same", "hebbian", [0.98])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        lines = verdict.verdict(compose("config", RUN), {"test_accuracy": 0.97}, {})
    assert lines == ["verdict: test accuracy 97.00 %, against 98.00 % recorded"]


def test_the_time_that_is_left_is_told_once_in_each_phase() -> None:
    told = Pace([Phase(2, name="the trunk"), Phase(4, 2, name="the readout")], "epoch")
    assert [told.after(n, s) for n, s in [(1, 120.0), (2, 99.0), (3, 50.0), (4, 70.0), (5, 1.0), (6, 1.0)]] == [
        "about 2 min for the next 1 epoch of the trunk, then 4 epochs of the readout", "", "",
        "about 2 min for the next 2 epochs of the readout", "", "",
    ]  # fmt: skip
    kept = Pace([Phase(4, apart=1)], "epoch")  # whose first epoch computes what the others need
    assert [kept.after(1, 9000.0), kept.after(2, 40.0)] == ["", "about 80 s for the next 2 epochs"]
    again = Pace([Phase(50)], "round", done=9)
    assert again.after(10, 100.0) == "about 67 min for the next 40 rounds"
    assert again.after(11, 500.0) == ""
    assert Pace([Phase(50)], "round").after(1, 1.0) == ""  # short
    assert (duration(40), duration(1500), duration(3.1 * 3600)) == ("40 s", "25 min", "3.1 h")


@pytest.mark.usefixtures("undrawn")
def test_a_long_run_says_how_long_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "SHORT", 0.0)
    options = [o for o in TINY if o != "epochs=1"]
    run(config("optimizer=hebbian", *options, "epochs=5", "plastic_epochs=2", f"run_dir={tmp_path / 'run'}"))
    lines = capsys.readouterr().out.splitlines()
    (first, second) = (i for i, line in enumerate(lines) if line.startswith("about "))
    assert lines[first].endswith("for the next 1 epoch of the whole network, then 3 epochs of the readout")
    assert lines[second].endswith("for the next 1 epoch of the readout")
    assert lines[first - 1].startswith("epoch 1/5")
    assert lines[second - 1].startswith("epoch 4/5")
