"""`LearningRule`: the interface of every rule.

A learning rule decides the teaching signal of each synapse; PyTorch does the rest. A step has two public halves::

    loss = rule.estimate(closure)    # evaluate the closure, write p.grad = -Δw
    rule.descend()                   # step of any torch.optim class along .grad
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Optimizer

from ._torch_private import mark_as_stepped, unhooked_step
from .acts import cut
from .centring import Centring
from .constraints import NON_NEGATIVE, Constraint, require_in_range
from .coverage import Coverage
from .errors import is_captured, require_finite, require_steady, warn
from .hooks import IN_PYTHON, remove_all
from .integrations import (
    NAME,
    PACKED,
    ModelGroups,
    for_checkpoint,
    needs_estimate,
    params_in,
    read_checkpoint,
    recipe,
    refuse_own_closure,
    refuse_scaler,
)
from .losses import loss_of
from .owned import OWNED, Owned
from .params import DescentOptions, Params, ProcessGroup, groups_of, named_modules_of
from .probe import Closure, Known, Probe, restoring_grad_mode, settled
from .readout import MOMENTUM, Readout, ReadoutChoice
from .recorder import Firing, Leave, Recorder
from .steps import by_one_kernel
from .synapse import BUILT_IN, Exclusion, Synapse, Unwatchable

__all__ = ["LearningRule", "optional"]

#: the loss to return, the new ``.grad`` of each parameter, and the rule's own state after the step
Estimate: TypeAlias = tuple[Tensor, dict[Tensor, Tensor], dict[str, Any]]
#: called with a firing and its output; may return a tensor for the network to receive in its place
Visit: TypeAlias = Callable[[Firing, Tensor], Tensor | None]

#: options that groups of earlier versions lack, with what these did
NEW_OPTIONS = {"readout": None, "standardised": False, "homeostasis": False}

SAME_LOSS = 1e-4  # relative difference of losses that ranks compute of one batch
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "sum")  # of torch's optimizers
LEVELS = "homeostasis"  # in the rule's own state: running means and deviations of activity
CENTRED = "presynaptic"  # in the rule's own state: running means of presynaptic activity
#: options of the descent that hold for SGD as well
SHARED = ("weight_decay", "maximize", "differentiable")

SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "params", "param_names")


_F = TypeVar("_F", bound=Callable[..., Any])


def optional(method: _F) -> _F:
    """Mark a method of a base class that a rule may override; its default is right for most rules."""
    method.__optional__ = True  # type: ignore[attr-defined]
    return method


class LearningRule(ModelGroups, Optimizer):
    r"""A `torch.optim.Optimizer` that writes ``p.grad = -Δw`` by a learning rule, and descends by another optimizer.

    Abstract: a rule implements `_select` (what it trains) and `_estimate` (how it changes that).

    Args:
        params: a module, its parameters, named parameters, or groups of any of them. Rules that watch synapses
            need modules; the others take parameters as `torch.optim` does.
        defaults: the rule's own hyperparameters, including ``lr``. Each may differ between groups.
        readout: how the last layer learns: ``"delta"``, by its local error times its presynaptic activity, which is
            the exact gradient of its own weights; ``"teacher"``, from a target in place of its own activity, without a
            loss; ``None``, by the rule, like the other layers. See `bioopt.core.readout.Readout`. It needs modules.
        readout_lr: learning rate of the readout. The ``lr`` of a group that holds nothing but readouts takes
            precedence. Without either, a ``"delta"`` readout learns on standardised presynaptic activity, by SGD at
            a rate of its own along each of the largest principal components (`bioopt.core.readout.Readout`); a
            ``"teacher"`` readout has the rate of its group.
        readout_layer: the readout, by name or as a module, or a list of several (with ``"delta"``), each of which
            learns from the part of the loss that reaches it; by default the last synapse in registration order.
        readout_options: further options of the readout's param group, such as ``{"momentum": 0.9}``.
        exclude: module types, modules, or names of modules or parameters to leave out. `coverage` lists them.
        descent: the optimizer class that makes the step from ``.grad``. It shares ``param_groups`` and ``state`` with
            the rule, so that momentum, weight decay, schedulers and checkpoints are PyTorch's own. On a CPU, Adam,
            AdamW and Adagrad step by torch's fused kernels, several times as fast as by its loop and the same but for
            rounding, unless ``fused=False`` or ``foreach=True`` is given.
        process_group: the ranks that take a step together; ``None``: no communication.
        centre_inputs: whether the weights of each layer learn from presynaptic activity less its running mean, and its
            bias makes up for that, which changes no output (`bioopt.core.centring`). ``True`` by default in rules whose
            layers descend a gradient, and not possible in others. ``False``: as published.
        whitening: with ``centre_inputs``, how strongly inputs that are active together inhibit each other before the
            weights learn from them (`bioopt.core.whitening`), in convolutions and in Linear layers at several positions
            of a sample. 1 by default; 0: not at all.
        descent_options: keywords of ``descent``.

    Attributes:
        target: for rules and readouts that need it, to be set before each forward pass; `step` clears it. Class
            labels, one per sample, or activity of the readout's shape.
        shares_loss: whether other optimizers learn from the same loss (set by `Mixed`), so that the loss may depend on
            layers past the readout.
        forward_passes: the number of evaluations of the last estimate, including checks.

    Raises:
        ValueError: a hyperparameter out of range; an excluded name that is not there; a complex parameter.
    """

    #: range of each hyperparameter, checked for every param group
    constraints: ClassVar[dict[str, Constraint]] = {}
    #: former names of options -> present names; the former are accepted with a warning
    renamed: ClassVar[dict[str, str]] = {}
    #: with a process group: whether each rank has a share of the batch, or all have the same batch
    splits_batch: ClassVar[bool] = False
    #: whether one ordinary forward pass and at most one backward pass are enough (see `OnePass`)
    shares_pass: ClassVar[bool] = False
    #: whether its layers descend a gradient, on centred presynaptic activity unless an option says otherwise
    centres_inputs: ClassVar[bool] = False
    #: whether it trains all parameters of the modules it is given, not those of synapses alone
    trains_whole_modules: bool = False
    #: whether its updates of all layers are in proportion to the loss, as `torch.amp.GradScaler` needs it
    scales_with_loss: ClassVar[bool] = True

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        readout: str | None = None,
        readout_lr: float | None = None,
        readout_layer: str | nn.Module | Sequence[str | nn.Module] | None = None,
        readout_options: dict[str, Any] | None = None,
        exclude: Iterable[Any] = (),
        descent: type[Optimizer] = SGD,
        process_group: ProcessGroup = None,
        centre_inputs: bool | None = None,
        whitening: float | None = None,
        **descent_options: Unpack[DescentOptions],
    ) -> None:
        name = type(self).__name__
        given_options: dict[str, Any] = dict(descent_options)
        defaults = {**defaults, **self._pop_renamed(given_options)}
        groups = groups_of(params)
        self.process_group = process_group
        self.target: Tensor | None = None
        self.shares_loss = False
        self._recorder = Recorder()
        self._owned = Owned()
        given = [pair for group in groups for pair in named_modules_of(group["params"])]
        self._exclusion = Exclusion.of(name, exclude, given)
        self._coverage = Coverage(name, self._recorder, self._exclusion)
        self._readout = Readout(name, readout, self._recorder.reach, self._readout_levels)
        groups = self._readout.set_apart(
            groups,
            defaults["lr"],
            self._exclusion,
            ReadoutChoice(
                readout_lr,
                readout_layer,
                readout_options,
                standardise=readout == "delta",
                momentum=given_options.get("momentum", MOMENTUM),
            ),
            lambda groups, surveys: self._require_trainable(groups, surveys, defaults),
            self.trains_whole_modules,
        )
        centre = self.centres_inputs if centre_inputs is None else centre_inputs
        self._require_bool("centre_inputs", centre)
        for option, value in {"centre_inputs": centre, "whitening": whitening}.items():
            if value and not self.centres_inputs:
                raise TypeError(
                    f"{name}: {option}={value!r} is for rules whose layers descend a gradient, or an estimate of it"
                )
        strength = float(centre) if whitening is None else whitening
        self._check_value("whitening", strength, NON_NEGATIVE)
        if strength and not centre:
            raise ValueError(f"{name}: whitening={whitening!r} needs centre_inputs=True")
        self._centring = None
        if centre:
            self._centring = Centring(self.shares_pass, self._readout.layers, strength, self._input_levels)
        self._recorder.note = None if self._centring is None else self._centring.note
        self._same_step: dict[Tensor, Tensor] = {}  # weights -> a parameter that must take the same step
        self._known = Known()
        self._undo: list[Callable[[], None]] = []
        self._estimated = False  # `estimate` has written .grad, from which `step` may continue
        self._same_batch = False  # ranks have been compared
        self._samples = 1  # losses of this rank in the estimate in progress, where each sample has its own
        #: State that belongs to no parameter. Replaced, never changed in place: a state_dict may share it.
        self._own_state: dict[str, Any] = {}
        self.forward_passes = 0
        self._check(defaults)
        self._readout_grads: dict[Tensor, Tensor] | None = None  # of the estimate in progress
        self._readout_state: dict[str, Any] = {}  # after it
        refuse_own_closure(f"{name}(descent={descent.__name__}): {descent.__name__}", descent)
        try:
            # Checks the options and gives the defaults; with a matrix, because some optimizers take nothing else.
            options = {"lr": defaults["lr"], **given_options}
            own_defaults = descent([torch.zeros(1, 1)], **options).defaults
        except TypeError as error:
            raise TypeError(f"{name}(descent={descent.__name__}): {error}") from None
        # Steps on standardised activity have the right length for SGD, whatever makes those of the other layers.
        of_sgd = SGD([torch.zeros(1)], **{key: own_defaults[key] for key in SHARED if key in own_defaults}).defaults
        for i, group in enumerate(groups):
            if group.get("standardised"):
                decay = group.get("weight_decay", of_sgd["weight_decay"])
                if decay and group["lr"] and "weight_decay" not in (readout_options or {}):
                    # It was given for steps of the other layers' length.
                    decay *= defaults["lr"] / group["lr"] * (1 - group["momentum"])
                groups[i] = {**of_sgd, **group, "weight_decay": decay}
        super().__init__(groups, {**own_defaults, **defaults, "readout": None, "standardised": False, PACKED: None})
        self._one_rate = bool(self._rates_alike())  # by the user's choice, or after a warning
        self._descent = descent([{"params": group["params"]} for group in self.param_groups], **options)
        self.state.update(self._descent.state)  # some optimizers create it here
        apart = not isinstance(self._descent, SGD) and any(group["standardised"] for group in self.param_groups)
        self._readout_descent = SGD([torch.zeros(1)]) if apart else None
        self._own_for(list(self._recorder.synapses.values()))

    # -- what a rule implements ---------------------------------------------------------------------------------

    @abstractmethod
    def _select(self, group: dict[str, Any]) -> tuple[list[Any], list[Synapse]]:
        """The parameters of a group (torch's bare or named form) and the synapses to watch for them."""

    @abstractmethod
    def _estimate(self, probe: Probe) -> Estimate:
        """Evaluate the closure as often as needed, from the start each time it is called."""

    @optional
    def _require_trainable(
        self,
        groups: list[dict[str, Any]],
        surveys: list[tuple[list[Synapse], list[Unwatchable]]],
        defaults: dict[str, Any],
    ) -> None:
        """Raise for all layers that the rule cannot train; `surveys` is empty for bare parameters."""

    @optional
    def _own_for(self, synapses: list[Synapse]) -> None:
        """Add, by `own`, what belongs to layers that are watched from now on."""

    def gradient_parameters(self) -> list[Tensor]:
        """The parameters that a backward pass must reach before `collect`; none if the rule needs no loss."""
        return self._readout.parameters()

    def begin(self) -> None:
        """Start an evaluation that alone will count."""
        self._recorder.reset()
        self._forget_inputs()
        for p in self._trained():
            p.grad = None

    def collect(self, losses: Tensor | None = None) -> tuple[dict[Tensor, Tensor], dict[str, Any]]:
        """The new ``.grad`` of each parameter and the rule's own state after the step, from the passes so far.

        Rules of one pass (`shares_pass`) implement it; the classic loop, ``loss.backward(); step()``, needs it.

        Args:
            losses: of the pass, for the rule to check and average.
        """
        raise RuntimeError(
            f"{type(self).__name__} evaluates the loss several times a step, so step() needs a closure: "
            "optimizer.step(closure), where closure() runs the model and returns the loss." + recipe() + " "
            "(torch.amp.GradScaler, for mixed precision in float16, passes none on: use bfloat16 without it)"
        )

    def evaluate(self, probe: Probe) -> Estimate:
        """The loss, the new ``.grad`` of each parameter, and the rule's own state after the step."""
        self._readout_grads = None
        if not self.splits_batch:
            self._require_same_batch(probe)
        self._forget_inputs()
        losses, grads, state = self._estimate(probe)
        if self._readout and not self.shares_pass:
            if self._readout_grads is None:
                self._base_point(probe)
            grads = {**grads, **(self._readout_grads or {})}
            state = {**state, **self._readout_state}
            self._readout_grads = self.target = None  # an old target must not teach a new batch
        return losses, grads, state

    # -- the contract -------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Any:
        """One step of learning: `estimate`, then `descend`.

        Args:
            closure: runs the model and returns the loss, preferably of each sample. Without one, the step descends
                along what `estimate` has just written, or learns from all forward passes since the last step (rules of
                one pass only).

        Returns:
            The result of the closure, detached; ``None`` without a closure.

        Rules of one pass without running values can be captured in a CUDA graph: the forward pass and ``step()``
        together, after a few ordinary steps. Replays need no Python, which takes most of the time of a small batch on
        a GPU; they use the options of the capture, and do not check for non-finite numbers.

        Raises:
            Diverged: a loss or an update that is not finite.
            RuntimeError: no forward pass; no closure for a rule that needs one. As after `Diverged`, parameters and
                optimizer state are unchanged.
        """
        loss = self.estimate(closure) if needs_estimate(self, closure, [self]) else None
        self.descend()
        return loss

    @torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
    def estimate(self, closure: Closure | None = None) -> Any:
        """The first half of `step`: write ``p.grad = -Δw`` for every parameter of the rule, and change nothing else.

        In a training loop that calls ``step()`` itself, write ``rule.estimate(closure)`` in place of the backward pass.
        """
        return settled(self._undo, lambda: self._estimate_once(closure))

    def _estimate_once(self, closure: Closure | None) -> Any:
        loss: Any = None
        self._estimated = False
        self._undo += [self._recorder.restoring(), restoring_grad_mode(), self._forget_inputs]
        self._coverage.require_same_parameters()
        if closure is None:
            grads, own_state = self.collect()
        else:
            probe = Probe(closure, self._trained(), self._known, self._undo)
            with torch.no_grad():
                loss, grads, own_state = probe.run(type(self).__name__, self.evaluate)
            loss = loss if probe.returns_tensor else loss.item()
        if own_state.keys() - {"homeostasis", "readout", "seed", CENTRED} and is_captured(self._trained()):
            raise RuntimeError(
                f"{type(self).__name__} keeps running state, which the replay of a CUDA graph would not update: take "
                "ordinary steps"
            )
        total = require_finite(self, "an update", list(grads.values()))
        self.require_steady(grads, total)
        self.forward_passes = 0 if closure is None else probe.made
        self._coverage.look_for_silent()
        for p in self._trained():
            p.grad = grads.get(p)
        self._own_state = own_state
        self._follow_inputs()
        self._estimated = True
        return loss

    def discard(self) -> None:
        """Drop all passes since the last step, and ``.grad``: the next step learns nothing from them."""
        self._recorder.discard()
        self._forget_inputs()
        self._estimated = False
        for p in self._trained():
            p.grad = None

    @torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def descend(self) -> None:
        """The second half of `step`: ``descent``'s own step along ``.grad``."""
        mark_as_stepped(self)
        self._estimated = False
        groups = {self._descent: self.param_groups}
        if self._readout_descent is not None:
            groups = {
                self._descent: [group for group in self.param_groups if not group["standardised"]],
                self._readout_descent: [group for group in self.param_groups if group["standardised"]],
            }
        self._look_for_one_rate()
        with self._on_centred_activity(), self._around_descent():
            for descent, own in groups.items():
                # load_state_dict replaces both. Without hooks: those on all optimizers must fire once per step.
                descent.state = self.state
                descent.param_groups = by_one_kernel(descent, own)
                unhooked_step(descent)

    def _rates_alike(self) -> list[float]:
        """The rates of readouts on standardised activity that other layers have too."""
        others = {group["lr"] for group in self.param_groups if not group["standardised"]} - {0}
        return [group["lr"] for group in self.param_groups if group["standardised"] and group["lr"] in others]

    def _look_for_one_rate(self) -> None:
        """Warn once where a schedule has given a readout on standardised activity the rate of the other layers."""
        if not self._one_rate and (same := self._rates_alike()):
            self._one_rate = True
            warn(
                f"{type(self).__name__}: the readout, whose rate is in units of its own (1 by default), now has that "
                f"of the other layers, lr={same[0]:g}. OneCycleLR, CyclicLR and SWALR set one rate for all groups: "
                "give them a list, such as max_lr=[2 * group['lr'] for group in optimizer.param_groups], or build the "
                "optimizer with readout_lr="
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch, after a check of its options; its ``"params"`` may be a module."""
        group = dict(param_group)
        group |= self._pop_renamed(group)
        self._check({**self.defaults, **group})
        modules = named_modules_of(group["params"])
        self._require_addable(modules)
        for layer in (layer for _, module in modules for layer in module.modules()):
            if isinstance(layer, tuple(self._exclusion.kinds)):
                self._exclusion.add(layer)
        if group.get("readout"):
            group["params"], synapses = self._readout.select(group["params"])
        else:
            named, synapses = self._select(group)
            group["params"] = self._readout.left_over(named)
            synapses = [s for s in synapses if s.layer not in self._readout.layers]
        self._require_real(group["params"])
        if group["params"] or not modules:  # torch wants names in all groups or in none, and an empty one has none
            super().add_param_group(group)
        for synapse in synapses:
            synapse.group = len(self.param_groups) - 1
            self._recorder.watch(synapse)
        self._known.roots.update({module: None for _, module in modules})
        learning = self.param_groups[-1]["params"] if group["params"] else []
        self._coverage.add(modules, learning, watched=bool(synapses))
        if hasattr(self, "_descent"):  # a group that is added later
            self._own_for(synapses)

    @optional
    def _require_addable(self, modules: list[tuple[str, nn.Module]]) -> None:
        """Raise for modules that cannot be added once the rule is built."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the rule's name; ``["state"]["rule"]`` is the state that belongs to no parameter."""
        name = type(self).__name__
        return for_checkpoint(super().state_dict(), name, self._checkpoint_state(), self._owned_groups())

    def _checkpoint_state(self) -> dict[str, Any]:
        """The state that belongs to no parameter, and the values of modules that belong to the rule."""
        owned = {OWNED: self._owned.state_dict()} if self._owned.modules else {}
        return {**self._own_state, **owned}

    def _owned_groups(self) -> list[int]:
        owned = {id(p) for p in self._owned.modules.parameters()}
        return [i for i, group in enumerate(self.param_groups) if any(id(p) in owned for p in group["params"])]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: the state of another rule, or of groups of other sizes; nothing is changed.
        """
        state_dict, own_state = read_checkpoint(state_dict)
        self._require_own(state_dict, own_state)
        owned = own_state.pop(OWNED, {})
        former = {name: value for name, value in NEW_OPTIONS.items() if name in self.defaults}
        groups = [
            {**former, **{self.renamed.get(key, key): value for key, value in group.items()}}
            for group in state_dict["param_groups"]
        ]
        state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict({key: value for key, value in state_dict.items() if key != NAME})
        self._owned.load_state_dict(owned)
        self._own_state = own_state

    def own(self, modules: Mapping[str, nn.Module], **options: Any) -> None:
        """Add modules that belong to the optimizer as a param group; `state_dict` holds their values.

        To be called in the rule's constructor, so that schedulers and `load_state_dict` find the group. Modules may be
        lazy: ``self._owned(name, x)`` calls one, and its first call draws its values from ``self._owned.seed``.

        Args:
            modules: by stable names, such as those of their layers.
            options: of their param group, such as ``lr``.

        Raises:
            ValueError: an option out of range; a name that is taken.
        """
        self._check({**self.defaults, **options})
        named = self._owned.add(type(self).__name__, modules)
        # torch wants names in all groups or in none.
        with_names = all("param_names" in group for group in self.param_groups)
        super().add_param_group({"params": named if with_names else [p for _, p in named], **options})

    def coverage(self, model: nn.Module | None = None) -> dict[str, str]:
        """The name of each parameter -> the rule's name, or why the parameter is not trained.

        A layer that can only have homeostasis is ``"<rule> (homeostasis)"``. The reasons are ``"frozen"``,
        ``"excluded"`` and, from the first step on, ``"silent: ..."`` for a layer that should learn but does not.

        Args:
            model: whose parameters and names to list; by default those given as ``params``.
        """
        labels, rule = self._coverage.labels(self.param_groups), type(self).__name__
        labels |= {p: f"{rule} ({how})" for p, how in self._otherwise().items() if labels.get(p) == rule}
        names = self._names() if model is None else {p: name for name, p in model.named_parameters()}
        return {name: labels.get(p, "frozen") for p, name in names.items()}

    @optional
    def _otherwise(self) -> dict[Tensor, str]:
        """Parameters that learn in another way than the rule's own, with its name."""
        return {}

    def layers(self) -> dict[str, Synapse]:
        """The layers that the rule watches by their names in the model."""
        names, found = self._names(), dict[str, Synapse]()
        for synapse in self._recorder.synapses.values():
            name = names[synapse.weight].removesuffix(".weight")
            found[synapse.name if name in found else name] = synapse  # some share their weights
        return found

    def close(self) -> None:
        """Remove every hook from the model. Also happens when the optimizer is garbage-collected."""
        self._recorder.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, because it may watch a model: copy the model, build a "
            "new optimizer for the copy, and call load_state_dict(optimizer.state_dict())"
        )

    # -- for rules ----------------------------------------------------------------------------------------------

    def require_steady(self, grads: dict[Tensor, Tensor], total: float) -> None:
        """Raise `Diverged` where a step would change weights beyond all measure; ``total``: the gradients' norm."""
        if isinstance(self._descent, SGD):  # others normalise the step
            require_steady(self, grads, total)

    def _base_point(self, probe: Probe, visit: Visit | None = None) -> Tensor:
        """Evaluate once at the present weights, and let the readout learn from that; for rules of several passes.

        A rule that evaluates the loss there anyway calls this in place of ``probe()``; with a readout, the others make
        one more pass for it.

        Args:
            probe: the closure.
            visit: called with each firing of the other synapses and its output, which is cut.
        """
        readout = self._readout
        readout.begin(self.target)
        handles = readout.note_others(self._recorder.fired, self._recorder.synapses)
        self._undo.append(partial(remove_all, handles))
        with self._cutting(visit, readout.leave):
            losses = self._with_gradients(probe, readout.parameters())
        if readout:
            require_finite(self, "the loss", [losses])
            readout.require_fired_last(self._recorder.fired)
            readout.require_gradient()
            self._readout_state = {"readout": levels} if (levels := self._own_state.get("readout")) else {}
            # Ranks with the same batch have the same events, which must not count once for each rank.
            together = (self._sum_over_ranks, self._ranks[1]) if self.splits_batch else (self._average_over_ranks, 1)
            self._readout_grads = readout.collect(*together, losses.numel(), self._readout_state)
            for p in self._trained():  # the next evaluation must not change these gradients
                p.grad = None
        return losses

    def _cutting(self, visit: Visit | None, leave_readout: Leave | None = None) -> AbstractContextManager[None]:
        """Cut every synapse inside a ``with`` block; of readouts, only the input is cut.

        Args:
            visit: called with each firing and its output, which has the graph of the layer alone; may return a tensor
                for the network to receive in its place.
            leave_readout: called for readouts in place of ``visit``; by default their output passes unchanged.
        """
        reach, layers = self._recorder.reach, self._readout.layers

        def leave(firing: Firing, u: Tensor) -> Tensor:
            if firing.synapse.layer in layers:
                return u if leave_readout is None else leave_readout(firing, u)
            other = None if visit is None or firing.replay else visit(firing, u)
            return cut(firing, u if other is None else other, reach)

        return self._recorder.acting(self._readout.enter, leave)

    def _readout_levels(self) -> dict[int, dict[str, Any]]:
        """The levels of the activity that readouts receive, by the index of their synapse."""
        levels: dict[int, dict[str, Any]] = self._own_state.get("readout", {})
        return levels

    def _input_levels(self) -> dict[int, dict[str, Any]]:
        """The levels of presynaptic activity, by the index of the synapse."""
        levels: dict[int, dict[str, Any]] = self._own_state.get(CENTRED, {})
        return levels

    def _forget_inputs(self) -> None:
        """Drop what was seen of presynaptic activity since the last step."""
        if self._centring is not None:
            self._centring.clear()

    @torch.no_grad()
    def _follow_inputs(self) -> None:
        """Let the running means of presynaptic activity follow the passes of this estimate."""
        if self._centring is not None:
            add = self._sum_over_ranks if self.splits_batch else _as_they_are
            levels = self._centring.followed(self._input_levels(), add)
            self._own_state = {**self._own_state, CENTRED: levels}

    def _on_centred_activity(self) -> AbstractContextManager[None]:
        """What encloses the step of the descent, if it is on centred presynaptic activity."""
        if self._centring is None:
            return nullcontext()
        return self._centring.descending(self._input_levels(), self._recorder.synapses.values(), self._same_step)

    @optional
    def _around_descent(self) -> AbstractContextManager[None]:
        """What encloses the step of the descent."""
        return nullcontext()

    def _next_state(self) -> dict[str, Any]:
        """The rule's own state after this step, with the count of steps raised."""
        step = self._own_state.get("step")
        return {**self._own_state} if step is None else {**self._own_state, "step": step + 1}

    def _names(self) -> dict[Tensor, str]:
        """The name of each parameter that was given, alone or in a module."""
        return self._coverage.names(self.param_groups)

    def _trained(self) -> list[Tensor]:
        return params_in(self)

    def _of_model(self) -> list[Tensor]:
        """The parameters of the model that are not frozen, without those of the rule's own modules."""
        owned = {*self._owned.modules.parameters()}
        return [p for p in self._trained() if p.requires_grad and p not in owned]

    def _silent(self) -> set[Tensor]:
        """Parameters of layers that did not fire in this step, such as those in evaluation mode, and so must not learn.

        Those that are shared with a layer that fired are not among them.
        """
        fired = self._recorder.fired
        learning = {p for s in fired for p in s.parameters()}
        return {p for s in self._recorder.synapses.values() for p in s.parameters() if p not in learning}

    def _centre_unless(self, options: Any, otherwise: bool, why: str = "") -> None:
        """Choose ``centre_inputs``, if the user has not.

        Args:
            options: of the constructor.
            otherwise: whether another option excludes it.
            why: what ``centre_inputs=True`` needs and why, for a user who has chosen both; none: both are possible.
        """
        asked = [name for name in ("centre_inputs", "whitening") if options.get(name)]
        if asked and otherwise and why:
            raise ValueError(f"{type(self).__name__}: {asked[0]}={options[asked[0]]!r} needs {why}")
        if options.get("centre_inputs") is None:
            options["centre_inputs"] = self.centres_inputs and not otherwise

    def _refuse_readout(self, options: Mapping[str, Any], why: str) -> None:
        """Raise if options ask for a readout, in a rule whose last layer learns like the others."""
        if (readout := options.get("readout")) is not None:
            raise TypeError(
                f"{type(self).__name__}: readout={readout!r} is not possible, because {why}; for other options of the "
                "last layer, give it a param group of its own"
            )

    def _pop_renamed(self, options: dict[str, Any]) -> dict[str, Any]:
        """Remove options with former names from ``options``, and return them with their present names."""
        found = {}
        for old, new in self.renamed.items():
            if old in options:
                found[new] = options.pop(old)
                warn(f"{type(self).__name__}: {old} is now called {new}; write {new}={found[new]!r}", FutureWarning)
        return found

    def _check(self, options: dict[str, Any]) -> None:
        for name, constraint in {"lr": NON_NEGATIVE, **self.constraints}.items():
            self._check_value(name, options[name], constraint)

    def _check_value(self, name: str, value: Any, constraint: Constraint) -> None:
        require_in_range(type(self).__name__, name, value, constraint)

    def _require_bool(self, name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{type(self).__name__}: {name}={value!r} must be True or False")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by `torch.amp.GradScaler` before it looks for gradients."""
        return refuse_scaler(self)

    def _require_real(self, params: Iterable[Any]) -> None:
        """Raise for complex parameters: a rule would ignore their imaginary part."""
        for i, entry in enumerate(params):
            name, p = entry if isinstance(entry, tuple) else (f"params[{i}]", entry)
            if isinstance(p, Tensor) and p.is_complex():
                raise ValueError(
                    f"{type(self).__name__}: parameter '{name}' is complex ({p.dtype}), and rules train real weights: "
                    f"make its real and imaginary parts parameters (torch.view_as_real), or exclude=['{name}']"
                )

    def _require_own(self, state_dict: dict[str, Any], own_state: dict[str, Any]) -> None:
        """Raise for the state of another rule, or of other modules of its own."""
        self._require_same_rule(state_dict)
        self._owned.require_own(type(self).__name__, own_state.get(OWNED, {}))
        self._require_same_sizes(state_dict, own_state)

    def _require_same_sizes(self, state_dict: dict[str, Any], own_state: dict[str, Any]) -> None:
        """Raise for the state of a model whose layers have other sizes."""
        name, names = type(self).__name__, self._names()
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, self._trained(), strict=False):
            for moment in MOMENTS:
                value = state_dict["state"].get(i, {}).get(moment)
                if isinstance(value, Tensor) and not is_lazy(p) and value.shape != p.shape:
                    raise ValueError(
                        f"{name}: the state is of a model of other sizes: '{names.get(p, i)}' has the shape "
                        f"{tuple(value.shape)} there and {tuple(p.shape)} here"
                    )
        for synapse in self._recorder.synapses.values():
            inputs = getattr(synapse.layer, "in_features", getattr(synapse.layer, "in_channels", None))
            for kind, size in ((CENTRED, inputs), ("readout", inputs), (LEVELS, len(synapse.weight))):
                level = own_state.get(kind, {}).get(synapse.index)
                if level is not None and type(synapse.layer) in BUILT_IN and level["mean"].numel() != size:
                    what = "neurons" if kind == LEVELS else "inputs"
                    raise ValueError(
                        f"{name}: the state is of a model of other sizes: layer '{synapse.name}' has "
                        f"{level['mean'].numel()} {what} there and {size} here"
                    )

    def _require_same_rule(self, state_dict: dict[str, Any]) -> None:
        own, theirs = type(self).__name__, state_dict.get(NAME)
        if theirs is not None and theirs != own:
            raise ValueError(f"{own}: the state is that of {theirs}; load it into {theirs}, or start {own} without it")
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

    def _require_same_on_ranks(self, names: list[str]) -> None:
        """Raise where other ranks learn from other layers in this step: sums of different layers would be added up.

        Args:
            names: of the layers or parameters that this rank learns from, in order.
        """
        if self.process_group is None or is_captured(self._trained()):
            return
        code = zlib.crc32("\n".join(names).encode())
        bounds = torch.tensor([code, -code], device=self._trained()[0].device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.process_group)
        if bounds.sum() != 0:
            raise RuntimeError(
                f"{type(self).__name__}: the ranks of process_group= learn from different layers in this step (this "
                f"one from {', '.join(names)}), so that no average can be taken. Run every layer on every rank, on no "
                "samples if need be"
            )

    def _with_gradients(self, probe: Probe, params: list[Tensor]) -> Tensor:
        """The losses of an evaluation, whose gradient by these parameters is in their ``.grad``."""
        try:
            return probe.gradients(params, [self._recorder.reach.anchor])[0]
        except RuntimeError as error:
            if "second time" in str(error):  # as where a layer above the readout is cut off: that tells more
                self._readout.require_fired_last(self._recorder.fired)
            raise

    def _require_same_batch(self, probe: Probe) -> None:
        """Raise where ranks have other samples, in the first step of a rule whose ranks share the batch."""
        if self.process_group is None or self._same_batch or is_captured(self._trained()):
            return
        with self._recorder.paused():
            losses = probe().double()
        count, mean = losses.numel(), loss_of(losses)
        bounds = torch.cat([mean.new_tensor([probe.drew, count, -count]), torch.stack([mean, -mean])])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.process_group)
        drew, most, least, highest, lowest = bounds.tolist()  # the least with the other sign
        probe.restart()
        self._same_batch = True
        if most + least or (not drew and highest + lowest > SAME_LOSS * abs(highest)):
            raise RuntimeError(
                f"{type(self).__name__}: the ranks of process_group= have different batches (from {-least:.0f} to "
                f"{most:.0f} losses, of mean {-lowest:.6g} to {highest:.6g}), but they share the trials of one: give "
                "every rank the same samples, without a DistributedSampler"
            )

    def _sum_over_ranks(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in one message."""
        if self.process_group is None or not tensors:
            return
        flat = torch.cat([t.flatten().to(tensors[0].device) for t in tensors])
        dist.all_reduce(flat, group=self.process_group)
        for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def _average_gradients(self, losses: Tensor | None, grads: dict[Tensor, Tensor]) -> None:
        """Replace each gradient by its mean over the ranks, which must learn from the same layers; check the loss."""
        params = [p for p in self._trained() if p in grads]
        self._samples = 1 if losses is None else losses.numel()
        if self.process_group is not None:
            names = self._names()
            self._require_same_on_ranks([names[p] for p in params])
        loss = torch.zeros((), device=self._trained()[0].device) if losses is None else loss_of(losses)
        self._average_over_ranks([loss, *(grads[p] for p in params)])
        if losses is not None:
            require_finite(self, "the loss", [losses])

    def _average_over_ranks(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, each with the weight of its samples, in one message."""
        if self._ranks[1] == 1 or not tensors:
            return
        count = tensors[0].new_tensor(float(self._samples))
        for tensor in tensors:
            tensor.mul_(self._samples)
        self._sum_over_ranks([*tensors, count])
        count.clamp_(min=1)
        for tensor in tensors:
            tensor.div_(count.to(tensor))


def _as_they_are(tensors: list[Tensor]) -> None:
    """All ranks have the same batch."""
