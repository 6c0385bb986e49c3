"""The examples run as written, and their output shows learning."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable

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


def test_plain_loop(run: Run) -> None:
    before, hebbian, random, perturbed, descended = run("plain_loop.py")
    assert before < 25
    assert hebbian > random + 5
    assert min(perturbed, descended) > 80


def test_areas(run: Run) -> None:
    before, by_gradient, perturbed = run("blocks.py")
    assert before < 25
    assert by_gradient > 90
    assert perturbed > 80


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
