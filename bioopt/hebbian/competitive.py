"""Competitive rules: for each event the neurons of a pool compete, and the winners learn their input."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from ..core.constraints import NON_NEGATIVE, POSITIVE, POSITIVE_INT, Constraint, one_of
from ..core.homeostasis import DEFAULTS
from ..core.local_product import LocalOptions, LocalProductRule, LocalRule, means
from ..core.params import Params
from ..core.products import Events, SparseSignal, along_channels, in_full, in_pools, rows_of, weight_shaped
from ..core.recorder import Firing
from ..core.sums import Sums, product_sums
from ..core.synapse import Synapse
from .arithmetic import (
    by_residual,
    clip_update_norm,
    compete,
    decay_own_,
    largest,
    most,
    of_largest_one,
    shares,
    shares_in_half,
    signal_activity_product,
    softmax_,
    sparse_signal,
    strongest,
)

COMPETITIONS = ("soft", "hard", "k", "none")
DECAYS = ("subspace", "own", "none")

#: of homeostasis: neurons that compete stay apart without inhibition
COMPETING: dict[str, Any] = {**DEFAULTS, "inhibition": 0.0}


@final
class Hebbian(LocalRule):
    r"""Neurons compete for each input; winners learn the part of it that the layer does not yet represent.

    .. math::
        y_k = \frac{\exp(t\,u_k / \lVert w_k\rVert)}{\sum_j \exp(t\,u_j / \lVert w_j\rVert)}, \qquad
        \Delta w_k = \langle\, m\, y_k u_k\,(x - \sum_j u_j\,w_j') \,\rangle, \qquad
        w_k' = w_k + \mathrm{lr}\,\Delta w_k

    with presynaptic activity :math:`x`, postsynaptic activity :math:`u = Wx + b`, inverse temperature :math:`t`, a
    modulator :math:`m` (1 unless set), and the mean :math:`\langle\cdot\rangle` over *events* (samples,
    and positions of a convolution), so that ``lr`` does not depend on the batch or image size. The neurons of a layer
    compete with each other: the channels of a convolution at each position (within a group, for grouped
    convolutions), the features of a Linear layer in each sample. Weight vectors are compared by their direction, so
    that no neuron wins by the length of its initial weights.

    ``competition`` sets the share :math:`y_k` of an event that a neuron gets: ``"soft"``, the softmax above;
    ``"hard"``, the winner takes all; ``"k"``, the softmax among the ``k`` strongest alone; ``"none"``, each gets all
    (:math:`y_k = 1`: with the subspace decay, Oja's rule of 1989, which finds the principal components). With
    ``loser_strength`` :math:`= \lambda > 0`, all but the winner learn the opposite, by :math:`-\lambda y_k`.

    ``decay="subspace"`` is Oja's of 1989, as above: the part of the input that the neurons of a pool together represent
    already, :math:`\sum_j u_j w_j`, is subtracted, as by feedback inhibition. It bounds the weights (at the fixed point
    :math:`W^\top W` is the identity on the inputs that the neurons respond to) and keeps winners from all learning the
    same. ``"own"`` is Oja's of 1982: each neuron subtracts only its own part, :math:`u_k w_k`. ``"none"``: only
    ``weight_decay``, an option of the descent, bounds the weights.

    Decay is taken at the new weights :math:`w'`, which is the same rule for a small ``lr`` and cannot overshoot for a
    large one. With :math:`P = \langle (m y u)\,x^\top\rangle` and :math:`C = \langle (m y u)\,u^\top\rangle`
    (its diagonal alone for ``"own"``), that is :math:`\Delta W = (I + \mathrm{lr}\,C)^{-1} (P - C W)`. With
    ``loser_strength`` or a negative modulator, which could make that system singular, decay is taken at the old
    weights. A step longer than the pool's weights (:math:`\mathrm{lr} \lVert\Delta W\rVert > \lVert W\rVert`, Frobenius
    norms) is clipped to their length, except without decay.

    That is the published formula, ``homeostasis=False``. By default, neurons compete by their standardised activity
    :math:`z` in place of :math:`u / \lVert w \rVert`, and their unit weight vectors :math:`V` turn by
    :math:`P - g\,C V` with :math:`P = \langle (m y z)\,\tilde x^\top\rangle` of whitened presynaptic activity and
    :math:`C = P V^\top` (by :math:`P` for the other decays, which turn no vector), as in `LocalRule`. Of :math:`N`
    neurons with :math:`D < N` inputs, the unit vectors represent the input :math:`N / D` times, so that
    :math:`g = \min(1, D / N)`. Few neurons that share a subspace take the directions of largest variance, which is
    why presynaptic activity is whitened more than for other rules (``whitening=64``).

    The rule uses no error signal and no labels; only the readout uses a loss.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: the largest angle by which a neuron turns in a step; with ``homeostasis=False``, :math:`\mathrm{lr}`, per
            mean event.
        inverse_temperature: :math:`t` > 0, in units of :math:`1/z`, or without homeostasis of :math:`1/x`. If it is
            small, all neurons learn alike; if large, only the winner learns.
        competition: ``"soft"``, ``"hard"``, ``"k"`` or ``"none"``.
        k: the number of neurons that share an event with ``competition="k"``.
        loser_strength: :math:`\lambda`, the strength of anti-Hebbian learning in all but the winner.
        decay: ``"subspace"``, ``"own"`` or ``"none"``.
        options: ``homeostasis``, ``whitening``, ``inhibition``, ``tolerance`` and ``settle``; the readout, ``descent``,
            its options and ``process_group``, as in `LocalRule`.

    Attributes:
        modulator: :math:`m`, the third factor of a three-factor rule (attention, dopamine, novelty): a number, or a
            tensor with one value per sample, which scales learning from forward passes while it is set.

    Raises:
        ValueError: a competition among fewer than two neurons; ``k`` larger than a layer; as `LocalRule`.

    Sources: D. E. Rumelhart & D. Zipser (1985), *Feature discovery by competitive learning*; soft competition:
    S. J. Nowlan (1990), *Maximum likelihood competitive learning*; decay: E. Oja (1982), *Simplified neuron model as
    a principal component analyzer*, and (1989), *Neural networks, principal components, and subspaces*; three
    factors: N. Frémaux & W. Gerstner (2016), *Neuromodulated spike-timing-dependent plasticity*.

    Example::

        optimizer = bioopt.Hebbian(model)
        loss = optimizer.step(closure)
    """

    renamed: ClassVar[dict[str, str]] = {"losers": "loser_strength"}
    constraints: ClassVar[dict[str, Constraint]] = {
        "inverse_temperature": POSITIVE,
        "competition": one_of(*COMPETITIONS),
        "k": POSITIVE_INT,
        "loser_strength": NON_NEGATIVE,
        "decay": one_of(*DECAYS),
    }
    regulated: ClassVar[dict[str, Any]] = {**COMPETING, "whitening": 64.0}

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,  # η
        *,
        inverse_temperature: float = 1.0,  # t
        competition: str = "soft",
        k: int = 2,
        loser_strength: float = 0.0,  # λ
        decay: str = "subspace",
        readout: str | None = "delta",
        **options: Unpack[LocalOptions],
    ) -> None:
        own = {
            "inverse_temperature": inverse_temperature,
            "competition": competition,
            "k": k,
            "loser_strength": loser_strength,
            "decay": decay,
        }
        self.modulator: float | Tensor = 1.0
        super().__init__(params, lr, readout=readout, own=own, **options)

    def least_neurons(self, group: dict[str, Any]) -> tuple[int, str]:
        """Two for a competition, ``k`` for the ``k`` strongest."""
        if group["competition"] == "k":
            return group["k"], f"k={group['k']}"
        return (1, "") if group["competition"] == "none" else (2, f"competition={group['competition']!r}")

    def measure(self, firing: Firing, u: Tensor) -> Sums:
        """``Σ s xᵀ`` and ``Σ s`` of the signal ``s = m y u``, and whether a modulator was negative."""
        activity, group = firing.activity(u), self.param_groups[firing.synapse.group]
        s: Tensor | SparseSignal = activity
        negative = False
        if u.numel():
            s, negative = self._modulated(self._shared(activity, firing.synapse, group), activity, firing)
        sums = product_sums(firing, u, s, self._most_events(firing.synapse))
        sums.counts["reversed"] = float(negative)
        return sums

    def most_events(self, synapse: Synapse, group: dict[str, Any]) -> int:
        """As long as they take fewer multiplications than ``C`` and the solution."""
        N, D = len(synapse.weight), synapse.weight[0].numel()
        if group["decay"] != "subspace":
            return 0
        if group["homeostasis"]:
            return N - 1
        return most(N, lambda n: n * N * D + n * n * (N + D) + n**3 / 3 < 3 * N * N * D + N**3 / 3)

    def drive(self, product: Tensor, direction: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``P - g C V``; without a decay, or with a neuron's own, which turns no weight vector, ``P``."""
        if group["decay"] != "subspace":
            return product
        return torch.baddbmm(product, product @ direction.mT, direction, alpha=-_share(direction))

    def drive_of_few(self, product: Tensor, direction: Tensor, events: Events, group: dict[str, Any]) -> Tensor:
        """``P - g C V`` with ``C V = ⟨s (Vᵀ V (x - μ))ᵀ⟩``."""
        share = _share(direction) / len(events.x)
        return product[0].addmm_(events.s.T, events.u @ direction[0], alpha=-share).unsqueeze(0)

    def _shared(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor | SparseSignal:
        """``y u``."""
        kind, losers = group["competition"], group["loser_strength"]
        if kind == "none":
            return u
        wide, t = in_full(u), group["inverse_temperature"]
        if group["homeostasis"]:  # which has made the neurons comparable
            strength = wide * t
        else:
            scale = t / synapse.weight.flatten(1).norm(dim=1).clamp(min=1e-12)
            strength = wide * along_channels(scale, synapse).to(wide.dtype)
        if kind == "k" or (kind == "hard" and not losers):
            best, which = strongest(strength, synapse, group["k"] if kind == "k" else 1)
            s = sparse_signal(which, _first_wins(softmax_(best, -1), losers), synapse)
            activity = u.movedim(u.ndim + synapse.channel_dim, -1).reshape(-1, len(synapse.weight))
            s.values.mul_(activity.gather(1, s.neurons))
            return s
        return compete(strength, synapse, lambda pooled, dim: _shares(pooled, dim, kind, losers)).mul_(u)

    def _modulated(self, s: Tensor | SparseSignal, u: Tensor, firing: Firing) -> tuple[Tensor | SparseSignal, bool]:
        """``m s``, and whether ``m`` is negative somewhere."""
        m, synapse = self.modulator, firing.synapse
        if isinstance(m, Tensor):
            rows = firing.rows_of(u) if m.ndim == 1 else None
            if rows is not None and rows.count == len(m):
                m = m.to(u.device)[rows.index]
            if m.ndim == 1 and (u.ndim <= -synapse.channel_dim or len(u) != len(m)):
                raise ValueError(
                    f"Hebbian: modulator has {len(m)} values, one a sample, but layer '{synapse.name}' "
                    f"gave an output of shape {tuple(u.shape)}"
                )
        elif m == 1:
            return s, False
        negative = not bool((torch.as_tensor(m) >= 0).all())
        if isinstance(s, SparseSignal):
            if isinstance(m, Tensor):
                events = len(s.values) // max(1, m.numel())
                m = m.to(s.values).reshape(-1, 1).repeat_interleave(events, 0)
            return s._replace(values=s.values * m), negative
        if isinstance(m, Tensor):
            m = m.to(s).view(-1, *[1] * (s.ndim - 1))
        return s * m, negative

    def changes(
        self, sums: Sums, synapse: Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """``(I + lr C)⁻¹ (P - C W)`` in each pool, no step longer than ``‖W‖``; without decay ``P``."""
        implicit = not group["loser_strength"] and not sums.counts["reversed"]
        lr = group["lr"] if implicit else 0.0
        if sums.few is not None:
            weight = in_pools(synapse.weight.detach(), synapse)
            change = by_residual(sums.few, weight[0], lr).unsqueeze(0)
            change = clip_update_norm(change, weight, group["lr"])
            return {synapse.weight: weight_shaped(change.to(synapse.weight.dtype), synapse)}
        product, signal = means(sums)
        if group["decay"] == "none":
            return {synapse.weight: product}
        rows = in_pools(product, synapse)
        weight = in_pools(synapse.weight.detach(), synapse)
        if group["decay"] == "own":
            decay_own_(rows.flatten(0, 1), weight.flatten(0, 1), signal, synapse, lr)
            change = rows
        else:
            decay = signal_activity_product(rows, weight, signal, synapse)
            change = rows.baddbmm_(decay, weight, alpha=-1)
            if implicit:
                system = torch.eye(decay.shape[-1], dtype=rows.dtype, device=rows.device) + lr * decay
                change, _ = torch.linalg.solve_ex(system, change)  # which does not wait for the device
        change = clip_update_norm(change, weight, group["lr"])
        return {synapse.weight: weight_shaped(change.to(product.dtype), synapse)}


def _share(direction: Tensor) -> float:
    """``g``: with it, more neurons than inputs represent the input once, and not several times."""
    return min(1.0, direction.shape[-1] / direction.shape[-2])


def _shares(strength: Tensor, dim: int, kind: str, losers: float) -> Tensor:
    """Each neuron's share of each event: positive for winners, negative for losers. Overwrites ``strength``."""
    if kind == "hard":
        winner = strength.argmax(dim, keepdim=True)
        shares = torch.zeros_like(strength).scatter_(dim, winner, 1.0)
        # Without a temperature, all losers have the same share.
        others = max(strength.shape[dim] - 1, 1)
        return shares.sub_((1 - shares) * (losers / others))
    return softmax_(strength, dim, losers)


def _first_wins(shares: Tensor, losers: float) -> Tensor:
    """Multiply all but the first of ranked shares by ``-losers``, in place, unless that is 0."""
    if losers:
        shares[..., 1:].mul_(-losers)
    return shares


@final
class SoftHebb(LocalProductRule):
    r"""Soft winner-take-all: the winner of an input moves towards it, all other neurons away from it.

    .. math::
        y_k = \pm \frac{\exp(t\,u_k)}{\sum_j \exp(t\,u_j)}, \qquad
        D_k = \sum_{\text{events}} y_k\,(x - u_k\,w_k), \qquad
        \Delta w_k = \frac{D_k}{\max |D|}\; \sqrt{\left|\lVert w_k\rVert - 1\right|}

    with presynaptic activity :math:`x`, postsynaptic activity :math:`u = Wx + b`, inverse temperature :math:`t`, the
    sum over events (samples, and positions of a convolution) and the largest absolute entry of the whole layer's
    :math:`D`. The sign is plus for the winner of an event and minus for all others. Neurons compete as in `Hebbian`,
    but by :math:`u` itself: long weight vectors win more often, and sharpen the competition. The learning rate of a
    neuron falls to zero as its weight vector approaches unit length; start well outside (norm 25 in the paper), and
    give each layer its own ``lr`` and ``inverse_temperature`` by param groups.

    With ``k``, only the ``k`` strongest neurons of an event enter its softmax, and the others learn nothing from it:
    an approximation (the others' :math:`y` is small) that is faster in wide layers.

    That is the published formula, ``homeostasis=False``. By default, neurons compete by their standardised activity
    :math:`z`, and their unit weight vectors turn by :math:`\langle y_k\,\tilde x\rangle` with whitened
    presynaptic activity :math:`\tilde x`, as in `LocalRule`.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: the largest angle by which a neuron turns in a step; with ``homeostasis=False`` no weight changes by more
            than ``lr`` times the neuron's factor.
        inverse_temperature: :math:`t` > 0, in units of :math:`1/z`, or without homeostasis of :math:`1/u`.
        k: the number of neurons that learn from an event; ``None``: all, as published.
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `LocalRule`.
        options: ``homeostasis``, ``whitening``, ``inhibition``, ``tolerance`` and ``settle``; further options of the
            readout, ``descent``, its options and ``process_group``, as in `LocalRule`.

    Raises:
        ValueError: a layer of one neuron, or of fewer than ``k``; as `LocalRule`.

    Sources: A. Journé, H. Garcia Rodriguez, Q. Guo & T. Moraitis (2023), *Hebbian deep learning without feedback*,
    ICLR; T. Moraitis, D. Toichkin, A. Journé, Y. Chua & Q. Guo (2022), *SoftHebb: Bayesian inference in unsupervised
    Hebbian soft winner-take-all networks*.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "inverse_temperature": POSITIVE,
        "k": (lambda v: v is None or (isinstance(v, int) and v >= 2), "an integer >= 2, or None for all"),
    }
    regulated: ClassVar[dict[str, Any]] = COMPETING

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,  # η
        *,
        inverse_temperature: float = 8.0,  # t
        k: int | None = None,
        readout: str | None = "delta",
        **options: Unpack[LocalOptions],
    ) -> None:
        own = {"inverse_temperature": inverse_temperature, "k": k}
        super().__init__(params, lr, readout=readout, own=own, **options)

    def least_neurons(self, group: dict[str, Any]) -> tuple[int, str]:
        """Two, or ``k``."""
        return (2, "a competition") if group["k"] is None else (group["k"], f"k={group['k']}")

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor | SparseSignal:
        """``y``."""
        t, k = group["inverse_temperature"], group["k"]
        if k is not None:
            best, which = strongest(u, synapse, k)
            return sparse_signal(which, _first_wins(softmax_(best.mul_(t), -1), 1.0), synapse)
        compiled = shares.runs(u) and u.dtype in (torch.float32, torch.bfloat16)
        if synapse.pools == 1 and (compiled or (u.dtype == torch.bfloat16 and u.device.type == "cpu")):
            channel = u.ndim + synapse.channel_dim
            last = u.movedim(channel, -1)
            rows = last.reshape(-1, last.shape[-1])
            if compiled:
                order = torch.arange(float(rows.shape[1]), 0, -1)
                y = shares(rows, torch.tensor(float(t)), torch.tensor(1.0), order)
            else:
                y = shares_in_half(rows, t, 1.0)
            return y.view(last.shape).movedim(-1, channel)
        return compete(u, synapse, lambda pooled, dim: softmax_(pooled * t, dim, loser_strength=1.0))

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``D / max|D| · √|‖w‖ - 1|``."""
        change, weight = rows_of(product, synapse), rows_of(synapse.weight.detach(), synapse)
        if synapse.bias is None and of_largest_one.runs(weight):
            return weight_shaped(of_largest_one(change, weight), synapse)
        decay_own_(change, weight, signal, synapse)
        rate = (weight.norm(dim=1, keepdim=True) - 1).abs_().sqrt_()
        return weight_shaped(change.mul_(rate / largest(change)), synapse)


@final
class KrotovHopfield(LocalProductRule):
    r"""The strongest neuron moves towards an input, one of the next strongest away from it.

    .. math::
        g_k = \begin{cases} 1 & k \text{ strongest} \\ -\lambda & k \text{ of rank } r \\ 0 & \text{otherwise}
        \end{cases}, \qquad
        D_k = \langle\, g_k\,(x - u_k\,w_k) \,\rangle, \qquad \Delta w_k = \frac{D_k}{\max |D|}

    with presynaptic activity :math:`x`, postsynaptic activity :math:`u = Wx + b`, the mean over events, and the
    largest absolute entry of the whole layer's :math:`D`. Weights converge to the unit sphere: the paper's rule with
    Lebesgue exponent :math:`p = 2` and radius :math:`R = 1`. Let ``lr`` fall to zero over the run.

    That is the published formula, ``homeostasis=False``. By default, neurons are ranked by their standardised activity
    :math:`z`, and their unit weight vectors turn by :math:`\langle g_k\,\tilde x\rangle` with whitened
    presynaptic activity :math:`\tilde x`, as in `LocalRule`.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: the largest angle by which a neuron turns in a step; with ``homeostasis=False``, the largest change of a
            weight.
        rank: :math:`r` >= 2, of the neuron that moves away.
        anti_hebbian: :math:`\lambda`, how strongly it does.
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `LocalRule`.
        options: ``homeostasis``, ``whitening``, ``inhibition``, ``tolerance`` and ``settle``; further options of the
            readout, ``descent``, its options and ``process_group``, as in `LocalRule`.

    Raises:
        ValueError: a layer of fewer than ``rank`` neurons; as `LocalRule`.

    Source: D. Krotov & J. J. Hopfield (2019), *Unsupervised learning by competing hidden units*, PNAS 116.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "rank": (lambda v: isinstance(v, int) and v >= 2, "an integer >= 2"),
        "anti_hebbian": NON_NEGATIVE,
    }
    regulated: ClassVar[dict[str, Any]] = COMPETING

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,  # ε
        *,
        rank: int = 2,  # k
        anti_hebbian: float = 0.4,  # Δ
        readout: str | None = "delta",
        **options: Unpack[LocalOptions],
    ) -> None:
        super().__init__(params, lr, readout=readout, own={"rank": rank, "anti_hebbian": anti_hebbian}, **options)

    def least_neurons(self, group: dict[str, Any]) -> tuple[int, str]:
        """As many as ``rank``."""
        return group["rank"], f"rank={group['rank']}"

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor | SparseSignal:
        """``g``."""
        best, which = strongest(u, synapse, group["rank"])
        pair = torch.stack([which[..., 0], which[..., -1]], -1)
        values = torch.ones_like(pair, dtype=best.dtype)
        values[..., 1] = -group["anti_hebbian"]
        return sparse_signal(pair, values, synapse)

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``D / max|D|``."""
        change, weight = rows_of(product, synapse), rows_of(synapse.weight.detach(), synapse)
        decay_own_(change, weight, signal, synapse)
        return weight_shaped(change.div_(largest(change)), synapse)
