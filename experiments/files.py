"""Files that are written whole or not at all, and folders locked by one process. Imports nothing of ours."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content if isinstance(content, bytes) else content.encode())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def alone(folder: Path, refusal: str) -> Iterator[None]:
    """Lock a folder for this process; if another has locked it, do not wait, as that may take hours.

    Raises:
        ValueError: another process has locked it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / ".lock").acquire(timeout=0))
        except Timeout:
            raise ValueError(refusal) from None
        except NotImplementedError:
            pass  # some network file systems have no locks
        yield
