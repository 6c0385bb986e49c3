"""Seeded noise: independent streams of the right distribution, whatever the memory format."""

from __future__ import annotations

import math

import pytest
import torch

from bioopt.core.noise import NoiseSource, fill_normal_, fill_rademacher_


def test_streams_are_normal_and_unrelated() -> None:
    source, cpu = NoiseSource(), torch.device("cpu")
    draws = torch.stack([torch.randn(4000, generator=source.stream(cpu, *key)) for key in
                         [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1), (0,)]])  # fmt: skip
    assert draws.mean(1).abs().max() < 4 / math.sqrt(4000)
    assert (draws.std(1) - 1).abs().max() < 0.05
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 0.07
    assert torch.equal(draws[0], torch.randn(4000, generator=NoiseSource().stream(cpu, 0, 0, 0)))


def test_rademacher_noise_is_fair_and_unrelated() -> None:
    source, cpu = NoiseSource(), torch.device("cpu")
    signs = torch.stack([fill_rademacher_(torch.empty(8000), source.stream(cpu, 0, i)) for i in range(3)])
    assert signs.unique().tolist() == [-1, 1]
    assert signs.mean(1).abs().max() < 4 / math.sqrt(8000)
    assert (torch.corrcoef(signs) - torch.eye(3)).abs().max() < 0.05
    for lag in range(1, 17):  # eight come from one number
        assert abs((signs[0, lag:] * signs[0, :-lag]).mean()) < 4 / math.sqrt(8000 - lag)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_noise_is_normal_and_unrelated(dtype: torch.dtype) -> None:
    source, cpu, count = NoiseSource(), torch.device("cpu"), 200_003  # several chunks, and a rest
    draws = torch.stack([fill_normal_(torch.empty(count, dtype=dtype), source.stream(cpu, 0, i)) for i in range(2)])
    exact = draws.double()
    assert exact.mean(1).abs().max() < 4 / math.sqrt(count)
    assert (exact.var(1) - 1).abs().max() < 4 * math.sqrt(2 / count)
    assert ((exact**4).mean(1) - 3).abs().max() < 4 * math.sqrt(96 / count)
    for x in (-2.5, -1.01, 0.003, 0.5, 3.01):  # between two numbers of either precision
        p = torch.special.ndtr(torch.tensor(x, dtype=torch.float64))
        assert ((exact < x).double().mean(1) - p).abs().max() < 4 * math.sqrt(p * (1 - p) / count) + 2e-3 * abs(x)
    assert abs((exact[0] * exact[1]).mean()) < 4 / math.sqrt(count)
    for lag in (*range(1, 9), 2**14, 2**16):  # four come from one number
        assert abs((exact[0, lag:] * exact[0, :-lag]).mean()) < 4 / math.sqrt(count - lag)
    assert torch.equal(draws[1], fill_normal_(torch.empty(count, dtype=dtype), NoiseSource().stream(cpu, 0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [fill_normal_, fill_rademacher_])
def test_noise_fills_any_memory_format_alike(fill, dtype: torch.dtype) -> None:
    source, cpu = NoiseSource(), torch.device("cpu")
    for tensor in (
        torch.empty(0),
        torch.empty(3, 5, 4, 6),
        torch.empty(3, 5, 4, 6).to(memory_format=torch.channels_last),
        torch.empty(7, 9).T,
        torch.empty(1, 1, 5, 5).to(memory_format=torch.channels_last),
        torch.empty(6, 8)[:, ::2],  # not dense
        torch.empty(()),
    ):
        tensor = tensor.to(dtype).fill_(math.nan)
        fill(tensor, source.stream(cpu, 1))
        assert tensor.isfinite().all()
    flat = fill(torch.empty(360, dtype=dtype), source.stream(cpu, 1))
    last = fill(torch.empty(3, 5, 4, 6, dtype=dtype).to(memory_format=torch.channels_last), source.stream(cpu, 1))
    assert torch.equal(last.permute(0, 2, 3, 1).flatten(), flat)
