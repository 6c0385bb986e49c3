"""Tasks that share their images and conflict but for a context: networks with routing, without, and fully connected."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from bioopt import Diverged
from bioopt.costs import CrossEntropy
from bioopt.nn import Gate

from . import building, data, models, training
from .areas import Area
from .data import problems
from .options import require_counts
from .pictures import saved
from .statistics import interval, with_interval
from .tasks import Task

CHUNK = 1000  # test images at a time, and those of a measurement of time


class ContextRouting(Task):
    """Several tasks of the same images, whose names of the classes conflict, learned by networks of the same size.

    ``fixed``: each context has a pathway, its own; ``routed_<n>``: a `bioopt.nn.Gate`, whose controller sees the
    context and learns, lets a sample take ``n`` pathways and skips the others; ``all_run``: the same gate lets it take
    all; ``connected``: one hidden layer that sees image and context; ``no_context``: the same, without the context.
    Weights, images, contexts and batches of a repetition are the same for all rules, pathways start alike in all
    networks. Where a loss becomes no number, the network is back at its random start and counts as such. A round is
    one rule, one network and one repetition.

    Args:
        config: of the run: ``data``, ``schedule``, and the rules, ``config.rules``, each as in ``conf/optimizer``.
        device: where to compute.
        contexts: how many tasks.
        pathways: of a gate, of which a fixed one uses as many as there are contexts.
        hidden: neurons of each pathway.
        active: the networks ``routed_<n>`` there are.
        train: images, drawn anew for each repetition, each of which is in one context.
        test: at most so many test images, the first ones, each of which is in all contexts.
        validation: so many other training images take the test set's place, to choose rates by; ``None``: none.
        epochs: of each rule.
        batch_size: of a step.
        repetitions: how often.
        lr: of a rule in a network, where it is not ``rules.<rule>.lr``.

    Raises:
        ValueError: bad counts; fewer than two contexts, or more than pathways; pathways that are not there; rates of
            rules or networks that are not there; networks that cannot be of one size.
    """

    def __init__(
        self,
        config: DictConfig,
        device: torch.device,
        *,
        contexts: int,
        pathways: int,
        hidden: int,
        active: list[int],
        train: int,
        test: int,
        validation: int | None,
        epochs: int,
        batch_size: int,
        repetitions: int,
        lr: dict[str, dict[str, float]],
    ) -> None:
        require_counts(2, contexts=contexts)
        require_counts(
            hidden=hidden, train=train, test=test, epochs=epochs, batch_size=batch_size, repetitions=repetitions
        )
        if not isinstance(pathways, int) or pathways < contexts:
            raise ValueError(
                f"task.pathways={pathways} must be an integer >= task.contexts={contexts}: fixed routing gives each "
                "context a pathway of its own"
            )
        if not active or len({*active}) < len(active) or not {*active} <= {*range(1, pathways)}:
            raise ValueError(
                f"task.active={active} must be different integers from 1 to {pathways - 1}, so that some of the "
                f"task.pathways={pathways} are skipped; all of them run in the network all_run"
            )
        self.config, self.device, self.seed = config, device, int(config.seed)
        self.contexts, self.pathways, self.hidden, self.active = contexts, pathways, hidden, active
        self.train, self.validation, self.epochs, self.batch_size = train, validation, epochs, batch_size
        self.rules = list(config.rules)
        self.networks = ["fixed", *(f"routed_{n}" for n in active), "all_run", "connected", "no_context"]
        for rule, rates in lr.items():
            if rule not in self.rules or not {*rates} <= {*self.networks}:
                raise ValueError(
                    f"task.lr.{rule}={rates} must be rates of {', '.join(self.networks)}, by one of the rules "
                    f"{', '.join(self.rules)}"
                )
        self.lr = lr
        images = data.from_config(config.data, device)
        self.images = replace(images, test_images=images.test_images[:test], test_labels=images.test_labels[:test])
        problems.subset(self.images, torch.Generator(), train, validation)  # or tell now what is wrong
        self.rounds = len(self.rules) * len(self.networks) * repetitions
        channels, *sides = self.images.shape
        self.shape, self.classes = (channels + contexts, sides[0], sides[1]), self.images.classes
        sizes = {name: weights(self.network(name)) for name in self.networks}
        self.whole = sum(layer.get_parameter("weight").numel() for layer in synapses(self.network("all_run")))
        if max(sizes.values()) > 1.05 * min(sizes.values()):
            raise ValueError(f"task.hidden={hidden} is too few for networks of one size, which are {sizes}: take more")

    def network(self, name: str) -> nn.Module:
        """One of ``networks``, at the random start of torch's generator."""
        pixels = (self.shape[0] - self.contexts) * self.shape[1] * self.shape[2]
        if name in ("connected", "no_context"):
            inputs = pixels + self.contexts
            hidden = round((weights(self.network("all_run")) - self.classes) / (inputs + 1 + self.classes))
            seen = Joined(self.contexts, told=name == "connected")
            layers = [nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.classes)]
            return nn.Sequential(seen, *layers).to(self.device)
        active = {"fixed": 1, "all_run": None} | {f"routed_{n}": n for n in self.active}
        learned: nn.Module = nn.Linear(self.contexts, self.pathways)  # drawn in any case: the rest starts alike
        gate = Gate(
            Own(self.pathways) if name == "fixed" else learned,
            [nn.Sequential(nn.Linear(pixels, self.hidden), nn.ReLU(inplace=True)) for _ in range(self.pathways)],
            active=active[name],
        )
        return nn.Sequential(models.InContext(gate, self.contexts), nn.Linear(self.hidden, self.classes)).to(
            self.device
        )

    def round(self, number: int) -> dict[str, Any]:
        """One rule, one network, one repetition: how right it is in the end, what it computes, who goes where."""
        repetition, which = divmod(number - 1, len(self.rules) * len(self.networks))
        rule, name = self.rules[which // len(self.networks)], self.networks[which % len(self.networks)]
        seed = self.seed * 1_000_003 + repetition  # a round needs nothing of the rounds before
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
        took, all_took = seconds([model, other], one)
        found |= {"time_per_1000": took / len(one) * 1000, "time_ratio": took / all_took}
        if start is not None:
            found |= {"gates": self.gates(model, images), "gates_at_start": start}
        found["diverged"] = int(diverged)
        return found | {"weights": weights(model), "guess": guessed(images, self.contexts)}

    def learn(self, model: nn.Module, rule: str, network: str, images: data.Images, generator: torch.Generator) -> bool:
        """Train for all epochs, but not on where the loss is no number; whether that went well."""
        options = {"lr": self.lr.get(rule, {}).get(network, self.config.rules[rule].lr)}
        if "seed" in self.config.rules[rule]:
            options["seed"] = int(torch.randint(2**31, (), generator=generator))
        run = building.with_rule(self.config, rule, **options)
        optimizer = building.build_optimizer(run, model)
        learner = Area("", model, CrossEntropy(), optimizer)
        total = len(images.train_labels)
        steps = self.epochs * math.ceil(total / self.batch_size)
        schedule = building.build_schedule(self.config.schedule, optimizer, steps)
        learner.train()
        for _ in range(self.epochs):
            for index in torch.randperm(total, generator=generator).to(self.device).split(self.batch_size):
                closure = learner.closure(images.prepare(images.train_images[index]), images.train_labels[index])
                try:
                    losses: Tensor = optimizer.step(closure)  # type: ignore[arg-type, assignment]
                except Diverged:
                    losses = torch.tensor(math.nan)
                if not bool(losses.isfinite().all()):
                    training.close([learner])
                    return False
                if schedule is not None:
                    schedule.step()
        training.close([learner])
        return True

    @torch.no_grad()
    def gates(self, model: nn.Module, images: data.Images) -> list[list[float]] | None:
        """How far each pathway is open in each context, of which the gate sees nothing else."""
        if not isinstance(model[0], models.InContext):  # type: ignore[index]
            return None
        model(images.prepare(images.test_images[:: len(images.test_images) // self.contexts]))
        return [[round(g, 4) for g in row] for row in opened(model).tolist()]

    @torch.no_grad()
    def tested(self, model: nn.Module, images: data.Images) -> dict[str, Any]:
        """On all test images in all contexts: accuracy, multiply-adds against all pathways', who takes which."""
        model.eval()
        gated = isinstance(model[0], models.InContext)  # type: ignore[index]
        right, gates = [], []
        with counted(model) as made:
            for some, labels in zip(images.test_images.split(CHUNK), images.test_labels.split(CHUNK), strict=True):
                right.append(model(images.prepare(some)).argmax(1) == labels)
                if gated:
                    gates.append(opened(model))
        total = len(images.test_labels)
        each = torch.cat(right).view(self.contexts, -1).float().mean(1)
        found: dict[str, Any] = {
            "accuracy": each.mean().item(),
            "worst_context": each.min().item(),
            "multiply_adds": made[0] / total,
            "computation": made[0] / total / self.whole,
        }
        if gated:
            mean = torch.cat(gates).view(self.contexts, -1, self.pathways).mean(1)
            found |= {"information": information(mean), "in_use": int((mean > 0).any(0).sum())}
        return found

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """Accuracies, what learned routing gains and lacks, computation and time, and who goes where."""
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
            self.bars(history, title, folder / "accuracy.png"),
            self.routes(history, title, folder / "routes.png"),
        ]

    def each(self, history: list[dict[str, Any]], rule: str, network: str, key: str) -> list[float]:
        """A number of each repetition."""
        return [line[key] for line in history if line["rule"] == rule and line["network"] == network]

    def bars(self, history: list[dict[str, Any]], title: str, path: Path) -> Path:
        """Accuracy of each network and rule: mean, 95 % confidence interval, repetitions as points; computation."""
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        figure.suptitle(title)
        width = 0.8 / len(self.rules)
        ticks = []
        for place, name in enumerate(self.networks):
            for i, rule in enumerate(self.rules):
                values = [100 * a for a in self.each(history, rule, name, "accuracy")]
                at = place + (i - (len(self.rules) - 1) / 2) * width
                axes.bar(
                    at, statistics.fmean(values), 0.92 * width, color=f"C{i}", alpha=0.55,
                    label=rule.replace("_", " ") if place == 0 else None,
                    yerr=interval(values), error_kw={"capsize": 2, "elinewidth": 1},
                )  # fmt: skip
                axes.plot([at] * len(values), values, ".", color="black", markersize=3, alpha=0.6)
            computed = statistics.fmean(line["computation"] for line in history if line["network"] == name)
            ticks.append(f"{self.told(name)}\n{100 * computed:.3g} %")
        guess = 100 * statistics.fmean(line["guess"] for line in history)
        axes.axhline(guess, color="grey", linestyle="--", linewidth=1, label="perfect, but for the context")
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_ylim(0, 100)
        axes.set_ylabel("test accuracy over all contexts (%)")
        axes.set_xlabel("network, and what it computes for an image, of what all pathways would")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=len(self.rules) + 1, frameon=False)
        return saved(figure, path)

    def told(self, network: str) -> str:
        """A network as pictures call it."""
        known = {
            "fixed": f"fixed routing\n1 of {self.pathways}",
            "all_run": f"gated\nall {self.pathways} run",
            "connected": "fully\nconnected",
            "no_context": "connected,\nno context",
        }
        return known.get(network) or f"learned routing\n{network.removeprefix('routed_')} of {self.pathways}"

    def routes(self, history: list[dict[str, Any]], title: str, path: Path) -> Path:
        """Gates of the first repetition, contexts × pathways: at the random start, and after rules that moved them."""
        rows = [*self.networks[1 : 1 + len(self.active)], "all_run"]
        shown = [e for e in history if e["network"] in rows and e["repetition"] == 0]
        learned = [r for r in self.rules if any(e["gates"] != e["gates_at_start"] for e in shown if e["rule"] == r)]
        columns = ["random start", *learned]
        figure, grid = plt.subplots(
            len(rows), len(columns), figsize=(0.6 + 0.24 * self.pathways * len(columns),
            1.2 + (0.75 + 0.28 * self.contexts) * len(rows)), layout="constrained", squeeze=False, sharex=True,
            sharey=True,
        )  # fmt: skip
        figure.suptitle(f"{title}: how far each pathway's gate is open, repetition 0", fontsize=10)
        for line, name in zip(grid, rows, strict=True):
            first = [e for e in shown if e["network"] == name]
            gates = [first[0]["gates_at_start"], *(e["gates"] for e in first if e["rule"] in learned)]
            bits = [information(torch.tensor(each)) for each in gates]
            for axes, column, each, known in zip(line, columns, gates, bits, strict=True):
                axes.imshow(each, cmap="Blues", vmin=0, vmax=1, aspect="auto")
                for context, row in enumerate(each):
                    for pathway, g in enumerate(row):
                        if g > 0:
                            axes.text(
                                pathway, context, f"{g:.2f}"[g < 0.995 :], ha="center", va="center", fontsize=7,
                                color="white" if g > 0.5 else "black",
                            )  # fmt: skip
                axes.set_title(f"{column.replace('_', ' ')}: {known:.2g} bits", fontsize=8)
                axes.set_xticks(range(self.pathways), range(1, self.pathways + 1))
                axes.set_yticks(range(self.contexts), range(1, self.contexts + 1))
                axes.tick_params(length=0, labelsize=7)
            line[0].set_ylabel(f"{self.told(name)}\n\ncontext", fontsize=8)
        for axes in grid[-1]:
            axes.set_xlabel("pathway", fontsize=8)
        return saved(figure, path)


class Joined(nn.Module):
    """Images whose last channels are a context, flat, with one number of each of those; or 0, if it is not told."""

    def __init__(self, contexts: int, *, told: bool) -> None:
        super().__init__()
        self.contexts, self.told = contexts, told

    def forward(self, x: Tensor) -> Tensor:
        """Images N×(C + contexts)×H×W to N × (C H W + contexts)."""
        context = x[:, -self.contexts :, 0, 0]
        return torch.cat([x[:, : -self.contexts].flatten(1), context if self.told else torch.zeros_like(context)], 1)


class Own(nn.Module):
    """A controller that learns nothing: it opens pathway ``k`` alone in context ``k``."""

    def __init__(self, pathways: int) -> None:
        super().__init__()
        self.pathways = pathways

    def forward(self, context: Tensor) -> Tensor:
        """The context, N × K, above 0 for one of them alone, to scores N × P."""
        return F.pad(100 * context, (0, self.pathways - context.shape[1]))


def gate_of(model: nn.Module) -> Gate:
    """Of a network that begins with one."""
    gate: Gate = model[0].gate  # type: ignore[index]
    return gate


def opened(model: nn.Module) -> Tensor:
    """How far it opened its pathways for each of the last samples."""
    gates = gate_of(model).gates
    assert gates is not None
    return gates


def weights(model: nn.Module) -> int:
    """How many numbers it could learn."""
    return sum(p.numel() for p in model.parameters())


def synapses(model: nn.Module) -> list[nn.Module]:
    """Its layers with a weight matrix, those too that are frozen and learn nothing."""
    return [m for m in model.modules() if isinstance(w := getattr(m, "weight", None), nn.Parameter) and w.ndim > 1]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """How many multiply-adds the synapses of a model make meanwhile: for each number they give, one an input."""
    made = [0]

    def add(layer: nn.Module, _: Any, output: Tensor) -> None:
        made[0] += output.numel() * layer.weight[0].numel()  # type: ignore[index]

    handles = [layer.register_forward_hook(add) for layer in synapses(model)]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def information(gates: Tensor) -> float:
    """Mutual information of context and pathway in bits, where gates, contexts × pathways, say how often it is taken.

    As many samples are in each context; a gate counts by its share of those open.
    """
    gates = gates.double()
    joint = gates / gates.sum(1, keepdim=True) / len(gates)
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    return float((joint * (joint / apart).log2()).nansum().clamp(min=0))


def guessed(images: data.Images, contexts: int) -> float:
    """How right one can be at most who knows the class, but not the context."""
    names = images.test_labels.view(contexts, -1)
    return float((names.unsqueeze(0) == names.unsqueeze(1)).sum(1).amax(0).float().mean() / contexts)


@torch.no_grad()
def seconds(networks: list[nn.Module], inputs: Tensor, times: int = 25) -> list[float]:
    """The least time that each takes for these inputs, of so many in turn."""
    took = [[math.inf] for _ in networks]
    for _ in range(times):
        for network, each in zip(networks, took, strict=True):
            begin = time.perf_counter()
            network(inputs)
            if inputs.is_cuda:
                torch.cuda.synchronize()
            each.append(time.perf_counter() - begin)
    return [min(each) for each in took]
