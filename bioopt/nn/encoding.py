"""Spike encodings of images: the intensity of a pixel sets its firing rate, latency or firing probability."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["LatencyEncoding", "PoissonEncoding", "RateEncoding"]


class _Encoding(nn.Module, ABC):
    def __init__(self, steps: int, rate: float = 1.0) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{name}: steps={steps!r} must be an integer >= 1")
        if not 0 < rate <= 1:
            raise ValueError(f"{name}: rate={rate!r} must be a number in (0, 1], in spikes per step")
        self.steps, self.rate = steps, rate

    def forward(self, x: Tensor) -> Tensor:
        """Encode values in [0, 1] of any shape as spikes, 0 or 1, of shape steps × shape."""
        if not x.is_floating_point():
            raise ValueError(f"{type(self).__name__}: the input must have a floating-point type, not {x.dtype}")
        if x.numel() and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"{type(self).__name__}: the input must lie in [0, 1], not in [{x.min().item():.3g}, "
                f"{x.max().item():.3g}]; rescale it, for example by (x - x.min()) / (x.max() - x.min())"
            )
        return self._spikes(x.detach())

    @abstractmethod
    def _spikes(self, x: Tensor) -> Tensor:
        """The spikes that encode ``x``, after it has been checked."""

    def _step_index(self, x: Tensor) -> Tensor:
        """The indices of the steps, in a shape that broadcasts over ``x``, at least in single precision."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.arange(self.steps, dtype=dtype, device=x.device).view(-1, *[1] * x.ndim)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"steps={self.steps}, rate={self.rate:g}"


class RateEncoding(_Encoding):
    """Rate coding: ``round(rate * x * steps)`` evenly spaced spikes, without randomness.

    Args:
        steps: time steps.
        rate: spikes per step where ``x`` is 1, in (0, 1].
    """

    def _spikes(self, x: Tensor) -> Tensor:
        rate, step = self.rate * x, self._step_index(x)
        count = torch.floor((step + 1) * rate + 0.5)  # spikes up to and including this step
        before = torch.floor(step * rate + 0.5)
        return (count - before).to(x.dtype)


class LatencyEncoding(_Encoding):
    """Latency coding: one spike per value, at step ``round((1 - x) * (steps - 1))``; none where ``x`` is 0.

    Args:
        steps: time steps.

    Source: S. J. Thorpe (1990), *Spike arrival times: a highly efficient coding scheme for neural networks*.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)

    def _spikes(self, x: Tensor) -> Tensor:
        step = self._step_index(x)
        at = torch.round((1 - x.to(step.dtype)) * (self.steps - 1))
        return ((step == at) & (x > 0)).to(x.dtype)

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return f"steps={self.steps}"


class PoissonEncoding(_Encoding):
    """Poisson coding: independent spikes, in each step with probability ``rate * x``.

    In training mode spikes are drawn from torch's global generators, as dropout is, so all evaluations within a step
    see the same spikes and a resumed run continues with the same random numbers. In evaluation mode they are drawn from
    a generator that is seeded anew for each batch, so tests are repeatable and leave the global generators unchanged.

    Args:
        steps: time steps.
        rate: probability of a spike in a step where ``x`` is 1, in (0, 1].
        seed: of the generator in evaluation mode.
    """

    def __init__(self, steps: int, rate: float = 1.0, seed: int = 0) -> None:
        super().__init__(steps, rate)
        self.seed = seed

    def _spikes(self, x: Tensor) -> Tensor:
        generator = None if self.training else torch.Generator(x.device).manual_seed(self.seed)
        draws = torch.rand(self.steps, *x.shape, generator=generator, dtype=torch.float32, device=x.device)
        return (draws < self.rate * x).to(x.dtype)
