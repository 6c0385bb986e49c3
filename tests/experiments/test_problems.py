"""Problems made from a data set: how many labels change, which, and that test labels stay correct."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bioopt.costs import UNLABELLED
from experiments import data
from experiments.data import Images, problems


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(each: int = 60, classes: int = 5) -> Images:
    """Images that differ: the first and the third pixel are the index, the second is the class."""
    labels = torch.arange(each * classes) % classes
    pictures = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    pictures[:, 0, 0, 0] = torch.arange(len(labels)) % 256
    pictures[:, 0, 0, 1] = labels
    pictures[:, 0, 1, 0] = torch.arange(len(labels)) // 256
    return Images("numbered", pictures, labels, pictures[:50], labels[:50])


def which(pictures: torch.Tensor) -> list[int]:
    return (pictures[:, 0, 0, 0].long() + 256 * pictures[:, 0, 1, 0].long()).tolist()


MADE = {
    "clean": {},
    "wrong_labels": {"share": 0.4},
    "imbalanced": {"ratio": 20},
    "few_labels": {"count": 23},
    "contexts": {"count": 3},
}


@pytest.mark.parametrize("name", MADE)
def test_problems_change_a_copy_and_depend_on_the_generator(name: str) -> None:
    images, make = numbered(), getattr(problems, name)
    before = [getattr(images, split).clone() for split in data.SPLITS]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    made, again, other = (make(images, seeded(seed), **MADE[name]) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, getattr(images, split)) for a, split in zip(before, data.SPLITS, strict=True))
    assert all(torch.equal(getattr(made, split), getattr(again, split)) for split in data.SPLITS)
    if name != "contexts":
        assert torch.equal(made.test_images, images.test_images)
        assert torch.equal(made.test_labels, images.test_labels)
    same = torch.equal(made.train_labels, other.train_labels) and torch.equal(made.train_images, other.train_images)
    assert same == (name == "clean")
    assert made.classes == images.classes


def test_a_subset_and_its_validation_images_are_disjoint() -> None:
    images = numbered()
    tuned, final = problems.subset(images, seeded(), 100, 80), problems.subset(images, seeded(), 100)
    assert torch.equal(tuned.train_images, final.train_images)
    assert len(tuned.train_labels) == 100
    assert len(tuned.test_labels) == 80
    assert not set(which(tuned.train_images)) & set(which(tuned.test_images))
    assert torch.equal(tuned.train_images[:, 0, 0, 1].long(), tuned.train_labels)
    assert torch.equal(tuned.test_images[:, 0, 0, 1].long(), tuned.test_labels)
    assert torch.equal(final.test_images, images.test_images)
    assert torch.equal(tuned.mean, final.mean)
    assert which(tuned.train_images) != which(problems.subset(images, seeded(1), 100).train_images)


def test_wrong_labels_are_uniform_over_the_other_classes() -> None:
    images = numbered(each=4000)
    made = problems.wrong_labels(images, seeded(), 0.4)
    wrong = made.train_labels != images.train_labels
    assert int(wrong.sum()) == round(0.4 * len(wrong))
    counts = torch.zeros(5, 5)
    counts.index_put_((images.train_labels[wrong], made.train_labels[wrong]), torch.ones(()), accumulate=True)
    off = counts[~torch.eye(5, dtype=torch.bool)]
    assert off.min() > 0.85 * off.mean()
    assert off.max() < 1.15 * off.mean()
    assert counts.diagonal().sum() == 0


def test_class_sizes_fall_geometrically() -> None:
    images = numbered(each=200)
    made = problems.imbalanced(images, seeded(), 16)
    assert made.train_labels.bincount().tolist() == [200, 100, 50, 25, 12]
    assert torch.equal(made.train_images[:, 0, 0, 1].long(), made.train_labels)
    assert len(set(which(made.train_images))) == len(made.train_labels)
    assert problems.imbalanced(images, seeded(), 1e9).train_labels.bincount()[-1] == 1


def test_few_labels_are_correct_and_balanced() -> None:
    images = numbered()
    made = problems.few_labels(images, seeded(), 23)
    known = made.train_labels != UNLABELLED
    assert torch.equal(made.train_labels[known], images.train_labels[known])
    assert made.train_labels[known].bincount().tolist() == [5, 5, 5, 4, 4]
    assert torch.equal(made.train_images, images.train_images)


def test_contexts_conflict_and_have_channels_of_their_own() -> None:
    images = numbered()
    made = problems.contexts(images, seeded(), 3)
    assert made.shape == (4, 2, 2)
    assert len(made.test_labels) == 150
    names: dict[tuple[int, int], set[int]] = {}
    for pictures, labels in ((made.train_images, made.train_labels), (made.test_images, made.test_labels)):
        signal = pictures[:, 1:]
        assert pictures.dtype == torch.uint8
        assert signal.sum(1).eq(255).all()
        assert torch.equal(signal, signal[:, :, :1, :1].expand_as(signal))
        for context, true, label in zip(signal[:, :, 0, 0].argmax(1), pictures[:, 0, 0, 1], labels, strict=True):
            names.setdefault((int(context), int(true)), set()).add(int(label))
    assert len(names) == 15
    assert all(len(labels) == 1 for labels in names.values())  # training and test agree
    table = [[names[context, c].copy().pop() for c in range(5)] for context in range(3)]
    assert table[0] == [0, 1, 2, 3, 4]
    assert all(sorted(row) == table[0] for row in table)
    assert len({tuple(row) for row in table}) == 3
    assert set(made.train_images[:, 1:, 0, 0].argmax(1).tolist()) == {0, 1, 2}
    assert made.test_images[:, 1:, 0, 0].argmax(1).bincount().tolist() == [50, 50, 50]


def test_problems_can_be_combined_where_labels_are_missing() -> None:
    images = problems.few_labels(numbered(), seeded(), 100)
    none = images.train_labels == UNLABELLED
    wrong = problems.wrong_labels(images, seeded(), 0.5)
    assert torch.equal(wrong.train_labels == UNLABELLED, none)
    assert int((wrong.train_labels != images.train_labels).sum()) == 50
    assert torch.equal(problems.contexts(images, seeded(), 2).train_labels == UNLABELLED, none)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("subset", {"train": 0}, "train=0"),
        ("subset", {"train": 200, "validation": 101}, "at most the 300 training images of numbered"),
        ("subset", {"train": 200, "validation": 0}, "validation=0"),
        ("wrong_labels", {"share": 1.1}, r"share=1.1 must be a number in \[0, 1\]"),
        ("imbalanced", {"ratio": 0.5}, "ratio=0.5 must be a number >= 1"),
        ("few_labels", {"count": 4}, "count=4 must be an integer >= 5"),
        ("few_labels", {"count": 1000}, "needs 200 labels of class 0, which has 60 images"),
        ("contexts", {"count": 1}, "count=1 must be an integer >= 2"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(problems, name)(numbered(), seeded(), **options)
