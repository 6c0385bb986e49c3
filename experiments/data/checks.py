"""What can be wrong with a data set, found when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SPLITS = ("train_images", "train_labels", "test_images", "test_labels")  # the tensors of a data set


def check_form(tensors: Mapping[str, Tensor]) -> None:
    """Check that all four tensors are there, with the right shapes and types.

    Raises:
        ValueError: names what is missing or wrong.
    """
    if missing := [key for key in SPLITS if key not in tensors]:
        raise ValueError(f"no {', '.join(missing)}")
    for split in ("train", "test"):
        images, labels = tensors[f"{split}_images"], tensors[f"{split}_labels"]
        wrong = images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != (len(images),)
        if wrong or not images.numel():
            raise ValueError(
                f"{split}_images is {images.dtype} {tuple(images.shape)} and {split}_labels {tuple(labels.shape)}, "
                "not uint8 (N, C, H, W) and (N,), none of them 0"
            )


def check_data(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the right form with labels as int64, and warnings about them.

    Raises:
        ValueError: nothing can be learned from them.
    """
    checked = dict(tensors)
    for key in ("train_labels", "test_labels"):
        checked[key] = _integer_labels(key, checked[key])
    train, test = (tuple(checked[f"{split}_images"].shape[1:]) for split in ("train", "test"))
    if train != test:
        raise ValueError(f"the training images are {train} (C, H, W), but the test images {test}")
    return checked, check_content(checked["train_images"], checked["train_labels"], checked["test_labels"])


def check_returned(name: str, tensors: Any) -> tuple[dict[str, Tensor], list[str]]:
    """What the loader of data set ``name`` has returned, checked like a file.

    Raises:
        ValueError: it has another form, or nothing can be learned from it.
    """
    try:
        if not isinstance(tensors, dict):
            raise ValueError(f"it is no dictionary, but {type(tensors).__name__}")
        check_form(tensors)
        return check_data(tensors)
    except ValueError as error:
        raise ValueError(f"the loader of data set '{name}' has returned what cannot be learned: {error}") from None


def check_content(images: Tensor, labels: Tensor, test_labels: Tensor) -> list[str]:
    """Refuse a training set from which nothing can be learned, and return warnings about one that is unusual."""
    constant, channels = constant_channels(images), images.shape[1]
    if len(constant) == channels:
        raise ValueError("all training images are the same, each pixel of a channel like the others")
    present = labels.unique().tolist()
    classes = present[-1] + 1
    if classes > len(labels):
        raise ValueError(f"the label {present[-1]} would mean {classes} classes of {len(labels)} training images")
    if len(present) == 1:
        raise ValueError(f"all training images have the label {present[0]}")
    if absent := sorted({*test_labels.unique().tolist()}.difference(present)):
        raise ValueError(f"no training image has the label {_listed(absent)}, but test images have")
    warnings = [f"channel {number} of {channels} is constant, and enters the network as zeros" for number in constant]
    if len(present) < classes:
        unused = sorted(set(range(classes)).difference(present))
        warnings.append(f"labels go up to {present[-1]}, but no training image has {_listed(unused)}")
    return warnings


def constant_channels(images: Tensor) -> list[int]:
    """The channels that have the same value in all pixels of all images."""
    return [
        number
        for number, channel in enumerate(images.transpose(0, 1))
        # The first image usually decides it: the others are only read while no difference is found.
        if all(bool((part == channel[0, 0, 0]).all()) for part in (channel[:1], *channel.split(1000)))
    ]


def _integer_labels(key: str, labels: Tensor) -> Tensor:
    """Labels as int64; floats only where they are integers."""
    if labels.is_complex():
        raise ValueError(f"{key} is {labels.dtype}, but labels are integers")
    integers = labels.long()
    if labels.is_floating_point() and (wrong := labels.double() != integers).any():
        raise ValueError(f"{key} has {labels[wrong][0].item():g}, but labels are integers")
    if (integers < 0).any():
        raise ValueError(f"{key} has {int(integers.min())}, but labels are integers from 0")
    return integers


def _listed(numbers: list[int]) -> str:
    """The numbers; of many, the first five."""
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} others" if len(numbers) > 5 else "")
