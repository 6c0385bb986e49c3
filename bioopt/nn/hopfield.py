"""Content-addressable memory: a part of a pattern, or one with errors in it, brings back the whole."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.constraints import NON_NEGATIVE, POSITIVE, POSITIVE_INT, SEED, Constraint, require_in_range
from ..core.synapse import register_synapse
from ..hebbian import Hebbian

__all__ = ["Hopfield", "ModernHopfield", "Recall", "SpikingHopfield"]

STORAGE = ("hebbian", "storkey", "pseudo_inverse")


class Recall(NamedTuple):
    """The way from a cue to what it brought back.

    Args:
        states: times × cues × units, the first of them the cue, the last what was recalled (in a recall that settles
            for all cues, the same as the one before).
        energies: times × cues.
        settled: for each cue, whether its last state would stay.
        spikes: of spiking units alone: steps × cues × units, true where a unit fired.
    """

    states: Tensor
    energies: Tensor
    settled: Tensor
    spikes: Tensor | None = None


def _check(owner: str, **options: tuple[Any, Constraint]) -> None:
    for name, (value, constraint) in options.items():
        require_in_range(owner, name, value, constraint)


class _Binary(nn.Module, ABC):
    """Units joined each to each other by symmetric weights: what binary and spiking memories share."""

    def __init__(self, units: int, seed: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        _check(type(self).__name__, units=(units, POSITIVE_INT), seed=(seed, SEED))
        self.units = units
        self.seed = seed
        self.weight = nn.Parameter(torch.zeros(units, units, device=device, dtype=dtype))
        self.eval()  # to recall; a rule that shall store asks for train()

    def reset_parameters(self) -> None:
        """Forget everything."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the cue brings back; in training mode the pattern itself, which a learning rule then stores.

        Args:
            x: a cue, … × units, of -1 and 1, and 0 where nothing is known; in training mode a pattern of -1 and 1.
        """
        if self.training:
            # The pattern holds the units where they are, whatever their field: its value is x, its graph that of W x.
            x = self._checked(x, "pattern")
            diagonal = torch.eye(self.units, dtype=torch.bool, device=x.device)
            field = F.linear(x, self.weight.masked_fill(diagonal, 0))
            return x + (field - field.detach())
        with torch.no_grad():
            return _last(self._path(self._checked(x, "cue"), None, None))

    def store(self, patterns: Tensor, rule: str = "hebbian") -> None:
        """Store patterns in addition to those that are there.

        Args:
            patterns: patterns × units (or one pattern), of -1 and 1.
            rule: ``"hebbian"``, by a step of `bioopt.Hebbian`; ``"storkey"``, pattern after pattern;
                ``"pseudo_inverse"``, of these patterns alone, in the place of what was stored: it needs them all at
                once, and is no local rule.

        Raises:
            ValueError: a pattern of the wrong size or values, no patterns, or no such rule.
        """
        name = type(self).__name__
        if rule not in STORAGE:
            raise ValueError(f"{name}: rule={rule!r} must be one of {', '.join(STORAGE)}")
        xi = self._checked(patterns, "pattern").detach().reshape(-1, self.units)
        if not len(xi):
            raise ValueError(f"{name}: no patterns were given to store")
        if rule == "hebbian":
            self._hebbian(xi)
            return
        with torch.no_grad():
            if rule == "storkey":
                for pattern in xi:
                    self._storkey(pattern)
            else:
                self.weight.copy_(torch.linalg.pinv(xi) @ xi).fill_diagonal_(0)

    def _hebbian(self, xi: Tensor) -> None:
        synapse = Hopfield(self.units, device="meta")  # of the same weights, but watched by no other rule
        synapse.weight = nn.Parameter(self.weight.detach())
        synapse.train()
        optimizer = Hebbian(synapse, len(xi) / self.units, competition="none", decay="none", readout=None)
        synapse(xi)
        optimizer.step()
        optimizer.close()

    def _storkey(self, xi: Tensor) -> None:
        # h_ij = h_i - w_ij ξ_j, with the zero diagonal, and ξ_j² = 1
        felt = torch.outer(self.weight @ xi, xi) - self.weight
        change = (torch.outer(xi, xi) - felt - felt.T) / self.units
        self.weight.add_(change.fill_diagonal_(0))

    def energy(self, states: Tensor) -> Tensor:
        r""":math:`-\frac{1}{2} s^\top W s` of each state, … × units."""
        return -0.5 * (F.linear(states, self.weight) * states).sum(-1)

    @abstractmethod
    def _path(self, cue: Tensor, every: int | None, spikes: list[Tensor] | None) -> Iterator[Tensor]:
        """The states from the cue on, each in memory of its own."""

    def _checked(self, x: Tensor, what: str) -> Tensor:
        x = _of_size(self, x, self.units, what).to(self.weight.dtype)
        fits = x.abs() == 1 if what == "pattern" else x == x.sign()
        if not bool(fits.all()):
            found = ", ".join(f"{v:g}" for v in x[~fits][:3].tolist())
            allowed = "-1 and 1" if what == "pattern" else "-1 and 1, and 0 where nothing is known"
            raise ValueError(
                f"{type(self).__name__}: a {what} has values {allowed}, but this one has {found}: write "
                "torch.where(x > threshold, 1.0, -1.0)"
            )
        return x


def _last(path: Iterator[Tensor]) -> Tensor:
    return deque(path, maxlen=1).pop()


def _of_size(owner: nn.Module, x: Tensor, units: int, what: str) -> Tensor:
    name = type(owner).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a {what} must be a tensor, not {type(x).__name__}")
    if x.ndim < 1 or x.shape[-1] != units:
        raise ValueError(
            f"{name}: a {what} of shape {tuple(x.shape)} does not fit {units} units, which are its last dimension"
            + (f": write x.flatten(1), or {name}({x[0].numel()}, ...)" if x.ndim > 1 else "")
        )
    return x


class Hopfield(_Binary):
    r"""Hopfield's associative memory of binary patterns.

    .. math::
        w_{ij} = \frac{1}{N} \sum_\mu \xi_i^\mu \xi_j^\mu, \quad w_{ii} = 0, \qquad
        s_i \leftarrow \operatorname{sign} \sum_j w_{ij} s_j, \qquad
        E = -\frac{1}{2}\, s^\top W s

    with :math:`N` units :math:`s_i = \pm 1` and patterns :math:`\xi^\mu`. Each asynchronous update (one unit after
    another, in random order) lowers the energy :math:`E` or leaves the state, so that every cue settles, in the
    pattern that it resembles if there are not too many: up to :math:`0.138 N` random ones. A unit whose field is zero
    (to rounding) stays. Synchronous updates (all units at once) may end in a cycle of two states.

    `store` takes the Hebbian rule above, which is one step of `bioopt.Hebbian` over the patterns (in training mode
    the pattern clamps the units, so that the postsynaptic activity is :math:`\xi` itself), Storkey's, which is local
    too and holds more,

    .. math::
        \Delta w_{ij} = \frac{1}{N} (\xi_i \xi_j - \xi_i h_{ji} - h_{ij} \xi_j), \qquad
        h_{ij} = \sum_{k \ne i, j} w_{ik} \xi_k

    or the pseudo-inverse, :math:`W = \Xi^+ \Xi` with the patterns as rows of :math:`\Xi` and the diagonal then set to
    0, which holds any set of fewer than :math:`N` patterns, correlated ones as well, but is not local. A rule of your
    own stores like this::

        memory.train()
        optimizer = bioopt.Hebbian(memory, lr=1 / memory.units, competition="none", decay="none", readout=None)
        for pattern in patterns:
            memory(pattern)
            optimizer.step()
        memory.eval()

    To learning rules the memory is a synapse (`bioopt.register_synapse`); its ``weight`` is units × units. Unlike
    other modules it begins in evaluation mode.

    Args:
        units: :math:`N`.
        asynchronous: update unit after unit; or all at once.
        sweeps: the most updates of each unit; settled cues end sooner.
        seed: of the order of asynchronous updates, which is the same for all cues, and in every recall.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: an option out of range (no units, say); a pattern or a cue of the wrong size or values.

    Sources: J. J. Hopfield (1982), *Neural networks and physical systems with emergent collective computational
    abilities*; capacity: D. J. Amit, H. Gutfreund & H. Sompolinsky (1985), *Storing infinite numbers of patterns in a
    spin-glass model of neural networks*; A. J. Storkey (1997), *Increasing the capacity of a Hopfield network without
    sacrificing functionality*; pseudo-inverse: L. Personnaz, I. Guyon & G. Dreyfus (1985), *Information storage and
    retrieval in spin-glass like neural networks*.

    Example::

        memory = bioopt.nn.Hopfield(100)
        memory.store(patterns)
        recalled = memory(cue)
    """

    def __init__(
        self,
        units: int,  # N
        *,
        asynchronous: bool = True,
        sweeps: int = 100,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(units, seed, device, dtype)
        _check("Hopfield", sweeps=(sweeps, POSITIVE_INT))
        self.asynchronous = asynchronous
        self.sweeps = sweeps

    @torch.no_grad()
    def recall(self, cue: Tensor, every: int | None = None) -> Recall:
        """As `forward`, with the way there.

        Args:
            cue: … × units, of -1 and 1, and 0 where nothing is known.
            every: keep the state after so many single updates, and after each sweep (``None``: after each sweep only).
        """
        if every is not None:
            _check("Hopfield", every=(every, POSITIVE_INT))
        states = torch.stack(list(self._path(self._checked(cue, "cue"), every, None)))
        settled = (self._turned(states[-1]) == states[-1]).all(-1)
        return Recall(states, self.energy(states), settled)

    def _turned(self, state: Tensor) -> Tensor:
        """All units at once."""
        return torch.sign(F.linear(state, self.weight) + self._hold() * state)

    def _hold(self) -> Tensor:
        """So much as may be rounding error of each unit's field speaks for the unit's own state."""
        info = torch.finfo(self.weight.dtype)
        return info.eps * self.weight.abs().sum(1) + info.tiny

    def _path(self, cue: Tensor, every: int | None, spikes: list[Tensor] | None) -> Iterator[Tensor]:
        if self.asynchronous:
            yield from self._one_by_one(cue, every)
            return
        before, state = None, cue
        yield state
        for _ in range(self.sweeps):
            new = self._turned(state)
            yield new
            if torch.equal(new, state) or (before is not None and torch.equal(new, before)):  # and so for ever
                return
            before, state = state, new

    def _one_by_one(self, cue: Tensor, every: int | None) -> Iterator[Tensor]:
        def state() -> Tensor:
            return s.T.reshape(cue.shape).clone()

        generator = torch.Generator().manual_seed(self.seed)
        s = cue.reshape(-1, self.units).T.clone(memory_format=torch.contiguous_format)  # units × cues
        units, synapses, hold = s.unbind(), self.weight.unbind(), self._hold().tolist()
        yield state()
        for _ in range(self.sweeps):
            before = s.clone()
            for count, i in enumerate(torch.randperm(self.units, generator=generator).tolist(), 1):
                torch.sign(torch.addmv(units[i], s.T, synapses[i], beta=hold[i]), out=units[i])
                if every is not None and count % every == 0 and count < self.units:
                    yield state()
            yield state()
            if torch.equal(s, before):
                return


class SpikingHopfield(_Binary):
    r"""Hopfield's memory in leaky integrate-and-fire units, which settle into firing as a stored pattern says.

    .. math::
        \tau_m \dot v_i = -v_i + 1 + g \sum_j w_{ij} (2 r_j - 1) + c_i, \qquad
        v_i \ge 1: \text{ a spike, and } v_i \leftarrow 0, \qquad
        \tau_s \dot r_j = -r_j + \frac{1}{\nu} \sum_f \delta(t - t_j^f)

    with membrane potentials :math:`v_i` in units of the threshold, the same weights as `Hopfield`, stored by the same
    rules, and synaptic traces :math:`r_j` in which a unit's spikes fade. The leak balances the constant current 1, so
    that a unit is silent where Hopfield's field is negative and fires where it is positive;
    :math:`\nu = 1 / (t_r + \tau_m \ln \frac{1 + g}{g})` is the rate of a unit whose field is 1, as in a stored pattern,
    where :math:`2 r_j - 1` is then :math:`\pm 1`. A large gain :math:`g` lets the refractory time bound the rate, so
    that it says little of how large the field is. The cue is a current :math:`c_i = \pm g`, for its duration alone:
    what the units fire afterwards they hold up by themselves. The state, seen through a window of time, is 1 for those
    that fire at half the rate :math:`\nu` or more, and -1 for the others.

    Units start somewhere within their refractory time, at random, so that not all fire at once. Time goes in steps of
    1 ms (the second part of :math:`1 / \nu` is rounded up to whole ones); between them potentials and traces decay
    exactly.

    Args:
        units: :math:`N`.
        gain: :math:`g`, in units of the threshold.
        tau_membrane: :math:`\tau_m`, in ms.
        tau_synapse: :math:`\tau_s`, in ms.
        refractory: :math:`t_r`, in ms, in which a unit that has fired stays at rest.
        cue_duration: in ms.
        duration: of a recall, in ms: at least that of the cue, and two windows after it.
        window: in ms; a recall is settled if two of them, one after the other, see the same.
        seed: of where in their refractory time units start.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: an option out of range (no units, say); a pattern or a cue of the wrong size or values.

    Sources: J. J. Hopfield (1984), *Neurons with graded response have collective computational properties like those
    of two-state neurons*; spiking: W. Gerstner & J. L. van Hemmen (1992), *Associative memory in a network of
    'spiking' neurons*; F. T. Sommer & T. Wennekers (2001), *Associative memory in networks of spiking neurons*.

    Example::

        memory = bioopt.nn.SpikingHopfield(100)
        memory.store(patterns)
        recalled, spikes = memory(cue), memory.recall(cue).spikes
    """

    def __init__(
        self,
        units: int,  # N
        *,
        gain: float = 20.0,  # g
        tau_membrane: float = 10.0,  # τ_m
        tau_synapse: float = 20.0,  # τ_s
        refractory: int = 5,  # t_r
        cue_duration: int = 50,
        duration: int = 400,
        window: int = 50,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(units, seed, device, dtype)
        _check(
            "SpikingHopfield",
            gain=(gain, POSITIVE),
            tau_membrane=(tau_membrane, POSITIVE),
            tau_synapse=(tau_synapse, POSITIVE),
            refractory=(refractory, (lambda v: isinstance(v, int) and v >= 0, "an integer >= 0, in ms")),
            cue_duration=(cue_duration, POSITIVE_INT),
            window=(window, POSITIVE_INT),
            duration=(
                duration,
                (
                    lambda v: isinstance(v, int) and v >= cue_duration + 2 * window,
                    f"an integer >= {cue_duration + 2 * window}, in ms: the cue's duration and two windows after it",
                ),
            ),
        )
        self.gain = gain
        self.tau_membrane = tau_membrane
        self.tau_synapse = tau_synapse
        self.refractory = refractory
        self.cue_duration = cue_duration
        self.duration = duration
        self.window = window

    @property
    def rate(self) -> float:
        r""":math:`\nu`, in spikes a ms (a step)."""
        return 1 / (self.refractory + math.ceil(self.tau_membrane * math.log((1 + self.gain) / self.gain)))

    @torch.no_grad()
    def recall(self, cue: Tensor) -> Recall:
        """As `forward`, with the way there: the state in each window after the cue, and every spike.

        Args:
            cue: … × units, of -1 and 1, and 0 where nothing is known.
        """
        spikes: list[Tensor] = []
        states = torch.stack(list(self._path(self._checked(cue, "cue"), None, spikes)))
        return Recall(states, self.energy(states), (states[-1] == states[-2]).all(-1), torch.stack(spikes))

    def _path(self, cue: Tensor, every: int | None, spikes: list[Tensor] | None) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        v = torch.zeros_like(cue)
        r = torch.full_like(cue, 0.5)
        # ms that are left of the refractory time
        rest = torch.randint(self.refractory + 1, cue.shape, generator=generator).to(cue)
        count = torch.zeros_like(cue)
        leak, fade = math.exp(-1 / self.tau_membrane), math.exp(-1 / self.tau_synapse)
        yield cue
        for time in range(1, self.duration + 1):
            current = 1 + self.gain * F.linear(2 * r - 1, self.weight)
            if time <= self.cue_duration:
                current += self.gain * cue
            v = torch.where(rest > 0, 0, current + (v - current) * leak)
            fired = v >= 1
            rest = torch.where(fired, self.refractory, (rest - 1).clamp(min=0))
            v.masked_fill_(fired, 0)
            r = fade * r + (1 - fade) / self.rate * fired
            count += fired
            if spikes is not None:
                spikes.append(fired)
            if (self.duration - time) % self.window == 0:
                if time >= self.cue_duration + self.window:
                    yield torch.where(count >= 0.5 * self.rate * self.window, 1.0, -1.0).to(cue.dtype)
                count = torch.zeros_like(cue)


class ModernHopfield(nn.Module):
    r"""The modern Hopfield network of continuous patterns: the update is attention.

    .. math::
        \xi \leftarrow X \operatorname{softmax}(\beta X^\top \xi), \qquad
        E = -\frac{1}{\beta} \ln \sum_{\mu=1}^{M} e^{\beta\, x_\mu^\top \xi} + \frac{1}{2} \xi^\top \xi
        + \frac{1}{\beta} \ln M + \frac{1}{2} \max_\mu \lVert x_\mu \rVert^2

    with :math:`M` stored patterns :math:`x_\mu`, the columns of :math:`X`, and a state :math:`\xi` of as many numbers.
    The energy never rises, one update mostly suffices, and the number of random patterns that it holds grows
    exponentially with their size. Where :math:`\beta` is small for how far patterns lie apart, several of them are
    recalled as their mean. One update is `torch.nn.functional.scaled_dot_product_attention` of the state to the
    patterns as keys and values, with scale :math:`\beta`.

    The patterns are kept as they are, in the buffer ``patterns`` (capacity × units): no learning rule is at work.

    Args:
        units: the size of a pattern.
        capacity: the most patterns that it shall hold.
        beta: :math:`\beta`, the inverse temperature (1 in the paper's theorem of exponential capacity,
            :math:`1 / \sqrt{\text{units}}` in attention).
        steps: the most updates of a recall, which ends sooner where no number moves by more than the tolerance.
        tolerance: in units of the state.
        device: of the patterns.
        dtype: of the patterns.

    Attributes:
        stored: the number of patterns in it.

    Raises:
        ValueError: an option out of range (capacity 0, say); more patterns than the capacity; a pattern or a cue of
            the wrong size, or not finite.
        RuntimeError: a recall before anything was stored.

    Source: H. Ramsauer et al. (2021), *Hopfield networks is all you need*.

    Example::

        memory = bioopt.nn.ModernHopfield(784, capacity=1000)
        memory.store(images.flatten(1))
        recalled = memory(cue)
    """

    patterns: Tensor
    _stored: Tensor

    def __init__(
        self,
        units: int,
        capacity: int,
        *,
        beta: float = 1.0,  # β
        steps: int = 100,
        tolerance: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check("ModernHopfield", units=(units, POSITIVE_INT), capacity=(capacity, POSITIVE_INT))
        _check(
            "ModernHopfield",
            beta=(beta, POSITIVE),
            steps=(steps, POSITIVE_INT),
            tolerance=(tolerance, NON_NEGATIVE),
        )
        self.units = units
        self.capacity = capacity
        self.beta = beta
        self.steps = steps
        self.tolerance = tolerance
        self.register_buffer("patterns", torch.zeros(capacity, units, device=device, dtype=dtype))
        self.register_buffer("_stored", torch.zeros((), dtype=torch.long, device=device))

    @property
    def stored(self) -> int:
        """The number of patterns in it."""
        return int(self._stored)

    def reset_parameters(self) -> None:
        """Forget everything."""
        self.patterns.zero_()
        self._stored.zero_()

    @torch.no_grad()
    def store(self, patterns: Tensor) -> None:
        """Store patterns (patterns × units, or one) in addition to those that are there."""
        x = self._checked(patterns, "pattern").reshape(-1, self.units)
        first = self.stored
        if first + len(x) > self.capacity:
            raise ValueError(
                f"ModernHopfield: {len(x)} patterns do not fit into capacity={self.capacity}, of which {first} "
                f"are taken: give capacity={first + len(x)}, or forget by reset_parameters()"
            )
        self.patterns[first : first + len(x)] = x
        self._stored += len(x)

    def forward(self, x: Tensor) -> Tensor:
        """What the cue, … × units, brings back."""
        return _last(self._path(self._checked(x, "cue")))

    @torch.no_grad()
    def recall(self, cue: Tensor) -> Recall:
        """As `forward`, with the way there: the state after each update."""
        states = torch.stack(list(self._path(self._checked(cue, "cue"))))
        settled = ((self._updated(states[-1]) - states[-1]).abs() <= self.tolerance).all(-1)
        return Recall(states, self.energy(states), settled)

    def energy(self, states: Tensor) -> Tensor:
        """:math:`E` of each state, … × units; never below 0."""
        x = self._kept()
        lse = torch.logsumexp(self.beta * F.linear(states, x), -1) / self.beta
        largest = x.square().sum(1).max()
        return -lse + 0.5 * states.square().sum(-1) + math.log(len(x)) / self.beta + 0.5 * largest

    def _path(self, state: Tensor) -> Iterator[Tensor]:
        yield state
        for _ in range(self.steps):
            new = self._updated(state)
            yield new
            if bool(((new - state).abs() <= self.tolerance).all()):
                return
            state = new

    def _updated(self, state: Tensor) -> Tensor:
        x = self._kept()
        return torch.softmax(self.beta * F.linear(state, x), -1) @ x

    def _kept(self) -> Tensor:
        if not self.stored:
            raise RuntimeError("ModernHopfield: nothing is stored yet: call store(patterns) before a recall")
        return self.patterns[: self.stored]

    def _checked(self, x: Tensor, what: str) -> Tensor:
        x = _of_size(self, x, self.units, what).to(self.patterns.dtype)
        if not bool(x.isfinite().all()):
            raise ValueError(f"ModernHopfield: a {what} must be finite, but this one has inf or nan in it")
        return x


register_synapse(Hopfield, channel_dim=-1)
register_synapse(SpikingHopfield, channel_dim=-1)
