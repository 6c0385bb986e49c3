"""Speed of the Hebbian rules, as ratios within one run.

    python scripts/bench_hebbian.py                      # SoftHebb's network, at batch 10 and 64
    python scripts/bench_hebbian.py --table solves       # rules that solve a system of neurons, on a wide MLP
    python scripts/bench_hebbian.py --table homeostasis  # each rule with and without homeostasis, on small networks
    python scripts/bench_hebbian.py --json out.json      # and a record of it

**SoftHebb's network.** `bioopt.SoftHebb` on the trunk is compared with the trunk's forward pass (a step needs at least
2: a forward pass and one product of the same size), with its approximation in which only the strongest neurons of an
event learn (in all blocks except the first, where it would not be faster), and with the same formula computed as in the
paper's demonstration: each product is a convolution of the inputs with the activities, with batch and channels
exchanged. On a GPU, where Python's overhead matters for small batches, it is also captured in a CUDA graph. On a CPU,
forward pass and exact step are also made under bfloat16 autocast, and compared with each other: without a compiler,
and, if there is one, with `bioopt.compile_kernels`.

In all tables the variants run in turn, and medians are compared; with ``--threads 1`` of processor time, which other
processes of a shared machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from bioopt.core.kernels import compiler
from experiments.models import softhebb
from scripts.bench_step import clock, described, take_turns
from scripts.dropin import NETWORKS

Make = Callable[[nn.Sequential, Tensor], Callable[[], object]]
SHAPE = (3, 32, 32)
LR, TEMPERATURE, STRONGEST = 0.01, 0.5, 6


def trunk(width: float, device: torch.device) -> nn.Sequential:
    """The three blocks."""
    torch.manual_seed(0)
    model = softhebb(SHAPE, 10, width=width)
    blocks = nn.Sequential(*model.get_submodule("trunk").children())
    return blocks.to(device, memory_format=torch.channels_last)


def forward(model: nn.Sequential, x: Tensor) -> Callable[[], object]:
    """The trunk's forward pass in training mode, with nothing plastic."""

    def step() -> object:
        with torch.no_grad():
            return model(x)

    return step


def plastic(model: nn.Sequential, x: Tensor, k: int | None = None) -> Callable[[], object]:
    """One step of `bioopt.SoftHebb`."""
    groups = [{"params": model[:1]}, {"params": model[1:], "k": k}]
    optimizer = bioopt.SoftHebb(groups, LR, inverse_temperature=TEMPERATURE, readout=None, homeostasis=False)

    def step() -> object:
        optimizer.zero_grad()
        with torch.no_grad():
            model(x)
        return optimizer.step()

    return step


def approximate(model: nn.Sequential, x: Tensor) -> Callable[[], object]:
    """One step of `bioopt.SoftHebb` in which only the strongest neurons learn."""
    return plastic(model, x, STRONGEST)


def in_half(make: Make, compiled: bool) -> Make:
    """The same under bfloat16 autocast, with compiled kernels or without."""

    def made(model: nn.Sequential, x: Tensor) -> Callable[[], object]:
        step = make(model, x)

        def run() -> object:
            bioopt.compile_kernels(compiled)
            try:
                with torch.autocast("cpu", torch.bfloat16):
                    return step()
            finally:
                bioopt.compile_kernels(False)

        return run

    return made


def captured(model: nn.Sequential, x: Tensor) -> Callable[[], object]:
    """One step of `bioopt.SoftHebb`, replayed as a CUDA graph: the same kernels, without Python between them."""
    step = plastic(model, x)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # plain steps first, as PyTorch asks
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> object:
        graph.replay()
        return step  # and with it the model, whose memory the graph works on

    return replay


def by_convolution(model: nn.Sequential, x: Tensor) -> Callable[[], object]:
    """The same formula with each product as a convolution of inputs with activities."""

    @torch.no_grad()
    def step() -> object:
        seen = x
        for block in model:
            conv = block.conv
            seen = block.norm(seen)
            padded = F.pad(seen, conv._reversed_padding_repeated_twice, mode="reflect")
            u = F.conv2d(padded, conv.weight)
            y = torch.softmax(TEMPERATURE * u, 1)
            best, winner = y.max(1, keepdim=True)
            y = (-y).scatter_(1, winner, best)
            product = F.conv2d(padded.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)
            change = product - (y * u).sum((0, 2, 3)).view(-1, 1, 1, 1) * conv.weight
            change /= change.abs().max() + 1e-30
            pace = (conv.weight.flatten(1).norm(dim=1) - 1).abs().sqrt()
            conv.weight += LR * pace.view(-1, 1, 1, 1) * change
            seen = block[2:](u)
        return seen

    return step


STEPS = {
    "forward pass": forward,
    "bioopt.SoftHebb": plastic,
    f"bioopt.SoftHebb, k={STRONGEST}": approximate,
    "by convolution": by_convolution,
}
HALF = {"forward pass, bf16": in_half(forward, False), "bioopt.SoftHebb, bf16": in_half(plastic, False)}
COMPILED = {
    "forward pass, bf16, compiled": in_half(forward, True),
    "bioopt.SoftHebb, bf16, compiled": in_half(plastic, True),
}
SOLVES = {"Oja": bioopt.Oja, "Hebbian": bioopt.Hebbian, "Sanger": bioopt.Sanger, "AntiHebbian": bioopt.AntiHebbian}
REGULATED = {**SOLVES, "SoftHebb": bioopt.SoftHebb, "KrotovHopfield": bioopt.KrotovHopfield, "BCM": bioopt.BCM}


def agree(width: float, device: torch.device) -> float:
    """The largest difference between the weights after one step of both, by their largest change."""
    x = torch.randn(4, *SHAPE, device=device).to(memory_format=torch.channels_last)
    before, one, two = (trunk(width, device) for _ in range(3))
    plastic(one, x)()
    by_convolution(two, x)()
    return max(
        ((a - b).abs().max() / (a - c).abs().max()).item()
        for a, b, c in zip(one.parameters(), two.parameters(), before.parameters(), strict=True)
    )


def measure(batch: int, width: float, device: torch.device, seconds: float, compiled: bool) -> dict[str, float]:
    """Median seconds of each step, all taking turns."""
    x = torch.randn(batch, *SHAPE, device=device).to(memory_format=torch.channels_last)
    steps = STEPS | ({"bioopt.SoftHebb, as a CUDA graph": captured} if device.type == "cuda" else HALF)
    if device.type == "cpu" and compiled:
        steps = steps | COMPILED
    step = {name: make(trunk(width, device), x) for name, make in steps.items()}
    return {
        name: milliseconds / 1000 for name, milliseconds in take_turns(step, device, seconds, clock(device)).items()
    }


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], object]:
    """One step of ``optimizer`` in a plain loop."""

    def step() -> object:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def solves(neurons: int, batch: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Rules whose published formula has a matrix or a system of neurons: milliseconds, and the ratio to SGD."""
    x, y = torch.randn(batch, 784, device=device), torch.randint(10, (batch,), device=device)

    def mlp() -> nn.Sequential:
        torch.manual_seed(0)
        hidden = [nn.Linear(784, neurons), nn.ReLU(), nn.Linear(neurons, neurons), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(neurons, 10)).to(device)

    steps = {"SGD": trained(model := mlp(), torch.optim.SGD(model.parameters(), 1e-3), x, y)}
    for name, rule in SOLVES.items():
        steps[name] = trained(model := mlp(), rule(model, 1e-3, homeostasis=False), x, y)
    times = take_turns(steps, device, seconds, clock(device))
    return [{"rule": name, "ms": ms, "to_sgd": ms / times["SGD"]} for name, ms in times.items()]


def regulated(network: str, batch: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Rules on a network of `scripts/dropin.py`: milliseconds without homeostasis, and the ratio with it to that."""
    x = F.interpolate(torch.rand(batch, 1, 7, 7, device=device), (28, 28), mode="bilinear")  # neighbours are alike
    y = torch.randint(10, (batch,), device=device)
    steps = {}
    for name, rule in REGULATED.items():
        for kind, options in {
            "without": {"lr": 1e-3, "homeostasis": False},
            "with": {},
            "alone": {"inhibition": 0.0},
        }.items():
            torch.manual_seed(0)
            model = NETWORKS[network](1, 28).to(device)
            steps[f"{name} {kind}"] = step = trained(model, rule(model, **options), x, y)
            for _ in range(12):  # until rules act
                step()
    times = take_turns(steps, device, seconds, clock(device))
    return [
        {
            "network": network,
            "rule": name,
            "ms": (without := times[f"{name} without"]),
            "ratio": times[f"{name} with"] / without,
            "ratio_without_inhibition": times[f"{name} alone"] / without,
        }
        for name in REGULATED
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=["softhebb", "solves", "homeostasis"], default="softhebb")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 10 and 64; 256; 64")
    parser.add_argument("--width", type=float, default=1.0, help="of SoftHebb's network")
    parser.add_argument("--neurons", type=int, default=1024, help="of each layer of the MLP")
    parser.add_argument("--networks", nargs="+", default=["mlp", "cnn", "vgg_bn"], help="of scripts/dropin.py")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="without compiled kernels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = described(device)
    memory = "large blocks kept by malloc" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "malloc as it is"
    if options.table == "softhebb":
        rows = softhebb_table(options, device, f"{where}, {memory}")
    elif options.table == "solves":
        print(f"MLP 784-{options.neurons}-{options.neurons}-10, {where}, {memory}\n")
        print("| batch | rule | ms | × SGD |\n|---:|---|---:|---:|")
        rows = []
        for batch in options.batches or [256]:
            for row in solves(options.neurons, batch, device, options.seconds):
                rows.append({"batch": batch, **row})
                print(f"| {batch} | {row['rule']} | {row['ms']:.1f} | {row['to_sgd']:.2f} |", flush=True)
    else:
        print(f"networks of scripts/dropin.py, {where}, {memory}\n")
        print("| network | batch | rule | ms without | × with homeostasis | × and no inhibition |")
        print("|---|---:|---|---:|---:|---:|")
        rows = []
        for network in options.networks:
            for batch in options.batches or [64]:
                for row in regulated(network, batch, device, options.seconds):
                    rows.append({"batch": batch, **row})
                    print(
                        f"| {network} | {batch} | {row['rule']} | {row['ms']:.2f} | {row['ratio']:.2f} "
                        f"| {row['ratio_without_inhibition']:.2f} |",
                        flush=True,
                    )
    if options.json:
        record = {"device": where, "memory": memory, "torch": torch.__version__, "width": options.width, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def softhebb_table(options: argparse.Namespace, device: torch.device, where: str) -> list[dict[str, Any]]:
    """Print the table of SoftHebb's network; return its rows."""
    compiled = compiler() is not None and not options.no_compile
    print(f"SoftHebb's trunk, width {options.width:g}, {where}")
    print(f"the two ways of computing it differ by {agree(options.width, device):.1e} of a step\n")
    print("| batch | step | images/s | × forward pass | × by convolution | × exact |\n|---:|---|---:|---:|---:|---:|")
    rows: list[dict[str, Any]] = []
    for batch in options.batches or [10, 64]:
        median = measure(batch, options.width, device, options.seconds, compiled)
        for name, value in median.items():
            half = name.startswith("bioopt.SoftHebb, bf16")  # compared with the forward pass of the same precision
            forward_pass = median[name.replace("bioopt.SoftHebb", "forward pass") if half else "forward pass"]
            row = {
                "batch": batch,
                "step": name,
                "images_per_second": batch / value,
                "to_forward": value / forward_pass,
                "to_convolution": value / median["by convolution"],
                "to_exact": value / median["bioopt.SoftHebb"],
            }
            rows.append(row)
            print(
                f"| {batch} | {name} | {batch / value:.1f} | {row['to_forward']:.2f} | {row['to_convolution']:.2f} "
                f"| {row['to_exact']:.2f} |",
                flush=True,
            )
        for name in (name for name in median if name.startswith("bioopt.SoftHebb, bf16")):
            print(f"{name}: {median['bioopt.SoftHebb'] / median[name]:.2f} × as fast as in fp32 at batch {batch}")
    return rows


if __name__ == "__main__":
    main()
