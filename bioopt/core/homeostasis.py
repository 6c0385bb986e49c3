r"""Homeostasis: each neuron keeps the mean and deviation of its activity through its own weights and bias.

With running mean :math:`m_k` and deviation :math:`s_k` of a neuron's activity :math:`u_k`, after each step

.. math::
    w_k \leftarrow (2 s_k)^{-r}\, w_k, \qquad b_k \leftarrow b_k + a - \langle u_k \rangle

where :math:`r` falls from 1 in the first step to ``rate``: synaptic scaling (Turrigiano & Nelson, 2004), and intrinsic
plasticity (Triesch, 2005). In the first step, layers above already receive :math:`a + (u - m) / 2 s`, as they will
after it. At a deviation of 1/2, neurons that saturate at 1 stay in their range; for ReLU, which has no scale, any would
do. The mean :math:`a` is 0 in convolutions, and 1/2 in Linear layers, where ReLU at a mean of 0 would lose half of what
a layer receives: several narrow layers in a row would lose most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import whitening
from .errors import is_captured, warn
from .products import Events, along_channels, in_full, over_events, rows_of, squares_over_events
from .reach import weakly
from .sums import Sums
from .synapse import BUILT_IN, Synapse

if TYPE_CHECKING:
    from .recorder import Firing

RATE = 0.05  # of homeostasis, per step
DEVIATION = 0.5  # at which activity is kept
MEAN = 0.5  # likewise, in Linear layers
EVENTS = 16  # of a layer, before its activity is regulated: the deviation of fewer is mostly chance
WARM_UP = 1  # regulated steps before a rule acts; later, its first turns upset a readout that has already learned
CANCELLED = 1e-6  # the rounding of a difference of squares, as a share of them
ROUNDING = 1e-5  # a deviation below this share of the largest mean of a layer is rounding

#: of rules under homeostasis; `LocalRule` describes them
DEFAULTS: dict[str, Any] = {
    "homeostasis": True,
    "whitening": 1.0,
    "inhibition": 10.0,
    "tolerance": 0.4,
    "settle": 20.0,
}

#: of a synapse: ``"mean"`` and ``"variance"`` of each neuron, ``"input"``, the mean of presynaptic activity, in the
#: form of a weight, ``"events"`` that were seen, ``"steps"`` in which it was regulated, and with whitening
#: ``"covariance"`` and ``"whitening"``
Level: TypeAlias = dict[str, Any]


class Fresh(NamedTuple):
    """A new level, the rate of homeostasis, and `moving` of the level."""

    level: Level
    rate: float
    deviation: Tensor
    still: Tensor


class Regulator:
    """The running activity of the neurons of a rule, and what keeps its mean and deviation.

    Args:
        levels: returns the present levels by the index of the synapse; they are the rule's own state.
        sum_over_ranks: replaces tensors by their sums over ranks. Bound methods are held weakly.
    """

    def __init__(self, levels: Callable[[], dict[int, Level]], sum_over_ranks: Callable[[list[Tensor]], None]) -> None:
        self._levels_of_rule, self._sum = weakly(levels), weakly(sum_over_ranks)
        self._starts: dict[Synapse, tuple[Tensor, Tensor]] = {}  # mean and deviation in the first firing
        self._references: dict[Synapse, tuple[Tensor, Tensor]] = {}  # by which firings since the last step are measured
        self._fresh: dict[Synapse, Fresh] = {}  # of synapses with new levels since the last descent
        self._still: set[Synapse] = set()  # layers whose constant activity was warned of

    def _levels(self) -> dict[int, Level]:
        levels: dict[int, Level] = self._levels_of_rule()()
        return levels

    def level(self, synapse: Synapse) -> Level | None:
        """The present level of a synapse; ``None`` before its first step."""
        return self._levels().get(synapse.index)

    def acts(self, synapse: Synapse) -> bool:
        """Whether the activity of a synapse has settled, so that a rule may act."""
        level = self.level(synapse)
        return level is not None and level["steps"] >= WARM_UP

    def clear(self) -> None:
        """Drop what the firings since the last step have left."""
        self._starts.clear()
        self._references.clear()

    # -- as a synapse fires -------------------------------------------------------------------------------------

    def standardised(self, firing: Firing, u: Tensor) -> Tensor:
        """``(u - m) / s`` by the levels of the last step, or in the first by those of the first firing."""
        synapse, channel = firing.synapse, u.ndim + firing.synapse.channel_dim
        mean, deviation = self._reference(synapse, u.detach(), channel)
        scale = along_channels(deviation.reciprocal(), synapse)
        return torch.sub(u.detach(), along_channels(mean, synapse)).mul_(scale)

    def handed_on(self, firing: Firing, u: Tensor) -> Tensor:
        """What the network receives: regulated activity, until the first descent has made it the layer's own."""
        level = self.level(firing.synapse)
        begins = level is not None and not level["steps"] and level["events"] >= EVENTS
        if not begins and firing.synapse not in self._starts:
            return u
        return firing.activity(u).mul(DEVIATION).add_(kept_mean(firing.synapse)).to(u.dtype)

    def moments(self, firing: Firing, z: Tensor, acts: bool, group: dict[str, Any]) -> dict[str, Tensor]:
        """The sums over events that `followed` needs, and for a rule that acts those of its input and of ``z zᵀ``."""
        inhibited = acts and group.get("inhibition", 0)
        synapse, channel = firing.synapse, z.ndim + firing.synapse.channel_dim
        sums = {"z": over_events(z, channel)}
        if inhibited:
            sums["z_product"] = together(z, channel, synapse.pools)
        if inhibited and not torch.is_autocast_enabled(z.device.type):  # which rounds products
            sums["z_squared"] = sums["z_product"].diagonal(dim1=-2, dim2=-1).flatten().clone()
        else:
            sums["z_squared"] = squares_over_events(z, channel)
        if acts:
            x = firing.x.detach()
            sums["input"] = over_events(x, x.ndim + synapse.channel_dim, z.dtype)
            sums["inputs"] = z.new_tensor(float(x.numel() // x.shape[synapse.channel_dim]))
            if group.get("whitening", 0):
                level = self.level(synapse) or {}
                sums |= whitening.moments(synapse, x, level.get("input"))
        return sums

    def _reference(self, synapse: Synapse, u: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        """The mean and the deviation by which the firings of this step are measured."""
        if synapse in self._references:
            return self._references[synapse]
        level = self.level(synapse)
        if level is None:
            return self._start(synapse, in_full(u), channel)
        mean = level["mean"].to(u.device, torch.promote_types(u.dtype, torch.float32))
        found = self._references[synapse] = mean, moving(mean, level["variance"].to(mean), synapse)[0]
        return found

    def _start(self, synapse: Synapse, u: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        """The mean and the deviation of the first firing; 0 and 1 of too few events."""
        mean, count = over_events(u, channel), u.new_tensor(float(u.numel() // u.shape[channel]))
        self._sum()([mean, count])
        if count < EVENTS:
            found = self._references[synapse] = torch.zeros_like(mean), torch.ones_like(mean)
            return found
        mean /= count
        variance = over_events((u - along_channels(mean, synapse)).square(), channel)
        self._sum()([variance])
        deviation, still = moving(mean, variance.div_(count), synapse)
        if bool(still.all()) and synapse not in self._still:
            self._still.add(synapse)
            warn(
                f"the activity of layer '{synapse.name}' is the same for all {int(count)} events of the first batch: "
                "is its input constant? Homeostasis leaves it as it is until it varies"
            )
        if bool(deviation.isfinite().all()):  # else a loop may skip the batch
            self._starts[synapse] = self._references[synapse] = mean, deviation
        return mean, deviation

    # -- at the step --------------------------------------------------------------------------------------------

    def followed(self, sums: Sums, synapse: Synapse, rate: float, strength: float = 0.0) -> Fresh:
        """The level of a synapse after these firings; ``strength``: of whitening."""
        n, level = sums.events, self.level(synapse)
        seen = 0 if level is None else level["events"]
        r = max(rate, n / (seen + n))
        shift, square = sums.values["z"] / n, sums.values["z_squared"] / n
        if level is None:
            mean, deviation = self._starts.get(synapse, (torch.zeros_like(shift), torch.ones_like(shift)))
            variance = torch.zeros_like(mean)  # which has no weight in the first step
        else:
            mean = level["mean"].to(shift)
            variance = level["variance"].to(shift)
            known = self._references.get(synapse)
            deviation = moving(mean, variance, synapse)[0] if known is None else known[1].to(mean)
        steps = 0 if level is None else level["steps"]
        constant = self._constant(n, mean, shift, square, deviation, synapse)
        if constant is not None and steps < 1 / RATE and bool(constant.all()):
            n = 0  # a batch in which nothing varies tells nothing of the level
        square = torch.addcmul(square, shift, shift, value=-r)
        varied = torch.addcmul((1 - r) * variance, deviation.square(), square, value=r)
        new: Level = {
            "mean": torch.addcmul(mean, deviation, shift, value=r),
            "variance": varied if constant is None else torch.where(constant, variance, varied),
            "events": seen + n,
            "steps": steps,
        }
        if "input" in sums.values:
            own = in_weight_form(sums.values["input"] / sums.values["inputs"], synapse)
            before = None if level is None else level.get("input")
            new["input"] = own if before is None else torch.lerp(before.to(own), own, r)
        elif level is not None and "input" in level:
            new["input"] = level["input"]
        if strength:
            centred = level is not None and "input" in level
            new |= whitening.followed(sums.values, level, r, strength, steps - WARM_UP + 1, centred)
        new = new if level is None else kept_in_place(level, new)
        deviation, still = moving(new["mean"], new["variance"], synapse)
        self._fresh[synapse] = Fresh(new, rate, deviation, still if constant is None else still | constant)
        return self._fresh[synapse]

    def _constant(
        self, events: float, mean: Tensor, shift: Tensor, square: Tensor, deviation: Tensor, synapse: Synapse
    ) -> Tensor | None:
        """Which neurons had the same activity at all events of a step; ``None`` for too few events to tell."""
        if events < EVENTS:
            return None
        # What is left of large numbers that cancel is rounding.
        within = torch.addcmul(square, shift, shift, value=-1 - CANCELLED).mul_(deviation.square())
        return moving(torch.addcmul(mean, deviation, shift), within, synapse)[1]

    @contextmanager
    def descending(self, commit: Callable[[dict[int, Level]], None]) -> Iterator[None]:
        """Regulate weights and biases after the descent that is made inside the ``with`` block."""
        fresh, self._fresh = self._fresh, {}
        levels = self._levels()
        ready = {s: self._present(new, levels[s.index], s) for s, new in fresh.items() if s.index in levels}
        ready = {s: new for s, new in ready.items() if new.level["events"] >= EVENTS}
        before = {
            s: (norms(s.weight), expected(s.weight, new.level), None if s.bias is None else s.bias.detach().clone())
            for s, new in ready.items()
        }
        yield
        if not ready:
            return
        new, done = dict(levels), set[Tensor]()
        for synapse, own in ready.items():
            new[synapse.index] = self._regulate(synapse, own, *before[synapse], done)
        commit(new)

    def _present(self, fresh: Fresh, level: Level, synapse: Synapse) -> Fresh:
        """``fresh``, unless another level was loaded since."""
        if fresh.level is level:
            return fresh
        mean, variance = (level[name].to(fresh.level[name]) for name in ("mean", "variance"))
        return Fresh(level, fresh.rate, *moving(mean, variance, synapse))

    def _regulate(
        self,
        synapse: Synapse,
        fresh: Fresh,
        norm: Tensor,
        of_input: Tensor,
        former: Tensor | None,
        done: set[Tensor],
    ) -> Level:
        """The new level after regulation; ``norm``, ``of_input`` and ``former``, the bias: from before the descent.

        Of two layers that share their weights, or their bias, the first regulates them; ``done``: those that were.
        """
        level, rate, deviation, still = fresh
        weight, steps = synapse.weight, level["steps"]
        mean, variance = (level[name].to(weight.device) for name in ("mean", "variance"))
        scales = rate > 0 and weight not in done
        r = max(rate, 1 / (1 + steps)) if scales else 0.0
        gain = (deviation / DEVIATION).pow(-r).masked_fill(still, 1)
        if steps:
            gain.clamp_(0.1, 10)
        scale = gain
        if weight.grad is not None:
            scale = gain * norm / norms(weight).clamp(min=1e-30)
        if scales:
            weight.mul_(along_neurons(scale.to(weight.dtype), weight))
        bias = synapse.bias
        mean = mean - of_input if former is None else mean - of_input - former.to(mean.dtype)
        mean = torch.addcmul(expected(weight, level), gain, mean)
        if (free := synapse.free_bias) is not None and rate and free not in done:
            free.copy_(kept_mean(synapse) - mean)
            mean = torch.full_like(mean, kept_mean(synapse))
        elif bias is not None:
            mean = mean + bias.detach().to(mean.dtype)
        done.update([weight, *([] if bias is None else [bias])])
        new = {**level, "mean": mean, "variance": variance * gain.square(), "steps": steps + 1}
        return kept_in_place(level, new)


def kept_mean(synapse: Synapse) -> float:
    """The mean at which neurons keep their activity."""
    return MEAN if synapse.weight.ndim == 2 and synapse.free_bias is not None else 0.0


def together(z: Tensor, channel: int, pools: int) -> Tensor:
    """The sum over events of ``z zᵀ`` in each pool, pools × neurons × neurons."""
    neurons, positions = z.shape[channel] // pools, z.shape[channel + 1 :].numel()
    if z.is_contiguous() and neurons <= positions:  # sample by sample, which needs no copy of the activity
        rows = z.view(-1, pools, neurons, positions)
        return (rows @ rows.mT).sum(0, dtype=z.dtype)
    rows = z if channel == z.ndim - 1 else z.movedim(channel, -1)
    rows = rows.reshape(-1, pools, neurons).movedim(0, 1)
    return (rows.mT @ rows).to(z.dtype)


def moving(mean: Tensor, variance: Tensor, synapse: Synapse) -> tuple[Tensor, Tensor]:
    """The deviation of each neuron, 1 where it does not move, and where that is."""
    deviation, offset = variance.clamp(min=0).sqrt_(), mean.abs()
    if synapse.bias is not None:  # which may cancel a constant input but for rounding
        offset.add_(synapse.bias.detach().abs())
    still = deviation <= offset.amax().mul(ROUNDING).add_(1e-20)  # of sums in which other neurons cancel less
    return deviation.masked_fill_(still, 1), still


def norms(weight: Tensor) -> Tensor:
    """The length of each neuron's weights, in single precision at least."""
    length: Tensor = torch.linalg.vector_norm(in_full(weight.detach()).flatten(1), dim=1)
    return length


def along_neurons(values: Tensor, weight: Tensor) -> Tensor:
    """One value per neuron, shaped to multiply its weights."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def in_weight_form(channels: Tensor, synapse: Synapse) -> Tensor:
    """A value for each input channel, shaped to multiply the weights."""
    weight, pools = synapse.weight, synapse.pools
    if type(synapse.layer) in BUILT_IN[1:]:
        rows = channels.view(pools, -1)
        rows = rows if pools == 1 else rows.repeat_interleave(len(weight) // pools, 0)
        shaped: Tensor = rows.view(*rows.shape, *[1] * (weight.ndim - 2))
        return shaped
    return channels.view(1, -1)


def expected(weight: Tensor, level: Level) -> Tensor:
    """The activity of each neuron for the mean input; 0 before that is known."""
    total: Tensor
    if "input" not in level:
        return torch.zeros(len(weight), dtype=level["mean"].dtype, device=weight.device)
    weight = in_full(weight.detach())
    if weight.ndim == 2:
        total = weight @ level["input"][0].to(weight)
        return total
    total = torch.mul(weight, level["input"].to(weight)).flatten(1).sum(1)
    return total


def kept_in_place(old: Level, new: Level) -> Level:
    """``new``; in a CUDA graph, whose replays write to the same memory, in the tensors of ``old``."""
    if not is_captured([old["mean"]]):
        return new
    if old["steps"] * RATE < 1:
        raise RuntimeError(
            f"running values settle in the first {round(1 / RATE)} steps, and the replay of a CUDA graph would repeat "
            "one of them: take these as ordinary steps before the capture"
        )
    for name, value in old.items():
        if isinstance(value, Tensor):
            value.copy_(new[name])
    return {**new, **{name: value for name, value in old.items() if isinstance(value, Tensor)}}


def rotate_(drive: Tensor, direction: Tensor) -> Tensor:
    """The part of ``drive`` that turns unit vectors, in place."""
    along = torch.linalg.vecdot(drive, direction).unsqueeze(-1)
    return drive.addcmul_(along, direction, value=-1)


def inhibit_(
    drive: Tensor, moment: Tensor, direction: Tensor, unit: Tensor, tolerance: float, strength: Tensor
) -> Tensor:
    """Subtract from the drive of each neuron the weights of those that are active together with it, in place.

    Args:
        drive: pools × neurons × inputs.
        moment: ``⟨z_k z_j⟩`` of each pool, pools × neurons × neurons.
        direction: the unit weight vectors, of the drive's shape.
        unit: the deviation of the activity of each unit vector.
        tolerance: correlations up to this are left alone.
        strength: of the inhibition.
    """
    size = moment.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12).rsqrt()
    correlation = moment.mul_(size.unsqueeze(-1)).mul_(size.unsqueeze(-2))
    correlation.diagonal(dim1=-2, dim2=-1).zero_()
    beyond = F.softshrink(correlation, tolerance)
    unit = unit.view(size.shape).clamp(min=1e-30)
    if drive.device.type == "cpu" and drive.shape[-2] >= 64:  # below, and elsewhere, a dense product is as fast
        found = beyond.flatten(0, 1).nonzero()
        if 8 * len(found) < beyond.numel():  # few neurons are active together
            return _inhibit_sparsely_(drive, beyond, direction, unit, strength, found)
    beyond.mul_((strength * unit).unsqueeze(-1)).div_(unit.unsqueeze(-2))
    return drive.baddbmm_(beyond, direction, alpha=-1)


def _inhibit_sparsely_(
    drive: Tensor, beyond: Tensor, direction: Tensor, unit: Tensor, strength: Tensor, found: Tensor
) -> Tensor:
    """As `inhibit_`; ``found`` are the indices of all that is not zero in ``beyond``."""
    unit, neurons = unit.flatten(), drive.flatten(0, 1)
    row, other = found.unbind(1)
    values = beyond.flatten(0, 1)[row, other]
    if len(drive) > 1:
        other = other + row.div(drive.shape[1], rounding_mode="floor") * drive.shape[1]
    values.mul_((strength * unit)[row]).div_(unit[other])
    first = torch.searchsorted(row, torch.arange(len(neurons)))
    neurons.sub_(F.embedding_bag(other, direction.flatten(0, 1), first, mode="sum", per_sample_weights=values))
    return drive


def of_unit_vectors(events: Events, level: Level, length: Tensor) -> Events:
    """Events with centred presynaptic activity, and the postsynaptic activity of the unit weight vectors."""
    synapse = events.synapse
    weight, bias = rows_of(synapse.weight.detach(), synapse), synapse.bias
    mean = rows_of(level["input"].to(weight).expand(1, *synapse.weight.shape[1:]), synapse)[0]
    offset = weight @ mean if bias is None else weight @ mean + bias.detach()
    u = (in_full(events.u) - offset) / length.clamp(min=1e-30)
    return replace(events, x=in_full(events.x) - mean, s=in_full(events.s), u=u)


def tensors_of(levels: Iterable[Level]) -> list[Tensor]:
    """All tensors of some levels."""
    return [value for level in levels for value in level.values() if isinstance(value, Tensor)]
