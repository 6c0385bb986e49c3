"""Rules whose feedback weights do not learn: random ones, and those with the signs of the forward weights."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack, final

from torch import Tensor

from ..core.constraints import Constraint, one_of
from ..core.params import Params
from ..core.synapse import Synapse
from .base import LayerwiseFeedback, RandomOptions

__all__ = ["FeedbackAlignment", "SignSymmetry"]

MODES = ("uniform", "fixed", "batchwise")


@final
class FeedbackAlignment(LayerwiseFeedback):
    r"""The error returns by fixed random weights; the forward weights align with them.

    .. math::
        \delta_{l-1} = \phi'(u_{l-1}) \odot B_l^\top \delta_l, \qquad \Delta W_l = -\delta_l\, x_l^\top

    with the presynaptic activity :math:`x`, the error :math:`\delta` at a layer's output, and feedback weights
    :math:`B_l` of the shape of :math:`W_l`, normal numbers of standard deviation ``feedback_scale`` :math:`/ \sqrt{n}`
    for :math:`n` inputs of a neuron: with 1, the error keeps its length on average. The feedback of a convolution is a
    transposed convolution.

    Arguments and errors are those of `RandomFeedback`.

    Source: T. P. Lillicrap, D. Cownden, D. B. Tweed & C. J. Akerman (2016), *Random synaptic feedback weights support
    error backpropagation for deep learning*, Nature Communications 7.
    """

    def weights_of(self, synapse: Synapse) -> Tensor:
        """Drawn from the seed and the index of the layer."""
        return self._drawn(synapse)


@final
class SignSymmetry(LayerwiseFeedback):
    r"""The error returns by weights with the signs of the forward weights and other magnitudes.

    .. math::
        \delta_{l-1} = \phi'(u_{l-1}) \odot B_l^\top \delta_l, \qquad B_l = M_l \odot \mathrm{sign}(W_l)

    as in `FeedbackAlignment`, with magnitudes :math:`M` by ``mode``, of root mean square ``feedback_scale``
    :math:`/ \sqrt{n}`. The signs follow the forward weights at each step.

    Args:
        params: as in `RandomFeedback`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        mode: ``"uniform"``: all magnitudes of a layer are alike (uSF); ``"fixed"``: those of normal numbers that are
            drawn once (frSF); ``"batchwise"``: drawn for each step (brSF).
        options: as in `RandomFeedback`, with ``fan_in=None`` by default: this error knows the way.

    Source: Q. Liao, J. Z. Leibo & T. Poggio (2016), *How important is weight symmetry in backpropagation?*, AAAI 30.
    """

    constraints: ClassVar[dict[str, Constraint]] = {**LayerwiseFeedback.constraints, "mode": one_of(*MODES)}

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        mode: str = "uniform",
        **options: Unpack[RandomOptions],
    ) -> None:
        options.setdefault("fan_in", None)
        super().__init__(params, lr, own={"mode": mode}, **options)

    def weights_of(self, synapse: Synapse) -> Tensor:
        """The signs of the weights, times the magnitudes."""
        weight, mode = synapse.weight.detach(), self.param_groups[synapse.group]["mode"]
        if mode == "fixed":
            return self._drawn(synapse).abs().copysign(weight).mul_(weight != 0)
        deviation = self._deviation(synapse, weight[0].numel())
        if mode == "uniform":
            return weight.sign().mul_(deviation)
        drawn = self._random.at_step(synapse, weight, self._seed, self._own_state.get("draws", 0))
        return drawn.abs_().mul_(deviation).mul_(weight.sign())

    def learn_feedback(self, grads: dict[Tensor, Tensor], state: dict[str, Any]) -> None:
        """Count the steps with new magnitudes."""
        if any(group["mode"] == "batchwise" for group in self.param_groups):
            state["draws"] = self._own_state.get("draws", 0) + 1
