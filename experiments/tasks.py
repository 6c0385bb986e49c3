"""Experiments that are no image classification: the same folder, log, checkpoints and resume around other work."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from . import interrupts, logs
from .config import resolved
from .runs import Progress, circumstances, random_state
from .statistics import readable


class Task(ABC):
    """An experiment in rounds, after each of which it can be interrupted and go on.

    ``conf/experiment/<name>.yaml`` has it under ``task``: its name, its ``_target_`` and its options, which follow
    ``config`` and ``device`` as keywords.

    Args:
        config: of the whole run, for tasks that use its model, data or optimizer.
        device: where to compute.

    Attributes:
        rounds: how many there are.
    """

    rounds: int

    @abstractmethod
    def round(self, number: int) -> dict[str, Any]:
        """The work of one round, from 1, and what it measured: a line of ``metrics.jsonl``."""

    @abstractmethod
    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """What all rounds come to, from the lines they left: numbers, the most telling first, and pictures."""

    def state_dict(self) -> dict[str, Any]:
        """What later rounds need of earlier ones, besides torch's random state: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} keeps a state, but cannot load it")


def perform(config: DictConfig, started: Progress, folder: Path, device: torch.device) -> dict[str, Any]:
    """All rounds of a task that are left; returns the summary."""
    name = config.task.name
    torch.manual_seed(config.seed)
    options = {key: value for key, value in config.task.items() if key != "name"}
    try:
        task: Task = instantiate(options, _partial_=True, _convert_="all")(config, device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"experiment={name}: {error}") from error
    if started.epoch:
        task.load_state_dict(dict(started.model))
        started.restore_random(device)
    print(
        f"{name}, seed {config.seed}, {device}" + (f", going on after round {started.epoch}" if started.epoch else ""),
        flush=True,
    )
    seconds = started.seconds
    log = logs.RunLog(folder, resolved(config), started.wandb_id, started.history)
    try:
        for number in range(started.epoch + 1, task.rounds + 1):
            begin = time.perf_counter()
            measured = task.round(number)
            seconds += time.perf_counter() - begin
            interrupts.check()
            log.round({"round": number, **measured, "seconds": seconds}, task.rounds)
            Progress(
                epoch=number,
                model=task.state_dict(),
                random=random_state(device),
                history=log.history,
                seconds=seconds,
                wandb_id=log.wandb_id,
                config=started.config,
                environments=started.environments,
            ).save(folder)
        found, made = task.finish(log.history, f"{name}, seed {config.seed}", folder)
        summary = {
            "task": name,
            "seed": config.seed,
            "measured": found,
            "seconds": seconds,
            "peak_memory_bytes": logs.peak_memory(device),
        } | circumstances(device, started.commit)
        told = [f"{what.replace('_', ' '):<40} {readable(value)}" for what, value in found.items()]
        log.finish(summary, made, ["", *told, "", f"{task.rounds} rounds, {seconds:.0f} s"])
    finally:
        log.close()
    return summary
