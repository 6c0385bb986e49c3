"""Base classes of the perturbation family: reproducible noise, work split over ranks, noisy activity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from ..core.acts import inject
from ..core.constraints import SEED, Constraint, one_of
from ..core.errors import require_finite, warn
from ..core.losses import mean_loss, mean_over_samples
from ..core.noise import NoiseSource, fill_normal_, fill_rademacher_
from ..core.params import Params, named_parameters_of, no_plastic_layer, synapses_of, unique
from ..core.probe import Probe
from ..core.products import over_events
from ..core.readout import GradientReadoutOptions
from ..core.recorder import Firing
from ..core.rows import Rows
from ..core.rule import LearningRule, Visit
from ..core.sums import add_up
from ..core.synapse import BUILT_IN, Synapse

FILL = {"normal": fill_normal_, "rademacher": fill_rademacher_}
MICRO_BATCHES = "if the closure runs several micro-batches, estimate each by itself, add up their .grad, and descend"
HALF = (torch.float16, torch.bfloat16)
TRUNK_LR = 1e-4  # default rate of Adam below a readout
SUMS_FROM = 8  # directions to draw again: summing the weights over two processes was measured to take as long as 2 to 4
LEAST = 1e-3  # size of a layer's activity in units of its root mean square: noise below that would be rounded away
CLEAR = 4  # times the rounding: from this width on, estimates in bfloat16 were measured to be as good as in float32
DISTRIBUTION: Constraint = one_of(*FILL)
CREDIT: Constraint = (lambda v: v in ("sample", "global"), "'sample' or 'global'")


class Perturbation(LearningRule):
    """A rule with noise that is determined by a seed and a step count, which are state.

    Args:
        params: as of the rule.
        defaults: the rule's hyperparameters that may differ between groups.
        relative: whether widths are relative to the size of what they perturb. The default ``descent`` is then Adam,
            whose steps are as long for small gradients as for large ones, and else SGD, as published.
        seed: of all noise.
        options: as in `LearningRule`. The ranks of a ``process_group`` have the same batch and share the work of a
            step. They exchange losses, or the sums of their parts of the estimate (see `_sums_travel`).
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        relative: bool = True,
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[GradientReadoutOptions],
    ) -> None:
        self._require_bool("relative", relative)
        self._noise = NoiseSource()
        if relative and "momentum" in options and "descent" not in options:
            raise TypeError(
                f"{type(self).__name__}(momentum={options['momentum']}): the default step is that of Adam, which has "
                "betas. Write descent=torch.optim.SGD for momentum, or relative=False for the rule as published"
            )
        options.setdefault("descent", Adam if relative else SGD)
        super().__init__(params, defaults, readout=readout, **options)
        self._check_value("seed", seed, SEED)
        self.relative = relative
        self._widths: dict[Synapse | Tensor, Width] = {}  # of the changes of each layer or parameter in the first step
        self._own_state = {"seed": seed, "step": 0}

    def _select_weights(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        return named_parameters_of(group["params"], self._exclusion), []

    def _plastic(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters that are not frozen, with their groups."""
        plastic = [
            (p, group)
            for group in self.param_groups
            if not group["readout"]
            for p in group["params"]
            if p.requires_grad
        ]
        if not plastic:
            raise RuntimeError(f"{type(self).__name__}: every parameter is frozen (requires_grad=False)")
        return plastic

    def _rate(self, lr: float | None, alone: float, relative: bool, readout: str | None) -> float:
        """``lr``, by default ``alone``; above a readout that learns from its own error, a slower trunk is better.

        A published rule has no default: its rate depends on the network.
        """
        if lr is not None:
            return lr
        if not relative:
            raise TypeError(
                f"{type(self).__name__}(relative=False) needs lr=: with one width for all layers and steps of SGD, the "
                "rate depends on the network"
            )
        return alone if readout is None else TRUNK_LR

    def _weight_sizes(self, params: list[Tensor]) -> list[float]:
        """The size of each parameter that a width refers to: 1 for widths that are not relative."""
        return weight_sizes(params) if self.relative else [1.0] * len(params)

    def _prepare(self, probe: Probe) -> None:
        """Before the first evaluation of a step; in the first step, check that the closure is repeatable."""
        for p in self._trained():
            p.grad = None
        if not self._own_state["step"]:
            self._require_repeatable(probe)

    def _require_repeatable(self, probe: Probe) -> None:
        with self._cutting(None):
            one, two = probe(), probe()
        self._compare(probe, one, two)
        probe.restart()

    def _compare(self, probe: Probe, one: Tensor, two: Tensor) -> None:
        """Raise if two evaluations under the same conditions differ, and warn if they differ little."""
        if one.shape == two.shape and torch.equal(one, two):
            return
        moved = probe.moved()
        state = (
            f"Its modules keep tensors besides parameters and buffers ({', '.join(moved)}), which an evaluation "
            "changes: reset them at the start of the closure. "
        )
        if one.shape != two.shape or not torch.allclose(one, two, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise RuntimeError(
                f"{type(self).__name__} compares losses, but the closure is not repeatable: from one random state and "
                f"the same weights it gave {one.float().mean().item():.6g} and {two.float().mean().item():.6g}. "
                f"{state if moved else ''}Draw the batch before step(closure), not inside; take random numbers in the "
                "model from torch's global generators"
            )
        if moved:
            warn(f"{type(self).__name__} compares losses, and two evaluations of the closure differ a little. {state}")

    def _directions(
        self,
        member: int,
        like: list[Tensor],
        into: list[Tensor] | None = None,
        fill: Callable[[Tensor, torch.Generator], Tensor] = fill_normal_,
    ) -> Iterator[Tensor]:
        """The direction of one member, parameter by parameter, so that only one is in memory at a time."""
        draw = self._noise_of(member, fill)
        for i, p in enumerate(like):
            yield draw(torch.empty_like(p) if into is None else into[i])

    def _noise_of(
        self, member: int, fill: Callable[[Tensor, torch.Generator], Tensor] = fill_normal_
    ) -> Callable[[Tensor], Tensor]:
        """A function that fills one tensor after another with the noise of one member or noisy pass."""
        state = self._own_state
        streams: dict[torch.device, torch.Generator] = {}

        def draw(into: Tensor) -> Tensor:
            if into.device not in streams:
                streams[into.device] = self._noise.stream(into.device, state["seed"], state["step"], member)
            return fill(into, streams[into.device])

        return draw

    def _require_change(
        self, option: str, plastic: list[tuple[Tensor, dict[str, Any]]], saved: list[Tensor], sizes: list[float]
    ) -> None:
        """Raise if a perturbation changes no weight in its precision; warn if it changes too few."""
        count = moved = 0
        worst, least = 0.0, 0.0
        for (p, group), w, size in zip(plastic, saved, sizes, strict=True):
            seen = self._precision_of(p)
            kept = int((p.to(seen) == w.to(seen)).sum())
            count, moved = count + p.numel(), moved + p.numel() - kept
            if group[option] > 0 and kept > worst:
                worst, least = kept, CLEAR * roundoff(seen) * w.float().square().mean().sqrt().item() / size
                value, dtype = group[option], seen
        if not worst or count - moved <= count / 3:  # as many as a width of the rounding itself leaves
            return
        share = f"{moved / count:.0%} of the weights" if moved else "no weight"
        what = (
            f"{type(self).__name__}: {option}={value} moves {share}, in the precision of {dtype}; "
            f"try {option}={least:.1g}"
        )
        if not moved:
            raise RuntimeError(what)
        warn(what)

    def _precision_of(self, p: Tensor) -> torch.dtype:
        """The precision in which the network sees a parameter: autocast rounds matrices."""
        return self._known.autocast if p.ndim > 1 and self._known.autocast is not None else p.dtype

    def _note_weight_width(self, p: Tensor, value: float, width: float) -> None:
        """In the first step, note the width of a change of a parameter, and the value of the option that sets it."""
        if not self._own_state["step"] and p not in self._widths and (size := rms(p).item()):
            self._widths[p] = Width(f"'{self._names()[p]}'", self._precision_of(p), value, width / size)

    def _require_widths(self, option: str) -> None:
        """Warn, in the first step, of the width that its precision can carry least, if it cannot."""
        if self._own_state["step"] or not self._widths:
            return
        worst = min(self._widths.values(), key=Width.steps)
        if worst.steps() < 1:
            least = worst.value * CLEAR / worst.steps()
            warn(
                f"{type(self).__name__}: {option}={worst.value:g} changes {worst.what} by {worst.share:.1g} of its "
                f"size, less than {worst.dtype} rounds it by ({roundoff(worst.dtype):.1g}), so that the estimate "
                f"follows the gradient little; try {option}={least:.1g}"
            )

    @contextmanager
    def _restored(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield a copy of the parameters, and always restore them from it in the end, bit for bit."""
        saved = [p.detach().clone() for p in params]
        undo = partial(_put_back, params, saved)
        self._undo.append(undo)
        try:
            yield saved
        finally:
            if undo in self._undo:  # `settled` may have done it
                undo()
                self._undo.remove(undo)

    def _gathered(
        self,
        found: dict[int, Tensor],
        count: int,
        what: tuple[str, ...] = ("the loss",),
        total: Tensor | None = None,
        alone: bool = False,
    ) -> Tensor:
        """The results of all ``count`` evaluations, each made by one of the ranks, stacked in order.

        Args:
            found: the results of this rank, by the number of the evaluation; if empty, three numbers in double
                precision are assumed.
            count: the number of evaluations of all ranks.
            what: the name of a result in errors; several names for the entries of its first dimension.
            total: to be summed over the ranks in the same message.
            alone: return the results of this rank, unchecked and without a message: those of others do not matter.
        """
        if alone:
            return torch.stack(list(found.values()))
        none = torch.zeros(3, dtype=torch.float64, device=None if total is None else total.device)
        like = next(iter(found.values()), none)
        everything = torch.stack([found.get(i, torch.zeros_like(like)) for i in range(count)])
        self._sum_over_ranks([everything] if total is None else [everything, total])
        for i, name in enumerate(what):
            require_finite(self, name, [everything if len(what) == 1 else everything[:, i]])
        return everything

    def _sums_travel(self, count: int) -> bool:
        """Whether each rank adds up the directions of its own evaluations, and the sums are exchanged.

        Otherwise losses are exchanged, and each rank draws the directions of all ``count`` evaluations again, which
        gives the same bits on any number of ranks. The choice depends on counts alone: it is the same on all ranks, in
        every run and after a resumption. Drawing and exchanging both take a time in proportion to the number of
        weights, so that a measurement would add little.
        """
        return count - math.ceil(count / self._ranks[1]) >= SUMS_FROM

    def _summed(self, grads: dict[Tensor, Tensor], losses: Tensor) -> dict[Tensor, Tensor]:
        """The sum over the ranks of their parts of the estimate; sums ``losses`` in place, in the same message."""
        params = [p for group in self.param_groups if not group["readout"] for p in group["params"] if p.requires_grad]
        parts = []
        for p in params:  # in single precision at least, as half precision would round once for each rank
            part = grads[p] if p in grads else torch.zeros_like(p)
            part = part.clone() if 0 in part.stride() else part  # an expanded tensor cannot be written to
            parts.append(part.to(torch.promote_types(part.dtype, torch.float32)))
        # A layer that ran on none of the ranks has no estimate, which is not an estimate of zero.
        found = torch.tensor([float(p in grads) for p in params], device=losses.device)
        self._sum_over_ranks([*parts, found, losses])
        require_finite(self, "the loss", [losses])
        return {p: part.to(p.dtype) for p, part, n in zip(params, parts, found.tolist(), strict=True) if n}

    def _mapped(self, evaluate: Callable[..., Tensor], *inputs: Any) -> Tensor | None:
        """The losses for all slices of the inputs in one evaluation, by `torch.func.vmap`.

        If vmap fails: ``None``, with a warning, and ``batched`` is false from then on.
        """
        try:
            losses: Tensor = torch.func.vmap(evaluate, randomness="same")(*inputs)
        except RuntimeError as error:
            self.batched = False
            warn(
                f"{type(self).__name__}(batched=True): torch.func.vmap cannot run this closure "
                f"({str(error).splitlines()[0]}); its evaluations are made one by one"
            )
            return None
        return losses

    def _share(self, what: str, count: int) -> range:
        """The share of this rank in ``count`` evaluations."""
        rank, ranks = self._ranks
        if count < ranks:
            raise ValueError(f"{type(self).__name__}: {what}={count} cannot be split over {ranks} ranks; raise it")
        return range(rank, count, ranks)


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of a rounded number: 2^-8 in bfloat16."""
    return torch.finfo(dtype).eps / 2


class Width(NamedTuple):
    """The width of a perturbation, beside the precision of what it perturbs."""

    what: str
    dtype: torch.dtype
    value: float  # of the option
    share: float  # of the size of what is perturbed

    def steps(self) -> float:
        """The width in units of the rounding."""
        return self.share / roundoff(self.dtype)


def count_of(given: int | None, default: int, relative: bool) -> int:
    """The number of evaluations of a step: as given, or by default several, but one for a rule as published."""
    return (default if relative else 1) if given is None else given


def weight_sizes(params: list[Tensor]) -> list[float]:
    r"""The size of each parameter: the root mean square of its entries.

    A vector that follows a parameter of equally many neurons has at least the size of that parameter, since a bias is a
    weight whose presynaptic activity is 1: so biases that start at 0 are perturbed like the weights of their layer. A
    matrix of zeros has the size :math:`1 / \sqrt{inputs}` of a usual initial weight, any other vector of zeros the
    size 1.
    """
    if not params:
        return []
    norms = torch.stack([rms(p).to(params[0].device) for p in params]).tolist()
    sizes: list[float] = []
    for i, (p, size) in enumerate(zip(params, norms, strict=True)):
        if p.ndim < 2 and i and params[i - 1].shape[:1] == p.shape:
            size = max(size, sizes[-1])
        sizes.append(size or (p[0].numel() ** -0.5 if p.ndim > 1 and p.numel() else 1.0))
    return sizes


def rms(tensor: Tensor) -> Tensor:
    """The root mean square of the entries, in double precision; 0 for no entries."""
    return norm_of(tensor).div(max(tensor.numel(), 1) ** 0.5)


def norm_of(tensor: Tensor) -> Tensor:
    """The norm of all entries together, in double precision."""
    exact = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=exact)
    return norm.double()


@torch.no_grad()
def _put_back(params: list[Tensor], saved: list[Tensor]) -> None:
    for p, w in zip(params, saved, strict=True):
        p.copy_(w)


class Record(NamedTuple):
    """One firing of a synapse, with its output."""

    synapse: Synapse
    u: Tensor
    rows: Rows | None  # the samples that it ran on; None: all

    @classmethod
    def of(cls, firing: Firing, u: Tensor) -> Record:
        """The record of a firing with this output."""
        return cls(firing.synapse, u, firing.rows_of(u))

    @property
    def samples(self) -> int:
        """The number of samples in the batch."""
        return len(self.u) if self.rows is None else self.rows.count

    def empty(self) -> Tensor:
        """A tensor for noise on all samples, so that a sample's noise does not depend on its pathway."""
        if self.rows is None:
            return torch.empty_like(self.u.detach())
        return self.u.new_empty(self.rows.count, *self.u.shape[1:])

    def own(self, of_all: Tensor) -> Tensor:
        """The rows of the samples that the synapse ran on."""
        return of_all if self.rows is None else of_all[self.rows.index]


class NoisyActivity(Perturbation):
    """A rule with noise on postsynaptic activity.

    Unless widths are as published, weights learn from centred presynaptic activity (``centre_inputs``).
    """

    centres_inputs = True

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        credit: str,
        distribution: str = "normal",
        *,
        relative: bool = True,
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[GradientReadoutOptions],
    ) -> None:
        self._check_value("credit", credit, CREDIT)
        self._centre_unless(options, relative is not True)
        super().__init__(params, defaults, relative=relative, seed=seed, readout=readout, **options)
        if not self._trained():
            raise ValueError(no_plastic_layer(type(self).__name__))
        self._check_value("distribution", distribution, DISTRIBUTION)
        self.credit = credit
        self.distribution = distribution
        self._first_is_sample: set[Synapse] = set()  # layers whose first dimension was found to be the sample
        self._sizes: dict[Synapse, float] = {}  # of each layer's activity, for relative widths; replaced in each step

    def _draws(self, sample: int) -> Callable[[Tensor], Tensor]:
        """A function that fills one tensor after another with the noise of one pass."""
        return self._noise_of(sample, FILL[self.distribution])

    def _drawn_again(self, sample: int, records: list[Record]) -> list[Tensor]:
        """The noise of one pass on each firing, drawn again."""
        draw = self._draws(sample)
        return [draw(record.empty()) for record in records]

    def _require_built_in(self, what: str, synapses: list[Synapse], remedy: str) -> None:
        """Raise for a synapse of another type than torch's own Linear and convolutions."""
        for synapse in synapses:
            if (kind := type(synapse.layer)) not in BUILT_IN:
                raise ValueError(
                    f"{what} knows {', '.join(t.__name__ for t in BUILT_IN[:-1])} and {BUILT_IN[-1].__name__}, not the "
                    f"{kind.__name__} '{synapse.name}': {remedy}"
                )

    def _select_synapses(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        synapses = synapses_of(type(self).__name__, group["params"], self._exclusion)
        return unique([named for s in synapses for named in s.named_parameters()]), synapses

    def _injection(
        self,
        sample: int,
        noise: list[Tensor],
        records: list[Record] | None = None,
        width: float | None = None,
    ) -> Visit:
        """A visitor that adds noise to activity.

        Args:
            sample: the number of the pass.
            noise: to be filled with the noise of each firing.
            records: to be filled with the firings.
            width: of the noise, in place of the ``sigma`` of each group.
        """
        draw = self._draws(sample)

        def visit(firing: Firing, u: Tensor) -> Tensor:
            record = Record.of(firing, u)
            drawn = draw(record.empty())
            if records is not None:
                records.append(record)
            if self.relative and firing.synapse not in self._sizes:  # a rule without a clean pass, in its first step
                found: dict[Synapse, Activity] = {}
                add_activity(found, firing.synapse, u)
                self._sizes |= sizes_of(found)
            sigma = self._width(firing.synapse, width)
            self._note_width(firing.synapse, u, sigma, width)
            noisy = inject(u, record.own(drawn), sigma)
            if u.dtype in HALF and record.rows is None:  # credit the noise that the precision preserved
                if u.dtype == torch.bfloat16:
                    drawn = torch.sub(noisy, u.detach(), out=drawn).div_(sigma)
                else:  # float16 has too small a range for products with a credit
                    drawn = noisy.float().sub_(u.detach()).div_(sigma)
            noise.append(drawn)
            return noisy

        return visit

    def _note_width(self, synapse: Synapse, u: Tensor, width: float | Tensor, value: float | None = None) -> None:
        """In the first step, note the width of the noise on a layer's activity, at its first firing.

        Args:
            synapse: the layer.
            u: its activity.
            width: of the noise.
            value: of the option that sets it, in place of the ``sigma`` of the group.
        """
        if self._own_state["step"] or synapse in self._widths or not (size := rms(u).item()):
            return
        value = float(self.param_groups[synapse.group]["sigma"]) if value is None else value
        what = f"the activity of layer '{synapse.name}'"
        self._widths[synapse] = Width(what, u.dtype, value, float(width) / size)

    def _credit(
        self,
        signals: list[Tensor],
        records: list[Record],
        noise: list[Tensor],
        credit: Tensor,
        width: float | None = None,
    ) -> None:
        """Add to the teaching signal of each firing its noise in one pass, times the credit of the pass.

        Args:
            signals: empty before the first pass.
            records: the firings.
            noise: on each of them in this pass; overwritten.
            credit: of each sample, or one for all.
            width: of the noise, by which the credit is divided, in place of the ``sigma`` of each group.
        """
        for i, (n, record) in enumerate(zip(noise, records, strict=True)):
            signal = credited(n, credit / self._width(record.synapse, width))
            if i == len(signals):
                signals.append(signal)
            else:
                signals[i] += signal

    def _width(self, synapse: Synapse, width: float | None = None) -> float:
        """The width of a layer's noise: ``sigma`` of its group, or another, times the size of its activity."""
        width = float(self.param_groups[synapse.group]["sigma"]) if width is None else width
        return width * self._sizes.get(synapse, 1.0)

    def _products(self, records: list[Record], signals: list[Tensor]) -> dict[Tensor, Tensor]:
        """The local products of presynaptic activity and teaching signals, summed over each weight's firings."""
        grads: dict[Tensor, Tensor] = {}
        for record, signal in zip(records, signals, strict=True):
            params, s = record.synapse.parameters(), record.own(signal).to(record.u.dtype)
            add_up(grads, zip(params, torch.autograd.grad(record.u, params, s), strict=True))
        return grads

    def _per_sample(self, records: list[Record], losses: Tensor, probe: Probe) -> bool:
        """Whether each sample has its own credit; a scalar loss credits all samples alike.

        If another dimension of an output is as long as the batch (such as a sequence), four more evaluations, once,
        find out whether the first dimension is the sample.
        """
        if not records:
            raise RuntimeError(self._coverage.none_fired())
        if self.credit == "global" or losses.ndim == 0:
            return False
        for record in records:
            if record.u.ndim < 2 or record.samples != len(losses):
                shape = (record.samples, *record.u.shape[1:])
                raise RuntimeError(
                    f"{type(self).__name__}(credit='sample'): layer '{record.synapse.name}' gave an output of shape "
                    f"{shape} where there are {len(losses)} losses, one per sample, so its first dimension is not the "
                    f"sample. Use credit='global'; or, {MICRO_BATCHES}"
                )
        doubtful = {
            record.synapse: None
            for record in records
            if record.rows is None and ambiguous(record.synapse, record.u.shape, len(losses))
        }
        if not doubtful.keys() <= self._first_is_sample:
            self._require_sample_first(list(doubtful), records, len(losses), probe)
        return True

    def _require_sample_first(self, doubtful: list[Synapse], records: list[Record], size: int, probe: Probe) -> None:
        """Disturb one index of the first dimension at a time: if it is a sample, the losses of others hardly change."""

        def evaluated(place: int | None) -> Tensor:
            def disturb(firing: Firing, u: Tensor) -> Tensor | None:
                if place is None or firing.synapse not in doubtful or len(u) != size:
                    return None
                u = u.detach().clone()
                u[place] += u.float().square().mean().sqrt().to(u.dtype)
                return u

            with self._cutting(disturb):
                return mean_over_samples(probe()).double()

        before = evaluated(None)
        own = others = 0.0
        for place in sorted({0, size // 2, size - 1}):
            change = (evaluated(place) - before).abs()
            own += change[place].item()
            others += (change.sum() - change[place]).item() / max(size - 1, 1)
        if others > own / 2:
            shape = next(tuple(record.u.shape) for record in records if record.synapse is doubtful[0])
            raise RuntimeError(
                f"{type(self).__name__}(credit='sample'): layer '{doubtful[0].name}' gave an output of shape {shape}, "
                f"in which more than one dimension is as long as the batch of {size}, and a change at one index of the "
                "first dimension changes the losses of other samples as much as its own: the first dimension is not "
                "the sample (a sequence comes first?). Put samples first, or use credit='global'"
            )
        if own:
            self._first_is_sample.update(doubtful)


def ambiguous(synapse: Synapse, shape: torch.Size, samples: int) -> bool:
    """Whether another dimension of a layer's output than the first may be the sample."""
    channel = len(shape) + synapse.channel_dim
    others = [size for d, size in enumerate(shape) if d not in (0, channel)]
    return samples in others and type(synapse.layer) not in BUILT_IN[1:]  # convolutions take samples first


class Activity(NamedTuple):
    """Sums over the events of a layer's firings, of which its size is made."""

    square: Tensor  # over all neurons
    neurons: Tensor  # of each
    events: int


def add_activity(found: dict[Synapse, Activity], synapse: Synapse, u: Tensor) -> None:
    """Add a firing to the sums of a layer's activity.

    To be called as the layer fires: an activation in place may overwrite ``u``.
    """
    u, channel = u.detach(), u.ndim + synapse.channel_dim
    exact = torch.promote_types(u.dtype, torch.float32)
    new = Activity(norm_of(u).square(), over_events(u, channel, exact).double(), u.numel() // max(u.shape[channel], 1))
    if (known := found.get(synapse)) is not None:
        new = Activity(known.square + new.square, known.neurons + new.neurons, known.events + new.events)
    found[synapse] = new


def sizes_of(found: dict[Synapse, Activity]) -> dict[Synapse, float]:
    """The size of each layer's activity: the root of `powers_of`.

    A layer without any activity (whose weights are zero, say) has the size 1, so that it can begin to learn.
    """
    return {synapse: power**0.5 or 1.0 for synapse, power in powers_of(found).items()}


def powers_of(found: dict[Synapse, Activity]) -> dict[Synapse, float]:
    """The variance of each layer's activity over events, as a mean over its neurons.

    Of a single event it is the mean square of the activity itself, and it is at least a millionth of that.
    """
    if not found:
        return {}
    device = next(iter(found.values())).square.device
    both = [torch.stack([one.square, one.neurons.square().sum() / max(one.events, 1)]) for one in found.values()]
    powers = dict[Synapse, float]()
    sums = torch.stack([values.to(device) for values in both]).tolist()
    for (synapse, one), (square, of_means) in zip(found.items(), sums, strict=True):
        neurons = max(len(one.neurons), 1)
        mean_square = square / (neurons * max(one.events, 1))
        variance = (square - of_means) / (neurons * (one.events - 1)) if one.events > 1 else mean_square
        powers[synapse] = max(variance, LEAST**2 * mean_square)
    return powers


def compared(one: Tensor, other: Tensor) -> Tensor:
    """The mean loss of each of two evaluations, and the mean of their difference.

    The difference, small beside the losses, is taken sample by sample before the mean in double precision.
    """
    return mean_loss(torch.stack([one, other, one - other]))


def credit_of(change: Tensor, per_sample: bool) -> Tensor:
    """Each sample's share in the change of the mean loss, or the change itself."""
    return mean_over_samples(change) / len(change) if per_sample else change.mean()


def credited(noise: Tensor, credit: Tensor) -> Tensor:
    """Noise times its credit, of each sample or one for all, in place."""
    if noise.dtype == torch.bfloat16:  # two precisions in one operation take three times as long
        credit = credit.to(noise.dtype)
    return noise.mul_(credit.view(-1, *[1] * (noise.ndim - 1)) if credit.ndim else credit)
