"""Spike-timing-dependent plasticity gated by reward."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from ..core.constraints import NON_NEGATIVE, POSITIVE_INT, RATE, Constraint
from ..core.errors import require_finite
from ..core.params import Params, no_plastic_layer, synapses_of, unique
from ..core.probe import Probe
from ..core.readout import ReadoutOptions
from ..core.recorder import Firing
from ..core.reward import reward_prediction_errors
from ..core.rule import Estimate, LearningRule
from ..core.sums import add_up
from ..core.synapse import Synapse
from ..perturbation.base import CREDIT, MICRO_BATCHES, ambiguous
from .neurons import NeuronFinder, Neurons
from .traces import WINDOW, TimeStep, Traces, add_product, advance, bounded, check_bounds


@final
class RewardSTDP(LearningRule):
    r"""Pairs of spikes leave an eligibility trace, which unexpected reward turns into learning.

    .. math::
        e(t) = e^{-\delta/\tau_e}\, e(t - \delta) + A_+\, s(t)\, p(t)^\top - A_-\, q(t)\, x(t)^\top, \qquad
        \Delta W = \langle (R - \bar R)\, e(T) \rangle, \qquad
        \bar R \leftarrow \bar R + r\,(\langle R \rangle - \bar R)

    with spikes :math:`x, s` and traces :math:`p, q` as in `STDP`, an eligibility :math:`e` of each sample and synapse
    that fades with :math:`\tau_e`, and the reward :math:`R` (dopamine) at the end of the sequence, :math:`T`: minus the
    result of the closure. :math:`\bar R` is the running mean of the reward (in the first step, the reward of that
    step). There is no error signal or gradient. The rule adds no noise: for trials to differ, the neurons or their
    inputs must be noisy.

    With ``trials`` :math:`> 1` the closure is evaluated that often, each time with new random numbers, and
    :math:`\bar R` is the mean reward of the same sample in the other trials: what was to be expected of that very
    stimulus. Without that, a sample that is easy strengthens whatever fires (N. Frémaux et al., 2010). With
    :math:`p_0 > 0` (``x_target``), :math:`p - p_0` takes the place of :math:`p` in the first product, as in `STDP`.

    With ``credit="sample"`` each sample has its own reward, so that a batch of :math:`N` samples makes :math:`N`
    trials; :math:`\langle\cdot\rangle` is the mean over samples and positions. With ``credit="global"`` one reward
    credits all. Bounds act on the whole change: ``"soft"`` multiplies increases by :math:`w_{max} - W` and decreases by
    :math:`W - w_{min}`, ``"hard"`` and ``None`` are as in `STDP`.

    Spikes and traces are kept until the reward is known, in place of eligibilities, a matrix for each sample: memory
    grows with the length of a sequence. By default the last synapse follows the rule as well, so that the network ends
    in spiking neurons, which are found as in `STDP`. Only weights learn.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate of ``descent``.
        tau_e: :math:`\tau_e`, of the eligibility, in ms; with an infinite one it does not fade, and with 0 only the
            pairs of the last time step count.
        tau_plus: :math:`\tau_+`, in ms.
        tau_minus: :math:`\tau_-`, in ms.
        dt: :math:`\delta`, time between two firings of a layer, in ms.
        a_plus: :math:`A_+`.
        a_minus: :math:`A_-`.
        bounds: ``"soft"``, ``"hard"`` or ``None``.
        w_min: :math:`w_{min}`.
        w_max: :math:`w_{max}`.
        x_target: :math:`p_0`, the presynaptic trace at which a postsynaptic spike has no effect.
        scaling: synaptic scaling, as in `STDP`: the sum of a neuron's weights stays.
        reward_rate: :math:`r` in (0, 1], of the running mean of the reward.
        trials: the number of evaluations per step.
        credit: ``"sample"`` or ``"global"``. A scalar loss is always global.
        neurons: as in `STDP`.
        readout: ``None``, ``"delta"`` or ``"teacher"``, as in `LearningRule`; a readout needs no spiking neurons.
        options: further options of the readout, ``exclude``, ``descent``, its options and ``process_group`` (average
            over these ranks, each with its share of the batch), as in `LearningRule`.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers; a layer without spiking neurons
            after it.
        TypeError: bare parameters.
        RuntimeError: as `STDP`; a step without a closure; a layer whose first dimension is not the sample (with
            ``credit="sample"``); a non-finite loss (nothing is changed then).

    Sources: E. M. Izhikevich (2007), *Solving the distal reward problem through linkage of STDP and dopamine
    signaling*; R. V. Florian (2007), *Reinforcement learning through modulation of spike-timing-dependent synaptic
    plasticity*; N. Frémaux & W. Gerstner (2016), *Neuromodulated spike-timing-dependent plasticity, and theory of
    three-factor learning rules*.
    """

    splits_batch = True
    constraints: ClassVar[dict[str, Constraint]] = {
        **WINDOW,
        "tau_e": (lambda v: v >= 0, "a number >= 0"),
        "x_target": NON_NEGATIVE,
    }

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,  # η
        *,
        tau_e: float = 500.0,  # τe
        tau_plus: float = 20.0,  # τ+
        tau_minus: float = 20.0,  # τ-
        dt: float = 1.0,  # δ
        a_plus: float = 1.0,  # A+
        a_minus: float = 1.0,  # A-
        x_target: float = 0.0,  # p0
        bounds: str | None = "soft",
        w_min: float = 0.0,
        w_max: float = 1.0,
        scaling: bool = False,
        reward_rate: float = 0.1,  # r
        trials: int = 1,  # S
        credit: str = "sample",
        neurons: Neurons | None = None,
        readout: str | None = None,
        **options: Unpack[ReadoutOptions],
    ) -> None:
        name = type(self).__name__
        self._check_value("credit", credit, CREDIT)
        self.credit = credit
        self._traces: dict[Synapse, Traces] = {}
        self._steps: dict[Synapse, list[TimeStep]] = {}
        self._finder = NeuronFinder(name, neurons)
        defaults = {
            "lr": lr,
            "tau_e": tau_e,
            "tau_plus": tau_plus,
            "tau_minus": tau_minus,
            "dt": dt,
            "a_plus": a_plus,
            "a_minus": a_minus,
            "x_target": x_target,
            "scaling": scaling,
            "bounds": bounds,
            "w_min": w_min,
            "w_max": w_max,
        }
        super().__init__(params, defaults, readout=readout, **options)
        if not self._trained():
            raise ValueError(no_plastic_layer(name))
        self._check_value("reward_rate", reward_rate, RATE)
        self.reward_rate = reward_rate
        self._check_value("trials", trials, POSITIVE_INT)
        self.trials = trials
        self._finder.require_known(self._recorder.synapses.values())
        self._recorder.on_neurons = self._keep

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        name = type(self).__name__
        check_bounds(name, {**self.defaults, **group})
        synapses = synapses_of(name, group["params"], self._exclusion)
        synapses = [s for s in synapses if s.layer not in self._readout.layers]
        self._finder.find(synapses, group["params"])
        return unique([(f"{s.name}.weight", s.weight) for s in synapses]), synapses

    def _keep(self, firing: Firing, spikes: Tensor) -> Tensor:
        synapse, group = firing.synapse, self.param_groups[firing.synapse.group]
        with torch.no_grad(), torch.autocast(spikes.device.type, enabled=False):
            before = self._traces.get(synapse)
            now, self._traces[synapse] = advance(
                type(self).__name__, firing, spikes.detach(), before, group, MICRO_BATCHES.capitalize()
            )
            kept = now._replace(x=now.x.clone(), s=now.s.clone())  # a network may reuse their memory
            self._steps.setdefault(synapse, []).append(kept)
        return spikes

    def _estimate(self, probe: Probe) -> Estimate:
        name = type(self).__name__
        self._recorder.reset()
        for p in self._trained():
            p.grad = None
        try:
            results: list[Tensor] = []
            played: list[dict[Synapse, list[TimeStep]]] = []
            for trial in range(self.trials):
                if trial:
                    probe.redraw()
                self._recorder.reset()
                self._traces, self._steps = {}, {}
                if trial:
                    with self._cutting(None):
                        results.append(probe())
                else:
                    results.append(self._base_point(probe))
                if missing := self._recorder.missing():
                    raise RuntimeError(f"{name}: {missing}")
                if not self._steps:
                    raise RuntimeError(self._coverage.none_fired())
                played.append(self._steps)
            losses = torch.stack(results)
            require_finite(self, "the loss", [losses])
            per_sample = self.credit == "sample" and losses[0].ndim > 0
            state = self._next_state()
            errors, reward = reward_prediction_errors(self, losses, per_sample, self.reward_rate)
            if reward is not None:
                state["reward"] = reward
            grads: dict[Tensor, Tensor] = {}
            changes: dict[Synapse, Tensor] = {}
            for error, spikes in zip(errors, played, strict=True):
                for synapse, steps in spikes.items():
                    change = self._change(synapse, steps, error)
                    changes[synapse] = changes[synapse] + change if synapse in changes else change
            self._require_same_on_ranks([synapse.name for synapse in changes])
            self._average_over_ranks(list(changes.values()))
            for synapse, change in changes.items():
                weight, group = synapse.weight, self.param_groups[synapse.group]
                up, down = change.clamp(min=0), (-change).clamp(min=0)
                add_up(grads, [(weight, -bounded(up, down, weight.detach(), group, group["scaling"]))])
            return losses.mean(0), grads, state
        finally:
            self._traces.clear()
            self._steps.clear()

    def _change(self, synapse: Synapse, steps: list[TimeStep], error: Tensor) -> Tensor:
        """``⟨(R - R̄) e(T)⟩`` of one synapse, before bounds."""
        group, last = self.param_groups[synapse.group], steps[-1].s
        if error.ndim and (last.ndim < 2 or len(last) != len(error)):
            raise RuntimeError(
                f"{type(self).__name__}(credit='sample'): the neurons of layer '{synapse.name}' gave spikes of shape "
                f"{tuple(last.shape)} where there are {len(error)} losses, one per sample, so their first dimension "
                f"is not the sample. Use credit='global'; or, {MICRO_BATCHES}"
            )
        if error.ndim and ambiguous(synapse, last.shape, len(error)):
            raise RuntimeError(
                f"{type(self).__name__}(credit='sample'): the neurons of layer '{synapse.name}' gave spikes of shape "
                f"{tuple(last.shape)}, in which more than one dimension is as long as the batch of {len(error)}, so "
                "that any of them may be the samples. Use a batch of another size, or credit='global'"
            )
        fading = math.exp(-group["dt"] / group["tau_e"]) if group["tau_e"] else 0.0
        gate = error.to(steps[-1].pre.dtype) / (last.numel() // len(synapse.weight))
        gate = gate.view(-1, *[1] * (last.ndim - 1)) if gate.ndim else gate
        change = last.new_zeros(synapse.weight.shape)
        for age, now in enumerate(reversed(steps)):
            gated = gate * fading**age
            pre = now.pre - group["x_target"] if group["x_target"] else now.pre
            add_product(change, synapse, now.s * gated, pre, group["a_plus"])
            add_product(change, synapse, now.post * gated, now.x, -group["a_minus"])
        return change
