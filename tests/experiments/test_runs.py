"""The integrity of a run: options, checkpoint, folder, interruptions and ranks."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from experiments import options, runs
from experiments import run as running
from experiments.building import check_keywords
from experiments.config import name_of, resolved
from experiments.files import alone
from experiments.run import run
from experiments.runs import Progress, check_seal
from train import expanded

from ..commands import ROOT, TINY, appears, begun, config, ended, spread, started, tiny, train

CPU = torch.device("cpu")


def stopped(monkeypatch: pytest.MonkeyPatch, epochs: int, *overrides: str) -> None:
    """A run that is interrupted after the checkpoint of a given epoch."""
    save = Progress.save

    def interrupt(progress: Progress, folder: Path) -> None:
        save(progress, folder)
        if progress.epoch == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(config(*overrides))


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was interrupted after one of its two epochs."""
    from ..commands import undraw

    undraw(monkeypatch.setattr)
    stopped(monkeypatch, 1, *TINY, "epochs=2", f"run_dir={tmp_path / 'run'}")
    return tmp_path / "run"


# The checkpoint


def archive(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def saved_by_torch(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return found


def progress() -> Progress:
    return Progress(
        epoch=1,
        state={"model": {"weight": torch.arange(6.0)}},
        random={"cpu": torch.get_rng_state()},
        history=[{"epoch": 1}],
    )


def test_any_changed_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    progress().save(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = bytearray(path.read_bytes())
    check_seal(bytes(whole))
    assert torch.load(path, weights_only=True)["epoch"] == 1  # by anyone
    for place in range(len(whole)):
        whole[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"its bytes are not|it is not a checkpoint"):
            check_seal(bytes(whole))
        whole[place] ^= 1 << place % 8
    assert Progress.load(tmp_path, CPU).epoch == 1


@pytest.mark.parametrize(
    "damage",
    {
        "empty": lambda whole: b"",
        "cut off": lambda whole: whole[:1000],
        "without its last byte": lambda whole: whole[:-1],
        "flipped": lambda whole: whole[:800] + bytes([whole[800] ^ 1]) + whole[801:],
        "zeros": lambda whole: bytes(len(whole)),
        "text": lambda whole: b"hello\n",
        "of something else": lambda whole: archive([1, 2, 3]),
        "of another program": lambda whole: archive({"state_dict": torch.zeros(2)}),
        "of a whole module": lambda whole: archive(nn.Linear(1, 1)),
        "of an epoch that it has not made": lambda whole: archive({**saved_by_torch(whole), "epoch": 99}),
        "without its history": lambda whole: archive({**saved_by_torch(whole), "history": []}),
    }.items(),
    ids=lambda case: case[0],
)
def test_a_damaged_checkpoint_names_what_is_lost_and_how_to_resume(damage: Any, tmp_path: Path) -> None:
    progress().save(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage[1](path.read_bytes()))
    with pytest.raises(ValueError, match=r"is damaged \(.*\), and what the run has learned is lost") as error:
        Progress.load(tmp_path, CPU)
    assert f"delete it, and python train.py resume={tmp_path} starts again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_digest_loads_and_its_checksums_are_compared(tmp_path: Path) -> None:
    progress().save(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert torch.equal(Progress.load(tmp_path, CPU).state["model"]["weight"], torch.arange(6.0))
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    place = whole.index(torch.arange(6.0).numpy().tobytes())
    (tmp_path / "checkpoint.pt").write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    with pytest.raises(ValueError, match="is damaged"):
        Progress.load(tmp_path, CPU)


def test_a_run_starts_again_once_its_damaged_checkpoint_is_deleted(half: Path) -> None:
    (half / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        run(config(f"resume={half}"))
    (half / "checkpoint.pt").unlink()
    run(config(f"resume={half}"))
    assert [json.loads(line)["epoch"] for line in (half / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_options_that_changed_under_a_checkpoint_are_refused(half: Path) -> None:
    path = half / "config.yaml"
    before = path.read_text()
    for changed, message in (
        ({"seed": 4}, "made with seed=0, and config.yaml has seed=4"),
        ({"epochs": 5}, "made with epochs=2, and config.yaml has epochs=5"),
        ({"epoch": 5}, "made with epoch=None, and config.yaml has epoch=5"),
    ):
        path.write_text(yaml.safe_dump(yaml.safe_load(before) | changed))
        with pytest.raises(ValueError, match=message):
            run(config(f"resume={half}"))
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"device": "auto"}))  # which its results do not depend on
    run(config(f"resume={half}"))


def test_a_run_resumed_elsewhere_warns_and_keeps_its_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ..commands import undraw

    undraw(monkeypatch.setattr)
    monkeypatch.setattr(running, "code_version", lambda: "aaa")
    stopped(monkeypatch, 1, *TINY, "epochs=3", f"run_dir={tmp_path / 'run'}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    torch.set_num_threads(2)  # it resumes with its one thread
    try:
        stopped(monkeypatch, 2, f"resume={tmp_path / 'run'}")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(running, "code_version", lambda: "bbb+")
    monkeypatch.setattr(torch, "__version__", "9.9")
    summary = run(config(f"resume={tmp_path / 'run'}"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "is resumed with commit bbb+ (was aaa), torch 9.9 (was 2." in line
    assert "its results may differ, in the last bits" in line
    assert summary["commit"] == "aaa, bbb+"


def test_other_threads_and_devices_cause_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = runs.environment(CPU, "aaa", 1)
    before = {**now, "threads": now["threads"] + 1, "ranks": 2}
    Progress(environments=[before]).resume({"task": None, "epochs": 1}, now, tmp_path)
    assert f"threads {now['threads']} (was {now['threads'] + 1}), ranks 1 (was 2)" in capsys.readouterr().out
    on_gpu = {"commit": "aaa", "torch": now["torch"], "device": "NVIDIA H200", "ranks": 1}
    Progress(environments=[on_gpu]).resume({"task": None, "epochs": 1}, now, tmp_path)
    assert "is resumed with device cpu (was NVIDIA H200): its results" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_loses_nothing(half: Path) -> None:
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (half / f"{name}.part").symlink_to("/dev/full")  # writing to it fails as on a full disk
        with pytest.raises(OSError, match=r"the disk is full: \d+ MB are free at") as error:
            run(config(f"resume={half}"))
        assert str(error.value).endswith(f"then resume with: python train.py resume={half}")
        assert not list(half.glob("*.part"))
        assert Progress.load(half, CPU).epoch == 1
    assert run(config(f"resume={half}"))["epochs"] == 2


def test_an_interrupted_write_keeps_the_old_file(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, to: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        progress().save(half)
    assert not list(half.glob("*.part"))
    assert "0.weight" in Progress.load(half, CPU).state["model"]


# Options


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+epoch=3", "epoch is not an option; did you mean epochs?"),
        ("+lr=3", "lr is not an option; did you mean optimizer.lr?"),
        ("+xyz=3", "xyz is not an option; python train.py --help lists them all"),
        ("+data.foo=1", "data.foo is not an option; data has augment, like, name, root, size, validation"),
        ("+data.augment.crp=1", "data.augment.crp is not an option; did you mean data.augment.crop?"),
        ("+readout.batchsize=1", "readout.batchsize is not an option; did you mean readout.batch_size?"),
        ("+readout.optimizer.beta=1", "readout.optimizer.beta is not an option; did you mean readout.optimizer.betas?"),
        ("+logger.moode=disabled", "logger.moode is not an option; did you mean logger.mode?"),
        ("+diagnostics.evry=2", "diagnostics.evry is not an option; did you mean diagnostics.every?"),
        ("+optimizer.momentun=0.9", "optimizer.momentun is not an option; did you mean optimizer.momentum?"),
        ("+optimizer.sgima=1", "optimizer.sgima is not an option; optimizer has centre_inputs, competition, "),
        ("+model.widht=1", "model.widht is not an option; did you mean model.width?"),
        ("+optimizer.per_data.digits.epoch=3", "did you mean optimizer.per_data.digits.epochs?"),
        ("+optimizer.per_model.cnn.lr=3", "optimizer.per_model.cnn.lr=3 has no effect"),
        ("final_analysis={_target_:experiments.likelihood.likelihood,chain:1}", "did you mean final_analysis.chains?"),
        ("+rules.sgd.lr=1", "rules belongs to experiments such as architectures"),
        ("epochs=true", "epochs=True must be an integer >= 1"),
        ("seed=4294967296", "seed=4294967296 must be an integer below 2^32"),
        ("plastic_epochs=0", "plastic_epochs=0 must be an integer >= 1, or null"),
        ("logger.every=0", "logger.every=0 must be an integer >= 1"),
        ("sweep=../x", "sweep=../x must name a folder inside runs/, such as sweep=x"),
        ("data.root='\\${x}'", "data.root=${x} holds an interpolation"),
        ("optimizer.lr=-1", "optimizer=hebbian: Hebbian: lr=-1 must be"),
        ("optimizer.lr=abc", "optimizer.lr=abc must be a number"),
        ("readout=null", "readout=null must hold options, such as readout.optimizer"),
        ("data.augment=null", "data.augment=null must hold options, such as data.augment."),
        ("cost.blocks=abc", "cost.blocks=abc must give a cost for each part"),
        ("data.augment.crop=28", "data.augment.crop=28 moves images of 28 pixels out of sight; it is at most 27"),
        ("final_analysis={_target_:os.getcwd}", "it gives a str, not a function of the model"),
        ("final_analysis={_target_:os.nothing}", "final_analysis: Error loading 'os.nothing'"),
    ],
)
def test_a_mistaken_option_leaves_no_folder(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(config(*TINY, override, f"run_dir={tmp_path / 'runs' / 'run'}"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["epoch=3", "+epoch=3"])
def test_a_mistyped_option_is_refused_by_its_nearest_name(option: str, tmp_path: Path) -> None:
    for many in ([], ["-m"]):
        done = train(*many, *TINY, option, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr == "error: epoch is not an option; did you mean epochs?\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run_dir", [".", "", "null"])
def test_a_run_needs_a_folder_of_its_own(run_dir: str) -> None:
    with pytest.raises(ValueError, match=f"run_dir={run_dir or 'null'} must be the path of a new folder"):
        options.check(config(f"run_dir={run_dir}"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logger=null"], "logger=null names nothing; it can be csv, tensorboard or wandb; logger.mode=disabled"),
        (["logger=[]"], "logger=[] names nothing"),
        (["optimizer="], "optimizer= names nothing; it can be adam"),
        (
            ["experiment=first_run", "epochs=1"],
            "epochs=1 has no effect in experiment=first_run, whose options are task.",
        ),
        (["experiment=first_run", "optimizer=oja"], "has no effect in experiment=first_run"),
        (["experiment=first_run", "task.epoch=1"], "task.epoch is not an option; did you mean task.epochs?"),
    ],
)
def test_words_that_choose_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        options.check_names(words)


def test_words_that_choose_something_are_accepted() -> None:
    options.check_names(["experiment=null", "epochs=1", "optimizer=oja"])
    options.check_names(["experiment=benchmark", "optimizer=oja", "task.epochs=1"])
    options.check_names(["experiment=first_run", "task.epochs=1", "data=mnist", "model=mlp"])


def test_a_path_below_the_home_folder_is_expanded() -> None:
    assert expanded("data.root=~/data") == f"data.root={Path.home()}/data"
    assert expanded("data.root=a~/data") == "data.root=a~/data"


def test_a_mistaken_value_is_refused_without_torch(tmp_path: Path) -> None:
    code = "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')", "epochs=-1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stderr.startswith("error: epochs=-1 must be an integer >= 1")
    assert done.stdout == "False\n"
    assert not list(tmp_path.iterdir())


def added() -> list[str]:
    """Commands of the records that add options by ``+``, and those that comments in ``conf`` name."""
    records = (ROOT / "experiments/records/README.md").read_text().splitlines()
    commands = [line for line in records if line.startswith("python train.py") and " +" in line]
    for path in sorted((ROOT / "conf/experiment").glob("*.yaml")):
        found = re.findall(r"'(\+[^']*)'", path.read_text())
        commands += [f"python train.py experiment={path.stem} '{option}'" for option in found]
    return commands


@pytest.mark.parametrize("command", added())
def test_options_that_may_be_added_are_accepted(command: str) -> None:
    words = [word for word in shlex.split(command)[2:] if not word.startswith(("-m", "seed="))]
    options.check_names(words)
    chosen = config(*words)
    options.check(chosen)
    check_keywords(chosen)


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml")))
def test_every_experiment_is_accepted(experiment: str) -> None:
    chosen = config(f"experiment={experiment}")
    options.check(chosen)
    check_keywords(chosen)


def test_interpolations_in_a_run_s_configuration_are_refused(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    path = half / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"run_dir": "${oc.env:SECRET}"}))
    with pytest.raises(ValueError, match=r"config.yaml: run_dir=\$\{oc\.env:SECRET\} holds an interpolation"):
        run(config(f"resume={half}"))
    assert not list(half.glob("summary.json"))


# Interruptions


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("until", ["config.yaml", "checkpoint.pt"])
@pytest.mark.long
def test_an_interrupted_run_prints_how_to_resume(number: signal.Signals, code: int, until: str, tmp_path: Path) -> None:
    command = started(*TINY, "epochs=300", "run_dir=run", cwd=tmp_path, until=f"run/{until}")
    os.kill(command.process.pid, number)
    done = ended(command)
    assert done.stderr == f"interrupted by {number.name}; resume with: python train.py resume=run\n"
    assert done.returncode == code
    if until == "config.yaml":
        again = started("resume=run", cwd=tmp_path, until="run/checkpoint.pt")
        os.kill(again.process.pid, number)
        assert ended(again).returncode == code


def test_an_interrupted_run_closes_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import logs

    closed = []
    monkeypatch.setattr(logs.RunLog, "close", lambda log: closed.append(log.folder.name))
    stopped(monkeypatch, 1, *TINY, f"run_dir={tmp_path / 'run'}")
    assert closed == ["run"]


def test_an_interrupt_that_was_swallowed_counts_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments import interrupts

    monkeypatch.setattr(interrupts, "_received", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(config(*TINY, f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.long
def test_an_interrupted_sweep_names_its_own_command(tmp_path: Path) -> None:
    command = ["-m", *TINY, "epochs=300", "seed=0,1", "sweep=s"]
    sweep = started(*command, cwd=tmp_path, until="runs/s/*/checkpoint.pt")
    os.kill(sweep.process.pid, signal.SIGTERM)
    done = ended(sweep)
    assert done.returncode == 143
    assert done.stderr == f"interrupted by SIGTERM; resume with: {shlex.join(['python', 'train.py', *command])}\n"
    assert not list(tmp_path.glob("runs/s/*/error.txt"))


# One process in a folder


def test_a_folder_is_used_by_one_process_at_a_time(half: Path) -> None:
    with alone(half, "never"), pytest.raises(ValueError, match="is in use: another process is making this run"):
        run(config(f"resume={half}"))
    assert run(config(f"resume={half}"))["epochs"] == 2
    assert not (half / ".lock").exists()


@pytest.mark.long
def test_two_sweeps_of_one_name_and_sweeps_outside_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "runs/s").mkdir(parents=True)
    with alone(tmp_path / "runs/s", "never"):
        done = train("-m", *TINY, "sweep=s", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: runs/s is in use by another sweep; wait until it ends, or choose sweep=NAME\n"
    for name in ("../../x", f"{tmp_path}/x", "."):
        done = train("-m", *TINY, f"sweep='{name}'", cwd=tmp_path)
        assert done.returncode == 1
        assert f"error: sweep={name} must name a folder inside runs/" in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "runs", "s"]


@pytest.mark.long
def test_a_sweep_restarts_a_run_without_options_or_checkpoint(tmp_path: Path) -> None:
    named = [option for option in TINY if not option.startswith("logger")]
    first, second = (tmp_path / "runs/s" / name_of([*named, "optimizer=hebbian", f"seed={seed}"]) for seed in (0, 1))
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("")
    (second / "checkpoint.pt").write_text("")
    done = train("-m", *TINY, "seed=0,1", "sweep=s", cwd=tmp_path)
    assert (first / "summary.json").exists(), done.stdout
    assert f"failed: {second.relative_to(tmp_path)} is not a run's folder: its config.yaml is damaged" in done.stdout
    assert "delete that folder to make the run again from its start" in done.stdout
    assert done.returncode == 1


# Several ranks

SMALL = [
    *("optimizer=weight_perturbation", "optimizer.population=2", "model=mlp", "model.hidden=[16]"),
    *("batch_size=256", "threads=1", "logger.mode=disabled", "epochs=300", "run_dir=two"),
]


@pytest.mark.long
@pytest.mark.parametrize("option", ["seed=3", "optimizer.lr=0.5", "epochs=7"])
def test_ranks_with_other_options_are_refused_on_all(option: str, tmp_path: Path) -> None:
    name, value = option.split("=")
    first = resolved(config(*SMALL))
    for part in name.split("."):
        first = first[part]
    for done in map(ended, spread(*SMALL, cwd=tmp_path, other=[option])):
        assert done.returncode == 1
        assert f"error: rank 1 has {name}={value}, and the first {name}={first}: start all ranks with" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_ranks_may_differ_in_what_results_do_not_depend_on(tmp_path: Path) -> None:
    ranks = spread(*SMALL, "epochs=1", cwd=tmp_path, other=["threads=2", "data.root=elsewhere", "run_dir=other"])
    assert [ended(rank).returncode for rank in ranks] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


@pytest.mark.long
def test_a_rank_that_dies_ends_the_others_with_a_clear_error(tmp_path: Path) -> None:
    first, second = spread(*SMALL, cwd=tmp_path)
    appears(tmp_path, "two/checkpoint.pt", first)
    second.process.kill()
    done = ended(first)
    assert done.returncode == 1
    assert done.stderr.startswith("error: another rank has ended: its error is above, or it was killed")
    assert len(done.stderr.splitlines()) == 2  # and how to see more


@pytest.mark.long
def test_the_first_interrupted_rank_prints_the_message(tmp_path: Path) -> None:
    ranks = spread(*SMALL, cwd=tmp_path)
    appears(tmp_path, "two/checkpoint.pt", ranks[0])
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGTERM)
    first, second = map(ended, ranks)
    assert (first.returncode, second.returncode) == (143, 143)
    assert first.stderr == "interrupted by SIGTERM; resume with: python train.py resume=two\n"
    assert second.stderr == ""


# Killed at any time

KILLED = ["hebbian", "reward_hebbian", "node_perturbation", "weight_perturbation", "contrastive_divergence"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", KILLED)
def test_runs_killed_at_random_times_resume_bit_for_bit(rule: str, tmp_path: Path) -> None:
    """Five runs of each rule, each killed once and resumed, equal an uninterrupted run bit for bit."""
    common = [*tiny(rule), "epochs=30", "threads=1"]
    begin = time.monotonic()
    assert ended(begun("train.py", *common, "run_dir=whole", cwd=tmp_path)).returncode == 0
    whole = time.monotonic() - begin
    chance, reached = random.Random(rule), []
    while len(reached) < 5:
        folder = tmp_path / f"run{len(reached)}"
        command = begun("train.py", *common, f"run_dir={folder.name}", cwd=tmp_path)
        command.process.join(chance.uniform(0.05, 0.95) * whole)
        command.process.kill()
        command.process.join()
        if not (folder / "config.yaml").exists():  # there was nothing to take up yet
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if (folder / "summary.json").exists():  # it was too fast
            shutil.rmtree(folder)
            continue
        reached.append(Progress.load(folder, CPU).epoch)
        again = train(f"resume={folder.name}", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
    print(f"{rule}: 5 runs of {whole:.1f} s, killed after epochs {reached} of 30")
    expected = torch.load(tmp_path / "whole/checkpoint.pt", weights_only=True)
    for number in range(5):
        found = torch.load(tmp_path / f"run{number}/checkpoint.pt", weights_only=True)
        assert all(torch.equal(found["model"][key], weight) for key, weight in expected["model"].items())
        for left, right in zip(found["history"], expected["history"], strict=True):
            for key in ("epoch", "train_loss", "test_loss", "test_accuracy", "forward_passes", "weight_norms"):
                assert left[key] == right[key], key
        one, other = (json.loads((tmp_path / n / "summary.json").read_text()) for n in (f"run{number}", "whole"))
        for key in ("test_accuracy", "best_test_accuracy", "forward_passes"):
            assert one[key] == other[key], key
