"""The control of a finished run: the same network with a random, frozen trunk and the same readout."""

from __future__ import annotations

import itertools

import torch
from omegaconf import DictConfig, OmegaConf

from . import data, interrupts
from .building import build_model, build_schedule
from .options import CONF
from .phases import plastic_learner


def control_config(config: DictConfig) -> DictConfig:
    """The options of a run with ``optimizer=random_trunk``, whose readout learns as that of the run."""
    control = config.copy()
    OmegaConf.set_struct(control, False)
    control.optimizer = OmegaConf.load(CONF / "optimizer" / "random_trunk.yaml")
    control.optimizer.lr = config.optimizer.get("readout_lr")
    control.optimizer.update(config.optimizer.get("readout_options") or {})
    control.cost.blocks = None
    return control


def control_accuracy(config: DictConfig, images: data.Images, steps: int) -> float:
    """The accuracy of a run's control on the test images; torch's random state stays as it was.

    Args:
        config: of the run.
        images: on the device where to compute.
        steps: for which the readout learns, from the batches of the run's first steps.

    Raises:
        ValueError: the readout cannot be trained on such a network.
        RuntimeError: the training fails, such as by `bioopt.Diverged`.
    """
    control, augment = control_config(config), data.Augment(**config.data.augment)
    device = images.train_images.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # the run's own initial weights
        model = build_model(control, images).to(device)
        learner = plastic_learner(control, model, images)
        learner.last.scheduler = build_schedule(config.schedule, learner.last.optimizer, steps)
        epochs = (images.training_batches(config.batch_size, config.seed, n, augment) for n in itertools.count(1))
        learner.train()
        for inputs, labels in itertools.islice(itertools.chain.from_iterable(epochs), steps):
            loss = learner.step(inputs, labels)
            interrupts.check()
        learner.check_losses(loss.tolist())
        _, accuracy = learner.evaluate(images.test_batches(augment))
        learner.close()
    return accuracy
