"""What every rule owes its user, whatever it computes."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

import bioopt
from bioopt.core import homeostasis, local_product
from bioopt.feedback import FeedbackRule

from .distributed import by_distributed_checkpoint
from .rules import (
    BY_FAMILY,
    CASES,
    LOCAL,
    MIXED,
    ONE_PASS,
    SEVERAL_PASSES,
    Case,
    batch,
    cnn,
    directions,
    give_target,
    hooks,
    make,
    name_of,
    ordinary,
    per_sample,
    published,
    same,
    steps,
    weights,
)


@pytest.fixture(autouse=True)
def rules_act_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with homeostasis acts from the third step on, not after ten."""
    for module in (homeostasis, local_product):
        monkeypatch.setattr(module, "WARM_UP", 2)


every_rule = pytest.mark.parametrize("case", CASES, ids=str)
every_rule_by_family = pytest.mark.parametrize("case", BY_FAMILY, ids=str)
every_optimizer = pytest.mark.parametrize("case", [*CASES, MIXED], ids=str)


def many(case: Case) -> dict[str, int]:
    """Enough for a rule that visits single weights to reach every layer."""
    return case.taking(coordinates=400)


@every_rule
def test_hyperparameters_out_of_range_are_named(case: Case) -> None:
    for lr in (-1.0, float("nan"), "fast"):
        with pytest.raises(ValueError, match=rf"{case.name}: lr=.* must be"):
            case.make(case.cnn(), lr=lr)
    for name in case.rule.constraints:
        with pytest.raises(ValueError, match=rf"{case.name}: {name}=-1 must be"):
            case.make(case.cnn(), **{name: -1})
    with pytest.raises(ValueError, match="lr=-2"):  # in a group, too
        case.make([{"params": case.cnn(), "lr": -2}])
    with pytest.raises(TypeError, match="bogus"):
        case.make(case.cnn(), bogus=1)
    if case.takes("descent"):
        with pytest.raises(TypeError, match="LBFGS evaluates the closure itself"):
            case.make(case.cnn(), descent=torch.optim.LBFGS)
    with pytest.raises(TypeError, match=r"torch.*Tensor"):
        case.make(torch.zeros(3))
    with pytest.raises(ValueError, match="empty"):
        case.make([])


@every_optimizer
def test_learns_something_and_returns_the_loss_of_each_sample(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    before = weights(model)
    loss = steps(optimizer, model, 3)
    assert loss.shape == (10,)
    assert not loss.requires_grad
    assert not same(before, weights(model))
    covered = optimizer.coverage(model)
    assert list(covered) == [name for name, _ in model.named_parameters()]
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        # `frozen` means it: not a bit has moved.
        assert torch.equal(p, old) or covered[name] != "frozen", name


@every_rule
def test_groups_have_their_own_learning_rate(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make([{"params": model[:4], "lr": 0.0}, {"params": model[4:], "lr": 0.01}], **many(case))
    first, second, direction = model[0].weight.clone(), model[4].weight.clone(), directions(model)[0]
    steps(optimizer, model, 2)
    if case.regulates and case.rule is not bioopt.Homeostasis:  # whose rate is that of homeostasis
        torch.testing.assert_close(directions(model)[0], direction)
    else:
        assert torch.equal(model[0].weight, first)
    assert not torch.equal(model[4].weight, second)
    assert [g["lr"] for g in optimizer.param_groups][:2] == [0.0, 0.01]


@every_rule
def test_estimate_and_descend_are_a_step(case: Case) -> None:
    one, two = case.cnn(), case.cnn()
    first, second = case.make(one, momentum=0.9), case.make(two, momentum=0.9)
    for i in range(3):
        torch.manual_seed(i)
        a = first.step(per_sample(first, one, *batch(i)))
        torch.manual_seed(i)
        before = weights(two)
        b = second.estimate(per_sample(second, two, *batch(i)))
        assert same(before, weights(two))
        second.descend()
        assert torch.equal(a, b)
    assert same(weights(one), weights(two))


@every_optimizer
def test_a_step_after_an_estimate_descends_along_it(case: Case) -> None:
    """So a training loop that calls `step()` without a closure needs `estimate` in the place of its backward pass."""
    models = [case.cnn(dropout=0.0), case.cnn(dropout=0.0)]
    optimizers = [case.make(model) for model in models]
    for i in range(2):
        one, two = (
            per_sample(optimizer, model, *batch(i)) for optimizer, model in zip(optimizers, models, strict=True)
        )
        optimizers[0].step(one)
        optimizers[1].estimate(two)
        assert optimizers[1].step() is None
        assert optimizers[1].forward_passes == optimizers[0].forward_passes
    assert same(*map(weights, models))
    with pytest.raises(RuntimeError):
        optimizers[1].step()  # it has been used up
    optimizers[1].estimate(two)
    optimizers[1].zero_grad()
    with pytest.raises(RuntimeError):
        optimizers[1].step()


@pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.Oja])
def test_a_step_is_made_of_a_forward_pass_after_an_estimate(rule: type) -> None:
    results = []
    for earlier in (False, True):
        model = cnn(dropout=0.0)
        optimizer = make(rule, model, readout=None)
        if earlier:
            model(batch(1)[0])
            optimizer.estimate()
        model(batch()[0])
        optimizer.step()
        results.append(weights(model))
    assert same(*results)


@pytest.mark.parametrize("case", [case for case in CASES if case.takes("descent") and not case.rescales], ids=str)
@pytest.mark.parametrize(
    ("descent", "options"),
    [
        (torch.optim.Adam, {"betas": (0.8, 0.9), "fused": False}),  # by one kernel the same but for rounding
        (torch.optim.RMSprop, {"momentum": 0.5}),
        pytest.param(torch.optim.AdamW, {"weight_decay": 0.1, "fused": False}, marks=pytest.mark.long),
        pytest.param(torch.optim.Adagrad, {"fused": False}, marks=pytest.mark.long),
    ],
)
def test_descent_is_the_optimizer_itself(case: Case, descent: type, options: dict) -> None:
    """The rule's `.grad`, given to the plain optimizer on a copy, makes the same step."""
    model, twin = case.cnn(), case.cnn()
    plainly = {"centre_inputs": False} if case.rule.centres_inputs else {}  # whose steps are along other coordinates
    optimizer = case.make(model, descent=descent, **plainly, **options)
    names = {p: name for name, p in model.named_parameters()}
    own, twins, steps = [], dict(twin.named_parameters()), []
    for group in optimizer.param_groups:
        of_model = [p for p in group["params"] if p in names]
        own += of_model
        if not of_model:
            continue
        trained = [twins[names[p]] for p in of_model]
        if group["standardised"]:  # such a readout descends by SGD
            sgd = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
            steps.append(torch.optim.SGD(trained, **sgd))
        else:
            steps.append(descent(trained, lr=0.01, **options))
    for i in range(3):
        optimizer.estimate(per_sample(optimizer, model, *batch(i)))
        for p in own:
            twins[names[p]].grad = None if p.grad is None else p.grad.clone()
        optimizer.descend()
        for plain in steps:
            plain.step()
        if not case.regulates:
            assert same(weights(model), weights(twin))
            continue
        for one, two in zip(directions(model), directions(twin), strict=True):  # homeostasis follows the step
            torch.testing.assert_close(one, two)
        twin.load_state_dict(model.state_dict())


@every_optimizer
@pytest.mark.filterwarnings("ignore:.* now has that of the other layers")
@pytest.mark.parametrize("schedule", [lambda o: CosineAnnealingLR(o, 4), lambda o: OneCycleLR(o, 0.01, total_steps=8)])
def test_schedulers(case: Case, schedule) -> None:
    torch.manual_seed(0)
    model = case.cnn()
    optimizer = case.make(model, momentum=0.9)
    scheduler = schedule(optimizer)
    rates = []
    for i in range(4):
        optimizer.step(per_sample(optimizer, model, *batch(i)))
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert [g["lr"] for g in optimizer.param_groups] == scheduler.get_last_lr()
    assert len(set(rates)) == 4


@every_optimizer
@pytest.mark.parametrize("descent", [torch.optim.SGD, torch.optim.Adam])
def test_goes_on_bit_for_bit_from_a_checkpoint(case: Case, descent) -> None:
    whole = case.cnn(dropout=0.0)
    options = {"descent": descent} | ({"momentum": 0.9} if descent is torch.optim.SGD else {})
    reference = case.make(whole, **options)
    steps(reference, whole, 6)

    model = case.cnn(dropout=0.0)
    optimizer = case.make(model, **options)
    steps(optimizer, model, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    kept = optimizer.state_dict()
    kept_rule = copy.deepcopy(kept)
    steps(optimizer, model, 1, first=3)
    if not isinstance(optimizer, bioopt.Mixed):
        # A state_dict does not change afterwards.
        torch.testing.assert_close(kept["state"].get("rule", {}), kept_rule["state"].get("rule", {}), rtol=0, atol=0)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = case.cnn(seed=7, dropout=0.0)
    optimizer = case.make(model, **options)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(optimizer, model, 3, first=3)
    assert same(weights(whole), weights(model))


@every_rule
def test_the_state_of_another_rule_is_refused_by_both_names(case: Case) -> None:
    model = case.mlp(dtype=torch.float32)
    options = case.taking(readout=None)
    optimizer = case.make(model, **options)
    own = optimizer.state_dict()
    assert own["rule"] == case.name
    optimizer.load_state_dict(own)
    optimizer.load_state_dict({key: value for key, value in own.items() if key != "rule"})  # of an older version
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"{case.name}: the state is that of Other; load it into Other"):
        optimizer.load_state_dict({**own, "rule": "Other"})
    foreign = torch.optim.Adam(model.parameters(), 0.1).state_dict()
    with pytest.raises(ValueError, match=rf"{case.name}: the state names no rule, and its options are not those"):
        optimizer.load_state_dict(foreign)
    assert equal_state(before, optimizer.state_dict())


def test_mixed_refuses_the_state_of_other_members() -> None:
    model, other = cnn(), cnn()
    one = bioopt.Mixed(published.Oja(model[:5], 0.1, readout=None), torch.optim.Adam(model[5:].parameters(), lr=0.1))
    two = bioopt.Mixed(published.Sanger(other[:5], 0.1, readout=None), torch.optim.Adam(other[5:].parameters(), lr=0.1))
    with pytest.raises(
        ValueError, match=r"state is that of \['Sanger', 'Adam'\], this optimizer has \['Oja', 'Adam'\]"
    ):
        one.load_state_dict(two.state_dict())


@every_optimizer
@pytest.mark.parametrize("way", ["nested", *(pytest.param(way, marks=pytest.mark.long) for way in ("flat", "saved"))])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process
def test_goes_on_bit_for_bit_from_a_distributed_checkpoint(case: Case, way: str, tmp_path) -> None:
    models = [case.cnn(dropout=0.0), case.cnn(seed=7, dropout=0.0)]
    optimizers = [case.make(model, momentum=0.9) for model in models]
    steps(optimizers[0], models[0], 3)
    before = weights(models[0])
    by_distributed_checkpoint(models, optimizers, way, tmp_path)
    assert same(before, weights(models[0]))
    assert same(before, weights(models[1]))
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(optimizer, model, 2, first=3)
    assert same(*map(weights, models))
    assert equal_state(*(optimizer.state_dict() for optimizer in optimizers))


@every_optimizer
def test_initial_state_for_a_distributed_checkpoint_changes_nothing(case: Case) -> None:
    """torch.distributed.checkpoint makes a step for it, of zero gradients and lr=0."""
    results = []
    for asked in (False, True):
        model = case.cnn(dropout=0.0)
        optimizer = case.make(model, **case.taking(descent=torch.optim.SGD))  # Adam counts that step
        if asked:
            F.cross_entropy(model(batch()[0]), batch()[1])
            optimizer.zero_grad()
            get_optimizer_state_dict(model, optimizer)
        steps(optimizer, model, 1)
        results.append(weights(model))
    assert same(*results)


@every_optimizer
def test_the_model_can_be_copied_and_pickled_while_watched(case: Case) -> None:
    model = case.cnn(dropout=0.0)
    optimizer = case.make(model)
    steps(optimizer, model, 1)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model).module]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    x, y = batch()
    for other in copies:
        loss = F.cross_entropy(other(x), y)  # in training mode: nothing watches the copy, so gradients reach its start
        loss.backward()
        assert other[0].weight.grad.abs().sum() > 0
    before = [weights(other) for other in copies]
    steps(optimizer, model, 1)
    assert all(same(old, weights(other)) for old, other in zip(before, copies, strict=True))
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="load_state_dict"):
        pickle.dumps(optimizer)


@every_optimizer
def test_step_hooks_fire_once(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    fired: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: fired.append("pre")),
        optimizer.register_step_post_hook(lambda *_: fired.append("post")),
        register_optimizer_step_pre_hook(lambda *_: fired.append("every pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("every post")),
    ]
    try:
        steps(optimizer, model, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(fired) == ["every post", "every pre", "post", "pre"]


@every_rule
def test_a_group_can_be_added(case: Case) -> None:
    model = case.cnn()
    options = case.taking(readout=None)
    optimizer = case.make(model[:4], **options, **many(case))
    watched, groups = hooks(model), len(optimizer.param_groups)
    assert optimizer.coverage(model)[name_of(model, model[4].weight)] == "frozen"
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": model[4:], "lr": -1})
    assert len(optimizer.param_groups) == groups
    optimizer.add_param_group({"params": model[4:], "lr": 0.02})
    before = model[4].weight.clone()
    steps(optimizer, model, 1)
    assert optimizer.coverage(model)[name_of(model, model[4].weight)] == case.name
    assert not torch.equal(before, model[4].weight)
    everything = hooks(model)
    assert everything > watched or not everything
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": model[4:]})
    assert hooks(model) == everything  # the refused group left none


@pytest.mark.filterwarnings("ignore:.*predict by optimizer.relaxed")
@every_optimizer
def test_validation_between_two_steps_changes_nothing(case: Case) -> None:
    one, two = case.cnn(dropout=0.0), case.cnn(dropout=0.0)
    first, second = case.make(one), case.make(two)
    for i in range(3):
        steps(first, one, 1, first=i)
        steps(second, two, 1, first=i)
        two.eval()
        x, y = batch(100 + i)
        with torch.no_grad():
            two(x)
        with torch.inference_mode():
            two(x)
        F.cross_entropy(two(x), y).backward()  # a full gradient, as if nothing watched
        assert two[0].weight.grad.abs().sum() > 0
        two.train()
    assert same(weights(one), weights(two))


@every_optimizer
def test_an_ordinary_closure_warns_once_and_works(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    needs_backward = isinstance(optimizer, bioopt.Mixed) or case.needs_backward
    needs_backward = needs_backward or any(g.get("readout") for g in optimizer.param_groups)
    before = weights(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3):
            loss = optimizer.step(ordinary(optimizer, model, *batch(i)))
    assert loss.ndim == 0
    assert len(caught) == (0 if needs_backward else 1)
    if caught:
        assert "if loss.requires_grad: loss.backward()" in str(caught[0].message)
        assert caught[0].filename == __file__  # points at the user's line
    assert not same(before, weights(model))
    assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize(
    ("case", "readout"),
    [(case, readout) for case in ONE_PASS for readout in ("delta", "teacher", None) if case in LOCAL or not readout],
    ids=str,
)
def test_the_three_loops_agree(case: Case, readout: str | None) -> None:
    """Ordinary closure, per-sample closure and the classic loop, wherever zero_grad stands in it."""

    def classic(optimizer, model, x, y, place) -> None:
        if place == "start":
            optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if place == "middle":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if place == "end":
            optimizer.zero_grad()

    results = []
    for form in ("ordinary", "per sample", "bare", "start", "middle", "end"):
        model = case.cnn(dropout=0.0)
        optimizer = case.make(model, **case.taking(readout=readout))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*needs no backward.*")
            for i in range(3):
                x, y = batch(i)
                if readout == "teacher":
                    optimizer.target = y
                give_target(optimizer, y)
                if form == "ordinary":
                    optimizer.step(ordinary(optimizer, model, x, y))
                elif form == "per sample":
                    optimizer.step(per_sample(optimizer, model, x, y))
                elif form == "bare":  # the closure leaves the backward pass to the rule
                    optimizer.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
                else:
                    classic(optimizer, model, x, y, form)
        results.append(weights(model))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SEVERAL_PASSES, ids=str)
def test_rules_of_several_passes_ask_for_a_closure(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=rf"{case.name}.*optimizer.step\(closure\)"):
        optimizer.step()
    assert same(before, weights(model))


@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_a_step_without_a_forward_pass_is_refused(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    with pytest.raises(RuntimeError, match="no synapse has fired"):
        optimizer.step()
    steps(optimizer, model, 1)
    with pytest.raises(RuntimeError, match="no synapse has fired"):
        optimizer.step()  # the pass before has been used up
    model.eval()
    model(batch()[0])
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        optimizer.step()


@every_rule
@pytest.mark.filterwarnings("ignore:ForwardGradient. no forward derivative here")
def test_a_closure_may_return_a_number(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model, **case.taking(readout=None))

    def closure() -> float:
        loss = F.cross_entropy(model(batch()[0]), batch()[1])
        if case.needs_backward:
            optimizer.zero_grad()
            loss.backward()
        return loss.item()

    give_target(optimizer, batch()[1])
    loss = optimizer.step(closure)
    assert isinstance(loss, float)
    with pytest.raises(RuntimeError, match="returned None"):
        optimizer.step(lambda: None)
    with pytest.raises(TypeError, match="the closure returned a tuple; it must return the loss"):
        optimizer.step(lambda: (0.0, 1.0))
    with pytest.raises(TypeError, match=f"{case.name}: .* a function that runs the model .* not a torch"):
        optimizer.step(F.cross_entropy(model(batch()[0]), batch()[1]))


@every_optimizer
def test_repr(case: Case) -> None:
    optimizer = case.make(case.cnn())
    assert repr(optimizer).startswith(type(optimizer).__name__ + " (\nParameter Group 0")
    assert "lr: 0.01" in repr(optimizer)


@pytest.fixture(scope="module")
def little_to_collect() -> None:
    """What earlier tests have imported stays: the garbage collector need not look at it in each of these."""
    gc.collect()
    gc.freeze()


@every_optimizer
@pytest.mark.usefixtures("little_to_collect")
def test_no_memory_growth(case: Case) -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    model = case.cnn()
    optimizer = case.make(model, lr=1e-4)
    steps(optimizer, model, 3)
    for p in model.parameters():
        p.grad = None
    before = alive()
    steps(optimizer, model, 10)
    for p in model.parameters():
        p.grad = None
    assert alive() <= before
    # Forward passes that no step follows do not pile up either.
    x, _ = batch()
    model(x)
    before = alive()
    for _ in range(10):
        model(x)
    assert alive() <= before


@every_optimizer
@pytest.mark.parametrize("form", [per_sample, ordinary])
@pytest.mark.filterwarnings("ignore:.*needs no backward")
def test_random_state_and_batch_norm_stand_as_after_one_evaluation(case: Case, form) -> None:
    model, twin = case.cnn(), case.cnn()
    optimizer = case.make(model)
    torch.manual_seed(3)
    twin(batch()[0])
    after_one = torch.get_rng_state()
    torch.manual_seed(3)
    optimizer.step(form(optimizer, model, *batch()))
    assert torch.equal(torch.get_rng_state(), after_one)
    assert model[1].num_batches_tracked == 1
    if not case.perturbs_first and not case.regulates:  # which standardises the activity within the first pass
        assert torch.equal(model[1].running_mean, twin[1].running_mean)


@every_rule
def test_all_evaluations_of_a_step_see_the_same_dropout_masks(case: Case) -> None:
    seen: list[torch.Tensor] = []
    model, x = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)), torch.ones(6, 4)
    if not case.ordinary:
        model, x = case.cnn(dropout=0.5), batch(n=6)[0]
    (dropout,) = (module for module in model if isinstance(module, nn.Dropout))
    dropout.register_forward_pre_hook(lambda m, args: args[0].exp())  # so that a zero behind it is of the mask
    dropout.register_forward_hook(lambda m, args, out: seen.append(out.detach() == 0))
    optimizer = case.make(model, readout="delta", readout_lr=0.1) if case in LOCAL else case.make(model)
    y = torch.zeros(6, dtype=torch.long)
    give_target(optimizer, y)
    optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert all(torch.equal(mask, seen[0]) for mask in seen)
    assert len(seen) >= (1 if case.evaluates_once else 2)


@every_optimizer
@pytest.mark.parametrize("failing", [1, 2])
def test_a_closure_that_raises_changes_nothing(case: Case, failing: int) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    steps(optimizer, model, 2)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = per_sample(optimizer, model, *batch())()
        if calls == failing:
            raise KeyError("the user's own")
        return losses

    grad_mode = torch.is_grad_enabled()
    if failing == 2 and case.evaluates_once:
        optimizer.step(closure)  # one evaluation
        assert calls == 1
        return
    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert calls == failing
    assert torch.is_grad_enabled() == grad_mode
    assert same(before, weights(model))
    assert equal_state(state, optimizer.state_dict())
    steps(optimizer, model, 1)  # and it goes on


@every_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_changes_nothing(case: Case, value: float) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    steps(optimizer, model, 2)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        give_target(optimizer, batch()[1])
        losses = F.cross_entropy(model(batch()[0]), batch()[1], reduction="none") + value
        if losses.requires_grad:
            losses.mean().backward()
        return losses

    message = rf"{type(optimizer).__name__}: the loss is (nan|infinite); nothing was changed"
    with pytest.raises(bioopt.Diverged, match=message) as diverged:
        optimizer.step(closure)
    named = {name for name, _ in model.named_parameters()} | {"group0.params[0]"}
    assert diverged.value.parameter in named or diverged.value.parameter.startswith("owned.")
    assert diverged.value.norm > 0
    assert diverged.value.lr == optimizer.param_groups[0]["lr"]
    assert same(before, weights(model))
    assert equal_state(state, optimizer.state_dict())


@every_rule
def test_frozen_parameters_stay(case: Case) -> None:
    model = case.cnn()
    model[0].requires_grad_(False)
    optimizer = case.make(model, **many(case))
    before = weights(model)
    steps(optimizer, model, 2)
    assert same(before[:2], weights(model)[:2])
    assert optimizer.coverage(model)[name_of(model, model[0].weight)] == "frozen"


@every_optimizer
def test_hooks_go_with_close_and_with_the_optimizer(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    optimizer.close()
    assert hooks(model) == 0
    optimizer = case.make(model)
    steps(optimizer, model, 1)
    gc.disable()
    try:
        del optimizer  # nothing in it refers back to it, so that it goes at once
        assert hooks(model) == 0
    finally:
        gc.enable()


@every_rule
def test_no_global_hook_stays(case: Case) -> None:
    model = case.cnn()
    steps(case.make(model), model, 1)
    assert not torch.nn.modules.module._has_any_global_hook()


@every_optimizer
def test_lightning_calls_with_a_keyword(case: Case) -> None:
    model = case.cnn()
    optimizer = case.make(model)
    assert optimizer.step(closure=per_sample(optimizer, model, *batch())).shape == (10,)


@pytest.mark.filterwarnings("ignore:.*predict by optimizer.relaxed")
@every_rule
def test_bf16_autocast_inside_and_around_the_closure(case: Case) -> None:
    results = []
    for around in (False, True):
        model = case.cnn(dropout=0.0)
        lr = 0.1 if case.rule is bioopt.HillClimbing else 0.01  # its width, which must not vanish in bfloat16
        # Directions of activities fail in torch's forward derivative of an autocast convolution.
        optimizer = case.make(model, lr, **case.taking(sigma=0.1, space="weights"), **many(case))

        def closure(model=model, optimizer=optimizer, around=around) -> torch.Tensor:
            optimizer.zero_grad()
            give_target(optimizer, batch()[1])
            with nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
                losses = F.cross_entropy(model(batch()[0]).float(), batch()[1], reduction="none")
            if losses.requires_grad:
                losses.mean().backward()
            return losses

        before = model[0].weight.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            with torch.no_grad():
                model.eval()(batch()[0])  # leaves half-precision copies of the weights behind, without a graph
            model.train()
            optimizer.step(closure)
        assert not torch.equal(before, model[0].weight)
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_rule
def test_bf16_parameters(case: Case) -> None:
    model = case.mlp(dtype=torch.bfloat16)
    optimizer = case.make(model, lr=0.1, **case.taking(sigma=0.1))
    x, y = torch.randn(8, 6, dtype=torch.bfloat16), torch.randint(4, (8,))
    before = weights(model)
    give_target(optimizer, y)
    optimizer.step(lambda: F.cross_entropy(model(x).float(), y, reduction="none"))
    assert not same(before, weights(model))


COMPILED_GRADIENTS = (bioopt.Hebbian, bioopt.NodePerturbation, bioopt.ForwardGradient, bioopt.ContrastiveDivergence)


@every_rule
def test_no_samples_teach_nothing(case: Case) -> None:
    """The losses of an empty batch have no entries; their mean would be NaN, which is no divergence."""
    model = case.mlp()
    by_feedback = issubclass(case.rule, FeedbackRule)  # whose weights may decay without samples
    optimizer = case.make(model, **(case.taking(decay=0.0) if by_feedback else {}))
    x, y = torch.rand(8, 6, dtype=torch.float64), torch.arange(8) % 4
    optimizer.step(per_sample(optimizer, model, x, y))
    before = weights(model)
    optimizer.estimate(per_sample(optimizer, model, x[:0], y[:0]))
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    optimizer.step(per_sample(optimizer, model, x, y))
    assert not same(before, weights(model))


@every_rule_by_family
def test_compiled_models(case: Case) -> None:
    """Hooks that are there before the first compiled call fire in it."""
    plain, other = case.cnn(dropout=0.0), case.cnn(dropout=0.0)
    # Adam would make whole steps of the rounding in a zero gradient.
    options = case.taking(descent=torch.optim.SGD, space="weights")
    first, second = case.make(plain, **options), case.make(other, **options)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about graph breaks
        # Gradients inside a layer are other nodes under AOT autograd: one rule of each way to use them is slower.
        backend = "aot_eager" if case.rule in COMPILED_GRADIENTS else "eager"
        compiled = torch.compile(other, backend=backend)
        for i in range(2):
            a = first.step(per_sample(first, plain, *batch(i)))
            b = second.step(per_sample(second, compiled, *batch(i)))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for p, q in zip(weights(plain), weights(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert other[1].num_batches_tracked == 2
    torch.testing.assert_close(plain[1].running_mean, other[1].running_mean)


def equal_state(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_state(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal_state(a, b) for a, b in zip(left, right, strict=True))
    return left == right
