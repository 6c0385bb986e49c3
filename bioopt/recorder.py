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

import copyreg
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
_TORCHS_OWN = frozenset(_CHANNEL_DIM)  # whose W x + b needs no proof


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


def is_known(layer: nn.Module) -> bool:
    """Whether a layer is of a type that rules watch, and its weight a parameter."""
    return type(layer) in _CHANNEL_DIM and isinstance(layer.weight, nn.Parameter)


@dataclass(eq=False)
class Synapse:
    """One watched layer: where it stands, and which of its output's dimensions counts neurons."""

    name: str
    layer: nn.Module
    channel_dim: int
    group: int = -1  # index of its param group
    index: int = -1  # its place among the watched
    is_readout: bool = False
    fixed_bias: bool = False  # excluded by name
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
        both = [(f"{self.name}.weight", self.weight), (f"{self.name}.bias", None if self.fixed_bias else self.bias)]
        return [(name, p) for name, p in both if p is not None and p.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """`named_parameters`, without their names."""
        return [p for _, p in self.named_parameters()]


UNKNOWN = "not a known synapse"


class Unwatchable(NamedTuple):
    """A layer that no rule can watch, and why."""

    name: str
    layer: nn.Module
    reason: str
    parameters: tuple[str, ...] = ()  #: the names to exclude in place of the layer, which holds other layers as well


def find_synapses(module: nn.Module, prefix: str = "") -> list[Synapse]:
    """All plastic synapses of a module in registration order, shared layers once.

    Frozen layers (``weight.requires_grad`` is false) are passed over.

    Raises:
        ValueError: for layers that have a weight matrix of their own but are no known synapses, or whose weight is no
            parameter. All are named.
    """
    found, unwatchable = survey(module, prefix)
    if unwatchable:
        raise ValueError(refusal("A learning rule", unwatchable))
    return found


def survey(
    module: nn.Module, prefix: str = "", excluded: Exclusion | None = None
) -> tuple[list[Synapse], list[Unwatchable]]:
    """The plastic synapses of a module in registration order, and the layers that cannot be watched."""
    found, unwatchable = [], []
    left_out = excluded or Exclusion.none()
    for name, layer in module.named_modules(prefix=prefix):
        if layer in left_out.layers:
            continue
        own = [(n, p) for n, p in layer.named_parameters(recurse=False) if p.requires_grad and p not in left_out.params]
        kind = type(layer)
        if kind in _CHANNEL_DIM:
            if isinstance(layer.weight, nn.Parameter):
                if layer.weight.requires_grad and layer.weight not in left_out.params:
                    apart = getattr(layer, "bias", None) in left_out.params
                    found.append(Synapse(name or kind.__name__, layer, _CHANNEL_DIM[kind], fixed_bias=apart))
            elif own:
                reason = (
                    "its weight is made anew of other parameters at each pass; undo that by prune.remove, "
                    "remove_spectral_norm or remove_weight_norm of torch.nn.utils"
                )
                unwatchable.append(Unwatchable(name, layer, reason))
        elif any(p.ndim > 1 for _, p in own):
            inside = [child for child in layer.modules() if type(child) in _CHANNEL_DIM]
            names = tuple(".".join(filter(None, (name, n))) for n, p in own if p.ndim > 1) if inside else ()
            unwatchable.append(Unwatchable(name, layer, UNKNOWN, names))
    return found, unwatchable


def refusal(rule: str, unwatchable: list[Unwatchable]) -> str:
    """The message about layers that cannot be watched: all of them, and the line that excludes them."""
    whole = [one.layer for one in unwatchable if not one.parameters]
    unwatchable = [
        one for one in unwatchable if not any(one.layer is not w and one.layer in w.modules() for w in whole)
    ]
    alone = {type(one.layer) for one in unwatchable if one.reason == UNKNOWN and not one.parameters}
    names = [
        repr(name) for one in unwatchable if type(one.layer) not in alone for name in one.parameters or (one.name,)
    ]
    types = [f"torch.nn.{t.__name__}" if getattr(nn, t.__name__, None) is t else t.__name__ for t in alone]
    told = "; ".join(
        f"layer '{one.name}' of type {type(one.layer).__name__}"
        + (f" with {', '.join(one.parameters)}" if one.parameters else "")
        + f" ({one.reason})"
        for one in unwatchable
    )
    known = (
        f"It knows {', '.join(t.__name__ for t in _CHANNEL_DIM)}; give another type that computes W x + b to "
        "bioopt.register_synapse(type, channel_dim=...). "
    )
    them = "them" if unwatchable[1:] else "it"
    return (
        f"{rule} cannot train {told}. {known if alone else ''}To leave {them} untrained, or to another optimizer of "
        f"bioopt.Mixed, write exclude=[{', '.join([*sorted(types), *names])}], or freeze {them} with "
        "requires_grad_(False)"
    )


class Exclusion(NamedTuple):
    """What a rule is to leave alone."""

    layers: set[nn.Module]  #: excluded modules, with all that is inside them
    params: set[Tensor]  #: their parameters, and those excluded by name
    kinds: set[type[nn.Module]]  #: of layers, also of those given later

    @classmethod
    def none(cls) -> Exclusion:
        """Nothing."""
        return cls(set(), set(), set())

    @classmethod
    def of(cls, rule: str, exclude: Any, given: Iterable[tuple[str, nn.Module]]) -> Exclusion:
        """Resolve ``exclude`` (types, modules, names of modules or parameters) among the modules that were given.

        Raises:
            TypeError: an entry of another type; names where no modules were given.
            ValueError: a name, or a module, that is not among those given.
        """
        if isinstance(exclude, str | int | type | nn.Module):
            exclude = [exclude]
        # The layers of a Sequential are named by numbers.
        entries, excluded = [str(e) if type(e) is int else e for e in exclude], cls.none()
        if not entries:
            return excluded
        modules: dict[str, nn.Module] = {}
        params: dict[str, Tensor] = {}
        for prefix, module in given:
            modules |= dict(module.named_modules(prefix=prefix, remove_duplicate=False))
            params |= dict(module.named_parameters(prefix=prefix, remove_duplicate=False))
        if not modules:
            raise TypeError(f"{rule}: exclude={entries} needs modules to look in: give the model, not its parameters")
        roots: list[nn.Module] = []
        for entry in entries:
            if isinstance(entry, type) and issubclass(entry, nn.Module):
                excluded.kinds.add(entry)
                roots += [m for m in modules.values() if isinstance(m, entry)]
            elif isinstance(entry, nn.Module) and entry in modules.values():
                roots.append(entry)
            elif isinstance(entry, str) and entry in modules:
                roots.append(modules[entry])
            elif isinstance(entry, str) and entry in params:
                excluded.params.add(params[entry])
            elif isinstance(entry, str | nn.Module):
                shown = repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"
                raise ValueError(
                    f"{rule}: exclude has {shown}, which is no module or parameter of the model; names are those of "
                    "model.named_modules() and model.named_parameters()"
                )
            else:
                raise TypeError(
                    f"{rule}: exclude has {entry!r}; it takes module types, modules, and names of modules or parameters"
                )
        for root in roots:
            excluded.add(root)
        return excluded

    def add(self, module: nn.Module) -> None:
        """Exclude a module with all that is inside it."""
        self.layers.update(module.modules())
        self.params.update(module.parameters())


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


class _Link(torch.autograd.Function):
    """Stands for one firing, or joins several, in the graph of a loss; its output is a token that others depend on.

    A backward pass arrives here without a gradient. Tokens link firing to firing past all that lies between layers,
    so that nothing of a user's own runs backward, or is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, firing: Firing | None, anchor: Tensor, *tokens: Tensor) -> Tensor:
        ctx.firing, ctx.tokens, ctx.spent = firing, tokens, False
        ctx.set_materialize_grads(False)
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        if ctx.firing is not None and (recorder := ctx.firing.recorder()) is not None:
            recorder.reached(ctx.firing)
        return (None,) * len(ctx.needs_input_grad)


class _Cut(torch.autograd.Function):
    """Hands ``u`` on unchanged. A gradient goes on only where it is kept; the tokens get None, which costs nothing.

    In place and not a leaf, so that it costs nothing in the forward pass either and ``ReLU(inplace=True)`` may follow.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, firing: Firing | None, kept: bool, *tokens: Tensor) -> Tensor:
        ctx.firing, ctx.kept, ctx.tokens = firing, kept, tokens
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(u)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        firing: Firing | None = ctx.firing
        if firing is not None and (recorder := firing.recorder()) is not None:
            if firing.synapse.is_readout:
                recorder.reached(firing)
            elif gradient is not None and not ctx.kept:
                recorder.bypass(firing, gradient)
        return gradient if ctx.kept else None, *[None] * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:
        return tangent


_TOKEN = "bioopt"  # in a node's metadata: the token of all firings behind it


def _tokens_of(values: Iterable[Any]) -> list[Tensor]:
    """The tokens of the firings from which these tensors were made, through whatever lies between."""
    ends = [v.grad_fn for v in values if isinstance(v, Tensor) and v.grad_fn is not None]
    return _live(_token_behind(end) for end in ends)


def _token_behind(end: Any) -> Tensor | None:
    """One token for all firings behind a node. Each node of a graph is visited once, however many firings follow it."""
    todo = [end]
    while todo:
        node = todo[-1]
        if _visited(node):
            todo.pop()
            continue
        behind = [n for n, _ in node.next_functions if n is not None]
        if new := [n for n in behind if not _visited(n)]:
            todo += new
            continue
        node.metadata[_TOKEN] = _joined(_live(_token_at(n) for n in behind))
        todo.pop()
    return _token_at(end)


def _visited(node: Any) -> bool:
    return _is(node, _Cut) or not node.next_functions or _TOKEN in node.metadata


def _token_at(node: Any) -> Tensor | None:
    if not _is(node, _Cut):
        token: Tensor | None = node.metadata.get(_TOKEN) if node.next_functions else None
        return token
    if len(node.tokens) > 1:
        node.tokens = (_joined(list(node.tokens)),)
    return node.tokens[0] if node.tokens else None


def _joined(tokens: list[Tensor]) -> Tensor | None:
    if len(tokens) < 2:
        return tokens[0] if tokens else None
    with torch.enable_grad():
        token: Tensor = _Link.apply(None, tokens[0].detach(), *tokens)
    return token


def _live(tokens: Iterable[Tensor | None]) -> list[Tensor]:
    """Those of the tokens, each once, behind which there is a firing that a backward pass can still count."""
    return [token for token in {id(t): t for t in tokens if t is not None}.values() if _matters(token.grad_fn)]


def _matters(end: Any) -> bool:
    todo, seen = [end], []
    while todo:
        node = todo.pop()
        if not _is(node, _Link) or node.spent:  # another one: an anchor
            continue
        if node.firing is not None and node.firing.matters():
            return True
        seen.append(node)
        todo += [token.grad_fn for token in node.tokens]
    for node in seen:
        node.spent = True
    return False


def _is(node: Any, function: type[torch.autograd.Function]) -> bool:
    return getattr(node, "_forward_cls", None) is function


class _Hook:
    """A forward hook that does not keep the recorder alive. Copies of the model lack it, see `_leave_no_trace`."""

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
        if recorder is None or args[0] not in recorder.watched:  # moved to another module, as by quantization
            return None
        return getattr(recorder, self._method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


_HOOK_TABLES = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


def _leave_no_trace(kind: type[nn.Module]) -> None:
    """Let copies and saved files of modules of this type carry no hook of ours.

    Types that make their own copies carry hooks that do nothing.
    """
    if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:
        copyreg.dispatch_table.setdefault(kind, _reduced)


def _reduced(module: nn.Module) -> Any:
    """What `copy` and `pickle` make a module of, without our hooks."""
    made, arguments, state, *rest = (*module.__reduce_ex__(2), None)[:5]
    if isinstance(state, dict):
        state = dict(state)
        for table, flags in _HOOK_TABLES.items():
            hooks = state.get(table) or {}
            ours = {key for key, hook in hooks.items() if isinstance(hook, _Hook)}
            for name in (table, *flags) if ours else ():
                kept = [(key, value) for key, value in (state.get(name) or {}).items() if key not in ours]
                state[name] = OrderedDict(kept)
    return made, arguments, state, *rest


@torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _unhide() -> None:
    """Take off the hooks of a layer that was interrupted: left there, they would keep every graph alive."""
    tensors = torch._C._autograd
    while (top := tensors._top_saved_tensors_default_hooks(True)) is not None and top[0] is _identity:
        tensors._pop_saved_tensors_default_hooks()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


Visit = Callable[[Synapse, Tensor], Tensor | None]
Hear = Callable[[Synapse, Tensor, Tensor], None]
Confirm = Callable[["Firing"], None]


@dataclass(eq=False)
class Firing:
    """One pass through a synapse.

    A rule that learns from a loss puts what the firing is to teach into ``pending``, where it waits for a backward
    pass to arrive (`Recorder.confirm`). The graph of the loss holds the firing, so that it ends with a loss that is
    thrown away.
    """

    synapse: Synapse
    recorder: weakref.ref[Recorder]
    grad_mode: bool  #: whether the model ran with gradients
    x: Tensor | None = None  #: what entered, detached; until the layer has run
    window: int = 0  #: of `Recorder.discard`
    step: int = 0  #: of `Recorder.reset`
    pending: Any = None
    hidden: saved_tensors_hooks | None = None  # None: the output is not cut
    tokens: list[Tensor] = field(default_factory=list)  # of the firings that it was made from; until the layer has run
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the arguments, where the layer is to be verified

    def matters(self) -> bool:
        """Whether a backward pass that arrives here, or at what is beneath, can still make a difference."""
        recorder = self.recorder()
        if recorder is None or self.window != recorder.window:
            return False
        return self.step == recorder.step if self.pending is None else not self.pending.learned


class Recorder:
    """Forward hooks on a set of synapses, and what to do when one fires.

    Attributes:
        synapses: by their layers.
        watched: all modules with a hook.
        visit: called with ``(synapse, u)`` as a synapse fires, ``u`` carrying a graph that ends at the layer's own
            parameters. A tensor that it returns is handed on in place of ``u``. ``None``: asleep, the model behaves
            as if nothing watched it. Held weakly where it is a bound method.
        anchored: whether the detached outputs handed on require grad, so that a loss made of nothing else can
            still be sent through ``backward()``.
        linked: whether firings leave a token in the graph, by which a backward pass finds them.
        confirm: called with a firing when a backward pass arrives there. Held weakly where it is a bound method.
        hear: called with ``(synapse, x, s)`` as the ``neurons`` of an awake synapse have spoken: what entered it and
            what they made of it (the first of their outputs), in place of ``visit``. Held weakly where it is a bound
            method.
        firing: that of the synapse which is being visited, or whose neurons have just spoken.
        presynaptic: what entered the synapse that is being visited.
        bypassed: synapses that a gradient has reached past every readout -> whether they also lead to one.
        fired: the synapses that fired since `reset`, in order of first firing, with the last one to fire at the end.
        beneath: parameters trained by gradients, seen below a cut since `reset` (filled while ``trace`` is set).
    """

    def __init__(self) -> None:
        self.synapses: dict[nn.Module, Synapse] = {}
        self.watched: set[nn.Module] = set()
        self.anchored = False
        self.linked = False
        self.trace = False
        self.firing: Firing | None = None
        self.fired: dict[Synapse, None] = {}
        self.beneath: set[Tensor] = set()
        self.bypassed: dict[Synapse, bool] = {}
        self.window = 0
        self.step = 0
        self._visit: Callable[[], Visit | None] | None = None
        self._hear: Callable[[], Hear | None] | None = None
        self._confirm: Callable[[], Confirm | None] | None = None
        self._awaited: dict[Synapse, tuple[Firing, torch.Size, Tensor | None]] = {}  # those whose neurons are due
        self._firings: list[Firing | None] = []
        self._ends: list[Any] = []  # weak references to the nodes of the readouts that have fired
        self._verified: set[nn.Module] = set()
        self.anchor = torch.zeros((), requires_grad=True)
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
        _leave_no_trace(type(layer))
        self.watched.add(layer)
        others = [other for other in self.synapses.values() if other is not synapse]
        if synapse.neurons is not None and all(other.neurons is not synapse.neurons for other in others):
            self._handles.append(synapse.neurons.register_forward_hook(_Hook(self, "_spoken")))
            _leave_no_trace(type(synapse.neurons))
            self.watched.add(synapse.neurons)

    @property
    def presynaptic(self) -> Tensor | None:
        """What entered the synapse that is being visited."""
        return None if self.firing is None else self.firing.x

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

    @property
    def confirm(self) -> Confirm | None:
        """What happens as a backward pass arrives at a firing."""
        return None if self._confirm is None else self._confirm()

    @confirm.setter
    def confirm(self, confirm: Confirm | None) -> None:
        self._confirm = _weakly(confirm)

    def reached(self, firing: Firing) -> None:
        """A backward pass has arrived at a firing, through a readout or past it."""
        confirm = self.confirm
        if firing.window == self.window and confirm is not None:  # else it was discarded
            with torch.no_grad():
                confirm(firing)

    def bypass(self, firing: Firing, gradient: Tensor) -> None:
        """A gradient has arrived at the output of a layer, past every readout."""
        if firing.window != self.window or firing.synapse in self.bypassed:
            return
        captured = gradient.is_cuda and torch.cuda.is_current_stream_capturing()
        if not captured and bool(gradient.any()):  # some functions of a user's own make zeros of None
            self.bypassed[firing.synapse] = self._leads_to_readout(firing.synapse)

    def _leads_to_readout(self, synapse: Synapse) -> bool:
        ends = [node for node in (end() for end in self._ends) if node is not None]
        links = (node for node in _graph(ends) if _is(node, _Link) and node.firing is not None)
        return any(link.firing.synapse is synapse for link in links)

    def restoring(self) -> Callable[[], None]:
        """What leaves the recorder as it is now, with no firing under way."""
        before = self._visit

        def restore() -> None:
            self._visit = before
            self.reset()

        return restore

    def discard(self) -> None:
        """No firing up to now will count any more, whatever backward pass may reach it."""
        self.window += 1
        self.reset()

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
        self.step += 1
        _unhide()
        self.fired.clear()
        self.beneath.clear()
        self.bypassed.clear()
        self.firing = None
        self._firings.clear()
        self._awaited.clear()
        self._ends.clear()

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
        self._firings.append(None)
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
        grad_mode = torch.is_grad_enabled()
        firing = Firing(synapse, weakref.ref(self), grad_mode, window=self.window, step=self.step)
        if grad_mode:
            firing.tokens = _tokens_of((*args, *kwargs.values()))
        args = tuple(_detached(a) for a in args)
        kwargs = {k: _detached(v) for k, v in kwargs.items()}
        if type(layer) not in _TORCHS_OWN and layer not in self._verified:
            firing.call = args, kwargs
        if not synapse.is_readout:
            # A graph of the layer's own, out of reach of activation checkpointing around it; with autocast, not
            # through a half-precision copy of the weight that was cached without a graph.
            firing.hidden = saved_tensors_hooks(_identity, _identity)
            firing.hidden.__enter__()
            torch.set_grad_enabled(True)
            if torch.is_autocast_enabled(synapse.weight.device.type):
                torch.clear_autocast_cache()
        firing.x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self._firings[-1] = firing
        return args, kwargs

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        firing = self._firings.pop() if self._firings else None
        if firing is None:
            return None
        synapse = firing.synapse
        if firing.hidden is not None:
            firing.hidden.__exit__(None, None, None)
            torch.set_grad_enabled(firing.grad_mode)
            firing.hidden = None
        if output is None:  # the layer raised
            return None
        if _in_backward():  # activation checkpointing replays the layer: cut again, but it has fired already
            return self._hand_on(output, firing)
        if firing.call is not None and not torch._C._functorch.is_batchedtensor(output):
            if _verify(synapse, output, *firing.call):
                self._verified.add(layer)
            firing.call = None
        self.fired.pop(synapse, None)
        self.fired[synapse] = None
        if synapse.is_readout:
            firing.x = None
            return self._hand_on(output, firing)
        if synapse.neurons is not None:
            if synapse in self._awaited:
                missing = self.missing()
                self._awaited.clear()
                raise RuntimeError(missing)
            token = self._token(firing)
            if firing.x is not None:
                self._awaited[synapse] = firing, output.shape, token
            return self._hand_on(output, firing, token)
        visit = self.visit
        self.firing = firing
        try:
            other = visit(synapse, output) if visit is not None else None
        finally:
            self.firing = None
            firing.x = None
        return self._hand_on(output if other is None else other, firing, self._token(firing))

    def _spoken(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        due = [synapse for synapse in self._awaited if synapse.neurons is module]
        hear, linked = self.hear, None
        for synapse in due:
            firing, shape, token = self._awaited.pop(synapse)
            spikes = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(spikes, Tensor) or spikes.shape != shape:
                found = tuple(spikes.shape) if isinstance(spikes, Tensor) else type(spikes).__name__
                raise RuntimeError(
                    f"the {type(module).__name__} that follows layer '{synapse.name}' must return a spike for each of "
                    f"its outputs, {tuple(shape)} (alone, or first in a tuple), not {found}; name other neurons: "
                    f"neurons={{'{synapse.name}': ...}}"
                )
            x, firing.x = firing.x, None
            if hear is not None and x is not None:
                self.firing = firing
                try:
                    hear(synapse, x, spikes.detach())
                finally:
                    self.firing = None
            if token is not None:  # spikes need not have a graph: what they lead to is linked to the synapse here
                linked = _Cut.apply((spikes if linked is None else linked).clone(), firing, True, token)
        if linked is None:
            return None
        if not isinstance(output, tuple | list):
            return linked
        outputs = [linked, *output[1:]]
        return output._make(outputs) if hasattr(output, "_make") else type(output)(outputs)

    def _token(self, firing: Firing) -> Tensor | None:
        """What the graph of a loss knows of this firing."""
        if not (self.linked and firing.grad_mode):
            return None
        token: Tensor = _Link.apply(firing, self.anchor, *firing.tokens)
        return token

    def _hand_on(self, u: Tensor, firing: Firing, token: Tensor | None = None) -> Tensor:
        tokens, firing.tokens = firing.tokens, []
        if firing.synapse.is_readout:
            if not (tokens and u.requires_grad):
                return u
            linked: Tensor = _Cut.apply(u.clone() if u._is_view() else u, firing, True, *tokens)
            self._ends = [end for end in self._ends if end() is not None] + [weakref.ref(linked.grad_fn)]
            return linked
        u = _detached(u)
        if not torch.is_grad_enabled():
            return u
        tokens = [self.anchor] * self.anchored + tokens if token is None else [token]
        return _Cut.apply(u, firing if token is not None else None, False, *tokens) if tokens else u


def _graph(ends: Iterable[Any]) -> Iterator[Any]:
    """All nodes of a graph that lie behind these, each once."""
    seen, todo = set(), list(ends)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo += [n for n, _ in node.next_functions if n is not None]


class _Plain(nn.Module):
    """A layer called past its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def _verify(synapse: Synapse, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer of a registered type is ``u = W x + b``, as far as what came in can show it.

    A signal for every other neuron must leave a local product in their rows alone, and the same one at other weights.

    Raises:
        RuntimeError: it is not.
    """
    layer, weight, channel = synapse.layer, synapse.weight.detach(), synapse.channel_dim
    kind, wrong = type(layer).__name__, ""
    product = None
    if u.ndim < -channel or u.shape[channel] != len(weight):
        wrong = f"has {len(weight)} rows of weights and gave an output of shape {tuple(u.shape)}"
    elif u.numel():
        told = torch.arange(len(weight), device=weight.device) % 2 == 0
        signal = told.to(u.dtype).view(-1, *[1] * (-channel - 1)).expand_as(u)
        pattern = torch.linspace(0.9, 1.15, weight.numel(), dtype=weight.dtype, device=weight.device).view_as(weight)
        nearby = (weight + 0.01 * weight.abs().mean()) * pattern
        product, other = (_product(layer, w, signal, args, kwargs) for w in (weight, nearby))
        coarse = 4 * max(torch.finfo(t.dtype).eps for t in (u, weight)) ** 0.5 * product.abs().max()
        if bool((product[~told] != 0).any()) or bool((product - other).abs().max() > coarse):
            wrong = "computes something else"
    if wrong:
        raise RuntimeError(
            f"layer '{synapse.name}' of type {kind} was registered as u = W x + b with its neurons along dimension "
            f"{channel} and a row of W for each, but it {wrong}. Correct bioopt.register_synapse({kind}, "
            f"channel_dim=...), or leave it out by exclude=[{kind}]"
        )
    return product is not None and bool(product.any())


def _product(layer: nn.Module, weight: Tensor, signal: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``Σ s xᵀ`` with another weight; buffers and the random state stay as they are."""
    weight = weight.clone().requires_grad_()
    state = {f"layer.{name}": b.clone() for name, b in layer.named_buffers()} | {"layer.weight": weight}
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        u = torch.func.functional_call(_Plain(layer), state, args, kwargs)
        (product,) = torch.autograd.grad(u, weight, signal.to(u.dtype), allow_unused=True)
    return torch.zeros_like(weight) if product is None else product


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
    return {node.variable for node in _graph([value.grad_fn]) if hasattr(node, "variable")}
