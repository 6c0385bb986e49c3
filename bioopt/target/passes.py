"""One evaluation of a network whose blocks are cut from each other, and the chain that they form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core._torch_private import in_backward
from ..core.acts import clamp, detached
from ..core.errors import loss_of_no_layer, require_graph
from ..core.losses import backward_where_missing
from ..core.reach import leaves_behind
from ..core.recorder import Firing
from ..core.synapse import Synapse

__all__ = ["Link", "Pass"]


@dataclass(frozen=True, eq=False)
class Link:
    """A layer of the chain.

    Attributes:
        synapse: the layer.
        x: its input, with the graph of the block below, down to the output of the layer below.
        u: its output, with the graph of this layer alone.
        leaf: what the network above received in place of ``u``.
    """

    synapse: Synapse
    x: Tensor
    u: Tensor
    leaf: Tensor


class Pass:
    """One evaluation. A layer receives its input without a graph, and the network above it a leaf.

    So a gradient at the input of a layer ends at the output of the layer below, and one at an output of a layer reaches
    that layer's own parameters alone.

    Args:
        rule: its name, for messages.
        given: what layers receive in place of their inputs.
    """

    def __init__(self, rule: str, given: Mapping[Synapse, Tensor] | None = None) -> None:
        self._rule = rule
        self._given = dict(given or {})
        self.entered: dict[Synapse, Tensor] = {}
        self.links: dict[Synapse, Link] = {}

    def enter(self, synapse: Synapse, x: Tensor) -> Tensor:
        """Keep the input of a layer; return what the layer receives."""
        if not in_backward():  # else activation checkpointing runs the layer again
            if synapse in self.entered:
                raise RuntimeError(
                    f"{self._rule}: layer '{synapse.name}' ran twice in one evaluation, but a layer can have one "
                    "target alone: unroll it into layers of their own, or leave it out by exclude=[...]"
                )
            self.entered[synapse] = x
        return self._given.get(synapse, detached(x))

    def leave(self, firing: Firing, u: Tensor) -> Tensor:
        """Keep the output of a layer; return the leaf in its place."""
        if firing.replay:
            return clamp(self.links[firing.synapse].leaf)
        require_graph(self._rule, firing.synapse.name, u, "no target can reach it")
        leaf = u.detach().requires_grad_()
        self.links[firing.synapse] = Link(firing.synapse, self.entered[firing.synapse], u, leaf)
        return clamp(leaf)

    def send_back(self, losses: Tensor, above: Sequence[Tensor]) -> None:
        """Let the loss reach the output, and parameters above it, unless the closure has done so."""
        if self.links:
            leaves = [link.leaf for link in self.links.values()]
            backward_where_missing(losses, [*leaves, *above])

    def chain(self) -> list[Link]:
        """The layers from the output down, each of which enters the one before it in this list and no other.

        Raises:
            RuntimeError: the loss reaches no layer, or several; a layer receives the activity of several others, or
                sends its own to several.
        """
        reached = [link for link in self.links.values() if link.leaf.grad is not None]
        if not reached:
            raise RuntimeError(loss_of_no_layer(self._rule))
        of_leaf = {link.leaf: link for link in self.links.values()}  # tensors are equal where they are the same
        below = {link.synapse: _below(link.x, of_leaf) for link in self.links.values()}
        above: dict[Synapse, list[str]] = {link.synapse: ["the loss"] for link in reached}
        for synapse, links in below.items():
            for link in links:
                above.setdefault(link.synapse, []).append(f"layer '{synapse.name}'")
        joined = next((s for s, links in below.items() if len(links) > 1), None)
        if joined is not None:
            names = " and ".join(f"'{link.synapse.name}'" for link in below[joined])
            raise RuntimeError(self._no_chain(f"layer '{joined.name}' receives the activity of the layers {names}"))
        if len(reached) > 1:
            names = " and ".join(f"'{link.synapse.name}'" for link in reached)
            raise RuntimeError(self._no_chain(f"the loss depends on the activity of the layers {names}"))
        split = next((s for s, ends in above.items() if len(ends) > 1), None)
        if split is not None:
            raise RuntimeError(
                self._no_chain(f"the activity of layer '{split.name}' enters {' and '.join(above[split])}")
            )
        chain = [*reached]
        while links := below[chain[-1].synapse]:
            chain += links
        return chain

    def _no_chain(self, found: str) -> str:
        return (
            f"{self._rule} needs a chain of layers, where each receives the activity of one layer alone, because an "
            f"inverse gives one target to one layer; but {found} (as with skip connections and branches). Rules for "
            "such networks: PredictiveCoding, FeedbackAlignment, LocalLoss; exclude=[...] makes a layer part of the "
            "block around it, untrained"
        )


def _below(x: Tensor, of_leaf: Mapping[Tensor, Link]) -> list[Link]:
    """The layers whose activity ``x`` depends on, in the order in which they ran."""
    behind = leaves_behind(x)
    return [link for leaf, link in of_leaf.items() if leaf in behind]
