"""Gates and attention: slow reference implementations, training by every rule, and errors."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt import find_synapses
from bioopt.core.noise import NoiseSource, fill_normal_
from bioopt.core.rows import rows_now
from bioopt.nn import Attention, Gate

from ..rules import ANY_GRAPH, LOCAL, ONE_PASS, Case, batch, make, per_sample, same, steps, weights

N, SIZE, HIDDEN, CLASSES, PATHWAYS = 8, 6, 5, 4, 3
GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(N, SIZE, generator=GENERATOR, dtype=torch.float64)
Z = torch.randn(N, 2, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(CLASSES, (N,), generator=GENERATOR)


def gate(active: int | None, context: bool = False, seed: int = 0) -> Gate:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pathways = [nn.Sequential(nn.Linear(SIZE, HIDDEN), nn.Tanh()) for _ in range(PATHWAYS)]
        return Gate(nn.Linear(2 if context else SIZE, PATHWAYS), pathways, active=active).double()


def network(active: int | None) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(gate(active), nn.Linear(HIDDEN, CLASSES).double())


def gated(active: int | None = 1, forced: int | None = None) -> nn.Sequential:
    """A model for the `batch` of all rules; ``forced``: the pathway that all samples take."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pathways = [nn.Sequential(nn.Linear(128, 6), nn.ReLU()) for _ in range(4)]
        model = nn.Sequential(nn.Flatten(), Gate(nn.Linear(128, 4), pathways, active=active), nn.Linear(6, 5))
    if forced is not None:
        with torch.no_grad():
            model[1].controller.bias[forced] += 1000
    return model


def attentive() -> nn.Sequential:
    """A model for the `batch` of all rules, with its two channels as positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), Attention(8, 2), nn.Flatten(), nn.Linear(16, 5))


def losses_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y, reduction="none")


def estimate(optimizer: bioopt.LearningRule, model: nn.Module) -> list[Tensor]:
    optimizer.estimate(lambda: losses_of(model))
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_all_close(expected: list[Tensor], actual: list[Tensor]) -> None:
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# -- reference implementations -----------------------------------------------------------------------------------------


def open_gates(scores: Tensor, active: int | None) -> dict[int, Tensor]:
    """The gates of the pathways that one sample takes."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i].item())
    taken = sorted(order[: active or len(order)])
    total = sum(score.exp() for score in scores)
    return {i: scores[i].exp() / total for i in taken}


def slow_gate(module: Gate, x: Tensor, context: Tensor | None = None) -> Tensor:
    rows = []
    for n in range(len(x)):
        scores = module.controller((x if context is None else context)[n])
        gates = open_gates(scores, module.active)
        rows.append(sum(g * module.pathways[i](x[n : n + 1])[0] for i, g in gates.items()))
    return torch.stack(rows)


def slow_attention(module: Attention, x: Tensor, context: Tensor | None = None) -> Tensor:
    z, d = x if context is None else context, module.size // module.heads
    samples = []
    for n in range(len(x)):
        positions = []
        for position in x[n]:
            parts = []
            for h in range(module.heads):
                part = slice(h * d, (h + 1) * d)
                q = module.query(position)[part]
                match = [(q @ module.key(other)[part] / math.sqrt(d)).exp() for other in z[n]]
                parts.append(sum(m / sum(match) * module.value(o)[part] for m, o in zip(match, z[n], strict=True)))
            positions.append(module.out(torch.cat(parts)))
        samples.append(torch.stack(positions))
    return torch.stack(samples)


@pytest.mark.parametrize("active", [None, 1, 2, 3])
@pytest.mark.parametrize("context", [False, True])
def test_a_gate_equals_its_reference(active: int | None, context: bool) -> None:
    module = gate(active, context)
    given = Z if context else None
    actual, expected = module(X, given), slow_gate(module, X, given)
    torch.testing.assert_close(actual, expected)
    grad_output = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = list(module.parameters())
    one, two = (torch.autograd.grad(y, params, grad_output, allow_unused=True) for y in (actual, expected))
    assert_all_close(
        *[[torch.zeros_like(p) if g is None else g for p, g in zip(params, gs, strict=True)] for gs in (one, two)]
    )
    assert module.gates is not None
    assert not module.gates.requires_grad
    for n, row in enumerate(module.gates):
        gates = open_gates(module.controller((Z if context else X)[n]), active)
        torch.testing.assert_close(row, torch.stack([gates.get(i, row.new_zeros(())) for i in range(PATHWAYS)]))


@pytest.mark.parametrize("context", [False, True])
def test_attention_equals_its_reference(context: bool) -> None:
    torch.manual_seed(0)
    module = Attention(6, 3).double()
    x, z = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    given = z if context else None
    actual, expected = module(x, given), slow_attention(module, x, given)
    torch.testing.assert_close(actual, expected)
    grad_output, params = torch.randn_like(x), list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(actual, params, grad_output),
        torch.autograd.grad(expected, params, grad_output),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_pathways_run_only_on_their_samples() -> None:
    module = gate(active=2)
    rows: dict[int, int] = {}
    for i, pathway in enumerate(module.pathways):
        pathway[0].register_forward_hook(lambda layer, args, u, i=i: rows.update({i: len(u)}))
    module(X)
    assert module.gates is not None
    assert [rows[i] for i in range(PATHWAYS)] == (module.gates > 0).sum(0).tolist()
    assert sum(rows.values()) == 2 * N
    with torch.no_grad():
        module.controller.bias[1] -= 1000
    module(X)
    assert rows == {0: N, 1: 0, 2: N}


def test_a_gate_within_a_gate_keeps_track_of_the_samples() -> None:
    inner = gate(active=1, seed=3)
    outer = Gate(nn.Linear(SIZE, 2), [inner, nn.Linear(SIZE, HIDDEN)], active=1).double()
    calls = []
    for synapse in find_synapses(outer):
        synapse.layer.register_forward_hook(lambda layer, args, u: calls.append((args[0], rows_now())))
    outer(X)
    assert len(calls) == 2 + 1 + PATHWAYS
    for x, rows in calls[1:]:
        assert rows.count == N
        assert torch.equal(x, X[rows.index])
        all_rows = rows.among_all(x)
        assert torch.equal(all_rows[rows.index], x)
        assert all_rows.count_nonzero() == x.count_nonzero()
    assert calls[0][1] is None  # the controller of the outer gate sees all samples
    torch.testing.assert_close(outer(X), slow_gate(outer, X))


# -- credit of each sample along its route -----------------------------------------------------------------------------


def one_sample(
    model: nn.Sequential, n: int, noise: list[Tensor]
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor | None]]]:
    """The loss of a sample with this noise on controller, pathways and readout, and the inputs of those layers."""
    module, readout = model
    layer_inputs: dict[int, Tensor] = {0: X[n]}
    gates = open_gates(module.controller(X[n]) + noise[0], module.active)
    y: Any = 0
    for i, g in gates.items():
        layer_inputs[1 + i] = X[n]
        y = y + g * torch.tanh(module.pathways[i][0](X[n]) + noise[1 + i])
    layer_inputs[1 + PATHWAYS] = y
    return F.cross_entropy(readout(y) + noise[-1], Y[n]), layer_inputs


def draw_noise(seed: int, member: int) -> list[Tensor]:
    stream = NoiseSource().stream(torch.device("cpu"), seed, 0, member)
    widths = [PATHWAYS, *[HIDDEN] * PATHWAYS, CLASSES]
    return [fill_normal_(torch.empty(N, width, dtype=torch.float64), stream) for width in widths]


def credit(expected: list[Tensor], layer_inputs: dict[int, Tensor], signals: list[Tensor]) -> None:
    for layer, x in layer_inputs.items():
        expected[2 * layer] += torch.outer(signals[layer], x.detach())
        expected[2 * layer + 1] += signals[layer]


NO_NOISE = [torch.zeros(())] * (PATHWAYS + 2)


@pytest.mark.parametrize("active", [1, 2])
def test_node_perturbation_equals_its_reference_where_routes_change(active: int) -> None:
    model, sigma, samples = network(active), 0.5, 3
    expected = [torch.zeros_like(p) for p in model.parameters()]
    changed = 0
    with torch.no_grad():
        for sample in range(samples):
            xi = draw_noise(2, sample)
            for n in range(N):
                clean, layer_inputs = one_sample(model, n, NO_NOISE)
                noisy, other_inputs = one_sample(model, n, [sigma * each[n] for each in xi])
                changed += layer_inputs.keys() != other_inputs.keys()
                slope = (noisy - clean) / (sigma * N * samples)
                credit(expected, layer_inputs, [slope * each[n] for each in xi])
    assert changed  # noise on the controller has changed routes
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=sigma, relative=False, samples=samples, seed=2)
    assert_all_close(expected, estimate(optimizer, model))


@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("exact", [True, False])
def test_forward_gradient_equals_its_reference(active: int, exact: bool) -> None:
    model, samples = network(active), 2
    options = {"space": "activities", "relative": False, "samples": samples, "difference": 1e-5}
    optimizer = bioopt.ForwardGradient(model, 0.1, seed=4, **options)
    optimizer._by_differences = not exact
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for sample in range(samples):
        xi = draw_noise(4, sample)
        for n in range(N):
            noise = [torch.zeros_like(each[n], requires_grad=True) for each in xi]
            loss, layer_inputs = one_sample(model, n, noise)
            slopes = torch.autograd.grad(loss, noise, allow_unused=True)
            slope = sum((g * each[n]).sum() for g, each in zip(slopes, xi, strict=True) if g is not None)
            credit(expected, layer_inputs, [slope * each[n] / (N * samples) for each in xi])
    actual = estimate(optimizer, model)
    assert optimizer._by_differences != exact
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-9 if exact else 1e-5, atol=1e-12 if exact else 1e-7)


def test_the_mean_forward_gradient_is_the_gradient() -> None:
    model = network(active=2)
    gradient = torch.autograd.grad(losses_of(model).mean(), list(model.parameters()))
    optimizer = bioopt.ForwardGradient(model, 0.1, space="activities", samples=500, distribution="rademacher")
    one, two = (torch.cat([t.flatten() for t in ts]) for ts in (gradient, estimate(optimizer, model)))
    assert F.cosine_similarity(one, two, dim=0) > 0.9
    assert 0.8 < two.norm() / one.norm() < 1.25


def test_reward_hebbian_equals_its_reference() -> None:
    model, sigma = network(active=1), 0.5
    expected = [torch.zeros_like(p) for p in model.parameters()]
    xi = draw_noise(5, 0)
    with torch.no_grad():
        passes = [one_sample(model, n, [sigma * each[n] for each in xi]) for n in range(N)]
        mean = sum(loss for loss, _ in passes) / N
        for n, (loss, layer_inputs) in enumerate(passes):
            credit(expected, layer_inputs, [(loss - mean) / (sigma * N) * each[n] for each in xi])
    assert_all_close(expected, estimate(bioopt.RewardHebbian(model, 0.1, sigma=sigma, relative=False, seed=5), model))


def test_rank_one_perturbation_equals_its_reference() -> None:
    model, sigma, samples = network(active=1), 0.3, 2
    expected = [torch.zeros_like(p) for p in model.parameters()]
    layers = [s.layer for s in find_synapses(model)]
    changed = 0
    for sample in range(samples):
        stream = NoiseSource().stream(torch.device("cpu"), 6, 0, sample)
        members = []
        for layer in layers:
            shapes = [(N, len(layer.weight)), (N, layer.weight.shape[1]), (N, len(layer.weight))]
            members.append([fill_normal_(torch.empty(shape, dtype=torch.float64), stream) for shape in shapes])
        for n in range(N):
            losses, routes = [], []
            for sign in (1, -1):
                other = copy.deepcopy(model)
                for synapse, (a, b, c) in zip(find_synapses(other), members, strict=True):
                    with torch.no_grad():
                        synapse.layer.weight.add_(sign * sigma * torch.outer(a[n], b[n]))
                        synapse.layer.bias.add_(sign * sigma * c[n])
                loss, layer_inputs = one_sample(other, n, NO_NOISE)
                losses.append(loss.item())
                routes.append(set(layer_inputs))
            changed += routes[0] != routes[1]
            slope = (losses[0] - losses[1]) / (2 * sigma * N * samples)
            for layer in routes[0] | routes[1]:
                a, b, c = members[layer]
                expected[2 * layer] += slope * torch.outer(a[n], b[n])
                expected[2 * layer + 1] += slope * c[n]
    assert changed
    optimizer = bioopt.RankOnePerturbation(model, 0.1, sigma=sigma, relative=False, samples=samples, seed=6)
    assert_all_close(expected, estimate(optimizer, model))


class Threshold(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return (u > 0).to(u.dtype)


class Unrolled(nn.Module):
    """A gate that selects pathways at each time step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        controller = nn.Linear(SIZE, 2).requires_grad_(False)
        pathways = [nn.Sequential(nn.Linear(SIZE, HIDDEN), Threshold()) for _ in range(2)]
        self.gate = Gate(controller, pathways, active=1)
        self.readout, self.neurons = nn.Linear(HIDDEN, CLASSES), Threshold()
        self.routes: list[Tensor] = []

    def forward(self, spikes: Tensor) -> Tensor:
        spike_count: Any = 0
        self.routes.clear()
        for x in spikes:
            spikes_in = (self.gate(x) > 0).to(x.dtype)  # without the factor of the gate
            spike_count = spike_count + self.neurons(self.readout(spikes_in))
            assert self.gate.gates is not None
            self.routes.append(self.gate.gates.argmax(1))
        return spike_count


@pytest.mark.parametrize("rule", [bioopt.STDP, bioopt.RewardSTDP])
def test_traces_decay_while_samples_take_other_routes(rule: type) -> None:
    model = Unrolled().double()
    spikes = (torch.rand(4, N, SIZE, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    options = {"readout": None} if rule is bioopt.STDP else {"tau_e": math.inf}
    optimizer = rule(model, 1.0, bounds=None, **options)
    optimizer.estimate(lambda: (model(spikes) - 1).square().mean(1))
    optimizer.close()
    assert any((route != model.routes[0]).any() for route in model.routes)
    losses = (model(spikes) - 1).square().mean(1)
    for i, pathway in enumerate(model.gate.pathways):
        expected = torch.zeros_like(pathway[0].weight)
        for n in range(N):
            p, q = torch.zeros(SIZE).double(), torch.zeros(HIDDEN).double()
            signal = 1 if rule is bioopt.STDP else -(losses[n] - losses.mean())
            for x, route in zip(spikes[:, n], [route[n] for route in model.routes], strict=True):
                here = float(route == i)
                s = here * pathway(x)
                p = math.exp(-1 / 20) * p + here * x
                q = math.exp(-1 / 20) * q
                expected += signal * (torch.outer(s, p) - torch.outer(q, here * x)) / N
                q = q + s
        torch.testing.assert_close(pathway[0].weight.grad, -expected)


# -- every rule --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*too few for an error to reach")
@pytest.mark.parametrize("case", ANY_GRAPH)
@pytest.mark.parametrize("build", [gated, attentive])
def test_every_rule_trains_routing(case: Case, build: Callable[[], nn.Sequential]) -> None:
    model = build()
    optimizer, before = case.make(model), weights(model)
    steps(optimizer, model, 10 if case.regulates else 2)  # homeostasis waits for 16 events, and pathways get few
    assert not same(before, weights(model))
    assert all(p.isfinite().all() for p in model.parameters())
    if case in ONE_PASS:  # all synapses learn in each step
        learned = [s.layer.weight for s in find_synapses(model)]
        names = {id(p): b for p, b in zip(model.parameters(), before, strict=True)}
        assert not any(torch.equal(p, names[id(p)]) for p in learned)


@pytest.mark.parametrize("case", [case for case in LOCAL if case.ordinary])
def test_a_pathway_learns_only_from_its_own_samples(case: Case) -> None:
    x, y = batch(0, 16)
    model = gated()
    optimizer = case.make(model)
    optimizer.estimate(per_sample(optimizer, model, x, y))
    taken = model[1].gates.argmax(1)
    assert len(set(taken.tolist())) > 2
    for i, pathway in enumerate(gated()[1].pathways):
        actual = model[1].pathways[i][0].weight.grad
        if not (taken == i).any():
            assert actual is None
            continue
        alone = nn.Sequential(nn.Flatten(), *pathway, nn.Linear(6, 5))
        other = case.make(alone)
        other.estimate(per_sample(other, alone, x[taken == i], y[taken == i]))
        torch.testing.assert_close(actual, alone[1].weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in LOCAL if case.ordinary])
def test_a_pathway_without_samples_does_not_change(case: Case) -> None:
    model = gated(forced=2)
    optimizer, before = case.make(model, momentum=0.9), weights(model[1].pathways)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizer, model, 2)
    after = weights(model[1].pathways)
    assert [torch.equal(a, b) for a, b in zip(before[::2], after[::2], strict=True)] == [True, True, False, True]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rule", [bioopt.NodePerturbation, bioopt.RankOnePerturbation, bioopt.ForwardGradient])
def test_noise_on_a_pathway_without_samples(rule: type) -> None:
    model = gated(forced=2)
    options = {"decorrelation": 1e-4} if rule is bioopt.NodePerturbation else {}
    options |= {"space": "activities"} if rule is bioopt.ForwardGradient else {}
    optimizer, before = make(rule, model, **options), weights(model[1].pathways)
    steps(optimizer, model, 2)
    after = weights(model[1].pathways)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True] * 4 + [False] * 2 + [True] * 2


def test_a_per_sample_modulator_follows_the_routes() -> None:
    x, y = batch(0, 16)
    model, other = gated(), gated()
    optimizer, plain = make(bioopt.Hebbian, model, decay="none"), make(bioopt.Hebbian, other, decay="none")
    other(x)
    chosen = other[1].gates.argmax(1) == other[1].gates.argmax(1)[0]
    optimizer.modulator = torch.where(chosen, 1.0, 0.0)
    for rule, net in ((optimizer, model), (plain, other)):
        rule.estimate(per_sample(rule, net, x, y))
    for one, two, i in zip(model[1].pathways, other[1].pathways, range(4), strict=True):
        if i == int(other[1].gates.argmax(1)[0]):
            torch.testing.assert_close(one[0].weight.grad, two[0].weight.grad)
        else:
            assert one[0].weight.grad is None or not one[0].weight.grad.any()


def test_credit_needs_samples_first() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(-1, 64)).reshape(len(x), 6)

    model = gated()
    model[1].pathways[1] = Folded()
    optimizer = make(bioopt.NodePerturbation, model)
    with pytest.raises(
        RuntimeError, match=r"layer '1.pathways.1.layer' ran on \d of 10 samples, but .* \(active=None\)"
    ):
        steps(optimizer, model, 1)
    model = gated(active=None)
    model[1].pathways[1] = Folded()
    with pytest.raises(RuntimeError, match=r"'1.pathways.1.layer' gave an output of shape .20, 3. where there are 10"):
        steps(make(bioopt.NodePerturbation, model), model, 1)


def test_batched_passes_run_where_vmap_can() -> None:
    """Noisy passes are batched through attention and a dense gate, and run one by one through a sparse gate."""
    for build in (attentive, lambda: gated(active=None), lambda: gated(active=1)):
        actual = []
        for batched in (False, True):
            model = build()
            optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.01, samples=3, batched=batched)
            if batched and getattr(model[1], "active", None):
                with pytest.warns(
                    UserWarning, match=r"vmap cannot run this closure \(Gate\(active=1\): torch.func.vmap"
                ):
                    steps(optimizer, model, 1)
            else:
                steps(optimizer, model, 1)
                assert optimizer.batched == batched
            actual.append(weights(model))
            copy.deepcopy(model)  # fails if the model still refers to tensors of vmap
        for a, b in zip(*actual, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    model = gated(active=1)  # routes do not depend on the noise
    model[1].controller.requires_grad_(False)
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.01, samples=3, batched=True)
    steps(optimizer, model, 1)
    assert optimizer.batched


@pytest.mark.parametrize("space", ["weights", "activities"])
def test_forward_gradients_are_exact_through_attention(space: str) -> None:
    model = attentive().double()
    x, y = batch(0)
    optimizer = bioopt.ForwardGradient(model, 0.1, space=space, relative=False, credit="global", seed=3)
    optimizer.estimate(lambda: F.cross_entropy(model(x.double()), y))
    assert not optimizer._by_differences
    actual = [p.grad.clone() for p in model.parameters()]
    stream = NoiseSource().stream(torch.device("cpu"), 3, 0, 0)
    if space == "weights":
        gradient = torch.autograd.grad(F.cross_entropy(model(x.double()), y), list(model.parameters()))
        z = [fill_normal_(torch.empty_like(p.detach()), stream) for p in model.parameters()]
        slope = sum((g * d).sum() for g, d in zip(gradient, z, strict=True))
        assert_all_close([slope * d for d in z], actual)
        return
    u, xs = [], []
    hooks = [
        s.layer.register_forward_hook(lambda layer, args, out: (u.append(out), xs.append(args[0]))[:0] or None)
        for s in find_synapses(model)
    ]
    optimizer.close()
    loss = F.cross_entropy(model(x.double()), y)
    slopes = torch.autograd.grad(loss, u)
    xi = [fill_normal_(torch.empty_like(each), stream) for each in u]
    slope = sum((g * d).sum() for g, d in zip(slopes, xi, strict=True))
    expected = []
    for d, layer_inputs in zip(xi, xs, strict=True):
        d, layer_inputs = (t.detach().flatten(0, -2) for t in (d, layer_inputs))
        expected += [slope * d.T @ layer_inputs, slope * d.sum(0)]
    assert_all_close([w.detach() for w in expected], actual)
    for hook in hooks:
        hook.remove()


# -- module behaviour --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gated, attentive, lambda: gated(active=None)])
def test_copies_states_and_compilation(build: Callable[[], nn.Sequential]) -> None:
    model, x = build(), batch(0)[0]
    assert not any("gates" in name for name in model.state_dict())
    y = model(x)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    other = build()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch's compiler
        torch.testing.assert_close(compiled(x), y)
    for equal_model in (copied, pickled, other):
        assert torch.equal(equal_model(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), y, rtol=0.1, atol=0.1)


def test_invalid_arguments_of_a_gate_are_refused() -> None:
    two = [nn.Linear(SIZE, HIDDEN) for _ in range(2)]
    with pytest.raises(ValueError, match=r"Gate: pathways=.* must be at least two modules"):
        Gate(nn.Linear(SIZE, 1), two[:1])
    for active in (0, 3, True, 1.0):
        with pytest.raises(
            ValueError, match=f"Gate: active={active} must be an integer from 1 to 2, the number of pathways"
        ):
            Gate(nn.Linear(SIZE, 2), two, active=active)  # type: ignore[arg-type]
    normed = [two[0], nn.Sequential(nn.Linear(SIZE, HIDDEN), nn.BatchNorm1d(HIDDEN))]
    with pytest.raises(ValueError, match=r"Gate\(active=1\): pathways.1.1 is a BatchNorm1d, which cannot run on"):
        Gate(nn.Linear(SIZE, 2), normed, active=1)
    Gate(nn.Linear(SIZE, 2), normed).double()(X)  # all samples take all pathways
    with pytest.raises(ValueError, match=r"scores of shape \(8, 3\), but there are 8 samples and 2 pathways"):
        Gate(nn.Linear(SIZE, 3), two).double()(X)
    unequal = [nn.Linear(SIZE, HIDDEN), nn.Linear(SIZE, HIDDEN + 1)]
    for active in (None, 1):
        with pytest.raises(
            ValueError, match=r"pathway 0 \(Linear\) returned .*, 5\) .*, pathway 1 \(Linear\) of .*, 6\)"
        ):
            Gate(nn.Linear(SIZE, 2), unequal, active=active).double()(X)


def test_invalid_arguments_of_attention_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads=4 must divide size=6: choose one of \[1, 2, 3, 6\]"):
        Attention(6, 4)
    with pytest.raises(ValueError, match="heads=0 must be an integer >= 1"):
        Attention(6, 0)
    module = Attention(6)
    for x, context in ((torch.zeros(2, 3, 5), None), (torch.zeros(3, 6), None)):
        with pytest.raises(ValueError, match="Attention: input of shape"):
            module(x, context)
    for context in (torch.zeros(2, 3, 5), torch.zeros(3, 3, 6)):
        with pytest.raises(ValueError, match=r"Attention: context of shape .* must be 2 samples × positions × size=6"):
            module(torch.zeros(2, 3, 6), context)
