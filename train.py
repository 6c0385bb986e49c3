"""Train a network by a learning rule of the brain, or by one of the controls.

python train.py optimizer=hebbian data=mnist model=cnn seed=0
python train.py -m optimizer=hebbian,sgd seed=0,1,2
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import sweeps


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """One run; what goes wrong in a known way is told in a sentence."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        sweeps.run_one(config)
        return
    from experiments.training import run  # torch: not before it is needed

    try:
        run(config)
    except (ValueError, TypeError, RuntimeError, OSError, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.exit(f"error: {error}\n(HYDRA_FULL_ERROR=1 shows where)")


if __name__ == "__main__":
    main()
