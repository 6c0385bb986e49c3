"""`diagnose`: a rule's updates compared with the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .core.probe import Closure, Probe, restoring_grad_mode, settled
from .core.rule import LearningRule

__all__ = ["diagnose"]

_T = TypeVar("_T")


def diagnose(optimizer: LearningRule, closure: Closure, samples: int = 4) -> dict[str, dict[str, float]]:
    """Compare a rule's next updates with the gradient of the mean loss, without changing anything.

    Estimates ``samples`` updates with the noise of successive steps, all at the present weights, and makes one backward
    pass through the whole network. Batch statistics and the random state are restored. (If the closure itself calls
    ``backward()``, it adds to the ``.grad`` of parameters that are not the rule's.)

    Args:
        optimizer: a rule.
        closure: as of `LearningRule.step`; it must return a tensor.
        samples: the number of updates, at least 2.

    Returns:
        For each parameter by name, and for all of them together as ``"all"``:

        - ``"cosine"``: of the angle between ``.grad`` and the gradient, mean over the updates;
        - ``"signal_to_noise"``: squared length of the mean update over the variance of updates, corrected for their
          number; infinite for a rule without noise;
        - ``"forward_passes"``: evaluations of the closure for one update (``"all"`` only).

    Raises:
        ValueError: fewer than 2 samples.
        TypeError: anything but a single rule; of `Mixed`, diagnose the members.
        RuntimeError: a loss without a graph; as `LearningRule.step`.
    """
    if not isinstance(samples, int) or samples < 2:
        raise ValueError(f"diagnose: samples={samples!r} must be an integer >= 2")
    if not isinstance(optimizer, LearningRule):
        raise TypeError(f"diagnose takes a single rule, not {type(optimizer).__name__}; diagnose its members, if any")
    owned = {*optimizer._owned.modules.parameters()}
    params = [p for p in optimizer._trained() if p.requires_grad and p not in owned]
    grads, own_state = {p: p.grad for p in optimizer._trained()}, optimizer._own_state
    target = optimizer.target
    evaluations = 0

    def evaluated(what: Callable[[Probe], _T]) -> _T:
        """From the same random state each time, which is restored."""
        nonlocal evaluations
        with torch.random.fork_rng(sorted({p.device.index for p in params if p.device.type == "cuda"})):
            probe = Probe(closure, params, optimizer._known, optimizer._undo)
            optimizer._undo += [probe.restart, optimizer._recorder.restoring(), restoring_grad_mode()]

            def work() -> _T:
                nonlocal evaluations
                try:
                    return probe.run(type(optimizer).__name__, what)
                finally:
                    evaluations = probe.count

            return settled(optimizer._undo, work)

    def gradient(probe: Probe) -> dict[Tensor, Tensor]:
        with optimizer._recorder.paused():
            _, found = probe.gradients(params)
        if not found:
            raise RuntimeError("diagnose needs a closure that returns the loss as a tensor with its graph")
        return {p: found[p] if p in found else torch.zeros_like(p) for p in params}

    updates: list[dict[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            true = evaluated(gradient)
            for _ in range(samples):
                optimizer.target = target  # each step clears it
                _, update, optimizer._own_state = evaluated(optimizer.evaluate)
                optimizer._recorder.reset()
                updates.append({p: update.get(p, torch.zeros_like(p)) for p in params})
    finally:
        optimizer._recorder.reset()
        optimizer._own_state = own_state
        optimizer.target = target
        for p, grad in grads.items():
            p.grad = grad
    names = optimizer._names()
    found = {names[p]: _compare(true[p].flatten(), [u[p].flatten() for u in updates]) for p in params}
    together = [torch.cat([u[p].flatten() for p in params]) for u in updates]
    found["all"] = _compare(torch.cat([true[p].flatten() for p in params]), together)
    found["all"]["forward_passes"] = evaluations
    return found


def _compare(true: Tensor, updates: list[Tensor]) -> dict[str, float]:
    stacked = torch.stack(updates).double()
    mean = stacked.mean(0)
    variance = (stacked - mean).square().sum().item() / (len(updates) - 1)
    signal = max(mean.square().sum().item() - variance / len(updates), 0.0)
    return {
        "cosine": torch.nn.functional.cosine_similarity(stacked, true.double(), dim=1).mean().item(),
        "signal_to_noise": signal / variance if variance else math.inf,
    }
