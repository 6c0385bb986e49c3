"""Build the project's W&B dashboard in code: a saved view of its workspace.

    python scripts/wandb_dashboard.py --entity E --project bioopt --data mnist --model cnn   # only these runs
    python scripts/wandb_dashboard.py --entity E --project bioopt                            # all runs
    python scripts/wandb_dashboard.py --entity E --project bioopt --dry-run                  # print it, offline

It needs `wandb-workspaces` (`pip install -e '.[dashboard]'`); each call saves a new view. The first section and bars
average over all runs of an optimizer, so choose a data set and a model if the project has several. All other curves
average over a W&B group: runs that differ only in their seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

try:
    import wandb
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
except ImportError:
    sys.exit("error: the dashboard needs wandb-workspaces: pip install -e '.[dashboard]'")

AXES = {"epoch": "epochs", "forward_passes": "forward passes", "seconds": "seconds"}
OPTIMIZER = wr.Config("optimizer.name")
DIAGNOSTICS = {
    "cosine": "cosine of update and gradient",
    "signal_to_noise": "signal-to-noise ratio of the updates",
    "feedback_angle": "angle between feedback and forward weights (degrees)",
    "error_angle": "angle between error and that of backpropagation (degrees)",
    "update_angle": "angle between update and gradient (degrees)",
    "error_rank": "participation ratio of the error",
    "update_ratio": "norm of the update / norm of the weights",
    "sparsity": "sparsity of activity",
    "dead_units": "dead units",
    "dimensionality": "dimensionality of activity",
}
PICTURES = ("curves", "receptive_fields", "neurons", "confusion", "misclassified")


def line(title: str, x: str, *y: str, by: Any = "Group", band: str = "minmax", **options: Any) -> wr.LinePlot:
    """Metrics against an axis: the mean of each group of runs, and a band over its seeds."""
    return wr.LinePlot(
        title=title, x=x, y=list(y), groupby=by, groupby_aggfunc="mean", groupby_rangefunc=band, **options
    )


def bars(title: str, key: str) -> wr.BarPlot:
    """A number of the summary: the mean of each optimizer's runs, and its standard error."""
    return wr.BarPlot(title=title, metrics=[key], groupby=OPTIMIZER, groupby_aggfunc="mean", groupby_rangefunc="stderr")


def dashboard(entity: str, project: str, data: str | None = None, model: str | None = None) -> ws.Workspace:
    """The whole view.

    Args:
        entity: user or team.
        project: the runs' ``logger.project``.
        data: only runs on this data set.
        model: only runs of this network.
    """
    accuracy = "test/accuracy"
    sections = {
        "Accuracy of the optimizers, ± standard error": [
            *(line(f"test accuracy against {AXES[x]}", x, accuracy, by=OPTIMIZER, band="stderr") for x in AXES),
            bars("test accuracy at the end", "test_accuracy"),
            bars("best test accuracy", "best_test_accuracy"),
        ],
        "Accuracy of each group, least and most of its seeds": [
            line(f"test accuracy against {AXES[x]}", x, accuracy) for x in AXES
        ],
        "Loss": [
            line("training loss, steps", "step", "train/loss", log_y=True),
            line("training loss, epochs", "epoch", "train/epoch_loss", log_y=True),
            line("test loss", "epoch", "test/loss", log_y=True),
        ],
        "Cost": [
            line("images per second", "epoch", "images_per_second"),
            bars("images per second, whole run", "images_per_second"),
            bars("seconds of training", "seconds"),
            bars("forward passes", "forward_passes"),
            bars("peak memory, bytes", "peak_memory_bytes"),
            bars("trained parameters", "trained_parameters"),
            *(
                wr.ScatterPlot(title=f"test accuracy against {AXES[x]}", x=x, y="test_accuracy", log_x=True)
                for x in ("forward_passes", "seconds")
            ),
        ],
        # The names of layers differ between runs, so panels match all metrics with this beginning.
        "Alignment and activity of the layers": [
            line(title, "step", metric_regex=f"^diagnostics/{name}/.+$") for name, title in DIAGNOSTICS.items()
        ],
        "Weights": [line("mean norm of the neurons' weight vectors", "epoch", metric_regex="^weight_norm/.+$")],
        "Pictures": [
            wr.MediaBrowser(title=name.replace("_", " "), media_keys=[f"pictures/{name}"]) for name in PICTURES
        ],
    }
    only = {key: value for key, value in {"data": data, "model": model}.items() if value is not None}
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Optimizers" + (f" on {', '.join(only.values())}" if only else ""),
        sections=[
            ws.Section(
                name=name,
                panels=panels,
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=math.ceil(len(panels) / 3)),
            )
            for name, panels in sections.items()
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            # W&B keeps each entry of a config under its "value"; filters, unlike groups, must include that.
            filters=[ws.Config(f"{key}.value.name") == value for key, value in only.items()],
            pinned_columns=[
                f"summary:{key}" for key in ("test_accuracy", "best_test_accuracy", "seconds", "forward_passes")
            ],
        ),
    )


def save(view: ws.Workspace) -> None:
    """Save the view, or report what is missing."""
    if not wandb.login(prompt=False):
        sys.exit("error: not logged in to W&B: run `wandb login` or set WANDB_API_KEY (--dry-run needs neither)")
    try:
        _ = wandb.Api().project(view.project, view.entity).id  # checked here for a clear error
    except ValueError:
        sys.exit(f"error: this account cannot see a W&B project {view.entity}/{view.project}; upload a run first")
    view.save()  # which prints its address


def main() -> None:
    """Save the dashboard, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", required=True, help="the runs' logger.project")
    parser.add_argument("--data", help="only runs on this data set")
    parser.add_argument("--model", help="only runs of this network")
    parser.add_argument("--dry-run", action="store_true", help="print it as JSON, without network or account")
    arguments = parser.parse_args()
    view = dashboard(arguments.entity, arguments.project, arguments.data, arguments.model)
    if arguments.dry_run:
        print(json.dumps(view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True), indent=2))
        return
    try:
        save(view)
    except Exception as error:  # network, account, or W&B's own libraries
        sys.exit(f"error: W&B: {error}")


if __name__ == "__main__":
    main()
