"""`EnergyRule`: states in place of activities relax to low energy, and then the weights learn."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, TypeAlias, Unpack

import torch
from torch import Tensor
from torch.optim import Adam

from ..core.constraints import POSITIVE, Constraint
from ..core.errors import Diverged, warn
from ..core.params import GradientOptions, Params, whole_of
from ..core.probe import Probe
from ..core.products import in_full, power_of
from ..core.recorder import Firing
from ..core.rule import Estimate, LearningRule
from ..core.synapse import Synapse
from .relaxation import Descent, Relaxation
from .states import Evaluation, Wiring

__all__ = ["EnergyRule"]

#: runs the network in an evaluation, and sends the loss back; returns the losses, or the prediction
Run: TypeAlias = Callable[[Evaluation], Tensor]

ROUNDING = 4  # roundings by which an energy may rise


class EnergyRule(LearningRule):
    r"""A rule whose layers have states that relax to low energy; weights learn from the relaxed states.

    Each layer predicts its activity, :math:`u_l = W_l\, h_{l-1} + b_l`, where :math:`h_{l-1}` is what the network makes
    of the states below (activation, normalisation, pooling, skip connections). The network sees a state :math:`z_l` in
    place of :math:`u_l`. The states descend the free energy

    .. math::
        F = \sum_l \frac{E(z_l, u_l)}{\sigma_l^2} + \beta N L, \qquad
        z_l \leftarrow z_l - \gamma \sigma_l^2\, \frac{\partial F}{\partial z_l}

    over :math:`N` samples with their mean loss :math:`L`, and the weights then descend :math:`F / N`. The precision
    :math:`1 / \sigma_l^2` is that of the layer's activity: :math:`\sigma_l^2` is the mean square of :math:`u_l` in the
    forward pass, over samples and neurons. So the same rate suits layers of any scale, such as those before a
    normalisation. With ``relative=False``, :math:`\sigma = 1`, as published.

    A step of relaxation that has raised the free energy is taken back, and the rate halved for the rest of this
    relaxation. So ``inference_lr`` is the largest rate; `relaxations` has what became of it.

    A layer on which no other layer depends is an output: it has no state, and its prediction goes to the loss. As a
    gradient ends at the nearest states, the update of a layer depends on its own state and on those next to it. All
    other parameters of the model (normalisation, those above the outputs) learn as well. A layer whose output the loss
    does not depend on learns nothing. Each step of relaxation evaluates the closure, with batch statistics of its own;
    running statistics advance once, by those of the forward pass, and dropout masks stay the same.

    Subclasses define `energy`, and by `_learn` when states relax and what the weights learn.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules), all of whose parameters learn. Bare
            parameters are refused.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        inference_lr: :math:`\gamma`, the rate of the relaxation. May differ between groups.
        relative: whether states and energies are in units of each layer's activity.
        options: ``centre_inputs``, ``exclude``, ``descent`` and its options, ``process_group`` (average gradients over
            these ranks, each with its share of the batch), as in `bioopt.LearningRule`.

    Attributes:
        relaxations: what the relaxations of the last step did, in order.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with layers that have weights and
            are no known synapses.
        TypeError: bare parameters.
        Diverged: no step of a relaxation lowers the free energy, with the rate to try; nothing is changed. If more than
            half of the steps raise it, one warning says so.
        RuntimeError: a step without a closure; a loss that depends on no layer; a closure whose own ``backward()``
            frees what states need (where the loss reaches a state past the last layer).
    """

    constraints: ClassVar[dict[str, Constraint]] = {"inference_lr": POSITIVE}
    #: the option that sets the number of steps in which an error goes down from the loss
    steps_option: ClassVar[str] = "steps"
    splits_batch = True
    centres_inputs = True
    scales_with_loss = False

    def __init__(
        self, params: Params, lr: float, *, inference_lr: float, relative: bool, **options: Unpack[GradientOptions]
    ) -> None:
        self._require_bool("relative", relative)
        self._refuse_readout(options, "the last layer learns from the loss by the rule")
        options.setdefault("descent", Adam)
        super().__init__(params, {"lr": lr, "inference_lr": inference_lr}, **options)
        self.relative = relative
        self._powers: dict[int, Tensor] = {}
        self._depth = 1  # by which the rates of relaxation are divided
        self.relaxations: list[Relaxation] = []
        self._descents: list[Descent] = []  # of the estimate in progress
        self._now: Evaluation | None = None
        self._wiring: Wiring | None = None
        self._warned = False
        self._looked = False  # for layers that no error reaches

    # -- what a rule implements ---------------------------------------------------------------------------------

    @abstractmethod
    def energy(self, z: Tensor, u: Tensor) -> Tensor:
        """The energy of one layer, summed over samples and neurons: a scalar."""

    @abstractmethod
    def project(self, z: Tensor) -> Tensor:
        """The nearest state in range, or ``z`` itself where states have no range."""

    @abstractmethod
    def _learn(self, run: Run) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """The losses, and the gradient of each parameter; ``run`` evaluates the closure."""

    # -- one evaluation -----------------------------------------------------------------------------------------

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        return whole_of(type(self).__name__, group["params"], self._exclusion)

    def _enter(self, synapse: Synapse, x: Tensor) -> Tensor:
        return x

    def _leave(self, firing: Firing, u: Tensor) -> Tensor:
        assert self._now is not None
        return self._now.leave(firing, u)

    def _forward(self, run: Run, *, errors: bool = False, loss: bool = True) -> Evaluation:
        """The first evaluation of a step: the ordinary forward pass, with states equal to their predictions.

        Args:
            run: evaluates the closure.
            errors: whether leaves are errors, which are added to predictions, rather than states.
            loss: whether ``run`` evaluates the loss.
        """
        if errors:
            evaluation = self._run(run, lambda i, u: torch.zeros_like(u), None)
        else:
            evaluation = self._run(run, lambda i, u: u)
        if not evaluation.leaves:
            raise RuntimeError(self._coverage.none_fired())
        self._wiring = evaluation.wiring(loss)
        self._powers = {i: self._power(evaluation.predictions[i]) for i in self._wiring.hidden}
        if loss:  # ranks take this step together
            self._average_over_ranks(list(self._powers.values()))
        return evaluation

    def _evaluate(self, run: Run, given: Callable[[int, Tensor], Tensor], added: Collection[int] = ()) -> Evaluation:
        """A later evaluation of a step; the arguments are those of `Evaluation`.

        Raises:
            RuntimeError: other layers fired than in the first, or on other samples.
        """
        evaluation = self._run(run, given, added)
        if tuple(evaluation.synapses) != self._wired.synapses:
            raise RuntimeError(f"{type(self).__name__}: the closure ran other layers than in its first evaluation")
        return evaluation

    def _with_states(self, run: Run, states: dict[int, Tensor]) -> Evaluation:
        """An evaluation with these states, by the numbers of their firings."""
        return self._evaluate(run, lambda i, u: states.get(i, u))

    def _run(self, run: Run, given: Callable[[int, Tensor], Tensor], added: Collection[int] | None = ()) -> Evaluation:
        self._now = evaluation = Evaluation(type(self).__name__, given, added, self._wiring)
        evaluation.losses = run(evaluation).detach()
        return evaluation

    @property
    def _wired(self) -> Wiring:
        assert self._wiring is not None
        return self._wiring

    def _gradients(
        self, evaluation: Evaluation, of: Sequence[Tensor], nudge: float, *, retain: bool = False
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The free energy, and its gradients."""
        self._now = evaluation  # checkpointing runs its layers again
        wiring = self._wired
        samples = evaluation.samples(wiring)
        with torch.enable_grad():
            terms = [
                self.energy(evaluation.leaves[i], evaluation.predictions[i].to(evaluation.leaves[i].dtype))
                / self._powers[i]
                for i in wiring.hidden
            ]
        found = evaluation.gradients(terms, wiring.outputs, of, nudge * samples, retain)
        total = evaluation.loss * (nudge * samples) + sum(term.detach() for term in terms)
        return total / samples, found

    # -- relaxation ---------------------------------------------------------------------------------------------

    def _relax(
        self,
        run: Run,
        evaluation: Evaluation,
        nudge: float,
        steps: int,
        *,
        alternate: bool = False,
        retain: bool = False,
    ) -> Evaluation:
        """Let the states descend the free energy; return the evaluation with the relaxed states.

        Args:
            run: evaluates the closure.
            evaluation: with the states to start from. Its graph is used up, unless ``retain``.
            nudge: the factor of the loss.
            steps: of relaxation, each of which evaluates the closure once.
            alternate: whether a step moves every other layer, in turn, rather than all.
            retain: whether the graph of ``evaluation`` is needed again.
        """
        descent, hidden = self._begin_descent(nudge), self._wired.hidden
        for step in range(steps if hidden else 0):
            # From the layer beneath the outputs on, where the loss acts first.
            moving = hidden[::-1][descent.lowered % 2 :: 2] if alternate and len(hidden) > 1 else hidden
            leaves = [evaluation.leaves[i] for i in moving]
            energy, found = self._gradients(evaluation, leaves, nudge, retain=retain and step == 0)
            states = {i: evaluation.leaves[i].detach() for i in hidden}
            gradients = {i: g for i, g in zip(moving, found, strict=True) if g is not None}
            evaluation = self._with_states(run, self._step(descent, evaluation, energy, states, gradients))
        return evaluation

    def _begin_descent(self, nudge: float) -> Descent:
        self._descents.append(descent := Descent(nudge))
        return descent

    def _step(
        self,
        descent: Descent,
        evaluation: Evaluation,
        energy: Tensor,
        states: dict[int, Tensor],
        gradients: dict[int, Tensor],
    ) -> dict[int, Tensor]:
        """The states after a step of relaxation, or after half of the one before, if that has raised the free energy.

        Args:
            descent: of this relaxation.
            evaluation: with the present states.
            energy: the free energy, per sample.
            states: or errors, by the numbers of their firings.
            gradients: of those that move.
        """
        norms = [torch.linalg.vector_norm(g) for g in gradients.values()]
        residual = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(energy)
        numbers = torch.stack([energy.detach(), residual.to(energy) / math.sqrt(evaluation.samples(self._wired))])
        self._average_over_ranks([numbers])
        rounding = ROUNDING * max(torch.finfo(u.dtype).eps for u in evaluation.predictions)
        value, length = numbers.tolist()
        descent.arrive(states, gradients, value, length, rounding)
        scale = descent.done.scale
        moved = {i: self._moved(i, descent.states[i], g, scale) for i, g in descent.gradients.items()}
        return {**descent.states, **moved}

    def _moved(self, i: int, z: Tensor, gradient: Tensor, scale: float = 1.0) -> Tensor:
        """The state of a firing, or its error, after one step of relaxation."""
        rate = scale / self._depth * float(self.param_groups[self._wired.synapses[i].group]["inference_lr"])
        return self.project(torch.addcmul(z, gradient, self._powers[i], value=-rate))

    def _power(self, u: Tensor) -> Tensor:
        """The mean square of a layer's activity, in units of which states and their energy are measured."""
        u = in_full(u.detach())
        return power_of(u) if self.relative else u.new_ones(())

    # -- a step -------------------------------------------------------------------------------------------------

    def _estimate(self, probe: Probe) -> Estimate:
        self._recorder.reset()
        self._descents.clear()
        self._undo.append(self._forget)
        params = self._of_model()

        def run(evaluation: Evaluation) -> Tensor:
            for p in params:
                p.grad = None
            losses = probe(grad=True)
            self._samples = losses.numel()
            evaluation.send_back(losses, params)
            return losses

        with self._recorder.acting(self._enter, self._leave):
            losses, grads = self._learn(run)
        silent = self._silent()  # they passed the gradient on without a state
        grads = {p: g for p, g in grads.items() if p not in silent}
        with torch.no_grad():
            self._average_gradients(losses, grads)
            self._report()
            self._look_for_unreached(grads)
        return losses, grads, self._next_state()

    def _forget(self) -> None:
        """Drop the graphs of the last evaluation."""
        self._now = self._wiring = None
        self._descents.clear()

    def _of_parameters(self, evaluation: Evaluation, nudge: float, *, retain: bool = False) -> dict[Tensor, Tensor]:
        """The gradient of the free energy per sample, for each parameter."""
        params = self._of_model()
        _, found = self._gradients(evaluation, params, nudge, retain=retain)
        return self._per_sample(evaluation, params, found)

    def _per_sample(
        self, evaluation: Evaluation, params: Sequence[Tensor], found: Sequence[Tensor | None]
    ) -> dict[Tensor, Tensor]:
        samples = evaluation.samples(self._wired)
        return {p: g.detach() / samples for p, g in zip(params, found, strict=True) if g is not None}

    def _look_for_unreached(self, grads: dict[Tensor, Tensor]) -> None:
        """Warn once of layers that no error has reached: it goes one layer down in each step."""
        wired, name = self._wired, type(self).__name__
        steps = min((len(descent.done.energy) for descent in self._descents if descent.done.nudge), default=0)
        if self._looked or steps > len(wired.hidden):
            return
        if not any(gradient.any() for gradient in grads.values()):  # as from an empty batch, which tells nothing
            return
        self._looked = True
        layers = dict.fromkeys(wired.synapses[i] for i in wired.hidden)
        unreached = [s.name for s in layers if s.weight in grads and not grads[s.weight].any()]
        if unreached:
            warn(
                f"{name}: {self.steps_option}={steps} is too few for an error to reach the layers "
                f"{', '.join(unreached)}, which learn nothing: try {self.steps_option}={steps + len(unreached)}"
            )

    def _report(self) -> None:
        """Keep what the relaxations did; raise or warn where one has not descended."""
        self.relaxations = [descent.done for descent in self._descents]
        name, rate = type(self).__name__, max(float(group["inference_lr"]) for group in self.param_groups)
        for descent in self._descents:
            done, steps = descent.done, len(descent.done.energy)
            hint = f"try inference_lr={rate * done.scale / 2:.2g}"
            if done.taken_back and descent.lowered < 2:
                raise Diverged(
                    f"{name}: with inference_lr={rate:g}, halved {done.taken_back} times, no step of relaxation has "
                    f"lowered the free energy; nothing was changed: {hint}",
                    lr=rate,
                )
            if 2 * done.taken_back > steps and not self._warned:
                self._warned = True
                warn(
                    f"{name}: {done.taken_back} of {steps} steps of relaxation with inference_lr={rate:g} have raised "
                    f"the free energy, and were taken back; {hint}"
                )
