"""Forward gradients: a random direction is credited with the derivative of the loss along it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack, final

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..core._torch_private import forward_gradients_enabled, in_dual_level
from ..core.constraints import POSITIVE, POSITIVE_INT
from ..core.errors import warn
from ..core.losses import mean_loss
from ..core.params import Params, groups_of, named_modules_of
from ..core.probe import NO_TANGENT, Probe, prepare_forward_ad
from ..core.readout import GradientReadoutOptions
from ..core.recorder import Firing
from ..core.rule import Estimate
from ..core.synapse import Synapse
from .base import FILL, Activity, NoisyActivity, Record, add_activity, count_of, credit_of, sizes_of

SPACES = ("weights", "activities")
OUTCOME = ("the loss", "the slope of the loss")


@final
class ForwardGradient(NoisyActivity):
    r"""The exact slope of the loss along random directions of weights or activities, without a backward pass.

    .. math::
        \hat g = \frac{1}{S} \sum_{i=1}^{S} (\nabla L \cdot z_i)\; z_i, \qquad
        \langle z_i z_i^\top \rangle = I, \qquad \Delta w = -\hat g

    with :math:`S` = ``samples`` directions; the forward pass computes the directional derivative :math:`\nabla L \cdot
    z` of the mean loss (forward-mode automatic differentiation). The mean of :math:`\hat g` is the gradient, exactly
    and for any :math:`S`; `WeightPerturbation` tends to this rule as its ``sigma`` goes to 0.

    ``space="activities"`` draws directions of postsynaptic activity :math:`u` in place of weights, and credits each
    sample with its own slope, as `NodePerturbation` does in the limit of small noise: :math:`\Delta W = -\langle
    (\nabla L \cdot \xi)\,\xi\,x^\top \rangle`. There are fewer neurons than weights, and each sample is an experiment,
    so that the estimate has far less noise. It is the default where the rule is given modules; bare parameters show no
    activity, and many more ``samples`` are needed for them.

    By default directions are relative: of a weight tensor, in units of its root mean square (biases as
    `WeightPerturbation` describes), and of activity, in units of its size in a clean pass (see `NodePerturbation`). The
    mean of the estimate stays the gradient; the noise is shared fairly between layers of any scale. With directions of
    activity, weights learn from presynaptic activity less its running mean (``centre_inputs``). With ``relative=False``
    directions are standard normal, as published, and the step is that of SGD.

    Cost of a step: ``samples`` forward passes with derivatives, each the work of two to three ordinary ones; with
    ``space="activities"`` one local product more, and one ordinary pass that measures activities if ``relative``. Batch
    statistics advance once; dropout masks are the same for all directions. If an operator has no forward derivative,
    slopes are measured by central differences, with one warning.

    Args:
        params: the model, or parameters, or named parameters. ``space="activities"`` needs the model (or modules).
        lr: learning rate of ``descent``; by default 2e-3 (of weights 5e-4), and with a readout 1e-4. With
            ``relative=False`` it must be given.
        samples: :math:`S`, the number of directions per step; by default 8, or 1 with ``relative=False``.
        space: ``"weights"`` or ``"activities"``; by default activities for modules, and weights for
            parameters and with ``relative=False``.
        relative: whether directions are relative to the size of weights or activity.
        credit: of activities: ``"sample"`` (each sample its own slope) or ``"global"``. A scalar loss is always global.
        distribution: of the directions' entries: ``"normal"``, or ``"rademacher"``, -1 and 1, drawn in a third of the
            time.
        difference: the step to each side of the central differences, in units of a direction.
        options: the keywords that follow.
        seed: of the directions; with the step and the sample it determines each.
        descent: the `torch.optim` class that makes the step, by default Adam, or SGD with ``relative=False``; its
            options as further keywords.
        process_group: split the directions over these ranks, which have the same batch. They exchange slopes, or, if
            the others have 8 directions or more, the sums of their own: equal to one process to rounding.

    Raises:
        ValueError: a hyperparameter out of range; with activities, a model without plastic layers.
        TypeError: with activities, bare parameters.
        RuntimeError: a step without a closure; a non-finite loss (nothing is changed then).

    Sources: A. G. Baydin, B. A. Pearlmutter, D. Syme, F. Wood & P. Torr (2022), *Gradients without backpropagation*;
    of activities: M. Ren, S. Kornblith, R. Liao & G. Hinton (2023), *Scaling forward gradient with local losses*.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,  # η
        *,
        samples: int | None = None,  # S
        space: str | None = None,
        relative: bool = True,
        credit: str = "sample",
        distribution: str = "normal",
        difference: float = 1e-3,
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[GradientReadoutOptions],
    ) -> None:
        groups = groups_of(params)
        if space is None:
            watchable = all(named_modules_of(group["params"]) for group in groups)
            space = "activities" if relative and watchable else "weights"
        if space not in SPACES:
            raise ValueError(f"ForwardGradient: space={space!r} must be one of {', '.join(SPACES)}")
        self.space = space
        self.trains_whole_modules = space == "weights"
        lr = self._rate(lr, 2e-3 if space == "activities" else 5e-4, relative, readout)
        super().__init__(
            groups, {"lr": lr}, credit, distribution, relative=relative, seed=seed, readout=readout, **options
        )
        samples = count_of(samples, 8, relative)
        self._check_value("samples", samples, POSITIVE_INT)
        self._check_value("difference", difference, POSITIVE)
        self.samples = samples
        self.difference = difference
        self._by_differences = False  # an operator without a forward derivative was met
        prepare_forward_ad()

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        return self._select_weights(group) if self.space == "weights" else self._select_synapses(group)

    def _estimate(self, probe: Probe) -> Estimate:
        for p in self._trained():
            p.grad = None
        return self._along_weights(probe) if self.space == "weights" else self._along_activities(probe)

    def _along_weights(self, probe: Probe) -> Estimate:
        params, fill = [p for p, _ in self._plastic()], FILL[self.distribution]
        sizes = self._weight_sizes(params)

        def exact(sample: int) -> tuple[Tensor, Tensor | None]:
            for p, size, z in zip(params, sizes, self._directions(sample, params, fill=fill), strict=True):
                # In place, for any model and closure; adding -0 changes no bit.
                p.add_(forward_ad.make_dual(torch.full_like(p, -0.0), z.mul_(size)))
            return probe.along_tangents()

        def differences(sample: int) -> tuple[Tensor, Tensor]:
            sides = []
            with self._restored(params) as saved:
                for width in (self.difference, -self.difference):
                    directions = self._directions(sample, params, fill=fill)
                    for p, w, size, z in zip(params, saved, sizes, directions, strict=True):
                        p.copy_(torch.add(w, z, alpha=width * size))
                    sides.append(probe())
            for p, size in zip(params, sizes, strict=True):
                self._note_weight_width(p, self.difference, self.difference * size)
            return (sides[0] + sides[1]) / 2, (sides[0] - sides[1]) / (2 * self.difference)

        found: dict[int, Tensor] = {}
        total: Tensor | None = None
        mine, summed = self._share("samples", self.samples), self._sums_travel(self.samples)
        for sample in mine:
            outcome = self._slope(probe, sample, exact, differences)
            if total is not None and len(found) == 1 and not self._own_state["step"] and not self._by_differences:
                self._compare(probe, total, outcome[0])  # at the same weights; differences average over others
            found[sample] = mean_loss(outcome)
            total = outcome[0].clone() if total is None else total + outcome[0]
        assert total is not None  # every rank has a sample
        slopes = self._gathered(found, self.samples, OUTCOME, total, summed)[:, 1]
        self._require_widths("difference")
        grads = [torch.zeros_like(p) for p in params]
        drawn = mine if summed else range(self.samples)
        for sample, slope in zip(drawn, (slopes / self.samples).tolist(), strict=True):
            for g, size, z in zip(grads, sizes, self._directions(sample, params, fill=fill), strict=True):
                g.add_(z, alpha=slope / size)
        estimate = dict(zip(params, grads, strict=True))
        if summed:
            estimate = self._summed(estimate, total)
        probe.agree(self.process_group)
        return total / self.samples, estimate, self._next_state()

    def _along_activities(self, probe: Probe) -> Estimate:
        records: list[Record] = []
        noise: list[Tensor] = []
        if self.relative:
            activity: dict[Synapse, Activity] = {}
            clean = self._base_point(probe, lambda firing, u: add_activity(activity, firing.synapse, u))
            self._sizes = sizes_of(activity)

        def exact(sample: int) -> tuple[Tensor, Tensor | None]:
            records.clear()
            noise.clear()
            draw = self._draws(sample)

            def tilt(firing: Firing, u: Tensor) -> Tensor:
                if not forward_gradients_enabled():
                    raise RuntimeError(NO_TANGENT)
                primal, tangent = forward_ad.unpack_dual(u)
                records.append(Record.of(firing, u))
                noise.append(draw(records[-1].empty()))
                added = records[-1].own(noise[-1])
                if self.relative:
                    added = added * self._width(firing.synapse, 1.0)
                tilted: Tensor = forward_ad.make_dual(primal.detach(), added if tangent is None else tangent + added)
                return tilted

            with self._cutting(tilt):
                found = probe.along_tangents()
            if not records:
                raise RuntimeError(self._coverage.none_fired())
            return found

        def differences(sample: int) -> tuple[Tensor, Tensor]:
            records.clear()
            with self._cutting(lambda firing, u: records.append(Record.of(firing, u))):
                clean = probe()
            sides = []
            for width in (self.difference, -self.difference):
                noise.clear()
                with self._cutting(self._injection(sample, noise, width=width)):
                    sides.append(probe())
            return clean, (sides[0] - sides[1]) / (2 * self.difference)

        mine = {i: self._slope(probe, i, exact, differences) for i in self._share("samples", self.samples)}
        if self.relative and not self._own_state["step"]:
            self._compare(probe, clean, next(iter(mine.values()))[0])
        summed = self._sums_travel(self.samples)
        outcomes = self._gathered(mine, self.samples, OUTCOME, alone=summed)
        self._require_widths("difference")
        losses = outcomes[0, 0]  # the same for all directions
        per_sample = self._per_sample(records, losses, probe)
        signals: list[Tensor] = []
        for sample, slope in zip(mine if summed else range(self.samples), outcomes[:, 1], strict=True):
            drawn = noise if sample == max(mine) else self._drawn_again(sample, records)
            self._credit(signals, records, drawn, credit_of(slope, per_sample) / self.samples, width=1.0)
        grads = self._products(records, signals)
        if summed:
            grads = self._summed(grads, outcomes.sum())
        probe.agree(self.process_group)
        return losses, grads, self._next_state()

    def _slope(
        self,
        probe: Probe,
        sample: int,
        exact: Callable[[int], tuple[Tensor, Tensor | None]],
        differences: Callable[[int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The losses and their slopes along one direction, stacked."""
        if not self._by_differences:
            reason = "the closure returned a loss without one"
            self._undo.append(_leave_dual_level)
            try:
                with forward_ad.dual_level():
                    losses, slopes = exact(sample)
                    if slopes is not None:
                        return torch.stack([losses, slopes])
            except RuntimeError as error:  # or NotImplementedError
                if "forward AD" not in str(error) and "jvp" not in str(error):
                    raise
                reason = str(error).splitlines()[0]
            finally:
                self._undo.remove(_leave_dual_level)
            self._by_differences = True
            probe.restart()
            self._require_repeatable(probe)
            warn(
                f"ForwardGradient: no forward derivative here ({reason}); slopes are measured by central differences "
                f"of difference={self.difference}, in two to three passes each"
            )
        return torch.stack(differences(sample))


def _leave_dual_level() -> None:
    """Close a level that an interrupt has left open."""
    if in_dual_level():
        forward_ad.exit_dual_level()
