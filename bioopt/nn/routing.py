"""Routing by activity: `Gate` chooses among pathways for each sample, `Attention` among positions."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core._torch_private import NormBase, is_batched, is_transformed
from ..core.rows import on_rows

__all__ = ["Attention", "Gate"]


class Gate(nn.Module):
    r"""Multiplicative gating: a controller opens pathways, of which each sample takes the few that are open widest.

    .. math::
        y_n = \sum_{i \in S_n} g_{ni}\, f_i(x_n), \qquad
        g_{ni} = \frac{e^{c_i(x_n)}}{\sum_{j=1}^P e^{c_j(x_n)}}

    with pathways :math:`f_1, \ldots, f_P`, the controller's scores :math:`c(x_n)`, one a pathway, and the set
    :math:`S_n` of the ``active`` pathways that score highest for sample :math:`n`, or all. A pathway runs on those
    samples alone that take it, so that the network can be large and a sample's way through it short; far parts of it
    are joined by way of the controller, without a synapse for each pair of neurons. With a context, the controller sees
    that in place of :math:`x`: what the task is decides where the activity goes.

    Any rule trains it, each pathway by the samples that take it. The choice of pathways has no slope: gradients (and
    `ForwardGradient`) reach the controller through :math:`g` alone, which closes a pathway that does harm until another
    is open wider. Perturbations of the controller try other pathways as well.

    Args:
        controller: a module that gives scores, N × P, of the input, or of the context.
        pathways: two or more modules that map the input, N × anything, to outputs of one shape, N × anything. Where
            ``active`` is below P they see fewer samples, sometimes none, and hold no batch or instance norm.
        active: how many pathways a sample takes, 1 to P; ``None``: all.

    Attributes:
        gates: :math:`g` of the last forward pass, N × P without a graph, 0 where a pathway was skipped. ``None`` before
            the first one. It is no buffer, and is not in the ``state_dict``.

    Raises:
        ValueError: fewer than two pathways; ``active`` out of its range; such a norm in a pathway that samples skip;
            scores that are not N × P; pathways whose outputs differ in shape.

    Sources: R. A. Jacobs, M. I. Jordan, S. J. Nowlan & G. E. Hinton (1991), *Adaptive mixtures of local experts*; of
    few pathways: N. Shazeer et al. (2017), *Outrageously large neural networks: the sparsely-gated mixture-of-experts
    layer*; of one, whose gate is a share of all: W. Fedus, B. Zoph & N. Shazeer (2022), *Switch transformers*;
    multiplication by a gate in the cortex: E. Salinas & P. Thier (2000), *Gain modulation: a major
    computational principle of the central nervous system*.

    Example::

        gate = bioopt.nn.Gate(nn.Linear(3, 8), [nn.Linear(64, 32) for _ in range(8)], active=1)
        y = gate(x, context)  # context N × 3
    """

    def __init__(self, controller: nn.Module, pathways: Iterable[nn.Module], *, active: int | None = None) -> None:
        super().__init__()
        self.controller = controller
        self.pathways = nn.ModuleList(pathways)
        self.active = active
        self.gates: Tensor | None = None
        count = len(self.pathways)
        if count < 2:
            raise ValueError(f"Gate: pathways={list(self.pathways)!r}: give at least two modules to choose among")
        if active is not None and (isinstance(active, bool) or not isinstance(active, int) or not 1 <= active <= count):
            raise ValueError(f"Gate: active={active!r} must be an integer from 1 to the {count} pathways, or None: all")
        if self._all_run():
            return
        for name, module in self.pathways.named_modules():
            if isinstance(module, NormBase):
                raise ValueError(
                    f"Gate(active={active}): pathways.{name} is a {type(module).__name__}, which cannot be run on the "
                    "few samples, or none, that take the pathway: put it before or after the gate, use nn.LayerNorm or "
                    "nn.GroupNorm in its place, or let all samples take all pathways (active=None)"
                )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The gated sum of the pathways' outputs.

        Args:
            x: N × anything, what the pathways see.
            context: N × anything, what the controller sees; ``None``: ``x``.
        """
        scores: Tensor = self.controller(x if context is None else context)
        if scores.shape != (len(x), len(self.pathways)):
            raise ValueError(
                f"Gate: the controller gave scores of shape {tuple(scores.shape)} where there are {len(x)} samples and "
                f"{len(self.pathways)} pathways: it must give {(len(x), len(self.pathways))}, by an nn.Linear(..., "
                f"{len(self.pathways)}) at its end, say, after an nn.Flatten()"
            )
        if self._all_run():
            gates = scores.softmax(1)
            outputs = [pathway(x) for pathway in self.pathways]
            self._require_alike(outputs, [len(x)] * len(outputs))
            y = torch.stack([_times(out, g) for out, g in zip(outputs, gates.unbind(1), strict=True)]).sum(0)
        else:
            which = scores.topk(self.active or 1, 1).indices
            shares = scores.softmax(1).gather(1, which)
            gates = shares.new_zeros(scores.shape).scatter(1, which, shares)
            y = self._routed(x, which, shares)
        if not _transformed(gates):  # or they would outlive the transformation
            self.gates = gates.detach()
        return y

    def _all_run(self) -> bool:
        return self.active in (None, len(self.pathways))

    @torch.compiler.disable(reason="which samples take a pathway is known only as it runs")  # type: ignore[untyped-decorator]
    def _routed(self, x: Tensor, which: Tensor, shares: Tensor) -> Tensor:
        """The sum over pathways ``which``, N × active, in these shares."""
        if is_batched(which):
            raise RuntimeError(
                f"Gate(active={self.active}): under torch.func.vmap no sample can take a way of its own: map over the "
                "rest alone, or let all samples take all pathways (active=None)"
            )
        order = which.flatten().argsort(stable=True)  # pathway by pathway
        sizes = which.flatten().bincount(minlength=len(self.pathways)).tolist()
        samples = order // which.shape[1]
        outputs = []
        for pathway, index in zip(self.pathways, samples.split(sizes), strict=True):
            with on_rows(index, len(x)):  # also where no sample comes: layers are to fire in one order
                outputs.append(pathway(x.index_select(0, index)))
        self._require_alike(outputs, sizes)
        gated = _times(torch.cat(outputs), shares.flatten()[order])
        return gated.new_zeros(len(x), *gated.shape[1:]).index_add(0, samples, gated)

    def _require_alike(self, outputs: list[Tensor], sizes: list[int]) -> None:
        for i, (out, size) in enumerate(zip(outputs, sizes, strict=True)):
            if out.shape != (size, *outputs[0].shape[1:]):
                first, other = (type(self.pathways[k]).__name__ for k in (0, i))
                raise ValueError(
                    f"Gate: pathway 0 ({first}) gave an output of shape {tuple(outputs[0].shape)} for {sizes[0]} "
                    f"samples, pathway {i} ({other}) of {tuple(out.shape)} for {size}: they are added up, so let all "
                    "end in one shape, samples first"
                )

    def extra_repr(self) -> str:
        """How many pathways a sample takes."""
        return f"active={self.active}"


def _transformed(tensor: Tensor) -> bool:
    """Whether it is inside `torch.func.vmap` or the like."""
    return is_transformed(tensor)


def _times(out: Tensor, gates: Tensor) -> Tensor:
    """Each sample's output times its gate."""
    return out * gates.view(-1, *[1] * (out.ndim - 1))


def _written(shape: tuple[str | int, ...]) -> str:
    return " × ".join(map(str, shape))


class Attention(nn.Module):
    r"""Attention: each position asks all others, and takes in what answers its question.

    .. math::
        y = W_o \left[ \operatorname{softmax}\!\left( \frac{Q_h K_h^\top}{\sqrt{d}} \right) V_h \right]_{h = 1..H}
        \quad \text{with} \quad Q = W_q x, \; K = W_k z, \; V = W_v z

    with positions :math:`x`, ``heads`` :math:`= H` parts :math:`Q_h, K_h, V_h` of ``size`` :math:`/ H = d` neurons
    each, put side by side again in the end, biases left out here, and :math:`z = x` (self-attention) or the context
    (cross-attention). The synapses are four ordinary `torch.nn.Linear` layers: ``query``, ``key``, ``value`` and
    ``out``. What is routed where is decided by activity, not by weights: two positions are joined for as long as they
    match.

    A local rule (the Hebbian family) sees each of the four layers and the events in it, positions of samples, as those
    of any other layer: what it makes of queries and keys has no regard to how they match.

    Args:
        size: neurons of a position, at the input and at the output.
        heads: :math:`H`, which must divide ``size``.

    Raises:
        ValueError: ``size`` or ``heads`` below 1, or a ``size`` that ``heads`` does not divide; input or context that
            is not N × T × ``size``, or a context of another N.

    Source: A. Vaswani et al. (2017), *Attention is all you need*.
    """

    def __init__(self, size: int, heads: int = 1) -> None:
        super().__init__()
        for name, value in (("size", size), ("heads", heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Attention: {name}={value!r} must be an integer >= 1")
        if size % heads:
            fits = [h for h in range(1, size + 1) if size % h == 0]
            raise ValueError(f"Attention: size={size} does not divide into heads={heads}: choose heads among {fits}")
        self.size, self.heads = size, heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What each position takes in, N × T × size.

        Args:
            x: N × T × size, who asks.
            context: N × any number × size, who answers; ``None``: ``x`` itself.
        """
        for name, given in (("input", x), ("context", context)):
            if given is not None and (given.ndim != 3 or given.shape[-1] != self.size or len(given) != len(x)):
                raise ValueError(
                    f"Attention: {name} of shape {tuple(given.shape)} must be {len(x)} samples × positions × "
                    f"size={self.size}: bring it there by an nn.Linear(..., {self.size}), say"
                )
        asked = x if context is None else context
        q, k, v = self._heads(self.query(x)), self._heads(self.key(asked)), self._heads(self.value(asked))
        # Fused kernels have neither a forward derivative nor a rule for vmap.
        plain = any(_transformed(t) or forward_ad.unpack_dual(t).tangent is not None for t in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            taken = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out(taken.transpose(1, 2).flatten(2))
        return y

    def _heads(self, u: Tensor) -> Tensor:
        """N × T × size to N × heads × T × size / heads."""
        return u.view(*u.shape[:2], self.heads, self.size // self.heads).transpose(1, 2)

    def extra_repr(self) -> str:
        """Its options."""
        return f"size={self.size}, heads={self.heads}"
