"""`audit`: what is measured, and how it is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.probe import Closure
from ..mixed import Mixed
from .card import Audit
from .measures import Auditor

__all__ = ["audit"]


def audit(optimizer: Optimizer, model: nn.Module, closure: Closure, *, labels: Tensor | None = None) -> Audit:
    r"""Measure what a rule's next update depends on, layer by layer, without changing anything.

    Nothing is asserted by a rule: each number is the relative change of an update under an intervention, with the same
    noise, the same batch and the same state of the rule.

    **Weight transport.** Let the rows of :math:`X` be the presynaptic activity of a layer in all evaluations of a step
    (over samples and positions; a convolution's patches). Its weights are changed by :math:`V` with :math:`V X^\top =
    0`: the part of each neuron's weight vector that no activity meets is reversed. Outputs, activities and the error
    at the layer's output stand still, so that the update of a layer below moves only if the rule reads the weights by
    another way than their use in the forward pass. Backpropagation reads them as :math:`W^\top`. A second step, from
    the rule's state after the first, must stand still as well: the rule may have copied the weights.

    **Locality.** Other layers: the same :math:`V` in a layer below; another activity of a neuron of any other layer,
    which the rule receives and the network does not; another learning signal in a layer below. Other neurons: one
    neuron of the layer itself has other weights, by :math:`V`, or another activity; the update of the other neurons is
    compared. Other samples: with the inputs of samples :math:`i`, :math:`j` or both replaced by their mirror images,
    :math:`\lVert \Delta_{ij} - \Delta_i - \Delta_j + \Delta \rVert / (\lVert \Delta_i - \Delta \rVert + \lVert
    \Delta_j - \Delta \rVert)`, which is 0 where each sample has a contribution of its own.

    **Signals.** Labels: each sample gets the label of the next one, in ``labels`` itself, or else in
    ``optimizer.target`` and, by the order of the model's outputs, in the loss. Error: each entry of the error at the
    model's output times a number from 0.5 to 2, with the same value of the loss. Loss: the value that the closure
    returns is reversed and doubled, with the same error.

    **Timing.** All layers above return something else: a rule without update locking has the same update.

    **Feedback weights**, of rules that have the method ``feedback_weights`` (`FeedbackRule`): their angle to the
    forward weights, and how far they move, now or after the step, with :math:`V`; and the updates of other parameters
    of the rule's own, such as local heads.

    What a rule does inside `LearningRule.descend` (and what its ``descent`` makes of the update) is not measured.

    Args:
        optimizer: a rule, or an optimizer of torch, which learns by backpropagation.
        model: the network that the closure runs; its first dimension is the sample.
        closure: as of `LearningRule.step`, on one small batch. The weights of a layer have a part that no activity
            meets only if a neuron has more inputs than there are events in all evaluations: two to four samples, and
            small images. In double precision, rounding is far below every effect.
        labels: the tensor from which the closure takes the labels, one for each sample. With it a rule is found that
            knows them by some way of its own.

    Returns:
        a row for each layer and a line of summary: ``print(bioopt.audit(...))``.

    Raises:
        TypeError: anything but a single optimizer and a module; of `Mixed`, audit the members.
        ValueError: parameters in half precision.
        RuntimeError: the closure is not repeatable, does not run the model, or runs under autocast; another rule acts
            on the model; as `LearningRule.step`.

    Example::

        model = model.double()
        optimizer = bioopt.FeedbackAlignment(model)
        print(bioopt.audit(optimizer, model, lambda: F.cross_entropy(model(x), y, reduction="none")))
    """
    if isinstance(optimizer, Mixed) or not isinstance(optimizer, Optimizer):
        raise TypeError(f"audit takes a single optimizer, not {type(optimizer).__name__}; audit its members, if any")
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit takes the model that the closure runs, not a {type(model).__name__}")
    small = next((p for p in model.parameters() if p.is_floating_point() and p.element_size() < 4), None)
    if small is not None:
        raise ValueError(f"audit needs single or double precision, not {small.dtype}: model.double()")
    if not callable(closure):
        raise TypeError(
            "audit takes a closure, a function that runs the model and returns the loss, not a "
            f"{torch.typename(closure)}"
        )
    auditor = Auditor(optimizer, model, closure, labels)
    auditor.require_alone()
    with auditor.trial.undone():
        return auditor.audit()
