"""`LearningRule`: the contract that every rule shares with its users, and `Probe`: one closure, evaluated safely.

A learning rule decides what each synapse is told; PyTorch does everything else. A step is two halves, both public::

    loss = rule.estimate(closure)    # evaluate the closure, write p.grad = -Δw
    rule.descend()                   # any torch.optim class takes it from there
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from .errors import Diverged
from .integrations import (
    NAME,
    PACKED,
    for_checkpoint,
    needs_estimate,
    read_checkpoint,
    recipe,
    refuse_scaler,
    refuse_trainer_options,
)
from .recorder import COMPILED, IN_DDP, IN_PYTHON, Exclusion, Recorder, Synapse, is_known

__all__ = ["Closure", "LearningRule", "Params", "Probe"]

Closure: TypeAlias = Callable[[], Any]
Params: TypeAlias = (
    nn.Module
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Iterable[nn.Module]
    | Iterable[tuple[str, nn.Module]]
    | Iterable[dict[str, Any]]
)
ProcessGroup: TypeAlias = dist.ProcessGroup | None
#: the loss to return, what to write into each ``.grad``, and the rule's own state after the step
Estimate: TypeAlias = tuple[Tensor, dict[Tensor, Tensor], dict[str, Any]]
_T = TypeVar("_T")
Constraint: TypeAlias = tuple[Callable[[Any], bool], str]

SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "params", "param_names")
UNFROZEN = "it was frozen when the optimizer was built: optimizer.add_param_group({'params': layer})"

NON_NEGATIVE: Constraint = (lambda v: math.isfinite(v) and v >= 0, "a finite number >= 0")
POSITIVE: Constraint = (lambda v: math.isfinite(v) and v > 0, "a finite number > 0")
POSITIVE_INT: Constraint = (lambda v: isinstance(v, int) and v >= 1, "an integer >= 1")
SEED: Constraint = (lambda v: isinstance(v, int) and v >= 0, "an integer >= 0")


def require_in_range(owner: str, name: str, value: Any, constraint: Constraint) -> None:
    """Raise where an option of a rule or a module is out of its range, with its name and value."""
    holds, range_ = constraint
    try:
        ok = not isinstance(value, bool) and holds(value)
    except (TypeError, ValueError):
        ok = False
    if not ok:
        raise ValueError(f"{owner}: {name}={value!r} must be {range_}")


def named_modules_of(params: Any) -> list[tuple[str, nn.Module]]:
    """The modules among ``params`` with a prefix for the names inside; empty where there are bare parameters."""
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
    """What ``torch.optim`` wants: ``(name, parameter)`` where modules or names were given, else bare parameters."""
    modules = named_modules_of(params)
    if not modules:
        return [params] if isinstance(params, Tensor) else list(params)
    left_out = excluded.params if excluded is not None else set()
    named = [named for prefix, module in modules for named in module.named_parameters(prefix)]
    return unique([(name, p) for name, p in named if p not in left_out])


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


class LearningRule(Optimizer, ABC):
    r"""A `torch.optim.Optimizer` that writes ``p.grad = -Δw`` by a learning rule, and descends by another optimizer.

    Not to be instantiated; a rule implements `_select` (what it trains) and `_estimate` (what it tells it).

    Args:
        params: a module, its parameters, named parameters, or groups of any of them. Rules that watch synapses
            need modules; the others take parameters as `torch.optim` does.
        defaults: the rule's own hyperparameters, ``lr`` among them. Each may differ between groups.
        descent: the optimizer class that makes a step out of ``.grad``. It shares ``param_groups`` and ``state``
            with the rule, so that its momentum, weight decay, schedulers and checkpoints are PyTorch's own.
        descent_options: keywords of ``descent``.
        process_group: ``None`` for no communication; otherwise the ranks that take a step together.
        exclude: what to leave alone: module types, modules, or names of modules or parameters. `coverage` lists them.

    Raises:
        ValueError: a hyperparameter out of its range, named with its value; an excluded name that is not there; a
            complex parameter.
    """

    #: range of each hyperparameter, checked for every param group
    constraints: ClassVar[dict[str, Constraint]] = {}
    #: with a process group: whether each rank has a share of the batch, or all have all of it
    splits_batch: ClassVar[bool] = False

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        descent: type[Optimizer],
        descent_options: dict[str, Any],
        process_group: ProcessGroup,
        exclude: Iterable[Any] | Exclusion = (),
    ) -> None:
        groups = groups_of(params)
        self.process_group = process_group
        self._recorder = Recorder()
        self._modules: list[tuple[str, nn.Module]] = []
        self._homes: dict[Tensor, tuple[nn.Module, str, str]] = {}  # of each parameter its layer, and its names
        if not isinstance(exclude, Exclusion):
            given = [pair for group in groups for pair in named_modules_of(group["params"])]
            exclude = Exclusion.of(type(self).__name__, exclude, given)
        self._exclusion = exclude
        self._once_frozen: list[tuple[str, nn.Module]] = []  # layers that were frozen when they were given
        self._silent: dict[Synapse, str] = {}  # layers that learn nothing, and why
        self._unfrozen: set[nn.Module] = set()  # of the once frozen, those warned of
        self._checked: tuple[Any, ...] = ()
        self._absent: set[Synapse] = set()  # that did not fire in the last step, and were looked at
        self._told: set[Synapse] = set()  # that have been warned of
        self._known = Known()
        self._undo: list[Callable[[], None]] = []
        self._estimated = False  # by `estimate` itself: `step` may go on from there
        #: State that is no parameter's own. Replaced, never changed, so that an earlier state_dict keeps its own.
        self._own_state: dict[str, Any] = {}
        self.forward_passes = 0  # that the last estimate took, checks included
        self._check(defaults)
        if inspect.signature(descent.step).parameters["closure"].default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(self).__name__}(descent={descent.__name__}): {descent.__name__} evaluates the closure itself; "
                "choose one that makes its step from .grad alone, such as torch.optim.SGD or torch.optim.Adam"
            )
        try:
            # Its defaults, and a check of its options; a matrix, because some optimizers take nothing else.
            options = {"lr": defaults["lr"], **descent_options}
            own_defaults = descent([torch.zeros(1, 1)], **options).defaults
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}(descent={descent.__name__}): {error}") from None
        super().__init__(groups, {**own_defaults, **defaults, PACKED: None})
        self._descent = descent([{"params": group["params"]} for group in self.param_groups], **options)
        self.state.update(self._descent.state)  # some optimizers make theirs at once

    # -- what a rule implements ---------------------------------------------------------------------------------

    @abstractmethod
    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        """The parameters of a group (torch's bare or named form) and the synapses to watch for them."""

    @abstractmethod
    def _estimate(self, probe: Probe) -> Estimate:
        """Evaluate the closure as often as needed, from the start each time it is called."""

    def _collect(self) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """What to write into each ``.grad``, and the rule's own state after the step: the classic loop."""
        raise RuntimeError(
            f"{type(self).__name__} evaluates the loss several times a step, so step() needs a closure: "
            "optimizer.step(closure), where closure() runs the model and returns the loss." + recipe() + " "
            "(torch.amp.GradScaler, which float16 mixed precision brings along, hands on none: use bfloat16 without it)"
        )

    # -- the contract -------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:
        """One step of learning: `estimate`, then `descend`.

        Args:
            closure: runs the model and returns the loss, best each sample's own; without one, the step descends along
                what `estimate` has just written, or uses all forward passes since the last step (rules that need only
                one).

        Returns:
            What the closure returned, detached; ``None`` without a closure.

        Rules of one pass that keep no running value can be captured in a CUDA graph: the forward pass and ``step()``
        together, after a few plain steps. Replays then do without Python, which is most of a small batch's time on a
        GPU; they find options as they were, and check for nothing that is not finite.

        Raises:
            Diverged: a loss or an update that is infinite or not a number.
            RuntimeError: no forward pass, a rule that needs a closure and got none. Parameters and optimizer state
                are then as they were, as after `Diverged`.
        """
        loss = self.estimate(closure) if needs_estimate(self, closure, [self]) else None
        self.descend()
        return loss

    @torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
    def estimate(self, closure: Closure | None = None) -> Any:
        """The first half of `step`: write ``p.grad = -Δw`` for every parameter of the rule, and change nothing else.

        Where a training loop calls ``step()`` itself, write ``rule.estimate(closure)`` in place of the backward pass.
        """
        return settled(self._undo, lambda: self._estimate_once(closure))

    def _estimate_once(self, closure: Closure | None) -> Any:
        loss: Any = None
        self._estimated = False
        self._undo += [self._recorder.restoring(), restoring_grad_mode()]
        self._require_same_parameters()
        if closure is None:
            grads, own_state = self._collect()
        else:
            probe = Probe(closure, self._trained(), self._known, self._undo)
            with torch.no_grad():
                loss, grads, own_state = probe.run(type(self).__name__, self._estimate)
            loss = loss if probe.returns_tensor else loss.item()
        if own_state and is_captured(self._trained()):
            raise RuntimeError(
                f"{type(self).__name__} has a memory, which every replay of a CUDA graph would find as it was when "
                "the graph was captured: take plain steps"
            )
        require_finite(self, "an update", list(grads.values()))
        self.forward_passes = 0 if closure is None else probe.made
        self._look_for_silent()
        for p in self._trained():
            p.grad = grads.get(p)
        self._own_state = own_state
        self._estimated = True
        return loss

    def discard(self) -> None:
        """Drop what has been gathered since the last step: the next step will not learn from it."""
        self._recorder.discard()

    @torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def descend(self) -> None:
        """The second half of `step`: ``descent``'s own step along ``.grad``."""
        self._opt_called = True  # or schedulers, which look for `step`, would warn that none was made
        self._estimated = False
        # Linked anew each time: load_state_dict replaces both. Unhooked: hooks on all optimizers must fire once.
        self._descent.param_groups, self._descent.state = self.param_groups, self.state
        unhooked_step(self._descent)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, whose ``"params"`` may be a module. Its options are checked first."""
        group = dict(param_group)
        self._check({**self.defaults, **group})
        modules = named_modules_of(group["params"])
        for layer in (layer for _, module in modules for layer in module.modules()):
            if isinstance(layer, tuple(self._exclusion.kinds)):
                self._exclusion.add(layer)
        group["params"], synapses = self._select(group)
        self._require_real(group["params"])
        super().add_param_group(group)
        for synapse in synapses:
            synapse.group = len(self.param_groups) - 1
            self._recorder.watch(synapse)
        known = self._inside()
        self._modules += [(prefix, module) for prefix, module in modules if module not in known]
        self._known.roots.update({module: None for _, module in modules})
        mine = set(self.param_groups[-1]["params"])
        for prefix, module in modules:
            for name, layer in module.named_modules(prefix=prefix):
                for attribute, p in layer._parameters.items():
                    if p in mine:
                        self._homes.setdefault(p, (layer, attribute, ".".join(filter(None, (name, attribute)))))
                if synapses and is_known(layer) and not layer.weight.requires_grad:
                    self._once_frozen.append((name, layer))

    def state_dict(self) -> dict[str, Any]:
        """As of torch, with the rule's name; what is no parameter's own is under ``"rule"`` in its ``"state"``."""
        return for_checkpoint(super().state_dict(), type(self).__name__, self._own_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: the state of another rule, or of groups of other sizes. Nothing is changed then.
        """
        state_dict, own_state = read_checkpoint(state_dict)
        self._require_own(state_dict)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != NAME})
        self._own_state = own_state

    def coverage(self, model: nn.Module | None = None) -> dict[str, str]:
        """Which rule trains each parameter: its name -> the rule's name, or why it is not trained.

        That is ``"frozen"``, ``"excluded"``, or, from the first step on, ``"silent: ..."`` with the reason why the
        layer, which the rule would train, does not learn.

        Args:
            model: whose names to use and whose parameters to list; by default those that the rule was given.
        """
        labels: dict[Tensor, str] = {}
        for group in self.param_groups:
            label = type(self).__name__ + (f" readout ({group['readout']})" if group.get("readout") else "")
            labels |= {p: label if p.requires_grad else "frozen" for p in group["params"]}
        for synapse, reason in self._silent.items():
            labels |= dict.fromkeys(synapse.parameters(), f"silent: {reason}")
        for _, layer in self._once_frozen:
            if layer not in self._recorder.synapses:
                labels |= {p: f"silent: {UNFROZEN}" for p in layer.parameters(False) if p.requires_grad}
        labels |= dict.fromkeys(self._exclusion.params, "excluded")
        names = self._names() if model is None else {p: name for name, p in model.named_parameters()}
        return {name: labels.get(p, "frozen") for p, name in names.items()}

    def close(self) -> None:
        """Remove every hook from the model. Also happens when the optimizer is garbage-collected."""
        self._recorder.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it may watch a model. Copy the model, build a new "
            "optimizer for the copy, and load_state_dict(optimizer.state_dict())"
        )

    # -- for rules ----------------------------------------------------------------------------------------------

    def _names(self) -> dict[Tensor, str]:
        """The name of each parameter that the rule was given, or that lies in a module which it was given."""
        names: dict[Tensor, str] = {}
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                names[p] = group["param_names"][j] if "param_names" in group else f"group{i}.params[{j}]"
        many = len({id(m) for _, m in self._modules}) > 1
        for i, (prefix, module) in enumerate(self._modules):
            inside = module.named_parameters(f"group{i}" if many and not prefix else prefix)
            names |= {p: name for name, p in inside}
        return names

    def _trained(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check(self, options: dict[str, Any]) -> None:
        for name, constraint in {"lr": NON_NEGATIVE, **self.constraints}.items():
            self._check_value(name, options[name], constraint)

    def _check_value(self, name: str, value: Any, constraint: Constraint) -> None:
        require_in_range(type(self).__name__, name, value, constraint)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by `torch.amp.GradScaler`, before it looks for gradients."""
        return refuse_scaler(self)

    def _require_real(self, params: Iterable[Any]) -> None:
        """Raise for complex parameters: a rule would see their real part alone."""
        for i, entry in enumerate(params):
            name, p = entry if isinstance(entry, tuple) else (f"params[{i}]", entry)
            if isinstance(p, Tensor) and p.is_complex():
                raise ValueError(
                    f"{type(self).__name__}: parameter '{name}' is complex ({p.dtype}), and rules learn real weights: "
                    f"keep its real and imaginary parts as parameters (torch.view_as_real), or exclude=['{name}']"
                )

    def _require_same_parameters(self) -> None:
        """Raise where a parameter is no longer the one that its layer had when the optimizer was built."""
        for p, (layer, attribute, name) in self._homes.items():
            if layer._parameters.get(attribute) is p:
                continue
            if layer not in self._recorder.synapses and any(q is p for q in layer.parameters()):
                continue  # pruned or parametrized: what is learned is still the parameter beneath
            how, way_out = (
                "replaced",
                "Build the optimizer after the model has its parameters (to_empty gives new ones)",
            )
            if f"{attribute}_orig" in layer._parameters or hasattr(layer, "parametrizations"):
                how = "pruned, parametrized or normalised"
                way_out = f"Undo that, or build the optimizer after it with exclude=['{name.rpartition('.')[0]}']"
            raise RuntimeError(
                f"{type(self).__name__}: parameter '{name}' was {how} after the optimizer was built, so that the layer "
                f"no longer uses the one that is trained. {way_out}"
            )

    def _inside(self) -> set[nn.Module]:
        """All modules that are now in those that were given."""
        return {inner for _, module in self._modules for inner in module.modules()}

    def _claimed(self) -> Iterable[Synapse]:
        """The synapses that learn only if they fire."""
        return self._recorder.synapses.values()

    def _none_fired(self) -> str:
        """Why no layer has fired, as far as can be seen, and what to do."""
        synapses = list(self._claimed())
        inside = self._inside()
        if synapses and not any(s.layer in inside for s in synapses):
            why = "its layers were replaced in the model after the optimizer was built: build the optimizer anew"
        elif synapses and not any(s.weight.requires_grad for s in synapses):
            why = "its layers were frozen after the optimizer was built (adapters do that): build the optimizer anew"
        else:
            why = f"run the model in training mode (model.train()) before step(), or in the closure; {COMPILED}"
        return f"{type(self).__name__}: no synapse has fired since the last step; {why}"

    def _look_for_silent(self) -> None:
        """Once, and again whenever a layer was frozen, unfrozen or switched: warn of those that learn nothing."""
        fired, synapses = self._recorder.fired, list(self._claimed())
        for synapse in [s for s in self._silent if s in fired]:
            del self._silent[synapse]
        absent = [s for s in synapses if s not in fired and s not in self._silent and s not in self._absent]
        self._absent = {s for s in (*self._absent, *absent) if s not in fired}
        now = (
            *((s.weight.requires_grad, s.layer.training) for s in synapses),
            *(layer.weight.requires_grad for _, layer in self._once_frozen),
        )
        if now == self._checked and not absent:
            return
        only_replaced, self._checked = now == self._checked, now
        inside = self._inside()
        told: list[str] = []
        for s in synapses:
            if s in fired or s in self._silent or not s.weight.requires_grad:
                continue
            if only_replaced and s.layer in inside:  # it may well fire at another step
                continue
            if s.layer not in inside:
                reason = "it was replaced in the model after the optimizer was built: build the optimizer anew"
            elif not s.layer.training:
                reason = "it is in evaluation mode: call train()"
            else:
                reason = "it did not run, or something else used its weight without calling it"
            self._silent[s] = reason
            if s.layer.training and s in self._told:
                continue
            self._told.add(s)
            told.append(f"'{s.name}' ({reason})")
        for name, layer in self._once_frozen:
            unfrozen = layer.weight.requires_grad and layer not in self._recorder.synapses and layer in inside
            if unfrozen and layer not in self._unfrozen:
                self._unfrozen.add(layer)
                told.append(f"'{name}' ({UNFROZEN})")
        if told:
            warnings.warn(
                f"{type(self).__name__}: did not fire and learn nothing: {', '.join(told)}. exclude=[...] leaves "
                "layers out without this warning",
                stacklevel=_outside(),
            )

    def _require_own(self, state_dict: dict[str, Any]) -> None:
        own, theirs = type(self).__name__, state_dict.get(NAME)
        if theirs is not None and theirs != own:
            raise ValueError(f"{own}: the state is that of {theirs}; load it into {theirs}, or start {own} anew")
        if theirs is not None:
            return
        for group in state_dict.get("param_groups", []):  # of an older version, or of another optimizer
            known = {*self.defaults, *SCHEDULERS}.union(*self.param_groups)
            if wrong := sorted({*self.defaults} - {*group} or {*group} - known):
                raise ValueError(
                    f"{own}: the state names no rule, and its options are not those of {own} (look at "
                    f"{', '.join(wrong)}): it is that of another optimizer"
                )

    @property
    def _ranks(self) -> tuple[int, int]:
        """Rank of the process and the number of ranks that step together."""
        if self.process_group is None:
            return 0, 1
        return dist.get_rank(self.process_group), dist.get_world_size(self.process_group)

    def _sum_over_ranks(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in one message."""
        if self.process_group is None:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat, group=self.process_group)
        for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def settled(undo: list[Callable[[], None]], work: Callable[[], _T]) -> _T:
    """Do some work, and undo what it has put on the list, last first, whatever happens; interrupts wait for that.

    An interrupt (Ctrl-C) can come between any two steps, in the middle of undoing as well; an entry may be called
    again after it was called in part or in whole.
    """
    try:
        return work()
    finally:
        interrupt: BaseException | None = None
        failure: Exception | None = None
        while undo:
            try:
                undo[-1]()
                undo.pop()
            except (KeyboardInterrupt, SystemExit) as error:
                interrupt = error
            except Exception as error:
                failure = failure or error
                undo.pop()
        if interrupt is not None or failure is not None:
            raise interrupt or failure  # type: ignore[misc]


def restoring_grad_mode() -> Callable[[], None]:
    """What puts grad mode back as it is now: an interrupted ``with torch.no_grad()`` may not."""
    return partial(torch._C._set_grad_enabled, torch.is_grad_enabled())


class Known:
    """What an optimizer has found out about its closure."""

    def __init__(self) -> None:
        self.roots: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()  #: modules that were given
        self.modules: WeakKeyDictionary[nn.Module, _Buffers | None] = WeakKeyDictionary()  #: others that it may run
        self.code: Any = None  #: what was evaluated when they were looked for
        self.needs_grad = False  #: it calls ``backward()`` in any case
        self.autocast: torch.dtype | None = None  #: in which it runs layers, if in another than theirs

    def all(self) -> list[nn.Module]:
        """All modules that it may run."""
        return list(dict.fromkeys([*(m for root in self.roots for m in root.modules()), *self.modules]))

    def buffers(self, module: nn.Module) -> _Buffers:
        """The buffers of a module; what has not changed since the last time is not copied again."""
        buffers = _Buffers(module, self.modules.get(module))
        if buffers.held():
            self.modules[module] = buffers
        return buffers


def code_of(closure: Any) -> tuple[Any, ...]:
    """What tells closures apart that may run other modules: their code, and modules that they hold."""
    if isinstance(closure, partial):
        held = [*closure.args, *closure.keywords.values()]
        return *code_of(closure.func), *(id(value) for value in held if isinstance(value, nn.Module))
    cells = [cell.cell_contents for cell in getattr(closure, "__closure__", None) or () if _filled(cell)]
    held = [getattr(closure, "__self__", None), *cells, *(getattr(closure, "__defaults__", None) or ())]
    modules = [id(value) for value in held if isinstance(value, nn.Module)]
    return getattr(closure, "__code__", type(closure)), *modules


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


class _NoGraph(Exception):
    """A closure called ``backward()`` where it was evaluated without a graph."""


class Probe:
    """One closure, evaluated several times under the same circumstances.

    Every evaluation starts from the same global random state (all see the same dropout masks), half-precision
    copies of weights are made anew, and the buffers of all modules in training mode (statistics of batch norm, vectors
    of spectral norm, counters) end as the first evaluation leaves them.

    Args:
        closure: runs the model and returns the loss.
        params: the parameters it depends on, for their devices.
        known: what is known about the closure; what is found is added. Modules are looked for while a new closure is
            evaluated for the first time: bare parameters do not show them, a compiled model only while it is compiled.
        undo: takes what must be undone in the end (`settled`).

    Attributes:
        made: all evaluations, those before a restart included.
    """

    def __init__(
        self, closure: Closure, params: Iterable[Tensor], known: Known, undo: list[Callable[[], None]]
    ) -> None:
        self.returns_tensor = True
        self._closure = closure
        self._known = known
        self._undo = undo
        self._params = list(params)
        self._devices = sorted({p.device for p in self._params if p.device.type != "cpu"}, key=str)
        self._random: list[Tensor] = []
        self._count = 0
        self.made = 0
        self._before: dict[nn.Module, _Buffers] = {}
        self._after: dict[nn.Module, _Buffers] = {}
        self._attributes: dict[nn.Module, dict[str, Any]] = {}
        undo.append(self.close)

    @property
    def always_grad(self) -> bool:
        """Whether the closure is known to call ``backward()`` in any case."""
        return self._known.needs_grad

    def __call__(self, *, grad: bool = False, copies: int = 1) -> Tensor:
        """Evaluate once; with ``grad`` the value keeps its graph, otherwise none is built if the closure allows.

        ``copies``: how many evaluations this one stands for, inside `torch.func.vmap`.
        """
        value = self._evaluate(grad, copies)
        return value if grad else value.detach()

    def along_tangents(self) -> tuple[Tensor, Tensor | None]:
        """Evaluate once: the value, and its derivative along the tangents of the forward-mode level that is open."""
        value, tangent = forward_ad.unpack_dual(self._evaluate(False))
        return value.detach(), None if tangent is None else tangent.detach()

    @property
    def count(self) -> int:
        """How often the closure has been evaluated since the start."""
        return self._count

    def restart(self) -> None:
        """Begin again, as if nothing had been evaluated."""
        _restore(self._before)
        self._count = 0
        self._after = {}

    def _evaluate(self, grad: bool, copies: int = 1) -> Tensor:
        self._restart_random()
        if self._count == 0:
            self._before = {m: self._known.buffers(m) for m in self._known.all()}
        else:
            if not self._after:
                self._after = {m: _Buffers(m) for m in self._before}
            # In training mode batch norm does not look at its statistics.
            _restore({m: b for m, b in self._before.items() if not (m.training and isinstance(m, _NormBase))})
        torch.clear_autocast_cache()  # or all evaluations would share one half-precision copy of the weights
        code, watch = code_of(self._closure), None
        if self._count == 0 and self._known.code != code:
            watch = nn.modules.module.register_module_forward_pre_hook(self._looking())
            self._undo.append(watch.remove)
        try:
            with torch.set_grad_enabled(grad or self.always_grad):
                value = self._closure()
            self._known.code = code
        except RuntimeError as error:
            if grad or self.always_grad or "does not require grad" not in str(error):
                raise
            raise _NoGraph from error
        finally:
            if watch is not None:
                watch.remove()
                self._undo.remove(watch.remove)
        self._count += copies
        self.made += copies
        if value is None:
            raise RuntimeError("the closure returned None; it must return the loss")
        self.returns_tensor = isinstance(value, Tensor)
        if isinstance(value, Tensor):
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"the closure returned a {type(value).__name__}; it must return the loss") from None
        return torch.tensor(number, dtype=torch.float64, device=self._devices[0] if self._devices else "cpu")

    def run(self, rule: str, estimate: Callable[[Probe], _T]) -> _T:
        """Let a rule evaluate; once more with a graph, where an ordinary closure turns out to need one."""
        if not callable(self._closure):
            raise TypeError(
                f"{rule}: step() takes a closure, a function that runs the model and returns the loss, not a "
                f"{torch.typename(self._closure)}; a rule of one forward pass also takes step() after loss.backward()"
            )
        refuse_trainer_options(rule, self._closure)
        try:
            return estimate(self)
        except _NoGraph:
            self.restart()
        self._known.needs_grad = True
        try:
            result = estimate(self)
        except BaseException:
            self._known.needs_grad = False
            raise
        warnings.warn(
            f"{rule} needs no backward pass, but the closure calls backward(). To save it, write: "
            f"if loss.requires_grad: loss.backward().{recipe()}",
            stacklevel=_outside(),
        )
        return result

    def close(self) -> None:
        """Leave buffers as one evaluation does."""
        _restore(self._after)

    def agree(self, group: ProcessGroup) -> None:
        """Take the buffers of the first rank, which made the first evaluation."""
        if group is None:
            return
        self._after = self._after or {m: _Buffers(m) for m in self._before}
        for buffers in self._after.values():
            for _, value in buffers.held():
                dist.broadcast(value, group=group, group_src=0)

    def moved(self) -> list[str]:
        """Attributes of modules, no buffers, that hold other tensors than when a new closure was first evaluated."""
        found = []
        for module, before in self._attributes.items():
            now = _tensors(module)
            found += [
                f"{type(module).__name__}.{name}" for name in now if name not in before or now[name] != before[name]
            ]
        return list(dict.fromkeys(found))

    def _restart_random(self) -> None:
        if not self._random:
            self._random = [torch.get_rng_state()]
            self._random += [torch.get_device_module(d).get_rng_state(d) for d in self._devices]
        else:
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._devices, self._random[1:], strict=True):
                torch.get_device_module(device).set_rng_state(state, device)

    def _looking(self) -> Callable[[nn.Module, Any], None]:
        """A hook on all modules, which looks at what runs on this thread alone."""
        thread, trained = threading.get_ident(), set(self._params)

        def look(module: nn.Module, args: Any) -> None:
            if threading.get_ident() != thread:
                return
            if isinstance(module, nn.parallel.DistributedDataParallel):
                raise RuntimeError(IN_DDP)
            self._known.modules.setdefault(module, None)
            own = next((p for p in module.parameters(False) if p in trained), None)
            if own is not None:
                if in_dual_level() and not torch._C._is_fwd_grad_enabled():
                    raise RuntimeError(NO_TANGENT)
                if torch.is_autocast_enabled(own.device.type):
                    self._known.autocast = torch.get_autocast_dtype(own.device.type)
            self._attributes.setdefault(module, _tensors(module))
            if module not in self._before:
                self._before[module] = _Buffers(module)

        return torch.compiler.disable(look, reason=IN_PYTHON)  # type: ignore[no-any-return]


NO_TANGENT = "a layer runs where forward AD is switched off, as in checkpoint(..., use_reentrant=True)"


def in_dual_level() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def _tensors(module: nn.Module) -> dict[str, tuple[int, int | None]]:
    """The tensors that a module keeps as plain attributes, by identity and version."""
    return {name: (id(v), _version(v)) for name, v in vars(module).items() if isinstance(v, Tensor)}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class _Buffers:
    """The buffers of a module as they are now.

    Args:
        module: whose.
        known: as they were before: values that are still the same are not copied.
    """

    def __init__(self, module: nn.Module, known: _Buffers | None = None) -> None:
        # The kernels of batch norm change its statistics without a new version.
        self._silent = isinstance(module, _NormBase)
        self._saved: dict[str, tuple[Tensor, int | None, Tensor] | None] = {}
        for name, buffer in module._buffers.items():
            old = known._saved.get(name) if known is not None and not self._silent else None
            if buffer is None:
                self._saved[name] = None
            elif old is not None and old[0] is buffer and old[1] == _version(buffer):
                self._saved[name] = old
            else:
                self._saved[name] = buffer, _version(buffer), buffer.clone()

    def held(self) -> list[tuple[Tensor, Tensor]]:
        """Each buffer, and its value then."""
        return [(saved[0], saved[2]) for saved in self._saved.values() if saved is not None]

    def restore(self, module: nn.Module) -> None:
        """Put the values back, in the tensors that held them."""
        for saved in self._saved.values():
            if saved is not None and (self._silent or _version(saved[0]) != saved[1]):
                saved[0].copy_(saved[2])
        for name in module._buffers.keys() - self._saved.keys():
            del module._buffers[name]
        for name, saved in self._saved.items():
            module._buffers[name] = None if saved is None else saved[0]


def unhooked_step(optimizer: Optimizer) -> None:
    """The step of an optimizer inside another one, whose hooks have their own turn."""
    step = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)


def is_captured(tensors: list[Tensor]) -> bool:
    """Whether what is done with these tensors is only being recorded, for a CUDA graph."""
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


def require_finite(optimizer: Optimizer, what: str, tensors: list[Tensor]) -> None:
    """Raise `Diverged` if anything is infinite or not a number, before anything is changed."""
    if is_captured(tensors):  # where no number can be read
        return
    if not tensors or math.isfinite(total := torch.nn.utils.get_total_norm(tensors).item()):
        return
    found = "nan" if math.isnan(total) else "infinite"
    name, norm, lr = _largest(optimizer)
    raise Diverged(
        f"{type(optimizer).__name__}: {what} is {found}; nothing was changed. The largest weights are '{name}', of "
        f"norm {norm:.3g} with lr={lr:g}: try lr={lr / 10:g} if that has diverged; else check the data",
        name,
        norm,
        lr,
    )


def _largest(optimizer: Optimizer) -> tuple[str, float, float]:
    """Where divergence is to be sought: the parameter of the largest (or no finite) norm, its norm and its rate."""
    found = []
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", [f"group{i}.params[{j}]" for j in range(len(group["params"]))])
        norms = (p.detach().norm().item() for p in group["params"])
        found += [(name, norm, float(group["lr"])) for name, norm in zip(names, norms, strict=True)]
    return max(found, key=lambda entry: (not math.isfinite(entry[1]), entry[1]))


def backward_where_missing(losses: Tensor, params: list[Tensor], anchors: Sequence[Tensor] = ()) -> None:
    """Send the mean loss backward, if the closure has not done so itself, to these parameters and to the cuts above.

    ``anchors``: of the recorders whose synapses shall notice.
    """
    if losses.requires_grad and all(p.grad is None for p in params):
        # No graph leads there when the closure's own backward freed it; then a gradient has arrived.
        with torch.enable_grad():
            torch.autograd.backward(losses.mean(), inputs=[*(p for p in params if p.requires_grad), *anchors])


def in_full(values: Tensor) -> Tensor:
    """At least in single precision: half is too coarse for sums over many neurons, and too narrow for squares."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def mean_over_samples(losses: Tensor) -> Tensor:
    """The loss of each sample: the mean over all dimensions but the first."""
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def mean_loss(losses: Tensor) -> Tensor:
    """The mean loss of each evaluation (first dimension), summed in double precision."""
    return losses.double().flatten(1).mean(1) if losses.ndim > 1 else losses.double()


def no_plastic_layer(rule: str) -> str:
    """The message for a model that a rule cannot train."""
    return (
        f"{rule}: the model has no plastic layer: no Linear, Conv1d, Conv2d or Conv3d (or a type given to "
        "bioopt.register_synapse) whose weight has requires_grad=True. Lazy layers are such after a first forward pass"
    )


def _restore(saved: dict[nn.Module, _Buffers]) -> None:
    with torch.no_grad():
        for module, buffers in saved.items():
            buffers.restore(module)


def _outside() -> int:
    """The stack level of the caller of `step`, for warnings."""
    for level, frame in enumerate(inspect.stack()[1:], start=1):
        name = frame.frame.f_globals.get("__name__", "")
        if not name.startswith(("bioopt", "torch", "contextlib")):
            return level
    return 2
