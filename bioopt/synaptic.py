"""`SynapticRule`: rules whose update is a local product, formed during one ordinary forward pass."""

from __future__ import annotations

import itertools
import warnings
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from .integrations import recipe
from .optimizer import (
    NON_NEGATIVE,
    Estimate,
    LearningRule,
    Params,
    Probe,
    ProcessGroup,
    _outside,
    backward_where_missing,
    groups_of,
    named_modules_of,
    no_plastic_layer,
    require_finite,
    unique,
)
from .recorder import Exclusion, Firing, Synapse, Unwatchable, refusal, survey

UNPROVEN = 64  # firings of a layer that are kept until the first backward pass shows whether it reaches them

__all__ = ["Few", "SynapticRule", "synapses_of"]


def surveyed(rule: str, params: Any, excluded: Exclusion | None = None) -> tuple[list[Synapse], list[Unwatchable]]:
    """The plastic synapses of the module or modules given as ``params``, and the layers that cannot be watched.

    Raises:
        TypeError: if bare parameters were given.
    """
    modules = named_modules_of(params)
    if not modules:
        raise TypeError(
            f"{rule} watches the activity of layers, so it needs the model, not its parameters: write {rule}(model, "
            f"...) or {rule}([{{'params': model.block1, 'lr': ...}}, ...]), not {rule}(model.parameters(), ...)."
            + recipe()
        )
    for _, module in modules:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"{rule} does its own averaging over ranks, and DistributedDataParallel would wait for gradients that "
                f"never come: write {rule}(model.module, ..., process_group=torch.distributed.group.WORLD)"
            )
    found: dict[nn.Module, Synapse] = {}
    unwatchable: dict[nn.Module, Unwatchable] = {}
    for prefix, module in modules:
        synapses, others = survey(module, prefix, excluded)
        for synapse in synapses:
            found.setdefault(synapse.layer, synapse)
        for other in others:
            unwatchable.setdefault(other.layer, other)
    return list(found.values()), list(unwatchable.values())


def synapses_of(rule: str, params: Any, excluded: Exclusion | None = None) -> list[Synapse]:
    """The plastic synapses of the module or modules given as ``params``.

    Raises:
        TypeError: if bare parameters were given.
        ValueError: for layers that cannot be watched, all of them in one message.
    """
    found, unwatchable = surveyed(rule, params, excluded)
    if unwatchable:
        raise ValueError(refusal(rule, unwatchable))
    return found


class Few(NamedTuple):
    """A teaching signal for a few neurons of each event, which saves the zeros for all the others.

    Events are samples and positions, in the order of activity with its neurons moved to the last dimension.
    """

    neurons: Tensor  #: which are told something, each once, events × few
    told: Tensor  #: what, events × few

    def spread(self, u: Tensor, channel: int) -> Tensor:
        """The same signal of ``u``'s shape."""
        shape = u.movedim(channel, -1).shape
        zeros = self.told.new_zeros(len(self.told), shape[-1])
        return zeros.scatter_(1, self.neurons, self.told).view(shape).movedim(-1, channel)

    def total(self, size: int) -> Tensor:
        """The sum over events for each of ``size`` neurons."""
        return self.told.new_zeros(size).index_add_(0, self.neurons.flatten(), self.told.flatten())


@dataclass(eq=False)
class Gathering:
    """What counts for a step: it ends with the step, or is dropped before."""

    learned: bool = False
    dropped: bool = False
    parts: list[weakref.ref[Sums]] = field(default_factory=list)

    def end(self) -> None:
        """A step has learned: what a graph still holds is only that it has."""
        self.learned = True
        for sums in (part() for part in self.parts):
            if sums is not None:
                sums.product, sums.signal, sums.statistic = sums.product.new_empty(0), None, None


@dataclass(eq=False)
class Sums:
    """What one synapse has gathered, summed over samples and positions."""

    product: Tensor  #: Σ s xᵀ, of the weight's shape
    signal: Tensor | None  #: Σ s, of the bias's shape
    statistic: Tensor | None  #: what the rule's running value follows
    events: int  #: their number
    of_firing: bool = True  #: one firing's own, or the sum of several
    gathering: Gathering | None = None  #: what they have been added to

    @property
    def counted(self) -> bool:
        """Whether a step has learned from them, or the next one will."""
        return self.gathering is not None and not self.gathering.dropped

    @property
    def learned(self) -> bool:
        """Whether a step has learned from them."""
        return self.gathering is not None and self.gathering.learned

    def plus(self, other: Sums) -> Sums:
        """The sum with another firing's, in the memory of a sum; a firing's own stay as they are."""
        total = replace(self, of_firing=False) if self.of_firing else self

        def add(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return one if one is None or two is None else one + two if self.of_firing else one.add_(two)

        product = add(self.product, other.product)
        assert product is not None
        total.product, total.events = product, self.events + other.events
        total.signal, total.statistic = add(self.signal, other.signal), add(self.statistic, other.statistic)
        return total


class SynapticRule(LearningRule):
    r"""A rule that makes each update from the local product of pre- and postsynaptic activity.

    As a synapse fires, the rule turns its postsynaptic activity ``u`` into a teaching signal ``s`` (`signal`);
    the product ``P = ⟨s xᵀ⟩``, averaged over samples and positions (one position of one sample is one postsynaptic
    *event*), is formed at once and summed, so no activity outlives its layer; `update` makes ``Δw`` out of it.
    Every synapse is cut: no error signal passes. A rule with a memory (a threshold, say) implements `statistic` and
    `advance` as well, and reads it by `running`.

    Where the readout learns from the loss, a firing counts once, when a backward pass reaches it: what a loss that is
    thrown away would have taught is not learned. ``zero_grad()`` drops what backward passes have brought since the
    last step, so that ``loss.backward(); optimizer.zero_grad()`` skips a batch; `discard` drops all. Firings without
    gradients (`torch.no_grad`), and all firings where no readout learns from a loss, count at once.

    Only weights learn, and what a rule adds by `others`; biases of the trunk and the affine parameters of normalisation
    layers stay frozen.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate, per mean event.
        readout: ``"delta"`` trains the last synapse by its local error times its presynaptic activity, which is
            what ``loss.backward()`` leaves there, since all other synapses are cut. ``"teacher"``: it needs no loss;
            as it learns, its postsynaptic activity is replaced by the target ``t``, and each neuron comes to hold
            what goes with it: ``Δw_k = ⟨t_k (x - t_k w_k)⟩``. ``None``: the last synapse follows the rule like the
            others.
        readout_lr: learning rate of the readout; by default that of the group it stands in. The ``lr`` of a group
            that holds nothing else goes before it.
        readout_layer: the readout, by name or as a module, or a list of several (with ``"delta"``), each of which
            learns from the part of the loss that reaches it; by default the last synapse in registration order.
        readout_options: further options of the readout's param group, such as ``{"momentum": 0.9}``.
        exclude: layers to leave alone: types, modules, or names of modules or parameters.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: average the products over these ranks, each of which has its share of the batch.
        own: hyperparameters of the rule, which may differ between groups (for subclasses).

    Attributes:
        shares_loss: whether other optimizers learn from the same loss (`Mixed` says so): what passes by the readout is
            then theirs, and no mistake.
        target: of ``readout="teacher"``: set it before each forward pass; `step` uses it up. Class labels, one a
            sample (``t`` is then 1 for the class and ``-1 / (classes - 1)`` for the others), or activity of the
            readout's shape.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, with unknown ones, or with none
            besides the readout.
        TypeError: bare parameters; a model wrapped in DistributedDataParallel.
    """

    splits_batch: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        readout: str | None = "delta",
        readout_lr: float | None = None,
        readout_layer: str | nn.Module | Sequence[str | nn.Module] | None = None,
        readout_options: dict[str, Any] | None = None,
        exclude: Iterable[Any] = (),
        descent: type[Optimizer] = SGD,
        process_group: ProcessGroup = None,
        own: dict[str, Any] | None = None,
        **descent_options: Any,
    ) -> None:
        name = type(self).__name__
        defaults = {"lr": lr, **(own or {})}
        if readout not in ("delta", "teacher", None):
            raise ValueError(f"{name}: readout={readout!r} must be 'delta', 'teacher' or None")
        if readout_lr is not None and not NON_NEGATIVE[0](readout_lr):
            raise ValueError(f"{name}: readout_lr={readout_lr!r} must be {NON_NEGATIVE[1]}")
        self._sums: dict[Synapse, Sums] = {}  # of firings that have counted at once
        self._confirmed: dict[Synapse, Sums] = {}  # of those that a backward pass has reached
        self._unproven: dict[Synapse, deque[Firing]] = {}  # firings of synapses that no backward pass ever reached
        self._waiting: list[weakref.ref[Firing]] = []  # firings since the last step that no backward pass has reached
        self._latest: dict[Synapse, Firing] = {}
        self._gathering = Gathering()
        self._backward = -1  # the last backward pass that has reached a firing
        self._by_readout = False  # whether one of those that count has passed a readout
        self._proven: set[Synapse] = set()
        self._unreachable: set[Synapse] = set()
        self._warned_of: set[Synapse] = set()
        self._warned_of_grad = False
        self._warned_of_drop = False
        self._readouts: dict[nn.Module, Synapse] = {}
        self._by_loss = readout == "delta"
        self.shares_loss = False
        self.target: Tensor | None = None
        groups = groups_of(params)
        given = [pair for group in groups for pair in named_modules_of(group["params"])]
        excluded = Exclusion.of(name, exclude, given)
        surveys = [surveyed(name, group["params"], excluded) for group in groups]
        synapses = [found for found, _ in surveys]
        unwatchable = [other for _, others in surveys for other in others]
        everything = [s for group in synapses for s in group]
        if not everything:
            raise ValueError(refusal(name, unwatchable) if unwatchable else no_plastic_layer(name))
        if readout is not None:
            if readout_layer is None and excluded.layers:
                _require_last(name, given, everything, excluded)
            readouts = _choose_readouts(name, everything, readout_layer)
            if len(readouts) > 1 and readout == "teacher":
                raise ValueError(f"{name}: readout='teacher' takes one readout, not readout_layer={readout_layer!r}")
            self._readouts = {s.layer: s for s in readouts}
            self._require_watchable(groups, synapses, unwatchable, defaults)
            if len(everything) == len(readouts):
                only = f"'{readouts[0].name}', is the readout" if len(readouts) == 1 else "all, are readouts"
                raise ValueError(
                    f"{name}: the only plastic layer, {only}, which learns in "
                    f"a way of its own: no layer is left to {name}. Give a deeper model, or readout=None"
                )
            kept = [g for g, s in zip(groups, synapses, strict=True) if any(x.layer not in self._readouts for x in s)]
            for one in readouts:
                home, near = next((g, f) for g, f in zip(groups, synapses, strict=True) if one in f)
                rate = readout_lr
                if rate is None or (all(s.layer in self._readouts for s in near) and "lr" in home):
                    rate = home.get("lr", lr)
                kept.append({**home, "lr": rate, **(readout_options or {}), "params": one.layer, "readout": readout})
            groups = kept
        elif any(option is not None for option in (readout_lr, readout_layer, readout_options)):
            raise ValueError(f"{name}: readout_lr, readout_layer and readout_options need a readout, not readout=None")
        else:
            self._require_watchable(groups, synapses, unwatchable, defaults)
        super().__init__(
            groups,
            {**defaults, "readout": None},
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
            exclude=excluded,
        )
        self._recorder.anchored = True
        self._recorder.linked = self._by_loss
        self._recorder.visit = self._gather
        self._recorder.confirm = self._confirm

    # -- what a rule implements ---------------------------------------------------------------------------------

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor | Few:
        """The teaching signal ``s``, of ``u``'s shape or for `Few`: what this layer is told.

        Args:
            u: postsynaptic activity, neurons along ``synapse.channel_dim``.
            synapse: the layer that fires.
            group: its param group.

        A rule that hears the neurons after its synapses (`Recorder.hear`) gathers its products itself instead.
        """
        raise NotImplementedError

    @abstractmethod
    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``Δw`` from the local product, in memory of its own or the product's.

        Args:
            product: ``⟨s xᵀ⟩``, of the weight's shape; may be changed in place.
            signal: ``⟨s⟩`` of each neuron, of the bias's shape; ``None`` where there is no bias.
            synapse: the layer, whose weight and bias are still those that made the product.
            group: its param group.
        """

    def least_neurons(self, group: dict[str, Any]) -> tuple[int, str]:
        """The least number of neurons that a pool must have, and the option or the reason that asks for them."""
        return 1, ""

    def statistic(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor | None:
        """What the rule's running value follows, summed over events: ``Σ u²`` of each neuron, say."""
        return None

    def advance(self, before: Tensor | None, mean: Tensor, group: dict[str, Any]) -> Tensor | None:
        """The running value after a step, from its old one (``None`` at first) and the mean of `statistic`."""
        return None

    def others(
        self, signal: Tensor | None, statistic: Tensor | None, synapse: Synapse, group: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """What else of a layer learns, such as its bias, and its change by the means of `signal` and `statistic`."""
        return {}

    def follow(self, synapses: list[Synapse], group: dict[str, Any]) -> None:
        """Before the synapses of a group are watched: a last check, and which neurons are to be heard."""

    def forget(self) -> None:
        """Drop what the pass has left besides products: before an evaluation that counts, and after the step."""

    def kept(self) -> dict[str, Any]:
        """What else the pass leaves as the rule's state, after the step."""
        return {}

    def running(self, synapse: Synapse) -> Tensor | None:
        """The running value of a synapse; ``None`` before its first step."""
        value: Tensor | None = self._own_state.get("running", {}).get(synapse.index)
        return None if value is None else value.to(synapse.weight.device)

    # -- one pass -----------------------------------------------------------------------------------------------

    def _require_watchable(
        self,
        groups: list[dict[str, Any]],
        synapses: list[list[Synapse]],
        unwatchable: list[Unwatchable],
        defaults: dict[str, Any],
    ) -> None:
        """Raise for all layers at once that the rule cannot train."""
        wrong = {other.layer: other for other in unwatchable}
        for group, found in zip(groups, synapses, strict=True):
            least, reason = self.least_neurons({**defaults, **group})
            for s in found:
                if (size := len(s.weight) // s.pools) < least and s.layer not in self._readouts:
                    of = f"it has {size}" + " in each group" * (s.pools > 1)
                    told = f"{reason} takes at least {least} neurons, but {of}"
                    wrong.setdefault(s.layer, Unwatchable(s.name, s.layer, told))
        if wrong:
            raise ValueError(refusal(type(self).__name__, list(wrong.values())))

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        if group.get("readout"):
            readout = self._readouts[group["params"]]
            readout.is_readout = self._by_loss
            if self._by_loss:
                return readout.named_parameters(), [readout]
            return [(f"{readout.name}.weight", readout.weight)], [readout]
        synapses = synapses_of(type(self).__name__, group["params"], self._exclusion)
        synapses = [s for s in synapses if s.layer not in self._readouts]
        self._require_watchable([group], [synapses], [], self.defaults)
        self.follow(synapses, group)
        return unique([(f"{s.name}.weight", s.weight) for s in synapses]), synapses

    def _gather(self, synapse: Synapse, u: Tensor) -> None:
        self._count(synapse, self._measure(synapse, u))

    def _measure(self, synapse: Synapse, u: Tensor) -> Sums:
        """The sums of one firing."""
        with torch.no_grad():
            group = self.param_groups[synapse.group]
            channel = u.ndim + synapse.channel_dim
            statistic: Tensor | None
            if synapse.layer in self._readouts:
                taught = self._taught(u, synapse)
                s: Tensor | Few = taught
                statistic = over_events(taught * taught, channel)
            else:
                statistic = self.statistic(u.detach(), synapse, group)
                s = self.signal(u.detach(), synapse, group) if u.numel() else torch.zeros_like(u.detach())
            product = local_product(synapse, u, s) if u.numel() else torch.zeros_like(synapse.weight)
        total: Tensor | None = None
        if synapse.bias is not None:
            total = s.total(u.shape[channel]) if isinstance(s, Few) else over_events(s, channel, product.dtype)
        return Sums(product, total, statistic, u.numel() // u.shape[channel])

    def _count(self, synapse: Synapse, sums: Sums) -> None:
        """Let the sums of a firing count: at once, or when a backward pass reaches it."""
        firing = self._recorder.firing
        if firing is None or not self._waits(firing):
            self._merge(self._sums, synapse, sums)
            return
        firing.pending = sums
        if len(self._waiting) % 256 == 255:
            self._waiting = [waiting for waiting in self._waiting if waiting() is not None]
        self._waiting.append(weakref.ref(firing))
        if synapse.neurons is None:
            self._latest[synapse] = firing
        if synapse not in self._proven:
            self._unproven.setdefault(synapse, deque(maxlen=UNPROVEN)).append(firing)

    def _waits(self, firing: Firing) -> bool:
        """Whether a firing counts only when a backward pass reaches it."""
        awake = any(s.layer.training and s.weight.requires_grad for s in self._readouts.values())
        return self._by_loss and awake and firing.grad_mode and firing.synapse not in self._unreachable

    def _confirm(self, firing: Firing) -> None:
        """A backward pass has reached a firing."""
        backward = torch._C._current_graph_task_id()
        if backward > self._backward:  # a new pass: model.zero_grad() as well has dropped what earlier ones brought
            self._backward = backward
            if self._confirmed and self._by_readout and all(p.grad is None for p in self.readout_parameters()):
                self._drop()
                if not self._warned_of_drop:
                    self._warned_of_drop = True
                    warnings.warn(
                        f"{type(self).__name__}: the readout's .grad was set to None after a backward pass, so that "
                        "what it brought to the layers is dropped, as by zero_grad(). To add up gradients by hand, "
                        "make an estimate() of each batch",
                        stacklevel=_outside(),
                    )
        if firing.synapse.is_readout:
            self._by_readout = True
            return
        self._proven.add(firing.synapse)
        self._unreachable.discard(firing.synapse)
        self._unproven.pop(firing.synapse, None)
        sums: Sums | None = firing.pending
        if sums is not None and not sums.counted:
            self._merge(self._confirmed, firing.synapse, sums)

    def _merge(self, total: dict[Synapse, Sums], synapse: Synapse, sums: Sums) -> None:
        """Add sums to those of a synapse. Their own stay: once dropped, they may count in another backward pass."""
        sums.gathering = self._gathering
        self._gathering.parts.append(weakref.ref(sums))
        total[synapse] = total[synapse].plus(sums) if synapse in total else sums

    def _drop(self) -> None:
        """Forget what backward passes have brought; firings whose graph is still there wait again."""
        self._confirmed.clear()
        self._gathering.dropped, self._gathering = not self._gathering.learned, Gathering()
        self._by_readout = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of torch; also drops what backward passes have brought since the last step."""
        super().zero_grad(set_to_none)
        self._drop()

    def discard(self) -> None:
        """Drop all that has fired since the last step, whether or not a backward pass has reached it."""
        super().discard()
        self._clear()

    def _clear(self) -> None:
        self._sums.clear()
        self._unproven.clear()
        self._waiting.clear()
        self._latest.clear()
        self._drop()
        self.forget()

    def _taught(self, u: Tensor, synapse: Synapse) -> Tensor:
        """The target in the place of the readout's activity."""
        name, target = type(self).__name__, self.target
        if target is None:
            raise RuntimeError(
                f"{name}: readout='teacher' was given no target for this forward pass: set optimizer.target to the "
                "labels before the model runs"
            )
        target = target.to(u.device)
        if target.shape == u.shape:
            return target.to(torch.promote_types(u.dtype, torch.float32))
        classes = u.shape[-1]
        if u.ndim != 2 or target.shape != u.shape[:1] or target.is_floating_point():
            raise ValueError(
                f"{name}: target of shape {tuple(target.shape)} and type {target.dtype} must be class labels, one a "
                f"sample, or have the shape {tuple(u.shape)} of the readout '{synapse.name}'"
            )
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise ValueError(f"{name}: target has labels outside 0 to {classes - 1}, the neurons of '{synapse.name}'")
        rest = 1 / max(classes - 1, 1)
        hot = torch.zeros_like(u, dtype=torch.promote_types(u.dtype, torch.float32)).sub_(rest)
        return hot.scatter_(1, target.long().unsqueeze(1), 1.0)

    def readout_parameters(self) -> list[Tensor]:
        """The parameters that learn from the loss."""
        return [p for s in self._readouts.values() for p in s.parameters()] if self._by_loss else []

    def _begin(self) -> None:
        """Before an evaluation whose records alone count."""
        self._clear()
        self._recorder.reset()
        for p in self._trained():
            p.grad = None

    def _estimate(self, probe: Probe) -> Estimate:
        self._begin()
        losses = probe(grad=self._by_loss)
        backward_where_missing(losses, self.readout_parameters(), [self._recorder.anchor])
        return losses.detach(), *self._collect(losses.detach())

    @torch.no_grad()
    def _collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        try:
            self._settle()
            gathered = sorted(self._sums.items(), key=lambda item: item[0].index)  # alike on all ranks
            readout = [p for p in self.readout_parameters() if p.grad is not None]
            device = self._trained()[0].device
            loss = torch.zeros((), device=device) if losses is None else losses.mean()
            # Not in half precision: the counts are large. On the device only where other ranks are to add theirs.
            where = None if self.process_group is None else device
            events = torch.tensor([float(sums.events) for _, sums in gathered], device=where)
            products = [t for _, s in gathered for t in (s.product, s.signal, s.statistic) if t is not None]
            self._sum_over_ranks([loss, events, *products, *[p.grad for p in readout if p.grad is not None]])
            if losses is not None:
                require_finite(self, "the loss", [loss])
            running = dict(self._own_state.get("running", {}))
            grads: dict[Tensor, Tensor] = {}
            for p in readout:
                assert p.grad is not None
                grads[p] = p.grad / self._ranks[1] if self.process_group is not None else p.grad
            for (synapse, sums), count in zip(gathered, events.tolist(), strict=True):
                if not count:  # it ran, but no sample came its way
                    continue
                mean = None if sums.signal is None else sums.signal / count
                product, statistic = sums.product.div_(count), sums.statistic
                statistic = None if statistic is None else statistic / count
                with torch.autocast(device.type, enabled=False):
                    if synapse.layer in self._readouts:
                        assert statistic is not None  # ⟨t²⟩
                        weight = synapse.weight.detach()
                        change = product - statistic.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)) * weight
                    else:
                        change = self.update(product, mean, synapse, self.param_groups[synapse.group])
                # In the weight's memory format. One weight in two layers gathers from both.
                fits = change.stride() == synapse.weight.stride()
                grad = change.neg_() if fits else torch.neg(change, out=torch.empty_like(synapse.weight))
                grads[synapse.weight] = grads[synapse.weight] + grad if synapse.weight in grads else grad
                if synapse.layer in self._readouts:
                    continue
                group = self.param_groups[synapse.group]
                for p, other in self.others(mean, statistic, synapse, group).items():
                    grads[p] = grads[p] - other if p in grads else -other
                if statistic is not None:
                    value = self.advance(self.running(synapse), statistic, group)
                    running |= {} if value is None else {synapse.index: value}
            kept = self.kept()
            self._gathering.end()
            return grads, ({"running": running} if running else {}) | kept
        finally:
            self._clear()
            self.target = None  # an old one shall not teach a new batch

    def _settle(self) -> None:
        """Bring together all that counts, after a check that the pass was one to learn from."""
        self._check_fired()
        for synapse, sums in self._confirmed.items():
            self._merge(self._sums, synapse, sums)
        self._confirmed.clear()

    def _check_fired(self) -> None:
        name, fired = type(self).__name__, list(self._recorder.fired)
        if not fired and self._confirmed:  # a backward pass through what fired before the last step
            return
        if not fired:
            raise RuntimeError(self._none_fired())
        readouts = [s for s in self._readouts.values() if s.layer.training and s.weight.requires_grad]
        if not readouts:
            return
        names = ", ".join(f"'{s.name}'" for s in readouts)
        many = len(readouts) > 1
        if not any(s in fired for s in readouts):
            none = f"none of the readouts {names} fired" if many else f"the readout {names} did not fire"
            raise RuntimeError(f"{name}: {none}; name another by readout_layer=")
        if fired[-1] not in readouts:
            raise RuntimeError(
                f"{name}: layer '{fired[-1].name}' fires after the readout {names}, which must be last. "
                f"Write readout_layer='{fired[-1].name}'"
            )
        if not self._by_loss:
            return
        lost = [s.name for s, leads in self._recorder.bypassed.items() if not leads]
        alone = not self.shares_loss and len(readouts) == len(self._readouts)  # a resting readout is passed by as well
        if lost and alone:
            others = [s.name for s in self._recorder.synapses.values() if s.layer in self._readouts or s.name in lost]
            raise RuntimeError(
                f"{name}: the loss reaches {_layers(lost)} past the readout {names}, and {name} lets no error pass "
                "there, so that this part of the loss would teach nothing. If this is another head of the network, "
                f"write readout_layer={others}; or give it to another optimizer of bioopt.Mixed"
            )
        if all(p.grad is None for s in readouts for p in s.parameters()):
            raise RuntimeError(
                f"{name}: the readout{'s' * many} {names} learn{'s' * (not many)} from the loss, but no gradient has "
                f"reached {'them' if many else 'it'}: call loss.backward() before step(), or give step() a closure "
                "that returns the loss. readout=None makes a network without a loss"
            )
        both = [s.name for s, leads in self._recorder.bypassed.items() if leads and s not in self._warned_of]
        if both and alone:
            self._warned_of |= set(self._recorder.bypassed)
            warnings.warn(
                f"{name}: a part of the loss reaches {_layers(both)} past the readout {names} (a penalty on activity, "
                "or a connection to the scores). No error passes there: that part teaches nothing",
                stacklevel=_outside(),
            )
        self._count_unreachable(names)

    def _count_unreachable(self, names: str) -> None:
        """Let layers that the backward pass has not reached count without it, where that cannot be meant; say so."""
        found = list(self._unproven)
        for synapse in found:
            self._unreachable.add(synapse)
            for firing in self._unproven.pop(synapse):
                self._count_anyway(firing)
        if found:
            warnings.warn(
                f"{type(self).__name__}: the loss was sent backward, but did not reach "
                f"{_layers([s.name for s in found])}: between {'them' if found[1:] else 'it'} and the readout {names} "
                "something has no gradient (a comparison, argmax, detach()), or the output was not used. All that "
                "fires there counts at once, also for a loss that is then thrown away",
                stacklevel=_outside(),
            )
        alive = dict.fromkeys(
            firing for firing in (*(waiting() for waiting in self._waiting), *self._latest.values()) if firing
        )
        if not self._sums and not self._confirmed and alive:
            for firing in alive:
                self._count_anyway(firing)
            if not self._warned_of_grad:
                self._warned_of_grad = True
                warnings.warn(
                    f"{type(self).__name__}: the readout {names} has a gradient, but no backward pass has gone through "
                    "the layers (torch.autograd.grad, or backward(inputs=...)): what has fired last counts, and all "
                    "whose loss is still there",
                    stacklevel=_outside(),
                )

    def _count_anyway(self, firing: Firing) -> None:
        sums, current = firing.pending, firing.window == self._recorder.window
        if sums is not None and current and not sums.counted:
            self._merge(self._sums, firing.synapse, sums)


def _layers(names: list[str]) -> str:
    return f"layer{'s' * (len(names) > 1)} " + ", ".join(f"'{name}'" for name in names)


def over_events(values: Tensor, channel: int, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over samples and positions for each neuron."""
    events = [d for d in range(values.ndim) if d != channel]
    return values.sum(events, dtype=dtype) if events else values.to(dtype or values.dtype)  # sum([]) is over all


def local_product(synapse: Synapse, u: Tensor, s: Tensor | Few) -> Tensor:
    """``Σ s xᵀ`` over samples and positions, of the weight's shape.

    Autograd inside the one layer that made ``u``: right for every kind of layer. On the CPU, convolutions of many
    inputs take the same product over their patches instead, half the time of the library's own; where few neurons of
    an event learn, it is a sparse product.
    """
    weight, plain = synapse.weight, _is_plain_convolution(synapse, u)  # the sizes below are measured
    if isinstance(s, Few):
        if plain and weight.shape[1] >= 32 and len(weight) >= 16 * s.neurons.shape[1]:
            return _product_of_few(weight, u, s)
        s = s.spread(u, u.ndim + synapse.channel_dim)
    if plain and weight[0].numel() >= 512 and len(weight) >= 256:  # fewer do not repay the copy of the patches
        return _product_of_patches(weight, u, s)
    # A sum over the events of a large batch is too much for float16, and the entries of a mean are too small.
    scale = (u.numel() / len(weight)) ** -0.5 if u.dtype == torch.float16 else 1.0
    (product,) = torch.autograd.grad(u, weight, (s if scale == 1.0 else s * scale).to(u.dtype))
    return product if scale == 1.0 else product.div_(scale)


def _is_plain_convolution(synapse: Synapse, u: Tensor) -> bool:
    """Whether ``u`` was made by a convolution on the CPU that keeps what it saw, one image beside another."""
    return (
        type(synapse.layer) is nn.Conv2d
        and synapse.layer.groups == 1
        and u.device.type == "cpu"
        and u.dtype in (torch.float32, torch.float64)
        and type(u.grad_fn).__name__ == "ConvolutionBackward0"  # not of a compiled layer, nor of a single image
    )


def _product_of_patches(weight: Tensor, u: Tensor, s: Tensor) -> Tensor:
    made: Any = u.grad_fn
    outputs, inputs, *kernel = weight.shape
    width, positions = weight[0].numel(), u[0, 0].numel()
    # So many samples at a time that their patches fit into the cache, and are small beside activity or weights.
    step = max(1, max(100_000, min(2_000_000, max(weight.numel(), u.numel()) // 4)) // (width * positions))
    total: Tensor | None = None
    for start in range(0, len(u), step):
        patches = _padded(made, start, step)
        for dim, (size, stride, dilation) in enumerate(
            zip(kernel, made._saved_stride, made._saved_dilation, strict=True), start=1
        ):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, width)
        told = s[start : start + step].permute(0, 2, 3, 1).reshape(-1, outputs).to(rows.dtype)
        total = told.T @ rows if total is None else total.addmm_(told.T, rows)
        del patches, rows  # before the next
    assert total is not None
    return total.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)


def _product_of_few(weight: Tensor, u: Tensor, s: Few) -> Tensor:
    """Each neuron has a bag of the events that it learns: for each place in the kernel, the sum of the pixels there."""
    made: Any = u.grad_fn
    outputs, inputs, *kernel = weight.shape
    positions, few = u[0, 0].numel(), s.neurons.shape[1]
    down, across = (torch.arange(n, device=u.device) * d for n, d in zip(u.shape[2:], made._saved_stride, strict=True))
    every = torch.arange(outputs, device=u.device)
    total = weight.new_empty(outputs, *kernel, inputs)
    # So many samples at a time that they fit into the cache, unless that is little beside what they add up to.
    step = 1 + max(500_000, weight.numel() // 2) // (inputs * positions)
    for start in range(0, len(u), step):
        x = _padded(made, start, step)
        pixels, (samples, height, width) = x.reshape(-1, inputs), x.shape[:3]
        corner = torch.arange(samples, device=x.device).view(-1, 1, 1) * height * width + down.view(-1, 1) * width
        corner = (corner + across).flatten()  # of each event's patch
        events = slice(start * positions, start * positions + len(corner))
        neuron, order = s.neurons[events].flatten().sort()
        told = s.told[events].flatten()[order].to(x.dtype)
        seen, first = corner[order // few], torch.searchsorted(neuron, every)
        for i, j in itertools.product(*map(range, kernel)):
            pixel = seen + (i * made._saved_dilation[0] * width + j * made._saved_dilation[1])
            bags = F.embedding_bag(pixel, pixels, first, mode="sum", per_sample_weights=told)
            if start:
                total[:, i, j] += bags
            else:
                total[:, i, j] = bags
    return total.permute(0, 3, 1, 2)


def _padded(made: Any, start: int, count: int) -> Tensor:
    """Some samples of what a convolution saw, channels last."""
    pad = [p for size in reversed(made._saved_padding) for p in (size, size)]
    return F.pad(made._saved_input[start : start + count], pad).permute(0, 2, 3, 1)


def _choose_readouts(rule: str, synapses: list[Synapse], wanted: Any) -> list[Synapse]:
    if wanted is None:
        return synapses[-1:]
    chosen: list[Synapse] = []
    for one in [wanted] if isinstance(wanted, str | int | nn.Module) else list(wanted):
        found = [synapse for synapse in synapses if one is synapse.layer or str(one) == synapse.name]
        if not found:
            raise ValueError(
                f"{rule}: readout_layer={one!r} is not one of the synapses: {', '.join(s.name for s in synapses)}"
            )
        chosen += [synapse for synapse in found if synapse not in chosen]
    if not chosen:
        raise ValueError(f"{rule}: readout_layer={wanted!r} names no layer; readout=None makes a network without one")
    return chosen


def _require_last(rule: str, given: list[tuple[str, nn.Module]], synapses: list[Synapse], excluded: Exclusion) -> None:
    """Raise where the layer that would be the readout is excluded."""
    last = [synapse for prefix, module in given for synapse in survey(module, prefix)[0]][-1]
    if last.layer in excluded.layers:
        raise ValueError(
            f"{rule}: exclude leaves out '{last.name}', the last layer, which would be the readout. Name another by "
            f"readout_layer='{synapses[-1].name}', or write readout=None"
        )
