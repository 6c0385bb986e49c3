"""Loading and checking data sets; batches, augmentation and features."""

from __future__ import annotations

import math
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from filelock import FileLock
from omegaconf import OmegaConf
from safetensors.torch import save_file

from experiments import data
from experiments.data import checks


def tensors(n: int = 6, shape: tuple[int, int, int] = (3, 8, 8)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)
    labels = (torch.arange(n) % 3).to(torch.uint8)
    return {
        "train_images": images,
        "train_labels": labels,
        "test_images": images[:4].clone(),
        "test_labels": labels[:4].clone(),
    }


def test_digits_need_no_file(tmp_path: Path) -> None:
    digits = data.load("digits", tmp_path / "nowhere")
    assert digits.shape == (1, 28, 28)
    assert digits.classes == 10
    assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_images.max() == 255
    again = data.load("digits", tmp_path)
    assert torch.equal(digits.test_images, again.test_images)  # the same are held out every time
    standard = digits.prepare(digits.train_images)
    assert abs(standard.mean()) < 1e-4
    assert abs(standard.std() - 1) < 1e-4


def test_batches_are_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    digits = data.load("digits", tmp_path)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [y for _, y in digits.training_batches(128, 1, 2, data.Augment())]
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == digits.batches(128) == 11
    same = [y for _, y in digits.training_batches(128, 1, 2, data.Augment())]
    other = [y for _, y in digits.training_batches(128, 1, 3, data.Augment())]
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_training_images_are_held_out() -> None:
    digits = data.load("digits", "nowhere")
    held = digits.hold_out(300)
    assert (len(held.train_labels), len(held.test_labels)) == (1137, 300)
    assert torch.equal(held.test_images, digits.train_images[1137:])
    assert torch.equal(held.train_images, digits.train_images[:1137])
    assert digits.hold_out(0) is digits
    for count in (-1, 1437, 0.5, True):
        with pytest.raises(ValueError, match=f"data.validation={count} must be an integer"):
            digits.hold_out(count)  # type: ignore[arg-type]
    by_class = digits.train_labels.argsort()
    digits.train_labels, digits.train_images = digits.train_labels[by_class], digits.train_images[by_class]
    message = (
        r"data\.validation=200 .* of the 1237 that are left no training image has the label 9, but .*hold out fewer"
    )
    with pytest.raises(ValueError, match=message):
        digits.hold_out(200)


def test_features_replace_images() -> None:
    digits = data.load("digits", "nowhere")
    calls = []

    def trunk(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x.flatten(1)[:, ::7] * 2

    shown = []

    def watched(batches: Iterator[Any], total: int, label: str) -> Iterator[Any]:
        every = [*batches]
        shown.append((label, total, len(every)))
        return iter(every)

    features = data.Features(digits, trunk, data.Augment(), watched)
    assert shown == [("features of the test images", 2, 2), ("features of the training images", 6, 6)]
    assert features.kept
    made = sum(calls)
    assert made == 1437 + 360
    assert features.batches(100) == digits.batches(100)
    for (seen, y), (x, labels) in zip(
        features.training_batches(100, 3, 1, data.Augment()),
        digits.training_batches(100, 3, 1, data.Augment()),
        strict=True,
    ):
        assert torch.equal(seen, x.flatten(1)[:, ::7] * 2)
        assert torch.equal(y, labels)
    assert sum(len(y) for _, y in features.test_batches(data.Augment())) == 360
    assert sum(calls) == made  # computed once
    augmented = data.Features(digits, trunk, data.Augment(crop=1))
    assert not augmented.kept
    (first, _), (same, _) = (
        next(f)
        for f in [
            augmented.training_batches(100, 3, 1, data.Augment(crop=1)),
            digits.training_batches(100, 3, 1, data.Augment(crop=1)),
        ]
    )
    assert torch.equal(first, same.flatten(1)[:, ::7] * 2)


def test_augmentation_against_a_loop() -> None:
    images = tensors(50)["train_images"]
    augment, generator = data.Augment(crop=2, flip=True), torch.Generator().manual_seed(3)
    got = augment(images, generator)
    twin = torch.Generator().manual_seed(3)
    flipped = (torch.rand(50, generator=twin) < 0.5).tolist()
    dy, dx = torch.randint(0, 5, (2, 50), generator=twin).tolist()
    for i, image in enumerate(images):
        image = image.flip(2) if flipped[i] else image
        padded = torch.zeros(3, 12, 12, dtype=torch.uint8)
        padded[:, 2:10, 2:10] = image
        assert torch.equal(got[i], padded[:, dy[i] : dy[i] + 8, dx[i] : dx[i] + 8])
    assert torch.equal(data.Augment()(images, generator), images)
    for name in ("crop", "rotate", "scale", "elastic"):
        with pytest.raises(ValueError, match=rf"data\.augment\.{name}=-1 must be an? \w+ >= 0"):
            data.Augment(**{name: -1})
        for wrong in (math.inf, math.nan, True, "3"):
            with pytest.raises(ValueError, match=rf"data\.augment\.{name}={wrong} must be an? \w+ >= 0"):
                data.Augment(**{name: wrong})  # type: ignore[arg-type]


def test_images_are_rotated_and_scaled_about_their_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    line = torch.zeros(400, 1, 29, 29, dtype=torch.uint8)
    line[:, :, 14, 4:25] = 200
    rows, columns = torch.meshgrid(torch.arange(29) - 14.0, torch.arange(29) - 14.0, indexing="ij")

    def moment(images: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        weights = images[:, 0].double()
        return (weights * of).sum((1, 2)) / weights.sum((1, 2))

    turned = data.Augment(rotate=30)(line, generator)
    assert turned.dtype == torch.uint8
    slope = moment(turned, rows * columns) / (moment(turned, columns**2) - moment(turned, rows**2))
    degrees = torch.rad2deg(torch.atan(2 * slope) / 2)
    assert 27 < degrees.max() < 31
    assert -31 < degrees.min() < -27
    assert degrees.abs().mean() == pytest.approx(15, abs=2)
    stretched = data.Augment(scale=0.25)(line, generator)
    lengths = (moment(stretched, columns**2) / moment(line, columns**2)).sqrt()
    assert 1.2 < lengths.max() < 1.28
    assert 0.78 < lengths.min() < 0.84
    for images in (turned, stretched):
        assert moment(images, columns).abs().max() < 0.2
        assert moment(images, rows).abs().max() < 0.2


def test_images_are_deformed_smoothly() -> None:
    ramp = (8 * torch.arange(29, dtype=torch.uint8)).expand(500, 1, 29, 29).contiguous()
    generator = torch.Generator().manual_seed(0)
    shift = (data.Augment(elastic=1.0)(ramp, generator).float() - ramp)[:, 0] / 8  # columns that a pixel has moved
    assert shift[:, 14, 14].std() == pytest.approx(1, abs=0.1)  # a knot

    def alike(distance: int) -> float:
        return torch.corrcoef(torch.stack([shift[:, 14, 14], shift[:, 14 + distance, 14]]))[0, 1].item()

    assert alike(1) > 0.9
    assert 0.3 < alike(4) < 0.8
    assert abs(alike(14)) < 0.15
    less = (data.Augment(elastic=0.5)(ramp, generator).float() - ramp)[:, 0] / 8
    assert less[:, 14, 14].std() == pytest.approx(0.5, abs=0.05)


def test_predictions_are_averaged_over_views_of_a_test_image() -> None:
    digits = data.load("digits", "nowhere")
    augment = data.Augment(crop=1, rotate=5, views=3)

    def trunk(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)

    features = data.Features(digits, trunk, augment)
    whole = torch.cat([inputs for inputs, _ in features.test_batches(augment)])
    assert torch.equal(torch.cat([labels for _, labels in features.test_batches(augment)]), digits.test_labels)
    inputs, labels = next(digits.test_batches(augment))
    assert (len(inputs), len(labels)) == (249, 83)  # as many images at a time as without views
    torch.testing.assert_close(whole[:83], trunk(inputs).view(3, 83, -1).mean(0))
    assert not torch.equal(inputs[:83], inputs[83:166])
    assert torch.equal(inputs, next(digits.test_batches(augment))[0])  # the same ones every time
    assert data.Features(digits, trunk, data.Augment()).kept
    with pytest.raises(ValueError, match=r"data\.augment\.views=3, but without another augmentation all views"):
        data.Augment(views=3)
    with pytest.raises(ValueError, match=r"data\.augment\.views=0 must be an integer >= 1"):
        data.Augment(views=0)


CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def fake(monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...]) -> list[bool]:
    """A torchvision data set as its class presents it after the download."""
    fetched: list[bool] = []

    def source(root: Path, train: bool, download: bool) -> SimpleNamespace:
        assert download
        fetched.append(train)
        values = np.arange(np.prod(shape), dtype=np.int64) % 256
        images = values.astype(np.uint8).reshape(shape)
        channels_last = len(shape) == 4
        targets = [i % 10 for i in range(len(images))]
        return SimpleNamespace(
            data=images if channels_last else torch.from_numpy(images),
            targets=targets if channels_last else torch.tensor(targets),
        )

    monkeypatch.setattr(torchvision.datasets, CLASSES[name], source)
    return fetched


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("mnist", (20, 28, 28), (1, 28, 28)),
        ("fashion_mnist", (20, 28, 28), (1, 28, 28)),
        ("cifar10", (20, 32, 32, 3), (3, 32, 32)),
    ],
)
def test_fetched_once_through_torchvision(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fake(monkeypatch, name, shape)
    images = data.load(name, tmp_path / "new")
    assert fetched == [True, False]
    assert images.shape == expected
    if name == "cifar10":  # height × width × channels in torchvision
        assert images.train_images[0, 1, 0, 0] == 1
        assert images.train_images[0, 0, 0, 1] == 3
    assert {p.name for p in (tmp_path / "new").iterdir()} <= {f"{name}.safetensors", f".{name}.lock"}
    again = data.load(name, tmp_path / "new")
    assert fetched == [True, False]
    assert torch.equal(images.train_images, again.train_images)


def test_missing_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def source(*args: object, **kwargs: object) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>\nand more")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", source)
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", tmp_path)
    text = str(error.value)
    assert "data set 'cifar10' is not at" in text
    assert "name resolution" in text
    assert "data=digits" in text
    assert "\n" not in text
    with pytest.raises(
        FileNotFoundError, match="only cifar10, cifar100, mnist, fashion_mnist, shd, stl10, svhn can be fetched"
    ):
        data.load("imagenet", tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mnist.safetensors"
    good = tensors()
    save_file(good, path)
    data.load("mnist", tmp_path)
    whole = path.read_bytes()
    damaged: list[bytes | dict[str, torch.Tensor]] = [
        whole[: len(whole) // 2],
        b"not at all",
        {k: v for k, v in good.items() if k != "test_labels"},
        {**good, "train_labels": good["train_labels"][:3]},
        {**good, "train_images": good["train_images"].float()},
    ]
    for content in damaged:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path)
        with pytest.raises(ValueError, match=r"mnist\.safetensors is damaged .*delete .*'mnist' anew"):
            data.load("mnist", tmp_path)


def test_a_damaged_file_without_a_loader_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mine\.safetensors is damaged .*write .*mine\.safetensors again, or choose"):
        data.load("mine", tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"folder\.safetensors is damaged"):
        data.load("folder", tmp_path)


CONSTANT = torch.full((6, 3, 8, 8), 7, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": CONSTANT}, "all training images are the same"),
        (
            {"test_images": CONSTANT[:4, :1]},
            r"training images are \(3, 8, 8\) \(C, H, W\), but the test images \(1, 8, 8",
        ),
        ({"test_images": CONSTANT[:4, :, :7]}, r"but the test images \(3, 7, 8\)"),
        (
            {"train_labels": torch.tensor([0, 1, 2, -100, 1, 2])},
            "train_labels has -100, but labels are integers from 0",
        ),
        ({"test_labels": torch.tensor([0, 1, 2, 0.7])}, "test_labels has 0.7, but labels are integers"),
        ({"test_labels": torch.tensor([0, 1, 2, math.nan])}, "test_labels has nan, but labels are integers"),
        (
            {"test_labels": torch.zeros(4, dtype=torch.cfloat)},
            "test_labels is torch.complex64, but labels are integers",
        ),
        ({"test_labels": torch.tensor([0, 1, 3, 255])}, "no training image has the label 3, 255, but test images have"),
        ({"train_labels": torch.full((6,), 255)}, "the label 255 would mean 256 classes of 6 training images"),
        ({"train_labels": torch.full((6,), 1)}, "all training images have the label 1"),
        ({"test_labels": torch.zeros(3)}, r"is damaged .*test_labels \(3,\)"),
        ({"train_images": CONSTANT[:, :, :0]}, r"is damaged .*train_images is torch.uint8 \(6, 3, 0, 8\)"),
    ],
)
def test_data_that_cannot_be_learned_are_named_at_loading(
    changed: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file({key: value.contiguous() for key, value in (tensors() | changed).items()}, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=rf"{message}.*; write {tmp_path}/mine\.safetensors again, or choose") as error:
        data.load("mine", tmp_path)
    assert "\n" not in str(error.value)


def test_a_constant_channel_becomes_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tensors()
    good["train_images"][:, 1] = 211  # whose mean in float32 is not exact
    save_file(good, tmp_path / "mine.safetensors")
    images = data.load("mine", tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith(f"warning: data set 'mine', {tmp_path}/mine.safetensors: channel 1 of 3 is constant")
    assert printed.count("\n") == 1
    for part in (images.train_images, images.test_images):  # the test images have something in it
        assert images.prepare(part)[:, 1].count_nonzero() == 0
    assert images.prepare(images.train_images)[:, 2].std() == pytest.approx(1)


def test_a_difference_in_the_last_image_counts() -> None:
    images = torch.zeros(2500, 2, 4, 4, dtype=torch.uint8)
    images[-1, 0, 3, 3] = 1
    assert checks.constant_channels(images) == [1]


def test_labels_may_have_gaps_and_be_integral_floats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tensors()
    good["train_labels"] = torch.tensor([0.0, 1.0, 3.0, 0.0, 1.0, 3.0])
    good["test_labels"] = torch.tensor([0, 1, 3, 0])
    save_file(good, tmp_path / "mine.safetensors")
    images = data.load("mine", tmp_path)
    assert images.classes == 4
    assert images.train_labels.dtype == torch.long
    assert "labels go up to 3, but no training image has 2\n" in capsys.readouterr().out


def test_checking_is_fast() -> None:
    images = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8).repeat(10, 1, 1, 1)  # as large as CIFAR-10
    labels = torch.arange(50_000) % 10
    begin = time.process_time()
    assert checks.check_content(images, labels, labels) == []
    assert time.process_time() - begin < 0.05


def test_one_process_fetches_and_the_others_read_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched = fake(monkeypatch, "mnist", (20, 28, 28))
    found: list[data.Images] = []
    threads = [threading.Thread(target=lambda: found.append(data.load("mnist", tmp_path))) for _ in range(3)]
    printed, deadline = "", time.monotonic() + 20
    with FileLock(tmp_path / ".mnist.lock"):  # a fourth, which fails to fetch it
        for thread in threads:
            thread.start()
        while printed.count("waiting for another process that fetches data set 'mnist'") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
            printed += capsys.readouterr().out
    for thread in threads:
        thread.join()
    assert fetched == [True, False]
    assert len(found) == 3
    assert all(torch.equal(images.train_images, found[0].train_images) for images in found)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "mnist", (200, 28, 28))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # of any file, from here on
    try:
        with pytest.raises(ValueError, match=r"mnist\.safetensors cannot be written \(.*\); make room there, or set"):
            data.load("mnist", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {p.name for p in tmp_path.iterdir()} <= {".mnist.lock"}
    assert data.load("mnist", tmp_path).shape == (1, 28, 28)


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*file cannot be written \(.*\); set data\.root="):
        data.load("mnist", tmp_path / "file")


def test_a_root_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(tensors(), tmp_path / "mine.safetensors")
    assert data.load("mine", "~").shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"data\.root=None must be a folder"):
        data.load("mine", None)  # type: ignore[arg-type]


def test_images_are_scaled_to_the_chosen_size(tmp_path: Path) -> None:
    good = tensors(n=1200, shape=(3, 12, 18))
    save_file(good, tmp_path / "mine.safetensors")
    for wrong in (0, -1, 2.5, True, "32"):
        with pytest.raises(ValueError, match=rf"data\.size={wrong} must be an integer >= 1, or null"):
            data.load("mine", tmp_path, size=wrong)  # type: ignore[arg-type]
    assert torch.equal(data.load("mine", tmp_path, size=12).train_images, good["train_images"])
    half = data.load("mine", tmp_path, size=6)
    assert half.shape == (3, 6, 9)
    assert (len(half.train_images), len(half.test_images)) == (1200, 4)
    expected = torch.nn.functional.interpolate(
        good["train_images"][1000:].double(), (6, 9), mode="bilinear", antialias=True
    )
    assert (half.train_images[1000:].double() - expected).abs().max() < 0.51
    assert half.prepare(half.train_images).std() == pytest.approx(1, abs=1e-3)  # of the scaled images
    assert data.load("digits", "nowhere", size=32).shape == (1, 32, 32)


def test_the_options_of_a_data_set_reach_its_images(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "mine.safetensors")
    options = {"name": "mine", "root": str(tmp_path)}
    assert data.from_config(OmegaConf.create(options)).shape == (3, 8, 8)
    assert data.from_config(OmegaConf.create({**options, "size": 4})).shape == (3, 4, 4)
