"""The local product of presynaptic activity and teaching signal, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bioopt import Firing, find_synapses
from bioopt.core import products
from bioopt.core.products import SparseSignal, local_product, orthogonalised


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"stride": 2, "padding": 2},
        {"dilation": 2, "bias": False},
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("learn", ["all neurons", "sparse signal"])
def test_the_product_over_patches_equals_autograd(
    options: dict, memory_format: torch.memory_format, learn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide convolutions on the CPU do not take autograd's own product; several chunks of the batch."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 256, 3, **options).double().to(memory_format=memory_format)
    x = torch.randn(40, 64, 9, 10, dtype=torch.float64).to(memory_format=memory_format)
    (synapse,) = find_synapses(layer)
    u = layer(x)
    s: Tensor | SparseSignal = torch.randn_like(u)
    if learn == "sparse signal":  # then the product is sparse; some neurons learn nothing at all
        order = torch.rand(u.numel() // 256, 253, dtype=torch.float64).argsort(1)[:, :3] + 1
        s = SparseSignal(order + (order >= 100).long(), torch.randn(len(order), 3, dtype=torch.float64))
        assert not {0, 100, 255} & set(s.neurons.unique().tolist())
    dense = s.dense(u, 1) if isinstance(s, SparseSignal) else s
    (expected,) = torch.autograd.grad(u, layer.weight, dense, retain_graph=True)
    monkeypatch.setattr(torch.autograd, "grad", None)  # is not taken
    torch.testing.assert_close(local_product(Firing(synapse, x, None, False), u, s), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("samples", [3, 12])
def test_the_product_over_patches_in_half_precision(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, of wide layers; several chunks of the batch are added in single precision."""
    torch.manual_seed(0)
    layer = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    monkeypatch.setattr(products, "HALF_CHUNK", 1)  # small, for processors that only emulate half precision
    x = torch.randn(samples, 256, 10, 10).to(memory_format=torch.channels_last)
    (synapse,) = find_synapses(layer)
    with torch.autocast("cpu", torch.bfloat16):
        u = layer(x)
        s = torch.randn_like(u)
        (expected,) = torch.autograd.grad(u, layer.weight, s, retain_graph=True)
        monkeypatch.setattr(torch.autograd, "grad", None)  # is not taken
        found = local_product(Firing(synapse, x, None, False), u, s)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.005 * expected.norm()


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (3, 1), (2, 4, 6)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-44, 1e30])
def test_orthogonal_matrices_have_singular_values_of_about_one(shape: tuple[int, ...], scale: float) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    got = orthogonalised(given)
    assert got.shape == given.shape
    values = torch.linalg.svdvals(got)
    assert values.max() < 1.3
    assert values.max() > 0.6
    if scale > 1e-40:  # below, entries are rounded
        assert values.min() > 0.2


def test_nothing_is_orthogonal_to_nothing() -> None:
    assert not orthogonalised(torch.zeros(3, 4)).any()
