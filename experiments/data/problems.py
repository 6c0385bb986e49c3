"""Harder problems made from a data set: labels that are wrong, rare, few, or depend on a context.

Each function takes a data set and returns another; its random numbers come from the caller's generator. The labels of
the test set stay correct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bioopt.costs import UNLABELLED

from .images import Images


def subset(images: Images, generator: torch.Generator, train: int, validation: int | None = None) -> Images:
    """``train`` random training images, which depend on the generator alone and not on ``validation``.

    Args:
        images: to draw from.
        generator: of the draw.
        train: number of training images.
        validation: number of other training images that replace the test set; ``None`` keeps the test set.

    Raises:
        ValueError: one of the numbers is below 1, or their sum is above the number of training images.
    """
    total = len(images.train_labels)
    if train < 1 or (validation is not None and validation < 1) or train + (validation or 0) > total:
        raise ValueError(
            f"train={train} and validation={validation} images must be >= 1 each, and together at most the {total} "
            f"training images of {images.name}"
        )
    order = torch.randperm(total, generator=generator).to(images.train_labels.device)
    kept, held_out = order[:train], order[train : train + (validation or 0)]
    chosen = replace(images, train_images=images.train_images[kept], train_labels=images.train_labels[kept])
    if validation is None:
        return chosen
    return replace(chosen, test_images=images.train_images[held_out], test_labels=images.train_labels[held_out])


def clean(images: Images, generator: torch.Generator) -> Images:
    """The data set itself."""
    return replace(images)


def wrong_labels(images: Images, generator: torch.Generator, share: float = 0.4) -> Images:
    """A random share of the training labels is replaced by another class, each of the others with equal probability.

    Raises:
        ValueError: ``share`` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be a number in [0, 1]")
    labels = images.train_labels.clone()
    known = (labels != UNLABELLED).nonzero().squeeze(1).cpu()
    wrong = known[torch.randperm(len(known), generator=generator)[: round(share * len(known))]]
    away = torch.randint(1, images.classes, (len(wrong),), generator=generator).to(labels.device)
    labels[wrong] = (labels[wrong] + away) % images.classes
    return replace(images, train_labels=labels)


def imbalanced(images: Images, generator: torch.Generator, ratio: float = 50) -> Images:
    """Of class ``c`` of ``C``, a share ``ratio ** (-c / (C - 1))`` of the training images is kept, and at least one.

    The first class keeps all of its images, the last a share of ``1 / ratio``.

    Raises:
        ValueError: ``ratio`` is below 1.
    """
    if not ratio >= 1:
        raise ValueError(f"ratio={ratio} must be a number >= 1: of images of the first class to those of the last")
    kept = []
    for c, members in enumerate(_by_class(images, generator)):
        share = ratio ** (-c / max(images.classes - 1, 1))
        kept.append(members[: max(1, round(share * len(members)))])
    index = torch.cat(kept).sort().values
    return replace(images, train_images=images.train_images[index], train_labels=images.train_labels[index])


def few_labels(images: Images, generator: torch.Generator, count: int = 100) -> Images:
    """``count`` training images keep their label, equally many of each class (or one more); the others have none.

    Raises:
        ValueError: there are fewer labels than classes, or a class has too few images.
    """
    classes = images.classes
    if count < classes:
        raise ValueError(f"count={count} must be an integer >= {classes}, a label for each class")
    labels = torch.full_like(images.train_labels, UNLABELLED)
    for c, members in enumerate(_by_class(images, generator)):
        labelled = count // classes + (c < count % classes)
        if len(members) < labelled:
            raise ValueError(f"count={count} needs {labelled} labels of class {c}, which has {len(members)} images")
        labels[members[:labelled]] = c
    return replace(images, train_labels=labels)


def contexts(images: Images, generator: torch.Generator, count: int = 2) -> Images:
    """Several tasks on the same images, whose labels conflict unless the context is known.

    The images get ``count`` more channels: 255 everywhere in the channel of their context, 0 in the others. A training
    image is in one random context; each test image is in every context, those of the first context first. Each context
    has its own permutation of the labels, the first one the identity.

    Raises:
        ValueError: there are fewer than two contexts.
    """
    if count < 2:
        raise ValueError(f"count={count} must be an integer >= 2: a single context has no conflicts")
    device = images.train_labels.device
    permutations = [torch.randperm(images.classes, generator=generator) for _ in range(count - 1)]
    labels = torch.stack([torch.arange(images.classes), *permutations]).to(device)
    drawn = torch.randint(count, (len(images.train_labels),), generator=generator).to(device)
    each = torch.arange(count, device=device).repeat_interleave(len(images.test_labels))
    return replace(
        images,
        train_images=_in_context(images.train_images, drawn, count),
        train_labels=_relabelled(images.train_labels, drawn, labels),
        test_images=_in_context(images.test_images.repeat(count, 1, 1, 1), each, count),
        test_labels=_relabelled(images.test_labels.repeat(count), each, labels),
    )


#: the problems that experiments choose from, by name
PROBLEMS: dict[str, Callable[..., Images]] = {
    "clean": clean,
    "wrong_labels": wrong_labels,
    "imbalanced": imbalanced,
    "few_labels": few_labels,
    "contexts": contexts,
}


def _by_class(images: Images, generator: torch.Generator) -> list[Tensor]:
    """The indices of the training images of each class, in random order."""
    order = torch.randperm(len(images.train_labels), generator=generator).to(images.train_labels.device)
    return [order[images.train_labels[order] == c] for c in range(images.classes)]


def _in_context(images: Tensor, context: Tensor, count: int) -> Tensor:
    signal = 255 * torch.nn.functional.one_hot(context, count).to(torch.uint8)
    return torch.cat([images, signal[:, :, None, None].expand(-1, -1, *images.shape[2:])], 1)


def _relabelled(labels: Tensor, context: Tensor, new: Tensor) -> Tensor:
    return torch.where(labels == UNLABELLED, labels, new[context, labels.clamp(min=0)])
