"""`diagnose`: a rule's updates compared with the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .core.hooks import hooked
from .core.probe import Closure, Probe
from .core.rule import LearningRule
from .core.synapse import Synapse
from .core.trial import Trial
from .feedback import FeedbackRule

__all__ = ["diagnose"]


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
        - of the weights of layers, for rules with other feedback (`FeedbackRule`), means over the updates:
          ``"feedback_angle"`` between feedback and forward weights, ``"error_angle"`` between the error at the layer's
          output and that of backpropagation, ``"update_angle"`` between ``.grad`` and the gradient, all in degrees, 90
          for directions that have nothing in common; ``"error_rank"``: participation ratio of the error's
          uncentred covariance over samples and positions, ``(Σ λ)² / Σ λ²``: how many directions it has;
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
    trial = Trial(optimizer)
    params = trial.params
    synapses = list(optimizer._recorder.synapses.values()) if isinstance(optimizer, FeedbackRule) else []

    def gradient(probe: Probe) -> dict[Tensor, Tensor]:
        with optimizer._recorder.paused(), _errors(synapses, true_errors):
            _, found = probe.gradients(params)
        if not found:
            raise RuntimeError("diagnose needs a closure that returns the loss as a tensor with its graph")
        return {p: found[p] if p in found else torch.zeros_like(p) for p in params}

    updates: list[dict[Tensor, Tensor]] = []
    true_errors: dict[Synapse, Tensor] = {}
    of_feedback: list[dict[Synapse, dict[str, float]]] = []
    with trial.undone():
        true = trial.run(closure, gradient)
        for _ in range(samples):
            errors: dict[Synapse, Tensor] = {}
            with _errors(synapses, errors):
                update, state = trial.update(closure)
            of_feedback.append(_feedback(optimizer, errors, true_errors))
            optimizer._own_state = state
            updates.append({p: update.get(p, torch.zeros_like(p)) for p in params})
    names = optimizer._names()
    found = {names[p]: _compare(true[p].flatten(), [u[p].flatten() for u in updates]) for p in params}
    for synapse in synapses:
        entry = found.get(name := names.get(synapse.weight, ""), {})
        for what in {what: None for each in of_feedback for what in each.get(synapse, {})}:
            entry[what] = sum(each[synapse][what] for each in of_feedback) / samples
        if name in found:
            entry["update_angle"] = _degrees(entry["cosine"])
    together = [torch.cat([u[p].flatten() for p in params]) for u in updates]
    found["all"] = _compare(torch.cat([true[p].flatten() for p in params]), together)
    found["all"]["forward_passes"] = trial.evaluations
    return found


@contextmanager
def _errors(synapses: list[Synapse], found: dict[Synapse, Tensor]) -> Iterator[None]:
    """Keep the error at the output of each layer, events × neurons, of the backward pass inside a ``with`` block."""

    def look(synapse: Synapse, layer: nn.Module, args: Any, u: Tensor) -> None:
        if u.requires_grad:
            u.register_hook(lambda g: found.__setitem__(synapse, g.movedim(synapse.channel_dim, -1).flatten(0, -2)))

    with hooked(*(synapse.layer.register_forward_hook(partial(look, synapse)) for synapse in synapses)):
        yield


def _feedback(
    rule: LearningRule, errors: dict[Synapse, Tensor], true: dict[Synapse, Tensor]
) -> dict[Synapse, dict[str, float]]:
    """The angles of feedback weights and errors, and the rank of errors, of each layer."""
    found: dict[Synapse, dict[str, float]] = {}
    for synapse, error in errors.items():
        found[synapse] = {"error_rank": _rank(error)}
        if synapse in true and true[synapse].shape == error.shape:
            found[synapse]["error_angle"] = _angle(error, true[synapse])
    if isinstance(rule, FeedbackRule):
        weights = rule.feedback_weights()
        for name, synapse in rule.layers().items():
            forward = synapse.weight.detach()
            if synapse in rule.returned and name in weights and weights[name].shape == forward.shape:
                found.setdefault(synapse, {})["feedback_angle"] = _angle(weights[name], forward)
    return found


def _angle(one: Tensor, other: Tensor) -> float:
    cosine = torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), 0)
    return _degrees(cosine.item())


def _degrees(cosine: float) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def _rank(error: Tensor) -> float:
    """Participation ratio of the uncentred covariance, by the smaller of the two Gram matrices."""
    error = error.double() / error.double().norm().clamp(min=1e-300)
    gram = error.T @ error if error.shape[0] > error.shape[1] else error @ error.T
    squares = gram.square().sum().item()
    return gram.trace().item() ** 2 / squares if squares else 0.0


def _compare(true: Tensor, updates: list[Tensor]) -> dict[str, float]:
    stacked = torch.stack(updates).double()
    mean = stacked.mean(0)
    variance = (stacked - mean).square().sum().item() / (len(updates) - 1)
    signal = max(mean.square().sum().item() - variance / len(updates), 0.0)
    return {
        "cosine": torch.nn.functional.cosine_similarity(stacked, true.double(), dim=1).mean().item(),
        "signal_to_noise": signal / variance if variance else math.inf,
    }
