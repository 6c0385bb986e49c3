"""Several networks that learn side by side, from the same initial weights and the same trials."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import nn

import bioopt

from ..learner import Learner
from . import Task


@dataclass(eq=False)
class SideBySide(Task):
    """An experiment that makes a learner of each name, all from the same random state, and keeps their states."""

    known: ClassVar[tuple[str, ...]]  # the names of learners that there are

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    rounds: int
    learners: Sequence[str]

    def __post_init__(self) -> None:
        self.check()
        if wrong := [name for name in self.learners if name not in self.known]:
            raise ValueError(f"task.learners: {', '.join(wrong)} must be among {', '.join(self.known)}")
        if not self.learners:
            raise ValueError(f"task.learners=[] must name at least one of {', '.join(self.known)}")
        state = torch.get_rng_state()
        self.made: dict[str, Learner] = {}
        for name in self.runs():
            torch.set_rng_state(state)
            self.made[name] = self.learner(name)

    @abstractmethod
    def check(self) -> None:
        """Raise for options that are out of range."""

    @abstractmethod
    def learner(self, name: str) -> Learner:
        """One network with its optimizer."""

    def runs(self) -> list[str]:
        """The names of all networks that learn; more than those of the learners where each has several."""
        return list(self.learners)

    def state_dict(self) -> dict[str, Any]:
        """Networks and optimizers."""
        return {"learners": {name: [one.network.state_dict(), one.state_dict()] for name, one in self.made.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, (network, learner) in state["learners"].items():
            self.made[name].network.load_state_dict(network)
            self.made[name].load_state_dict(learner)

    def close(self) -> None:
        """Remove the hooks of learning rules."""
        for learner in self.made.values():
            learner.close()


def learning_in_time(name: str, network: nn.Module, layer: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    """The optimizer of a network with a recurrent layer.

    Args:
        name: ``"bptt"``: Adam on the gradient through time; ``"frozen"``: the same, where the recurrent layer does not
            learn; ``"random"``: e-prop with random feedback; any other: with symmetric feedback.
        network: the network.
        layer: its recurrent layer.
        lr: learning rate.
        seed: of random feedback.
    """
    if name == "frozen":
        layer.requires_grad_(False)
    if name in ("bptt", "frozen"):
        return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr)
    return bioopt.EProp(network, lr, feedback="random" if name == "random" else "symmetric", seed=seed)
