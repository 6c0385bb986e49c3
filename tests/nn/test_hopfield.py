"""Content-addressable memories against slow reference implementations in plain loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioopt.nn import Hopfield, ModernHopfield, SpikingHopfield

from ..rules import published

PLAIN = {"competition": "none", "decay": "none", "readout": None}


def patterns(count: int, units: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count, units), generator=generator).double() * 2 - 1


def flipped(x: Tensor, fraction: float, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(x.shape, generator=generator) < fraction, -x, x)


def stored(x: Tensor, rule: str = "hebbian", kind: type = Hopfield, **options: object) -> Hopfield:
    memory = kind(x.shape[1], dtype=torch.float64, **options)
    memory.store(x, rule)
    return memory


def hebbian_reference(x: Tensor) -> Tensor:
    n = x.shape[1]
    weight = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if i != j:
                weight[i, j] = sum(p[i] * p[j] for p in x) / n
    return weight


def storkey_reference(x: Tensor) -> Tensor:
    n = x.shape[1]
    weight = torch.zeros(n, n, dtype=torch.float64)
    for p in x:
        before = weight.clone()

        def field(i: int, j: int, before: Tensor = before, p: Tensor = p) -> Tensor:
            return sum((before[i, k] * p[k] for k in range(n) if k not in (i, j)), torch.zeros(()).double())

        for i in range(n):
            for j in range(n):
                if i != j:
                    weight[i, j] += (p[i] * p[j] - p[i] * field(j, i) - field(i, j) * p[j]) / n
    return weight


def energy_reference(weight: Tensor, state: Tensor) -> float:
    return -0.5 * sum((weight[i, j] * state[i] * state[j]).item() for i in range(len(state)) for j in range(len(state)))


@pytest.mark.parametrize("kind", [Hopfield, SpikingHopfield])
def test_hebbian_storage_is_a_step_of_the_optimizer(kind: type) -> None:
    x = patterns(5, 12)
    memory = stored(x, kind=kind)
    torch.testing.assert_close(memory.weight.detach(), hebbian_reference(x), rtol=0, atol=1e-14)
    assert torch.equal(memory.weight.diagonal(), torch.zeros(12, dtype=torch.float64))
    for parts in (x.split(1), x.split([4, 1]), [x]):  # online, in batches of any size, or all at once
        other = kind(12, dtype=torch.float64).train()
        for part in parts:
            optimizer = published.Hebbian(other, len(part) / 12, **PLAIN)
            assert torch.equal(other(part), part)  # clamped
            optimizer.step()
            optimizer.close()
        torch.testing.assert_close(other.weight, memory.weight, rtol=0, atol=1e-14)
    memory.store(patterns(2, 12, seed=3))
    both = torch.cat([x, patterns(2, 12, seed=3)])
    torch.testing.assert_close(memory.weight.detach(), hebbian_reference(both), rtol=0, atol=1e-14)
    memory.reset_parameters()
    assert not memory.weight.any()


def test_storing_affects_neither_other_optimizers_nor_the_global_generator() -> None:
    memory, state = Hopfield(8, dtype=torch.float64), torch.get_rng_state()
    watching = published.Hebbian(memory, 1 / 8, **PLAIN)
    memory.train()
    for rule in ("hebbian", "storkey", "pseudo_inverse"):
        memory.store(patterns(2, 8), rule)
    with pytest.raises(RuntimeError, match="no synapse has fired"):
        watching.step()
    assert memory.training
    assert memory.weight.grad is None
    memory.eval()(patterns(2, 8))
    assert torch.equal(torch.get_rng_state(), state)
    memory.weight.requires_grad_(False)  # excludes it from learning rules, but the memory can still store
    memory.reset_parameters()
    memory.store(patterns(2, 8))
    torch.testing.assert_close(memory.weight, hebbian_reference(patterns(2, 8)), rtol=0, atol=1e-14)


def test_storkey_equals_its_reference_and_adds() -> None:
    x = patterns(4, 9)
    memory = stored(x[:1], "storkey")
    memory.store(x[1:], "storkey")
    torch.testing.assert_close(memory.weight.detach(), storkey_reference(x), rtol=0, atol=1e-14)


def test_the_pseudo_inverse_stores_correlated_patterns_and_hebbian_storage_does_not() -> None:
    x = flipped(patterns(1, 40, seed=5).expand(12, 40), 0.15)  # all patterns share most units
    memory = stored(x, "pseudo_inverse")
    projector = x.T @ torch.linalg.inv(x @ x.T) @ x
    torch.testing.assert_close(memory.weight.detach(), projector - projector.diag().diag(), rtol=0, atol=1e-10)
    assert torch.equal(memory(x), x)
    assert not torch.equal(stored(x)(x), x)
    memory.store(torch.cat([x, x[:3]]), "pseudo_inverse")  # replaces the old ones, also with duplicates
    torch.testing.assert_close(memory.weight.detach(), projector - projector.diag().diag(), rtol=0, atol=1e-10)


def asynchronous_reference(weight: Tensor, cue: Tensor, order: list[int]) -> tuple[list[Tensor], list[float]]:
    """States and energies of a cue after each single update, in plain loops."""
    state, states, energies = cue.clone(), [cue.clone()], [energy_reference(weight, cue)]
    for i in order:
        field = sum((weight[i, j] * state[j]).item() for j in range(len(state)))
        if abs(field) > 1e-12:
            state[i] = math.copysign(1, field)
        states.append(state.clone())
        energies.append(energy_reference(weight, state))
    return states, energies


@pytest.mark.parametrize("rule", ["hebbian", "storkey", "pseudo_inverse"])
def test_asynchronous_updates_equal_their_reference_and_energy_never_rises(rule: str) -> None:
    n = 14
    memory = stored(patterns(4, n), rule, seed=7)
    cues = torch.cat([patterns(5, n, seed=2), patterns(1, n, seed=4) * torch.tensor([1.0, 0.0]).repeat(n // 2)])
    got = memory.recall(cues, every=1)
    updates = len(got.states) - 1
    assert updates % n == 0
    generator = torch.Generator().manual_seed(7)
    order = [i for _ in range(updates // n) for i in torch.randperm(n, generator=generator).tolist()]
    for c, cue in enumerate(cues):
        states, energies = asynchronous_reference(memory.weight.detach(), cue, order)
        assert torch.equal(torch.stack(states), got.states[:, c])
        torch.testing.assert_close(torch.tensor(energies, dtype=torch.float64), got.energies[:, c], rtol=0, atol=1e-12)
    assert (got.energies.diff(dim=0) <= 1e-12).all()
    assert got.energies[-1].sum() < got.energies[0].sum()
    assert got.settled.all()
    assert torch.equal(memory(cues), got.states[-1])
    assert torch.equal(memory.recall(cues).states[-1], got.states[-1])
    assert torch.equal(memory.recall(cues).states, got.states[::n])


@pytest.mark.parametrize("rule", ["hebbian", "storkey", "pseudo_inverse"])
def test_energy_never_rises_in_a_large_memory_beyond_its_capacity(rule: str) -> None:
    memory = stored(patterns(40, 120), rule)
    got = memory.recall(patterns(30, 120, seed=9), every=1)
    assert (got.energies.diff(dim=0) <= 1e-10).all()
    assert len(got.states) > 2 * 120
    assert got.settled.all()


def test_a_unit_without_a_field_keeps_its_state() -> None:
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])  # units 0, 1 and 2, 3 are not coupled
    for asynchronous in (True, False):
        memory = Hopfield(4, asynchronous=asynchronous)
        memory.store(x)
        for cue in ([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]):
            recalled = memory(torch.tensor(cue))
            expected = torch.tensor([cue[0] or cue[1]] * 2 + [cue[2] or cue[3]] * 2)
            assert torch.equal(recalled, expected)
    empty = Hopfield(5)
    cue = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0])
    assert torch.equal(empty(cue), cue)
    # Single precision: rounding must not break ties, where the field is not exactly zero.
    memory = Hopfield(300)
    memory.store(patterns(20, 300))
    exact = stored(patterns(20, 300))
    cues = patterns(200, 300, seed=8)
    assert torch.equal(memory(cues).double(), exact(cues))


def test_synchronous_updates_equal_their_reference_and_may_cycle() -> None:
    memory = stored(patterns(4, 20), asynchronous=False)
    weight, cues = memory.weight.detach(), flipped(patterns(4, 20), 0.2)
    got = memory.recall(cues)
    for c, cue in enumerate(cues):
        state = cue
        for t in range(len(got.states)):
            assert torch.equal(state, got.states[t, c])
            field = [sum((weight[i, j] * state[j]).item() for j in range(20)) for i in range(20)]
            state = torch.tensor(
                [math.copysign(1, h) if abs(h) > 1e-12 else s for h, s in zip(field, state.tolist(), strict=True)]
            ).double()
        assert torch.equal(state, got.states[-1, c]) == bool(got.settled[c])
    pair = stored(torch.ones(1, 2).double(), asynchronous=False)
    cycle = pair.recall(torch.tensor([1.0, -1.0]))
    assert torch.equal(cycle.states, torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]).double())
    assert not cycle.settled
    assert stored(torch.ones(1, 2).double()).recall(torch.tensor([1.0, -1.0])).settled


@pytest.mark.parametrize("kind", [Hopfield, SpikingHopfield])
@pytest.mark.parametrize("rule", ["hebbian", "storkey", "pseudo_inverse"])
def test_a_corrupted_and_a_masked_cue_recall_the_pattern(kind: type, rule: str) -> None:
    x = patterns(8, 200)
    memory = stored(x, rule, kind)
    masked = x.clone()
    masked[:, 100:] = 0
    for cue in (flipped(x, 0.1), masked, x):
        got = memory.recall(cue)
        assert torch.equal(got.states[0], cue)
        assert torch.equal(got.states[-1], x)
        assert got.settled.all()
        assert torch.equal(memory(cue), x)
    assert memory(masked[0].to(torch.int8)).shape == (200,)
    assert torch.equal(memory(masked.view(2, 4, 200)), x.view(2, 4, 200))
    assert memory.recall(masked.view(2, 4, 200)).energies.shape[1:] == (2, 4)


def test_spiking_units_equal_their_reference() -> None:
    x = patterns(2, 10)
    options = {"gain": 3.0, "tau_membrane": 8.0, "tau_synapse": 15.0, "refractory": 2, "cue_duration": 20}
    memory = stored(x, kind=SpikingHopfield, seed=3, duration=77, window=25, **options)
    cues = flipped(x, 0.2)
    cues[0, 2] = 0
    got = memory.recall(cues)
    start = torch.randint(3, (2, 10), generator=torch.Generator().manual_seed(3))
    rate = 1 / (2 + math.ceil(8 * math.log(4 / 3)))
    weight, spikes = memory.weight.detach(), torch.zeros(77, 2, 10, dtype=torch.bool)
    for c in range(2):
        v, r, resting = [0.0] * 10, [0.5] * 10, start[c].tolist()
        for t in range(77):
            fields = [sum(weight[i, j].item() * (2 * r[j] - 1) for j in range(10)) for i in range(10)]
            for i in range(10):
                current = 1 + 3 * fields[i] + (3 * cues[c, i].item() if t < 20 else 0)
                fires = False
                if resting[i] > 0:
                    resting[i], v[i] = resting[i] - 1, 0.0
                else:
                    v[i] = v[i] * math.exp(-1 / 8) + current * (1 - math.exp(-1 / 8))
                    if v[i] >= 1:
                        fires, v[i], resting[i] = True, 0.0, 2
                r[i] = r[i] * math.exp(-1 / 15) + (1 - math.exp(-1 / 15)) / rate * fires
                spikes[t, c, i] = fires
    assert torch.equal(got.spikes, spikes)
    assert spikes.any()
    assert len(got.states) == 3  # the cue, and the last two windows
    for k, (first, last) in enumerate([(27, 52), (52, 77)], 1):
        active = spikes[first:last].sum(0) >= 0.5 * rate * 25
        assert torch.equal(got.states[k], torch.where(active, 1.0, -1.0).double())


def test_spiking_units_sustain_the_pattern_after_the_cue() -> None:
    x = patterns(5, 200)
    memory = stored(x, kind=SpikingHopfield)
    spikes = memory.recall(flipped(x, 0.15)).spikes[-100:].double().mean(0)
    assert spikes[x < 0].max() == 0
    assert spikes[x > 0].min() > 0.5 * memory.rate
    silent = SpikingHopfield(200)(patterns(5, 200))  # without synapses nothing sustains the activity
    assert torch.equal(silent, -torch.ones(5, 200))


def modern_reference(x: Tensor, state: Tensor, beta: float) -> tuple[Tensor, float]:
    similarities = [sum(a * b for a, b in zip(p.tolist(), state.tolist(), strict=True)) for p in x]
    weights = [math.exp(beta * z) for z in similarities]
    new = sum((w / sum(weights) * p for w, p in zip(weights, x, strict=True)), torch.zeros_like(state))
    energy = -math.log(sum(weights)) / beta + 0.5 * (state @ state).item() + math.log(len(x)) / beta
    return new, energy + 0.5 * max((p @ p).item() for p in x)


def test_the_modern_network_equals_its_reference_and_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    cues = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    memory = ModernHopfield(6, capacity=9, beta=0.8, steps=5, tolerance=0, dtype=torch.float64)
    memory.store(x[:5])
    memory.store(x[5:])
    assert memory.stored == 7
    got = memory.recall(cues)
    assert len(got.states) == 6
    for c in range(4):
        for t in range(5):
            new, energy = modern_reference(x, got.states[t, c], 0.8)
            torch.testing.assert_close(got.states[t + 1, c], new, rtol=0, atol=1e-12)
            assert math.isclose(got.energies[t, c].item(), energy, abs_tol=1e-12)
    assert (got.energies.diff(dim=0) <= 1e-12).all()
    assert (got.energies >= 0).all()
    one = ModernHopfield(6, capacity=7, beta=0.8, steps=1, dtype=torch.float64)
    one.store(x)
    cues.requires_grad_()
    attention = F.scaled_dot_product_attention(cues, x, x, scale=0.8)
    torch.testing.assert_close(one(cues), attention, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), cues)[0] for out in (one(cues), attention)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_the_modern_network_stores_many_times_more_patterns_than_units() -> None:
    x = patterns(2000, 64)  # 31 N; the capacity of Hebbian storage is 9
    memory = ModernHopfield(64, capacity=2000, dtype=torch.float64)
    memory.store(x)
    got = memory.recall(flipped(x[:300], 0.1))
    assert (got.states[-1].sign() == x[:300]).all(1).double().mean() > 0.98
    assert got.settled.all()
    assert len(got.states) <= 10
    assert (got.energies.diff(dim=0) <= 1e-10).all()
    blurred = ModernHopfield(64, capacity=2000, beta=1e-4, dtype=torch.float64)  # the mean of all patterns
    blurred.store(x)
    torch.testing.assert_close(blurred(x[:1]), x.mean(0, keepdim=True), rtol=0, atol=1e-2)


def test_memories_are_modules() -> None:
    x = patterns(3, 30)
    modern = ModernHopfield(30, capacity=5)
    modern.store(x)
    for memory, other in (
        (stored(x).float(), Hopfield(30)),
        (stored(x, kind=SpikingHopfield).float(), SpikingHopfield(30)),
        (modern, ModernHopfield(30, capacity=5)),
    ):
        cue = flipped(x, 0.1).float()
        assert not memory.training or isinstance(memory, ModernHopfield)
        other.load_state_dict(memory.state_dict())
        copied = copy.deepcopy(memory)
        assert torch.equal(memory(cue), x.float()) or isinstance(memory, ModernHopfield)
        assert torch.equal(memory(cue), other(cue))
        assert torch.equal(memory(cue), copied(cue))
        copied.reset_parameters()
        assert torch.equal(memory(cue), other(cue))
        assert torch.equal(memory(cue[0]), memory(cue)[0])
        assert memory.double()(cue).dtype == torch.float64


def test_a_memory_at_the_end_of_a_network_stores_its_input() -> None:
    class Binary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, 1.0, -1.0)

    torch.manual_seed(0)
    layer, memory, x = nn.Linear(10, 40), Hopfield(40), torch.randn(3, 10)
    model = nn.Sequential(layer, Binary(), memory).train()
    optimizer = published.Hebbian(memory, 3 / 40, **PLAIN)
    model(x)
    optimizer.step()
    codes = Binary()(layer(x))
    torch.testing.assert_close(memory.weight, hebbian_reference(codes).float())
    assert torch.equal(model.eval()(x), codes)


def test_invalid_options_and_patterns_are_refused() -> None:
    for kind in (Hopfield, SpikingHopfield):
        name, memory = kind.__name__, kind(6)
        for units in (0, -3, 2.5, True, "6"):
            with pytest.raises(ValueError, match=f"{name}: units={units!r} must be an integer >= 1"):
                kind(units)
        with pytest.raises(ValueError, match="seed=-1 must be an integer >= 0"):
            kind(6, seed=-1)
        before = memory.weight.detach().clone()
        for rule in ("hebbian", "storkey", "pseudo_inverse"):
            with pytest.raises(ValueError, match=rf"{name}: a pattern of shape \(2, 5\) does not fit 6 units"):
                memory.store(torch.ones(2, 5), rule)
            with pytest.raises(
                ValueError, match=r"a pattern must have the values -1 and 1, but this one has 0\.5, nan, 0: binarize"
            ):
                memory.store(torch.tensor([[1, 0.5, -1, float("nan"), 0, 7]]), rule)
            with pytest.raises(ValueError, match="no patterns to store"):
                memory.store(torch.ones(0, 6), rule)
        with pytest.raises(ValueError, match="rule='oja' must be one of hebbian, storkey, pseudo_inverse"):
            memory.store(torch.ones(2, 6), "oja")
        with pytest.raises(TypeError, match="a pattern must be a tensor, not list"):
            memory.store([1, 1, 1, 1, 1, 1])
        assert torch.equal(memory.weight, before)
        with pytest.raises(ValueError, match=r"a cue of shape \(2, 1, 28, 28\) does not fit.*Hopfield\(784, ...\)"):
            memory(torch.ones(2, 1, 28, 28))
        with pytest.raises(ValueError, match=r"a cue of shape \(\) does not fit 6 units"):
            memory.recall(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"a cue must have the values -1, 1 and 0 \(unknown\), but this one has 2"):
            memory(torch.full((6,), 2.0))
        with pytest.raises(ValueError, match="a pattern must have the values -1 and 1, but this one has 0"):
            memory.train()(torch.zeros(6))
    with pytest.raises(ValueError, match="sweeps=0 must be"):
        Hopfield(6, sweeps=0)
    with pytest.raises(ValueError, match="every=0 must be"):
        Hopfield(6).recall(torch.ones(6), every=0)
    for option in ({"gain": 0}, {"tau_membrane": -1.0}, {"tau_synapse": 0.0}, {"refractory": -1}, {"window": 0.5}):
        with pytest.raises(ValueError, match=f"SpikingHopfield: {next(iter(option))}="):
            SpikingHopfield(6, **option)
    with pytest.raises(ValueError, match="duration=140 must be an integer >= 150, in ms: cue_duration"):
        SpikingHopfield(6, duration=140)


def test_invalid_options_and_patterns_of_the_modern_network_are_refused() -> None:
    with pytest.raises(ValueError, match="ModernHopfield: capacity=0 must be an integer >= 1"):
        ModernHopfield(6, capacity=0)
    with pytest.raises(ValueError, match="units=0 must be"):
        ModernHopfield(0, capacity=3)
    for option in ({"beta": 0.0}, {"steps": 0}, {"tolerance": -1.0}, {"beta": float("inf")}):
        with pytest.raises(ValueError, match=f"ModernHopfield: {next(iter(option))}="):
            ModernHopfield(6, 3, **option)
    memory = ModernHopfield(6, capacity=3)
    with pytest.raises(RuntimeError, match=r"no pattern is stored: call store\(patterns\)"):
        memory(torch.ones(6))
    memory.store(torch.ones(2, 6))
    with pytest.raises(ValueError, match="2 patterns do not fit into capacity=3, of which 2 are used: set capacity=4"):
        memory.store(torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"a pattern of shape \(1, 5\) does not fit 6 units"):
        memory.store(torch.ones(1, 5))
    with pytest.raises(ValueError, match="a pattern must be finite"):
        memory.store(torch.full((1, 6), float("nan")))
    with pytest.raises(ValueError, match="a cue must be finite"):
        memory(torch.full((1, 6), float("inf")))
    assert memory.stored == 2
