"""Routing by activity: `Gate` selects pathways for each sample, `Attention` positions."""

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
    r"""Multiplicative gating: a controller scores pathways, and each sample is processed by those with the top scores.

    .. math::
        y_n = \sum_{i \in S_n} g_{ni}\, f_i(x_n), \qquad
        g_{ni} = \frac{e^{c_i(x_n)}}{\sum_{j=1}^P e^{c_j(x_n)}}

    with pathways :math:`f_1, \ldots, f_P`, the controller's scores :math:`c(x_n)`, one per pathway, and the set
    :math:`S_n` of the ``active`` pathways that score highest for sample :math:`n`, or all. A pathway runs only on the
    samples routed to it, so the network can be large while each sample uses a small part of it. If a context is given,
    the controller sees the context in place of :math:`x`, so that the task can select the pathways.

    Any rule trains it; a pathway learns from the samples routed to it. The selection of pathways has no gradient:
    backpropagation and `ForwardGradient` reach the controller through :math:`g` only, which lowers the gate of a
    harmful pathway until another one scores higher. Perturbations of the controller also try other pathways. Energy
    rules need routes that stand still while states relax: all pathways, or a controller that is excluded and sees the
    network's input or a context.

    Args:
        controller: a module that computes scores, N × P, from the input or the context.
        pathways: two or more modules that map the input, N × any shape, to outputs of the same shape, N × any shape.
            If ``active`` is below P they run on fewer samples, or none, and may not contain batch or instance norm.
        active: the number of pathways per sample, 1 to P; ``None``: all.

    Attributes:
        gates: :math:`g` of the last forward pass, N × P, detached; 0 where a pathway was skipped. ``None`` before the
            first forward pass. It is not a buffer, so not in the ``state_dict``.

    Raises:
        ValueError: there are fewer than two pathways; ``active`` is out of range, or below P with batch or instance
            norm in a pathway; scores are not N × P; outputs of pathways differ in shape.

    Sources: R. A. Jacobs, M. I. Jordan, S. J. Nowlan & G. E. Hinton (1991), *Adaptive mixtures of local experts*;
    top-k gating: N. Shazeer et al. (2017), *Outrageously large neural networks: the sparsely-gated mixture-of-experts
    layer*; a single pathway, with softmax over all: W. Fedus, B. Zoph & N. Shazeer (2022), *Switch transformers*;
    multiplicative gain in the cortex: E. Salinas & P. Thier (2000), *Gain modulation: a major computational principle
    of the central nervous system*.

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
            raise ValueError(f"Gate: pathways={list(self.pathways)!r} must be at least two modules")
        if active is not None and (isinstance(active, bool) or not isinstance(active, int) or not 1 <= active <= count):
            raise ValueError(
                f"Gate: active={active!r} must be an integer from 1 to {count}, the number of pathways, or None for all"
            )
        if self._dense():
            return
        for name, module in self.pathways.named_modules():
            if isinstance(module, NormBase):
                raise ValueError(
                    f"Gate(active={active}): pathways.{name} is a {type(module).__name__}, which cannot run on the "
                    "few samples, or none, that are routed to a pathway: put it before or after the gate, use "
                    "nn.LayerNorm or nn.GroupNorm instead, or run all pathways on all samples (active=None)"
                )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The gated sum of the pathways' outputs.

        Args:
            x: input of the pathways, N × any shape.
            context: input of the controller, N × any shape; ``None``: ``x``.
        """
        scores: Tensor = self.controller(x if context is None else context)
        if scores.shape != (len(x), len(self.pathways)):
            raise ValueError(
                f"Gate: the controller returned scores of shape {tuple(scores.shape)}, but there are {len(x)} samples "
                f"and {len(self.pathways)} pathways: it must return {(len(x), len(self.pathways))}, for example by "
                f"nn.Flatten() and a final nn.Linear(..., {len(self.pathways)})"
            )
        if self._dense():
            gates = scores.softmax(1)
            outputs = [pathway(x) for pathway in self.pathways]
            self._check_shapes(outputs, [len(x)] * len(outputs))
            y = torch.stack([_scale(out, g) for out, g in zip(outputs, gates.unbind(1), strict=True)]).sum(0)
        else:
            selected = scores.topk(self.active or 1, 1).indices
            weights = scores.softmax(1).gather(1, selected)
            gates = weights.new_zeros(scores.shape).scatter(1, selected, weights)
            y = self._sparse_sum(x, selected, weights)
        if not is_transformed(gates):  # tensors of a torch.func transformation must not outlive it
            self.gates = gates.detach()
        return y

    def _dense(self) -> bool:
        return self.active in (None, len(self.pathways))

    @torch.compiler.disable(reason="the routes of samples are known only at run time")  # type: ignore[untyped-decorator]
    def _sparse_sum(self, x: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of the selected pathways; ``selected`` and ``weights`` are N × active."""
        if is_batched(selected):
            raise RuntimeError(
                f"Gate(active={self.active}): torch.func.vmap cannot map over the routes of samples: map over the rest "
                "of the network only, or run all pathways on all samples (active=None)"
            )
        order = selected.flatten().argsort(stable=True)  # sorted by pathway
        sizes = selected.flatten().bincount(minlength=len(self.pathways)).tolist()
        samples = order // selected.shape[1]
        outputs = []
        for pathway, index in zip(self.pathways, samples.split(sizes), strict=True):
            with on_rows(index, len(x)):  # also without samples: layers must fire in the same order in each pass
                outputs.append(pathway(x.index_select(0, index)))
        self._check_shapes(outputs, sizes)
        gated = _scale(torch.cat(outputs), weights.flatten()[order])
        return gated.new_zeros(len(x), *gated.shape[1:]).index_add(0, samples, gated)

    def _check_shapes(self, outputs: list[Tensor], sizes: list[int]) -> None:
        for i, (out, size) in enumerate(zip(outputs, sizes, strict=True)):
            if out.shape != (size, *outputs[0].shape[1:]):
                first, other = (type(self.pathways[k]).__name__ for k in (0, i))
                raise ValueError(
                    f"Gate: pathway 0 ({first}) returned an output of shape {tuple(outputs[0].shape)} for {sizes[0]} "
                    f"samples, pathway {i} ({other}) of {tuple(out.shape)} for {size}: their outputs are added, so "
                    "they must have the same shape, samples first"
                )

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"active={self.active}"


def _scale(out: Tensor, gates: Tensor) -> Tensor:
    """The output of each sample times its gate."""
    return out * gates.view(-1, *[1] * (out.ndim - 1))


class Attention(nn.Module):
    r"""Multi-head attention: each position receives the values of the positions whose keys match its query.

    .. math::
        y = W_o \left[ \operatorname{softmax}\!\left( \frac{Q_h K_h^\top}{\sqrt{d}} \right) V_h \right]_{h = 1..H}
        \quad \text{with} \quad Q = W_q x, \; K = W_k z, \; V = W_v z

    with positions :math:`x`, ``heads`` :math:`= H` parts :math:`Q_h, K_h, V_h` of ``size`` :math:`/ H = d` neurons
    each, which are concatenated, and :math:`z = x` (self-attention) or the context (cross-attention); biases are
    omitted here. The synapses are four `torch.nn.Linear` layers: ``query``, ``key``, ``value`` and ``out``. Activity,
    not weights, decides which positions are connected.

    A Hebbian rule treats the four layers like any others, with each position of a sample as an
    event: it trains queries and keys without regard to how well they match.

    Args:
        size: the number of neurons per position, of the input and the output.
        heads: :math:`H`, which must divide ``size``.

    Raises:
        ValueError: ``size`` or ``heads`` is below 1, or ``heads`` does not divide ``size``; input or context is not
            N × T × ``size``, or their N differ.

    Source: A. Vaswani et al. (2017), *Attention is all you need*.
    """

    def __init__(self, size: int, heads: int = 1) -> None:
        super().__init__()
        for name, value in (("size", size), ("heads", heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Attention: {name}={value!r} must be an integer >= 1")
        if size % heads:
            divisors = [h for h in range(1, size + 1) if size % h == 0]
            raise ValueError(f"Attention: heads={heads} must divide size={size}: choose one of {divisors}")
        self.size, self.heads = size, heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The attention output of each position, N × T × size.

        Args:
            x: the positions that send queries, N × T × size.
            context: the positions that send keys and values, N × any number × size; ``None``: ``x``.
        """
        for name, given in (("input", x), ("context", context)):
            if given is not None and (given.ndim != 3 or given.shape[-1] != self.size or len(given) != len(x)):
                raise ValueError(
                    f"Attention: {name} of shape {tuple(given.shape)} must be {len(x)} samples × positions × "
                    f"size={self.size}: project it, for example by nn.Linear(..., {self.size})"
                )
        z = x if context is None else context
        q, k, v = self._heads(self.query(x)), self._heads(self.key(z)), self._heads(self.value(z))
        # Fused kernels support neither forward-mode derivatives nor vmap.
        plain = any(is_transformed(t) or forward_ad.unpack_dual(t).tangent is not None for t in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            attended = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return y

    def _heads(self, u: Tensor) -> Tensor:
        """Reshape N × T × size to N × heads × T × size / heads."""
        return u.view(*u.shape[:2], self.heads, self.size // self.heads).transpose(1, 2)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"size={self.size}, heads={self.heads}"
