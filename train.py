"""Train a network by a learning rule of the brain, or by one of the controls.

python train.py optimizer=hebbian data=mnist model=cnn seed=0
python train.py -m optimizer=hebbian,sgd seed=0,1,2
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import interrupts
from experiments.config import renamed_word, saved, with_new_names
from experiments.options import check, check_names, rules_by_name


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """One run, or one of a sweep; an expected error ends it with a sentence."""
    others = [option for option in HydraConfig.get().overrides.task if not option.startswith("resume=")]
    if config.resume is not None and others and HydraConfig.get().mode == RunMode.RUN:
        sys.exit(f"error: resume={config.resume} continues with the options of that run; leave out {' '.join(others)}")
    config = with_new_names(config)
    # Imported where they are needed, so that --help is quick.
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from experiments.sweeps import run_one

        run_one(config)
        return
    try:
        # Mistakes in the options are reported before imports that take seconds.
        if config.resume is None:
            check(config)
        else:
            saved(Path(str(config.resume)))
        from experiments.run import run

        run(config)
    except (ValueError, TypeError, RuntimeError, OSError, OmegaConfBaseException, InstantiationException) as error:
        interrupts.check()  # a rank whose peers were interrupted before it
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        # Hydra's message names what it could not build; the cause has the reason.
        cause = error.__cause__ if isinstance(error, InstantiationException) else None
        why = f"{str(error).split(', set env var')[0]}: {cause}" if cause is not None else error
        sys.exit(f"error: {why}\n(HYDRA_FULL_ERROR=1 shows where)")


def expanded(word: str) -> str:
    """An override whose value is a path below the home folder, which shells expand at the start of words alone."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).expanduser()}" if value.startswith("~/") else word


def optimizers() -> str:
    """For ``--help``: a line for each optimizer, by family, from the first line of its file."""
    lines: dict[str, list[str]] = {}
    for path in sorted((Path(__file__).parent / "conf" / "optimizer").glob("*.yaml")):
        with path.open(encoding="utf-8") as file:
            first = file.readline().strip()
        if not first.startswith("# "):
            first = "# Others: "
        family, _, text = first.removeprefix("# ").partition(": ")
        lines.setdefault(family, []).append(f"  {path.stem:<22} {text}")
    order = sorted(lines, key=lambda family: (family == "Control", family))
    return "\n".join("\n".join([family, *lines[family]]) for family in order)


OmegaConf.register_new_resolver("optimizers", optimizers, replace=True)
# Lists of the configuration, as values of a sweep.
OmegaConf.register_new_resolver("listed", ",".join, replace=True)
OmegaConf.register_new_resolver("rules", lambda chosen: ",".join(rules_by_name(chosen)), replace=True)

if __name__ == "__main__":
    with interrupts.reported():
        sys.argv[1:] = [expanded(renamed_word(word)) if "=" in word else word for word in sys.argv[1:]]
        words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
        own = any(word.startswith(("--config", "-c", "hydra.searchpath")) for word in sys.argv[1:])
        try:
            check_names([] if own else words)
        except ValueError as error:
            sys.exit(f"error: {error}")
        main()
