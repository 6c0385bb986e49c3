"""`Probe`: one closure, evaluated several times under the same conditions."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    """Do some work, and always call the functions that it has put on the list, last first; interrupts wait.

    An interrupt (Ctrl-C) may arrive at any time, also while undoing, so that a function may be called again after it
    ran in part or in whole.
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


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Restore training or evaluation mode of every module at the end of a ``with`` block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def restoring_grad_mode() -> Callable[[], None]:
    """A function that restores grad mode, which an interrupted ``with torch.no_grad()`` may not."""
    return partial(set_grad_mode, torch.is_grad_enabled())


class Known:
    """What an optimizer has learned about its closure."""

    def __init__(self) -> None:
        self.roots: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()  #: modules given to the optimizer
        self.modules: WeakKeyDictionary[nn.Module, _Buffers | None] = WeakKeyDictionary()  #: others that it runs
        self.code: Any = None  #: of the closure that was searched for modules
        self.needs_grad = False  #: it calls ``backward()`` unconditionally
        self.autocast: torch.dtype | None = None  #: the precision of its autocast, if any

    def all(self) -> list[nn.Module]:
        """All modules that the closure may run."""
        return list(dict.fromkeys([*(m for root in self.roots for m in root.modules()), *self.modules]))

    def buffers(self, module: nn.Module) -> _Buffers:
        """The buffers of a module; those that have not changed since the last call are not copied again."""
        buffers = _Buffers(module, self.modules.get(module))
        if buffers.held():
            self.modules[module] = buffers
        return buffers


def code_of(closure: Any) -> tuple[Any, ...]:
    """The code of a closure and the modules that it holds, which differ if it may run other modules."""
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
    """A closure called ``backward()`` in an evaluation without a graph."""


class Probe:
    """One closure, evaluated several times under the same conditions.

    Every evaluation starts from the same global random state (so that all use the same dropout masks) and makes new
    half-precision copies of weights. In the end the buffers of all modules in training mode (statistics of batch norm,
    vectors of spectral norm, counters) have the values that the first evaluation gave them.

    Args:
        closure: runs the model and returns the loss.
        params: the parameters that it depends on.
        known: facts about the closure, to be completed: the first evaluation of a new closure looks for its modules,
            which bare parameters do not show, and a compiled model shows only while it compiles.
        undo: the functions to call in the end (see `settled`).

    Attributes:
        count: the number of evaluations since the start or the last restart.
        made: the number of all evaluations.
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
        self.count = 0
        self._needs_gradients = False  # in one of the evaluations
        self.made = 0
        self._before: dict[nn.Module, _Buffers] = {}
        self._after: dict[nn.Module, _Buffers] = {}
        self._attributes: dict[nn.Module, dict[str, tuple[Tensor, int | None]]] = {}
        undo.append(self.close)

    @property
    def always_grad(self) -> bool:
        """Whether the closure is known to call ``backward()`` unconditionally."""
        return self._known.needs_grad

    def __call__(self, *, grad: bool = False, copies: int = 1) -> Tensor:
        """Evaluate once; with ``grad`` the value keeps its graph, otherwise none is built if the closure allows.

        ``copies``: the number of evaluations in this one, inside `torch.func.vmap`.
        """
        value = self._evaluate(grad, copies)
        return value if grad else value.detach()

    def gradients(self, of: Sequence[Tensor], anchors: Sequence[Tensor] = ()) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """Evaluate once: the value, and the gradient of its mean, whether or not the closure calls ``backward()``.

        Args:
            of: the parameters to differentiate by; their ``.grad`` is set too. If there are none, no graph is built
                unless the closure needs one.
            anchors: `bioopt.core.reach.Reach.anchor` of rules that the backward pass must reach as well.
        """
        for p in of:
            p.grad = None
        self._needs_gradients = self._needs_gradients or bool(of)
        value = self(grad=bool(of))
        backward_where_missing(value, of, anchors)
        return value.detach(), {p: p.grad for p in of if p.grad is not None}

    def along_tangents(self) -> tuple[Tensor, Tensor | None]:
        """Evaluate once: the value, and its derivative along the tangents of the open forward-mode level."""
        value, tangent = forward_ad.unpack_dual(self._evaluate(False))
        return value.detach(), None if tangent is None else tangent.detach()

    @property
    def drew(self) -> bool:
        """Whether the last evaluation has drawn random numbers."""
        return not all(map(torch.equal, self._random_now(), self._random))

    def redraw(self) -> None:
        """Let the next evaluation draw new random numbers: another trial under the same conditions."""
        self._random = []

    def restart(self) -> None:
        """Restore the state before the first evaluation."""
        _restore(self._before)
        self.count = 0
        self._after = {}

    def _evaluate(self, grad: bool, copies: int = 1) -> Tensor:
        self._restart_random()
        if self.count == 0:
            self._before = {m: self._known.buffers(m) for m in self._known.all()}
        else:
            if not self._after:
                self._after = {m: _Buffers(m) for m in self._before}
            # In training mode batch norm does not read its statistics.
            _restore({m: b for m, b in self._before.items() if not (m.training and isinstance(m, NormBase))})
        torch.clear_autocast_cache()  # evaluations must not share half-precision copies of the weights
        code, watch = code_of(self._closure), None
        if self.count == 0 and self._known.code != code:
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
        self.count += copies
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
        """Let a rule evaluate; a second time with a graph if the closure turns out to need one."""
        if not callable(self._closure):
            raise TypeError(
                f"{rule}: step() takes a closure, a function that runs the model and returns the loss, not a "
                f"{torch.typename(self._closure)}; a rule of one forward pass also allows step() after loss.backward()"
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
        """Give buffers their values after one evaluation."""
        _restore(self._after)

    def agree(self, group: ProcessGroup) -> None:
        """Take the buffers of the first rank."""
        if group is None:
            return
        self._after = self._after or {m: _Buffers(m) for m in self._before}
        held = [value for buffers in self._after.values() for _, value in buffers.held()]
        for kind in dict.fromkeys((value.dtype, value.device) for value in held):  # each in one message
            alike = [value for value in held if (value.dtype, value.device) == kind]
            flat = torch.cat([value.flatten() for value in alike])
            dist.broadcast(flat, group=group, group_src=0)
            for value, first in zip(alike, torch.split(flat, [value.numel() for value in alike]), strict=True):
                value.copy_(first.view_as(value))

    def moved(self) -> list[str]:
        """Attributes of modules other than buffers whose tensors have changed since the first evaluation."""
        found = []
        for module, before in self._attributes.items():
            for name, (value, version) in _tensors(module).items():
                old, old_version = before.get(name, (None, None))
                if value is not old or version != old_version:
                    found.append(f"{type(module).__name__}.{name}")
        return list(dict.fromkeys(found))

    def _random_now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]

    def _restart_random(self) -> None:
        if not self._random:
            self._random = self._random_now()
        else:
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._devices, self._random[1:], strict=True):
                torch.get_device_module(device).set_rng_state(state, device)

    def _looking(self) -> Callable[[nn.Module, Any], None]:
        """A hook on all modules that inspects those which run on this thread."""
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


def prepare_forward_ad() -> None:
    """Let torch give its own warning at the first dual tensor, unseen."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _tensors(module: nn.Module) -> dict[str, tuple[Tensor, int | None]]:
    """The tensors among a module's plain attributes, and their versions."""
    return {name: (v, version_of(v)) for name, v in vars(module).items() if isinstance(v, Tensor)}


class _Buffers:
    """A copy of the buffers of a module.

    Args:
        module: the module.
        known: an earlier copy, from which unchanged values are taken.
    """

    def __init__(self, module: nn.Module, known: _Buffers | None = None) -> None:
        # The kernels of batch norm change its statistics without raising their version.
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
        """Each buffer with its copied value."""
        return [(saved[0], saved[2]) for saved in self._saved.values() if saved is not None]

    def restore(self, module: nn.Module) -> None:
        """Restore the values, in the tensors that had them."""
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
