"""Base classes of the feedback family: backpropagation with other weights, or another signal, for the error."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Adam

from ..core.acts import detached, relay
from ..core.constraints import NON_NEGATIVE, POSITIVE, SEED, Constraint, one_of
from ..core.integrations import PACKED
from ..core.one_pass import OnePass
from ..core.params import (
    GradientOptions,
    Params,
    whole_of,
)
from ..core.products import in_pools, orthogonalised, weight_shaped
from ..core.recorder import Firing
from ..core.rule import optional
from ..core.steps import in_shares
from ..core.synapse import Synapse
from .weights import RandomWeights

__all__ = ["FeedbackRule"]


class FeedbackOptions(GradientOptions, total=False):
    """Options of every feedback rule; `FeedbackRule` describes them."""

    skips: str
    orthogonal: bool


class RandomOptions(FeedbackOptions, total=False):
    """Options of feedback rules that start at random; `RandomFeedback` describes them."""

    seed: int
    feedback_scale: float
    fan_in: float | None


SKIPS: Constraint = one_of("keep", "cut")
#: what a param group of the model has and one of feedback weights has not
OF_THE_MODEL = ("params", "param_names", "readout", "standardised", PACKED)


class FeedbackRule(OnePass):
    r"""A rule that sends the error back through each synapse by other weights than those of the forward pass.

    Backpropagation sends :math:`W^\top g` to the input of a layer, for the error :math:`g` at its output. Here
    `feedback` computes a replacement; each layer then learns as in backpropagation, from its own :math:`g` and
    :math:`x`. Everything between layers (activations, normalisation, skip connections) is differentiated as usual, and
    its parameters learn too. Frozen and excluded layers pass the error by their own weights.

    Args:
        params: the model (or modules, or groups whose ``"params"`` are modules), all of whose parameters learn. Bare
            parameters are refused.
        lr: learning rate of ``descent``.
        skips: ``"keep"``: connections that bypass layers, as in residual networks, carry their error back past them, as
            in backpropagation; ``"cut"``: an error passes from layer to layer by feedback alone.
        orthogonal: whether the gradient of each layer's weights is replaced by the nearest semi-orthogonal matrix, in
            which all directions are equally strong; for errors that have few directions, which random feedback makes
            of them. For convolutions this costs little, for large Linear layers several times the step.
        own: further hyperparameters of the rule, each of which may differ between groups (for subclasses).
        options: ``centre_inputs`` (``True`` unless updates are orthogonal), ``exclude``, ``descent`` and its options,
            ``process_group`` (average gradients over these ranks, each with its share of the batch), as in
            `bioopt.LearningRule`.

    Raises:
        ValueError: a hyperparameter out of range; a model without plastic layers, or with layers that have weights and
            are no known synapses.
        TypeError: bare parameters; a model wrapped in DistributedDataParallel.
    """

    centres_inputs = True

    def __init__(
        self,
        params: Params,
        lr: float,  # η
        *,
        skips: str = "keep",
        orthogonal: bool = False,
        own: dict[str, Any] | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        self._check_value("skips", skips, SKIPS)
        self._require_bool("orthogonal", orthogonal)
        self.skips, self.orthogonal = skips, orthogonal
        self._centre_unless(options, orthogonal, "orthogonal=False, since orthogonal updates replace the gradient")
        self._refuse_readout(options, "the rule brings an error to every layer")
        super().__init__(params, {"lr": lr, **(own or {})}, **options)
        self._returned: dict[Synapse, torch.Size] = {}  # layers with an error at their input in this step; its shape
        #: layers that an error returned through in the last step
        self.returned: frozenset[Synapse] = frozenset()
        self._readout_synapse: Synapse | None = None  # at whose output the error is taken; none: the last that fires
        self._at_output: Tensor | None = None  # the weights of that layer in the last step
        self._recorder.act(self._enter, self._leave)

    @abstractmethod
    def feedback(self, synapse: Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        """The error at the input of a layer, of shape ``x_shape``, for the error ``g`` at its output.

        ``synapse.transpose(synapse.weight, g, x_shape)`` gives backpropagation.
        """

    @optional
    def feedback_of(self, firing: Firing) -> Callable[[Tensor], Tensor]:
        """`feedback` for one firing, as a function of the error ``g``; for rules that need more than shapes of it."""
        synapse, x_shape = firing.synapse, firing.x.shape  # not x itself, to free its memory
        return lambda g: self.feedback(synapse, g, x_shape)

    @optional
    def learn_feedback(self, grads: dict[Tensor, Tensor], state: dict[str, Any]) -> None:
        """Let feedback weights learn: change the ``.grad`` of this step, or the rule's own state after it, in place.

        Args:
            grads: of all parameters, averaged over ranks.
            state: the rule's own state after this step; replace its tensors, never change them.
        """

    @optional
    def feedback_weights(self) -> dict[str, Tensor]:
        """The feedback weights by the names of their layers, where the rule has such weights."""
        return {}

    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        return whole_of(type(self).__name__, group["params"], self._exclusion)

    def _enter(self, synapse: Synapse, x: Tensor) -> Tensor:
        return detached(x)

    def _leave(self, firing: Firing, u: Tensor) -> Tensor:
        synapse, shape, feedback = firing.synapse, firing.x.shape, self.feedback_of(firing)
        returned = self._returned

        def noted(g: Tensor) -> Tensor:
            returned[synapse] = shape
            return feedback(g)

        return relay(firing, u, noted, self.skips)

    def begin(self) -> None:
        """Start an evaluation that alone will count."""
        self._returned.clear()
        super().begin()

    def gradient_parameters(self) -> list[Tensor]:
        """All parameters of the model that are not frozen."""
        return self._of_model()

    @torch.no_grad()
    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """The gradients of the backward pass, averaged over ranks, and what feedback weights learn."""
        name = type(self).__name__
        if not self._recorder.fired:
            raise RuntimeError(self._coverage.none_fired())
        silent = self._silent()  # whose error returned by their own weights
        grads = {p: p.grad for p in self._trained() if p.grad is not None and p not in silent}
        if not grads:
            raise RuntimeError(
                f"{name} learns from the loss, but no gradient has reached a layer: call loss.backward() before "
                "step(), or give step() a closure that returns the loss"
            )
        self._average_gradients(losses, grads)
        if self.orthogonal:
            self._orthogonalise(grads)
        state = self._next_state()
        self.learn_feedback(grads, state)
        self.returned = frozenset(self._returned)
        self._at_output = self._output.weight
        self._returned.clear()
        self.target = None  # an old target must not teach a new batch
        return grads, state

    @property
    def _output(self) -> Synapse:
        """The layer whose output is that of the network."""
        return self._readout_synapse or next(reversed(self._recorder.fired))

    def _orthogonalise(self, grads: dict[Tensor, Tensor]) -> None:
        """Replace the gradients of the layers' weights."""
        for weight, synapse in {s.weight: s for s in self._recorder.synapses.values() if s.weight in grads}.items():
            matrices = orthogonalised(in_pools(grads[weight], synapse))
            grads[weight] = weight_shaped(matrices, synapse).to(weight.dtype)


class RandomFeedback(FeedbackRule):
    r"""A feedback rule whose feedback weights start at random, or stay there.

    Args:
        params: as in `FeedbackRule`.
        lr: learning rate of ``descent``, by default `torch.optim.Adam`, whose steps are as long for layers with small
            errors as for those with large ones.
        seed: of all that the rule draws; it is state.
        feedback_scale: standard deviation of feedback weights, in units of that with which the error keeps its length.
        fan_in: the number of a neuron's inputs up to which its layer learns at ``lr``: the weights of a layer with
            :math:`n` more learn at ``lr`` times :math:`\mathrm{fan\_in} / n`. A step of Adam moves activity in
            proportion to :math:`n`, whatever the error; backpropagation corrects what went too far, but random
            feedback, which does not know the way yet, lets the activity of large layers explode. The last layer, whose
            error is the true one, always learns at ``lr``. ``None``: so do all, as published.
        own: as in `FeedbackRule`.
        options: ``skips``, ``orthogonal``, ``exclude``, ``descent`` and its options, ``process_group``, as in
            `FeedbackRule`.
    """

    constraints: ClassVar[dict[str, Constraint]] = {"feedback_scale": POSITIVE}

    def __init__(
        self,
        params: Params,
        lr: float = 2e-3,
        *,
        seed: int = 0,
        feedback_scale: float = 1.0,
        fan_in: float | None = 256,
        own: dict[str, Any] | None = None,
        **options: Unpack[FeedbackOptions],
    ) -> None:
        options.setdefault("descent", Adam)
        self._check_value("seed", seed, SEED)
        if fan_in is not None:
            self._check_value("fan_in", fan_in, POSITIVE)
        self.fan_in = fan_in
        self._random, self._first_seed = RandomWeights(), seed
        super().__init__(params, lr, own={"feedback_scale": feedback_scale, **(own or {})}, **options)
        self._own_state = {"seed": seed}

    @property
    def _seed(self) -> int:
        """That of the state, which may have been loaded."""
        return int(self._own_state.get("seed", self._first_seed))

    def _around_descent(self) -> AbstractContextManager[None]:
        if self.fan_in is None:
            return nullcontext()
        shares: dict[Tensor, float] = {}
        for synapse in self._recorder.synapses.values():
            weight, inputs = synapse.weight, synapse.weight[0].numel()
            if weight.grad is not None and inputs > self.fan_in and weight is not self._at_output:
                alike = (weight, self._same_step.get(weight))
                shares |= {p: self.fan_in / inputs for p in alike if p is not None}
        return in_shares(shares)

    def _deviation(self, synapse: Synapse, count: int) -> float:
        """Of weights by which the error reaches so many activities; at a scale of 1 it keeps its length on average."""
        return float(self.param_groups[synapse.group]["feedback_scale"]) / math.sqrt(max(count, 1))


class LayerwiseFeedback(RandomFeedback):
    """A rule with feedback weights for each layer, of the shape of its forward weights."""

    @abstractmethod
    def weights_of(self, synapse: Synapse) -> Tensor:
        """The feedback weights of a layer."""

    def feedback(self, synapse: Synapse, g: Tensor, x_shape: torch.Size) -> Tensor:
        """The transposed layer, with the feedback weights in place of its own."""
        return synapse.transpose(self.weights_of(synapse), g, x_shape)

    @torch.no_grad()
    def feedback_weights(self) -> dict[str, Tensor]:
        """The feedback weights of each layer by its name, of the shape of its weights, as copies.

        Those of the first layer are not used, as nothing learns below it.
        """
        return {name: self.weights_of(s).detach().clone() for name, s in self.layers().items()}

    def _drawn(self, synapse: Synapse) -> Tensor:
        """The random weights of a layer, with which the error keeps its length at a scale of 1."""
        weight = synapse.weight
        deviation = self._deviation(synapse, weight[0].numel())
        return self._random.fixed(synapse, weight, weight.shape, deviation, self._seed)


class OwnedFeedback(RandomFeedback):
    """A rule whose feedback weights are parameters of its own, which ``descent`` changes like the forward weights.

    They are in param groups of their own, with the options of the group of their layer.
    """

    constraints: ClassVar[dict[str, Constraint]] = {**RandomFeedback.constraints, "decay": NON_NEGATIVE}

    @abstractmethod
    def new_feedback(self, synapse: Synapse) -> nn.Module | None:
        """A module with the feedback weights of a layer as its parameter ``weight``; ``None``: they do not learn."""

    def own_weights(self, synapse: Synapse) -> nn.Parameter:
        """The feedback weights of a layer."""
        return self._owned[_key(synapse)].weight  # type: ignore[return-value]

    def _own_for(self, synapses: list[Synapse]) -> None:
        self._owned.seed = self._seed
        by_group: dict[int, dict[str, nn.Module]] = {}
        for synapse in synapses:
            if (module := self.new_feedback(synapse)) is not None:
                by_group.setdefault(synapse.group, {})[_key(synapse)] = module
        for i, modules in by_group.items():
            options = {name: value for name, value in self.param_groups[i].items() if name not in OF_THE_MODEL}
            self.own(modules, **options)

    def _add_decay(self, grads: dict[Tensor, Tensor]) -> None:
        """Add that of the forward and feedback weights that learn, once where layers share their weights."""
        decays = {
            weight: self.param_groups[synapse.group]["decay"]
            for synapse in self._recorder.synapses.values()
            for weight in (synapse.weight, self.own_weights(synapse))
            if weight in grads
        }
        for weight, decay in decays.items():
            grads[weight] = torch.add(grads[weight], weight, alpha=decay)


def _key(synapse: Synapse) -> str:
    return f"{synapse.index}.{synapse.name}"
