"""Rules that send the error, or the target, from the output directly to every layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from ..core.constraints import require_labels
from ..core.params import Params
from ..core.products import along_channels
from ..core.recorder import Firing
from ..core.rows import Rows
from ..core.rule import optional
from ..core.synapse import Synapse
from .base import OwnedFeedback, RandomFeedback, RandomOptions
from .weights import drawn

__all__ = ["DRTP", "DirectFeedbackAlignment", "DirectKolenPollack"]


class DirectFeedback(RandomFeedback):
    """A rule that sends a signal of the output's size to the input of every layer.

    The output is that of the last layer that fires, or of ``readout_layer``.

    Args:
        params: as in `FeedbackRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        readout_layer: the layer at whose output the error is taken, by name or as a module; by default the last layer
            of the rule to fire in a forward pass.
        own: as in `FeedbackRule`.
        options: as in `RandomFeedback`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        readout_layer: str | nn.Module | None = None,
        own: dict[str, Any] | None = None,
        **options: Unpack[RandomOptions],
    ) -> None:
        self._error: Tensor | None = None  # at the output, samples × ... × outputs, in the backward pass
        self._error_rows: Rows | None = None  # the samples that the output ran on; none: all
        super().__init__(params, lr, own=own, **options)
        if readout_layer is not None:
            self._readout_synapse = self._found(readout_layer, "readout_layer")
        self._shapes: dict[Synapse, torch.Size] = {}  # of feedback weights, from the first pass

    @abstractmethod
    def weights_of(self, synapse: Synapse) -> Tensor:
        """The feedback weights of a layer, outputs × activity; called once its shape is known."""

    def feedback(self, synapse: Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        """The error at the output, by the feedback weights."""
        return self._sent(synapse, self._error_at(synapse, g), x_shape)

    @optional
    def feedback_of(self, firing: Firing) -> Callable[[Tensor], Tensor]:
        """`feedback`, in the memory format of the layer's input."""
        synapse, x_shape, last, rows = firing.synapse, firing.x.shape, channels_last(firing.x), firing.rows
        return lambda g: self._sent(
            synapse, self._on_rows(synapse, self._error_at(synapse, g, rows), rows), x_shape, last
        )

    @torch.no_grad()
    def feedback_weights(self) -> dict[str, Tensor]:
        """The feedback weights of each layer by its name, outputs × presynaptic activity, as copies.

        Raises:
            RuntimeError: before the first forward pass, which shows the shapes of activity.
        """
        named = {name: s for name, s in self.layers().items() if s in self._shapes}
        if not named:
            raise RuntimeError(
                f"{type(self).__name__}: direct feedback has the shapes of activity, which are known after the first "
                "forward pass in training mode"
            )
        return {name: self.weights_of(s).detach().clone() for name, s in named.items()}

    def begin(self) -> None:
        """Start an evaluation that alone will count."""
        self._error = self._error_rows = None
        super().begin()

    def _found(self, layer: str | nn.Module, option: str) -> Synapse:
        """The layer that an option gives, by name or as a module."""
        for name, synapse in self.layers().items():
            if layer in (name, synapse.name) or synapse.layer is layer:
                return synapse
        shown = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
        raise ValueError(
            f"{type(self).__name__}: {option}={shown} is not a layer that the rule trains; it trains "
            f"{', '.join(self.layers())}"
        )

    def _error_at(self, synapse: Synapse, g: Tensor, rows: Rows | None = None) -> Tensor:
        """The error at the output, samples × ... × outputs.

        Args:
            synapse: a layer that the error has reached.
            g: the error at the layer's own output.
            rows: the samples that the layer ran on; ``None``: all.
        """
        output = self._output
        if synapse is output:
            self._error, self._error_rows = g.movedim(output.channel_dim, -1), rows
        if self._error is None:
            raise RuntimeError(
                f"{type(self).__name__}: the error has reached layer '{synapse.name}' before the readout "
                f"'{output.name}': name the layer that gives the network's output, readout_layer='...'"
            )
        return self._error

    def _on_rows(self, synapse: Synapse, signal: Tensor, rows: Rows | None) -> Tensor:
        """The part of ``signal``, of all samples, that belongs to those that a layer ran on."""
        if rows is self._error_rows:
            return signal
        if self._error_rows is not None or rows is None or len(signal) != rows.count:
            raise RuntimeError(
                f"{type(self).__name__}: layer '{synapse.name}' and the readout '{self._output.name}' ran on different "
                f"samples, and the error there has the shape {tuple(signal.shape)}: its first dimension must be the "
                "sample, and the readout must run on all of them (behind bioopt.nn.Gate, not in a pathway)"
            )
        return signal[rows.index]

    def _matched(self, synapse: Synapse, signal: Tensor, x_shape: torch.Size) -> Tensor:
        """``signal`` for each sample, or for each element of a sequence where the layer's input has as many."""
        if synapse.channel_dim == -1 and signal.ndim > 1 and signal.shape[:-1] == x_shape[:-1]:
            return signal
        signal = signal.flatten(1, -2).sum(1) if signal.ndim > 2 else signal
        if signal.ndim < 2 or len(signal) != x_shape[0]:
            raise RuntimeError(
                f"{type(self).__name__}: the input of layer '{synapse.name}' has the shape {tuple(x_shape)}, but the "
                f"error at the output '{self._output.name}' has the shape {tuple(signal.shape)}: the first dimension "
                "of both must be the sample"
            )
        return signal

    def _sent(self, synapse: Synapse, signal: Tensor, x_shape: torch.Size, channels_last: bool = False) -> Tensor:
        """``signal`` times the feedback weights, of the shape of the layer's input, and its memory format."""
        signal = self._matched(synapse, signal, x_shape)
        shape = torch.Size([signal.shape[-1], *x_shape[signal.ndim - 1 :]])
        if (known := self._shapes.setdefault(synapse, shape)) != shape:
            raise RuntimeError(
                f"{type(self).__name__}: the input of layer '{synapse.name}' has the shape {tuple(x_shape)}, but its "
                f"feedback weights have the shape {tuple(known)}, from an earlier pass: direct feedback needs inputs "
                "of one size"
            )
        weights = self.weights_of(synapse).detach().to(signal.dtype)
        if channels_last:
            samples, channels, *space = x_shape
            return (signal @ weights.movedim(1, -1).flatten(1)).view(samples, *space, channels).movedim(-1, 1)
        return (signal @ weights.flatten(1)).view(x_shape)

    def _fixed(self, synapse: Synapse) -> Tensor:
        """Random weights."""
        shape = self._shapes[synapse]
        deviation = self._deviation(synapse, shape[1:].numel())
        return self._random.fixed(synapse, synapse.weight, shape, deviation, self._seed)


@final
class DirectFeedbackAlignment(DirectFeedback):
    r"""The error at the output goes to every layer directly, by fixed random weights.

    .. math::
        \delta_l = \phi'(u_l) \odot B_l^\top e, \qquad \Delta W_l = -\delta_l\, x_l^\top

    with the error :math:`e` at the network's output, and feedback weights :math:`B_l` of the shape outputs × activity,
    normal numbers of standard deviation ``feedback_scale`` :math:`/ \sqrt{n}` for :math:`n` activities of a sample:
    with 1, the error keeps its length on average. It arrives at the input of each layer, and passes what lies between
    that and the layer below (normalisation, activation, pooling) as in backpropagation. The last layer learns by its
    own error. Layers that share their weights over a sequence get the error of each element, where there is one.

    Arguments and errors are those of `DirectFeedback`.

    Source: A. Nøkland (2016), *Direct feedback alignment provides learning in deep neural networks*, NeurIPS 29.
    """

    def weights_of(self, synapse: Synapse) -> Tensor:
        """Drawn from the seed and the index of the layer."""
        return self._fixed(synapse)


@final
class DRTP(DirectFeedback):
    r"""The target goes to every layer directly, by fixed random weights, in place of the error.

    .. math::
        \delta_l = -\phi'(u_l) \odot \tfrac{1}{N} B_l^\top (y - \bar y)

    with :math:`N` samples, the one-hot target :math:`y`, and :math:`B_l` as in `DirectFeedbackAlignment`. Only the last
    layer needs the error; all others can learn as soon as they have fired. The mean target :math:`\bar y = 1/K` of
    :math:`K` classes is subtracted, or every neuron is pushed in one direction by all samples, and those with ReLU die;
    ``centred=False`` is the published formula. Needs ``optimizer.target``, set before each forward pass.

    Args:
        params: as in `DirectFeedback`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        centred: whether the mean target is subtracted.
        readout_layer: as in `DirectFeedback`.
        options: as in `RandomFeedback`, with ``orthogonal=True`` by default: a target never ends, as an error does, and
            the few directions of the classes grow until neurons saturate or die; with it, all directions of a layer
            learn alike.

    Source: C. Frenkel, M. Lefebvre & D. Bol (2021), *Learning without feedback: fixed random learning signals allow for
    feedforward training of deep neural networks*, Frontiers in Neuroscience 15.
    """

    scales_with_loss: ClassVar[bool] = False

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        centred: bool = True,
        readout_layer: str | nn.Module | None = None,
        **options: Unpack[RandomOptions],
    ) -> None:
        options.setdefault("orthogonal", True)
        self._require_bool("centred", centred)
        self.centred = centred
        super().__init__(
            params,
            lr,
            readout_layer=readout_layer,
            **options,
        )

    def weights_of(self, synapse: Synapse) -> Tensor:
        """Drawn from the seed and the index of the layer."""
        return self._fixed(synapse)

    def feedback_of(self, firing: Firing) -> Callable[[Tensor], Tensor]:
        """The target of this forward pass."""
        synapse, x_shape, last, rows = firing.synapse, firing.x.shape, channels_last(firing.x), firing.rows
        target = self.target

        def feedback(g: Tensor) -> Tensor:
            signal = self._signal(target, self._error_at(synapse, g, rows))
            return self._sent(synapse, self._on_rows(synapse, signal, rows), x_shape, last)

        return feedback

    def _signal(self, target: Tensor | None, error: Tensor) -> Tensor:
        """What takes the place of the error: minus the target, over the number of samples."""
        name, outputs = type(self).__name__, error.shape[-1]
        if target is None:
            raise RuntimeError(
                f"{name} was given no target for this forward pass: set optimizer.target to the labels before the "
                "model runs"
            )
        if outputs < 2 and self.centred:
            raise ValueError(
                f"{name}: the readout '{self._output.name}' has one output, whose mean target cannot be subtracted: "
                "write centred=False, or give it an output for each class"
            )
        wanted = _one_hot(name, target.to(error.device), error, self._output.name)
        if self.centred:
            wanted = wanted - wanted.mean(-1, keepdim=True)
        return wanted.to(error.dtype).div_(-error.shape[:-1].numel())


class LearnedDirectFeedback(OwnedFeedback, DirectFeedback):
    """Direct feedback by weights that are parameters of the rule's own, and learn.

    Args:
        params: as in `DirectFeedback`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        readout_layer: as in `DirectFeedback`.
        own: as in `FeedbackRule`.
        options: as in `RandomFeedback`.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        *,
        readout_layer: str | nn.Module | None,
        own: dict[str, Any],
        **options: Unpack[RandomOptions],
    ) -> None:
        self._added: set[Tensor] = set()  # feedback weights whose .grad is of the passes since the last step
        super().__init__(params, lr, readout_layer=readout_layer, own=own, **options)

    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """As `FeedbackRule.collect`; feedback weights learn from the passes since the last step alone."""
        for weights in self._owned.modules.parameters():
            if weights not in self._added:  # its .grad is of the last step: model.zero_grad() does not know it
                weights.grad = None
        collected = super().collect(losses)
        self._added.clear()
        return collected

    def _own(self, synapse: Synapse) -> Tensor:
        """The feedback weights of a layer whose shape is known, drawn at their first use."""
        weights, shape = self.own_weights(synapse), self._shapes[synapse]
        if isinstance(weights, UninitializedParameter):
            weights.materialize(shape)
            deviation = self._deviation(synapse, shape[1:].numel())
            weights.data.copy_(drawn(weights, shape, deviation, self._seed, synapse.index))
        elif weights.shape != shape:  # of a state that was loaded before the first pass
            raise RuntimeError(
                f"{type(self).__name__}: the feedback weights of layer '{synapse.name}' have the shape "
                f"{tuple(weights.shape)}, but in this network it must be {tuple(shape)}: load the state of an "
                "optimizer of this network, or build a new optimizer"
            )
        return weights

    def _add_product(self, synapse: Synapse, error: Tensor, x: Tensor) -> None:
        """Add that of the error and the activity to the gradient, which `zero_grad` drops like any other.

        The first product after a step takes the place of that step's gradient.
        """
        signal, weights = self._matched(synapse, error, x.shape).flatten(0, -2), self.own_weights(synapse)
        inputs = x.reshape(len(signal), weights.shape[1:].numel()).to(signal.dtype)
        product = (signal.T @ inputs).view_as(weights).to(weights.dtype)
        weights.grad = product if weights.grad is None or weights not in self._added else weights.grad + product
        self._added.add(weights)

    def _pair_at_output(self, grads: dict[Tensor, Tensor]) -> None:
        """Let the feedback weights of the last layer change as its forward weights do, where they have one shape."""
        if (output := self._output) in self._shapes:
            weight, own = output.weight, self.own_weights(output)
            if own.shape == weight.shape:
                self._same_step[weight] = own
                if weight in grads:
                    grads[own] = grads[weight]


@final
class DirectKolenPollack(LearnedDirectFeedback):
    r"""Direct feedback that learns: each layer's feedback weights change as weights from it to the output would.

    .. math::
        \delta_l = \phi'(u_l) \odot B_l^\top e, \qquad \Delta W_l = -\delta_l\, x_l^\top - \lambda W_l, \qquad
        \Delta B_l = -e\, h_l^\top - \lambda B_l

    with the error :math:`e` at the output and the activity :math:`h_l` to which :math:`B_l` sends it, as in
    `DirectFeedbackAlignment`. For the last layer this is `KolenPollack`; for the others, :math:`B_l` learns to predict
    the output from the activity, linearly. It is a parameter of the rule's own, as in `KolenPollack`.

    Args:
        params: as in `DirectFeedback`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`.
        decay: λ, of the weights of all layers (not of biases).
        readout_layer: as in `DirectFeedback`.
        options: as in `RandomFeedback`.

    Source: M. B. Webster, J. Choi & C. Ahn (2021), *Learning the connections in direct feedback alignment*, OpenReview.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        decay: float = 1e-4,
        readout_layer: str | nn.Module | None = None,
        **options: Unpack[RandomOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            readout_layer=readout_layer,
            own={"decay": decay},
            **options,
        )

    def new_feedback(self, synapse: Synapse) -> nn.Module:
        """Weights whose shape the first pass decides."""
        return LazyFeedback(synapse.weight)

    def weights_of(self, synapse: Synapse) -> Tensor:
        """The rule's own parameter, drawn at its first use."""
        return self._own(synapse)

    def feedback_of(self, firing: Firing) -> Callable[[Tensor], Tensor]:
        """Also add to the gradient of the feedback weights."""
        synapse, x, rows = firing.synapse, firing.x.detach(), firing.rows

        def feedback(g: Tensor) -> Tensor:
            error = self._on_rows(synapse, self._error_at(synapse, g, rows), rows)
            returned = self._sent(synapse, error, x.shape, channels_last(x))
            self._add_product(synapse, error, x if synapse is self._output else self._less_its_mean(synapse, x))
            return returned

        return feedback

    def _less_its_mean(self, synapse: Synapse, x: Tensor) -> Tensor:
        """Presynaptic activity as the weights of a layer learn from it."""
        level = self._input_levels().get(synapse.index)
        return x if level is None else x - along_channels(level["mean"].to(x), synapse)

    def learn_feedback(self, grads: dict[Tensor, Tensor], state: dict[str, Any]) -> None:
        """The decay of forward and feedback weights; those of the last layer take the same step."""
        self._pair_at_output(grads)
        self._add_decay(grads)


class LazyFeedback(LazyModuleMixin, nn.Module):
    """Feedback weights of a shape that is not known yet, on the device and of the type of others."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = UninitializedParameter(device=like.device, dtype=like.dtype)  # type: ignore[call-arg]


def channels_last(x: Tensor) -> bool:
    """Whether the activity of a convolution has its channels last in memory."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _one_hot(rule: str, target: Tensor, error: Tensor, readout: str) -> Tensor:
    """The target in the shape of the error at the output.

    Raises:
        ValueError: a target of another shape, or labels out of range.
    """
    classes = error.shape[-1]
    if target.shape == error.shape and target.is_floating_point():
        return target
    require_labels(rule, target, error.shape[:-1], classes, readout, error.shape)
    return nn.functional.one_hot(target.long(), classes).to(error.dtype)
