"""One run: its folder, its processes, and the rounds of its task, each followed by a checkpoint."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from . import interrupts, logs
from .building import check_keywords
from .classification import Classification
from .config import flat, is_local, resolved, saved, with_new_names
from .options import check
from .pace import Pace
from .ranks import Ranks
from .runs import (
    Progress,
    choose_device,
    code_version,
    environment,
    environment_info,
    held,
    new_folder,
    precision,
    random_state,
    set_threads,
    warn_if_emulated,
    with_amp_chosen,
)
from .tasks import Task
from .verdict import verdict


def run(config: DictConfig) -> dict[str, Any]:
    """Make a new run, or resume an interrupted one; returns the summary."""
    commit = code_version()  # now: the files may change during a long run
    ranks = Ranks()
    resumed = None if config.resume is None else Path(str(config.resume))
    if resumed is not None:
        config = saved(resumed)
    else:
        config = with_new_names(config)
        check(config)
    if config.task is not None and ranks.count > 1:
        raise ValueError(f"experiment={config.task.name} runs in one process; start it without torchrun")
    check_keywords(config)
    config = with_amp_chosen(config)
    kind, plain = choose_device(config.device).type, resolved(config)
    shared = {key: value for key, value in flat(plain).items() if not is_local(key)}
    with ranks.joined(kind, {**shared, "device": kind, "resume": str(resumed)}) as device:
        own = held(resumed) if resumed is not None else new_folder(config)
        with own if ranks.first else contextlib.nullcontext(resumed) as mine, ranks.folder(mine) as folder:
            started = Progress.load(ranks.from_first(mine), device)
            set_threads(config.threads, started.threads)
            started.resume(plain, environment(device, commit, ranks.count), folder)
            torch.manual_seed(config.seed)
            return perform(build_task(config, device, ranks), config, started, folder, device, ranks)


def build_task(config: DictConfig, device: torch.device, ranks: Ranks) -> Task:
    """The task of an experiment; image classification where there is none."""
    if config.task is None:
        return Classification(config, device, ranks)
    options = {key: value for key, value in config.task.items() if key != "name"}
    try:
        task: Task = instantiate(options, _partial_=True, _convert_="all")(config, device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"experiment={config.task.name}: {error}") from error
    return task


def perform(
    task: Task, config: DictConfig, started: Progress, folder: Path, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    """Do the rounds of a task that are left, each with its line in the log and its checkpoint; returns the summary.

    Args:
        task: at its start.
        config: of the run.
        started: where the run was interrupted, or its start.
        folder: of the run.
        device: where to compute.
        ranks: the processes of the run, of which the first alone keeps a log.
    """
    if started.epoch:
        task.load_state_dict(started.state)
        started.restore_random(device)
    resumed = f", resumed after {task.unit} {started.epoch}" if started.epoch else ""
    print(f"{task.heading(config, device)}, {precision(config)}{resumed}", flush=True)
    warn_if_emulated(config, device)
    plain, seconds = resolved(config), started.seconds
    pace = Pace(task.phases(), task.unit, started.epoch)
    if not ranks.first:
        plain["logger"]["mode"] = "disabled"
    log = task.log = logs.RunLog(folder, plain, started.run_id, started.history)
    try:
        for number in range(started.epoch + 1, task.rounds + 1):
            begin = time.perf_counter()
            measured = task.round(number)
            if measured is None:
                return {}
            seconds += measured.pop("seconds", time.perf_counter() - begin)
            interrupts.check()
            line = {task.unit: number, **measured, "seconds": seconds}
            label = f"{task.unit} {number:>{len(str(task.rounds))}}/{task.rounds}"
            log.round(line, {task.unit: number} | task.logged(line), label, task.shown(line))
            Progress(
                epoch=number,
                state=task.state_dict(),
                random=random_state(device),
                history=log.history,
                seconds=seconds,
                run_id=log.run_id,
                config=started.config,
                environments=started.environments,
            ).save(folder)
            if ahead := pace.after(number, time.perf_counter() - begin):
                print(ahead, flush=True)
        memory = logs.peak_memory(device)  # of the training alone
        summary, pictures, lines = task.summarize(config, log.history, seconds, folder)
        summary |= {"peak_memory_bytes": memory, "precision": precision(config)}
        summary |= environment_info(device, started.commit)
        log.finish(summary, pictures, [*lines, *verdict(config, summary, task.expected(summary))])
    finally:
        log.close()
        task.close()
    return summary
