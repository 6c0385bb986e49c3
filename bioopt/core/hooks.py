"""Forward hooks that keep no recorder alive, and that copies of a model lack."""

from __future__ import annotations

import copyreg
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ._torch_private import HOOK_TABLES

IN_PYTHON = "learning rules run in Python, around the compiled layers: leave fullgraph=True out"


class Watcher(Protocol):
    """What hooks call: the recorder of a rule, or a part of a rule that watches other modules."""

    watched: set[nn.Module]

    @property
    def active(self) -> bool:
        """Whether anything is called."""


class Hook:
    """A forward hook that calls a recorder without keeping it alive."""

    def __init__(self, recorder: Watcher | None = None, method: str = "") -> None:
        self._recorder = weakref.ref(recorder) if recorder is not None else None
        self._method = method

    @property
    def recorder(self) -> Watcher | None:
        """The recorder, if it still exists."""
        return None if self._recorder is None else self._recorder()

    @torch.compiler.disable(reason=IN_PYTHON)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:
        """Call the recorder."""
        recorder = self.recorder
        if recorder is None or args[0] not in recorder.watched:  # moved to another module, as by quantization
            return None
        return getattr(recorder, self._method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove these hooks at the end of a ``with`` block."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def leave_no_trace(kind: type[nn.Module]) -> None:
    """Let copies and saved files of modules of this type lack our hooks.

    Types that define their own copying keep hooks that do nothing.
    """
    if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:
        copyreg.dispatch_table.setdefault(kind, _reduced)


def _reduced(module: nn.Module) -> Any:
    """The reduction of a module for `copy` and `pickle`, without our hooks."""
    build, arguments, state, *rest = (*module.__reduce_ex__(2), None)[:5]
    if isinstance(state, dict):
        state = dict(state)
        for table, flags in HOOK_TABLES.items():
            hooks = state.get(table) or {}
            ours = {key for key, hook in hooks.items() if isinstance(hook, Hook)}
            for name in (table, *flags) if ours else ():
                kept = [(key, value) for key, value in (state.get(name) or {}).items() if key not in ours]
                state[name] = OrderedDict(kept)
    return build, arguments, state, *rest


def remove_all(handles: list[Any]) -> None:
    """Remove hooks from their modules, and empty the list."""
    for handle in handles:
        handle.remove()
    handles.clear()
