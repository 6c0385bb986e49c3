"""The perturbation family: change weights or activities at random, see what it does to the loss, keep what helps.

All three rules estimate the gradient of the mean loss from evaluations of it alone; none needs a backward pass.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from .noise import NoiseSource, fill_normal_
from .optimizer import (
    POSITIVE,
    POSITIVE_INT,
    SEED,
    Constraint,
    Estimate,
    LearningRule,
    Params,
    Probe,
    ProcessGroup,
    mean_loss,
    mean_over_samples,
    named_parameters_of,
    no_plastic_layer,
    require_finite,
    unique,
)
from .recorder import Synapse
from .synaptic import synapses_of

__all__ = ["NodePerturbation", "SerialPerturbation", "WeightPerturbation"]


class _Perturbation(LearningRule):
    """What perturbation rules share: a seed and a step count, which are state, and the noise they make."""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        seed: int,
        descent: type[Optimizer],
        descent_options: dict[str, Any],
        process_group: ProcessGroup,
    ) -> None:
        self._noise = NoiseSource()
        super().__init__(
            params, defaults, descent=descent, descent_options=descent_options, process_group=process_group
        )
        self._check_value("seed", seed, SEED)
        self._own_state = {"seed": seed, "step": 0}

    def _next_state(self) -> dict[str, Any]:
        return {**self._own_state, "step": self._own_state["step"] + 1}

    def _select_weights(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        return named_parameters_of(group["params"]), []

    def _plastic(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters that are not frozen, each with its group."""
        return [(p, group) for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _gathered(self, losses: dict[int, Tensor], count: int) -> Tensor:
        """The losses of all ``count`` evaluations, each made by one of the ranks, stacked in order."""
        like = next(iter(losses.values()))
        everything = torch.stack([losses.get(i, torch.zeros_like(like)) for i in range(count)])
        self._sum_over_ranks([everything])
        require_finite(self, "the loss", [everything])
        return everything

    def _share(self, what: str, count: int) -> range:
        """Which of ``count`` pieces of work fall to this rank."""
        rank, ranks = self._ranks
        if count < ranks:
            raise ValueError(f"{type(self).__name__}: {what}={count} cannot be split over {ranks} ranks; raise it")
        return range(rank, count, ranks)


class WeightPerturbation(_Perturbation):
    r"""Weight perturbation: all weights at once along random directions, each credited with its change of loss.

    .. math::
        \hat g = \frac{1}{M} \sum_{m=1}^{M} \frac{L(w + \sigma z_m) - L(w - \sigma z_m)}{2 \sigma}\; z_m,
        \qquad z_m \sim \mathcal N(0, I), \qquad \Delta w = -\hat g

    with the mean loss :math:`L`, and :math:`M` = ``population``. With ``antithetic=False`` the difference is
    :math:`(L(w + \sigma z_m) - L(w)) / \sigma`. The mean of :math:`\hat g` is the gradient of :math:`L` smoothed over
    a Gaussian of width :math:`\sigma`; its variance grows with the number of weights.

    Cost a step: ``2 population`` forward passes (``population + 1`` with ``antithetic=False``). Memory: one copy of
    the weights, from which they are restored bit for bit and which then becomes ``.grad``; directions are drawn
    anew from their seed. Batch statistics advance once, dropout masks are the same in all evaluations.

    Args:
        params: parameters, named parameters, or the model: all that require grad are perturbed.
        lr: learning rate of ``descent``.
        sigma: :math:`\sigma`, the standard deviation of the change of each weight, in units of the weights.
        population: :math:`M`, the number of directions a step.
        antithetic: evaluate each direction at both signs, which removes the even orders of the error.
        seed: of the noise; with the step and the member it fixes every direction.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: split the population over these ranks, which all see the same batch; only losses travel.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a step without a closure; a non-finite loss, after which nothing has changed.

    Sources: J. C. Spall (1992), *Multivariate stochastic approximation using a simultaneous perturbation gradient
    approximation*; with a population: I. Rechenberg (1973), T. Salimans et al. (2017), *Evolution strategies*;
    as plasticity: G. Cauwenberghs (1993), *A fast stochastic error-descent algorithm*.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"sigma": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        sigma: float,  # σ
        population: int = 1,  # M
        antithetic: bool = True,
        seed: int = 0,
        descent: type[Optimizer] = SGD,
        process_group: ProcessGroup = None,
        **descent_options: Any,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "sigma": sigma},
            seed=seed,
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
        )
        self._check_value("population", population, POSITIVE_INT)
        self.population = population
        self.antithetic = antithetic

    _select = _Perturbation._select_weights

    def _directions(self, member: int, like: list[Tensor], into: list[Tensor] | None = None) -> Any:
        """The direction of one member, parameter by parameter, so that never more than one is held."""
        streams = {}
        for i, p in enumerate(like):
            if p.device not in streams:
                state = self._own_state
                streams[p.device] = self._noise.stream(p.device, state["seed"], state["step"], member)
            yield fill_normal_(torch.empty_like(p) if into is None else into[i], streams[p.device])

    def _estimate(self, probe: Probe) -> Estimate:
        plastic = self._plastic()
        params = [p for p, _ in plastic]
        for p in params:
            p.grad = None
        mine = self._share("population", self.population)
        clean = None if self.antithetic else probe()
        saved = [p.detach().clone() for p in params]
        losses: dict[int, Tensor] = {}
        try:
            for member in mine:
                for z, w, (_, group) in zip(self._directions(member, params, params), saved, plastic, strict=True):
                    z.mul_(group["sigma"]).add_(w)
                plus = probe()
                if clean is not None:
                    losses[member] = torch.stack([plus, clean])
                    continue
                for p, w in zip(params, saved, strict=True):
                    p.neg_().add_(w, alpha=2)  # w - σz: the mirror image, without drawing again
                losses[member] = torch.stack([plus, probe()])
        finally:
            for p, w in zip(params, saved, strict=True):
                p.copy_(w)
        outcomes = self._gathered(losses, self.population)
        # Each sample's difference first: they are small, the losses are not.
        change = mean_loss(outcomes[:, 0] - outcomes[:, 1])
        factors = (change / (self.population * (1 if clean is not None else 2))).tolist()
        grads = saved  # no longer needed
        for member, factor in enumerate(factors):
            into = grads if member == 0 else None
            for z, g, (_, group) in zip(self._directions(member, params, into), grads, plastic, strict=True):
                if member == 0:
                    z.mul_(factor / group["sigma"])
                else:
                    g.add_(z, alpha=factor / group["sigma"])
        probe.agree(self.process_group)
        loss = clean if clean is not None else outcomes.mean((0, 1))
        return loss, dict(zip(params, grads, strict=True)), self._next_state()


class SerialPerturbation(_Perturbation):
    r"""Serial perturbation: one weight after another is changed alone, and credited with the change of loss.

    .. math::
        \hat g_i = \frac{L(w + \sigma e_i) - L(w - \sigma e_i)}{2 \sigma}, \qquad \Delta w_i = -\hat g_i

    for ``coordinates`` weights :math:`i` a step, all measured at the step's base point; the others get zero. The
    weights are visited in random order without repetition, in a new order each sweep; the last step of a sweep
    takes what is left. The position in the sweep is part of the state. A sweep over all weights measures the whole
    gradient, exact but for :math:`O(\sigma^2)`.

    Cost a step: ``2 coordinates`` forward passes: the plainest of all rules, and the slowest.

    Args:
        params: parameters, named parameters, or the model: all that require grad are visited.
        lr: learning rate of ``descent``. As a step moves few weights, it is far larger than that of the others.
        sigma: :math:`\sigma`, the change of a weight, in units of the weights.
        coordinates: weights a step.
        seed: of the order of visits.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: split the coordinates over these ranks, which all see the same batch; only losses travel.

    Raises:
        ValueError: a hyperparameter out of range.
        RuntimeError: a step without a closure; a non-finite loss, after which nothing has changed; ``sigma`` too
            small to change a weight in its precision.

    Sources: M. Jabri & B. Flower (1992), *Weight perturbation*, IEEE Trans. Neural Networks 3; the serial form as
    in J. Werfel, X. Xie & H. S. Seung (2005), *Learning curves for stochastic gradient descent in linear
    feedforward networks*.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"sigma": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        sigma: float,  # σ
        coordinates: int = 1,
        seed: int = 0,
        descent: type[Optimizer] = SGD,
        process_group: ProcessGroup = None,
        **descent_options: Any,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "sigma": sigma},
            seed=seed,
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
        )
        self._check_value("coordinates", coordinates, POSITIVE_INT)
        self.coordinates = coordinates
        self._order: tuple[Any, list[int]] = (None, [])
        self._own_state = {**self._own_state, "sweep": 0, "position": 0}

    _select = _Perturbation._select_weights

    def _visits(self, total: int) -> list[int]:
        """The order of the current sweep, made once a sweep."""
        key = (self._own_state["seed"], self._own_state["sweep"], total)
        if self._order[0] != key:
            stream = self._noise.stream(torch.device("cpu"), *key[:2])
            self._order = (key, torch.randperm(total, generator=stream).tolist())
        return self._order[1]

    def _estimate(self, probe: Probe) -> Estimate:
        plastic = self._plastic()
        for p, _ in plastic:
            p.grad = None
        ends = list(accumulate(p.numel() for p, _ in plastic))
        order, position = self._visits(ends[-1]), self._own_state["position"]
        visited = order[position : position + self.coordinates]
        losses: dict[int, Tensor] = {}
        places = []
        for visit in visited:
            which = bisect_right(ends, visit)
            p, group = plastic[which]
            places.append((p, _unravel(visit - ends[which] + p.numel(), p.shape), group["sigma"]))
        for i in self._share("coordinates", len(places)):
            p, at, sigma = places[i]
            value = p[at].clone()
            up, down = value + sigma, value - sigma
            try:
                p[at] = up
                plus = probe()
                p[at] = down
                losses[i] = torch.stack([plus, probe()])
            finally:
                p[at] = value
        outcomes = self._gathered(losses, len(places))
        changes = mean_loss(outcomes[:, 0] - outcomes[:, 1]).tolist()
        grads = {p: torch.zeros_like(p) for p, _ in plastic}
        for (p, at, sigma), change in zip(places, changes, strict=True):
            # The width that the weight's precision really allowed.
            width = ((p[at] + sigma) - (p[at] - sigma)).item()
            if width == 0:
                raise RuntimeError(f"SerialPerturbation: sigma={sigma} changes nothing at a weight of {p[at].item()}")
            grads[p][at] = change / width
        probe.agree(self.process_group)
        state = self._next_state()
        done = position + len(visited)
        state["sweep"] += done == ends[-1]
        state["position"] = done % ends[-1]
        return outcomes.mean((0, 1)), grads, state


class NoisyActivity(_Perturbation):
    """What rules share that put noise on postsynaptic activity: their synapses, and the noise of each noisy pass."""

    def __init__(self, params: Params, defaults: dict[str, Any], credit: str, **options: Any) -> None:
        if credit not in ("sample", "global"):
            raise ValueError(f"{type(self).__name__}: credit={credit!r} must be 'sample' or 'global'")
        super().__init__(params, defaults, **options)
        if not self._recorder.synapses:
            raise ValueError(no_plastic_layer(type(self).__name__))
        self.credit = credit
        self._recorder.anchored = True

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        synapses = synapses_of(type(self).__name__, group["params"])
        return unique([named for s in synapses for named in s.named_parameters()]), synapses

    def _noise_of(self, sample: int) -> Callable[[Tensor], Tensor]:
        """Draws the noise of one noisy pass, synapse after synapse in the order they fire."""
        state = self._own_state
        streams: dict[torch.device, torch.Generator] = {}

        def draw(like: Tensor) -> Tensor:
            if like.device not in streams:
                streams[like.device] = self._noise.stream(like.device, state["seed"], state["step"], sample)
            return fill_normal_(torch.empty_like(like), streams[like.device])

        return draw

    def _injection(
        self, sample: int, noise: list[Tensor], records: list[tuple[Synapse, Tensor]] | None = None
    ) -> Callable[[Synapse, Tensor], Tensor]:
        """What hands on noisy activity, and keeps the noise, and the activity it is put on if ``records`` is given."""
        draw = self._noise_of(sample)

        def inject(synapse: Synapse, u: Tensor) -> Tensor:
            noise.append(draw(u.detach()))
            if records is not None:
                records.append((synapse, u))
            return torch.add(u.detach(), noise[-1], alpha=self.param_groups[synapse.group]["sigma"])

        return inject

    def _products(self, records: list[tuple[Synapse, Tensor]], signals: list[Tensor]) -> dict[Tensor, Tensor]:
        """The local products of presynaptic activity and teaching signals, summed over each weight's firings."""
        grads: dict[Tensor, Tensor] = {}
        for (synapse, u), s in zip(records, signals, strict=True):
            params = synapse.parameters()
            for p, g in zip(params, torch.autograd.grad(u, params, s.to(u.dtype)), strict=True):
                grads[p] = grads[p] + g if p in grads else g
        return grads

    def _per_sample(self, records: list[tuple[Synapse, Tensor]], losses: Tensor) -> bool:
        """Whether each sample is credited by itself; a scalar loss credits all together."""
        if not records:
            raise RuntimeError(
                f"{type(self).__name__}: no layer has fired; run the model in training mode (model.train())"
            )
        if self.credit == "global" or losses.ndim == 0:
            return False
        for synapse, u in records:
            if u.ndim < 2 or len(u) != len(losses):
                raise RuntimeError(
                    f"{type(self).__name__}(credit='sample'): layer '{synapse.name}' gave an output of shape "
                    f"{tuple(u.shape)} where there are {len(losses)} losses, one a sample, so its first dimension is "
                    "not the sample. Use credit='global'"
                )
        return True


def credited(noise: Tensor, credit: Tensor) -> Tensor:
    """Noise times its credit, in place: each sample's own, or one for all."""
    return noise.mul_(credit.view(-1, *[1] * (noise.ndim - 1)) if credit.ndim else credit)


class NodePerturbation(NoisyActivity):
    r"""Node perturbation: noise on postsynaptic activity, credited with the change of loss it brings.

    .. math::
        \tilde u = u + \sigma \xi, \qquad
        s = -\frac{1}{S} \sum_{i=1}^{S} \frac{\tilde L_i - L}{\sigma}\; \xi_i, \qquad
        \Delta W = \langle s\, x^\top \rangle, \qquad \Delta b = \langle s \rangle

    with presynaptic activity :math:`x` of a clean pass, standard normal noise :math:`\xi` on every synapse's output
    at once, the clean loss :math:`L`, and :math:`S` = ``samples`` noisy passes. With ``credit="sample"`` the loss is
    each sample's own, so that a batch of :math:`N` samples is as many experiments; :math:`\langle\cdot\rangle` is the
    mean over samples and the sum over positions. With ``credit="global"`` one scalar loss credits all noise of the
    batch. The mean of :math:`-\Delta W` tends to the gradient of the mean loss as :math:`\sigma \to 0`; its variance
    grows with the number of neurons, not of weights.

    Cost a step: ``1 + samples`` forward passes and one local product; memory: the clean pass's activities and one
    noise of that size. Batch statistics advance once (in the clean pass), dropout masks are the same in all passes.
    Where samples of a batch influence each other (batch norm), ``"sample"`` leaves that influence out.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused. Weight
            and bias of each synapse learn; other parameters stay frozen.
        lr: learning rate of ``descent``.
        sigma: :math:`\sigma`, the noise's standard deviation in units of :math:`u`.
        samples: :math:`S`, noisy passes a step.
        credit: ``"sample"`` or ``"global"``. A scalar loss is global by itself.
        seed: of the noise; with the step and the pass it fixes all noise.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: split the noisy passes over these ranks, which all see the same batch; only losses travel.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with unknown ones.
        TypeError: bare parameters.
        RuntimeError: a step without a closure; a layer whose first dimension is not the sample (with
            ``credit="sample"``); a non-finite loss, after which nothing has changed.

    Sources: B. Widrow & M. Lehr (1990), *Madaline rule III*; J. Werfel, X. Xie & H. S. Seung (2005); with per-sample
    credit as in S. Dalm et al. (2023), *Effective learning with node perturbation in deep neural networks*.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"sigma": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        sigma: float,  # σ
        samples: int = 1,  # S
        credit: str = "sample",
        seed: int = 0,
        descent: type[Optimizer] = SGD,
        process_group: ProcessGroup = None,
        **descent_options: Any,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "sigma": sigma},
            credit,
            seed=seed,
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
        )
        self._check_value("samples", samples, POSITIVE_INT)
        self.samples = samples

    def _estimate(self, probe: Probe) -> Estimate:
        for p in self._trained():
            p.grad = None
        records: list[tuple[Synapse, Tensor]] = []
        with self._recorder.visiting(lambda synapse, u: records.append((synapse, u))):
            clean = probe()
        per_sample = self._per_sample(records, clean)

        losses: dict[int, Tensor] = {}
        kept: tuple[int, list[Tensor]] = (-1, [])
        for sample in self._share("samples", self.samples):
            kept = (sample, [])
            with self._recorder.visiting(self._injection(sample, kept[1])):
                losses[sample] = probe()
            if len(kept[1]) != len(records):
                raise RuntimeError(
                    "NodePerturbation: the closure ran other layers in the noisy pass than in the clean one"
                )

        changes = self._gathered(losses, self.samples) - clean
        require_finite(self, "the loss", [changes])
        signals: list[Tensor] = []
        for sample, change in enumerate(changes):
            draw = self._noise_of(sample)
            noise = kept[1] if kept[0] == sample else [draw(u.detach()) for _, u in records]
            credit = mean_over_samples(change) / len(change) if per_sample else change.mean()
            for i, (n, (synapse, _)) in enumerate(zip(noise, records, strict=True)):
                factor = credit / (self.samples * self.param_groups[synapse.group]["sigma"])
                told = credited(n, factor)
                if sample == 0:
                    signals.append(told)
                else:
                    signals[i] += told
        return clean, self._products(records, signals), self._next_state()


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        index, i = divmod(index, size)
        place.append(i)
    return tuple(reversed(place))
