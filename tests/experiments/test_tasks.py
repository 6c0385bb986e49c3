"""What all experiments other than image classification share, on a very small one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from experiments.run import run
from experiments.runs import Progress
from experiments.tasks import Task

from ..commands import ROOT, TINY, config, script, train

TASKS = sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml") if "\ntask:" in p.read_text())


class Walk(Task):
    """A random walk, whose place later rounds need."""

    def __init__(self, config: Any, device: torch.device, *, rounds: int, width: float) -> None:
        if width <= 0:
            raise ValueError(f"task.width={width} must be a number > 0")
        self.rounds, self.width = rounds, width
        self.place = torch.zeros((), device=device)

    def round(self, number: int) -> dict[str, Any]:
        self.place += self.width * torch.randn(())
        return {"place": self.place.item(), "path": [0.0, self.place.item()]}

    def finish(self, history, title, folder):
        picture = folder / "walk.png"
        plt.imsave(picture, [[0.0, 1.0]])
        return {"last_place": history[-1]["place"], "lines": len(history)}, [picture]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def interrupted(monkeypatch: pytest.MonkeyPatch, task: type[Task], number: int, *overrides: str) -> None:
    """A run that is stopped at the beginning of a given round."""
    plain = task.round

    def stopped(self: Task, at: int) -> dict[str, Any]:
        if at == number:
            raise KeyboardInterrupt
        return plain(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(task, "round", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(config(*overrides))


def resumed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """The result of a run after it is resumed; its pictures are not drawn again."""
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *of, **options: None)
        return run(config(f"resume={folder}"))


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Registers `experiment=walk`."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    options = {"name": "walk", "_target_": f"{__name__}.Walk", "rounds": 4, "width": 2.0}
    (folder / "walk.yaml").write_text("# @package _global_\n" + yaml.safe_dump({"task": options}))
    monkeypatch.chdir(tmp_path)
    return f"hydra.searchpath=[file://{tmp_path}/conf]"


def test_a_task_writes_the_same_files_as_any_run(walk: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [walk, "experiment=walk", "logger.mode=disabled"]
    summary = run(config(*common, f"run_dir={tmp_path / 'run'}"))
    folder = tmp_path / "run"
    assert summary == json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert summary["measured"] == {"last_place": lines[-1]["place"], "lines": 4}
    assert {"task", "seed", "seconds", "peak_memory_bytes", "device", "torch", "commit"} <= set(summary)
    assert yaml.safe_load((folder / "config.yaml").read_text())["task"]["width"] == 2.0
    assert Progress.load(folder, torch.device("cpu")).epoch == 4
    printed = capsys.readouterr().out
    assert f"round 4/4   place {lines[-1]['place']:.4g}\n" in printed
    assert "last place" in printed
    again = run(config(*common, f"run_dir={tmp_path / 'again'}"))
    other = run(config(*common, "seed=1", f"run_dir={tmp_path / 'other'}"))
    assert summary["measured"] == again["measured"] != other["measured"]


def test_an_interrupted_task_resumes_with_the_same_result(
    walk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [walk, "experiment=walk", "logger.mode=disabled"]
    whole = run(config(*common, f"run_dir={tmp_path / 'whole'}"))
    interrupted(monkeypatch, Walk, 3, *common, f"run_dir={tmp_path / 'part'}")
    torch.manual_seed(99)
    assert resumed(monkeypatch, tmp_path / "part")["measured"] == whole["measured"]
    with pytest.raises(ValueError, match="has finished"):
        run(config(f"resume={tmp_path / 'part'}"))


def test_mistakes_of_a_task_raise_clear_errors(walk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = [walk, "experiment=walk", "logger.mode=disabled", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"experiment=walk: task\.width=-1 must be"):
        run(config(*common, "task.width=-1"))
    with pytest.raises(ValueError, match=r"task\.speed is not an option; task has .*rounds, width"):
        run(config(*common, "+task.speed=1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="experiment=walk runs in one process"):
        run(config(*common))


@pytest.mark.long
def test_a_sweep_of_a_task_ends_with_its_numbers(walk: str, tmp_path: Path) -> None:
    done = train("-m", walk, "experiment=walk", "seed=0,1", "logger.mode=disabled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [
        json.loads(p.read_text())["measured"]["last_place"] for p in sorted(tmp_path.glob("runs/*/*/summary.json"))
    ]
    assert len(found) == 2
    assert "last place" in done.stdout
    both = "{:.4g} ({:.4g} to {:.4g})".format(sum(found) / 2, *sorted(found))
    assert both in done.stdout
    report = script("scripts/report.py", "runs", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert both in report.stdout


@pytest.mark.long
def test_a_task_with_wandb_offline(walk: str, tmp_path: Path) -> None:
    done = train(walk, "experiment=walk", "logger.mode=offline", cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (recorded,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = recorded.read_bytes()
    assert b"last_place" in content
    assert b"experiment" in content


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_named_as_its_file(name: str) -> None:
    """`scripts/record.py` and the terminal print commands with these names."""
    chosen = config(f"experiment={name}").task
    assert chosen.name == name
    assert chosen._target_.startswith("experiments.")


@pytest.mark.long
def test_the_final_analysis_is_in_the_summary(tmp_path: Path) -> None:
    target = f"{{_target_: {__name__}.count, _partial_: true, factor: 2}}"
    summary = run(config(*TINY, f"final_analysis={target}", f"run_dir={tmp_path / 'run'}"))
    assert summary["twice_the_parameters"] == 2 * summary["trained_parameters"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def count(model, images, title, folder, factor):
    assert images.classes == 10
    assert folder.is_dir()
    assert not model.training
    return {"twice_the_parameters": factor * sum(p.numel() for p in model.parameters())}, []
