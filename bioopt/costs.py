"""Costs of each sample, behind one interface, for a network or for one of its areas.

No single cost is good enough for all tasks, and different areas of a brain seem to optimise different ones
(A. H. Marblestone, G. Wayne & K. P. Kording, 2016, *Toward an integration of deep learning and neuroscience*). Every
cost here is called alike::

    losses = cost(outputs, labels, inputs=x)     # one a sample; each cost takes of labels and inputs what it needs

so that one closure serves all of them, and every rule, which credits each sample with its own loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.constraints import NON_NEGATIVE, POSITIVE, Constraint, require_in_range
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

UNLABELLED = -100  #: the label of a sample without one, as of `torch.nn.functional.cross_entropy`: it costs nothing

SHARE: Constraint = (lambda v: 0 <= v <= 1, "a number in [0, 1]")


class Cost(nn.Module, ABC):
    """What each sample costs, by what a network, or an area of one, says of it.

    Not to be instantiated; a cost implements `of_each`, and says what it is told and what it wants.

    Args:
        readout: a module between the activity and the cost, which learns with the area: a `torch.nn.Linear`, say, where
            class scores or a reconstruction are wanted of hidden neurons. ``None``: the activity is taken as it is.
    """

    #: what the cost is told of a sample: ``"labels"``, ``"inputs"`` or ``"nothing"``
    told = "labels"
    #: whether the largest of its outputs is the class that the network decides for
    scores = False
    #: whether it compares successive steps of sequences
    sequences = False

    def __init__(self, readout: nn.Module | None = None) -> None:
        super().__init__()
        self.readout = readout

    @abstractmethod
    def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """The cost of each row of outputs; ``targets`` is what the cost is `told`."""

    def wants(self, classes: int, inputs: int) -> int | None:
        """How many outputs: as many as classes, as inputs, or (``None``) as there are."""
        if self.told == "nothing" or not (self.scores or self.told == "inputs"):
            return None
        return classes if self.told == "labels" else inputs

    def seen(self, inputs: Tensor) -> Tensor:
        """What the network is shown in place of its inputs."""
        return inputs

    def forward(
        self, outputs: Tensor, labels: Tensor | None = None, *, inputs: Tensor | None = None, steps: int = 1
    ) -> Tensor:
        """The cost of each sample.

        Args:
            outputs: N × anything, of a network or an area; for sequences, the steps of each one after another.
            labels: class of each sample, N; `UNLABELLED` where there is none.
            inputs: what entered the network or area, N × anything.
            steps: of each sequence, so that N is a multiple of it.

        Returns:
            N costs.

        Raises:
            ValueError: targets that are missing, or do not fit the outputs; single steps where sequences are compared.
        """
        name = type(self).__name__
        targets = {"labels": labels, "inputs": inputs, "nothing": None}[self.told]
        if targets is None and self.told != "nothing":
            how = "cost(outputs, labels)" if self.told == "labels" else "cost(outputs, inputs=x)"
            raise ValueError(f"{name} is told {self.told}, and got none: write {how}")
        if self.sequences and (steps < 2 or len(outputs) % steps):
            raise ValueError(
                f"{name} compares successive steps, so it needs sequences of 2 or more: {len(outputs)} rows of "
                f"outputs with steps={steps} are none"
            )
        if self.readout is not None:
            outputs = self.readout(outputs.flatten(1))
        if targets is not None and len(targets) != len(outputs):
            raise ValueError(f"{name}: {len(outputs)} outputs, but {len(targets)} {self.told}; it wants one a sample")
        return self.of_each(outputs, targets, steps)


class _OfScores(Cost):
    """A cost of class scores N × classes, told labels N, which it checks."""

    scores = True

    def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        assert targets is not None
        name = type(self).__name__
        if outputs.ndim != 2:
            raise ValueError(
                f"{name} wants class scores, N × classes, not outputs of shape {tuple(outputs.shape)}; give it a "
                "readout=torch.nn.Linear(..., classes)"
            )
        if targets.is_floating_point() or targets.ndim != 1:
            raise ValueError(
                f"{name} is told class labels, N integers, not targets of {targets.dtype} and shape "
                f"{tuple(targets.shape)}"
            )
        if targets.device.type == "cpu" and not torch.compiler.is_compiling() and len(targets):
            least, largest = (int(label) for label in targets.aminmax())
            if least < 0:
                least = int(targets.where(targets != UNLABELLED, 0).min())
            if least < 0 or largest >= outputs.shape[1]:
                raise ValueError(
                    f"{name}: labels from {least} to {largest}, but scores of {outputs.shape[1]} classes; labels are 0 "
                    f"to {outputs.shape[1] - 1}, or {UNLABELLED} for none"
                )
        return self.of_labels(outputs, targets)

    @abstractmethod
    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The cost of each sample, by scores and labels that fit each other."""


class CrossEntropy(_OfScores):
    r"""``-Σ_k t_k log softmax(o)_k``, by `torch.nn.functional.cross_entropy`.

    Args:
        label_smoothing: the share of a target that is spread over all classes (C. Szegedy et al., 2016, *Rethinking the
            Inception architecture for computer vision*).
        readout: as of `Cost`.
    """

    def __init__(self, label_smoothing: float = 0.0, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "label_smoothing", label_smoothing, SHARE)
        self.label_smoothing = label_smoothing

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """N costs, in nats."""
        return F.cross_entropy(
            outputs, labels, reduction="none", ignore_index=UNLABELLED, label_smoothing=self.label_smoothing
        )


class SquaredError(_OfScores):
    r"""``⟨(o_k - t_k)²⟩`` over classes, by `torch.nn.functional.mse_loss`; targets are 1 for the class, else 0."""

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """N costs."""
        known = labels != UNLABELLED
        targets = F.one_hot(labels.where(known, 0), outputs.shape[1]).to(outputs.dtype)
        return F.mse_loss(outputs, targets, reduction="none").mean(1) * known


class Hinge(_OfScores):
    r"""``Σ_{k≠y} max(0, margin - o_y + o_k) / classes``, as `torch.nn.functional.multi_margin_loss`.

    Args:
        margin: by which the right class is to exceed the others.
        readout: as of `Cost`.

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
        # not torch's own function, which `torch.func.vmap` runs one slice at a time
        margins = F.relu(self.margin + outputs - outputs.gather(1, right)).scatter(1, right, 0)
        return margins.mean(1) * known


class Focal(_OfScores):
    r"""``(1 - p_y)^γ (-log p_y)`` with ``p = softmax(o)``: what is already right counts less.

    Args:
        gamma: γ; 0 is cross-entropy.
        readout: as of `Cost`.

    Source: T.-Y. Lin, P. Goyal, R. Girshick, K. He & P. Dollár (2017), *Focal loss for dense object detection*.
    """

    def __init__(self, gamma: float = 2.0, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "gamma", gamma, NON_NEGATIVE)
        self.gamma = gamma

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """N costs, in nats."""
        surprise = F.cross_entropy(outputs, labels, reduction="none", ignore_index=UNLABELLED)
        # 1 - p, and not quite 0, where the slope of a power below 1 is infinite
        return (-torch.expm1(-surprise)).clamp(min=1e-12) ** self.gamma * surprise


class SupervisedContrastive(Cost):
    r"""Samples of a class near each other, those of different classes far apart; activity of any size, no scores.

    .. math::
        L_i = -\frac{1}{|P_i|} \sum_{p \in P_i}
        \log \frac{e^{z_i \cdot z_p / \tau}}{\sum_{a \ne i} e^{z_i \cdot z_a / \tau}}

    with activity :math:`z` brought to length 1 and :math:`P_i` the other samples of the batch with the label of
    :math:`i`. A sample that is alone with its label costs nothing; one without a label takes no part.

    The cost of a sample depends on the others of its batch. Rules with ``credit="sample"`` credit it with its own cost
    alone: half of what its activity changes, in nearly the direction of all of it (the cosine of the two gradients is
    0.99). ``credit="global"`` is exact, and noisier.

    Args:
        temperature: τ.
        readout: as of `Cost`.

    Source: P. Khosla et al. (2020), *Supervised contrastive learning*.
    """

    def __init__(self, temperature: float = 0.1, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "temperature", temperature, POSITIVE)
        self.temperature = temperature

    def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs, in nats."""
        assert targets is not None
        if targets.is_floating_point() or targets.ndim != 1:
            raise ValueError(
                f"SupervisedContrastive is told class labels, N integers, not targets of {targets.dtype} and shape "
                f"{tuple(targets.shape)}"
            )
        z = F.normalize(in_full(outputs.flatten(1)), dim=1)
        known = targets != UNLABELLED
        other = ~torch.eye(len(z), dtype=torch.bool, device=z.device) & known & known.unsqueeze(1)
        alike = other & (targets == targets.unsqueeze(1))
        scaled = (z @ z.T / self.temperature).masked_fill(~other, -1e9)  # not -inf, whose gradient is nan
        log_share = scaled.log_softmax(1)
        return -(log_share * alike).sum(1) / alike.sum(1).clamp(min=1)


class Denoising(Cost):
    r"""Mean squared error of a reconstruction of the inputs, of which the network is shown a corrupted copy.

    Args:
        corruption: the share of the inputs that `seen` sets to zero, anew each time.
        readout: to as many outputs as there are inputs: the decoder.

    Source: P. Vincent, H. Larochelle, Y. Bengio & P.-A. Manzagol (2008), *Extracting and composing robust features with
    denoising autoencoders*.
    """

    told = "inputs"

    def __init__(self, corruption: float = 0.3, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "corruption", corruption, SHARE)
        self.corruption = corruption

    def seen(self, inputs: Tensor) -> Tensor:
        """Inputs of the same shape; all of them where nothing is learned."""
        return F.dropout(inputs, self.corruption, self.training) * (1 - self.corruption if self.training else 1)

    def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs, in squared units of the inputs."""
        return _squared_distance(type(self).__name__, outputs, targets)


class Sparsity(Cost):
    r"""``⟨|u_j|⟩``: the mean absolute activity of a sample, which silence minimises: for a `Mixture`, not alone.

    Source: B. A. Olshausen & D. J. Field (1996), *Emergence of simple-cell receptive field properties by learning a
    sparse code for natural images*.
    """

    told = "nothing"

    def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs, in units of activity."""
        return outputs.flatten(1).abs().mean(1)


class Slowness(Cost):
    r"""Activity that changes slowly from step to step though it varies over the batch, each neuron in a way of its own.

    .. math::
        L = \frac{1}{J} \sum_j \langle (z_{j,t+1} - z_{j,t})^2 \rangle
        + \frac{\lambda}{J (J - 1)} \sum_{i \ne j} \langle z_i z_j \rangle^2

    with the activity :math:`z` of :math:`J` neurons brought to mean 0 and variance 1 over the batch, which rules out
    silence. A step costs half of what it differs from the one before and half of what it differs from the next.

    Args:
        decorrelation: λ, which keeps neurons from all saying the same.
        readout: as of `Cost`.

    Source: P. Földiák (1991), *Learning invariance from transformation sequences*; L. Wiskott & T. J. Sejnowski (2002),
    *Slow feature analysis: unsupervised learning of invariances*.
    """

    told = "nothing"
    sequences = True

    def __init__(self, decorrelation: float = 1.0, readout: nn.Module | None = None) -> None:
        super().__init__(readout)
        require_in_range(type(self).__name__, "decorrelation", decorrelation, NON_NEGATIVE)
        self.decorrelation = decorrelation

    def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs."""
        u = in_full(outputs.flatten(1))
        z = (u - u.mean(0)) * (u.var(0, correction=0) + 1e-6).rsqrt()
        change = z.unflatten(0, (-1, steps)).diff(dim=1).square().mean(2)
        costs = (F.pad(change, (1, 0)) + F.pad(change, (0, 1))).flatten() * (steps / (2 * (steps - 1)))
        if self.decorrelation:
            # Σ_{i≠j} ⟨z_i z_j⟩² by the samples' own products: there may be far more neurons than samples.
            alike, squares = (z @ z.T).square().mean(1), (z.square() * z.square().mean(0)).sum(1)
            costs = costs + self.decorrelation / (z.shape[1] * max(z.shape[1] - 1, 1)) * (alike - squares)
        return costs


class Predictive(Cost):
    r"""Mean squared error of a prediction of the next step's inputs; the last step of a sequence predicts nothing.

    Args:
        readout: to as many outputs as there are inputs: the prediction.

    Source: J. L. Elman (1990), *Finding structure in time*.
    """

    told = "inputs"
    sequences = True

    def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """N costs, in squared units of the inputs; their mean is that over all predictions."""
        assert targets is not None
        following = targets.unflatten(0, (-1, steps))[:, 1:].flatten(0, 1)
        said = outputs.unflatten(0, (-1, steps))[:, :-1].flatten(0, 1)
        errors = _squared_distance(type(self).__name__, said, following).unflatten(0, (-1, steps - 1))
        return F.pad(errors, (0, 1)).flatten() * (steps / (steps - 1))


class Mixture(Cost):
    """A weighted sum of costs of the same outputs, each with a readout of its own where it has one.

    Args:
        costs: by name; mixtures among them, whose costs may share a readout.
        weights: of each, >= 0.
        readout: before all of them.

    Raises:
        ValueError: no cost, a cost without a weight or the other way round, a weight out of range.
    """

    def __init__(
        self, costs: Mapping[str, Cost], weights: Mapping[str, float], readout: nn.Module | None = None
    ) -> None:
        super().__init__(readout)
        if not costs or costs.keys() != weights.keys():
            raise ValueError(f"Mixture: costs {list(costs)} and weights {list(weights)} must have the same names, >= 1")
        for name, weight in weights.items():
            require_in_range("Mixture", f"weights[{name!r}]", weight, NON_NEGATIVE)
        self.costs = nn.ModuleDict(costs)
        self.weights = dict(weights)
        self.scores = any(cost.scores for cost in costs.values())
        self.sequences = any(cost.sequences for cost in costs.values())

    def seen(self, inputs: Tensor) -> Tensor:
        """What all of them make of the inputs, one after another."""
        for cost in self.costs.values():
            assert isinstance(cost, Cost)
            inputs = cost.seen(inputs)
        return inputs

    def forward(
        self, outputs: Tensor, labels: Tensor | None = None, *, inputs: Tensor | None = None, steps: int = 1
    ) -> Tensor:
        """As of `Cost`."""
        if self.readout is not None:
            outputs = self.readout(outputs.flatten(1))
        parts = [
            self.weights[name] * cost(outputs, labels, inputs=inputs, steps=steps) for name, cost in self.costs.items()
        ]
        return torch.stack(parts).sum(0)

    def of_each(self, outputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        """Not asked: the parts are."""
        raise NotImplementedError


def _squared_distance(name: str, outputs: Tensor, targets: Tensor | None) -> Tensor:
    assert targets is not None
    said, wanted = outputs.flatten(1), targets.detach().flatten(1)
    if said.shape != wanted.shape:
        raise ValueError(
            f"{name} compares {said.shape[1]} outputs with {wanted.shape[1]} inputs a sample; give it a "
            f"readout=torch.nn.Linear(..., {wanted.shape[1]})"
        )
    return F.mse_loss(said, wanted.to(said.dtype), reduction="none").mean(1)
