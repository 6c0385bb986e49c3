"""Chains of elementwise operations on large tensors, compiled into one pass over memory on request.

Such a chain costs one pass over memory for each operation; `torch.compile` makes one of all. That takes a compiler and
some seconds, so that nothing is compiled unless `compile_kernels` or the environment variable asks for it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import warn

__all__ = ["Kernel", "compile_kernels"]

VARIABLE = "BIOOPT_COMPILE_KERNELS"
SMALLEST = 2**16  # entries of a tensor that repay the call of a compiled kernel


def compile_kernels(mode: bool | str = True) -> None:
    """Compile the elementwise chains of large layers into one pass over memory each, on the CPU.

    `SoftHebb` under ``torch.autocast("cpu", torch.bfloat16)`` gains most: a tenth to a fifth of a step of its network
    on a CPU with AMX, and less where products take more of the time. The first step takes some ten seconds longer.
    Results are the same but for rounding.

    Args:
        mode: ``True``: compile; ``False``, the default of a process: do not; ``"auto"``: compile if there is a
            compiler. The environment variable ``BIOOPT_COMPILE_KERNELS`` (``0``, ``1`` or ``auto``) sets it from
            outside.

    Raises:
        ValueError: another mode.
        RuntimeError: ``True`` without a C++ compiler (``c++``, ``g++``, ``clang++``, or the environment's ``CXX``).
    """
    global _enabled
    if mode not in (True, False, "auto"):
        raise ValueError(f'compile_kernels({mode!r}) must be True, False or "auto"')
    found = compiler() is not None
    if mode is True and not found:
        raise RuntimeError(
            "compile_kernels(True) needs a C++ compiler, which torch.compile calls: install g++, set CXX, or write "
            'compile_kernels("auto")'
        )
    _enabled = bool(mode) and found


def compiler() -> str | None:
    """The path of the C++ compiler that `torch.compile` would call; ``None`` if there is none."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"] if sys.platform != "win32" else ["cl"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


class Kernel:
    """A function of tensors that is compiled where `compile_kernels` asks for it.

    Args:
        function: of tensors alone, so that one compiled form serves all numbers and shapes. What it changes, it changes
            last, so that it can be called again after a failure.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._compiled: Callable[..., Tensor] | None = None

    def runs(self, large: Tensor) -> bool:
        """Whether to call it for this tensor, in place of eager operations."""
        return _enabled and large.device.type == "cpu" and large.numel() >= SMALLEST and not torch.is_grad_enabled()

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The result; by eager operations if compilation fails."""
        global _enabled
        if self._compiled is None:
            self._compiled = torch.compile(self.function, dynamic=True)
        try:
            with torch.autocast("cpu", enabled=False):
                return self._compiled(*tensors)
        except Exception as error:  # whatever a compiler may raise
            _enabled = False
            warn(f"compile_kernels: torch.compile failed, so that nothing more is compiled: {error}")
            return self.function(*tensors)


def _from_environment() -> bool:
    value = os.environ.get(VARIABLE, "0").lower()
    if value not in ("0", "1", "auto", "true", "false"):
        raise ValueError(f"{VARIABLE}={value} must be 0, 1 or auto")
    return value in ("1", "auto", "true") and compiler() is not None


_enabled = _from_environment()
