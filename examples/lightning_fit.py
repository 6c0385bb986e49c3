"""Lightning, with its automatic optimisation: return the rule from `configure_optimizers`.

Schedulers, checkpoints and precision "bf16-mixed" work as well (not "16-mixed", whose scaler makes the step itself).
`Trainer(gradient_clip_val=...)` and `Trainer(accumulate_grad_batches=...)` act on the `.grad` of the backward pass,
before the rule writes its own: they are refused with an error, unless you make the step yourself, as `OwnStep` does.
Lightning's wrapper calls `step` with a closure of its own and does not pass attributes on: in manual optimization, and
to set an attribute such as `modulator`, use the rule itself, `self.optimizers(use_pl_optimizer=False)`.
"""

import logging
from typing import Any

import lightning
import torch.nn.functional as F
from digits import accuracy, images, labels, network, train
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import bioopt


class Digits(lightning.LightningModule):
    """A Hebbian network."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss, whose backward pass reaches the readout only."""
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> Any:
        """A rule in place of torch's optimizer."""
        rule = bioopt.Hebbian(self.model)
        return {"optimizer": rule, "lr_scheduler": CosineAnnealingLR(rule, self.trainer.max_epochs)}


class OwnStep(Digits):
    """The same, with accumulation and clipping by the Trainer's own options."""

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any) -> None:
        """The last micro-batch, then a step from all of them."""
        rule = optimizer.optimizer  # out of Lightning's wrapper
        closure()
        rule.estimate()
        self.clip_gradients(rule)
        rule.descend()


class Perturbed(Digits):
    """Node perturbation, without a backward pass."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of each sample, so that each gets its own credit."""
        x, y = batch
        return F.cross_entropy(self.model(x), y, reduction="none")

    def backward(self, loss: Tensor) -> None:
        """No backward pass."""

    def configure_optimizers(self) -> Any:
        """A rule that evaluates `training_step` several times a step."""
        return bioopt.NodePerturbation(self.model, lr=0.01, sigma=0.01, relative=False, samples=4, momentum=0.9)


def fit(module: Digits, **options: Any) -> float:
    """Train for ten epochs; returns the accuracy."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(max_epochs=10, accelerator="cpu", **quiet, **options)
    trainer.fit(module, DataLoader(TensorDataset(images[train], labels[train]), batch_size=32, shuffle=True))
    return accuracy(module.model)


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
print(f"Hebbian, in bfloat16: {fit(Digits(), precision='bf16-mixed'):.1f} % of the unseen digits")
print(f"Hebbian, accumulated and clipped: {fit(OwnStep(), accumulate_grad_batches=2, gradient_clip_val=1.0):.1f} %")
print(f"node perturbation: {fit(Perturbed()):.1f} %")
