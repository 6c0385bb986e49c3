"""One evaluation of a network in which states take the place of activities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.acts import clamp
from ..core.errors import loss_of_no_layer, require_graph
from ..core.losses import backward_where_missing, loss_of
from ..core.products import in_full
from ..core.reach import leaves_behind
from ..core.recorder import Firing
from ..core.rows import Rows
from ..core.synapse import Synapse

__all__ = ["Evaluation", "Wiring"]

FREED = (
    "the closure's own backward() has freed a part of the network that states share with the loss: let the closure "
    "return the loss without calling backward()"
)


@dataclass(frozen=True)
class Wiring:
    """How the firings of an evaluation depend on each other, by their numbers.

    Attributes:
        hidden: those with a state, on which another firing depends.
        outputs: those on which the loss depends, and no other firing.
        inputs: those that depend on no other firing.
        synapses: of all firings.
        rows: the samples that each firing ran on; ``None``: all.
    """

    hidden: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    synapses: tuple[Synapse, ...]
    rows: tuple[Rows | None, ...]

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len({self.synapses[i] for i in (*self.hidden, *self.outputs)})


class Evaluation:
    """The firings of one evaluation: predictions ``u`` with their graphs, and the leaves that take their place.

    Every layer runs on what it gets from the leaves below, so a gradient at ``u`` ends at the nearest leaves.

    Args:
        rule: its name, for messages.
        given: the leaf for a firing, from its number and its prediction, without a graph and in single precision at
            least: small steps of relaxation would be rounded away.
        added: the numbers of firings of which the network sees ``u`` plus the leaf, with its graph, in place of the
            leaf; ``None``: all. The errors of error-based predictive coding are such leaves.
        first: the wiring of the first evaluation of a step, for a later one.

    Attributes:
        predictions: :math:`u` of each firing.
        leaves: what the network sees in its place; in single precision at least.
        synapses: that fired.
        rows: the samples that each firing ran on; ``None``: all.
        losses: the value of the closure.
    """

    def __init__(
        self,
        rule: str,
        given: Callable[[int, Tensor], Tensor],
        added: Collection[int] | None = (),
        first: Wiring | None = None,
    ) -> None:
        self._rule, self._given, self._added, self._first = rule, given, added, first
        self._inputs: list[Tensor] = []  # without graphs, to recognise a firing that checkpointing runs again
        self.predictions: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.synapses: list[Synapse] = []
        self.rows: list[Rows | None] = []
        self.losses = torch.zeros(())

    def leave(self, firing: Firing, u: Tensor) -> Tensor:
        """Keep the prediction of a firing, and hand on the leaf in its place."""
        if firing.replay:
            return self._seen(self._number(firing), u)
        require_graph(self._rule, firing.synapse.name, u, "its state cannot relax")
        self._require_same_route(firing)
        leaf = self._given(len(self.leaves), in_full(u.detach())).detach().requires_grad_()
        self.predictions.append(u)
        self.leaves.append(leaf)
        self.synapses.append(firing.synapse)
        self.rows.append(firing.rows)
        self._inputs.append(firing.x.detach())
        return self._seen(len(self.leaves) - 1, u)

    def _require_same_route(self, firing: Firing) -> None:
        """Raise if a layer runs on other samples than in the first evaluation: their states are not its own."""
        if self._first is None or len(self.leaves) >= len(self._first.rows):
            return
        before = self._first.rows[len(self.leaves)]
        if before is not None and not before.equals(firing.rows):
            raise RuntimeError(
                f"{self._rule}: layer '{firing.synapse.name}' ran on other samples than before its states relaxed: "
                "the routes of a bioopt.nn.Gate must stand still meanwhile. Let its controller see the network's input "
                "or a context, and exclude the controller (exclude=[...]); or write Gate(..., active=None)"
            )

    def _seen(self, i: int, u: Tensor) -> Tensor:
        """What the network sees in place of ``u``."""
        leaf = self.leaves[i]
        if self._added is None or i in self._added:
            return u + leaf.to(u.dtype)
        return clamp(leaf) if leaf.dtype == u.dtype else leaf.to(u.dtype)

    def _number(self, firing: Firing) -> int:
        """Of the firing that is run again."""
        found = [i for i, synapse in enumerate(self.synapses) if synapse is firing.synapse]
        if len(found) > 1:
            found = [i for i in found if torch.equal(self._inputs[i], firing.x)]
        return found[0]

    def send_back(self, losses: Tensor, above: Sequence[Tensor]) -> None:
        """Let the loss reach the leaves, and parameters above them, unless the closure has done so."""
        if self.leaves:
            backward_where_missing(losses, [*self.leaves, *above], retain_graph=True)

    def wiring(self, with_loss: bool = True) -> Wiring:
        """Which firings have a state, and which are outputs; those that the loss does not reach are neither.

        Raises:
            RuntimeError: the loss reaches no firing.
        """
        numbers = {leaf: i for i, leaf in enumerate(self.leaves)}
        behind = [_leaves_behind(u, numbers) for u in self.predictions]
        below = set().union(*behind)
        reached = {i for i, leaf in enumerate(self.leaves) if leaf.grad is not None or not with_loss}
        if not reached:
            raise RuntimeError(loss_of_no_layer(self._rule))
        todo = list(reached)
        while todo:
            new = behind[todo.pop()] - reached
            reached |= new
            todo += new
        hidden, outputs = tuple(sorted(reached & below)), tuple(sorted(reached - below))
        inputs = tuple(i for i in sorted(reached) if not behind[i])
        return Wiring(hidden, outputs, inputs, tuple(self.synapses), tuple(self.rows))

    @property
    def loss(self) -> Tensor:
        """The mean loss; 0 of no samples."""
        return loss_of(self.losses)

    def gradients(
        self, terms: Sequence[Tensor], outputs: Sequence[int], of: Sequence[Tensor], scale: float, retain: bool = False
    ) -> list[Tensor | None]:
        """Those of the sum of ``terms`` plus ``scale`` times the mean loss; ``None`` where nothing depends on it."""
        ends, signals = list(terms), [torch.ones_like(term) for term in terms]
        found: list[Tensor | None] = [None] * len(of)
        if scale:
            for i in outputs:
                if (error := self.leaves[i].grad) is not None:
                    ends.append(self.predictions[i])
                    signals.append((error * scale).to(self.predictions[i].dtype))
        try:
            if ends and of:
                found = list(torch.autograd.grad(ends, of, signals, retain_graph=retain, allow_unused=True))
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(f"{self._rule}: {FREED}") from error
        if scale:  # what the loss depends on past the outputs
            for i, p in enumerate(of):
                if p.grad is not None:
                    own = found[i]
                    found[i] = p.grad * scale if own is None else own + p.grad * scale
        return found

    def samples(self, wiring: Wiring) -> int:
        """The number of samples at the first output; 1 for none, so that sums over them can be divided by it."""
        i = wiring.outputs[0]
        rows = self.rows[i]
        return max(self.synapses[i].samples(self.predictions[i]) if rows is None else rows.count, 1)


def _leaves_behind(u: Tensor, numbers: dict[Tensor, int]) -> set[int]:
    return {numbers[leaf] for leaf in leaves_behind(u) if leaf in numbers}
