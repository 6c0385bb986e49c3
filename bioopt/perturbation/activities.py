"""Perturbation of activities: noise on what neurons say, in place of noise on their many weights."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..optimizer import (
    POSITIVE,
    POSITIVE_INT,
    Constraint,
    Estimate,
    Params,
    Probe,
    require_finite,
)
from ..recorder import Synapse
from .base import NoisyActivity


class NodePerturbation(NoisyActivity):
    r"""Node perturbation: noise on postsynaptic activity, credited with the change of loss it brings.

    .. math::
        \tilde u = u + \sigma \xi, \qquad
        s = -\frac{1}{S} \sum_{i=1}^{S} \frac{\tilde L_i - L}{\sigma}\; \xi_i, \qquad
        \Delta W = \langle s\, x^\top \rangle, \qquad \Delta b = \langle s \rangle

    with presynaptic activity :math:`x` of a clean pass, standard normal noise :math:`\xi` on every synapse's output
    at once, the clean loss :math:`L`, and :math:`S` = ``samples`` noisy passes. With ``credit="sample"`` the loss is
    each sample's own, so that a batch of :math:`N` samples is as many experiments; :math:`\langle\cdot\rangle` is the
    mean over samples and the sum over positions. With ``credit="global"`` one scalar loss credits all noise of the
    batch. The mean of :math:`-\Delta W` tends to the gradient of the mean loss as :math:`\sigma \to 0`; its variance
    grows with the number of neurons, not of weights.

    Cost a step: ``1 + samples`` forward passes (two more at the very first, to see that the closure is repeatable) and
    one local product; memory: the clean pass's activities and one
    noise of that size. Batch statistics advance once (in the clean pass), dropout masks are the same in all passes.
    Where samples of a batch influence each other (batch norm), ``"sample"`` leaves that influence out.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused. Weight
            and bias of each synapse learn; other parameters stay frozen.
        lr: learning rate of ``descent``.
        sigma: :math:`\sigma`, the noise's standard deviation in units of :math:`u`.
        samples: :math:`S`, noisy passes a step.
        credit: ``"sample"`` or ``"global"``. A scalar loss is global by itself.
        options: the keywords that follow.
        seed: of the noise; with the step and the pass it fixes all noise.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: split the noisy passes over these ranks, which all see the same batch; only losses travel.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with unknown ones.
        TypeError: bare parameters.
        RuntimeError: a step without a closure, or with one that is not repeatable; a layer whose first dimension is not
            the sample (with ``credit="sample"``); a non-finite loss, after which nothing has changed.

    Sources: B. Widrow & M. Lehr (1990), *Madaline rule III*; J. Werfel, X. Xie & H. S. Seung (2005); with per-sample
    credit as in S. Dalm et al. (2023), *Effective learning with node perturbation in deep neural networks*.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"sigma": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        sigma: float,  # σ
        samples: int = 1,  # S
        credit: str = "sample",
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "sigma": sigma}, credit, **options)
        self._check_value("samples", samples, POSITIVE_INT)
        self.samples = samples

    _select = NoisyActivity._select_synapses

    def _estimate(self, probe: Probe) -> Estimate:
        self._begin(probe)
        records: list[tuple[Synapse, Tensor]] = []
        with self._recorder.visiting(lambda synapse, u: records.append((synapse, u))):
            clean = probe()
        per_sample = self._per_sample(records, clean)

        losses: dict[int, Tensor] = {}
        kept: tuple[int, list[Tensor]] = (-1, [])
        for sample in self._share("samples", self.samples):
            kept = (sample, [])
            with self._recorder.visiting(self._injection(sample, kept[1])):
                losses[sample] = probe()
            if len(kept[1]) != len(records):
                raise RuntimeError(
                    "NodePerturbation: the closure ran other layers in the noisy pass than in the clean one"
                )

        changes = self._gathered(losses, self.samples) - clean
        require_finite(self, "the loss", [changes])
        signals = self._signals(records, changes, per_sample, kept)
        return clean, self._products(records, signals), self._next_state()
