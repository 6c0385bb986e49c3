"""A run on disk: its folder, its checkpoint, and the commit of the code that made it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from . import interrupts
from .config import flat, is_local, refuse_finished, resolved
from .files import alone, write_whole


def choose_device(name: str) -> torch.device:
    """The device by its option ``device=auto|cpu|cuda``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA GPU here; use device=cpu or device=auto")
    return torch.device(name)


def with_amp_chosen(config: DictConfig) -> DictConfig:
    """The configuration with ``true`` or ``false`` for ``amp=auto``, which a run keeps wherever it is resumed."""
    if config.amp != "auto":
        return config
    chosen = config.copy()
    chosen.amp = has_bf16(choose_device(config.device))
    return chosen


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; others emulate it, which is slower than single precision."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is ARM's


def precision(config: DictConfig) -> str:
    """The precision of a run's forward passes."""
    return "bf16" if config.amp else "fp32"


def warn_if_emulated(config: DictConfig, device: torch.device) -> None:
    """Say so where a run asks for a precision that its device does not have."""
    if config.amp and not has_bf16(device):
        print(f"amp=true: this {device.type} emulates bf16, far more slowly than fp32; try amp=auto", flush=True)


def run_command(folder: Path) -> str:
    """The command that resumes a run."""
    name = str(folder)
    plain = re.fullmatch(r"[\w./+-]+", name)
    return f"python train.py resume={name}" if plain else f"python train.py \"resume='{name}'\""


@contextlib.contextmanager
def new_folder(config: DictConfig) -> Iterator[Path]:
    """A folder for a new run, with its configuration in it; removed again if the run fails before its first round."""
    chosen = Path(config.run_dir)
    first = not chosen.parent.exists()
    try:
        for attempt in itertools.count(1):
            folder = chosen if attempt == 1 else chosen.with_name(f"{chosen.name}-{attempt}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
        interrupts.resume_with(run_command(folder))
        write_whole(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved(config))))
    except OSError as error:
        interrupts.resume_with(None)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise ValueError(f"run_dir={config.run_dir} cannot be written: {error.strerror}") from None
    try:
        with held(folder):
            yield folder
    except Exception:
        if not (folder / "metrics.jsonl").exists():
            shutil.rmtree(folder)
            if first:
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()
        raise


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """A run's folder, locked for this process; an interrupt or a full disk is reported with the command to resume."""
    with alone(folder, f"{folder} is in use: another process is making this run; wait until it ends"):
        refuse_finished(folder)
        interrupts.resume_with(run_command(folder))
        try:
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(
                f"the disk is full: {free:.0f} MB are free at {folder}; free some, then resume with: "
                f"{run_command(folder)}"
            ) from error
        finally:
            if (folder / "summary.json").exists():
                interrupts.resume_with(None)
                (folder / ".lock").unlink(missing_ok=True)


def environment_info(device: torch.device, commit: str | None) -> dict[str, Any]:
    """The machine and the code, for a summary."""
    threads = torch.get_num_threads()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} thread{'s' * (threads > 1)}"
    )
    return {"device": name, "torch": torch.__version__, "commit": commit}


def environment(device: torch.device, commit: str | None, ranks: int) -> dict[str, Any]:
    """What the last bits of a result depend on, besides the options of the run."""
    cpu = {"processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    own = {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {"device": "cpu", **cpu}
    return {"commit": commit, "torch": str(torch.__version__), **own, "ranks": ranks}


def set_threads(chosen: int | None, before: int | None) -> None:
    """Set CPU threads: as chosen, or else as before the run was interrupted, if there are enough cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count := chosen or (before if before is not None and before <= cores else None):
        torch.set_num_threads(count)


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
    """What a run needs to be resumed after its last whole epoch (of a task: round), bit for bit."""

    epoch: int = 0
    state: dict[str, Any] = field(default_factory=dict)  # of the task
    random: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    run_id: str | None = None  # of the logger
    config: dict[str, Any] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)

    @property
    def commit(self) -> str | None:
        """The commits that made the run, in order."""
        found = list(dict.fromkeys(str(e["commit"]) for e in self.environments if e["commit"] is not None))
        return ", ".join(found) or None

    @property
    def threads(self) -> int | None:
        """The number of CPU threads with which it ran last."""
        return self.environments[-1].get("threads") if self.environments else None

    def restore_random(self, device: torch.device) -> None:
        """Restore the state of torch's generators."""
        torch.set_rng_state(self.random["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.random["cuda"], device)

    def resume(self, config: Mapping[str, Any], environment: dict[str, Any], folder: Path) -> None:
        """Continue with these options in this environment.

        Raises:
            ValueError: the options in the run's folder have changed since the checkpoint was written.
        """
        options = {key: value for key, value in flat(config).items() if not is_local(key)}
        for key in self.config.keys() | options.keys() if self.config else ():
            before, now = self.config.get(key), options.get(key)
            if before != now:
                raise ValueError(
                    f"{folder}: checkpoint.pt was made with {key}={before}, and config.yaml has {key}={now}; put the "
                    "former back, or start a new run"
                )
        if config["task"] is None and self.epoch > config["epochs"]:
            raise ValueError(
                f"{folder}: checkpoint.pt has {self.epoch} epochs, and config.yaml epochs={config['epochs']}; put the "
                "former back, or start a new run"
            )
        self.config = options
        last = self.environments[-1] if self.environments else {}
        changed = [f"{k} {now} (was {last[k]})" for k, now in environment.items() if last.get(k, now) != now]
        if changed:
            print(
                f"warning: the run is resumed with {', '.join(changed)}: its results may differ, in the last bits, "
                "from those of an uninterrupted run",
                flush=True,
            )
        if environment not in self.environments[-1:]:
            self.environments = [*self.environments, environment]

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.pt``, whole or not at all, with a digest of its bytes."""
        archive = io.BytesIO()
        own = {key: value for key, value in vars(self).items() if key != "state"}
        if clash := own.keys() & self.state.keys():
            raise ValueError(f"the task's state_dict has names of the checkpoint itself: {', '.join(sorted(clash))}")
        torch.save({"version": VERSION, **own, **self.state}, archive)
        write_whole(folder / "checkpoint.pt", sealed(archive.getvalue()))

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Progress:
        """Read ``checkpoint.pt``, or return a new progress where there is none yet.

        Raises:
            ValueError: the file is damaged, not a checkpoint of a run, or in another version's format.
        """
        path = folder / "checkpoint.pt"
        if not path.exists():
            return cls()
        content = path.read_bytes()
        try:
            check_seal(content)
            found = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            version = found.pop("version", 1)
            own = {key: found.pop(key) for key in cls.__dataclass_fields__ if key in found}
            progress = cls(**own, state=found)
            progress.random = {name: state.cpu() for name, state in progress.random.items()}
            last = progress.history[-1] if progress.history else {}
            if not len(progress.history) == last.get("epoch", last.get("round")) == progress.epoch:
                raise ValueError(f"its epoch is {progress.epoch}, and its history has {len(progress.history)}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # torch's own messages are about pickles and zip files, and many lines long
            why = str(error) if type(error) is ValueError else "it is not a checkpoint of a run"
            raise ValueError(
                f"{path} is damaged ({why}), and what the run has learned is lost: delete it, and "
                f"{run_command(folder)} starts again from the first epoch, with the same options"
            ) from error
        if version != VERSION:
            raise ValueError(
                f"{path} has format {version}, and this version of bioopt reads format {VERSION}: finish the run with "
                f"the code that began it (commit {progress.commit}), or delete the checkpoint, and "
                f"{run_command(folder)} starts again from the first epoch, with the same options"
            )
        return progress


VERSION = 2  # of the format of checkpoints
SEAL = b"sha256:"
SEAL_SIZE = len(SEAL) + 64


def sealed(archive: bytes) -> bytes:
    """A zip archive of torch.save, with a digest of its bytes as its comment; torch.load reads it as before."""
    content = archive[:-2] + SEAL_SIZE.to_bytes(2, "little")  # the last field of an archive is the size of its comment
    return content + SEAL + hashlib.sha256(content).hexdigest().encode()


def check_seal(content: bytes) -> None:
    """Compare an archive with its digest, or one without a digest with the checksums of its parts.

    Raises:
        ValueError: they differ.
    """
    archive, comment = content[:-SEAL_SIZE], content[-SEAL_SIZE:]
    if comment == SEAL + hashlib.sha256(archive).hexdigest().encode():
        return
    end = content[-22:]  # of an archive without a comment
    if end.startswith(b"PK\5\6") and end.endswith(b"\0\0"):
        if zipfile.ZipFile(io.BytesIO(content)).testzip() is None:
            return
    elif not content.startswith(b"PK"):
        raise ValueError("it is empty" if not content else "it is not a checkpoint of a run")
    raise ValueError("its bytes are not those that were written")
