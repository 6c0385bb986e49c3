"""Which samples of a batch a layer runs on, if not on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows", "on_rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """The samples of a batch that the rows of a tensor belong to."""

    index: Tensor  #: of each row's sample in the batch
    count: int  #: of samples in the batch

    def among_all(self, rows: Tensor) -> Tensor:
        """The rows at the indices of their samples; zeros for the other samples."""
        everything = rows.new_zeros(self.count, *rows.shape[1:])
        return everything.index_copy(0, self.index, rows)

    def equals(self, other: Rows | None) -> bool:
        """Whether these are the samples of the other."""
        return other is not None and self.count == other.count and torch.equal(self.index, other.index)


_ROWS: ContextVar[Rows | None] = ContextVar("_ROWS", default=None)


@contextmanager
def on_rows(index: Tensor, count: int) -> Iterator[None]:
    """Declare that the modules in a ``with`` block run on some samples of the batch only.

    A module that routes samples along different pathways (`bioopt.nn.Gate`) opens it around each pathway, so that
    rules with credit for each sample know to which samples the rows belong. Run every pathway each time, even with no
    samples, so that layers always fire in the same order. Blocks nest: ``index`` then refers to the rows of the outer
    one.

    Args:
        index: of each row's sample.
        count: the number of samples that ``index`` refers to.
    """
    outer = _ROWS.get()
    token = _ROWS.set(Rows(index, count) if outer is None else Rows(outer.index[index], outer.count))
    try:
        yield
    finally:
        _ROWS.reset(token)


def rows_now() -> Rows | None:
    """The samples that modules now run on; ``None``: all."""
    return _ROWS.get()
