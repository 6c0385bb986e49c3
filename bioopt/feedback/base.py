"""`FeedbackRule`: backpropagation with other weights for the error."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Unpack

import torch
from torch import Tensor

from ..core.acts import detached, relay
from ..core.errors import require_finite
from ..core.one_pass import OnePass
from ..core.params import Params, RuleOptions, named_modules_of, named_parameters_of, synapses_of
from ..core.recorder import Firing
from ..core.synapse import Synapse, is_known

__all__ = ["FeedbackRule"]


class FeedbackRule(OnePass):
    r"""A rule that sends the error back through each synapse by other weights than those of the forward pass.

    Backpropagation sends :math:`W^\top g` to the input of a layer, for the error :math:`g` at its output. Here
    `feedback` computes a replacement; each layer then learns as in backpropagation, from its own :math:`g` and
    :math:`x`. Everything between layers (activations, normalisation, skip connections) is differentiated as usual, and
    its parameters learn too.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules), all of whose parameters learn. Bare
            parameters are refused.
        lr: learning rate of ``descent``.
        own: further hyperparameters of the rule, each of which may differ between groups (for subclasses).
        options: ``exclude``, ``descent`` and its options, ``process_group`` (average gradients over these ranks, each
            with its share of the batch), as in `bioopt.LearningRule`.

    Raises:
        ValueError: a hyperparameter out of range; a model with layers that have weights and are no known synapses.
        TypeError: bare parameters; a model wrapped in DistributedDataParallel.
    """

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        own: dict[str, Any] | None = None,
        **options: Unpack[RuleOptions],
    ) -> None:
        if (readout := dict(options).get("readout")) is not None:
            raise TypeError(
                f"{type(self).__name__}: readout={readout!r} is not possible, because the rule brings an error to "
                "every layer; for other options of the last layer, give it a param group of its own"
            )
        super().__init__(params, {"lr": lr, **(own or {})}, **options)
        self._recorder.act(self._enter, self._leave)

    @abstractmethod
    def feedback(self, synapse: Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        """The error at the input of a layer, of shape ``x_shape``, for the error ``g`` at its output.

        ``synapse.transpose(synapse.weight, g, x_shape)`` gives backpropagation.
        """

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        synapses = synapses_of(type(self).__name__, group["params"], self._exclusion)
        layers = [layer for _, module in named_modules_of(group["params"]) for layer in module.modules()]
        # If unfrozen later, they would learn while the error returns by their own weights.
        resting = [layer for layer in layers if is_known(layer) and not layer.weight.requires_grad]
        frozen = {p for layer in resting for p in layer.parameters(recurse=False) if not p.requires_grad}
        return [one for one in named_parameters_of(group["params"], self._exclusion) if one[1] not in frozen], synapses

    def _enter(self, synapse: Synapse, x: Tensor) -> Tensor:
        return detached(x)

    def _leave(self, firing: Firing, u: Tensor) -> Tensor:
        x_shape = firing.x.shape  # not x itself, to free its memory
        return relay(firing, u, lambda g: self.feedback(firing.synapse, g, x_shape))

    def gradient_parameters(self) -> list[Tensor]:
        """All parameters that are not frozen."""
        return [p for p in self._trained() if p.requires_grad]

    @torch.no_grad()
    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """The gradients of the backward pass, averaged over ranks."""
        name = type(self).__name__
        if not self._recorder.fired:
            raise RuntimeError(self._coverage.none_fired())
        fired = self._recorder.fired
        # The error of a layer that did not fire returned by its own weights, so it must not learn.
        silent = {p for s in self._recorder.synapses.values() if s not in fired for p in s.parameters()}
        silent.difference_update(p for s in fired for p in s.parameters())  # shared with a layer that did
        grads = {p: p.grad for p in self._trained() if p.grad is not None and p not in silent}
        if not grads:
            raise RuntimeError(
                f"{name} learns from the loss, but no gradient has reached a layer: call loss.backward() before "
                "step(), or give step() a closure that returns the loss"
            )
        if self.process_group is not None:
            names = self._names()
            self._require_same_on_ranks([names[p] for p in grads])
        loss = torch.zeros((), device=self._trained()[0].device) if losses is None else losses.mean()
        self._average_over_ranks([loss, *grads.values()])
        if losses is not None:
            require_finite(self, "the loss", [loss])
        return grads, self._next_state()
