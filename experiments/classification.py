"""Image classification: a round is an epoch of training by any optimizer, and a test."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import bioopt
from bioopt import find_synapses

from . import data, interrupts, pictures, receptive_fields
from .building import build_model, build_schedule, final_analysis, freeze
from .config import resolved
from .control import control_accuracy
from .diagnostics import Diagnostics, wins
from .learner import Block, Learner
from .pace import Phase
from .phases import frozen, plastic_epochs, plastic_learner, readout_learner, split
from .ranks import Ranks
from .tasks import Task
from .verdict import Expected


class Classification(Task):
    """A network learns to classify the images of a data set, in one phase or two.

    In the first phase everything learns. After ``plastic_epochs``, if there are any epochs left, the trunk is frozen
    and the readout alone learns, on features that are computed once where possible.

    Args:
        config: of the run.
        device: where to compute.
        ranks: the processes of the run.

    Raises:
        ValueError: options that do not fit together, or do not fit the data or the model.
    """

    unit = "epoch"

    def __init__(self, config: DictConfig, device: torch.device, ranks: Ranks) -> None:
        self.config, self.device, self.ranks = config, device, ranks
        self.rounds = int(config.epochs)
        with ranks.first_alone():  # it may have to download the data
            self.images = data.from_config(config.data, device)
        if config.data.validation:
            self.images = self.images.hold_out(config.data.validation)
            print(f"data.validation: 'test' below means the last {config.data.validation} training images", flush=True)
        self.augment = data.Augment(**config.data.augment)
        batches = self.images.batches(config.batch_size)
        if not batches:
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the {len(self.images.train_labels)} training images"
            )
        self.model = build_model(config, self.images).to(device)
        self.start = receptive_fields.first_weights(self.model)  # of a resumed run too: it draws the same weights
        *self.layers, readout = find_synapses(self.model)  # before any is frozen
        self.readout = readout.layer
        freeze(self.model, config.frozen)
        self.learner = plastic_learner(config, self.model, self.images, ranks.group)
        optimizer = self.learner.last.optimizer
        self.splits = isinstance(optimizer, bioopt.LearningRule) and optimizer.splits_batch
        if self.splits and config.batch_size % ranks.count:
            raise ValueError(f"batch_size={config.batch_size} cannot be shared equally by {ranks.count} ranks")
        self.plastic = plastic_epochs(config, self.learner)
        if self.plastic < config.epochs:  # reports mistakes in the options of the second phase before the first
            head = nn.Linear(1, 1, device="meta")
            readout_learner(config, head, self.images, self.learner.last.cost, self.plastic)
        for block in self.learner.blocks:
            block.scheduler = build_schedule(config.schedule, block.optimizer, self.plastic * batches)
            warn_of_long_sweeps(block.optimizer, batches, self.plastic)
        self._check_combinations()
        options = resolved(config)["diagnostics"]
        self.diagnostics = Diagnostics(options, self.model, self.layers, optimizer, self.images)
        self.analyse = final_analysis(config)
        self.covered = self.learner.coverage()
        self.features: data.Features | None = None  # in the second phase
        self.readout_state: list[dict[str, Any]] | None = None  # where a run is resumed in the second phase
        self.steps = self.trained_images = self.forward_passes = 0

    def _check_combinations(self) -> None:
        every, side = self.config.diagnostics.every, min(self.images.shape[1:])
        if self.augment.crop >= side:
            raise ValueError(
                f"data.augment.crop={self.augment.crop} moves images of {side} pixels out of sight; it is at most "
                f"{side - 1}"
            )
        if self.ranks.count > 1 and every is not None:
            raise ValueError(f"diagnostics.every={every} does not work under torchrun; leave it out there")
        if self.ranks.count > 1 and self.augment.frames > 1:
            raise ValueError(
                f"data.augment.frames={self.augment.frames} does not work under torchrun, which splits batches"
            )
        if len(self.learner.blocks) > 1 and every is not None:
            raise ValueError(
                f"diagnostics.every={every} compares a rule with the gradient of one cost, and "
                "cost.blocks gives several; leave one of them out"
            )

    def round(self, number: int) -> dict[str, Any] | None:
        """One epoch; none on other ranks than the first where the readout alone is left to train."""
        begin, self.diagnostics.seconds = time.perf_counter(), 0.0
        if number > self.plastic and self.features is None:
            self.learner.close()
            if not self.ranks.first:
                return None
            self._begin_readout()
        whole = self.features is None
        source: data.Images | data.Features = self.images if self.features is None else self.features
        batch_size = self.config.batch_size if whole else self.config.readout.batch_size
        count = source.batches(batch_size)
        losses = torch.zeros(len(self.learner.blocks), device=self.device)
        self.learner.moment = f"epoch {number}"
        self.learner.train()
        batches = source.training_batches(batch_size, self.config.seed, number, self.augment)
        for inputs, labels in self.log.batches(batches, count, f"epoch {number}/{self.rounds}"):
            if self.splits and whole:
                inputs, labels = self.ranks.share(inputs), self.ranks.share(labels)
            around = functools.partial(self.diagnostics.around, self.steps) if whole else contextlib.nullcontext
            loss = self.learner.step(inputs, labels, around)
            losses += loss
            self.forward_passes += self.learner.forward_passes * whole
            self.log.step(self.steps, loss[-1], self.diagnostics.lines)
            interrupts.check()
            self.steps += 1
        if self.features is not None and not self.features.kept:
            self.forward_passes += count
        train_losses = [loss / count for loss in losses.tolist()]  # also waits for the device
        spent = time.perf_counter() - begin - self.diagnostics.seconds
        self.trained_images += count * batch_size
        self.learner.check_losses(train_losses)
        self.diagnostics.epoch(self.log.folder)
        test_loss, test_accuracy = self.learner.evaluate(source.test_batches(self.augment))
        of_blocks = zip(self.learner.blocks[:-1], train_losses, strict=False)
        return {
            "train_loss": train_losses[-1],
            **{f"train_loss_{block.name}": loss for block, loss in of_blocks},
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "images_per_second": count * batch_size / spent,
            "seconds": spent,
            "forward_passes": self.forward_passes,
            "weight_norms": weight_norms(self.layers),
        }

    def _begin_readout(self) -> None:
        """Freeze the trunk, compute its features, and continue with a learner of the readout."""
        trunk, head = split(self.model)
        self.features = data.Features(self.images, frozen(trunk, self.config.amp), self.augment, self._watched)
        self.learner = readout_learner(self.config, head, self.features, self.learner.last.cost, self.plastic)
        if self.readout_state is not None:
            self.learner.load_state_dict(self.readout_state)
        else:
            self.forward_passes += self.features.kept * self.images.batches(self.config.batch_size)

    def _predicted(self) -> Tensor:
        """The class of each test image, as in `round`."""
        source, learner = self.features or self.images, self.learner
        if self.features is None and self.readout_state is not None:  # the run was resumed after its last epoch
            plain = Block(self.model, learner.last.cost, torch.optim.SGD(self.model.parameters()))
            learner = Learner(self.model, [plain], amp=self.config.amp)
        outputs, _ = learner.predict(source.test_batches(self.augment))
        return outputs.argmax(1)

    def _covered(self) -> dict[str, str]:
        """What has trained each parameter."""
        if self.plastic == self.rounds:
            return self.covered
        label = f"{self.config.readout.optimizer._target_.rpartition('.')[2]} on the frozen trunk"
        head = set(split(self.model)[1].parameters())
        return self.covered | {name: label for name, p in self.model.named_parameters() if p in head}

    def _watched(self, batches: Iterator[Any], total: int, label: str) -> Iterator[Any]:
        """Batches whose progress is shown, and between which the run can be interrupted."""
        for batch in self.log.batches(batches, total, label):
            yield batch
            interrupts.check()

    def state_dict(self) -> dict[str, Any]:
        """The model, the blocks of the phase, diagnostics and counts."""
        return {
            "model": self.model.state_dict(),
            "blocks": self.learner.state_dict(),
            "readout_phase": self.features is not None,
            "diagnostics": self.diagnostics.lines,
            "fields": self.diagnostics.fields,
            "forward_passes": self.forward_passes,
            "images": self.trained_images,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the second phase begins with the next round."""
        self.model.load_state_dict(state["model"])
        if state["readout_phase"]:
            self.readout_state = state["blocks"]
        else:
            self.learner.load_state_dict(state["blocks"])
        self.diagnostics.lines, self.diagnostics.fields = state["diagnostics"], state["fields"]
        self.forward_passes, self.trained_images, self.steps = state["forward_passes"], state["images"], state["steps"]

    def close(self) -> None:
        """Remove the hooks of rules from the model."""
        self.learner.close()

    def heading(self, config: DictConfig, device: torch.device) -> str:
        """The optimizer, the data set, the network and the seed."""
        weights = sum(p.numel() for p in self.model.parameters())
        return (
            f"{config.optimizer.name} on {config.data.name} with {config.model.name} ({weights:,} parameters), "
            f"seed {config.seed}, {device}"
        )

    def shown(self, line: dict[str, Any]) -> str:
        """Loss, accuracy and speed of an epoch."""
        return (
            f"train loss {line['train_loss']:.4f}   test accuracy {line['test_accuracy']:7.2%}   "
            f"{line['images_per_second']:,.0f} images/s"
        )

    def logged(self, line: dict[str, Any]) -> dict[str, Any]:
        """The numbers of an epoch by their names in W&B."""
        names = {"train_loss": "train/epoch_loss", "test_loss": "test/loss", "test_accuracy": "test/accuracy"}
        norms = {f"weight_norm/{layer}": mean for layer, (_, mean, _) in line["weight_norms"].items()}
        return {names.get(name, name): value for name, value in line.items() if name != "weight_norms"} | norms

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """The pictures of the run, and the numbers of ``final_analysis``."""
        shown = [pictures.curves(history, title, folder / "curves.png")]
        shares = wins(self.model, self.layers, self.images)
        ends = receptive_fields.first_weights(self.model)
        of_first = shares.get(self.layers[0].name) if self.layers else None
        fields = receptive_fields.before_and_after(
            self.start, ends, of_first, self.images.shape, f"first layer: {title}", folder / "receptive_fields.png"
        )
        of_neurons = pictures.neurons(history, shares, title, folder / "neurons.png")
        shown += [picture for picture in (fields, of_neurons) if picture is not None]
        shown += self.diagnostics.pictures(self._predicted, title, folder)
        found: dict[str, float] = {}
        if self.analyse is not None:
            found, drawn = self.analyse(model=self.model, images=self.images, title=title, folder=folder)
            shown += drawn
        return found, shown

    def summarize(
        self, config: DictConfig, history: list[dict[str, Any]], seconds: float, folder: Path
    ) -> tuple[dict[str, Any], list[Path], list[str]]:
        """The summary, pictures, and the terminal's last lines: the parameters by rule, and the accuracy."""
        accuracies, covered = [line["test_accuracy"] for line in history], self._covered()
        held_out = config.data.validation
        summary = {
            "optimizer": config.optimizer.name,
            "model": config.model.name,
            "data": config.data.name,
            "seed": config.seed,
            "evaluated_on": f"the last {held_out} training images" if held_out else "test set",
            "test_accuracy": accuracies[-1],
            "best_test_accuracy": max(accuracies),
            "epochs": config.epochs,
            "seconds": seconds,
            "forward_passes": self.forward_passes,
            "images_per_second": self.trained_images / seconds if seconds else None,
            "trained_parameters": sum(
                p.numel() for name, p in self.model.named_parameters() if covered[name] != "frozen"
            ),
        }
        title = f"{config.optimizer.name}, {config.model.name}, {config.data.name}, seed {config.seed}"
        found, shown = self.finish(history, title, folder)
        by_rule: dict[str, list[str]] = {}
        for parameter, rule in covered.items():
            by_rule.setdefault(rule, []).append(parameter)
        widest = max(28, *map(len, by_rule))
        lines = [
            "\nparameters by rule",
            *[f"  {rule:<{widest}} {', '.join(parameters)}" for rule, parameters in by_rule.items()],
            f"\ntest accuracy {summary['test_accuracy']:.2%} (best {summary['best_test_accuracy']:.2%}) after "
            f"{config.epochs} epoch{'s' * (config.epochs > 1)}, {seconds:.0f} s, "
            f"{self.forward_passes:,} forward passes",
        ]
        control, remarks = self._control()
        return summary | control | found, shown, lines + remarks

    def phases(self) -> Sequence[Phase]:
        """Epochs in which everything learns, and those of the readout alone."""
        if self.plastic == self.rounds:
            return [Phase(self.rounds)]
        return [
            Phase(self.plastic, name="the whole network"),
            Phase(self.rounds - self.plastic, name="the readout", apart=1),  # which computes features first
        ]

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """The accuracy of the run's control, if it was measured."""
        found, steps = summary["control_test_accuracy"], summary["control_steps"]
        if found is None:
            return {}
        warning = (
            f"warning: below its control: the same network with a random, frozen trunk reaches {found:.2%}, its "
            f"readout trained for {steps:,} of the run's {self.steps:,} steps; see docs/rules/controls.md"
        )
        few = "" if steps == self.steps else f", in only {steps:,} of {self.steps:,} steps: too few to compare"
        return {"test_accuracy": [Expected([found], f"of its control{few}", warning)]}

    def _control(self) -> tuple[dict[str, Any], list[str]]:
        """The accuracy of the run's control and its steps, and a line where it could not be measured.

        There is none on other ranks than the first, and where no trunk learns.
        """
        nothing = {"control_test_accuracy": None, "control_steps": None}
        readout = set(self.readout.parameters())
        trunk = [name for name, p in self.model.named_parameters() if p not in readout]
        share = float(self.config.get("control") or 0)  # a run that is resumed may be older than this option
        steps = min(self.steps, int(share * self.forward_passes))
        if not steps or not self.ranks.first or all(self.covered[name] == "frozen" for name in trunk):
            return nothing, []
        try:
            found = control_accuracy(self.config, self.images, steps)
        except (ValueError, TypeError, RuntimeError) as error:  # the run is complete without it
            return nothing, [f"its control was not measured ({error}); control=false leaves it out"]
        return {"control_test_accuracy": found, "control_steps": steps}, []


def weight_norms(layers: list[bioopt.Synapse]) -> dict[str, list[float]]:
    """The least, mean and largest norm of the weight vectors of each layer's neurons."""
    norms = {s.name: s.weight.detach().flatten(1).norm(dim=1) for s in layers}
    return {name: torch.stack([n.min(), n.mean(), n.max()]).tolist() for name, n in norms.items()}


def warn_of_long_sweeps(optimizer: torch.optim.Optimizer, batches: int, epochs: int) -> None:
    """Print a warning where serial perturbation will not visit each weight even a few times."""
    if isinstance(optimizer, bioopt.SerialPerturbation):
        weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        sweeps = epochs * batches * optimizer.coordinates / weights
        if sweeps < 3:
            print(
                f"warning: serial perturbation visits {optimizer.coordinates} of {weights:,} weights a step: this run "
                f"makes {sweeps:.2f} sweeps and will learn little; try a smaller model, more epochs, or another rule",
                flush=True,
            )
