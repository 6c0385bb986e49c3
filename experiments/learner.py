"""The one place where experiments take training steps: a network, its cost, its optimizer and its learning rate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bioopt
from bioopt.costs import Cost

Batch = tuple[Any, Tensor]  # inputs and labels


@dataclass
class Block:
    """A part of a network that learns from a cost of its own; most networks are a single block."""

    network: nn.Module
    cost: Cost  # to be minimised, with readouts of its own where it needs them
    optimizer: torch.optim.Optimizer  # of the network and the cost
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None  # of the learning rate; None keeps it constant
    name: str = ""  # empty where the block is the whole network
    clip_norm: float | None = None  # to which the gradient is clipped in the backward pass; None does not clip

    @property
    def is_rule(self) -> bool:
        """Whether the optimizer is one of bioopt, which has hooks on the network and counts its forward passes."""
        return isinstance(self.optimizer, bioopt.LearningRule | bioopt.Mixed)

    def closure(self, inputs: Any, labels: Tensor, *, frames: int = 1, amp: bool = False) -> Callable[[], Tensor]:
        """The loss of each sample as the optimizer evaluates it, with a backward pass where gradients are enabled."""
        if isinstance(self.optimizer, bioopt.LearningRule):
            self.optimizer.target = labels  # for readout=teacher

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=amp):
                outputs = self.network(self.cost.corrupt(inputs))
                losses: Tensor = self.cost(outputs, labels, inputs=inputs, steps=frames)
            if losses.requires_grad:
                torch.autograd.backward(losses.mean())
                if self.clip_norm is not None:
                    nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
            return losses

        return closure

    @torch.no_grad()
    def forward_detached(self, inputs: Tensor, *, amp: bool = False) -> Tensor:
        """The input of the next block: this one's output without dropout, corruption or a graph."""
        self.network.eval()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            outputs: Tensor = self.network(inputs)
        self.network.train()
        return outputs.float()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, besides the network's own state."""
        return {
            "cost": self.cost.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.cost.load_state_dict(state["cost"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


@dataclass(eq=False)
class Learner:
    """A network that is trained batch by batch, in one block or in several that exchange no errors."""

    network: nn.Module  # the whole network
    blocks: list[Block]  # its parts, in the order of the network
    _: KW_ONLY
    name: str = ""  # of the learner, in error messages
    rate: str = ""  # the option that sets the learning rate, as "optimizer.lr=0.1", in error messages
    moment: str = ""  # of the training, as "epoch 3", in error messages
    frames: int = 1  # successive images of a sequence, for costs that compare them
    amp: bool = False  # forward passes under bfloat16 autocast
    # Raise `bioopt.Diverged` after each step whose loss is not finite, which waits for the device; without it, the
    # caller uses `check_losses`, less often.
    check: bool = True

    @property
    def last(self) -> Block:
        """The block that ends with the network's outputs."""
        return self.blocks[-1]

    @property
    def forward_passes(self) -> int:
        """Forward passes of a step through the whole network; between blocks there is one more."""
        passes = [block.optimizer.forward_passes if block.is_rule else 1 for block in self.blocks]  # type: ignore[attr-defined]
        return max(passes) + (len(passes) > 1)

    def step(
        self,
        inputs: Any,
        labels: Tensor,
        around: Callable[[Any], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Tensor:
        """Take one step of each block in turn; returns the mean loss of each.

        Args:
            inputs: of the first block; each other block gets the output of the one before, after that one's step.
            labels: of the samples.
            around: a context manager that is given a block's closure and entered around its step.

        Raises:
            bioopt.Diverged: a loss is not finite.
        """
        losses = []
        for block in self.blocks:
            closure = block.closure(inputs, labels, frames=self.frames, amp=self.amp)
            try:
                with around(closure):
                    loss: Any = block.optimizer.step(closure)  # type: ignore[arg-type]
            except RuntimeError as error:
                where = ", ".join(part for part in (self.moment, self.rate) if part)
                error.args = (
                    f"{f'block {block.name}: ' if block.name else ''}{error}{f' ({where})' if where else ''}",
                )
                raise
            losses.append(loss.detach().mean())
            if self.check:
                self.check_losses([float(losses[-1])], [block])
            if block.scheduler is not None:
                block.scheduler.step()
            if block is not self.last:
                inputs = block.forward_detached(inputs, amp=self.amp)
        return torch.stack(losses)

    def check_losses(self, losses: Sequence[float], blocks: Sequence[Block] | None = None) -> None:
        """Raise `bioopt.Diverged` where the loss of a block (by default, of each in turn) is infinite or NaN."""
        for block, loss in zip(blocks or self.blocks, losses, strict=True):
            if not abs(loss) < float("inf"):
                of, when = f" of {block.name}" if block.name else "", f" in {self.moment}" if self.moment else ""
                raise bioopt.Diverged(f"{self.name}: the loss{of} is {loss}{when} with {self.rate}; lower it")

    def fit(self, batches: Iterable[Batch], until: Callable[[], bool] | None = None) -> list[Tensor]:
        """Take a step for each batch, until ``until()``, called after each, returns true; returns `step`'s losses."""
        losses = []
        self.train()
        for inputs, labels in batches:
            losses.append(self.step(inputs, labels))
            if until is not None:
                if until():
                    break
                self.train()
        return losses

    @torch.no_grad()
    def predict(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Outputs in evaluation mode, and labels, of all batches."""
        outputs, labels = zip(*self._outputs(batches), strict=True)
        return torch.cat(outputs), torch.cat(labels)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Mean loss of the last block, and accuracy (a fraction), in evaluation mode."""
        loss: Any = 0.0
        right: Any = 0.0
        count = 0
        for outputs, labels in self._outputs(batches):
            loss = loss + self.last.cost(outputs, labels).sum()
            right = right + (outputs.argmax(1) == labels).sum().float()
            count += len(labels)
        return float(loss) / count, float(right) / count

    def _outputs(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Where a batch holds several views of each image, one after another, their outputs are averaged."""
        self.eval()
        for inputs, labels in batches:
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.amp):
                outputs = self._predicted(inputs)
            yield outputs.float().unflatten(0, (-1, len(labels))).mean(0), labels

    def _predicted(self, inputs: Any) -> Tensor:
        """Of rules that predict in a way of their own, their scores of each class; else the network's outputs."""
        own = [getattr(self.last.optimizer, name, None) for name in ("predict", "relaxed")]
        predict = next((call for call in own if call is not None and len(self.blocks) == 1), self.network)
        outputs: Tensor = predict(inputs)
        return outputs

    def train(self, mode: bool = True) -> None:
        """Put the network and the costs into training mode."""
        self.network.train(mode)
        for block in self.blocks:
            block.network.train(mode)
            block.cost.train(mode)

    def eval(self) -> None:
        """Put the network and the costs into evaluation mode."""
        self.train(False)

    def coverage(self) -> dict[str, str]:
        """What trains each parameter of the network and of the costs, or ``"frozen"``."""
        covered = dict.fromkeys((name for name, _ in self.network.named_parameters()), "frozen")
        for block in self.blocks:
            where = f", {block.name}" if block.name else ""
            for module, prefix in ((self.network, ""), (block.cost, f"cost of {block.name}: ")):
                if isinstance(block.optimizer, bioopt.LearningRule | bioopt.Mixed):
                    found = block.optimizer.coverage(module)
                else:  # plain torch optimizers train the parameters they are given
                    trained = {p for group in block.optimizer.param_groups for p in group["params"] if p.requires_grad}
                    label = type(block.optimizer).__name__
                    found = {name: label if p in trained else "frozen" for name, p in module.named_parameters()}
                covered |= {prefix + name: label + where for name, label in found.items() if label != "frozen"}
        return covered

    def state_dict(self) -> list[dict[str, Any]]:
        """Costs, optimizers and schedules of all blocks; the network's own state is not among them."""
        return [block.state_dict() for block in self.blocks]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore what `state_dict` returned."""
        for block, of_block in zip(self.blocks, state, strict=True):
            block.load_state_dict(of_block)

    def close(self) -> None:
        """Remove the hooks of learning rules from the network."""
        for block in self.blocks:
            if isinstance(block.optimizer, bioopt.LearningRule | bioopt.Mixed):
                block.optimizer.close()
