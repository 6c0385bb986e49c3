"""The last word of a run: what was measured, beside what was expected from theory, a control, or a recorded run."""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import run_group
from .options import CONF
from .statistics import percent, plain

RECORDS = Path(__file__).parent / "records"
# Options on which what is measured does not depend; `amp=auto` is true or false in a run, and precision is compared.
ASIDE = ("amp", "control", "diagnostics")
CONTROLS = {"random_trunk": "random trunk", "sgd": "sgd", "adam": "adam"}


@dataclass(frozen=True)
class Expected:
    """What a measured number is compared with."""

    values: Sequence[float]  # one, or one for each seed
    source: str  # what follows the number, such as "by theory"
    warning: str = ""  # a line in place of the comparison where less was measured


def verdict(config: DictConfig, summary: Mapping[str, Any], expected: Mapping[str, Sequence[Expected]]) -> list[str]:
    """A line for each number with which there is something to compare, and the warnings.

    Args:
        config: of the run.
        summary: of the run, with its numbers in ``measured``, the most important first, or ``test_accuracy``.
        expected: what the task expects, by the names of numbers. Records of the same options, and of controls, are
            found here; without other expectations they are compared with the most important number.
    """
    found: Mapping[str, Any] = summary.get("measured", summary)
    first = "test_accuracy" if "test_accuracy" in found else next(iter(found), None)
    names = [name for name in expected if name in found] or ([first] if first is not None else [])
    kept = [*recorded(config)] if names and not config.data.validation else []
    lines, warnings = [], []
    for name in names:
        shown = percent if name == "test_accuracy" else plain
        unit = " %" * (name == "test_accuracy")
        compared = []
        for one in [*expected.get(name, ()), *_of_records(name, kept)]:
            if one.warning and found[name] < statistics.fmean(one.values):
                warnings.append(one.warning)
            else:
                compared.append(f"{shown([*one.values])}{unit} {one.source}")
        if compared:
            against = " and ".join([", ".join(compared[:-1]), compared[-1]] if compared[1:] else compared)
            lines.append(f"verdict: {name.replace('_', ' ')} {shown([found[name]])}{unit}, against {against}")
    return lines + warnings


def recorded(config: DictConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of the same options as a run's, and of its controls: what each is, and its contents."""
    own = comparable(OmegaConf.to_container(config, resolve=True))
    for path in sorted(RECORDS.glob("*/result.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rule = record.get("optimizer")
        if config.task is not None:
            likely = record.get("task") == config.task.name != "benchmark"
        else:
            same = all(record.get(k) == v for k, v in _described(config).items())
            likely = same and rule in {config.optimizer.name, *CONTROLS}
        if not likely or record.get("precision", "fp32") != ("bf16" if config.amp else "fp32"):
            continue
        try:
            other = comparable(options_of(record["command"]))
        except (HydraException, OmegaConfBaseException):
            continue  # its options have changed since, or are not in this configuration
        if other == own:
            yield "recorded", record
        elif rule in CONTROLS and rule != config.optimizer.name and _posed(other) == _posed(own):
            yield f"of the recorded {CONTROLS[rule]}", record


def options_of(command: str) -> Any:
    """All options of a command of train.py, without the seeds."""
    words = [word for word in shlex.split(command)[2:] if word != "-m" and not word.startswith("seed=")]
    within = GlobalHydra.instance().is_initialized()  # by train.py
    with contextlib.nullcontext() if within else initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", words), resolve=True)


def comparable(options: Any) -> dict[str, Any]:
    """The options on which what is measured depends."""
    return {key: value for key, value in run_group(options).items() if key.split(".")[0] not in ASIDE}


def _described(config: DictConfig) -> dict[str, Any]:
    return {"data": config.data.name, "model": config.model.name, "epochs": config.epochs}


def _posed(options: dict[str, Any]) -> dict[str, Any]:
    """The data, the network and the length of a run, which it shares with its controls."""
    return {k: v for k, v in options.items() if k.split(".")[0] in ("data", "model", "epochs")}


def _of_records(name: str, kept: list[tuple[str, dict[str, Any]]]) -> Iterator[Expected]:
    for source, record in kept:
        values = record.get("measured", {}).get(name) if name != "test_accuracy" else record["test_accuracy"]
        if values:
            yield Expected(values, source)
