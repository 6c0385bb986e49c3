"""Configurations and commands as a user types them, each command in a process of its own.

It is forked from a server that has only imported what `train.py` does: seconds of imports are paid once. What is about
a fresh process (what it imports) starts one by `fresh`.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.util
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image

from experiments import pictures, receptive_fields

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["experiments.run", "experiments.report", "sklearn.datasets", "sklearn.model_selection"])


OPTIMIZERS = sorted(p.stem for p in (ROOT / "conf/optimizer").glob("*.yaml"))
# A network so small that every optimizer takes a step in no time.
TINY = ["model=cnn", "model.width=2", "model.kernel=3", "logger.mode=disabled", "epochs=1", "batch_size=256"]
SOFTHEBB = ["model=softhebb", "model.width=0.03", "batch_size=256", "readout.batch_size=64", "logger.mode=disabled"]
SPIKING = ["model=spiking", "model.neurons=20", "model.steps=3"]


def tiny(optimizer: str) -> list[str]:
    """The least of a run, with few of the evaluations that some optimizers make in a step."""
    few = {
        "node_perturbation": "samples",
        "rank_one_perturbation": "samples",
        "serial_perturbation": "coordinates",
        "weight_perturbation": "population",
    }
    own = {  # rules for networks of their own
        "contrastive_divergence": ["model=rbm", "model.hidden=[8]"],
        "eprop": ["model=recurrent", "model.hidden=8"],
        "reward_stdp": [*SPIKING, "model.readout=groups"],
        "stdp": SPIKING,
    }
    common = [*own[optimizer], *(o for o in TINY if not o.startswith("model"))] if optimizer in own else TINY
    return [f"optimizer={optimizer}", *common, *([f"optimizer.{few[optimizer]}=1"] if optimizer in few else [])]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def made_task(chosen: DictConfig) -> Any:
    """The task of a configuration, on the CPU."""
    options = {key: value for key, value in chosen.task.items() if key != "name"}
    return instantiate(options, _partial_=True, _convert_="all")(chosen, torch.device("cpu"))


def inspected(record: Path, home: Path) -> str:
    """What an offline W&B run holds, in lines of JSON."""
    shown = subprocess.run(
        [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(record)],
        capture_output=True, text=True, timeout=120, cwd=home, env={**os.environ, "HOME": str(home)},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def undraw(put: Callable[[object, str, object], None] = setattr) -> None:
    """Without the pictures that every run has: most of its time, where it is tiny and nobody looks at them."""
    for place, name in ((pictures, "curves"), (pictures, "neurons"), (receptive_fields, "before_and_after")):
        put(place, name, lambda *drawn: drawn[-1])


def unrender(put: Callable[[object, str, object], None] = setattr) -> None:
    """Pictures are made of all that they show, but no pixel is: two thirds of their time."""
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "PNG")
    put(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(pixel.getvalue()))


class Begun(NamedTuple):
    """A command under way, and the folder that holds what it says."""

    process: BaseProcess
    said: Path


def fresh(name: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of the repository in a fresh process."""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def script(name: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of the repository."""
    return ended(begun(name, *arguments, cwd=cwd, **environment))


def train(*overrides: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return script("train.py", *overrides, cwd=cwd, **environment)


def started(*overrides: str, cwd: Path, until: str) -> Begun:
    """`train.py`, under way: a file of this pattern has appeared."""
    command = begun("train.py", *overrides, cwd=cwd)
    appears(cwd, until, command)
    return command


def appears(folder: Path, pattern: str, command: Begun) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)) and command.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)


def begun(name: str, *arguments: str, cwd: Path, **environment: str) -> Begun:
    said = Path(tempfile.mkdtemp(prefix="said-", dir=cwd.parent))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = SERVER.Process(target=_perform, args=([str(ROOT / name), *arguments], str(cwd), environment, said))
    process.start()
    return Begun(process, said)


def ended(command: Begun) -> subprocess.CompletedProcess[str]:
    command.process.join(300)
    code = command.process.exitcode
    assert code is not None, "it takes too long"
    return subprocess.CompletedProcess([], code, *((command.said / name).read_text() for name in ("out", "err")))


def torchrun(name: str, *arguments: str, ranks: int, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script of the repository under `torchrun --standalone`, whose ranks are forked from it."""
    return ended(begun(name, *arguments, cwd=cwd, TORCHRUN_RANKS=str(ranks)))


def spread(*options: str, cwd: Path, other: Sequence[str] = ()) -> list[Begun]:
    """`train.py` on two ranks, told of each other as torchrun tells them; the second may have other options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = {"0": options, "1": [*options, *other]}
    return [begun("train.py", *own, cwd=cwd, **world, RANK=rank, LOCAL_RANK=rank) for rank, own in each.items()]


def _perform(command: list[str], cwd: str, environment: dict[str, str], said: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    multiprocessing.util.spawnv_passfds = _forked
    if {"logger.mode=offline", "logger.mode=auto"} & {*command}:  # whose W&B takes them
        unrender()
    else:
        undraw()
    if ranks := os.environ.pop("TORCHRUN_RANKS", None):
        from torch.distributed import run
        from torch.distributed.launcher import elastic_launch

        alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=alone"]  # as --standalone does
        options = [*alone, f"--nproc-per-node={ranks}", "--start-method=fork", command[0]]
        elastic_launch(run.config_from_args(run.parse_args(options))[0], _script)(command)
    else:
        _script(command)


def _script(command: list[str]) -> None:
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _forked(path: bytes, arguments: list[str], kept: Sequence[int]) -> int:
    """In place of a fresh `python -c`, by which a sweep starts the server of its runs: all that it imports is here."""
    if child := os.fork():
        return child
    for descriptor in set(range(3, 256)) - set(kept):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    try:
        exec(arguments[-1])
    finally:
        os._exit(0)
