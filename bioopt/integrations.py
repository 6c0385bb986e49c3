"""Other people's tools and training loops: what cannot work there is refused with a recipe that does.

None of these packages is imported here; they are recognised by their objects or by the modules on the call stack.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["recipe", "refuse_scaler", "refuse_trainer_options"]

#: for each package with a training loop of its own, what to do there about a rule that needs a closure
RECIPES = {
    "transformers": (
        "Hugging Face's Trainer calls step() without one: override training_step() to call rule.estimate(closure) in "
        "place of the backward pass, as RuleTrainer does in examples/huggingface_trainer.py"
    ),
    "accelerate": (
        "With accelerate, call step(closure) of the prepared optimizer, or optimizer.optimizer.estimate(closure) in "
        "place of accelerator.backward(loss), as in examples/accelerate_loop.py"
    ),
    "skorch": (
        "With skorch, use a net without AccelerateMixin, whose train_step() hands a closure to the optimizer, as in "
        "examples/skorch_net.py"
    ),
    "ignite": (
        "With Ignite, give Engine an update function of your own that calls optimizer.step(closure), in place of "
        "create_supervised_trainer, as in examples/ignite_engine.py"
    ),
    "lightning": (
        "Lightning's automatic optimization hands one over, except with precision '16-mixed'; in manual optimization, "
        "call optimizer.step(closure) yourself; see examples/lightning_fit.py"
    ),
}
RECIPES["pytorch_lightning"] = RECIPES["lightning"]


def recipe() -> str:
    """A sentence on the training loop that is on the call stack, with a space before it; empty where there is none."""
    found = [RECIPES[package] for _, package in _callers() if package in RECIPES]
    return f" {found[-1]}." if found else ""  # the outermost: the loop, not a wrapper inside it


def refuse_scaler(optimizer: Optimizer) -> bool:
    """Raise where a GradScaler, finding nothing to scale, would fail without a word on why."""
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            f"{type(optimizer).__name__}: torch.amp.GradScaler rescues small gradients of a backward pass, and none "
            "has reached a parameter here. Where nothing learns from a backward pass (readout=None or 'teacher', "
            "perturbation), call optimizer.step itself, under autocast in bfloat16, which needs no scaler"
        )
    return False  # it does not unscale by itself


def refuse_trainer_options(rule: str, closure: Callable[[], Any]) -> None:
    """Raise where Lightning would accumulate or clip inside the closure, in vain: the rule writes ``.grad`` later."""
    # Lightning gives partial(..., module, optimizer, closure): recognised without importing it.
    module = next((a for a in getattr(closure, "args", ()) if isinstance(a, nn.Module)), None)
    trainer = getattr(module, "_trainer", None)  # `trainer` raises where there is none
    for option, off in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
        value = getattr(trainer, option, off)
        if value not in (off, 0):
            raise RuntimeError(
                f"{rule}: Trainer({option}={value}) works on what backward leaves in .grad, but the rule makes .grad "
                "after the closure, from this closure's batch alone. Override optimizer_step(self, epoch, batch, "
                "optimizer, closure) of your LightningModule, with rule = optimizer.optimizer: for a rule of one "
                "forward pass, closure(); rule.estimate(); self.clip_gradients(rule); rule.descend(), which also takes "
                "in what has been accumulated; for a rule of several, rule.estimate(closure) and so on, with larger "
                "batches in place of accumulation"
            )


def _callers() -> Iterator[tuple[FrameType, str]]:
    """The frames on the call stack, innermost first, each with the name of its package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame, str(frame.f_globals.get("__name__", "")).partition(".")[0]
        frame = frame.f_back
