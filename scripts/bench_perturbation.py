"""The cost of steps with many perturbations, in forward passes and in bf16; memory of a population; torchzero's SPSA.

    python scripts/bench_perturbation.py                  # the tables
    python scripts/bench_perturbation.py --json out.json  # and a record of them

K antithetic pairs need at least 2K forward passes, K noisy copies K + 1. The variants run in turn within one process,
and the medians of their times are compared. Where torchzero is installed (``pip install torchzero``), its SPSA runs
with the same K pairs, model and closure.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from experiments.models import cnn, mlp
from scripts.bench_step import allocated, clock, described, take_turns

SHAPE = (3, 32, 32)
FORWARD = "forward pass"
TORCHZERO = importlib.util.find_spec("torchzero") is not None
Step = Callable[[], object]


def network(kind: str) -> nn.Module:
    """A CNN of 94,570 weights or an MLP of 411,146."""
    torch.manual_seed(0)
    if kind == "cnn":
        return cnn(SHAPE, 10, width=32, kernel=5).to(memory_format=torch.channels_last)
    return mlp(SHAPE, 10, hidden=(128, 128))


def steps(kind: str, batch: int, count: int, device: torch.device, amp: bool = False) -> dict[str, tuple[Step, int]]:
    """One step of each rule, with bf16 autocast or without, and the forward passes that it takes at least."""
    x = torch.randn(batch, *SHAPE, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=device)

    def forward(model: nn.Module) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return F.cross_entropy(model(x), y, reduction="none")

    def step_of(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Step:
        model = network(kind).to(device)
        optimizer: Any = make(model)
        return lambda: optimizer.step(lambda: forward(model))

    model = network(kind).to(device)

    def product() -> object:
        """A forward pass and the local products of all layers, nearly nothing else."""
        return hebbian.step(lambda: forward(watched))

    def inference() -> object:
        with torch.no_grad():
            return forward(model)

    watched = network(kind).to(device)
    hebbian = bioopt.Oja(watched, 1e-6, homeostasis=False, readout=None)
    options: dict[str, Any] = {"sigma": 1e-2, "relative": False}
    found: dict[str, tuple[Step, int]] = {
        FORWARD: (inference, 1),
        "forward pass and local products (Oja)": (product, 1),
        f"WeightPerturbation(population={count})": (
            step_of(lambda m: bioopt.WeightPerturbation(m, 1e-6, population=count, **options)),
            2 * count,
        ),
        f"RankOnePerturbation(samples={count})": (
            step_of(lambda m: bioopt.RankOnePerturbation(m, 1e-6, samples=count, **options)),
            2 * count,
        ),
        f"NodePerturbation(samples={count})": (
            step_of(lambda m: bioopt.NodePerturbation(m, 1e-6, samples=count, **options)),
            count + 1,
        ),
        f"NodePerturbation(samples={count}, distribution='rademacher')": (
            step_of(lambda m: bioopt.NodePerturbation(m, 1e-6, samples=count, distribution="rademacher", **options)),
            count + 1,
        ),
    }
    if kind == "mlp":  # batch norm in training mode has no vmap
        found[f"NodePerturbation(samples={count}, batched=True)"] = (
            step_of(lambda m: bioopt.NodePerturbation(m, 1e-6, samples=count, batched=True, **options)),
            count + 1,
        )
    if not TORCHZERO:
        return found
    import torchzero as tz

    other = network(kind).to(device)
    theirs = tz.Optimizer(other.parameters(), tz.m.SPSA(h=1e-2, n_samples=count), tz.m.LR(1e-6))

    def closure(backward: bool = True) -> torch.Tensor:
        return forward(other).mean()

    found[f"torchzero's SPSA(n_samples={count})"] = (lambda: theirs.step(closure), 2 * count)
    return found


def precisions(kind: str, batch: int, count: int, device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of forward passes and of a step of weight and node perturbation, in fp32 and in bf16."""
    every = {name: steps(kind, batch, count, device, amp=name == "bf16") for name in ("fp32", "bf16")}
    names = [n for n in every["fp32"] if n == FORWARD or n.startswith(("WeightPerturbation", "NodePerturbation"))]
    step = {f"{p}: {name}": every[p][name][0] for name in names for p in every}
    for p in every:  # as many as in a step, of which the first may have to fetch memory from the system
        step[f"{p}: {FORWARD}"] = functools.partial(repeated, every[p][FORWARD][0], 2 * count)
    taken = take_turns(step, device, seconds, clock(device))
    shown = {name: f"{2 * count} {name}es" if name == FORWARD else name for name in names}
    return {shown[name]: {p: taken[f"{p}: {name}"] for p in every} for name in names}


def repeated(step: Step, times: int) -> None:
    """Make several steps."""
    for _ in range(times):
        step()


def pairs_per_second(device: torch.device, population: int, seconds: float) -> dict[str, float]:
    """Of directions on an MLP, a batch of as many samples as there are directions in a step."""
    torch.manual_seed(0)
    shape = (1, 28, 28)
    x, y = torch.randn(population, *shape, device=device), torch.randint(10, (population,), device=device)
    step: dict[str, Step] = {}
    for rule in (bioopt.WeightPerturbation, bioopt.RankOnePerturbation):
        model = mlp(shape, 10, hidden=(128, 128)).to(device)
        count = {"population": population} if rule is bioopt.WeightPerturbation else {"samples": 1}
        optimizer = rule(model, 1e-4, sigma=1e-2, relative=False, **count)  # type: ignore[arg-type]
        step[rule.__name__] = lambda optimizer=optimizer, model=model: optimizer.step(
            lambda: F.cross_entropy(model(x), y, reduction="none")
        )
    taken = take_turns(step, device, seconds, clock(device))
    return {name: 1000 * population / milliseconds for name, milliseconds in taken.items()}


def memory(kind: str, batch: int, population: int) -> dict[str, int]:
    """Bytes at the peak: of inference, and of a step of a whole population, its copy of the weights included."""
    found = {}
    every = steps(kind, batch, population, torch.device("cpu"))
    for name in (FORWARD, f"WeightPerturbation(population={population})"):
        step, _ = every[name]
        step()
        found[name] = allocated(step)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    where = described(device)
    record: dict[str, Any] = {"device": where, "torch": torch.__version__, "batch": options.batch}
    record |= {"steps": {}, "precisions": {}}
    if not TORCHZERO:
        print("torchzero is not installed: no comparison with its SPSA\n")
    for kind in ("cnn", "mlp"):
        every = steps(kind, options.batch, options.count, device)
        taken = take_turns(
            {name: step for name, (step, _) in every.items()}, device, options.seconds / 4, clock(device)
        )
        weights = sum(p.numel() for p in network(kind).parameters())
        print(f"{kind} of {weights:,} weights, batch {options.batch}, {where}\n")
        print("| one step of | ms | × forward pass | of them needed | × needed |\n|---|---:|---:|---:|---:|")
        for name, milliseconds in taken.items():
            passes, needed = milliseconds / taken[FORWARD], every[name][1]
            print(f"| {name} | {milliseconds:.1f} | {passes:.2f} | {needed} | {passes / needed:.2f} |")
        print()
        record["steps"][kind] = taken
        record["precisions"][kind] = both = precisions(kind, options.batch, options.count, device, options.seconds / 4)
        print("| one step of | fp32: ms | bf16 autocast: ms | fp32 / bf16 |\n|---|---:|---:|---:|")
        for name, of in both.items():
            print(f"| {name} | {of['fp32']:.1f} | {of['bf16']:.1f} | {of['fp32'] / of['bf16']:.2f} |")
        print()
    record["pairs_per_second"] = pairs_per_second(device, 64, options.seconds / 4)
    full, rank_one = record["pairs_per_second"].values()
    print("MLP 784-128-128-10, 64 antithetic pairs a step, batch 64:")
    print(f"WeightPerturbation {full:,.0f} pairs/s; RankOnePerturbation {rank_one:,.0f}: {rank_one / full:.1f}×\n")
    if device.type == "cpu":
        copy = sum(p.numel() * p.element_size() for p in network("cnn").parameters())
        record["memory"] = memory("cnn", options.batch, 64)
        inference, population = record["memory"].values()
        print(
            f"memory at the peak, cnn: inference {inference / 2**20:.1f} MiB; population 64: {population / 2**20:.1f} "
            f"MiB, less one copy of the weights {(population - copy) / inference:.2f}×"
        )
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
