"""`Readout`: the last layer, if it learns otherwise than the rest of the network."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from . import curvature
from .acts import Isolated, cut, detached, isolate
from .constraints import NON_NEGATIVE, require_in_range, require_labels
from .homeostasis import EVENTS, RATE, Level, along_neurons, in_weight_form, kept_in_place
from .params import (
    GradientOptions,
    RuleOptions,
    learning_parameters_of,
    named_modules_of,
    no_plastic_layer,
    surveyed,
)
from .products import in_full, over_events, squares_over_events
from .reach import Pending, Reach, weakly
from .recorder import Firing
from .sums import Sums, product_sums
from .synapse import Exclusion, Synapse, Unwatchable, refusal, survey

__all__ = ["GradientReadoutOptions", "Readout", "ReadoutOptions"]

KINDS = ("delta", "teacher", None)
#: of a readout on standardised activity, in units of one over the eigenvalues of its covariance: with momentum 0.9,
#: cross-entropy, whose curvature is at most 1/2, is stable below 7.6
LR = 1.0
MOMENTUM = 0.9
COMPONENTS = 16  # principal components of the input with a rate of their own
NOISE = 6.0  # how much the noise of a small batch counts, which momentum adds up over some 10 batches
KNOWN = 10  # steps after which the estimates are good
NOT_MOVING = 1e-6  # a variance below this share of the squared mean is rounding
FLOOR = 0.1  # of the variance of an input, as a share of the mean variance: rare inputs are not blown up


class _Choice(TypedDict, total=False):
    readout_lr: float | None
    readout_layer: str | nn.Module | Sequence[str | nn.Module] | None
    readout_options: dict[str, Any] | None


class ReadoutOptions(RuleOptions, _Choice, total=False):
    """Options of rules with a readout; `bioopt.LearningRule` describes them."""


class GradientReadoutOptions(ReadoutOptions, GradientOptions, total=False):
    """Options of rules with a readout whose other layers descend a gradient, or an estimate of it."""


class ReadoutChoice(NamedTuple):
    """Which layer is the readout, and the options of its param group."""

    lr: float | None
    layer: str | nn.Module | Sequence[str | nn.Module] | None
    options: dict[str, Any] | None
    standardise: bool = False  # unless a rate is given
    momentum: float = MOMENTUM


Survey = tuple[list[Synapse], list[Unwatchable]]


class Readout:
    r"""The readout of a rule: how the last layer learns.

    ``"delta"``: by its local error times its presynaptic activity, which is the exact gradient of its own weights and
    what ``loss.backward()`` leaves in ``.grad``, since its input is cut. Without ``readout_lr`` it learns on
    standardised presynaptic activity :math:`z`, in units of its variance: with the largest eigenvalues
    :math:`\lambda_i` of :math:`\langle z z^\top \rangle`, their eigenvectors :math:`q_i`, and a bound :math:`\rho` of
    all others,

    .. math::
        \Delta v = -\frac{\eta}{c\,(1 + c\,\nu)} \, \nabla v
        [ \frac{1 - \sum_i q_i q_i^\top}{\rho} + \sum_i \frac{q_i q_i^\top}{\lambda_i + \rho} ],

    where :math:`\nu` is 6 times the trace of the matrix in brackets times :math:`\langle z z^\top \rangle`, over
    the events of the batch: a small batch is no good estimate of all directions; and :math:`c` is how many times
    larger the curvature of the loss is than that of cross-entropy, measured as it learns (`bioopt.core.curvature`),
    at least 1. ``"teacher"``: without a loss; the target :math:`t` takes the place of its postsynaptic activity,
    and the weights of each neuron move towards the activity that accompanies its target: :math:`\Delta w_k =
    \langle t_k (x - t_k w_k)\rangle`. ``None``: no readout; all layers follow the rule.

    Attributes:
        kind: ``"delta"``, ``"teacher"`` or ``None``.
        layers: the readouts by their modules, in the order of ``readout_layer``.
        by_loss: whether it learns from the loss.
    """

    def __init__(self, rule: str, kind: str | None, reach: Reach, levels: Callable[[], dict[int, Level]]) -> None:
        if kind not in KINDS:
            raise ValueError(f"{rule}: readout={kind!r} must be 'delta', 'teacher' or None")
        self.kind = kind
        self.layers: dict[nn.Module, Synapse] = {}
        self._standardised: dict[nn.Module, Synapse] = {}  # those that learn on standardised activity
        self.by_loss = kind == "delta"
        self._rule = rule
        self._levels = weakly(levels)
        self._reach = reach
        self._others: list[Synapse] = []
        self._in_order = False  # whether it was seen to fire last
        self._target: Tensor | None = None
        self._sums: dict[Synapse, Sums] = {}  # of a teacher
        # Presynaptic activity of the firings whose loss still exists, and of those that a backward pass has reached.
        self._pending: weakref.WeakKeyDictionary[Pending, Sums] = weakref.WeakKeyDictionary()
        self._counted: weakref.WeakSet[Pending] = weakref.WeakSet()
        self._reached: dict[Synapse, Sums] = {}
        self._latest: dict[Synapse, Sums] = {}  # of the last firing: for gradients that a user sets by hand

    def __bool__(self) -> bool:
        return self.kind is not None

    # -- which layers -------------------------------------------------------------------------------------------

    def set_apart(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        excluded: Exclusion,
        choice: ReadoutChoice,
        require_trainable: Callable[[list[dict[str, Any]], list[Survey]], None],
        whole: bool,
    ) -> list[dict[str, Any]]:
        """The groups of a rule with one more for each readout.

        Args:
            groups: as a user gives them.
            lr: of groups that have none.
            excluded: what to leave alone.
            choice: what the user has chosen.
            require_trainable: the rule's own check of all other layers.
            whole: whether the rule trains all parameters of a module, not those of synapses alone.

        Raises:
            ValueError: a readout that is not there, or is excluded; no layer besides it.
        """
        name = self._rule
        if choice.lr is not None:
            require_in_range(name, "readout_lr", choice.lr, NON_NEGATIVE)
        if self.kind is None:
            if any(option is not None for option in choice[:3]):
                raise ValueError(
                    f"{name}: readout_lr, readout_layer and readout_options need a readout, not readout=None"
                )
            require_trainable(groups, [])
            return groups
        given = [pair for group in groups for pair in named_modules_of(group["params"])]
        surveys = [surveyed(name, group["params"], excluded) for group in groups]
        synapses = [found for found, _ in surveys]
        everything = [s for group in synapses for s in group]
        if not everything:
            unwatchable = [other for _, others in surveys for other in others]
            raise ValueError(refusal(name, unwatchable) if unwatchable else no_plastic_layer(name))
        if choice.layer is None and (excluded.layers or excluded.params):
            self._require_last_included(given, everything, excluded)
        readouts = self._chosen(everything, choice.layer)
        self.layers = {s.layer: s for s in readouts}
        self._others = [s for s in everything if s.layer not in self.layers]
        require_trainable(groups, surveys)
        if len(everything) == len(readouts):
            only = f"'{readouts[0].name}', is the readout" if len(readouts) == 1 else "all, are readouts"
            raise ValueError(
                f"{name}: the only plastic layer, {only}, so that no layer is left to {name}: give a deeper model, or "
                "readout=None"
            )
        kept = [
            group
            for group, found in zip(groups, synapses, strict=True)
            if any(s.layer not in self.layers for s in found)
            or (whole and self.left_over(learning_parameters_of(group["params"], excluded)))
        ]
        for one in readouts:
            home, near = next((g, f) for g, f in zip(groups, synapses, strict=True) if one in f)
            rate = choice.lr
            alone = all(s.layer in self.layers for s in near) and "lr" in home
            if rate is None or alone:
                rate = home.get("lr", lr)
            free = {"lr": rate}
            if choice.standardise and choice.lr is None and not alone:
                free = {"lr": LR, "momentum": home.get("momentum", choice.momentum), "standardised": True}
                self._standardised[one.layer] = one
            kept.append({**home, **free, **(choice.options or {}), "params": one.layer, "readout": self.kind})
        return kept

    def _chosen(self, synapses: list[Synapse], given: Any) -> list[Synapse]:
        name = self._rule
        if given is None:
            return synapses[-1:]
        chosen: list[Synapse] = []
        for one in [given] if isinstance(given, str | int | nn.Module) else list(given):
            found = [synapse for synapse in synapses if one is synapse.layer or str(one) == synapse.name]
            if not found:
                raise ValueError(
                    f"{name}: readout_layer={one!r} is not one of the synapses: {', '.join(s.name for s in synapses)}"
                )
            chosen += [synapse for synapse in found if synapse not in chosen]
        if not chosen:
            raise ValueError(
                f"{name}: readout_layer={given!r} names no layer; for a network without a readout, write readout=None"
            )
        if len(chosen) > 1 and self.kind == "teacher":
            raise ValueError(f"{name}: readout='teacher' takes one readout, not readout_layer={given!r}")
        return chosen

    def _require_last_included(
        self, given: list[tuple[str, nn.Module]], synapses: list[Synapse], excluded: Exclusion
    ) -> None:
        """Raise where the layer that would be the readout is excluded."""
        last = [synapse for prefix, module in given for synapse in survey(module, prefix)[0]][-1]
        if last.layer in excluded.layers or last.weight in excluded.params:
            raise ValueError(
                f"{self._rule}: exclude leaves out '{last.name}', the last layer, which would be the readout. Name "
                f"another by readout_layer='{synapses[-1].name}', or write readout=None"
            )

    def select(self, layer: nn.Module) -> tuple[list[Any], list[Synapse]]:
        """The parameters of a readout's own group, and its synapse."""
        synapse = self.layers[layer]
        synapse.is_readout = self.by_loss
        if self.by_loss:
            return synapse.named_parameters(), [synapse]
        return [(f"{synapse.name}.weight", synapse.weight)], [synapse]

    def left_over(self, params: list[Any]) -> list[Any]:
        """The parameters of a group, in torch's bare or named form, without those of readouts."""
        if not self:
            return params
        own = {p for layer in self.layers for p in layer.parameters()}
        return [entry for entry in params if (entry[1] if isinstance(entry, tuple) else entry) not in own]

    def parameters(self) -> list[Tensor]:
        """The parameters that learn from the loss."""
        return [p for s in self.layers.values() for p in s.parameters()] if self.by_loss else []

    def active(self) -> list[Synapse]:
        """The readouts that are neither frozen nor in evaluation mode."""
        return [s for s in self.layers.values() if s.layer.training and s.weight.requires_grad]

    # -- one pass -----------------------------------------------------------------------------------------------

    def begin(self, target: Tensor | None) -> None:
        """Start a pass that counts; ``target``: of a teacher."""
        self.clear()
        self._target = target

    def clear(self) -> None:
        """Drop the sums of all passes."""
        self._sums.clear()
        self._pending.clear()
        self._latest.clear()
        self.drop()

    def enter(self, synapse: Synapse, x: Tensor) -> Tensor | Isolated:
        """The entry of every synapse of a rule: that of a cut, but for a readout that learns from the loss."""
        return detached(x) if synapse.is_readout else isolate(synapse, x)

    def leave(self, firing: Firing, u: Tensor, target: Tensor | None = None) -> Tensor:
        """The activity of the readout, with the graph of its own parameters if it learns from the loss.

        ``target``: of a teacher, by default that of `begin`.
        """
        if self.by_loss:
            pending = self._reach.pending(firing.synapse)
            end = self._reach.end(u, firing.x, pending)
            if firing.synapse.layer in self._standardised and not firing.replay:
                with torch.no_grad():
                    sums = _input_sums(firing, self._level(firing.synapse))
                    self._latest[firing.synapse] = self._pending[pending] = sums
                if not self._reach.linked or not self._reach.waits_at(end):
                    self.confirm(pending)
            return end
        if not firing.replay:
            with torch.no_grad():
                s = self._taught(u, firing.synapse, self._target if target is None else target)
                squares = over_events(s * s, u.ndim + firing.synapse.channel_dim)
                sums = product_sums(firing, u, s, squares=squares)
            known = self._sums.get(firing.synapse)
            self._sums[firing.synapse] = sums if known is None else known.plus(sums)
        return cut(firing, u, self._reach)

    def _level(self, synapse: Synapse) -> Level | None:
        """The present level of presynaptic activity, part of the rule's own state."""
        levels: dict[int, Level] = self._levels()()
        return levels.get(synapse.index)

    def confirm(self, pending: Pending) -> None:
        """Count a firing of a readout that a backward pass has reached."""
        sums = self._pending.get(pending)
        if sums is not None and pending not in self._counted:
            self._counted.add(pending)
            known = self._reached.get(pending.synapse)
            self._reached[pending.synapse] = sums if known is None else known.plus(sums)

    def drop(self) -> None:
        """Drop the firings that backward passes have reached; those whose graph still exists wait again."""
        self._reached.clear()
        self._counted.clear()

    def _taught(self, u: Tensor, synapse: Synapse, target: Tensor | None) -> Tensor:
        """The target, of the shape of the readout's activity."""
        name = self._rule
        if target is None:
            raise RuntimeError(
                f"{name}: readout='teacher' was given no target for this forward pass: set optimizer.target to the "
                "labels before the model runs"
            )
        target = target.to(u.device)
        if target.shape == u.shape:
            return target.to(torch.promote_types(u.dtype, torch.float32))
        require_labels(name, target, u.shape[:1] if u.ndim == 2 else None, u.shape[-1], synapse.name, u.shape)
        rest = 1 / max(u.shape[-1] - 1, 1)
        hot = torch.zeros_like(u, dtype=torch.promote_types(u.dtype, torch.float32)).sub_(rest)
        return hot.scatter_(1, target.long().unsqueeze(1), 1.0)

    def note_others(self, fired: dict[Synapse, None], watched: Collection[nn.Module]) -> list[Any]:
        """Note layers that the rule does not watch as they fire, until the readout was once seen to fire last.

        Returns:
            The handles of the hooks.
        """

        def note(synapse: Synapse, *_: Any) -> None:
            if synapse.layer.training and synapse.weight.requires_grad:
                fired.pop(synapse, None)
                fired[synapse] = None

        others = [] if self._in_order else [s for s in self._others if s.layer not in watched]
        return [s.layer.register_forward_hook(torch.compiler.disable(partial(note, s))) for s in others]

    def require_fired_last(self, fired: Collection[Synapse]) -> None:
        """Raise where the readout did not fire, or another layer fired after it."""
        readouts, order = self.active(), list(fired)
        if not readouts:
            return
        names = self.names(readouts)
        if not any(s in fired for s in readouts):
            none = f"none of the readouts {names} fired" if len(readouts) > 1 else f"the readout {names} did not fire"
            raise RuntimeError(f"{self._rule}: {none}; name another by readout_layer=")
        if order[-1] not in readouts:
            raise RuntimeError(
                f"{self._rule}: layer '{order[-1].name}' fires after the readout {names}, which must be last. "
                f"Write readout_layer='{order[-1].name}'"
            )
        self._in_order = True

    def require_gradient(self) -> None:
        """Raise where no backward pass has reached a readout that learns from the loss."""
        readouts = self.active()
        if not self.by_loss or any(p.grad is not None for s in readouts for p in s.parameters()) or not readouts:
            return
        many = len(readouts) > 1
        raise RuntimeError(
            f"{self._rule}: the readout{'s' * many} {self.names(readouts)} learn{'s' * (not many)} from the loss, but "
            f"no gradient has reached {'them' if many else 'it'}: call loss.backward() before step(), or give step() a "
            "closure that returns the loss. Without a loss, write readout=None"
        )

    @staticmethod
    def names(readouts: Iterable[Synapse]) -> str:
        """Their names, for a message."""
        return ", ".join(f"'{s.name}'" for s in readouts)

    def learning(self) -> list[str]:
        """The names of the readouts with an update from the last passes."""
        return [
            s.name
            for s in self.layers.values()
            if s in self._sums or (self.by_loss and any(p.grad is not None for p in s.parameters()))
        ]

    def collect(
        self, sum_over_ranks: Callable[[list[Tensor]], None], ranks: int, samples: int, state: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """The new ``.grad`` of each parameter from the last passes, averaged over ranks.

        Args:
            sum_over_ranks: replaces tensors by their sums.
            ranks: how many there are.
            samples: losses of this rank, by which its gradients count.
            state: the rule's own state after the step, to which the levels of presynaptic activity are added.
        """
        found = {p: p.grad for p in self.parameters() if p.grad is not None}
        of_input = {s: sums for s, sums in {**self._latest, **self._reached}.items() if s.weight in found}
        sums = sorted({**self._sums, **of_input}.items(), key=lambda item: item[0].index)
        device = next((s.weight.device for s in self.layers.values()), None)
        counts = torch.tensor([float(s.events) for _, s in sums], device=device if ranks > 1 else None)
        tensors = [value for _, s in sums for value in s.values.values()]
        total = counts.new_tensor([float(samples)])
        found = {p: g * samples if ranks > 1 else g for p, g in found.items()}
        sum_over_ranks([*found.values(), *tensors, *([counts] if sums else []), *([total] if found else [])])
        grads = {p: g / total.clamp(min=1).to(g) if ranks > 1 else g for p, g in found.items()}
        for (synapse, gathered), count in zip(sums, counts.tolist(), strict=True):
            if not count:
                continue
            if self.by_loss:
                level = _followed(state.get("readout", {}).get(synapse.index), gathered, count, synapse, grads)
                state["readout"] = {**state.get("readout", {}), synapse.index: level}
                continue
            weight = synapse.weight.detach()
            product, squares = gathered.values["product"].div_(count), gathered.values["squares"] / count
            decay = along_neurons(squares.to(weight.dtype), weight) * weight
            grads[synapse.weight] = as_grad(product - decay, synapse.weight)
        for synapse in self._standardised.values():
            if synapse.index in state.get("readout", {}) and synapse.weight in grads:
                grads |= _standardised(grads, synapse, state["readout"][synapse.index])
        self.clear()
        return grads


def _input_sums(firing: Firing, level: Level | None) -> Sums:
    """The sums of presynaptic activity ``x``, of its square, and of ``z zᵀ Q`` for the present principal components."""
    x, channel = in_full(firing.x.detach()), firing.x.ndim + firing.synapse.channel_dim
    total, square = over_events(x, channel), squares_over_events(x, channel)
    if level is None:
        along = total.new_zeros(len(total), min(COMPONENTS, len(total)))
    else:
        mean, power = _moments(level, firing.synapse.bias is not None)
        rows = (x.movedim(channel, -1).reshape(-1, len(total)) - mean.to(x)) / power.to(x).sqrt()
        along = (rows.mT @ (rows @ level["components"].to(x))).to(x.dtype)  # which autocast rounds
    sums = {"input": total, "square": square, "along": along, "moved": curvature.moved(firing, level)}
    return Sums(sums, {"events": x.numel() // len(total)})


def _components(like: Tensor) -> Tensor:
    """Random orthonormal columns, to start with."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(len(like), min(COMPONENTS, len(like)), generator=generator, dtype=like.dtype)
    first: Tensor = torch.linalg.qr(columns)[0]
    return first.to(like.device)


def _moments(level: Level, centred: bool) -> tuple[Tensor, Tensor]:
    """What is subtracted from presynaptic activity, and the power by which it is divided."""
    mean, variance = level["mean"], level["variance"]
    if not centred:
        variance, mean = variance + mean.square(), torch.zeros_like(mean)
    # Variance below that of rounding, or of activity of 3e-5, is no signal.
    return mean, variance + FLOOR * variance.mean() + NOT_MOVING * mean.square().mean() + 1e-9


def _followed(level: Level | None, sums: Sums, count: float, synapse: Synapse, grads: dict[Tensor, Tensor]) -> Level:
    """The running moments and principal components of presynaptic activity, and the loss's curvature, after a step."""
    steps = 0 if level is None else level["steps"]
    r, first = max(RATE, 1 / (1 + steps)), max(RATE, 1 / max(steps, 1))
    bent = curvature.followed(level, sums.values["moved"] / count, synapse, grads, r, first)
    mean, square, along = (sums.values[name] / count for name in ("input", "square", "along"))
    of_batch = (square - mean.square()).clamp(min=0)
    varies = of_batch.sum() > NOT_MOVING * mean.square().sum()
    if count < EVENTS:  # too few to tell
        varies = torch.ones_like(varies)
    counts = steps >= 1 / RATE or bool(varies)  # at first, steps whose inputs are all alike tell nothing
    if level is None:
        components = _components(mean)
        return {
            **{"mean": mean, "variance": of_batch, "components": components, "steps": int(counts), "events": count},
            "varies": varies,
            **{"eigenvalues": mean.new_zeros(components.shape[1]), **bent},
        }
    known, components, eigenvalues = (level[name].to(mean) for name in ("mean", "components", "eigenvalues"))
    shift = mean - known
    # One step of subspace iteration, with the running covariance within the subspace and that of this batch.
    found, triangle = torch.linalg.qr(torch.lerp(components * eigenvalues, along, first))
    variance = level["variance"].to(mean)
    varied = torch.lerp(variance, of_batch, r) + r * (1 - r) * shift.square()
    new = {
        "mean": known + r * shift,
        "variance": torch.where(varies, varied, variance),
        "components": torch.where(varies, found, components),
        "eigenvalues": torch.where(varies, triangle.diagonal().abs(), eigenvalues),
        "varies": varies,
        "steps": steps + int(counts),
        "events": count,
        **bent,
    }
    return kept_in_place(level, new)


def _standardised(grads: dict[Tensor, Tensor], synapse: Synapse, level: Level) -> dict[Tensor, Tensor]:
    r"""The gradients on standardised input ``z``, in place of those of ``w`` and ``b``, as changes of ``w`` and ``b``.

    They are those of ``w σ`` and ``b + w μ``, divided by the eigenvalues of :math:`\langle z z^\top \rangle`: each of
    the largest by its own, all others by a bound of theirs.
    """
    weight, bias = synapse.weight, synapse.bias
    centred = bias is not None and bias in grads
    mean, power = (value.to(weight) for value in _moments(level, centred))
    deviation = in_weight_form(power.sqrt(), synapse)
    mean, grad = in_weight_form(mean, synapse), grads[weight]
    if bias is not None and centred:
        grad = grad - along_neurons(grads[bias], weight) * mean
    variance = level["variance"].to(weight)
    if not centred:
        variance = variance + level["mean"].to(weight).square()
    rates, rest, noise = _rates(level, (variance / power).sum())
    bent = curvature.excess(level).to(weight)
    slower = bent * (1 + noise * bent)
    places = weight[0].numel() / weight.shape[1]  # of a kernel, each of which adds as much
    change = grad / deviation
    along = change.movedim(1, -1)
    if len(level["components"]) == weight.shape[1]:
        components = level["components"].to(weight)
        along = along * rest + (along @ components * (rates - rest)) @ components.mT
    else:  # pools of channels have other principal components
        along = along * rates.min()
    change = along.movedim(-1, 1) / (places * slower * deviation)
    if "varies" in level:  # where all inputs are alike, they differ from those of late by their common drift alone
        change = change * level["varies"].to(weight)
    if bias is None or not centred:
        return {weight: change}
    return {weight: change, bias: grads[bias] / slower - (change * mean).flatten(1).sum(1)}


def _rates(level: Level, trace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One over each eigenvalue and over a bound of the others; and by which share noise adds to a batch's curvature.

    Args:
        level: of the readout.
        trace: of the covariance of standardised input.
    """
    eigenvalues = level["eigenvalues"].to(trace)
    if level["steps"] <= KNOWN:  # none of them exceeds the trace
        bound = 1 + trace
        return (1 / bound).expand_as(eigenvalues), 1 / bound, torch.zeros_like(bound)
    bound = eigenvalues[-1].clamp(min=FLOOR)  # others are smaller
    rates = 1 / (eigenvalues + bound)
    scaled = (eigenvalues * rates).sum() + (trace - eigenvalues.sum()).clamp(min=0) / bound
    return rates, 1 / bound, NOISE * scaled / level["events"]


def as_grad(change: Tensor, p: Tensor) -> Tensor:
    """``-Δw`` in the memory format of the parameter, computed in place if ``Δw`` has it too."""
    return change.neg_() if change.stride() == p.stride() else torch.neg(change, out=torch.empty_like(p))
