"""`Diverged`, the check that raises it, and warnings that point at the user's line."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

__all__ = ["Diverged"]


RUNAWAY = 1e4  # the mean change of a layer's weights in one step of gradient descent that is called divergence


class Diverged(RuntimeError):
    """A loss, an update or a state is infinite or NaN, or a step would be far too large; nothing was changed.

    Attributes:
        parameter: the name of the weights with the largest norm.
        norm: their norm.
        lr: their learning rate.
    """

    def __init__(
        self, message: str, parameter: str | None = None, norm: float = math.nan, lr: float = math.nan
    ) -> None:
        super().__init__(message)
        self.parameter, self.norm, self.lr = parameter, norm, lr


def is_captured(tensors: list[Tensor]) -> bool:
    """Whether operations on these tensors are being captured in a CUDA graph."""
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


def require_finite(optimizer: Optimizer, what: str, tensors: list[Tensor]) -> float:
    """Raise `Diverged` if any entry is infinite or NaN; ``what`` names the tensors in the message.

    Returns:
        the norm of all entries together; 0 where no value can be read.
    """
    if is_captured(tensors) or not tensors:
        return 0.0
    if math.isfinite(total := torch.nn.utils.get_total_norm(tensors).item()):
        return total
    found = "nan" if math.isnan(total) else "infinite"
    name, norm, lr = _largest(optimizer)
    raise Diverged(
        f"{type(optimizer).__name__}: {what} is {found}; nothing was changed. The largest weights are '{name}', of "
        f"norm {norm:.3g} with lr={lr:g}: try lr={lr / 10:g} if they have diverged; else check the data",
        name,
        norm,
        lr,
    )


def require_steady(optimizer: Optimizer, grads: dict[Tensor, Tensor], total: float) -> None:
    """Raise `Diverged` if a step along these gradients would change the weights of a layer beyond all measure.

    Args:
        optimizer: with the learning rates.
        grads: of its parameters.
        total: the norm of all gradients, an upper bound that is known already.
    """
    for group, named in _named(optimizer):
        lr = float(group["lr"])
        if lr * total <= RUNAWAY or group.get("standardised"):  # which is stable, and large where its input is small
            continue
        for name, p in named:
            change = lr * grads[p].norm().item() / math.sqrt(p.numel()) if p in grads else 0.0
            if change > RUNAWAY:
                raise Diverged(
                    f"{type(optimizer).__name__}: this step would change each weight of '{name}' by {change:.3g} on "
                    f"average, with lr={lr:g}: it diverges; nothing was changed. Try lr={lr / 10:g}, a normalisation "
                    "layer, or the defaults of the rule",
                    name,
                    p.detach().norm().item(),
                    lr,
                )


def _named(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
    """Each group, and its parameters with their names."""
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", [f"group{i}.params[{j}]" for j in range(len(group["params"]))])
        yield group, list(zip(names, group["params"], strict=True))


def _largest(optimizer: Optimizer) -> tuple[str, float, float]:
    """The parameter of the largest or a non-finite norm, with its norm and learning rate."""
    found = [
        (name, p.detach().norm().item(), float(group["lr"]))
        for group, named in _named(optimizer)
        for name, p in named
        if not is_lazy(p)
    ]
    return max(found, key=lambda entry: (not math.isfinite(entry[1]), entry[1]))


def require_graph(rule: str, layer: str, u: Tensor, why: str) -> None:
    """Raise where the activity of a layer has no graph, because it ran under ``no_grad``.

    Args:
        rule: its name.
        layer: its name.
        u: the activity.
        why: what is not possible there.
    """
    if not (u.requires_grad and torch.is_grad_enabled()):
        raise RuntimeError(
            f"{rule}: layer '{layer}' ran under no_grad, where {why}: in activation checkpointing write "
            "checkpoint(..., use_reentrant=False)"
        )


def loss_of_no_layer(rule: str) -> str:
    """The message about a loss that reaches no layer."""
    return (
        f"{rule} learns from the loss, but it depends on no layer of the rule: the closure must return the loss as a "
        "tensor with its graph, or call backward() itself"
    )


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside of bioopt and torch that led here."""
    level = 2
    for depth, frame in enumerate(inspect.stack()[1:], start=2):
        if not frame.frame.f_globals.get("__name__", "").startswith(("bioopt", "torch", "contextlib")):
            level = depth
            break
    warnings.warn(message, category, stacklevel=level)
