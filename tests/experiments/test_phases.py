"""Blocks that learn only from a cost of their own, with every rule and every cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from bioopt import costs
from experiments import building, data
from experiments.building import build_cost
from experiments.learner import Learner
from experiments.phases import plastic_learner, split_into_blocks
from experiments.run import run

from ..commands import OPTIMIZERS, ROOT, TINY, config, tiny
from ..test_contract import equal_state

NAMES = sorted(path.stem for path in (ROOT / "conf/cost").glob("*.yaml"))
IMAGES = data.load("digits", "")


def one_step(run: DictConfig, **cost: Any) -> tuple[list[Any], list[bool]]:
    """The blocks after a step of each, and whether it has changed them."""
    run = run.copy()
    run.cost = {"name": "cross_entropy", "blocks": None, **cost}
    torch.manual_seed(0)
    model = building.build_model(run, IMAGES)
    blocks = plastic_learner(run, model, IMAGES).blocks
    augment = data.Augment(**run.data.augment)
    inputs, labels = next(IMAGES.training_batches(8, 0, 0, augment))
    changed = []
    for block in blocks:
        block.network.train()
        block.cost.train()
        learns = [*block.network.parameters(), *block.cost.parameters()]
        before = [p.detach().clone() for p in learns]
        losses: Any = block.optimizer.step(block.closure(inputs, labels, frames=augment.frames))
        assert losses.shape == (8 * augment.frames,)
        assert losses.isfinite().all()
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, learns, strict=True)))
        inputs = block.forward_detached(inputs)
    return blocks, changed


SOME = [name for name in NAMES if name not in ("mixture", "cross_entropy")]
# The first may keep nothing; e-prop's network is no row of blocks; the others need an output for each class in each.
WITHOUT = ("hill_climbing", "drtp", "eprop", "forward_forward", "local_loss", "local_perturbation", "mono_forward")
ALL_COSTS = ("hebbian", "node_perturbation", "sgd")  # one of each kind of optimizer; the others take turns


@pytest.mark.parametrize("rule", [o for o in OPTIMIZERS if o not in WITHOUT])
@pytest.mark.filterwarnings("ignore:ForwardGradient. no forward derivative")
@pytest.mark.filterwarnings("ignore:.*did not fire")
@pytest.mark.long
def test_every_optimizer_learns_from_every_cost_that_fits(rule: str) -> None:
    run = config(*tiny(rule), "data.augment.crop=2")
    for cost in SOME if rule in ALL_COSTS else SOME[OPTIMIZERS.index(rule) % 3 :: 3]:
        if build_cost(cost).scores:
            assert one_step(run, name=cost)[1] == [True], cost
            continue
        run.data.augment.frames = 2 if build_cost(cost).sequences else 1
        blocks = {"trunk": cost, "head": "cross_entropy"}
        if rule in ("random_trunk", "reward_stdp"):  # the second's network has no readout that would be a head
            with pytest.raises(
                ValueError, match=r"random_trunk freezes the trunk|need a model with a trunk and a head"
            ):
                one_step(run, blocks=blocks)
        else:
            assert one_step(run, blocks=blocks)[1] == [True, True], cost


def test_no_error_passes_between_blocks() -> None:
    """A block learns the same as alone, for every cost of the head and every rule."""
    trunks = []
    for head in ("cross_entropy", "hinge"):
        blocks, _ = one_step(config(*tiny("node_perturbation")), blocks={"trunk": "contrastive", "head": head})
        trunks.append([*blocks[0].network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trunks, strict=True))


def test_a_trunk_learns_only_from_its_own_cost() -> None:
    blocks, _ = one_step(config(*tiny("sgd")), blocks={"trunk": "contrastive", "head": "cross_entropy"})
    run = config("optimizer=sgd", *TINY)
    torch.manual_seed(0)
    model = building.build_model(run, IMAGES)
    inputs, labels = next(IMAGES.training_batches(8, 0, 0, data.Augment(**run.data.augment)))
    trunk, head = model[:-1], model[-1]
    costs.SupervisedContrastive()(trunk(inputs), labels).mean().backward()
    with torch.no_grad():
        for p in trunk.parameters():
            p -= run.optimizer.lr * p.grad
    for twin, found in zip(trunk.parameters(), blocks[0].network.parameters(), strict=True):
        torch.testing.assert_close(found, twin)
    trunk.eval()
    costs.CrossEntropy()(head(trunk(inputs).detach()), labels).mean().backward()
    with torch.no_grad():
        head.weight -= run.optimizer.lr * head.weight.grad
    torch.testing.assert_close(blocks[1].network[0].weight, head.weight)


def test_blocks_reach_from_one_name_to_the_next() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    cut = split_into_blocks(model, ["head", "3", "1"])
    assert {name: [*dict(part.named_children())] for name, part in cut.items()} == {
        "1": ["0", "1", "2"],  # what comes before and has no weights goes with it
        "3": ["3", "4"],
        "head": ["5"],
    }
    assert cut["head"][0] is model[5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cost.blocks={trunk: contrastive, brain: hinge}"], r"'brain', which is not a block of the model; there are"),
        (["cost.blocks={trunk: contrastive, 4: hinge, head: hinge}"], r"'trunk' and '4' overlap"),
        (["cost.blocks={0: contrastive, trunk: contrastive, head: hinge}"], r"overlap"),
        (["cost.blocks={head: hinge, 9: hinge}"], r"'head' and '9' overlap"),
        (["cost.blocks={trunk: hinge}"], r"the head has no cost to learn from"),
        (["cost.blocks={head: hinge}"], r"'0' is in no block and would not learn"),
        (["cost.blocks={trunk: hinge, head: contrastive}"], r"cost.blocks.head=contrastive returns no class scores"),
        (["cost.blocks={trunk: wishes, head: hinge}"], r"cost.blocks.trunk=wishes is not a cost.*squared_error"),
        (["cost.blocks={trunk: {name: focal, gama: 1}, head: hinge}"], r"cost.blocks.trunk=focal: .*gama"),
        (["cost.blocks={trunk: {name: focal, gamma: -1}, head: hinge}"], r"cost.blocks.trunk=focal: .*gamma=-1"),
        (
            ["cost.blocks={trunk: {name: mixture}, head: hinge}"],
            r"cost.blocks.trunk.weights=None must give the weight",
        ),
        (["cost=mixture", "cost.weights={wishes: 1}"], r"cost.weights=wishes is not a cost"),
        (["cost=mixture", "cost.weights={hinge: 1, denoising: 1}"], r"denoising cannot apply to the network's outputs"),
        (["cost=denoising"], r"cost=denoising returns no class scores.*cost.blocks='\{trunk: denoising"),
        (["cost=sparsity"], r"cost=sparsity returns no class scores"),
        (["cost.blocks={trunk: slowness, head: hinge}"], r"data.augment.frames=1 gives single ones"),
        (["data.augment.frames=4", "data.augment.crop=0"], r"nowhere to move"),
        (["cost.blocks={trunk: hinge, head: hinge}", "diagnostics.every=2"], r"diagnostics.every=2 compares"),
        (["cost.blocks={trunk: hinge, head: hinge}", "optimizer=random_trunk"], r"leave cost.blocks out"),
    ],
)
def test_impossible_areas_raise_clear_errors(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(config("optimizer=sgd", *TINY, f"run_dir={tmp_path}/run", *options))


@pytest.mark.usefixtures("undrawn")
def test_the_summary_lists_the_rule_of_each_area(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["optimizer=node_perturbation", *TINY, "cost.blocks={trunk: denoising, head: {name: hinge, margin: 2}}"]
    summary = run(config(*options, "optimizer.samples=2", "epochs=2", "plastic_epochs=1", f"run_dir={tmp_path}/run"))
    printed = capsys.readouterr().out
    assert "NodePerturbation, trunk" in printed
    assert "cost of trunk: readout.weight" in printed
    assert "Adam on the frozen trunk" in printed
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["train_loss_trunk"] > 0
    assert "train_loss_trunk" not in lines[1]
    assert summary["forward_passes"] == 5 * 4 + 2 + 22  # of a step 3, and one for the head; two looks; features


@pytest.mark.usefixtures("undrawn")
@pytest.mark.long
def test_an_interrupted_run_in_areas_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = "cost.blocks={trunk: {name: mixture, weights: {denoising: 1, contrastive: 0.1}}, head: focal}"
    options = ["optimizer=sgd", *TINY, blocks, "epochs=3", "data.augment.crop=1"]
    run(config(*options, f"run_dir={tmp_path}/whole"))
    evaluate, seen = Learner.evaluate, []

    def interrupted(*given: Any) -> tuple[float, float]:
        seen.append(given)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config(*options, f"run_dir={tmp_path}/cut"))
    run(config(f"resume={tmp_path}/cut"))
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert len(whole["blocks"][0]["cost"]) == 2  # the decoder
    for key in ("model", "blocks", "random", "forward_passes", "steps"):
        assert equal_state(whole[key], cut[key]), key
