"""Predictive coding: states lower the errors of predictions and the loss, and weights learn from what errors remain."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.constraints import POSITIVE_INT, Constraint, one_of
from ..core.params import GradientOptions, Params
from .base import EnergyRule, Run
from .depth import in_units, premultipliers
from .states import Evaluation

__all__ = ["PredictiveCoding"]

MODES: Constraint = one_of("state", "incremental", "error")


@final
class PredictiveCoding(EnergyRule):
    r"""States lower the errors of predictions and the loss; then weights lower the errors that remain.

    .. math::
        F = \sum_l \frac{\lVert z_l - u_l \rVert^2}{2 \sigma_l^2} + N L, \qquad
        \Delta z_l = -\gamma \sigma_l^2 \left( \varepsilon_l - J_{l+1}^\top \varepsilon_{l+1} \right), \qquad
        \Delta W_l = \tfrac{1}{N}\, \varepsilon_l\, h_{l-1}^\top

    with the error :math:`\varepsilon_l = (z_l - u_l) / \sigma_l^2` of the prediction :math:`u_l = W_l h_{l-1} + b_l`,
    weighted by the precision (see `EnergyRule`), and the Jacobian :math:`J_{l+1}` of the prediction above. At the
    outputs, :math:`\varepsilon` is minus the gradient of each sample's loss. The states start at their predictions, so
    at first only the layer beneath an output has a gradient: it reaches a layer :math:`k` further down after :math:`k`
    more steps, and weakly at a small rate.

    Modes:

    - ``"state"``: the states take ``steps`` steps, then the weights learn;
    - ``"incremental"``: the weights move along with the states, by ``lr`` times their gradient in each step.
      ``descent`` receives the sum of these gradients, with the weights where they were: with SGD, its step is that of
      ``steps`` updates;
    - ``"error"``: the errors relax in place of the states, :math:`z_l = u_l + \varepsilon_l`. A step of them takes the
      whole network forward and back, so that errors reach all layers at once. The weights learn from local errors, as
      in the other modes.

    With ``fixed_prediction`` the predictions and what the network computes from them stay those of the forward pass
    while errors relax. The fixed point is backpropagation, exactly; with :math:`\gamma = 1` it is reached after as many
    steps as there are layers with states. It needs a single forward pass.

    With ``mu_pc`` (μPC), rates suit residual networks of any depth: the weights :math:`w_l` of a layer are taken for
    products :math:`a_l W_l`, and the :math:`W_l` learn,

    .. math::
        \frac{\partial F}{\partial W_l} = a_l \frac{\partial F}{\partial w_l}, \quad \Delta w_l = a_l\, \Delta W_l,
        \qquad a_1 = \frac{1}{\sqrt{D}}, \quad a_l = \frac{1}{\sqrt{N_l L}}, \quad a_L = \frac{1}{N_L}, \qquad
        \gamma_l = \frac{\gamma}{L}

    with :math:`D` inputs and :math:`N_l` presynaptic neurons of each of :math:`L` layers. So, with SGD, the
    steps of all layers together change the output by as much in a deep network as in a shallow one; Adam's, which do
    not shrink with the gradient, by up to :math:`\sqrt{L}` more. States relax more slowly in deep
    networks, because skip connections let the loss, and all layers above, act on each state at once. Published μPC also
    draws the weights such that each :math:`W_l` has deviation 1; here the network keeps those that it has. Other
    parameters than those of layers have :math:`1/\sqrt{L}`.

    Cost of a step: ``steps + 1`` evaluations with a backward pass each (``steps`` in the incremental mode).

    Args:
        params: as in `EnergyRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`; by default 1e-3, with ``mu_pc``, for
            :math:`W_l`, 0.03.
        steps: of relaxation.
        inference_lr: :math:`\gamma`; by default 0.1, with ``mu_pc`` 0.3, with ``fixed_prediction`` 1.
        relative: whether states and energies are in units of each layer's activity.
        mode: ``"state"``, ``"incremental"`` or ``"error"``.
        fixed_prediction: whether predictions stay those of the forward pass; with ``mode="state"``.
        mu_pc: whether weights and states have the rates of μPC; with ``mode="state"`` or ``"error"``.
        options: ``exclude``, ``descent`` and its options, ``process_group``, as in `EnergyRule`.

    Raises:
        ValueError: a hyperparameter out of range; ``fixed_prediction`` in another mode; ``mu_pc`` with
            ``mode="incremental"`` or ``fixed_prediction``.
        TypeError, Diverged, RuntimeError: as `EnergyRule`.

    Sources: J. C. R. Whittington & R. Bogacz (2017), *An approximation of the error backpropagation algorithm in a
    predictive coding network with local Hebbian synaptic plasticity*, Neural Computation 29; fixed predictions:
    B. Millidge, A. Tschantz & C. L. Buckley (2022), *Predictive coding approximates backprop along arbitrary
    computation graphs*, Neural Computation 34; incremental: T. Salvatori, Y. Song, Y. Yordanov, B. Millidge, L. Sha,
    C. Emde, Z. Xu, R. Bogacz & T. Lukasiewicz (2024), *A stable, fast, and fully automatic learning algorithm for
    predictive coding networks*, ICLR; errors: C. Goemaere, G. Oliviers, R. Bogacz & T. Demeester (2025), *Error
    optimization: overcoming exponential signal decay in deep predictive coding networks*; μPC: F. Innocenti,
    E. M. Achour & C. L. Buckley (2025), *μPC: scaling predictive coding to 100+ layer networks*, NeurIPS 38.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,  # η
        *,
        steps: int = 8,  # T
        inference_lr: float | None = None,  # γ
        relative: bool = True,
        mode: str = "state",
        fixed_prediction: bool = False,
        mu_pc: bool = False,
        **options: Unpack[GradientOptions],
    ) -> None:
        self._check_value("steps", steps, POSITIVE_INT)
        self._check_value("mode", mode, MODES)
        self._require_bool("fixed_prediction", fixed_prediction)
        if fixed_prediction and mode != "state":
            raise ValueError(
                f"PredictiveCoding: fixed_prediction=True needs mode='state', not mode={mode!r}: predictions of other "
                "modes change as they relax"
            )
        self._require_bool("mu_pc", mu_pc)
        if mu_pc and (fixed_prediction or mode == "incremental"):
            other = "fixed_prediction=True" if fixed_prediction else "mode='incremental'"
            raise ValueError(
                f"PredictiveCoding: mu_pc=True needs mode='state' or mode='error', in which weights learn once the "
                f"states have relaxed, not {other}"
            )
        self._centre_unless(
            options, mu_pc, "mu_pc=False, since mu_pc gives the weights of each layer units of their own"
        )
        self.steps, self.mode, self.fixed_prediction, self.mu_pc = steps, mode, fixed_prediction, mu_pc
        self._scales: dict[Tensor, float] = {}
        if lr is None:
            lr = 0.03 if mu_pc else 1e-3
        if inference_lr is None:
            inference_lr = 1.0 if fixed_prediction else 0.3 if mu_pc else 0.1
        super().__init__(params, lr, inference_lr=inference_lr, relative=relative, **options)

    def energy(self, z: Tensor, u: Tensor) -> Tensor:
        """Half the squared error of the prediction."""
        return F.mse_loss(z, u, reduction="sum") / 2

    def project(self, z: Tensor) -> Tensor:
        """States have no range."""
        return z

    def _learn(self, run: Run) -> tuple[Tensor, dict[Tensor, Tensor]]:
        evaluation = self._forward(run, errors=self.mode == "error")
        losses = evaluation.losses
        if self.mu_pc:
            self._scales, self._depth = premultipliers(self._wired, self._of_model()), self._wired.depth
        if self.fixed_prediction:
            return losses, self._with_fixed_predictions(evaluation)
        if self.mode == "incremental":
            return losses, self._incremental(run, evaluation)
        if self.mode == "error":
            relaxed = self._relax_errors(run, evaluation)
        else:
            relaxed = self._relax(run, evaluation, 1.0, self.steps)
        grads = self._of_parameters(relaxed, 1.0)
        return losses, {p: gradient * self._scales.get(p, 1.0) for p, gradient in grads.items()}

    def _around_descent(self) -> AbstractContextManager[None]:
        return in_units({p: a for p, a in self._scales.items() if p.grad is not None})

    def _with_fixed_predictions(self, evaluation: Evaluation) -> dict[Tensor, Tensor]:
        """Relax errors within the graph of one evaluation."""
        hidden, outputs = self._wired.hidden, self._wired.outputs
        samples, done = evaluation.samples(self._wired), self._begin_descent(1.0).done
        leaves = [evaluation.leaves[i] for i in hidden]
        errors, powers = [torch.zeros_like(leaf) for leaf in leaves], [self._powers[i] for i in hidden]

        def sent_back(of: list[Tensor], retain: bool) -> list[Tensor | None]:
            with torch.enable_grad():
                pairs = zip(hidden, errors, strict=True)
                terms = [-(e * evaluation.predictions[i].to(e.dtype)).sum() / self._powers[i] for i, e in pairs]
            return evaluation.gradients(terms, outputs, of, samples, retain)

        for _ in range(self.steps if hidden else 0):
            found = sent_back(leaves, True)
            gradients = [e / p if g is None else e / p + g for e, p, g in zip(errors, powers, found, strict=True)]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            energy = sum((e.square().sum() / p for e, p in zip(errors, powers, strict=True)), torch.zeros(())) / 2
            done.energy.append(float(energy / samples + evaluation.loss))
            done.residual.append(float(norm) / samples**0.5)
            errors = [self._moved(i, e, g) for i, e, g in zip(hidden, errors, gradients, strict=True)]
        params = self._of_model()
        return self._per_sample(evaluation, params, sent_back(params, False))

    def _incremental(self, run: Run, evaluation: Evaluation) -> dict[Tensor, Tensor]:
        """Move weights along with states; return the sum of their gradients, with the weights as they were."""
        params, hidden, total = self._of_model(), self._wired.hidden, dict[Tensor, Tensor]()
        self._undo.append(partial(_restore, [(p, p.detach().clone()) for p in params]))
        rates = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
        # A layer moves in its own units, as its states do.
        powers: dict[Tensor, Tensor] = {
            p: self._powers[i] for i in hidden for p in self._wired.synapses[i].parameters()
        }
        descent = self._begin_descent(1.0)
        moves: dict[Tensor, Tensor] = {}  # of weights, in the last step
        for step in range(self.steps):
            leaves = [evaluation.leaves[i] for i in hidden]
            energy, found = self._gradients(evaluation, [*leaves, *params], 1.0)
            gradients = {i: g for i, g in zip(hidden, found, strict=False) if g is not None}
            states = {i: leaf.detach() for i, leaf in zip(hidden, leaves, strict=True)}
            taken_back = descent.done.taken_back
            states = self._step(descent, evaluation, energy, states, gradients)
            if descent.done.taken_back > taken_back:  # weights go back by half of their move, too
                moves = {p: move / 2 for p, move in moves.items()}
                for p, move in moves.items():
                    p.add_(move)
            else:
                grads = self._per_sample(evaluation, params, found[len(hidden) :])
                self._average_over_ranks(list(grads.values()))
                for p, gradient in grads.items():
                    if p in powers:
                        gradient.mul_(powers[p])
                    total[p] = total[p].add_(gradient) if p in total else gradient.clone()
                    moves[p] = gradient.mul_(rates[p] * descent.done.scale)
                    p.sub_(moves[p])
            if step < self.steps - 1:
                evaluation = self._with_states(run, states)
        return total

    def _relax_errors(self, run: Run, evaluation: Evaluation) -> Evaluation:
        """Let errors descend the free energy as a function of them; return the evaluation with the states they make."""
        hidden, descent = self._wired.hidden, self._begin_descent(1.0)
        errors = {i: evaluation.leaves[i].detach() for i in hidden}
        samples = evaluation.samples(self._wired)
        for step in range(self.steps if hidden else 0):
            leaves = [evaluation.leaves[i] for i in hidden]
            if step == 0:  # the loss has been sent back through the whole network
                found = [None if leaf.grad is None else leaf.grad * samples for leaf in leaves]
            else:
                found = evaluation.gradients([], self._wired.outputs, leaves, samples)
            own = [errors[i] / self._powers[i] for i in hidden]
            gradients = {i: e if g is None else e + g for i, e, g in zip(hidden, own, found, strict=True)}
            energy = sum((e.square().sum() / self._powers[i] for i, e in errors.items()), torch.zeros(())) / 2
            errors = self._step(descent, evaluation, energy / samples + evaluation.loss, errors, gradients)
            if step < self.steps - 1:
                evaluation = self._with_errors(run, errors)
        # States cut the network, so that each layer's weights learn from its own error alone.
        return self._evaluate(run, lambda i, u: u + errors[i] if i in errors else u)

    def _with_errors(self, run: Run, errors: dict[int, Tensor]) -> Evaluation:
        """An evaluation in which errors are added to predictions, in a graph of the whole network."""
        return self._evaluate(run, lambda i, u: errors.get(i, u), errors)


@torch.no_grad()
def _restore(kept: list[tuple[Tensor, Tensor]]) -> None:
    for p, values in kept:
        p.copy_(values)
