"""Dual propagation: each neuron has two states, whose mean is its activity and whose difference is its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.constraints import POSITIVE, POSITIVE_INT
from ..core.errors import warn
from ..core.params import GradientOptions, Params
from ..core.sums import add_up
from .base import EnergyRule, Run
from .relaxation import Relaxation
from .states import Evaluation

__all__ = ["DualPropagation"]


@dataclass(frozen=True)
class _Side:
    """What one of the two states of all layers makes of the layers above.

    Attributes:
        loss: its mean over samples.
        predictions: of the layers with states, without graphs.
        slopes: of the nudged loss and the errors of the layers above, by the state.
    """

    loss: Tensor
    predictions: dict[int, Tensor]
    slopes: dict[int, Tensor]


@final
class DualPropagation(EnergyRule):
    r"""Each neuron has two states, nudged towards a lower and a higher loss in a single phase.

    The states :math:`z^\pm_l` of a layer meet in the predictions of the layer above, and part by its error. They are at
    rest where

    .. math::
        z^\pm_l = \bar u_l \pm \frac{\sigma_l^2}{2}\, J_{l+1}(z^\pm_l)^\top \delta_{l+1}, \qquad
        \delta_l = \frac{z^+_l - z^-_l}{\sigma_l^2}, \qquad
        \bar u_l = \frac{u_l(z^+_{l-1}) + u_l(z^-_{l-1})}{2} = W_l\, \bar h_{l-1} + b_l

    with the Jacobian :math:`J_{l+1}` of the prediction above, and at the outputs :math:`\delta = -\beta` times the
    gradient of each sample's loss. So the mean :math:`\bar h` of what the two states make is the activity, and their
    difference the error, from which the weights learn:

    .. math::
        \Delta W_l = \frac{1}{N \beta} \sum \delta_l\, \bar h_{l-1}^\top

    That is the saddle point of :math:`\sum_l \left( E(z^+_l, \bar u_l) - E(z^-_l, \bar u_l) \right) / \sigma_l^2 +
    \tfrac{\beta}{2} N (L^+ + L^-)` with :math:`E(z, u) = \tfrac12 \lVert z - u \rVert^2`, lowest in :math:`z^+` and
    highest in :math:`z^-`. In each step all states move there at once, given their neighbours, by a fraction
    :math:`\gamma`; so errors reach one more layer in each step. As :math:`\beta \to 0` the update is that of
    backpropagation, with an error of the order :math:`\beta^2`, but :math:`\beta` need not be small.

    The published rule has its states after the activation, ReLU, by whose slope it never multiplies: as the states are
    kept in its range, :math:`\delta` is its finite difference. Here states stand before the activation, as in all rules
    of this family, so that any module may stand between layers, and slopes are averaged over both states.

    Cost of a step: ``1 + 2 steps`` evaluations with a backward pass each.

    Args:
        params: as in `EnergyRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        beta: :math:`\beta`, the strength of nudging.
        steps: of relaxation; at least as many as there are layers with states, or the lowest learn nothing.
        inference_lr: :math:`\gamma`.
        relative: whether states are in units of each layer's activity; it changes how far the two states part, and not
            the limit of small :math:`\beta`.
        options: ``exclude``, ``descent`` and its options, ``process_group``, as in `EnergyRule`.

    Raises:
        ValueError, TypeError, Diverged, RuntimeError: as `EnergyRule`. One warning names the rate where
            states move more and more although errors have reached all layers.

    Source: R. Høier, D. Staudt & C. Zach (2023), *Dual propagation: accelerating contrastive Hebbian learning with
    dyadic neurons*, ICML.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,  # η
        *,
        beta: float = 0.1,  # β
        steps: int = 8,  # T
        inference_lr: float = 1.0,  # γ
        relative: bool = True,
        **options: Unpack[GradientOptions],
    ) -> None:
        self._check_value("beta", beta, POSITIVE)
        self._check_value("steps", steps, POSITIVE_INT)
        self.beta, self.steps = beta, steps
        super().__init__(params, lr, inference_lr=inference_lr, relative=relative, **options)

    def energy(self, z: Tensor, u: Tensor) -> Tensor:
        """Half the squared error of the prediction."""
        return F.mse_loss(z, u, reduction="sum") / 2

    def project(self, z: Tensor) -> Tensor:
        """States have no range."""
        return z

    def _learn(self, run: Run) -> tuple[Tensor, dict[Tensor, Tensor]]:
        free = self._forward(run)
        hidden, params, powers = self._wired.hidden, self._of_model(), self._powers
        plus = minus = {i: free.leaves[i].detach() for i in hidden}
        errors = {i: torch.zeros_like(z) for i, z in plus.items()}
        done = self._begin_descent(self.beta).done
        sides = [self._side(free, errors)] * 2
        for step in range(self.steps if hidden else 0):
            if step:
                sides = [self._side(self._with_states(run, z), errors) for z in (plus, minus)]
            means = {i: (sides[0].predictions[i] + sides[1].predictions[i]) / 2 for i in hidden}
            slopes = [
                {i: (z[i] - means[i]) / powers[i] + sign / 2 * g for i, g in side.slopes.items()}
                for sign, z, side in ((1, plus, sides[0]), (-1, minus, sides[1]))
            ]
            self._note(done, free.samples(self._wired), plus, minus, means, sides, slopes)
            plus, minus = (
                {**z, **{i: self._moved(i, z[i], slope) for i, slope in of_side.items()}}
                for z, of_side in zip((plus, minus), slopes, strict=True)
            )
            errors = {i: (plus[i] - minus[i]) / powers[i] for i in hidden}
        total = dict[Tensor, Tensor]()
        for z in (plus, minus):
            evaluation = self._with_states(run, z)
            grads = self._per_sample(evaluation, params, self._slopes(evaluation, errors, params))
            add_up(total, ((p, gradient / (2 * self.beta)) for p, gradient in grads.items()))
        return free.losses, total

    def _side(self, evaluation: Evaluation, errors: dict[int, Tensor]) -> _Side:
        """What one of the two states of all layers makes of the layers above."""
        hidden = self._wired.hidden
        found = self._slopes(evaluation, errors, [evaluation.leaves[i] for i in hidden])
        predictions = {i: evaluation.predictions[i].detach().to(errors[i]) for i in hidden}
        slopes = {i: g for i, g in zip(hidden, found, strict=True) if g is not None}
        return _Side(evaluation.loss, predictions, slopes)

    def _slopes(self, evaluation: Evaluation, errors: dict[int, Tensor], of: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the nudged loss, and of minus what the errors of layers pull their predictions by."""
        self._now = evaluation  # checkpointing runs its layers again
        with torch.enable_grad():
            terms = [-(e * evaluation.predictions[i].to(e.dtype)).sum() for i, e in errors.items()]
        scale = self.beta * evaluation.samples(self._wired)
        return evaluation.gradients(terms, self._wired.outputs, of, scale)

    def _note(
        self,
        done: Relaxation,
        samples: int,
        plus: dict[int, Tensor],
        minus: dict[int, Tensor],
        means: dict[int, Tensor],
        sides: Sequence[_Side],
        slopes: Sequence[dict[int, Tensor]],
    ) -> None:
        """Keep the value whose saddle point is sought, per sample, and the norm of its gradient."""
        value = self.beta / 2 * (sides[0].loss + sides[1].loss)
        for i, u in means.items():
            value = value + (self.energy(plus[i], u) - self.energy(minus[i], u)) / self._powers[i] / samples
        norms = [torch.linalg.vector_norm(g) for of_side in slopes for g in of_side.values()]
        residual = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        done.energy.append(float(value))
        done.residual.append(float(residual) / math.sqrt(samples))
        *before, last = done.residual
        if len(before) >= len(means) and last > 2 * max(before, default=last) and not self._warned:
            self._warned = True
            rate = max(float(group["inference_lr"]) for group in self.param_groups)
            warn(
                f"DualPropagation: with inference_lr={rate:g} and beta={self.beta:g} the states move twice as far in "
                f"step {len(done.residual)} of the relaxation as in any before: try inference_lr={rate / 2:.2g}, or a "
                "smaller beta"
            )
