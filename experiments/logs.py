"""The log of a run: on the terminal, in the run's folder, and in W&B."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .config import run_group
from .files import write_json, write_lines
from .ranks import Ranks

CONTROLS = ("sgd", "adam", "random_trunk")


class RunLog:
    """Writes one run: a line for each round on the terminal and in ``metrics.jsonl``, and its numbers to W&B.

    Args:
        folder: the run's folder.
        config: the resolved configuration, plain containers.
        wandb_id: of an interrupted run that is resumed.
        history: the lines of the rounds so far.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], wandb_id: str | None, history: list[dict[str, Any]]
    ) -> None:
        self.folder = folder
        self.history = history
        self._every = config["logger"]["every"]
        self._epochs = config["epochs"]
        self._wandb = _start_wandb(config, folder, wandb_id)
        # Drops lines of a round that was not finished.
        self._write_metrics()

    @property
    def wandb_id(self) -> str | None:
        """The W&B run, if there is one."""
        return self._wandb.id if self._wandb is not None else None

    def batches(self, batches: Iterator[Any], total: int, epoch: int) -> Iterator[Any]:
        """Iterate over the batches, with a progress bar where the output is a terminal."""
        label = f"epoch {epoch}/{self._epochs}"
        watched = sys.stderr.isatty() and Ranks().first
        return iter(tqdm(batches, label, total, leave=False, unit="batch", disable=not watched))

    def step(self, step: int, loss: Tensor, diagnostics: list[dict[str, Any]]) -> None:
        """Log to W&B the training loss every ``logger.every`` steps, and the diagnostics of this step if any."""
        if self._wandb is None:
            return
        if step % self._every == 0:
            self._wandb.log({"step": step, "train/loss": loss.item()})
        if diagnostics and diagnostics[-1]["step"] == step:
            line = {f"diagnostics/{name}": value for name, value in diagnostics[-1].items() if name != "step"}
            self._wandb.log({"step": step, **line})

    def round(self, line: dict[str, Any], numbers: dict[str, Any], label: str, text: str) -> None:
        """Log one round of a task.

        Args:
            line: of ``metrics.jsonl``.
            numbers: for W&B.
            label: of the round, on the terminal.
            text: what the terminal shows of it.
        """
        self.history.append(line)
        self._write_metrics()
        print(f"{label}   {text}", flush=True)
        if self._wandb is not None:
            self._wandb.log(numbers)

    def finish(self, summary: dict[str, Any], pictures: list[Path], lines: list[str]) -> None:
        """Write the summary, print these lines, and close W&B."""
        write_json(self.folder / "summary.json", summary)
        print("\n".join(lines))
        print(f"results are in {self.folder}")
        if self._wandb is not None:
            import wandb

            self._wandb.summary.update(summary)
            self._wandb.log({f"pictures/{p.stem}": wandb.Image(str(p)) for p in pictures})
            offline, run_dir = self._wandb.settings._offline, Path(self._wandb.dir).parent
            if not offline:
                checkpoint = str(self.folder / "checkpoint.pt")
                self._wandb.log_artifact(checkpoint, name=f"{self._wandb.id}-checkpoint", type="model")
            self._wandb.finish()
            if offline:
                folder = os.path.relpath(run_dir)
                print(f"W&B is offline: show this run with `wandb leet {folder}`, upload it with `wandb sync {folder}`")
        self._wandb = None

    def close(self) -> None:
        """Close W&B after an error."""
        if self._wandb is not None:
            self._wandb.finish(exit_code=1)
            self._wandb = None

    def _write_metrics(self) -> None:
        write_lines(self.folder / "metrics.jsonl", self.history)


def _start_wandb(config: dict[str, Any], folder: Path, run_id: str | None) -> Any:
    logger = config["logger"]
    if logger["mode"] == "disabled":
        return None
    import wandb

    mode = logger["mode"]
    if mode == "auto":
        mode = "online" if _logged_in() else "offline"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of W&B's own dependencies
        run = wandb.init(
            project=logger["project"],
            entity=logger["entity"],
            dir=logger["dir"],
            name=folder.name,
            group=group(config),
            job_type="experiment"
            if config["task"]
            else "control"
            if config["optimizer"]["name"] in CONTROLS
            else "rule",
            tags=_names(config),
            config=config,
            mode=mode,
            id=run_id,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
    if config["task"]:
        run.define_metric("*", step_metric="round")
        return run
    for axis in ("step", "epoch", "forward_passes", "seconds"):  # a panel can be drawn against any of them
        run.define_metric(axis)
    for metric in ("train/loss", "diagnostics/*"):
        run.define_metric(metric, step_metric="step")
    for metric in ("train/epoch_loss", "images_per_second", "weight_norm/*"):
        run.define_metric(metric, step_metric="epoch")
    run.define_metric("test/accuracy", summary="max,last", step_metric="epoch")
    run.define_metric("test/loss", summary="min,last", step_metric="epoch")
    return run


def group(config: dict[str, Any]) -> str:
    """W&B's group of runs that differ only in their seed; the hash at its end distinguishes groups of one name."""
    options = json.dumps(run_group(config), sort_keys=True)
    return "-".join([*_names(config), hashlib.sha1(options.encode()).hexdigest()[:6]])


def _names(config: dict[str, Any]) -> list[str]:
    return [config[part]["name"] for part in (["task"] if config["task"] else ["optimizer", "model", "data"])]


def _logged_in() -> bool:
    """Whether W&B is logged in, found out without a prompt or output."""
    import wandb

    try:
        wandb.setup(settings=wandb.Settings(silent=True))
        return bool(wandb.login(prompt=False))
    except Exception:
        return False


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
