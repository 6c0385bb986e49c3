"""Spike-timing-dependent plasticity: traces of spikes, pairs of them, and a reward that lets the pairs count."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .hebbian.reward import unexpected
from .optimizer import (
    NON_NEGATIVE,
    POSITIVE,
    Constraint,
    Estimate,
    LearningRule,
    Params,
    Probe,
    ProcessGroup,
    named_modules_of,
    no_plastic_layer,
    require_finite,
    unique,
)
from .perturbation.base import MICRO_BATCHES, ambiguous
from .recorder import Synapse, rows_seen
from .synaptic import Sums, SynapticRule, synapses_of

__all__ = ["STDP", "RewardSTDP"]

BOUNDS = ("soft", "hard", None)
WINDOW: dict[str, Constraint] = {
    "tau_plus": POSITIVE,
    "tau_minus": POSITIVE,
    "dt": POSITIVE,
    "a_plus": NON_NEGATIVE,
    "a_minus": NON_NEGATIVE,
    "bounds": (lambda v: v in BOUNDS, "'soft', 'hard' or None"),
}
NEW = (
    "Where another sequence begins before the step, or after one whose traces are carried on (carry=True), say so: "
    "optimizer.new_sequence()"
)
Neurons = Mapping[str, str | nn.Module]


class Traces(NamedTuple):
    """What is left, at one synapse, of the spikes of a sequence."""

    pre: Tensor  #: of the presynaptic spikes, of their shape
    post: Tensor  #: of the postsynaptic ones


class Moment(NamedTuple):
    """One time step at one synapse: all that its plasticity needs to know."""

    x: Tensor  #: presynaptic spikes
    s: Tensor  #: the spikes that the neurons then emitted
    pre: Tensor  #: presynaptic trace, the spikes of this step included
    post: Tensor  #: postsynaptic trace, the spikes of this step not yet included


class STDP(SynapticRule):
    r"""Spike-timing-dependent plasticity of all pairs of spikes, by exponential traces.

    .. math::
        p(t) = e^{-\delta/\tau_+}\, p(t - \delta) + x(t), \qquad
        q(t) = e^{-\delta/\tau_-}\, \bigl(q(t - \delta) + s(t - \delta)\bigr)

    .. math::
        P_+ = \Bigl\langle \sum_t s(t)\, p(t)^\top \Bigr\rangle, \qquad
        P_- = \Bigl\langle \sum_t q(t)\, x(t)^\top \Bigr\rangle, \qquad
        P_0 = \Bigl\langle \sum_t s(t)\, \mathbf 1^\top \Bigr\rangle

    .. math::
        \Delta W = f_+ \odot A_+ P_+ - f_- \odot (A_- P_- + A_+ p_0 P_0)

    with presynaptic spikes :math:`x(t)` (what enters the layer at time step :math:`t`), postsynaptic spikes
    :math:`s(t)` (what the neurons after the layer then emit) and their traces :math:`p, q`, all 0 or counts of spikes
    of a shape of their own, the batch's; :math:`\delta` and the time constants are in milliseconds. For one pair of
    spikes this is the classical window of the delay :math:`\Delta t = t_{post} - t_{pre}`: :math:`A_+ e^{-\Delta
    t/\tau_+}` for :math:`\Delta t \ge 0` and :math:`-A_- e^{\Delta t/\tau_-}` for :math:`\Delta t < 0`. Spikes of the
    same step count as cause and effect (:math:`\Delta t = 0`), since the presynaptic one has just driven the neuron.
    Sums run over the steps of a sequence; :math:`\langle\cdot\rangle` is the mean over samples and positions. With
    :math:`p_0 > 0` (``x_target``) each postsynaptic spike also weakens all of its neuron's synapses: those whose
    inputs were silent fade, as in Diehl & Cook, without a presynaptic spike having to come first.

    ``bounds="soft"``: :math:`f_+ = w_{max} - W,\ f_- = W - w_{min}`, so that weights slow down towards a bound, and
    come back from beyond. Within a step, of however many spikes, :math:`f_\pm` follow the weight as it goes: with
    :math:`\rho` the sum of what :math:`f_\pm` multiply, :math:`\Delta W` is the above times
    :math:`(1 - e^{-\eta\rho}) / \eta\rho`, so that no learning rate takes it beyond. ``"hard"``: :math:`f_\pm = 1`,
    and the step is cut so that :math:`W + \eta \Delta W` stays in :math:`[w_{min}, w_{max}]`. Both are exact with plain
    SGD, the default ``descent``. ``None``: :math:`f_\pm = 1`, no bounds.

    A *sequence* is what has fired since the last step: a network that unrolls time in its ``forward``, or a closure
    that calls a network once a time step. Traces are zero at its start, whatever the size of its batch, and products
    are formed at once, so that memory does not grow with its length. To feed several sequences before one step, call
    `new_sequence` between them; with ``carry=True`` traces go on from step to step, until `new_sequence`.

    Only weights learn. The synapses are ordinary layers, cut as in `SynapticRule`. The neurons are any module that
    returns 0 or 1 for each output of the layer, alone or first in a tuple (as those of snntorch): by default the next
    module after the layer, in registration order, that is not of `torch.nn` and holds no synapse.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate, per mean sequence.
        tau_plus: :math:`\tau_+`, of the presynaptic trace, in ms.
        tau_minus: :math:`\tau_-`, of the postsynaptic trace, in ms.
        dt: :math:`\delta`, time between two firings of a layer, in ms.
        a_plus: :math:`A_+`, what a pair of spikes in causal order adds at most.
        a_minus: :math:`A_-`, what one in the other order takes at most.
        x_target: :math:`p_0`, the presynaptic trace at which a postsynaptic spike neither strengthens nor weakens
            (without bounds).
        bounds: ``"soft"``, ``"hard"`` or ``None``.
        w_min: :math:`w_{min}`.
        w_max: :math:`w_{max}`.
        scaling: synaptic scaling: after a step (of plain SGD) all weights of a neuron are multiplied so that they have
            the sum that they had, where it is positive; synapses compete for it. Hard bounds come last; soft ones may
            be passed by it.
        carry: whether traces go on from one step to the next, as state that is saved. Batches are then of one size.
        neurons: for layers whose neurons are others than the default: ``{"fc": "lif"}``, by name, or as a module.
            Several layers may drive the same neurons.
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `SynapticRule`; a readout needs no spiking neurons.
        options: further options of the readout, ``descent``, its options and ``process_group``, as in `SynapticRule`,
            whose errors are raised here as well. Carried traces are each rank's own.

    Raises:
        ValueError: a hyperparameter out of range; a layer without spiking neurons after it.
        RuntimeError: activity that is not 0 or 1; neurons that do not speak; a batch of another size within a
            sequence, or after a carried one.

    Sources: G. Bi & M. Poo (1998), *Synaptic modifications in cultured hippocampal neurons*; S. Song, K. D. Miller &
    L. F. Abbott (2000), *Competitive Hebbian learning through spike-timing-dependent synaptic plasticity*; soft bounds:
    R. Gütig et al. (2003); traces: A. Morrison, M. Diesmann & W. Gerstner (2008), *Phenomenological models of synaptic
    plasticity based on spike timing*; ``x_target``: P. U. Diehl & M. Cook (2015), *Unsupervised learning of digit
    recognition using spike-timing-dependent plasticity*.
    """

    constraints: ClassVar[dict[str, Constraint]] = {**WINDOW, "x_target": NON_NEGATIVE}

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
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
        carry: bool = False,
        neurons: Neurons | None = None,
        readout: str | None = "delta",
        **options: Any,
    ) -> None:
        self.carry = carry
        self._trains: dict[Synapse, Traces] = {}
        self._sequences: dict[Synapse, weakref.ref[Sums]] = {}
        self._finder = _Finder(type(self).__name__, neurons)
        own = {
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
        super().__init__(params, lr, readout=readout, own=own, **options)
        self._finder.require_known(self._recorder.synapses.values())
        self._recorder.hear = self._pair

    def new_sequence(self) -> None:
        """Let the next firing be the first of a sequence, whose traces are zero."""
        self._trains.clear()
        self._own_state = {key: value for key, value in self._own_state.items() if key != "traces"}

    def follow(self, synapses: list[Synapse], group: dict[str, Any]) -> None:
        """Find the neurons of each synapse."""
        _check_bounds(type(self).__name__, {**self.defaults, **group})
        self._finder.find(synapses, group["params"])

    def forget(self) -> None:
        """Traces end with the step."""
        self._trains.clear()
        self._sequences.clear()

    def kept(self) -> dict[str, Any]:
        """Traces that are carried on."""
        if missing := self._recorder.missing():
            raise RuntimeError(f"{type(self).__name__}: {missing}")
        if not self.carry:
            return {}
        ended = {synapse.index: tuple(traces) for synapse, traces in self._trains.items()}
        return {"traces": {**self._own_state.get("traces", {}), **ended}}

    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """Strengthening and weakening, each as far as the bounds let it."""
        return _bounded(product[0], product[1], synapse.weight.detach(), group, group["scaling"])

    def _pair(self, synapse: Synapse, x: Tensor, s: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            group = self.param_groups[synapse.group]
            sums = self._sequence(synapse)
            traces = self._trains.get(synapse)
            first = traces is None
            if traces is None and synapse.index in self._own_state.get("traces", {}):
                traces = Traces(*(t.to(x.device) for t in self._own_state["traces"][synapse.index]))
            moment, self._trains[synapse] = _advance(type(self).__name__, synapse, x, s, traces, group, NEW)
            sums.events += moment.s.numel() // len(synapse.weight) if first else 0
            up, down = sums.product
            _add_product(up, synapse, moment.s, moment.pre, group["a_plus"])
            _add_product(down, synapse, moment.post, moment.x, group["a_minus"])
            if group["x_target"]:
                _add_product(down, synapse, moment.s, torch.ones_like(moment.x), group["a_plus"] * group["x_target"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of torch; also drops what backward passes have brought, and what fires next begins a sequence."""
        super().zero_grad(set_to_none)
        if self._by_loss:
            self._trains.clear()
            self._sequences.clear()

    def _sequence(self, synapse: Synapse) -> Sums:
        """What a firing adds its pairs to: the sums of the sequence under way.

        They count as one, when a backward pass reaches any firing of the sequence, and go with its loss.
        """
        firing = self._recorder.firing
        assert firing is not None
        if not self._waits(firing):
            if synapse not in self._sums:
                self._sums[synapse] = _no_pairs(synapse)
            return self._sums[synapse]
        under_way = self._sequences.get(synapse)
        sums = None if under_way is None else under_way()
        if under_way is not None and sums is None:  # its loss was thrown away
            self._trains.pop(synapse, None)
        if sums is None or sums.gathering is not None:
            sums = _no_pairs(synapse)
            self._sequences[synapse] = weakref.ref(sums)
        self._count(synapse, sums)
        return sums


class RewardSTDP(LearningRule):
    r"""Reward-modulated STDP: pairs of spikes leave an eligibility, which a reward turns into plasticity.

    .. math::
        e(t) = e^{-\delta/\tau_e}\, e(t - \delta) + A_+\, s(t)\, p(t)^\top - A_-\, q(t)\, x(t)^\top, \qquad
        \Delta W = \langle (R - \bar R)\, e(T) \rangle, \qquad
        \bar R \leftarrow \bar R + r\,(\langle R \rangle - \bar R)

    with spikes :math:`x, s` and traces :math:`p, q` as in `STDP`, an eligibility :math:`e` of each sample and synapse
    that fades with :math:`\tau_e`, and the reward :math:`R` (dopamine), which comes at the end of the sequence, at
    :math:`T`: minus what the closure returns. :math:`\bar R` is the running mean of the reward (in the first step,
    that step's own). No error signal and no gradient; what varies from trial to trial is up to the neurons, so give
    them, or their inputs, some noise.

    With ``credit="sample"`` each sample has its own reward, so that a batch of :math:`N` samples is as many trials;
    :math:`\langle\cdot\rangle` is the mean over samples and positions. With ``credit="global"`` one reward credits
    all. Bounds act on the whole change: ``"soft"`` multiplies what strengthens by :math:`w_{max} - W` and what weakens
    by :math:`W - w_{min}`, ``"hard"`` and ``None`` as in `STDP`.

    Eligibilities of all samples would take a matrix each. Spikes and traces are kept in their place until the reward
    is known: memory grows with the length of a sequence. Every synapse follows the rule, the last too, so the network
    ends in spiking neurons, which are found as in `STDP`. Only weights learn.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate of ``descent``.
        tau_e: :math:`\tau_e`, of the eligibility, in ms; infinite: it does not fade.
        tau_plus: :math:`\tau_+`, in ms.
        tau_minus: :math:`\tau_-`, in ms.
        dt: :math:`\delta`, time between two firings of a layer, in ms.
        a_plus: :math:`A_+`.
        a_minus: :math:`A_-`.
        bounds: ``"soft"``, ``"hard"`` or ``None``.
        w_min: :math:`w_{min}`.
        w_max: :math:`w_{max}`.
        reward_rate: :math:`r` in (0, 1], how fast the expected reward follows.
        credit: ``"sample"`` or ``"global"``. A scalar loss is global by itself.
        neurons: as in `STDP`.
        exclude: what to leave alone: module types, modules, or names of modules or parameters.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: average over these ranks, each of which has its share of the batch.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers; a layer without spiking neurons
            after it.
        TypeError: bare parameters.
        RuntimeError: as `STDP`; a step without a closure; a layer whose first dimension is not the sample (with
            ``credit="sample"``); a non-finite loss, after which nothing has changed.

    Sources: E. M. Izhikevich (2007), *Solving the distal reward problem through linkage of STDP and dopamine
    signaling*; R. V. Florian (2007), *Reinforcement learning through modulation of spike-timing-dependent synaptic
    plasticity*; N. Frémaux & W. Gerstner (2016), *Neuromodulated spike-timing-dependent plasticity, and theory of
    three-factor learning rules*.
    """

    splits_batch = True
    constraints: ClassVar[dict[str, Constraint]] = {**WINDOW, "tau_e": (lambda v: v > 0, "a number > 0")}

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        tau_e: float = 500.0,  # τe
        tau_plus: float = 20.0,  # τ+
        tau_minus: float = 20.0,  # τ-
        dt: float = 1.0,  # δ
        a_plus: float = 1.0,  # A+
        a_minus: float = 1.0,  # A-
        bounds: str | None = "soft",
        w_min: float = 0.0,
        w_max: float = 1.0,
        reward_rate: float = 0.1,  # r
        credit: str = "sample",
        neurons: Neurons | None = None,
        exclude: Iterable[Any] = (),
        descent: type[torch.optim.Optimizer] = torch.optim.SGD,
        process_group: ProcessGroup = None,
        **descent_options: Any,
    ) -> None:
        name = type(self).__name__
        if credit not in ("sample", "global"):
            raise ValueError(f"{name}: credit={credit!r} must be 'sample' or 'global'")
        self.credit = credit
        self._trains: dict[Synapse, Traces] = {}
        self._moments: dict[Synapse, list[Moment]] = {}
        self._finder = _Finder(name, neurons)
        defaults = {
            "lr": lr,
            "tau_e": tau_e,
            "tau_plus": tau_plus,
            "tau_minus": tau_minus,
            "dt": dt,
            "a_plus": a_plus,
            "a_minus": a_minus,
            "bounds": bounds,
            "w_min": w_min,
            "w_max": w_max,
        }
        super().__init__(
            params,
            defaults,
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
            exclude=exclude,
        )
        if not self._trained():
            raise ValueError(no_plastic_layer(name))
        self._check_value("reward_rate", reward_rate, (lambda v: 0 < v <= 1, "a number in (0, 1]"))
        self.reward_rate = reward_rate
        self._finder.require_known(self._recorder.synapses.values())
        self._recorder.anchored = True
        self._recorder.hear = self._keep

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        name = type(self).__name__
        _check_bounds(name, {**self.defaults, **group})
        synapses = synapses_of(name, group["params"], self._exclusion)
        self._finder.find(synapses, group["params"])
        return unique([(f"{s.name}.weight", s.weight) for s in synapses]), synapses

    def _keep(self, synapse: Synapse, x: Tensor, s: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            group = self.param_groups[synapse.group]
            moment, self._trains[synapse] = _advance(
                type(self).__name__, synapse, x, s, self._trains.get(synapse), group, MICRO_BATCHES.capitalize()
            )
            kept = moment._replace(x=moment.x.clone(), s=moment.s.clone())  # a network may use their memory again
            self._moments.setdefault(synapse, []).append(kept)

    def _estimate(self, probe: Probe) -> Estimate:
        name = type(self).__name__
        self._recorder.reset()
        for p in self._trained():
            p.grad = None
        try:
            with self._recorder.visiting(lambda synapse, u: None):  # awake
                losses = probe()
            require_finite(self, "the loss", [losses])
            if missing := self._recorder.missing():
                raise RuntimeError(f"{name}: {missing}")
            if not self._moments:
                raise RuntimeError(self._none_fired())
            per_sample = self.credit == "sample" and losses.ndim > 0
            surprise, expected = unexpected(self, losses, per_sample, self.reward_rate)
            grads: dict[Tensor, Tensor] = {}
            changes = {s: self._change(s, moments, surprise) for s, moments in self._moments.items()}
            self._sum_over_ranks(list(changes.values()))
            for synapse, change in changes.items():
                weight, group = synapse.weight, self.param_groups[synapse.group]
                change /= self._ranks[1]
                grad = -_bounded(change.clamp(min=0), (-change).clamp(min=0), weight.detach(), group)
                grads[weight] = grads[weight] + grad if weight in grads else grad
            return losses, grads, {"reward": expected}
        finally:
            self._trains.clear()
            self._moments.clear()

    def _change(self, synapse: Synapse, moments: list[Moment], surprise: Tensor) -> Tensor:
        """``⟨(R - R̄) e(T)⟩`` of one synapse, before bounds."""
        group, last = self.param_groups[synapse.group], moments[-1].s
        if surprise.ndim and (last.ndim < 2 or len(last) != len(surprise)):
            raise RuntimeError(
                f"{type(self).__name__}(credit='sample'): the neurons of layer '{synapse.name}' gave spikes of shape "
                f"{tuple(last.shape)} where there are {len(surprise)} losses, one a sample, so their first dimension "
                f"is not the sample. Use credit='global'; or, {MICRO_BATCHES}"
            )
        if surprise.ndim and ambiguous(synapse, last.shape, len(surprise)):
            raise RuntimeError(
                f"{type(self).__name__}(credit='sample'): the neurons of layer '{synapse.name}' gave spikes of shape "
                f"{tuple(last.shape)}, in which more than one dimension is as long as the batch of {len(surprise)}, so "
                "that samples cannot be told from the other. Take a batch of another size, or credit='global'"
            )
        fading = math.exp(-group["dt"] / group["tau_e"])
        told = surprise.to(moments[-1].pre.dtype) / (last.numel() // len(synapse.weight))
        told = told.view(-1, *[1] * (last.ndim - 1)) if told.ndim else told
        change = last.new_zeros(synapse.weight.shape)
        for age, moment in enumerate(reversed(moments)):
            gated = told * fading**age
            _add_product(change, synapse, moment.s * gated, moment.pre, group["a_plus"])
            _add_product(change, synapse, moment.post * gated, moment.x, -group["a_minus"])
        return change


class _Finder:
    """Which module holds the neurons of each synapse."""

    def __init__(self, rule: str, named: Neurons | None) -> None:
        self.rule = rule
        self.named = dict(named or {})
        self.places: dict[nn.Module, str] = {}  # all modules given, in registration order

    def find(self, synapses: list[Synapse], params: Any) -> None:
        """Set the neurons of the synapses of a group, whose ``"params"`` are these modules."""
        for prefix, module in named_modules_of(params):
            for name, inner in module.named_modules(prefix=prefix):
                self.places.setdefault(inner, name)
        layers = {synapse.layer for synapse in synapses}
        for synapse in synapses:
            synapse.neurons = self._named(synapse) if synapse.name in self.named else self._following(synapse, layers)

    def require_known(self, synapses: Any) -> None:
        """Raise where ``neurons`` names a layer that there is not."""
        known = [synapse.name for synapse in synapses]
        for name in self.named:
            if name not in known:
                raise ValueError(f"{self.rule}: neurons={{{name!r}: ...}}: the layers are {', '.join(known)}")

    def _named(self, synapse: Synapse) -> nn.Module:
        wanted = self.named[synapse.name]
        if isinstance(wanted, nn.Module):
            return wanted
        for module, name in self.places.items():
            if name == wanted:
                return module
        raise ValueError(
            f"{self.rule}: neurons={{{synapse.name!r}: {wanted!r}}}: there is no module of this name among those "
            "given; give the module itself"
        )

    def _following(self, synapse: Synapse, layers: set[nn.Module]) -> nn.Module:
        after = False
        for module in self.places:
            if module is synapse.layer:
                after = True
            elif after and not type(module).__module__.startswith("torch.nn.") and layers.isdisjoint(module.modules()):
                return module
        raise ValueError(
            f"{self.rule}: layer '{synapse.name}' has no spiking neurons after it. Any module serves that is not of "
            "torch.nn and returns 0 or 1 for each of its outputs, such as snntorch.Leaky; if it stands elsewhere, name "
            f"it: neurons={{'{synapse.name}': ...}}"
        )


def _no_pairs(synapse: Synapse) -> Sums:
    """Of strengthening and weakening pairs."""
    dtype = torch.promote_types(synapse.weight.dtype, torch.float32)
    product = torch.zeros((2, *synapse.weight.shape), dtype=dtype, device=synapse.weight.device)
    return Sums(product, None, None, 0)


def _check_bounds(rule: str, group: dict[str, Any]) -> None:
    low, high = group["w_min"], group["w_max"]
    for name, value in (("w_min", low), ("w_max", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{rule}: {name}={value!r} must be a finite number")
    if not low < high:
        raise ValueError(f"{rule}: w_min={low!r} must be below w_max={high!r}")


def _advance(
    rule: str, synapse: Synapse, x: Tensor, s: Tensor, before: Traces | None, group: dict[str, Any], way_out: str
) -> tuple[Moment, Traces]:
    """One time step: what plasticity sees of it, and the traces after it."""
    for what, spikes in (("what enters", x), ("what follows", s)):
        if not bool(((spikes == 0) | (spikes == 1)).all()):
            low, high = spikes.min().item(), spikes.max().item()
            raise RuntimeError(
                f"{rule}: {what} layer '{synapse.name}' is not spikes, 0 or 1, but values from {low:.3g} to "
                f"{high:.3g}. Encode inputs as spikes (bioopt.nn has encodings), put no dropout, normalisation or "
                "average pooling between neurons and layer, and name the neurons after it if they are others: "
                f"neurons={{'{synapse.name}': ...}}"
            )
    dtype = torch.promote_types(synapse.weight.dtype, torch.float32)
    x, s = x.to(dtype), s.to(dtype)
    rows = rows_seen(synapse, s)
    if rows is not None:  # samples that take another way are silent here, while their traces fade
        x, s = rows.among_all(x), rows.among_all(s)
    if before is None:
        pre, post = x.clone(), torch.zeros_like(s)
    else:
        if before.pre.shape != x.shape or before.post.shape != s.shape:
            raise RuntimeError(
                f"{rule}: layer '{synapse.name}' was given spikes of shape {tuple(x.shape)} in a sequence that began "
                f"with {tuple(before.pre.shape)}. {way_out}"
            )
        pre = torch.add(x, before.pre, alpha=math.exp(-group["dt"] / group["tau_plus"]))
        post = before.post * math.exp(-group["dt"] / group["tau_minus"])
    return Moment(x, s, pre, post), Traces(pre, post + s)


def _add_product(total: Tensor, synapse: Synapse, post: Tensor, pre: Tensor, scale: float) -> None:
    """Add ``scale Σ post preᵀ``, the sum over samples and positions, to ``total``, of the weight's shape."""
    if not scale:
        return
    if type(synapse.layer) is not nn.Linear:
        with torch.enable_grad():
            u = synapse.layer.forward(pre.to(synapse.weight.dtype))  # past the hooks
        (product,) = torch.autograd.grad(u, synapse.weight, post.to(u.dtype))
        total.add_(product, alpha=scale)
        return
    post, pre = post.reshape(-1, post.shape[-1]), pre.reshape(-1, pre.shape[-1])
    event, neuron = post.nonzero(as_tuple=True)
    if len(event) * 16 > post.numel():
        total.addmm_(post.T, pre, alpha=scale)
    else:  # few have fired
        total.index_add_(0, neuron, pre[event].mul_(post[event, neuron].unsqueeze(1)), alpha=scale)


def _bounded(up: Tensor, down: Tensor, weight: Tensor, group: dict[str, Any], scaling: bool = False) -> Tensor:
    """What strengthens less what weakens (both >= 0), as far as the bounds let them, in the weight's type."""
    low, high, bounds, lr = group["w_min"], group["w_max"], group["bounds"], group["lr"]
    dtype, weight = weight.dtype, weight.to(up.dtype)
    change = up - down
    if bounds == "soft":
        rate = up + down
        change = high * up + low * down - weight * rate
        change *= torch.where(rate * lr > 0, -torch.expm1(-lr * rate) / (lr * rate), 1.0)
    if scaling:
        grown, total = change.flatten(1).sum(1), weight.flatten(1).sum(1)
        share = torch.where((total > 0) & (total + lr * grown > 0), grown / total, 0.0)
        share = share.view(-1, *[1] * (weight.ndim - 1))
        change = (change - weight * share) / (1 + lr * share)
    if bounds == "hard" and lr > 0:
        change = change.clamp((low - weight) / lr, (high - weight) / lr)
    return change.to(dtype)
