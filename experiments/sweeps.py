"""Many runs from one command, ``python train.py -m seed=0,1,2 ...``: each in a process and a folder of its own.

A sweep's runs are in ``runs/<sweep>``, or ``runs/<date>`` where it has no name, each named by its options. The folder
has the sweep's options in ``sweep.yaml``, by which the same command resumes it.
This module is loaded before a run is chosen, so it must not import torch.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import threading
import traceback
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from . import interrupts
from .checks import check_inside_runs
from .config import is_result_independent, name_of, read, resolved, run_group
from .files import alone, write_whole
from .options import check

OPTIONS = "sweep.yaml"
DATED = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d+)?$"  # folders of sweeps without a name
_locks = contextlib.ExitStack()  # of the sweep under way; not in `Sweep`, which launchers send to other processes


class Sweep(Callback):
    """Names a sweep before its first run; after the last, writes the report and names the runs that failed."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Find the folder of the same options if the sweep has no name, or make one; seeds can be added later."""
        if "WORLD_SIZE" in os.environ:
            sys.exit("error: a sweep does not run under torchrun; start its runs one by one there, without -m")
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        options = sorted(str(o.input_line) for o in overrides if not is_result_independent(o.key_or_group))
        if config.sweep is not None:
            try:
                check_inside_runs("sweep", config.sweep)
            except ValueError as error:
                sys.exit(f"error: {error}")
        else:
            config.sweep = folder_of(options)
            config.hydra.overrides.task.append(f"sweep='{config.sweep}'")  # for each run to know
        left_out = config.hydra.job.config.override_dirname.exclude_keys
        several = {o.key_or_group for o in overrides if o.is_sweep_override()}
        if "run_dir" in {o.key_or_group for o in overrides}:
            sys.exit("error: run_dir has no place in a sweep, whose runs are in runs/<sweep>; name it by sweep=NAME")
        if several & {*left_out}:  # what its runs differ in must be in their names
            kept = ",".join(key for key in left_out if key not in several)
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{kept}]")
        interrupts.resume_with(shlex.join(["python", "train.py", *sys.argv[1:]]))
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _locks.enter_context(
                alone(folder, f"{folder} is in use by another sweep; wait until it ends, or choose sweep=NAME")
            )
        except ValueError as error:
            sys.exit(f"error: {error}")
        write_whole(folder / OPTIONS, OmegaConf.to_yaml(OmegaConf.create({"options": options})))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print a table, and write ``report.html`` beside the runs."""
        interrupts.check()
        from .finished import NothingToReport
        from .report import report

        folder = Path(config.hydra.sweep.dir)
        try:
            print(report([folder], folder))
        except NothingToReport as nothing:
            print(nothing)
        _locks.close()
        failed = list(folder.glob("*/error.txt"))
        if failed:
            sys.exit(f"error: {len(failed)} of the runs in {folder} failed, see above and error.txt in each")


def folder_of(options: list[str]) -> str:
    """The name of the folder in ``runs`` of the sweep with these options, the seed aside; if there is none, the date.

    A sweep that was named has a name of its own, and is not found by its options.
    """
    runs = Path("runs")
    for path in sorted(runs.glob(f"*/{OPTIONS}"), reverse=True):
        with contextlib.suppress(YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError):
            found = OmegaConf.load(path)
            if re.match(DATED, path.parent.name) and OmegaConf.to_container(found) == {"options": options}:
                return path.parent.name
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    names = itertools.chain([now], (f"{now}-{n}" for n in itertools.count(2)))
    return next(name for name in names if not (runs / name).exists())


def run_one(config: DictConfig) -> None:
    """One run of a sweep: skipped if it has finished, resumed if it was interrupted; an error goes to ``error.txt``."""
    job = HydraConfig.get().job
    left_out = job.config.override_dirname.exclude_keys
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    named = [o for o in overrides if not {o.key_or_group, o.key_or_group.partition(".")[0]} & {*left_out}]
    typed = [str(o.input_line) for o in named]
    # Without one that was typed, the name of what learns, so that a folder is never named by a seed alone.
    chosen = any(o.key_or_group == "optimizer" for o in overrides)
    task = config.task.name if config.task is not None else None
    name = name_of(typed if chosen else [f"optimizer={task or config.optimizer.name}", *typed])
    folder = Path(HydraConfig.get().sweep.dir) / name
    refused = folder.with_name(f"{name}-refused")
    shutil.rmtree(refused, ignore_errors=True)  # of an earlier command
    plain = resolved(config) | {"run_dir": str(folder)}
    print(f"\n[{job.num + 1}] {name}", flush=True)
    try:
        check(config)
        if config.resume is not None:
            raise ValueError(f"resume={config.resume}: a sweep resumes its interrupted runs without this option")
        if any((folder / name).exists() for name in ("checkpoint.pt", "summary.json")):
            _same(folder, plain)
            (folder / "error.txt").unlink(missing_ok=True)
            if (folder / "summary.json").exists():
                print("finished before", flush=True)
                return
            plain["resume"] = str(folder)
        elif folder.exists():
            shutil.rmtree(folder)  # it has no checkpoint yet
        isolated(plain)
    except Exception as error:
        text = str(error) if isinstance(error, RuntimeError) else " ".join(str(error).split())  # which has a traceback
        print(f"failed: {text.splitlines()[-1]}", flush=True)
        if isinstance(error, _Refused):  # the run that is there stays as it is
            folder = refused
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            OmegaConf.save(OmegaConf.create(plain), folder / "config.yaml")  # by which the report finds it
        (folder / "error.txt").write_text(f"{text}\n")


class _Refused(ValueError):
    """A folder has a run of other options already."""


def isolated(config: Any) -> dict[str, Any]:
    """Run in a process of its own, which keeps seed, thread count and W&B run from other runs; returns the summary.

    It is forked from a server that has imported torch already, which takes seconds.

    Raises:
        RuntimeError: with the traceback of the error there.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    multiprocessing.set_start_method(method, force=True)  # joblib's workers have one that is unknown in children
    if method == "forkserver":
        context.set_forkserver_preload(["experiments.run"])
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
        process.terminate()  # which closes its W&B run
        process.join(60)
        process.kill()
        raise
    if error is not None:
        raise RuntimeError(error)
    return summary  # type: ignore[no-any-return]


def _run(config: Any, sender: Connection) -> None:
    from .run import run

    interrupts.catch()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        try:
            sender.send((run(OmegaConf.create(config)), None))
        except Exception as error:
            last = "".join(traceback.format_exception_only(error)).strip()
            trace = traceback.format_exc().strip().removesuffix(last)
            sender.send((None, trace + " ".join(last.split())))
    except KeyboardInterrupt:  # the sweep prints it
        sys.exit(interrupts.exit_code())


def _end_with_parent() -> None:
    """End a run whose sweep was killed: the sweep may be started again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _same(folder: Path, config: Any) -> None:
    """Refuse a folder whose run had other options under the same name, as defaults may have changed."""
    try:
        before, now = run_group(OmegaConf.to_container(read(folder))), run_group(config)
    except ValueError as error:
        raise _Refused(f"{error}; delete that folder to make the run again from its start") from None
    for key in before:
        if key == "amp" and now.get(key) == "auto":  # a run has what its machine chose, and keeps it
            continue
        if before[key] != now.get(key):
            raise _Refused(
                f"{folder} holds a run with {key}={before[key]}, which is {now.get(key)} now; name a new sweep by "
                "sweep=NAME, or delete that folder"
            )
