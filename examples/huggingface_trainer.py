"""Hugging Face's Trainer: pass the rule as `optimizers=`; `RuleTrainer` lets it write `.grad`.

The Trainer runs a backward pass, clips `.grad` (by default) and calls `optimizer.step()` without a closure. Rules of
one forward pass work in the plain Trainer with `max_grad_norm=0`. `RuleTrainer` is for clipping, and for all other
rules: it calls `rule.estimate(closure)` in place of the backward pass, so that the rule's own update is accumulated,
clipped and applied. `bf16=True`, schedulers and `resume_from_checkpoint` work as well; `fp16=True` only for rules of
one forward pass in the plain Trainer. To set an attribute of a rule, such as `modulator`, keep a reference to the rule,
as here: `trainer.optimizer` is a wrapper, which does not pass attributes on.
"""

import tempfile
from typing import Any

import torch.nn.functional as F
from digits import accuracy, images, labels, network, train
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

import bioopt


class Digits(nn.Module):
    """A network in the form that the Trainer takes: inputs by name, and the loss among the outputs."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.network = network()
        self.reduction = reduction

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and the loss where there are labels."""
        logits = self.network(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels, reduction=self.reduction), "logits": logits}


class RuleTrainer(Trainer):
    """A Trainer for every rule, with an estimate in place of each backward pass."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the rule's estimate to `.grad`; the Trainer's `optimizer.step()` descends along the sum."""
        model.train()
        inputs = self._prepare_inputs(inputs)

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, dict(inputs))

        params = list(model.parameters())
        before = [p.grad for p in params]  # of earlier micro-batches
        share = 1 / self.current_gradient_accumulation_steps
        loss = share * self.optimizer.optimizer.estimate(closure).mean()
        for p, earlier in zip(params, before, strict=True):
            if p.grad is not None:
                p.grad = share * p.grad + (0 if earlier is None else earlier)
        return loss


def fit(trainer: type[Trainer], model: Digits, rule: bioopt.LearningRule, **options: Any) -> float:
    """Train for ten epochs; returns the accuracy."""
    data = [{"pixel_values": images[i], "labels": labels[i]} for i in train]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=10, per_device_train_batch_size=32, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no", save_strategy="no", **options,
        )  # fmt: skip
        loop = trainer(model, arguments, train_dataset=data, optimizers=(rule, None))
        loop.remove_callback(PrinterCallback)
        loop.train()
    return accuracy(model.network)


if __name__ == "__main__":
    model = Digits()
    print(f"before training: {accuracy(model.network):.1f} % of the unseen digits")

    rule = bioopt.Hebbian(model)
    print(f"Hebbian, plain Trainer: {fit(Trainer, model, rule, max_grad_norm=0):.1f} %")

    model = Digits()
    rule = bioopt.Hebbian(model)
    print(f"Hebbian, in bfloat16 and clipped: {fit(RuleTrainer, model, rule, bf16=True, max_grad_norm=0.5):.1f} %")

    model = Digits(reduction="none")  # the loss of each sample, so that each gets its own credit
    rule = bioopt.NodePerturbation(model, lr=0.02, sigma=0.01, relative=False, samples=4, momentum=0.9)
    accumulated = fit(RuleTrainer, model, rule, max_grad_norm=2.0, gradient_accumulation_steps=2)
    print(f"node perturbation, clipped and accumulated: {accumulated:.1f} %")
