"""Which samples of a batch a layer runs on, where it does not run on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Rows", "on_rows"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Which samples of a batch the rows of a tensor belong to."""

    index: Tensor  #: the number of each row's sample
    count: int  #: of samples in the batch

    def among_all(self, rows: Tensor) -> Tensor:
        """The rows in their places among all samples; zeros for the other samples."""
        everything = rows.new_zeros(self.count, *rows.shape[1:])
        return everything.index_copy(0, self.index, rows)


_ROWS: ContextVar[Rows | None] = ContextVar("_ROWS", default=None)


@contextmanager
def on_rows(index: Tensor, count: int) -> Iterator[None]:
    """Declare that the modules run inside see only some samples of the batch.

    A module that routes samples along different pathways (`bioopt.nn.Gate`) opens it around each pathway, so that
    rules which credit each sample by itself know whose rows they see. Run every pathway each time, with no samples if
    need be, so that layers always fire in the same order. Inside another one, ``index`` counts the rows of that.

    Args:
        index: the number of each row's sample.
        count: of samples among which ``index`` chooses.
    """
    outer = _ROWS.get()
    token = _ROWS.set(Rows(index, count) if outer is None else Rows(outer.index[index], outer.count))
    try:
        yield
    finally:
        _ROWS.reset(token)


def rows_now() -> Rows | None:
    """Which samples the modules that are running see; ``None``: all of them."""
    return _ROWS.get()
