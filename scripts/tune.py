"""Search an optimizer's options with Optuna, on held-out training images; trials are kept, and a study can be resumed.

python scripts/tune.py optimizer=hebbian data=mnist 'optimizer.lr=tag(log, interval(0.1, 10))' --trials 20
python scripts/tune.py optimizer=hebbian model=cnn 'optimizer.decay=subspace,own' 'optimizer.k=range(1,4)' --name decay

Ranges to search are written as in Hydra's sweeps: interval(a, b), of integers where both are; tag(log, ...);
choice(...) or a,b,c; range(...). The study is runs/<name>/study.db, with its runs in the same folder; the same command
resumes it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments import interrupts
from experiments.checks import check_inside_runs
from experiments.config import name_of, resolved
from experiments.options import check_names
from experiments.sweeps import isolated

CONF = str(Path(__file__).parent.parent / "conf")


def suggest(trial: Any, override: Override) -> str:
    """The value that Optuna suggests next for one option."""
    key, sweep = override.key_or_group, override.value()
    try:
        if isinstance(sweep, IntervalSweep):
            whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
            draw = trial.suggest_int if whole else trial.suggest_float
            return f"{key}={draw(key, sweep.start, sweep.end, log='log' in sweep.tags)}"
        return f"{key}={trial.suggest_categorical(key, list(override.sweep_string_iterator()))}"
    except ValueError as error:
        raise ValueError(
            f"{override.input_line} cannot be searched ({str(error).rstrip('.')}); correct the range; if this "
            "study has another range for it, start a new study with --name"
        ) from None


def composed(overrides: list[str]) -> dict[str, Any]:
    """The configuration of a run, with images held out."""
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("config", overrides)
        if config.task is not None:
            raise ValueError(f"experiment={config.task.name} has no test accuracy to maximise")
        if not config.data.validation:
            config.data.validation = {"digits": 300, "stl10": 1000}.get(config.data.name, 10_000)
        config.control = False  # no trial needs it
    return resolved(config)


def main() -> None:
    """Search, then print the best options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="+", help="options of train.py, at least one of them with a range to search")
    parser.add_argument("--trials", type=int, default=20, help="number of finished trials, including earlier ones")
    parser.add_argument("--name", help="name of the study; by default made from the options")
    chosen = parser.parse_args()
    if chosen.trials < 1:
        parser.error(f"--trials {chosen.trials} must be at least 1")
    try:
        import optuna
    except ImportError:
        parser.exit(1, "error: this needs Optuna: pip install -e '.[tune]'\n")
    try:
        overrides = OverridesParser.create().parse_overrides(chosen.options)
    except HydraException as error:
        parser.exit(1, f"error: {error}\n")
    searched = [o for o in overrides if isinstance(o.value(), IntervalSweep | ChoiceSweep | RangeSweep)]
    fixed = [str(o.input_line) for o in overrides if o not in searched]
    if not searched:
        parser.exit(
            1, "error: nothing to search: give at least one option as a range, such as interval(a, b) or a,b,c\n"
        )

    name = chosen.name or name_of(chosen.options)
    try:
        check_names(chosen.options)
        check_inside_runs("--name", name)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    interrupts.resume_with(shlex.join(["python", "scripts/tune.py", *sys.argv[1:]]))
    folder = Path("runs") / name
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}", study_name=name, load_if_exists=True, direction="maximize"
        )
    except Exception as error:  # of the disk, of SQLAlchemy, of Optuna's tables
        why = str(error).splitlines()[0]
        parser.exit(1, f"error: {folder / 'study.db'} cannot be used ({why}); choose another --name\n")
    # Another seed each time: a resumed study does not draw its first points again.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), n_startup_trials=5)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # interrupted: once more
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def accuracy(trial: optuna.Trial) -> float:
        options = [suggest(trial, override) for override in searched]
        print(f"\n[trial {trial.number}] {' '.join(options)}", flush=True)
        config = composed([*fixed, *options]) | {"run_dir": str(folder / f"trial-{trial.number}")}
        found: float = isolated(config)["test_accuracy"]
        return found

    finished = optuna.trial.TrialState.COMPLETE
    while len(study.get_trials(states=[finished])) < chosen.trials:
        trial = study.ask()
        try:
            study.tell(trial, accuracy(trial))
        except RuntimeError as error:  # it may have diverged: report it to Optuna, and continue
            print(f"failed: {str(error).splitlines()[-1]}", flush=True)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if len(study.trials) >= 3 * chosen.trials:
                break
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            parser.exit(1, f"error: {error}\n")
    done = len(study.get_trials(states=[finished]))
    if not done:
        parser.exit(1, f"error: no trial finished; see above, and {folder}\n")
    best = study.best_trial
    options = [f"{key}={value}" for key, value in best.params.items()]
    print(f"\nbest of {done}: {best.value:.2%} on held-out images (trial {best.number}); all trials are in {folder}")
    print(shlex.join(["python", "train.py", *fixed, *options]))


if __name__ == "__main__":
    with interrupts.reported():
        main()
