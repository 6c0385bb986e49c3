"""Other people's tools: torch.amp, torch.compile, schedulers; what cannot work says why, and what to do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import bioopt

from .rules import ONE_PASS, SEVERAL_PASSES, batch, cnn, make, per_sample, weights

NAMES = {"ids": lambda rule: rule.__name__}


def mixed(model: nn.Sequential) -> bioopt.Mixed:
    return bioopt.Mixed(bioopt.Hebbian(model[:5], 0.01, readout=None), torch.optim.SGD(model[5:].parameters(), 0.01))


def backward(model: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
    loss = F.cross_entropy(model(batch()[0]), batch()[1])
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize(
    "build", [*(lambda m, rule=rule: make(rule, m) for rule in ONE_PASS), mixed], ids=[*map(str, ONE_PASS), "Mixed"]
)
def test_a_scaled_loss_changes_nothing_for_rules_of_one_pass(build) -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        model = cnn(dropout=0.0)
        optimizer = build(model)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", SEVERAL_PASSES, **NAMES)
def test_a_scaler_is_refused_where_a_closure_is_needed(rule: type) -> None:
    model, scaler = cnn(), torch.amp.GradScaler("cpu")
    optimizer = make(rule, model)
    backward(model, scaler)
    with pytest.raises(RuntimeError, match=rf"{rule.__name__}.*step\(closure\).*GradScaler.*bfloat16"):
        scaler.step(optimizer)


@pytest.mark.parametrize("build", [lambda m: make(bioopt.Hebbian, m, readout=None),
                                   lambda m: bioopt.Mixed(bioopt.Oja(m, 0.1, readout=None))])  # fmt: skip
def test_a_scaler_is_refused_where_nothing_learns_from_a_gradient(build) -> None:
    model, scaler = cnn(), torch.amp.GradScaler("cpu")
    optimizer = build(model)
    backward(model, scaler)
    with pytest.raises(RuntimeError, match=r"GradScaler.*none has reached.*call optimizer\.step itself.*bfloat16"):
        scaler.step(optimizer)


def test_the_product_of_many_events_in_half_precision() -> None:
    """230,400 events: their sum is beyond float16."""
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(1, 8, 3)
        optimizer = bioopt.Hebbian(model, 0.1, readout=None)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            model(3 * torch.rand(256, 1, 32, 32))
        optimizer.estimate()
        grads.append(model.weight.grad)
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("build", [lambda m: bioopt.Hebbian(m, 0.01), mixed], ids=["Hebbian", "Mixed"])
def test_schedulers_count_a_descent_as_a_step(build) -> None:
    model = cnn()
    optimizer = build(model)
    scheduler = CosineAnnealingLR(optimizer, 4)
    optimizer.estimate(per_sample(optimizer, model, *batch()))
    optimizer.descend()
    scheduler.step()  # without a warning


def test_a_model_compiled_too_early_is_explained() -> None:
    torch.compiler.reset()
    model = cnn(dropout=0.0)
    model.compile(backend="aot_eager")
    backward(model, None)
    optimizer = make(bioopt.Hebbian, model)
    optimizer.zero_grad()
    backward(model, None)
    with pytest.raises(RuntimeError, match="compiled model must not run before its optimizer is built"):
        optimizer.step()
    torch.compiler.reset()
    backward(model, None)
    optimizer.step()


def test_fullgraph_is_explained() -> None:
    torch.compiler.reset()
    model = cnn(dropout=0.0)
    optimizer = make(bioopt.Hebbian, model)
    model.compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True out"):
        optimizer.step(per_sample(optimizer, model, *batch()))


@pytest.mark.parametrize(
    "build",
    [lambda m: make(bioopt.NodePerturbation, m), lambda m: make(bioopt.HillClimbing, m), mixed],
    ids=["NodePerturbation", "HillClimbing", "Mixed"],
)
def test_a_compiled_training_step(build) -> None:
    torch.compiler.reset()
    results = []
    for around in (lambda train: train, torch.compile(backend="aot_eager")):
        model = cnn(dropout=0.0)
        optimizer = build(model)

        def train(x: Tensor, y: Tensor, model=model, optimizer=optimizer) -> Tensor:
            return optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))

        train = around(train)
        for i in range(2):
            train(*batch(i))
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
