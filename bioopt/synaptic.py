"""`SynapticRule`: rules whose update is a local product, formed during one ordinary forward pass."""

from __future__ import annotations

import itertools
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from .integrations import recipe
from .optimizer import (
    NON_NEGATIVE,
    Estimate,
    LearningRule,
    Params,
    Probe,
    ProcessGroup,
    _outside,
    backward_where_missing,
    groups_of,
    named_modules_of,
    no_plastic_layer,
    require_finite,
    unique,
)
from .recorder import COMPILED, Synapse, find_synapses

__all__ = ["Few", "SynapticRule", "synapses_of"]


def synapses_of(rule: str, params: Any) -> list[Synapse]:
    """The plastic synapses of the module or modules given as ``params``.

    Raises:
        TypeError: if bare parameters were given.
    """
    modules = named_modules_of(params)
    if not modules:
        raise TypeError(
            f"{rule} watches the activity of layers, so it needs the model, not its parameters: write {rule}(model, "
            f"...) or {rule}([{{'params': model.block1, 'lr': ...}}, ...]), not {rule}(model.parameters(), ...)."
            + recipe()
        )
    for _, module in modules:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"{rule} does its own averaging over ranks, and DistributedDataParallel would wait for gradients that "
                f"never come: write {rule}(model.module, ..., process_group=torch.distributed.group.WORLD)"
            )
    found: dict[nn.Module, Synapse] = {}
    for prefix, module in modules:
        for synapse in find_synapses(module, prefix):
            found.setdefault(synapse.layer, synapse)
    return list(found.values())


class Few(NamedTuple):
    """A teaching signal for a few neurons of each event, which saves the zeros for all the others.

    Events are samples and positions, in the order of activity with its neurons moved to the last dimension.
    """

    neurons: Tensor  #: which are told something, each once, events × few
    told: Tensor  #: what, events × few

    def spread(self, u: Tensor, channel: int) -> Tensor:
        """The same signal of ``u``'s shape."""
        shape = u.movedim(channel, -1).shape
        zeros = self.told.new_zeros(len(self.told), shape[-1])
        return zeros.scatter_(1, self.neurons, self.told).view(shape).movedim(-1, channel)

    def total(self, size: int) -> Tensor:
        """The sum over events for each of ``size`` neurons."""
        return self.told.new_zeros(size).index_add_(0, self.neurons.flatten(), self.told.flatten())


@dataclass
class _Sums:
    """What one synapse has gathered since the last step, summed over samples and positions."""

    product: Tensor  # Σ s xᵀ, of the weight's shape
    signal: Tensor | None  # Σ s, of the bias's shape
    statistic: Tensor | None  # what the rule's running value follows
    events: int  # their number


class SynapticRule(LearningRule):
    r"""A rule that makes each update from the local product of pre- and postsynaptic activity.

    As a synapse fires, the rule turns its postsynaptic activity ``u`` into a teaching signal ``s`` (`signal`);
    the product ``P = ⟨s xᵀ⟩``, averaged over samples and positions (one position of one sample is one postsynaptic
    *event*), is formed at once and summed, so no activity outlives its layer; `update` makes ``Δw`` out of it.
    Every synapse is cut: no error signal passes. A rule with a memory (a threshold, say) implements `statistic` and
    `advance` as well, and reads it by `running`.

    Only weights learn, and what a rule adds by `others`; biases of the trunk and the affine parameters of normalisation
    layers stay frozen.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules). Bare parameters are refused.
        lr: learning rate, per mean event.
        readout: ``"delta"`` trains the last synapse by its local error times its presynaptic activity, which is
            what ``loss.backward()`` leaves there, since all other synapses are cut. ``"teacher"``: it needs no loss;
            as it learns, its postsynaptic activity is replaced by the target ``t``, and each neuron comes to hold
            what goes with it: ``Δw_k = ⟨t_k (x - t_k w_k)⟩``. ``None``: the last synapse follows the rule like the
            others.
        readout_lr: learning rate of the readout; by default that of the group it stands in. The ``lr`` of a group
            that holds nothing else goes before it.
        readout_layer: the readout, by name or as a module; by default the last synapse in registration order.
        readout_options: further options of the readout's param group, such as ``{"momentum": 0.9}``.
        descent: the `torch.optim` class that makes the step; its options as further keywords.
        process_group: average the products over these ranks, each of which has its share of the batch.
        own: hyperparameters of the rule, which may differ between groups (for subclasses).

    Attributes:
        target: of ``readout="teacher"``: set it before each forward pass; `step` uses it up. Class labels, one a
            sample (``t`` is then 1 for the class and ``-1 / (classes - 1)`` for the others), or activity of the
            readout's shape.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, with unknown ones, or with none
            besides the readout.
        TypeError: bare parameters; a model wrapped in DistributedDataParallel.
    """

    splits_batch: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        readout: str | None = "delta",
        readout_lr: float | None = None,
        readout_layer: str | nn.Module | None = None,
        readout_options: dict[str, Any] | None = None,
        descent: type[Optimizer] = SGD,
        process_group: ProcessGroup = None,
        own: dict[str, Any] | None = None,
        **descent_options: Any,
    ) -> None:
        name = type(self).__name__
        defaults = {"lr": lr, **(own or {})}
        if readout not in ("delta", "teacher", None):
            raise ValueError(f"{name}: readout={readout!r} must be 'delta', 'teacher' or None")
        if readout_lr is not None and not NON_NEGATIVE[0](readout_lr):
            raise ValueError(f"{name}: readout_lr={readout_lr!r} must be {NON_NEGATIVE[1]}")
        self._sums: dict[Synapse, _Sums] = {}
        self._silent_checked = False
        self._readout: Synapse | None = None
        self._by_loss = readout == "delta"
        self.target: Tensor | None = None
        groups = groups_of(params)
        synapses = [synapses_of(name, g["params"]) for g in groups]
        everything = [s for group in synapses for s in group]
        if not everything:
            raise ValueError(no_plastic_layer(name))
        if readout is not None:
            self._readout = _choose_readout(name, everything, readout_layer)
            if len(everything) == 1:
                raise ValueError(
                    f"{name}: the only plastic layer, '{self._readout.name}', is the readout, which learns in "
                    f"a way of its own: no layer is left to {name}. Give a deeper model, or readout=None"
                )
            home, near = next((g, f) for g, f in zip(groups, synapses, strict=True) if self._readout in f)
            if readout_lr is None or (near == [self._readout] and "lr" in home):
                readout_lr = home.get("lr", lr)
            group = {**home, "lr": readout_lr, **(readout_options or {}), "params": self._readout.layer}
            group["readout"] = readout
            groups = [g for g, found in zip(groups, synapses, strict=True) if found != [self._readout]] + [group]
        elif any(option is not None for option in (readout_lr, readout_layer, readout_options)):
            raise ValueError(f"{name}: readout_lr, readout_layer and readout_options need a readout, not readout=None")
        super().__init__(
            groups,
            {**defaults, "readout": None},
            descent=descent,
            descent_options=descent_options,
            process_group=process_group,
        )
        self._recorder.anchored = not self._by_loss
        self._recorder.visit = self._gather

    # -- what a rule implements ---------------------------------------------------------------------------------

    def signal(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor | Few:
        """The teaching signal ``s``, of ``u``'s shape or for `Few`: what this layer is told.

        Args:
            u: postsynaptic activity, neurons along ``synapse.channel_dim``.
            synapse: the layer that fires.
            group: its param group.

        A rule that hears the neurons after its synapses (`Recorder.hear`) gathers its products itself instead.
        """
        raise NotImplementedError

    @abstractmethod
    def update(self, product: Tensor, signal: Tensor | None, synapse: Synapse, group: dict[str, Any]) -> Tensor:
        """``Δw`` from the local product, in memory of its own or the product's.

        Args:
            product: ``⟨s xᵀ⟩``, of the weight's shape; may be changed in place.
            signal: ``⟨s⟩`` of each neuron, of the bias's shape; ``None`` where there is no bias.
            synapse: the layer, whose weight and bias are still those that made the product.
            group: its param group.
        """

    def least_neurons(self, group: dict[str, Any]) -> tuple[int, str]:
        """The least number of neurons that a pool must have, and the option or the reason that asks for them."""
        return 1, ""

    def statistic(self, u: Tensor, synapse: Synapse, group: dict[str, Any]) -> Tensor | None:
        """What the rule's running value follows, summed over events: ``Σ u²`` of each neuron, say."""
        return None

    def advance(self, before: Tensor | None, mean: Tensor, group: dict[str, Any]) -> Tensor | None:
        """The running value after a step, from its old one (``None`` at first) and the mean of `statistic`."""
        return None

    def others(
        self, signal: Tensor | None, statistic: Tensor | None, synapse: Synapse, group: dict[str, Any]
    ) -> dict[Tensor, Tensor]:
        """What else of a layer learns, such as its bias, and its change by the means of `signal` and `statistic`."""
        return {}

    def follow(self, synapses: list[Synapse], group: dict[str, Any]) -> None:
        """Before the synapses of a group are watched: a last check, and which neurons are to be heard."""

    def forget(self) -> None:
        """Drop what the pass has left besides products: before an evaluation that counts, and after the step."""

    def kept(self) -> dict[str, Any]:
        """What else the pass leaves as the rule's state, after the step."""
        return {}

    def running(self, synapse: Synapse) -> Tensor | None:
        """The running value of a synapse; ``None`` before its first step."""
        value: Tensor | None = self._own_state.get("running", {}).get(synapse.index)
        return None if value is None else value.to(synapse.weight.device)

    # -- one pass -----------------------------------------------------------------------------------------------

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        if group.get("readout"):
            assert self._readout is not None
            self._readout.is_readout = self._by_loss
            if self._by_loss:
                return self._readout.named_parameters(), [self._readout]
            return [(f"{self._readout.name}.weight", self._readout.weight)], [self._readout]
        synapses = synapses_of(type(self).__name__, group["params"])
        synapses = [s for s in synapses if self._readout is None or s.layer is not self._readout.layer]
        least, reason = self.least_neurons({**self.defaults, **group})
        for s in synapses:
            if (size := len(s.weight) // s.pools) < least:
                raise ValueError(
                    f"{type(self).__name__}: {reason} takes at least {least} neurons, but layer '{s.name}' "
                    f"has {size}" + (" in each group" if s.pools > 1 else "")
                )
        self.follow(synapses, group)
        return unique([(f"{s.name}.weight", s.weight) for s in synapses]), synapses

    def _gather(self, synapse: Synapse, u: Tensor) -> None:
        with torch.no_grad():
            group = self.param_groups[synapse.group]
            channel = u.ndim + synapse.channel_dim
            statistic: Tensor | None
            if synapse is self._readout:
                taught = self._taught(u, synapse)
                s: Tensor | Few = taught
                statistic = over_events(taught * taught, channel)
            else:
                statistic = self.statistic(u.detach(), synapse, group)
                s = self.signal(u.detach(), synapse, group) if u.numel() else torch.zeros_like(u.detach())
            product = local_product(synapse, u, s) if u.numel() else torch.zeros_like(synapse.weight)
        total: Tensor | None = None
        if synapse.bias is not None:
            total = s.total(u.shape[channel]) if isinstance(s, Few) else over_events(s, channel, product.dtype)
        events = u.numel() // u.shape[channel]
        sums = self._sums.get(synapse)
        if sums is None:
            self._sums[synapse] = _Sums(product, total, statistic, events)
        else:
            sums.product += product
            sums.events += events
            if total is not None and sums.signal is not None:
                sums.signal += total
            if statistic is not None and sums.statistic is not None:
                sums.statistic += statistic

    def _total(self, synapse: Synapse, shape: tuple[int, ...], dtype: torch.dtype, events: int) -> Tensor:
        """The sum of a synapse's products, for a rule that adds to it itself, after so many more events."""
        if synapse not in self._sums:
            empty = torch.zeros(shape, dtype=dtype, device=synapse.weight.device)
            self._sums[synapse] = _Sums(empty, None, None, 0)
        self._sums[synapse].events += events
        return self._sums[synapse].product

    def _taught(self, u: Tensor, synapse: Synapse) -> Tensor:
        """The target in the place of the readout's activity."""
        name, target = type(self).__name__, self.target
        if target is None:
            raise RuntimeError(
                f"{name}: readout='teacher' was given no target for this forward pass: set optimizer.target to the "
                "labels before the model runs"
            )
        target = target.to(u.device)
        if target.shape == u.shape:
            return target.to(torch.promote_types(u.dtype, torch.float32))
        classes = u.shape[-1]
        if u.ndim != 2 or target.shape != u.shape[:1] or target.is_floating_point():
            raise ValueError(
                f"{name}: target of shape {tuple(target.shape)} and type {target.dtype} must be class labels, one a "
                f"sample, or have the shape {tuple(u.shape)} of the readout '{synapse.name}'"
            )
        if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise ValueError(f"{name}: target has labels outside 0 to {classes - 1}, the neurons of '{synapse.name}'")
        rest = 1 / max(classes - 1, 1)
        hot = torch.zeros_like(u, dtype=torch.promote_types(u.dtype, torch.float32)).sub_(rest)
        return hot.scatter_(1, target.long().unsqueeze(1), 1.0)

    def readout_parameters(self) -> list[Tensor]:
        """The parameters that learn from the loss."""
        return list(self._readout.parameters()) if self._readout is not None and self._by_loss else []

    def _begin(self) -> None:
        """Before an evaluation whose records alone count."""
        self._sums.clear()
        self.forget()
        self._recorder.reset()
        for p in self._trained():
            p.grad = None

    def _estimate(self, probe: Probe) -> Estimate:
        self._begin()
        losses = probe(grad=self._by_loss)
        backward_where_missing(losses, self.readout_parameters())
        return losses.detach(), *self._collect(losses.detach())

    @torch.no_grad()
    def _collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        try:
            self._check_fired()
            readout = [p for p in self.readout_parameters() if p.grad is not None]
            device = self._trained()[0].device
            loss = torch.zeros((), device=device) if losses is None else losses.mean()
            # Not in half precision: the counts are large. On the device only where other ranks are to add theirs.
            where = None if self.process_group is None else device
            events = torch.tensor([float(sums.events) for sums in self._sums.values()], device=where)
            products = [t for s in self._sums.values() for t in (s.product, s.signal, s.statistic) if t is not None]
            self._sum_over_ranks([loss, events, *products, *[p.grad for p in readout if p.grad is not None]])
            if losses is not None:
                require_finite(self, "the loss", [loss])
            running = dict(self._own_state.get("running", {}))
            grads: dict[Tensor, Tensor] = {}
            for p in readout:
                assert p.grad is not None
                grads[p] = p.grad / self._ranks[1] if self.process_group is not None else p.grad
            for (synapse, sums), count in zip(self._sums.items(), events.tolist(), strict=True):
                if not count:  # it ran, but no sample came its way
                    continue
                mean = None if sums.signal is None else sums.signal / count
                product, statistic = sums.product.div_(count), sums.statistic
                statistic = None if statistic is None else statistic / count
                with torch.autocast(device.type, enabled=False):
                    if synapse is self._readout:
                        assert statistic is not None  # ⟨t²⟩
                        weight = synapse.weight.detach()
                        change = product - statistic.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1)) * weight
                    else:
                        change = self.update(product, mean, synapse, self.param_groups[synapse.group])
                # In the weight's memory format. One weight in two layers gathers from both.
                fits = change.stride() == synapse.weight.stride()
                grad = change.neg_() if fits else torch.neg(change, out=torch.empty_like(synapse.weight))
                grads[synapse.weight] = grads[synapse.weight] + grad if synapse.weight in grads else grad
                if synapse is self._readout:
                    continue
                group = self.param_groups[synapse.group]
                for p, other in self.others(mean, statistic, synapse, group).items():
                    grads[p] = grads[p] - other if p in grads else -other
                if statistic is not None:
                    value = self.advance(self.running(synapse), statistic, group)
                    running |= {} if value is None else {synapse.index: value}
            return grads, ({"running": running} if running else {}) | self.kept()
        finally:
            self._sums.clear()
            self.forget()
            self.target = None  # an old one shall not teach a new batch

    def _check_fired(self) -> None:
        name, fired = type(self).__name__, list(self._recorder.fired)
        if not fired:
            raise RuntimeError(
                f"{name}: no synapse has fired since the last step. Run the model in training mode (model.train()) "
                f"before step(), or in the closure; {COMPILED}"
            )
        readout = self._readout
        if readout is not None and readout.layer.training and readout.weight.requires_grad:
            if readout not in fired:
                raise RuntimeError(f"{name}: the readout '{readout.name}' did not fire; name another by readout_layer=")
            if fired[-1] is not readout:
                raise RuntimeError(
                    f"{name}: layer '{fired[-1].name}' fires after the readout '{readout.name}', which must be last. "
                    f"Write readout_layer='{fired[-1].name}'"
                )
            if self._by_loss and all(p.grad is None for p in readout.parameters()):
                raise RuntimeError(
                    f"{name}: the readout '{readout.name}' learns from the loss, but no gradient has reached it: call "
                    "loss.backward() before step(), or give step() a closure that returns the loss. readout=None "
                    "makes a network without a loss"
                )
        if not self._silent_checked:
            self._silent_checked = True
            awake = [s for s in self._recorder.synapses.values() if s.layer.training and s.weight.requires_grad]
            silent = [s.name for s in awake if s not in fired]
            if silent:
                warnings.warn(f"{name}: did not fire and learn nothing: {', '.join(silent)}", stacklevel=_outside())


def over_events(values: Tensor, channel: int, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over samples and positions for each neuron."""
    events = [d for d in range(values.ndim) if d != channel]
    return values.sum(events, dtype=dtype) if events else values.to(dtype or values.dtype)  # sum([]) is over all


def local_product(synapse: Synapse, u: Tensor, s: Tensor | Few) -> Tensor:
    """``Σ s xᵀ`` over samples and positions, of the weight's shape.

    Autograd inside the one layer that made ``u``: right for every kind of layer. On the CPU, convolutions of many
    inputs take the same product over their patches instead, half the time of the library's own; where few neurons of
    an event learn, it is a sparse product.
    """
    weight, plain = synapse.weight, _is_plain_convolution(synapse, u)  # the sizes below are measured
    if isinstance(s, Few):
        if plain and weight.shape[1] >= 32 and len(weight) >= 16 * s.neurons.shape[1]:
            return _product_of_few(weight, u, s)
        s = s.spread(u, u.ndim + synapse.channel_dim)
    if plain and weight[0].numel() >= 512 and len(weight) >= 256:  # fewer do not repay the copy of the patches
        return _product_of_patches(weight, u, s)
    # A sum over the events of a large batch is too much for float16, and the entries of a mean are too small.
    scale = (u.numel() / len(weight)) ** -0.5 if u.dtype == torch.float16 else 1.0
    (product,) = torch.autograd.grad(u, weight, (s if scale == 1.0 else s * scale).to(u.dtype))
    return product if scale == 1.0 else product.div_(scale)


def _is_plain_convolution(synapse: Synapse, u: Tensor) -> bool:
    """Whether ``u`` was made by a convolution on the CPU that keeps what it saw, one image beside another."""
    return (
        type(synapse.layer) is nn.Conv2d
        and synapse.layer.groups == 1
        and u.device.type == "cpu"
        and u.dtype in (torch.float32, torch.float64)
        and type(u.grad_fn).__name__ == "ConvolutionBackward0"  # not of a compiled layer, nor of a single image
    )


def _product_of_patches(weight: Tensor, u: Tensor, s: Tensor) -> Tensor:
    made: Any = u.grad_fn
    outputs, inputs, *kernel = weight.shape
    width, positions = weight[0].numel(), u[0, 0].numel()
    # So many samples at a time that their patches fit into the cache, and are small beside activity or weights.
    step = max(1, max(100_000, min(2_000_000, max(weight.numel(), u.numel()) // 4)) // (width * positions))
    total: Tensor | None = None
    for start in range(0, len(u), step):
        patches = _padded(made, start, step)
        for dim, (size, stride, dilation) in enumerate(
            zip(kernel, made._saved_stride, made._saved_dilation, strict=True), start=1
        ):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, width)
        told = s[start : start + step].permute(0, 2, 3, 1).reshape(-1, outputs).to(rows.dtype)
        total = told.T @ rows if total is None else total.addmm_(told.T, rows)
        del patches, rows  # before the next
    assert total is not None
    return total.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)


def _product_of_few(weight: Tensor, u: Tensor, s: Few) -> Tensor:
    """Each neuron has a bag of the events that it learns: for each place in the kernel, the sum of the pixels there."""
    made: Any = u.grad_fn
    outputs, inputs, *kernel = weight.shape
    positions, few = u[0, 0].numel(), s.neurons.shape[1]
    down, across = (torch.arange(n, device=u.device) * d for n, d in zip(u.shape[2:], made._saved_stride, strict=True))
    every = torch.arange(outputs, device=u.device)
    total = weight.new_empty(outputs, *kernel, inputs)
    # So many samples at a time that they fit into the cache, unless that is little beside what they add up to.
    step = 1 + max(500_000, weight.numel() // 2) // (inputs * positions)
    for start in range(0, len(u), step):
        x = _padded(made, start, step)
        pixels, (samples, height, width) = x.reshape(-1, inputs), x.shape[:3]
        corner = torch.arange(samples, device=x.device).view(-1, 1, 1) * height * width + down.view(-1, 1) * width
        corner = (corner + across).flatten()  # of each event's patch
        events = slice(start * positions, start * positions + len(corner))
        neuron, order = s.neurons[events].flatten().sort()
        told = s.told[events].flatten()[order].to(x.dtype)
        seen, first = corner[order // few], torch.searchsorted(neuron, every)
        for i, j in itertools.product(*map(range, kernel)):
            pixel = seen + (i * made._saved_dilation[0] * width + j * made._saved_dilation[1])
            bags = F.embedding_bag(pixel, pixels, first, mode="sum", per_sample_weights=told)
            if start:
                total[:, i, j] += bags
            else:
                total[:, i, j] = bags
    return total.permute(0, 3, 1, 2)


def _padded(made: Any, start: int, count: int) -> Tensor:
    """Some samples of what a convolution saw, channels last."""
    pad = [p for size in reversed(made._saved_padding) for p in (size, size)]
    return F.pad(made._saved_input[start : start + count], pad).permute(0, 2, 3, 1)


def _choose_readout(rule: str, synapses: list[Synapse], wanted: str | nn.Module | None) -> Synapse:
    if wanted is None:
        return synapses[-1]
    for synapse in synapses:
        if wanted is synapse.layer or wanted == synapse.name:
            return synapse
    raise ValueError(
        f"{rule}: readout_layer={wanted!r} is not one of the synapses: {', '.join(s.name for s in synapses)}"
    )
