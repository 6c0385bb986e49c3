"""Compiled kernels: the same learning, on request; none needs a compiler here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bioopt
from bioopt.core import kernels
from bioopt.hebbian import arithmetic
from experiments.models.softhebb import softhebb


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Kernels are traced but not compiled, for tensors of any size; the names of those that ran."""
    ran: set[str] = set()
    call = kernels.Kernel.__call__

    def noted(kernel: kernels.Kernel, *tensors: Tensor) -> Tensor:
        ran.add(kernel.function.__name__)
        return call(kernel, *tensors)

    monkeypatch.setattr(kernels.Kernel, "__call__", noted)
    monkeypatch.setattr(kernels, "compiler", lambda: "c++")
    monkeypatch.setattr(kernels, "SMALLEST", 0)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield ran
    bioopt.compile_kernels(False)
    for kernel in (arithmetic.shares, arithmetic.of_largest_one):
        kernel._compiled = None


def learned(amp: bool, **options: Any) -> Tensor:
    torch.manual_seed(0)
    trunk: Any = softhebb((3, 16, 16), 10, width=0.1).get_submodule("trunk").to(memory_format=torch.channels_last)
    optimizer = bioopt.SoftHebb(trunk, 0.01, inverse_temperature=0.3, readout=None, **options)
    before = torch.cat([p.detach().flatten() for p in trunk.parameters()])
    for seed in range(13 if options["homeostasis"] else 2):
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            trunk(x.to(memory_format=torch.channels_last))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in trunk.parameters()]) - before


@pytest.mark.parametrize("homeostasis", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_compiled_kernels_learn_the_same(amp: bool, homeostasis: bool, enabled: set[str]) -> None:
    expected = learned(amp, homeostasis=homeostasis)
    assert not enabled
    bioopt.compile_kernels("auto")
    found = learned(amp, homeostasis=homeostasis)
    assert enabled == {"shares", "_above_mean"} | ({"of_largest_one"} if not homeostasis else set())
    assert (found - expected).norm() < (0.02 if amp else 1e-4) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_shares_is_the_softmax(dtype: torch.dtype) -> None:
    """Of neurons that are equal, one wins."""
    torch.manual_seed(0)
    activity = torch.randint(-9, 9, (200, 30)).to(dtype)
    order = torch.arange(30.0, 0, -1)
    found = arithmetic.shares.function(activity, torch.tensor(0.5), torch.tensor(0.7), order)
    expected = arithmetic.softmax_(activity.float() * 0.5, 1, loser_strength=0.7)
    assert found.dtype == dtype
    if dtype == torch.bfloat16:
        torch.testing.assert_close(arithmetic.shares_in_half(activity, 0.5, 0.7), expected.to(dtype))
    assert ((found > 0).sum(1) == 1).all()
    torch.testing.assert_close(found, expected.to(dtype))


def test_a_bias_keeps_the_eager_update(enabled: set[str]) -> None:
    bioopt.compile_kernels("auto")
    layer = nn.Linear(6, 5)
    optimizer = bioopt.SoftHebb(layer, 0.1, readout=None, homeostasis=False)
    with torch.no_grad():
        layer(torch.randn(8, 6))
    optimizer.step()
    assert enabled == {"shares"}


def test_a_failing_compiler_is_named_once_and_left_alone(enabled: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tensors: Tensor) -> Tensor:
        raise RuntimeError("no header")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    expected = learned(False, homeostasis=False)
    bioopt.compile_kernels("auto")
    with pytest.warns(UserWarning, match=r"compile_kernels: torch.compile failed.*no header"):
        found = learned(False, homeostasis=False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiler", lambda: None)
    bioopt.compile_kernels("auto")
    assert not arithmetic.shares.runs(torch.zeros(2**20))
    with pytest.raises(RuntimeError, match=r"compile_kernels\(True\) needs a C\+\+ compiler"):
        bioopt.compile_kernels(True)
    with pytest.raises(ValueError, match=r'compile_kernels\(\'yes\'\) must be True, False or "auto"'):
        bioopt.compile_kernels("yes")
    monkeypatch.setenv(kernels.VARIABLE, "maybe")
    with pytest.raises(ValueError, match="BIOOPT_COMPILE_KERNELS=maybe must be 0, 1 or auto"):
        kernels._from_environment()
