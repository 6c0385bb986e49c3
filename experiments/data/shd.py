"""Spiking Heidelberg Digits (Cramer et al., 2020): spoken digits as spikes of an artificial cochlea, binned in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import require_package
from .registry import NotThere, Tensors, register, tensors

CHANNELS = 700  # of the cochlea
STEPS = 100  # bins of a recording
DURATION = 1.4  # seconds; the longest recording is a little shorter
FILES = ("shd_train.h5", "shd_test.h5")


@register("shd")
def shd(root: Path) -> Tensors:
    """8,156 + 2,264 recordings of 20 words as images of 100×700: a row for each 14 ms, a column for each channel.

    A pixel is the number of spikes, at most 255.

    Raises:
        NotThere: a file is missing or damaged, or h5py is not installed.
    """
    folder = root / "SHD"
    if missing := [name for name in FILES if not (folder / name).exists()]:
        raise NotThere(
            f"data set 'shd' needs {' and '.join(missing)} in {folder.absolute()}: download "
            f"{' and '.join(f'{name}.gz' for name in missing)} from https://zenkelab.org/datasets/ and unpack there "
            "(gunzip), or set data.root=<folder that holds SHD/>"
        )
    try:
        require_package("data=shd", "h5py")
    except ValueError as error:
        raise NotThere(str(error)) from None
    train, test = (_part(folder / name) for name in FILES)
    return tensors(train, test)


def _part(path: Path) -> tuple[Tensor, Tensor]:
    """The binned spikes and the labels of one file."""
    import h5py

    try:
        with h5py.File(path) as file:
            times, units, labels = file["spikes/times"][:], file["spikes/units"][:], file["labels"][:]
    except (OSError, KeyError) as error:
        raise _damaged(path, str(error)) from None
    if not len(times) == len(units) == len(labels):
        raise _damaged(path, f"it has {len(times)} lists of times, {len(units)} of channels and {len(labels)} labels")
    images = torch.zeros(len(labels), 1, STEPS, CHANNELS, dtype=torch.uint8)
    for image, when, unit in zip(images, times, units, strict=True):
        image[0] = _binned(path, when, unit)
    return images, torch.from_numpy(labels.astype("int64"))


def _binned(path: Path, times: Any, units: Any) -> Tensor:
    """Spike times in seconds, and the channels that fired, as counts, steps × channels."""
    when = torch.from_numpy(times.astype("float64"))  # half precision in the file
    channel = torch.from_numpy(units.astype("int64"))
    if when.shape != channel.shape or ((when < 0) | ~when.isfinite() | (channel < 0) | (channel >= CHANNELS)).any():
        raise _damaged(path, f"spikes are not times >= 0 with channels below {CHANNELS}")
    step = (when * (STEPS / DURATION)).long().clamp(max=STEPS - 1)
    counts = torch.bincount(step * CHANNELS + channel, minlength=STEPS * CHANNELS)
    return counts.clamp(max=255).view(STEPS, CHANNELS).to(torch.uint8)


def _damaged(path: Path, why: str) -> NotThere:
    return NotThere(f"{path} is not as published ({why}): delete it, and download it again from zenkelab.org/datasets")
