"""Configurations as plain values: what a run's folder holds of them, and which options make a difference.

Imports nothing of ours and no torch: it is loaded before a run is chosen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# Options of where and how a run is made: its result does not depend on them.
LOCAL = {"data.root", "device", "diagnostics", "logger", "resume", "run_dir", "sweep", "threads"}
# What runs that are averaged may differ in.
RESULT_INDEPENDENT = LOCAL | {"optimizer.seed", "seed"}


def resolved(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain containers, without interpolations."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def run_group(config: Any) -> dict[str, Any]:
    """All options that a result depends on, but the seed: runs of one group may be averaged."""
    return {key: value for key, value in flat(config).items() if not is_result_independent(key)}


def is_result_independent(key: str) -> bool:
    """Whether an option is the seed, or one that a result does not depend on."""
    return key in RESULT_INDEPENDENT or key.split(".")[0] in RESULT_INDEPENDENT


def is_local(key: str) -> bool:
    """Whether an option is of where and how a run is made."""
    return key in LOCAL or key.split(".")[0] in LOCAL


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"optimizer": {"lr": 1}}`` as ``{"optimizer.lr": 1}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def name_of(options: list[str]) -> str:
    """A name for a folder, of options as they were typed; of long ones the beginning, and a hash of all."""
    name = ",".join(sorted(options)).replace("/", "_").replace("'", "").replace('"', "").replace(" ", "") or "defaults"
    return name if len(name) <= 120 else f"{name[:110]}-{hashlib.sha1(name.encode()).hexdigest()[:8]}"


def read(folder: Path) -> DictConfig:
    """The configuration of a run, from its folder: plain values, in which nothing is resolved.

    Raises:
        ValueError: the file is damaged, was not written by train.py, or holds an interpolation.
    """
    path = folder / "config.yaml"
    try:
        config = OmegaConf.load(path)
        known = isinstance(config, DictConfig) and {"optimizer", "model", "data", "task", "readout"} <= set(config)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError):
        known = False
    if not known:
        raise ValueError(f"{folder} is not a run's folder: its config.yaml is damaged, or was not written by train.py")
    assert isinstance(config, DictConfig)
    refuse_interpolations(OmegaConf.to_container(config), f"{path}: ")
    return config


def saved(folder: Path) -> DictConfig:
    """The configuration of the run that is to go on."""
    if not (folder / "config.yaml").exists():
        raise ValueError(f"resume={folder} is not a run's folder: it has no config.yaml")
    refuse_finished(folder)
    try:
        return read(folder)
    except ValueError as error:
        raise ValueError(f"resume={error}") from None


def refuse_finished(folder: Path) -> None:
    """Raise where a run need not go on."""
    if (folder / "summary.json").exists():
        raise ValueError(f"resume={folder} has finished: see its summary.json")


def refuse_interpolations(plain: Any, where: str, key: str = "") -> None:
    """Raise for a value that something else would be put in the place of, an environment variable, say."""
    if isinstance(plain, dict):
        for name, value in plain.items():
            refuse_interpolations(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(plain, list):
        for value in plain:
            refuse_interpolations(value, where, key)
    elif isinstance(plain, str) and "${" in plain:
        raise ValueError(
            f"{where}{key}={plain} holds an interpolation, which a run's configuration cannot: write a value"
        )
