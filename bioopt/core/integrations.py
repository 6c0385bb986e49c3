"""Other tools and training loops: calls that cannot work there are refused, with a recipe that works.

None of these packages is imported here; they are recognised by their objects or by the modules on the call stack.
"""

from __future__ import annotations

import functools
import inspect
import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["recipe", "refuse_scaler", "refuse_trainer_options"]

NAME = "rule"  # in a state dict: the name of its rule
RULE = "rule"  # in a state dict's "state": the state that belongs to no parameter
PACKED = "rule_state"  # in a param group: the same as bytes, for torch.distributed.checkpoint
HIDDEN = "owned_groups"  # in these bytes: param groups of modules of the rule's own, which are not the model's

#: for each package with its own training loop, how rules get the model and a closure there
RECIPES = {
    "transformers": (
        "Hugging Face's Trainer takes a rule as optimizers=(rule, None) and calls step() without a closure; "
        "RuleTrainer in examples/huggingface_trainer.py calls rule.estimate(closure) in place of the backward pass"
    ),
    "accelerate": (
        "With accelerate, call step(closure) of the prepared optimizer, or optimizer.optimizer.estimate(closure) in "
        "place of accelerator.backward(loss), as in examples/accelerate_loop.py"
    ),
    "skorch": (
        "With skorch, RuleNet in examples/skorch_net.py gives a rule the module in place of its parameters, and a "
        "closure without a needless backward pass; AccelerateMixin would pass none on"
    ),
    "ignite": (
        "With Ignite, give Engine your own update function that calls optimizer.step(closure), in place of "
        "create_supervised_trainer, as in examples/ignite_engine.py"
    ),
    "lightning": (
        "Lightning's automatic optimization passes a closure, except with precision '16-mixed': use 'bf16-mixed'; see "
        "examples/lightning_fit.py"
    ),
}
RECIPES["pytorch_lightning"] = RECIPES["lightning"]


def recipe() -> str:
    """A sentence on the training loop on the call stack, with a leading space; empty if there is none."""
    found = [RECIPES[package] for package in map(_package, _callers()) if package in RECIPES]
    return f" {found[-1]}." if found else ""  # the outermost: the loop, not a wrapper inside it


def refuse_scaler(optimizer: Any) -> bool:
    """Raise if a GradScaler would fail without a reason, or divide what was not scaled."""
    if optimizer._estimated:
        raise RuntimeError(
            f"{type(optimizer).__name__}: torch.amp.GradScaler would divide what estimate() has written by its scale. "
            "Call optimizer.descend() in place of scaler.step(optimizer), or use bfloat16, which needs no scaler"
        )
    if all(p.grad is None for p in params_in(optimizer)):
        raise RuntimeError(
            f"{type(optimizer).__name__}: torch.amp.GradScaler scales the gradients of a backward pass, and none has "
            "reached a parameter here. If nothing learns from a backward pass (readout=None or 'teacher', "
            "perturbation), call optimizer.step itself, under autocast in bfloat16, which needs no scaler." + recipe()
        )
    if not optimizer.scales_with_loss and getattr(optimizer, "shares_pass", True):
        raise RuntimeError(
            f"{type(optimizer).__name__}: torch.amp.GradScaler scales the loss, but not all updates of this rule come "
            "from the loss: use bfloat16, which needs no scaler"
        )
    return False  # the rule does not unscale


def refuse_trainer_options(rule: str, closure: Callable[[], Any]) -> None:
    """Raise if Lightning or skorch would accumulate or clip inside the closure: the rule writes ``.grad`` later."""
    if getattr(closure, "__module__", None) == "skorch.net":  # `step_fn`, a function inside a method of the net
        variables = dict(zip(closure.__code__.co_freevars, closure.__closure__ or (), strict=True))
        callbacks = dict(getattr(variables["self"].cell_contents, "callbacks_", ())) if "self" in variables else {}
        for name, callback in callbacks.items():
            value = getattr(callback, "gradient_clip_value", None)
            if value is not None:
                raise RuntimeError(
                    f"{rule}: the callback {name}, {type(callback).__name__}(gradient_clip_value={value}), clips .grad "
                    "after the backward pass, but the rule writes .grad after the closure. Remove it, and override "
                    "_step_optimizer(self, step_fn) of your net, as in examples/skorch_net.py, to clip between "
                    "self.optimizer_.estimate(step_fn) and self.optimizer_.descend()"
                )
    # Lightning gives partial(..., module, optimizer, closure): recognised without importing it.
    arguments = closure.args if isinstance(closure, functools.partial) else ()
    if arguments and getattr(arguments[-1], "__name__", "") == "do_nothing_closure":
        raise RuntimeError(
            f"{rule}: in manual optimization, step() of Lightning's wrapper passes a closure that does nothing. Call "
            "step() of the rule itself, self.optimizers(use_pl_optimizer=False), with a closure if the rule needs one; "
            "see examples/lightning_fit.py"
        )
    module = next((a for a in arguments if isinstance(a, nn.Module)), None)
    trainer = getattr(module, "_trainer", None)  # `trainer` raises where there is none
    for option, off in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
        value = getattr(trainer, option, off)
        if value not in (off, 0):
            raise RuntimeError(
                f"{rule}: Trainer({option}={value}) works on the .grad of the backward pass, but the rule writes .grad "
                "after the closure, from this closure's batch alone. Override optimizer_step(self, epoch, batch, "
                "optimizer, closure) of your LightningModule, with rule = optimizer.optimizer: for a rule of one "
                "forward pass, closure(); rule.estimate(); self.clip_gradients(rule); rule.descend(), which includes "
                "accumulated batches; for a rule of several, rule.estimate(closure) and so on, with larger batches in "
                "place of accumulation"
            )


def refuse_own_closure(what: str, optimizer: type[Optimizer]) -> None:
    """Raise if the step of an optimizer evaluates the closure itself, as that of LBFGS; ``what`` names it."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            f"{what} evaluates the closure itself; choose one that steps along .grad alone, such as torch.optim.SGD or "
            "torch.optim.Adam"
        )


@torch.compiler.disable(reason="it looks at the call stack")  # type: ignore[untyped-decorator]
def needs_estimate(optimizer: Any, closure: Callable[[], Any] | None, rules: Iterable[Any]) -> bool:
    """Whether ``step(closure)`` must make an estimate, or descends along the present ``.grad``.

    It descends after `estimate`, unless there was a forward pass since; and when torch.distributed.checkpoint makes a
    step with zero gradients and lr=0, for optimizers to create their state.

    Raises:
        RuntimeError: the training loop that calls step() has accumulated or clipped without effect.
    """
    if closure is None:
        if in_distributed_checkpoint():
            return False
        new = any(rule._recorder.fired for rule in rules)
        if optimizer._estimated and not new and any(p.grad is not None for p in params_in(optimizer)):
            return False
    _refuse_options_of_the_caller(type(optimizer).__name__, closure)
    return True


def _refuse_options_of_the_caller(rule: str, closure: Callable[[], Any] | None) -> None:
    """Raise if Hugging Face's Trainer clips, or accelerate accumulates, gradients that the rule does not use."""
    if "accelerate" not in sys.modules:
        return
    caller = next((frame for frame in _callers() if _package(frame) not in ("bioopt", "torch")), None)
    if caller is None or caller.f_globals.get("__name__") != "accelerate.optimizer":
        return
    steps = caller.f_locals["self"].gradient_state.num_steps
    if closure is not None and steps > 1:
        raise RuntimeError(
            f"{rule}: Accelerator(gradient_accumulation_steps={steps}) calls step(closure) for the last of {steps} "
            "micro-batches alone; the others would be lost. For a rule of one forward pass, call "
            "accelerator.backward(loss) and step() without a closure, as in examples/accelerate_loop.py; for a rule of "
            "several, use larger batches, or add up .grad of optimizer.optimizer.estimate(closure), as in "
            "examples/accumulate_clip_schedule.py"
        )
    trainer = next((frame for frame in _callers() if _package(frame) not in ("bioopt", "torch", "accelerate")), None)
    if trainer is None or trainer.f_globals.get("__name__") != "transformers.trainer":
        return
    norm = getattr(getattr(trainer.f_locals.get("self"), "args", None), "max_grad_norm", None)
    if norm:
        raise RuntimeError(
            f"{rule}: TrainingArguments(max_grad_norm={norm}) clips the .grad of the backward pass, before the rule "
            "has written its own. To clip that, use RuleTrainer of examples/huggingface_trainer.py, which works with "
            "any rule; else set max_grad_norm=0"
        )


def for_checkpoint(
    state_dict: dict[str, Any], rule: str, own_state: dict[str, Any], owned: Sequence[int]
) -> dict[str, Any]:
    """A rule's state dict, from torch's, the rule's name and its own state; ``owned``: groups of its own modules."""
    if in_distributed_checkpoint():
        return for_distributed_checkpoint(state_dict, {0: (rule, own_state, owned)})
    groups = [{key: value for key, value in group.items() if key != PACKED} for group in state_dict["param_groups"]]
    own = {RULE: own_state} if own_state else {}
    return {**state_dict, "state": {**state_dict["state"], **own}, "param_groups": groups, NAME: rule}


def for_distributed_checkpoint(
    state_dict: dict[str, Any], rules: dict[int, tuple[str, dict[str, Any], Sequence[int]]]
) -> dict[str, Any]:
    """The same for torch.distributed.checkpoint, of one rule or more.

    It keeps only the state of parameters and the options of groups, and reads only entries that a new optimizer has as
    well. So the own state is one option of a group, and every parameter has an entry. It also knows only the model's
    parameters: groups of modules that belong to a rule are stored with its own state.

    Args:
        state_dict: torch's.
        rules: by the number of its first group, the name of each, its own state, and its groups of own modules.
    """
    hidden = {i for *_, owned in rules.values() for i in owned}
    groups, state = list(enumerate(state_dict["param_groups"])), state_dict["state"]
    for first, (name, own_state, owned) in rules.items():
        taken = {i - first: _with_state(group, state) for i, group in groups if i in owned}
        file = io.BytesIO()
        torch.save((name, {**own_state, **({HIDDEN: taken} if taken else {})}), file)
        groups[first][1][PACKED] = file.getvalue()
    kept = [group for i, group in groups if i not in hidden]
    number = {p: i for i, p in enumerate(p for group in kept for p in group["params"])}
    return {
        **state_dict,
        "state": {new: state.get(p, {}) for p, new in number.items()},
        "param_groups": [{**group, "params": [number[p] for p in group["params"]]} for group in kept],
    }


def _with_state(group: dict[str, Any], state: dict[Any, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The options of a group, and the state of each of its parameters."""
    options = {key: value for key, value in group.items() if key not in ("params", PACKED)}
    return options, [state.get(p, {}) for p in group["params"]]


def read_checkpoint(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Torch's state dict and a rule's own state, from either kind of checkpoint."""
    groups = [{**group, PACKED: None} for group in state_dict["param_groups"]]
    params = {p for group in groups for p in group["params"]}
    own_state = {} if RULE in params else dict(state_dict["state"].get(RULE, {}))
    state = {p: s for p, s in state_dict["state"].items() if p in params and s}
    packed = next((g[PACKED] for g in state_dict["param_groups"] if g.get(PACKED) is not None), None)
    if packed is not None:
        rule, own_state = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        state_dict = {**state_dict, NAME: rule}
    for i, (options, states) in sorted(own_state.pop(HIDDEN, {}).items()):
        keys = [(HIDDEN, i, j) for j in range(len(states))]
        groups.insert(i, {**options, "params": keys, PACKED: None})
        state |= {key: s for key, s in zip(keys, states, strict=True) if s}
    return {**state_dict, "state": state, "param_groups": groups}, own_state


def parts_of_checkpoint(state_dict: dict[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Split the state dict of several optimizers; ``sizes``: the number of groups of each."""
    groups = iter(state_dict["param_groups"])
    parts = [list(islice(groups, size)) for size in sizes]
    parts[-1] += groups  # any surplus, which the optimizer refuses
    state = state_dict["state"]
    return [
        {"state": {p: state[p] for g in part for p in g["params"] if state.get(p)}, "param_groups": part}
        for part in parts
    ]


def params_in(optimizer: Optimizer) -> list[torch.Tensor]:
    """The parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def in_distributed_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint's `get_optimizer_state_dict` or `set_optimizer_state_dict` is running."""
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    return module is not None and any(frame.f_globals is vars(module) for frame in _callers())


class ModelGroups(ABC):
    """An optimizer that shows torch.distributed.checkpoint the groups of the model's parameters alone.

    It looks every parameter up in the model, and finds no modules of a rule's own there.
    """

    @abstractmethod
    def _owned_groups(self) -> list[int]:
        """The numbers of the groups of modules of a rule's own."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, as in torch."""
        if "param_groups" not in vars(self):  # a wrapper's, as Lightning makes them, which then asks what it wraps
            raise AttributeError("param_groups")
        groups: list[dict[str, Any]] = vars(self)["param_groups"]
        module = sys.modules.get("torch.distributed.checkpoint.state_dict")
        if module is None or sys._getframe(1).f_globals is not vars(module):
            return groups
        hidden = self._owned_groups()
        return [group for i, group in enumerate(groups) if i not in hidden]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        vars(self)["param_groups"] = groups


def _callers() -> Iterator[FrameType]:
    """The frames on the call stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
