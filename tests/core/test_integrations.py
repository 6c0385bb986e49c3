"""torch.amp, torch.compile, schedulers and Lightning: what cannot work is refused with the reason and a way out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import bioopt

from ..rules import (
    CASES,
    MIXED,
    ONE_PASS,
    SEVERAL_PASSES,
    Case,
    batch,
    cnn,
    give_target,
    make,
    mixed,
    per_sample,
    published,
    same,
    steps,
    weights,
)


def backward(model: nn.Module, scaler: torch.amp.GradScaler | None, optimizer: Any = None) -> None:
    give_target(optimizer, batch()[1])
    loss = F.cross_entropy(model(batch()[0]), batch()[1])
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize("case", [*ONE_PASS, MIXED], ids=str)
def test_a_scaled_loss_changes_nothing_for_rules_of_one_pass(case: Case) -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        model = case.cnn(dropout=0.0)
        optimizer = case.make(model, **case.taking(readout="delta"))
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, scaler, optimizer)
            if scaler is None:
                optimizer.step()
            elif not optimizer.scales_with_loss:
                with pytest.raises(RuntimeError, match=rf"{case.name}: .*GradScaler scales the loss, but not all"):
                    scaler.step(optimizer)
                return
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", SEVERAL_PASSES, ids=str)
def test_a_scaler_is_refused_where_a_closure_is_needed(case: Case) -> None:
    model, scaler = case.cnn(), torch.amp.GradScaler("cpu")
    optimizer = case.make(model)
    backward(model, scaler)
    with pytest.raises(RuntimeError, match=rf"{case.name}.*step\(closure\).*GradScaler.*bfloat16"):
        scaler.step(optimizer)


@pytest.mark.parametrize("build", [lambda m: make(bioopt.Hebbian, m, readout=None),
                                   lambda m: bioopt.Mixed(published.Oja(m, 0.1, readout=None))])  # fmt: skip
def test_a_scaler_is_refused_where_nothing_learns_from_a_gradient(build) -> None:
    model, scaler = cnn(), torch.amp.GradScaler("cpu")
    optimizer = build(model)
    backward(model, scaler)
    with pytest.raises(RuntimeError, match=r"GradScaler.*none has reached.*call optimizer\.step itself.*bfloat16"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    "build", [lambda m: make(bioopt.NodePerturbation, m), mixed], ids=["NodePerturbation", "Mixed"]
)
def test_a_scaler_is_refused_after_an_estimate(build) -> None:
    model, scaler = cnn(), torch.amp.GradScaler("cpu")
    optimizer = build(model)
    optimizer.estimate(per_sample(optimizer, model, *batch()))
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"GradScaler would divide what estimate\(\) has written.*descend\(\)"):
        scaler.step(optimizer)


def test_the_product_of_many_events_in_half_precision() -> None:
    """230,400 events: their sum is beyond float16."""
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(1, 8, 3)
        optimizer = published.Hebbian(model, 0.1, readout=None)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            model(3 * torch.rand(256, 1, 32, 32))
        optimizer.estimate()
        grads.append(model.weight.grad)
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("build", [lambda m: published.Hebbian(m, 0.01), mixed], ids=["Hebbian", "Mixed"])
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_closure_may_run_micro_batches(case: Case) -> None:
    """They are one batch; a rule that credits each sample with its own loss refuses them."""
    results = []
    for size in (8, 3) if getattr(case.rule, "scales_with_loss", True) else (8, 8):
        model = case.mlp()
        optimizer = case.make(model, lr=0.1, **case.taking(persistent=True))  # or samples would differ
        x, y = batch(n=8)
        x = x.flatten(1)[:, :6].double()

        def one(a: Tensor, b: Tensor, model=model, optimizer=optimizer) -> Tensor:
            give_target(optimizer, b)
            return F.cross_entropy(model(a), b, reduction="none")

        def closure(model=model, optimizer=optimizer, x=x, y=y % 4, size=size, one=one) -> Tensor:
            optimizer.zero_grad()
            parts = zip(x.split(size), y.split(size), strict=True)
            new = getattr(optimizer, "new_sequence", lambda: None)  # of rules that know time
            losses = torch.cat([one(a, b) for a, b in parts if new() is None])
            if losses.requires_grad:
                losses.mean().backward()
            return losses

        per_weight = getattr(optimizer, "space", "activities") == "weights"
        if size == 3 and getattr(optimizer, "credit", "global") == "sample" and not per_weight:
            with pytest.raises(
                RuntimeError, match=r"several micro-batches, estimate each by itself, add up their \.grad"
            ):
                optimizer.step(closure)
            return
        if size == 3 and case.chain:
            with pytest.raises(RuntimeError, match="ran twice in one evaluation"):
                optimizer.step(closure)
            return
        optimizer.step(closure)
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class TestLightning:
    """What its Trainer does inside the closure would be lost, and is refused; a step of one's own makes use of it."""

    @staticmethod
    def fit(
        build: Callable[[nn.Module], Optimizer],
        own_step: bool,
        training_step: Callable[[Any, Tensor], None] | None = None,
        **options: Any,
    ) -> nn.Module:
        import lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = cnn(dropout=0.0)
                self.automatic_optimization = training_step is None

            def training_step(self, index: Tensor) -> Tensor | None:
                if training_step is not None:
                    return training_step(self, index)
                x, y = batch(int(index))
                return F.cross_entropy(self.model(x), y)

            def configure_optimizers(self) -> Optimizer:
                return build(self.model)

            if own_step:

                def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any) -> None:
                    rule = optimizer.optimizer
                    closure()
                    rule.estimate()
                    self.clip_gradients(rule)
                    rule.descend()

        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet, **options)
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(torch.arange(4), batch_size=None))
        return module.model

    @pytest.mark.parametrize("option", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}])
    @pytest.mark.parametrize(
        "build",
        [lambda m: published.Hebbian(m, 0.01), lambda m: make(bioopt.WeightPerturbation, m), mixed],
        ids=["Hebbian", "WeightPerturbation", "Mixed"],
    )
    def test_options_that_would_be_lost_are_refused(self, build, option: dict) -> None:
        with pytest.raises(RuntimeError, match=rf"Trainer\({next(iter(option))}=.*Override optimizer_step"):
            self.fit(build, own_step=False, **option)

    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.NodePerturbation])
    def test_manual_optimization_takes_the_step_of_the_rule_itself(self, rule: type, own: bool) -> None:
        def training_step(module: Any, index: Tensor) -> None:
            x, y = batch(int(index))
            optimizer = module.optimizers(use_pl_optimizer=not own)
            optimizer.zero_grad()
            if own and rule is bioopt.NodePerturbation:
                optimizer.step(lambda: F.cross_entropy(module.model(x), y, reduction="none"))
            else:
                module.manual_backward(F.cross_entropy(module.model(x), y))
                optimizer.step()

        with nullcontext() if own else pytest.raises(RuntimeError, match=r"manual.*use_pl_optimizer=False.*examples/"):
            trained = self.fit(partial(make, rule), own_step=False, training_step=training_step)
        if own:
            model = cnn(dropout=0.0)
            steps(make(rule, model), model, 4)
            for a, b in zip(weights(trained), weights(model), strict=True):
                torch.testing.assert_close(a, b)

    def test_a_scaler_names_the_recipe(self) -> None:
        from lightning.pytorch.plugins import MixedPrecision

        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        with pytest.raises(RuntimeError, match=r"step\(closure\), where.*'bf16-mixed'.*examples/lightning_fit\.py"):
            self.fit(partial(make, bioopt.NodePerturbation), own_step=False, plugins=[precision])

    @pytest.mark.parametrize("build", [lambda m: published.Hebbian(m, 0.1), mixed], ids=["Hebbian", "Mixed"])
    def test_a_step_of_ones_own_accumulates_and_clips(self, build) -> None:
        by_lightning = self.fit(build, own_step=True, accumulate_grad_batches=2, gradient_clip_val=0.1)
        model = cnn(dropout=0.0)
        optimizer = build(model)
        for step in range(2):
            optimizer.zero_grad()
            for i in (2 * step, 2 * step + 1):
                x, y = batch(i)
                (F.cross_entropy(model(x), y) / 2).backward()
            optimizer.estimate()
            clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
            optimizer.descend()
        assert same(weights(by_lightning), weights(model))
