"""Several evaluations of one closure: the same circumstances for each, and nothing left behind, whatever happens."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

import bioopt
from bioopt.core.probe import settled

from ..rules import BY_FAMILY, CASES, ORDINARY, Case, batch, cnn, make, mlp, per_sample, same, steps, weights

every_rule = pytest.mark.parametrize("case", CASES, ids=str)


class OwnNorm(nn.Module):
    """A batch norm written by hand: a running mean in place, a counter that is replaced, a buffer made on the way."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("latest", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.detach().flatten(1).mean(1)[: len(self.mean)].mean().expand_as(self.mean), 0.1)
            self.count = self.count + 1
            self.latest = x.detach().mean()
        return x


@pytest.mark.parametrize("case", ORDINARY, ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["model", "parameters"])
def test_all_buffers_stand_as_after_one_evaluation(case: Case, bare: bool) -> None:
    model = case.cnn()
    model.insert(0, OwnNorm(3))
    model.append(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)).requires_grad_(False))
    given: Any = model
    if bare:
        if not case.takes_parameters:
            pytest.skip("needs the model")
        given = [p for p in model.parameters() if p.requires_grad]
    options = {"exclude": ["10"]} if not bare else {}
    optimizer = case.make(given, **options, **case.taking(readout=None))
    for i in range(1, 4):
        steps(optimizer, model, 1, first=i)
        assert model[0].count == i
        assert model[2].num_batches_tracked == i
    twin = copy.deepcopy(model)
    x, y = batch(9)
    optimizer.estimate(per_sample(optimizer, model, x, y))
    with torch.no_grad():
        twin(x)  # of the same weights: estimate changes none
    if not case.perturbs_first:
        for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, msg=name)
    else:
        assert torch.equal(model[0].mean, twin[0].mean)  # beneath all that is perturbed


def test_a_model_in_another_thread_is_left_alone() -> None:
    torch.manual_seed(0)
    model, other = mlp(dtype=torch.float32), nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    optimizer = bioopt.WeightPerturbation(model.parameters(), 0.01, sigma=0.01, population=4)
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    plain, stop, failed = torch.optim.SGD(other.parameters(), 0.1), threading.Event(), []
    updates = 0

    def train() -> None:
        nonlocal updates
        while not stop.is_set():
            try:
                plain.zero_grad()
                F.cross_entropy(other(x), y).backward()
                plain.step()
                updates += 1
            except RuntimeError as error:
                failed.append(error)
                return

    thread = threading.Thread(target=train)
    thread.start()
    for _ in range(60):
        # A new closure each time: its modules are looked for anew.
        optimizer.step(eval("lambda: F.cross_entropy(model(x), y, reduction='none')", {**globals(), **locals()}))
    stop.set()
    thread.join()
    assert not failed
    assert other[1].num_batches_tracked == updates


def test_no_global_hook_is_registered_at_a_later_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cnn()
    optimizer = bioopt.WeightPerturbation(model.parameters(), 0.01, sigma=0.01)
    steps(optimizer, model, 1)
    monkeypatch.setattr(torch.nn.modules.module, "register_module_forward_pre_hook", None)
    steps(optimizer, model, 2, first=1)
    assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("rule", [bioopt.WeightPerturbation, bioopt.NodePerturbation, bioopt.ForwardGradient])
def test_modules_that_only_the_closure_puts_into_training_mode(rule: type) -> None:
    model = cnn()
    optimizer = make(rule, model)
    x, y = batch()

    def closure() -> Tensor:
        model.train()
        return F.cross_entropy(model(x), y, reduction="none")

    for i in (1, 2, 3):
        optimizer.step(closure)
        assert model[1].num_batches_tracked == i
        model.eval()


@pytest.mark.parametrize("form", ["lambda", "partial", "method", "default"])
def test_closures_of_one_kind_that_run_different_models(form: str) -> None:
    models = [cnn(seed=i) for i in (0, 1)]
    x, y = batch()

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    class Task(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def closure(self) -> Tensor:
            return loss(self.model)

    tasks = [Task(model) for model in models]
    optimizer = bioopt.WeightPerturbation([p for m in models for p in m.parameters()], 0.01, sigma=0.01, population=3)
    for step in range(4):
        model = models[step % 2]
        forms = {
            "lambda": lambda model=model: loss(model),
            "partial": partial(loss, model),
            "method": tasks[step % 2].closure,
            "default": lambda of=model: loss(of),
        }
        optimizer.step(forms[form])
    assert [int(model[1].num_batches_tracked) for model in models] == [2, 2]


def test_modules_added_later() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    optimizer = bioopt.NodePerturbation(model, 0.01, sigma=0.01, samples=3)

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    optimizer.step(closure)
    model.insert(1, nn.BatchNorm1d(5))
    optimizer.step(closure)
    optimizer.step(closure)
    assert model[1].num_batches_tracked == 2


class RunningMean(nn.Module):
    """Its output depends on a buffer that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 5e-4)
        return x - self.mean


def test_every_evaluation_starts_from_the_same_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(RunningMean(), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    x, y = torch.randn(16, 6).double() + 1, torch.arange(16) % 4
    losses: list[float] = []

    def closure() -> Tensor:
        found = F.cross_entropy(model(x), y)
        losses.append(found.item())
        return found

    optimizer = bioopt.WeightPerturbation(model, 0.0, sigma=1e-9, population=20)
    optimizer.estimate(closure)
    assert len(losses) == 42
    assert max(losses) - min(losses) < 1e-8
    wanted = torch.zeros(6).double().lerp(x.mean(0), 5e-4)
    torch.testing.assert_close(model[0].mean, wanted)


def test_buffers_that_cannot_be_written_or_need_no_copy() -> None:
    model = cnn()
    model.register_buffer("spread", torch.ones(1).expand(20))
    with torch.inference_mode():
        constant = torch.ones(3)
    model.register_buffer("constant", constant)
    model.register_buffer("large", torch.ones(1000))
    optimizer = bioopt.WeightPerturbation(model, 0.01, sigma=0.01)
    steps(optimizer, model, 1)
    kept = optimizer._known.modules[model]._saved["large"][2]
    steps(optimizer, model, 2, first=1)
    assert optimizer._known.modules[model]._saved["large"][2] is kept  # the copy of the first step
    assert model[1].num_batches_tracked == 3


class Leaky(nn.Module):
    """Keeps its potential as an attribute, as neurons with ``init_hidden`` do."""

    def __init__(self, leak: float = 0.5) -> None:
        super().__init__()
        self.leak = leak
        self.reset()

    def reset(self) -> None:
        self.potential = torch.zeros(())

    def forward(self, u: Tensor) -> Tensor:
        self.potential = (self.leak * self.potential + u).detach() + (u - u.detach())
        return torch.tanh(self.potential)


@pytest.mark.parametrize(
    ("rule", "options"),
    [(bioopt.WeightPerturbation, {}), (bioopt.NodePerturbation, {}), (bioopt.ForwardGradient, {"samples": 2})],
)
def test_state_outside_buffers_is_named(rule: type, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(6, 5), Leaky(), nn.Linear(5, 4))
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    optimizer = make(rule, model, **options)
    with pytest.raises(
        RuntimeError, match=r"not repeatable.*Leaky\.potential.* reset them at the start of the closure"
    ):
        optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))

    def closure() -> Tensor:
        model[1].reset()
        return F.cross_entropy(model(x), y, reduction="none")

    optimizer.step(closure)


def test_a_little_state_outside_buffers_is_warned_of() -> None:
    model = nn.Sequential(nn.Linear(6, 5), Leaky(1e-5), nn.Linear(5, 4))
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    optimizer = bioopt.WeightPerturbation(model, 0.01, sigma=0.01)
    with pytest.warns(UserWarning, match=r"differ a little.*Leaky\.potential"):
        optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))


# -- interrupts -----------------------------------------------------------------------------------------------


class Interrupting:
    """Raises KeyboardInterrupt at the n-th place in bioopt where Python looks for signals: calls, and what follows."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        place = frame.f_globals.get("__name__", "")
        if event in ("call", "c_return") and place.startswith(("bioopt", "contextlib", "torch.utils._contextlib")):
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt


def interrupted(at: int, work: Callable[[], object]) -> int:
    """The number of places where the work could have been interrupted before this one, at which it was."""
    profile = Interrupting(at)
    sys.setprofile(profile)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return profile.seen


@pytest.mark.parametrize("case", BY_FAMILY, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_an_interrupt_anywhere_leaves_everything_as_it_was(case: Case) -> None:
    model = case.cnn(dropout=0.0)
    optimizer = case.make(model, **(case.taking(readout="delta") if case.shares_pass else {}))
    steps(optimizer, model, 1)
    before = weights(model)
    state = copy.deepcopy(optimizer.state_dict())
    acts = optimizer._recorder._enter, optimizer._recorder._leave
    closure = per_sample(optimizer, model, *batch(1))
    counted = int(model[1].num_batches_tracked) + 1 if hasattr(model[1], "num_batches_tracked") else 0
    places = interrupted(0, lambda: optimizer.estimate(closure))
    assert places > 50
    for at in range(1, places, max(1, places // 25)):
        interrupted(at, lambda: optimizer.estimate(closure))
        assert same(before, weights(model)), at
        assert torch.is_grad_enabled()
        assert forward_ad._current_level == -1
        assert not optimizer._undo
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        assert not nn.modules.module._has_any_global_hook()
        assert (optimizer._recorder._enter, optimizer._recorder._leave) == acts
        if counted:
            assert int(model[1].num_batches_tracked) - counted in (0, 1), at
            counted = int(model[1].num_batches_tracked)
    again = optimizer.state_dict()
    assert again["param_groups"] == state["param_groups"]
    steps(optimizer, model, 1, first=2)
    assert not same(before, weights(model))


def test_what_is_undone_survives_interrupts_of_its_own() -> None:
    done: list[str] = []

    def second() -> None:
        if done.count("second") < 2:
            done.append("second")
            raise KeyboardInterrupt
        done.append("second")

    def failing() -> None:
        done.append("failing")
        raise ValueError("the other entries are undone all the same")

    undo = [lambda: done.append("first"), failing, second]
    with pytest.raises(KeyboardInterrupt):
        settled(undo, lambda: 1 / 1)
    assert done == ["second", "second", "second", "failing", "first"]
    assert not undo
    assert settled(undo, lambda: 5) == 5


def test_rules_of_one_evaluation_make_one() -> None:
    for case in CASES:
        if not case.evaluates_once:
            continue
        model = case.cnn()
        optimizer = case.make(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            steps(optimizer, model, 2)  # in its first, a rule may look at the network
        assert optimizer.forward_passes == 1, case
