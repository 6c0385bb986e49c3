"""The restricted Boltzmann machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RBM(nn.Module):
    r"""A restricted Boltzmann machine: two layers of binary units, connected between layers but not within them.

    .. math::
        E(v, h) = -h^\top W v - b^\top v - c^\top h, \qquad p(v, h) = \frac{e^{-E(v, h)}}{Z}, \qquad
        p(h_j = 1 \mid v) = \sigma(W v + c)_j, \qquad p(v_i = 1 \mid h) = \sigma(W^\top h + b)_i

    with visible units :math:`v`, hidden units :math:`h`, and :math:`\sigma(u) = 1 / (1 + e^{-u})`. Its
    forward pass returns the probabilities :math:`p(h = 1 \mid v)`, so a readout or another RBM can follow it.
    `ContrastiveDivergence` trains it; for other rules it is a `torch.nn.Linear` followed by a sigmoid.

    Args:
        visible: the number of visible units.
        hidden: the number of hidden units.

    Attributes:
        synapse: :math:`W`, hidden × visible, and :math:`c`, the hidden units' bias: a `torch.nn.Linear`.
        visible_bias: :math:`b`.

    The last dimension of the input is the visible units, each in [0, 1]: its state or its probability of being 1.

    Raises:
        ValueError: a number of units is below 1; the last dimension of the input is not the number of visible units, or
            the input has values outside [0, 1].

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

    # The methods below do not call `self.synapse`: a rule with hooks on it must see only the data.

    def hidden_given(self, v: Tensor) -> Tensor:
        """:math:`p(h = 1 | v)`, like `forward`, but without triggering the hooks of a rule."""
        return torch.sigmoid(F.linear(v, self.synapse.weight, self.synapse.bias))

    def visible_given(self, h: Tensor) -> Tensor:
        """:math:`p(v = 1 | h)`."""
        return torch.sigmoid(F.linear(h, self.synapse.weight.T, self.visible_bias))

    def sample_hidden(self, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Binary hidden units, drawn from :math:`p(h | v)`; by default with torch's global generator."""
        return bernoulli(self.hidden_given(v), generator)

    def sample_visible(self, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Binary visible units, drawn from :math:`p(v | h)`."""
        return bernoulli(self.visible_given(h), generator)

    @torch.no_grad()
    def gibbs(self, v: Tensor, steps: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Visible units after ``steps`` of Gibbs sampling, each of which samples all ``h``, then all ``v``."""
        v = self._checked(v)
        for _ in range(steps):
            v = self.sample_visible(self.sample_hidden(v, generator), generator)
        return v

    def free_energy(self, v: Tensor) -> Tensor:
        r""":math:`F(v) = -b^\top v - \sum_j \log(1 + e^{(W v + c)_j})`, with :math:`p(v) = e^{-F(v)} / Z`.

        ``v`` is binary, with the visible units along its last dimension, over which the result is summed.
        """
        v = self._checked(v)
        u = F.linear(v, self.synapse.weight, self.synapse.bias)
        return -(v @ self.visible_bias) - F.softplus(u).sum(-1)

    def extra_repr(self) -> str:
        """The numbers of units, for ``repr``."""
        return f"visible={self.synapse.in_features}, hidden={self.synapse.out_features}"

    def _checked(self, v: Tensor) -> Tensor:
        units = self.synapse.in_features
        if not v.ndim or v.shape[-1] != units:
            raise ValueError(
                f"RBM: input of shape {tuple(v.shape)} does not fit the {units} visible units, its last dimension: "
                "flatten images first (nn.Flatten()), or build RBM(visible=...) for their size"
            )
        if not bool(((v >= 0) & (v <= 1)).all()):  # also refuses NaN
            raise ValueError(
                f"RBM: input from {v.min().item():.3g} to {v.max().item():.3g} must lie in [0, 1], the states or "
                "probabilities of binary units: rescale it, or put a sigmoid before the RBM"
            )
        return v.to(self.synapse.weight.dtype)


def bernoulli(p: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Samples of 1 with probability ``p``, else 0; drawn at least in single precision: half rounds small ``p`` to 0."""
    draws = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))
    return (draws < p).to(p.dtype)
