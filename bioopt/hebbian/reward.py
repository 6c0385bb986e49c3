"""A rule that learns from reward: presynaptic activity, a neuron's own noise, and a third factor."""

from __future__ import annotations

from typing import ClassVar, Unpack, final

import torch
from torch import Tensor

from ..core.constraints import POSITIVE, POSITIVE_INT, RATE, Constraint
from ..core.errors import require_finite
from ..core.params import Params
from ..core.probe import Probe
from ..core.readout import GradientReadoutOptions
from ..core.reward import reward_prediction_errors
from ..core.rule import Estimate
from ..core.synapse import Synapse
from ..perturbation.base import Activity, NoisyActivity, Record, add_activity, count_of, credited, powers_of


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

    With ``trials`` :math:`> 1` the closure is evaluated that often with other noise, :math:`\Delta W` is the mean over
    trials, and :math:`\bar R` is the mean reward of the same sample in the other trials. So the reward's differences
    between samples, which exploration does not explain, drop out: far fewer trials are needed in all.

    By default :math:`\sigma` is ``sigma`` times the size of the layer's activity, the root mean square of its neurons'
    deviations over samples, positions and firings (of a single event, of the activity itself), a running value with the
    rate :math:`r` (in the first step, that of the first firing; 1 for a layer without activity), and the step is that
    of Adam. With ``relative=False`` it is ``sigma`` itself, and the step is that of SGD.

    With ``credit="sample"`` each sample has its own reward, so that a batch of :math:`N` samples makes :math:`N`
    trials; :math:`\langle\cdot\rangle` is the mean over samples and the sum over positions. With ``credit="global"``
    one reward credits all noise of the batch. The bias learns as a weight whose presynaptic activity is 1. By default
    the last layer follows the rule as well.

    Cost of a step: ``trials`` forward passes (two more in the first step, if several, to check that the closure is
    repeatable) and one local product for each firing, whose activities and noise are kept.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused. Weight
            and bias of each synapse learn; other parameters stay frozen.
        lr: learning rate of ``descent``; by default 2e-3, and with a readout 1e-4. With ``relative=False`` it must be
            given.
        sigma: the exploration's standard deviation, in units of the size of each layer's activity, or with
            ``relative=False`` in units of :math:`u`.
        relative: whether ``sigma`` is relative to that size.
        trials: the number of evaluations of the closure per step, each with its own noise; by default 4, or 1 with
            ``relative=False``. With several the closure must be repeatable, as an environment may not be.
        trace_decay: :math:`\lambda` in [0, 1], the share of a trace that remains after the next firing.
        reward_rate: :math:`r` in (0, 1], of the running mean of the reward.
        credit: ``"sample"`` or ``"global"``. A scalar loss is always global.
        options: the keywords that follow.
        seed: of the noise; with the step it determines all noise.
        descent: the `torch.optim` class that makes the step, by default Adam, or SGD with ``relative=False``; its
            options as further keywords.
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
        lr: float | None = None,  # η
        *,
        sigma: float = 0.1,  # σ
        relative: bool = True,
        trials: int | None = None,  # S
        trace_decay: float = 1.0,  # λ
        reward_rate: float = 0.1,  # r
        credit: str = "sample",
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[GradientReadoutOptions],
    ) -> None:
        lr = self._rate(lr, 2e-3, relative, readout)
        defaults = {"lr": lr, "sigma": sigma, "trace_decay": trace_decay}
        super().__init__(params, defaults, credit, relative=relative, seed=seed, readout=readout, **options)
        trials = count_of(trials, 4, relative)
        self._check_value("trials", trials, POSITIVE_INT)
        self.trials = trials
        self._check_value("reward_rate", reward_rate, RATE)
        self.reward_rate = reward_rate

    _select = NoisyActivity._select_synapses

    def _estimate(self, probe: Probe) -> Estimate:
        for p in self._trained():
            p.grad = None
        if self.trials > 1 and not self._own_state["step"]:
            self._require_repeatable(probe)
        rank, ranks = self._ranks
        powers = self._own_state.get("activity", {})
        known = {s.index: s for s in self._recorder.synapses.values()}
        self._sizes = {known[i]: power**0.5 or 1.0 for i, power in powers.items()}
        made: list[tuple[list[Record], list[Tensor]]] = []
        results: list[Tensor] = []
        for trial in range(self.trials):
            made.append(([], []))
            with self._cutting(self._injection(rank + trial * ranks, made[-1][1], made[-1][0])):
                results.append(probe())
        losses = torch.stack(results)
        require_finite(self, "the loss", [losses])
        records = [record for found, _ in made for record in found]
        per_sample = self._per_sample(records, losses[0], probe)
        self._require_widths("sigma")
        state = self._next_state()
        errors, reward = reward_prediction_errors(self, losses, per_sample, self.reward_rate)
        if reward is not None:
            state["reward"] = reward
        errors = errors / errors.shape[1] if per_sample else errors

        for error, (found, noise) in zip(errors, made, strict=True):
            firings: dict[Synapse, int] = {}
            for record, n in zip(reversed(found), reversed(noise), strict=True):  # the trace of the last firing is 1
                synapse = record.synapse
                age = firings.get(synapse, 0)
                firings[synapse] = age + 1
                decay = self.param_groups[synapse.group]["trace_decay"] ** age
                credited(n, error * (-decay / self._width(synapse)))  # .grad is -Δw
        grads = self._products(records, [n for _, noise in made for n in noise])
        self._require_same_on_ranks(list(dict.fromkeys(record.synapse.name for record in records)))
        self._average_over_ranks(list(grads.values()))
        if self.relative:
            state["activity"] = self._running_activity(powers, made[0][0])
        return losses.mean(0), grads, state

    def _running_activity(self, before: dict[int, float], records: list[Record]) -> dict[int, float]:
        """The running variance of each layer's activity, after the firings of one trial."""
        found: dict[Synapse, Activity] = {}
        for record in records:  # noise was added to a copy of u, so that it stands as it was
            add_activity(found, record.synapse, record.u)
        events = [one.square.new_tensor(float(one.events)) for one in found.values()]
        self._sum_over_ranks([t for one, n in zip(found.values(), events, strict=True) for t in (*one[:2], n)])
        now = {s: one._replace(events=int(n)) for (s, one), n in zip(found.items(), events, strict=True)}
        after = dict(before)
        for synapse, power in powers_of(now).items():
            if now[synapse].events:
                old = after.setdefault(synapse.index, power)
                after[synapse.index] = old + self.reward_rate * (power - old)
        return after
