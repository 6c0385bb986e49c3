"""`LocalLoss`: each layer has a classifier of its own, or matches the similarity of samples to that of their labels."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.constraints import POSITIVE_INT, Constraint, one_of
from ..core.params import Params
from .blocks import Block
from .gradient import LocalLossRule
from .heads import Heads, LocalOptions, cross_entropy, deviation, pooled, require_size

__all__ = ["LocalLoss"]


@final
class LocalLoss(LocalLossRule):
    r"""Each layer learns from a classifier of its own, and from how similar samples of one class are in it.

    At the end of each block, with activity :math:`h` of a batch,

    .. math::
        L = (1 - \beta)\, \mathrm{CE}(V\, \mathrm{pool}(h), y)
        + \beta\, \lVert S(g(h)) - S(\mathrm{onehot}(y)) \rVert^2 ,

    where :math:`V` is a linear classifier on activity that is averaged over positions until at most ``pool`` are left
    along each dimension, :math:`g` a linear map of the neurons at each position, of which the deviation over positions
    is taken, and :math:`S(z)_{ij}` the correlation of samples :math:`i` and :math:`j` over the features of :math:`z`;
    the norm is the mean over pairs. :math:`V` and :math:`g` learn by the same gradient, and belong to the optimizer.

    Args:
        params: as in `BlockRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        loss: ``"cross_entropy"``, ``"similarity"``, or ``"both"``.
        pool: the number of positions that a classifier sees along each dimension of images or sequences.
        beta: :math:`\beta` in [0, 1], with ``loss="both"``.
        options: ``readout`` and its options, ``head_lr``, ``blocks``, ``classes``, ``seed``, ``example``, ``exclude``,
            ``descent`` and its options, ``process_group``, as in `BlockRule`.

    Attributes:
        target: the labels, as in `BlockRule`.

    Source: A. Nøkland & L. H. Eidnes (2019), *Training neural networks with local error signals*, ICML.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "pool": POSITIVE_INT,
        "beta": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
        "loss": one_of("cross_entropy", "similarity", "both"),
    }

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        loss: str = "cross_entropy",
        pool: int = 4,
        beta: float = 0.99,  # β
        **options: Unpack[LocalOptions],
    ) -> None:
        super().__init__(params, lr, own={"loss": loss, "pool": pool, "beta": beta}, **options)

    def new_head(self, block: Block) -> nn.Module:
        """The classifier, and the map whose similarity is matched, where the loss needs them."""
        weight, group = block.synapses[-1].weight, self._group(block)
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        heads: dict[str, nn.Module] = {}
        if group["loss"] != "similarity":
            heads["classifier"] = nn.LazyLinear(self.number_of_classes, **like)
        if group["loss"] != "cross_entropy":
            heads["map"] = nn.LazyLinear(len(weight), bias=False, **like)
        return Heads(heads)

    def local_loss(self, block: Block, h: Tensor, channel_dim: int) -> Tensor:
        """Cross-entropy, the distance of similarities, or both."""
        y, group = self.labels(h), self._group(block)
        parts: dict[str, Any] = {"classifier": pooled(h, channel_dim, group["pool"]), "map": h.movedim(channel_dim, -1)}
        heads: Any = self._owned[block.name]
        inputs = {name: parts[name] for name in heads}
        for name, features in inputs.items():
            require_size(type(self).__name__, block.name, heads[name], features)
        outputs = dict(zip(inputs, self.head(block, *inputs.values()), strict=True))
        losses = []
        if "classifier" in outputs:
            losses.append(cross_entropy(outputs["classifier"], y))
        if "map" in outputs:
            losses.append(similarity_loss(outputs["map"], y, self.number_of_classes))
        share = group["beta"] if len(losses) == 2 else 1.0
        return torch.lerp(losses[0], losses[-1], share)

    def _group(self, block: Block) -> dict[str, Any]:
        return self.param_groups[block.synapses[0].group]


def similarity_loss(h: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean squared difference between correlations of samples in ``h`` (features last) and in their labels."""
    h = deviation(h.to(torch.promote_types(h.dtype, torch.float32)))
    with torch.autocast(h.device.type, enabled=False):
        return F.mse_loss(correlations(h), correlations(F.one_hot(labels, classes).to(h.dtype)))


def correlations(h: Tensor) -> Tensor:
    """The correlation of each two samples over features."""
    z = F.normalize(h - h.mean(1, keepdim=True), dim=1)
    return z @ z.mT
