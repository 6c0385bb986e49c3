"""`python train.py`: commands, output, and the files in the run's folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from bioopt.registry import family_of, rule_classes
from experiments import data, learner
from experiments.classification import Classification
from experiments.config import resolved
from experiments.run import run
from experiments.runs import with_amp_chosen
from experiments.sweeps import _same

from ..commands import (
    OPTIMIZERS,
    ROOT,
    SOFTHEBB,
    TINY,
    appears,
    config,
    ended,
    inspected,
    spread,
    started,
    tiny,
    torchrun,
    train,
    unrender,
)
from .test_tasks import interrupted

MODELS = sorted(p.stem for p in (ROOT / "conf/model").glob("*.yaml"))
DATA = sorted(p.stem for p in (ROOT / "conf/data").glob("*.yaml"))


# one of each family, and the controls; `make long` runs the others
FIRST = {
    *("sgd", "random_trunk", "hebbian", "feedback_alignment", "local_loss", "node_perturbation"),
    *("predictive_coding", "difference_target_propagation", "contrastive_divergence", "stdp", "eprop"),
}


@pytest.mark.parametrize(
    "optimizer", [name if name in FIRST else pytest.param(name, marks=pytest.mark.long) for name in OPTIMIZERS]
)
def test_every_optimizer_runs_and_writes_all_files(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer not in (
        "hebbian",
        "contrastive_divergence",
        "stdp",
        "reward_stdp",
    ):  # pictures are drawn once for each network
        unrender(monkeypatch.setattr)
    folder = tmp_path / "run"
    summary = run(config(*tiny(optimizer), f"run_dir={folder}"))
    left = {
        "checkpoint.pt", "config.yaml", "curves.png", "curves.pdf", "metrics.jsonl", "neurons.png", "neurons.pdf",
        "receptive_fields.png", "receptive_fields.pdf", "summary.json",
    }  # fmt: skip
    one_layer = optimizer == "reward_stdp"  # the last, of which there is no such picture
    in_time = optimizer == "eprop"  # whose first layer receives one row of an image
    missing = "neurons" if one_layer else "receptive_fields" if in_time else None
    assert {p.name for p in folder.iterdir()} == left - {f"{missing}.png", f"{missing}.pdf"}
    assert json.loads((folder / "summary.json").read_text()) == summary
    for key in ("test_accuracy", "best_test_accuracy", "optimizer", "data", "model", "seed", "epochs", "seconds",
                "forward_passes", "peak_memory_bytes", "images_per_second"):  # fmt: skip
        assert summary[key] is not None
    assert 0 <= summary["test_accuracy"] <= summary["best_test_accuracy"] <= 1
    assert summary["optimizer"] == optimizer
    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert line["epoch"] == 1
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert "${" not in json.dumps(resolved)
    assert resolved["optimizer"]["name"] == optimizer
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


BY_RULE = ("predictive_coding", "random_trunk")  # whose rate follows from another option


@pytest.mark.long
@pytest.mark.parametrize(
    ("optimizer", "model"), [*[(o, "cnn") for o in OPTIMIZERS], *[("softhebb", m) for m in MODELS]]
)
def test_every_combination_composes_with_sensible_values(optimizer: str, model: str) -> None:
    from omegaconf import OmegaConf

    composed = config(f"optimizer={optimizer}", f"model={model}")
    for path in (ROOT / "conf/data").glob("*.yaml"):  # of which only the name and the options are in what follows
        composed.data = OmegaConf.load(path)
        plain = OmegaConf.to_container(composed, resolve=True)
        assert plain["data"]["name"] == path.stem
        assert plain["epochs"] >= 1
        assert plain["optimizer"]["lr"] is None if optimizer in BY_RULE else plain["optimizer"]["lr"] > 0
        assert plain["optimizer"]["name"] == optimizer
        assert "_target_" in plain["model"]


@pytest.mark.parametrize("data", DATA)
def test_every_data_set_composes(data: str) -> None:
    by_hand = config("data=digits")
    by_hand.data = yaml.safe_load((ROOT / f"conf/data/{data}.yaml").read_text())
    composed = config(f"data={data}")
    composed.run_dir = by_hand.run_dir = ""  # they contain the time
    assert composed == by_hand


def test_the_command_line_wins_over_the_table() -> None:
    assert config("optimizer=hebbian", "data=mnist", "epochs=3", "optimizer.lr=0.5").optimizer.lr == 0.5
    assert config("epochs=3").epochs == 3


def test_the_random_trunk_has_the_training_of_hebbian_s_readout() -> None:
    hebbian, control = config("optimizer=hebbian", "data=mnist"), config("optimizer=random_trunk", "data=mnist")
    assert hebbian.optimizer.readout_lr is control.optimizer.lr is None
    assert hebbian.optimizer.readout_options.momentum == control.optimizer.momentum
    assert (hebbian.epochs, hebbian.batch_size) == (control.epochs, control.batch_size)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("readout_lr", [0.01, None])
def test_a_frozen_hebbian_trunk_is_the_random_trunk(readout_lr: float | None, tmp_path: Path) -> None:
    given = "null" if readout_lr is None else readout_lr
    same = []
    for name, options in (
        ("hebbian", ["optimizer.homeostasis=false", "optimizer.lr=0", f"optimizer.readout_lr={given}"]),
        ("homeostasis", ["optimizer.lr=0", f"optimizer.readout_lr={given}"]),
        ("random_trunk", [f"optimizer.lr={given}"]),
    ):
        summary = run(config(*tiny(name), *options, f"run_dir={tmp_path / name}"))
        same.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"])
    assert all(torch.equal(same[0][key], other[key]) for other in same[1:] for key in other)
    readout = sum(same[0][key].numel() for key in [*same[0]][-2:])
    assert summary["trained_parameters"] == readout


@pytest.mark.usefixtures("undrawn")
def test_homeostasis_alone_keeps_the_direction_of_weights(tmp_path: Path) -> None:
    ends = []
    for name in ("homeostasis", "random_trunk"):
        run(config(*tiny(name), "epochs=3", f"run_dir={tmp_path / name}"))  # more steps than rules wait
        weight = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]["0.weight"].flatten(1)
        ends.append(weight)
    assert not torch.allclose(ends[0].norm(dim=1), ends[1].norm(dim=1), rtol=0.1)
    torch.testing.assert_close(torch.cosine_similarity(*ends), torch.ones(len(ends[0])))


@pytest.mark.usefixtures("undrawn")
def test_frozen_parts_stay_at_their_random_start(tmp_path: Path) -> None:
    from experiments.building import build_model

    chosen = config(*tiny("node_perturbation"), "frozen=[0]", f"run_dir={tmp_path / 'run'}")
    torch.manual_seed(chosen.seed)
    start = build_model(chosen, data.load("digits", "nowhere")).state_dict()
    run(chosen)
    end = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    same = {name for name in start if name.endswith("weight") and torch.equal(start[name], end[name])}
    assert same == {"0.weight"}
    with pytest.raises(ValueError, match=r"frozen=conv is not a part of the model; it has 0, 1, 2"):
        run(config(*tiny("sgd"), "frozen=[conv]", f"run_dir={tmp_path / 'lacking'}"))


@pytest.mark.usefixtures("undrawn")
def test_the_trunk_is_frozen_after_its_phase_and_the_readout_learns_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = []
    for kept in (True, False):  # features stored, or computed again for each batch: the same run
        if not kept:
            monkeypatch.setattr(data.Features, "KEPT_BYTES", 0)
        folder = tmp_path / f"kept{kept}"
        common = [*SOFTHEBB, "optimizer=softhebb", "plastic_epochs=1", "epochs=4", "data.augment.crop=0", "threads=1"]
        summary = run(config(*common, f"run_dir={folder}"))
        ends.append(torch.load(folder / "checkpoint.pt", weights_only=True)["model"])
        assert summary["forward_passes"] == (2 * 5 if kept else 5 + 3 * 22)
        assert "Adam on the frozen trunk     readout.weight, readout.bias" in capsys.readouterr().out
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-3, atol=1e-4)  # other batches, other rounding
    run(config(*common, "epochs=2", f"run_dir={tmp_path / 'short'}"))
    earlier = torch.load(tmp_path / "short" / "checkpoint.pt", weights_only=True)["model"]
    for name in earlier:
        assert torch.equal(earlier[name], ends[1][name]) == ("readout" not in name), name


@pytest.mark.usefixtures("undrawn")
@pytest.mark.long
def test_phases_of_other_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for optimizer, message in (("random_trunk", "Adam on the frozen trunk"), ("sgd", "plastic_epochs does not apply")):
        common = [
            *SOFTHEBB,
            f"optimizer={optimizer}",
            "plastic_epochs=1",
            "epochs=2",
            f"run_dir={tmp_path / optimizer}",
        ]
        run(config(*common))
        assert message in capsys.readouterr().out
    for wrong in ("plastic_epochs=0", "plastic_epochs=some"):
        with pytest.raises(ValueError, match=f"{wrong} must be an integer >= 1, or null"):
            run(config(*common, wrong))
    run(config(*TINY, "plastic_epochs=1", f"run_dir={tmp_path / 'none_left'}"))
    assert "Hebbian readout (delta)" in capsys.readouterr().out


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (ROOT / "conf/experiment").glob("*hebb*.yaml")))
@pytest.mark.parametrize("optimizer", [None, "random_trunk", "sgd"])
def test_every_experiment_composes_with_its_controls(experiment: str, optimizer: str | None) -> None:
    from omegaconf import OmegaConf

    overrides = [f"experiment={experiment}", *([f"optimizer={optimizer}"] if optimizer else [])]
    plain = OmegaConf.to_container(config(*overrides), resolve=True)
    assert plain["optimizer"]["name"] == (optimizer or plain["optimizer"]["name"])
    assert plain["epochs"] > plain["plastic_epochs"] >= 1


def test_local_rules_have_a_phase_of_the_trunk_by_default_on_cifar10() -> None:
    assert config("data=cifar10").plastic_epochs == config("data=cifar10", "optimizer=random_trunk").plastic_epochs == 1
    assert config("data=cifar10", "optimizer=sgd").plastic_epochs is None


@pytest.mark.usefixtures("undrawn")
def test_a_validation_split_takes_the_place_of_the_test_set(tmp_path: Path) -> None:
    summary = run(config(*TINY, "data.validation=300", f"run_dir={tmp_path / 'run'}"))
    assert summary["evaluated_on"] == "the last 300 training images"
    with pytest.raises(ValueError, match=r"data.validation=2000 must be an integer >= 0 and below the 1437"):
        run(config(*TINY, "data.validation=2000", f"run_dir={tmp_path / 'run'}"))


@pytest.mark.usefixtures("undrawn")
def test_smoothed_labels_have_a_maximum_entropy_part(tmp_path: Path) -> None:
    common = ["optimizer=sgd", *TINY, "epochs=4"]
    sure = run(config(*common, f"run_dir={tmp_path / 'sure'}"))
    unsure = run(
        config(*common, "cost=label_smoothed", "cost.label_smoothing=1", f"run_dir={tmp_path / 'unsure'}")
    )  # all classes equal
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("sure", "unsure")]
    sure_loss, unsure_loss = (json.loads(line)["train_loss"] for line in lines)
    assert sure_loss < math.log(10) < unsure_loss < math.log(10) + 0.05
    assert unsure["test_accuracy"] < sure["test_accuracy"]


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("serial_perturbation", "softhebb")]


@pytest.mark.parametrize("optimizer", ["hebbian", *LONG])
@pytest.mark.usefixtures("undrawn")
@pytest.mark.long
def test_a_killed_run_resumes_with_the_same_result(optimizer: str, tmp_path: Path) -> None:
    common = [*tiny(optimizer), "epochs=8", "threads=1"]
    if optimizer == "softhebb":  # killed in the phase of the readout
        common = ["optimizer=softhebb", *SOFTHEBB, "plastic_epochs=1", "epochs=12", "threads=1"]
    run(config(*common, f"run_dir={tmp_path / 'whole'}"))
    process = started(*common, "run_dir=killed", cwd=tmp_path, until="killed/checkpoint.pt").process
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    if optimizer == "softhebb":
        metrics = tmp_path / "killed" / "metrics.jsonl"
        while len(metrics.read_text().splitlines()) < 4 and process.is_alive():
            time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "summary.json").exists(), "the run was too fast to be killed"
    before = torch.load(checkpoint, weights_only=True)["epoch"]
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"epoch": 99, "of": "an epoch that was not finished"}\n')

    resumed = train("resume=killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed after epoch {before}" in resumed.stdout
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole["model"][key], killed["model"][key]) for key in whole["model"])
    assert whole["forward_passes"] == killed["forward_passes"]
    for left, right in zip(
        *((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "killed")), strict=True
    ):
        for key in ("epoch", "train_loss", "test_loss", "test_accuracy"):
            assert json.loads(left)[key] == json.loads(right)[key]
    with pytest.raises(ValueError, match="has finished"):
        run(config(f"resume={tmp_path / 'killed'}"))


@pytest.mark.long
def test_a_run_with_wandb_offline(tmp_path: Path) -> None:
    offline = {"WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = train(*TINY, "logger.mode=auto", cwd=tmp_path, **offline)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar, messages or prompt without a terminal
    lines = done.stdout.splitlines()
    assert lines[0] == "hebbian on digits with cnn (2,060 parameters), seed 0, cpu, fp32"
    assert lines[1].startswith("epoch 1/1   train loss ")
    assert lines[1].endswith("images/s")
    assert "Hebbian readout (delta)" in done.stdout
    (command,) = [line for line in lines if "wandb leet" in line]
    folder = tmp_path / command.split("`wandb leet ")[1].split("`")[0]
    (record,) = folder.glob("*.wandb")
    shown = inspected(record, tmp_path)
    for logged in ("test/accuracy", "train/loss", "pictures/curves", "best_test_accuracy", "inverse_temperature"):
        assert logged in shown, logged
    assert list(folder.rglob("*.png"))


LATER = ["plastic_epochs=1", "epochs=1000"]  # an error before the first epoch


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=-1"], "optimizer=hebbian: Hebbian: lr=-1 must be"),
        (["optimizer=sgd", "optimizer.lr=-1"], "optimizer=sgd: Invalid learning rate: -1"),
        (["epochs=-1"], "epochs=-1 must be an integer >= 1"),
        (["model.width=0"], "model=cnn: model.width=0 must be an integer >= 1"),
        (["model.hidden=64"], "model=cnn: model.hidden=64 must be a list of integers >= 1, such as [128]"),
        (["frozen=0"], "frozen=0 must be a list of parts, such as [0]"),
        (["optimizer=stdp"], "It requires model=spiking"),
        (["readout.optimizer.lr=abc", *LATER], "readout.optimizer={'_target_'"),
        (["readout.schedule=linear", *LATER], "readout.schedule=linear must be cosine, constant or halving"),
        (["readout.batch_size=0"], "readout.batch_size=0 must be an integer >= 1"),
        (["readout.batch_size=5000", *LATER], "readout.batch_size=5000 is larger than the training set"),
        (["amp=maybe"], "amp=maybe must be true, false or auto"),
        (["data.augment.flip=sometimes"], "data.augment.flip=sometimes must be true or false"),
        (["epochs=0"], "epochs=0 must be an integer >= 1"),
        (["data.augment.rotate=abc"], "data.augment.rotate=abc must be a number >= 0"),
        (["data.augment.crop=0.5"], "data.augment.crop=0.5 must be an integer >= 0"),
        (["epochs=many"], "epochs=many must be an integer"),
        (["batch_size=0"], "batch_size=0"),
        (["batch_size=5000"], "batch_size=5000 is larger than the 1437 training images"),
        (["schedule=linear"], "schedule=linear must be cosine, constant or halving"),
        (["device=tpu"], "device=tpu must be auto, cpu or cuda"),
        (["logger.mode=loud"], "logger.mode=loud must be auto, online, offline or disabled"),
        (["optimizer.readout=oops"], "readout='oops' must be 'delta', 'teacher' or None"),
        (["data=cifar10", "data.root=nowhere"], "data set 'cifar10' is not at nowhere/cifar10.safetensors"),
        (["run_dir=/proc/forbidden"], "run_dir=/proc/forbidden cannot be written"),
        (["resume=nothing"], "resume=nothing is not a run's folder"),
        (["optimizer=sgd", "optimizer.lr=1e38", "epochs=3"], "with optimizer.lr=1e+38; lower it"),
        (["optimizer=softhebb", "optimizer.homeostasis=false", "optimizer.lr=1e30", "epochs=3"],
             "this step would change each weight of '0.weight' by"),
        (["optimizer=node_perturbation", "optimizer.lr=1e30"], "(epoch 1, optimizer.lr=1e+30)"),
    ],
)  # fmt: skip
def test_mistakes_raise_clear_errors(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError)) as error:
        run(config(*TINY, f"run_dir={tmp_path / 'run'}", *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["learning_rate: 0.1\n", "[1, 2", "- 1\n", "a: ${b}\n"])
def test_resume_of_a_folder_with_another_s_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"is not a run's folder: its config\.yaml is damaged, or was not written by"):
        run(config(f"resume={tmp_path}"))


def test_a_rule_without_its_network_names_what_is_missing(tmp_path: Path) -> None:
    common = ["optimizer=reward_stdp", "model=spiking", "logger.mode=disabled", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"It requires model\.readout=groups$"):
        run(config(*common))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=-1"], "error: optimizer=hebbian: Hebbian: lr=-1 must be a finite number >= 0"),
        (
            ["optimizer.nonsense=1"],
            "error: optimizer.nonsense is not in conf/optimizer/hebbian.yaml; to set another",
        ),
        (
            ["model.hiden=[3]"],
            "model.hiden is not in conf/model/cnn.yaml (did you mean model.hidden?)",
        ),
        *(
            pytest.param(*one, marks=pytest.mark.long)
            for one in [
                (["optimizer=hebian"], "error: optimizer=hebian does not exist; did you mean hebbian? "),
                (["resume=nothing"], "error: resume=nothing continues with the options of that run; leave out "),
                (["optimizer._target_=bioopt.Hebian"], "Are you sure that 'Hebian' is importable from module 'bioopt'"),
            ]
        ),
    ],
)
def test_mistakes_end_the_command_without_a_traceback(overrides: list[str], message: str, tmp_path: Path) -> None:
    failed = train(*TINY, *overrides, cwd=tmp_path)
    assert failed.returncode == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    if "hebian" in message:
        assert all(optimizer in failed.stderr for optimizer in OPTIMIZERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device=cuda, but torch sees no CUDA GPU here; use device=cpu or device=auto"):
        run(config(*TINY, "device=cuda", f"run_dir={tmp_path / 'run'}"))


@pytest.mark.usefixtures("undrawn")
def test_a_long_sweep_causes_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(*tiny("serial_perturbation"), f"run_dir={tmp_path / 'run'}"))
    assert "makes 0.0" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_runs_of_one_second_do_not_share_a_folder(tmp_path: Path) -> None:
    for _ in range(2):
        run(config(*TINY, f"run_dir={tmp_path / 'run'}"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-2"]


@pytest.mark.usefixtures("undrawn")
def test_the_readout_of_a_frozen_trunk_learns_in_single_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are kept in half precision, but steps below the rounding of the readout's weights count."""
    seen = []

    def noted(self: Any, inputs: Any, labels: Tensor, *more: Any) -> Tensor:
        outputs = step(self, inputs, labels, *more)
        seen.append((inputs.dtype, self.amp))
        return outputs

    step = learner.Learner.step
    monkeypatch.setattr(learner.Learner, "step", noted)
    options = [*SOFTHEBB, "plastic_epochs=1", "epochs=2", "amp=true", "control=false"]
    run(config("optimizer=softhebb", *options, f"run_dir={tmp_path / 'run'}"))
    assert set(seen) == {(torch.float32, True), (torch.float32, False)}
    assert seen[-1] == (torch.float32, False)


@pytest.mark.usefixtures("undrawn")
def test_amp(tmp_path: Path) -> None:
    for optimizer in ("sgd", "hebbian", "node_perturbation"):  # the contract has all rules under autocast
        summary = run(config(*tiny(optimizer), "amp=true", f"run_dir={tmp_path / optimizer}"))
        assert summary["test_accuracy"] > 0
        assert summary["precision"] == "bf16"


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False)],
)
def test_amp_auto_is_chosen_by_the_hardware(
    capabilities: dict[str, bool], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    given = config(*TINY, "amp=auto", "device=cpu")
    assert with_amp_chosen(given).amp is chosen
    assert given.amp == "auto"
    monkeypatch.setattr(torch.cpu, "get_capabilities", None)
    assert with_amp_chosen(config(*TINY, f"amp={chosen}", "device=cpu")).amp is chosen
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # of an earlier torch
    assert with_amp_chosen(given).amp is False


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("capabilities", "said"), [({"avx512_bf16": True}, False), ({"avx2": True}, True)])
def test_a_run_says_that_its_cpu_emulates_bf16(
    capabilities: dict[str, bool],
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    run(config(*TINY, "amp=true", "device=cpu", "control=false", f"run_dir={tmp_path / 'run'}"))
    assert ("try amp=auto" in capsys.readouterr().out) is said


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.long
def test_a_run_with_amp_auto_keeps_its_precision(
    bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": bf16})
    options = [*TINY, "epochs=2", "amp=auto", "device=cpu", "control=false"]
    whole = run(config(*options, f"run_dir={tmp_path / 'whole'}"))
    name = "bf16" if bf16 else "fp32"
    assert capsys.readouterr().out.splitlines()[0].endswith(f", seed 0, cpu, {name}")
    assert whole["precision"] == name
    assert OmegaConf.load(tmp_path / "whole" / "config.yaml").amp is bf16
    interrupted(monkeypatch, Classification, 2, *options, f"run_dir={tmp_path / 'part'}")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": not bf16})  # of another machine
    again = run(config(f"resume={tmp_path / 'part'}"))
    assert (again["precision"], again["test_accuracy"]) == (name, whole["test_accuracy"])


def test_a_sweep_accepts_what_amp_auto_chose(tmp_path: Path) -> None:
    def plain(amp: str) -> dict[str, Any]:
        return resolved(config(*TINY, f"amp={amp}"))

    OmegaConf.save(OmegaConf.create(plain("true")), tmp_path / "config.yaml")
    _same(tmp_path, plain("auto"))
    with pytest.raises(ValueError, match="holds a run with amp=True, which is False now"):
        _same(tmp_path, plain("false"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_on_a_gpu(optimizer: str, tmp_path: Path) -> None:
    summary = run(config(*tiny(optimizer), "device=cuda", f"run_dir={tmp_path / 'run'}"))
    assert "cpu" not in summary["device"]


def test_options_of_parts_reach_their_groups() -> None:
    from experiments.building import build_model, build_optimizer

    images = data.load("digits", "nowhere")
    best = ["experiment=hebbian_cifar10_best", "data=digits", "model.width=0.03", "model.whitened=5"]
    chosen = config(*best, "optimizer.per_model.softhebb.trunk.block2.lr=0.5")
    optimizer = build_optimizer(chosen, build_model(chosen, images))
    rates = {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert rates == {
        "trunk.block1.conv.weight": 0.08,
        "trunk.block2.conv.weight": 0.5,
        "trunk.block3.conv.weight": 0.01,
        "trunk.whitened.conv.weight": 0.2,
        "readout.weight": 1e-4,
        "readout.bias": 1e-4,
    }
    trunk = [g for g in optimizer.param_groups if any("trunk" in name for name in g["param_names"])]
    # A block has the options of the trunk where it has none of its own.
    assert [g["homeostasis"] for g in trunk] == [False, False, False, True]
    control = config(*best, "optimizer=random_trunk")
    build_optimizer(control, build_model(control, images))
    control = config(*best, "optimizer=sgd")
    model = build_model(control, images)
    trunk, readout = build_optimizer(control, model).param_groups
    assert (trunk["lr"], readout["lr"], trunk["momentum"]) == (10.0, 1e-3, 0.9)
    assert [*trunk["params"], *readout["params"]] == list(model.parameters())
    lacking = config(*best, "+optimizer.per_model.softhebb.trunk.block4.lr=1")
    with pytest.raises(ValueError, match=r"options for 'trunk\.block4', which is not a part of the model"):
        build_optimizer(lacking, build_model(lacking, images))


SMALL = ["model=mlp", "model.hidden=[16]", "batch_size=256", "threads=1", "logger.mode=disabled"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.long
def test_torchrun_spreads_a_run_over_processes(tmp_path: Path) -> None:
    common = ["optimizer=hebbian", "optimizer.lr=0.01", "epochs=2", *SMALL]
    done = torchrun("train.py", *common, "run_dir=two", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch" not in done.stdout
    assert done.stdout.count("test accuracy") == 4  # each epoch, the end and its verdict, by the first rank only
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two"]
    run(config(*common, f"run_dir={tmp_path / 'one'}"))
    two, one = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("two", "one"))
    for name in one:  # sums over ranks are not in the order of sums over the batch
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.long
def test_an_interrupted_run_of_several_ranks_resumes_with_the_same_result(tmp_path: Path) -> None:
    common = ["optimizer=weight_perturbation", "optimizer.population=3", "epochs=16", *SMALL]
    ranks = spread(*common, "run_dir=two", cwd=tmp_path)
    appears(tmp_path, "two/checkpoint.pt", ranks[0])
    for rank in ranks:
        rank.process.terminate()
    for rank in ranks:
        rank.process.join()
    assert not (tmp_path / "two" / "summary.json").exists(), "the run was too fast to be interrupted"
    first, second = [ended(rank) for rank in spread("resume=two", cwd=tmp_path)]
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    made = 16 - int(first.stdout.split("resumed after epoch ")[1].split()[0])
    assert first.stdout.count("test accuracy") == made + 2  # and the end, with its verdict
    assert second.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two"]
    run(config(*common, f"run_dir={tmp_path / 'one'}"))
    two, one = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["model"] for n in ("two", "one"))
    for name in one:
        assert torch.equal(two[name], one[name]), name


@pytest.mark.long
def test_an_optimizer_that_cannot_be_spread_raises_an_error(tmp_path: Path) -> None:
    for rank in spread("optimizer=sgd", "run_dir=sgd", "logger.mode=disabled", cwd=tmp_path):
        failed = ended(rank)
        assert failed.returncode != 0
        assert "error: optimizer=sgd: it cannot share a run with other ranks; run it without torchrun" in failed.stderr


def test_help_lists_every_optimizer_by_family_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); sys.argv = ['t', '--help']"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, torch_was_needed = done.stdout.splitlines()
    assert torch_was_needed == "False"
    shown = lines[lines.index("Contrastive") : lines.index("== All choices ==")]
    families = [line for line in shown if line and not line.startswith(" ")]
    assert families == [*sorted({family_of(rule).capitalize() for rule in rule_classes()}), "Control"]
    rows = {line.split()[0]: line for line in shown if line.startswith("  ")}
    assert sorted(rows) == OPTIMIZERS
    controls = lines.index("Control")
    for name, row in rows.items():  # a rule names its paper
        assert lines.index(row) > controls or row.endswith(")"), name


def test_online_runs_are_grouped_and_leave_their_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    import wandb

    started: list[types.SimpleNamespace] = []

    def init(**options: object) -> types.SimpleNamespace:  # a test has no account
        online = types.SimpleNamespace(
            options=options, id=f"run{len(started)}", dir=str(tmp_path / "files"), summary={}, axes={}, rows=[],
            kept=[], settings=types.SimpleNamespace(_offline=False), finish=lambda: None,
        )  # fmt: skip
        online.define_metric = lambda name, **how: online.axes.update({name: how})
        online.log = online.rows.append
        online.log_artifact = lambda path, name, type: online.kept.append((path, name, type))
        started.append(online)
        return online

    monkeypatch.setattr(wandb, "init", init)
    unrender(monkeypatch.setattr)
    for name, more in {"a": ["seed=0"], "b": ["seed=1"], "c": ["optimizer.lr=0.5"], "d": ["optimizer=sgd"]}.items():
        run(config(*TINY, *more, "logger.mode=online", f"run_dir={tmp_path / name}"))
    first, second, other, control = started
    assert first.options["group"] == second.options["group"] != other.options["group"]
    assert first.options["group"].startswith("hebbian-cnn-digits-")
    assert [r.options["job_type"] for r in started] == ["rule", "rule", "rule", "control"]
    assert control.options["tags"] == ["sgd", "cnn", "digits"]
    assert first.kept == [(str(tmp_path / "a" / "checkpoint.pt"), "run0-checkpoint", "model")]
    assert first.summary["best_test_accuracy"] is not None
    assert first.axes["test/accuracy"] == {"summary": "max,last", "step_metric": "epoch"}
    assert {"step", "epoch", "forward_passes", "seconds"} < first.axes.keys()
    assert any("forward_passes" in row and "seconds" in row and "test/accuracy" in row for row in first.rows)
