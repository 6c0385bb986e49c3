"""The phases of a run: first everything learns, in blocks with a cost each, then the readout on frozen features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import bioopt
from bioopt.costs import Cost

from . import data
from .building import COSTS, build_cost, build_optimizer, build_schedule, instantiated, rate_of
from .checks import require_counts
from .learner import Block, Learner

ENDS = ("trunk", "head")  # the two blocks that every network has which `split` accepts


def plastic_learner(
    config: DictConfig, model: nn.Module, images: data.Images, group: dist.ProcessGroup | None = None
) -> Learner:
    """The learner of the first phase: the blocks of ``cost.blocks``, or the whole network with ``cost``.

    Raises:
        ValueError: blocks that do not exist, overlap or leave a part out; a cost that does not fit.
    """
    frames = int(config.data.augment.frames)
    if config.cost.blocks is None:
        cost = build_cost(config.cost)
        inputs = images.prepare(images.train_images[:2])
        fit_cost(cost, "", model, inputs, images.classes, frames, last=True)
        blocks = [Block(model, cost, build_optimizer(config, model, group))]
    elif config.optimizer.name == "random_trunk":
        raise ValueError(
            "optimizer=random_trunk freezes the trunk, which then learns from no cost: leave cost.blocks out; without "
            "it, this is the control of blocks too"
        )
    else:
        specs = {str(name): spec for name, spec in config.cost.blocks.items()}
        parts = split_into_blocks(model, list(specs))
        with_costs = {name: (part, build_cost(specs[name], f"cost.blocks.{name}")) for name, part in parts.items()}
        blocks = assemble(config, model, with_costs, images, group)
    return _learner(config, model, blocks, amp=config.amp)


def readout_learner(
    config: DictConfig, head: nn.Module, source: data.Images | data.Features, cost: Cost, plastic: int
) -> Learner:
    """The learner of the second phase: the readout alone, with ``readout.optimizer`` and the cost of the first phase.

    Args:
        config: of the run.
        head: the readout.
        source: of its batches.
        cost: of the network's outputs.
        plastic: epochs of the first phase.
    """
    head.requires_grad_(True)
    option = f"readout.optimizer={config.readout.optimizer}"
    optimizer = instantiated(option, config.readout.optimizer, head.parameters())
    batch_size = config.readout.batch_size
    if not source.batches(batch_size):
        raise ValueError(f"readout.batch_size={batch_size} is larger than the training set")
    total = (config.epochs - plastic) * source.batches(batch_size)
    schedule = build_schedule(config.readout.schedule, optimizer, total)
    # In half precision it would not see steps below the rounding of its weights.
    return _learner(config, head, [Block(head, cost, optimizer, schedule)], amp=False)


def _learner(config: DictConfig, network: nn.Module, blocks: list[Block], amp: bool) -> Learner:
    return Learner(
        network,
        blocks,
        name=f"optimizer={config.optimizer.name}",
        rate=rate_of(config, blocks[0].optimizer),
        frames=int(config.data.augment.frames),
        amp=amp,
        check=False,
    )


def plastic_epochs(config: DictConfig, learner: Learner) -> int:
    """The number of epochs in which everything learns; in the others the trunk is frozen and the readout learns."""
    require_counts(of="", null=True, plastic_epochs=config.plastic_epochs)  # a resumed run's file may have changed
    if config.plastic_epochs is None:
        return int(config.epochs)
    if config.plastic_epochs >= config.epochs:
        return int(config.epochs)
    head = set(split(learner.network)[1].parameters())
    block = learner.last
    trained = {p for group in block.optimizer.param_groups for p in group["params"] if p.requires_grad}
    if not block.is_rule and len(learner.blocks) == 1 and not trained <= head:
        print(
            f"optimizer={config.optimizer.name} trains the whole network by gradients: plastic_epochs does not apply, "
            f"all of it learns for epochs={config.epochs}",
            flush=True,
        )
        return int(config.epochs)
    return int(config.plastic_epochs)


def frozen(trunk: nn.Module, amp: bool) -> Callable[[Tensor], Tensor]:
    """A function from inputs to the features of a trunk that learns no more, in bf16 where it computes in it."""
    trunk.eval()
    kept = torch.bfloat16 if amp else torch.float32

    @torch.no_grad()
    def features(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            outputs: Tensor = trunk(inputs)
        return outputs.to(kept)

    return features


def assemble(
    config: DictConfig,
    model: nn.Module,
    parts: Mapping[str, tuple[nn.Module, Cost]],
    images: data.Images,
    group: dist.ProcessGroup | None = None,
) -> list[Block]:
    """Blocks from the parts of a network, in its order, and their costs; each gets an optimizer of its own."""
    blocks = []
    inputs = images.prepare(images.train_images[:2])
    for name, (network, cost) in parts.items():
        last = [*network.children()][-1] is [*model.children()][-1]  # its outputs are the network's
        inputs = fit_cost(cost, name, network, inputs, images.classes, int(config.data.augment.frames), last=last)
        cost.to(inputs.device)
        learns = nn.ModuleDict({**dict(network.named_children()), **({"cost": cost} if [*cost.parameters()] else {})})
        blocks.append(Block(network, cost, build_optimizer(config, learns, group, whole=model), name=name))
    return blocks


def fit_cost(
    cost: Cost, block: str, network: nn.Module, inputs: Tensor, classes: int, frames: int, *, last: bool
) -> Tensor:
    """Check that a cost suits a block, and give it the readouts that it needs; returns the block's outputs."""
    option = f"cost.blocks.{block}" if block else "cost"
    name = _name(cost)
    if last and not cost.scores:
        raise ValueError(
            f"{option}={name} returns no class scores, which the network's outputs must be: give it to a block "
            f"below them, cost.blocks='{{trunk: {name}, head: cross_entropy}}'"
        )
    if cost.sequences and frames < 2:
        raise ValueError(
            f"{option}={name} compares successive images, and data.augment.frames={frames} gives single ones: "
            "set data.augment.frames=4, with data.augment.crop, over which they move"
        )
    parts: list[Any] = list(cost.costs.values()) if isinstance(cost, bioopt.costs.Mixture) else [cost]
    if last:
        for part in parts:
            if not part.scores and part.target_kind != "nothing":
                raise ValueError(
                    f"{option}: {_name(part)} cannot apply to the network's outputs, which are class scores: give "
                    f"it to a block below them, cost.blocks={{trunk: {_name(part)}, head: cross_entropy}}"
                )
        return inputs  # the outputs are class scores already, and need no readout
    network.eval()
    with torch.no_grad():
        outputs: Tensor = network(inputs)
    network.train()
    features, size = outputs[0].numel(), inputs[0].numel()
    for part in parts:
        wanted = part.output_size(classes, size)
        if wanted is not None and wanted != features and part.readout is None:
            part.readout = nn.Linear(features, wanted)
    return outputs


def split_into_blocks(model: nn.Module, names: list[str]) -> dict[str, nn.Sequential]:
    """The blocks of a sequential network, by the names of the children with which they begin.

    Each reaches to the next. ``trunk`` and ``head`` are the two parts of `split`.
    """
    children = [name for name, _ in model.named_children()]
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"cost.blocks={names} needs a model that is an nn.Sequential, whose parts run one after another"
        )
    starts: dict[str, int] = {}
    ends = {"trunk": 0, "head": len(split(model)[0])} if set(names) & set(ENDS) else {}
    for name in map(str, names):
        if name not in ends and name not in children:
            known = ", ".join([*ENDS, *(child for child in children if child not in ENDS)])
            raise ValueError(f"cost.blocks has '{name}', which is not a block of the model; there are {known}")
        starts[name] = ends[name] if name in ends else children.index(name)
    ordered = sorted(starts, key=lambda name: starts[name])
    for one, other in pairwise(ordered):
        if starts[one] == starts[other] or (one == "trunk" and starts[other] < ends["head"]) or one == "head":
            raise ValueError(f"cost.blocks: '{one}' and '{other}' overlap: '{other}' lies inside '{one}'")
    if ordered[-1] == "trunk":
        raise ValueError("cost.blocks: the head has no cost to learn from; add head: cross_entropy")
    before = model[: starts[ordered[0]]]
    if [*before.parameters()]:
        learns = next(name for name, child in before.named_children() if [*child.parameters()])
        raise ValueError(f"cost.blocks: '{learns}' is in no block and would not learn; add a block for it, or trunk")
    bounds = [0, *(starts[name] for name in ordered[1:]), len(children)]
    return {name: model[a:b] for name, (a, b) in zip(ordered, pairwise(bounds), strict=True)}


def split(model: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """Trunk and head of a sequential network, of shared modules; the head is the readout with its norm and dropout."""
    children = list(model.children())
    linear = [i for i, child in enumerate(children) if isinstance(child, nn.Linear)]
    if not isinstance(model, nn.Sequential) or not linear or linear[-1] != len(children) - 1:
        raise ValueError(
            "plastic_epochs and cost.blocks need a model with a trunk and a head: an nn.Sequential that ends with its "
            "readout, a Linear"
        )
    first = linear[-1]
    while first and isinstance(children[first - 1], nn.Dropout | nn.BatchNorm1d):
        first -= 1
    return model[:first], model[first:]


def _name(cost: Cost) -> str:
    """The name of a cost in ``conf/cost``."""
    targets = {str(OmegaConf.load(path)._target_): path.stem for path in sorted(COSTS.glob("*.yaml"), reverse=True)}
    return targets.get(f"bioopt.costs.{type(cost).__name__}", type(cost).__name__)
