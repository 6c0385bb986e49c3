"""The modules of the experiments' networks."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from hydra.utils import get_object
from omegaconf import OmegaConf
from torch import Tensor, nn

from bioopt import find_synapses
from experiments import data, models
from experiments.building import build_model
from experiments.phases import split

from ..commands import ROOT, config


def features(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.get_submodule("trunk")(x)


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_quick_dropout_is_dropout(p: float) -> None:
    torch.manual_seed(0)
    layer, x = models.QuickDropout(p), torch.randn(301, 333)  # not a multiple of eight
    dropped = layer(x)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / (1 - p))
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    pairs = (kept[:, 1:] == kept[:, :-1]).float().mean()  # neighbours are drawn apart
    assert abs(pairs - (p**2 + (1 - p) ** 2)) < 0.01
    assert torch.equal(layer.eval()(x), x)


def test_quick_dropout_leaves_other_shares_to_torch() -> None:
    x = torch.randn(4, 50)
    for p in (0.0, 0.3, 1.0):
        torch.manual_seed(0)
        expected = nn.Dropout(p)(x)
        torch.manual_seed(0)
        assert torch.equal(models.QuickDropout(p)(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # of torch itself, at its first forward-mode slope
def test_a_power_after_a_maximum_is_the_power_before_it() -> None:
    x, pool = torch.rand(2, 3, 8, 8), nn.MaxPool2d(4, 2, 1)
    assert torch.equal(models.Power(0.7)(pool(x)), pool(x**0.7))
    x = torch.tensor([0.0, 0.5], requires_grad=True)
    models.Power(0.7)(x).sum().backward()
    assert x.grad is not None
    slope = torch.tensor([0.0, 0.7 * 0.5**-0.3])
    torch.testing.assert_close(x.grad, slope)
    with torch.no_grad(), forward_ad.dual_level():
        along = forward_ad.unpack_dual(models.Power(0.7)(forward_ad.make_dual(x.detach(), torch.ones(2)))).tangent
    torch.testing.assert_close(along, slope)


def smooth_images(n: int) -> Tensor:
    mix = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.5], [0.2, 0.5, 1.0]])
    return nn.functional.avg_pool2d(torch.einsum("cd,ndhw->nchw", mix, torch.randn(n, 3, 18, 18)), 3, 1)


def test_whitened_patches_have_no_correlations_left() -> None:
    torch.manual_seed(0)
    images = smooth_images(300)
    layer = models.WhitenedPatches(3, 4, floor=1e-4)
    white = layer(images)
    assert white.shape == (300, 48, 13, 13)

    def covariance(patches: Tensor) -> Tensor:
        rows = patches.transpose(0, 1).flatten(1)
        return rows @ rows.T / rows.shape[1]

    plain = models.WhitenedPatches(3, 4)  # its filter is still the identity
    normalised = plain.eval()(images)
    one = images[5, :, 2:6, 7:11]
    expected = (one - one.mean()) / (one.var(correction=0) + 0.16**2).sqrt()
    torch.testing.assert_close(normalised[5, :, 2, 7], expected.flatten())
    assert covariance(normalised).fill_diagonal_(0).abs().max() > 0.5
    spectrum = torch.linalg.eigvalsh(covariance(white))
    assert spectrum[0] < 1e-3  # a patch has no mean any more
    assert 0.8 < spectrum[1] < spectrum[-1] < 1.3
    assert torch.equal(layer.eval()(images), white)


def test_the_filter_of_whitened_patches_is_learned_from_the_first_patches() -> None:
    torch.manual_seed(0)
    images = smooth_images(20)
    single, half = models.WhitenedPatches(3, 4), models.WhitenedPatches(3, 4)
    single(images)
    assert single.state_dict()["seen"] == 20 * 25  # every seventh of 169
    with torch.autocast("cpu", torch.float16):
        half(images)
    assert torch.equal(half.filter, single.filter)
    small = models.WhitenedPatches(3, 4, patches=100)
    small(images)
    learned = small.filter.clone()
    small(images**2)  # it has seen enough
    assert torch.equal(small.filter, learned)


def test_the_readout_sees_one_block_or_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    plain = models.softhebb((3, 32, 32), 10, width=0.05)
    torch.manual_seed(0)
    whole = models.softhebb((3, 32, 32), 10, width=0.05, readout_sees="all", whitened=7, mirror=True, normalise=True)
    neurons = [round(0.05 * n) for n in (96, 384, 1536)]
    whole.eval()
    plain.load_state_dict(whole.state_dict() | {k: v for k, v in plain.state_dict().items() if "trunk" not in k}, False)
    plain.eval()
    last = (features(plain, x) + features(plain, x.flip(3))) / 2
    seen = features(whole, x)
    assert seen.shape == (2, 16 * sum(neurons) + 9 * 2 * 7)
    torch.testing.assert_close(seen[:, 16 * sum(neurons[:2]) : 16 * sum(neurons)], last)
    torch.testing.assert_close(seen, features(whole, x.flip(3)))
    conv = whole.get_submodule("trunk.whitened.conv")
    assert conv.stride == (1, 1)
    whole.train()
    assert not torch.allclose(features(whole, x), features(whole, x.flip(3)))  # one image at a time while it learns
    assert conv.stride == (3, 3)
    with pytest.raises(ValueError, match="readout_sees=first must be last or all"):
        models.softhebb((3, 32, 32), 10, readout_sees="first")
    with pytest.raises(ValueError, match=r"model\.whitened=-3 must be an integer >= 0"):
        models.softhebb((3, 32, 32), 10, whitened=-3)


@pytest.mark.parametrize("activities", [1, 3 * 729, 2 * 14 * 729])
def test_a_frozen_wide_block_is_its_layers_one_after_another(monkeypatch: pytest.MonkeyPatch, activities: int) -> None:
    torch.manual_seed(0)
    block = models.WideBlock(3, 7, threshold=0.5).double()
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    x = torch.cat([x[:3], nn.functional.avg_pool2d(x[3:], 3, 1, 1)])
    for _ in range(30):
        block(x)
    block.eval()
    monkeypatch.setattr(models.WideBlock, "CACHED", activities)  # one neuron, three, two images
    with torch.no_grad():
        y = block(x)
        assert y.shape == (5, 14, 3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(block.float()(x.float()).double(), y, atol=0.02, rtol=0.05)
    block.double()
    torch.testing.assert_close(block(x), y, atol=1e-7, rtol=1e-5)
    for layer in block.children():
        x = layer(x)
    torch.testing.assert_close(x, y, atol=1e-7, rtol=1e-5)


def test_the_gate_of_images_with_a_context_sees_only_the_context() -> None:
    model = models.gated((3, 8, 8), 5, pathways=4, hidden=7, active=1, contexts=2).eval()
    x = torch.randn(6, 3, 8, 8)
    tasks = torch.eye(2)[torch.tensor([0, 1, 0, 1, 0, 1])]
    x[:, 1:] = tasks[:, :, None, None]
    y = model(x)
    gates = model[0].gate.gates
    taken = [model[0].gate.pathways[int(gate.argmax())] for gate in gates]
    outputs = [gate.max() * path(image.flatten()) for gate, path, image in zip(gates, taken, x[:, 0], strict=True)]
    torch.testing.assert_close(y, model[1:](torch.stack(outputs)))
    x[:, 0] = torch.randn(6, 8, 8)
    model(x)
    assert torch.equal(gates, model[0].gate.gates)
    assert torch.equal(gates[::2], gates[:1].expand(3, 4))
    trunk, head = split(model)
    assert [type(module) for module in (*trunk, *head)] == [models.InContext, nn.BatchNorm1d, nn.Linear]
    by_image = models.gated((3, 8, 8), 5, pathways=4, hidden=7, active=2)
    assert by_image(x).shape == (6, 5)
    assert split(by_image)[0][1].controller.in_features == 3 * 8 * 8
    with pytest.raises(ValueError, match=r"model.contexts=3 must be from 0 to 2"):
        models.gated((3, 8, 8), 5, pathways=4, hidden=7, active=1, contexts=3)


def test_attention_sees_patches_in_their_places() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 12)
    patches = models.Patches(4)(x)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], x[1, :, 4:8, 4:8].flatten())  # the fifth: in the second row the middle one
    code = models.PositionalEncoding(6, 5)(torch.zeros(1, 6, 5))[0]
    for place in range(6):
        for i in range(5):
            wave = math.sin if i % 2 == 0 else math.cos
            assert code[place, i].item() == pytest.approx(wave(place / 10_000 ** (i // 2 * 2 / 5)), abs=1e-5)
    inner = nn.Linear(5, 5)
    assert torch.equal(models.Residual(inner, nn.Tanh())(code), code + inner(code).tanh())
    options = {"patch": 4, "size": 8, "heads": 2, "hidden": 6}
    model = models.attention((3, 8, 12), 5, **options, blocks=2)
    assert model(x).shape == (2, 5)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 1 + 2 * (4 + 2) + 1
    assert [type(module) for module in split(model)[1]] == [nn.Linear]
    with pytest.raises(ValueError, match=r"model.patch=4 must divide the image, of 8×10 pixels, as model.patch=2 does"):
        models.attention((3, 8, 10), 5, **options, blocks=1)


def test_hidden_layers_of_the_cnn() -> None:
    plain, deeper = (models.cnn((3, 32, 32), 10, width=2, kernel=3, hidden=hidden) for hidden in ([], [7, 5]))
    sizes = [tuple(layer.weight.shape) for layer in deeper if isinstance(layer, nn.Linear)]
    assert sizes == [(7, 4 * 8 * 8), (5, 7), (10, 5)]
    assert [type(layer) for layer in deeper[-5:]] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert deeper(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert [type(layer) for layer in plain] == [type(layer) for layer in [*deeper[:9], deeper[-1]]]


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml")))
@pytest.mark.long
def test_every_model_takes_larger_images_and_a_hundred_classes(name: str, side: int) -> None:
    if name == "spiking":
        pytest.importorskip("snntorch")
    small = {
        "attention": ["model.patch=8"],
        "cnn": ["model.width=2"],
        "gated": ["model.hidden=4"],
        "mlp": ["model.hidden=[4]"],
        "rbm": ["model.hidden=[4]"],
        "softhebb": ["model.width=0.02", "model.whitened=3", "model.readout_sees=all"],
        "spiking": ["model.neurons=100", "model.steps=2", "model.readout=groups"],
    }
    labels = torch.arange(100)
    pixels = torch.randint(0, 256, (100, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = data.Images("fake", pixels, labels, pixels[:4], labels[:4])
    model = build_model(config(f"model={name}", *small.get(name, [])), images)
    logits = model(images.prepare(images.test_images))
    assert logits.shape == (4, 100)
    assert logits.isfinite().all()
    if name != "spiking":  # whose readout has no weights
        nn.functional.cross_entropy(logits, images.test_labels).backward()
        assert [p for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]


def test_configurations_of_older_runs_name_the_same_networks() -> None:
    for old, new in {
        "experiments.spiking.spiking": models.spiking,
        "experiments.models.cnn": models.cnn,
        "experiments.models.random_trunk": models.random_trunk,
    }.items():
        assert get_object(old) is new
    for path in (ROOT / "conf/model").glob("*.yaml"):
        target = OmegaConf.load(path)["_target_"]
        assert get_object(target) is getattr(models, path.stem), target


def test_an_impossible_option_raises_a_clear_error() -> None:
    images = data.load("digits", "")
    for options, message in (
        (["model=gated", "model.active=9"], r"^model=gated: Gate: active=9 must be"),
        (["model=softhebb", "model.width=-1"], r"^model=softhebb: model.width=-1 must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(config(*options), images)


@pytest.mark.parametrize("unit_images", [True, False])
def test_a_wide_layer_is_read_out_by_the_power_of_cosines(unit_images: bool) -> None:
    torch.manual_seed(0)
    layer = models.CompetingLayer(12, 5, 3.0, unit_images, "power", 4.5)
    x = torch.rand(4, 12)
    assert abs(layer.fc.weight.norm(dim=1).mean() - 3) < 0.6
    expected = F.cosine_similarity(x.unsqueeze(1), layer.fc.weight.unsqueeze(0), dim=2).clamp(min=0) ** 4.5
    y = layer(x)
    torch.testing.assert_close(y, (expected - expected.mean()) / expected.std(correction=0))
    seen = []
    layer.fc.register_forward_hook(lambda module, inputs, u: seen.append((inputs[0], u)))
    layer(x)
    (into, u) = seen[0]
    torch.testing.assert_close(into.norm(dim=1), torch.ones(4) if unit_images else x.norm(dim=1))
    torch.testing.assert_close(u, into @ layer.fc.weight.T)  # the rule sees the plain product
    assert torch.isfinite(layer.eval()(torch.zeros(1, 12))).all()


def test_a_wide_layer_of_random_weights_has_the_same_scale_in_evaluation() -> None:
    torch.manual_seed(0)
    layer, x = models.CompetingLayer(784, 200, 28.0, True, "power", 4.5), torch.rand(64, 784) - 0.5
    for _ in range(60):
        trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained, rtol=0.05, atol=0.05)


def test_a_wide_layer_is_read_out_by_a_softmax() -> None:
    torch.manual_seed(0)
    model = models.wide((1, 3, 4), 10, hidden=6, radius=5.0, unit_images=False, activation="softmax", sharpness=2.0)
    x = torch.rand(3, 1, 3, 4)
    grey = model[:2](x)
    assert (grey.min(), grey.max()) == (0, 1)
    shares = (2 * grey @ model.layer.fc.weight.T).softmax(1)
    torch.testing.assert_close(model[:3](x), (shares - shares.mean()) / shares.std(correction=0))
    assert model(x).shape == (3, 10)
    assert split(model)[1].readout.weight.shape == (10, 6)


@pytest.mark.parametrize(
    ("option", "message"),
    [("hidden=0", "model.hidden=0 must be"), ("radius=0", "model.radius=0 must be > 0"),
     ("sharpness=-1", "model.sharpness=-1 must be > 0"),
     ("activation=relu", "model.activation=relu must be power or")],
)  # fmt: skip
def test_options_of_a_wide_layer_are_checked(option: str, message: str) -> None:
    images = data.from_config(config("data=digits").data, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        build_model(config("model=wide", f"model.{option}"), images)


def test_residual_networks_have_the_sizes_of_the_published_ones() -> None:
    twenty = models.resnet((3, 32, 32), 10, blocks=(3, 3, 3))
    assert sum(p.numel() for p in twenty.parameters()) == 272_474  # with convolutions beside two blocks
    assert [name for name, _ in twenty.named_children() if name.startswith("block")] == [
        f"block{i}" for i in range(1, 10)
    ]
    assert twenty[:-3](torch.zeros(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    assert models.resnet((1, 28, 28), 7)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_vgg_halves_the_image_by_each_convolution() -> None:
    five = models.vgg((3, 32, 32), 10, channels=[128, 256, 512, 512])
    convolutions = [layer for layer in five if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [128, 256, 512, 512]
    assert five[-1].weight.shape == (10, 512 * 2 * 2)
    odd = models.vgg((1, 28, 28), 10, channels=[4, 4, 4, 4], pooling="average")
    assert odd(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(isinstance(layer, nn.AvgPool2d) for layer in odd) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": []}, r"model\.channels=\[\] must be a list"),
        ({"channels": 32}, r"model\.channels=32 must be a list"),
        ({"channels": [8, 0]}, r"model\.channels=0 must be an integer >= 1"),
        ({"channels": [2] * 6}, r"halves images 6 times, which those of 32×32 pixels are too small for"),
        ({"channels": [2], "pooling": "min"}, r"model\.pooling=min must be one of max, average"),
    ],
)
def test_options_of_vgg_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.vgg((3, 32, 32), 10, **options)


def test_a_deep_network_has_as_many_layers_as_wanted() -> None:
    for depth in (2, 3, 7):
        model = models.deep((1, 4, 4), 5, width=8, depth=depth)
        assert sum(isinstance(layer, nn.Linear) for layer in model.modules()) == depth
        assert model(torch.zeros(3, 1, 4, 4)).shape == (3, 5)


def test_deep_networks_start_with_the_deviations_of_mu_p() -> None:
    torch.manual_seed(0)
    model = models.deep((1, 16, 16), 64, width=200, depth=9, weights="mu_p")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    expected = [256**-0.5, *[(200 * 9) ** -0.5] * 7, 1 / 200]
    for layer, deviation in zip(layers, expected, strict=True):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.03)
        assert not layer.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, r"model\.depth=1 must be an integer >= 2"),
        ({"width": 0}, r"model\.width=0 must be an integer >= 1"),
        ({"weights": "xavier"}, r"model\.weights=xavier must be one of standard, mu_p"),
    ],
)
def test_options_of_a_deep_network_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.deep((1, 4, 4), 5, **{"width": 8, "depth": 3, **options})


def test_a_wider_lenet() -> None:
    images = types.SimpleNamespace(shape=(3, 32, 32), classes=10)
    model = build_model(config("model=lenet5", "model.channels=[32,64]", "model.hidden=[128,84]"), images)  # type: ignore[arg-type]
    assert [tuple(layer.weight.shape)[:2] for layer in find_synapses(model)] == [
        (32, 3), (64, 32), (128, 2304), (84, 128), (10, 84)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"model=lenet5: model\.channels=\[32\] and .* must have two numbers each"):
        build_model(config("model=lenet5", "model.channels=[32]"), images)  # type: ignore[arg-type]


def test_a_recurrent_layer_sees_an_image_row_by_row() -> None:
    images = types.SimpleNamespace(shape=(1, 4, 3), classes=2)
    model: Any = build_model(config("model=recurrent", "model.hidden=6", "model.repeats=2"), images)  # type: ignore[arg-type]
    x = torch.rand(5, 1, 4, 3)
    rows = model[0](x)
    assert rows.shape == (8, 5, 3)
    assert torch.equal(rows[::2].transpose(0, 1), x[:, 0])
    assert torch.equal(rows[1::2], rows[::2])
    assert model(x).shape == (5, 2)
    assert not model[1].recurrent.weight.diagonal().any()
    later = x.clone()
    later[:, :, -1] += 5
    assert torch.equal(model[1](rows)[:6], model[1](model[0](later))[:6])  # what comes later changes nothing before
    for neurons in ("lif", "rate"):
        assert build_model(config("model=recurrent", f"model.neurons={neurons}"), images)(x).shape == (5, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.neurons=gru must be one of lif, alif, rate"):
        build_model(config("model=recurrent", "model.neurons=gru"), images)  # type: ignore[arg-type]
