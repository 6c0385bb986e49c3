"""The options of a run, checked before anything is built from them.

Nothing here imports torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .checks import check_inside_runs, require_counts, require_package, unknown
from .config import flat, refuse_interpolations

CONF = Path(__file__).parent.parent / "conf"
# Parts whose options are keywords of their `_target_` (see `building.check_keywords`) or of a task.
OPEN = {"cost", "final_analysis", "hydra", "model", "optimizer", "readout.optimizer", "rules", "structures", "task"}
# Those of the benchmark that hold a table of networks or rules.
OPEN |= {"benchmark.models", "benchmark.options", "benchmark.rates"}
OF_TASKS = ("rules", "structures")  # parts that an experiment chooses from the groups optimizer and model
# Not used by the experiments of this repository that have a task of their own.
OF_CLASSIFICATION = (
    *("epochs", "batch_size", "plastic_epochs", "frozen", "readout", "cost"),
    *("diagnostics", "control", "final_analysis"),
)
OF_DATA = ("epochs", "batch_size", "plastic_epochs")  # set by `optimizer.per_data`
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "logger.mode": ("auto", "online", "offline", "disabled"),
    "schedule": ("cosine", "constant", "halving"),
    "readout.schedule": ("cosine", "constant", "halving"),
}


def check(config: DictConfig) -> None:
    """Refuse a configuration that no run can use, as far as can be seen without torch.

    Raises:
        ValueError: names the option and its value, and what it can be.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    known = _known()
    _check_sections(plain, known)
    own = "_target_" in plain["logger"] or not plain["logger"]["classes"].items() <= known["logger"]["classes"].items()
    if own:  # a logger of your own, with options of its own
        known = {**known, "logger": dict.fromkeys([*known["logger"], *plain["logger"]])}
    _check_names(plain, known)
    for name in OF_TASKS:
        if name in plain and plain["task"] is None:
            raise ValueError(f"{name} belongs to experiments such as architectures, and task is null")
    _check_tables(plain["optimizer"], plain["model"]["name"])
    _check_like(plain["data"], plain["optimizer"].get("per_data") or ())
    require_counts(of="", epochs=config.epochs, batch_size=config.batch_size)
    require_counts(of="readout.", batch_size=config.readout.batch_size)
    require_counts(of="logger.", every=config.logger.every)
    rate = plain["optimizer"].get("lr")
    if isinstance(rate, bool) or not (rate is None or isinstance(rate, int | float)):
        raise ValueError(f"optimizer.lr={rate} must be a number")
    if not isinstance(run_dir := config.run_dir, str) or not Path(run_dir).name:
        raise ValueError(f"run_dir={run_dir or 'null'} must be the path of a new folder, such as runs/mine")
    require_counts(0, of="", seed=config.seed)
    if config.seed >= 2**32:
        raise ValueError(f"seed={config.seed} must be an integer below 2^32")
    for name, choices in CHOICES.items():
        if (value := OmegaConf.select(config, name)) not in choices:
            raise ValueError(f"{name}={value} must be {_listed(choices)}")
    if "tensorboard" in plain["logger"].get("classes", ()) and config.logger.mode != "disabled":
        require_package("logger=tensorboard", "tensorboard")
    if config.amp != "auto" and not isinstance(config.amp, bool):
        raise ValueError(f"amp={config.amp} must be true, false or auto")
    if not isinstance(flip := OmegaConf.select(config, "data.augment.flip", default=False), bool):
        raise ValueError(f"data.augment.flip={flip} must be true or false")
    if not isinstance(config.control, int | float) or not 0 <= config.control <= 1:
        raise ValueError(f"control={config.control} must be a share of the run from 0 to 1, or true or false")
    require_counts(of="", null=True, threads=config.threads, plastic_epochs=config.plastic_epochs)
    if config.sweep is not None:
        check_inside_runs("sweep", config.sweep)
    if not isinstance(blocks := plain["cost"].get("blocks"), dict | None):
        raise ValueError(
            f"cost.blocks={blocks} must give a cost for each part, as in cost.blocks={{trunk: contrastive}}"
        )
    refuse_interpolations(plain, "")


def _check_sections(plain: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a value in place of a part that holds options."""
    for name, options in known.items():
        key, value = f"{prefix}{name}", plain.get(name)
        if name not in plain or not isinstance(options, dict) or (prefix and not options):
            continue
        if not isinstance(value, dict):
            inside = next(iter(options), "name")
            raise ValueError(f"{key}={'null' if value is None else value} must hold options, such as {key}.{inside}")
        _check_sections(value, options, f"{key}.")


def check_names(overrides: Iterable[str]) -> None:
    """Refuse choices and options that do not exist, among overrides as they were typed.

    Raises:
        ValueError: names the override, and the nearest name that exists.
    """
    overrides = list(overrides)
    for override in overrides:
        key, _, value = override.partition("=")
        bare = key.lstrip("+")
        if override.startswith("~") or set("/@") & set(key):
            continue
        if (CONF / bare).is_dir():
            _check_choice(bare, value)
            continue
        given: Any = None
        for name in reversed(bare.split(".")):
            given = {name: given}
        _check_names(given, _known())
        group, _, option = bare.partition(".")
        if group in ("optimizer", "model") and bare == key:
            _check_default(group, option.partition(".")[0], override, _chosen(group, overrides))
    _check_of_tasks(overrides)


def _check_of_tasks(overrides: Sequence[str]) -> None:
    """Refuse options that an experiment other than image classification does not have, or does not use."""
    typed = _typed(overrides)
    paths = _experiments(typed)
    files = {path.stem: _loaded(path) for path in paths if path.exists()}
    tasks = {name: file["task"] for name, file in files.items() if "task" in file}
    if not tasks or len(tasks) < len(paths):
        return
    for bare, value in typed.items():
        group, _, option = bare.partition(".")
        if group == "task" and f"{bare}={value}" in overrides:  # without a +, which adds options
            names = dict.fromkeys(name for task in tasks.values() for name in task)
            if option.partition(".")[0] not in names:
                raise unknown(bare, [f"task.{name}" for name in names])
        for name, task in tasks.items():
            own = str(task["_target_"]).startswith("experiments.")
            if own and (group in OF_CLASSIFICATION or (group == "optimizer" and name != "benchmark")):
                has = [f"task.{option}" for option in task if option not in ("name", "_target_")]
                has += ["rules.NAME"] if "rules" in files[name] else []
                raise ValueError(f"{bare}={value} has no effect in experiment={name}, whose options are {_listed(has)}")


def _check_choice(group: str, value: str) -> None:
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    for name in value.strip("[]").split(","):
        if name in ("", "null") and group != "experiment":
            none = "; logger.mode=disabled logs nowhere else than in the run's folder" if group == "logger" else ""
            raise ValueError(f"{group}={value} names nothing; it can be {_listed(names)}{none}")
        if re.fullmatch(r"\w+", name) and name not in (*names, "null"):
            near = [f"did you mean {match}? " for match in difflib.get_close_matches(name, names, 1)]
            raise ValueError(f"{group}={name} does not exist; {''.join(near)}{group} can be {_listed(names)}")


def _typed(overrides: Iterable[str]) -> dict[str, str]:
    """The values by their options."""
    return {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in overrides)}


def _experiments(typed: Mapping[str, str]) -> list[Path]:
    """The files of the experiments that were typed, whether or not they exist."""
    return [CONF / "experiment" / f"{name}.yaml" for name in typed.get("experiment", "").split(",") if name]


def _chosen(group: str, overrides: Iterable[str]) -> list[str]:
    """The files of a group that are used: as typed, or by an experiment, or by default."""
    typed = _typed(overrides)
    if group in typed:
        return typed[group].split(",")
    files = [CONF / "config.yaml", *_experiments(typed)]
    entries = [entry for path in files if path.exists() for entry in _loaded(path).get("defaults", ())]
    found = [entry for entry in entries if isinstance(entry, dict) and {group, f"override /{group}"} & set(entry)]
    return [str(value) for value in found[-1].values()]


def _check_default(group: str, option: str, override: str, files: Iterable[str]) -> None:
    """Refuse an option of an optimizer or a network that its file does not have; Hydra's ``+`` adds such options."""
    for path in (CONF / group / f"{name}.yaml" for name in files):
        if path.exists() and option not in (names := _loaded(path)):
            near = [f" (did you mean {group}.{match}?)" for match in difflib.get_close_matches(option, list(names), 1)]
            raise ValueError(
                f"{group}.{option} is not in conf/{group}/{path.name}{''.join(near)}; to set another argument of its "
                f"class, write +{override}"
            )


@functools.cache
def _known() -> dict[str, Any]:
    """All names of options but those of the open parts, nested as in the configuration."""
    known = _loaded(CONF / "config.yaml")
    groups: dict[str, Any] = {path.name: {} for path in CONF.iterdir() if path.is_dir()}
    of_data = {
        name: option for path in sorted((CONF / "data").glob("*.yaml")) for name, option in _loaded(path).items()
    }
    loggers = [_loaded(path) for path in sorted((CONF / "logger").glob("*.yaml"))]
    of_loggers = {name: option for logger in loggers for name, option in logger.items()}
    of_loggers["classes"] = {name: path for logger in loggers for name, path in logger["classes"].items()}
    of_benchmark: dict[str, Any] = {n: {} for file in (CONF / "benchmark").glob("*.yaml") for n in _loaded(file)}
    parts = {"data": of_data, "logger": of_loggers, "benchmark": of_benchmark}
    return {**groups, **dict.fromkeys(OF_TASKS), **{k: v for k, v in known.items() if k != "defaults"}, **parts}


def _loaded(path: Path) -> dict[str, Any]:
    return _parsed(path.read_text("utf-8"))


@functools.cache  # there are some fifty files, each read several times
def _parsed(text: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _check_names(given: Mapping[Any, Any], known: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in known:
            every = [*_known(), *(option for option in flat(_known()) if not option.startswith("hydra."))]
            own = {
                f"{group}.{option}": None
                for group in ("optimizer", "model")
                for path in sorted((CONF / group).glob("*.yaml"))
                for option in _loaded(path)
            }
            raise unknown(key, every, own)
        if key not in OPEN and isinstance(value, dict) and isinstance(known[name], dict):
            _check_names(value, known[name], f"{key}.")


def _check_tables(optimizer: Mapping[str, Any], model: str) -> None:
    """Refuse entries in an optimizer's tables of options for data sets and models that would have no effect."""
    for data, options in (optimizer.get("per_data") or {}).items():
        for name in options:
            if name not in OF_DATA:
                raise unknown(f"optimizer.per_data.{data}.{name}", [f"optimizer.per_data.{data}.{n}" for n in OF_DATA])
    path = CONF / "optimizer" / f"{optimizer['name']}.yaml"
    tables = (_loaded(path).get("per_model") or {}).values() if path.exists() else ()
    used = {name for table in tables for name in table}
    for name, value in ((optimizer.get("per_model") or {}).get(model) or {}).items():
        if path.exists() and not isinstance(value, dict) and name not in used:
            raise ValueError(
                f"optimizer.per_model.{model}.{name}={value} has no effect: there are options of parts, "
                f"optimizer.per_model.{model}.PART.{name}; of the whole network it is optimizer.{name}={value}"
            )


def _check_like(data: Mapping[str, Any], per_data: Iterable[str]) -> None:
    """Refuse a data set that takes its options from one that does not exist, or that takes them from another itself."""
    like = data.get("like")
    others = {path.stem: _loaded(path).get("like") for path in sorted((CONF / "data").glob("*.yaml"))}
    known = [name for name, other in others.items() if other is None]
    known += [name for name in per_data if name not in others]
    if like is not None and like not in known:
        further = f", which is itself like {others[like]}" if like in others else ""
        raise ValueError(f"data.like={like}{further}: it must be {_listed(known)}")


def rules_by_name(chosen: str | Sequence[str]) -> list[str]:
    """The optimizers of a benchmark: a list of names, or ``"all"`` that need no network of their own; controls first.

    Raises:
        ValueError: neither of the two.
    """
    if chosen == "all":
        files = {path.stem: _loaded(path) for path in sorted((CONF / "optimizer").glob("*.yaml"))}
        controls = [name for name in ("sgd", "adam", "random_trunk", "homeostasis") if name in files]
        others = [name for name, options in files.items() if "requires" not in options and name not in controls]
        return [*controls, *others]
    if isinstance(chosen, str) or not chosen:
        raise ValueError(f"benchmark.rules={chosen} must be all, or a list of optimizers such as [hebbian]")
    return list(chosen)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
