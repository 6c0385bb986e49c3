"""Copies and saved models carry no trace of the rules that watch the model; other people's hooks stay."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import bioopt

from ..rules import CASES, Case, batch, cnn, hooks, published, steps

WATCHING = [case for case in CASES if not case.takes_parameters or case.takes("space")]
every_watching_rule = pytest.mark.parametrize("case", WATCHING, ids=str)


def traces(model: nn.Module) -> list[str]:
    """What an unwatched module would not have."""
    tables = [name for name in vars(nn.Linear(1, 1)) if "hook" in name]
    found = [f"{n}.{t}" for n, m in model.named_modules() for t in tables if getattr(m, t)]
    return found + [n for n, m in model.named_modules() if "__getstate__" in vars(m)]


@every_watching_rule
def test_copies_are_as_if_nothing_had_watched(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    steps(optimizer, model, 1)
    watched = hooks(model)
    for _ in range(3):  # of copies, too
        other = copy.deepcopy(model)
        assert not traces(other)
        generation = case.make(other)
        steps(generation, other, 1)
        layer = next((m for m in other.modules() if m._forward_hooks), nn.ReLU())
        assert not traces(copy.copy(layer))
        assert not traces(pickle.loads(pickle.dumps(other)))
        assert hooks(other) == watched
        generation.close()
        assert not traces(other)
    assert hooks(model) == watched


@pytest.mark.parametrize("case", [case for case in WATCHING if case.ordinary], ids=str)
def test_a_saved_model_does_not_name_bioopt(case: Case) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = case.make(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"bioopt" not in file.getvalue()
    assert b"bioopt" not in pickle.dumps(model)
    file.seek(0)
    assert not traces(torch.load(file, weights_only=False))
    optimizer.close()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripts_exports_and_whole_graphs_of_a_copy() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = published.Hebbian(model, 0.1)
    other, x = copy.deepcopy(model), torch.randn(3, 6)
    wanted = other(x)
    assert torch.equal(torch.jit.script(other)(x), wanted)
    assert torch.equal(torch.export.export(other, (x,)).module()(x), wanted)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(x), wanted)
    del optimizer


class Named(nn.Linear):
    """Has a ``__getstate__`` of its own."""

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "seen": True}


def notice(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    module.noticed = True


def test_hooks_of_other_people_stay_and_can_be_removed() -> None:
    bioopt.register_synapse(Named, channel_dim=-1)
    model = nn.Sequential(Named(4, 3), nn.Linear(3, 2))
    before = model[0].register_forward_hook(notice)
    optimizer = bioopt.NodePerturbation(model, 0.1, sigma=0.1)
    after = model[0].register_forward_hook(notice, always_call=True)
    other = copy.deepcopy(model)
    assert list(other[0]._forward_hooks.values()) == [notice, notice]
    assert len(other[0]._forward_hooks_always_called) == 1
    assert other[0].seen
    other(torch.randn(2, 4))
    assert other[0].noticed
    before.remove()
    after.remove()
    optimizer.close()
    assert not traces(model)
    assert not hooks(model)


def test_two_watchers_of_one_layer() -> None:
    model = cnn()
    first, second = published.Hebbian(model, 0.1), bioopt.NodePerturbation(model, 0.1, sigma=0.1)
    first.close()
    assert not traces(copy.deepcopy(model))
    second.close()
    assert not traces(model)


def test_a_copy_of_a_watched_module_learns_as_any() -> None:
    model = cnn()
    optimizer = published.Hebbian(model, 0.1)
    other = copy.deepcopy(model)
    other(batch()[0]).sum().backward()
    assert other[0].weight.grad is not None
    optimizer.close()


def test_a_module_that_took_over_what_another_holds_is_copied_as_itself() -> None:
    """As libraries of meta-learning clone modules."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = published.Hebbian(model, 0.1)
    other = nn.Linear(4, 3)
    other.__dict__.update(model[0].__dict__)
    other._parameters = {name: nn.Parameter(torch.zeros_like(p)) for name, p in model[0]._parameters.items()}
    assert copy.deepcopy(other).weight.abs().sum() == 0
    assert pickle.loads(pickle.dumps(other)).weight.abs().sum() == 0
    optimizer.close()


class Tupled(nn.Linear):
    """Its state is no dictionary."""

    def __getstate__(self) -> tuple[dict[str, object], int]:
        return vars(self), 7

    def __setstate__(self, state: tuple[dict[str, object], int]) -> None:
        self.__dict__.update(state[0])
        self.seven = state[1]


def test_a_state_of_a_layers_own_form_is_left_to_it() -> None:
    bioopt.register_synapse(Tupled, channel_dim=-1)
    model = nn.Sequential(Tupled(4, 3), nn.Linear(3, 2))
    optimizer = published.Hebbian(model, 0.1)
    assert copy.deepcopy(model)[0].seven == 7
    optimizer.close()
