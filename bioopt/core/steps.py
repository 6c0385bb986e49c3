"""Steps of a descent: longer or shorter for some parameters, and by one kernel where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, AdamW, Optimizer

__all__ = ["by_one_kernel", "in_shares"]

WITH_KERNEL = (Adam, AdamW, Adagrad)


def by_one_kernel(descent: Optimizer, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, with ``fused`` as it is fast and right on a CPU, unless ``foreach`` or ``fused=False`` was chosen.

    There torch steps in a loop by default, which takes several times as long. Its fused kernels walk through memory,
    and so are wrong, without an error, where a gradient or a running value lies in another order than its parameter.

    Args:
        descent: with the state of the parameters.
        groups: of parameters.
    """
    if type(descent) not in WITH_KERNEL:
        return groups
    chosen = []
    for group in groups:
        params = [p for p in group["params"] if p.grad is not None]
        free = group.get("fused") is not False and not group.get("foreach") and not group.get("differentiable")
        if free and all(p.device.type == "cpu" for p in params):
            group = {**group, "fused": all(_in_one_order(p, descent.state[p]) for p in params)}
        chosen.append(group)
    return chosen


def _in_one_order(p: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter and its running values are dense numbers in one order in memory; its gradient is made so."""
    grad = p.grad
    assert grad is not None
    running = [value for value in state.values() if isinstance(value, Tensor) and value.ndim]
    dense = p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))
    plain = type(p) in (Tensor, nn.Parameter) and p.dtype in (torch.float32, torch.float64) and not grad.is_sparse
    if not (dense and plain and all(v.dtype == p.dtype and v.stride() == p.stride() for v in running)):
        return False
    if grad.stride() != p.stride():
        p.grad = torch.empty_like(p).copy_(grad)
    return True


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
