"""A network in areas, each of which learns from a cost of its own; most networks are a single one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import bioopt
from bioopt.costs import Cost

from . import data
from .building import COSTS, build_cost, build_optimizer

ENDS = ("trunk", "head")  # names of the two areas that every network of `split` has


@dataclass
class Area:
    """A stretch of a network, what it costs, and what trains it by that cost alone.

    Attributes:
        name: of the area; empty for a whole network.
        network: what computes.
        cost: what it learns from, with readouts of its own where it needs them.
        optimizer: of ``network`` and ``cost``.
        scheduler: of its learning rate.
    """

    name: str
    network: nn.Module
    cost: Cost
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None

    def closure(self, inputs: Tensor, labels: Tensor, *, steps: int = 1, amp: bool = False) -> Callable[[], Tensor]:
        """What the optimizer evaluates: the cost of each sample, with a backward pass where one is wanted."""
        if isinstance(self.optimizer, bioopt.SynapticRule):
            self.optimizer.target = labels  # of readout=teacher

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
                outputs = self.network(self.cost.seen(inputs))
                losses: Tensor = self.cost(outputs, labels, inputs=inputs, steps=steps)
            if losses.requires_grad:
                torch.autograd.backward(losses.mean())
            return losses

        return closure

    @torch.no_grad()
    def says(self, inputs: Tensor, *, amp: bool = False) -> Tensor:
        """What the next area is given: activity without dropout, corruption or a trace of where it came from."""
        self.network.eval()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            said: Tensor = self.network(inputs)
        self.network.train()
        return said.float()

    def train(self) -> None:
        """Network and cost are to learn."""
        self.network.train()
        self.cost.train()

    def state_dict(self) -> dict[str, Any]:
        """What goes on later, besides the network's own state."""
        return {
            "cost": self.cost.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.cost.load_state_dict(state["cost"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def build_areas(
    config: DictConfig, model: nn.Module, images: data.Images, group: dist.ProcessGroup | None = None
) -> list[Area]:
    """The areas of ``cost.areas``, in the order of the network, or the whole network with ``cost``.

    Raises:
        ValueError: areas that do not exist, overlap or leave a part out; a cost that does not fit.
    """
    if config.cost.areas is None:
        cost = build_cost(config.cost)
        inputs = images.prepare(images.train_images[:2])
        fit(cost, "", model, inputs, images.classes, int(config.data.augment.frames), last=True)
        return [Area("", model, cost, build_optimizer(config, model, group))]
    if config.optimizer.name == "random_trunk":
        raise ValueError(
            "optimizer=random_trunk freezes the trunk, which then learns from no cost: leave cost.areas out; it is "
            "the control of areas as it is"
        )
    specs = {str(name): spec for name, spec in config.cost.areas.items()}
    stretches = stretched(model, list(specs))
    told = {name: (part, build_cost(specs[name], f"cost.areas.{name}")) for name, part in stretches.items()}
    return assemble(config, model, told, images, group)


def assemble(
    config: DictConfig,
    model: nn.Module,
    told: Mapping[str, tuple[nn.Module, Cost]],
    images: data.Images,
    group: dist.ProcessGroup | None = None,
) -> list[Area]:
    """Areas of stretches of a network, in its order, and their costs: each fitted, and with an optimizer of its own."""
    made = []
    seen = images.prepare(images.train_images[:2])
    for name, (network, cost) in told.items():
        last = [*network.children()][-1] is [*model.children()][-1]  # its outputs are the network's
        seen = fit(cost, name, network, seen, images.classes, int(config.data.augment.frames), last=last)
        cost.to(seen.device)
        learner = nn.ModuleDict({**dict(network.named_children()), **({"cost": cost} if [*cost.parameters()] else {})})
        made.append(Area(name, network, cost, build_optimizer(config, learner, group, whole=model)))
    return made


def fit(cost: Cost, area: str, network: nn.Module, inputs: Tensor, classes: int, frames: int, *, last: bool) -> Tensor:
    """Check that a cost can be of this area, give it the readouts it needs; what an area below the last says."""
    option = f"cost.areas.{area}" if area else "cost"
    if last and not cost.scores:
        raise ValueError(
            f"{option}={_told(cost)} makes no class scores, which the network's outputs must be: give it to an area "
            f"below them, cost.areas='{{trunk: {_told(cost)}, head: cross_entropy}}'"
        )
    if cost.sequences and frames < 2:
        raise ValueError(
            f"{option}={_told(cost)} compares successive images, and data.augment.frames={frames} gives single ones: "
            "say data.augment.frames=4, with data.augment.crop, over which they move"
        )
    parts: list[Any] = list(cost.costs.values()) if isinstance(cost, bioopt.costs.Mixture) else [cost]
    if last:
        for part in parts:
            if not part.scores and part.told != "nothing":
                raise ValueError(
                    f"{option}: {_told(part)} cannot be of the network's outputs, which are class scores: give it to "
                    f"an area below them, cost.areas={{trunk: {_told(part)}, head: cross_entropy}}"
                )
        return inputs  # class scores are there, and no readout is wanted
    network.eval()
    with torch.no_grad():
        outputs: Tensor = network(inputs)
    network.train()
    features, size = outputs[0].numel(), inputs[0].numel()
    for part in parts:
        wanted = part.wants(classes, size)
        if wanted is not None and wanted != features and part.readout is None:
            part.readout = nn.Linear(features, wanted)
    return outputs


def stretched(model: nn.Module, names: list[str]) -> dict[str, nn.Sequential]:
    """A sequential network cut where areas begin: each reaches to the next.

    ``trunk`` and ``head`` are the two parts of `split`; other names are those of the network's children.
    """
    children = [name for name, _ in model.named_children()]
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"cost.areas={names} needs a model that is an nn.Sequential, whose parts are in a row")
    starts: dict[str, int] = {}
    ends = {"trunk": 0, "head": len(split(model)[0])} if set(names) & set(ENDS) else {}
    for name in map(str, names):
        if name not in ends and name not in children:
            known = ", ".join([*ENDS, *(child for child in children if child not in ENDS)])
            raise ValueError(f"cost.areas has '{name}', which is not an area of the model; there are {known}")
        starts[name] = ends[name] if name in ends else children.index(name)
    ordered = sorted(starts, key=lambda name: starts[name])
    for one, other in pairwise(ordered):
        if starts[one] == starts[other] or (one == "trunk" and starts[other] < ends["head"]) or one == "head":
            raise ValueError(f"cost.areas: '{one}' and '{other}' overlap: '{other}' lies inside '{one}'")
    if ordered[-1] == "trunk":
        raise ValueError("cost.areas: nothing tells the head what to learn; add head: cross_entropy")
    before = model[: starts[ordered[0]]]
    if [*before.parameters()]:
        learns = next(name for name, child in before.named_children() if [*child.parameters()])
        raise ValueError(f"cost.areas: '{learns}' is in no area and would not learn; add it, or trunk")
    bounds = [0, *(starts[name] for name in ordered[1:]), len(children)]
    return {name: model[a:b] for name, (a, b) in zip(ordered, pairwise(bounds), strict=True)}


def split(model: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """Trunk and head of a sequential network, of shared modules; the head is the readout, with its norm and dropout."""
    children = list(model.children())
    linear = [i for i, child in enumerate(children) if isinstance(child, nn.Linear)]
    if not isinstance(model, nn.Sequential) or not linear or linear[-1] != len(children) - 1:
        raise ValueError(
            "a trunk and a head (plastic_epochs, cost.areas) are of a model that is an nn.Sequential and ends with its "
            "readout, a Linear"
        )
    first = linear[-1]
    while first and isinstance(children[first - 1], nn.Dropout | nn.BatchNorm1d):
        first -= 1
    return model[:first], model[first:]


def _told(cost: Cost) -> str:
    """What a configuration calls a cost."""
    targets = {str(OmegaConf.load(path)._target_): path.stem for path in sorted(COSTS.glob("*.yaml"), reverse=True)}
    return targets.get(f"bioopt.costs.{type(cost).__name__}", type(cost).__name__)
