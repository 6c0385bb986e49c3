"""`MonoForward`: each layer projects its whole activity to the classes."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from .blocks import Block
from .gradient import LocalLossRule
from .heads import cross_entropy, require_size

__all__ = ["MonoForward"]


@final
class MonoForward(LocalLossRule):
    r"""Each layer has a projection to the classes, and learns to make that of the right class the largest.

    At the end of each block, with activity :math:`h`, the goodness of class :math:`c` is :math:`G_c = m_c \cdot h`, and

    .. math::
        L = -\log \frac{\exp G_y}{\sum_c \exp G_c}

    for the label :math:`y`. The weights of the block and the projection :math:`m` learn by its gradient. There is one
    forward pass, without pooling or negative samples.

    Args:
        params: as in `BlockRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        options: as in `BlockRule`.

    Attributes:
        target: the labels, as in `BlockRule`.

    Source: J. Gong, B. Li & W. Abdulla (2025), *Mono-Forward: backpropagation-free algorithm for efficient neural
    network training harnessing local errors*, arXiv:2501.09238.
    """

    def new_head(self, block: Block) -> nn.Module:
        """The projection."""
        weight = block.synapses[-1].weight
        return nn.LazyLinear(self.number_of_classes, bias=False, dtype=weight.dtype, device=weight.device)

    def local_loss(self, block: Block, h: Tensor, channel_dim: int) -> Tensor:
        """The cross-entropy of the goodness of each class."""
        features = h.flatten(1) if h.ndim > 1 else h
        require_size(type(self).__name__, block.name, self._owned[block.name], features)
        return cross_entropy(self.head(block, features), self.labels(h))
