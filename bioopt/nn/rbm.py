"""`RBM`: the restricted Boltzmann machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RBM(nn.Module):
    r"""A restricted Boltzmann machine: two layers of binary units, joined to each other but not within.

    .. math::
        E(v, h) = -h^\top W v - b^\top v - c^\top h, \qquad p(v, h) = \frac{e^{-E(v, h)}}{Z}, \qquad
        p(h_j = 1 \mid v) = \sigma(W v + c)_j, \qquad p(v_i = 1 \mid h) = \sigma(W^\top h + b)_i

    with visible units :math:`v`, hidden units :math:`h`, and :math:`\sigma(u) = 1 / (1 + e^{-u})`. Called like any
    layer it gives the probabilities :math:`p(h = 1 \mid v)`, so that it can stand before a readout, or another RBM.
    `ContrastiveDivergence` trains it; to other rules it is the `torch.nn.Linear` inside it, and a sigmoid.

    Args:
        visible: the number of visible units.
        hidden: the number of hidden units.

    Attributes:
        synapse: :math:`W`, hidden × visible, and :math:`c`, the hidden units' bias: an ordinary `torch.nn.Linear`.
        visible_bias: :math:`b`.

    Input has the visible units along its last dimension, each in [0, 1]: a state, or the probability of 1.

    Raises:
        ValueError: a number of units below 1; input whose last dimension is not the visible layer's size, or with
            values outside [0, 1].

    Sources: P. Smolensky (1986), *Information processing in dynamical systems: foundations of harmony theory*;
    initial weights: G. Hinton (2010), *A practical guide to training restricted Boltzmann machines*.
    """

    def __init__(self, visible: int, hidden: int) -> None:
        for name, units in (("visible", visible), ("hidden", hidden)):
            if not isinstance(units, int) or isinstance(units, bool) or units < 1:
                raise ValueError(f"RBM: {name}={units!r} must be an integer >= 1, the number of {name} units")
        super().__init__()
        self.synapse = nn.Linear(visible, hidden)
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        nn.init.normal_(self.synapse.weight, std=0.01)
        nn.init.zeros_(self.synapse.bias)

    @property
    def weight(self) -> Tensor:
        """:math:`W`, hidden × visible."""
        return self.synapse.weight

    def forward(self, v: Tensor) -> Tensor:
        """:math:`p(h = 1 | v)`, hidden units along the last dimension."""
        return torch.sigmoid(self.synapse(self._checked(v)))

    # Below, the synapse's parameters without a call of the synapse: a rule that watches it shall see data alone.

    def hidden_given(self, v: Tensor) -> Tensor:
        """:math:`p(h = 1 | v)`, as `forward`, but unseen by any rule."""
        return torch.sigmoid(F.linear(v, self.synapse.weight, self.synapse.bias))

    def visible_given(self, h: Tensor) -> Tensor:
        """:math:`p(v = 1 | h)`."""
        return torch.sigmoid(F.linear(h, self.synapse.weight.T, self.visible_bias))

    def sample_hidden(self, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Binary hidden units, drawn from :math:`p(h | v)`; by torch's global generator, unless one is given."""
        return bernoulli(self.hidden_given(v), generator)

    def sample_visible(self, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Binary visible units, drawn from :math:`p(v | h)`."""
        return bernoulli(self.visible_given(h), generator)

    @torch.no_grad()
    def gibbs(self, v: Tensor, steps: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Visible units after so many steps of Gibbs sampling, each of which draws all ``h``, then all ``v``."""
        v = self._checked(v)
        for _ in range(steps):
            v = self.sample_visible(self.sample_hidden(v, generator), generator)
        return v

    def free_energy(self, v: Tensor) -> Tensor:
        r""":math:`F(v) = -b^\top v - \sum_j \log(1 + e^{(W v + c)_j})`, so that :math:`p(v) = e^{-F(v)} / Z`.

        Of binary ``v``, with the visible units along the last dimension, which is summed over.
        """
        v = self._checked(v)
        u = F.linear(v, self.synapse.weight, self.synapse.bias)
        return -(v @ self.visible_bias) - F.softplus(u).sum(-1)

    def extra_repr(self) -> str:
        """Its size."""
        return f"visible={self.synapse.in_features}, hidden={self.synapse.out_features}"

    def _checked(self, v: Tensor) -> Tensor:
        units = self.synapse.in_features
        if not v.ndim or v.shape[-1] != units:
            raise ValueError(
                f"RBM: input of shape {tuple(v.shape)} does not fit the {units} visible units, which lie along its "
                "last dimension: flatten images first (nn.Flatten()), or build RBM(visible=...) for their size"
            )
        if not bool(((v >= 0) & (v <= 1)).all()):  # nor is nan
            raise ValueError(
                f"RBM: input from {v.min().item():.3g} to {v.max().item():.3g} must lie in [0, 1], the states of "
                "binary units or their probabilities: rescale it, or put a sigmoid before"
            )
        return v


def bernoulli(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """0 or 1, with probability ``p`` of 1. Drawn in single precision, or half would round small probabilities."""
    draws = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))
    return (draws < p).to(p.dtype)
