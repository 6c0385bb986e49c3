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
    "If another sequence begins before the step, or after one whose traces are carried on (carry=True), call "
    "optimizer.new_sequence() first"
)


@final
class STDP(LocalRule):
    r"""Spike timing: a synapse strengthens if its input spikes before its neuron, and weakens if after.

    .. math::
        p(t) = e^{-\delta/\tau_+}\, p(t - \delta) + x(t), \qquad
        q(t) = e^{-\delta/\tau_-}\, (q(t - \delta) + s(t - \delta))

    .. math::
        P_+ = \langle \sum_t s(t)\, p(t)^\top \rangle, \qquad
        P_- = \langle \sum_t q(t)\, x(t)^\top \rangle, \qquad
        P_0 = \langle \sum_t s(t)\, \mathbf 1^\top \rangle

    .. math::
        \Delta W = f_+ \odot A_+ P_+ - f_- \odot (A_- P_- + A_+ p_0 P_0)

    with presynaptic spikes :math:`x(t)` (the layer's input at time step :math:`t`), postsynaptic spikes :math:`s(t)`
    (the output of the neurons after the layer) and traces of both, :math:`p` and :math:`q`; :math:`\delta` and the time
    constants are in milliseconds. For one pair of spikes with delay :math:`\Delta t = t_{post} - t_{pre}` this is the
    classical window: :math:`A_+ e^{-\Delta t/\tau_+}` for :math:`\Delta t \ge 0` and :math:`-A_- e^{\Delta t/\tau_-}`
    for :math:`\Delta t < 0`. Spikes of the same step count as cause and effect (:math:`\Delta t = 0`), since the
    presynaptic one has just driven the neuron. Sums run over the steps of a sequence; :math:`\langle\cdot\rangle` is
    the mean over samples and positions. With :math:`p_0 > 0` (``x_target``) each postsynaptic spike also weakens all
    synapses of its neuron, as in Diehl & Cook: those with silent inputs fade.

    ``bounds="soft"``: :math:`f_+ = w_{max} - W,\ f_- = W - w_{min}`, so that weights slow down towards a bound, and
    return if they are beyond it. Within a step :math:`f_\pm` follow the changing weight: with :math:`\rho` the sum of
    the factors of :math:`f_\pm`, :math:`\Delta W` is the above times :math:`(1 - e^{-\eta\rho}) / \eta\rho`, so that
    weights stay within the bounds for any learning rate. ``"hard"``: :math:`f_\pm = 1`, and the step is clipped so that
    :math:`W + \eta \Delta W` stays in :math:`[w_{min}, w_{max}]`. Both are exact with plain SGD, the default
    ``descent``. ``None``: :math:`f_\pm = 1`, no bounds.

    A *sequence* is all firings since the last step: of a network that unrolls time in its ``forward``, or of a closure
    that calls a network once per time step. Traces are zero at its start, and products are formed at once, so that
    memory does not grow with its length. For several sequences before one step, call `new_sequence` between them; with
    ``carry=True`` traces continue from step to step, until `new_sequence`.

    Only weights learn. The synapses are ordinary layers, cut as in `LocalRule`. The neurons are any module that
    returns 0 or 1 for each output of the layer, alone or first in a tuple (like those of snntorch): by default the next
    module after the layer, in registration order, that is not of `torch.nn` and has no synapse inside.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate, per mean sequence.
        tau_plus: :math:`\tau_+`, of the presynaptic trace, in ms.
        tau_minus: :math:`\tau_-`, of the postsynaptic trace, in ms.
        dt: :math:`\delta`, time between two firings of a layer, in ms.
        a_plus: :math:`A_+`, the largest increase for a pair of spikes in causal order.
        a_minus: :math:`A_-`, the largest decrease for a pair in the other order.
        x_target: :math:`p_0`, the presynaptic trace at which a postsynaptic spike has no effect (without bounds).
        bounds: ``"soft"``, ``"hard"`` or ``None``.
        w_min: :math:`w_{min}`.
        w_max: :math:`w_{max}`.
        scaling: synaptic scaling: after a step (of plain SGD) the weights of a neuron are rescaled to the sum that they
            had, if it is positive, so that synapses compete. Hard bounds apply after it; it may violate soft ones.
        carry: whether traces continue from one step to the next, as state that is saved. All batches then have the
            same size.
        neurons: for layers with other neurons than the default: ``{"fc": "lif"}``, by name or as a module. Several
            layers may drive the same neurons.
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `LocalRule`; a readout needs no spiking neurons.
        options: further options of the readout, ``descent``, its options and ``process_group``, as in `LocalRule`.
            Each rank carries its own traces.

    Raises:
        ValueError: a hyperparameter out of range; a layer without spiking neurons after it; as `LocalRule`.
        RuntimeError: activity that is not 0 or 1; neurons that do not run; a batch of another size within a sequence or
            with carried traces.

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
        lr: float = 0.5,  # η
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
        self._traces: dict[Synapse, Traces] = {}
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
        """Let the next firing begin a sequence, with traces of zero."""
        self._traces.clear()
        self._own_state = {key: value for key, value in self._own_state.items() if key != "traces"}

    def trained(self, synapses: list[Synapse], group: dict[str, Any]) -> list[tuple[Synapse, list[tuple[str, Tensor]]]]:
        """The weights of all synapses, which must have spiking neurons after them."""
        check_bounds(type(self).__name__, {**self.defaults, **group})
        self._finder.find(synapses, group["params"])
        return super().trained(synapses, group)

    def reset(self) -> None:
        """Traces end with the step."""
        self._traces.clear()
        self._sequences.clear()

    def measure(self, firing: Firing, u: Tensor) -> Sums:
        """The pairs of this time step, added to those of the present sequence.

        A sequence counts as a whole when a backward pass reaches any of its firings, and is dropped with its loss.
        """
        synapse, group = firing.synapse, self.param_groups[firing.synapse.group]
        with torch.autocast(u.device.type, enabled=False):
            sums = self._sequence(synapse)
            traces = self._traces.get(synapse)
            first = traces is None
            if first and synapse.index in self._own_state.get("traces", {}):
                traces = Traces(*(t.to(u.device) for t in self._own_state["traces"][synapse.index]))
            now, self._traces[synapse] = advance(type(self).__name__, firing, u, traces, group, NEW)
            sums.counts["events"] += now.s.numel() // len(synapse.weight) if first else 0
            up, down = sums.values["pairs"]
            add_product(up, synapse, now.s, now.pre, group["a_plus"])
            add_product(down, synapse, now.post, now.x, group["a_minus"])
            if group["x_target"]:
                add_product(down, synapse, now.s, torch.ones_like(now.x), group["a_plus"] * group["x_target"])
        return sums

    def changes(
        self, sums: Sums, synapse: Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """Strengthening less weakening, within the bounds; carried traces are state."""
        if self.carry and synapse in self._traces:
            state["traces"] = {**state.get("traces", {}), synapse.index: tuple(self._traces[synapse])}
        up, down = sums.values["pairs"].div_(sums.events)
        return {synapse.weight: bounded(up, down, synapse.weight.detach(), group, group["scaling"])}

    def _sequence(self, synapse: Synapse) -> Sums:
        """The sums of the present sequence, or new ones."""
        if not self.waits(synapse):
            return self.counted_at_once(synapse) or _no_pairs(synapse)
        present = self._sequences.get(synapse)
        sums = None if present is None else present()
        if present is not None and sums is None:  # its loss was thrown away
            self._traces.pop(synapse, None)
        if sums is None or sums.gathering is not None:
            sums = _no_pairs(synapse)
            self._sequences[synapse] = weakref.ref(sums)
        return sums


def _no_pairs(synapse: Synapse) -> Sums:
    """Sums of strengthening and of weakening pairs, both zero."""
    dtype = torch.promote_types(synapse.weight.dtype, torch.float32)
    pairs = torch.zeros((2, *synapse.weight.shape), dtype=dtype, device=synapse.weight.device)
    return Sums({"pairs": pairs}, {"events": 0})
