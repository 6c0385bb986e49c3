"""Ctrl-C and SIGTERM end a command with one line, which has the command to resume it, and exit code 130 or 143.

This module is loaded before anything else of a run, so it must not import torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

_received: int | None = None
_command: str | None = None


def resume_with(command: str | None) -> None:
    """Set the command that resumes the current work; ``None`` where nothing can be resumed."""
    global _command
    _command = command


def check() -> None:
    """Raise KeyboardInterrupt again if a signal has come and the code it interrupted swallowed its exception."""
    if _received is not None:
        raise KeyboardInterrupt


def catch() -> None:
    """From now on SIGTERM raises KeyboardInterrupt too; a signal that is ignored, as under nohup, stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """End the process with one line when it is interrupted; of several ranks, the first prints it."""
    catch()
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            way = f"resume with: {_command}" if _command else "nothing can be resumed"
            name = signal.Signals(_received or signal.SIGINT).name
            print(f"{chr(10) * sys.stderr.isatty()}interrupted by {name}; {way}", file=sys.stderr, flush=True)
        sys.exit(exit_code())


def exit_code() -> int:
    """The exit code of a process that a signal ended, by the convention of shells."""
    return 128 + (_received or signal.SIGINT)


def _interrupt(number: int, _: Any) -> None:
    global _received
    if _received is None:
        _received = number
        raise KeyboardInterrupt
    # The first signal is being handled. A second Ctrl-C ends the process at once; but one of several processes
    # gets the same Ctrl-C twice, from the terminal and from the process that started it.
    one_of_several = "RANK" in os.environ or multiprocessing.parent_process() is not None
    if number == signal.SIGINT and not one_of_several:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
