"""Image data sets as tensors: loaded once, kept on the device, indexed and augmented in batches.

A data set is one file, ``<root>/<name>.safetensors``, with ``train_images`` (uint8, N×C×H×W), ``train_labels``,
``test_images`` and ``test_labels``. Where it is missing, torchvision fetches the original and the file is written;
``digits`` needs no file, it comes with scikit-learn.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

EVALUATED = 250  # images at a time, where nothing is learned: wide layers say much of each
SPLITS = ("train_images", "train_labels", "test_images", "test_labels")
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


@dataclass
class Images:
    """A data set on a device: uint8 images N×C×H×W, integer labels, and the scale that standardises a channel."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        channels = [c.float() / 255 for c in self.train_images.transpose(0, 1)]
        shape = (1, len(channels), 1, 1)
        self.mean = torch.stack([c.mean() for c in channels]).view(shape)
        self.std = torch.stack([c.std() for c in channels]).view(shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train_labels.max()) + 1

    def hold_out(self, count: int) -> Images:
        """The training set without its last ``count`` images, which take the test set's place: to choose settings by.

        Raises:
            ValueError: fewer than none, or no image would be left to train on.
        """
        kept = len(self.train_labels) - count
        if count < 0 or kept < 1:
            raise ValueError(f"data.validation={count} must be >= 0 and below the {kept + count} training images")
        return Images(
            self.name,
            self.train_images[:kept],
            self.train_labels[:kept],
            self.train_images[kept:],
            self.train_labels[kept:],
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Network input: float, channels last, zero mean and unit variance in each channel over the training set."""
        scaled = images.to(torch.float32, memory_format=torch.channels_last).div_(255)
        return scaled.sub_(self.mean).div_(self.std)

    def training_batches(
        self, batch_size: int, seed: int, epoch: int, augment: Augment
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of one epoch, a function of ``(seed, epoch)`` alone; an incomplete last one is left out."""
        for index, generator in self.order(batch_size, seed, epoch):
            images = self.prepare(augment(self.train_images[index], generator))
            yield images, self.train_labels[index].repeat_interleave(augment.frames)

    def order(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Which samples make up each batch of an epoch, and the generator for what else is random in it."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_labels), generator=generator).to(self.train_labels.device)
        for start in range(0, self.batches(batch_size) * batch_size, batch_size):
            yield order[start : start + batch_size], generator

    def batches(self, batch_size: int) -> int:
        """Training batches an epoch."""
        return len(self.train_labels) // batch_size

    def test_batches(self, augment: Augment, batch_size: int = EVALUATED) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order, all views of a batch one after another: a multiple of the labels."""
        generator = torch.Generator().manual_seed(0)  # the same views every time
        one = replace(augment, frames=1)
        parts = (torch.split(t, max(batch_size // augment.views, 1)) for t in (self.test_images, self.test_labels))
        for images, labels in zip(*parts, strict=True):
            if augment.views > 1:
                images = torch.cat([one(images, generator) for _ in range(augment.views)])
            yield self.prepare(images), labels


class Features:
    """A data set as a frozen trunk sees it: what enters the readout, in place of the images.

    Computed once and kept, where each image always looks the same and they fit (`KEPT_BYTES`); otherwise anew for
    each batch. Has the methods of `Images` that training and evaluation need.
    """

    KEPT_BYTES = 8 * 2**30

    def __init__(self, images: Images, trunk: Callable[[Tensor], Tensor], augment: Augment) -> None:
        self.images = images
        self.trunk = trunk
        self.test_labels = images.test_labels
        self._test = [  # the readout is affine: the mean of what it says of the views is what it says of their mean
            trunk(inputs).unflatten(0, (-1, len(labels))).mean(0) for inputs, labels in images.test_batches(augment)
        ]
        self._train: Tensor | None = None  # kept
        bytes_each = self._test[0][0].numel() * self._test[0].element_size()
        if augment == Augment() and bytes_each * len(images.train_labels) <= self.KEPT_BYTES:
            self._train = self._test[0].new_empty(len(images.train_labels), *self._test[0].shape[1:])
            parts = zip(*(torch.split(t, EVALUATED) for t in (self._train, images.train_images)), strict=True)
            for kept, part in parts:
                kept.copy_(trunk(images.prepare(part)))

    @property
    def kept(self) -> bool:
        """Whether the trunk need not run again."""
        return self._train is not None

    def training_batches(
        self, batch_size: int, seed: int, epoch: int, augment: Augment
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `Images`, the same samples in the same order."""
        if self._train is None:
            for inputs, labels in self.images.training_batches(batch_size, seed, epoch, augment):
                yield self.trunk(inputs), labels
        else:
            for index, _ in self.images.order(batch_size, seed, epoch):
                yield self._train[index], self.images.train_labels[index]

    def batches(self, batch_size: int) -> int:
        """Training batches an epoch."""
        return self.images.batches(batch_size)

    def test_batches(self, augment: Augment) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order, each image's features the mean of its views'."""
        return zip(self._test, torch.split(self.test_labels, len(self._test[0])), strict=True)


@dataclass
class Augment:
    """Batched augmentation, drawn anew for each image.

    Args:
        crop: shift by up to so many pixels each way (padded with zeros).
        flip: mirror half of the images.
        rotate: turn by up to so many degrees either way.
        scale: stretch each axis by a factor of up to ``1 + scale``, or shrink it by as much.
        elastic: bend: knots, 7 pixels apart, are displaced by so many pixels (standard deviation each way), and what is
            between them smoothly with them. After P. Y. Simard, D. Steinkraus & J. C. Platt (2003), *Best practices for
            convolutional neural networks applied to visual document analysis*, whose best setting comes to 1.4.
        views: of a test image, so many are drawn as those of a training image, and predictions averaged over them;
            1: the test image as it is. Turned, stretched and bent images are interpolated, and so a little blurred: a
            network that has learned from them wants to be tested on such.
        frames: of a training image, so many successive ones, which move evenly from one place to another within
            ``crop`` pixels: a sequence, for costs that compare its steps.
    """

    crop: int = 0
    flip: bool = False
    rotate: float = 0
    scale: float = 0
    elastic: float = 0
    views: int = 1
    frames: int = 1

    def __post_init__(self) -> None:
        for name, least in {"crop": 0, "rotate": 0, "scale": 0, "elastic": 0, "views": 1, "frames": 1}.items():
            value, whole = getattr(self, name), name in ("crop", "views", "frames")
            if not isinstance(value, int if whole else int | float) or not value >= least:
                kind = "an integer" if whole else "a number"
                raise ValueError(f"data.augment.{name}={value} must be {kind} >= {least}")
        if self.views > 1 and not (self.crop or self.flip or self.rotate or self.scale or self.elastic):
            raise ValueError(
                f"data.augment.views={self.views}, but without another augmentation all views are the same"
            )
        if self.frames > 1 and not self.crop:
            raise ValueError(
                f"data.augment.frames={self.frames}, but with data.augment.crop=0 an image has nowhere to move"
            )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch with numbers drawn on the CPU, so that all devices see the same."""
        n, _, height, width = images.shape
        device = images.device
        if self.flip:
            flipped = torch.rand(n, generator=generator).to(device) < 0.5
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
        if self.rotate or self.scale or self.elastic:
            images = self._warp(images, generator)
        if self.crop:
            dy, dx = torch.randint(0, 2 * self.crop + 1, (2, n), generator=generator).to(device)
            if self.frames > 1:
                to = torch.randint(0, 2 * self.crop + 1, (2, n), generator=generator).to(device)
                way = torch.linspace(0, 1, self.frames, device=device)
                start, end = (place.unsqueeze(2).float() for place in (torch.stack([dy, dx]), to))
                dy, dx = torch.lerp(start, end, way).round().long().flatten(1)
                images = images.repeat_interleave(self.frames, 0)
                n *= self.frames
            rows = (dy[:, None] + torch.arange(height, device=device))[:, None, :, None]
            columns = (dx[:, None] + torch.arange(width, device=device))[:, None, None, :]
            padded = F.pad(images, [self.crop] * 4)
            sample = torch.arange(n, device=device).view(-1, 1, 1, 1)
            channel = torch.arange(images.shape[1], device=device).view(1, -1, 1, 1)
            images = padded[sample, channel, rows, columns]
        return images

    def _warp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Turn and stretch about the centre, and bend."""
        n, _, height, width = images.shape
        draws = (2 * torch.rand(3, n, generator=generator) - 1).to(images.device)
        angle, stretch = draws[0] * math.radians(self.rotate), (1 + self.scale) ** draws[1:]
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        matrix = F.pad(turn * stretch.T[:, None, :], (0, 1))
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        if self.elastic:
            knots = torch.randn(n, 2, height // 7 + 1, width // 7 + 1, generator=generator).to(images.device)
            bend = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
            grid += bend * (2 * self.elastic / torch.tensor([width, height], device=images.device))
        return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def load(name: str, root: str | Path, device: torch.device | str = "cpu") -> Images:
    """Load a data set, fetching it first where its file is missing.

    Raises:
        FileNotFoundError: it is missing and could not be fetched.
        ValueError: its file is damaged, or there is no such data set.
    """
    if name == "digits":
        tensors = _digits()
    else:
        path = Path(root) / f"{name}.safetensors"
        if not path.exists():
            _fetch(name, Path(root), path)
        tensors = _read(name, path)
    return Images(name, **{key: tensors[key].to(device) for key in SPLITS})


def _read(name: str, path: Path) -> dict[str, Tensor]:
    way_out = f"delete {path} and run again to fetch data set '{name}' anew"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); {way_out}") from None
    missing = [key for key in SPLITS if key not in tensors]
    if missing:
        raise ValueError(f"{path} is damaged (no {', '.join(missing)}); {way_out}")
    for split in ("train", "test"):
        images, labels = tensors[f"{split}_images"], tensors[f"{split}_labels"]
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != (len(images),) or not len(images):
            raise ValueError(
                f"{path} is damaged ({split}_images is {images.dtype} {tuple(images.shape)} and {split}_labels "
                f"{tuple(labels.shape)}, not uint8 (N, C, H, W) and (N,)); {way_out}"
            )
        tensors[f"{split}_labels"] = labels.long()
    return tensors


def _fetch(name: str, root: Path, path: Path) -> None:
    """Bring a data set through torchvision and keep it as one file."""
    import torchvision

    if name not in TORCHVISION:
        raise FileNotFoundError(f"data set '{name}' is not at {path}, and only {', '.join(TORCHVISION)} can be fetched")
    source = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            parts = [source(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise FileNotFoundError(
            f"data set '{name}' is not at {path} and could not be downloaded ({_first_line(error)}). Connect to the "
            f"network, put the file there, set data.root=<folder that holds it>, or use data=digits, which needs none"
        ) from None
    tensors: dict[str, Tensor] = {}
    for split, part in zip(("train", "test"), parts, strict=True):
        images = torch.as_tensor(part.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        tensors[f"{split}_images"] = images.contiguous()
        tensors[f"{split}_labels"] = torch.as_tensor(part.targets, dtype=torch.uint8)
    whole = path.with_suffix(f".{os.getpid()}.part")
    save_file(tensors, whole)
    whole.replace(path)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _digits() -> dict[str, Tensor]:
    """scikit-learn's 1,797 handwritten digits, 8×8 resized to 28×28; a fifth of each class is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).round().to(torch.uint8)
    train, test = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    labels = torch.tensor(digits.target, dtype=torch.long)
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
    }
