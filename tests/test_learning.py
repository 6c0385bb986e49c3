"""What the rules really learn, on real data. Slow: `make slow`, with MNIST in `data/`."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.run import run

from .commands import ROOT, config

MNIST = ROOT / "data" / "mnist.safetensors"
pytestmark = pytest.mark.slow
needs_mnist = pytest.mark.skipif(not MNIST.exists(), reason=f"needs {MNIST}")


def accuracy(tmp_path: Path, *overrides: str) -> float:
    common = ["logger.mode=disabled", f"data.root={ROOT / 'data'}", f"run_dir={tmp_path / 'run'}"]
    return run(config(*overrides, *common))["test_accuracy"]


def test_hebbian_reads_digits_at_least_as_well_as_the_random_trunk(tmp_path: Path) -> None:
    hebbian = accuracy(tmp_path, "optimizer=hebbian")
    assert hebbian >= 0.98
    assert hebbian >= accuracy(tmp_path, "optimizer=random_trunk")


@needs_mnist
@pytest.mark.parametrize(
    ("overrides", "least"),
    [
        (["optimizer=sgd"], 0.99),
        (["optimizer=hebbian"], 0.975),
        (["optimizer=hebbian", "optimizer.homeostasis=false", "optimizer.lr=3", "optimizer.readout_lr=0.02"], 0.985),
        (["optimizer=node_perturbation", "model=mlp"], 0.965),
        (["optimizer=weight_perturbation", "model=mlp"], 0.92),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mnist(overrides: list[str], least: float, tmp_path: Path) -> None:
    assert accuracy(tmp_path, "data=mnist", *overrides) >= least


def test_serial_perturbation_reads_digits(tmp_path: Path) -> None:
    assert (
        accuracy(tmp_path, "optimizer=serial_perturbation", "model=mlp", "model.hidden=[16]", "data.augment.crop=0")
        >= 0.9
    )
