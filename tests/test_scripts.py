"""The scripts run as documented, at tiny sizes; the others run in test_sweeps.py and test_dashboard.py."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from PIL import Image
from safetensors.torch import save_file

from experiments.run import run

from .commands import ROOT, TINY, config

Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a script as `python scripts/NAME.py` does; returns its output."""

    def call(name: str, *arguments: str) -> str:
        script = importlib.import_module(f"scripts.{name.removesuffix('.py')}")
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", [name, *arguments])
            script.main()
        return printed.getvalue()

    return call


def table(text: str) -> list[list[str]]:
    """The rows of its Markdown tables, without their headers."""
    text = re.sub(r"^\|.*\n\|[-:|]+$", "", text, flags=re.MULTILINE)
    return [row.strip("| ").split(" | ") for row in re.findall(r"^\|.*$", text, re.MULTILINE)]


def numbers(record: Any) -> list[float]:
    """All numbers in a record."""
    if isinstance(record, dict | list):
        return [n for value in (record.values() if isinstance(record, dict) else record) for n in numbers(value)]
    return [record] if isinstance(record, int | float) else []


def test_every_script_is_run_in_the_tests() -> None:
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    tested = re.findall(r'(?:call\("|script\("scripts/|"scripts" / ")(\w+\.py)"', text)
    assert set(tested) == {path.name for path in (ROOT / "scripts").glob("*.py")}


def test_the_animation_has_a_picture_for_each_frame(call: Call, tmp_path: Path) -> None:
    options = ["optimizer=hebbian", "model=mlp", "model.hidden=[4]", "epochs=1", "batch_size=256"]
    said = call("animate_fields.py", str(tmp_path / "fields.gif"), *options, "--frames", "3", "--columns", "2")
    assert "fields.gif: 4 pictures, test accuracy" in said  # the first is before learning
    with Image.open(tmp_path / "fields.gif") as drawn:
        assert drawn.format == "GIF"


def test_weights_are_kept_of_recorded_runs_alone(call: Call, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="none has no record; make it first"):
        call("keep_weights.py", "none", str(tmp_path))


def test_the_picture_of_the_readme(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("scripts.front_picture"), "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    call("front_picture.py")
    for name in ("front.png", "front_narrow.png"):
        with Image.open(tmp_path / "docs" / name) as drawn, Image.open(ROOT / "docs" / name) as kept:
            assert drawn.size == kept.size
            assert drawn.info["Description"] == kept.info["Description"], "run `python scripts/front_picture.py`"


def test_generate_names_outdated_files_and_writes_them(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("scripts.generate")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "generated", lambda: {tmp_path / "list.md": "new\n"})
    (tmp_path / "list.md").write_text("old\n")
    with pytest.raises(SystemExit, match=r"run `python scripts/generate.py`"):
        call("generate.py", "--check")
    assert (tmp_path / "list.md").read_text() == "old\n"
    assert call("generate.py") == "list.md written\n"
    assert (tmp_path / "list.md").read_text() == "new\n"
    assert call("generate.py", "--check") == ""


@pytest.mark.long
def test_bench_step(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = importlib.import_module("scripts.bench_step")

    def here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, call("bench_step.py", *command[2:]))

    monkeypatch.setattr(script.subprocess, "run", here)  # a fresh process for each optimizer takes a minute
    record = tmp_path / "out.json"
    shown = table(call("bench_step.py", "--seconds", "0", "--batch", "4", "--width", "2", "--json", str(record)))
    names = [name for name, *_ in shown]
    optimizers = {path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml")}
    assert set(names) == {"forward pass"} | optimizers - {"contrastive_divergence", "eprop", "reward_stdp", "stdp"}
    rows = json.loads(record.read_text())["rows"]
    assert [row["name"] for row in rows] == names
    assert all(math.isfinite(n) and n > 0 for n in numbers(rows))


@pytest.mark.long
def test_bench_relay(call: Call, tmp_path: Path) -> None:
    record = tmp_path / "out.json"
    shown = table(call("bench_relay.py", "--seconds", "0", "--batch", "2", "--device", "cpu", "--json", str(record)))
    rows = json.loads(record.read_text())["rows"]
    assert [row[0] for row in shown] == [row["network"] for row in rows]
    assert all(row["ratio"] > 0 for row in rows)


def test_dropin(call: Call, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    images = (torch.rand(40, 1, 12, 12, generator=generator) * 20 + 20 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    tensors = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images.clone(),
        "test_labels": labels.clone(),
    }
    save_file(tensors, tmp_path / "little.safetensors")
    options = ["--data", "little", "--root", str(tmp_path), "--seeds", "0", "1", "--epochs", "1", "--batch", "20"]
    rules = ["--rules", "sgd", "random_trunk", "oja", "--networks", "mlp", "cnn"]
    shown = call("dropin.py", *options, *rules, "--images", "40", "--out", str(tmp_path / "out"))
    runs = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 12
    assert all(run["finite"] and 0 <= run["accuracy"] <= 1 for run in runs)
    assert "| oja |" in shown
    call("dropin.py", *options, *rules, "--images", "40", "--out", str(tmp_path / "out"))  # nothing is run again
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 12


@pytest.mark.long
def test_bench_hebbian(call: Call, tmp_path: Path) -> None:
    record = tmp_path / "out.json"
    always = ["--seconds", "0", "--batches", "2", "--device", "cpu", "--json", str(record)]
    shown = call("bench_hebbian.py", *always, "--width", "0.05", "--no-compile")
    assert float(re.findall(r"differ by (\S+) of a step", shown)[0]) < 1e-3
    assert [row[1] for row in table(shown)] == [row["step"] for row in json.loads(record.read_text())["rows"]]
    assert len(table(shown)) == 6
    assert "as fast as in fp32" in shown
    shown = table(call("bench_hebbian.py", *always, "--table", "solves", "--neurons", "12"))
    assert [row[1] for row in shown] == ["SGD", "Oja", "Hebbian", "Sanger", "AntiHebbian"]
    shown = table(call("bench_hebbian.py", *always, "--table", "homeostasis", "--networks", "mlp"))
    assert [row[2] for row in shown] == [row["rule"] for row in json.loads(record.read_text())["rows"]]
    assert all(float(row[4]) > 0 for row in shown)


@pytest.mark.long
def test_bench_perturbation(call: Call, tmp_path: Path) -> None:
    record = tmp_path / "out.json"
    options = ["--seconds", "0", "--batch", "2", "--count", "2", "--device", "cpu", "--json", str(record)]
    shown = call("bench_perturbation.py", *options)
    assert len({row[0] for row in table(shown)}) >= 7
    assert all(n > 0 for n in numbers(json.loads(record.read_text())))
    assert "pairs/s" in shown
    assert "memory at the peak" in shown


def test_bench_feedback(call: Call, tmp_path: Path) -> None:
    record = tmp_path / "out.json"
    options = ["--seconds", "0", "--batch", "4", "--device", "cpu", "--networks", "lenet5", "--json", str(record)]
    shown = table(call("bench_feedback.py", *options))
    found = json.loads(record.read_text())["rows"]
    assert [row[0] for row in shown] == [row["rule"] for row in found]
    assert found[0]["ratio"]["lenet5"] == 1
    assert all(row["ms"]["lenet5"] > 0 for row in found)


@pytest.mark.parametrize("form", ["bptt", "eprop", "online"])
def test_bench_eprop(call: Call, form: str) -> None:
    found = json.loads(call("bench_eprop.py", "--one", form, "--steps", "2", "--neurons", "alif", "--hidden", "4"))
    assert found["ms"] > 0
    assert found["mb"] >= 0


@pytest.mark.long
def test_bench_scaling(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = importlib.import_module("scripts.bench_scaling")
    monkeypatch.setattr(script.mp, "spawn", functools.partial(mp.start_processes, start_method="forkserver"))
    record = tmp_path / "out.json"
    shown = table(call("bench_scaling.py", "--seconds", "0", "--batch", "4", "--processes", "2", "--json", str(record)))
    found = json.loads(record.read_text())
    assert [row[0].strip("`") for row in shown[: len(script.CASES)]] == list(found["2"]["steps"])
    for name, (_, shares, _) in script.CASES.items():
        one, two = (found[ranks]["steps"][name] for ranks in ("1", "2"))
        assert one["messages"] == 0 < two["messages"]
        assert shares or (two["bytes"] < 4000) == name.startswith("Serial"), (
            "sums travel where others draw 8 directions"
        )
    assert all(alone["bytes"] < 4000 for alone in found["2"]["losses_alone"].values())
    assert len(shown) == len(script.CASES) + len(script.EXTRAPOLATED) * (1 + len(script.RANKS)) + 1  # and messages
    for model in found["extrapolated"].values():
        assert model["64"]["sums"] < model["1"]["sums"]


@pytest.mark.usefixtures("undrawn")
def test_record(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = importlib.import_module("scripts.record")
    monkeypatch.setattr(script, "RECORDS", tmp_path / "records")
    folders = [str(tmp_path / f"seed{seed}") for seed in (1, 0)]
    summaries = [run(config(*TINY, f"seed={s}", f"run_dir={f}")) for s, f in zip((1, 0), folders, strict=True)]
    call("record.py", "digits", *folders)
    result = json.loads((tmp_path / "records/digits/result.json").read_text())
    assert result["test_accuracy"] == [summary["test_accuracy"] for summary in reversed(summaries)]
    again = shlex.split(result["command"].replace("seed=0,1", "seed=0"))[3:]
    same = "run_dir=same"  # by default it is named by the second
    assert config(*again, "logger.mode=disabled", same) == config(*TINY, "seed=0", same)
    before = (tmp_path / "records/README.md").read_text()
    assert result["command"] in before
    call("record.py")
    assert (tmp_path / "records/README.md").read_text() == before


class Parsed(Exception):
    """The parsed arguments of a script."""


def documented() -> list[str]:
    """The commands that pages and scripts give for scripts."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"), *(ROOT / "experiments/records").glob("*.md")]
    texts = [page.read_text().replace("\\\n", " ") for page in [*pages, *(ROOT / "scripts").glob("*.py")]]
    return sorted({found.strip() for text in texts for found in re.findall(r"python (scripts/\w+\.py[^`#\n]*)", text)})


@pytest.mark.parametrize("command", documented())
@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")
def test_documented_commands_parse(command: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser: argparse.ArgumentParser) -> None:
        raise Parsed(parse(parser))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    path, *arguments = shlex.split(command)
    with pytest.raises(Parsed) as parsed:
        call(Path(path).name, *arguments)
    if path == "scripts/tune.py":
        overrides = OverridesParser.create().parse_overrides(parsed.value.args[0].options)
        assert any(override.is_sweep_override() for override in overrides)
        config(*map(first_choice, overrides))


def first_choice(override: Override) -> str:
    """One value that a search can try."""
    if not override.is_sweep_override():
        return str(override.input_line)
    sweep = override.value()
    value = sweep.start if isinstance(sweep, IntervalSweep) else next(override.sweep_string_iterator())
    return f"{override.key_or_group}={value}"


def test_commands_for_scripts_are_found() -> None:
    assert {Path(command.split()[0]).name for command in documented()} == {
        p.name for p in (ROOT / "scripts").glob("*.py")
    }
