"""Experiments, one file each, with its pictures in ``<name>_plots.py``; this file has what they share.

A task steps learners (`experiments.learner`); it has no training loop, no folder and no log of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from ..checks import require_counts
from ..pace import Phase
from ..statistics import readable
from ..verdict import Expected

if TYPE_CHECKING:
    from ..logs import RunLog


class Task(ABC):
    """An experiment in rounds, after each of which it can be interrupted and resumed.

    ``conf/experiment/<name>.yaml`` describes it under ``task``: its name, its ``_target_`` and its options, which are
    keywords after ``config``, that of the whole run with its model, data and optimizer, and ``device``.
    """

    unit = "round"  # the name of a round's number in ``metrics.jsonl``
    rounds: int  # their number
    turns = 1  # rounds after which each rule has had one, where they take turns
    log: RunLog  # of the run, from the first round on

    def require_counts(self, *options: str, least: int = 1) -> None:
        """Raise where one of the task's options is not an integer, or too small."""
        require_counts(least, **{name: getattr(self, name) for name in options})

    @abstractmethod
    def round(self, number: int) -> dict[str, Any] | None:
        """Do the work of one round, counted from 1; returns its measurements, a line of ``metrics.jsonl``.

        ``seconds``, if it is among them, is the time that counts; otherwise all of the round's does. ``None``: this
        process has no more to do.
        """

    @abstractmethod
    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The results of all rounds, from the lines they left: numbers, the most important first, and pictures."""

    def phases(self) -> Sequence[Phase]:
        """The rounds by what they do; how long a phase takes is told after its first rounds."""
        return [Phase(self.rounds, self.turns)]

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """What theory, chance or a control expects of numbers in the summary, by their names.

        The run ends with a comparison; with records of the same options, and of controls, they are compared anyway.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What later rounds need of earlier ones, besides torch's random state: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} keeps a state, but cannot load it")

    def close(self) -> None:  # noqa: B027  # most have nothing to release
        """Release what the task holds, after its last round or an error."""

    def heading(self, config: DictConfig, device: torch.device) -> str:
        """The first line that the terminal shows."""
        return f"{config.task.name}, seed {config.seed}, {device}"

    def shown(self, line: dict[str, Any]) -> str:
        """What the terminal shows of a round."""
        numbers = {name: value for name, value in self.logged(line).items() if name not in ("round", "seconds")}
        return "   ".join(f"{name.replace('_', ' ')} {readable(value)}" for name, value in numbers.items())

    def logged(self, line: dict[str, Any]) -> dict[str, Any]:
        """What W&B gets of a round."""
        return {name: value for name, value in line.items() if isinstance(value, int | float)}

    def summarize(
        self, config: DictConfig, history: list[dict[str, Any]], seconds: float, folder: Path
    ) -> tuple[dict[str, Any], list[Path], list[str]]:
        """The task's part of ``summary.json``, pictures, and the lines that the terminal shows at the end."""
        found, pictures = self.finish(history, f"{config.task.name}, seed {config.seed}", folder)
        summary = {"task": config.task.name, "seed": config.seed, "measured": found, "seconds": seconds}
        lines = [f"{name.replace('_', ' '):<40} {readable(value)}" for name, value in found.items()]
        return summary, pictures, ["", *lines, "", f"{self.rounds} rounds, {seconds:.0f} s"]
