"""The data sets by name, each with the function that loads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import SPLITS

Tensors = dict[str, Tensor]
Loader = Callable[[Path], Tensors]


class NotThere(FileNotFoundError):
    """Raised by a loader that lacks what it cannot fetch, such as a file; its message names the way out."""


@dataclass(frozen=True)
class DataSet:
    """A loader, and whether what it returns is kept in a file, so that it runs only once."""

    loader: Loader
    cached: bool


DATA_SETS: dict[str, DataSet] = {}


def register(name: str, *, cached: bool = True) -> Callable[[Loader], Loader]:
    """Register the loader of data set ``name``: a function of ``data.root`` that returns the tensors of `SPLITS`.

    Args:
        name: the data set's name, which is also that of its YAML file in ``conf/data``.
        cached: whether the tensors are kept in ``<root>/<name>.safetensors``; ``False`` for a loader that takes no
            time and needs no network.

    Raises:
        ValueError: another function is already registered by this name.
    """

    def decorate(loader: Loader) -> Loader:
        if name in DATA_SETS and _place(DATA_SETS[name].loader) != _place(loader):
            raise ValueError(f"data set '{name}' is already registered, by {'.'.join(_place(DATA_SETS[name].loader))}")
        DATA_SETS[name] = DataSet(loader, cached)
        return loader

    return decorate


def tensors(train: tuple[Any, Any], test: tuple[Any, Any]) -> Tensors:
    """The tensors that a loader returns, from the images (uint8, N×C×H×W) and labels of both parts."""
    parts = [torch.as_tensor(part) for part in (*train, *test)]
    return {
        name: part.contiguous() if name.endswith("images") else part.to(torch.uint8)
        for name, part in zip(SPLITS, parts, strict=True)
    }


def _place(loader: Loader) -> tuple[str, str]:
    return loader.__module__, loader.__qualname__
