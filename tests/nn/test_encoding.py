"""Encodings of values as spikes."""

from __future__ import annotations

import pytest
import torch

from bioopt.nn import LatencyEncoding, PoissonEncoding, RateEncoding


def test_encodings() -> None:
    x = torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    rate = RateEncoding(20, 0.8)(x)
    assert rate.shape == (20, 1, 4)
    assert rate.sum(0).tolist() == [[0, 4, 8, 16]]
    gaps = rate[:, 0, 1].nonzero().flatten().diff()
    assert set(gaps.tolist()) == {5}  # evenly spaced
    latency = LatencyEncoding(5)(x)
    assert latency.sum(0).tolist() == [[0, 1, 1, 1]]
    assert latency[:, 0].argmax(0).tolist()[1:] == [3, 2, 0]

    poisson = PoissonEncoding(4000, 0.8, seed=3)
    torch.manual_seed(0)
    found = poisson(x)
    assert not torch.equal(found, poisson(x))
    torch.manual_seed(0)
    assert torch.equal(found, poisson(x))
    torch.testing.assert_close(found.mean(0), 0.8 * x, rtol=0, atol=0.03)
    assert set(found.unique().tolist()) == {0, 1}
    poisson.eval()
    state = torch.get_rng_state()
    assert torch.equal(poisson(x), poisson(x))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(poisson(x), PoissonEncoding(4000, 0.8, seed=4).eval()(x))
    assert poisson(x.bfloat16()).dtype == torch.bfloat16

    for encoding in (RateEncoding, LatencyEncoding, PoissonEncoding):
        with pytest.raises(ValueError, match=rf"{encoding.__name__}: steps=0 must be"):
            encoding(0)
        with pytest.raises(ValueError, match=rf"{encoding.__name__}: the input must lie in \[0, 1\], not in \[-1, 2\]"):
            encoding(4)(torch.tensor([-1.0, 2.0]))
        with pytest.raises(ValueError, match="floating-point"):
            encoding(4)(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"rate=1\.5 must be"):
        RateEncoding(4, 1.5)
