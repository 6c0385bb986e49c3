"""Content-addressable memories, which recall a stored pattern from a part or a corrupted copy of it."""

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
from ..core.products import in_full
from ..core.synapse import register_synapse
from ..hebbian import Hebbian

__all__ = ["Hopfield", "ModernHopfield", "Recall", "SpikingHopfield"]

STORAGE = ("hebbian", "storkey", "pseudo_inverse")


class Recall(NamedTuple):
    """The trajectory from a cue to the recalled pattern.

    Args:
        states: times × cues × units, from the cue to the recalled pattern. If all cues settle, the last two are equal.
        energies: times × cues.
        settled: for each cue, whether its last state is a fixed point.
        spikes: steps × cues × units, true where a unit fired; ``None`` unless units spike.
    """

    states: Tensor
    energies: Tensor
    settled: Tensor
    spikes: Tensor | None = None


def _check(owner: str, **options: tuple[Any, Constraint]) -> None:
    for name, (value, constraint) in options.items():
        require_in_range(owner, name, value, constraint)


class _Binary(nn.Module, ABC):
    """Base class of memories of binary patterns: units connected all to all by symmetric weights."""

    def __init__(self, units: int, seed: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        _check(type(self).__name__, units=(units, POSITIVE_INT), seed=(seed, SEED))
        self.units = units
        self.seed = seed
        self.weight = nn.Parameter(torch.zeros(units, units, device=device, dtype=dtype))
        self.eval()  # recall is the default; to store by a learning rule, call train()

    def reset_parameters(self) -> None:
        """Delete all patterns."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The pattern recalled from a cue; in training mode the input itself, so that a learning rule can store it.

        Args:
            x: a cue, … × units, of -1, 1 and 0 (unknown); in training mode a pattern of -1 and 1.
        """
        if self.training:
            # The pattern clamps the units: the output has the value of x and the graph of W x.
            x = self._checked(x, "pattern")
            diagonal = torch.eye(self.units, dtype=torch.bool, device=x.device)
            field = F.linear(x, self.weight.masked_fill(diagonal, 0))
            return x + (field - field.detach())
        with torch.no_grad():
            return _last(self._path(self._checked(x, "cue"), None, None))

    def store(self, patterns: Tensor, rule: str = "hebbian") -> None:
        """Store patterns in addition to those stored before.

        Args:
            patterns: patterns × units (or one pattern), of -1 and 1.
            rule: ``"hebbian"``, one step of `bioopt.Hebbian`; ``"storkey"``, one pattern after another; or
                ``"pseudo_inverse"``, which needs all patterns at once, replaces those stored before, and is not local.

        Raises:
            ValueError: a pattern has the wrong size or values, there are no patterns, or the rule is unknown.
        """
        name = type(self).__name__
        if rule not in STORAGE:
            raise ValueError(f"{name}: rule={rule!r} must be one of {', '.join(STORAGE)}")
        xi = self._checked(patterns, "pattern").detach().reshape(-1, self.units)
        if not len(xi):
            raise ValueError(f"{name}: no patterns to store")
        if rule == "hebbian":
            self._hebbian(xi)
            return
        with torch.no_grad():
            if rule == "storkey":
                for pattern in xi:
                    self._storkey(pattern)
            else:
                full = in_full(xi)
                self.weight.copy_(torch.linalg.pinv(full) @ full).fill_diagonal_(0)

    def _hebbian(self, xi: Tensor) -> None:
        synapse = Hopfield(self.units, device="meta")  # shares the weights, but no other rule has hooks on it
        synapse.weight = nn.Parameter(self.weight.detach())
        synapse.train()
        lr = len(xi) / self.units
        optimizer = Hebbian(synapse, lr, competition="none", decay="none", readout=None, homeostasis=False)
        synapse(xi)
        optimizer.step()
        optimizer.close()

    def _storkey(self, xi: Tensor) -> None:
        # h_ij = h_i - w_ij ξ_j, with the zero diagonal, and ξ_j² = 1
        h = torch.outer(self.weight @ xi, xi) - self.weight
        update = (torch.outer(xi, xi) - h - h.T) / self.units
        self.weight.add_(update.fill_diagonal_(0))

    def energy(self, states: Tensor) -> Tensor:
        r""":math:`-\frac{1}{2} s^\top W s` of each state, … × units."""
        return -0.5 * (F.linear(states, self.weight) * states).sum(-1)

    @abstractmethod
    def _path(self, cue: Tensor, every: int | None, spikes: list[Tensor] | None) -> Iterator[Tensor]:
        """The states from the cue on, as tensors that do not share memory."""

    def _checked(self, x: Tensor, what: str) -> Tensor:
        x = _require_size(self, x, self.units, what).to(self.weight.dtype)
        fits = x.abs() == 1 if what == "pattern" else x == x.sign()
        if not bool(fits.all()):
            found = ", ".join(f"{v:g}" for v in x[~fits][:3].tolist())
            allowed = "-1 and 1" if what == "pattern" else "-1, 1 and 0 (unknown)"
            raise ValueError(
                f"{type(self).__name__}: a {what} must have the values {allowed}, but this one has {found}: binarize "
                "it by torch.where(x > threshold, 1.0, -1.0)"
            )
        return x


def _last(path: Iterator[Tensor]) -> Tensor:
    return deque(path, maxlen=1).pop()


def _require_size(owner: nn.Module, x: Tensor, units: int, what: str) -> Tensor:
    name = type(owner).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a {what} must be a tensor, not {type(x).__name__}")
    if x.ndim < 1 or x.shape[-1] != units:
        raise ValueError(
            f"{name}: a {what} of shape {tuple(x.shape)} does not fit {units} units, its last dimension"
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
    another, in random order) lowers the energy :math:`E` or leaves the state unchanged, so every cue settles: in the
    pattern most similar to it, as long as there are fewer than about :math:`0.138 N` random patterns. A unit whose
    field is zero, within rounding error, keeps its state. Synchronous updates (all units at once) may end in a cycle
    of two states.

    `store` has three rules: the Hebbian rule above, which is one step of `bioopt.Hebbian` over the patterns (in
    training mode the pattern clamps the units, so the postsynaptic activity is :math:`\xi`); Storkey's rule, which is
    local too and has a higher capacity,

    .. math::
        \Delta w_{ij} = \frac{1}{N} (\xi_i \xi_j - \xi_i h_{ji} - h_{ij} \xi_j), \qquad
        h_{ij} = \sum_{k \ne i, j} w_{ik} \xi_k

    and the pseudo-inverse, :math:`W = \Xi^+ \Xi` with the patterns as rows of :math:`\Xi` and the diagonal set to 0,
    which stores fewer than :math:`N` patterns even if they are correlated, but is not local. Any learning rule can
    store patterns::

        memory.train()
        options = {"competition": "none", "decay": "none", "homeostasis": False, "readout": None}
        optimizer = bioopt.Hebbian(memory, lr=1 / memory.units, **options)
        for pattern in patterns:
            memory(pattern)
            optimizer.step()
        memory.eval()

    For learning rules the memory is a synapse (`bioopt.register_synapse`); its ``weight`` is units × units. Unlike
    other modules it starts in evaluation mode.

    Args:
        units: :math:`N`.
        asynchronous: whether units are updated one after another, or all at once.
        sweeps: the maximum number of updates of each unit; recall stops earlier once all cues have settled.
        seed: of the order of asynchronous updates, which is the same for all cues and in every recall.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: an option is out of range, or a pattern or cue has the wrong size or values.

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
        """Like `forward`, but returns the whole trajectory.

        Args:
            cue: … × units, of -1, 1 and 0 (unknown).
            every: record the state after every ``every`` single updates and after each sweep; ``None``: only after each
                sweep.
        """
        if every is not None:
            _check("Hopfield", every=(every, POSITIVE_INT))
        states = torch.stack(list(self._path(self._checked(cue, "cue"), every, None)))
        settled = (self._synchronous_update(states[-1]) == states[-1]).all(-1)
        return Recall(states, self.energy(states), settled)

    def _synchronous_update(self, state: Tensor) -> Tensor:
        """The state after one update of all units at once."""
        return torch.sign(F.linear(state, self.weight) + self._self_coupling() * state)

    def _self_coupling(self) -> Tensor:
        """A bound on the rounding error of each field; as self-coupling it keeps the state of units without a field."""
        info = torch.finfo(self.weight.dtype)
        return info.eps * self.weight.abs().sum(1) + info.tiny

    def _path(self, cue: Tensor, every: int | None, spikes: list[Tensor] | None) -> Iterator[Tensor]:
        if self.asynchronous:
            yield from self._asynchronous_path(cue, every)
            return
        before, state = None, cue
        yield state
        for _ in range(self.sweeps):
            new = self._synchronous_update(state)
            yield new
            if torch.equal(new, state) or (
                before is not None and torch.equal(new, before)
            ):  # settled, or in a cycle of two
                return
            before, state = state, new

    def _asynchronous_path(self, cue: Tensor, every: int | None) -> Iterator[Tensor]:
        def state() -> Tensor:
            return s.T.reshape(cue.shape).clone()

        generator = torch.Generator().manual_seed(self.seed)
        s = cue.reshape(-1, self.units).T.clone(memory_format=torch.contiguous_format)  # units × cues
        units, weights, coupling = s.unbind(), self.weight.unbind(), self._self_coupling().tolist()
        yield state()
        for _ in range(self.sweeps):
            before = s.clone()
            for count, i in enumerate(torch.randperm(self.units, generator=generator).tolist(), 1):
                torch.sign(torch.addmv(units[i], s.T, weights[i], beta=coupling[i]), out=units[i])
                if every is not None and count % every == 0 and count < self.units:
                    yield state()
            yield state()
            if torch.equal(s, before):
                return


class SpikingHopfield(_Binary):
    r"""Hopfield's memory with leaky integrate-and-fire units: those that are 1 in the recalled pattern fire.

    .. math::
        \tau_m \dot v_i = -v_i + 1 + g \sum_j w_{ij} (2 r_j - 1) + c_i, \qquad
        v_i \ge 1: \text{ a spike, and } v_i \leftarrow 0, \qquad
        \tau_s \dot r_j = -r_j + \frac{1}{\nu} \sum_f \delta(t - t_j^f)

    with membrane potentials :math:`v_i` in units of the threshold, the weights and storage rules of `Hopfield`, and
    synaptic traces :math:`r_j` of a unit's spikes. The constant current 1 drives a unit to its threshold, so it is
    silent if its Hopfield field is negative and fires if it is positive;
    :math:`\nu = 1 / (t_r + \tau_m \ln \frac{1 + g}{g})` is the firing rate for a field of 1, as in a stored pattern,
    where :math:`2 r_j - 1` is then :math:`\pm 1`. With a large gain :math:`g` the refractory time limits the rate,
    which then hardly depends on the size of the field. The cue is a current :math:`c_i = \pm g` during the cue's
    duration; afterwards the recurrent synapses sustain the activity. The state is measured over a window of time: 1 for
    units that fire at half the rate :math:`\nu` or more, -1 for the others.

    Units start at random points of their refractory time, so that they do not all fire at once. Time advances in steps
    of 1 ms (the second term of :math:`1 / \nu` is rounded up to whole steps), in which potentials and traces decay
    exactly.

    Args:
        units: :math:`N`.
        gain: :math:`g`, in units of the threshold.
        tau_membrane: :math:`\tau_m`, in ms.
        tau_synapse: :math:`\tau_s`, in ms.
        refractory: :math:`t_r`, in ms, the time for which a unit stays at rest after a spike.
        cue_duration: the duration of the cue, in ms.
        duration: the duration of a recall, in ms: at least that of the cue and two windows.
        window: in ms; a recall has settled if the states of the last two windows are equal.
        seed: of the initial refractory times.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: an option is out of range, or a pattern or cue has the wrong size or values.

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
                    f"an integer >= {cue_duration + 2 * window}, in ms: cue_duration + 2 * window",
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
        r""":math:`\nu`, in spikes per ms (one step)."""
        return 1 / (self.refractory + math.ceil(self.tau_membrane * math.log((1 + self.gain) / self.gain)))

    @torch.no_grad()
    def recall(self, cue: Tensor) -> Recall:
        """Like `forward`, but returns the state in each window after the cue and all spikes.

        Args:
            cue: … × units, of -1, 1 and 0 (unknown).
        """
        spikes: list[Tensor] = []
        states = torch.stack(list(self._path(self._checked(cue, "cue"), None, spikes)))
        return Recall(states, self.energy(states), (states[-1] == states[-2]).all(-1), torch.stack(spikes))

    def _path(self, cue: Tensor, every: int | None, spikes: list[Tensor] | None) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        v = torch.zeros_like(cue)
        r = torch.full_like(cue, 0.5)
        # remaining refractory time, in ms
        refractory = torch.randint(self.refractory + 1, cue.shape, generator=generator).to(cue)
        count = torch.zeros_like(cue)
        leak, fade = math.exp(-1 / self.tau_membrane), math.exp(-1 / self.tau_synapse)
        yield cue
        for time in range(1, self.duration + 1):
            current = 1 + self.gain * F.linear(2 * r - 1, self.weight)
            if time <= self.cue_duration:
                current += self.gain * cue
            v = torch.where(refractory > 0, 0, current + (v - current) * leak)
            fired = v >= 1
            refractory = torch.where(fired, self.refractory, (refractory - 1).clamp(min=0))
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
    r"""The modern Hopfield network of continuous patterns, whose update is attention.

    .. math::
        \xi \leftarrow X \operatorname{softmax}(\beta X^\top \xi), \qquad
        E = -\frac{1}{\beta} \ln \sum_{\mu=1}^{M} e^{\beta\, x_\mu^\top \xi} + \frac{1}{2} \xi^\top \xi
        + \frac{1}{\beta} \ln M + \frac{1}{2} \max_\mu \lVert x_\mu \rVert^2

    with :math:`M` stored patterns :math:`x_\mu`, the columns of :math:`X`, and a state :math:`\xi` of the same size.
    The energy never rises, one update is usually enough, and the capacity for random patterns grows exponentially with
    their size. If :math:`\beta` is small compared with the distances between patterns, the mean of several patterns is
    recalled. One update is `torch.nn.functional.scaled_dot_product_attention` with the state as query, the patterns as
    keys and values, and scale :math:`\beta`.

    The patterns are stored unchanged in the buffer ``patterns`` (capacity × units), without a learning rule.

    Args:
        units: the size of a pattern.
        capacity: the maximum number of patterns.
        beta: :math:`\beta`, the inverse temperature (1 in the paper's theorem of exponential capacity,
            :math:`1 / \sqrt{\text{units}}` in attention).
        steps: the maximum number of updates of a recall, which stops earlier once no element of the state changes by
            more than the tolerance.
        tolerance: in units of the state.
        device: of the patterns.
        dtype: of the patterns.

    Attributes:
        stored: the number of stored patterns.

    Raises:
        ValueError: an option is out of range, there are more patterns than the capacity, or a pattern or cue has the
            wrong size or is not finite.
        RuntimeError: recall before a pattern has been stored.

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
        """The number of stored patterns."""
        return int(self._stored)

    def reset_parameters(self) -> None:
        """Delete all patterns."""
        self.patterns.zero_()
        self._stored.zero_()

    @torch.no_grad()
    def store(self, patterns: Tensor) -> None:
        """Store patterns (patterns × units, or one pattern) in addition to those stored before."""
        x = self._checked(patterns, "pattern").reshape(-1, self.units)
        first = self.stored
        if first + len(x) > self.capacity:
            raise ValueError(
                f"ModernHopfield: {len(x)} patterns do not fit into capacity={self.capacity}, of which {first} "
                f"are used: set capacity={first + len(x)}, or delete the stored ones by reset_parameters()"
            )
        self.patterns[first : first + len(x)] = x
        self._stored += len(x)

    def forward(self, x: Tensor) -> Tensor:
        """The pattern recalled from a cue, … × units."""
        return _last(self._path(self._checked(x, "cue")))

    @torch.no_grad()
    def recall(self, cue: Tensor) -> Recall:
        """Like `forward`, but returns the state after each update."""
        states = torch.stack(list(self._path(self._checked(cue, "cue"))))
        settled = ((self._update(states[-1]) - states[-1]).abs() <= self.tolerance).all(-1)
        return Recall(states, self.energy(states), settled)

    def energy(self, states: Tensor) -> Tensor:
        """:math:`E` of each state, … × units; never below 0."""
        x = self._stored_patterns()
        lse = torch.logsumexp(self.beta * F.linear(states, x), -1) / self.beta
        largest = x.square().sum(1).max()
        return -lse + 0.5 * states.square().sum(-1) + math.log(len(x)) / self.beta + 0.5 * largest

    def _path(self, state: Tensor) -> Iterator[Tensor]:
        yield state
        for _ in range(self.steps):
            new = self._update(state)
            yield new
            if bool(((new - state).abs() <= self.tolerance).all()):
                return
            state = new

    def _update(self, state: Tensor) -> Tensor:
        x = self._stored_patterns()
        return torch.softmax(self.beta * F.linear(state, x), -1) @ x

    def _stored_patterns(self) -> Tensor:
        if not self.stored:
            raise RuntimeError("ModernHopfield: no pattern is stored: call store(patterns) before recall")
        return self.patterns[: self.stored]

    def _checked(self, x: Tensor, what: str) -> Tensor:
        x = _require_size(self, x, self.units, what).to(self.patterns.dtype)
        if not bool(x.isfinite().all()):
            raise ValueError(f"ModernHopfield: a {what} must be finite, but this one has infinite or NaN values")
        return x


register_synapse(Hopfield, channel_dim=-1)
register_synapse(SpikingHopfield, channel_dim=-1)
