"""Rules that find the principal components of their input, and one that decorrelates neurons."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from ..core.homeostasis import DEFAULTS
from ..core.local_product import LocalOptions, LocalProductRule
from ..core.params import Params
from ..core.products import Events, in_full, in_pools, rows_of, weight_shaped
from ..core.synapse import Synapse
from .arithmetic import BLOCK, by_residuals_in_order, clip_update_norm, decay_own_, most, signal_activity_product


class _OfActivity(LocalProductRule):
    """A rule whose teaching signal is postsynaptic activity itself."""

    regulated: ClassVar[dict[str, Any]] = DEFAULTS

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,  # η
        *,
        readout: str | None = "delta",
        **options: Unpack[LocalOptions],
    ) -> None:
        super().__init__(params, lr, readout=readout, **options)

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``u`` itself."""
        return u


@final
class Oja(_OfActivity):
    r"""Every neuron converges to the first principal component of its input.

    .. math::
        \Delta w_k = \langle\, u_k\,(x - u_k\,w_k') \,\rangle, \qquad w_k' = w_k + \mathrm{lr}\,\Delta w_k

    with :math:`x`, :math:`u` and the mean over events as in `Hebbian`. For centred input, and without a bias, the
    stable fixed points are the unit eigenvectors :math:`\pm v_1` of :math:`\langle x x^\top\rangle` with the largest
    eigenvalue :math:`\lambda_1`; the neurons of one layer differ only by their initial weights. The decay is taken at
    the new weights, as in `Hebbian`: :math:`\Delta w = (\langle u x\rangle - c\,w) / (1 + \mathrm{lr}\,c)` with
    :math:`c = \langle u^2\rangle`.

    That is the published formula, ``homeostasis=False``. By default, the unit weight vectors turn by
    :math:`\langle z_k\,\tilde x\rangle` from standardised activity :math:`z` and whitened presynaptic activity
    :math:`\tilde x`, as in `LocalRule`, whose inhibition keeps the neurons of a layer from all converging to the same
    component. For the component itself, write ``inhibition=0, whitening=0`` or the published formula.

    Arguments and errors are those of `LocalRule`.

    Source: E. Oja (1982), *Simplified neuron model as a principal component analyzer*, J. Math. Biology 15.
    """

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``(⟨u x⟩ - ⟨u²⟩ w) / (1 + lr ⟨u²⟩)``."""
        change, weight = rows_of(product, synapse), rows_of(synapse.weight.detach(), synapse)
        decay_own_(change, weight, signal, synapse, group["lr"])
        return weight_shaped(change, synapse)


@final
class Sanger(_OfActivity):
    r"""Generalised Hebbian algorithm: neurons converge to the principal components of their input, in order.

    .. math::
        \Delta w_k = \langle\, u_k\,(x - \sum_{j \le k} u_j\,w_j') \,\rangle, \qquad
        w_k' = w_k + \mathrm{lr}\,\Delta w_k

    with :math:`x`, :math:`u` and the mean over events as in `Hebbian`: neuron :math:`k` learns by Oja's rule from the
    residual of the neurons before it. For centred input, and without a bias, the stable fixed points are :math:`w_k =
    \pm v_k`, the eigenvectors of :math:`\langle x x^\top\rangle` (for a convolution, of image patches) by decreasing
    eigenvalue, in the order of the neurons within their pool. The decay is taken at the new weights:
    :math:`\Delta W = (I + \mathrm{lr}\,L)^{-1} (P - L W)` with :math:`P = \langle u x^\top\rangle` and :math:`L` the
    lower triangle of :math:`\langle u u^\top\rangle`, a triangular system.

    That is the published formula, ``homeostasis=False``. By default, the unit weight vectors :math:`V` turn by
    :math:`P - L V` with :math:`P = \langle z\,(x - \langle x\rangle)^\top\rangle` and the lower triangle :math:`L` of
    :math:`P V^\top`, from standardised activity :math:`z`, as in `LocalRule`.

    Arguments and errors are those of `LocalRule`.

    Source: T. D. Sanger (1989), *Optimal unsupervised learning in a single-layer linear feedforward neural network*,
    Neural Networks 2.
    """

    def most_events(self, synapse: Synapse, group: dict[str, Any]) -> int:
        """As long as they take fewer multiplications than ``L`` and the solution."""
        N, D = len(synapse.weight), synapse.weight[0].numel()
        products = 2.0 if group["homeostasis"] else 2.5
        return most(N, lambda n: n * N * D + BLOCK * N * (n + 1.5 * D) < products * N * N * D)

    def drive(self, product: Tensor, direction: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``P - L V``."""
        return torch.baddbmm(product, (product @ direction.mT).tril_(), direction, alpha=-1)

    def drive_of_few(self, product: Tensor, direction: Tensor, events: Events, group: dict[str, Any]) -> Tensor:
        """``P - L V``."""
        return by_residuals_in_order(events, direction[0], 0.0, product[0]).unsqueeze(0)

    def update_of_few(self, events: Events, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``(I + lr L)⁻¹ (P - L W)``."""
        weight = in_pools(synapse.weight.detach(), synapse)[0]
        change = by_residuals_in_order(events, weight, group["lr"])
        return weight_shaped(change.to(synapse.weight.dtype), synapse)

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``(I + lr L)⁻¹ (P - L W)`` in each pool."""
        rows = in_pools(product, synapse)
        weight = in_pools(synapse.weight.detach(), synapse)
        decay = signal_activity_product(rows, weight, signal, synapse).tril_()
        system = torch.eye(decay.shape[-1], dtype=rows.dtype, device=rows.device) + group["lr"] * decay
        change: Tensor = torch.linalg.solve_triangular(system, rows.baddbmm_(decay, weight, alpha=-1), upper=False)
        return weight_shaped(change.to(product.dtype), synapse)


@final
class AntiHebbian(_OfActivity):
    r"""Neurons that are active together learn to inhibit each other, which decorrelates them.

    .. math::
        \Delta w_k = -\sum_{j \ne k} \langle u_k u_j \rangle\, w_j

    with :math:`u` and the mean over events as in `Hebbian`; that is, :math:`\Delta W = -(C - \mathrm{diag}\,C) W` with
    :math:`C = \langle u u^\top\rangle`, from the local product :math:`\langle u x^\top\rangle`. At the fixed point the
    neurons of a pool are uncorrelated (for input of zero mean; put a batch norm before the layer). A layer
    ``nn.Linear(n, n)`` or ``nn.Conv2d(n, n, 1)`` initialised to the identity decorrelates the activity between two
    others. A step longer than the pool's weights is clipped to their length.

    That is the published formula, ``homeostasis=False``. By default, weight vectors turn by the inhibition of
    `LocalRule` alone, from standardised activity: correlations up to ``tolerance`` stay.

    Arguments and errors are those of `LocalRule`; a pool of one neuron is refused.

    Sources: P. Földiák (1990), *Forming sparse representations by local anti-Hebbian learning*, Biol. Cybernetics 64;
    without lateral weights, as a feedforward stage: N. Ahmad et al. (2023), *Constrained parameter inference as a
    principle for learning*.
    """

    regulated: ClassVar[dict[str, Any]] = {name: DEFAULTS[name] for name in DEFAULTS if name != "whitening"} | {
        "tolerance": 0.7
    }

    def least_neurons(self, group: dict[str, Any]) -> tuple[int, str]:
        """Two."""
        return 2, "decorrelation"

    def most_events(self, synapse: Synapse, group: dict[str, Any]) -> int:
        """All that are fewer than the neurons; inhibition needs none."""
        return 0 if group["homeostasis"] else len(synapse.weight) - 1

    def drive(self, product: Tensor, direction: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """None but the inhibition between neurons."""
        return torch.zeros_like(product)

    def update_of_few(self, events: Events, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``diag(C) W - ⟨u (W^T u)ᵀ⟩``, no step longer than ``‖W‖``."""
        weight = in_pools(synapse.weight.detach(), synapse)
        u = in_full(events.u)
        power = u.square().sum(0).div_(len(u)).unsqueeze(1)
        change = torch.addmm(power * weight[0], u.T, u @ weight[0], alpha=-1 / len(u)).unsqueeze(0)
        change = clip_update_norm(change, weight, group["lr"])
        return weight_shaped(change.to(synapse.weight.dtype), synapse)

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``-(C - diag C) W`` in each pool, no step longer than ``‖W‖``."""
        rows = in_pools(product, synapse)
        weight = in_pools(synapse.weight.detach(), synapse)
        correlation = signal_activity_product(rows, weight, signal, synapse)
        correlation.diagonal(dim1=-2, dim2=-1).zero_()
        change = clip_update_norm((correlation @ weight).neg_(), weight, group["lr"])
        return weight_shaped(change.to(product.dtype), synapse)
