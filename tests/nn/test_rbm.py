"""Restricted Boltzmann machines, against the table of all their states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bioopt

from ..rules import published
from .machines import HIDDEN, VISIBLE, data, energies, log_z, machine, states

# -- the machine ------------------------------------------------------------------------------------------------


def test_probabilities_and_free_energies_are_those_of_the_table_of_all_states() -> None:
    rbm = machine()
    joint = (-energies(rbm)).flatten().softmax(0).view(2**VISIBLE, 2**HIDDEN)
    given_v = joint / joint.sum(1, keepdim=True)
    torch.testing.assert_close(rbm(states(VISIBLE)), given_v @ states(HIDDEN))
    torch.testing.assert_close(rbm.hidden_given(states(VISIBLE)), given_v @ states(HIDDEN))
    torch.testing.assert_close(
        rbm.visible_given(states(HIDDEN)), (joint / joint.sum(0, keepdim=True)).T @ states(VISIBLE)
    )
    torch.testing.assert_close((-rbm.free_energy(states(VISIBLE)) - log_z(rbm)).exp(), joint.sum(1))


def test_gibbs_samples_have_the_distribution_of_the_machine() -> None:
    rbm = machine()
    start = torch.zeros(20_000, VISIBLE, dtype=torch.float64)
    found = rbm.gibbs(start, 100, torch.Generator().manual_seed(0))
    counts = (found.unsqueeze(1) == states(VISIBLE)).all(2).double().mean(0)
    expected = (-energies(rbm)).logsumexp(1).softmax(0)
    error = (expected * (1 - expected) / len(found)).sqrt()
    assert ((counts - expected).abs() < 4 * error).all()
    again = rbm.gibbs(start, 100, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_draws_come_from_the_generator_that_is_given() -> None:
    rbm, state = machine(), torch.get_rng_state()
    rbm.gibbs(data(), 3, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    for sample, units in ((rbm.sample_hidden, VISIBLE), (rbm.sample_visible, HIDDEN)):
        drawn = sample(data(units=units), torch.Generator().manual_seed(3))
        assert torch.equal(drawn, sample(data(units=units), torch.Generator().manual_seed(3)))
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_states_of_any_type_are_taken(dtype: torch.dtype) -> None:
    v, rbm = data(), machine()
    bits = (v > 0.5).to(dtype)
    torch.testing.assert_close(rbm(bits), rbm(bits.double()))
    torch.testing.assert_close(rbm.free_energy(bits), rbm.free_energy(bits.double()))


@pytest.mark.parametrize("use", ["forward", "gibbs", "free_energy"])
def test_input_that_does_not_fit_is_refused(use: str) -> None:
    call = getattr(machine(), use)
    with pytest.raises(ValueError, match=r"shape \(2, 5\) does not fit the 4 visible units.*Flatten"):
        call(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"from -1 to 2 must lie in \[0, 1\]"):
        call(torch.tensor([[-1.0, 0, 0, 2]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"nan must lie in \[0, 1\]"):
        call(torch.full((1, VISIBLE), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="RBM: hidden=0 must be an integer >= 1"):
        bioopt.nn.RBM(4, 0)
    with pytest.raises(ValueError, match=r"RBM: visible=2.5 must be"):
        bioopt.nn.RBM(2.5, 3)  # type: ignore[arg-type]


def test_other_rules_see_an_ordinary_synapse_in_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(bioopt.nn.RBM(6, 5), nn.Linear(5, 3))
    optimizer = published.Hebbian(model, lr=0.1)
    assert optimizer.coverage() == {
        "0.visible_bias": "frozen",
        "0.synapse.weight": "Hebbian",
        "0.synapse.bias": "frozen",
        "1.weight": "Hebbian readout (delta)",
        "1.bias": "Hebbian readout (delta)",
    }
    before = model[0].weight.clone()
    optimizer.step(lambda: F.cross_entropy(model(torch.rand(8, 6)), torch.arange(8) % 3))
    assert not torch.equal(before, model[0].weight)
