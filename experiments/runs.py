"""A run as its folder holds it: configuration, progress, and the commit of the code that made it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from yaml import YAMLError

from .sweeps import resolved


def choose_device(name: str) -> torch.device:
    """The device by its option ``device=auto|cpu|cuda``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA GPU here; use device=cpu or device=auto")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device={name} must be auto, cpu or cuda")
    return torch.device(name)


def saved(folder: Path) -> DictConfig:
    """The configuration of the run that is to go on."""
    if not (folder / "config.yaml").exists():
        raise ValueError(f"resume={folder} is not a run's folder: it has no config.yaml")
    if (folder / "summary.json").exists():
        raise ValueError(f"resume={folder} has finished: see its summary.json")
    with contextlib.suppress(YAMLError):
        config = OmegaConf.load(folder / "config.yaml")
        if isinstance(config, DictConfig) and {"optimizer", "model", "data", "task", "readout"} <= set(config):
            return config
    raise ValueError(f"resume={folder} is not a run's folder: its config.yaml was not written by train.py")


def new_folder(config: DictConfig) -> Path:
    """A folder for a new run, with its configuration in it."""
    _check(config)
    wanted = Path(config.run_dir)
    for attempt in range(1, 1000):
        folder = wanted if attempt == 1 else wanted.with_name(f"{wanted.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"run_dir={config.run_dir} cannot be written: {error.strerror}") from None
    OmegaConf.save(OmegaConf.create(resolved(config)), folder / "config.yaml")
    return folder


def require_counts(least: int = 1, of: str = "task.", **options: Any) -> None:
    """Raise where one of these options, of a task or of what else, is no whole number, or too small."""
    for name, value in options.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{of}{name}={value} must be an integer >= {least}")


def _check(config: DictConfig) -> None:
    require_counts(of="", epochs=config.epochs, batch_size=config.batch_size)
    require_counts(of="readout.", batch_size=config.readout.batch_size)
    require_counts(0, of="", seed=config.seed)
    for name in ("amp", "data.augment.flip"):
        if not isinstance(value := OmegaConf.select(config, name, default=False), bool):
            raise ValueError(f"{name}={value} must be true or false")
    if config.threads is not None and (not isinstance(config.threads, int) or config.threads < 1):
        raise ValueError(f"threads={config.threads} must be an integer >= 1, or null")


def circumstances(device: torch.device, commit: str | None) -> dict[str, Any]:
    """What a summary says of the machine and the code."""
    threads = torch.get_num_threads()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} thread{'s' * (threads > 1)}"
    )
    return {"device": name, "torch": torch.__version__, "commit": commit}


def code_version() -> str | None:
    """The commit of the code that runs, with a ``+`` where files differ from it; none outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        done = [
            subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return done[0] + ("+" if done[1] else "")


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


@dataclass
class Progress:
    """What a run needs to go on after its last whole epoch, bit for bit."""

    epoch: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)
    areas: list[dict[str, Any]] = field(default_factory=list)
    random: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    fields: list[Tensor] = field(default_factory=list)
    forward_passes: int = 0
    seconds: float = 0.0
    images: int = 0
    steps: int = 0
    wandb_id: str | None = None

    def restore_random(self, device: torch.device) -> None:
        """Put torch's generators where they were."""
        torch.set_rng_state(self.random["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.random["cuda"], device)

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.pt``, whole or not at all."""
        part = folder / "checkpoint.pt.part"
        torch.save(vars(self), part)
        part.replace(folder / "checkpoint.pt")

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Progress:
        """Read ``checkpoint.pt``; the very start where there is none yet."""
        path = folder / "checkpoint.pt"
        if not path.exists():
            return cls()
        progress = cls(**torch.load(path, map_location=device, weights_only=True))
        progress.random = {name: state.cpu() for name, state in progress.random.items()}
        return progress
