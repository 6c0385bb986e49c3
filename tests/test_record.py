"""`scripts/record.py`: which runs it accepts, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.config import resolved
from scripts import record

from .commands import config
from .experiments.test_report import edited
from .experiments.test_sweeps import finished


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for records in place of the project's."""
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records")
    return tmp_path / "records"


def runs(folder: Path, *overrides: str) -> list[Path]:
    """Two finished runs, the second seed first."""
    chosen = config("optimizer=hebbian", "model=mlp", "optimizer.lr=0.25", *overrides)
    made = [finished(folder / str(seed), "hebbian", seed, [0.5, 0.6 + seed / 10]) for seed in (1, 0)]
    for seed, run in zip((1, 0), made, strict=True):
        OmegaConf.save(OmegaConf.create(resolved(chosen) | {"seed": seed}), run / "config.yaml")
    return made


def test_a_record_has_the_runs_in_order_of_their_seeds_and_their_command(kept: Path, tmp_path: Path) -> None:
    folders = runs(tmp_path)
    (folders[1] / "curves.png").write_bytes(b"picture")
    record.record("mine", folders)
    result = json.loads((kept / "mine" / "result.json").read_text())
    assert (result["seeds"], result["test_accuracy"], result["mean"]) == ([0, 1], [0.6, 0.7], pytest.approx(0.65))
    assert (kept / "mine" / "curves.png").read_bytes() == b"picture"
    assert result["command"] == "python train.py -m optimizer=hebbian model=mlp data=digits optimizer.lr=0.25 seed=0,1"
    assert "| mlp | hebbian | 65.00 (60.00 to 70.00) | 2 |" in record.tables()
    edited(kept / "mine" / "result.json", ("optimizer",), "<b>|")
    assert r"| mlp | &lt;b&gt;\| | 65.00" in record.tables()


def test_what_cannot_be_recorded_is_named_and_nothing_is_written(kept: Path, tmp_path: Path) -> None:
    folders = runs(tmp_path / "runs")

    def refused(message: str, name: str = "mine", some: list[Path] = folders) -> None:
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            record.record(name, some)
        assert not kept.exists()

    refused("a record is a plain name", "../mine")
    refused("a record is a plain name .* with 0 runs", some=[])
    refused("two runs of record mine have the same seed", some=[folders[0]] * 2)
    refused("the runs of record mine differ in more", some=[*folders, *runs(tmp_path / "others", "epochs=9")])
    refused(f"{tmp_path}: it has no config.yaml", some=[tmp_path])
    edited(folders[0] / "summary.json", ("extra",), 3.0)
    edited(folders[1] / "summary.json", ("extra",), 3.0)
    edited(folders[0] / "summary.json", ("extra",), "text")
    refused(r"the runs of record mine have extra=\[3.0, 'text'\], not a number each")
    edited(folders[0] / "summary.json", ("device",))
    refused(f"{folders[0]}: it is damaged: summary.json has no device")
    (folders[0] / "summary.json").write_text("null")
    refused(f"{folders[0]}: it is damaged: summary.json holds null")


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"seeds": [1], "command": "x", "task": "y", "measured": 3}'])
def test_a_damaged_record_is_named(text: str, kept: Path) -> None:
    (kept / "bad").mkdir(parents=True)
    (kept / "bad" / "result.json").write_text(text)
    with pytest.raises(SystemExit, match=f"^error: {kept}/bad/result.json is damaged: "):
        record.tables()
