"""`LocalPerturbation`: noise on the activity of a block is credited with the slope of the block's own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeAlias, Unpack, final

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from ..core._torch_private import forward_gradients_enabled, in_dual_level
from ..core.acts import Isolated, isolate
from ..core.constraints import POSITIVE_INT, Constraint, one_of
from ..core.noise import NoiseSource, fill_normal_, fill_rademacher_
from ..core.params import Params, named_modules_of, no_plastic_layer, synapses_of, unique
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
from .units import Found, Scope, Units, in_positions, scopes_of, slopes_of, unpooled

__all__ = ["LocalPerturbation"]

FILL = {"normal": fill_normal_, "rademacher": fill_rademacher_}
LEAK = 0.1  # of the effect of some units' activity, the share that may be on the features of others
STILL = 1e-3  # of the effect of noise, that of a direction that is called to have none
FEW = 32  # activities that are normalised together, of which one is a part that its own unit would credit wrongly
TINY = 1e-30

Direction: TypeAlias = Callable[
    [Tensor, torch.Generator], Tensor
]  # of a layer's activity, samples × neurons × positions


class Noisy(NamedTuple):
    """A firing with noise.

    Attributes:
        pending: the firing.
        synapse: that fired.
        u: its output, with the graph of the layer alone.
        noise: of its shape.
        rows: the samples that it ran on; ``None``: all.
        beneath: firings of the same block whose activity it received.
    """

    pending: Pending
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
        \Delta W = -\langle \sum_k \lambda_k\, \xi_k\, x^\top \rangle, \qquad
        \Delta V = -\langle e\, f^\top \rangle .

    A *unit* :math:`k` is a group of neurons in a patch of positions: one experiment for each unit of each sample, of
    which there are many in a batch. Noise is credited with the slope that its own unit contributes, while the
    classifier sees all of them. The mean of :math:`\Delta W` is minus the gradient of the block's loss; its variance
    grows with the number of activities in a unit. The classifier learns by its own error, the exact gradient of its
    weights, and so does the readout. The next layer receives the clean activity.

    With one neuron at one position in a unit, and ``distribution="rademacher"``, a draw is the gradient itself, and
    each neuron must know its weights in the classifier. The fewer the units, the less must be known, and the noisier
    the estimate: with ``neuron_groups=1`` and ``patches=1`` it is one number for each sample and block.

    A unit credits what lies beneath it: the same neurons, at the positions beneath its patch. In the first step, about
    four more passes find out where that is not all that noise acts on. Where a normalisation follows the layer, over
    the batch, a sample or a group, shifts and stretches of the activity have no effect; the teaching signal loses its
    part along these, as each neuron can by its own average activity. Where noise spreads otherwise (layers beneath
    others in ``blocks=``, attention, a flattening in another order), a sample is one unit. What little spreads over
    borders of patches, as from windows of pooling that overlap, is not credited.

    Cost of a step: one forward pass with derivatives between the layers, one local product of each layer, and a
    backward pass of the readout alone. It needs a closure.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Weight and bias of each layer learn;
            other parameters, such as those of normalisation, stay as they are.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        neuron_groups: the number of groups that the neurons of a layer are divided into, at most: as many as divide
            them evenly. A layer of no more neurons has each in a group of its own.
        patches: the number of patches along each dimension of images or sequences, at most; ``None``: each position at
            the end of a block is one.
        pool: the number of positions that a classifier sees along each dimension of images or sequences.
        distribution: of :math:`\xi`: ``"rademacher"``, -1 and 1, or ``"normal"``.
        options: ``readout`` and its options, ``head_lr``, ``blocks``, ``classes``, ``seed``, of heads and noise,
            ``example``, ``exclude``, ``descent`` and its options, ``process_group``, as in `BlockRule`.

    Attributes:
        target: the labels, as in `BlockRule`.

    Raises:
        RuntimeError: an operation in a block without a forward-mode derivative, or that lets no derivative pass.

    Source: M. Ren, S. Kornblith, R. Liao & G. Hinton (2023), *Scaling forward gradient with local losses*, ICLR.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "neuron_groups": POSITIVE_INT,
        "pool": POSITIVE_INT,
        "patches": (lambda v: v is None or (isinstance(v, int) and v >= 1), "an integer >= 1, or None"),
    }

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        neuron_groups: int = 64,
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
        self._shapes: dict[Synapse, torch.Size] = {}  # of activity, neurons second
        self._found: dict[Synapse, Found] = {}  # in the last pass with noise
        self._along: dict[Synapse, Direction] | None = None  # the directions of a pass that measures, in place of noise
        self._reached: dict[Synapse, Tensor] = {}  # the power of what they change, of each unit
        example = options.pop("example", None)
        super().__init__(params, lr, own={"neuron_groups": neuron_groups, "patches": patches, "pool": pool}, **options)
        prepare_forward_ad()
        self._own_state = {"step": 0, "spread": {}}
        self._recorder.act(self._receive, self._perturb)
        if example is not None:
            self._size_heads(params, example)

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        synapses = synapses_of(type(self).__name__, group["params"], self._exclusion)
        if not synapses:
            raise ValueError(no_plastic_layer(type(self).__name__))
        self._modules += named_modules_of(group["params"])
        return unique([named for s in synapses for named in s.named_parameters()]), synapses

    def new_head(self, block: Block) -> nn.Module:
        """The classifier."""
        weight = block.synapses[-1].weight
        return nn.LazyLinear(self.number_of_classes, dtype=weight.dtype, device=weight.device)

    def _estimate(self, probe: Probe) -> Estimate:
        losses = self._evaluated(probe)
        spread: dict[int, tuple[bool, tuple[Any, ...] | None]] = self._own_state["spread"]
        if new := [s for s in self._found if s.index not in spread]:
            self._own_state = {**self._own_state, "spread": spread | self._spread_of(new, probe)}
            losses = self._evaluated(probe)
        return losses, *self._gathered(losses)

    def _evaluated(self, probe: Probe) -> Tensor:
        """The losses of one pass, with noise."""
        self.begin()
        if self._along is None:
            self._found.clear()
        self._reached.clear()
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
            primal: Tensor = forward_ad.unpack_dual(entered).primal
            return primal
        return isolate(synapse, x if entered is x else forward_ad.unpack_dual(entered).primal)

    def _perturb(self, firing: Firing, u: Tensor) -> Tensor:
        """The activity that a layer hands on: clean, with noise as its derivative."""
        synapse, reach = firing.synapse, self._recorder.reach
        self._shapes[synapse] = _neurons_second(u, synapse).shape
        if self._streams is None or synapse not in self._blocks:
            return self._leave(replace(firing, x=forward_ad.unpack_dual(firing.x).primal), u)
        if firing.replay or not torch.is_grad_enabled():
            return u
        if not forward_gradients_enabled():
            raise RuntimeError(NO_TANGENT)
        primal, tangent = forward_ad.unpack_dual(u)
        noise = FILL[self.distribution](torch.empty_like(primal.detach()), self._stream(u.device))
        if self._along is not None:
            along = self._along.get(synapse)
            noise.zero_()
            if along is not None:
                at = _neurons_second(noise, synapse)
                at.copy_(along(_neurons_second(primal.detach(), synapse), self._stream(u.device)))
        pending = reach.pending(synapse)
        token = reach.token(firing.x, pending)
        assert token is not None  # grad mode is on
        inner = gates_behind(firing.x.grad_fn, reach).open if firing.x.grad_fn is not None else ()
        beneath = tuple(gate.pending for gate in inner if gate.pending in self._noisy)
        self._noisy[pending] = Noisy(pending, synapse, primal, noise, firing.rows_of(u), beneath)
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
            like = self._shapes[max((gate.pending.synapse for gate in behind.open), key=lambda s: s.index)]
            at = in_positions(h, channel_dim, like[1], like[2:])
            features = pooled(at, 1 - at.ndim, group["pool"]).to(head.weight.dtype)
            require_size(type(self).__name__, blocks[0].name, head, features)
            scores = in_full(self.head(blocks[0], features))
            if tangent is None:  # a pass of no step
                return {}
            error = scores.softmax(1) - F.one_hot(self.labels(h), self.number_of_classes)
            found = {head.weight: error.mT @ in_full(features), head.bias: error.sum(0)}
            grads = {p: g.to(p.dtype) for p, g in found.items()}
            units = Units.of(at, group["neuron_groups"], group["patches"])
            windows = [min(group["pool"], n) for n in units.positions]
            weight = unpooled(head.weight.view(-1, units.neurons, *windows), units.positions)
            moved = in_positions(tangent, channel_dim, like[1], like[2:]).to(weight.dtype)
            slopes = units.sums(slopes_of(weight, moved, error, units.groups))
            if any(noisy.synapse.index not in self._own_state["spread"] for noisy in ended):
                power = units.sums(in_full(moved).square()).sum(0, keepdim=True)
                self._reached |= {noisy.synapse: power for noisy in ended}
        if self._along is not None:
            return {}
        inner = {one for noisy in ended for one in noisy.beneath}
        for place, noisy in enumerate(ended):
            fits = noisy.pending not in inner and units.fit(_neurons_second(noisy.u, noisy.synapse))
            self._found[noisy.synapse] = Found(units, fits, place)
            s = self._signal(noisy, slopes)
            params = noisy.synapse.parameters()
            add_up(grads, zip(params, torch.autograd.grad(noisy.u, params, s), strict=True))
        return {p: g / max(len(h), 1) for p, g in grads.items() if p.requires_grad}

    def _ended(self, pending: list[Pending]) -> list[Noisy]:
        """The firings of blocks that end, above and below, in the order in which they fired."""
        ending: set[Pending] = set()
        while pending:
            one = pending.pop()
            if one in self._noisy and one not in ending:
                ending.add(one)
                pending += self._noisy[one].beneath
        return [self._noisy.pop(one) for one in [*self._noisy] if one in ending]

    def _signal(self, noisy: Noisy, slopes: Tensor) -> Tensor:
        """The noise times its credit, in place."""
        synapse, noise = noisy.synapse, noisy.noise
        if noisy.rows is not None and len(slopes) == noisy.rows.count:
            slopes = slopes[noisy.rows.index]
        units, at = self._found[synapse].units, _neurons_second(noise, synapse)
        in_units, scope = self._own_state["spread"].get(synapse.index, (False, None))
        if in_units and self._found[synapse].fits:
            credit = units.at_positions(slopes, at.shape[2:]).to(noise.dtype)
            at.unflatten(1, (units.groups, -1)).mul_(credit.unsqueeze(2))
        else:
            credit = slopes.flatten(1).sum(1).to(noise.dtype)
            noise.mul_(credit.view(-1, *[1] * (noise.ndim - 1)))
        if scope is not None:
            at.copy_(Scope(*scope).with_effect(at, _neurons_second(noisy.u.detach(), synapse)))
        return noise

    # -- where noise spreads ------------------------------------------------------------------------------------

    def _spread_of(self, layers: list[Synapse], probe: Probe) -> dict[int, tuple[bool, tuple[Any, ...] | None]]:
        """Of each layer, whether noise stays in its unit, and the scope of a normalisation that follows, if any."""
        found, by_noise = {s: self._found[s] for s in layers}, {s: float(self._reached[s].sum()) for s in layers}
        own: dict[Synapse, tuple[bool, Scope | None]] = {}
        sizes = {m.num_groups for _, root in self._modules for m in root.modules() if isinstance(m, nn.GroupNorm)}
        try:
            for place in range(1 + max(one.place for one in found.values())):
                here = [s for s in layers if found[s].place == place]
                reached = self._power(probe, {s: found[s].units.every_other for s in here})
                leaks = {
                    s: float((p * found[s].units.odd(p.device)).sum() / p.sum().clamp_min(TINY))
                    for s, p in reached.items()
                }
                own |= {s: (found[s].fits and leaks[s] < LEAK, None) for s in here}
                options = {s: scopes_of(self._shapes[s], sizes) for s in here}
                options = {
                    s: scopes[-1:] if own[s][0] or not found[s].fits else scopes for s, scopes in options.items()
                }
                while options := {s: scopes for s, scopes in options.items() if scopes}:
                    tried = {s: scopes.pop(0) for s, scopes in options.items()}
                    reached = self._power(probe, {s: scope.without_effect for s, scope in tried.items()})
                    for s, p in reached.items():
                        if float(p.sum()) < STILL * by_noise[s]:
                            options[s] = []
                            if tried[s].size(self._shapes[s]) >= FEW:
                                own[s] = found[s].fits, tried[s]
        finally:
            self._along = None
        return {s.index: (fits, None if scope is None else tuple(scope)) for s, (fits, scope) in own.items()}

    def _power(self, probe: Probe, along: dict[Synapse, Direction]) -> dict[Synapse, Tensor]:
        """How far activity at the ends of blocks moves along directions of some layers, squared, for each unit."""
        self._along = along
        self._evaluated(probe)
        return {s: self._reached[s] for s in along}


def _neurons_second(values: Tensor, synapse: Synapse) -> Tensor:
    """Activity of a layer with its neurons in the second dimension, a view."""
    return values.movedim(synapse.channel_dim, 1)
