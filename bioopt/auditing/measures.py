"""`Auditor`: what each intervention changes of each layer's update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core._torch_private import forward_pre_hooks
from ..core.errors import Diverged
from ..core.hooks import Hook
from ..core.probe import Closure
from ..core.synapse import Synapse, survey
from ..core.trial import Trial
from .card import MEASURES, Audit, LayerAudit
from .interventions import (
    Trace,
    error_changed,
    in_other_order,
    labels_permuted,
    neuron_moved,
    outputs_replaced,
    permuted_loss,
    relative,
    reversed_loss,
    samples_replaced,
    signal_changed,
    tracing,
    unseen_part,
    weights_moved,
)

__all__ = ["Auditor"]

# The part of the weights that no activity meets is reversed. First it also grows, so that a rule that reads lengths of
# weight vectors is found; where that changes activity (the width of noise may follow the length), it is reversed alone.
CHANGES = (-3.0, -2.0)


class _Outcome(NamedTuple):
    """What a step would do, and maybe the one after it."""

    updates: dict[Synapse, Tensor]  # neurons × (weights and bias), where the layer learns
    later: dict[Synapse, Tensor]  # the same of a second step, with the rule's state after the first
    owned: list[Tensor]  # updates of the rule's own parameters
    feedback: list[dict[Synapse, Tensor]]  # weights now, and after the step
    trace: Trace
    evaluations: int


class Auditor:
    """One audit; `bioopt.audit` describes the arguments and what is measured."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, closure: Closure, labels: Tensor | None) -> None:
        self.optimizer, self.model, self.closure, self.labels = optimizer, model, closure, labels
        self.trial = Trial(optimizer, model)
        self.synapses = survey(model)[0]
        dtypes = {s.weight.dtype for s in self.synapses}
        self.tolerance = 10 * math.sqrt(max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0))
        owned = {*self.trial.params}
        self.owned = [p for p in self.trial.trained if p not in owned and p.requires_grad]
        self.found: dict[str, dict[Synapse, float]] = {measure: {} for measure in MEASURES}

    def require_alone(self) -> None:
        """Raise where another rule acts on the model, so that its errors would be taken for those of this optimizer."""
        own = self.trial.rule._recorder if self.trial.rule else None
        for synapse in self.synapses:
            recorders = [hook.recorder for hook in forward_pre_hooks(synapse.layer) if isinstance(hook, Hook)]
            if any(one not in (None, own) and one.active for one in recorders):
                raise RuntimeError(
                    f"audit: layer '{synapse.name}' is also watched by a rule other than "
                    f"{type(self.optimizer).__name__}: close() that rule"
                )

    # -- one evaluation ---------------------------------------------------------------------------------------------

    def evaluate(
        self,
        *interventions: AbstractContextManager[None],
        returned: Callable[[Any], Any] = lambda loss: loss,
        twice: bool = False,
    ) -> _Outcome:
        """The update under some interventions.

        Args:
            interventions: in place during the evaluation.
            returned: what the rule gets in place of the closure's value.
            twice: whether a second step follows, from the rule's state after the first, at the same weights.
        """
        trace, rule = Trace(), self.trial.rule

        def closure() -> Any:
            return returned(trace.noted(self.closure()))

        with ExitStack() as stack:
            for intervention in interventions:
                stack.enter_context(intervention)
            if rule is not None:
                stack.callback(setattr, rule, "_own_state", rule._own_state)
            stack.enter_context(tracing(self.synapses, trace))
            before = self.feedback()
            grads, state = self.trial.update(closure)
            updates = self.updates(grads)
            owned = [grads[p].clone() if p in grads else torch.zeros(0) for p in self.owned]
            evaluations = self.trial.evaluations
            if rule is not None:
                rule._own_state = state
            feedback = [before, self.feedback()]
            later = self.updates(self.trial.update(closure)[0]) if twice else {}
        return _Outcome(updates, later, owned, feedback, trace, evaluations)

    def evaluate_or_stop(self, *interventions: AbstractContextManager[None], **options: Any) -> _Outcome:
        """As `evaluate`, but without an update if the rule stops: it has noticed that loss and error do not fit."""
        try:
            return self.evaluate(*interventions, **options)
        except Diverged:
            return _Outcome({}, {}, [], [], Trace(), 0)

    def updates(self, grads: dict[Tensor, Tensor]) -> dict[Synapse, Tensor]:
        """The update of each layer that learns."""
        return {s: update for s in self.synapses if (update := _update(s, grads)) is not None}

    def feedback(self) -> dict[Synapse, Tensor]:
        """The feedback weights of each layer; empty if the rule has none, or none yet."""
        rule = self.trial.rule
        weights_of = getattr(rule, "feedback_weights", None)
        if rule is None or weights_of is None:
            return {}
        try:
            by_name = weights_of()
        except RuntimeError:  # shapes are not known before the first pass
            return {}
        layers = rule.layers()
        of_weight = {s.weight: s for s in self.synapses}
        of_name = {s.name: s for s in self.synapses} | {
            name: of_weight[one.weight] for name, one in layers.items() if one.weight in of_weight
        }
        return {of_name[name]: weights.clone() for name, weights in by_name.items() if name in of_name}

    # -- all measures -----------------------------------------------------------------------------------------------

    def audit(self) -> Audit:
        """All measures."""
        self.evaluate()  # lazy modules get their shapes, and feedback weights theirs
        base, again = self.evaluate(), self.evaluate()
        if not base.trace.runs:
            raise RuntimeError("audit: the closure runs no layer of the model")
        if self.trial.autocast:
            raise RuntimeError(
                "audit: the closure runs under autocast, whose rounding is as large as what is measured: audit it in "
                "single or double precision"
            )
        self.base, self.layers = base, list(base.trace.runs)
        self.base_twice = self.evaluate(twice=True)
        for synapse in base.updates:
            if self.moved(again, synapse) > self.tolerance:
                raise RuntimeError(
                    f"audit: two evaluations from the same state gave layer '{synapse.name}' different updates: draw "
                    "the batch before, not inside of the closure"
                )
        for i, synapse in enumerate(self.layers):
            self.measure_weights(i, synapse)
            self.measure_neuron(synapse)
            self.measure_signal(i, synapse)
            if i + 1 < len(self.layers):
                outcome = self.evaluate(outputs_replaced(self.layers[i + 1 :]))
                self.note("layers_above", synapse, self.moved(outcome, synapse))
        self.measure_samples()
        rule, labels = self.trial.rule, self.labels
        permuted = labels_permuted(self.model, rule) if labels is None else in_other_order(labels, rule)
        self.compare("labels", self.evaluate(permuted), self.layers)
        self.compare("error", self.evaluate_or_stop(error_changed(self.model)), self.layers)
        self.compare("loss", self.evaluate_or_stop(returned=reversed_loss), self.layers)
        return Audit(
            type(self.optimizer).__name__,
            tuple(self.row(s) for s in self.layers),
            base.evaluations,
            base.trace.backward_passes,
            self.loss_numbers(),
            self.feedback_changes(),
            self.tolerance,
        )

    def measure_weights(self, i: int, synapse: Synapse) -> None:
        """Other weights of a layer, with the same activity: what moves in other layers, and of its feedback weights."""
        base = self.base_twice
        unseen = unseen_part(synapse, base.trace.inputs[synapse])
        if unseen is None:  # two steps have too many events
            base = self.base
            unseen = unseen_part(synapse, base.trace.inputs[synapse])
        if unseen is None:
            return
        for change in CHANGES:
            outcome = self.evaluate(weights_moved(synapse.weight, change * unseen), twice=base is self.base_twice)
            if self.stands_still(outcome, base):
                break
        for other in self.layers:
            if other.weight is not synapse.weight:
                measure = "transport" if other in self.layers[:i] else "other_layers"
                self.note(measure, other, self.moved(outcome, other))
                self.note(measure, other, _moved(base.later.get(other), outcome.later.get(other)))
        if i:  # feedback weights of the first layer carry nothing
            pairs = [(a, b) for a, b in zip(base.owned, outcome.owned, strict=True) if a.shape == b.shape]
            for was, now in zip(base.feedback, outcome.feedback, strict=True):
                pairs += [(was[synapse], now[synapse])] if synapse in was else []
            self.note("feedback_reads", synapse, max((relative(a, b) for a, b in pairs), default=math.nan))
        neuron = torch.zeros_like(unseen)
        neuron[0] = CHANGES[-1] * unseen[0]
        outcome = self.evaluate(weights_moved(synapse.weight, neuron))
        self.note("other_neurons", synapse, self.moved(outcome, synapse, first=1))

    def measure_neuron(self, synapse: Synapse) -> None:
        """Another activity of one neuron, as the rule receives it: what moves of other neurons, and in other layers."""
        outcome = self.evaluate(neuron_moved(synapse, 0))
        if self.stands_still(outcome, self.base):  # otherwise the network has received the other activity
            self.note("other_neurons", synapse, self.moved(outcome, synapse, first=1))
            self.compare("other_layers", outcome, [s for s in self.layers if s is not synapse])

    def measure_signal(self, i: int, synapse: Synapse) -> None:
        """Another learning signal in one layer: what moves in the layers above, to which it does not return."""
        outcome = self.evaluate(signal_changed(synapse))
        self.compare("other_layers", outcome, self.layers[i + 1 :])

    def stands_still(self, outcome: _Outcome, base: _Outcome) -> bool:
        """Whether all activity and the loss are what they were."""
        return outcome.trace.differs(base.trace) <= self.tolerance

    def measure_samples(self) -> None:
        """How far the effects of two samples are from adding up."""
        first, second, both = (self.evaluate(samples_replaced(self.model, which)) for which in ((0,), (1,), (0, 1)))
        for synapse, update in self.base.updates.items():
            one, two, together = (outcome.updates.get(synapse) for outcome in (first, second, both))
            if one is None or two is None or together is None:
                continue
            effects = (one - update).norm() + (two - update).norm()
            if effects > self.tolerance * update.norm():
                self.note("other_samples", synapse, ((together - one - two + update).norm() / effects).item())

    def loss_numbers(self) -> int:
        """Numbers that the value of the loss brings to the trunk in a step."""
        trunk = self.layers[:-1] or self.layers
        if not any(self.found["loss"].get(s, 0.0) > self.tolerance for s in trunk):
            return 0
        outcome = self.evaluate_or_stop(returned=permuted_loss)
        each = any(self.moved(outcome, s) > self.tolerance for s in trunk)
        return self.base.evaluations * (self.samples() if each else 1)

    def samples(self) -> int:
        """The number of samples in the batch: those of the first layer's input."""
        return len(self.base.trace.inputs[self.layers[0]][0])

    def feedback_changes(self) -> bool | None:
        """Whether feedback weights change in the step."""
        now, after = self.base.feedback
        if not now:
            return None
        return any(not torch.equal(now[s], after[s]) for s in now) or any(bool(g.any()) for g in self.base.owned)

    # -- what was found ---------------------------------------------------------------------------------------------

    def moved(self, outcome: _Outcome, synapse: Synapse, first: int = 0) -> float:
        """The relative change of a layer's update, from this neuron on; NaN if there is no update."""
        return _moved(self.base.updates.get(synapse), outcome.updates.get(synapse), first)

    def note(self, measure: str, synapse: Synapse, value: float) -> None:
        """Keep the largest value of a measure."""
        found = self.found[measure]
        if not math.isnan(value):
            found[synapse] = max(found.get(synapse, 0.0), value)

    def compare(self, measure: str, outcome: _Outcome, layers: list[Synapse]) -> None:
        """Note the change of the update of these layers."""
        for synapse in layers:
            self.note(measure, synapse, self.moved(outcome, synapse))

    def row(self, synapse: Synapse) -> LayerAudit:
        """All that was found of a layer."""
        found = {measure: values.get(synapse, math.nan) for measure, values in self.found.items()}
        weights = self.base.feedback[0].get(synapse)
        forward = synapse.weight.detach()
        used = weights is not None and synapse is not self.layers[0] and weights.shape == forward.shape
        angle = _angle(weights, forward) if used and weights is not None else math.nan
        return LayerAudit(synapse.name, **found, feedback_angle=angle, runs=self.base.trace.runs[synapse])


def _moved(before: Tensor | None, after: Tensor | None, first: int = 0) -> float:
    if before is None or not before[first:].any():
        return math.nan
    return relative(before[first:], torch.zeros_like(before[first:]) if after is None else after[first:])


def _update(synapse: Synapse, grads: dict[Tensor, Tensor]) -> Tensor | None:
    """The update of a layer, neurons × (weights and bias); ``None`` if it learns nothing."""
    parts = [grads[p].detach().double().reshape(len(p), -1) for p in (synapse.weight, synapse.bias) if p in grads]
    return torch.cat(parts, 1) if parts else None


def _angle(one: Tensor, other: Tensor) -> float:
    cosine = torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), 0).item()
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
