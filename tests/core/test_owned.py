"""Modules that belong to the optimizer: a throw-away rule whose layers each learn from a head of their own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import bioopt
from bioopt.core.acts import Isolated, cut, isolate
from bioopt.core.params import synapses_of

from ..distributed import by_distributed_checkpoint
from ..rules import published, same, weights

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


class Heads(bioopt.OnePass):
    """Each layer learns from the loss of a linear readout of its own, which learns with it."""

    named = True  # whether its param groups name their parameters

    def __init__(
        self, params: Any, lr: float, *, lazy: bool = True, seed: int = 0, head_lr: float = 0.2, **options: Any
    ) -> None:
        super().__init__(params, {"lr": lr}, **options)
        self._owned.seed = seed
        generator = torch.Generator().manual_seed(seed)
        heads: dict[str, nn.Module] = {}
        for synapse in self._recorder.synapses.values():
            heads[synapse.name] = nn.LazyLinear(4) if lazy else nn.Linear(len(synapse.weight), 4)
            for p in () if lazy else heads[synapse.name].parameters():
                nn.init.normal_(p, generator=generator)
        self.own(heads, lr=head_lr)
        self._grads: dict[Tensor, Tensor] = {}
        self._recorder.act(self._enter, self._leave)

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        synapses = synapses_of(type(self).__name__, group["params"], self._exclusion)
        found = [named for s in synapses for named in s.named_parameters()]
        return found if self.named else [p for _, p in found], synapses

    def _enter(self, synapse: Any, x: Tensor) -> Isolated:
        return isolate(synapse, x)

    def _leave(self, firing: Any, u: Tensor) -> Tensor:
        with torch.enable_grad():
            synapse = firing.synapse
            loss = F.cross_entropy(self._owned(synapse.name, u.tanh()), self.target)
            own = [*synapse.parameters(), *self._owned.modules[synapse.name.replace(".", "/")].parameters()]
            self._grads.update(zip(own, torch.autograd.grad(loss, own), strict=True))
        return cut(firing, u, self._recorder.reach)

    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        if not self._grads:
            raise RuntimeError(self._none_fired())
        grads, self._grads, self.target = self._grads, {}, None
        return grads, self._next_state()


class Unnamed(Heads):
    named = False


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = nn.Sequential(nn.Linear(6, 5), nn.Tanh())  # whose layer has a dot in its name
        return nn.Sequential(block, nn.Linear(5, 5))


def steps(optimizer: Any, model: nn.Module, count: int = 1) -> None:
    rules = getattr(optimizer, "optimizers", [optimizer])
    for _ in range(count):
        for rule in rules:
            rule.target = Y
        optimizer.step(lambda: model(X).square().mean(1))


def values(optimizer: Any) -> list[Tensor]:
    rule = getattr(optimizer, "optimizers", [optimizer])[0]
    return [p.detach().clone() for p in rule._owned.modules.parameters() if not is_lazy(p)]


lazily = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "ordinary"])


@lazily
@pytest.mark.parametrize("rule", [Heads, Unnamed])
def test_the_group_is_there_from_construction(lazy: bool, rule: type[Heads]) -> None:
    model = network()
    optimizer = rule(model, 0.1, lazy=lazy, momentum=0.9)
    group = optimizer.param_groups[-1]
    names = ["owned.0.0.weight", "owned.0.0.bias", "owned.1.weight", "owned.1.bias"]
    assert group.get("param_names") == (names if rule.named else None)
    assert group["lr"] == 0.2
    assert group["momentum"] == 0.9
    assert len(group["params"]) == 4
    assert all(is_lazy(p) == lazy for p in group["params"])
    before = weights(model)
    steps(optimizer, model, 2)
    assert not any(torch.equal(p, q) for p, q in zip(before, weights(model), strict=True))
    assert [tuple(p.shape) for p in group["params"]] == [(4, 5), (4,), (4, 5), (4,)]
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in group["params"])


@lazily
@pytest.mark.parametrize(
    "schedule",
    [lambda o: LambdaLR(o, lambda step: 1 / (1 + step)), lambda o: OneCycleLR(o, [0.1, 0.4], total_steps=4)],
    ids=["LambdaLR", "OneCycleLR"],
)
def test_schedulers_before_the_first_pass(lazy: bool, schedule) -> None:
    model = network()
    optimizer = Heads(model, 0.1, lazy=lazy, momentum=0.9)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(3):
        steps(optimizer, model)
        scheduler.step()
        rates.append(optimizer.param_groups[-1]["lr"])
        assert [g["lr"] for g in optimizer.param_groups] == scheduler.get_last_lr()
    assert len({*rates, 0.2}) == 4


@lazily
def test_values_are_copies_in_the_state(lazy: bool) -> None:
    model = network()
    optimizer = Heads(model, 0.1, lazy=lazy)
    steps(optimizer, model)
    state = optimizer.state_dict()
    owned = state["state"]["rule"]["owned"]
    assert [*owned] == ["0/0.weight", "0/0.bias", "1.weight", "1.bias"]
    assert all(torch.equal(a, b) for a, b in zip(owned.values(), values(optimizer), strict=True))
    kept = copy.deepcopy(owned)
    steps(optimizer, model)
    assert all(torch.equal(owned[name], kept[name]) for name in owned)
    assert not any(torch.equal(a, b) for a, b in zip(owned.values(), values(optimizer), strict=True))


def resumed(optimizer: Any, model: nn.Module, fresh: Any, other: nn.Module, state: Any) -> None:
    """Both go on alike, from a state that the fresh optimizer loads before its first pass."""
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(state)
    assert same(values(optimizer), values(fresh))
    steps(optimizer, model, 2)
    steps(fresh, other, 2)
    assert same(weights(model), weights(other))
    assert same(values(optimizer), values(fresh))


@lazily
@pytest.mark.parametrize("rule", [Heads, Unnamed])
@pytest.mark.parametrize("descent", [torch.optim.SGD, torch.optim.Adam])
def test_it_goes_on_bit_for_bit_from_a_checkpoint(lazy: bool, descent: type, rule: type[Heads]) -> None:
    options = {"descent": descent} | ({"momentum": 0.9} if descent is torch.optim.SGD else {})
    model, other = network(), network(1)
    optimizer, fresh = rule(model, 0.1, lazy=lazy, **options), rule(other, 0.1, lazy=lazy, seed=7, **options)
    steps(optimizer, model, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    kept = copy.deepcopy(state["state"]["rule"])
    resumed(optimizer, model, fresh, other, state)
    assert str(kept) == str(state["state"]["rule"])  # what was loaded is as it was, and can be loaded again
    fresh.load_state_dict(state)
    assert same(values(fresh), [*kept["owned"].values()])


def test_a_state_before_the_first_pass_leaves_lazy_modules_as_they_are() -> None:
    model, other = network(), network()
    optimizer, fresh = Heads(model, 0.1), Heads(other, 0.1)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(is_lazy(p) for p in fresh.param_groups[-1]["params"])
    steps(optimizer, model)
    steps(fresh, other)
    assert same(values(optimizer), values(fresh))


def test_lazy_values_come_from_the_seed_alone() -> None:
    found = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        model = network()
        optimizer = Heads(model, 0.0, seed=seed, head_lr=0.0)
        steps(optimizer, model)
        assert torch.equal(before, torch.get_rng_state())
        found.append(values(optimizer))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][2])  # nor are two modules alike


@lazily
@pytest.mark.parametrize("way", ["nested", "flat", "saved"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "in Mixed"])
def test_it_goes_on_bit_for_bit_from_a_distributed_checkpoint(lazy: bool, way: str, mixed: bool, tmp_path) -> None:
    models = [network(), network(1)]
    built: list[Any] = []
    for seed, model in enumerate(models):
        if mixed:
            above = torch.optim.SGD(model[1].parameters(), 0.1, momentum=0.9)
            built.append(bioopt.Mixed(Heads(model[0], 0.1, lazy=lazy, seed=seed, momentum=0.9), above))
        else:
            built.append(Heads(model, 0.1, lazy=lazy, seed=seed, momentum=0.9))
    steps(built[0], models[0], 2)
    before = values(built[0])
    by_distributed_checkpoint(models, built, way, tmp_path)
    assert same(before, values(built[0]))
    assert same(*map(values, built))
    for model, optimizer in zip(models, built, strict=True):
        steps(optimizer, model, 2)
    assert same(*map(weights, models))
    assert same(*map(values, built))


@lazily
def test_mixed_carries_them(lazy: bool) -> None:
    models = [network(), network(1)]
    built = [
        bioopt.Mixed(Heads(model[0], 0.1, lazy=lazy, seed=i, momentum=0.9), torch.optim.SGD(model[1].parameters(), 0.1))
        for i, model in enumerate(models)
    ]
    assert len(built[0].param_groups) == 3
    steps(built[0], models[0], 2)
    resumed(built[0], models[0], built[1], models[1], copy.deepcopy(built[0].state_dict()))


@lazily
def test_other_modules_are_refused_and_nothing_is_changed(lazy: bool) -> None:
    model = network()
    optimizer = Heads(model, 0.1, lazy=lazy)
    steps(optimizer, model)
    good = copy.deepcopy(optimizer.state_dict())
    steps(optimizer, model)
    before, found = values(optimizer), str(optimizer.state_dict())
    for change in ("name", "size", "lacking"):
        state = copy.deepcopy(good)
        owned = state["state"]["rule"]["owned"]
        if change == "name":
            owned["other.weight"] = owned["1.weight"]
        elif change == "size":
            owned["1.weight"] = torch.zeros(4, 9)
        else:
            del owned["1.weight"]
        with pytest.raises(ValueError, match=r"Heads: the loaded state has modules of its own other than these \(look"):
            optimizer.load_state_dict(state)
        assert same(before, values(optimizer))
        assert found == str(optimizer.state_dict())
    mixed = bioopt.Mixed(optimizer)
    other = copy.deepcopy(mixed.state_dict())
    del other["optimizers"][0]["state"]["rule"]["owned"]["1.bias"]
    with pytest.raises(ValueError, match="modules of its own"):
        mixed.load_state_dict(other)
    assert found == str(optimizer.state_dict())


def test_mixed_changes_no_member_where_the_modules_of_one_do_not_fit() -> None:
    model = network()
    plain = torch.optim.SGD(model[1].parameters(), 0.1, momentum=0.9)
    mixed = bioopt.Mixed(plain, rule := Heads(model[0], 0.1))
    rule.target = Y
    mixed.step(lambda: model(X).square().mean(1))
    state = copy.deepcopy(mixed.state_dict())
    del state["optimizers"][1]["state"]["rule"]["owned"]["0.bias"]
    state["optimizers"][0]["param_groups"][0]["lr"] = 0.7
    before = str(mixed.state_dict())
    with pytest.raises(ValueError, match="modules of its own"):
        mixed.load_state_dict(state)
    assert before == str(mixed.state_dict())


def test_options_and_names_are_checked_before_anything_is_added() -> None:
    optimizer = Heads(network(), 0.1)
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="Heads: lr=-1 must be"):
        optimizer.own({"more": nn.Linear(2, 2)}, lr=-1)
    with pytest.raises(ValueError, match=r"there is a module of the rule's own named '0\.0' already"):
        optimizer.own({"more": nn.Linear(2, 2), "0.0": nn.Linear(2, 2)})
    assert len(optimizer.param_groups) == groups
    assert "more" not in optimizer._owned.modules
    optimizer.own({"more": nn.Linear(2, 2)})
    assert optimizer.param_groups[-1]["lr"] == 0.1


@lazily
def test_the_model_and_its_copies_know_nothing_of_them(lazy: bool) -> None:
    model = network()
    optimizer = Heads(model, 0.1, lazy=lazy)
    steps(optimizer, model)
    assert [*model.state_dict()] == [*network().state_dict()]
    other = copy.deepcopy(model)
    before = values(optimizer)
    loss = other(X).square().mean()
    loss.backward()
    assert other[0][0].weight.grad.abs().sum() > 0
    assert same(before, values(optimizer))
    torch.nn.utils.vector_to_parameters(torch.zeros(60 + 5), other.parameters())
    steps(optimizer, model)
    assert not same(before, values(optimizer))


@lazily
def test_coverage_lists_the_parameters_of_the_model_alone(lazy: bool) -> None:
    model = network()
    optimizer = Heads(model, 0.1, lazy=lazy)
    assert optimizer.coverage(model) == dict.fromkeys([*model.state_dict()], "Heads")
    assert {*optimizer.coverage()} >= {*model.state_dict()}


@lazily
def test_a_loss_that_is_not_finite_changes_nothing(lazy: bool) -> None:
    """At the first step as well, where lazy modules have no values yet."""
    model = network()
    optimizer = Heads(model, 0.1, lazy=lazy)
    for _ in range(2):
        before = weights(model)
        optimizer.target = Y
        with pytest.raises(bioopt.Diverged, match="Heads: an update is nan"):
            optimizer.step(lambda: model(X * float("nan")).square().mean(1))
        assert same(before, weights(model))
        steps(optimizer, model)


def test_a_divergence_beside_modules_without_values() -> None:
    model = network()
    model.append(nn.Linear(5, 5))  # which the closure does not run
    optimizer = Heads(model, 0.1)
    optimizer.target = Y
    with pytest.raises(bioopt.Diverged, match="Heads: an update is nan") as diverged:
        optimizer.step(lambda: model[:2](X * float("nan")).square().mean(1))
    assert diverged.value.norm > 0
    assert is_lazy(optimizer._owned.modules["2"].weight)


def test_the_state_of_another_rule_is_named_first() -> None:
    model = network()
    optimizer = Heads(model, 0.1, lazy=False)
    with pytest.raises(ValueError, match="Heads: the state is that of Hebbian; load it into Hebbian"):
        optimizer.load_state_dict(published.Hebbian(network(), 0.1, readout=None).state_dict())


def test_repr_and_zero_grad_before_the_first_pass() -> None:
    model = network()
    optimizer = Heads(model, 0.1)
    assert "lr: 0.2" in repr(optimizer)
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=False)
    optimizer.discard()
    steps(optimizer, model)
