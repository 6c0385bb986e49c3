"""Record, cut, inject: at the user's own layers, whatever stands around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioopt
from bioopt import find_synapses
from bioopt.core.acts import isolate

from ..rules import ANY_GRAPH, CASES, ORDINARY, Case, give_target, hooks, mlp, published, same, weights


def test_backprop_reassembled_from_cut_layers_equals_autograd() -> None:
    """Record each local graph, cut all, and chain the local products by hand."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
    ).double()
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(4, (5,))
    F.cross_entropy(model(x), y).backward()
    wanted = [p.grad.clone() for p in model.parameters()]

    recorder, records = bioopt.Recorder(), []
    for synapse in find_synapses(model):
        recorder.watch(synapse)

    def leave(firing: bioopt.Firing, u: Tensor) -> Tensor:
        records.append((firing.synapse, u))
        return u.detach()

    recorder.act(isolate, leave)
    out = model(x)
    assert not out.requires_grad
    out.requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(out, y), out)
    (linear, u2), (conv, u1) = reversed(records)
    hidden = u1.detach().requires_grad_()
    (delta,) = torch.autograd.grad(model[2](model[1](hidden)) @ linear.weight.T, hidden, error)
    got = [*torch.autograd.grad(u1, conv.parameters(), delta), *torch.autograd.grad(u2, linear.parameters(), error)]
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    recorder.close()
    assert hooks(model) == 0


@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_in_place_activations_change_nothing(case: Case) -> None:
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(inplace), nn.Linear(5, 5), nn.Hardtanh(-0.3, 0.3, inplace), nn.Linear(5, 4)
        )
        optimizer = case.make(model)
        x, y = torch.randn(8, 6), torch.randint(4, (8,))
        for _ in range(3):
            give_target(optimizer, y)
            optimizer.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
        results.append(weights(model))
    assert same(*results)


@pytest.mark.parametrize("case", ANY_GRAPH, ids=str)
def test_residual_and_shared_layers(case: Case) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + F.relu(self.mix(x))
            x = x + F.relu_(self.mix(input=x))
            return self.head(x)

    torch.manual_seed(0)
    model = Net()
    optimizer = case.make(model, **({"coordinates": 50} if case.rule is bioopt.SerialPerturbation else {}))
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    before = weights(model)
    give_target(optimizer, y)
    optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert not torch.equal(before[0], model.mix.weight)
    assert not torch.equal(before[2], model.head.weight)


def test_inference_mode_is_refused_in_training_only() -> None:
    model = mlp()
    optimizer = published.Hebbian(model, 0.1, readout=None)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"layer '0'.*inference_mode.*torch\.no_grad\(\).*model\.eval\(\)"):
            model(x)
        model.eval()
        model(x)
    model.train()
    with torch.no_grad():
        assert not model(x).requires_grad
    optimizer.step()


def after_two_steps(forward: Callable[[nn.Sequential, Tensor], Tensor]) -> list[Tensor]:
    """The weights of a network after two steps, whose outputs are computed by ``forward(model, x)``."""
    model = mlp(sizes=(6, 5, 5, 4))
    optimizer = published.Hebbian(model, 0.1)
    x, y = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    for _ in range(2):
        F.cross_entropy(forward(model, x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing_counts_an_event_once(reentrant: bool) -> None:
    plain = after_two_steps(lambda model, x: model(x))
    assert same(plain, after_two_steps(lambda model, x: model[4](checkpoint(model[:4], x, use_reentrant=reentrant))))


def test_activation_checkpointing_with_the_readout_inside() -> None:
    plain = after_two_steps(lambda model, x: model(x))
    assert same(plain, after_two_steps(lambda model, x: checkpoint(model, x, use_reentrant=False)))


def test_a_layer_that_raises_leaves_everything_as_it_was() -> None:
    model = mlp()
    optimizer = published.Hebbian(model, 0.1, readout=None)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(RuntimeError, match="shape"):
                model(torch.randn(3, 7, dtype=torch.float64))
            assert torch.is_grad_enabled() == grad
    count = hooks(model)
    model(torch.randn(3, 6, dtype=torch.float64))
    optimizer.step()
    assert hooks(model) == count


def test_no_graph_and_no_activity_outlives_the_step() -> None:
    import gc
    import weakref

    kept = []
    for case in CASES:
        model = case.mlp()
        optimizer = case.make(model)
        seen = []
        model[1].register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(
                (weakref.ref(args[0]), weakref.ref(out[0] if isinstance(out, tuple) else out))
            )
        )
        x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,))
        give_target(optimizer, y)
        loss = optimizer.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
        assert loss.grad_fn is None
        kept.append((case, model, optimizer, loss, seen))
    gc.collect()  # once, for its time: models and optimizers are still there
    for case, *_, seen in kept:
        assert all(ref() is None for pair in seen for ref in pair), case


def test_two_rules_at_one_layer_are_refused_until_one_is_closed() -> None:
    model, x, y = mlp(), torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,))
    first, second = published.Hebbian(model, lr=0.1), published.Hebbian(model, lr=0.1)
    with pytest.raises(RuntimeError, match=r"layer '0' is watched by two rules at once: close\(\)"):
        model(x)
    model.eval()
    model(x)  # nothing learns
    model.train()
    first.close()
    F.cross_entropy(model(x), y).backward()
    second.step()
