"""Spikes and time: the rules against slow twins that visit every pair of spikes, encodings, and what is refused."""

from __future__ import annotations

import copy
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.nn import LatencyEncoding, PoissonEncoding, RateEncoding
from experiments.run import run
from experiments.spiking import Competition, assign, spiking, voted, window

from .commands import config
from .rules import SPIKING, Neurons, spiking_cnn


class Scripted(nn.Module):
    """Neurons that emit what they were told, time step by time step, over and over, whatever comes in."""

    def __init__(self, spikes: Tensor) -> None:
        super().__init__()
        self.spikes, self.step = spikes, -1

    def forward(self, u: Tensor) -> Tensor:
        self.step = (self.step + 1) % len(self.spikes)
        return self.spikes[self.step]


def random_spikes(*shape: int, rate: float = 0.4, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).double()


def scripted(layer: nn.Module, spikes: Tensor) -> nn.Sequential:
    with torch.no_grad():
        layer.weight.uniform_(0.2, 0.8)
    return nn.Sequential(layer, Scripted(spikes)).double()


def play(model: nn.Module, x: Tensor) -> None:
    for spikes in x:
        model(spikes)


def pairs(x: Tensor, s: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Strengthening and weakening by every pair of spikes: x steps × samples × inputs, s steps × samples × neurons."""
    steps, samples, inputs = x.shape
    up, down = torch.zeros(2, s.shape[2], inputs, dtype=torch.float64)
    for n, j, post in product(range(samples), range(s.shape[2]), range(steps)):
        if not s[post, n, j]:
            continue
        for i in range(inputs):
            down[j, i] += o["a_plus"] * o["x_target"] / samples
            for pre in range(steps):
                if x[pre, n, i]:
                    delay = (post - pre) * o["dt"]
                    if delay >= 0:
                        up[j, i] += o["a_plus"] * math.exp(-delay / o["tau_plus"]) / samples
                    else:
                        down[j, i] += o["a_minus"] * math.exp(delay / o["tau_minus"]) / samples
    return up, down


def bounded(up: Tensor, down: Tensor, w: Tensor, o: dict[str, Any], lr: float) -> Tensor:
    change = torch.zeros_like(w)
    for k in product(*map(range, w.shape)):
        if o["bounds"] == "soft":
            # Many small steps, each towards the bounds from where the weight has come to, in closed form.
            rate = float(up[k] + down[k])
            there = float(o["w_max"] * up[k] + o["w_min"] * down[k]) / rate if rate else float(w[k])
            change[k] = (there - w[k]) * (1 - math.exp(-lr * rate)) / lr
        else:
            change[k] = up[k] - down[k]
    if o.get("scaling"):
        for j in range(len(w)):
            grown = w[j] + lr * change[j]
            change[j] = (grown * w[j].sum() / grown.sum() - w[j]) / lr
    if o["bounds"] == "hard":
        for k in product(*map(range, w.shape)):
            change[k] = (min(max(w[k] + lr * change[k], o["w_min"]), o["w_max"]) - w[k]) / lr
    return change


WINDOW = {"tau_plus": 15.0, "tau_minus": 30.0, "dt": 2.0, "a_plus": 0.7, "a_minus": 0.5, "w_min": 0.1, "w_max": 0.9}


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
    for rule in SPIKING:
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


def test_neurons_of_snntorch_are_heard() -> None:
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


@pytest.mark.parametrize("bounds", ["soft", "hard", None])
@pytest.mark.parametrize("credit", ["sample", "global"])
def test_reward_equals_eligibilities_kept_for_each_sample(bounds: str | None, credit: str) -> None:
    o = {**WINDOW, "bounds": bounds}
    x, s = random_spikes(6, 3, 5), random_spikes(6, 3, 4, seed=1)
    model = scripted(nn.Linear(5, 4), s)
    optimizer = bioopt.RewardSTDP(model, 0.3, tau_e=10.0, reward_rate=0.25, credit=credit, **o)
    expected_reward = None
    for step in range(3):
        losses = torch.rand(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        reward = -losses if credit == "sample" else -losses.mean().expand(3)
        expected_reward = reward.mean() if expected_reward is None else expected_reward
        w = model[0].weight.detach().clone()
        change = torch.zeros_like(w)
        for n in range(3):
            e = torch.zeros_like(w)
            p, q = torch.zeros(5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
            for t in range(6):
                p = math.exp(-o["dt"] / o["tau_plus"]) * p + x[t, n]
                q = math.exp(-o["dt"] / o["tau_minus"]) * q
                e = math.exp(-o["dt"] / 10.0) * e
                e += o["a_plus"] * torch.outer(s[t, n], p) - o["a_minus"] * torch.outer(q, x[t, n])
                q = q + s[t, n]
            change += (reward[n] - expected_reward) * e / 3
        expected = bounded(change.clamp(min=0), (-change).clamp(min=0), w, o, 0.3)

        def closure(losses=losses) -> Tensor:
            play(model, x)
            return losses

        optimizer.step(closure)
        torch.testing.assert_close(model[0].weight.detach(), w + 0.3 * expected, rtol=0, atol=1e-12)
        expected_reward = expected_reward + 0.25 * (reward.mean() - expected_reward)
    assert optimizer.forward_passes == 1


class Chance(nn.Module):
    """Neurons that fire the more probably, the more they are driven."""

    def forward(self, u: Tensor) -> Tensor:
        return (torch.rand(u.shape) < torch.sigmoid(8 * (u - 1))).to(u.dtype)


@pytest.mark.parametrize("swapped", [False, True])
def test_reward_alone_teaches_which_neuron_answers_which_input(swapped: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 2, bias=False), Chance())
    nn.init.constant_(model[0].weight, 0.5)
    optimizer = bioopt.RewardSTDP(model, 0.02, dt=5.0)

    def answers(n: int = 32) -> tuple[Tensor, Tensor]:
        shown = torch.randint(2, (n,))
        active = F.one_hot(shown, 2).float().repeat_interleave(4, 1)
        total = sum(model((torch.rand(n, 8) < 0.5 * active).float()) for _ in range(8))
        wanted = 1 - shown if swapped else shown
        return total, wanted

    def closure() -> Tensor:
        total, wanted = answers()
        right = total.gather(1, wanted[:, None]) - total.gather(1, 1 - wanted[:, None])
        return -right.squeeze(1)

    for _ in range(300):
        optimizer.step(closure)
    total, wanted = answers(1000)
    chosen = total.argmax(1)
    assert (chosen == wanted).float().mean() > 0.95
    weight = model[0].weight.detach().view(2, 2, 4).mean(2)
    assert (weight[0, 0] > weight[0, 1]) != swapped


def test_activity_that_is_no_spike_is_refused_and_changes_nothing() -> None:
    for rule in SPIKING:
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


def test_neurons_that_are_missing_or_silent_are_told() -> None:
    for rule in SPIKING:
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


def test_encodings() -> None:
    x = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    rate = RateEncoding(20, 0.8)(x)
    assert rate.shape == (20, 1, 4)
    assert rate.sum(0).tolist() == [[0, 4, 8, 16]]
    gaps = rate[:, 0, 1].nonzero().flatten().diff()
    assert set(gaps.tolist()) == {5}  # evenly spaced
    latency = LatencyEncoding(5)(x)
    assert latency.sum(0).tolist() == [[0, 1, 1, 1]]
    assert latency[:, 0].argmax(0).tolist()[1:] == [3, 2, 0]

    poisson = PoissonEncoding(4000, 0.8, seed=3)
    torch.manual_seed(0)
    found = poisson(x)
    assert not torch.equal(found, poisson(x))
    torch.manual_seed(0)
    assert torch.equal(found, poisson(x))
    torch.testing.assert_close(found.mean(0), 0.8 * x, rtol=0, atol=0.03)
    assert set(found.unique().tolist()) == {0, 1}
    poisson.eval()
    state = torch.get_rng_state()
    assert torch.equal(poisson(x), poisson(x))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(poisson(x), PoissonEncoding(4000, 0.8, seed=4).eval()(x))
    assert poisson(x.bfloat16()).dtype == torch.bfloat16

    for encoding in (RateEncoding, LatencyEncoding, PoissonEncoding):
        with pytest.raises(ValueError, match=rf"{encoding.__name__}: steps=0 must be"):
            encoding(0)
        with pytest.raises(ValueError, match=rf"{encoding.__name__}: the input must lie in \[0, 1\], not in \[-1, 2\]"):
            encoding(4)(torch.tensor([-1.0, 2.0]))
        with pytest.raises(ValueError, match="floating-point"):
            encoding(4)(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"rate=1\.5 must be"):
        RateEncoding(4, 1.5)


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
    counts = torch.tensor([[3.0, 0, 1], [2, 0, 1], [0, 4, 1], [1, 1, 1]])
    assigned = assign(counts, torch.tensor([0, 0, 2, 2]), 4)
    assert assigned.tolist() == [0, 2, 0]
    assert voted(torch.tensor([[3.0, 2, 0], [3, 1, 2], [0, 0.1, 0]]), assigned, 4).tolist() == [2, 0, 2]


def test_the_measured_window_is_that_of_the_options() -> None:
    delays, changes = window(
        {"dt": 2.0, "tau_plus": 10.0, "a_minus": 0.5, "bounds": None, "_target_": "bioopt.STDP"}, 5
    )
    assert delays == [10, 8, 6, 4, 2, 0, -2, -4, -6, -8, -10]
    expected = [math.exp(-d / 10) if d >= 0 else -0.5 * math.exp(d / 20) for d in delays]
    assert changes == pytest.approx(expected)


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
