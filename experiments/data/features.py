"""A data set as the output of a frozen trunk, on which a readout is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .augmentation import Augment
from .images import EVALUATION_BATCH, Images


class Features:
    """The features that a frozen trunk computes from a data set: the input of the readout, in place of the images.

    They are computed once and kept if images are not augmented and the features need at most `KEPT_BYTES`; otherwise
    they are computed for each batch. Has the methods of `Images` that training and evaluation need. Batches are in
    single precision, whatever the features are kept in.

    Args:
        images: the data set.
        trunk: computes the features.
        augment: of images.
        watched: hands on batches; is given their number as well, and a label, to show how far it is.
    """

    KEPT_BYTES = 8 * 2**30

    def __init__(
        self,
        images: Images,
        trunk: Callable[[Tensor], Tensor],
        augment: Augment,
        watched: Callable[[Iterator[Any], int, str], Iterator[Any]] = lambda batches, total, label: batches,
    ) -> None:
        self.images = images
        self.trunk = trunk
        self.test_labels = images.test_labels
        count = math.ceil(len(images.test_labels) / max(EVALUATION_BATCH // augment.views, 1))
        self._test = [  # the readout is affine: its output for the mean of all views is the mean of its outputs
            trunk(inputs).unflatten(0, (-1, len(labels))).mean(0)
            for inputs, labels in watched(images.test_batches(augment), count, "features of the test images")
        ]
        self._train: Tensor | None = None  # where they are kept
        bytes_per_image = self._test[0][0].numel() * self._test[0].element_size()
        if augment == Augment() and bytes_per_image * len(images.train_labels) <= self.KEPT_BYTES:
            self._train = self._test[0].new_empty(len(images.train_labels), *self._test[0].shape[1:])
            kept, inputs = (torch.split(t, EVALUATION_BATCH) for t in (self._train, images.train_images))
            parts = zip(kept, inputs, strict=True)
            for features, part in watched(parts, len(kept), "features of the training images"):
                features.copy_(trunk(images.prepare(part)))

    @property
    def kept(self) -> bool:
        """Whether the features of the training images are kept, so that the trunk need not run again."""
        return self._train is not None

    def training_batches(
        self, batch_size: int, seed: int, epoch: int, augment: Augment
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.training_batches`, with the same samples in the same order."""
        if self._train is None:
            for inputs, labels in self.images.training_batches(batch_size, seed, epoch, augment):
                yield self.trunk(inputs).float(), labels
        else:
            for index, _ in self.images.order(batch_size, seed, epoch):
                yield self._train[index].float(), self.images.train_labels[index]

    def batches(self, batch_size: int) -> int:
        """Training batches per epoch."""
        return self.images.batches(batch_size)

    def test_batches(self, augment: Augment) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order; the features of an image are the mean over its views."""
        for features, labels in zip(self._test, torch.split(self.test_labels, len(self._test[0])), strict=True):
            yield features.float(), labels
