"""`python train.py -m` and the report: many runs from one command, and their report."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from experiments.config import name_of, run_group
from experiments.finished import NothingToReport, find
from experiments.report import report
from experiments.statistics import percent, plain
from experiments.sweeps import DATED

from ..commands import ROOT, TINY, config, fresh, script, started, train


def finished(folder: Path, name: str, seed: int, accuracies: list[float], **options: Any) -> Path:
    """A run's folder as `train.py` leaves it."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {
        "optimizer": {"name": name, "lr": 0.1}, "model": {"name": "mlp"}, "seed": seed, "threads": 1,
        "data": {"name": "digits", "root": str(folder), "validation": 0}, "epochs": len(accuracies),
    }  # fmt: skip
    for key, value in options.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        {"epoch": i + 1, "test_accuracy": a, "seconds": 2.0 * (i + 1), "forward_passes": 10 * (i + 1)}
        for i, a in enumerate(accuracies)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "optimizer": name, "model": "mlp", "data": settings["data"]["name"], "seed": seed, "device": "cpu",
        "evaluated_on": "test set", "test_accuracy": accuracies[-1], "best_test_accuracy": max(accuracies),
        "epochs": len(accuracies), "seconds": 2.0 * len(accuracies), "forward_passes": 10 * len(accuracies),
        "images_per_second": 100.0, "peak_memory_bytes": 2**20, "trained_parameters": 1000, "commit": "abc",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    for seed, (sgd, rule, trunk) in enumerate([(0.9, 0.8, 0.7), (0.92, 0.84, 0.7), (0.94, 0.82, 0.7)]):
        finished(runs / f"a{seed}", "sgd", seed, [0.5, sgd])
        finished(runs / f"b{seed}", "hebbian", seed, [0.5, 0.75, rule])
        finished(runs / f"c{seed}", "random_trunk", seed, [0.4, trunk])
    return runs


def test_a_difference_that_rounds_to_zero_has_no_minus() -> None:
    assert percent([-0.00003], "+") == "+0.00"
    assert percent([-0.00006], "+") == "-0.01"


def test_of_two_seeds_both_are_shown() -> None:
    assert percent([0.9917, 0.9885]) == "99.01 (98.85 to 99.17)"
    assert percent([0.02, -0.01], "+") == "+0.50 (-1.00 to +2.00)"
    assert plain([1.5, 2]) == "1.75 (1.5 to 2)"
    assert percent([0.8, 0.82, 0.84]) == "82.00 ± 4.97"
    assert plain([0.5]) == "0.5"
    assert percent([]) == ""


@pytest.mark.long
def test_the_report_compares_groups_and_pairs_controls_by_seed(sweep: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*")}
    shown = report([sweep], tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("*")} == before  # runs are never changed
    lines = [line.split() for line in shown.splitlines()]
    (rule,) = [line for line in lines if line and line[0] == "hebbian"]
    # mean 82, deviation 2 over three seeds: 2 / sqrt(3) times Student's 4.303
    assert rule[1:4] == ["82.00", "±", "4.97"]
    assert rule[4:10] == ["-10.00", "±", "4.97", "+12.00", "±", "4.97"]
    assert rule[10:] == ["6.0"]  # seconds: the page has more
    assert "digits: 9 runs in 3 groups, 3 seeds each" in shown
    (full,) = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "| hebbian" in line]
    # 4 seconds past the random trunk's 70 %, in epoch 2
    assert full.split(" | ")[5:] == ["3", "6.0", "100", "30", "4.0", "1", "1,000 |"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy.pdf", "accuracy.png", "curves.pdf", "curves.png", "report.csv", "report.html", "report.md",
    ]  # fmt: skip
    table = list(csv.DictReader((tmp_path / "out" / "report.csv").read_text().splitlines()))
    assert len(table) == 9
    assert {row["seed"] for row in table} == {"0", "1", "2"}
    assert float(next(r for r in table if r["label"] == "hebbian" and r["seed"] == "1")["test_accuracy"]) == 0.84
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 4  # against epochs, seconds and forward passes; the last accuracies
    assert "82.00 ± 4.97" in page
    assert not re.findall(r"src=\"(?!data:)", page)  # nothing to fetch
    assert "://" not in re.sub(r"http://www.w3.org/[\w/]+", "", page)  # names of SVG's standards
    assert re.findall(r"<a href=\"([^\"]*)\"", page) == [
        f"../runs/{name}{seed}/" for name in "abc" for seed in range(3)
    ]
    assert "| hebbian | 82.00 ± 4.97 | 3 |" in (tmp_path / "out" / "report.md").read_text()
    report([sweep], tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text() == page  # made again, the same


def test_groups_are_labelled_by_the_options_that_differ(sweep: Path, tmp_path: Path) -> None:
    finished(sweep / "d", "hebbian", 0, [0.9], optimizer={"lr": 0.5})
    finished(sweep / "e", "sgd", 0, [0.9], model={"name": "cnn"})
    shown = report([sweep], tmp_path / "out", accuracy=0.85)
    assert "hebbian, mlp, epochs=1, lr=0.5" in shown
    assert "hebbian, mlp, epochs=3, lr=0.1" in shown
    assert "sgd, cnn  " in shown  # the model tells it apart
    (slow,) = [line for line in shown.splitlines() if line.startswith("hebbian, mlp, epochs=3")]
    assert "never" in slow
    assert "s to 85.0 %" in shown


@pytest.mark.long
def test_the_report_skips_what_it_cannot_read_and_refuses_what_it_cannot_compare(sweep: Path, tmp_path: Path) -> None:
    (sweep / "empty").mkdir()
    with pytest.raises(NothingToReport, match="no finished run in"):
        report([sweep / "empty"], tmp_path / "out")
    with pytest.raises(NothingToReport, match="absent is not a folder"):
        report([tmp_path / "absent"], tmp_path / "out")
    (sweep / "a0" / "summary.json").unlink()
    metrics = sweep / "b0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-10])
    (sweep / "c0" / "error.txt").write_text("Traceback\nValueError: no good\n")
    shown = report([sweep], tmp_path / "out")
    assert f"left out: {sweep / 'a0'}: it has no summary.json" in shown
    assert f"left out: {sweep / 'b0'}: it is damaged: metrics.jsonl is cut off" in shown
    assert f"left out: {sweep / 'c0'}: it failed: ValueError: no good" in shown
    finished(sweep / "f", "sgd", 0, [0.5], data={"name": "mnist"})
    with pytest.raises(NothingToReport, match="tested on different images"):
        report([sweep], tmp_path / "out")
    done = script("scripts/report.py", str(sweep), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: these runs were tested on different images")


@pytest.mark.long
def test_a_sweep_skips_what_is_finished_and_names_what_failed(tmp_path: Path) -> None:
    command = ["-m", "optimizer=sgd,oja", "optimizer.lr=0.1,-1", "seed=0", *TINY]
    done = train(*command, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(DATED, folder.name)
    learned = {run.name for run in folder.glob("*/")}
    assert learned == {
        f"{rule}-batch_size256-epochs1-cnn-kernel3-width2-lr{lr}-seed0"
        for rule in ("sgd", "oja")
        for lr in ("0.1", "-1")
    }
    typed = yaml.safe_load((folder / "sweep.yaml").read_text())["options"]
    assert {"optimizer=sgd,oja", "optimizer.lr=0.1,-1"} < {*typed}
    assert not any(option.startswith("seed") for option in typed)
    assert done.returncode == 1
    assert done.stdout.count("\nfailed: ValueError: optimizer=") == 2
    assert done.stdout.count("it failed: ValueError: optimizer=") == 2
    assert "oja             " in done.stdout
    assert f"error: 2 of the runs in runs/{folder.name} failed" in done.stderr
    assert "Traceback" not in done.stderr
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    assert len(kept) == 2

    more = train(*[o.replace("seed=0", "seed=0,1") for o in command], cwd=tmp_path)  # the seeds name no sweep
    assert more.stdout.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(folder.glob("*/summary.json"))) == 4


@pytest.mark.long
def test_an_interrupted_sweep_resumes_with_the_same_result(tmp_path: Path) -> None:
    command = ["-m", "optimizer=oja", "seed=0", *TINY, "epochs=12", "sweep=whole"]
    assert train(*command, cwd=tmp_path).returncode == 0
    command[-1] = "sweep=stopped"
    process = started(*command, cwd=tmp_path, until="runs/stopped/*/checkpoint.pt").process
    process.kill()
    process.join()
    assert not list(tmp_path.glob("runs/stopped/*/summary.json")), "the run was too fast to be killed"
    done = train(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch" in done.stdout
    one, other = (
        torch.load(next(tmp_path.glob(f"runs/{name}/*/checkpoint.pt")), weights_only=True)
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


@pytest.mark.long
def test_a_folder_of_a_run_with_other_options_is_refused(tmp_path: Path) -> None:
    command = ["-m", "optimizer=sgd", "seed=0", *TINY, "sweep=one"]
    assert train(*command, cwd=tmp_path).returncode == 0
    (saved,) = tmp_path.glob("runs/one/*/config.yaml")
    saved.write_text(saved.read_text().replace("momentum: 0.9", "momentum: 0.8"))  # the default was another one
    done = train(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert "holds a run with optimizer.momentum=0.8, which is 0.9 now; name a new sweep by sweep=NAME" in done.stdout
    assert not list(saved.parent.glob("error.txt"))  # it is finished, as before
    (refused,) = tmp_path.glob("runs/one/*-refused/error.txt")
    assert "holds a run with optimizer.momentum=0.8" in refused.read_text()


@pytest.mark.long
def test_what_the_runs_of_a_sweep_differ_in_is_in_their_names(tmp_path: Path) -> None:
    done = train("-m", "optimizer=sgd", "seed=0", *[o for o in TINY if "threads" not in o], "threads=1,2", cwd=tmp_path)
    assert done.returncode == 0
    assert "1 run in 1 group, 1 seed each" in (report := next(tmp_path.glob("runs/*/report.md"))).read_text()
    assert "same options and seed" in report.read_text()
    assert len([*tmp_path.glob("runs/*/*/summary.json")]) == 2
    done = train("-m", "run_dir=x", "seed=0", *TINY, cwd=tmp_path)
    assert done.stderr.startswith("error: run_dir has no place in a sweep")


COMPARISONS = [p for kind in ("compare", "feedback") for p in (ROOT / "conf/experiment").glob(f"{kind}_*.yaml")]


@pytest.mark.parametrize("experiment", sorted(p.stem for p in COMPARISONS))
def test_every_comparison_has_its_controls_and_seeds(experiment: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    assert composed.sweep == experiment
    assert composed.hydra.mode.name == "MULTIRUN"
    swept = composed.hydra.sweeper.params
    assert {"sgd", "random_trunk"} < set(swept.optimizer.split(","))
    assert swept.seed == "0,1,2"
    for optimizer in swept.optimizer.split(","):
        assert config(f"experiment={experiment}", f"optimizer={optimizer}").optimizer.name == optimizer


def test_of_two_runs_with_the_same_options_the_newer_counts(sweep: Path, tmp_path: Path) -> None:
    older = next(path for path in sorted(sweep.iterdir()) if (path / "summary.json").exists())
    newer = older.with_name("a-copy")
    shutil.copytree(older, newer)
    os.utime(older / "summary.json", (0, 0))
    runs, skipped = find([sweep])
    assert newer in {run.folder for run in runs}
    assert older not in {run.folder for run in runs}
    assert f"{older}: {newer} has the same options and seed, and is newer" in skipped


def test_names_of_folders_need_no_quotes() -> None:
    assert name_of(["optimizer=hebbian", "seed=0"]) == "hebbian-seed0"
    typed = ["seed=1", "data=mnist", "optimizer=sgd", "optimizer.lr=0.5", "model.hidden=[32, 64]", "+x.y='a/b'", "~x.z"]
    assert name_of(typed) == "sgd-mnist-hidden_32_64-lr0.5-ya_b-no-x.z-seed1"
    assert len(name_of([f"optimizer.option{n}=1" for n in range(50)])) <= 120
    assert name_of([]) == "defaults"


def test_a_group_has_the_same_options_except_the_seed() -> None:
    from omegaconf import OmegaConf

    def of(*overrides: str) -> Any:
        return run_group(OmegaConf.to_container(config(*overrides), resolve=True))

    plain = of("optimizer=node_perturbation")
    assert plain == of("optimizer=node_perturbation", "seed=3", "threads=2", "data.root=elsewhere", "device=cpu")
    assert plain != of("optimizer=node_perturbation", "optimizer.lr=3")


@pytest.mark.long
def test_runs_of_a_sweep_in_parallel(tmp_path: Path) -> None:
    side_by_side = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = ["-m", "optimizer=sgd,oja", "seed=0", *TINY, *side_by_side, "sweep=two"]
    done = fresh("train.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/two/*/summary.json"))) == 2
    assert "digits: 2 runs in 2 groups" in done.stdout


@pytest.mark.long
def test_a_search_for_options_is_stored_and_resumes(tmp_path: Path) -> None:
    import optuna

    def tune(*arguments: str) -> subprocess.CompletedProcess[str]:
        return script("scripts/tune.py", *arguments, cwd=tmp_path)

    command = ["optimizer=sgd", *TINY, "optimizer.lr=tag(log, interval(0.001, 0.1))", "model.width=1,2", "--name", "s"]
    command.remove("model.width=2")
    done = tune(*command, "--trials", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n[trial ") == 2
    storage = f"sqlite:///{tmp_path / 'runs/s/study.db'}"
    study = optuna.load_study(study_name="s", storage=storage)
    interrupted = study.ask({"optimizer.lr": optuna.distributions.FloatDistribution(0.001, 0.1, log=True)})

    more = tune(*command, "--trials", "3")
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("\n[trial ") == 1
    assert f"optimizer.lr={interrupted.params['optimizer.lr']}" in more.stdout  # once more
    assert "python train.py optimizer=sgd" in more.stdout
    tried = [trial for trial in optuna.load_study(study_name="s", storage=storage).trials if trial.value is not None]
    assert [0.001 <= trial.params["optimizer.lr"] <= 0.1 for trial in tried] == [True] * 3
    saved = yaml.safe_load((tmp_path / "runs/s/trial-0/config.yaml").read_text())
    assert saved["data"]["validation"] == 300
    assert saved["optimizer"]["lr"] == tried[0].params["optimizer.lr"]

    for wrong, message in (
        (["optimizer=sgd"], "error: nothing to search"),
        (["optimizer=sgdd", "seed=1,2"], "optimizer=sgdd does not exist; did you mean sgd?"),
        (["optimizer=sgd", "optimizer.lr=interval(0,1"], "error: "),
    ):
        failed = tune(*wrong)
        assert failed.returncode == 1
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
