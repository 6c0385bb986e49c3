"""The acts of a rule as a synapse fires: cut, relay, inject, clamp; and the gate at the output.

Each is a function of a layer's input ``x`` or output ``u``. A rule's ``enter`` and ``leave`` return its result:

============ ============ ============================ =============================================================
act          ``enter``    ``leave``                    effect
============ ============ ============================ =============================================================
cut          `isolate`    `cut`                        neither ``x`` nor ``u`` carries a graph on, so no error passes;
                                                       inside, ``u`` has the graph of this layer alone
relay        `detached`   `relay`                      the forward pass is unchanged; in the backward pass the layer's
                                                       parameters get their gradient, and ``x`` gets the rule's feedback
inject       `isolate`    `cut` of `inject`            a cut that passes ``u`` plus noise on
clamp        ``x``        `clamp`                      the network continues from a state in place of ``u``
output gate  ``x``        `OutputGate`                 the backward pass of the loss ends at the outputs
============ ============ ============================ =============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._torch_private import is_node_of, is_view
from .reach import detached

if TYPE_CHECKING:
    from .reach import Reach
    from .recorder import Firing

__all__ = ["Isolated", "OutputGate", "clamp", "cut", "detached", "inject", "isolate", "relay"]


class Isolated(NamedTuple):
    """A layer's input, with the request to run the layer in a graph of its own, whatever the grad mode around it."""

    x: Tensor


def isolate(synapse: object, x: Tensor) -> Isolated:
    """The entry of a cut: ``x`` without its graph, so that ``u`` has the graph of this layer alone.

    That graph is built even under ``no_grad`` and inside activation checkpointing, because a local product needs it.
    """
    return Isolated(detached(x))


def cut(firing: Firing, u: Tensor, reach: Reach) -> Tensor:
    """The exit of a cut: ``u`` without its graph.

    Where autograd records, the result depends on an anchor, so that a loss of nothing but cut layers still has a
    ``backward()``. It is no copy of ``u``, and an in-place activation may follow.
    """
    return reach.cut(u, firing.x)


def inject(u: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """``u + σ ξ``, without a graph, to be passed through `cut`."""
    return torch.add(u.detach(), noise, alpha=sigma)


class _Relay(torch.autograd.Function):
    """Passes ``u`` on in place; its gradient goes to the graph of ``u``, and through the feedback to ``x``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, feedback: Callable[[Tensor], Tensor], beneath: set[Any]) -> Tensor:
        ctx.feedback, ctx.beneath = feedback, beneath
        ctx.mark_dirty(u)
        return u

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the error of a relayed layer cannot be differentiated again: call backward() or "
                "torch.autograd.grad() without create_graph=True"
            )
        return gradient, ctx.feedback(gradient) if ctx.needs_input_grad[1] else None, None, None


def relay(firing: Firing, u: Tensor, feedback: Callable[[Tensor], Tensor], skips: str = "keep") -> Tensor:
    """Pass ``u`` on, and send the error back through other weights than those of the layer.

    The layer must have received ``detached(x)``. In the backward pass the gradient ``g`` at ``u`` gives the gradients
    of the layer's own parameters, and the layers below receive ``feedback(g)``, of the shape of ``x``. With
    ``feedback(g) = Wᵀ g`` (`Synapse.transpose`) this is backpropagation, bit for bit.

    Args:
        firing: of the synapse.
        u: the layer's output; it is changed in place.
        feedback: from the gradient at ``u`` to that at ``x``.
        skips: ``"keep"``: connections that bypass layers carry their error back past them; ``"cut"``: they carry none,
            if all layers are relayed in this way.
    """
    x, cutting = firing.x, skips == "cut"
    if not ((x.requires_grad or cutting) and torch.is_grad_enabled() and u.requires_grad):
        return u
    beneath = cut_skips(x.grad_fn) if cutting and x.grad_fn is not None else set()

    def returned(gradient: Tensor) -> Tensor:
        returned = feedback(gradient)
        if returned.shape != x_shape:
            raise RuntimeError(
                f"the feedback of layer '{name}' has the shape {tuple(returned.shape)}, but its input has the shape "
                f"{tuple(x_shape)}"
            )
        return returned.to(x_dtype)

    name, x_dtype, x_shape = firing.synapse.name, x.dtype, x.shape
    # A view cannot be marked dirty.
    relayed: Tensor = _Relay.apply(u.clone() if is_view(u) else u, x, returned, beneath)
    return relayed


def cut_skips(end: Any) -> set[Any]:
    """Let no error pass from this node to layers that others bypass: to those beneath another layer that it reaches.

    Returns:
        the nodes of the nearest relays that the error still reaches.
    """
    reached = _relays_behind(end)
    nearest = reached[end]
    beneath: set[Any] = set()
    todo = [lower for node in nearest for lower in node.beneath] if len(nearest) > 1 else []
    while todo:
        node = todo.pop()
        if node not in beneath:
            beneath.add(node)
            todo += node.beneath
    kept = nearest - beneath
    if len(kept) == len(nearest):
        return kept
    todo, seen = [end], {end}
    while todo:
        node = todo.pop()
        cut = {
            i for i, (behind, _) in enumerate(node.next_functions) if reached.get(behind) and not reached[behind] & kept
        }
        if cut:
            _cut_edges(node, cut)
        for i, (behind, _) in enumerate(node.next_functions):
            if i not in cut and behind not in seen and reached.get(behind, set()) - kept and behind not in nearest:
                seen.add(behind)
                todo.append(behind)
    return kept


_CUT = "bioopt skips"  # in a node's metadata: the numbers of its inputs that get no error


def _cut_edges(node: Any, edges: set[int]) -> None:
    if _CUT in node.metadata:  # its hook reads this set
        node.metadata[_CUT] |= edges
        return
    node.metadata[_CUT] = edges
    node.register_hook(
        lambda gradients, _: tuple(None if i in edges else gradient for i, gradient in enumerate(gradients))
    )


def _relays_behind(end: Any) -> dict[Any, set[Any]]:
    """For each node from here to the nearest relays, the relays behind it; not along edges that are cut."""
    found: dict[Any, set[Any]] = {}
    todo = [end]
    while todo:
        node = todo[-1]
        if node in found:
            todo.pop()
            continue
        if is_node_of(node, _Relay):
            found[node] = {node}
            continue
        cut = node.metadata.get(_CUT, ())
        behind = [one for i, (one, _) in enumerate(node.next_functions) if one is not None and i not in cut]
        missing = [one for one in behind if one not in found]
        if missing:
            todo += missing
        else:
            found[node] = set().union(*(found[one] for one in behind))
    return found


def clamp(state: Tensor) -> Tensor:
    """Pass a state on in place of ``u``: the network above sees it, and gradients end there.

    Args:
        state: a leaf of the shape of ``u``. The result is a clone of it, because in-place activations refuse leaves.
    """
    return state.clone()


class OutputGate:
    """Ends the closure's own backward pass at the outputs of the network, and keeps the output error.

    Each output is replaced by a leaf, so that the graph below is neither run backward nor freed. Call the gate in
    ``leave`` of the readout; once the closure's loss was sent backward, `gradients` continues from the output error.
    """

    def __init__(self) -> None:
        self._outputs: list[tuple[Tensor, Tensor]] = []  # outputs with their graphs, and their leaves

    def __call__(self, u: Tensor) -> Tensor:
        """A leaf in place of ``u``."""
        leaf = u.detach().requires_grad_()
        self._outputs.append((u, leaf))
        return leaf.clone()

    @property
    def errors(self) -> list[tuple[Tensor, Tensor]]:
        """Each output with its graph, and the gradient of the loss with respect to it."""
        return [(u, leaf.grad) for u, leaf in self._outputs if leaf.grad is not None]

    def gradients(self, of: Iterable[Tensor], retain_graph: bool = False) -> list[Tensor | None]:
        """The gradients of the loss with respect to tensors below the gate; ``None`` for those without one."""
        of, errors = list(of), self.errors
        if not errors:
            raise RuntimeError("OutputGate: the loss was not sent backward, or does not depend on the outputs")
        outputs, grads = zip(*errors, strict=True)
        found = torch.autograd.grad(outputs, of, grads, retain_graph=retain_graph, allow_unused=True)
        return list(found)
