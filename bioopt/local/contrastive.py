"""`LocalContrastive`: each block tells two views of one sample from those of others, without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.acts import detached
from ..core.constraints import POSITIVE, POSITIVE_INT, Constraint
from ..core.noise import NoiseSource
from ..core.params import Params
from ..core.probe import Probe
from ..core.reach import gates_behind
from ..core.rule import Estimate
from ..core.synapse import Synapse
from .blocks import Block
from .gradient import LocalGradientRule
from .heads import LocalOptions, pooled, require_size
from .views import view_of

__all__ = ["LocalContrastive"]


@final
class LocalContrastive(LocalGradientRule):
    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        loss="softmax",
        temperature: float = 0.2,
        features: int = 128,
        pool: int = 2,
        views: Callable[[Tensor], Tensor] | None = None,
        **options: Unpack[LocalOptions],
    ) -> None:
        self.loss = loss
        self._check_value("features", features, POSITIVE_INT)
        self.features, self.views = features, views
        self.needs_target = False
        self._noise = NoiseSource()
        self._kept: dict[Block, list[Tensor]] = {}  # what blocks made of the samples themselves
        self._viewed: list[tuple[Tensor, Tensor]] = []  # inputs, and views of them
        super().__init__(params, lr, own={"temperature": temperature, "pool": pool}, **options)
        self._own_state = {"step": 0}
        self._recorder.act(self._receive, self._leave)

    def new_head(self, block: Block) -> nn.Module:
        if self.loss == "lpl":
            return None
        weight = block.synapses[-1].weight
        return nn.LazyLinear(self.features, bias=False, dtype=weight.dtype, device=weight.device)

    def local_loss(self, block: Block, h: Tensor, channel_dim: int) -> Tensor | None:
        group = self.param_groups[block.synapses[0].group]
        parts = pooled(h, channel_dim, group["pool"])
        if self.loss != "lpl":
            require_size(type(self).__name__, block.name, self._owned[block.name], parts)
        z = parts if self.loss == "lpl" else self.head(block, parts)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.loss == "softmax":
            z = F.normalize(z, dim=1)
        if not self._phase:
            self._kept.setdefault(block, []).append(z.detach())
            return None
        other = self._kept[block].pop(0)
        if self.loss == "softmax":
            scores = z @ other.mT / group["temperature"]
            return F.cross_entropy(scores, torch.arange(len(z), device=z.device))
        if self.loss == "hinge":
            s = F.normalize(z, dim=1) @ F.normalize(other, dim=1).mT * 4
            eye = torch.eye(len(z), dtype=torch.bool)
            return F.relu(1 - s[eye]).mean() + F.relu(1 + s[~eye]).mean()
        d = z.shape[1]
        c = z - z.mean(0)
        cov = c.mT @ c / (len(z) - 1)
        var = cov.diagonal()
        dec = (cov.square().sum() - var.square().sum()) / (d * (d - 1))
        return F.mse_loss(z, other) - (var + 1e-4).log().mean() + 10 * dec

    def _receive(self, synapse: Synapse, x: Tensor) -> Tensor:
        hidden = x.grad_fn is not None and any(gates_behind(x.grad_fn, self._recorder.reach)[:2])
        x = self._enter(synapse, x)
        if not self._phase or hidden:
            return x
        return self._view(x, synapse)

    def _view(self, x: Tensor, synapse: Synapse) -> Tensor:
        for seen, view in self._viewed:
            if seen is x:
                return view
        if self.views is not None:
            view = self.views(x)
        else:
            g = self._noise.stream(x.device, self.seed, self._own_state["step"], self._ranks[0], len(self._viewed))
            view = view_of(x, synapse.channel_dim, g)
        self._viewed.append((x, view))
        return view

    def _estimate(self, probe: Probe) -> Estimate:
        try:
            return self._in_passes(probe, [1])
        finally:
            self._kept.clear()
            self._viewed.clear()
