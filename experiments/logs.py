"""The log of a run: on the terminal, in the run's folder, and where its `Logger` sends it."""

from __future__ import annotations

import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor
from tqdm import tqdm

from .files import write_json, write_lines
from .ranks import Ranks


class Logger(ABC):
    """Where the numbers of a run go besides its folder; ``logger._target_`` names the class.

    Args:
        config: of the run, plain containers; ``config["logger"]`` has the logger's own options.
        folder: the run's folder.
        run_id: `run_id` of the interrupted run that is resumed, or ``None``.
    """

    run_id: str | None = None  # by which a resumed run goes on with the same log

    @abstractmethod
    def __init__(self, config: dict[str, Any], folder: Path, run_id: str | None) -> None: ...

    @abstractmethod
    def log(self, numbers: dict[str, Any]) -> None:
        """Log numbers by their names; ``step``, ``epoch`` or ``round`` among them tells when."""

    @abstractmethod
    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> str:
        """Log the results, and close; returns a line for the terminal, or nothing."""

    @abstractmethod
    def close(self) -> None:
        """Close after an error."""


class RunLog:
    """Writes one run: a line for each round on the terminal and in ``metrics.jsonl``, and its numbers to the logger.

    Args:
        folder: the run's folder.
        config: the resolved configuration, plain containers.
        run_id: of the logger, where an interrupted run is resumed.
        history: the lines of the rounds so far.
    """

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None, history: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.history = history
        self._every = config["logger"]["every"]
        self._epochs = config["epochs"]
        self._logger: Logger | None = None
        if config["logger"]["mode"] != "disabled":
            self._logger = get_class(config["logger"]["_target_"])(config, folder, run_id)
        # Drops lines of a round that was not finished.
        self._write_metrics()

    @property
    def run_id(self) -> str | None:
        """That of the logger, if there is one."""
        return self._logger.run_id if self._logger is not None else None

    def batches(self, batches: Iterator[Any], total: int, epoch: int) -> Iterator[Any]:
        """Iterate over the batches, with a progress bar where the output is a terminal."""
        label = f"epoch {epoch}/{self._epochs}"
        watched = sys.stderr.isatty() and Ranks().first
        return iter(tqdm(batches, label, total, leave=False, unit="batch", disable=not watched))

    def step(self, step: int, loss: Tensor, diagnostics: list[dict[str, Any]]) -> None:
        """Log the training loss every ``logger.every`` steps, and the diagnostics of this step if any."""
        if self._logger is None:
            return
        if step % self._every == 0:
            self._logger.log({"step": step, "train/loss": loss.item()})
        if diagnostics and diagnostics[-1]["step"] == step:
            line = {f"diagnostics/{name}": value for name, value in diagnostics[-1].items() if name != "step"}
            self._logger.log({"step": step, **line})

    def round(self, line: dict[str, Any], numbers: dict[str, Any], label: str, text: str) -> None:
        """Log one round of a task.

        Args:
            line: of ``metrics.jsonl``.
            numbers: for the logger.
            label: of the round, on the terminal.
            text: what the terminal shows of it.
        """
        self.history.append(line)
        self._write_metrics()
        print(f"{label}   {text}", flush=True)
        if self._logger is not None:
            self._logger.log(numbers)

    def finish(self, summary: dict[str, Any], pictures: list[Path], lines: list[str]) -> None:
        """Write the summary, print these lines, and close the logger."""
        write_json(self.folder / "summary.json", summary)
        print("\n".join(lines))
        print(f"results are in {self.folder}")
        if self._logger is not None and (line := self._logger.finish(summary, pictures)):
            print(line)
        self._logger = None

    def close(self) -> None:
        """Close the logger after an error."""
        if self._logger is not None:
            self._logger.close()
            self._logger = None

    def _write_metrics(self) -> None:
        write_lines(self.folder / "metrics.jsonl", self.history)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
