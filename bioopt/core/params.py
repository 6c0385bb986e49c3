"""``params`` of a rule (a module, its parameters, or groups of either), and options of the descent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .integrations import recipe
from .synapse import Exclusion, Synapse, Unwatchable, is_known, refusal, survey

Params: TypeAlias = (
    nn.Module
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Iterable[nn.Module]
    | Iterable[tuple[str, nn.Module]]
    | Iterable[dict[str, Any]]
)
ProcessGroup: TypeAlias = dist.ProcessGroup | None


class DescentOptions(TypedDict, total=False):
    """Options of the `torch.optim` class that makes the step. Others are passed on as well."""

    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    amsgrad: bool
    alpha: float
    centered: bool
    rho: float
    lr_decay: float
    initial_accumulator_value: float
    maximize: bool
    foreach: bool
    fused: bool
    capturable: bool
    differentiable: bool


class RuleOptions(DescentOptions, total=False):
    """Options of every rule; `bioopt.LearningRule` describes them."""

    exclude: Iterable[Any]
    descent: type[Optimizer]
    process_group: ProcessGroup


class GradientOptions(RuleOptions, total=False):
    """Options of rules whose layers descend a gradient, or an estimate of it."""

    centre_inputs: bool | None
    whitening: float | None


def named_modules_of(params: Any) -> list[tuple[str, nn.Module]]:
    """The modules in ``params`` with prefixes for the names inside; empty for bare parameters."""
    if isinstance(params, nn.Module):
        return [("", params)]
    if isinstance(params, Sequence) and params and all(isinstance(m, nn.Module) for m in params):
        return [(str(i), module) for i, module in enumerate(params)]
    if (
        isinstance(params, Sequence)
        and params
        and all(isinstance(m, tuple) and isinstance(m[-1], nn.Module) for m in params)
    ):
        return list(params)
    return []


def named_parameters_of(params: Any, excluded: Exclusion | None = None) -> list[Any]:
    """``params`` for `torch.optim`: pairs of name and parameter for modules, else as given."""
    modules = named_modules_of(params)
    if not modules:
        return [params] if isinstance(params, Tensor) else list(params)
    left_out = excluded.params if excluded is not None else set()
    named = [named for prefix, module in modules for named in module.named_parameters(prefix)]
    return unique([(name, p) for name, p in named if p not in left_out])


def learning_parameters_of(params: Any, excluded: Exclusion) -> list[tuple[str, Tensor]]:
    """The named parameters of the modules in ``params``, without those of layers that are frozen now.

    If these were unfrozen later, they would learn without being watched.
    """
    layers = [layer for _, module in named_modules_of(params) for layer in module.modules()]
    resting = [layer for layer in layers if is_known(layer) and not layer.weight.requires_grad]
    frozen = {p for layer in resting for p in layer.parameters(recurse=False) if not p.requires_grad}
    return [one for one in named_parameters_of(params, excluded) if one[1] not in frozen]


def unique(named: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Each parameter once, under its first name."""
    return [(name, p) for p, name in {p: name for name, p in reversed(named)}.items()][::-1]


def groups_of(params: Params) -> list[dict[str, Any]]:
    """``params`` in torch's form of a list of groups, whose ``"params"`` may still be modules."""
    if isinstance(params, Tensor):
        raise TypeError(
            f"params must be a module, or an iterable of parameters or groups, not {torch.typename(params)}"
        )
    if isinstance(params, nn.Module):
        return [{"params": params}]
    given: list[Any] = list(params)
    if not given:
        raise ValueError("params is empty: give the model, its parameters, or groups of either")
    return [dict(group) for group in given] if isinstance(given[0], dict) else [{"params": given}]


def surveyed(rule: str, params: Any, excluded: Exclusion | None = None) -> tuple[list[Synapse], list[Unwatchable]]:
    """The plastic synapses of the modules given as ``params``, and the layers that cannot be watched.

    Raises:
        TypeError: bare parameters.
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
                f"never arrive: write {rule}(model.module, ..., process_group=torch.distributed.group.WORLD)"
            )
    found: dict[nn.Module, Synapse] = {}
    unwatchable: dict[nn.Module, Unwatchable] = {}
    for prefix, module in modules:
        synapses, others = survey(module, prefix, excluded)
        for synapse in synapses:
            found.setdefault(synapse.layer, synapse)
        for other in others:
            unwatchable.setdefault(other.layer, other)
    return list(found.values()), list(unwatchable.values())


def synapses_of(rule: str, params: Any, excluded: Exclusion | None = None) -> list[Synapse]:
    """The plastic synapses of the modules given as ``params``.

    Raises:
        TypeError: bare parameters.
        ValueError: layers that cannot be watched, all in one message.
    """
    found, unwatchable = surveyed(rule, params, excluded)
    if unwatchable:
        raise ValueError(refusal(rule, unwatchable))
    return found


def whole_of(rule: str, params: Any, excluded: Exclusion) -> tuple[list[tuple[str, Tensor]], list[Synapse]]:
    """All named parameters that learn, and the plastic synapses, of the modules given as ``params``.

    Raises:
        TypeError: bare parameters.
        ValueError: layers that cannot be watched; nothing that learns.
    """
    synapses, named = synapses_of(rule, params, excluded), learning_parameters_of(params, excluded)
    if not synapses and not named:
        raise ValueError(no_plastic_layer(rule))
    return named, synapses


def no_plastic_layer(rule: str) -> str:
    """The message about a model without plastic layers."""
    return (
        f"{rule}: the model has no plastic layer, or one of its param groups has none: no Linear, Conv1d, Conv2d or "
        "Conv3d (or a type given to bioopt.register_synapse) whose weight has requires_grad=True"
    )
