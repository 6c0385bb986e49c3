"""`LocalGradientRule`: blocks that learn by the gradient of a loss of their own; `LocalLossRule`: in one pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..core._torch_private import in_backward
from ..core.one_pass import OnePass
from ..core.params import named_modules_of, whole_of
from ..core.probe import Probe
from ..core.reach import Gates
from ..core.rule import Estimate, optional
from ..core.sums import add_up
from ..core.synapse import Synapse
from .base import BlockRule
from .blocks import Block, Share

__all__ = ["LocalGradientRule", "LocalLossRule"]


class LocalGradientRule(BlockRule):
    """Each block learns by the gradient of `local_loss`, as does its head.

    Parameters outside of layers, such as those of normalisation, belong to the block that they are in; where several
    blocks along a skip use the same, they learn from the first.

    Arguments, attributes and errors are those of `BlockRule`.
    """

    trains_whole_modules = True

    @abstractmethod
    def local_loss(self, block: Block, h: Tensor, channel_dim: int) -> Tensor | None:
        """The loss of a block, a scalar with a graph; ``None``: the block learns nothing from this pass.

        Args:
            block: that ends here.
            h: its activity, as the next layer receives it, with its graph.
            channel_dim: the dimension of the neurons in ``h``, counted from the end.
        """

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        found = whole_of(type(self).__name__, group["params"], self._exclusion)
        self._modules += named_modules_of(group["params"])
        return found

    def _at_end(self, blocks: list[Block], behind: Gates, x: Tensor, channel_dim: int) -> dict[Tensor, Tensor]:
        """The gradients of the loss of blocks that end together, of their parameters and the head."""
        # With hooks of its own, so that activation checkpointing around it does not run the head again.
        with torch.enable_grad(), saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            loss = self.local_loss(blocks[0], x, channel_dim)
        if loss is None:
            return {}
        head = [p for p in self._head_parameters(blocks[0]) if p.requires_grad]
        mine = [p for p in behind.leaves if p in self._mine and p.requires_grad]
        inside = {p for block in blocks for s in block.synapses for p in s.parameters()}
        # Beneath gates that are shut, other parameters have learned from a loss of their own.
        learning = [p for p in mine if p in inside or p not in behind.beneath] + head
        with torch.autocast(x.device.type, enabled=False):
            grads = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
        return {p: g for p, g in zip(learning, grads, strict=True) if g is not None}

    @optional
    def _in_place_of(self, x: Tensor, synapse: Synapse, hidden: bool) -> Tensor:
        """What a layer receives in a further pass in place of an input of the network, or of hidden activity."""
        return x

    def _receive(self, synapse: Synapse, x: Tensor) -> Tensor:
        """What a layer receives, in rules of several passes."""
        if not self._phase:
            return self._enter(synapse, x)
        if in_backward():  # activation checkpointing runs the layer again, where no gates tell what is an input
            for at, seen, given in self._inputs:
                if at is synapse and _equal(seen, x):
                    return given
            return self._in_place_of(self._enter(synapse, x), synapse, hidden=True)
        behind = self._gates_behind(x)  # before the block ends
        hidden = bool(behind.open or behind.shut)
        x = self._enter(synapse, x)
        given = self._in_place_of(x, synapse, hidden)
        if not hidden:
            self._inputs.append((synapse, x, given))
        return given

    def _in_passes(self, probe: Probe, phases: Sequence[int]) -> Estimate:
        """An ordinary pass, from which the readout learns, and further passes, from which the blocks learn.

        Args:
            probe: the closure.
            phases: of the further passes, not 0, which `local_loss` finds in ``self._phase``.
        """
        self.begin()
        anchors = [self._recorder.reach.anchor]
        losses, _ = probe.gradients(self.gradient_parameters(), anchors)
        of_readout, blocks = {p: p.grad for p in self.gradient_parameters()}, [*self._counted]
        grads: dict[Tensor, Tensor] = {}
        try:
            for self._phase in phases:
                self.begin()
                self._inputs.clear()
                probe.gradients(self.gradient_parameters(), anchors)
                add_up(grads, self._local_gradients().items())
        finally:
            self._phase = 0
            self._inputs.clear()
        for p, gradient in of_readout.items():
            p.grad = gradient
        self._counted = [*blocks, Share((), grads, at_once=False)]
        return losses, *self._gathered(losses)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, which may be of different kinds, have the same values."""
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


class LocalLossRule(LocalGradientRule, OnePass):
    """A rule that learns from a loss of each block in one ordinary pass.

    Arguments, attributes and errors are those of `BlockRule`.
    """

    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """The gradients of each block's loss, and the readout's, averaged over ranks."""
        return self._gathered(losses)
