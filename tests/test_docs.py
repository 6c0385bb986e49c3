"""The pages under docs/ say what is so: their Python runs, their commands compose, their numbers are the records'."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from experiments import tasks
from experiments.run import run

from .commands import ROOT, TINY, config
from .test_readme import composed

PAGES = sorted((ROOT / "docs").glob("**/[!_]*.md"))
RECORDS = {
    result["command"]: f"{100 * result['mean']:.2f}"
    for result in map(json.loads, (path.read_text() for path in (ROOT / "experiments/records").glob("*/result.json")))
    if "mean" in result  # not of what is no classification
}


def blocks(page: Path, languages: str) -> list[tuple[str, str]]:
    """The code blocks of a page in these languages, each with its language."""
    return re.findall(rf"```({languages})\n(.*?)```", page.read_text(), re.DOTALL)


def written(folder: Path, texts: dict[str, str]) -> None:
    """Files of a user's own."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def without_numbers(text: str) -> list[str]:
    return re.sub(r"\d[\d.]*", "#", text).split()


PAGES_WITH_PYTHON = [
    *("getting_started", "other_loops", "rules/index", "rules/hebbian", "rules/stdp"),
    *("memories/hopfield", "memories/short_term", "routing", "costs"),
]


@pytest.mark.parametrize("name", PAGES_WITH_PYTHON)
def test_the_python_of_a_page_prints_what_follows_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "rules/stdp":
        pytest.importorskip("snntorch")
    names: dict[str, object] = {}
    printed, compared = None, 0
    for language, block in blocks(ROOT / "docs" / f"{name}.md", "python|text"):
        if language == "python":
            exec(block, names)
            printed = capsys.readouterr().out
        elif printed is not None:
            assert without_numbers(printed) == without_numbers(block)
            compared += bool(printed)
    assert compared


def test_commands_compose_and_quote_their_records() -> None:
    quoted = 0
    for page in PAGES:
        for command in composed(page.read_text().replace("optimizer=mine", "")):
            if command in RECORDS:
                assert RECORDS[command] in page.read_text(), (page.name, command)
                quoted += 1
    assert quoted >= 10


@pytest.mark.usefixtures("undrawn")
def test_a_rule_of_your_own_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/your_own_rule.md"
    ((_, code), (_, options)) = blocks(page, "python|yaml")
    written(tmp_path, {"mine.py": code, "optimizer/mine.yaml": options})
    monkeypatch.syspath_prepend(tmp_path)
    summary = run(config(f"hydra.searchpath=[file://{tmp_path}]", "optimizer=mine", *TINY, f"run_dir={tmp_path}/run"))
    assert summary["optimizer"] == yaml.safe_load(options)["name"]


def test_an_experiment_of_your_own_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/experiments.md"
    ((_, code), (_, options), _) = blocks(page, "python|yaml")
    written(tmp_path, {"walk.py": code, "experiment/walk.yaml": options})
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    chosen = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=walk", "task.width=3", "logger.mode=disabled"]
    assert run(config(*chosen, f"run_dir={tmp_path}/run"))["measured"]["farthest"] > 0


@pytest.mark.usefixtures("undrawn")
def test_a_cost_of_your_own_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/costs.md"
    code = next(block for _, block in blocks(page, "python") if block.startswith("# robust.py"))
    ((_, options),) = blocks(page, "yaml")
    written(tmp_path, {"robust.py": code, "cost/absolute_error.yaml": options})
    monkeypatch.syspath_prepend(tmp_path)
    chosen = [f"hydra.searchpath=[file://{tmp_path}]", "cost=absolute_error", "optimizer=sgd", *TINY, "epochs=10"]
    summary = run(config(*chosen, f"run_dir={tmp_path}/run"))
    assert summary["test_accuracy"] > 0.5
