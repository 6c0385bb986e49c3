"""Misuse and rare circumstances that once passed in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt

from ..rules import published

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
        )


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), Y)


class Backprop(bioopt.FeedbackRule):
    """Feedback by a layer's own weights."""

    def feedback(self, synapse: bioopt.Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        return synapse.transpose(synapse.weight, g, x_shape)


class Transposed(Backprop):
    """Feedback of as many numbers as the input has, in another shape."""

    def feedback(self, synapse: bioopt.Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        return super().feedback(synapse, g, x_shape).mT.contiguous()


# -- feedback -------------------------------------------------------------------------------------------------------


def test_feedback_of_another_shape_is_refused() -> None:
    model = network()
    rule = Transposed(model, 0.1)
    with pytest.raises(
        RuntimeError, match=r"feedback of layer '6' has the shape \(8, 12\), but its input .* \(12, 8\)"
    ):
        rule.step(lambda: loss_of(model))


def test_a_relayed_error_has_no_second_derivative() -> None:
    model = network()
    rule = Backprop(model, 0.1)
    with pytest.raises(RuntimeError, match=r"create_graph=True"):
        torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)
    rule.zero_grad()
    loss_of(model).backward()
    rule.step()


@pytest.mark.parametrize("how", ["evaluation mode", "called by F.linear"])
def test_a_layer_that_does_not_fire_does_not_learn(how: str) -> None:
    """Its error would return by its own weights."""

    class Functional(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for i, module in enumerate(self):
                x = F.linear(x, module.weight, module.bias) if i == 2 else module(x)
            return x

    model = Functional(*network()) if how == "called by F.linear" else network()
    if how == "evaluation mode":
        model[2].eval()
    before = copy.deepcopy(model.state_dict())
    rule = Backprop(model, 0.1)
    with pytest.warns(UserWarning, match=r"did not fire and learn nothing: '2'"):
        rule.step(lambda: loss_of(model))
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == {f"{i}.{p}" for i in (0, 4, 6) for p in ("weight", "bias")}


def test_a_weight_shared_by_a_layer_that_fires_and_one_that_does_not_learns() -> None:
    model = network()
    model[4].weight = model[2].weight
    model[4].eval()
    rule = Backprop(model, 0.1)
    before = model[2].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"'4' \(it is in evaluation mode"):
        rule.step(lambda: loss_of(model))
    assert not torch.equal(model[2].weight, before)


def test_a_layer_that_is_unfrozen_later_learns_once_it_is_added() -> None:
    model = network()
    model[2].requires_grad_(False)
    rule = Backprop(model, 0.1)
    model[2].requires_grad_(True)
    before = copy.deepcopy(model[2].state_dict())
    with pytest.warns(
        UserWarning, match=r"'2' \(it was frozen when the optimizer was built: optimizer\.add_param_group"
    ):
        rule.step(lambda: loss_of(model))
    assert all(torch.equal(p, before[name]) for name, p in model[2].state_dict().items())
    assert rule.coverage()["2.weight"].startswith("silent")
    rule.add_param_group({"params": model[2]})
    rule.step(lambda: loss_of(model))
    assert not any(torch.equal(p, before[name]) for name, p in model[2].state_dict().items())


def test_a_bias_over_frozen_weights_learns() -> None:
    model = network()
    model[2].weight.requires_grad_(False)
    before = model[2].bias.detach().clone()
    rule = Backprop(model, 0.1)
    rule.step(lambda: loss_of(model))
    assert not torch.equal(model[2].bias, before)
    assert (rule.coverage()["2.bias"], rule.coverage(model)["2.weight"]) == ("Backprop", "frozen")


# -- in place -------------------------------------------------------------------------------------------------------


def test_an_input_that_is_overwritten_before_its_layer_learns_is_refused() -> None:
    """As an environment's observation is, whose memory holds the next one."""
    model, observation = network(), torch.empty_like(X)
    optimizer = bioopt.RewardHebbian(model, 0.1, sigma=0.1)

    def episode() -> Tensor:
        return sum(F.cross_entropy(model(observation.copy_(X + t)), Y, reduction="none") for t in range(2))

    with pytest.raises(RuntimeError, match=r"shape \(12, 6\) that a layer learns from was changed in place"):
        optimizer.step(episode)


# -- discard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Backprop, bioopt.Hebbian])
def test_discard_drops_gradients_of_the_loss_too(rule: Any) -> None:
    one, other = network(), network()
    optimizers = rule(one, 0.1), rule(other, 0.1)
    loss_of(one, X + 5).backward()
    optimizers[0].discard()
    for model, optimizer in zip((one, other), optimizers, strict=True):
        loss_of(model).backward()
        optimizer.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_discard_drops_an_estimate() -> None:
    model = network()
    optimizer = published.Hebbian(model, 0.1)
    optimizer.estimate(lambda: loss_of(model))
    optimizer.discard()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="no synapse has fired"):
        optimizer.step()


# -- several optimizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["closure", "classic"])
@pytest.mark.parametrize("below", ["SGD", "Backprop", "Hebbian"])
def test_learning_by_gradients_beneath_a_cut_is_refused(below: str, loop: str) -> None:
    model = network()
    lower = {
        "SGD": lambda: torch.optim.SGD(model[:3].parameters(), 0.1),
        "Backprop": lambda: Backprop(model[:3], 0.1),
        "Hebbian": lambda: published.Hebbian(model[:3], 0.1),
    }[below]()
    middle = published.Oja(model[3:5], 0.1, readout=None)
    optimizer = bioopt.Mixed(lower, middle, torch.optim.SGD(model[5:].parameters(), 0.1))
    closure = (lambda: loss_of(model)) if loop == "closure" else None
    if closure is None:
        loss_of(model).backward()
    with pytest.raises(RuntimeError, match=rf"Mixed: {below} trains .* beneath layers of Oja, which let no gradient"):
        optimizer.step(closure)


@pytest.mark.parametrize("above", ["SGD", "Hebbian"])
def test_a_feedback_rule_shares_a_network(above: str) -> None:
    """Over a cut it learns as over a network that is not trained; over a layer of torch, as backpropagation does."""
    model, twin = network(), network()
    if above == "SGD":
        optimizer: Any = bioopt.Mixed(
            Backprop(model[:4], 0.1, centre_inputs=False), torch.optim.SGD(model[4:].parameters(), 0.1)
        )
        reference: Any = torch.optim.SGD(twin.parameters(), 0.1)
    else:
        optimizer = bioopt.Mixed(
            published.Hebbian(model[:4], 0.1, readout=None), Backprop(model[4:], 0.1, centre_inputs=False)
        )
        reference = bioopt.Mixed(
            published.Hebbian(twin[:4], 0.1, readout=None), torch.optim.SGD(twin[4:].parameters(), 0.1)
        )
    for _ in range(2):
        optimizer.step(lambda: loss_of(model))
        reference.zero_grad()
        loss_of(twin).backward()
        reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_missing_backward_pass_is_named_as_such() -> None:
    model = network()
    optimizer = bioopt.Mixed(torch.optim.SGD(model[:4].parameters(), 0.1), Backprop(model[4:], 0.1))
    loss_of(model)
    with pytest.raises(RuntimeError, match=r"call loss\.backward\(\) before step\(\)"):
        optimizer.step()


# -- earlier versions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["statistic", "advance", "others", "follow", "forget", "kept"])
def test_a_rule_for_an_earlier_version_is_refused(method: str) -> None:
    with pytest.raises(TypeError, match=rf"Former defines {method}, .* subclass bioopt\.LocalRule"):
        type("Former", (bioopt.SynapticRule,), {method: lambda self, *args: None})


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (bioopt.WeightPerturbation, {"sigma": 0.1}),
        (bioopt.HillClimbing, {}),
        (bioopt.ForwardGradient, {}),
        (bioopt.SerialPerturbation, {"sigma": 0.1}),
    ],
)
def test_a_state_from_before_rules_had_readouts(rule: Any, options: dict[str, Any]) -> None:
    model, twin = network(), network()
    optimizer, other = rule(model, 0.1, **options), rule(twin, 0.1, **options)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["readout"]
    other.load_state_dict(state)
    optimizer.step(lambda: loss_of(model))
    other.step(lambda: loss_of(twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# -- ranks ----------------------------------------------------------------------------------------------------------


class Alternative(nn.Module):
    """Two layers of one size, of which one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.head(self.layers[which](x).tanh())


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    errors = []
    for build in (
        lambda model: Backprop(model, 0.1, process_group=group),
        lambda model: published.Hebbian(model, 0.1, process_group=group),
        lambda model: bioopt.RewardHebbian(model, 0.1, sigma=0.1, process_group=group),
    ):
        model = Alternative()
        optimizer = build(model)
        try:
            optimizer.step(lambda model=model: F.cross_entropy(model(X, rank), Y))
            errors.append("nothing")
        except RuntimeError as error:
            errors.append(str(error))
        optimizer.discard()
        optimizer.step(lambda model=model: F.cross_entropy(model(X, 1), Y))
    torch.save(errors, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*did not fire")
@pytest.mark.long
def test_ranks_that_run_different_layers_are_refused(tmp_path: Path) -> None:
    """Their sums are of one size, and would be added up."""
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="forkserver")
    for rank in range(2):
        for error in torch.load(tmp_path / f"{rank}.pt"):
            assert "learn from different layers in this step" in error
            assert f"layers.{rank}" in error
