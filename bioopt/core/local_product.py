"""`LocalRule` and `LocalProductRule`: updates from pre- and postsynaptic activity, in one ordinary forward pass."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from ._torch_private import backward_pass
from .acts import cut
from .constraints import NON_NEGATIVE, Constraint
from .errors import require_finite, warn
from .homeostasis import (
    RATE,
    WARM_UP,
    Level,
    Regulator,
    along_neurons,
    inhibit_,
    norms,
    of_unit_vectors,
    rotate_,
    tensors_of,
)
from .losses import loss_of
from .one_pass import OnePass
from .params import Params, no_plastic_layer, surveyed, synapses_of, unique
from .products import Events, SparseSignal, in_pools, weight_shaped
from .reach import Pending
from .readout import ReadoutOptions, Survey, as_grad
from .recorder import Firing
from .rule import optional
from .sums import Gathering, Sums, add_up, product_sums
from .synapse import Synapse, Unwatchable, refusal
from .whitening import whitened

__all__ = ["LocalProductRule", "LocalRule", "SynapticRule"]

UNPROVEN = 64  # firings of a layer that are kept until a backward pass first reaches the layer

#: ranges of the options of homeostasis
REGULATED: dict[str, Constraint] = {
    "whitening": NON_NEGATIVE,
    "inhibition": NON_NEGATIVE,
    "tolerance": (lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "settle": NON_NEGATIVE,
}

#: methods of rules in earlier versions
FORMER_METHODS = ("statistic", "advance", "others", "follow", "forget", "kept")


class LocalOptions(ReadoutOptions, total=False):
    """Options of local rules; `LocalRule` describes them."""

    homeostasis: bool
    whitening: float
    inhibition: float
    tolerance: float
    settle: float


class LocalRule(OnePass):
    r"""A rule whose synapses are all cut and learn from sums over events.

    One position of one sample is one postsynaptic *event*. As a synapse fires, `measure` sums its pre- and
    postsynaptic activity over events at once, so that no activity outlives its layer; at the step, `changes` turns the
    sums of all firings into updates.

    Where the readout learns from the loss, a firing counts once, when a backward pass reaches it, so that a loss that
    is thrown away teaches nothing. ``zero_grad()`` drops the firings that backward passes have reached since the last
    step, so that ``loss.backward(); optimizer.zero_grad()`` skips a batch; `discard` drops all. Firings under
    `torch.no_grad`, and all firings if no readout learns from a loss, count at once.

    Rules whose class attribute `regulated` has defaults for it learn under **homeostasis**, as the neurons of a brain
    do: each neuron keeps its activity at deviation 1/2 and mean :math:`a` through its own weights and bias, and the
    rule only *turns* its weight vector. With the running mean :math:`m_k` and deviation :math:`s_k` of its activity,

    .. math::
        z_k = \frac{u_k - m_k}{s_k}, \qquad w_k \leftarrow (2 s_k)^{-r}\, w_k, \qquad b_k \leftarrow b_k + a - m_k

    after each step, at a rate :math:`r` that falls from 1 in the first step to 0.05. :math:`a` is 0 in convolutions
    and 1/2 in Linear layers, where ReLU at a mean of 0 would lose half of what a layer receives. In the first step the
    layers above receive :math:`a + z / 2` in place of :math:`u`, as they will after it, and a layer learns no more than
    this. From the second step on

    .. math::
        P = \langle s\,\tilde x^\top \rangle, \qquad
        \tilde x = \Bigl(I + \frac{\kappa}{\bar c}\,C\Bigr)^{-1} (x - \langle x \rangle), \qquad
        d_k = \mathrm{drive}(P, V)_k - \beta\,\bar p \sum_{j \ne k} \mathrm{soft}_\tau(c_{kj})\,
        \frac{a_k}{a_j}\, v_j, \qquad
        \Delta w_k = \frac{\lVert w_k \rVert}{1 + t / t_s}\,
        \frac{d_k - (d_k \cdot v_k)\,v_k}{\max_j (\lVert p_j \rVert, \lVert d_j^\perp \rVert)}

    with the rule's signal :math:`s` of standardised activity :math:`z`; presynaptic activity :math:`\tilde x`, centred,
    and whitened with strength :math:`\kappa` by the covariance :math:`C` of a neuron's inputs and their mean variance
    :math:`\bar c`; the unit vectors :math:`v_k = w_k / \lVert w_k \rVert`, the deviation :math:`a_k` of the activity of
    a unit vector, the mean length :math:`\bar p` of the rows :math:`p_k` of :math:`P`, the part :math:`d_j^\perp` of
    :math:`d_j` that turns a vector, the correlation :math:`c_{kj}` of two neurons of a pool and
    :math:`\mathrm{soft}_\tau(c) = \mathrm{sign}(c) \max(|c| - \tau, 0)`. Neurons whose activity is correlated by more
    than the tolerance :math:`\tau` inhibit each other with strength :math:`\beta`, so that they do not all learn the
    same. No neuron turns by more than ``lr`` radians in a step, whatever the scale of its input, so that one ``lr``
    suits every layer and network. The angle falls with :math:`t`, which counts the steps since the rule began, a step
    of :math:`n` events :math:`\sqrt[4]{n / 64}` times: the mean over more events is more certain, so that convolutions,
    which see many events in a sample, settle in a few steps, and Linear layers in some tens.

    Inputs are whitened in convolutions, and in Linear layers with several events a sample, of up to 2,048 inputs each;
    :math:`C` is a running mean over some events, and its inverse is taken in steps 1, 2, 4, 8 and so on. Elsewhere
    :math:`\tilde x = x - \langle x \rangle`: where a sample is one event, a batch tells too little of a covariance.

    With ``homeostasis=False`` a rule has its published formula, `changes`, with biases frozen and activity as it is. It
    needs an ``lr`` that suits the network, and usually each layer.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: under homeostasis, the largest angle by which a neuron turns in a step; without it, the learning rate of the
            formula, per mean event.
        own: further hyperparameters of the rule, each of which may differ between groups (for subclasses).
        readout: ``"delta"``, ``"teacher"`` or ``None``, as in `LearningRule`.
        options: ``readout_lr``, ``readout_layer``, ``readout_options``, ``exclude``, ``descent`` and its options,
            ``process_group`` (average the sums over these ranks, each with its share of the batch), as in
            `LearningRule`. Of rules with homeostasis, also ``homeostasis``; ``whitening`` :math:`\kappa` >= 0
            (0: none); ``inhibition`` :math:`\beta` >= 0; ``tolerance`` :math:`\tau` in [0, 1); and ``settle``
            :math:`t_s`, the number of steps of 64 events after which the angle has halved (0: it stays). Their defaults
            are those of `regulated`.

    Attributes:
        target: for ``readout="teacher"``: class labels, one per sample (the target is 1 for the class and
            ``-1 / (classes - 1)`` for the others), or activity of the readout's shape.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers besides the readout, or with unknown
            ones.
        TypeError: bare parameters; a model wrapped in DistributedDataParallel.

    Sources: homeostasis of weights: G. G. Turrigiano & S. B. Nelson (2004), *Homeostatic plasticity in the developing
    nervous system*, Nature Reviews Neuroscience 5; of biases: J. Triesch (2005), *A gradient rule for the plasticity
    of a neuron's intrinsic excitability*, ICANN; whitening: J. J. Atick & A. N. Redlich (1992), *What does the retina
    know about natural scenes?*, Neural Computation 4; inhibition: P. Földiák (1990), *Forming sparse representations by
    local anti-Hebbian learning*, Biol. Cybernetics 64.
    """

    #: defaults of ``homeostasis``, ``whitening``, ``inhibition``, ``tolerance`` and ``settle``; empty: no homeostasis
    regulated: ClassVar[dict[str, Any]] = {}
    #: the option that is the rate of homeostasis, where ``homeostasis`` does not turn it on
    homeostatic_rate: ClassVar[str] = ""

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        own: dict[str, Any] | None = None,
        readout: str | None = "delta",
        **options: Unpack[LocalOptions],
    ) -> None:
        given: dict[str, Any] = dict(options)
        regulated = {name: given.pop(name, default) for name, default in self.regulated.items()}
        if regulated:
            self._require_bool("homeostasis", regulated["homeostasis"])
        self._sums: dict[Synapse, Sums] = {}  # of firings that counted at once
        self._confirmed: dict[Synapse, Sums] = {}  # of firings that a backward pass has reached
        self._waiting: list[weakref.ref[Pending]] = []  # firings since the last step that no backward pass has reached
        self._unproven: dict[Synapse, deque[Pending]] = {}  # the same, of synapses that none has ever reached
        self._latest: dict[Synapse, Pending] = {}  # the last firing of each synapse
        self._awaiting: dict[Synapse, tuple[Pending, Tensor | None]] = {}  # firings whose neurons have not run yet
        self._gathering = Gathering()
        self._backward = -1  # the last backward pass that has reached a firing
        self._by_readout = False  # whether a backward pass since the last step went through a readout
        self._proven: set[Synapse] = set()  # a backward pass has reached them
        self._unreachable: set[Synapse] = set()  # the loss did not reach them
        self._warned_of: set[Synapse] = set()
        self._warned_of_grad = False
        self._warned_of_drop = False
        self._regulator = Regulator(self._levels, self._sum_over_ranks)
        super().__init__(params, {"lr": lr, **(own or {}), **regulated}, readout=readout, **given)
        self._recorder.reach.linked = self._readout.by_loss
        self._recorder.reach.arrive = self._confirm
        self._recorder.act(self._readout.enter, self._leave)
        self._recorder.on_neurons = self._on_neurons

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.regulated:
            known = {**REGULATED, **cls.constraints}
            cls.constraints = {name: known[name] for name in known if name not in REGULATED or name in cls.regulated}
        if found := [name for name in FORMER_METHODS if name in vars(cls)]:
            raise TypeError(
                f"{cls.__name__} defines {', '.join(found)}, which bioopt no longer calls: subclass bioopt.LocalRule "
                "and define measure(firing, u) for sums over events, changes(sums, synapse, group, state) for updates "
                "and running state (as in BCM), and reset() for what firings pass on to later ones"
            )

    # -- what a rule implements ---------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, firing: Firing, u: Tensor) -> Sums:
        """The sums over events of one firing.

        Args:
            firing: the synapse and its presynaptic activity.
            u: postsynaptic activity, with the graph of the layer alone; for a synapse with ``neurons``, their spikes.
        """

    @abstractmethod
    def changes(
        self, sums: Sums, synapse: Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """The update of each parameter of a synapse.

        Args:
            sums: over all firings that count, on all ranks; may be changed in place.
            synapse: the layer, with the parameters that it fired with.
            group: its param group.
            state: the rule's own state after the step. Replace its values; never change them in place.
        """

    @optional
    def drive(self, product: Tensor, direction: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """Under homeostasis: the change of the neurons' unit weight vectors, of which only the rotation is taken.

        Args:
            product: ``⟨s x̃ᵀ⟩``, pools × neurons × inputs, with the signal of standardised activity; may be
                changed in place.
            direction: the unit vectors, of the same shape.
            synapse: the layer.
            group: its param group.

        Returns:
            of the same shape; by default the product itself.
        """
        return product

    @optional
    def drive_of_few(self, product: Tensor, direction: Tensor, events: Events, group: dict[str, Any]) -> Tensor:
        """`drive` from few events, where `measure` has kept them.

        Args:
            product: as in `drive`.
            direction: as in `drive`.
            events: with centred presynaptic activity, and the postsynaptic activity of the unit vectors, ``V (x - μ)``.
            group: the param group.
        """
        return self.drive(product, direction, events.synapse, group)

    @optional
    def most_events(self, synapse: Synapse, group: dict[str, Any]) -> int:
        """The number of events that take the rule no more work than their product: up to so many, they are kept."""
        return 0

    @optional
    def least_neurons(self, group: dict[str, Any]) -> tuple[int, str]:
        """The least number of neurons in a pool, and the option or reason that requires it."""
        return 1, ""

    @optional
    def trained(self, synapses: list[Synapse], group: dict[str, Any]) -> list[tuple[Synapse, list[tuple[str, Tensor]]]]:
        """The synapses of a group that learn, with their learning parameters.

        By default the weights of all, and under homeostasis also the biases.
        """
        if self._homeostatic_rate({**self.defaults, **group}):
            return [(s, [*s.named_parameters()]) for s in synapses]
        return [(s, [(f"{s.name}.weight", s.weight)]) for s in synapses]

    @optional
    def reset(self) -> None:
        """Drop what firings pass on to later ones: all firings so far were learned or dropped."""

    # -- which layers -------------------------------------------------------------------------------------------

    def _require_trainable(self, groups: list[dict[str, Any]], surveys: list[Survey], defaults: dict[str, Any]) -> None:
        """Raise for all layers that the rule cannot train."""
        name = type(self).__name__
        surveys = surveys or [surveyed(name, group["params"], self._exclusion) for group in groups]
        unwatchable = [other for _, others in surveys for other in others]
        if not any(found for found, _ in surveys):
            raise ValueError(refusal(name, unwatchable) if unwatchable else no_plastic_layer(name))
        wrong = {other.layer: other for other in unwatchable}
        for group, (found, _) in zip(groups, surveys, strict=True):
            hidden = [s for s in found if s.layer not in self._readout.layers]
            lacking = {s: why for s in hidden if (why := self._lacking(s, {**defaults, **group}))}
            learns = len(lacking) < len(hidden)
            for s, why in lacking.items():
                if not (learns and self._only_regulated(s, {**defaults, **group})):
                    wrong.setdefault(s.layer, Unwatchable(s.name, s.layer, why))
        if wrong:
            raise ValueError(refusal(name, list(wrong.values())))

    def _lacking(self, synapse: Synapse, group: dict[str, Any]) -> str:
        """Why a layer has too few neurons in a pool to learn, or an empty string."""
        least, reason = self.least_neurons(group)
        size = len(synapse.weight) // synapse.pools
        of = f"it has {size}" + " in each group" * (synapse.pools > 1)
        return f"{reason} takes at least {least} neurons, but {of}" if size < least else ""

    def _only_regulated(self, synapse: Synapse, group: dict[str, Any]) -> bool:
        """Whether a layer keeps its level of activity and learns no more: one of many groups with too few neurons."""
        return bool(synapse.pools > 1 and self._lacking(synapse, group) and self._homeostatic_rate(group))

    def _otherwise(self) -> dict[Tensor, str]:
        alone = (s for s in self._recorder.synapses.values() if self._only_regulated(s, self.param_groups[s.group]))
        return {p: "homeostasis" for s in alone for p in s.parameters()}

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        synapses = synapses_of(type(self).__name__, group["params"], self._exclusion)
        self._require_trainable([group], [(synapses, [])], self.defaults)
        hidden, full = [s for s in synapses if s.layer not in self._readout.layers], {**self.defaults, **group}
        if alone := [s for s in hidden if self._only_regulated(s, full)]:
            names = ", ".join(f"'{s.name}'" for s in alone)
            layers, verb = ("layer", "learns") if len(alone) == 1 else ("layers", "learn")
            warn(
                f"{type(self).__name__}: {layers} {names} {verb} by homeostasis alone, because "
                f"{self._lacking(alone[0], full)}"
            )
        chosen = self.trained(hidden, group)
        return unique([named for _, own in chosen for named in own]), [s for s, _ in chosen]

    # -- one pass -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start an evaluation that alone will count."""
        self._clear()
        super().begin()

    def _leave(self, firing: Firing, u: Tensor) -> Tensor:
        synapse, reach = firing.synapse, self._recorder.reach
        if synapse.layer in self._readout.layers:
            return self._readout.leave(firing, u, self.target)
        if firing.replay:
            return cut(firing, u, reach)
        pending = reach.pending(synapse)
        token = reach.token(firing.x, pending)
        handed_on = u
        if synapse.neurons is None:
            with torch.no_grad():
                sums, handed_on = self._measured(firing, u)
            self._count(pending, token, sums)
        else:
            self._awaiting[synapse] = pending, token
        return reach.cut(handed_on, firing.x, pending, token)

    def _measured(self, firing: Firing, u: Tensor) -> tuple[Sums, Tensor]:
        """The sums of a firing, and the activity that the network receives."""
        synapse, regulator = firing.synapse, self._regulator
        if not self._homeostatic_rate(self.param_groups[synapse.group]):
            return self.measure(firing, u), u
        firing = replace(firing, standardised=regulator.standardised(firing, u))
        group = self.param_groups[synapse.group]
        acts = bool(self.regulated) and regulator.acts(synapse) and not self._only_regulated(synapse, group)
        sums = self.measure(firing, u) if acts else Sums({}, {"events": u.numel() // len(synapse.weight)})
        sums.values |= regulator.moments(firing, firing.activity(u), acts, group)
        return sums, regulator.handed_on(firing, u)

    def _on_neurons(self, firing: Firing, spikes: Tensor) -> Tensor:
        pending, token = self._awaiting[firing.synapse]
        with torch.no_grad():
            sums = self.measure(firing, spikes.detach())
        del self._awaiting[firing.synapse]
        self._count(pending, token, sums)
        # Spikes may lack a graph, so that what depends on them is linked to the firing here.
        return spikes if token is None else self._recorder.reach.link(spikes, pending, token)

    def counted_at_once(self, synapse: Synapse) -> Sums | None:
        """The sums of a synapse's firings since the last step that counted at once."""
        return self._sums.get(synapse)

    def waits(self, synapse: Synapse) -> bool:
        """Whether the present firing of a synapse with neurons counts only when a backward pass reaches it."""
        return self._waits(synapse, self._awaiting[synapse][1])

    def _waits(self, synapse: Synapse, token: Tensor | None) -> bool:
        return token is not None and bool(self._readout.active()) and synapse not in self._unreachable

    def _count(self, pending: Pending, token: Tensor | None, sums: Sums) -> None:
        """Count the sums of a firing, now or when a backward pass reaches it."""
        synapse = pending.synapse
        if not self._waits(synapse, token):
            if self._sums.get(synapse) is not sums:
                self._merge(self._sums, synapse, sums)
            return
        pending.contribution = sums
        if len(self._waiting) % 256 == 255:
            self._waiting = [waiting for waiting in self._waiting if waiting() is not None]
        self._waiting.append(weakref.ref(pending))
        if synapse.neurons is None:
            self._latest[synapse] = pending
        if synapse not in self._proven:
            self._unproven.setdefault(synapse, deque(maxlen=UNPROVEN)).append(pending)

    def _confirm(self, pending: Pending) -> None:
        """Count a firing that a backward pass has reached."""
        backward = backward_pass()
        if backward > self._backward:  # a new pass; model.zero_grad() may have dropped earlier ones
            self._backward = backward
            if self._confirmed and self._by_readout and all(p.grad is None for p in self._readout.parameters()):
                self._drop()
                if not self._warned_of_drop:
                    self._warned_of_drop = True
                    warn(
                        f"{type(self).__name__}: the readout's .grad was set to None after a backward pass, so that "
                        "the other layers' share of that pass is dropped, as by zero_grad(). To accumulate gradients "
                        "by hand, call estimate() for each batch"
                    )
        if pending.synapse.is_readout:
            self._by_readout = True
            self._readout.confirm(pending)
            return
        self._proven.add(pending.synapse)
        self._unreachable.discard(pending.synapse)
        self._unproven.pop(pending.synapse, None)
        sums: Any = pending.contribution
        if sums is not None and not sums.counted:
            self._merge(self._confirmed, pending.synapse, sums)

    def _merge(self, total: dict[Synapse, Sums], synapse: Synapse, sums: Sums) -> None:
        """Add sums to those of a synapse; once dropped, they may count again in another backward pass."""
        sums.gathering = self._gathering
        self._gathering.parts.append(weakref.ref(sums))
        total[synapse] = total[synapse].plus(sums) if synapse in total else sums

    def _drop(self) -> None:
        """Drop the firings that backward passes have reached; those whose graph still exists wait again."""
        self._confirmed.clear()
        self._gathering.dropped, self._gathering = not self._gathering.learned, Gathering()
        self._by_readout = False
        self._readout.drop()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; also drops the firings that backward passes have reached since the last step."""
        super().zero_grad(set_to_none)
        self._drop()
        if self._readout.by_loss:
            self.reset()

    def discard(self) -> None:
        """Drop all firings since the last step, whether or not a backward pass has reached them."""
        super().discard()
        self._clear()

    def _clear(self) -> None:
        self._sums.clear()
        self._unproven.clear()
        self._waiting.clear()
        self._latest.clear()
        self._awaiting.clear()
        self._regulator.clear()
        self._readout.clear()
        self._drop()
        self.reset()

    def _require_shapes(self, changes: Mapping[Tensor, Any], synapse: Synapse) -> None:
        """Raise where a rule's update does not fit the parameter: it may be one of the user's own."""
        for p, change in changes.items():
            if not isinstance(change, Tensor) or change.shape != p.shape:
                found = f"a tensor of shape {tuple(change.shape)}" if isinstance(change, Tensor) else repr(change)
                raise TypeError(
                    f"{type(self).__name__}: its update for layer '{synapse.name}' is {found}, but it must have the "
                    f"shape of the parameter, {tuple(p.shape)}"
                )

    @torch.no_grad()
    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """As `OnePass.collect`, from all firings since the last step that count."""
        try:
            self._settle()
            gathered = sorted(self._sums.items(), key=lambda item: item[0].index)
            self._require_same_on_ranks([synapse.name for synapse, _ in gathered] + self._readout.learning())
            device = self._trained()[0].device
            loss = torch.zeros((), device=device) if losses is None else loss_of(losses)
            # In full precision, because counts are large; on the device only for other ranks.
            where = None if self.process_group is None else device
            numbers = [count for _, sums in gathered for count in sums.counts.values()]
            counts = torch.tensor(numbers, dtype=torch.float32, device=where)
            values = [value for _, sums in gathered for value in sums.values.values()]
            self._sum_over_ranks([loss, counts, *values])
            if losses is not None:
                require_finite(self, "the loss", [loss])
            state = self._next_state()
            self._samples = 1 if losses is None else losses.numel()
            grads = self._readout.collect(self._sum_over_ranks, self._ranks[1], self._samples, state)
            totals = iter(counts.tolist())
            for synapse, sums in gathered:
                sums.counts = {name: next(totals) for name in sums.counts}
                if not sums.events:  # it ran, but on no sample
                    continue
                with torch.autocast(device.type, enabled=False):
                    changes = self._changes(sums, synapse, state)
                if self._homeostatic_rate(self.param_groups[synapse.group]):
                    # Optimizers create their state at the first gradient, and checkpoints expect it of all parameters.
                    changes = {p: torch.zeros_like(p) for p in synapse.parameters() if p not in changes} | changes
                self._require_shapes(changes, synapse)
                add_up(grads, ((p, as_grad(change, p)) for p, change in changes.items()))
            self._gathering.end()
            require_finite(self, "the activity of a layer", tensors_of(state.get("homeostasis", {}).values()))
            return grads, state
        finally:
            self._clear()
            self.target = None  # must not teach the next batch

    def _changes(self, sums: Sums, synapse: Synapse, state: dict[str, Any]) -> dict[Tensor, Tensor]:
        """`changes`, or under homeostasis a rotation by `drive`, with the new level of activity as state."""
        group = self.param_groups[synapse.group]
        rate = self._homeostatic_rate(group)
        if not rate or "z" not in sums.values:
            return self.changes(sums, synapse, group, state)
        level, _, deviation, still = self._regulator.followed(sums, synapse, rate, group.get("whitening", 0.0))
        state["homeostasis"] = {**state.get("homeostasis", {}), synapse.index: level}
        few = None if "whitening" in level else sums.few
        sums.form_product()
        if "product" not in sums.values:
            return {}
        product, signal = means(sums)
        assert signal is not None
        weight, length = synapse.weight.detach(), norms(synapse.weight)
        direction = in_pools(weight / along_neurons(length.clamp(min=1e-30).to(weight.dtype), weight), synapse)
        product.addcmul_(along_neurons(signal, product), level["input"].to(product), value=-1)
        if "whitening" in level:
            product = whitened(product, level["whitening"])
        centred = in_pools(product, synapse)
        size = centred.norm(dim=-1)
        still = still.view(size.shape)
        if few is None:
            drive = self.drive(centred, direction, synapse, group)
        else:
            drive = self.drive_of_few(centred, direction, of_unit_vectors(few, level, length), group)
        if group["inhibition"]:
            moment = sums.values["z_product"] / sums.events
            strength = group["inhibition"] * size.mean()
            drive = inhibit_(drive, moment, direction, deviation / length, group["tolerance"], strength)
        turn = rotate_(drive, direction)
        largest = torch.maximum(size.amax(), turn.norm(dim=-1).masked_fill(still, 0).amax()).clamp(min=1e-30)
        settled = 1 / (1 + _time(level) / group["settle"]) if group["settle"] else 1.0
        angle = (length.view(size.shape) * (settled / largest)).masked_fill_(still, 0)
        return {synapse.weight: weight_shaped(turn.mul_(angle.unsqueeze(-1)).to(weight.dtype), synapse)}

    def _most_events(self, synapse: Synapse) -> int:
        """`most_events`; 0 where ranks, which have different events, add up their products."""
        return self.most_events(synapse, self.param_groups[synapse.group]) if self.process_group is None else 0

    def _homeostatic_rate(self, group: dict[str, Any]) -> float:
        """The rate of homeostasis in a group, per step; 0: none."""
        if self.homeostatic_rate:
            return float(group[self.homeostatic_rate])
        return RATE if group.get("homeostasis") else 0.0

    def _levels(self) -> dict[int, Level]:
        levels: dict[int, Level] = self._own_state.get("homeostasis", {})
        return levels

    def _around_descent(self) -> AbstractContextManager[None]:
        def commit(levels: dict[int, Level]) -> None:
            self._own_state = {**self._own_state, "homeostasis": levels}

        return self._regulator.descending(commit)

    def _settle(self) -> None:
        """Add up all firings that count, after a check of the passes."""
        self._check_fired()
        if missing := self._recorder.missing():
            raise RuntimeError(f"{type(self).__name__}: {missing}")
        for synapse, sums in self._confirmed.items():
            self._merge(self._sums, synapse, sums)
        self._confirmed.clear()

    def _check_fired(self) -> None:
        name, fired, readout = type(self).__name__, self._recorder.fired, self._readout
        if not fired and self._confirmed:  # a backward pass reached firings from before the last step
            return
        if not fired:
            raise RuntimeError(self._coverage.none_fired())
        readout.require_fired_last(fired)
        active = readout.active()
        if not readout.by_loss or not active:
            return
        names, bypassed = readout.names(active), self._recorder.reach.bypassed
        lost = [s.name for s, leads in bypassed.items() if not leads]
        alone = not self.shares_loss and len(active) == len(readout.layers)  # a loss also passes by a frozen readout
        if lost and alone:
            others = [s.name for s in self._recorder.synapses.values() if s.layer in readout.layers or s.name in lost]
            raise RuntimeError(
                f"{name}: the loss reaches {_layers(lost)} past the readout {names}, where {name} lets no error pass, "
                "so that this part of the loss would teach nothing. If the network has another head there, write "
                f"readout_layer={others}, or give it to another optimizer of bioopt.Mixed"
            )
        readout.require_gradient()
        both = [s.name for s, leads in bypassed.items() if leads and s not in self._warned_of]
        if both and alone:
            self._warned_of |= set(bypassed)
            warn(
                f"{name}: a part of the loss reaches {_layers(both)} past the readout {names} (a penalty on activity, "
                "or a skip connection). No error passes there, so that this part teaches nothing"
            )
        self._count_unreachable(names)

    def _count_unreachable(self, names: str) -> None:
        """Count firings of layers that the backward pass cannot have reached, and warn."""
        found = list(self._unproven)
        for synapse in found:
            self._unreachable.add(synapse)
            for pending in self._unproven.pop(synapse):
                self._count_anyway(pending)
        if found:
            warn(
                f"{type(self).__name__}: the loss was sent backward, but did not reach "
                f"{_layers([s.name for s in found])}: between {'them' if found[1:] else 'it'} and the readout {names} "
                "something has no gradient (a comparison, argmax, detach()), or the output was not used. Each "
                "firing there counts at once, even if its loss is then thrown away"
            )
        alive = dict.fromkeys(
            pending for pending in (*(waiting() for waiting in self._waiting), *self._latest.values()) if pending
        )
        if not self._sums and not self._confirmed and alive:
            for pending in alive:
                self._count_anyway(pending)
            if not self._warned_of_grad:
                self._warned_of_grad = True
                warn(
                    f"{type(self).__name__}: the readout {names} has a gradient, but no backward pass has gone through "
                    "the layers (torch.autograd.grad, or backward(inputs=...)): the last firings count, and those "
                    "whose loss still exists"
                )

    def _count_anyway(self, pending: Pending) -> None:
        sums: Any = pending.contribution
        if sums is not None and pending.window == self._recorder.reach.window and not sums.counted:
            self._merge(self._sums, pending.synapse, sums)


class LocalProductRule(LocalRule):
    r"""A rule whose update depends on one local product of a teaching signal and presynaptic activity.

    As a synapse fires, `signal` turns its postsynaptic activity ``u`` into a teaching signal ``s``. At the step,
    `update` turns the product ``P = ⟨s xᵀ⟩``, the mean over samples and positions, into ``Δw``. Only weights learn;
    biases and the affine parameters of normalisation layers stay frozen.

    Arguments and errors are those of `LocalRule`.
    """

    @abstractmethod
    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor | SparseSignal:
        """The teaching signal ``s``, of ``u``'s shape or sparse.

        Args:
            u: postsynaptic activity, neurons along ``synapse.channel_dim``.
            synapse: the layer.
            group: its param group.
        """

    @abstractmethod
    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``Δw`` from the local product.

        Args:
            product: ``⟨s xᵀ⟩``, of the weight's shape; may be changed in place.
            signal: ``⟨s⟩`` of each neuron, of the bias's shape; ``None`` without a bias.
            synapse: the layer, with the parameters that it fired with.
            group: its param group.
        """

    def measure(self, firing: Firing, u: Tensor) -> Sums:
        """``Σ s xᵀ`` and ``Σ s``."""
        synapse, activity = firing.synapse, firing.activity(u)
        group = self.param_groups[synapse.group]
        s = self.signal(activity, synapse, group) if u.numel() else torch.zeros_like(activity)
        return product_sums(firing, u, s, self._most_events(synapse))

    @optional
    def update_of_few(self, events: Events, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """`update` from the events themselves, for rules that keep few (`most_events`)."""
        raise NotImplementedError

    def changes(
        self, sums: Sums, synapse: Synapse, group: dict[str, Any], state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """`update` by the means, or from few events."""
        if sums.few is not None:
            return {synapse.weight: self.update_of_few(sums.few, synapse, group)}
        product, signal = means(sums)
        return {synapse.weight: self.update(product, signal, synapse, group)}


def means(sums: Sums) -> tuple[Tensor, Tensor | None]:
    """``⟨s xᵀ⟩``, computed in place, and ``⟨s⟩``, if the layer has a bias."""
    sums.form_product()
    signal = sums.values.get("signal")
    return sums.values["product"].div_(sums.events), None if signal is None else signal / sums.events


def _time(level: Level) -> float:
    """The steps since the rule began, those of ``n`` events ``(n / 64)^(1/4)`` times."""
    steps: int = level["steps"]
    return float((steps - WARM_UP) * (level["events"] / (steps + 1) / 64) ** 0.25)


def _layers(names: list[str]) -> str:
    return f"layer{'s' * (len(names) > 1)} " + ", ".join(f"'{name}'" for name in names)


#: former name of `LocalProductRule`
SynapticRule = LocalProductRule
