"""`LocalPerturbation`: noise on the activity of a block is credited with the slope of the block's own loss."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Unpack, final

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from ..core._torch_private import forward_gradients_enabled, in_dual_level
from ..core.acts import Isolated, isolate
from ..core.constraints import POSITIVE_INT, Constraint, one_of
from ..core.noise import NoiseSource, fill_normal_, fill_rademacher_
from ..core.params import Params, no_plastic_layer, unique
from ..core.probe import NO_TANGENT, Probe, prepare_forward_ad
from ..core.products import in_full
from ..core.reach import Gates, Pending, gates_behind
from ..core.recorder import Firing
from ..core.rows import Rows
from ..core.rule import Estimate
from ..core.sums import add_up
from ..core.synapse import Synapse
from .base import BlockRule
from .blocks import Block
from .heads import LocalOptions, pooled, require_size
from .units import Units, in_positions, unpooled

__all__ = ["LocalPerturbation"]

FILL = {"normal": fill_normal_, "rademacher": fill_rademacher_}
LEAK = 0.1  # of the noise of some units, the share that may reach the features of others


class Noisy(NamedTuple):
    """A firing with noise.

    Attributes:
        synapse: that fired.
        u: its output, with the graph of the layer alone.
        noise: of its shape.
        rows: the samples that it ran on; ``None``: all.
        beneath: firings of the same block whose activity it received.
    """

    synapse: Synapse
    u: Tensor
    noise: Tensor
    rows: Rows | None
    beneath: tuple[Pending, ...]


@final
class LocalPerturbation(BlockRule):
    r"""Noise on a block's activity is credited with the slope of the block's own loss, without a backward pass.

    As each layer fires, its activity :math:`u` gets a direction of noise :math:`\xi`, and the forward pass carries the
    derivative along it, :math:`\dot h`, to the activity :math:`h` at the end of the block. There a linear classifier on
    pooled activity :math:`f = \mathrm{pool}(h)` gives the slope of its cross-entropy,

    .. math::
        z = V f + c, \qquad e = \mathrm{softmax}(z) - \mathrm{onehot}(y), \qquad
        \lambda_k = e \cdot V_k \dot f_k, \qquad
        \Delta W = -\Big\langle \sum_k \lambda_k\, \xi_k\, x^\top \Big\rangle, \qquad
        \Delta V = -\langle e\, f^\top \rangle .

    A *unit* :math:`k` is a group of neurons in a patch of positions: one experiment for each unit of each sample, of
    which there are many in a batch. Noise is credited with the slope that its own unit contributes, while the
    classifier sees all of them. The mean of :math:`\Delta W` is minus the gradient of the block's loss; its variance
    grows with the number of activities in a unit. The classifier learns by its own error, the exact gradient of its
    weights, and so does the readout. The next layer receives the clean activity.

    With one neuron and one position in a unit, and ``distribution="rademacher"``, this would be backpropagation through
    the classifier, whose weights would be known to each neuron. The fewer the units, the less needs to be known: with
    ``groups=1`` and ``pool=1``, one number for each sample and block.

    A unit is taken to be what lies beneath its features: the same neurons, and the positions beneath its patch. In the
    first step two more passes find out in which layers noise spreads further (a layer of ``blocks=`` with others above
    it, attention, a flattening in another order), and there each sample is one unit. What little spreads over borders,
    below a tenth, through batch statistics or windows of pooling that overlap, is not credited.

    Cost of a step: one forward pass with derivatives between the layers, one product of weights' shape for each layer,
    and a closure, which may call ``backward()``.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Weight and bias of each layer learn;
            other parameters, such as those of normalisation, stay as they are.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        groups: of neurons, at most; as many as divide the neurons of a layer evenly.
        pool: the number of patches along each dimension of images or sequences, and of the positions that a classifier
            sees.
        distribution: of :math:`\xi`: ``"rademacher"``, -1 and 1, or ``"normal"``.
        options: ``head_lr``, ``blocks``, ``classes``, ``seed``, of heads and noise, ``example``, ``exclude``,
            ``descent`` and its options, ``process_group``, as in `BlockRule`.

    Attributes:
        target: the labels, as in `BlockRule`.

    Raises:
        RuntimeError: an operation in a block without a forward-mode derivative, or that lets no derivative pass.

    Source: M. Ren, S. Kornblith, R. Liao & G. Hinton (2023), *Scaling forward gradient with local losses*, ICLR.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "groups": POSITIVE_INT,
        "pool": POSITIVE_INT,
        "patches": (lambda v: v is None or (isinstance(v, int) and v >= 1), "an integer >= 1, or None"),
    }

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        groups: int = 16,
        patches: int | None = None,
        pool: int = 4,
        distribution: str = "rademacher",
        **options: Unpack[LocalOptions],
    ) -> None:
        self._check_value("distribution", distribution, one_of(*FILL))
        self.distribution = distribution
        self._noise = NoiseSource()
        self._streams: dict[torch.device, torch.Generator] | None = None  # in a step, the noise to come
        self._noisy: dict[Pending, Noisy] = {}  # whose block has not ended yet
        self._found: dict[Synapse, Units | None] = {}  # in the last pass; None: a sample is one unit
        self._found_before: dict[Synapse, Units | None] = {}
        self._spread: dict[Synapse, Tensor] | None = None  # in a pass that measures it
        super().__init__(params, lr, own={"groups": groups, "patches": patches, "pool": pool}, **options)
        prepare_forward_ad()
        self._own_state = {"step": 0, "in_units": {}}
        self._recorder.act(self._receive, self._perturb)

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        synapses = self._synapses_of(group["params"])
        if not synapses:
            raise ValueError(no_plastic_layer(type(self).__name__))
        return unique([named for s in synapses for named in s.named_parameters()]), synapses

    def new_head(self, block: Block) -> nn.Module:
        """The classifier."""
        weight = block.synapses[-1].weight
        return nn.LazyLinear(self.number_of_classes, dtype=weight.dtype, device=weight.device)

    def _estimate(self, probe: Probe) -> Estimate:
        losses = self._evaluated(probe)
        in_units: dict[int, bool] = self._own_state["in_units"]
        new = [s for s, units in self._found.items() if units is not None and s.index not in in_units]
        if new:
            spread = self._measured(probe, new)
            in_units = in_units | {s.index: share < LEAK for s, share in zip(new, spread.tolist(), strict=True)}
            self._own_state = {**self._own_state, "in_units": in_units}
            losses = self._evaluated(probe)
        return losses, *self._gathered(losses)

    def _measured(self, probe: Probe, synapses: list[Synapse]) -> Tensor:
        """How far noise in every other unit of these layers spreads to the features of the other units."""
        self._spread = {}
        try:
            self._evaluated(probe)
            spread = torch.stack([self._spread[s] for s in synapses])
        finally:
            self._spread = None
        self._average_over_ranks([spread])
        return spread

    def _evaluated(self, probe: Probe) -> Tensor:
        """The losses of one pass, with noise."""
        self.begin()
        self._found_before, self._found = self._found, {}
        self._streams = {}
        self._undo.append(self._end_pass)
        try:
            with forward_ad.dual_level():
                losses, _ = probe.gradients(self.gradient_parameters(), [self._recorder.reach.anchor])
        except RuntimeError as error:  # or NotImplementedError
            if "forward AD" not in str(error) and "jvp" not in str(error):
                raise
            raise RuntimeError(
                f"LocalPerturbation takes slopes in the forward pass, but an operation has no forward derivative "
                f"({str(error).splitlines()[0]}): replace it, or use NodePerturbation, which compares losses"
            ) from error
        finally:
            self._undo.remove(self._end_pass)
            self._end_pass()
        return losses

    def _end_pass(self) -> None:
        self._streams = None
        self._noisy.clear()
        if in_dual_level():  # which an interrupt has left open
            forward_ad.exit_dual_level()

    # -- one pass -----------------------------------------------------------------------------------------------

    def _receive(self, synapse: Synapse, x: Tensor) -> Tensor | Isolated:
        """A layer receives clean activity, or, inside a block, activity with the derivatives of the layers below."""
        entered = self._enter(synapse, x)
        if self._streams is None:
            return entered
        if not self._noisy and in_dual_level():  # what bypasses layers carries no derivative past the end of a block
            forward_ad.exit_dual_level()
            forward_ad.enter_dual_level()
        if synapse not in self._blocks:
            return forward_ad.unpack_dual(entered).primal
        return isolate(synapse, x if entered is x else forward_ad.unpack_dual(entered).primal)

    def _perturb(self, firing: Firing, u: Tensor) -> Tensor:
        """The activity that a layer hands on: clean, with noise as its derivative."""
        synapse, reach = firing.synapse, self._recorder.reach
        if self._streams is None or synapse not in self._blocks:
            return self._leave(firing, u)
        if firing.replay or not torch.is_grad_enabled():
            return u
        if not forward_gradients_enabled():
            raise RuntimeError(NO_TANGENT)
        primal, tangent = forward_ad.unpack_dual(u)
        noise = FILL[self.distribution](torch.empty_like(primal.detach()), self._stream(u.device))
        if self._spread is not None:
            self._keep_every_other_unit(synapse, noise)
        pending = reach.pending(synapse)
        token = reach.token(firing.x, pending)
        assert token is not None  # grad mode is on
        inner = gates_behind(firing.x.grad_fn, reach).open if firing.x.grad_fn is not None else ()
        beneath = tuple(gate.pending for gate in inner if gate.pending in self._noisy)
        self._noisy[pending] = Noisy(synapse, primal, noise, firing.rows_of(u), beneath)
        given = forward_ad.make_dual(primal.detach(), noise if tangent is None else noise + tangent)
        return reach.gate(given, pending, token)

    def _stream(self, device: torch.device) -> torch.Generator:
        """The noise of this step, one layer after another."""
        assert self._streams is not None
        if device not in self._streams:
            self._streams[device] = self._noise.stream(device, self.seed, self._own_state["step"], self._ranks[0])
        return self._streams[device]

    def _at_end(self, blocks: list[Block], behind: Gates, x: Tensor, channel_dim: int) -> dict[Tensor, Tensor]:
        ended = self._ended([gate.pending for gate in behind.open if gate.kept])
        h, tangent = forward_ad.unpack_dual(x)
        if self._streams is not None and tangent is None:
            raise RuntimeError(
                f"LocalPerturbation: noise on layer '{blocks[-1].synapses[-1].name}' does not reach the next layer, "
                "because an operation between them has no slope, or cuts the derivative (detach, numbers in place of "
                "tensors): replace it, or use NodePerturbation, which compares losses"
            )
        head: Any = self._owned[blocks[0].name]
        group = self.param_groups[blocks[0].synapses[0].group]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            like = next(iter(ended), None)
            at = _as_beneath(h, channel_dim, like)
            features = pooled(at, 1 - at.ndim, group["pool"]).to(head.weight.dtype)
            require_size(type(self).__name__, blocks[0].name, head, features)
            scores = in_full(self.head(blocks[0], features))
            if tangent is None:  # a pass of no step
                return {}
            error = scores.softmax(1) - F.one_hot(self.labels(h), self.number_of_classes)
            grads = {head.weight: error.mT @ features, head.bias: error.sum(0)}
            units = Units.of(at, group["groups"], group["patches"])
            windows = [min(group["pool"], n) for n in units.positions]
            weight = unpooled(head.weight.view(-1, units.neurons, *windows), units.positions)
            moved = _as_beneath(tangent, channel_dim, like).to(weight.dtype)
            if self._spread is not None:
                self._measure_spread(units, moved, ended)
            slopes = units.sums(_slopes(weight, moved, error, units.groups))
        for noisy in ended:
            s = self._signal(noisy, slopes, units)
            params = noisy.synapse.parameters()
            add_up(grads, zip(params, torch.autograd.grad(noisy.u, params, s), strict=True))
        return {p: g / len(h) for p, g in grads.items() if p.requires_grad}

    def _ended(self, pending: list[Pending]) -> list[Noisy]:
        """The firings of blocks that end, above and below, in the order in which they fired."""
        ending: set[Pending] = set()
        while pending:
            one = pending.pop()
            if one in self._noisy and one not in ending:
                ending.add(one)
                pending += self._noisy[one].beneath
        return [self._noisy.pop(one) for one in [*self._noisy] if one in ending]

    def _signal(self, noisy: Noisy, slopes: Tensor, units: Units) -> Tensor:
        """The noise times its credit, in place."""
        synapse, noise = noisy.synapse, noisy.noise
        at = _neurons_second(noise, synapse)
        self._found[synapse] = units if units.fit(at) and not units.single else None
        if noisy.rows is not None and len(slopes) == noisy.rows.count:
            slopes = slopes[noisy.rows.index]
        if self._found[synapse] is not None and self._own_state["in_units"].get(synapse.index, False):
            credit = units.at_positions(slopes, at.shape[2:]).to(noise.dtype)
            at.unflatten(1, (units.groups, -1)).mul_(credit.unsqueeze(2))
            return noise
        credit = slopes.flatten(1).sum(1).to(noise.dtype)
        return noise.mul_(credit.view(-1, *[1] * (noise.ndim - 1)))

    # -- where noise spreads ------------------------------------------------------------------------------------

    def _keep_every_other_unit(self, synapse: Synapse, noise: Tensor) -> None:
        """Leave noise in the even units alone, if a pass before has found units."""
        if (units := self._found_before.get(synapse)) is not None:
            at = _neurons_second(noise, synapse)
            odd = units.at_positions(units.odd(noise.device), at.shape[2:])
            at.unflatten(1, (units.groups, -1)).mul_(1 - odd.unsqueeze(2).to(noise.dtype))

    def _measure_spread(self, units: Units, moved: Tensor, ended: list[Noisy]) -> None:
        """The share of the slopes' power that is in odd units."""
        assert self._spread is not None
        power = units.sums(in_full(moved).square())
        share = (power * units.odd(power.device)).sum() / power.sum().clamp_min(torch.finfo(power.dtype).tiny)
        for noisy in ended:
            self._spread[noisy.synapse] = share


def _neurons_second(values: Tensor, synapse: Synapse) -> Tensor:
    """Activity of a layer with its neurons in the second dimension, a view."""
    return values.movedim(synapse.channel_dim, 1)


def _as_beneath(h: Tensor, channel_dim: int, noisy: Noisy | None) -> Tensor:
    """The activity at the end of a block, neurons in the second dimension, with positions as in the layer below."""
    if noisy is None:
        return in_positions(h, channel_dim, 1, ())
    _, neurons, *positions = _neurons_second(noisy.u, noisy.synapse).shape
    return in_positions(h, channel_dim, neurons, positions)


def _slopes(weight: Tensor, moved: Tensor, error: Tensor, groups: int) -> Tensor:
    """What the change of each group, at each position, contributes to the slope of its sample's loss.

    Args:
        weight: of the scores, classes × neurons × positions.
        moved: the derivative of the activity, samples × neurons × positions.
        error: of the scores, samples × classes.
        groups: of neurons.

    Returns:
        samples × groups × positions.
    """
    of_groups, by = moved.unflatten(1, (groups, -1)), weight.unflatten(1, (groups, -1))
    scores = torch.einsum("ngc...,kgc...->ngk...", of_groups, by)
    return torch.einsum("ngk...,nk->ng...", in_full(scores), error)
