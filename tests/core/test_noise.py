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


@pytest.mark.parametrize("fill", [fill_normal_, fill_rademacher_])
def test_noise_fills_any_memory_format_alike(fill) -> None:
    source, cpu = NoiseSource(), torch.device("cpu")
    for tensor in (
        torch.empty(3, 5, 4, 6),
        torch.empty(3, 5, 4, 6).to(memory_format=torch.channels_last),
        torch.empty(7, 9).T,
        torch.empty(1, 1, 5, 5).to(memory_format=torch.channels_last),
        torch.empty(6, 8)[:, ::2],  # not dense
        torch.empty(()),
    ):
        tensor.fill_(math.nan)
        fill(tensor, source.stream(cpu, 1))
        assert tensor.isfinite().all()
    flat = fill(torch.empty(360), source.stream(cpu, 1))
    last = fill(torch.empty(3, 5, 4, 6).to(memory_format=torch.channels_last), source.stream(cpu, 1))
    assert torch.equal(last.permute(0, 2, 3, 1).flatten(), flat)
