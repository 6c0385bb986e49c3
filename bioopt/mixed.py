"""`Mixed`: several optimizers for the parts of one network, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .core._torch_private import mark_as_stepped, unhooked_step
from .core.errors import require_finite
from .core.hooks import IN_PYTHON
from .core.integrations import (
    ModelGroups,
    for_distributed_checkpoint,
    in_distributed_checkpoint,
    needs_estimate,
    params_in,
    parts_of_checkpoint,
    read_checkpoint,
    refuse_own_closure,
    refuse_scaler,
)
from .core.probe import Closure, Known, Probe, restoring_grad_mode, settled
from .core.rule import LearningRule

__all__ = ["Mixed"]


class Mixed(ModelGroups, Optimizer):
    """Several optimizers, each for its own part of a network, as one.

    A step first lets every member estimate, then all descend at once. Members that need one ordinary forward pass
    (`torch.optim` optimizers, `Hebbian`, `Oja`) share it; each of the others evaluates the closure for itself, in the
    order given, with the hooks of all others paused. All evaluations use the same dropout masks, and batch statistics
    advance once. ``param_groups`` are those of the members, one after the other. Step hooks belong on `Mixed`: those of
    its members are not called.

    Args:
        optimizers: bioopt rules and `torch.optim` optimizers, without common parameters. A rule for a part without the
            last layer needs ``readout=None``.

    Raises:
        TypeError: a member that is no Optimizer, or evaluates the closure itself, as LBFGS does.
        ValueError: no members, or a parameter in two of them.
        RuntimeError: in the first step, a part that learns by gradients is below the synapses of a rule that lets no
            gradient pass, so that it could never learn.

    Example::

        optimizer = bioopt.Mixed(
            bioopt.Hebbian(model.trunk, lr=0.05, readout=None),
            torch.optim.Adam(model.head.parameters(), lr=1e-3),
        )
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise ValueError("Mixed needs at least one optimizer")
        for i, optimizer in enumerate(optimizers):
            name = f"{type(optimizer).__name__} ({i})"
            if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Mixed):
                raise TypeError(f"Mixed: member {name} is not a bioopt rule or a torch.optim optimizer")
            if not isinstance(optimizer, LearningRule):
                refuse_own_closure(f"Mixed: member {name}", type(optimizer))
        self.optimizers = optimizers
        params = self._require_disjoint()
        self._known = Known()
        self._undo: list[Callable[[], None]] = []
        self._estimated = False  # as of a rule
        self.forward_passes = 0  # as of a rule
        for rule in self._rules():
            self._known.roots.update(rule._known.roots)
            rule._undo = self._undo
            rule.shares_loss = len(optimizers) > 1
            rule._recorder.trace = rule.shares_pass  # until the first step
        # The defaults that all members have: schedulers look for `momentum` there.
        common = set.intersection(*(set(member.defaults) for member in optimizers))
        super().__init__([{"params": params}], {name: optimizers[0].defaults[name] for name in common})
        self._link()

    def _require_disjoint(self) -> list[Tensor]:
        """All parameters; raises if two members have one in common."""
        owners: dict[Tensor, str] = {}
        for i, member in enumerate(self.optimizers):
            name = f"{type(member).__name__} ({i})"
            for p in params_in(member):
                if p in owners:
                    raise ValueError(
                        f"Mixed: {owners[p]} and {name} train the same parameter of shape {tuple(p.shape)}"
                    )
                owners[p] = name
        return list(owners)

    def _link(self) -> None:
        """Take over the groups and state of the members, for schedulers and hooks."""
        self.param_groups = [group for member in self.optimizers for group in member.param_groups]
        self.state.clear()
        for member in self.optimizers:
            self.state.update(member.state)

    # -- the contract -------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:
        """One step of all members: `estimate`, then `descend`. As `LearningRule.step`."""
        loss = self.estimate(closure) if needs_estimate(self, closure, self._rules()) else None
        self.descend()
        return loss

    @torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
    def estimate(self, closure: Closure | None = None) -> Any:
        """Write ``p.grad = -Δw`` for every member's parameters, and change nothing else."""
        return settled(self._undo, lambda: self._estimate_once(closure))

    def _estimate_once(self, closure: Closure | None) -> Any:
        loss: Any = None
        self._estimated = False
        self._require_disjoint()  # a group may have been added to a member
        self._link()
        self._undo += [*(rule._recorder.restoring() for rule in self._rules()), restoring_grad_mode()]
        for rule in self._rules():
            rule._coverage.require_same_parameters()
        if closure is None:
            self._check_reached()
            grads: dict[Tensor, Tensor] = {}
            own_states: dict[LearningRule, dict[str, Any]] = {}
            for member in self.optimizers:
                if isinstance(member, LearningRule):
                    estimate, own_states[member] = member.collect()
                else:
                    estimate = _grads(member)
                grads |= estimate
        else:
            probe = Probe(closure, self._trained(), self._known, self._undo)
            with torch.no_grad():
                loss, grads, own_states = probe.run("Mixed", self._estimate)
            loss = loss if probe.returns_tensor else loss.item()
        total = require_finite(self, "an update", list(grads.values()))
        for rule in self._rules():
            rule.require_steady(grads, total)
        self.forward_passes = 0 if closure is None else probe.made
        for rule in self._rules():
            rule._coverage.look_for_silent()
            rule._own_state = own_states.get(rule, rule._own_state)
            rule._follow_inputs()
        for p in self._trained():
            p.grad = grads.get(p)
        self._estimated = True
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, for each member."""
        for member in self.optimizers:
            member.zero_grad(set_to_none)

    def discard(self) -> None:
        """`LearningRule.discard` of every rule."""
        for rule in self._rules():
            rule.discard()

    @torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def descend(self) -> None:
        """Let every member descend along its parameters' ``.grad``."""
        mark_as_stepped(self)
        self._estimated = False
        for member in self.optimizers:
            if isinstance(member, LearningRule):
                member.descend()
            else:
                mark_as_stepped(member)
                unhooked_step(member)
        self._link()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: add the group to a member, ``mixed.optimizers[i]``."""
        if self.param_groups:
            raise RuntimeError("Mixed: add the group to a member: mixed.optimizers[i].add_param_group(...)")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The members' own state dicts, in order, and their names."""
        if in_distributed_checkpoint():  # which expects one list of groups
            self._link()
            return for_distributed_checkpoint(
                super().state_dict(),
                {
                    i: (type(rule).__name__, rule._checkpoint_state(), [i + j for j in rule._owned_groups()])
                    for i, rule in self._rules_by_group().items()
                },
            )
        return {
            "optimizers": [member.state_dict() for member in self.optimizers],
            "names": [type(member).__name__ for member in self.optimizers],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`; nothing is changed if it does not fit."""
        if "param_groups" in state_dict:  # from torch.distributed.checkpoint
            owned = [len(m._owned_groups()) if isinstance(m, LearningRule) else 0 for m in self.optimizers]
            counts = [len(m.param_groups) - hidden for m, hidden in zip(self.optimizers, owned, strict=True)]
            state_dict = {"optimizers": parts_of_checkpoint(state_dict, counts)}
        theirs = state_dict.get("optimizers", [])
        sizes = [[len(g["params"]) for g in read_checkpoint(d)[0]["param_groups"]] for d in theirs]
        own_sizes = [[len(g["params"]) for g in m.param_groups] for m in self.optimizers]
        if sizes != own_sizes:
            raise ValueError(f"Mixed: the loaded state has parameters per group {sizes}, this optimizer {own_sizes}")
        own = [type(member).__name__ for member in self.optimizers]
        if state_dict.get("names", own) != own:
            raise ValueError(f"Mixed: the loaded state is that of {state_dict['names']}, this optimizer has {own}")
        for member, state in zip(self.optimizers, theirs, strict=True):
            if isinstance(member, LearningRule):
                member._require_own(*read_checkpoint(state))
        for member, state in zip(self.optimizers, theirs, strict=True):
            member.load_state_dict(state)
        self._link()

    def coverage(self, model: nn.Module | None = None) -> dict[str, str]:
        """The name of each parameter -> the member that trains it, or why none does. As `LearningRule.coverage`."""
        covered: dict[str, str] = {}
        for i, member in enumerate(self.optimizers):
            if isinstance(member, LearningRule):
                own = member.coverage(model)
            elif model is not None:
                trained = set(params_in(member))
                own = {n: type(member).__name__ if p in trained else "frozen" for n, p in model.named_parameters()}
            else:
                named = [n for g in member.param_groups for n in g.get("param_names", [])]
                own = dict.fromkeys(
                    named or [f"optimizers[{i}].params[{j}]" for j in range(len(params_in(member)))],
                    type(member).__name__,
                )
            learned = {name for name, label in own.items() if label not in ("frozen", "excluded")}
            covered |= {
                name: label for name, label in own.items() if name in learned or covered.get(name, "frozen") == "frozen"
            }
        return covered

    def close(self) -> None:
        """Remove every hook of every member from the model."""
        for rule in self._rules():
            rule.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("Mixed cannot be copied or pickled: build a new one and load_state_dict(mixed.state_dict())")

    # -- one step -----------------------------------------------------------------------------------------------

    @property
    def scales_with_loss(self) -> bool:
        """Whether all members do."""
        return all(rule.scales_with_loss for rule in self._rules())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return refuse_scaler(self)

    def _owned_groups(self) -> list[int]:
        return [i + j for i, rule in self._rules_by_group().items() for j in rule._owned_groups()]

    def _rules_by_group(self) -> dict[int, LearningRule]:
        """The rules by the numbers of their first groups."""
        first = accumulate((len(member.param_groups) for member in self.optimizers), initial=0)
        return {i: m for i, m in zip(first, self.optimizers, strict=False) if isinstance(m, LearningRule)}

    def _rules(self) -> list[LearningRule]:
        return [member for member in self.optimizers if isinstance(member, LearningRule)]

    def _trained(self) -> list[Tensor]:
        return [p for member in self.optimizers for p in params_in(member)]

    def _estimate(self, probe: Probe) -> tuple[Tensor, dict[Tensor, Tensor], dict[LearningRule, dict[str, Any]]]:
        plain = [m for m in self.optimizers if not isinstance(m, LearningRule)]
        sharing = [rule for rule in self._rules() if rule.shares_pass]
        several = [rule for rule in self._rules() if not rule.shares_pass]
        losses: list[Tensor] = []
        grads: dict[Tensor, Tensor] = {}
        own_states: dict[LearningRule, dict[str, Any]] = {}
        for p in self._trained():
            p.grad = None
        if sharing or plain:
            for rule in sharing:
                rule.begin()
            params = [p for m in plain for p in params_in(m)] + [p for r in sharing for p in r.gradient_parameters()]
            anchors = [r._recorder.reach.anchor for r in sharing if r.gradient_parameters()]
            loss, _ = probe.gradients(params, anchors)
            require_finite(self, "the loss", [loss])
            self._check_reached()
            losses.append(loss)
            for optimizer in plain:
                grads |= _grads(optimizer)
            for rule in sharing:
                estimate, own_states[rule] = rule.collect()
                grads |= estimate
            for p in self._trained():  # the next evaluation must not change these gradients
                p.grad = None
        for member in several:
            with ExitStack() as paused:
                for other in sharing:
                    paused.enter_context(other._recorder.paused())
                loss, estimate, own_states[member] = member.evaluate(probe)
            losses.append(loss)
            grads |= estimate
        return losses[0], grads, own_states

    def _check_reached(self) -> None:
        """Raise, in the first step, if a member learns by gradients below a rule that lets none pass."""
        tracing = [rule for rule in self._rules() if rule._recorder.trace]
        # Without a backward pass, `collect` raises.
        passed = [rule for rule in tracing if _has_grad(rule.gradient_parameters())]
        for member in self.optimizers:
            by_gradients = member.gradient_parameters() if isinstance(member, LearningRule) else params_in(member)
            without = {p for p in by_gradients if p.grad is None}
            above = [rule for rule in passed if rule is not member and not without.isdisjoint(rule._recorder.beneath)]
            if above:
                lost = [
                    tuple(p.shape)
                    for p in by_gradients
                    if any(p in r._recorder.beneath for r in above) and p in without
                ]
                raise RuntimeError(
                    f"Mixed: {type(member).__name__} trains parameters by gradients (shapes {lost}) beneath layers of "
                    f"{' and '.join(type(rule).__name__ for rule in above)}, which let no gradient pass: they could "
                    "never learn. Give them a rule of their own, or freeze them"
                )
        for rule in tracing:
            rule._recorder.trace = False


def _has_grad(params: list[Tensor]) -> bool:
    return not params or any(p.grad is not None for p in params)


def _grads(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    return {p: p.grad for p in params_in(optimizer) if p.grad is not None}
