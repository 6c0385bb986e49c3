"""Loggers beside a run's folder: tables, TensorBoard, several at once; and the lines of a long epoch."""

from __future__ import annotations

import csv
import importlib.util
import sys
import types
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import checks, logs
from experiments.file_loggers import Csv, TensorBoard, by_axis
from experiments.logs import Logger, RunLog
from experiments.run import run

from ..commands import TINY, config

SHORT = [*TINY, "logger.mode=auto", "logger.every=2"]


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of a writer that takes the place of TensorBoard's, whether or not that is installed."""
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append(("open", folder, purge_step))
            Path(folder).mkdir(exist_ok=True)

        def __getattr__(self, name: str) -> Any:
            return lambda *values, **options: calls.append((name, *values))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    find = importlib.util.find_spec
    there = ModuleSpec("tensorboard", None)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: there if name == "tensorboard" else find(name))
    return calls


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "numbers.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("undrawn")
def test_several_loggers_of_one_run(
    tmp_path: Path,
    tensorboard: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("matplotlib.pyplot.imread", lambda path: np.zeros((4, 5, 4)))  # the run leaves pictures out
    folder = tmp_path / "run"
    summary = run(config(*SHORT, "logger=[csv,tensorboard]", f"run_dir={folder}"))
    found = rows(folder)
    assert {row["axis"] for row in found} == {"step", "epoch"}
    assert [row["at"] for row in found if row["name"] == "train/loss"] == ["0", "2", "4"]
    (accuracy,) = [float(row["value"]) for row in found if row["name"] == "test/accuracy"]
    assert accuracy == summary["test_accuracy"]
    assert tensorboard[0] == ("open", str(folder / "tensorboard"), None)
    scalars = {call[1:3]: call[3] for call in tensorboard if call[0] == "add_scalar"}
    assert scalars["test/accuracy", accuracy] == 1
    assert len(scalars) == len(found)
    pictures = {call[1]: call[2].shape for call in tensorboard if call[0] == "add_image"}
    assert pictures["pictures/curves"] == (4, 5, 3)
    counts = Counter(call[0] for call in tensorboard)
    assert counts["add_text"] == counts["close"] == 1
    printed = capsys.readouterr().out
    assert f"its numbers are in {folder}/numbers.csv" in printed
    assert f"show this run with `tensorboard --logdir {folder}`" in printed


def test_a_missing_package_is_named_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    error = r"logger=tensorboard needs the package tensorboard: pip install -e '\.\[tensorboard\]'"
    with pytest.raises(ValueError, match=error):
        run(config(*SHORT, "logger=[csv,tensorboard]", f"run_dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=error):  # a resumed run, whose options are not checked again
        TensorBoard({}, tmp_path, None)


def test_a_table_goes_on_after_the_last_whole_round(tmp_path: Path) -> None:
    first = Csv({}, tmp_path, None)
    for numbers in ({"step": 0, "train/loss": 3.0}, {"epoch": 1, "test/accuracy": 0.5}, {"step": 9, "train/loss": 2.0}):
        first.log(numbers)
    first.close()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    again = Csv({}, tmp_path, None)
    again.log({"step": 9, "train/loss": 1.0})
    again.close()
    assert [(row["at"], row["value"]) for row in rows(tmp_path)] == [("0", "3.0"), ("1", "0.5"), ("9", "1.0")]


@pytest.mark.parametrize("damage", ["", "axis,at,name,value\r\nstep,0"])
def test_a_table_begins_again_with_the_run(tmp_path: Path, damage: str) -> None:
    """Its checkpoint was deleted, or the disk was full."""
    for kept in (False, True):
        if kept:
            (tmp_path / "numbers.csv").write_text(damage)
        one = log(tmp_path, None, Csv)
        one.round({}, {"epoch": 1, "test/accuracy": 0.5}, "", "")
        one.close()
        assert [(row["axis"], row["value"]) for row in rows(tmp_path)] == [("epoch", "0.5")]


def test_tensorboard_drops_what_is_computed_again(tmp_path: Path, tensorboard: list[tuple[Any, ...]]) -> None:
    one = log(tmp_path, None, TensorBoard)
    one._log({"step": 4, "train/loss": 3.0})
    one.round({}, {"epoch": 1, "test/accuracy": 0.5}, "", "")
    one._log({"step": 5, "train/loss": 2.0})  # of a round that is interrupted
    one.close()
    RunLog(tmp_path, {"logger": {"mode": "auto", "every": 1, "classes": PATHS}}, one.run_id, [{}]).close()
    log(tmp_path, None, TensorBoard).close()  # from its start
    assert [call[2] for call in tensorboard if call[0] == "open"] == [None, 5, 0]


def test_what_is_no_number_is_left_out() -> None:
    assert by_axis({"round": 3, "rule": "oja", "place": 0.5, "none": None}) == ("round", 3, {"place": 0.5})


class Named(Logger):
    """A logger with an id of its own."""

    opened: list[tuple[str, str | None]] = []  # noqa: RUF012
    closed: list[str] = []  # noqa: RUF012

    def __init__(self, config: dict[str, Any], folder: Path, run_id: str | None) -> None:
        self.opened.append((type(self).__name__, run_id))
        self.run_id = run_id or f"id-of-{type(self).__name__}"

    def log(self, numbers: dict[str, Any]) -> None: ...

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> str:
        return ""

    def close(self) -> None:
        self.closed.append(type(self).__name__)


class Other(Named):
    pass


class Broken(Named):
    def __init__(self, config: dict[str, Any], folder: Path, run_id: str | None) -> None:
        raise OSError("no disk")


PATHS = {"tensorboard": f"{TensorBoard.__module__}.TensorBoard"}


def log(folder: Path, run_id: str | None, *classes: type[Logger], **options: Any) -> RunLog:
    paths = {cls.__name__: f"{cls.__module__}.{cls.__qualname__}" for cls in classes}
    logger = {"mode": "auto", "every": 1, "classes": paths, **options}
    return RunLog(folder, {"logger": logger, "epochs": 2}, run_id, [])


@pytest.fixture(autouse=True)
def forgotten() -> None:
    Named.opened.clear()
    Named.closed.clear()


def test_each_logger_gets_its_own_id_again(tmp_path: Path) -> None:
    first = log(tmp_path, None, Named, Csv, Other)
    run_id = first.run_id
    first.close()
    assert run_id == "id-of-Named - id-of-Other"
    log(tmp_path, run_id, Named, Csv, Other).close()
    assert Named.opened[2:] == [("Named", "id-of-Named"), ("Other", "id-of-Other")]
    alone = log(tmp_path, None, Csv)
    assert alone.run_id is None
    alone.close()
    assert log(tmp_path, "an id", Named, mode="disabled").run_id is None  # of another process than the first


def test_a_logger_that_cannot_be_made_closes_the_others(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no disk"):
        log(tmp_path, None, Named, Broken)
    assert Named.closed == ["Named"]


def test_a_run_from_before_there_were_several_goes_on(tmp_path: Path) -> None:
    logger = {"_target_": f"{Named.__module__}.Named", "mode": "auto", "every": 1}
    RunLog(tmp_path, {"logger": logger, "epochs": 2}, "old", []).close()
    assert Named.opened == [("Named", "old")]


def test_a_long_epoch_prints_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty seconds a batch: a line where a minute has gone by since the last."""
    times = iter(range(0, 10_000, 40))
    monkeypatch.setattr(logs, "time", types.SimpleNamespace(monotonic=lambda: float(next(times))))
    assert [*log(tmp_path, None).batches(iter("abcdef"), 6, "epoch 1/2")] == [*"abcdef"]
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2   batch 1/6, 7 min left",
        "epoch 1/2   batch 3/6, 3 min left",
        "epoch 1/2   batch 5/6, 48 s left",
    ]
