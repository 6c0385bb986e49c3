"""A rule that learns from reward: presynaptic activity, a neuron's own noise, and a third factor."""

from __future__ import annotations

from typing import ClassVar, Unpack, final

from torch import Tensor

from ..core.constraints import POSITIVE, RATE, Constraint
from ..core.errors import require_finite
from ..core.params import Params
from ..core.probe import Probe
from ..core.readout import ReadoutOptions
from ..core.reward import reward_prediction_error
from ..core.rule import Estimate
from ..core.synapse import Synapse
from ..perturbation.base import NoisyActivity, Record, credited


@final
class RewardHebbian(NoisyActivity):
    r"""A neuron's own noise leaves an eligibility trace, which unexpected reward turns into learning.

    .. math::
        \tilde u = u + \sigma \xi, \qquad
        e(T) = \sum_{t \le T} \lambda^{T - t}\, \xi(t)\, x(t)^\top, \qquad
        \Delta W = \frac{1}{\sigma} \langle (R - \bar R)\, e \rangle, \qquad
        \bar R \leftarrow \bar R + r\,(\langle R\rangle - \bar R)

    with presynaptic activity :math:`x`, standard normal exploration :math:`\xi` on the output :math:`u` of every
    synapse (a neuron can know :math:`\tilde u - u`, its own fluctuation), and the reward :math:`R`, which is minus the
    result of the closure. Each firing of a layer in the closure is one time step :math:`t`: the factors of traces are
    kept until the closure ends and the reward is known, so that the closure may run a whole episode. :math:`\bar R` is
    the running mean of the reward (in the first step, the reward of that step). There is no error signal, clean pass or
    gradient: on average and for small :math:`\sigma`, :math:`\Delta W` is the gradient of the expected reward (with
    :math:`\lambda = 1`).

    With ``credit="sample"`` each sample has its own reward, so that a batch of :math:`N` samples makes :math:`N`
    trials; :math:`\langle\cdot\rangle` is the mean over samples and the sum over positions. With ``credit="global"``
    one reward credits all noise of the batch. The bias learns as a weight whose presynaptic activity is 1. By default
    the last layer follows the rule as well.

    Cost of a step: one forward pass and one local product for each firing, whose activities and noise are kept.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused. Weight
            and bias of each synapse learn; other parameters stay frozen.
        lr: learning rate of ``descent``.
        sigma: :math:`\sigma`, the exploration's standard deviation in units of :math:`u`.
        trace_decay: :math:`\lambda` in [0, 1], the share of a trace that remains after the next firing.
        reward_rate: :math:`r` in (0, 1], of the running mean of the reward.
        credit: ``"sample"`` or ``"global"``. A scalar loss is always global.
        options: the keywords that follow.
        seed: of the noise; with the step it determines all noise.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: average over these ranks, each with its share of the batch and its own noise.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with unknown ones.
        TypeError: bare parameters.
        RuntimeError: a step without a closure; a layer whose first dimension is not the sample (with
            ``credit="sample"``); a non-finite loss (nothing is changed then).

    Sources: R. J. Williams (1992), *Simple statistical gradient-following algorithms for connectionist reinforcement
    learning*; R. Legenstein, S. M. Chase, A. B. Schwartz & W. Maass (2010), *A reward-modulated Hebbian learning rule
    can explain experimentally observed network reorganization in a brain control task*; N. Frémaux & W. Gerstner
    (2016), *Neuromodulated spike-timing-dependent plasticity, and theory of three-factor learning rules*.
    """

    splits_batch: ClassVar[bool] = True
    constraints: ClassVar[dict[str, Constraint]] = {
        "sigma": POSITIVE,
        "trace_decay": (lambda v: 0 <= v <= 1, "a number in [0, 1]"),
    }

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        sigma: float,  # σ
        trace_decay: float = 1.0,  # λ
        reward_rate: float = 0.1,  # r
        credit: str = "sample",
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[ReadoutOptions],
    ) -> None:
        defaults = {"lr": lr, "sigma": sigma, "trace_decay": trace_decay}
        super().__init__(params, defaults, credit, seed=seed, readout=readout, **options)
        self._check_value("reward_rate", reward_rate, RATE)
        self.reward_rate = reward_rate

    _select = NoisyActivity._select_synapses

    def _estimate(self, probe: Probe) -> Estimate:
        for p in self._trained():
            p.grad = None
        rank, _ = self._ranks
        noise: list[Tensor] = []
        records: list[Record] = []
        with self._cutting(self._injection(rank, noise, records)):
            losses = probe()
        require_finite(self, "the loss", [losses])
        per_sample = self._per_sample(records, losses, probe)
        error, expected = reward_prediction_error(self, losses, per_sample, self.reward_rate)
        error = error / len(error) if per_sample else error

        firings: dict[Synapse, int] = {}
        for record, n in zip(reversed(records), reversed(noise), strict=True):  # the trace of the last firing is 1
            synapse = record.synapse
            group = self.param_groups[synapse.group]
            age = firings.get(synapse, 0)
            firings[synapse] = age + 1
            factor = error * (-(group["trace_decay"] ** age) / group["sigma"])  # .grad is -Δw
            credited(n, factor)
        grads = self._products(records, noise)
        self._require_same_on_ranks(list(dict.fromkeys(record.synapse.name for record in records)))
        self._average_over_ranks(list(grads.values()))
        state = self._next_state()
        state["reward"] = expected
        return losses, grads, state
