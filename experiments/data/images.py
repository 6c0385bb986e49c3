"""Images of a data set on a device: standardised, in batches, shuffled by seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .augmentation import Augment
from .checks import check_content, constant_channels

EVALUATION_BATCH = 250  # images at a time where nothing is learned: the activity of wide layers takes much memory


@dataclass
class Images:
    """A data set on a device: uint8 images N×C×H×W, integer labels, and the scale that standardises a channel.

    A channel that is the same in all training images carries no information: its scale is infinite, so that it enters
    the network as zeros.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        means, deviations = [], []
        for channel in self.train_images.transpose(0, 1):
            pixels = channel.float().div_(255)  # four times the memory: one channel at a time
            means.append(pixels.mean())
            deviations.append(pixels.std())
        self.mean, self.std = (torch.stack(values).view(1, -1, 1, 1) for values in (means, deviations))
        for channel in constant_channels(self.train_images):
            self.std[:, channel] = math.inf

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
        """The data set without its last ``count`` training images, which replace the test set, to choose settings by.

        Raises:
            ValueError: ``count`` is not an integer >= 0, or leaves too few images to learn from.
        """
        images, labels = self.train_images, self.train_labels
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < len(labels):
            raise ValueError(
                f"data.validation={count} must be an integer >= 0 and below the {len(labels)} training images"
            )
        if not count:
            return self
        kept = len(labels) - count
        held = Images(self.name, images[:kept], labels[:kept], images[kept:], labels[kept:])
        try:
            check_content(held.train_images, held.train_labels, held.test_labels)
        except ValueError as error:
            raise ValueError(
                f"data.validation={count} holds out the last {count} training images, and of the {kept} that are left "
                f"{error}; hold out fewer, or shuffle the training set"
            ) from None
        return held

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
        """The indices of each batch of an epoch, and the generator for its augmentation."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_labels), generator=generator).to(self.train_labels.device)
        for start in range(0, self.batches(batch_size) * batch_size, batch_size):
            yield order[start : start + batch_size], generator

    def batches(self, batch_size: int) -> int:
        """Training batches per epoch."""
        return len(self.train_labels) // batch_size

    def test_batches(self, augment: Augment, batch_size: int = EVALUATION_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order; of several views, first the first view of the whole batch, then the second, ..."""
        generator = torch.Generator().manual_seed(0)  # the same views every time
        still = replace(augment, frames=1)
        parts = (torch.split(t, max(batch_size // augment.views, 1)) for t in (self.test_images, self.test_labels))
        for images, labels in zip(*parts, strict=True):
            if augment.views > 1:
                images = torch.cat([still(images, generator) for _ in range(augment.views)])
            yield self.prepare(images), labels
