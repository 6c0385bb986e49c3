"""The pages under docs/ are true: their Python runs, their commands compose, and their numbers match the records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import tasks
from experiments.run import run

from .commands import ROOT, TINY, config
from .test_readme import composed

PAGES = sorted((ROOT / "docs").glob("**/[!_]*.md"))
RECORDS = {
    result["command"]: f"{100 * result['mean']:.2f}"
    for result in map(json.loads, (path.read_text() for path in (ROOT / "experiments/records").glob("*/result.json")))
    if "mean" in result  # only classification
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
    *("getting_started", "other_loops"),
    *("rules/index", "rules/eprop", "rules/energy", "rules/feedback", "rules/hebbian", "rules/local", "rules/stdp"),
    *("rules/target", "memories/hopfield", "memories/short_term", "routing", "costs", "plausibility", "hub"),
]


@pytest.mark.parametrize("name", PAGES_WITH_PYTHON)
@pytest.mark.long
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


@pytest.mark.long
def test_commands_compose_and_quote_their_records() -> None:
    quoted = 0
    for page in PAGES:
        for command in composed(page.read_text().replace("optimizer=mine", "")):
            if command in RECORDS:
                assert RECORDS[command] in page.read_text(), (page.name, command)
                quoted += 1
    assert quoted >= 10


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["mine", "aligned"])
def test_a_rule_of_your_own_runs_as_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [text for _, text in blocks(ROOT / "docs/your_own_rule.md", "python|yaml")]
    code, options = found[:2] if name == "mine" else found[2:]
    assert len(code.splitlines()) <= 25
    written(tmp_path, {f"{name}.py": code, f"optimizer/{name}.yaml": options})
    monkeypatch.syspath_prepend(tmp_path)
    chosen = [f"hydra.searchpath=[file://{tmp_path}]", f"optimizer={name}", *TINY, f"run_dir={tmp_path}/run"]
    assert run(config(*chosen))["optimizer"] == name


def test_feedback_alignment_of_the_page_is_backpropagation_by_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the equations, written out for a small network."""
    code = [text for _, text in blocks(ROOT / "docs/your_own_rule.md", "python")][1]
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 6).double(), torch.arange(8) % 3
    optimizer = names["Aligned"](model, lr=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.estimate()
    h1 = model[1](model[0](x)).detach()
    h2 = model[3](model[2](h1)).detach()
    feedback = {}
    for index, size in ((1, (4, 5)), (2, (3, 4))):
        generator = torch.Generator().manual_seed(index)
        feedback[index] = (torch.randn(size, generator=generator) / size[1] ** 0.5).double()
    error = (model[4](h2).detach().softmax(1) - F.one_hot(y, 3)) / len(x)
    delta2 = error @ feedback[2] * (1 - h2**2)
    delta1 = delta2 @ feedback[1] * (1 - h1**2)
    for layer, delta, below in ((model[4], error, h2), (model[2], delta2, h1), (model[0], delta1, x)):
        torch.testing.assert_close(layer.weight.grad, delta.T @ below, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.bias.grad, delta.sum(0), rtol=1e-10, atol=1e-12)


def test_an_experiment_of_your_own_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/experiments.md"
    code, options = (text for _, text in blocks(page, "python|yaml") if "/walk." in text)
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
