"""Per-sample costs with one interface, for a whole network or for one of its blocks.

No single cost suits all tasks, and different areas of a brain seem to optimise different ones (A. H. Marblestone,
G. Wayne & K. P. Kording, 2016, *Toward an integration of deep learning and neuroscience*). All costs here have the same
signature::

    losses = cost(outputs, labels, inputs=x)     # one loss per sample; a cost ignores the arguments it does not need

so one closure works with every cost, and with every rule that credits each sample with its own loss.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.constraints import NON_NEGATIVE, POSITIVE, Constraint, require_in_range
from .core.errors import warn
from .core.products import in_full

__all__ = [
    "UNLABELLED",
    "Cost",
    "CrossEntropy",
    "Denoising",
    "Focal",
    "Hinge",
    "Mixture",
    "Predictive",
    "Slowness",
    "Sparsity",
    "SquaredError",
    "SupervisedContrastive",
]

UNLABELLED = -100  #: label of samples without a class, as in `torch.nn.functional.cross_entropy`; their cost is 0

FRACTION: Constraint = (lambda v: 0 <= v <= 1, "a number in [0, 1]")

#: attributes of `Cost` in earlier versions and their names now; the old names work for one more release
RENAMED = {"told": "target_kind", "wants": "output_size", "seen": "corrupt", "of_each": "per_sample"}


def _alias_old_names(cls: type[nn.Module]) -> None:
    """Accept old names that a class defines, and let reading and setting them lead to the new ones, with warnings."""
    for old, new in RENAMED.items():
        if old in vars(cls) and new not in vars(cls):
            message = f"{cls.__name__}.{old} is now called {new}: rename it in the class"
            warnings.warn(message, FutureWarning, stacklevel=4)  # past ABCMeta, to the class statement
            setattr(cls, new, vars(cls)[old])
        if new in vars(cls):
            setattr(cls, old, _alias(old, new, vars(cls)[new]))


def _alias(old: str, new: str, value: Any) -> property:
    def warn_of(cost: Cost) -> None:
        warn(f"{type(cost).__name__}.{old} is now called {new}", FutureWarning)

    def get(cost: Cost) -> Any:
        warn_of(cost)
        return value.__get__(cost) if callable(value) else getattr(cost, new)  # the class's own, for super()

    def set_(cost: Cost, changed: Any) -> None:
        warn_of(cost)
        setattr(cost, new, changed)

    return property(get, set_)


class Cost(nn.Module, ABC):
    """Base class of per-sample costs of the outputs of a network or of one of its blocks.

    A subclass implements `per_sample`, and sets `target_kind` if its targets are not class labels.

    Args:
        readout: a module between the activity and the cost, trained with the block: for example a `torch.nn.Linear`
            that computes class scores or a reconstruction from hidden neurons. ``None``: the cost is of the activity
            itself.
    """

    #: the targets of the cost: ``"labels"``, ``"inputs"`` or ``"nothing"``
    target_kind = "labels"
    #: whether the outputs are class scores, the largest of which is the network's decision
    scores = False
    #: whether the cost compares successive steps of sequences
    sequences = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _alias_old_names(cls)

    def __init__(self, readout: nn.Module | None = None) -> None:
        super().__init__()
        self.readout = readout

    @abstractmethod
    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """The cost of each row of ``outputs``; ``targets`` are of the kind `target_kind`, or ``None``."""

    def output_size(self, classes: int, inputs: int) -> int | None:
        """The number of outputs that the cost requires, given the numbers of classes and of inputs; ``None``: any."""
        if self.target_kind == "nothing" or not (self.scores or self.target_kind == "inputs"):
            return None
        return classes if self.target_kind == "labels" else inputs

    def corrupt(self, inputs: Tensor) -> Tensor:
        """The inputs that the network receives in place of ``inputs``; by default ``inputs`` themselves."""
        return inputs

    def forward(
        self, outputs: Tensor, labels: Tensor | None = None, *, inputs: Tensor | None = None, steps: int = 1
    ) -> Tensor:
        """The cost of each sample.

        Args:
            outputs: outputs of a network or a block, N × any shape; the steps of a sequence are successive rows.
            labels: class of each sample, N; `UNLABELLED` for a sample without one.
            inputs: inputs of the network or block, N × any shape.
            steps: length of each sequence; divides N.

        Returns:
            N costs.

        Raises:
            ValueError: targets are missing or do not fit the outputs, or a cost of sequences got single steps.
        """
        name = type(self).__name__
        kinds = {"labels": labels, "inputs": inputs, "nothing": None}
        if self.target_kind not in kinds:
            raise ValueError(f"{name}.target_kind={self.target_kind!r} must be one of {', '.join(kinds)}")
        targets = kinds[self.target_kind]
        if targets is None and self.target_kind != "nothing":
            call = "cost(outputs, labels)" if self.target_kind == "labels" else "cost(outputs, inputs=x)"
            raise ValueError(f"{name} needs {self.target_kind}, but got none: call {call}")
        if self.sequences and (steps < 2 or len(outputs) % steps):
            raise ValueError(
                f"{name} compares successive steps, so it needs sequences of at least 2 steps: {len(outputs)} rows of "
                f"outputs cannot be split into sequences of steps={steps}"
            )
        if self.readout is not None:
            outputs = self.readout(outputs.flatten(1))
        if targets is not None and len(targets) != len(outputs):
            raise ValueError(f"{name}: {len(outputs)} outputs, but {len(targets)} {self.target_kind}; give one each")
        return self.per_sample(outputs, targets, steps)


_alias_old_names(Cost)


class _ScoreCost(Cost):
    """A cost of class scores, N × classes, and labels, N; checks both."""

    scores = True

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        assert targets is not None
        name = type(self).__name__
        if outputs.ndim != 2:
            raise ValueError(
                f"{name} needs class scores, N × classes, not outputs of shape {tuple(outputs.shape)}; give it a "
                "readout=torch.nn.Linear(..., classes)"
            )
        _check_labels(name, targets)
        if targets.device.type == "cpu" and not torch.compiler.is_compiling() and len(targets):
            smallest, largest = (int(label) for label in targets.aminmax())
            if smallest < 0:
                smallest = int(targets.where(targets != UNLABELLED, 0).min())
            if smallest < 0 or largest >= outputs.shape[1]:
                raise ValueError(
                    f"{name}: labels are between {smallest} and {largest}, but there are scores of {outputs.shape[1]} "
                    f"classes; use labels 0 to {outputs.shape[1] - 1}, or {UNLABELLED} for samples without a label"
                )
        return self.of_labels(outputs, targets.long())

    @abstractmethod
    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The cost of each sample, from checked scores and labels."""


class CrossEntropy(_ScoreCost):
    r"""``-Σ_k t_k log softmax(o)_k``, by `torch.nn.functional.cross_entropy`.

    Args:
        label_smoothing: the fraction of a target that is spread over all classes (C. Szegedy et al., 2016, *Rethinking
            the Inception architecture for computer vision*).
        readout: see `Cost`.
    """

    def __init__(self, label_smoothing: float = 0.0, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "label_smoothing", label_smoothing, FRACTION)
        self.label_smoothing = label_smoothing

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """N costs, in nats."""
        return F.cross_entropy(
            outputs, labels, reduction="none", ignore_index=UNLABELLED, label_smoothing=self.label_smoothing
        )


class SquaredError(_ScoreCost):
    r"""``⟨(o_k - t_k)²⟩`` over classes, by `torch.nn.functional.mse_loss`, with one-hot targets."""

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """N costs."""
        known = labels != UNLABELLED
        targets = F.one_hot(labels.where(known, 0), outputs.shape[1]).to(outputs.dtype)
        return F.mse_loss(outputs, targets, reduction="none").mean(1) * known


class Hinge(_ScoreCost):
    r"""``Σ_{k≠y} max(0, margin - o_y + o_k) / classes``, as `torch.nn.functional.multi_margin_loss`.

    Args:
        margin: by how much the score of the right class should exceed the others.
        readout: see `Cost`.

    Source: J. Weston & C. Watkins (1999), *Support vector machines for multi-class pattern recognition*.
    """

    def __init__(self, margin: float = 1.0, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "margin", margin, POSITIVE)
        self.margin = margin

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """N costs."""
        known = labels != UNLABELLED
        right = labels.where(known, 0).unsqueeze(1)
        # Not torch's multi_margin_loss: `torch.func.vmap` runs it one slice at a time.
        margins = F.relu(self.margin + outputs - outputs.gather(1, right)).scatter(1, right, 0)
        return margins.mean(1) * known


class Focal(_ScoreCost):
    r"""``(1 - p_y)^γ (-log p_y)`` with ``p = softmax(o)``: samples that are already right weigh less.

    Args:
        gamma: γ; 0 gives cross-entropy.
        readout: see `Cost`.

    Source: T.-Y. Lin, P. Goyal, R. Girshick, K. He & P. Dollár (2017), *Focal loss for dense object detection*.
    """

    def __init__(self, gamma: float = 2.0, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "gamma", gamma, NON_NEGATIVE)
        self.gamma = gamma

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """N costs, in nats."""
        log_loss = F.cross_entropy(outputs, labels, reduction="none", ignore_index=UNLABELLED)
        # 1 - p, kept above 0, where the derivative of a power below 1 is infinite
        return (-torch.expm1(-log_loss)).clamp(min=1e-12) ** self.gamma * log_loss


class SupervisedContrastive(Cost):
    r"""Pulls samples of a class together and pushes classes apart, on activity of any size (no class scores).

    .. math::
        L_i = -\frac{1}{|P_i|} \sum_{p \in P_i}
        \log \frac{e^{z_i \cdot z_p / \tau}}{\sum_{a \ne i} e^{z_i \cdot z_a / \tau}}

    with L2-normalised activity :math:`z` and :math:`P_i` the other samples of the batch with the label of :math:`i`.
    The cost of a sample that is the only one with its label is 0; samples without a label are ignored.

    The cost of a sample depends on the other samples of the batch. Rules with ``credit="sample"`` credit a sample with
    its own cost only, which is half of the gradient of its activity and has nearly the same direction (cosine 0.99).
    ``credit="global"`` is exact, but noisier.

    Args:
        temperature: τ.
        readout: see `Cost`.

    Source: P. Khosla et al. (2020), *Supervised contrastive learning*.
    """

    def __init__(self, temperature: float = 0.1, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "temperature", temperature, POSITIVE)
        self.temperature = temperature

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs, in nats."""
        assert targets is not None
        _check_labels(type(self).__name__, targets)
        z = F.normalize(in_full(outputs.flatten(1)), dim=1)
        known = targets != UNLABELLED
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device) & known & known.unsqueeze(1)
        positives = others & (targets == targets.unsqueeze(1))
        with torch.autocast(z.device.type, enabled=False):
            scaled = (z @ z.T / self.temperature).masked_fill(~others, -1e9)  # not -inf: its gradient is NaN
        log_p = scaled.log_softmax(1)
        return -(log_p * positives).sum(1) / positives.sum(1).clamp(min=1)


class Denoising(Cost):
    r"""Mean squared error of a reconstruction of the inputs, from a corrupted copy of them.

    Args:
        corruption: the probability with which `corrupt` sets an input to zero.
        readout: the decoder, with one output per input.

    Source: P. Vincent, H. Larochelle, Y. Bengio & P.-A. Manzagol (2008), *Extracting and composing robust features with
    denoising autoencoders*.
    """

    target_kind = "inputs"

    def __init__(self, corruption: float = 0.3, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "corruption", corruption, FRACTION)
        self.corruption = corruption

    def corrupt(self, inputs: Tensor) -> Tensor:
        """A copy of the inputs with some set to zero; in evaluation mode the inputs themselves."""
        return F.dropout(inputs, self.corruption, self.training) * (1 - self.corruption if self.training else 1)

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs, in squared units of the inputs."""
        return _squared_error(type(self).__name__, outputs, targets)


class Sparsity(Cost):
    r"""``⟨|u_j|⟩``: the mean absolute activity of a sample. Silence minimises it, so use it in a `Mixture`.

    Source: B. A. Olshausen & D. J. Field (1996), *Emergence of simple-cell receptive field properties by learning a
    sparse code for natural images*.
    """

    target_kind = "nothing"

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs, in units of activity."""
        return outputs.flatten(1).abs().mean(1)


class Slowness(Cost):
    r"""Penalises fast changes of activity over the steps of a sequence, and correlations between neurons.

    .. math::
        L = \frac{1}{J} \sum_j \langle (z_{j,t+1} - z_{j,t})^2 \rangle
        + \frac{\lambda}{J (J - 1)} \sum_{i \ne j} \langle z_i z_j \rangle^2

    with the activity :math:`z` of :math:`J` neurons normalised to mean 0 and variance 1 over the batch, which excludes
    silence. The squared difference of two successive steps is shared equally between them.

    Args:
        decorrelation: λ, the weight of the penalty that keeps neurons from all learning the same feature.
        readout: see `Cost`.

    Source: P. Földiák (1991), *Learning invariance from transformation sequences*; L. Wiskott & T. J. Sejnowski (2002),
    *Slow feature analysis: unsupervised learning of invariances*.
    """

    target_kind = "nothing"
    sequences = True

    def __init__(self, decorrelation: float = 1.0, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "decorrelation", decorrelation, NON_NEGATIVE)
        self.decorrelation = decorrelation

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs."""
        u = in_full(outputs.flatten(1))
        z = (u - u.mean(0)) * (u.var(0, correction=0) + 1e-6).rsqrt()
        change = z.unflatten(0, (-1, steps)).diff(dim=1).square().mean(2)
        costs = (F.pad(change, (1, 0)) + F.pad(change, (0, 1))).flatten() * (steps / (2 * (steps - 1)))
        if self.decorrelation:
            # Σ_{i≠j} ⟨z_i z_j⟩² from the N × N Gram matrix: there may be far more neurons than samples.
            with torch.autocast(z.device.type, enabled=False):
                all_pairs, diagonal = (z @ z.T).square().mean(1), (z.square() * z.square().mean(0)).sum(1)
            costs = costs + self.decorrelation / (z.shape[1] * max(z.shape[1] - 1, 1)) * (all_pairs - diagonal)
        return costs


class Predictive(Cost):
    r"""Mean squared error of a prediction of the next step's inputs; 0 for the last step of a sequence.

    Args:
        readout: computes the prediction, with one output per input.

    Source: J. L. Elman (1990), *Finding structure in time*.
    """

    target_kind = "inputs"
    sequences = True

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs, in squared units of the inputs, scaled so that their mean is the mean over all predictions."""
        assert targets is not None
        next_inputs = targets.unflatten(0, (-1, steps))[:, 1:].flatten(0, 1)
        predictions = outputs.unflatten(0, (-1, steps))[:, :-1].flatten(0, 1)
        errors = _squared_error(type(self).__name__, predictions, next_inputs).unflatten(0, (-1, steps - 1))
        return F.pad(errors, (0, 1)).flatten() * (steps / (steps - 1))


class Mixture(Cost):
    """A weighted sum of costs of the same outputs, each through its own readout if it has one.

    Args:
        costs: the costs by name; may contain mixtures, so that costs can share a readout.
        weights: the weight of each, >= 0.
        readout: a readout that all costs share, applied before their own.

    Raises:
        ValueError: there is no cost, costs and weights have different names, or a weight is out of range.
    """

    def __init__(
        self, costs: Mapping[str, Cost], weights: Mapping[str, float], readout: nn.Module | None = None
    ) -> None:
        super().__init__(readout)
        if not costs or costs.keys() != weights.keys():
            raise ValueError(
                f"Mixture: costs {list(costs)} and weights {list(weights)} must have the same names, at least one"
            )
        for name, weight in weights.items():
            require_in_range("Mixture", f"weights[{name!r}]", weight, NON_NEGATIVE)
        self.costs = nn.ModuleDict(costs)
        self.weights = dict(weights)
        self.scores = any(cost.scores for cost in costs.values())
        self.sequences = any(cost.sequences for cost in costs.values())

    def output_size(self, classes: int, inputs: int) -> int | None:
        """That of the costs of these outputs themselves, without a readout; ``None``: any."""
        sizes = [cost.output_size(classes, inputs) for cost in self._costs() if cost.readout is None]
        return next((size for size in sizes if size is not None), None)

    def _costs(self) -> list[Cost]:
        return [cost for cost in self.costs.values() if isinstance(cost, Cost)]

    def corrupt(self, inputs: Tensor) -> Tensor:
        """The inputs as corrupted by all costs, one after another."""
        for cost in self._costs():
            inputs = cost.corrupt(inputs)
        return inputs

    def forward(
        self, outputs: Tensor, labels: Tensor | None = None, *, inputs: Tensor | None = None, steps: int = 1
    ) -> Tensor:
        """The weighted sum of the costs of each sample; arguments as in `Cost.forward`."""
        if self.readout is not None:
            outputs = self.readout(outputs.flatten(1))
        parts = [
            self.weights[name] * cost(outputs, labels, inputs=inputs, steps=steps) for name, cost in self.costs.items()
        ]
        return torch.stack(parts).sum(0)

    def per_sample(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """Unused: `forward` calls the costs of the mixture."""
        raise NotImplementedError


def _check_labels(name: str, targets: Tensor) -> None:
    if targets.is_floating_point() or targets.ndim != 1:
        raise ValueError(
            f"{name} needs class labels, N integers, not targets of {targets.dtype} and shape {tuple(targets.shape)}"
        )


def _squared_error(name: str, outputs: Tensor, targets: Tensor | None) -> Tensor:
    assert targets is not None
    outputs, targets = outputs.flatten(1), targets.detach().flatten(1)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name} compares {outputs.shape[1]} outputs with {targets.shape[1]} inputs per sample; give it a "
            f"readout=torch.nn.Linear(..., {targets.shape[1]})"
        )
    return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="none").mean(1)
