"""The log of a run: on the terminal, in the run's folder, and where its `Logger`s send it."""

from __future__ import annotations

import resource
import sys
import time
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
from .statistics import duration


class Logger(ABC):
    """Where the numbers of a run go besides ``metrics.jsonl``; ``logger.classes`` has the class, by a name of its own.

    Args:
        config: of the run, plain containers; ``config["logger"]`` has the logger's own options.
        folder: the run's folder.
        run_id: `run_id` of the interrupted run that is resumed, or ``None``.
    """

    run_id: str | None = None  # without spaces; by which a resumed run goes on with the same log

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


NO_ID = "-"  # of a logger without a `run_id`, among those of several


def logger_classes(options: dict[str, Any]) -> list[str]:
    """The paths of the chosen loggers' classes; a single one may also be ``_target_``, as in older configurations."""
    return [*options.get("classes", {}).values(), *([options["_target_"]] if "_target_" in options else [])]


class RunLog:
    """Writes one run: a line for each round on the terminal and in ``metrics.jsonl``, and its numbers to the loggers.

    Args:
        folder: the run's folder.
        config: the resolved configuration, plain containers.
        run_id: of the loggers, where an interrupted run is resumed.
        history: the lines of the rounds so far.
    """

    def __init__(self, folder: Path, config: dict[str, Any], run_id: str | None, history: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.history = history
        self._every = config["logger"]["every"]
        self._loggers: list[Logger] = []
        self._write_metrics()  # without lines of a round that was not finished
        classes = logger_classes(config["logger"]) if config["logger"]["mode"] != "disabled" else []
        ids = run_id.split(" ") if run_id is not None and classes else [NO_ID] * len(classes)
        try:
            for path, own_id in zip(classes, ids, strict=True):
                self._loggers.append(get_class(path)(config, folder, None if own_id == NO_ID else own_id))
        except BaseException:
            self.close()
            raise

    @property
    def run_id(self) -> str | None:
        """Those of the loggers, in their order and separated by spaces, if there are any."""
        ids = [logger.run_id for logger in self._loggers]
        return " ".join(own_id or NO_ID for own_id in ids) if any(ids) else None

    def batches(self, batches: Iterator[Any], total: int, label: str) -> Iterator[Any]:
        """Iterate over the batches, with a progress bar where the output is a terminal, else a line a minute."""
        if not Ranks().first:
            return batches
        if sys.stderr.isatty():
            return iter(tqdm(batches, label, total, leave=False, unit="batch"))
        return _with_lines(batches, label, total)

    def step(self, step: int, loss: Tensor, diagnostics: list[dict[str, Any]]) -> None:
        """Log the training loss every ``logger.every`` steps, and the diagnostics of this step if any."""
        if not self._loggers:
            return
        if step % self._every == 0:
            self._log({"step": step, "train/loss": loss.item()})
        if diagnostics and diagnostics[-1]["step"] == step:
            line = {f"diagnostics/{name}": value for name, value in diagnostics[-1].items() if name != "step"}
            self._log({"step": step, **line})

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
        self._log(numbers)

    def finish(self, summary: dict[str, Any], pictures: list[Path], lines: list[str]) -> None:
        """Write the summary, print these lines, and close the loggers."""
        write_json(self.folder / "summary.json", summary)
        print("\n".join(lines))
        print(f"results are in {self.folder}")
        while self._loggers:
            if line := self._loggers[0].finish(summary, pictures):
                print(line)
            del self._loggers[0]

    def close(self) -> None:
        """Close the loggers after an error."""
        while self._loggers:
            self._loggers.pop().close()

    def _log(self, numbers: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.log(numbers)

    def _write_metrics(self) -> None:
        write_lines(self.folder / "metrics.jsonl", self.history)


QUIET = 60.0  # seconds without a line, where no one sees a progress bar


def _with_lines(batches: Iterator[Any], label: str, total: int) -> Iterator[Any]:
    """The same batches; a line a minute has how many are done, and the time that the others need at this speed."""
    begin = last = time.monotonic()
    for done, batch in enumerate(batches):
        now = time.monotonic()
        if done and now - last >= QUIET:
            left = (now - begin) / done * (total - done)
            print(f"{label}   batch {done:,}/{total:,}, {duration(left)} left", flush=True)
            last = now
        yield batch


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
