"""`Recorder`: record, cut and inject at the synapses of a user's own, unmodified model.

A *synapse* here is a layer that joins presynaptic activity ``x`` to postsynaptic activity
``u = layer(x)`` through one weight. The recorder sits on its forward hooks and offers three acts:

========== ==========================================================================================
**record**  hand ``x`` and ``u`` to the rule, with the small graph that joins ``u`` to this layer's
            parameters, so that autograd forms the local product of pre and post
**cut**     feed the layer ``x.detach()`` and hand on a detached ``u``: no error signal passes
**inject**  hand on something else in place of ``u`` (node perturbation adds noise)
========== ==========================================================================================
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Recorder", "Rows", "Synapse", "find_synapses", "on_rows", "register_synapse", "rows_seen"]

# Exact layer type -> the dimension of its output that counts its neurons. Exact, because a subclass may
# never fire its hooks (`MultiheadAttention.out_proj`) or may compute something else.
_CHANNEL_DIM: dict[type[nn.Module], int] = {
    nn.Linear: -1,
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.Conv3d: -4,
}


IN_PYTHON = "learning rules run in Python, around the compiled layers: leave fullgraph=True out"
COMPILED = "a compiled model must not run before its optimizer is built (torch.compiler.reset() forgets that it did)"
IN_DDP = (
    "a learning rule averages over ranks what it needs, and DistributedDataParallel would average gradients that it "
    "does not use, or wait for some that never come: run the model without it (model.module), and give the rule "
    "process_group=torch.distributed.group.WORLD. (In Lightning: a DDPStrategy whose configure_ddp does nothing)"
)


def register_synapse(layer_type: type[nn.Module], channel_dim: int) -> None:
    """Make every rule treat layers of exactly this type as synapses.

    The layer must take one tensor and return ``u = W x + b``: affine in its parameter ``weight``, whose
    first dimension counts the postsynaptic neurons, and in ``bias``, if it has one that is not ``None``.

    Args:
        layer_type: the class; subclasses are not included.
        channel_dim: the dimension of the output that counts the neurons, counted from the end
            (``nn.Linear``: -1, ``nn.Conv2d``: -3), so that a missing batch dimension does not matter.

    Raises:
        ValueError: if ``channel_dim`` is not negative.

    Example::

        class MaskedLinear(nn.Linear): ...
        bioopt.register_synapse(MaskedLinear, channel_dim=-1)
    """
    if channel_dim >= 0:
        raise ValueError(
            f"register_synapse({layer_type.__name__}): channel_dim={channel_dim} must be negative, counted from the end"
        )
    _CHANNEL_DIM[layer_type] = channel_dim


@dataclass(eq=False)
class Synapse:
    """One watched layer: where it stands, and which of its output's dimensions counts neurons."""

    name: str
    layer: nn.Module
    channel_dim: int
    group: int = -1  # index of its param group
    index: int = -1  # its place among the watched
    is_readout: bool = False
    neurons: nn.Module | None = None  # what turns its output into spikes, for rules that hear them

    @property
    def weight(self) -> nn.Parameter:
        """The synaptic weights, first dimension postsynaptic."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The neurons' bias, if they have one."""
        return getattr(self.layer, "bias", None)

    @property
    def pools(self) -> int:
        """The number of separate pools of neurons (``groups`` of a convolution)."""
        return getattr(self.layer, "groups", 1)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Weight and bias, where they are there and not frozen."""
        both = [(f"{self.name}.weight", self.weight), (f"{self.name}.bias", self.bias)]
        return [(name, p) for name, p in both if p is not None and p.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """`named_parameters`, without their names."""
        return [p for _, p in self.named_parameters()]


def find_synapses(module: nn.Module, prefix: str = "") -> list[Synapse]:
    """All plastic synapses of a module in registration order, shared layers once.

    Frozen layers (``weight.requires_grad`` is false) are passed over.

    Raises:
        ValueError: for a layer that has a weight matrix of its own but is no known synapse, or whose weight is no
            parameter.
    """
    found = []
    for name, layer in module.named_modules(prefix=prefix):
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        if type(layer) in _CHANNEL_DIM:
            if isinstance(layer.weight, nn.Parameter):
                if layer.weight.requires_grad:
                    found.append(Synapse(name or type(layer).__name__, layer, _CHANNEL_DIM[type(layer)]))
            elif own:
                raise ValueError(
                    f"layer '{name}' of type {type(layer).__name__} makes its weight anew of other parameters (by "
                    "prune, or the older spectral_norm or weight_norm of torch.nn.utils), and only a weight that is "
                    "itself a parameter can learn. Undo that (prune.remove, remove_spectral_norm, remove_weight_norm), "
                    "train the layer with another optimizer through bioopt.Mixed, or freeze it with "
                    "requires_grad_(False)."
                )
        elif any(p.ndim > 1 for p in own):
            known = ", ".join(t.__name__ for t in _CHANNEL_DIM)
            raise ValueError(
                f"layer '{name}' of type {type(layer).__name__} has weights but is not a known synapse ({known}). "
                f"Either bioopt.register_synapse({type(layer).__name__}, channel_dim=...) if it computes W x + b, "
                "or train it with another optimizer through bioopt.Mixed, or freeze it with requires_grad_(False)."
            )
    return found


@dataclass(frozen=True, eq=False)
class Rows:
    """Which samples of a batch the rows of a tensor are, where a layer runs on some of them."""

    index: Tensor  #: of each row the number of its sample
    count: int  #: of samples in the batch

    def among_all(self, rows: Tensor) -> Tensor:
        """The rows in their places among all samples; zeros for the other samples."""
        everything = rows.new_zeros(self.count, *rows.shape[1:])
        return everything.index_copy(0, self.index, rows)


_ROWS: ContextVar[Rows | None] = ContextVar("_ROWS", default=None)


@contextmanager
def on_rows(index: Tensor, count: int) -> Iterator[None]:
    """Say to the rules that what runs inside sees, as its rows, these samples of so many.

    A module that sends samples different ways (`bioopt.nn.Gate`) opens it around each way, so that rules which credit
    each sample by itself know whose rows they see. Every way is to be run each time, on no samples if need be, so that
    layers fire in one order. Inside another one, ``index`` counts the rows of that.

    Args:
        index: of each row, the number of its sample.
        count: of samples among which ``index`` chooses.
    """
    outer = _ROWS.get()
    token = _ROWS.set(Rows(index, count) if outer is None else Rows(outer.index[index], outer.count))
    try:
        yield
    finally:
        _ROWS.reset(token)


def rows_seen(synapse: Synapse, u: Tensor) -> Rows | None:
    """Which samples the activity ``u`` of a synapse that is firing belongs to; ``None``: it ran on all.

    Raises:
        RuntimeError: if it ran on some, and the first dimension of ``u`` does not count them.
    """
    rows = _ROWS.get()
    if rows is not None and (u.ndim < 2 or len(u) != len(rows.index)):
        raise RuntimeError(
            f"layer '{synapse.name}' ran on {len(rows.index)} of {rows.count} samples, but its activity has the shape "
            f"{tuple(u.shape)}: a layer on a pathway that some samples skip needs them along its first dimension. Keep "
            "other dimensions apart from it there, or let all samples take all pathways (active=None)"
        )
    return rows


class _Anchor(torch.autograd.Function):
    """Gives a detached tensor a graph that ends here, so that a user's ``loss.backward()`` has something to do.

    In place and not a leaf, so that it costs nothing and ``ReLU(inplace=True)`` may follow.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(u)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:
        return tangent


class _Hook:
    """A forward hook that neither keeps the recorder alive nor survives a copy of the model."""

    def __init__(self, recorder: Recorder | None = None, method: str = "") -> None:
        self._recorder = weakref.ref(recorder) if recorder is not None else None
        self._method = method

    @property
    def recorder(self) -> Recorder | None:
        """Whose it is, if that is still there."""
        return None if self._recorder is None else self._recorder()

    @torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        recorder = self.recorder
        return None if recorder is None else getattr(recorder, self._method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


Visit = Callable[[Synapse, Tensor], Tensor | None]
Hear = Callable[[Synapse, Tensor, Tensor], None]


@dataclass
class _Firing:
    synapse: Synapse
    hidden: saved_tensors_hooks | None  # None: the output is not cut
    grad_mode: bool
    x: Tensor | None


class Recorder:
    """Forward hooks on a set of synapses, and what to do when one fires.

    Attributes:
        visit: called with ``(synapse, u)`` as a synapse fires, ``u`` carrying a graph that ends at the layer's own
            parameters. A tensor that it returns is handed on in place of ``u``. ``None``: asleep, the model behaves
            as if nothing watched it. Held weakly where it is a bound method.
        anchored: whether the detached outputs handed on require grad, so that a loss made of nothing else can
            still be sent through ``backward()``.
        hear: called with ``(synapse, x, s)`` as the ``neurons`` of an awake synapse have spoken: what entered it and
            what they made of it (the first of their outputs), in place of ``visit``. Held weakly where it is a bound
            method.
        presynaptic: what entered the synapse that is being visited.
        fired: the synapses that fired since `reset`, in order of first firing, with the last one to fire at the end.
        beneath: parameters trained by gradients, seen below a cut since `reset` (filled while ``trace`` is set).
    """

    def __init__(self) -> None:
        self.synapses: dict[nn.Module, Synapse] = {}
        self.anchored = False
        self.trace = False
        self.presynaptic: Tensor | None = None
        self.fired: dict[Synapse, None] = {}
        self.beneath: set[Tensor] = set()
        self._visit: Callable[[], Visit | None] | None = None
        self._hear: Callable[[], Hear | None] | None = None
        self._awaited: dict[Synapse, tuple[Tensor, torch.Size]] = {}  # what entered, of those whose neurons are due
        self._firing: list[_Firing | None] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[Any] = []
        # Not bound to self: the hooks must go when the recorder does.
        self.close = weakref.finalize(self, _remove, self._handles)

    def watch(self, synapse: Synapse) -> None:
        """Install the hooks of one synapse. Before `torch.compile` sees the model: later hooks never fire there."""
        layer = synapse.layer
        synapse.index = len(self.synapses)
        self.synapses[layer] = synapse
        self._handles.append(layer.register_forward_pre_hook(_Hook(self, "_before"), with_kwargs=True))
        # always_call, so that a layer that raises leaves grad mode as it was.
        self._handles.append(layer.register_forward_hook(_Hook(self, "_after"), always_call=True))
        others = [other for other in self.synapses.values() if other is not synapse]
        if synapse.neurons is not None and all(other.neurons is not synapse.neurons for other in others):
            self._handles.append(synapse.neurons.register_forward_hook(_Hook(self, "_spoken")))

    @property
    def visit(self) -> Visit | None:
        """What happens as a synapse fires; ``None`` is asleep."""
        return None if self._visit is None else self._visit()

    @visit.setter
    def visit(self, visit: Visit | None) -> None:
        self._visit = _weakly(visit)

    @property
    def hear(self) -> Hear | None:
        """What happens as the neurons of a synapse have spoken."""
        return None if self._hear is None else self._hear()

    @hear.setter
    def hear(self, hear: Hear | None) -> None:
        self._hear = _weakly(hear)

    @contextmanager
    def visiting(self, visit: Visit | None) -> Iterator[None]:
        """Visit with something else, or sleep, for a while."""
        before, self._visit = self._visit, None
        self.visit = visit
        try:
            yield
        finally:
            self._visit = before

    def reset(self) -> None:
        """Forget what has fired."""
        self.fired.clear()
        self.beneath.clear()
        self._firing.clear()
        self._awaited.clear()

    def missing(self) -> str:
        """The first synapse whose neurons have not spoken since it fired, and what to do; empty where all have."""
        name = next((synapse.name for synapse in self._awaited), None)
        if name is None:
            return ""
        return (
            f"layer '{name}' has fired, but the neurons that were taken to follow it have said nothing; name those "
            f"that do: neurons={{'{name}': ...}}"
        )

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        synapse = self.synapses[layer]
        self._firing.append(None)
        if self._visit is None or not layer.training or not synapse.weight.requires_grad:
            return None
        watching = [hook.recorder for hook in layer._forward_pre_hooks.values() if isinstance(hook, _Hook)]
        if any(other not in (None, self) and other._visit is not None for other in watching):
            raise RuntimeError(
                f"layer '{synapse.name}' is watched by two rules at once: close() the one that is not to learn from it "
                "any more, or give each its own part of the model (bioopt.Mixed)"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"layer '{synapse.name}' ran in training mode under torch.inference_mode(), where no plasticity is "
                "possible. Use torch.no_grad() to train, or model.eval() to evaluate."
            )
        if nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            raise RuntimeError(IN_DDP)
        if self.trace:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    self.beneath |= _leaves(value)
        args = tuple(_detached(a) for a in args)
        kwargs = {k: _detached(v) for k, v in kwargs.items()}
        grad_mode = torch.is_grad_enabled()
        hidden = None
        if not synapse.is_readout:
            # A graph of the layer's own, out of reach of activation checkpointing around it; with autocast, not
            # through a half-precision copy of the weight that was cached without a graph.
            hidden = saved_tensors_hooks(_identity, _identity)
            hidden.__enter__()
            torch.set_grad_enabled(True)
            if torch.is_autocast_enabled(synapse.weight.device.type):
                torch.clear_autocast_cache()
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self._firing[-1] = _Firing(synapse, hidden, grad_mode, x)
        return args, kwargs

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        firing = self._firing.pop() if self._firing else None
        if firing is None:
            return None
        synapse = firing.synapse
        if firing.hidden is not None:
            firing.hidden.__exit__(None, None, None)
            torch.set_grad_enabled(firing.grad_mode)
        if output is None:  # the layer raised
            return None
        if _in_backward():  # activation checkpointing replays the layer: cut again, but it has fired already
            return None if synapse.is_readout else self._hand_on(output)
        self.fired.pop(synapse, None)
        self.fired[synapse] = None
        if synapse.is_readout:
            return None
        if synapse.neurons is not None:
            if synapse in self._awaited:
                missing = self.missing()
                self._awaited.clear()
                raise RuntimeError(missing)
            if firing.x is not None:
                self._awaited[synapse] = firing.x, output.shape
            return self._hand_on(output)
        visit = self.visit
        self.presynaptic = firing.x
        try:
            other = visit(synapse, output) if visit is not None else None
        finally:
            self.presynaptic = None
        return self._hand_on(output if other is None else other)

    def _spoken(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        due = [synapse for synapse in self._awaited if synapse.neurons is module]
        hear = self.hear
        for synapse in due:
            x, shape = self._awaited.pop(synapse)
            spikes = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(spikes, Tensor) or spikes.shape != shape:
                found = tuple(spikes.shape) if isinstance(spikes, Tensor) else type(spikes).__name__
                raise RuntimeError(
                    f"the {type(module).__name__} that follows layer '{synapse.name}' must return a spike for each of "
                    f"its outputs, {tuple(shape)} (alone, or first in a tuple), not {found}; name other neurons: "
                    f"neurons={{'{synapse.name}': ...}}"
                )
            if hear is not None:
                hear(synapse, x, spikes.detach())

    def _hand_on(self, u: Tensor) -> Tensor:
        u = _detached(u)
        if self.anchored and torch.is_grad_enabled():
            u = _Anchor.apply(u, self._anchor)
        return u


def _detached(value: Any) -> Any:
    """A tensor without its graph; a forward-mode tangent stays."""
    if not isinstance(value, Tensor):
        return value
    tangent = forward_ad.unpack_dual(value).tangent
    return value.detach() if tangent is None else forward_ad.make_dual(value.detach(), tangent.detach())


def _weakly(call: Any) -> Any:
    """A function that gives ``call``, which is held weakly where it is a bound method; ``None`` for ``None``."""
    if call is None:
        return None
    return weakref.WeakMethod(call) if hasattr(call, "__self__") else lambda: call


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _leaves(value: Tensor) -> set[Tensor]:
    """The leaf tensors that a gradient at ``value`` would reach."""
    if value.grad_fn is None:
        return {value} if value.requires_grad else set()
    leaves: set[Tensor] = set()
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        todo += [n for n, _ in node.next_functions if n is not None]
    return leaves
