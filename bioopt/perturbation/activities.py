"""Perturbation of activities: noise on the activity of neurons, not on their weights."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.acts import inject
from ..core.constraints import NON_NEGATIVE, POSITIVE, POSITIVE_INT, Constraint
from ..core.errors import Diverged, require_finite
from ..core.params import Params
from ..core.probe import Probe
from ..core.readout import GradientReadoutOptions
from ..core.recorder import Firing
from ..core.rule import Estimate
from ..core.synapse import Synapse, convolve
from .base import Activity, NoisyActivity, Record, add_activity, count_of, credit_of, sizes_of

OTHER_LAYERS = "NodePerturbation: the closure ran other layers in the noisy pass than in the clean one"


@final
class NodePerturbation(NoisyActivity):
    r"""Noise on the activity of neurons is credited with the change of loss that it causes.

    .. math::
        \tilde u = u + \sigma \xi, \qquad
        s = -\frac{1}{S} \sum_{i=1}^{S} \frac{\tilde L_i - L}{\sigma}\; \xi_i, \qquad
        \Delta W = \langle s\, x^\top \rangle, \qquad \Delta b = \langle s \rangle

    with presynaptic activity :math:`x` of a clean pass, noise :math:`\xi` of mean 0 and variance 1 on the output of
    all synapses at once, of a width :math:`\sigma` for each layer, the clean loss :math:`L`, and :math:`S` =
    ``samples`` noisy passes. With ``credit="sample"`` each sample has its own loss, so that a batch of :math:`N`
    samples makes :math:`N` experiments; :math:`\langle\cdot\rangle` is the mean over samples and the sum over
    positions. With ``credit="global"`` one scalar loss credits all noise of the batch. The mean of :math:`-\Delta W`
    tends to the gradient of the mean loss as :math:`\sigma \to 0`; its variance grows with the number of neurons, not
    of weights.

    By default :math:`\sigma` is ``sigma`` times the size of the layer's activity in the clean pass: root mean square of
    its neurons' deviations over samples and positions (of a single event, of the activity itself; 1 without any
    activity). Weights learn from presynaptic activity less its running mean (``centre_inputs``), and the step is that
    of Adam. So the same options suit layers and inputs of any scale and offset. ``relative=False`` is the published
    rule: one width for all layers, and SGD.

    With ``decorrelation`` :math:`\epsilon > 0`, in place of ``whitening``, weights learn from decorrelated presynaptic
    activity :math:`\hat x = R x`, so that correlated inputs do not share the credit of one of them:

    .. math::
        \Delta W = \langle s\, \hat x^\top \rangle R, \qquad
        R \leftarrow R - \epsilon \left( \langle \hat x \hat x^\top \rangle
        - \operatorname{diag} \langle \hat x^2 \rangle \right) R, \qquad R_0 = I

    This is the step of a layer :math:`u = V R x` with plastic :math:`V`, written for :math:`W = V R`: the model is
    unchanged, and a change of :math:`R` does not change its output (in the source it does). It needs :math:`\epsilon`
    below the inverse of the largest eigenvalue of :math:`\langle x x^\top \rangle`, a square matrix of a neuron's
    inputs for each layer, and three products with it for every event.

    In bfloat16, noise below 1/256 of the activity is mostly rounded away: from a relative ``sigma`` of 0.016 on,
    estimates are as good as in float32, and below 0.004 the first step warns. Noise is credited as it was added, after
    rounding.

    Cost of a step: ``1 + samples`` forward passes (two more in the first, to check that the closure is repeatable) and
    one local product; memory: the activities of the clean pass and twice their size for noise. Batch statistics
    advance once (in the clean pass), dropout masks are the same in all passes. If samples of a batch influence each
    other (batch norm), ``"sample"`` ignores that influence.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused. Weight
            and bias of each synapse learn; other parameters stay frozen.
        lr: learning rate of ``descent``; by default 2e-3, and with a readout 1e-4. With
            ``relative=False`` it must be given.
        sigma: the noise's standard deviation, in units of the standard deviation of each layer's activity, or
            with ``relative=False`` in units of :math:`u`.
        relative: whether ``sigma`` is relative to that deviation.
        samples: :math:`S`, noisy passes per step; by default 8, or 1 with ``relative=False``.
        credit: ``"sample"`` or ``"global"``. A scalar loss is always global.
        distribution: of :math:`\xi`: ``"normal"``, or ``"rademacher"``, -1 and 1, drawn in a third of the time.
        decorrelation: :math:`\epsilon`, of each group, for Linear, Conv1d, Conv2d and Conv3d. 0: none. Layers with it
            are not whitened, unless ``whitening`` is given.
        batched: make all noisy passes of a process in one evaluation (`torch.func.vmap` over the closure), with all
            their activities in memory. Linear layers of 128 neurons ran 1.7 to 2 times as fast on a CPU, convolutions
            slower. Frozen layers below all noise run once for all passes. A closure that vmap cannot run (batch norm
            in training mode above noise, ``loss.item()``, ``loss.backward()``) is run pass by pass, with one warning.
        options: the keywords that follow.
        seed: of the noise; with the step and the pass it determines all noise.
        descent: the `torch.optim` class that makes the step, by default Adam, or SGD with ``relative=False``; its
            options as further keywords.
        process_group: split the noisy passes over these ranks, which have the same batch. They exchange losses, or, if
            the others have 8 passes or more, the sums of their own: equal to one process to rounding.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with unknown ones.
        TypeError: bare parameters.
        RuntimeError: a step without a closure, or with one that is not repeatable; a layer whose first dimension is not
            the sample (with ``credit="sample"``); a non-finite loss, or a decorrelation that diverges (nothing is
            changed then).

    Sources: B. Widrow & M. Lehr (1990), *Madaline rule III*; J. Werfel, X. Xie & H. S. Seung (2005); with per-sample
    credit as in S. Dalm et al. (2023), *Effective learning with node perturbation in deep neural networks*.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"sigma": POSITIVE, "decorrelation": NON_NEGATIVE}

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
        decorrelation: float = 0.0,  # ε
        batched: bool = False,
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[GradientReadoutOptions],
    ) -> None:
        lr = self._rate(lr, 2e-3, relative, readout)
        defaults = {"lr": lr, "sigma": sigma, "decorrelation": decorrelation}
        super().__init__(
            params, defaults, credit, distribution, relative=relative, seed=seed, readout=readout, **options
        )
        if self._centring is not None and options.get("whitening") is None:
            self._centring.spare(self._decorrelates)  # whitening would do the same once more
        samples = count_of(samples, 8, relative)
        self._check_value("samples", samples, POSITIVE_INT)
        self.samples = samples
        self.batched = batched

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        named, synapses = self._select_synapses(group)
        if group.get("decorrelation", self.defaults["decorrelation"]):
            self._require_built_in("NodePerturbation: decorrelation", synapses, "give it a group with decorrelation=0")
        return named, synapses

    def _estimate(self, probe: Probe) -> Estimate:
        self._prepare(probe)
        records: list[Record] = []
        inputs: dict[Synapse, list[Tensor]] = {}
        activity: dict[Synapse, Activity] = {}

        def record(firing: Firing, u: Tensor) -> None:
            records.append(Record.of(firing, u))
            synapse = firing.synapse
            if self.relative:
                add_activity(activity, synapse, u)
            if self.param_groups[synapse.group]["decorrelation"] and synapse.weight.requires_grad:
                inputs.setdefault(synapse, []).append(firing.x.detach())

        clean = self._base_point(probe, record)
        per_sample = self._per_sample(records, clean, probe)
        self._sizes = sizes_of(activity)

        mine, summed = self._share("samples", self.samples), self._sums_travel(self.samples)
        at_once = summed or self._ranks[1] == 1
        signals: list[Tensor] = []

        def credit(change: Tensor, noise: list[Tensor]) -> None:
            self._credit(signals, records, noise, credit_of(change, per_sample) / self.samples)

        losses, kept = (
            self._in_one_evaluation(probe, records, mine) if self.batched and not probe.always_grad else ({}, {})
        )
        for sample in () if losses else mine:
            kept = {sample: []}
            with self._cutting(self._injection(sample, kept[sample])):
                losses[sample] = probe()
            if len(kept[sample]) != len(records):
                raise RuntimeError(OTHER_LAYERS)
            if at_once:  # else all passes are added in order once those of other ranks are known
                credit(losses[sample] - clean, kept[sample])
        if not summed:
            changes = self._gathered(losses, self.samples) - clean
            require_finite(self, "the loss", [changes])
        if not signals:
            for sample in mine if summed else range(self.samples):
                change = losses[sample] - clean if summed else changes[sample]
                credit(change, kept.get(sample) or self._drawn_again(sample, records))
        self._require_widths("sigma")
        grads, state = self._products(records, signals), self._next_state()
        if summed:
            grads = self._summed(grads, torch.stack(list(losses.values())).mean())
        if inputs:
            state["decorrelation"] = self._decorrelate(grads, inputs)
        return clean, grads, state

    def _decorrelates(self, synapse: Synapse) -> bool:
        return bool(self.param_groups[synapse.group]["decorrelation"])

    def _decorrelate(self, grads: dict[Tensor, Tensor], inputs: dict[Synapse, list[Tensor]]) -> dict[int, Tensor]:
        """Turn products with presynaptic activity into those with decorrelated activity; return the new matrices."""
        matrices = dict(self._own_state.get("decorrelation", {}))
        for synapse, fired in inputs.items():
            weight = synapse.weight
            size = weight[0].numel()
            matrix = matrices.get(synapse.index)
            if matrix is None:
                matrix = torch.eye(size, dtype=weight.dtype, device=weight.device).repeat(synapse.pools, 1, 1)
            matrix = matrix.to(weight.device)  # a checkpoint may have left it elsewhere
            product = grads[weight].reshape(synapse.pools, -1, size)
            with torch.autocast(weight.device.type, enabled=False):
                seen = torch.cat([_projected(synapse, x.to(weight.dtype), matrix) for x in fired], 1)
                if not seen.numel():  # the layer ran on no sample
                    continue
                grads[weight] = (product @ matrix.mT @ matrix).view(weight.shape)
                along = seen.mT @ (seen @ matrix) / seen.shape[1]
                alone = seen.square().mean(1).unsqueeze(-1) * matrix
                rate = self.param_groups[synapse.group]["decorrelation"]
                matrices[synapse.index] = matrix - rate * (along - alone)
                if not matrices[synapse.index].isfinite().all():
                    raise Diverged(
                        f"NodePerturbation: decorrelation={rate} has diverged at layer '{synapse.name}'; nothing was "
                        f"changed. Try decorrelation={rate / 10:g}"
                    )
        return matrices

    def _in_one_evaluation(
        self, probe: Probe, records: list[Record], mine: range
    ) -> tuple[dict[int, Tensor], dict[int, list[Tensor]]]:
        """The losses of all noisy passes from one evaluation, and their noise; empty if vmap cannot run the closure."""
        kept = {sample: self._drawn_again(sample, records) for sample in mine}
        for record in records:
            self._note_width(record.synapse, record.u, self._width(record.synapse))

        def noisy(noise: list[Tensor]) -> Tensor:
            rest = iter(noise)

            def visit(firing: Firing, u: Tensor) -> Tensor:
                if (added := next(rest, None)) is None:
                    raise RuntimeError(OTHER_LAYERS)
                return inject(u, Record.of(firing, u).own(added), self._width(firing.synapse))

            with self._cutting(visit):
                losses = probe(copies=len(mine))
            if next(rest, None) is not None:
                raise RuntimeError(OTHER_LAYERS)
            return losses

        losses = self._mapped(noisy, [torch.stack(passes) for passes in zip(*kept.values(), strict=True)])
        return ({}, {}) if losses is None else (dict(zip(mine, losses, strict=True)), kept)


def _projected(synapse: Synapse, x: Tensor, matrix: Tensor) -> Tensor:
    """``R x`` for every pool and event, pools × events × inputs of a neuron."""
    layer: Any = synapse.layer
    size = matrix.shape[-1]
    if isinstance(layer, nn.Linear):
        return F.linear(x, matrix[0]).reshape(1, -1, size)
    seen = convolve(layer, x, matrix.reshape(-1, *synapse.weight.shape[1:]))
    return seen.movedim(synapse.channel_dim, -1).reshape(-1, synapse.pools, size).transpose(0, 1)
