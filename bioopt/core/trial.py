"""`Trial`: evaluate what an optimizer would do next, as often as needed, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .integrations import params_in
from .probe import Closure, Known, Probe, restoring_grad_mode, settled
from .rule import LearningRule

__all__ = ["Trial"]

_T = TypeVar("_T")


class Trial:
    """Evaluations of one optimizer, all from the same random state, buffers, and state of the rule.

    Args:
        optimizer: a rule, or an optimizer of torch, which learns from the gradient of the mean loss.
        model: whose parameters may get a ``.grad``; ``None``: those of the optimizer.

    Attributes:
        rule: the optimizer, if it is a rule.
        params: the parameters of the model that learn.
        trained: the same, and those of the rule's own modules.
        evaluations: of the closure, in the last work done.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None = None) -> None:
        self.rule = optimizer if isinstance(optimizer, LearningRule) else None
        self.trained = self.rule._trained() if self.rule else params_in(optimizer)
        self.params = self.rule._of_model() if self.rule else [p for p in self.trained if p.requires_grad]
        self.evaluations = 0
        self._name = type(optimizer).__name__
        self._known = self.rule._known if self.rule else Known()
        self._undo: list[Callable[[], None]] = self.rule._undo if self.rule else []
        if not self.rule and model is not None:
            self._known.roots[model] = None
        self._with_grads = list(dict.fromkeys([*self.trained, *(model.parameters() if model else ())]))

    @property
    def autocast(self) -> bool:
        """Whether the closure is known to run under autocast."""
        return self._known.autocast is not None

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore, at the end of a ``with`` block, each ``.grad``, the target and the state of the rule."""
        rule, grads = self.rule, {p: p.grad for p in self._with_grads}
        target, own_state = (rule.target, rule._own_state) if rule else (None, {})
        restore = rule._centring.restoring() if rule and rule._centring else None
        for p in self._with_grads:  # a closure's backward pass must not add to them
            p.grad = None
        try:
            with torch.no_grad():
                yield
        finally:
            if rule:
                rule._recorder.reset()
                rule._own_state, rule.target = own_state, target
            if restore is not None:
                restore()
            for p, grad in grads.items():
                p.grad = grad

    def run(self, closure: Closure, work: Callable[[Probe], _T]) -> _T:
        """Do some work with a closure; random states and buffers are restored."""
        with torch.random.fork_rng(sorted({p.device.index for p in self.params if p.device.type == "cuda"})):
            probe = Probe(closure, self.params, self._known, self._undo)
            self._undo += [probe.restart, restoring_grad_mode()]
            if self.rule:
                self._undo.append(self.rule._recorder.restoring())

            def counted() -> _T:
                try:
                    return probe.run(self._name, work)
                finally:
                    self.evaluations = probe.count

            return settled(self._undo, counted)

    def update(self, closure: Closure) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """``-Δw`` of each parameter before ``descent``, and the state of the rule after it, which it does not get yet.

        To be called in `undone`.
        """
        rule = self.rule
        if rule is None:
            _, grads = self.run(closure, lambda probe: probe.gradients(self.params))
            return grads, {}
        target = rule.target
        try:
            _, grads, state = self.run(closure, rule.evaluate)
        finally:
            rule.target = target  # each step clears it
            rule._recorder.reset()
        return grads, state
