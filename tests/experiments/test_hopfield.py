"""The experiment on memories: what they hold, and where they fail."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from experiments.run import run
from experiments.tasks.hopfield import _crossing, _half, _meeting

from ..commands import config


def experiment(folder: Path, *options: str) -> dict:
    return run(config("experiment=hopfield_recall", "logger.mode=disabled", f"run_dir={folder}", *options))


SMALL = (
    *("task.neurons=[20,40]", "task.loads=[0.05,0.9]", "task.rules=40", "task.rule_loads=[0.05,0.9]"),
    *("task.modern=[4,8]", "task.digits=[2]", "task.flips=0.05"),
)


@pytest.mark.long
def test_the_experiment_measures_the_capacity_of_its_memories(tmp_path: Path) -> None:
    summary = experiment(tmp_path / "run", *SMALL)
    found = summary["measured"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 + 2 + 2 + 1
    assert lines[0]["held_20"] == lines[0]["held_40"] == 1.0  # of one and two patterns
    assert lines[1]["held_40"] < 0.5
    assert lines[2]["pseudo_inverse"] == 1.0
    half = [found[f"half_held_at_load_{n}"] for n in (20, 40)]
    slope = (half[0] - half[1]) / (20**-0.5 - 40**-0.5)
    assert math.isclose(found["extrapolated_load"], half[1] - slope * 40**-0.5)
    assert found["digits_flipped_modern"] == found["digits_masked_pseudo_inverse"] == 2
    assert 0 <= found["largest_rise_of_energy"] < 1e-12
    for name in ("capacity", "recall", "dynamics"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size < 300_000


def test_the_load_at_which_two_sizes_recall_equally() -> None:
    fractions = ((0.1, 1.0, 1.0), (0.2, 0.7, 0.9), (0.3, 0.6, 0.4), (0.4, 0.3, 0.0))
    lines = [{"load": load, "small": small, "large": large} for load, small, large in fractions]
    found = _meeting(lines, "small", "large")
    assert found is not None
    assert math.isclose(found, 0.25)
    assert _meeting(lines[:2], "small", "large") is None  # the larger one still recalls more


def test_the_load_at_which_half_are_lost() -> None:
    assert _crossing([1, 2, 3, 4], [1.0, 0.8, 0.4, 0.6]) == 2.75
    lines = [{"load": load, "held": fraction} for load, fraction in ((0.1, 1.0), (0.2, 0.5), (0.3, 0.25))]
    assert _half(lines, "load", "held") == 0.2
    assert _half(lines[:2], "load", "held") is None  # beyond the measured loads
    assert _half(lines[2:], "load", "held") is None


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("task.neurons=[]", r"task\.neurons=\[\] must be integers >= 1"),
        ("task.rules=0", r"task\.rules=0 must be an integer >= 1"),
        ("task.modern=[8,0]", r"task\.modern=\[8, 0\] must be integers >= 1"),
        ("task.loads=[0.001]", r"task\.loads=\[0\.001\] must rise, each at least one pattern in 250 neurons"),
        ("task.rule_loads=[0.2,0.1]", r"task\.rule_loads=\[0\.2, 0\.1\] must rise"),
        ("task.samples=0", r"task\.samples=0 must be an integer >= 1"),
        ("task.flips=0.5", r"task\.flips=0\.5 must be at least 0 and below 0\.5"),
        ("task.digits=[100000]", r"task\.digits=\[100000\], but digits has 1437 images"),
    ],
)
def test_invalid_options_of_the_experiment_are_refused(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"experiment=hopfield_recall: {message}"):
        experiment(tmp_path / "run", option)


@pytest.mark.slow
def test_the_critical_load_of_hebbian_storage_agrees_with_theory(tmp_path: Path) -> None:
    found = experiment(tmp_path / "run", "seed=5")["measured"]
    assert 0.9 < found["critical_load_over_theory"] < 1.1
    assert found["storkey_half_recalled_at_load"] > 1.5 * found["hebbian_half_recalled_at_load"]
    assert found["digits_flipped_hebbian"] < 10 < found["digits_flipped_pseudo_inverse"]
