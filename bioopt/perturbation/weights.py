"""Perturbation of weights: all at once along random directions, or one at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad

from ..core.constraints import POSITIVE, POSITIVE_INT, Constraint, one_of
from ..core.losses import mean_loss
from ..core.params import Params, ProcessGroup, synapses_of
from ..core.probe import Probe
from ..core.readout import ReadoutOptions
from ..core.recorder import Firing
from ..core.rule import Estimate
from ..core.synapse import Synapse
from .base import DISTRIBUTION, FILL, Perturbation, compared, count_of


def _zscore(losses: Tensor) -> Tensor:
    centred = losses - losses.mean()
    return centred / centred.square().mean().sqrt().clamp(min=torch.finfo(losses.dtype).tiny)


def _winsorised(losses: Tensor) -> Tensor:
    low, high = losses.quantile(losses.new_tensor([0.05, 0.95]))
    return _zscore(losses.clamp(low, high))


def _ranks(losses: Tensor) -> Tensor:
    below = (losses[:, None] > losses).sum(1) + (losses[:, None] >= losses).sum(1) - 1  # equal losses, equal ranks
    return below.to(losses.dtype) / (2 * max(len(losses) - 1, 1)) - 0.5


SHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda losses: losses,
    "zscore": _zscore,
    "winsorised": _winsorised,
    "ranks": _ranks,
}


_Place = tuple[Tensor, tuple[int, ...], float]  # a parameter, an index in it, and the size of the change


@final
class WeightPerturbation(Perturbation):
    r"""All weights are changed along random directions, each credited with its change of loss.

    .. math::
        \hat g = \frac{1}{M} \sum_{m=1}^{M} \frac{L(w + \sigma z_m) - L(w - \sigma z_m)}{2 \sigma}\; z_m,
        \qquad \Delta w = -\hat g

    with the mean loss :math:`L`, :math:`M` = ``population``, and directions :math:`z_m` of independent entries of mean
    0 and variance 1, normal or (``distribution="rademacher"``) -1 and 1. With ``antithetic=False`` the difference is
    :math:`(L(w + \sigma z_m) - L(w)) / \sigma`. The mean of :math:`\hat g` is the gradient of :math:`L` smoothed over
    the width :math:`\sigma`; its variance grows with the number of weights.

    By default :math:`\sigma` is ``sigma`` times the size of each tensor, the root mean square of its entries, and the
    step is that of Adam, so that the same options suit layers of any scale. A bias or gain has at least the size of the
    tensor before it, whose neurons it belongs to; so biases that start at 0 are perturbed too. A matrix of zeros has
    the size :math:`1 / \sqrt{inputs}`. ``relative=False`` is the published rule: one width for all weights, and SGD.

    In bfloat16, also by autocast, changes below 1/256 of a weight are mostly rounded away: from a relative ``sigma`` of
    0.016 on, estimates are as good as in float32, and below some 0.004 the first step warns.

    ``shaping`` replaces the losses of a step by a relative measure: ``"zscore"``, their distance from the mean in
    standard deviations; ``"winsorised"``, the same after clipping at the 5th and 95th percentile; ``"ranks"``, their
    ranks, spread evenly from -1/2 to 1/2. The step is then as long on a plateau as on a slope, and :math:`\hat g` is no
    longer a gradient; use a large ``population``.

    Cost of a step: ``2 population`` forward passes (``population + 1`` with ``antithetic=False``), two more in the
    first, to check that the closure is repeatable. Memory: one copy of the weights, from which they are restored bit
    for bit and which then becomes ``.grad``; directions are drawn again from their seed. Batch statistics advance once,
    dropout masks are the same in all evaluations.

    Args:
        params: parameters, named parameters, or the model: all that require grad are perturbed.
        lr: learning rate of ``descent``; by default 2e-3, and with a readout 1e-4. With
            ``relative=False`` it must be given.
        sigma: the standard deviation of the change of each weight, in units of the size of its tensor, or with
            ``relative=False`` in units of the weights.
        relative: whether ``sigma`` is relative to the size of the weights.
        population: :math:`M`, the number of directions per step; by default 24, or 1 with ``relative=False``.
        antithetic: evaluate each direction with both signs, which removes the even orders of the error.
        distribution: ``"normal"`` or ``"rademacher"``, whose directions all have the same length.
        shaping: ``"none"``, ``"zscore"``, ``"winsorised"`` or ``"ranks"``.
        options: the keywords that follow.
        seed: of the noise; with the step and the member it determines every direction.
        descent: the `torch.optim` class that makes the step, by default Adam, or SGD with ``relative=False``; its
            options as further keywords.
        process_group: split the population over these ranks, which have the same batch. They exchange losses, or, if
            the others have 8 members or more, the sums of their own directions: equal to one process to rounding.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a step without a closure, or with one that is not repeatable; a non-finite loss (nothing is
            changed then); in the first step, ``sigma`` too small to change any weight in its precision.

    Sources: J. C. Spall (1992), *Multivariate stochastic approximation using a simultaneous perturbation gradient
    approximation*; with a population: I. Rechenberg (1973), T. Salimans et al. (2017), *Evolution strategies*;
    ranks: D. Wierstra et al. (2014), *Natural evolution strategies*; as plasticity: G. Cauwenberghs (1993), *A fast
    stochastic error-descent algorithm*.
    """

    trains_whole_modules = True
    constraints: ClassVar[dict[str, Constraint]] = {"sigma": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float | None = None,  # η
        *,
        sigma: float = 0.1,  # σ
        relative: bool = True,
        population: int | None = None,  # M
        antithetic: bool = True,
        distribution: str = "normal",
        shaping: str = "none",
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[ReadoutOptions],
    ) -> None:
        lr = self._rate(lr, 2e-3, relative, readout)
        defaults = {"lr": lr, "sigma": sigma}
        super().__init__(params, defaults, relative=relative, seed=seed, readout=readout, **options)
        population = count_of(population, 24, relative)
        self._check_value("population", population, POSITIVE_INT)
        self._check_value("distribution", distribution, DISTRIBUTION)
        if shaping != "none" and population < 2:
            raise ValueError(f"WeightPerturbation: shaping={shaping!r} compares losses: raise population={population}")
        self._check_value("shaping", shaping, one_of(*SHAPE))
        self.population = population
        self.antithetic = antithetic
        self.distribution = distribution
        self.shaping = shaping

    _select = Perturbation._select_weights

    def _estimate(self, probe: Probe) -> Estimate:
        plastic = self._plastic()
        params = [p for p, _ in plastic]
        sizes = self._weight_sizes(params)
        self._prepare(probe)
        mine, fill = self._share("population", self.population), FILL[self.distribution]
        clean = None if self.antithetic else self._base_point(probe)
        found: dict[int, Tensor] = {}
        total: Tensor | None = None
        with self._restored(params) as saved:
            for member in mine:
                tried = self._directions(member, params, params, fill)
                for z, w, size, (_, group) in zip(tried, saved, sizes, plastic, strict=True):
                    z.mul_(group["sigma"] * size).add_(w)
                if member == mine[0] and self._own_state["step"] == 0:
                    self._require_change("sigma", plastic, saved, sizes)
                plus = probe()
                if clean is not None:
                    found[member] = compared(plus, clean)
                    continue
                for p, w in zip(params, saved, strict=True):
                    p.neg_().add_(w, alpha=2)  # w - σz: the mirror image, without drawing again
                minus = probe()
                found[member] = compared(plus, minus)
                total = plus + minus if total is None else total.add_(plus).add_(minus)
        summed = self._sums_travel(self.population)
        alone = summed and self.shaping == "none"  # the losses of other members do not matter
        outcomes = self._gathered(found, self.population, total=total, alone=alone)
        if self.shaping == "none":
            change = outcomes[:, 2]
        else:
            sides = outcomes[:, : 2 if clean is None else 1]  # the clean loss is the same for all
            shaped = SHAPE[self.shaping](sides.flatten()).view(sides.shape)
            change = shaped[:, 0] - shaped[:, 1] if clean is None else shaped[:, 0]
        factors = (change / (self.population * (1 if clean is not None else 2))).tolist()
        # Credit goes to the change that the weight's precision preserved.
        grads = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in saved]
        del saved
        credited = mine if summed else range(self.population)
        for member, factor in zip(credited, factors if alone else [factors[m] for m in credited], strict=True):
            again = self._directions(member, params, fill=fill)
            for z, g, size, (p, group) in zip(again, grads, sizes, plastic, strict=True):
                sigma = group["sigma"] * size
                moved = z.mul_(sigma).add_(p).neg_()  # minus the weight that was tried
                width = 2 * sigma if clean is None else sigma
                other = torch.add(moved, p, alpha=2) if clean is None else p
                g.add_(moved.to(g.dtype).add_(other), alpha=-factor / width / sigma)
        estimate = dict(zip(params, grads, strict=True))
        if summed:  # the total may have been summed with the losses
            sent = total if alone and total is not None else outcomes[:, 0].sum().float()
            estimate = self._summed(estimate, sent)
        probe.agree(self.process_group)
        loss = clean if total is None else total / (2 * self.population)
        assert loss is not None
        return loss, {p: g.to(p.dtype) for p, g in estimate.items()}, self._next_state()


@final
class SerialPerturbation(Perturbation):
    r"""One weight after another is changed alone and credited with the change of loss.

    .. math::
        \hat g_i = \frac{L(w + \sigma e_i) - L(w - \sigma e_i)}{2 \sigma}, \qquad \Delta w_i = -\hat g_i

    for ``coordinates`` weights :math:`i` per step, all measured from the weights before the step; the others get zero.
    With ``central=False`` it is :math:`(L(w + \sigma e_i) - L(w)) / \sigma`, for half the passes and a larger error.
    The weights are visited in random order without repetition, in a new order each sweep; the last step of a sweep
    visits the rest. The position in the sweep is part of the state. A sweep over all weights measures the whole
    gradient up to :math:`O(\sigma^2)` (:math:`O(\sigma)` with ``central=False``).

    By default :math:`\sigma` is ``sigma`` times the size of the tensor, as in `WeightPerturbation`, and the step is
    that of Adagrad: a weight moves by ``lr`` on its first visit, by less on later ones, and not in between.
    ``relative=False`` is the published rule: one width for all weights, and SGD.

    Cost of a step: ``2 coordinates`` forward passes (``coordinates + 1`` with ``central=False``), two more in the
    first, to check that the closure is repeatable. It is the simplest rule, and the slowest.

    Args:
        params: parameters, named parameters, or the model: all that require grad are visited.
        lr: learning rate of ``descent``. As a step changes few weights, it is far larger than for other rules.
        sigma: the change of a weight, in units of the size of its tensor, or with ``relative=False`` in units of the
            weights.
        relative: whether ``sigma`` is relative to the size of the weights.
        coordinates: weights per step; by default 64, or 1 with ``relative=False``.
        central: change a weight in both directions, or in one.
        batched: measure all changes of a process in one evaluation (`torch.func.vmap` over the closure), each by its
            effect on its neuron's activity, with all activities in memory. For models whose plastic parameters are
            weights and biases of Linear layers; 256 weights of a small network were measured 7 times as fast. A closure
            that vmap cannot run (batch norm in training mode, ``loss.item()``, ``loss.backward()``) is run change by
            change, with one warning.
        options: the keywords that follow.
        seed: of the order of visits.
        descent: the `torch.optim` class that makes the step, by default Adagrad, or SGD with ``relative=False``; its
            options as further keywords.
        process_group: split the coordinates over these ranks, which have the same batch; they exchange only losses.

    Raises:
        ValueError: a hyperparameter out of range; with ``batched``, plastic parameters other than of Linear layers.
        TypeError: with ``batched``, bare parameters.
        RuntimeError: a step without a closure, or with one that is not repeatable; a non-finite loss (nothing is
            changed then); ``sigma`` too small to change a weight in its precision.

    Sources: M. Jabri & B. Flower (1992), *Weight perturbation*, IEEE Trans. Neural Networks 3; the serial form as
    in J. Werfel, X. Xie & H. S. Seung (2005), *Learning curves for stochastic gradient descent in linear
    feedforward networks*.
    """

    trains_whole_modules = True
    constraints: ClassVar[dict[str, Constraint]] = {"sigma": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,  # η
        *,
        sigma: float = 0.1,  # σ
        relative: bool = True,
        coordinates: int | None = None,
        central: bool = True,
        batched: bool = False,
        seed: int = 0,
        readout: str | None = None,
        **options: Unpack[ReadoutOptions],
    ) -> None:
        self.batched = batched
        options.setdefault("descent", Adagrad if relative else SGD)
        defaults = {"lr": lr, "sigma": sigma}
        super().__init__(params, defaults, relative=relative, seed=seed, readout=readout, **options)
        coordinates = count_of(coordinates, 64, relative)
        self._check_value("coordinates", coordinates, POSITIVE_INT)
        self.coordinates = coordinates
        self.central = central
        self._order: tuple[Any, list[int]] = (None, [])
        self._own_state = {**self._own_state, "sweep": 0, "position": 0}

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        named, _ = self._select_weights(group)
        if not self.batched:
            return named, []
        synapses = synapses_of("SerialPerturbation(batched=True)", group["params"], self._exclusion)
        known = {p for s in synapses if type(s.layer) is nn.Linear for p in s.parameters()}
        for name, p in named:
            if p.requires_grad and p not in known:
                raise ValueError(
                    f"SerialPerturbation(batched=True) knows weights and biases of Linear layers, not '{name}': "
                    "use batched=False, or freeze it"
                )
        return named, synapses

    def _visits(self, sweep: int, total: int) -> list[int]:
        """The order of a sweep, drawn once."""
        key = (self._own_state["seed"], sweep, total)
        if self._order[0] != key:
            stream = self._noise.stream(torch.device("cpu"), *key[:2])
            self._order = (key, torch.randperm(total, generator=stream).tolist())
        return self._order[1]

    def _estimate(self, probe: Probe) -> Estimate:
        plastic = self._plastic()
        sizes = self._weight_sizes([p for p, _ in plastic])
        self._prepare(probe)
        ends = list(accumulate(p.numel() for p, _ in plastic))
        sweep, position = self._own_state["sweep"], self._own_state["position"]
        if position >= ends[-1]:  # layers were frozen during the sweep
            sweep, position = sweep + 1, 0
        visited = self._visits(sweep, ends[-1])[position : position + self.coordinates]
        places: list[_Place] = []
        for visit in visited:
            which = bisect_right(ends, visit)
            p, group = plastic[which]
            sigma = group["sigma"] * sizes[which]
            places.append((p, _unravel(visit - ends[which] + p.numel(), p.shape), sigma))
        clean = None if self.central else self._base_point(probe)
        mine = {i: places[i] for i in self._share("coordinates", self.coordinates) if i < len(places)}
        batched = self.batched and mine and not probe.always_grad
        together = self._in_one_evaluation(probe, mine, clean) if batched else None
        found, total = together or self._one_by_one(probe, mine, clean)
        if total is None:  # one-sided, or a rank without work in the short last step of a sweep
            total = torch.zeros_like(probe() if clean is None else clean)
        changes = self._gathered(found, len(places), total=total)[:, 2].tolist()
        grads = {p: torch.zeros_like(p) for p, _ in plastic}
        for (p, at, sigma), change in zip(places, changes, strict=True):
            if together is not None:
                width = 2 * sigma if self.central else sigma
            else:  # the change that the weight's precision preserved
                seen = self._precision_of(p)
                width = ((p[at] + sigma).to(seen) - (p[at] - sigma if clean is None else p[at]).to(seen)).item()
                if width == 0 and seen != p.dtype:  # autocast has rounded the change away
                    continue
            if width == 0:
                raise RuntimeError(
                    f"SerialPerturbation: a change by {sigma} changes nothing at a weight of {p[at].item()}: raise "
                    "sigma"
                )
            grads[p][at] = change / width
        for (p, group), size in zip(plastic, sizes, strict=True):
            self._note_weight_width(p, group["sigma"], group["sigma"] * size)
        self._require_widths("sigma")
        probe.agree(self.process_group)
        state = self._next_state()
        done = position + len(visited)
        state["sweep"] = sweep + (done == ends[-1])
        state["position"] = done % ends[-1]
        return total / (2 * len(places)) if clean is None else clean, grads, state

    def _one_by_one(
        self, probe: Probe, places: dict[int, _Place], clean: Tensor | None
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """The losses of each change, and the sum of the losses over both signs."""
        found: dict[int, Tensor] = {}
        total: Tensor | None = None
        # Layers that are watched, for changes at once, fire here as well.
        with self._restored([p for p, _ in self._plastic()]), self._cutting(None):
            for i, (p, at, sigma) in places.items():
                value = p[at].clone()
                p[at] = value + sigma
                plus = probe()
                if clean is None:
                    p[at] = value - sigma
                    minus = probe()
                    total = plus + minus if total is None else total.add_(plus).add_(minus)
                found[i] = compared(plus, minus if clean is None else clean)
                p[at] = value
        return found, total

    def _in_one_evaluation(
        self, probe: Probe, places: dict[int, _Place], clean: Tensor | None
    ) -> tuple[dict[int, Tensor], Tensor | None] | None:
        """The same in one evaluation: a changed weight adds its presynaptic activity to one neuron's activity."""
        signs = (1, -1) if clean is None else (1,)
        changes = [(p, at, sign * sigma) for sign in signs for p, at, sigma in places.values()]
        count = len(changes)
        changed: dict[
            Synapse, tuple[Tensor, Tensor, Tensor]
        ] = {}  # index of the input; change of each neuron by it, and by its bias
        for synapse in self._recorder.synapses.values():
            if synapse.layer in self._readout.layers:
                continue
            weight = synapse.weight
            source = torch.zeros(count, 1, dtype=torch.int64, device=weight.device)
            by_input, by_bias = weight.new_zeros(2, count, len(weight))
            for param, widths in ((weight, by_input), (synapse.bias, by_bias)):
                mine = [(k, at, width) for k, (p, at, width) in enumerate(changes) if p is param]
                which = torch.tensor([k for k, _, _ in mine], dtype=torch.int64, device=weight.device)
                neuron = torch.tensor([at[0] for _, at, _ in mine], dtype=torch.int64, device=weight.device)
                widths[which, neuron] = weight.new_tensor([width for _, _, width in mine])
                if param is weight:
                    source[which, 0] = source.new_tensor([at[1] for _, at, _ in mine])
            changed[synapse] = (source, by_input, by_bias)
        fired: set[Synapse] = set()

        def evaluate(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
            of_synapse = dict(zip(changed, parts, strict=True))

            def change(firing: Firing, u: Tensor) -> Tensor:
                fired.add(firing.synapse)
                source, by_input, by_bias = of_synapse[firing.synapse]
                return u.detach() + (firing.x.detach().index_select(-1, source) * by_input + by_bias).to(u.dtype)

            with self._cutting(change):
                return probe(copies=count)

        losses = self._mapped(evaluate, list(changed.values()))
        if losses is None:
            return None
        if not fired:
            raise RuntimeError(self._coverage.none_fired())
        plus = losses[: len(places)]
        other = losses[len(places) :] if clean is None else clean.expand_as(plus)
        each = torch.stack([mean_loss(plus), mean_loss(other), mean_loss(plus - other)], 1)
        total = (plus + other).sum(0) if clean is None else None
        return dict(zip(places, each, strict=True)), total


@final
class HillClimbing(Perturbation):
    r"""A random change of all weights is kept if the loss fell, else undone.

    .. math::
        w' = \begin{cases} w + \mathrm{lr}\, z & \text{if } L(w + \mathrm{lr}\, z) < L(w) \\
        w & \text{otherwise} \end{cases}, \qquad z \sim \mathcal N(0, I)

    with the mean loss :math:`L`. Of several ``tries`` the best is kept. A caricature of learning by trial and error: it
    uses one bit of the change of the loss, and learns nothing from a change for the worse. Both losses are those of one
    batch; with small batches, changes are kept that are better by chance.

    Cost of a step: ``1 + tries`` forward passes, two more in the first, to check that the closure is repeatable.
    Memory: one copy of the weights, from which they are restored bit for bit. Batch statistics advance once, dropout
    masks are the same in all evaluations.

    Args:
        params: parameters, named parameters, or the model: all that require grad are changed.
        lr: the standard deviation of a change, in units of the size of each tensor (as in `WeightPerturbation`), or
            with ``relative=False`` in units of the weights.
        relative: whether ``lr`` is relative to the size of the weights.
        tries: changes to try per step.
        seed: of the changes; with the step and the try it determines each.
        exclude: module types, modules, or names of modules or parameters to leave out.
        process_group: split the tries over these ranks, which have the same batch; they exchange only losses.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a step without a closure, or with one that is not repeatable; a non-finite loss (nothing is
            changed then).

    Sources: L. A. Rastrigin (1963), *The convergence of the random search method in the extremal control of a many
    parameter system*; several tries: H.-P. Schwefel (1965), *Kybernetische Evolution*.
    """

    trains_whole_modules = True

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        *,
        relative: bool = True,
        tries: int = 1,
        seed: int = 0,
        readout: str | None = None,
        readout_lr: float | None = None,
        readout_layer: str | nn.Module | Sequence[str | nn.Module] | None = None,
        exclude: Iterable[Any] = (),
        process_group: ProcessGroup = None,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr},
            relative=relative,
            descent=SGD,
            seed=seed,
            readout=readout,
            readout_lr=readout_lr,
            readout_layer=readout_layer,
            exclude=exclude,
            process_group=process_group,
        )
        self._check_value("tries", tries, POSITIVE_INT)
        self.tries = tries

    _select = Perturbation._select_weights

    def _estimate(self, probe: Probe) -> Estimate:
        plastic = self._plastic()
        params = [p for p, _ in plastic]
        sizes = self._weight_sizes(params)
        self._prepare(probe)
        mine = self._share("tries", self.tries)
        clean = self._base_point(probe)
        found: dict[int, Tensor] = {}
        with self._restored(params) as saved:
            for i in mine:
                tried = self._directions(i, params, params)
                for z, w, size, (_, group) in zip(tried, saved, sizes, plastic, strict=True):
                    z.mul_(group["lr"] * size).add_(w)
                if i == mine[0] and self._own_state["step"] == 0:
                    self._require_change("lr", plastic, saved, sizes)
                found[i] = compared(probe(), clean)
        changes = self._gathered(found, self.tries)[:, 2]
        best = int(changes.argmin())
        grads = saved  # no longer needed
        if changes[best] < 0:
            for z, size in zip(self._directions(best, params, grads), sizes, strict=True):
                z.mul_(-size)
        else:
            for g in grads:
                g.zero_()
        probe.agree(self.process_group)
        return clean, dict(zip(params, grads, strict=True)), self._next_state()


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    """The index in a tensor of this shape for an index in its flat version."""
    place = []
    for size in reversed(shape):
        index, i = divmod(index, size)
        place.append(i)
    return tuple(reversed(place))
