"""What `audit` does to a network for one evaluation: each is a context manager that undoes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from ..core._torch_private import backward_pass, in_dual_level, is_batched
from ..core.hooks import hooked
from ..core.rule import LearningRule
from ..core.synapse import Synapse, Unhooked, survey

LEAST = 1e-2  # of the length of a weight tensor: moving a smaller part would show little


@dataclass(eq=False)
class Trace:
    """What one evaluation did.

    Attributes:
        inputs: presynaptic activity of each run of each layer, and its tangents; the layer that ran first is first.
        runs: of each layer.
        crossed: backward passes by number -> the layers at whose outputs an error arrived from above.
        losses: what the closure returned, and their tangents.
    """

    inputs: dict[Synapse, list[Tensor]] = field(default_factory=dict)
    runs: dict[Synapse, int] = field(default_factory=dict)
    crossed: dict[int, set[Synapse]] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)

    def noted(self, loss: Any) -> Any:
        """Note a loss and its tangent, and return it."""
        if isinstance(loss, Tensor):
            self.losses += _with_tangent(loss)
        return loss

    @property
    def backward_passes(self) -> int:
        """Those that brought an error to two layers at least."""
        return sum(len(layers) > 1 for layers in self.crossed.values())

    def differs(self, other: Trace) -> float:
        """The largest relative change of a layer's activity or of the loss; infinite if layers ran another time."""
        if self.runs != other.runs:
            return math.inf
        pairs = [(a, b) for s in self.inputs for a, b in zip(self.inputs[s], other.inputs[s], strict=True)]
        pairs += zip(self.losses, other.losses, strict=True)
        return max((relative(a, b) for a, b in pairs if a.shape == b.shape), default=0.0)


def _with_tangent(value: Tensor) -> list[Tensor]:
    """Copies of a tensor, and of its tangent in forward-mode differentiation."""
    parts = forward_ad.unpack_dual(value) if in_dual_level() else (value, None)
    return [part.detach().clone() for part in parts if part is not None]


def relative(before: Tensor, after: Tensor) -> float:
    """The length of a change, relative to that of what has changed."""
    change, length = (after.double() - before.double()).norm().item(), before.double().norm().item()
    return change / length if length else (math.inf if change else 0.0)


@contextmanager
def _watching_errors(synapses: list[Synapse], trace: Trace) -> Iterator[None]:
    """Note at which layers' outputs an error arrives in which backward pass."""

    def look(synapse: Synapse, layer: nn.Module, args: Any, u: Any) -> None:
        if isinstance(u, Tensor) and u.requires_grad:
            u.register_hook(partial(arrived, synapse))

    def arrived(synapse: Synapse, g: Tensor | None) -> None:
        if g is not None and bool(g.any()):
            trace.crossed.setdefault(backward_pass(), set()).add(synapse)

    with hooked(*(s.layer.register_forward_hook(partial(look, s)) for s in synapses)):
        yield


def backward_passes_of(step: Callable[[], object], model: nn.Module) -> int:
    """The backward passes of a step, as `Audit.backward_passes` counts them; the step is taken.

    Args:
        step: takes a step of any optimizer.
        model: the network that it trains.
    """
    trace = Trace()
    with _watching_errors(survey(model)[0], trace):
        step()
    return trace.backward_passes


@contextmanager
def tracing(synapses: list[Synapse], trace: Trace) -> Iterator[None]:
    """Note what each layer does, also where a rule calls ``layer.forward`` past its hooks."""

    def run(synapse: Synapse, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            if is_batched(x):
                raise ValueError(
                    f"audit cannot look into torch.func.vmap, in which layer '{synapse.name}' ran: build the rule "
                    "with batched=False"
                )
            trace.inputs.setdefault(synapse, []).extend(_with_tangent(x))
            trace.runs[synapse] = trace.runs.get(synapse, 0) + 1
        return forward(*args, **kwargs)

    own = {s.layer: vars(s.layer).get("forward") for s in synapses}
    try:
        for synapse in synapses:
            synapse.layer.forward = partial(run, synapse, synapse.layer.forward)
        with _watching_errors(synapses, trace):
            yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


# -- weights --------------------------------------------------------------------------------------------------------


def unseen_part(synapse: Synapse, inputs: list[Tensor]) -> Tensor | None:
    """The part of each neuron's weight vector that no presynaptic activity meets: a change along it changes no output.

    Args:
        synapse: the layer.
        inputs: all presynaptic activity of an evaluation.

    Returns:
        of the shape of the weight; ``None`` if the activity has as many dimensions as the weight vectors, or nearly.
    """
    weight = synapse.weight.detach()
    rows = weight.flatten(1).double()
    events = _events(synapse, inputs).double()
    _, sizes, directions = torch.linalg.svd(events, full_matrices=False)
    precision = torch.finfo(weight.dtype).eps * max(events.shape) * 8
    seen = directions[sizes > precision * sizes.max()] if sizes.numel() else directions
    for _ in range(2):  # once more for what rounding left
        rows = rows - rows @ seen.T @ seen
    if rows.norm() <= LEAST * weight.double().norm():
        return None
    return rows.view_as(weight).to(weight.dtype)


def _events(synapse: Synapse, inputs: list[Tensor]) -> Tensor:
    """Vectors that span the presynaptic activity of all events: itself, or random sums over positions and samples.

    The local product of any layer with a random signal has such sums as its rows, whatever its strides and padding.
    """
    if type(synapse.layer) is nn.Linear:
        return torch.cat([x.reshape(-1, x.shape[-1]).double() for x in inputs])
    inputs = [x for i, x in enumerate(inputs) if not any(x.shape == y.shape and torch.equal(x, y) for y in inputs[:i])]
    weight = synapse.weight.detach().clone().requires_grad_()
    generator, vectors = torch.Generator().manual_seed(0), []
    with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
        layer = Unhooked(synapse.layer)
        outputs = [torch.func.functional_call(layer, {"layer.weight": weight}, (x.to(weight.dtype),)) for x in inputs]
        for _ in range(math.ceil((weight[0].numel() + 8) / len(weight))):
            signals = [torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u) for u in outputs]
            (product,) = torch.autograd.grad(outputs, weight, signals, retain_graph=True)
            vectors.append(product.flatten(1))
    return torch.cat(vectors)


@contextmanager
def weights_moved(weight: Tensor, change: Tensor) -> Iterator[None]:
    """Add a change to a weight tensor."""
    before = weight.detach().clone()
    weight.add_(change)
    try:
        yield
    finally:
        weight.copy_(before)


# -- activity -------------------------------------------------------------------------------------------------------


@contextmanager
def neuron_moved(synapse: Synapse, neuron: int) -> Iterator[None]:
    """Show the rule another activity of one neuron, while the network above receives the same as before."""
    added: list[Tensor] = []

    def before(layer: nn.Module, args: Any, u: Tensor) -> Tensor:
        change = torch.zeros_like(u.detach())
        of_neuron = change.select(synapse.channel_dim, neuron)
        pattern = torch.linspace(-1, 2, of_neuron.numel(), dtype=u.dtype, device=u.device)
        of_neuron.copy_(pattern.view_as(of_neuron) * root_mean_square(u))
        added.append(change)
        return u + change

    def after(layer: nn.Module, args: Any, u: Tensor) -> Tensor:
        return u - added.pop()

    with hooked(synapse.layer.register_forward_hook(before, prepend=True), synapse.layer.register_forward_hook(after)):
        yield


@contextmanager
def outputs_replaced(synapses: list[Synapse]) -> Iterator[None]:
    """Let these layers compute something else."""

    def other(layer: nn.Module, args: Any, u: Tensor) -> Tensor:
        return u * -0.5 + root_mean_square(u)

    with hooked(*(s.layer.register_forward_hook(other, prepend=True) for s in synapses)):
        yield


@contextmanager
def signal_changed(synapse: Synapse) -> Iterator[None]:
    """Double the learning signal from which the layer's own parameters learn.

    What the layer sends to those below by other weights is as it was; backpropagation's error below is doubled too.
    """

    def before(layer: nn.Module, args: Any, u: Tensor) -> None:
        if u.requires_grad:
            u.register_hook(lambda g: None if g is None else 2 * g)

    with hooked(synapse.layer.register_forward_hook(before, prepend=True)):
        yield


def root_mean_square(u: Tensor) -> Tensor:
    """Of all entries."""
    return u.detach().square().mean().sqrt()


# -- the whole network ----------------------------------------------------------------------------------------------


@contextmanager
def samples_replaced(model: nn.Module, which: tuple[int, ...]) -> Iterator[None]:
    """Give the model other inputs in the place of some samples: their mirror images."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or x.ndim < 2 or len(x) <= max(which):
            return None
        other = x.clone()
        for i in which:
            other[i] = x[i].flip([*range(x.ndim - 1)])
        return tuple(other if v is x else v for v in args), {k: other if v is x else v for k, v in kwargs.items()}

    with hooked(model.register_forward_pre_hook(before, with_kwargs=True)):
        yield


@contextmanager
def labels_permuted(model: nn.Module, rule: LearningRule | None) -> Iterator[None]:
    """Pair each sample with the label of the next one, in the loss and in the rule's target.

    The outputs of the model go to the loss in another order, which is the same as other labels.
    """
    permuted: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        target = None if rule is None else rule.target
        if rule is not None and target is not None and target.ndim and all(target is not t for t in permuted):
            permuted.append(target.roll(-1, 0))
            rule.target = permuted[-1]

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return output.roll(1, 0) if isinstance(output, Tensor) and output.ndim else None

    with hooked(model.register_forward_pre_hook(before), model.register_forward_hook(after)):
        yield


@contextmanager
def in_other_order(labels: Tensor, rule: LearningRule | None) -> Iterator[None]:
    """Give each sample the label of the next one, in place: whoever reads them is found.

    A target of the rule that is another tensor, such as a one-hot code, is permuted too. (If the closure makes it from
    the labels, it takes the place of this one.)
    """
    before, target = labels.clone(), None if rule is None else rule.target
    labels.copy_(before.roll(-1, 0))
    if rule is not None and target is not None and target.ndim and target.data_ptr() != labels.data_ptr():
        rule.target = target.roll(-1, 0)
    try:
        yield
    finally:
        labels.copy_(before)
        if rule is not None:
            rule.target = target


@contextmanager
def error_changed(model: nn.Module) -> Iterator[None]:
    """Multiply each entry of the error at the model's output by another number; the loss has the value that it had."""

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            factors = torch.linspace(0.5, 2, output.numel(), dtype=output.dtype, device=output.device)
            output.register_hook(lambda g: None if g is None else g * factors.view_as(g))

    with hooked(model.register_forward_hook(after)):
        yield


def reversed_loss(value: Any) -> Any:
    """Twice the loss with the opposite sign, with the gradient that it had."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value - 3 * value.detach()
    return value * -2


def permuted_loss(value: Any) -> Any:
    """The losses of the samples in another order, each with the gradient that it had."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if value.requires_grad:
        return value + (value.detach().roll(1, 0) - value.detach())
    return value.roll(1, 0)
