"""Logs of a run in its own folder: a table for spreadsheets and pandas, and TensorBoard's files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

from .checks import require_package
from .logs import Logger

AXES = ("round", "epoch", "step")


class Csv(Logger):
    """Writes ``numbers.csv``: a line for each number, with its name, its value, and when it was measured."""

    def __init__(self, config: dict[str, Any], folder: Path, run_id: str | None) -> None:
        path = folder / "numbers.csv"
        rows: list[list[str]] = []
        if path.exists():  # an interrupted run goes on, and computes what follows its last round again
            rounds = done_rounds(folder)
            with path.open(encoding="utf-8", newline="") as file:
                known = [row for row in csv.reader(file) if len(row) == 4][1:]
            later = (i for i, row in enumerate(known) if row[0] != "step" and int(row[1]) > rounds)
            rows = known[: next(later, len(known))]
            while rows and rows[-1][0] == "step":
                del rows[-1]
        rows.insert(0, ["axis", "at", "name", "value"])
        self._file = path.open("w", encoding="utf-8", newline="")
        self._table = csv.writer(self._file)
        self._table.writerows(rows)

    def log(self, numbers: dict[str, Any]) -> None:
        """Write these numbers, and flush, so that a program that follows the file sees them."""
        axis, at, values = by_axis(numbers)
        self._table.writerows((axis, at, name, value) for name, value in values.items())
        self._file.flush()

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> str:
        """Close; the summary and the pictures are in the same folder."""
        self.close()
        return f"its numbers are in {self._file.name}"

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard(Logger):
    """Writes TensorBoard's files into ``tensorboard`` in the run's folder.

    Raises:
        ValueError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, config: dict[str, Any], folder: Path, run_id: str | None) -> None:
        require_package("logger=tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._last = folder, 0
        self._kept = folder / "tensorboard" / "last.txt"  # the last place on an axis when a round ended
        again = None  # from where on an interrupted run computes what it had logged
        if self._kept.exists():
            again = int(self._kept.read_text()) + 1 if done_rounds(folder) else 0
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=again)
        if run_id is None:
            self._writer.add_text("options", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}```")
        self.run_id = "tensorboard"  # that of a run whose options are written

    def log(self, numbers: dict[str, Any]) -> None:
        """Write these numbers as scalars."""
        axis, at, values = by_axis(numbers)
        for name, value in values.items():
            self._writer.add_scalar(name, value, at)
        self._last = max(self._last, at)
        if axis != "step":
            self._kept.write_text(f"{self._last}")

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> str:
        """Write the pictures, and close."""
        for picture in pictures:
            self._writer.add_image(f"pictures/{picture.stem}", plt.imread(picture)[..., :3], dataformats="HWC")
        self.close()
        return f"show this run with `tensorboard --logdir {self._folder}`"

    def close(self) -> None:
        """Write what is left, and close."""
        self._writer.close()


def done_rounds(folder: Path) -> int:
    """The number of rounds that a run has finished: of lines in ``metrics.jsonl``."""
    path = folder / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def by_axis(numbers: dict[str, Any]) -> tuple[str, int, dict[str, float]]:
    """When these were measured (the name of the axis, and the place on it), and the numbers themselves."""
    axis = next(name for name in AXES if name in numbers)
    values = {name: value for name, value in numbers.items() if name != axis and isinstance(value, int | float)}
    return axis, numbers[axis], values
