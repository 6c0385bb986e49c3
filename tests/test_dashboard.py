"""The W&B dashboard and sweep use metrics that runs log and options that exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from .commands import ROOT, TINY, config, inspected, train

pytestmark = pytest.mark.long  # the script runs in a process of its own, and imports another library
SCRIPT = str(ROOT / "scripts" / "wandb_dashboard.py")
AXES = {"epoch", "forward_passes", "seconds", "step"}
# Options of a run that logs more than TINY.
ON_DEMAND = {"diagnostics", "pictures/confusion", "pictures/misclassified"}


def call(*arguments: str, cwd: Path, command: tuple[str, ...] = (SCRIPT,)) -> subprocess.CompletedProcess[str]:
    """The script, without an account."""
    home = {"HOME": str(cwd), "NETRC": str(cwd / "none"), "WANDB_API_KEY": ""}
    return subprocess.run(
        [sys.executable, *command, "--entity", "us", "--project", "bioopt", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, **home},
    )  # fmt: skip


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = call("--data", "mnist", "--model", "cnn", "--dry-run", cwd=tmp_path_factory.mktemp("view"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    view: dict[str, Any] = json.loads(done.stdout)
    return view


@pytest.fixture(scope="module")
def panels(view: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The options of the panels of each kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for section in view["spec"]["section"]["panelBankConfig"]["sections"]:
        shown = section["flowConfig"]["columnsPerPage"] * section["flowConfig"]["rowsPerPage"]
        assert len(section["panels"]) <= shown, "some would be on a second page"
        for panel in section["panels"]:
            kinds.setdefault(panel["viewType"], []).append(panel["config"])
    return kinds


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[set[str]], set[str]]:
    """The names that a run logs: of each row of its history, and of its summary."""
    folder = tmp_path_factory.mktemp("run")
    done = train(*TINY, "logger.mode=offline", "run_dir=run", cwd=folder, HOME=str(folder))
    assert done.returncode == 0, done.stderr
    (record,) = folder.rglob("*.wandb")
    rows, summary = [], set()
    for line in map(json.loads, inspected(record, folder).splitlines()):
        if line["type"] == "history":
            rows.append({re.sub(r"^(pictures/\w+)\..*", r"\1", name) for name in line["history"]["item"]})
        if line["type"] == "summary":
            summary |= set(line["summary"]["update"])
    return rows, summary


def on_demand(name: str) -> bool:
    return name in ON_DEMAND or name.split("/")[0] in ON_DEMAND


def test_panels_show_what_runs_log(
    panels: dict[str, list[dict[str, Any]]], logged: tuple[list[set[str]], set[str]]
) -> None:
    rows, summary = logged
    for line in panels["Run History Line Plot"]:
        pattern = line.get("metricRegex", "|".join(f"^{metric}$" for metric in line["metrics"]))
        found = any(line["xAxis"] in row and any(re.search(pattern, name) for name in row) for row in rows)
        assert found or on_demand(pattern.strip("^")), f"no run logs {pattern} with {line['xAxis']}"
    for media in panels["Media Browser"]:
        for key in media["mediaKeys"]:
            assert on_demand(key) or any(key in row for row in rows), key
    for bars in panels["Bar Chart"]:
        assert set(bars["metrics"]) <= summary | ON_DEMAND
    for scatter in panels["Scatter Plot"]:
        assert {scatter["xAxis"], scatter["yAxis"]} <= {f"summary:{name}" for name in summary}


def test_panels_show_all_that_runs_log(
    panels: dict[str, list[dict[str, Any]]], logged: tuple[list[set[str]], set[str]]
) -> None:
    lines = panels["Run History Line Plot"]
    shown = AXES | {metric for line in lines for metric in line["metrics"]}
    shown |= {key for media in panels["Media Browser"] for key in media["mediaKeys"]}
    patterns = [line["metricRegex"] for line in lines if "metricRegex" in line]
    names = {name for row in logged[0] for name in row if not name.startswith("_")}  # "_": W&B's own
    assert not {name for name in names - shown if not any(re.search(pattern, name) for pattern in patterns)}


def test_accuracy_is_grouped_with_bands(panels: dict[str, list[dict[str, Any]]]) -> None:
    lines = panels["Run History Line Plot"]
    accuracy = {(p["xAxis"], p["groupBy"], p["groupArea"]) for p in lines if p["metrics"] == ["test/accuracy"]}
    axes = ("epoch", "forward_passes", "seconds")
    by_optimizer = {(x, "optimizer.value.name", "stderr") for x in axes}  # W&B's own name of config.optimizer.name
    assert accuracy == by_optimizer | {(x, "group", "minmax") for x in axes}
    assert all(p["aggregate"] and p["groupAgg"] == "mean" for p in lines + panels["Bar Chart"])
    assert {p["groupBy"] for p in panels["Bar Chart"]} == {"optimizer.value.name"}
    diagnostics = {p["metricRegex"].split("/")[1]: p["xAxis"] for p in lines if "diagnostics" in str(p)}
    angles = {"feedback_angle", "error_angle", "update_angle", "error_rank"}
    assert diagnostics == dict.fromkeys(
        {"cosine", "signal_to_noise", "update_ratio", "sparsity", "dead_units", "dimensionality"} | angles, "step"
    )
    assert {metric for p in panels["Bar Chart"] for metric in p["metrics"]} >= {
        "images_per_second", "seconds", "forward_passes", "peak_memory_bytes", "trained_parameters"
    }  # fmt: skip


def test_data_and_model_filter_the_runs(view: dict[str, Any]) -> None:
    assert (view["entity"], view["project"], view["displayName"]) == ("us", "bioopt", "Optimizers on mnist, cnn")
    filters = view["spec"]["section"]["runSets"][0]["filters"]["filters"]
    found = {(f["key"]["section"], f["key"]["name"], f["op"], f["value"]) for f in filters if "key" in f}
    assert found == {("config", "data.value.name", "=", "mnist"), ("config", "model.value.name", "=", "cnn")}


def test_what_is_missing_raises_a_clear_error(tmp_path: Path) -> None:
    done = call(cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: not logged in to W&B: run `wandb login`")
    absent = (
        f"import sys, runpy; sys.modules['wandb_workspaces'] = None; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    done = call("--dry-run", cwd=tmp_path, command=("-c", absent))
    assert done.returncode == 1
    assert done.stderr == "error: the dashboard needs wandb-workspaces: pip install -e '.[dashboard]'\n"


def test_the_sweep_composes(logged: tuple[list[set[str]], set[str]]) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args  # takes a second

    sweep = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).exists()
    assert any(sweep["metric"]["name"] in row for row in logged[0])
    default = config()
    for end in ("min", "max"):
        drawn = {name: {"value": parameter[end]} for name, parameter in sweep["parameters"].items()}
        overrides = create_sweep_command_args({"args": drawn})["args_no_hyphens"]  # as W&B's agent does
        fixed = [word for word in sweep["command"] if not word.startswith("${")]
        assert sweep["command"][:3] == ["${env}", "${interpreter}", "${program}"]
        assert sweep["command"][3:] == [*fixed, "${args_no_hyphens}"]
        composed = config(*fixed, *overrides)
        assert composed.data.validation > 0, "a sweep chooses on held-out images"
        for name, value in drawn.items():
            assert OmegaConf.select(composed, name) == value["value"]
            whole = OmegaConf.is_config(OmegaConf.select(default, name))
            assert not whole, "W&B would keep the sweep's word for a group in place of the run's own config.optimizer"
