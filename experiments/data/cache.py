"""The files that data sets are kept in: written once, by one process, and checked whenever they are read."""

from __future__ import annotations

from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .checks import SPLITS, check_data, check_form, check_returned
from .registry import DATA_SETS, NotThere, Tensors


def read(name: str, root: Path) -> tuple[Tensors, list[str]]:
    """The tensors of a data set's file, which its loader writes first where it is missing, and warnings about them.

    Raises:
        FileNotFoundError: it is missing, and could not be fetched.
        ValueError: the file is damaged, or nothing can be learned from it.
    """
    path = file_of(name, root)
    if not path.exists():
        _fetch(name, root, path)
    if name in DATA_SETS:
        remedy = f"delete {path} and run again to fetch data set '{name}' anew"
    else:
        remedy = f"write {path} again, or choose another data set"
    try:
        tensors = load_file(path)
        check_form(tensors)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); {remedy}") from None
    try:
        return check_data(tensors)
    except ValueError as error:
        raise ValueError(f"data set '{name}' cannot be learned: {error}; {remedy}") from None


def file_of(name: str, root: Path) -> Path:
    """Where a data set is kept."""
    return root / f"{name}.safetensors"


def _fetch(name: str, root: Path, path: Path) -> None:
    """Write a data set's file; where several processes need it, one writes it and the others wait."""
    if name not in DATA_SETS:
        known = ", ".join(other for other, data_set in DATA_SETS.items() if data_set.cached)
        raise FileNotFoundError(f"data set '{name}' is not at {path}, and only {known} can be fetched")
    lock = FileLock(root / f".{name}.lock")
    try:
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that fetches data set '{name}' to {root}", flush=True)
            lock.acquire()
    except OSError as error:
        raise FileNotFoundError(
            f"data set '{name}' is not at {path}, and data.root={root} cannot be written ({_first_line(error)}); "
            "set data.root=<folder that can>, or use data=digits, which needs no download"
        ) from None
    try:
        if not path.exists():  # the other process may have written it
            _write(_loaded(name, root, path), path)
    finally:
        lock.release()


def _loaded(name: str, root: Path, path: Path) -> Tensors:
    """What the data set's loader returns."""
    try:
        tensors = DATA_SETS[name].loader(root)
    except NotThere:
        raise
    except Exception as error:  # from the network, the disk, or a reader of damaged files
        raise FileNotFoundError(
            f"data set '{name}' is not at {path} and could not be fetched ({_first_line(error)}). Connect to the "
            "network, put the file there, set data.root=<folder that holds it>, or use data=digits, which needs no "
            "download." + "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        ) from error
    check_returned(name, tensors)  # before it is written, so that no file has to be deleted once the loader is right
    return tensors


def _write(tensors: Tensors, path: Path) -> None:
    """Write a data set's file, whole or not at all."""
    part = path.with_suffix(".part")
    try:
        # Copies: a file cannot hold tensors that share memory, or parts of others.
        save_file({key: tensors[key].clone(memory_format=torch.contiguous_format) for key in SPLITS}, part)
        part.replace(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be written ({_first_line(error)}); make room there, or set data.root=<another folder>"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
