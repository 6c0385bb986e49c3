"""The network of competing spiking neurons, and its readout by votes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from experiments.models import spiking
from experiments.models.spiking import Competition
from experiments.run import run
from experiments.spiking import assign, shares, voted, window

from ..commands import config


def test_neurons_that_compete() -> None:
    pytest.importorskip("snntorch")
    neurons = Competition(3, beta=0.5, threshold=1.0, adaptation=0.6)
    u, v = torch.tensor([[1.4, 1.2, 0.0], [0.9, 0.2, 0.0]]), torch.zeros(2, 3)
    s, v = neurons(u, v)
    assert s.tolist() == [[1, 0, 0], [0, 0, 0]]  # one fires, though two are above the threshold
    torch.testing.assert_close(v, torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.2, 0.0]]))  # and silences all
    s, v = neurons(u, v)
    assert s.tolist() == [[1, 0, 0], [1, 0, 0]]
    neurons.adapt(torch.tensor([[2.0, 0, 1], [0, 0, 3]]))
    torch.testing.assert_close(neurons.lif.threshold, torch.tensor([1.0, 0.4, 1.6]))
    s, _ = neurons(u, torch.zeros(2, 3))
    assert s.tolist() == [[0, 1, 0], [0, 0, 0]]  # the second by 0.8, the first by 0.4; the fourth 0.9 below 1


def test_votes() -> None:
    counts = torch.tensor([[3.0, 0, 1, 0], [2, 0, 1, 0], [0, 4, 1, 0], [1, 1, 1, 0]])
    labels = torch.tensor([0, 0, 2, 2])
    assigned = assign(counts, labels, 4)
    assert assigned.tolist() == [0, 2, 0, -1]  # the last never fires, and has no vote
    seen = torch.tensor([[3.0, 2, 0, 9], [3, 1, 2, 0], [0, 0.1, 0, 0]])
    assert voted(seen, assigned, 4).tolist() == [2, 0, 2]
    of_class = torch.tensor([[2.5, 0, 0.5, 0], [0, 0, 2.5, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(shares(counts, labels, 4), of_class / torch.tensor([[3.0], [2.5], [2], [1]]))


def test_the_measured_window_is_that_of_the_options() -> None:
    delays, changes = window(
        {"dt": 2.0, "tau_plus": 10.0, "a_minus": 0.5, "bounds": None, "_target_": "bioopt.STDP"}, 5
    )
    assert delays == [10, 8, 6, 4, 2, 0, -2, -4, -6, -8, -10]
    expected = [math.exp(-d / 10) if d >= 0 else -0.5 * math.exp(d / 20) for d in delays]
    assert changes == pytest.approx(expected)


@pytest.mark.long
def test_the_experiment_votes_and_its_evaluation_is_repeatable(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    few = ["data=digits", "model.neurons=20", "model.steps=4", "plastic_epochs=1", "epochs=2", "logger.mode=disabled"]
    summary = run(config("experiment=stdp_mnist", *few, f"run_dir={tmp_path / 'run'}"))
    assert 0.1 < summary["vote_accuracy"] <= 1
    assert (tmp_path / "run/window.png").exists()
    control = ["experiment=stdp_mnist", "optimizer=random_trunk", *few, f"run_dir={tmp_path / 'control'}"]
    assert 0 <= run(config(*control))["vote_accuracy"] < summary["vote_accuracy"]
    assert not (tmp_path / "control/window.png").exists()
    options = {"steps": 4, "spikes": 30, "beta": 0.9, "threshold": 10.0, "adaptation": 0.15}
    model = spiking((1, 28, 28), 10, neurons=20, encoding="poisson", **options).eval()
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(model(x), model(x))
    for name, value in (("encoding", "latent"), ("readout", "x"), ("neurons", 15)):
        given = {"neurons": 20, "encoding": "rate", "readout": "groups", **options, name: value}
        with pytest.raises(ValueError, match=f"model.{name}={value} must be"):
            spiking((1, 28, 28), 10, **given)
