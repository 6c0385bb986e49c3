"""The firings of a sequence: their time steps, and which layers are recurrent."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

from torch import Tensor

from ..core.synapse import Synapse


class Place(NamedTuple):
    """A firing among those of its layer that lie between two firings of the readout."""

    readout: int  #: number of the readout's firing after it
    position: int  #: among the firings that share it
    shared_by: int  #: the number of these


class Behind(NamedTuple):
    """What a node of the graph depends on."""

    newest: dict[Synapse, int]  #: for each layer behind it, the newest time step in which it fired
    output: Synapse | None = None  #: the layer whose output it is


class Sequence:
    """The firings since the last step of learning, in order.

    A new time step begins where a layer fires again. A layer is *recurrent* if its input depends on its own earlier
    output and on no layer of the present time step. That is found in the graph of the first pass.

    Attributes:
        recurrent: the recurrent layers found or given.
        fed_back: all layers whose output a recurrent layer's input was found to depend on.
        step: the number of the present time step.
    """

    def __init__(self) -> None:
        self.recurrent: set[Synapse] = set()
        self.fed_back: set[Synapse] = set()
        self.step = 0
        self._fired: set[Synapse] = set()  # in the present time step
        self._numbers: dict[Synapse, list[int]] = {}
        self._count = 0

    def clear(self) -> None:
        """Drop all firings."""
        self._fired.clear()
        self._numbers.clear()

    def fire(self, synapse: Synapse) -> int:
        """Count a firing; its number, from 1 on."""
        if synapse in self._fired:
            self.step += 1
            self._fired.clear()
        self._fired.add(synapse)
        self._count += 1
        self._numbers.setdefault(synapse, []).append(self._count)
        return self._count

    def look(self, synapse: Synapse, x: Tensor) -> bool:
        """Whether the input ``x`` of a layer that fires depends on the layer's own earlier output.

        Raises:
            RuntimeError: on that directly, and on layers of this time step as well.
        """
        newest = self._newest_behind(x.grad_fn) if x.grad_fn is not None else {}
        if synapse not in newest:
            return False
        if max(newest.values()) < self.step:
            self.recurrent.add(synapse)
            self.fed_back.update(newest)
        elif self._directly_behind(x.grad_fn, synapse):
            raise RuntimeError(
                f"layer '{synapse.name}' receives its own earlier output together with activity of the present time "
                "step, so that it is recurrent in part: give either a Linear layer of its own, and add their outputs"
            )
        return True

    def mark(self, synapse: Synapse, u: Tensor) -> None:
        """Let later firings find the output of a layer in their graph."""
        node: Any = u.grad_fn
        if node is not None:
            node.metadata[self] = Behind({**self._newest_behind(node), synapse: self.step}, synapse)

    def keep_step(self) -> None:
        """Drop the numbers of firings before the present time step."""
        for numbers in self._numbers.values():
            del numbers[:-1]

    def has_time(self) -> bool:
        """Whether a layer has fired more than once."""
        return any(len(numbers) > 1 for numbers in self._numbers.values())

    def place(self, synapse: Synapse, number: int, readout: Synapse) -> Place | None:
        """The place of a firing; ``None`` if the readout has not fired after it."""
        numbers, ends = self._numbers.get(synapse, []), self._numbers.get(readout, [])
        after = bisect_right(ends, number)
        if after == len(ends):
            return None
        first = bisect_right(numbers, ends[after - 1]) if after else 0
        last = bisect_left(numbers, ends[after])
        return Place(ends[after], bisect_left(numbers, number) - first, last - first)

    def _newest_behind(self, end: Any) -> dict[Synapse, int]:
        """For each layer behind a node of the graph, the newest time step in which it fired."""
        todo = [end]
        while todo:
            node = todo[-1]
            if self in node.metadata:
                todo.pop()
                continue
            behind = [n for n, _ in node.next_functions if n is not None]
            if new := [n for n in behind if self not in n.metadata]:
                todo += new
                continue
            newest: dict[Synapse, int] = {}
            for found in (n.metadata[self].newest for n in behind):
                newest |= {synapse: max(step, newest.get(synapse, step)) for synapse, step in found.items()}
            node.metadata[self] = Behind(newest)
            todo.pop()
        found_behind: dict[Synapse, int] = end.metadata[self].newest
        return found_behind

    def _directly_behind(self, end: Any, synapse: Synapse) -> bool:
        """Whether a node depends on an output of a layer by way of no other layer's; the nodes behind it are known."""
        todo, seen = [end], set()
        while todo:
            node = todo.pop()
            known: Behind | None = node.metadata.get(self)
            if node in seen or known is None or synapse not in known.newest:
                continue
            seen.add(node)
            if known.output is synapse:
                return True
            if known.output is None:
                todo += [n for n, _ in node.next_functions if n is not None]
        return False
