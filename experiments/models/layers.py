"""Layers that several networks use."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from bioopt.core.kernels import Kernel


@Kernel
def _above_mean(u: torch.Tensor) -> torch.Tensor:
    return torch.relu(u - u.mean(1, keepdim=True))


class Triangle(nn.Module):
    """The Triangle activation (Coates, Ng & Lee, 2011): ``relu(u - mean over channels)``."""

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """The excess over the mean of all neurons at the same position, of ``u``'s shape."""
        return _above_mean(u) if _above_mean.runs(u) else torch.relu_(u - u.mean(1, keepdim=True))


class Power(nn.Module):
    """``x ** power`` of non-negative activity."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``'s shape."""
        with torch.autocast(x.device.type, enabled=False):  # which would make it single precision from here on
            if not x.requires_grad and forward_ad.unpack_dual(x).tangent is None:
                return x.pow(self.power)
            # The derivative of a power below 1 is infinite at 0.
            return x.clamp(min=1e-6).pow(self.power) * (x > 0)

    def extra_repr(self) -> str:
        """Its power."""
        return f"power={self.power}"


class QuickDropout(nn.Dropout):
    """Dropout that makes eight draws from each random number: on CPUs, if ``p`` is a multiple of 1/256.

    A readout of many features spends most of its time on the draws of `torch.nn.Dropout`; these take a tenth of it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with a share ``p`` of its entries zeroed, the others scaled up by ``1 / (1 - p)``."""
        dropped = int(self.p * 256)
        if not self.training or x.is_cuda or dropped != self.p * 256 or not 0 < self.p < 1:
            return super().forward(x)
        draws = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        return x * (draws[: x.numel()].view(x.shape) >= dropped) * (1 / (1 - self.p))
