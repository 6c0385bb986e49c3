"""The log of a run in Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from .config import run_group
from .logs import Logger

CONTROLS = ("sgd", "adam", "random_trunk")


class WandB(Logger):
    """Logs to W&B: online where it is logged in, otherwise offline, never with a prompt."""

    def __init__(self, config: dict[str, Any], folder: Path, run_id: str | None) -> None:
        import wandb

        logger, self._folder = config["logger"], folder
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
        self._run, self.run_id = run, run.id
        if config["task"]:
            run.define_metric("*", step_metric="round")
            return
        for axis in ("step", "epoch", "forward_passes", "seconds"):  # a panel can be drawn against any of them
            run.define_metric(axis)
        for metric in ("train/loss", "diagnostics/*"):
            run.define_metric(metric, step_metric="step")
        for metric in ("train/epoch_loss", "images_per_second", "weight_norm/*"):
            run.define_metric(metric, step_metric="epoch")
        run.define_metric("test/accuracy", summary="max,last", step_metric="epoch")
        run.define_metric("test/loss", summary="min,last", step_metric="epoch")

    def log(self, numbers: dict[str, Any]) -> None:
        """Log numbers by their names."""
        self._run.log(numbers)

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> str:
        """Log the summary, the pictures and, online, the checkpoint; tells where an offline run is."""
        import wandb

        self._run.summary.update(summary)
        self._run.log({f"pictures/{p.stem}": wandb.Image(str(p)) for p in pictures})
        offline, run_dir = self._run.settings._offline, Path(self._run.dir).parent
        if not offline:
            checkpoint = str(self._folder / "checkpoint.pt")
            self._run.log_artifact(checkpoint, name=f"{self._run.id}-checkpoint", type="model")
        self._run.finish()
        folder = os.path.relpath(run_dir)
        if not offline:
            return ""
        return f"W&B is offline: show this run with `wandb leet {folder}`, upload it with `wandb sync {folder}`"

    def close(self) -> None:
        """Close after an error."""
        self._run.finish(exit_code=1)


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
