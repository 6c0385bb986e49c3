"""Time and memory of one step of every optimizer, as ratios to SGD with backpropagation and to one forward pass.

All train the same CNN; rules that need a network of their own (spiking, RBM) are left out.

    python scripts/bench_step.py                  # the table
    python scripts/bench_step.py --json out.json  # and a record of it

The optimizers run in turn within one process, and the medians of their times are compared, so that a noisy machine
affects all equally. Memory is measured in a new process for each: the peak of a step, above the model and the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.building import build_optimizer
from experiments.models import cnn

CONF = Path(__file__).parent.parent / "conf"
FORWARD = "forward pass"
# One antithetic pair, one noisy pass, one weight: the units of a step.
ONE = {
    "node_perturbation": "samples",
    "rank_one_perturbation": "samples",
    "serial_perturbation": "coordinates",
    "weight_perturbation": "population",
}
IN_TIME = ("eprop",)  # without time steps it is another rule
SHAPE = (1, 28, 28)


def names() -> list[str]:
    """The forward pass, the controls, then every rule that trains this network: some need one of their own."""
    options = {p.stem: OmegaConf.load(p) for p in sorted((CONF / "optimizer").glob("*.yaml"))}
    found = [name for name, own in options.items() if "requires" not in own and name not in IN_TIME]
    controls = ["sgd", "adam", "random_trunk"]
    return [FORWARD, *controls, *[n for n in found if n not in controls]]


def build(name: str, device: torch.device, batch: int, width: int, *, lean: bool = False) -> Callable[[], object]:
    """One step of an optimizer on a network of its own; ``lean`` takes the momentum away."""
    torch.manual_seed(0)
    model = cnn(SHAPE, 10, width=width, kernel=5).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, *SHAPE, device=device)
    y = torch.randint(10, (batch,), device=device)
    if name == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return F.cross_entropy(model(x), y)

        return forward
    overrides = [f"optimizer={name}"]
    if name in ONE:
        overrides.append(f"optimizer.{ONE[name]}=1")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides)
    if lean and "momentum" in config.optimizer:
        config.optimizer.momentum = 0.0
    optimizer = build_optimizer(config, model)

    def closure() -> torch.Tensor:
        optimizer.target = y  # which some rules need
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        if losses.requires_grad:
            losses.mean().backward()
        return losses

    return lambda: optimizer.step(closure)


def times(device: torch.device, batch: int, width: int, seconds: float) -> dict[str, float]:
    """Median milliseconds a step, all taking turns."""
    step = {name: build(name, device, batch, width) for name in names()}
    return take_turns(step, device, seconds)


def take_turns(
    step: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each function, by ``clock``."""
    taken: dict[str, list[float]] = {name: [] for name in step}
    for function in step.values():
        for _ in range(3):
            function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(len(values) for values in taken.values()) < 5:
        for name, function in step.items():
            synchronize(device)
            begin = clock()
            function()
            synchronize(device)
            taken[name].append(1000 * (clock() - begin))
    return {name: statistics.median(values) for name, values in taken.items()}


def clock(device: torch.device) -> Callable[[], float]:
    """Of processor time, where that of one thread is all."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def described(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak(name: str, device: torch.device, batch: int, width: int) -> int:
    """Bytes a step needs at its peak, above what stays allocated between steps."""
    function = build(name, device, batch, width, lean=True)
    for _ in range(2):
        function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    return allocated(function)


def allocated(function: Callable[[], object]) -> int:
    """Bytes that a call holds at its peak on the CPU, above what was allocated before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # The allocator's own account: every allocation and release, in order.
    held = highest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.peak:
        print(peak(options.peak, device, options.batch, options.width))
        return

    milliseconds = times(device, options.batch, options.width, options.seconds)
    memory = {}
    for name in milliseconds:
        arguments = [
            "--peak",
            name,
            "--batch",
            str(options.batch),
            "--width",
            str(options.width),
            "--device",
            str(device),
        ]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
        memory[name] = int(done.stdout.split()[-1])
    weights = sum(p.numel() * p.element_size() for p in cnn(SHAPE, 10, width=options.width, kernel=5).parameters())
    where = described(device)
    print(f"CNN of {weights / 4:,.0f} weights ({weights / 2**20:.2f} MiB), batch {options.batch}, {where}\n")
    print("| one step of | ms | × SGD step | × forward pass | peak memory, MiB | × forward pass |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = []
    for name, value in milliseconds.items():
        row = {
            "name": name,
            "ms": value,
            "to_sgd": value / milliseconds["sgd"],
            "to_forward": value / milliseconds[FORWARD],
            "peak_bytes": memory[name],
            "peak_to_forward": memory[name] / memory[FORWARD],
        }
        rows.append(row)
        print(
            f"| {name} | {value:.1f} | {row['to_sgd']:.2f} | {row['to_forward']:.2f} | {memory[name] / 2**20:.2f} "
            f"| {row['peak_to_forward']:.2f} |"
        )
    if options.json:
        record = {
            "device": where,
            "torch": torch.__version__,
            "batch": options.batch,
            "weights_bytes": weights,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
