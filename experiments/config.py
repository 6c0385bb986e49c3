"""Configurations as plain values: read from a run's folder, and compared by the options that make a difference.

Imports nothing of ours and no torch: it is loaded before a run is chosen.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# Options of where and how a run is made, on which its result does not depend; those of a benchmark are in its `task`.
LOCAL = {
    "benchmark",
    "control",
    "data.root",
    "device",
    "diagnostics",
    "logger",
    "resume",
    "run_dir",
    "sweep",
    "threads",
}
GROUPS = {"cost", "data", "experiment", "logger", "model", "optimizer"}  # folders in conf
# Options in which runs may differ that are averaged.
RESULT_INDEPENDENT = LOCAL | {"optimizer.seed", "seed"}
# Names that have changed, accepted for one release: of options (those of optimizers in rules as well), and of classes.
RENAMED = {
    "afterwards": "final_analysis",
    "cost.areas": "cost.blocks",
    "final_analysis.dream": "final_analysis.gibbs_steps",
    "optimizer.losers": "optimizer.loser_strength",
    "optimizer.wants": "optimizer.requires",
    "task.disguise": "task.permute",
}
MOVED = {
    "experiments.architectures.Architectures": "experiments.tasks.architectures.Architectures",
    "experiments.boltzmann.Valleys": "experiments.tasks.spin_glass.Valleys",
    "experiments.boltzmann.likelihood": "experiments.likelihood.likelihood",
    "experiments.context_routing.ContextRouting": "experiments.tasks.context_routing.ContextRouting",
    "experiments.delayed_recall.DelayedRecall": "experiments.tasks.delayed_recall.DelayedRecall",
    "experiments.hopfield.Recall": "experiments.tasks.hopfield.Recall",
    "experiments.meta_cost.MetaCost": "experiments.tasks.meta_cost.MetaCost",
    "experiments.savings.Savings": "experiments.tasks.savings.Savings",
}


def with_new_names(config: DictConfig) -> DictConfig:
    """The configuration with new names in place of old ones; each is printed, as a user may have typed it."""
    plain = OmegaConf.to_container(config)
    if not (notes := rename(plain)):
        return config
    for note in notes:
        print(f"warning: {note}; the old name is accepted in this release only", flush=True)
    return OmegaConf.create(plain)  # type: ignore[return-value]


def rename(plain: Any) -> list[str]:
    """Replace old names of options and classes in plain values, in place; returns what was replaced."""
    notes = []
    of_rules = {
        old.replace("optimizer", f"rules.{rule}"): new.replace("optimizer", f"rules.{rule}")
        for old, new in RENAMED.items()
        if old.startswith("optimizer.")
        for rule in plain.get("rules") or {}
    }
    for old, new in (RENAMED | of_rules).items():
        *parents, old_name = old.split(".")
        part = functools.reduce(lambda part, name: (part or {}).get(name), parents, plain)
        if isinstance(part, dict) and old_name in part:
            value, new_name = part.pop(old_name), new.rpartition(".")[2]
            part[new_name] = value if part.get(new_name) is None else part[new_name]
            notes.append(f"{old} is called {new} now")
    for name in ("task", "final_analysis"):
        part = plain.get(name)
        if isinstance(part, dict) and (moved := MOVED.get(part.get("_target_", ""))):
            notes.append(f"{name}._target_={part['_target_']} is {moved} now")
            part["_target_"] = moved
    return notes


def renamed_word(word: str) -> str:
    """An override as it was typed, with the new name of its option; an old name is printed."""
    key, equals, value = word.partition("=")
    bare = key.lstrip("+~")
    for old, new in RENAMED.items():
        if bare == old or bare.startswith(f"{old}."):
            bare = new + bare.removeprefix(old)
    if bare != key.lstrip("+~"):
        print(
            f"warning: {key.lstrip('+~')} is called {bare} now; the old name is accepted in this release only",
            flush=True,
        )
    return key.removesuffix(key.lstrip("+~")) + bare + equals + value


def resolved(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain containers, without interpolations."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def run_group(config: Any) -> dict[str, Any]:
    """All options that a result depends on, except the seed: runs of one group may be averaged."""
    plain = copy.deepcopy(config)
    rename(plain)
    return {key: value for key, value in flat(plain).items() if not is_result_independent(key)}


def is_result_independent(key: str) -> bool:
    """Whether an option is the seed, or one on which a result does not depend."""
    # The options that `per_data` has for the run's own data set are among those of the run.
    return is_local(key) or key in RESULT_INDEPENDENT or key.startswith("optimizer.per_data.")


def is_local(key: str) -> bool:
    """Whether an option says only where and how a run is made."""
    return key in LOCAL or key.split(".")[0] in LOCAL


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"optimizer": {"lr": 1}}`` as ``{"optimizer.lr": 1}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def by_part(options: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """``{"trunk": {"lr": 1, "block1": {"lr": 2}}}`` as ``{"trunk": {"lr": 1}, "trunk.block1": {"lr": 2}}``.

    Options outside of parts are dropped.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            part = f"{prefix}{name}"
            if own := {str(key): option for key, option in value.items() if not isinstance(option, dict)}:
                found[part] = own
            found |= by_part(value, f"{part}.")
    return found


def name_of(options: list[str]) -> str:
    """A name for a folder that a shell takes without quotes: the values of options as they were typed.

    ``hebbian-mnist-lr0.5-seed1`` of ``data=mnist optimizer=hebbian optimizer.lr=0.5 seed=1``: the optimizer first, the
    seed last, numbers and the like behind the last part of their option's name. Long names are cut and end with a hash.
    """
    parts = []
    for option in options:
        key, _, value = option.partition("=")
        value = value.strip("'\"")
        bare = key.lstrip("+~")
        group = bare.split(".")[0].split("@")[0]
        own = bare if key.startswith("~") else value
        named = "." in bare or bare not in GROUPS
        text = f"{'no-' * key.startswith('~')}{bare.rpartition('.')[2] if named and own is value else ''}{own}"
        place = 0 if bare == "optimizer" else 2 if bare == "seed" else 1
        parts.append((place, group, bare, re.sub(r"[^\w.+-]+", "_", text).strip("_")))
    name = "-".join(text for *_, text in sorted(parts)) or "defaults"
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
    plain = OmegaConf.to_container(config)
    rename(plain)
    refuse_interpolations(plain, f"{path}: ")
    return OmegaConf.create(plain)  # type: ignore[return-value]


def saved(folder: Path) -> DictConfig:
    """The configuration of a run that is resumed."""
    if not (folder / "config.yaml").exists():
        raise ValueError(f"resume={folder} is not a run's folder: it has no config.yaml")
    refuse_finished(folder)
    try:
        return read(folder)
    except ValueError as error:
        raise ValueError(f"resume={error}") from None


def refuse_finished(folder: Path) -> None:
    """Raise where a run has finished already."""
    if (folder / "summary.json").exists():
        raise ValueError(f"resume={folder} has finished: see its summary.json")


def refuse_interpolations(plain: Any, where: str, key: str = "") -> None:
    """Raise for a value that contains an interpolation, of an environment variable for example."""
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
