"""Neurons with a time: leaky integrate-and-fire, the same with an adaptive threshold, and leaky rate units."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.constraints import NON_NEGATIVE, POSITIVE, Constraint, require_in_range

TIME_CONSTANT: Constraint = (lambda v: v > 0, "a number > 0")


class _Spike(torch.autograd.Function):
    """1 where the distance to the threshold is positive; the derivative is replaced by a triangle."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, width: float, dampening: float) -> Tensor:
        ctx.save_for_backward(distance)
        ctx.width, ctx.dampening = width, dampening
        return (distance > 0).to(distance.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (distance,) = ctx.saved_tensors
        slope = (1 - distance.abs() / ctx.width).clamp(min=0)
        return grads[0] * slope * (ctx.dampening / ctx.width), None, None


def _spike(distance: Tensor, width: float, dampening: float) -> Tensor:
    spikes: Tensor = _Spike.apply(distance, width, dampening)
    return spikes


def _require(module: nn.Module, **options: tuple[float, Constraint]) -> None:
    for name, (value, constraint) in options.items():
        require_in_range(type(module).__name__, name, value, constraint)


def _require_shape(module: nn.Module, u: Tensor, state: Tensor) -> None:
    if state.shape != u.shape:
        raise ValueError(
            f"{type(module).__name__}: the state has the shape {tuple(state.shape)}, but the input the shape "
            f"{tuple(u.shape)}: start a new sequence with state=None"
        )


class LIF(nn.Module):
    r"""Leaky integrate-and-fire neurons, with a surrogate derivative of the spike.

    .. math::
        v(t) = \alpha\, v(t - 1) + u(t) - \vartheta\, z(t - 1), \qquad z(t) = H(v(t) - \vartheta), \qquad
        \alpha = e^{-1/\tau}

    with the input :math:`u`, the membrane potential :math:`v` and spikes :math:`z` of 0 or 1. In the backward pass the
    derivative of the step :math:`H` is :math:`\psi = \frac{\gamma}{\vartheta} \max(0, 1 - |v - \vartheta| /
    \vartheta)`, and no gradient passes through the reset.

    Used like `torch.nn.GRUCell`, once per time step::

        spikes, state = neurons(layer(x) + recurrent(spikes), state)

    Args:
        tau: :math:`\tau`, of the membrane, in time steps.
        threshold: :math:`\vartheta`.
        dampening: :math:`\gamma`, the height of the surrogate derivative.

    Raises:
        ValueError: an option out of range; a state of another shape than the input.

    Source: G. Bellec, F. Scherr, A. Subramoney, E. Hajek, D. Salaj, R. Legenstein & W. Maass (2020), *A solution to the
    learning dilemma for recurrent networks of spiking neurons*, Nature Communications 11.
    """

    def __init__(self, tau: float = 20.0, *, threshold: float = 1.0, dampening: float = 0.3) -> None:
        super().__init__()
        _require(self, tau=(tau, TIME_CONSTANT), threshold=(threshold, POSITIVE), dampening=(dampening, NON_NEGATIVE))
        self.tau, self.threshold, self.dampening = tau, threshold, dampening
        self.decay = math.exp(-1 / tau)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step.

        Args:
            u: the input, of any shape.
            state: the membrane potential after the previous step; ``None``: zeros.

        Returns:
            Spikes, and the membrane potential, both of the shape of the input.
        """
        if state is None:
            v = u
        else:
            _require_shape(self, u, state)
            reset = (state.detach() > self.threshold).to(u.dtype)
            v = self.decay * state + u - self.threshold * reset
        return _spike(v - self.threshold, self.threshold, self.dampening), v

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"tau={self.tau:g}, threshold={self.threshold:g}, dampening={self.dampening:g}"


class ALIFState(NamedTuple):
    """The state of `ALIF` neurons.

    Args:
        v: the membrane potential.
        a: the adaptation.
    """

    v: Tensor
    a: Tensor


class ALIF(nn.Module):
    r"""Leaky integrate-and-fire neurons whose threshold rises with each spike, and decays slowly: a memory.

    .. math::
        v(t) = \alpha\, v(t - 1) + u(t) - \vartheta\, z(t - 1), \qquad a(t) = \rho\, a(t - 1) + z(t - 1), \qquad
        z(t) = H(v(t) - \vartheta - \beta\, a(t))

    with :math:`\alpha = e^{-1/\tau}`, :math:`\rho = e^{-1/\tau_a}`, and the rest as in `LIF`. Gradients pass through
    the adaptation, whose derivative by its own past, :math:`\rho - \beta\psi`, is close to 1: it carries them across
    long delays.

    Args:
        tau: :math:`\tau`, of the membrane, in time steps.
        tau_adaptation: :math:`\tau_a`, in time steps.
        beta: :math:`\beta`, by which a spike raises the threshold: one number, or one for each neuron (those with 0
            are `LIF`).
        threshold: :math:`\vartheta`, of a neuron that has long been silent.
        dampening: :math:`\gamma`, as in `LIF`.

    Raises:
        ValueError: as `LIF`.

    Source: as `LIF`.
    """

    beta: Tensor

    def __init__(
        self,
        tau: float = 20.0,
        *,
        tau_adaptation: float = 200.0,
        beta: float | Tensor = 0.1,
        threshold: float = 1.0,
        dampening: float = 0.3,
    ) -> None:
        super().__init__()
        _require(
            self,
            tau=(tau, TIME_CONSTANT),
            tau_adaptation=(tau_adaptation, TIME_CONSTANT),
            threshold=(threshold, POSITIVE),
            dampening=(dampening, NON_NEGATIVE),
        )
        beta = torch.as_tensor(beta, dtype=torch.get_default_dtype())
        if not (beta.isfinite() & (beta >= 0)).all():
            raise ValueError(f"ALIF: beta={beta.tolist()} must be finite numbers >= 0")
        self.tau, self.tau_adaptation, self.threshold, self.dampening = tau, tau_adaptation, threshold, dampening
        self.decay, self.adaptation_decay = math.exp(-1 / tau), math.exp(-1 / tau_adaptation)
        self.register_buffer("beta", beta)

    def forward(self, u: Tensor, state: ALIFState | None = None) -> tuple[Tensor, ALIFState]:
        """One time step.

        Args:
            u: the input, of any shape.
            state: after the previous step; ``None``: a neuron that has long been silent.

        Returns:
            Spikes of the shape of the input, and the state.
        """
        if state is None:
            v, a = u, torch.zeros_like(u)
        else:
            v, a = state
            _require_shape(self, u, v)
            before = self._spikes(v, a)
            a = self.adaptation_decay * a + before
            v = self.decay * v + u - self.threshold * before.detach()
        return self._spikes(v, a), ALIFState(v, a)

    def _spikes(self, v: Tensor, a: Tensor) -> Tensor:
        return _spike(v - self.threshold - self.beta * a, self.threshold, self.dampening)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"tau={self.tau:g}, tau_adaptation={self.tau_adaptation:g}, threshold={self.threshold:g}"


class LeakyRate(nn.Module):
    r"""Leaky units whose activity is a rate; without an activation function, a leaky readout.

    .. math::
        h(t) = \alpha\, h(t - 1) + (1 - \alpha)\, u(t), \qquad z(t) = \phi(h(t)), \qquad \alpha = e^{-1/\tau}

    with the input :math:`u`. Used like `LIF`.

    Args:
        tau: :math:`\tau`, in time steps.
        activation: :math:`\phi`, elementwise; ``None``: the identity.

    Raises:
        ValueError: as `LIF`.
    """

    def __init__(self, tau: float = 20.0, activation: Callable[[Tensor], Tensor] | None = torch.tanh) -> None:
        super().__init__()
        _require(self, tau=(tau, TIME_CONSTANT))
        self.tau, self.activation, self.decay = tau, activation, math.exp(-1 / tau)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step.

        Args:
            u: the input, of any shape.
            state: :math:`h` after the previous step; ``None``: zeros.

        Returns:
            The activity, and :math:`h`, both of the shape of the input.
        """
        h = (1 - self.decay) * u
        if state is not None:
            _require_shape(self, u, state)
            h = h + self.decay * state
        return (h if self.activation is None else self.activation(h)), h

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        shown = getattr(self.activation, "__name__", type(self.activation).__name__)
        return f"tau={self.tau:g}, activation={None if self.activation is None else shown}"
