"""Weight perturbation of rank one: one pass tries a direction for each sample of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Unpack, final

import torch
from torch import Tensor, nn

from ..core.constraints import POSITIVE, POSITIVE_INT, Constraint
from ..core.errors import require_finite
from ..core.params import Params
from ..core.probe import Probe
from ..core.readout import ReadoutOptions
from ..core.recorder import Firing
from ..core.rule import Estimate, Visit
from ..core.sums import add_up
from ..core.synapse import Synapse, convolve
from .base import MICRO_BATCHES, NoisyActivity, Record, count_of, credit_of, rms


class _Members(NamedTuple):
    """The directions of one synapse, one per sample: ``a bᵀ`` of its weights (in each pool), ``c`` of its bias."""

    a: Tensor  # N × neurons
    b: Tensor  # N × pools × inputs of a neuron
    c: Tensor | None  # N × neurons
    ran: Tensor  # N, whether the synapse ran on the sample
    sizes: tuple[float, float]  # of the weights and the bias, included in a and c


@final
class RankOnePerturbation(NoisyActivity):
    r"""Weight perturbation with a separate rank-one direction for each sample of the batch.

    .. math::
        \hat g = \frac{1}{N S} \sum_{n, i}
        \frac{L_n(W + \sigma\, a_{ni} b_{ni}^\top) - L_n(W - \sigma\, a_{ni} b_{ni}^\top)}{2 \sigma}\;
        a_{ni} b_{ni}^\top, \qquad \Delta W = -\hat g

    with the loss :math:`L_n` of sample :math:`n` of :math:`N`, :math:`S` = ``samples``, and vectors :math:`a` (one
    entry per neuron) and :math:`b` (one per input) of independent entries of mean 0 and variance 1, normal or
    (``distribution="rademacher"``) -1 and 1; biases have another vector. As :math:`a b^\top x = a\,(b^\top x)`, a pass
    over the batch tries :math:`N` directions, where `WeightPerturbation` tries one, and :math:`\hat g` is one matrix
    product. In grouped convolutions each group has its own direction.

    The entries of :math:`a b^\top` are uncorrelated and of variance 1, so that the mean of :math:`\hat g` is the
    gradient of the mean loss up to :math:`O(\sigma^2)`. They are not normal (their fourth moment is 9, with
    ``"rademacher"`` 1): it is the gradient of the loss smoothed by this distribution, not by a Gaussian. The variance
    grows with the number of weights and with the gradients of single samples, not with that of their mean.

    By default :math:`\sigma` is ``sigma`` times the root mean square of the layer's weights (for its bias, of the bias,
    if that is larger), and the step is that of Adam. ``relative=False``: one width for all weights, and SGD.

    Cost of a step: ``2 samples`` forward passes (two more in the first, to check that the closure is repeatable) and as
    many local products; the sums :math:`b^\top x` of a convolution cost more, since each sample has its own filter.
    Memory: vectors, nothing of the size of the weights but ``.grad``. Batch statistics advance once, dropout masks are
    the same in all evaluations. If samples of a batch influence each other (batch norm), ``"sample"`` ignores that
    influence.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused, because
            the rule needs presynaptic activity. Weight and bias of each synapse learn; other parameters stay frozen.
        lr: learning rate of ``descent``; by default 3e-3, and with a readout 1e-4. With
            ``relative=False`` it must be given.
        sigma: the standard deviation of the change of each weight, in units of the root mean square of its tensor, or
            with ``relative=False`` in units of the weights.
        relative: whether ``sigma`` is relative to the size of the weights.
        samples: :math:`S`, pairs of passes per step, each with new directions; by default 4, or 1 with
            ``relative=False``.
        credit: ``"sample"``, or ``"global"``: one scalar loss credits all directions of a pass. A scalar loss is
            always global.
        distribution: of the entries of :math:`a`, :math:`b` and the bias's vector: ``"normal"`` or ``"rademacher"``.
        options: the keywords that follow.
        seed: of the directions; with the step and the pass it determines them all.
        descent: the `torch.optim` class that makes the step, by default Adam, or SGD with ``relative=False``; its
            options as further keywords.
        process_group: split the pairs of passes over these ranks, which have the same batch. They exchange losses, or,
            if the others have 8 pairs or more, the sums of their own directions: equal to one process to rounding.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with plastic layers other than
            Linear, Conv1d, Conv2d and Conv3d.
        TypeError: bare parameters.
        RuntimeError: a step without a closure, or with one that is not repeatable; a layer whose first dimension is not
            the sample; a non-finite loss (nothing is changed then).

    Source: B. Sarkar et al. (2025), *Evolution strategies at the hyperscale* (EGGROLL), where each member has a slice
    of the batch; here the slices are single samples, which gives the least variance for the cost.
    """

    centres_inputs = False  # presynaptic activity is never clean
    constraints: ClassVar[dict[str, Constraint]] = {"sigma": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float | None = None,  # η
        *,
        sigma: float = 0.1,  # σ
        relative: bool = True,
        samples: int | None = None,  # S
        credit: str = "sample",
        distribution: str = "normal",
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[ReadoutOptions],
    ) -> None:
        lr = self._rate(lr, 3e-3, relative, readout)
        defaults = {"lr": lr, "sigma": sigma}
        super().__init__(
            params, defaults, credit, distribution, relative=relative, seed=seed, readout=readout, **options
        )
        samples = count_of(samples, 4, relative)
        self._check_value("samples", samples, POSITIVE_INT)
        self.samples = samples
        self._synapse_sizes: dict[Synapse, tuple[float, float]] = {}  # of weights and biases in this step

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        named, synapses = self._select_synapses(group)
        remedy = "train it by another rule through bioopt.Mixed, or freeze it"
        self._require_built_in("RankOnePerturbation", synapses, remedy)
        return named, synapses

    def _estimate(self, probe: Probe) -> Estimate:
        self._prepare(probe)
        self._synapse_sizes.clear()
        losses: dict[int, Tensor] = {}
        ran: dict[int, Tensor] = {}
        records: list[Record] = []
        kept: tuple[int, dict[Synapse, _Members]] = (-1, {})
        mine, summed = self._share("samples", self.samples), self._sums_travel(self.samples)
        for sample in mine:
            kept = (sample, {})
            sides = []
            for sign in (1, -1):
                visit = self._disturbance(sample, sign, kept[1], None if records else records)
                with self._cutting(visit):
                    sides.append(probe())
            losses[sample] = torch.stack(sides)
            routed = list(dict.fromkeys(record.synapse for record in records if record.rows is not None))
            if routed:
                ran[sample] = torch.stack([kept[1][synapse].ran for synapse in routed]).double()
        per_sample = self._per_sample(records, losses[next(iter(losses))][0], probe)
        outcomes = self._gathered(losses, self.samples, alone=summed)
        changes = outcomes[:, 0] - outcomes[:, 1]
        if not summed:
            require_finite(self, "the loss", [changes])
        sizes = {record.synapse: record.samples for record in records}
        # On a sample that took another pathway, a direction did not change the loss: its credit would be mere noise.
        found = self._gathered(ran, self.samples, alone=summed).unbind(1) if routed else ()
        took = dict(zip(routed, found, strict=True))
        grads: dict[Tensor, Tensor] = {}
        for i, sample in enumerate(mine if summed else range(self.samples)):
            change, members = changes[i], kept[1]
            if sample != kept[0]:
                draw = self._draws(sample)
                members = {synapse: self._drawn(synapse, size, draw) for synapse, size in sizes.items()}
            slope = credit_of(change, per_sample) / (2 * self.samples)
            for synapse, directions in members.items():
                credit = (slope / self._width(synapse)).expand(sizes[synapse])
                if synapse in took:
                    credit = credit * took[synapse][i].to(credit)
                with torch.autocast(change.device.type, enabled=False):
                    add_up(grads, _gradients(synapse, directions, credit))
        loss = outcomes.sum((0, 1)) / (2 * self.samples) if summed else outcomes.mean((0, 1))
        if summed:
            grads = self._summed(grads, loss)
        self._require_widths("sigma")
        probe.agree(self.process_group)
        return loss, grads, self._next_state()

    def _disturbance(
        self, sample: int, sign: int, members: dict[Synapse, _Members], records: list[Record] | None
    ) -> Visit:
        """A visitor that adds the effect of each sample's direction; fills ``members`` and ``records`` on first use."""
        draw = self._draws(sample)

        def disturb(firing: Firing, u: Tensor) -> Tensor | None:
            synapse = firing.synapse
            if u.ndim <= -synapse.channel_dim:
                raise RuntimeError(
                    f"RankOnePerturbation: layer '{synapse.name}' gave an output of shape {tuple(u.shape)}, without a "
                    "dimension of samples; run the model on batches"
                )
            record = Record.of(firing, u)
            if records is not None:
                records.append(record._replace(u=torch.empty_like(u, device="meta")))  # only for its shape
            if synapse not in members:
                members[synapse] = self._drawn(synapse, record.samples, draw)
            elif (size := len(members[synapse].a)) != record.samples:
                raise RuntimeError(
                    f"RankOnePerturbation: layer '{synapse.name}' ran on {size} samples and then on {record.samples}, "
                    f"but each sample has its own direction; {MICRO_BATCHES}"
                )
            members[synapse].ran[slice(None) if record.rows is None else record.rows.index] = True
            if not len(u):
                return None
            a, b, c = members[synapse][:3]
            added = _added(synapse, firing.x.detach(), record.own(a), record.own(b), c if c is None else record.own(c))
            width = self._width(synapse)
            if not self._own_state["step"] and synapse not in self._widths:
                self._note_width(synapse, u, width * rms(added))
            return torch.add(u.detach(), added.to(u.dtype), alpha=sign * width)

        return disturb

    def _drawn(self, synapse: Synapse, size: int, draw: Callable[[Tensor], Tensor]) -> _Members:
        weight, bias = synapse.weight, synapse.bias
        if synapse not in self._synapse_sizes:
            found = self._weight_sizes([weight] if bias is None else [weight, bias])
            self._synapse_sizes[synapse] = found[0], found[-1]
        sizes = self._synapse_sizes[synapse]
        a = draw(weight.new_empty(size, len(weight))).mul_(sizes[0])
        b = draw(weight.new_empty(size, synapse.pools, weight[0].numel()))
        c = None if synapse.free_bias is None else draw(torch.empty_like(a)).mul_(sizes[1])
        return _Members(a, b, c, torch.zeros(size, dtype=torch.bool, device=weight.device), sizes)


def _added(synapse: Synapse, x: Tensor, a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """The effect of each sample's direction on postsynaptic activity: ``a (bᵀ x) + c``."""
    layer: Any = synapse.layer
    size = len(x)
    if isinstance(layer, nn.Linear):
        shape = [size, *[1] * (x.ndim - 2), -1]
        sums = torch.linalg.vecdot(x, b.to(x.dtype).view(shape)).unsqueeze(-1)  # a quarter of einsum's time
        added: Tensor = sums * a.view(shape)
        return added if c is None else added.add_(c.view(shape))
    each = x.reshape(1, -1, *x.shape[2:])
    filters = b.to(x.dtype).view(size * synapse.pools, *synapse.weight.shape[1:])
    sums = convolve(layer, each, filters, groups=len(filters))
    sums = sums.view(size, synapse.pools, 1, *sums.shape[2:])
    alone = [1] * (sums.ndim - 3)
    added = (sums * a.view(size, synapse.pools, -1, *alone)).flatten(1, 2)
    return added if c is None else added.add_(c.view(size, -1, *alone))


def _gradients(synapse: Synapse, members: _Members, credit: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``Σ credit a bᵀ`` over samples, and ``Σ credit c`` for the bias."""
    a, b, c = members[:3]
    credit = credit.to(a.dtype)
    of_weight, of_bias = members.sizes
    signal = (a * (credit / of_weight**2).unsqueeze(1)).view(len(a), synapse.pools, a.shape[1] // synapse.pools)
    product = torch.einsum("ngo,ngi->goi", signal, b).reshape(synapse.weight.shape)
    found: list[tuple[Tensor, Tensor]] = [(synapse.weight, product)]
    if c is not None and synapse.bias is not None:
        found.append((synapse.bias, credit / of_bias**2 @ c))
    return found
