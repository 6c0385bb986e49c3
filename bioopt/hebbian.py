"""The Hebbian family: a synapse strengthens when the two neurons it joins are active together (Hebb, 1949).

Every rule here is bounded by a decay of Oja's kind, which needs no pass of its own over the activities: with
``u = W x + b``, the mean over events ``⟨s_k u_j⟩`` is ``⟨s_k x⟩ · w_j + ⟨s_k⟩ b_j``, made of the product alone.
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


class Hebbian(SynapticRule):
    r"""Competitive Hebbian plasticity: neurons compete for each event, and winners move towards what they saw.

    .. math::
        y_k = \frac{\exp(t\,u_k / \lVert w_k\rVert)}{\sum_j \exp(t\,u_j / \lVert w_j\rVert)}, \qquad
        \Delta w_k = \langle\, y_k u_k\,(x - \sum_j u_j\,w_j') \,\rangle, \qquad
        w_k' = w_k + \mathrm{lr}\,\Delta w_k

    with presynaptic activity :math:`x`, postsynaptic activity :math:`u = Wx + b`, inverse temperature :math:`t`, and
    the mean :math:`\langle\cdot\rangle` over *events* (samples, and positions of a convolution), so that ``lr`` does
    not depend on the batch or image size. The neurons of a layer compete with each other: the channels of a
    convolution at each position (within a group, for grouped convolutions), the features of a Linear layer in each
    sample. They are compared by the direction of their weights, so that none wins for starting out long. :math:`t`
    leads from Oja's subspace rule (0: the principal components of the input) to winner-take-all (large).

    The decay is Oja's of 1989: what all the neurons of a pool together already say of the input,
    :math:`\sum_j u_j w_j`, is taken from it, as by feedback inhibition. It bounds the weights (at rest
    :math:`W^\top W` is the identity on what the neurons respond to) and keeps winners from all learning the same. It
    is taken at the new weights :math:`w'`: the same rule for a small ``lr``, but one that a large one cannot make
    overshoot. With :math:`P = \langle (y u)\,x^\top\rangle` and :math:`C = \langle (y u)\,u^\top\rangle`, that is
    :math:`\Delta W = (I + \mathrm{lr}\,C)^{-1} (P - C W)`; a step that would be longer than the pool's weights
    (:math:`\mathrm{lr} \lVert\Delta W\rVert > \lVert W\rVert`, Frobenius norms) is cut to their length.

    No error signal and no labels enter; only the readout sees a loss. Biases of the trunk and the affine parameters
    of normalisation layers stay frozen.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate :math:`\mathrm{lr}`, per mean event.
        inverse_temperature: :math:`t`, in units of :math:`1/x`: 0 lets all neurons learn alike, a large value only
            the winner.
        readout: ``"delta"`` trains the last synapse, weight and bias, by its local error times its presynaptic
            activity; ``None`` trains it like the others.
        readout_lr: learning rate of the readout; ``lr`` by default.
        readout_layer: the readout, by name or as a module; the last synapse in registration order by default.
        readout_options: further options of the readout's param group, such as ``{"momentum": 0.9}``.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: average the products over these ranks, each of which has its share of the batch.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with unknown ones.
        TypeError: bare parameters; a model wrapped in DistributedDataParallel.

    Sources: D. E. Rumelhart & D. Zipser (1985), *Feature discovery by competitive learning*; soft competition:
    S. J. Nowlan (1990), *Maximum likelihood competitive learning*; the decay: E. Oja (1989), *Neural networks,
    principal components, and subspaces*.

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
        readout_options: dict[str, Any] | None = None,
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
            readout_options=readout_options,
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
        )

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``softmax(t u / ‖w‖) u``, the softmax over the neurons that compete."""
        scale = group["inverse_temperature"] / synapse.weight.flatten(1).norm(dim=1).clamp(min=1e-12)
        # Neurons last, which is how a channels-last network lays them out: there, twice as fast as along dimension 1.
        last = u.movedim(synapse.channel_dim, -1)
        if last.is_contiguous():
            share = last * scale.to(u.dtype)
            pooled = share.view(*share.shape[:-1], synapse.pools, -1)
            return torch.softmax(pooled, -1).view_as(last).mul_(last).movedim(-1, synapse.channel_dim)
        channel = u.ndim + synapse.channel_dim
        share = u * scale.to(u.dtype).view(-1, *[1] * (u.ndim - channel - 1))
        pooled = share.unflatten(channel, (synapse.pools, -1))
        share = torch.softmax(pooled, channel + 1).flatten(channel, channel + 1)
        return share.mul_(u)

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``(I + lr C)⁻¹ (P - C W)`` in each pool, no step longer than ``‖W‖``."""
        pools = synapse.pools
        # At least single precision, for the solver; autocast would undo that.
        with torch.autocast(product.device.type, enabled=False):
            rows = product.reshape(pools, -1, product[0].numel())
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            weight = synapse.weight.detach().reshape(rows.shape).to(rows.dtype)
            together = rows @ weight.mT
            if signal is not None and synapse.bias is not None:
                together += signal.view(pools, -1, 1) * synapse.bias.detach().view(pools, 1, -1)
            system = torch.eye(together.shape[-1], dtype=rows.dtype, device=rows.device) + group["lr"] * together
            change: Tensor = torch.linalg.solve(system, rows - together @ weight)
            longest = torch.linalg.matrix_norm(weight, keepdim=True)
            length = group["lr"] * torch.linalg.matrix_norm(change, keepdim=True)
            change *= (longest / length.clamp(min=1e-12)).clamp(max=1)
            return change.to(product.dtype).reshape(product.shape)


class Oja(SynapticRule):
    r"""Oja's rule: every neuron becomes the first principal component of its input.

    .. math::
        \Delta w_k = \langle\, u_k\,(x - u_k\,w_k') \,\rangle, \qquad w_k' = w_k + \mathrm{lr}\,\Delta w_k

    with :math:`x`, :math:`u` and the mean over events as in `Hebbian`. For centred input, and without a bias, the
    stable fixed points are the unit eigenvectors :math:`\pm v_1` of :math:`\langle x x^\top\rangle` with the largest
    eigenvalue :math:`\lambda_1`; nothing makes the neurons of one layer differ but their starting point. The
    decay is taken at the new weights, as in `Hebbian`: :math:`\Delta w = (\langle u x\rangle - c\,w) /
    (1 + \mathrm{lr}\,c)` with :math:`c = \langle u^2\rangle`.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate, per mean event.
        readout: as in `Hebbian`, as are the remaining arguments and errors.
        readout_lr: learning rate of the readout; ``lr`` by default.
        readout_layer: the readout, by name or as a module; the last synapse in registration order by default.
        readout_options: further options of the readout's param group, such as ``{"momentum": 0.9}``.
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
        readout_options: dict[str, Any] | None = None,
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
            readout_options=readout_options,
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
        )

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``u`` itself."""
        return u

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``(⟨u x⟩ - ⟨u²⟩ w) / (1 + lr ⟨u²⟩)``."""
        weight = synapse.weight.detach().flatten(1)
        rows = product.flatten(1)
        power = (rows * weight).sum(1, keepdim=True)
        if signal is not None and synapse.bias is not None:
            power += (signal * synapse.bias.detach()).view(-1, 1)
        change: Tensor = (rows - power * weight) / (1 + group["lr"] * power)
        return change.view_as(product)
