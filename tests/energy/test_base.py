"""What holds for every energy rule: on whatever may stand around a layer, and when relaxation fails."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.energy.states import Evaluation

from ..core import test_acts as acts
from ..rules import batch, same, weights
from . import twins
from .common import gradients, of_backpropagation

ENDS = [name for name in acts.NETWORKS if name != "reentrant checkpointing"]
HOPFIELD: dict[str, Any] = {"energy": "hopfield", "free_steps": 3, "nudged_steps": 4, "inference_lr": 0.2}
RULES: dict[str, Any] = {
    "state": lambda model, **o: bioopt.PredictiveCoding(model, steps=3, **o),
    "incremental": lambda model, **o: bioopt.PredictiveCoding(model, steps=4, mode="incremental", **o),
    "error": lambda model, **o: bioopt.PredictiveCoding(model, steps=2, mode="error", **o),
    "dual": lambda model, **o: bioopt.DualPropagation(model, steps=3, **o),
    "feedforward": lambda model, **o: bioopt.EquilibriumPropagation(model, nudged_steps=3, **o),
    "hopfield": lambda model, **o: bioopt.EquilibriumPropagation(model, **HOPFIELD | o),
}
every_rule = pytest.mark.parametrize("rule", RULES)
pytestmark = pytest.mark.filterwarnings("ignore:EquilibriumPropagation. energy='hopfield' with max pooling")


@pytest.mark.parametrize("network", ENDS)
def test_fixed_predictions_give_backpropagation_in_every_network(network: str) -> None:
    model, (x, y) = acts.build(network, "float64"), acts.batch("float64")
    expected = of_backpropagation(model, x, y)
    found = gradients(bioopt.PredictiveCoding(model, fixed_prediction=True), model, x, y)
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-8, atol=1e-12)


@every_rule
@pytest.mark.parametrize("network", ["residuals and groups", "shared layers", "checkpointing", "sequences"])
def test_every_network_learns(rule: str, network: str) -> None:
    for mode in ("float32", "bf16 autocast") if rule != "hopfield" else ("float32",):
        model = acts.build(network, mode)
        optimizer, start = RULES[rule](model), weights(model)
        for _ in range(2):
            optimizer.step(lambda model=model, mode=mode: acts.loss_of(model, mode))
        assert all(p.isfinite().all() for p in model.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(start, weights(model), strict=True))


class Twice(nn.Module):
    """One layer that fires twice, in a part that may run again in the backward pass."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        inside = acts.Shared(12)
        self.inside = acts.Checkpointed(inside, False) if again else inside

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x)
        return out


@every_rule
def test_checkpointing_changes_nothing(rule: str) -> None:
    """A layer that runs again sees the state that it saw before, although it has fired twice."""
    found = []
    for again in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(128, 12), Twice(again), nn.Linear(12, 5)).double()
        x, y = batch()
        found.append(list(gradients(RULES[rule](model), model, x.double(), y).values()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_reentrant_checkpointing_is_refused() -> None:
    model = acts.build("reentrant checkpointing")
    optimizer = bioopt.PredictiveCoding(model)
    with pytest.raises(RuntimeError, match=r"layer '2.inside.one' ran under no_grad.*use_reentrant=False"):
        optimizer.step(lambda: acts.loss_of(model))


@every_rule
def test_a_closure_may_leave_the_backward_pass_to_the_rule(rule: str) -> None:
    found = []
    for own in (False, True):
        model, (x, y) = acts.build("batch norm", "float64"), acts.batch("float64")
        optimizer = RULES[rule](model)

        def closure(model: nn.Module = model, own: bool = own, x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            if own:
                loss.backward()
            return loss

        optimizer.estimate(closure)
        found.append([p.grad.clone() for p in model.parameters()])
    assert same(*found)


class Beside(nn.Module):
    """The output is that of a layer plus what the layer receives, so that the loss reaches a state past it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(6, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).tanh()
        return (self.two(h) + h) * self.scale


def test_the_loss_may_reach_a_state_past_the_outputs() -> None:
    model, (x, y) = Beside().double(), twins.data()
    expected = of_backpropagation(model, x, y)
    found = gradients(bioopt.PredictiveCoding(model, fixed_prediction=True), model, x, y)
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p)


def test_a_backward_pass_of_the_closure_that_frees_what_states_need_is_refused() -> None:
    model, (x, y) = Beside().double(), twins.data()
    optimizer = bioopt.PredictiveCoding(model)

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = weights(model)
    with pytest.raises(RuntimeError, match=r"let the closure return the loss without calling backward\(\)"):
        optimizer.step(closure)
    assert same(before, weights(model))


def test_several_outputs_and_what_the_loss_does_not_reach() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.one, self.two, self.idle = (nn.Linear(6, n) for n in (6, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.trunk(x).tanh()
            self.idle(h)
            return self.one(h) + self.two(x)

    model, (x, y) = Heads().double(), twins.data()
    expected = of_reached(model, x, y)
    found = gradients(bioopt.PredictiveCoding(model, fixed_prediction=True), model, x, y)
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p)


def of_reached(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    params = {name: p for name, p in model.named_parameters() if "idle" not in name}
    return dict(zip(params, torch.autograd.grad(F.cross_entropy(model(x), y), list(params.values())), strict=True))


@every_rule
def test_a_loss_of_no_layer_is_refused(rule: str) -> None:
    model, (x, _) = twins.network(), twins.data()
    optimizer, before = RULES[rule](model), weights(model)

    def closure() -> Tensor:
        model(x)
        return torch.ones((), requires_grad=True)

    with pytest.raises(RuntimeError, match="learns from the loss, but it depends on no layer"):
        optimizer.step(closure)
    with pytest.raises(RuntimeError, match="no synapse has fired"):
        optimizer.step(lambda: torch.ones((), requires_grad=True))
    assert same(before, weights(model))


def test_other_layers_in_a_later_evaluation_are_refused() -> None:
    model, (x, y) = twins.network(), twins.data()
    calls = iter(range(99))
    optimizer = bioopt.PredictiveCoding(model)
    with pytest.raises(RuntimeError, match="ran other layers than in its first evaluation"):
        optimizer.step(lambda: F.cross_entropy(model(x) if next(calls) < 1 else model(model(x) @ x[:3]), y))


@pytest.mark.parametrize("make", [bioopt.PredictiveCoding, bioopt.EquilibriumPropagation])
def test_a_readout_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match="readout='delta' is not possible"):
        make(twins.network(), readout="delta")


# -- relaxation -------------------------------------------------------------------------------------------------


def stiff() -> nn.Sequential:
    """Weights so large that a state acts strongly on the layer above."""
    model = twins.network()
    with torch.no_grad():
        model[4].weight.mul_(30)
    return model


@pytest.mark.filterwarnings("ignore:.*too few for an error to reach")
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("hopfield", "dual")])
def test_a_rate_at_which_relaxation_explodes_is_named_with_one_that_works(rule: str) -> None:
    model, (x, y) = stiff(), twins.data()
    optimizer = RULES[rule](model, inference_lr=1e4)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    message = r"with inference_lr=10000, halved \d times, no step of relaxation has lowered the free energy; nothing"
    with pytest.raises(bioopt.Diverged, match=message) as raised:
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert same(before, weights(model))
    assert optimizer.state_dict() == state
    for _ in range(9):
        optimizer.param_groups[0]["inference_lr"] = float(str(raised.value).split("try inference_lr=")[1])
        try:
            optimizer.step(lambda: F.cross_entropy(model(x), y))
        except bioopt.Diverged as again:
            raised.value.args = again.args
        else:
            break
    else:
        pytest.fail("no rate that it named works")
    assert min(optimizer.relaxations[0].energy) < optimizer.relaxations[0].energy[0]


def test_a_step_that_raises_the_free_energy_is_taken_back_at_half_the_rate() -> None:
    model, (x, y) = stiff(), twins.data()
    rule = bioopt.PredictiveCoding(model, steps=12, inference_lr=0.01, relative=False)
    gradients(rule, model, x, y)
    done = rule.relaxations[0]
    lowest = [min(done.energy[: i + 1]) for i in range(len(done.energy))]
    assert done.taken_back == sum(e > low for e, low in zip(done.energy, lowest, strict=True))
    assert 0 < done.taken_back < 6
    assert done.scale == 0.5**done.taken_back
    assert done.energy[-1] < done.energy[0]


def test_steps_that_mostly_raise_the_free_energy_warn_once() -> None:
    model, (x, y) = stiff(), twins.data()
    optimizer = bioopt.PredictiveCoding(model, 0.0, inference_lr=0.5, relative=False)
    with pytest.warns(UserWarning, match="of 8 steps of relaxation with inference_lr=0.5 have raised .*; try"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    optimizer.step(lambda: F.cross_entropy(model(x), y))  # no second warning, which would be an error here


@pytest.mark.parametrize(
    ("rule", "option", "enough"),
    [
        (bioopt.PredictiveCoding, "steps", 3),
        (partial(bioopt.PredictiveCoding, mode="incremental"), "steps", 4),
        (partial(bioopt.PredictiveCoding, fixed_prediction=True), "steps", 3),
        (bioopt.DualPropagation, "steps", 3),
        (bioopt.EquilibriumPropagation, "nudged_steps", 3),
    ],
)
def test_layers_that_no_error_reaches_are_told_once(rule: Any, option: str, enough: int) -> None:
    model, (x, y) = twins.network(), twins.data()
    optimizer = rule(model, **{option: 1})
    message = (
        rf"{option}=1 is too few for an error to reach the layers 0, 2.*, which learn nothing: try {option}={enough}$"
    )
    with pytest.warns(UserWarning, match=message):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    optimizer.close()
    before = weights(model)
    rule(model, **{option: enough}).step(lambda: F.cross_entropy(model(x), y))  # silent, or it would be an error here
    assert not any(torch.equal(p, q) for p, q in zip(weights(model), before, strict=True))


def test_errors_reach_all_layers_of_a_relaxation_of_errors_at_once() -> None:
    model, (x, y) = twins.network(), twins.data()
    gradients(bioopt.PredictiveCoding(model, mode="error", steps=1), model, x, y)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "dual"])  # which seeks a saddle point
def test_relaxation_lowers_the_free_energy(rule: str) -> None:
    model, (x, y) = twins.network(), twins.data()
    optimizer = RULES[rule](model)
    gradients(optimizer, model, x, y)
    assert optimizer.relaxations
    for one in optimizer.relaxations:
        assert one.energy == sorted(one.energy, reverse=True)
        assert len(one.residual) == len(one.energy)


# -- locality ---------------------------------------------------------------------------------------------------


class Disturbed(bioopt.EnergyRule):
    """Learns from given states, of which one may be disturbed; no relaxation."""

    def __init__(self, model: nn.Module, disturbed: int | None) -> None:
        self.disturbed = disturbed
        super().__init__(model, 0.1, inference_lr=0.1, relative=True)

    def energy(self, z: Tensor, u: Tensor) -> Tensor:
        return (z - u).square().sum() / 2

    def project(self, z: Tensor) -> Tensor:
        return z

    def _learn(self, run: Any) -> tuple[Tensor, dict[Tensor, Tensor]]:
        first = self._forward(run)
        states = {i: first.leaves[i].detach() + 0.1 * (i + 1) for i in self._wired.hidden}
        if self.disturbed is not None:
            states[self.disturbed] = states[self.disturbed] + 0.5
        evaluation: Evaluation = self._with_states(run, states)
        return first.losses, self._of_parameters(evaluation, 1.0)


@pytest.mark.parametrize("disturbed", [0, 1, 2])
def test_a_layer_learns_from_its_own_state_and_those_next_to_it(disturbed: int) -> None:
    model, (x, y) = twins.network(), twins.data()
    one, other = (gradients(Disturbed(model, which), model, x, y) for which in (None, disturbed))
    changed = {i for i in range(4) if not torch.equal(one[f"{2 * i}.weight"], other[f"{2 * i}.weight"])}
    assert changed == {disturbed, disturbed + 1}


class Routed(nn.Module):
    """An output that is gated, or beneath one that is not."""

    def __init__(self, at_output: bool, *, of_input: bool) -> None:
        super().__init__()
        self.first, self.of_input = nn.Linear(6, 8), of_input
        pathways = [nn.Linear(8, 3 if at_output else 8) for _ in range(3)]
        self.gate = bioopt.nn.Gate(nn.Linear(6 if of_input else 8, 3), pathways, active=1)
        self.last = nn.Identity() if at_output else nn.Sequential(nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(self.gate(hidden, x if self.of_input else hidden))


@pytest.mark.parametrize("rule", [name for name in RULES if name != "incremental"])  # which steps within relaxation
@pytest.mark.parametrize("at_output", [True, False])
def test_routes_that_stand_still_average_over_samples(rule: str, at_output: bool) -> None:
    """The estimate of a batch is the mean of those of its samples, wherever these went."""
    x, y = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(7) % 3
    torch.manual_seed(0)
    model = Routed(at_output, of_input=True).double()
    optimizer = RULES[rule](model, relative=False, exclude=[model.gate.controller])
    whole = gradients(optimizer, model, x, y)
    each = [gradients(optimizer, model, x[i : i + 1], y[i : i + 1]) for i in range(7)]
    for name, found in whole.items():
        torch.testing.assert_close(found, sum(one.get(name, torch.zeros_like(found)) for one in each) / 7)


@pytest.mark.parametrize("rule", ["state", "incremental", "error", "hopfield"])  # whose states move far enough here
@pytest.mark.filterwarnings("ignore:.*too few for an error to reach")
def test_routes_that_change_as_states_relax_are_refused(rule: str) -> None:
    torch.manual_seed(0)
    model = Routed(False, of_input=False).double()
    optimizer = RULES[rule](model, inference_lr=0.5)

    def learn() -> None:
        for _ in range(30):
            x, y = torch.randn(32, 6).double(), torch.randint(3, (32,))
            optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))

    with pytest.raises(RuntimeError, match=r"other samples than before its states relaxed.*exclude the controller"):
        learn()


@every_rule
def test_no_samples_teach_nothing(rule: str) -> None:
    model, x, y = twins.network((6, 5, 4, 3)), *twins.data()
    optimizer = RULES[rule](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.estimate(lambda: F.cross_entropy(model(x[:0]), y[:0], reduction="none"))
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    before = weights(model)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert not same(before, weights(model))
    with pytest.raises(bioopt.Diverged, match="the loss is nan"):
        optimizer.step(lambda: F.cross_entropy(model(x[:0]), y[:0]))
