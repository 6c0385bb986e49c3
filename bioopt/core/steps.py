"""Steps of a descent that are longer or shorter for some parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["in_shares"]


@contextmanager
def in_shares(shares: Mapping[Tensor, float]) -> Iterator[None]:
    """Let parameters make this share of each change that is made to them inside a ``with`` block.

    A parameter that stays as it is inside is the same bit for bit after it.
    """
    before = [p.detach().clone() for p in shares]
    try:
        yield
    finally:
        for p, was, share in zip(shares, before, shares.values(), strict=True):
            p.copy_(torch.lerp(was, p, share))
