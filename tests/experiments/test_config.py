"""Configurations: old names of options and classes, as users, files and earlier runs have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_class, get_method
from omegaconf import OmegaConf

from experiments.config import MOVED, read, rename, renamed_word, run_group, with_new_names
from experiments.run import run
from experiments.runs import Progress

from ..commands import TINY, config, train
from .test_runs import stopped


def test_old_names_of_options_become_new_ones(capsys: pytest.CaptureFixture[str]) -> None:
    plain = {
        "afterwards": {"_target_": "experiments.boltzmann.likelihood", "dream": 7},
        "final_analysis": None,
        "optimizer": {"name": "mine", "wants": {"model.name": "rbm"}},
        "rules": {"mine": {"wants": {}}, "sgd": {"lr": 1}},
        "task": {"_target_": "experiments.savings.Savings", "disguise": "pixels"},
    }
    found = OmegaConf.to_container(with_new_names(OmegaConf.create(plain)))
    assert found == {
        "final_analysis": {"_target_": "experiments.likelihood.likelihood", "gibbs_steps": 7},
        "optimizer": {"name": "mine", "requires": {"model.name": "rbm"}},
        "rules": {"mine": {"requires": {}}, "sgd": {"lr": 1}},
        "task": {"_target_": "experiments.tasks.savings.Savings", "permute": "pixels"},
    }
    shown = capsys.readouterr().out.splitlines()
    assert "warning: afterwards is called final_analysis now; the old name is accepted in this release only" in shown
    assert len(shown) == len(rename(plain)) == 7
    assert rename(found) == []
    assert run_group({"task": {"disguise": "labels"}}) == {"task.permute": "labels"}


def test_new_class_names_can_be_imported() -> None:
    for name in MOVED.values():
        (get_method if name.endswith("likelihood") else get_class)(name)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("afterwards.dream=3", "final_analysis.gibbs_steps=3"),
        ("+afterwards={_target_:x}", "+final_analysis={_target_:x}"),
        ("task.disguise=pixels", "task.permute=pixels"),
        ("optimizer.lr=1", "optimizer.lr=1"),
    ],
)
def test_old_names_may_be_typed(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert renamed_word(typed) == meant
    assert capsys.readouterr().out.startswith("warning: ") == (typed != meant)


@pytest.mark.long
def test_a_command_with_an_old_name_runs(tmp_path: Path) -> None:
    few = ["experiment=savings", "logger.mode=disabled", "task.repetitions=1", "task.most=1", "model.hidden=[4]"]
    done = train(*few, "task.disguise=pixels", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("warning: task.disguise is called task.permute now")
    assert read(tmp_path / "run").task.permute == "pixels"


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_in_an_older_format_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, 1, *TINY, "epochs=2", f"run_dir={tmp_path / 'run'}")
    path = tmp_path / "run" / "checkpoint.pt"
    found = torch.load(path, weights_only=True)
    assert found.pop("version") == 2
    torch.save(found, path)
    old = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    old["afterwards"] = old.pop("final_analysis")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(ValueError, match="has format 1, and this version of bioopt reads format 2: finish the run"):
        run(config(f"resume={tmp_path / 'run'}"))
    path.unlink()
    assert run(config(f"resume={tmp_path / 'run'}"))["epochs"] == 2


def test_a_state_must_not_have_the_names_of_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names of the checkpoint itself: history"):
        Progress(state={"history": []}).save(tmp_path)
    assert not list(tmp_path.iterdir())
