"""`LocalContrastive`: each block tells two views of one sample from views of others, without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.constraints import POSITIVE, POSITIVE_INT, Constraint
from ..core.noise import NoiseSource
from ..core.params import Params
from ..core.probe import Probe
from ..core.products import in_full
from ..core.rule import Estimate
from ..core.synapse import Synapse
from .blocks import Block
from .gradient import LocalGradientRule
from .heads import BlockOptions, pooled, require_size
from .views import view_of

__all__ = ["LocalContrastive"]


@final
class LocalContrastive(LocalGradientRule):
    r"""Each block makes two views of a sample alike, and unlike views of other samples; labels train the readout alone.

    A step has an ordinary pass, and a pass of other views of the same inputs. At the end of each block, with activity
    :math:`h` of the view and :math:`h'` of the input itself,

    .. math::
        z = \frac{V\, \mathrm{pool}(h)}{\lVert V\, \mathrm{pool}(h) \rVert}, \qquad
        L = -\langle \log \frac{\exp(z_i \cdot z'_i / \tau)}{\sum_j \exp(z_i \cdot z'_j / \tau)} \rangle_i

    over the samples :math:`i, j` of the batch, with a linear map :math:`V` that belongs to the optimizer and learns by
    the same gradient. :math:`z'` is what the block remembers of the first pass: it gets no gradient. The readout learns
    from the loss of the ordinary pass, by its own error on standardised activity, and shows what the last block has
    learned. It has to follow features that never settle, so that ``lr`` is smaller than that of other local losses.

    By default a view is shifted by up to an eighth of the image to each side, of other contrast and brightness (of each
    channel), and partly hidden; of inputs of Linear layers, three tenths of the values are hidden. A batch of one
    sample teaches nothing.

    Args:
        params: as in `BlockRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        temperature: :math:`\tau` > 0.
        features: the number of values in :math:`z`.
        pool: the number of positions that :math:`V` sees along each dimension of images or sequences.
        views: a function of the inputs of the first layer that returns other views of them, in place of the default.
        readout: ``"delta"``, or ``None``: by ``descent``, as the blocks; as in `BlockRule`.
        options: further options of the readout, ``head_lr``, ``blocks``, ``seed``, of heads and views, ``example``,
            ``exclude``, ``descent`` and its options, ``process_group`` (each rank contrasts the samples of its own
            share), as in `BlockRule`.

    Raises:
        ValueError: an option out of range; views of another shape, or the inputs themselves.

    Sources: S. Löwe, P. O'Connor & B. Veeling (2019), *Putting an end to end-to-end: gradient-isolated learning of
    representations*, NeurIPS; B. Illing, J. Ventura, G. Bellec & W. Gerstner (2021), *Local plasticity rules can learn
    deep representations using self-supervised contrastive predictions*, NeurIPS; the loss of views: T. Chen, S.
    Kornblith, M. Norouzi & G. Hinton (2020), *A simple framework for contrastive learning of visual representations*.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"temperature": POSITIVE, "pool": POSITIVE_INT}
    needs_target = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        *,
        temperature: float = 0.2,  # τ
        features: int = 128,
        pool: int = 2,
        views: Callable[[Tensor], Tensor] | None = None,
        readout: str | None = "delta",
        **options: Unpack[BlockOptions],
    ) -> None:
        self._check_value("features", features, POSITIVE_INT)
        if views is not None and not callable(views):
            raise ValueError(f"LocalContrastive: views={views!r} must be a function of inputs, or None")
        self.features, self.views = features, views
        self._noise = NoiseSource()
        # In a step, of the ordinary pass, in the order in which blocks end.
        self._remembered: dict[Block, list[Tensor]] | None = None
        super().__init__(params, lr, own={"temperature": temperature, "pool": pool}, readout=readout, **options)
        self._own_state = {"step": 0}
        self._recorder.act(self._receive, self._leave)

    def new_head(self, block: Block) -> nn.Module:
        """The map :math:`V`."""
        weight = block.synapses[-1].weight
        return nn.LazyLinear(self.features, bias=False, dtype=weight.dtype, device=weight.device)

    def local_loss(self, block: Block, h: Tensor, channel_dim: int) -> Tensor | None:
        """Of views; in the ordinary pass, blocks learn nothing."""
        group = self.param_groups[block.synapses[0].group]
        parts = pooled(h, channel_dim, group["pool"])
        require_size(type(self).__name__, block.name, self._owned[block.name], parts)
        z = F.normalize(in_full(self.head(block, parts)), dim=1)
        if self._remembered is None:
            return None
        remembered = self._remembered.setdefault(block, [])
        if not self._phase:
            remembered.append(z.detach())
            return None
        with torch.autocast(h.device.type, enabled=False):
            scores = z @ remembered.pop(0).mT / group["temperature"]
        return F.cross_entropy(scores, torch.arange(len(z), device=z.device))

    def _estimate(self, probe: Probe) -> Estimate:
        self._remembered = {}
        try:
            return self._in_passes(probe, [1])
        finally:
            self._remembered = None

    def _in_place_of(self, x: Tensor, synapse: Synapse, hidden: bool) -> Tensor:
        """Inputs are replaced by views of them."""
        return x if hidden else self._view(x, synapse)

    def _view(self, x: Tensor, synapse: Synapse) -> Tensor:
        """The view of an input, the same for all layers that it enters."""
        known = {id(seen): view for _, seen, view in self._inputs}
        if id(x) in known:
            return known[id(x)]
        if self.views is None:
            counts = self._own_state["step"], self._ranks[0], len(known)
            view = view_of(x, synapse.channel_dim, self._noise.stream(x.device, self.seed, *counts))
        else:
            view = self.views(x)
            if view.shape != x.shape or view is x:
                what = "the inputs themselves" if view is x else f"inputs of shape {tuple(view.shape)}"
                raise ValueError(
                    f"LocalContrastive: views= returned {what} for inputs of shape {tuple(x.shape)}; it must return "
                    "others of the same shape"
                )
        return view
