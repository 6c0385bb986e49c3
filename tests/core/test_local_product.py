"""Local rules: what all of them share, whatever their teaching signal."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import bioopt
from bioopt.core.homeostasis import WARM_UP
from scripts import bench_hebbian
from scripts.bench_step import allocated

from ..hebbian.twins import oja_twin
from ..rules import LOCAL, Case, mlp, published


def test_passes_add_up_to_one_batch() -> None:
    """All passes since the last step count, each event alike; a shared layer is two passes."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 6).double(), torch.randn(12, 5, dtype=torch.float64)
    change = oja_twin(layer, x, 0.1)
    before = layer.weight.detach().clone()
    optimizer = published.Oja(layer, 0.1, readout=None)
    layer(x[:3])
    optimizer.zero_grad()
    with torch.no_grad():
        layer(x[3:])
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before + 0.1 * change, rtol=0, atol=1e-12)


def test_one_weight_in_two_layers_gathers_from_both() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 5, bias=False).double()
    two.weight = one.weight
    model = nn.Sequential(one, two)
    x = torch.randn(7, 5, dtype=torch.float64)
    change = oja_twin(one, x, 0.1) + oja_twin(two, one(x).detach(), 0.1)
    before = one.weight.detach().clone()
    optimizer = published.Oja(model, 0.1, readout=None)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 1
    model(x)
    optimizer.step()
    torch.testing.assert_close(one.weight.detach(), before + 0.1 * change, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in LOCAL if case.ordinary])
def test_locality(case: Case) -> None:
    """A trunk update does not change when weights downstream, the labels or the loss change."""
    changes = []
    for variant in range(3):
        model = case.mlp(sizes=(6, 5, 5, 4))
        if variant:
            with torch.no_grad():
                model[2].weight.mul_(3)
                model[4].weight.normal_()
        optimizer = case.make(model, 0.1)
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y = torch.full((8,), variant)
        optimizer.step(lambda model=model, x=x, y=y, variant=variant: (1 + variant) * F.cross_entropy(model(x), y))
        changes.append(model[0].weight.detach().clone())
    assert torch.equal(changes[0], changes[1])
    assert torch.equal(changes[0], changes[2])


@pytest.mark.parametrize("case", [case for case in LOCAL if case.ordinary])
def test_an_event_without_a_batch_is_a_batch_of_one(case: Case) -> None:
    """With a bias, whose signal is summed over events, and a running value, where the rule has one."""
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for batched in (False, True):
        model = case.mlp()
        optimizer = case.make(model, 0.1, readout="teacher")
        for event in x:
            optimizer.target = torch.tensor([1.0, 0, 0, 0]).view((1, 4) if batched else (4,))
            model(event.unsqueeze(0) if batched else event)
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def settled(case: Case, model: nn.Module) -> dict[str, Any]:
    """The state of a rule on a network like this one after the steps in which homeostasis settles."""
    twin = copy.deepcopy(model).to_empty(device="cpu")
    for layer in twin:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = case.make(twin, lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(twin(torch.randn(5, 3, 8, 8)), torch.arange(5) % 4).backward()
        optimizer.step()
    return tree_map_only(torch.Tensor, lambda value: value.to("meta"), optimizer.state_dict())


@pytest.mark.parametrize("case", [case for case in LOCAL if case.ordinary])
def test_a_step_that_is_captured_reads_nothing_off_the_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph needs it. Tensors without values stand for the device: to read one raises."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10), nn.Linear(10, 4))
        x, y = torch.empty(5, 3, 8, 8), torch.empty(5, dtype=torch.long)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    optimizer = case.make(model, lr=0.01)
    if case.regulates:  # its first steps count events, and are no part of a graph
        optimizer.load_state_dict(settled(case, model))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step()  # a plain step reads a number: whether all are finite
    for module in (bioopt.core.rule, bioopt.core.errors, bioopt.core.homeostasis):
        monkeypatch.setattr(module, "is_captured", lambda tensors: True)
    if case.rule is bioopt.BCM:  # which keeps thresholds
        with pytest.raises(RuntimeError, match="keeps running state"):
            step()
    else:
        devices = _Devices()
        with devices:
            step()
        assert not devices.crossed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_is_a_plain_one() -> None:
    device = torch.device("cuda")
    x = torch.randn(4, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    one, two = (bench_hebbian.trunk(0.1, device) for _ in range(2))
    replay, step = bench_hebbian.captured(one, x), bench_hebbian.plastic(two, x)
    replay()
    for _ in range(4):  # three before the capture
        step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class _Devices(TorchDispatchMode):
    """Watches for operations that bring something from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if len({t.device for t in tensors}) > 1:
            self.crossed.append(str(func))
        return result


def test_models_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Hebbian\(model, ...\).*not Hebbian\(model\.parameters\(\)"):
        published.Hebbian(mlp().parameters(), 0.1)
    with pytest.raises(TypeError, match="needs the model"):
        published.Hebbian(list(mlp().named_parameters()), 0.1)
    with pytest.raises(ValueError, match="no plastic layer"):
        published.Hebbian(nn.Sequential(nn.Flatten(), nn.ReLU()), 0.1)
    with pytest.raises(ValueError, match="no plastic layer"):
        published.Hebbian(mlp().requires_grad_(False), 0.1)
    attention = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    with pytest.raises(
        ValueError, match=r"layer '1' of type MultiheadAttention.*register_synapse.*Mixed.*requires_grad_"
    ):
        published.Hebbian(attention, 0.1)
    for made_anew in (
        l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
    ):
        with pytest.raises(
            ValueError, match=r"layer '1' of type Linear .*is computed from other parameters.*undo.*Mixed.*freeze"
        ):
            published.Hebbian(nn.Sequential(nn.Linear(4, 4), made_anew), 0.1)
        frozen = nn.Sequential(nn.Linear(4, 4), made_anew.requires_grad_(False))
        assert len(published.Hebbian(frozen, 0.1, readout=None).param_groups[0]["params"]) == 1
    attention[1].requires_grad_(False)
    assert len(published.Hebbian(attention, 0.1, readout=None).param_groups[0]["params"]) > 0
    with pytest.raises(ValueError, match=r"only plastic layer, '0', is the readout.*readout=None"):
        published.Hebbian(attention, 0.1)


def test_a_layer_that_never_fires_is_named() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = published.Hebbian(model, 0.1, readout=None)
    with pytest.warns(UserWarning, match="did not fire and learn nothing: '1'"):
        optimizer.step(lambda: model[0](torch.randn(3, 4)).sum())


def test_a_plastic_step_needs_little_more_memory_than_inference() -> None:
    """At most a layer's activities, as they are and standardised, and one copy of the weights, as each layer fires."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(256, 256, 3, padding=1, bias=False) for _ in range(3)])
    model, x = model.to(memory_format=torch.channels_last), torch.randn(32, 256, 8, 8)
    x = x.to(memory_format=torch.channels_last)

    def peak(step: Callable[[], object]) -> int:
        step()
        for p in model.parameters():
            p.grad = None
        return allocated(step)

    def inference() -> None:
        with torch.no_grad():
            model(x)

    least = peak(inference)
    activities, weights = x.numel() * 4, sum(p.numel() for p in model.parameters()) * 4
    for rule, solver in ((bioopt.SoftHebb, 0), (bioopt.Oja, 0), (bioopt.KrotovHopfield, 0), (bioopt.Hebbian, 1)):
        optimizer = rule(model, 0.01, readout=None)

        def step(optimizer: bioopt.LearningRule = optimizer) -> None:
            inference()
            optimizer.step()

        extra = peak(step) - least
        optimizer.close()
        assert extra <= 2 * activities + weights + solver * weights / 2, (
            rule.__name__,
            extra / activities,
            weights / activities,
        )


def test_a_loss_from_before_a_rule_began_to_act_counts_for_homeostasis() -> None:
    """Its firing has no product, and the next one has."""
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % 4
    optimizer = bioopt.Hebbian(model)
    late = None
    for step in range(WARM_UP + 2):
        optimizer.zero_grad()
        if step == WARM_UP - 1:
            late = F.cross_entropy(model(x), y)
        F.cross_entropy(model(x), y).backward()
        if step == WARM_UP:
            late.backward()
        before = F.normalize(model[0].weight.detach())
        optimizer.step()
        turned = not torch.allclose(F.normalize(model[0].weight), before, rtol=0, atol=1e-12)
        assert turned == (step == WARM_UP + 1), step
