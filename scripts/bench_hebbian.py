"""Speed of one plastic step of SoftHebb's three-block network, as ratios within one run.

    python scripts/bench_hebbian.py                  # the table, at batch 10 and 64
    python scripts/bench_hebbian.py --json out.json  # and a record of it

`bioopt.SoftHebb` on the trunk is compared with the trunk's forward pass (a step needs at least 2: a forward pass and
one product of the same size), with its approximation in which only the strongest neurons of an event learn (in all
blocks except the first, where it would not be faster), and with the same formula computed as in the paper's
demonstration: each product is a convolution of the inputs with the activities, with batch and channels exchanged. On a
GPU, where Python's overhead matters for small batches, it is also captured in a CUDA graph. The variants run in turn;
medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from experiments.models import softhebb
from scripts.bench_step import described, take_turns

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


def measure(batch: int, width: float, device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of each step, all taking turns."""
    x = torch.randn(batch, *SHAPE, device=device).to(memory_format=torch.channels_last)
    steps = STEPS | ({"bioopt.SoftHebb, as a CUDA graph": captured} if device.type == "cuda" else {})
    step = {name: make(trunk(width, device), x) for name, make in steps.items()}
    return {name: milliseconds / 1000 for name, milliseconds in take_turns(step, device, seconds).items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[10, 64])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    where = described(device)
    memory = "large blocks kept by malloc" if "MALLOC_MMAP_THRESHOLD_" in os.environ else "malloc as it is"
    print(f"SoftHebb's trunk, width {options.width:g}, {where}, {memory}")
    print(f"the two ways of computing it differ by {agree(options.width, device):.1e} of a step\n")
    print("| batch | step | images/s | × forward pass | × by convolution | × exact |\n|---:|---|---:|---:|---:|---:|")
    rows = []
    for batch in options.batches:
        median = measure(batch, options.width, device, options.seconds)
        for name, value in median.items():
            row = {
                "batch": batch,
                "step": name,
                "images_per_second": batch / value,
                "to_forward": value / median["forward pass"],
                "to_convolution": value / median["by convolution"],
                "to_exact": value / median["bioopt.SoftHebb"],
            }
            rows.append(row)
            print(
                f"| {batch} | {name} | {batch / value:.1f} | {row['to_forward']:.2f} | {row['to_convolution']:.2f} "
                f"| {row['to_exact']:.2f} |",
                flush=True,
            )
    if options.json:
        record = {"device": where, "memory": memory, "torch": torch.__version__, "width": options.width, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
