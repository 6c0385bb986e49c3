"""One training loop for every optimizer: a plain closure, `optimizer.step(closure)`, and a checkpoint an epoch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import bioopt
from bioopt.recorder import find_synapses

from . import data, logs, pictures, tasks
from .diagnostics import Diagnostics
from .ranks import Ranks
from .runs import Progress, choose_device, circumstances, code_version, new_folder, random_state, saved
from .sweeps import resolved


def run(config: DictConfig) -> dict[str, Any]:
    """Train as the configuration says, or go on with an interrupted run; returns the summary."""
    commit = code_version()  # now: the files may change under a long run
    ranks = Ranks()
    resumed = None if config.resume is None else Path(config.resume)
    if resumed is not None:
        config = saved(resumed)
    if config.task is not None and ranks.count > 1:
        raise ValueError(f"experiment={config.task.name} runs in one process; start it without torchrun")
    with ranks.joined(choose_device(config.device).type) as device:
        shared = resumed or ranks.from_first(new_folder(config) if ranks.first else None)
        started = Progress.load(shared, device)
        with ranks.folder(shared) as folder:
            if config.task is not None:
                return tasks.perform(config, started, folder, device, commit)
            return _train(config, started, folder, device, ranks, commit)


def _train(
    config: DictConfig, started: Progress, folder: Path, device: torch.device, ranks: Ranks, commit: str | None
) -> dict[str, Any]:
    plain = resolved(config)
    if not ranks.first:
        plain["logger"]["mode"] = "disabled"
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with ranks.first_alone():  # it may have to fetch the data
        images = data.load(config.data.name, config.data.root, device)
    if config.data.validation:
        images = images.hold_out(config.data.validation)
        print(f"data.validation: 'test' below means the last {config.data.validation} training images", flush=True)
    augment = data.Augment(**config.data.augment)
    if config.epochs and not images.batches(config.batch_size):
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {len(images.train_labels)} training images"
        )

    model = build_model(config, images).to(device)
    layers = find_synapses(model)[:-1]  # now, before any is frozen; the readout is no matter
    freeze(model, config.frozen)
    optimizer = build_optimizer(config, model, ranks.group)
    splits = isinstance(optimizer, bioopt.LearningRule) and optimizer.splits_batch
    if splits and config.batch_size % ranks.count:
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {ranks.count} ranks alike")
    plastic = plastic_epochs(config, model, optimizer)
    total = plastic * images.batches(config.batch_size)
    phase = Phase(model, optimizer, build_schedule(config.schedule, optimizer, total), images, config.batch_size)
    warn_of_long_sweeps(optimizer, images.batches(config.batch_size), plastic)
    if started.epoch:
        model.load_state_dict(started.model)
        if started.epoch <= plastic:
            phase.restore(started)
        started.restore_random(device)

    if ranks.count > 1 and config.diagnostics.every is not None:
        raise ValueError(
            f"diagnostics.every={config.diagnostics.every} does not work under torchrun; leave it out there"
        )
    inside = Diagnostics(plain["diagnostics"], model, layers, optimizer, images, started.diagnostics, started.fields)
    log = logs.RunLog(folder, plain, started.wandb_id, started.history)
    print(
        f"{config.optimizer.name} on {config.data.name} with {config.model.name} "
        f"({sum(p.numel() for p in model.parameters()):,} parameters), seed {config.seed}, {device}"
        + (f", going on after epoch {started.epoch}" if started.epoch else ""),
        flush=True,
    )
    covered = coverage(optimizer, model)
    passes, seconds, trained_images = started.forward_passes, started.seconds, started.images
    steps = started.steps

    def closure_of(inputs: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            phase.optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                outputs = phase.module(inputs)
                losses = F.cross_entropy(outputs, labels, reduction="none", label_smoothing=config.label_smoothing)
            if losses.requires_grad:
                torch.autograd.backward(losses.mean())
            return losses

        return closure

    try:
        for epoch in range(started.epoch + 1, config.epochs + 1):
            begin, inside.seconds = time.perf_counter(), 0.0
            if epoch > plastic and phase.module is model:
                close(optimizer)
                if not ranks.first:
                    return {}  # the readout is trained by one
                features = data.Features(images, _frozen(split(model)[0], config.amp), augment)
                phase = readout_phase(config, split(model)[1], features, config.epochs - plastic)
                label = f"{type(phase.optimizer).__name__} on the frozen trunk"
                covered |= {n: label for n, p in model.named_parameters() if p in set(phase.module.parameters())}
                if started.epoch > plastic:
                    phase.restore(started)
                else:
                    passes += features.kept * images.batches(config.batch_size)
            losses = torch.zeros((), device=device)
            phase.module.train()
            batches = phase.source.training_batches(phase.batch_size, config.seed, epoch, augment)
            count = phase.source.batches(phase.batch_size)
            for inputs, labels in log.batches(batches, count, epoch):
                if splits and phase.module is model:
                    inputs, labels = ranks.share(inputs), ranks.share(labels)
                if isinstance(phase.optimizer, bioopt.SynapticRule):
                    phase.optimizer.target = labels  # of readout=teacher
                closure = closure_of(inputs, labels)
                measured = inside.around(steps, closure) if phase.module is model else contextlib.nullcontext()
                try:
                    with measured:
                        loss: Tensor = phase.optimizer.step(closure).mean()  # type: ignore[arg-type, attr-defined]
                except RuntimeError as error:
                    raise RuntimeError(f"{error} (epoch {epoch}, optimizer.lr={config.optimizer.lr})") from error
                if phase.scheduler is not None:
                    phase.scheduler.step()
                if phase.module is model:
                    ours = isinstance(optimizer, bioopt.LearningRule | bioopt.Mixed)
                    passes += optimizer.forward_passes if ours else 1  # type: ignore[attr-defined]
                losses += loss
                log.step(steps, loss, inside.lines)
                steps += 1
            passes += 0 if phase.source is images or features.kept else count
            train_loss = losses.item() / count  # also waits for the device
            seconds += (spent := time.perf_counter() - begin - inside.seconds)
            trained_images += count * phase.batch_size
            if not math.isfinite(train_loss):
                raise RuntimeError(
                    f"optimizer={config.optimizer.name}: the loss is {train_loss} in epoch {epoch} with "
                    f"optimizer.lr={config.optimizer.lr}; lower it"
                )
            inside.epoch(folder)
            test_loss, test_accuracy = evaluate(phase.module, phase.source, augment, config.amp)
            log.epoch(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
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
                optimizer=phase.optimizer.state_dict(),
                scheduler=phase.scheduler.state_dict() if phase.scheduler is not None else {},
                random=random_state(device),
                history=log.history,
                diagnostics=inside.lines,
                fields=inside.fields,
                forward_passes=passes,
                seconds=seconds,
                images=trained_images,
                steps=steps,
                wandb_id=log.wandb_id,
            ).save(folder)
        trained = sum(p.numel() for name, p in model.named_parameters() if covered[name] != "frozen")
        summary = _summary(config, log.history, seconds, passes, trained_images, trained, device, commit)
        title = f"{config.optimizer.name}, {config.model.name}, {config.data.name}, seed {config.seed}"
        made = [pictures.curves(log.history, title, folder / "curves.png")] if log.history else []
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
        close(optimizer)
    return summary


@dataclass
class Phase:
    """A stretch of a run in which one optimizer trains one module on one source of batches."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    source: data.Images | data.Features
    batch_size: int

    def restore(self, started: Progress) -> None:
        """Put optimizer and schedule where they were."""
        self.optimizer.load_state_dict(started.optimizer)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(started.scheduler)


def plastic_epochs(config: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The epochs in which everything learns; in what is left of them, the trunk is frozen and the readout learns."""
    if config.plastic_epochs is None:
        return int(config.epochs)
    if not isinstance(config.plastic_epochs, int) or config.plastic_epochs < 1:
        raise ValueError(f"plastic_epochs={config.plastic_epochs} must be an integer >= 1, or null")
    if config.plastic_epochs >= config.epochs:
        return int(config.epochs)
    head = set(split(model)[1].parameters())
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if not isinstance(optimizer, bioopt.LearningRule | bioopt.Mixed) and not trained <= head:
        print(
            f"optimizer={config.optimizer.name} trains the whole network by gradients: plastic_epochs does not apply, "
            f"all of it learns for epochs={config.epochs}",
            flush=True,
        )
        return int(config.epochs)
    return int(config.plastic_epochs)


def split(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Trunk and head of a sequential network, of shared modules; the head is the readout, with its norm and dropout."""
    children = list(model.children())
    linear = [i for i, child in enumerate(children) if isinstance(child, nn.Linear)]
    if not isinstance(model, nn.Sequential) or not linear or linear[-1] != len(children) - 1:
        raise ValueError("plastic_epochs needs a model that is an nn.Sequential and ends with its readout, a Linear")
    first = linear[-1]
    while first and isinstance(children[first - 1], nn.Dropout | nn.BatchNorm1d):
        first -= 1
    return model[:first], model[first:]


def readout_phase(config: DictConfig, head: nn.Module, features: data.Features, epochs: int) -> Phase:
    """The second phase: the readout alone, by ``readout.optimizer``."""
    head.requires_grad_(True)
    optimizer = instantiate(config.readout.optimizer, head.parameters(), _convert_="all")
    batch_size = config.readout.batch_size
    schedule = build_schedule(config.readout.schedule, optimizer, epochs * features.batches(batch_size))
    return Phase(head, optimizer, schedule, features, batch_size)


def close(optimizer: torch.optim.Optimizer) -> None:
    """Take a rule's hooks off the model."""
    if isinstance(optimizer, bioopt.LearningRule | bioopt.Mixed):
        optimizer.close()


def _frozen(trunk: nn.Module, amp: bool) -> Callable[[Tensor], Tensor]:
    trunk.eval()

    @torch.no_grad()
    def features(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
            seen: Tensor = trunk(inputs)
        return seen.float()

    return features


def build_model(config: DictConfig, images: data.Images) -> nn.Module:
    """The network of ``model=``, for the shape and classes of the data."""
    options = {k: v for k, v in config.model.items() if k != "name"}
    model: nn.Module = instantiate(options, shape=images.shape, classes=images.classes, _convert_="all")
    return model.to(memory_format=torch.channels_last)  # half the time


def freeze(model: nn.Module, parts: Sequence[str | int]) -> None:
    """Keep these parts of the model, by their names, at their random start."""
    for part in map(str, parts):
        try:
            model.get_submodule(part).requires_grad_(False)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"frozen={part} is not a part of the model; it has {names}") from None


def build_optimizer(
    config: DictConfig, model: nn.Module, group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """The optimizer of ``optimizer=``: rules get the model or its parts, plain torch optimizers their parameters."""
    options = {k: v for k, v in config.optimizer.items() if k not in ("name", "per_data", "per_model", "schedule")}
    make = instantiate(options, _partial_=True, _convert_="all")
    parts = OmegaConf.to_container(config.optimizer.get("per_model", {}).get(config.model.name, OmegaConf.create()))
    try:
        is_class = isinstance(make.func, type)  # or a function that takes the model, as the random trunk is
        rule = is_class and issubclass(make.func, bioopt.LearningRule)
        if group is not None and not rule:
            raise ValueError("it does not speak to other ranks; run it without torchrun")
        together = {"process_group": group} if group is not None else {}
        given = groups(model, parts) if rule else parameters(groups(model, parts)) if is_class else model
        optimizer: torch.optim.Optimizer = make(given, **together)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer={config.optimizer.name}: {error}") from error
    return optimizer


def groups(model: nn.Module, parts: Any) -> Any:
    """The model, or groups of its modules where there are options for parts: each takes those of the nearest part."""
    parts = _flat(parts)
    if not parts:
        return model
    made: dict[str, dict[str, Any]] = {}
    present = dict(model.named_modules())
    for name in parts:
        if name not in present:
            raise ValueError(f"per_model has options for '{name}', which is not a part of the model")
    for name, module in present.items():
        if [*module.parameters(recurse=False)]:
            part = max((part for part in parts if f"{name}.".startswith(f"{part}.")), key=len, default="")
            made.setdefault(part, {"params": [], **parts.get(part, {})})["params"].append((name, module))
    return list(made.values())


def parameters(given: Any) -> list[dict[str, Any]]:
    """A model, or groups of its parts, as groups of parameters, which is what plain torch optimizers take."""
    made = given if isinstance(given, list) else [{"params": [("", given)]}]
    seen: set[nn.Parameter] = set()
    result = []
    for group in made:
        found = [p for _, module in group["params"] for p in module.parameters() if p not in seen]
        seen |= set(found)
        result.append({**group, "params": found})
    return result


def _flat(parts: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """``{"trunk": {"block1": {"lr": 1}}}`` as ``{"trunk.block1": {"lr": 1}}``; what is no part's is left out."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in (parts or {}).items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
            if own := {key: option for key, option in value.items() if not isinstance(option, dict)}:
                found[prefix + name] = own
    return found


def build_schedule(
    name: str, optimizer: torch.optim.Optimizer, total: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The learning rate over ``total`` steps, by its option ``schedule=cosine|constant|halving``."""
    if name == "constant":
        return None
    if name == "halving":
        at = [int(total * fraction) for fraction in (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)]
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, at, gamma=0.5)
    if name != "cosine":
        raise ValueError(f"schedule={name} must be cosine, constant or halving")
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total, 1))


def coverage(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, str]:
    """Which rule trains each parameter of the model; plain torch optimizers train what they were given."""
    if isinstance(optimizer, bioopt.LearningRule | bioopt.Mixed):
        return optimizer.coverage(model)
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    return {name: type(optimizer).__name__ if p in trained else "frozen" for name, p in model.named_parameters()}


@torch.no_grad()
def evaluate(
    model: nn.Module, images: data.Images | data.Features, augment: data.Augment, amp: bool
) -> tuple[float, float]:
    """Mean loss and accuracy (a fraction) on the test set, outputs averaged over the views of an image."""
    model.eval()
    device = images.test_labels.device
    loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
    for inputs, labels in images.test_batches(augment):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = model(inputs)
        outputs = outputs.float().unflatten(0, (-1, len(labels))).mean(0)
        loss += F.cross_entropy(outputs, labels, reduction="sum")
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
        "test_accuracy": accuracies[-1] if accuracies else None,
        "best_test_accuracy": max(accuracies, default=None),
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
    return [
        "\nwhat trains what",
        *[f"  {rule:<28} {', '.join(parameters)}" for rule, parameters in by_rule.items()],
        f"\ntest accuracy {summary['test_accuracy']:.2%} (best {summary['best_test_accuracy']:.2%}) after "
        f"{summary['epochs']} epochs, {summary['seconds']:.0f} s, {summary['forward_passes']:,} forward passes",
    ]
