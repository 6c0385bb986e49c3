"""Keep the result of finished runs, and make the tables from what was kept.

    python scripts/record.py mnist-cnn-hebbian runs/...-seed0 runs/...-seed1    # a record: same options, several seeds
    python scripts/record.py benchmark runs/benchmark-small                     # all cells of experiment=benchmark
    python scripts/record.py                                                    # only write the tables

A record is ``experiments/records/<name>/result.json`` with the pictures of its first run; the tables go to
``experiments/records/README.md``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.benchmark import Mismatch, collected
from experiments.benchmark_report import draw
from experiments.config import flat, run_group
from experiments.files import write_json, write_whole
from experiments.finished import NothingToReport, Run, find
from experiments.options import rules_by_name
from experiments.report_page import markdown_text, number
from experiments.statistics import interval, percent, plain

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "records"
LARGEST = 300_000  # bytes of a picture
LISTED = 50  # numbers of a record; pages of the documentation show those of larger ones
# What the summary of any training run has.
USUAL = {
    *("optimizer", "model", "data", "seed", "evaluated_on", "test_accuracy", "best_test_accuracy", "epochs", "seconds"),
    *("forward_passes", "images_per_second", "trained_parameters", "peak_memory_bytes", "device", "torch", "commit"),
}
OF_CONTROL = {"control_test_accuracy", "control_steps"}  # of the short control that a run measures at its end


def record(name: str, runs: list[Path]) -> None:
    """Write one record from finished runs that differ only in their seed.

    Raises:
        SystemExit: one of them cannot be recorded; nothing is written.
    """
    if not runs or name in ("", ".", "..") or Path(name).name != name:
        raise SystemExit(
            f"error: a record is a plain name and the folders of its runs, not {name} with {len(runs)} runs"
        )
    found = sorted(map(read, runs), key=lambda run: run.summary["seed"])
    summaries, options = [run.summary for run in found], found[0].options
    if any(run.options != options for run in found):
        raise SystemExit(f"error: the runs of record {name} differ in more than their seed")
    if len({summary["seed"] for summary in summaries}) < len(found):
        raise SystemExit(f"error: two runs of record {name} have the same seed")
    first = summaries[0]
    result = {"task": first["task"]} if "task" in first else described(first, changes(options)[1])
    result["seeds"] = [summary["seed"] for summary in summaries]
    if "task" in first:
        result["measured"] = measured(name, [summary["measured"] for summary in summaries], first["measured"])
    else:
        accuracies = [summary["test_accuracy"] for summary in summaries]
        result |= {"test_accuracy": accuracies, "mean": statistics.fmean(accuracies), "ci95": interval(accuracies)}
        more = [key for key in first if key not in USUAL | OF_CONTROL and number(first[key])]  # of `final_analysis`
        result |= {"measured": measured(name, summaries, more)} if more else {}
        result |= {"epochs": first["epochs"], "forward_passes": first["forward_passes"]}
    result |= {
        "device": first["device"],
        "precision": "bf16" if options.get("amp") else "fp32",
        "seconds": statistics.fmean(summary["seconds"] for summary in summaries),
        "commit": ", ".join(sorted({str(summary["commit"]) for summary in summaries})),
        "command": command(*changes(options, experiment_of(options)), result["seeds"]),
    }
    folder = RECORDS / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", result)
    for former in folder.glob("*.png"):
        former.unlink()
    for picture in found[0].folder.glob("*.png"):
        if picture.name == "neurons.png":
            continue
        if picture.stat().st_size < LARGEST:
            shutil.copy(picture, folder / picture.name)
        else:  # in fewer colours
            with Image.open(picture) as drawn:
                drawn.convert("RGB").quantize(64).save(folder / picture.name, optimize=True)


def record_benchmark(name: str, folders: list[Path]) -> None:
    """Write the record of a benchmark: all its cells, and its pictures.

    Raises:
        SystemExit: a cell is missing or failed, or they have different options; nothing is written.
    """
    try:
        runs, skipped = find(folders)
        benchmark = collected(runs)
    except (NothingToReport, Mismatch) as error:
        raise SystemExit(f"error: {error}") from None
    if skipped:
        raise SystemExit(f"error: not all cells are there; run the benchmark again: {'; '.join(skipped)}")
    everything = len(benchmark.data) * len(benchmark.networks) * len(benchmark.rules)
    if len(benchmark.cells) < everything:
        raise SystemExit(f"error: {len(benchmark.cells)} of {everything} cells are there; run the benchmark again")
    summaries = [run.summary for run in runs]
    first = summaries[0]["seed"]
    result = {
        "task": "benchmark",
        "seeds": list(range(first, first + benchmark.protocol["seeds"])),
        "protocol": benchmark.protocol,
        "device": summaries[0]["device"],
        "precision": summaries[0]["precision"],
        "seconds": sum(summary["seconds"] for summary in summaries),
        "commit": ", ".join(sorted({str(summary["commit"]) for summary in summaries})),
        "command": benchmark_command(benchmark.protocol, benchmark.data, benchmark.networks, benchmark.rules, first),
        "cells": benchmark.cells,
    }
    folder = RECORDS / name
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "result.json", by_line(result))
    for picture in draw(benchmark, folder):
        picture.with_suffix(".pdf").unlink()  # records have pictures as PNG alone


def benchmark_command(
    protocol: dict[str, Any], data: list[str], networks: list[str], rules: list[str], seed: int
) -> str:
    """The command that makes the same cells: of the size in conf/benchmark from which they differ least."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    found = {f"benchmark.{key}": value for key, value in protocol.items() if key != "amp"}
    lists = {"data": data, "networks": networks, "rules": rules}
    commands = []
    for size in ("small", "full"):
        choices = ["experiment=benchmark", *([f"benchmark={size}"] if size != "small" else [])]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            usual: Any = OmegaConf.to_container(compose("config", choices), resolve=True)
        plain = {f"benchmark.{key}": value for key, value in flat(usual["benchmark"]).items()}
        changed = {key: value for key, value in found.items() if plain.get(key) != value}
        for key, names in lists.items():
            known = usual["benchmark"][key]
            if {*names} != {*(rules_by_name(known) if key == "rules" else known)}:
                changed[f"benchmark.{key}"] = f"[{','.join(names)}]"
        changed |= {"amp": protocol["amp"]} if protocol["amp"] else {}
        changed |= {"seed": seed} if seed else {}
        commands.append((len(changed), command(choices, changed)))
    return min(commands)[1]


def by_line(result: dict[str, Any]) -> str:
    """A benchmark's record as JSON, with a line for each cell, so that changes can be read."""
    head = json.dumps({key: value for key, value in result.items() if key != "cells"}, indent=2)
    cells = ",\n".join(f"    {json.dumps(cell)}" for cell in result["cells"])
    return f'{head[:-2]},\n  "cells": [\n{cells}\n  ]\n}}\n'


def read(folder: Path) -> Run:
    """A finished run that has all that a record needs."""
    try:
        run = Run.read(folder)
    except ValueError as error:
        raise SystemExit(f"error: {folder}: {error}") from None
    needed = {"seconds", "device", "commit"}
    if "task" not in run.summary:
        needed |= USUAL - {"images_per_second", "evaluated_on", "peak_memory_bytes", "torch", "trained_parameters"}
    # Outside a git checkout there is no commit.
    if missing := sorted(k for k in needed if run.summary.get(k) is None and not (k == "commit" and k in run.summary)):
        raise SystemExit(f"error: {folder}: it is damaged: summary.json has no {', '.join(missing)}")
    return run


def measured(name: str, summaries: list[dict[str, Any]], keys: Iterable[str]) -> dict[str, list[float]]:
    """A number for each run under each of these keys."""
    found = {key: [summary.get(key) for summary in summaries] for key in keys}
    for key, values in found.items():
        if not all(map(number, values)):
            raise SystemExit(f"error: the runs of record {name} have {key}={values}, not a number each")
    return found


def described(summary: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The data set, the model and the optimizer."""
    options = {key: value for key, value in changed.items() if key.startswith("model.")}
    return {key: summary[key] for key in ("data", "model", "optimizer")} | {"model_options": options}


def experiment_of(options: dict[str, Any]) -> str | None:
    """The experiment that a run must name: the only one with its task, or with its final analysis."""
    marks = {key: options[key] for key in ("task._target_", "final_analysis._target_") if key in options}
    names = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")) if marks else []
    return next((name for name in names if marks.items() <= composed([f"experiment={name}"]).items()), None)


def changes(options: dict[str, Any], experiment: str | None = None) -> tuple[list[str], dict[str, Any]]:
    """The choices of a run, within an experiment or without, and all that differs from their defaults.

    With Hydra's ``+`` where those have none, and ``~`` for an optimizer's option that was taken out.
    """
    chosen = [] if experiment is None else [f"experiment={experiment}"]
    own = composed(chosen)
    names = {group: options[f"{group}.name"] for group in ("optimizer", "model", "data", "cost")}
    always = () if experiment is not None else ("optimizer", "model", "data")
    chosen += [f"{g}={name}" for g, name in names.items() if g in always or own[f"{g}.name"] != name]
    plain = composed(chosen)
    changed = {
        key if key in plain else f"+{key}": value
        for key, value in options.items()
        if not key.startswith("optimizer.per_data.")  # its values are in epochs and the like
        and (key not in plain or plain[key] != value)
    }
    inside = {".".join(key.split(".")[:2]) for key in options}
    gone = {".".join(key.split(".")[:2]) for key in plain if key.startswith(("optimizer.", "task."))} - inside
    changed |= dict.fromkeys((f"~{key}" for key in gone if key != "optimizer.per_data"), None)
    return chosen, dict(sorted(changed.items()))


def composed(choices: list[str]) -> dict[str, Any]:
    """The options of a run of these choices."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return run_group(OmegaConf.to_container(compose("config", choices), resolve=True))


def command(choices: list[str], changed: dict[str, Any], seeds: list[int] | None = None) -> str:
    """The command that makes the same runs; without seeds, that of a sweep of its own."""
    options = [
        key if key.startswith("~") else f"{key}={'null' if value is None else value}".replace(" ", "")
        for key, value in changed.items()
    ]
    if seeds is None:
        return shlex.join(["python", "train.py", *choices, *options])
    many = len(seeds) > 1
    seed = "seed=" + ",".join(map(str, seeds))
    return shlex.join(["python", "train.py", *(["-m"] if many else []), *choices, *options, seed])


def tables() -> str:
    """One table a data set, the best first, with the difference to the random trunk on the same seeds."""
    kept = {path.parent.name: stored(path) for path in sorted(RECORDS.glob("*/result.json"))}
    results = [result for result in kept.values() if "task" not in result]
    text = [
        "# Measured results\n",
        "Written by `python scripts/record.py` from `*/result.json` in this folder. Test accuracy in %, mean ± 95 %",
        "confidence interval over the seeds; of two seeds, both numbers. The difference to the random trunk is",
        "paired by seed. Commands, at the end, restate options whose defaults have changed since. A rule may have",
        "changed as well: `commit` in `result.json` names the code that was run.\n",
    ]
    for data in sorted({result["data"] for result in results}):
        text += [f"## {markdown_text(data)}\n"]
        text += [
            "| model | optimizer | test accuracy | seeds | minus random trunk | epochs | forward passes | s a run |"
        ]
        text += ["|---|---|---:|---:|---:|---:|---:|---:|"]
        for result in sorted((r for r in results if r["data"] == data), key=lambda r: (r["model"], -r["mean"])):
            text += [
                f"| {markdown_text(network(result))} | {markdown_text(learner(result))} "
                f"| {percent(result['test_accuracy'])} | {len(result['seeds'])} | {to_random(result, results)} "
                f"| {result['epochs']} | {result['forward_passes']:,} | {result['seconds']:.0f} |"
            ]
        text += [""]
    measuring = {name: result["measured"] for name, result in kept.items() if "measured" in result}
    if measuring:
        text += ["## Experiments, and what was measured after training\n", "| record | | mean ± 95 % | seeds |"]
        text += ["|---|---|---:|---:|"]
    for name, numbers in measuring.items():
        if len(numbers) > LISTED:
            text += [f"| {markdown_text(name)} | [{len(numbers)} numbers](./{name}/result.json) | | |"]
            continue
        names = [markdown_text(what.replace("_", " ")) for what in numbers]
        rows = zip(names, numbers.values(), strict=True)
        text += [f"| {markdown_text(name)} | {what} | {plain(v)} | {len(v)} |" for what, v in rows]
    text += [
        *([""] if measuring else []),
        "## Commands\n",
        "```bash",
        *[result["command"] for result in kept.values()],
        "```",
    ]
    return "\n".join(text) + "\n"


def stored(path: Path) -> dict[str, Any]:
    """The contents of a record.

    Raises:
        SystemExit: it is damaged.
    """
    needed = {"seeds": list, "command": str}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "task" not in found:
            needed |= dict.fromkeys(("data", "model", "optimizer"), str) | {"test_accuracy": list, "mean": float}
            needed |= {"epochs": int, "forward_passes": int, "seconds": float}
        wrong = [key for key, kind in needed.items() if not isinstance(found.get(key), kind)]
        lists = [*found.get("measured", {}).values(), found.get("test_accuracy", [0])]
        wrong += ["measured"] * (not all(values and all(map(number, values)) for values in lists))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SystemExit(f"error: {path} is damaged: {error}") from None
    if wrong:
        raise SystemExit(f"error: {path} is damaged: see its {', '.join(wrong)}")
    return found


def network(result: dict[str, Any]) -> str:
    """The model and what was chosen of it."""
    options = [f"{key.removeprefix('model.')}={value}" for key, value in result.get("model_options", {}).items()]
    return ", ".join([result["model"], *options])


def learner(result: dict[str, Any]) -> str:
    """The optimizer and what was chosen of it, but for its rate, and what stays frozen."""
    chosen = [part for part in shlex.split(result["command"]) if part.startswith(("optimizer.", "frozen="))]
    options = [part.removeprefix("optimizer.") for part in chosen if not part.startswith("optimizer.lr=")]
    return ", ".join([result["optimizer"], *options])


def readout_of(result: dict[str, Any]) -> set[str]:
    """What was chosen of a readout that is trained by itself."""
    return {part for part in shlex.split(result["command"]) if part.startswith("readout.")}


def to_random(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The paired difference to the random trunk with the same readout, on the seeds and epochs that both have."""
    for other in results:
        alike = all(other.get(key) == result.get(key) for key in ("data", "model", "model_options", "epochs"))
        same = alike and readout_of(other) == readout_of(result)
        if other["optimizer"] == "random_trunk" and same and other is not result:
            theirs = dict(zip(other["seeds"], other["test_accuracy"], strict=True))
            pairs = zip(result["seeds"], result["test_accuracy"], strict=True)
            gaps = [accuracy - theirs[seed] for seed, accuracy in pairs if seed in theirs]
            if gaps:
                return percent(gaps, "+")
    return ""


def main() -> None:
    """Record, then make the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?")
    parser.add_argument("runs", nargs="*", type=Path)
    options = parser.parse_args()
    if options.name == "benchmark":
        record_benchmark(options.name, options.runs)
    elif options.name:
        record(options.name, options.runs)
    write_whole(RECORDS / "README.md", tables())


if __name__ == "__main__":
    main()
