"""Rules in the training loops of Hugging Face, skorch and Ignite: equal to a plain loop, or refused with a recipe.

Lightning's is in test_tools.py. The packages take seconds to import, so each is imported where it is used.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import bioopt

from ..commands import ROOT
from ..rules import batch, cnn, make, mixed, mlp, published, same, weights

PAGE = (ROOT / "docs" / "other_loops.md").read_text()
NEEDS_CLOSURE = r"NodePerturbation.*step\(closure\), where.*"


def hebbian(model: nn.Module) -> bioopt.Hebbian:
    return published.Hebbian(model, 0.1, readout_lr=0.05)


def perturbation(model: nn.Module) -> bioopt.LearningRule:
    return make(bioopt.NodePerturbation, model)


ALL = {"argvalues": [hebbian, mixed, perturbation], "ids": ["Hebbian", "Mixed", "NodePerturbation"]}


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example defines."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return runpy.run_path(str(ROOT / "examples" / name))


def recipe(heading: str, **names: Any) -> dict[str, Any]:
    """What the code of a section of the page defines."""
    (code,) = re.findall(r"```py\n(.*?)```", PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0], re.DOTALL)
    exec(code, names := {"F": F, "bioopt": bioopt, **names})
    return names


def by_hand(build: Callable[[nn.Module], Any], clip: float, micro: int = 1) -> list[Tensor]:
    """Two clipped steps of some micro-batches each."""
    model = cnn(dropout=0.0)
    rule = build(model)
    params = list(model.parameters())
    for step in range(2):
        total = [torch.zeros_like(p) for p in params]
        for i in range(micro * step, micro * (step + 1)):
            x, y = batch(i)
            rule.estimate(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none"))
            for sum_, p in zip(total, params, strict=True):
                sum_ += (0 if p.grad is None else p.grad) / micro
        for sum_, p in zip(total, params, strict=True):
            p.grad = sum_ if p.grad is not None else None
        clip_grad_norm_(params, clip)
        rule.descend()
    return weights(model)


@pytest.mark.usefixtures("fresh_accelerate")
class TestHuggingFaceTrainer:
    @staticmethod
    def fit(trainer: type, build: Callable[[nn.Module], Optimizer], folder: Any, **options: Any) -> nn.Module:
        from transformers import PrinterCallback, TrainingArguments

        class Classifier(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = cnn(dropout=0.0)

            def forward(self, index: Tensor) -> dict[str, Tensor]:
                x, y = batch(int(index))
                reduction = "mean" if trainer.__name__ == "Trainer" else "none"
                return {"loss": F.cross_entropy(self.model(x), y, reduction=reduction)}

        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True,
            logging_strategy="no", save_strategy="no", lr_scheduler_type="constant", **options,
        )  # fmt: skip
        model = Classifier()
        rule = build(model.model)
        count = 2 * options.get("gradient_accumulation_steps", 1)
        loop = trainer(model, arguments, train_dataset=[{"index": i} for i in range(count)], optimizers=(rule, None))
        loop._get_train_sampler = lambda *args: None  # in order
        loop.remove_callback(PrinterCallback)
        loop.train()
        return model.model

    @pytest.mark.parametrize("build", **ALL)
    @pytest.mark.parametrize("micro", [1, 2])
    def test_the_trainer_of_the_example_clips_and_accumulates(self, build, micro, monkeypatch, tmp_path) -> None:
        trainer = example("huggingface_trainer.py", monkeypatch)["RuleTrainer"]
        found = self.fit(trainer, build, tmp_path, max_grad_norm=0.05, gradient_accumulation_steps=micro)
        for a, b in zip(weights(found), by_hand(build, 0.05, micro), strict=True):
            torch.testing.assert_close(a, b)

    def test_the_trainer_of_the_page(self, tmp_path) -> None:
        import transformers

        trainer = recipe("Hugging Face Trainer", transformers=transformers)["RuleTrainer"]
        found = self.fit(trainer, perturbation, tmp_path, max_grad_norm=0.05)
        assert same(weights(found), by_hand(perturbation, 0.05))

    @pytest.mark.parametrize("build", [hebbian, mixed], ids=["Hebbian", "Mixed"])
    def test_rules_of_one_pass_take_the_trainer_as_it_is(self, build, tmp_path) -> None:
        from transformers import Trainer

        found = self.fit(Trainer, build, tmp_path, max_grad_norm=0)
        for a, b in zip(weights(found), by_hand(build, float("inf")), strict=True):
            torch.testing.assert_close(a, b)

    def test_parameters_in_place_of_the_model_name_the_recipe(self, tmp_path) -> None:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
        trainer = Trainer(cnn(), arguments, optimizer_cls_and_kwargs=(bioopt.Hebbian, {"lr": 0.1}))
        with pytest.raises(TypeError, match=r"not Hebbian\(model\.parameters.*optimizers=.*huggingface_trainer\.py"):
            trainer.create_optimizer()

    @pytest.mark.parametrize("build", **ALL)
    def test_clipping_in_vain_is_refused(self, build, tmp_path) -> None:
        from transformers import Trainer

        with pytest.raises(RuntimeError, match=r"TrainingArguments\(max_grad_norm=1.0\).*huggingface_trainer\.py"):
            self.fit(Trainer, build, tmp_path)

    def test_a_rule_that_needs_a_closure_names_the_recipe(self, tmp_path) -> None:
        from transformers import Trainer

        with pytest.raises(RuntimeError, match=NEEDS_CLOSURE + r"examples/huggingface_trainer\.py.*estimate\("):
            self.fit(Trainer, perturbation, tmp_path, max_grad_norm=0)


class TestAccelerate:
    @pytest.fixture
    def prepared(self, fresh_accelerate: None) -> Callable[..., tuple[Any, nn.Module, Any]]:
        from accelerate import Accelerator

        def prepared(build: Callable[[nn.Module], Optimizer], **options: Any) -> tuple[Any, nn.Module, Any]:
            accelerator = Accelerator(cpu=True, **options)
            model = cnn(dropout=0.0)
            return accelerator, model, accelerator.prepare(build(model))

        return prepared

    @pytest.mark.parametrize("build", **ALL)
    def test_an_estimate_in_place_of_backward(self, build, prepared) -> None:
        accelerator, model, optimizer = prepared(build)
        for i in range(2):
            x, y = batch(i)
            closure = partial(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), x, y)
            names = recipe("accelerate", accelerator=accelerator, model=model, optimizer=optimizer, closure=closure)
            assert names["losses"].shape == y.shape
        assert same(weights(model), by_hand(build, 1.0))

    @pytest.mark.parametrize("build", **ALL)
    def test_a_closure_goes_through(self, build, prepared) -> None:
        _, model, optimizer = prepared(build)
        for i in range(2):
            x, y = batch(i)
            assert optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none")) is None
        assert same(weights(model), by_hand(build, float("inf")))

    def test_rules_of_one_pass_accumulate(self, prepared) -> None:
        accelerator, model, optimizer = prepared(hebbian, gradient_accumulation_steps=2)
        start = weights(model)
        for i in range(2):
            with accelerator.accumulate(model):
                x, y = batch(i)
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            assert same(start, weights(model)) == (i == 0)

    @pytest.mark.parametrize("build", **ALL)
    def test_accumulation_of_closures_is_refused(self, build, prepared) -> None:
        accelerator, model, optimizer = prepared(build, gradient_accumulation_steps=2)
        x, y = batch()
        closure = lambda: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
        with accelerator.accumulate(model):
            optimizer.step(closure)  # which accelerate drops
        with (
            accelerator.accumulate(model),
            pytest.raises(RuntimeError, match=r"gradient_accumulation_steps=2.*examples/accelerate_loop\.py"),
        ):
            optimizer.step(closure)
        optimizer.optimizer.step(closure)  # not by accelerate: as you like

    def test_a_rule_that_needs_a_closure_names_the_recipe(self, prepared) -> None:
        accelerator, model, optimizer = prepared(perturbation)
        accelerator.backward(F.cross_entropy(model(batch()[0]), batch()[1]))
        with pytest.raises(RuntimeError, match=NEEDS_CLOSURE + r"examples/accelerate_loop\.py"):
            optimizer.step()

    def test_a_scaler_names_the_recipe(self, prepared) -> None:
        """Accelerator(mixed_precision="fp16") gives the wrapper one; that takes a GPU."""
        from accelerate.optimizer import AcceleratedOptimizer

        _, model, optimizer = prepared(perturbation)
        scaled = AcceleratedOptimizer(optimizer.optimizer, scaler=torch.amp.GradScaler("cpu"))
        scaled.scaler.scale(torch.ones(()))
        with pytest.raises(RuntimeError, match=r"GradScaler.*bfloat16.*examples/accelerate_loop\.py"):
            scaled.step(lambda: F.cross_entropy(model(batch()[0]), batch()[1], reduction="none"))


class TestSkorch:
    @staticmethod
    def fit(kind: type, build: Callable[[nn.Module], Optimizer], **options: Any) -> nn.Module:
        class Net(kind):  # type: ignore[misc]
            def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
                self.optimizer_ = build(self.module_)
                return self

        x, y = (torch.cat(parts) for parts in zip(batch(0), batch(1), strict=True))
        net = Net(
            lambda: cnn(dropout=0.0), criterion=nn.CrossEntropyLoss, max_epochs=1, batch_size=len(x) // 2,
            train_split=None, verbose=0, **options,
        )  # fmt: skip
        return net.fit(x, y).module_

    @pytest.mark.parametrize("build", **ALL)
    @pytest.mark.parametrize(("kind", "clip"), [("RuleNet", float("inf")), ("ClippedNet", 2.0)])
    def test_the_nets_of_the_example(self, build, kind, clip, monkeypatch) -> None:
        net = example("skorch_net.py", monkeypatch)[kind]
        found = self.fit(net, build, criterion__reduction="none")
        assert same(weights(found), by_hand(build, clip))

    def test_the_net_of_the_page(self) -> None:
        import skorch

        with torch.random.fork_rng():
            net = recipe("skorch", skorch=skorch, Network=mlp)["net"].set_params(
                criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0, train_split=None, module__dtype=torch.float32
            )
            net.fit(torch.randn(8, 6), torch.arange(8) % 4)
        assert isinstance(net.optimizer_, bioopt.Hebbian)
        assert [group["lr"] for group in net.optimizer_.param_groups] == [0.1, 1.0]

    @pytest.mark.parametrize("build", [hebbian, mixed], ids=["Hebbian", "Mixed"])
    def test_rules_of_one_pass_take_a_net_as_it_is(self, build) -> None:
        from skorch import NeuralNetClassifier

        for a, b in zip(weights(self.fit(NeuralNetClassifier, build)), by_hand(build, float("inf")), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("rule", [bioopt.Hebbian, bioopt.NodePerturbation], ids=lambda rule: rule.__name__)
    def test_parameters_in_place_of_the_module_name_the_recipe(self, rule: type) -> None:
        from skorch import NeuralNetClassifier

        net = NeuralNetClassifier(cnn, optimizer=rule, optimizer__sigma=0.01)
        if rule is bioopt.Hebbian:
            net.set_params(optimizer__sigma=None)
        with pytest.raises(TypeError, match=rf"{rule.__name__}\(model\.parameters\(\).*examples/skorch_net\.py"):
            net.initialize()

    def test_a_needless_backward_pass_names_the_recipe(self) -> None:
        from skorch import NeuralNetClassifier

        with pytest.warns(UserWarning, match=r"needs no backward pass.*examples/skorch_net\.py"):
            self.fit(NeuralNetClassifier, perturbation)

    @pytest.mark.parametrize("build", **ALL)
    def test_clipping_in_vain_is_refused(self, build) -> None:
        from skorch import NeuralNetClassifier
        from skorch.callbacks import GradientNormClipping

        options: dict[str, Any] = {"callbacks": [("clip", GradientNormClipping(1.0))]}
        with pytest.raises(RuntimeError, match=r"callback clip, GradientNormClipping.*=1.0.*examples/skorch_net\.py"):
            self.fit(NeuralNetClassifier, build, **options)
        self.fit(NeuralNetClassifier, hebbian, **options, callbacks__clip__gradient_clip_value=None)

    @pytest.mark.usefixtures("fresh_accelerate")
    def test_a_rule_that_needs_a_closure_names_the_recipe(self) -> None:
        from accelerate import Accelerator
        from skorch import NeuralNetClassifier
        from skorch.hf import AccelerateMixin

        class Accelerated(AccelerateMixin, NeuralNetClassifier):
            pass

        with pytest.raises(RuntimeError, match=NEEDS_CLOSURE + r"examples/skorch_net\.py.*AccelerateMixin"):
            self.fit(Accelerated, perturbation, accelerator=Accelerator(cpu=True))


class TestIgnite:
    @staticmethod
    def data() -> list[tuple[Tensor, Tensor]]:
        return [batch(i) for i in range(2)]

    @pytest.mark.parametrize("build", [hebbian, mixed], ids=["Hebbian", "Mixed"])
    def test_rules_of_one_pass_take_the_trainer_as_it_is(self, build) -> None:
        from ignite.engine import create_supervised_trainer

        model = cnn(dropout=0.0)
        create_supervised_trainer(model, build(model), F.cross_entropy).run(self.data(), 1)
        for a, b in zip(weights(model), by_hand(build, float("inf")), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("build", **ALL)
    def test_the_engine_of_the_page(self, build) -> None:
        from ignite.engine import Engine

        model = cnn(dropout=0.0)
        recipe("PyTorch-Ignite", Engine=Engine, model=model, rule=build(model), loader=self.data()[:1])
        one = cnn(dropout=0.0)
        rule, (x, y) = build(one), batch()
        for _ in range(10):
            rule.step(lambda: F.cross_entropy(one(x), y, reduction="none"))
        assert same(weights(model), weights(one))

    @pytest.mark.parametrize("amp", [None, "amp"])
    @pytest.mark.filterwarnings("ignore:CUDA is not available")
    def test_a_rule_that_needs_a_closure_names_the_recipe(self, amp) -> None:
        from ignite.engine import create_supervised_trainer

        model = cnn(dropout=0.0)
        scaler = torch.amp.GradScaler("cpu") if amp else None
        trainer = create_supervised_trainer(model, perturbation(model), F.cross_entropy, amp_mode=amp, scaler=scaler)
        with pytest.raises(RuntimeError, match=NEEDS_CLOSURE + r"Engine.*examples/ignite_engine\.py.*GradScaler"):
            trainer.run(self.data(), 1)
