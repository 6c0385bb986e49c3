"""Which value came with this key? Accuracy against delay and load, of short-term memories and of a GRU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from bioopt.costs import CrossEntropy
from bioopt.nn import FastWeights, ShortTermMemory

from ..learner import Block, Learner
from ..verdict import Expected
from . import Task, delayed_recall_plots

MODELS = (
    "buffer",
    "fast_weights",
    "gated_buffer",
    "gated_fast_weights",
    "gru",
)  # gated: stores only queried pairs


@dataclass
class Episodes:
    """A batch of sequences of pairs, then distractors, then a cue."""

    keys: Tensor  # steps × batch × size
    values: Tensor  # steps × batch × values, one-hot
    matters: Tensor  # steps: 1 for a pair that can be queried, 0 for a distractor
    cue: Tensor  # batch × size: the key of one of the pairs
    answer: Tensor  # batch: the number of its value


class Recurrent(nn.Module):
    """The control: a GRU that sees everything the memories see, and a linear readout at the cue."""

    def __init__(self, size: int, values: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(size + values + 1, hidden)
        self.readout = nn.Linear(hidden, values)

    def forward(self, episodes: Episodes) -> Tensor:
        """Scores, batch × values."""
        steps, batch, _ = episodes.keys.shape
        seen = [episodes.keys, episodes.values, episodes.matters.view(-1, 1, 1).expand(steps, batch, 1)]
        cue = F.pad(episodes.cue, (0, self.gru.input_size - episodes.cue.shape[1]))
        outputs, _ = self.gru(torch.cat([torch.cat(seen, 2), cue.unsqueeze(0)]))
        scores: Tensor = self.readout(outputs[-1])
        return scores


class MeanCrossEntropy(CrossEntropy):
    """The mean over a batch, by torch's own reduction, whose rounding differs from that of a mean of each sample's."""

    def of_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """One number."""
        return F.cross_entropy(outputs, labels)


@dataclass(eq=False)
class DelayedRecall(Task):
    """Pairs of a key and a value, then distractors (other pairs), then one of the keys: which was its value.

    The memories need no training: what they retrieve is the answer. The GRU learns from sequences of up to
    ``gru.load`` pairs and ``gru.delay`` distractors, and is tested beyond. All see the same sequences. A memory that
    is not gated stores distractors as it does pairs; a gated one, and the GRU if it learns to, uses the mark by which
    they differ.
    """

    config: DictConfig
    device: torch.device
    _: KW_ONLY
    symbols: int  # number of keys, each a random vector of unit length
    size: int  # of that vector
    values: int  # number of values, equally frequent; chance is one over it
    load: int  # pairs of a sequence where the delay changes
    delays: Sequence[int]  # distractors between the pairs and the cue
    delay: int  # distractors where the load changes
    loads: Sequence[int]  # pairs of a sequence
    buffer: dict[str, Any]  # options of `bioopt.nn.ShortTermMemory`
    fast_weights: dict[str, Any]  # options of `bioopt.nn.FastWeights`
    # ``hidden`` neurons, ``lr`` of Adam, ``batch_size``, the largest ``load`` and ``delay`` of training
    gru: dict[str, Any]
    steps: int  # of training the GRU, in each round
    rounds: int  # their number
    sequences: int  # tested at each delay and load

    def __post_init__(self) -> None:
        self.require_counts("values", "steps", "rounds", "sequences")
        loads, delays = [self.load, self.gru["load"], *self.loads], [self.delay, self.gru["delay"], *self.delays]
        if max(loads) >= self.symbols:
            raise ValueError(
                f"task.symbols={self.symbols} must be more than {max(loads)}, the largest load: the keys of a sequence "
                "differ, and distractors have others"
            )
        if min(loads) < 1 or min(delays) < 0:
            raise ValueError("task: each load must be >= 1, and each delay >= 0")
        self.keys = F.normalize(torch.randn(self.symbols, self.size), dim=1).to(self.device)
        self.memories = {
            "buffer": ShortTermMemory(self.size, self.values, **self.buffer),
            "fast_weights": FastWeights(self.size, self.values, **self.fast_weights),
        }
        self.network = Recurrent(self.size, self.values, self.gru["hidden"]).to(self.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.gru["lr"])
        block = Block(self.network, MeanCrossEntropy(), self.optimizer, clip_norm=1.0)
        self.learner = Learner(self.network, [block], name="gru", rate=f"task.gru.lr={self.gru['lr']}")

    def round(self, number: int) -> dict[str, Any]:
        """Train the GRU, and test all models on the same fresh sequences."""
        losses = self.learner.fit(self.training_batches())
        by_delay = [self.accuracies(self.load, delay) for delay in self.delays]
        by_load = [self.accuracies(load, self.delay) for load in self.loads]
        return {
            "gru_loss": torch.cat(losses).mean().item(),
            **{name: sum(cell[name] for cell in by_delay + by_load) / len(by_delay + by_load) for name in MODELS},
            "against_delay": {name: [cell[name] for cell in by_delay] for name in MODELS},
            "against_load": {name: [cell[name] for cell in by_load] for name in MODELS},
        }

    def training_batches(self) -> Iterator[tuple[Episodes, Tensor]]:
        """Sequences of a random load and delay for each step of a round, and their answers."""
        for _ in range(self.steps):
            load = int(torch.randint(1, self.gru["load"] + 1, ()))
            delay = int(torch.randint(0, self.gru["delay"] + 1, ()))
            episodes = self.episodes(load, delay, self.gru["batch_size"])
            yield episodes, episodes.answer

    def state_dict(self) -> dict[str, Any]:
        """The GRU and its optimizer."""
        return {"gru": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["gru"])
        self.optimizer.load_state_dict(state["optimizer"])

    def episodes(self, load: int, delay: int, count: int) -> Episodes:
        """A batch of sequences: ``load`` pairs with different keys, then ``delay`` distractors with other keys."""
        device = self.keys.device
        order = torch.rand(count, self.symbols, device=device).argsort(1)
        others = torch.randint(load, self.symbols, (count, delay), device=device)
        keys = torch.cat([order[:, :load], order.gather(1, others)], 1).T
        values = torch.randint(self.values, (load + delay, count), device=device)
        queried = torch.randint(load, (1, count), device=device)
        return Episodes(
            keys=self.keys[keys],
            values=F.one_hot(values, self.values).to(self.keys.dtype),
            matters=(torch.arange(load + delay, device=device) < load).to(self.keys.dtype),
            cue=self.keys[keys.gather(0, queried)[0]],
            answer=values.gather(0, queried)[0],
        )

    @torch.no_grad()
    def accuracies(self, load: int, delay: int) -> dict[str, float]:
        """The share of right answers of each model, on the same sequences."""
        episodes = self.episodes(load, delay, self.sequences)
        scores = {name: recalled(memory, episodes, gated=False) for name, memory in self.memories.items()}
        scores |= {f"gated_{name}": recalled(memory, episodes, gated=True) for name, memory in self.memories.items()}
        scores["gru"] = self.network(episodes)
        return {name: (s.argmax(1) == episodes.answer).double().mean().item() for name, s in scores.items()}

    def expected(self, summary: dict[str, Any]) -> dict[str, Sequence[Expected]]:
        """Chance, of each model at the delays that the GRU has been trained on."""
        chance = Expected([1 / self.values], "by chance")
        return {f"{name}_at_trained_delays": [chance] for name in MODELS}

    def finish(self, history: list[dict[str, Any]], title: str, folder: Path) -> tuple[dict[str, float], list[Path]]:
        """Of the last round, for each model: accuracy within and beyond the GRU's training delays, and its span."""
        last = history[-1]
        beyond = [delay > self.gru["delay"] for delay in self.delays]
        found: dict[str, float] = {}
        for name in MODELS:
            for where, far in (("trained", False), ("longer", True)):
                cells = [a for a, longer in zip(last["against_delay"][name], beyond, strict=True) if longer == far]
                if cells:
                    found[f"{name}_at_{where}_delays"] = sum(cells) / len(cells)
            found[f"{name}_at_load_{self.loads[-1]}"] = last["against_load"][name][-1]
        return found, [delayed_recall_plots.picture(self, last, title, folder / "recall.png")]


def recalled(memory: Any, episodes: Episodes, gated: bool) -> Tensor:
    """What a memory retrieves at the cue, having stored each step, or (gated) only the pairs."""
    state = None
    for key, value, matters in zip(episodes.keys, episodes.values, episodes.matters, strict=True):
        state = memory.write(key, value, state, matters if gated else 1.0)
    read: Tensor = memory.read(episodes.cue, state)
    return read
