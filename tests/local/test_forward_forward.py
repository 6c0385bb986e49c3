"""Forward-Forward against a slow twin, and its prediction by goodness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioopt import ForwardForward
from bioopt.core.noise import NoiseSource

from ..rules import cnn, mlp, same, weights

SIZES = (12, 7, 6, 4)


def network() -> nn.Sequential:
    return nn.Sequential(*(nn.ReLU() if isinstance(one, nn.Tanh) else one for one in mlp(sizes=SIZES)))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 12, generator=generator, dtype=torch.float64), torch.randint(4, (9,), generator=generator)


def with_label(x: Tensor, labels: list[int], scale: float) -> list[Tensor]:
    found = []
    for sample, label in zip(x, labels, strict=True):
        low, high = min(sample.tolist()), max(sample.tolist())
        code = [low + 8 * scale * (high - low) if c == label else low for c in range(4)]
        found.append(torch.cat([torch.tensor(code, dtype=x.dtype), sample[4:]]))
    return found


def activities(model: nn.Sequential, sample: Tensor) -> list[Tensor]:
    """Of each hidden layer, for normalised input without a graph."""
    found = []
    for layer in (model[0], model[2]):
        found.append((layer.weight @ sample + layer.bias).clamp(min=0))
        sample = (found[-1] / (found[-1].square().mean().sqrt() + 1e-8)).detach()
    return found


def wrong_labels(y: Tensor, step: int, seed: int = 0) -> list[int]:
    generator = NoiseSource().stream(y.device, seed, step, 0)
    return ((y + torch.randint(1, 4, y.shape, generator=generator)) % 4).tolist()


def test_the_slow_twin_agrees() -> None:
    model, twin = network(), network()
    sgd = {"momentum": 0.9, "weight_decay": 0.01}
    optimizer = ForwardForward(
        model,
        0.01,
        threshold=0.7,
        label_scale=0.4,
        seed=2,
        readout=None,
        descent=torch.optim.SGD,
        **sgd,
        centre_inputs=False,
    )
    plain = torch.optim.SGD(twin.parameters(), 0.01, **sgd)
    for step in range(3):
        x, y = data(step)
        optimizer.target = y
        loss = optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        assert optimizer.forward_passes == 3
        total = torch.zeros((), dtype=torch.float64)
        for sign, labels in ((1, y.tolist()), (-1, wrong_labels(y, step, seed=2))):
            for sample in with_label(x, labels, 0.4):
                for h in activities(twin, sample):
                    total = total + torch.log1p((sign * len(h) * (0.7 - (h * h).sum() / len(h))).exp()) / len(y)
        readout = F.cross_entropy(twin[4](twin[:4](x).detach()), y)  # of the ordinary pass
        torch.testing.assert_close(loss, readout.detach())
        plain.zero_grad()
        (total + readout).backward()
        plain.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_prediction_is_the_label_for_which_layers_are_most_active() -> None:
    model, (x, _) = network(), data()
    optimizer = ForwardForward(model, label_scale=0.4, prediction="goodness")
    before, mode = weights(model), model[1].train(False).training
    scores = optimizer.predict(x)
    assert scores.shape == (9, 4)
    for p in model.parameters():
        p.requires_grad_(False)
    for label in range(4):
        for i, sample in enumerate(with_label(x, [label] * 9, 0.4)):
            expected = sum(float((h * h).mean()) for h in activities(model, sample))
            torch.testing.assert_close(float(scores[i, label]), expected)
    assert same(before, weights(model))
    assert (model.training, model[1].training) == (True, mode)
    model.eval()
    assert torch.equal(model(x), network()(x))  # nothing is marked or normalised in an ordinary evaluation
    assert torch.equal(ForwardForward(network()).predict(x), model(x))


@pytest.mark.long
def test_images_carry_their_label_as_a_wave() -> None:
    """Images of one class differ by their label alone, everywhere, and the layers learn to tell."""
    torch.manual_seed(0)
    model = cnn(dropout=0.0)
    optimizer = ForwardForward(model, 3e-3, label_scale=3.0, prediction="goodness")
    x, y = torch.rand(20, 2, 8, 8), torch.arange(20) % 5
    first = next(iter(optimizer._recorder.synapses.values()))
    marked = [optimizer._with_label(x, torch.full((20,), c), first) for c in range(5)]
    assert all((a - b).abs().flatten(2).std(2).min() > 0.1 for a in marked for b in marked if a is not b)
    for _ in range(400):
        optimizer.target = y
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert (optimizer.predict(x).argmax(1) == y).float().mean() > 0.6  # chance is 0.2


def test_negatives_of_ones_own() -> None:
    x, y = data()
    seen: list[Tensor] = []

    def rolled(inputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(inputs)
        assert torch.equal(labels, y)
        return inputs.roll(1, 0)

    def step(model: nn.Module, negatives: Any) -> list[Tensor]:
        optimizer = ForwardForward(model, 0.1, negatives=negatives, descent=torch.optim.SGD)
        optimizer.target = y
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        return weights(model)

    assert not same(step(network(), rolled), weights(network()))
    assert all(torch.equal(one, x) for one in seen)
    assert len(seen) == 1
    model = network()
    with pytest.raises(ValueError, match="returned the positive inputs themselves"):
        step(model, lambda inputs, labels: inputs)
    with pytest.raises(ValueError, match=r"inputs of shape \(9, 3\) for inputs of shape \(9, 12\)"):
        step(model, lambda inputs, labels: inputs[:, :3])
    assert same(weights(model), weights(network()))


def test_without_labels_the_negatives_are_a_matter_of_inputs() -> None:
    x, y = data()
    model, given = network(), []
    optimizer = ForwardForward(
        model, negatives=lambda inputs, labels: given.append(labels) or (inputs + inputs.roll(1, 0)) / 2
    )
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert given == [None]
    assert not same(weights(model), weights(network()))
    with pytest.raises(RuntimeError, match=r"ForwardForward learns from labels, but optimizer\.target was not set"):
        ForwardForward(other := network()).step(lambda: F.cross_entropy(other(x), y))
    assert same(weights(other), weights(network()))


def test_the_step_decides_the_wrong_labels() -> None:
    """So a resumed run draws those that the uninterrupted one would draw; the global generators are not used."""
    x, y = data()
    assert wrong_labels(y, 0) != wrong_labels(y, 1)
    state = torch.get_rng_state()
    model = network()
    optimizer = ForwardForward(model)
    optimizer.target = y
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    own = optimizer.state_dict()["state"]["rule"]
    assert own.keys() == {"step", "presynaptic", "readout"}
    assert own["step"] == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0 must be a finite number > 0"),
        ({"label_scale": -1.0}, "label_scale=-1.0 must be a finite number > 0"),
        ({"prediction": "loss"}, "prediction='loss' must be one of readout, goodness"),
        ({"prediction": "goodness", "negatives": torch.roll}, "prediction='goodness' needs negatives='label'"),
        ({"negatives": "none"}, "negatives='none' must be 'label', or a function"),
        ({"classes": 1}, "with classes=1 no input carries a wrong label"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ForwardForward: {message}"):
        ForwardForward(network(), **options)


def test_inputs_that_cannot_carry_a_label_are_named() -> None:
    model, y = mlp(sizes=(3, 5, 5, 4)), torch.tensor([0, 1])
    optimizer = ForwardForward(model)
    optimizer.target = y
    with pytest.raises(RuntimeError, match="input of layer '0' has 3 values, which cannot carry 4 classes"):
        optimizer.step(lambda: F.cross_entropy(model(torch.randn(2, 3, dtype=torch.float64)), y))
    with pytest.raises(RuntimeError, match=r"ForwardForward.*optimizer\.step\(closure\)"):
        optimizer.step()
