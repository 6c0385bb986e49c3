"""One run in several processes: the data exchanged in a step, the efficiency of two, and an extrapolation to 1,024.

    python scripts/bench_scaling.py                  # the tables
    python scripts/bench_scaling.py --json out.json  # and a record of them

Two processes of one thread each, connected by gloo on this machine, compute the same step as one process of one thread.
Bytes are those that a process passes to `torch.distributed` in one step. The extrapolation is a model with measured
parts: the work of a rank for its own members of a population, the work of every rank for all members (it draws each
direction again and adds it), and messages, whose time is assumed to grow with the logarithm of the number of ranks. The
model's prediction for two processes is printed next to the measurement. The last column is the time if each rank added
only its own directions and the sum, one number for each weight, were exchanged; the last bits of the result would then
depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from bioopt.core.noise import fill_normal_, fill_rademacher_
from experiments.models import cnn, mlp

SHAPE = (1, 28, 28)
# what -> model, whether the ranks share the batch, and the rule
CASES: dict[str, tuple[str, bool, Callable[..., Any]]] = {
    "WeightPerturbation(population=16)": (
        "mlp",
        False,
        lambda m, g: bioopt.WeightPerturbation(m, 1e-6, sigma=1e-2, relative=False, population=16, process_group=g),
    ),
    "WeightPerturbation(population=16, distribution='rademacher')": (
        "mlp",
        False,
        lambda m, g: bioopt.WeightPerturbation(
            m, 1e-6, sigma=1e-2, relative=False, population=16, distribution="rademacher", process_group=g
        ),
    ),
    "SerialPerturbation(coordinates=16)": (
        "mlp",
        False,
        lambda m, g: bioopt.SerialPerturbation(m, 1e-6, sigma=1e-2, relative=False, coordinates=16, process_group=g),
    ),
    "NodePerturbation(samples=16)": (
        "mlp",
        False,
        lambda m, g: bioopt.NodePerturbation(m, 1e-6, sigma=1e-2, relative=False, samples=16, process_group=g),
    ),
    "ForwardGradient(samples=16)": (
        "mlp",
        False,
        lambda m, g: bioopt.ForwardGradient(m, 1e-6, samples=16, space="weights", relative=False, process_group=g),
    ),
    "WeightPerturbation(population=4)": (
        "cnn",
        False,
        lambda m, g: bioopt.WeightPerturbation(m, 1e-6, sigma=1e-2, relative=False, population=4, process_group=g),
    ),
    "Hebbian": ("cnn", True, lambda m, g: bioopt.Hebbian(m, 1e-6, homeostasis=False, process_group=g)),
    "SoftHebb": ("cnn", True, lambda m, g: bioopt.SoftHebb(m, 1e-6, homeostasis=False, process_group=g)),
}
EXTRAPOLATED = ("WeightPerturbation(population=16)", "WeightPerturbation(population=16, distribution='rademacher')")
RANKS = (1, 2, 64, 1024)
POPULATION = 1024


def network(kind: str) -> nn.Module:
    """An MLP of 101,770 weights or a CNN of 83,370."""
    torch.manual_seed(0)
    if kind == "mlp":
        return mlp(SHAPE, 10, hidden=(128,))
    return cnn(SHAPE, 10, width=32, kernel=5).to(memory_format=torch.channels_last)


def measured(
    seconds: float, batch: int, group: dist.ProcessGroup | None, rank: int, ranks: int
) -> dict[str, dict[str, float]]:
    """For each case: median milliseconds per step, and the bytes and messages that this rank sends in one."""
    traffic = {"bytes": 0, "messages": 0}

    def counted(send: Callable[..., Any]) -> Callable[..., Any]:
        def sending(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            traffic["bytes"] += tensor.numel() * tensor.element_size()
            traffic["messages"] += 1
            return send(tensor, *args, **options)

        return sending

    kept = dist.all_reduce, dist.broadcast
    dist.all_reduce, dist.broadcast = counted(kept[0]), counted(kept[1])
    found = {}
    try:
        for name, (kind, shares, make) in CASES.items():
            model = network(kind)
            x, y = torch.randn(batch, *SHAPE), torch.randint(10, (batch,))
            if shares:
                x, y = x[rank::ranks], y[rank::ranks]
            optimizer = make(model, group)

            def closure(model: nn.Module = model, x: Any = x, y: Any = y, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                losses = F.cross_entropy(model(x), y, reduction="none")
                if losses.requires_grad:
                    losses.mean().backward()
                return losses

            for _ in range(3):
                optimizer.step(closure)
            traffic.update(bytes=0, messages=0)
            optimizer.step(closure)
            sent = dict(traffic)
            taken: list[float] = []
            end = time.perf_counter() + seconds
            more = torch.ones(1)
            while more.item():
                begin = time.perf_counter()
                optimizer.step(closure)
                taken.append(1000 * (time.perf_counter() - begin))
                more[0] = time.perf_counter() < end or len(taken) < 5
                if group is not None:
                    kept[1](more, group_src=0)
            found[name] = {"ms": statistics.median(taken), **sent}
    finally:
        dist.all_reduce, dist.broadcast = kept
    return found


def message_ms(size: int, repeats: int = 200) -> float:
    """Median milliseconds of summing this many numbers over the two processes."""
    tensor, taken = torch.zeros(size, dtype=torch.float64), []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken)


def worker(rank: int, ranks: int, folder: str, seconds: float, batch: int) -> None:
    """One of the processes; the first leaves its measurements in the folder."""
    torch.set_num_threads(1)
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        group = dist.group.WORLD
    found: dict[str, Any] = {"steps": measured(seconds, batch, group, rank, ranks)}
    if ranks > 1:
        found["message_ms"] = message_ms(3 * POPULATION + batch)
        found["weights_ms"] = message_ms(sum(p.numel() for p in network("mlp").parameters()))
        dist.destroy_process_group()
    elif rank == 0:
        found["again_ms"] = {name: again_ms(name) for name in EXTRAPOLATED}
    if rank == 0:
        (Path(folder) / f"{ranks}.json").write_text(json.dumps(found))


def again_ms(name: str, repeats: int = 100) -> float:
    """Median milliseconds in which a rank draws one direction of all weights again and adds it to the estimate."""
    fill = fill_rademacher_ if "rademacher" in name else fill_normal_
    params = [p.detach() for p in network(CASES[name][0]).parameters()]
    sums, generator, taken = [torch.zeros_like(p) for p in params], torch.Generator(), []
    for _ in range(repeats):
        begin = time.perf_counter()
        for p, total in zip(params, sums, strict=True):
            total.add_(fill(torch.empty_like(p), generator), alpha=0.1)
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken)


def predicted(step: float, again: float, message: float, population: int, ranks: int, measured_at: int) -> float:
    """Milliseconds of a step of a population split over ranks.

    Args:
        step: milliseconds of one process with a population of ``measured_at``.
        again: of drawing and adding one direction, which every rank does for all of them.
        message: of a message between two ranks.
        population: members.
        ranks: that share it.
        measured_at: the population that ``step`` was measured with.
    """
    own = step / measured_at - again
    return own * math.ceil(population / ranks) + again * population + message * math.log2(ranks)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each case")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[int, dict[str, Any]] = {}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, (ranks, folder, options.seconds, options.batch), nprocs=ranks)
            found[ranks] = json.loads((Path(folder) / f"{ranks}.json").read_text())
    print(f"batch {options.batch}, one thread a process, CPU\n")
    print("| rule | model | bytes a step | messages | ms, 1 process | ms, 2 processes | efficiency |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, (kind, _, _) in CASES.items():
        one, two = (found[ranks]["steps"][name] for ranks in (1, 2))
        print(
            f"| `{name}` | {kind} | {two['bytes']:,.0f} | {two['messages']:.0f} | {one['ms']:.2f} | {two['ms']:.2f} "
            f"| {one['ms'] / two['ms'] / 2:.0%} |"
        )
    message = found[2]["message_ms"]
    print(
        f"\nExtrapolated: MLP of 101,770 weights, population {POPULATION}; a message of "
        f"{3 * POPULATION + options.batch:,} numbers takes {message:.2f} ms between two processes\n"
    )
    print("| distribution | ranks | ms a step | efficiency | drawing again | messages | ms if sums were exchanged |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    extrapolated: dict[str, dict[int, float]] = {}
    sums: dict[str, dict[int, float]] = {}  # each rank adds its own directions, and their sum travels
    for name in EXTRAPOLATED:
        step, again = found[1]["steps"][name]["ms"], found[1]["again_ms"][name]
        extrapolated[name] = {r: predicted(step, again, message, POPULATION, r, 16) for r in RANKS}
        alone, weights = extrapolated[name][1], found[2]["weights_ms"]
        sums[name] = {r: step / 16 * math.ceil(POPULATION / r) + weights * math.log2(r) for r in RANKS}
        for ranks, ms in extrapolated[name].items():
            shown = "rademacher" if "rademacher" in name else "normal"
            print(
                f"| {shown} | {ranks:,} | {ms:,.0f} | {alone / ms / ranks:.0%} | {again * POPULATION / ms:.0%} "
                f"| {message * math.log2(ranks) / ms:.1%} | {sums[name][ranks]:,.0f} |"
            )
        two = predicted(step, again, found[2]["message_ms"], 16, 2, 16)
        measured_two = found[2]["steps"][name]["ms"]
        print(f"\nthe model for two processes and a population of 16: {two:.2f} ms; measured {measured_two:.2f} ms\n")
    if options.json:
        record = {
            "torch": torch.__version__,
            "batch": options.batch,
            **found,
            "extrapolated_ms": extrapolated,
            "sums_ms": sums,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
