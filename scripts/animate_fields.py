"""Draw receptive fields while they develop, as an animated GIF.

python scripts/animate_fields.py fields.gif optimizer=hebbian optimizer.homeostasis=false model=mlp data=mnist epochs=1

The options are those of train.py. Pictures are taken before the first step and then at equal ratios of steps, as most
changes early.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from experiments import building, data, receptive_fields

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Read the options, train, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the GIF to write")
    parser.add_argument("options", nargs="*", help="of train.py")
    parser.add_argument("--frames", type=int, default=24, help="pictures (24)")
    parser.add_argument("--neurons", type=int, default=60, help="the most to draw (60)")
    parser.add_argument("--columns", type=int, default=12, help="neurons in a row (12)")
    chosen = parser.parse_args()
    if chosen.frames < 2:
        parser.error(f"--frames {chosen.frames} must be at least 2")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", chosen.options)
    try:
        snapshots, shape, accuracy = learned(config, chosen.frames, chosen.neurons)
        receptive_fields.animation(snapshots, shape, chosen.columns, chosen.out)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{chosen.out}: {len(snapshots)} pictures, test accuracy {accuracy:.2%} at the end")


def learned(config: DictConfig, frames: int, neurons: int) -> tuple[list[Tensor], tuple[int, int, int], float]:
    """Train a network; returns weights of its first layer before, during and after, an image's shape, and accuracy."""
    torch.manual_seed(config.seed)
    images = data.from_config(config.data, torch.device("cpu"))
    model = building.build_model(config, images)
    steps = config.epochs * images.batches(config.batch_size)
    learner = building.build_learner(config, model, config.optimizer.name, "optimizer", steps)
    taken = {round(steps ** (frame / (frames - 1))) for frame in range(frames)}
    snapshots, step = [receptive_fields.first_weights(model, neurons)], 0
    for epoch in range(1, config.epochs + 1):
        for batch in images.training_batches(config.batch_size, config.seed, epoch, data.Augment()):
            learner.fit([batch])
            step += 1
            if step in taken:
                snapshots.append(receptive_fields.first_weights(model, neurons))
    accuracy = learner.evaluate(images.test_batches(data.Augment()))[1]
    learner.close()
    return [weights for weights in snapshots if weights is not None], images.shape, accuracy


if __name__ == "__main__":
    main()
