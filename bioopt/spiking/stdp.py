"""Spike-timing-dependent plasticity: each pair of spikes strengthens or weakens a synapse, depending on its order."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from ..core.constraints import NON_NEGATIVE, Constraint
from ..core.local_product import LocalRule
from ..core.params import Params
from ..core.readout import ReadoutOptions
from ..core.recorder import Firing
from ..core.sums import Sums
from ..core.synapse import Synapse
from .neurons import NeuronFinder, Neurons
from .traces import WINDOW, Traces, add_product, advance, bounded, check_bounds

NEW = (
    "Where another sequence begins before the step, or after one whose traces are carried on (carry=True), call "
    "optimizer.new_sequence() first"
)


@final
class STDP(LocalRule):
    r"""Spike timing: a synapse strengthens if its input spikes before its neuron, and weakens if after.

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

    Only weights learn. The synapses are ordinary layers, cut as in `LocalRule`. The neurons are any module that
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
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `LocalRule`; a readout needs no spiking neurons.
        options: further options of the readout, ``descent``, its options and ``process_group``, as in `LocalRule`,
            whose errors are raised here as well. Carried traces are each rank's own.

    Raises:
        ValueError: a hyperparameter out of range; a layer without spiking neurons after it.
        RuntimeError: activity that is not 0 or 1; neurons that do not run; a batch of another size within a
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
        **options: Unpack[ReadoutOptions],
    ) -> None:
        self.carry = carry
        self._trains: dict[Synapse, Traces] = {}
        self._sequences: dict[Synapse, weakref.ref[Sums]] = {}
        self._finder = NeuronFinder(type(self).__name__, neurons)
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

    def new_sequence(self) -> None:
        """Let the next firing be the first of a sequence, whose traces are zero."""
        self._trains.clear()
        self._own_state = {key: value for key, value in self._own_state.items() if key != "traces"}

    def trained(self, synapses: list[Synapse], group: dict[str, Any]) -> list[tuple[Synapse, list[tuple[str, Tensor]]]]:
        """The weights of all, each of which must have spiking neurons after it."""
        check_bounds(type(self).__name__, {**self.defaults, **group})
        self._finder.find(synapses, group["params"])
        return super().trained(synapses, group)

    def reset(self) -> None:
        """Traces end with the step."""
        self._trains.clear()
        self._sequences.clear()

    def measure(self, firing: Firing, u: Tensor) -> Sums:
        """The pairs of this time step, added to those of the sequence under way.

        The sums of a sequence count as one, when a backward pass reaches any firing of it, and go with its loss.
        """
        synapse, group = firing.synapse, self.param_groups[firing.synapse.group]
        with torch.autocast(u.device.type, enabled=False):
            sums = self._sequence(synapse)
            traces = self._trains.get(synapse)
            first = traces is None
            if traces is None and synapse.index in self._own_state.get("traces", {}):
                traces = Traces(*(t.to(u.device) for t in self._own_state["traces"][synapse.index]))
            moment, self._trains[synapse] = advance(type(self).__name__, firing, u, traces, group, NEW)
            sums.counts["events"] += moment.s.numel() // len(synapse.weight) if first else 0
            up, down = sums.values["pairs"]
            add_product(up, synapse, moment.s, moment.pre, group["a_plus"])
            add_product(down, synapse, moment.post, moment.x, group["a_minus"])
            if group["x_target"]:
                add_product(down, synapse, moment.s, torch.ones_like(moment.x), group["a_plus"] * group["x_target"])
        return sums

    def changes(
        self, sums: Sums, synapse: Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """Strengthening and weakening, each as far as the bounds let it; traces that are carried on are state."""
        if self.carry and synapse in self._trains:
            state["traces"] = {**state.get("traces", {}), synapse.index: tuple(self._trains[synapse])}
        up, down = sums.values["pairs"].div_(sums.events)
        return {synapse.weight: bounded(up, down, synapse.weight.detach(), group, group["scaling"])}

    def _sequence(self, synapse: Synapse) -> Sums:
        """The sums of the sequence under way, or new ones."""
        if not self.waits(synapse):
            return self.counted_at_once(synapse) or _no_pairs(synapse)
        under_way = self._sequences.get(synapse)
        sums = None if under_way is None else under_way()
        if under_way is not None and sums is None:  # its loss was thrown away
            self._trains.pop(synapse, None)
        if sums is None or sums.gathering is not None:
            sums = _no_pairs(synapse)
            self._sequences[synapse] = weakref.ref(sums)
        return sums


def _no_pairs(synapse: Synapse) -> Sums:
    """Sums of strengthening and of weakening pairs, both zero."""
    dtype = torch.promote_types(synapse.weight.dtype, torch.float32)
    pairs = torch.zeros((2, *synapse.weight.shape), dtype=dtype, device=synapse.weight.device)
    return Sums({"pairs": pairs}, {"events": 0})
