"""Two and four processes equal one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bioopt
from bioopt.perturbation.base import Perturbation

from ..rules import published

multiprocessing.set_forkserver_preload(["bioopt", "pytest"])  # torch is imported once for all processes

X = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).double()


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def routed() -> nn.Sequential:
    torch.manual_seed(0)
    gate = bioopt.nn.Gate(nn.Linear(6, 3), [nn.Linear(6, 5) for _ in range(3)], active=1)
    return nn.Sequential(gate, nn.Tanh(), nn.Linear(5, 4)).double()


def machine() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sigmoid(), bioopt.nn.RBM(6, 5), nn.Linear(5, 4)).double()


def modulated(model: nn.Module, group: dist.ProcessGroup | None) -> bioopt.Hebbian:
    """The modulator of one sample is negative, on one of the ranks: all must take the same decay."""
    rule = published.Hebbian(model, 0.1, readout=None, process_group=group)
    modulator = torch.ones(len(X)).double()
    modulator[1] = -0.5
    rule.modulator = modulator if group is None else modulator[dist.get_rank(group) :: 2]
    return rule


# rule -> (network, does each rank see a share of the batch?)
CASES = {
    "Hebbian": (plain, True, lambda m, g: published.Hebbian(m, 0.1, readout_lr=0.5, process_group=g)),
    "Hebbian, modulated": (plain, True, modulated),
    "SoftHebb": (plain, True, lambda m, g: published.SoftHebb(m, 0.1, process_group=g)),
    "BCM": (plain, True, lambda m, g: published.BCM(m, 0.1, process_group=g)),
    "Oja": (plain, True, lambda m, g: published.Oja(m, 0.1, readout=None, process_group=g)),
    "ContrastiveDivergence, persistent": (
        machine, True, lambda m, g: bioopt.ContrastiveDivergence(
            m, 0.1, persistent=True, readout="delta", readout_lr=0.5, process_group=g)),
    "Hebbian, by default": (plain, True, lambda m, g: bioopt.Hebbian(m, process_group=g)),
    "FeedbackAlignment": (
        plain, True, lambda m, g: bioopt.FeedbackAlignment(m, descent=torch.optim.SGD, process_group=g)),
    "LocalLoss": (plain, True, lambda m, g: bioopt.LocalLoss(m, descent=torch.optim.SGD, process_group=g)),
    "Homeostasis": (plain, True, lambda m, g: bioopt.Homeostasis(m, process_group=g)),
    "WeightPerturbation": (
        network, False, lambda m, g: bioopt.WeightPerturbation(m, 0.1, sigma=0.1, population=3, process_group=g)),
    "SerialPerturbation": (
        network, False, lambda m, g: bioopt.SerialPerturbation(m, 0.1, sigma=0.1, coordinates=5, process_group=g)),
    "SerialPerturbation, batched": (
        plain, False, lambda m, g: bioopt.SerialPerturbation(
            m, 0.1, sigma=0.1, coordinates=29, batched=True, process_group=g)),
    "NodePerturbation": (
        network, False, lambda m, g: bioopt.NodePerturbation(m, 0.1, sigma=0.1, samples=3, process_group=g)),
    "NodePerturbation, batched": (
        plain, False, lambda m, g: bioopt.NodePerturbation(
            m, 0.1, sigma=0.1, samples=3, batched=True, process_group=g)),
    "NodePerturbation, decorrelated": (
        network, False, lambda m, g: bioopt.NodePerturbation(
            m, 0.1, sigma=0.1, samples=3, decorrelation=0.01, process_group=g)),
    "RankOnePerturbation": (
        network, False, lambda m, g: bioopt.RankOnePerturbation(m, 0.1, sigma=0.1, samples=3, process_group=g)),
    "WeightPerturbation, shaped": (
        network, False, lambda m, g: bioopt.WeightPerturbation(
            m, 0.1, sigma=0.1, population=3, antithetic=False, shaping="ranks", process_group=g)),
    "SerialPerturbation, one-sided": (
        network, False, lambda m, g: bioopt.SerialPerturbation(
            m, 0.1, sigma=0.1, coordinates=34, central=False, process_group=g)),
    "HillClimbing": (network, False, lambda m, g: bioopt.HillClimbing(m, 0.1, tries=3, process_group=g)),
    "ForwardGradient": (network, False, lambda m, g: bioopt.ForwardGradient(m, 0.1, samples=3, process_group=g)),
    "ForwardGradient, activities": (
        network, False, lambda m, g: bioopt.ForwardGradient(
            m, 0.1, samples=3, space="activities", process_group=g)),
    "PredictiveCoding": (
        plain, True, lambda m, g: bioopt.PredictiveCoding(
            m, 0.1, mode="incremental", descent=torch.optim.SGD, process_group=g)),
    "PredictiveCoding, mu_pc": (
        plain, True, lambda m, g: bioopt.PredictiveCoding(
            m, mu_pc=True, descent=torch.optim.SGD, process_group=g)),
    "DualPropagation": (
        plain, True, lambda m, g: bioopt.DualPropagation(m, 0.1, descent=torch.optim.SGD, process_group=g)),
    "EquilibriumPropagation": (
        plain, True, lambda m, g: bioopt.EquilibriumPropagation(
            m, 0.1, energy="hopfield", descent=torch.optim.SGD, process_group=g)),
    "DifferenceTargetPropagation": (  # whose noise differs between ranks
        plain, True, lambda m, g: bioopt.DifferenceTargetPropagation(
            m, 0.1, feedback_lr=0.0, target_step=10.0, descent=torch.optim.SGD, process_group=g)),
    # A readout beside rules that evaluate the loss several times: all ranks see the same batch, or each its share.
    "NodePerturbation, standardised readout": (
        network, False, lambda m, g: bioopt.NodePerturbation(
            m, 0.1, sigma=0.1, relative=False, samples=3, readout="delta", process_group=g)),
    "NodePerturbation, readout": (
        network, False, lambda m, g: bioopt.NodePerturbation(
            m, 0.1, sigma=0.1, samples=3, readout="delta", readout_lr=0.5, process_group=g)),
    "WeightPerturbation, readout": (
        network, False, lambda m, g: bioopt.WeightPerturbation(
            m, 0.1, sigma=0.1, population=3, readout="delta", process_group=g)),
    "SerialPerturbation, teacher": (
        network, False, lambda m, g: bioopt.SerialPerturbation(
            m, 0.1, sigma=0.1, coordinates=5, readout="teacher", process_group=g)),
    "HillClimbing, readout": (
        network, False, lambda m, g: bioopt.HillClimbing(m, 0.1, tries=3, readout="delta", process_group=g)),
    "RankOnePerturbation, readout": (
        network, False, lambda m, g: bioopt.RankOnePerturbation(
            m, 0.1, sigma=0.1, samples=3, readout="delta", process_group=g)),
    "ForwardGradient, readout": (
        network, False, lambda m, g: bioopt.ForwardGradient(m, 0.1, samples=3, readout="delta", process_group=g)),
    "RewardHebbian, the readout alone": (  # each rank has noise of its own
        plain, True, lambda m, g: bioopt.RewardHebbian(
            m, 0.0, sigma=0.1, readout="delta", readout_lr=0.5, process_group=g)),
    "RewardHebbian, the teacher alone": (
        plain, True, lambda m, g: bioopt.RewardHebbian(
            m, 0.0, sigma=0.1, readout="teacher", readout_lr=0.5, process_group=g)),
}  # fmt: skip

# Enough evaluations for the ranks to exchange sums, and not equally many for each rank.
SUMMED = {
    "WeightPerturbation, 17": (
        network, False, lambda m, g: bioopt.WeightPerturbation(m, population=17, process_group=g)),
    "WeightPerturbation, 17, one-sided": (
        network, False, lambda m, g: bioopt.WeightPerturbation(
            m, population=17, antithetic=False, distribution="rademacher", process_group=g)),
    "WeightPerturbation, 17, shaped": (
        network, False, lambda m, g: bioopt.WeightPerturbation(m, population=17, shaping="ranks", process_group=g)),
    "WeightPerturbation, 17, readout": (
        network, False, lambda m, g: bioopt.WeightPerturbation(m, population=17, readout="delta", process_group=g)),
    "RankOnePerturbation, 17": (
        network, False, lambda m, g: bioopt.RankOnePerturbation(m, samples=17, process_group=g)),
    "RankOnePerturbation, 17, routed": (
        routed, False, lambda m, g: bioopt.RankOnePerturbation(m, samples=17, process_group=g)),
    "NodePerturbation, 17, routed": (
        routed, False, lambda m, g: bioopt.NodePerturbation(m, samples=17, process_group=g)),
    "NodePerturbation, 17": (network, False, lambda m, g: bioopt.NodePerturbation(m, samples=17, process_group=g)),
    "NodePerturbation, 17, batched": (
        plain, False, lambda m, g: bioopt.NodePerturbation(m, samples=17, batched=True, process_group=g)),
    "NodePerturbation, 17, decorrelated": (
        network, False, lambda m, g: bioopt.NodePerturbation(m, samples=17, decorrelation=0.01, process_group=g)),
    "ForwardGradient, 17": (
        network, False, lambda m, g: bioopt.ForwardGradient(m, samples=17, space="weights", process_group=g)),
    "ForwardGradient, 17, activities": (
        network, False, lambda m, g: bioopt.ForwardGradient(m, samples=17, process_group=g)),
}  # fmt: skip


UNEVEN = [case for case, (_, shares, _) in CASES.items() if shares and case != "Hebbian, modulated"]  # sized for halves


def train(
    case: str, group: dist.ProcessGroup | None, rank: int = 0, ranks: int = 1, first: int | None = None
) -> dict[str, Tensor]:
    """The weights after some steps; ``first``: how many samples the first of two ranks has."""
    build, shares, make = (CASES | SUMMED)[case]
    model = build()
    optimizer = make(model, group)
    x, y = (X[rank::ranks], Y[rank::ranks]) if shares else (X, Y)
    if first is not None:
        x, y = ((one[:first], one[first:])[rank] for one in (X, Y))
    losses = []
    # Ten of homeostasis alone, or until the readout knows its principal components.
    for _ in range(12 if case in ("Hebbian, by default", "NodePerturbation, standardised readout") else 3):
        optimizer.target = y
        losses.append(optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none")))
    return {**model.state_dict(), **({} if shares else {"loss": losses[-1]})}


def drawing(drawn: set[int], case: str, group: dist.ProcessGroup, rank: int, ranks: int) -> dict[str, Tensor]:
    """As `train`; adds the numbers of the evaluations whose directions the rank draws."""
    noise_of = Perturbation._noise_of

    def noted(self: Perturbation, member: int, *args: Any) -> Any:
        drawn.add(member)
        return noise_of(self, member, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Perturbation, "_noise_of", noted)
        return train(case, group, rank, ranks)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    group = dist.new_group([0, 1])
    found: dict[str, Any] = {"drawn": {}, "four": {}, **(of_pair(rank, group) if rank < 2 else {})}
    for case in SUMMED:
        found["four"][case] = drawing(found["drawn"].setdefault(case, set()), case, dist.group.WORLD, rank, 4)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def of_pair(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """What one of two processes finds."""
    results = {case: train(case, group, rank, 2) for case in CASES | SUMMED}
    uneven = {(case, first): train(case, group, rank, 2, first) for case in UNEVEN for first in (len(X) - 3, len(X))}
    model, other = plain(), plain()
    wrapped, watching = DistributedDataParallel(other, process_group=group), published.Hebbian(other, 0.1)
    errors = []
    for build in (
        lambda: published.Hebbian(DistributedDataParallel(model, process_group=group), 0.1),
        lambda: bioopt.WeightPerturbation(model, 0.1, population=1, process_group=group).step(
            lambda: F.cross_entropy(model(X), Y)
        ),
        # Not seen as the optimizer is built, but where the model runs.
        lambda: bioopt.WeightPerturbation(wrapped.parameters(), 0.1, sigma=0.1).step(
            lambda: F.cross_entropy(wrapped(X), Y)
        ),
        lambda: F.cross_entropy(wrapped(X), Y).backward() or watching.step(),
        lambda: bioopt.NodePerturbation(model, process_group=group).step(
            lambda: F.cross_entropy(model(X[rank::2]), Y[rank::2], reduction="none")
        ),
        # A loss that is not finite on one rank alone stops both.
        lambda: published.Oja(model, 0.1, readout=None, process_group=group).step(
            lambda: model(X).sum() * (float("nan") if rank == 0 else 1.0)
        ),
        lambda: bioopt.WeightPerturbation(model, population=16, process_group=group).step(
            lambda: model(X).sum() * (float("nan") if rank == 0 else 1.0)
        ),
    ):
        try:
            build()
            errors.append("nothing")
        except (TypeError, ValueError, RuntimeError) as error:
            errors.append(str(error))
    return {"results": results, "uneven": uneven, "errors": errors}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (str(folder),), nprocs=4, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case: str, ranks: list[dict]) -> None:
    one = train(case, None)
    exact = not CASES[case][1]  # a sum over ranks is not in the order of a sum over the batch
    for rank in range(2):
        got = ranks[rank]["results"][case]
        assert got.keys() == one.keys()
        for name in one:
            if exact and name != "loss":  # whose mean is over the evaluations of all ranks
                assert torch.equal(got[name], one[name]), name
            else:
                torch.testing.assert_close(got[name], one[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", UNEVEN)
def test_unequal_shares_count_by_their_samples(case: str, ranks: list[dict]) -> None:
    """The last batch of a loader; one rank may have no sample at all."""
    one = train(case, None)
    for rank in range(2):
        for first in (len(X) - 3, len(X)):
            torch.testing.assert_close(ranks[rank]["uneven"][case, first], one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", SUMMED)
def test_sums_over_two_and_four_processes_equal_one(case: str, ranks: list[dict]) -> None:
    one = train(case, None)
    for got in [*(found["results"][case] for found in ranks[:2]), *(found["four"][case] for found in ranks)]:
        torch.testing.assert_close(got, one, rtol=1e-9, atol=1e-12)
    for found in ([r["results"][case] for r in ranks[:2]], [r["four"][case] for r in ranks]):
        for other in found[1:]:  # ranks must not drift apart, not even by their last bits
            assert all(torch.equal(found[0][name], other[name]) for name in one if name != "loss")


@pytest.mark.parametrize("case", SUMMED)
def test_a_rank_draws_its_own_directions_alone(case: str, ranks: list[dict]) -> None:
    assert [found["drawn"][case] for found in ranks] == [set(range(rank, 17, 4)) for rank in range(4)]


def test_mistakes_with_ranks_are_explained(ranks: list[dict]) -> None:
    for rank in range(2):
        wrapped, too_few, probed, watched, shards, *not_finite = ranks[rank]["errors"]
        assert "the ranks of process_group= have different batches" in shards
        assert "Hebbian(model.module, ..., process_group=" in wrapped
        assert "population=1 cannot be split over 2 ranks" in too_few
        for error in (probed, watched):
            assert "DistributedDataParallel" in error
            assert "(model.module), and give the rule process_group=torch.distributed.group.WORLD" in error
        assert ["the loss is nan" in error for error in not_finite] == [True, True]
