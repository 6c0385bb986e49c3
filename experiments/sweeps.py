"""Many runs from one command, ``python train.py -m seed=0,1,2 ...``: each in a process and a folder of its own.

A sweep's runs lie in ``runs/<sweep>``, each named by its options, so that the same command goes on where it stopped.
This module is loaded before a run is chosen, so it must not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

# What a result does not depend on.
ASIDE = {
    "data.root",
    "device",
    "diagnostics",
    "logger",
    "optimizer.seed",
    "resume",
    "run_dir",
    "seed",
    "sweep",
    "threads",
}


class Sweep(Callback):
    """Names a sweep before its first run; after its last, names what failed and makes the report."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """``runs/<options>``, where neither the command nor the experiment gave a name; seeds may be added later."""
        if "WORLD_SIZE" in os.environ:
            sys.exit("error: a sweep does not run under torchrun; start its runs one by one there, without -m")
        if config.sweep is None:
            overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
            config.sweep = name_of([str(o.input_line) for o in overrides if not aside(o.key_or_group)])
            config.hydra.overrides.task.append(f"sweep='{config.sweep}'")  # for each run to know

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """A table on the terminal, and ``report.html`` beside the runs."""
        from .report import NothingToReport, report

        folder = Path(config.hydra.sweep.dir)
        try:
            print(report([folder], folder))
        except NothingToReport as nothing:
            print(nothing)
        failed = list(folder.glob("*/error.txt"))
        if failed:
            sys.exit(f"error: {len(failed)} of the runs in {folder} failed, see above and error.txt in each")


def run_one(config: DictConfig) -> None:
    """One run of a sweep: skipped where it has finished, resumed where it was interrupted; its error is kept."""
    job = HydraConfig.get().job
    left_out = job.config.override_dirname.exclude_keys
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    name = name_of([str(o.input_line) for o in overrides if o.key_or_group not in left_out])
    folder = Path(HydraConfig.get().sweep.dir) / name
    plain = resolved(config) | {"run_dir": str(folder)}
    print(f"\n[{job.num + 1}] {name}", flush=True)
    try:
        if config.resume is not None:
            raise ValueError(f"resume={config.resume}: a sweep resumes by itself what was interrupted")
        if (folder / "config.yaml").exists():
            _same(folder, plain)
            if (folder / "summary.json").exists():
                print("finished before", flush=True)
                return
            plain["resume"] = str(folder)
        elif folder.exists():
            shutil.rmtree(folder)  # it failed before it began
        (folder / "error.txt").unlink(missing_ok=True)
        isolated(plain)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")
    except Exception as error:
        print(f"failed: {str(error).splitlines()[-1]}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(f"{error}\n")


def isolated(config: Any) -> dict[str, Any]:
    """Run in a process that leaves nothing behind: no seed, no thread count, no W&B run; returns the summary.

    It is forked from a server that has only imported torch, so that a run does not wait for that again.

    Raises:
        RuntimeError: what went wrong there, with its traceback.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    multiprocessing.set_start_method(method, force=True)  # joblib's own workers have one that children do not know
    if method == "forkserver":
        context.set_forkserver_preload(["experiments.training"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(config, sender))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        summary, error = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        summary, error = None, f"its process ended with exit code {process.exitcode}; is there enough memory?"
    except BaseException:
        process.terminate()
        raise
    if error is not None:
        raise RuntimeError(error)
    return summary  # type: ignore[no-any-return]


def _run(config: Any, sender: Connection) -> None:
    from .training import run

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):  # the sweep tells
        try:
            sender.send((run(OmegaConf.create(config)), None))
        except Exception:
            sender.send((None, traceback.format_exc().strip()))


def _end_with_parent() -> None:
    """A run whose sweep was killed must not go on unseen: the sweep may be started again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def resolved(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain containers, without interpolations."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def cell(config: Any) -> dict[str, Any]:
    """All options that a result depends on, but the seed: runs of one cell may be averaged."""
    return {key: value for key, value in flat(config).items() if not aside(key)}


def aside(key: str) -> bool:
    """Whether an option is the seed, or one that a result does not depend on."""
    return key in ASIDE or key.split(".")[0] in ASIDE


def _same(folder: Path, config: Any) -> None:
    """Refuse a folder whose run had other options under the same name: the defaults may have changed since."""
    before, now = cell(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))), cell(config)
    for key in before:
        if before[key] != now.get(key):
            raise ValueError(
                f"{folder} holds a run with {key}={before[key]}, which is {now.get(key)} now; name a new sweep by "
                "sweep=NAME, or delete that folder"
            )


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
