"""What the perturbation family shares: seeds and counts that fix all noise, work split over ranks, noisy activity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from ..core.acts import inject
from ..core.constraints import SEED, Constraint, one_of
from ..core.errors import require_finite, warn
from ..core.losses import mean_loss, mean_over_samples
from ..core.noise import NoiseSource, fill_normal_, fill_rademacher_
from ..core.params import Params, named_parameters_of, no_plastic_layer, synapses_of, unique
from ..core.probe import Probe
from ..core.readout import ReadoutOptions
from ..core.recorder import Firing
from ..core.rows import Rows
from ..core.rule import LearningRule, Visit
from ..core.synapse import BUILT_IN, Synapse

FILL = {"normal": fill_normal_, "rademacher": fill_rademacher_}
MICRO_BATCHES = "if the closure runs several micro-batches, estimate each by itself, add up their .grad, and descend"
HALF = (torch.float16, torch.bfloat16)
DISTRIBUTION: Constraint = one_of(*FILL)
CREDIT: Constraint = (lambda v: v in ("sample", "global"), "'sample' or 'global'")


class Perturbation(LearningRule):
    """What perturbation rules share: a seed and a step count, which are state, and the noise they make.

    Args:
        params: as of the rule.
        defaults: the rule's hyperparameters that may differ between groups.
        seed: of all noise.
        options: as in `LearningRule`. All ranks of a ``process_group`` see the same batch and share the work of a
            step; only losses travel.
    """

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[ReadoutOptions],
    ) -> None:
        self._noise = NoiseSource()
        super().__init__(params, defaults, readout=readout, **options)
        self._check_value("seed", seed, SEED)
        self._own_state = {"seed": seed, "step": 0}

    def _select_weights(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        return named_parameters_of(group["params"], self._exclusion), []

    def _plastic(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters that are not frozen, each with its group."""
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

    def _prepare(self, probe: Probe) -> None:
        """Before the first evaluation of a step; at the very first step, a closure that cannot be compared is found."""
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
        """Raise where two evaluations under the same circumstances differ."""
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
        """The direction of one member, parameter by parameter, so that never more than one is held."""
        draw = self._noise_of(member, fill)
        for i, p in enumerate(like):
            yield draw(torch.empty_like(p) if into is None else into[i])

    def _noise_of(
        self, member: int, fill: Callable[[Tensor, torch.Generator], Tensor] = fill_normal_
    ) -> Callable[[Tensor], Tensor]:
        """Fills one tensor after another with the noise of one member, or of one noisy pass."""
        state = self._own_state
        streams: dict[torch.device, torch.Generator] = {}

        def draw(into: Tensor) -> Tensor:
            if into.device not in streams:
                streams[into.device] = self._noise.stream(into.device, state["seed"], state["step"], member)
            return fill(into, streams[into.device])

        return draw

    def _require_change(self, option: str, plastic: list[tuple[Tensor, dict[str, Any]]], saved: list[Tensor]) -> None:
        """Raise where a perturbation has moved no weight, in the precision that it has; warn where too few moved."""
        count = moved = 0
        worst, least = 0.0, 0.0
        for (p, group), w in zip(plastic, saved, strict=True):
            # Under autocast, matrices are rounded once more.
            seen = self._known.autocast if p.ndim > 1 and self._known.autocast is not None else w.dtype
            kept = int((p.to(seen) == w.to(seen)).sum())
            count, moved = count + p.numel(), moved + p.numel() - kept
            if group[option] > 0 and kept > worst:
                worst, least = kept, 8 * torch.finfo(seen).eps * w.float().square().mean().sqrt().item()
                value, dtype = group[option], seen
        if not worst or count - moved <= count / 10:
            return
        share = f"{moved / count:.0%} of the weights" if moved else "no weight"
        what = (
            f"{type(self).__name__}: {option}={value} moves {share}, in the precision of {dtype}; "
            f"try {option}={least:.1g}"
        )
        if not moved:
            raise RuntimeError(what)
        warn(what)

    @contextmanager
    def _restored(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Gives a copy of the parameters, from which they are put back at the end, bit for bit, whatever happens."""
        saved = [p.detach().clone() for p in params]
        undo = partial(_put_back, params, saved)
        self._undo.append(undo)
        try:
            yield saved
        finally:
            if undo in self._undo:  # else `settled` was here first
                undo()
                self._undo.remove(undo)

    def _gathered(
        self,
        found: dict[int, Tensor],
        count: int,
        what: tuple[str, ...] = ("the loss",),
        total: Tensor | None = None,
    ) -> Tensor:
        """What all ``count`` evaluations have found, each made by one of the ranks, stacked in order.

        Args:
            found: by the evaluations that this rank has made, by their number; numbers in double precision where it
                has made none.
            count: of all of them.
            what: it is, for an error; several names for the entries of its first dimension.
            total: summed over the ranks in the same message.
        """
        none = torch.zeros(3, dtype=torch.float64, device=None if total is None else total.device)
        like = next(iter(found.values()), none)
        everything = torch.stack([found.get(i, torch.zeros_like(like)) for i in range(count)])
        self._sum_over_ranks([everything] if total is None else [everything, total])
        for i, name in enumerate(what):
            require_finite(self, name, [everything if len(what) == 1 else everything[:, i]])
        return everything

    def _mapped(self, evaluate: Callable[..., Tensor], *inputs: Any) -> Tensor | None:
        """The losses for all slices of the inputs in one evaluation, by `torch.func.vmap`; nothing where it fails.

        A warning says so once, and ``batched`` is then false.
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
        """Which of ``count`` pieces of work fall to this rank."""
        rank, ranks = self._ranks
        if count < ranks:
            raise ValueError(f"{type(self).__name__}: {what}={count} cannot be split over {ranks} ranks; raise it")
        return range(rank, count, ranks)


@torch.no_grad()
def _put_back(params: list[Tensor], saved: list[Tensor]) -> None:
    for p, w in zip(params, saved, strict=True):
        p.copy_(w)


class Record(NamedTuple):
    """One firing of a synapse."""

    synapse: Synapse
    u: Tensor
    rows: Rows | None  # where it ran on some of the samples

    @classmethod
    def of(cls, firing: Firing, u: Tensor) -> Record:
        """What fires now."""
        return cls(firing.synapse, u, firing.rows_of(u))

    @property
    def samples(self) -> int:
        """In the batch."""
        return len(self.u) if self.rows is None else self.rows.count

    def empty(self) -> Tensor:
        """What noise on all samples goes into: what a sample is given does not depend on the way that it takes."""
        if self.rows is None:
            return torch.empty_like(self.u.detach())
        return self.u.new_empty(self.rows.count, *self.u.shape[1:])

    def own(self, of_all: Tensor) -> Tensor:
        """Of what belongs to all samples, that of those which are here."""
        return of_all if self.rows is None else of_all[self.rows.index]


class NoisyActivity(Perturbation):
    """What rules share that put noise on postsynaptic activity: their synapses, and the noise of each noisy pass."""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        credit: str,
        distribution: str = "normal",
        *,
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[ReadoutOptions],
    ) -> None:
        self._check_value("credit", credit, CREDIT)
        super().__init__(params, defaults, seed=seed, readout=readout, **options)
        if not self._trained():
            raise ValueError(no_plastic_layer(type(self).__name__))
        self._check_value("distribution", distribution, DISTRIBUTION)
        self.credit = credit
        self.distribution = distribution
        self._swallowing: set[Synapse] = set()  # layers whose precision has been warned of
        self._first_is_sample: set[Synapse] = set()  # layers for which that is proven

    def _draws(self, sample: int) -> Callable[[Tensor], Tensor]:
        """Fills one tensor after another with the noise of one pass."""
        return self._noise_of(sample, FILL[self.distribution])

    def _drawn_again(self, sample: int, records: list[Record]) -> list[Tensor]:
        """The noise of one pass on each firing."""
        draw = self._draws(sample)
        return [draw(record.empty()) for record in records]

    def _require_plain(self, what: str, synapses: list[Synapse], way_out: str) -> None:
        """Raise for a synapse of another type than torch's own Linear and convolutions."""
        for synapse in synapses:
            if (kind := type(synapse.layer)) not in BUILT_IN:
                raise ValueError(
                    f"{what} knows {', '.join(t.__name__ for t in BUILT_IN[:-1])} and {BUILT_IN[-1].__name__}, not the "
                    f"{kind.__name__} '{synapse.name}': {way_out}"
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
        """What hands on noisy activity.

        Args:
            sample: the number of the pass.
            noise: takes the noise in.
            records: takes the firings in, with the activity that the noise is put on.
            width: of the noise; by default the ``sigma`` of each group.
        """
        draw = self._draws(sample)

        def visit(firing: Firing, u: Tensor) -> Tensor:
            record = Record.of(firing, u)
            drawn = draw(record.empty())
            if records is not None:
                records.append(record)
            sigma = self._width(firing.synapse) if width is None else width
            noisy = inject(u, record.own(drawn), sigma)
            if u.dtype in HALF and record.rows is None:  # credit goes to the noise that the precision allowed
                drawn = noisy.float().sub_(u.detach()).div_(sigma)
                self._require_noise(firing.synapse, drawn, u, sigma)
            noise.append(drawn)
            return noisy

        return visit

    def _require_noise(self, synapse: Synapse, noise: Tensor, u: Tensor, sigma: float) -> None:
        """Warn, at the first step, where half precision swallows more than half of the noise."""
        if self._own_state["step"] or synapse in self._swallowing or not noise.numel():
            return
        kept = (noise != 0).float().mean().item()
        if kept < 0.5:
            self._swallowing.add(synapse)
            least = 8 * torch.finfo(u.dtype).eps * u.detach().float().square().mean().sqrt().item()
            warn(
                f"{type(self).__name__}: sigma={sigma:g} reaches {kept:.0%} of the activity of layer '{synapse.name}', "
                f"in the precision of {u.dtype}; try sigma={least:.1g}"
            )

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
            noise: on each of them in this pass; used up.
            credit: each sample's, or one for all.
            width: of the noise, by which the credit is divided; by default the ``sigma`` of each group.
        """
        for i, (n, record) in enumerate(zip(noise, records, strict=True)):
            signal = credited(n, credit / (self._width(record.synapse) if width is None else width))
            if i == len(signals):
                signals.append(signal)
            else:
                signals[i] += signal

    def _width(self, synapse: Synapse) -> float:
        return float(self.param_groups[synapse.group]["sigma"])

    def _products(self, records: list[Record], signals: list[Tensor]) -> dict[Tensor, Tensor]:
        """The local products of presynaptic activity and teaching signals, summed over each weight's firings."""
        grads: dict[Tensor, Tensor] = {}
        for record, signal in zip(records, signals, strict=True):
            params, s = record.synapse.parameters(), record.own(signal).to(record.u.dtype)
            for p, g in zip(params, torch.autograd.grad(record.u, params, s), strict=True):
                grads[p] = grads[p] + g if p in grads else g
        return grads

    def _per_sample(self, records: list[Record], losses: Tensor, probe: Probe) -> bool:
        """Whether each sample is credited by itself; a scalar loss credits all together.

        Where another dimension of an output is as long as the batch (a sequence, say), four more evaluations, the first
        time, show whether the first dimension is the sample.
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
                    f"{shape} where there are {len(losses)} losses, one a sample, so its first dimension is "
                    f"not the sample. Use credit='global'; or, {MICRO_BATCHES}"
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
        """Disturb one place of the first dimension at a time: if it is a sample, the losses of others hardly change."""

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
                f"in which more than one dimension is as long as the batch of {size}, and a change at one place of the "
                "first dimension changes the losses of other samples as much as its own: the first dimension is not "
                "the sample (a sequence comes first?). Put samples first, or use credit='global'"
            )
        if own:
            self._first_is_sample.update(doubtful)


def ambiguous(synapse: Synapse, shape: torch.Size, samples: int) -> bool:
    """Whether another dimension of a layer's output than the first could count the samples."""
    channel = len(shape) + synapse.channel_dim
    others = [size for d, size in enumerate(shape) if d not in (0, channel)]
    return samples in others and type(synapse.layer) not in BUILT_IN[1:]  # convolutions take samples first


def compared(one: Tensor, other: Tensor) -> Tensor:
    """Of the losses of two evaluations: the mean of each, and that of their difference, sample by sample.

    In double precision, and the difference first: it is small, the losses are not.
    """
    return mean_loss(torch.stack([one, other, one - other]))


def credit_of(change: Tensor, per_sample: bool) -> Tensor:
    """The change of the mean loss that each sample is credited with, or one number for all."""
    return mean_over_samples(change) / len(change) if per_sample else change.mean()


def credited(noise: Tensor, credit: Tensor) -> Tensor:
    """Noise times its credit, in place: each sample's own, or one for all."""
    return noise.mul_(credit.view(-1, *[1] * (noise.ndim - 1)) if credit.ndim else credit)
