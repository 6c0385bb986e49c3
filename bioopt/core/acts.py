"""What a rule can do as a synapse fires: cut, relay, inject, clamp; and the gate at the output.

Each is a function of a layer's input ``x`` or output ``u`` that a rule's ``enter`` or ``leave`` returns the result of:

============ ======================================= =================================================================
cut          `isolate` as it enters, `cut` as it     the layer sees ``x`` without its graph, the network ``u`` without:
             leaves                                  no error passes, and ``u`` has a graph of the layer alone
relay        `detached` as it enters, `relay` as it  forward as it was; in the backward pass the layer's parameters get
             leaves                                  their gradient, and ``x`` what the rule's feedback makes of it
inject       `isolate`, and `cut` of `inject`        a cut that hands on ``u`` and noise
clamp        nothing, and `clamp`                    the network goes on from a state in place of ``u``
output gate  nothing, and `OutputGate`               the backward pass of the loss ends at the outputs
============ ======================================= =================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._torch_private import is_view
from .reach import detached

if TYPE_CHECKING:
    from .reach import Reach
    from .recorder import Firing

__all__ = ["Isolated", "OutputGate", "clamp", "cut", "detached", "inject", "isolate", "relay"]


class Isolated(NamedTuple):
    """What a layer is given in place of its input, to run in a graph of its own, whatever the grad mode around it."""

    x: Tensor


def isolate(synapse: object, x: Tensor) -> Isolated:
    """The entry of a cut: ``x`` without its graph, so that the output's graph is that of this layer alone.

    The graph is there even under ``no_grad`` and inside activation checkpointing: a local product needs it.
    """
    return Isolated(detached(x))


def cut(firing: Firing, u: Tensor, reach: Reach) -> Tensor:
    """The exit of a cut: ``u`` without its graph.

    Where a graph is built, it depends on an anchor, so that a loss which is made of nothing else can be sent through
    ``backward()``. An ``u`` that shares memory with the layer's output is handed on without a copy, and an in-place
    activation may follow.
    """
    return reach.cut(u, firing.x)


def inject(u: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """``u + σ ξ``, without a graph; a cut hands it on."""
    return torch.add(u.detach(), noise, alpha=sigma)


class _Relay(torch.autograd.Function):
    """Hands ``u`` on; in the backward pass its own graph gets the gradient, and ``x`` gets what feedback makes of it.

    In place, so that nothing is copied.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, feedback: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.feedback = feedback
        ctx.mark_dirty(u)
        return u

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a relayed error has no derivative of its own: call backward() or torch.autograd.grad() without "
                "create_graph=True"
            )
        return gradient, ctx.feedback(gradient) if ctx.needs_input_grad[1] else None, None


def relay(firing: Firing, u: Tensor, feedback: Callable[[Tensor], Tensor]) -> Tensor:
    """Hand ``u`` on, and let the error return by other weights than those of the layer.

    The layer must have been given ``detached(x)``. In the backward pass the gradient ``g`` at ``u`` makes the
    gradients of the layer's own parameters, and ``feedback(g)``, of the shape of ``x``, is what the layers beneath
    get. With ``feedback = Wᵀ g`` (`Synapse.transpose`) that is backpropagation, bit for bit.

    Args:
        firing: which synapse fires.
        u: the layer's output, changed in place.
        feedback: from the gradient at ``u`` to that at ``x``.
    """
    x = firing.x
    if not (x.requires_grad and torch.is_grad_enabled() and u.requires_grad):
        return u

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
    relayed: Tensor = _Relay.apply(u.clone() if is_view(u) else u, x, returned)
    return relayed


def clamp(state: Tensor) -> Tensor:
    """Hand on a state in place of ``u``: the network above sees it, and gradients end there.

    Args:
        state: a leaf of the shape of ``u``. It is handed on as a clone, because an in-place activation would refuse,
            or destroy, a leaf.
    """
    return state.clone()


class OutputGate:
    """Ends the closure's own backward pass at the outputs of the network, where it leaves the output error.

    Each output is handed on as a leaf; nothing below it is run backward, or freed. Call it in ``leave`` for the
    readout; after the closure has returned, and its loss was sent backward, `gradients` goes on from there.
    """

    def __init__(self) -> None:
        self._outputs: list[tuple[Tensor, Tensor]] = []  # with their graphs, and the leaves in their place

    def __call__(self, u: Tensor) -> Tensor:
        """Hand on a leaf in place of ``u``."""
        leaf = u.detach().requires_grad_()
        self._outputs.append((u, leaf))
        return leaf.clone()

    @property
    def leaves(self) -> list[Tensor]:
        """What was handed on, whose ``.grad`` a backward pass fills."""
        return [leaf for _, leaf in self._outputs]

    @property
    def errors(self) -> list[tuple[Tensor, Tensor]]:
        """Each output with its graph, and the gradient of the loss with respect to it."""
        return [(u, leaf.grad) for u, leaf in self._outputs if leaf.grad is not None]

    def gradients(self, of: Iterable[Tensor], retain_graph: bool = False) -> list[Tensor | None]:
        """The gradient of the loss with respect to tensors below the gate; ``None`` where it does not depend on one."""
        of, errors = list(of), self.errors
        if not errors:
            raise RuntimeError("the loss was not sent backward, or does not depend on the outputs")
        outputs, grads = zip(*errors, strict=True)
        found = torch.autograd.grad(outputs, of, grads, retain_graph=retain_graph, allow_unused=True)
        return list(found)
