"""`hubconf.py`: networks that have learned, by torch.hub; how they are kept, and exported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experiments import data, models
from experiments.models.pixels import from_pixels, packed, unpacked
from experiments.run import run
from experiments.weights import accuracy_of
from scripts import keep_weights

from .commands import ROOT, TINY, config
from .test_learning import needs_mnist

RECORD = ROOT / "experiments/records/mnist-cnn8-softhebb"


def load(name: str, *arguments: str, **options: bool) -> nn.Sequential:
    """By torch.hub, from this checkout."""
    return torch.hub.load(str(ROOT), name, *arguments, source="local", **options)


def small() -> nn.Sequential:
    """A network from pixels with statistics of its own."""
    torch.manual_seed(0)
    network = models.cnn((2, 8, 8), 3, width=2, kernel=3)
    network(torch.randn(16, 2, 8, 8))
    return from_pixels(network, torch.tensor([0.2, 0.4]), torch.tensor([0.5, float("inf")]))


@torch.no_grad()
def test_torch_hub_has_a_network_that_has_learned() -> None:
    model = load("softhebb_mnist")
    images = torch.rand(5, 1, 28, 28)
    features = model.trunk(model.standardise(images))
    torch.testing.assert_close(model.readout(features), model(images))
    assert model(images).shape == (5, 10)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    torch.manual_seed(0)
    control = load("softhebb_mnist", pretrained=False)
    torch.manual_seed(0)
    same = models.cnn((1, 28, 28), 10, width=8, kernel=5)
    assert all(map(torch.equal, control.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(control.trunk[0].weight, model.trunk[0].weight)
    assert (RECORD / "weights.pt").stat().st_size < 300_000


@torch.no_grad()
def test_a_network_from_pixels_standardises_them() -> None:
    model, x = small(), torch.rand(4, 2, 8, 8)
    scaled = torch.stack([(x[:, 0] - 0.2) / 0.5, torch.zeros(4, 8, 8)], 1)  # of a constant channel nothing is seen
    torch.testing.assert_close(model(x), nn.Sequential(*model.trunk, model.readout).eval()(scaled))
    assert not model.training
    with pytest.raises(ValueError, match=r"Linear has no trunk and readout: they need an nn\.Sequential"):
        from_pixels(nn.Linear(3, 2), torch.zeros(1), torch.ones(1))


@torch.no_grad()
def test_a_file_has_the_weights_in_half_precision(tmp_path: Path) -> None:
    model, x = small(), torch.rand(4, 2, 8, 8)
    (tmp_path / "weights.pt").write_bytes(packed(model, {"name": "cnn", "width": 2, "kernel": 3}, (2, 8, 8), 3))
    again = unpacked(tmp_path / "weights.pt")
    for name, value in model.state_dict().items():
        kept = again.state_dict()[name]
        assert torch.equal(kept, value.half().to(value.dtype) if value.is_floating_point() else value), name
    torch.testing.assert_close(again(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("undrawn")
def test_the_network_of_a_run_is_loaded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    summary = run(config("optimizer=hebbian", *TINY, f"run_dir={folder}"))
    model, images = load("from_run", str(folder)), data.load("digits", "")
    assert accuracy_of(model, images) == pytest.approx(summary["test_accuracy"])
    monkeypatch.setattr(keep_weights, "RECORDS", tmp_path)
    with pytest.raises(SystemExit, match="mine has no record; make it first"):
        keep_weights.keep("mine", folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "result.json").write_text('{"seeds": [0]}')
    accuracy = keep_weights.keep("mine", folder)
    assert json.loads((tmp_path / "mine" / "result.json").read_text()) == {
        "seeds": [0],
        "weights_test_accuracy": accuracy,
    }
    assert accuracy == accuracy_of(unpacked(tmp_path / "mine" / "weights.pt"), images)
    assert accuracy == pytest.approx(summary["test_accuracy"], abs=0.02)
    monkeypatch.setattr(keep_weights, "MOST", 100)
    with pytest.raises(SystemExit, match="bytes, more than 100"):
        keep_weights.keep("mine", folder)


@pytest.mark.usefixtures("undrawn")
def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the folder of a finished run"):
        load("from_run", str(tmp_path))
    folder = tmp_path / "run"
    run(config("optimizer=forward_forward", *TINY, f"run_dir={folder}"))
    with pytest.raises(ValueError, match="optimizer=forward_forward predicts in a way of its own"):
        load("from_run", str(folder))


@pytest.mark.long
def test_the_network_runs_in_onnx_as_the_page_exports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs/hub.md").read_text(), re.DOTALL)
    block = next(block for block in blocks if "onnx" in block)
    images, model = torch.rand(5, 1, 28, 28), load("softhebb_mnist")
    names: dict[str, object] = {"torch": torch, "model": model, "images": images}
    exec(block, names)
    pixels = torch.rand(3, 1, 28, 28)
    session: object = names["session"]
    (scores,) = session.run(None, {"pixels": pixels.numpy()})  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted: Tensor = model(pixels)
    torch.testing.assert_close(torch.from_numpy(scores), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_mnist
def test_its_accuracy_is_that_of_its_record() -> None:
    found = accuracy_of(load("softhebb_mnist"), data.load("mnist", ROOT / "data"))
    assert found == pytest.approx(json.loads((RECORD / "result.json").read_text())["weights_test_accuracy"], abs=5e-4)
