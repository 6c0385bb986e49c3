"""Measurements on Boltzmann machines and spin glasses small enough to enumerate all states."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bioopt.nn import RBM
from experiments import likelihood, models
from experiments.run import run
from experiments.tasks import spin_glass

from ..commands import config
from ..nn.machines import log_z, machine, states
from .test_tasks import interrupted, resumed

TINY = [
    "task.spins=8", "task.samples=2", "task.sweeps=10", "task.temperatures=4", "task.rounds=4", "task.hidden=5",
    "task.epochs=1", "task.replicas=4", "logger.mode=disabled",
]  # fmt: skip


def ladder(*temperatures: float) -> Tensor:
    return torch.tensor(temperatures)


def spins(count: int) -> Tensor:
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=count)))


@pytest.mark.long
def test_annealed_importance_sampling_finds_the_partition_function() -> None:
    rbm = machine(3, 6, 5)
    with torch.no_grad():
        rbm.synapse.weight.mul_(2)
    base = torch.full((6,), 0.4, dtype=torch.float64)
    true = log_z(rbm).item()
    off = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found, error = likelihood.log_partition(rbm, base, torch.linspace(0, 1, 200), 100, generator)
        assert error < 0.1
        off.append((found - true) / error)
    assert abs(sum(off) / 20) < 4 / 20**0.5  # unbiased within its error
    assert 0.5 < (sum(x * x for x in off) / 20) ** 0.5 < 2  # and the error has the right size


def test_annealing_without_steps_between_is_importance_sampling() -> None:
    """One step from the base-rate machine, whose mean has a closed form."""
    rbm, base = machine(1), torch.tensor([0.2, 0.5, 0.6, 0.9], dtype=torch.float64)
    found, _ = likelihood.log_partition(rbm, base, ladder(0.0, 1.0), 50_000, torch.Generator().manual_seed(0))
    p = (base * states(4) + (1 - base) * (1 - states(4))).prod(1)
    weights = (-rbm.free_energy(states(4))).exp() / p
    deviation = ((p * weights.square()).sum() - (p * weights).sum() ** 2).sqrt() / (p * weights).sum()
    assert abs(found - log_z(rbm).item()) < 4 * deviation.item() / 50_000**0.5


def test_a_glass_has_the_energies_and_overlaps_of_all_its_states() -> None:
    torch.manual_seed(0)
    t = ladder(0.3, 0.6, 1.2)
    glass = spin_glass.SpinGlass(8, 5, t)
    glass.run(200, False)
    glass.run(2000, True)
    s = spins(8)
    q, expected = s @ s.T / 8, []
    for coupling in glass.couplings:
        assert torch.equal(coupling, coupling.T)
        assert coupling.diagonal().abs().sum() == 0
        energy = -sum(coupling[i, j] * s[:, i] * s[:, j] for i in range(8) for j in range(i))
        p = (-energy / t.view(-1, 1)).softmax(1)
        expected.append(((p @ energy) / 8, torch.einsum("ta,tb,ab->t", p, p, q.abs()), energy.min() / 8))
    energies, overlaps, lowest = (torch.stack(of) for of in zip(*expected, strict=True))
    torch.testing.assert_close(glass.mean("energy").float(), energies.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(glass.mean("overlap").float(), overlaps.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(glass.ground_states(), lowest)
    torch.testing.assert_close(glass.mean("histogram").sum(1), torch.ones(3, dtype=torch.float64))


def test_couplings_have_the_variance_of_the_model() -> None:
    torch.manual_seed(0)
    upper = spin_glass.SpinGlass(100, 4, ladder(1.0, 2.0)).couplings[:, *torch.triu_indices(100, 100, 1)]
    assert abs(upper.var().item() * 100 - 1) < 4 * (2 / upper.numel()) ** 0.5


def test_quenched_states_are_stable() -> None:
    torch.manual_seed(0)
    glass = spin_glass.SpinGlass(60, 3, ladder(0.2, 0.4, 0.8, 1.6))
    coldest = (glass.energy() / 60).flatten(1).amin(1)
    assert (glass.ground_states() < coldest - 0.2).all()  # from random states, with no sweep at all
    glass.run(300, False)
    assert -0.85 < glass.ground_states().mean() < -0.60  # -0.717 expected of 60 spins


@pytest.mark.long
def test_a_machine_at_other_temperatures_has_the_distribution_of_all_its_states() -> None:
    torch.manual_seed(0)
    rbm = machine(2).float()
    t = ladder(0.5, 1.0, 2.0)
    samples = spin_glass.MachineSamples(rbm, torch.full((4,), 0.4), 20, t)
    samples.run(100, False)
    samples.run(3000, True)
    v, h = states(4).float(), states(3).float()
    with torch.no_grad():
        energy = -(v @ rbm.weight.T @ h.T) - (v @ rbm.visible_bias).unsqueeze(1) - h @ rbm.synapse.bias
    p = (-energy.flatten() / t.view(-1, 1)).softmax(1)
    torch.testing.assert_close(samples.mean("energy").float(), p @ energy.flatten() / 7, atol=0.01, rtol=0)
    away = torch.nn.functional.normalize(v - 0.4, dim=1)
    visible = p.view(3, 16, 8).sum(2)
    expected = torch.einsum("ta,tb,ab->t", visible, visible, (away @ away.T).square())
    torch.testing.assert_close(samples.mean("squared").float(), expected, atol=0.02, rtol=0)


@pytest.mark.long
def test_the_experiment_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(config("experiment=spin_glass", *TINY, f"run_dir={tmp_path / 'whole'}"))
    assert {p.name for p in (tmp_path / "whole").glob("*.png")} == {"spin_glass.png", "machine_by_temperature.png"}
    assert next(iter(whole["measured"])) == "ground_state_energy"
    assert -1.2 < whole["measured"]["ground_state_energy"] < -0.2
    assert all(math.isfinite(value) for value in whole["measured"].values())
    folder = tmp_path / "part"
    interrupted(monkeypatch, spin_glass.Valleys, 4, "experiment=spin_glass", *TINY, f"run_dir={folder}")
    assert resumed(monkeypatch, folder)["measured"] == whole["measured"]


@pytest.mark.parametrize(
    ("option", "match"),
    [("rounds=3", "task.rounds=3 must be even"), ("coldest=2", "task.coldest=2"), ("spins=1", "task.spins=1 must be"),
     ("replicas=1.5", r"task.replicas=1\.5 must be")],
)  # fmt: skip
def test_bad_options_are_named(option: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        run(config("experiment=spin_glass", *TINY, f"task.{option}", f"run_dir={tmp_path / 'run'}"))


@pytest.mark.long
def test_a_trained_network_is_analysed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "published_temperatures", lambda device: torch.linspace(0, 1, 50))
    overrides = [
        "experiment=rbm_mnist", "data=digits", "model.hidden=[6]", "epochs=2", "plastic_epochs=1",
        "final_analysis.chains=9", "final_analysis.gibbs_steps=3", "logger.mode=disabled",
    ]  # fmt: skip
    run(config(*overrides, f"run_dir={tmp_path / 'run'}"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert -784 * math.log(2) < summary["log_likelihood"] < -100
    assert 0 < summary["log_z_standard_error"] <= summary["log_likelihood_standard_error"]
    assert (tmp_path / "run" / "samples.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="model=rbm"):
        run(config(*overrides, "optimizer=hebbian", "model=mlp", f"run_dir={tmp_path / 'mlp'}"))


def test_published_temperatures() -> None:
    betas = likelihood.published_temperatures(torch.device("cpu"))
    assert len(betas) == 14_501
    assert (betas[0], betas[500], betas[4500], betas[-1]) == (0, 0.5, 0.9, 1)
    assert (betas.diff() > 0).all()


def test_the_network_of_machines() -> None:
    torch.manual_seed(0)
    model = models.rbm((1, 4, 4), 3, hidden=[6, 5])
    x = torch.randn(50, 1, 4, 4)
    assert model(x).shape == (50, 3)
    grey = model[:2].eval()(x)
    torch.testing.assert_close(grey, (x.flatten(1) - x.min()) / (x.max() - x.min()))
    tossed = torch.stack([model[2].train()(grey) for _ in range(400)])
    assert set(tossed.unique().tolist()) == {0.0, 1.0}
    assert ((tossed.mean(0) - grey).abs() < 5 * 0.5 / 400**0.5).all()
    assert torch.equal(model[2].eval()(grey), grey)
    assert [tuple(m.weight.shape) for m in model if isinstance(m, RBM)] == [(6, 16), (5, 6)]
