"""`Probe`: one closure, evaluated several times under the same circumstances, with nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor, nn

from ._torch_private import NormBase, forward_gradients_enabled, in_dual_level, own_buffers, set_grad_mode, version_of
from .errors import warn
from .hooks import IN_PYTHON
from .integrations import recipe, refuse_trainer_options
from .losses import backward_where_missing
from .params import ProcessGroup
from .recorder import IN_DDP

__all__ = ["Closure", "Probe"]

Closure: TypeAlias = Callable[[], Any]
_T = TypeVar("_T")


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
    return partial(set_grad_mode, torch.is_grad_enabled())


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
    """What distinguishes closures that may run other modules: their code, and modules that they hold."""
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
    copies of weights are made again, and the buffers of all modules in training mode (statistics of batch norm, vectors
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
        self._needs_gradients = False  # in one of the evaluations
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

    def gradients(self, of: Sequence[Tensor], anchors: Sequence[Tensor] = ()) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """Evaluate once: the value, and the gradient of its mean, whether or not the closure calls ``backward()``.

        Args:
            of: the parameters whose gradients are wanted, which are left in their ``.grad`` too. Without any, no graph
                is built if the closure allows.
            anchors: `bioopt.core.reach.Reach.anchor` of rules that must see the backward pass as well.
        """
        for p in of:
            p.grad = None
        self._needs_gradients = self._needs_gradients or bool(of)
        value = self(grad=bool(of))
        backward_where_missing(value, of, anchors)
        return value.detach(), {p: p.grad for p in of if p.grad is not None}

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
            _restore({m: b for m, b in self._before.items() if not (m.training and isinstance(m, NormBase))})
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
        needs = "a backward pass in one evaluation of a step alone" if self._needs_gradients else "no backward pass"
        warn(
            f"{rule} needs {needs}, but the closure calls backward(). To save it, write: "
            f"if loss.requires_grad: loss.backward().{recipe()}"
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
                if in_dual_level() and not forward_gradients_enabled():
                    raise RuntimeError(NO_TANGENT)
                if torch.is_autocast_enabled(own.device.type):
                    self._known.autocast = torch.get_autocast_dtype(own.device.type)
            self._attributes.setdefault(module, _tensors(module))
            if module not in self._before:
                self._before[module] = _Buffers(module)

        return torch.compiler.disable(look, reason=IN_PYTHON)  # type: ignore[no-any-return]


NO_TANGENT = "a layer runs where forward AD is switched off, as in checkpoint(..., use_reentrant=True)"


def _tensors(module: nn.Module) -> dict[str, tuple[int, int | None]]:
    """The tensors that a module keeps as plain attributes, by identity and version."""
    return {name: (id(v), version_of(v)) for name, v in vars(module).items() if isinstance(v, Tensor)}


class _Buffers:
    """The buffers of a module as they are now.

    Args:
        module: whose.
        known: as they were before: values that are still the same are not copied.
    """

    def __init__(self, module: nn.Module, known: _Buffers | None = None) -> None:
        # The kernels of batch norm change its statistics without a new version.
        self._silent = isinstance(module, NormBase)
        self._saved: dict[str, tuple[Tensor, int | None, Tensor] | None] = {}
        for name, buffer in own_buffers(module).items():
            old = known._saved.get(name) if known is not None and not self._silent else None
            if buffer is None:
                self._saved[name] = None
            elif old is not None and old[0] is buffer and old[1] == version_of(buffer):
                self._saved[name] = old
            else:
                self._saved[name] = buffer, version_of(buffer), buffer.clone()

    def held(self) -> list[tuple[Tensor, Tensor]]:
        """Each buffer, and its value then."""
        return [(saved[0], saved[2]) for saved in self._saved.values() if saved is not None]

    def restore(self, module: nn.Module) -> None:
        """Put the values back, in the tensors that held them."""
        for saved in self._saved.values():
            if saved is not None and (self._silent or version_of(saved[0]) != saved[1]):
                saved[0].copy_(saved[2])
        for name in own_buffers(module).keys() - self._saved.keys():
            del own_buffers(module)[name]
        for name, saved in self._saved.items():
            own_buffers(module)[name] = None if saved is None else saved[0]


def _restore(saved: dict[nn.Module, _Buffers]) -> None:
    with torch.no_grad():
        for module, buffers in saved.items():
            buffers.restore(module)
