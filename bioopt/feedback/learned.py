"""Rules whose feedback weights learn to equal the forward weights, without ever reading them."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor, nn

from ..core.constraints import NON_NEGATIVE, POSITIVE_INT, Constraint, require_in_range
from ..core.params import Params
from ..core.products import along_channels
from ..core.synapse import Synapse
from .base import LayerwiseFeedback, OwnedFeedback, RandomOptions

__all__ = ["KolenPollack", "WeightMirror"]


@final
class KolenPollack(OwnedFeedback, LayerwiseFeedback):
    r"""Feedback weights get the same local product and the same decay as the forward weights, and so become equal.

    .. math::
        \Delta W_l = -\delta_l\, x_l^\top - \lambda W_l, \qquad \Delta B_l = -\delta_l\, x_l^\top - \lambda B_l

    with :math:`\delta` from feedback by :math:`B`, as in `FeedbackAlignment`. Both pairs of neurons at a synapse know
    :math:`\delta_l` and :math:`x_l`; no weight is read. The difference :math:`W - B` shrinks by
    :math:`1 - \mathrm{lr}\,\lambda` in a step of SGD. :math:`B` is a parameter of the rule's own, in a param group of
    its own with the options of that of :math:`W`, for the same ``descent``; give both the same learning rate, as
    schedulers do.

    Args:
        params: as in `RandomFeedback`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        decay: λ, of the weights of all layers (not of biases).
        options: as in `RandomFeedback`.

    Sources: J. F. Kolen & J. B. Pollack (1994), *Backpropagation without weight transport*, IEEE ICNN; deep networks:
    M. Akrout, C. Wilson, P. Humphreys, T. Lillicrap & D. Tweed (2019), *Deep learning without weight transport*,
    NeurIPS 32.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        decay: float = 1e-4,
        **options: Unpack[RandomOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            own={"decay": decay},
            **options,
        )

    def new_feedback(self, synapse: Synapse) -> nn.Module:
        """Weights that start at random."""
        return FeedbackWeights(self._drawn(synapse))

    def weights_of(self, synapse: Synapse) -> Tensor:
        """The rule's own parameter."""
        return self.own_weights(synapse)

    def learn_feedback(self, grads: dict[Tensor, Tensor], state: dict[str, Any]) -> None:
        """The gradient of the forward weights, and the decay of both."""
        for weights in self._owned.modules.parameters():  # of the last step: model.zero_grad() does not know it
            grads.pop(weights, None)
        for synapse in self._returned:  # where no error returns, feedback weights are of no use
            if synapse.weight in grads:
                grads[self.own_weights(synapse)] = grads[synapse.weight]
                self._same_step[synapse.weight] = self.own_weights(synapse)
        self._add_decay(grads)


class FeedbackWeights(nn.Module):
    """Feedback weights that are a parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


@final
class WeightMirror(LayerwiseFeedback):
    r"""Feedback weights learn the forward weights from the layer's response to noise.

    .. math::
        \Delta B_l = \mathrm{mirror\_lr}\,(\langle u\,\xi^\top \rangle - \mathrm{mirror\_decay}\; B_l),
        \qquad u = W_l\, \xi

    for independent normal noise :math:`\xi` of deviation 1 at the layer's input, after each step, and the mean over
    samples and positions: the fixed point is :math:`B = W / \mathrm{mirror\_decay}`. The error returns by :math:`B`, as
    in `FeedbackAlignment`. No weight is read: a layer is run once on noise, with only its own two populations of
    neurons active. :math:`B` is the rule's own state.

    Args:
        params: as in `RandomFeedback`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        mirror_lr: rate of the feedback weights, at which also the noise in them grows.
        mirror_decay: of the feedback weights.
        mirror_samples: noise patterns of a step.
        options: as in `RandomFeedback`.

    Source: M. Akrout, C. Wilson, P. Humphreys, T. Lillicrap & D. Tweed (2019), *Deep learning without weight
    transport*, NeurIPS 32.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        **LayerwiseFeedback.constraints,
        "mirror_lr": NON_NEGATIVE,
        "mirror_decay": NON_NEGATIVE,
    }

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        mirror_lr: float = 0.02,
        mirror_decay: float = 1.0,
        mirror_samples: int = 16,
        **options: Unpack[RandomOptions],
    ) -> None:
        require_in_range(type(self).__name__, "mirror_samples", mirror_samples, POSITIVE_INT)
        own = {"mirror_lr": mirror_lr, "mirror_decay": mirror_decay}
        super().__init__(params, lr, own=own, **options)
        self.mirror_samples = mirror_samples
        self._own_state |= {"step": 0, "feedback": {}}

    def weights_of(self, synapse: Synapse) -> Tensor:
        """The state, once it has learned; before that, random weights."""
        learned: dict[int, Tensor] = self._own_state["feedback"]
        if synapse.index in learned:
            return learned[synapse.index].to(synapse.weight.device)  # a checkpoint may have left it elsewhere
        return self._drawn(synapse)

    def learn_feedback(self, grads: dict[Tensor, Tensor], state: dict[str, Any]) -> None:
        """One step of every layer that an error returned through."""
        learned = dict(state["feedback"])
        for synapse, shape in self._returned.items():
            group, weight = self.param_groups[synapse.group], self.weights_of(synapse)
            rate, left = group["mirror_lr"], 1 - group["mirror_lr"] * group["mirror_decay"]
            learned[synapse.index] = self._response(synapse, shape).mul_(rate).add_(weight, alpha=left)
        state["feedback"] = learned

    def _response(self, synapse: Synapse, shape: torch.Size) -> Tensor:
        """``⟨u ξᵀ⟩`` for noise of this shape at the input of a layer, without its bias."""
        weight, bias = synapse.weight, synapse.bias
        batched = len(shape) > -synapse.channel_dim
        noise = weight.new_empty(self.mirror_samples, *shape[batched:])
        noise = self._random.at_step(synapse, noise, self._seed, self._own_state["step"])
        with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
            u = synapse.layer.forward(noise)
            response = u.detach() if bias is None else u.detach() - along_channels(bias, synapse)
            (product,) = torch.autograd.grad(u, weight, response / (u.numel() / len(weight)))
        return product
