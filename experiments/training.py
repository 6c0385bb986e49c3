"""One training loop for every optimizer: a plain closure, `optimizer.step(closure)`, and a checkpoint an epoch."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

import bioopt
from bioopt.costs import Cost
from bioopt import find_synapses

from . import data, interrupts, logs, pictures, tasks
from .areas import Area, build_areas, split
from .building import build_model, build_schedule, check_keywords, freeze, made
from .config import flat, is_local, resolved, saved
from .diagnostics import Diagnostics
from .options import check
from .ranks import Ranks
from .runs import (
    Progress,
    choose_device,
    circumstances,
    code_version,
    environment,
    held,
    new_folder,
    random_state,
    set_threads,
)


def run(config: DictConfig) -> dict[str, Any]:
    """Train as the configuration says, or go on with an interrupted run; returns the summary."""
    commit = code_version()  # now: the files may change under a long run
    ranks = Ranks()
    resumed = None if config.resume is None else Path(str(config.resume))
    if resumed is not None:
        config = saved(resumed)
    else:
        check(config)
    if config.task is not None and ranks.count > 1:
        raise ValueError(f"experiment={config.task.name} runs in one process; start it without torchrun")
    check_keywords(config)
    kind, plain = choose_device(config.device).type, resolved(config)
    shared = {key: value for key, value in flat(plain).items() if not is_local(key)}
    with ranks.joined(kind, {**shared, "device": kind, "resume": str(resumed)}) as device:
        own = held(resumed) if resumed is not None else new_folder(config)
        with own if ranks.first else contextlib.nullcontext(resumed) as mine, ranks.folder(mine) as folder:
            started = Progress.load(ranks.from_first(mine), device)
            set_threads(config.threads, started.threads)
            started.go_on(plain, environment(device, commit, ranks.count), folder)
            if config.task is not None:
                return tasks.perform(config, started, folder, device)
            return _train(config, started, folder, device, ranks)


def _train(config: DictConfig, started: Progress, folder: Path, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    plain = resolved(config)
    if not ranks.first:
        plain["logger"]["mode"] = "disabled"
    torch.manual_seed(config.seed)
    with ranks.first_alone():  # it may have to fetch the data
        images = data.from_config(config.data, device)
    if config.data.validation:
        images = images.hold_out(config.data.validation)
        print(f"data.validation: 'test' below means the last {config.data.validation} training images", flush=True)
    augment = data.Augment(**config.data.augment)
    if not images.batches(config.batch_size):
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {len(images.train_labels)} training images"
        )

    model = build_model(config, images).to(device)
    layers = find_synapses(model)[:-1]  # now, before any is frozen; the readout is no matter
    freeze(model, config.frozen)
    plastic_areas = build_areas(config, model, images, ranks.group)
    optimizer = plastic_areas[-1].optimizer  # the only one, of most networks
    splits = isinstance(optimizer, bioopt.LearningRule) and optimizer.splits_batch
    if splits and config.batch_size % ranks.count:
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {ranks.count} ranks alike")
    plastic = plastic_epochs(config, model, plastic_areas)
    if plastic < config.epochs:  # a mistake in its options shall not wait for the end of the first phase
        readout_phase(config, nn.Linear(1, 1, device="meta"), images, plastic_areas[-1].cost, plastic)
    total = plastic * images.batches(config.batch_size)
    for area in plastic_areas:
        area.scheduler = build_schedule(config.schedule, area.optimizer, total)
        warn_of_long_sweeps(area.optimizer, images.batches(config.batch_size), plastic)
    phase = Phase(model, plastic_areas, images, config.batch_size)
    if started.epoch:
        model.load_state_dict(started.model)
        if started.epoch <= plastic:
            phase.restore(started)
        started.restore_random(device)

    if ranks.count > 1 and config.diagnostics.every is not None:
        raise ValueError(
            f"diagnostics.every={config.diagnostics.every} does not work under torchrun; leave it out there"
        )
    if ranks.count > 1 and augment.frames > 1:
        raise ValueError(f"data.augment.frames={augment.frames} does not work under torchrun, which shares out images")
    if len(plastic_areas) > 1 and config.diagnostics.every is not None:
        raise ValueError(
            f"diagnostics.every={config.diagnostics.every} compares a rule with the gradient of one cost, and "
            "cost.areas gives several; leave one of them out"
        )
    inside = Diagnostics(plain["diagnostics"], model, layers, optimizer, images, started.diagnostics, started.fields)
    print(
        f"{config.optimizer.name} on {config.data.name} with {config.model.name} "
        f"({sum(p.numel() for p in model.parameters()):,} parameters), seed {config.seed}, {device}"
        + (f", going on after epoch {started.epoch}" if started.epoch else ""),
        flush=True,
    )
    covered = coverage(plastic_areas, model)
    passes, seconds, trained_images = started.forward_passes, started.seconds, started.images
    steps = started.steps

    log = logs.RunLog(folder, plain, started.wandb_id, started.history)
    try:
        for epoch in range(started.epoch + 1, config.epochs + 1):
            begin, inside.seconds = time.perf_counter(), 0.0
            if epoch > plastic and phase.module is model:
                close(plastic_areas)
                if not ranks.first:
                    return {}  # the readout is trained by one
                features = data.Features(images, _frozen(split(model)[0], config.amp), augment)
                phase = readout_phase(config, split(model)[1], features, plastic_areas[-1].cost, plastic)
                label = f"{type(phase.areas[0].optimizer).__name__} on the frozen trunk"
                covered |= {n: label for n, p in model.named_parameters() if p in set(phase.module.parameters())}
                if started.epoch > plastic:
                    phase.restore(started)
                else:
                    passes += features.kept * images.batches(config.batch_size)
            losses = torch.zeros(len(phase.areas), device=device)
            phase.train()
            batches = phase.source.training_batches(phase.batch_size, config.seed, epoch, augment)
            count = phase.source.batches(phase.batch_size)
            for inputs, labels in log.batches(batches, count, epoch):
                if splits and phase.module is model:
                    inputs, labels = ranks.share(inputs), ranks.share(labels)
                whole = phase.module is model
                around = functools.partial(inside.around, steps) if whole else contextlib.nullcontext
                try:
                    loss, taken = phase.step(inputs, labels, augment.frames, config.amp, around)
                except RuntimeError as error:
                    error.args = (f"{error} (epoch {epoch}, optimizer.lr={config.optimizer.lr})",)
                    raise
                losses += loss
                passes += taken * whole
                log.step(steps, loss[-1], inside.lines)
                interrupts.check()
                steps += 1
            passes += 0 if phase.source is images or features.kept else count
            train_losses = [loss / count for loss in losses.tolist()]  # also waits for the device
            seconds += (spent := time.perf_counter() - begin - inside.seconds)
            trained_images += count * phase.batch_size
            for area, train_loss in zip(phase.areas, train_losses, strict=True):
                if not math.isfinite(train_loss):
                    raise bioopt.Diverged(
                        f"optimizer={config.optimizer.name}: the loss{' of ' * bool(area.name)}{area.name} is "
                        f"{train_loss} in epoch {epoch} with optimizer.lr={config.optimizer.lr}; lower it"
                    )
            inside.epoch(folder)
            test_loss, test_accuracy = evaluate(phase.module, phase.areas[-1].cost, phase.source, augment, config.amp)
            log.epoch(
                {
                    "epoch": epoch,
                    "train_loss": train_losses[-1],
                    **{f"train_loss_{a.name}": x for a, x in zip(phase.areas[:-1], train_losses, strict=False)},
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    "images_per_second": count * phase.batch_size / spent,
                    "seconds": seconds,
                    "forward_passes": passes,
                    "weight_norms": weight_norms(layers),
                }
            )
            Progress(
                epoch=epoch,
                model=model.state_dict(),
                areas=[area.state_dict() for area in phase.areas],
                random=random_state(device),
                history=log.history,
                diagnostics=inside.lines,
                fields=inside.fields,
                forward_passes=passes,
                seconds=seconds,
                images=trained_images,
                steps=steps,
                wandb_id=log.wandb_id,
                config=started.config,
                environments=started.environments,
            ).save(folder)
        trained = sum(p.numel() for name, p in model.named_parameters() if covered[name] != "frozen")
        summary = _summary(config, log.history, seconds, passes, trained_images, trained, device, started.commit)
        title = f"{config.optimizer.name}, {config.model.name}, {config.data.name}, seed {config.seed}"
        made = [pictures.curves(log.history, title, folder / "curves.png")]
        fields = pictures.receptive_fields(
            model, images.shape, f"first layer: {title}", folder / "receptive_fields.png"
        )
        of_neurons = pictures.neurons(log.history, wins(model, layers, images), title, folder / "neurons.png")
        made += [picture for picture in (fields, of_neurons) if picture is not None]
        made += inside.pictures(model, title, folder)
        if config.afterwards is not None:
            found, drawn = instantiate(config.afterwards)(model=model, images=images, title=title, folder=folder)
            summary |= found
            made += drawn
        log.finish(summary, made, _told(summary, covered))
    finally:
        log.close()
        close(plastic_areas)
    return summary


@dataclass
class Phase:
    """A stretch of a run in which the areas of one module learn from one source of batches."""

    module: nn.Module
    areas: list[Area]
    source: data.Images | data.Features
    batch_size: int

    def train(self) -> None:
        """All are to learn."""
        self.module.train()
        for area in self.areas:
            area.train()

    def step(
        self,
        inputs: Tensor,
        labels: Tensor,
        frames: int,
        amp: bool,
        around: Callable[[Any], AbstractContextManager[None]],
    ) -> tuple[Tensor, int]:
        """A step of each area in turn, inside ``around`` its closure: their mean costs, and the passes it took."""
        losses, passes = [], []
        for area in self.areas:
            closure = area.closure(inputs, labels, steps=frames, amp=amp)
            try:
                with around(closure):
                    loss: Any = area.optimizer.step(closure)  # type: ignore[arg-type]
            except RuntimeError as error:
                if area.name:
                    error.args = (f"area {area.name}: {error}",)
                raise
            losses.append(loss.mean())
            if area.scheduler is not None:
                area.scheduler.step()
            ours = isinstance(area.optimizer, bioopt.LearningRule | bioopt.Mixed)
            passes.append(area.optimizer.forward_passes if ours else 1)  # type: ignore[attr-defined]
            if area is not self.areas[-1]:
                inputs = area.says(inputs, amp=amp)
        return torch.stack(losses), max(passes) + (len(passes) > 1)

    def restore(self, started: Progress) -> None:
        """Put costs, optimizers and schedules where they were."""
        for area, state in zip(self.areas, started.areas, strict=True):
            area.load_state_dict(state)


def plastic_epochs(config: DictConfig, model: nn.Module, areas: list[Area]) -> int:
    """The epochs in which everything learns; in what is left of them, the trunk is frozen and the readout learns."""
    if config.plastic_epochs is None:
        return int(config.epochs)
    if not isinstance(config.plastic_epochs, int) or config.plastic_epochs < 1:
        raise ValueError(f"plastic_epochs={config.plastic_epochs} must be an integer >= 1, or null")
    if config.plastic_epochs >= config.epochs:
        return int(config.epochs)
    head = set(split(model)[1].parameters())
    optimizer = areas[-1].optimizer
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if not isinstance(optimizer, bioopt.LearningRule | bioopt.Mixed) and len(areas) == 1 and not trained <= head:
        print(
            f"optimizer={config.optimizer.name} trains the whole network by gradients: plastic_epochs does not apply, "
            f"all of it learns for epochs={config.epochs}",
            flush=True,
        )
        return int(config.epochs)
    return int(config.plastic_epochs)


def readout_phase(
    config: DictConfig, head: nn.Module, source: data.Images | data.Features, cost: Cost, plastic: int
) -> Phase:
    """The second phase: the readout alone, by ``readout.optimizer`` and the cost that it has had."""
    head.requires_grad_(True)
    optimizer = made(f"readout.optimizer={config.readout.optimizer}", config.readout.optimizer, head.parameters())
    batch_size = config.readout.batch_size
    if not source.batches(batch_size):
        raise ValueError(f"readout.batch_size={batch_size} is larger than the training set")
    total = (config.epochs - plastic) * source.batches(batch_size)
    schedule = build_schedule(config.readout.schedule, optimizer, total)
    return Phase(head, [Area("", head, cost, optimizer, schedule)], source, batch_size)


def close(areas: list[Area]) -> None:
    """Take the hooks of their rules off the model."""
    for area in areas:
        if isinstance(area.optimizer, bioopt.LearningRule | bioopt.Mixed):
            area.optimizer.close()


def _frozen(trunk: nn.Module, amp: bool) -> Callable[[Tensor], Tensor]:
    trunk.eval()

    @torch.no_grad()
    def features(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            seen: Tensor = trunk(inputs)
        return seen.float()

    return features


def coverage(areas: list[Area], model: nn.Module) -> dict[str, str]:
    """Which rule trains each parameter of the model and its costs; plain torch optimizers train what they are given."""
    covered = dict.fromkeys((name for name, _ in model.named_parameters()), "frozen")
    for area in areas:
        where = f", {area.name}" if area.name else ""
        for module, prefix in ((model, ""), (area.cost, f"cost of {area.name}: ")):
            if isinstance(area.optimizer, bioopt.LearningRule | bioopt.Mixed):
                own = area.optimizer.coverage(module)
            else:
                trained = {p for group in area.optimizer.param_groups for p in group["params"] if p.requires_grad}
                label = type(area.optimizer).__name__
                own = {name: label if p in trained else "frozen" for name, p in module.named_parameters()}
            covered |= {prefix + name: label + where for name, label in own.items() if label != "frozen"}
    return covered


@torch.no_grad()
def evaluate(
    model: nn.Module, cost: Cost, images: data.Images | data.Features, augment: data.Augment, amp: bool
) -> tuple[float, float]:
    """Mean cost and accuracy (a fraction) on the test set, outputs averaged over the views of an image."""
    model.eval()
    cost.eval()
    device = images.test_labels.device
    loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
    for inputs, labels in images.test_batches(augment):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = model(inputs)
        outputs = outputs.float().unflatten(0, (-1, len(labels))).mean(0)
        loss += cost(outputs, labels).sum()
        right += (outputs.argmax(1) == labels).sum()
    count = len(images.test_labels)
    return loss.item() / count, right.item() / count


def weight_norms(layers: list[bioopt.Synapse]) -> dict[str, list[float]]:
    """The least, mean and largest length of the weight vectors of each layer's neurons."""
    norms = {s.name: s.weight.detach().flatten(1).norm(dim=1) for s in layers}
    return {name: torch.stack([n.min(), n.mean(), n.max()]).tolist() for name, n in norms.items()}


@torch.no_grad()
def wins(model: nn.Module, layers: list[bioopt.Synapse], images: data.Images, batch: int = 500) -> dict[str, Tensor]:
    """The share of events (samples and positions of one test batch) in which each neuron is its layer's most active."""
    found: dict[str, Tensor] = {}
    handles = []
    for synapse in layers:

        def count(layer: nn.Module, args: Any, u: Tensor, synapse: Any = synapse) -> None:
            winners = u.argmax(u.ndim + synapse.channel_dim).flatten()
            found[synapse.name] = torch.bincount(winners, minlength=len(synapse.weight)) / len(winners)

        handles.append(synapse.layer.register_forward_hook(count))
    model.eval()
    inputs, _ = next(images.test_batches(data.Augment(), batch))
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


def warn_of_long_sweeps(optimizer: torch.optim.Optimizer, batches: int, epochs: int) -> None:
    """Say so where serial perturbation will not even have visited each weight a few times."""
    if isinstance(optimizer, bioopt.SerialPerturbation):
        weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        sweeps = epochs * batches * optimizer.coordinates / weights
        if sweeps < 3:
            print(
                f"warning: serial perturbation visits {optimizer.coordinates} of {weights:,} weights a step: this run "
                f"makes {sweeps:.2f} sweeps and will learn little; try a smaller model, more epochs, or another rule",
                flush=True,
            )


def _summary(
    config: DictConfig,
    history: list[dict[str, Any]],
    seconds: float,
    passes: int,
    images: int,
    trained: int,
    device: torch.device,
    commit: str | None,
) -> dict[str, Any]:
    accuracies = [line["test_accuracy"] for line in history]
    return {
        "optimizer": config.optimizer.name,
        "model": config.model.name,
        "data": config.data.name,
        "seed": config.seed,
        "evaluated_on": f"the last {config.data.validation} training images" if config.data.validation else "test set",
        "test_accuracy": accuracies[-1],
        "best_test_accuracy": max(accuracies),
        "epochs": config.epochs,
        "seconds": seconds,
        "forward_passes": passes,
        "images_per_second": images / seconds if seconds else None,
        "trained_parameters": trained,
        "peak_memory_bytes": logs.peak_memory(device),
    } | circumstances(device, commit)


def _told(summary: dict[str, Any], coverage: dict[str, str]) -> list[str]:
    """What the terminal shows at the end."""
    by_rule: dict[str, list[str]] = {}
    for parameter, rule in coverage.items():
        by_rule.setdefault(rule, []).append(parameter)
    widest = max(28, *map(len, by_rule))
    return [
        "\nwhat trains what",
        *[f"  {rule:<{widest}} {', '.join(parameters)}" for rule, parameters in by_rule.items()],
        f"\ntest accuracy {summary['test_accuracy']:.2%} (best {summary['best_test_accuracy']:.2%}) after "
        f"{summary['epochs']} epochs, {summary['seconds']:.0f} s, {summary['forward_passes']:,} forward passes",
    ]
