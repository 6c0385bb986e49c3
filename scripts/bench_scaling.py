"""One run in several processes: the data exchanged in a step, the work of each, and an extrapolation to 1,024.

    python scripts/bench_scaling.py                  # the tables
    python scripts/bench_scaling.py --json out.json  # and a record of them

Processes of one thread each, connected by gloo on this machine, compute the same step as one process of one thread.
Bytes are those that a process passes to `torch.distributed` in one step. Steps are measured in processor time, which
does not depend on what else the machine does. The efficiency of n processes is the time of one over n times that of a
rank; it leaves out the waiting for messages.

The extrapolation adds it. The work of a rank with m members of a population is measured at m = 1 and 16, and linear in
m. A message is measured between the fewest processes, in elapsed time, and assumed to take that time once for each
doubling of the number of ranks. The last columns are the same population if losses alone were exchanged, so that every
rank drew every direction again; the time to draw and add one is measured. Both are compared with real steps of several
processes.
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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import bioopt
from bioopt.perturbation import base
from experiments.models import cnn, mlp

SHAPE = (1, 28, 28)
Case = tuple[str, bool, Callable[..., Any]]  # model, whether the ranks share the batch, and the rule
MEMBERS, POPULATION = 16, 1024  # as measured, and as extrapolated
RANKS = (1, 2, 64, 1024)


def weights(kind: str, population: int = MEMBERS, distribution: str = "normal") -> Case:
    """The case of a population of directions of weights."""
    options: dict[str, Any] = {"population": population, "distribution": distribution}
    return (
        kind,
        False,
        lambda m, g: bioopt.WeightPerturbation(m, 1e-6, sigma=1e-2, relative=False, process_group=g, **options),
    )


EXTRAPOLATED = {
    "mlp, normal": ("mlp", "normal"),
    "mlp, rademacher": ("mlp", "rademacher"),
    "cnn, normal": ("cnn", "normal"),
}
CASES: dict[str, Case] = {
    **{f"WeightPerturbation, {name}": weights(k, MEMBERS, d) for name, (k, d) in EXTRAPOLATED.items()},
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
    "Hebbian": ("cnn", True, lambda m, g: bioopt.Hebbian(m, 1e-6, homeostasis=False, process_group=g)),
    "SoftHebb": ("cnn", True, lambda m, g: bioopt.SoftHebb(m, 1e-6, homeostasis=False, process_group=g)),
}
# Further ones of one process, and of several that exchange losses alone.
FEWEST = {name: weights(k, 1, d) for name, (k, d) in EXTRAPOLATED.items()}
LOSSES_ALONE = {name: CASES[f"WeightPerturbation, {name}"] for name in EXTRAPOLATED}


def network(kind: str) -> nn.Module:
    """An MLP of 101,770 weights or a CNN of 83,370."""
    torch.manual_seed(0)
    if kind == "mlp":
        return mlp(SHAPE, 10, hidden=(128,))
    return cnn(SHAPE, 10, width=32, kernel=5).to(memory_format=torch.channels_last)


def measured(
    cases: dict[str, Case], seconds: float, batch: int, group: dist.ProcessGroup | None, rank: int, ranks: int
) -> dict[str, dict[str, float]]:
    """For each case: least milliseconds of processor time of a step; the bytes and messages that this rank sends."""
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
        for name, (kind, shares, make) in cases.items():
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

            optimizer.step(closure)
            traffic.update(bytes=0, messages=0)
            optimizer.step(closure)
            sent = dict(traffic)
            taken: list[float] = []
            end = time.perf_counter() + seconds
            more = torch.ones(1)
            while more.item():
                begin = time.process_time()
                optimizer.step(closure)
                taken.append(1000 * (time.process_time() - begin))
                more[0] = time.perf_counter() < end or len(taken) < 3
                if group is not None:
                    kept[1](more, group_src=0)
            found[name] = {"ms": min(taken), **sent}
    finally:
        dist.all_reduce, dist.broadcast = kept
    return found


def message_ms(tensors: list[torch.Tensor], repeats: int = 200) -> float:
    """Median milliseconds of summing these tensors over the processes as a rule does, in elapsed time."""
    rule, taken = bioopt.WeightPerturbation(nn.Linear(1, 1), process_group=dist.group.WORLD), []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        rule._sum_over_ranks(tensors)
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken)


def again_ms(kind: str, distribution: str, repeats: int = 100) -> float:
    """Least milliseconds to draw one direction of all weights and add it, as `WeightPerturbation` does."""
    params = [p.detach() for p in network(kind).parameters()]
    sums, generator, taken = [torch.zeros_like(p) for p in params], torch.Generator(), []
    for _ in range(repeats):
        begin = time.process_time()
        for p, total in zip(params, sums, strict=True):
            z = base.FILL[distribution](torch.empty_like(p), generator)
            moved = z.mul_(0.1).add_(p).neg_()
            total.add_(moved.add_(torch.add(moved, p, alpha=2)), alpha=0.1)
        taken.append(1000 * (time.process_time() - begin))
    return min(taken)


def worker(rank: int, ranks: int, folder: str, seconds: float, batch: int) -> None:
    """One of the processes; the first leaves its measurements in the folder."""
    torch.set_num_threads(1)
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        group = dist.group.WORLD
    found: dict[str, Any] = {"steps": measured(CASES, seconds, batch, group, rank, ranks)}
    if ranks > 1:
        base.SUMS_FROM = POPULATION
        found["losses_alone"] = measured(LOSSES_ALONE, seconds, batch, group, rank, ranks)
        all_losses = [torch.zeros(3 * POPULATION, dtype=torch.float64), torch.zeros(batch)]
        found["losses_ms"] = message_ms(all_losses)
        sums = {kind: [torch.zeros_like(p) for p in network(kind).parameters()] for kind in ("mlp", "cnn")}
        found["sums_ms"] = {kind: message_ms([*parts, torch.zeros(batch)]) for kind, parts in sums.items()}
        dist.destroy_process_group()
    elif rank == 0:
        found["fewest"] = measured(FEWEST, seconds, batch, group, rank, ranks)
        found["again_ms"] = {name: again_ms(*of) for name, of in EXTRAPOLATED.items()}
    if rank == 0:
        (Path(folder) / f"{ranks}.json").write_text(json.dumps(found))


class Model(NamedTuple):
    """The time of a step whose population is split over ranks, in milliseconds.

    Attributes:
        fixed: of a rank, for any number of members.
        member: for each of its own members.
        again: to draw and add the direction of a member of another rank.
        sums: a message of the size of the weights, between two ranks.
        losses: a message of all losses, between two ranks.
        buffers: the number of messages with statistics of batch norm, which take as long as losses.
    """

    fixed: float
    member: float
    again: float
    sums: float
    losses: float
    buffers: int

    def work(self, population: int, ranks: int, *, again: bool = False) -> float:
        """The work of a rank; with ``again`` it draws the directions of all."""
        own = math.ceil(population / ranks)
        return self.fixed + self.member * own + (self.again * (population - own) if again else 0.0)

    def step(self, population: int, ranks: int, *, again: bool = False) -> float:
        """The work of a rank and the messages."""
        messages = (self.losses if again else self.sums) + self.buffers * self.losses
        return self.work(population, ranks, again=again) + messages * math.log2(ranks)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="to run, besides one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[int, dict[str, Any]] = {}
    for ranks in (1, *options.processes):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, (ranks, folder, options.seconds, options.batch), nprocs=ranks)
            found[ranks] = json.loads((Path(folder) / f"{ranks}.json").read_text())
    print(f"batch {options.batch}, one thread a process, CPU; milliseconds of processor time of one process\n")
    print("| rule | model | processes | bytes a step | messages | ms, alone | ms, a rank | efficiency |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name, (kind, _, _) in CASES.items():
        for ranks in options.processes:
            one, many = (found[n]["steps"][name] for n in (1, ranks))
            print(
                f"| `{name}` | {kind} | {ranks} | {many['bytes']:,.0f} | {many['messages']:.0f} | {one['ms']:.1f} "
                f"| {many['ms']:.1f} | {one['ms'] / many['ms'] / ranks:.0%} |"
            )
    models = {name: modelled(name, found, options.processes[0]) for name in EXTRAPOLATED}
    print(f"\nThe model and {MEMBERS} members, milliseconds of processor time of a rank, without messages\n")
    print("| model | processes | sums: modelled | measured | losses alone: modelled | measured |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, model in models.items():
        for ranks in options.processes:
            sums, alone = found[ranks]["steps"][f"WeightPerturbation, {name}"], found[ranks]["losses_alone"][name]
            print(
                f"| {name} | {ranks} | {model.work(MEMBERS, ranks):.1f} | {sums['ms']:.1f} "
                f"| {model.work(MEMBERS, ranks, again=True):.1f} | {alone['ms']:.1f} |"
            )
    print("\nMessages, elapsed milliseconds\n\n| processes | sums, mlp | sums, cnn | losses |\n|---:|---:|---:|---:|")
    for ranks in options.processes:
        sent = found[ranks]
        print(f"| {ranks} | {sent['sums_ms']['mlp']:.2f} | {sent['sums_ms']['cnn']:.2f} | {sent['losses_ms']:.2f} |")
    print(f"\nExtrapolated to a population of {POPULATION:,}\n")
    print("| model | ranks | ms a step | efficiency | messages | ms, losses alone | efficiency |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    extrapolated: dict[str, dict[int, dict[str, float]]] = {}
    for name, model in models.items():
        extrapolated[name] = {
            n: {"sums": model.step(POPULATION, n), "losses": model.step(POPULATION, n, again=True)} for n in RANKS
        }
        alone = model.step(POPULATION, 1)
        for n, ms in extrapolated[name].items():
            print(
                f"| {name} | {n:,} | {ms['sums']:,.0f} | {alone / ms['sums'] / n:.0%} "
                f"| {1 - model.work(POPULATION, n) / ms['sums']:.0%} | {ms['losses']:,.0f} "
                f"| {alone / ms['losses'] / n:.1%} |"
            )
    if options.json:
        parts = {name: model._asdict() for name, model in models.items()}
        record = {
            "torch": torch.__version__,
            "batch": options.batch,
            **found,
            "model": parts,
            "extrapolated": extrapolated,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def modelled(name: str, found: dict[int, dict[str, Any]], ranks: int) -> Model:
    """The model of a case; messages are those between this number of processes, per doubling."""
    few, many = found[1]["fewest"][name]["ms"], found[1]["steps"][f"WeightPerturbation, {name}"]["ms"]
    member, doublings = (many - few) / (MEMBERS - 1), math.log2(ranks)
    sums, losses = found[ranks]["sums_ms"][EXTRAPOLATED[name][0]], found[ranks]["losses_ms"]
    return Model(
        fixed=max(few - member, 0.0),
        member=member,
        again=found[1]["again_ms"][name],
        sums=sums / doublings,
        losses=losses / doublings,
        buffers=int(found[ranks]["steps"][f"WeightPerturbation, {name}"]["messages"]) - 1,
    )


if __name__ == "__main__":
    main()
