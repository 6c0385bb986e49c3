"""Images as spikes: how strongly a pixel shines becomes how often, how early or how likely it fires."""

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
            raise ValueError(f"{name}: rate={rate!r} must be a number in (0, 1], spikes a step")
        self.steps, self.rate = steps, rate

    def forward(self, x: Tensor) -> Tensor:
        """Values in [0, 1] of any shape to spikes, 0 or 1, with time as a further first dimension: steps × shape."""
        if not x.is_floating_point():
            raise ValueError(f"{type(self).__name__}: the input must be of a floating-point type, not {x.dtype}")
        if x.numel() and not (x.min() >= 0 and x.max() <= 1):
            raise ValueError(
                f"{type(self).__name__}: the input must lie in [0, 1], not in [{x.min().item():.3g}, "
                f"{x.max().item():.3g}]; scale it, (x - x.min()) / (x.max() - x.min()), say"
            )
        return self._spikes(x.detach())

    @abstractmethod
    def _spikes(self, x: Tensor) -> Tensor:
        """The spikes of valid values."""

    def _moments(self, x: Tensor) -> Tensor:
        """The numbers of the steps, to be broadcast over values, in single precision at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.arange(self.steps, dtype=dtype, device=x.device).view(-1, *[1] * x.ndim)

    def extra_repr(self) -> str:
        """Its options."""
        return f"steps={self.steps}, rate={self.rate:g}"


class RateEncoding(_Encoding):
    """How strong is how often: evenly spaced spikes, ``round(rate * x * steps)`` of them, the same each time.

    Args:
        steps: time steps.
        rate: spikes a step where ``x`` is 1, in (0, 1].
    """

    def _spikes(self, x: Tensor) -> Tensor:
        often, step = self.rate * x, self._moments(x)
        count = torch.floor((step + 1) * often + 0.5)  # so many until this step
        before = torch.floor(step * often + 0.5)
        return (count - before).to(x.dtype)


class LatencyEncoding(_Encoding):
    """How strong is how early: one spike each, at step ``round((1 - x) * (steps - 1))``; none where ``x`` is 0.

    Args:
        steps: time steps.

    Source: S. J. Thorpe (1990), *Spike arrival times: a highly efficient coding scheme for neural networks*.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)

    def _spikes(self, x: Tensor) -> Tensor:
        step = self._moments(x)
        at = torch.round((1 - x.to(step.dtype)) * (self.steps - 1))
        return ((step == at) & (x > 0)).to(x.dtype)

    def extra_repr(self) -> str:
        """Its options."""
        return f"steps={self.steps}"


class PoissonEncoding(_Encoding):
    """How strong is how likely: independent spikes, each step with probability ``rate * x``.

    In training mode the draws come from torch's global generators, as those of dropout do, so that all evaluations of
    a step see the same spikes and an interrupted run goes on with those that were to come. In evaluation they come from
    a generator of its own, the same draws for each batch: a test is repeatable, and leaves the global ones alone.

    Args:
        steps: time steps.
        rate: probability of a spike in a step where ``x`` is 1, in (0, 1].
        seed: of the draws in evaluation.
    """

    def __init__(self, steps: int, rate: float = 1.0, seed: int = 0) -> None:
        super().__init__(steps, rate)
        self.seed = seed

    def _spikes(self, x: Tensor) -> Tensor:
        generator = None if self.training else torch.Generator(x.device).manual_seed(self.seed)
        draws = torch.rand(self.steps, *x.shape, generator=generator, dtype=torch.float32, device=x.device)
        return (draws < self.rate * x).to(x.dtype)
