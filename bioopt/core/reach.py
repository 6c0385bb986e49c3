"""Which firings a backward pass has reached, recorded by tokens in the graph of the loss.

Where every synapse is cut, no gradient flows from the loss to the layers; yet the update of a batch must count only if
the loss of that batch is sent backward. So each firing leaves a *token* in the graph: a scalar on which all that is
computed from the firing depends. A backward pass reaches the tokens without a gradient, which costs nothing, and no
part of the user's own network runs backward or is kept for it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._torch_private import is_node_of, is_view
from .errors import is_captured
from .synapse import Synapse

_TOKEN = "bioopt"  # in a node's metadata: the token of all firings behind it


class Contribution(Protocol):
    """What one firing contributes to an update."""

    @property
    def learned(self) -> bool:
        """Whether a step has learned from it."""


@dataclass(eq=False)
class Pending:
    """One firing that a backward pass may still reach. Only the graph of the loss holds it.

    Attributes:
        synapse: that fired.
        reach: of its rule.
        window: `Reach.window` as it fired.
        step: `Reach.step` as it fired.
        contribution: counts if a backward pass reaches the firing.
    """

    synapse: Synapse
    reach: weakref.ref[Reach]
    window: int
    step: int
    contribution: Contribution | None = None

    def matters(self) -> bool:
        """Whether it makes a difference if a backward pass reaches this firing."""
        reach = self.reach()
        if reach is None or self.window != reach.window:
            return False
        return self.step == reach.step if self.contribution is None else not self.contribution.learned


class _Link(torch.autograd.Function):
    """Makes the token of one firing, or one token that depends on several."""

    @staticmethod
    def forward(ctx: Any, pending: Pending | None, anchor: Tensor, *tokens: Tensor) -> Tensor:
        ctx.pending, ctx.tokens, ctx.spent = pending, tokens, False
        ctx.set_materialize_grads(False)
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        if ctx.pending is not None and (reach := ctx.pending.reach()) is not None:
            reach.arrived(ctx.pending)
        return (None,) * len(ctx.needs_input_grad)


class _Cut(torch.autograd.Function):
    """Passes ``u`` on in place, as no leaf, so that ``ReLU(inplace=True)`` may follow.

    ``kept``: whether the gradient passes. The tokens get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, pending: Pending | None, kept: bool, *tokens: Tensor) -> Tensor:
        ctx.pending, ctx.kept, ctx.tokens = pending, kept, tokens
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(u)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        pending: Pending | None = ctx.pending
        if pending is not None and (reach := pending.reach()) is not None:
            if pending.synapse.is_readout:
                reach.arrived(pending)
            elif gradient is not None and not ctx.kept:
                reach.bypass(pending, gradient)
        return gradient if ctx.kept else None, *[None] * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:
        torch.autograd.graph.increment_version(tangent)  # torch asks whether it was changed in place, as ``u`` was
        return tangent


class Reach:
    """The firings of one rule, and which of them a backward pass has reached.

    Attributes:
        anchor: a leaf that requires grad, on which cut activity depends, so that a loss of nothing else still has a
            ``backward()``.
        linked: whether firings leave a token in the graph.
        arrive: called with a `Pending` as a backward pass reaches it. Bound methods are held weakly.
        bypassed: synapses that a gradient has reached past every readout -> whether a readout depends on them too.
        window: the number of times that all firings were discarded.
        step: the number of times that the recorder was reset.
    """

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self.linked = False
        self.bypassed: dict[Synapse, bool] = {}
        self.window = 0
        self.step = 0
        self._arrive: Callable[[], Callable[[Pending], None] | None] | None = None
        self._ends: list[Any] = []  # weak references to the nodes of the readouts that have fired

    @property
    def arrive(self) -> Callable[[Pending], None] | None:
        """Called as a backward pass reaches a firing."""
        return None if self._arrive is None else self._arrive()

    @arrive.setter
    def arrive(self, call: Callable[[Pending], None] | None) -> None:
        self._arrive = weakly(call)

    def reset(self) -> None:
        """Begin a new step."""
        self.step += 1
        self.bypassed.clear()
        self._ends.clear()

    def pending(self, synapse: Synapse) -> Pending:
        """A firing of this synapse."""
        return Pending(synapse, weakref.ref(self), self.window, self.step)

    def cut(self, u: Tensor, x: Tensor, pending: Pending | None = None, token: Tensor | None = None) -> Tensor:
        """``u`` without its graph, depending on the token of the firing, or on those behind ``x``."""
        u = detached(u)
        if not torch.is_grad_enabled():
            return u
        tokens = [self.anchor, *tokens_behind(x)] if token is None else [token]
        cut: Tensor = _Cut.apply(u, pending if token is not None else None, False, *tokens)
        return cut

    def token(self, x: Tensor, pending: Pending) -> Tensor | None:
        """The token of a firing with input ``x``; ``None`` if firings leave none, or autograd does not record."""
        if not (self.linked and torch.is_grad_enabled()):
            return None
        token: Tensor = _Link.apply(pending, self.anchor, *tokens_behind(x))
        return token

    def link(self, values: Tensor, pending: Pending, token: Tensor) -> Tensor:
        """The values, which may lack a graph, depending on a firing."""
        linked: Tensor = _Cut.apply(values.clone(), pending, True, token)
        return linked

    def gate(self, u: Tensor, pending: Pending, token: Tensor) -> Tensor:
        """``u`` with its graph, which gradients enter until `shut_gates` closes it."""
        gate: Tensor = _Cut.apply(u.clone() if is_view(u) else u, pending, True, token)
        return gate

    def end(self, u: Tensor, x: Tensor, pending: Pending) -> Tensor:
        """``u`` of a readout that learns from the loss, with its graph, depending on the tokens behind ``x``."""
        tokens = tokens_behind(x) if torch.is_grad_enabled() else []
        if not (tokens and u.requires_grad):
            return u
        linked: Tensor = _Cut.apply(u.clone() if is_view(u) else u, pending, True, *tokens)
        self._ends = [end for end in self._ends if end() is not None] + [weakref.ref(linked.grad_fn)]
        return linked

    def waits_at(self, end: Tensor) -> bool:
        """Whether a backward pass through the output of a readout will be noticed."""
        return is_node_of(end.grad_fn, _Cut)

    def arrived(self, pending: Pending) -> None:
        """Take note that a backward pass has reached a firing, through a readout or past it."""
        arrive = self.arrive
        if pending.window == self.window and arrive is not None:  # not discarded
            with torch.no_grad():
                arrive(pending)

    def bypass(self, pending: Pending, gradient: Tensor) -> None:
        """Take note that a gradient has reached the output of a layer past every readout."""
        synapse = pending.synapse
        if pending.window != self.window or synapse in self.bypassed:
            return
        if not is_captured([gradient]) and bool(gradient.any()):  # a user's own function may turn None into zeros
            self.bypassed[synapse] = self._leads_to_readout(synapse)

    def _leads_to_readout(self, synapse: Synapse) -> bool:
        ends = [node for node in (end() for end in self._ends) if node is not None]
        links = (node for node in graph_behind(ends) if is_node_of(node, _Link) and node.pending is not None)
        return any(link.pending.synapse is synapse for link in links)


def tokens_behind(value: Tensor) -> list[Tensor]:
    """The tokens of all firings that a tensor depends on."""
    return [] if value.grad_fn is None else _live([_token_behind(value.grad_fn)])


def _token_behind(end: Any) -> Tensor | None:
    """One token for all firings behind a node. Later calls do not visit a node again."""
    todo = [end]
    while todo:
        node = todo[-1]
        if _visited(node):
            todo.pop()
            continue
        behind = [n for n, _ in node.next_functions if n is not None]
        if new := [n for n in behind if not _visited(n)]:
            todo += new
            continue
        node.metadata[_TOKEN] = _joined(_live(_token_at(n) for n in behind))
        todo.pop()
    return _token_at(end)


def _visited(node: Any) -> bool:
    return is_node_of(node, _Cut) or not node.next_functions or _TOKEN in node.metadata


def _token_at(node: Any) -> Tensor | None:
    if not is_node_of(node, _Cut):
        token: Tensor | None = node.metadata.get(_TOKEN) if node.next_functions else None
        return token
    if len(node.tokens) > 1:
        node.tokens = (_joined(list(node.tokens)),)
    return node.tokens[0] if node.tokens else None


def _joined(tokens: list[Tensor]) -> Tensor | None:
    if len(tokens) < 2:
        return tokens[0] if tokens else None
    with torch.enable_grad():
        token: Tensor = _Link.apply(None, tokens[0].detach(), *tokens)
    return token


def _live(tokens: Iterable[Tensor | None]) -> list[Tensor]:
    """The tokens, without duplicates, behind which a firing can still count."""
    return [token for token in {id(t): t for t in tokens if t is not None}.values() if _matters(token.grad_fn)]


def _matters(end: Any) -> bool:
    todo, seen = [end], []
    while todo:
        node = todo.pop()
        if not is_node_of(node, _Link) or node.spent:  # anything else is an anchor
            continue
        if node.pending is not None and node.pending.matters():
            return True
        seen.append(node)
        todo += [token.grad_fn for token in node.tokens]
    for node in seen:
        node.spent = True
    return False


class Gates(NamedTuple):
    """The gates behind a node (`Reach.gate`), and the leaf tensors that a gradient reaches from there.

    Attributes:
        open: nodes of gates that a gradient passes.
        shut: whether there are others.
        leaves: leaf tensors within what depends on no gate, or on an open one.
        beneath: those between the node and shut gates, in parts of the graph without an open gate.
    """

    open: frozenset[Any] = frozenset()
    shut: bool = False
    leaves: frozenset[Tensor] = frozenset()
    beneath: frozenset[Tensor] = frozenset()

    def plus(self, other: Gates) -> Gates:
        """The gates behind either of two nodes."""
        a, b = self.seen_past(), other.seen_past()
        return Gates(a.open | b.open, a.shut or b.shut, a.leaves | b.leaves, a.beneath | b.beneath)

    def seen_past(self) -> Gates:
        """As a node above it sees this part of the graph: without an open gate, nothing there learns any more."""
        if self.open or not self.shut:
            return self
        return Gates(shut=True, beneath=self.leaves | self.beneath)


_GATES = "bioopt gates"  # in a node's metadata: its `Gates`, once all of them are shut


def gates_behind(end: Any, reach: Reach) -> Gates:
    """The gates of a rule behind a node; not those behind shut ones."""
    found: dict[Any, Gates] = {}
    todo = [end]
    while todo:
        node = todo[-1]
        gate = is_node_of(node, _Cut) and node.pending is not None and node.pending.reach() is reach
        if node in found:
            todo.pop()
        elif gate and not node.kept:
            found[node] = Gates(shut=True)
        elif _GATES in node.metadata:
            found[node] = node.metadata[_GATES]
        elif hasattr(node, "variable"):
            found[node] = Gates(leaves=frozenset([node.variable]))
        else:
            # Of the inputs of a cut, the others are tokens.
            inputs = node.next_functions[:1] if is_node_of(node, _Cut) else node.next_functions
            behind = [n for n, _ in inputs if n is not None]
            if new := [n for n in behind if n not in found]:
                todo += new
                continue
            total = functools.reduce(Gates.plus, (found[n] for n in behind), Gates())
            found[node] = total._replace(open=total.open | {node}) if gate else total
    return found[end]


def shut_gates(gates: Iterable[Any], end: Any, behind: Gates) -> None:
    """Let no gradient pass these gates any more; ``end``: a node above them, with all gates behind it."""
    for gate in gates:
        gate.kept = False
    if all(not gate.kept for gate in behind.open):  # so that later calls need not look behind this node
        end.metadata[_GATES] = Gates(shut=True, beneath=behind.leaves | behind.beneath)


def graph_behind(ends: Iterable[Any]) -> Iterator[Any]:
    """All nodes of the graph behind these nodes, and these, each once."""
    seen, todo = set(), list(ends)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo += [n for n, _ in node.next_functions if n is not None]


def leaves_behind(value: Tensor) -> set[Tensor]:
    """The leaf tensors that a gradient at ``value`` would reach."""
    if value.grad_fn is None:
        return {value} if value.requires_grad else set()
    return {node.variable for node in graph_behind([value.grad_fn]) if hasattr(node, "variable")}


def detached(value: Tensor) -> Tensor:
    """A tensor without its graph, but with its forward-mode tangent."""
    tangent = forward_ad.unpack_dual(value).tangent
    if tangent is None:
        return value.detach()
    # Under autocast, an affine normalisation gives a tangent in single precision for an output in half precision.
    dual: Tensor = forward_ad.make_dual(value.detach(), tangent.detach().to(value.dtype))
    return dual


def weakly(call: Any) -> Any:
    """A function that returns ``call``, held weakly if it is a bound method; ``None`` for ``None``."""
    if call is None:
        return None
    return weakref.WeakMethod(call) if hasattr(call, "__self__") else lambda: call
