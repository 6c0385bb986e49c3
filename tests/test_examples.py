"""The examples run as written, and their output shows learning."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .commands import ROOT

EXAMPLES = ROOT / "examples"
Run = Callable[..., list[float]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as `python examples/NAME.py` does; returns the numbers that it prints before a "%"."""

    def run(name: str, *arguments: str) -> list[float]:
        path = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.delitem(sys.modules, "digits", raising=False)
        with torch.random.fork_rng():
            runpy.run_path(path, run_name="__main__")
        return [float(number) for number in re.findall(r"([\d.]+) %", capsys.readouterr().out)]

    yield run
    sys.modules.pop("digits", None)


def test_every_example_is_run_here() -> None:
    tested = re.findall(r'run\("(\w+\.py)"', (ROOT / "tests" / "test_examples.py").read_text())
    assert sorted([*tested, "digits.py"]) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.long
def test_plain_loop(run: Run) -> None:
    before, hebbian, random, perturbed, descended = run("plain_loop.py")
    assert before < 25
    assert hebbian > random + 5
    assert min(perturbed, descended) > 80


@pytest.mark.long
def test_areas(run: Run) -> None:
    before, by_gradient, perturbed = run("blocks.py")
    assert before < 25
    assert by_gradient > 90
    assert perturbed > 80


@pytest.mark.long
def test_accumulation_clipping_and_a_schedule(run: Run) -> None:
    assert min(run("accumulate_clip_schedule.py")) > 70


@pytest.mark.long
def test_compilation_and_autocast(run: Run) -> None:
    torch.compiler.reset()
    plain, compiled, autocast = run("compile_autocast.py", "aot_eager")  # inductor takes a minute to start
    assert compiled == pytest.approx(plain, abs=1)
    assert autocast == pytest.approx(plain, abs=5)
    assert plain > 70


# Lightning's own, of torch's pytrees.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.long
def test_lightning(run: Run) -> None:
    assert min(run("lightning_fit.py")) > 65


@pytest.mark.long
def test_a_resnet(run: Run) -> None:
    before, after = run("resnet18.py")
    assert before < 25
    assert after > 50


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.long
def test_the_trainer_of_hugging_face(run: Run) -> None:
    before, *trained = run("huggingface_trainer.py")
    assert before < 25
    assert min(trained) > 65


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.long
def test_accelerate(run: Run) -> None:
    before, hebbian, perturbed = run("accelerate_loop.py")
    assert before < 25
    assert hebbian > 65
    assert perturbed > 80


@pytest.mark.long
def test_skorch(run: Run) -> None:
    before, hebbian, perturbed = run("skorch_net.py")
    assert before < 25
    assert hebbian > 65
    assert perturbed > 80


@pytest.mark.long
def test_ignite(run: Run) -> None:
    before, hebbian, perturbed = run("ignite_engine.py")
    assert before < 25
    assert hebbian > 65
    assert perturbed > 80


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_and_prints_what_it_holds(path: Path) -> None:
    if path.stem == "spikes_and_memory":
        pytest.importorskip("snntorch")
    kept, fresh = (json.loads(path.read_text("utf-8")) for _ in range(2))
    with torch.random.fork_rng():
        runpy.run_path(str(ROOT / "scripts" / "notebooks.py"))["run"](fresh)
    assert [printed(cell) for cell in fresh["cells"]] == [printed(cell) for cell in kept["cells"]]
    accuracies = [float(number) for cell in fresh["cells"] for number in re.findall(r"([\d.]+) %", texts(cell))]
    assert max(accuracies) > 60


def texts(cell: dict[str, Any]) -> str:
    """What a cell has printed, and the kind of each other output."""
    outputs = cell.get("outputs", [])
    return "\n".join("".join(output.get("text", [output["output_type"]])) for output in outputs)


def printed(cell: dict[str, Any]) -> list[str]:
    """The words of that in any order, without numbers, whose last digits depend on the processor."""
    return sorted(re.sub(r"\d[\d.]*", "#", texts(cell)).split())


def test_notebooks_hold_no_paths_and_stay_small() -> None:
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        assert not re.search(r"/(home|work|tmp|Users|root)/", text), path.name
        assert len(text) < 200_000, path.name
        code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in code), "python scripts/notebooks.py runs it"
