"""Tasks made out of one data set: labels that are wrong, rare, few, or depend on a context. Test sets stay true.

Each takes a data set and gives another; what is random in it comes from a generator of the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bioopt.costs import UNLABELLED

from .data import Images


def subset(images: Images, generator: torch.Generator, train: int, validation: int | None = None) -> Images:
    """So many training images, drawn at random; the same ones of the same generator, whatever else is asked.

    Args:
        images: to draw from.
        generator: of the draw.
        train: how many to train on.
        validation: so many others of the training set take the test set's place; ``None``: the test set stays.

    Raises:
        ValueError: fewer than 1 of either, or more than there are.
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
    """The data set as it is."""
    return replace(images)


def wrong_labels(images: Images, generator: torch.Generator, share: float = 0.4) -> Images:
    """A share of the training labels, drawn at random, says another class, any of the others alike.

    Raises:
        ValueError: a share outside [0, 1].
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
    """Of training images of class ``c``, of ``C``, a share ``ratio ** (-c / (C - 1))`` is kept, and at least one.

    The first class keeps all of its images, the last the share ``1 / ratio``.

    Raises:
        ValueError: a ratio below 1.
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
    """So many training images keep their label, as many of each class (but for one); the others have none.

    Raises:
        ValueError: fewer labels than classes, or a class of too few images.
    """
    classes = images.classes
    if count < classes:
        raise ValueError(f"count={count} must be an integer >= {classes}, a label for each class")
    labels = torch.full_like(images.train_labels, UNLABELLED)
    for c, members in enumerate(_by_class(images, generator)):
        wanted = count // classes + (c < count % classes)
        if len(members) < wanted:
            raise ValueError(f"count={count} wants {wanted} labels of class {c}, which has {len(members)} images")
        labels[members[:wanted]] = c
    return replace(images, train_labels=labels)


def contexts(images: Images, generator: torch.Generator, count: int = 2) -> Images:
    """Several tasks of the same images, which name the classes differently and so conflict unless a context is seen.

    The images get ``count`` more channels, 255 everywhere in that of the context and 0 in the others. A training image
    is in one context, drawn at random; a test image is in each context once, the first context's images first. The
    label is the class's name in this context: in the first one the class, in each other a permutation of its own.

    Raises:
        ValueError: fewer than two contexts.
    """
    if count < 2:
        raise ValueError(f"count={count} must be an integer >= 2: one context conflicts with none")
    device = images.train_labels.device
    renamed = [torch.randperm(images.classes, generator=generator) for _ in range(count - 1)]
    names = torch.stack([torch.arange(images.classes), *renamed]).to(device)
    drawn = torch.randint(count, (len(images.train_labels),), generator=generator).to(device)
    each = torch.arange(count, device=device).repeat_interleave(len(images.test_labels))
    return replace(
        images,
        train_images=_in_context(images.train_images, drawn, count),
        train_labels=_named(images.train_labels, drawn, names),
        test_images=_in_context(images.test_images.repeat(count, 1, 1, 1), each, count),
        test_labels=_named(images.test_labels.repeat(count), each, names),
    )


#: the tasks that an experiment can pose, by name
POSED: dict[str, Callable[..., Images]] = {
    "clean": clean,
    "wrong_labels": wrong_labels,
    "imbalanced": imbalanced,
    "few_labels": few_labels,
    "contexts": contexts,
}


def _by_class(images: Images, generator: torch.Generator) -> list[Tensor]:
    """Where the training images of each class are, in random order."""
    order = torch.randperm(len(images.train_labels), generator=generator).to(images.train_labels.device)
    return [order[images.train_labels[order] == c] for c in range(images.classes)]


def _in_context(images: Tensor, context: Tensor, count: int) -> Tensor:
    signal = 255 * torch.nn.functional.one_hot(context, count).to(torch.uint8)
    return torch.cat([images, signal[:, :, None, None].expand(-1, -1, *images.shape[2:])], 1)


def _named(labels: Tensor, context: Tensor, names: Tensor) -> Tensor:
    return torch.where(labels == UNLABELLED, labels, names[context, labels.clamp(min=0)])
