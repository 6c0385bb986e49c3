"""Equilibrium propagation: weights learn from the difference between relaxed states with and without the loss."""

from __future__ import annotations

from typing import Any, Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.constraints import POSITIVE, POSITIVE_INT, Constraint, one_of
from ..core.errors import warn
from ..core.hooks import Hook, leave_no_trace
from ..core.params import GradientOptions, Params
from ..core.probe import keeping_modes
from ..core.recorder import Recorder
from ..core.sums import add_up
from .base import EnergyRule, Run
from .states import Evaluation

__all__ = ["EquilibriumPropagation"]

NUDGING: Constraint = one_of("centered", "positive", "negative")
ENERGY: Constraint = one_of("feedforward", "hopfield")
LOWEST = 1e-6  # of a state in [0, 1]: the slope of ReLU is 1 there and 0 at 0, so that silent neurons receive feedback
MAX_POOLING = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


@final
class EquilibriumPropagation(EnergyRule):
    r"""Weights learn from the difference between two relaxed states, nudged towards a lower and a higher loss.

    .. math::
        F_\beta = \sum_l \frac{E(z_l, u_l)}{\sigma_l^2} + \beta N L, \qquad
        \Delta\theta = -\frac{1}{N (\beta_1 - \beta_0)} \left(
        \frac{\partial F_{\beta_1}}{\partial \theta}\left(z(\beta_1)\right)
        - \frac{\partial F_{\beta_0}}{\partial \theta}\left(z(\beta_0)\right) \right)

    where the states :math:`z(\beta)` have relaxed to the minimum of :math:`F_\beta`. As :math:`\beta \to 0`, this is
    the gradient of the loss at the free equilibrium :math:`z(0)`. Nudging takes :math:`(\beta_1, \beta_0)` from:

    - ``"centered"``: :math:`(\beta, -\beta)`; its error falls with :math:`\beta^2`;
    - ``"positive"``: :math:`(\beta, 0)`, and ``"negative"``: :math:`(0, -\beta)`; their error falls with :math:`\beta`.

    Energies of a layer with the prediction :math:`u_l = W_l h_{l-1} + b_l`:

    - ``"feedforward"``: :math:`E = \tfrac{1}{2} \lVert z - u \rVert^2`, that of predictive coding. Its free equilibrium
      is the forward pass, so that the model predicts as it is, and there is no free phase;
    - ``"hopfield"``: :math:`E = \tfrac{1}{2} \lVert z \rVert^2 - z^\top u`, with states in [0, 1] and
      :math:`\sigma = 1`. Layers act on each other in both directions, by symmetric weights, also without the loss. The
      free states relax for ``free_steps`` from those of the forward pass. Predictions need relaxation, too: `relaxed`.

    Both nudged phases start from the free states. The outputs have no state: they read the last states out.

    Cost of a step: ``1 + 2 nudged_steps`` evaluations with a backward pass each (half for nudging to one side), and
    ``1 + free_steps`` more with the Hopfield energy.

    Args:
        params: as in `EnergyRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        nudging: ``"centered"``, ``"positive"`` or ``"negative"``.
        beta: :math:`\beta`.
        free_steps: of the relaxation without the loss, with the Hopfield energy.
        nudged_steps: of each relaxation with it.
        inference_lr: :math:`\gamma`; by default 0.1, and 1 with the Hopfield energy and ``alternate``.
        relative: whether states and energies are in units of each layer's activity, with the feedforward energy.
        energy: ``"feedforward"`` or ``"hopfield"``.
        alternate: whether a step moves every other layer, in turn, rather than all at once; by default with the
            Hopfield energy, whose layers then reach their minimum given their neighbours in one step of rate 1.
        options: ``exclude``, ``descent`` and its options, ``process_group``, as in `EnergyRule`.

    Raises:
        ValueError, TypeError, Diverged, RuntimeError: as `EnergyRule`.

    Sources: B. Scellier & Y. Bengio (2017), *Equilibrium propagation: bridging the gap between energy-based models and
    backpropagation*, Frontiers in Computational Neuroscience 11; centered: A. Laborieux, M. Ernoult, B. Scellier,
    Y. Bengio, J. Grollier & D. Querlioz (2021), *Scaling equilibrium propagation to deep ConvNets by drastically
    reducing its gradient estimator bias*, Frontiers in Neuroscience 15; negative: B. Scellier, M. Ernoult, J. Kendall &
    S. Kumar (2023), *Energy-based learning algorithms for analog computing: a comparative study*, NeurIPS 36.
    """

    steps_option = "nudged_steps"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,  # η
        *,
        nudging: str = "centered",
        beta: float = 0.1,  # β
        free_steps: int = 20,
        nudged_steps: int = 8,
        inference_lr: float | None = None,  # γ
        relative: bool = True,
        energy: str = "feedforward",
        alternate: bool | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        for name, value, constraint in (
            ("nudging", nudging, NUDGING),
            ("beta", beta, POSITIVE),
            ("free_steps", free_steps, POSITIVE_INT),
            ("nudged_steps", nudged_steps, POSITIVE_INT),
            ("energy", energy, ENERGY),
        ):
            self._check_value(name, value, constraint)
        self._hopfield = energy == "hopfield"
        if alternate is None:
            alternate = self._hopfield
        self._require_bool("alternate", alternate)
        self.nudging, self.beta, self.alternate = nudging, beta, alternate
        self.free_steps, self.nudged_steps = free_steps, nudged_steps
        if inference_lr is None:
            inference_lr = 1.0 if self._hopfield and alternate else 0.1
        super().__init__(params, lr, inference_lr=inference_lr, relative=relative and not self._hopfield, **options)
        pooling = any(isinstance(inner, MAX_POOLING) for module in self._known.roots for inner in module.modules())
        if self._hopfield and pooling:
            warn(
                "EquilibriumPropagation: energy='hopfield' with max pooling: states jump as another input becomes the "
                "largest, so that they converge badly; use average pooling"
            )

        self._plain = _PlainPrediction(self._recorder)
        for model in self._known.roots if self._hopfield else ():
            self._plain.watch(model)

    def energy(self, z: Tensor, u: Tensor) -> Tensor:
        """As `EquilibriumPropagation` describes."""
        return z.square().sum() / 2 - (z * u).sum() if self._hopfield else F.mse_loss(z, u, reduction="sum") / 2

    def project(self, z: Tensor) -> Tensor:
        """States of the Hopfield energy stay in [0, 1]."""
        return z.clamp(LOWEST, 1) if self._hopfield else z

    def _learn(self, run: Run) -> tuple[Tensor, dict[Tensor, Tensor]]:
        free = self._forward(run)
        if self._hopfield:
            free = self._relax_freely(run, free)
        high = 0.0 if self.nudging == "negative" else self.beta
        low = 0.0 if self.nudging == "positive" else -self.beta
        total = dict[Tensor, Tensor]()
        for nudge, sign in ((high, 1), (low, -1)):
            last = sign < 0
            end = free
            if nudge:
                end = self._relax(run, free, nudge, self.nudged_steps, alternate=self.alternate, retain=not last)
            grads = self._of_parameters(end, nudge, retain=end is free and not last)
            add_up(total, ((p, gradient * (sign / (high - low))) for p, gradient in grads.items()))
        return free.losses, total

    def _relax_freely(self, run: Run, evaluation: Evaluation) -> Evaluation:
        """Without the loss, from the states of the forward pass."""
        states = {i: self.project(evaluation.leaves[i].detach()) for i in self._wired.hidden}
        return self._relax(run, self._with_states(run, states), 0.0, self.free_steps, alternate=self.alternate)

    @torch.no_grad()
    def relaxed(self, inputs: Any) -> Any:
        """The output of the model in evaluation mode, with relaxed states.

        With the feedforward energy that is the output of the forward pass.

        Args:
            inputs: of the model.

        Raises:
            RuntimeError: the rule was given parts of a model; no layer has a state.
        """
        if len(roots := list(self._known.roots)) != 1:
            raise RuntimeError(
                "EquilibriumPropagation: relaxed() needs a rule that was given the whole model, not parts of it: "
                "EquilibriumPropagation(model, ...)"
            )
        model, recorder = roots[0], self._recorder
        with keeping_modes(model):
            model.eval()
            if not self._hopfield:
                return model(inputs)
            recorder.in_evaluation, restore = True, recorder.restoring()
            try:
                with recorder.acting(self._enter, self._leave):
                    return self._predicted(model, inputs)
            finally:
                recorder.in_evaluation = False
                restore()  # these firings are no forward pass that a step would learn from
                self._forget()

    def _predicted(self, model: nn.Module, inputs: Any) -> Tensor:
        def run(evaluation: Evaluation) -> Tensor:
            with torch.enable_grad():
                outputs: Tensor = model(inputs)
            return outputs

        return self._relax_freely(run, self._forward(run, loss=False)).losses


class _PlainPrediction:
    """Warns once of a model that predicts in evaluation mode without relaxing.

    Args:
        recorder: of the rule.

    Attributes:
        watched: the models.
        active: whether anything is called as synapses fire.
    """

    active = False

    def __init__(self, recorder: Recorder) -> None:
        self.watched: set[nn.Module] = set()
        self._recorder = recorder
        self._warned = False

    def watch(self, model: nn.Module) -> None:
        """Install the hook of a model."""
        self._recorder.keep(model.register_forward_pre_hook(Hook(self, "before")))
        leave_no_trace(type(model))
        self.watched.add(model)

    def before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """The model begins to run."""
        if not (model.training or self._recorder.in_evaluation or self._warned):
            self._warned = True
            warn(
                "EquilibriumPropagation: with energy='hopfield' the network that learns is the one that relaxes, and "
                "model(inputs) is another function: predict by optimizer.relaxed(inputs)"
            )
