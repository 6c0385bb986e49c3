"""What the audit does to a network does what it claims, and is undone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bioopt
from bioopt.auditing import interventions as act

from ..rules import mlp

LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12)),
    "linear of a sequence": (lambda: nn.Linear(12, 5), (2, 3, 12)),
    "strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 4, 5, groups=2), (1, 4, 7, 7)),
    "circular, dilated": (lambda: nn.Conv2d(4, 3, 3, dilation=2, padding=2, padding_mode="circular"), (1, 4, 4, 4)),
    "one dimension": (lambda: nn.Conv1d(4, 3, 5), (2, 4, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_unseen_part_of_weights_meets_no_activity(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    (synapse,) = bioopt.find_synapses(layer)
    unseen = act.unseen_part(synapse, [x, x])
    before = layer(x)
    with torch.no_grad(), act.weights_moved(layer.weight, -3 * unseen):
        moved, after = layer.weight.clone(), layer(x)
    assert (moved - layer.weight).norm() > 0.3 * layer.weight.norm()
    assert torch.allclose(before, after, atol=1e-12)
    assert torch.equal(layer(x), before)
    with torch.no_grad(), act.weights_moved(layer.weight, -2 * unseen):
        lengths = layer.weight.flatten(1).norm(dim=1)
    assert torch.allclose(lengths, layer.weight.flatten(1).norm(dim=1))  # reversed, no longer than before


def test_nothing_is_unseen_where_activity_has_all_dimensions() -> None:
    layer = nn.Linear(4, 3).double()
    (synapse,) = bioopt.find_synapses(layer)
    assert act.unseen_part(synapse, [torch.randn(3, 4, dtype=torch.float64)]) is not None
    assert act.unseen_part(synapse, [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]) is None


def test_a_moved_neuron_is_seen_by_hooks_before_and_not_by_the_network() -> None:
    model, x = mlp(), torch.randn(3, 6, dtype=torch.float64)
    seen: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda layer, args, u: seen.append(u.detach().clone()))
    (synapse, _) = bioopt.find_synapses(model)
    before = model(x)
    with act.neuron_moved(synapse, 2):
        assert torch.allclose(model(x), before, atol=1e-12)
    one, two = seen
    assert (one != two).any(0).tolist() == [False, False, True, False, False]
    handle.remove()
    assert not model[0]._forward_hooks


def test_a_changed_signal_is_that_of_one_layer() -> None:
    """What feedback sends below stays; backpropagation's error is that of the changed signal."""
    model, x = mlp(sizes=(6, 5, 4, 3)), torch.randn(3, 6, dtype=torch.float64)
    synapses = bioopt.find_synapses(model)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [s.weight.grad.clone() for s in synapses]

    for rule, ratios in ((None, [2, 2, 1]), (bioopt.FeedbackAlignment, [1, 2, 1])):
        optimizer = rule and rule(model)
        before = gradients()
        with act.signal_changed(synapses[1]):
            after = gradients()
        assert all(torch.allclose(b, r * a) for a, b, r in zip(before, after, ratios, strict=True)), rule
        if optimizer:
            optimizer.close()


def test_losses_keep_their_gradient() -> None:
    losses = torch.randn(4, requires_grad=True)
    for change in (act.reversed_loss, act.permuted_loss):
        (gradient,) = torch.autograd.grad(change(losses).sum(), losses)
        assert torch.equal(gradient, torch.ones(4))
    assert torch.allclose(act.reversed_loss(losses), -2 * losses)
    assert torch.allclose(act.permuted_loss(losses), losses.roll(1))
    assert act.reversed_loss(0.5) == -1
    assert act.permuted_loss(0.5) == 0.5


def test_an_error_is_changed_and_outputs_are_not() -> None:
    model, x = mlp(), torch.randn(2, 6, dtype=torch.float64)
    before = model(x)
    with act.error_changed(model):
        after = model(x)
    assert torch.equal(before, after)
    (plain,), (changed,) = (torch.autograd.grad(u.sum(), model[2].bias) for u in (before, after))
    assert torch.equal(plain, torch.full_like(plain, 2))
    assert not torch.allclose(changed, plain)


def test_a_trace_notes_what_ran_and_where_errors_went() -> None:
    model, x = mlp(), torch.randn(2, 6, dtype=torch.float64)
    synapses, trace = bioopt.find_synapses(model), act.Trace()
    with act.tracing(synapses, trace):
        model(x).sum().backward()
        model[0].forward(x)  # past the hooks
    assert list(trace.runs.values()) == [2, 1]
    assert [len(crossed) for crossed in trace.crossed.values()] == [2]
    assert "forward" not in vars(model[0])
    assert trace.differs(trace) == 0
