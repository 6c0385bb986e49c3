"""`Recorder`: forward hooks on the synapses of a user's own, unmodified model.

As a synapse fires, the recorder calls its rule twice: ``enter(synapse, x)`` before the layer runs, and
``leave(firing, u)`` after it. The layer receives what ``enter`` returns, and the rest of the network what ``leave``
returns. `bioopt.core.acts` has the standard choices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ._torch_private import (
    active_ddp,
    forward_pre_hooks,
    in_backward,
    is_batched,
    remove_saved_tensor_hooks,
    version_of,
)
from .acts import Isolated
from .hooks import IN_PYTHON, Hook, leave_no_trace, remove_all
from .reach import Reach, leaves_behind, weakly
from .rows import Rows, rows_now
from .synapse import BUILT_IN, Synapse, verify

__all__ = ["Firing", "Recorder"]

COMPILED = "a compiled model must not run before its optimizer is built: call torch.compiler.reset() if it has"
IN_DDP = (
    "a learning rule does its own averaging over ranks, and DistributedDataParallel would average unused gradients, or "
    "wait for gradients that never arrive: run the model without it (model.module), and give the rule "
    "process_group=torch.distributed.group.WORLD. (In Lightning: a DDPStrategy whose configure_ddp does nothing)"
)


@dataclass(frozen=True, eq=False)
class Firing:
    """One pass through a synapse.

    Attributes:
        synapse: the layer.
        x: presynaptic activity, with its graph.
        rows: which samples the layer ran on; ``None``: all.
        replay: whether activation checkpointing runs the layer again, in the backward pass.
        standardised: under homeostasis, postsynaptic activity of mean 0 and deviation 1, in single precision at least.
    """

    synapse: Synapse
    x: Tensor
    rows: Rows | None
    replay: bool
    standardised: Tensor | None = None

    def activity(self, u: Tensor) -> Tensor:
        """The postsynaptic activity that a rule reads: under homeostasis standardised, else ``u`` itself."""
        return u.detach() if self.standardised is None else self.standardised

    def rows_of(self, u: Tensor) -> Rows | None:
        """The samples that the rows of the output belong to; ``None``: all, in order.

        Raises:
            RuntimeError: the layer ran on some samples, and the first dimension of ``u`` does not count them.
        """
        rows = self.rows
        if rows is not None and (u.ndim < 2 or len(u) != len(rows.index)):
            raise RuntimeError(
                f"layer '{self.synapse.name}' ran on {len(rows.index)} of {rows.count} samples, but its activity has "
                f"the shape {tuple(u.shape)}: on a pathway that some samples skip, the first dimension must be the "
                "sample. Do not merge other dimensions into it there, or let all samples take all pathways "
                "(active=None)"
            )
        return rows


Enter: TypeAlias = Callable[[Synapse, Tensor], Tensor | Isolated]
Leave: TypeAlias = Callable[[Firing, Tensor], Tensor]
#: called with the firing and the output of the neurons that follow; returns what the network receives in its place
OnNeurons: TypeAlias = Callable[[Firing, Tensor], Tensor]


@dataclass(eq=False)
class _Running:
    """A layer that is running, and what to restore after it."""

    synapse: Synapse
    x: Tensor
    grad_mode: bool
    isolation: saved_tensors_hooks | None = None
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the arguments, where the layer must be verified


class Recorder:
    """Forward hooks on a set of synapses, which call a rule as one fires.

    Attributes:
        synapses: by their layers.
        watched: all modules with a hook.
        on_neurons: called with the firing and the (first) output of the ``neurons`` of its synapse; returns what the
            network receives in its place. Bound methods are held weakly.
        reach: which firings a backward pass has reached.
        fired: the synapses that fired since `reset`, ordered by their last firing.
        in_evaluation: whether layers in evaluation mode count, too.
        trace: whether to fill ``beneath``.
        beneath: leaf tensors that require gradients, found below a cut since `reset`.
        note: called with each firing that is no replay, whatever the rule does with it; ``None``: nothing.
    """

    def __init__(self) -> None:
        self.synapses: dict[nn.Module, Synapse] = {}
        self.watched: set[nn.Module] = set()
        self.reach = Reach()
        self.in_evaluation = False
        self.trace = False
        self.fired: dict[Synapse, None] = {}
        self.beneath: set[Tensor] = set()
        self.note: Callable[[Firing], None] | None = None
        self._enter: Callable[[], Enter | None] | None = None
        self._leave: Callable[[], Leave | None] | None = None
        self._on_neurons: Callable[[], OnNeurons | None] | None = None
        self._awaited: dict[Synapse, tuple[Firing, torch.Size]] = {}  # whose neurons have not run yet
        self._running: list[_Running | None] = []
        self._verified: set[nn.Module] = set()
        self._handles: list[Any] = []
        # Not bound to self: the hooks must be removed when the recorder is garbage-collected.
        self.close = weakref.finalize(self, remove_all, self._handles)

    # -- what a rule calls --------------------------------------------------------------------------------------

    def watch(self, synapse: Synapse) -> None:
        """Install the hooks of one synapse, before the model is compiled: `torch.compile` ignores later hooks."""
        layer = synapse.layer
        synapse.index = len(self.synapses)
        self.synapses[layer] = synapse
        self._handles.append(layer.register_forward_pre_hook(Hook(self, "_before"), with_kwargs=True))
        # always_call restores grad mode after a layer that raises.
        self._handles.append(layer.register_forward_hook(Hook(self, "_after"), always_call=True))
        leave_no_trace(type(layer))
        self.watched.add(layer)
        others = [other for other in self.synapses.values() if other is not synapse]
        if synapse.neurons is not None and all(other.neurons is not synapse.neurons for other in others):
            self._handles.append(synapse.neurons.register_forward_hook(Hook(self, "_neurons_answered")))
            leave_no_trace(type(synapse.neurons))
            self.watched.add(synapse.neurons)

    def keep(self, handle: Any) -> None:
        """Remove this hook of another module together with its own, by `close` or when garbage-collected."""
        self._handles.append(handle)

    def act(self, enter: Enter | None, leave: Leave | None) -> None:
        """Call these as a synapse fires; ``None``: nothing. Bound methods are held weakly."""
        self._enter, self._leave = weakly(enter), weakly(leave)

    @contextmanager
    def acting(self, enter: Enter | None, leave: Leave | None) -> Iterator[None]:
        """Call these inside a ``with`` block."""
        before = self._enter, self._leave
        self.act(enter, leave)
        try:
            yield
        finally:
            self._enter, self._leave = before

    def paused(self) -> AbstractContextManager[None]:
        """Call nothing inside a ``with`` block."""
        return self.acting(None, None)

    @property
    def active(self) -> bool:
        """Whether anything is called as a synapse fires."""
        return self._leave is not None

    @property
    def on_neurons(self) -> OnNeurons | None:
        """Called when the neurons of a synapse have run."""
        return None if self._on_neurons is None else self._on_neurons()

    @on_neurons.setter
    def on_neurons(self, call: OnNeurons | None) -> None:
        self._on_neurons = weakly(call)

    def restoring(self) -> Callable[[], None]:
        """A function that restores the calls of now, with no layer running."""
        before = self._enter, self._leave

        def restore() -> None:
            self._enter, self._leave = before
            self.reset()

        return restore

    def discard(self) -> None:
        """Let no firing up to now count, even if a backward pass reaches it later."""
        self.reach.window += 1
        self.reset()

    def reset(self) -> None:
        """Drop the record of all firings."""
        self.reach.reset()
        # An interrupted layer leaves its hooks behind, and they would keep every graph alive.
        remove_saved_tensor_hooks(_pack)
        self.fired.clear()
        self.beneath.clear()
        self._running.clear()
        self._awaited.clear()

    def missing(self) -> str:
        """The message about the first synapse whose neurons have not run since it fired; empty if all have."""
        name = next((synapse.name for synapse in self._awaited), None)
        if name is None:
            return ""
        return (
            f"layer '{name}' has fired, but the neurons that should follow it did not run; name those that follow: "
            f"neurons={{'{name}': ...}}"
        )

    # -- hooks --------------------------------------------------------------------------------------------------

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        synapse = self.synapses[layer]
        self._running.append(None)
        enter = None if self._enter is None else self._enter()
        awake = layer.training or self.in_evaluation
        if enter is None or not awake or not synapse.weight.requires_grad:
            return None
        self._require_possible(synapse)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            return None
        running = _Running(synapse, x, torch.is_grad_enabled())
        entered = enter(synapse, x)
        given = entered.x if isinstance(entered, Isolated) else entered
        if self.trace and x.requires_grad and not given.requires_grad:
            self.beneath |= leaves_behind(x)
        args = tuple(given if value is x else value for value in args)
        kwargs = {key: given if value is x else value for key, value in kwargs.items()}
        if type(layer) not in BUILT_IN and layer not in self._verified:
            running.call = args, kwargs
        if isinstance(entered, Isolated):
            # Activation checkpointing must not drop the saved tensors of this graph, and autocast must not use a
            # half-precision copy of the weight that it has cached without a graph.
            running.isolation = saved_tensors_hooks(_pack, _unpack)
            running.isolation.__enter__()
            torch.set_grad_enabled(True)
            if torch.is_autocast_enabled(synapse.weight.device.type):
                torch.clear_autocast_cache()
        self._running[-1] = running
        return args, kwargs

    def _require_possible(self, synapse: Synapse) -> None:
        """Raise where a layer cannot learn from this pass."""
        others = [hook.recorder for hook in forward_pre_hooks(synapse.layer) if isinstance(hook, Hook)]
        if any(other not in (None, self) and other.active for other in others):
            raise RuntimeError(
                f"layer '{synapse.name}' is watched by two rules at once: close() the one that is no longer needed, "
                "or give each its own part of the model (bioopt.Mixed)"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"layer '{synapse.name}' ran in training mode under torch.inference_mode(), where nothing can learn: "
                "use torch.no_grad() to train, or model.eval() to evaluate"
            )
        if active_ddp() is not None:
            raise RuntimeError(IN_DDP)

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        running = self._running.pop() if self._running else None
        if running is None:
            return None
        synapse = running.synapse
        if running.isolation is not None:
            running.isolation.__exit__(None, None, None)
            torch.set_grad_enabled(running.grad_mode)
        leave = None if self._leave is None else self._leave()
        if output is None or leave is None:  # the layer raised, or the rule was garbage-collected
            return None
        firing = Firing(synapse, running.x, rows_now(), in_backward())
        if not firing.replay:
            if self.note is not None:
                self.note(firing)
            if running.call is not None and not is_batched(output) and verify(synapse, output, *running.call):
                self._verified.add(layer)
            self.fired.pop(synapse, None)
            self.fired[synapse] = None
            if synapse.neurons is not None:
                self._await(firing, output.shape)
        return leave(firing, output)

    def _await(self, firing: Firing, shape: torch.Size) -> None:
        if firing.synapse in self._awaited:
            missing = self.missing()
            self._awaited.clear()
            raise RuntimeError(missing)
        self._awaited[firing.synapse] = firing, shape

    def _neurons_answered(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        due = [synapse for synapse in self._awaited if synapse.neurons is module]
        on_neurons = self.on_neurons
        first = output[0] if isinstance(output, tuple | list) and output else output
        handed_on = first
        for synapse in due:
            firing, shape = self._awaited.pop(synapse)
            if not isinstance(first, Tensor) or first.shape != shape:
                found = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
                raise RuntimeError(
                    f"the {type(module).__name__} that follows layer '{synapse.name}' must return one spike for each "
                    f"output of the layer, {tuple(shape)} (alone, or first in a tuple), not {found}; name other "
                    f"neurons: neurons={{'{synapse.name}': ...}}"
                )
            if on_neurons is not None:
                handed_on = on_neurons(firing, handed_on)
        if handed_on is first:
            return None
        if not isinstance(output, tuple | list):
            return handed_on
        outputs = [handed_on, *output[1:]]
        return output._make(outputs) if hasattr(output, "_make") else type(output)(outputs)


@torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
def _pack(tensor: Tensor) -> tuple[Tensor, int | None]:
    return tensor, version_of(tensor)


@torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
def _unpack(packed: tuple[Tensor, int | None]) -> Tensor:
    tensor, version = packed
    if version_of(tensor) != version:  # hooks take the place of autograd's own check
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that a layer learns from was changed in place after the layer "
            "ran: write x = x + y in place of x += y, or give the layer x.clone()"
        )
    return tensor
