"""Draw the picture of the README and of the documentation's first page, from the records that it shows.

python scripts/front_picture.py    # writes docs/front.png, and docs/front_narrow.png for telephones
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.pictures import plt

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "records"
# Colours of Okabe and Ito, which colour-blind readers can tell apart, each with a marker of its own.
RULE, CONTROL, BACKPROPAGATION = ("#0072B2", "o"), ("#E69F00", "s"), ("#000000", "|")


class Row(NamedTuple):
    """A rule of one family, and the records of the rule, its control, and backpropagation on the same network."""

    label: str
    rule: str
    control: str
    backpropagation: str | None = None


ROWS = (
    Row("Hebbian: SoftHebb\nCIFAR-10", "cifar10-softhebb-softhebb", "cifar10-softhebb-random_trunk"),
    Row(
        "Feedback: direct feedback alignment\nMNIST, LeNet-5",
        *("mnist-lenet5-direct_feedback_alignment-orthogonal", "mnist-lenet5-random_trunk", "mnist-lenet5-adam"),
    ),
    Row(
        "Perturbation: node perturbation\nMNIST, MLP",
        *("mnist-mlp-node_perturbation-batched", "mnist-mlp-random_trunk", "mnist-mlp-sgd"),
    ),
    Row(
        "Local: local losses\nMNIST, MLP",
        *("mnist-mlp-local_loss", "mnist-mlp-random_trunk-10epochs", "mnist-mlp-adam"),
    ),
    Row("Contrastive: restricted Boltzmann machine\nMNIST", "mnist-rbm-pcd", "mnist-rbm-random_trunk"),
    Row("Spiking: spike timing (STDP)\nMNIST", "mnist-spiking-stdp", "mnist-spiking-random_trunk"),
)


def main() -> None:
    """Accuracy of six rules beside their controls, with the weights of spiking neurons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 3.9), width_ratios=[1.6, 1], layout="constrained", gridspec_kw={"wspace": 0.04}
    )
    accuracies(left)
    digits(right)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    figure.savefig(ROOT / "docs" / "front.png", dpi=120, metadata={"Description": numbers()})
    # A telephone shows it at its own size: labels are in the axes, and the digits below.
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(3.6, 6.6), height_ratios=[1.15, 1], layout="constrained")
    accuracies(upper, inside=True)
    digits(lower)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=9)
    figure.savefig(ROOT / "docs" / "front_narrow.png", dpi=160, metadata={"Description": numbers()})


def accuracies(axes: Axes, *, inside: bool = False) -> None:
    """Each rule and its control on a line.

    Args:
        axes: to draw in.
        inside: whether the names of rules are above their lines, in place of beside the axes.
    """
    for place, row in enumerate(reversed(ROWS)):
        rule, control = accuracy(row.rule), accuracy(row.control)
        axes.plot([control, rule], [place, place], color="0.8", linewidth=3, zorder=1, solid_capstyle="round")
        axes.plot(control, place, CONTROL[1], color=CONTROL[0], markersize=7)
        axes.plot(rule, place, RULE[1], color=RULE[0], markersize=8)
        offset = (0, -15) if inside else (0, 8)
        axes.annotate(f"{rule:.1f}", (rule, place), offset, textcoords="offset points", ha="center", fontsize=9)
        if row.backpropagation:
            axes.plot(accuracy(row.backpropagation), place, BACKPROPAGATION[1], color=BACKPROPAGATION[0], markersize=13,
                      markeredgewidth=2)  # fmt: skip
        if inside:
            axes.annotate(row.label.replace("\n", ", "), (60, place), (0, 8), textcoords="offset points", fontsize=8)
    labels = ["" if inside else row.label for row in reversed(ROWS)]
    axes.set_yticks(range(len(ROWS)), labels, fontsize=9)
    axes.set(xlim=(60, 101), ylim=(-0.8 if inside else -0.5, len(ROWS) - 0.3), xlabel="test accuracy (%)")
    axes.grid(axis="x", color="0.92")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for (colour, marker), label in (
        (CONTROL, "control: random, frozen trunk"), (RULE, "the rule"), (BACKPROPAGATION, "backpropagation"),
    ):  # fmt: skip
        axes.plot([], [], marker, color=colour, label=label, markeredgewidth=2 if marker == "|" else 1)


def digits(axes: Axes) -> None:
    """Weights of spiking neurons, from the picture of their record."""
    picture = plt.imread(RECORDS / "mnist-spiking-stdp" / "receptive_fields.png")
    axes.imshow(picture[74:570, 66:524])  # without the margins and the title
    axes.set_title("Digits that spiking neurons have learned,\nwithout labels and without gradients", fontsize=9)
    axes.axis("off")


def numbers() -> str:
    """What the picture shows, in words; kept in its file, it tells when records have changed since."""
    shown = []
    for row in ROWS:
        kinds = {"": row.rule, "random trunk ": row.control, "backpropagation ": row.backpropagation}
        found = [f"{kind}{accuracy(record):.2f}" for kind, record in kinds.items() if record]
        shown.append(f"{row.label} {', '.join(found)}".replace("\n", ", "))
    return "; ".join(shown)


def accuracy(record: str) -> float:
    """Mean test accuracy of a record, in %."""
    return 100 * float(json.loads((RECORDS / record / "result.json").read_text("utf-8"))["mean"])


if __name__ == "__main__":
    main()
