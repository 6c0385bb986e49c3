"""Boltzmann machines and contrastive divergence, against machines small enough to write out state by state."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.noise import NoiseSource

from ..nn.machines import HIDDEN, VISIBLE, data, exact_gradient, exact_samples, log_likelihood, machine


def update(optimizer: torch.optim.Optimizer, rbm: bioopt.nn.RBM, v: Tensor) -> dict[str, Tensor]:
    rbm(v)
    optimizer.estimate()
    return {name: -p.grad for name, p in rbm.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum((one[name] - other[name]).square().sum().item() for name in one) ** 0.5


# -- the rule ---------------------------------------------------------------------------------------------------


def test_the_update_from_exact_samples_is_the_gradient_up_to_sampling_error() -> None:
    """Persistent chains that start from exact samples stay exact samples; the error falls as their number's root."""
    rbm, v = machine(), data()
    true = exact_gradient(rbm, v)
    errors = []
    for chains in (400, 40_000):
        distances = []
        for seed in range(6):
            optimizer = bioopt.ContrastiveDivergence(rbm, lr=0.1, persistent=True, chains=chains, seed=seed)
            optimizer._own_state["chains"] = {0: exact_samples(rbm, chains, seed)}
            distances.append(distance(update(optimizer, rbm, v), true))
            optimizer.close()
        errors.append(sum(distances) / len(distances))
    assert errors[0] < (VISIBLE * HIDDEN + VISIBLE + HIDDEN) ** 0.5 * 0.5 / 400**0.5  # no entry varies by more than 1/2
    assert 6 < errors[0] / errors[1] < 16  # 10 expected


def test_long_chains_give_the_gradient_and_short_ones_do_not() -> None:
    rbm = machine()
    with torch.no_grad():
        rbm.synapse.weight.mul_(3)  # so that short chains have not forgotten the data
    v = data(20_000)
    true = exact_gradient(rbm, v)
    short, long = (
        distance(update(bioopt.ContrastiveDivergence(rbm, lr=0.1, steps=steps), rbm, v), true) for steps in (1, 100)
    )
    persistent = bioopt.ContrastiveDivergence(rbm, lr=0.1, steps=100, persistent=True, chains=20_000)
    bound = (VISIBLE * HIDDEN + VISIBLE + HIDDEN) ** 0.5 * 0.5 / len(v) ** 0.5  # no entry varies by more than 1/2
    assert long < bound
    assert distance(update(persistent, rbm, v), true) < bound
    assert short > 10 * bound


@pytest.mark.parametrize("steps", [1, 3])
def test_contrastive_divergence_is_its_slow_twin(steps: int) -> None:
    """The published algorithm, a unit at a time, from the same random numbers."""
    rbm, v = machine(), data(7)
    v[0] = torch.tensor([0.2, 0.9, 0.5, 0.0])  # probabilities are data as well
    optimizer = bioopt.ContrastiveDivergence(rbm, lr=0.1, steps=steps, seed=5)
    found = update(optimizer, rbm, v)

    generator = NoiseSource().stream(v.device, 5, 0, 0, 0, 0)  # seed, step, synapse, rank, firing
    weight, b, c = (p.detach() for p in (rbm.synapse.weight, rbm.visible_bias, rbm.synapse.bias))

    def on(u: Tensor) -> float:
        return 1 / (1 + float(torch.exp(-u)))

    def hidden(state: Tensor) -> Tensor:
        p = [[on(c[j] + sum(weight[j, i] * s[i] for i in range(VISIBLE))) for j in range(HIDDEN)] for s in state]
        return torch.tensor(p, dtype=torch.float64)

    def visible(state: Tensor) -> Tensor:
        p = [[on(b[i] + sum(weight[j, i] * s[j] for j in range(HIDDEN))) for i in range(VISIBLE)] for s in state]
        return torch.tensor(p, dtype=torch.float64)

    def drawn(p: Tensor) -> Tensor:
        return (torch.rand(p.shape, generator=generator, dtype=torch.float64) < p).double()

    sample = v
    for _ in range(steps):
        sample = drawn(visible(drawn(hidden(sample))))
    expected = {name: torch.zeros_like(p) for name, p in rbm.named_parameters()}
    for sign, state in ((1, v), (-1, sample)):
        for one, h in zip(state, hidden(state), strict=True):
            for j in range(HIDDEN):
                expected["synapse.bias"][j] += sign * h[j] / len(v)
                for i in range(VISIBLE):
                    expected["synapse.weight"][j, i] += sign * h[j] * one[i] / len(v)
            expected["visible_bias"] += sign * one / len(v)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_learning_raises_the_exact_likelihood() -> None:
    v = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64).repeat(20, 1)
    for options in ({}, {"persistent": True}, {"steps": 5, "momentum": 0.5}):
        rbm = machine(2)
        optimizer = bioopt.ContrastiveDivergence(rbm, lr=0.2, **options)
        before = log_likelihood(rbm, v).mean().item()
        for _ in range(400):
            rbm(v)
            optimizer.step()
        after = log_likelihood(rbm, v).mean().item()
        assert before < -3
        assert after > -1.2  # two patterns, as likely as each other, would have -0.69


def test_persistent_chains_go_on_and_are_state() -> None:
    rbm, v = machine(), data(30)
    optimizer = bioopt.ContrastiveDivergence(rbm, lr=0.05, persistent=True, chains=7, seed=3)
    seen = []
    for _ in range(3):
        rbm(v)
        rbm(v)  # counts as more data, not as more steps of the chains
        optimizer.step()
        seen.append(optimizer._own_state["chains"][0])
    assert all(chains.shape == (7, VISIBLE) for chains in seen)
    assert not torch.equal(seen[0], seen[1])
    file = io.BytesIO()
    torch.save({"model": rbm.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved, twin = torch.load(file, weights_only=True), machine(9)
    twin.load_state_dict(saved["model"])
    other = bioopt.ContrastiveDivergence(twin, lr=0.05, persistent=True, chains=7)
    other.load_state_dict(saved["optimizer"])
    for model, rule in ((rbm, optimizer), (twin, other)):
        for _ in range(3):
            model(v)
            rule.step()
    assert all(torch.equal(p, q) for p, q in zip(rbm.parameters(), twin.parameters(), strict=True))
    assert torch.equal(optimizer._own_state["chains"][0], other._own_state["chains"][0])


def test_micro_batches_add_up_to_their_mean() -> None:
    rbm, v = machine(), data(30)

    def found(*batches: Tensor) -> dict[str, Tensor]:
        optimizer = bioopt.ContrastiveDivergence(rbm, lr=0.1, persistent=True, seed=1)
        for batch in batches[:-1]:
            rbm(batch)
        change = update(optimizer, rbm, batches[-1])
        optimizer.close()
        return change

    whole = found(v)
    for batches in ((v[:10], v[10:]), (v.view(5, 6, VISIBLE),), (v[0], v[1:])):
        assert distance(found(*batches), whole) < 1e-12


def test_a_deep_belief_net_learns_machine_by_machine() -> None:
    """The upper one from the output of the lower one, as if it stood alone."""
    lower, upper, v = machine(0), machine(1, HIDDEN, 2), data()
    model = nn.Sequential(lower, upper)
    optimizer = bioopt.ContrastiveDivergence(model, lr=0.1, persistent=True)
    model(v)
    optimizer.estimate()
    for index, (layer, seen) in enumerate(((lower, v), (upper, lower(v).detach()))):
        chains = optimizer._own_state["chains"][index]
        data_term, model_term = (layer.hidden_given(x).T @ x / len(x) for x in (seen, chains))
        torch.testing.assert_close(-layer.weight.grad, data_term - model_term)
        torch.testing.assert_close(-layer.visible_bias.grad, seen.mean(0) - chains.mean(0))
    assert set(optimizer.coverage().values()) == {"ContrastiveDivergence"}


def test_a_readout_learns_from_its_loss_beside_it() -> None:
    def built() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(bioopt.nn.RBM(6, 5), nn.Linear(5, 3))

    x, y = torch.rand(12, 6), torch.arange(12) % 3
    model = built()
    optimizer = bioopt.Mixed(
        bioopt.ContrastiveDivergence(model[0], lr=0.1), torch.optim.SGD(model[1].parameters(), lr=0.5)
    )
    other = built()
    inherited = bioopt.ContrastiveDivergence(other, lr=0.1, readout="delta", readout_lr=0.5)
    first = None
    for _ in range(30):
        loss = optimizer.step(lambda: F.cross_entropy(model(x), y))
        inherited.step(lambda: F.cross_entropy(other(x), y))
        first = loss if first is None else first
    assert optimizer.forward_passes == 1
    assert loss < first
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_locality() -> None:
    """A machine learns alike whatever stands above it, whatever the labels and the loss."""
    changes = []
    for variant in range(3):
        torch.manual_seed(0)
        model = nn.Sequential(bioopt.nn.RBM(6, 5), bioopt.nn.RBM(5, 4), nn.Linear(4, 3))
        if variant:
            nn.init.normal_(model[1].weight)
            nn.init.normal_(model[2].weight)
        optimizer = bioopt.ContrastiveDivergence(model, 0.1, readout="delta")
        x, y = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)), torch.full((8,), variant)
        optimizer.step(lambda model=model, x=x, y=y, variant=variant: (1 + variant) * F.cross_entropy(model(x), y))
        changes.append([p.detach().clone() for p in model[0].parameters()])
    for change in changes[1:]:
        assert all(torch.equal(p, q) for p, q in zip(changes[0], change, strict=True))


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no bioopt\.nn\.RBM"):
        bioopt.ContrastiveDivergence(nn.Linear(4, 3), lr=0.1)
    with pytest.raises(ValueError, match=r"no bioopt\.nn\.RBM"):
        bioopt.ContrastiveDivergence(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), lr=0.1, readout="delta")
    with pytest.raises(TypeError, match="needs the model, not its parameters"):
        bioopt.ContrastiveDivergence(machine().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'1\.synapse', belongs to an RBM"):
        bioopt.ContrastiveDivergence(nn.Sequential(nn.Linear(4, 4), machine()), lr=0.1, readout="delta")
    for options in ({"persistent": 1}, {"chains": 0}, {"seed": -1}, {"steps": 0}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"ContrastiveDivergence: {name}={value} must be"):
            bioopt.ContrastiveDivergence(machine(), lr=0.1, **options)


def test_frozen_biases_stay() -> None:
    rbm = machine()
    rbm.visible_bias.requires_grad_(False)
    optimizer = bioopt.ContrastiveDivergence(rbm, lr=0.1)
    before = rbm.visible_bias.clone()
    rbm(data())
    optimizer.step()
    assert torch.equal(before, rbm.visible_bias)
    assert optimizer.coverage()["visible_bias"] == "frozen"
    assert optimizer.coverage()["synapse.bias"] == "ContrastiveDivergence"


def test_excluded_biases_stay() -> None:
    for name in ("visible_bias", "synapse.bias"):
        rbm = machine()
        optimizer = bioopt.ContrastiveDivergence(rbm, lr=0.1, exclude=[name])
        before = {n: p.detach().clone() for n, p in rbm.named_parameters()}
        rbm(data())
        optimizer.step()
        assert [n for n, p in rbm.named_parameters() if torch.equal(before[n], p)] == [name]
        assert optimizer.coverage()[name] == "excluded"
