"""The Hebbian family: a synapse strengthens when the two neurons it joins are active together (Hebb, 1949).

All rules here are bounded by Oja's decay, which needs no pass of its own over the activities: with
``u = W x + b``, the mean over events ``⟨s_k u_k⟩`` is ``w_k · ⟨s_k x⟩ + b_k ⟨s_k⟩``, made of the product alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from .optimizer import Constraint, Params, ProcessGroup
from .recorder import Synapse
from .synaptic import SynapticRule

__all__ = ["Hebbian", "Oja"]


def _oja(product: Tensor, signal: Tensor | None, synapse: Synapse, lr: float | Tensor) -> Tensor:
    """``(⟨s xᵀ⟩ - c w) / (1 + lr c)`` with ``c = ⟨s u⟩`` for every neuron: a step of Oja's rule, its decay implicit."""
    weight, bias = synapse.weight.detach(), synapse.bias
    c = (weight * product).flatten(1).sum(1)
    if bias is not None and signal is not None:
        c += bias.detach() * signal
    c = c.view(-1, *[1] * (weight.ndim - 1))
    return (product - c * weight) / (1 + lr * c.clamp(min=0))


class Hebbian(SynapticRule):
    r"""Competitive Hebbian plasticity: neurons compete for each event, and winners move towards what they saw.

    .. math::
        y_k = \frac{\exp(t\,u_k / \lVert w_k\rVert)}{\sum_j \exp(t\,u_j / \lVert w_j\rVert)}, \qquad
        \Delta w_k = \langle\, y_k\,(x - u_k\,w_k') \,\rangle, \qquad
        w_k' = w_k + \mathrm{lr}\,\Delta w_k

    with presynaptic activity :math:`x`, postsynaptic activity :math:`u = Wx + b`, inverse temperature :math:`t`, and
    the mean :math:`\langle\cdot\rangle` over *events* (samples, and positions of a convolution), so that ``lr`` does
    not depend on the batch or image size. The neurons of a layer compete with each other: the channels of a
    convolution at each position (within a group, for grouped convolutions), the features of a Linear layer in each
    sample. They are compared by the direction of their weights, so that none wins for starting out long.

    Oja's decay bounds the weights: each weight vector tends to unit length. It is taken implicitly, at the new
    weights :math:`w'`, which is the same rule for small ``lr`` but cannot overshoot at a large one:
    :math:`\Delta w = (\langle y x\rangle - c\,w) / (1 + \mathrm{lr}\,c)` with :math:`c = \max(0, \langle y u\rangle)`.

    The rule is local: it uses the activities of the two neurons that a synapse joins, its neuron's own weights, and
    the pool's normalisation; no error signal, no labels. Only the readout sees a loss. Biases of the trunk and the
    affine parameters of normalisation layers stay frozen.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate :math:`\mathrm{lr}`, per mean event.
        inverse_temperature: :math:`t`, in units of :math:`1/x`: 0 lets all neurons learn alike, large values are
            winner-take-all.
        readout: ``"delta"`` trains the last synapse, weight and bias, by its local error times its presynaptic
            activity; ``None`` trains it like the others.
        readout_lr: learning rate of the readout; ``lr`` by default.
        readout_layer: the readout, by name or as a module; the last synapse in registration order by default.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: average the products over these ranks, each of which has its share of the batch.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with unknown ones.
        TypeError: bare parameters; a model wrapped in DistributedDataParallel.

    Sources: D. E. Rumelhart & D. Zipser (1985), *Feature discovery by competitive learning*; E. Oja (1982),
    *Simplified neuron model as a principal component analyzer*; soft competition: S. J. Nowlan (1990), and
    T. Moraitis et al. (2022), *SoftHebb*.

    Example::

        optimizer = bioopt.Hebbian(model, lr=0.05)
        loss = optimizer.step(closure)
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "inverse_temperature": (lambda v: 0 <= v < float("inf"), "a finite number >= 0")
    }

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        inverse_temperature: float = 1.0,  # t
        readout: str | None = "delta",
        readout_lr: float | None = None,
        readout_layer: str | nn.Module | None = None,
        descent: type[Optimizer] = SGD,
        process_group: ProcessGroup = None,
        **descent_options: Any,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "inverse_temperature": inverse_temperature},
            readout=readout,
            readout_lr=readout_lr,
            readout_layer=readout_layer,
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
        )

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``softmax(t u / ‖w‖)`` over the neurons that compete."""
        channel = u.ndim + synapse.channel_dim
        scale = group["inverse_temperature"] / synapse.weight.flatten(1).norm(dim=1).clamp(min=1e-12)
        score = u * scale.to(u.dtype).view(-1, *[1] * (u.ndim - channel - 1))
        if synapse.pools == 1:
            return torch.softmax(score, channel)
        pooled = score.unflatten(channel, (synapse.pools, -1))
        return torch.softmax(pooled, channel + 1).flatten(channel, channel + 1)

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``⟨y x⟩ - ⟨y u⟩ w``."""
        return _oja(product, signal, synapse, group["lr"])


class Oja(SynapticRule):
    r"""Oja's rule: every neuron becomes the first principal component of its input.

    .. math::
        \Delta w_k = \langle\, u_k\,(x - u_k\,w_k') \,\rangle, \qquad w_k' = w_k + \mathrm{lr}\,\Delta w_k

    with :math:`x`, :math:`u` and the mean over events as in `Hebbian`. For centred input, and without a bias, the
    stable fixed points are the unit eigenvectors :math:`\pm v_1` of :math:`\langle x x^\top\rangle` with the largest
    eigenvalue :math:`\lambda_1`; nothing makes the neurons of one layer differ but their starting point. The decay is
    implicit, as in `Hebbian`: the fixed points are Oja's, and no ``lr`` is too large.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate, per mean event.
        readout: as in `Hebbian`, as are the remaining arguments and errors.
        readout_lr: learning rate of the readout; ``lr`` by default.
        readout_layer: the readout, by name or as a module; the last synapse in registration order by default.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: average the products over these ranks, each of which has its share of the batch.

    Source: E. Oja (1982), *Simplified neuron model as a principal component analyzer*, J. Math. Biology 15.
    """

    def __init__(
        self,
        params: Params,
        lr: float,  # γ
        *,
        readout: str | None = "delta",
        readout_lr: float | None = None,
        readout_layer: str | nn.Module | None = None,
        descent: type[Optimizer] = SGD,
        process_group: ProcessGroup = None,
        **descent_options: Any,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr},
            readout=readout,
            readout_lr=readout_lr,
            readout_layer=readout_layer,
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
        )

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``u`` itself."""
        return u

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``⟨u x⟩ - ⟨u²⟩ w``."""
        return _oja(product, signal, synapse, group["lr"])
