"""The picture of `delayed_reward`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from ..pictures import BLUE, ORANGE, saved, style, uncluttered

if TYPE_CHECKING:
    from .delayed_reward import DelayedReward

#: label, colour and line of each learner
STYLES = {
    "reward_hebbian": ("RewardHebbian", BLUE, "-"),
    "hebbian_no_trace": ("RewardHebbian, no trace", BLUE, ":"),
    "reward_stdp": ("RewardSTDP", ORANGE, "-"),
    "stdp_no_trace": ("RewardSTDP, no trace", ORANGE, ":"),
}


def picture(task: DelayedReward, history: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Reward against episodes, and after learning against the delay of the reward."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    figure.suptitle(title)
    episodes = [line["episodes"] for line in history]
    lines = []
    for name in task.learners:
        label, colour, line = STYLES[name]
        options = {**style(colour), "linestyle": line, "label": label}
        lines += left.plot(episodes, [100 * line[name] for line in history], **options)
        right.plot(task.waits, [100 * reward for reward in history[-1][f"{name}_against_wait"]], **options)
    for axes in (left, right):
        chance = axes.axhline(100 / task.cues, color="grey", linewidth=0.8, linestyle="--", label="chance")
        uncluttered(axes)
    left.set(
        xlabel=f"episodes, reward {task.shown_wait} time steps after the action",
        ylabel="rewarded episodes (%)",
        ylim=(0, 104),
    )
    right.set(xlabel="time steps between action and reward")
    figure.legend(handles=[*lines, chance], loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return saved(figure, path)
