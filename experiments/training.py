"""One training loop for every optimizer: a plain closure, `optimizer.step(closure)`, and a checkpoint an epoch."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import bioopt

from . import data, logs, pictures


def run(config: DictConfig) -> dict[str, Any]:
    """Train as the configuration says, or go on with an interrupted run; returns the summary."""
    commit = _commit()  # now: the files may change under a long run
    config, folder = _open_folder(config)
    plain = _resolved(config)
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    images = data.load(config.data.name, config.data.root, device)
    if config.data.validation:
        images = images.hold_out(config.data.validation)
        print(f"data.validation: 'test' below means the last {config.data.validation} training images", flush=True)
    augment = data.Augment(**config.data.augment)
    total = config.epochs * images.batches(config.batch_size)
    if total == 0 and config.epochs:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {len(images.train_labels)} training images"
        )

    model = build_model(config, images).to(device)
    optimizer = build_optimizer(config, model)
    scheduler = build_schedule(config.schedule, optimizer, total)
    started = _Progress.load(folder, device)
    if started.epoch:
        model.load_state_dict(started.model)
        optimizer.load_state_dict(started.optimizer)
        if scheduler is not None:
            scheduler.load_state_dict(started.scheduler)
        torch.set_rng_state(started.random["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(started.random["cuda"], device)
    warn_of_long_sweeps(optimizer, images.batches(config.batch_size), config.epochs)

    log = logs.RunLog(folder, plain, started.wandb_id, started.history)
    print(
        f"{config.optimizer.name} on {config.data.name} with {config.model.name} "
        f"({sum(p.numel() for p in model.parameters()):,} parameters), seed {config.seed}, {device}"
        + (f", going on after epoch {started.epoch}" if started.epoch else ""),
        flush=True,
    )
    passes, seconds, trained_images = started.forward_passes, started.seconds, started.images

    def closure_of(inputs: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            nonlocal passes
            passes += 1
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                losses = F.cross_entropy(model(inputs), labels, reduction="none")
            if losses.requires_grad:
                torch.autograd.backward(losses.mean())
            return losses

        return closure

    try:
        for epoch in range(started.epoch + 1, config.epochs + 1):
            begin = time.perf_counter()
            losses = torch.zeros((), device=device)
            model.train()
            batches = images.training_batches(config.batch_size, config.seed, epoch, augment)
            count = images.batches(config.batch_size)
            for i, (inputs, labels) in enumerate(log.batches(batches, count, epoch)):
                try:
                    loss: Tensor = optimizer.step(closure_of(inputs, labels)).mean()  # type: ignore[arg-type, attr-defined]
                except RuntimeError as error:
                    raise RuntimeError(f"{error} (epoch {epoch}, optimizer.lr={config.optimizer.lr})") from error
                if scheduler is not None:
                    scheduler.step()
                losses += loss
                log.step((epoch - 1) * count + i, loss)
            train_loss = losses.item() / count  # also waits for the device
            seconds += time.perf_counter() - begin
            trained_images += count * config.batch_size
            if not math.isfinite(train_loss):
                raise RuntimeError(
                    f"optimizer={config.optimizer.name}: the loss is {train_loss} in epoch {epoch} with "
                    f"optimizer.lr={config.optimizer.lr}; lower it"
                )
            test_loss, test_accuracy = evaluate(model, images, config.amp)
            log.epoch(
                {
                    "epoch": epoch,
                    "train_loss": train_loss,
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    "images_per_second": count * config.batch_size / (time.perf_counter() - begin),
                    "seconds": seconds,
                    "forward_passes": passes,
                }
            )
            _Progress(
                epoch=epoch,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scheduler=scheduler.state_dict() if scheduler is not None else {},
                random={"cpu": torch.get_rng_state()}
                | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}),
                history=log.history,
                forward_passes=passes,
                seconds=seconds,
                images=trained_images,
                wandb_id=log.wandb_id,
            ).save(folder)
        summary = _summary(config, log.history, seconds, passes, trained_images, device, commit)
        title = f"{config.optimizer.name}, {config.model.name}, {config.data.name}, seed {config.seed}"
        made = [pictures.curves(log.history, title, folder / "curves.png")] if log.history else []
        fields = pictures.receptive_fields(
            model, images.shape, f"first layer: {title}", folder / "receptive_fields.png"
        )
        made += [fields] if fields is not None else []
        log.finish(summary, coverage(optimizer, model), made)
    finally:
        log.close()
        if isinstance(optimizer, bioopt.LearningRule | bioopt.Mixed):
            optimizer.close()
    return summary


def choose_device(name: str) -> torch.device:
    """The device by its option ``device=auto|cpu|cuda``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA GPU here; use device=cpu or device=auto")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device={name} must be auto, cpu or cuda")
    return torch.device(name)


def build_model(config: DictConfig, images: data.Images) -> nn.Module:
    """The network of ``model=``, for the shape and classes of the data."""
    options = {k: v for k, v in config.model.items() if k != "name"}
    model: nn.Module = instantiate(options, shape=images.shape, classes=images.classes, _convert_="all")
    return model.to(memory_format=torch.channels_last)  # half the time


def build_optimizer(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``optimizer=``: rules get the model, plain torch optimizers its parameters."""
    options = {k: v for k, v in config.optimizer.items() if k not in ("name", "per_data")}
    make = instantiate(options, _partial_=True, _convert_="all")
    try:
        plain = isinstance(make.func, type) and not issubclass(make.func, bioopt.LearningRule)
        optimizer: torch.optim.Optimizer = make(model.parameters() if plain else model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer={config.optimizer.name}: {error}") from error
    return optimizer


def build_schedule(
    name: str, optimizer: torch.optim.Optimizer, total: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The learning rate over a run of ``total`` steps, by its option ``schedule=cosine|constant``."""
    if name == "constant":
        return None
    if name != "cosine":
        raise ValueError(f"schedule={name} must be cosine or constant")
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total, 1))


def coverage(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, str]:
    """Which rule trains each parameter of the model; plain torch optimizers train what they were given."""
    if isinstance(optimizer, bioopt.LearningRule | bioopt.Mixed):
        return optimizer.coverage(model)
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    return {name: type(optimizer).__name__ if p in trained else "frozen" for name, p in model.named_parameters()}


@torch.no_grad()
def evaluate(model: nn.Module, images: data.Images, amp: bool) -> tuple[float, float]:
    """Mean loss and accuracy (a fraction) on the test set."""
    model.eval()
    device = images.test_labels.device
    loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
    for inputs, labels in images.test_batches():
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = model(inputs)
        loss += F.cross_entropy(outputs.float(), labels, reduction="sum")
        right += (outputs.argmax(1) == labels).sum()
    count = len(images.test_labels)
    return loss.item() / count, right.item() / count


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


def _open_folder(config: DictConfig) -> tuple[DictConfig, Path]:
    """The run's folder and its configuration: a new one, or those of the run that is to go on."""
    if config.resume is not None:
        folder = Path(config.resume)
        if not (folder / "config.yaml").exists():
            raise ValueError(f"resume={config.resume} is not a run's folder: it has no config.yaml")
        if (folder / "summary.json").exists():
            raise ValueError(f"resume={config.resume} has finished: see its summary.json")
        saved = OmegaConf.load(folder / "config.yaml")
        assert isinstance(saved, DictConfig)
        return saved, folder
    _check(config)
    wanted = Path(config.run_dir)
    for attempt in range(1, 1000):
        folder = wanted if attempt == 1 else wanted.with_name(f"{wanted.name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"run_dir={config.run_dir} cannot be written: {error.strerror}") from None
    OmegaConf.save(OmegaConf.create(_resolved(config)), folder / "config.yaml")
    return config, folder


def _check(config: DictConfig) -> None:
    for name, least in {"epochs": 0, "batch_size": 1, "seed": 0}.items():
        if not isinstance(config[name], int) or config[name] < least:
            raise ValueError(f"{name}={config[name]} must be an integer >= {least}")
    if config.threads is not None and (not isinstance(config.threads, int) or config.threads < 1):
        raise ValueError(f"threads={config.threads} must be an integer >= 1, or null")


def _resolved(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _summary(
    config: DictConfig,
    history: list[dict[str, Any]],
    seconds: float,
    passes: int,
    images: int,
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
        "peak_memory_bytes": logs.peak_memory(device),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "commit": commit,
    }


def _commit() -> str | None:
    """The commit of the code that runs, with a ``+`` where files differ from it; none outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        done = [
            subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return done[0] + ("+" if done[1] else "")


@dataclass
class _Progress:
    """What a run needs to go on after its last whole epoch, bit for bit."""

    epoch: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    forward_passes: int = 0
    seconds: float = 0.0
    images: int = 0
    wandb_id: str | None = None

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.pt``, whole or not at all."""
        part = folder / "checkpoint.pt.part"
        torch.save(vars(self), part)
        part.replace(folder / "checkpoint.pt")

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> _Progress:
        """Read ``checkpoint.pt``; the very start where there is none yet."""
        path = folder / "checkpoint.pt"
        if not path.exists():
            return cls()
        progress = cls(**torch.load(path, map_location=device, weights_only=True))
        progress.random = {name: state.cpu() for name, state in progress.random.items()}
        return progress
