"""What a rule can do as a synapse fires, by throw-away rules against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioopt import Firing, Recorder, Synapse, find_synapses
from bioopt.core.acts import OutputGate, clamp, cut, detached, inject, isolate, relay

X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(inplace=True), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()


class Acts:
    """Enter and leave by these functions, for as long as the object lives."""

    def __init__(
        self, model: nn.Module, enter: Callable[[Synapse, Tensor], Any], leave: Callable[[Firing, Tensor], Tensor]
    ) -> None:
        self.enter, self.leave = enter, leave
        self.recorder = Recorder()
        for synapse in find_synapses(model):
            self.recorder.watch(synapse)
        self.recorder.act(self._enter, self._leave)

    def _enter(self, synapse: Synapse, x: Tensor) -> Any:
        return self.enter(synapse, x)

    def _leave(self, firing: Firing, u: Tensor) -> Tensor:
        return self.leave(firing, u)


def gradients(model: nn.Module, x: Tensor = X) -> list[Tensor | None]:
    model.zero_grad()
    F.cross_entropy(model(x), Y).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_a_relay_with_the_layers_own_weight_is_backpropagation() -> None:
    model, twin = network(), network()
    x, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    acts = Acts(
        model,
        lambda synapse, x: detached(x),
        lambda firing, u: relay(
            firing, u, lambda g, s=firing.synapse, shape=firing.x.shape: s.transpose(s.weight, g, shape)
        ),
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), gradients(twin, other), strict=True))
    assert torch.equal(x.grad, other.grad)
    del acts


def test_a_relay_of_nothing_is_a_cut() -> None:
    model, twin = network(), network()
    acts = Acts(
        model,
        lambda synapse, x: detached(x),
        lambda firing, u: relay(firing, u, lambda g, shape=firing.x.shape: g.new_zeros(shape)),
    )
    found, wanted = gradients(model), gradients(twin)
    assert all(torch.equal(a, b) for a, b in zip(found[-2:], wanted[-2:], strict=True))
    assert not any(g.any() for g in found[:-2] if g is not None)
    del acts


def test_a_cut_leaves_the_graph_of_one_layer() -> None:
    model = network()
    seen: list[tuple[Synapse, Tensor, Tensor]] = []

    def leave(firing: Firing, u: Tensor) -> Tensor:
        seen.append((firing.synapse, firing.x, u))
        return cut(firing, u, acts.recorder.reach)

    acts = Acts(model, isolate, leave)
    with torch.no_grad():  # a local product needs a graph here as well
        model(X)
    loss = F.cross_entropy(model(X), Y)
    loss.backward()  # ends at the cuts
    assert all(p.grad is None for p in (model[0].weight, model[3].weight, model[5].weight))
    for synapse, x, u in seen:
        (product,) = torch.autograd.grad(u, synapse.weight, torch.ones_like(u))
        torch.testing.assert_close(product, torch.ones_like(u).T @ x.detach())


def test_injected_noise_is_handed_on() -> None:
    model, twin = network(), network()
    noise = {}

    def leave(firing: Firing, u: Tensor) -> Tensor:
        noise[firing.synapse.name] = torch.randn_like(u)
        return cut(firing, inject(u, noise[firing.synapse.name], 0.1), acts.recorder.reach)

    acts = Acts(model, isolate, leave)
    found = model(X)
    for name in ("0", "3", "5"):
        twin[int(name)].register_forward_hook(lambda m, args, out, name=name: out + 0.1 * noise[name])
    torch.testing.assert_close(found, twin(X), rtol=0, atol=1e-12)


def test_a_clamped_state_is_a_leaf_under_an_activation_in_place() -> None:
    model = network()
    states: dict[str, Tensor] = {}

    def leave(firing: Firing, u: Tensor) -> Tensor:
        states[firing.synapse.name] = u.detach().requires_grad_()
        return clamp(states[firing.synapse.name])

    acts = Acts(model, lambda synapse, x: x, leave)
    loss = F.cross_entropy(model(X), Y)
    kept = {name: state.detach().clone() for name, state in states.items()}
    loss.backward()
    assert torch.equal(states["0"], kept["0"])  # the ReLU has changed a clone
    wanted = (states["5"].softmax(1) - F.one_hot(Y, 4)) / len(Y)
    torch.testing.assert_close(states["5"].grad, wanted.detach())
    assert states["3"].grad is None  # gradients end at the state above
    assert model[5].weight.grad is None
    del acts


@pytest.mark.parametrize("twice", [False, True])
def test_the_output_gate_leaves_the_error_and_frees_nothing(twice: bool) -> None:
    model, twin = network(), network()
    gate = OutputGate()
    last = find_synapses(model)[-1].layer
    acts = Acts(model, lambda synapse, x: x, lambda firing, u: gate(u) if firing.synapse.layer is last else u)
    with pytest.raises(RuntimeError, match="the loss was not sent backward, or does not depend on the outputs"):
        gate.gradients(model.parameters())
    passes = 2 if twice else 1
    for _ in range(passes):
        F.cross_entropy(model(X), Y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert [tuple(leaf.grad.shape) for leaf in gate.leaves] == [(8, 4)] * passes
    found = gate.gradients(model.parameters())
    for g, wanted in zip(found, gradients(twin), strict=True):
        torch.testing.assert_close(g, passes * wanted)
    del acts
