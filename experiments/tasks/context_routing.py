"""Tasks that share their images and conflict but for a context: networks with routing, without, and fully connected."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from bioopt import Diverged
from bioopt.nn import Gate

from .. import building, data, models
from ..data import problems
from ..statistics import with_interval
from . import Task, context_routing_plots

CHUNK = 1000  # test images of a batch, and of a measurement of time


@dataclass(eq=False)
class ContextRouting(Task):
    """Several tasks of the same images, whose names of the classes conflict, learned by networks of the same size.

    ``fixed``: each context has a pathway, its own; ``routed_<n>``: a `bioopt.nn.Gate`, whose controller sees the
    context and learns, lets a sample take ``n`` pathways and skips the others; ``all_run``: the same gate lets it take
    all; ``connected``: one hidden layer that sees image and context; ``no_context``: the same, without the context.
    Weights, images, contexts and batches of a repetition are the same for all rules, pathways start alike in all
    networks. Where a loss becomes infinite or NaN, the network is put back to its random start and is tested there. A
    round is one rule, one network and one repetition.

    Raises:
        ValueError: bad counts; fewer than two contexts, or more than pathways; pathways that are not there; rates of
            rules or networks that are not there; networks that cannot be of one size.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    contexts: int  # number of tasks
    pathways: int  # of a gate, of which a fixed one uses as many as there are contexts
    hidden: int  # neurons of each pathway
    active: list[int]  # the ``n`` of networks ``routed_<n>``
    train: int  # images, drawn anew for each repetition, each of which is in one context
    test: int  # the most test images, of which the first are taken; each is in all contexts
    validation: int | None  # other training images in place of the test set, to choose rates by; ``None``: the test set
    epochs: int  # of each rule
    batch_size: int  # of a step
    repetitions: int  # each with its own images, weights and batches
    lr: dict[str, dict[str, float]]  # of a rule in a network, where it is not ``rules.<rule>.lr``

    def __post_init__(self) -> None:
        self.require_counts("contexts", least=2)
        self.require_counts("hidden", "train", "test", "epochs", "batch_size", "repetitions")
        pathways, active = self.pathways, self.active
        if not isinstance(pathways, int) or pathways < self.contexts:
            raise ValueError(
                f"task.pathways={pathways} must be an integer >= task.contexts={self.contexts}: fixed routing gives "
                "each context a pathway of its own"
            )
        if not active or len({*active}) < len(active) or not {*active} <= {*range(1, pathways)}:
            raise ValueError(
                f"task.active={active} must be different integers from 1 to {pathways - 1}, so that some of the "
                f"task.pathways={pathways} are skipped; all of them run in the network all_run"
            )
        self.rules = list(self.config.rules)
        self.networks = ["fixed", *(f"routed_{n}" for n in active), "all_run", "connected", "no_context"]
        for rule, rates in self.lr.items():
            if rule not in self.rules or not {*rates} <= {*self.networks}:
                raise ValueError(
                    f"task.lr.{rule}={rates} must be rates of {', '.join(self.networks)}, by one of the rules "
                    f"{', '.join(self.rules)}"
                )
        images = data.from_config(self.config.data, self.device)
        tested = slice(self.test)
        self.images = replace(images, test_images=images.test_images[tested], test_labels=images.test_labels[tested])
        problems.subset(self.images, torch.Generator(), self.train, self.validation)  # raises now if they do not fit
        self.turns = len(self.rules) * len(self.networks)
        self.rounds = self.turns * self.repetitions
        channels, *sides = self.images.shape
        self.shape, self.classes = (channels + self.contexts, sides[0], sides[1]), self.images.classes
        sizes = {name: weights(self.network(name)) for name in self.networks}
        self.whole = sum(layer.get_parameter("weight").numel() for layer in synapses(self.network("all_run")))
        if max(sizes.values()) > 1.05 * min(sizes.values()):
            raise ValueError(
                f"task.hidden={self.hidden} is too few for networks of one size, which are {sizes}: take more"
            )

    def network(self, name: str) -> nn.Module:
        """One of ``networks``, at the random start of torch's generator."""
        pixels = (self.shape[0] - self.contexts) * self.shape[1] * self.shape[2]
        if name in ("connected", "no_context"):
            inputs = pixels + self.contexts
            hidden = round((weights(self.network("all_run")) - self.classes) / (inputs + 1 + self.classes))
            seen = ConcatContext(self.contexts, shown=name == "connected")
            layers = [nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.classes)]
            return nn.Sequential(seen, *layers).to(self.device)
        active = {"fixed": 1, "all_run": None} | {f"routed_{n}": n for n in self.active}
        learned: nn.Module = nn.Linear(self.contexts, self.pathways)  # drawn in any case: the rest is alike
        gate = Gate(
            OneHotController(self.pathways) if name == "fixed" else learned,
            [nn.Sequential(nn.Linear(pixels, self.hidden), nn.ReLU(inplace=True)) for _ in range(self.pathways)],
            active=active[name],
        )
        return nn.Sequential(models.InContext(gate, self.contexts), nn.Linear(self.hidden, self.classes)).to(
            self.device
        )

    def round(self, number: int) -> dict[str, Any]:
        """One rule, one network, one repetition: accuracy, computation, and which context takes which pathway."""
        repetition, which = divmod(number - 1, len(self.rules) * len(self.networks))
        rule, name = self.rules[which // len(self.networks)], self.networks[which % len(self.networks)]
        seed = self.config.seed * 1_000_003 + repetition  # a round needs nothing of the rounds before
        generator = torch.Generator().manual_seed(seed)
        images = problems.subset(self.images, generator, self.train, self.validation)
        images = problems.contexts(images, generator, self.contexts)
        torch.manual_seed(seed)
        other = self.network("all_run")
        torch.manual_seed(seed)
        model = self.network(name)
        start, weights_at_start = self.gates(model, images), copy.deepcopy(model.state_dict())
        diverged = not self.learn(model, rule, name, images, generator)
        if diverged:  # nothing learned
            model.load_state_dict(weights_at_start)
        found = {"rule": rule, "network": name, "repetition": repetition, **self.tested(model, images)}
        one = images.prepare(images.test_images[torch.randperm(len(images.test_images), generator=generator)[:CHUNK]])
        took, all_took = times([model, other], one)
        found |= {"time_per_1000": took / len(one) * 1000, "time_ratio": took / all_took}
        if start is not None:
            found |= {"gates": self.gates(model, images), "gates_at_start": start}
        found["diverged"] = int(diverged)
        return found | {"weights": weights(model), "guess": guessed(images, self.contexts)}

    def learn(self, model: nn.Module, rule: str, network: str, images: data.Images, generator: torch.Generator) -> bool:
        """Train for all epochs, or until the loss is not finite; returns whether it stayed finite."""
        options = {"lr": self.lr.get(rule, {}).get(network, self.config.rules[rule].lr)}
        if "seed" in self.config.rules[rule]:
            options["seed"] = int(torch.randint(2**31, (), generator=generator))
        run = building.with_rule(self.config, rule, **options)
        steps = self.epochs * math.ceil(len(images.train_labels) / self.batch_size)
        learner = building.build_learner(run, model, f"{rule} on {network}", f"rules.{rule}", schedule_steps=steps)
        try:
            learner.fit(self.batches(images, generator))
        except Diverged:
            return False
        finally:
            learner.close()
        return True

    def batches(self, images: data.Images, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images in each epoch, in random order."""
        for _ in range(self.epochs):
            order = torch.randperm(len(images.train_labels), generator=generator).to(self.device)
            for index in order.split(self.batch_size):
                yield images.prepare(images.train_images[index]), images.train_labels[index]

    @torch.no_grad()
    def gates(self, model: nn.Module, images: data.Images) -> list[list[float]] | None:
        """How far each pathway is open in each context, which is all that the gate sees of an image."""
        if not isinstance(model[0], models.InContext):  # type: ignore[index]
            return None
        model(images.prepare(images.test_images[:: len(images.test_images) // self.contexts]))
        return [[round(g, 4) for g in row] for row in opened(model).tolist()]

    @torch.no_grad()
    def tested(self, model: nn.Module, images: data.Images) -> dict[str, Any]:
        """On all test images in all contexts: accuracy, multiply-adds relative to all pathways, and routing."""
        model.eval()
        gated = isinstance(model[0], models.InContext)  # type: ignore[index]
        right, gates = [], []
        with counted(model) as count:
            for some, labels in zip(images.test_images.split(CHUNK), images.test_labels.split(CHUNK), strict=True):
                right.append(model(images.prepare(some)).argmax(1) == labels)
                if gated:
                    gates.append(opened(model))
        total = len(images.test_labels)
        each = torch.cat(right).view(self.contexts, -1).float().mean(1)
        found: dict[str, Any] = {
            "accuracy": each.mean().item(),
            "worst_context": each.min().item(),
            "multiply_adds": count[0] / total,
            "computation": count[0] / total / self.whole,
        }
        if gated:
            mean = torch.cat(gates).view(self.contexts, -1, self.pathways).mean(1)
            found |= {"information": information(mean), "in_use": int((mean > 0).any(0).sum())}
        return found

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """Accuracies, differences of learned routing to other networks, computation, time and routing."""
        found: dict[str, float] = {}
        for rule in self.rules:
            for name in self.networks:
                found |= with_interval(f"{rule}_{name}_accuracy", self.each(history, rule, name, "accuracy"))
        routed = self.networks[1 : 1 + len(self.active)]
        for rule in self.rules:
            one = self.each(history, rule, routed[0], "accuracy")
            for name in ("fixed", "all_run", "connected"):
                pairs = zip(one, self.each(history, rule, name, "accuracy"), strict=True)
                found |= with_interval(f"{rule}_{routed[0]}_minus_{name}", [a - b for a, b in pairs])
        for name in self.networks:
            lines = [line for line in history if line["network"] == name]
            found[f"{name}_computation"] = statistics.fmean(line["computation"] for line in lines)
            found[f"{name}_time_of_all_run"] = statistics.median(line["time_ratio"] for line in lines)
            found[f"{name}_ms_per_1000_images_time"] = 1000 * statistics.median(line["time_per_1000"] for line in lines)
            found[f"{name}_weights"] = lines[0]["weights"]
        for rule in self.rules:
            for name in (*routed, "all_run"):
                found |= with_interval(f"{rule}_{name}_information_bits", self.each(history, rule, name, "information"))
                if name in routed:
                    found |= with_interval(f"{rule}_{name}_pathways_in_use", self.each(history, rule, name, "in_use"))
        for rule in self.rules:
            for name in self.networks:
                if lost := sum(self.each(history, rule, name, "diverged")):
                    found[f"{rule}_{name}_repetitions_that_diverged"] = lost
        found["best_guess_without_context"] = statistics.fmean(line["guess"] for line in history)
        return found, [
            context_routing_plots.bars(self, history, title, folder / "accuracy.png"),
            context_routing_plots.routes(self, history, information, title, folder / "routes.png"),
        ]

    def each(self, history: list[dict[str, Any]], rule: str, network: str, key: str) -> list[float]:
        """A number of each repetition."""
        return [line[key] for line in history if line["rule"] == rule and line["network"] == network]


class ConcatContext(nn.Module):
    """Flattens images, with one number for each of their last channels, a context; zeros if it is not shown."""

    def __init__(self, contexts: int, *, shown: bool) -> None:
        super().__init__()
        self.contexts, self.shown = contexts, shown

    def forward(self, x: Tensor) -> Tensor:
        """Images N×(C + contexts)×H×W to N × (C H W + contexts)."""
        context = x[:, -self.contexts :, 0, 0]
        return torch.cat([x[:, : -self.contexts].flatten(1), context if self.shown else torch.zeros_like(context)], 1)


class OneHotController(nn.Module):
    """A controller without parameters that opens only pathway ``k`` in context ``k``."""

    def __init__(self, pathways: int) -> None:
        super().__init__()
        self.pathways = pathways

    def forward(self, context: Tensor) -> Tensor:
        """The context, N × K and above 0 for one of K only, to scores N × P."""
        return F.pad(100 * context, (0, self.pathways - context.shape[1]))


def opened(model: nn.Module) -> Tensor:
    """How far a network opened its pathways for each of the last samples."""
    gates: Tensor = model[0].gate.gates  # type: ignore[index]
    return gates


def weights(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def synapses(model: nn.Module) -> list[nn.Module]:
    """The layers with a weight matrix, including frozen ones."""
    return [m for m in model.modules() if isinstance(w := getattr(m, "weight", None), nn.Parameter) and w.ndim > 1]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Count the multiply-adds of a model's layers meanwhile: for each output, one per input."""
    count = [0]

    def add(layer: nn.Module, _: Any, output: Tensor) -> None:
        count[0] += output.numel() * layer.weight[0].numel()  # type: ignore[index]

    handles = [layer.register_forward_hook(add) for layer in synapses(model)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def information(gates: Tensor) -> float:
    """Mutual information of context and pathway in bits, where gates, contexts × pathways, are how often it is taken.

    Contexts have equally many samples; a gate counts by its share of those open.
    """
    gates = gates.double()
    joint = gates / gates.sum(1, keepdim=True) / len(gates)
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    return float((joint * (joint / apart).log2()).nansum().clamp(min=0))


def guessed(images: data.Images, contexts: int) -> float:
    """The highest accuracy possible when the class is known, but not the context."""
    names = images.test_labels.view(contexts, -1)
    return float((names.unsqueeze(0) == names.unsqueeze(1)).sum(1).amax(0).float().mean() / contexts)


@torch.no_grad()
def times(networks: list[nn.Module], inputs: Tensor, repeats: int = 25) -> list[float]:
    """The shortest time in seconds that each network takes for these inputs, measured in turn."""
    took = [[math.inf] for _ in networks]
    for _ in range(repeats):
        for network, each in zip(networks, took, strict=True):
            begin = time.perf_counter()
            network(inputs)
            if inputs.is_cuda:
                torch.cuda.synchronize()
            each.append(time.perf_counter() - begin)
    return [min(each) for each in took]
