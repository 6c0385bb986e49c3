"""Spikes and time: the rules against slow twins that visit every pair of spikes, encodings, and what is refused."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from ..rules import Neurons, spiking_cnn
from .common import WINDOW, bounded, pairs, play, random_spikes, scripted


@pytest.mark.parametrize(  # each value of an option with each of another
    ("bounds", "x_target", "scaling"),
    [("soft", 0.0, False), ("soft", 0.4, True), ("hard", 0.0, True), ("hard", 0.4, False), (None, 0.0, False),
     (None, 0.4, True)],
)  # fmt: skip
def test_linear_equals_a_twin_that_visits_every_pair(bounds: str | None, x_target: float, scaling: bool) -> None:
    o = {**WINDOW, "bounds": bounds, "x_target": x_target, "scaling": scaling}
    # Two sequences of one batch and, in the second step, a smaller last batch: each starts afresh.
    for rate in (0.4, 0.03):  # and few enough spikes for the sparse product
        x, s = random_spikes(7, 3, 6, rate=0.4), random_spikes(7, 3, 40, rate=rate, seed=1)
        model = scripted(nn.Linear(6, 40), s)
        optimizer = bioopt.STDP(model, 0.3, readout=None, **o)
        for n in (3, 2):
            model[1].spikes = s[:, :n]
            w = model[0].weight.detach().clone()
            expected = bounded(*pairs(x[:, :n], s[:, :n], o), w, o, 0.3)
            play(model, x[:, :n])
            optimizer.step()
            torch.testing.assert_close(model[0].weight.detach(), w + 0.3 * expected, rtol=0, atol=1e-12)


CONVS = [{"stride": 2}, {"padding": 1, "dilation": 2}, {"groups": 2}, {"padding": 1, "padding_mode": "circular"}]


@pytest.mark.parametrize("options", CONVS, ids=str)
@pytest.mark.parametrize("bounds", ["soft", "hard"])
def test_convolutions_equal_the_twin_of_each_position(options: dict[str, Any], bounds: str) -> None:
    """A position of a sample is a neuron of its own that shares its weights; the mean is over all of them."""
    o = {**WINDOW, "bounds": bounds, "x_target": 0.4, "scaling": bounds == "soft"}
    layer = nn.Conv2d(2, 4, 2, **options).double()
    x = random_spikes(5, 2, 2, 4, 4)
    s = random_spikes(5, *layer(x[0]).shape, seed=1)
    model = scripted(layer, s)
    w = layer.weight.detach().clone()
    up, down = torch.zeros_like(w), torch.zeros_like(w)
    pools, count = layer.groups, s[0, 0, 0].numel()
    padded = x
    if layer.padding[0]:
        mode = "circular" if layer.padding_mode == "circular" else "constant"
        padded = F.pad(x.flatten(0, 1), [1] * 4, mode=mode).unflatten(0, x.shape[:2])
    there = F.pad(torch.ones(4, 4), [layer.padding[0]] * 4, value=float(layer.padding_mode == "circular"))
    (kernel, dilation, stride) = (2, layer.dilation[0], layer.stride[0])
    for row, column in product(range(s.shape[3]), range(s.shape[4])):
        rows = [row * stride + dilation * k for k in range(kernel)]
        columns = [column * stride + dilation * k for k in range(kernel)]
        patch = padded[:, :, :, rows][..., columns]
        real = there[rows][:, columns].bool()
        for pool in range(pools):
            neurons, inputs = slice(pool * 4 // pools, (pool + 1) * 4 // pools), slice(pool, pool + 2 // pools)
            found = pairs(patch[:, :, inputs].flatten(2), s[:, :, neurons, row, column], o)
            for total, part in zip((up, down), found, strict=True):
                shaped = part.view(-1, 2 // pools, kernel, kernel) / count
                total[neurons] += torch.where(real, shaped, torch.zeros(())) if layer.padding[0] else shaped
    expected = bounded(up, down, w, o, 0.3)
    optimizer = bioopt.STDP(model, 0.3, readout=None, **o)
    play(model, x)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), w + 0.3 * expected, rtol=0, atol=1e-12)


@pytest.mark.long
def test_the_window_measured_from_the_rule_is_the_classical_one() -> None:
    """One pair of spikes each, from 50 ms before to 50 ms after."""
    length = 51
    for delay in range(-50, 51):
        x, s = torch.zeros(2, length, 1, 1, dtype=torch.float64)
        x[max(0, -delay)], s[max(0, delay)] = 1, 1
        model = scripted(nn.Linear(1, 1), s)
        before = model[0].weight.item()
        optimizer = bioopt.STDP(
            model, 0.5, tau_plus=17.0, tau_minus=34.0, a_plus=0.8, a_minus=0.3, bounds=None, readout=None
        )
        play(model, x)
        optimizer.step()
        expected = 0.8 * math.exp(-delay / 17) if delay >= 0 else -0.3 * math.exp(delay / 34)
        assert (model[0].weight.item() - before) / 0.5 == pytest.approx(expected, abs=1e-12)


def test_soft_bounds_are_followed_within_a_step() -> None:
    """One step of a rate is as many steps of a share of it, in which the weight hardly moves."""
    x, s = random_spikes(6, 4, 5), random_spikes(6, 4, 3, seed=1)
    results = []
    for count in (1, 200):
        torch.manual_seed(0)
        model = scripted(nn.Linear(5, 3), s)
        optimizer = bioopt.STDP(model, 0.1 / count, bounds="soft", readout=None)
        for _ in range(count):
            play(model, x)
            optimizer.step()
        results.append(model[0].weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.long
def test_weights_keep_to_their_bounds() -> None:
    x, s = random_spikes(6, 4, 5), random_spikes(6, 4, 3, seed=1)
    for bounds, lr in (("hard", 50.0), ("soft", 50.0)):
        for a_plus, a_minus in ((1.0, 0.1), (0.1, 1.0)):
            model = scripted(nn.Linear(5, 3), s)
            optimizer = bioopt.STDP(model, lr, a_plus=a_plus, a_minus=a_minus, bounds=bounds, readout=None)
            for _ in range(100):
                play(model, x)
                optimizer.step()
                assert model[0].weight.min() >= -1e-12  # W + η ((w_min - W) / η) rounds
                assert model[0].weight.max() <= 1 + 1e-12
    model = scripted(nn.Linear(5, 3), s)
    optimizer = bioopt.STDP(model, 1.0, a_minus=0.0, bounds=None, readout=None)
    play(model, x)
    optimizer.step()
    assert model[0].weight.max() > 1
    with torch.no_grad():
        model[0].weight.fill_(3.0)  # from beyond, soft bounds bring it back
    optimizer = bioopt.STDP(model, 0.05, readout=None)
    for _ in range(200):
        play(model, x)
        optimizer.step()
    assert model[0].weight.max() < 1


def test_scaling_keeps_the_sum_of_each_neurons_weights() -> None:
    x, s = random_spikes(6, 4, 5), random_spikes(6, 4, 3, seed=1)
    model = scripted(nn.Linear(5, 3), s)
    optimizer = bioopt.STDP(model, 2.0, scaling=True, readout=None)
    before = model[0].weight.detach().clone()
    for _ in range(50):
        play(model, x)
        optimizer.step()
    torch.testing.assert_close(model[0].weight.sum(1), before.sum(1))
    assert (model[0].weight - before).abs().max() > 0.05


def test_traces_are_carried_on_explicitly() -> None:
    """One sequence in two steps, carried on, learns what it does in one; without it, less."""
    x, s = random_spikes(8, 3, 5), random_spikes(8, 3, 4, seed=1)
    results = {}
    for name, cuts, carry in (("one", [8], False), ("carried", [3, 8], True), ("fresh", [3, 8], False)):
        model = scripted(nn.Linear(5, 4), s)
        with torch.no_grad():
            model[0].weight.fill_(0.5)
        optimizer = bioopt.STDP(model, 1.0, bounds=None, carry=carry, readout=None)
        at = 0
        for cut in cuts:
            play(model, x[at:cut])
            optimizer.step()
            at = cut
        results[name] = model[0].weight.detach()
    torch.testing.assert_close(results["one"], results["carried"], rtol=0, atol=1e-12)
    assert (results["fresh"] - results["one"]).abs().max() > 0.01


def test_carried_traces_are_state() -> None:
    x, s = random_spikes(8, 3, 5), random_spikes(8, 3, 4, seed=1)

    def built() -> tuple[nn.Sequential, bioopt.STDP]:
        model = scripted(nn.Linear(5, 4), s)
        return model, bioopt.STDP(model, 0.1, carry=True, readout=None)

    model, optimizer = built()
    play(model, x[:3])
    optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    trace = saved[1]["state"]["rule"]["traces"][0]
    expected = sum(math.exp(-(2 - t) / 20) * x[t] for t in range(3))
    torch.testing.assert_close(trace[0], expected, rtol=0, atol=1e-12)
    play(model, x[3:])
    optimizer.step()

    other, again = built()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    other[1].step = 2
    play(other, x[3:])
    again.step()
    assert torch.equal(model[0].weight, other[0].weight)

    # A batch of another size does not fit; a new sequence may have any.
    other[1].spikes = s[:, :2]
    with pytest.raises(RuntimeError, match=r"shape \(2, 5\).*began with \(3, 5\).*new_sequence\(\)"):
        play(other, x[:, :2])
    again.new_sequence()
    assert "rule" not in again.state_dict()["state"]
    play(other, x[:, :2])
    again.step()
    assert again.state_dict()["state"]["rule"]["traces"][0][0].shape == (2, 5)


def test_spikes_whose_memory_is_used_again() -> None:
    x, s = random_spikes(5, 2, 4), random_spikes(5, 2, 3, seed=1)
    for rule in (bioopt.STDP, bioopt.RewardSTDP):
        results = []
        for again in (False, True):
            model = scripted(nn.Linear(4, 3), s)
            with torch.no_grad():
                model[0].weight.fill_(0.5)
            buffer = torch.zeros(2, 4, dtype=torch.float64)
            losses = torch.tensor([1.0, 0.0])

            def closure(model=model, again=again, buffer=buffer, losses=losses) -> Tensor:
                for spikes in x:
                    model(buffer.copy_(spikes) if again else spikes)
                return losses

            optimizer = rule(model, 0.1, **({"readout": None} if rule is bioopt.STDP else {}))
            optimizer.step(closure)
            results.append(model[0].weight.detach())
        assert torch.equal(*results)
        assert not torch.equal(results[0], torch.full_like(results[0], 0.5))


class Recurrent(nn.Module):
    """Two layers drive the same neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.back, self.lif, self.head = nn.Linear(5, 4), nn.Linear(4, 4), Neurons(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        s, v, total = torch.zeros(len(x[0]), 4), None, torch.zeros(())
        for spikes in x:
            s, v = self.lif(self.fc(spikes) + self.back(s), v)
            s = s.detach()
            total = total + s
        return self.head(total)


def test_layers_may_share_their_neurons_and_neurons_may_be_named() -> None:
    x, y = random_spikes(6, 3, 5).float(), torch.tensor([0, 1, 1])
    changes = []
    for neurons in ({"fc": "lif"}, {"fc": "lif", "back": "lif"}, None):
        torch.manual_seed(0)
        model = Recurrent()
        before = model.fc.weight.detach().clone(), model.back.weight.detach().clone()
        optimizer = bioopt.STDP(model, 0.1, neurons=neurons)
        with pytest.warns(UserWarning, match="did not reach layers 'fc', 'back'.* counts at once"):  # detached
            optimizer.step(lambda model=model: F.cross_entropy(model(x), y))
        changes.append((model.fc.weight - before[0], model.back.weight - before[1]))
        assert changes[-1][0].abs().max() > 0
        assert changes[-1][1].abs().max() > 0
    for other in changes[1:]:
        assert torch.equal(changes[0][0], other[0])
        assert torch.equal(changes[0][1], other[1])
    model = Recurrent()
    optimizer = bioopt.STDP(model, 0.1, neurons={"fc": model.lif})
    assert next(iter(optimizer._recorder.synapses.values())).neurons is model.lif


def test_neurons_of_snntorch_are_found() -> None:
    """Both of their ways: state that is handed on, and state of their own."""
    snntorch = pytest.importorskip("snntorch")
    x = random_spikes(20, 3, 6).float()
    results = []
    for own in (False, True):
        torch.manual_seed(0)
        fc, lif = nn.Linear(6, 4, bias=False), snntorch.Leaky(beta=0.9, init_hidden=own)
        nn.init.uniform_(fc.weight, 0.2, 0.4)
        model = nn.ModuleDict({"fc": fc, "lif": lif})
        optimizer = bioopt.STDP(model, 0.1, readout=None)
        before = fc.weight.detach().clone()
        mem, emitted = lif.reset_mem(), []
        for spikes in x:
            if own:
                s = lif(fc(spikes))
            else:
                s, mem = lif(fc(spikes), mem)
            emitted.append(s.detach())
        optimizer.step()
        s = torch.stack(emitted).double()
        assert 0 < s.sum() < s.numel()
        o = {"tau_plus": 20.0, "tau_minus": 20.0, "dt": 1.0, "a_plus": 1.0, "a_minus": 1.0, "x_target": 0.0}
        o |= {"bounds": "soft", "w_min": 0.0, "w_max": 1.0}
        expected = bounded(*pairs(x.double(), s, o), before.double(), o, 0.1)
        torch.testing.assert_close((fc.weight.detach() - before).double(), 0.1 * expected, rtol=1e-4, atol=1e-5)
        results.append(fc.weight.detach())
    assert torch.equal(*results)


def test_activity_that_is_no_spike_is_refused_and_changes_nothing() -> None:
    for rule in (bioopt.STDP, bioopt.RewardSTDP):
        options = {"readout": None} if rule is bioopt.STDP else {}
        model = nn.Sequential(nn.Linear(4, 3), Neurons())
        optimizer = rule(model, 0.1, **options)
        before = model[0].weight.detach().clone()
        x = torch.full((2, 4), 0.5)
        for bad in (x, -2 * x, x * math.nan):
            with pytest.raises(
                RuntimeError, match=rf"{rule.__name__}: what enters layer '0' is not spikes.*bioopt\.nn"
            ):
                optimizer.step(lambda bad=bad, model=model: model(bad)[0].sum(1))
        optimizer.close()

        class Membrane(nn.Module):
            def forward(self, u: Tensor) -> Tensor:
                return 2 * u

        other = nn.Sequential(model[0], Membrane())
        optimizer = rule(other, 0.1, **options)
        with pytest.raises(RuntimeError, match=rf"{rule.__name__}: what follows layer '0' is not spikes.*values from"):
            optimizer.step(lambda other=other: other(torch.ones(2, 4)).sum(1))
        optimizer.close()
        assert torch.equal(before, model[0].weight)

        class Odd(nn.Module):
            def forward(self, u: Tensor) -> Tensor:
                return torch.ones(1)

        other = nn.Sequential(model[0], Odd())
        optimizer = rule(other, 0.1, **options)
        with pytest.raises(RuntimeError, match=r"the Odd that follows layer '0' must return.*\(2, 3\).*not \(1,\)"):
            optimizer.step(lambda other=other: other(torch.ones(2, 4)).sum())
        optimizer.close()


def test_neurons_that_are_missing_or_silent_are_explained() -> None:
    for rule in (bioopt.STDP, bioopt.RewardSTDP):
        options = {"readout": None} if rule is bioopt.STDP else {}
        with pytest.raises(ValueError, match=rf"{rule.__name__}: layer '0' has no spiking neurons.*snntorch.Leaky"):
            rule(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), 0.1, **options)
        model = nn.Sequential(nn.Linear(4, 3), Neurons())
        with pytest.raises(ValueError, match=r"neurons=\{'fc': \.\.\.\}: the layers are 0"):
            rule(model, 0.1, neurons={"fc": "1"}, **options)
        with pytest.raises(ValueError, match="no module of this name"):
            rule(model, 0.1, neurons={"0": "lif"}, **options)
        with pytest.raises(ValueError, match=r"w_min=2.* must be below w_max=1"):
            rule(model, 0.1, w_min=2.0, **options)
        with pytest.raises(ValueError, match=r"w_max='big' must be a finite number"):
            rule(model, 0.1, w_max="big", **options)
        with pytest.raises(ValueError, match="bounds='firm' must be 'soft', 'hard' or None"):
            rule(model, 0.1, bounds="firm", **options)
        optimizer = rule(model, 0.1, **options)
        before = model[0].weight.detach().clone()

        def closure(model=model) -> Tensor:
            return model[0](torch.ones(2, 4)).sum(1)

        def twice(closure=closure) -> Tensor:
            closure()
            return closure()

        for bad in (closure, twice):
            with pytest.raises(RuntimeError, match="layer '0' has fired, but the neurons"):
                optimizer.step(bad)
            assert torch.equal(before, model[0].weight)
        optimizer.step(lambda model=model: model(torch.ones(2, 4))[0].sum(1))  # and it goes on


def test_memory_does_not_grow_with_the_sequence() -> None:
    import gc

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    model = spiking_cnn()
    optimizer = bioopt.STDP(model, 0.1)
    x = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        model(x)
        before = alive()
        for _ in range(20):
            model(x)
        assert alive() <= before
    optimizer.close()
